"""How far two results folders agree: what another machine, or another day, makes of the same runs."""

from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from reproduce.errors import UserError
from reproduce.store import Store


@dataclass(frozen=True)
class Pair:
    """One run, computed twice. acc, asr: percent, here and there, asr None without an attack; same: the percentage of
    its predictions that are the same."""

    run: str
    acc: tuple[float, float]
    asr: tuple[float, float] | None
    same: float


@dataclass(frozen=True)
class Agreement:
    """pairs: the runs that both folders hold; copies: how many more are one and the same run; damaged: how many are
    not whole in both."""

    pairs: list[Pair]
    copies: int
    damaged: int = 0

    def lines(self) -> list[str]:
        """For people: a line per run, then one about them all."""
        broken = [f"damaged in one folder or in both, and left out: {self.damaged}"] if self.damaged else []
        if not self.pairs:
            return [f"no run was computed twice; {self.copies} are copies of one another", *broken]
        width = max(len(pair.run) for pair in self.pairs)
        lines = [f"{'':{width}}  {'ACC':>13}  {'ASR':>13}  same predictions"]
        lines += [f"{pair.run:{width}}  {_both(pair.acc)}  {_both(pair.asr)}  {pair.same:7.2f} %"
                  for pair in self.pairs]
        acc, asr = (_distance(values) for values in ([pair.acc for pair in self.pairs],
                                                     [pair.asr for pair in self.pairs if pair.asr]))
        same = mean(pair.same for pair in self.pairs)
        return [*lines, f"{len(self.pairs)} runs computed twice: ACC differs by {acc}, ASR by {asr}; {same:.2f} % of "
                        "the predictions are the same", *broken]


def agreement(here: Path, there: Path) -> Agreement:
    """Of two results folders; UserError where they have no run in common."""
    one, other = Store(here), Store(there)
    for store in (one, other):
        if not store.names():
            raise UserError(f"{store.root} holds no runs: name a results folder")
    pairs, copies, damaged = [], 0, 0
    for name in sorted(set(one.names()) & set(other.names())):
        first, second = one.find(name), other.find(name)
        if first is None or second is None:
            damaged += 1
            continue
        if first.json("environment") == second.json("environment"):
            copies += 1
            continue
        found = [run.json("metrics") for run in (first, second)]
        asr = None if found[0]["asr"] is None else (found[0]["asr"], found[1]["asr"])
        pairs.append(Pair(name, (found[0]["acc"], found[1]["acc"]), asr,
                          first.predictions().agreement(second.predictions())))
    if not pairs and not copies:
        raise UserError(f"{here} and {there} have no finished run in common"
                        + (f": {damaged} of the runs that both have are damaged" if damaged else ""))
    return Agreement(pairs, copies, damaged)


def _both(values: tuple[float, float] | None) -> str:
    return f"{'-':>6} {'-':>6}" if values is None else f"{values[0]:6.2f} {values[1]:6.2f}"


def _distance(values: list[tuple[float, float]]) -> str:
    apart = [abs(first - second) for first, second in values]
    return f"{mean(apart):.2f} points (at most {max(apart):.2f})" if apart else "nothing, for there is none"
