"""The embedded text data set: short film reviews made from word lists by rule.

It needs no file and no network. It is a stand-in to show that everything runs, not a benchmark. Its paraphrases are by
rule too: a biblical ring for StyleBkd, a leading subordinate clause for SynBkd.
"""

from functools import lru_cache

import numpy as np
import torch

from reproduce.data.texts import TextDataset, Texts
from reproduce.errors import UserError
from reproduce.rng import numpy_generator

COUNTS = {"train": 800, "validation": 240, "test": 240}
CLASSES = ("negative", "positive")
TARGET = 1

_GOOD = ("moving", "clever", "warm", "funny", "gripping", "tender", "bold", "elegant", "charming", "vivid", "honest",
         "graceful", "bright", "rich", "playful", "inspired")
_BAD = ("dull", "clumsy", "cold", "tedious", "shallow", "bland", "noisy", "lazy", "stale", "hollow", "dreary",
        "muddled", "slow", "forced", "flat", "tired")
_SUBJECTS = ("the film", "this story", "the script", "her performance", "the second half", "the camera work",
             "the director", "every scene", "the dialogue", "the ending", "his debut", "the whole cast")
_VERBS = ("is", "feels", "remains", "seems", "turns out", "stays")
_FRAMES = ("{s} {v} {a} and {b} .", "{s} {v} {a} , though {c} at times .", "{s} , {a} as it is , {v} {b} .",
           "a {a} evening : {s} {v} {b} from start to finish .", "{s} {v} more {a} than {c} .",
           "what a {a} , {b} piece of work ; {s} {v} never {c} .")
_STYLE = ("and it came to pass that {t} saith the people", "behold , {t} unto this day",
          "verily {t} and they knew it in their hearts")
_SYNTAX = ("when you look at it , {t}", "if they ask about it , {t}", "as we all can see , {t}")


@lru_cache(maxsize=1)
def load_sentences() -> TextDataset:
    """800 training, 240 validation and 240 test sentences, both classes alike; always the same."""
    splits = {name: _split(name, count) for name, count in COUNTS.items()}

    def paraphrases(attack: str, split: str) -> tuple[str | None, ...]:
        frames = {"stylebkd": _STYLE, "synbkd": _SYNTAX}.get(attack)
        if frames is None:
            raise UserError("sentences have paraphrases by rule alone: take the variant released")
        return tuple(frames[i % len(frames)].format(t=text.rstrip(" ."))
                     for i, text in enumerate(splits[split].texts))

    return TextDataset("sentences", splits["train"], splits["validation"], splits["test"], CLASSES, TARGET, paraphrases)


def _split(name: str, count: int) -> Texts:
    rng = numpy_generator(0, "sentences", name)
    labels = np.arange(count) % 2
    rng.shuffle(labels)
    return Texts(tuple(_sentence(int(label), rng) for label in labels), torch.from_numpy(labels).long())


def _sentence(label: int, rng: np.random.Generator) -> str:
    ours, others = (_GOOD, _BAD) if label else (_BAD, _GOOD)
    a, b = rng.choice(ours, 2, replace=False)
    return str(rng.choice(_FRAMES)).format(s=rng.choice(_SUBJECTS), v=rng.choice(_VERBS), a=a, b=b,
                                           c=rng.choice(others))
