"""The paper in miniature: methods x worlds x seeds on the embedded world, as units that survive being killed.

    python -m benchmark.study.reproduce --study table2 --output_dir DIR           # about an hour
    python -m benchmark.study.reproduce --study table2 --output_dir DIR --full    # overnight
    python -m benchmark.study.reproduce --study table2 --output_dir DIR --only br --worlds 1 --seeds 1 # one
    python -m benchmark.study.tables DIR                                          # tables and pictures again

A unit is one training run (method, world, seed) from the world's one SFT policy and one reward model, with
its results on the test problems; worlds are prepared by units of their own. A finished unit is one line of
`units.jsonl`, appended in one write; the same command goes on where it was killed. Models and samples stay in
`--work_dir` and are not part of the results. Every choice (best checkpoint, settings) is made on validation
problems; test problems are looked at once per saved policy.

Starting an interpreter costs more than some units, so units are forked from one parent that has imported
everything and started no thread. `command` in a line is what a user would type for the same run; it gives the
same numbers.

Studies: `table2` (Tables 1, 2, 3, 5, 6 and Figures 1, 2), `table4` (three rewards), `map` (when does
filtering help), `beyond` (weights chosen by R², R² as an alarm, rewards centred per prompt).
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported; a unit has one core

import dataclasses
import fcntl
import hashlib
import importlib
import json
import multiprocessing
import resource
import signal
import sys
import time
import traceback
from collections import defaultdict
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

import pfppo_single as pfppo
import rm_single  # noqa: F401  imported before the fork
import sft_single  # noqa: F401
from benchmark import pipeline, r2, records
from benchmark.study import tables

# Of what is measured on finished runs (2: r2_filters at equal rows, groups of N = 5; 3: pass@1 of the alarm's
# probe); a finished unit whose numbers are older than `needed_version` has them measured again, not its
# training.
VERSION = 3
TABLE1_METHODS = ("ppo_m", "bon", "br", "bw")  # R² on their middle and last policy
TABLE1_FILTERS = ("none", "random", "bon", "br", "bw")

# Order of work within a seed.
ORDER = (
    "sft",
    "ppo_m",
    "br",
    "bw",
    "random",
    "bon",
    "ppo_s",
    "oracle",
    "top_bottom",
    "pow_1",
    "pow_2",
    "pow_3",
    "top_random",
    "top",
    "raft",
    "bond",
    "dpo",
    "ipo",
    "kto",
    "iterative_dpo",
)
# Module of benchmark/baselines, flags over its defaults.
BASELINES = {
    "raft": ("raft", {}),
    "bond": ("bond", {}),
    "dpo": ("dpo", {}),
    "ipo": ("dpo", {"loss_type": "ipo"}),
    "kto": ("kto", {}),
    "iterative_dpo": ("iterative_dpo", {}),
}
# Learning rates that benchmark/baselines/tune.py prefers to the one all arms share; further units of table2.
TUNED = {"ppo_m": 5e-5, "bw": 5e-5, "random": 2e-4}
MAIN = ("sft", "ppo_m", "br", "bw", "random")
CONTROLS = ("bon", "ppo_s", "oracle")


def subset(method: str, full: bool) -> tuple[int, int]:
    """(seeds, worlds) of a method in study table2, at most; explicit --methods get all."""
    if method == "sft":
        return 1, 99  # nothing is trained, so seeds would only repeat it
    if full:
        return (2 if method in BASELINES else 4), 99
    return (2, 99) if method in MAIN else (1, 99) if method in CONTROLS else (1, 1)


# Seconds on one of two busy cores (2026, 2.5 GHz) where nothing has been measured yet.
SECONDS = {
    "world": 9,
    "sft_policy": 185,
    "preferences": 45,
    "rm": 80,
    "weights": 90,
    "sft": 25,
    "ppo_m": 145,
    "oracle": 145,
    "ppo_s": 145,
    "top": 120,
    "top_random": 130,
    "top_bottom": 130,
    **dict.fromkeys(BASELINES, 60),
}
OTHER_SECONDS = 95
STAGES = ("world", "sft_policy", "preferences", "rm")

ALARM_PAIRS = 1000  # a reward model that is over-optimised
ALARM_PROMPTS, ALARM_GROUPS = 40, 10  # a probe: 5 responses to each prompt, 200 executions


@dataclass
class Args:
    study: Literal["table2", "table4", "map", "beyond"] = "table2"
    """which comparison"""
    output_dir: str = ""
    """folder for units.jsonl, tables and pictures; default benchmark/results/DATE-STUDY"""
    work_dir: str = "output/study"
    """folder for worlds, models and logs; shared by studies, so that no run is trained twice"""
    worlds_from: str = ""
    """folder with seed_1, seed_2, ... of benchmark.quickstart whose worlds (SFT policy, pairs, reward model)
    are used, not made anew"""
    full: bool = False
    """all seeds of every method (overnight) instead of the default subset (about an hour)"""
    methods: tuple[str, ...] = ()
    """these methods alone, with all seeds given; `tuned`: the units of table2 with learning rates of their
    own"""
    only: str = ""
    """one method alone, with all seeds given"""
    worlds: tuple[int, ...] = (1, 2, 3)
    """seeds of the worlds: planted mistakes, SFT policy, preference data and reward model are drawn anew for
    each"""
    seeds: tuple[int, ...] = (1, 2, 3, 4)
    """seeds of the training runs in each world"""
    parallel: int = 2
    """units at a time, one core each"""
    updates: int = 20
    """updates of every PPO run; all methods generate the same number of responses per update"""
    num_sft: int = 6000
    """demonstrations in a world"""
    sft_epochs: int = 16
    """passes over the demonstrations"""
    num_preference: int = 4000
    """prompts for preference data"""
    num_valid: int = 300
    """validation problems: curves, best checkpoint, R²"""
    num_test: int = 600
    """test problems: the tables"""
    dry_run: bool = False
    """print the time budget and stop"""


@dataclass(frozen=True)
class Unit:
    """One piece of work. `variant` names what differs from the method's own flags, `changes` are those flags
    (`{world}` in a value is the world's folder), `pairs` trains the reward model on that many pairs (0: all),
    `updates` 0 is the study's; `stage` is set for a part of a world instead of a method."""

    world: int
    seed: int
    method: str = ""
    stage: str = ""
    variant: str = ""
    changes: tuple = ()
    pairs: int = 0
    updates: int = 0

    @property
    def rm(self) -> str:
        """Folder of its reward model in the world's folder."""
        return f"rm_{self.pairs}" if self.pairs else "rm"

    @property
    def key(self) -> tuple:
        return (self.stage or self.method, self.variant, self.world, self.seed)

    @property
    def kind(self) -> str:
        """Units of one kind take about the same time."""
        return (self.stage or self.method) + (f" {self.variant}" if self.variant else "")

    def __str__(self) -> str:
        return f"{self.kind}, world {self.world}" + ("" if self.stage else f", seed {self.seed}")


# ---------------------------------------------------------------- which units a study has


def world_stage(stage: str, world: int, pairs: int = 0) -> Unit:
    return Unit(world, world, stage=stage, variant=f"{pairs} pairs" if pairs else "", pairs=pairs)


def parts_needed(unit: Unit) -> list[Unit]:
    """The parts of its world that a unit needs, in order."""
    before = STAGES[: STAGES.index(unit.stage)] if unit.stage in STAGES else STAGES
    before = (
        before if not unit.pairs or unit.stage else STAGES[:-1]
    )  # the reward model from all pairs is another one's business
    parts = [world_stage(stage, unit.world) for stage in before]
    if not unit.stage and unit.pairs:
        parts.append(world_stage("rm", unit.world, unit.pairs))
    if unit.method == "w_r2":
        parts.append(world_stage("weights", unit.world))
    return parts


def planned_units(args: Args) -> list[Unit]:
    """All units of the study in the order of work: what worlds need first, then seed by seed, method by
    method, world by world."""
    chosen = (args.only,) if args.only else args.methods
    runs = {"table2": plan_table2, "table4": plan_table4, "map": plan_map, "beyond": plan_beyond}[args.study](
        args
    )
    unknown = set(chosen) - {unit.method for unit in runs} - {unit.variant for unit in runs} - set(ORDER)
    if unknown:
        raise SystemExit(
            f"--methods: {', '.join(sorted(unknown))} unknown; choose from "
            f"{' '.join(dict.fromkeys(unit.method for unit in runs))}"
        )
    runs = [unit for unit in runs if not chosen or unit.method in chosen or unit.variant in chosen]
    parts = dict.fromkeys(part for unit in runs for part in parts_needed(unit))
    return sorted(parts, key=lambda part: (STAGES + ("weights",)).index(part.stage)) + runs


def plan_table2(args: Args) -> list[Unit]:
    """One unit per method, world and seed; the default subset has fewer of what is not in the main
    comparison. The first two seeds of the main comparison come first, then the rest of these seeds, then
    further seeds: what is there early is paired."""
    chosen, found = (args.only,) if args.only else args.methods, []
    for method in ORDER:
        seeds, worlds = (99, 99) if method in chosen and method != "sft" else subset(method, args.full)
        tier = 0 if method in MAIN else 1 if method in CONTROLS else 2
        found += [
            ((max(0, i - 1), tier, i, ORDER.index(method), w), Unit(world, seed, method))
            for i, seed in enumerate(args.seeds[:seeds])
            for w, world in enumerate(args.worlds[:worlds])
        ]
        if method in TUNED and (not chosen or "tuned" in chosen):
            seeds = 99 if chosen else seeds
            found += [
                (
                    (max(0, i - 1), 1, i, ORDER.index(method), w),
                    Unit(world, seed, method, variant="tuned", changes=(("lr", TUNED[method]),)),
                )
                for i, seed in enumerate(args.seeds[:seeds])
                for w, world in enumerate(args.worlds[:worlds])
            ]
    return [unit for _, unit in sorted(found, key=lambda pair: pair[0])]


REWARDS = {
    "orm": (),
    "oracle": (("reward", "benchmark.minicode:oracle"),),
    "crm": (("reward", "benchmark.rewards:crm@{world}/rm/model"),),
}


def plan_table4(args: Args) -> list[Unit]:
    """PPO-S and BR under the learned reward, the oracle, and both combined; two seeds a world, with --full
    all."""
    seeds = args.seeds if args.full else args.seeds[:2]
    return [Unit(world, args.seeds[0], "sft") for world in args.worlds] + [
        Unit(world, seed, method, variant=name, changes=changes)
        for seed in seeds
        for name, changes in REWARDS.items()
        for method in ("ppo_s", "br")
        for world in args.worlds
    ]


def map_changes(noise: float, kl: float, n: int, rm: str) -> tuple:
    """Flags of a cell: always 320 responses per update; two rows of each prompt are kept, so the share falls
    with N."""
    batch = pipeline.PPO["batch_size"] * pipeline.PPO["num_responses"] // n
    changes = (("kl_coef", kl), ("num_responses", n), ("batch_size", batch))
    return changes + (
        (("reward", f"benchmark.study.rewards:noisy@{{world}}/{rm}/model,{noise}"),) if noise else ()
    )


def plan_map(args: Args) -> list[Unit]:
    """When does filtering help: reward-model quality x KL coefficient x N; a cross through the middle at one
    seed a world, with --full at all, and then every other combination at one. At N = 2 all two-row filters
    keep both rows and are PPO-M."""
    units = []
    for pairs, noise in tables.MAP_QUALITY:
        changes = (
            ("reward", f"benchmark.study.rewards:noisy@{{world}}/{Unit(0, 0, pairs=pairs).rm}/model,{noise}"),
        )
        variant = f"pairs={pairs or 'all'} noise={noise}"
        units += [
            Unit(world, args.seeds[0], "sft", variant=variant, changes=changes, pairs=pairs)
            for world in args.worlds
        ]
    cross = tables.planned_cells(False)
    runs = [(seed, cell) for seed in (args.seeds if args.full else args.seeds[:1]) for cell in cross]
    runs += [(args.seeds[0], cell) for cell in tables.planned_cells(True) if args.full and cell not in cross]
    for seed, (pairs, noise, kl, n) in runs:
        for method in ("ppo_m", "br", "bw", "random") if n > 2 else ("ppo_m",):
            changes = map_changes(noise, kl, n, Unit(0, 0, pairs=pairs).rm)
            kept = dict(changes)["batch_size"] * (2 if method != "ppo_m" else n)
            changes += (("minibatch_size", kept),) if kept < 64 else ()
            variant = f"pairs={pairs or 'all'} noise={noise} kl={kl} n={n}"
            units += [
                Unit(world, seed, method, variant=variant, changes=changes, pairs=pairs)
                for world in args.worlds
            ]
    return units


def plan_beyond(args: Args) -> list[Unit]:
    """Weights chosen by R², rewards centred per prompt, R² as an alarm; two seeds a world, with --full
    all."""
    centred, units = (
        (("reward", "benchmark.study.rewards:centred@{world}/rm/model"),),
        [Unit(w, args.seeds[0], "sft") for w in args.worlds],
    )
    for seed in args.seeds if args.full else args.seeds[:2]:
        for method, variant, changes in (
            ("ppo_m", "", ()),
            ("br", "", ()),
            ("bw", "", ()),
            ("random", "", ()),
            ("pow_2", "", ()),
            ("w_r2", "", ()),
            ("ppo_m", "centred", centred),
            ("bw", "centred", centred),
            ("pow_2", "centred", centred),
        ):
            units += [Unit(world, seed, method, variant=variant, changes=changes) for world in args.worlds]
        for method in ("ppo_m", "br", "bw", "random"):
            units += [
                Unit(
                    world,
                    seed,
                    method,
                    variant="alarm",
                    changes=(("save_policy_every", 5),),
                    pairs=ALARM_PAIRS,
                    updates=2 * args.updates,
                )
                for world in args.worlds
            ]
    return units


# ---------------------------------------------------------------- inside a unit's process


def module_of(script: str):
    """`pfppo_single.py` or `-m benchmark.baselines.raft` -> the module."""
    return importlib.import_module(script.removeprefix("-m ").removesuffix(".py"))


def run_here(script: str, settings: dict, log: Path, say=None, threads: int = 1) -> float:
    """In place of pipeline.launch: run the script's main in this process, as `accelerate launch --cpu
    --num_processes 1` would. `threads` is not read: units run on one."""
    log.parent.mkdir(parents=True, exist_ok=True)
    log.with_suffix(".sh").write_text(pipeline.command_line(script, settings) + "\n")
    module, argv, start = module_of(script), pipeline.flags(settings), time.time()
    module.main(pfppo.parse_args(module.Args, argv))
    return time.time() - start


def count_rows() -> dict[str, int]:
    """Count rows (responses) that go through each model during the updates of a PPO run in this process
    (Table 6). The part of a run is known from the key of the random generator it asks for: 3 rollout of an
    update, 1 and 9 measuring and evaluation."""
    rows, now = defaultdict(int), {"part": 0}
    random_generator, score = pfppo.random_generator, pfppo.reward_model_scores
    forward, logprobs = pfppo.PolicyAndCritic.forward, pfppo.response_logprobs_and_values

    def counted_generator(device, *key):
        if len(key) > 1 and key[1] in (1, 3, 9):
            now["part"] = key[1]
            rows["updates"] += key[1] == 3
        return random_generator(device, *key)

    def counted_score(model, rollout, size):
        rows["reward_forward"] += len(rollout["responses"]) * (now["part"] == 3)
        return score(model, rollout, size)

    def counted_forward(self, ids, mask, response_length):
        name = "policy_forward_backward" if torch.is_grad_enabled() else "policy_forward"
        rows[name] += len(ids) * (now["part"] == 3)
        return forward(self, ids, mask, response_length)

    def counted_logprobs(model, rollout, temperature, size):
        if not isinstance(model, pfppo.PolicyAndCritic):
            rows["reference_forward"] += len(rollout["responses"]) * (now["part"] == 3)
        return logprobs(model, rollout, temperature, size)

    pfppo.random_generator, pfppo.reward_model_scores = counted_generator, counted_score
    pfppo.PolicyAndCritic.forward, pfppo.response_logprobs_and_values = counted_forward, counted_logprobs
    return rows


def curve(metrics: list[dict]) -> dict[str, list]:
    """metrics.jsonl of a run -> one entry per evaluation: update, episodes, optimizer_step, kept_rows (so
    far), greedy_pass1, sampled_pass1, kl, sampled_reward, and means since the evaluation before of score and
    kept_score."""

    def counter(row: dict, *names: str):
        return (
            0
            if row["step"] == 0
            else next((row[tag] for name in names for tag in (f"ppo/{name}", name) if tag in row), None)
        )

    out, since, kept = defaultdict(list), [], 0.0
    for row in metrics:
        since.append(row)
        kept += row.get("filter/kept", 0)
        if "eval/greedy_pass1" not in row:
            continue
        means = {
            name: [r[tag] for r in since if tag in r]
            for name, tag in (("score", "objective/score"), ("kept_score", "filter/score"))
        }
        values = {
            "update": row["step"],
            "episodes": counter(row, "episode", "episodes"),
            "optimizer_step": counter(row, "optimizer_step"),
            "kept_rows": kept,
            "greedy_pass1": row["eval/greedy_pass1"],
            "sampled_pass1": row.get("eval/sampled_pass1"),
            "kl": row.get("eval/kl"),
            "sampled_reward": row.get("eval/sampled_reward"),
            **{k: float(np.mean(v)) if v else None for k, v in means.items()},
        }
        for name, value in values.items():
            out[name].append(round(value, 5) if isinstance(value, float) else value)
        since = []
    return dict(out)


def fingerprint(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:8]


class Workplace:
    """Where worlds and runs of a study lie; folders are named by what made them, so other settings never
    meet."""

    def __init__(self, args: Args):
        self.args, self.root = args, Path(args.work_dir).absolute()
        self.sizes = dict(
            num_sft=args.num_sft,
            num_preference=args.num_preference,
            num_valid=args.num_valid,
            num_test=args.num_test,
        )

    def world(self, world: int) -> Path:
        return (
            self.root
            / f"world_{world}-{fingerprint([self.sizes, self.args.sft_epochs, pipeline.SFT, pipeline.RM])}"
        )

    def settings(self, unit: Unit) -> tuple[str, dict]:
        """Script and flags of a method unit, output_dir left out."""
        folder, updates = self.world(unit.world), unit.updates or self.args.updates
        changes = {
            name: value.replace("{world}", str(folder)) if isinstance(value, str) else value
            for name, value in unit.changes
        }
        if unit.method in BASELINES:
            return baseline_settings(folder, unit.method, unit.seed, updates, changes)
        method = unit.method
        if method == "w_r2":
            method, weights = "ppo_m", json.loads((folder / "weights.json").read_text())["weights"]
            changes = {"rank_weights": weights, "num_kept": 2, **changes}
        rm = folder / unit.rm / "model"
        own = {
            "save_policy_every": updates // 2,
            "reward": rm,
            "critic_init": rm,
            **pipeline.METHODS[method],
            **changes,
        }
        return "pfppo_single.py", pipeline.ppo_settings(folder, method, unit.seed, updates, Path(), **own)

    def run(self, unit: Unit) -> tuple[str, dict]:
        """Script and flags, output_dir among them: a folder named by method and the fingerprint of all
        flags."""
        script, settings = self.settings(unit)
        settings.pop("output_dir", None)
        name = fingerprint({k: str(v).removeprefix(str(self.root)) for k, v in settings.items()})
        return script, {
            **settings,
            "output_dir": self.world(unit.world) / "runs" / f"{unit.method}-s{unit.seed}-{name}",
        }


def baseline_settings(folder: Path, method: str, seed: int, updates: int, changes: dict) -> tuple[str, dict]:
    """Script and flags of a baseline: the world's files where it has a field for them, as many responses as
    PPO generates, and otherwise the defaults of its script, which were chosen on validation problems."""
    name, settings = BASELINES[method]
    script = f"-m benchmark.baselines.{name}"
    files = dict(
        policy=folder / "sft/model",
        reward=folder / "rm/model",
        prompts=folder / "world/rl.jsonl",
        train_data=folder / "preferences.jsonl",
        eval_prompts=folder / "world/valid.jsonl",
        actual_score="benchmark.minicode:oracle",
        seed=seed,
        total_episodes=updates * pipeline.PPO["batch_size"] * pipeline.PPO["num_responses"],
    )
    fields = {field.name for field in dataclasses.fields(module_of(script).Args)}
    return script, {**{name: value for name, value in files.items() if name in fields}, **settings, **changes}


def borrow_worlds(place: Workplace) -> None:
    """Link the worlds of --worlds_from where this study would make its own. SystemExit when they were made
    with other sizes."""
    for world in place.args.worlds if place.args.worlds_from else ():
        source, folder = Path(place.args.worlds_from).absolute() / f"seed_{world}", place.world(world)
        record = (
            json.loads((source / "quickstart.json").read_text())
            if (source / "quickstart.json").is_file()
            else {}
        )
        wanted = {**place.sizes, "sft_epochs": place.args.sft_epochs, "seed": world}
        other = [
            f"{name} {record.get(name)} there, {value} here"
            for name, value in wanted.items()
            if record.get(name) != value
        ]
        if other:
            raise SystemExit(
                f"--worlds_from {source}: {', '.join(other)}; give those sizes here, or leave it out"
            )
        folder.mkdir(parents=True, exist_ok=True)
        for name in (
            "world",
            "sft",
            "sft.sh",
            "preferences.json",
            "preferences.jsonl",
            "preferences_valid.jsonl",
            "rm",
            "rm.sh",
            "r2.json",
        ):
            if (source / name).exists() and not (folder / name).exists():
                (folder / name).symlink_to(source / name)


def run_stage(unit: Unit, place: Workplace) -> None:
    """One part of a world; nothing to do when its folder or file is there."""
    folder, args = place.world(unit.world), place.args
    if unit.stage == "world":
        pipeline.world(folder, unit.world, **place.sizes)
    elif unit.stage == "sft_policy":
        pipeline.sft(folder, unit.world, epochs=args.sft_epochs)
    elif unit.stage == "preferences":
        pipeline.preferences(folder, unit.world)
    elif unit.stage == "rm":
        name = f"preferences_{unit.pairs}" if unit.pairs else "preferences"
        if unit.pairs:  # the first pairs, judged on the same held-out ones
            lines = (folder / "preferences.jsonl").read_text().splitlines(keepends=True)
            (folder / f"{name}.jsonl").write_text("".join(lines[: unit.pairs]))
            (folder / f"{name}_valid.jsonl").write_text((folder / "preferences_valid.jsonl").read_text())
        pipeline.rm(folder, unit.world, name=unit.rm, data=name)
    elif unit.stage == "weights":
        choose_weights(folder, unit.world)


def stage_done(unit: Unit, place: Workplace) -> bool:
    folder = place.world(unit.world)
    left = {
        "world": folder / "world",
        "sft_policy": folder / "sft/model",
        "preferences": folder / "preferences.jsonl",
        "rm": folder / unit.rm / "model",
        "weights": folder / "weights.json",
    }
    return left[unit.stage].exists()


def simplex(n: int, steps: int, largest: float) -> list[list[float]]:
    """All w over n ranks in steps of 1/steps that sum to 1 with no weight above `largest`."""

    def compositions(left: int, slots: int):
        if slots == 1:
            yield (left,)
            return
        for first in range(left + 1):
            yield from ((first, *rest) for rest in compositions(left - first, slots - 1))

    return [
        [part / steps for part in parts] for parts in compositions(steps, n) if max(parts) <= largest * steps
    ]


def weights_r2(samples: dict[str, np.ndarray], weights: list[float], draws: int, seed: int) -> float:
    """R² of μ_θ for weights over the ranks that keep two rows a prompt: mean over draws."""
    keep = r2.make_filter(len(weights), filter="none", rank_weights=tuple(weights), num_kept=2)
    return r2.filter_r2(samples, keep, seed, draws)


def choose_weights(folder: Path, seed: int, prompts: int = 1200) -> None:
    """weights.json: the w of highest R² on SFT samples of half of the prompts (RL prompts, all N = 5 ranks,
    no weight above 1/2, so that the two kept rows are different ones), and its R² on the other half beside
    those of the named filters."""
    rows = records.read_rows(folder / "world/rl.jsonl", prompts)
    halves = []
    for i, part in enumerate((rows[::2], rows[1::2])):
        halves.append(
            pipeline.scored_samples(folder / "sft/model", folder / "rm/model", part, 5, seed + 1000 * i)
        )
    candidates = simplex(5, 10, 0.5)
    coarse = [weights_r2(halves[0], w, 2, seed) for w in candidates]
    finalists = [candidates[i] for i in np.argsort(coarse)[-30:]]
    fine = [weights_r2(halves[0], w, 30, seed) for w in finalists]
    weights = finalists[int(np.argmax(fine))]
    named = {name: pfppo.rank_weight_vector(name, 5) for name in ("random", "br", "bw")} | {"chosen": weights}
    table = {
        name: {"search": weights_r2(halves[0], w, 30, seed), "held_out": weights_r2(halves[1], w, 30, seed)}
        for name, w in named.items()
    }
    records.write_json(
        folder / "weights.json",
        {"weights": weights, "r2": table, "candidates": len(candidates), "prompts": len(rows)},
    )


def measure(policy: Path, unit: Unit, place: Workplace) -> dict[str, float]:
    """Results of a policy folder on the test problems; `reward` is the learned one's (without noise or
    centring)."""
    folder = place.world(unit.world)
    test = records.read_rows(folder / "world/test.jsonl")
    return pipeline.result(policy, folder / "sft/model", folder / unit.rm / "model", test, unit.seed)


def pair_accuracy(reward: str, pairs: list[dict]) -> float:
    """Share of held-out pairs that a `module:function` reward orders rightly; a tie counts one half."""
    score, prompts = pfppo.load_function(reward, "reward"), [pair["prompt"] for pair in pairs]
    better = np.array(score(prompts, [p["chosen"] for p in pairs], pairs)) - np.array(
        score(prompts, [p["rejected"] for p in pairs], pairs)
    )
    return float(np.mean((better > 0) + 0.5 * (better == 0)))


def has_r2(unit: Unit, study: str) -> bool:
    """Whether a table of the study reads r2_filters of the unit."""
    return (unit.method == "sft" and study in ("table2", "map")) or (
        unit.method in TABLE1_METHODS and not unit.variant and study == "table2"
    )


def needed_version(unit: Unit, study: str) -> int:
    """The oldest VERSION whose numbers the tables of the study can read for this unit."""
    return 3 if unit.variant == "alarm" else 2 if has_r2(unit, study) else 1


def sampled_r2(policy: Path, reward: Path | str, rows: list[dict], seed: int) -> dict[str, dict]:
    """R² of the filters of Table 1, N = 5, on 10 responses to each row."""
    samples = pipeline.scored_samples(policy, reward, rows, 10, seed)
    return r2.r2_of_filters(samples, r2.named_filters(5, TABLE1_FILTERS), seed, 5)


def measure_r2(unit: Unit, place: Workplace) -> dict[str, dict]:
    """r2_filters: policy -> filter -> R² on 10 responses to each validation problem. A method's policies are
    its first kept one ("middle") and its last, an SFT unit has "sft"."""
    folder, changes = place.world(unit.world), dict(unit.changes)
    valid = records.read_rows(folder / "world/valid.jsonl")
    if unit.method == "sft" and "reward" in changes:
        reward = changes["reward"].replace("{world}", str(folder))
        return {"sft": sampled_r2(folder / "sft/model", reward, valid, unit.world)}
    if unit.method == "sft":
        return {"sft": pipeline.r2_of_sft(folder, unit.world)["filters"]}
    out, table = Path(place.run(unit)[1]["output_dir"]), {}
    middle = sorted(out.glob("policy_[0-9]*"), key=lambda path: int(path.name.rpartition("_")[2]))
    for name, policy in (("middle", middle[0] if middle else None), ("final", out / "policy")):
        if policy is not None:
            table[name] = sampled_r2(policy, folder / unit.rm / "model", valid, unit.seed)
    return table


def run_sft(unit: Unit, place: Workplace) -> dict:
    """The SFT row, with what is known about its world: pairs, reward model, reliability, R² of every filter
    before any RL."""
    folder, changes = place.world(unit.world), dict(unit.changes)
    line = {**measure(folder / "sft/model", unit, place), "r2_filters": measure_r2(unit, place)}
    if "reward" in changes:
        reward = changes["reward"].replace("{world}", str(folder))
        line["rm_accuracy"] = pair_accuracy(reward, records.read_rows(folder / "preferences_valid.jsonl"))
    else:
        metrics = records.read_rows(folder / "rm/metrics.jsonl")
        line["rm_accuracy"] = [row["test/accuracy"] for row in metrics if "test/accuracy" in row][-1]
        line["reliability"] = pipeline.r2_of_sft(folder, unit.world)["reliability"]
    line["preferences"] = json.loads((folder / "preferences.json").read_text())
    return {**line, "command": (folder / "sft.sh").read_text().strip()}


def alarm_update(updates: list[int], r2: list[float], fraction: float = 0.5, window: int = 2) -> int | None:
    """The first update where the mean of the last `window` probes is below `fraction` of the mean of the
    first `window`; None: never. A probe without R² (constant reward or score) counts as 0: the reward says
    nothing there."""
    values = [0.0 if np.isnan(value) else value for value in r2]
    level = fraction * float(np.mean(values[:window]))
    for i in range(window, len(values)):
        if np.mean(values[i - window + 1 : i + 1]) < level:
            return updates[i]
    return None


def patience_updates(updates: list[int], pass1: list[float], patience: int = 2) -> tuple[int, int]:
    """Plain early stopping: (the update where `patience` probes in a row were not above the best before them,
    else the last one; the update of the best probe so far, whose policy is kept)."""
    best = 0
    for i in range(len(pass1)):
        best = i if pass1[i] > pass1[best] else best
        if i - best == patience:
            return updates[i], updates[best]
    return updates[-1], updates[best]


def probe_alarm(unit: Unit, place: Workplace, out: Path) -> dict:
    """R² of the reward and pass@1 on the current policy from a small graded probe at every kept policy of a
    finished run, and results of the policy at which the alarm would have stopped it; in `early`, of the
    policy that early stopping by pass@1 of the same probe keeps. Training is deterministic, so stopping later
    changes nothing before."""
    folder = place.world(unit.world)
    rows = records.read_rows(folder / "world/rl.jsonl")[-ALARM_PROMPTS:]
    policies = {0: folder / "sft/model"} | {
        int(path.name.rpartition("_")[2]): path for path in out.glob("policy_[0-9]*")
    }
    updates, probe_r2, pass1 = sorted(policies), [], []
    for update in updates:
        samples = pipeline.scored_samples(
            policies[update], folder / unit.rm / "model", rows, 5, 1000 * unit.seed + update
        )
        probe_r2.append(r2.reward_r2(samples["reward"], samples["actual"], ALARM_GROUPS))
        pass1.append(float(samples["actual"].mean()))
    stop, (ended, kept) = alarm_update(updates, probe_r2), patience_updates(updates, pass1)
    results = {
        update: measure(policies[update], unit, place) for update in {stop, kept} if update is not None
    }
    return {
        "updates": updates,
        "probe_r2": [None if np.isnan(v) else round(v, 4) for v in probe_r2],
        "probe_pass1": pass1,
        "update": stop,
        "executions_per_probe": 5 * len(rows),
        **results.get(stop, {}),
        "early": {"stopped": ended, "update": kept, **results[kept]},
    }


def run_method(unit: Unit, place: Workplace) -> dict:
    """Train (or go on training), then results of the last and of the best policy."""
    script, settings = place.run(unit)
    out, start = Path(settings["output_dir"]), time.time()
    rows = count_rows() if script == "pfppo_single.py" else {}
    if not (out / "policy").is_dir():
        pipeline.launch(script, settings, out.with_name(out.name + ".log"))
    metrics = records.read_rows(out / "metrics.jsonl")
    phases = {
        tag: sum(row.get(tag, 0.0) for row in metrics)
        for row in metrics
        for tag in row
        if tag.startswith("seconds/")
    }
    updates = max(1, sum(row["step"] > 0 for row in metrics))
    last = measure(out / "policy", unit, place)
    best = {
        **(
            last
            if pipeline.best_update(metrics) == metrics[-1]["step"]
            else measure(out / "policy_best", unit, place)
        ),
        "update": pipeline.best_update(metrics),
    }
    line = {**last, "best": best, "curve": curve(metrics), "updates": metrics[-1]["step"]}
    line.update(
        {
            name: line["curve"][key][-1]
            for name, key in (("episodes", "episodes"), ("optimizer_steps", "optimizer_step"))
        }
    )
    line["seconds_per_update"] = {
        tag.removeprefix("seconds/"): round(value / updates, 4) for tag, value in phases.items()
    }
    if rows.get("updates"):
        line["rows_per_update"] = {
            name: count / rows["updates"] for name, count in rows.items() if name != "updates"
        }
    if has_r2(unit, place.args.study):
        line["r2_filters"] = measure_r2(unit, place)
    if unit.method == "w_r2":
        line["weights"] = json.loads((place.world(unit.world) / "weights.json").read_text())
    if unit.variant == "alarm":
        line["alarm"] = probe_alarm(unit, place, out)
    line["train_seconds"] = round(phases.get("seconds/update", 0.0), 1)
    line["seconds"] = round(
        max(time.time() - start, phases.get("seconds/update", 0.0) + phases.get("seconds/evaluate", 0.0)), 1
    )
    line["command"] = pipeline.command_line(script, settings)
    return line


def run_unit(unit: Unit, place: Workplace, result: Path, old: dict | None = None) -> None:
    """Do the unit and leave its numbers in `result`; of a finished one, given as its `old` line, only R² and
    the alarm's probe are measured again."""
    start = time.time()
    if unit.stage:
        run_stage(unit, place)
        line = {}
    elif old and (unit.method == "sft" or (Path(place.run(unit)[1]["output_dir"]) / "policy").is_dir()):
        line = {**old, "r2_filters": measure_r2(unit, place)} if has_r2(unit, place.args.study) else dict(old)
        if unit.variant == "alarm":
            line["alarm"] = probe_alarm(unit, place, Path(place.run(unit)[1]["output_dir"]))
    else:
        line = run_sft(unit, place) if unit.method == "sft" else run_method(unit, place)
    line.setdefault("seconds", round(time.time() - start, 1))
    used = [
        resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    ]  # children: graders
    line.setdefault("cpu_seconds", round(sum(u.ru_utime + u.ru_stime for u in used), 1))
    result.parent.mkdir(parents=True, exist_ok=True)
    records.write_json(result, line)


def die_with_parent() -> None:
    """On Linux a killed parent takes its units along, so that a restart finds nobody at work."""
    try:
        import ctypes

        ctypes.CDLL("libc.so.6", use_errno=True).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    except OSError:
        pass  # elsewhere the lock that children inherit refuses the restart until they end


def child(unit: Unit, place: Workplace, result: Path, log: Path, old: dict | None) -> None:
    """Body of a forked process: output to the log, environment as `accelerate launch --cpu --num_processes 1`
    makes it."""
    die_with_parent()
    log.parent.mkdir(parents=True, exist_ok=True)
    file = log.open("ab", buffering=0)
    os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    os.environ.update(
        ACCELERATE_USE_CPU="true",
        ACCELERATE_MIXED_PRECISION="no",
        ACCELERATE_DYNAMO_BACKEND="no",
        TOKENIZERS_PARALLELISM="false",
        HF_HUB_OFFLINE="1",
        HF_HUB_DISABLE_PROGRESS_BARS="1",
        OMP_NUM_THREADS="1",
    )
    torch.set_num_threads(1)
    pipeline.launch = run_here
    try:
        run_unit(unit, place, result, old)
    except BaseException:
        traceback.print_exc()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(1)


# ---------------------------------------------------------------- the parent


def key_of(line: dict) -> tuple:
    return (line["method"], line.get("variant", ""), line["world"], line["seed"])


def measured_seconds(lines: list[dict]) -> dict[str, float]:
    """Mean seconds of finished units by kind."""
    found = defaultdict(list)
    for line in lines:
        found[line["method"] + (f" {line['variant']}" if line.get("variant") else "")].append(line["seconds"])
    return {kind: float(np.mean(values)) for kind, values in found.items()}


def expected_seconds(unit: Unit, measured: dict[str, float]) -> float:
    name = unit.stage or unit.method
    return measured.get(unit.kind, measured.get(name, SECONDS.get(name, OTHER_SECONDS)))


def clock(seconds: float) -> str:
    return (
        f"{seconds / 3600:.1f} h"
        if seconds >= 5400
        else f"{seconds / 60:.0f} min"
        if seconds >= 100
        else f"{seconds:.0f} s"
    )


def print_budget(units: list[Unit], measured: dict[str, float], parallel: int, done: int) -> float:
    """Table of what is left and how long it will take; returns seconds."""
    kinds = defaultdict(list)
    for unit in units:
        kinds[unit.kind].append(expected_seconds(unit, measured))
    print(f"{'unit':<28} {'left':>5} {'each':>8} {'in all':>8}")
    for kind, values in kinds.items():
        known = "measured" if kind in measured else "assumed"
        print(f"{kind:<28} {len(values):>5} {clock(np.mean(values)):>8} {clock(sum(values)):>8}  {known}")
    left = sum(map(sum, kinds.values())) / parallel
    print(f"{len(units)} units to do, {done} done; about {clock(left)} with {parallel} at a time", flush=True)
    return left


def lock(output_dir: Path):
    """Held by this process and by its units (a fork shares it). SystemExit when somebody is at work here."""
    file = (output_dir / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise SystemExit(
            f"--output_dir {output_dir}: another run, or a unit it left behind, is at work there; wait for "
            "it or end it"
        ) from None
    return file


def check_study(args: Args, output_dir: Path) -> None:
    """A results folder holds one study with one set of sizes; methods, worlds and seeds may be added
    later."""
    fixed = ("study", "updates", "num_sft", "sft_epochs", "num_preference", "num_valid", "num_test")
    now = {name: getattr(args, name) for name in fixed} | {
        "settings": fingerprint([pipeline.SFT, pipeline.RM, pipeline.PPO])
    }
    path = output_dir / "study.json"
    if path.is_file():
        old = json.loads(path.read_text())
        changed = [
            f"{name} ({old.get(name)} there, {now[name]} here)" for name in now if old.get(name) != now[name]
        ]
        if changed:
            raise SystemExit(
                f"--output_dir {output_dir} holds a study with another {', '.join(changed)}; name a new "
                "folder"
            )
    elif any(path for path in output_dir.iterdir() if path.name != ".lock"):
        raise SystemExit(f"--output_dir {output_dir} is not empty and holds no study; name a new folder")
    records.write_json(
        path,
        {
            **now,
            "flags": {
                "sft": pipeline.SFT,
                "rm": pipeline.RM,
                "ppo": pipeline.PPO,
                "methods": pipeline.METHODS,
            },
            "hardware": f"{records.hardware()}, 1 thread per run",
        },
    )


def keep_last_lines(path: Path) -> None:
    """One line a unit: of a unit measured again the old line goes, in one rename."""
    lines = {key_of(line): line for line in records.finished_rows(path)}
    records.write_rows(path, list(lines.values()))


def run_all(
    units: list[Unit], args: Args, output_dir: Path, measured: dict[str, float], old: dict[tuple, dict]
) -> list[Unit]:
    """Work through the units, `parallel` at a time; returns those that failed or could not start. `old`:
    finished lines by key."""
    place, commit, context = Workplace(args), records.commit(), multiprocessing.get_context("fork")
    pending, running, failed, start, finished = list(units), {}, [], time.time(), 0

    def blockers(unit: Unit) -> list[Unit]:
        """The earlier parts of its world that are not there yet."""
        return [part for part in parts_needed(unit) if not stage_done(part, place)]

    while pending or running:
        for unit in list(pending):
            if len(running) >= args.parallel:
                break
            blocked = blockers(unit)
            if any(part in failed for part in blocked):
                pending.remove(unit)
                failed.append(unit)
            elif not blocked:
                pending.remove(unit)
                name = f"{unit.stage or unit.method}-{unit.variant.replace(' ', '_') or 'plain'}-s{unit.seed}"
                folder = place.world(unit.world) / "units"
                result, log = folder / f"{name}.json", folder / f"{name}.log"
                result.unlink(missing_ok=True)
                process = context.Process(target=child, args=(unit, place, result, log, old.get(unit.key)))
                process.start()
                running[process.sentinel] = (unit, process, result, log, time.time())
        if not running:
            break
        for sentinel in wait(list(running), timeout=60):
            unit, process, result, log, began = running.pop(sentinel)
            process.join()
            finished += 1
            if process.exitcode or not result.is_file():
                failed.append(unit)
                end = "\n".join(log.read_text(errors="replace").splitlines()[-4:])
                print(f"FAILED {unit} (exit status {process.exitcode}); log {log}:\n{end}", flush=True)
                continue
            numbers = json.loads(result.read_text())
            line = {
                "method": unit.stage or unit.method,
                "variant": unit.variant,
                "world": unit.world,
                "seed": unit.seed,
                "commit": commit,
                **numbers,
                "version": VERSION,
            }  # of a unit measured again, `commit` stays the training's
            if unit.stage:
                records.append_row(
                    output_dir / "stages.jsonl",
                    {
                        k: line[k]
                        for k in ("method", "variant", "world", "seed", "seconds", "cpu_seconds", "commit")
                    },
                )
            else:
                records.append_row(output_dir / "units.jsonl", line)
            measured.update(
                measured_seconds(
                    records.finished_rows(output_dir / "stages.jsonl")
                    + records.finished_rows(output_dir / "units.jsonl")
                )
            )
            left = sum(expected_seconds(u, measured) for u in pending)
            left += sum(
                max(5.0, expected_seconds(u, measured) - (time.time() - t))
                for u, _, _, _, t in running.values()
            )
            shown = ""
            if not unit.stage:
                shown = f"  greedy {line['greedy_pass1']:.3f}  sampled {line['sampled_pass1']:.3f}"
                shown += f"  KL {line['kl']:.2f}"
            print(
                f"[{finished}/{len(units)}] {unit}: {numbers['seconds']:.0f} s{shown}  | "
                f"{clock(time.time() - start)} gone, about "
                f"{clock(left / args.parallel)} left",
                flush=True,
            )
    return failed + pending


def main(args: Args) -> int:
    """Returns the exit status: 1 when a unit failed."""
    output_dir = Path(args.output_dir or f"benchmark/results/{time.strftime('%Y-%m-%d')}-{args.study}")
    units = planned_units(args)
    place = Workplace(args)
    output_dir.mkdir(parents=True, exist_ok=True)
    held = lock(output_dir)
    check_study(args, output_dir)
    borrow_worlds(place)
    lines = records.finished_rows(output_dir / "units.jsonl")
    done = {key_of(line): line for line in lines}
    runs = [
        u
        for u in units
        if not u.stage
        and (u.key not in done or done[u.key].get("version", 1) < needed_version(u, args.study))
    ]
    needed = {part for unit in runs for part in parts_needed(unit)}
    todo = [unit for unit in units if unit in needed and not stage_done(unit, place)] + runs
    measured = measured_seconds(records.finished_rows(output_dir / "stages.jsonl") + lines)
    print_budget(todo, measured, args.parallel, len(units) - len(todo))
    if args.dry_run:
        return 0
    for method in {unit.method for unit in todo if unit.method in BASELINES}:  # imported before the fork
        baseline_settings(place.root, method, 0, args.updates, {})
    torch.set_num_threads(1)
    failed = run_all(todo, args, output_dir, measured, done)
    if (output_dir / "units.jsonl").is_file():
        keep_last_lines(output_dir / "units.jsonl")
    tables.write(output_dir)
    if failed:
        print(
            f"{len(failed)} units are missing: {'; '.join(map(str, failed))}. The same command tries them "
            "again."
        )
    held.close()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
