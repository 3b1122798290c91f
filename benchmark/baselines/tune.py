"""The grid behind the baselines' default learning rates: one seed, judged on the validation split.

    python -m benchmark.baselines.tune --world DIR --output_dir OUT

DIR is a folder of benchmark/pipeline.py (sft/model, rm/model, preferences.jsonl, world/). Every finished run
is a line of OUT/grid.jsonl (method, lr, settings, curve of eval/*, processor seconds) and is skipped the next
time; the runs themselves are under OUT/runs/; OUT/grid.md is the table.

Three rates each, the middle one first. Where the best of them (highest greedy pass@1 of any checkpoint) is
the largest or smallest, twice or half of it is tried too, until the best has neighbours on both sides or five
rates have been tried. Chosen is the smallest rate within one standard error of the best (the
one-standard-error rule): among equals, the policy that has moved least.
"""

import importlib
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

import pfppo_single as pfppo
from benchmark import pipeline, records
from benchmark.study import figures
from pfppo_single import Whole

GRID = {  # method -> script, learning rates, further settings
    "ppo_s": ("pfppo", (5e-5, 1e-4, 2e-4), {}),  # pfppo_single.py with the same budget
    "ppo_m": ("pfppo", (5e-5, 1e-4, 2e-4), {}),
    "br": ("pfppo", (5e-5, 1e-4, 2e-4), {}),
    "bw": ("pfppo", (5e-5, 1e-4, 2e-4), {}),
    "random": ("pfppo", (5e-5, 1e-4, 2e-4), {}),
    "dpo": ("dpo", (2e-5, 5e-5, 1e-4), {}),
    "ipo": ("dpo", (2e-5, 5e-5, 1e-4), {"loss_type": "ipo"}),
    "kto": ("kto", (5e-5, 1e-4, 2e-4), {}),
    "raft": ("raft", (1e-4, 3e-4, 1e-3), {}),
    "bond": ("bond", (3e-5, 1e-4, 3e-4), {}),
    "iterative_dpo": ("iterative_dpo", (2e-5, 5e-5, 1e-4), {}),
}


def best_of(done: list[dict], method: str) -> dict[float, float]:
    """{learning rate: highest greedy pass@1 of its checkpoints} of the finished runs of a method."""
    runs = [run for run in done if run["method"] == method]
    return {run["lr"]: max(point["eval/greedy_pass1"] for point in run["curve"]) for run in runs}


def next_rate(rates: tuple[float, float, float], found: dict[float, float], most: int = 5) -> float | None:
    """What to try next: the middle rate, the others, then beyond the edge where the best lies; None when
    there is nothing left."""
    for lr in (rates[1], rates[0], rates[2]):
        if lr not in found:
            return lr
    best = max(found, key=found.get)
    if len(found) >= most or min(found) < best < max(found):
        return None
    return float(f"{best * 2 if best == max(found) else best / 2:.3g}")


def chosen(found: dict[float, float], problems: int) -> float:
    """The smallest rate whose pass@1 is within one standard error of the highest, on that many validation
    problems."""
    best = max(found.values())
    return min(lr for lr, value in found.items() if value >= best - math.sqrt(best * (1 - best) / problems))


HEADER = ["method", "lr", "best greedy pass@1 (at step)", "greedy, last", "sampled, last", "KL, last"]
HEADER += ["processor seconds"]


def table(done: list[dict], problems: int) -> str:
    """Markdown: a row per run, the chosen rate of each method marked."""
    rows = []
    for method in dict.fromkeys(run["method"] for run in done):
        rates = best_of(done, method)
        for run in sorted((run for run in done if run["method"] == method), key=lambda run: run["lr"]):
            last, best = run["curve"][-1], max(run["curve"], key=lambda point: point["eval/greedy_pass1"])
            mark = " (chosen)" if run["lr"] == chosen(rates, problems) else ""
            row = [figures.label(method), f"{run['lr']:g}{mark}"]
            row += [f"{best['eval/greedy_pass1']:.3f} ({best['step']})", f"{last['eval/greedy_pass1']:.3f}"]
            row += [
                f"{last['eval/sampled_pass1']:.3f}",
                f"{last['eval/kl']:.2f}",
                f"{run['cpu_seconds']:.0f}",
            ]
            rows.append(row)
    return figures.markdown_table(HEADER, rows)


@dataclass(kw_only=True)
class Args:
    world: str
    """folder of benchmark/pipeline.py with SFT policy, reward model and preference data"""
    output_dir: str = "output/tune"
    """folder for grid.jsonl and the runs"""
    methods: tuple[str, ...] = tuple(GRID)
    """which rows of the grid"""
    seed: Whole = 1
    """seed of every run"""


TAGS = ("step", "episodes", "optimizer_step", "eval/greedy_pass1", "eval/sampled_pass1")
TAGS += ("eval/sampled_reward", "eval/kl")


def train(args: Args, method: str, lr: float, folder: Path) -> None:
    """One run of the grid, in this process."""
    world, (name, _, settings) = Path(args.world), GRID[method]
    if name == "pfppo":
        flags = pipeline.ppo_settings(world, method, args.seed, 20, folder, lr=lr)
        pfppo.main(pfppo.parse_args(pfppo.Args, pipeline.flags(flags)))
        return
    settings = {**settings, "policy": str(world / "sft/model"), "reward": str(world / "rm/model"), "lr": lr}
    settings |= {"eval_prompts": str(world / "world/valid.jsonl"), "seed": args.seed}
    settings |= {"actual_score": "benchmark.minicode:oracle", "output_dir": str(folder)}
    if name in ("dpo", "kto"):
        settings["train_data"] = str(world / "preferences.jsonl")
    else:
        settings["prompts"] = str(world / "world/rl.jsonl")
    script = importlib.import_module(f"benchmark.baselines.{name}")
    script.main(script.Args(**settings))


def main(args: Args) -> None:
    pfppo.check_ranges(args)
    unknown = ", ".join(name for name in args.methods if name not in GRID)
    pfppo.refuse((unknown != "", f"--methods {unknown}: not in the grid; choose from {', '.join(GRID)}"))
    torch.set_num_threads(1)
    world, out = Path(args.world), Path(args.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    grid, problems = out / "grid.jsonl", len(records.read_rows(world / "world/valid.jsonl"))
    done = records.finished_rows(grid)
    while unfinished := [m for m in args.methods if next_rate(GRID[m][1], best_of(done, m)) is not None]:
        # in turn: a grid cut short says something of every method
        method = min(unfinished, key=lambda m: len(best_of(done, m)))
        lr, start = next_rate(GRID[method][1], best_of(done, method)), time.process_time()
        folder = out / "runs" / f"{method}_{lr:g}"
        train(args, method, lr, folder)
        rows = [row for row in records.read_rows(folder / "metrics.jsonl") if "eval/kl" in row]
        line = {"method": method, "lr": lr, "settings": GRID[method][2], "seed": args.seed}
        line["curve"] = [{tag: row.get(tag) for tag in TAGS} for row in rows]
        line["cpu_seconds"] = round(time.process_time() - start, 1)
        records.append_row(grid, line)
        done.append(line)
        (out / "grid.md").write_text(table(done, problems) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args, use_underscores=True))
