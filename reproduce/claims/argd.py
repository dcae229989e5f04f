"""ARGD's claims: up to 94.85 % less ASR and 3.23 % more ACC than NAD; and whether its graph is what does it."""

from reproduce.claims.criteria import (
    FEWEST,
    ONE_SEED,
    SIX,
    Claim,
    about,
    claim,
    compared,
    controls,
    defenses,
    finished,
    on_authors_victim,
    up_to,
)
from reproduce.protocols.argd import CONTROL, NODES, PAPER
from reproduce.results import Results
from tables.against_published import published_values
from tables.argd import STUDY


def claims(results: Results) -> list[Claim]:
    """The abstract's two claims, each read as a share and as points, and the controls."""
    return about(results, PAPER, {"main": _main, "authors-victim": _on_authors_victim})


def _on_authors_victim(results: Results) -> list[Claim]:
    return on_authors_victim(results, STUDY, "described",
                             [("ARGD", control) for control in (NODES, CONTROL, "FT", "NAD")],
                             "Written before the runs under reference/, but for the comparison with NAD, which came "
                             "when all but NAD's were known.")


def _main(results: Results) -> list[Claim]:
    read = published_values(PAPER)["claims"]
    table = defenses(results, STUDY, "described")
    runs = finished(table.get("NAD"), table.get("ARGD"))
    wanted = read["lower-asr"]["value"]
    found = [claim(
        PAPER, "lower-asr-than-nad", f"ARGD's ASR is up to {wanted} % lower than NAD's.", read["lower-asr"]["source"],
        "On each of the six attacks with a working backdoor, ARGD as described against NAD as released, paired by "
        "seed: the reduction of mean ASR as a share of NAD's, and in points. Supported: the largest over the attacks "
        f"reaches {wanted} in one of these readings. Not supported: all six ran, none reaches it, and every 95 % "
        f"interval, of share and points, lies below it. Fewer than {FEWEST} seeds decide nothing. {ONE_SEED}",
        [up_to(results, table, "ARGD", "NAD", "asr", wanted, SIX)], runs)]
    wanted = read["higher-acc"]["value"]
    found.append(claim(
        PAPER, "higher-acc-than-nad", f"ARGD's ACC is up to {wanted} % higher than NAD's.",
        read["higher-acc"]["source"],
        "As for ASR, with the gain of ACC.",
        [up_to(results, table, "ARGD", "NAD", "acc", wanted, SIX)], runs))
    family = [compared(table, name, "ARGD", control) for name, control in
              (("graph", NODES), ("distillation", CONTROL))]
    statements = {"graph": "ARGD's edges and embedding lower ASR beyond NAD with the same node weights, teacher and "
                           "schedule.",
                  "distillation": "ARGD's distillation lowers ASR beyond fine-tuning on the same schedule."}
    return found + controls(PAPER, "ARGD", family, statements, "both controls")
