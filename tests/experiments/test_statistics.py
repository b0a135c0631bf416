# SPDX-License-Identifier: Apache-2.0
"""The statistics: against statsmodels and scipy where they cover it, against the papers' formulas and plain Monte Carlo elsewhere."""

import math

import numpy as np
import pytest
from scipy.special import betaln
from scipy.stats import chisquare, norm
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import NormalIndPower
from statsmodels.stats.weightstats import CompareMeans, DescrStatsW

from vllm_merge.experiments.statistics import cuped, power, quantile
from vllm_merge.experiments.statistics.comparison import arms_of, difference, lift_interval, no_difference
from vllm_merge.experiments.statistics.correction import holm, shared_alpha
from vllm_merge.experiments.statistics.estimate import contrast, lift, ratio
from vllm_merge.experiments.statistics.imbalance import imbalance
from vllm_merge.experiments.statistics.proportion import difference_interval, share_interval
from vllm_merge.experiments.statistics.sequence import Interval, interval, p_value, rho_squared, standard_errors
from vllm_merge.experiments.statistics.sums import Sums


@pytest.fixture
def random():
    return np.random.default_rng(7)


# -- estimates ------------------------------------------------------------------------------------------------------------


def test_a_mean_and_its_error_are_those_of_statsmodels(random):
    x = random.lognormal(1, 1, 500)
    found, theirs = ratio(Sums.of(x)), DescrStatsW(x)
    assert found.value == pytest.approx(theirs.mean)
    assert math.sqrt(found.variance) == pytest.approx(theirs.std_mean)


def test_a_difference_of_means_is_welchs(random):
    a, b = random.normal(1, 2, 300), random.normal(0, 1, 200)
    found = contrast(ratio(Sums.of(a)), ratio(Sums.of(b)))
    theirs = CompareMeans(DescrStatsW(a), DescrStatsW(b))
    assert math.sqrt(found.variance) == pytest.approx(theirs.std_meandiff_separatevar)
    assert found.value / math.sqrt(found.variance) == pytest.approx(theirs.ttest_ind(usevar="unequal")[0])


def test_a_ratios_error_is_the_cluster_robust_one_of_a_regression(random):
    """The mean over requests, clustered by unit, is the constant of a regression with cluster-robust errors."""
    from statsmodels.regression.linear_model import OLS

    d = random.integers(1, 9, 200)
    unit = np.repeat(np.arange(200), d)
    y = random.normal(1, 1, 200)[unit] + random.normal(0, 1, d.sum())
    found = ratio(Sums.of(np.bincount(unit, y), d.astype(float)))
    fit = OLS(y, np.ones_like(y)).fit(cov_type="cluster", cov_kwds={"groups": unit, "use_correction": False})
    assert found.value == pytest.approx(fit.params[0])
    assert math.sqrt(found.variance * 199 / 200) == pytest.approx(fit.bse[0])


def test_repeating_every_request_of_a_unit_tells_nothing_new(random):
    x = random.normal(1, 1, 300)
    once, often = ratio(Sums.of(x)), ratio(Sums.of(10 * x, 10.0))
    assert often.value == pytest.approx(once.value)
    assert often.variance == pytest.approx(once.variance)


def test_a_lift_has_the_error_that_simulation_gives(random):
    a, b = random.normal(1.2, 1, (4000, 400)), random.normal(1, 1, (4000, 400))
    found = lift(ratio(Sums.of(a)), ratio(Sums.of(b)))
    assert np.mean(found.variance) == pytest.approx(np.var(a.mean(1) / b.mean(1)), rel=0.08)


def test_nothing_is_known_of_nothing():
    empty = ratio(Sums(0.0, 0.0, 0.0, 0.0, 0.0, 0.0))
    assert math.isnan(empty.value)
    assert interval(empty) == Interval(-math.inf, math.inf)
    assert p_value(empty) == 1.0


def test_sums_add_up(random):
    x, d, c = random.normal(0, 1, 90), random.integers(1, 5, 90).astype(float), random.normal(0, 1, 90)
    c[::3] = np.nan
    whole, parts = Sums.of(x, d, c), Sums.of(x[:40], d[:40], c[:40]) + Sums.of(x[40:], d[40:], c[40:])
    assert parts.values() == pytest.approx(whole.values())


# -- intervals that hold at all times ---------------------------------------------------------------------------------------


def test_the_sequence_is_the_papers():
    """arXiv 2103.06476, Theorem 2.2, written out."""
    rho2, t, alpha = rho_squared(0.05, 1000), 700, 0.05
    wanted = math.sqrt(2 * (t * rho2 + 1) / (t**2 * rho2) * math.log(math.sqrt(t * rho2 + 1) / alpha))
    assert standard_errors(t, alpha) / math.sqrt(t) == pytest.approx(wanted)


def test_the_sequence_is_tightest_where_it_is_meant_to_be():
    """Among sequences with other ρ, that for 1,000 units is the tightest one after 1,000 units."""

    def width(tightest_at, t=1000, alpha=0.05):
        information = t * rho_squared(alpha, tightest_at)
        return 2 * (information + 1) / information * math.log(math.sqrt(information + 1) / alpha)

    assert min((100, 300, 900, 1000, 1100, 3000, 10_000), key=width) == 1000


def test_p_is_where_the_interval_reaches_nought(random):
    found = ratio(Sums.of(random.normal(0.3, 1, 800)))
    p = p_value(found)
    assert 0 < p < 0.05
    information = 800 * rho_squared()
    reach = math.sqrt(2 * (information + 1) / information * math.log(math.sqrt(information + 1) / p) * found.variance)
    assert reach == pytest.approx(found.value)
    assert (p < 0.05) == (interval(found).low > 0)


def test_it_is_wider_than_a_single_look_and_shrinks():
    widths = [float(standard_errors(t)) for t in (50, 500, 5000, 500_000)]
    assert all(2.9 < width < 4.7 for width in widths)
    assert np.all(
        np.diff([width / math.sqrt(t) for width, t in zip(widths, (50, 500, 5000, 500_000), strict=True)]) < 0
    )


@pytest.mark.parametrize(("s", "t"), [(0, 10), (3, 10), (10, 10), (70, 300), (0, 0)])
def test_a_shares_interval_ends_where_the_mixture_says(s, t):
    found = share_interval(s, t)

    def evidence(p):
        tail = s * math.log(p) if s else 0.0
        tail += (t - s) * math.log1p(-p) if t - s else 0.0
        return betaln(0.5 + s, 0.5 + t - s) - betaln(0.5, 0.5) - tail

    if t == 0:
        assert (found.low, found.high) == (0, 1)
        return
    assert found.low <= s / t <= found.high
    for end, limit in ((found.low, 0.0), (found.high, 1.0)):
        if end != limit:
            assert evidence(end) == pytest.approx(math.log(20), abs=1e-6)
    assert evidence(max(found.high * 0.999, 1e-9) if s == 0 else (found.low + found.high) / 2) < math.log(20)


def test_a_difference_of_shares_holds_both():
    assert difference_interval(Interval(0.2, 0.4), Interval(0.1, 0.3)) == Interval(
        pytest.approx(-0.1), pytest.approx(0.3)
    )


def test_an_arm_that_always_fails_is_seen_after_a_dozen_units():
    arms, _ = arms_of({"a": Sums.of(np.ones(12)), "b": Sums.of(np.zeros(12))}, share=True)
    assert difference(arms["a"], arms["b"]).low > 0
    one, _ = arms_of({"a": Sums.of(np.ones(2)), "b": Sums.of(np.zeros(2))}, share=True)
    assert difference(one["a"], one["b"]).low < 0


def test_one_unit_that_fails_all_the_time_is_one_unit():
    """A thousand failures of one user say about as much as one."""
    a = Sums.of(np.r_[np.zeros(11), 1000.0], np.r_[np.ones(11), 1000.0])
    arms, _ = arms_of({"a": a, "b": Sums.of(np.zeros(12))}, share=True)
    assert difference(arms["a"], arms["b"]).low < 0


def test_no_difference_between_none_and_none_is_not_certain():
    arms, _ = arms_of({"a": Sums.of(np.zeros(500)), "b": Sums.of(np.zeros(500))}, share=True)
    found = difference(arms["a"], arms["b"])
    assert found.low < 0 < found.high
    assert no_difference(arms["a"], arms["b"]) == 1


def test_means_wait_for_units(random):
    few = {"a": Sums.of(random.normal(9, 1, 40)), "b": Sums.of(random.normal(0, 1, 400))}
    arms, _ = arms_of(few, share=False)
    assert difference(arms["a"], arms["b"]) == lift_interval(arms["a"], arms["b"]) == Interval(-np.inf, np.inf)
    assert arms["a"].interval() == Interval(-np.inf, np.inf)
    assert no_difference(arms["a"], arms["b"]) == 1


def test_a_bound_relative_to_control_is_a_difference(random):
    arms, _ = arms_of({"a": Sums.of(random.normal(2, 1, 900)), "b": Sums.of(random.normal(1, 1, 900))}, share=False)
    assert difference(arms["a"], arms["b"], factor=1.5).low > 0
    assert difference(arms["a"], arms["b"], factor=2.5).high < 0


# -- quantiles --------------------------------------------------------------------------------------------------------------


def test_a_quantile_of_bins_is_that_of_the_values(random):
    values = random.lognormal(-2, 0.5, 20_000)
    edges = np.exp(np.arange(-400, 100) * math.log(1.02))
    counts, _ = np.histogram(values, edges)
    for level in (0.5, 0.9, 0.99):
        value, found = quantile.quantile_interval(edges, counts.astype(float), level)
        assert value == pytest.approx(np.quantile(values, level), rel=0.02)
        assert found.low <= np.exp(-2 + 0.5 * norm.ppf(level)) <= found.high
        wide = quantile.quantile_interval(edges, counts.astype(float), level, effect=20.0)[1]
        assert wide.low <= found.low
        assert wide.high >= found.high


def test_the_slowest_are_not_known_from_few():
    edges, counts = np.array([1.0, 2.0, 4.0]), np.array([5.0, 5.0])
    value, found = quantile.quantile_interval(edges, counts, 0.99)
    assert value == pytest.approx(math.sqrt(8))
    assert found.high == math.inf
    value, found = quantile.quantile_interval(edges, np.zeros(2), 0.5)
    assert math.isnan(value)
    assert found == Interval(0.0, math.inf)


def test_ranks_stop_where_the_mixture_does():
    allowed = quantile.rank_shares(0.9, 1000)
    weight = quantile._PRIOR_WEIGHT
    for share in (allowed.low, allowed.high):
        s = share * 1000
        a, b = 0.9 * weight, 0.1 * weight
        evidence = betaln(a + s, b + 1000 - s) - betaln(a, b) - s * math.log(0.9) - (1000 - s) * math.log(0.1)
        assert evidence == pytest.approx(math.log(20), abs=1e-6)
    assert allowed.low < 0.9 < allowed.high


@pytest.mark.parametrize(("between", "within", "effect"), [(0.0, 1.0, 1.0), (1.0, 0.0, 10.0), (1.0, 1.0, 5.5)])
def test_the_design_effect_is_one_plus_m_minus_one_times_the_correlation(random, between, within, effect):
    logs = between * random.normal(size=(2000, 1)) + within * random.normal(size=(2000, 10))
    sums = logs.sum(1)
    clusters = quantile.Clusters(2000, 20_000, 200_000, sums.sum(), (sums**2 / 10).sum(), (logs**2).sum())
    assert quantile.design_effect(clusters) == pytest.approx(effect, abs=0.35)


def test_single_requests_have_no_design_effect():
    assert quantile.design_effect(quantile.Clusters(5, 5, 5, 1.0, 2.0, 2.0)) == 1.0
    assert quantile.design_effect(quantile.Clusters(1, 9, 81, 1.0, 0.1, 2.0)) == 1.0


# -- CUPED ------------------------------------------------------------------------------------------------------------------


def test_cuped_is_the_regression_on_the_past(random):
    """Two arms: the adjusted difference is that of a regression of the score on arm and past."""
    past = random.normal(5, 2, 4000)
    arm = random.random(4000) < 0.5
    x = 0.3 * arm + 0.8 * past + random.normal(0, 1, 4000)
    sums = {name: Sums.of(x[mine], 1.0, past[mine]) for name, mine in (("a", arm), ("b", ~arm))}
    found, saved = cuped.adjusted(sums)
    plain = {name: ratio(one) for name, one in sums.items()}
    from statsmodels.regression.linear_model import OLS

    fit = OLS(x, np.column_stack([np.ones(4000), arm, past])).fit(cov_type="HC0")
    got = contrast(found["a"], found["b"])
    assert got.value == pytest.approx(fit.params[1], abs=0.002)
    assert math.sqrt(got.variance) == pytest.approx(fit.bse[1], rel=0.02)
    assert got.variance < 0.45 * contrast(plain["a"], plain["b"]).variance
    assert saved == pytest.approx(1 - 1 / (0.64 * 4 + 1), abs=0.04)


def test_no_past_changes_nothing(random):
    sums = {"a": Sums.of(random.normal(0, 1, 90)), "b": Sums.of(random.normal(0, 1, 90), 1.0, np.full(90, np.nan))}
    found, saved = cuped.adjusted(sums)
    assert saved == 0.0
    assert {name: one.value for name, one in found.items()} == {name: ratio(one).value for name, one in sums.items()}
    same, saved = cuped.adjusted({"a": Sums.of(random.normal(0, 1, 90), 1.0, np.ones(90)), "b": sums["b"]})
    assert saved == pytest.approx(0.0)
    assert math.isfinite(same["a"].variance)


# -- sample ratio, correction, power ----------------------------------------------------------------------------------------


def test_one_look_at_the_ratio_is_chi_square():
    found = imbalance([480, 530, 990], [1, 1, 2])
    assert found.once == pytest.approx(chisquare([480, 530, 990], [500, 500, 1000]).pvalue)
    assert found.always >= found.once
    assert not found.mismatch


@pytest.mark.parametrize(
    ("units", "weights", "mismatch"),
    [
        ([5000, 4000], [1, 1], True),
        ([5000, 5000], [1, 1], False),
        ([5000, 5000], [9, 1], True),
        ([9000, 1000], [9, 1], False),
        ([100, 1], [1, 0], True),  # units in an arm that was to have none
        ([100, 0], [1, 0], False),
        ([0, 0], [1, 1], False),
        ([12, 3], [1, 1], False),
    ],
)
def test_a_mismatch_is_seen(units, weights, mismatch):
    assert imbalance(units, weights).mismatch is mismatch


def test_holm_is_statsmodels():
    p = [0.01, 0.04, 0.03, 0.5, 0.011]
    assert holm(p) == pytest.approx(multipletests(p, method="holm")[1].tolist())
    assert holm([]) == []
    assert shared_alpha(0.05, 4) == pytest.approx(0.0125)
    assert shared_alpha(0.05, 0) == 0.05


@pytest.mark.parametrize(("effect", "wanted"), [(0.1, 0.8), (0.25, 0.9), (-0.5, 0.8)])
def test_one_look_needs_what_statsmodels_says(effect, wanted):
    theirs = NormalIndPower().solve_power(abs(effect), alpha=0.05, power=wanted)
    assert power.units_for_one_look(effect, 2.0, wanted) == pytest.approx(theirs, abs=1.01)


def test_looking_all_the_time_needs_more_and_no_more_than_it_says():
    units = power.units_when_watched(0.1, 2.0, 0.8)
    assert power.units_for_one_look(0.1, 2.0, 0.8) < units < 3 * power.units_for_one_look(0.1, 2.0, 0.8)
    assert power.power_when_watched(units, 0.1, 2.0) >= 0.8 > power.power_when_watched(units - 1, 0.1, 2.0)
    assert power.units_when_watched(1e-9, 2.0) is None
