"""One command times seeds: resumable, a few at a time, every finished run recorded.

  python -m benchmark.lm_human_preferences.run --name policy --root runs/lmhp --seeds 1-10 --workers 1 -- \\
      accelerate launch --cpu --num_processes 1 pfppo_single.py ... --seed {seed} --output_dir {output_dir}

`{seed}` and `{output_dir}` (ROOT/NAME/seed_SEED) are filled in. A finished run is a line in
ROOT/NAME/runs.jsonl (seed, command, commit, hardware, seconds) and is skipped the next time; an unfinished
one is started again with the same command, which our scripts continue from their last checkpoint. The console
of a run is in ROOT/NAME/seed_SEED.log. Exit status 1 when a run failed.
"""

import argparse
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmark.records import append_row, commit, finished_rows, hardware


def parse_seeds(text: str) -> list[int]:
    """`1-3,7` -> [1, 2, 3, 7]."""
    parts = [part.split("-") for part in text.split(",")]
    return [seed for part in parts for seed in range(int(part[0]), int(part[-1]) + 1)]


def run_seed(folder: Path, seed: int, command: list[str]) -> bool:
    """Run one seed to its end and record it; True when it succeeded."""
    output_dir = str(folder / f"seed_{seed}")
    filled = [part.replace("{seed}", str(seed)).replace("{output_dir}", output_dir) for part in command]
    start_commit, start = commit(), time.time()
    with (folder / f"seed_{seed}.log").open("a") as log:
        status = subprocess.run(filled, stdout=log, stderr=subprocess.STDOUT).returncode
    seconds = time.time() - start
    outcome = f"failed with status {status}" if status else "done"
    print(f"{folder.name} seed {seed}: {outcome}, {seconds:.0f} s", flush=True)
    if status == 0:
        machine = f"{hardware()}, {os.environ['OMP_NUM_THREADS']} thread per run"
        line = {"seed": seed, "seconds": round(seconds, 1), "commit": start_commit}
        append_row(folder / "runs.jsonl", {**line, "hardware": machine, "command": shlex.join(filled)})
    return status == 0


def finished_seeds(folder: Path) -> set[int]:
    """Seeds with a line in folder/runs.jsonl."""
    return {line["seed"] for line in finished_rows(folder / "runs.jsonl")}


def main() -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--name", required=True, help="name of the command: a folder under root")
    parser.add_argument("--root", required=True, type=Path, help="folder for all runs of a study")
    parser.add_argument("--seeds", default="1-10", type=parse_seeds, help="for example 1-10 or 1,3,5")
    parser.add_argument("--workers", default=1, type=int, help="runs at a time")
    help_text = "-- and the command with {seed} and {output_dir}"
    parser.add_argument("command", nargs=argparse.REMAINDER, help=help_text)
    args = parser.parse_args()
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    for needed in ("{seed}", "{output_dir}"):
        if needed not in command:
            parser.error(f"the command has no {needed}; add it where the seed and the output folder belong")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    folder = args.root / args.name
    folder.mkdir(parents=True, exist_ok=True)
    seeds = [seed for seed in args.seeds if seed not in finished_seeds(folder)]
    counts = f"{len(seeds)} of {len(args.seeds)} seeds to run, {args.workers} at a time"
    print(f"{args.name}: {counts}", flush=True)
    with ThreadPoolExecutor(args.workers) as pool:
        results = list(pool.map(lambda seed: run_seed(folder, seed, command), seeds))
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
