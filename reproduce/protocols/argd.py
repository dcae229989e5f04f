"""ARGD (Xia et al., IJCAI 2022): the runs behind each of its tables and figures.

Its victims are NAD's (`comparison.RELEASED`), so that both papers, and every other, repair the same models. Those of
ARGD's own code, with its triggers, target and rate, are the item "main-released"; their recipe is train_badnet.py's:
epochs 1 to 9, rate 0.1 below epoch 7, then 0.01 (:128, utils of BililiCode/ARGD@6354666), which the BatchNorm counter
of the victim published there confirms (7,038 steps).

What the graph adds is seen against two controls with the same teacher and schedule: no distillation at all, and the
nodes alone, which is NAD with betas 2000, 5000, 2000.
"""

from dataclasses import replace
from typing import Any

from defenses import argd
from reproduce.cells import Published
from reproduce.poisoning import attack_module
from reproduce.protocols import Entry, Profile
from reproduce.protocols.comparison import SIX, Row, comparison, fractions, on_published, row, sweep, victim
from reproduce.training import Recipe

PAPER = "argd"
AUTHORS_VICTIM = Published(
    "checkpoints/argd/WRN-16-1-S-model_best.pth.tar",
    "831356518fed98bf08f595a8506a6d8dd528f59acb1976c2dbd408592d538440",
    "weight/s_net/WRN-16-1-S-model_best.pth.tar of github.com/BililiCode/ARGD at 6354666")
OWN_RECIPE = Recipe(epochs=9, rates=((0, 0.1), (6, 0.01)), shuffle=False)
CONTROL = "ARGD without distillation"
NODES = "NAD, betas 2000/5000/2000"

_DESCRIBED = argd.SETTINGS[PAPER, "described"]
_RELEASED = argd.SETTINGS[PAPER, "released"]
# 6533bf1^:main.py, 65-69: the betas NAD gets in ARGD's own code.
NAD_IN_ARGD = replace(argd.as_nad(_RELEASED), betas=(5000.0, 5000.0, 5000.0))
# NAD and FT as their own released code has them; ARGD and its controls share teacher and schedule.
DESCRIBED_ROWS = [
    row("FT", "released", "nad").under("described"),
    row("NAD", "released", "nad").under("described"),
    Row(CONTROL, "described", "argd", argd.without_distillation(_DESCRIBED)),
    Row(NODES, "described", "argd", argd.nodes_only(_DESCRIBED)),
    Row("ARGD", "described", "argd", _DESCRIBED),
]
RELEASED_ROWS = [
    Row("NAD", "released", "nad", NAD_IN_ARGD),
    Row(CONTROL, "released", "argd", argd.without_distillation(_RELEASED)),
    Row(NODES, "released", "argd", argd.nodes_only(_RELEASED)),
    Row("ARGD", "released", "argd", _RELEASED),
]
TEACHERS = {
    "victim fine-tuned on the clean subset": {},
    "WRN-16-1 from scratch on the clean subset": {"teacher": "scratch", "teacher_model": "wrn-16-1",
                                                  "teacher_recipe": argd.SCRATCH},
    "WRN-40-2 from scratch on the clean subset": {"teacher": "scratch", "teacher_model": "wrn-40-2",
                                                  "teacher_recipe": argd.SCRATCH},
}
# With these weights edges and embedding are as large as the nodes in the first epoch (the header of defenses/argd.py).
RAISED = {"edge_weight": 700.0, "embedding_weight": 100.0}
NO_NODES = (0.0,) * 3
TERMS = {
    "cross-entropy alone": argd.without_distillation(_DESCRIBED),
    "nodes": argd.nodes_only(_DESCRIBED),
    "nodes, edges": replace(_DESCRIBED, embedding_weight=0.0),
    "nodes, embedding": replace(_DESCRIBED, edge_weight=0.0),
    "edges, embedding": replace(_DESCRIBED, node_weights=NO_NODES),
    "nodes, edges, embedding (ARGD)": _DESCRIBED,
    "edges times 700, embedding times 100": replace(_DESCRIBED, node_weights=NO_NODES, **RAISED),
    "nodes, edges times 700, embedding times 100": replace(_DESCRIBED, **RAISED),
    "ARGD, embedding trained": argd.SETTINGS[PAPER, "trained-embedding"],
}
VARIANTS = {variant: argd.SETTINGS[PAPER, variant]
            for variant in ("described", "trained-embedding", "released", "released-2022-01")}


def entries(profile: Profile) -> list[Entry]:
    """Every run of the paper at this scale."""
    found: list[Entry] = []
    for seed in profile.seeds:
        found += _main(profile, seed)
        if profile.sweeps(seed):
            found += _sweeps(profile, seed)
        found += on_published(profile, PAPER, AUTHORS_VICTIM, PAPER, seed, DESCRIBED_ROWS)
    return found


def _main(profile: Profile, seed: int) -> list[Entry]:
    """NAD's six victims, then those of ARGD's own code."""
    found: list[Entry] = []
    for label in profile.attacks(SIX, seed):
        found += comparison(profile, PAPER, "main", victim(profile, SIX[label], "nad", "described", seed),
                            {"attack": label}, DESCRIBED_ROWS)
    if profile.dataset == "cifar10":  # released triggers come as arrays of its size; the embedded data set has none
        for label, attack in SIX.items():
            if (PAPER, "released") in attack_module(attack).SETTINGS:
                found += comparison(profile, PAPER, "main-released",
                                    victim(profile, attack, PAPER, "released", seed, OWN_RECIPE), {"attack": label},
                                    RELEASED_ROWS)
    return found


def _sweeps(profile: Profile, seed: int) -> list[Entry]:
    """Everything that varies one factor, on BadNets."""
    on = victim(profile, "badnets", "nad", "released", seed)
    found = fractions(profile, PAPER, on, [one for one in DESCRIBED_ROWS if one.label != "NAD"])
    for teacher, changes in profile.values(TEACHERS).items():
        config = replace(_DESCRIBED, **changes)
        methods: dict[str, Any] = {NODES: argd.nodes_only(config), "ARGD": config}
        found += [replace(entry, labels={"teacher": teacher, **entry.labels})
                  for entry in sweep(profile, PAPER, "teacher", "defense", on, "argd", methods)]
    found += sweep(profile, PAPER, "terms", "terms", on, "argd", TERMS)
    found += sweep(profile, PAPER, "variants", "variant", on, "argd", VARIANTS)
    return found
