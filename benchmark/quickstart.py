"""The main job: from nothing to a trained PF-PPO policy on the embedded world, its table and its pictures.

  python -m benchmark.quickstart --output_dir output/quickstart --seed 1   # under five minutes
  python -m benchmark.quickstart --output_dir output/fast --fast           # two: to see it work

Stages and files are those of benchmark/pipeline.py; the same command continues a killed run. Leaves in the
output folder: `summary.json` (methods -> sft, ppo_m, br, bw -> greedy_pass1, greedy_pass1_se, sampled_pass1,
reward, kl, r2, seconds; seconds of every stage), `table.md`, `training.png` (Figure 2), `reliability.png`
(Figure 1) and `r2.png`, the policies in METHOD/policy, and the exact command of every stage in NAME.sh.

No core is idle for long: SFT and reward model train on two threads, two processes share the preference
prompts, and from there on R², the PPO runs and the test problems go two at a time.
"""

import dataclasses
import json
import os
import re
import shlex
import sys
import threading
import time
from concurrent.futures import FIRST_EXCEPTION, Executor, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch

import pfppo_single as pfppo
from benchmark import pipeline, r2, records, workers
from benchmark.study import figures
from pfppo_single import Count, Whole

METHODS = ("ppo_m", "br", "bw")


@dataclass(kw_only=True)
class Args:
    # run
    output_dir: str = "output/quickstart"
    """folder for everything; a folder made with other settings is refused"""
    seed: Whole = 1
    """seed of the world, of every training stage and of all sampling"""
    fast: bool = False
    """a smaller and easier world and fewer updates, in two minutes; sizes given as flags win"""
    parallel: Count = 2
    """what runs at a time: threads of SFT and reward model, then processes of one thread each"""
    # sizes
    updates: Count = 20
    """PPO updates per method"""
    num_sft: Count = 6000
    """demonstrations in the world"""
    sft_epochs: Count = 16
    """passes over the demonstrations; the held-out loss is lowest after 9 to 13, policies do not gain by it"""
    num_preference: Count = 4000
    """prompts for preference data"""
    num_valid: Count = 300
    """validation problems (training curves, R²)"""
    num_test: Count = 600
    """test problems (the final table, looked at once)"""
    max_operations: Count = 3
    """most operations that a problem chains: its difficulty"""


# What --fast puts in place of the defaults; so few steps of SFT need a higher learning rate.
FAST = dict(updates=8, sft_epochs=5, num_preference=2500, num_valid=150, num_test=300, max_operations=2)
FAST_SFT = dict(lr=4e-3)


class Stage(NamedTuple):
    """A stage: what it is, the runs whose lines (`br 5/20 ...`) say how far it is, and its seconds on two
    idle cores at the default sizes, of which `fixed` are spent whatever the sizes."""

    text: str
    runs: tuple[str, ...]
    seconds: float
    fixed: float
    sizes: tuple[str, ...]


SIDE_BY_SIDE = (
    "R² of every filter, before any RL; PPO: "
    + ", ".join(map(figures.label, METHODS))
    + "; test problems, looked at once: two at a time"
)
STAGES = {
    "world": Stage("world: problems with hidden tests", (), 5, 2, ("num_sft",)),
    "sft": Stage("SFT", ("sft",), 98, 8, ("num_sft", "sft_epochs")),
    "preferences": Stage(
        "preference data: sample, execute, pair", ("preferences",), 14, 1, ("num_preference",)
    ),
    "rm": Stage("reward model (Eq. 1, 2)", ("rm",), 26, 8, ("num_preference",)),
    "ppo": Stage(SIDE_BY_SIDE, (*METHODS, "test"), 97, 30, ("updates",)),
}


class Progress:
    """Prints the lines of all stages, and one line with the time left overall: below the others on a
    terminal, elsewhere now and then."""

    def __init__(self, planned: dict[str, float]):
        self.planned, self.finished, self.start, self.shown = dict(planned), 0.0, time.time(), 0.0
        self.stage, self.runs, self.terminal = "", {}, sys.stdout.isatty()
        self.lock = threading.Lock()

    def run(self, stage: str, work, *args, **settings):
        """Work of a stage -> (what it returns, seconds)."""
        self.stage, self.runs, self.shown = stage, dict.fromkeys(STAGES[stage].runs, 0.0), 0.0
        self.line(f"\n== {1 + list(STAGES).index(stage)}/{len(STAGES)} {STAGES[stage].text}")
        began = time.time()
        out = work(*args, **settings)
        seconds, planned = time.time() - began, self.planned.pop(stage)
        self.finished += planned if seconds > 1 else 0.0  # one that was there already counts as nothing
        return out, seconds

    def left(self) -> float:
        """Seconds left: what is planned, at the speed so far (at first that of an idle machine)."""
        share = sum(self.runs.values()) / max(1, len(self.runs))
        done = self.finished + share * self.planned.get(self.stage, 0.0)
        speed = (time.time() - self.start + 10) / (done + 10)
        return speed * (self.finished + sum(self.planned.values()) - done)

    def line(self, text: str) -> None:
        """Print a line of a stage, and the progress line."""
        found = re.match(r"(\w+) (\d+)/(\d+)", text)
        with self.lock:
            if found and found[1] in self.runs:
                self.runs[found[1]] = int(found[2]) / int(found[3])
            gone, left = clock(time.time() - self.start), clock(self.left())
            progress = (
                f"[stage {1 + list(STAGES).index(self.stage)}/{len(STAGES)}, {gone} gone, about {left} left]"
            )
            if self.terminal:
                print(f"\r\033[K{text}\n{progress}", end="\r", flush=True)  # a stray line then hides it
            elif time.time() - self.shown > 20:
                print(f"{text}\n{progress}", flush=True)
                self.shown = time.time()
            else:
                print(text, flush=True)

    def close(self) -> None:
        if self.terminal:
            print("\r\033[K", end="", flush=True)


def clock(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 100 else f"{seconds:.0f} s"


def planned_seconds(args: Args) -> dict[str, float]:
    """Seconds per stage on two idle cores."""
    usual, planned = Args(), {}
    for name, stage in STAGES.items():
        share = 0.5 if args.max_operations < usual.max_operations else 1.0  # shorter problems
        for size in stage.sizes:
            share *= getattr(args, size) / getattr(usual, size)
        planned[name] = stage.fixed + share * (stage.seconds - stage.fixed)
    return planned


def with_fast_sizes(args: Args) -> Args:
    """--fast changes the sizes that were not given as flags."""
    defaults = {field.name: field.default for field in dataclasses.fields(Args)}
    changes = {k: v for k, v in FAST.items() if getattr(args, k) == defaults[k]} if args.fast else {}
    return dataclasses.replace(args, **changes)


def open_folder(args: Args) -> Path:
    """The output folder with quickstart.json; refuses one that holds another run."""
    folder, settings = Path(args.output_dir), asdict(args)
    file, where = folder / "quickstart.json", f"--output_dir {folder}"
    old = json.loads(file.read_text()) if file.is_file() else settings
    free = ("output_dir", "parallel")
    changed = [
        k
        for k in settings
        if k not in free and old.get(k, Args.__dataclass_fields__[k].default) != settings[k]
    ]
    advice = "name a new folder or delete this one"
    foreign = folder.is_dir() and any(folder.iterdir()) and not file.is_file()
    pfppo.refuse(
        (folder.exists() and not folder.is_dir(), f"{where} is a file; name a folder"),
        (changed != [], f"{where} holds a run with another {', '.join(changed)}; {advice}"),
        (foreign, f"{where} is not empty and holds no quickstart run; {advice}"),
    )
    folder.mkdir(parents=True, exist_ok=True)
    records.write_json(file, settings)
    return folder


def main(args: Args) -> dict:
    pfppo.check_ranges(args)
    args, start = with_fast_sizes(args), time.time()
    pfppo.refuse(
        (args.num_valid < 20, "--num_valid must be at least 20: R² needs as many groups of responses"),
        (args.max_operations < 2, "--max_operations must be at least 2"),
    )
    folder, planned = open_folder(args), planned_seconds(args)
    progress, seed = Progress(planned), args.seed
    seconds_file = folder / "seconds.json"
    seconds = json.loads(seconds_file.read_text()) if seconds_file.is_file() else {}
    torch.set_num_threads(1)
    pool = workers.start(args.parallel)
    print(
        f"PF-PPO on the embedded world, seed {seed}: {args.num_sft} demonstrations, {args.num_preference} "
        f"preference prompts, {args.updates} updates a method; about {clock(sum(planned.values()))} on two "
        f"idle cores. Everything goes to {folder}",
        flush=True,
    )

    def record(name: str, taken: float) -> None:
        with progress.lock:
            seconds.setdefault(name, round(taken, 1))
            records.write_json(seconds_file, seconds)

    def stage(name: str, work, *arguments, **settings):
        """Run one stage, and remember how long it took when it was first done."""
        out, taken = progress.run(name, work, *arguments, **settings)
        record(name, taken)
        return out

    say, sizes = progress.line, ("num_sft", "num_preference", "num_valid", "num_test", "max_operations")
    both = dict(say=say, threads=args.parallel, micro_batch_size=32 if args.parallel > 1 else 16)
    own = dict(epochs=args.sft_epochs, **(FAST_SFT if args.fast else {}))
    try:
        stage("world", pipeline.world, folder, seed, **{name: getattr(args, name) for name in sizes})
        stage("sft", pipeline.sft, folder, seed, **both, **own)
        stage("preferences", pipeline.preferences, folder, seed, say=say, run=pool.map)
        counts = json.loads((folder / "preferences.json").read_text())
        train, valid = counts["train_pairs"], counts["valid_pairs"]
        say(f"{counts['pass_rate']:.1%} of SFT's samples pass; {train} pairs to train on, {valid} held out")
        stage("rm", pipeline.rm, folder, seed, **both)
        found, methods = stage("ppo", side_by_side, folder, args, pool, say, record)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        progress.close()

    methods["sft"]["seconds"] = seconds["sft"]
    curves = {method: training_curve(folder / method) for method in METHODS}
    figures.training_curves(curves, folder / "training.png", args.num_valid)
    text = table(methods)
    (folder / "table.md").write_text(text + "\n")
    summary = {
        "methods": methods,
        "r2_sft": found["filters"],
        "preferences": counts,
        "seconds": {name: seconds[name] for name in STAGES},
        "seconds_total": round(sum(seconds[name] for name in STAGES), 1),
        "seconds_side_by_side": {name: taken for name, taken in seconds.items() if name not in STAGES},
        "settings": asdict(args),
        "commit": records.commit(),
        "hardware": records.hardware(),
    }
    records.write_json(folder / "summary.json", summary)
    print(f"\n{text}\n\n{closing(folder, args)}\n\n{spent(seconds)}", flush=True)
    print(f"{clock(time.time() - start)} in all", flush=True)
    return summary


def spent(seconds: dict[str, float]) -> str:
    """Seconds of every stage, and of what went side by side in the last one."""
    stages, tasks = (
        ", ".join(f"{name} {taken:.0f}" for name, taken in seconds.items() if (name in STAGES) == whole)
        for whole in (True, False)
    )
    return f"Seconds: {stages}; in the last, side by side: {tasks}"


def side_by_side(folder: Path, args: Args, pool: Executor, say, record) -> tuple[dict, dict]:
    """R² before any RL, PPO, and the test problems, `parallel` at a time -> what r2.json holds, results of
    every method. The longest run is begun first. The first that fails ends the job when those that run have
    ended."""
    seed, every, tested = args.seed, max(1, args.updates // 4), []

    def filters() -> dict:
        found = pool.submit(r2_of_sft, folder, seed).result()
        say(r2.report(found))
        return found

    def train(method: str) -> None:
        pipeline.ppo(folder, method, seed, args.updates, say, eval_every=every)

    def test(name: str) -> dict:
        line = pool.submit(test_problems, folder, name, seed).result()
        tested.append(name)
        counted = f"test {len(tested)}/{1 + len(METHODS)}"
        say(f"{counted}  {figures.label(name)} {line['greedy_pass1']:.3f}")
        return line

    def timed(name: str, work, *arguments, after=None):
        if after:
            after.result()
        begun = time.time()
        out = work(*arguments)
        record(name, time.time() - begun)
        return out

    with ThreadPoolExecutor(args.parallel) as lanes:
        longest, *others = METHODS
        trained = {longest: lanes.submit(timed, longest, train, longest)}
        found = lanes.submit(timed, "r2", filters)
        trained |= {method: lanes.submit(timed, method, train, method) for method in others}
        results = {
            name: lanes.submit(timed, f"test_{name}", test, name, after=trained.get(name))
            for name in ("sft", *METHODS)
        }
        try:
            for task in wait([*trained.values(), found, *results.values()], None, FIRST_EXCEPTION).done:
                task.result()
        finally:
            lanes.shutdown(cancel_futures=True)
    return found.result(), {name: task.result() for name, task in results.items()}


def r2_of_sft(folder: Path, seed: int) -> dict:
    """pipeline.r2_of_sft with its pictures."""
    found = pipeline.r2_of_sft(folder, seed)
    r2.draw(found, folder)
    return found


def test_problems(folder: Path, method: str, seed: int) -> dict:
    """Results of a method on the test problems: of the last policy, and of the one that was best on the
    validation problems. Kept in METHOD_test.json, the greedy answers in METHOD_answers.jsonl."""
    out, answers = folder / f"{method}_test.json", folder / f"{method}_answers.jsonl"
    if not out.is_file():
        sft, rm = folder / "sft/model", folder / "rm/model"
        test = records.read_rows(folder / "world/test.jsonl")
        policy = sft if method == "sft" else folder / method / "policy"
        line = pipeline.result(policy, sft, rm, test, seed, answers=answers)
        if method != "sft":
            metrics = records.read_rows(folder / method / "metrics.jsonl")
            line["seconds"] = round(sum(row.get("seconds/update", 0.0) for row in metrics), 1)
            last = pipeline.best_update(metrics) == metrics[-1]["step"]
            best = folder / method / "policy_best"
            line["best_checkpoint"] = dict(line) if last else pipeline.result(best, sft, rm, test, seed)
        records.write_json(out, line)
    return json.loads(out.read_text())


def training_curve(folder: Path) -> dict[str, list[tuple[float, float]]]:
    """What figures.training_curves draws of a run."""
    tags = {"sampled": "objective/score", "kept": "filter/score", "pass1": "eval/greedy_pass1"}
    rows = records.read_rows(folder / "metrics.jsonl")
    return {name: [(row["step"], row[tag]) for row in rows if tag in row] for name, tag in tags.items()}


def table(methods: dict[str, dict]) -> str:
    header = [
        "method",
        "greedy pass@1 ± SE",
        "best checkpoint",
        "sampled pass@1",
        "reward",
        "KL",
        "R²",
        "seconds",
    ]
    rows = []
    for name, r in methods.items():
        greedy = f"{r['greedy_pass1']:.3f} ± {r['greedy_pass1_se']:.3f}"
        best = r.get("best_checkpoint", r)["greedy_pass1"]
        row = [figures.label(name), greedy, best, r["sampled_pass1"], r["reward"], r["kl"], r["r2"]]
        rows.append([*row, f"{r['seconds']:.0f}"])
    return figures.markdown_table(header, rows)


def before_and_after(folder: Path, method: str = "br") -> list[tuple[str, str]]:
    """Two test problems with the greedy answers of SFT and of a method: the first that got better, and the
    first that did not, one that got worse where there is one -> (prompt, what to show) of each."""
    before, after = (records.read_rows(folder / f"{name}_answers.jsonl") for name in ("sft", method))
    kinds = {
        "got better": [(old, new) for old, new in zip(before, after) if new["passed"] > old["passed"]],
        "got worse": [(old, new) for old, new in zip(before, after) if new["passed"] < old["passed"]],
        "stays wrong": [(old, new) for old, new in zip(before, after) if not old["passed"] | new["passed"]],
    }
    shown = []
    for kind in ("got better", "got worse" if kinds["got worse"] else "stays wrong"):
        for old, new in kinds[kind][:1]:
            lines = [f"A problem that {kind} ({len(kinds[kind])} of {len(before)}):", old["prompt"].rstrip()]
            for name, line in (("SFT", old), (figures.label(method), new)):
                lines += [f"  {name}, {'passes' if line['passed'] else 'fails'}:", line["response"].rstrip()]
            shown.append((old["prompt"], "\n".join(lines)))
    return shown


def closing(folder: Path, args: Args) -> str:
    """What to do now: answers, where things are, and the line that talks to a policy."""
    problems = before_and_after(folder)
    asked = (
        problems[0][0].splitlines()[0].removeprefix("# ") if problems else "keep above 3; reverse the order"
    )
    pictures = ", ".join(str(folder / name) for name in ("training.png", "reliability.png", "r2.png"))
    policies = ", ".join(str(folder / method / "policy") for method in METHODS)
    inside = Path(sys.executable).is_relative_to(Path.cwd())
    python = os.path.relpath(sys.executable) if inside else sys.executable
    talk = [python, "-m", "benchmark.minicode", "ask", "--policy", str(folder / "br/policy"), asked]
    shown = "\n\n".join(text for _, text in problems)
    return (
        f"{args.num_test} unseen problems, two of them before and after:\n\n{shown}\n\nPictures: {pictures}\n"
        f"Policies: {policies}\nTalk to one:\n  {shlex.join(talk)}"
    )


if __name__ == "__main__":
    try:
        main(pfppo.parse_args(Args))
    except KeyboardInterrupt:
        sys.exit("\nstopped; the same command goes on")
