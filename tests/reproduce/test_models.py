"""The architectures against their authors' networks, taps, and loading of other people's checkpoints."""

import io
import math
import pickle
import zipfile
from argparse import Namespace
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import Normalize

from defenses import fp, nad
from reproduce.data.augment import to_input
from reproduce.defending import Clean
from reproduce.errors import UserError
from reproduce.models import _operations, build, normalise_inputs, parameter_count, size, source
from reproduce.models.checkpoints import load_checkpoint
from reproduce.models.taps import classifier, features, penultimate


def fill(state: dict[str, torch.Tensor], amplitude: float = 0.05) -> None:
    """Weights by formula, so that two implementations can be given the same ones."""
    for k, (name, value) in enumerate(state.items()):
        if value.is_floating_point():
            wave = torch.sin(torch.arange(value.numel(), dtype=torch.float64) * 0.7 + k)
            scale = name.endswith("running_var") or ("bn" in name and name.endswith("weight"))
            value.copy_((1 + 0.5 * wave if scale else amplitude * wave).view(value.shape).float())


# Mean squares of the three group outputs and the first logits of models/wresnet.py in bboylyg/NAD@f17b713 on these
# weights and images.
OFFICIAL = {
    "wrn-16-1": (175_066, [0.031909, 0.339387, 211.179165], [2.21591, 6.01414, 6.01038, 2.21217]),
    "wrn-10-2": (303_706, [0.007369, 0.105637, 29.776247], [1.96424, 4.63123, -2.52815, -4.32738]),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_forward_is_the_official_one(name: str) -> None:
    parameters, squares, logits = OFFICIAL[name]
    model = build(name, 10, seed=0).eval()
    fill(model.state_dict())
    images = (torch.sin(torch.arange(2 * 3 * 32 * 32, dtype=torch.float64) * 0.37) * 0.5 + 0.5).view(2, 3, 32, 32)
    with torch.no_grad():
        out, maps = features(model, images.float(), model.taps)
    assert parameter_count(model) == parameters
    assert [m.double().square().mean().item() for m in maps] == pytest.approx(squares, rel=1e-4)
    assert out[0, :4].tolist() == pytest.approx(logits, rel=1e-4)


def test_resnet_forward_is_the_official_one() -> None:
    """Numbers of models/resnet.py in Zhihao151/MCL@1ce3f44 on these weights and images; classifier_models/resnet.py in
    VinAIResearch/input-aware-backdoor-attack-release@1750e4f gives the same."""
    model = build("resnet-18", 10, seed=0).eval()
    fill(model.state_dict(), 0.01)
    images = (torch.sin(torch.arange(2 * 3 * 32 * 32, dtype=torch.float64) * 0.37) * 0.5 + 0.5).view(2, 3, 32, 32)
    with torch.no_grad():
        out, maps = features(model, images.float(), model.taps)
    assert parameter_count(model) == 11_173_962
    squares = [0.000438394, 0.000357539, 0.000682823, 0.001430137]
    assert [m.double().square().mean().item() for m in maps] == pytest.approx(squares, rel=1e-4)
    assert out[0, 1:4].tolist() == pytest.approx([0.011492983, 0.019322537, 0.025376718], rel=1e-4)


# Mean squares of the outputs of layer1 to layer4 and the first logits of both images, from models/preact_resnet.py in
# SCLBD/BackdoorBench@f02e353 on these weights (amplitude 0.02) and images, the second one dimmed.
PREACT = {
    32: ([0.0008229489, 0.0517785, 3.932743, 424.7521],
         [[-0.1725506, -0.1177402, -0.062543, -0.0109133], [-0.1537865, -0.1022965, -0.051447, -0.0049011]]),
    64: ([0.001488602, 0.03784899, 5.372908, 831.4965],
         [[-0.1909225, -0.1284509, -0.0648832, -0.0047264], [-0.1201577, -0.0751757, -0.0326353, 0.0043516]]),
}


@pytest.mark.parametrize("side", PREACT)
def test_preact_forward_is_the_official_one(side: int) -> None:
    squares, logits = PREACT[side]
    model = build("preact-resnet-18", 10, seed=0).eval()
    fill(model.state_dict(), 0.02)
    images = (torch.sin(torch.arange(2 * 3 * side * side, dtype=torch.float64) * 0.37) * 0.5 + 0.5)
    images = images.view(2, 3, side, side).float() * torch.tensor([1, 0.25]).view(2, 1, 1, 1)
    with torch.no_grad():
        out, maps = features(model, images, model.taps)
    assert [m.double().square().mean().item() for m in maps] == pytest.approx(squares, rel=1e-4)
    torch.testing.assert_close(out[:, :4], torch.tensor(logits), atol=1e-5, rtol=0)


def test_preact_is_registered_and_run_as_the_official_one() -> None:
    """20 convolutions, 3 of them shortcuts; in a block the shortcut is registered last and runs first."""
    model = build("preact-resnet-18", 10, seed=0).eval()
    assert parameter_count(model) == 11_171_146
    layers = [name for name, module in model.named_modules() if not list(module.children())]
    assert layers[:6] == ["conv1", *(f"layer1.0.{part}" for part in ("bn1", "conv1", "bn2", "conv2")), "layer1.1.bn1"]
    assert layers[9:14] == [f"layer2.0.{part}" for part in ("bn1", "conv1", "bn2", "conv2", "shortcut.0")]
    convolutions = [name for name in layers if isinstance(model.get_submodule(name), torch.nn.Conv2d)]
    assert len(convolutions) == 20 and layers[-1] == "linear" and len(layers) == 37
    seen: list[str] = []
    for name in convolutions:
        model.get_submodule(name).register_forward_hook(lambda _m, _i, _o, name=name: seen.append(name))
    model(torch.rand(1, 3, 32, 32))
    assert seen[5:8] == ["layer2.0.shortcut.0", "layer2.0.conv1", "layer2.0.conv2"] and sorted(seen) == sorted(
        convolutions)


def test_a_convolutions_output_is_left_alone() -> None:
    """What a hook keeps of a convolution is its output, not the residual sum, which is not made in its place."""
    model = build("preact-resnet-18-w8", 10, seed=0).eval()
    _logits, (conv, block) = features(model, torch.rand(2, 3, 32, 32), ("layer1.0.conv2", "layer1.0"))
    assert not torch.equal(conv, block)


@pytest.mark.parametrize(("name", "width"), [("preact-resnet-18-w16", 16), ("preact-resnet-18-w8", 8)])
def test_narrow_preacts_keep_the_names(name: str, width: int) -> None:
    narrow, full = build(name, 10, seed=0).state_dict(), build("preact-resnet-18", 10, seed=0).state_dict()
    assert list(narrow) == list(full)
    for key, value in narrow.items():
        assert [n if n in (1, 3, 10) else n * 64 // width for n in value.shape] == list(full[key].shape)


@pytest.fixture(scope="module")
def vgg() -> torch.nn.Module:
    return build("vgg-19-bn", 10, seed=0, dataset="cifar10").eval()


def test_vgg_is_torchvisions_on_normalised_images(vgg: torch.nn.Module) -> None:
    with torch.device("meta"):
        theirs = torchvision.models.vgg19_bn(num_classes=10).eval()
    assert list(vgg.state_dict()) == list(theirs.state_dict()) and parameter_count(vgg) == 139_622_218
    theirs.load_state_dict(vgg.state_dict(), assign=True)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        logits, maps = features(vgg, images, vgg.taps)
        expected = theirs(Normalize((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261))(images))
    torch.testing.assert_close(logits, expected)
    assert [tuple(m.shape[1:]) for m in maps] == [(128, 16, 16), (256, 8, 8), (512, 4, 4), (512, 2, 2)]
    named, (output,) = features(vgg, images, (vgg.penultimate,))
    torch.testing.assert_close(classifier(vgg)(output.relu()), named)


def test_channels_of_a_vgg_are_cut_off_at_the_classifier(vgg: torch.nn.Module) -> None:
    images, channels = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8), torch.tensor([3, 4000])
    pruned = deepcopy(vgg)
    active = fp.activations(pruned, images)
    active[:, channels] = 0
    fp.prune(pruned, channels)
    with torch.no_grad():
        torch.testing.assert_close(pruned(to_input(images)), classifier(vgg)(active))


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "gtsrb", "tiny-imagenet", "digits", None])
def test_preact_normalises_as_its_data_set_has_it(dataset: str | None) -> None:
    """Values of get_dataset_normalization in SCLBD/BackdoorBench@f02e353; the identity where it has none."""
    mean, deviation = {
        "cifar10": ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)),
        "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
        "tiny-imagenet": ((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
    }.get(dataset, ((0, 0, 0), (1, 1, 1)))
    plain = build("preact-resnet-18-w16", 10, seed=0).eval()
    model = build("preact-resnet-18-w16", 10, seed=0, dataset=dataset).eval()
    images = torch.rand(2, 3, 32, 32)
    expected = Normalize(mean, deviation)(images)
    torch.testing.assert_close(model.normalise(images), expected)
    with torch.no_grad():
        torch.testing.assert_close(model(images), plain(expected))


def test_a_normalisation_is_no_weight_and_stays_with_the_model() -> None:
    plain = build("preact-resnet-18-w8", 10, seed=0).eval()
    model = build("preact-resnet-18-w8", 10, seed=0, dataset="cifar10").eval()
    images = torch.rand(2, 3, 32, 32)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())
    before = model(images)
    model.load_state_dict(plain.state_dict())
    assert torch.equal(model(images), before) and not torch.equal(plain(images), before)
    assert torch.equal(deepcopy(model)(images), before)
    assert torch.equal(functional_call(model, dict(plain.named_parameters()), (images,)), before)
    assert not hasattr(build("wrn-10-1", 10, 0, "cifar10"), "normalise")


def test_a_scratch_teacher_normalises_as_its_student() -> None:
    model = build("preact-resnet-18-w8", 10, seed=0, dataset="cifar100")
    clean = Clean(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.tensor([0, 1]), 10)
    fresh = nad._untrained(model, clean, None, seed=0)
    assert torch.equal(fresh.mean, model.mean) and torch.equal(fresh.deviation, model.deviation)
    assert not torch.equal(fresh.conv1.weight, model.conv1.weight)


@pytest.mark.parametrize("name", ["wrn-10-1", "resnet-18", "preact-resnet-18-w8"])
def test_the_named_parts_make_the_logits(name: str) -> None:
    model = build(name, 10, seed=0).eval()
    with torch.no_grad():
        logits, (output,) = features(model, torch.rand(2, 3, 32, 32), (model.penultimate,))
        pooled = (output if name.startswith("preact") else output.relu()).mean((2, 3))
        assert torch.allclose(classifier(model)(pooled), logits, atol=1e-5)
    assert set(model.taps) <= {layer for layer, _ in model.named_modules()}
    files = {"wrn-10-1": "wide_resnet.py", "resnet-18": "resnet.py", "preact-resnet-18-w8": "preact_resnet.py"}
    assert source(name).name == files[name]


def test_the_input_of_preacts_classifier_may_be_negative() -> None:
    """No ReLU stands before it, and nobody may add one."""
    model = build("preact-resnet-18-w8", 10, seed=0).eval()
    images = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8)
    active = fp.activations(model, images)
    assert (active < 0).any()
    channels = torch.tensor([0, 63])
    active[:, channels] = 0
    fp.prune(model, channels)
    with torch.no_grad():
        torch.testing.assert_close(model(to_input(images)), model.linear(active))


def test_a_resnet_in_torchvisions_spelling_loads(tmp_path: Path) -> None:
    state = build("resnet-18", 10, seed=5).state_dict()
    names = {name: name.replace("shortcut.", "downsample.").replace("linear.", "fc.") for name in state}
    assert "layer2.0.downsample.1.weight" in names.values() and "fc.bias" in names.values()
    torch.save({"state_dict": {f"module.{names[name]}": value for name, value in state.items()}}, tmp_path / "m.pth")
    loaded = load_checkpoint(tmp_path / "m.pth", "resnet-18", 10).state_dict()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_names_are_those_of_the_public_line() -> None:
    assert {"conv1.weight", "layer1.0.conv1.weight", "layer2.0.shortcut.0.weight", "layer2.0.shortcut.1.weight",
            "linear.bias"} <= build("resnet-18", 10, 0).state_dict().keys()
    names = build("wrn-16-1", 10, 0).state_dict().keys()
    assert {"conv1.weight", "block1.layer.0.bn1.weight", "block2.layer.0.convShortcut.weight", "bn1.running_mean",
            "fc.bias"} <= names
    assert "block1.layer.0.convShortcut.weight" not in names


def test_initialisation_depends_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = build("wrn-10-1", 10, seed=3)
    torch.manual_seed(2)
    again, other = build("wrn-10-1", 10, seed=3), build("wrn-10-1", 10, seed=4)
    assert torch.equal(first.conv1.weight, again.conv1.weight)
    assert not torch.equal(first.conv1.weight, other.conv1.weight)


def test_taps_leave_the_model_alone_and_name_a_missing_layer() -> None:
    model = build("wrn-10-1", 10, 0).eval()
    images = torch.rand(2, 3, 32, 32)
    logits, maps = features(model, images, ("block3", "block1"))
    assert torch.equal(logits, model(images))
    assert [tuple(m.shape[1:]) for m in maps] == [(64, 8, 8), (16, 32, 32)]
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(UserError, match="no layer block9: choose from block1, block2, block3"):
        features(model, images, ("block9",))


def test_penultimate_is_what_the_classifier_sees() -> None:
    model = build("wrn-10-1", 10, 0).eval()
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    logits, feature = penultimate(model, images)
    block3 = features(model, images, ("block3",))[1][0]
    assert torch.equal(logits, model(images)) and feature.shape == (2, 64)
    torch.testing.assert_close(feature, torch.relu(model.bn1(block3)).mean((2, 3)))
    torch.testing.assert_close(logits, model.fc(feature))
    gradient, = torch.autograd.grad(feature.square().sum(), images)
    assert gradient.abs().sum() > 0
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(KeyError, match="no linear layer"):
        penultimate(torch.nn.Sequential(torch.nn.Flatten()), images)


@pytest.mark.parametrize(("name", "mean", "deviation"), [
    ("none", (0, 0, 0), (1, 1, 1)), ("cifar10", (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))])
def test_named_values_take_the_place_of_a_networks_own(name: str, mean: tuple, deviation: tuple) -> None:
    plain = build("preact-resnet-18-w8", 10, seed=0).eval()
    model = normalise_inputs(build("preact-resnet-18-w8", 10, seed=0, dataset="cifar10").eval(), name)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(images), plain(Normalize(mean, deviation)(images)))


def test_normalised_inputs_keep_the_names_of_the_weights() -> None:
    model = build("wrn-10-1", 10, 0).eval()
    images, names = torch.rand(2, 3, 32, 32), list(model.state_dict())
    mean, deviation = torch.tensor((0.4914, 0.4822, 0.4465)), torch.tensor((0.2023, 0.1994, 0.2010))
    seen = (images - mean.view(1, 3, 1, 1)) / deviation.view(1, 3, 1, 1)
    expected = model(seen)
    assert torch.allclose(normalise_inputs(model, "cifar10")(images), expected, atol=1e-5)
    assert torch.allclose(model.normalise(images), seen, atol=1e-5)
    assert list(model.state_dict()) == names


@pytest.fixture
def trained() -> dict[str, torch.Tensor]:
    return build("wrn-10-1", 10, seed=5).state_dict()


@pytest.mark.parametrize("wrap", [
    lambda state: state,
    lambda state: {"state_dict": state, "epoch": 3, "best_clean_acc": np.float64(81.25)},
    lambda state: {"model": {f"module.{name}": value for name, value in state.items()}},
    lambda state: {"net": {name: value for name, value in state.items() if "num_batches" not in name}},
], ids=["bare", "state_dict", "data-parallel", "before torch 0.4.1"])
def test_public_checkpoint_layouts_load(tmp_path: Path, trained: dict, wrap: object) -> None:
    torch.save(wrap(trained), tmp_path / "model.pth.tar")
    model = load_checkpoint(tmp_path / "model.pth.tar", "wrn-10-1", 10)
    assert not model.training
    assert torch.equal(model.fc.weight, trained["fc.weight"])


def numpy_1(content: object) -> bytes:
    """A checkpoint file as a computer with numpy 1 writes it."""
    file = io.BytesIO()
    torch.save(content, file)
    old, new = io.BytesIO(), zipfile.ZipFile(file)
    with zipfile.ZipFile(old, "w") as archive:
        for name in new.namelist():
            archive.writestr(name, new.read(name).replace(b"numpy._core.", b"numpy.core."))
    return old.getvalue()


def attack_result(version: int) -> dict:
    """What save_attack_result of utils/save_load_attack.py puts in attack_result.pt. 1: with pictures, as in
    huangd1999/BackdoorBench@6135839; 2: with states of datasets, as in SCLBD/BackdoorBench@f02e353
    (utils/bd_dataset_v2.py:135-140, 322-330)."""
    index, pictures = np.array([3, 7]), [Image.new("RGB", (32, 32), (9, 8, 7))] * 2
    old = {"x": pictures, "y": np.array([0, 0]), "original_index": index}
    container = {3: {"path": "record/badnet/bd_train_dataset/0/3.png", "other_info": [0, 3, 1, np.int64(4)]}}
    new = {"bd_data_container": {"save_folder_path": "record/badnet/bd_train_dataset", "save_file_format": ".png",
                                 "data_dict": container},
           "getitem_all": True, "getitem_all_switch": False, "original_index_array": index,
           "poison_indicator": np.array([0.0, 1.0]), "save_folder_path": "record/badnet/bd_train_dataset"}
    state = {1: old, 2: new}[version]
    return {"model_name": "preactresnet18", "num_classes": 10, "data_path": "./data/cifar10", "img_size": (32, 32, 3),
            "model": build("preact-resnet-18-w8", 10, seed=5).state_dict(), "clean_data": "cifar10", "bd_train": state,
            "bd_test": {**state, "original_targets": index} if version == 1 else state}


@pytest.mark.parametrize("write", [lambda content, path: torch.save(content, path),
                                   lambda content, path: path.write_bytes(numpy_1(content))],
                         ids=["numpy 2", "numpy 1"])
@pytest.mark.parametrize("version", [1, 2])
def test_an_attack_result_of_backdoorbench_loads(tmp_path: Path, version: int, write: Callable) -> None:
    content = attack_result(version)
    write(content, tmp_path / "attack_result.pt")
    model = load_checkpoint(tmp_path / "attack_result.pt", "preact-resnet-18-w8", 10, "cifar10")
    assert all(torch.equal(value, content["model"][name]) for name, value in model.state_dict().items())
    assert model.mean.flatten().tolist() == pytest.approx([0.4914, 0.4822, 0.4465])


def test_an_attack_result_with_foreign_objects_is_one_clear_line(tmp_path: Path) -> None:
    content = attack_result(2) | {"args": Namespace(seed=0)}
    torch.save(content, tmp_path / "attack_result.pt")
    with pytest.raises(UserError, match="save its state_dict alone") as caught:
        load_checkpoint(tmp_path / "attack_result.pt", "preact-resnet-18-w8", 10, "cifar10")
    assert "\n" not in str(caught.value)


def test_safetensors_load(tmp_path: Path, trained: dict) -> None:
    save_file({name: value.contiguous() for name, value in trained.items()}, tmp_path / "m.safetensors")
    assert torch.equal(load_checkpoint(tmp_path / "m.safetensors", "wrn-10-1", 10).fc.weight, trained["fc.weight"])


class Bomb:
    """Would create a file when unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return Path.touch, (self.target,)


def test_a_checkpoint_with_code_is_refused_and_not_executed(tmp_path: Path, trained: dict) -> None:
    torch.save({"state_dict": trained, "extra": Bomb(tmp_path / "executed")}, tmp_path / "bad.pth")
    with pytest.raises(UserError, match="could execute code"):
        load_checkpoint(tmp_path / "bad.pth", "wrn-10-1", 10)
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Bomb(tmp_path / "executed")))
    with pytest.raises(UserError):
        load_checkpoint(tmp_path / "plain.pth", "wrn-10-1", 10)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(("make", "said"), [
    (lambda path, state: None, "no such checkpoint"),
    (lambda path, state: path.write_bytes(b"<html>404</html>"), "not a readable checkpoint|refused"),
    (lambda path, state: (torch.save(state, path), path.write_bytes(path.read_bytes()[:5000])), "not a readable"),
    (lambda path, state: path.touch(), "not a readable checkpoint"),
    (lambda path, state: save_file({"fc.bias": state["fc.bias"]}, path), "not a readable checkpoint"),
    (lambda path, state: torch.save({"epoch": 3}, path), "holds no state_dict"),
    (lambda path, state: torch.save(dict(enumerate(state.values())), path), "holds no state_dict"),
    (lambda path, state: torch.save({**state, "fc.bias": state["fc.bias"] * math.nan}, path), "no finite.* fc.bias"),
    (lambda path, state: torch.save({**state, "fc.bias": state["fc.bias"] * 1j}, path), "no finite numbers, fc.bias"),
    (lambda path, state: torch.save({**state, "fc2.weight": state["fc.weight"]}, path), "fc2.weight too many"),
    (lambda path, state: torch.save({n: v for n, v in state.items() if n != "fc.bias"}, path), "lacks fc.bias"),
    (lambda path, state: torch.save({**state, "fc.bias": torch.zeros(43)}, path), r"fc.bias is \(43,\), expected"),
])
def test_wrong_files_get_one_line(tmp_path: Path, trained: dict, make: object, said: str) -> None:
    path = tmp_path / "file.pth"
    make(path, trained)
    with pytest.raises(UserError, match=said) as caught:
        load_checkpoint(path, "wrn-10-1", 10)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_the_old_kind_cut_anywhere_gets_one_line(tmp_path: Path, trained: dict) -> None:
    whole = io.BytesIO()
    torch.save(trained, whole, _use_new_zipfile_serialization=False)
    path, content = tmp_path / "file.pth", whole.getvalue()
    for length in (*range(0, 400, 20), 1000, 5000, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"readable checkpoint|refused") as caught:
            load_checkpoint(path, "wrn-10-1", 10)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="readable checkpoint"):
        load_checkpoint(tmp_path / ("a" * 5000), "wrn-10-1", 10)


def test_unknown_architecture_lists_the_known() -> None:
    with pytest.raises(UserError, match="wrn-16-1"):
        build("resnet-50", 10, 0)


def test_sizes_are_multiples_of_the_small_network() -> None:
    """For estimates of time: a PreAct-ResNet18 multiplies 20 times as often, at 64 pixels four times more."""
    assert size("wrn-16-1") == 1.0
    assert 19 < size("preact-resnet-18") < 22
    assert size("preact-resnet-18", 64) == pytest.approx(4 * size("preact-resnet-18"), rel=0.01)
    assert size("preact-resnet-18-w8") < size("preact-resnet-18-w16") < 2


@pytest.mark.parametrize("name", ["wrn-10-1", "resnet-18", "preact-resnet-18-w16"])
def test_operations_are_those_that_torch_counts(name: str) -> None:
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        build(name, 10, 0).eval()(torch.zeros(1, 3, 32, 32))
    assert 2 * _operations(name, 32) == counter.get_total_flops()
