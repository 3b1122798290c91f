"""Speed and memory of PPO updates of a model of published size, random weights, on one GPU under bf16.

    python -m benchmark.study.gpu_speed --model qwen2.5-0.5b --output_dir output/gpu

Prints seconds by phase, tokens per second of generation beside what reading the weights allows, training beside
the rate of large matrix products (both measured here), the largest memory of every phase beside that of
benchmark/memory_plan.py, and the kernels that take most time. Rows are all of full length: nothing stops. The
first update of a run is left out of the seconds. On a CPU it only shows that it runs.
"""

import json
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import pfppo_single as pfppo
from benchmark import memory_plan, records
from benchmark.study import memory_peaks

LLAMA = dict(kind="llama", tie_word_embeddings=False)
MODELS = {
    "qwen2.5-0.5b": dict(
        kind="qwen2",
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=151936,
        tie_word_embeddings=True,
        rope_theta=1e6,
    ),
    "deepseek-coder-1.3b": LLAMA
    | dict(
        hidden_size=2048,
        intermediate_size=5504,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=32256,
    ),
    "tiny": LLAMA
    | dict(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=200,
    ),
}
SPANS = {"generate": "sample_rollout", "score": "score_rollout", "logprobs": "response_logprobs_and_values"}
PHASES = (*SPANS, "train")


@dataclass(kw_only=True)
class Args:
    model: str = "qwen2.5-0.5b"
    """one of MODELS"""
    output_dir: str = "output/gpu_speed"
    """result.json, result.md; the model's folders"""
    updates: int = 3
    """updates, the first of which is not counted"""
    prompts: int = 64
    """prompts per update, 5 responses each"""
    query_length: int = 256
    """tokens"""
    response_length: int = 256
    """tokens"""
    filter: str = "br"
    """br or none"""
    micro_batch_size: int = 16
    """rows in a forward and backward pass"""
    forward_batch_size: int = 32
    """rows in a pass without gradient"""
    gradient_checkpointing: bool = False
    """recompute activations"""
    profile: bool = False
    """one more update under torch's profiler"""


def rates() -> dict[str, float]:
    """This device: bytes per second read and written, operations per second of a bf16 product."""
    cuda = torch.cuda.is_available()
    device, size = ("cuda", 8192) if cuda else ("cpu", 512)
    x, y = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    z = torch.empty(8 * size * size, device=device)

    def best(work, repeats=10):
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            work()
            if cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    return {
        "bandwidth": 8 * z.numel() / best(lambda: torch.add(z, 1, out=z)),
        "products": 2 * size**3 / best(lambda: x @ y),
    }


def bounds(config, args: Args, weights: int, rate: dict) -> dict[str, float]:
    """Seconds of one update that nothing can be below: generation reads all weights in bf16, and keys and
    values of its rows, once a token; training needs 6 operations a weight and token of policy and critic."""
    rows, q, r = 5 * args.prompts, args.query_length, args.response_length
    heads = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    cache = 2 * 2 * config.num_hidden_layers * heads * rows * sum(q + t for t in range(r))
    kept = rows if args.filter == "none" else 2 * args.prompts
    output = config.vocab_size * config.hidden_size
    body = weights - output * (1 if config.tie_word_embeddings else 2)
    tokens = 3 * kept * (q + r)  # three epochs
    operations = 6 * (2 * body * tokens + output * 3 * kept * r)
    attention = 2 * 12 * config.num_hidden_layers * config.hidden_size * 3 * kept * (q + r) ** 2 / 2
    return {
        "generate": (2 * weights * r + cache) / rate["bandwidth"],
        "train": (operations + attention) / rate["products"],
    }


def watch(peaks: dict[str, int]) -> None:
    """From now on the script's functions note the largest memory of their phase in `peaks`."""
    cuda = torch.cuda.is_available()

    def note(phase):
        if cuda:
            peaks[phase] = max(peaks.get(phase, 0), torch.cuda.max_memory_allocated())
            torch.cuda.reset_peak_memory_stats()

    def wrap(name, before, after):
        original = getattr(pfppo, name)

        def wrapped(*args, **kwargs):
            note(before) if before else None
            result = original(*args, **kwargs)
            note(after)
            return result

        setattr(pfppo, name, wrapped)

    for phase, name in SPANS.items():
        wrap(name, "between", phase)
    wrap("log_metrics", "train", "between")


def measure(args: Args, folder: Path) -> dict:
    """One run: metrics of its updates, peaks, and what the plan says."""
    model = MODELS[args.model]
    if not (folder / "rows.jsonl").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        default = "cuda" if torch.cuda.is_available() else "cpu"
        with torch.device(default):
            memory_peaks.write_inputs(
                folder, model, 2 * args.prompts, args.query_length, args.response_length
            )
    settings = dict(
        policy=str(folder / "policy"),
        reward=str(folder / "reward"),
        prompts=str(folder / "rows.jsonl"),
        output_dir=str(folder / "run"),
        batch_size=args.prompts,
        num_responses=5,
        filter=args.filter,
        query_length=args.query_length,
        response_length=args.response_length,
        stop_token="none",
        total_episodes=5 * args.prompts * args.updates,
        minibatch_size=min(64, 2 * args.prompts),
        micro_batch_size=args.micro_batch_size,
        forward_batch_size=args.forward_batch_size,
        generation_batch_size=5 * args.prompts,
        normalize_reward=False,
        print_samples_every=0,
        checkpoint_every=10**6,
        gradient_checkpointing=args.gradient_checkpointing,
    )
    pfppo.check_model = lambda *_: None  # random weights are not what it is made for
    pfppo.save_checkpoint = pfppo.save_model = lambda *_: None
    peaks, script = {}, pfppo.Args(**settings)
    watch(peaks)
    pfppo.main(script)
    config = pfppo.load_config(settings["policy"], "policy")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    plan = memory_plan.make_plan("pfppo", script, config, world=1, bf16=True, device=device)
    planned = {phase: found.total() for phase, (_, found) in memory_plan.table(plan).items()}
    rows = records.read_rows(folder / "run/metrics.jsonl")
    seconds = {x: min(row[f"seconds/{x}"] for row in rows[1:]) for x in (*PHASES, "update")}
    keep = ("objective/kl", "ppo/policy/first_ratio", "ppo/policy/first_ratio_max", "ppo/grad_norm")
    found = {"seconds": seconds, "peaks": peaks, "planned": planned, "first": {x: rows[0][x] for x in keep}}
    weights = sum(x.numel() for x in pfppo.load_causal_lm(settings["policy"], torch.bfloat16).parameters())
    return found | {"weights": weights, "config": config}


def report(args: Args, found: dict, rate: dict) -> str:
    """Tables of one run."""
    seconds, bound = found["seconds"], bounds(found["config"], args, found["weights"], rate)
    tokens = 5 * args.prompts * args.response_length
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    lines = [
        f"{args.model}: {found['weights'] / 1e9:.2f}e9 weights, {args.prompts} prompts x 5, {args.query_length} + "
        f"{args.response_length} tokens, filter {args.filter}, micro-batch {args.micro_batch_size}",
        f"{name}: {rate['bandwidth'] / 1e12:.2f} TB/s, {rate['products'] / 1e12:.0f} TFLOP/s in bf16; "
        f"{records.hardware()}; commit {records.commit()}",
        f"generation {tokens / seconds['generate']:.0f} tokens/s, bound {tokens / bound['generate']:.0f}",
        "",
        "| phase | seconds | bound | peak GB | planned GB | planned / peak |",
        "|---|---|---|---|---|---|",
    ]
    for phase in PHASES:
        peak, planned = found["peaks"].get(phase, 0) / 1e9, found["planned"][phase] / 1e9
        share = f"{planned / peak:.2f}" if peak else ""
        low = f"{bound[phase]:.2f}" if phase in bound else ""
        lines.append(f"| {phase} | {seconds[phase]:.2f} | {low} | {peak:.1f} | {planned:.1f} | {share} |")
    lines += [f"| update | {seconds['update']:.2f} | | | | |", ""]
    lines.append("first update: " + ", ".join(f"{tag} {value:.5g}" for tag, value in found["first"].items()))
    return "\n".join(lines)


def main(args: Args) -> None:
    pfppo.refuse((args.model not in MODELS, f"--model {args.model}: choose from {', '.join(MODELS)}"))
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    folder = Path(args.output_dir)
    rate = rates()
    if args.profile:
        from torch.profiler import ProfilerActivity, profile

        kinds = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * torch.cuda.is_available()]
        with profile(activities=kinds) as watched:
            found = measure(args, folder)
        by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        text = watched.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=80)
        records.write_text(folder / "profile.txt", re.sub(r" +$", "", text, flags=re.MULTILINE))
        return
    found = measure(args, folder)
    text = report(args, found, rate)
    print(text, flush=True)
    found["config"] = found["config"].to_dict()
    records.write_text(folder / "result.json", json.dumps({**found, "rate": rate}, indent=1, default=str))
    records.write_text(folder / "result.md", text + "\n")


if __name__ == "__main__":
    main(pfppo.parse_args(Args))
