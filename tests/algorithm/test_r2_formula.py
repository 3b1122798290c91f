"""R² of a filter and the curves of Figure 1 (benchmark/r2.py, PITFALLS PF-11)."""

import numpy as np
import pytest

from benchmark.r2 import filter_r2, make_filter, reliability, reward_r2


def test_r2_by_hand():
    # PITFALLS PF-11: groups of equal count; rewards (1 1) (2 2) (3 3), scores 0, 1, 0.5: slope 0.25,
    # ŝ = 0.25, 0.5, 0.75, Σ(s - ŝ)² = 0.0625 + 0.25 + 0.0625 = 0.375, Σ(s - s̄)² = 0.5, R² = 1 - 0.75
    scores, actual = np.array([3.0, 1, 2, 3, 1, 2]), np.array([0.0, 0, 1, 1, 0, 1])
    assert reward_r2(scores, actual, num_groups=3) == pytest.approx(0.25)


@pytest.mark.parametrize("slope", [0.4, -3.0])
def test_r2_of_a_line_is_one(slope):
    # PITFALLS PF-11: rising or falling
    rewards = np.random.default_rng(0).uniform(-1, 1, 4000)
    assert reward_r2(rewards, 0.5 + slope * rewards) == pytest.approx(1)


def test_r2_of_noise_is_about_zero():
    # PITFALLS PF-11: 1/19 is expected of a line through 20 points of noise
    generator = np.random.default_rng(0)
    rewards = generator.uniform(-1, 1, 4000)
    noise = [reward_r2(rewards, generator.integers(0, 2, 4000).astype(float)) for _ in range(40)]
    assert 0 <= min(noise) and np.mean(noise) < 0.1


@pytest.mark.parametrize("rewards, actual", [("line", "ones"), ("ones", "line"), ("one", "one")])
def test_r2_of_a_constant_is_undefined(rewards, actual):
    # PITFALLS PF-11: reported as NaN, never as a number
    arrays = {"line": np.linspace(0, 1, 50), "ones": np.ones(50), "one": np.ones(1)}
    assert np.isnan(reward_r2(arrays[rewards], arrays[actual]))


def test_r2_groups_have_equal_count():
    # PITFALLS PF-11: pairs (0 1) (2 3) (4 5) (6 1000) with scores 0, 1/2, 1/2, 1; equal width would be 7
    # against 1
    rewards, actual = np.array([0.0, 1, 2, 3, 4, 5, 6, 1000]), np.array([0.0, 0, 1, 0, 0, 1, 1, 1])
    r, s = np.array([0.5, 2.5, 4.5, 503]), np.array([0, 0.5, 0.5, 1])
    assert reward_r2(rewards, actual, num_groups=4) == pytest.approx(np.corrcoef(r, s)[0, 1] ** 2)


def test_r2_of_a_filter_is_that_of_the_rows_it_keeps():
    # PITFALLS PF-11: the best of two is graded by a line, the worst by noise; BoN sees the first alone
    generator = np.random.default_rng(0)
    best, worst = generator.uniform(0.5, 1, 400), generator.uniform(-1, 0.5, 400)
    samples = {"prompt_ids": np.repeat(np.arange(400), 2), "reward": np.stack([best, worst], 1).ravel()}
    samples["actual"] = np.stack([best, generator.uniform(0, 1, 400)], 1).ravel()
    assert filter_r2(samples, make_filter(2, filter="bon")) == pytest.approx(1)
    assert filter_r2(samples, make_filter(2, filter="none")) < 0.9


def test_reliability_by_hand():
    # 8 responses whose actual score is 1 from reward 5 on; one repeat, two groups: rewards 1..4 and 5..8
    rewards = np.array([3.0, 1, 8, 6, 2, 7, 5, 4])
    expected = [{"reward": [2.5, 6.5], "actual": [0.0, 1.0], "count": [4, 4]}]
    assert reliability(rewards, (rewards > 4.5).astype(float), 2, 1, 0) == expected


def test_repeats_of_reliability_share_no_response():
    rewards = np.arange(40.0)
    repeats = reliability(rewards, rewards, 4, 10, 0)
    assert sorted(x for repeat in repeats for x in repeat["reward"]) == list(range(40)) and len(repeats) == 10
