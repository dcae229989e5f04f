"""Somebody's own text classifier on the command line: evaluate, defend, purify, and every bad input in one line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from reproduce import purify, repair
from reproduce.cli import main
from reproduce.data import load_text
from reproduce.errors import UserError
from reproduce.models import encoder
from tests.defenses.text_victim import NOWHERE, save_suspect, text_victim

SENTENCES = load_text("sentences", NOWHERE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/: a backdoored classifier as save_pretrained writes it; weights.safetensors: of the tiny encoder;
    clean.tsv, input.txt."""
    place = tmp_path_factory.mktemp("suspect")
    save_suspect(place)
    save_file(text_victim("addsent").model.network.state_dict(), place / "weights.safetensors")
    return place


@pytest.fixture
def call(folder: Path, tmp_path: Path) -> Callable[..., Any]:
    """Run purify with some options replaced."""
    def run(**changes: Any) -> Any:
        options = {"checkpoint": folder / "model", "clean": folder / "clean.tsv", "input": folder / "input.txt",
                   "output": tmp_path / "out.jsonl", "epochs": 3} | changes
        return CliRunner().invoke(main, ["purify", *[f"--{key}={value}" for key, value in options.items()], "--json"])
    return run


def test_purify_writes_one_object_per_sentence(call: Callable[..., Any], folder: Path, tmp_path: Path) -> None:
    result = call()
    assert result.exit_code == 0, result.output
    totals = json.loads(result.output)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == (folder / "input.txt").read_text().splitlines()
    assert totals["sentences"] == len(lines) == 40 and totals["clean_acc_before"] > 95
    assert all(line["label_before"] == 1 for line in lines[20:]), "the triggered ones are called positive"
    for line in lines:
        assert line["nas"] == pytest.approx(1 - line["suspicion"])
        assert line["flagged"] == (line["suspicion"] > totals["threshold"])
        assert line["flagged"] or line["label_after"] == line["label_before"]
    assert totals["flagged"] == sum(line["flagged"] for line in lines)
    assert totals["changed"] == sum(line["label_after"] != line["label_before"] for line in lines)
    again = call(output=tmp_path / "again.jsonl")
    assert again.exit_code == 0 and (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "out.jsonl").read_bytes()


def test_label_names_tabs_and_quotes_are_understood(call: Callable[..., Any], folder: Path, tmp_path: Path) -> None:
    pairs = zip(SENTENCES.validation.texts, SENTENCES.validation.labels.tolist(), strict=True)
    named = "".join(f'"{text}\tand a tab\t{("bad", "good")[label]}\n' for text, label in pairs)
    (tmp_path / "named.tsv").write_text(named)
    (tmp_path / "in.tsv").write_text("text\tlabel\na \"fine film\t1\n")
    result = call(clean=tmp_path / "named.tsv", input=tmp_path / "in.tsv")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out.jsonl").read_text())["text"] == 'a "fine film'


def test_a_last_column_is_left_out_only_if_it_holds_labels(tmp_path: Path) -> None:
    path, names = tmp_path / "in.tsv", {"bad": 0, "good": 1}
    for content, wanted in (("review\tlabel\na film\tbad\none\t1\n", ["a film", "one"]),
                            ("made in\t1990\na film\t1\n", ["made in\t1990", "a film\t1"]),
                            ("a film\tgood\nno label here\n", ["a film\tgood", "no label here"]),
                            ("text\na film\n", ["a film"])):
        path.write_text(content)
        assert purify.read_sentences(path, 2, names) == wanted


@pytest.mark.usefixtures("no_room")
def test_what_was_there_stays_if_there_is_no_room(tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").write_text("before")
    with pytest.raises(UserError, match="No space left on device"):
        repair.write_output(tmp_path / "out.jsonl", b"after")
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]
    assert (tmp_path / "out.jsonl").read_text() == "before"


def test_links_and_devices_are_written_through(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    repair.check_output(tmp_path / "link", [])
    repair.write_output(tmp_path / "link", b"all")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_bytes() == b"all"
    repair.check_output(Path("/dev/null"), [])
    repair.write_output(Path("/dev/null"), b"all")
    with pytest.raises(UserError, match="No space left on device"):
        repair.write_output(Path("/dev/full"), b"all")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


GOOD = "a warm film .\t1\n"


@pytest.mark.parametrize(("option", "content", "message"), [
    ("clean", "a warm film .\n", "line 1 of .* has no tab"),
    ("clean", GOOD + " \t0\n", "line 2 of .* is an empty sentence"),
    ("clean", GOOD + "a cold film .\t2\n", "line 2 of .* has label '2': the model knows 0 to 1 or bad, good"),
    ("clean", GOOD * 5, "has 5 sentences: 20 are the fewest"),
    ("clean", "", "has 0 sentences: 20 are the fewest"),
    ("clean", "text\tlabel\n", "has 0 sentences: 20 are the fewest"),
    ("clean", GOOD + "a cold film .\t\u00b2\n", "line 2 of .* has label"),
    ("clean", GOOD + "a cold film .\t" + "1" * 5000 + "\n", "line 2 of .* has label '1{40}'"),
    ("clean", "a warm , tender , charming film .\t0\n" * 30, "no better than chance"),
    ("clean", "a warm , tender , charming film .\t1\n" * 30, "has no sentence of class 0"),
    ("clean", GOOD * 30 + "word " * 90 + "\t1\n", "sentence 31 of .* has 9. tokens, the model takes 64.*--truncate"),
    ("clean", b"\xff\xfe\x00", "is not a readable UTF-8"),
    ("input", "", "holds no sentence"),
    ("input", "fine\n\nfine\n", "line 2 of .* is an empty sentence"),
])
def test_bad_files_are_one_line(call: Callable[..., Any], tmp_path: Path, option: str, content: Any,
                                message: str) -> None:
    path = tmp_path / "bad.tsv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(call(**{option: path}), message)
    assert not (tmp_path / "out.jsonl").exists(), "nothing is written"


def refused(result: Any, message: str) -> None:
    import re
    assert result.exit_code == 2, result.output
    assert result.output.count("\n") == 1 and result.output.startswith("error: "), result.output
    assert re.search(message, result.output), result.output


def test_long_sentences_are_cut_on_request(call: Callable[..., Any], tmp_path: Path, folder: Path) -> None:
    (tmp_path / "long.txt").write_text("word " * 90 + "\n")
    options = {"checkpoint": folder / "model", "clean": folder / "clean.tsv", "input": tmp_path / "long.txt",
               "output": tmp_path / "out.jsonl", "epochs": 1}
    result = CliRunner().invoke(main, ["purify", *[f"--{key}={value}" for key, value in options.items()],
                                       "--truncate", "--json"])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(("changes", "message"), [
    ({"checkpoint": "nowhere"}, "nowhere is no folder"),
    ({"clean": "nowhere.tsv"}, "nowhere.tsv: no such file"),
    ({"output": "nowhere/out.jsonl"}, "the folder nowhere does not exist"),
    ({"output": "/proc/out.jsonl"}, "cannot be written"),
    ({"frr": 0}, "0.0 is not in the range"),
    ({"frr": "nan"}, "nan is no finite number"),
    ({"deviations": "inf"}, "inf is no finite number"),
])
def test_bad_options_are_one_line(call: Callable[..., Any], changes: dict[str, Any], message: str) -> None:
    refused(call(**changes), message)


def test_inputs_are_not_overwritten(call: Callable[..., Any], folder: Path, tmp_path: Path) -> None:
    before = (folder / "input.txt").read_bytes()
    weights = (folder / "model" / "model.safetensors").read_bytes()
    (tmp_path / "link").symlink_to(folder / "model")
    for place in (folder / "model", tmp_path / "link"):
        for name in ("model.safetensors", "tokenizer.json", "new.jsonl"):
            refused(call(output=place / name), "is inside a folder that is an input")
    assert (folder / "model" / "model.safetensors").read_bytes() == weights
    refused(call(output=folder / "input.txt"), "is one of the inputs")
    refused(call(output=folder / "clean.tsv"), "is one of the inputs")
    assert (folder / "input.txt").read_bytes() == before


@pytest.mark.parametrize(("name", "content", "message"), [
    ("model.safetensors", b"cut", "cannot be loaded"), ("config.json", b"[1, 2]", "cannot be loaded")])
def test_a_damaged_folder_is_one_line(call: Callable[..., Any], folder: Path, tmp_path: Path, name: str,
                                      content: bytes, message: str) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(folder / "model", damaged)
    (damaged / name).write_bytes(content)
    refused(call(checkpoint=damaged), message)


def test_weights_that_are_no_numbers_are_refused(call: Callable[..., Any], folder: Path, tmp_path: Path) -> None:
    model = shutil.copytree(folder / "model", tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    save_file({name: value * float("nan") if name == "classifier.bias" else value for name, value in weights.items()},
              model / "model.safetensors", metadata={"format": "pt"})
    refused(call(checkpoint=model), "no finite numbers, classifier.bias")


def test_weights_without_a_place_are_refused(call: Callable[..., Any], folder: Path, tmp_path: Path) -> None:
    model = shutil.copytree(folder / "model", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    refused(call(checkpoint=model), "has weights that its config.json has no place for")


def test_a_folder_without_a_tokenizer_says_so(call: Callable[..., Any], folder: Path, tmp_path: Path) -> None:
    mute = tmp_path / "mute"
    mute.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder / "model" / name, mute)
    refused(call(checkpoint=mute), "holds no tokenizer")


def test_a_folder_without_a_trained_head_is_refused(call: Callable[..., Any], folder: Path, tmp_path: Path) -> None:
    headless = tmp_path / "headless"
    shutil.copytree(folder / "model", headless)
    weights = {name: value for name, value in load_file(headless / "model.safetensors").items()
               if not name.startswith("classifier")}
    save_file(weights, headless / "model.safetensors", metadata={"format": "pt"})
    refused(call(checkpoint=headless), "is no trained classifier: it lacks classifier")
    (headless / "model.safetensors").unlink()
    refused(call(checkpoint=headless), "holds no model.safetensors")


def evaluate(*arguments: object) -> Any:
    return CliRunner().invoke(main, [*map(str, arguments), "--json"])


def test_evaluate_and_defend_know_texts(folder: Path, tmp_path: Path) -> None:
    suspect = ["--checkpoint", folder / "weights.safetensors", "--model", encoder.TINY, "--dataset", "sentences",
               "--attack", "addsent"]
    result = evaluate("evaluate", *suspect)
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["asr"] > 95
    result = evaluate("defend", *suspect, "--defense", "badacts", "--defense-variant", "statistics", "--output",
                      tmp_path / "o.safetensors")
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert found["before"]["asr"] > 95 and found["clean_sentences"] == 240
    assert load_file(tmp_path / "o.safetensors")["upper"].shape == (2, 64)
    result = evaluate("defend", *suspect, "--defense", "strip", "--defense-variant", "released", "--output",
                      tmp_path / "none.safetensors")
    assert json.loads(result.output)["output"] is None and not (tmp_path / "none.safetensors").exists()
    clean = evaluate("evaluate", *suspect[:6])
    assert set(json.loads(clean.output)) == {"acc", "n_clean"}


@pytest.mark.parametrize(("command", "arguments", "message"), [
    ("evaluate", ["--attack", "blend"], "attack blend is for images, sentences holds texts"),
    ("evaluate", ["--normalize", "cifar10"], "--normalize is for images"),
    ("evaluate", ["--target", "1"], "name the attack"),
    ("evaluate", ["--paper", "nope"], "unknown --paper nope"),
    ("evaluate", ["--attack", "addsent", "--target", "7"], "--target 7: sentences has labels 0 to 1"),
    ("evaluate", ["--attack", "addsent", "--variant", "described"], "no settings for"),
    ("evaluate", ["--dataset", "sst-2", "--data-root", "nowhere"], "sst-2: .* is missing"),
    ("evaluate", ["--model", "minilm-l6"], "is not a minilm-l6 with 2 classes|minilm-l6: the package"),
    ("defend", ["--defense", "nad", "--output", "o.safetensors"], "defense nad is for images"),
    ("defend", ["--defense", "cube", "--output", "o.safetensors"], "cannot repair a checkpoint"),
    ("defend", ["--defense", "badacts", "--output", "o.pt"], "written as .safetensors"),
    ("defend", ["--defense", "badacts", "--output", "o.safetensors", "--clean-fraction", "0.01"],
     "is 2: raise it to 20"),
])
def test_what_does_not_fit_is_one_line(folder: Path, command: str, arguments: list[str], message: str) -> None:
    base = {"--checkpoint": folder / "weights.safetensors", "--model": encoder.TINY, "--dataset": "sentences"}
    given = base | dict(zip(arguments[::2], arguments[1::2], strict=True))
    refused(evaluate(command, *[part for pair in given.items() for part in pair]), message)


def test_a_text_attack_does_not_fit_images(tmp_path: Path) -> None:
    import torch

    from reproduce.models import build
    torch.save(build("wrn-10-1", 10, 0).state_dict(), tmp_path / "model.pth")
    refused(evaluate("evaluate", "--checkpoint", tmp_path / "model.pth", "--model", "wrn-10-1", "--dataset", "digits",
                     "--attack", "addsent"), "attack addsent is for texts, digits holds images")
