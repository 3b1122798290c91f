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
import functools
import json
import math
import re
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

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
    "task.penalty_reward_value": "penalty_value",
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


def policy_args(hyperparameters: dict) -> pfppo.Args:
    """The peer's changed policy hyperparameters over our preset; sizes are those of the one recorded
    process."""
    flat = flatten(hyperparameters)
    values = {ours: flat[theirs] for theirs, ours in POLICY_FIELDS.items() if theirs in flat}
    if "stop_token" in values:
        values["stop_token"] = str(values["stop_token"])
    if flat.get("rewards.adaptive_kl", True) is None:
        values["adaptive_kl"] = False
    if flat.get("use_tensorflow_adam") is False:
        values["adam_style"] = "torch"
    batch_size = flat.get("ppo.local_batch_size", 64)
    args = pfppo.Args(
        preset="lm_human_preferences", **{**pfppo.LM_HUMAN_PREFERENCES, **values, "batch_size": batch_size}
    )
    args.minibatch_size = batch_size // flat.get("ppo.nminibatches", 1)
    return args


def reward_args(hyperparameters: dict, world: dict) -> rm.Args:
    """The peer's changed reward hyperparameters over our preset; sizes are those of the one recorded
    process."""
    flat = {"local_batch_size": 4, **flatten(hyperparameters)}
    values = {ours: flat[theirs] for theirs, ours in REWARD_FIELDS.items() if theirs in flat}
    values["query_length"] = sys.maxsize  # whatever was recorded was allowed
    values["label_pad_id"] = world.get("label_pad_id", rm.LM_HUMAN_PREFERENCES["label_pad_id"])
    if flat.get("use_tensorflow_adam") is False:
        values["adam_style"] = "torch"
    return rm.Args(preset="lm_human_preferences", **{**rm.LM_HUMAN_PREFERENCES, **values})


# ---------------------------------------------------------------- report


class Report:
    """Compared tensors of one pass: (file, key) -> (recorded, ours, tolerance), and which keys each file
    has."""

    def __init__(self):
        self.compared, self.keys = {}, {}

    def check(self, file: str, key: str, recorded: torch.Tensor, ours, tolerance: float | None) -> None:
        """Note a comparison; tolerance None marks what can only be an input (weights and optimizer state of a
        later update)."""
        if ours is None or isinstance(ours, float):  # no gradient is a gradient of 0
            ours = torch.tensor(ours or 0.0, dtype=torch.double)
        self.compared[file, key] = (
            recorded,
            recorded if tolerance is None else ours.detach().clone(),
            tolerance,
        )

    def untested(self) -> list[tuple[str, str]]:
        return [
            (file, key)
            for file, keys in self.keys.items()
            for key in keys
            if (file, key) not in self.compared
        ]


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
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


def summarise(report: Report, second: Report | None) -> list[dict]:
    """One row per tensor name: count, largest difference and where, tolerance, our own rounding there,
    verdict."""
    rows = {}
    for (file, key), (recorded, ours, tolerance) in report.compared.items():
        difference, rounding = distance(recorded, ours), None
        if tolerance is None:
            tolerance = EXACT  # finite, no more is known
        if (
            difference > tolerance
            and second is not None
            and (file, key) in second.compared
            and math.isfinite(difference)
        ):
            rounding = distance(ours, second.compared[file, key][1])
        allowed = (
            tolerance
            if rounding is None
            else max(tolerance, min(ROUNDING_FACTOR * rounding, ROUNDING_LIMIT * tolerance))
        )
        verdict = (
            "FAIL" if not difference <= allowed else "ok" if difference <= tolerance else "ok (rounding)"
        )
        found = {
            "file": file,
            "tensor": tensor_name(key),
            "count": 1,
            "difference": difference,
            "key": key,
            "tolerance": tolerance,
            "rounding": rounding,
            "verdict": verdict,
        }
        rank = ("ok", "ok (rounding)", "FAIL").index
        old = rows.get((file, found["tensor"]))
        if old is not None:
            found["count"] += old["count"]
            if (rank(old["verdict"]), old["difference"]) > (rank(verdict), difference):
                found = {**old, "count": found["count"]}
        rows[file, found["tensor"]] = found
    return list(rows.values())


# ---------------------------------------------------------------- policy


def peer_tokenizer(folder: Path):
    """The tokenizer with the pad token that the peer adds, one past the vocabulary."""
    tokenizer = pfppo.load_tokenizer(str(folder / "model"), "[PAD]")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    return tokenizer


def numbers(keys, name: str) -> list[int]:
    """Sorted numbers n for which a key has a part `name_n`."""
    return sorted({int(n) for key in keys for n in re.findall(rf"(?:^|/){name}_(\d+)(?:/|$)", key)})


@functools.lru_cache
def query_texts(folder: Path, length: int) -> frozenset[tuple[int, ...]]:
    """Ids of every text in queries.jsonl as our scripts cut them at `length` tokens."""
    args = pfppo.Args(
        prompt_field="text", query_length=length, long_queries=pfppo.LM_HUMAN_PREFERENCES["long_queries"]
    )
    rows = pfppo.load_rows(str(folder / "queries.jsonl"), "prompts", ("text",))
    return frozenset(
        tuple(row["query_ids"]) for row in pfppo.encode_queries(peer_tokenizer(folder), rows, args, "prompts")
    )


def known_queries(folder: Path, queries: torch.Tensor, mask: torch.Tensor, pad_id: int) -> torch.Tensor:
    """Recorded queries built again from queries.jsonl: all padding where no text gives these ids."""
    texts, width = query_texts(folder, queries.shape[1]), queries.shape[1]
    rows = [tuple(row[m].tolist()) for row, m in zip(queries, mask)]
    return left_padded([list(row) if row in texts else [] for row in rows], pad_id, width)


def left_padded(rows: list[list[int]], pad_id: int, width: int) -> torch.Tensor:
    """Lists of ids -> (rows, width), padded left."""
    ids, _ = pfppo.pad_rows([row[-width:] for row in rows] + [[pad_id] * width], pad_id, "left")
    return ids[:-1]


def compare_policy(report: Report, folder: Path, file: str, args: pfppo.Args, attention: str) -> None:
    """Check every tensor of one policy trace."""
    trace = load_file(folder / file)
    report.keys[file] = list(trace)

    def check(key: str, ours, tolerance: float | None) -> None:
        if key in trace:
            report.check(file, key, trace[key], ours, tolerance)

    tokenizer = peer_tokenizer(folder)
    pad_id, stop_id = tokenizer.pad_token_id, pfppo.stop_token_id(tokenizer, args.stop_token)
    updates = numbers(trace, "update")

    ref_policy = pfppo.load_causal_lm(str(folder / "model")).eval()
    policy = pfppo.load_causal_lm(str(folder / "model"))
    critic = torch.nn.Linear(policy.config.hidden_size, 1)
    torch.nn.init.zeros_(critic.weight), torch.nn.init.zeros_(critic.bias)
    model = pfppo.PolicyAndCritic(policy, critic)
    reward_model = reward_model_from(folder, load_file(folder / "reward_model.safetensors")).eval()
    for part in (ref_policy, policy, reward_model.lm_backbone):
        part.set_attn_implementation(attention)
    names = {f"lm_backbone.{name}": f"policy.{name}" for name, _ in policy.named_parameters()}
    names.update({f"scalar_head.{name}": f"critic.{name}" for name, _ in critic.named_parameters()})
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, eps=args.eps, weight_decay=args.weight_decay
    )
    num_updates = args.total_episodes // args.batch_size
    steps_per_update = args.noptepochs * (args.batch_size // args.minibatch_size)

    def check_weights(prefix: str, tolerance: float | None) -> None:
        """Compare our weights with the recorded ones (None: they are an input), then go on from the recorded
        ones."""
        recorded = {key[len(prefix) :]: tensor for key, tensor in trace.items() if key.startswith(prefix)}
        for name in recorded:
            check(prefix + name, parameters[names[name]] if name in names else math.nan, tolerance)
        if recorded:
            load_recorded(model, recorded, names)

    adam = {key: tensor for key, tensor in trace.items() if key.startswith("adam/")}
    for update in updates:
        key = f"update_{update}/"
        before = f"policy_weights/before_update_{update}/"
        check_weights(before, EXACT if update == 1 else WEIGHTS if update - 1 in updates else None)
        if adam and update == updates[0]:
            for theirs, ours in names.items():
                optimizer.state[parameters[ours]] = {
                    part: adam[f"adam/{part}/{theirs}"].clone() for part in ("step", "exp_avg", "exp_avg_sq")
                }
                check(f"adam/step/{theirs}", float((update - 1) * steps_per_update), EXACT)
                for part in ("exp_avg", "exp_avg_sq"):
                    check(f"adam/{part}/{theirs}", None, None)

        # steps 1 and 2 of Algorithm 2 are recorded; that our query texts become the same ids is checked
        queries, responses = trace[key + "queries"], trace[key + "responses"]
        query_mask, response_mask = queries != pad_id, torch.ones_like(responses, dtype=torch.bool)
        check(key + "queries", known_queries(folder, queries, query_mask, pad_id), EXACT)
        check(key + "query_responses", torch.cat([queries, responses], 1), EXACT)
        check(key + "responses", trace[key + "query_responses"][:, queries.shape[1] :], EXACT)
        score_mask, has_stop = pfppo.stop_masks(responses, stop_id, args.stop_after)
        rollout = {
            "queries": queries,
            "query_mask": query_mask,
            "responses": responses,
            "response_mask": response_mask,
            "score_mask": score_mask,
        }
        check(key + "postprocessed_responses", responses.masked_fill(~score_mask, pad_id), EXACT)
        read = [
            q[m].tolist() + r[s].tolist() for q, m, r, s in zip(queries, query_mask, responses, score_mask)
        ]
        check(
            key + "postprocessed_query_responses",
            left_padded(read, pad_id, queries.shape[1] + responses.shape[1]),
            EXACT,
        )

        # step 3: scores
        raw_scores = pfppo.reward_model_scores(reward_model, rollout, args.forward_batch_size)
        check(key + "raw_scores", raw_scores, FORWARD)
        check(key + "scores", torch.where(has_stop, raw_scores, args.penalty_value), FORWARD)

        # step 5: log-probabilities, values
        model.eval()
        logprobs, values = pfppo.response_logprobs_and_values(
            model, rollout, args.temperature, args.forward_batch_size
        )
        ref_logprobs, _ = pfppo.response_logprobs_and_values(
            ref_policy, rollout, args.temperature, args.forward_batch_size
        )
        check(key + "logprobs", logprobs, FORWARD)
        check(key + "values", values, FORWARD)
        check(key + "ref_logprobs", ref_logprobs, FORWARD)

        # steps 6 and 7: rewards, advantages, returns, from recorded inputs
        kl_coef = trace[key + "kl_coef"].item()
        if update == 1:
            check(key + "kl_coef", float(args.kl_coef), SCHEDULE)
        else:
            check(
                key + "kl_coef",
                trace.get(f"update_{update - 1}/kl_coef_after"),
                SCHEDULE if update - 1 in updates else None,
            )
        rewards, non_score_reward, kl = pfppo.cumulative_rewards(
            trace[key + "scores"],
            trace[key + "logprobs"],
            trace[key + "ref_logprobs"],
            response_mask,
            kl_coef,
        )
        check(key + "kl", kl, FORWARD)
        check(key + "non_score_reward", non_score_reward, FORWARD)
        check(key + "rewards_before_whitening", rewards, FORWARD)
        rewards = trace[key + "rewards_before_whitening"]
        if args.whiten_rewards:
            rewards = pfppo.whiten(rewards, response_mask, shift_mean=False)
        check(key + "rewards_after_whitening", rewards, FORWARD)
        advantages, returns = pfppo.gae(
            trace[key + "rewards_after_whitening"], trace[key + "values"], response_mask, args.gamma, args.lam
        )
        check(key + "returns", returns, FORWARD)
        check(
            key + "advantages",
            pfppo.whiten(advantages, response_mask) if args.whiten_advantages else advantages,
            FORWARD,
        )
        kl_after = kl_coef
        if args.adaptive_kl:
            kl_after = pfppo.next_kl_coef(
                kl_coef,
                trace[key + "kl"].sum(1).mean().item(),
                args.kl_target,
                args.kl_horizon,
                args.batch_size,
            )
        check(key + "kl_coef_after", kl_after, SCHEDULE)

        # step 8: the epochs
        model.train()
        lr = pfppo.scheduled_lr(args.lr, update - 1, num_updates, args.lr_schedule, args.warmup_updates)
        check(key + "lr", lr, SCHEDULE)
        rollout.update({name: trace[key + name] for name in ("logprobs", "values", "advantages", "returns")})
        step = (update - 1) * steps_per_update
        for epoch in numbers([name for name in trace if name.startswith(key)], "epoch"):
            prefix = f"{key}epoch_{epoch}/"
            minibatches = numbers([name for name in trace if name.startswith(prefix)], "minibatch")
            order = torch.cat([trace[f"{prefix}minibatch_{m}/indices"] for m in minibatches])
            complete = order.sort().values.equal(torch.arange(args.batch_size))  # every row once per epoch
            for minibatch in minibatches:
                prefix = f"{key}epoch_{epoch}/minibatch_{minibatch}/"
                indices = trace[prefix + "indices"]
                check(
                    prefix + "indices",
                    indices if complete and len(indices) == args.minibatch_size else math.nan,
                    EXACT,
                )
                new_logprobs, vpred = pfppo.response_logprobs_and_values(
                    model,
                    {name: tensor[indices] for name, tensor in rollout.items()},
                    args.temperature,
                    args.forward_batch_size,
                )
                check(prefix + "new_logprobs", new_logprobs, FORWARD)
                check(prefix + "vpred", vpred, FORWARD)
                rollout["loss_weights"] = torch.zeros_like(rollout["values"])
                rollout["loss_weights"][indices] = pfppo.loss_weights(
                    response_mask[indices], args.loss_average
                )
                stats = torch.zeros(len(pfppo.STATS))
                for part in pfppo.micro_batches(rollout, indices, args.micro_batch_size):
                    loss, part_stats = pfppo.minibatch_loss(
                        model,
                        pfppo.trim(rollout, part),
                        args.temperature,
                        args.cliprange,
                        args.cliprange_value,
                        args.vf_coef,
                    )
                    loss.backward()
                    stats += part_stats.detach()
                for name, tag in STAT_TAGS.items():
                    two_tokens = 2.01 / response_mask[indices].numel()
                    check(
                        prefix + name,
                        stats[pfppo.STATS.index(tag)],
                        two_tokens if "clipfrac" in name else FORWARD,
                    )
                for theirs, ours in names.items():
                    check(f"{prefix}grad/{theirs}", parameters[ours].grad, FORWARD)
                check(
                    prefix + "grad_norm",
                    torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]),
                    FORWARD,
                )
                step += 1
                for group in optimizer.param_groups:
                    group["lr"], group["eps"] = lr, pfppo.adam_epsilon(args.eps, args.adam_style, step)
                optimizer.step()
                optimizer.zero_grad()
        check_weights(f"policy_weights/after_update_{update}/", WEIGHTS)


# ---------------------------------------------------------------- reward


def compare_reward(report: Report, folder: Path, file: str, args: rm.Args, attention: str) -> None:
    """Check every tensor of one reward trace."""
    trace = load_file(folder / file)
    report.keys[file] = list(trace)

    def check(key: str, ours, tolerance: float | None) -> None:
        if key in trace:
            report.check(file, key, trace[key], ours, tolerance)

    def recorded_weights(name: str) -> dict[str, torch.Tensor]:
        return {
            key[len(f"weights/{name}/") :]: tensor
            for key, tensor in trace.items()
            if key.startswith(f"weights/{name}/")
        }

    tokenizer = peer_tokenizer(folder)
    pad_id = tokenizer.pad_token_id
    causal_lm = rm.load_causal_lm(str(folder / "model"))
    names = reward_names(causal_lm)
    model = reward_model_from(folder, recorded_weights("before_step_1"), rm.RewardModel)
    model.lm_backbone.set_attn_implementation(attention)
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, eps=args.eps, weight_decay=args.weight_decay
    )

    def compare_normalization(name: str) -> tuple[float, float] | None:
        """Check one normalisation with the weights that `model` has; its gain and bias, None where it is not
        recorded."""
        if f"{name}/query_responses" not in trace:
            return None
        ids = trace[f"{name}/query_responses"]
        queries, responses = ids[:, : -args.response_length], ids[:, -args.response_length :]
        query_mask, everything = queries != pad_id, torch.ones_like(responses, dtype=torch.bool)
        check(
            f"{name}/query_responses",
            torch.cat([known_queries(folder, queries, query_mask, pad_id), responses], 1),
            EXACT,
        )
        gain, bias = model.reward_gain.item(), model.reward_bias.item()
        rm.set_gain_and_bias(model, 1.0, 0.0)
        rollout = {
            "queries": queries,
            "query_mask": query_mask,
            "responses": responses,
            "response_mask": everything,
            "score_mask": everything,
        }
        rewards = rm.reward_model_scores(model, rollout, args.forward_batch_size, bounded=False)
        rm.set_gain_and_bias(model, gain, bias)
        check(f"{name}/rewards", rewards, FORWARD)
        check(f"{name}/mean", rewards.mean(), FORWARD)
        check(f"{name}/std", rewards.std(), FORWARD)
        gain, bias = rm.normalization(rewards)
        check(f"{name}/gain", gain, FORWARD)
        check(f"{name}/bias", bias, FORWARD)
        chance = 6 * math.sqrt(
            2 / len(rewards)
        )  # the check sample is not recorded, only that it has about mean 0 and deviation 1
        check(f"{name}/check_mean", 0.0, chance)
        check(f"{name}/check_std", 1.0, chance)
        return gain, bias

    def check_start(name: str, normalized: tuple[float, float] | None, backbone: bool) -> None:
        """Recorded weights that only a normalisation precedes: gain and bias are checked, and the backbone
        where it is the model's."""
        initial = dict(causal_lm.named_parameters())
        for key in recorded_weights(name):
            ours, tolerance = None, None
            if key in ("reward_gain", "reward_bias") and normalized is not None:
                ours, tolerance = normalized[key == "reward_bias"], FORWARD
            elif key.startswith("lm_backbone.") and backbone:
                ours, tolerance = initial[key[len("lm_backbone.") :]], EXACT
            check(f"weights/{name}/{key}", ours, tolerance)

    check_start("before_step_1", compare_normalization("normalize_before"), backbone=True)
    labels = rm.read_labels(
        str(folder / "labels.json"), "train_data", args, tokenizer, causal_lm.config.vocab_size, -1
    )
    permutation = trace["labels/permutation"]
    check(
        "labels/permutation",
        permutation if permutation.sort().values.equal(torch.arange(args.num_train)) else math.nan,
        EXACT,
    )
    num_steps = math.ceil(args.num_train / args.batch_size)
    model.train()
    for step in numbers([key for key in trace if key.startswith("step_")], "step"):
        key = f"step_{step}/"
        indices = permutation[(step - 1) * args.batch_size : step * args.batch_size]
        check(key + "indices", indices, EXACT)
        rows = [labels[i] for i in indices.tolist()]
        batch, best = rm.label_batch(rows, pad_id, "cpu")
        check(key + "best", best, EXACT)
        check(
            key + "query",
            left_padded([row["query"] for row in rows], pad_id, trace[key + "query"].shape[1]),
            EXACT,
        )
        for k in range(len(rows[0]["samples"])):
            width = trace[key + f"sample{k}"].shape[1]
            samples, _ = rm.pad_rows(
                [row["samples"][k] for row in rows] + [[pad_id] * width], pad_id, "right"
            )
            check(key + f"sample{k}", samples[:-1], EXACT)
        lr = rm.scheduled_lr(
            args.lr, step - 1, num_steps, args.lr_schedule, args.warmup_steps, args.final_lr_fraction
        )
        check(key + "lr", lr, SCHEDULE)
        total_loss, total_accuracy, predicted = (
            torch.zeros(()),
            torch.zeros(()),
            torch.zeros(len(rows), len(rows[0]["samples"])),
        )
        for part, part_rows in rm.label_parts(batch, len(best), args.micro_batch_size):
            loss, accuracy, rewards = rm.label_loss(model, rm.trim(batch, part_rows), best[part])
            weight = len(part) / len(best)
            (loss * weight).backward()
            total_loss, total_accuracy = (
                total_loss + loss.detach() * weight,
                total_accuracy + accuracy * weight,
            )
            predicted[part] = rewards.detach()
        check(key + "predicted_rewards", predicted, FORWARD)
        check(key + "loss", total_loss, FORWARD)
        check(key + "accuracy", total_accuracy, FORWARD)
        for (
            theirs,
            ours,
        ) in names.items():  # an output layer that no score depends on has no gradient, or zeros
            check(f"{key}grad/{theirs}", parameters[ours].grad if ours else torch.zeros(()), FORWARD)
        check(key + "grad_norm", torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]), FORWARD)
        optimizer.param_groups[0].update(lr=lr, eps=rm.adam_epsilon(args.eps, args.adam_style, step))
        optimizer.step()
        optimizer.zero_grad()
        recorded = recorded_weights(f"after_step_{step}")
        for theirs in recorded:
            ours = names.get(theirs)
            unused = theirs in names and ours is None
            value = (
                trace[f"weights/before_step_1/{theirs}"] if unused else parameters[ours] if ours else math.nan
            )
            check(f"weights/after_step_{step}/{theirs}", value, WEIGHTS)
        if recorded:
            load_recorded(model, recorded, names)
    final = recorded_weights("final")
    if final:
        load_recorded(model, final, names)
        model.eval()
        check_start("final", compare_normalization("normalize_after"), backbone=False)


# ---------------------------------------------------------------- main


def compare(folder: Path, attention: str, files: set[str] | None = None) -> Report:
    """One pass over the traces of the folder (or those named in `files`) with one attention kernel of
    transformers."""
    hyperparameters = json.loads((folder / "hyperparameters.json").read_text())
    world = json.loads((folder / "world.json").read_text()) if (folder / "world.json").is_file() else {}
    report = Report()
    names = [
        path.name
        for path in sorted(folder.glob("trace_*.safetensors"))
        if files is None or path.name in files
    ]
    for name in names:
        if name.startswith("trace_policy"):
            compare_policy(report, folder, name, policy_args(hyperparameters.get("policy", {})), attention)
        elif name.startswith("trace_reward"):
            compare_reward(
                report, folder, name, reward_args(hyperparameters.get("reward", {}), world), attention
            )
    return report


def print_table(rows: list[dict]) -> None:
    width = max(len(row["tensor"]) for row in rows)
    file = None
    for row in rows:
        if row["file"] != file:
            file = row["file"]
            print(
                f"\n{file}\n{'tensor':<{width}}  {'count':>5}  {'difference':>10}  {'tolerance':>9}  verdict"
            )
        note = "" if row["verdict"] == "ok" else f"  at {row['key']}"
        note += "" if row["rounding"] is None else f", our own two kernels differ by {row['rounding']:.1e}"
        print(
            f"{row['tensor']:<{width}}  {row['count']:>5}  {row['difference']:>10.1e}  "
            f"{row['tolerance']:>9.1e}  {row['verdict']}{note}"
        )


def main(folder: Path) -> int:
    for needed in (
        "model/config.json",
        "hyperparameters.json",
        "queries.jsonl",
        "labels.json",
        "reward_model.safetensors",
    ):
        if not (folder / needed).is_file():
            raise FileNotFoundError(
                f"{folder / needed}: no such file; give a folder recorded from lm-human-preference-details"
            )
    report = compare(folder, "sdpa")
    rows = summarise(report, None)
    failed = {row["file"] for row in rows if row["verdict"] == "FAIL"}
    if failed:
        rows = summarise(report, compare(folder, "eager", failed))
    print_table(rows)
    for file, key in report.untested():
        print(f"UNTESTED {file} {key}")
    failed = sum(row["verdict"] == "FAIL" for row in rows)
    print(
        f"\n{len(report.compared)} recorded tensors compared, {len(report.untested())} untested, "
        f"{sum(row['verdict'] == 'ok (rounding)' for row in rows)} names within rounding, {failed} names "
        "past their tolerance"
    )
    return 1 if failed or report.untested() or not report.compared else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="recorded world")
    torch.set_num_threads(1)
    sys.exit(main(parser.parse_args().folder))
