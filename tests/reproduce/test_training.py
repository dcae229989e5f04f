"""The training loop: what it computes, that it repeats, and that an interrupted one ends where it would have."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from reproduce.data.augment import Augment, to_input
from reproduce.errors import UserError
from reproduce.models import build
from reproduce.protocols import shorten
from reproduce.rng import generator
from reproduce.store import Progress, digest
from reproduce.training import Continued, Cosine, Loss, Recipe, cross_entropy, predict, sgd, train

RECIPE = Recipe(epochs=4, rates=((0, 0.1), (2, 0.01)), batch=32, augment=Augment(crop=4, flip=True, cutout=2))


@pytest.fixture(scope="module")
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    rng = generator(0, "training test")
    return (torch.randint(256, (80, 3, 32, 32), dtype=torch.uint8, generator=rng),
            torch.randint(10, (80,), generator=rng))


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([value.flatten().double() for value in model.state_dict().values()])


def test_equals_the_plain_loop(batch: tuple) -> None:
    images, labels = batch
    recipe = replace(RECIPE, shuffle=False, augment=Augment())
    model = build("wrn-10-1", 10, 0)
    plain = deepcopy(model)
    train(model, images, labels, recipe, 0, phase="p")
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=True)
    for epoch in range(4):
        optimizer.param_groups[0]["lr"] = 0.1 if epoch < 2 else 0.01
        for start in range(0, 80, 32):
            optimizer.zero_grad()
            F.cross_entropy(plain(to_input(images[start:start + 32])), labels[start:start + 32]).backward()
            optimizer.step()
    assert torch.allclose(weights(model), weights(plain), atol=1e-6)


def test_repeats_and_depends_on_seed_and_phase(batch: tuple) -> None:
    def trained(seed: int, phase: str) -> torch.Tensor:
        model = build("wrn-10-1", 10, 0)
        train(model, *batch, replace(RECIPE, epochs=1), seed, phase=phase)
        return weights(model)

    first = trained(0, "a")
    assert torch.equal(first, trained(0, "a"))
    assert not torch.equal(first, trained(1, "a"))
    assert not torch.equal(first, trained(0, "b"))


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("stop_after", [1, 3])
def test_resumed_training_is_bit_for_bit_the_undisturbed_one(batch: tuple, tmp_path, monkeypatch, stop_after) -> None:
    monkeypatch.setattr(Progress, "interval", 0.0)
    undisturbed = build("wrn-10-1", 10, 0)
    whole = train(undisturbed, *batch, RECIPE, 0, phase="v")

    def interrupt(_phase: str, epoch: int, *_rest: object) -> None:
        if epoch == stop_after:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(build("wrn-10-1", 10, 0), *batch, RECIPE, 0, phase="v", observe=interrupt,
              checkpoint=Progress(tmp_path / "p"))
    seen: list[int] = []
    resumed = build("wrn-10-1", 10, 7)  # other weights: all of them must come from the checkpoint
    history = train(resumed, *batch, RECIPE, 0, phase="v", checkpoint=Progress(tmp_path / "p"),
                    observe=lambda _p, epoch, *_r: seen.append(epoch))
    assert seen == list(range(stop_after + 1, 5))
    assert torch.equal(weights(resumed), weights(undisturbed))
    assert history == whole


def test_a_checkpoint_about_another_trigger_is_ignored(batch: tuple, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Progress, "interval", 0.0)
    one, other = (digest({"trigger": torch.full((3,), value)}) for value in (1.0, 1.5))
    train(build("wrn-10-1", 10, 0), *batch, RECIPE, 0, phase="v", checkpoint=Progress(tmp_path / "p", one))
    assert Progress(tmp_path / "p", one).load() is not None
    assert Progress(tmp_path / "p", other).load() is None and Progress(tmp_path / "p").load() is None
    assert digest({}) == ""


def test_a_damaged_checkpoint_is_ignored(batch: tuple, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Progress, "interval", 0.0)
    train(build("wrn-10-1", 10, 0), *batch, RECIPE, 0, phase="v", checkpoint=Progress(tmp_path / "p"))
    content = bytearray((tmp_path / "p").read_bytes())
    content[-100] ^= 1
    (tmp_path / "p").write_bytes(content)
    assert Progress(tmp_path / "p").load() is None


def test_extra_draws_leave_every_other_stream_alone(batch: tuple) -> None:
    drawn: list[torch.Tensor] = []

    def loss(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, extra: torch.Tensor) -> Loss:
        drawn.append(extra)
        return cross_entropy(model, images, labels)

    plain, other = build("wrn-10-1", 10, 0), build("wrn-10-1", 10, 0)
    recipe = replace(RECIPE, epochs=2)
    train(plain, *batch, recipe, 0, phase="v")
    train(other, *batch, recipe, 0, phase="v", loss=loss,
          extra=lambda count, rng: torch.rand(count, 5, generator=rng))
    assert torch.equal(weights(plain), weights(other))
    assert [tuple(d.shape) for d in drawn] == [(32, 5), (32, 5), (16, 5)] * 2
    assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[3])


def two_optimizers(model: torch.nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    last = list(model.fc.parameters())
    others = [p for p in model.parameters() if all(p is not q for q in last)]
    return [sgd(others, recipe), torch.optim.Adam(last, 0.02)]


@pytest.mark.parametrize("stop_after", [1, 3])
def test_a_training_with_adam_resumes_bit_for_bit(batch: tuple, tmp_path, monkeypatch, stop_after) -> None:
    monkeypatch.setattr(Progress, "interval", 0.0)
    before = [{"epoch": 1, "loss": 0.5}]

    def trained(seed: int, stop: int | None) -> tuple[torch.nn.Module, list]:
        def observe(_phase: str, epoch: int, *_rest: object) -> None:
            if epoch == stop:
                raise Interrupted
        model = build("wrn-10-1", 10, seed)
        checkpoint = Continued(Progress(tmp_path / "p"), before)
        return model, train(model, *batch, RECIPE, 0, phase="v", optimizers=two_optimizers, observe=observe,
                            checkpoint=checkpoint)

    undisturbed, whole = trained(0, None)
    assert not torch.equal(weights(undisturbed), weights(build("wrn-10-1", 10, 0)))
    (tmp_path / "p").unlink()
    with pytest.raises(Interrupted):
        trained(0, stop_after)
    assert Progress(tmp_path / "p").load()[2][:1] == before
    resumed, history = trained(7, None)
    assert torch.equal(weights(resumed), weights(undisturbed)) and history == whole


def test_rates_of_further_optimizers_fall_with_the_recipes(batch: tuple) -> None:
    made: list[torch.optim.Optimizer] = []

    def optimizers(model: torch.nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
        made.extend(two_optimizers(model, recipe))
        return made

    seen: list[list[float]] = []
    train(build("wrn-10-1", 10, 0), *batch, RECIPE, 0, phase="v", optimizers=optimizers,
          observe=lambda *_: seen.append([o.param_groups[0]["lr"] for o in made]))
    assert seen == [[0.1, 0.02]] * 2 + [[0.01, pytest.approx(0.002)]] * 2


def test_accuracy_is_that_on_the_labels_trained_towards(batch: tuple) -> None:
    def loss(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Loss:
        logits = model(images)
        return Loss(F.cross_entropy(logits, labels), logits, labels=logits.argmax(1))

    def unclassified(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Loss:
        return Loss(model(images).square().mean(), None)

    recipe = replace(RECIPE, epochs=1)
    assert train(build("wrn-10-1", 10, 0), *batch, recipe, 0, phase="v", loss=loss)[0]["train_acc"] == 100
    assert "train_acc" not in train(build("wrn-10-1", 10, 0), *batch, recipe, 0, phase="v", loss=unclassified)[0]


def test_history_and_rates(batch: tuple) -> None:
    model = build("wrn-10-1", 10, 0)
    history = train(model, *batch, RECIPE, 0, phase="v")
    assert [row["rate"] for row in history] == [0.1, 0.1, 0.01, 0.01]
    assert [row["epoch"] for row in history] == [1, 2, 3, 4]
    assert all(0 <= row["train_acc"] <= 100 and row["loss"] > 0 for row in history)
    assert not model.training


def test_bf16_is_close_to_fp32(batch: tuple) -> None:
    losses = {}
    for precision in ("fp32", "bf16"):
        recipe = replace(RECIPE, epochs=1, precision=precision)
        losses[precision] = train(build("wrn-10-1", 10, 0), *batch, recipe, 0, phase="v")[0]["loss"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.1)
    assert losses["bf16"] != losses["fp32"]


def test_projection_is_applied_after_every_step(batch: tuple) -> None:
    model = build("wrn-10-1", 10, 0)

    def project(net: torch.nn.Module) -> None:
        with torch.no_grad():
            net.fc.weight[:, 0] = 0

    train(model, *batch, replace(RECIPE, epochs=1), 0, phase="v", project=project)
    assert model.fc.weight[:, 0].abs().max() == 0 and model.fc.weight[:, 1].abs().max() > 0


def test_ends_after_the_epoch_it_is_told_to(batch: tuple, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Progress, "interval", 0.0)
    whole, stopped = build("wrn-10-1", 10, 0), build("wrn-10-1", 10, 0)
    history = train(whole, *batch, replace(RECIPE, epochs=2), 0, phase="v")
    assert train(stopped, *batch, RECIPE, 0, phase="v", until=lambda row: row["epoch"] == 2,
                 checkpoint=Progress(tmp_path / "p")) == history
    assert torch.equal(weights(stopped), weights(whole)) and not stopped.training
    # Resumed from what it left, it trains no further.
    resumed = build("wrn-10-1", 10, 7)
    assert train(resumed, *batch, RECIPE, 0, phase="v", until=lambda row: row["epoch"] == 2,
                 checkpoint=Progress(tmp_path / "p")) == history
    assert torch.equal(weights(resumed), weights(whole))


def test_a_training_that_diverges_says_so_and_keeps_its_last_sound_epoch(batch: tuple, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Progress, "interval", 0.0)
    saved = Progress(tmp_path / "p")
    with pytest.raises(UserError, match=r"diverged: loss is (nan|inf) in epoch 2 of 'v'"):
        train(build("wrn-10-1", 10, 0), *batch, replace(RECIPE, rates=((0, 0.01), (1, 1e30))), 0, phase="v",
              checkpoint=saved)
    assert saved.load()[0] == 1


def test_a_model_whose_outputs_are_no_numbers_predicts_nothing(batch: tuple) -> None:
    model = build("wrn-10-1", 10, 0).eval()
    with torch.no_grad():
        model.fc.bias[3] = float("nan")
    with pytest.raises(UserError, match="outputs are not numbers"):
        predict(model, batch[0])


def test_predictions_do_not_depend_on_the_batch(batch: tuple) -> None:
    model = build("wrn-10-1", 10, 0).eval()
    assert torch.equal(predict(model, batch[0], batch=7), predict(model, batch[0], batch=80))


def test_dropout_depends_on_the_seed_phase_and_epoch_alone(batch: tuple) -> None:
    def trained(global_seed: int, seed: int = 0) -> list[float]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.5), torch.nn.Linear(3 * 32 * 32, 10))
        torch.manual_seed(global_seed)
        recipe = Recipe(epochs=2, rates=((0, 1e-9),), batch=80, shuffle=False)     # nothing but the masks changes
        rows = train(model, *batch, recipe, seed, phase="v")
        assert torch.initial_seed() == global_seed
        return [row["loss"] for row in rows]

    first, second = trained(1)
    assert abs(first - second) > 1e-4
    assert trained(2) == [first, second] != trained(1, seed=1)


@pytest.mark.gpu
@pytest.mark.parametrize("noisy", [0, 1, 2], ids=["plain", "extra draws", "as many as chance will have it"])
def test_a_captured_step_trains_like_an_eager_one(batch: tuple, noisy: int) -> None:
    def loss(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, extra: torch.Tensor) -> Loss:
        changed = images[:len(extra)] + 0.1 * extra
        return cross_entropy(model, torch.cat([changed, images[len(extra):]]), labels)

    def extra(count: int, rng: torch.Generator) -> torch.Tensor:
        left_out = int(torch.randint(noisy, (1,), generator=rng))
        return torch.rand(count - left_out, 3, 32, 32, generator=rng)

    losses = {}
    for graph in (False, True):
        model = build("wrn-10-1", 10, 0).cuda()
        recipe = replace(RECIPE, batch=16, graph=graph)
        options = {"loss": loss, "extra": extra} if noisy else {}
        losses[graph] = train(model, batch[0].cuda(), batch[1].cuda(), recipe, 0, phase="v", **options)[-1]["loss"]
    assert losses[True] == pytest.approx(losses[False], rel=1e-2)


def test_cosine_equals_torchs_annealing() -> None:
    recipe = Recipe(epochs=5, rates=((0, 0.1),), cosine=Cosine(epochs=8, floor=1e-3))
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8, 1e-3)
    for epoch in range(5):
        assert recipe.rate(epoch) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        schedule.step()


def test_a_shortened_cosine_keeps_its_shape() -> None:
    short = shorten(Recipe(epochs=50, rates=((0, 0.1),), cosine=Cosine(epochs=100, floor=1e-3)), 5)
    assert short.epochs == 5 and short.cosine == Cosine(10, 1e-3)
