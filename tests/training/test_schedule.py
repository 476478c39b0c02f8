"""fairseq's tri-stage schedule, at its corners."""

import math

import pytest

from acoustic.training.schedule import tri_stage


@pytest.mark.parametrize(
    ("update", "expected"),
    [
        (0, 0.01),
        (50, 0.01 + 0.99 / 2),  # warmup is linear
        (100, 1.0),
        (300, 1.0),
        (500, 1.0),
        (750, math.sqrt(0.05)),  # decay is exponential
        (1000, 0.05),
        (1200, 0.05),
    ],
)
def test_corners(update, expected):
    assert tri_stage(1000)(update) == pytest.approx(expected)


@pytest.mark.parametrize("max_steps", [1, 2, 3, 7])
def test_short_runs_stay_in_bounds(max_steps):
    factors = [tri_stage(max_steps)(update) for update in range(max_steps + 1)]
    assert factors[0] == pytest.approx(0.01)
    assert all(0.01 <= factor <= 1 for factor in factors)
