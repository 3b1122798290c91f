"""The paper's run as commands: SFT, preference data, reward model, R² of the filters, PF-PPO, pass@1.

  python -m benchmark.recipes.paper --size 6.7b --data_dir data             # prints the commands: 8 x 80 GB
  python -m benchmark.recipes.paper --size 1.3b --data_dir data --run       # runs them: 2 x 80 GB
  python -m benchmark.recipes.paper --size 6.7b --memory                    # plans memory per phase, loads nothing
  python -m benchmark.recipes.paper --small --run                           # everything in small, two CPU processes

Data: `sft.jsonl` (prompt, response: `--write_sft` makes it of all rows of Magicoder-OSS-Instruct-75K and
evol-codealpaca-v1 on the hub; PAPER: 75k and 55k) and, which you bring, `preference.jsonl` (PAPER: 7k), `rl.jsonl`
(3k), `valid.jsonl`: prompt, tests, entry_point, as benchmark.rewards:oracle reads them. A stage that was killed
goes on with the same command.

The paper's numbers: epochs, learning rates, N, β, m, 5 passes (total_episodes). Ours: batch sizes, which the
paper does not give for all stages; 192 x 5 responses per update is nearest to its launch line's 1024 that eight
ranks and minibatches of 128 divide. `--small` keeps stages, launcher, --shard, bf16 and architecture, and
shrinks the model to 0.4 million weights and the data to benchmark.minicode, with higher learning rates.

Planned GB of a rank at the worst moment of each phase, of 80 (results/2026-11-26-memory-plan; `--memory`):

              6.7B on 8                      1.3B on 2
              sample  no gradient  train     sample  no gradient  train
  SFT         -       34.2         20.6      -       21.3         14.6
  RM          42.7    26.5         25.6      18.5    12.6         16.0
  PF-PPO      59.1    52.7         40.1      37.9    26.3         28.9

Run: `--small` as a whole (results/2026-11-26-paper-small). Not run: 6.7B, 1.3B, several GPUs.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from benchmark.pipeline import flags
from benchmark.records import ROOT, write_rows

DEEPSEEK = dict(vocab_size=32256, max_position_embeddings=16384, tie_word_embeddings=False, rms_norm_eps=1e-6)
DEEPSEEK |= dict(rope_parameters={"rope_type": "linear", "rope_theta": 100000.0, "factor": 4.0})
LARGE = dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
MIDDLE = dict(hidden_size=2048, intermediate_size=5504, num_hidden_layers=24, num_attention_heads=16)
SMALL = dict(hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4)


class Size(NamedTuple):
    model: str
    processes: int
    config: dict
    """what of LlamaConfig memory depends on"""
    generation: int
    """responses per rank that are generated at a time; the next ones are rows per rank"""
    forward: int
    micro: int


SIZES = {
    "6.7b": Size("deepseek-ai/deepseek-coder-6.7b-base", 8, {**DEEPSEEK, **LARGE}, 10, 8, 4),
    "1.3b": Size("deepseek-ai/deepseek-coder-1.3b-base", 2, {**DEEPSEEK, **MIDDLE}, 20, 8, 4),
    "small": Size(
        "", 2, {**DEEPSEEK, **SMALL, "vocab_size": 256, "max_position_embeddings": 256}, 640, 128, 32
    ),
}
GPU_GB = 80


class Stage(NamedTuple):
    name: str
    script: str
    """file or module"""
    settings: dict
    processes: int
    done: str
    """file or folder that is there when the stage is over"""


def stages(name: str, data: Path, out: Path) -> list[Stage]:
    """All commands of a size; the paper's numbers, and in small what a test has time for."""
    size, small = SIZES[name], name == "small"
    p, sft, rm = size.processes, out / "sft/model", out / "rm/model"
    lengths = (
        dict(query_length=128, response_length=48) if small else dict(query_length=1024, response_length=1024)
    )
    shard = dict(shard=True, gradient_checkpointing=True, micro_batch_size=size.micro, **lengths)
    frozen = {**shard, "frozen_dtype": "bfloat16", "forward_batch_size": size.forward}
    oracle = "benchmark.minicode:oracle" if small else "benchmark.rewards:oracle"

    tuning = dict(model=size.model, train_data=data / "sft.jsonl", epochs=5, lr=1e-5, batch_size=128, **shard)
    samples = dict(
        policy=sft, prompts=data / "preference.jsonl", actual_score=oracle, num_samples=5, **lengths
    )
    samples |= dict(dtype="bfloat16", generation_batch_size=size.generation)
    pairs = out / "preferences"
    reward = dict(
        model=sft, train_data=pairs / "pairs.jsonl", eval_data=pairs / "valid.jsonl", epochs=1, lr=1e-5
    )
    reward |= dict(normalize_prompts=data / "preference.jsonl", batch_size=128, **frozen)
    r2 = dict(
        policy=sft, reward=rm, prompts=data / "rl.jsonl", num_prompts=300, actual_score=oracle, **lengths
    )
    r2 |= dict(dtype="bfloat16", generation_batch_size=size.generation, forward_batch_size=size.forward)
    ppo = dict(
        policy=sft, reward=rm, prompts=data / "rl.jsonl", eval_prompts=data / "valid.jsonl", filter="br"
    )
    ppo |= dict(actual_score=oracle, num_responses=5, lr=5e-7, critic_lr=9e-6, kl_coef=0.01, noptepochs=3)
    ppo |= dict(total_episodes=75000, batch_size=192, minibatch_size=128, **frozen)
    ppo |= dict(generation_batch_size=size.generation)
    test = dict(task="humaneval", model=out / "br/policy_best", prompt_style="completion", dtype="bfloat16")
    if small:
        tuning |= dict(model_config=data / "model_config", tokenizer=data / "tokenizer")
        tuning |= dict(epochs=2, lr=4e-3, batch_size=32, warmup_steps=20, final_lr_fraction=0.1)
        tuning = {key: value for key, value in tuning.items() if key != "model"}
        reward |= dict(lr=1e-3, batch_size=16, normalize_samples=64)
        r2 |= dict(num_prompts=20, resamples=20)
        ppo |= dict(total_episodes=480, batch_size=32, minibatch_size=64, lr=1e-4, critic_lr=1e-3)
        ppo |= dict(normalize_samples=80)
        test = dict(
            task="minicode", data=data / "valid.jsonl", model=out / "br/policy", prompt_style="completion"
        )
        test |= dict(max_new_tokens=48, batch_size=64, progress=False)
    made = [
        Stage("sft", "sft_single.py", tuning, p, "model"),
        Stage("preferences", "benchmark.recipes.preferences", samples, p, "pairs.jsonl"),
        Stage("rm", "rm_single.py", reward, p, "model"),
        Stage("r2", "benchmark.r2", r2, 1, "r2.json"),
        Stage("br", "pfppo_single.py", ppo, p, "policy"),
        Stage("pass1", "benchmark/evaluate.py", test, 0, "summary.json"),
    ]
    return [s._replace(settings={**s.settings, "output_dir": out / s.name}) for s in made]


def command(stage: Stage, small: bool) -> list[str]:
    """The words of a command; CPU processes in small."""
    if stage.processes == 0:
        return ["python", stage.script, *flags(stage.settings)]
    launcher = ["accelerate", "launch", *(["--cpu"] if small and stage.processes == 1 else [])]
    launcher += ["--multi_gpu"] * (stage.processes > 1) + ["--num_processes", str(stage.processes)]
    launcher += ["--num_machines", "1", "--dynamo_backend", "no", "--mixed_precision", "bf16"]
    what = [stage.script] if stage.script.endswith(".py") else ["-m", stage.script]
    return [*launcher, *what, *flags(stage.settings)]


def memory(name: str) -> str:
    """The plan of every training stage of a size."""
    import importlib

    import transformers

    from benchmark import memory_plan

    size, texts = SIZES[name], []
    config = transformers.LlamaConfig(**size.config)
    for stage in stages(name, Path("data"), Path("output")):
        if stage.script.endswith("_single.py"):
            script = stage.script.removesuffix("_single.py")
            settings = {k: str(v) if isinstance(v, Path) else v for k, v in stage.settings.items()}
            args = importlib.import_module(f"{script}_single").Args(**settings)
            plan = memory_plan.make_plan(script, args, config, world=stage.processes, bf16=True)
            texts.append(f"{stage.name}: {memory_plan.report(plan, GPU_GB)}")
    return "\n\n".join(texts)


def sft_rows(magicoder, codealpaca) -> list[dict]:
    """Rows of the two data sets in one form."""
    rows = [{"prompt": row["problem"], "response": row["solution"]} for row in magicoder]
    return rows + [{"prompt": row["instruction"], "response": row["output"]} for row in codealpaca]


def write_sft(folder: Path) -> None:
    """The paper's SFT data from the hub."""
    from datasets import load_dataset

    names = ("ise-uiuc/Magicoder-OSS-Instruct-75K", "theblackcat102/evol-codealpaca-v1")
    rows = sft_rows(*(load_dataset(name, split="train") for name in names))
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "sft.jsonl", rows)
    print(f"{folder / 'sft.jsonl'}: {len(rows)} rows (PAPER: 130k)")


def write_small(folder: Path) -> None:
    """A little world, easy enough that 200 steps of SFT solve some of it, with the shrunk configuration."""
    import transformers

    from benchmark import minicode

    sizes = dict(num_sft=3000, num_sft_valid=50, num_preference=200, num_rl=96, num_valid=40, num_test=10)
    minicode.write_world(folder, seed=1, max_operations=2, faulty_share=0.2, **sizes)
    tokens = json.loads((folder / "model_config/config.json").read_text())
    ids = {name: tokens[name] for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    config = transformers.LlamaConfig(**{**SIZES["small"].config, **ids}, architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder / "model_config")


def run(stage: Stage, small: bool) -> None:
    """Runs a stage unless it is done; ends with its exit status where it fails."""
    if Path(stage.settings["output_dir"], stage.done).exists():
        return print(f"{stage.name}: done before", flush=True)
    words = command(stage, small)
    print(f"$ {shlex.join(words)}", flush=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if small:
        environment |= dict(
            ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", PYTHONWARNINGS="ignore"
        )
    words = (
        [sys.executable, "-m", "accelerate.commands.launch", *words[2:]]
        if words[0] == "accelerate"
        else words
    )
    words = [sys.executable, *words[1:]] if words[0] == "python" else words
    code = subprocess.run(words, cwd=ROOT, env=environment).returncode
    if code:
        sys.exit(f"{stage.name} ended with status {code}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=("6.7b", "1.3b"), default="6.7b")
    parser.add_argument("--data_dir", type=Path, default=Path("data"))
    parser.add_argument("--output_dir", type=Path, default=Path("output/paper"))
    parser.add_argument("--small", action="store_true", help="in small, on two CPU processes")
    parser.add_argument("--run", action="store_true", help="run the commands, in order")
    parser.add_argument("--memory", action="store_true", help="print the memory plan of every training stage")
    parser.add_argument("--write_sft", action="store_true", help="write sft.jsonl from the hub, and stop")
    args = parser.parse_args(argv)
    name, out = "small" if args.small else args.size, args.output_dir.absolute()
    data = out / "world" if args.small else args.data_dir.absolute()
    if args.memory:
        return print(memory(name))
    if args.write_sft:
        return write_sft(data)
    if args.small and args.run and not (data / "model_config/config.json").is_file():
        write_small(data)
    for stage in stages(name, data, out):
        if args.run:
            run(stage, args.small)
        else:
            prefix = "ACCELERATE_USE_CPU=true " if args.small else ""
            print(f"# {stage.name}\n{prefix}{shlex.join(command(stage, args.small))}\n")


if __name__ == "__main__":
    main()
