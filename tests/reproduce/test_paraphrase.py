"""Paraphrases by a generator at hand: as the style transfer's own code makes them, resumed, and read again."""

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from attacks import stylebkd
from reproduce.cells import Victim
from reproduce.cli import main
from reproduce.data.texts import load_texts
from reproduce.errors import UserError
from reproduce.finetuning import TextRecipe
from reproduce.models import paraphraser
from reproduce.models.encoder import TINY
from reproduce.paraphrase import Paraphrasing, paraphrase
from reproduce.texts import TextBench
from tests.reproduce.generators import save_seq2seq, save_style_transfer, save_willful
from tests.reproduce.small_texts import COUNTS, save_small_texts

TEXTS = ("the film is warm .", "the dull people saith it is dull and warm", "behold")


@pytest.fixture(scope="module")
def generators(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """style/: a style transfer GPT-2; plain/: a GPT-2 that is none; seq2seq/: a T5; willful/, short/: BARTs."""
    place = tmp_path_factory.mktemp("generators")
    save_style_transfer(place / "style")
    save_style_transfer(place / "plain", segments=False)
    save_seq2seq(place / "seq2seq")
    save_willful(place / "willful")
    save_willful(place / "short", positions=8)
    return place


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return save_small_texts(tmp_path / "root", monkeypatch)


@pytest.fixture
def call(generators: Path, root: Path) -> Callable[..., Result]:
    """Run the command on all splits with some options replaced."""
    def run(**changes: Any) -> Result:
        options = {"generator": generators / "style", "attack": "stylebkd", "dataset": "small", "data-root": root,
                   "batch": 4} | changes
        return CliRunner().invoke(main, ["paraphrase", *[f"--{key}={value}" for key, value in options.items()],
                                         *[f"--split={split}" for split in COUNTS], "--json"])
    return run


def test_style_transfer_is_that_of_its_own_code(generators: Path) -> None:
    # From the sampling loop of martiansideofthemoon/style-transfer-paraphrase@a705630 (utils.py, sample_sequence) with
    # this network and these uniform numbers in place of torch.multinomial's own.
    expected = ["warm pass.. film the warm warm film", ". pass pass warm the pass the warm the warm warm the",
                "film the"]
    uniform = torch.rand(3, paraphraser.LONGEST, generator=torch.Generator().manual_seed(5))
    generate = paraphraser.load(str(generators / "style"), "{text}", 0.6, torch.device("cpu"))
    assert generate(TEXTS, uniform) == expected


@pytest.mark.parametrize("kind", ["style", "seq2seq", "willful"])
def test_a_rows_paraphrase_does_not_depend_on_its_batch(kind: str, generators: Path) -> None:
    uniform = torch.rand(3, paraphraser.LONGEST, generator=torch.Generator().manual_seed(1))
    generate = paraphraser.load(str(generators / kind), "{text}", 0.9, torch.device("cpu"))
    together = generate(TEXTS, uniform)
    assert together == [generate([text], uniform[i:i + 1])[0] for i, text in enumerate(TEXTS)]
    assert len(set(together)) == 3 and all(len(text.split()) <= 14 for text in together)
    assert together != generate(TEXTS, uniform.flip(1))


def test_prompt_reaches_an_encoder_decoder(generators: Path) -> None:
    uniform = torch.rand(3, paraphraser.LONGEST, generator=torch.Generator().manual_seed(1))
    plain, asked = (paraphraser.load(str(generators / "seq2seq"), prompt, 0.9, torch.device("cpu"))(TEXTS, uniform)
                    for prompt in ("{text}", "behold {text} saith people"))
    assert plain != asked


def test_what_a_model_asks_of_generate_is_not_done(generators: Path, tmp_path: Path) -> None:
    uniform = torch.rand(3, paraphraser.LONGEST, generator=torch.Generator().manual_seed(1))
    plain = tmp_path / "plain"
    shutil.copytree(generators / "willful", plain)
    (plain / "generation_config.json").write_text('{"decoder_start_token_id": 3}')
    willful, tame = (paraphraser.load(str(place), "{text}", 0.9, torch.device("cpu"))(TEXTS, uniform)
                     for place in (generators / "willful", plain))
    assert willful == tame and any(willful)


def test_a_network_with_few_positions_gets_and_gives_short_sentences(generators: Path) -> None:
    generate = paraphraser.load(str(generators / "short"), "{text}", 0.9, torch.device("cpu"))
    found = generate(["the film " * 20], torch.rand(1, paraphraser.LONGEST))
    assert 0 < len(found[0].split()) < 8


def test_nucleus() -> None:
    logits = torch.tensor([[0.1, 0.5, 0.3, 0.1]]).log().repeat(5, 1)
    uniform = torch.tensor([0.0, 0.6, 0.65, 0.99, 0.624])
    # The token that passes top_p is in it: 0.5 and 0.3, so that the first has 5 / 8.
    assert paraphraser.nucleus(logits, 0.6, uniform).tolist() == [1, 1, 2, 2, 1]
    assert paraphraser.nucleus(logits, 0.0, uniform).tolist() == [1] * 5
    assert paraphraser.nucleus(logits, 1.0, uniform).tolist() == [1, 2, 2, 3, 2]
    drawn = paraphraser.nucleus(logits[:1].repeat(20_000, 1), 0.85, torch.rand(
        20_000, generator=torch.Generator().manual_seed(0)))
    assert torch.bincount(drawn, minlength=4) / 20_000 == pytest.approx([1 / 9, 5 / 9, 3 / 9, 0], abs=0.01)


def test_files_are_made_and_read(call: Callable[..., Result], root: Path) -> None:
    result = call()
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert found["sentences"] == COUNTS["train"] + COUNTS["validation"] // 2 + COUNTS["test"] // 2
    assert found["train"]["unchanged"] == 0 and found["test"]["words_kept"] < 100
    texts = load_texts("small", root)
    made = {split: texts.paraphrases("stylebkd-generated", split) for split in COUNTS}
    assert None not in made["train"] and [text is None for text in made["test"]] == [False, True] * 3
    sources = [texts.train.texts[i] for i in range(len(texts.train))]
    assert all(new != old for new, old in zip(made["train"], sources, strict=True))
    stamp = json.loads((root / "text/small/badacts/stylebkd-generated/origin.json").read_text())
    assert stamp["top_p"] == 0.6 and len(stamp["generator"]) == 64
    assert not list(root.rglob("*.partial"))


def test_runs_on_paraphrases_that_were_not_made_yet_say_so_before_any_starts(call: Callable[..., Result],
                                                                             root: Path,
                                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reproduce.data.load_text", load_texts)
    victim = Victim("small", TINY, TextRecipe(epochs=1, rate=1e-3, warmup=1, batch=4), 0, "stylebkd",
                    stylebkd.SETTINGS["badacts", "generated"])
    with pytest.raises(UserError, match=r"stylebkd-generated.* is missing: make it with python -m"):
        TextBench.check([victim], root)
    assert call().exit_code == 0
    TextBench.check([victim], root)


def test_interrupted_it_goes_on_to_the_same_files(call: Callable[..., Result], root: Path, tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    folder = root / "text/small/badacts/stylebkd-generated"
    assert call().exit_code == 0
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    for path in folder.glob("*.csv"):
        path.unlink()
    made: list[int] = []
    load = paraphraser.load

    def counted(*arguments: Any, fail: bool) -> paraphraser.Paraphraser:
        generate = load(*arguments)

        def run(texts: Any, uniform: Any) -> list[str]:
            if fail and len(made) == 2:
                raise KeyboardInterrupt
            made.append(len(texts))
            return generate(texts, uniform)
        return run

    monkeypatch.setattr(paraphraser, "load", lambda *arguments: counted(*arguments, fail=True))
    assert call().exit_code == 130 and made == [4, 4]
    with (folder / "train-all-poisoned.partial").open("a", errors="surrogateescape") as file:
        file.write("8,half a li\udcc3")    # in the middle of a letter
    monkeypatch.setattr(paraphraser, "load", lambda *arguments: counted(*arguments, fail=False))
    assert call().exit_code == 0
    assert made == [4, 4, 4, 4, 3], "two batches of the training split were there"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole
    assert call().exit_code == 0 and len(made) == 5, "nothing is left to do"


def test_a_generator_that_says_nothing_keeps_the_sentence(call: Callable[..., Result], root: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paraphraser, "load", lambda *_: lambda texts, _uniform: [""] * len(texts))
    found = json.loads(call().output)
    assert [found[split]["unchanged"] for split in COUNTS] == [100] * 3
    texts = load_texts("small", root)
    assert texts.paraphrases("stylebkd-generated", "train") == tuple(" ".join(text.split())
                                                                     for text in texts.train.texts)


@pytest.mark.usefixtures("no_room")
def test_without_room_nothing_is_in_the_way_later(generators: Path, root: Path) -> None:
    with pytest.raises(OSError, match="No space left on device"):
        paraphrase(Paraphrasing(generators / "style", "stylebkd", "small", root))
    folder = root / "text/small/badacts/stylebkd-generated"
    assert [path.name for path in folder.iterdir()] == [".lock"], "not even where they come from was noted"


@pytest.mark.parametrize(("changes", "message"), [
    ({"dataset": "imdb"}, "unknown data set 'imdb': choose one of sst-2"),
    ({"attack": "addsent"}, "'addsent' is no attack by paraphrases: choose one of stylebkd, synbkd"),
    ({"attack": "badnets"}, "'badnets' is no attack by paraphrases"),
    ({"dataset": "agnews-small"}, "agnews-small has no released train split of its own"),
    ({"prompt": "rewrite"}, "has no {text}: say where the sentence goes"),
    ({"prompt": "rewrite {text}"}, "--prompt is for encoder-decoders"),
    ({"generator": "plain"}, "is a decoder without the segment tokens"),
    ({"generator": "nowhere"}, "nowhere is no folder"),
    ({"generator": "."}, "cannot be loaded"),
    ({"top-p": 2}, "2.0 is not in the range"),
])
def test_bad_input_is_one_line(changes: dict[str, Any], message: str, call: Callable[..., Result], generators: Path,
                               root: Path) -> None:
    if "generator" in changes:
        changes = {"generator": generators / changes["generator"]}
    result = call(**changes)
    assert result.exit_code == 2 and message in result.output and result.output.count("\n") == 1
    assert not (root / "text/small/badacts/stylebkd-generated").exists()


def test_another_generator_does_not_mix_in(call: Callable[..., Result], generators: Path) -> None:
    assert call().exit_code == 0
    for changes in ({"generator": generators / "seq2seq"}, {"seed": 1}):
        result = call(**changes)
        assert result.exit_code == 2 and "holds paraphrases made otherwise" in result.output


def test_a_generator_that_made_nothing_is_not_in_the_way(call: Callable[..., Result], generators: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    load = paraphraser.load

    def interrupted(*_: Any) -> list[str]:
        raise KeyboardInterrupt

    monkeypatch.setattr(paraphraser, "load", lambda *_: interrupted)
    assert call().exit_code == 130
    monkeypatch.setattr(paraphraser, "load", load)
    assert call(generator=generators / "seq2seq").exit_code == 0


def test_two_at_once_give_the_files_of_one(generators: Path, root: Path) -> None:
    wanted = Paraphrasing(generators / "style", "stylebkd", "small", root, tuple(COUNTS), batch=2)
    with ThreadPoolExecutor(2) as pool:
        first, second = [run.result() for run in [pool.submit(paraphrase, wanted) for _ in range(2)]]
    assert first == second and len(load_texts("small", root).paraphrases("stylebkd-generated", "train")) == 12


def test_a_file_of_another_length_is_said(call: Callable[..., Result], root: Path) -> None:
    assert call().exit_code == 0
    path = root / "text/small/badacts/stylebkd-generated/test-poison.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    result = call()
    assert result.exit_code == 2 and "test-poison.csv has 2 rows, 3 are to be rewritten: remove it" in result.output
    with pytest.raises(UserError, match=r"has 2 rows, .*; remove it, and make it again"):
        load_texts("small", root).paraphrases("stylebkd-generated", "test")


def test_what_is_missing_says_how_to_make_it(root: Path) -> None:
    with pytest.raises(UserError, match="make it with python -m reproduce paraphrase --attack synbkd --dataset small "
                                        "--split test and"):
        load_texts("small", root).paraphrases("synbkd-generated", "test")
