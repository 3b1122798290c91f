"""Measured peaks of real processes beside those of benchmark/memory_plan.py.

  python -m benchmark.study.memory_peaks --output_dir output/memory_peaks      # all cases, about ten minutes
  python -m benchmark.study.memory_peaks --output_dir output/memory_peaks --cases sft_one ppo_shard

Every case runs one of the three scripts on random weights, on one or two CPU processes, rows all of full length.
A rank asks Linux for its largest resident memory in every phase (VmHWM in /proc/self/status, set back when a phase
begins), less what it held before it read a model. malloc gives freed memory back at once, so resident is live.
"""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GPT2 = dict(kind="gpt2", n_embd=512, n_layer=8, n_head=8, n_positions=1024, vocab_size=32000)
LLAMA = dict(kind="llama", hidden_size=512, intermediate_size=1408, num_hidden_layers=8, vocab_size=32000)
LLAMA |= dict(num_attention_heads=8, num_key_value_heads=2, tie_word_embeddings=False)
TINY = {"gpt2": dict(n_embd=96, n_layer=1), "llama": dict(hidden_size=32, intermediate_size=16)}
SHORT, LONG = dict(query_length=64, response_length=192), dict(query_length=64, response_length=704)
CASES = {  # script, model, processes, precision, flags
    "sft_one": ("sft", {**GPT2, "n_embd": 768, "n_layer": 12, "n_head": 12}, 1, "no", SHORT),
    "sft_ddp_bf16": ("sft", LLAMA, 2, "bf16", SHORT),
    "sft_shard": ("sft", GPT2, 2, "no", {**SHORT, "shard": True}),
    "sft_shard_long": ("sft", LLAMA, 2, "bf16", {**LONG, "shard": True, "gradient_checkpointing": True}),
    "rm_ddp": ("rm", GPT2, 2, "no", SHORT),
    "rm_shard": ("rm", LLAMA, 2, "bf16", {**SHORT, "shard": True, "frozen_dtype": "bfloat16"}),
    "ppo_one_long": ("pfppo", LLAMA, 1, "no", LONG),
    "ppo_one_shared": ("pfppo", GPT2, 1, "bf16", {**SHORT, "critic": "shared"}),
    "ppo_ddp": ("pfppo", GPT2, 2, "bf16", {**SHORT, "gradient_checkpointing": True}),
    "ppo_shard": ("pfppo", LLAMA, 2, "bf16", {**SHORT, "shard": True, "frozen_dtype": "bfloat16"}),
    "ppo_shard_shared": ("pfppo", GPT2, 2, "no", {**SHORT, "shard": True, "critic": "shared"}),
    "ppo_shard_long": ("pfppo", LLAMA, 2, "bf16", {**LONG, "shard": True, "gradient_checkpointing": True}),
}
SPANS = {  # function of a script -> phase
    "sample_rollout": "generate",
    "sample": "generate",
    "score_rollout": "score",
    "response_logprobs_and_values": "logprobs",
    "evaluate": "evaluate",
    "save_model": "save",
    "save_checkpoint": "save",
}


def memory(name: str) -> int:
    """VmHWM or VmRSS of this process in bytes."""
    return 1024 * int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text()).group(1))


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def watch(module) -> tuple[dict[str, int], list[int]]:
    """Phase -> largest resident bytes, filled while `module.main` runs; and bytes before a model was read."""
    peaks, before, training = {}, [], []

    def note(phase):
        peaks[phase] = max(peaks.get(phase, 0), memory("VmHWM"))
        forget_peak()

    def wrap(name, start=lambda: None, end=lambda: None):
        original = getattr(module, name)

        def wrapped(*args, **kwargs):
            start()
            result = original(*args, **kwargs)
            end()
            return result

        setattr(module, name, wrapped)

    def train_ends():
        if training:
            training.clear()
            note("train")

    def train_begins():
        if not training:
            training.append(True)
            forget_peak()

    for name, phase in SPANS.items():
        if hasattr(module, name):
            phase = "score" if (module.__name__, name) == ("rm_single", "evaluate") else phase
            wrap(name, lambda: (train_ends(), forget_peak()), lambda phase=phase: note(phase))
    wrap("open_run", end=lambda: (before.append(memory("VmRSS")), forget_peak()))
    wrap("load_checkpoint", end=lambda: note("loading"))
    wrap("rounds", start=train_begins)
    wrap("log_metrics", start=train_ends)
    return peaks, before


def rank_main(file: str) -> None:
    """One rank of one case."""
    case = json.loads(Path(file).read_text())
    module = importlib.import_module(f"{case['script']}_single")
    import torch

    torch.set_num_threads(1)
    from accelerate.state import AcceleratorState

    module.check_model = lambda *_: None  # random weights are not what it is made for
    module.main(module.Args(**case["tiny"]))  # what is imported and loaded at first use comes into memory
    AcceleratorState._reset_state()
    peaks, before = watch(module)
    module.main(module.Args(**case["settings"]))
    rank = os.environ.get("RANK", "0")
    Path(f"{file}.{rank}").write_text(json.dumps({k: v - before[0] for k, v in peaks.items()}))


def write_inputs(folder: Path, model: dict, num_rows: int, q: int, r: int) -> None:
    """Model, tokenizer, rows of full length (the first one token shorter, so that there is padding)."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    import rm_single as rm

    sizes = {name: value for name, value in model.items() if name != "kind"}
    config = transformers.AutoConfig.for_model(model["kind"], bos_token_id=1, eos_token_id=1, **sizes)
    torch.manual_seed(0)
    transformers.logging.disable_progress_bar()
    policy = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    inner = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1, "a": 2, "b": 3}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", eos_token="<eos>"
    )
    reward = rm.RewardModel(transformers.AutoModel.from_config(config, dtype=torch.float32))
    for name, saved in (("policy", policy), ("reward", rm.as_classifier(reward))):
        saved.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    answers = {"response": "b " * r, "chosen": "b " * r, "rejected": "a " * r}
    rows = [{"prompt": "a " * (q - (number % 4 == 0)), **answers} for number in range(num_rows)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def settings_of(script: str, folder: Path, world: int, flags: dict) -> dict:
    """Flags of a short run: two optimizer steps or updates, two micro-batches of 4 rows in each."""
    files = dict(output_dir=str(folder / "run"), **flags)
    rows = str(folder / "rows.jsonl")
    if script == "pfppo":
        files |= dict(policy=str(folder / "policy"), reward=str(folder / "reward"), prompts=rows)
        files |= dict(batch_size=4 * world, num_responses=2, filter="none", minibatch_size=8 * world)
        files |= dict(total_episodes=16 * world, normalize_reward=False, noptepochs=1, print_samples_every=0)
        return files | dict(
            generation_batch_size=8, forward_batch_size=4, micro_batch_size=4, stop_token="none"
        )
    files |= dict(model=str(folder / "policy"), train_data=rows, eval_data=rows, epochs=1, stop_token="none")
    if script == "rm":
        return files | dict(
            batch_size=4 * world, micro_batch_size=2, forward_batch_size=4, normalize_samples=8
        )
    return files | dict(batch_size=8 * world, micro_batch_size=4, forward_batch_size=4)


def run_case(name: str, folder: Path) -> dict[str, list[int]]:
    """Phase -> [planned, measured] bytes of the rank that needs most."""
    import pfppo_single as pfppo
    from benchmark import memory_plan

    script, model, world, precision, flags = CASES[name]
    folder.mkdir(parents=True, exist_ok=True)
    settings, lengths = {}, (flags["query_length"], flags["response_length"])
    for part, sizes in (("settings", model), ("tiny", {**model, **TINY[model["kind"]]})):
        if not (folder / part / "rows.jsonl").is_file():
            write_inputs(folder / part, sizes, (8 if script == "rm" else 16) * world, *lengths)
        settings[part] = settings_of(script, folder / part, world, flags)
    file = folder / "case.json"
    file.write_text(json.dumps({"script": script, **settings}))
    launcher = [sys.executable]
    if world > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)]
    environment = dict(OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true", ACCELERATE_MIXED_PRECISION=precision)
    environment |= dict(
        MALLOC_MMAP_THRESHOLD_="500000", MALLOC_TRIM_THRESHOLD_="500000", PYTHONPATH=str(ROOT)
    )
    command = [*launcher, str(Path(__file__)), "--rank_of", str(file)]
    if not Path(f"{file}.0").is_file():  # measured before: only the plan is made again
        subprocess.run(command, check=True, env={**os.environ, **environment}, stdout=subprocess.DEVNULL)
    ranks = [json.loads(Path(f"{file}.{rank}").read_text()) for rank in range(world)]
    args = importlib.import_module(f"{script}_single").Args(**settings["settings"])
    config = pfppo.load_config(str(folder / "settings/policy"), "policy")
    plan = memory_plan.make_plan(script, args, config, world=world, bf16=precision == "bf16", device="cpu")
    found = {}
    for phase, field in memory_plan.PHASES[script].items():
        planned = memory_plan.phase_memory(plan, phase, getattr(args, field)).total()
        found[phase] = [planned, max(rank[phase] for rank in ranks)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_dir", default="output/memory_peaks")
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--rank_of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_of:
        return rank_main(args.rank_of)
    from benchmark import records

    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["| case | phase | planned GB | measured GB | planned / measured |", "|---|---|---|---|---|"]
    for name in args.cases:
        for phase, (planned, measured) in run_case(name, folder / name).items():
            row = f"| {name} | {phase} | {planned / 1e9:.3f} | {measured / 1e9:.3f} | {planned / measured:.2f} |"
            lines.append(row)
            print(row, flush=True)
    text = "\n".join(lines) + f"\n\n{records.commit()}, {records.hardware()}\n"
    records.write_text(folder / "peaks.md", text)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
