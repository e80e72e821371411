"""The bound on a share, against its closed form and scipy's inverse of the incomplete beta function."""

from __future__ import annotations

import pytest
from scipy.stats import beta, binom

from maskbeam.transforms.evaluation.binomial import trials_needed, upper_bound


@pytest.mark.parametrize("trials", [1, 2, 59, 1000])
def test_of_none_seen_the_bound_has_a_closed_form(trials: int) -> None:
    assert upper_bound(0, trials, 0.95) == pytest.approx(1 - 0.05 ** (1 / trials), rel=1e-12)


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
@pytest.mark.parametrize(("count", "trials"), [(0, 3), (1, 2), (2, 100), (50, 100), (99, 100), (700, 100_000)])
def test_the_bound_is_that_of_clopper_and_pearson(count: int, trials: int, confidence: float) -> None:
    expected = beta.ppf(confidence, count + 1, trials - count)
    assert upper_bound(count, trials, confidence) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("count", "trials"), [(0, 0), (3, 3)])
def test_nothing_is_known_where_all_or_none_was_seen(count: int, trials: int) -> None:
    assert upper_bound(count, trials, 0.95) == 1


@pytest.mark.parametrize("limit", [0.001, 0.05, 0.5, 0.99])
@pytest.mark.parametrize("count", [0, 1, 7, 300])
def test_the_number_needed_is_the_least_that_is_enough(count: int, limit: float) -> None:
    needed = trials_needed(count, limit, 0.95)
    assert binom.cdf(count, needed, limit) <= 0.05
    assert needed == count + 1 or binom.cdf(count, needed - 1, limit) > 0.05
    assert upper_bound(count, needed, 0.95) <= limit
