"""The paper's pipeline on the embedded world, stage by stage; `benchmark.quickstart` and
`benchmark.study.reproduce` are built on it.

Every stage leaves one folder or file, written aside and renamed, and is skipped when that is there, so a
killed run goes on where it stopped. Training stages are the three scripts, started as a user would start
them; the exact command is printed and kept beside its output. Stages:

    world        DIR/world/             benchmark.minicode: problems with hidden tests, tokenizer, sizes
    sft          DIR/sft/model/         sft_single.py
    preferences  DIR/preferences.jsonl  N samples of π_SFT per prompt, executed; the (passing, failing) pair
                                        of largest edit distance
    rm           DIR/rm/model/          rm_single.py
    r2           DIR/r2_filters.json    R² of every filter on π_SFT samples, before any RL
    ppo          DIR/METHOD/policy/     pfppo_single.py, one folder a method
    result       DIR/METHOD/test.json   greedy and sampled pass@1, reward, KL, R² on a split
"""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

import pfppo_single as pfppo
from benchmark import minicode
from benchmark.records import ROOT, read_rows, write_json, write_rows

MAX_NEW_TOKENS = 48
BATCH = 640  # rows in one generation batch: the model is tiny, so large batches cost nothing
FORWARD = 64  # rows in one forward pass: what is computed stays in the processor's cache

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
    missing_stop="replace",
    penalty_value=-3.0,
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
    "bon": dict(filter="bon"),
    "br": dict(filter="br"),
    "bw": dict(filter="bw"),
    "random": dict(filter="random"),
    "top": dict(filter="top"),
    "top_random": dict(filter="top_random"),
    "top_bottom": dict(filter="top_bottom"),
    "pow_1": dict(filter="pow", pow_k=1.0),
    "pow_2": dict(filter="pow", pow_k=2.0),
    "pow_3": dict(filter="pow", pow_k=3.0),
    "oracle": dict(filter="none", reward="benchmark.minicode:oracle"),
}
R2_FILTERS = (
    "none",
    "random",
    "bon",
    "br",
    "bw",
    "top",
    "top_random",
    "top_bottom",
    "pow_1",
    "pow_2",
    "pow_3",
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


def command_line(script: str, settings: dict) -> str:
    """What a user would type for a stage."""
    return f"accelerate launch --cpu --num_processes 1 {script} {shlex.join(flags(settings))}"


def launch(script: str, settings: dict, log: Path, threads: int = 1, quiet: bool = False) -> float:
    """Run one of the three scripts as `accelerate launch --cpu --num_processes 1 SCRIPT FLAGS`; returns
    seconds. Output goes to the terminal too unless quiet. Raises RuntimeError with the end of the log when it
    fails."""
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "1",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        str(ROOT / script),
        *flags(settings),
    ]
    log.parent.mkdir(parents=True, exist_ok=True)
    shown = command_line(script, settings)
    log.with_suffix(".sh").write_text(shown + "\n")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    start = time.time()
    if not quiet:
        print(f"$ {shown}", flush=True)
    with log.open("ab", buffering=0) as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        try:
            for chunk in iter(lambda: process.stdout.read1(4096), b""):
                file.write(chunk)
                if not quiet:
                    sys.stdout.buffer.write(chunk)
                    sys.stdout.flush()
        except BaseException:
            process.kill()
            raise
        finally:
            code = process.wait()
    if code:
        raise RuntimeError(
            f"{script} failed with exit status {code}; see {log}:\n"
            + "\n".join(log.read_text().splitlines()[-15:])
        )
    return time.time() - start


def load(folder: Path):
    """Policy folder -> (model in eval mode, tokenizer)."""
    return pfppo.load_causal_lm(str(folder)).eval(), pfppo.load_tokenizer(str(folder), "")


def sample(
    policy, tokenizer, rows: list[dict], n: int, temperature: float, seed: int
) -> dict[str, torch.Tensor]:
    """n responses to each row -> rollout tensors as pfppo_single.py makes them, the n responses of a row
    adjacent."""
    ids = [pfppo.encode_prompt(tokenizer, row["prompt"]) for row in rows]
    queries, query_mask = pfppo.pad_rows(ids, tokenizer.pad_token_id, "left")
    generator, responses = pfppo.random_generator("cpu", seed, 77), []
    for part in torch.arange(len(rows)).split(max(1, BATCH // n)):
        responses.append(
            pfppo.generate(
                policy,
                queries[part],
                query_mask[part],
                n,
                MAX_NEW_TOKENS,
                temperature,
                tokenizer.eos_token_id,
                0,
                tokenizer.pad_token_id,
                generator,
            )
        )
    responses = torch.cat(responses)
    mask, has_stop = pfppo.stop_masks(responses, tokenizer.eos_token_id, 0)
    return {
        "queries": queries.repeat_interleave(n, 0),
        "query_mask": query_mask.repeat_interleave(n, 0),
        "responses": responses,
        "response_mask": mask,
        "score_mask": mask,
        "has_stop": has_stop,
        "prompt_ids": torch.arange(len(rows)).repeat_interleave(n),
    }


def decode(tokenizer, rollout: dict[str, torch.Tensor]) -> list[str]:
    ids = [r[m].tolist() for r, m in zip(rollout["responses"], rollout["score_mask"])]
    return tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def actual_scores(rows: list[dict], texts: list[str]) -> np.ndarray:
    """s of len(texts) / len(rows) adjacent responses a row: 1 when every hidden test passes, else 0."""
    repeated = [row for row in rows for _ in range(len(texts) // len(rows))]
    return np.array(
        minicode.grade_fast([row["prompt"] for row in repeated], texts, repeated), dtype=np.float64
    )


def scored_samples(
    policy_dir: Path, rm_dir: Path, rows: list[dict], n: int, seed: int
) -> dict[str, np.ndarray]:
    """Samples of a policy with their reward and actual score: arrays `prompt_ids`, `reward`, `actual` (rows *
    n,)."""
    policy, tokenizer = load(policy_dir)
    rollout = sample(policy, tokenizer, rows, n, 1.0, seed)
    reward = pfppo.reward_model_scores(pfppo.RewardModel.from_pretrained(rm_dir).eval(), rollout, FORWARD)
    return {
        "prompt_ids": rollout["prompt_ids"].numpy(),
        "reward": reward.numpy(),
        "actual": actual_scores(rows, decode(tokenizer, rollout)),
    }


# ---------------------------------------------------------------- stages


def world(folder: Path, seed: int, **settings) -> Path:
    if not (folder / "world").is_dir():
        minicode.write_world(folder / "world", seed=seed, **settings)
    return folder / "world"


def sft(folder: Path, seed: int, threads: int = 1, quiet: bool = False, **settings) -> Path:
    out = folder / "sft" / "model"
    if not out.is_dir():
        launch(
            "sft_single.py",
            dict(
                model_config=folder / "world/model_config",
                tokenizer=folder / "world/tokenizer",
                train_data=folder / "world/sft.jsonl",
                eval_data=folder / "world/sft_valid.jsonl",
                output_dir=folder / "sft",
                seed=seed,
                **{**SFT, **settings},
            ),
            folder / "sft.log",
            threads,
            quiet,
        )
    return out


def preferences(
    folder: Path,
    seed: int,
    n: int = 5,
    limit: int | None = None,
    name: str = "preferences",
    quiet: bool = False,
) -> Path:
    """Writes NAME.jsonl (prompt, chosen, rejected), NAME_valid.jsonl (every tenth pair) and NAME.json
    (counts)."""
    out = folder / f"{name}.jsonl"
    if not out.is_file():
        rows = read_rows(folder / "world/preference.jsonl", limit)
        policy, tokenizer = load(folder / "sft/model")
        responses, passed, start = [], [], time.time()
        for first in range(0, len(rows), 640):
            part = rows[first : first + 640]
            texts = decode(tokenizer, sample(policy, tokenizer, part, n, 1.0, seed * 100003 + first))
            good = actual_scores(part, texts) > 0
            responses += [texts[i : i + n] for i in range(0, len(texts), n)]
            passed += [good[i : i + n].tolist() for i in range(0, len(texts), n)]
            if not quiet:
                done = first + len(part)
                left = (time.time() - start) / done * (len(rows) - done)
                print(
                    f"preference data: {done}/{len(rows)} prompts sampled and executed, {left:.0f} s left",
                    flush=True,
                )
        pairs, dropped = minicode.build_pairs(rows, responses, passed)
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
        if not quiet:
            print(f"preference data: {counts}", flush=True)
    return out


def rm(
    folder: Path,
    seed: int,
    threads: int = 1,
    name: str = "rm",
    data: str = "preferences",
    quiet: bool = False,
    **settings,
) -> Path:
    out = folder / name / "model"
    if not out.is_dir():
        launch(
            "rm_single.py",
            dict(
                model=folder / "sft/model",
                train_data=folder / f"{data}.jsonl",
                eval_data=folder / f"{data}_valid.jsonl",
                normalize_prompts=folder / "world/preference.jsonl",
                reliability_prompts=folder / "world/valid.jsonl",
                actual_score="benchmark.minicode:oracle",
                output_dir=folder / name,
                seed=seed,
                **{**RM, **settings},
            ),
            folder / f"{name}.log",
            threads,
            quiet,
        )
    return out


def ppo_settings(folder: Path, method: str, seed: int, updates: int, out: Path, **settings) -> dict:
    """Flags of pfppo_single.py for one of METHODS, from π_SFT with the world's reward model."""
    settings = {**PPO, "reward": folder / "rm/model", **METHODS[method], **settings}
    return (
        dict(
            policy=folder / "sft/model",
            critic_init=folder / "rm/model",
            prompts=folder / "world/rl.jsonl",
            eval_prompts=folder / "world/valid.jsonl",
            actual_score="benchmark.minicode:oracle",
            output_dir=out,
            seed=seed,
            total_episodes=updates * settings["batch_size"] * settings["num_responses"],
        )
        | settings
    )


def ppo(
    folder: Path,
    method: str,
    seed: int,
    updates: int,
    threads: int = 1,
    quiet: bool = False,
    out: Path | None = None,
    **settings,
) -> Path:
    """Train one of METHODS; returns its output folder."""
    out = out or folder / method
    if not (out / "policy").is_dir():
        launch(
            "pfppo_single.py",
            ppo_settings(folder, method, seed, updates, out, **settings),
            out.with_name(out.name + ".log"),
            threads,
            quiet,
        )
    return out


def result(
    policy_dir: Path, ref_dir: Path, rm_dir: Path, rows: list[dict], seed: int, n: int = 5
) -> dict[str, float]:
    """Greedy pass@1 with its standard error; on n samples a problem: pass@1, best of n by reward, reward, KL
    to π_SFT (no filter has touched these samples), R² of the reward model on this policy."""
    policy, tokenizer = load(policy_dir)
    greedy = actual_scores(rows, decode(tokenizer, sample(policy, tokenizer, rows, 1, 0.0, seed)))
    rollout = sample(policy, tokenizer, rows, n, 1.0, seed)
    actual = actual_scores(rows, decode(tokenizer, rollout))
    reward = pfppo.reward_model_scores(
        pfppo.RewardModel.from_pretrained(rm_dir).eval(), rollout, FORWARD
    ).numpy()
    logprobs, _ = pfppo.response_logprobs_and_values(policy, rollout, 1.0, FORWARD)
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
        "r2": pfppo.reward_r2(reward, actual),
        "length": float(rollout["response_mask"].sum(1).float().mean()),
        "truncated": float((~rollout["has_stop"]).float().mean()),
        "problems": len(rows),
    }


# ---------------------------------------------------------------- R² (Table 1 and the R² column of Table 3)


def select(samples: dict[str, np.ndarray], name: str, generator: torch.Generator) -> np.ndarray:
    """Row indices of one draw of μ_θ from samples, by pfppo_single.py's own filter with the settings of
    METHODS."""
    n = int(np.bincount(samples["prompt_ids"]).max())
    settings = {**PPO, **METHODS.get(name, {"filter": name}), "num_responses": n}
    args = pfppo.Args(**{k: v for k, v in settings.items() if k in pfppo.Args.__dataclass_fields__})
    return pfppo.filter_responses(
        torch.from_numpy(samples["reward"]).float(),
        torch.from_numpy(samples["prompt_ids"]),
        args.filter,
        pfppo.rank_weight_vector(args.filter, n),
        pfppo.num_kept(args, args.filter),
        args.draw,
        generator,
        args.threshold_high,
        args.threshold_low,
        args.pow_k,
    ).numpy()


def regroup(samples: dict[str, np.ndarray], n: int) -> dict[str, np.ndarray]:
    """Samples with k * n adjacent responses a prompt -> k groups of n each: what a filter chooses from when
    it trains with N = n."""
    have = int(np.bincount(samples["prompt_ids"]).max())
    if have % n:
        raise ValueError(
            f"{have} responses a prompt cannot be cut into groups of {n}; sample a multiple of {n}"
        )
    return {**samples, "prompt_ids": np.arange(len(samples["prompt_ids"])) // n}


def filter_r2(
    samples: dict[str, np.ndarray],
    name: str,
    seed: int = 0,
    draws: int = 10,
    num_groups: int = 20,
    rows: int | None = None,
) -> float:
    """R² of a filter: mean over `draws` draws of μ_θ; `num_groups` groups of equal count. With `rows`, that
    many random rows of a draw: means of small groups are noisy, which lowers R², so filters are compared at
    the same number of rows."""
    generator, values = pfppo.random_generator("cpu", seed, 5), []
    for _ in range(draws):
        z = select(samples, name, generator)
        if rows is not None and rows < len(z):
            z = z[torch.randperm(len(z), generator=generator)[:rows].numpy()]
        if len(z) >= 2 * num_groups:
            values.append(pfppo.reward_r2(samples["reward"][z], samples["actual"][z], num_groups))
    return float(np.mean(values)) if values else float("nan")


def filter_r2_interval(
    samples: dict[str, np.ndarray], name: str, seed: int = 0, resamples: int = 200, rows: int | None = None
) -> dict[str, float]:
    """filter_r2 with a 95% percentile bootstrap interval over prompts (a resampled prompt counts as a prompt
    of its own). Repeated prompts make group means noisier, so the interval lies low: the estimate can stand
    near its upper end."""
    ids, rng, values = samples["prompt_ids"], np.random.default_rng(seed), []
    by_prompt = np.argsort(ids, kind="stable").reshape(len(np.unique(ids)), -1)  # (prompts, N)
    for b in range(resamples):
        picked = by_prompt[rng.integers(len(by_prompt), size=len(by_prompt))]
        again = {
            "prompt_ids": np.repeat(np.arange(len(picked)), picked.shape[1]),
            **{k: samples[k][picked.ravel()] for k in ("reward", "actual")},
        }
        values.append(filter_r2(again, name, seed + b, draws=1, rows=rows))
    low, high = np.nanquantile(values, [0.025, 0.975])
    return {"r2": filter_r2(samples, name, seed, rows=rows), "low": float(low), "high": float(high)}


def r2_of_filters(
    samples: dict[str, np.ndarray], names, seed: int, n: int = 5, intervals: bool = False
) -> dict[str, dict[str, float]]:
    """filter -> {r2, all_rows, rows (, low, high)} on groups of n responses: `r2` at the number of rows that
    the strictest filter leaves, the same for all; `all_rows` on everything that a filter keeps (no filter: 1
    / fraction kept times as many)."""
    samples = regroup(samples, n)
    rows = min(len(select(samples, name, pfppo.random_generator("cpu", seed, 5))) for name in names)
    table = {}
    for name in names:
        found = (
            filter_r2_interval(samples, name, seed, rows=rows)
            if intervals
            else {"r2": filter_r2(samples, name, seed, rows=rows)}
        )
        table[name] = {**found, "all_rows": filter_r2(samples, name, seed), "rows": rows}
    return table


def r2_table(
    policy_dir: Path,
    rm_dir: Path,
    rows: list[dict],
    out: Path,
    seed: int,
    samples: int = 10,
    n: int = 5,
    names=R2_FILTERS,
) -> dict:
    """r2_of_filters with intervals on `samples` responses to each row of a policy, kept as JSON."""
    if not out.is_file():
        table = r2_of_filters(
            scored_samples(policy_dir, rm_dir, rows, samples, seed), names, seed, n, intervals=True
        )
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(
            out,
            {
                "filters": table,
                "prompts": len(rows),
                "responses_per_prompt": samples,
                "N": n,
                "groups": 20,
                "grouping": "equal count",
            },
        )
    return json.loads(out.read_text())["filters"]
