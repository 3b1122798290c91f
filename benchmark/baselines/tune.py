"""The grid behind the baselines' default learning rates: three each, one seed, judged on the validation split.

    python -m benchmark.baselines.tune --world DIR --output_dir OUT

DIR is a folder of benchmark/pipeline.py (sft/model, rm/model, preferences.jsonl, world/). Every finished run is a line of OUT/grid.jsonl
(method, lr, settings, curve of eval/*, processor seconds) and is skipped the next time; the runs themselves are under OUT/runs/.
"""
import importlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

GRID = {  # method -> script, learning rates, further settings
    "dpo": ("dpo", (2e-5, 5e-5, 1e-4), {}),
    "ipo": ("dpo", (2e-5, 5e-5, 1e-4), {"loss_type": "ipo"}),
    "kto": ("kto", (5e-5, 1e-4, 2e-4), {}),
    "raft": ("raft", (1e-4, 3e-4, 1e-3), {}),
    "bond": ("bond", (3e-5, 1e-4, 3e-4), {}),
    "iterative_dpo": ("iterative_dpo", (2e-5, 5e-5, 1e-4), {}),
}


@dataclass
class Args:
    world: str = ""
    """folder of benchmark/pipeline.py with SFT policy, reward model and preference data"""
    output_dir: str = "output/tune"
    """folder for grid.jsonl and the runs"""
    methods: tuple[str, ...] = tuple(GRID)
    """which rows of the grid"""
    seed: int = 1
    """seed of every run"""


def main(args: Args) -> None:
    torch.set_num_threads(1)
    world, out = Path(args.world), Path(args.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    grid = out / "grid.jsonl"
    done = {(r["method"], r["lr"]) for r in map(json.loads, grid.read_text().splitlines())} if grid.is_file() else set()
    for turn in (1, 0, 2):  # the middle rates first, so that a grid cut short says something of every method
        for method in args.methods:
            name, rates, settings = GRID[method]
            lr = rates[turn]
            if (method, lr) in done:
                continue
            script = importlib.import_module(f"benchmark.baselines.{name}")
            offline = name in ("dpo", "kto")
            data = {"train_data": str(world / "preferences.jsonl")} if offline else {"prompts": str(world / "world/rl.jsonl")}
            folder, start = out / "runs" / f"{method}_{lr:g}", time.process_time()
            run = script.Args(
                policy=str(world / "sft/model"), reward=str(world / "rm/model"), eval_prompts=str(world / "world/valid.jsonl"),
                actual_score="benchmark.minicode:oracle", output_dir=str(folder), seed=args.seed, lr=lr, **data, **settings)  # fmt: skip
            script.main(run)
            rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            tags = ("step", "episodes", "optimizer_step", "eval/greedy_pass1", "eval/sampled_pass1", "eval/sampled_reward", "eval/kl")
            curve = [{tag: row[tag] for tag in tags} for row in rows if "eval/kl" in row]
            line = {"method": method, "lr": lr, "settings": settings, "seed": args.seed, "curve": curve,
                    "cpu_seconds": round(time.process_time() - start, 1)}  # fmt: skip
            with grid.open("a") as file:
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args))
