"""Never poisoned: no defense, but what the best one could leave.

The network of the victim's architecture, recipe and seed that was trained on the same images with none of them poisoned
takes the victim's place. What ASR it has where triggers meet it is not a backdoor's: some are taken for the target's
class as they are, a trigger hides part of an image, and a network is wrong about some of them anyway. A defense that
leaves no more than this has left nothing.

In no paper and no released code.
"""

import copy
from dataclasses import dataclass

from torch import nn

from reproduce.defending import Clean, Defended
from reproduce.training import Observer, silent


@dataclass(frozen=True)
class Config:
    """Nothing to choose."""


SETTINGS = {("cross", "ours"): Config()}


def requires(config: Config) -> frozenset[str]:
    return frozenset({"clean-model"})


def defend(model: nn.Module, clean: Clean, config: Config, seed: int, observe: Observer = silent,
           clean_model: nn.Module | None = None) -> Defended:
    """A copy of the clean model, in eval mode."""
    return Defended(copy.deepcopy(clean_model).eval())
