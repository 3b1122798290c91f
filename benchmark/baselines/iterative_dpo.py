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
from dataclasses import dataclass
from typing import Literal

import torch
import tyro

import pfppo_single as pfppo
from benchmark.baselines import common
from benchmark.baselines.dpo import train_on_pairs


@dataclass
class Args(common.Args):
    # rollout
    prompts: str = ""
    """training prompts: .jsonl, .json, .parquet, or hub id `name:split`"""
    total_episodes: int = 6400
    """responses to generate in all, over all iterations"""
    num_responses: int = 5
    """N: responses per prompt, of which the best and the worst make a pair"""
    iterations: int = 3
    """times that the last policy makes new pairs (PAPER: 3)"""
    # training
    loss_type: Literal["dpo", "ipo"] = "dpo"
    """loss of a pair, see dpo.py"""
    beta: float = 0.1
    """β of DPO, τ of IPO"""
    epochs: int = 2
    """passes over an iteration's pairs"""
    batch_size: int = 32
    """pairs per optimizer step"""
    lr: float = 5e-5
    """learning rate"""
    eval_every: int = 20
    """optimizer steps between evaluations"""
    checkpoint_every: int = 20
    """optimizer steps between checkpoints; the end of an iteration always writes one"""


def best_and_worst(
    scores: torch.Tensor, prompt_ids: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """scores, prompt_ids (rows,) on CPU -> rows of each prompt's best and worst response, ties at random;
    prompts whose responses all score the same have none."""
    ranked = pfppo.rank_rows(scores, prompt_ids, generator)  # (B, N)
    best, worst = ranked[:, 0], ranked[:, -1]
    differ = scores[best] > scores[worst]
    return best[differ], worst[differ]


def make_pairs(run: common.Run, rows: list[dict], num_responses: int, iteration: int) -> list[dict]:
    """Steps 1 and 2 of an iteration: texts, token ids, rewards; kept in pairs_I.jsonl, where a restarted run
    reads them."""
    path = run.output_dir / f"pairs_{iteration + 1}.jsonl"
    if not path.is_file():
        rollout = run.sample(rows, num_responses, run.args.temperature, 3, iteration)
        texts, scores = run.decode(rollout), run.score(rows, rollout)
        ranking = run.rank_scores(scores, rollout).cpu()
        generator = pfppo.random_generator("cpu", run.args.seed, 4, iteration)
        best, worst = (x.tolist() for x in best_and_worst(ranking, rollout["prompt_ids"].cpu(), generator))
        lines = []
        for i, j in zip(best, worst):
            row = rows[i // num_responses]
            line = {"prompt": row[run.args.prompt_field], "query_ids": row["query_ids"]}
            for name, k in (("chosen", i), ("rejected", j)):
                line[name], line[f"{name}_reward"] = texts[k], scores[k].item()
                line[f"{name}_ids"] = rollout["responses"][k][rollout["response_mask"][k]].tolist()
            lines.append(line)
        aside = path.with_suffix(".tmp")
        aside.write_text("".join(json.dumps(line) + "\n" for line in lines))
        aside.rename(path)
        run.bar.write(
            f"iteration {iteration + 1}: {len(lines)} pairs of {len(rows)} prompts x {num_responses} "
            "responses, "
            f"mean reward {scores.mean().item():.3f}"
        )
    pairs = [json.loads(line) for line in path.read_text().splitlines()]
    if not pairs:
        raise ValueError(
            f"iteration {iteration + 1}: the responses of every prompt have one reward; look at --reward"
        )
    return pairs


def main(args: Args) -> None:
    common.check_args(args, ("policy", "reward", "prompts", "output_dir"))
    num_prompts = args.total_episodes // (args.iterations * args.num_responses)  # per iteration
    if args.num_responses < 2:
        raise ValueError("--num_responses must be at least 2: a pair has two responses")
    if num_prompts < 1:
        raise ValueError(f"--total_episodes must be at least {args.iterations * args.num_responses}")
    run = common.Run(args)
    rows = pfppo.load_rows(args.prompts, "prompts", (args.prompt_field,))
    rows = pfppo.encode_queries(run.tokenizer, rows, args, "prompts")
    per_iteration = max(
        1, args.epochs * num_prompts // args.batch_size
    )  # steps, however many prompts gave no pair
    num_steps = args.iterations * per_iteration
    print(
        f"{args.iterations} iterations of {num_prompts} prompts x {args.num_responses} responses, "
        f"{per_iteration} steps"
    )
    if args.dry_run:
        return
    run.start(num_steps)

    for iteration in range(run.state["step"] // per_iteration, args.iterations):
        # ---------------- 1., 2. pairs of the last policy's best and worst responses
        picks = pfppo.prompt_order(len(rows), iteration * num_prompts, num_prompts, args.seed)
        pairs = make_pairs(run, [rows[i] for i in picks], args.num_responses, iteration)
        run.state["episodes"] = (iteration + 1) * num_prompts * args.num_responses

        # ---------------- 3. DPO
        responses = [pair[name] for name in ("chosen_ids", "rejected_ids") for pair in pairs]
        queries = [pair["query_ids"] for pair in pairs] * 2
        rollout = common.make_rollout(queries, responses, run.pad_id, run.device)  # (2P, ...)
        ref_logprobs = run.logprobs(run.ref_policy, rollout)  # (2P,)
        order = pfppo.prompt_order(
            len(pairs), 0, per_iteration * args.batch_size, args.seed + 1000 * (iteration + 1)
        )
        margin = sum(pair["chosen_reward"] - pair["rejected_reward"] for pair in pairs) / len(pairs)
        for step in range(run.state["step"] - iteration * per_iteration, per_iteration):
            batch = order[step * args.batch_size : (step + 1) * args.batch_size]
            metrics = train_on_pairs(run, rollout, ref_logprobs, batch, args.beta, args.loss_type, num_steps)
            metrics.update(
                {"iteration": iteration + 1, "train/pairs": len(pairs), "train/reward_margin": margin}
            )
            run.end_step(metrics, checkpoint=step + 1 == per_iteration)
    run.finish()


if __name__ == "__main__":
    main(tyro.cli(Args))
