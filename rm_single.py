"""Reward model from comparisons: stage 2 of SFT -> reward model -> RL.

Eq. 1 and 2 (the numbers are those of the chapters in `main`):
  1. read labels: (prompt, chosen, rejected) as text, or the best of K responses as token ids
  2. normalise: gain and bias so that π_SFT's own responses have reward mean 0 and standard deviation 1 (LMHP)
  3. take the next batch of labels; score their K responses with R_φ = π_SFT's backbone plus one output layer
  4. cross-entropy over the K rewards; for K = 2 it is -log σ(R_φ(y_w|c) - R_φ(y_l|c)), Eq. 2
  5. held-out loss and accuracy (every label once)
  6. normalise again, save
  7. reliability (PAPER Figure 1): reward of π_SFT's responses against their actual score
Training, normalisation and accuracy use the unbounded score. The paper has R_φ in [-1, 1] and does not say how: with `--bound tanh`
whoever reads the saved model (PPO, R², figures) gets tanh of the normalised score, which keeps every ranking.

Run (CPU, 1 GPU, 8 GPUs; sizes are global, so the algorithm is the same):
  accelerate launch --cpu --num_processes 1 rm_single.py --model sft/model --train_data pairs.jsonl --output_dir rm
  accelerate launch --num_processes 1 --mixed_precision bf16 rm_single.py ...
  accelerate launch --multi_gpu --num_processes 8 --mixed_precision bf16 rm_single.py ...
In:  the SFT model (`--model`), labels (`--train_data`), prompts to sample on (`--normalize_prompts`).
Out: `output_dir/model` (backbone, reward_head.safetensors, tokenizer), `metrics.jsonl`, `tensorboard/`, `checkpoints/`,
     and with `--reliability_prompts` samples_scored.jsonl and reliability.json. The same command continues a killed run.

Sources: PAPER = arXiv 2409.06957; LMHP = openai/lm-human-preferences@cbfd210; LMHPD = vwxyzjn/lm-human-preference-details@ccc1953.
`DEPARTS` marks a difference from one of them; `--preset lm_human_preferences` is LMHP's setting on this same code path.
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
import torch.nn.functional as F
import tyro
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, gather_object, set_seed
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, DynamicCache

# Shapes: K responses per label, rows = labels x K with the responses of a label adjacent, Q query length, R response length.
#
#   column          0 .. Q-1       Q .. Q+R-1
#   query_response  P P q q q      r r . P P     queries padded left, responses padded right; "." is the stop token
#   micro-batch         P P P P q q q r r .      `trim` moves all padding left: as wide as its longest row
#   mask            0 0 1 1 1      1 1 1 0 0     the reward is read at the last attended column


@dataclass
class Args:
    # run
    output_dir: str = "output/rm"
    """folder for everything this run writes; a folder that holds another run is refused"""
    preset: Literal["pfppo", "lm_human_preferences"] = "pfppo"
    """defaults for the other fields: the paper's, or those of LMHP (PRESETS below); fields given as flags win"""
    seed: int = 1
    """shared over ranks: output layer, data order; sampling gets its own generators from (seed, rank)"""
    dry_run: bool = False
    """read and check the labels, print settings and derived sizes, and stop before a model is loaded"""
    # models
    model: str = ""
    """π_SFT: folder or hub id of a causal language model; R_φ starts from its weights, and it is sampled to normalise"""
    bound: Literal["tanh", "none"] = "tanh"
    """saved with the model: `tanh` lets readers see tanh(score), in [-1, 1]; `none` the score itself (LMHP)"""
    pad_token: str = ""
    """pad token for a tokenizer that has none; may lie past the embedding (padded columns are fed as token 0 and masked)"""
    frozen_dtype: Literal["float32", "bfloat16"] = "float32"
    """weights of the frozen π_SFT; trainable weights are always float32, autocast by accelerate"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass"""
    # labels
    train_data: str = ""
    """labels: .jsonl, .json, .parquet, or hub id `name:split`. Either texts (prompt_field, chosen_field, rejected_field), or
    token ids: `query`, `sample0` .. `sampleK-1` of one length, and `best` in 0 .. K-1"""
    eval_data: str = ""
    """held-out labels, same columns; empty: those behind num_train, if any"""
    num_train: int = 0
    """train on this many labels from the start of train_data; 0: on all"""
    label_pad_id: int = -1
    """token-id labels: id that pads them in the file, stripped on reading; -1: none"""
    prompt_field: str = "prompt"
    """column with the prompt: text, or a list of chat messages (the tokenizer's chat template is applied)"""
    chosen_field: str = "chosen"
    """column with the better response, a text"""
    rejected_field: str = "rejected"
    """column with the worse response, a text"""
    query_length: int = 1024
    """longest query in tokens"""
    long_queries: Literal["drop", "keep_end", "keep_start"] = "drop"
    """what happens to a text query longer than query_length; a token-id label with one is refused"""
    response_length: int = 1024
    """longest response in tokens, the stop token included: longer text labels are dropped, samples are cut"""
    stop_token: str = "eos"
    """token that ends a sample: `eos`, `none`, a token or an id; EOS, however it is named, and other special tokens also close
    the responses of text labels"""
    stop_after: int = 0
    """a stop token counts only at this response index (from 0) or later"""
    # training
    epochs: int = 1
    """passes over the labels (PAPER: 1)"""
    batch_size: int = 64
    """labels per optimizer step, over all ranks"""
    micro_batch_size: int = 16
    """labels (of K responses) per rank in one forward and backward pass; changes memory and speed, not the gradient"""
    lr: float = 1e-5
    """peak learning rate (PAPER: 1e-5)"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """per step, after the warm-up"""
    final_lr_fraction: float = 0.0
    """linear and cosine end at this fraction of lr"""
    warmup_steps: int = 0
    """steps over which the learning rate rises linearly from lr / warmup_steps"""
    adam_style: Literal["torch", "tensorflow"] = "torch"
    """where epsilon enters Adam; TensorFlow's is what LMHP's curves used"""
    eps: float = 1e-8
    """Adam's epsilon"""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay"""
    max_grad_norm: float = 1.0
    """clip the gradient norm at this; 0: never"""
    # normalisation
    normalize_before: bool = False
    """set gain and bias on π_SFT samples before training (LMHP)"""
    normalize_after: bool = True
    """set gain and bias on π_SFT samples after training"""
    normalize_samples: int = 512
    """responses behind one mean and standard deviation, over all ranks"""
    normalize_prompts: str = ""
    """prompts to sample on, one response each, with column prompt_field; empty: the queries of the training labels"""
    normalize_query_length: int = 0
    """longest query when sampling, in tokens; 0: query_length. LMHPD cuts these queries at the response length"""
    temperature: float = 1.0
    """of all samples drawn here"""
    # evaluation and logging
    eval_every: int = 0
    """steps between evaluations; 0: only after the last step"""
    kl_samples: int = 0
    """responses for train/kl at each evaluation: KL of the trained backbone, as a language model, to π_SFT (LMHPD); 0: none"""
    forward_batch_size: int = 32
    """rows per rank in one forward pass without gradient (evaluation, generation)"""
    log_every: int = 10
    """steps between lines on the console and in metrics.jsonl, each a mean over these steps"""
    checkpoint_every: int = 500
    """steps between checkpoints; the last step always writes one"""
    # reliability
    reliability_prompts: str = ""
    """prompts with column prompt_field to answer, score and execute after training (PAPER Figure 1); empty: none"""
    reliability_samples: int = 10
    """responses per prompt"""
    reliability_groups: int = 10
    """groups of equal count, by reward, in each of the ten repeats"""
    actual_score: str = ""
    """s: `module:function` (`module:function@TEXT` adds the keyword source=TEXT), called with (prompts, responses, rows) and
    returning one number per response, for example 1 where unit tests pass; needed for reliability_prompts"""


LM_HUMAN_PREFERENCES = dict(  # LMHP launch.py and train_reward.py; LMHPD's normalize draws at least 512 samples a process
    bound="none", pad_token="[PAD]", num_train=4992, label_pad_id=50259, query_length=64, long_queries="keep_start",
    response_length=24, stop_token="none", epochs=1, batch_size=32, micro_batch_size=32, forward_batch_size=128, lr=5e-5,
    lr_schedule="linear", final_lr_fraction=0.0, warmup_steps=0, adam_style="tensorflow", eps=1e-5, weight_decay=0.0,
    max_grad_norm=0.0, normalize_before=True, normalize_after=True, normalize_samples=512, normalize_query_length=24,
    temperature=0.7, eval_every=10, kl_samples=512, log_every=1,
)  # fmt: skip
PRESETS = {"pfppo": {}, "lm_human_preferences": LM_HUMAN_PREFERENCES}


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


class RewardModel(nn.Module):
    """R_φ: a language-model backbone plus one output layer (Eq. 2), gain and bias. `bound` squashes the score that is read."""

    def __init__(self, lm_backbone: nn.Module, bound: str = "none"):
        super().__init__()
        self.lm_backbone, self.bound = lm_backbone, bound
        self.scalar_head = nn.Linear(lm_backbone.config.hidden_size, 1)
        self.reward_gain = nn.Parameter(torch.tensor(1.0))
        self.reward_bias = nn.Parameter(torch.tensor(0.0))

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """ids, mask (rows, T) -> unbounded score read at every column (rows, T), float32 under autocast too."""
        hidden = self.lm_backbone(**model_inputs(ids, mask), use_cache=False).last_hidden_state
        with torch.autocast(hidden.device.type, enabled=False):
            return self.reward_gain * self.scalar_head(hidden.float()).squeeze(-1) + self.reward_bias

    def score(self, ids: torch.Tensor, mask: torch.Tensor, bounded: bool = True) -> torch.Tensor:
        """ids, mask (rows, T) -> R_φ (rows,): the score at the last attended token, through tanh when bound is "tanh"."""
        score = last_token(self(ids, mask), mask)
        return score.tanh() if bounded and self.bound == "tanh" else score

    def save_pretrained(self, folder: str | Path) -> None:
        """Backbone in the transformers format, and beside it reward_head.safetensors (weight, bias, gain, bias; bound)."""
        self.lm_backbone.save_pretrained(folder)
        head = {name: p.detach().cpu().contiguous() for name, p in self.named_parameters() if not name.startswith("lm_backbone")}
        save_file(head, Path(folder) / "reward_head.safetensors", metadata={"bound": self.bound})

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype = torch.float32) -> "RewardModel":
        """Raises FileNotFoundError when the folder has no reward_head.safetensors: a head is never made up."""
        if not (Path(folder) / "reward_head.safetensors").is_file():
            raise FileNotFoundError(f"{folder}: no reward_head.safetensors; give a folder written by rm_single.py")
        config = AutoConfig.from_pretrained(folder)
        without_dropout(config)
        with safe_open(Path(folder) / "reward_head.safetensors", "pt") as head:
            model = cls(AutoModel.from_pretrained(folder, config=config, dtype=dtype), bound=head.metadata()["bound"])
            missing = model.load_state_dict({name: head.get_tensor(name) for name in head.keys()}, strict=False).missing_keys
        if any(not name.startswith("lm_backbone") for name in missing):
            raise KeyError(f"{folder}/reward_head.safetensors lacks {missing}; write it again with rm_single.py")
        return model


def init_head(model: RewardModel) -> None:
    """LMHP: output layer with standard deviation 1 / sqrt(hidden + 1) and bias 0; gain 1, bias 0."""
    nn.init.normal_(model.scalar_head.weight, std=1 / math.sqrt(model.scalar_head.in_features + 1))
    nn.init.zeros_(model.scalar_head.bias)
    set_gain_and_bias(model, 1.0, 0.0)


def set_gain_and_bias(model: RewardModel, gain: float, bias: float) -> None:
    """In place; both stay trainable parameters."""
    model.reward_gain.data.fill_(gain)
    model.reward_bias.data.fill_(bias)


# ---------------------------------------------------------------- token functions


def model_inputs(ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """ids, mask (rows, T) -> forward arguments. Positions count real tokens only; padded columns are fed as token 0."""
    position_ids = (mask.long().cumsum(1) - 1).clamp(min=0)
    return {"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long(), "position_ids": position_ids}


def last_token(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """values (rows, T), mask (rows, T) bool -> (rows,) the value at the last True column, whichever side is padded."""
    last = mask.shape[1] - 1 - mask.flip(1).int().argmax(1)
    return values.gather(1, last.unsqueeze(1)).squeeze(1)


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


@torch.no_grad()
def reward_model_scores(
    model: RewardModel, rollout: dict[str, torch.Tensor], size: int, bounded: bool = True
) -> torch.Tensor:
    """R_φ of every row (rows,): reads the query and the response up to score_mask."""
    scores = torch.zeros(len(rollout["responses"]), device=rollout["responses"].device)
    for rows in micro_batches(rollout, torch.arange(len(scores), device=scores.device), size):
        batch = trim(rollout, rows)
        scores[rows] = model.score(batch["query_responses"], batch["read_mask"], bounded)
    return scores


def label_batch(labels: list[dict], pad_token_id: int, device) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Labels -> a batch of labels x K rows, the K responses of a label adjacent, and best (labels,)."""
    queries = [label["query"] for label in labels for _ in label["samples"]]
    batch = pad_batch(queries, [sample for label in labels for sample in label["samples"]], pad_token_id, device)
    return batch, torch.tensor([label["best"] for label in labels], device=device)


def label_parts(batch: dict[str, torch.Tensor], num_labels: int, size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Split a batch into parts of at most `size` labels of similar length: (label indices, row indices) of each."""
    lengths = (batch["query_mask"].sum(1) + batch["response_mask"].sum(1)).view(num_labels, -1)
    columns = torch.arange(lengths.shape[1], device=lengths.device)
    parts = lengths.amax(1).argsort(stable=True).split(size)
    return [(part, (part.unsqueeze(1) * len(columns) + columns).flatten()) for part in parts]


# ---------------------------------------------------------------- maths


def token_logprobs(logits: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor, temperature: float) -> torch.Tensor:
    """logits (rows, R, V), tokens and mask (rows, R) -> log π(token) (rows, R) in float32, 0 where masked."""
    logits = logits.float() if temperature == 1 else logits.float() / temperature  # no copy of the largest tensor there is
    chosen = logits.gather(-1, tokens.masked_fill(~mask, 0).unsqueeze(-1)).squeeze(-1)
    return torch.where(mask, chosen - logits.logsumexp(-1), 0.0)


def best_of_k_loss(rewards: torch.Tensor, best: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """rewards (labels, K), best (labels,) -> (mean loss, accuracy). A tie at the top counts as a guess among the tied."""
    # Eq. 1, 2 for K = 2, LMHP for K = 4: -log softmax(rewards)[best]; with two rewards this is -log σ(R(y_w) - R(y_l))
    loss = F.cross_entropy(rewards.float(), best)
    is_top = rewards == rewards.amax(1, keepdim=True)
    right = is_top.gather(1, best.unsqueeze(1)).squeeze(1) / is_top.sum(1)
    return loss, right.mean()


def label_loss(
    model: nn.Module, batch: dict[str, torch.Tensor], best: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One micro-batch (from `trim`, K rows per label) and best (labels,) -> (mean loss, accuracy, unbounded rewards (labels, K))."""
    rewards = last_token(model(batch["query_responses"], batch["mask"]), batch["mask"]).view(len(best), -1)
    return (*best_of_k_loss(rewards, best), rewards)


# DEPARTS PAPER, which has R in [-1, 1] without a recipe: standardised on π_SFT samples, then tanh (RewardModel.score)
def normalization(rewards: torch.Tensor) -> tuple[float, float]:
    """Rewards with gain 1 and bias 0 (samples,) -> (gain, bias) that give them mean 0 and standard deviation (n-1) 1."""
    mean, std = rewards.mean(), rewards.std()
    if not std > 0:
        raise ValueError("normalisation: the reward is the same for every sample, or not finite; raise --normalize_samples or look at the model")
    return (1 / std).item(), (-mean / std).item()


def reliability(rewards: np.ndarray, actual_scores: np.ndarray, num_groups: int, num_repeats: int, seed: int) -> list[dict]:
    """PAPER Figure 1: rewards, actual_scores (responses,) -> per repeat the mean reward and mean actual score of num_groups
    groups of equal count, lowest reward first. DEPARTS PAPER, which does not say what it repeats: each repeat here is its
    own random tenth of the responses, so no response counts twice and the lines' spread is that of fresh samples."""
    shuffled = np.random.default_rng(seed).permutation(len(rewards))
    repeats = []
    for part in np.array_split(shuffled, num_repeats):
        groups = [g for g in np.array_split(part[np.argsort(rewards[part], kind="stable")], num_groups) if len(g)]
        repeats.append({"reward": [float(rewards[g].mean()) for g in groups], "actual": [float(actual_scores[g].mean()) for g in groups],
                        "count": [len(g) for g in groups]})  # fmt: skip
    return repeats


def scheduled_lr(lr: float, step: int, num_steps: int, schedule: str, warmup_steps: int, final_fraction: float = 0.0) -> float:
    """Learning rate of step 0 .. num_steps-1: linear warm-up, then constant, linear (LMHP: lr · (1 - step/num_steps)) or cosine."""
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    fraction = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[schedule]
    return lr * (final_fraction + (1 - final_fraction) * fraction)


def adam_epsilon(eps: float, style: str, step: int, beta2: float = 0.999) -> float:
    """Epsilon for torch's Adam at optimizer step 1, 2, ...; divided by sqrt(1 - β2^t) it is TensorFlow's Adam exactly."""
    return eps / math.sqrt(1 - beta2**step) if style == "tensorflow" else eps


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


def read_labels(path: str, field: str, args: Args, tokenizer, vocab_size: int, stop_id: int) -> list[dict]:
    """A labels file -> [{query: ids, samples: K lists of ids, best: int, row: line}], padding stripped, texts tokenised and closed.
    Raises ValueError that names field, file, row and the fix."""
    rows = load_rows(path, field)
    first = rows[0] if isinstance(rows[0], dict) else {}
    if "best" in first or "sample0" in first:
        k = max(2, sum(name.startswith("sample") and name[6:].isdigit() for name in first))
        names = [f"sample{i}" for i in range(k)]
        check_columns(rows, path, field, ("query", *names, "best"))
        labels = [{**id_label(row, names, f"--{field} {path}, row {i}", len(first["sample0"]), args), "row": i} for i, row in enumerate(rows, 1)]
    else:
        check_columns(rows, path, field, (args.prompt_field, args.chosen_field, args.rejected_field))
        for number, row in enumerate(rows, 1):
            if not (isinstance(row[args.chosen_field], str) and isinstance(row[args.rejected_field], str)):
                raise ValueError(f"--{field} {path}, row {number}: {args.chosen_field} and {args.rejected_field} must be texts")
        special = {*tokenizer.all_special_ids, *(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)}
        closing_id = stop_id if stop_id == tokenizer.eos_token_id or stop_id in special else -1  # not ".": a text has its own
        rows = [{**row, "row": number} for number, row in enumerate(rows, 1)]
        labels = [{"query": row["query_ids"], "best": 0, "row": row["row"],
                   "samples": [encode_response(tokenizer, row[name], closing_id) for name in (args.chosen_field, args.rejected_field)]}
                  for row in encode_queries(tokenizer, rows, args, field)]  # fmt: skip
        labels = [label for label in labels if all(0 < len(sample) <= args.response_length for sample in label["samples"])]
        if not labels:
            raise ValueError(f"--{field} {path}: every label has a response longer than --response_length {args.response_length}; raise it")
    for label in labels:
        largest = max(map(max, (label["query"], *label["samples"])))
        if largest >= vocab_size:
            raise ValueError(f"--{field} {path}, row {label['row']}: token id {largest}, but the model has {vocab_size} tokens; if it is padding, "
                             f"set --label_pad_id {largest}, else give the labels' own --model")  # fmt: skip
    return labels


def id_label(row: dict, names: list[str], where: str, length: int, args: Args) -> dict:
    """One label given as token ids; `where` starts its error messages, `length` is that of the file's first response."""
    for name in ("query", *names):
        if not isinstance(row[name], list) or not all(isinstance(x, int) and x >= 0 for x in row[name]):
            raise ValueError(f"{where}: {name} must be a list of token ids, 0 or larger")
        if name != "query" and len(row[name]) != length:
            raise ValueError(f"{where}: {name} has {len(row[name])} ids, row 1 has {length}; pad all responses to one length with --label_pad_id")
    if not isinstance(row["best"], int) or not 0 <= row["best"] < len(names):
        raise ValueError(f"{where}: best is {row['best']!r}; it must be the number of the best sample, 0 .. {len(names) - 1}")
    query, *samples = [[x for x in row[name] if x != args.label_pad_id] for name in ("query", *names)]
    if len(query) > args.query_length:
        raise ValueError(f"{where}: query has {len(query)} tokens, more than --query_length {args.query_length}; raise it or cut the query")
    if not query or not all(samples):
        raise ValueError(f"{where}: the query or a sample is empty; leave the row out")
    return {"query": query, "samples": samples, "best": row["best"]}


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


def prompt_order(num_prompts: int, start: int, count: int, seed: int, reshuffle: bool = True) -> list[int]:
    """Positions start .. start+count-1 of the endless stream of shuffled passes over the prompts; without reshuffle all in one order."""
    passes = {p: torch.randperm(num_prompts, generator=random_generator("cpu", seed, 0, p * reshuffle)) for p in
              range(start // num_prompts, (start + count - 1) // num_prompts + 1)}  # fmt: skip
    return [int(passes[i // num_prompts][i % num_prompts]) for i in range(start, start + count)]


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

    for field in ("model", "train_data", "output_dir"):
        need(getattr(args, field) != "", f"--{field} is needed")
    for field in ("epochs", "batch_size", "micro_batch_size", "forward_batch_size", "query_length", "response_length",
                  "log_every", "checkpoint_every", "reliability_samples", "reliability_groups"):  # fmt: skip
        need(getattr(args, field) >= 1, f"--{field} must be at least 1, not {getattr(args, field)}")
    need(args.temperature > 0, f"--temperature must be above 0, not {args.temperature}")
    need(args.normalize_samples >= 2, f"--normalize_samples must be at least 2, not {args.normalize_samples}")
    need(args.batch_size >= num_processes, f"--batch_size {args.batch_size} must be at least the {num_processes} processes")
    need((args.reliability_prompts == "") == (args.actual_score == ""), "--reliability_prompts and --actual_score need each other")
    for field in ("train_data", "eval_data", "normalize_prompts", "reliability_prompts"):
        need(Path(getattr(args, field)).suffix not in (".jsonl", ".json", ".parquet") or Path(getattr(args, field)).is_file(),
             f"--{field} {getattr(args, field)}: no such file")  # fmt: skip


# ---------------------------------------------------------------- main


def main(args: Args) -> None:
    # ------------------------------------------------ Setup: everything that can be refused is refused here
    accelerator = Accelerator(kwargs_handlers=process_settings())
    refuse_sharding(accelerator.distributed_type.value)
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    check_args(args, world)
    tokenizer = load_tokenizer(args.model, args.pad_token)
    pad_id, stop_id = tokenizer.pad_token_id, stop_token_id(tokenizer, args.stop_token)
    vocab_size = AutoConfig.from_pretrained(args.model).get_text_config().vocab_size
    actual_score = load_function(args.actual_score, "actual_score") if args.actual_score else None

    # ------------------------------------------------ 1. read labels
    labels = read_labels(args.train_data, "train_data", args, tokenizer, vocab_size, stop_id)
    if args.num_train > len(labels):
        raise ValueError(f"--num_train {args.num_train}: --train_data {args.train_data} has {len(labels)} labels; lower it")
    num_train = args.num_train or len(labels)
    labels, eval_labels = labels[:num_train], labels[num_train:]
    if args.eval_data:
        eval_labels = read_labels(args.eval_data, "eval_data", args, tokenizer, vocab_size, stop_id)
    limit = dataclasses.replace(args, query_length=args.normalize_query_length or args.query_length)
    if args.normalize_prompts:
        rows = load_rows(args.normalize_prompts, "normalize_prompts", (args.prompt_field,))
        queries = [row["query_ids"] for row in encode_queries(tokenizer, rows, limit, "normalize_prompts")]
    else:
        queries = [label["query"][: limit.query_length] for label in labels]
    reliability_rows = []
    if args.reliability_prompts:
        reliability_rows = load_rows(args.reliability_prompts, "reliability_prompts", (args.prompt_field,))
        reliability_rows = encode_queries(tokenizer, reliability_rows, args, "reliability_prompts")
    longest = max(len(label["query"]) + max(map(len, label["samples"])) for label in labels + eval_labels)
    asked = [row["query_ids"] for row in reliability_rows]
    for field, ids in (("normalize_prompts", queries), ("reliability_prompts", asked), ("stop_token", [[stop_id]])):
        check_ids(ids, vocab_size, field)
    asked += queries if args.normalize_before or args.normalize_after or args.kl_samples else []
    check_positions(args.model, "model", max([longest, *(len(query) + args.response_length for query in asked)]))
    steps_per_epoch = math.ceil(num_train / args.batch_size)
    num_steps = steps_per_epoch * args.epochs
    sizes = {"processes": world, "labels": num_train, "held-out labels": len(eval_labels), "responses per label": len(labels[0]["samples"]),
             "prompts to normalise on": len(queries), "labels per step and rank": args.batch_size / world, "optimizer steps": num_steps}  # fmt: skip
    accelerator.print("\n".join(f"{name:>26}: {value}" for name, value in sizes.items()))
    if args.dry_run:
        accelerator.print(json.dumps(dataclasses.asdict(args), indent=1))
        return
    if accelerator.is_main_process:
        open_run(args, world)
    accelerator.wait_for_everyone()
    output_dir = Path(args.output_dir)

    set_seed(args.seed)
    sft_policy = load_causal_lm(args.model, getattr(torch, args.frozen_dtype)).to(device).eval().requires_grad_(False)
    trained_lm = load_causal_lm(args.model).to(device)  # R_φ's backbone is this model's; its output layer serves train/kl alone
    if args.gradient_checkpointing:
        trained_lm.gradient_checkpointing_enable()
    reward_model = RewardModel(trained_lm.base_model, args.bound)
    init_head(reward_model)
    optimizer = torch.optim.AdamW(reward_model.parameters(), lr=args.lr, eps=args.eps, weight_decay=args.weight_decay)
    model, optimizer = accelerator.prepare(reward_model, optimizer)
    bare = accelerator.unwrap_model(model, keep_torch_compile=False)

    def all_sum(x: torch.Tensor) -> torch.Tensor:
        return accelerator.reduce(x, "sum")

    def sample(lm: nn.Module, stage: int, number: int) -> dict[str, torch.Tensor]:
        """This rank's share of normalize_samples responses (kl_samples when lm is trained), one to each of the next prompts."""
        count = math.ceil((args.normalize_samples if lm is sft_policy else args.kl_samples) / world)
        picks = prompt_order(len(queries), rank * count, count, args.seed + 1000 * stage + number)
        with accelerator.autocast():
            return sample_rollout(lm, [queries[i] for i in picks], 1, args.response_length, args.temperature, stop_id, args.stop_after,
                                  pad_id, args.forward_batch_size, random_generator(device, args.seed, 1, rank, stage, number))  # fmt: skip

    def normalize(stage: int, tag: str) -> dict[str, float]:
        """Reset gain and bias, measure the unbounded reward on π_SFT samples of all ranks, set gain and bias; check on fresh samples."""
        found = {}
        set_gain_and_bias(bare, 1.0, 0.0)
        for i, name in enumerate(("", "check_")):
            with accelerator.autocast():
                rewards = accelerator.gather(reward_model_scores(bare, sample(sft_policy, stage, i), args.forward_batch_size, bounded=False))
            found.update({f"{tag}/{name}mean": rewards.mean().item(), f"{tag}/{name}std": rewards.std().item()})
            if not name:
                found[f"{tag}/gain"], found[f"{tag}/bias"] = normalization(rewards)
                set_gain_and_bias(bare, found[f"{tag}/gain"], found[f"{tag}/bias"])
        accelerator.print(f"{tag}: " + "  ".join(f"{name.split('/')[1]} {value:.4f}" for name, value in found.items()))
        return found

    @torch.no_grad()
    def evaluate(step: int) -> dict[str, float]:
        """Held-out loss and accuracy, every label once whatever the number of ranks, and train/kl."""
        bare.eval()
        results, sums, mine = {}, torch.zeros(3, device=device, dtype=torch.float64), eval_labels[rank::world]
        if mine:
            batch, best = label_batch(mine, pad_id, device)
            for part, part_rows in label_parts(batch, len(mine), max(1, args.forward_batch_size // len(mine[0]["samples"]))):
                with accelerator.autocast():
                    loss, accuracy, _ = label_loss(bare, trim(batch, part_rows), best[part])
                sums += torch.stack([loss, accuracy, torch.ones_like(loss)]).double() * len(part)
        if eval_labels:
            loss, accuracy, count = all_sum(sums).tolist()
            results.update({"test/loss": loss / count, "test/accuracy": accuracy / count})
        if args.kl_samples:
            trained_lm.eval()
            rollout, kl = sample(trained_lm, 2, step), torch.zeros(2, device=device, dtype=torch.float64)
            for part in micro_batches(rollout, torch.arange(len(rollout["queries"]), device=device), args.forward_batch_size):
                with accelerator.autocast():
                    logprobs, ref_logprobs = (response_logprobs(lm, trim(rollout, part), args.temperature) for lm in (trained_lm, sft_policy))
                kl += torch.stack([(logprobs - ref_logprobs).sum().double(), torch.tensor(float(len(part)), device=device).double()])
            total, count = all_sum(kl).tolist()
            results["train/kl"] = total / count
        return results

    def log(step: int, metrics: dict[str, float]) -> None:
        log_metrics(writer, output_dir, step, metrics)
        shown = {"loss": "train/loss", "accuracy": "train/accuracy", "lr": "train/lr", "held-out": "test/accuracy", "kl": "train/kl"}
        if accelerator.is_main_process:
            bar.write(f"step {step}/{num_steps}  " + "  ".join(f"{k} {metrics[t]:.4g}" for k, t in shown.items() if t in metrics))

    # ------------------------------------------------ Continue a killed run; 2. or normalise first
    state = load_checkpoint(accelerator, output_dir / "checkpoints")
    writer = open_metrics(output_dir, state["step"] - ("metrics" in state) if state else -1) if accelerator.is_main_process else None
    run_start, clock = time.time(), time.time()
    if state is None:
        state = {"step": 0, "losses": [], "accuracies": [], "grad_norms": []}
        if args.normalize_before:
            log_metrics(writer, output_dir, 0, normalize(0, "normalize_before"))
    bar = tqdm(total=num_steps, initial=state["step"], disable=not accelerator.is_main_process, desc="RM steps", mininterval=5)
    for step in range(state["step"] + 1, num_steps + 1):
        # ---------------- 3. the next batch of a shuffled pass over the labels
        epoch, index = divmod(step - 1, steps_per_epoch)
        order = torch.randperm(len(labels), generator=random_generator("cpu", args.seed, 0, epoch))
        picks = order.split(args.batch_size)[index].tolist()  # the last batch of a pass may be smaller
        mine = [labels[i] for i in picks[rank::world]]
        batch, best = label_batch(mine or labels[:1], pad_id, device)

        # ---------------- 4. cross-entropy over the K rewards, mean over the labels of all ranks; Adam
        bare.train()
        optimizer.param_groups[0]["lr"] = scheduled_lr(
            args.lr, step - 1, num_steps, args.lr_schedule, args.warmup_steps, args.final_lr_fraction)  # fmt: skip
        optimizer.param_groups[0]["eps"] = adam_epsilon(args.eps, args.adam_style, step)
        parts, local_stats = label_parts(batch, len(best), args.micro_batch_size), torch.zeros(2, device=device)
        for i, (part, part_rows) in enumerate(parts):
            with nullcontext() if i == len(parts) - 1 else accelerator.no_sync(model), accelerator.autocast():
                loss, accuracy, _ = label_loss(model, trim(batch, part_rows), best[part])
                weight = (len(part) if mine else 0) * world / len(picks)  # DDP averages gradients over ranks
                accelerator.backward(loss * weight)
            local_stats += torch.stack([loss.detach(), accuracy]) * weight
        loss, accuracy = accelerator.reduce(local_stats, "mean").tolist()
        norm = float(accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm or float("inf")))
        if not math.isfinite(loss if accelerator.scaler else loss + norm):  # under fp16 a gradient may overflow: its step is skipped
            raise FloatingPointError(f"step {step}: the loss is {loss}, the gradient norm {norm}; the last good checkpoint is kept in "
                                     f"{output_dir / 'checkpoints'}. Lower --lr")  # fmt: skip
        for name, value in (("losses", loss), ("accuracies", accuracy), ("grad_norms", norm)):
            state[name] += [value] if math.isfinite(value) else []
        optimizer.step()
        optimizer.zero_grad()

        # ---------------- 5. held-out loss and accuracy; log and save
        metrics, last = {}, step == num_steps
        if step % args.log_every == 0 or last:
            metrics = {"train/loss": float(np.mean(state["losses"])), "train/accuracy": float(np.mean(state["accuracies"])),
                       **({"train/grad_norm": float(np.mean(state["grad_norms"]))} if state["grad_norms"] else {}), "train/lr": optimizer.param_groups[0]["lr"],
                       "train/epoch": step / steps_per_epoch,
                       "train/gain": bare.reward_gain.item(), "train/bias": bare.reward_bias.item(),
                       "seconds/step": (time.time() - clock) / len(state["losses"])}  # fmt: skip
            state["losses"], state["accuracies"], state["grad_norms"] = [], [], []
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

    # ------------------------------------------------ 6. normalise again, save
    bare.eval()
    if args.normalize_after:
        log_metrics(writer, output_dir, num_steps + 1, normalize(1, "normalize_after"))
    if accelerator.is_main_process:
        write_folder(output_dir / "model", lambda folder: (bare.save_pretrained(folder), tokenizer.save_pretrained(folder)))
    accelerator.wait_for_everyone()

    # ------------------------------------------------ 7. reliability (PAPER Figure 1)
    if reliability_rows:
        mine, lines = list(enumerate(reliability_rows))[rank::world], []
        if mine:
            with accelerator.autocast():
                rollout = sample_rollout(
                    sft_policy, [row["query_ids"] for _, row in mine], args.reliability_samples, args.response_length, args.temperature,
                    stop_id, args.stop_after, pad_id, args.forward_batch_size, random_generator(device, args.seed, 3, rank))  # fmt: skip
                rewards = reward_model_scores(bare, rollout, args.forward_batch_size).tolist()
            texts = decode_responses(tokenizer, rollout)
            repeated = [(i, row) for i, row in mine for _ in range(args.reliability_samples)]
            actual = call_function(actual_score, [row[args.prompt_field] for _, row in repeated], texts, [row for _, row in repeated])
            lines = [{"prompt": i, "response": text, "reward": r, "actual": s} for (i, _), text, r, s in zip(repeated, texts, rewards, actual)]
        lines = sorted((line for part in gather_object([lines]) for line in part), key=lambda line: line["prompt"])
        if accelerator.is_main_process:
            rewards, actual = (np.array([line[name] for line in lines]) for name in ("reward", "actual"))
            repeats = reliability(rewards, actual, args.reliability_groups, 10, args.seed)
            for name, text in (("samples_scored.jsonl", "".join(json.dumps(line) + "\n" for line in lines)),
                               ("reliability.json", json.dumps({"responses": len(lines), "repeats": repeats}, indent=1))):  # fmt: skip
                (output_dir / f"{name}.tmp").write_text(text)
                (output_dir / f"{name}.tmp").rename(output_dir / name)
    accelerator.print(f"done: {num_steps} steps, {time.time() - run_start:.0f} s in this process; model in {output_dir / 'model'}")


def parse_args(argv: list[str] | None = None) -> Args:
    """Flags over the preset's values over the defaults."""
    argv = sys.argv[1:] if argv is None else argv
    words = [word for flag in argv for word in (flag.split("=", 1) if flag.startswith("--preset=") else [flag])]
    name = dict(zip(words, words[1:])).get("--preset", "pfppo")
    return tyro.cli(Args, args=argv, default=Args(preset=name, **PRESETS[name]) if name in PRESETS else None)


if __name__ == "__main__":
    main(parse_args())
