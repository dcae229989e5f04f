"""ARGD's figures, from the runs of `reproduce.protocols.argd`."""

from dataclasses import replace

from figures.comparison import (
    ablation,
    attention_maps,
    authors_victim,
    clean_fraction,
    comparisons,
    gallery,
    if_present,
)
from figures.style import Figure
from reproduce.results import Results
from tables.argd import CONTROL, FACTORS, NODES, PAPER, STUDY


def figures(results: Results, smoke: bool = False) -> list[Figure]:
    """Every figure whose runs are at hand."""
    built = comparisons(results, STUDY) + authors_victim(results, STUDY)
    built += if_present(results, PAPER, "clean-fraction", lambda: clean_fraction(results, STUDY))
    for factor in FACTORS:
        built += ablation(results, STUDY, factor)
    # The main table's victims are NAD's, and so are the pictures of their triggers.
    built += if_present(results, PAPER, "main-released", lambda: gallery(results, STUDY, "main-released"))
    built += if_present(results, PAPER, "main", lambda: attention_maps(results, STUDY, (CONTROL, NODES, "ARGD")))
    return [replace(figure, name=f"{PAPER}-{figure.name}") for figure in built]
