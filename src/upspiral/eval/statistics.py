"""Confidence intervals for success rates and for the difference of two of them.

Score intervals throughout: unlike the textbook p ± z·sqrt(p(1-p)/n) they stay inside [0, 1], never have width zero at
0 % or 100 %, and hold their coverage at the sample sizes an evaluation has.
"""

from __future__ import annotations

from math import sqrt
from statistics import NormalDist


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """(low, high) of a success rate, as fractions. No trials: (0, 1), since nothing is known.

        (p + z²/2n ± z·sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n)

    E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927) 209-212.
    Raises ValueError for counts or a confidence that cannot be.
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"successes = {successes} must lie between 0 and trials = {trials}")
    z = _normal_quantile(confidence)
    if trials == 0:
        return 0.0, 1.0
    rate = successes / trials
    shrink = 1 + z * z / trials
    centre = (rate + z * z / (2 * trials)) / shrink
    half = z * sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials)) / shrink
    # Rounding must not push the ends past the rate where the formula is exactly 0 or 1.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == trials else centre + half
    return low, high


def difference_interval(
    first: tuple[int, int], second: tuple[int, int], confidence: float = 0.95
) -> tuple[float, float]:
    """(low, high) of rate(second) - rate(first) for two independent samples, each (successes, trials).

    Newcombe's hybrid score interval: with Wilson limits l, u of each rate and d = p2 - p1,

        d - sqrt((p2 - l2)² + (u1 - p1)²)  to  d + sqrt((u2 - p2)² + (p1 - l1)²)

    R. G. Newcombe, "Interval estimation for the difference between independent proportions", Statistics in Medicine 17
    (1998) 873-890, method 10. A sample without trials gives (-1, 1).
    """
    return _hybrid_interval(first, second, correlation=0.0, confidence=confidence)


def paired_difference_interval(
    both: int, first_only: int, second_only: int, neither: int, confidence: float = 0.95
) -> tuple[float, float]:
    """(low, high) of rate(second) - rate(first) when the same tasks were tried twice, from the four counts of tasks.

    As `difference_interval`, less 2·phi times the product of the two distances under each root, where phi is the
    correlation of the fourfold table, continuity corrected when positive. R. G. Newcombe, "Improved confidence
    intervals for the difference between binomial proportions based on paired data", Statistics in Medicine 17 (1998)
    2635-2650, method 10.
    """
    trials = both + first_only + second_only + neither
    correlation = _corrected_phi(both, first_only, second_only, neither)
    first, second = (both + first_only, trials), (both + second_only, trials)
    return _hybrid_interval(first, second, correlation=correlation, confidence=confidence)


def _hybrid_interval(
    first: tuple[int, int], second: tuple[int, int], correlation: float, confidence: float
) -> tuple[float, float]:
    low_1, high_1 = wilson_interval(*first, confidence)
    low_2, high_2 = wilson_interval(*second, confidence)
    if first[1] == 0 or second[1] == 0:
        return -1.0, 1.0
    rate_1, rate_2 = first[0] / first[1], second[0] / second[1]
    below = _joint(rate_2 - low_2, high_1 - rate_1, correlation)
    above = _joint(high_2 - rate_2, rate_1 - low_1, correlation)
    difference = rate_2 - rate_1
    return difference - below, difference + above


def _joint(a: float, b: float, correlation: float) -> float:
    # At perfect correlation rounding can leave a tiny negative number under the root.
    return sqrt(max(a * a - 2 * correlation * a * b + b * b, 0.0))


def _corrected_phi(both: int, first_only: int, second_only: int, neither: int) -> float:
    trials = both + first_only + second_only + neither
    margins = (both + first_only) * (second_only + neither) * (both + second_only) * (first_only + neither)
    if margins == 0:
        return 0.0
    determinant = float(both * neither - first_only * second_only)
    if determinant > 0:
        determinant = max(determinant - trials / 2, 0.0)
    return determinant / sqrt(margins)


def _normal_quantile(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence = {confidence} must lie strictly between 0 and 1, for example 0.95")
    return NormalDist().inv_cdf(0.5 + confidence / 2)
