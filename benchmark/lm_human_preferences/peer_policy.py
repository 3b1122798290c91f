"""lm-human-preference-details' policy stage, written a second time and on its own: more seeds of the recorded
curves.

    python -m benchmark.lm_human_preferences.peer_policy --world WORLD --seed 11 --output_dir DIR

Ten recorded seeds are few. This loop draws its random numbers in the recorded runs' order (weights, shuffled
queries, sampling by transformers' `generate`, one permutation per epoch), so with --seed 1 it repeats the
recorded seed 1, which a test checks; other seeds are further runs of the same thing. It shares no line with
pfppo_single.py and follows the steady setting alone: one process, one minibatch, a value head on the policy's
trunk. `metrics.jsonl` has the tags of pfppo_single.py.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from datasets import load_dataset
from safetensors.torch import load_file
from torch.nn.functional import log_softmax
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig


@dataclass
class Args:
    world: str
    """folder of the recorded world: model/, queries.jsonl, reward_model.safetensors"""
    output_dir: str
    """where metrics.jsonl goes"""
    seed: int = 1
    """random seed; 1 to 10 are recorded"""
    updates: int = 120
    """updates to run; the learning rate always falls to zero at 120"""


RESPONSE_LENGTH, BATCH, EPOCHS, TOTAL = 24, 64, 4, 120
TEMPERATURE, LR, EPS, VF_COEF, CLIP, LAM = 0.7, 2.5e-4, 1e-5, 0.1, 0.2, 0.95
STOP_TOKEN, STOP_AFTER, NO_STOP_SCORE = 4, 16, -1.0
KL_COEF, KL_TARGET, KL_HORIZON = 0.15, 3, 2000


class ModelWithHead(torch.nn.Module):
    """A causal model and a scalar head on its last hidden states."""

    def __init__(self, backbone, std: float):
        super().__init__()
        self.lm_backbone, self.scalar_head = backbone, torch.nn.Linear(backbone.config.hidden_size, 1)
        torch.nn.init.normal_(self.scalar_head.weight, std=std)
        torch.nn.init.zeros_(self.scalar_head.bias)

    def forward(self, ids: torch.Tensor, pad: int) -> tuple[torch.Tensor, torch.Tensor]:
        """ids (B, T) -> logits (B, T, V), scalars (B, T). Pads are fed as token 0, masked, and not counted by
        positions."""
        real = ids != pad
        output = self.lm_backbone(
            input_ids=ids.masked_fill(~real, 0),
            attention_mask=real,
            position_ids=real.cumsum(1) - real.long(),
            output_hidden_states=True,
        )
        return output.logits, self.scalar_head(output.hidden_states[-1]).squeeze(-1)


def pads_to_the_left(ids: torch.Tensor, pad: int) -> torch.Tensor:
    return torch.stack([torch.cat([row[row == pad], row[row != pad]]) for row in ids])


def whiten(x: torch.Tensor, shift_mean: bool) -> torch.Tensor:
    mean = x.mean()
    white = (x - mean) * torch.rsqrt(x.var(unbiased=False) + 1e-8)
    return white if shift_mean else white + mean


def logprobs_and_values(model, query_responses: torch.Tensor, width: int, pad: int):
    """query_responses (B, width + R) -> log-probabilities and values of the R response tokens (B, R)."""
    logits, values = model(query_responses, pad)
    logprobs = log_softmax(logits[:, width - 1 : -1] / TEMPERATURE, -1)
    logprobs = logprobs.gather(2, query_responses[:, width:].unsqueeze(-1)).squeeze(-1)
    return logprobs, values[:, width - 1 : -1]


def tensorflow_adam(parameters, gradients, first, second, lr: float, step: int) -> None:
    """Adam whose epsilon is added before the bias correction of the second moment, as TensorFlow's."""
    lr = lr * np.sqrt(1 - 0.999**step) / (1 - 0.9**step)
    for p, g, m, v in zip(parameters, gradients, first, second):
        if g is not None:
            m.mul_(0.9).add_(g, alpha=0.1)
            v.mul_(0.999).addcmul_(g, g, value=0.001)
            p.addcdiv_(m, v.sqrt().add_(EPS), value=-lr)


def main(args: Args) -> None:
    world, out = Path(args.world), Path(args.output_dir)
    random.seed(args.seed), np.random.seed(args.seed), torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(world / "model", padding_side="right")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    pad = tokenizer.pad_token_id
    # In this order: heads draw numbers.
    reward_model, ref_policy, policy = (
        ModelWithHead(AutoModelForCausalLM.from_pretrained(world / "model"), std) for std in (1.0, 0.0, 0.0)
    )
    weights = load_file(world / "reward_model.safetensors")
    gain, bias = weights.pop("reward_gain"), weights.pop("reward_bias")
    reward_model.load_state_dict(weights, strict=False)  # the output layer, which nobody reads, is tied
    own = policy.lm_backbone.generation_config
    own.eos_token_id = own.pad_token_id = None
    lengths = dict(max_new_tokens=RESPONSE_LENGTH, min_new_tokens=RESPONSE_LENGTH)
    sampling = GenerationConfig(**lengths, temperature=TEMPERATURE, top_k=0.0, top_p=1.0, do_sample=True)
    rows = load_dataset("json", data_files=str(world / "queries.jsonl"), split="train")
    texts = list(rows.shuffle(seed=args.seed)["text"])
    cut = dict(padding="max_length", max_length=RESPONSE_LENGTH, truncation=True, return_tensors="pt")
    queries = tokenizer(texts, **cut)["input_ids"]

    parameters, step, kl_coef = list(policy.parameters()), 0, KL_COEF
    first, second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    out.mkdir(parents=True, exist_ok=True)
    with (out / "metrics.jsonl").open("w") as file:
        for update in tqdm(range(1, args.updates + 1), desc="updates", mininterval=5):
            lr, start = (1 - (update - 1) / TOTAL) * LR, (update - 1) * BATCH % len(queries)
            if start == 0:  # a data loader draws its seed when a pass begins
                torch.empty((), dtype=torch.int64).random_()
            with torch.no_grad():
                q = pads_to_the_left(queries[start : start + BATCH], pad)
                real, width = q != pad, q.shape[1]
                inputs = dict(input_ids=q.masked_fill(~real, 0), attention_mask=real)
                sequences = policy.lm_backbone.generate(**inputs, generation_config=sampling)
                responses = sequences[:, width:]
                query_responses = torch.cat([q, responses], 1)
                logprobs, values = logprobs_and_values(policy, query_responses, width, pad)
                ref_logprobs, _ = logprobs_and_values(ref_policy, query_responses, width, pad)
                stop = responses == STOP_TOKEN
                stop[:, :STOP_AFTER] = False
                shown = responses.masked_fill((stop.cumsum(1) - stop.long()) > 0, pad)
                read = pads_to_the_left(torch.cat([q, shown], 1), pad)
                scores = gain * reward_model(read, pad)[1][:, -1] + bias
                scores = torch.where(stop.any(1), scores, NO_STOP_SCORE)
                kl = logprobs - ref_logprobs
                rewards = -kl_coef * kl
                rewards[:, -1] += scores
                rewards = whiten(rewards, shift_mean=False)
                advantages, last = torch.zeros_like(rewards), 0.0
                for t in reversed(range(RESPONSE_LENGTH)):
                    following = values[:, t + 1] if t + 1 < RESPONSE_LENGTH else 0.0
                    advantages[:, t] = last = rewards[:, t] + following - values[:, t] + LAM * last
                returns, advantages = advantages + values, whiten(advantages, shift_mean=True)

            value_losses = []
            for _ in range(EPOCHS):
                rows = torch.from_numpy(np.random.permutation(BATCH))
                new_logprobs, new_values = logprobs_and_values(policy, query_responses[rows], width, pad)
                clipped = torch.clamp(new_values, values[rows] - CLIP, values[rows] + CLIP)
                errors, clipped_errors = (new_values - returns[rows]) ** 2, (clipped - returns[rows]) ** 2
                value_loss = 0.5 * torch.max(errors, clipped_errors).mean()
                ratio, gains = (new_logprobs - logprobs[rows]).exp(), -advantages[rows]
                policy_loss = torch.max(gains * ratio, gains * ratio.clamp(1 - CLIP, 1 + CLIP)).mean()
                loss, step = policy_loss + VF_COEF * value_loss, step + 1
                gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
                with torch.no_grad():
                    tensorflow_adam(parameters, gradients, first, second, lr, step)
                value_losses.append(value_loss.item())
            kl_mean = kl.sum(1).mean().item()
            metrics = {"step": update, "objective/shaped_score": scores.mean().item()}
            metrics |= {"objective/kl": kl_mean, "objective/kl_coef": kl_coef}
            metrics["objective/entropy"] = -logprobs.sum(1).mean().item()
            metrics["objective/non_score_reward"] = -kl_coef * kl_mean
            metrics["ppo/loss/value"] = float(np.mean(value_losses))
            metrics |= {"ppo/returns/mean": returns.mean().item(), "ppo/returns/var": returns.var().item()}
            metrics["ppo/val/var"] = values.var().item()
            file.write(json.dumps(metrics) + "\n")
            file.flush()
            kl_coef *= 1 + float(np.clip(kl_mean / KL_TARGET - 1, -0.2, 0.2)) * BATCH / KL_HORIZON


if __name__ == "__main__":
    main(tyro.cli(Args, use_underscores=True))
