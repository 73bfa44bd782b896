"""What paired runs can and cannot tell: intervals, effect sizes and p-values over seeds (docs/statistics.md says why).

NumPy only. Pairs have an integer number of degrees of freedom, for which Student's t has a finite closed form.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

ALPHA = 0.05
POWER = 0.8
EXACT_UP_TO = 14  # pairs, 2 ** 14 sign patterns; with more, normality matters little and the t-test serves


@dataclass(frozen=True)
class Comparison:
    """An arm against the baseline over the seeds that both completed; differences are arm - baseline.

    ``low`` and ``high`` bound the mean difference (t interval, 95 %, each arm for itself); ``effect`` is Cohen's d_z;
    ``p`` is the two-sided sign-flip test's ("sign-flip") or, with many pairs, the paired t-test's ("t"); ``p_t`` is
    always the latter; ``p_holm`` and ``p_t_holm`` are corrected for the number of arms; ``detectable`` is the
    difference that the t-test would find with a probability of 80 %, given this spread. NaN: too few pairs.
    """

    arm: str
    baseline: str
    seeds: tuple[int, ...]
    differences: tuple[float, ...]
    mean: float
    low: float
    high: float
    effect: float
    p: float
    test: str
    p_t: float
    p_holm: float
    p_t_holm: float
    detectable: float

    @property
    def clear(self) -> bool:
        """Whether the difference survives the correction for several arms, in the test that assumes least."""
        return self.p_holm < ALPHA

    @property
    def likely(self) -> bool:
        """Whether it does so only if differences between seeds are normally distributed."""
        return not self.clear and self.p_t_holm < ALPHA


def t_cdf(t: float, df: int) -> float:
    """P(T <= t) of Student's t with an integer ``df`` (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan2(t, math.sqrt(df))
    sin, cos2 = math.sin(angle), math.cos(angle) ** 2
    total, term = 0.0, 1.0
    for k in range(df // 2):
        total += term
        term *= cos2 * (2 * k + 1) / (2 * k + 2) if df % 2 == 0 else cos2 * (2 * k + 2) / (2 * k + 3)
    if df % 2 == 0:
        return 0.5 + 0.5 * sin * total
    return 0.5 + (angle + sin * math.cos(angle) * total) / math.pi


@functools.cache
def t_quantile(probability: float, df: int) -> float:
    """The t with ``t_cdf(t, df) == probability``, 0 < probability < 1."""
    if not 0 < probability < 1:
        raise ValueError(f"probability={probability}: must lie between 0 and 1")
    if probability < 0.5:
        return -t_quantile(1 - probability, df)
    return _bisect(lambda t: t_cdf(t, df) - probability)


def t_interval(values: Sequence[float], alpha: float = ALPHA) -> tuple[float, float]:
    """Bounds of the mean of ``values`` (n,) at 1 - alpha; infinite with fewer than two of them."""
    x = np.asarray(values, dtype=np.float64)
    if x.size < 2:
        return -math.inf, math.inf
    half = t_quantile(1 - alpha / 2, x.size - 1) * float(x.std(ddof=1)) / math.sqrt(x.size)
    return float(x.mean()) - half, float(x.mean()) + half


def t_test(differences: Sequence[float]) -> float:
    """Two-sided p of the paired t-test; NaN with fewer than two pairs."""
    x = np.asarray(differences, dtype=np.float64)
    if x.size < 2:
        return math.nan
    spread = float(x.std(ddof=1))
    if spread == 0:
        return 1.0 if x.mean() == 0 else 0.0
    return 2 * t_cdf(-abs(float(x.mean())) * math.sqrt(x.size) / spread, x.size - 1)


def sign_flip_test(differences: Sequence[float]) -> float:
    """Two-sided p: the share of all 2^n ways to sign the differences whose mean is as far from zero as theirs.

    Exact when a difference is as likely as its negative under the null; assumes no distribution. Never below 2^(1-n).
    """
    x = np.asarray(differences, dtype=np.float64)
    if x.size == 0:
        return math.nan
    signs = np.array(list(itertools.product((1.0, -1.0), repeat=x.size)))
    sums = np.abs(signs @ x)
    return float(np.mean(sums >= sums[0] - 1e-12 * np.abs(x).sum()))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction, in the order given; a NaN stays one and does not count as a test."""
    order = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    corrected = [math.nan] * len(p_values)
    highest = 0.0
    for rank, (p, i) in enumerate(order):
        highest = max(highest, min(1.0, p * (len(order) - rank)))
        corrected[i] = highest
    return corrected


def effect_size(differences: Sequence[float]) -> float:
    """Cohen's d_z: mean difference over the standard deviation of the differences; NaN where there is none."""
    x = np.asarray(differences, dtype=np.float64)
    if x.size < 2 or x.std(ddof=1) == 0:
        return math.nan
    return float(x.mean() / x.std(ddof=1))


def power(effect: float, n: int, alpha: float = ALPHA) -> float:
    """Probability that the two-sided paired t-test on ``n`` pairs finds a true effect size (noncentral t)."""
    df = n - 1
    critical = t_quantile(1 - alpha / 2, df)
    width = (math.sqrt(df) + 8) / 500
    s = (np.arange(500) + 0.5) * width  # sqrt of a chi-squared with df degrees of freedom
    log_density = (df - 1) * np.log(s) - s**2 / 2 - (df / 2 - 1) * math.log(2) - math.lgamma(df / 2)
    shift, edge = effect * math.sqrt(n), critical * s / math.sqrt(df)
    tails = _normal_cdf(shift - edge) + _normal_cdf(-shift - edge)
    return float(np.sum(np.exp(log_density) * tails) * width)


def detectable_difference(differences: Sequence[float], alpha: float = ALPHA, wanted: float = POWER) -> float:
    """The mean difference that the t-test on this many pairs of this spread finds with probability ``wanted``."""
    x = np.asarray(differences, dtype=np.float64)
    if x.size < 2:
        return math.nan
    return _bisect(lambda d: power(d, x.size, alpha) - wanted) * float(x.std(ddof=1))


def seeds_needed(arms: int, alpha: float = ALPHA) -> int:
    """Fewest seeds with which the sign-flip test, corrected for so many arms, can fall below ``alpha``."""
    return 1 + math.floor(math.log2(max(1, arms) / alpha)) + 1


def seeds_warning(seeds: int, arms: int) -> str | None:
    """In words, why ``seeds`` pairs are too few for ``arms`` comparisons; None when they may be enough."""
    needed = seeds_needed(arms)
    if seeds >= needed:
        return None
    arm_words = "one arm" if arms == 1 else f"{arms} arms"
    if seeds < 2:
        count = "No seed is" if seeds == 0 else "Only one seed is"
        return (
            f"{count} complete in both an arm and the baseline: the spread between seeds is unknown and nothing can "
            f"be said about differences. Run at least {needed} seeds."
        )
    smallest = 2.0 ** (1 - seeds)
    corrected = f", corrected for {arm_words} {min(1.0, arms * smallest):.3g}" if arms > 1 else ""
    return (
        f"{seeds} seeds are too few: with {seeds} pairs the smallest p that the two-sided sign-flip test can give is "
        f"{smallest:.3g}{corrected}, whatever the runs say: no difference here is significant by it. {needed} seeds or "
        f"more are needed for {arm_words}. The intervals and the t-test say more only by assuming that differences "
        "between seeds are normally distributed, which so few seeds cannot check."
    )


def compare(values: Mapping[str, Mapping[int, float]], baseline: str) -> list[Comparison]:
    """Every other arm against ``baseline``; ``values`` is arm -> seed -> value. Pairs are the seeds that both have."""
    if baseline not in values:
        raise ValueError(f"baseline={baseline!r}: is not among the arms {sorted(values)}")
    found = [_compare(values[arm], values[baseline], arm, baseline) for arm in values if arm != baseline]
    corrected, corrected_t = holm([c.p for c in found]), holm([c.p_t for c in found])
    return [replace(c, p_holm=p, p_t_holm=p_t) for c, p, p_t in zip(found, corrected, corrected_t, strict=True)]


def _compare(arm: Mapping[int, float], base: Mapping[int, float], name: str, baseline: str) -> Comparison:
    seeds = tuple(sorted(arm.keys() & base.keys()))
    differences = tuple(arm[s] - base[s] for s in seeds)
    exact = len(seeds) <= EXACT_UP_TO
    low, high = t_interval(differences)
    p_t = t_test(differences)
    return Comparison(
        arm=name,
        baseline=baseline,
        seeds=seeds,
        differences=differences,
        mean=float(np.mean(differences)) if seeds else math.nan,
        low=low,
        high=high,
        effect=effect_size(differences),
        p=(sign_flip_test(differences) if exact else p_t) if len(seeds) >= 2 else math.nan,
        test="sign-flip" if exact else "t",
        p_t=p_t,
        p_holm=math.nan,
        p_t_holm=math.nan,
        detectable=detectable_difference(differences),
    )


def _normal_cdf(x: np.ndarray) -> np.ndarray:
    return np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in x])


def _bisect(rises: Callable[[float], float]) -> float:
    """The root of an increasing function that is below zero at 0."""
    high = 1.0
    while rises(high) < 0 and high < 1e12:
        high *= 2
    low = 0.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if rises(middle) < 0 else (low, middle)
    return (low + high) / 2
