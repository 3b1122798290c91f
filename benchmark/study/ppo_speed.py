"""Measures seconds per PPO update of pfppo_single.py, beside TRL's PPOTrainer and beside the arithmetic needed.

    pip install --no-deps --target /tmp/trl 'trl==1.12.0'     # the last TRL with a PPOTrainer
    PYTHONPATH=/tmp/trl python -m benchmark.study.ppo_speed --output_dir output/speed
    ... --workloads world --world output/quickstart            # the embedded world, a folder of benchmark.quickstart
    ... --workloads mini --rounds 1 --updates 3 --profile      # where the seconds of one update go, by operation

Workloads are random GPT-2 models (none is trained to anything): `mini` and `small` draw responses of full length,
`ragged` has a stop token of probability 1/16, so lengths are geometric. All ways start from the same models, with
the same tokens, epochs and minibatches, in float32 on one thread. TRL samples one response to a prompt, so it is
given each prompt five times. We sample all responses of an update at once; TRL samples and scores in batches of
one size, 64 (`mini` takes it as long at 320). Each way runs in a process of its own, the ways in turn. The first update of a run is
left out. Seconds are medians over the updates of all rounds; the fastest update stands beside them, since other
work on the machine can only slow one.

The floor is what the algorithm's matrix products would take at the rate measured in the same run, at the shapes in
use: tall and narrow for passes over rows, a few rows for sampling. No program without them can be faster.
"""

import importlib.util
import json
import math
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from benchmark import pipeline, records

WAYS = {
    "ours, PPO-M": "none",
    "ours, PF-PPO BR": "br",
    "TRL": "trl",
    "TRL, checkpointing": "trl_checkpointing",
}
PHASES = ("generate", "score", "logprobs", "train")
NAMES = {
    "matrix products": "::(mm|addmm|bmm|baddbmm)$",
    "attention": "scaled_dot_product",
    "layer norms": "native_layer_norm",
    "drawing tokens": "::exponential_$",
}
KINDS = (*NAMES, "activation", "over the vocabulary", "other operations", "between operations")
EPOCHS, RESPONSES = 3, 5


@dataclass(frozen=True)
class Workload:
    """Layers and width of GPT-2, tokens of prompt and response, prompts per update, rows per optimizer step and per
    forward and backward pass, probability of the stop token."""

    layers: int = 4
    width: int = 256
    query: int = 64
    response: int = 64
    prompts: int = 16
    minibatch: int = 16
    micro_batch: int = 16
    stop_probability: float = 0.0
    vocabulary: int = 512


WORKLOADS = {
    "mini": Workload(2, 64, 24, 24, 64, 64, 64),
    "small": Workload(),
    "ragged": Workload(stop_probability=1 / 16, micro_batch=8),
}


@dataclass
class Args:
    output_dir: str = "output/speed"
    """results.json and the models; results are written round by round"""
    workloads: tuple[str, ...] = ("mini", "small", "ragged")
    """of mini, small, ragged, world"""
    world: str | None = None
    """folder of benchmark.quickstart, for the workload `world`"""
    updates: int = 4
    """updates in a run, the first of which is not counted"""
    rounds: int = 3
    """runs of each way"""
    profile: bool = False
    """where the seconds of the last update of a run go, in place of the seconds of all"""
    way: str = ""
    """used by the command itself: run this way of the one workload once and print what it took"""


def make_models(folder: Path, load: Workload) -> None:
    """Policy, reward model, tokenizer and prompts of a workload, all from one seed."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        GPT2Config,
        GPT2ForSequenceClassification,
        GPT2LMHeadModel,
        PreTrainedTokenizerFast,
    )

    stop = load.vocabulary - 1
    ids = {**{f"w{i}": i for i in range(stop)}, "<eos>": stop}
    inner = Tokenizer(models.WordLevel(ids, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<eos>")
    special = dict(bos_token_id=stop, eos_token_id=stop, pad_token_id=stop)
    sizes = dict(n_layer=load.layers, n_embd=load.width, n_head=load.width // 32, vocab_size=load.vocabulary)
    no_dropout = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    config = GPT2Config(n_positions=load.query + load.response, **sizes, **special, **no_dropout)
    torch.manual_seed(0)
    policy = GPT2LMHeadModel(config)
    with torch.no_grad():  # the first hidden feature is 1 and only the stop token reads it: its log-odds
        embedding, last = policy.transformer.wte.weight, policy.transformer.ln_f
        last.weight.fill_(0.05), last.bias.zero_()
        last.bias[0], embedding[:, 0], embedding[stop] = 1.0, 0.0, 0.0
        p = load.stop_probability
        embedding[stop, 0] = math.log(p / (1 - p) * stop) if p else -30.0
    reward = GPT2ForSequenceClassification(GPT2Config(**{**config.to_dict(), "num_labels": 1}))
    for name, model in (("sft", policy), ("rm", reward)):
        model.save_pretrained(folder / name / "model")
        tokenizer.save_pretrained(folder / name / "model")
    words = np.random.default_rng(1).integers(stop, size=(load.prompts * 4, load.query))
    (folder / "world").mkdir()
    records.write_rows(
        folder / "world/rl.jsonl", [{"prompt": " ".join(f"w{i}" for i in row)} for row in words]
    )


def settings_of(load: Workload | None) -> dict:
    """Settings of pfppo_single.py; None: those of the main job."""
    if load is None:
        return {**pipeline.PPO, "eval_every": 1000}
    return dict(
        batch_size=load.prompts,
        num_responses=RESPONSES,
        query_length=load.query,
        response_length=load.response,
        minibatch_size=load.minibatch,
        micro_batch_size=load.micro_batch,
        forward_batch_size=64,
        generation_batch_size=load.prompts * RESPONSES,
        noptepochs=EPOCHS,
        normalize_samples=2 * RESPONSES,
        lr=1e-5,
        critic_lr=1e-5,
        print_samples_every=0,
    )


def our_updates(folder: Path, settings: dict, name: str, updates: int, after=lambda: None) -> list[dict]:
    """Metrics of the updates of pfppo_single.py under a filter, in this process; `after` is called behind each."""
    import torch

    import pfppo_single as pfppo

    torch.set_num_threads(1)
    log = pfppo.log_metrics
    pfppo.log_metrics = lambda *line: (log(*line), after())
    with tempfile.TemporaryDirectory() as out:
        settings = settings | dict(filter=name, checkpoint_every=1000, output_dir=f"{out}/run")
        settings["total_episodes"] = updates * settings["batch_size"] * settings["num_responses"]
        models = dict(
            policy=folder / "sft/model", reward=folder / "rm/model", prompts=folder / "world/rl.jsonl"
        )
        try:
            pfppo.main(pfppo.Args(**settings, **{field: str(path) for field, path in models.items()}))
        finally:
            pfppo.log_metrics = log
        rows = records.read_rows(Path(out) / "run/metrics.jsonl")
    return [row for row in rows if row["step"] > 0]


def trl_updates(
    folder: Path, settings: dict, checkpointing: bool, updates: int, after=lambda: None
) -> list[dict]:
    """Seconds of the updates of TRL's PPOTrainer with our sizes; `after` is called behind each."""
    import torch
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        TrainerCallback,
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    torch.set_num_threads(1)
    starts = [time.perf_counter()]
    tokenizer = AutoTokenizer.from_pretrained(folder / "sft/model", padding_side="left")
    rollouts = settings["batch_size"] * settings["num_responses"]
    rows = records.read_rows(folder / "world/rl.jsonl")
    order = np.random.default_rng(1).permutation(len(rows))
    order = np.resize(order, updates * settings["batch_size"]).repeat(settings["num_responses"])
    ids = [{"input_ids": tokenizer(rows[i]["prompt"])["input_ids"]} for i in order]

    class Clock(TrainerCallback):
        def on_train_begin(self, *_, **__):
            starts[0] = time.perf_counter()

        def on_step_end(self, *_, **__):
            starts.append(time.perf_counter())
            after()

    causal, scalar = AutoModelForCausalLM, AutoModelForSequenceClassification
    with tempfile.TemporaryDirectory() as out:
        # per_device_train_batch_size counts rollouts; they are cut into num_mini_batches, one optimizer step each
        config = PPOConfig(
            output_dir=out,
            per_device_train_batch_size=rollouts,
            gradient_accumulation_steps=1,
            total_episodes=updates * rollouts,
            num_mini_batches=rollouts // settings["minibatch_size"],
            num_ppo_epochs=settings["noptepochs"],
            learning_rate=settings["lr"],
            local_rollout_forward_batch_size=settings["forward_batch_size"],
            response_length=settings["response_length"],
            temperature=1.0,
            stop_token="eos",
            missing_eos_penalty=1.0,
            gradient_checkpointing=checkpointing,
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
            model=causal.from_pretrained(folder / "sft/model"),
            ref_model=causal.from_pretrained(folder / "sft/model"),
            reward_model=scalar.from_pretrained(folder / "rm/model", num_labels=1),
            value_model=scalar.from_pretrained(folder / "rm/model", num_labels=1),
            train_dataset=Dataset.from_list(ids),
            eval_dataset=Dataset.from_list(ids[:8]),
            callbacks=[Clock()],
        )
        trainer.train()
    return [{"seconds/update": float(seconds)} for seconds in np.diff(starts)]


def products(load: Workload, kept: float, length: float) -> dict[str, float]:
    """Multiplications and additions of the matrix products of one update, by phase: `kept` of 5 responses of a
    prompt are trained on, responses have `length` tokens on average, nothing is padded. A token costs 2 per weight
    of a block and 4 · width per token before it; the policy's last layer is read at responses alone; backward costs
    twice as much as forward."""
    rows, tokens = load.prompts * RESPONSES, load.query + length

    def passes(rows: float, tokens: float, start: float = 0.0) -> float:
        """Blocks over the last tokens - start columns of each row."""
        before = (tokens**2 - start**2) / 2
        return rows * load.layers * (24 * load.width**2 * (tokens - start) + 4 * load.width * before)

    head = 2 * load.width * load.vocabulary * length
    policy, other = passes(1, tokens) + head, passes(1, tokens)
    return {
        "generate": passes(load.prompts, load.query) + passes(rows, tokens, load.query) + rows * head,
        "score": rows * other,
        "logprobs": rows * kept * (2 * policy + other),
        "train": rows * kept * EPOCHS * 3 * (policy + other),
    }


def product_rate(rows: int, width: int, seconds: float = 0.5) -> float:
    """Operations per second of the two products of a block's MLP, (rows, width) by (width, 4 width) and back; the
    best of many."""
    import torch

    x, up, down = torch.randn(rows, width), torch.randn(width, 4 * width), torch.randn(4 * width, width)
    best, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        x @ up @ down
        best = min(best, time.perf_counter() - start)
    return 16 * rows * width**2 / best


def floor_seconds(load: Workload, kept: float, length: float) -> float:
    """Seconds of the products of one update: sampling at the rate of its rows, all else at that of a pass."""
    import torch

    torch.set_num_threads(1)
    needed = products(load, kept, length)
    sampling = product_rate(load.prompts * RESPONSES, load.width)
    whole = product_rate(load.micro_batch * (load.query + load.response), load.width)
    return needed["generate"] / sampling + sum(needed[phase] for phase in PHASES[1:]) / whole


def kind_of(operation: str, shapes: list, load: Workload) -> str:
    """What an operation of torch belongs to, by its name or by the last axis of what it reads."""
    for kind, pattern in NAMES.items():
        if re.search(pattern, operation):
            return kind
    last = {shape[-1] for shape in shapes if shape and isinstance(shape[-1], int)}
    if load.vocabulary in last:
        return "over the vocabulary"
    return "activation" if 4 * load.width in last else "other operations"


class Profile:
    """Seconds of the last of so many updates by kind of operation, one call behind each update."""

    def __init__(self, updates: int):
        from torch.profiler import ProfilerActivity, profile

        self.left, self.start = updates, 0.0
        self.profiler = profile(activities=[ProfilerActivity.CPU], record_shapes=True)

    def __call__(self) -> None:
        self.left -= 1
        if self.left == 1:
            self.profiler.start()
            self.start = time.perf_counter()
        elif self.left == 0:
            self.seconds = time.perf_counter() - self.start
            self.profiler.stop()

    def kinds(self, load: Workload) -> dict[str, float]:
        """An operation counts without those that it calls; what is left is time between operations."""
        found = dict.fromkeys(KINDS, 0.0)
        for event in self.profiler.key_averages(group_by_input_shape=True):
            if event.key.startswith("Optimizer."):
                continue
            found[kind_of(event.key, event.input_shapes, load)] += event.self_cpu_time_total / 1e6
        found["between operations"] = self.seconds - sum(found.values())
        return found


def measure(args: Args) -> dict:
    """What one way took: seconds of its updates, by phase where there are phases, megabytes at the peak; or
    seconds of one update by kind of operation."""
    name = args.workloads[0]
    load, folder = WORKLOADS.get(name), Path(args.world or Path(args.output_dir, name))
    settings = settings_of(load)
    profile = Profile(args.updates) if args.profile else lambda: None
    if args.way.startswith("trl"):
        rows = trl_updates(folder, settings, args.way == "trl_checkpointing", args.updates, profile)[1:]
    else:
        rows = our_updates(folder, settings, args.way, args.updates, profile)[1:]
    if args.profile:
        return {"seconds": [profile.seconds], **profile.kinds(load)}
    megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    taken = {"seconds": [row["seconds/update"] for row in rows], "megabytes": megabytes}
    for phase in PHASES:
        if f"seconds/{phase}" in rows[0]:
            taken[phase] = float(np.median([row[f"seconds/{phase}"] for row in rows]))
    if load is not None and not args.way.startswith("trl"):
        length = float(np.mean([row["objective/length"] for row in rows]))
        taken["floor"] = floor_seconds(load, 2 / RESPONSES if args.way == "br" else 1.0, length)
    return taken


def table(name: str, found: dict[str, list[dict]]) -> str:
    """Rounds of each way -> one row a way: median and fastest seconds, ratios to TRL at its faster setting."""
    seconds = {way: np.concatenate([round_["seconds"] for round_ in rounds]) for way, rounds in found.items()}
    trl = min((float(np.median(x)) for way, x in seconds.items() if way.startswith("TRL")), default=math.nan)
    lines = ["| way | s / update | fastest | TRL's / this | floor | " + " | ".join(PHASES) + " | MB |"]
    lines += ["|" + "---|" * (6 + len(PHASES))]
    for way, rounds in found.items():
        parts = [
            np.median([r[phase] for r in rounds]) if phase in rounds[0] else math.nan for phase in PHASES
        ]
        floor = min((r["floor"] for r in rounds if "floor" in r), default=math.nan)
        numbers = [np.median(seconds[way]), seconds[way].min(), trl / np.median(seconds[way]), floor, *parts]
        cells = ["" if math.isnan(x) else f"{x:.2f}" for x in numbers]
        lines += [f"| {way} | {' | '.join(cells)} | {max(r['megabytes'] for r in rounds):.0f} |"]
    return f"{name}\n" + "\n".join(lines)


def profile_table(name: str, found: dict[str, list[dict]]) -> str:
    """One row a kind of operation, one column a way: seconds in one update, medians over the rounds."""
    lines = [f"| {name} | {' | '.join(found)} |", "|" + "---|" * (1 + len(found))]
    for kind in (*KINDS, "all"):
        of_way = [
            np.median([r["seconds"][0] if kind == "all" else r[kind] for r in rounds])
            for rounds in found.values()
        ]
        lines += [f"| {kind} | {' | '.join(f'{x:.2f}' for x in of_way)} |"]
    return "\n".join(lines)


def main(args: Args) -> None:
    unknown = [name for name in args.workloads if name not in (*WORKLOADS, "world")]
    if unknown:
        raise SystemExit(f"--workloads {unknown[0]}: give some of {', '.join(WORKLOADS)}, world")
    if args.updates < 2 or args.rounds < 1:
        raise SystemExit("--updates must be at least 2 (the first is not counted) and --rounds at least 1")
    if args.profile and "world" in args.workloads:
        raise SystemExit("--profile knows the sizes of mini, small and ragged alone")
    for part in ("world/rl.jsonl", "sft/model", "rm/model") if "world" in args.workloads else ():
        if args.world is None or not Path(args.world, part).exists():
            raise SystemExit(f"--world {args.world}: no {part}; give a folder of benchmark.quickstart")
    if args.way:
        print(json.dumps(measure(args)))
        return
    quiet = dict(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", TRL_EXPERIMENTAL_SILENCE="1")
    os.environ.update(quiet, HF_HUB_OFFLINE="1", ACCELERATE_USE_CPU="true")
    ways = dict(WAYS)
    if importlib.util.find_spec("trl") is None or importlib.util.find_spec("trl.experimental.ppo") is None:
        print(
            "TRL's PPOTrainer is missing (this file's docstring says how to add it): ours alone", flush=True
        )
        ways = {name: way for name, way in WAYS.items() if not name.startswith("TRL")}
    output_dir = Path(args.output_dir)
    for name in args.workloads:
        if name in WORKLOADS and not (output_dir / name / "world/rl.jsonl").exists():
            make_models(output_dir / name, WORKLOADS[name])
    results = {"hardware": records.hardware(), "commit": records.commit(), "workloads": {}}
    for name in args.workloads:
        found = results["workloads"][name] = {way: [] for way in ways}
        for _ in range(args.rounds):
            for way, flag in ways.items():
                command = [
                    sys.executable,
                    "-m",
                    "benchmark.study.ppo_speed",
                    "--workloads",
                    name,
                    "--way",
                    flag,
                ]
                command += ["--updates", str(args.updates), "--output_dir", str(output_dir)]
                command += ["--world", args.world] if name == "world" else []
                command += ["--profile"] if args.profile else []
                done = subprocess.run(command, capture_output=True, text=True, cwd=records.ROOT)
                if done.returncode:
                    raise SystemExit(f"{name}, {way} failed:\n{done.stderr[-3000:]}")
                found[way].append(json.loads(done.stdout.splitlines()[-1]))
                print(f"{name}, {way}: {np.median(found[way][-1]['seconds']):.2f} s per update", flush=True)
            records.write_json(output_dir / "results.json", results)
        print(f"\n{(profile_table if args.profile else table)(name, found)}\n", flush=True)
    print(f"{results['hardware']}, one thread, commit {results['commit']}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
