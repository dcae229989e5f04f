"""BadActs (Yi et al., Findings of ACL 2024): the runs behind each of its tables and figures.

Victims are trained as clearloveclearlove/BadActs@7932f19 does (`recipe`). The defender's clean data are the validation
split. Whether the optimisation of the intervals adds anything shows against the same clamp with intervals that were not
optimised: mu +- 3 sigma of the clean activations, the constants that the search starts from, and the optimised ones
dealt out anew to the units of a layer. Word-space purification is ONION's, beside a vote over sentences with words
dropped at random. What ASR no defense has to answer for shows on the classifier that was trained without poison, and so
does whether a detector tells a backdoor's trigger or just an odd sentence.
"""

from dataclasses import replace
from typing import Any

from defenses import badacts, onion
from reproduce.cells import Victim
from reproduce.data import attacker_target
from reproduce.finetuning import TextRecipe
from reproduce.models.encoder import BERT, MINILM, TINY
from reproduce.poisoning import attack_module
from reproduce.protocols import Entry, Profile
from reproduce.protocols.comparison import Row, cell, comparison, never_poisoned, row

PAPER = "badacts"
METHOD = "BadActs"
STATISTICS = "BadActs, mu ± 3 sigma"
INITIAL = "BadActs, not optimised"
RANDOM = "BadActs, dealt anew"
CLS = "BadActs, [CLS] only"
THEN = "BadActs, flagged only"
REJECT = "BadActs, flagged rejected"
WORDS = "ONION"
ATTACKS = {"BadNets": "badnets_words", "AddSent": "addsent", "StyleBkd": "stylebkd", "SynBkd": "synbkd"}

# configs/*.json and Attacks.py:74-79; 2e-5 is BERT's. A small sentence encoder learns nothing at that rate in 5 epochs,
# so it gets its own; the embedded data set's model is trained from scratch. AdamW's epsilon is that of the
# transformers.AdamW in trainer.py:103; only MiniLM's runs were made before we knew, with the 1e-8 of torch's.
RATES = {MINILM: 1e-4, TINY: 2e-3}
BERT_RATE = 2e-5
EPSILON, MINILM_EPSILON = 1e-6, 1e-8
BATCHES = {"agnews": 12, "agnews-small": 12}


def _own(variant: str) -> Any:
    return badacts.SETTINGS[PAPER, variant]


# FT and the vote are in no released code; they stand beside the released settings with ours.
FT = row("FT", "ours", PAPER, "ft_text").under("released")
RELEASED_ROWS = [
    FT, row("CUBE", "released", PAPER),
    Row(WORDS, "released", "onion", onion.SETTINGS[PAPER, "n-gram-purify"]),
    row("Word drop", "ours", PAPER, "word_drop").under("released"),
    Row(INITIAL, "released", "badacts", _own("initial")), Row(STATISTICS, "released", "badacts", _own("statistics")),
    Row(RANDOM, "released", "badacts", _own("random")), Row(CLS, "released", "badacts", _own("cls")),
    Row(REJECT, "released", "badacts", _own("detect")), Row(THEN, "released", "badacts", _own("detect-then-purify")),
    Row(METHOD, "released", "badacts", _own("released")),
]
DESCRIBED_ROWS = [
    Row(STATISTICS, "described", "badacts", _own("statistics")), Row(METHOD, "described", "badacts", _own("described")),
]
DETECTORS = [
    Row("ONION", "released", "onion", onion.SETTINGS[PAPER, "n-gram-detect"]),
    row("STRIP", "released", PAPER), row("STRIP", "corrected", PAPER),
    row("RAP", "released", PAPER), row("RAP", "corrected", PAPER),
    row("DAN", "released", PAPER), Row(METHOD, "released", "badacts", _own("detect")),
]
# Perplexities by GPT-2, as released: on request, because few have its weights below their data root.
GPT2_ROWS = [Row("ONION, GPT-2", "released", "onion", onion.SETTINGS[PAPER, "gpt2-purify"])]
# The variant of an attack whose paraphrases are those of a generator at hand: on request, because few have one.
GENERATED = "generated"
BRIEF_ROWS = [one for one in RELEASED_ROWS if one.label in (STATISTICS, METHOD)]

DEVIATIONS = (1.0, 2.0, 3.0, 4.0, 5.0)
FRRS = (0.01, 0.05, 0.1, 0.2, 0.4)
WEIGHTS = (0.01, 0.1, 1.0)
SHARES = (0.1, 0.25, 0.5, 1.0)
POISON_RATES = (0.01, 0.05, 0.1, 0.2)


def recipe(dataset: str, encoder: str) -> TextRecipe:
    """How a victim is trained: AdamW, no weight decay, gradients clipped at 1, rate up for 3 epochs and down for 2
    (trainer.py:105-107), the epoch best on the validation split (eval.py:42)."""
    return TextRecipe(epochs=5, rate=RATES.get(encoder, BERT_RATE), warmup=3, batch=BATCHES.get(dataset, 32),
                      epsilon=MINILM_EPSILON if encoder == MINILM else EPSILON)


def departure(profile: Profile) -> str:
    """What keeps runs at this scale from a verdict on the paper: its encoder is BERT."""
    return "" if profile.encoder == BERT else f"{profile.encoder} in the place of the protocol's encoder"


def text_victim(profile: Profile, dataset: str, attack: str, seed: int, variant: str = "released",
                **changes: Any) -> Victim:
    """The victim of an attack on a data set, with the data set's target."""
    settings = replace(attack_module(attack).SETTINGS[PAPER, variant], target=attacker_target(dataset), **changes)
    return Victim(dataset, profile.encoder, profile.victim(recipe(dataset, profile.encoder)), seed, attack, settings)


def purification(dataset: str) -> str:
    """The item that holds a data set's purification runs."""
    return f"purification-{dataset}"


def detection(dataset: str) -> str:
    """The item that holds a data set's detectors."""
    return f"detection-{dataset}"


def unpoisoned(dataset: str) -> str:
    """The item that holds a data set's triggers on the classifier that was trained without poison, and detectors
    there."""
    return f"never-poisoned-{dataset}"


def entries(profile: Profile) -> list[Entry]:
    """Every run of the paper at this scale."""
    found: list[Entry] = []
    for seed in profile.seeds:
        for dataset in profile.texts:
            found += _main(profile, dataset, seed, RELEASED_ROWS + DESCRIBED_ROWS)
            if profile.repeats(seed):
                for label, attack in ATTACKS.items():
                    on = text_victim(profile, dataset, attack, seed)
                    found += never_poisoned(profile, PAPER, unpoisoned(dataset), on, {"attack": label}, DETECTORS, 1.0)
        if profile.name == "paper":
            # Its validation split equals its test split: what that flatters.
            found += _main(profile, "hsol-released", seed, BRIEF_ROWS)
            found += [replace(entry, on_request=True)
                      for entry in _main(profile, "agnews", seed, RELEASED_ROWS + DESCRIBED_ROWS)]
            found += [replace(entry, on_request=True) for dataset in profile.texts
                      for entry in _main(profile, dataset, seed, RELEASED_ROWS, GENERATED)]
            found += [replace(entry, item="onion-gpt2", on_request=True)
                      for entry in _main(profile, profile.texts[0], seed, GPT2_ROWS)
                      if entry.item == purification(profile.texts[0])]
        if profile.sweeps(seed):
            found += _sweeps(profile, seed)
    return found


def _main(profile: Profile, dataset: str, seed: int, rows: list[Row], variant: str = "released") -> list[Entry]:
    """The items of a data set; of its sentences as a paraphraser at hand rewrites them, where that is the variant."""
    found: list[Entry] = []
    place = dataset if variant == "released" else f"{dataset}-{variant}"
    # Fine-tuning goes on at the rate that the victim was trained at.
    tuning = replace(FT.config.recipe, rate=recipe(dataset, profile.encoder).rate)
    rows = [replace(one, config=replace(one.config, recipe=tuning)) if one is FT else one for one in rows]
    for label in profile.attacks(ATTACKS, seed):
        if (PAPER, variant) not in attack_module(ATTACKS[label]).SETTINGS:
            continue
        on = text_victim(profile, dataset, ATTACKS[label], seed, variant)
        found += comparison(profile, PAPER, purification(place), on, {"attack": label}, rows, 1.0)
        detectors = DETECTORS if len(rows) > len(BRIEF_ROWS) else DETECTORS[-1:]
        found += comparison(profile, PAPER, detection(place), on, {"attack": label}, detectors, 1.0)
    return found


def _sweeps(profile: Profile, seed: int) -> list[Entry]:
    """Everything that varies one factor, on the first data set with the sentence trigger."""
    dataset = profile.texts[0]
    on = text_victim(profile, dataset, ATTACKS["AddSent"], seed)
    released, detect, then = _own("released"), _own("detect"), _own("detect-then-purify")
    last = profile.encoder_layers - 1

    def vary(item: str, label: str, settings: dict[str, Any], fraction: float = 1.0) -> list[Entry]:
        return [Entry(PAPER, item, {label: value}, cell(profile, on, "badacts", config, fraction))
                for value, config in settings.items()]

    found = vary("deviations", "k", profile.values({f"{k:g}": replace(detect, deviations=k) for k in DEVIATIONS}))
    found += vary("frr", "frr", profile.values({f"{100 * frr:g} %": replace(then, frr=frr) for frr in FRRS}))
    found += vary("weight", "weight", profile.values({f"{w:g}": replace(released, weight=w) for w in WEIGHTS}))
    found += vary("layers", "layers", {
        "all": released, "first half": replace(released, layers=(0, last // 2)),
        "second half": replace(released, layers=(last // 2 + 1, last)), "last": replace(released, layers=(last, last))})
    for name, share in profile.values({f"{share:.0%}".replace("%", " %"): share for share in SHARES}).items():
        found += [Entry(PAPER, "validation", {"share": name, "defense": label},
                        cell(profile, on, "badacts", config, share))
                  for label, config in ((STATISTICS, _own("statistics")), (METHOD, released))]
    for name, rate in profile.values({f"{100 * rate:g} %": rate for rate in POISON_RATES}).items():
        victim = text_victim(profile, dataset, ATTACKS["AddSent"], seed, rate=rate)
        found += comparison(profile, PAPER, "poison-rate", victim, {"rate": name}, BRIEF_ROWS, 1.0)
    return found
