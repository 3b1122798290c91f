"""What one rank needs, phase by phase, from a model's configuration alone: nothing is loaded, no GPU is asked.

  python benchmark/memory_plan.py --policy deepseek-ai/deepseek-coder-6.7b-base --processes 8 --gpu_gb 80 \\
    --shard --frozen_dtype bfloat16 --gradient_checkpointing --query_length 1024 --response_length 1024
  python benchmark/memory_plan.py --script sft --policy gpt2 --processes 1 --gpu_gb 24 --mixed_precision no

--policy is a folder, a file config.json or a hub id. Every other flag goes to the script (--script pfppo, rm or
sft); files of rows need not exist, and a reward model that does not exist yet is as large as the policy.

State is counted: weights, gradients and Adam's moments of what trains take 4 + 4 + 8 bytes a number, frozen
weights 2 or 4, divided by the processes under --shard. What comes and goes is simulated (study/simulate.py), for
rows as long as query_length + response_length allows, so real runs need less. Linux processes needed what
is planned here within 15% (results/2026-11-26-memory-plan), an H100 within 2% (results/2026-11-26-gpu-speed).
"""

import argparse
import importlib
import sys
from collections import Counter
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

import pfppo_single as pfppo
from benchmark.study.simulate import Plan, backbone, frozen_dtype, inside, models, numbers, simulate, split

USABLE = 0.9  # the rest: CUDA's context, workspaces of kernels, fragments
GENERATION, FORWARD, MICRO = "generation_batch_size", "forward_batch_size", "micro_batch_size"
PHASES = {  # phase -> the size that it depends on
    "sft": {"evaluate": FORWARD, "train": MICRO},
    "rm": {"generate": FORWARD, "score": FORWARD, "train": MICRO},
    "pfppo": {"generate": GENERATION, "score": FORWARD, "logprobs": FORWARD, "train": MICRO},
}
COLUMNS = ("weights", "gradients", "adam", "frozen", "copies", "cache", "activations", "logits")


def state(plan: Plan, phase: str) -> Counter:
    """Bytes that stay between the phases."""
    trained, frozen = (numbers(*part) for part in split(plan))
    shards = plan.world if plan.args.shard else 1
    size = frozen_dtype(plan).itemsize
    found = Counter(weights=4 * trained // shards, adam=8 * trained // shards, frozen=size * frozen // shards)
    if plan.script == "rm" and not plan.config.tie_word_embeddings:  # its output layer, for train/kl
        found["weights"] += 4 * models(plan)["ref"].get_output_embeddings().weight.numel() // shards
    buckets = plan.world > 1 and not plan.args.shard  # DDP keeps its gradients
    if phase == "train" or buckets:
        found["gradients"] = 4 * trained // shards
    if phase == "loading":
        found["adam"] = 0
    return found


def blocks(model: nn.Module) -> list[nn.Module]:
    """The parts that `place` shards one by one."""
    names = getattr(backbone(model), "_no_split_modules", None) or ()
    return [module for module in backbone(model).modules() if type(module).__name__ in names]


def gathered(plan: Plan, phase: str) -> int:
    """Bytes of weights gathered from the other ranks: whole models where nothing trains. In training what is
    outside of the blocks (embedding, output), two blocks, gradients of one, and those in float32 to be sent."""
    if not plan.args.shard:
        return 0
    size = 2 if plan.bf16 else 4
    if phase != "train":
        return size * numbers(*inside(plan, phase))
    trained = split(plan)[0]
    rest = sum(numbers(model) - numbers(*blocks(model)) for model in trained)
    largest = max(numbers(block) for model in trained for block in blocks(model) or [model])
    return size * (rest + 3 * largest) + 4 * largest


def phase_memory(plan: Plan, phase: str, rows: int = 0) -> Counter:
    """Bytes on the device of one rank at the worst moment of a phase, by kind (COLUMNS)."""
    found = state(plan, phase)
    trained, frozen = split(plan)
    if phase in ("loading", "save"):  # one weight whole, on its way to the ranks or to rank 0
        largest = max(x.numel() for model in trained + frozen for x in model.parameters())
        return found + Counter(copies=4 * largest if plan.args.shard else 0)
    found += simulate(plan, phase, rows) + Counter(copies=gathered(plan, phase))
    step = state(plan, phase)  # Adam's step, when activations are gone: on a GPU a root of all second moments
    step["activations"] = step["weights"] if plan.device == "cuda" else 0
    return max(found, step, key=Counter.total) if phase == "train" else found


def host_memory(plan: Plan, phase: str) -> int:
    """Bytes beside the device, of rank 0 under --shard, else of every rank: the largest model while it is read,
    or the larger of the policy that is saved and of what this rank reads of a checkpoint when a run goes on."""
    trained, frozen = split(plan)
    if phase == "loading":
        return 4 * max(map(numbers, trained + frozen))
    return max(4 * numbers(trained[0]), 12 * numbers(*trained) // (plan.world if plan.args.shard else 1))


def most_rows(plan: Plan) -> dict[str, int]:
    """Size -> rows that a rank has for it at all."""
    args = plan.args
    if plan.script != "pfppo":
        return {FORWARD: 4096, MICRO: -(-args.batch_size // plan.world)}
    rows = args.batch_size * args.num_responses // plan.world
    return {GENERATION: rows, FORWARD: rows, MICRO: -(-args.minibatch_size // plan.world)}


def sizes(plan: Plan) -> dict[str, int]:
    """The sizes as the script takes them, at most the rows that a rank has."""
    args, most = plan.args, most_rows(plan)
    given = {name: getattr(args, name) or args.forward_batch_size for name in most}
    return {name: min(given[name], most[name]) for name in most}


def largest(plan: Plan, room: float) -> dict[str, int]:
    """Size -> the most rows, of those that a rank has, with which every phase fits into `room` bytes; found
    along a line through few and all rows, and once more through few and those found. 0: none."""
    found = most_rows(plan)
    for phase, size in PHASES[plan.script].items():
        step = plan.args.num_responses if size == GENERATION else 1
        few = max(step, 4 // step * step)
        for _ in range(2):
            rows = found[size]
            low, high = (phase_memory(plan, phase, count).total() for count in (few, rows))
            if high > room:
                slope = max((high - low) / max(rows - few, 1), 1.0)
                rows = few + int((room - low) / slope)
            found[size] = max(0, rows // step * step)
            if found[size] <= few:
                break
    return found


def advice(plan: Plan, phase: str) -> str:
    """What to change where a phase does not fit, what costs least first."""
    args, flags = plan.args, []
    if plan.script != "sft" and frozen_dtype(plan) == torch.float32:
        flags.append("--frozen_dtype bfloat16")
    if phase == "train" and not args.gradient_checkpointing:
        flags.append("--gradient_checkpointing")
    if phase in PHASES[plan.script]:
        flags.append(f"a lower --{PHASES[plan.script][phase]}")
    if plan.script == "pfppo" and args.critic == "separate":
        flags.append("--critic shared")
    flags.append("more processes" if args.shard else "--shard on more processes")
    return ", ".join([*flags, "a lower --response_length"])


def table(plan: Plan) -> dict[str, tuple[int, Counter]]:
    """Phase -> rows, bytes by kind."""
    rows = sizes(plan)
    phases = {"loading": 0, **{phase: rows[size] for phase, size in PHASES[plan.script].items()}, "save": 0}
    return {phase: (count, phase_memory(plan, phase, count)) for phase, count in phases.items()}


def last_line(plan: Plan, gpu_gb: float) -> str:
    """The answer in one line."""
    phase, (_, found) = max(table(plan).items(), key=lambda item: item[1][1].total())
    need, room = found.total() / 1e9, gpu_gb * USABLE
    where = f"{need:.1f} GB on each of {plan.world} processes ({phase}), of {gpu_gb:g} ({room:g} usable)"
    return (
        f"memory: {where}: it fits" if need <= room else f"memory: {where}: too much; {advice(plan, phase)}"
    )


def report(plan: Plan, gpu_gb: float) -> str:
    """Table of phases, host memory, largest sizes, last line."""
    trained, frozen = split(plan)
    flags = "bf16" if plan.bf16 else "float32"
    flags += ", --shard" if plan.args.shard else ""
    counts = f"{numbers(*trained) / 1e9:.2f} billion weights train, {numbers(*frozen) / 1e9:.2f} are frozen"
    lines = [
        f"{plan.script}_single.py, {counts}; {plan.world} processes, {flags}; GB (10^9 bytes) a rank",
        "",
    ]
    lines.append("| phase | rows | " + " | ".join(COLUMNS) + " | all |")
    lines.append("|---" * (len(COLUMNS) + 3) + "|")
    for phase, (rows, found) in table(plan).items():
        values = [f"{found[name] / 1e9:.1f}" for name in COLUMNS]
        lines.append(f"| {phase} | {rows or ''} | {' | '.join(values)} | {found.total() / 1e9:.1f} |")
    who = "rank 0" if plan.args.shard else "every rank"
    host = [f"{host_memory(plan, phase) / 1e9:.1f} GB while {phase}" for phase in ("loading", "saving")]
    fits = [f"--{size} {rows}" for size, rows in largest(plan, gpu_gb * 1e9 * USABLE).items()]
    lines += ["", f"Beside the device, {who}: {', '.join(host)}. Largest that fit: {' '.join(fits)}"]
    return "\n".join([*lines, last_line(plan, gpu_gb)])


def read_plan(argv: list[str]) -> tuple[Plan, float]:
    """Command line -> plan, GB of a device."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("--policy", required=True, help="folder, config.json or hub id")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--gpu_gb", type=float, default=80.0)
    parser.add_argument("--script", choices=PHASES, default="pfppo")
    parser.add_argument("--mixed_precision", choices=("no", "bf16"), default="bf16")
    own, flags = parser.parse_known_args(argv)
    module, placeholder = importlib.import_module(f"{own.script}_single"), "as the policy"
    given = {"pfppo": ("--policy", own.policy, "--reward", placeholder, "--prompts", "-")}
    given |= dict.fromkeys(("sft", "rm"), ("--model", own.policy, "--train_data", "-"))
    argv = [*given[own.script], *flags]
    args = module.parse_args(module.Args, argv, getattr(module, "PRESETS", None))
    module.check_ranges(args)
    config = pfppo.load_config(own.policy, "policy")
    judges = []
    for path in (getattr(args, "reward", None), getattr(args, "critic_init", None)):
        known = path not in (None, placeholder) and ":" not in path and Path(path).exists()
        judges.append(pfppo.load_config(path, "reward") if known else None)
    settings = dict(world=own.processes, bf16=own.mixed_precision == "bf16")
    return make_plan(own.script, args, config, *judges, **settings), own.gpu_gb


def make_plan(script: str, args, config, reward=None, critic=None, **settings) -> Plan:
    """A plan from configurations. A reward model that has none yet is as the policy, a critic as the reward
    model."""
    if script != "pfppo":
        return Plan(script, args, config, **settings)
    judge = None if ":" in args.reward else reward or config
    critic = None if args.critic == "shared" else critic or judge or config
    return Plan(script, args, config, judge, critic, **settings)


if __name__ == "__main__":
    print(report(*read_plan(sys.argv[1:])))
