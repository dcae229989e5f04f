"""RAP: robustness-aware perturbations (Yang et al., EMNLP 2021, arXiv:2110.07831).

The embedding of a rare word is trained so that the word, put in front of a clean sentence, lowers the probability of
the class to protect by a little, between -range[0] and -range[1]. A backdoored sentence resists:

    delta(x) = p_target(word + x) - p_target(x)
    minimise  scale mean (delta - range[0])+  +  mean (range[1] - delta)+       over the word's embedding, norm kept

on half of the clean sentences, of any class. Suspicion is delta: the probability falls less where x is poisoned. The
threshold is the quantile 1 - frr of delta over those of the other half that the victim assigns to the target.

The class to protect is the attacker's target: the released code reads it off the poisoned test data (:87, defender.py
get_target_label), so it is a constant here, which protocols set.

Constants: clearloveclearlove/BadActs@7932f19, openbackdoor/defenders/rap_defender.py.

Variants. In the released code gradients add up over all steps, for it never sets them to zero (:140-154), and any
sentence may be flagged, though the threshold is that of sentences predicted as the target: those of other classes have
no probability to lose, and look poisoned. `corrected` takes the gradient of each step, and flags only sentences that
are predicted as the target, which the defense is about. Suspicion is the same function of all sentences in both.

Departures. p(x) and the labels come from the victim as it is, not from the copy with the trained embedding, which
differs only in sentences that hold the word itself; all pieces of a word that the tokenizer splits are trained, not
just the first; batches are drawn once in a random order, as there, with a generator of ours.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from reproduce.data.texts import Texts
from reproduce.defending import Guard, Judged, TrainingData, halves, judged
from reproduce.errors import UserError
from reproduce.models.encoder import TextClassifier
from reproduce.training import Observer, silent

MODALITY = "text"


@dataclass(frozen=True)
class Config:
    """target: the class to protect. accumulate: whether gradients add up. protected_only: see Variants."""

    target: int = 1  # :53, then read off the poisoned data (:87); protocols give the data set's own
    word: str = "mb"  # :52
    rate: float = 1e-2  # :51
    epochs: int = field(default=5, metadata={"smoke": 2})  # :49
    batch: int = 16  # :50
    range: tuple[float, float] = (-0.1, -0.3)  # :54
    scale: float = 1.0  # :55
    frr: float = 0.05  # :56
    accumulate: bool = True  # :147-154
    protected_only: bool = False  # :90


SETTINGS = {
    ("badacts", "released"): Config(),
    ("badacts", "corrected"): Config(accumulate=False, protected_only=True),
}


def requires(config: Config) -> frozenset[str]:
    return frozenset()


def work(config: Config, count: int, classes: int) -> float:
    """Sentences forwards and backwards, for estimates of time."""
    return config.epochs * count / 2


def defend(model: TextClassifier, clean: Texts, config: Config, seed: int, observe: Observer = silent,
           base: dict[str, Tensor] | None = None, training: TrainingData | None = None) -> Guard:
    """A guard around `model`."""
    if not 0 <= config.target < model.num_classes:
        raise UserError(f"rap: there is no class {config.target} to protect among {model.num_classes}")
    fitted, held = halves(clean, seed, "rap-halves")
    changed = construct(model, fitted, config, observe)

    def deltas(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Predicted labels and delta, (N,) each."""
        plain = model.logits(texts)
        after = changed.logits(perturbed(texts, config.word)).softmax(1)
        return plain.argmax(1), after[:, config.target] - plain.softmax(1)[:, config.target]

    labels, held_out = deltas(held.texts)
    held_out = held_out[labels == config.target]
    # As in the released code, nothing is flagged where no clean sentence is of the target class: delta is at most 1.
    threshold = float(held_out.quantile(1 - config.frr)) if len(held_out) else 1.0

    def judge(texts: Sequence[str]) -> Judged:
        labels, suspicion = deltas(texts)
        found = judged(labels, suspicion, threshold)
        if config.protected_only:
            flagged = found.flagged & (labels == config.target)
            return Judged(torch.where(flagged, found.labels, labels), suspicion, flagged)
        return found

    numbers = word_numbers(changed, config.word)
    return Guard(judge, threshold=threshold, held_out=held_out,
                 tensors={"embedding": changed.network.get_input_embeddings().weight[numbers].detach().cpu()},
                 info={"held_out_delta": float(held_out.mean()) if len(held_out) else None})


def perturbed(texts: Sequence[str], word: str) -> list[str]:
    """The sentences with the word in front."""
    return [" ".join([word, *text.split()]) for text in texts]


def word_numbers(model: TextClassifier, word: str) -> list[int]:
    """The tokens of the word, without the special ones around it."""
    found = model.encode([word])[0][1:-1]
    if not found:
        raise UserError(f"rap: the tokenizer leaves nothing of the word {word!r}; take another")
    return found


def construct(model: TextClassifier, clean: Texts, config: Config, observe: Observer = silent) -> TextClassifier:
    """A copy of `model` with a trained embedding of the word, in eval mode."""
    changed = copy.deepcopy(model).eval().requires_grad_(False)
    weight = changed.network.get_input_embeddings().weight.requires_grad_()
    numbers = sorted(set(word_numbers(model, config.word)))
    norms = weight[numbers].detach().norm(dim=1, keepdim=True)
    total = torch.zeros_like(weight[numbers].detach())
    before = model.logits(clean.texts).softmax(1)[:, config.target].to(changed.device)
    tokens = changed.encode(perturbed(clean.texts, config.word))
    for epoch in range(config.epochs):
        losses = reached = 0.0
        for start in range(0, len(tokens), config.batch):
            part = slice(start, start + config.batch)
            after = changed(*changed.batch(tokens[part])).softmax(1)[:, config.target]
            delta = after - before[part]
            loss = rap_loss(delta, config)
            gradient = torch.autograd.grad(loss, weight)[0][numbers]
            total = total + gradient if config.accumulate else gradient
            with torch.no_grad():
                moved = weight[numbers] - config.rate * total
                weight[numbers] = moved * norms / moved.norm(dim=1, keepdim=True)
            losses += loss.item() * len(delta)
            reached += float(((delta < config.range[0]) & (delta > config.range[1])).sum())
        observe("perturbation", epoch + 1, config.epochs, changed,
                {"epoch": epoch + 1, "loss": losses / len(tokens), "within": 100 * reached / len(tokens)})
    weight.requires_grad_(False)
    return changed


def rap_loss(delta: Tensor, config: Config) -> Tensor:
    """How far the changes of probability (N,) are outside the range, on average."""
    return config.scale * (delta - config.range[0]).clamp(min=0).mean() + (config.range[1] - delta).clamp(min=0).mean()
