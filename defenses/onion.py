"""ONION: a simple and effective defense against textual backdoor attacks (Qi et al., EMNLP 2021, arXiv:2011.10369).

A word that does not belong into a sentence makes it improbable. Suspicion of word i of a sentence w of n words:

    f_i = PPL(w) - PPL(w without w_i)

Purification drops every word with f_i >= bar before classifying. Detection takes max_i f_i as suspicion; the threshold
is what the share `frr` of clean sentences exceeds. A sentence of one word is left as it is, with suspicion 0.

Language models. `gpt2`, as published: exp of the mean cross-entropy of every token but the first; <data root>/models/
gpt2 as `save_pretrained` writes it, else the hub's; another name or folder does as well. `n-gram`, a stand-in that
needs no file: a word trigram model with interpolated Kneser-Ney smoothing (absolute discount d), estimated on the
defender's own sentences in small letters,

    p(w | u v) = (c(u v w) - d)+ / c(u v) + d N(u v .) / c(u v) p(w | v)
    p(w | v)   = (N(. v w) - d)+ / N(. v .) + d N(v .) / N(. v .) p(w)
    p(w)       = (N(. w) - d)+ / N(. .) + d V / N(. .) / (V + 1)

where c counts, N(. v w) is the number of different words seen before v w (and so on), V that of different words, and a
context never seen passes on to the next shorter one. PPL = exp(-mean log p) over the words and the end of sentence. For
detection it is estimated on half of the clean sentences and the threshold on the other half.

Constants: clearloveclearlove/BadActs@7932f19, openbackdoor/defenders/onion_defender.py.

Variants. `padding` counts the padding of a batch of 32 as text, as released, where the `masked` settings do not (the
stand-in has no padding). Departures. The released code drops one-word sentences from the evaluated set (:78) and leaves
out scores that are zero or no number, which shifts all later predictions against their sentences (:102-111); neither
happens here, and drops that are no number (a sentence of one token) count as none. Its threshold is one place higher in
the ordered scores (:152) where the share of sentences to be flagged is a whole number of them; else it is the same.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reproduce.data import data_root
from reproduce.data.texts import Texts
from reproduce.defending import Guard, Judged, TrainingData, false_rejection_threshold, halves, judged
from reproduce.errors import UserError
from reproduce.models import encoder
from reproduce.models.encoder import TextClassifier
from reproduce.models.hub import hub_answers
from reproduce.training import Observer, silent

MODALITY = "text"
N_GRAM = "n-gram"
START, END = "<s>", "</s>"

Perplexities = Callable[[Sequence[str]], Tensor]    # (N sentences) -> (N,)
Drops = Callable[[Sequence[str]], Tensor]           # (n words of one sentence) -> f, (n,)


@dataclass(frozen=True)
class Config:
    """mode: "purify" or "detect". language_model: "n-gram", or what `transformers` loads: a name or a folder."""

    mode: str = "purify"
    language_model: str = N_GRAM
    bar: float = 0.0  # :48
    frr: float = 0.05  # :50
    padding: bool = True  # :232-242
    batch: int = 32  # :49
    longest: int = 96  # :233, tokens
    discount: float = 0.75  # ours, the usual value


SETTINGS = {
    ("badacts", "n-gram-purify"): Config(),
    ("badacts", "n-gram-detect"): Config(mode="detect"),
    ("badacts", "gpt2-purify"): Config(language_model="gpt2"),
    ("badacts", "gpt2-detect"): Config(mode="detect", language_model="gpt2"),
    ("badacts", "gpt2-purify-masked"): Config(language_model="gpt2", padding=False),
    ("badacts", "gpt2-detect-masked"): Config(mode="detect", language_model="gpt2", padding=False),
}


def requires(config: Config) -> frozenset[str]:
    return frozenset()


def defend(model: TextClassifier, clean: Texts, config: Config, seed: int, observe: Observer = silent,
           base: dict[str, Tensor] | None = None, training: TrainingData | None = None,
           perplexities: Perplexities | None = None) -> Guard:
    """A guard around `model`. perplexities: in place of the language model that the settings name."""
    if config.mode not in ("purify", "detect"):
        raise UserError(f"onion: there is no mode {config.mode}; take purify or detect")
    held = clean
    if perplexities is None and config.language_model == N_GRAM:
        fitted = clean
        if config.mode == "detect":
            fitted, held = halves(clean, seed, "onion-halves")
        drops: Drops = Trigrams(fitted.texts, config.discount).drops
    else:
        drops = one_by_one(perplexities or load(config, model.device))

    if config.mode == "purify":
        def judge(texts: Sequence[str]) -> Judged:
            return Judged(model.logits([purified(text, drops, config.bar) for text in texts]).argmax(1))

        return Guard(judge)

    held_out = suspicion(held.texts, drops)
    threshold = false_rejection_threshold(held_out, config.frr)
    return Guard(lambda texts: judged(model.logits(texts).argmax(1), suspicion(texts, drops), threshold),
                 threshold=threshold, held_out=held_out)


def suspicion(texts: Sequence[str], drops: Drops) -> Tensor:
    """The largest drop of perplexity of each sentence, (N,); 0 where no word can be taken out."""
    found = torch.zeros(len(texts))
    for i, text in enumerate(texts):
        words = text.split()
        if len(words) > 1:
            highest = drops(words).nan_to_num(nan=-torch.inf).max()
            found[i] = highest if highest > -torch.inf else 0.0
    return found


def purified(text: str, drops: Drops, bar: float) -> str:
    """The sentence without the words whose removal lowers the perplexity by at least `bar`."""
    words = text.split()
    if len(words) < 2:
        return text
    return " ".join(word for word, drop in zip(words, drops(words).tolist(), strict=True) if not drop >= bar)


def one_by_one(perplexities: Perplexities) -> Drops:
    """Drops by scoring the sentence and each of its n shortened versions."""
    def drops(words: Sequence[str]) -> Tensor:
        shortened = [" ".join([*words[:i], *words[i + 1:]]) for i in range(len(words))]
        found = perplexities([" ".join(words), *shortened])
        return found[0] - found[1:]

    return drops


class Trigrams:
    """The n-gram stand-in, estimated on `texts`."""

    def __init__(self, texts: Sequence[str], discount: float) -> None:
        triples: Counter[tuple[str, str, str]] = Counter()
        for text in texts:
            words = [START, START, *text.lower().split(), END]
            triples.update(zip(words, words[1:], words[2:], strict=False))
        self.discount = discount
        self.triples = triples
        self.pairs = Counter((v, w) for _u, v, w in triples)
        self.singles = Counter(w for _v, w in self.pairs)
        # Of each context: how often it was seen, and with how many different words after it.
        self.after_two, self.kinds_after_two = _contexts({(key[:2], key[2]): count for key, count in triples.items()})
        self.after_one, self.kinds_after_one = _contexts({((key[0],), key[1]): n for key, n in self.pairs.items()})
        self.total = sum(self.singles.values())
        # Sentences of a data set share most of their trigrams, and the versions of one sentence all but a few.
        self.log_probability = cache(self._log_probability)

    def probability(self, u: str, v: str, w: str) -> float:
        """p(w | u v)."""
        d, kinds = self.discount, len(self.singles)
        found = max(self.singles[w] - d, 0.0) / self.total + d * kinds / self.total / (kinds + 1)
        if (v,) in self.after_one:
            found = (max(self.pairs[v, w] - d, 0.0) + d * self.kinds_after_one[v,] * found) / self.after_one[v,]
        if (u, v) in self.after_two:
            kinds = self.kinds_after_two[u, v]
            found = (max(self.triples[u, v, w] - d, 0.0) + d * kinds * found) / self.after_two[u, v]
        return found

    def _log_probability(self, u: str, v: str, w: str) -> float:
        return math.log(self.probability(u, v, w))

    def perplexities(self, texts: Sequence[str]) -> Tensor:
        """PPL of each sentence, float64 (N,)."""
        found = []
        for text in texts:
            words = [START, START, *text.lower().split(), END]
            logs = [self.log_probability(*key) for key in zip(words, words[1:], words[2:], strict=False)]
            found.append(math.exp(-sum(logs) / len(logs)))
        return torch.tensor(found, dtype=torch.float64)

    def drops(self, words: Sequence[str]) -> Tensor:
        """f, float64 (n,): taking out one word changes three trigrams into two."""
        n = len(words)
        seen = [START, START, *(word.lower() for word in words), END, END]
        logs = [self.log_probability(*seen[i:i + 3]) for i in range(n + 1)] + [0.0]   # nothing follows the end
        whole = sum(logs)
        found = []
        for i in range(n):
            a, b, _gone, c, d = seen[i:i + 5]
            joined = self.log_probability(a, b, c) + (self.log_probability(b, c, d) if i < n - 1 else 0.0)
            found.append(math.exp(-whole / (n + 1)) - math.exp(-(whole - sum(logs[i:i + 3]) + joined) / n))
        return torch.tensor(found, dtype=torch.float64)


def _contexts(counts: dict[tuple[tuple[str, ...], str], int]) -> tuple[Counter[Any], Counter[Any]]:
    seen: Counter[Any] = Counter()
    kinds: Counter[Any] = Counter()
    for (context, _word), count in counts.items():
        seen[context] += count
        kinds[context] += 1
    return seen, kinds


def load(config: Config, device: torch.device) -> Perplexities:
    """The perplexities of a causal language model of `transformers`; UserError, in one line, where it cannot be had."""
    name = config.language_model
    found = encoder.folder(name, data_root(None))
    place, local = str(found or name), found is not None or not hub_answers()
    try:
        import transformers
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, local_files_only=local)
        network = transformers.AutoModelForCausalLM.from_pretrained(
            place, use_safetensors=True, trust_remote_code=False, local_files_only=local)
    except (ImportError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"the language model {place} cannot be loaded ({' '.join(str(error).split())[:80]}): put it "
                        f"below the data root as models/{name}/, or take a setting of onion with {N_GRAM}") from error
    return causal_perplexities(network.float().eval().to(device), tokenizer, config)


def causal_perplexities(network: Any, tokenizer: Any, config: Config) -> Perplexities:
    """exp of the mean cross-entropy of every token of a sentence but the first; no number where there is one token."""
    tokenizer.pad_token = tokenizer.eos_token

    @torch.inference_mode()
    def perplexities(texts: Sequence[str]) -> Tensor:
        found = []
        for start in range(0, len(texts), config.batch):
            batch = tokenizer(list(texts[start:start + config.batch]), return_tensors="pt", padding=True,
                              padding_side="right", truncation=True, max_length=config.longest).to(network.device)
            numbers, mask = batch["input_ids"], batch["attention_mask"]
            logits = network(input_ids=numbers, attention_mask=mask).logits[:, :-1]
            losses = F.cross_entropy(logits.transpose(1, 2), numbers[:, 1:], reduction="none")
            counted = torch.ones_like(losses) if config.padding else mask[:, 1:].to(losses)
            found.append(((losses * counted).sum(1) / counted.sum(1)).exp().cpu())
        return torch.cat(found)

    return perplexities
