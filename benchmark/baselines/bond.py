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

from dataclasses import dataclass

import torch
import tyro

import pfppo_single as pfppo
from benchmark.baselines import common
from benchmark.baselines.raft import best_rows


@dataclass
class Args(common.Args):
    # rollout
    prompts: str = ""
    """training prompts: .jsonl, .json, .parquet, or hub id `name:split`"""
    total_episodes: int = 6400
    """responses to generate in all, the anchor's and the policy's"""
    batch_size: int = 16
    """B: prompts per update"""
    num_responses: int = 5
    """N: responses of the anchor per prompt; the target is its best-of-N"""
    policy_responses: int = 5
    """M: responses of the policy per prompt"""
    iterations: int = 4
    """times that the anchor is the last policy (PAPER: 4)"""
    # training
    beta: float = 1.0
    """β: weight of the backward KL against the forward KL's 1 (PAPER: 1)"""
    lr: float = 1e-4
    """learning rate"""
    eval_every: int = 10
    """updates between evaluations"""
    checkpoint_every: int = 10
    """updates between checkpoints"""


def log_quantiles(scores: torch.Tensor, anchor_scores: torch.Tensor) -> torch.Tensor:
    """scores (B, M) of the policy's responses, anchor_scores (B, N) of the anchor's -> estimate of log p_≤
    (B, M)."""
    # DEPARTS BOND: the response counts as one of N+1 draws, or the estimate for one below all N would be
    # log 0
    not_above = (anchor_scores.unsqueeze(1) <= scores.unsqueeze(2)).sum(2)  # (B, M)
    return torch.log((not_above + 1) / (anchor_scores.shape[1] + 1))


def forward_kl_loss(best_logprobs: torch.Tensor) -> torch.Tensor:
    """log π_θ (B,) of the anchor's best responses -> loss () with the gradient of KL(π_BoN ‖ π_θ)."""
    return -best_logprobs.mean()


def backward_kl_costs(
    logprobs: torch.Tensor, anchor_logprobs: torch.Tensor, log_quantile: torch.Tensor, num_responses: int
) -> torch.Tensor:
    """All (B, M) -> log π_θ - log π_BoN of the policy's responses, up to a constant: the mean estimates
    KL(π_θ ‖ π_BoN)."""
    return logprobs - anchor_logprobs - (num_responses - 1) * log_quantile


def backward_kl_loss(logprobs: torch.Tensor, costs: torch.Tensor) -> torch.Tensor:
    """log π_θ with gradient and costs, (B, M) -> loss () with the gradient of KL(π_θ ‖ π_BoN); the baseline
    of a response is the mean cost of the prompt's other responses, 0 when there is none."""
    others = costs.shape[1] - 1
    baseline = (costs.sum(1, keepdim=True) - costs) / max(1, others)
    return (logprobs * (costs - (baseline if others else 0.0)).detach()).mean()


def main(args: Args) -> None:
    common.check_args(args, ("policy", "reward", "prompts", "output_dir"))
    n, m = args.num_responses, args.policy_responses
    per_update = args.batch_size * (n + m)
    updates = args.total_episodes // per_update
    if n < 2:
        raise ValueError("--num_responses must be at least 2: the best of one response is any response")
    if updates < args.iterations:
        raise ValueError(f"--total_episodes must be at least {args.iterations} updates of {per_update}")
    run = common.Run(args)
    rows = pfppo.load_rows(args.prompts, "prompts", (args.prompt_field,))
    rows = pfppo.encode_queries(run.tokenizer, rows, args, "prompts")
    print(
        f"{args.iterations} iterations, {updates} updates of {args.batch_size} prompts x ({n} anchor + {m} "
        "policy responses)"
    )
    if args.dry_run:
        return
    run.start(updates, with_anchor=True)

    for step in range(run.state["step"], updates):
        iteration = step * args.iterations // updates
        if step and iteration > (step - 1) * args.iterations // updates:
            run.anchor.load_state_dict(run.policy.state_dict())

        # ---------------- 1. responses of anchor and policy
        picks = pfppo.prompt_order(len(rows), step * args.batch_size, args.batch_size, args.seed)
        batch_rows = [rows[i] for i in picks]
        anchor_rollout = run.sample(batch_rows, n, args.temperature, 3, step, model=run.anchor)  # (B*N, ...)
        rollout = run.sample(batch_rows, m, args.temperature, 6, step)  # (B*M, ...)
        run.state["episodes"] += per_update
        raw_anchor_scores, raw_scores = run.score(batch_rows, anchor_rollout), run.score(batch_rows, rollout)
        anchor_scores, scores = (
            run.rank_scores(raw_anchor_scores, anchor_rollout),
            run.rank_scores(raw_scores, rollout),
        )

        # ---------------- 2. forward KL
        generator = pfppo.random_generator("cpu", args.seed, 4, step)
        best = best_rows(anchor_scores.cpu(), anchor_rollout["prompt_ids"].cpu(), generator).to(run.device)
        forward = 0.0
        for part in best.split(args.micro_batch_size):
            best_logprobs = common.sequence_logprobs(run.policy, anchor_rollout, part, args.temperature)
            loss = forward_kl_loss(best_logprobs) * len(part) / len(best)
            run.accelerator.backward(loss)
            forward += loss.item()

        # ---------------- 3. backward KL
        quantile = log_quantiles(scores.view(-1, m), anchor_scores.view(-1, n))  # (B, M)
        old_logprobs, anchor_logprobs = (
            run.logprobs(model, rollout).view(-1, m) for model in (run.policy, run.anchor)
        )
        costs = backward_kl_costs(old_logprobs, anchor_logprobs, quantile, n)  # (B, M)
        for part in torch.arange(args.batch_size, device=run.device).split(
            max(1, args.micro_batch_size // m)
        ):
            part_rows = (part.unsqueeze(1) * m + torch.arange(m, device=run.device)).flatten()
            logprobs = common.sequence_logprobs(run.policy, rollout, part_rows, args.temperature).view(-1, m)
            run.accelerator.backward(
                args.beta * backward_kl_loss(logprobs, costs[part]) * len(part) / args.batch_size
            )

        # ---------------- 4. one optimizer step
        run.optimizer_step(forward + args.beta * costs.mean().item(), updates)
        run.end_step(
            {
                "bond/iteration": iteration,
                "bond/forward": forward,
                "bond/backward": costs.mean().item(),
                "bond/anchor_score": raw_anchor_scores.mean().item(),
                "objective/score": raw_scores.mean().item(),
                "bond/log_quantile": quantile.mean().item(),
                "objective/length": rollout["response_mask"].sum(1).float().mean().item(),
                "objective/truncated": (~rollout["has_stop"]).float().mean().item(),
            }
        )
    run.finish()


if __name__ == "__main__":
    main(tyro.cli(Args))
