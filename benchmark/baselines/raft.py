"""RAFT: sample, keep each prompt's best response by reward, train on it as on a demonstration; again with the
new policy.

  1. take the next prompts, draw N responses to each from the current policy
  2. score them, keep the best of each prompt
  3. supervised epochs over the kept responses
  4. next round

Run:  python -m benchmark.baselines.raft --policy sft/model --reward rm/model --prompts rl.jsonl \\
          --output_dir raft/ --eval_prompts valid.jsonl --actual_score benchmark.minicode:oracle
Out:  policy, policy_best, metrics.jsonl, checkpoints; the same command continues.

Source: RAFT arXiv 2304.06767. Defaults: README.md beside this file.
"""

import math
from dataclasses import dataclass
from typing import Annotated

import torch
import tyro
from torch import Tensor

import pfppo_single as pfppo
from benchmark.baselines import common
from pfppo_single import Amount, Count


@dataclass(kw_only=True)
class Args(common.SamplingArgs):
    # rollout
    total_episodes: Count = 6400
    """responses to generate in all"""
    batch_size: Count = 320
    """prompts per round"""
    num_responses: Annotated[int, 2, math.inf] = 5
    """N: responses per prompt, of which the best is kept"""
    # training
    noptepochs: Count = 2
    """passes over a round's kept responses"""
    minibatch_size: Count = 32
    """responses per optimizer step"""
    lr: Amount = 1e-4
    """learning rate"""
    eval_every: Count = 1
    """rounds between evaluations"""
    checkpoint_every: Count = 1
    """rounds between checkpoints"""


def best_rows(scores: Tensor, prompt_ids: Tensor, generator: torch.Generator) -> Tensor:
    """scores, prompt_ids (rows,) on CPU -> row of each prompt's best response, ties at random; prompts
    without any finite score have none."""
    best = pfppo.rank_rows(scores, prompt_ids, generator)[:, 0]
    return best[scores[best].isfinite()]


def supervised_loss(logprobs: Tensor, num_tokens: int) -> Tensor:
    """logprobs (rows,) of whole responses, tokens of the minibatch -> its mean negative log-likelihood per
    token ()."""
    return -logprobs.sum() / num_tokens


def main(args: Args) -> None:
    run = common.Run(args)
    per_round = args.batch_size * args.num_responses
    rounds, minibatches = args.total_episodes // per_round, math.ceil(args.batch_size / args.minibatch_size)
    pfppo.refuse((rounds < 1, f"--total_episodes must be at least one round of {per_round}"))
    num_optimizer_steps = rounds * args.noptepochs * minibatches
    print(f"{rounds} rounds of {args.batch_size} prompts x {args.num_responses}, {num_optimizer_steps} steps")
    if args.dry_run:
        return
    run.start(rounds, num_optimizer_steps)

    for step in range(run.state["step"], rounds):
        # ---------------- 1. draw N responses from the current policy
        batch_rows = run.next_prompts(step, args.batch_size)
        rollout = run.sample(batch_rows, args.num_responses, 3, step)  # (B*N, ...)
        run.state["episodes"] += per_round

        # ---------------- 2. keep the best of each prompt
        scores = run.score(batch_rows, rollout)  # (B*N,)
        ranked = run.rank_scores(scores, rollout).cpu()
        generator = pfppo.random_generator("cpu", args.seed, 4, step)
        best = best_rows(ranked, rollout["prompt_ids"].cpu(), generator).to(run.device)
        kept = {name: tensor[best] for name, tensor in rollout.items()}
        lengths, losses = kept["response_mask"].sum(1), []

        # ---------------- 3. supervised epochs on the kept responses
        for epoch in range(args.noptepochs if len(best) else 0):
            generator = pfppo.random_generator("cpu", args.seed, 5, step, epoch)
            order = torch.randperm(len(best), generator=generator).to(run.device)
            for minibatch in order.tensor_split(min(minibatches, len(best))):
                tokens, total = int(lengths[minibatch].sum()), 0.0
                for part in minibatch.split(args.micro_batch_size):
                    logprobs = common.sequence_logprobs(run.policy, kept, part, args.temperature)
                    loss = supervised_loss(logprobs, tokens)
                    run.accelerator.backward(loss)
                    total += loss.item()
                run.optimizer_step(total)
                losses.append(total)

        # ---------------- 4. next round
        metrics = common.rollout_metrics(scores, rollout) | {"filter/kept": len(best)}
        metrics["filter/score"] = scores[best].mean().item() if len(best) else 0.0
        metrics["train/loss"] = sum(losses) / max(1, len(losses))
        run.end_step(metrics)
    run.finish()


if __name__ == "__main__":
    main(tyro.cli(Args, use_underscores=True))
