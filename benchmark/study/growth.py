"""Measures how seconds and memory of a PPO update grow with its sizes, one size at a time, the others fixed.

    python -m benchmark.study.growth --output_dir output/growth

Writes growth.json, table.md and growth.png. The model is a random GPT-2 of two layers; responses are all of full
length. Filter BR keeps two of N responses (one of one). Each point is a process of its own, on one thread: its
fastest update but the first (other work on the machine can only slow one), and its largest memory, of which Python
and its libraries hold the most.
Forward passes, sampling and minibatches take 32 rows whatever the size, so memory can only grow with a row.
"""

import dataclasses
import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from benchmark import records
from benchmark.study import ppo_speed

ROWS, RESPONSES = 32, 4
BASE = ppo_speed.Workload(2, 64, 32, 32, prompts=32, minibatch=ROWS, micro_batch=ROWS)
SIZES = {
    "responses per prompt": ("num_responses", (1, 2, 4, 8, 16)),
    "prompts": ("prompts", (16, 32, 64, 128, 256)),
    "prompt length": ("query", (16, 32, 64, 128, 256)),
    "response length": ("response", (16, 32, 64, 128, 256)),
    "width": ("width", (32, 64, 128, 256, 512)),
}


@dataclass
class Args:
    output_dir: str = "output/growth"
    """growth.json, table.md, growth.png"""
    updates: int = 4
    """updates of a run, the first of which is not counted"""
    point: str = ""
    """used by the command itself: run this one, `field=value`, and print what it took"""


def measure(args: Args) -> dict:
    """Seconds of the fastest update, in all, by phase and in the filter, and megabytes at the peak."""
    import pfppo_single as pfppo

    field, value = args.point.split("=")
    n, load = RESPONSES, BASE
    if field == "num_responses":
        n = int(value)
    else:
        load = dataclasses.replace(BASE, **{field: int(value)})
    folder = Path(args.output_dir, "models", args.point)
    if not (folder / "world/rl.jsonl").exists():
        ppo_speed.make_models(folder, load)
    settings = ppo_speed.settings_of(load) | dict(num_responses=n, normalize_samples=ROWS, log_with="none")
    settings |= dict(forward_batch_size=ROWS, generation_batch_size=ROWS)
    filtering, keep = [], pfppo.filter_responses

    def timed(*arguments, **settings):
        start = time.perf_counter()
        selected = keep(*arguments, **settings)
        filtering.append(time.perf_counter() - start)
        return selected

    pfppo.filter_responses = timed
    rows = ppo_speed.our_updates(folder, settings, "br" if n > 1 else "none", args.updates)
    best = min(range(1, args.updates), key=lambda i: rows[i]["seconds/update"])
    taken = {part: rows[best][f"seconds/{part}"] for part in ("update", *ppo_speed.PHASES)}
    megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return taken | {"filter": filtering[best], "megabytes": megabytes}


def straightness(sizes: tuple[int, ...], seconds: list[float]) -> float:
    """R² of a line through the points."""
    rest = np.array(seconds) - np.polyval(np.polyfit(sizes, seconds, 1), sizes)
    return float(1 - rest.var() / np.var(seconds))


def table(found: dict[str, dict[str, dict]]) -> str:
    """Points of each size -> one row a point; the last column is seconds over those of the row before."""
    phases = ppo_speed.PHASES
    lines = [f"| | | s / update | {' | '.join(phases)} | filter, % | MB | times |"]
    lines += ["|" + "---|" * (6 + len(phases))]
    for name, points in found.items():
        before = None
        for value, point in points.items():
            cells = [f"{point[part]:.3f}" for part in ("update", *phases)]
            cells += [f"{100 * point['filter'] / point['update']:.2f}", f"{point['megabytes']:.0f}"]
            cells += [f"{point['update'] / before:.2f}" if before else ""]
            lines += [f"| {name} | {value} | {' | '.join(cells)} |"]
            before = point["update"]
    line = {name: straightness(SIZES[name][1], [p["update"] for p in found[name].values()]) for name in found}
    fits = ", ".join(f"{name} {value:.3f}" for name, value in line.items())
    return "\n".join(lines) + f"\n\nR² of a line through the seconds: {fits}."


def draw(found: dict[str, dict[str, dict]], path: Path) -> None:
    """Seconds by phase, stacked, above megabytes; one column a size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, len(found), figsize=(3 * len(found), 5), sharex="col")
    for (name, points), (above, below) in zip(found.items(), panels.T):
        sizes = [int(value) for value in points]
        phases = [[point[phase] for point in points.values()] for phase in ppo_speed.PHASES]
        above.stackplot(sizes, phases, labels=ppo_speed.PHASES, alpha=0.8)
        above.plot(sizes, [point["update"] for point in points.values()], "k.-", linewidth=0.8)
        below.plot(sizes, [point["megabytes"] for point in points.values()], "k.-", linewidth=0.8)
        below.set(xlabel=name, xlim=(0, None))
        above.set_ylim(bottom=0)
        below.set_ylim(bottom=0)
    panels[0, 0].set_ylabel("seconds per update")
    panels[1, 0].set_ylabel("largest memory, MB")
    panels[0, 0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(args: Args) -> None:
    if args.point:
        print(json.dumps(measure(args)))
        return
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", ACCELERATE_USE_CPU="true")
    output_dir, found = Path(args.output_dir), {}
    output_dir.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "benchmark.study.growth", "--output_dir", str(output_dir)]
    for name, (field, values) in SIZES.items():
        for value in values:
            point = ["--updates", str(args.updates), "--point", f"{field}={value}"]
            done = subprocess.run(command + point, capture_output=True, text=True, cwd=records.ROOT)
            if done.returncode:
                raise SystemExit(f"{name} {value} failed:\n{done.stderr[-3000:]}")
            found.setdefault(name, {})[str(value)] = json.loads(done.stdout.splitlines()[-1])
            print(f"{name} {value}: {found[name][str(value)]['update']:.3f} s per update", flush=True)
    hardware = {"hardware": records.hardware(), "commit": records.commit()}
    records.write_json(output_dir / "growth.json", {**hardware, "sizes": found})
    records.write_text(output_dir / "table.md", table(found) + "\n")
    draw(found, output_dir / "growth.png")
    print(f"\n{table(found)}\n{hardware['hardware']}, one thread, commit {hardware['commit']}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
