"""Statistics against hand calculations, scipy and published examples."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from reproduce.statistics import (
    Ranking,
    holm,
    least,
    mcnemar,
    over_groups,
    paired_difference,
    paired_t,
    prediction_interval,
    ranking,
    sample_sd,
    t_interval,
    wilcoxon,
)


def test_sample_sd_divides_by_n_minus_1() -> None:
    assert sample_sd([1.0, 2.0, 3.0]) == 1.0
    assert math.isnan(sample_sd([5.0]))


def test_t_interval_by_hand() -> None:
    # mean 2, SD 1, n 3: t(0.975, 2) = 4.30265, half width 4.30265 / sqrt(3)
    interval = t_interval([1.0, 2.0, 3.0])
    assert (interval.mean, interval.low, interval.high) == pytest.approx((2.0, 2 - 2.48414, 2 + 2.48414), abs=1e-5)
    assert math.isnan(t_interval([4.0]).low) and t_interval([4.0]).mean == 4.0
    assert math.isnan(t_interval([]).mean)


def test_prediction_interval_is_wider_by_sqrt_n_plus_1() -> None:
    values = [80.0, 82.0, 81.0, 83.0]
    mean, one_more = t_interval(values), prediction_interval(values)
    assert (one_more.high - one_more.mean) / (mean.high - mean.mean) == pytest.approx(math.sqrt(5))


def test_an_interval_of_unknown_width_is_on_no_side() -> None:
    unknown = t_interval([4.0])
    assert not unknown.above(0) and not unknown.below(100)


def test_paired_t_is_scipys() -> None:
    first, second = np.array([5.0, 7.0, 6.0, 9.0]), np.array([4.0, 7.0, 3.0, 5.0])
    assert paired_t(first - second).p == pytest.approx(stats.ttest_rel(first, second).pvalue)
    assert paired_t([0.0, 0.0]).p == 1.0
    assert paired_t([2.0, 2.0]).p == 0.5, "two signs alike, which chance gives half of the time"
    assert math.isnan(paired_t([1.0]).p)


@pytest.mark.parametrize("n", [5, 6, 11, 20])
def test_wilcoxon_without_ties_is_scipys_exact_test(n: int) -> None:
    values = np.random.default_rng(n).normal(0.4, 1, n)
    assert wilcoxon(values).p == pytest.approx(stats.wilcoxon(values, method="exact").pvalue)


def test_wilcoxon_with_ties_and_zeros_counts_every_sign() -> None:
    differences = [1.0, 1.0, -2.0, 3.0, 3.0, 0.0, 5.0]
    kept = np.array([value for value in differences if value])
    ranks = stats.rankdata(np.abs(kept))
    observed = min(ranks[kept > 0].sum(), ranks[kept < 0].sum())
    sums = [sum(r for r, sign in zip(ranks, signs, strict=True) if sign)
            for signs in itertools.product((0, 1), repeat=len(ranks))]
    assert wilcoxon(differences).p == pytest.approx(2 * np.mean(np.array(sums) <= observed))


def test_six_pairs_are_the_fewest_that_reach_5_percent() -> None:
    assert wilcoxon([-1, -2, -3, -4, -5, -6]).p == pytest.approx(2 / 64)
    five = wilcoxon([-1, -2, -3, -4, -5])
    assert five.p == pytest.approx(2 / 32) == least(5, 1)
    assert least(7, 3) < 0.05 < least(7, 4) and least(8, 6) < 0.05, "a family asks for more"
    assert wilcoxon([0.0, 0.0]).p == 1.0 and math.isnan(wilcoxon([]).p)


def test_methods_that_never_differ_count_in_the_family() -> None:
    assert holm([wilcoxon([-1, -2, -3, -4, -5, -6]).p, wilcoxon([0.0] * 6).p]) == pytest.approx([4 / 64, 1])


def test_mcnemar_counts_discordant_images_only() -> None:
    first = np.array([True] * 10 + [False] * 2 + [True] * 50)
    second = np.array([False] * 10 + [True] * 2 + [True] * 50)
    result = mcnemar(first, second)
    assert (result.only_first, result.only_second) == (10, 2)
    # 2 * P(X <= 2), X ~ Binomial(12, 1/2) = 2 * (1 + 12 + 66) / 4096
    assert result.p == pytest.approx(2 * 79 / 4096)
    assert mcnemar(first, first).p == 1.0


def test_paired_difference_by_hand() -> None:
    # 10 and 2 discordant of 100: difference 8 points, SE = sqrt((12/100 - 0.08^2) / 100)
    first = np.array([True] * 10 + [False] * 2 + [True] * 88)
    second = np.array([False] * 10 + [True] * 2 + [True] * 88)
    interval = paired_difference(first, second)
    half = 1.959964 * 100 * math.sqrt((0.12 - 0.0064) / 100)
    assert (interval.mean, interval.low, interval.high) == pytest.approx((8, 8 - half, 8 + half), abs=1e-4)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    adjusted = holm([0.01, math.nan, 0.6])
    assert adjusted[0] == pytest.approx(0.02) and math.isnan(adjusted[1]) and adjusted[2] == pytest.approx(0.6)
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_over_groups_by_hand() -> None:
    interval = over_groups([[10.0, 11.0], [20.0, 21.0, 22.0], [30.0], []])
    half = 4.302653 * np.std([10.5, 21.0, 30.0], ddof=1) / math.sqrt(3)     # t(2) at 97.5 %
    assert (interval.mean, interval.low, interval.high) == pytest.approx((20.5, 20.5 - half, 20.5 + half))
    assert over_groups([[1.0, 2.0, 3.0]]) == t_interval([1.0, 2.0, 3.0])
    assert math.isnan(over_groups([[3.0]]).low) and over_groups([[3.0]]).mean == 3.0
    assert math.isnan(over_groups([]).mean)


@pytest.mark.parametrize(("attacks", "seeds", "between"),
                         [(1, 3, 0.0), (1, 7, 0.0), (3, 3, 3.0), (5, 1, 1.0), (6, 6, 1.0), (6, 6, 0.0)])
def test_over_groups_holds_the_true_mean_as_often_as_it_says(attacks: int, seeds: int, between: float) -> None:
    rng = np.random.default_rng(0)
    samples = rng.normal(0, between, (2000, attacks, 1)) + rng.normal(0, 1, (2000, attacks, seeds))
    held = np.mean([interval.low <= 0 <= interval.high for interval in map(over_groups, samples)])
    # Two thousand draws at 95 % have a standard error of half a point.
    assert 0.935 <= held <= 0.965


@pytest.mark.parametrize(("kind", "groups", "ours", "bootstrapped"), [
    ("normal", 3, 95, 75), ("normal", 5, 95, 83), ("normal", 6, 95, 86),
    ("exponential", 3, 88, 69), ("exponential", 5, 88, 78), ("exponential", 6, 88, 81)])
def test_shares_of_samples_that_hold_the_true_mean_are_as_stated(kind: str, groups: int, ours: int,
                                                                 bootstrapped: int) -> None:
    """In percent, as `over_groups`, the report and the findings give them."""
    rng = np.random.default_rng(0)
    samples = getattr(rng, kind)(size=(2000, groups)) - (kind == "exponential")
    held = np.mean([interval.low <= 0 <= interval.high for interval in map(over_groups, samples[..., None])])
    means = np.stack([sample[rng.integers(groups, size=(500, groups))].mean(1) for sample in samples])
    low, high = np.quantile(means, [0.025, 0.975], axis=1)
    assert 100 * held == pytest.approx(ours, abs=2.5)
    assert 100 * np.mean((low <= 0) & (high >= 0)) == pytest.approx(bootstrapped, abs=2.5)


def test_ranking_agrees_with_friedmans_and_finds_cliques() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(0, 1, (12, 4)) + np.array([0.0, 0.1, 6.0, 12.0])
    found = ranking(values)
    assert found.blocks == 12 and found.p == pytest.approx(stats.friedmanchisquare(*values.T).pvalue)
    assert found.ranks[2:] == (3.0, 4.0) and sum(found.ranks) == 10
    # Twelve pairs of one sign: p = 2 / 4096, times the number of pairs still in the running.
    assert found.pairs[2, 3] == pytest.approx(6 * 2 / 4096, rel=0.7) and found.pairs[0, 1] > 0.05
    assert [set(clique) for clique in found.cliques()] == [{0, 1}]


def test_ranking_of_equal_values_has_no_p_and_one_clique() -> None:
    found = ranking(np.ones((3, 3)))
    assert np.isnan(found.p) and found.ranks == (2.0, 2.0, 2.0)
    assert found.cliques() == [(0, 1, 2)]


def test_cliques_may_overlap() -> None:
    found = Ranking(6, 0.01, (1.0, 2.0, 3.0), {(0, 1): 0.5, (1, 2): 0.5, (0, 2): 0.01})
    assert found.cliques() == [(0, 1), (1, 2)]
