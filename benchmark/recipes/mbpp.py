"""PF-PPO on a real pretrained model and real problems: SmolLM2-135M-Instruct on one-line functions of MBPP.

An answer begins with `def name(arguments):\\n    return`, and the model continues up to the end of the line.
These are the MBPP problems whose own solution is one assignment and a return at most, with a prompt of at
most 192 tokens: 130 of the train split, 31 of the validation split, 169 of the test split. A model of 135M
parameters passes with 6 to 11% of its samples there, and with next to none elsewhere.

  1. data      prompts in the model's chat template, the answer begun up to `return`
  2. samples   responses to train and validation problems, each run against its tests
  3. pairs     a passing and a failing response to one problem; rl: the problems that were solved sometimes
  4. rm        rm_single.py on the pairs
  5. r2        benchmark.r2: which filter suits the reward model, on validation problems
  6. ppo       pfppo_single.py: method x reward (tests, reward model) x seed
  7. test      pass@1 on the test problems, untouched before; results.md, samples.md, curves.png

Needs:   Linux, mbpp.jsonl of google-research, a folder of `benchmark.recipes.smollm2`; 10 GB of memory
         (reward model; PPO 6 GB), 12 GB of disk (checkpoints of finished runs are deleted). On one idle CPU
         core with bfloat16 instructions (AMX) about three hours (an estimate): 20 minutes for data, reward model and R²,
         then 5 to 14 a run.
Run:     python -m benchmark.recipes.mbpp --model output/smollm2 --mbpp mbpp.jsonl --output_dir output/mbpp
         On a GPU: --launcher="--num_processes 1 --mixed_precision bf16". `--dry_run` prints the commands,
         `--small` runs everything on a few problems. The same command goes on after a kill.
Look at: objective/score rises within ten updates, objective/kl stays under 10, eval/greedy_pass1; then r2.md.
Found:   benchmark/results/2026-11-26-smollm2.
"""

import ast
import itertools
import json
import math
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import transformers

import pfppo_single as pfppo
from benchmark import r2, records
from benchmark.evaluation import programs
from benchmark.recipes.steps import Step, keep_settings, run_steps
from benchmark.rewards import oracle
from pfppo_single import Count

SPLITS = {"train": (601, 974), "valid": (511, 600), "test": (11, 510)}  # MBPP's customary ones
TESTS = "benchmark.rewards:oracle"
METHODS = {"ppo_m": {"filter": "none"}, "random": {"filter": "random"}, "br": {"filter": "br"}}
METHODS |= {"bw": {"filter": "bw"}}
TEXT = {"query_length": 192, "response_length": 32}
SAMPLING = {**TEXT, "temperature": 0.8}
RM = {**TEXT, "epochs": 2, "batch_size": 16, "micro_batch_size": 8, "lr": 2e-5, "warmup_steps": 5}
RM |= {"normalize_samples": 128, "temperature": 0.8, "forward_batch_size": 64, "log_every": 5}
PPO = {**SAMPLING, "num_responses": 5, "noptepochs": 2, "minibatch_size": 8, "micro_batch_size": 8}
PPO |= {"critic": "shared", "lr": 2e-5, "kl_coef": 0.02, "forward_batch_size": 64, "normalize_samples": 80}
PPO |= {"print_samples_every": 4}


@dataclass(kw_only=True)
class Args:
    model: str
    """the policy to start from: a folder of benchmark.recipes.smollm2, or a model with a chat template"""
    mbpp: str
    """mbpp.jsonl (974 problems)"""
    output_dir: str = "output/mbpp"
    """folder for everything"""
    methods: tuple[str, ...] = ("ppo_m", "br", "random")
    """ppo_m (all 5 responses), br (best and a random other), random (2 of 5), bw (best and worst)"""
    rewards: tuple[Literal["tests", "rm"], ...] = ("tests", "rm")
    """what PPO is paid for: passing the tests, or the reward model's score"""
    seeds: tuple[int, ...] = (1, 2)
    """one run each"""
    updates: Count = 10
    """PPO updates of a run"""
    batch_size: Count = 8
    """prompts per update"""
    samples: Count = 16
    """graded responses to each train problem"""
    test_samples: Count = 2
    """sampled responses to each test problem, beside the greedy one"""
    launcher: str = "--cpu --num_processes 1 --mixed_precision bf16"
    """flags of `accelerate launch`, given as --launcher="--cpu ..\""""
    dry_run: bool = False
    """print the commands, check their flags, run nothing"""
    small: bool = False
    """8 train, 6 validation and 4 test problems, one update, two methods: does it run here?"""
    keep_checkpoints: bool = False
    """keep checkpoints (1.6 GB each) and policy_best of finished runs"""


def line_end(tokenizer) -> dict[str, str]:
    """The flag that stops a response at the end of its line: the token's id."""
    return {"stop_token": str(tokenizer("\n", add_special_tokens=False)["input_ids"][-1])}


# ---------------------------------------------------------------- 1. data


def one_line(problem: dict) -> str | None:
    """The start of the program up to `return`, where MBPP's own solution is one assignment and a return at
    most (imports may stand above it); None for other problems."""
    try:
        tree = ast.parse(problem["code"].replace("\r\n", "\n"))
    except SyntaxError:
        return None
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    if len(functions) != 1 or len(functions) + len(imports) != len(tree.body):
        return None
    body = functions[0].body
    if (
        not isinstance(body[-1], ast.Return)
        or len(body) > 2
        or not isinstance(body[0], (ast.Assign, ast.Return))
    ):
        return None
    head = ast.unparse(functions[0]).split("\n")[0]
    return "\n".join([*map(ast.unparse, imports), head]) + "\n    return"


def make_prompt(tokenizer, problem: dict, start: str) -> str:
    """The task and the first test as a user's turn, in the tokenizer's chat template, and the answer begun.
    It is a text, since no template begins an answer; its special tokens are read as such."""
    example = problem["test_list"][0].removeprefix("assert ")
    chat = [{"role": "user", "content": f"{problem['text']}\nExample: {example}"}]
    return (
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        + f"```python\n{start}"
    )


def make_data(args: Args, tokenizer) -> dict[str, list[dict]]:
    """split -> rows of the one-line problems: MBPP's columns, `prompt` and `entry_point`."""
    problems = pfppo.load_rows(args.mbpp, "mbpp", ("task_id", "text", "code", "test_list"))
    pfppo.refuse((not tokenizer.chat_template, f"--model {args.model}: its tokenizer has no chat template"))
    splits = {}
    for split, (first, last) in SPLITS.items():
        rows = []
        for problem in problems:
            start = one_line(problem) if first <= problem["task_id"] <= last else None
            if start is not None:
                row = {**problem, "prompt": make_prompt(tokenizer, problem, start)}
                row["entry_point"] = programs.tests_of(problem)[1]
                fits = len(pfppo.encode_prompt(tokenizer, row["prompt"])) <= TEXT["query_length"]
                rows += [row] if fits else []
        pfppo.refuse((not rows, f"--mbpp {args.mbpp}: no one-line problem with task_id {first} to {last}"))
        splits[split] = rows[: {"train": 8, "valid": 6, "test": 4}[split]] if args.small else rows
    return splits


# ---------------------------------------------------------------- 2. samples, 3. pairs


def graded_samples(args: Args, tokenizer, rows: list[dict], count: int, file: Path) -> list[dict]:
    """count responses to each row with their verdicts, one line a row; goes on where a killed run stopped."""
    lines = records.finished_rows(file)
    if len(lines) == len(rows):
        return lines
    settings = {**SAMPLING, **line_end(tokenizer), "generation_batch_size": 64}
    settings = pfppo.Args(policy=args.model, reward=TESTS, prompts="", **settings)
    rows = pfppo.encode_queries(tokenizer, rows, "prompt", TEXT["query_length"], "mbpp")
    policy = load_bf16(args.model)
    return r2.collect(policy, tokenizer, (oracle, oracle), rows, count, settings, file, 8, print)


def load_bf16(folder: str):
    """A policy for sampling: half the memory, and twice as fast where the processor has bfloat16."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return pfppo.load_causal_lm(folder, torch.bfloat16).to(device).eval()


def make_pairs(rows: list[dict], lines: list[dict], most: int, seed: int) -> list[dict]:
    """Up to `most` pairs a problem of a passing and a failing response, no pair twice, drawn at random."""
    pairs, rng = [], random.Random(seed)
    for row, line in zip(rows, lines):
        verdicts = list(zip(line["responses"], line["actual"]))
        good, bad = (
            list(dict.fromkeys(x for x, s in verdicts if (s > 0) == wanted)) for wanted in (True, False)
        )
        both = list(itertools.product(good, bad))
        for chosen, rejected in rng.sample(both, min(most, len(both))):
            pair = {"task_id": row["task_id"], "prompt": row["prompt"], "chosen": chosen}
            pairs.append(pair | {"rejected": rejected})
    return pairs


# ---------------------------------------------------------------- 4. to 6. commands


def runs_of(args: Args) -> list[tuple[int, str, str]]:
    """(seed, reward, method) of every run, a whole seed before the next."""
    return list(itertools.product(args.seeds, args.rewards, args.methods))


def name_of(seed: int, reward: str, method: str) -> str:
    return f"{reward}_{method}_{seed}"


def steps_of(args: Args, folder: Path, stop: dict) -> list[Step]:
    """The commands behind the data; stop: of `line_end`."""
    data, reward_model, steps = folder / "data", folder / "rm/model", []
    if "rm" in args.rewards:
        settings = {"model": args.model, "train_data": data / "pairs.jsonl"}
        settings |= {"eval_data": data / "pairs_valid.jsonl", "normalize_prompts": data / "train.jsonl"}
        settings |= {**RM, **stop, "output_dir": folder / "rm"}
        steps.append(Step("rm", "rm_single", settings, reward_model))
        settings = {"policy": args.model, "reward": reward_model, "actual_score": TESTS}
        settings |= {
            "prompts": data / "valid.jsonl",
            "num_samples": 10 if args.small else 20,
            "resamples": 20 if args.small else 200,
            "dtype": "bfloat16",
        }
        settings |= {**SAMPLING, **stop, "save_every": 8, "output_dir": folder / "r2"}
        steps.append(Step("r2", "benchmark.r2", settings, folder / "r2/r2.md"))
    for seed, reward, method in runs_of(args):
        name = name_of(seed, reward, method)
        settings = {"policy": args.model, "reward": TESTS if reward == "tests" else reward_model}
        settings |= {
            "prompts": data / "rl.jsonl",
            "eval_prompts": data / "valid.jsonl",
            "actual_score": TESTS,
        }
        settings |= {**PPO, **stop, "normalize_reward": reward == "rm", **METHODS[method], "seed": seed}
        kept = args.batch_size * (PPO["num_responses"] if METHODS[method]["filter"] == "none" else 2)
        settings |= {"minibatch_size": min(PPO["minibatch_size"], kept)}
        settings |= {"batch_size": args.batch_size, "eval_every": max(1, args.updates // 2)}
        settings |= {"checkpoint_every": max(1, args.updates // 2)}
        settings |= {"total_episodes": args.batch_size * PPO["num_responses"] * args.updates}
        settings["output_dir"] = folder / name
        steps.append(Step(name, "pfppo_single", settings, folder / name / "policy"))
    return [Step(s.name, s.module, {k: as_text(v) for k, v in s.settings.items()}, s.output) for s in steps]


def as_text(value):
    return str(value) if isinstance(value, Path) else value


# ---------------------------------------------------------------- 7. test


def test_policy(args: Args, tokenizer, policy: str, rows: list[dict], file: Path) -> dict:
    """Greedy and sampled responses to the test problems, graded: {"greedy": [s], "sampled": [[s, ..]],
    "truncated", "length", "texts"}, kept in `file`."""
    if file.is_file():
        return json.loads(file.read_text())
    rows = pfppo.encode_queries(tokenizer, rows, "prompt", TEXT["query_length"], "mbpp")
    settings = {**SAMPLING, **line_end(tokenizer), "generation_batch_size": 64}
    settings = pfppo.Args(policy=policy, reward=TESTS, prompts="", **settings)
    model, stop_id = load_bf16(policy), pfppo.stop_token_id(tokenizer, settings.stop_token)
    found = {}
    for name, temperature, n in (("greedy", 0.0, 1), ("sampled", SAMPLING["temperature"], args.test_samples)):
        generator = pfppo.random_generator(model.device, 1, 78)
        rollout = pfppo.sample_rollout(model, rows, n, temperature, settings, stop_id, generator)
        texts = pfppo.decode_responses(tokenizer, rollout)
        repeated = [row for row in rows for _ in range(n)]
        scores = oracle([row["prompt"] for row in repeated], texts, repeated)
        found[name] = scores if n == 1 else [scores[i : i + n] for i in range(0, len(scores), n)]
        found[f"{name}_truncated"] = 1 - rollout["has_stop"].float().mean().item()
        found[f"{name}_length"] = rollout["response_mask"].sum(1).float().mean().item()
        if name == "greedy":
            found["texts"] = texts
    records.write_json(file, found)
    return found


def mean_and_error(values) -> tuple[float, float]:
    """Mean over problems and its standard error."""
    x = np.array([np.mean(value) for value in values])
    return float(x.mean()), float(x.std(ddof=1) / math.sqrt(len(x)))


def compare_methods(tests: dict[str, dict]) -> list[dict]:
    """What `test_policy` found, by name of run or `sft` -> for two methods that ran with the same rewards and seeds
    how far the second is ahead of the first: the mean over these runs of every problem's difference, and its
    standard error over problems. Seeds are too few for an error of their own."""
    places = {}  # method -> {(reward, seed): verdicts}
    for name, found in tests.items():
        if name == "sft":
            continue
        reward, _, rest = name.partition("_")
        method, _, seed = rest.rpartition("_")
        places.setdefault(method, {})[reward, seed] = found
    if "sft" in tests:  # where every run began
        places["start"] = {run: tests["sft"] for runs in places.values() for run in runs}
    lines, order = [], [name for name in ("start", *METHODS) if name in places]
    for first, second in itertools.combinations(order, 2):
        for wanted in (("tests", "rm"), ("tests",), ("rm",)):
            runs = [run for run in places[second] if run in places[first] and run[0] in wanted]
            if not runs or {reward for reward, _ in runs} != set(wanted):
                continue
            line = {"ahead": second, "of": first, "paid by": " and ".join(wanted), "runs": len(runs)}
            for kind in ("greedy", "sampled"):
                both = [(places[second][run][kind], places[first][run][kind]) for run in runs]
                gaps = [[np.mean(x) - np.mean(y) for x, y in zip(*pair)] for pair in both]
                line[kind], line[f"{kind}_se"] = mean_and_error(np.mean(gaps, axis=0))
            lines.append(line)
    return lines


def collect_results(folder: Path, names: list[str]) -> dict:
    """What is known of the tested runs."""
    tests = {name: json.loads((folder / f"test/{name}.json").read_text()) for name in names}
    results = {"commit": records.commit(), "hardware": records.hardware(), "runs": {}}
    results["methods"] = compare_methods(tests)
    seconds = {row["step"]: row for row in records.finished_rows(folder / "steps.jsonl")}
    for name, found in tests.items():
        entry, sft = {}, tests.get("sft")
        for kind in ("greedy", "sampled"):
            entry[f"{kind}_pass1"], entry[f"{kind}_se"] = mean_and_error(found[kind])
            entry |= {f"{kind}_{key}": found[f"{kind}_{key}"] for key in ("length", "truncated")}
            if sft and name != "sft":  # the same problems: the error of the difference is smaller
                change = [np.mean(a) - np.mean(b) for a, b in zip(found[kind], sft[kind])]
                entry[f"{kind}_gain"], entry[f"{kind}_gain_se"] = mean_and_error(change)
        metrics = records.finished_rows(folder / name / "metrics.jsonl") if name != "sft" else []
        if metrics:
            entry |= {"updates": metrics[-1]["step"], **seconds.get(name, {})}
            entry |= {tag: metrics[-1][tag] for tag in metrics[-1] if tag.startswith("eval/")}
            entry["validation_before"] = metrics[0].get("eval/greedy_pass1")
            for part in ("generate", "score", "logprobs", "train"):
                entry[f"seconds/{part}"] = float(np.mean([row[f"seconds/{part}"] for row in metrics[1:]]))
        results["runs"][name] = entry
    return results


def report(results: dict) -> str:
    """Table of the runs and table of the methods, as markdown."""
    from benchmark.study import figures

    def with_error(entry, name, error):
        return f"{entry[name]:.3f} ± {entry[error]:.3f}" if name in entry else "–"

    header = ["run", "greedy pass@1", "sampled pass@1", "gain, greedy", "gain, sampled", "KL", "length"]
    header += ["truncated", "updates"]
    header += ["s / update", "of it generate, train", "GB"]
    lines = []
    for name, entry in results["runs"].items():
        line = [name, with_error(entry, "greedy_pass1", "greedy_se")]
        line.append(with_error(entry, "sampled_pass1", "sampled_se"))
        line += [with_error(entry, f"{kind}_gain", f"{kind}_gain_se") for kind in ("greedy", "sampled")]
        line.append(f"{entry['eval/kl']:.2f}" if "eval/kl" in entry else "–")
        line += [
            f"{entry['sampled_length']:.1f}",
            f"{entry['sampled_truncated']:.2f}",
            entry.get("updates", "–"),
        ]
        parts = [entry.get(f"seconds/{part}") for part in ("generate", "score", "logprobs", "train")]
        known = None not in parts
        line.append(f"{sum(parts):.0f}" if known else "–")
        line.append(f"{parts[0]:.0f}, {parts[3]:.0f}" if known else "–")
        lines.append([*line, entry.get("peak_gb", "–")])
    tables = [figures.markdown_table(header, lines)]
    if results["methods"]:
        header = ["lead of", "over", "paid by", "runs each", "greedy pass@1", "sampled pass@1"]
        lines = [
            [line["ahead"], line["of"], line["paid by"], line["runs"]]
            + [f"{line[kind]:+.3f} ± {line[f'{kind}_se']:.3f}" for kind in ("greedy", "sampled")]
            for line in results["methods"]
        ]
        tables.append(figures.markdown_table(header, lines))
    return "\n\n".join(tables)


def draw_curves(folder: Path, names: list[str], path: Path) -> None:
    """Reward, pass@1 on validation problems and KL over updates; one colour a method, one line a run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from benchmark.study.figures import COLOURS, label

    rewards = list(dict.fromkeys(name.split("_")[0] for name in names))
    tags = {"objective/score": "reward of all samples", "eval/sampled_pass1": "sampled pass@1, validation"}
    tags["objective/kl"] = "KL, nats per response"
    figure, axes = plt.subplots(len(rewards), 3, figsize=(12, 3.2 * len(rewards)), squeeze=False)
    for name in names:
        reward, _, rest = name.partition("_")
        method, seed = rest.rsplit("_", 1)
        metrics = records.finished_rows(folder / name / "metrics.jsonl")
        for panel, (tag, title) in zip(axes[rewards.index(reward)], tags.items()):
            points = [(row["step"], row[tag]) for row in metrics if tag in row]
            style = ["-", "--", ":", "-."][(int(seed) - 1) % 4]
            panel.plot(*zip(*points), style, color=COLOURS.get(method), label=f"{label(method)}, seed {seed}")
            panel.set(title=f"{title} (paid by {reward})", xlabel="update")
            panel.grid(alpha=0.3)
    for row in axes:
        row[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def sample_page(folder: Path, rows: list[dict], names: list[str], count: int = 8) -> str:
    """Greedy responses to the first test problems, of the start and of every run."""
    tests = {name: json.loads((folder / f"test/{name}.json").read_text()) for name in ["sft", *names]}
    text = ["# Eight samples before and after", "", "Greedy; the sign says whether the tests pass.", ""]
    for i, row in enumerate(rows[:count]):
        text += [
            f"## MBPP {row['task_id']}",
            "",
            row["text"],
            "",
            "```python",
            row["prompt"].rpartition("```python\n")[2],
        ]
        for name, found in tests.items():
            text.append(f"{'+' if found['greedy'][i] else '-'} {name:16}{found['texts'][i].rstrip()}")
        text += ["```", ""]
    return "\n".join(text)


def main(args: Args) -> None:
    pfppo.check_ranges(args)
    unknown = ", ".join(name for name in args.methods if name not in METHODS)
    pfppo.refuse((unknown != "", f"--methods {unknown}: choose from {', '.join(METHODS)}"))
    if args.small:
        args.updates, args.batch_size, args.samples = 1, 2, 4
        args.seeds, args.methods = args.seeds[:1], args.methods[:2]
    transformers.logging.disable_progress_bar()
    folder = Path(args.output_dir)
    data = folder / "data"
    tokenizer = pfppo.load_pretrained("AutoTokenizer", args.model, "model")
    splits = make_data(args, tokenizer)
    print(", ".join(f"{len(rows)} {split} problems" for split, rows in splits.items()), flush=True)
    if args.dry_run:
        return run_steps(steps_of(args, folder, line_end(tokenizer)), args.launcher, folder, dry_run=True)

    free = "output_dir methods rewards seeds updates batch_size launcher dry_run keep_checkpoints"
    keep_settings(folder, args, free.split())
    data.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        records.write_rows(data / f"{split}.jsonl", rows)
    for split, name in {"train": "pairs", "valid": "pairs_valid"}.items():
        file = folder / f"samples_{split}.jsonl"
        lines = graded_samples(args, tokenizer, splits[split], args.samples, file)
        pairs = make_pairs(splits[split], lines, most=8, seed=1)
        rates = [np.mean(line["actual"]) for line in lines]
        solved = sum(rate > 0 for rate in rates)
        counts = f"{solved} of {len(rates)} problems solved, {len(pairs)} pairs"
        print(f"{split}: {np.mean(rates):.1%} pass, {counts}", flush=True)
        records.write_rows(data / f"{name}.jsonl", pairs)
        if split == "train":
            rl = [row for row, rate in zip(splits[split], rates) if 0 < rate < 1 or args.small]
            few = (
                f"{len(rl)} train problems are solved sometimes; --batch_size {args.batch_size} needs as many"
            )
            pfppo.refuse((len(rl) < args.batch_size, f"{few}; raise --samples, or take a better model"))
            records.write_rows(data / "rl.jsonl", rl)
        if "rm" in args.rewards and not pairs:
            pfppo.refuse((not args.small, f"{split}: no pair for a reward model; give --rewards tests"))
            args.rewards = ("tests",)
            print("--small: no pair for a reward model, which is left out")

    (folder / "test").mkdir(exist_ok=True)
    test_policy(args, tokenizer, args.model, splits["test"], folder / "test/sft.json")
    for step in steps_of(args, folder, line_end(tokenizer)):
        run_steps([step], args.launcher, folder, dry_run=False, keep_checkpoints=args.keep_checkpoints)
        if step.module == "pfppo_single":
            policy, file = str(step.output), folder / f"test/{step.name}.json"
            test_policy(args, tokenizer, policy, splits["test"], file)
            write_results(args, folder, splits["test"])
            if not args.keep_checkpoints:
                shutil.rmtree(folder / step.name / "policy_best", ignore_errors=True)
    print((folder / "results.md").read_text())


def write_results(args: Args, folder: Path, rows: list[dict]) -> None:
    """results.json, results.md, samples.md, curves.png of every run that has been tested."""
    names = [name_of(*run) for run in itertools.product(args.seeds, ("tests", "rm"), METHODS)]
    names = [name for name in names if (folder / f"test/{name}.json").is_file()]
    results = collect_results(folder, ["sft", *names])
    records.write_json(folder / "results.json", results)
    records.write_text(folder / "results.md", report(results) + "\n")
    records.write_text(folder / "samples.md", sample_page(folder, rows, names))
    draw_curves(folder, names, folder / "curves.png")


if __name__ == "__main__":
    main(pfppo.parse_args(Args))
