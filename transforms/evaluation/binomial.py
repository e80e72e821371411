"""How much a share seen in a sample says about all: the exact one-sided bound of Clopper and Pearson (1934)."""

from __future__ import annotations

import math

import numpy as np

_BISECTIONS = 60  # halves [0, 1] to below the spacing of doubles


def upper_bound(count: int, trials: int, confidence: float) -> float:
    """The largest share of all that could well give no more than `count` of `trials`.

    With probability `confidence` or more over samples, the share of all is at most this.

    Args:
      count: times that it happened, 0 <= count <= trials.
      trials: independent draws.
      confidence: in (0, 1).

    Returns:
      in [0, 1]; 1 if nothing was drawn.

    >>> round(upper_bound(0, 59, 0.95), 5), round(1 - 0.05 ** (1 / 59), 5)
    (0.04951, 0.04951)
    """
    low, high = 0.0, 1.0
    if count >= trials:
        return high
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if _probability_at_most(count, trials, middle) > 1 - confidence:
            low = middle
        else:
            high = middle
    return high


def trials_needed(count: int, limit: float, confidence: float) -> int:
    """The least number of trials for which upper_bound(count, trials, confidence) is at most `limit`, in (0, 1).

    >>> trials_needed(0, 0.05, 0.95), trials_needed(1, 0.05, 0.95)
    (59, 93)
    """
    too_few, enough = count, count + 1
    while _probability_at_most(count, enough, limit) > 1 - confidence:
        too_few, enough = enough, 2 * enough
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        if _probability_at_most(count, middle, limit) > 1 - confidence:
            too_few = middle
        else:
            enough = middle
    return enough


def _probability_at_most(count: int, trials: int, share: float) -> float:
    """P(X <= count) of a binomial X, for count < trials and a share in (0, 1)."""
    times = np.arange(count + 1)
    # log of trials over times: each is the one before, times (trials - times + 1) / times.
    log_choose = np.concatenate([[0.0], np.cumsum(np.log(trials - times[:-1]) - np.log(times[1:]))])
    terms = log_choose + times * math.log(share) + (trials - times) * math.log1p(-share)
    return math.fsum(np.exp(terms))
