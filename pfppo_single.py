"""PPO with policy filtration (PF-PPO, arXiv 2409.06957): stage 3 of SFT -> reward model -> RL.

Algorithm 2, one update (the numbers are those of the chapters in `main`):
  1. take B prompts c                                5. log-probabilities, reference log-probabilities
  2. draw N responses y ~ π_θ(·|c) for each             and values of the kept rows only
  3. score them with the reward model R_φ(y|c)       6. rewards per token (Eq. 4)
  4. filter: rank, draw z ~ w, keep K rows (μ_θ)     7. advantages and returns (GAE)
                                                     8. m epochs of clipped PPO on the kept rows (Eq. 5)
PPO-M is `--filter none`, PPO-S adds `--num_responses 1`; nothing else changes between the methods.

Run on a CPU, one GPU, eight GPUs (sizes are global, so the algorithm is the same):
  accelerate launch --cpu --num_processes 1 pfppo_single.py --policy sft/model --reward output/rm/model \\
    --prompts rl.jsonl --output_dir run
  accelerate launch --num_processes 1 --mixed_precision bf16 pfppo_single.py ...
  accelerate launch --multi_gpu --num_processes 8 --mixed_precision bf16 pfppo_single.py ...
In:  a causal language model (`--policy`), a reward (`--reward`), prompts (`--prompts`).
Out: `output_dir/policy` (the last policy), `policy_best` (best on the evaluation prompts), `metrics.jsonl`,
     `tensorboard/`, `samples.jsonl`, `checkpoints/`. The same command continues a killed run.

Sources: PAPER = arXiv 2409.06957; LMHP = openai/lm-human-preferences@cbfd210. `DEPARTS` marks a difference
from one of them; `--preset lm_human_preferences` is LMHP's setting on this same code path.
"""

import codecs
import copy
import dataclasses
import fcntl
import gzip
import hashlib
import importlib
import inspect
import json
import logging
import math
import os
import re
import shutil
import signal
import sys
import time
import traceback
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from accelerate import Accelerator, PartialState, tracking
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, gather_object, set_seed
from torch import Tensor, nn

# Shapes: B prompts per update, N responses per prompt, K rows kept by the filter, Q query length, R response
# length, V vocabulary. A rollout is a dict of tensors whose first axis is the response.
#
#   column          0 .. Q-1       Q .. Q+R-1
#   query_response  P P q q q      r r . P P     padded left, padded right; "." is the stop token
#   micro-batch         P P P P q q q r r .      `trim` moves all padding left: as wide as its longest row
#   response_mask                  1 1 1 0 0     up to and including the stop token
#   logits, values  read one column earlier than the token they belong to: Q-1 .. Q+R-2
#
# Numbers in Args, with the least and the largest value that is taken:
Count, Whole = Annotated[int, 1, math.inf], Annotated[int, 0, math.inf]
Amount, Share = Annotated[float, 0, math.inf], Annotated[float, 0, 1]
Positive = Annotated[float, 1e-12, math.inf]


@dataclass(kw_only=True)
class Args:
    # run
    output_dir: str = "output/pfppo"
    """folder for everything this run writes; a folder that holds another run is refused"""
    preset: Literal["pfppo", "lm_human_preferences"] = "pfppo"
    """defaults for the other fields: the paper's, or LMHP's (PRESETS below); fields given as flags win"""
    seed: Annotated[int, 0, 2**31] = 1
    """shared over ranks; data order, filter, sampling, minibatches: from (seed, update, rank)"""
    dry_run: bool = False
    """read and check everything, print the derived sizes, and stop before weights are loaded"""
    log_with: str = "tensorboard"
    """tracker of accelerate: tensorboard, wandb, trackio, mlflow, comet_ml, aim, swanlab, ...; or `none`"""
    # models
    policy: str
    """π_θ at the start and the reference π_SFT: folder or hub id of a causal language model"""
    reward: str
    """R_φ: folder or hub id of a sequence classification model with one label (rm_single.py writes one), or
    `module:function` of (prompts, responses, rows) -> floats; with `@TEXT` behind it, source=TEXT is added"""
    critic: Literal["separate", "shared"] = "separate"
    """a critic of its own, or one linear head (zero at first) on the policy's last hidden state (LMHP)"""
    critic_init: str | None = None
    """separate critic's start; none: `reward` if that is a model, else the policy with a zero head"""
    frozen_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """weights of reference and reward model; auto: bfloat16 under --mixed_precision bf16, where the first KL
    is then rounding, not 0. Trainable weights are float32, autocast by accelerate"""
    gradient_checkpointing: bool = False
    """recompute activations in the PPO epochs: less memory, a third more time; never during rollouts"""
    shard: bool = False
    """split weights, gradients and Adam's moments over the processes (FSDP2), for models too large for one"""
    # data
    prompts: str
    """training prompts: .jsonl(.gz), .json, .csv, .parquet, a save_to_disk folder, or hub id `name:split`"""
    prompt_field: str = "prompt"
    """column with the prompt: text, or a list of chat messages (the tokenizer's chat template is applied)"""
    chat_template: str | None = None
    """file with a Jinja template, in place of the tokenizer's own if it has one; saved with the model"""
    query_length: Count = 512
    """longest query in tokens"""
    long_queries: Literal["drop", "keep_start"] = "drop"
    """what happens to a query longer than query_length; one of eval_prompts is never dropped but refused"""
    reshuffle: bool = True
    """every pass over the prompts in a new order; off: all passes in the first one's (LMHP)"""
    # rollout
    total_episodes: Count = 75000
    """responses to generate in all, over all ranks; PAPER: 5 passes over 3k prompts x 5"""
    batch_size: Count = 64
    """B: prompts per update, over all ranks (each rank takes batch_size / num_processes)"""
    num_responses: Count = 5
    """N: responses per prompt"""
    response_length: Count = 512
    """R: longest response in tokens, the stop token included"""
    temperature: Positive = 1.0
    """divides the logits of policy, old policy and reference alike; there is no top-k or top-p"""
    stop_token: str = "eos"
    """ends a response: `eos`, `none`, a token, a text that is one, an id; decides truncation and masks"""
    stop_after: Whole = 0
    """a stop token counts only at this response index (from 0) or later (LMHP)"""
    mask_after_stop: bool = True
    """Eq. 4: stop at the stop token, pay the score there; off: LMHP's fixed last slot, no mask"""
    forward_batch_size: Count = 32
    """rows per rank in one forward pass without gradient (scores, log-probabilities)"""
    generation_batch_size: Whole = 0
    """responses per rank that are generated at a time; 0: forward_batch_size"""
    # reward
    missing_stop_score: float | None = None
    """score of a response without stop token, after normalisation; none: its own"""
    normalize_reward: bool = True
    """subtract mean and divide by standard deviation of the reward on π_SFT samples, measured once (PAPER)"""
    normalize_samples: Annotated[int, 2, math.inf] = 512
    """responses those two numbers are measured on, over all ranks"""
    # filter
    filter: Literal["none", "random", "bon", "br", "bw", "top", "top_random", "top_bottom", "pow"] = "br"
    """which of the N responses are trained on; benchmark.r2 says which filter suits a reward"""
    rank_weights: tuple[float, ...] = ()
    """your own w over the N ranks, best first, in place of none, random, br or bw: 0.5 0 0 0 0.5 is BW"""
    num_kept: Whole = 0
    """rows kept per prompt (pow: on average); 0: N for none, 1 for bon, else 2"""
    draw: Literal["exact", "sample"] = "exact"
    """z ~ w: `sample` num_kept times with replacement; `exact`: the same mean, least variance"""
    thresholds: tuple[float, float] = (-0.3, 0.3)
    """top, top_random, top_bottom: keep R above the second, top_bottom also below the first"""
    pow_k: Amount = 1.0
    """pow: a row is drawn from the buffer with weight |R|^pow_k, for R in [-1, 1]"""
    # PPO
    kl_coef: Amount = 0.01
    """β, Eq. 4"""
    kl_target: Amount = 0.0
    """above 0: move kl_coef after every update towards this KL in nats per response (LMHP)"""
    kl_horizon: Count = 10000
    """episodes over which kl_target acts"""
    noptepochs: Count = 3
    """m: passes over the kept rows per update"""
    minibatch_size: Count = 64
    """rows per optimizer step, over all ranks; thresholds: split into about equal parts"""
    micro_batch_size: Count = 8
    """rows per rank in one forward and backward pass; changes memory and speed, not the gradient"""
    lr: Amount = 5e-7
    """learning rate of the policy, and of a shared critic"""
    critic_lr: Amount = 9e-6
    """learning rate of a separate critic"""
    lr_schedule: Literal["constant", "linear"] = "constant"
    """per update: constant, or falling to zero"""
    critic_warmup_updates: Whole = 0
    """first updates with learning rate 0 for the policy, whose gradients still fill Adam's moments"""
    adam_style: Literal["torch", "tensorflow"] = "torch"
    """where epsilon enters Adam; TensorFlow's is what LMHP's curves used"""
    eps: Positive = 1e-5
    """Adam's epsilon"""
    max_grad_norm: Amount = 1.0
    """clip the gradient norm, one norm over policy and critic together, at this; 0: never"""
    cliprange: Positive = 0.2
    """policy ratio is clipped to 1 ± cliprange"""
    cliprange_value: Positive = 0.2
    """value prediction is clipped to the old value ± cliprange_value"""
    vf_coef: Amount = 0.1
    """weight of the value loss"""
    gamma: Share = 1.0
    """discount"""
    lam: Share = 0.95
    """λ of GAE"""
    whiten_rewards: bool = False
    """scale rewards per token to unit variance, keeping their mean, once per rollout (LMHP)"""
    # evaluation and logging
    eval_prompts: str | None = None
    """held-out prompts, same columns as `prompts`; none: no evaluation"""
    actual_score: str | None = None
    """s: `module:function` as in `reward`, for example unit tests; needed for eval/*_pass1"""
    eval_every: Count = 5
    """updates between evaluations (there is one before the first and after the last update)"""
    print_samples_every: Whole = 10
    """updates between printed samples; 0: never"""
    checkpoint_every: Count = 10
    """updates between checkpoints; one is written before every evaluation and after the last update too"""
    save_policy_every: Whole = 0
    """updates between copies of the policy that are kept as policy_<update>; 0: none"""


# LMHP launch.py and train_policy.py
LM_HUMAN_PREFERENCES = """
    --critic shared --query_length 64 --long_queries keep_start --no-reshuffle --total_episodes 1000000
    --batch_size 512 --num_responses 1 --response_length 24 --temperature 0.7 --stop_token 13 --stop_after 16
    --no-mask_after_stop --missing_stop_score -1 --no-normalize_reward --filter none --kl_coef 0.15
    --kl_target 6 --noptepochs 4 --minibatch_size 512 --micro_batch_size 64 --forward_batch_size 64 --lr 1e-5
    --lr_schedule linear --adam_style tensorflow --max_grad_norm 0 --whiten_rewards
"""
PRESETS = {"pfppo": "", "lm_human_preferences": LM_HUMAN_PREFERENCES}


def main(args: Args) -> None:
    # ------------------------------------------------ Setup: what can be refused is refused here
    accelerator = start_accelerator(args.shard, args.log_with, args.output_dir)
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    all_sum = partial(accelerator.reduce, reduction="sum")
    num_kept, weights, num_updates = check_args(args, world)
    tokenizer, stop_id, rows, eval_rows = read_inputs(args, accelerator.print)
    queries = [row["query_ids"] for row in rows + eval_rows]
    reward = load_function(args.reward, "reward") if ":" in args.reward else None
    actual_score = load_function(args.actual_score, "actual_score") if args.actual_score else None
    n, temperature, local_b = args.num_responses, args.temperature, args.batch_size // world
    kept_per_update = args.batch_size * num_kept
    num_minibatches = max(1, round(kept_per_update / args.minibatch_size))
    accelerator.print(
        f"{num_updates} updates of {args.batch_size} prompts x {n} responses on {world} processes; filter "
        f"{args.filter} keeps {kept_per_update}; {args.noptepochs} epochs x {num_minibatches} minibatches"
    )
    show_first(accelerator, tokenizer, rows[0][args.prompt_field], rows[0]["query_ids"], [], stop_id)
    if args.dry_run:
        models = (1 if args.critic == "shared" else 2, 2 if reward is None else 1)  # trained, frozen
        config, dtype = load_config(args.policy, "policy"), frozen_precision(accelerator, args.frozen_dtype)
        accelerator.print(memory_line(accelerator, config, *models, dtype, args.shard))
        return
    output_dir = open_run(accelerator, args)

    set_seed(args.seed + 100003 * rank)  # LMHP: a rank-shifted seed
    policy, ref_policy, reward_model, critic = load_models(accelerator, args)
    reward = reward_model or reward
    model = PolicyAndCritic(policy, critic)
    critic_lr = args.critic_lr if args.critic == "separate" else args.lr
    groups = [{"params": policy.parameters()}, {"params": critic.parameters()}]
    optimizer = torch.optim.AdamW(groups, eps=args.eps, weight_decay=0.0)
    model = model if args.shard else accelerator.prepare(model)
    optimizer = accelerator.prepare(optimizer)
    bare = accelerator.unwrap_model(model, keep_torch_compile=False)
    policy = bare.policy
    judges = (ref_policy, reward, actual_score)
    keep = partial(filter_responses, name=args.filter, weights=weights, num_kept=num_kept, draw=args.draw)
    keep = partial(keep, thresholds=args.thresholds, pow_k=args.pow_k)

    # ------------------------------------------------ Continue a killed run, or measure π_SFT's rewards first
    state = load_checkpoint(accelerator, output_dir, bare, optimizer)
    open_metrics(accelerator, args, output_dir, state["step"] if state else 0)
    if state is None:
        check_model(accelerator, policy, queries, args.response_length, "policy")
        check_cache(accelerator, policy, queries, "policy")
        if isinstance(reward, RewardModel):
            check_model(accelerator, reward, queries, args.response_length, "reward")
        state = {"step": 0, "optimizer_step": 0, "kl_coef": args.kl_coef, "best": -math.inf, "metrics": {}}
        state["reward_mean"], state["reward_std"] = 0.0, 1.0
        if args.normalize_reward:  # once: the scale of R_φ must not move under β and the critic
            count = math.ceil(args.normalize_samples / (args.num_responses * world))  # prompts per rank
            batch_rows = [rows[i] for i in prompt_order(len(rows), rank * count, count, args.seed + 1)]
            generator = random_generator(device, args.seed, 1, rank)
            with whole(accelerator, policy):
                rollout = sample_rollout(policy, batch_rows, n, temperature, args, stop_id, generator)
            texts = decode_responses(tokenizer, rollout)
            with whole(accelerator, reward):
                scores = score_rollout(reward, batch_rows, rollout, texts, args)
            scores = accelerator.gather(scores).float()
            state["reward_mean"], state["reward_std"] = scores.mean().item(), scores.std().item()
            same = f"--reward gives {scores[0]} for all {len(scores)} samples of π_SFT: nothing to learn from"
            refuse((not state["reward_std"] > 0, same))
    run_start, first_update = time.time(), state["step"]
    for update in range(first_update + 1, num_updates + 2):
        # ---------------- Evaluate and log what was trained so far. This may fail: a checkpoint comes before
        clock, done, metrics = [time.time()], update - 1, state["metrics"]
        bare.eval()
        if eval_rows and (done % args.eval_every == 0 or done == num_updates):
            metrics |= evaluate(accelerator, policy, judges, eval_rows, tokenizer, stop_id, args, done)
            metrics["seconds/evaluate"] = time.time() - clock[0]
            if best_score(metrics) > state["best"]:
                state["best"] = best_score(metrics)
                save_model(accelerator, policy, tokenizer, stop_id, output_dir / "policy_best")
        if metrics:
            left = time_left(run_start, done - first_update, num_updates - done)
            log_metrics(accelerator, output_dir, done, metrics, SHOWN, f"/{num_updates}{left}")
        if done == num_updates:
            break
        clock = [time.time()]

        # ---------------- 1. take B prompts
        start = (update - 1) * args.batch_size + rank * local_b
        batch_rows = [rows[i] for i in prompt_order(len(rows), start, local_b, args.seed, args.reshuffle)]

        # ---------------- 2. draw N responses for each
        generator = random_generator(device, args.seed, 3, update, rank)
        with whole(accelerator, policy):
            rollout = sample_rollout(policy, batch_rows, n, temperature, args, stop_id, generator)
        prompt_ids = torch.arange(local_b, device=device) + rank * local_b  # ids count over ranks
        rollout["prompt_ids"] = prompt_ids.repeat_interleave(args.num_responses)  # (B*N,)
        texts = decode_responses(tokenizer, rollout)
        clock.append(time.time())

        # ---------------- 3. score them
        try:
            with whole(accelerator, reward):
                raw_scores = score_rollout(reward, batch_rows, rollout, texts, args)  # (B*N,) R_φ
        except SystemExit:  # a reward function failed and ends all ranks; what was trained is kept
            save_checkpoint(accelerator, output_dir, done, state, bare, optimizer)
            raise
        scores = (raw_scores - state["reward_mean"]) / state["reward_std"]
        if args.missing_stop_score is not None:  # LMHP: a fixed score where the stop token is missing
            scores = torch.where(rollout["has_stop"], scores, args.missing_stop_score)
        rollout["scores"] = scores
        lengths = rollout["response_mask"].sum(1)
        local = (raw_scores, scores, rollout["prompt_ids"], lengths, rollout["has_stop"])
        all_scores, all_shaped, all_ids, all_lengths, all_stop = accelerator.gather(local)
        clock.append(time.time())

        # ---------------- 4. filter: every rank sees all scores and draws the same z, then takes its own rows
        # The kept rows are treated as if π_θ had drawn them (Eq. 5): the ratio starts at 1. DEPARTS PAPER's
        # code, which draws minibatches with replacement, after whitening, by weights for N = 5: here z is
        # drawn once per prompt, before whitening, and every kept row is trained on exactly m times
        filter_generator = random_generator("cpu", args.seed, 4, update)
        selected = keep(all_scores.float().cpu(), all_ids.cpu(), filter_generator)  # (K,) over all ranks
        first = rank * len(scores)
        local = selected[(selected >= first) & (selected < first + len(scores))].to(device) - first
        # thresholds can leave a rank nothing: it goes along with one fully masked row
        empty = len(local) == 0
        local = torch.zeros(1, dtype=torch.long, device=device) if empty else local
        kept = {name: tensor[local] for name, tensor in rollout.items()}
        mask = kept["response_mask"] = kept["response_mask"] & (not empty)  # (K, R)
        num_minibatches = max(1, round(len(selected) / args.minibatch_size))

        # ---------------- 5. log-probabilities, reference log-probabilities and values of the kept rows only
        size = args.forward_batch_size
        with whole(accelerator, bare):
            logprobs, values = response_logprobs_and_values(bare, kept, temperature, size)
        with whole(accelerator, ref_policy):
            ref_logprobs, _ = response_logprobs_and_values(ref_policy, kept, temperature, size)
        kept |= {"logprobs": logprobs, "values": values}  # (K, R)
        clock.append(time.time())

        # ---------------- 6. rewards per token (Eq. 4)
        kl = torch.where(mask, logprobs - ref_logprobs, 0.0)  # of one sample each, so negative at times
        rewards, non_score_reward = cumulative_rewards(kept["scores"], kl, mask, state["kl_coef"])
        if args.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False, all_sum=all_sum)

        # ---------------- 7. advantages and returns (GAE)
        advantages, returns = gae(rewards, values, mask, args.gamma, args.lam)
        # DEPARTS LMHP and PAPER's code, which whiten per rank: one command is one algorithm on 1 or 8 GPUs
        kept |= {"advantages": whiten(advantages, mask, all_sum=all_sum), "returns": returns}
        assert advantages.shape == returns.shape == logprobs.shape == mask.shape

        # ---------------- 8. m epochs of clipped PPO on the kept rows (Eq. 5)
        bare.train()
        policy_lr = 0.0 if update <= args.critic_warmup_updates else args.lr
        for group, lr in zip(optimizer.param_groups, (policy_lr, critic_lr)):
            group["lr"] = scheduled_lr(lr, update - 1, num_updates, args.lr_schedule, warmup_steps=0)
        stats, norms, first_ratio_max = [], [], torch.ones(1, device=device)
        for epoch in range(args.noptepochs if len(selected) else 0):
            generator = random_generator("cpu", args.seed, 5, update, epoch, rank)
            order = torch.randperm(len(mask), generator=generator).to(device)
            for minibatch in progress(order.tensor_split(num_minibatches), f"epoch {epoch + 1}: minibatch"):
                idle = len(minibatch) == 0  # a rank with fewer rows than minibatches goes along with weight 0
                minibatch = order[:1] if idle else minibatch
                kept["loss_weights"] = torch.zeros_like(kept["values"])
                kept["loss_weights"][minibatch] = loss_weights(mask[minibatch] & (not idle), all_sum, world)
                local_stats, max_ratio = torch.zeros(len(STATS), device=device), torch.zeros(1, device=device)
                parts = micro_batches(kept, minibatch, args.micro_batch_size)
                for part, counts, sync in rounds(accelerator, model, parts):
                    with sync, accelerator.autocast():
                        loss, part_stats, ratio = minibatch_loss(model, trim(kept, part), args)
                        accelerator.backward(loss * counts)
                    local_stats += part_stats * counts
                    max_ratio = torch.maximum(max_ratio, ratio.max())
                first_ratio_max = first_ratio_max if stats else accelerator.gather(max_ratio).max()
                stats.append(accelerator.reduce(local_stats, "mean"))
                norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm or math.inf)
                norm = float(full(norm))
                check_finite(accelerator, update, stats[-1][STATS.index("ppo/loss/total")].item(), norm)
                norms += [norm] if math.isfinite(norm) else []
                for group in optimizer.param_groups:
                    group["eps"] = adam_epsilon(args.eps, args.adam_style, state["optimizer_step"] + 1)
                optimizer.step()
                optimizer.zero_grad()
                state["optimizer_step"] += not optimizer.step_was_skipped  # under fp16 a step may be
        clock.append(time.time())

        # ---------------- Measure and save (numbers are over all ranks before anything uses them)
        metrics = {"ppo/episode": update * args.batch_size * n, "ppo/optimizer_step": state["optimizer_step"]}
        metrics |= {"objective/kl_coef": state["kl_coef"], "ppo/lr": optimizer.param_groups[0]["lr"]}
        metrics |= sample_metrics(all_scores, all_shaped, all_lengths, all_stop, selected)
        if len(selected):  # thresholds can leave nothing to take a mean of; 0 would pass for a KL of 0
            metrics |= kept_metrics(kept, kl, non_score_reward, all_sum)
            metrics |= training_metrics(stats, norms, first_ratio_max)
        if args.kl_target:
            mean_kl, fraction = metrics["objective/kl"], args.batch_size * n / args.kl_horizon
            state["kl_coef"] = next_kl_coef(state["kl_coef"], mean_kl, args.kl_target, fraction)
        metrics |= phase_seconds(clock)
        if rank == 0 and args.print_samples_every and update % args.print_samples_every == 0:
            show_sample(output_dir, update, batch_rows[0][args.prompt_field], texts[0], raw_scores[0].item())
        if args.save_policy_every and update % args.save_policy_every == 0:
            save_model(accelerator, policy, tokenizer, stop_id, output_dir / f"policy_{update}")
        state |= {"step": update, "metrics": metrics}
        stop, last = stopping(accelerator), update == num_updates
        due = (args.checkpoint_every, args.eval_every if eval_rows else args.checkpoint_every)
        if stop or last or any(update % every == 0 for every in due):
            save_checkpoint(accelerator, output_dir, update, state, bare, optimizer)
        refuse((stop, f"stopped after update {update}, as asked; the same command goes on"))
    save_model(accelerator, policy, tokenizer, stop_id, output_dir / "policy")
    accelerator.print(f"done: {output_dir / 'policy'}")


STATS = ("ppo/loss/policy", "ppo/loss/value", "ppo/loss/total", "ppo/policy/entropy", "ppo/policy/approxkl")
STATS += ("ppo/policy/clipfrac", "ppo/policy/ratio", "ppo/val/clipfrac", "ppo/val/vpred", "ppo/val/error")


def token_logprobs(logits: Tensor, tokens: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """logits (rows, R, V), tokens and mask (rows, R) -> log π(token) (rows, R) in float32, 0 where masked."""
    logits = logits.float() if temperature == 1 else logits.float() / temperature  # no copy at 1
    chosen = logits.gather(-1, tokens.masked_fill(~mask, 0).unsqueeze(-1)).squeeze(-1)
    return torch.where(mask, chosen - logits.logsumexp(-1), 0.0)


def token_entropy(logits: Tensor, temperature: float) -> Tensor:
    """logits (rows, R, V) -> entropy of π at every slot (rows, R) in nats."""
    entropy = []
    for part in logits.split(4):  # a few rows at a time: three more tensors of all rows would not fit
        logprobs = (part.float() / temperature).log_softmax(-1)
        entropy.append(-(logprobs.exp() * logprobs).sum(-1))
    return torch.cat(entropy)


def cumulative_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> tuple[Tensor, Tensor]:
    """scores (rows,), kl = logprobs - ref_logprobs, mask (rows, R) -> rewards, non_score_reward (rows, R)."""
    # Eq. 4 (cumulative reward): -kl_coef * (logprobs - ref_logprobs) at every token, + scores at the last one
    # The KL is paid where it arises, so that the advantage of a token counts what it and those behind it cost
    non_score_reward = -kl_coef * kl
    is_last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)  # nothing where a row is all masked
    return non_score_reward + torch.where(is_last, scores.unsqueeze(1), 0.0), non_score_reward


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """rewards, values, mask (rows, R), padded right -> advantages, returns; the value behind the end is 0."""
    rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
    advantages, lastgaelam, nextvalues = torch.zeros_like(values), 0.0, 0.0
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * nextvalues - values[:, t]
        lastgaelam = torch.where(mask[:, t], delta + gamma * lam * lastgaelam, 0.0)
        advantages[:, t], nextvalues = lastgaelam, values[:, t]
    return advantages, advantages + values


def whiten(values: Tensor, mask: Tensor, shift_mean: bool = True, all_sum=lambda x: x) -> Tensor:
    """Masked mean 0 and (biased) variance 1, 0 where masked; or the old mean. `all_sum` adds over ranks."""
    values = torch.where(mask, values, 0.0)
    count, total = all_sum(torch.stack([mask.sum().to(values.dtype), values.sum()]))
    mean = total / count.clamp(min=1)
    var = all_sum(torch.where(mask, values - mean, 0.0).square().sum()) / count.clamp(min=1)
    whitened = (values - mean) * torch.rsqrt(var + 1e-8)  # LMHP core.py whiten_rewards
    return torch.where(mask, whitened if shift_mean else whitened + mean, 0.0)


def loss_weights(mask: Tensor, all_sum=lambda x: x, num_processes: int = 1) -> Tensor:
    """mask (rows, R) of one minibatch -> weights (rows, R): the loss Σ weights · token loss is the mean over
    the tokens of all ranks. DDP averages gradients over ranks, so a sum over ranks comes with the factor
    num_processes."""
    return mask.float() * num_processes / all_sum(mask.sum().float()).clamp(min=1)


def policy_loss(
    new_logprobs: Tensor, logprobs: Tensor, advantages: Tensor, mask: Tensor, cliprange: float
) -> tuple[Tensor, Tensor, Tensor]:
    """All (rows, R) -> clipped policy loss per token, whether it was clipped, ratio (1 where masked)."""
    ratio = torch.where(mask, new_logprobs - logprobs, 0.0).exp()
    advantages = torch.where(mask, advantages, 0.0)
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    return torch.max(unclipped, clipped), clipped > unclipped, ratio


def value_loss(
    vpred: Tensor, values: Tensor, returns: Tensor, mask: Tensor, cliprange_value: float
) -> tuple[Tensor, Tensor]:
    """All (rows, R) -> half the larger of clipped and unclipped squared error, whether clipping acted."""
    vpred, values, returns = (torch.where(mask, x, 0.0) for x in (vpred, values, returns))
    clipped = values + (vpred - values).clamp(-cliprange_value, cliprange_value)
    losses1, losses2 = (vpred - returns).square(), (clipped - returns).square()
    return 0.5 * torch.max(losses1, losses2), (losses2 > losses1) & ((vpred - values).abs() > cliprange_value)


def minibatch_loss(model: nn.Module, batch: dict[str, Tensor], args: Args) -> tuple[Tensor, Tensor, Tensor]:
    """A micro-batch (from `trim`, with loss_weights) -> its share of the minibatch loss (Eq. 5), its share of
    the STATS (10,), the ratio of every token (rows, R), 1 where masked."""
    mask, weights = batch["response_mask"], batch["loss_weights"]
    logits, vpred = model(batch["query_responses"], batch["mask"], mask.shape[1])
    new_logprobs = token_logprobs(logits, batch["responses"], mask, args.temperature)
    logprobs, values, returns = batch["logprobs"], batch["values"], batch["returns"]
    advantages = batch["advantages"]
    pg_losses, pg_clipped, ratio = policy_loss(new_logprobs, logprobs, advantages, mask, args.cliprange)
    vf_losses, vf_clipped = value_loss(vpred, values, returns, mask, args.cliprange_value)
    pg_loss, vf_loss = (pg_losses * weights).sum(), (vf_losses * weights).sum()
    loss = pg_loss + args.vf_coef * vf_loss
    with torch.no_grad():
        log_ratio = torch.where(mask, new_logprobs - logprobs, 0.0)  # ratio.log() may have underflowed
        entropy, approxkl = token_entropy(logits, args.temperature), 0.5 * log_ratio.square()
        vpred, error = torch.where(mask, vpred, 0.0), (vpred - returns).square()
        per_token = (entropy, approxkl, pg_clipped, ratio, vf_clipped, vpred, error)
        means = [(torch.where(mask, x.float(), 0.0) * weights).sum() for x in per_token]
        return loss, torch.stack([pg_loss, vf_loss, loss, *means]), ratio.detach()


def next_kl_coef(kl_coef: float, kl: float, target: float, fraction: float) -> float:
    """LMHP's controller. kl: nats per response; fraction: episodes of the update / horizon."""
    return kl_coef * (1 + min(max(kl / target - 1, -0.2), 0.2) * fraction)


def scheduled_lr(
    lr: float, step: int, num_steps: int, schedule: str, warmup_steps: int, final_fraction: float = 0.0
) -> float:
    """Learning rate of step 0 .. num_steps-1: linear warm-up, then constant, linear (LMHP) or cosine."""
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    fraction = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[schedule]
    return lr * (final_fraction + (1 - final_fraction) * fraction)


def adam_epsilon(eps: float, style: str, step: int, beta2: float = 0.999) -> float:
    """Epsilon of torch's Adam at step 1, 2, ...; divided by sqrt(1 - β2^t) it is TensorFlow's exactly."""
    return eps / math.sqrt(1 - beta2**step) if style == "tensorflow" else eps


THRESHOLDS = ("top", "top_random", "top_bottom")


def rank_weight_vector(name: str, n: int) -> list[float]:
    """w over ranks 1..n, best first: none and random 1/n each; BoN, BR, BW as in PAPER."""
    if name == "bon" or n == 1:
        return [1.0] + [0.0] * (n - 1)
    if name == "br":
        return [0.5] + [0.5 / (n - 1)] * (n - 1)
    if name == "bw":
        return [0.5] + [0.0] * (n - 2) + [0.5]
    return [1.0 / n] * n


def rank_rows(scores: Tensor, prompt_ids: Tensor, generator: torch.Generator) -> Tensor:
    """scores, prompt_ids (rows,) in any order -> row indices (prompts, N), best first, ties in random order.
    Raises ValueError when prompts do not all have the same number of rows."""
    counts = prompt_ids.unique(return_counts=True)[1]
    if (counts != counts[0]).any():
        raise ValueError(f"prompts need the same number of responses each, not {counts.unique().tolist()}")
    order = torch.randperm(len(scores), generator=generator)
    order = order[scores[order].argsort(descending=True, stable=True)]
    order = order[prompt_ids[order].argsort(stable=True)]
    return order.view(len(counts), -1)


def filter_responses(
    scores, prompt_ids, generator, name, weights, num_kept, draw, thresholds=(0.0, 0.0), pow_k=1.0
) -> Tensor:
    """The filtered policy μ_θ: scores, prompt_ids (rows,) on CPU -> selected row indices (K,), ascending,
    repeats possible. weights: w over the ranks of a prompt, best first.

    Every filter is a matrix of expected counts over groups: a prompt's N ranks (rank filters), one row
    (thresholds), or the whole buffer (pow). `sample` draws with replacement; `exact` is systematic sampling:
    row i is kept ⌊e_i⌋ or ⌈e_i⌉ times, e_i on average."""
    if not torch.isfinite(scores).all():
        raise ValueError("the reward is not finite for some responses; look at the reward model or function")
    if name in (*THRESHOLDS, "pow") and scores.abs().max() > 1:
        message = "thresholds and pow_k are for R in [-1, 1], which the reward leaves; take a rank filter"
        warnings.warn(message, stacklevel=2)
    ranked = rank_rows(scores, prompt_ids, generator)  # (B, N)
    if name in THRESHOLDS:  # DEPARTS PAPER: it gives no thresholds; they are fields of Args
        rows, draw = ranked.view(-1, 1), "exact"
        keep = scores[rows] > thresholds[1]
        keep = keep | (scores[rows] < thresholds[0]) if name == "top_bottom" else keep
        expected = torch.where(keep, 1.0, 0.5 if name == "top_random" else 0.0).double()
    elif name == "pow":
        rows = ranked.view(1, -1)
        expected = scores[rows].abs().double() ** pow_k
        expected = expected if expected.sum() > 0 else torch.ones_like(expected)
        num_kept = num_kept * len(ranked)
        expected = expected / expected.sum() * num_kept
    else:
        rows, expected = ranked, num_kept * torch.tensor(weights, dtype=torch.double).expand(ranked.shape)
    if draw == "sample" and (name != "none" or min(weights) < max(weights)):
        drawn = torch.multinomial(expected, num_kept, replacement=True, generator=generator)
        return rows.gather(1, drawn).flatten().sort().values
    # DEPARTS PAPER, which draws z ~ w (--draw sample): `exact` keeps every row as often on average, with the
    # least variance: BW keeps the best and the worst, never one of them twice
    shuffle = torch.rand(rows.shape, generator=generator).argsort(1)  # which ranks go together is random
    rows, expected = rows.gather(1, shuffle), expected.gather(1, shuffle)
    cumulative = (F.pad(expected.cumsum(1), (1, 0)) * 1e9).round() / 1e9  # rounded: 1 + 4 · 0.25 must be 2
    offset = torch.rand(len(rows), 1, generator=generator, dtype=torch.double)
    counts = (cumulative + offset).floor().diff(dim=1).long()
    return rows.flatten().repeat_interleave(counts.flatten()).sort().values


class RewardModel(nn.Module):
    """R_φ: a language-model backbone plus one output layer (Eq. 2), gain and bias."""

    def __init__(self, lm_backbone: nn.Module, bound: str = "none"):
        super().__init__()
        self.lm_backbone, self.bound = lm_backbone, bound
        config = lm_backbone.config.get_text_config()
        width = getattr(config, "word_embed_proj_dim", None) or config.hidden_size  # opt-350m has the former
        self.scalar_head = nn.Linear(width, 1)
        self.reward_gain, self.reward_bias = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids, mask (rows, T) -> unbounded score at every column (rows, T), float32 under autocast too."""
        hidden = self.lm_backbone(**model_inputs(ids, mask), use_cache=False).last_hidden_state
        with torch.autocast(hidden.device.type, enabled=False):
            return self.reward_gain * self.scalar_head(hidden.float()).squeeze(-1) + self.reward_bias


class PolicyAndCritic(nn.Module):
    """What is trained, in one wrapper so that both synchronise, accumulate and step together."""

    def __init__(self, policy: nn.Module, critic: nn.Module):
        super().__init__()
        self.policy, self.critic = policy, critic

    def forward(self, ids: Tensor, mask: Tensor, response_length: int) -> tuple[Tensor, Tensor]:
        """ids, mask (rows, Q+R) -> logits (rows, R, V) and values (rows, R) of the R response tokens."""
        shared, hidden = isinstance(self.critic, nn.Linear), []
        if shared:  # what the output layer reads; hidden_states[-1] is something else in gemma3n
            backbone = getattr(self.policy, "model", self.policy.base_model)
            backbone = getattr(backbone, "decoder", backbone)  # OPT calls this alone
            hook = backbone.register_forward_hook(lambda *call: hidden.append(call[-1].last_hidden_state))
        output = self.policy(**model_inputs(ids, mask), use_cache=False, logits_to_keep=response_length + 1)
        if shared:
            hook.remove()
            with torch.autocast(ids.device.type, enabled=False):  # values in float32, as those of RewardModel
                values = self.critic(hidden[0].float()).squeeze(-1)
        else:
            values = self.critic(ids, mask)
        return output.logits[:, :-1], values[:, -response_length - 1 : -1].float()


def make_critic(args: Args, policy: nn.Module) -> nn.Module:
    """The critic that `critic` and `critic_init` ask for. It starts from the reward model where there is one:
    what a state is worth is close to what that says of the text so far. Else its head starts at zero."""
    if args.critic == "shared":
        critic = head = RewardModel(getattr(policy, "model", policy.base_model)).scalar_head
    elif args.critic_init or ":" not in args.reward:
        return load_reward_model(args.critic_init or args.reward, torch.float32, args.shard)
    else:
        causal_lm = load_causal_lm(args.policy, torch.float32, args.shard, "policy")
        critic = RewardModel(getattr(causal_lm, "model", causal_lm.base_model))
        head = critic.scalar_head
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return critic


def pad_left(rows: list[list[int]], device) -> tuple[Tensor, Tensor]:
    """Lists of ids -> ids (rows, T) padded left with 0, mask (rows, T) bool from the lengths, not the ids."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows], device=device)
    return ids, mask


def model_inputs(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """ids, mask (rows, T) -> forward arguments. Positions count real tokens; padding is fed as token 0."""
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    return {"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long(), "position_ids": positions}


def stop_masks(responses: Tensor, stop_token_id: int, stop_after: int) -> tuple[Tensor, Tensor]:
    """responses (rows, R) -> mask (rows, R), True up to and including the first stop token at index >=
    stop_after; has_stop (rows,), whether there is one. stop_token_id -1 means none."""
    is_stop = responses == stop_token_id
    is_stop[:, :stop_after] = False
    behind = (is_stop.cumsum(1) - is_stop.long()) > 0
    return ~behind, is_stop.any(1)


@torch.no_grad()
def generate(
    model, queries, query_mask, num_responses, length, temperature, stop_id, stop_after=0, generator=None
) -> Tensor:
    """Plain ancestral sampling: queries, query_mask (B, Q) padded left -> responses (B*N, length), 0 behind
    the stop token, those of a query adjacent. Temperature 0 is greedy. The query is read once for its N
    responses, and rows that have stopped leave the batch. Nothing is taken from a generation_config: samples
    are π_θ's at this temperature."""
    # transformers 5.24 renamed the cache
    cache_name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    cache = growing_cache(model.config)
    settings = {cache_name: cache, "use_cache": True, "logits_to_keep": 1}
    logits = model(**model_inputs(queries, query_mask), **settings).logits[:, -1]
    logits, mask = logits.repeat_interleave(num_responses, 0), query_mask.repeat_interleave(num_responses, 0)
    width = queries.shape[1]  # a recurrent layer counts no tokens
    if max((getattr(x, "get_seq_length", lambda: width)() for x in cache.layers), default=0) != width:
        raise RuntimeError(f"{type(model).__name__} does not fill the cache that it is given")
    if num_responses > 1:
        copies = torch.arange(len(queries), device=queries.device).repeat_interleave(num_responses)
        cache.reorder_cache(copies)
    rows = torch.arange(len(mask), device=queries.device)  # rows still in the batch
    done = torch.zeros_like(rows, dtype=torch.bool)
    responses = torch.zeros(len(mask), length, dtype=torch.long, device=queries.device)
    for t in range(length):
        tokens = logits.argmax(-1)
        if temperature > 0:
            probabilities = (logits.float() / temperature).softmax(-1)
            tokens = torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
        responses[rows, t] = torch.where(done, 0, tokens)
        if t >= stop_after:
            done = done | (tokens == stop_id)
        if t + 1 == length or done.all():
            break
        if done.sum() >= max(1, len(done) // 8):  # dropping copies the cache, so not for every single row
            alive = (~done).nonzero().squeeze(1)
            cache.reorder_cache(alive)
            rows, done, mask, tokens = rows[alive], done[alive], mask[alive], tokens[alive]
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        positions = mask.sum(1, keepdim=True) - 1
        step = {"input_ids": tokens.unsqueeze(1), "attention_mask": mask.long(), "position_ids": positions}
        logits = model(**step, **settings).logits[:, -1]
    return responses


@torch.no_grad()
def sample_rollout(model, rows, n: int, temperature: float, args: Args, stop_id: int, generator) -> dict:
    """n responses to each row -> queries, query_mask (B*N, Q), responses, response_mask, score_mask (B*N, R),
    has_stop (B*N,), a row's adjacent. response_mask is what is trained on, score_mask what R_φ reads."""
    queries, query_mask = pad_left([row["query_ids"] for row in rows], next(model.parameters()).device)
    length, stop = args.response_length, stop_id if args.mask_after_stop else -1
    size, responses = max(1, (args.generation_batch_size or args.forward_batch_size) // n), []
    for ids, mask in progress(list(zip(queries.split(size), query_mask.split(size))), "generating: batch"):
        width = int(mask.sum(1).max())
        ids, mask = ids[:, -width:], mask[:, -width:]
        responses.append(generate(model, ids, mask, n, length, temperature, stop, args.stop_after, generator))
    responses = torch.cat(responses)
    score_mask, has_stop = stop_masks(responses, stop_id, args.stop_after)
    rollout = {"queries": queries.repeat_interleave(n, 0), "query_mask": query_mask.repeat_interleave(n, 0)}
    rollout |= {"responses": responses, "score_mask": score_mask, "has_stop": has_stop}
    return rollout | {"response_mask": score_mask if args.mask_after_stop else torch.ones_like(score_mask)}


def score_rollout(reward, rows: list[dict], rollout: dict, texts: list[str], args: Args) -> Tensor:
    """R_φ of every response (B*N,), as the reward gives it: a RewardModel reads ids, a function texts."""
    if isinstance(reward, RewardModel):
        return reward_model_scores(reward, rollout, args.forward_batch_size)
    values = call_function(reward, rows, texts, args.prompt_field)
    return torch.tensor(values, device=rollout["responses"].device)


def trim(rollout: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """The given rows of a rollout as one micro-batch. All padding moves to the left, so that query_responses
    and mask (rows, T) are as wide as the longest row, not the longest query plus the longest response.
    Tensors over the response (rows, R) end where their row ends; `columns` (rows, R) says where each of their
    columns stands in the rollout, read_mask what a reward model reads."""
    batch = {name: tensor[rows] for name, tensor in rollout.items()}
    ids = torch.cat([batch["queries"], batch["responses"]], 1)
    mask = torch.cat([batch["query_mask"], batch["response_mask"]], 1)
    read = torch.cat([batch["query_mask"], batch["score_mask"]], 1)
    r = max(1, int(batch["response_mask"].sum(1).max()))
    order = mask.int().argsort(dim=1, stable=True)[:, -max(r + 1, int(mask.sum(1).max())) :]
    columns = batch["response_mask"].int().argsort(dim=1, stable=True)[:, -r:]
    for name, tensor in batch.items():
        if tensor.ndim == 2 and name not in ("queries", "query_mask"):
            batch[name] = tensor.gather(1, columns)
    batch |= {"query_responses": ids.gather(1, order), "mask": mask.gather(1, order)}
    return batch | {"read_mask": read.gather(1, order), "columns": columns}


def micro_batches(rollout: dict[str, Tensor], rows: Tensor, size: int) -> list[Tensor]:
    """Split row indices into parts of at most `size` rows of similar length (so that `trim` saves most)."""
    lengths = rollout["query_mask"].sum(1) + rollout["response_mask"].sum(1)
    return list(rows[lengths[rows].argsort(stable=True)].split(size))


@torch.no_grad()
def response_logprobs_and_values(
    model: nn.Module, rollout: dict[str, Tensor], temperature: float, size: int
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and values (rows, R) of a rollout, `size` rows at a time, 0 behind each response.
    `model` is a PolicyAndCritic, or a causal LM (values are then 0). Its logits are gone at the end."""
    logprobs = torch.zeros(rollout["responses"].shape, device=rollout["responses"].device)
    values = torch.zeros_like(logprobs)
    parts = micro_batches(rollout, torch.arange(len(logprobs), device=logprobs.device), size)
    for rows in progress(parts, "log-probabilities: batch"):
        batch = trim(rollout, rows)
        ids, mask, r = batch["query_responses"], batch["mask"], batch["responses"].shape[1]
        if isinstance(model, PolicyAndCritic):
            logits, value = model(ids, mask, r)
            value = torch.where(batch["response_mask"], value, 0.0)
            values[rows] = values[rows].scatter(1, batch["columns"], value)
        else:
            logits = model(**model_inputs(ids, mask), use_cache=False, logits_to_keep=r + 1).logits[:, :-1]
        logprob = token_logprobs(logits, batch["responses"], batch["response_mask"], temperature)
        logprobs[rows] = logprobs[rows].scatter(1, batch["columns"], logprob)
    return logprobs, values


@torch.no_grad()
def reward_model_scores(model: RewardModel, rollout: dict[str, Tensor], size: int) -> Tensor:
    """R_φ of every row (rows,): the score at the last token of query and response, up to score_mask."""
    scores = torch.zeros(len(rollout["responses"]), device=rollout["responses"].device)
    parts = micro_batches(rollout, torch.arange(len(scores), device=scores.device), size)
    for rows in progress(parts, "scoring: batch"):
        batch = trim(rollout, rows)
        mask = batch["read_mask"]
        last = mask.shape[1] - 1 - mask.flip(1).int().argmax(1)
        score = model(batch["query_responses"], mask).gather(1, last.unsqueeze(1)).squeeze(1)
        scores[rows] = score.tanh() if model.bound == "tanh" else score
    return scores


# ------------------------------------------------------------------------------------------------------------
# Plumbing: the same in all three scripts; a reader of the paper can stop here
# ------------------------------------------------------------------------------------------------------------


def refuse(*cases: tuple[bool, str]) -> None:
    """(is wrong, message) of every check: the first that is wrong ends the command with its one line."""
    for wrong, message in cases:
        if wrong:
            raise SystemExit(message)


def check_ranges(args) -> None:
    """Refuses a number below or above those that stand in its type in Args; NaN and infinity always."""
    for field in dataclasses.fields(args):
        low, high = getattr(field.type, "__metadata__", (-math.inf, math.inf))
        value = getattr(args, field.name)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int | float):
                wrong = not (math.isfinite(number) and low <= number <= high)
                refuse((wrong, f"--{field.name} must lie between {low} and {high}, not at {number}"))


def parse_args(args_class, argv: list[str] | None = None, presets: dict[str, str] | None = None):
    """Flags over the preset's flags over the defaults. --help shows the groups and sentences of Args."""
    argv = sys.argv[1:] if argv is None else argv
    for name, flags in (presets or {}).items():
        if f"--preset={name}" in argv or f"--preset {name}" in " ".join(argv):
            argv = flags.split() + argv
    if "--help" in argv or "-h" in argv:
        fields = re.sub(r"^    (\w+): ", r"  --\1 ", inspect.getsource(args_class), flags=re.MULTILINE)
        print(inspect.getmodule(args_class).__doc__, "A bool is set by --name and unset by --no-name.\n")
        print(fields.partition("class Args:\n")[2].replace('"""', ""))
        sys.exit()
    args = tyro.cli(args_class, args=argv, use_underscores=True)
    check_ranges(args)
    return args


def start_accelerator(shard: bool = False, tracker: str = "none", folder: str = "") -> Accelerator:
    """Ranks wait two hours for one that saves or grades (NCCL: ten minutes); DDP keeps one copy of gradients,
    not two. Refuses launchers that shard weights: sampling would wait for ranks that have stopped."""
    here = ["none", *map(str, tracking.get_available_trackers())]
    advice = f"pip install {tracker}" if tracker in tracking.LOGGER_TYPE_TO_CLASS else "choose one of them"
    refuse((tracker not in here, f"--log_with {tracker}: here are {', '.join(here)}; {advice}"))
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # it warns of tied weights at every checkpoint
    # cuDNN's attention has gradients that are NaN where a padded column attends to nothing
    torch.backends.cuda.enable_cudnn_sdp(False)
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    handlers = [InitProcessGroupKwargs(timeout=timedelta(hours=2)), ddp]
    where = {} if tracker == "none" else {"log_with": tracker, "project_dir": folder}
    accelerator = Accelerator(kwargs_handlers=handlers, **where)
    kind = accelerator.distributed_type.value
    wrong = shard and (accelerator.num_processes == 1 or accelerator.mixed_precision == "fp16")
    refuse(
        (kind in ("DEEPSPEED", "FSDP", "MEGATRON_LM"), f"{kind} does not work here; use --multi_gpu --shard"),
        (wrong, "--shard needs more than one process, and --mixed_precision bf16 or no; leave it out"),
    )
    return accelerator


ASKED_TO_STOP = []  # signals that came


def end_at_once() -> None:
    """From now on SIGTERM and Ctrl-C do what they usually do."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def ask_to_stop(number: int, *_) -> None:
    """What the first SIGTERM or Ctrl-C does: the run saves and ends. The second one ends it at once."""
    ASKED_TO_STOP.append(number)
    end_at_once()
    print("this step is finished and saved; ask again to end at once", file=sys.stderr)


def stopping(accelerator: Accelerator) -> bool:
    """Whether any rank was asked to stop; to be called by all ranks at the same place."""
    asked = torch.tensor([float(len(ASKED_TO_STOP))], device=accelerator.device)
    return accelerator.reduce(asked).item() > 0


def check_finite(accelerator: Accelerator, step: int, loss: float, norm: float) -> None:
    """Raises FloatingPointError; under fp16 a gradient may overflow, its step is skipped."""
    if not math.isfinite(loss if accelerator.scaler else loss + norm):
        advice = "the last good checkpoint is kept; lower the learning rate"
        raise FloatingPointError(f"step {step}: the loss is {loss}, the gradient norm {norm}; {advice}")


def units(*models) -> list[nn.Module]:
    """The parts of models that FSDP gathers one by one; none without --shard."""
    modules = [module for model in models if isinstance(model, nn.Module) for module in model.modules()]
    return [module for module in modules if hasattr(module, "unshard")]


def full(tensor):
    """The whole of a sharded tensor, on every rank; anything else as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def place(accelerator: Accelerator, shard: bool, *models: nn.Module) -> nn.Module:
    """The first of the models, after all were put on this rank's device, or rank 0's weights of each were
    split over the ranks, block by block. Under bf16 models then run in bfloat16, their heads in float32."""
    together, device, main = nn.ModuleList(models), accelerator.device, accelerator.is_main_process
    if not shard:
        return together.to(device)[0]
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # slow to import, as others below
    from torch.distributed.tensor import distribute_tensor, init_device_mesh

    weights, bf16 = together.state_dict(), accelerator.mixed_precision == "bf16"
    mesh = init_device_mesh(device.type, (accelerator.num_processes,))
    for model in models:
        backbone = getattr(model, "lm_backbone", model)
        names = getattr(backbone, "_no_split_modules", None) or ()
        blocks = [module for module in backbone.modules() if type(module).__name__ in names]
        if not blocks and hasattr(backbone, "config"):
            accelerator.print(f"--shard: {type(backbone).__name__} names no blocks: gathered as one unit")
        for module in dict.fromkeys((*blocks, backbone, model)):
            dtype = torch.bfloat16 if bf16 and (module in blocks or hasattr(module, "config")) else None
            policy = MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32)
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    if not main:
        together.to_empty(device=device)
    for name, parameter in together.named_parameters():
        weight = weights[name].to(device) if main else torch.empty_like(weights[name], device=device)
        parameter.data.copy_(distribute_tensor(weight, parameter.device_mesh, parameter.placements))
    for buffer in together.buffers():
        torch.distributed.broadcast(buffer, 0)
    return models[0]


@contextmanager
def whole(accelerator: Accelerator, *models):
    """Autocast, and each rank holds all weights of sharded models, so that it waits for no other one that
    samples longer. Every rank has to enter, with work or without; weights are not to be changed in here."""
    parts = units(*models)
    for part in parts:
        part.unshard()
        part.set_reshard_after_forward(False, recurse=False)
    with accelerator.autocast():
        yield
    for part in parts:
        part.reshard()
        part.set_reshard_after_forward(True, recurse=False)


def rounds(accelerator: Accelerator, model: nn.Module, parts: list):
    """(micro-batch, 1.0, context) for each one of an optimizer step: DDP adds up over ranks in the last. In
    each, sharded weights wait for all ranks, so one with fewer repeats its last, which counts 0.0."""
    count = torch.tensor([len(parts)], device=accelerator.device)
    count = int(accelerator.gather(count).max()) if units(model) else len(parts)
    for i in range(count):
        sync = nullcontext() if i == count - 1 else accelerator.no_sync(model)
        yield parts[min(i, len(parts) - 1)], float(i < len(parts)), sync


def load_pretrained(auto_class: str, path: str, field: str, template: str | None = None):
    """Configuration, or tokenizer (with a file's template), of a folder or id; refused if there is none."""
    import transformers  # slow to import: not before the settings are checked

    transformers.logging.disable_progress_bar()
    try:
        loaded = getattr(transformers, auto_class).from_pretrained(path)
    except (OSError, ValueError) as error:
        hub = "" if Path(path).exists() else "no such folder here; as a hub id: "
        raise SystemExit(f"--{field} {path}: {hub}{first_line(error)}") from None
    empty = isinstance(loaded, transformers.PreTrainedTokenizerBase) and len(loaded) < 3
    refuse((empty, f"--{field} {path}: there are no files of a tokenizer"))  # some classes need none
    if template:
        try:
            loaded.chat_template = Path(template).read_text("utf-8")
            nothing = f"--chat_template {template}: it renders to nothing; give a Jinja file"
            refuse((not encode_prompt(loaded, [{"role": "user", "content": "@"}]), nothing))
        except Exception as error:  # templates raise what they like
            raise SystemExit(f"--chat_template {template}: {first_line(error)}; give a Jinja file") from None
    return loaded


def load_config(path: str, field: str):
    """Configuration of a folder or hub id without dropout, layer drop, noise: train mode is eval mode."""
    config, noise = load_pretrained("AutoConfig", path, field), ("drop", "jitter")
    if hasattr(config, "output_router_logits"):  # a loss of mixtures of experts that is not ours
        config.output_router_logits = False
    for name, value in config.to_dict().items():
        if any(word in name for word in noise) and isinstance(value, float):
            setattr(config, name, 0.0)
        elif value == "gelu_new":  # the same function in one kernel: GPT-2's training step takes a fifth less
            setattr(config, name, "gelu_pytorch_tanh")
    return config


def causal_lm_from(config) -> nn.Module:
    """A causal language model with new weights; refuses a configuration of which there is none."""
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:  # models raise what they like
        raise SystemExit(f"{config.name_or_path}: no causal language model: {first_line(error)}") from None


def memory_line(accelerator, config, trained: int, frozen: int, dtype, shard: bool) -> str:
    """What a rank holds all the time, with so many trained and frozen models of a configuration's size."""
    with torch.device("meta"):
        model = causal_lm_from(config)
    size = sum(weight.numel() for weight in model.parameters())
    held = size * (16 * trained + dtype.itemsize * frozen) / (accelerator.num_processes if shard else 1)
    state = f"{held / 1e9:.2f} GB a rank for weights, gradients, Adam's moments and frozen models"
    return f"all checks passed, nothing was written; {state}; what comes on top: benchmark/memory_plan.py"


def load_weights(auto_class, path: str, field: str, config, dtype, shard: bool) -> nn.Module:
    """A model from its files; refuses one that they do not fill, or that cannot be read. To be sharded it is
    read by rank 0 alone, which sends the others their parts in `place`."""
    if shard and not PartialState().is_main_process:
        with torch.device("meta"):
            return auto_class.from_config(config, dtype=dtype).eval()
    try:
        model, info = auto_class.from_pretrained(path, config=config, dtype=dtype, output_loading_info=True)
    except Exception as error:  # loaders raise what they like
        raise SystemExit(f"--{field} {path}: {str(error).strip().splitlines()[0]}") from None
    missing = ", ".join(sorted(info["missing_keys"]))
    refuse((missing != "", f"--{field} {path}: its files have no weights for {missing:.200}"))
    return model


def load_causal_lm(path: str, dtype=torch.float32, shard: bool = False, field: str = "model") -> nn.Module:
    """Causal language model without dropout. Its pad token learns like any other (padding_idx would give it
    no gradient): it may be the stop token, and padding is never read anyway."""
    from transformers import AutoModelForCausalLM

    config = load_config(path, field)
    name = ", ".join(config.architectures or [])
    refuse(("Classification" in name, f"--{field} {path}: a {name} is no causal language model"))
    model = load_weights(AutoModelForCausalLM, path, field, config, dtype, shard)
    model.get_input_embeddings().padding_idx = None
    return model


def save_model(accelerator, model: nn.Module, tokenizer, stop_token_id: int, folder: Path) -> None:
    """One folder as plain transformers loads it, renamed when whole. Generation ends at the stop token; that
    is the pad token too, one inside the embedding, so that other tools can batch."""
    from transformers import GenerationConfig

    stop = stop_token_id if stop_token_id >= 0 else model.config.eos_token_id
    stop = stop[0] if isinstance(stop, list) else stop
    model.config.pad_token_id = stop
    model.generation_config = GenerationConfig(eos_token_id=stop, pad_token_id=stop)
    weights = model.state_dict()
    if units(model):  # on rank 0's CPU alone, one after the other; a tied weight has one name there
        once = dict([*model.named_parameters(), *model.named_buffers()])
        gathered = ((name, full(x)) for name, x in weights.items() if name in once)
        weights = {name: x.cpu() for name, x in gathered if accelerator.is_main_process}
    if accelerator.is_main_process:
        aside = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(aside, ignore_errors=True)
        model.save_pretrained(aside, state_dict=weights)
        tokenizer.save_pretrained(aside)
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    accelerator.wait_for_everyone()


def recompute_activations(model: nn.Module) -> None:
    """Gradient checkpointing, which acts in train mode only; transformers renamed the method in 5.24."""
    new, old = "activation_checkpointing_enable", "gradient_checkpointing_enable"
    getattr(model, new if hasattr(model, new) else old)()


def load_rows(path: str, field: str, columns: tuple[str, ...] = ()) -> list[dict]:
    """Rows of a .jsonl, .jsonl.gz, .json, .csv or .parquet file, of a folder of `save_to_disk`, or of a hub
    data set `name:split`; refuses, with file and row, what cannot be read or lacks a column."""
    rows, where, kind = [], f"--{field} {path}", Path(path).suffix[1:]
    known = kind in ("jsonl", "gz", "json", "csv", "parquet") or not Path(path).is_file()
    refuse((not known, f"{where}: .{kind} is unknown; give .jsonl, .jsonl.gz, .json, .csv or .parquet"))
    try:
        if kind in ("jsonl", "gz"):
            text = (gzip.open if kind == "gz" else open)(path, "rb").read()
            for line in text.removeprefix(codecs.BOM_UTF8).split(b"\n"):
                rows += [json.loads(line.decode())] if line.strip() else []
        elif kind == "json":
            rows = json.loads(Path(path).read_bytes())
        else:
            from datasets import load_dataset, load_from_disk  # slow to import, and not needed for JSON

            name, _, split = path.partition(":")
            if Path(path).is_dir():
                data = load_from_disk(path)
                data = data["train"] if isinstance(data, dict) else data
            elif kind in ("csv", "parquet"):
                texts = {"keep_default_na": False, "na_values": [""]} if kind == "csv" else {}  # None is one
                data = load_dataset(kind, data_files=path, split="train", **texts)
            else:
                data = load_dataset(name, split=split or "train")
            rows = data.to_list()
    except Exception as error:  # loaders raise what they like
        text = isinstance(error, ValueError) and kind in ("jsonl", "gz", "json")
        row = f", row {len(rows) + 1}: not JSON in UTF-8" if text else ""
        cause = error.__cause__ if kind == "csv" and error.__cause__ else error
        raise SystemExit(f"{where}{row}: {first_line(cause)}") from None
    refuse((not isinstance(rows, list) or not rows, f"{where}: no rows; write one object per line"))
    for number, row in enumerate(rows, 1):
        refuse((not isinstance(row, dict), f"{where}, row {number}: {row!r:.40} is no object with columns"))
        missing = ", ".join(column for column in columns if row.get(column) is None)
        has = ", ".join(sorted(row))
        refuse((missing != "", f"{where}, row {number}: no column {missing}; it has {has}"))
    return rows


def plain_text(content) -> str | None:
    """A chat message's content as one text: itself, or its text parts joined; None for others (a picture)."""
    if isinstance(content, list):
        texts = [part.get("text") if isinstance(part, dict) else None for part in content]
        content = "".join(texts) if all(isinstance(text, str) for text in texts) else None
    return content if isinstance(content, str) else None


def plain_messages(messages: list[dict]) -> list[dict]:
    """Chat messages with plain texts. ValueError for one without, unless it calls a tool."""
    plain = [{**message, "content": plain_text(message.get("content"))} for message in messages]
    if any(message["content"] is None and "tool_calls" not in message for message in plain):
        raise ValueError("a message has no text as its content")
    return plain


def encode_prompt(tokenizer, prompt: str | list[dict], tools: list | None = None) -> list[int]:
    """Ids of a prompt: text gets the tokenizer's own BOS, messages its template, which writes BOS itself."""
    if isinstance(prompt, str):
        encoded = tokenizer(prompt, return_special_tokens_mask=True)
        closed = encoded["special_tokens_mask"][1:][-1:] == [1]  # by an EOS; but the response follows
        return encoded["input_ids"][: -1 if closed else None]
    template = {"tools": tools, "add_generation_prompt": True, "tokenize": False}
    text = tokenizer.apply_chat_template(plain_messages(prompt), **template)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def encode_queries(tokenizer, rows: list, column: str, length: int, field: str, cut=False) -> list[dict]:
    """Rows with `query_ids`; those of more than `length` tokens are dropped or cut, empty ones dropped.
    Refuses, naming the row, what tokenizer or chat template do not take."""
    encoded = []
    for number, row in enumerate(rows, 1):
        try:
            ids = encode_prompt(tokenizer, row[column], row.get("tools"))[: length if cut else None]
        except Exception as error:  # templates raise what they like
            none = "it has no chat template; --chat_template FILE of the three scripts saves one with a model"
            text = first_line(error) if tokenizer.chat_template or not isinstance(row[column], list) else none
            where = f"--{field}, row {number}: {column} is refused by the tokenizer"
            raise SystemExit(f"{where}: {text}") from None
        encoded += [{**row, "query_ids": ids}] if 0 < len(ids) <= length else []
    refuse((not encoded, f"--{field}: every query is empty or longer than --query_length {length}; raise it"))
    return encoded


def show_first(accelerator, tokenizer, prompt, query: list[int], response: list[int], stop_id: int) -> None:
    """Prints the first row as the model reads it, and what is odd about it."""
    accelerator.print(f"first query: {tokenizer.decode(query)!r}")
    if response:
        accelerator.print(f"first response: {tokenizer.decode(response)!r}")
    if not tokenizer.chat_template or not prompt:
        return
    if isinstance(prompt, str):
        accelerator.print("prompts are texts, so the tokenizer's chat template is not applied")
        return
    try:  # what is only shown stops no run
        chat = [*plain_messages(prompt), {"role": "assistant", "content": "@"}]
        closing = tokenizer.apply_chat_template(chat, tokenize=False).rpartition("@")[2].strip()
    except Exception:
        return
    if closing and closing != tokenizer.decode([max(stop_id, 0)]):
        accelerator.print(f"the chat template ends an answer with {closing!r}; see --stop_token")


def stop_token_id(tokenizer, token: str) -> int:
    """Id of `eos`, of a token, of an id in digits or of a text that is one token; -1 for `none`."""
    ids, pieces = {**tokenizer.get_vocab(), "eos": tokenizer.eos_token_id, "none": -1}, []
    if not token.isdecimal() and (token not in ids or not token.isascii()):  # "é" is also byte 0xE9's name
        pieces = tokenizer(token, add_special_tokens=False)["input_ids"]
    one = len(pieces) == 1 and tokenizer.decode(pieces, clean_up_tokenization_spaces=False) == token
    token_id = int(token) if token.isdecimal() else pieces[0] if one else ids.get(token)
    tokens = tokenizer.convert_ids_to_tokens(pieces) or "missing in the tokenizer"
    refuse((token_id is None, f"--stop_token {token!r} is no token, but {tokens}; give one token, or `none`"))
    return token_id


def check_rows(config, rows: list[list[int]], field: str, new_tokens: int = 0) -> None:
    """Refuses ids outside the embedding (on a GPU a device-side assert, much later) and rows that with
    new_tokens more are longer than the model has positions."""
    config, largest = config.get_text_config(), max(map(max, rows), default=0)
    longest, has = max(map(len, rows), default=0) + new_tokens, f"--{field}: the model has"
    positions = getattr(config, "max_position_embeddings", None) or math.inf
    advice = "lower --query_length or --response_length"
    refuse(
        (largest >= config.vocab_size, f"{has} {config.vocab_size} tokens, not {largest}; use its tokenizer"),
        (longest > positions, f"{has} {positions} positions, not {longest}; {advice}"),
    )


def some_rows(rows: list[list[int]]) -> list[list[int]]:
    """The last 24 ids of eight rows, from the shortest to the longest."""
    rows = sorted(rows, key=len)
    return [rows[i][-24:] for i in sorted({(len(rows) - 1) * part // 7 for part in range(8)})]


def column_outputs(model: nn.Module, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """ids, mask (rows, T) -> a language model's logits (rows, T, V), or a reward model's scores (rows, T).
    Rows without a mask are read as the model itself does it, with its own positions."""
    if not hasattr(model, "lm_backbone"):
        inputs = {"input_ids": ids} if mask is None else model_inputs(ids, mask)
        return model(**inputs, use_cache=False).logits.float()
    return model(ids, torch.ones_like(ids).bool() if mask is None else mask).float()


def within_rounding(accelerator, model: nn.Module, gap: Tensor, scale: Tensor) -> bool:
    """Whether differences of what a model gives are rounding; scale: the standard deviation of what it gives.
    In bfloat16 by their mean: single tokens differ by more than a standard deviation there."""
    half = any(weight.dtype == torch.bfloat16 for weight in model.parameters())
    half = half or (len(units(model)) > 0 and accelerator.mixed_precision == "bf16")
    return bool(gap.abs().mean() <= 0.1 * scale if half else gap.abs().max() <= 1e-3 * scale)


def first_line(error: Exception) -> str:
    """What an error of a library says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@torch.no_grad()
def check_model(accelerator, model: nn.Module, rows: list[list[int]], new_tokens: int, field: str) -> None:
    """Tries the model on some rows of ids, without autocast: what it gives must be finite, the same in train
    mode, for a padded row as for that row alone, and whatever follows, up to new_tokens more. Refuses a model
    that differs: it would be trained on other numbers than it is sampled with."""
    row, device = max(rows, key=len), accelerator.device
    ids, mask = pad_left(some_rows(rows), device)
    ids, mask = nn.functional.pad(ids, (3, 0)), nn.functional.pad(mask, (3, 0))  # padding in every row
    longest = torch.tensor([(row * (2 + new_tokens // len(row)))[: len(row) + new_tokens]], device=device)
    try:
        with whole(accelerator, model), torch.autocast(device.type, enabled=False):
            model.train()
            trained = column_outputs(model, ids, mask)[mask]
            model.eval()
            padded = column_outputs(model, ids, mask)[mask]
            alone = [column_outputs(model, x[m][None])[0] for x, m in zip(ids, mask)]
            followed, width = column_outputs(model, longest), longest.shape[1]
            starts = (min(8, width), max(1, width // 2), max(1, width - 1))
            more = [column_outputs(model, longest[:, :n]) - followed[:, :n] for n in starts]
    except Exception as error:  # models raise what they like
        raise SystemExit(f"--{field}: the model fails on your own rows: {first_line(error)}") from error
    gaps = (padded - trained, padded - torch.cat(alone), torch.cat(more, 1))
    modes, padding, future = (not within_rounding(accelerator, model, gap, padded.std()) for gap in gaps)
    where = f"--{field}: on your own rows the model"
    refuse(
        (not padded.isfinite().all(), f"{where} gives NaN or infinity"),
        (modes, f"{where} differs between train and eval mode; turn off what is random in its configuration"),
        (padding, f"{where} gives a padded row other numbers than that row alone: padding reaches its state"),
        (future, f"{where} gives a token other numbers if more follow; lower query_length, response_length"),
    )


def random_generator(device, *key: int) -> torch.Generator:
    """A generator of the key alone, so that a resumed run draws what the whole run would have drawn."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))
    return torch.Generator(device).manual_seed(seed)


def write_text(path: Path, text: str) -> None:
    """Written aside and renamed, so that a kill leaves the old file or the new one."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text, encoding="utf-8")
    aside.rename(path)


def save_checkpoint(accelerator, folder: Path, step: int, state: dict, *objects) -> None:
    """What a resumed run needs of objects (model, optimizer), renamed when whole; only then are older
    checkpoints deleted. Each rank writes its part of sharded ones, rank 0 alone what all ranks hold."""
    aside, final = folder / "checkpoints/tmp", folder / f"checkpoints/step_{step:06d}"
    if final.is_dir():
        return
    if accelerator.is_main_process:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process or units(*objects):
        held = [x.state_dict() for x in (*objects, accelerator.scaler) if x is not None]
        torch.save(held, aside / f"rank_{accelerator.process_index}.pt")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (aside / "state.json").write_text(json.dumps({**state, "step": step}))
        aside.rename(final)
        for older in set(final.parent.iterdir()) - {final}:
            shutil.rmtree(older)
    accelerator.wait_for_everyone()


def load_checkpoint(accelerator: Accelerator, folder: Path, *objects) -> dict | None:
    """Loads the newest checkpoint into the prepared objects; returns its state, None where there is none."""
    newest = max(folder.glob("checkpoints/step_*"), key=lambda path: int(path.name[5:]), default=None)
    if newest is None:
        return None
    accelerator.print(f"going on from {newest}")
    file = newest / f"rank_{accelerator.process_index if units(*objects) else 0}.pt"
    refuse((not file.is_file(), f"{newest} is of another version; name a new --output_dir"))
    held = torch.load(file, map_location="cpu")
    for x, of_x in zip((*objects, accelerator.scaler), held):
        x.load_state_dict(of_x)
    return json.loads((newest / "state.json").read_text())


def fingerprint(path: Path) -> str:
    """SHA-256 of a file; of a model's folder, that of the last megabyte of its configuration and weights."""
    digest, weights = hashlib.sha256(), sorted([*path.glob("*.safetensors"), *path.glob("*.bin")])
    for file in [path / "config.json", *weights] if path.is_dir() else [path]:
        with file.open("rb") as opened:
            opened.seek(max(0, file.stat().st_size - 2**20) if path.is_dir() else 0)
            digest.update(opened.read())
    return digest.hexdigest()


def open_run(accelerator: Accelerator, args) -> Path:
    """Creates output_dir with args.json. Refuses a folder that another process is writing to, and one with a
    run of other data or models, or of other settings than those of memory, speed and tracker."""
    folder, file = Path(args.output_dir), Path(args.output_dir, "args.json")
    free = "micro_batch|forward_batch|generation_batch|gradient_checkpointing|checkpoint_every|log_with"
    launched = {name: getattr(accelerator, name) for name in ("num_processes", "mixed_precision")}
    new = json.loads(json.dumps({**dataclasses.asdict(args), **launched}))
    for name, path in dataclasses.asdict(args).items():
        if isinstance(path, str) and (os.path.isfile(path) or os.path.isfile(f"{path}/config.json")):
            new[f"sha256 of {name}"] = fingerprint(Path(path))
    old = json.loads(file.read_text()) if file.is_file() else new
    other = [name for name in {**old, **new} if old.get(name) != new.get(name) and not re.match(free, name)]
    text = ", ".join(f"{name} ({old.get(name)!r} there, {new.get(name)!r} here)" for name in other)
    inside = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    foreign = not file.is_file() and inside - {"args.json.tmp", "lock"} != set()
    where, advice = f"--output_dir {folder}", "name a new folder or delete this one"
    refuse(
        (text != "", f"{where} holds another run: {text}; {advice}"),
        (foreign, f"{where} is not empty and holds no run of this script; {advice}"),
    )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            accelerator.lock = (folder / "lock").open("a+")  # the system releases it when this process ends
            fcntl.lockf(accelerator.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            other = (folder / "lock").read_text()
            raise SystemExit(f"{where}: process {other} is writing there; wait for it, or end it") from None
        except OSError as error:
            raise SystemExit(f"{where}: {first_line(error)}; name another folder") from None
        accelerator.lock.truncate(0)
        print(os.getpid(), end="", file=accelerator.lock, flush=True)
        write_text(file, json.dumps(new, indent=1))
    accelerator.wait_for_everyone()
    return folder


def open_metrics(accelerator: Accelerator, args, folder: Path, step: int) -> None:
    """Starts the tracker of a run that goes on from the checkpoint of `step`, whose line is logged again; it
    ends itself at exit. Drops from metrics.jsonl and samples.jsonl what will be written once more."""
    for path, last in ((folder / "metrics.jsonl", step - 1), (folder / "samples.jsonl", step)):
        if path.is_file() and accelerator.is_main_process:
            lines = path.read_text("utf-8").split("\n")[:-1]  # a line that was cut short has no newline
            write_text(path, "".join(line + "\n" for line in lines if json.loads(line)["step"] <= last))
    # the name is that of TensorBoard's folder, or of the others' project
    name, settings = ("tensorboard", None) if args.log_with == "tensorboard" else ("pfppo", vars(args))
    try:
        accelerator.init_trackers(name, settings, {"tensorboard": {"purge_step": step}})
    except Exception as error:  # trackers raise what they like, where nobody has logged in for example
        raise SystemExit(f"--log_with {args.log_with}: {first_line(error)}") from None


def progress(parts, phase: str):
    """The parts one by one; where they take longer, rank 0 says every 30 seconds how far the phase is."""
    said = time.time()
    for done, part in enumerate(parts):
        if time.time() - said >= 30 and PartialState().is_main_process:
            said = time.time()
            print(f"{phase} {done}/{len(parts)}", flush=True)
        yield part


def time_left(start: float, done: int, to_do: int) -> str:
    """What the console says of the seconds that are left, nothing at either end."""
    return f", {(time.time() - start) / done * to_do:.0f} s left" if done and to_do else ""


def log_metrics(accelerator, folder: Path, step: int, metrics: dict, shown=(), left: str = "") -> None:
    """metrics.jsonl, the tracker, and on the console the tags in `shown`; by rank 0 alone."""
    if accelerator.is_main_process:
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        accelerator.log(metrics, step)
        values = [f"{tag} {metrics[tag]:.4g}" for tag in shown if tag in metrics]
        print("  ".join([f"{folder.name} {step}{left}", *values]), flush=True)


def run(main, args) -> None:
    """main(args) as a command: SIGTERM and Ctrl-C save first, a full disk ends it with one line."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ask_to_stop)
    try:
        main(args)
    except Exception as error:
        there = next(path for path in Path(args.output_dir, "_").absolute().parents if path.exists())
        full_disk = "No space left" in str(error) or shutil.disk_usage(there).free < 2**20
        advice = "make room, then the same command goes on"
        refuse((full_disk, f"--output_dir {args.output_dir}: the disk is full; {advice} ({error})"))
        raise
    finally:
        ASKED_TO_STOP.clear()
        end_at_once()


# ------------------------------------------------------------------------------------------------------------
# Plumbing of this script alone
# ------------------------------------------------------------------------------------------------------------

SHOWN = ("objective/score", "filter/score", "objective/kl", "eval/sampled_reward", "eval/kl")
SHOWN += ("eval/greedy_pass1", "seconds/update")


def growing_cache(config):
    """The cache of a model; its ordinary layers have room for more tokens behind those that they hold."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    growing_layer = type("GrowingLayer", (DynamicLayer,), {"update": write_behind})
    cache = DynamicCache(config=config)
    cache.layers = [growing_layer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def write_behind(layer, keys: Tensor, values: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
    """Adds keys, values (rows, heads, new columns, head size) to a layer -> all that it holds. Those so far
    are copied only where the room ends. In autocast's precision: rotary keys are float32 and would double
    it."""
    kind, old, end = keys.device.type, layer.get_seq_length(), layer.get_seq_length() + keys.shape[2]
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else keys.dtype
    if old == 0:
        layer.lazy_initialization(keys.to(dtype), values.to(dtype))
    for name, new in (("keys", keys), ("values", values)):
        held = getattr(layer, name)
        if old == 0 or held.stride(1) < end * held.stride(2):  # no room: a new buffer, a half longer
            room = new.new_empty(*new.shape[:2], end + end // 2, new.shape[3], dtype=dtype)
            if old:
                room[:, :, :old] = held
            held = room
        held = held.as_strided((*new.shape[:2], end, new.shape[3]), held.stride())
        held[:, :, old:] = new
        setattr(layer, name, held)
    return layer.keys, layer.values


def evaluate(accelerator, policy, judges, rows, tokenizer, stop_id, args: Args, update: int) -> dict:
    """Greedy and sampled responses to the evaluation prompts, each counted once whatever the number of ranks.
    judges: ref_policy, reward, actual_score or None."""
    ref_policy, reward, actual_score = judges
    own_rows, values = rows[accelerator.process_index :: accelerator.num_processes], {}
    local_rows = own_rows or rows[:1]  # a rank without prompts goes along with one that does not count
    policy.eval()
    for name, temperature in (("greedy", 0.0), ("sampled", args.temperature)):
        generator = random_generator(accelerator.device, args.seed, 9, update, accelerator.process_index)
        with whole(accelerator, policy):
            rollout = sample_rollout(policy, local_rows, 1, temperature, args, stop_id, generator)
        texts = decode_responses(tokenizer, rollout)
        with whole(accelerator, reward):
            values[f"eval/{name}_reward"] = score_rollout(reward, local_rows, rollout, texts, args).tolist()
        if actual_score is not None:
            scores = call_function(actual_score, local_rows, texts, args.prompt_field, "actual_score")
            values[f"eval/{name}_pass1"] = scores
        if name == "sampled":  # KL to π_SFT on samples that no filter has touched
            size = args.forward_batch_size
            with whole(accelerator, policy):
                logprobs, _ = response_logprobs_and_values(policy, rollout, args.temperature, size)
            with whole(accelerator, ref_policy):
                ref_logprobs, _ = response_logprobs_and_values(ref_policy, rollout, args.temperature, size)
            values["eval/kl"] = (logprobs - ref_logprobs).sum(1).tolist()
        values[f"eval/{name}_length"] = rollout["response_mask"].sum(1).tolist()
        values[f"eval/{name}_truncated"] = (~rollout["has_stop"]).tolist()
    parts = gather_object([values if own_rows else {}])
    return {tag: float(np.mean([x for part in parts for x in part.get(tag, [])])) for tag in parts[0]}


def decode_responses(tokenizer, rollout: dict[str, Tensor]) -> list[str]:
    """Responses as text, up to the stop token; special tokens left out."""
    ids = [r[m].tolist() for r, m in zip(rollout["responses"], rollout["score_mask"])]
    return tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def check_args(args: Args, num_processes: int) -> tuple[int, list[float], int]:
    """Refuses settings that do not go together -> rows kept per prompt, weights w, number of updates."""
    n, b, size = args.num_responses, args.batch_size, args.minibatch_size
    w, name = args.rank_weights, args.filter
    own, shared, plain = len(w) > 0, args.critic == "shared", name == "none" and len(w) == 0
    cut, everything = name in THRESHOLDS, plain or name in THRESHOLDS
    kept = n if everything else args.num_kept or min(n, 1 if name == "bon" else 2)
    wrong_sum, unused = own and (min(w) < 0 or abs(sum(w) - 1) > 1e-6), args.num_kept not in (0, n)
    high, updates, warm = args.thresholds[1], args.total_episodes // (b * n), args.critic_warmup_updates > 0
    refuse(
        (b % num_processes > 0, f"--batch_size {b} must be a multiple of the {num_processes} processes"),
        (size % num_processes > 0 and not cut, f"--minibatch_size must be a multiple of {num_processes}"),
        (b * kept % size > 0 and not cut, f"--minibatch_size {size} must divide the kept rows {b} x {kept}"),
        (updates < 1, f"--total_episodes {args.total_episodes} is less than one update of {b} x {n}"),
        (own and len(w) != n, f"--rank_weights needs --num_responses = {n} numbers, best first"),
        (wrong_sum, f"--rank_weights must be at least 0 with sum 1, not {w}"),
        (own and name not in ("none", "br", "bw", "random"), "--rank_weights replaces --filter; omit it"),
        (n == 1 and not plain, "--filter needs --num_responses above 1; PPO-S is --filter none"),
        (everything and unused, f"--num_kept does nothing with --filter {name}; try random"),
        (kept > n and args.draw == "exact", f"--num_kept {kept} exceeds --num_responses; --draw sample"),
        (args.thresholds[0] > high, f"--thresholds {args.thresholds}: the lower one comes first"),
        (args.kl_target > 0 and not plain, "--kl_target needs --filter none: kept rows would steer it"),
        (shared and warm, "--critic_warmup_updates needs --critic separate"),
        (shared and args.critic_init is not None, "--critic_init needs --critic separate"),
        (args.actual_score is not None and not args.eval_prompts, "--actual_score needs --eval_prompts"),
    )
    return kept, list(w) or rank_weight_vector(name, n), updates


def load_function(spec: str, field: str):
    """`module:function` or `module:function@TEXT` (called with source=TEXT) -> the function."""
    name, _, source = spec.partition("@")
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        loaded = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise SystemExit(f"--{field} {spec}: {error}; give module:function, importable from here") from None
    return partial(loaded, source=source) if source else loaded


def call_function(
    function, rows: list[dict], texts: list[str], prompt_field: str, field: str = "reward"
) -> list[float]:
    """A `module:function` on responses and copies of the rows that they answer, those of a row adjacent -> a
    float for each response. What fails on one rank ends all of them, together."""
    rows = [copy.deepcopy(row) for row in rows for _ in range(len(texts) // len(rows))]
    folder, values, failure = os.getcwd(), [], None
    try:
        given = function([row[prompt_field] for row in rows], list(texts), rows)
        listed = given.tolist() if hasattr(given, "tolist") else given
        listed = listed if isinstance(listed, list | tuple) else []
        values = [x.item() if hasattr(x, "item") else x for x in listed]
        if len(values) != len(texts) or not all(
            isinstance(x, int | float) and math.isfinite(x) for x in values
        ):
            failure = f"--{field} must return a list of {len(texts)} finite numbers, not {given!r:.60}"
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        failure = f"--{field} failed: {type(error).__name__}: {error}"
    os.chdir(folder)
    failures = [text for text in gather_object([failure]) if text]
    refuse((failures != [], "".join(failures[:1])))
    return [float(x) for x in values]


def read_inputs(args: Args, say=print) -> tuple:
    """Tokenizer, stop token, rows of `prompts` and `eval_prompts`; refuses what does not fit the models."""
    config = load_config(args.policy, "policy")
    tokenizer = load_pretrained("AutoTokenizer", args.policy, "policy", args.chat_template)
    stop_id = stop_token_id(tokenizer, args.stop_token)
    rows, eval_rows = (read_prompts(field, args, tokenizer, say) for field in ("prompts", "eval_prompts"))
    check_rows(config, [[max(stop_id, 0)]], "stop_token")
    queries = [row["query_ids"] for row in rows + eval_rows]
    check_rows(config, queries, "policy", args.response_length)
    for field, path in (("reward", args.reward), ("critic_init", args.critic_init)):
        if path and (field == "critic_init" or ":" not in path):
            check_reward_model(path, field, tokenizer, queries, args.response_length)
    return tokenizer, stop_id, rows, eval_rows


def read_prompts(field: str, args: Args, tokenizer, say=print) -> list[dict]:
    """Rows of `prompts` or `eval_prompts` with query_ids. Of eval_prompts none may be left out: what is
    measured would be the short prompts alone."""
    path = getattr(args, field)
    if path is None:
        return []
    rows, cut = load_rows(path, field, (args.prompt_field,)), args.long_queries == "keep_start"
    encoded = encode_queries(tokenizer, rows, args.prompt_field, args.query_length, field, cut)
    left_out = f"{len(rows) - len(encoded)} of {len(rows)}"
    message = f"--{field}: {left_out} queries are empty or longer than --query_length"
    if len(encoded) < len(rows):
        refuse((field == "eval_prompts", f"{message}; raise it or --long_queries keep_start"))
        say(f"{message} and left out")
    return encoded


def frozen_precision(accelerator: Accelerator, name: str) -> torch.dtype:
    """The dtype of that name; `auto` is bfloat16 under bf16, else float32."""
    auto = "bfloat16" if accelerator.mixed_precision == "bf16" else "float32"
    return getattr(torch, auto if name == "auto" else name)


def load_models(accelerator: Accelerator, args: Args) -> tuple:
    """Policy, reference, reward model (None where the reward is a function) and critic, on their devices."""
    place_here = partial(place, accelerator, args.shard)
    frozen_dtype = frozen_precision(accelerator, args.frozen_dtype)
    policy = place_here(load_causal_lm(args.policy, torch.float32, args.shard, "policy"))
    ref_policy = load_causal_lm(args.policy, frozen_dtype, args.shard, "policy").eval().requires_grad_(False)
    ref_policy, reward_model = place_here(ref_policy), None
    if ":" not in args.reward:
        reward_model = load_reward_model(args.reward, frozen_dtype, args.shard).eval().requires_grad_(False)
        reward_model = place_here(reward_model)
    critic = place_here(make_critic(args, policy))
    if args.gradient_checkpointing:
        recompute_activations(policy)
        if args.critic == "separate":
            recompute_activations(critic.lm_backbone)
    return policy, ref_policy, reward_model, critic


def load_reward_model(path: str, dtype: torch.dtype = torch.float32, shard: bool = False) -> RewardModel:
    """R_φ from a sequence classification model with one label, of rm_single.py or of others (which have gain
    1, bias 0 and no bound), of a folder or the hub. A head is never made up."""
    from transformers import AutoModelForSequenceClassification

    config = load_config(path, "reward")
    bound = getattr(config, "reward_bound", "none")
    classifier = load_weights(
        AutoModelForSequenceClassification, path, "reward", config, torch.float32, shard
    )
    model = RewardModel(classifier.base_model, bound)
    model.lm_backbone.get_input_embeddings().padding_idx = None  # see load_causal_lm
    for parameter in model.lm_backbone.parameters():  # the head stays float32
        parameter.data = parameter.data.to(dtype)
    if classifier.score.weight.is_meta:
        return model
    model.scalar_head.weight.data.copy_(classifier.score.weight)
    model.scalar_head.bias.data.fill_(getattr(config, "score_bias", 0.0))
    model.reward_gain.data.fill_(getattr(config, "reward_gain", 1.0))
    model.reward_bias.data.fill_(getattr(config, "reward_bias", 0.0))
    return model


def check_reward_model(path: str, field: str, tokenizer, queries: list[list[int]], new_tokens: int) -> None:
    """Refuses, before weights are loaded, what load_reward_model cannot read, and a model with other tokens
    than the policy's (it is handed the policy's ids) or too few positions."""
    from transformers import AutoModelForSequenceClassification

    old, convert = Path(path, "reward_head.safetensors"), "python -m benchmark.recipes.convert_reward_model"
    refuse((old.is_file(), f"--{field} {path}: an older form; convert it: {convert} {path} {path}_converted"))
    config, where = load_config(path, field), f"--{field} {path}"
    name = (config.architectures or ["model without architecture"])[0]
    head = None
    if name.endswith("ForSequenceClassification") and config.num_labels == 1:
        with torch.device("meta"):
            head = getattr(AutoModelForSequenceClassification.from_config(config), "score", None)
    advice = "give a sequence classification model with one label and a layer `score`, or module:function"
    refuse((not isinstance(head, nn.Linear), f"{where}: a {name} is no reward model; {advice}"))
    check_rows(config, queries, field, new_tokens)
    own = load_pretrained("AutoTokenizer", path, field).get_vocab()
    differ = [t for t, i in tokenizer.get_vocab().items() if own.get(t) != i and t != tokenizer.pad_token]
    such = f"{len(differ)} tokens such as {differ[:1]}"
    refuse((differ != [], f"{where}: its tokenizer differs from --policy's, in {such}"))


@torch.no_grad()
def check_cache(accelerator, policy: nn.Module, queries: list[list[int]], field: str) -> None:
    """Refuses a policy whose logits, as `generate` samples from them, are not those without its cache."""
    (ids, mask), steps = pad_left(some_rows(queries), accelerator.device), []
    policy.eval()
    hook = policy.register_forward_hook(lambda module, inputs, output: steps.append(output.logits[:, -1:]))
    try:
        with whole(accelerator, policy), torch.autocast(accelerator.device.type, enabled=False):
            responses = generate(policy, ids, mask, 2, 8, 0.0, -1)
            hook.remove()
            ids, mask = ids.repeat_interleave(2, 0), mask.repeat_interleave(2, 0)
            inputs = model_inputs(torch.cat([ids, responses], 1), F.pad(mask, (0, 8), value=True))
            logits = policy(**inputs, use_cache=False, logits_to_keep=9).logits[:, :-1].float()
    except Exception as error:  # models raise what they like
        refused = f"--{field}: the model cannot be sampled with a cache: {first_line(error)}"
        raise SystemExit(refused) from error
    finally:
        hook.remove()
    steps = torch.cat([steps[0].repeat_interleave(2, 0), *steps[1:]], 1).float()
    same = logits.shape == steps.shape and within_rounding(accelerator, policy, logits - steps, logits.std())
    refuse((not same, f"--{field}: logits with the cache are not those without; take another model"))


def prompt_order(num_prompts: int, start: int, count: int, seed: int, reshuffle: bool = True) -> list[int]:
    """Positions start .. start+count-1 of the endless stream of shuffled passes over the prompts; without
    reshuffle all in one order."""
    passes, order = range(start // num_prompts, (start + count - 1) // num_prompts + 1), []
    for number in passes:
        generator = random_generator("cpu", seed, 0, number * reshuffle)
        order += torch.randperm(num_prompts, generator=generator).tolist()
    first = start - passes[0] * num_prompts
    return order[first : first + count]


def sample_metrics(scores, shaped, lengths, has_stop, selected: Tensor) -> dict[str, float]:
    """Means over all samples of all ranks (B*N,), and over the rows (K,) that the filter has selected."""
    means = {"objective/score": scores, "objective/shaped_score": shaped}
    means |= {"objective/length": lengths, "objective/truncated": ~has_stop}
    metrics = {"filter/kept": len(selected), "filter/distinct": len(selected.unique())}
    if len(selected):
        kept_scores = scores.cpu()[selected]
        means |= {"filter/score": kept_scores, "filter/length": lengths.cpu()[selected]}
        metrics["filter/score_std"] = kept_scores.std(correction=min(1, len(selected) - 1)).item()
    return metrics | {tag: values.float().mean().item() for tag, values in means.items()}


def kept_metrics(kept: dict[str, Tensor], kl: Tensor, non_score_reward: Tensor, all_sum) -> dict[str, float]:
    """Means over the kept rows of all ranks (per response), mean and variance over their tokens."""
    mask, returns, values = kept["response_mask"], kept["returns"], kept["values"]
    rows = mask.any(1)
    sums = [rows.sum(), kl.sum(), -kept["logprobs"].sum(), non_score_reward.sum()]
    sums += [(kept["scores"] * rows).sum(), mask.sum(), returns.sum(), values.sum()]
    sums += [returns.square().sum(), values.square().sum()]
    count, kl, entropy, penalty, score, tokens, *moments = all_sum(torch.stack(sums).double()).tolist()
    metrics = {"objective/kl": kl / count, "objective/entropy": entropy / count}
    metrics |= {"objective/non_score_reward": penalty / count}
    metrics |= {"objective/score_total": (score + penalty) / count}
    for name, first, second in (("ppo/returns", moments[0], moments[2]), ("ppo/val", moments[1], moments[3])):
        variance = (second - first**2 / tokens) / max(tokens - 1, 1)
        metrics |= {f"{name}/mean": first / tokens, f"{name}/var": variance}
    return metrics


def training_metrics(stats: list[Tensor], norms: list[float], first_ratio_max: Tensor) -> dict[str, float]:
    """Means of the STATS and of gradient norms before clipping over optimizer steps, and the ratio of the
    first step, where nothing has moved yet: mean and largest are 1 but for rounding."""
    metrics = dict(zip(STATS, torch.stack(stats).mean(0).tolist()))
    metrics |= {"ppo/grad_norm": float(np.mean(norms))} if norms else {}
    metrics["ppo/policy/first_ratio"] = stats[0][STATS.index("ppo/policy/ratio")].item()
    return metrics | {"ppo/policy/first_ratio_max": first_ratio_max.item()}


def phase_seconds(clock: list[float]) -> dict[str, float]:
    """Times of the start and of the ends of four phases -> seconds of each one and of all."""
    parts = zip(("generate", "score", "logprobs", "train"), np.diff(clock))
    return {f"seconds/{part}": float(x) for part, x in parts} | {"seconds/update": clock[-1] - clock[0]}


def show_sample(folder: Path, step: int, prompt, response: str, score: float) -> None:
    """One sample on the console and in samples.jsonl."""
    line = {"step": step, "prompt": prompt, "response": response, "score": score}
    with (folder / "samples.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(f"prompt: {prompt}\nresponse: {response}\nscore: {score:.3f}", flush=True)


def best_score(results: dict[str, float]) -> float:
    """What policy_best is chosen by: greedy pass@1, or the sampled reward where there is no actual_score."""
    return results.get("eval/greedy_pass1", results.get("eval/sampled_reward", -math.inf))


if __name__ == "__main__":
    run(main, parse_args(Args, presets=PRESETS))
