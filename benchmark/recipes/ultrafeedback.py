"""Instruction tuning of a small model on UltraFeedback: SFT, reward model, then PF-PPO (BR) beside DPO.

  1. data      rows with several scored completions -> SFT, reward and RL splits that share no prompt
  2. sft       sft_single.py on the completions
  3. rm        rm_single.py on the best and the worst completion of a prompt
  4. br, dpo   pfppo_single.py (best and a random other of 5), benchmark.baselines.dpo, from the SFT model
  5. evaluate  held-out prompts: reward, KL, length, share of prompts where the reward model prefers the
               policy's answer to the SFT model's; results.json, results.md, samples.md

Needs:   at the published size (gpt2, 64k prompts, 1024 tokens) a GPU of 24 GB and about a day: not run by us.
         With `--limit 300` and short answers one CPU core and half an hour, 10 GB of memory: run, see Found.
         The English filter needs a package: pip install -e '.[recipes]'
Run:     python -m benchmark.recipes.ultrafeedback --data openbmb/UltraFeedback:train --model gpt2 \\
           --output_dir output/ultrafeedback --launcher="--num_processes 1 --mixed_precision bf16"
         `--dry_run` makes the data, prints the commands and stops. The same command goes on after a kill.
Look at: the counts of what was left out; sft test/loss; rm test/accuracy above 0.5; br objective/kl under 10.
Found:   benchmark/results/2026-11-26-ultrafeedback. Settings, and what became of each flag of the original:
         benchmark/recipes/ultrafeedback.md.

A row is {"instruction", "completions": [{"response", "overall_score"}, ..]}, as in the hub's data set, or
{"instruction", "chosen", "rejected"}, whose pair always counts; an `input` beside it is appended. Any file
that the three scripts read will do.
"""

import importlib
import json
import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import transformers
from transformers import AutoTokenizer

import pfppo_single as pfppo
from benchmark import records
from benchmark.recipes.steps import Step, keep_settings, run_steps
from pfppo_single import Count, Share, Whole

# The original's settings: devjwsong/gpt2-instruction-tuning-rlhf-pytorch@07df48e, exec_*.sh
SFT = {"epochs": 5, "batch_size": 16, "lr": 2e-5, "lr_schedule": "linear", "weight_decay": 0.01}
RM = {"epochs": 3, "batch_size": 16, "lr": 1e-5, "lr_schedule": "linear", "weight_decay": 0.01}
PPO = {"filter": "br", "num_responses": 5, "batch_size": 16, "noptepochs": 3, "lr": 1e-5, "critic_lr": 1e-5}
PPO |= {"minibatch_size": 32, "kl_coef": 0.2, "lam": 0.9, "gamma": 1.0, "cliprange": 0.2, "vf_coef": 0.1}
DPO = {"epochs": 1, "batch_size": 16, "lr": 1e-5, "lr_schedule": "linear", "beta": 0.1}
WARMUP = 0.1  # share of the SFT steps
TAGS = ("<instruction>", "</instruction><response>")  # around a prompt, for a tokenizer without chat template


@dataclass(kw_only=True)
class Args:
    # data
    data: str
    """rows: .jsonl, .json, .csv, .parquet, or hub id `name:split`"""
    limit: Whole = 0
    """take this many rows, drawn at random; 0: all"""
    english: bool = True
    """keep instructions and completions that langdetect takes for English"""
    pairs: Literal["best_worst", "all"] = "best_worst"
    """pairs of a prompt: its best and its worst completion, or every two that differ enough"""
    min_difference: float = 2.0
    """least difference of two scores that makes a pair (the original's 2)"""
    sft_share: Share = 0.1
    """share of the prompts for SFT"""
    rm_share: Share = 0.1
    """share of the prompts for the reward model; the rest is for PPO and DPO"""
    valid_share: Share = 0.2
    """share of each of the three that is held out"""
    seed: Whole = 1
    """of splits and of every run"""
    # model
    model: str = "gpt2"
    """folder or hub id of a causal language model"""
    form: Literal["auto", "chat", "tags"] = "auto"
    """prompts as chat messages, or as text between tags; auto: chat where the tokenizer has a template"""
    chat_template: str | None = None
    """file with a Jinja template, in place of the tokenizer's own if it has one"""
    query_length: Count = 512
    """longest prompt in tokens; with the response 1024, as in the original"""
    response_length: Count = 512
    """longest response in tokens"""
    # run
    output_dir: str = "output/ultrafeedback"
    """folder for everything"""
    updates: Whole = 0
    """PPO updates; 0: one pass over the prompts"""
    micro_batch_size: Count = 8
    """rows in one forward and backward pass"""
    eval_prompts: Count = 200
    """held-out prompts of the last comparison"""
    launcher: str = "--num_processes 1"
    """flags of `accelerate launch`; on a CPU --launcher="--cpu --num_processes 1\""""
    keep_checkpoints: bool = False
    """keep checkpoints of finished steps (1.5 to 3 GB each for 135M parameters)"""
    dry_run: bool = False
    """make the data, print the commands, check their flags, run nothing"""
    small: bool = False
    """60 rows, 32 + 16 tokens, one epoch, one update: does it run here?"""


# ---------------------------------------------------------------- 1. data


def english_detector() -> Callable[[str], bool]:
    """langdetect's verdict on a text; it draws at random, so its seed is fixed."""
    try:
        langdetect = importlib.import_module("langdetect")
    except ImportError:
        message = "--english needs a package: pip install -e '.[recipes]'; or give --no-english"
        raise SystemExit(message) from None
    langdetect.DetectorFactory.seed = 0

    def is_english(text: str) -> bool:
        try:
            return langdetect.detect(text) == "en"
        except langdetect.LangDetectException:  # nothing but digits and signs
            return False

    return is_english


def as_number(score) -> float | None:
    """A score as a number; None for what is none ("N/A", nothing, nan)."""
    try:
        number = float(score)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def completions_of(row: dict, min_difference: float, where: str) -> list[tuple[str, object]]:
    """(response, score) of a row, whichever of the two forms it has."""
    completions = row.get("completions")
    if isinstance(completions, list):
        wrong = [c for c in completions if not isinstance(c, dict) or "response" not in c]
        pfppo.refuse((wrong != [], f"{where}: a completion is no object with `response` and `overall_score`"))
        return [(c["response"], c.get("overall_score")) for c in completions]
    has = ", ".join(sorted(row))
    known = "chosen" in row and "rejected" in row
    pfppo.refuse((not known, f"{where}: needs `completions`, or `chosen` and `rejected`; it has {has}"))
    return [(row["chosen"], min_difference), (row["rejected"], 0.0)]


def clean(rows: list[dict], is_english: Callable | None, min_difference: float, where: str):
    """-> prompts [{instruction, source, completions: [(response, score)]}], each once, and counts of what was
    left out and why. A completion without score can still teach SFT; its score is None."""
    prompts, counts = {}, Counter()
    for number, row in enumerate(rows, 1):
        text, place = row.get("instruction"), f"{where}, row {number}"
        pfppo.refuse((not isinstance(text, str), f"{place}: no text in a column `instruction`"))
        text = "\n\n".join(part.strip() for part in (text, row.get("input") or "") if part.strip())
        key = " ".join(text.lower().split())
        if not text or key in prompts:
            counts["rows without instruction" if not text else "rows that repeat an instruction"] += 1
        elif is_english and not is_english(text):
            counts["rows not in English"] += 1
        else:
            completions = []
            for response, score in completions_of(row, min_difference, place):
                response, score = response.strip() if isinstance(response, str) else "", as_number(score)
                if not response:
                    counts["empty completions"] += 1
                elif is_english and not is_english(response):
                    counts["completions not in English"] += 1
                else:
                    counts["completions without score"] += score is None
                    completions.append((response, score))
            counts["rows without any completion left"] += not completions
            if completions:
                source = str(row.get("source", ""))
                prompts[key] = {"instruction": text, "source": source, "completions": completions}
    return list(prompts.values()), {name: n for name, n in counts.items() if n}


def pairs_of(prompt: dict, how: str, min_difference: float) -> tuple[list[tuple[str, str]], str]:
    """(chosen, rejected) of a prompt; where there is none, why."""
    scored = sorted(((s, r) for r, s in prompt["completions"] if s is not None), key=lambda x: -x[0])
    if len(scored) < 2:
        return [], "prompts with fewer than two scored completions"
    both = [(a, b) for i, a in enumerate(scored) for b in scored[i + 1 :]]
    both = both if how == "all" else [(scored[0], scored[-1])]
    if scored[0][0] == scored[-1][0]:
        return [], "prompts whose completions tie"
    kept = [(a[1], b[1]) for a, b in both if a[0] > b[0] and a[0] - b[0] >= min_difference and a[1] != b[1]]
    return kept, "" if kept else f"prompts whose scores differ by less than {min_difference:g}"


def split_prompts(prompts: list[dict], args: Args) -> dict[str, list[dict]]:
    """sft, rm, rl, each _train and _valid: every source is divided alike, and no prompt is in two splits."""
    by_source, splits, rng = defaultdict(list), defaultdict(list), random.Random(args.seed)
    for prompt in prompts:
        by_source[prompt["source"]].append(prompt)
    for mine in by_source.values():
        rng.shuffle(mine)
        ends = [
            round(len(mine) * args.sft_share),
            round(len(mine) * (args.sft_share + args.rm_share)),
            len(mine),
        ]
        for stage, start, end in zip(("sft", "rm", "rl"), [0, *ends], ends):
            part = mine[start:end]
            held_out = round(len(part) * args.valid_share)
            splits[f"{stage}_valid"] += part[:held_out]
            splits[f"{stage}_train"] += part[held_out:]
    return splits


def make_data(args: Args, tokenizer, folder: Path) -> dict[str, int]:
    """Writes sft_, rm_, ppo_ and dpo_train.jsonl, the same _valid, and counts.json; returns rows per file.
    PPO has every prompt of its split once, DPO those that have a pair."""
    rows = pfppo.load_rows(args.data, "data")
    if args.limit:
        rows = random.Random(args.seed).sample(rows, min(args.limit, len(rows)))
    is_english = english_detector() if args.english else None
    prompts, counts = clean(rows, is_english, args.min_difference, f"--data {args.data}")
    counts, sizes = Counter({"rows": len(rows), "prompts": len(prompts)} | counts), {}
    folder.mkdir(parents=True, exist_ok=True)
    splits = split_prompts(prompts, args)
    splits |= {
        f"{stage}_{part}": splits[f"rl_{part}"] for stage in ("ppo", "dpo") for part in ("train", "valid")
    }
    for split in [name for name in splits if not name.startswith("rl")]:
        part, lines = splits[split], []
        for prompt in part:
            form = {"prompt": as_prompt(prompt["instruction"], args, tokenizer)}
            if split.startswith("sft"):
                lines += [{**form, "response": response} for response, _ in prompt["completions"]]
            elif split.startswith("ppo"):
                lines.append(form)
            else:
                pairs, why = pairs_of(prompt, args.pairs, args.min_difference)
                counts[why] += not pairs
                lines += [{**form, "chosen": chosen, "rejected": rejected} for chosen, rejected in pairs]
        sizes[split] = len(lines)
        records.write_rows(folder / f"{split}.jsonl", lines)
    counts = {name: n for name, n in counts.items() if n}
    records.write_json(folder / "counts.json", {"counts": counts, "rows": sizes})
    print("\n".join(f"{n:7} {name}" for name, n in [*counts.items(), *sizes.items()]), flush=True)
    empty = ", ".join(split for split, size in sizes.items() if not size)
    pfppo.refuse((not prompts, f"--data {args.data}: no row is left; see the counts above"))
    pfppo.refuse(
        (empty != "", f"--data {args.data}: nothing is left for {empty}; give more rows or other shares")
    )
    return sizes


def as_prompt(instruction: str, args: Args, tokenizer):
    """A user's turn, or the text between tags. The tags need no new tokens: an answer begins behind the last
    of them, and ends with the end-of-sequence token."""
    if args.form == "chat" or args.form == "auto" and tokenizer.chat_template:
        return [{"role": "user", "content": instruction}]
    return f"{TAGS[0]}{instruction}{TAGS[1]}"


def load_tokenizer(args: Args):
    """The model's tokenizer, with the template of --chat_template, which SFT saves with its model."""
    tokenizer = pfppo.load_pretrained("AutoTokenizer", args.model, "model", args.chat_template)
    need = args.form == "chat" and not tokenizer.chat_template
    pfppo.refuse(
        (need, f"--form chat: {args.model} has no chat template; give --chat_template FILE, or --form tags")
    )
    return tokenizer


# ---------------------------------------------------------------- 2. to 4. commands


def steps_of(args: Args, folder: Path, sizes: dict[str, int]) -> list[Step]:
    data, sft, rm = folder / "data", folder / "sft/model", folder / "rm/model"
    once = {"epochs": 1} if args.small else {}
    text = {"query_length": args.query_length, "response_length": args.response_length}
    common = {**text, "seed": args.seed, "micro_batch_size": args.micro_batch_size}
    template = args.chat_template and str(Path(args.chat_template).resolve())
    settings = {**SFT, **common, **once, "model": args.model, "chat_template": template}
    settings |= {"train_data": data / "sft_train.jsonl", "eval_data": data / "sft_valid.jsonl"}
    steps = math.ceil(sizes["sft_train"] / SFT["batch_size"]) * settings["epochs"]
    settings |= {"warmup_steps": round(WARMUP * steps), "eval_every": max(1, steps // 5)}
    made = [("sft", "sft_single", settings, sft)]
    settings = {**RM, **common, **once, "model": sft}
    settings |= {"train_data": data / "rm_train.jsonl", "eval_data": data / "rm_valid.jsonl"}
    settings |= {"normalize_samples": 16 if args.small else 128}
    made.append(("rm", "rm_single", settings, rm))
    updates = args.updates or max(1, sizes["ppo_train"] // PPO["batch_size"])
    settings = {**PPO, **common, "policy": sft, "reward": rm, "prompts": data / "ppo_train.jsonl"}
    settings |= {"eval_prompts": folder / "data/eval.jsonl", "eval_every": max(1, updates // 2)}
    settings |= {"total_episodes": PPO["batch_size"] * PPO["num_responses"] * updates}
    settings |= {"normalize_samples": 16 if args.small else 128, "print_samples_every": 5}
    made.append(("br", "pfppo_single", settings, folder / "br/policy"))
    settings = {**DPO, **common, "policy": sft, "train_data": data / "dpo_train.jsonl"}
    made.append(("dpo", "benchmark.baselines.dpo", settings, folder / "dpo/policy"))
    for name, _, settings, _ in made:
        settings["output_dir"] = folder / name
    text = [
        {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()} for *_, settings, _ in made
    ]
    return [Step(name, module, flags, out) for (name, module, _, out), flags in zip(made, text)]


# ---------------------------------------------------------------- 5. evaluate


def evaluate(folder: Path, args: Args, policies: dict[str, Path], rows: list[dict]) -> dict:
    """Sampled answers of every policy to the same prompts with the same draws: reward, KL to the SFT model,
    length, truncated share, win rate against the SFT model; errors are standard errors over prompts."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(policies["sft"])
    settings = pfppo.Args(policy="", reward="", prompts="", query_length=args.query_length)
    settings.response_length = args.response_length
    stop_id, rows = (
        tokenizer.eos_token_id,
        pfppo.encode_queries(tokenizer, rows, "prompt", args.query_length, "data"),
    )
    sft = pfppo.load_causal_lm(str(policies["sft"])).to(device).eval()
    reward = pfppo.load_reward_model(str(folder / "rm/model")).to(device).eval()
    found, texts = {}, {}
    for name, path in policies.items():
        policy = sft if name == "sft" else pfppo.load_causal_lm(str(path)).to(device).eval()
        generator = pfppo.random_generator(device, args.seed, 79)
        with torch.no_grad():
            rollout = pfppo.sample_rollout(policy, rows, 1, 1.0, settings, stop_id, generator)
            texts[name] = pfppo.decode_responses(tokenizer, rollout)
            scores = pfppo.score_rollout(reward, rows, rollout, texts[name], settings).cpu().numpy()
            size = args.micro_batch_size
            logprobs, _ = pfppo.response_logprobs_and_values(policy, rollout, 1.0, size)
            ref_logprobs, _ = pfppo.response_logprobs_and_values(sft, rollout, 1.0, size)
        lengths = rollout["response_mask"].sum(1).float().cpu().numpy()
        base = scores if name == "sft" else np.array(found["sft"]["scores"])
        wins = (scores > base) + 0.5 * (scores == base)
        values = {"reward": scores, "kl": (logprobs - ref_logprobs).sum(1).cpu().numpy(), "length": lengths}
        values |= {"truncated": 1.0 - rollout["has_stop"].float().cpu().numpy(), "win_rate": wins}
        found[name] = {"scores": scores.tolist(), "prompts": len(rows)}
        for key, x in values.items():
            found[name][key] = float(np.mean(x))
            found[name][f"{key}_se"] = (
                float(np.std(x, ddof=1) / math.sqrt(len(x))) if len(x) > 1 else math.nan
            )
    page = ["# Eight samples", "", "Sampled at temperature 1, with the reward model's score.", ""]
    for i, row in enumerate(rows[:8]):
        prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
        page += ["---", "", f"**{prompt}**", ""]
        for name in policies:
            page += [f"{name} ({found[name]['scores'][i]:+.2f}): {texts[name][i].strip()}", ""]
    records.write_text(folder / "samples.md", "\n".join(page))
    return found


def report(found: dict) -> str:
    from benchmark.study import figures

    def cell(entry: dict, key: str, digits: int) -> str:
        return f"{entry[key]:.{digits}f} ± {entry[key + '_se']:.{digits}f}"

    keys = {"reward": 3, "win_rate": 2, "kl": 2, "length": 1, "truncated": 2}
    header = ["policy", "reward", "win rate against SFT", "KL to SFT", "length", "truncated"]
    lines = [[name, *(cell(entry, key, d) for key, d in keys.items())] for name, entry in found.items()]
    return figures.markdown_table(header, lines)


def main(args: Args) -> None:
    pfppo.check_ranges(args)
    over = args.sft_share + args.rm_share >= 1
    pfppo.refuse((over, "--sft_share and --rm_share leave nothing for PPO and DPO; lower them"))
    if args.small:
        args.limit, args.query_length, args.response_length = args.limit or 60, 32, 16
        args.updates, args.eval_prompts = 1, 8
    transformers.logging.disable_progress_bar()
    folder = Path(args.output_dir)
    tokenizer = load_tokenizer(args)
    free = "output_dir updates micro_batch_size eval_prompts launcher keep_checkpoints dry_run"
    keep_settings(folder, args, free.split())
    counts = folder / "data/counts.json"
    sizes = json.loads(counts.read_text())["rows"] if counts.is_file() else None
    sizes = sizes or make_data(args, tokenizer, folder / "data")
    held_out = records.read_rows(folder / "data/ppo_valid.jsonl")
    fits = [r for r in held_out if len(pfppo.encode_prompt(tokenizer, r["prompt"])) <= args.query_length]
    pfppo.refuse(
        (not fits, f"every held-out prompt is longer than --query_length {args.query_length}; raise it")
    )
    records.write_rows(folder / "data/eval.jsonl", fits[: args.eval_prompts])
    steps = steps_of(args, folder, sizes)
    run_steps(steps, args.launcher, folder, args.dry_run, args.keep_checkpoints)
    if args.dry_run:
        return
    policies = {"sft": folder / "sft/model", "br": folder / "br/policy", "dpo": folder / "dpo/policy"}
    found = evaluate(folder, args, policies, fits[: args.eval_prompts])
    for entry in found.values():
        entry["scores"] = [round(score, 4) for score in entry["scores"]]
    results = {"commit": records.commit(), "hardware": records.hardware(), "policies": found}
    records.write_json(folder / "results.json", results)
    records.write_text(folder / "results.md", report(found) + "\n")
    print(report(found))


if __name__ == "__main__":
    main(pfppo.parse_args(Args))
