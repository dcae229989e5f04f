"""What is measured: per stage the same work done the usual way, by the NAD authors' code, and by ours.

Where the results must be identical (poisoning, augmentation), that is asserted before anything is timed.
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from attacks import badnets, blend, sig, trojan
from benchmarks import usual
from benchmarks.limits import training_flops
from benchmarks.nad_checkout import Checkout
from benchmarks.usual import Sample
from defenses import fmp, ft, nad
from reproduce.data.augment import Augment, apply, draw, take, to_input
from reproduce.defending import Clean
from reproduce.models import build
from reproduce.poisoning import Context, Poisoned, triggered_candidates, triggered_labels
from reproduce.rng import derive, generator
from reproduce.training import Recipe, predict, train

SEED, TARGET, CLASSES, BATCH = 0, 5, 10, 64
CPU = torch.device("cpu")
USUAL, AUTHORS = "usual", "NAD"
PRECISIONS = ("fp32", "bf16")
AUGMENT = ft.RELEASED.augment
# Their names for the triggers of our attacks, all with ("nad", "released").
TRIGGERS = {"badnets": "gridTrigger", "sig": "signalTrigger", "blend": "randomPixelTrigger", "trojan": "trojanTrigger"}
MODULES = {"badnets": badnets, "sig": sig, "blend": blend, "trojan": trojan}


@dataclass(frozen=True)
class Sizes:
    """Networks, and images and sentences per timed window. A whole NAD run keeps its 20 epochs and its 2,500 : 18,000
    ratio of training to test images, on fewer of both: rates do not depend on that number."""

    poison_train: int = 50_000
    poison_test: int = 10_000
    augment: int = 2_560
    train: int = 1_280
    test: int = 1_280
    run_train: int = 64
    run_test: int = 256
    run_epochs: int = 20
    map_images: int = 32                    # that score a feature map
    sentences: int = 320
    encoder: tuple[int, int] = (6, 384)     # layers, width
    network: str = "wrn-16-1"
    preact: str = "preact-resnet-18-w16"


QUICK = Sizes(poison_train=200, poison_test=50, augment=128, train=64, test=64, run_train=16, run_test=16, run_epochs=2,
              map_images=4, sentences=40, encoder=(2, 64), network="wrn-10-0.5", preact="preact-resnet-18-w8")
GPU = Sizes(train=50_000, preact="preact-resnet-18")


@dataclass(frozen=True)
class Stage:
    """images: how many (or feature maps, or sentences) one call of any side is credited with; goals: {ours: (must,
    stretch)} speed-ups, set against the side `goal_against`; flops: of training on one image, where that is what our
    sides do."""

    name: str
    images: int
    baselines: dict[str, Callable[[], object]]
    ours: dict[str, Callable[[], object]]
    goals: dict[str, tuple[float, float]]
    goal_against: str = AUTHORS
    flops: float | None = None


@dataclass
class Bench:
    """Synthetic CIFAR-10: random pixels, labels in turn. Speed does not depend on what is in the pictures."""

    sizes: Sizes
    checkout: Path | None = None
    device: torch.device = CPU
    model: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        self.model = build(self.sizes.network, CLASSES, SEED, "cifar10").to(self.device)

    def samples(self, count: int, purpose: str) -> list[Sample]:
        """(uint8 (32, 32, 3), label) for the sides that work picture by picture."""
        pixels = np.random.default_rng(derive(SEED, purpose)).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        return [(image, i % CLASSES) for i, image in enumerate(pixels)]

    def authors(self, train_set: list[Sample], test_set: list[Sample]) -> Checkout | None:
        return self.checkout and Checkout(self.checkout, train_set, test_set, BATCH)

    def plain_model(self) -> nn.Module:
        """The same network with NCHW weights."""
        return deepcopy(self.model).to(memory_format=torch.contiguous_format)


def tensors(samples: list[Sample]) -> tuple[Tensor, Tensor]:
    """uint8 (N, 3, 32, 32) in channels-last memory, as our data sets are, and int64 (N,)."""
    images, labels = zip(*samples, strict=True)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.tensor(labels)


def same(ours: tuple[Tensor, Tensor], theirs: list[Sample], what: str) -> None:
    images, labels = tensors(theirs)
    if not (torch.equal(ours[0], images) and torch.equal(ours[1], labels)):
        raise AssertionError(f"{what}: our numbers differ from the slow path's")


# ---------------------------------------------------------------- poisoning

def poisoning(bench: Bench) -> Iterator[Stage]:
    """The training set at rate 0.1, and both test sets."""
    train_set = bench.samples(bench.sizes.poison_train, "train")
    test_set = bench.samples(bench.sizes.poison_test, "test")
    authors = bench.authors(train_set, test_set)
    (images, labels), (test_images, test_labels) = tensors(train_set), tensors(test_set)
    for name, trigger in TRIGGERS.items():
        module = MODULES[name]
        config = module.SETTINGS["nad", "released"]
        state = module.prepare(config, Context(images, labels, CLASSES, SEED, array=lambda _: trojan_array(bench)))

        def ours(module=module, config=config, state=state) -> tuple[Poisoned, tuple[Tensor, Tensor]]:
            poisoned = module.poison(images, labels, config, state, SEED, CLASSES)
            kept = triggered_candidates(test_labels, config)
            clean = test_images[kept]
            triggered = module.apply(clean, config, state, SEED, "test")
            return poisoned, (triggered, triggered_labels(test_labels[kept], config, CLASSES))

        poisoned, triggered = ours()
        chosen = poisoned.mask.nonzero().flatten().numpy()

        def plain(name=name, chosen=chosen) -> tuple[list[Sample], list[Sample]]:
            usual.poison_test(test_set, None, TARGET)
            return (usual.poison(train_set, set(chosen.tolist()), plain_trigger(bench, name, "train"), TARGET),
                    usual.poison_test(test_set, plain_trigger(bench, name, "test"), TARGET))

        slow_train, slow_test = plain()
        same((poisoned.images, poisoned.labels), slow_train, f"poisoning {name}, training set")
        same(triggered, slow_test, f"poisoning {name}, test set")
        baselines: dict[str, Callable[[], object]] = {USUAL: plain}
        if authors:
            np.random.seed(derive(SEED, "blend-noise", "train") % 2**32)
            their_train, their_test = authors.poison(trigger, chosen)
            same((poisoned.images, poisoned.labels), their_train, f"poisoning {name}, NAD's training set")
            if name != "blend":    # their test noise follows draws that ours does not make
                same(triggered, their_test, f"poisoning {name}, NAD's test set")
            baselines[AUTHORS] = lambda trigger=trigger: authors.poison(trigger)
        yield Stage(f"poisoning {name}", len(images) + 2 * len(test_images), baselines, {"ours": ours},
                    {"ours": (25, 40)})


def trojan_array(bench: Bench) -> np.ndarray:
    """NAD's trigger picture, float32 (3, 32, 32); without a checkout a random one of the same kind."""
    if bench.checkout:
        return np.load(bench.checkout / "trigger" / "best_square_trigger_cifar10.npz")["x"]
    array = np.zeros((3, 32, 32), np.float32)
    array[:, 25:28, 25:28] = np.random.default_rng(SEED).uniform(0, 255, (3, 3, 3))
    return array


def plain_trigger(bench: Bench, name: str, split: str) -> usual.Trigger:
    if name == "badnets":
        return usual.grid_trigger()
    if name == "sig":
        return usual.signal_trigger()
    if name == "blend":
        return usual.noise_trigger(np.random.RandomState(derive(SEED, "blend-noise", split) % 2**32))
    return usual.patch_trigger(trojan_array(bench).transpose(1, 2, 0))


# ---------------------------------------------------------------- augmentation

def augmentation(bench: Bench) -> Iterator[Stage]:
    """Random crop, flip, Cutout and conversion to float, in batches of 64."""
    samples = bench.samples(bench.sizes.augment, "train")
    images, _labels = tensors(samples)
    check_augmentation(samples[:256])

    def drain(loader: object) -> None:
        for _batch in loader:
            pass

    def ours() -> None:
        rng = generator(SEED, "benchmark")
        for index in torch.randperm(len(images), generator=rng).split(BATCH):
            to_input(apply(take(images, index), draw(len(index), 32, AUGMENT, rng), AUGMENT))

    loader = usual.augmenting_loader(samples, BATCH)
    baselines: dict[str, Callable[[], object]] = {USUAL: lambda: drain(loader)}
    if authors := bench.authors(samples, samples[:1]):
        their_loader = authors.clean_loader()
        baselines[AUTHORS] = lambda: drain(their_loader)
    yield Stage("augmentation", len(images), baselines, {"ours": ours}, {"ours": (8, 12)}, goal_against=USUAL)


def check_augmentation(samples: list[Sample]) -> None:
    """With the same parameters, torchvision's operations on PIL pictures give the same floats."""
    images, _labels = tensors(samples)
    parameters = draw(len(images), 32, AUGMENT, generator(SEED, "benchmark"))
    ours = to_input(apply(images, parameters, AUGMENT))
    for (image, _label), (top, left, flip, row, column), result in zip(samples, parameters.tolist(), ours, strict=True):
        picture = TF.crop(TF.pad(Image.fromarray(image), AUGMENT.crop), top, left, 32, 32)
        slow = usual.cutout(TF.to_tensor(TF.hflip(picture) if flip else picture), row, column)
        if not torch.equal(result, slow):
            raise AssertionError("augmentation: our numbers differ from the slow path's")


# ---------------------------------------------------------------- training and erasing

def victim_training(bench: Bench) -> Iterator[Stage]:
    """One epoch of WRN-16-1 on poisoned images, batch 64, unshuffled and unaugmented as in NAD's released code."""
    samples = bench.samples(bench.sizes.train, "train")
    baselines: dict[str, Callable[[], object]] = {
        USUAL: usual_training(bench, usual.plain_loader(samples, BATCH))}
    if authors := bench.authors(samples, samples[:1]):
        loader = authors.backdoor_loader()

        def theirs() -> None:
            model = authors.network(bench.model.state_dict())
            authors.train_victim(model, loader, usual.optimizer(model))
        baselines[AUTHORS] = theirs
    recipe = Recipe(epochs=1, rates=((0, 0.01),), batch=BATCH, shuffle=False)
    yield training_stage(bench, "victim training", samples, recipe, baselines,
                         {"fp32": (1.25, 1.5), "bf16": (1.85, 2.3)})


def preact_training(bench: Bench) -> Iterator[Stage]:
    """One epoch of BackdoorBench's PreAct-ResNet18, which NAD's authors do not have, batch 128, shuffled, cropped and
    flipped; on a CPU at a quarter of its width."""
    bench = replace(bench, sizes=replace(bench.sizes, network=bench.sizes.preact))
    samples = bench.samples(bench.sizes.train, "train")
    recipe = Recipe(epochs=1, rates=((0, 0.01),), batch=2 * BATCH, augment=Augment(crop=4, flip=True))
    loader = usual.augmenting_loader(samples, recipe.batch, cutout=False)
    yield training_stage(bench, "PreAct training", samples, recipe, {USUAL: usual_training(bench, loader)}, {})


def usual_training(bench: Bench, loader: DataLoader) -> Callable[[], object]:
    def plain() -> None:
        model = bench.plain_model()
        usual.train_epoch(model, loader, usual.optimizer(model), usual.cross_entropy)

    return plain


def training_stage(bench: Bench, name: str, samples: list[Sample], recipe: Recipe,
                   baselines: dict[str, Callable[[], object]], goals: dict[str, tuple[float, float]]) -> Stage:
    """Ours in both precisions, on a GPU as CUDA graphs besides; the images are on the device."""
    images, labels = (tensor.to(bench.device) for tensor in tensors(samples))

    def ours(precision: str, graph: bool = False) -> None:
        train(deepcopy(bench.model), images, labels, replace(recipe, precision=precision, graph=graph), SEED,
              phase="victim")

    sides = by_precision(ours)
    if bench.device.type == "cuda":
        sides |= {f"{precision}, graph": lambda p=precision: ours(p, graph=True) for precision in PRECISIONS}
    flops = training_flops(deepcopy(bench.model).train(), to_input(images[:2]))
    return Stage(name, len(images), baselines, sides, goals, flops=flops)


def erasing_step(bench: Bench) -> Iterator[Stage]:
    """One epoch of NAD's distillation on augmented clean images, batch 64."""
    samples = bench.samples(bench.sizes.train, "train")
    images, labels = tensors(samples)
    config = nad.SETTINGS["nad", "released"]
    recipe = replace(config.recipe, epochs=1, rates=((0, 0.01),))
    teacher, plain_teacher = frozen(bench.model), frozen(bench.plain_model())
    loader = usual.augmenting_loader(samples, BATCH)

    def plain() -> None:
        student = bench.plain_model()
        usual.train_epoch(student, loader, usual.optimizer(student), usual.distillation(plain_teacher))

    def ours(precision: str) -> None:
        train(deepcopy(bench.model), images, labels, replace(recipe, precision=precision), SEED, phase="student",
              loss=nad.distillation(teacher, config))

    baselines: dict[str, Callable[[], object]] = {USUAL: plain}
    if authors := bench.authors(samples, samples[:1]):
        their_loader = authors.clean_loader()
        their_teacher = frozen(authors.network(bench.model.state_dict()))

        def theirs() -> None:
            student = authors.network(bench.model.state_dict())
            authors.erase(student, their_teacher, their_loader, usual.optimizer(student))
        baselines[AUTHORS] = theirs
    yield Stage("NAD step", len(images), baselines, by_precision(ours), {"fp32": (1.4, 1.6), "bf16": (2.0, 2.3)})


def evaluation(bench: Bench) -> Iterator[Stage]:
    """Accuracy on the clean and the triggered test set."""
    samples = bench.samples(bench.sizes.test, "test")
    (clean, triggered), loaders = our_test_sets(samples), plain_test_sets(samples)
    model, plain_model = frozen(bench.model), frozen(bench.plain_model())

    def ours(precision: str) -> None:
        for images in (clean, triggered):
            predict(model, images, precision=precision)

    baselines: dict[str, Callable[[], object]] = {
        USUAL: lambda: [usual.accuracy(plain_model, loader) for loader in loaders]}
    if authors := bench.authors(samples[:1], samples):
        their_model, their_loaders = frozen(authors.network(bench.model.state_dict())), authors.test_loaders()
        baselines[AUTHORS] = lambda: authors.evaluate(their_model, their_model, *their_loaders)
    yield Stage("evaluation", len(clean) + len(triggered), baselines, by_precision(ours),
                {"fp32": (1.6, 2.0), "bf16": (3.0, 4.0)})


def whole_run(bench: Bench) -> Iterator[Stage]:
    """NAD's student from the victim to its last evaluation, with the teacher given: test sets, training, evaluation
    before the first and after every epoch, or (ours) once at the end. Every side is credited with the same images."""
    sizes = bench.sizes
    clean_set, test_set = bench.samples(sizes.run_train, "train"), bench.samples(sizes.run_test, "test")
    images, labels = tensors(clean_set)
    config = nad.SETTINGS["nad", "released"]
    config = replace(config, teacher="victim", recipe=replace(config.recipe, epochs=sizes.run_epochs))
    test_count = sum(len(images) for images in our_test_sets(test_set))

    def plain() -> None:
        student, loader = bench.plain_model(), usual.augmenting_loader(clean_set, BATCH)
        optimiser, loss = usual.optimizer(student), usual.distillation(frozen(bench.plain_model()))
        loaders = plain_test_sets(test_set)
        for epoch in range(sizes.run_epochs + 1):
            if epoch:
                usual.train_epoch(student, loader, optimiser, loss)
            for test_loader in loaders:
                usual.accuracy(student, test_loader)

    def ours(precision: str, every_epoch: bool) -> None:
        test_sets = our_test_sets(test_set)

        def score(phase: str, epoch: int, epochs: int, model: nn.Module, row: dict[str, float]) -> None:
            if every_epoch or epoch == epochs:
                for images in test_sets:
                    predict(model, images, precision=precision)

        victim = frozen(bench.model)
        if every_epoch:
            score("victim", 0, sizes.run_epochs, victim, {})
        setting = replace(config, recipe=replace(config.recipe, precision=precision))
        nad.defend(victim, Clean(images, labels, CLASSES), setting, SEED, observe=score)

    baselines: dict[str, Callable[[], object]] = {USUAL: plain}
    if authors := bench.authors(clean_set, test_set):
        baselines[AUTHORS] = lambda: authors.run(bench.model.state_dict(), sizes.run_epochs)
    yield Stage(
        "NAD run", sizes.run_epochs * len(images) + (sizes.run_epochs + 1) * test_count, baselines,
        {f"{precision}, {when}": lambda p=precision, e=every_epoch: ours(p, e)
         for every_epoch, when in ((True, "per epoch"), (False, "end only")) for precision in PRECISIONS},
        {"fp32, per epoch": (1.6, 1.6), "bf16, per epoch": (1.6, 2.9), "fp32, end only": (4.0, 4.0),
         "bf16, end only": (4.0, 6.0)})


def map_scoring(bench: Bench) -> Iterator[Stage]:
    """FMP's scores of the maps of one late convolution, with as many images as the released script takes. A rate counts
    maps, not images."""
    layer, config = "block3.layer.0.conv1", fmp.RELEASED
    images, _labels = tensors(bench.samples(bench.sizes.map_images, "train"))
    model, plain_model = frozen(bench.model), frozen(bench.plain_model())
    signs = fmp.start_signs(images, SEED)
    inputs = to_input(images).contiguous()
    start = (inputs + config.alpha * signs).clamp(0, 1)
    labels = predict(model, images)     # random pixels have no right labels: what the network says of them

    def ours() -> list[float]:
        return fmp.accuracies(model, images, labels, signs, [layer], config)[0][layer].tolist()

    def plain() -> list[float]:
        return usual.map_scores(plain_model, inputs, start, labels, layer, config.eps)

    fast, slow = torch.tensor(ours()), torch.tensor(plain())
    # Other memory formats round otherwise, and an image may lie on the border of two classes.
    if (fast - slow).abs().max() > 100 / len(images) + 1e-3 or (fast != slow).float().mean() > 0.1:
        raise AssertionError("FMP scores: our numbers differ from the slow path's")
    yield Stage("FMP map scoring", len(fast), {USUAL: plain}, {"ours": ours}, {"ours": (1.5, 2.0)}, goal_against=USUAL)


def by_precision(work: Callable[[str], None]) -> dict[str, Callable[[], object]]:
    return {precision: lambda p=precision: work(p) for precision in PRECISIONS}


def frozen(model: nn.Module) -> nn.Module:
    return deepcopy(model).eval().requires_grad_(False)


def our_test_sets(samples: list[Sample]) -> tuple[Tensor, Tensor]:
    """Images without the target class, as they are and with NAD's grid."""
    images, labels = tensors(samples)
    clean = images[triggered_candidates(labels, badnets.RELEASED)]
    return clean, badnets.apply(clean, badnets.RELEASED, {}, SEED, "test")


def plain_test_sets(samples: list[Sample]) -> list[object]:
    return [usual.plain_loader(usual.poison_test(samples, trigger, TARGET), BATCH)
            for trigger in (None, usual.grid_trigger())]


STAGES: dict[str, Callable[[Bench], Iterator[Stage]]] = {
    "poison": poisoning, "augment": augmentation, "train": victim_training, "train-preact": preact_training,
    "step": erasing_step, "maps": map_scoring, "evaluate": evaluation, "run": whole_run,
}
ON_GPU = ("train", "train-preact")
