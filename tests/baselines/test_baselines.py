"""The baselines of the paper's Table 2: losses against hand-worked numbers and TRL's values, and whole runs
on the tiny world."""

import dataclasses
import functools
import importlib
import inspect
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import tyro
from accelerate.state import AcceleratorState
from conftest import EOS, causal_lm, make_rollout, make_tokenizer, read_metrics, write_jsonl
from transformers import AutoTokenizer

import pfppo_single as pf
import rm_single as rm
from benchmark.baselines import bond, common, dpo, iterative_dpo, kto, raft, tune

NAMES = ("raft", "bond", "dpo", "kto", "iterative_dpo")


def tensor(*values) -> torch.Tensor:
    return torch.tensor(values)


# ---------------------------------------------------------------- DPO, IPO


def test_dpo_sums_over_tokens():  # PITFALLS BL-1
    # sums 3 and -1, β 0.5: -log σ(0.5 · 4) = log(1 + e^-2)
    loss = dpo.preference_loss(tensor(3.0), tensor(-1.0), tensor(2), tensor(4), beta=0.5, loss_type="dpo")
    torch.testing.assert_close(loss, tensor(math.log1p(math.exp(-2.0))))


def test_ipo_means_over_tokens():  # PITFALLS BL-1
    # means 3/2 and -1/4, margin 1.75, target 1/(2 · 0.5) = 1: 0.75² = 0.5625; with sums it would be (4 - 1)²
    # = 9
    loss = dpo.preference_loss(tensor(3.0), tensor(-1.0), tensor(2), tensor(4), beta=0.5, loss_type="ipo")
    torch.testing.assert_close(loss, tensor(0.5625))


def test_dpo_at_the_reference_is_log_two_and_pushes_apart():
    chosen, rejected = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    loss = dpo.preference_loss(chosen, rejected, tensor(3, 5), tensor(4, 4), beta=0.1, loss_type="dpo").sum()
    loss.backward()
    assert loss.item() == pytest.approx(2 * math.log(2))
    torch.testing.assert_close(chosen.grad, tensor(-0.05, -0.05))  # -β σ(0)
    torch.testing.assert_close(rejected.grad, tensor(0.05, 0.05))


# ---------------------------------------------------------------- KTO


def test_kto_loss_by_hand():
    # z = 1, β = 1: chosen with r = 1 -> 1 - σ(0) = 0.5; rejected with r = 1 - log 3 -> 1 - σ(log 3) = 0.25;
    # weights 1 and 2
    logratios = tensor(1.0, 1.0 - math.log(3.0))
    loss = kto.kto_loss(
        logratios,
        tensor(True, False),
        torch.tensor(1.0),
        beta=1.0,
        desirable_weight=1.0,
        undesirable_weight=2.0,
    )
    torch.testing.assert_close(loss, tensor(0.5, 0.5))


def test_kto_gradient_lifts_chosen_and_lowers_rejected():
    logratios = torch.zeros(2, requires_grad=True)
    kto.kto_loss(logratios, tensor(True, False), torch.tensor(0.0), 0.1, 1.0, 1.0).sum().backward()
    torch.testing.assert_close(logratios.grad, tensor(-0.025, 0.025))  # β σ(0)(1 - σ(0))


def test_kto_kl_is_clamped_at_zero_and_detached():  # PITFALLS BL-2
    logprobs = tensor(-1.0, -2.0, -3.0).requires_grad_()
    above = kto.shifted_kl(logprobs, tensor(-2.0, -3.0, -5.0))
    assert above.item() == pytest.approx(4 / 3) and not above.requires_grad
    assert kto.shifted_kl(logprobs, tensor(0.0, 0.0, 0.0)).item() == 0.0


def test_kto_clamps_the_mean_and_not_every_response():  # PITFALLS BL-2
    # log-ratios +3 and -1: mean 1; clamped one by one it would be 1.5
    assert kto.shifted_kl(tensor(3.0, -1.0), tensor(0.0, 0.0)).item() == pytest.approx(1.0)


@pytest.mark.parametrize("prompt_ids", [[0, 1], [4, 4, 9, 9], [0, 1, 2, 0, 3, 1, 0], [5, 5, 5, 1, 2, 3]])
def test_kto_pairs_are_mismatched_and_use_every_response_once(prompt_ids):  # PITFALLS BL-2
    ids = torch.tensor(prompt_ids)
    other = kto.mismatched_rows(ids)
    assert sorted(other.tolist()) == list(range(len(ids)))  # full batch size, each response once
    assert (ids[other] != ids).all()


def test_kto_refuses_a_batch_that_cannot_be_mismatched():
    with pytest.raises(SystemExit, match="raise --batch_size"):
        kto.mismatched_rows(tensor(1, 1, 1, 2))


# ---------------------------------------------------------------- RAFT


def test_raft_keeps_the_best_of_every_prompt():
    scores, ids = tensor(0.1, 0.9, 0.5, -0.2, -0.8, -0.1), tensor(0, 0, 0, 1, 1, 1)
    assert raft.best_rows(scores, ids, torch.Generator().manual_seed(0)).tolist() == [1, 5]


def test_raft_drops_a_prompt_whose_responses_never_stop():
    scores, ids = tensor(-torch.inf, -torch.inf, -torch.inf, 0.2), tensor(0, 0, 1, 1)
    assert raft.best_rows(scores, ids, torch.Generator().manual_seed(0)).tolist() == [3]


def test_raft_breaks_ties_at_random():
    scores, ids = torch.zeros(4), torch.zeros(4, dtype=torch.long)
    picks = {raft.best_rows(scores, ids, torch.Generator().manual_seed(seed)).item() for seed in range(30)}
    assert picks == {0, 1, 2, 3}


def test_raft_loss_is_per_token():
    assert raft.supervised_loss(tensor(-6.0, -2.0), num_tokens=4).item() == pytest.approx(2.0)


# ---------------------------------------------------------------- BOND


def test_bond_quantiles_by_hand():
    # anchor's scores 1 2 3: 0.5 is above none of them, 2 above two (itself a tie), 9 above all; each counts
    # itself too
    logq = bond.log_quantiles(tensor([0.5, 2.0, 9.0]), tensor([1.0, 2.0, 3.0]))
    torch.testing.assert_close(logq.exp(), tensor([0.25, 0.75, 1.0]))


def test_bond_quantiles_stay_within_their_prompt():
    logq = bond.log_quantiles(tensor([1.0], [1.0]), tensor([0.0, 0.0], [2.0, 2.0]))
    torch.testing.assert_close(logq.exp(), tensor([1.0], [1 / 3]))


def test_bond_costs_by_hand():
    # log π = -1, log π_anchor = -2, p_≤ = 1/2, N = 5: 1 + 4 log 2
    cost = bond.backward_kl_costs(tensor([-1.0]), tensor([-2.0]), tensor([math.log(0.5)]), 5)
    torch.testing.assert_close(cost, tensor([1 + 4 * math.log(2)]))


def test_bond_baseline_leaves_the_response_out():
    # costs 1 2 6: baselines 4, 3.5, 1.5; loss = mean of log π · (cost - baseline)
    loss = bond.backward_kl_loss(tensor([-1.0, -2.0, -3.0]), tensor([1.0, 2.0, 6.0]))
    assert loss.item() == pytest.approx((-1 * -3.0 + -2 * -1.5 + -3 * 4.5) / 3)


def enumerated(logits: torch.Tensor, anchor: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Three possible responses with rewards 0 < 1 < 2: log π (3,) and log π_BoN up to a constant (3,)."""
    quantile = anchor.cumsum(0)
    return logits.log_softmax(0), anchor.log() + (n - 1) * quantile.log()


def test_bond_backward_gradient_is_that_of_the_exact_divergence():
    logits, anchor, n = tensor(0.3, -0.2, 0.5).requires_grad_(), tensor(0.5, 0.3, 0.2), 4
    logprobs, target = enumerated(logits, anchor, n)
    exact = torch.autograd.grad((logprobs.exp() * (logprobs - target)).sum(), logits)[0]
    logprobs, _ = enumerated(logits, anchor, n)
    costs = bond.backward_kl_costs(logprobs, anchor.log(), anchor.cumsum(0).log(), n)
    surrogate = sum(
        p.detach() * bond.backward_kl_loss(lp.view(1, 1), c.view(1, 1))
        for p, lp, c in zip(logprobs.exp(), logprobs, costs)
    )
    torch.testing.assert_close(torch.autograd.grad(surrogate, logits)[0], exact)


def test_bond_cost_is_constant_at_its_target():
    anchor, n = tensor(0.5, 0.3, 0.2), 4
    target = enumerated(torch.zeros(3), anchor, n)[1].log_softmax(0)
    costs = bond.backward_kl_costs(target, anchor.log(), anchor.cumsum(0).log(), n)
    torch.testing.assert_close(costs, costs[0].expand(3))


def test_bond_forward_loss_is_the_likelihood_of_the_best():
    assert bond.forward_kl_loss(tensor(-1.0, -4.0)).item() == pytest.approx(2.5)


# ---------------------------------------------------------------- Iterative DPO


def test_iterative_dpo_pairs_best_with_worst_and_drops_ties():
    scores = tensor(0.1, 0.9, 0.5, 0.3, 0.3, 0.3, -torch.inf, 0.0, 0.2)
    ids = tensor(0, 0, 0, 1, 1, 1, 2, 2, 2)
    best, worst = iterative_dpo.best_and_worst(scores, ids, torch.Generator().manual_seed(0))
    assert best.tolist() == [1, 8] and worst.tolist() == [0, 6]


# ---------------------------------------------------------------- sequence log-probabilities


def test_sequence_logprob_excludes_prompt_and_padding():  # PITFALLS BL-3
    model, rollout = causal_lm("llama"), make_rollout([3, 7], [5, 2])
    got = common.sequence_logprobs(model, rollout, tensor(0, 1), 1.0)
    for i in range(2):
        query = rollout["queries"][i][rollout["query_mask"][i]]
        response = rollout["responses"][i][rollout["response_mask"][i]]
        logits = model(torch.cat([query, response]).unsqueeze(0)).logits[0, len(query) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, response.unsqueeze(1)).sum()
        torch.testing.assert_close(got[i], expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_sequence_logprob_unchanged_by_padding(name):  # PITFALLS BL-3
    model, rollout = causal_lm(name), make_rollout([3, 9, 4], [5, 2, 8])
    together = common.sequence_logprobs(model, rollout, tensor(0, 1, 2), 1.0)
    alone = torch.cat([common.sequence_logprobs(model, rollout, tensor(i), 1.0) for i in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-5)


def test_sequence_logprob_agrees_with_scoring_without_gradient_and_has_one():
    model, rollout = causal_lm("gpt2"), make_rollout([3, 9, 4], [5, 2, 8])
    got = common.sequence_logprobs(model, rollout, tensor(0, 1, 2), 0.7)
    torch.testing.assert_close(
        got, pf.response_logprobs_and_values(model, rollout, 0.7, 2)[0].sum(1), atol=1e-4, rtol=1e-5
    )
    assert got.requires_grad


def pair_args(world: Path, folder: Path, **changes):
    rows = [{"prompt": f"sum {i} of", "chosen": f"ab{i}", "rejected": f"xyz={i}"} for i in range(6)]
    path = write_jsonl(folder / "pairs.jsonl", rows)
    return dpo.Args(
        policy=str(world / "gpt2"),
        train_data=str(path),
        output_dir=str(folder / "run"),
        query_length=16,
        response_length=8,
        **changes,
    )


def read_pairs(args, tokenizer) -> list[dict]:
    return common.read_pairs(args, tokenizer, pf.load_config(args.policy, "policy"), tokenizer.eos_token_id)


def test_pair_ids_are_prompt_ids_then_response_ids(world, tmp_path):  # PITFALLS BL-3
    args, tokenizer = pair_args(world, tmp_path), make_tokenizer(bos=True)
    rows, pairs = pf.load_rows(args.train_data, "train_data"), read_pairs(args, tokenizer)
    rollout = common.pair_rollout(pairs, "cpu")
    ids, mask = (torch.cat([rollout[a], rollout[b]], 1) for a, b in PARTS)
    texts = [(row["prompt"], row[name]) for name in ("chosen", "rejected") for row in rows]
    for (prompt, text), row, real in zip(texts, ids, mask, strict=True):
        response = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        assert row[real].tolist() == pf.encode_prompt(tokenizer, prompt) + response


PARTS = (("queries", "responses"), ("query_mask", "response_mask"))


def test_a_rollout_of_pairs_is_padded_as_one_that_was_sampled():
    rollout = common.make_rollout([[5], [6, 7]], [[1, 2, EOS], [3, EOS]], "cpu")
    assert rollout["query_mask"].tolist() == [[False, True], [True, True]]
    assert rollout["response_mask"].tolist() == [[True] * 3, [True, True, False]]
    assert rollout["responses"][rollout["response_mask"]].tolist() == [1, 2, EOS, 3, EOS]


def test_pairs_with_a_long_response_are_left_out(world, tmp_path):
    args, tokenizer = pair_args(world, tmp_path), make_tokenizer()
    rows = [{"prompt": "a", "chosen": "b" * n, "rejected": "c"} for n in (4, 5, 3)]
    write_jsonl(Path(args.train_data), rows)
    args.response_length = 5  # the stop token included
    assert [len(pair["samples"][0]) for pair in read_pairs(args, tokenizer)] == [5, 4]
    args.response_length = 1
    with pytest.raises(SystemExit, match="raise it"):
        read_pairs(args, tokenizer)


# ---------------------------------------------------------------- TRL's values on the same inputs


@pytest.fixture
def trl(monkeypatch):
    """TRL, or a skip; its trainers compute the loss of a policy and a reference that differ, on the CPU."""
    found = pytest.importorskip("trl", reason="TRL is an optional extra: pip install -e .[trl]")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    return found


TRL_PAIRS = [
    {"prompt": "sum of", "chosen": " ab", "rejected": " xyz="},
    {"prompt": "max", "chosen": " qrst", "rejected": " u"},
    {"prompt": "one two", "chosen": " v1", "rejected": " w22"},
    {"prompt": "rev", "chosen": " 333", "rejected": " 4"},
]


def from_trl(batch: dict, prefix: str = "") -> dict[str, torch.Tensor]:
    """A TRL batch (whole sequences, a mask of the completion) -> rollout."""
    ids, mask, completion = (
        batch[prefix + name] for name in ("input_ids", "attention_mask", "completion_mask")
    )
    queries = [row[(m == 1) & (c == 0)].tolist() for row, m, c in zip(ids, mask, completion)]
    return common.make_rollout(queries, [row[c == 1].tolist() for row, c in zip(ids, completion)], "cpu")


def trl_trainer(trainer, config, folder, data, **settings):
    from datasets import Dataset

    args = config(
        output_dir=str(folder),
        per_device_train_batch_size=len(data),
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        **settings,
    )
    return trainer(
        model=causal_lm("llama", 0, attention_dropout=0.0),
        ref_model=causal_lm("llama", 5, attention_dropout=0.0),
        args=args,
        train_dataset=Dataset.from_list(data),
        processing_class=make_tokenizer(),
    )


@pytest.mark.parametrize("loss_type", ["dpo", "ipo"])
def test_preference_loss_equals_trl(trl, tmp_path, loss_type):  # PITFALLS BL-1
    trainer = trl_trainer(
        trl.DPOTrainer,
        trl.DPOConfig,
        tmp_path,
        TRL_PAIRS,
        beta=0.1,
        loss_type={"dpo": "sigmoid"}.get(loss_type, loss_type),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    expected = trainer.compute_loss(trainer.model, dict(batch)).detach()
    rollout, rows = from_trl(batch), torch.arange(2 * len(TRL_PAIRS))
    logratios = common.sequence_logprobs(trainer.model, rollout, rows, 1.0) - common.sequence_logprobs(
        trainer.ref_model, rollout, rows, 1.0
    )
    lengths = rollout["response_mask"].sum(1)
    ours = dpo.preference_loss(*logratios.chunk(2), *lengths.chunk(2), 0.1, loss_type).mean()
    torch.testing.assert_close(ours.detach(), expected, atol=1e-5, rtol=1e-5)


def test_kto_loss_equals_trl(trl, tmp_path):  # PITFALLS BL-2
    data = [
        {"prompt": p["prompt"], "completion": p[name], "label": name == "chosen"}
        for p in TRL_PAIRS
        for name in ("chosen", "rejected")
    ]
    trainer = trl_trainer(
        trl.KTOTrainer, trl.KTOConfig, tmp_path, data, beta=0.1, desirable_weight=1.0, undesirable_weight=1.5
    )
    batch = next(iter(trainer.get_train_dataloader()))
    expected = trainer.compute_loss(trainer.model, dict(batch)).detach()
    rows, rollout, mismatched = torch.arange(len(data)), from_trl(batch), from_trl(batch, "KL_")
    policy, reference = (
        [common.sequence_logprobs(m, r, rows, 1.0) for r in (rollout, mismatched)]
        for m in (trainer.model, trainer.ref_model)
    )
    kl = kto.shifted_kl(policy[1], reference[1])
    assert kl > 0  # else the clamp would hide which pairs it is over
    ours = kto.kto_loss(policy[0] - reference[0], torch.as_tensor(batch["label"]), kl, 0.1, 1.0, 1.5).mean()
    torch.testing.assert_close(ours.detach(), expected, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- whole runs on the tiny world


REWARD = (
    "def reward(prompts, responses, rows):\n    return [len(set(r)) + 0.01 * len(r) for r in responses]\n"
)
SCORE = "def passed(prompts, responses, rows):\n    return [float('a' in r) for r in responses]\n"
SIZES = {
    "raft": dict(total_episodes=24, batch_size=4, num_responses=3, minibatch_size=2),
    "bond": dict(
        total_episodes=64, batch_size=4, iterations=2, checkpoint_every=1, num_responses=2, policy_responses=2
    ),
    "dpo": dict(batch_size=4, epochs=2),
    "kto": dict(batch_size=8, epochs=2, checkpoint_every=2),
    "iterative_dpo": dict(total_episodes=54, num_responses=3, batch_size=4, checkpoint_every=2),
}


@pytest.fixture(scope="module")
def launch(world, tmp_path_factory):
    """launch(name, output folder, **changes) -> (metrics, folder): the whole of a baseline's main, in this
    process."""
    folder = tmp_path_factory.mktemp("baselines")
    (folder / "tiny_reward.py").write_text(REWARD)
    (folder / "tiny_score.py").write_text(SCORE)
    pairs = [
        {"prompt": f"sum {i} of", "chosen": "ab" + "c" * (i % 3), "rejected": "xyz=" + "2" * (i % 2)}
        for i in range(10)
    ]
    settings = dict(
        policy=str(world / "gpt2"),
        reward="tiny_reward:reward",
        actual_score="tiny_score:passed",
        eval_prompts=str(world / "eval.jsonl"),
        query_length=16,
        response_length=8,
        forward_batch_size=16,
        micro_batch_size=3,
        lr=3e-3,
    )
    train_data = dict(train_data=str(write_jsonl(folder / "pairs.jsonl", pairs)))

    def run(name: str, output_dir: Path, **changes):
        script = importlib.import_module(f"benchmark.baselines.{name}")
        data = train_data if name in ("dpo", "kto") else dict(prompts=str(world / "prompts.jsonl"))
        changes = SIZES[name] | changes
        script.main(script.Args(output_dir=str(output_dir), **{**settings, **data, **changes}))
        return [] if changes.get("dry_run") else read_metrics(output_dir), output_dir

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield run


@pytest.fixture
def start(launch, tmp_path):
    """start(name, output folder, **changes) -> (metrics, folder)."""
    return lambda name, output, **changes: launch(name, tmp_path / output, **changes)


@pytest.fixture(scope="module")
def finished(launch, tmp_path_factory):
    """finished(name) -> (metrics, folder) of a run without changes, made once."""
    return functools.cache(lambda name: launch(name, tmp_path_factory.mktemp(name) / "run"))


UNEVALUATED = dict(eval_prompts=None, actual_score=None)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return pf.load_causal_lm(str(folder)).state_dict()


@pytest.mark.parametrize(
    "name, episodes", [("raft", 24), ("bond", 64), ("dpo", 0), ("kto", 0), ("iterative_dpo", 54)]
)
def test_run_leaves_what_pfppo_leaves(name, episodes, finished, world):
    metrics, folder = finished(name)
    expected = {
        f"eval/{kind}_{what}"
        for kind in ("greedy", "sampled")
        for what in ("pass1", "reward", "length", "truncated")
    } | {"eval/kl"}
    assert expected <= set(metrics[0]) and expected <= set(metrics[-1])
    assert metrics[0]["eval/kl"] == 0.0 and metrics[-1]["eval/kl"] != 0.0
    assert [row["step"] for row in metrics] == list(range(len(metrics)))
    steps = [row["optimizer_step"] for row in metrics]
    assert steps[0] == 0 and steps == sorted(steps) and steps[-1] >= 4
    assert metrics[-1]["episodes"] == episodes  # what was generated for training, not for evaluation
    before, after = weights(world / "gpt2"), weights(folder / "policy")
    assert any(not torch.equal(before[k], after[k]) for k in before)
    assert weights(folder / "policy_best").keys() == after.keys()
    assert (folder / "policy" / "tokenizer.json").is_file()


@pytest.fixture
def bf16(monkeypatch):
    """As under accelerate launch --mixed_precision bf16."""
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("name, loss", [("dpo", "dpo"), ("dpo", "ipo"), ("kto", None)])
def test_bf16_trains_float32_weights_to_nearly_the_same_loss(name, loss, start, request):
    # the first step is at the reference: policy and reference are rounded alike, so its loss is float32's
    changes = UNEVALUATED | {"lr": 1e-3, "epochs": 1} | ({"loss_type": loss} if loss else {})
    expected, _ = start(name, "float32", **changes)
    request.getfixturevalue("bf16")
    metrics, folder = start(name, "bf16", **changes)
    assert weights(folder / "policy")[NAME].dtype == torch.float32
    losses, others = ([row["train/loss"] for row in rows] for rows in (metrics, expected))
    assert losses[0] == pytest.approx(others[0], rel=0.03) and losses != others
    assert losses == pytest.approx(others, rel=0.1, abs=0.05)


@pytest.mark.parametrize("name, episodes", [("raft", 12), ("bond", 32), ("iterative_dpo", 36)])
def test_bf16_samples_and_trains(name, episodes, start, bf16, world):
    metrics, folder = start(name, "run", total_episodes=episodes)
    assert metrics[0]["eval/kl"] == 0 and all(math.isfinite(x) for row in metrics for x in row.values())
    before, after = weights(world / "gpt2"), weights(folder / "policy")
    assert after[NAME].dtype == torch.float32 and not torch.equal(before[NAME], after[NAME])


# anchor, batches, pairs; the rest is common.py's
@pytest.mark.parametrize("name", ["bond", "kto", "iterative_dpo"])
def test_a_killed_run_continues_to_the_same_policy(name, start, finished, monkeypatch):
    whole, whole_folder = finished(name)
    end_step, kill_at = common.Run.end_step, len(whole) - 2  # before the last step

    def killed(run, metrics, checkpoint=False):
        end_step(run, metrics, checkpoint)
        if run.state["step"] == kill_at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(common.Run, "end_step", killed)
        start(name, "killed")
    resumed, folder = start(name, "killed")
    drop = ("seconds/update", "seconds/evaluate")
    assert [{k: v for k, v in r.items() if k not in drop} for r in resumed] == [
        {k: v for k, v in r.items() if k not in drop} for r in whole
    ]
    expected, got = weights(whole_folder / "policy"), weights(folder / "policy")
    assert all(torch.equal(expected[k], got[k]) for k in expected)


@pytest.mark.parametrize("name", ["dpo", "kto", "bond"])
def test_micro_batches_change_nothing(name, start):
    settings = UNEVALUATED | ({} if name == "bond" else {"epochs": 1})
    kept = [
        weights(start(name, f"micro{size}", micro_batch_size=size, **settings)[1] / "policy")
        for size in (2, 100)
    ]
    for key in kept[0]:
        torch.testing.assert_close(kept[0][key], kept[1][key], atol=2e-5, rtol=1e-4)


def test_best_policy_is_the_best_on_the_evaluation_prompts(finished):
    metrics, folder = finished("raft")
    state = json.loads(next((folder / "checkpoints").glob("step_*/state.json")).read_text())
    scores = [row["eval/greedy_pass1"] for row in metrics]
    assert state["best"] == max(scores)
    if scores.index(max(scores)) == len(scores) - 1:
        assert torch.equal(*(weights(folder / name)[NAME] for name in ("policy", "policy_best")))


NAME = "transformer.h.0.attn.c_attn.weight"


def test_without_a_reward_pairs_are_evaluated_by_the_actual_score_alone(start):
    tags = set(start("dpo", "run", reward=None, epochs=1)[0][-1])
    assert "eval/greedy_pass1" in tags and not {tag for tag in tags if tag.endswith("_reward")}


def test_bond_goes_on_where_no_response_of_the_anchor_stops(start, monkeypatch):
    stop_masks = pf.stop_masks
    monkeypatch.setattr(pf, "stop_masks", lambda *x: (stop_masks(*x)[0], stop_masks(*x)[1] & False))
    metrics, _ = start("bond", "run", **UNEVALUATED)
    assert all(row["objective/truncated"] == 1 and row["bond/forward"] == 0 for row in metrics)
    assert [row["optimizer_step"] for row in metrics] == [1, 2, 3, 4]


def test_bond_anchor_moves_only_between_iterations(start, monkeypatch):
    seen, sample = [], common.Run.sample

    def watch(run, *args, model=None, **rest):
        if model is not None:
            same = all(torch.equal(a, b) for a, b in zip(run.anchor.parameters(), run.policy.parameters()))
            seen.append((run.state["step"], same))
        return sample(run, *args, model=model, **rest)

    monkeypatch.setattr(common.Run, "sample", watch)
    # 6 updates: the anchor is the policy at updates 0 and 3
    start("bond", "run", total_episodes=96, **UNEVALUATED)
    assert seen == [(0, True), (1, False), (2, False), (3, True), (4, False), (5, False)]


def test_iterative_dpo_makes_pairs_by_reward_from_the_last_policy(finished):
    _, folder = finished("iterative_dpo")
    pairs = [
        [json.loads(line) for line in (folder / f"pairs_{i}.jsonl").read_text().splitlines()]
        for i in (1, 2, 3)
    ]
    for pair in sum(pairs, []):
        score = {name: len(set(pair[name])) + 0.01 * len(pair[name]) for name in ("chosen", "rejected")}
        assert pair["chosen_reward"] == pytest.approx(score["chosen"], abs=1e-5)
        stopped = [sample[-1] == EOS for sample in pair["samples"]]
        assert stopped[0] and (not stopped[1] or score["chosen"] > score["rejected"])
    assert len({json.dumps(part) for part in pairs}) == 3


def test_the_learned_reward_scores_as_pfppo_scores_it(world, start, make_args):
    metrics, _ = start("raft", "run", reward=str(world / "reward"), total_episodes=12)
    args, tokenizer = make_args(eval_prompts=world / "eval.jsonl"), make_tokenizer()
    rows, policy = pf.read_prompts("eval_prompts", args, tokenizer), pf.load_causal_lm(args.policy).eval()
    rollout = pf.sample_rollout(policy, rows, 1, 0.0, args, EOS, None)
    expected = pf.reward_model_scores(pf.load_reward_model(args.reward).eval(), rollout, 4).mean().item()
    assert metrics[0]["eval/greedy_reward"] == pytest.approx(expected, abs=1e-5)


# ---------------------------------------------------------------- refusals


def test_folder_of_another_run_is_refused(start):
    start("kto", "run", **UNEVALUATED, epochs=1)
    with pytest.raises(SystemExit, match="holds another run: seed"):
        start("kto", "run", **UNEVALUATED, epochs=1, seed=2)


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("dpo", {"policy": "nowhere"}, "--policy nowhere"),
        ("dpo", {"train_data": "nowhere.jsonl"}, "--train_data nowhere.jsonl"),
        ("dpo", {"beta": 0.0}, "--beta must lie between"),
        ("dpo", {"batch_size": 0}, "--batch_size must lie between"),
        ("dpo", {"eval_prompts": None}, "--actual_score needs --eval_prompts"),
        ("dpo", {"stop_token": "9999"}, "--stop_token: the model has"),
        ("kto", {"eval_prompts": "nowhere.jsonl"}, "--eval_prompts nowhere.jsonl"),
        ("raft", {"response_length": 200}, "--policy: the model has 128 positions"),
        ("raft", {"reward": "nowhere"}, "--reward nowhere"),
        ("raft", {"num_responses": 1}, "--num_responses must lie between 2"),
        ("raft", {"total_episodes": 5}, "at least one round"),
        ("bond", {"total_episodes": 16}, "at least 2 updates"),
        ("iterative_dpo", {"num_responses": 1}, "--num_responses must lie between 2"),
        ("iterative_dpo", {"total_episodes": 8}, "--total_episodes must be at least 9"),
    ],
)
def test_bad_settings_are_refused_before_a_folder_is_written(name, changes, message, start, tmp_path):
    with pytest.raises(SystemExit, match=message):
        start(name, "refused", **changes)
    assert not (tmp_path / "refused").exists()


def test_a_policy_is_no_reward_model(world, start):
    with pytest.raises(SystemExit, match="a GPT2LMHeadModel is no reward model"):
        start("raft", "refused", reward=str(world / "gpt2"))


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "a", "chosen": "b"}, "row 2: no column rejected"),
        ({"chosen": "b", "rejected": "c"}, "row 2: no column prompt"),
        ({"prompt": "a", "chosen": "b", "rejected": 3}, "row 2: rejected must be a text"),
        ({"query": [5], "sample0": [6], "sample1": [7], "best": 0}, "row 2: no column chosen"),
    ],
)
def test_bad_pairs_are_refused_with_file_and_row(row, message, start, tmp_path):
    path = write_jsonl(tmp_path / "bad.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}, row])
    with pytest.raises(SystemExit, match=f"bad.jsonl, {message}"):
        start("dpo", "refused", train_data=str(path))


def test_labels_that_are_token_ids_are_refused(start, tmp_path):
    path = write_jsonl(tmp_path / "ids.jsonl", [{"query": [5], "sample0": [6], "sample1": [7], "best": 0}])
    with pytest.raises(SystemExit, match="ids.jsonl: labels are token ids"):
        start("dpo", "refused", train_data=str(path))


def test_pairs_are_read_in_the_forms_of_the_three_scripts(start, tmp_path):
    texts = [
        {"prompt": [{"role": "user", "content": f"sum {i}"}], "chosen": "ab", "rejected": "c"}
        for i in range(4)
    ]
    messages = []
    for row in texts:
        answers = {name: [{"role": "assistant", "content": row[name]}] for name in ("chosen", "rejected")}
        messages.append({name: [*row["prompt"], *answer] for name, answer in answers.items()})
    found, settings = [], dict(UNEVALUATED, epochs=1)
    for name, rows in (("texts", texts), ("messages", messages)):
        path = write_jsonl(tmp_path / f"{name}.jsonl", rows)
        found.append(
            start("dpo", name, train_data=str(path), batch_size=2, eval_data=str(path), **settings)[0]
        )
    tags = ("train/loss", "train/accuracy", "eval/margin")
    assert [[row.get(tag) for tag in tags] for row in found[0]] == [
        [row.get(tag) for tag in tags] for row in found[1]
    ]


TEMPLATE = "{% for m in messages %}{{ m['role'] }}={{ m['content'] }}\n{% endfor %}"


@pytest.fixture
def chats(tmp_path) -> dict[str, str]:
    """Files that serve as every kind of data, and a template that is not the tokenizer's own."""
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    row = {"prompt": [{"role": "user", "content": "two"}], "chosen": "good", "rejected": "bad"}
    data = str(write_jsonl(tmp_path / "chats.jsonl", [row] * 8))
    return dict(
        train_data=data, eval_data=data, eval_prompts=data, chat_template=str(tmp_path / "chat.jinja")
    )


def test_messages_are_read_in_the_template_of_a_file(world, tmp_path, chats):
    settings = dict(policy=str(world / "gpt2"), output_dir=str(tmp_path / "run"), log_with="none")
    run = common.Run(dpo.Args(**settings, **chats))
    queries = [run.eval_rows[0]["query_ids"], run.eval_pairs[0]["query"]]
    assert [run.tokenizer.decode(ids) for ids in queries] == ["user=two\n"] * 2


def test_the_template_is_saved_with_the_policy(start, chats):
    _, folder = start("dpo", "run", **{**chats, **UNEVALUATED, "eval_data": None, "epochs": 1})
    assert AutoTokenizer.from_pretrained(folder / "policy").chat_template == TEMPLATE


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_held_out_pairs_are_told_apart_better_with_training(name, start, tmp_path):
    rows = [{"prompt": f"one {i}", "chosen": "abc", "rejected": "xyz=2"} for i in range(6)]
    path = write_jsonl(tmp_path / "held_out.jsonl", rows)
    metrics, _ = start(name, "run", eval_data=str(path), **UNEVALUATED)
    assert metrics[0]["eval/accuracy"] == 0.5 and metrics[0]["eval/margin"] == 0.0  # the reference itself
    assert metrics[-1]["eval/margin"] > 0 and metrics[-1]["eval/accuracy"] > 0.9


def test_held_out_margin_by_hand(start, tmp_path):
    row = {"prompt": "one", "chosen": "ab", "rejected": "xyz"}
    path = write_jsonl(tmp_path / "one.jsonl", [row])
    metrics, folder = start("dpo", "run", eval_data=str(path), epochs=1, **UNEVALUATED)
    settings = json.loads((folder / "args.json").read_text())
    policy, reference = (pf.load_causal_lm(p).eval() for p in (str(folder / "policy"), settings["policy"]))
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    logratios = []
    for text in (row["chosen"], row["rejected"]):
        ids = tokenizer(row["prompt"])["input_ids"] + tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
        start_of_answer, ids = len(tokenizer(row["prompt"])["input_ids"]), torch.tensor([ids])
        sums = []
        for model in (policy, reference):
            logprobs = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
            sums.append(logprobs[start_of_answer - 1 :].sum().item())
        logratios.append(sums[0] - sums[1])
    assert metrics[-1]["eval/margin"] == pytest.approx(logratios[0] - logratios[1], abs=1e-4)


@pytest.mark.parametrize(
    "batch_size, epochs, said",
    [(5, 1, "2 optimizer steps of 5: training sees a pair once"), (64, 1, "a pair 6 or 7 times")],
)
def test_a_run_says_how_often_it_sees_a_pair(batch_size, epochs, said, start, capsys):
    start("dpo", "run", batch_size=batch_size, epochs=epochs, dry_run=True)
    assert said in capsys.readouterr().out


def test_what_fills_no_batch_and_what_stands_twice_is_said(start, tmp_path, capsys):
    rows = [{"prompt": f"one {i % 9}", "chosen": "abc", "rejected": "xyz"} for i in range(10)]
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    start("dpo", "run", train_data=str(path), batch_size=4, epochs=1, dry_run=True)
    out = capsys.readouterr().out
    assert "10 pairs of 9 prompts, 0 longer ones left out, 1 are repetitions of another" in out
    assert "a pair 0 or 1 times; 2 of 10 never" in out


def test_several_processes_are_refused(world, tmp_path, monkeypatch):
    monkeypatch.setattr(pf.Accelerator, "num_processes", 2)
    with pytest.raises(SystemExit, match="one process"):
        common.Run(pair_args(world, tmp_path))


def test_fp16_is_refused(world, tmp_path, monkeypatch):
    fake = SimpleNamespace(num_processes=1, scaler=object())
    monkeypatch.setattr(pf, "start_accelerator", lambda *_: fake)
    with pytest.raises(SystemExit, match="--mixed_precision bf16 or no, not fp16"):
        common.Run(pair_args(world, tmp_path))


def test_nan_loss_stops_the_run_and_keeps_the_checkpoint(start, monkeypatch, tmp_path):
    loss = dpo.preference_loss
    calls = []
    monkeypatch.setattr(
        dpo,
        "preference_loss",
        lambda *x: loss(*x) * (float("nan") if len(calls) > 5 else 1.0) + 0 * len(calls.append(1) or []),
    )
    with pytest.raises(FloatingPointError, match="step 4.*lower the learning rate"):
        start("dpo", "run", micro_batch_size=2, checkpoint_every=1, **UNEVALUATED)
    assert (tmp_path / "run" / "checkpoints" / "step_000003").is_dir()


@pytest.mark.parametrize("name", NAMES)
def test_every_field_is_read_and_documented(name):
    script = importlib.import_module(f"benchmark.baselines.{name}")
    modules = (common, script, dpo, raft)
    source = "\n".join(map(inspect.getsource, modules))
    read = source + inspect.getsource(pf) + inspect.getsource(rm)  # whose functions get the same settings
    for field in dataclasses.fields(script.Args):
        assert f"args.{field.name}" in read or f'"{field.name}", args' in read, field.name
        assert source.split(f"    {field.name}: ")[1].split("\n")[1].strip().startswith('"""'), field.name


@pytest.mark.parametrize("name", (*NAMES, "tune"))
def test_the_command_line_wants_what_has_no_default(name, capsys):
    script = importlib.import_module(f"benchmark.baselines.{name}")
    with pytest.raises(SystemExit):
        tyro.cli(script.Args, args=[], use_underscores=True)
    missing = capsys.readouterr().err
    needed = {"tune": ("world",), "dpo": ("policy", "train_data"), "kto": ("policy", "train_data")}
    for field in needed.get(name, ("policy", "reward", "prompts")):
        assert f"--{field}" in missing


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({}, 2.0),
        ({2.0: 0.5}, 1.0),
        ({2.0: 0.5, 1.0: 0.4}, 4.0),
        ({1.0: 0.4, 2.0: 0.5, 4.0: 0.3}, None),  # neighbours on both sides
        ({1.0: 0.4, 2.0: 0.5, 4.0: 0.6}, 8.0),
        ({1.0: 0.7, 2.0: 0.5, 4.0: 0.6}, 0.5),  # beyond the edge
        ({1.0: 0.4, 2.0: 0.5, 4.0: 0.6, 8.0: 0.7, 16.0: 0.8}, None),  # the budget of five
    ],
)
def test_the_grid_goes_on_beyond_the_edge_where_the_best_rate_lies(found, expected):
    assert tune.next_rate((1.0, 2.0, 4.0), found) == expected


def test_the_smallest_rate_within_one_standard_error_is_chosen():
    # standard error of .6 on 96 problems: sqrt(.24 / 96) = .05
    assert tune.chosen({1.0: 0.54, 2.0: 0.551, 4.0: 0.6, 8.0: 0.59}, 96) == 2.0
