"""Published values beside reproduced ones. tables/published/<paper>.json holds values that were read in a source."""

import json
import math
from typing import Any

import pandas as pd

from reproduce.results import Results
from reproduce.statistics import prediction_interval
from tables.comparison import rows
from tables.layout import PUBLISHED, estimate, grouped, measured, present, table
from tables.render import MISSING, Table, Value, bounds, heading

ROUNDING = 0.01         # published values have two decimals, rounded or cut off
WIDE = 20.0             # points: an interval wider than this agrees with almost anything


def published_values(paper: str) -> dict[str, Any]:
    """What was read in the paper's abstract, its code and its peers, each with its source."""
    return json.loads((PUBLISHED / f"{paper}.json").read_text(encoding="utf-8"))


# A published value with no run of ours to compare it with.
CONTEXT = {"reproduced": math.nan, "sd": math.nan, "n": 0, "gap": math.nan, "low": math.nan, "high": math.nan,
           "text": MISSING, "verdict": "context", "runs": ""}


def published(results: Results, paper: str, name: str, victims: dict[str, str], smoke: bool) -> list[Table]:
    """Published values beside reproduced ones, and those of a peer benchmark, where there is one, for context.

    victims: {item that holds runs to compare: whose victim they are on, in words}.
    """
    items = {item: rows(results, paper, item, "attack", "defense", "variant") for item in victims
             if present(results, paper, item)}
    if not items:
        return []
    values = published_values(paper)
    numbers, shown, used = [], [], []
    notes: dict[str, str] = {}
    for entry in values["rows"]:
        cells = [cell for cell in entry["compare"] if cell["item"] in items] or [None]
        for cell in cells:
            part = _cell(items, cell) if cell else None
            ours = MISSING
            if cell:
                labels = [label for label in cell["labels"].values() if label != MISSING]
                ours = f"{' / '.join(labels)}, {victims[cell['item']]}"
            line = {("", "Source"): entry["source"], ("", "Published as"): entry["what"], ("", "Reproduced as"): ours}
            for measure, value in entry["values"].items():
                row = _gap(part, measure, value, smoke) if entry["compare"] else CONTEXT
                numbers.append({"source": entry["source"], "what": entry["what"], "measure": measure,
                                "published": value, "compared_with": ours, **row, "setting": entry["setting"],
                                "caveat": entry["caveat"]})
                line |= {(heading(measure), "Published"): Value(f"{value:.2f}"),
                         (heading(measure), "Reproduced"): Value(row["text"], runs=tuple(row["runs"].split())),
                         (heading(measure), "Gap"): Value(_signed(row["gap"])),
                         (heading(measure), "Expected"): Value(bounds(row["low"], row["high"], 1).strip() or MISSING),
                         (heading(measure), "Verdict"): Value(row["verdict"])}
            shown.append({**line, ("", "n"): Value(str(row["n"])),
                          ("", "Note"): Value(notes.setdefault(f"{entry['setting']}. {entry['caveat']}",
                                                               "abcdefghijkl"[len(notes)]))})
            if part is not None:
                used.append(part)
    caption = ("Percent. Gap: reproduced minus published, in points. Verdict: a published value is taken as one run; "
               "it agrees if it lies in the 95 % prediction interval for one more run of ours (\"Expected\"), which is "
               "wide with few seeds: wider than 20 points it decides nothing. Values of the paper's own tables are "
               "absent: the paper's text was not available. "
               + " ".join(f"({key}) {note}" for note, key in notes.items()))
    main = table("published", f"{name}: published and reproduced", caption, grouped(shown), pd.DataFrame(numbers),
                 pd.concat(used) if used else next(iter(items.values())).iloc[:0])
    return [main, *([peers(values["peers"])] if "peers" in values else [])]


def peers(block: dict[str, Any]) -> Table:
    """A peer benchmark's values, without any comparison."""
    data = pd.DataFrame([{"attack": row["attack"], "defense": row["defense"], **row["values"],
                          "source": block["source"], "setting": block["setting"]} for row in block["rows"]])
    by_attack = {attack: {(row.defense, heading(measure)): Value(f"{row[measure]:.2f}")
                          for row in part.iloc for measure in ("asr", "acc")}
                 for attack, part in data.groupby("attack", sort=False)}
    frame = grouped([{("", "Attack"): attack, **cells} for attack, cells in by_attack.items()])
    return Table("published-peers", f"Context: {block['where']}",
                 f"Published values, percent; nothing here was run by this artifact. {block['setting']}. "
                 f"{block['caveat']} Source: {block['source']}.", frame, data)


def _cell(items: dict[str, pd.DataFrame], cell: dict[str, Any]) -> pd.DataFrame:
    frame = items[cell["item"]]
    for label, value in cell["labels"].items():
        frame = frame[frame[label] == value]
    return frame


def _gap(part: pd.DataFrame | None, measure: str, value: float, smoke: bool) -> dict[str, Any]:
    """Reproduced mean and SD, gap, prediction interval and verdict for one published value."""
    if part is None:
        return CONTEXT | {"verdict": "not run"}
    rows_done = measured(part, measure)
    ours, values = estimate(part, measure), rows_done[measure].to_list()
    expected = prediction_interval(values)
    low, high = max(0.0, expected.low - ROUNDING), min(100.0, expected.high + ROUNDING)
    if not values:
        verdict = "not run"
    elif smoke:
        verdict = "smoke scale: not comparable"
    elif len(values) < 2:
        verdict = "one seed: not judged"
    else:
        verdict = "ours is lower" if high < value else "ours is higher" if low > value else "agrees"
        if verdict == "agrees" and high - low > WIDE:
            verdict = "undecided"
    # At smoke scale the data set is another one: a gap would be a number without meaning.
    gap = math.nan if smoke or not values else ours.mean - value
    return {"reproduced": ours.mean, "sd": ours.sd, "n": ours.n, "text": ours.text(), "gap": gap,
            "low": low if len(values) > 1 else math.nan, "high": high if len(values) > 1 else math.nan,
            "verdict": verdict, "runs": " ".join(rows_done.run)}


def _signed(value: float) -> str:
    return MISSING if math.isnan(value) else f"{value:+.2f}"
