# SPDX-License-Identifier: Apache-2.0
"""Plans of experiments."""

import pytest

from vllm_merge.errors import UserInputError
from vllm_merge.experiments.planner import Baseline, plan


def test_a_plan():
    found = plan(Baseline.of_share(0.3), 0.03, units_per_day=1000)
    assert found.one_look == 3760  # (1.96 + 0.84)² · (0.3 · 0.7 + 0.33 · 0.67) / 0.03²
    assert found.one_look < found.units < 3 * found.one_look
    assert found.total == 2 * found.units
    assert found.days == pytest.approx(found.total / 1000)


def test_more_arms_need_more_units_each():
    base = Baseline.of_mean(3.0, 1.0)
    assert plan(base, 0.1, arms=4).units > plan(base, 0.1).units
    assert plan(base, 0.1).days is None
    assert plan(base, -0.1).units == plan(base, 0.1).units


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: Baseline.of_share(1.0), "the share is 1"),
        (lambda: Baseline.of_mean(1.0, 0.0), "deviation must be above 0"),
        (lambda: plan(Baseline.of_share(0.9), 0.2), "the share is 1.1"),
        (lambda: plan(Baseline.of_share(0.9), 0.0), "the effect is 0"),
        (lambda: plan(Baseline.of_mean(0.0, 1.0), 1e-9), "too small for any number of units"),
        (lambda: plan(Baseline.of_share(0.5), 0.1, arms=1), "1 arms"),
        (lambda: plan(Baseline.of_share(0.5), 0.1, power=1.0), "power is 1"),
        (lambda: plan(Baseline.of_share(0.5), 0.1, units_per_day=0), "0 units a day"),
    ],
)
def test_what_cannot_be_planned_is_said(make, what):
    with pytest.raises(UserInputError, match=what):
        make()
