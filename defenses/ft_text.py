"""Plain fine-tuning on the defender's clean sentences: a baseline that is in no released code of BadActs.

minimise CE(f(x), y), from the victim's weights, in the epochs of `recipe`; the model is that of the epoch with the best
accuracy on the share `held` of the clean sentences, which it is not trained on.

Constants: ours, after the training of the victims in clearloveclearlove/BadActs@7932f19 (same rate, epochs and batch),
but without the three epochs in which the rate rises, as the weights are trained already.
"""

import copy
from dataclasses import dataclass

from torch import Tensor

from reproduce.data.texts import Texts
from reproduce.defending import Guard, Judged, TrainingData, halves
from reproduce.errors import UserError
from reproduce.finetuning import TextRecipe, fine_tune
from reproduce.models.encoder import TextClassifier
from reproduce.training import Observer, silent

MODALITY = "text"


@dataclass(frozen=True)
class Config:
    recipe: TextRecipe = TextRecipe(epochs=5, rate=2e-5, warmup=0, batch=32)  # noqa: RUF009  frozen; ours
    held: float = 0.2  # ours


SETTINGS = {("badacts", "ours"): Config()}


def requires(config: Config) -> frozenset[str]:
    return frozenset()


def defend(model: TextClassifier, clean: Texts, config: Config, seed: int, observe: Observer = silent,
           base: dict[str, Tensor] | None = None, training: TrainingData | None = None) -> Guard:
    """A guard that is a fine-tuned copy of `model`."""
    held, train = halves(clean, seed, "ft-text-held", config.held)
    if not len(held):
        raise UserError(f"ft_text: {len(clean)} clean sentences leave none to choose the epoch by; take more")
    tuned = copy.deepcopy(model).requires_grad_(True)
    history = fine_tune(tuned, train, held, config.recipe, seed, phase="fine-tuning", observe=observe)
    chosen = max(history, key=lambda row: row["validation_acc"]) if config.recipe.keep_best else history[-1]
    return Guard(lambda texts: Judged(tuned.logits(texts).argmax(1)), model=tuned,
                 info={"epoch": chosen["epoch"], "validation_acc": chosen["validation_acc"]})
