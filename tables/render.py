"""One table in every format: CSV (numbers), Markdown, LaTeX (booktabs), HTML and text for the terminal."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import pandas as pd

from reproduce.protocols import Profile

MISSING = "-"
BEST, TIED, WRECKED = "best", "tied", "wrecked"
SMOKE = "smoke scale"

_LATEX = {"\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{",
          "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "|": r"\textbar{}", "±": r"$\pm$",
          "<": r"$<$", ">": r"$>$", "≥": r"$\geq$", "≤": r"$\leq$", "†": r"$\dagger$", "‡": r"$\ddagger$", "–": "--",
          "×": r"$\times$"}
_HEADINGS = {"acc": "ACC", "acc_nontarget": "ACC non-target", "asr": "ASR", "base_rate": "Base rate",
             "excess": "Excess ASR", "ra": "RA", "auroc": "AUROC", "auroc_target": "AUROC target", "far": "FAR",
             "frr": "FRR"}


@dataclass(frozen=True)
class Value:
    """A printed cell: its text, the runs behind it, and whether it is best in its column, not significantly worse, or
    of a model that is hardly a classifier any more (then the text says so too)."""

    text: str
    mark: str = ""
    runs: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.text} ‡" if self.mark == WRECKED else self.text


@dataclass(frozen=True)
class Table:
    """frame: what is printed, of Value and str; columns are str or (group, column) pairs; the index is not printed.

    data: the same numbers, one row per number, for the CSV file. seeds, runs, datasets and models: what they were
    computed from; no data set and model where the runs' tasks name none.
    legend: how to read the cells, in every file; the report says it once for all tables.
    """

    name: str
    title: str
    caption: str
    frame: pd.DataFrame
    data: pd.DataFrame
    seeds: tuple[int, ...] = ()
    runs: tuple[str, ...] = ()
    legend: str = ""
    datasets: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    published: bool = False     # every victim is a checkpoint that others trained
    processors: tuple[tuple[str, int], ...] = ()    # what the runs were computed on, and how many of them


def heading(measure: str) -> str:
    """Column heading of a measure."""
    return _HEADINGS.get(measure, measure)


def bounds(low: float, high: float, digits: int, sign: str = "") -> str:
    """ [low, high], or nothing where there is no interval."""
    return "" if math.isnan(low) else f" [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"


def probability(value: float) -> str:
    """A p-value to three digits."""
    if math.isnan(value):
        return MISSING
    return f"{value:.3f}" if value >= 0.001 else "<0.001"


def title(table: Table, profile: Profile) -> str:
    """The title, labelled at smoke scale where there is a run behind the table."""
    return f"{table.title} ({SMOKE})" if profile.smoke and table.runs else table.title


def _sentence(table: Table, profile: Profile) -> str:
    """The title before a caption; one that asks something has its own mark."""
    shown = title(table, profile)
    return shown if shown.endswith("?") else f"{shown}."


def provenance(table: Table, profile: Profile) -> str:
    """One line: profile with its scale, data sets and models of the runs (the profile's where they name none), seeds,
    number of runs, and processors, for between two of them rounding differs."""
    if not table.runs:
        return "Published values; no run of this artifact is shown."
    seeds = ", ".join(map(str, table.seeds)) or "none"
    places = ", ".join(f"{kind}{'s' * (len(names) > 1)} {', '.join(names)}" for kind, names in (
        ("dataset", table.datasets or (profile.dataset,)), ("model", table.models or (profile.model,))))
    note = "victims as published, what takes long in a defense cut" if table.published and profile.shortened \
        else profile.note
    return (f"Profile {profile.name} ({note}); {places}; "
            f"seeds {seeds}; {len(table.runs)} finished run{'' if len(table.runs) == 1 else 's'}{_computed_on(table)}.")


def _computed_on(table: Table) -> str:
    """", on A", or ", on A (5) and B (3)"; nothing where that is not known."""
    if len(table.processors) < 2:
        return "".join(f", on {name}" for name, _runs in table.processors)
    return f", on {' and '.join(f'{name} ({runs})' for name, runs in table.processors)}"


def write(table: Table, folder: Path, profile: Profile) -> None:
    """<folder>/<name>.csv, .md, .tex and .html."""
    folder.mkdir(parents=True, exist_ok=True)
    for ending, content in (("csv", csv(table, profile)), ("md", markdown(table, profile)),
                            ("tex", latex(table, profile)), ("html", html(table, profile))):
        (folder / f"{table.name}.{ending}").write_text(content, encoding="utf-8")


def csv(table: Table, profile: Profile) -> str:
    """Unrounded numbers with n, interval and run names; comment lines start with #."""
    body = table.data.to_csv(index=False, float_format="%.6g", na_rep="", lineterminator="\n")
    return f"# {title(table, profile)}\n# {provenance(table, profile)}\n{body}"


def markdown(table: Table, profile: Profile) -> str:
    """Bold: best; italic: not significantly worse than the best."""
    def cell(value: object) -> str:
        text = str(value).replace("|", r"\|")
        return {BEST: f"**{text}**", TIED: f"*{text}*"}.get(_mark(value), text)

    rows = [[cell(" ".join(filter(None, pair))) for pair in _columns(table)]]
    rows.append(["---"] * len(rows[0]))
    rows += [[cell(value) for value in row] for row in _rows(table)]
    body = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"### {title(table, profile)}\n\n{body}\n\n{_caption(table)}\n\n{provenance(table, profile)}\n"


def latex(table: Table, profile: Profile) -> str:
    r"""A table* for \input; needs booktabs and graphicx. Bold: best; underlined: not significantly worse."""
    def cell(value: object) -> str:
        text = tex(str(value))
        return {BEST: rf"\textbf{{{text}}}", TIED: rf"\underline{{{text}}}"}.get(_mark(value), text)

    columns = _columns(table)
    spans = _spans(table)
    lines = [rf"% {provenance(table, profile)}".replace("\n", " "), r"\begin{table*}", r"\centering",
             rf"\caption{{{tex(_sentence(table, profile))} {tex(_caption(table))} {tex(provenance(table, profile))}}}",
             rf"\label{{tab:{table.name}}}", r"\resizebox{\ifdim\width>\textwidth\textwidth\else\width\fi}{!}{%",
             rf"\begin{{tabular}}{{{'l' * _label_columns(table)}{'r' * (len(columns) - _label_columns(table))}}}",
             r"\toprule"]
    if spans:
        lines.append(" & ".join(rf"\multicolumn{{{size}}}{{c}}{{{tex(group)}}}" for group, size in spans) + r" \\")
        start = 1
        for group, size in spans:
            if group:
                lines.append(rf"\cmidrule(lr){{{start}-{start + size - 1}}}")
            start += size
    lines += [" & ".join(tex(name) for _group, name in columns) + r" \\", r"\midrule"]
    lines += [" & ".join(map(cell, row)) + r" \\" for row in _rows(table)]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}}", r"\end{table*}", ""])


def tex(text: str) -> str:
    """Escaped for LaTeX."""
    return re.sub("|".join(map(re.escape, _LATEX)), lambda match: _LATEX[match.group()], text)


def html(table: Table, profile: Profile, legend: bool = True) -> str:
    """A <figure> with caption; the run names of a cell are its tooltip."""
    labels = _label_columns(table)
    columns = _columns(table)
    head = []
    if spans := _spans(table):
        head.append("".join(f'<th colspan="{size}" class="group" scope="colgroup">{escape(group)}</th>' if group else
                            f'<th colspan="{size}"></th>' for group, size in spans))
    head.append("".join(f'<th scope="col"{_class(i, labels)}>{escape(name)}</th>'
                        for i, (_group, name) in enumerate(columns)))
    body = []
    for row in _rows(table):
        cells = []
        for i, value in enumerate(row):
            runs = getattr(value, "runs", ())
            tooltip = f' title="{escape(" ".join(runs))}"' if runs else ""
            text = {BEST: "<b>{}</b>", TIED: "<u>{}</u>"}.get(_mark(value), "{}").format(escape(str(value)))
            cells.append(f"<td{_class(i, labels)}{tooltip}>{text}</td>")
        body.append("".join(cells))
    rows = "\n".join(f"<tr>{row}</tr>" for row in body)
    caption = escape(_caption(table) if legend else table.caption)
    return (f'<figure class="table" id="table-{table.name}">\n<figcaption><b>{escape(_sentence(table, profile))}</b> '
            f'{caption}</figcaption>\n<div class="scroll" tabindex="0"><table>\n'
            f'<thead>{"".join(f"<tr>{row}</tr>" for row in head)}</thead>\n<tbody>\n{rows}\n</tbody></table></div>\n'
            f'<p class="provenance">{escape(provenance(table, profile))}</p>\n</figure>\n')


def text(table: Table, brief: bool = False) -> str:
    """Aligned columns for a terminal; * is best, ~ is not significantly worse than the best, ‡ is hardly a classifier
    any more. brief: means only."""
    suffix = {BEST: "*", TIED: "~", WRECKED: "‡" if brief else ""}

    def cell(value: object) -> str:
        shown = re.split(r" ± | \[", str(value))[0] if brief and isinstance(value, Value) else str(value)
        return shown + suffix.get(_mark(value), "")

    body = [[cell(value) for value in row] for row in _rows(table)]
    groups, names = zip(*_columns(table), strict=True)
    # A group's name stands above its first column only.
    groups = [group if i == 0 or group != groups[i - 1] else "" for i, group in enumerate(groups)]
    head = [list(groups), list(names)] if any(groups) else [list(names)]
    widths = [max(len(row[i]) for row in [*head, *body]) for i in range(len(names))]
    labels = _label_columns(table)

    def line(row: Sequence[str]) -> str:
        cells = (cell.ljust(width) if i < labels else cell.rjust(width)
                 for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
        return "  ".join(cells).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([table.title, "", *map(line, head), rule, *map(line, body)]) + "\n"


def _caption(table: Table) -> str:
    return " ".join(filter(None, [table.caption, table.legend]))


def _columns(table: Table) -> list[tuple[str, str]]:
    return [column if isinstance(column, tuple) else ("", column) for column in table.frame.columns]


def _rows(table: Table) -> list[tuple[object, ...]]:
    return list(table.frame.itertuples(index=False, name=None))


def _mark(value: object) -> str:
    return getattr(value, "mark", "")


def _label_columns(table: Table) -> int:
    """Leading columns of plain text: row labels, set flush left."""
    for i in range(len(table.frame.columns)):
        if any(isinstance(value, Value) for value in table.frame.iloc[:, i]):
            return i
    return len(table.frame.columns)


def _spans(table: Table) -> list[tuple[str, int]]:
    """Column groups and their widths; empty if there are none."""
    spans: list[tuple[str, int]] = []
    for group, _name in _columns(table):
        if spans and spans[-1][0] == group:
            spans[-1] = (group, spans[-1][1] + 1)
        else:
            spans.append((group, 1))
    return spans if any(group for group, _size in spans) else []


def _class(column: int, labels: int) -> str:
    return ' class="label"' if column < labels else ""
