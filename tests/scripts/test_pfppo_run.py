"""Whole runs of pfppo_single.py on the tiny world: what moves, what is logged, what stops a run, what is
refused."""

import json
import math
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import DistributedType
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs
from conftest import (
    EOS,
    Spies,
    causal_lm,
    make_tokenizer,
    model_config,
    read_metrics,
    same,
    timeless,
    tiny_settings,
    weights,
    write_jsonl,
)
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention, GPT2LMHeadModel

import pfppo_single as pf
import rm_single as rm
import sft_single as sft

# ---------------------------------------------------------------- one run, looked at from many sides


@pytest.fixture(scope="module")
def recorded(world, tmp_path_factory):
    """Two updates of BR at temperature 0.6 with everything that passes through main's functions."""
    folder = tmp_path_factory.mktemp("recorded")
    (folder / "watch.py").write_text(
        "def actual(prompts, responses, rows):\n    return [float(len(r) % 2) for r in responses]\n"
    )
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(folder)
    for name in ("check_cache", "check_model"):  # forward passes that are not counted here
        patch.setattr(pf, name, lambda *_: None)
    spies = Spies(patch)
    spies.on(pf, "reward_model_scores", lambda out, model, rollout, *_: (out.clone(), dict(rollout), model))
    spies.on(pf, "filter_responses", lambda out, *args, **_: (out.clone(), args[0].clone(), args[1].clone()))
    spies.on(pf, "response_logprobs_and_values", lambda out, model, rollout, *_: (out, dict(rollout), model))
    spies.on(pf, "cumulative_rewards", lambda out, scores, kl, *_: (*out, kl))
    spies.on(pf, "whiten", lambda out, values, *_, **__: len(values))
    spies.on(pf, "minibatch_loss", lambda out, model, batch, *_: {k: v.clone() for k, v in batch.items()})
    spies.on(
        GPT2LMHeadModel,
        "forward",
        lambda out, *_, **kw: (len(kw["input_ids"]), kw["use_cache"], torch.is_grad_enabled()),
    )
    spies.on(pf.RewardModel, "forward", lambda out, model, ids, mask: (len(ids), torch.is_grad_enabled()))
    changes = dict(
        eval_prompts=str(world / "eval.jsonl"), temperature=0.6, normalize_reward=False, eval_every=100
    )
    changes |= dict(actual_score="watch:actual")
    args = pf.Args(**tiny_settings(world, folder / "run") | changes)
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
    assert same(reward.state_dict(), pf.load_reward_model(str(recorded["world"] / "reward")).state_dict())


def test_critic_moves(recorded):
    critic = trained_pair(recorded).critic.state_dict()
    start = pf.load_reward_model(str(recorded["world"] / "reward")).state_dict()
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
        pf.PolicyAndCritic(causal_lm("gpt2"), pf.load_reward_model(str(recorded["world"] / "reward"))),
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


def test_kl_controller_receives_the_logged_kl(run):
    # PITFALLS GAE-5: update 1 has KL 0, which lowers β by the most that is allowed: 0.2 · 16 / 64; that of
    # update 2 is so near the target that it is not clipped
    settings = dict(filter="none", noptepochs=1, kl_target=0.2, kl_horizon=64, total_episodes=48)
    first, second, third = run(**settings)[0]
    assert first["objective/kl_coef"] == 0.01
    assert second["objective/kl_coef"] == pytest.approx(0.01 * (1 - 0.2 * 16 / 64))
    moved = second["objective/kl_coef"] * (1 + (second["objective/kl"] / 0.2 - 1) * 16 / 64)
    assert third["objective/kl_coef"] == pytest.approx(moved) and 0.16 < second["objective/kl"] < 0.24


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


def test_evaluation_is_logged(recorded):
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
    assert "eval/greedy_pass1" not in recorded["metrics"][1]


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


def test_untied_policy_loads_again(run, world, spies):
    # PITFALLS SYS-8: Llama, untied output; LP-3 and LP-5 for rotary positions
    seen = spies.on(pf, "response_logprobs_and_values", lambda out, model, *_: model)
    metrics, folder = run(policy=world / "llama", total_episodes=16, noptepochs=1)
    ids, loaded = torch.arange(12).view(1, 12), AutoModelForCausalLM.from_pretrained(folder / "policy")
    with torch.no_grad():
        assert torch.equal(
            loaded(ids).logits,
            next(m for m in seen if isinstance(m, pf.PolicyAndCritic)).policy.eval()(ids).logits,
        )
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)
    assert metrics[0]["ppo/policy/first_ratio_max"] == pytest.approx(1, abs=1e-5)


def test_generation_batch_size_says_how_many_responses_are_generated_at_a_time(run, spies):
    sizes = spies.on(pf, "generate", lambda out, *_: len(out))
    run(generation_batch_size=4, total_episodes=16, noptepochs=1, normalize_reward=True, normalize_samples=8)
    assert sizes == [4] * (2 + 4)  # of the normalisation, of the update


@pytest.mark.parametrize("micro_batch_size", [1, 3, 8])
def test_learning_rate_zero_keeps_every_ratio_at_one(run, spies, micro_batch_size):
    # PITFALLS LP-5: every minibatch, micro-batch size and epoch
    ratios = spies.on(pf, "policy_loss", lambda out, *_: out[2])
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


@pytest.fixture
def bfloat16(monkeypatch):
    """As `accelerate launch --mixed_precision bf16` sets it."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_whole_run_under_bfloat16_autocast(run, spies, bfloat16):
    # PITFALLS SYS-1, LP-7: products in bfloat16, weights and results in float32
    dtypes = spies.on(torch.nn.functional, "linear", lambda out, *_: out.dtype)
    metrics, folder = run(total_episodes=16, noptepochs=1, lr=1e-3)
    assert torch.bfloat16 in dtypes and all(np.isfinite(x) for line in metrics for x in line.values())
    assert metrics[0]["ppo/policy/first_ratio_max"] == pytest.approx(1, abs=0.02)  # bfloat16's rounding alone
    after = weights(folder / "policy")
    assert {w.dtype for w in after.values()} == {torch.float32}
    assert any((w != w.bfloat16().float()).any() for w in after.values())


def test_filter_none_is_ppo_m_bit_for_bit(run, monkeypatch, tmp_path):
    # PITFALLS PF-10: the run with the filter taken away gives the same weights and metrics, and so do equal
    # own weights
    settings = dict(num_responses=4, minibatch_size=8, total_episodes=16)
    filtered, folder = run(filter="none", output_dir=tmp_path / "none", **settings)
    own, own_folder = run(rank_weights=(0.25,) * 4, num_kept=4, output_dir=tmp_path / "own", **settings)
    monkeypatch.setattr(pf, "filter_responses", lambda scores, *_, **__: torch.arange(len(scores)))
    plain, plain_folder = run(filter="none", output_dir=tmp_path / "plain", **settings)
    assert timeless(filtered) == timeless(plain) == timeless(own)
    for other in (plain_folder, own_folder):
        assert same(weights(folder / "policy"), weights(other / "policy"))


def test_one_response_is_ppo_s_bit_for_bit(run, monkeypatch, tmp_path):
    # PITFALLS PF-10
    settings = dict(num_responses=1, filter="none", batch_size=8, total_episodes=8, minibatch_size=4)
    filtered, folder = run(output_dir=tmp_path / "none", **settings)
    monkeypatch.setattr(pf, "filter_responses", lambda scores, *_, **__: torch.arange(len(scores)))
    plain, plain_folder = run(output_dir=tmp_path / "plain", **settings)
    assert timeless(filtered) == timeless(plain) and filtered[0]["filter/kept"] == 8
    assert same(weights(folder / "policy"), weights(plain_folder / "policy"))


def test_gradient_checkpointing_changes_no_weight(run, tmp_path):
    # PITFALLS SYS-7: same gradients; blocks run again in the backward pass of the loss, and never in rollouts
    found, settings = [], dict(total_episodes=16, noptepochs=1)
    for on in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            blocks = Spies(patch).on(GPT2Attention, "forward", lambda *_, **__: None)  # one per block
            _, folder = run(gradient_checkpointing=on, **settings, output_dir=tmp_path / str(on))
            found.append((weights(folder / "policy"), len(blocks)))
    for name, value in found[0][0].items():
        torch.testing.assert_close(found[1][0][name], value, atol=1e-6, rtol=0)
    # 2 minibatches x 2 micro-batches, 2 blocks in the policy and 2 in the critic, once more each
    assert found[1][1] - found[0][1] == 2 * 2 * (2 + 2)


def test_the_pad_token_changes_no_number_of_a_run(run, world, tmp_path):
    # PITFALLS TOK-2, TOK-7: none, one of its own or EOS; with chat prompts, which contain EOS
    chats = [
        {"prompt": [{"role": "user", "content": c}, {"role": "assistant", "content": "ok"}]}
        for c in ("add", "one two", "x", "max 3")
    ]
    prompts, found = write_jsonl(tmp_path / "chats.jsonl", chats), []
    for pad in (None, "<pad>", "<eos>"):
        policy = tmp_path / f"policy {pad}"
        shutil.copytree(world / "gpt2", policy)
        make_tokenizer(pad=pad).save_pretrained(policy)
        settings = dict(policy=policy, prompts=prompts, total_episodes=16, noptepochs=1)
        found.append(run(output_dir=tmp_path / f"run {pad}", **settings))
    (metrics, folder), *others = found
    assert metrics[0]["objective/truncated"] < 1
    for other_metrics, other_folder in others:
        assert timeless(other_metrics) == timeless(metrics)
        assert same(weights(folder / "policy"), weights(other_folder / "policy"))


def test_equal_prompts_stay_two_groups(run, tmp_path, spies):
    # PITFALLS PF-2: exactly N rows per prompt id, though all texts are the same
    calls = spies.on(pf, "filter_responses", lambda out, scores, ids, *_, **__: ids)
    run(
        prompts=write_jsonl(tmp_path / "same.jsonl", [{"prompt": "add"}] * 4), total_episodes=16, noptepochs=1
    )
    assert calls[0].unique(return_counts=True)[1].tolist() == [4, 4, 4, 4]


@pytest.fixture(scope="module")
def lmhp(world, tmp_path_factory):
    """Two updates with the preset lm_human_preferences, sizes apart; what was paid, scored and stepped with."""
    folder = tmp_path_factory.mktemp("lmhp")
    settings = dict(tiny_settings(world, folder / "run"), num_responses=1, batch_size=16, minibatch_size=16)
    settings |= dict(stop_token="<eos>", stop_after=2, response_length=12, micro_batch_size=16)
    del settings["normalize_samples"]
    flags = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    args = pf.parse_args(pf.Args, ["--preset", "lm_human_preferences", *flags], pf.PRESETS)
    with pytest.MonkeyPatch.context() as patch:
        spies = Spies(patch)
        spies.on(
            pf, "cumulative_rewards", lambda out, scores, kl, mask, _: (out[0].clone(), out[1], scores, mask)
        )
        spies.on(pf, "reward_model_scores", lambda out, model, rollout, *_: (out, dict(rollout)))
        spies.on(pf, "adam_epsilon", lambda out, *_: out)
        pf.main(args)
    return {"args": args, "metrics": read_metrics(folder / "run"), **spies.calls}


def test_preset_pays_at_the_last_slot_and_masks_nothing(lmhp):
    # PITFALLS RM-5: whatever stands behind the stop token
    for (paid, non_score, scores, mask), (_, rollout) in zip(
        lmhp["cumulative_rewards"], lmhp["reward_model_scores"]
    ):
        assert mask.all() and rollout["response_mask"].all()
        assert torch.equal(paid[:, :-1], non_score[:, :-1])
        torch.testing.assert_close(paid[:, -1], non_score[:, -1] + scores)
    assert lmhp["metrics"][0]["objective/length"] == 12


def test_preset_scores_up_to_the_first_stop_token_from_stop_after_on(lmhp):
    # PITFALLS RM-5
    for _, rollout in lmhp["reward_model_scores"]:
        first_stop = (rollout["responses"] == EOS) & (torch.arange(12) >= 2)
        lengths = torch.where(first_stop.any(1), first_stop.int().argmax(1) + 1, 12)
        assert torch.equal(rollout["score_mask"].sum(1), lengths)


def test_preset_replaces_the_score_by_minus_one_without_a_stop_token(lmhp):
    # PITFALLS RM-5, GAE-7
    for (_, _, scores, _), (raw, rollout) in zip(lmhp["cumulative_rewards"], lmhp["reward_model_scores"]):
        assert torch.equal(scores, torch.where(rollout["has_stop"], raw, -1.0))
        assert 0 < rollout["has_stop"].sum() < 16


def test_preset_steps_with_tensorflow_epsilon_and_a_falling_learning_rate(lmhp):
    # PITFALLS RM-5: ε / sqrt(1 - 0.999^t) at steps 1 to 4, and linear to zero per update
    expected = [1e-5 / (1 - 0.999**t) ** 0.5 for t in range(1, 5)]
    assert lmhp["adam_epsilon"][::2] == pytest.approx(expected)  # policy and critic
    assert [line["ppo/lr"] for line in lmhp["metrics"]] == pytest.approx([1e-3, 0.5e-3])


def test_preset_shares_the_critic_and_normalises_nothing(lmhp):
    # PITFALLS RM-5
    args = lmhp["args"]
    assert (args.critic, args.normalize_reward, args.filter) == ("shared", False, "none")
    for line in lmhp["metrics"]:
        assert line["objective/score"] != line["objective/shaped_score"] and line["filter/kept"] == 16


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
    settings = dict(reward="noisy_reward:reward", total_episodes=16, noptepochs=1)
    found = [run(**settings, seed=seed, output_dir=tmp_path / f"{i}") for i, seed in enumerate((1, 1, 2))]
    assert timeless(found[0][0]) == timeless(found[1][0])
    assert found[0][0][0]["objective/score"] != found[2][0][0]["objective/score"]


def test_thresholds_may_keep_nothing(run, world):
    # PITFALLS AVG-5: an update without a kept row trains nothing, logs finite numbers and the run goes on;
    # there is no KL of 0 that a log could take for one that was measured
    metrics, folder = run(filter="top", thresholds=(-1.0, 1.0), reward=world / "reward_tanh")
    assert [line["filter/kept"] for line in metrics] == [0, 0]
    absent = {"objective/kl", "objective/score_total", "filter/score", "ppo/returns/mean"}
    assert not absent & set().union(*metrics)
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
        (dict(filter="top_bottom", thresholds=(0.4, 0.5)), None),
        (dict(filter="top_random", thresholds=(-0.3, 0.5)), None),
    ],
)
def test_every_filter_runs(run, changes, kept):
    metrics, _ = run(total_episodes=16, noptepochs=1, **changes)
    assert metrics[0]["filter/kept"] == kept if kept else 0 < metrics[0]["filter/kept"] < 16
    assert metrics[0]["ppo/policy/first_ratio_max"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("lr_schedule", ["constant", "linear"])
def test_critic_warmup_updates_move_the_critic_alone(run, lr_schedule):
    # the policy's weights stay, its optimizer does not
    metrics, folder = run(critic_warmup_updates=1, save_policy_every=1, lr_schedule=lr_schedule, noptepochs=1)
    start = causal_lm("gpt2").state_dict()
    assert all(torch.equal(value, start[name]) for name, value in weights(folder / "policy_1").items())
    assert not same(weights(folder / "policy_2"), weights(folder / "policy_1"))
    assert [line["ppo/lr"] for line in metrics] == [0, 1e-3 if lr_schedule == "constant" else 5e-4]
    assert metrics[1]["ppo/val/error"] != metrics[0]["ppo/val/error"]


def test_skipped_steps_do_not_count_for_tensorflow_epsilon(run, spies, monkeypatch):
    # PITFALLS RM-5: under fp16 a step with an overflow is none, for Adam either; here the first and third
    skipped = iter([True, False, True, False])
    monkeypatch.setattr(AcceleratedOptimizer, "step_was_skipped", property(lambda _: next(skipped)))
    steps = spies.on(pf, "adam_epsilon", lambda out, eps, style, step: step)
    metrics, _ = run(adam_style="tensorflow", total_episodes=16)
    assert steps[::2] == [1, 1, 2, 2] and metrics[0]["ppo/optimizer_step"] == 2


def test_derived_sizes_are_printed_before_training(make_args, capsys):
    # PITFALLS AVG-6: updates, prompts, N, kept rows, epochs, minibatches
    pf.main(make_args(dry_run=True))
    line = "2 updates of 4 prompts x 4 responses on 1 processes; filter br keeps 8; 2 epochs x 2 minibatches"
    assert capsys.readouterr().out.splitlines()[0] == line


def test_a_dry_run_writes_nothing(make_args, tmp_path, monkeypatch):
    monkeypatch.setattr(pf, "load_causal_lm", None)
    pf.main(make_args(dry_run=True))
    assert not (tmp_path / "run").exists()


def test_prompts_that_are_left_out_are_counted(make_args, tmp_path, capsys):
    # PITFALLS TOK-8: training prompts may be dropped, but not in silence
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "q" * n} for n in (3, 16, 17)])
    pf.main(make_args(prompts=prompts, dry_run=True))
    assert "--prompts: 1 of 3 queries are empty or longer than --query_length" in capsys.readouterr().out


def test_evaluation_prompts_may_be_cut_and_are_all_there(make_args, tmp_path):
    # PITFALLS TOK-8
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "q" * n} for n in (3, 16, 17)])
    args = make_args(eval_prompts=prompts, long_queries="keep_start")
    found = pf.read_prompts("eval_prompts", args, make_tokenizer())
    assert [len(row["query_ids"]) for row in found] == [3, 16, 16]


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(batch_size=5), "--batch_size 5 must be a multiple of the 2 processes"),
        (dict(minibatch_size=1), "--minibatch_size .* multiple of .*2"),
    ],
)
def test_sizes_must_divide_over_the_processes(make_args, changes, message):
    # PITFALLS AVG-6
    pf.check_args(make_args(), 2)
    with pytest.raises(SystemExit, match=message):
        pf.check_args(make_args(**changes), 2)


def test_policy_and_critic_step_together_after_all_micro_batches(run, spies):
    # PITFALLS SYS-3: one wrapper, one optimizer over both; each step sees the 3 micro-batches of its
    # minibatch, and nothing but a step moves a weight
    pairs, steps = [], []
    losses = spies.on(pf, "minibatch_loss", lambda out, model, *_: pairs.append(model))

    def weights_now():
        parts = (pairs[0].policy, pairs[0].critic)
        return [torch.cat([p.detach().flatten() for p in part.parameters()]) for part in parts]

    def before(optimizer, *_):
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in pairs[0].parameters()} and type(pairs[0]) is pf.PolicyAndCritic
        assert not steps or all(map(torch.equal, steps[-1][1], weights_now()))
        steps.append((len(losses), weights_now()))

    def after(optimizer, *_):
        assert not any(map(torch.equal, steps[-1][1], weights_now())), "policy and critic have moved"
        steps[-1] = (steps[-1][0], weights_now())

    handles = register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)
    run(total_episodes=16, minibatch_size=8, micro_batch_size=3)
    [handle.remove() for handle in handles]
    assert [count for count, _ in steps] == [3, 6]


# ---------------------------------------------------------------- what stops a run


@pytest.mark.parametrize("kind", ["DEEPSPEED", "FSDP", "MEGATRON_LM"])
@pytest.mark.parametrize("script", [pf, rm, sft], ids=lambda module: module.__name__)
def test_launchers_that_shard_weights_are_refused(script, kind, monkeypatch):
    # PITFALLS SYS-6: rollouts under sharded weights could dead-lock; refused before anything is looked at
    fake = SimpleNamespace(distributed_type=DistributedType(kind))
    monkeypatch.setattr(script, "Accelerator", lambda **_: fake)
    with pytest.raises(SystemExit, match=f"^{kind} does not work here.*--multi_gpu"):
        script.main(SimpleNamespace(shard=False, log_with="none", output_dir=""))


@pytest.mark.parametrize("script", [pf, rm, sft], ids=lambda module: module.__name__)
def test_ranks_wait_longer_than_a_checkpoint_takes(script, spies):
    # NCCL's limit is ten minutes; the others wait while rank 0 writes or one rank grades
    given = spies.on(script, "Accelerator", lambda out, kwargs_handlers: kwargs_handlers)
    script.start_accelerator()
    timeouts = [x.timeout.total_seconds() for x in given[0] if isinstance(x, InitProcessGroupKwargs)]
    assert timeouts == [7200]


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
@pytest.mark.parametrize("what", ["loss is nan", "gradient norm nan"])
def test_a_loss_or_gradient_that_is_not_finite_stops_the_run(run, tmp_path, monkeypatch, what, max_grad_norm):
    # the message says where; the checkpoint of the update before is kept and whole
    original, calls = pf.value_loss, []

    def broken(*args):
        calls.append(1)
        losses, clipped = original(*args)
        if len(calls) <= 4:  # the micro-batches of update 1
            return losses, clipped
        return losses * math.nan if what == "loss is nan" else losses + (
            losses * 0
        ).sqrt(), clipped  # slope ∞

    monkeypatch.setattr(pf, "value_loss", broken)
    with pytest.raises(FloatingPointError, match=f"step 2: .*{what}.*checkpoint is kept"):
        run(max_grad_norm=max_grad_norm, checkpoint_every=1, noptepochs=1)
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step_000001"]
    saved = weights(tmp_path / "run/checkpoints/step_000001")
    assert all(torch.isfinite(x).all() for x in saved.values())


@pytest.mark.parametrize(
    "loss, norm, fp16, stops",
    [(1.0, math.inf, True, False), (math.nan, 1.0, True, True), (1.0, math.inf, False, True)],
)
def test_under_fp16_a_gradient_may_overflow_but_not_the_loss(loss, norm, fp16, stops):
    # the scaler skips that step and lowers its scale
    accelerator = SimpleNamespace(scaler=object() if fp16 else None)
    with pytest.raises(FloatingPointError) if stops else nullcontext():
        pf.check_finite(accelerator, 1, loss, norm)


def test_copies_of_the_policy_along_the_way(run):
    # the last copy is the last policy, the earlier one is not
    _, folder = run(save_policy_every=1, noptepochs=1)
    assert same(weights(folder / "policy_2"), weights(folder / "policy"))
    assert not same(weights(folder / "policy_1"), weights(folder / "policy"))


@pytest.mark.parametrize("normalize", [True, False])
def test_a_reward_that_is_not_finite_stops_the_run(run, module, normalize):
    source = (
        "def reward(prompts, responses, rows):\n    return [float('nan')] + [1.0] * (len(responses) - 1)\n"
    )
    module("nan_reward", source)
    with pytest.raises(SystemExit, match="^--reward must return a list of [0-9]+ finite numbers, not .nan"):
        run(reward="nan_reward:reward", normalize_reward=normalize)


def test_a_constant_reward_cannot_be_normalised(run, module):
    module("one_reward", "def reward(prompts, responses, rows):\n    return [1.0] * len(responses)\n")
    with pytest.raises(
        SystemExit, match="^--reward gives 1.0 for all 16 samples of π_SFT: nothing to learn from"
    ):
        run(reward="one_reward:reward", normalize_reward=True)


def test_a_reward_of_the_wrong_length_stops_the_run(run, module):
    module("short_reward", "def reward(prompts, responses, rows):\n    return [1.0]\n")
    with pytest.raises(SystemExit, match="^--reward .*must return a list of 16 finite numbers"):
        run(reward="short_reward:reward")


# ---------------------------------------------------------------- refusals

LONG_PROMPT = {"prompt": "a prompt of more than sixteen tokens"}


@pytest.fixture(scope="module")
def places(world, tmp_path_factory):
    """Folder with what refusals are made of; of `other`, the tokenizer has two letters exchanged."""
    folder = tmp_path_factory.mktemp("places")
    write_jsonl(folder / "two.jsonl", [{"prompt": "a"}, LONG_PROMPT])
    write_jsonl(folder / "long.jsonl", [LONG_PROMPT])
    for name, positions in (("long", 256), ("other", 128)):
        model_config("gpt2", n_positions=positions).save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    tokenizer = json.loads((folder / "other/tokenizer.json").read_text())
    ids = tokenizer["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    (folder / "other/tokenizer.json").write_text(json.dumps(tokenizer))
    for name in ("llama", "reward", "gpt2", "eval.jsonl"):
        (folder / name).symlink_to(world / name)
    return folder


REFUSED = [
    # what is not there
    (dict(policy="{}/none"), "--policy .*none"),
    (dict(reward="{}/none"), "--reward .*none"),
    (dict(reward="{}/gpt2"), "--reward .*gpt2: a GPT2LMHeadModel is no reward model; .* module:function"),
    (dict(critic_init="{}/gpt2"), "--critic_init .*gpt2: a GPT2LMHeadModel is no reward model"),
    (dict(critic_init="json:dumps"), "--critic_init json:dumps"),
    (dict(prompts="nowhere.jsonl"), "--prompts nowhere.jsonl.*No such file"),
    (dict(eval_prompts="nowhere.jsonl"), "--eval_prompts nowhere.jsonl.*No such file"),
    (dict(prompt_field="question"), "--prompts .*prompts.jsonl, row 1: no column question"),
    (dict(stop_token="nosuch"), "--stop_token .nosuch. is no token"),
    (dict(stop_token="99999"), "--stop_token.*99999"),
    (dict(reward="nomodule:reward"), "--reward nomodule:reward.*nomodule"),
    (dict(reward="json:nofunction"), "--reward json:nofunction.*nofunction"),
    (dict(actual_score="nomodule:s", eval_prompts="{}/eval.jsonl"), "--actual_score nomodule:s.*nomodule"),
    # what does not fit the models
    (dict(prompts="{}/long.jsonl"), "--prompts.*--query_length 16"),
    (dict(eval_prompts="{}/two.jsonl"), "--eval_prompts: 1 of 2 queries .*--query_length.*--long_queries"),
    (dict(response_length=120), "--policy.* 128 positions, not 129; lower --query_length or --response"),
    (dict(policy="{}/llama", response_length=120), "--policy.* 128 positions, not 129"),
    (dict(policy="{}/long", response_length=120), "--reward.* 128 positions, not 129"),
    (
        dict(policy="{}/long", reward="json:dumps", critic_init="{}/reward", response_length=120),
        "--critic_init.* 128 positions, not 129",
    ),
    (dict(policy="{}/other"), "--reward .*reward: its tokenizer differs .* 2 "),
    (
        dict(policy="{}/other", reward="json:dumps", critic_init="{}/reward"),
        "--critic_init .*reward: its tokenizer differs",
    ),
    # settings that do not go together
    (dict(critic="shared", critic_warmup_updates=1), "--critic_warmup_updates needs --critic separate"),
    (dict(critic="shared", critic_init="{}/reward"), "--critic_init needs --critic separate"),
    (dict(actual_score="json:dumps"), "--actual_score needs --eval_prompts"),
    (dict(rank_weights=(0.5, 0.5)), "--rank_weights needs --num_responses = 4 numbers"),
    (dict(rank_weights=(0.5, 0.0, 0.0, 0.4)), "--rank_weights .*sum 1"),
    (dict(rank_weights=(1.5, -0.5, 0.0, 0.0)), "--rank_weights must be at least 0"),
    (dict(filter="bon", rank_weights=(0.5, 0.0, 0.0, 0.5)), "--rank_weights replaces --filter"),
    (dict(filter="top", rank_weights=(0.5, 0.0, 0.0, 0.5)), "--rank_weights replaces --filter"),
    (dict(num_responses=1, batch_size=16), "--filter needs --num_responses above 1; .*--filter none"),
    (dict(num_kept=5), "--num_kept 5 exceeds --num_responses.*--draw sample"),
    (dict(filter="none", num_kept=2), "--num_kept does nothing with --filter none"),
    (dict(filter="top", num_kept=2), "--num_kept does nothing with --filter top"),
    (dict(filter="top", thresholds=(0.5, 0.4)), "--thresholds .*lower one comes first"),
    (dict(kl_target=6.0), "--kl_target needs --filter none"),
    (dict(kl_target=6.0, filter="top"), "--kl_target needs --filter none"),
    (dict(kl_target=6.0, rank_weights=(0.25,) * 4), "--kl_target needs --filter none"),
    (dict(minibatch_size=5), "--minibatch_size 5 must divide the kept rows 4 x 2"),
    (dict(total_episodes=8), "--total_episodes 8 is less than one update"),
]


@pytest.mark.parametrize("changes, message", REFUSED, ids=[str(changes) for changes, _ in REFUSED])
def test_bad_input_is_refused_before_a_model_is_loaded(make_args, places, monkeypatch, changes, message):
    # PITFALLS AVG-6, TOK-8 and the rest: one line that names the field; by --dry_run too, which is there to
    # find out, and with no folder left behind
    changes = {k: v.replace("{}", str(places)) if isinstance(v, str) else v for k, v in changes.items()}
    for name in ("load_causal_lm", "load_reward_model"):
        monkeypatch.setattr(pf, name, None)
    for dry_run in (True, False):
        args = make_args(**changes, dry_run=dry_run)
        with pytest.raises(SystemExit, match=f"^{message}") as refusal:
            pf.main(args)
        assert "\n" not in str(refusal.value) and not Path(args.output_dir).exists()


def test_an_error_of_a_function_does_not_suggest_a_model(make_args, world):
    # only --reward may be either
    with pytest.raises(SystemExit) as refusal:
        pf.main(make_args(actual_score="nomodule:f", eval_prompts=world / "eval.jsonl"))
    assert "module:function" in str(refusal.value)
    assert not [
        word for word in ("folder", "model", "hub") if word in str(refusal.value).replace("module", "")
    ]
