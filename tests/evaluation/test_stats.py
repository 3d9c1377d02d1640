"""Statistics against closed forms, SciPy and simulation. Run: pytest tests/evaluation/test_stats.py"""

import math
from functools import cache

import numpy as np
import pytest
from scipy import stats as scipy_stats

from tasks.evaluation.core.stats import (
    Bootstrap,
    _reach,
    bca,
    detectable,
    holm,
    mcnemar,
    proportion,
    ratio,
    seed_weights,
    times_needed,
)

rng = np.random.default_rng(1)


def each(count):
    """Every item a cluster of its own."""
    return [str(i) for i in range(count)]


@cache
def drawn(items, draws, number):
    """Twenty sets of draws serve all simulated runs: to make one costs far more than to use it."""
    return Bootstrap(each(items), draws, 0.95, number)


def mean_of(values, clusters=None, draws=4000, seed=0):
    items = np.atleast_2d(values).shape[1]
    own = Bootstrap(clusters, draws, 0.95) if clusters else drawn(items, draws, seed % 20)
    return own.estimate(ratio, values, np.ones(items))


def test_the_interval_of_a_mean_agrees_with_its_standard_error():
    values = rng.normal(10, 2, 400)
    found, error = mean_of(values), values.std(ddof=1) / 20
    assert found.value == pytest.approx(values.mean())
    assert found.error == pytest.approx(error)
    assert found.interval == pytest.approx((values.mean() - 1.645 * error, values.mean() + 1.645 * error), abs=0.02)


def test_the_interval_of_a_ratio_agrees_with_scipys_bca_and_is_no_narrower_than_students():
    tokens = rng.integers(5, 60, 150).astype(float)
    losses = tokens * rng.gamma(2.0, 1.0, 150)
    found = Bootstrap(each(150), 20_000, 0.95).estimate(ratio, losses, tokens)
    student = scipy_stats.t.ppf(0.95, tokens.sum() ** 2 / (tokens**2).sum() - 1) * found.error
    theirs = scipy_stats.bootstrap(
        (losses, tokens), lambda a, b, axis: a.sum(axis) / b.sum(axis), paired=True, confidence_level=0.9,
        n_resamples=20_000, method="BCa", vectorized=True, rng=np.random.default_rng(2),
    ).confidence_interval  # fmt: skip
    assert found.high == pytest.approx(
        theirs.high, abs=0.01
    )  # to the right BCa reaches further, to the left Student's t
    assert found.low == pytest.approx(found.value - student)
    assert found.low < theirs.low
    mirrored = Bootstrap(each(150), 20_000, 0.95).estimate(ratio, -losses, tokens)
    assert mirrored.low == pytest.approx(-theirs.high, abs=0.01)
    assert mirrored.high == pytest.approx(-found.value + student)


def ends_of(values, confidence, draws=40_000):
    """BCa's ends for a mean."""
    drawn = np.random.default_rng(5).choice(values, (draws, len(values))).mean(axis=1)
    left_out = (values.sum() - values) / (len(values) - 1)
    return bca(values.mean(), left_out, drawn, _reach(confidence, len(values), seed_share=0.0))


def test_draws_from_few_items_vary_less_than_the_items_do_and_the_ends_make_up_for_it():
    values = scipy_stats.norm.ppf((np.arange(10) + 0.5) / 10)
    student = scipy_stats.t.ppf(0.95, 9) * values.std(ddof=1) / math.sqrt(10)
    assert ends_of(values, 0.95) == pytest.approx((-student, student), rel=0.05)


def test_an_end_beyond_the_reach_of_the_correction_is_the_outermost_draw():
    assert ends_of(np.array([0.0, 0.0, 10.0]), 0.999) == (0.0, 10.0)


def test_items_outside_of_a_slice_say_nothing_of_it():
    values, inside = rng.normal(1, 1, 1000), np.arange(1000) < 6
    found = Bootstrap(each(1000), 4000, 0.95).estimate(ratio, values * inside, inside.astype(float))
    error = values[:6].std(ddof=1) / math.sqrt(6)
    assert found.items == 6
    assert found.low <= values[:6].mean() - 0.99 * scipy_stats.t.ppf(0.95, 5) * error


def test_a_cluster_that_holds_nearly_all_items_says_as_little_as_one():
    values = rng.normal(1, 0.01, 100)
    assert mean_of(values, ["large"] * 99 + ["small"]).low < 0
    assert mean_of(values, [str(i % 20) for i in range(100)]).low > 0.9


def test_one_cluster_says_nothing():
    found = mean_of(rng.normal(1, 0.01, 50), ["same"] * 50)
    assert found.value == pytest.approx(1, abs=0.01)
    assert found.interval == (-math.inf, math.inf)


def test_one_end_of_the_interval_misses_as_often_as_it_says():
    draw, below, above = np.random.default_rng(11), 0, 0
    for seed in range(400):
        found = mean_of(draw.exponential(1.0, 60), draws=600, seed=seed)
        below += found.high < 1.0
        above += found.low > 1.0
    assert below / 400 <= 0.08
    assert above / 400 <= 0.08
    assert (below + above) / 400 >= 0.05  # and it is not wide for nothing


def test_items_that_are_not_independent_are_resampled_together():
    one = rng.normal(0, 1, 100)
    copies = np.repeat(one, 5)
    alone, together = mean_of(copies), mean_of(copies, [str(i // 5) for i in range(500)])
    assert together.error == pytest.approx(mean_of(one).error)
    assert together.error == pytest.approx(alone.error * math.sqrt(5), rel=0.02)
    assert together.items == 100


def test_pairing_removes_what_the_items_have_in_common():
    base = rng.normal(4.3, 0.5, 300)
    better = base - rng.normal(0.1, 0.05, 300)
    assert mean_of(base - better).error < mean_of(base).error / 5


def test_few_seeds_get_students_t():
    seeds = np.array([0.1, 0.2, 0.4])
    values = np.repeat(seeds[:, None], 50, axis=1)  # items add nothing
    found = mean_of(values, draws=40_000)
    error = seeds.std(ddof=1) / math.sqrt(3)
    t = scipy_stats.t.ppf(0.95, 2)
    assert found.error == pytest.approx(error)
    assert found.seed_share == pytest.approx(1.0)
    assert found.interval == pytest.approx((found.value - t * error, found.value + t * error), rel=0.05)


def test_seed_weights_have_the_mean_one_and_one_seed_has_no_spread():
    assert seed_weights(500, 3).sum(axis=1) == pytest.approx(3)
    assert (seed_weights(10, 1) == 1).all()


def test_three_seeds_miss_no_more_often_than_they_say():
    draw, missed = np.random.default_rng(7), 0
    for seed in range(300):
        seeds = draw.normal(0, 0.1, (3, 1))
        found = mean_of(draw.normal(0, 1, (1, 80)) * 0.3 + seeds + draw.normal(0, 0.05, (3, 80)), draws=500, seed=seed)
        missed += found.low > 0
    assert missed / 300 <= 0.08


def test_a_ratio_over_nothing_is_unknown_and_its_interval_is_unbounded():
    found = Bootstrap(each(40), 500, 0.95).estimate(ratio, np.ones(40), np.zeros(40))
    assert math.isnan(found.value)
    assert found.interval == (-math.inf, math.inf)


def test_a_gain_that_may_be_nothing_leaves_its_ratio_open():
    gained = rng.normal(0, 1.0, 200)
    gained += 0.03 - gained.mean()  # in a third of the draws not above zero
    found = Bootstrap(each(200), 1000, 0.95).estimate(ratio, gained + rng.normal(0, 0.1, 200), gained)
    assert found.low == -math.inf
    assert found.high == math.inf


def test_values_without_spread_have_an_interval_without_width():
    found = mean_of(np.full(30, 0.25))
    assert found.interval == (0.25, 0.25)
    assert found.error == 0


def test_wilsons_interval_agrees_with_its_formula():
    found = proportion(np.repeat([1.0, 0.0], [60, 40]), 0.95)
    z, p, n = 1.644854, 0.6, 100
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    assert found.interval == (pytest.approx(middle - half, abs=1e-5), pytest.approx(middle + half, abs=1e-5))


def test_a_share_of_items_that_hang_together_counts_their_clusters():
    right = np.repeat([1.0, 0.0], [60, 40])
    assert proportion(right, 0.95, [str(i // 2) for i in range(100)]) == proportion(right[::2], 0.95)


def test_paired_shares_agree_with_bonett_and_prices_published_example():
    # statpsych's ci.prop.ps(.05, 12, 4, 26, 6): 0.44, error 0.09448809, 0.2548067 to 0.6251933
    change = np.repeat([1.0, -1.0, 0.0], [26, 4, 18])
    found = Bootstrap(each(48), 1000, 0.975).shares(change)
    assert found.value == pytest.approx(22 / 48)
    assert found.error == pytest.approx(0.09448809)
    assert found.low == pytest.approx(0.2548067)
    assert found.high > 0.6251933  # here the bootstrap reaches further


def test_where_no_item_flips_few_items_leave_doubt_and_many_leave_little():
    few, many = (Bootstrap(each(count), 200, 0.95).shares(np.zeros(count)) for count in (12, 3000))
    assert few.high == -few.low == pytest.approx(1.644854 * math.sqrt(2) / 14, abs=1e-6)
    assert many.high < 0.001


def test_mcnemars_exact_test_agrees_with_the_binomial_sum():
    by_hand = 2 * sum(math.comb(12, k) for k in range(3)) / 2**12
    assert mcnemar(2, 10) == pytest.approx(by_hand)
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5, 5) == 1.0


def test_holms_method_gives_the_published_example():
    # Holm's rule by hand: 0.01 x 4, 0.02 x 3, 0.03 x 2 and 0.04 x 1, none below the one before.
    found = holm({"a": 0.01, "d": 0.04, "b": 0.02, "c": 0.03})
    assert found == pytest.approx({"a": 0.04, "b": 0.06, "c": 0.06, "d": 0.06})
    assert holm({}) == {}
    assert holm({"a": 0.9, "b": 0.8}) == {"b": 1.0, "a": 1.0}


def test_the_detectable_difference_is_found_as_often_as_promised():
    draw, error, found = np.random.default_rng(3), 1 / math.sqrt(200), 0
    true = detectable(error, 0.95)
    assert true == pytest.approx((1.644854 + 0.841621) * error, rel=1e-5)
    for _ in range(2000):
        found += draw.normal(true, 1, 200).mean() - 1.644854 * error > 0
    assert found / 2000 == pytest.approx(0.8, abs=0.03)


def test_the_items_needed_are_those_that_make_the_distance_detectable():
    times = times_needed(0.05, 0.1, 0.95)
    assert detectable(0.05 / math.sqrt(times), 0.95) == pytest.approx(0.1)
    assert times_needed(0.05, 0.0, 0.95) == math.inf
