"""The statistics against tables, against brute force and against what they promise under simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gecko_lab.studies import statistics as st


@pytest.mark.parametrize(
    ("df", "probability", "quantile"),
    [
        (1, 0.975, 12.7062),
        (2, 0.975, 4.30265),
        (3, 0.95, 2.35336),
        (4, 0.995, 4.60409),
        (9, 0.975, 2.26216),
        (30, 0.975, 2.04227),
    ],
)
def test_t_distribution_is_the_tabled_one(df: int, probability: float, quantile: float) -> None:
    assert st.t_quantile(probability, df) == pytest.approx(quantile, rel=2e-6)
    assert st.t_cdf(quantile, df) == pytest.approx(probability, abs=1e-6)
    assert st.t_quantile(1 - probability, df) == pytest.approx(-quantile, rel=2e-6)
    assert st.t_cdf(0.0, df) == pytest.approx(0.5)


def test_t_distribution_approaches_the_normal() -> None:
    assert st.t_quantile(0.975, 5000) == pytest.approx(1.95996, rel=1e-3)


@pytest.mark.parametrize("n", [3, 4, 8])
def test_interval_covers_as_often_as_it_says(n: int) -> None:
    rng = np.random.default_rng(n)
    runs = 4000
    covered = sum(
        low <= 0.3 <= high for low, high in (st.t_interval(rng.normal(0.3, 2.0, n).tolist()) for _ in range(runs))
    )
    assert covered / runs == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / runs))


@pytest.mark.parametrize("draw", ["normal", "heavy", "two-valued"])
def test_sign_flips_keep_the_error_rate_whatever_the_distribution(draw: str) -> None:
    rng = np.random.default_rng(5)
    make = {
        "normal": lambda: rng.normal(size=7),
        "heavy": lambda: rng.standard_cauchy(7),
        "two-valued": lambda: rng.choice([-1.0, 1.0], 7),
    }[draw]
    runs = 1000
    for alpha in (0.05, 0.2):
        rate = np.mean([st.sign_flip_test(make()) <= alpha for _ in range(runs)])
        assert rate <= alpha + 4 * math.sqrt(alpha * (1 - alpha) / runs)


def test_holm_keeps_the_family_wise_error_rate_and_still_finds_an_effect() -> None:
    rng = np.random.default_rng(1)
    runs, arms, false, found = 300, 4, 0, 0
    for _ in range(runs):
        base = rng.normal(size=9)
        p = [st.sign_flip_test(rng.normal(size=9) - base) for _ in range(arms)]
        false += min(st.holm(p)) < 0.05
        found += st.holm([st.sign_flip_test(rng.normal(3.0, 1.0, 9)), *p[1:]])[0] < 0.05
    assert false / runs <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / runs)
    assert found / runs > 0.9


def test_sign_flip_counts_patterns() -> None:
    assert st.sign_flip_test([1.0, 2.0, 3.0]) == 0.25
    assert st.sign_flip_test([1.0, 2.0, -3.0]) == 1.0
    assert st.sign_flip_test([1.0, 1.0, 1.0, -1.0]) == pytest.approx(10 / 16)
    assert st.sign_flip_test([0.1] * 10) == pytest.approx(2 / 1024)


def test_sign_flip_agrees_with_the_t_test_where_there_are_many_pairs() -> None:
    x = np.random.default_rng(0).normal(0.4, 1.0, 14)
    assert st.sign_flip_test(x) == pytest.approx(st.t_test(x), abs=0.02)


def test_t_test_is_the_interval_turned_round() -> None:
    x = np.random.default_rng(3).normal(1.0, 1.0, 6)
    p = st.t_test(x)
    low, high = st.t_interval(x, alpha=p)
    assert min(abs(low), abs(high)) == pytest.approx(0.0, abs=1e-9)


def test_holm_by_hand() -> None:
    assert st.holm([0.01, 0.04, 0.03, math.nan]) == pytest.approx([0.03, 0.06, 0.06, math.nan], nan_ok=True)
    assert st.holm([0.6, 0.7]) == [1.0, 1.0]


@pytest.mark.parametrize("n", [3, 5, 10])
def test_power_and_detectable_difference_match_simulation(n: int) -> None:
    rng = np.random.default_rng(n)
    spread = rng.normal(size=n)
    detectable = st.detectable_difference(spread.tolist())
    effect = detectable / spread.std(ddof=1)
    assert st.power(effect, n) == pytest.approx(0.8, abs=1e-6)
    runs = 1500
    hits = np.mean([st.t_test(rng.normal(effect, 1.0, n)) < 0.05 for _ in range(runs)])
    assert hits == pytest.approx(0.8, abs=4 * math.sqrt(0.8 * 0.2 / runs))
    assert st.power(0.0, n) == pytest.approx(0.05, abs=1e-4)


def test_compare_pairs_by_seed_and_corrects() -> None:
    base = {s: 2.0 + 0.1 * s for s in range(8)}
    values = {
        "base": base,
        "worse": {s: base[s] + 0.5 + 0.01 * (-1) ** s for s in range(8)},
        "same": {s: base[s] + 0.01 * (-1) ** s for s in range(6)},
        "none": {99: 1.0},
    }
    worse, same, none = st.compare(values, "base")
    assert worse.mean == pytest.approx(0.5)
    assert worse.low < 0.5 < worse.high < 0.52
    assert worse.p == pytest.approx(2 / 256)
    assert worse.p_holm == pytest.approx(2 * worse.p)
    assert worse.clear
    assert worse.effect == pytest.approx(0.5 / np.std(worse.differences, ddof=1))
    assert same.seeds == tuple(range(6))
    assert not same.clear
    assert none.seeds == ()
    assert math.isnan(none.p_holm)
    assert not none.clear
    with pytest.raises(ValueError, match="not among the arms"):
        st.compare(values, "gone")


def test_too_few_seeds_are_said_in_words() -> None:
    assert "smallest p that the two-sided sign-flip test can give is 0.25" in str(st.seeds_warning(3, 2))
    assert "corrected for 2 arms 0.5" in str(st.seeds_warning(3, 2))
    assert "nothing can be said" in str(st.seeds_warning(1, 2))
    for arms in (1, 3, 12):
        needed = st.seeds_needed(arms)
        assert st.seeds_warning(needed, arms) is None
        assert st.seeds_warning(needed - 1, arms) is not None
        assert arms * 2.0 ** (1 - needed) < st.ALPHA <= arms * 2.0 ** (2 - needed)


def test_few_or_equal_pairs_give_no_false_certainty() -> None:
    assert st.t_interval([1.0]) == (-math.inf, math.inf)
    assert math.isnan(st.t_test([1.0]))
    assert math.isnan(st.effect_size([0.5, 0.5]))
    assert st.t_test([0.0, 0.0]) == 1.0
    (one,) = st.compare({"b": {0: 1.0}, "a": {0: 2.0}}, "b")
    assert math.isnan(one.p)
    assert one.mean == 1.0
