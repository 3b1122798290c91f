"""Communication against compute under --shard, by arithmetic: what pages/scaling.md prints.

python -m benchmark.study.scaling
python -m benchmark.study.scaling --weights 33e9 --layers 62 --hidden 7168
"""

import argparse
from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """Stated assumptions, not measurements: an 8-GPU node of the H100 kind. Bytes and operations a second."""

    node: int = 8
    """GPUs in a node"""
    flops: float = 400e12
    """bf16 operations a second that training reaches, 40% of the peak"""
    memory: float = 3.0e12
    """bytes a second that a GPU reads of its own memory"""
    inside: float = 300e9
    """bytes a second of a GPU to the others of its node"""
    outside: float = 25e9
    """bytes a second of one GPU's network card, 200 Gbit/s; the cards of a node share what it gathers"""


@dataclass(frozen=True)
class Job:
    """One update of PF-PPO with a separate critic."""

    weights: float = 6.7e9
    """of one model; the four are equally large"""
    layers: int = 32
    hidden: int = 4096
    rows: int = 960
    """responses per update, over all ranks (192 prompts x 5)"""
    kept: int = 384
    """rows that are trained on"""
    epochs: int = 3
    micro: int = 4
    """rows per rank in one forward and backward pass"""
    generation: int = 10
    """responses per rank that are generated at a time"""
    query: int = 1024
    response: int = 1024


def gather_seconds(size: float, world: int, machine: Machine) -> float:
    """Seconds until every rank holds `size` bytes that lie spread over all: (world - 1) / world of them pass every
    link inside a node; between nodes a ring through every card carries its part."""
    shared = machine.inside if world <= machine.node else min(machine.inside, machine.node * machine.outside)
    return size * (world - 1) / world / shared


def seconds(job: Job, world: int, machine: Machine = Machine()) -> dict[str, float]:
    """Compute and communication per update of one rank, in seconds, nothing overlapping."""
    tokens = job.query + job.response
    rows, kept = -(-job.rows // world), -(-job.kept // world)
    # forward 2 operations a weight and token, backward 4, recomputed activations 2; policy and critic
    train = 8 * 2 * job.weights * kept * tokens * job.epochs / machine.flops
    # no-grad passes: reward on all rows, policy, critic and reference on kept ones
    score = 2 * job.weights * tokens * (rows + 3 * kept) / machine.flops
    # a token of all rows of a batch reads all weights and, on average, three quarters of the full cache
    batch = min(job.generation, rows)
    cache = 4 * job.layers * job.hidden * batch * (job.query + job.response / 2)
    generate = -(-rows // job.generation) * job.response * (2 * job.weights + cache) / machine.memory
    # `whole`: four models in bfloat16, the policy twice
    whole = 5 * gather_seconds(2 * job.weights, world, machine)
    # a micro-batch gathers policy and critic in bfloat16 forward and backward, and scatters gradients in float32
    rounds = job.epochs * -(-kept // job.micro)
    scatter = rounds * 2 * (2 * 2 + 4) * gather_seconds(job.weights, world, machine)
    compute = {"generate": generate, "score": score, "train": train}
    return compute | {"gather whole": whole, "gather and scatter in training": scatter}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=float, default=Job.weights)
    parser.add_argument("--layers", type=int, default=Job.layers)
    parser.add_argument("--hidden", type=int, default=Job.hidden)
    parser.add_argument(
        "--outside", type=float, default=Machine.outside, help="bytes a second of a network card"
    )
    given = vars(parser.parse_args())
    machine = Machine(outside=given.pop("outside"))
    for text, scale in (("960 responses in all", False), ("120 responses a GPU", True)):
        print(
            f"{text}\n\n| GPUs | generate | score | train | gather whole | train: gather, scatter | share |"
        )
        print("|---|---|---|---|---|---|---|")
        for world in (8, 64, 512):
            factor = world // 8 if scale else 1
            found = seconds(Job(rows=960 * factor, kept=384 * factor, **given), world, machine)
            values = list(found.values())
            share = sum(values[3:]) / sum(values)
            print(f"| {world} | {' | '.join(f'{x:.1f}' for x in values)} | {share:.0%} |")
        print()


if __name__ == "__main__":
    main()
