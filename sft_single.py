"""Supervised fine-tuning of a language model on prompts and responses: stage 1 of SFT -> reward model -> RL.

Maximum likelihood of the response tokens (the numbers are those of the chapters in `main`):
  1. tokenise prompt and response apart (the boundary is where sampling has it), close with the stop token
  2. take the next batch of a shuffled pass over the rows
  3. negative log-probability of the response tokens, mean over those of the whole batch on all ranks; AdamW
  4. held-out loss, every row once; log and save
The trained model is π_SFT: the start of reward model and policy, and the reference of the KL penalty.

Run on a CPU, one GPU, eight GPUs (sizes are global, so the algorithm is the same):
  accelerate launch --cpu --num_processes 1 sft_single.py --model gpt2 --train_data sft.jsonl --output_dir sft
  accelerate launch --num_processes 1 --mixed_precision bf16 sft_single.py ...
  accelerate launch --multi_gpu --num_processes 8 --mixed_precision bf16 sft_single.py ...
In:  a causal language model (`--model`), or a configuration to start from scratch (`--model_config`); rows.
Out: `output_dir/model`, `metrics.jsonl`, `tensorboard/`, `checkpoints/`; the same command resumes.
Source: PAPER = arXiv 2409.06957.
"""

import codecs
import dataclasses
import fcntl
import gzip
import hashlib
import inspect
import json
import logging
import math
import os
import re
import shutil
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from accelerate import Accelerator, PartialState, tracking
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, set_seed
from torch import Tensor, nn

# Shapes: rows of a micro-batch, T tokens of its longest row, R of its longest response, V vocabulary.
#
#   column          0 ........ T-R ... T-1
#   ids             P P q q q q r r r r r .      all padding is left; "." is the stop token
#   response_mask               0 1 1 1 1 1      the last R columns: the loss is over r and "."
#   logits          read one column earlier than the token they belong to: T-R-1 .. T-2
#
# Numbers in Args, with the least and the largest value that is taken:
Count, Whole = Annotated[int, 1, math.inf], Annotated[int, 0, math.inf]
Amount, Share = Annotated[float, 0, math.inf], Annotated[float, 0, 1]


@dataclass(kw_only=True)
class Args:
    # run
    output_dir: str = "output/sft"
    """folder for everything this run writes; a folder that holds another run is refused"""
    seed: Annotated[int, 0, 2**31] = 1
    """shared over ranks: weights from scratch, data order"""
    dry_run: bool = False
    """read and check everything, print the derived sizes, and stop before weights are loaded"""
    log_with: str = "tensorboard"
    """tracker of accelerate: tensorboard, wandb, trackio, mlflow, comet_ml, aim, swanlab, ...; or `none`"""
    # model
    model: str | None = None
    """folder or hub id of a causal language model to start from"""
    model_config: str | None = None
    """in place of model: folder or hub id whose configuration starts from scratch, weights drawn from seed"""
    tokenizer: str | None = None
    """folder or hub id; none: that of model or model_config"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, a third more time"""
    shard: bool = False
    """split weights, gradients and Adam's moments over the processes (FSDP2), for models too large for one"""
    # data
    train_data: str
    """training rows: .jsonl(.gz), .json, .csv, .parquet, a save_to_disk folder, or hub id `name:split`"""
    eval_data: str | None = None
    """held-out rows, same columns; none: no held-out loss"""
    prompt_field: str = "prompt"
    """column with the prompt: text, or a list of chat messages (the tokenizer's chat template is applied)"""
    chat_template: str | None = None
    """file with a Jinja template, in place of the tokenizer's own if it has one; saved with the model"""
    response_field: str = "response"
    """column with the answer: a text, or messages that end with the assistant's (earlier ones are the
    prompt); where a file lacks it: `completion` or `messages`"""
    query_length: Count = 512
    """longest query in tokens; rows with a longer one are left out and counted"""
    response_length: Count = 512
    """longest response in tokens, the stop token included; rows with a longer one are left out and counted"""
    stop_token: str = "eos"
    """token that closes every response: `eos`, `none`, a token, a text that is one, or an id"""
    # training
    epochs: Count = 5
    """passes over the rows (PAPER: 5)"""
    batch_size: Count = 64
    """rows per optimizer step, over all ranks"""
    micro_batch_size: Count = 16
    """rows per rank in one forward and backward pass; changes memory and speed, not the gradient"""
    forward_batch_size: Count = 32
    """rows per rank in one forward pass of the held-out loss"""
    lr: Amount = 1e-5
    """peak learning rate (PAPER: 1e-5)"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """per step, after the warm-up"""
    final_lr_fraction: Share = 0.0
    """linear and cosine end at this fraction of lr"""
    warmup_steps: Whole = 0
    """steps over which the learning rate rises linearly from lr / warmup_steps"""
    weight_decay: Amount = 0.0
    """AdamW's decoupled weight decay"""
    max_grad_norm: Amount = 1.0
    """clip the gradient norm at this; 0: never"""
    # evaluation and logging
    eval_every: Whole = 0
    """steps between held-out losses; 0: only after the last step"""
    log_every: Count = 10
    """steps between lines on the console and in metrics.jsonl, each a mean over these steps"""
    checkpoint_every: Count = 500
    """steps between checkpoints; one is written before every evaluation and after the last step too"""


def main(args: Args) -> None:
    # ------------------------------------------------ Setup: what can be refused is refused here
    accelerator = start_accelerator(args.shard, args.log_with, args.output_dir)
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    refuse(
        (args.batch_size < world, f"--batch_size must be at least the {world} processes"),
        ((args.model is None) == (args.model_config is None), "give either --model or --model_config"),
    )
    source, field = (args.model, "model") if args.model else (args.model_config, "model_config")
    config = load_config(source, field)
    path, named = (args.tokenizer, "tokenizer") if args.tokenizer else (source, field)
    tokenizer = load_pretrained("AutoTokenizer", path, named, args.chat_template)
    stop_id = stop_token_id(tokenizer, args.stop_token)
    check_rows(config, [[max(stop_id, 0)]], "stop_token")

    # ------------------------------------------------ 1. tokenise prompt and response apart
    rows, left_out = encode_examples(tokenizer, args, "train_data", stop_id)
    eval_rows, eval_left_out = encode_examples(tokenizer, args, "eval_data", stop_id)
    for data, data_rows in (("train_data", rows), ("eval_data", eval_rows)):
        check_rows(config, [row["query_ids"] + row["response_ids"] for row in data_rows], data)
    steps_per_epoch = math.ceil(len(rows) / args.batch_size)
    num_steps = steps_per_epoch * args.epochs
    accelerator.print(
        f"{len(rows)} rows ({left_out} too long: left out), {len(eval_rows)} held-out ({eval_left_out})\n"
        f"{args.epochs} x {steps_per_epoch} = {num_steps} steps of {args.batch_size} on {world} processes"
    )
    first = rows[0]
    show_first(accelerator, tokenizer, first["prompt"], first["query_ids"], first["response_ids"], stop_id)
    if args.dry_run:
        accelerator.print(memory_line(accelerator, config, 1, 0, torch.float32, args.shard))
        return
    output_dir = open_run(accelerator, args)

    set_seed(args.seed)
    if args.model:
        policy = load_causal_lm(args.model, torch.float32, args.shard)
    else:
        config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        with torch.device("meta" if args.shard and rank else "cpu"):  # rank 0 sends its weights in `place`
            policy = causal_lm_from(config)
        policy.get_input_embeddings().padding_idx = None  # see load_causal_lm
    policy = place(accelerator, args.shard, policy)
    if args.gradient_checkpointing:
        recompute_activations(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    model = policy if args.shard else accelerator.prepare(policy)
    optimizer = accelerator.prepare(optimizer)
    policy = accelerator.unwrap_model(model, keep_torch_compile=False)

    # ------------------------------------------------ Continue a killed run
    state = load_checkpoint(accelerator, output_dir, policy, optimizer)
    open_metrics(accelerator, args, output_dir, state["step"] if state else 0)
    if state is None:
        check_model(accelerator, policy, [row["query_ids"] + row["response_ids"] for row in rows], 0, field)
        state = {"step": 0, "recent": {}, "metrics": {}}
    run_start, first_step = time.time(), state["step"]
    for step in range(first_step + 1, num_steps + 2):
        # ---------------- 4. held-out loss of what was trained. This may fail: a checkpoint comes before
        done, metrics = step - 1, state["metrics"]
        if done and (done == num_steps or (args.eval_every and done % args.eval_every == 0)):
            metrics |= evaluate(accelerator, policy, eval_rows, args.forward_batch_size)
        if metrics:
            left = time_left(run_start, done - first_step, num_steps - done)
            log_metrics(accelerator, output_dir, done, metrics, SHOWN, f"/{num_steps}{left}")
        if done == num_steps:
            break
        step_start = time.time()

        # ---------------- 2. the next batch of a shuffled pass over the rows; ranks divide it
        epoch, index = divmod(step - 1, steps_per_epoch)
        order = torch.randperm(len(rows), generator=random_generator("cpu", args.seed, 0, epoch))
        picks = order.split(args.batch_size)[index].tolist()  # the last batch of a pass may be smaller
        batch = [rows[i] for i in picks]
        local_batch = batch[rank::world] or batch[:1]  # a rank without rows goes along with one of weight 0
        tokens = sum(len(row["response_ids"]) for row in batch)
        weight = world / tokens if batch[rank::world] else 0.0  # DDP averages gradients over ranks

        # ---------------- 3. mean negative log-probability of the response tokens of the whole batch; AdamW
        policy.train()
        schedule = (args.lr_schedule, args.warmup_steps, args.final_lr_fraction)
        lr = optimizer.param_groups[0]["lr"] = scheduled_lr(args.lr, step - 1, num_steps, *schedule)
        parts, local_loss = micro_batches(local_batch, args.micro_batch_size), torch.zeros((), device=device)
        for part, counts, sync in rounds(accelerator, model, parts):
            with sync, accelerator.autocast():
                loss = -(response_logprobs(model, part, device) * weight).sum() * counts
                accelerator.backward(loss)
            local_loss += loss.detach()
        loss = accelerator.reduce(local_loss, "mean").item()  # nats per token
        norm = float(full(accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm or math.inf)))
        check_finite(accelerator, step, loss, norm)
        optimizer.step()
        optimizer.zero_grad()
        recent = {"train/loss": loss, "train/grad_norm": norm, "seconds/step": time.time() - step_start}
        for tag, value in recent.items():
            state["recent"].setdefault(tag, []).extend([value] if math.isfinite(value) else [])

        # ---------------- Measure and save
        last, stop, metrics = step == num_steps, stopping(accelerator), {}
        if step % args.log_every == 0 or last:
            metrics = {tag: float(np.mean(values)) for tag, values in state["recent"].items() if values}
            metrics |= {"train/lr": lr, "train/epoch": step / steps_per_epoch}
            state["recent"] = {}
        state |= {"step": step, "metrics": metrics}
        due = any(every and step % every == 0 for every in (args.checkpoint_every, args.eval_every))
        if due or stop or last:
            save_checkpoint(accelerator, output_dir, step, state, policy, optimizer)
        refuse((stop, f"stopped after step {step}, as asked; the same command goes on"))
    save_model(accelerator, policy, tokenizer, stop_id, output_dir / "model")
    accelerator.print(f"done: {output_dir / 'model'}")


SHOWN = ("train/loss", "train/lr", "test/loss")


def token_logprobs(logits: Tensor, tokens: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """logits (rows, R, V), tokens and mask (rows, R) -> log π(token) (rows, R) in float32, 0 where masked."""
    logits = logits.float() if temperature == 1 else logits.float() / temperature  # no copy at 1
    chosen = logits.gather(-1, tokens.masked_fill(~mask, 0).unsqueeze(-1)).squeeze(-1)
    return torch.where(mask, chosen - logits.logsumexp(-1), 0.0)


def scheduled_lr(
    lr: float, step: int, num_steps: int, schedule: str, warmup_steps: int, final_fraction: float = 0.0
) -> float:
    """Learning rate of step 0 .. num_steps-1: linear warm-up, then constant, linear (LMHP) or cosine."""
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    fraction = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[schedule]
    return lr * (final_fraction + (1 - final_fraction) * fraction)


def pad_left(rows: list[list[int]], device) -> tuple[Tensor, Tensor]:
    """Lists of ids -> ids (rows, T) padded left with 0, mask (rows, T) bool from the lengths, not the ids."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows], device=device)
    return ids, mask


def model_inputs(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """ids, mask (rows, T) -> forward arguments. Positions count real tokens; padding is fed as token 0."""
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    return {"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long(), "position_ids": positions}


def micro_batches(rows: list[dict], size: int) -> list[list[dict]]:
    """Parts of at most `size` rows of similar length, so that little is padding."""
    rows = sorted(rows, key=lambda row: len(row["query_ids"]) + len(row["response_ids"]))
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def response_logprobs(model: nn.Module, rows: list[dict], device) -> Tensor:
    """Log-probabilities (rows, R) of the response tokens of a micro-batch, 0 left of each response."""
    ids, mask = pad_left([row["query_ids"] + row["response_ids"] for row in rows], device)
    responses, response_mask = pad_left([row["response_ids"] for row in rows], device)
    width = responses.shape[1]
    logits = model(**model_inputs(ids, mask), use_cache=False, logits_to_keep=width + 1).logits[:, :-1]
    return token_logprobs(logits, responses, response_mask, temperature=1.0)


def encode_examples(tokenizer, args: Args, field: str, stop_id: int) -> tuple[list[dict], int]:
    """The rows of a file with query_ids and response_ids, and how many were left out as too long."""
    path = getattr(args, field)
    if path is None:
        return [], 0
    rows = load_rows(path, field)
    names = [name for name in (args.response_field, "completion", "messages") if name in rows[0]]
    answer_field = [*names, args.response_field][0]
    for number, row in enumerate(rows, 1):
        where = f"--{field} {path}, row {number}"
        row["prompt"], row["response"] = split_answer(row, args.prompt_field, answer_field, where)
    examples = encode_queries(tokenizer, rows, "prompt", args.query_length, field)
    for row in examples:
        row["response_ids"] = encode_response(tokenizer, row["response"], stop_id)
    examples = [row for row in examples if 0 < len(row["response_ids"]) <= args.response_length]
    wrong = f"--{field}: every response is longer than --response_length {args.response_length}; raise it"
    refuse((not examples, wrong))
    return examples, len(rows) - len(examples)


def encode_response(tokenizer, response: str, stop_token_id: int) -> list[int]:
    """Ids of a response with exactly one stop token, its last (-1: none); what follows one is left out."""
    ids = tokenizer(response, add_special_tokens=False)["input_ids"]
    if stop_token_id < 0:
        return ids
    return (ids[: ids.index(stop_token_id)] if stop_token_id in ids else ids) + [stop_token_id]


# ------------------------------------------------------------------------------------------------------------
# Plumbing: the same in all three scripts; a reader of the paper can stop here
# ------------------------------------------------------------------------------------------------------------


def refuse(*cases: tuple[bool, str]) -> None:
    """(is wrong, message) of every check: the first that is wrong ends the command with its one line."""
    for wrong, message in cases:
        if wrong:
            raise SystemExit(message)


def check_ranges(args) -> None:
    """Refuses a number below or above those that stand in its type in Args; NaN and infinity always."""
    for field in dataclasses.fields(args):
        low, high = getattr(field.type, "__metadata__", (-math.inf, math.inf))
        value = getattr(args, field.name)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int | float):
                wrong = not (math.isfinite(number) and low <= number <= high)
                refuse((wrong, f"--{field.name} must lie between {low} and {high}, not at {number}"))


def parse_args(args_class, argv: list[str] | None = None, presets: dict[str, str] | None = None):
    """Flags over the preset's flags over the defaults. --help shows the groups and sentences of Args."""
    argv = sys.argv[1:] if argv is None else argv
    for name, flags in (presets or {}).items():
        if f"--preset={name}" in argv or f"--preset {name}" in " ".join(argv):
            argv = flags.split() + argv
    if "--help" in argv or "-h" in argv:
        fields = re.sub(r"^    (\w+): ", r"  --\1 ", inspect.getsource(args_class), flags=re.MULTILINE)
        print(inspect.getmodule(args_class).__doc__, "A bool is set by --name and unset by --no-name.\n")
        print(fields.partition("class Args:\n")[2].replace('"""', ""))
        sys.exit()
    args = tyro.cli(args_class, args=argv, use_underscores=True)
    check_ranges(args)
    return args


def start_accelerator(shard: bool = False, tracker: str = "none", folder: str = "") -> Accelerator:
    """Ranks wait two hours for one that saves or grades (NCCL: ten minutes); DDP keeps one copy of gradients,
    not two. Refuses launchers that shard weights: sampling would wait for ranks that have stopped."""
    here = ["none", *map(str, tracking.get_available_trackers())]
    advice = f"pip install {tracker}" if tracker in tracking.LOGGER_TYPE_TO_CLASS else "choose one of them"
    refuse((tracker not in here, f"--log_with {tracker}: here are {', '.join(here)}; {advice}"))
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # it warns of tied weights at every checkpoint
    # cuDNN's attention has gradients that are NaN where a padded column attends to nothing
    torch.backends.cuda.enable_cudnn_sdp(False)
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    handlers = [InitProcessGroupKwargs(timeout=timedelta(hours=2)), ddp]
    where = {} if tracker == "none" else {"log_with": tracker, "project_dir": folder}
    accelerator = Accelerator(kwargs_handlers=handlers, **where)
    kind = accelerator.distributed_type.value
    wrong = shard and (accelerator.num_processes == 1 or accelerator.mixed_precision == "fp16")
    refuse(
        (kind in ("DEEPSPEED", "FSDP", "MEGATRON_LM"), f"{kind} does not work here; use --multi_gpu --shard"),
        (wrong, "--shard needs more than one process, and --mixed_precision bf16 or no; leave it out"),
    )
    return accelerator


ASKED_TO_STOP = []  # signals that came


def end_at_once() -> None:
    """From now on SIGTERM and Ctrl-C do what they usually do."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def ask_to_stop(number: int, *_) -> None:
    """What the first SIGTERM or Ctrl-C does: the run saves and ends. The second one ends it at once."""
    ASKED_TO_STOP.append(number)
    end_at_once()
    print("this step is finished and saved; ask again to end at once", file=sys.stderr)


def stopping(accelerator: Accelerator) -> bool:
    """Whether any rank was asked to stop; to be called by all ranks at the same place."""
    asked = torch.tensor([float(len(ASKED_TO_STOP))], device=accelerator.device)
    return accelerator.reduce(asked).item() > 0


def check_finite(accelerator: Accelerator, step: int, loss: float, norm: float) -> None:
    """Raises FloatingPointError; under fp16 a gradient may overflow, its step is skipped."""
    if not math.isfinite(loss if accelerator.scaler else loss + norm):
        advice = "the last good checkpoint is kept; lower the learning rate"
        raise FloatingPointError(f"step {step}: the loss is {loss}, the gradient norm {norm}; {advice}")


def units(*models) -> list[nn.Module]:
    """The parts of models that FSDP gathers one by one; none without --shard."""
    modules = [module for model in models if isinstance(model, nn.Module) for module in model.modules()]
    return [module for module in modules if hasattr(module, "unshard")]


def full(tensor):
    """The whole of a sharded tensor, on every rank; anything else as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def place(accelerator: Accelerator, shard: bool, *models: nn.Module) -> nn.Module:
    """The first of the models, after all were put on this rank's device, or rank 0's weights of each were
    split over the ranks, block by block. Under bf16 models then run in bfloat16, their heads in float32."""
    together, device, main = nn.ModuleList(models), accelerator.device, accelerator.is_main_process
    if not shard:
        return together.to(device)[0]
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # slow to import, as others below
    from torch.distributed.tensor import distribute_tensor, init_device_mesh

    weights, bf16 = together.state_dict(), accelerator.mixed_precision == "bf16"
    mesh = init_device_mesh(device.type, (accelerator.num_processes,))
    for model in models:
        backbone = getattr(model, "lm_backbone", model)
        names = getattr(backbone, "_no_split_modules", None) or ()
        blocks = [module for module in backbone.modules() if type(module).__name__ in names]
        if not blocks and hasattr(backbone, "config"):
            accelerator.print(f"--shard: {type(backbone).__name__} names no blocks: gathered as one unit")
        for module in dict.fromkeys((*blocks, backbone, model)):
            dtype = torch.bfloat16 if bf16 and (module in blocks or hasattr(module, "config")) else None
            policy = MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32)
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    if not main:
        together.to_empty(device=device)
    for name, parameter in together.named_parameters():
        weight = weights[name].to(device) if main else torch.empty_like(weights[name], device=device)
        parameter.data.copy_(distribute_tensor(weight, parameter.device_mesh, parameter.placements))
    for buffer in together.buffers():
        torch.distributed.broadcast(buffer, 0)
    return models[0]


@contextmanager
def whole(accelerator: Accelerator, *models):
    """Autocast, and each rank holds all weights of sharded models, so that it waits for no other one that
    samples longer. Every rank has to enter, with work or without; weights are not to be changed in here."""
    parts = units(*models)
    for part in parts:
        part.unshard()
        part.set_reshard_after_forward(False, recurse=False)
    with accelerator.autocast():
        yield
    for part in parts:
        part.reshard()
        part.set_reshard_after_forward(True, recurse=False)


def rounds(accelerator: Accelerator, model: nn.Module, parts: list):
    """(micro-batch, 1.0, context) for each one of an optimizer step: DDP adds up over ranks in the last. In
    each, sharded weights wait for all ranks, so one with fewer repeats its last, which counts 0.0."""
    count = torch.tensor([len(parts)], device=accelerator.device)
    count = int(accelerator.gather(count).max()) if units(model) else len(parts)
    for i in range(count):
        sync = nullcontext() if i == count - 1 else accelerator.no_sync(model)
        yield parts[min(i, len(parts) - 1)], float(i < len(parts)), sync


def load_pretrained(auto_class: str, path: str, field: str, template: str | None = None):
    """Configuration, or tokenizer (with a file's template), of a folder or id; refused if there is none."""
    import transformers  # slow to import: not before the settings are checked

    transformers.logging.disable_progress_bar()
    try:
        loaded = getattr(transformers, auto_class).from_pretrained(path)
    except (OSError, ValueError) as error:
        hub = "" if Path(path).exists() else "no such folder here; as a hub id: "
        raise SystemExit(f"--{field} {path}: {hub}{first_line(error)}") from None
    empty = isinstance(loaded, transformers.PreTrainedTokenizerBase) and len(loaded) < 3
    refuse((empty, f"--{field} {path}: there are no files of a tokenizer"))  # some classes need none
    if template:
        try:
            loaded.chat_template = Path(template).read_text("utf-8")
            nothing = f"--chat_template {template}: it renders to nothing; give a Jinja file"
            refuse((not encode_prompt(loaded, [{"role": "user", "content": "@"}]), nothing))
        except Exception as error:  # templates raise what they like
            raise SystemExit(f"--chat_template {template}: {first_line(error)}; give a Jinja file") from None
    return loaded


def load_config(path: str, field: str):
    """Configuration of a folder or hub id without dropout, layer drop, noise: train mode is eval mode."""
    config, noise = load_pretrained("AutoConfig", path, field), ("drop", "jitter")
    if hasattr(config, "output_router_logits"):  # a loss of mixtures of experts that is not ours
        config.output_router_logits = False
    for name, value in config.to_dict().items():
        if any(word in name for word in noise) and isinstance(value, float):
            setattr(config, name, 0.0)
        elif value == "gelu_new":  # the same function in one kernel: GPT-2's training step takes a fifth less
            setattr(config, name, "gelu_pytorch_tanh")
    return config


def causal_lm_from(config) -> nn.Module:
    """A causal language model with new weights; refuses a configuration of which there is none."""
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:  # models raise what they like
        raise SystemExit(f"{config.name_or_path}: no causal language model: {first_line(error)}") from None


def memory_line(accelerator, config, trained: int, frozen: int, dtype, shard: bool) -> str:
    """What a rank holds all the time, with so many trained and frozen models of a configuration's size."""
    with torch.device("meta"):
        model = causal_lm_from(config)
    size = sum(weight.numel() for weight in model.parameters())
    held = size * (16 * trained + dtype.itemsize * frozen) / (accelerator.num_processes if shard else 1)
    state = f"{held / 1e9:.2f} GB a rank for weights, gradients, Adam's moments and frozen models"
    return f"all checks passed, nothing was written; {state}; what comes on top: benchmark/memory_plan.py"


def load_weights(auto_class, path: str, field: str, config, dtype, shard: bool) -> nn.Module:
    """A model from its files; refuses one that they do not fill, or that cannot be read. To be sharded it is
    read by rank 0 alone, which sends the others their parts in `place`."""
    if shard and not PartialState().is_main_process:
        with torch.device("meta"):
            return auto_class.from_config(config, dtype=dtype).eval()
    try:
        model, info = auto_class.from_pretrained(path, config=config, dtype=dtype, output_loading_info=True)
    except Exception as error:  # loaders raise what they like
        raise SystemExit(f"--{field} {path}: {str(error).strip().splitlines()[0]}") from None
    missing = ", ".join(sorted(info["missing_keys"]))
    refuse((missing != "", f"--{field} {path}: its files have no weights for {missing:.200}"))
    return model


def load_causal_lm(path: str, dtype=torch.float32, shard: bool = False, field: str = "model") -> nn.Module:
    """Causal language model without dropout. Its pad token learns like any other (padding_idx would give it
    no gradient): it may be the stop token, and padding is never read anyway."""
    from transformers import AutoModelForCausalLM

    config = load_config(path, field)
    name = ", ".join(config.architectures or [])
    refuse(("Classification" in name, f"--{field} {path}: a {name} is no causal language model"))
    model = load_weights(AutoModelForCausalLM, path, field, config, dtype, shard)
    model.get_input_embeddings().padding_idx = None
    return model


def save_model(accelerator, model: nn.Module, tokenizer, stop_token_id: int, folder: Path) -> None:
    """One folder as plain transformers loads it, renamed when whole. Generation ends at the stop token; that
    is the pad token too, one inside the embedding, so that other tools can batch."""
    from transformers import GenerationConfig

    stop = stop_token_id if stop_token_id >= 0 else model.config.eos_token_id
    stop = stop[0] if isinstance(stop, list) else stop
    model.config.pad_token_id = stop
    model.generation_config = GenerationConfig(eos_token_id=stop, pad_token_id=stop)
    weights = model.state_dict()
    if units(model):  # on rank 0's CPU alone, one after the other; a tied weight has one name there
        once = dict([*model.named_parameters(), *model.named_buffers()])
        gathered = ((name, full(x)) for name, x in weights.items() if name in once)
        weights = {name: x.cpu() for name, x in gathered if accelerator.is_main_process}
    if accelerator.is_main_process:
        aside = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(aside, ignore_errors=True)
        model.save_pretrained(aside, state_dict=weights)
        tokenizer.save_pretrained(aside)
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    accelerator.wait_for_everyone()


def recompute_activations(model: nn.Module) -> None:
    """Gradient checkpointing, which acts in train mode only; transformers renamed the method in 5.24."""
    new, old = "activation_checkpointing_enable", "gradient_checkpointing_enable"
    getattr(model, new if hasattr(model, new) else old)()


def load_rows(path: str, field: str, columns: tuple[str, ...] = ()) -> list[dict]:
    """Rows of a .jsonl, .jsonl.gz, .json, .csv or .parquet file, of a folder of `save_to_disk`, or of a hub
    data set `name:split`; refuses, with file and row, what cannot be read or lacks a column."""
    rows, where, kind = [], f"--{field} {path}", Path(path).suffix[1:]
    known = kind in ("jsonl", "gz", "json", "csv", "parquet") or not Path(path).is_file()
    refuse((not known, f"{where}: .{kind} is unknown; give .jsonl, .jsonl.gz, .json, .csv or .parquet"))
    try:
        if kind in ("jsonl", "gz"):
            text = (gzip.open if kind == "gz" else open)(path, "rb").read()
            for line in text.removeprefix(codecs.BOM_UTF8).split(b"\n"):
                rows += [json.loads(line.decode())] if line.strip() else []
        elif kind == "json":
            rows = json.loads(Path(path).read_bytes())
        else:
            from datasets import load_dataset, load_from_disk  # slow to import, and not needed for JSON

            name, _, split = path.partition(":")
            if Path(path).is_dir():
                data = load_from_disk(path)
                data = data["train"] if isinstance(data, dict) else data
            elif kind in ("csv", "parquet"):
                texts = {"keep_default_na": False, "na_values": [""]} if kind == "csv" else {}  # None is one
                data = load_dataset(kind, data_files=path, split="train", **texts)
            else:
                data = load_dataset(name, split=split or "train")
            rows = data.to_list()
    except Exception as error:  # loaders raise what they like
        text = isinstance(error, ValueError) and kind in ("jsonl", "gz", "json")
        row = f", row {len(rows) + 1}: not JSON in UTF-8" if text else ""
        cause = error.__cause__ if kind == "csv" and error.__cause__ else error
        raise SystemExit(f"{where}{row}: {first_line(cause)}") from None
    refuse((not isinstance(rows, list) or not rows, f"{where}: no rows; write one object per line"))
    for number, row in enumerate(rows, 1):
        refuse((not isinstance(row, dict), f"{where}, row {number}: {row!r:.40} is no object with columns"))
        missing = ", ".join(column for column in columns if row.get(column) is None)
        has = ", ".join(sorted(row))
        refuse((missing != "", f"{where}, row {number}: no column {missing}; it has {has}"))
    return rows


def plain_text(content) -> str | None:
    """A chat message's content as one text: itself, or its text parts joined; None for others (a picture)."""
    if isinstance(content, list):
        texts = [part.get("text") if isinstance(part, dict) else None for part in content]
        content = "".join(texts) if all(isinstance(text, str) for text in texts) else None
    return content if isinstance(content, str) else None


def plain_messages(messages: list[dict]) -> list[dict]:
    """Chat messages with plain texts. ValueError for one without, unless it calls a tool."""
    plain = [{**message, "content": plain_text(message.get("content"))} for message in messages]
    if any(message["content"] is None and "tool_calls" not in message for message in plain):
        raise ValueError("a message has no text as its content")
    return plain


def encode_prompt(tokenizer, prompt: str | list[dict], tools: list | None = None) -> list[int]:
    """Ids of a prompt: text gets the tokenizer's own BOS, messages its template, which writes BOS itself."""
    if isinstance(prompt, str):
        encoded = tokenizer(prompt, return_special_tokens_mask=True)
        closed = encoded["special_tokens_mask"][1:][-1:] == [1]  # by an EOS; but the response follows
        return encoded["input_ids"][: -1 if closed else None]
    template = {"tools": tools, "add_generation_prompt": True, "tokenize": False}
    text = tokenizer.apply_chat_template(plain_messages(prompt), **template)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def encode_queries(tokenizer, rows: list, column: str, length: int, field: str, cut=False) -> list[dict]:
    """Rows with `query_ids`; those of more than `length` tokens are dropped or cut, empty ones dropped.
    Refuses, naming the row, what tokenizer or chat template do not take."""
    encoded = []
    for number, row in enumerate(rows, 1):
        try:
            ids = encode_prompt(tokenizer, row[column], row.get("tools"))[: length if cut else None]
        except Exception as error:  # templates raise what they like
            none = "it has no chat template; --chat_template FILE of the three scripts saves one with a model"
            text = first_line(error) if tokenizer.chat_template or not isinstance(row[column], list) else none
            where = f"--{field}, row {number}: {column} is refused by the tokenizer"
            raise SystemExit(f"{where}: {text}") from None
        encoded += [{**row, "query_ids": ids}] if 0 < len(ids) <= length else []
    refuse((not encoded, f"--{field}: every query is empty or longer than --query_length {length}; raise it"))
    return encoded


def show_first(accelerator, tokenizer, prompt, query: list[int], response: list[int], stop_id: int) -> None:
    """Prints the first row as the model reads it, and what is odd about it."""
    accelerator.print(f"first query: {tokenizer.decode(query)!r}")
    if response:
        accelerator.print(f"first response: {tokenizer.decode(response)!r}")
    if not tokenizer.chat_template or not prompt:
        return
    if isinstance(prompt, str):
        accelerator.print("prompts are texts, so the tokenizer's chat template is not applied")
        return
    try:  # what is only shown stops no run
        chat = [*plain_messages(prompt), {"role": "assistant", "content": "@"}]
        closing = tokenizer.apply_chat_template(chat, tokenize=False).rpartition("@")[2].strip()
    except Exception:
        return
    if closing and closing != tokenizer.decode([max(stop_id, 0)]):
        accelerator.print(f"the chat template ends an answer with {closing!r}; see --stop_token")


def stop_token_id(tokenizer, token: str) -> int:
    """Id of `eos`, of a token, of an id in digits or of a text that is one token; -1 for `none`."""
    ids, pieces = {**tokenizer.get_vocab(), "eos": tokenizer.eos_token_id, "none": -1}, []
    if not token.isdecimal() and (token not in ids or not token.isascii()):  # "é" is also byte 0xE9's name
        pieces = tokenizer(token, add_special_tokens=False)["input_ids"]
    one = len(pieces) == 1 and tokenizer.decode(pieces, clean_up_tokenization_spaces=False) == token
    token_id = int(token) if token.isdecimal() else pieces[0] if one else ids.get(token)
    tokens = tokenizer.convert_ids_to_tokens(pieces) or "missing in the tokenizer"
    refuse((token_id is None, f"--stop_token {token!r} is no token, but {tokens}; give one token, or `none`"))
    return token_id


def check_rows(config, rows: list[list[int]], field: str, new_tokens: int = 0) -> None:
    """Refuses ids outside the embedding (on a GPU a device-side assert, much later) and rows that with
    new_tokens more are longer than the model has positions."""
    config, largest = config.get_text_config(), max(map(max, rows), default=0)
    longest, has = max(map(len, rows), default=0) + new_tokens, f"--{field}: the model has"
    positions = getattr(config, "max_position_embeddings", None) or math.inf
    advice = "lower --query_length or --response_length"
    refuse(
        (largest >= config.vocab_size, f"{has} {config.vocab_size} tokens, not {largest}; use its tokenizer"),
        (longest > positions, f"{has} {positions} positions, not {longest}; {advice}"),
    )


def some_rows(rows: list[list[int]]) -> list[list[int]]:
    """The last 24 ids of eight rows, from the shortest to the longest."""
    rows = sorted(rows, key=len)
    return [rows[i][-24:] for i in sorted({(len(rows) - 1) * part // 7 for part in range(8)})]


def column_outputs(model: nn.Module, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """ids, mask (rows, T) -> a language model's logits (rows, T, V), or a reward model's scores (rows, T).
    Rows without a mask are read as the model itself does it, with its own positions."""
    if not hasattr(model, "lm_backbone"):
        inputs = {"input_ids": ids} if mask is None else model_inputs(ids, mask)
        return model(**inputs, use_cache=False).logits.float()
    return model(ids, torch.ones_like(ids).bool() if mask is None else mask).float()


def within_rounding(accelerator, model: nn.Module, gap: Tensor, scale: Tensor) -> bool:
    """Whether differences of what a model gives are rounding; scale: the standard deviation of what it gives.
    In bfloat16 by their mean: single tokens differ by more than a standard deviation there."""
    half = any(weight.dtype == torch.bfloat16 for weight in model.parameters())
    half = half or (len(units(model)) > 0 and accelerator.mixed_precision == "bf16")
    return bool(gap.abs().mean() <= 0.1 * scale if half else gap.abs().max() <= 1e-3 * scale)


def first_line(error: Exception) -> str:
    """What an error of a library says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@torch.no_grad()
def check_model(accelerator, model: nn.Module, rows: list[list[int]], new_tokens: int, field: str) -> None:
    """Tries the model on some rows of ids, without autocast: what it gives must be finite, the same in train
    mode, for a padded row as for that row alone, and whatever follows, up to new_tokens more. Refuses a model
    that differs: it would be trained on other numbers than it is sampled with."""
    row, device = max(rows, key=len), accelerator.device
    ids, mask = pad_left(some_rows(rows), device)
    ids, mask = nn.functional.pad(ids, (3, 0)), nn.functional.pad(mask, (3, 0))  # padding in every row
    longest = torch.tensor([(row * (2 + new_tokens // len(row)))[: len(row) + new_tokens]], device=device)
    try:
        with whole(accelerator, model), torch.autocast(device.type, enabled=False):
            model.train()
            trained = column_outputs(model, ids, mask)[mask]
            model.eval()
            padded = column_outputs(model, ids, mask)[mask]
            alone = [column_outputs(model, x[m][None])[0] for x, m in zip(ids, mask)]
            followed, width = column_outputs(model, longest), longest.shape[1]
            starts = (min(8, width), max(1, width // 2), max(1, width - 1))
            more = [column_outputs(model, longest[:, :n]) - followed[:, :n] for n in starts]
    except Exception as error:  # models raise what they like
        raise SystemExit(f"--{field}: the model fails on your own rows: {first_line(error)}") from error
    gaps = (padded - trained, padded - torch.cat(alone), torch.cat(more, 1))
    modes, padding, future = (not within_rounding(accelerator, model, gap, padded.std()) for gap in gaps)
    where = f"--{field}: on your own rows the model"
    refuse(
        (not padded.isfinite().all(), f"{where} gives NaN or infinity"),
        (modes, f"{where} differs between train and eval mode; turn off what is random in its configuration"),
        (padding, f"{where} gives a padded row other numbers than that row alone: padding reaches its state"),
        (future, f"{where} gives a token other numbers if more follow; lower query_length, response_length"),
    )


def random_generator(device, *key: int) -> torch.Generator:
    """A generator of the key alone, so that a resumed run draws what the whole run would have drawn."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))
    return torch.Generator(device).manual_seed(seed)


def write_text(path: Path, text: str) -> None:
    """Written aside and renamed, so that a kill leaves the old file or the new one."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text, encoding="utf-8")
    aside.rename(path)


def save_checkpoint(accelerator, folder: Path, step: int, state: dict, *objects) -> None:
    """What a resumed run needs of objects (model, optimizer), renamed when whole; only then are older
    checkpoints deleted. Each rank writes its part of sharded ones, rank 0 alone what all ranks hold."""
    aside, final = folder / "checkpoints/tmp", folder / f"checkpoints/step_{step:06d}"
    if final.is_dir():
        return
    if accelerator.is_main_process:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process or units(*objects):
        held = [x.state_dict() for x in (*objects, accelerator.scaler) if x is not None]
        torch.save(held, aside / f"rank_{accelerator.process_index}.pt")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (aside / "state.json").write_text(json.dumps({**state, "step": step}))
        aside.rename(final)
        for older in set(final.parent.iterdir()) - {final}:
            shutil.rmtree(older)
    accelerator.wait_for_everyone()


def load_checkpoint(accelerator: Accelerator, folder: Path, *objects) -> dict | None:
    """Loads the newest checkpoint into the prepared objects; returns its state, None where there is none."""
    newest = max(folder.glob("checkpoints/step_*"), key=lambda path: int(path.name[5:]), default=None)
    if newest is None:
        return None
    accelerator.print(f"going on from {newest}")
    file = newest / f"rank_{accelerator.process_index if units(*objects) else 0}.pt"
    refuse((not file.is_file(), f"{newest} is of another version; name a new --output_dir"))
    held = torch.load(file, map_location="cpu")
    for x, of_x in zip((*objects, accelerator.scaler), held):
        x.load_state_dict(of_x)
    return json.loads((newest / "state.json").read_text())


def fingerprint(path: Path) -> str:
    """SHA-256 of a file; of a model's folder, that of the last megabyte of its configuration and weights."""
    digest, weights = hashlib.sha256(), sorted([*path.glob("*.safetensors"), *path.glob("*.bin")])
    for file in [path / "config.json", *weights] if path.is_dir() else [path]:
        with file.open("rb") as opened:
            opened.seek(max(0, file.stat().st_size - 2**20) if path.is_dir() else 0)
            digest.update(opened.read())
    return digest.hexdigest()


def open_run(accelerator: Accelerator, args) -> Path:
    """Creates output_dir with args.json. Refuses a folder that another process is writing to, and one with a
    run of other data or models, or of other settings than those of memory, speed and tracker."""
    folder, file = Path(args.output_dir), Path(args.output_dir, "args.json")
    free = "micro_batch|forward_batch|generation_batch|gradient_checkpointing|checkpoint_every|log_with"
    launched = {name: getattr(accelerator, name) for name in ("num_processes", "mixed_precision")}
    new = json.loads(json.dumps({**dataclasses.asdict(args), **launched}))
    for name, path in dataclasses.asdict(args).items():
        if isinstance(path, str) and (os.path.isfile(path) or os.path.isfile(f"{path}/config.json")):
            new[f"sha256 of {name}"] = fingerprint(Path(path))
    old = json.loads(file.read_text()) if file.is_file() else new
    other = [name for name in {**old, **new} if old.get(name) != new.get(name) and not re.match(free, name)]
    text = ", ".join(f"{name} ({old.get(name)!r} there, {new.get(name)!r} here)" for name in other)
    inside = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    foreign = not file.is_file() and inside - {"args.json.tmp", "lock"} != set()
    where, advice = f"--output_dir {folder}", "name a new folder or delete this one"
    refuse(
        (text != "", f"{where} holds another run: {text}; {advice}"),
        (foreign, f"{where} is not empty and holds no run of this script; {advice}"),
    )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            accelerator.lock = (folder / "lock").open("a+")  # the system releases it when this process ends
            fcntl.lockf(accelerator.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            other = (folder / "lock").read_text()
            raise SystemExit(f"{where}: process {other} is writing there; wait for it, or end it") from None
        except OSError as error:
            raise SystemExit(f"{where}: {first_line(error)}; name another folder") from None
        accelerator.lock.truncate(0)
        print(os.getpid(), end="", file=accelerator.lock, flush=True)
        write_text(file, json.dumps(new, indent=1))
    accelerator.wait_for_everyone()
    return folder


def open_metrics(accelerator: Accelerator, args, folder: Path, step: int) -> None:
    """Starts the tracker of a run that goes on from the checkpoint of `step`, whose line is logged again; it
    ends itself at exit. Drops from metrics.jsonl and samples.jsonl what will be written once more."""
    for path, last in ((folder / "metrics.jsonl", step - 1), (folder / "samples.jsonl", step)):
        if path.is_file() and accelerator.is_main_process:
            lines = path.read_text("utf-8").split("\n")[:-1]  # a line that was cut short has no newline
            write_text(path, "".join(line + "\n" for line in lines if json.loads(line)["step"] <= last))
    # the name is that of TensorBoard's folder, or of the others' project
    name, settings = ("tensorboard", None) if args.log_with == "tensorboard" else ("pfppo", vars(args))
    try:
        accelerator.init_trackers(name, settings, {"tensorboard": {"purge_step": step}})
    except Exception as error:  # trackers raise what they like, where nobody has logged in for example
        raise SystemExit(f"--log_with {args.log_with}: {first_line(error)}") from None


def progress(parts, phase: str):
    """The parts one by one; where they take longer, rank 0 says every 30 seconds how far the phase is."""
    said = time.time()
    for done, part in enumerate(parts):
        if time.time() - said >= 30 and PartialState().is_main_process:
            said = time.time()
            print(f"{phase} {done}/{len(parts)}", flush=True)
        yield part


def time_left(start: float, done: int, to_do: int) -> str:
    """What the console says of the seconds that are left, nothing at either end."""
    return f", {(time.time() - start) / done * to_do:.0f} s left" if done and to_do else ""


def log_metrics(accelerator, folder: Path, step: int, metrics: dict, shown=(), left: str = "") -> None:
    """metrics.jsonl, the tracker, and on the console the tags in `shown`; by rank 0 alone."""
    if accelerator.is_main_process:
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        accelerator.log(metrics, step)
        values = [f"{tag} {metrics[tag]:.4g}" for tag in shown if tag in metrics]
        print("  ".join([f"{folder.name} {step}{left}", *values]), flush=True)


def run(main, args) -> None:
    """main(args) as a command: SIGTERM and Ctrl-C save first, a full disk ends it with one line."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ask_to_stop)
    try:
        main(args)
    except Exception as error:
        there = next(path for path in Path(args.output_dir, "_").absolute().parents if path.exists())
        full_disk = "No space left" in str(error) or shutil.disk_usage(there).free < 2**20
        advice = "make room, then the same command goes on"
        refuse((full_disk, f"--output_dir {args.output_dir}: the disk is full; {advice} ({error})"))
        raise
    finally:
        ASKED_TO_STOP.clear()
        end_at_once()


# ------------------------------------------------------------------------------------------------------------
# Plumbing of this script alone
# ------------------------------------------------------------------------------------------------------------


def split_answer(row: dict, prompt_field: str, answer_field: str, where: str) -> tuple[str | list[dict], str]:
    """Prompt and answer of a row. The answer's column is a text, or messages that end with the assistant's;
    those before it are the prompt then, if there are any."""
    answer, before = row.get(answer_field), []
    if isinstance(answer, list) and answer and isinstance(answer[-1], dict):
        last = answer[-1].get("role")
        refuse((last != "assistant", f"{where}: {answer_field} must end with role assistant, not {last}"))
        before, answer = answer[:-1], plain_text(answer[-1].get("content"))
    has, prompt = ", ".join(sorted(row)), before or row.get(prompt_field)
    half = str(answer).encode(errors="ignore").decode() != str(answer)
    refuse(
        (row.get(answer_field) is None, f"{where}: no column {answer_field}; it has {has}"),
        (not isinstance(answer, str), f"{where}: {answer_field} must be a text, or messages"),
        (half, f"{where}: {answer_field} has half of a character, as a cut \\ud83d leaves it"),
        (prompt is None, f"{where}: no column {prompt_field}; it has {has}"),
    )
    return prompt, answer


@torch.no_grad()
def evaluate(accelerator, policy: nn.Module, rows: list[dict], size: int) -> dict[str, float]:
    """Held-out loss in nats per token; every row counts once, whatever the number of ranks."""
    policy.eval()
    device, local_rows = accelerator.device, rows[accelerator.process_index :: accelerator.num_processes]
    total = torch.zeros((), device=device, dtype=torch.float64)
    with whole(accelerator, policy):
        for part in progress(micro_batches(local_rows, size), "held-out loss: batch"):
            total -= response_logprobs(policy, part, device).double().sum()
    tokens = sum(len(row["response_ids"]) for row in rows)
    total = accelerator.reduce(total, "sum").item()
    return {"test/loss": total / tokens} if rows else {}


if __name__ == "__main__":
    run(main, parse_args(Args))
