"""Statistics of right and wrong answers, of one run and of two runs on the same documents."""

from __future__ import annotations

import math
from statistics import NormalDist

__all__ = [
    "difference_interval",
    "documents_needed",
    "mcnemar",
    "share_interval",
    "standard_error",
]


def _z(confidence: float) -> float:
    return NormalDist().inv_cdf((1 + confidence) / 2)


def standard_error(right: int, count: int) -> float:
    """Of the share of right answers: sqrt(p (1 - p) / n). count > 0."""
    share = right / count
    return math.sqrt(share * (1 - share) / count)


def share_interval(right: int, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """Confidence interval of a share, within 0 and 1. count > 0.

    Wilson (1927), "Probable inference, the law of succession, and statistical inference".
    """
    z, p = _z(confidence), right / count
    centre = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    # the ends are exactly 0 and 1 where rounding would leave a little
    low = 0.0 if right == 0 else max(0.0, centre - half)
    return low, 1.0 if right == count else min(1.0, centre + half)


def mcnemar(lost: int, gained: int) -> float:
    """P value, exact and two-sided, that as many answers would be lost or gained by chance.

    McNemar (1947), "Note on the sampling error of the difference between correlated proportions or
    percentages": the binomial test of half and half among the documents that changed; 1 if none.
    """
    changed = lost + gained
    tail = term = 1  # the binomial coefficients, summed up to the rarer kind
    for i in range(min(lost, gained)):
        term = term * (changed - i) // (i + 1)
        tail += term
    return min(1.0, 2 * tail / 2**changed)


def difference_interval(
    gained: int, lost: int, count: int, confidence: float = 0.95
) -> tuple[float, float]:
    """Confidence interval of the difference of two shares of the same `count` documents.

    Wald's with one half-pair added to each kind of change: Bonett and Price (2012), "Adjusted Wald
    confidence interval for a difference of binomial proportions based on paired data".
    """
    up, down, n = (gained + 1) / (count + 2), (lost + 1) / (count + 2), count + 2
    half = _z(confidence) * math.sqrt((up + down - (up - down) ** 2) / n)
    return max(-1.0, up - down - half), min(1.0, up - down + half)


def documents_needed(
    difference: float, changed: float, *, power: float = 0.8, level: float = 0.05
) -> int:
    """Documents with which McNemar's test, two-sided, finds a difference of two shares.

    `changed` is the share of documents that one run has right and the other wrong, at least the
    difference. Connor (1987), "Sample size for testing differences in proportions for the
    paired-sample design": (z_level sqrt(c) + z_power sqrt(c - d^2))^2 / d^2.
    """
    d = abs(difference)
    if not 0 < d <= changed <= 1:
        raise ValueError(f"0 < |difference| <= changed <= 1 is needed, got {difference}, {changed}")
    z_level, z_power = NormalDist().inv_cdf(1 - level / 2), NormalDist().inv_cdf(power)
    root = z_level * math.sqrt(changed) + z_power * math.sqrt(changed - d * d)
    return math.ceil((root / d) ** 2)
