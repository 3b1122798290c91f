"""Feed the recorded samples and weights of lm-human-preference-details to our shipped functions and compare
every tensor.

  python benchmark/compare_reference.py FOLDER

FOLDER holds `model/`, `reward_model.safetensors`, `queries.jsonl`, `labels.json`, `hyperparameters.json` and
the traces `trace_policy*.safetensors` and `trace_reward*.safetensors`. No other setting is needed: the
architecture, the hyperparameters and the number of updates, epochs, minibatches and steps are read from these
files. Prints the largest difference per tensor; exit status 1 when a tolerance is passed, a number is not
finite, or a recorded tensor was not tested.

Every function is fed recorded inputs where its inputs were recorded, so an error shows where it is made.
Between two recorded sets of weights the optimizer steps are ours, so they accumulate.

Tolerances: 1e-5 for forward quantities, 1e-6 for weights, exact for ids. A clip fraction may differ by two
tokens (a tie decided by rounding). What passes its tolerance is computed again with another attention kernel;
a difference up to ten times that between our own two kernels, and at most ten tolerances, is rounding: it is
marked so and passes.
"""

import argparse
import dataclasses
import functools
import json
import math
import re
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer

import pfppo_single as pfppo
import rm_single as rm
from benchmark.lm_human_preferences.import_reference import load_recorded, reward_model_from, reward_names

FORWARD, WEIGHTS, EXACT, SCHEDULE = 1e-5, 1e-6, 0.0, 1e-9
ROUNDING_FACTOR, ROUNDING_LIMIT = 10, 10

# lm-human-preference-details' name -> our field of Args, both scripts
POLICY_FIELDS = {
    "task.response_length": "response_length",
    "task.temperature": "temperature",
    "task.truncate_token": "stop_token",
    "task.truncate_after": "stop_after",
    "task.penalty_reward_value": "missing_stop_score",
    "rewards.kl_coef": "kl_coef",
    "rewards.adaptive_kl.target": "kl_target",
    "rewards.adaptive_kl.horizon": "kl_horizon",
    "ppo.total_episodes": "total_episodes",
    "ppo.noptepochs": "noptepochs",
    "ppo.lr": "lr",
    "ppo.eps": "eps",
    "ppo.vf_coef": "vf_coef",
    "ppo.cliprange": "cliprange",
    "ppo.cliprange_value": "cliprange_value",
    "ppo.gamma": "gamma",
    "ppo.lam": "lam",
    "ppo.whiten_rewards": "whiten_rewards",
}
REWARD_FIELDS = {
    "lr": "lr",
    "eps": "eps",
    "local_batch_size": "batch_size",
    "labels.num_train": "num_train",
    "task.response_length": "response_length",
    "task.temperature": "temperature",
    "normalize_before": "normalize_before",
    "normalize_after": "normalize_after",
}
STAT_TAGS = {
    "pg_loss": "ppo/loss/policy",
    "vf_loss": "ppo/loss/value",
    "loss": "ppo/loss/total",
    "entropy": "ppo/policy/entropy",
    "approxkl": "ppo/policy/approxkl",
    "clipfrac": "ppo/policy/clipfrac",
    "ratio_mean": "ppo/policy/ratio",
    "vf_clipfrac": "ppo/val/clipfrac",
}


# ---------------------------------------------------------------- settings


def flatten(nested: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat = {}
    for key, value in nested.items():
        flat.update(
            flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        )
    return flat


def policy_args(folder: Path, hyperparameters: dict) -> pfppo.Args:
    """The peer's changed policy hyperparameters over our preset; sizes are those of the one recorded
    process."""
    flags = (
        f"--preset lm_human_preferences --policy {folder}/model --reward {folder}/reward_model.safetensors"
    )
    flags += f" --prompts {folder}/queries.jsonl --prompt_field text"
    flat = {"ppo.local_batch_size": 64, "ppo.nminibatches": 1, **flatten(hyperparameters)}
    values = {ours: flat[theirs] for theirs, ours in POLICY_FIELDS.items() if theirs in flat}
    if "stop_token" in values:
        values["stop_token"] = str(values["stop_token"])
    if flat.get("rewards.adaptive_kl", True) is None:
        values["kl_target"] = 0.0
    if flat.get("use_tensorflow_adam") is False:
        values["adam_style"] = "torch"
    values["batch_size"] = flat["ppo.local_batch_size"]
    values["minibatch_size"] = values["batch_size"] // flat["ppo.nminibatches"]
    return dataclasses.replace(pfppo.parse_args(pfppo.Args, flags.split(), pfppo.PRESETS), **values)


def reward_args(folder: Path, hyperparameters: dict) -> rm.Args:
    """The peer's changed reward hyperparameters over our preset; sizes are those of the one recorded
    process."""
    flags = f"--preset lm_human_preferences --model {folder}/model --train_data {folder}/labels.json"
    flat = {"local_batch_size": 4, **flatten(hyperparameters)}
    values = {ours: flat[theirs] for theirs, ours in REWARD_FIELDS.items() if theirs in flat}
    values["query_length"] = sys.maxsize  # whatever was recorded was allowed
    world = folder / "world.json"
    if world.is_file() and "label_pad_id" in json.loads(world.read_text()):
        values["label_pad_id"] = json.loads(world.read_text())["label_pad_id"]
    if flat.get("use_tensorflow_adam") is False:
        values["adam_style"] = "torch"
    return dataclasses.replace(rm.parse_args(rm.Args, flags.split(), rm.PRESETS), **values)


# ---------------------------------------------------------------- report


class Report:
    """Compared tensors of one pass: (file, key) -> (recorded, ours, tolerance), and which keys each file
    has."""

    def __init__(self):
        self.compared, self.keys = {}, {}

    def check(self, file: str, key: str, recorded: Tensor, ours, tolerance: float | None) -> None:
        """Note a comparison; tolerance None marks what can only be an input (weights and optimizer state of a
        later update)."""
        if ours is None or isinstance(ours, float):  # no gradient is a gradient of 0
            ours = torch.tensor(ours or 0.0, dtype=torch.double)
        ours = recorded if tolerance is None else ours.detach().clone()
        self.compared[file, key] = (recorded, ours, tolerance)

    def untested(self) -> list[tuple[str, str]]:
        recorded = [(file, key) for file, keys in self.keys.items() for key in keys]
        return [name for name in recorded if name not in self.compared]


class Trace(dict):
    """Recorded tensors of one file by key; `check` notes in a report what was compared with one of them."""

    def __init__(self, report: Report, folder: Path, file: str):
        super().__init__(load_file(folder / file))
        self.report, self.file = report, file
        report.keys[file] = list(self)

    def check(self, key: str, ours, tolerance: float | None) -> None:
        """Nothing where the key was not recorded."""
        if key in self:
            self.report.check(self.file, key, self[key], ours, tolerance)

    def part(self, prefix: str) -> dict[str, Tensor]:
        """Tensors whose keys start with `prefix`, which is cut off."""
        return {key[len(prefix) :]: tensor for key, tensor in self.items() if key.startswith(prefix)}

    def numbers(self, name: str, prefix: str = "") -> list[int]:
        """Sorted numbers n for which a key that starts with `prefix` has a part `name_n`."""
        parts = [re.findall(rf"(?:^|/){name}_(\d+)(?:/|$)", key) for key in self if key.startswith(prefix)]
        return sorted({int(n) for found in parts for n in found})


def distance(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference; infinite where the shapes differ (one number compares with all) or a
    number is not finite."""
    if b.numel() > 1 and a.shape != b.shape:
        return math.inf
    gap = (a.double().flatten() - b.double().flatten()).abs()
    return gap.max().item() if torch.isfinite(gap).all() else math.inf


def tensor_name(key: str) -> str:
    """Name of a key in the table: numbers of updates, epochs, minibatches and steps, and parameter names,
    left out."""
    key = re.sub(r"^(.*(?:grad|exp_avg|exp_avg_sq|adam/step|weights/[^/]+))/[^/]+$", r"\1/NAME", key)
    return re.sub(r"(update|epoch|minibatch|step|sample)(_?)\d+", r"\1\2*", key)


VERDICTS = ("ok", "ok (rounding)", "FAIL")


def severity(row: dict) -> tuple[int, float]:
    """Order in which rows of a name stand for it."""
    return VERDICTS.index(row["verdict"]), row["difference"]


def summarise(report: Report, second: Report | None) -> list[dict]:
    """One row per tensor name: count, largest difference and where, tolerance, our own rounding there,
    verdict."""
    rows = {}
    for (file, key), (recorded, ours, tolerance) in report.compared.items():
        difference, rounding = distance(recorded, ours), None
        if tolerance is None:
            tolerance = EXACT  # finite, no more is known
        other = second.compared.get((file, key)) if second is not None else None
        allowed = tolerance
        if difference > tolerance and other is not None and math.isfinite(difference):
            rounding = distance(ours, other[1])
            allowed = max(tolerance, min(ROUNDING_FACTOR * rounding, ROUNDING_LIMIT * tolerance))
        verdict = "ok" if difference <= tolerance else "ok (rounding)" if difference <= allowed else "FAIL"
        row = {"file": file, "tensor": tensor_name(key), "difference": difference, "key": key}
        row |= {"tolerance": tolerance, "rounding": rounding, "verdict": verdict}
        others = [rows[file, row["tensor"]]] if (file, row["tensor"]) in rows else []
        count = 1 + sum(other["count"] for other in others)
        rows[file, row["tensor"]] = {**max([row, *others], key=severity), "count": count}
    return list(rows.values())


# ---------------------------------------------------------------- policy


def peer_tokenizer(folder: Path):
    """The tokenizer with the pad token that the peer adds, one past the vocabulary: recorded ids hold it."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    return tokenizer


@functools.lru_cache
def query_texts(folder: Path, length: int) -> frozenset[tuple[int, ...]]:
    """Ids of every text in queries.jsonl as our scripts cut them at `length` tokens."""
    rows = pfppo.load_rows(str(folder / "queries.jsonl"), "prompts", ("text",))
    rows = pfppo.encode_queries(peer_tokenizer(folder), rows, "text", length, "prompts", cut=True)
    return frozenset(tuple(row["query_ids"]) for row in rows)


def known_queries(folder: Path, queries: Tensor, mask: Tensor, pad_id: int) -> Tensor:
    """Recorded queries built again from queries.jsonl: all padding where no text gives these ids."""
    texts, width = query_texts(folder, queries.shape[1]), queries.shape[1]
    rows = [tuple(row[m].tolist()) for row, m in zip(queries, mask)]
    return left_padded([list(row) if row in texts else [] for row in rows], pad_id, width)


def left_padded(rows: list[list[int]], pad_id: int, width: int) -> Tensor:
    """Lists of ids -> (rows, width), padded left with what the peer pads with."""
    ids, mask = pfppo.pad_left([row[-width:] for row in rows] + [[pad_id] * width], "cpu")
    return ids.masked_fill(~mask, pad_id)[:-1]


def compare_policy(report: Report, folder: Path, file: str, args: pfppo.Args, attention: str) -> None:
    """Check every tensor of one policy trace."""
    trace, tokenizer = Trace(report, folder, file), peer_tokenizer(folder)
    ref_policy, policy = (pfppo.load_causal_lm(args.policy) for _ in range(2))
    reward_model = reward_model_from(folder, load_file(args.reward)).eval()
    for part in (ref_policy, policy, reward_model.lm_backbone):
        part.set_attn_implementation(attention)
    model = pfppo.PolicyAndCritic(policy, pfppo.make_critic(args, policy))
    names = {f"lm_backbone.{name}": f"policy.{name}" for name, _ in policy.named_parameters()}
    names |= {f"scalar_head.{name}": f"critic.{name}" for name, _ in model.critic.named_parameters()}
    parameters = dict(model.named_parameters())
    parameters = {theirs: parameters[ours] for theirs, ours in names.items()}
    optimizer = torch.optim.AdamW(model.parameters(), eps=args.eps, weight_decay=0.0)
    steps_per_update = args.noptepochs * (args.batch_size // args.minibatch_size)

    updates = trace.numbers("update")
    for update in updates:
        key, done = f"update_{update}/", (update - 1) * steps_per_update
        before = EXACT if update == 1 else WEIGHTS if update - 1 in updates else None
        compare_weights(trace, f"policy_weights/before_update_{update}/", model, names, parameters, before)
        if update == updates[0]:
            load_adam(trace, parameters, optimizer, done)
        models = (model, ref_policy.eval(), reward_model)
        rollout = compare_rollout(trace, key, folder, tokenizer, args, models)
        compare_returns(trace, key, update, args, rollout["response_mask"])
        compare_epochs(trace, key, update, args, rollout, model, parameters, optimizer)
        compare_weights(trace, f"policy_weights/after_update_{update}/", model, names, parameters, WEIGHTS)


def compare_weights(trace: Trace, prefix: str, model: nn.Module, names, parameters, tolerance) -> None:
    """Compare our weights with the recorded ones (None: they are an input), then go on from the recorded
    ones."""
    recorded = trace.part(prefix)
    for name in recorded:
        trace.check(prefix + name, parameters.get(name, math.nan), tolerance)
    if recorded:
        load_recorded(model, recorded, names)


def load_adam(trace: Trace, parameters: dict[str, Tensor], optimizer, steps: int) -> None:
    """Adam's recorded moments, where a trace begins in the middle of a run."""
    for name, parameter in parameters.items() if trace.part("adam/") else ():
        state = {part: trace[f"adam/{part}/{name}"].clone() for part in ("step", "exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = state
        trace.check(f"adam/step/{name}", float(steps), EXACT)
        for part in ("exp_avg", "exp_avg_sq"):
            trace.check(f"adam/{part}/{name}", None, None)


def compare_rollout(
    trace: Trace, key: str, folder: Path, tokenizer, args: pfppo.Args, models
) -> dict[str, Tensor]:
    """Steps 1 to 5 of Algorithm 2 on the recorded responses -> rollout with the recorded numbers."""
    model, ref_policy, reward_model = models
    pad_id, size = tokenizer.pad_token_id, args.forward_batch_size

    # 1. and 2. are recorded; that our query texts become the same ids is checked
    queries, responses = trace[key + "queries"], trace[key + "responses"]
    query_mask, width = queries != pad_id, queries.shape[1]
    trace.check(key + "queries", known_queries(folder, queries, query_mask, pad_id), EXACT)
    trace.check(key + "query_responses", torch.cat([queries, responses], 1), EXACT)
    trace.check(key + "responses", trace[key + "query_responses"][:, width:], EXACT)
    stop_id = pfppo.stop_token_id(tokenizer, args.stop_token)
    score_mask, has_stop = pfppo.stop_masks(responses, stop_id, args.stop_after)
    rollout = {"queries": queries, "query_mask": query_mask, "responses": responses}
    rollout |= {"score_mask": score_mask, "response_mask": torch.ones_like(score_mask)}
    trace.check(key + "postprocessed_responses", responses.masked_fill(~score_mask, pad_id), EXACT)
    rows = zip(queries, query_mask, responses, score_mask)
    read = [q[m].tolist() + r[s].tolist() for q, m, r, s in rows]
    read = left_padded(read, pad_id, width + args.response_length)
    trace.check(key + "postprocessed_query_responses", read, EXACT)

    # 3. scores
    raw_scores = pfppo.reward_model_scores(reward_model, rollout, size)
    trace.check(key + "raw_scores", raw_scores, FORWARD)
    trace.check(key + "scores", torch.where(has_stop, raw_scores, args.missing_stop_score), FORWARD)

    # 5. log-probabilities, values
    model.eval()
    logprobs, values = pfppo.response_logprobs_and_values(model, rollout, args.temperature, size)
    ref_logprobs, _ = pfppo.response_logprobs_and_values(ref_policy, rollout, args.temperature, size)
    trace.check(key + "logprobs", logprobs, FORWARD)
    trace.check(key + "values", values, FORWARD)
    trace.check(key + "ref_logprobs", ref_logprobs, FORWARD)
    return rollout | {name: trace[key + name] for name in ("logprobs", "values", "advantages", "returns")}


def compare_returns(trace: Trace, key: str, update: int, args: pfppo.Args, mask: Tensor) -> None:
    """Steps 6 and 7, each from its recorded inputs: rewards, advantages, returns; and the KL coefficient."""
    kl_coef, before = trace[key + "kl_coef"].item(), trace.get(f"update_{update - 1}/kl_coef_after")
    if update == 1:
        trace.check(key + "kl_coef", float(args.kl_coef), SCHEDULE)
    else:
        trace.check(key + "kl_coef", before, None if before is None else SCHEDULE)
    kl = torch.where(mask, trace[key + "logprobs"] - trace[key + "ref_logprobs"], 0.0)
    rewards, non_score_reward = pfppo.cumulative_rewards(trace[key + "scores"], kl, mask, kl_coef)
    trace.check(key + "kl", kl, FORWARD)
    trace.check(key + "non_score_reward", non_score_reward, FORWARD)
    trace.check(key + "rewards_before_whitening", rewards, FORWARD)
    rewards = trace[key + "rewards_before_whitening"]
    if args.whiten_rewards:
        rewards = pfppo.whiten(rewards, mask, shift_mean=False)
    trace.check(key + "rewards_after_whitening", rewards, FORWARD)
    rewards, values = trace[key + "rewards_after_whitening"], trace[key + "values"]
    advantages, returns = pfppo.gae(rewards, values, mask, args.gamma, args.lam)
    trace.check(key + "returns", returns, FORWARD)
    trace.check(key + "advantages", pfppo.whiten(advantages, mask), FORWARD)
    if args.kl_target:
        kl_mean, fraction = trace[key + "kl"].sum(1).mean().item(), args.batch_size / args.kl_horizon
        kl_coef = pfppo.next_kl_coef(kl_coef, kl_mean, args.kl_target, fraction)
    trace.check(key + "kl_coef_after", kl_coef, SCHEDULE)


def compare_epochs(
    trace: Trace, key: str, update: int, args: pfppo.Args, rollout, model, parameters, optimizer
):
    """Step 8: losses, gradients and optimizer steps on the recorded minibatches."""
    model.train()
    num_updates, mask = args.total_episodes // args.batch_size, rollout["response_mask"]
    lr = pfppo.scheduled_lr(args.lr, update - 1, num_updates, args.lr_schedule, warmup_steps=0)
    trace.check(key + "lr", lr, SCHEDULE)
    step = (update - 1) * args.noptepochs * (args.batch_size // args.minibatch_size)
    for epoch in trace.numbers("epoch", key):
        epoch_key = f"{key}epoch_{epoch}/"
        minibatches = trace.numbers("minibatch", epoch_key)
        order = torch.cat([trace[f"{epoch_key}minibatch_{i}/indices"] for i in minibatches])
        complete = order.sort().values.equal(torch.arange(args.batch_size))  # every row once per epoch
        for minibatch in minibatches:
            prefix = f"{epoch_key}minibatch_{minibatch}/"
            indices = trace[prefix + "indices"]
            whole = complete and len(indices) == args.minibatch_size
            trace.check(prefix + "indices", indices if whole else math.nan, EXACT)
            rows = {name: tensor[indices] for name, tensor in rollout.items()}
            size = args.forward_batch_size
            new_logprobs, vpred = pfppo.response_logprobs_and_values(model, rows, args.temperature, size)
            trace.check(prefix + "new_logprobs", new_logprobs, FORWARD)
            trace.check(prefix + "vpred", vpred, FORWARD)
            rollout["loss_weights"] = torch.zeros_like(rollout["values"])
            rollout["loss_weights"][indices] = pfppo.loss_weights(mask[indices])
            stats = torch.zeros(len(pfppo.STATS))
            for part in pfppo.micro_batches(rollout, indices, args.micro_batch_size):
                loss, part_stats, _ = pfppo.minibatch_loss(model, pfppo.trim(rollout, part), args)
                loss.backward()
                stats += part_stats.detach()
            for name, tag in STAT_TAGS.items():
                tolerance = 2.01 / mask[indices].numel() if "clipfrac" in name else FORWARD  # two tokens
                trace.check(prefix + name, stats[pfppo.STATS.index(tag)], tolerance)
            compare_gradients(trace, prefix, model, parameters)
            step += 1
            eps = pfppo.adam_epsilon(args.eps, args.adam_style, step)
            optimizer.param_groups[0].update(lr=lr, eps=eps)
            optimizer.step()
            optimizer.zero_grad()


def compare_gradients(
    trace: Trace, prefix: str, model: nn.Module, parameters: dict[str, Tensor | None]
) -> None:
    """An output layer that no score depends on (None) has no gradient, or zeros."""
    for name, parameter in parameters.items():
        trace.check(f"{prefix}grad/{name}", parameter.grad if parameter is not None else 0.0, FORWARD)
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    trace.check(prefix + "grad_norm", norm, FORWARD)


# ---------------------------------------------------------------- reward


def compare_reward(report: Report, folder: Path, file: str, args: rm.Args, attention: str) -> None:
    """Check every tensor of one reward trace."""
    trace, tokenizer = Trace(report, folder, file), peer_tokenizer(folder)
    causal_lm, first = rm.load_causal_lm(args.model), trace.part("weights/before_step_1/")
    names, initial = reward_names(causal_lm), dict(causal_lm.named_parameters())
    model = reward_model_from(folder, first, rm.RewardModel)
    model.lm_backbone.set_attn_implementation(attention)
    parameters = dict(model.named_parameters())
    parameters = {theirs: parameters[ours] if ours else None for theirs, ours in names.items()}
    optimizer = torch.optim.AdamW(model.parameters(), eps=args.eps, weight_decay=args.weight_decay)

    normalized = compare_normalization(trace, "normalize_before", folder, tokenizer, args, model)
    compare_start(trace, "weights/before_step_1/", normalized, initial)
    labels, _ = rm.read_labels("train_data", args, tokenizer, causal_lm.config, -1)
    permutation = trace["labels/permutation"]
    whole = permutation.sort().values.equal(torch.arange(args.num_train))
    trace.check("labels/permutation", permutation if whole else math.nan, EXACT)
    model.train()
    for step in trace.numbers("step", "step_"):
        indices = permutation[(step - 1) * args.batch_size : step * args.batch_size]
        trace.check(f"step_{step}/indices", indices, EXACT)
        rows = [labels[i] for i in indices.tolist()]
        compare_labels(trace, f"step_{step}/", rows, tokenizer.pad_token_id)
        compare_step(trace, step, rows, args, model, parameters, optimizer)
        recorded = trace.part(f"weights/after_step_{step}/")
        for theirs in recorded:
            ours = parameters.get(theirs, math.nan)
            ours = first[theirs] if ours is None else ours  # no score depends on it
            trace.check(f"weights/after_step_{step}/{theirs}", ours, WEIGHTS)
        if recorded:
            load_recorded(model, recorded, names)
    if trace.part("weights/final/"):
        load_recorded(model, trace.part("weights/final/"), names)
        model.eval()
        normalized = compare_normalization(trace, "normalize_after", folder, tokenizer, args, model)
        compare_start(trace, "weights/final/", normalized, {})


def compare_normalization(
    trace: Trace, name: str, folder: Path, tokenizer, args: rm.Args, model: rm.RewardModel
) -> tuple[float, float] | None:
    """Check one normalisation with the weights that `model` has; its gain and bias, None where it is not
    recorded."""
    if f"{name}/query_responses" not in trace:
        return None
    ids, pad_id = trace[f"{name}/query_responses"], tokenizer.pad_token_id
    queries, responses = ids[:, : -args.response_length], ids[:, -args.response_length :]
    mask = queries != pad_id
    known = torch.cat([known_queries(folder, queries, mask, pad_id), responses], 1)
    trace.check(f"{name}/query_responses", known, EXACT)
    samples = [{"query": q[m].tolist(), "samples": [r.tolist()]} for q, m, r in zip(queries, mask, responses)]
    samples = [{**sample, "best": 0, "row": row} for row, sample in enumerate(samples)]
    gain, bias = model.reward_gain.item(), model.reward_bias.item()
    rm.set_gain_and_bias(model, 1.0, 0.0)
    rewards = torch.zeros(len(samples))
    for part in rm.micro_batches(samples, args.forward_batch_size):
        with torch.no_grad():
            rewards[[label["row"] for label in part]] = rm.label_rewards(model, part, "cpu")[0].squeeze(1)
    rm.set_gain_and_bias(model, gain, bias)
    gain, bias = rm.normalization(rewards)
    numbers = {"rewards": rewards, "mean": rewards.mean(), "std": rewards.std(), "gain": gain, "bias": bias}
    for key, value in numbers.items():
        trace.check(f"{name}/{key}", value, FORWARD)
    # the check sample is not recorded, only that it has about mean 0 and deviation 1
    chance = 6 * math.sqrt(2 / len(rewards))
    trace.check(f"{name}/check_mean", 0.0, chance)
    trace.check(f"{name}/check_std", 1.0, chance)
    return gain, bias


def compare_start(trace: Trace, prefix: str, normalized: tuple[float, float] | None, initial) -> None:
    """Recorded weights that only a normalisation precedes: gain and bias are checked, and the backbone where
    it is that of `initial`."""
    for key in trace.part(prefix):
        ours, tolerance = None, None
        if key in ("reward_gain", "reward_bias") and normalized is not None:
            ours, tolerance = normalized[key == "reward_bias"], FORWARD
        elif key.removeprefix("lm_backbone.") in initial:
            ours, tolerance = initial[key.removeprefix("lm_backbone.")], EXACT
        trace.check(prefix + key, ours, tolerance)


def compare_labels(trace: Trace, key: str, rows: list[dict], pad_id: int) -> None:
    """That our reading of labels.json gives the recorded batch."""
    trace.check(key + "best", torch.tensor([row["best"] for row in rows]), EXACT)
    queries = left_padded([row["query"] for row in rows], pad_id, trace[key + "query"].shape[1])
    trace.check(key + "query", queries, EXACT)
    for k in range(len(rows[0]["samples"])):
        width = trace[key + f"sample{k}"].shape[1]
        mirrored = left_padded([row["samples"][k][::-1] for row in rows], pad_id, width)
        trace.check(key + f"sample{k}", mirrored.flip(1), EXACT)  # padded right


def compare_step(
    trace: Trace, step: int, rows: list[dict], args: rm.Args, model, parameters, optimizer
) -> None:
    """Loss, accuracy, gradients and optimizer step on one batch of labels."""
    key, num_steps = f"step_{step}/", math.ceil(args.num_train / args.batch_size)
    lr = rm.scheduled_lr(args.lr, step - 1, num_steps, args.lr_schedule, args.warmup_steps)
    trace.check(key + "lr", lr, SCHEDULE)
    rows = [{**row, "row": i} for i, row in enumerate(rows)]
    stats, predicted = torch.zeros(2), torch.zeros(len(rows), len(rows[0]["samples"]))
    for part in rm.micro_batches(rows, args.micro_batch_size):
        rewards, best = rm.label_rewards(model, part, "cpu")
        loss, accuracy = rm.best_of_k_loss(rewards, best)
        weight = len(part) / len(rows)
        (loss * weight).backward()
        stats += torch.stack([loss.detach(), accuracy]) * weight
        predicted[[row["row"] for row in part]] = rewards.detach()
    trace.check(key + "predicted_rewards", predicted, FORWARD)
    trace.check(key + "loss", stats[0], FORWARD)
    trace.check(key + "accuracy", stats[1], FORWARD)
    compare_gradients(trace, key, model, parameters)
    optimizer.param_groups[0].update(lr=lr, eps=rm.adam_epsilon(args.eps, args.adam_style, step))
    optimizer.step()
    optimizer.zero_grad()


# ---------------------------------------------------------------- main


NEEDED = (
    "model/config.json",
    "hyperparameters.json",
    "queries.jsonl",
    "labels.json",
    "reward_model.safetensors",
)


def compare(folder: Path, attention: str, files: set[str] | None = None) -> Report:
    """One pass over the traces of the folder (or those named in `files`) with one attention kernel of
    transformers."""
    report, hyperparameters = Report(), json.loads((folder / "hyperparameters.json").read_text())
    for name in sorted(path.name for path in folder.glob("trace_*.safetensors")):
        if files is not None and name not in files:
            continue
        if name.startswith("trace_policy"):
            args = policy_args(folder, hyperparameters.get("policy", {}))
            compare_policy(report, folder, name, args, attention)
        elif name.startswith("trace_reward"):
            args = reward_args(folder, hyperparameters.get("reward", {}))
            compare_reward(report, folder, name, args, attention)
    return report


def print_table(rows: list[dict]) -> None:
    width, file = max(len(row["tensor"]) for row in rows), None
    for row in rows:
        if row["file"] != file:
            file = row["file"]
            print(f"\n{file}")
            print(f"{'tensor':<{width}}  {'count':>5}  {'difference':>10}  {'tolerance':>9}  verdict")
        note = "" if row["verdict"] == "ok" else f"  at {row['key']}"
        note += "" if row["rounding"] is None else f", our own two kernels differ by {row['rounding']:.1e}"
        numbers = f"{row['count']:>5}  {row['difference']:>10.1e}  {row['tolerance']:>9.1e}"
        print(f"{row['tensor']:<{width}}  {numbers}  {row['verdict']}{note}")


def main(folder: Path) -> int:
    for name in NEEDED:
        missing = f"{folder / name}: no such file; give a folder recorded from lm-human-preference-details"
        pfppo.refuse((not (folder / name).is_file(), missing))
    report = compare(folder, "sdpa")
    rows = summarise(report, None)
    failed = {row["file"] for row in rows if row["verdict"] == "FAIL"}
    if failed:
        rows = summarise(report, compare(folder, "eager", failed))
    print_table(rows)
    for file, key in report.untested():
        print(f"UNTESTED {file} {key}")
    rounded, failed = (sum(row["verdict"] == verdict for row in rows) for verdict in VERDICTS[1:])
    counts = f"{len(report.compared)} recorded tensors compared, {len(report.untested())} untested"
    print(f"\n{counts}, {rounded} names within rounding, {failed} names past their tolerance")
    return 1 if failed or report.untested() or not report.compared else 0


if __name__ == "__main__":
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("folder", type=Path, help="recorded world")
    torch.set_num_threads(1)
    sys.exit(main(parser.parse_args().folder))
