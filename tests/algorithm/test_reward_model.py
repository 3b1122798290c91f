"""Reward model and critic of pfppo_single.py (PITFALLS RM)."""

import json

import pytest
import torch
from conftest import EOS, VOCAB_SIZE, causal_lm, make_rollout, reward_model
from safetensors.torch import load_file, save_file

import pfppo_single as pf

PAD = VOCAB_SIZE - 1


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_score_is_read_at_the_last_attended_token(name):
    # PITFALLS RM-1: EOS included when present; hidden state @ weight + bias, then gain and bias
    model = reward_model(name)
    ids, mask = pf.pad_rows([[5, 6, 7, EOS], [8, 9]], PAD, "right")
    with torch.no_grad():
        for row, tokens in enumerate(([5, 6, 7, EOS], [8, 9])):
            hidden = model.lm_backbone(torch.tensor([tokens])).last_hidden_state[0, -1]
            expected = 0.7 * (hidden @ model.scalar_head.weight[0] + model.scalar_head.bias[0]) + 0.3
            assert model.score(ids, mask)[row].item() == pytest.approx(expected.item(), abs=1e-5)


def test_scores_of_a_rollout_are_those_of_its_rows_alone():
    # PITFALLS RM-1: PPO's scoring function on padded queries and responses in micro-batches = the model on
    # the plain row
    model, rollout = reward_model(), make_rollout([3, 6, 1, 4], [2, 8, 5, 1])
    scores = pf.reward_model_scores(model, rollout, 2)
    for i in range(4):
        row = torch.cat(
            [
                rollout["queries"][i][rollout["query_mask"][i]],
                rollout["responses"][i][rollout["response_mask"][i]],
            ]
        )[None]
        with torch.no_grad():
            assert scores[i].item() == pytest.approx(
                model.score(row, torch.ones_like(row).bool()).item(), abs=1e-5
            )


def test_a_stop_token_in_the_middle_ends_what_the_reward_model_reads():
    # PITFALLS RM-1, RM-5: without masking the response runs on, the score is still read at the stop token
    model, rollout = reward_model(), make_rollout([3, 6], [8, 8])
    short = {**rollout, "score_mask": torch.arange(8) < torch.tensor([[3], [8]])}
    cut = {**rollout, "score_mask": short["score_mask"], "response_mask": short["score_mask"]}
    torch.testing.assert_close(pf.reward_model_scores(model, short, 1), pf.reward_model_scores(model, cut, 1))
    assert (pf.reward_model_scores(model, short, 1) - pf.reward_model_scores(model, rollout, 1))[
        0
    ].abs() > 1e-3


@pytest.mark.parametrize("bound", ["none", "tanh"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_saved_reward_model_gives_equal_scores(tmp_path, name, bound):
    # PITFALLS RM-2: head, head bias, gain, bias and bound are in the folder
    model, (ids, mask) = reward_model(name, bound=bound), pf.pad_rows([[5, 6, 7], [8]], PAD, "right")
    model.scalar_head.bias.data.fill_(0.4)
    model.save_pretrained(tmp_path)
    loaded = pf.RewardModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(model.score(ids, mask), loaded.score(ids, mask)) and loaded.bound == bound
        if bound == "tanh":
            torch.testing.assert_close(loaded.score(ids, mask), loaded.score(ids, mask, False).tanh())
            assert (loaded.score(ids, mask).abs() < 1).all()
    saved = load_file(tmp_path / "reward_head.safetensors")
    assert saved["scalar_head.bias"].item() == pytest.approx(0.4) and saved[
        "reward_gain"
    ].item() == pytest.approx(0.7)
    assert saved["reward_bias"].item() == pytest.approx(0.3)


def test_a_folder_without_a_head_is_refused(tmp_path):
    # PITFALLS RM-2: a head is never made up
    causal_lm("gpt2").save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="reward_head.safetensors"):
        pf.RewardModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["scalar_head.weight", "scalar_head.bias", "reward_gain", "reward_bias"])
def test_an_incomplete_head_is_refused(tmp_path, name):
    # PITFALLS RM-2
    reward_model().save_pretrained(tmp_path)
    head = load_file(tmp_path / "reward_head.safetensors")
    save_file(
        {k: v for k, v in head.items() if k != name},
        tmp_path / "reward_head.safetensors",
        metadata={"bound": "none"},
    )
    with pytest.raises(KeyError, match=name):
        pf.RewardModel.from_pretrained(tmp_path)


def test_normalisation_is_fixed_and_divides_by_the_standard_deviation(run, module):
    # PITFALLS RM-3, GAE-10: mean 3 and standard deviation 2 of the reward on π_SFT, measured once and used
    # for all later scores
    module(
        "counting_reward",
        (
            "calls = []\n"
            "def reward(prompts, responses, rows):\n"
            "    calls.append(len(responses))\n"
            "    if len(calls) == 1:\n"
            "        return [1.0, 5.0] * (len(responses) // 2)\n"  # mean 3, deviation 2 · sqrt(16 / 15)
            "    return [10.0 * len(calls) + i for i in range(len(responses))]\n"
        ),
    )
    metrics, folder = run(reward="counting_reward:reward", normalize_samples=16)
    std = 2 * (16 / 15) ** 0.5
    for step, line in enumerate(metrics, 2):
        assert line["objective/score"] == pytest.approx(10 * step + 7.5)
        assert line["objective/shaped_score"] == pytest.approx((10 * step + 7.5 - 3) / std, rel=1e-5)
    state = json.loads(next((folder / "checkpoints").glob("step_*/state.json")).read_text())
    assert state["reward_mean"] == pytest.approx(3) and state["reward_std"] == pytest.approx(
        std
    )  # PITFALLS RM-2: in the checkpoint


def spy_on_first_values(monkeypatch):
    """Records the PolicyAndCritic, the rollout and the values at the first call of
    response_logprobs_and_values with a critic."""
    seen, original = {}, pf.response_logprobs_and_values

    def spy(model, rollout, temperature, size):
        logprobs, values = original(model, rollout, temperature, size)
        if isinstance(model, pf.PolicyAndCritic) and not seen:
            seen.update(
                values=values,
                rollout=dict(rollout),
                state={k: v.clone() for k, v in model.critic.state_dict().items()},
            )
        return logprobs, values

    monkeypatch.setattr(pf, "response_logprobs_and_values", spy)
    return seen


@pytest.mark.parametrize("bound", ["reward", "reward_tanh"])
def test_critic_starts_as_the_reward_model(run, world, monkeypatch, bound):
    # PITFALLS RM-4: through main; values are what the (unbounded) reward model says of each prefix
    seen = spy_on_first_values(monkeypatch)
    run(reward=world / bound, total_episodes=16)
    reward, rollout = pf.RewardModel.from_pretrained(world / bound).eval(), seen["rollout"]
    assert all(torch.equal(seen["state"][name], value) for name, value in reward.state_dict().items())
    for i in range(3):
        query, response = (
            rollout["queries"][i][rollout["query_mask"][i]],
            rollout["responses"][i][rollout["response_mask"][i]],
        )
        for t in range(len(response)):
            prefix = torch.cat([query, response[:t]])[None]
            with torch.no_grad():
                expected = reward.score(prefix, torch.ones_like(prefix).bool(), False)
            assert seen["values"][i, t].item() == pytest.approx(expected.item(), abs=1e-5)


def test_critic_without_a_reward_model_starts_at_zero(run, monkeypatch, module, tmp_path):
    # PITFALLS RM-4: a reward function has no weights to start from; shared and separate heads start at 0
    module(
        "length_reward",
        "def reward(prompts, responses, rows):\n    return [float(len(r)) for r in responses]\n",
    )
    for critic in ("separate", "shared"):
        seen = spy_on_first_values(monkeypatch)
        run(reward="length_reward:reward", critic=critic, total_episodes=16, output_dir=tmp_path / critic)
        assert (seen["values"] == 0).all()
