"""Supervised fine-tuning of a language model on prompt and response: stage 1 of SFT -> reward model -> RL.

Maximum likelihood of the response tokens (the numbers are those of the chapters in `main`):
  1. tokenise prompt and response apart and close the response with the stop token: the boundary is where sampling has it
  2. take the next batch of a shuffled pass over the rows
  3. log-probabilities of the response tokens, averaged over the tokens of the whole batch, of all ranks; AdamW
  4. held-out loss (every row once), sampled responses, greedy pass@1
The trained model is π_SFT: the start of the reward model, of the policy, and the reference of the KL penalty.

Run (CPU, 1 GPU, 8 GPUs; sizes are global, so the algorithm is the same):
  accelerate launch --cpu --num_processes 1 sft_single.py --model gpt2 --pad_token '[PAD]' --train_data sft.jsonl --output_dir sft
  accelerate launch --num_processes 1 --mixed_precision bf16 sft_single.py ...
  accelerate launch --multi_gpu --num_processes 8 --mixed_precision bf16 sft_single.py ...
In:  a causal LM folder or hub id (`--model`), or a configuration to start from scratch (`--model_config`, `--tokenizer`); JSONL rows.
Out: `output_dir/model` (weights and tokenizer), `metrics.jsonl`, `tensorboard/`, `samples.jsonl`, `checkpoints/`.
     The same command continues a killed run.

Sources: PAPER = arXiv 2409.06957. `DEPARTS` marks a difference from it.
"""
import dataclasses
import importlib
import json
import math
import os
import shutil
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, gather_object, set_seed
from torch import nn
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache

# Shapes: rows of one batch on one rank, Q query length, R response length, V vocabulary.
#
#   column          0 .. Q-1       Q .. Q+R-1
#   query_response  P P q q q      r r . P P     queries padded left, responses padded right; "." is the stop token
#   micro-batch         P P P P q q q r r .      `trim` moves all padding left: as wide as its longest row
#   response_mask                  1 1 1 0 0     up to and including the stop token: what the loss is over
#   logits          read one column earlier than the token they belong to: Q-1 .. Q+R-2


@dataclass
class Args:
    # run
    output_dir: str = "output/sft"
    """folder for everything this run writes; a folder that holds another run is refused"""
    seed: int = 1
    """shared over ranks: weights from scratch, data order"""
    dry_run: bool = False
    """read and tokenise the data, print settings and derived sizes, and stop before a model is loaded"""
    # model
    model: str = ""
    """folder or hub id of a causal language model to start from"""
    model_config: str = ""
    """in place of model: folder or config.json of a model to start from scratch, weights drawn from seed"""
    tokenizer: str = ""
    """folder or hub id; empty: that of model or model_config"""
    pad_token: str = ""
    """pad token for a tokenizer that has none; may lie past the embedding (padded columns are fed as token 0 and masked)"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass"""
    # data
    train_data: str = ""
    """training rows: .jsonl, .json, .parquet, or hub id `name:split`"""
    eval_data: str = ""
    """held-out rows, same columns; empty: no held-out loss"""
    prompt_field: str = "prompt"
    """column with the prompt: text, or a list of chat messages (the tokenizer's chat template is applied)"""
    response_field: str = "response"
    """column with the response text"""
    messages_field: str = ""
    """in place of both: column with a list of chat messages; the last one, the assistant's, is the response"""
    query_length: int = 1024
    """longest query in tokens"""
    long_queries: Literal["drop", "keep_end", "keep_start"] = "drop"
    """what happens to a query longer than query_length; one of eval_prompts is never dropped but refused"""
    response_length: int = 1024
    """longest response in tokens, the stop token included"""
    long_responses: Literal["drop", "cut"] = "drop"
    """row whose response is longer: left out, or cut (it then has no stop token to learn)"""
    stop_token: str = "eos"
    """token that closes every response: `eos`, `none`, a token or an id; generation in evaluations ends there"""
    # training
    epochs: int = 5
    """passes over the data (PAPER: 5)"""
    batch_size: int = 64
    """rows per optimizer step, over all ranks"""
    micro_batch_size: int = 16
    """rows per rank in one forward and backward pass; changes memory and speed, not the gradient"""
    lr: float = 1e-5
    """peak learning rate (PAPER: 1e-5)"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """per step, after the warm-up"""
    final_lr_fraction: float = 0.0
    """linear and cosine end at this fraction of lr"""
    warmup_steps: int = 0
    """steps over which the learning rate rises linearly from lr / warmup_steps"""
    eps: float = 1e-8
    """Adam's epsilon"""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay"""
    max_grad_norm: float = 1.0
    """clip the gradient norm at this; 0: never"""
    # evaluation and logging
    eval_every: int = 0
    """steps between evaluations; 0: only after the last step"""
    forward_batch_size: int = 32
    """rows per rank in one forward pass without gradient (held-out loss, generation)"""
    eval_prompts: str = ""
    """rows to answer greedily at each evaluation; empty: those of eval_data"""
    actual_score: str = ""
    """`module:function` (`module:function@TEXT` adds the keyword source=TEXT), called with (prompts, responses, rows) and
    returning one number per response, for example 1 where unit tests pass: its mean is test/greedy_pass1"""
    print_samples: int = 2
    """greedy responses shown at each evaluation"""
    log_every: int = 10
    """steps between lines on the console and in metrics.jsonl, each a mean over these steps"""
    checkpoint_every: int = 500
    """steps between checkpoints; the last step always writes one"""


# ---------------------------------------------------------------- models


def load_causal_lm(path: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Causal language model from a folder or hub id, every dropout probability set to 0 (so train and eval mode agree)."""
    config = AutoConfig.from_pretrained(path)
    without_dropout(config)
    return AutoModelForCausalLM.from_pretrained(path, config=config, dtype=dtype)


def without_dropout(config) -> None:
    """Set every dropout probability of a model configuration to 0, in place."""
    for name, value in config.to_dict().items():
        if ("dropout" in name or "pdrop" in name) and isinstance(value, float):
            setattr(config, name, 0.0)


# ---------------------------------------------------------------- token functions


def model_inputs(ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """ids, mask (rows, T) -> forward arguments. Positions count real tokens only; padded columns are fed as token 0."""
    position_ids = (mask.long().cumsum(1) - 1).clamp(min=0)
    return {"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long(), "position_ids": position_ids}


def pad_rows(rows: list[list[int]], pad_token_id: int, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists of ids -> ids (rows, T) padded on `side`, mask (rows, T) bool from the lengths (never from the ids)."""
    length = max(1, max(map(len, rows)))
    ids, mask = torch.full((len(rows), length), pad_token_id), torch.zeros(len(rows), length, dtype=torch.bool)
    for i, row in enumerate(rows):
        columns = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        ids[i, columns], mask[i, columns] = torch.tensor(row, dtype=torch.long), True
    return ids, mask


def pad_batch(queries: list[list[int]], responses: list[list[int]], pad_token_id: int, device) -> dict[str, torch.Tensor]:
    """Lists of ids, one query and one response per row -> queries (rows, Q) left-padded, responses (rows, R) right-padded and
    their masks, as a rollout has them. The one way in which text becomes tensors, for training as for scoring."""
    query_ids, query_mask = pad_rows(queries, pad_token_id, "left")
    response_ids, response_mask = pad_rows(responses, pad_token_id, "right")
    batch = {"queries": query_ids, "query_mask": query_mask, "responses": response_ids, "response_mask": response_mask}
    return {name: tensor.to(device) for name, tensor in {**batch, "score_mask": response_mask}.items()}


def stop_masks(responses: torch.Tensor, stop_token_id: int, stop_after: int) -> tuple[torch.Tensor, torch.Tensor]:
    """responses (rows, R) -> (mask, has_stop): True up to and including the first stop token at index >= stop_after (rows, R);
    whether there is one (rows,). stop_token_id -1 means none."""
    is_stop = responses == stop_token_id
    is_stop[:, :stop_after] = False
    behind = (is_stop.cumsum(1) - is_stop.long()) > 0
    return ~behind, is_stop.any(1)


class AutocastCache(DynamicCache):
    """Key-value cache in autocast's precision. Under autocast rotary keys come in float32 and would make the whole cache so: twice the
    memory, for digits that attention drops anyway."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """keys, values (rows, heads, new columns, head size) -> all keys and values so far."""
        if torch.is_autocast_enabled(key_states.device.type):
            dtype = torch.get_autocast_dtype(key_states.device.type)
            key_states, value_states = key_states.to(dtype), value_states.to(dtype)
        return super().update(key_states, value_states, *args, **kwargs)


@torch.no_grad()
def generate(
    model: nn.Module, queries: torch.Tensor, query_mask: torch.Tensor, num_responses: int, response_length: int,
    temperature: float, stop_token_id: int, stop_after: int, pad_token_id: int, generator: torch.Generator | None = None,
) -> torch.Tensor:  # fmt: skip
    """Plain ancestral sampling: queries, query_mask (B, Q) left-padded -> responses (B*N, R), pad behind the stop token.

    Rows of one query are adjacent. Temperature 0 is greedy. The query is read once for its N responses, and rows that have
    stopped leave the batch. Nothing is taken from a checkpoint's generation_config: samples are π_θ's at this temperature."""
    cache = AutocastCache(config=model.config)
    output = model(**model_inputs(queries, query_mask), past_key_values=cache, use_cache=True, logits_to_keep=1)
    logits = output.logits[:, -1].repeat_interleave(num_responses, 0)
    if num_responses > 1:
        cache.batch_repeat_interleave(num_responses)
    mask = query_mask.repeat_interleave(num_responses, 0)
    rows = torch.arange(len(mask), device=queries.device)  # rows still in the batch
    done = torch.zeros_like(rows, dtype=torch.bool)
    responses = torch.full((len(mask), response_length), pad_token_id, device=queries.device)
    for t in range(response_length):
        if temperature == 0:
            tokens = logits.argmax(-1)
        else:
            tokens = torch.multinomial((logits.float() / temperature).softmax(-1), 1, generator=generator).squeeze(1)
        responses[rows, t] = torch.where(done, pad_token_id, tokens)
        if t >= stop_after:
            done = done | (tokens == stop_token_id)
        if t + 1 == response_length or done.all():
            break
        if done.sum() >= max(1, len(done) // 8):  # dropping copies the cache, so not for every single row
            alive = (~done).nonzero().squeeze(1)
            cache.batch_select_indices(alive)
            rows, done, mask, tokens = rows[alive], done[alive], mask[alive], tokens[alive]
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        output = model(
            input_ids=tokens.unsqueeze(1), attention_mask=mask.long(), position_ids=mask.sum(1, keepdim=True) - 1,
            past_key_values=cache, use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        logits = output.logits[:, -1]
    return responses


@torch.no_grad()
def sample_rollout(
    model: nn.Module, query_ids: list[list[int]], num_responses: int, response_length: int, temperature: float,
    stop_token_id: int, stop_after: int, pad_token_id: int, size: int, generator: torch.Generator | None = None,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """num_responses to each query, `size` rows at a time -> rollout with queries, responses and masks as in `pad_batch`;
    responses of one query are adjacent. has_stop (rows,) is False where the length limit cut a response."""
    queries, query_mask = (x.to(next(model.parameters()).device) for x in pad_rows(query_ids, pad_token_id, "left"))
    responses = []
    for part in torch.arange(len(queries), device=queries.device).split(max(1, size // num_responses)):
        q = int(query_mask[part].sum(1).max())
        responses.append(generate(model, queries[part, -q:], query_mask[part, -q:], num_responses, response_length,
                                  temperature, stop_token_id, stop_after, pad_token_id, generator))  # fmt: skip
    responses = torch.cat(responses)
    mask, has_stop = stop_masks(responses.clone(), stop_token_id, stop_after)
    return {"queries": queries.repeat_interleave(num_responses, 0), "query_mask": query_mask.repeat_interleave(num_responses, 0),
            "responses": responses, "response_mask": mask, "score_mask": mask, "has_stop": has_stop}  # fmt: skip


def decode_responses(tokenizer, rollout: dict[str, torch.Tensor]) -> list[str]:
    """Responses as text, up to the stop token; special tokens left out."""
    ids = [r[m].tolist() for r, m in zip(rollout["responses"], rollout["response_mask"])]
    return tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def trim(rollout: dict[str, torch.Tensor], rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """The given rows of a rollout as one micro-batch. All padding moves to the left, so that query_responses and mask (rows, T) are
    as wide as the longest row, not the longest query plus the longest response. Tensors over the response (rows, R) end where
    their row ends; `columns` (rows, R) says where each of their columns stands in the rollout, read_mask what a reward model reads."""
    batch = {name: tensor[rows] for name, tensor in rollout.items()}
    ids = torch.cat([batch["queries"], batch["responses"]], 1)
    mask = torch.cat([batch["query_mask"], batch["response_mask"]], 1)
    read = torch.cat([batch["query_mask"], batch.get("score_mask", batch["response_mask"])], 1)
    r = max(1, int(batch["response_mask"].sum(1).max()))
    order = mask.int().argsort(dim=1, stable=True)[:, -max(r + 1, int(mask.sum(1).max())) :]
    columns = batch["response_mask"].int().argsort(dim=1, stable=True)[:, -r:]
    for name, tensor in batch.items():
        if tensor.ndim == 2 and name not in ("queries", "query_mask"):
            batch[name] = tensor.gather(1, columns)
    batch.update(query_responses=ids.gather(1, order), mask=mask.gather(1, order), read_mask=read.gather(1, order), columns=columns)
    return batch


def micro_batches(rollout: dict[str, torch.Tensor], rows: torch.Tensor, size: int) -> list[torch.Tensor]:
    """Split row indices into parts of at most `size` rows of similar length (so that `trim` saves most)."""
    lengths = rollout["query_mask"].sum(1) + rollout["response_mask"].sum(1)
    return list(rows[lengths[rows].argsort(stable=True)].split(size))


def response_logprobs(
    model: nn.Module, batch: dict[str, torch.Tensor], temperature: float = 1.0
) -> torch.Tensor:
    """Log-probabilities (rows, R) of the responses of a batch from `trim`, 0 where masked."""
    ids, mask, r = batch["query_responses"], batch["mask"], batch["responses"].shape[1]
    logits = model(**model_inputs(ids, mask), use_cache=False, logits_to_keep=r + 1).logits[:, :-1]
    return token_logprobs(logits, batch["responses"], batch["response_mask"], temperature)


# ---------------------------------------------------------------- maths


def token_logprobs(logits: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor, temperature: float) -> torch.Tensor:
    """logits (rows, R, V), tokens and mask (rows, R) -> log π(token) (rows, R) in float32, 0 where masked."""
    logits = logits.float() if temperature == 1 else logits.float() / temperature  # no copy of the largest tensor there is
    chosen = logits.gather(-1, tokens.masked_fill(~mask, 0).unsqueeze(-1)).squeeze(-1)
    return torch.where(mask, chosen - logits.logsumexp(-1), 0.0)


def loss_weights(mask: torch.Tensor, average: str, all_sum=lambda x: x, num_processes: int = 1) -> torch.Tensor:
    """mask (rows, R) of one minibatch -> weights (rows, R): the loss is Σ weights · token loss. DDP averages gradients over
    ranks, so a denominator summed over ranks comes with the factor num_processes."""
    lengths = mask.sum(1, keepdim=True)
    weights = mask.float() if average == "token" else mask / lengths.clamp(min=1)
    denominator = mask.sum() if average == "token" else (lengths > 0).sum()
    return weights * num_processes / all_sum(denominator.float()).clamp(min=1)


def scheduled_lr(lr: float, step: int, num_steps: int, schedule: str, warmup_steps: int, final_fraction: float = 0.0) -> float:
    """Learning rate of step 0 .. num_steps-1: linear warm-up, then constant, linear (LMHP: lr · (1 - step/num_steps)) or cosine."""
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    fraction = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[schedule]
    return lr * (final_fraction + (1 - final_fraction) * fraction)


# ---------------------------------------------------------------- data


def load_rows(path: str, field: str, columns: tuple[str, ...] = ()) -> list[dict]:
    """Rows of a .jsonl, .json or .parquet file or of a hub data set `name:split`. Raises, naming `field`, file and line, for a
    missing or empty file, a malformed line or a missing column."""
    if Path(path).suffix in (".jsonl", ".json", ".parquet") and not Path(path).is_file():
        raise FileNotFoundError(f"--{field} {path}: no such file")
    if Path(path).suffix == ".jsonl":
        rows = []
        for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), 1):  # splitlines cuts at U+2028 too
            try:
                rows += [json.loads(line)] if line.strip() else []
            except json.JSONDecodeError as error:
                raise ValueError(f"--{field} {path}, line {number}: not JSON ({error}); write one object per line") from None
    elif Path(path).suffix == ".json":
        try:
            rows = json.loads(Path(path).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"--{field} {path}: not JSON ({error}); write one list of objects") from None
        if not isinstance(rows, list):
            raise ValueError(f"--{field} {path}: holds a {type(rows).__name__}; write one list of objects")
    else:
        from datasets import load_dataset  # slow to import, and not needed for JSON

        name, _, split = path.partition(":")
        is_file = Path(path).suffix == ".parquet"
        rows = list(load_dataset("parquet", data_files=path)["train"] if is_file else load_dataset(name, split=split or "train"))
    if not rows:
        raise ValueError(f"--{field} {path}: no rows; give a file with at least one")
    check_columns(rows, path, field, columns)
    return rows


def check_columns(rows: list[dict], path: str, field: str, columns: tuple[str, ...]) -> None:
    """Raises ValueError that names field, file and row where a row is no object or lacks one of the columns."""
    for number, row in enumerate(rows, 1):
        missing = [c for c in columns if not isinstance(row, dict) or row.get(c) is None]
        if missing or not isinstance(row, dict):
            found = sorted(row) if isinstance(row, dict) else type(row).__name__
            raise ValueError(f"--{field} {path}, row {number}: no column {', '.join(missing)}; it has {found}")


def load_tokenizer(path: str, pad_token: str):
    """Tokenizer of a folder or hub id; raises ValueError when it has no pad token and none is given."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.pad_token_id is None:
        if not pad_token:
            raise ValueError(f"{path}: the tokenizer has no pad token; name one with --pad_token (for example '[PAD]')")
        tokenizer.add_special_tokens({"pad_token": pad_token})
    return tokenizer


def encode_prompt(tokenizer, prompt: str | list[dict]) -> list[int]:
    """Ids of a prompt: text gets the tokenizer's own BOS (if any), chat messages its chat template (which writes BOS itself)."""
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def encode_queries(tokenizer, rows: list[dict], args: Args, field: str) -> list[dict]:
    """Rows with `query_ids` added; queries over query_length are dropped or cut, as long_queries says. Raises ValueError where no
    row is left, or where one of `eval_prompts` is not: what is measured would be the short prompts alone."""
    found = len(rows)
    rows = [{**row, "query_ids": encode_prompt(tokenizer, row[args.prompt_field])} for row in rows]
    cut = {"keep_end": slice(-args.query_length, None), "keep_start": slice(args.query_length)}.get(args.long_queries)
    if cut is None:
        rows = [row for row in rows if len(row["query_ids"]) <= args.query_length]
    else:
        rows = [{**row, "query_ids": row["query_ids"][cut]} for row in rows]
    rows = [row for row in rows if row["query_ids"]]
    if not rows:
        raise ValueError(f"--{field}: every query is empty or longer than --query_length {args.query_length}; raise it, or set --long_queries")
    if len(rows) < found and field == "eval_prompts":
        raise ValueError(f"--eval_prompts: {found - len(rows)} of {found} queries are empty or longer than --query_length {args.query_length}; "
                         "raise it, or set --long_queries to keep_end or keep_start")  # fmt: skip
    return rows


def encode_response(tokenizer, response: str, stop_token_id: int) -> list[int]:
    """Ids of a response with exactly one stop token, its last (-1: none): what follows one that is already there is left out."""
    ids = tokenizer(response, add_special_tokens=False)["input_ids"]
    if stop_token_id < 0:
        return ids
    return (ids[: ids.index(stop_token_id)] if stop_token_id in ids else ids) + [stop_token_id]


def check_ids(rows: list[list[int]], vocab_size: int, field: str) -> None:
    """Raises ValueError naming `field` when a token id lies outside the model's embedding (on a GPU a device-side assert, much later)."""
    largest = max((max(row) for row in rows if row), default=0)
    if largest >= vocab_size:
        raise ValueError(f"--{field}: token id {largest}, but the model has {vocab_size} tokens; tokenizer and model must belong together")


def check_positions(path: str, field: str, length: int) -> None:
    """Raises ValueError when rows of `length` tokens are longer than the model of `path` has positions (if its configuration says):
    learned positions end the run at the first such row, rotary ones go on and read what they were never trained on."""
    positions = getattr(AutoConfig.from_pretrained(path).get_text_config(), "max_position_embeddings", None)
    if positions and 0 < positions < length:
        raise ValueError(f"--{field} {path} has {positions} positions, but query and response can have {length} tokens together; "
                         "lower --response_length or --query_length")  # fmt: skip


def stop_token_id(tokenizer, token: str) -> int:
    """Id of `eos`, of a token or of an id written in digits; -1 for `none`. Raises ValueError for an unknown token."""
    if token == "none":
        return -1
    found = tokenizer.eos_token_id if token == "eos" else int(token) if token.isdigit() else tokenizer.get_vocab().get(token)
    if found is None:
        raise ValueError(f"--stop_token {token}: the tokenizer has no such token; give another, an id, or `none`")
    return found


def random_generator(device, *key: int) -> torch.Generator:
    """A generator that depends on the key alone, so a resumed run draws what the uninterrupted one would have drawn."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))
    return torch.Generator(device).manual_seed(seed)


def load_function(spec: str, field: str):
    """`module:function` or `module:function@TEXT` (called with source=TEXT) -> the function. Raises ValueError naming `field`."""
    name, _, source = spec.partition("@")
    module, _, function = name.partition(":")
    sys.path.insert(0, os.getcwd()) if os.getcwd() not in sys.path else None
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--{field} {spec}: {error}; give a model folder or module:function") from error
    return partial(found, source=source) if source else found


def call_function(function, prompts: list, responses: list[str], rows: list[dict]) -> list[float]:
    """A `module:function` on responses and what they answer -> one float each. Raises ValueError when it returns another number."""
    values = function(prompts, responses, rows)
    if len(values) != len(responses):
        raise ValueError(f"the reward function returned {len(values)} values for {len(responses)} responses; --reward or --actual_score "
                         "must return one per response")  # fmt: skip
    return [float(value) for value in values]


def write_folder(path: Path, write) -> None:
    """write(folder aside), then rename: what is at `path` is whole. Between two renames nothing is there; a run that dies at that
    moment leaves the old folder as PATH.old, and `open_run` puts it back."""
    aside, old = path.with_name(path.name + ".tmp"), path.with_name(path.name + ".old")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    write(aside)
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    aside.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def save_checkpoint(accelerator: Accelerator, folder: Path, step: int, state: dict) -> None:
    """Everything a resumed run needs, written aside and renamed when whole; only then is the older checkpoint deleted."""
    aside = folder / "tmp"
    if accelerator.is_main_process:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(aside), safe_serialization=False)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (aside / "state.json").write_text(json.dumps({**state, "step": step}))
        shutil.rmtree(folder / f"step_{step:06d}", ignore_errors=True)
        aside.rename(folder / f"step_{step:06d}")
        for older in sorted(folder.glob("step_*"))[:-1]:
            shutil.rmtree(older)
    accelerator.wait_for_everyone()


def load_checkpoint(accelerator: Accelerator, folder: Path) -> dict | None:
    """Load the newest whole checkpoint into the prepared objects and return its state; None when there is none."""
    found = sorted(folder.glob("step_*"))
    if not found:
        return None
    accelerator.load_state(str(found[-1]))
    return json.loads((found[-1] / "state.json").read_text())


def open_metrics(folder: Path, step: int):
    """TensorBoard writer; drops from metrics.jsonl, samples.jsonl and the event files what an interrupted run wrote behind its checkpoint."""
    from torch.utils.tensorboard import SummaryWriter  # slow to import

    for path in filter(Path.is_file, (folder / "metrics.jsonl", folder / "samples.jsonl")):
        whole = path.read_text().split("\n")[:-1]  # a line that was cut short has no newline
        aside = path.with_name(path.name + ".tmp")
        aside.write_text("".join(line + "\n" for line in whole if json.loads(line)["step"] <= step))
        aside.rename(path)
    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)


def log_metrics(writer, folder: Path, step: int, metrics: dict[str, float]) -> None:
    """One line of metrics.jsonl and one point per tag in TensorBoard; nothing where writer is None (ranks other than 0)."""
    if writer is not None:
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        for tag, value in metrics.items():
            writer.add_scalar(tag, value, step)


def open_run(args, num_processes: int) -> None:
    """Create output_dir with args.json, or put back what `write_folder` had moved aside when a run died. Raises ValueError when it
    holds a run of other settings, naming them; those of memory and speed may change when a run goes on."""
    folder, other = Path(args.output_dir), {}
    free = ("micro_batch_size", "forward_batch_size", "generation_batch_size", "gradient_checkpointing", "checkpoint_every")
    settings = {**json.loads(json.dumps(dataclasses.asdict(args))), "num_processes": num_processes}
    if (folder / "args.json").is_file():
        old = json.loads((folder / "args.json").read_text())
        other = {k: f"{k} ({old.get(k)!r} there, {settings.get(k)!r} here)" for k in {**old, **settings} if old.get(k) != settings.get(k)}
        if set(other) - set(free):
            other = ", ".join(text for k, text in other.items() if k not in free)
            raise ValueError(f"--output_dir {folder} holds another run: {other}; name a new folder or delete this one")
    elif folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"--output_dir {folder} is not empty and holds no run of this script; name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    if other:
        print(f"--output_dir {folder}: goes on with another {', '.join(other.values())}; rounding, and samples still to be drawn, may differ")
    for old in folder.glob("*.old"):
        if not old.with_suffix("").exists():
            old.rename(old.with_suffix(""))
    (folder / "args.json.tmp").write_text(json.dumps(settings, indent=1))
    (folder / "args.json.tmp").rename(folder / "args.json")


def encode_examples(tokenizer, rows: list[dict], args: Args, field: str, stop_id: int) -> list[dict]:
    """Rows with query_ids and response_ids. Over-long rows are dropped or cut here, before padding, so no loss mask is empty.
    Raises ValueError that names field and row for a response that is no text, chat messages that do not end with the assistant's,
    or when no row is left."""
    if args.messages_field:
        for number, row in enumerate(rows, 1):
            if not row[args.messages_field] or row[args.messages_field][-1].get("role") != "assistant":
                raise ValueError(f"--{field}, row {number}: {args.messages_field} must end with a message of role assistant")
        rows = [{**row, args.prompt_field: row[args.messages_field][:-1],
                 args.response_field: row[args.messages_field][-1]["content"]} for row in rows]  # fmt: skip
    for number, row in enumerate(rows, 1):
        if not isinstance(row[args.response_field], str):
            raise ValueError(f"--{field}, row {number}: {args.response_field} must be a text")
    rows = encode_queries(tokenizer, rows, args, field)
    rows = [{**row, "response_ids": encode_response(tokenizer, row[args.response_field], stop_id)} for row in rows]
    if args.long_responses == "cut":
        rows = [{**row, "response_ids": row["response_ids"][: args.response_length]} for row in rows]
    rows = [row for row in rows if 0 < len(row["response_ids"]) <= args.response_length]
    if not rows:
        raise ValueError(f"--{field}: every response is longer than --response_length {args.response_length}; raise it or --long_responses cut")
    return rows


def process_settings() -> list:
    """For Accelerator: ranks wait up to two hours for one that saves or grades (NCCL's own limit is ten minutes), and DDP keeps one
    copy of the gradients, not two."""
    return [InitProcessGroupKwargs(timeout=timedelta(hours=2)), DistributedDataParallelKwargs(gradient_as_bucket_view=True)]


def refuse_sharding(distributed_type: str) -> None:
    """Raises ValueError for launchers under which weights are sharded (generation then waits for ranks that have stopped) or
    `accelerator.backward` steps by itself, at every micro-batch."""
    if distributed_type in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
        raise ValueError(f"{distributed_type} does not work here: weights must be whole on every rank and step once a minibatch; "
                         "launch with --multi_gpu (or --cpu), without a DeepSpeed, FSDP or Megatron configuration")  # fmt: skip


def check_args(args: Args, num_processes: int) -> None:
    """Raises ValueError that names the field and the fix, before anything is loaded."""

    def need(condition: bool, message: str) -> None:
        if not condition:
            raise ValueError(message)

    for field in ("train_data", "output_dir"):
        need(getattr(args, field) != "", f"--{field} is needed")
    need((args.model == "") != (args.model_config == ""), "give either --model (to fine-tune) or --model_config (to start from scratch)")
    for field in ("epochs", "batch_size", "micro_batch_size", "forward_batch_size", "query_length", "response_length",
                  "log_every", "checkpoint_every"):  # fmt: skip
        need(getattr(args, field) >= 1, f"--{field} must be at least 1, not {getattr(args, field)}")
    need(args.batch_size >= num_processes, f"--batch_size {args.batch_size} must be at least the {num_processes} processes")
    need(args.actual_score == "" or args.eval_prompts + args.eval_data != "", "--actual_score needs --eval_prompts or --eval_data")
    for field in ("train_data", "eval_data", "eval_prompts"):
        need(Path(getattr(args, field)).suffix not in (".jsonl", ".json", ".parquet") or Path(getattr(args, field)).is_file(),
             f"--{field} {getattr(args, field)}: no such file")  # fmt: skip


# ---------------------------------------------------------------- main


def main(args: Args) -> None:
    # ------------------------------------------------ Setup: everything that can be refused is refused here
    accelerator = Accelerator(kwargs_handlers=process_settings())
    refuse_sharding(accelerator.distributed_type.value)
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    check_args(args, world)
    columns = (args.messages_field,) if args.messages_field else (args.prompt_field, args.response_field)
    rows = load_rows(args.train_data, "train_data", columns)
    eval_rows = load_rows(args.eval_data, "eval_data", columns) if args.eval_data else []
    answer_rows = load_rows(args.eval_prompts, "eval_prompts", (args.prompt_field,)) if args.eval_prompts else []
    actual_score = load_function(args.actual_score, "actual_score") if args.actual_score else None
    tokenizer = load_tokenizer(args.tokenizer or args.model or args.model_config, args.pad_token)
    pad_id, stop_id = tokenizer.pad_token_id, stop_token_id(tokenizer, args.stop_token)
    config = AutoConfig.from_pretrained(args.model or args.model_config)

    # ------------------------------------------------ 1. tokenise prompt and response apart
    found, eval_found = len(rows), len(eval_rows)
    rows = encode_examples(tokenizer, rows, args, "train_data", stop_id)
    eval_rows = encode_examples(tokenizer, eval_rows, args, "eval_data", stop_id) if eval_rows else []
    answer_rows = encode_queries(tokenizer, answer_rows, args, "eval_prompts") if answer_rows else eval_rows
    answer_rows = answer_rows if actual_score else answer_rows[: args.print_samples]
    for field, found_rows in (("train_data", rows), ("eval_data", eval_rows), ("eval_prompts", answer_rows)):
        check_ids([row["query_ids"] + row.get("response_ids", []) for row in found_rows], config.get_text_config().vocab_size, field)
    check_ids([[stop_id]], config.get_text_config().vocab_size, "stop_token")
    longest = [len(row["query_ids"] + row["response_ids"]) for row in rows + eval_rows]
    longest = max(longest + [len(row["query_ids"]) + args.response_length for row in answer_rows])
    check_positions(args.model or args.model_config, "model" if args.model else "model_config", longest)
    steps_per_epoch = math.ceil(len(rows) / args.batch_size)
    num_steps = steps_per_epoch * args.epochs
    sizes = {"processes": world, "rows": len(rows), "rows left out as too long": found - len(rows), "held-out rows": len(eval_rows),
             "held-out rows left out": eval_found - len(eval_rows), "response tokens": sum(len(row["response_ids"]) for row in rows),
             "rows per step and rank": args.batch_size / world, "optimizer steps": num_steps}  # fmt: skip
    accelerator.print("\n".join(f"{name:>26}: {value}" for name, value in sizes.items()))
    if args.dry_run:
        accelerator.print(json.dumps(dataclasses.asdict(args), indent=1))
        return
    if accelerator.is_main_process:
        open_run(args, world)
    accelerator.wait_for_everyone()
    output_dir = Path(args.output_dir)

    set_seed(args.seed)
    if args.model:
        policy = load_causal_lm(args.model)
    else:
        without_dropout(config)
        config.bos_token_id, config.eos_token_id, config.pad_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id, pad_id
        policy = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if args.gradient_checkpointing:
        policy.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, eps=args.eps, weight_decay=args.weight_decay)
    model, optimizer = accelerator.prepare(policy, optimizer)
    bare = accelerator.unwrap_model(model, keep_torch_compile=False)

    def all_sum(x: torch.Tensor) -> torch.Tensor:
        return accelerator.reduce(x, "sum")

    def batch_of(batch_rows: list[dict]) -> dict[str, torch.Tensor]:
        return pad_batch([row["query_ids"] for row in batch_rows], [row["response_ids"] for row in batch_rows], pad_id, device)

    @torch.no_grad()
    def evaluate(step: int) -> dict[str, float]:
        """Held-out loss over all tokens of all ranks, then greedy responses. Every row counts once, whatever the number of ranks."""
        bare.eval()
        results, sums, mine = {}, torch.zeros(2, device=device, dtype=torch.float64), eval_rows[rank::world]
        if mine:
            batch = batch_of(mine)
            for part in micro_batches(batch, torch.arange(len(mine), device=device), args.forward_batch_size):
                with accelerator.autocast():
                    sums[0] -= response_logprobs(bare, trim(batch, part)).double().sum()
            sums[1] = batch["response_mask"].sum()
        if eval_rows:
            loss, tokens = all_sum(sums).tolist()
            results["test/loss"] = loss / tokens
        mine, answers = answer_rows[rank::world], []
        if mine:
            with accelerator.autocast():
                rollout = sample_rollout(bare, [row["query_ids"] for row in mine], 1, args.response_length, 0.0, stop_id, 0,
                                         pad_id, args.forward_batch_size)  # fmt: skip
            texts, prompts = decode_responses(tokenizer, rollout), [row[args.prompt_field] for row in mine]
            answers = [{"row": rank + i * world, "step": step, "prompt": p, "response": t, "length": n, "truncated": not stopped}
                       for i, (p, t, n, stopped) in enumerate(zip(
                           prompts, texts, rollout["response_mask"].sum(1).tolist(), rollout["has_stop"].tolist()))]  # fmt: skip
            for answer, value in zip(answers, call_function(actual_score, prompts, texts, mine) if actual_score else ()):
                answer["greedy_pass1"] = value
        answers = sorted((answer for part in gather_object([answers]) for answer in part), key=lambda answer: answer["row"])
        for name in ("length", "truncated", "greedy_pass1"):
            values = [answer[name] for answer in answers if name in answer]
            results.update({f"test/{name}": float(np.mean(values))} if values else {})
        if accelerator.is_main_process:
            with (output_dir / "samples.jsonl").open("a") as file:
                file.writelines(json.dumps(answer) + "\n" for answer in answers[: args.print_samples])
            for answer in answers[: args.print_samples]:
                bar.write(f"--- step {step}: {answer['prompt']}\n{answer['response']}")
        bare.train()
        return results

    def log(step: int, metrics: dict[str, float]) -> None:
        log_metrics(writer, output_dir, step, metrics)
        shown = {"loss": "train/loss", "lr": "train/lr", "held-out": "test/loss", "pass@1": "test/greedy_pass1"}
        if accelerator.is_main_process:
            bar.write(f"step {step}/{num_steps}  " + "  ".join(f"{k} {metrics[t]:.4g}" for k, t in shown.items() if t in metrics))

    # ------------------------------------------------ Continue a killed run
    state = load_checkpoint(accelerator, output_dir / "checkpoints")
    writer = open_metrics(output_dir, state["step"] - ("metrics" in state) if state else -1) if accelerator.is_main_process else None
    state = state or {"step": 0, "losses": [], "grad_norms": []}
    run_start, clock, first_step = time.time(), time.time(), state["step"]
    bar = tqdm(total=num_steps, initial=first_step, disable=not accelerator.is_main_process, desc="SFT steps", mininterval=5)
    bare.train()
    for step in range(first_step + 1, num_steps + 1):
        # ---------------- 2. the next batch of a shuffled pass over the rows
        epoch, index = divmod(step - 1, steps_per_epoch)
        order = torch.randperm(len(rows), generator=random_generator("cpu", args.seed, 0, epoch))
        picks = order.split(args.batch_size)[index].tolist()  # the last batch of a pass may be smaller
        mine = [rows[i] for i in picks[rank::world]]
        batch = batch_of(mine or rows[:1])
        if not mine:  # a rank without rows goes along with one fully masked row
            batch["response_mask"] = torch.zeros_like(batch["response_mask"])
        batch["loss_weights"] = loss_weights(batch["response_mask"], "token", all_sum, world)

        # ---------------- 3. log-probabilities of the response tokens; AdamW
        optimizer.param_groups[0]["lr"] = scheduled_lr(
            args.lr, step - 1, num_steps, args.lr_schedule, args.warmup_steps, args.final_lr_fraction)  # fmt: skip
        parts, local_loss = micro_batches(batch, torch.arange(len(batch["queries"]), device=device), args.micro_batch_size), 0.0
        for i, part in enumerate(parts):
            with nullcontext() if i == len(parts) - 1 else accelerator.no_sync(model), accelerator.autocast():
                micro_batch = trim(batch, part)
                loss = -(response_logprobs(model, micro_batch) * micro_batch["loss_weights"]).sum()
                accelerator.backward(loss)
            local_loss += loss.detach()
        loss = accelerator.reduce(local_loss, "mean").item()  # nats per token of the whole batch
        norm = float(accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm or float("inf")))
        if not math.isfinite(loss if accelerator.scaler else loss + norm):  # under fp16 a gradient may overflow: its step is skipped
            raise FloatingPointError(f"step {step}: the loss is {loss}, the gradient norm {norm}; the last good checkpoint is kept in "
                                     f"{output_dir / 'checkpoints'}. Lower --lr")  # fmt: skip
        state["losses"].append(loss)
        state["grad_norms"] += [norm] if math.isfinite(norm) else []
        optimizer.step()
        optimizer.zero_grad()

        # ---------------- 4. held-out loss, sampled responses; log and save
        metrics, last = {}, step == num_steps
        if step % args.log_every == 0 or last:
            metrics = {"train/loss": float(np.mean(state["losses"])), **({"train/grad_norm": float(np.mean(state["grad_norms"]))} if state["grad_norms"] else {}),
                       "train/lr": optimizer.param_groups[0]["lr"], "train/epoch": step / steps_per_epoch,
                       "seconds/step": (time.time() - clock) / len(state["losses"])}  # fmt: skip
            state["losses"], state["grad_norms"] = [], []
        if args.eval_every and step % args.eval_every == 0 and not last:
            metrics.update(evaluate(step))
        bar.update()
        if last:
            state["metrics"] = metrics
        elif metrics:
            log(step, metrics)
            clock = time.time()
        if step % args.checkpoint_every == 0 or last:
            save_checkpoint(accelerator, output_dir / "checkpoints", step, state)

    if "metrics" in state:  # the last evaluation, now that what is trained is safe: it may run out of memory, --actual_score may fail
        log(num_steps, {**state.pop("metrics"), **evaluate(num_steps)})
        if accelerator.is_main_process:
            saved = output_dir / "checkpoints" / f"step_{num_steps:06d}" / "state.json"
            saved.with_suffix(".tmp").write_text(json.dumps({**state, "step": num_steps}))
            saved.with_suffix(".tmp").rename(saved)
    bar.close()
    if accelerator.is_main_process:
        write_folder(output_dir / "model", lambda folder: (bare.save_pretrained(folder), tokenizer.save_pretrained(folder)))
    accelerator.wait_for_everyone()
    accelerator.print(f"done: {num_steps} steps, {time.time() - run_start:.0f} s in this process; model in {output_dir / 'model'}")


if __name__ == "__main__":
    main(tyro.cli(Args))
