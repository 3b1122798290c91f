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

from dataclasses import dataclass

import torch
import tyro

import pfppo_single as pfppo
from benchmark.baselines import common


@dataclass
class Args(common.Args):
    # rollout
    prompts: str = ""
    """training prompts: .jsonl, .json, .parquet, or hub id `name:split`"""
    total_episodes: int = 6400
    """responses to generate in all"""
    batch_size: int = 320
    """prompts per round"""
    num_responses: int = 5
    """N: responses per prompt, of which the best is kept"""
    # training
    noptepochs: int = 2
    """passes over a round's kept responses"""
    minibatch_size: int = 32
    """responses per optimizer step"""
    lr: float = 1e-4
    """learning rate"""
    eval_every: int = 1
    """rounds between evaluations"""
    checkpoint_every: int = 1
    """rounds between checkpoints"""


def best_rows(scores: torch.Tensor, prompt_ids: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """scores, prompt_ids (rows,) on CPU -> row of each prompt's best response, ties at random; prompts
    without any finite score have none."""
    best = pfppo.rank_rows(scores, prompt_ids, generator)[:, 0]
    return best[scores[best].isfinite()]


def supervised_loss(logprobs: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """logprobs (rows,) of whole responses, tokens of the minibatch -> its mean negative log-likelihood per
    token ()."""
    return -logprobs.sum() / num_tokens


def main(args: Args) -> None:
    common.check_args(args, ("policy", "reward", "prompts", "output_dir"))
    per_round = args.batch_size * args.num_responses
    rounds = args.total_episodes // per_round
    if args.num_responses < 2:
        raise ValueError("--num_responses must be at least 2: the best of one response is any response")
    if rounds < 1:
        raise ValueError(f"--total_episodes must be at least one round of {per_round}")
    run = common.Run(args)
    rows = pfppo.load_rows(args.prompts, "prompts", (args.prompt_field,))
    rows = pfppo.encode_queries(run.tokenizer, rows, args, "prompts")
    minibatches = -(-args.batch_size // args.minibatch_size)
    num_optimizer_steps = rounds * args.noptepochs * minibatches
    print(
        f"{rounds} rounds of {args.batch_size} prompts x {args.num_responses} responses, "
        f"{num_optimizer_steps} steps"
    )
    if args.dry_run:
        return
    run.start(rounds)

    for step in range(run.state["step"], rounds):
        # ---------------- 1. draw N responses from the current policy
        picks = pfppo.prompt_order(len(rows), step * args.batch_size, args.batch_size, args.seed)
        batch_rows = [rows[i] for i in picks]
        rollout = run.sample(batch_rows, args.num_responses, args.temperature, 3, step)  # (B*N, ...)
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
                    loss = supervised_loss(
                        common.sequence_logprobs(run.policy, kept, part, args.temperature), tokens
                    )
                    run.accelerator.backward(loss)
                    total += loss.item()
                run.optimizer_step(total, num_optimizer_steps)
                losses.append(total)

        # ---------------- 4. next round
        run.end_step(
            {
                "objective/score": scores.mean().item(),
                "filter/kept": len(best),
                "filter/score": scores[best].mean().item() if len(best) else 0.0,
                "objective/length": rollout["response_mask"].sum(1).float().mean().item(),
                "objective/truncated": (~rollout["has_stop"]).float().mean().item(),
                "train/loss": sum(losses) / max(1, len(losses)),
            }
        )
    run.finish()


if __name__ == "__main__":
    main(tyro.cli(Args))
