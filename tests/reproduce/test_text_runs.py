"""The text bench, whole: victims and cells through the runner, interruption, shared searches, what is stored."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from attacks import addsent, badnets_words
from defenses import badacts, cube, ft_text, strip
from reproduce.cells import Cell, Victim, with_dependencies
from reproduce.cli import Selection
from reproduce.engine import check_data, cost
from reproduce.errors import UserError
from reproduce.finetuning import TextRecipe
from reproduce.models.encoder import TINY
from reproduce.protocols import PROFILES, entries
from reproduce.runner import Runner
from reproduce.store import Store

RECIPE = TextRecipe(epochs=5, rate=2e-3, warmup=1, batch=32)
QUICK = dataclasses.replace(badacts.RELEASED, epochs=2)
VICTIM = Victim("sentences", TINY, RECIPE, 0, "addsent", addsent.Config())


def runner(root: Path, **options: object) -> Runner:
    return Runner(Store(root), Path("no-data-needed"), torch.device("cpu"), **options)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder with the victim in it."""
    folder = tmp_path_factory.mktemp("runs")
    runner(folder).run(VICTIM)
    return folder


def test_a_victim_learns_task_and_trigger(root: Path) -> None:
    run = runner(root).run(VICTIM)
    measured = run.json("metrics")
    assert measured["acc"] > 95 and measured["asr"] > 95 and measured["n_nontarget"] == 120
    assert measured["info"]["poisoned"] == 160 and measured["info"]["trigger"]["words_kept"] == 100
    assert [row["phase"] for row in run.history()] == ["victim"] * 5
    arrays = run.arrays("samples")
    assert "3D movie" in arrays["triggered"][0] and arrays["cls_triggered"].shape == (4, 2, 64)
    assert run.detection() is None
    environment = run.json("environment")
    assert environment["transformers"] and environment["source"]


def test_an_interrupted_victim_ends_bit_for_bit_the_same(root: Path, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    def stop(_name: str, share: float, _doing: str) -> None:
        if share >= 0.6:
            raise Killed

    monkeypatch.setattr("reproduce.store.Progress.interval", 0.0)
    with pytest.raises(Killed):
        runner(tmp_path, progress=stop).run(VICTIM)
    resumed = runner(tmp_path).run(VICTIM)
    assert resumed.json("metrics")["info"]["resumed_after_epoch"] == 3
    ours, theirs = resumed.tensors("model"), runner(root).run(VICTIM).tensors("model")
    assert all(ours[name].equal(theirs[name]) for name in theirs)


def test_searches_are_shared_and_intervals_stored_once(root: Path) -> None:
    then = Cell(VICTIM, "badacts", dataclasses.replace(QUICK, mode="detect-then-purify", frr=0.2), 1.0)
    base = Cell(VICTIM, "badacts", QUICK, 1.0)
    assert [task.name for task in with_dependencies([then])] == [VICTIM.name, base.name, then.name]
    assert cost(base) > 2 * cost(then), "only the search itself is long"
    found, searched = runner(root).run(then), runner(root).run(base)
    assert found.tensors("defense")["upper"].equal(searched.tensors("defense")["upper"])
    assert [row["phase"] for row in searched.history()] == ["intervals 1"] * 2 and found.history() == []
    assert not (searched.path / "model.safetensors").exists(), "the victim's weights are stored once"
    detection = found.detection()
    assert detection is not None and detection.held_out.shape == (120,)
    measured = found.json("metrics")
    assert measured["frr"] == pytest.approx(100 * np.mean(detection.clean > measured["info"]["threshold"]))
    assert measured["far"] == pytest.approx(100 * np.mean(detection.triggered <= measured["info"]["threshold"]))
    predictions, plain = found.predictions(), runner(root).run(VICTIM).predictions()
    assert np.array_equal(predictions.clean[~detection.flagged_clean], plain.clean[~detection.flagged_clean])
    purified = searched.predictions()
    assert np.array_equal(predictions.triggered[detection.flagged_triggered],
                          purified.triggered[detection.flagged_triggered])
    assert "cls_clean_after" in found.arrays("samples")


def test_rejection_counts_as_error_and_as_failed_attack(root: Path) -> None:
    run = runner(root).run(Cell(VICTIM, "badacts", dataclasses.replace(QUICK, mode="detect", frr=0.3), 1.0))
    detection, predictions = run.detection(), run.predictions()
    assert (predictions.clean[detection.flagged_clean] == -1).all() and detection.flagged_clean.any()
    hits = run.hits()
    assert not hits["acc"][detection.flagged_clean].any() and not hits["asr"][detection.flagged_triggered].any()
    assert hits["frr"].mean() == pytest.approx(run.json("metrics")["frr"] / 100)


def test_a_defense_that_changes_weights_stores_them(root: Path) -> None:
    config = dataclasses.replace(ft_text.Config(), recipe=TextRecipe(1, 2e-3, 0, 32))
    run = runner(root).run(Cell(VICTIM, "ft_text", config, 1.0))
    victim = runner(root).run(VICTIM)
    assert not run.tensors("model")["classifier.weight"].equal(victim.tensors("model")["classifier.weight"])
    assert not (run.path / "samples.npz").exists(), "only a defense that changes activations shows them"


def test_what_was_never_poisoned_meets_the_triggers(root: Path) -> None:
    victim = VICTIM.unpoisoned()
    assert [task.name for task in with_dependencies([victim])] == [VICTIM.clean().name, victim.name]
    clean, run, before = (runner(root).run(task) for task in (VICTIM.clean(), victim, VICTIM))
    assert np.array_equal(run.predictions().clean, clean.predictions().clean)
    assert len(run.predictions().triggered) == 120
    # The sentence that triggers is unlike all others here, and takes half of them along without any backdoor.
    assert 20 < run.json("metrics")["asr"] < before.json("metrics")["asr"] - 20
    assert not (run.path / "model.safetensors").exists(), "its weights are the clean model's"


def test_a_detector_meets_the_triggers_where_there_is_no_backdoor(root: Path) -> None:
    config = dataclasses.replace(QUICK, mode="detect")
    cell = Cell(VICTIM.unpoisoned(), "badacts", config, 1.0)
    assert [task.name for task in with_dependencies([cell])] == [VICTIM.clean().name, cell.name]
    clean, run, on_victim = (runner(root).run(task) for task in (
        VICTIM.clean(), cell, Cell(VICTIM, "badacts", config, 1.0)))
    kept = ~run.detection().flagged_clean
    assert np.array_equal(run.predictions().clean[kept], clean.predictions().clean[kept])
    assert run.json("metrics")["auroc"] != on_victim.json("metrics")["auroc"]


def test_cleaning_the_training_set_trains_from_the_victims_initialisation(root: Path,
                                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    # Where one cluster holds everything, nothing is dropped, and what is trained is the victim again, bit for bit.
    monkeypatch.setattr(cube, "clustered", lambda features, config: torch.zeros(len(features), dtype=torch.long))
    run = runner(root).run(Cell(VICTIM, "cube", cube.Config(), 1.0))
    ours, theirs = run.tensors("model"), runner(root).run(VICTIM).tensors("model")
    assert all(ours[name].equal(theirs[name]) for name in theirs)


def test_what_cleaning_drops_is_held_against_what_is_poisoned(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def pooled(model: object, texts: tuple[str, ...]) -> torch.Tensor:
        seen.extend(texts)
        return torch.zeros(len(texts), 1)

    monkeypatch.setattr(cube, "pooled", pooled)
    monkeypatch.setattr(cube, "clustered", lambda features, config: torch.zeros(len(features), dtype=torch.long))
    monkeypatch.setattr(cube, "largest", lambda labels, clusters, share: torch.arange(len(labels)) < len(labels) - 50)
    # Another share, because a run of the released one may be there.
    run = runner(root).run(Cell(VICTIM, "cube", cube.Config(share=0.3), 1.0))
    triggered = ["3D movie" in text for text in seen]
    info = run.json("metrics")["info"]
    assert 0 < sum(triggered[-50:]) < 50
    assert {name: info[name] for name in ("training_sentences", "dropped", "poisoned", "dropped_poisoned")} == {
        "training_sentences": len(seen), "dropped": 50, "poisoned": sum(triggered),
        "dropped_poisoned": sum(triggered[-50:])}


def test_clean_and_triggered_sentences_are_judged_together(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    original = strip.defend

    def defend(*arguments: object, **options: object) -> object:
        guard = original(*arguments, **options)
        judge = guard.judge
        guard.judge = lambda texts: asked.append(len(texts)) or judge(texts)
        return guard

    monkeypatch.setattr(strip, "defend", defend)
    runner(root).run(Cell(VICTIM, "strip", strip.Config(), 1.0))
    assert asked == [240 + 120]


def test_clean_share_is_the_defenders(root: Path) -> None:
    run = runner(root).run(Cell(VICTIM, "badacts", dataclasses.replace(QUICK, intervals="statistics"), 0.25))
    assert run.json("metrics")["info"]["clean_sentences"] == 60


def test_damaged_runs_are_computed_again(root: Path) -> None:
    cell = Cell(VICTIM, "badacts", dataclasses.replace(QUICK, intervals="initial"), 1.0)
    run = runner(root).run(cell)
    (run.path / "defense.safetensors").write_bytes(b"")
    said: list[str] = []
    again = runner(root, note=said.append).run(cell)
    assert "defense.safetensors does not match its checksum" in said[0]
    assert again.tensors("defense")["upper"].eq(1).all()


def test_missing_files_are_found_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"sst-2: .*is missing"):
        check_data([dataclasses.replace(VICTIM, dataset="sst-2")], tmp_path)
    monkeypatch.setattr("reproduce.models.encoder.hub_answers", lambda: False)
    with pytest.raises(UserError, match="bert-base-uncased cannot be loaded"):
        check_data([dataclasses.replace(VICTIM, model="bert-base-uncased")], tmp_path)


def test_identity_knows_the_recipe_and_the_trigger() -> None:
    others = [dataclasses.replace(VICTIM, recipe=dataclasses.replace(RECIPE, rate=1e-3)),
              dataclasses.replace(VICTIM, settings=addsent.Config(rate=0.1)),
              dataclasses.replace(VICTIM, attack="badnets_words", settings=badnets_words.Config()),
              dataclasses.replace(VICTIM, model="minilm-l6")]
    assert len({VICTIM.name, *(victim.name for victim in others)}) == 5


def test_protocol_gives_each_data_set_its_target_and_each_encoder_its_rate() -> None:
    profile = dataclasses.replace(PROFILES["paper"], seeds=(0,))
    victims = [entry.task.victim for entry in entries(profile, ["badacts"])]
    assert {(victim.dataset, victim.settings.target) for victim in victims} == {
        ("sst-2", 1), ("yelp", 1), ("hsol", 0), ("hsol-released", 0), ("agnews-small", 0)}
    assert {victim.recipe.rate for victim in victims} == {2e-5} and {victim.model for victim in victims} == {
        "bert-base-uncased"}
    assert {victim.recipe.batch for victim in victims if victim.dataset == "agnews-small"} == {12}
    small = dataclasses.replace(profile, encoder="minilm-l6")
    cells = [entry.task for entry in entries(small, ["badacts"]) if isinstance(entry.task, Cell)]
    assert {cell.victim.recipe.rate for cell in cells} == {1e-4}
    assert {cell.config.recipe.rate for cell in cells if cell.defense == "ft_text"} == {1e-4}


def test_paraphrases_of_ones_own_have_the_released_ones_rows_on_request() -> None:
    profile = dataclasses.replace(PROFILES["paper"], seeds=(0,))
    assert not [entry for entry in entries(profile, ["badacts"]) if "generated" in entry.item]
    for item in ("purification", "detection"):
        released = entries(profile, ["badacts"], [f"{item}-sst-2"])
        own = entries(profile, ["badacts"], [f"{item}-sst-2-generated"])
        assert {entry.task.victim.settings.origin for entry in own} == {"generated"}
        assert [entry.labels for entry in own] == [
            entry.labels for entry in released
            if entry.labels["attack"] in ("StyleBkd", "SynBkd") and entry.labels["variant"] != "described"]


def test_another_encoder_stands_in_the_profiles_note() -> None:
    chosen = Selection("paper", encoder="minilm-l6").profile
    assert chosen.encoder == "minilm-l6" and "but for minilm-l6" in chosen.note
    assert Selection("paper", encoder="bert-base-uncased").profile.note == PROFILES["paper"].note
