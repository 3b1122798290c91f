"""BOND: distil the best-of-N policy into the policy, then the best-of-N of that, four times.

The best of N responses of an anchor policy has log π_BoN(y) = log π_anchor(y) + (N-1) log p_≤(y) + constant,
with p_≤(y) the share of the anchor's responses to the same prompt whose reward is not above y's. One update:
  1. take B prompts, draw N responses of the anchor and M of the policy for each, score all
  2. forward KL(π_BoN ‖ π): likelihood of the anchor's best response
  3. backward KL(π ‖ π_BoN): policy gradient on the policy's responses with log p_≤ estimated from the
     anchor's
  4. one optimizer step on forward + β · backward
At the start of every iteration the anchor becomes the last policy (first: π_SFT).

Run:  python -m benchmark.baselines.bond --policy sft/model --reward rm/model --prompts rl.jsonl \\
          --output_dir bond/ --eval_prompts valid.jsonl --actual_score benchmark.minicode:oracle
Out:  policy, policy_best, metrics.jsonl, checkpoints (with the anchor); the same command continues.

Sources: BOND arXiv 2407.14622; PAPER = arXiv 2409.06957 for β = 1 and four iterations. Defaults: README.md
beside this file. DEPARTS BOND: it weighs forward by 1-β and backward by β; PAPER combines both with β = 1,
which we read as equal weights (BOND's β = 1/2 up to a factor of 2). The factor of the exact π_BoN that comes
from ties is left out, as there.
"""

import math
from dataclasses import dataclass
from typing import Annotated

import torch
import tyro
from torch import Tensor

import pfppo_single as pfppo
from benchmark.baselines import common
from benchmark.baselines.raft import best_rows
from pfppo_single import Amount, Count, Positive


@dataclass(kw_only=True)
class Args(common.SamplingArgs):
    # rollout
    total_episodes: Count = 6400
    """responses to generate in all, the anchor's and the policy's"""
    batch_size: Count = 16
    """B: prompts per update"""
    num_responses: Annotated[int, 2, math.inf] = 5
    """N: responses of the anchor per prompt; the target is its best-of-N"""
    policy_responses: Count = 5
    """M: responses of the policy per prompt"""
    iterations: Count = 4
    """times that the anchor is the last policy (PAPER: 4)"""
    # training
    beta: Positive = 1.0
    """β: weight of the backward KL against the forward KL's 1 (PAPER: 1)"""
    lr: Amount = 1e-4
    """learning rate"""
    eval_every: Count = 10
    """updates between evaluations"""
    checkpoint_every: Count = 10
    """updates between checkpoints"""


def log_quantiles(scores: Tensor, anchor_scores: Tensor) -> Tensor:
    """scores (B, M) of the policy's responses, anchor_scores (B, N) of the anchor's -> estimate of log p_≤
    (B, M)."""
    # DEPARTS BOND: the response counts as one of N+1 draws, or the estimate for one below all N would be
    # log 0
    not_above = (anchor_scores.unsqueeze(1) <= scores.unsqueeze(2)).sum(2)  # (B, M)
    return torch.log((not_above + 1) / (anchor_scores.shape[1] + 1))


def forward_kl_loss(best_logprobs: Tensor) -> Tensor:
    """log π_θ (B,) of the anchor's best responses -> loss () with the gradient of KL(π_BoN ‖ π_θ)."""
    return -best_logprobs.mean()


def backward_kl_costs(
    logprobs: Tensor, anchor_logprobs: Tensor, log_quantile: Tensor, num_responses: int
) -> Tensor:
    """All (B, M) -> log π_θ - log π_BoN of the policy's responses, up to a constant: the mean estimates
    KL(π_θ ‖ π_BoN)."""
    return logprobs - anchor_logprobs - (num_responses - 1) * log_quantile


def backward_kl_loss(logprobs: Tensor, costs: Tensor) -> Tensor:
    """log π_θ with gradient and costs, (B, M) -> loss () with the gradient of KL(π_θ ‖ π_BoN); the baseline
    of a response is the mean cost of the prompt's other responses, 0 when there is none."""
    others = costs.shape[1] - 1
    baseline = (costs.sum(1, keepdim=True) - costs) / max(1, others)
    return (logprobs * (costs - (baseline if others else 0.0)).detach()).mean()


def main(args: Args) -> None:
    run = common.Run(args)
    n, m = args.num_responses, args.policy_responses
    per_update = args.batch_size * (n + m)
    updates, least = args.total_episodes // per_update, f"{args.iterations} updates of {per_update}"
    pfppo.refuse((updates < args.iterations, f"--total_episodes must be at least {least}"))
    sizes = f"{args.batch_size} prompts x ({n} anchor + {m} policy responses)"
    print(f"{args.iterations} iterations, {updates} updates of {sizes}")
    if args.dry_run:
        return
    run.start(updates, updates, with_anchor=True)

    for step in range(run.state["step"], updates):
        iteration = step * args.iterations // updates
        if step and iteration > (step - 1) * args.iterations // updates:
            run.anchor.load_state_dict(run.policy.state_dict())

        # ---------------- 1. responses of anchor and policy
        batch_rows = run.next_prompts(step, args.batch_size)
        anchor_rollout = run.sample(batch_rows, n, 3, step, model=run.anchor)  # (B*N, ...)
        rollout = run.sample(batch_rows, m, 6, step)  # (B*M, ...)
        run.state["episodes"] += per_update
        raw_anchor_scores, raw_scores = run.score(batch_rows, anchor_rollout), run.score(batch_rows, rollout)
        anchor_scores = run.rank_scores(raw_anchor_scores, anchor_rollout)
        scores = run.rank_scores(raw_scores, rollout)

        # ---------------- 2. forward KL
        generator = pfppo.random_generator("cpu", args.seed, 4, step)
        best = best_rows(anchor_scores.cpu(), anchor_rollout["prompt_ids"].cpu(), generator).to(run.device)
        forward = 0.0
        for part in best.split(args.micro_batch_size) if len(best) else ():
            best_logprobs = common.sequence_logprobs(run.policy, anchor_rollout, part, args.temperature)
            loss = forward_kl_loss(best_logprobs) * len(part) / len(best)
            run.accelerator.backward(loss)
            forward += loss.item()

        # ---------------- 3. backward KL
        quantile = log_quantiles(scores.view(-1, m), anchor_scores.view(-1, n))  # (B, M)
        logprobs = run.logprobs(run.policy, rollout).view(-1, m)
        anchor_logprobs = run.logprobs(run.anchor, rollout).view(-1, m)
        costs = backward_kl_costs(logprobs, anchor_logprobs, quantile, n)  # (B, M)
        size = max(1, args.micro_batch_size // m)  # prompts
        for part in torch.arange(args.batch_size, device=run.device).split(size):
            part_rows = (part.unsqueeze(1) * m + torch.arange(m, device=run.device)).flatten()
            logprobs = common.sequence_logprobs(run.policy, rollout, part_rows, args.temperature).view(-1, m)
            loss = backward_kl_loss(logprobs, costs[part])
            run.accelerator.backward(args.beta * loss * len(part) / args.batch_size)

        # ---------------- 4. one optimizer step
        backward = costs.mean().item()
        run.optimizer_step(forward + args.beta * backward)
        metrics = common.rollout_metrics(raw_scores, rollout) | {"bond/iteration": iteration}
        metrics |= {"bond/forward": forward, "bond/backward": backward}
        metrics["bond/anchor_score"] = raw_anchor_scores.mean().item()
        metrics["bond/log_quantile"] = quantile.mean().item()
        run.end_step(metrics)
    run.finish()


if __name__ == "__main__":
    main(tyro.cli(Args, use_underscores=True))
