"""What test_shard.py runs on every rank."""

import importlib
import json
import os
import signal
import time
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from fork_server import run_command
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook

TIMEOUT = timedelta(seconds=60)  # a rank that waits for one that is done sampling ends the launch


def collectives() -> int:
    """How many collectives and messages this rank has begun, in all of its groups."""
    return sum(group._get_sequence_number_for_group() for group in dist.distributed_c10d._world.pg_map)


def backbone(model: torch.nn.Module) -> torch.nn.Module:
    return getattr(model, "lm_backbone", model)


def observe(module, seen: dict, undo: list) -> None:
    """Wraps functions of a script, so that `seen` tells what they did on this rank."""

    def replace(name, wrapper):
        original = getattr(module, name)
        undo.append((module, name, original))
        setattr(module, name, wrapper(original))

    def place(original):
        def wrapped(accelerator, shard, *models):
            seen["meta"] += [all(p.is_meta for p in backbone(m).parameters()) for m in models]
            first = original(accelerator, shard, *models)
            for model in models:
                parameters = list(model.parameters())
                local = [p.to_local() if isinstance(p, DTensor) else p for p in parameters]
                seen["bytes"].append([sum(x.nbytes for x in part) for part in (local, parameters)])
            return first

        return wrapped

    def whole(original):
        @contextmanager
        def wrapped(*args):
            begun = collectives()
            with original(*args):
                entered = collectives()
                yield
                left = collectives()
            if any(
                isinstance(model, torch.nn.Module) for model in args
            ):  # for a function nothing is gathered
                seen["gathers"].append(entered - begun)
                seen["inside"].append(left - entered)

        return wrapped

    def generate(original):
        def wrapped(*args):
            responses = original(*args)
            seen["lengths"].append(int((responses != 0).any(0).sum()))  # where this rank stopped sampling
            return responses

        return wrapped

    if hasattr(module, "generate"):
        replace("generate", generate)
    replace("place", place)
    replace("whole", whole)


def same_samples(original):
    """Sampling whose draws depend on the query alone, so that any number of processes draws the same."""

    def generate(model, queries, query_mask, n, length, temperature, stop_id, stop_after=0, generator=None):
        responses = []
        for ids, mask in zip(queries, query_mask):
            ids = ids[mask].unsqueeze(0)
            generator = torch.Generator().manual_seed(int((ids * torch.arange(1, ids.shape[1] + 1)).sum()))
            rest = (n, length, temperature, stop_id, stop_after, generator)
            responses.append(original(model, ids, torch.ones_like(ids).bool(), *rest))
        return torch.cat(responses)

    return generate


def run(
    folder: Path, name: str, script: str, settings: dict, precision="no", watch=(), dies_at=None, output=""
) -> dict:
    """One run of main; what this rank saw, its message where it was refused, and a fingerprint of its end."""
    module = importlib.import_module(f"{script}_single")
    seen = {"meta": [], "lengths": [], "bytes": [], "gathers": [], "inside": [], "error": ""}
    undo, start = [], time.time()
    os.environ["ACCELERATE_MIXED_PRECISION"] = precision
    AcceleratorState._reset_state()
    observe(module, seen, undo)
    if "same_samples" in watch:
        undo.append((module, "generate", module.generate))
        module.generate = same_samples(module.generate)
        undo.append((module, "check_cache", module.check_cache))  # it counts the steps of generate
        module.check_cache = lambda *_: None
    if "one_unit" in watch:
        from transformers import GPT2PreTrainedModel

        undo.append((GPT2PreTrainedModel, "_no_split_modules", GPT2PreTrainedModel._no_split_modules))
        GPT2PreTrainedModel._no_split_modules = None
    calls, original = [], module.check_finite
    undo.append((module, "check_finite", original))

    def check_finite(*args):
        calls.append(1)
        if len(calls) == dies_at:
            raise KeyboardInterrupt
        return original(*args)

    module.check_finite = check_finite
    try:
        args = module.Args(**{**settings, "output_dir": str(folder / (output or name))})
        try:
            module.main(args)
        except KeyboardInterrupt:
            module.main(args)
    except SystemExit as error:
        seen["error"] = str(error)
    finally:
        for owner, attribute, value in reversed(undo):
            setattr(owner, attribute, value)
    return {**seen, "seconds": time.time() - start}


def launch(command: list[str], dies_at: int) -> None:
    """The command of a launcher, whose ranks are forks of it and no new Pythons, which would import for seconds;
    rank 1 gets SIGKILL in step dies_at."""
    steps = []

    def die(*_):
        steps.append(1)
        if os.environ["RANK"] == "1" and len(steps) == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)

    register_optimizer_step_post_hook(die)
    os.environ.update(PET_RUN_PATH="1", PET_START_METHOD="fork")  # flags of torchrun
    run_command(command)


def main(runs: list[dict], folder: str) -> None:
    """Runs of {name, script, settings, precision, watch, dies_at, output}; leaves seen_{world}_{rank}.json and
    what they write."""
    folder, rank, world = Path(folder), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    original = dist.init_process_group
    dist.init_process_group = lambda *args, **kwargs: original(*args, **{**kwargs, "timeout": TIMEOUT})
    seen = {}
    for settings in runs:
        seen[settings["name"]] = run(folder, **settings)
        (folder / f"seen_{world}_{rank}.json").write_text(json.dumps(seen))
