"""R² of every filter on a policy's samples (PAPER, R² of a filter): which filter suits a reward, before any RL.

  1. sample responses to each prompt from the policy, score them with the reward, grade them (actual score)
  2. draw the kept rows of every filter of pfppo_single.py, cut to equal rows
  3. group rows of similar reward; R² of the line through the groups' mean reward and mean actual score
  4. intervals by bootstrap over prompts, table, r2.png, reliability.png (Figure 1), and the flag to use, if any

  python -m benchmark.r2 --policy sft/model --reward rm/model --prompts prompts.jsonl \\
    --actual_score my_tests:passes --output_dir output/r2
  accelerate launch --num_processes 1 --mixed_precision bf16 -m benchmark.r2 ...

In:  policy, reward and prompts as pfppo_single.py takes them, and a grader. Prompts that it trains on will do.
Out: `samples.jsonl` (one line a prompt; the same command goes on where a killed one stopped), `r2.json`,
     `r2.md`, `r2.png`, `reliability.png` in output_dir.
R² is noisy: the intervals of 3000 graded responses are still about 0.2 to each side. benchmark/study/README.md says
what R² did and did not predict in our own runs.
"""

import importlib.util
import math
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import pfppo_single as pfppo
from benchmark import records
from pfppo_single import Count, Positive, Whole

# Every filter of pfppo_single.py, as the flags that choose it.
FILTERS = {
    **{name: {"filter": name} for name in ("none", "random", "bon", "br", "bw")},
    **{name: {"filter": name} for name in ("top", "top_random", "top_bottom")},
    **{f"pow_{k}": {"filter": "pow", "pow_k": float(k)} for k in (1, 2, 3)},
}
BOUNDED = ("top", "top_random", "top_bottom", "pow_1", "pow_2", "pow_3")  # made for R in [-1, 1]
Samples = dict[str, np.ndarray]  # prompt_ids, reward, actual: (responses,), those of a prompt adjacent


@dataclass(kw_only=True)
class Args:
    # run
    output_dir: str = "output/r2"
    """folder for everything; a folder that holds another run is refused"""
    seed: Whole = 1
    """of samples, filters and bootstrap"""
    # what is measured
    policy: str
    """policy to sample, usually π_SFT: folder or hub id of a causal language model"""
    reward: str
    """R_φ: folder or hub id of a sequence classification model, or `module:function`, as in pfppo_single.py"""
    actual_score: str
    """s: `module:function` of (prompts, responses, rows) -> floats, for example unit tests"""
    prompts: str
    """prompts: .jsonl(.gz), .json, .csv, .parquet, a save_to_disk folder, or hub id `name:split`"""
    prompt_field: str = "prompt"
    """column with the prompt: text, or a list of chat messages (the tokenizer's chat template is applied)"""
    chat_template: str | None = None
    """file with a Jinja template, in place of the tokenizer's own if it has one"""
    num_prompts: Whole = 0
    """the first so many prompts; 0: all"""
    # samples
    num_responses: Count = 5
    """N: responses that a filter chooses from, as in the PPO run to come"""
    num_samples: Count = 10
    """responses per prompt, a multiple of num_responses: each N of them count as a prompt of their own"""
    query_length: Count = 512
    """longest query in tokens"""
    response_length: Count = 512
    """longest response in tokens, the stop token included"""
    temperature: Positive = 1.0
    """of the samples, as in the PPO run to come"""
    stop_token: str = "eos"
    """token that ends a response: `eos`, `none`, a token, a text that is one, or an id"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """weights of policy and reward model"""
    forward_batch_size: Count = 32
    """rows in one forward pass of the reward model"""
    generation_batch_size: Count = 64
    """responses that are generated at a time"""
    save_every: Count = 32
    """prompts between two writes of samples.jsonl: what a kill can cost"""
    # R²
    num_groups: Count = 20
    """groups of equal count that rows of similar reward form; fewer where each would have less than two rows"""
    thresholds: tuple[float, float] = (-0.3, 0.3)
    """of top, top_random and top_bottom, as in pfppo_single.py"""
    resamples: Count = 200
    """bootstrap samples behind an interval"""


def main(args: Args) -> dict:
    accelerator = pfppo.start_accelerator()
    pfppo.check_ranges(args)
    n, size = args.num_responses, args.num_samples
    missing = importlib.util.find_spec("matplotlib") is None
    pfppo.refuse(
        (accelerator.num_processes > 1, "benchmark.r2 runs on one process; launch with --num_processes 1"),
        (n < 2, "--num_responses must be at least 2, or there is nothing to choose from"),
        (size % n > 0, f"--num_samples {size} must be a multiple of --num_responses {n}"),
        (missing, "the pictures need matplotlib: pip install matplotlib"),
    )
    names = "policy reward prompts seed prompt_field query_length response_length temperature stop_token"
    names += " forward_batch_size generation_batch_size"
    settings = pfppo.Args(**{name: getattr(args, name) for name in names.split()})
    config = pfppo.load_config(args.policy, "policy")
    tokenizer = pfppo.load_pretrained("AutoTokenizer", args.policy, "policy", args.chat_template)
    stop_id = pfppo.stop_token_id(tokenizer, args.stop_token)
    rows = pfppo.read_prompts("prompts", settings, tokenizer)[: args.num_prompts or None]
    needed = max(2, -(-10 * n // size))  # BoN leaves ten rows; one prompt alone says nothing of others
    pfppo.refuse((len(rows) < needed, f"--prompts: {len(rows)} are too few for R²; give at least {needed}"))
    num_groups = min(args.num_groups, len(rows) * size // n // 2)
    queries = [row["query_ids"] for row in rows]
    pfppo.check_rows(config, [[max(stop_id, 0)]], "stop_token")
    pfppo.check_rows(config, queries, "policy", args.response_length)
    is_function = ":" in args.reward
    if not is_function:
        size = config.get_text_config().vocab_size
        pfppo.check_reward_model(args.reward, "reward", tokenizer, queries, args.response_length, size)
    reward = pfppo.load_function(args.reward, "reward") if is_function else None
    actual_score = pfppo.load_function(args.actual_score, "actual_score")
    folder = pfppo.open_run(accelerator, args)

    # ------------------------------------------------ 1. sample, score, grade
    file = folder / "samples.jsonl"
    if len(records.finished_rows(file)) < len(rows):
        dtype = getattr(torch, args.dtype)
        policy = pfppo.load_causal_lm(args.policy, dtype).to(accelerator.device).eval()
        if not is_function:
            reward = pfppo.load_reward_model(args.reward, dtype).to(accelerator.device).eval()
        judges = (reward, actual_score)
        with accelerator.autocast():
            collect(policy, tokenizer, judges, rows, size, settings, file, args.save_every, say=print)
    samples = as_arrays(records.finished_rows(file))

    # ------------------------------------------------ 2 to 4. filters, groups, intervals
    found = measure(samples, n, args.seed, num_groups, args.thresholds, args.resamples)
    records.write_json(folder / "r2.json", found)
    text = report(found)
    records.write_text(folder / "r2.md", text + "\n")
    draw(found, folder)
    print(f"\nPictures: {folder / 'r2.png'}, {folder / 'reliability.png'}\n\n{text}", flush=True)
    return found


# ---------------------------------------------------------------- samples


def collect(policy, tokenizer, judges, rows, num_samples, settings, file=None, save_every=0, say=None):
    """num_samples responses to each row (with query_ids), their reward and actual score -> one dict a prompt:
    prompt, responses, reward, actual. judges: reward (RewardModel or function), actual_score. `settings`:
    Args of pfppo_single.py. Prompts are sampled save_every at a time (0: together) from generators of their
    own, and written to `file`, so that a killed run goes on with the same samples."""
    reward, actual_score = judges
    save_every, start = save_every or len(rows), time.time()
    lines = records.finished_rows(file)[: len(rows)] if file else []
    lines = lines if len(lines) == len(rows) else lines[: len(lines) // save_every * save_every]
    if file:
        records.write_rows(file, lines)
    already = len(lines)
    device, stop_id = next(policy.parameters()).device, pfppo.stop_token_id(tokenizer, settings.stop_token)
    for first in range(already, len(rows), save_every):
        part = rows[first : first + save_every]
        generator = pfppo.random_generator(device, settings.seed, 77, first)
        rollout = pfppo.sample_rollout(
            policy, part, num_samples, settings.temperature, settings, stop_id, generator
        )
        texts = pfppo.decode_responses(tokenizer, rollout)
        scores = pfppo.score_rollout(reward, part, rollout, texts, settings).tolist()
        actual = pfppo.call_function(actual_score, part, texts, settings.prompt_field)
        new = []
        for i, row in enumerate(part):
            mine = slice(i * num_samples, (i + 1) * num_samples)
            line = {"prompt": row[settings.prompt_field], "responses": texts[mine]}
            new.append(line | {"reward": scores[mine], "actual": actual[mine]})
        lines += new
        if file:
            records.append_rows(file, new)
        if say:
            done = len(lines)
            left = (time.time() - start) / (done - already) * (len(rows) - done)
            counts = f"{done}/{len(rows)} prompts, {done * num_samples} responses graded"
            say(f"r2 {counts}, {left:.0f} s left")
    return lines


def as_arrays(lines: list[dict]) -> Samples:
    """Lines of `collect` -> arrays over responses."""
    counts = [len(line["reward"]) for line in lines]
    samples = {"prompt_ids": np.repeat(np.arange(len(lines)), counts)}
    samples["reward"] = np.array([x for line in lines for x in line["reward"]], dtype=np.float32)
    samples["actual"] = np.array([x for line in lines for x in line["actual"]], dtype=np.float64)
    wrong = not np.isfinite(samples["reward"]).all() or not np.isfinite(samples["actual"]).all()
    pfppo.refuse((wrong, "a reward or an actual score is not a finite number; look at samples.jsonl"))
    return samples


def regroup(samples: Samples, n: int) -> Samples:
    """Samples with k * n adjacent responses a prompt -> k groups of n each: what a filter chooses from when
    it trains with N = n."""
    have = int(np.bincount(samples["prompt_ids"]).max())
    if have % n:
        raise ValueError(
            f"{have} responses a prompt cannot be cut into groups of {n}; sample a multiple of {n}"
        )
    return {**samples, "prompt_ids": np.arange(len(samples["prompt_ids"])) // n}


# ---------------------------------------------------------------- R²


def reward_r2(rewards: np.ndarray, actual_scores: np.ndarray, num_groups: int = 20) -> float:
    """R² of a line through groups of similar reward (PAPER): rows sorted by reward into num_groups groups of
    equal count, mean reward and mean actual score of each, R² = 1 - Σ(s-ŝ)²/Σ(s-s̄)² of the least-squares
    line. NaN where either is constant."""
    order = np.argsort(rewards, kind="stable")
    groups = [g for g in np.array_split(order, min(num_groups, len(order))) if len(g)]
    r, s = np.array([[rewards[g].mean(), actual_scores[g].mean()] for g in groups], dtype=np.float64).T
    if len(groups) < 2 or np.ptp(r) < 1e-12 or np.ptp(s) < 1e-12:
        return float("nan")
    slope, intercept = np.polyfit(r, s, 1)
    return float(1 - np.square(s - slope * r - intercept).sum() / np.square(s - s.mean()).sum())


def make_filter(n: int, **flags) -> Callable[[Samples, torch.Generator], np.ndarray]:
    """The filter that these flags of pfppo_single.py choose, for N = n: (samples, generator) -> rows of one
    draw of μ_θ."""
    args = pfppo.Args(policy="", reward="", prompts="", num_responses=n, **flags)
    num_kept, weights, _ = pfppo.check_args(args, num_processes=1)
    keep = partial(pfppo.filter_responses, name=args.filter, weights=weights, num_kept=num_kept)
    keep = partial(keep, draw=args.draw, thresholds=args.thresholds, pow_k=args.pow_k)

    def rows(samples: Samples, generator: torch.Generator) -> np.ndarray:
        scores, ids = torch.from_numpy(samples["reward"]).float(), torch.from_numpy(samples["prompt_ids"])
        return keep(scores, ids, generator).numpy()

    return rows


def filter_r2(
    samples: Samples, keep: Callable, seed: int = 0, draws: int = 10, num_groups: int = 20, rows: int = 0
) -> float:
    """R² of a filter (of make_filter): mean over `draws` draws of μ_θ. With `rows`, of that many random rows
    of a draw: means of small groups are noisy, which lowers R², so filters are compared at equal rows."""
    generator, values = pfppo.random_generator("cpu", seed, 5), []
    for _ in range(draws):
        z = keep(samples, generator)
        if rows and rows < len(z):
            z = z[torch.randperm(len(z), generator=generator)[:rows].numpy()]
        if len(z) >= 2 * num_groups:
            values.append(reward_r2(samples["reward"][z], samples["actual"][z], num_groups))
    return float(np.mean(values)) if values else float("nan")


def bootstrap_r2(
    samples: Samples, n: int, keep: Callable, seed: int, resamples: int, num_groups: int, rows: int
) -> np.ndarray:
    """filter_r2 over groups of n on `resamples` draws of prompts, each with all its responses, with replacement
    (resamples,); a prompt drawn again counts as one of its own. Every filter sees the same draws. Repeated
    prompts make group means noisier, so the values lie low: the estimate can stand near the upper end of the
    interval."""
    ids, rng, values = samples["prompt_ids"], np.random.default_rng(seed), []
    by_prompt = np.argsort(ids, kind="stable").reshape(len(np.unique(ids)), -1)  # (prompts, k * n)
    for b in range(resamples):
        picked = by_prompt[rng.integers(len(by_prompt), size=len(by_prompt))]
        again = {"prompt_ids": np.repeat(np.arange(len(picked)), picked.shape[1])}
        again |= {name: samples[name][picked.ravel()] for name in ("reward", "actual")}
        values.append(filter_r2(regroup(again, n), keep, seed + b, 1, num_groups, rows))
    return np.array(values)


def interval(values: np.ndarray) -> tuple[float, float]:
    """95% percentile interval; NaN where more than one value in twenty is NaN: R² is undefined in draws without
    a response that passes, and an interval of the other draws would be too narrow."""
    finite = values[np.isfinite(values)]
    enough = len(finite) >= 0.95 * len(values) > 0
    return tuple(np.quantile(finite, [0.025, 0.975]).tolist()) if enough else (math.nan, math.nan)


def r2_of_filters(
    samples: Samples, filters: dict[str, Callable], seed: int, n: int, num_groups=20, resamples=0
) -> dict[str, dict[str, float]]:
    """filter -> {r2, all_rows, rows} on groups of n responses: `r2` at the number of rows that the strictest
    filter leaves, the same for all; `all_rows` on everything that a filter keeps. With resamples also the
    interval `low`, `high`, and the lead over no filter: `lead`, `lead_low`, `lead_high`, from the same draws
    of prompts."""
    groups, table = regroup(samples, n), {}
    rows = min(len(keep(groups, pfppo.random_generator("cpu", seed, 5))) for keep in filters.values())
    for name, keep in filters.items():
        r2 = filter_r2(groups, keep, seed, num_groups=num_groups, rows=rows)
        table[name] = {"r2": r2, "all_rows": filter_r2(groups, keep, seed, num_groups=num_groups)}
        table[name]["rows"] = rows
    if resamples:
        draws = {
            name: bootstrap_r2(samples, n, keep, seed, resamples, num_groups, rows)
            for name, keep in filters.items()
        }
        for name, values in draws.items():
            table[name]["low"], table[name]["high"] = interval(values)
            if name != "none" and "none" in draws:
                low, high = interval(values - draws["none"])
                lead = table[name]["r2"] - table["none"]["r2"]
                table[name] |= {"lead": lead, "lead_low": low, "lead_high": high}
    return table


def named_filters(n: int, names=tuple(FILTERS), thresholds=(-0.3, 0.3)) -> dict[str, Callable]:
    """Filters by their names in FILTERS, for r2_of_filters."""
    return {name: make_filter(n, thresholds=thresholds, **FILTERS[name]) for name in names}


def left_out(samples: Samples, filters: dict[str, Callable], seed: int, num_groups: int) -> dict[str, str]:
    """Filters that these (regrouped) samples cannot compare -> why."""
    low, high, out = samples["reward"].min(), samples["reward"].max(), {}
    for name, keep in filters.items():
        if name in BOUNDED and max(-low, high) > 1:
            out[name] = f"made for R in [-1, 1], and R goes from {low:.3g} to {high:.3g}"
        elif len(keep(samples, pfppo.random_generator("cpu", seed, 5))) < 2 * num_groups:
            out[name] = f"keeps fewer than two rows for each of {num_groups} groups"
    return out


def measure(
    samples: Samples, n: int, seed: int, num_groups=20, thresholds=(-0.3, 0.3), resamples=200
) -> dict:
    """Everything that is known from graded samples: r2_of_filters with intervals, which filters are left out
    and why, the curves of Figure 1, and how many responses it took. What r2.json holds."""
    filters = named_filters(n, thresholds=thresholds)
    out = left_out(regroup(samples, n), filters, seed, num_groups)
    kept = {name: keep for name, keep in filters.items() if name not in out}
    pfppo.refuse((not kept, f"{len(samples['reward'])} responses are too few for {num_groups} groups"))
    table = r2_of_filters(samples, kept, seed, n, num_groups, resamples)
    prompts, graded = len(np.unique(samples["prompt_ids"])), len(samples["reward"])
    bins = min(10, max(2, graded // 50))  # at least five responses in a group of a repeat
    repeats = reliability(samples["reward"], samples["actual"], bins, 10, seed)
    counts = {"prompts": prompts, "responses_per_prompt": graded // prompts, "graded": graded, "N": n}
    grouping = {"groups": num_groups, "grouping": "equal count", "resamples": resamples}
    curves = {"responses": graded, "repeats": repeats}
    ranges = {
        f"{name}_range": [float(samples[name].min()), float(samples[name].max())]
        for name in ("reward", "actual")
    }
    return {"filters": table, "left_out": out, "reliability": curves, **counts, **grouping, **ranges}


def reliability(
    rewards: np.ndarray, actual_scores: np.ndarray, num_groups: int, num_repeats: int, seed: int
) -> list[dict]:
    """PAPER Figure 1: rewards, actual_scores (responses,) -> per repeat the mean reward and mean actual score
    of num_groups groups of equal count, lowest reward first. DEPARTS PAPER, which does not say what it
    repeats: each repeat here is its own random tenth of the responses, so no response counts twice and the
    lines' spread is that of fresh samples."""
    shuffled = np.random.default_rng(seed).permutation(len(rewards))
    repeats = []
    for part in np.array_split(shuffled, num_repeats):
        order = part[np.argsort(rewards[part], kind="stable")]
        groups = [g for g in np.array_split(order, num_groups) if len(g)]
        line = {"reward": [float(rewards[g].mean()) for g in groups]}
        line["actual"] = [float(actual_scores[g].mean()) for g in groups]
        repeats.append(line | {"count": [len(g) for g in groups]})
    return repeats


# ---------------------------------------------------------------- what it says


def flag(name: str) -> str:
    """br -> `--filter br`, pow_2 -> `--filter pow --pow_k 2`."""
    return " ".join(
        f"--{key} {value:g}" if key == "pow_k" else f"--{key} {value}" for key, value in FILTERS[name].items()
    )


def undefined(found: dict) -> str:
    """Why there is no R² of these samples, or no interval."""
    (low, high), (lowest, highest) = found["actual_range"], found["reward_range"]
    alike = {0.0: "no graded response passes", 1.0: "every graded response passes"}
    if low == high:
        return alike.get(low, f"every graded response has the actual score {low:g}")
    if lowest == highest:
        return f"every response has the reward {lowest:g}"
    return "too few graded responses differ in reward and actual score; grade more"


def advice(found: dict) -> list[str]:
    """What follows, and the flag to use as the last paragraph, or one line that nothing follows. A filter is
    preferred where the 95% interval of its lead over no filter, from the same draws of prompts, lies above 0."""
    known = {name: entry for name, entry in found["filters"].items() if math.isfinite(entry["r2"])}
    best = max(known, key=lambda name: known[name]["r2"], default="none")
    entry = found["filters"][best]
    if not all(math.isfinite(entry.get(key, 0.0)) for key in ("r2", "lead", "lead_low")):
        return [f"Nothing can be said of any filter: {undefined(found)}."]
    neither = (
        f"Use --filter random, which trains on 2 of {found['N']} responses, or --filter none, which trains "
    )
    neither += "on all of them: nothing measured here speaks against either."
    if found["N"] == 2:  # random keeps both
        neither = "Use --filter none: nothing measured here speaks against it."
    if best == "none":
        return [f"No filter has the highest R², {entry['r2']:.3f}.", neither]
    lead = f"{entry['lead']:+.3f} [{entry['lead_low']:+.3f}, {entry['lead_high']:+.3f}] over no filter"
    if entry["lead_low"] > 0:
        return [f"{best} has the highest R², {entry['r2']:.3f}, a lead of {lead}.", f"Use {flag(best)}"]
    overlap = (
        f"The intervals overlap: {best} has the highest R², {entry['r2']:.3f}, but its lead of {lead} may "
    )
    return [overlap + "be chance. Four times the graded responses halve the intervals.", neither]


def report(found: dict) -> str:
    """Table, what it took, advice: the text of r2.md."""
    from benchmark.study import figures

    def number(value: float, form: str = ".3f") -> str:
        return format(value, form) if math.isfinite(value) else "–"

    def bounds(entry: dict, low: str, high: str) -> str:
        there = math.isfinite(entry.get(low, math.nan))
        return f"[{entry[low]:.3f}, {entry[high]:.3f}]" if there else "–"

    header = ["filter", "R²", "95% interval", "lead over no filter", "95% interval", "R² on all kept rows"]
    lines = []
    for name, entry in found["filters"].items():
        lead = number(entry.get("lead", math.nan), "+.3f")
        lines.append([name, number(entry["r2"]), bounds(entry, "low", "high"), lead])
        lines[-1] += [bounds(entry, "lead_low", "lead_high"), number(entry["all_rows"])]
    rows = next(iter(found["filters"].values()))["rows"]
    prompts, each = found["prompts"], found["responses_per_prompt"]
    text = [figures.markdown_table(header, lines), ""]
    text += [f"Left out: {name}, {why}." for name, why in found["left_out"].items()]
    text.append(
        f"{found['graded']} graded responses ({prompts} prompts x {each}), filters over N = {found['N']}, "
        f"{rows} rows of each in {found['groups']} groups, intervals by bootstrap over prompts."
    )
    sentences = [part for line in [*text[2:], *advice(found)] for part in textwrap.wrap(line, 110)]
    return "\n".join([*text[:2], *sentences])


def draw(found: dict, folder: Path) -> None:
    """r2.png and reliability.png."""
    from benchmark.study import figures

    figures.r2_bars(found["filters"], folder / "r2.png")
    figures.reliability(found["reliability"]["repeats"], folder / "reliability.png")


if __name__ == "__main__":
    try:
        main(pfppo.parse_args(Args))
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")
