"""Rewards, GAE, whitening, losses, averages, the KL controller, learning rates and Adam, against numbers
worked by hand."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import causal_lm, make_rollout, reward_model

import pfppo_single as pf

NAN = float("nan")


def bools(rows):
    return torch.tensor(rows, dtype=torch.bool)


# ---------------------------------------------------------------- Eq. 4 and GAE

# One response of three tokens: score 1, β = 0.1, kl = log π_θ - log π_SFT = (0.2, -0.1, 0.3), γ = 1,
# V = (0.5, 0.4, 0.3), and 0 behind the last token:
#   rewards   -0.1·0.2 = -0.02      -0.1·(-0.1) = 0.01     -0.1·0.3 + 1 = 0.97
#   δ_t       -0.02 + 0.4 - 0.5     0.01 + 0.3 - 0.4       0.97 + 0 - 0.3
#             = -0.12               = -0.09                = 0.67
#   λ = 1     -0.12 + 0.58 = 0.46   -0.09 + 0.67 = 0.58    0.67
#   λ = 0.95  -0.12 + 0.95·0.5465   -0.09 + 0.95·0.67      0.67
#             = 0.399175            = 0.5465
KL = torch.tensor([[0.2, -0.1, 0.3]])
VALUES = torch.tensor([[0.5, 0.4, 0.3]])
ADVANTAGES = {1.0: [0.46, 0.58, 0.67], 0.95: [0.399175, 0.5465, 0.67]}


@pytest.mark.parametrize("lam", [1.0, 0.95])
@pytest.mark.parametrize("padding, fill", [(0, 0.0), (4, 0.0), (4, 1e6), (1, NAN)])
def test_score_is_paid_at_the_last_token(padding, fill, lam):
    # PITFALLS GAE-1, GAE-2: same numbers padded and unpadded, whatever padded slots of rewards and values hold
    mask = bools([[1, 1, 1] + [0] * padding])
    kl, values = (F.pad(x, (0, padding), value=y) for x, y in ((KL, 0.0), (VALUES, fill)))
    rewards, non_score_reward = pf.cumulative_rewards(torch.tensor([1.0]), kl, mask, 0.1)
    found = [rewards, non_score_reward, *pf.gae(torch.where(mask, rewards, fill), values, mask, 1.0, lam)]
    expected = torch.tensor([[-0.02, 0.01, 0.97], [-0.02, 0.01, -0.03], ADVANTAGES[lam]])
    expected = F.pad(torch.cat([expected, expected[2:] + VALUES]), (0, padding))
    torch.testing.assert_close(torch.cat(found), expected, atol=1e-6, rtol=0)


def test_discount_enters_gae():
    # γ = 0.5, λ = 1, rewards (0, 1), V = (1, 2): δ = (0 + 0.5·2 - 1, 1 - 2) = (0, -1); A = (0 + 0.5·(-1), -1)
    advantages, returns = pf.gae(
        torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 2.0]]), bools([[1, 1]]), 0.5, 1.0
    )
    assert advantages.tolist() == [[-0.5, -1.0]] and returns.tolist() == [[0.5, 1.0]]


def test_rows_of_any_length_are_paid_once():
    # PITFALLS GAE-1: full rows, short rows, and nothing for a row without a token
    mask = bools([[1, 1, 1], [1, 0, 0], [0, 0, 0]])
    rewards, _ = pf.cumulative_rewards(torch.tensor([5.0, 6.0, 7.0]), torch.zeros(3, 3), mask, 0.1)
    assert rewards.tolist() == [[0, 0, 5], [6, 0, 0], [0, 0, 0]]


def test_as_many_advantages_as_response_tokens():
    # PITFALLS GAE-3
    mask = bools([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 3, 4, generator=generator)
    advantages, _ = pf.gae(rewards, values, mask, 1.0, 0.95)
    assert (advantages != 0).sum() == (pf.whiten(advantages, mask) != 0).sum() == mask.sum()


@pytest.mark.parametrize("kl_coef, falls", [(5.0, True), (-5.0, False)])
def test_kl_reward_pulls_towards_the_reference(kl_coef, falls):
    # PITFALLS GAE-4: twenty steps on a policy over five tokens and two slots; exact KL falls, with the wrong
    # sign it rises
    generator = torch.Generator().manual_seed(0)
    theta, reference = torch.randn(2, 2, 5, generator=generator)
    theta = theta.clone().requires_grad_()
    optimizer, mask = torch.optim.SGD([theta], lr=0.05), torch.ones(256, 2, dtype=torch.bool)

    def exact_kl():
        return (theta.softmax(-1) * (theta.log_softmax(-1) - reference.log_softmax(-1))).sum().item()

    before = exact_kl()
    for _ in range(20):
        tokens = torch.multinomial(theta.detach().softmax(-1), 256, replacement=True, generator=generator).T
        new_logprobs = pf.token_logprobs(theta.expand(256, 2, 5), tokens, mask, 1.0)
        ref_logprobs = pf.token_logprobs(reference.expand(256, 2, 5), tokens, mask, 1.0)
        logprobs = new_logprobs.detach()
        rewards, _ = pf.cumulative_rewards(torch.zeros(256), logprobs - ref_logprobs, mask, kl_coef)
        advantages, _ = pf.gae(rewards, torch.zeros(256, 2), mask, 1.0, 1.0)
        losses, _, _ = pf.policy_loss(new_logprobs, logprobs, pf.whiten(advantages, mask), mask, 0.2)
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
    assert exact_kl() < 0.9 * before if falls else exact_kl() > 1.1 * before


# ---------------------------------------------------------------- whitening


def test_whitening_by_hand():
    # PITFALLS AVG-3: entries 1, 2, 3 over two rows; mean 2, biased variance 2/3; the pad (1e6 or NaN) stays 0
    mask, s = bools([[1, 1], [1, 0]]), math.sqrt(1.5)
    for fill in (0.0, 1e6, NAN):
        values = torch.tensor([[1.0, 2.0], [3.0, fill]])
        torch.testing.assert_close(pf.whiten(values, mask), torch.tensor([[-s, 0.0], [s, 0.0]]))
        torch.testing.assert_close(
            pf.whiten(values, mask, shift_mean=False), torch.tensor([[2 - s, 2.0], [2 + s, 0.0]])
        )


def test_whitening_with_sums_over_ranks_by_hand():
    # PITFALLS AVG-4: one rank holds 1 and 2, the other 3 and 6: n = 4, Σ = 12, mean 3, Σ(x - 3)² = 5 + 9 =
    # 14, variance 3.5
    sums, seen = [torch.tensor([4.0, 12.0]), torch.tensor(14.0)], []

    def all_sum(x):
        seen.append(x.tolist())
        return sums[len(seen) - 1]

    found = pf.whiten(torch.tensor([[1.0, 2.0]]), bools([[1, 1]]), all_sum=all_sum)
    torch.testing.assert_close(found, torch.tensor([[-2.0, -1.0]]) / math.sqrt(3.5))
    assert seen == [[2.0, 3.0], 5.0], (
        "what this rank adds: its count and sum, then its squares around the global mean"
    )


# ---------------------------------------------------------------- losses and averages


def test_policy_loss_by_hand():
    # PITFALLS GAE-8: cliprange 0.2; the larger of the two negatives, for both signs of the advantage
    #   ratio        1.5      1.5     0.5      0.5     1.1
    #   A            2        -2      2        -2      2
    #   -A·ratio     -3       3       -1       1       -2.2
    #   -A·clipped   -2.4     2.4     -1.6     1.6     -2.2
    ratio, advantages = torch.tensor([[1.5, 1.5, 0.5, 0.5, 1.1]]), torch.tensor([[2.0, -2.0, 2.0, -2.0, 2.0]])
    losses, clipped, found = pf.policy_loss(
        ratio.log() - 3, torch.full((1, 5), -3.0), advantages, bools([[1] * 5]), 0.2
    )
    torch.testing.assert_close(losses, torch.tensor([[-2.4, 3.0, -1.0, 1.6, -2.2]]))
    torch.testing.assert_close(found, ratio)
    assert clipped.tolist() == [[True, False, False, True, False]]


def test_value_loss_by_hand():
    # PITFALLS GAE-8: old value 1, cliprange 0.2
    #   vpred 1.5, return 2: (1.5 - 2)² = 0.25, clipped (1.2 - 2)² = 0.64 -> 0.32, clipped
    #   vpred 0.5, return 2: (0.5 - 2)² = 2.25, clipped (0.8 - 2)² = 1.44 -> 1.125
    vpred, returns = torch.tensor([[1.5, 0.5]]), torch.tensor([[2.0, 2.0]])
    losses, clipped = pf.value_loss(vpred, torch.ones(1, 2), returns, bools([[1, 1]]), 0.2)
    torch.testing.assert_close(losses, torch.tensor([[0.32, 1.125]]))
    assert clipped.tolist() == [[True, False]]


def test_rounding_is_no_clipping_of_values():
    # 0.15 + (0.001 - 0.15) is not 0.001 in float32; of such pairs 2 in 100 seemed to be clipped
    values, vpred = 0.05 * torch.randn(2, 1, 999, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    returns, mask = torch.zeros(1, 999), torch.ones(1, 999).bool()
    assert not pf.value_loss(vpred, values, returns, mask, 0.2)[1].any()


@pytest.mark.parametrize("fill", [1e6, NAN])
def test_masked_slots_enter_no_loss_and_no_gradient(fill):
    # PITFALLS GAE-2
    mask = bools([[1, 0]])
    dirty = [torch.tensor([[0.3, fill]], requires_grad=True) for _ in range(4)]
    pg_losses, pg_clipped, ratio = pf.policy_loss(
        dirty[0], dirty[1].detach() - 0.1, dirty[2].detach(), mask, 0.2
    )
    vf_losses, vf_clipped = pf.value_loss(dirty[3], dirty[1].detach(), dirty[2].detach() + 1, mask, 0.2)
    found = [x[0, 1].item() for x in (pg_losses, pg_clipped, ratio, vf_losses, vf_clipped)]
    assert found == [0, False, 1, 0, False]
    (pg_losses.sum() + vf_losses.sum()).backward()
    for gradient in (dirty[0].grad, dirty[3].grad):
        assert gradient[0, 0] != 0 and gradient[0, 1] == 0


def test_the_loss_is_a_mean_over_tokens():
    # PITFALLS AVG-2: losses 4 | 1 1 1: 7/4, and not the mean over responses (4 + 1)/2
    losses, mask = torch.tensor([[4.0, 9.0, 9.0], [1.0, 1.0, 1.0]]), bools([[1, 0, 0], [1, 1, 1]])
    assert (losses * pf.loss_weights(mask)).sum().item() == pytest.approx(1.75)


SETTINGS = pf.Args(
    policy="", reward="", prompts="", temperature=0.9, cliprange=0.2, cliprange_value=0.1, vf_coef=0.5
)


def ready(model, query_lengths, response_lengths):
    """A rollout with everything that minibatch_loss reads; log-probabilities and values are a little off the
    model's own."""
    rollout = make_rollout(query_lengths, response_lengths)
    mask = rollout["response_mask"]
    rollout["logprobs"], rollout["values"] = pf.response_logprobs_and_values(model, rollout, 0.9, 4)
    noise = 0.3 * torch.randn(4, *mask.shape, generator=torch.Generator().manual_seed(0)) * mask
    rollout["logprobs"], rollout["values"] = rollout["logprobs"] + noise[0], rollout["values"] + noise[1]
    rollout["advantages"], rollout["returns"] = noise[2] * 3, noise[3] * 3
    rollout["loss_weights"] = pf.loss_weights(mask)
    return rollout


@pytest.fixture(scope="module")
def model():
    return pf.PolicyAndCritic(causal_lm("gpt2"), reward_model()).eval()


def test_logged_kl_of_an_update_is_finite_where_the_ratio_underflows():
    # log π_new = -200, log π_old = 0: the ratio is 0 in float32, 0.5 · 200² is logged all the same
    ones, zeros = torch.ones(1, 1), torch.zeros(1, 1)
    batch = {
        "response_mask": ones.bool(),
        "mask": ones.bool(),
        "query_responses": zeros.long(),
        "responses": zeros.long(),
        "loss_weights": ones,
        **dict.fromkeys(("logprobs", "advantages", "values", "returns"), zeros),
    }
    logits = torch.tensor([[[0.0, 200.0]]])
    args = dataclasses.replace(SETTINGS, temperature=1.0)
    _, stats, ratio = pf.minibatch_loss(lambda *_: (logits, zeros), batch, args)
    assert ratio.item() == 0 and stats[pf.STATS.index("ppo/policy/approxkl")].item() == 20000


def test_minibatch_loss_and_stats_equal_the_naive_formulas(model):
    # PITFALLS AVG-2: every term is a mean over the same tokens; LP-8 within the whole loss
    rollout, expected = ready(model, [2, 5, 3], [8, 1, 4]), []
    loss, stats, ratios = pf.minibatch_loss(model, pf.trim(rollout, torch.arange(3)), SETTINGS)
    for i in range(3):
        query = rollout["queries"][i][rollout["query_mask"][i]]
        n = int(rollout["response_mask"][i].sum())
        response, ids = rollout["responses"][i, :n], torch.cat([query, rollout["responses"][i, :n]])[None]
        with torch.no_grad():
            logp = (model.policy(ids).logits[0, len(query) - 1 : -1] / 0.9).log_softmax(-1)
            vpred = model.critic(ids, torch.ones_like(ids, dtype=torch.bool))[0, len(query) - 1 : -1]
        old, values, advantages, returns = (
            rollout[k][i, :n] for k in ("logprobs", "values", "advantages", "returns")
        )
        log_ratio = logp[torch.arange(n), response] - old
        ratio = log_ratio.exp()
        pg1, pg2 = -advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)
        vf1 = (vpred - returns) ** 2
        vf2 = (torch.max(torch.min(vpred, values + 0.1), values - 0.1) - returns) ** 2
        per_token = {
            "ppo/loss/policy": torch.max(pg1, pg2),
            "ppo/loss/value": torch.max(vf1, vf2) / 2,
            "ppo/policy/entropy": -(logp.exp() * logp).sum(-1),
            "ppo/policy/approxkl": log_ratio**2 / 2,
            "ppo/policy/clipfrac": (pg2 > pg1).float(),
            "ppo/policy/ratio": ratio,
            "ppo/val/clipfrac": (vf2 > vf1).float(),
            "ppo/val/vpred": vpred,
            "ppo/val/error": vf1,
        }
        expected.append(per_token)
    means = {name: torch.cat([row[name] for row in expected]).mean().item() for name in expected[0]}
    means["ppo/loss/total"] = means["ppo/loss/policy"] + 0.5 * means["ppo/loss/value"]
    assert dict(zip(pf.STATS, stats.tolist())) == pytest.approx(means, abs=2e-5)
    assert 0 < means["ppo/policy/clipfrac"] < 1 and 0 < means["ppo/val/clipfrac"] < 1, "too little is clipped"
    assert loss.item() == pytest.approx(means["ppo/loss/total"], abs=2e-5)
    assert ratios.max().item() == pytest.approx(max(row["ppo/policy/ratio"].max().item() for row in expected))


def test_gradient_does_not_depend_on_the_micro_batch_size(model):
    # PITFALLS AVG-1: unequal lengths, 1 x 8, 3 + 3 + 2 and 8 x 1
    rollout, gradients = ready(model, [2, 5, 3, 1, 7, 4, 2, 6], [8, 1, 4, 6, 2, 8, 3, 5]), []
    for size in (8, 3, 1):
        model.zero_grad()
        for part in pf.micro_batches(rollout, torch.arange(8), size):
            assert len(part) <= size
            pf.minibatch_loss(model, pf.trim(rollout, part), SETTINGS)[0].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    for gradient in gradients[1:]:
        assert (gradient - gradients[0]).norm() < 1e-5 * gradients[0].norm()


def test_loss_weights_of_two_ranks_average_to_those_of_one():
    # PITFALLS AVG-1: DDP takes the mean of the ranks' gradients; rank 0 has 5 tokens, rank 1 has 1
    mask = bools([[1, 1, 1], [1, 1, 0], [1, 0, 0]])
    for rows in (slice(0, 2), slice(2, 3)):
        part = pf.loss_weights(mask[rows], all_sum=lambda x: torch.tensor(6.0), num_processes=2)
        torch.testing.assert_close(part / 2, pf.loss_weights(mask)[rows])


def test_empty_responses_add_finite_zeros(model):
    # PITFALLS AVG-5: an empty row changes nothing beside others, and a micro-batch of empty rows has loss and
    # gradient 0
    rollout = ready(model, [2, 5, 3], [4, 0, 2])
    full = {name: x[[0, 2]] for name, x in rollout.items()}
    _, with_empty, _ = pf.minibatch_loss(model, pf.trim(rollout, torch.arange(3)), SETTINGS)
    _, without, _ = pf.minibatch_loss(model, pf.trim(full, torch.arange(2)), SETTINGS)
    torch.testing.assert_close(with_empty, without, atol=1e-6, rtol=0)
    model.zero_grad()
    loss, stats, ratio = pf.minibatch_loss(model, pf.trim(rollout, torch.tensor([1])), SETTINGS)
    loss.backward()
    assert loss == 0 and torch.equal(stats, torch.zeros(len(pf.STATS))) and (ratio == 1).all()
    assert all((p.grad == 0).all() for p in model.parameters())


def test_formulas_are_zero_where_all_is_masked():
    # PITFALLS AVG-5
    nothing, nans = torch.zeros(2, 3, dtype=torch.bool), torch.full((2, 3), NAN)
    found = [pf.loss_weights(nothing), pf.whiten(nans, nothing), *pf.gae(nans, nans, nothing, 1.0, 0.95)]
    assert all((x == 0).all() for x in found)


def test_entropy_of_uniform_and_certain_distributions():
    logits = torch.tensor([[[2.0, 2.0, 2.0, 2.0], [100.0, 0.0, 0.0, 0.0]]])
    torch.testing.assert_close(pf.token_entropy(logits, 1.0), torch.tensor([[math.log(4), 0.0]]))


def test_entropy_of_many_rows_is_that_of_each_row():
    logits = torch.randn(9, 3, 7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(
        pf.token_entropy(logits, 0.7), torch.cat([pf.token_entropy(row[None], 0.7) for row in logits])
    )


# ---------------------------------------------------------------- KL controller, learning rate, Adam


@pytest.mark.parametrize("kl, factor", [(6.6, 1 + 0.1 * 0.0512), (60.0, 1.01024), (0.0, 0.98976)])
def test_kl_controller_by_hand(kl, factor):
    # PITFALLS GAE-5: error clipped to ±0.2, times 512 episodes / horizon 10000
    assert pf.next_kl_coef(0.15, kl, 6.0, 512 / 10000) == pytest.approx(0.15 * factor)


@pytest.mark.parametrize(
    "schedule, expected",
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, 0.5 + math.sqrt(2) / 4, 0.5, 0.5 - math.sqrt(2) / 4]),
    ],
)
def test_learning_rates_by_hand(schedule, expected):
    # two steps of warm-up, then four that fall from 1 towards 0 (lm-human-preferences: lr · (1 - step /
    # num_steps))
    found = [pf.scheduled_lr(2.0, step, 6, schedule, warmup_steps=2) for step in range(6)]
    assert found == pytest.approx([2 * x for x in expected])


def test_adam_with_tensorflow_epsilon_is_tensorflow_adam():
    # PITFALLS RM-5: TensorFlow: p -= lr · sqrt(1-β2^t) / (1-β1^t) · m / (sqrt(v) + ε); ε is large enough to
    # tell the two apart
    gradients = torch.randn(6, 4, dtype=torch.double, generator=torch.Generator().manual_seed(0)) * 1e-2
    lr, beta1, beta2, eps, p, m, v = 0.1, 0.9, 0.999, 1e-3, torch.zeros(4).double(), 0, 0
    for t, g in enumerate(gradients, 1):
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        p = p - lr * math.sqrt(1 - beta2**t) / (1 - beta1**t) * m / (v.sqrt() + eps)
    found = {}
    for style in ("tensorflow", "torch"):
        parameter = torch.zeros(4, dtype=torch.double, requires_grad=True)
        optimizer = torch.optim.AdamW([parameter], lr=lr, weight_decay=0.0)
        for t, g in enumerate(gradients, 1):
            optimizer.param_groups[0]["eps"] = pf.adam_epsilon(eps, style, t)
            parameter.grad = g.clone()
            optimizer.step()
        found[style] = parameter.detach()
    torch.testing.assert_close(found["tensorflow"], p, atol=1e-12, rtol=0)
    assert (found["torch"] - p).abs().max() > 0.01
