"""The text bench: poison, fine-tune, defend, predict and measure a victim or a cell of sentences."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reproduce import data
from reproduce.bench import Outcome, Surroundings
from reproduce.cells import NONE, Cell, Task, Victim
from reproduce.data.texts import TextDataset, Texts
from reproduce.defending import Guard, Judged, TrainingData, clean_texts, defense_module
from reproduce.finetuning import fine_tune
from reproduce.metrics import Detection, Predictions, detection_metrics, metrics
from reproduce.models import encoder
from reproduce.models.encoder import TextClassifier
from reproduce.poisoning import attack_module, poison_texts
from reproduce.training import Observer

SHOWN = 4           # sentences whose activations are kept for the figures
LARGEST = float(np.finfo(np.float16).max)
# Forward passes of one WRN-16-1 image that one sentence costs, about; other encoders are taken for BERT's size.
SENTENCE = {encoder.TINY: 0.3, encoder.MINILM: 7.0}
BERT_SENTENCE = 56.0
BACKWARD_COST = 2.0


@dataclass(frozen=True)
class TextTestSet:
    """Clean test sentences with labels (N,); the triggered copies of those at `index` (M,), and the labels the attacker
    wants for them (M,). Without an attack the last three are empty."""

    clean: Texts
    index: Tensor
    triggered: tuple[str, ...]
    wanted: Tensor

    def predictions(self, on_clean: Tensor, on_triggered: Tensor) -> Predictions:
        """Per-sample outcome of predicted labels (N,) and (M,)."""
        arrays = (self.clean.labels, on_clean, self.index, self.wanted, on_triggered)
        return Predictions(*(array.numpy().astype(np.int32) for array in arrays))


def triggered_test_set(dataset: TextDataset, attack: str, settings: Any, seed: int) -> TextTestSet:
    """The clean test sentences and, for an attack other than "none", triggered copies of the non-target ones."""
    if attack == NONE:
        empty = torch.empty(0, dtype=torch.long)
        return TextTestSet(dataset.test, empty, (), empty)
    index = (dataset.test.labels != settings.target).nonzero().flatten()
    rows = index.tolist()
    triggered = attack_module(attack).apply([dataset.test.texts[row] for row in rows], rows, settings, seed, "test",
                                            dataset.paraphrases)
    return TextTestSet(dataset.test, index, tuple(triggered), torch.full_like(index, settings.target))


class TextBench:
    """Computes on one device; keeps the last model and the last test set for the next cells on them."""

    def __init__(self, at: Surroundings) -> None:
        self.at = at
        self._kept_model: tuple[str, TextClassifier] | None = None
        self._kept_test: tuple[str, TextTestSet] | None = None

    @staticmethod
    def cost(task: Task) -> float:
        """Work of a task in forward passes of one WRN-16-1 image; used for ordering and for time estimates only."""
        train, validation, test = data.sentences_in(task.victim.dataset)
        each = SENTENCE.get(task.victim.model, BERT_SENTENCE)
        whole = task.victim.recipe.epochs * train
        if isinstance(task, Cell):
            module = defense_module(task.defense)
            work = getattr(module, "work", lambda config, count, classes: 0)
            trained = work(task.config, round(task.clean_fraction * validation), data.NUM_CLASSES[task.victim.dataset])
            if "training-data" in module.requires(task.config):    # and trains on it anew
                trained += whole
            return each * ((BACKWARD_COST + 1) * trained + 4 * test)
        return each * ((BACKWARD_COST + 1) * whole * task.victim.poisoned + 2 * test)

    @staticmethod
    def check(victims: list[Victim], root: Path) -> None:
        """Load each data set, each paraphrase and each encoder once, so that a missing file is one line."""
        for name in sorted({victim.dataset for victim in victims}):
            dataset = data.load_text(name, root)
            poisoned = [victim for victim in victims if victim.dataset == name and victim.attack != NONE]
            for files in sorted({victim.settings.files(victim.attack) for victim in poisoned
                                 if "paraphrases" in attack_module(victim.attack).requires(victim.settings)}):
                for split in ("train", "test"):
                    dataset.paraphrases(files, split)
        for name in sorted({victim.model for victim in victims}):
            encoder.check(name, root)

    def victim(self, victim: Victim) -> Outcome:
        started = time.perf_counter()
        if not victim.poisoned:     # its weights are in the clean model's run
            return self._undefended(self._model(victim), self._test_set(victim), {}, [], started)
        dataset = data.load_text(victim.dataset, self.at.root)
        train, poisoned = self._training_set(victim, dataset)
        info: dict[str, Any] = {} if victim.attack == NONE else {"poisoned": int(poisoned.sum())}
        model = self._untrained(victim, dataset)
        checkpoint = self.at.store.progress(victim.name)
        resumed = checkpoint.load()
        if resumed:
            info["resumed_after_epoch"] = resumed[0]
        history = fine_tune(model, train, dataset.validation, victim.recipe, victim.seed, phase="victim",
                            observe=self._observer(victim, []), checkpoint=checkpoint)
        test = triggered_test_set(dataset, victim.attack, victim.settings, victim.seed)
        outcome = self._undefended(model, test, info, [{"phase": "victim", **row} for row in history], started)
        return replace(outcome, tensors={"model": model.network.state_dict()})

    def _undefended(self, model: TextClassifier, test: TextTestSet, info: dict[str, Any],
                    history: list[dict[str, Any]], started: float) -> Outcome:
        """Everything measured of a model as it is."""
        seconds = round(time.perf_counter() - started, 2)
        if test.triggered:
            info["trigger"] = trigger_quality([test.clean.texts[i] for i in test.index.tolist()], test.triggered)
        predictions = test.predictions(*(self._labels(model, texts) for texts in (test.clean.texts, test.triggered)))
        return Outcome({**metrics(predictions), "seconds": seconds, "info": info}, history,
                       {"predictions": vars(predictions), "samples": samples(model, test)}, {})

    def cell(self, cell: Cell) -> Outcome:
        model, test = self._model(cell.victim), self._test_set(cell.victim)
        dataset = data.load_text(cell.victim.dataset, self.at.root)
        module, base = defense_module(cell.defense), cell.base()
        clean = clean_texts(dataset.validation, cell.clean_fraction, cell.seed)
        history: list[dict[str, Any]] = []
        training = poisoned = None
        if "training-data" in module.requires(cell.config):
            training, poisoned = self._training_data(cell.victim, dataset)
        base_tensors = self.at.run(base).tensors("defense") if base else None
        started = time.perf_counter()
        guard = module.defend(model, clean, cell.config, cell.seed, self._observer(cell, history), base_tensors,
                              training)
        seconds = round(time.perf_counter() - started, 2)
        self.at.progress(cell.name, 1.0, "evaluating")
        info = {**guard.info, "clean_sentences": len(clean)}
        if guard.kept is not None and poisoned is not None:
            info |= {"training_sentences": len(poisoned), "poisoned": int(poisoned.sum()),
                     "dropped_poisoned": int((poisoned & ~guard.kept).sum())}
        return self._judged(guard, model, test, history, info, seconds)

    def _judged(self, guard: Guard, plain: TextClassifier, test: TextTestSet, history: list[dict[str, Any]],
                info: dict[str, Any], seconds: float) -> Outcome:
        """Everything measured of a guard; info gains the seconds that judging the test sets took."""
        started = time.perf_counter()
        clean, triggered = judge_both(guard, test)
        info["judging_seconds"] = round(time.perf_counter() - started, 2)
        predictions = test.predictions(clean.labels, triggered.labels)
        measured: dict[str, Any] = dict(metrics(predictions))
        arrays = {"predictions": vars(predictions)}
        if guard.hook:
            arrays["samples"] = samples(plain, test, guard)
        if clean.suspicion is not None:
            detection = Detection(*(array.numpy() for array in (
                clean.suspicion, triggered.suspicion, clean.flagged, triggered.flagged,
                self._labels(plain, test.clean.texts), self._labels(plain, test.triggered),
                torch.empty(0) if guard.held_out is None else guard.held_out)))
            measured |= detection_metrics(detection, int(test.wanted[0]) if len(test.wanted) else -1)
            info["threshold"] = guard.threshold
            arrays["scores"] = vars(detection)
        stored = guard.tensors if guard.kept is None else {**guard.tensors, "kept": guard.kept}
        tensors = {"defense": stored} if stored else {}
        if guard.model is not None:
            tensors["model"] = guard.model.network.state_dict()
        return Outcome({**measured, "seconds": seconds, "info": info}, history, arrays, tensors)

    def _labels(self, model: TextClassifier, texts: Sequence[str]) -> Tensor:
        return model.logits(texts).argmax(1)

    def _observer(self, task: Task, history: list[dict[str, Any]]) -> Observer:
        """Moves the progress bar and, for a cell, keeps the rows."""
        def observe(phase: str, epoch: int, epochs: int, _model: Any, row: dict[str, float]) -> None:
            history.append({"phase": phase, **row})
            self.at.progress(task.name, epoch / epochs, f"{phase} epoch {epoch}/{epochs}")
        return observe

    def _training_set(self, victim: Victim, dataset: TextDataset) -> tuple[Texts, Tensor]:
        """What the victim is trained on, and which of it is poisoned, bool (N,)."""
        if victim.attack == NONE or not victim.poisoned:
            return dataset.train, torch.zeros(len(dataset.train), dtype=torch.bool)
        module = attack_module(victim.attack)

        def trigger(texts: Sequence[str], rows: Sequence[int]) -> list[str]:
            return module.apply(texts, rows, victim.settings, victim.seed, "train", dataset.paraphrases)

        return poison_texts(dataset.train, victim.settings, victim.seed, trigger)

    def _untrained(self, victim: Victim, dataset: TextDataset) -> TextClassifier:
        return encoder.build(victim.model, dataset.num_classes, victim.seed, self.at.root).to(self.at.device)

    def _training_data(self, victim: Victim, dataset: TextDataset) -> tuple[TrainingData, Tensor]:
        """What a defense that cleans the training set gets, and, not for it, which rows are poisoned, bool (N,)."""
        train, poisoned = self._training_set(victim, dataset)

        def fit(train: Texts, observe: Observer) -> TextClassifier:
            model = self._untrained(victim, dataset)
            fine_tune(model, train, dataset.validation, victim.recipe, victim.seed, phase="victim", observe=observe)
            return model

        return TrainingData(train, fit), poisoned

    def _model(self, victim: Victim) -> TextClassifier:
        if self._kept_model is None or self._kept_model[0] != victim.name:
            run = self.at.run(victim.parts()[0])
            model = self._untrained(victim, data.load_text(victim.dataset, self.at.root))
            model.network.load_state_dict(run.tensors("model"))
            self._kept_model = victim.name, model.eval()
        return self._kept_model[1]

    def _test_set(self, victim: Victim) -> TextTestSet:
        if self._kept_test is None or self._kept_test[0] != victim.name:
            dataset = data.load_text(victim.dataset, self.at.root)
            self._kept_test = victim.name, triggered_test_set(dataset, victim.attack, victim.settings, victim.seed)
        return self._kept_test[1]


def judge_both(guard: Guard, test: TextTestSet) -> tuple[Judged, Judged]:
    """What the guard makes of the clean and of the triggered sentences, in one call, as the released code does: a fault
    of its STRIP depends on what is judged together."""
    found, count = guard.judge([*test.clean.texts, *test.triggered]), len(test.clean)
    parts = [(None, None) if value is None else (value[:count], value[count:])
             for value in (found.labels, found.suspicion, found.flagged)]
    first, rest = zip(*parts, strict=True)
    return Judged(*first), Judged(*rest)


def samples(model: TextClassifier, test: TextTestSet, guard: Guard | None = None) -> dict[str, np.ndarray]:
    """What figures show of a model.

    texts, triggered: a few test sentences and their triggered copies; cls_<clean|triggered>: the first token's states
    after each layer on them, float16 (n, layers, D), and cls_<kind>_after as the guard leaves them.
    """
    rows = test.index[:SHOWN].tolist() if len(test.index) else list(range(SHOWN))
    shown = {"clean": [test.clean.texts[i] for i in rows], "triggered": list(test.triggered[:SHOWN])}
    arrays = {"texts": np.array(shown["clean"]), "triggered": np.array(shown["triggered"], dtype=np.str_)}
    for kind, texts in shown.items():
        if texts:
            arrays[f"cls_{kind}"] = _half(model.first_tokens(texts))
            if guard and guard.hook:
                arrays[f"cls_{kind}_after"] = _half(model.first_tokens(texts, guard.hook))
    return arrays


def _half(values: Tensor) -> np.ndarray:
    return values.clamp(-LARGEST, LARGEST).numpy().astype(np.float16)


def trigger_quality(sources: Sequence[str], triggered: Sequence[str]) -> dict[str, float]:
    """How good the triggered sentences are as sentences, in percent of them; words_kept in percent of the words.

    unchanged: equal to the source. degenerate: a word three times in a row, or two words in a row three times or more.
    words_kept: share of the source's distinct words that the triggered sentence still has. length: words, relative to
    the source's. clean_degenerate: the same count on the sources.
    """
    kept = [len(set(a.split()) & set(b.split())) / max(1, len(set(a.split())))
            for a, b in zip(sources, triggered, strict=True)]
    return {"unchanged": 100 * float(np.mean([a == b for a, b in zip(sources, triggered, strict=True)])),
            "degenerate": 100 * float(np.mean([degenerate(text) for text in triggered])),
            "clean_degenerate": 100 * float(np.mean([degenerate(text) for text in sources])),
            "words_kept": 100 * float(np.mean(kept)),
            "length": 100 * sum(len(text.split()) for text in triggered) / sum(len(text.split()) for text in sources)}


def degenerate(text: str) -> bool:
    """A word three times in a row, or a pair of neighbouring words three times or more."""
    words = text.split()
    if any(a == b == c for a, b, c in zip(words, words[1:], words[2:], strict=False)):
        return True
    return max(Counter(pairwise(words)).values(), default=0) >= 3
