# SPDX-License-Identifier: Apache-2.0
"""Experiments that are simulated many times, and looked at all the time: how often the statistics are wrong, and how often they find
what is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import norm

from vllm_merge.experiments.statistics import imbalance, proportion, quantile
from vllm_merge.experiments.statistics.comparison import Arm, arms_of, difference
from vllm_merge.experiments.statistics.correction import shared_alpha
from vllm_merge.experiments.statistics.estimate import contrast
from vllm_merge.experiments.statistics.power import units_when_watched
from vllm_merge.experiments.statistics.sequence import ALPHA, MIN_UNITS
from vllm_merge.experiments.statistics.sums import Sums

AT_ONCE = 100  # runs that are held in memory
Draw = Callable[[np.random.Generator, tuple[int, int]], tuple[np.ndarray, ...]]


@dataclass(frozen=True)
class Case:
    """Units that come one after the other. draw(random, (runs, units)): x, d, and c where there is a past; every: units between two
    looks. mean: the true value of each arm.
    """

    name: str
    draw: Draw
    mean: float
    share: bool = False
    every: int = 1


def normal(random: np.random.Generator, shape: tuple[int, int]) -> tuple[np.ndarray, ...]:
    return random.normal(1.0, 1.0, shape), np.ones(shape)


def lognormal(random: np.random.Generator, shape: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """Lengths of answers: a long tail."""
    return random.lognormal(5.0, 1.0, shape), np.ones(shape)


def share_of(p: float) -> Draw:
    return lambda random, shape: ((random.random(shape) < p).astype(float), np.ones(shape))


def few_do_much(random: np.random.Generator, shape: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """Scores of users who come a few times or hundreds of times, each with a taste of their own."""
    d = np.ceil(random.lognormal(1.0, 1.2, shape))
    return d * random.normal(1.0, 0.5, shape) + random.normal(0.0, 1.0, shape) * np.sqrt(d), d


def clustered_share(random: np.random.Generator, shape: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """Errors that meet some users again and again."""
    d = np.ceil(random.lognormal(1.0, 1.2, shape))
    return random.binomial(d.astype(int), random.beta(0.5, 9.5, shape)).astype(float), d


def with_past(random: np.random.Generator, shape: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """Half of a unit's score is what it was before; a third of the units is new."""
    taste = random.normal(0.0, 1.0, shape)
    past = np.where(random.random(shape) < 1 / 3, np.nan, taste + random.normal(0.0, 0.5, shape))
    return 1 + taste + random.normal(0.0, 1.0, shape), np.ones(shape), past


CASES = (
    Case("mean, normal", normal, 1.0),
    Case("mean, lognormal", lognormal, float(np.exp(5.5))),
    Case("ratio, few users do much", few_do_much, 1.0),
    Case("mean with CUPED", with_past, 1.0, every=5),
    Case("share of 30 %", share_of(0.3), 0.3, share=True, every=10),
    Case("share of 1 %", share_of(0.01), 0.01, share=True, every=10),
    Case("share of 5 %, clustered", clustered_share, 0.05, share=True, every=10),
)


def courses(case: Case, random: np.random.Generator, runs: int, units: int, arms: int) -> Iterator[dict[str, Sums]]:
    """{arm: sums at each look}, arrays (runs at once, looks), until all runs are through."""
    looks = np.arange(case.every - 1, units, case.every)
    for start in range(0, runs, AT_ONCE):
        shape = (min(AT_ONCE, runs - start), units)
        x, d, *past = case.draw(random, shape)
        drawn = random.integers(arms, size=shape)
        values = [np.ones(shape), x, d, x * x, d * d, x * d]
        if past:
            m = np.isfinite(past[0]).astype(float)
            c = np.where(m > 0, past[0], 0.0)
            values += [m, c, c * c, c * x, c * d, m * x, m * d]
        yield {
            str(arm): Sums(*(np.cumsum(value * (drawn == arm), axis=1)[:, looks] for value in values))
            for arm in range(arms)
        }


def false_positives(case: Case, runs: int, units: int, arms: int = 2, seed: int = 0) -> dict[str, Any]:
    """Of A/A runs: how many ever showed a difference, by our intervals, and by a test at each look (the usual mistake); and in how
    many the interval of an arm ever missed its true value.
    """
    random = np.random.default_rng(seed)
    ours = naive = missed = 0
    level = shared_alpha(ALPHA, arms - 1)
    for sums in courses(case, random, runs, units, arms):
        found, _ = arms_of(sums, share=case.share)
        shown, tested = [], []
        for name in list(found)[1:]:
            interval = difference(found[name], found["0"], level)
            shown.append(((interval.low > 0) | (interval.high < 0)).any(1))
            tested.append(_naive(found[name], found["0"]))
        own = found["0"].interval()
        ours += int(np.any(shown, axis=0).sum())
        naive += int(np.any(tested, axis=0).sum())
        missed += int(((own.low > case.mean) | (own.high < case.mean)).any(1).sum())
    return {
        "case": case.name,
        "arms": arms,
        "runs": runs,
        "units": units,
        "looks": units // case.every,
        "nominal": ALPHA,
        "false_positives": ours / runs,
        "false_positives_of_a_test_at_each_look": naive / runs,
        "coverage": 1 - missed / runs,
        "nominal_coverage": 1 - ALPHA,
    }


def _naive(arm: Arm, control: Arm) -> np.ndarray:
    """Whether a two-sided z-test was ever significant, from MIN_UNITS on."""
    found = contrast(arm.estimate, control.estimate)
    with np.errstate(invalid="ignore", divide="ignore"):
        z = np.abs(found.value) / np.sqrt(found.variance)
    enough = (arm.sums.units >= MIN_UNITS) & (control.sums.units >= MIN_UNITS)
    return np.asarray(((z > norm.ppf(1 - ALPHA / 2)) & enough).any(1))


def power(effect: float, runs: int, wanted: float = 0.8, seed: int = 1) -> dict[str, Any]:
    """Normal scores with a true difference, and the units that the planner asks for: how many runs find it, and when."""
    random = np.random.default_rng(seed)
    planned = units_when_watched(effect, 2.0, wanted) or 0
    found, when, covered = 0, [], 0
    for start in range(0, runs, AT_ONCE):
        shape = (min(AT_ONCE, runs - start), planned)
        arms = {}
        for name, mean in (("1", 1.0 + effect), ("0", 1.0)):
            x = random.normal(mean, 1.0, shape)
            ones = np.cumsum(np.ones(shape), axis=1)
            arms[name] = Sums(ones, np.cumsum(x, 1), ones, np.cumsum(x * x, 1), ones, np.cumsum(x, 1))
        made, _ = arms_of(arms, share=False)
        interval = difference(made["1"], made["0"])
        shown = interval.low > 0
        found += int(shown.any(1).sum())
        when += np.where(shown.any(1), shown.argmax(1) + 1, planned).tolist()
        covered += int(((interval.low <= effect) & (effect <= interval.high)).all(1).sum())
    return {
        "case": f"true difference of {effect:g} standard deviations",
        "runs": runs,
        "planned_units_in_each_arm": planned,
        "wanted_power": wanted,
        "power": found / runs,
        "mean_units_until_shown": float(np.mean(when)),
        "coverage": covered / runs,
        "nominal_coverage": 1 - ALPHA,
    }


def returning_units(runs: int, units: int = 300, days: int = 40, seed: int = 2) -> dict[str, Any]:
    """Everybody is there on the first day and comes again and again: what is known of a unit grows, the units do not."""
    random = np.random.default_rng(seed)
    wrong = 0
    for start in range(0, runs, AT_ONCE):
        shape = (min(AT_ONCE, runs - start), units)
        taste, activity = random.normal(0.0, 1.0, shape), random.lognormal(0.0, 1.0, shape)
        drawn = random.random(shape) < 0.5
        x, d = np.zeros(shape), np.zeros(shape)
        shown = np.zeros(shape[0], dtype=bool)
        for _ in range(days):
            came = random.poisson(activity)
            d += came
            x += came * taste + random.normal(0.0, 1.0, shape) * np.sqrt(came)
            sums = {}
            for name, mine in (("1", drawn), ("0", ~drawn)):
                seen = mine & (d > 0)
                sums[name] = Sums(*((value * seen).sum(1) for value in (np.ones(shape), x, d, x * x, d * d, x * d)))
            found, _ = arms_of(sums, share=False)
            interval = difference(found["1"], found["0"])
            shown |= (interval.low > 0) | (interval.high < 0)
        wrong += int(shown.sum())
    return {
        "case": "ratio, the same units come back every day",
        "runs": runs,
        "units": units,
        "looks": days,
        "nominal": ALPHA,
        "false_positives": wrong / runs,
    }


def quantiles(level: float, runs: int, clustered: bool, latencies: int = 3000, seed: int = 3) -> dict[str, Any]:
    """Lognormal latencies: in how many runs the interval of a quantile always holds the true one."""
    random = np.random.default_rng(seed)
    between, within = (0.6, 0.8) if clustered else (0.0, 1.0)
    truth = norm.ppf(level) * np.hypot(between, within)
    a, b = quantile._PRIOR_WEIGHT * level, quantile._PRIOR_WEIGHT * (1 - level)
    covered = 0
    for _ in range(runs):
        units = np.arange(latencies) // 10 if clustered else np.arange(latencies)
        logs = random.normal(0, between, latencies)[units] + random.normal(0, within, latencies)
        looks = np.arange(49, latencies, 50)
        below = np.cumsum(logs <= truth)[looks]
        effects = np.array([_effect(logs[: end + 1], units[: end + 1]) for end in looks]) if clustered else 1.0
        evidence = proportion.log_evidence(below / effects, (looks + 1) / effects, level, a, b)
        covered += bool((evidence < -np.log(ALPHA)).all())
    return {
        "case": f"p{100 * level:g} of latencies, {'ten of each unit' if clustered else 'independent'}",
        "runs": runs,
        "looks": latencies // 50,
        "coverage": covered / runs,
        "nominal_coverage": 1 - ALPHA,
    }


def _effect(logs: np.ndarray, units: np.ndarray) -> float:
    n, s = np.bincount(units), np.bincount(units, logs)
    n, s = n[n > 0], s[n > 0]
    return quantile.design_effect(
        quantile.Clusters(len(n), n.sum(), (n * n).sum(), s.sum(), (s * s / n).sum(), (logs**2).sum())
    )


def ratio_mismatch(runs: int, units: int = 5000, lost: float = 0.0, seed: int = 4) -> dict[str, Any]:
    """How often the sequential test of the sample ratio ever says mismatch; lost: the part of one arm's units that is lost."""
    random = np.random.default_rng(seed)
    shares = np.array([0.5, 0.5])
    said = 0
    for start in range(0, runs, AT_ONCE):
        shape = (min(AT_ONCE, runs - start), units)
        first = random.random(shape) < 0.5
        kept = ~(first & (random.random(shape) < lost))
        counts = np.stack([np.cumsum(first & kept, 1), np.cumsum(~first & kept, 1)], axis=-1)
        evidence = imbalance.log_evidence(counts, shares)
        said += int((evidence > -np.log(imbalance.MISMATCH)).any(1).sum())
    name = f"sample ratio with {100 * lost:g} % of one arm lost" if lost else "sample ratio as it should be"
    return {
        "case": name,
        "runs": runs,
        "units": units,
        "looks": units,
        "nominal": imbalance.MISMATCH,
        "said": said / runs,
    }
