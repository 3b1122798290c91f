"""What recipes share: a list of commands, each skipped when its output is there, run as a user types them.

A step's command is a line for the shell, so that everything a recipe does can be done by hand. `--dry_run`
prints the lines and checks every flag of them. Seconds and memory of each step go to `steps.jsonl`.
"""

import dataclasses
import importlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pfppo_single as pfppo
from benchmark import records
from benchmark.pipeline import flags, last_words

QUIET = {
    "PYTHONPATH": str(records.ROOT),
    "PYTHONUNBUFFERED": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


@dataclass
class Step:
    """One command: a module of this repository and its flags. It is done when `output` is there."""

    name: str
    module: str
    """sft_single, rm_single, pfppo_single, or a module of benchmark/"""
    settings: dict = field(repr=False)
    output: Path

    def line(self, launcher: str) -> str:
        """What a user types."""
        words = [
            "accelerate launch",
            launcher,
            *self.target(),
            shlex.join(flags(self.settings)),
        ]
        return " ".join(words)

    def target(self) -> list[str]:
        return ["-m", self.module] if "." in self.module else [f"{self.module}.py"]

    def parsed(self):
        """Args of these flags; refuses, in one line, one that the script does not take."""
        script = importlib.import_module(self.module)
        return pfppo.parse_args(script.Args, flags(self.settings))


def keep_settings(folder: Path, args, free: list[str]) -> None:
    """Refuses a folder whose data were made with other settings; those in `free` do not touch data."""
    new = {name: value for name, value in dataclasses.asdict(args).items() if name not in free}
    file = folder / "recipe.json"
    old = json.loads(file.read_text()) if file.is_file() else new
    other = [
        f"{name} ({old.get(name)!r} there, {new[name]!r} here)" for name in new if old.get(name) != new[name]
    ]
    where = f"--output_dir {folder} holds another run"
    pfppo.refuse((other != [], f"{where}: {', '.join(other)}; name a new folder or delete this one"))
    folder.mkdir(parents=True, exist_ok=True)
    records.write_json(file, new)


def run_step(step: Step, launcher: str, folder: Path) -> None:
    """Runs a step in the repository's root; its lines go to the console and to folder/NAME.log. Ends with the
    script's own last line when it fails."""
    log, start = folder / f"{step.name}.log", time.time()
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        *shlex.split(launcher),
        *(word if "." in step.module else str(records.ROOT / word) for word in step.target()),
    ]
    with log.open("ab", buffering=0) as file:
        process = subprocess.Popen(
            [*command, *flags(step.settings)],
            env={**os.environ, **QUIET},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        try:
            for line in process.stdout:
                file.write(line)
                print(line.decode(errors="replace").rstrip(), flush=True)
        except BaseException:
            process.terminate()
            raise
        finally:
            _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{step.name}: {last_words(log.read_text(errors='replace'))} (log: {log})")
    row = {"step": step.name, "seconds": round(time.time() - start, 1)}
    row["peak_gb"] = round(usage.ru_maxrss / 2**20, 2)  # the largest of the launcher and those it waited for
    records.append_row(folder / "steps.jsonl", {**row, "line": step.line(launcher)})


def run_steps(steps: list[Step], launcher: str, folder: Path, dry_run: bool, keep_checkpoints=False) -> None:
    """All steps in order; one whose output is there is skipped, so the same command goes on after a kill.
    A finished step's checkpoints, 1.6 GB each for 135M parameters, are deleted where they are not kept."""
    for number, step in enumerate(steps, 1):
        there = step.output.exists()
        print(f"[{number}/{len(steps)}] {step.name}{': there already' if there else ''}", flush=True)
        if dry_run:
            step.parsed()
            print(step.line(launcher), flush=True)
        elif not there:
            run_step(step, launcher, folder)
        if not dry_run and not keep_checkpoints:
            shutil.rmtree(step.output.parent / "checkpoints", ignore_errors=True)
