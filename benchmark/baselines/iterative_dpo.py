"""Iterative DPO: DPO on pairs that the last policy makes and the reward model judges, three times.

One iteration:
  1. draw N responses for each of its prompts from the last policy (first: π_SFT) and score them
  2. pair each prompt's best response with its worst
  3. DPO on these pairs; the reference stays π_SFT

Run:  python -m benchmark.baselines.iterative_dpo --policy sft/model --reward rm/model --prompts rl.jsonl \\
          --output_dir idpo/ --eval_prompts valid.jsonl --actual_score benchmark.minicode:oracle
Out:  policy, policy_best, metrics.jsonl, pairs_1.jsonl .. pairs_3.jsonl, checkpoints; the same command
      continues.

Sources: DPO arXiv 2305.18290; PAPER = arXiv 2409.06957 for three iterations. Defaults: README.md beside this
file.
"""

import json
import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor

import pfppo_single as pfppo
from benchmark.baselines import common
from benchmark.baselines.dpo import train_on_pairs
from pfppo_single import Amount, Count, Positive


@dataclass(kw_only=True)
class Args(common.PairFields, common.SamplingArgs):
    # rollout
    total_episodes: Count = 6400
    """responses to generate in all, over all iterations"""
    num_responses: Annotated[int, 2, math.inf] = 5
    """N: responses per prompt, of which the best and the worst make a pair"""
    iterations: Count = 3
    """times that the last policy makes new pairs (PAPER: 3)"""
    # training
    loss_type: Literal["dpo", "ipo"] = "dpo"
    """loss of a pair, see dpo.py"""
    beta: Positive = 0.1
    """β of DPO, τ of IPO"""
    epochs: Count = 2
    """passes over an iteration's pairs"""
    batch_size: Count = 32
    """pairs per optimizer step"""
    lr: Amount = 5e-5
    """learning rate"""
    eval_every: Count = 20
    """optimizer steps between evaluations"""
    checkpoint_every: Count = 20
    """optimizer steps between checkpoints; the end of an iteration always writes one"""


def best_and_worst(scores: Tensor, prompt_ids: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """scores, prompt_ids (rows,) on CPU -> rows of each prompt's best and worst response, ties at random;
    prompts whose responses all score the same have none."""
    ranked = pfppo.rank_rows(scores, prompt_ids, generator)  # (B, N)
    best, worst = ranked[:, 0], ranked[:, -1]
    differ = scores[best] > scores[worst]
    return best[differ], worst[differ]


def make_pairs(run: common.Run, rows: list[dict], num_responses: int, iteration: int) -> list[dict]:
    """Steps 1 and 2 of an iteration: pairs as common.read_pairs gives them, with texts and rewards; kept in
    pairs_I.jsonl, where a run that continues reads them."""
    path = run.output_dir / f"pairs_{iteration + 1}.jsonl"
    if not path.is_file():
        rollout = run.sample(rows, num_responses, 3, iteration)
        texts, scores = pfppo.decode_responses(run.tokenizer, rollout), run.score(rows, rollout)
        ranking = run.rank_scores(scores, rollout).cpu()
        generator = pfppo.random_generator("cpu", run.args.seed, 4, iteration)
        best, worst = best_and_worst(ranking, rollout["prompt_ids"].cpu(), generator)
        lines = ""
        for i, j in zip(best.tolist(), worst.tolist()):
            row = rows[i // num_responses]
            pair = {"prompt": row[run.args.prompt_field], "query": row["query_ids"]}
            pair["samples"] = [rollout["responses"][k][rollout["response_mask"][k]].tolist() for k in (i, j)]
            pair |= {"chosen": texts[i], "rejected": texts[j]}
            pair |= {"chosen_reward": scores[i].item(), "rejected_reward": scores[j].item()}
            lines += json.dumps(pair) + "\n"
        pfppo.write_text(path, lines)
        sizes = f"{len(best)} pairs of {len(rows)} prompts x {num_responses} responses"
        print(f"iteration {iteration + 1}: {sizes}, mean reward {scores.mean().item():.3f}")
    pairs = pfppo.load_rows(str(path), "pairs") if path.stat().st_size else []
    same = f"iteration {iteration + 1}: the responses of every prompt have one reward; look at --reward"
    pfppo.refuse((not pairs, same))
    return pairs


def main(args: Args) -> None:
    run = common.Run(args)
    n, least = args.num_responses, args.iterations * args.num_responses
    num_prompts = args.total_episodes // least  # per iteration
    pfppo.refuse((num_prompts < 1, f"--total_episodes must be at least {least}"))
    per_iteration = max(1, args.epochs * num_prompts // args.batch_size)  # steps, however many give no pair
    print(f"{args.iterations} iterations of {num_prompts} prompts x {n} responses, {per_iteration} steps")
    if args.dry_run:
        return
    run.start(args.iterations * per_iteration, args.iterations * per_iteration)

    for iteration in range(run.state["step"] // per_iteration, args.iterations):
        # ---------------- 1., 2. pairs of the last policy's best and worst responses
        pairs = make_pairs(run, run.next_prompts(iteration, num_prompts), n, iteration)
        run.state["episodes"] = (iteration + 1) * num_prompts * n

        # ---------------- 3. DPO
        rollout = common.pair_rollout(pairs, run.device)  # (2P, ...)
        ref_logprobs = run.logprobs(run.ref_policy, rollout)  # (2P,)
        order = common.pass_order(
            len(pairs), per_iteration, args.batch_size, args.seed + 1000 * (iteration + 1)
        )
        margin = sum(pair["chosen_reward"] - pair["rejected_reward"] for pair in pairs) / len(pairs)
        for step in range(run.state["step"] - iteration * per_iteration, per_iteration):
            batch = order[step * args.batch_size : (step + 1) * args.batch_size]
            metrics = train_on_pairs(run, rollout, ref_logprobs, batch)
            metrics |= {"iteration": iteration + 1, "train/pairs": len(pairs), "train/reward_margin": margin}
            run.end_step(metrics, checkpoint=step + 1 == per_iteration)
    run.finish()


if __name__ == "__main__":
    main(tyro.cli(Args, use_underscores=True))
