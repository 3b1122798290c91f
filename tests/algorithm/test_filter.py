"""The filtered policy μ_θ (PITFALLS PF). Frequencies are tested at p = 1e-3 with fixed seeds."""

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

import pfppo_single as pf

RANK_FILTERS = ("none", "random", "bon", "br", "bw")


def draw(scores, ids, name, num_kept, how="exact", seed=0, weights=None, thresholds=(-0.3, 0.3), pow_k=1.0):
    """Selected rows as a list; scores and prompt ids as lists."""
    scores, ids = torch.tensor(scores), torch.tensor(ids)
    n = int((ids == ids[0]).sum())
    generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
    weights = weights or pf.rank_weight_vector(name, n)
    return pf.filter_responses(
        scores, ids, generator, name, weights, num_kept, how, thresholds, pow_k
    ).tolist()


def many(n, name, num_kept, how, prompts=4000, scores=None, **options):
    """One draw for many prompts of n responses whose rank is their position -> counts (prompts, n)."""
    scores = scores if scores is not None else list(np.linspace(1, -1, n)) * prompts
    ids = [i for i in range(prompts) for _ in range(n)]
    selected = draw(scores, ids, name, num_kept, how, **options)
    return np.bincount(selected, minlength=prompts * n).reshape(prompts, n)


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize("n", range(2, 17))
def test_weight_vectors_follow_n(n):
    # PITFALLS PF-3: BR = (1/2, 1/(2(N-1)), ...), BW = (1/2, 0, ..., 0, 1/2), BoN = (1, 0, ...)
    br, bw = pf.rank_weight_vector("br", n), pf.rank_weight_vector("bw", n)
    assert br[0] == 0.5 and br[1:] == pytest.approx([1 / (2 * (n - 1))] * (n - 1))
    assert bw[0] == bw[-1] == 0.5 and not any(bw[1:-1])
    assert pf.rank_weight_vector("bon", n) == [1] + [0] * (n - 1)
    assert (
        pf.rank_weight_vector("none", n) == pf.rank_weight_vector("random", n) == pytest.approx([1 / n] * n)
    )
    for name in RANK_FILTERS:
        assert len(pf.rank_weight_vector(name, n)) == n and sum(
            pf.rank_weight_vector(name, n)
        ) == pytest.approx(1)


def test_br_and_bw_are_one_filter_for_two_responses():
    # PITFALLS PF-3
    assert pf.rank_weight_vector("br", 2) == pf.rank_weight_vector("bw", 2) == [0.5, 0.5]


@pytest.mark.parametrize("name", RANK_FILTERS)
def test_one_response_has_weight_one(name):
    assert pf.rank_weight_vector(name, 1) == [1]


# ---------------------------------------------------------------- draws


@pytest.mark.parametrize(
    "name, n",
    [("random", 5), ("bon", 5), ("br", 2), ("br", 5), ("br", 16), ("bw", 2), ("bw", 7), ("none", 3)],
)
def test_sampled_draws_match_the_weights(name, n):
    # PITFALLS PF-3: num_kept independent draws from w; `none` is no draw at all
    counts = many(n, name, 2 if name != "none" else n, "sample").sum(0)
    if name == "none":
        assert counts.tolist() == [4000] * n
        return
    expected = np.array(pf.rank_weight_vector(name, n)) * 8000
    assert counts[expected == 0].sum() == 0 and counts.sum() == 8000
    if (expected > 0).sum() > 1:
        assert chisquare(counts[expected > 0], expected[expected > 0]).pvalue > 1e-3


def test_own_weights_are_sampled_whatever_filter_they_replace():
    # two draws of one prompt from (1/2, 0, 1/2) are one row twice every second time, under `none` too
    counts = many(3, "none", 2, "sample", weights=[0.5, 0.0, 0.5])
    assert counts[:, 1].sum() == 0 and 0.45 < (counts.max(1) == 2).mean() < 0.55


@pytest.mark.parametrize("n", [2, 3, 5, 7, 16])
def test_exact_br_is_the_best_and_one_random_other(n):
    # PITFALLS PF-3
    counts = many(n, "br", 2, "exact")
    assert (counts[:, 0] == 1).all() and (counts[:, 1:].sum(1) == 1).all()
    if n > 2:
        assert chisquare(counts[:, 1:].sum(0)).pvalue > 1e-3


@pytest.mark.parametrize("n", [2, 3, 5, 16])
def test_exact_bw_is_the_best_and_the_worst(n):
    # PITFALLS PF-3
    counts = many(n, "bw", 2, "exact", prompts=50)
    assert (counts[:, 0] == 1).all() and (counts[:, -1] == 1).all() and (counts.sum(1) == 2).all()


def test_exact_bw_with_one_draw_is_either_half_of_the_time():
    counts = many(5, "bw", 1, "exact")
    assert (counts.sum(1) == 1).all() and chisquare(counts.sum(0)[[0, 4]]).pvalue > 1e-3


def test_exact_random_is_a_uniform_subset():
    # PITFALLS PF-3: all ten pairs out of five
    counts = many(5, "random", 2, "exact")
    pairs = [tuple(np.flatnonzero(row)) for row in counts]
    frequencies = [pairs.count(pair) for pair in itertools.combinations(range(5), 2)]
    assert sum(frequencies) == 4000 and chisquare(frequencies).pvalue > 1e-3


def test_exact_draw_has_the_mean_of_the_weights_and_the_least_variance():
    # PITFALLS PF-3: own weights 0.1 0.2 0.3 0.4 and three rows kept: 0.3, 0.6, 0.9, 1.2 expected, so 0/1,
    # 0/1, 0/1, 1/2 times
    weights = [0.1, 0.2, 0.3, 0.4]
    counts = many(4, "own", 3, "exact", weights=weights)
    expected = 3 * np.array(weights)
    assert (counts.sum(1) == 3).all() and (
        (counts >= np.floor(expected)) & (counts <= np.ceil(expected))
    ).all()
    part = expected - np.floor(expected)
    deviation = np.sqrt(4000 * part * (1 - part))
    assert (np.abs(counts.sum(0) - 4000 * expected) < 3.5 * deviation).all()


@pytest.mark.parametrize("n", range(2, 17))
@pytest.mark.parametrize("name", ["br", "bw", "random", "bon", "none"])
def test_every_prompt_keeps_as_many_rows(name, n):
    # PITFALLS PF-1, PF-6: exact counts per prompt for every N (1 + 4 · 0.25 is 2, not 1.9999)
    for num_kept in {"none": [n], "bon": [1, 2]}.get(name, [1, 2, n]):
        assert (many(n, name, num_kept, "exact", prompts=40).sum(1) == num_kept).all()


def test_a_seed_repeats_a_draw_and_another_seed_does_not():
    scores, ids = (
        torch.randn(60, generator=torch.Generator().manual_seed(0)).tolist(),
        [i // 6 for i in range(60)],
    )
    assert (
        draw(scores, ids, "br", 2, seed=1)
        == draw(scores, ids, "br", 2, seed=1)
        != draw(scores, ids, "br", 2, seed=2)
    )


# ---------------------------------------------------------------- groups


def test_prompts_never_mix():
    # PITFALLS PF-1: every reward of prompt 1 is above every reward of prompt 0; each keeps its own best and
    # worst
    scores, ids = [0.1, 0.3, 0.2, 10.2, 10.1, 10.3], [0, 0, 0, 1, 1, 1]
    assert draw(scores, ids, "bw", 2) == [0, 1, 4, 5]
    assert draw(scores, ids, "bon", 1) == [1, 5]


def test_groups_are_known_by_prompt_id_whatever_the_order_of_rows():
    # PITFALLS PF-2: shuffled rows give the shuffled selection, for every filter
    generator = torch.Generator().manual_seed(0)
    scores, ids = 2 * torch.rand(40, generator=generator) - 1, torch.arange(40) // 5
    order = torch.randperm(40, generator=generator)
    for name, num_kept in (
        ("bon", 1),
        ("br", 2),
        ("bw", 2),
        ("random", 2),
        ("pow", 2),
        ("top", 5),
        ("top_random", 5),
        ("top_bottom", 5),
    ):
        plain = draw(scores.tolist(), ids.tolist(), name, num_kept)
        shuffled = draw(scores[order].tolist(), ids[order].tolist(), name, num_kept)
        assert sorted(order[shuffled].tolist()) == plain, name


def test_a_prompt_with_fewer_responses_is_an_error():
    # PITFALLS PF-2
    with pytest.raises(ValueError, match="same number of responses"):
        draw([0.1, 0.2, 0.3], [0, 0, 1], "br", 2, weights=[0.5, 0.5])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_reward_that_is_not_finite_is_an_error(bad):
    with pytest.raises(ValueError, match="not finite"):
        draw([0.1, bad], [0, 0], "br", 2)


# ---------------------------------------------------------------- ties, invariance


@pytest.mark.parametrize("how", ["exact", "sample"])
@pytest.mark.parametrize("name, num_kept", [("bon", 1), ("br", 2), ("bw", 2), ("random", 2), ("pow", 2)])
def test_equal_rewards_make_every_filter_uniform(name, num_kept, how):
    # PITFALLS PF-4: with 0/1 or constant rewards nothing may depend on the position of a row
    counts = many(4, name, num_kept, how, prompts=2000, scores=[0.5] * 8000)
    assert counts.sum() == 2000 * num_kept
    assert chisquare(counts.sum(0)).pvalue > 1e-3


def test_ties_at_the_top_are_broken_at_random():
    # PITFALLS PF-4: rewards 1 1 1 0: BoN takes each of the first three a third of the time, BW always the
    # last as well
    counts = many(4, "bon", 1, "exact", prompts=3000, scores=[1.0, 1.0, 1.0, 0.0] * 3000).sum(0)
    assert counts[3] == 0 and chisquare(counts[:3]).pvalue > 1e-3
    counts = many(4, "bw", 2, "exact", prompts=3000, scores=[1.0, 1.0, 1.0, 0.0] * 3000).sum(0)
    assert counts[3] == 3000 and chisquare(counts[:3]).pvalue > 1e-3


@pytest.mark.parametrize("how", ["exact", "sample"])
@pytest.mark.parametrize("name", ["bon", "br", "bw", "random", "none"])
def test_rank_filters_do_not_see_scale_and_shift(name, how):
    # PITFALLS PF-5
    scores, ids = torch.randn(40, generator=torch.Generator().manual_seed(0)), [i // 5 for i in range(40)]
    num_kept = 5 if name == "none" else 2
    assert draw(scores.tolist(), ids, name, num_kept, how) == draw(
        (7 * scores + 3).tolist(), ids, name, num_kept, how
    )


@pytest.mark.parametrize("name", ["top", "top_bottom", "top_random", "pow"])
def test_thresholds_and_pow_see_scale_and_shift(name):
    # PITFALLS PF-5
    scores, ids = torch.randn(40, generator=torch.Generator().manual_seed(0)), [i // 5 for i in range(40)]
    with pytest.warns(UserWarning, match=r"R in \[-1, 1\]"):
        far = draw((7 * scores + 3).tolist(), ids, name, 2)
    assert draw((scores / 4).tolist(), ids, name, 2) != far


@pytest.mark.parametrize(
    "name, scale, warns",
    [("top", 1.0, False), ("pow", 1.0, False), ("top", 1.01, True), ("pow", 1.01, True), ("br", 9.0, False)],
)
def test_filters_that_see_the_scale_warn_of_rewards_beyond_one(name, scale, warns, recwarn):
    # PITFALLS PF-5: pow-k and thresholds need R in [-1, 1]; rank filters do not mind
    draw([-scale, 0.0, 0.5 * scale, 0.1], [0, 0, 1, 1], name, 1)
    assert [w.category for w in recwarn] == [UserWarning] * warns


# ---------------------------------------------------------------- filters of the whole buffer


def test_thresholds():
    # PPO-top, -top-bottom, -top-random: above 0.5; or below -0.5; others with probability 1/2
    scores, ids = [0.9, 0.1, -0.9, 0.5, 0.6, -0.5], [0, 0, 0, 1, 1, 1]
    options = dict(thresholds=(-0.5, 0.5))  # what lies on a threshold is not beyond it
    assert draw(scores, ids, "top", 3, **options) == [0, 4]
    assert draw(scores, ids, "top_bottom", 3, **options) == [0, 2, 4]
    counts = np.stack(
        [np.bincount(draw(scores, ids, "top_random", 3, seed=s, **options), minlength=6) for s in range(600)]
    )
    assert (counts[:, [0, 4]] == 1).all() and counts.max() == 1
    assert (np.abs(counts[:, [1, 2, 3, 5]].sum(0) - 300) < 3.5 * np.sqrt(600 / 4)).all()


@pytest.mark.parametrize("pow_k", [1, 2, 3])
@pytest.mark.parametrize("how", ["exact", "sample"])
def test_pow_draws_from_the_buffer_by_absolute_reward(pow_k, how):
    # weights ∝ |R|^k over all rows of the buffer, num_kept per prompt on average
    rewards = np.array(
        [0.9, -0.6, 0.3, -0.8, 0.4, 0.5]
    )  # 40 prompts of 3 rows, 20 rows of each reward, 40 rows kept, 100 draws
    expected = np.abs(rewards) ** pow_k / (np.abs(rewards) ** pow_k).sum()
    generator, ids = torch.Generator().manual_seed(0), [i // 3 for i in range(120)]
    draws = [draw(list(rewards) * 20, ids, "pow", 1, how, generator, pow_k=float(pow_k)) for _ in range(100)]
    assert {len(d) for d in draws} == {40}
    counts = np.bincount(np.concatenate(draws) % 6, minlength=6)
    if how == "sample":
        assert chisquare(counts, expected * 4000).pvalue > 1e-3
    else:  # each row is kept 0 or 1 times
        assert max(np.bincount(d).max() for d in draws) == 1
        assert (np.abs(counts - 4000 * expected) < 3.5 * np.sqrt(4000 * expected * (1 - 2 * expected))).all()


def test_pow_with_all_rewards_zero_is_uniform():
    counts = sum(
        np.bincount(draw([0.0] * 4, [0, 0, 1, 1], "pow", 1, seed=s), minlength=4) for s in range(800)
    )
    assert chisquare(counts).pvalue > 1e-3
