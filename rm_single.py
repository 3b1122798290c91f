"""Reward model from comparisons: stage 2 of SFT -> reward model -> RL.

Eq. 1 and 2 (the numbers are those of the chapters in `main`):
  1. read labels: (prompt, chosen, rejected) as text, or the best of K responses as token ids
  2. normalise: gain and bias so that π_SFT's own responses have reward mean 0 and standard deviation 1 (LMHP)
  3. take the next batch of labels; score their K responses with R_φ = π_SFT's backbone plus one output layer
  4. cross-entropy over the K rewards; for K = 2 it is -log σ(R_φ(y_w|c) - R_φ(y_l|c)), Eq. 2; Adam
  5. held-out loss and accuracy, every label once; log and save
  6. normalise again, save
Training, normalisation and accuracy use the unbounded score. The paper has R_φ in [-1, 1] and does not say
how: with `--bound tanh` readers of the saved model get tanh of the score, which keeps every ranking.

Run on a CPU, one GPU, eight GPUs (sizes are global, so the algorithm is the same):
  accelerate launch --cpu --num_processes 1 rm_single.py --model sft/model --train_data pairs.jsonl
  accelerate launch --num_processes 1 --mixed_precision bf16 rm_single.py ...
  accelerate launch --multi_gpu --num_processes 8 --mixed_precision bf16 rm_single.py ...
In:  the SFT model (`--model`), labels (`--train_data`), prompts to sample on (`--normalize_prompts`).
Out: `output_dir/model` (a sequence classification model with one label), `metrics.jsonl`, `tensorboard/`,
     `checkpoints/`. The same command continues a killed run.

Sources: PAPER = arXiv 2409.06957; LMHP = openai/lm-human-preferences@cbfd210;
LMHPD = vwxyzjn/lm-human-preference-details@ccc1953. `DEPARTS` marks a difference from one of them;
`--preset lm_human_preferences` is LMHP's setting on this same code path.
"""

import codecs
import copy
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
import torch.nn.functional as F
import tyro
from accelerate import Accelerator, PartialState, tracking
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, set_seed
from torch import Tensor, nn

# Shapes: K responses per label, rows = labels x K with the responses of a label adjacent, R response length,
# T tokens of the longest row of a micro-batch.
#
#   column   0 ......... T-1
#   ids      P P q q q r r .     all padding is left, the reward is read in the last column; ".": stop token
#
# Numbers in Args, with the least and the largest value that is taken:
Count, Whole = Annotated[int, 1, math.inf], Annotated[int, 0, math.inf]
Amount = Annotated[float, 0, math.inf]
Positive = Annotated[float, 1e-12, math.inf]


@dataclass(kw_only=True)
class Args:
    # run
    output_dir: str = "output/rm"
    """folder for everything this run writes; a folder that holds another run is refused"""
    preset: Literal["pfppo", "lm_human_preferences"] = "pfppo"
    """defaults for the other fields: the paper's, or LMHP's (PRESETS below); fields given as flags win"""
    seed: Annotated[int, 0, 2**31] = 1
    """shared over ranks: output layer, data order; sampling gets its own generators from (seed, rank)"""
    dry_run: bool = False
    """read and check everything, print the derived sizes, and stop before weights are loaded"""
    log_with: str = "tensorboard"
    """tracker of accelerate: tensorboard, wandb, trackio, mlflow, comet_ml, aim, swanlab, ...; or `none`"""
    # models
    model: str
    """π_SFT: causal language model, folder or hub id; R_φ starts from it, and it is sampled to normalise"""
    bound: Literal["tanh", "none"] = "tanh"
    """saved with the model: `tanh` lets readers see tanh(score), in [-1, 1]; `none` the score (LMHP)"""
    frozen_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """weights of the frozen π_SFT; auto: bfloat16 under --mixed_precision bf16, else float32"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, a third more time"""
    shard: bool = False
    """split weights, gradients and Adam's moments over the processes (FSDP2), for models too large for one"""
    # labels
    train_data: str
    """labels: .jsonl(.gz), .json, .csv, .parquet, a folder, or hub id `name:split`; texts (prompt_field,
    chosen_field, rejected_field) or token ids: `query`, `sample0` .. `sampleK-1` of one length, `best` in
    0 .. K-1"""
    eval_data: str | None = None
    """held-out labels, same columns; none: those behind num_train, if any"""
    num_train: Whole = 0
    """train on this many labels from the start of train_data; 0: on all"""
    label_pad_id: Annotated[int, -1, math.inf] = -1
    """token-id labels: id that pads them in the file, stripped on reading; -1: none"""
    prompt_field: str = "prompt"
    """column with the prompt: text, or a list of chat messages (the tokenizer's chat template is applied)"""
    chat_template: str | None = None
    """file with a Jinja template, in place of the tokenizer's own if it has one; saved with the model"""
    chosen_field: str = "chosen"
    """column with the better response: a text, or messages that end with it (earlier ones are the prompt)"""
    rejected_field: str = "rejected"
    """column with the worse response, likewise"""
    query_length: Count = 512
    """longest query in tokens"""
    long_queries: Literal["drop", "keep_start"] = "drop"
    """what happens to a text query longer than query_length; a token-id label with one is refused"""
    response_length: Count = 512
    """longest response in tokens with stop token: longer text labels are left out, samples cut"""
    stop_token: str = "eos"
    """ends a sample: `eos`, `none`, a token, a text that is one, an id; special ones also end text labels"""
    # training
    epochs: Count = 1
    """passes over the labels (PAPER: 1)"""
    batch_size: Count = 64
    """labels per optimizer step, over all ranks"""
    micro_batch_size: Count = 16
    """labels (of K responses) per rank in one forward and backward pass; memory, not the gradient"""
    lr: Amount = 1e-5
    """peak learning rate (PAPER: 1e-5)"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """per step: constant, or falling to zero"""
    warmup_steps: Whole = 0
    """steps over which the learning rate rises linearly from lr / warmup_steps"""
    adam_style: Literal["torch", "tensorflow"] = "torch"
    """where epsilon enters Adam; TensorFlow's is what LMHP's curves used"""
    eps: Positive = 1e-8
    """Adam's epsilon"""
    weight_decay: Amount = 0.0
    """AdamW's decoupled weight decay"""
    max_grad_norm: Amount = 1.0
    """clip the gradient norm at this; 0: never"""
    # normalisation
    normalize_before: bool = False
    """set gain and bias on π_SFT samples before training (LMHP)"""
    normalize_after: bool = True
    """set gain and bias on π_SFT samples after training"""
    normalize_samples: Annotated[int, 2, math.inf] = 512
    """responses behind one mean and standard deviation, over all ranks"""
    normalize_prompts: str | None = None
    """prompts to sample on, with column prompt_field; none: the queries of the training labels"""
    normalize_query_length: Whole = 0
    """longest query when sampling, in tokens; 0: query_length (LMHPD: the response length)"""
    temperature: Positive = 1.0
    """of all samples drawn here"""
    # evaluation and logging
    eval_every: Whole = 0
    """steps between evaluations; 0: only after the last step"""
    kl_samples: Whole = 0
    """responses for train/kl at each evaluation, the backbone's KL to π_SFT as a model of text (LMHPD)"""
    forward_batch_size: Count = 32
    """rows per rank in one forward pass without gradient (evaluation, generation)"""
    log_every: Count = 10
    """steps between lines on the console and in metrics.jsonl, each a mean over these steps"""
    checkpoint_every: Count = 500
    """steps between checkpoints; one is written before every evaluation and after the last step too"""


# LMHP launch.py and train_reward.py; LMHPD's normalize draws at least 512 samples a process
LM_HUMAN_PREFERENCES = """
    --bound none --num_train 4992 --label_pad_id 50259 --query_length 64 --long_queries keep_start
    --response_length 24 --stop_token none --batch_size 32 --micro_batch_size 32 --forward_batch_size 128
    --lr 5e-5 --lr_schedule linear --adam_style tensorflow --eps 1e-5 --max_grad_norm 0 --normalize_before
    --normalize_query_length 24 --temperature 0.7 --eval_every 10 --kl_samples 512 --log_every 1
"""
PRESETS = {"pfppo": "", "lm_human_preferences": LM_HUMAN_PREFERENCES}


def main(args: Args) -> None:
    # ------------------------------------------------ Setup: what can be refused is refused here
    accelerator = start_accelerator(args.shard, args.log_with, args.output_dir)
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    refuse((args.batch_size < world, f"--batch_size must be at least the {world} processes"))
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoModelForSequenceClassification

    config = load_config(args.model, "model")
    known = type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    with torch.device("meta"):  # readers look for its head under this name
        head = (
            getattr(AutoModelForSequenceClassification.from_config(config), "score", None) if known else None
        )
    refuse(
        (not known, f"--model {args.model}: transformers has no sequence classification form of it"),
        (not isinstance(head, nn.Linear), f"--model {args.model}: that form of it has no layer `score`"),
    )
    tokenizer = load_pretrained("AutoTokenizer", args.model, "model", args.chat_template)
    stop_id = stop_token_id(tokenizer, args.stop_token)
    check_rows(config, [[max(stop_id, 0)]], "stop_token")

    # ------------------------------------------------ 1. read labels
    labels, left_out = read_labels("train_data", args, tokenizer, config, stop_id)
    num_train = args.num_train or len(labels)
    refuse((num_train > len(labels), f"--num_train {num_train}: there are {len(labels)} labels; lower it"))
    labels, eval_labels, eval_left_out = labels[:num_train], labels[num_train:], 0
    if args.eval_data:
        eval_labels, eval_left_out = read_labels("eval_data", args, tokenizer, config, stop_id)
    limit, queries = args.normalize_query_length or args.query_length, [label["query"] for label in labels]
    if args.normalize_prompts:
        rows = load_rows(args.normalize_prompts, "normalize_prompts", (args.prompt_field,))
        cut = args.long_queries == "keep_start"
        rows = encode_queries(tokenizer, rows, args.prompt_field, limit, "normalize_prompts", cut)
        queries = [row["query_ids"] for row in rows]
    queries = [query[:limit] for query in queries]
    if args.normalize_before or args.normalize_after or args.kl_samples:
        check_rows(config, queries, "normalize_prompts", args.response_length)
    steps_per_epoch = math.ceil(num_train / args.batch_size)
    num_steps = steps_per_epoch * args.epochs
    accelerator.print(
        f"{num_train} labels ({left_out} longer ones left out) of {len(labels[0]['samples'])} responses, "
        f"{len(eval_labels)} held-out ({eval_left_out} left out), {len(queries)} prompts to normalise on\n"
        f"{args.epochs} x {steps_per_epoch} = {num_steps} steps of {args.batch_size} on {world} processes"
    )
    first, best = labels[0], labels[0]["samples"][labels[0]["best"]]
    show_first(accelerator, tokenizer, first.get("prompt", []), first["query"], best, stop_id)
    frozen_dtype = frozen_precision(accelerator, args.frozen_dtype)
    if args.dry_run:
        accelerator.print(memory_line(accelerator, config, 1, 1, frozen_dtype, args.shard))
        return
    output_dir = open_run(accelerator, args)

    set_seed(args.seed)
    sft_policy = load_causal_lm(args.model, frozen_dtype, args.shard)
    sft_policy = place(accelerator, args.shard, sft_policy).eval().requires_grad_(False)
    trained_lm = load_causal_lm(args.model, torch.float32, args.shard)  # R_φ's backbone
    if args.gradient_checkpointing:
        recompute_activations(trained_lm)
    reward_model = RewardModel(trained_lm.base_model, args.bound)
    init_head(reward_model)
    place(accelerator, args.shard, reward_model, trained_lm.get_output_embeddings())  # which is for train/kl
    optimizer = torch.optim.AdamW(reward_model.parameters(), eps=args.eps, weight_decay=args.weight_decay)
    model = reward_model if args.shard else accelerator.prepare(reward_model)
    optimizer = accelerator.prepare(optimizer)
    reward_model = accelerator.unwrap_model(model, keep_torch_compile=False)

    # ------------------------------------------------ Continue a killed run; 2. or normalise first
    state = load_checkpoint(accelerator, output_dir, reward_model, optimizer)
    open_metrics(accelerator, args, output_dir, state["step"] if state else 0)
    if state is None:
        rows = [label["query"] + label["samples"][0] for label in labels]
        check_model(accelerator, reward_model, rows, 0, "model")
        if args.normalize_before or args.normalize_after or args.kl_samples:
            check_cache(accelerator, sft_policy, queries, "model")
        state = {"step": 0, "optimizer_step": 0, "recent": {}, "metrics": {}}
        if args.normalize_before:
            metrics = normalize(accelerator, reward_model, sft_policy, queries, args, stop_id, stage=0)
            log_metrics(accelerator, output_dir, 0, metrics, ("normalize_before/gain",), "")
    run_start, first_step = time.time(), state["step"]
    for step in range(first_step + 1, num_steps + 2):
        # ---------------- 5. held-out loss and accuracy. This may fail: a checkpoint comes before
        done, metrics = step - 1, state["metrics"]
        if done and (done == num_steps or (args.eval_every and done % args.eval_every == 0)):
            metrics |= evaluate(accelerator, reward_model, eval_labels, args.forward_batch_size)
            metrics |= backbone_kl(accelerator, trained_lm, sft_policy, queries, args, stop_id, done)
        if metrics:
            left = time_left(run_start, done - first_step, num_steps - done)
            log_metrics(accelerator, output_dir, done, metrics, SHOWN, f"/{num_steps}{left}")
        if done == num_steps:
            break
        step_start = time.time()

        # ---------------- 3. the next batch of a shuffled pass over the labels; ranks divide it
        epoch, index = divmod(step - 1, steps_per_epoch)
        order = torch.randperm(len(labels), generator=random_generator("cpu", args.seed, 0, epoch))
        picks = order.split(args.batch_size)[index].tolist()  # the last batch of a pass may be smaller
        batch = [labels[i] for i in picks]
        local_batch = batch[rank::world] or batch[:1]  # a rank without labels goes along with one of weight 0

        # ---------------- 4. cross-entropy over the K rewards, mean over the labels of all ranks; Adam
        reward_model.train()
        lr = scheduled_lr(args.lr, step - 1, num_steps, args.lr_schedule, args.warmup_steps)
        eps = adam_epsilon(args.eps, args.adam_style, state["optimizer_step"] + 1)
        optimizer.param_groups[0].update(lr=lr, eps=eps)
        parts, local_stats = micro_batches(local_batch, args.micro_batch_size), torch.zeros(2, device=device)
        for part, counts, sync in rounds(accelerator, model, parts):
            with sync, accelerator.autocast():
                loss, accuracy = best_of_k_loss(*label_rewards(model, part, device))
                # DDP averages gradients over ranks
                weight = len(part) * world / len(batch) * counts if batch[rank::world] else 0.0
                accelerator.backward(loss * weight)
            local_stats += torch.stack([loss.detach(), accuracy]) * weight
        loss, accuracy = accelerator.reduce(local_stats, "mean").tolist()
        norm = float(full(accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm or math.inf)))
        check_finite(accelerator, step, loss, norm)
        optimizer.step()
        optimizer.zero_grad()
        state["optimizer_step"] += not optimizer.step_was_skipped  # under fp16 a step may be
        recent = {"train/loss": loss, "train/accuracy": accuracy, "train/grad_norm": norm}
        for tag, value in {**recent, "seconds/step": time.time() - step_start}.items():
            state["recent"].setdefault(tag, []).extend([value] if math.isfinite(value) else [])

        # ---------------- Measure and save
        last, stop, metrics = step == num_steps, stopping(accelerator), {}
        if step % args.log_every == 0 or last:
            metrics = {tag: float(np.mean(values)) for tag, values in state["recent"].items() if values}
            metrics |= {"train/lr": lr, "train/epoch": step / steps_per_epoch}
            metrics["train/gain"] = full(reward_model.reward_gain).item()
            metrics["train/bias"] = full(reward_model.reward_bias).item()
            state["recent"] = {}
        state |= {"step": step, "metrics": metrics}
        due = any(every and step % every == 0 for every in (args.checkpoint_every, args.eval_every))
        if due or stop or last:
            save_checkpoint(accelerator, output_dir, step, state, reward_model, optimizer)
        refuse((stop, f"stopped after step {step}, as asked; the same command goes on"))

    # ------------------------------------------------ 6. normalise again, save
    if args.normalize_after:
        accelerator.print(f"normalising: {args.normalize_samples} samples, and as many to measure again")
        metrics = normalize(accelerator, reward_model, sft_policy, queries, args, stop_id, stage=1)
        log_metrics(accelerator, output_dir, num_steps + 1, metrics, ("normalize_after/gain",), "")
    save_model(accelerator, as_classifier(reward_model), tokenizer, stop_id, output_dir / "model")
    accelerator.print(f"done: {output_dir / 'model'}")


SHOWN = ("train/loss", "train/accuracy", "test/accuracy", "train/kl")


@torch.no_grad()
def normalize(accelerator, reward_model, sft_policy, queries, args: Args, stop_id: int, stage: int) -> dict:
    """Resets gain and bias, measures the unbounded reward on π_SFT samples of all ranks, sets gain and bias,
    and measures again on fresh samples. What is normalised is the reward's scale over π_SFT's own responses:
    a mean reward of 0 there makes a positive reward mean "better than where RL starts" (LMHP)."""
    name, results = ("normalize_before", "normalize_after")[stage], {}
    reward_model.eval()
    set_gain_and_bias(reward_model, 1.0, 0.0)
    for number, check in enumerate(("", "check_")):
        count = args.normalize_samples
        samples = sample(accelerator, sft_policy, queries, count, args, stop_id, stage, number)
        local_rewards = torch.zeros(len(samples), device=accelerator.device)
        with whole(accelerator, reward_model):
            for part in progress(micro_batches(samples, args.forward_batch_size), "scoring: batch"):
                rewards = label_rewards(reward_model, part, accelerator.device)[0]
                local_rewards[[label["row"] for label in part]] = rewards.squeeze(1)
        rewards = accelerator.gather(local_rewards)
        results |= {f"{name}/{check}mean": rewards.mean().item(), f"{name}/{check}std": rewards.std().item()}
        if not check:
            gain, bias = normalization(rewards)
            set_gain_and_bias(reward_model, gain, bias)
            results |= {f"{name}/gain": gain, f"{name}/bias": bias}
    return results


def best_of_k_loss(rewards: Tensor, best: Tensor) -> tuple[Tensor, Tensor]:
    """rewards (labels, K), best (labels,) -> (mean loss, accuracy). A tie at the top counts as a guess among
    the tied."""
    # Eq. 1, 2 for K = 2, LMHP for K = 4: -log softmax(rewards)[best]; for two -log σ(R(y_w) - R(y_l))
    loss = F.cross_entropy(rewards.float(), best)
    is_top = rewards == rewards.amax(1, keepdim=True)
    right = is_top.gather(1, best.unsqueeze(1)).squeeze(1) / is_top.sum(1)
    return loss, right.mean()


# DEPARTS PAPER, which has R in [-1, 1] without a recipe: standardised on π_SFT samples, then tanh (`bound`)
def normalization(rewards: Tensor) -> tuple[float, float]:
    """Rewards with gain 1 and bias 0 (samples,) -> (gain, bias) that give them mean 0 and standard deviation
    (n-1) 1."""
    mean, std = rewards.mean(), rewards.std()
    refuse((not std > 0, "--normalize_samples: the reward of all samples is one, or not finite; raise it"))
    return (1 / std).item(), (-mean / std).item()


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


def adam_epsilon(eps: float, style: str, step: int, beta2: float = 0.999) -> float:
    """Epsilon of torch's Adam at step 1, 2, ...; divided by sqrt(1 - β2^t) it is TensorFlow's exactly."""
    return eps / math.sqrt(1 - beta2**step) if style == "tensorflow" else eps


class RewardModel(nn.Module):
    """R_φ: a language-model backbone plus one output layer (Eq. 2), gain and bias."""

    def __init__(self, lm_backbone: nn.Module, bound: str = "none"):
        super().__init__()
        self.lm_backbone, self.bound = lm_backbone, bound
        config = lm_backbone.config.get_text_config()
        width = getattr(config, "word_embed_proj_dim", None) or config.hidden_size  # opt-350m has the former
        self.scalar_head = nn.Linear(width, 1)
        self.reward_gain, self.reward_bias = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids, mask (rows, T) -> unbounded score at every column (rows, T), float32 under autocast too."""
        hidden = self.lm_backbone(**model_inputs(ids, mask), use_cache=False).last_hidden_state
        with torch.autocast(hidden.device.type, enabled=False):
            return self.reward_gain * self.scalar_head(hidden.float()).squeeze(-1) + self.reward_bias


def set_gain_and_bias(model: RewardModel, gain: float, bias: float) -> None:
    """In place; both stay trainable parameters."""
    model.reward_gain.data.fill_(gain)
    model.reward_bias.data.fill_(bias)


def init_head(model: RewardModel) -> None:
    """LMHP: output layer with standard deviation 1 / sqrt(hidden + 1) and bias 0; gain 1, bias 0."""
    nn.init.normal_(model.scalar_head.weight, std=1 / math.sqrt(model.scalar_head.in_features + 1))
    nn.init.zeros_(model.scalar_head.bias)
    set_gain_and_bias(model, 1.0, 0.0)


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


@torch.no_grad()
def generate(
    model, queries, query_mask, num_responses, length, temperature, stop_id, stop_after=0, generator=None
) -> Tensor:
    """Plain ancestral sampling: queries, query_mask (B, Q) padded left -> responses (B*N, length), 0 behind
    the stop token, those of a query adjacent. Temperature 0 is greedy. The query is read once for its N
    responses, and rows that have stopped leave the batch. Nothing is taken from a generation_config: samples
    are π_θ's at this temperature."""
    # transformers 5.24 renamed the cache
    cache_name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    cache = growing_cache(model.config)
    settings = {cache_name: cache, "use_cache": True, "logits_to_keep": 1}
    logits = model(**model_inputs(queries, query_mask), **settings).logits[:, -1]
    logits, mask = logits.repeat_interleave(num_responses, 0), query_mask.repeat_interleave(num_responses, 0)
    width = queries.shape[1]  # a recurrent layer counts no tokens
    if max((getattr(x, "get_seq_length", lambda: width)() for x in cache.layers), default=0) != width:
        raise RuntimeError(f"{type(model).__name__} does not fill the cache that it is given")
    if num_responses > 1:
        copies = torch.arange(len(queries), device=queries.device).repeat_interleave(num_responses)
        cache.reorder_cache(copies)
    rows = torch.arange(len(mask), device=queries.device)  # rows still in the batch
    done = torch.zeros_like(rows, dtype=torch.bool)
    responses = torch.zeros(len(mask), length, dtype=torch.long, device=queries.device)
    for t in range(length):
        tokens = logits.argmax(-1)
        if temperature > 0:
            probabilities = (logits.float() / temperature).softmax(-1)
            tokens = torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
        responses[rows, t] = torch.where(done, 0, tokens)
        if t >= stop_after:
            done = done | (tokens == stop_id)
        if t + 1 == length or done.all():
            break
        if done.sum() >= max(1, len(done) // 8):  # dropping copies the cache, so not for every single row
            alive = (~done).nonzero().squeeze(1)
            cache.reorder_cache(alive)
            rows, done, mask, tokens = rows[alive], done[alive], mask[alive], tokens[alive]
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        positions = mask.sum(1, keepdim=True) - 1
        step = {"input_ids": tokens.unsqueeze(1), "attention_mask": mask.long(), "position_ids": positions}
        logits = model(**step, **settings).logits[:, -1]
    return responses


def sample(accelerator, model, queries, count: int, args: Args, stop_id: int, stage, number) -> list[dict]:
    """This rank's share of count responses, one to each of the next queries -> labels of one sample, `row`
    counts."""
    rank, count = accelerator.process_index, math.ceil(count / accelerator.num_processes)
    generator = random_generator(accelerator.device, args.seed, 1, rank, stage, number)
    picks = prompt_order(len(queries), rank * count, count, args.seed + 1000 * stage + number)
    samples, size = [], args.forward_batch_size
    for part in progress([picks[i : i + size] for i in range(0, count, size)], "generating: batch"):
        ids, mask = pad_left([queries[i] for i in part], accelerator.device)
        with whole(accelerator, model):
            model.tie_weights()  # to the embedding that is whole now
            length, temperature = args.response_length, args.temperature
            responses = generate(model, ids, mask, 1, length, temperature, stop_id, 0, generator)
        for i, response in zip(part, responses.tolist()):
            end = response.index(stop_id) + 1 if stop_id in response else len(response)
            samples.append({"query": queries[i], "samples": [response[:end]], "best": 0, "row": len(samples)})
    return samples


def micro_batches(labels: list[dict], size: int) -> list[list[dict]]:
    """Parts of at most `size` labels of similar length, so that little is padding."""
    labels = sorted(labels, key=lambda label: len(label["query"]) + max(map(len, label["samples"])))
    return [labels[i : i + size] for i in range(0, len(labels), size)]


def label_rewards(model: nn.Module, labels: list[dict], device) -> tuple[Tensor, Tensor]:
    """Labels -> (unbounded rewards (labels, K), best (labels,)). Padding is left: the last column is the last
    token."""
    ids, mask = pad_left([label["query"] + sample for label in labels for sample in label["samples"]], device)
    rewards = model(ids, mask)[:, -1].view(len(labels), -1)
    return rewards, torch.tensor([label["best"] for label in labels], device=device)


def response_logprobs(model: nn.Module, labels: list[dict], temperature: float, device) -> Tensor:
    """Log-probabilities (labels, R) of the first sample of each label, 0 left of it."""
    ids, mask = pad_left([label["query"] + label["samples"][0] for label in labels], device)
    responses, response_mask = pad_left([label["samples"][0] for label in labels], device)
    width = responses.shape[1]
    logits = model(**model_inputs(ids, mask), use_cache=False, logits_to_keep=width + 1).logits[:, :-1]
    return token_logprobs(logits, responses, response_mask, temperature)


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


def frozen_precision(accelerator: Accelerator, name: str) -> torch.dtype:
    """The dtype of that name; `auto` is bfloat16 under bf16, else float32."""
    auto = "bfloat16" if accelerator.mixed_precision == "bf16" else "float32"
    return getattr(torch, auto if name == "auto" else name)


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


def growing_cache(config):
    """The cache of a model; its ordinary layers have room for more tokens behind those that they hold."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    growing_layer = type("GrowingLayer", (DynamicLayer,), {"update": write_behind})
    cache = DynamicCache(config=config)
    cache.layers = [growing_layer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def write_behind(layer, keys: Tensor, values: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
    """Adds keys, values (rows, heads, new columns, head size) to a layer -> all that it holds. Those so far
    are copied only where the room ends. In autocast's precision: rotary keys are float32 and would double
    it."""
    kind, old, end = keys.device.type, layer.get_seq_length(), layer.get_seq_length() + keys.shape[2]
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else keys.dtype
    if old == 0:
        layer.lazy_initialization(keys.to(dtype), values.to(dtype))
    for name, new in (("keys", keys), ("values", values)):
        held = getattr(layer, name)
        if old == 0 or held.stride(1) < end * held.stride(2):  # no room: a new buffer, a half longer
            room = new.new_empty(*new.shape[:2], end + end // 2, new.shape[3], dtype=dtype)
            if old:
                room[:, :, :old] = held
            held = room
        held = held.as_strided((*new.shape[:2], end, new.shape[3]), held.stride())
        held[:, :, old:] = new
        setattr(layer, name, held)
    return layer.keys, layer.values


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: nn.Module, labels: list[dict], size: int) -> dict[str, float]:
    """Held-out loss and accuracy: every label counts once, whatever the number of ranks; {} without
    labels."""
    if not labels:
        return {}
    model.eval()
    local_labels = labels[accelerator.process_index :: accelerator.num_processes]
    sums = torch.zeros(2, device=accelerator.device, dtype=torch.float64)
    with whole(accelerator, model):
        parts = micro_batches(local_labels, max(1, size // len(labels[0]["samples"])))
        for part in progress(parts, "held-out loss: batch"):
            loss_and_accuracy = best_of_k_loss(*label_rewards(model, part, accelerator.device))
            sums += torch.stack(loss_and_accuracy).double() * len(part)
    loss, accuracy = accelerator.reduce(sums, "sum").tolist()
    return {"test/loss": loss / len(labels), "test/accuracy": accuracy / len(labels)}


@torch.no_grad()
def backbone_kl(accelerator, trained_lm, sft_policy, queries, args: Args, stop_id: int, step: int) -> dict:
    """train/kl: KL of the trained backbone, as a language model, to π_SFT on its own samples (LMHPD); {} for
    none."""
    if not args.kl_samples:
        return {}
    trained_lm.eval()
    samples = sample(accelerator, trained_lm, queries, args.kl_samples, args, stop_id, 2, step)
    sums = torch.zeros(2, device=accelerator.device, dtype=torch.float64)
    with whole(accelerator, trained_lm, sft_policy):
        trained_lm.tie_weights()
        for part in micro_batches(samples, args.forward_batch_size):
            logprobs = response_logprobs(trained_lm, part, args.temperature, accelerator.device)
            ref_logprobs = response_logprobs(sft_policy, part, args.temperature, accelerator.device)
            sums += torch.tensor(
                [(logprobs - ref_logprobs).sum().item(), len(part)], device=accelerator.device
            )
    total, count = accelerator.reduce(sums, "sum").tolist()
    return {"train/kl": total / count}


def read_labels(field: str, args: Args, tokenizer, config, stop_id: int) -> tuple[list[dict], int]:
    """A labels file -> [{query: ids, samples: K lists of ids, best: int}] and how many were left out as too
    long. Texts are tokenised and closed, padding of ids is stripped."""
    path = getattr(args, field)
    rows, where = load_rows(path, field), f"--{field} {path}"
    if "best" in rows[0] or "sample0" in rows[0]:
        names = sorted(name for name in rows[0] if re.fullmatch(r"sample\d+", name))
        labels = [id_label(row, names, f"{where}, row {i}", args) for i, row in enumerate(rows, 1)]
    else:
        names = ("chosen_text", "rejected_text")
        for number, row in enumerate(rows, 1):
            place = f"{where}, row {number}"
            prompt, row[names[0]] = split_answer(row, args.prompt_field, args.chosen_field, place)
            row["prompt"], row[names[1]] = split_answer(row, args.prompt_field, args.rejected_field, place)
            refuse(
                (prompt != row["prompt"], f"{place}: the two conversations differ before their last message")
            )
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        # a text is closed by a special token, not by a "." (it has its own)
        closing_id = stop_id if stop_id in special | {tokenizer.eos_token_id} else -1
        cut = args.long_queries == "keep_start"
        labels = []
        for row in encode_queries(tokenizer, rows, "prompt", args.query_length, field, cut):
            samples = [encode_response(tokenizer, row[name], closing_id) for name in names]
            if all(0 < len(sample) <= args.response_length for sample in samples):
                labels.append(
                    {"prompt": row["prompt"], "query": row["query_ids"], "samples": samples, "best": 0}
                )
        refuse((not labels, f"{where}: every response is longer than --response_length; raise it"))
    check_rows(config, [label["query"] + sample for label in labels for sample in label["samples"]], field)
    return labels, len(rows) - len(labels)


def id_label(row: dict, names: list[str], where: str, args: Args) -> dict:
    """A label given as token ids; `where` starts its error messages."""
    missing = [name for name in ("query", *names, "best") if row.get(name) is None]
    refuse((missing != [], f"{where}: no column {', '.join(missing)}; it has {', '.join(sorted(row))}"))
    for name in ("query", *names):
        ids = isinstance(row[name], list) and all(isinstance(x, int) and x >= 0 for x in row[name])
        refuse((not ids, f"{where}: {name} must be a list of token ids, 0 or larger"))
    lengths = {len(row[name]) for name in names}
    best = isinstance(row["best"], int) and 0 <= row["best"] < len(names)
    query, *samples = [[x for x in row[name] if x != args.label_pad_id] for name in ("query", *names)]
    refuse(
        (len(names) < 2, f"{where}: needs sample0, sample1, ..., two or more"),
        (len(lengths) > 1, f"{where}: samples of {sorted(lengths)} ids; pad them, see --label_pad_id"),
        (not best, f"{where}: best is {row['best']!r}; it must be in 0 .. {len(names) - 1}"),
        (len(query) > args.query_length, f"{where}: query of {len(query)} tokens; raise --query_length"),
        (not query or not all(samples), f"{where}: the query or a sample is empty; leave the row out"),
    )
    return {"query": query, "samples": samples, "best": row["best"]}


def as_classifier(model: RewardModel) -> nn.Module:
    """The reward model as transformers' sequence classification model with one label: backbone and
    `score.weight`. What that class has no place for stands in its configuration: R = reward_gain · (logit +
    score_bias) + reward_bias."""
    from transformers import AutoModelForSequenceClassification

    config = copy.deepcopy(model.lm_backbone.config)
    numbers = (model.scalar_head.bias, model.reward_gain, model.reward_bias)
    config.score_bias, config.reward_gain, config.reward_bias = (full(x).item() for x in numbers)
    config.num_labels, config.reward_bound = 1, model.bound
    with torch.device("meta"):
        classifier = AutoModelForSequenceClassification.from_config(config)
    setattr(classifier, classifier.base_model_prefix, model.lm_backbone)
    classifier.score.weight = model.scalar_head.weight
    return classifier


@torch.no_grad()
def check_cache(accelerator, policy: nn.Module, queries: list[list[int]], field: str) -> None:
    """Refuses a policy whose logits, as `generate` samples from them, are not those without its cache."""
    (ids, mask), steps = pad_left(some_rows(queries), accelerator.device), []
    policy.eval()
    hook = policy.register_forward_hook(lambda module, inputs, output: steps.append(output.logits[:, -1:]))
    try:
        with whole(accelerator, policy), torch.autocast(accelerator.device.type, enabled=False):
            responses = generate(policy, ids, mask, 2, 8, 0.0, -1)
            hook.remove()
            ids, mask = ids.repeat_interleave(2, 0), mask.repeat_interleave(2, 0)
            inputs = model_inputs(torch.cat([ids, responses], 1), F.pad(mask, (0, 8), value=True))
            logits = policy(**inputs, use_cache=False, logits_to_keep=9).logits[:, :-1].float()
    except Exception as error:  # models raise what they like
        refused = f"--{field}: the model cannot be sampled with a cache: {first_line(error)}"
        raise SystemExit(refused) from error
    finally:
        hook.remove()
    steps = torch.cat([steps[0].repeat_interleave(2, 0), *steps[1:]], 1).float()
    same = logits.shape == steps.shape and within_rounding(accelerator, policy, logits - steps, logits.std())
    refuse((not same, f"--{field}: logits with the cache are not those without; take another model"))


def prompt_order(num_prompts: int, start: int, count: int, seed: int, reshuffle: bool = True) -> list[int]:
    """Positions start .. start+count-1 of the endless stream of shuffled passes over the prompts; without
    reshuffle all in one order."""
    passes, order = range(start // num_prompts, (start + count - 1) // num_prompts + 1), []
    for number in passes:
        generator = random_generator("cpu", seed, 0, number * reshuffle)
        order += torch.randperm(num_prompts, generator=generator).tolist()
    first = start - passes[0] * num_prompts
    return order[first : first + count]


if __name__ == "__main__":
    run(main, parse_args(Args, presets=PRESETS))
