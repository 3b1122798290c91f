"""The paper's pipeline on the embedded world, stage by stage; `benchmark.quickstart` and
`benchmark.study.reproduce` are built on it.

Every stage leaves one folder or file, written aside and renamed, and is skipped when that is there, so a
killed run goes on where it stopped. Training stages are the three scripts, started as a user would start
them; the exact command is kept beside the output, in NAME.sh. Stages:

    world        DIR/world/             benchmark.minicode: problems with hidden tests, tokenizer, sizes
    sft          DIR/sft/model/         sft_single.py
    preferences  DIR/preferences.jsonl  N samples of π_SFT per prompt, executed; the (passing, failing) pair
                                        of largest edit distance
    rm           DIR/rm/model/          rm_single.py
    r2           DIR/r2.json            benchmark.r2: R² of every filter and reliability, before any RL
    ppo          DIR/METHOD/policy/     pfppo_single.py, one folder a method
    result       DIR/METHOD_test.json   greedy and sampled pass@1, reward, KL, R² on a split
"""

import ctypes
import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from transformers import logging as transformers_logging

import pfppo_single as pfppo
from benchmark import minicode, r2, rewards
from benchmark.records import ROOT, read_rows, write_json, write_rows

MAX_NEW_TOKENS = 48
BATCH = 640  # rows in one generation batch: the model is tiny, so large batches cost nothing
FORWARD = 64  # rows in one forward pass: what is computed stays in the processor's cache
ORACLE = "benchmark.minicode:oracle"

# Settings of every stage, from trials on prototypes of this world and its validation split
# (benchmark/README.md). Flags of the three scripts.
SFT = dict(
    epochs=16,
    batch_size=32,
    lr=2e-3,
    lr_schedule="cosine",
    final_lr_fraction=0.1,
    warmup_steps=50,
    weight_decay=0.01,
    max_grad_norm=1.0,
    query_length=128,
    response_length=MAX_NEW_TOKENS,
    forward_batch_size=BATCH,
    log_every=200,
)
RM = dict(
    epochs=4,
    batch_size=32,
    lr=1e-3,
    bound="tanh",
    query_length=128,
    response_length=MAX_NEW_TOKENS,
    forward_batch_size=BATCH,
    normalize_samples=512,
    log_every=50,
)
PPO = dict(
    batch_size=64,
    num_responses=5,
    minibatch_size=64,
    micro_batch_size=32,
    noptepochs=3,
    lr=1e-4,
    critic_lr=1e-3,
    critic_warmup_updates=2,
    kl_coef=0.05,
    response_length=MAX_NEW_TOKENS,
    query_length=128,
    missing_stop_score=-3.0,
    normalize_reward=True,
    normalize_samples=400,
    forward_batch_size=FORWARD,
    generation_batch_size=BATCH,
    eval_every=5,
    checkpoint_every=10,
    print_samples_every=0,
)

# Table 2, Table 3 and the controls, as flags on top of PPO. All draw the same number of responses per update.
METHODS = {
    "ppo_s": dict(filter="none", num_responses=1, batch_size=320),
    "ppo_m": dict(filter="none"),
    **{name: flags for name, flags in r2.FILTERS.items() if name != "none"},
    "oracle": dict(filter="none", reward=ORACLE),
}

# What sampling and scoring outside the three scripts need of their settings.
SAMPLING = pfppo.Args(
    policy="",
    reward="",
    prompts="",
    response_length=MAX_NEW_TOKENS,
    forward_batch_size=FORWARD,
    generation_batch_size=BATCH,
)


def flags(settings: dict) -> list[str]:
    """{"lr": 1e-4, "whiten": True} -> ["--lr", "0.0001", "--whiten"] in the form tyro reads."""
    out = []
    for name, value in settings.items():
        if isinstance(value, bool):
            out.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, (list, tuple)):
            out += [f"--{name}", *map(str, value)]
        else:
            out += [f"--{name}", str(value)]
    return out


def command_line(script: str, settings: dict, threads: int = 1) -> str:
    """What a user would type for a stage."""
    prefix = f"OMP_NUM_THREADS={threads} " if threads > 1 else ""
    return f"{prefix}accelerate launch --cpu --num_processes 1 {script} {shlex.join(flags(settings))}"


def launch(script: str, settings: dict, log: Path, say: Callable | None = None, threads: int = 1) -> float:
    """Run one of the three scripts as `accelerate launch --cpu --num_processes 1 SCRIPT FLAGS` does, in the
    environment that it sets but without its own start of two seconds; returns seconds. Lines go to the log,
    and to `say` up to a traceback. Ends with one line, the script's own last one, when it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    log.with_suffix(".sh").write_text(command_line(script, settings, threads) + "\n")
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "ACCELERATE_MIXED_PRECISION": "no",
        "OMP_NUM_THREADS": str(threads),
        # a thread that waits holds its core for less than a millisecond: others may need it (default: 20)
        "GOMP_SPINCOUNT": "10000",
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "PYTHONWARNINGS": "ignore",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    start, traceback = time.time(), False
    if say:
        say(f"{script}; the whole command: {log.with_suffix('.sh')}")
    with log.open("ab", buffering=0) as file:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / script), *flags(settings)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=end_with_parent,
        )
        try:
            for line in process.stdout:
                file.write(line)
                traceback = traceback or line.startswith(b"Traceback ")
                if say and not traceback:
                    say(line.decode(errors="replace").rstrip())
        except KeyboardInterrupt:  # the terminal told the script too, which finishes its step and saves
            file.write(process.stdout.read())
            raise
        except BaseException:
            process.kill()
            raise
        finally:
            code = process.wait()
    if code:
        raise SystemExit(f"{script}: {last_words(log.read_text(errors='replace'))} (log: {log})")
    return time.time() - start


LIBC = ctypes.CDLL(None)


def end_with_parent() -> None:
    """Linux kills this process when the thread that began it ends: a job that was killed can begin again at
    once, and finds nobody writing to its folders."""
    if hasattr(LIBC, "prctl"):
        LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def last_words(text: str) -> str:
    """The last line of a log in front of the launcher's own traceback: the script's message."""
    own, _, launcher = text.rpartition("Traceback (most recent call last):")
    own = own if "CalledProcessError" in launcher else text
    return next((line for line in reversed(own.splitlines()) if line.strip()), "no output")


def load(folder: Path | str):
    """Policy folder -> (model in eval mode, tokenizer)."""
    transformers_logging.disable_progress_bar()
    tokenizer = pfppo.load_pretrained("AutoTokenizer", str(folder), "policy")
    return pfppo.load_causal_lm(str(folder)).eval(), tokenizer


def load_reward(reward: Path | str):
    """A reward model's folder or `module:function` -> what pfppo.score_rollout takes."""
    if ":" in str(reward):
        return pfppo.load_function(str(reward), "reward")
    transformers_logging.disable_progress_bar()
    return rewards.reward_model(str(reward), "cpu")[0]


def with_queries(tokenizer, rows: list[dict]) -> list[dict]:
    """Rows with the ids of their prompts."""
    return [{**row, "query_ids": pfppo.encode_prompt(tokenizer, row["prompt"])} for row in rows]


def sample(policy, tokenizer, rows: list[dict], n: int, temperature: float, seed: int):
    """n responses to each row, adjacent -> (rollout of pfppo_single.py, texts)."""
    rows, generator = with_queries(tokenizer, rows), pfppo.random_generator("cpu", seed, 77)
    rollout = pfppo.sample_rollout(policy, rows, n, temperature, SAMPLING, tokenizer.eos_token_id, generator)
    return rollout, pfppo.decode_responses(tokenizer, rollout)


def actual_scores(rows: list[dict], texts: list[str]) -> np.ndarray:
    """s of len(texts) / len(rows) adjacent responses a row: 1 when every hidden test passes, else 0."""
    return np.array(pfppo.call_function(minicode.oracle, rows, texts, "prompt"))


def scored_samples(
    policy_dir: Path, reward: Path | str, rows: list[dict], n: int, seed: int, file: Path | None = None
) -> r2.Samples:
    """n graded samples of a policy on each row, for benchmark.r2; kept in `file`, where one is given."""
    policy, tokenizer = load(policy_dir)
    settings = dataclasses.replace(SAMPLING, seed=seed)
    judges = (load_reward(reward), minicode.oracle)
    lines = r2.collect(policy, tokenizer, judges, with_queries(tokenizer, rows), n, settings, file)
    return r2.as_arrays(lines)


# ---------------------------------------------------------------- stages


def world(folder: Path, seed: int, **settings) -> Path:
    if not (folder / "world").is_dir():
        try:
            minicode.write_world(folder / "world", seed=seed, **settings)
        except (ValueError, FileExistsError) as error:
            raise SystemExit(f"--{error}" if str(error).startswith("num_") else str(error)) from None
    return folder / "world"


def sft(
    folder: Path, seed: int, name: str = "sft", say: Callable | None = None, threads: int = 1, **settings
) -> Path:
    out = folder / name / "model"
    if not out.is_dir():
        files = dict(
            model_config=folder / "world/model_config",
            tokenizer=folder / "world/tokenizer",
            train_data=folder / "world/sft.jsonl",
            eval_data=folder / "world/sft_valid.jsonl",
            output_dir=folder / name,
            seed=seed,
        )
        launch("sft_single.py", {**files, **SFT, **settings}, folder / f"{name}.log", say, threads)
    return out


def graded_samples(policy_dir: Path, n: int, rows: list[dict], seed: int) -> tuple[list, list]:
    """n samples of a policy on each row, and whether they pass: both (rows, n)."""
    policy, tokenizer = load(policy_dir)
    _, texts = sample(policy, tokenizer, rows, n, 1.0, seed)
    good = actual_scores(rows, texts) > 0
    starts = range(0, len(texts), n)
    return [texts[i : i + n] for i in starts], [good[i : i + n].tolist() for i in starts]


def preferences(
    folder: Path,
    seed: int,
    n: int = 5,
    limit: int | None = None,
    name: str = "preferences",
    say: Callable | None = None,
    run: Callable = map,
) -> Path:
    """Writes NAME.jsonl (prompt, chosen, rejected), NAME_valid.jsonl (every tenth pair) and NAME.json
    (counts). `run`: in place of map, where other processes share the work; the samples are the same."""
    out = folder / f"{name}.jsonl"
    if not out.is_file():
        rows = read_rows(folder / "world/preference.jsonl", limit)
        responses, passed, start = [], [], time.time()
        firsts = range(0, len(rows), 640)
        parts, seeds = [rows[i : i + 640] for i in firsts], [seed * 100003 + i for i in firsts]
        for texts, good in run(partial(graded_samples, folder / "sft/model", n), parts, seeds):
            responses, passed = responses + texts, passed + good
            if say:
                done = len(responses)
                left = (time.time() - start) / done * (len(rows) - done)
                say(f"{name} {done}/{len(rows)} prompts sampled and executed, {left:.0f} s left")
        pairs, dropped = minicode.build_pairs(rows, responses, passed)
        few = f"only {len(pairs)} of {len(rows)} prompts have a passing and a failing sample (passing: "
        few += f"{np.mean(passed):.1%} of samples); the SFT policy or the number of prompts is too small"
        pfppo.refuse((len(pairs) < 10, few))
        valid = pairs[::10]
        train = [pair for i, pair in enumerate(pairs) if i % 10]
        write_rows(folder / f"{name}_valid.jsonl", valid)
        counts = {
            "prompts": len(rows),
            "responses_per_prompt": n,
            "pass_rate": float(np.mean(passed)),
            "train_pairs": len(train),
            "valid_pairs": len(valid),
            "dropped_prompts": dropped,
        }
        write_json(folder / f"{name}.json", counts)
        write_rows(out, train)
    return out


def rm(
    folder: Path,
    seed: int,
    name: str = "rm",
    data: str = "preferences",
    say: Callable | None = None,
    threads: int = 1,
    **settings,
) -> Path:
    out = folder / name / "model"
    if not out.is_dir():
        files = dict(
            model=folder / "sft/model",
            train_data=folder / f"{data}.jsonl",
            eval_data=folder / f"{data}_valid.jsonl",
            normalize_prompts=folder / "world/preference.jsonl",
            output_dir=folder / name,
            seed=seed,
        )
        launch("rm_single.py", {**files, **RM, **settings}, folder / f"{name}.log", say, threads)
    return out


def r2_of_sft(folder: Path, seed: int, resamples: int = 200) -> dict:
    """benchmark.r2 on 10 responses of the SFT policy to each validation problem, filters over N = 5; what
    r2.json holds."""
    out = folder / "r2.json"
    if not out.is_file():
        rows, file = read_rows(folder / "world/valid.jsonl"), folder / "r2_samples.jsonl"
        samples = scored_samples(folder / "sft/model", folder / "rm/model", rows, 10, seed, file)
        write_json(out, r2.measure(samples, PPO["num_responses"], seed, resamples=resamples))
    return json.loads(out.read_text())


def ppo_settings(folder: Path, method: str, seed: int, updates: int, out: Path, **settings) -> dict:
    """Flags of pfppo_single.py for one of METHODS, from π_SFT with the world's reward model."""
    settings = {**PPO, "reward": folder / "rm/model", **METHODS[method], **settings}
    return (
        dict(
            policy=folder / "sft/model",
            critic_init=folder / "rm/model",
            prompts=folder / "world/rl.jsonl",
            eval_prompts=folder / "world/valid.jsonl",
            actual_score=ORACLE,
            output_dir=out,
            seed=seed,
            total_episodes=updates * settings["batch_size"] * settings["num_responses"],
        )
        | settings
    )


def ppo(folder: Path, method: str, seed: int, updates: int, say: Callable | None = None, **settings) -> Path:
    """Train one of METHODS; returns its output folder."""
    out = folder / method
    if not (out / "policy").is_dir():
        settings = ppo_settings(folder, method, seed, updates, out, **settings)
        launch("pfppo_single.py", settings, out.with_name(out.name + ".log"), say)
    return out


def best_update(metrics: list[dict]) -> int:
    """Update of policy_best: the first with the highest greedy pass@1 on validation problems."""
    found = [(row["eval/greedy_pass1"], -row["step"]) for row in metrics if "eval/greedy_pass1" in row]
    return -max(found)[1]


def result(
    policy_dir: Path,
    ref_dir: Path,
    rm_dir: Path,
    rows: list[dict],
    seed: int,
    n: int = 5,
    answers: Path | None = None,
) -> dict[str, float]:
    """Greedy pass@1 with its standard error; on n samples a problem: pass@1, best of n by reward, reward, KL
    to π_SFT (no filter has touched these samples), R² of the reward model on this policy. `answers`: file for
    the greedy responses, one line a problem."""
    policy, tokenizer = load(policy_dir)
    _, texts = sample(policy, tokenizer, rows, 1, 0.0, seed)
    greedy = actual_scores(rows, texts)
    if answers:
        lines = [
            {"task_id": row["task_id"], "prompt": row["prompt"], "response": text, "passed": bool(passed)}
            for row, text, passed in zip(rows, texts, greedy)
        ]
        write_rows(answers, lines)
    rollout, texts = sample(policy, tokenizer, rows, n, 1.0, seed)
    actual = actual_scores(rows, texts)
    reward = pfppo.reward_model_scores(load_reward(rm_dir), rollout, FORWARD).numpy()
    logprobs, _ = pfppo.response_logprobs_and_values(policy, rollout, 1.0, FORWARD)
    ref_logprobs = logprobs
    if policy_dir != ref_dir:
        ref_logprobs, _ = pfppo.response_logprobs_and_values(load(ref_dir)[0], rollout, 1.0, FORWARD)
    best = reward.reshape(-1, n).argmax(1)
    p = greedy.mean()
    return {
        "greedy_pass1": float(p),
        "greedy_pass1_se": float(np.sqrt(p * (1 - p) / len(rows))),
        "sampled_pass1": float(actual.mean()),
        f"best_of_{n}": float(actual.reshape(-1, n)[np.arange(len(rows)), best].mean()),
        "reward": float(reward.mean()),
        "kl": float((logprobs - ref_logprobs).sum(1).mean()),
        "r2": r2.reward_r2(reward, actual),
        "length": float(rollout["response_mask"].sum(1).float().mean()),
        "truncated": float((~rollout["has_stop"]).float().mean()),
        "problems": len(rows),
    }
