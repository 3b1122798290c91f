"""Preference data of the paper: samples of the SFT policy, executed; the (passing, failing) pair of a prompt that
differs most.

  accelerate launch --multi_gpu --num_processes 8 --mixed_precision bf16 -m benchmark.recipes.preferences \\
    --policy sft/model --prompts preference.jsonl --actual_score benchmark.rewards:oracle --output_dir preferences

In:  a policy, prompts with what the grader needs (for benchmark.rewards:oracle: `tests`, `entry_point`).
Out: `pairs.jsonl` and every tenth pair in `valid.jsonl` (prompt, chosen, rejected), `samples_RANK.jsonl` (the
     same command goes on where a killed one stopped), `counts.json`.
Every rank samples its own prompts from a whole policy: with `--dtype bfloat16` 6.7B takes 13.5 GB beside its cache.
"""

from dataclasses import dataclass
from typing import Literal

import torch

import pfppo_single as pfppo
from benchmark import minicode, r2, records
from pfppo_single import Count, Positive, Whole


@dataclass(kw_only=True)
class Args:
    output_dir: str = "output/preferences"
    """folder for everything; a folder that holds another run is refused"""
    seed: Whole = 1
    """of the samples"""
    policy: str
    """π_SFT: folder or hub id of a causal language model"""
    prompts: str
    """prompts: .jsonl(.gz), .json, .csv, .parquet, a save_to_disk folder, or hub id `name:split`"""
    prompt_field: str = "prompt"
    """column with the prompt: text, or a list of chat messages"""
    actual_score: str
    """s: `module:function` of (prompts, responses, rows) -> floats; above 0 is right"""
    num_samples: Count = 5
    """responses per prompt (PAPER: 5)"""
    query_length: Count = 512
    """longest query in tokens; longer ones are left out"""
    response_length: Count = 512
    """longest response in tokens, the stop token included"""
    temperature: Positive = 1.0
    """of the samples"""
    stop_token: str = "eos"
    """token that ends a response: `eos`, `none`, a token, a text that is one, or an id"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """weights of the policy"""
    generation_batch_size: Count = 64
    """responses per rank that are generated at a time"""
    save_every: Count = 32
    """prompts per rank between two writes: what a kill can cost"""
    fewest_pairs: Count = 10
    """fewer pairs end the command: the policy is always right, or never"""


def no_score(prompts, responses, rows) -> list[float]:
    """The reward of a stage that has none yet."""
    return [0.0] * len(responses)


def main(args: Args) -> None:
    accelerator = pfppo.start_accelerator()
    pfppo.check_ranges(args)
    names = "policy prompts seed prompt_field query_length response_length temperature stop_token"
    names += " generation_batch_size"
    given = {name: getattr(args, name) for name in names.split()}
    settings = pfppo.Args(reward=f"{__name__}:no_score", **given)
    tokenizer = pfppo.load_pretrained("AutoTokenizer", args.policy, "policy")
    rows = pfppo.read_prompts("prompts", settings, tokenizer, accelerator.print)
    grader = pfppo.load_function(args.actual_score, "actual_score")
    folder = pfppo.open_run(accelerator, args)
    rank, world = accelerator.process_index, accelerator.num_processes
    own = rows[rank::world]
    if own:
        policy = pfppo.load_causal_lm(args.policy, getattr(torch, args.dtype)).to(accelerator.device).eval()
        file, say = folder / f"samples_{rank}.jsonl", print if rank == 0 else None
        settings.seed += 100003 * rank
        rest = (args.num_samples, settings, file, args.save_every, say)
        with accelerator.autocast():
            r2.collect(policy, tokenizer, (no_score, grader), own, *rest)
    accelerator.wait_for_everyone()
    if rank:
        return
    ranks = [records.finished_rows(folder / f"samples_{number}.jsonl") for number in range(world)]
    lines = [ranks[i % world][i // world] for i in range(len(rows))]
    named = [{"task_id": i, **row, "prompt": row[args.prompt_field]} for i, row in enumerate(rows)]
    passed = [[score > 0 for score in line["actual"]] for line in lines]
    pairs, dropped = minicode.build_pairs(named, [line["responses"] for line in lines], passed)
    right = sum(map(sum, passed)) / sum(map(len, passed))
    few = f"only {len(pairs)} of {len(rows)} prompts have a passing and a failing sample; {right:.1%} of all pass"
    pfppo.refuse((len(pairs) < args.fewest_pairs, few))
    records.write_rows(folder / "valid.jsonl", pairs[::10])
    records.write_rows(folder / "pairs.jsonl", [pair for i, pair in enumerate(pairs) if i % 10])
    counts = {"prompts": len(rows), "pairs": len(pairs), "dropped": dropped, "pass_rate": right}
    records.write_json(folder / "counts.json", counts)
    print(
        f"{len(pairs)} pairs from {len(rows)} prompts; {right:.1%} of the samples pass: {folder / 'pairs.jsonl'}"
    )


if __name__ == "__main__":
    main(pfppo.parse_args(Args))
