"""WideResNet and ResNet-18 against the authors' networks, taps, and loading of other people's checkpoints."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from reproduce.errors import UserError
from reproduce.models import build, normalise_inputs, parameter_count, source
from reproduce.models.checkpoints import load_checkpoint
from reproduce.models.taps import features, penultimate


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


@pytest.mark.parametrize("name", ["wrn-10-1", "resnet-18"])
def test_the_named_parts_make_the_logits(name: str) -> None:
    model = build(name, 10, seed=0).eval()
    with torch.no_grad():
        logits, (output,) = features(model, torch.rand(2, 3, 32, 32), (model.penultimate,))
        pooled = output.relu().mean((2, 3))
        assert torch.allclose(model.get_submodule(model.classifier)(pooled), logits, atol=1e-5)
    assert set(model.taps) <= {layer for layer, _ in model.named_modules()}
    assert source(name).name == ("resnet.py" if name == "resnet-18" else "wide_resnet.py")


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


def test_normalised_inputs_keep_the_names_of_the_weights() -> None:
    model = build("wrn-10-1", 10, 0).eval()
    images, names = torch.rand(2, 3, 32, 32), list(model.state_dict())
    mean, deviation = torch.tensor((0.4914, 0.4822, 0.4465)), torch.tensor((0.2023, 0.1994, 0.2010))
    expected = model((images - mean.view(1, 3, 1, 1)) / deviation.view(1, 3, 1, 1))
    assert torch.allclose(normalise_inputs(model, "cifar10")(images), expected, atol=1e-5)
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
    (lambda path, state: torch.save({"epoch": 3}, path), "holds no state_dict"),
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


def test_unknown_architecture_lists_the_known() -> None:
    with pytest.raises(UserError, match="wrn-16-1"):
        build("resnet-50", 10, 0)
