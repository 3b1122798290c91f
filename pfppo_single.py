"""PPO with policy filtration (PF-PPO, arXiv 2409.06957) for language models: stage 3 of SFT -> reward model -> RL.

Algorithm 2, one update (the numbers are those of the chapters in `main`):
  1. take B prompts c                                     5. log-probabilities, reference log-probabilities and
  2. draw N responses y ~ π_θ(·|c) for each                  values of the kept rows only
  3. score them with the reward model R_φ(y|c)            6. rewards per token (Eq. 4)
  4. filter: rank, draw z ~ w, keep K rows (μ_θ)          7. advantages and returns (GAE)
                                                          8. m epochs of clipped PPO on the kept rows (Eq. 5)
PPO-M is `--filter none`, PPO-S is `--num_responses 1`; nothing else changes between the methods.

Run (CPU, 1 GPU, 8 GPUs; sizes are global, so the algorithm is the same):
  accelerate launch --cpu --num_processes 1 pfppo_single.py --policy sft/model --reward rm/model --prompts rl.jsonl --output_dir run
  accelerate launch --num_processes 1 --mixed_precision bf16 pfppo_single.py ...
  accelerate launch --multi_gpu --num_processes 8 --mixed_precision bf16 pfppo_single.py ...
In:  a causal LM folder or hub id (`--policy`), a reward (`--reward`: a folder of rm_single.py, or `module:function`), JSONL prompts.
Out: `output_dir/policy` (the last policy), `policy_best` (best on the evaluation prompts), `metrics.jsonl`, `tensorboard/`,
     `samples.jsonl`, `checkpoints/`. The same command continues a killed run.

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
import warnings
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

# Shapes: B prompts per update, N responses per prompt, K rows kept by the filter, Q query length, R response length, V vocabulary.
#
#   column          0 .. Q-1       Q .. Q+R-1
#   query_response  P P q q q      r r . P P     queries padded left, responses padded right; "." is the stop token
#   micro-batch         P P P P q q q r r .      `trim` moves all padding left: as wide as its longest row
#   response_mask                  1 1 1 0 0     up to and including the stop token
#   logits, values  read one column earlier than the token they belong to: Q-1 .. Q+R-2

AUTO, THRESHOLDS = ("none", "bon", "br", "bw"), ("top", "top_random", "top_bottom")  # what `filter auto` chooses from; filters by threshold


@dataclass
class Args:
    # run
    output_dir: str = "output/pfppo"
    """folder for everything this run writes; a folder that holds another run is refused"""
    preset: Literal["pfppo", "lm_human_preferences"] = "pfppo"
    """defaults for the other fields: the paper's, or those of LMHP (PRESETS below); fields given as flags win"""
    seed: int = 1
    """shared over ranks; data order, filter, sampling and minibatches get their own generators from (seed, update, rank)"""
    dry_run: bool = False
    """print the settings and derived sizes, check them, and stop before a model is loaded"""
    # models
    policy: str = ""
    """π_θ at the start and the reference π_SFT: folder or hub id of a causal language model"""
    reward: str = ""
    """R_φ: a folder written by rm_single.py, or `module:function` (`module:function@TEXT` adds the keyword source=TEXT),
    called with (prompts, responses, rows) and returning one float per response"""
    critic: Literal["separate", "shared"] = "separate"
    """a critic of its own, or one linear head (zero at the start) on the policy's last hidden state as in LMHP"""
    critic_init: str = ""
    """separate critic: reward-model folder it starts from; empty: `reward` when that is a folder, else the policy with a zero head"""
    pad_token: str = ""
    """pad token for a tokenizer that has none; may lie past the embedding (padded columns are fed as token 0 and masked)"""
    frozen_dtype: Literal["float32", "bfloat16"] = "float32"
    """weights of the frozen models (reference and reward); trainable weights are always float32, autocast by accelerate"""
    gradient_checkpointing: bool = False
    """recompute activations in the PPO epochs; never during rollouts"""
    # data
    prompts: str = ""
    """training prompts: .jsonl, .json, .parquet, or hub id `name:split`"""
    prompt_field: str = "prompt"
    """column with the prompt: text, or a list of chat messages (the tokenizer's chat template is applied)"""
    query_length: int = 1024
    """longest query in tokens"""
    long_queries: Literal["drop", "keep_end", "keep_start"] = "drop"
    """what happens to a query longer than query_length; one of eval_prompts is never dropped but refused"""
    reshuffle: bool = True
    """every pass over the prompts in a new order; off: all passes in the first one's, as LMHP-details"""
    # rollout
    total_episodes: int = 75000
    """responses to generate in all, over all ranks; PAPER: 5 passes over 3k prompts x 5"""
    batch_size: int = 64
    """B: prompts per update, over all ranks (each rank takes batch_size / num_processes)"""
    num_responses: int = 5
    """N: responses per prompt"""
    response_length: int = 1024
    """R: longest response in tokens, the stop token included"""
    temperature: float = 1.0
    """divides the logits of policy, old policy and reference alike; there is no top-k or top-p, so samples are π_θ's own"""
    stop_token: str = "eos"
    """token that ends a response: `eos`, `none`, a token or an id; it alone decides truncation, penalty and masks"""
    stop_after: int = 0
    """a stop token counts only at this response index (from 0) or later"""
    mask_after_stop: bool = True
    """Eq. 4: stop generating at the stop token, pay the score there and mask what follows; off: LMHP's fixed last slot, no mask"""
    forward_batch_size: int = 32
    """rows per rank in one forward pass without gradient (scores, log-probabilities)"""
    generation_batch_size: int = 0
    """responses per rank that are generated at a time; 0: forward_batch_size. Generation likes many rows, forward passes fit in a cache"""
    # reward
    missing_stop: Literal["none", "replace", "subtract"] = "none"
    """response without stop token: keep its score, replace it by penalty_value, or subtract penalty_value (above 0) from it"""
    penalty_value: float = -1.0
    """see missing_stop; on the scale of the score after normalisation"""
    normalize_reward: bool = True
    """subtract mean and divide by standard deviation of the reward on π_SFT samples, measured once before training (PAPER)"""
    normalize_samples: int = 512
    """responses those two numbers (and `filter auto`, which wants thousands) are measured on, over all ranks"""
    # filter
    filter: Literal["none", "random", "bon", "br", "bw", "top", "top_random", "top_bottom", "pow", "auto"] = "br"
    """which of the N responses are trained on; `auto` takes the one of none, bon, br, bw with the highest R² on π_SFT samples"""
    rank_weights: tuple[float, ...] = ()
    """your own w over the N ranks, best first, in place of none, random, br or bw (`--rank_weights 0.5 0 0 0 0.5` is BW)"""
    num_kept: int = 0
    """rows kept per prompt (pow: on average); 0: N for none, 1 for bon, 2 otherwise; none and threshold filters take no other number"""
    draw: Literal["exact", "sample"] = "exact"
    """how z is drawn from w: `sample` num_kept times with replacement, `exact` with the same mean and least variance
    (BR with 2: the best and one random other; BW with 2: the best and the worst)"""
    threshold_high: float = 0.3
    """top, top_random, top_bottom: keep R above this; thresholds and pow_k are for R in [-1, 1] and warn where it is not"""
    threshold_low: float = -0.3
    """top_bottom: keep R below this too"""
    pow_k: float = 1.0
    """pow: a row is drawn from the buffer with weight |R|^pow_k"""
    # PPO
    kl_coef: float = 0.01
    """β, Eq. 4"""
    adaptive_kl: bool = False
    """move kl_coef towards kl_target after every update (LMHP)"""
    kl_target: float = 6.0
    """nats per response the adaptive controller aims at"""
    kl_horizon: int = 10000
    """episodes over which the adaptive controller acts"""
    noptepochs: int = 3
    """m: passes over the kept rows per update"""
    minibatch_size: int = 64
    """rows per optimizer step, over all ranks; threshold filters split into the nearest number of equal parts"""
    micro_batch_size: int = 8
    """rows per rank in one forward and backward pass; changes memory and speed, not the gradient"""
    lr: float = 5e-7
    """learning rate of the policy (and of a shared critic)"""
    critic_lr: float = 9e-6
    """learning rate of a separate critic"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """per update: constant, or falling to zero"""
    warmup_updates: int = 0
    """updates over which the learning rates rise linearly from 1 / warmup_updates of their value"""
    critic_warmup_updates: int = 0
    """first updates in which the policy's learning rate is 0 beside a separate critic's; the policy's gradients are still there:
    they fill its Adam moments and count in the norm that max_grad_norm clips"""
    adam_style: Literal["torch", "tensorflow"] = "torch"
    """where epsilon enters Adam; TensorFlow's is what LMHP's curves used"""
    eps: float = 1e-5
    """Adam's epsilon"""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay"""
    max_grad_norm: float = 1.0
    """clip the gradient norm, one norm over policy and critic together, at this; 0: never"""
    cliprange: float = 0.2
    """policy ratio is clipped to 1 ± cliprange"""
    cliprange_value: float = 0.2
    """value prediction is clipped to the old value ± cliprange_value"""
    vf_coef: float = 0.1
    """weight of the value loss"""
    gamma: float = 1.0
    """discount"""
    lam: float = 0.95
    """λ of GAE"""
    whiten_rewards: bool = False
    """scale rewards per token to unit variance, keeping their mean, once per rollout"""
    whiten_advantages: bool = True
    """advantages to mean 0 and variance 1 over the kept tokens, once per rollout (PAPER: advantage normalisation)"""
    loss_average: Literal["token", "sequence"] = "token"
    """policy, value and entropy terms: mean over the minibatch's tokens, or mean over responses of token means"""
    per_rank_statistics: bool = False
    """whitening and loss averages per rank (LMHP) instead of over all ranks"""
    # evaluation and logging
    eval_prompts: str = ""
    """held-out prompts, same columns as `prompts`; empty: no evaluation"""
    actual_score: str = ""
    """s: `module:function` as in `reward`, for example unit tests; needed for eval/*_pass1 and `filter auto`"""
    eval_every: int = 5
    """updates between evaluations (there is one before the first and after the last update)"""
    monitor: str = ""
    """`module:function` of the list of responses, returning a dict of shares logged as monitor/* (for example cheating attempts)"""
    print_samples_every: int = 10
    """updates between printed samples; 0: never"""
    checkpoint_every: int = 10
    """updates between checkpoints; the last update always writes one"""
    save_policy_every: int = 0
    """updates between copies of the policy that are kept as policy_<update>; 0: none"""


LM_HUMAN_PREFERENCES = dict(  # LMHP launch.py and train_policy.py; one table row each in README
    critic="shared", pad_token="[PAD]", query_length=64, long_queries="keep_start", reshuffle=False, total_episodes=1000000, batch_size=512,
    num_responses=1, response_length=24, temperature=0.7, stop_token="13", stop_after=16, mask_after_stop=False,
    missing_stop="replace", penalty_value=-1.0, normalize_reward=False, filter="none", kl_coef=0.15, adaptive_kl=True,
    kl_target=6.0, kl_horizon=10000, noptepochs=4, minibatch_size=512, micro_batch_size=64, forward_batch_size=64, lr=1e-5, lr_schedule="linear",
    adam_style="tensorflow", eps=1e-5, max_grad_norm=0.0, cliprange=0.2, cliprange_value=0.2, vf_coef=0.1, gamma=1.0, lam=0.95,
    whiten_rewards=True, whiten_advantages=True, loss_average="token", per_rank_statistics=True,
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


class PolicyAndCritic(nn.Module):
    """What is trained, in one wrapper so that both synchronise, accumulate and step together."""

    def __init__(self, policy: nn.Module, critic: nn.Module):
        super().__init__()
        self.policy, self.critic = policy, critic

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, response_length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """ids, mask (rows, Q+R) -> logits (rows, R, V) and values (rows, R), aligned with the R response tokens."""
        shared = isinstance(self.critic, nn.Linear)
        output = self.policy(**model_inputs(ids, mask), use_cache=False, logits_to_keep=response_length + 1, output_hidden_states=shared)
        if shared:
            with torch.autocast(ids.device.type, enabled=False):  # values in float32, as those of RewardModel
                values = self.critic(output.hidden_states[-1].float()).squeeze(-1)
        else:
            values = self.critic(ids, mask)
        return output.logits[:, :-1], values[:, -response_length - 1 : -1].float()


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


@torch.no_grad()
def response_logprobs_and_values(
    model: nn.Module, rollout: dict[str, torch.Tensor], temperature: float, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and values (rows, R) of a rollout, `size` rows at a time, 0 behind each response.
    `model` is a PolicyAndCritic, or a causal LM (values are then 0). The logits are gone when this returns."""
    logprobs = torch.zeros(rollout["responses"].shape, device=rollout["responses"].device)
    values = torch.zeros_like(logprobs)
    for rows in micro_batches(rollout, torch.arange(len(logprobs), device=logprobs.device), size):
        batch = trim(rollout, rows)
        ids, mask, r = batch["query_responses"], batch["mask"], batch["responses"].shape[1]
        if isinstance(model, PolicyAndCritic):
            logits, value = model(ids, mask, r)
            value = torch.where(batch["response_mask"], value, 0.0)
            values[rows] = values[rows].scatter(1, batch["columns"], value)
        else:
            logits = model(**model_inputs(ids, mask), use_cache=False, logits_to_keep=r + 1).logits[:, :-1]
        logprob = token_logprobs(logits, batch["responses"], batch["response_mask"], temperature)
        logprobs[rows] = logprobs[rows].scatter(1, batch["columns"], logprob)
    return logprobs, values


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


# ---------------------------------------------------------------- maths


def token_logprobs(logits: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor, temperature: float) -> torch.Tensor:
    """logits (rows, R, V), tokens and mask (rows, R) -> log π(token) (rows, R) in float32, 0 where masked."""
    logits = logits.float() if temperature == 1 else logits.float() / temperature  # no copy of the largest tensor there is
    chosen = logits.gather(-1, tokens.masked_fill(~mask, 0).unsqueeze(-1)).squeeze(-1)
    return torch.where(mask, chosen - logits.logsumexp(-1), 0.0)


def token_entropy(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """logits (rows, R, V) -> entropy of π at every slot (rows, R) in nats."""
    entropy = []
    for part in logits.split(4):  # a few rows at a time: three more tensors of this size for all rows would not fit
        logprobs = (part.float() / temperature).log_softmax(-1)
        entropy.append(-(logprobs.exp() * logprobs).sum(-1))
    return torch.cat(entropy)


def cumulative_rewards(
    scores: torch.Tensor, logprobs: torch.Tensor, ref_logprobs: torch.Tensor, mask: torch.Tensor, kl_coef: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Eq. 4: scores (rows,), the rest (rows, R) -> (rewards, non_score_reward, kl), each (rows, R) and 0 where masked."""
    # Eq. 4 (cumulative reward): -kl_coef * (logprobs - ref_logprobs) at every token, + scores at the last one
    kl = torch.where(mask, logprobs - ref_logprobs, 0.0)
    non_score_reward = -kl_coef * kl
    is_last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)  # the last real token; nothing where a row is all masked
    rewards = non_score_reward + torch.where(is_last, scores.unsqueeze(1), 0.0)
    return rewards, non_score_reward, kl


def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """rewards, values, mask (rows, R), right-padded -> (advantages, returns); the value behind the last token is 0."""
    rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
    advantages, lastgaelam, nextvalues = torch.zeros_like(values), 0.0, 0.0
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * nextvalues - values[:, t]
        lastgaelam = torch.where(mask[:, t], delta + gamma * lam * lastgaelam, 0.0)
        advantages[:, t], nextvalues = lastgaelam, values[:, t]
    return advantages, advantages + values


def whiten(values: torch.Tensor, mask: torch.Tensor, shift_mean: bool = True, all_sum=lambda x: x) -> torch.Tensor:
    """Masked mean 0 and (biased) variance 1, 0 where masked. shift_mean=False keeps the mean. `all_sum` adds over ranks."""
    values = torch.where(mask, values, 0.0)
    count, total = all_sum(torch.stack([mask.sum().to(values.dtype), values.sum()]))
    mean = total / count.clamp(min=1)
    var = all_sum(torch.where(mask, values - mean, 0.0).square().sum()) / count.clamp(min=1)
    whitened = (values - mean) * torch.rsqrt(var + 1e-8)  # LMHP core.py whiten_rewards
    return torch.where(mask, whitened if shift_mean else whitened + mean, 0.0)


def loss_weights(mask: torch.Tensor, average: str, all_sum=lambda x: x, num_processes: int = 1) -> torch.Tensor:
    """mask (rows, R) of one minibatch -> weights (rows, R): the loss is Σ weights · token loss. DDP averages gradients over
    ranks, so a denominator summed over ranks comes with the factor num_processes."""
    lengths = mask.sum(1, keepdim=True)
    weights = mask.float() if average == "token" else mask / lengths.clamp(min=1)
    denominator = mask.sum() if average == "token" else (lengths > 0).sum()
    return weights * num_processes / all_sum(denominator.float()).clamp(min=1)


def policy_loss(
    new_logprobs: torch.Tensor, logprobs: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, cliprange: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All (rows, R) -> (clipped policy loss per token, whether it was clipped, ratio); 0, False, 1 where masked."""
    ratio = torch.where(mask, new_logprobs - logprobs, 0.0).exp()
    advantages = torch.where(mask, advantages, 0.0)
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    return torch.max(unclipped, clipped), clipped > unclipped, ratio


def value_loss(
    vpred: torch.Tensor, values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor, cliprange_value: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """All (rows, R) -> (half the larger of clipped and unclipped squared error per token, whether clipping acted); 0 where masked."""
    vpred, values, returns = (torch.where(mask, x, 0.0) for x in (vpred, values, returns))
    clipped = values + (vpred - values).clamp(-cliprange_value, cliprange_value)
    losses1, losses2 = (vpred - returns).square(), (clipped - returns).square()
    return 0.5 * torch.max(losses1, losses2), losses2 > losses1


STATS = ("ppo/loss/policy", "ppo/loss/value", "ppo/loss/total", "ppo/policy/entropy", "ppo/policy/approxkl", "ppo/policy/clipfrac",
         "ppo/policy/ratio", "ppo/val/clipfrac", "ppo/val/vpred", "ppo/val/error")  # fmt: skip


def minibatch_loss(
    model: nn.Module, batch: dict[str, torch.Tensor], temperature: float, cliprange: float, cliprange_value: float, vf_coef: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """One micro-batch (from `trim`, with loss_weights) -> its share of the minibatch loss, and of the STATS (10,).
    Leaves the ratio of every token in batch["ratio"] (rows, R), 1 where masked."""
    mask, weights = batch["response_mask"], batch["loss_weights"]
    logits, vpred = model(batch["query_responses"], batch["mask"], mask.shape[1])
    new_logprobs = token_logprobs(logits, batch["responses"], mask, temperature)
    pg_losses, pg_clipped, ratio = policy_loss(new_logprobs, batch["logprobs"], batch["advantages"], mask, cliprange)
    vf_losses, vf_clipped = value_loss(vpred, batch["values"], batch["returns"], mask, cliprange_value)
    pg_loss, vf_loss = (pg_losses * weights).sum(), (vf_losses * weights).sum()
    loss = pg_loss + vf_coef * vf_loss
    with torch.no_grad():
        log_ratio = torch.where(mask, new_logprobs - batch["logprobs"], 0.0)  # not ratio.log(): exp may have underflowed
        vpred, batch["ratio"] = torch.where(mask, vpred, 0.0), ratio
        per_token = (token_entropy(logits, temperature), 0.5 * log_ratio.square(), pg_clipped, ratio, vf_clipped, vpred,
                     (vpred - batch["returns"]).square())  # fmt: skip
        means = [(torch.where(mask, x.float(), 0.0) * weights).sum() for x in per_token]
        return loss, torch.stack([pg_loss, vf_loss, loss, *means])


def next_kl_coef(kl_coef: float, kl: float, target: float, horizon: int, episodes: int) -> float:
    """LMHP's controller: kl is the mean over responses of the sum over tokens; moves by at most 20% · episodes / horizon."""
    return kl_coef * (1 + min(max(kl / target - 1, -0.2), 0.2) * episodes / horizon)


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


# ---------------------------------------------------------------- filter


def rank_weight_vector(name: str, n: int) -> list[float]:
    """w over ranks 1..n, best first, for a named rank filter: none and random 1/n each; BoN, BR, BW as in PAPER."""
    if name == "bon" or n == 1:
        return [1.0] + [0.0] * (n - 1)
    if name == "br":
        return [0.5] + [0.5 / (n - 1)] * (n - 1)
    if name == "bw":
        return [0.5] + [0.0] * (n - 2) + [0.5]
    return [1.0 / n] * n


def rank_rows(scores: torch.Tensor, prompt_ids: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """scores, prompt_ids (rows,) in any order -> row indices (prompts, N), best first, ties in random order.
    Raises ValueError when prompts do not all have the same number of rows."""
    counts = prompt_ids.unique(return_counts=True)[1]
    if (counts != counts[0]).any():
        raise ValueError(f"every prompt id needs the same number of responses, found {sorted(set(counts.tolist()))}")
    order = torch.randperm(len(scores), generator=generator)
    order = order[scores[order].argsort(descending=True, stable=True)]
    order = order[prompt_ids[order].argsort(stable=True)]
    return order.view(len(counts), -1)


def filter_responses(
    scores: torch.Tensor, prompt_ids: torch.Tensor, name: str, weights: list[float], num_kept: int, draw: str,
    generator: torch.Generator, threshold_high: float = 0.0, threshold_low: float = 0.0, pow_k: float = 1.0,
) -> torch.Tensor:  # fmt: skip
    """The filtered policy μ_θ: scores, prompt_ids (rows,) on CPU -> selected row indices (K,), ascending, repeats possible.

    Every filter is a matrix of expected counts over groups: a prompt's N ranks (rank filters), one row (thresholds), or the whole
    buffer (pow). `sample` draws with replacement; `exact` is systematic sampling: row i is kept ⌊e_i⌋ or ⌈e_i⌉ times, e_i on average."""
    if not torch.isfinite(scores).all():
        raise ValueError("the reward is not finite for some responses; look at the reward model or function")
    if name in (*THRESHOLDS, "pow") and scores.abs().max() > 1:  # ranks do not mind the scale
        warnings.warn("thresholds and pow-k are made for R in [-1, 1], but the reward leaves it: train the reward model with "
                      "--bound tanh, choose thresholds of that scale, or take a rank filter", stacklevel=2)  # fmt: skip
    ranked = rank_rows(scores, prompt_ids, generator)  # (B, N)
    if name in THRESHOLDS:  # DEPARTS PAPER: it gives no thresholds; they are fields of Args
        rows, draw = ranked.view(-1, 1), "exact"
        keep = scores[rows] > threshold_high
        keep = keep | (scores[rows] < threshold_low) if name == "top_bottom" else keep
        expected = torch.where(keep, 1.0, 0.5 if name == "top_random" else 0.0).double()
    elif name == "pow":
        rows = ranked.view(1, -1)
        expected = scores[rows].abs().double() ** pow_k
        expected = expected if expected.sum() > 0 else torch.ones_like(expected)
        num_kept = num_kept * len(ranked)
        expected = expected / expected.sum() * num_kept
    else:
        rows, expected = ranked, num_kept * torch.tensor(weights, dtype=torch.double).expand(ranked.shape)
    if draw == "sample" and name != "none":
        return rows.gather(1, torch.multinomial(expected, num_kept, replacement=True, generator=generator)).flatten().sort().values
    # DEPARTS PAPER, which draws z ~ w (--draw sample): `exact` keeps every row as often on average, with less variance
    shuffle = torch.rand(rows.shape, generator=generator).argsort(1)  # which ranks go together is random
    rows, expected = rows.gather(1, shuffle), expected.gather(1, shuffle)
    cumulative = (F.pad(expected.cumsum(1), (1, 0)) * 1e9).round() / 1e9  # rounded: 1 + 4 · 0.25 must be 2
    counts = (cumulative + torch.rand(len(rows), 1, generator=generator, dtype=torch.double)).floor().diff(dim=1).long()
    return rows.flatten().repeat_interleave(counts.flatten()).sort().values


def reward_r2(scores: np.ndarray, actual_scores: np.ndarray, num_groups: int = 20) -> float:
    """R² of a line through groups of similar reward (PAPER): rows sorted by reward into num_groups groups of equal count, mean
    reward and mean actual score of each, R² = 1 - Σ(s-ŝ)²/Σ(s-s̄)² of the least-squares line. NaN where either is constant."""
    order = np.argsort(scores, kind="stable")
    groups = [g for g in np.array_split(order, min(num_groups, len(order))) if len(g)]
    r, s = np.array([[scores[g].mean(), actual_scores[g].mean()] for g in groups], dtype=np.float64).T
    if len(groups) < 2 or np.ptp(r) < 1e-12 or np.ptp(s) < 1e-12:
        return float("nan")
    slope, intercept = np.polyfit(r, s, 1)
    return float(1 - np.square(s - slope * r - intercept).sum() / np.square(s - s.mean()).sum())


def equal_rows(draws: dict[str, list[torch.Tensor]], generator: torch.Generator) -> dict[str, list[np.ndarray]]:
    """{filter: kept rows of several draws} -> the same, each cut to as many random rows as the shortest has. Means of small groups
    are noisy, which lowers R²: on all rows that each filter keeps, no filter would look better for its size alone."""
    fewest = min(len(z) for zs in draws.values() for z in zs)
    return {name: [z[torch.randperm(len(z), generator=generator)[:fewest]].numpy() for z in zs] for name, zs in draws.items()}


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


def check_vocabulary(tokenizer, folder: str, field: str) -> None:
    """Raises ValueError when the folder's own tokenizer, if it has one, gives other ids than the policy's (pad tokens aside): its
    model is handed the policy's ids."""
    if any((Path(folder) / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json")):
        other = AutoTokenizer.from_pretrained(folder)
        differ = {token for token, _ in tokenizer.get_vocab().items() ^ other.get_vocab().items()} - {tokenizer.pad_token, other.pad_token}
        if differ:
            raise ValueError(f"--{field} {folder}: its tokenizer differs from that of --policy in {len(differ)} tokens, {min(differ)!r} among "
                             "them; take a reward model that was trained from a policy with this tokenizer")  # fmt: skip


def encode_prompt(tokenizer, prompt: str | list[dict]) -> list[int]:
    """Ids of a prompt: text gets the tokenizer's own BOS (if any), chat messages its chat template (which writes BOS itself)."""
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


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


def check_args(args: Args, num_processes: int) -> dict[str, int]:
    """Sizes that follow from the settings. Raises ValueError that names the field and the fix, before anything is loaded."""

    def need(condition: bool, message: str) -> None:
        if not condition:
            raise ValueError(message)

    n, b = args.num_responses, args.batch_size
    for field in ("policy", "reward", "prompts", "output_dir"):
        need(getattr(args, field) != "", f"--{field} is needed")
    for field in ("batch_size", "num_responses", "response_length", "query_length", "forward_batch_size", "micro_batch_size",
                  "minibatch_size", "noptepochs", "eval_every", "checkpoint_every", "total_episodes"):  # fmt: skip
        need(getattr(args, field) >= 1, f"--{field} must be at least 1, not {getattr(args, field)}")
    for field in ("num_kept", "stop_after", "warmup_updates", "critic_warmup_updates", "max_grad_norm", "print_samples_every", "save_policy_every"):
        need(getattr(args, field) >= 0, f"--{field} must be at least 0, not {getattr(args, field)}")
    need(args.normalize_samples >= 2, f"--normalize_samples must be at least 2, not {args.normalize_samples}")
    need(not args.adaptive_kl or (args.kl_target > 0 and args.kl_horizon >= 1), "--adaptive_kl needs --kl_target and --kl_horizon above 0")
    need(args.generation_batch_size >= 0, f"--generation_batch_size must be at least 1, or 0 for forward_batch_size, not {args.generation_batch_size}")
    need(args.temperature > 0, f"--temperature must be above 0, not {args.temperature}; evaluation decodes greedily by itself")
    need(args.missing_stop != "subtract" or args.penalty_value > 0,
         f"--penalty_value {args.penalty_value} would reward a missing stop token; with --missing_stop subtract give one above 0")  # fmt: skip
    need(b % num_processes == 0, f"--batch_size {b} must be a multiple of the {num_processes} processes")
    need(not args.rank_weights or len(args.rank_weights) == n, f"--rank_weights needs num_responses = {n} numbers, best first")
    need(not args.rank_weights or (min(args.rank_weights) >= 0 and abs(sum(args.rank_weights) - 1) < 1e-6),
         f"--rank_weights must be at least 0 and sum to 1, they sum to {sum(args.rank_weights)}")  # fmt: skip
    need(not args.rank_weights or args.filter in ("none", "random", "br", "bw"),
         f"--rank_weights stands in place of a named filter; leave out --filter {args.filter}")  # fmt: skip
    need(n > 1 or (args.filter == "none" and not args.rank_weights),
         f"--filter {args.filter} needs --num_responses of 2 or more; for PPO-S use --num_responses 1 --filter none")  # fmt: skip
    need(args.filter != "auto" or args.actual_score != "", "--filter auto needs --actual_score to compute R²")
    need(args.num_kept in (0, n) or args.rank_weights or args.filter not in ("none", *THRESHOLDS),
         f"--num_kept {args.num_kept} does nothing with --filter {args.filter}; leave it out, or take --filter random")  # fmt: skip
    need(args.num_kept <= n or args.draw == "sample", f"--num_kept {args.num_kept} exceeds num_responses {n}; use --draw sample")
    need(args.total_episodes >= b * n, f"--total_episodes {args.total_episodes} is less than one update of {b} x {n}")
    for field in ("critic_warmup_updates", "critic_init"):
        need(args.critic == "separate" or not getattr(args, field), f"--{field} needs --critic separate")
    need(not args.critic_init or (Path(args.critic_init) / "reward_head.safetensors").is_file(),
         f"--critic_init {args.critic_init}: no reward_head.safetensors there; give a folder of rm_single.py")  # fmt: skip
    for name in AUTO if args.filter == "auto" else (args.filter,):
        kept, of = num_kept(args, name), f" of {name}, which auto may choose" if args.filter == "auto" else ""
        need(name in THRESHOLDS or b * kept % args.minibatch_size == 0,
             f"--minibatch_size {args.minibatch_size} must divide the kept rows {b} x {kept} = {b * kept}{of}")  # fmt: skip
    if args.filter not in THRESHOLDS:
        need(args.minibatch_size % num_processes == 0, f"--minibatch_size {args.minibatch_size} must be a multiple of {num_processes} processes")
    for field in ("prompts", "eval_prompts"):
        need(Path(getattr(args, field)).suffix not in (".jsonl", ".json", ".parquet") or Path(getattr(args, field)).is_file(),
             f"--{field} {getattr(args, field)}: no such file")  # fmt: skip
    is_folder = ":" not in args.reward
    need(not is_folder or (Path(args.reward) / "reward_head.safetensors").is_file(),
         f"--reward {args.reward}: no reward_head.safetensors there; give a folder of rm_single.py or module:function")  # fmt: skip
    updates = args.total_episodes // (b * n)
    return {"processes": num_processes, "updates": updates, "prompts per update": b, "responses per update": b * n,
            **(kept_sizes(args, args.filter) if args.filter != "auto" else {}), "local prompts": b // num_processes}  # fmt: skip


def kept_sizes(args: Args, name: str) -> dict[str, int]:
    """Sizes that follow from the filter (threshold filters: at most)."""
    kept = args.batch_size * num_kept(args, name)
    minibatches = max(1, round(kept / args.minibatch_size))
    updates = args.total_episodes // (args.batch_size * args.num_responses)
    return {"kept per update": kept, "minibatches per epoch": minibatches, "optimizer steps": updates * args.noptepochs * minibatches}


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


def num_kept(args: Args, name: str) -> int:
    """Rows kept per prompt by a filter under these settings (threshold filters: at most N)."""
    if name in ("none", *THRESHOLDS) and not args.rank_weights:
        return args.num_responses
    return args.num_kept or {"bon": 1}.get(name, min(2, args.num_responses))


# ---------------------------------------------------------------- main


def main(args: Args) -> None:
    # ------------------------------------------------ Setup: everything that can be refused is refused here
    accelerator = Accelerator(kwargs_handlers=process_settings())
    refuse_sharding(accelerator.distributed_type.value)
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    sizes = check_args(args, world)
    accelerator.print("\n".join(f"{name:>22}: {value}" for name, value in sizes.items()))
    rows = load_rows(args.prompts, "prompts", (args.prompt_field,))
    eval_rows = load_rows(args.eval_prompts, "eval_prompts", (args.prompt_field,)) if args.eval_prompts else []
    if args.dry_run:
        accelerator.print(json.dumps(dataclasses.asdict(args), indent=1))
        return
    output_dir = Path(args.output_dir)
    set_seed(args.seed + 100003 * rank)  # LMHP: a rank-shifted seed
    tokenizer = load_tokenizer(args.policy, args.pad_token)
    pad_id = tokenizer.pad_token_id
    stop_id = stop_token_id(tokenizer, args.stop_token)
    found, rows = len(rows), encode_queries(tokenizer, rows, args, "prompts")
    accelerator.print(f"{'prompts left out':>22}: {found - len(rows)} of {found}, empty or longer than --query_length")
    eval_rows = encode_queries(tokenizer, eval_rows, args, "eval_prompts") if eval_rows else []
    actual_score = load_function(args.actual_score, "actual_score") if args.actual_score else None
    monitor = load_function(args.monitor, "monitor") if args.monitor else None
    reward_function = load_function(args.reward, "reward") if ":" in args.reward else None
    vocab_size = AutoConfig.from_pretrained(args.policy).get_text_config().vocab_size
    for field, ids in (("prompts", rows), ("eval_prompts", eval_rows), ("stop_token", [{"query_ids": [stop_id]}])):
        check_ids([row["query_ids"] for row in ids], vocab_size, field)
    longest = max(len(row["query_ids"]) for row in rows + eval_rows) + args.response_length
    for field in ("policy", "reward", "critic_init"):
        if getattr(args, field) and ":" not in getattr(args, field):
            check_positions(getattr(args, field), field, longest)
            check_vocabulary(tokenizer, getattr(args, field), field)
    if accelerator.is_main_process:  # last, so that a refused command leaves no folder behind
        open_run(args, world)
    accelerator.wait_for_everyone()

    frozen_dtype = getattr(torch, args.frozen_dtype)
    ref_policy = load_causal_lm(args.policy, frozen_dtype).to(device).eval().requires_grad_(False)
    policy = load_causal_lm(args.policy).to(device)
    if args.critic == "shared":
        critic = nn.Linear(policy.config.hidden_size, 1)
    elif args.critic_init or ":" not in args.reward:
        critic = RewardModel.from_pretrained(args.critic_init or args.reward).to(device)
    else:
        config = AutoConfig.from_pretrained(args.policy)
        without_dropout(config)
        critic = RewardModel(AutoModel.from_pretrained(args.policy, config=config, dtype=torch.float32))
    if not (args.critic_init or (args.critic == "separate" and ":" not in args.reward)):
        head = critic if args.critic == "shared" else critic.scalar_head
        nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
    if args.gradient_checkpointing:  # acts in train mode only, so rollouts keep their cache
        policy.gradient_checkpointing_enable()
        if args.critic == "separate":
            critic.lm_backbone.gradient_checkpointing_enable()
    if reward_function is None:
        reward_model = RewardModel.from_pretrained(args.reward, frozen_dtype).to(device).eval().requires_grad_(False)

    model = PolicyAndCritic(policy, critic)
    groups = [{"params": model.policy.parameters(), "lr": args.lr}]
    groups.append({"params": model.critic.parameters(), "lr": args.critic_lr if args.critic == "separate" else args.lr})
    optimizer = torch.optim.AdamW(groups, eps=args.eps, weight_decay=args.weight_decay)
    model, optimizer = accelerator.prepare(model, optimizer)
    bare = accelerator.unwrap_model(model, keep_torch_compile=False)

    def all_sum(x: torch.Tensor) -> torch.Tensor:
        return accelerator.reduce(x, "sum")

    statistics_sum = (lambda x: x) if args.per_rank_statistics else all_sum

    def sample(batch_rows: list[dict], n: int, temperature: float, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """n responses to each row -> the rollout as tensors whose first axis is the response; prompt ids count over ranks."""
        queries, query_mask = (x.to(device) for x in pad_rows([row["query_ids"] for row in batch_rows], pad_id, "left"))
        stop = stop_id if args.mask_after_stop else -1
        responses = []
        for part in torch.arange(len(queries), device=device).split(max(1, (args.generation_batch_size or args.forward_batch_size) // n)):
            q = int(query_mask[part].sum(1).max())
            with accelerator.autocast():
                responses.append(generate(bare.policy, queries[part, -q:], query_mask[part, -q:], n, args.response_length,
                                          temperature, stop, args.stop_after, pad_id, generator))  # fmt: skip
        responses = torch.cat(responses)
        score_mask, has_stop = stop_masks(responses, stop_id, args.stop_after)
        ids = torch.arange(len(queries), device=device) + rank * len(queries)
        return {"queries": queries.repeat_interleave(n, 0), "query_mask": query_mask.repeat_interleave(n, 0),
                "responses": responses, "score_mask": score_mask, "has_stop": has_stop, "prompt_ids": ids.repeat_interleave(n),
                "response_mask": score_mask if args.mask_after_stop else torch.ones_like(score_mask)}  # fmt: skip

    def decode(rollout: dict[str, torch.Tensor]) -> list[str]:
        """Responses as text, up to the stop token; special tokens left out."""
        ids = [r[m].tolist() for r, m in zip(rollout["responses"], rollout["score_mask"])]
        return tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def call(function, batch_rows: list[dict], texts: list[str]) -> torch.Tensor:
        """A `module:function` on the responses of batch_rows (each repeated for its responses) -> (rows,) float32."""
        repeated = [row for row in batch_rows for _ in range(len(texts) // len(batch_rows))]
        return torch.tensor(call_function(function, [row[args.prompt_field] for row in repeated], texts, repeated), device=device)

    def score(batch_rows: list[dict], rollout: dict[str, torch.Tensor], texts: list[str]) -> torch.Tensor:
        """R_φ of every response (rows,), as the reward gives it."""
        if reward_function is not None:
            return call(reward_function, batch_rows, texts)
        with accelerator.autocast():
            return reward_model_scores(reward_model, rollout, args.forward_batch_size)

    def evaluate(update: int) -> dict[str, float]:
        """Greedy and sampled responses to the evaluation prompts. Every prompt counts once, whatever the number of ranks."""
        mine, found = eval_rows[rank::world], {}
        bare.eval()
        for name, temperature in (("greedy", 0.0), ("sampled", args.temperature)) if mine else ():
            rollout = sample(mine, 1, temperature, random_generator(device, args.seed, 9, update, rank))
            texts = decode(rollout)
            found[f"eval/{name}_reward"] = score(mine, rollout, texts).tolist()
            if actual_score is not None:
                found[f"eval/{name}_pass1"] = call(actual_score, mine, texts).tolist()
            if name == "sampled":  # KL to π_SFT on samples that no filter has touched
                with accelerator.autocast():
                    logprobs, _ = response_logprobs_and_values(bare.policy, rollout, args.temperature, args.forward_batch_size)
                    ref, _ = response_logprobs_and_values(ref_policy, rollout, args.temperature, args.forward_batch_size)
                found["eval/kl"] = (logprobs - ref).sum(1).tolist()
            found[f"eval/{name}_length"] = rollout["response_mask"].sum(1).tolist()
            found[f"eval/{name}_truncated"] = (~rollout["has_stop"]).tolist()
        parts = gather_object([found])
        return {tag: float(np.mean([x for part in parts for x in part.get(tag, [])])) for tag in parts[0]}

    # ------------------------------------------------ Continue a killed run, or measure the reward on π_SFT first
    state = load_checkpoint(accelerator, output_dir / "checkpoints")
    if state is None:
        state = {"kl_coef": args.kl_coef, "optimizer_step": 0, "reward_mean": 0.0, "reward_std": 1.0, "filter": args.filter, "best": None}
        state["step"] = 0
        if args.normalize_reward or args.filter == "auto":
            count = math.ceil(args.normalize_samples / (args.num_responses * world))  # prompts per rank
            picks = prompt_order(len(rows), rank * count, count, args.seed + 1)
            batch_rows = [rows[i] for i in picks]
            rollout = sample(batch_rows, args.num_responses, args.temperature, random_generator(device, args.seed, 1, rank))
            texts = decode(rollout)
            scores = accelerator.gather(score(batch_rows, rollout, texts)).float()
            if args.normalize_reward:
                state["reward_mean"], state["reward_std"] = scores.mean().item(), scores.std().item()
                if not state["reward_std"] > 0:
                    raise ValueError(f"--normalize_reward: the reward's standard deviation on π_SFT samples is {state['reward_std']}; "
                                     "check --reward, or turn it off with --no-normalize_reward")  # fmt: skip
            if args.filter == "auto":
                actual = accelerator.gather(call(actual_score, batch_rows, texts)).cpu().numpy()
                ids = accelerator.gather(rollout["prompt_ids"]).cpu()
                generator, draws = random_generator("cpu", args.seed, 2), {}
                for name in AUTO:  # ten draws of each μ_θ
                    w, k = rank_weight_vector(name, args.num_responses), num_kept(args, name)
                    draws[name] = [filter_responses(scores.cpu(), ids, name, w, k, args.draw, generator) for _ in range(10)]
                draws = equal_rows(draws, generator)
                r2 = {name: float(np.mean([reward_r2(scores.cpu().numpy()[z], actual[z]) for z in zs])) for name, zs in draws.items()}
                state["filter"] = max(r2, key=lambda name: (not math.isnan(r2[name]), r2[name]))
                accelerator.print(f"filter auto: {state['filter']}, the highest R² of reward against actual score on "
                                  f"{len(scores)} π_SFT samples ({', '.join(f'{k} {v:.3f}' for k, v in r2.items())})")  # fmt: skip
    if args.filter == "auto":
        accelerator.print("\n".join(f"{name:>22}: {value}" for name, value in kept_sizes(args, state["filter"]).items()))
    filter_name, kept_per_prompt = state["filter"], num_kept(args, state["filter"])
    weights = list(args.rank_weights) or rank_weight_vector(filter_name, args.num_responses)
    filter_name = "own" if args.rank_weights else filter_name
    writer = open_metrics(output_dir, state["step"] or -1) if accelerator.is_main_process else None
    local_b, num_updates, run_start = sizes["local prompts"], sizes["updates"], time.time()

    def save_best(update: int, results: dict[str, float]) -> None:
        key = "eval/greedy_pass1" if "eval/greedy_pass1" in results else "eval/sampled_reward"
        if math.isfinite(results.get(key, math.nan)) and (state["best"] is None or results[key] > state["best"]):
            state["best"], state["best_update"] = results[key], update
            save_policy("policy_best")

    def save_policy(name: str) -> None:
        if accelerator.is_main_process:
            write_folder(output_dir / name, lambda folder: (bare.policy.save_pretrained(folder), tokenizer.save_pretrained(folder)))
        accelerator.wait_for_everyone()

    if state["step"] == 0 and eval_rows:
        results = evaluate(0)
        log_metrics(writer, output_dir, 0, results)
        save_best(0, results)
    bar = tqdm(total=num_updates, initial=state["step"], disable=not accelerator.is_main_process, desc="PPO updates", mininterval=5)
    for update in range(state["step"] + 1, num_updates + 1):
        clock = [time.time()]
        bare.eval()

        # ---------------- 1. take B prompts
        start = (update - 1) * args.batch_size + rank * local_b
        batch_rows = [rows[i] for i in prompt_order(len(rows), start, local_b, args.seed, args.reshuffle)]

        # ---------------- 2. draw N responses for each
        rollout = sample(batch_rows, args.num_responses, args.temperature, random_generator(device, args.seed, 3, update, rank))
        texts = decode(rollout)
        clock.append(time.time())

        # ---------------- 3. score them
        raw_scores = score(batch_rows, rollout, texts)  # (B*N,) R_φ
        scores = (raw_scores - state["reward_mean"]) / state["reward_std"]
        if args.missing_stop == "replace":  # LMHP train_policy.py: a fixed score where the stop token is missing
            scores = torch.where(rollout["has_stop"], scores, args.penalty_value)
        elif args.missing_stop == "subtract":
            scores = torch.where(rollout["has_stop"], scores, scores - args.penalty_value)
        rollout["scores"] = scores
        all_scores, all_shaped, all_ids, all_lengths, all_stop = accelerator.gather(
            (raw_scores, scores, rollout["prompt_ids"], rollout["response_mask"].sum(1), rollout["has_stop"]))  # fmt: skip
        clock.append(time.time())

        # ---------------- 4. filter: every rank sees all scores and draws the same z, then takes its own rows
        # DEPARTS PAPER's code, which draws minibatches with replacement, after whitening, by weights fixed for N = 5: here w is drawn
        # once per prompt for every N, ties in random order, before whitening, and every kept row is trained on exactly m times
        selected = filter_responses(
            all_scores.float().cpu(), all_ids.cpu(), filter_name, weights, kept_per_prompt, args.draw,
            random_generator("cpu", args.seed, 4, update), args.threshold_high, args.threshold_low, args.pow_k,
        )  # (K,)  # fmt: skip
        kept_total, first = len(selected), rank * local_b * args.num_responses
        local = selected[(selected >= first) & (selected < first + local_b * args.num_responses)].to(device) - first
        empty = len(local) == 0  # thresholds can leave a rank nothing: it goes along with one fully masked row
        kept = {name: tensor[local if not empty else torch.zeros(1, dtype=torch.long, device=device)] for name, tensor in rollout.items()}
        if empty:
            kept["response_mask"] = torch.zeros_like(kept["response_mask"])
        mask = kept["response_mask"]  # (K, R)
        assert empty or len(mask) == len(local), "every tensor of a row is filtered together"

        # ---------------- 5. log-probabilities, reference log-probabilities and values of the kept rows only
        with accelerator.autocast():
            kept["logprobs"], kept["values"] = response_logprobs_and_values(bare, kept, args.temperature, args.forward_batch_size)
            ref_logprobs, _ = response_logprobs_and_values(ref_policy, kept, args.temperature, args.forward_batch_size)  # (K, R)
        clock.append(time.time())

        # ---------------- 6. rewards per token (Eq. 4)
        rewards, non_score_reward, kl = cumulative_rewards(kept["scores"], kept["logprobs"], ref_logprobs, mask, state["kl_coef"])
        if args.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False, all_sum=statistics_sum)

        # ---------------- 7. advantages and returns (GAE)
        advantages, kept["returns"] = gae(rewards, kept["values"], mask, args.gamma, args.lam)
        # DEPARTS PAPER's code, which whitens per rank (--per_rank_statistics): one command is one algorithm on 1 or 8 GPUs
        kept["advantages"] = whiten(advantages, mask, all_sum=statistics_sum) if args.whiten_advantages else advantages
        assert kept["advantages"].shape == kept["returns"].shape == kept["logprobs"].shape == mask.shape

        # ---------------- 8. m epochs of clipped PPO on the kept rows (Eq. 5)
        bare.train()
        num_minibatches = max(1, round(kept_total / args.minibatch_size))
        for group, lr in zip(optimizer.param_groups, (args.lr, args.critic_lr if args.critic == "separate" else args.lr)):
            group["lr"] = scheduled_lr(lr, update - 1, num_updates, args.lr_schedule, args.warmup_updates)
        if update <= args.critic_warmup_updates:
            optimizer.param_groups[0]["lr"] = 0.0
        stats, norms, max_ratio = [], [], torch.zeros((), device=device)
        for epoch in range(args.noptepochs if kept_total else 0):
            order = torch.randperm(len(mask), generator=random_generator("cpu", args.seed, 5, update, epoch, rank)).to(device)
            for minibatch in order.tensor_split(num_minibatches):
                idle = len(minibatch) == 0  # a rank with fewer rows than minibatches goes along with one of weight 0
                minibatch = order[:1] if idle else minibatch
                kept["loss_weights"] = torch.zeros_like(kept["values"])
                kept["loss_weights"][minibatch] = loss_weights(
                    mask[minibatch] & (not idle), args.loss_average, statistics_sum, 1 if args.per_rank_statistics else world)  # fmt: skip
                parts, local_stats = micro_batches(kept, minibatch, args.micro_batch_size), torch.zeros(len(STATS), device=device)
                for i, part in enumerate(parts):
                    with nullcontext() if i == len(parts) - 1 else accelerator.no_sync(model), accelerator.autocast():
                        micro_batch = trim(kept, part)
                        loss, part_stats = minibatch_loss(
                            model, micro_batch, args.temperature, args.cliprange, args.cliprange_value, args.vf_coef)  # fmt: skip
                        accelerator.backward(loss)
                    local_stats += part_stats.detach()
                    max_ratio = torch.maximum(max_ratio, micro_batch["ratio"].max()) if not stats else max_ratio
                stats.append(accelerator.reduce(local_stats, "mean"))
                loss, norm = stats[-1][2].item(), float(accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm or math.inf))
                if not math.isfinite(loss if accelerator.scaler else loss + norm):  # fp16: a gradient may overflow, its step is skipped
                    raise FloatingPointError(f"update {update}, epoch {epoch}: the loss is {loss}, the gradient norm {norm}; the last good "
                                             f"checkpoint is kept in {output_dir / 'checkpoints'}. Lower --lr or --critic_lr")  # fmt: skip
                norms += [norm] if math.isfinite(norm) else []
                state["optimizer_step"] += 1
                for group in optimizer.param_groups:
                    group["eps"] = adam_epsilon(args.eps, args.adam_style, state["optimizer_step"])
                optimizer.step()
                optimizer.zero_grad()
        clock.append(time.time())

        # ---------------- Log, evaluate, save (numbers are means over all ranks before anything uses them)
        flat = torch.stack([mask.any(1).sum(), kl.sum(), -kept["logprobs"].sum(), non_score_reward.sum(),
                            (kept["scores"] * mask.any(1)).sum(), mask.sum(), kept["returns"].sum(), kept["values"].sum(),
                            kept["returns"].square().sum(), kept["values"].square().sum()])  # fmt: skip
        count, kl_sum, nll, nsr, score_sum, tokens, ret, val, ret2, val2 = (x for x in all_sum(flat.double()).tolist())
        metrics = {
            "objective/kl_coef": state["kl_coef"], "objective/score": all_scores.mean().item(), "objective/shaped_score": all_shaped.mean().item(),
            "objective/length": all_lengths.float().mean().item(), "objective/truncated": (~all_stop).float().mean().item(),
            "filter/kept": kept_total, "filter/distinct": len(selected.unique()), "ppo/lr": optimizer.param_groups[0]["lr"],
            "ppo/episode": update * sizes["responses per update"], "ppo/optimizer_step": state["optimizer_step"],
        }  # fmt: skip
        if kept_total:  # thresholds can leave nothing to take a mean of; 0 would pass for a KL of 0
            metrics.update({
                "objective/kl": kl_sum / count, "objective/entropy": nll / count, "objective/score_total": (score_sum + nsr) / count,
                "objective/non_score_reward": nsr / count, "filter/score": all_scores.cpu()[selected].mean().item(),
                "filter/score_std": all_scores.cpu()[selected].std().item() if kept_total > 1 else 0.0,
                "filter/length": all_lengths.cpu()[selected].float().mean().item(),
                "ppo/returns/mean": ret / tokens, "ppo/returns/var": (ret2 - ret**2 / tokens) / max(tokens - 1, 1),
                "ppo/val/mean": val / tokens, "ppo/val/var": (val2 - val**2 / tokens) / max(tokens - 1, 1),
            })  # fmt: skip
            metrics.update(zip(STATS, torch.stack(stats).mean(0).tolist()))
            metrics.update({"ppo/grad_norm": float(np.mean(norms))} if norms else {})  # before clipping; none: fp16 skipped every step
            metrics["ppo/policy/first_ratio"] = stats[0][STATS.index("ppo/policy/ratio")].item()  # 1: nothing has moved yet
            metrics["ppo/policy/first_ratio_max"] = accelerator.gather(max_ratio.view(1)).max().item()  # no mean to hide behind
        if monitor is not None:
            shares = gather_object([monitor(texts)])
            metrics.update({f"monitor/{k}": float(np.mean([part[k] for part in shares])) for k in shares[0]})
        if args.adaptive_kl and kept_total:
            state["kl_coef"] = next_kl_coef(state["kl_coef"], metrics["objective/kl"], args.kl_target, args.kl_horizon, sizes["responses per update"])
        if eval_rows and (update % args.eval_every == 0 or update == num_updates):
            results = evaluate(update)
            metrics.update(results)
            save_best(update, results)
        clock.append(time.time())
        metrics.update(zip(("seconds/generate", "seconds/score", "seconds/logprobs", "seconds/train", "seconds/evaluate"), np.diff(clock).tolist()))
        metrics["seconds/update"] = clock[4] - clock[0]
        log_metrics(writer, output_dir, update, metrics)
        shown = {"score": "objective/score", "kept": "filter/score", "kl": "objective/kl", "loss": "ppo/loss/total", "pass@1": "eval/greedy_pass1"}
        bar.update()
        if accelerator.is_main_process:
            bar.write(f"update {update}/{num_updates}  " + "  ".join(f"{k} {metrics[t]:.3f}" for k, t in shown.items() if t in metrics)
                      + f"  {metrics['seconds/update']:.1f} s")  # fmt: skip
            if args.print_samples_every and update % args.print_samples_every == 0:
                line = {"step": update, "prompt": batch_rows[0][args.prompt_field], "response": texts[0], "score": raw_scores[0].item()}
                with (output_dir / "samples.jsonl").open("a") as file:
                    file.write(json.dumps(line) + "\n")
                bar.write(f"{line['prompt']}{line['response']}\n[score {line['score']:.3f}]")
        if args.save_policy_every and update % args.save_policy_every == 0:
            save_policy(f"policy_{update}")
        if update % args.checkpoint_every == 0 or update == num_updates:
            save_checkpoint(accelerator, output_dir / "checkpoints", update, state)
    save_policy("policy")
    accelerator.print(f"done: {num_updates} updates, {time.time() - run_start:.0f} s in this process; policy in {output_dir / 'policy'}")


def parse_args(argv: list[str] | None = None) -> Args:
    """Flags over the preset's values over the defaults."""
    argv = sys.argv[1:] if argv is None else argv
    words = [word for flag in argv for word in (flag.split("=", 1) if flag.startswith("--preset=") else [flag])]
    name = dict(zip(words, words[1:])).get("--preset", "pfppo")
    return tyro.cli(Args, args=argv, default=Args(preset=name, **PRESETS[name]) if name in PRESETS else None)


if __name__ == "__main__":
    main(parse_args())
