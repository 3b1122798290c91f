"""Whole runs of pfppo_single.py on the tiny world: what moves, what is logged, what a kill leaves, what is
refused."""

import dataclasses
import importlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import DistributedType
from accelerate.state import AcceleratorState
from conftest import EOS, causal_lm, make_tokenizer, model_config, read_metrics, tiny_settings, write_jsonl
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention, GPT2LMHeadModel

import pfppo_single as pf
import rm_single
import sft_single
from benchmark.baselines import common

ROOT = Path(__file__).resolve().parents[2]


class Spies:
    """Wraps functions of pfppo_single for one run and keeps what went in and came out."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.patch, self.calls = patch, {}

    def on(self, owner, name, record):
        """record(result, *args, **kwargs) is appended to calls[name], or calls["Class.name"] for a method."""
        key = f"{owner.__name__}.{name}" if isinstance(owner, type) else name
        original, calls = getattr(owner, name), self.calls.setdefault(key, [])

        def spy(*args, **kwargs):
            result = original(*args, **kwargs)
            calls.append(record(result, *args, **kwargs))
            return result

        self.patch.setattr(owner, name, spy)
        return calls


def weights(folder):
    """Weights in a saved folder or checkpoint, by name."""
    return load_file(Path(folder) / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def timeless(metrics):
    """Metrics without the wall-clock times."""
    return [{tag: value for tag, value in line.items() if not tag.startswith("seconds/")} for line in metrics]


# ---------------------------------------------------------------- one run, looked at from many sides


@pytest.fixture(scope="module")
def recorded(world, tmp_path_factory):
    """Two updates of BR at temperature 0.6 with everything that passes through main's functions."""
    folder = tmp_path_factory.mktemp("recorded")
    (folder / "watch.py").write_text(
        "def actual(prompts, responses, rows):\n    return [float(len(r) % 2) for r in responses]\n"
        "def monitor(responses):\n    return {'with_e': sum('e' in r for r in responses) / len(responses)}\n"
    )
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(folder)
    spies = Spies(patch)
    spies.on(pf, "reward_model_scores", lambda out, model, rollout, *_: (out.clone(), dict(rollout), model))
    spies.on(pf, "filter_responses", lambda out, scores, ids, *_: (out.clone(), scores.clone(), ids.clone()))
    spies.on(pf, "response_logprobs_and_values", lambda out, model, rollout, *_: (out, dict(rollout), model))
    spies.on(pf, "cumulative_rewards", lambda out, *_: out)
    spies.on(pf, "whiten", lambda out, values, *_, **__: len(values))
    spies.on(pf, "minibatch_loss", lambda out, model, batch, *_: {k: v.clone() for k, v in batch.items()})
    spies.on(
        GPT2LMHeadModel,
        "forward",
        lambda out, *_, **kw: (len(kw["input_ids"]), kw["use_cache"], torch.is_grad_enabled()),
    )
    spies.on(pf.RewardModel, "forward", lambda out, model, ids, mask: (len(ids), torch.is_grad_enabled()))
    args = pf.Args(
        **{
            **tiny_settings(world, folder / "run"),
            "eval_prompts": str(world / "eval.jsonl"),
            "temperature": 0.6,
            "adaptive_kl": True,
            "kl_target": 1e-4,
            "kl_horizon": 64,
            "actual_score": "watch:actual",
            "monitor": "watch:monitor",
            "normalize_reward": False,
            "eval_every": 100,
        }
    )
    pf.main(args)
    patch.undo()
    return {
        "args": args,
        "folder": folder / "run",
        "metrics": read_metrics(folder / "run"),
        "world": world,
        **spies.calls,
    }


def trained_pair(recorded):
    """The PolicyAndCritic of the run, as it ended."""
    return next(
        call[2]
        for call in recorded["response_logprobs_and_values"]
        if isinstance(call[2], pf.PolicyAndCritic)
    )


def test_policy_moves_and_frozen_models_do_not(recorded):
    start = causal_lm("gpt2").state_dict()
    trained = AutoModelForCausalLM.from_pretrained(recorded["folder"] / "policy").state_dict()
    assert all(not torch.equal(trained[name], start[name]) for name in start if "attn.bias" not in name)
    models, pair = [call[2] for call in recorded["response_logprobs_and_values"]], trained_pair(recorded)
    reference = next(model for model in models if model is not pair and model is not pair.policy)
    assert same(reference.state_dict(), start) and not same(pair.policy.state_dict(), start)
    reward = recorded["reward_model_scores"][0][2]
    assert same(
        reward.state_dict(), pf.RewardModel.from_pretrained(recorded["world"] / "reward").state_dict()
    )


def test_critic_moves(recorded):
    critic = trained_pair(recorded).critic.state_dict()
    start = pf.RewardModel.from_pretrained(recorded["world"] / "reward").state_dict()
    assert all(not torch.equal(critic[name], start[name]) for name in start)


def test_first_ratio_is_one_and_first_kl_is_zero(recorded):
    # PITFALLS LP-3, LP-5: at temperature 0.6; mean and largest ratio of each update's first minibatch
    for line in recorded["metrics"][1:]:
        assert line["ppo/policy/first_ratio"] == pytest.approx(1, abs=1e-5)
        assert line["ppo/policy/first_ratio_max"] == pytest.approx(1, abs=1e-5)
        assert line["ppo/policy/ratio"] != pytest.approx(1, abs=1e-5), "later minibatches have moved"
    assert recorded["metrics"][1]["objective/kl"] == 0 != recorded["metrics"][2]["objective/kl"]


def test_forward_rows_are_the_kept_rows(recorded):
    # PITFALLS PF-7: 16 sampled, 8 kept, 2 epochs, 2 updates; forwards outside sampling
    kept, epochs, updates, evaluations = 8, 2, 2, 2
    language_model = [call for call in recorded["GPT2LMHeadModel.forward"] if not call[1]]
    assert sum(n for n, _, grad in language_model if grad) == kept * epochs * updates
    assert (
        sum(n for n, _, grad in language_model if not grad) == 2 * kept * updates + 2 * 11 * evaluations
    )  # policy and reference
    critic_and_reward = recorded["RewardModel.forward"]
    assert sum(n for n, grad in critic_and_reward if grad) == kept * epochs * updates
    # without gradient: 16 rewards and 8 values per update, 2 x 11 rewards per evaluation
    assert sum(n for n, grad in critic_and_reward if not grad) == (16 + kept) * updates + 2 * 11 * evaluations


def rollouts(recorded):
    """Per update: (selected, raw scores, prompt ids, rollout of all responses)."""
    sampled = [
        (scores, rollout) for scores, rollout, _ in recorded["reward_model_scores"] if len(scores) == 16
    ]
    return [(*call, rollout) for call, (_, rollout) in zip(recorded["filter_responses"], sampled)]


def test_ranking_uses_the_score_of_the_reward_model(recorded):
    # PITFALLS PF-5: before KL, penalty and normalisation; BR keeps each prompt's best response
    for (selected, scores, ids, _), (raw, *_) in zip(
        rollouts(recorded), [c for c in recorded["reward_model_scores"] if len(c[0]) == 16]
    ):
        assert torch.equal(scores, raw)
        for prompt in ids.unique():
            rows = (ids == prompt).nonzero().flatten()
            assert (
                rows[scores[rows].argmax()] in selected
                and len(set(rows.tolist()) & set(selected.tolist())) == 2
            )


def test_every_kept_response_is_trained_on_m_times(recorded):
    # PITFALLS PF-6: rows are recognised by their score
    batches = recorded["minibatch_loss"]
    for update, (selected, scores, _, _) in enumerate(rollouts(recorded)):
        trained = torch.cat(
            [
                batch["scores"]
                for batch in batches[len(batches) // 2 * update : len(batches) // 2 * (update + 1)]
            ]
        )
        assert sorted(trained.tolist()) == sorted(scores[selected].repeat(2).tolist())


def test_every_tensor_of_a_row_is_filtered_together(recorded):
    # PITFALLS PF-8: what reaches the loss belongs to one response: ids, masks, prompt id, log-probabilities
    # and values
    batches, start = (
        recorded["minibatch_loss"],
        pf.PolicyAndCritic(causal_lm("gpt2"), pf.RewardModel.from_pretrained(recorded["world"] / "reward")),
    )
    selected, scores, ids, rollout = rollouts(recorded)[0]
    for batch in batches[: len(batches) // 2]:
        for row in range(len(batch["scores"])):
            i = int((scores == batch["scores"][row]).nonzero())
            assert i in selected and batch["prompt_ids"][row] == ids[i]
            for name, mask in (("queries", "query_mask"), ("responses", "response_mask")):
                assert torch.equal(batch[name][row][batch[mask][row]], rollout[name][i][rollout[mask][i]])
            logprobs, values = pf.response_logprobs_and_values(
                start.eval(), {k: v[i : i + 1] for k, v in rollout.items()}, 0.6, 1
            )
            for name, alone in (("logprobs", logprobs), ("values", values)):
                mask = batch["response_mask"][row]
                torch.testing.assert_close(
                    batch[name][row][mask], alone[0][rollout["response_mask"][i]], atol=1e-5, rtol=0
                )


def test_whitening_comes_after_the_filter(recorded):
    # PITFALLS PF-8: advantages are whitened over the kept rows, once per update
    assert recorded["whiten"] == [8, 8]


def test_both_reward_curves_are_logged(recorded):
    # PITFALLS PF-9: objective/score over all of π_θ's samples, filter/score over those of μ_θ
    for line, (selected, scores, _, _) in zip(recorded["metrics"][1:], rollouts(recorded)):
        assert line["objective/score"] == pytest.approx(scores.mean().item(), rel=1e-5)
        assert line["filter/score"] == pytest.approx(scores[selected].mean().item(), rel=1e-5)
        assert line["filter/score"] > line["objective/score"]
        assert line["filter/kept"] == 8 and line["filter/distinct"] == 8


def test_logged_kl_is_the_kl_in_the_reward_summed_over_tokens(recorded):
    # PITFALLS GAE-5, GAE-6, GAE-10
    for line, (rewards, non_score_reward, kl) in zip(recorded["metrics"][1:], recorded["cumulative_rewards"]):
        assert line["objective/kl"] == pytest.approx(kl.sum(1).mean().item(), rel=1e-5)
        assert line["objective/non_score_reward"] == pytest.approx(
            -line["objective/kl_coef"] * line["objective/kl"], rel=1e-5
        )
        assert line["objective/score_total"] == pytest.approx(
            line["filter/score"] + line["objective/non_score_reward"], rel=1e-5
        )
        assert line["objective/score_total"] == pytest.approx(rewards.sum(1).mean().item(), rel=1e-5)


def test_kl_controller_receives_the_logged_kl(recorded):
    # PITFALLS GAE-5: update 1 has KL 0, which lowers β by the most that is allowed: 0.2 · 16 / 64
    first, second = recorded["metrics"][1:]
    assert first["objective/kl_coef"] == 0.01
    assert second["objective/kl_coef"] == pytest.approx(0.01 * (1 - 0.2 * 16 / 64))


def test_lengths_and_truncation_are_logged_over_all_samples(recorded):
    # PITFALLS TOK-4, TOK-6
    for line, (*_, rollout) in zip(recorded["metrics"][1:], rollouts(recorded)):
        assert line["objective/length"] == pytest.approx(
            rollout["response_mask"].sum(1).float().mean().item()
        )
        assert line["objective/truncated"] == pytest.approx(1 - rollout["has_stop"].float().mean().item())
        assert 0 < line["objective/truncated"] < 1


def test_masks_stay_bool_through_the_run(recorded):
    # PITFALLS TOK-9
    for batch in recorded["minibatch_loss"]:
        assert {
            batch[name].dtype for name in ("mask", "query_mask", "response_mask", "score_mask", "has_stop")
        } == {torch.bool}


def test_rollouts_use_the_cache_and_the_loss_does_not(recorded):
    # PITFALLS SYS-7
    calls = recorded["GPT2LMHeadModel.forward"]
    assert any(use_cache and not grad for _, use_cache, grad in calls) and not any(
        use_cache and grad for _, use_cache, grad in calls
    )


def test_evaluation_and_monitor_are_logged(recorded):
    first, _, last = recorded["metrics"]
    for line in (first, last):
        assert 0 <= line["eval/greedy_pass1"] <= 1 and 0 <= line["eval/sampled_pass1"] <= 1
        assert {
            "eval/greedy_reward",
            "eval/sampled_reward",
            "eval/kl",
            "eval/greedy_length",
            "eval/sampled_truncated",
        } <= line.keys()
    assert first["eval/kl"] == 0 and last["eval/kl"] != 0
    assert (
        0 <= recorded["metrics"][1]["monitor/with_e"] <= 1
        and "eval/greedy_pass1" not in recorded["metrics"][1]
    )


def test_tensorboard_holds_what_metrics_jsonl_holds(recorded):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(recorded["folder"] / "tensorboard"))
    events.Reload()
    for tag in ("objective/score", "filter/score", "ppo/policy/first_ratio", "eval/greedy_pass1"):
        expected = [(line["step"], line[tag]) for line in recorded["metrics"] if tag in line]
        assert [(e.step, pytest.approx(e.value, rel=1e-5)) for e in events.Scalars(tag)] == expected


def test_policy_folder_holds_the_policy_alone(recorded):
    # PITFALLS SYS-8: equal logits after loading, tied weights included, and the tokenizer beside it
    folder = recorded["folder"] / "policy"
    trained, ids = trained_pair(recorded).policy.eval(), torch.arange(12).view(1, 12)
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(folder)(ids).logits, trained(ids).logits)
    assert not [name for name in weights(folder) if "critic" in name or "scalar_head" in name]
    assert AutoTokenizer.from_pretrained(folder)("a 1").input_ids == make_tokenizer()("a 1").input_ids
    assert (recorded["folder"] / "policy_best" / "model.safetensors").is_file()


# ---------------------------------------------------------------- settings


def test_untied_policy_loads_again(run, world, monkeypatch):
    # PITFALLS SYS-8: Llama, untied output; LP-3 and LP-5 for rotary positions
    seen = Spies(monkeypatch).on(pf, "response_logprobs_and_values", lambda out, model, *_: model)
    metrics, folder = run(policy=world / "llama", total_episodes=16)
    ids, loaded = torch.arange(12).view(1, 12), AutoModelForCausalLM.from_pretrained(folder / "policy")
    with torch.no_grad():
        assert torch.equal(
            loaded(ids).logits,
            next(m for m in seen if isinstance(m, pf.PolicyAndCritic)).policy.eval()(ids).logits,
        )
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)
    assert metrics[0]["ppo/policy/first_ratio_max"] == pytest.approx(1, abs=1e-5)


def test_generation_batch_size_says_how_many_responses_are_generated_at_a_time(run, monkeypatch):
    sizes = Spies(monkeypatch).on(pf, "generate", lambda out, *_: len(out))
    run(generation_batch_size=4, total_episodes=16, normalize_samples=8)
    assert sizes and set(sizes) == {4}


@pytest.mark.parametrize("micro_batch_size", [1, 3, 8])
def test_learning_rate_zero_keeps_every_ratio_at_one(run, monkeypatch, micro_batch_size):
    # PITFALLS LP-5: every minibatch, micro-batch size and epoch
    ratios = Spies(monkeypatch).on(pf, "policy_loss", lambda out, *_: out[2])
    metrics, _ = run(
        lr=0.0,
        critic_lr=0.0,
        micro_batch_size=micro_batch_size,
        minibatch_size=8,
        filter="random",
        total_episodes=16,
    )
    assert len(ratios) == 2 * -(-8 // micro_batch_size)
    assert max((ratio - 1).abs().max().item() for ratio in ratios) < 1e-5
    assert metrics[0]["ppo/policy/clipfrac"] == 0 and metrics[0]["ppo/policy/approxkl"] < 1e-10


def test_one_small_step_changes_nearly_every_weight(run, monkeypatch):
    # PITFALLS SYS-1: float32 weights at the paper's 5e-7 and 9e-6; with bfloat16 most would stay
    counts = []

    def before(optimizer, *_):
        counts.append(
            [
                (p, p.detach().clone(), p.grad != 0)
                for group in optimizer.param_groups
                for p in group["params"]
            ]
        )

    def after(optimizer, *_):
        counts[-1] = (
            [((p != old) & moved).sum().item() for p, old, moved in counts[-1]],
            [moved.sum().item() for *_, moved in counts[-1]],
        )

    handles = register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)
    run(total_episodes=16, noptepochs=1, minibatch_size=8, lr=5e-7, critic_lr=9e-6)
    [handle.remove() for handle in handles]
    (changed, with_gradient), *more = counts
    assert not more and sum(changed) > 0.9 * sum(with_gradient) > 10000


def test_a_whole_run_under_bfloat16_autocast(run, monkeypatch):
    # PITFALLS SYS-1, LP-7: as `accelerate launch --mixed_precision bf16` sets it; products in bfloat16,
    # weights and results in float32
    seen = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(
        torch.nn.functional, "linear", lambda *args: seen.append((out := linear(*args)).dtype) or out
    )
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        metrics, folder = run(total_episodes=16, noptepochs=1, lr=1e-3)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert torch.bfloat16 in seen
    assert all(np.isfinite(value) for line in metrics for value in line.values())
    assert metrics[0]["ppo/policy/first_ratio_max"] == pytest.approx(
        1, abs=0.02
    )  # two passes differ by bfloat16's rounding alone
    after = weights(folder / "policy")
    assert {w.dtype for w in after.values()} == {torch.float32} and any(
        (w != w.bfloat16().float()).any() for w in after.values()
    )


def test_filter_none_is_ppo_m_bit_for_bit(run, monkeypatch, tmp_path):
    # PITFALLS PF-10: the run with the filter taken away gives the same weights and metrics, and so do equal
    # own weights
    settings = dict(num_responses=4, total_episodes=32, minibatch_size=8)
    filtered, folder = run(filter="none", output_dir=tmp_path / "none", **settings)
    own, own_folder = run(rank_weights=(0.25,) * 4, num_kept=4, output_dir=tmp_path / "own", **settings)
    monkeypatch.setattr(pf, "filter_responses", lambda scores, *_: torch.arange(len(scores)))
    plain, plain_folder = run(filter="none", output_dir=tmp_path / "plain", **settings)
    assert timeless(filtered) == timeless(plain) == timeless(own)
    assert same(weights(folder / "policy"), weights(plain_folder / "policy")) and same(
        weights(own_folder / "policy"), weights(folder / "policy")
    )


def test_one_response_is_ppo_s_bit_for_bit(run, monkeypatch, tmp_path):
    # PITFALLS PF-10
    settings = dict(num_responses=1, filter="none", batch_size=8, total_episodes=16, minibatch_size=8)
    filtered, folder = run(output_dir=tmp_path / "none", **settings)
    monkeypatch.setattr(pf, "filter_responses", lambda scores, *_: torch.arange(len(scores)))
    plain, plain_folder = run(output_dir=tmp_path / "plain", **settings)
    assert timeless(filtered) == timeless(plain) and filtered[0]["filter/kept"] == 8
    assert same(weights(folder / "policy"), weights(plain_folder / "policy"))


def test_gradient_checkpointing_changes_no_weight(run, tmp_path):
    # PITFALLS SYS-7: same gradients; blocks run again in the backward pass of the loss, and never in rollouts
    found = []
    for on in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            original, blocks = GPT2Attention.forward, []  # one per block
            patch.setattr(
                GPT2Attention,
                "forward",
                lambda *args, **kwargs: (blocks.append(1), original(*args, **kwargs))[1],
            )
            metrics, folder = run(gradient_checkpointing=on, total_episodes=16, output_dir=tmp_path / str(on))
            found.append((weights(folder / "policy"), len(blocks), len(metrics)))
    for name, value in found[0][0].items():
        torch.testing.assert_close(found[1][0][name], value, atol=1e-6, rtol=0)
    # 2 epochs x 2 minibatches x 2 micro-batches, 2 blocks in the policy and 2 in the critic, once more each
    assert found[1][1] - found[0][1] == 2 * 2 * 2 * (2 + 2)


def test_pad_equal_to_eos_changes_no_number_of_a_run(run, world, tmp_path):
    # PITFALLS TOK-2, TOK-7: chat prompts, which contain EOS
    chats = [
        {"prompt": [{"role": "user", "content": c}, {"role": "assistant", "content": "ok"}]}
        for c in ("add", "one two", "x", "max 3")
    ]
    prompts, found = write_jsonl(tmp_path / "chats.jsonl", chats), []
    for pad in ("<pad>", "<eos>"):
        shutil.copytree(world / "gpt2", tmp_path / pad)
        make_tokenizer(pad=pad).save_pretrained(tmp_path / pad)
        found.append(
            run(policy=tmp_path / pad, prompts=prompts, total_episodes=16, output_dir=tmp_path / f"run{pad}")
        )
    assert timeless(found[0][0]) == timeless(found[1][0]) and found[0][0][0]["objective/truncated"] < 1
    assert same(weights(found[0][1] / "policy"), weights(found[1][1] / "policy"))


def test_equal_prompts_stay_two_groups(run, tmp_path, monkeypatch):
    # PITFALLS PF-2: exactly N rows per prompt id, though all texts are the same
    calls = Spies(monkeypatch).on(pf, "filter_responses", lambda out, scores, ids, *_: ids)
    run(prompts=write_jsonl(tmp_path / "same.jsonl", [{"prompt": "add"}] * 4), total_episodes=16)
    assert calls[0].unique(return_counts=True)[1].tolist() == [4, 4, 4, 4]


def test_lm_human_preferences_is_a_preset_of_the_same_path(world, tmp_path, monkeypatch):
    # PITFALLS RM-5: fixed last slot, no mask behind the stop token, replacement by -1, per-rank whitening,
    # TensorFlow's epsilon
    flags = dict(
        tiny_settings(world, tmp_path / "run"),
        filter="none",
        num_responses=1,
        batch_size=16,
        total_episodes=32,
        minibatch_size=16,
        stop_token="<eos>",
        stop_after=2,
        response_length=12,
        kl_coef=0.15,
        micro_batch_size=16,
    )
    flags = {k: v for k, v in flags.items() if k not in ("normalize_samples",)}
    args = pf.parse_args(
        ["--preset", "lm_human_preferences", *[x for k, v in flags.items() for x in (f"--{k}", str(v))]]
    )
    assert (
        args.critic == "shared"
        and not args.mask_after_stop
        and not args.normalize_reward
        and args.adam_style == "tensorflow"
    )
    spies = Spies(monkeypatch)
    rewards = spies.on(
        pf,
        "cumulative_rewards",
        lambda out, scores, logprobs, ref, mask, coef: (out[0].clone(), out[1], scores, mask),
    )
    rollouts = spies.on(pf, "reward_model_scores", lambda out, model, rollout, *_: (out, dict(rollout)))
    epsilons = spies.on(pf, "adam_epsilon", lambda out, *_: out)
    pf.main(args)
    metrics = read_metrics(tmp_path / "run")
    for (paid, non_score, scores, mask), (raw, rollout) in zip(rewards, rollouts):
        assert mask.all() and rollout["response_mask"].all() and 0 < rollout["has_stop"].sum() < 16
        assert torch.equal(scores, torch.where(rollout["has_stop"], raw, -1.0))
        assert torch.equal(paid[:, :-1], non_score[:, :-1]) and torch.allclose(
            paid[:, -1], non_score[:, -1] + scores
        )
        first_stop = (rollout["responses"] == EOS) & (torch.arange(12) >= 2)
        assert torch.equal(
            rollout["score_mask"].sum(1), torch.where(first_stop.any(1), first_stop.int().argmax(1) + 1, 12)
        )
    assert epsilons[0] == pytest.approx(1e-5 / (1 - 0.999) ** 0.5) and len(epsilons) > 2
    assert [line["ppo/lr"] for line in metrics] == pytest.approx([1e-3, 0.5e-3])  # linear to zero
    assert metrics[0]["objective/length"] == 12


def test_a_run_repeats_for_its_seed_and_seeds_every_generator(run, module, tmp_path):
    # PITFALLS LP-10: Python, NumPy and torch are seeded: a reward that draws from all three repeats
    module(
        "noisy_reward",
        (
            "import random, numpy, torch\n"
            "def reward(prompts, responses, rows):\n"
            "    return [random.random() + numpy.random.rand() + torch.rand(()).item() for _ in responses]\n"
        ),
    )
    found = [
        run(reward="noisy_reward:reward", total_episodes=16, seed=seed, output_dir=tmp_path / f"{i}")
        for i, seed in enumerate((1, 1, 2))
    ]
    assert timeless(found[0][0]) == timeless(found[1][0])
    assert found[0][0][0]["objective/score"] != found[2][0][0]["objective/score"]


def test_thresholds_may_keep_nothing(run):
    # PITFALLS AVG-5: an update without a kept row trains nothing, logs finite numbers and the run goes on;
    # there is no KL of 0 that a log or the controller could take for one that was measured
    metrics, folder = run(filter="top", threshold_high=1e9, adaptive_kl=True, kl_horizon=64)
    assert [line["filter/kept"] for line in metrics] == [0, 0]
    assert [line["objective/kl_coef"] for line in metrics] == [0.01, 0.01]
    assert not {"objective/kl", "objective/score_total", "filter/score", "ppo/returns/mean"} & set().union(
        *metrics
    )
    assert all(np.isfinite(value) for line in metrics for value in line.values())
    start = causal_lm("gpt2").state_dict()
    assert all(torch.equal(value, start[name]) for name, value in weights(folder / "policy").items())


@pytest.mark.parametrize(
    "changes, kept",
    [
        (dict(filter="bon"), 4),
        (dict(filter="bw", draw="sample", num_kept=3, minibatch_size=6), 12),
        (dict(filter="pow", pow_k=2.0), 8),
        (dict(rank_weights=(0.5, 0.0, 0.0, 0.5)), 8),
        (dict(filter="top_bottom", threshold_high=0.5, threshold_low=0.4), None),
        (dict(filter="top_random", threshold_high=0.5), None),
    ],
)
def test_every_filter_runs(run, changes, kept):
    metrics, _ = run(total_episodes=16, noptepochs=1, **changes)
    assert metrics[0]["filter/kept"] == kept if kept else 0 < metrics[0]["filter/kept"] < 16
    assert metrics[0]["ppo/policy/first_ratio_max"] == pytest.approx(1, abs=1e-5)


def test_filter_auto_takes_the_highest_r2_and_says_so(run, module, capsys):
    # PITFALLS PF-11, AVG-6: the R² of each candidate is printed with the choice
    module(
        "true_score", "def actual(prompts, responses, rows):\n    return [float(len(r)) for r in responses]\n"
    )
    _, folder = run(filter="auto", actual_score="true_score:actual", total_episodes=16, normalize_samples=64)
    printed = capsys.readouterr().out
    line = next(x for x in printed.splitlines() if x.startswith("filter auto: "))
    r2 = {
        word[0]: float(word[1])
        for word in (pair.split() for pair in line[line.index("(") + 1 : line.index(")")].split(", "))
    }
    chosen = line.split()[2].rstrip(",")
    assert set(r2) == {"none", "bon", "br", "bw"} and r2[chosen] == max(r2.values())
    assert json.loads(next((folder / "checkpoints").glob("*/state.json")).read_text())["filter"] == chosen
    kept = {"none": 16, "bon": 4, "br": 8, "bw": 8}[chosen]  # the sizes wait for the choice
    assert (
        f"kept per update: {kept}\n" in printed
        and f"optimizer steps: {2 * kept // 4}\n" in printed
        and printed.count("kept per update") == 1
    )


def test_derived_sizes_are_printed_before_training(make_args, capsys):
    # PITFALLS AVG-6: prompts, N, responses, kept rows, optimizer steps
    pf.main(make_args(dry_run=True))
    printed = dict(line.strip().split(": ") for line in capsys.readouterr().out.splitlines()[:8])
    assert printed == {
        "processes": "1",
        "updates": "2",
        "prompts per update": "4",
        "responses per update": "16",
        "kept per update": "8",
        "minibatches per epoch": "2",
        "optimizer steps": "8",
        "local prompts": "4",
    }


def test_prompts_that_are_left_out_are_counted(make_args, tmp_path, capsys, monkeypatch):
    # PITFALLS TOK-8: training prompts may be dropped, but not in silence; evaluation prompts that are cut are
    # all there
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "q" * n} for n in (3, 16, 17)])
    monkeypatch.setattr(pf, "load_causal_lm", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        pf.main(make_args(prompts=prompts))
    assert "prompts left out: 1 of 3" in capsys.readouterr().out
    args = make_args(eval_prompts=prompts, long_queries="keep_end")
    assert (
        len(
            pf.encode_queries(
                make_tokenizer(), pf.load_rows(str(prompts), "eval_prompts"), args, "eval_prompts"
            )
        )
        == 3
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(batch_size=5), "--batch_size 5 must be a multiple of the 2 processes"),
        (dict(minibatch_size=1), "--minibatch_size 1 must be a multiple of 2"),
    ],
)
def test_sizes_must_divide_over_the_processes(make_args, changes, message):
    # PITFALLS AVG-6
    pf.check_args(make_args(), 2)
    with pytest.raises(ValueError, match=message):
        pf.check_args(make_args(**changes), 2)


def test_policy_and_critic_step_together_after_all_micro_batches(run, monkeypatch):
    # PITFALLS SYS-3: one wrapper, one optimizer over both; each step sees the 3 micro-batches of its
    # minibatch, and nothing but a step moves a weight
    pairs, steps = [], []
    losses = Spies(monkeypatch).on(pf, "minibatch_loss", lambda out, model, *_: pairs.append(model))

    def weights_now():
        return [
            [p.detach().clone() for p in part.parameters()] for part in (pairs[0].policy, pairs[0].critic)
        ]

    def before(optimizer, *_):
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in pairs[0].parameters()} and set(map(type, pairs)) == {
            pf.PolicyAndCritic
        }
        assert all(
            any(p.grad is not None and p.grad.any() for p in part.parameters())
            for part in (pairs[0].policy, pairs[0].critic)
        )
        now = weights_now()
        assert not steps or all(
            torch.equal(a, b) for old, new in zip(steps[-1][1], now) for a, b in zip(old, new)
        )
        steps.append((len(losses), now))

    def after(optimizer, *_):
        moved = weights_now()
        assert all(
            any(not torch.equal(a, b) for a, b in zip(old, new)) for old, new in zip(steps[-1][1], moved)
        )
        steps[-1] = (steps[-1][0], moved)

    handles = register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)
    run(total_episodes=16, minibatch_size=8, micro_batch_size=3)
    [handle.remove() for handle in handles]
    assert [count for count, _ in steps] == [3, 6]


# ---------------------------------------------------------------- killed and continued runs

# A deterministic reward that kills its process: SIGKILL at the 7th call when the file named behind "@"
# exists.
KILLER = """
import os, signal
calls = []
def reward(prompts, responses, rows, source):
    calls.append(1)
    if len(calls) == 7 and os.path.exists(source):
        os.remove(source)
        os.kill(os.getpid(), signal.SIGKILL)
    return [len(r) + r.count("e") / 7 + len(p) / 3 for p, r in zip(prompts, responses)]
"""


@pytest.fixture(scope="module")
def uninterrupted(world, tmp_path_factory):
    """settings(folder) of a run of three updates with all the state there is, and the metrics and folder of
    one left alone."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    (folder / "killer.py").write_text(KILLER)
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(folder)

    def settings(output_dir):
        return dict(
            tiny_settings(world, output_dir),
            eval_prompts=str(world / "eval.jsonl"),
            reward=f"killer:reward@{folder / 'armed'}",
            total_episodes=48,
            adaptive_kl=True,
            kl_horizon=64,
            lr_schedule="linear",
            adam_style="tensorflow",
            print_samples_every=1,
        )

    pf.main(pf.Args(**settings(folder / "whole")))
    yield settings, folder
    patch.undo()


def assert_same_run(folder, other):
    """Metrics without times, samples, final weights, best weights, KL coefficient and counters are equal, bit
    for bit."""
    assert timeless(read_metrics(folder)) == timeless(read_metrics(other))
    assert [line["step"] for line in read_metrics(folder)] == [0, 1, 2, 3]
    samples = (folder / "samples.jsonl").read_text()
    assert samples == (other / "samples.jsonl").read_text() and [
        json.loads(x)["step"] for x in samples.splitlines()
    ] == [1, 2, 3]
    for name in ("policy", "policy_best"):
        assert same(weights(folder / name), weights(other / name))
    states = [
        json.loads((f / "checkpoints" / "step_000003" / "state.json").read_text()) for f in (folder, other)
    ]
    assert states[0] == states[1]


def test_a_killed_run_continues_exactly(uninterrupted, tmp_path):
    # PITFALLS SYS-9: SIGKILL in update 2, then the same command; also that the script runs as a script
    settings, folder = uninterrupted
    (folder / "armed").touch()
    flags = [
        x
        for k, v in settings(tmp_path / "killed").items()
        for x in ((f"--{k}", str(v)) if not isinstance(v, bool) else (f"--{k}",))
    ]
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    killed = subprocess.run(
        [sys.executable, str(ROOT / "pfppo_single.py"), *flags],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    assert [p.name for p in (tmp_path / "killed" / "checkpoints").iterdir()] == ["step_000001"]
    assert not (tmp_path / "killed" / "policy").exists()
    pf.main(pf.Args(**settings(tmp_path / "killed")))
    assert_same_run(tmp_path / "killed", folder / "whole")


def test_a_checkpoint_that_is_not_whole_is_not_used(uninterrupted, tmp_path, monkeypatch):
    # PITFALLS SYS-10: the run dies while it writes its second checkpoint; the first is still there, and the
    # run continues from it
    settings, folder = uninterrupted
    original, calls = pf.Accelerator.save_state, []

    def dies(accelerator, path, **kwargs):
        original(accelerator, path, **kwargs)
        calls.append(path)
        if len(calls) == 2:
            next(Path(path).glob("pytorch_model*")).write_bytes(b"half")
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pf.Accelerator, "save_state", dies)
        with pytest.raises(KeyboardInterrupt):
            pf.main(pf.Args(**settings(tmp_path / "run")))
    assert [p.name for p in (tmp_path / "run" / "checkpoints").glob("step_*")] == ["step_000001"]
    pf.main(pf.Args(**settings(tmp_path / "run")))
    assert_same_run(tmp_path / "run", folder / "whole")
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_000003"], (
        "only the last one is kept"
    )


def test_a_run_killed_before_its_first_checkpoint_starts_again(uninterrupted, tmp_path, monkeypatch):
    # PITFALLS SYS-9: evaluated once at step 0 already, it must not log that step twice
    settings, folder = uninterrupted
    with monkeypatch.context() as patch:
        patch.setattr(pf, "gae", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            pf.main(pf.Args(**settings(tmp_path / "run")))
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [0]
    pf.main(pf.Args(**settings(tmp_path / "run")))
    assert_same_run(tmp_path / "run", folder / "whole")


def test_a_folder_that_was_moved_aside_when_the_run_died_is_put_back(uninterrupted, tmp_path, monkeypatch):
    # PITFALLS SYS-10: killed between the two renames of write_folder; the best policy so far is not lost
    settings, folder = uninterrupted
    renames, original, rising = [], Path.rename, itertools.count()

    def dies(path, target):
        renames.append(path.name)
        if renames.count("policy_best.tmp") == 2:
            raise KeyboardInterrupt
        return original(path, target)

    monkeypatch.setattr(
        pf, "gather_object", lambda _: [{"eval/sampled_reward": [next(rising)]}]
    )  # every policy is the best so far
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", dies)
        with pytest.raises(KeyboardInterrupt):
            pf.main(pf.Args(**settings(tmp_path / "run")))
    assert not (tmp_path / "run/policy_best").exists()
    kept = weights(tmp_path / "run/policy_best.old")
    monkeypatch.setattr(pf, "load_causal_lm", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        pf.main(pf.Args(**settings(tmp_path / "run")))
    assert (
        same(weights(tmp_path / "run/policy_best"), kept) and not (tmp_path / "run/policy_best.old").exists()
    )


def test_a_finished_run_stays_as_it_is(uninterrupted):
    # PITFALLS SYS-10: the last update always writes a checkpoint, so the same command has nothing left to do
    settings, folder = uninterrupted
    before = read_metrics(folder / "whole"), weights(folder / "whole" / "policy")
    pf.main(pf.Args(**settings(folder / "whole")))
    assert read_metrics(folder / "whole") == before[0] and same(
        weights(folder / "whole" / "policy"), before[1]
    )


# ---------------------------------------------------------------- refusals


def test_a_line_of_jsonl_ends_at_a_newline_alone(tmp_path):
    # U+2028, U+2029 and U+0085 may stand unescaped in a JSON string; the number of a bad line behind them is
    # right
    text = "a\u2028b\u2029c\x85d"
    (tmp_path / "rows.jsonl").write_text(
        f'{{"prompt": "{text}"}}\r\n\n{{"prompt": "e"}}', encoding="utf-8", newline=""
    )
    assert pf.load_rows(str(tmp_path / "rows.jsonl"), "prompts") == [{"prompt": text}, {"prompt": "e"}]
    (tmp_path / "rows.jsonl").write_text(f'{{"prompt": "{text}"}}\n{{"prompt"', encoding="utf-8")
    with pytest.raises(ValueError, match="line 2: not JSON"):
        pf.load_rows(str(tmp_path / "rows.jsonl"), "prompts")


@pytest.mark.parametrize("kind", ["DEEPSPEED", "FSDP", "MEGATRON_LM"])
@pytest.mark.parametrize("script", [pf, rm_single, sft_single, common], ids=lambda module: module.__name__)
def test_launchers_that_shard_weights_are_refused(script, kind, monkeypatch):
    # PITFALLS SYS-6: rollouts under sharded weights could dead-lock; refused before anything else is looked
    # at
    pf.refuse_sharding("MULTI_GPU"), pf.refuse_sharding("NO")
    monkeypatch.setattr(
        script, "Accelerator", lambda **_: SimpleNamespace(distributed_type=DistributedType(kind))
    )
    with pytest.raises(ValueError, match=f"^{kind} does not work here.*--multi_gpu"):
        getattr(script, "main", getattr(script, "Run", None))(script.Args())


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
@pytest.mark.parametrize("what", ["loss is nan", "gradient norm nan"])
def test_a_loss_or_gradient_that_is_not_finite_stops_the_run(
    run, make_args, monkeypatch, what, max_grad_norm
):
    # the message says where; the checkpoint of the update before is kept and whole
    original, calls = pf.value_loss, []

    def broken(*args):
        calls.append(1)
        losses, clipped = original(*args)
        if len(calls) > 8:  # 8 micro-batches in update 1
            losses = (
                losses * float("nan") if what == "loss is nan" else losses + (losses * 0).sqrt()
            )  # √0 has an infinite slope
        return losses, clipped

    monkeypatch.setattr(pf, "value_loss", broken)
    with pytest.raises(FloatingPointError, match=f"update 2, epoch 0.*{what}.*checkpoints"):
        run(max_grad_norm=max_grad_norm)
    folder = Path(make_args().output_dir)
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step_000001"]
    saved = torch.load(folder / "checkpoints/step_000001/pytorch_model.bin")
    assert all(torch.isfinite(x).all() for x in saved.values())


def test_copies_of_the_policy_along_the_way(run):
    # the last copy is the last policy, the earlier one is not
    _, folder = run(save_policy_every=1)
    assert same(weights(folder / "policy_2"), weights(folder / "policy"))
    assert not same(weights(folder / "policy_1"), weights(folder / "policy"))


@pytest.mark.parametrize("normalize", [True, False])
def test_a_reward_that_is_not_finite_stops_the_run(run, module, normalize):
    module(
        "nan_reward",
        "def reward(prompts, responses, rows):\n    return [float('nan')] + [1.0] * (len(responses) - 1)\n",
    )
    with pytest.raises(ValueError, match="reward"):
        run(reward="nan_reward:reward", normalize_reward=normalize)


def test_a_reward_of_the_wrong_length_stops_the_run(run, module):
    module("short_reward", "def reward(prompts, responses, rows):\n    return [1.0]\n")
    with pytest.raises(ValueError, match="1 values for"):
        run(reward="short_reward:reward")


FILES = {
    "empty.jsonl": "",
    "column.jsonl": '{"prompt": "a"}\n{"text": "b"}\n',
    "broken.jsonl": '{"prompt": "a"}\n{"prompt": \n',
    "two.jsonl": '{"prompt": "a"}\n{"prompt": "a prompt of more than sixteen tokens"}\n',
    "long.jsonl": '{"prompt": "a prompt of more than sixteen tokens"}\n',
}


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(policy=""), "--policy"),
        (dict(reward=""), "--reward"),
        (dict(prompts=""), "--prompts"),
        (dict(prompts="nowhere.jsonl"), "--prompts nowhere.jsonl: no such file"),
        (dict(eval_prompts="nowhere.jsonl"), "--eval_prompts nowhere.jsonl: no such file"),
        (dict(prompts="{files}/empty.jsonl"), "--prompts .*empty.jsonl: no rows"),
        (
            dict(prompts="{files}/column.jsonl"),
            "--prompts .*column.jsonl, row 2: no column prompt; it has .*text",
        ),
        (dict(prompt_field="question"), "--prompts .*prompts.jsonl, row 1: no column question"),
        (dict(prompts="{files}/broken.jsonl"), "--prompts .*broken.jsonl, line 2: not JSON"),
        (dict(prompts="{files}/long.jsonl"), "--prompts.*--query_length 16"),
        (
            dict(eval_prompts="{files}/two.jsonl"),
            "--eval_prompts: 1 of 2 queries .* --query_length 16; .* --long_queries",
        ),
        (
            dict(response_length=120),
            "--policy .*gpt2 has 128 positions, .* 129 tokens together; lower --response_length",
        ),
        (dict(policy="{llama}", response_length=120), "--policy .*llama has 128 positions"),
        (dict(policy="{files}/long", response_length=120), "--reward .*reward has 128 positions"),
        (
            dict(policy="{files}/long", reward="json:dumps", critic_init="{reward}", response_length=120),
            "--critic_init .*reward has 128",
        ),
        (
            dict(policy="{files}/other"),
            "--reward .*reward: its tokenizer differs from that of --policy in 2 tokens, 'a' among",
        ),
        (
            dict(policy="{files}/other", reward="json:dumps", critic_init="{reward}"),
            "--critic_init .*reward: its tokenizer differs",
        ),
        (dict(reward="{files}"), "--reward .*reward_head.safetensors"),
        (dict(reward="nomodule:reward"), "--reward nomodule:reward.*nomodule"),
        (dict(reward="json:nofunction"), "--reward json:nofunction.*nofunction"),
        (dict(actual_score="nomodule:s"), "--actual_score"),
        (dict(critic_init="{files}"), "--critic_init .*reward_head.safetensors"),
        (dict(critic="shared", critic_warmup_updates=1), "--critic_warmup_updates needs --critic separate"),
        (dict(critic="shared", critic_init="{files}"), "--critic_init needs --critic separate"),
        (dict(rank_weights=(0.5, 0.5)), "--rank_weights needs num_responses = 4 numbers"),
        (dict(rank_weights=(0.5, 0.0, 0.0, 0.4)), "--rank_weights .*sum to 1, they sum to 0.9"),
        (dict(rank_weights=(1.5, -0.5, 0.0, 0.0)), "--rank_weights must be at least 0"),
        (
            dict(num_responses=1, batch_size=16),
            "--filter br needs --num_responses of 2 or more.*--filter none",
        ),
        (dict(num_kept=5), "--num_kept 5 exceeds num_responses 4; use --draw sample"),
        (dict(num_kept=-1, draw="sample"), "--num_kept must be at least 0, not -1"),
        (dict(filter="none", num_kept=2), "--num_kept 2 does nothing with --filter none; .* --filter random"),
        (dict(filter="top", num_kept=2), "--num_kept 2 does nothing with --filter top"),
        (dict(filter="auto"), "--filter auto needs --actual_score"),
        (
            dict(filter="auto", actual_score="json:dumps", minibatch_size=8),
            "--minibatch_size 8 must divide the kept rows 4 x 1 = 4 of bon, which auto may",
        ),
        (
            dict(filter="auto", rank_weights=(0.5, 0.0, 0.0, 0.5)),
            "--rank_weights stands in place .* leave out --filter auto",
        ),
        (dict(filter="bon", rank_weights=(0.5, 0.0, 0.0, 0.5)), "leave out --filter bon"),
        (dict(filter="top", rank_weights=(0.5, 0.0, 0.0, 0.5)), "leave out --filter top"),
        (dict(normalize_samples=1), "--normalize_samples must be at least 2, not 1"),
        (dict(max_grad_norm=-1.0), "--max_grad_norm must be at least 0"),
        (dict(adaptive_kl=True, kl_target=0.0), "--adaptive_kl needs --kl_target and --kl_horizon above 0"),
        (dict(minibatch_size=5), "--minibatch_size 5 must divide the kept rows 4 x 2 = 8"),
        (dict(total_episodes=8), "--total_episodes 8 is less than one update"),
        (dict(temperature=0.0), "--temperature must be above 0"),
        (dict(missing_stop="subtract"), "--penalty_value -1.0 would reward .* --missing_stop subtract"),
        (dict(batch_size=0), "--batch_size must be at least 1"),
        (dict(generation_batch_size=-1), "--generation_batch_size must be at least 1, or 0"),
        (dict(stop_token="nosuch"), "--stop_token nosuch"),
        (dict(stop_token="99999"), "--stop_token: token id 99999, but the model has"),
        (dict(policy="{files}/nopad"), "nopad: the tokenizer has no pad token.*--pad_token"),
    ],
)
def test_bad_input_is_refused_before_a_model_is_loaded(
    make_args, tmp_path, world, monkeypatch, changes, message
):
    # PITFALLS AVG-6, GAE-7, TOK-8 and the rest: an error that names the field, in seconds, and no folder left
    # behind
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    make_tokenizer(pad=None).save_pretrained(tmp_path / "nopad")
    for name, positions in (("long", 256), ("other", 128)):
        model_config("gpt2", n_positions=positions).save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    vocabulary = json.loads((tmp_path / "other/tokenizer.json").read_text())
    ids = vocabulary["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    (tmp_path / "other/tokenizer.json").write_text(json.dumps(vocabulary))
    places = {"{files}": tmp_path, "{llama}": world / "llama", "{reward}": world / "reward"}
    for place, folder in places.items():
        changes = {k: v.replace(place, str(folder)) if isinstance(v, str) else v for k, v in changes.items()}
    for name in ("load_causal_lm", "AutoModel", "AutoModelForCausalLM"):
        monkeypatch.setattr(pf, name, None)  # loading a model would raise a TypeError or AttributeError
    start = time.process_time()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        pf.main(make_args(**changes))
    assert time.process_time() - start < 5 and not (tmp_path / "run").exists()


def test_what_fits_the_model_is_not_refused(world, tmp_path):
    # as long as the positions; no limit in the configuration; a folder without tokenizer; a pad token that
    # was added, or is EOS
    pf.check_positions(str(world / "gpt2"), "policy", 128)
    model_config("gpt2", n_positions=-1).save_pretrained(tmp_path / "endless")
    pf.check_positions(str(tmp_path / "endless"), "policy", 10**6)
    pf.check_vocabulary(make_tokenizer(), str(tmp_path / "endless"), "reward")
    for pad in ("<eos>", "[PAD]"):
        tokenizer = make_tokenizer(pad=pad)
        pf.check_vocabulary(tokenizer, str(world / "reward"), "reward")
        tokenizer.save_pretrained(tmp_path / pad)
        pf.check_vocabulary(make_tokenizer(), str(tmp_path / pad), "reward")


def test_memory_and_speed_may_change_when_a_run_goes_on(tmp_path, capsys):
    # what a run needs that has run out of memory; whatever else changes makes another run
    args = pf.Args(output_dir=str(tmp_path / "run"), micro_batch_size=32)
    pf.open_run(args, 1)
    pf.open_run(dataclasses.replace(args, micro_batch_size=4), 1)
    assert "goes on with another micro_batch_size (32 there, 4 here)" in capsys.readouterr().out
    pf.open_run(dataclasses.replace(args, micro_batch_size=4), 1)
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match=r"another run: lr \(5e-07 there, 0.1 here\); name"):
        pf.open_run(dataclasses.replace(args, micro_batch_size=2, lr=0.1), 1)


@pytest.mark.parametrize("script", ["sft_single", "rm_single", "pfppo_single"])
def test_ranks_wait_longer_than_a_checkpoint_takes(script, monkeypatch):
    # NCCL's limit is ten minutes; the others wait while rank 0 writes or one rank grades
    script, given = importlib.import_module(script), []

    def accelerator(kwargs_handlers):
        given.extend(kwargs_handlers)
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "Accelerator", accelerator)
    with pytest.raises(KeyboardInterrupt):
        script.main(script.Args())
    assert [handler.timeout.total_seconds() for handler in given if hasattr(handler, "timeout")] == [7200]


def test_a_folder_of_another_run_is_refused(uninterrupted, monkeypatch):
    # the settings that differ are named; a folder of other things is refused as well
    settings, folder = uninterrupted
    monkeypatch.setattr(pf, "load_causal_lm", None)
    with pytest.raises(ValueError, match=r"--output_dir .*whole holds another run: seed \(1 there, 2 here\)"):
        pf.main(pf.Args(**{**settings(folder / "whole"), "seed": 2}))
    with pytest.raises(ValueError, match=r"--output_dir .* is not empty"):
        pf.main(pf.Args(**settings(folder)))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--filter", "best"], "filter"),
        (["--preset", "other"], "preset"),
        (["--preset=other"], "preset"),
        (["--lr", "fast"], "lr"),
    ],
)
def test_unknown_values_of_flags_are_refused(flags, message, capsys):
    with pytest.raises(SystemExit):
        pf.parse_args(flags)
    assert message in capsys.readouterr().err


def test_flags_win_over_the_preset():
    args = pf.parse_args(
        ["--preset", "lm_human_preferences", "--lr", "0.5", "--rank_weights", "0.5", "0", "0.5"]
    )
    assert (
        args.lr == 0.5
        and args.rank_weights == (0.5, 0, 0.5)
        and args.temperature == 0.7
        and args.preset == "lm_human_preferences"
    )
    assert (
        pf.parse_args(["--preset=lm_human_preferences", "--lr", "0.5", "--rank_weights", "0.5", "0", "0.5"])
        == args
    )
    assert pf.parse_args([]) == pf.Args()
