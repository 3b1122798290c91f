"""Measures seconds per PPO update: ours without a filter, with BR and with BW, beside TRL's PPOTrainer, in
one run.

    python -m benchmark.study.ppo_speed --world output/quickstart
    pip install --no-deps --target /tmp/trl 'trl==1.12.0'     # the last TRL with a PPOTrainer
    PYTHONPATH=/tmp/trl python -m benchmark.study.ppo_speed --world output/quickstart

All start from the same SFT policy and reward model (a folder of benchmark.quickstart) on one thread, and do
the same work per update: 64 prompts x 5 responses of at most 48 tokens, 3 epochs in minibatches of 64 rows, a
critic of its own. TRL samples one response to a prompt, so it is given each prompt five times; it runs
without gradient checkpointing and in float32, as we do. Each way runs in a process of its own, the ways in
turn; the median update of a run counts, and the best of the rounds, since other work on the machine can only
slow them. The first update of a run is left out.
"""

import importlib.metadata
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from benchmark import pipeline, records

WAYS = {"ours, PPO-M": "none", "ours, PF-PPO BR": "br", "ours, PF-PPO BW": "bw", "TRL, PPO": "trl"}


@dataclass
class Args:
    world: str
    """folder of benchmark.quickstart (or a world of benchmark.study.reproduce): world/rl.jsonl, sft/model,
    rm/model"""
    updates: int = 5
    """updates in a run, the first of which is not counted"""
    rounds: int = 3
    """runs of each way"""
    way: str = ""
    """used by the script itself: run this way once and print its seconds"""


def our_seconds(world: Path, name: str, updates: int) -> list[float]:
    """Seconds of every update of pfppo_single.py under a filter."""
    settings = {**pipeline.PPO, "filter": name}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        settings.update(
            policy=world / "sft/model",
            reward=world / "rm/model",
            prompts=world / "world/rl.jsonl",
            output_dir=out,
            total_episodes=updates * settings["batch_size"] * settings["num_responses"],
        )
        pipeline.launch("pfppo_single.py", settings, Path(folder) / "log.txt")
        return [row["seconds/update"] for row in records.read_rows(out / "metrics.jsonl") if row["step"] > 0]


def trl_seconds(world: Path, updates: int) -> list[float]:
    """Seconds of every update of TRL's PPOTrainer with our sizes."""
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        TrainerCallback,
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(world / "sft/model", padding_side="left")
    sizes = pipeline.PPO
    rollouts, starts = sizes["batch_size"] * sizes["num_responses"], [time.perf_counter()]
    rows = records.read_rows(world / "world/rl.jsonl")
    order = np.random.default_rng(1).permutation(len(rows))[: updates * sizes["batch_size"]]
    ids = [
        {"input_ids": tokenizer(rows[i]["prompt"])["input_ids"]}
        for i in order
        for _ in range(sizes["num_responses"])
    ]

    class Clock(TrainerCallback):
        def on_train_begin(self, *_, **__):
            starts[0] = time.perf_counter()

        def on_step_end(self, *_, **__):
            starts.append(time.perf_counter())

    def scalar_model(folder: Path):
        return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)

    with tempfile.TemporaryDirectory() as folder:
        # per_device_train_batch_size counts rollouts here; it is cut into num_mini_batches, one optimizer
        # step each
        config = PPOConfig(
            output_dir=folder,
            per_device_train_batch_size=rollouts,
            gradient_accumulation_steps=1,
            total_episodes=updates * rollouts,
            num_mini_batches=rollouts // sizes["minibatch_size"],
            num_ppo_epochs=sizes["noptepochs"],
            learning_rate=sizes["lr"],
            local_rollout_forward_batch_size=sizes["forward_batch_size"],
            response_length=sizes["response_length"],
            temperature=1.0,
            stop_token="eos",
            kl_coef=sizes["kl_coef"],
            missing_eos_penalty=1.0,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            num_sample_generations=0,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=10**9,
        )
        trainer = PPOTrainer(
            args=config,
            processing_class=tokenizer,
            model=AutoModelForCausalLM.from_pretrained(world / "sft/model"),
            ref_model=AutoModelForCausalLM.from_pretrained(world / "sft/model"),
            reward_model=scalar_model(world / "rm/model"),
            value_model=scalar_model(world / "rm/model"),
            train_dataset=Dataset.from_list(ids),
            eval_dataset=Dataset.from_list(ids[:8]),
            callbacks=[Clock()],
        )
        trainer.train()
    return np.diff(starts).tolist()


def main(args: Args) -> None:
    world = Path(args.world).resolve()
    for part in ("world/rl.jsonl", "sft/model", "rm/model"):
        if not (world / part).exists():
            raise SystemExit(f"--world {world}: no {part}; give a folder of benchmark.quickstart")
    if args.updates < 2 or args.rounds < 1:
        raise SystemExit("--updates must be at least 2 (the first is not counted) and --rounds at least 1")
    if args.way:
        seconds = (
            trl_seconds(world, args.updates)
            if args.way == "trl"
            else our_seconds(world, args.way, args.updates)
        )
        print(json.dumps(seconds))
        return
    os.environ.update(
        OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", TRL_EXPERIMENTAL_SILENCE="1"
    )
    best = dict.fromkeys(WAYS, math.inf)
    if importlib.util.find_spec("trl") is None or importlib.util.find_spec("trl.experimental.ppo") is None:
        print(
            "TRL's PPOTrainer is missing here (this file's docstring says how to add it); ours alone",
            flush=True,
        )
        best.pop("TRL, PPO")
    for round_ in range(args.rounds):
        for name in best:
            command = [
                sys.executable,
                "-m",
                "benchmark.study.ppo_speed",
                "--world",
                str(world),
                "--updates",
                str(args.updates),
                "--way",
                WAYS[name],
            ]
            done = subprocess.run(command, capture_output=True, text=True, cwd=records.ROOT)
            if done.returncode:
                raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
            seconds = json.loads(done.stdout.splitlines()[-1])[1:]
            best[name] = min(best[name], float(np.median(seconds)))
            print(
                f"round {round_ + 1}/{args.rounds}: {name}: {np.median(seconds):.2f} s per update "
                f"({', '.join(f'{s:.2f}' for s in seconds)})",
                flush=True,
            )
    versions = [
        f"{package} {importlib.metadata.version(package)}"
        for package in ("transformers", "accelerate", *(["trl"] if "TRL, PPO" in best else []))
    ]
    print(f"\n{records.hardware()}, one thread, {', '.join(versions)}, commit {records.commit()}\n")
    print(f"{'':<18}{'s / update':>11}{'to PPO-M':>10}" + (f"{'to TRL':>9}" if "TRL, PPO" in best else ""))
    for name, seconds in best.items():
        ratios = [seconds / best["ours, PPO-M"]] + (
            [seconds / best["TRL, PPO"]] if "TRL, PPO" in best else []
        )
        print(f"{name:<18}{seconds:>11.2f}{ratios[0]:>10.2f}" + "".join(f"{r:>9.2f}" for r in ratios[1:]))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
