"""The main job over seeds, and its table with intervals.

    python -m benchmark.study.quickstart_seeds --seeds 1 2 3 4 5 --output_dir output/quickstart \\
        --results_dir benchmark/results/DATE-quickstart

A seed draws a new world, SFT policy, reward model and samples. Each seed's summary, table and pictures are
copied to results_dir/seed_S; `seeds.md` and `seeds.json` hold mean and 95% t-interval over seeds, and the
seconds of every stage. A killed run continues.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from benchmark import quickstart
from benchmark.records import half_width, write_json
from benchmark.study import figures


@dataclass
class Args:
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    """one main job each"""
    output_dir: str = "output/quickstart"
    """work folders are output_dir/seed_S"""
    results_dir: str = "output/quickstart-results"
    """where summaries, tables and pictures go"""
    parallel: int = 2
    """as in benchmark.quickstart"""


def mean_interval(values: list[float]) -> tuple[float, float]:
    """Mean and half width of the 95% t-interval; nan for one value."""
    return float(np.mean(values)), float(half_width(values))


def main(args: Args) -> None:
    summaries, results = {}, Path(args.results_dir)
    for seed in args.seeds:
        folder, kept = Path(args.output_dir) / f"seed_{seed}", results / f"seed_{seed}"
        if not (kept / "summary.json").is_file():
            quickstart.main(quickstart.Args(output_dir=str(folder), seed=seed, parallel=args.parallel))
            kept.mkdir(parents=True, exist_ok=True)
            for name in ("table.md", "training.png", "reliability.png", "r2.png", "summary.json"):
                shutil.copy(folder / name, kept / name)
        summaries[seed] = json.loads((kept / "summary.json").read_text())
    keys = ("greedy_pass1", "sampled_pass1", "reward", "kl", "r2", "seconds")
    table, rows = {}, []
    for method in ("sft", *quickstart.METHODS):
        runs = [s["methods"][method] for s in summaries.values()]
        best = [r.get("best_checkpoint", r)["greedy_pass1"] for r in runs]
        gains = [
            s["methods"][method]["greedy_pass1"] - s["methods"]["sft"]["greedy_pass1"]
            for s in summaries.values()
        ]
        table[method] = {key: mean_interval([r[key] for r in runs]) for key in keys}
        table[method].update(
            best_checkpoint=mean_interval(best),
            smallest_gain=min(gains),
            per_seed=[r["greedy_pass1"] for r in runs],
        )
        cells = [
            f"{m:.3f} ± {h:.3f}"
            for m, h in (
                table[method][k]
                for k in ("greedy_pass1", "best_checkpoint", "sampled_pass1", "reward", "kl", "r2")
            )
        ]
        rows.append(
            [
                figures.label(method),
                *cells,
                " ".join(f"{g:.3f}" for g in table[method]["per_seed"]),
                f"{table[method]['seconds'][0]:.0f}",
            ]
        )
    text = figures.markdown_table(
        [
            "method",
            "greedy pass@1",
            "best checkpoint",
            "sampled pass@1",
            "reward",
            "KL",
            "R²",
            "greedy pass@1 of each seed",
            "seconds",
        ],
        rows,
    )
    seconds = {
        name: [{**s["seconds"], "whole": s["seconds_total"]}[name] for s in summaries.values()]
        for name in (*quickstart.STAGES, "whole")
    }
    lines = [[name, *(f"{each:.0f}" for each in (np.mean(taken), *taken))] for name, taken in seconds.items()]
    stages = figures.markdown_table(["stage", "seconds", *(f"seed {s}" for s in summaries)], lines)
    results.mkdir(parents=True, exist_ok=True)
    write_json(results / "seeds.json", {**table, "seconds_of_stages": seconds})
    (results / "seeds.md").write_text(
        f"Mean ± 95% interval over seeds {', '.join(map(str, args.seeds))}; 600 unseen problems "
        f"each.\n\n{text}\n\nSeconds of the stages, mean and each seed:\n\n{stages}\n"
    )
    print(f"\n{text}\n\n{stages}")


if __name__ == "__main__":
    main(tyro.cli(Args))
