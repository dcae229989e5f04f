"""Statistics over seeds and attacks. Every function is pure; percentages in, percentages out.

A seed fixes victim, clean subset and data order for every defense, so defenses are compared on paired differences.
The interval of a single run, Wilson's, is in `reproduce.metrics`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95
ALPHA = 0.05


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval; NaN bounds where the data cannot give one."""

    mean: float
    low: float
    high: float

    def above(self, value: float) -> bool:
        """The whole interval lies above `value`."""
        return self.low > value

    def below(self, value: float) -> bool:
        """The whole interval lies below `value`."""
        return self.high < value


@dataclass(frozen=True)
class PairedTest:
    """Two-sided p-value of a paired comparison, and over how many pairs; of a signed-rank test those that differ."""

    n: int
    p: float


@dataclass(frozen=True)
class McNemar:
    """Paired outcomes of two runs on the same images: how many only the first or only the second got, and p."""

    only_first: int
    only_second: int
    p: float


def sample_sd(values: Sequence[float]) -> float:
    """Sample standard deviation (n - 1 in the denominator); NaN for fewer than two values."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def t_interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """Student's interval of the mean: mean +- t(n - 1) SD / sqrt(n)."""
    return _t(values, 1 / math.sqrt(len(values)) if len(values) else math.nan, level)


def prediction_interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """Where one more run is expected: mean +- t(n - 1) SD sqrt(1 + 1/n) (Hahn & Meeker 1991, ch. 4)."""
    return _t(values, math.sqrt(1 + 1 / len(values)) if len(values) else math.nan, level)


def _t(values: Sequence[float], scale: float, level: float) -> Interval:
    if not len(values):
        return Interval(math.nan, math.nan, math.nan)
    mean, sd = float(np.mean(values)), sample_sd(values)
    half = float(stats.t.ppf((1 + level) / 2, len(values) - 1)) * sd * scale if len(values) > 1 else math.nan
    return Interval(mean, mean - half, mean + half)


def over_groups(groups: Sequence[Sequence[float]], level: float = LEVEL) -> Interval:
    """Mean over groups (attacks) of the mean within each (over seeds), with Student's interval over the groups' means;
    of a single group, over its values.

    It covers other attacks of the same kind as well as other seeds, whose spread is in the groups' means, and errs
    on the safe side where these spread unequally (Ibragimov & Mueller, JBES 2010). Of 100 samples of three, five
    or six normal values 95 % intervals should hold the true mean in 95: this one does, a percentile bootstrap in
    75, 83 and 86; of exponential ones, as skewed as ASR over attacks may be, this one in 88, the bootstrap in 69,
    78 and 81. A single value has none (NaN).
    """
    groups = [group for group in groups if len(group)]
    if len(groups) == 1:
        return t_interval(groups[0], level)
    return t_interval([float(np.mean(group)) for group in groups], level)


def paired_t(differences: Sequence[float]) -> PairedTest:
    """Student's t test of mean difference zero (Student 1908).

    Shares come in whole samples, so two seeds may well differ by exactly as much; t would then be infinite. Where all
    differences are equal the signed-rank test takes its place, which asks for their signs only.
    """
    n = len(differences)
    if n < 2:
        return PairedTest(n, math.nan)
    differences = np.round(np.asarray(differences, dtype=float), 9)  # equal but for the last bits is equal
    if np.ptp(differences) == 0:
        return PairedTest(n, wilcoxon(differences).p)
    return PairedTest(n, float(stats.ttest_1samp(differences, 0.0).pvalue))


def wilcoxon(differences: Sequence[float]) -> PairedTest:
    """Wilcoxon's signed-rank test (Wilcoxon 1945), two-sided and exact for any n, ties included.

    Zero differences are dropped, as Wilcoxon did; with no other p is 1. Ties get mid-ranks. The null distribution of
    the rank sum is counted over all 2^n assignments of signs. scipy falls back to a normal approximation when there are
    ties or zeros.
    """
    values = np.round(np.asarray(differences, dtype=float), 9)  # 0.1 + 0.2 and 0.3 are a tie
    values = values[values != 0]
    n = len(values)
    if n == 0:
        return PairedTest(0, 1.0 if len(differences) else math.nan)
    doubled = np.rint(2 * stats.rankdata(np.abs(values))).astype(int)  # mid-ranks are multiples of one half
    counts = np.zeros(doubled.sum() + 1)
    counts[0] = 1.0
    for rank in doubled:
        counts[rank:] += counts[:-rank].copy()
    positive = int(doubled[values > 0].sum())
    extreme = min(positive, int(doubled.sum()) - positive)
    p = min(1.0, 2 * float(counts[:extreme + 1].sum() / counts.sum()))
    return PairedTest(n, p)


def least(n: int, family: int) -> float:
    """The smallest p that a signed-rank test of n pairs can have after Holm's correction over `family` such tests."""
    return min(1.0, family * 2.0 ** (1 - n))


def mcnemar(first: np.ndarray, second: np.ndarray) -> McNemar:
    """Exact McNemar test (McNemar 1947) on paired bool outcomes (N,) of two runs on the same images."""
    only_first, only_second = int(np.sum(first & ~second)), int(np.sum(second & ~first))
    discordant = only_first + only_second
    p = float(stats.binomtest(only_first, discordant, 0.5).pvalue) if discordant else 1.0
    return McNemar(only_first, only_second, p)


def paired_difference(first: np.ndarray, second: np.ndarray, level: float = LEVEL) -> Interval:
    """Difference of two success rates in points, from paired bool outcomes (N,): Wald interval (Agresti 2013, 11.1)."""
    differences = first.astype(float) - second
    half = float(stats.norm.ppf((1 + level) / 2)) * float(np.std(differences)) / math.sqrt(len(differences))
    mean = float(differences.mean())
    return Interval(100 * mean, 100 * (mean - half), 100 * (mean + half))


def holm(p_values: Sequence[float]) -> list[float]:
    """Step-down adjusted p-values (Holm 1979): they control the family-wise error. NaN stays NaN and is not counted."""
    adjusted = [math.nan] * len(p_values)
    order = sorted((i for i, p in enumerate(p_values) if not math.isnan(p)), key=lambda i: p_values[i])
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


@dataclass(frozen=True)
class Ranking:
    """Treatments compared over blocks (Demsar, JMLR 2006): Friedman's p; per treatment the mean rank, 1 = lowest value;
    for each pair of treatments (i, j), i < j, Wilcoxon's p over blocks, Holm-corrected over all pairs."""

    blocks: int
    p: float
    ranks: tuple[float, ...]
    pairs: dict[tuple[int, int], float]

    @property
    def least(self) -> float:
        """The smallest p that any pair can have over so many blocks."""
        return least(self.blocks, len(self.pairs))

    def cliques(self, level: float = ALPHA) -> list[tuple[int, ...]]:
        """Largest runs of treatments, in order of mean rank, no two of which differ significantly; two or more each."""
        order = sorted(range(len(self.ranks)), key=lambda i: self.ranks[i])
        found: list[tuple[int, ...]] = []
        for start in range(len(order)):
            end = start
            while end + 1 < len(order) and not any(
                    self.pairs[min(i, order[end + 1]), max(i, order[end + 1])] < level for i in order[start:end + 1]):
                end += 1
            clique = tuple(order[start:end + 1])
            if len(clique) > 1 and not any(set(clique) <= set(other) for other in found):
                found.append(clique)
        return found


def ranking(values: np.ndarray) -> Ranking:
    """Compare treatments over blocks: values (blocks, treatments), ties get mid-ranks.

    Friedman's test needs three treatments and two blocks; with less its p is NaN.
    """
    values = np.round(np.asarray(values, dtype=float), 9)
    blocks, treatments = values.shape
    ranks = np.array([stats.rankdata(row) for row in values]).mean(0)
    enough = treatments > 2 and blocks > 1 and bool(np.ptp(values, axis=1).any())
    p = float(stats.friedmanchisquare(*values.T).pvalue) if enough else math.nan
    pairs = [(i, j) for i in range(treatments) for j in range(i + 1, treatments)]
    adjusted = holm([wilcoxon(values[:, i] - values[:, j]).p for i, j in pairs])
    return Ranking(blocks, p, tuple(map(float, ranks)), dict(zip(pairs, adjusted, strict=True)))
