"""A tiny recorded world on a Llama, by a plain second implementation: python
tests/lm_human_preferences/make_llama_world.py FOLDER

The files have the form that benchmark/compare_reference.py reads. Nothing is imported from the scripts under
test: the algorithm is written once more, in the most direct way and from its description (padding by moving
ids, full log-softmax, Adam with TensorFlow's epsilon spelled out), so that both would have to make the same
mistake. Rotary positions, grouped heads, an untied output layer, queries of 3 to 16 tokens, two minibatches,
and sizes that differ from every default.
"""

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

R, STOP, AFTER, PENALTY, TEMPERATURE = 16, 7, 9, -2, 0.9
B, MINIBATCHES, EPOCHS, UPDATES, LATE = 16, 2, 2, 8, 4  # of 8 updates 1, 2 and 4 are recorded
LR, EPS, KL_COEF, TARGET, HORIZON, GAMMA, LAM, VF_COEF, CLIP, CLIP_VALUE = (
    2e-3,
    1e-5,
    0.1,
    0.5,
    300,
    0.99,
    0.9,
    0.2,
    0.1,
    0.15,
)
LABELS, NUM_TRAIN, LABEL_BATCH, LABEL_LR, LABEL_QUERY, LABEL_PAD, SAMPLES = 72, 64, 8, 1e-3, 14, 50259, 48
HYPERPARAMETERS = {
    "reward": {
        "local_batch_size": LABEL_BATCH,
        "lr": LABEL_LR,
        "local_normalize_samples": SAMPLES,
        "local_rollout_batch_size": SAMPLES,
        "labels": {"num_train": NUM_TRAIN},
        "task": {"response_length": R, "temperature": TEMPERATURE},
    },
    "policy": {
        "task": {
            "response_length": R,
            "truncate_token": STOP,
            "truncate_after": AFTER,
            "penalty_reward_value": PENALTY,
            "temperature": TEMPERATURE,
        },
        "rewards": {"kl_coef": KL_COEF, "adaptive_kl": {"target": TARGET, "horizon": HORIZON}},
        "ppo": {
            "total_episodes": UPDATES * B,
            "local_batch_size": B,
            "nminibatches": MINIBATCHES,
            "noptepochs": EPOCHS,
            "lr": LR,
            "gamma": GAMMA,
            "lam": LAM,
            "vf_coef": VF_COEF,
            "cliprange": CLIP,
            "cliprange_value": CLIP_VALUE,
        },
    },
}


class WithHead(nn.Module):
    """A whole causal language model and one output of width 1."""

    def __init__(self, lm_backbone: nn.Module, std: float, gain: bool):
        super().__init__()
        self.lm_backbone = lm_backbone
        self.scalar_head = nn.Linear(lm_backbone.config.hidden_size, 1)
        nn.init.normal_(self.scalar_head.weight, std=std), nn.init.zeros_(self.scalar_head.bias)
        if gain:
            self.reward_gain, self.reward_bias = (
                nn.Parameter(torch.tensor(1.0)),
                nn.Parameter(torch.tensor(0.0)),
            )


class Adam:
    """TensorFlow's Adam: epsilon beside sqrt(v), both bias corrections in the step size."""

    def __init__(self, model: nn.Module):
        self.params, self.step = dict(model.named_parameters()), 0
        self.m = {name: torch.zeros_like(p) for name, p in self.params.items()}
        self.v = {name: torch.zeros_like(p) for name, p in self.params.items()}

    @torch.no_grad()
    def update(self, lr: float) -> None:
        self.step += 1
        size = lr * (1 - 0.999**self.step) ** 0.5 / (1 - 0.9**self.step)
        for name, p in self.params.items():
            if p.grad is not None:
                self.m[name].mul_(0.9).add_(p.grad, alpha=0.1)
                self.v[name].mul_(0.999).addcmul_(p.grad, p.grad, value=0.001)
                p.sub_(size * self.m[name] / (self.v[name].sqrt() + EPS))
            p.grad = None


def forward(model: WithHead, ids: torch.Tensor, pad: int):
    real = ids != pad
    positions = real.long().cumsum(1) - real.long()
    output = model.lm_backbone(
        input_ids=torch.where(real, ids, 0),
        attention_mask=real.long(),
        position_ids=positions,
        output_hidden_states=True,
    )
    return output.logits, model.scalar_head(output.hidden_states[-1]).squeeze(-1)


def to_left(ids: torch.Tensor, pad: int) -> torch.Tensor:
    return torch.stack([torch.cat([row[row == pad], row[row != pad]]) for row in ids])


def chosen_logprobs(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    logprobs = F.log_softmax(logits[:, -R - 1 : -1] / TEMPERATURE, -1)
    return logprobs.gather(2, ids[:, -R:].unsqueeze(2)).squeeze(2)


@torch.no_grad()
def sample(model: WithHead, queries: torch.Tensor, pad: int, generator: torch.Generator) -> torch.Tensor:
    ids = queries
    for _ in range(R):
        logits, _ = forward(model, ids, pad)
        ids = torch.cat(
            [ids, torch.multinomial((logits[:, -1] / TEMPERATURE).softmax(-1), 1, generator=generator)], 1
        )
    return ids


def reward(model: WithHead, ids: torch.Tensor, pad: int) -> torch.Tensor:
    return model.reward_gain * forward(model, ids, pad)[1][:, -1] + model.reward_bias


def whiten(x: torch.Tensor, shift_mean: bool) -> torch.Tensor:
    scaled = (x - x.mean()) / torch.sqrt(x.var(unbiased=False) + 1e-8)
    return scaled if shift_mean else scaled + x.mean()


def weights(model: nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    return {f"{prefix}/{name}": p.detach().clone() for name, p in model.named_parameters()}


def gradients(model: nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    return {f"{prefix}/{name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def grad_norm(model: nn.Module) -> torch.Tensor:
    return sum(p.grad.double().square().sum() for p in model.parameters() if p.grad is not None).sqrt()


def make_world(folder: Path) -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {f"w{i}": i for i in range(38)} | {"[UNK]": 38, "<|endoftext|>": 39}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pad = len(vocabulary)
    config = LlamaConfig(
        vocab_size=pad,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        initializer_range=0.15,
        bos_token_id=39,
        eos_token_id=39,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="<|endoftext|>", bos_token="<|endoftext|>"
    ).save_pretrained(folder / "model")

    def new_model(std: float, gain: bool) -> WithHead:
        return WithHead(
            LlamaForCausalLM.from_pretrained(folder / "model", dtype=torch.float32), std, gain
        ).eval()

    def integers(low: int, high: int, count: int) -> list[int]:
        return torch.randint(low, high, (count,), generator=generator).tolist()

    texts = [integers(0, 38, n) for n in integers(3, 20, 80)]
    (folder / "queries.jsonl").write_text(
        "".join(json.dumps({"text": " ".join(f"w{i}" for i in row)}) + "\n" for row in texts)
    )
    (folder / "hyperparameters.json").write_text(json.dumps(HYPERPARAMETERS))
    cut = torch.tensor(
        [[pad] * (R - len(row)) + row[:R] for row in texts]
    )  # cut at the response length, padded left

    def batch_of_queries(count: int) -> torch.Tensor:
        return cut[torch.randperm(len(cut), generator=generator)[:count]]

    # ---- labels: responses cut behind the first stop token at index >= AFTER, padded right; the best is
    # drawn at random
    labels = []
    for n in integers(3, LABEL_QUERY + 1, LABELS):
        row = {"query": [LABEL_PAD] * (LABEL_QUERY - n) + integers(0, 38, n), "best": integers(0, 4, 1)[0]}
        for k in range(4):
            ids = integers(0, 12, R)
            end = next((i + 1 for i in range(AFTER, R) if ids[i] == STOP), R)
            row[f"sample{k}"] = ids[:end] + [LABEL_PAD] * (R - end)
        labels.append(row)
    (folder / "labels.json").write_text(json.dumps(labels))

    # ---- reward stage
    trace, ref = {}, new_model(0.0, False)
    reward_model = new_model(33**-0.5, True)
    adam = Adam(reward_model)

    @torch.no_grad()
    def normalize(name: str) -> None:
        reward_model.reward_gain.fill_(1.0), reward_model.reward_bias.fill_(0.0)
        ids = sample(ref, batch_of_queries(SAMPLES), pad, generator)
        rewards = reward(reward_model, ids, pad)
        mean, std = rewards.mean(), rewards.std()
        reward_model.reward_gain.copy_(1 / std), reward_model.reward_bias.copy_(-mean / std)
        check = reward(reward_model, sample(ref, batch_of_queries(SAMPLES), pad, generator), pad)
        trace.update(
            {
                f"{name}/{key}": value.detach().clone()
                for key, value in {
                    "query_responses": ids,
                    "rewards": rewards,
                    "mean": mean,
                    "std": std,
                    "gain": reward_model.reward_gain,
                    "bias": reward_model.reward_bias,
                    "check_mean": check.mean(),
                    "check_std": check.std(),
                }.items()
            }
        )

    normalize("normalize_before")
    trace.update(weights(reward_model, "weights/before_step_1"))
    permutation = torch.randperm(NUM_TRAIN, generator=generator)
    trace["labels/permutation"] = permutation
    for step in range(1, NUM_TRAIN // LABEL_BATCH + 1):
        indices = permutation[(step - 1) * LABEL_BATCH : step * LABEL_BATCH]
        rows = [labels[i] for i in indices]
        columns = {
            name: torch.tensor([row[name] for row in rows])
            for name in ("query", "sample0", "sample1", "sample2", "sample3", "best")
        }
        columns = {name: torch.where(ids == LABEL_PAD, pad, ids) for name, ids in columns.items()}
        predicted = torch.stack(
            [
                reward(
                    reward_model, to_left(torch.cat([columns["query"], columns[f"sample{k}"]], 1), pad), pad
                )
                for k in range(4)
            ],
            1,
        )
        loss = F.cross_entropy(predicted, columns["best"])
        loss.backward()
        lr = LABEL_LR * (1 - (step - 1) * LABEL_BATCH / NUM_TRAIN)
        if step <= 5:
            trace.update({f"step_{step}/{name}": value for name, value in columns.items()})
            trace.update(
                {
                    f"step_{step}/{name}": value.detach()
                    for name, value in {
                        "indices": indices,
                        "predicted_rewards": predicted,
                        "loss": loss,
                        "grad_norm": grad_norm(reward_model),
                        "accuracy": (predicted.argmax(1) == columns["best"]).float().mean(),
                        "lr": torch.tensor(lr, dtype=torch.double),
                    }.items()
                }
            )
        if step == 1:
            trace.update(gradients(reward_model, "step_1/grad"))
        adam.update(lr)
        if step in (1, 5):
            trace.update(weights(reward_model, f"weights/after_step_{step}"))
    normalize("normalize_after")
    trace.update(weights(reward_model, "weights/final"))
    save_file({key: t.clone() for key, t in trace.items()}, folder / "trace_reward.safetensors")
    save_file(
        {name: p.detach().clone() for name, p in reward_model.named_parameters()},
        folder / "reward_model.safetensors",
    )

    # ---- policy stage
    policy, kl_coef = new_model(0.0, False), KL_COEF
    adam = Adam(policy)
    first, late = weights(policy, "policy_weights/before_update_1"), {}
    for update in range(1, LATE + 1):
        trace = first if update <= 2 else late if update == LATE else {}
        if update == LATE:
            trace.update(weights(policy, f"policy_weights/before_update_{update}"))
            for name in adam.params:
                trace.update(
                    {
                        f"adam/exp_avg/{name}": adam.m[name].clone(),
                        f"adam/exp_avg_sq/{name}": adam.v[name].clone(),
                        f"adam/step/{name}": torch.tensor(float(adam.step)),
                    }
                )
        key = f"update_{update}"
        lr = LR * (1 - (update - 1) / UPDATES)
        with torch.no_grad():
            queries = batch_of_queries(B)
            ids = sample(policy, queries, pad, generator)
            responses = ids[:, R:]
            logits, values = forward(policy, ids, pad)
            values, logprobs = values[:, -R - 1 : -1], chosen_logprobs(logits, ids)
            ref_logprobs = chosen_logprobs(forward(ref, ids, pad)[0], ids)
            ends = [
                next((i + 1 for i in range(AFTER, R) if row[i] == STOP), None) for row in responses.tolist()
            ]
            cut_responses = torch.stack(
                [
                    torch.cat([row[:end], torch.full((R - (end or R),), pad)])
                    for row, end in zip(responses, ends)
                ]
            )
            cut_ids = to_left(torch.cat([queries, cut_responses], 1), pad)
            raw_scores = reward(reward_model, cut_ids, pad)
            scores = torch.where(torch.tensor([end is not None for end in ends]), raw_scores, float(PENALTY))
            kl = logprobs - ref_logprobs
            non_score_reward = -kl_coef * kl
            rewards = non_score_reward.clone()
            rewards[:, -1] += scores
            whitened = whiten(rewards, shift_mean=False)
            advantages, last = torch.zeros_like(values), torch.zeros(B)
            for t in range(R - 1, -1, -1):
                following = values[:, t + 1] if t + 1 < R else 0.0
                last = whitened[:, t] + GAMMA * following - values[:, t] + GAMMA * LAM * last
                advantages[:, t] = last
            returns = advantages + values
            advantages = whiten(advantages, shift_mean=True)
            kl_after = kl_coef * (1 + min(max(kl.sum(1).mean().item() / TARGET - 1, -0.2), 0.2) * B / HORIZON)
        trace.update(
            {
                f"{key}/{name}": value.clone()
                for name, value in {
                    "queries": queries,
                    "query_responses": ids,
                    "responses": responses,
                    "postprocessed_responses": cut_responses,
                    "postprocessed_query_responses": cut_ids,
                    "logprobs": logprobs,
                    "ref_logprobs": ref_logprobs,
                    "values": values,
                    "raw_scores": raw_scores,
                    "scores": scores,
                    "kl": kl,
                    "non_score_reward": non_score_reward,
                    "rewards_before_whitening": rewards,
                    "rewards_after_whitening": whitened,
                    "advantages": advantages,
                    "returns": returns,
                    "lr": torch.tensor(lr, dtype=torch.double),
                    "kl_coef": torch.tensor(kl_coef, dtype=torch.double),
                    "kl_coef_after": torch.tensor(kl_after, dtype=torch.double),
                }.items()
            }
        )
        kl_coef = kl_after
        for epoch in range(EPOCHS):
            for minibatch, rows in enumerate(torch.randperm(B, generator=generator).chunk(MINIBATCHES)):
                logits, vpred = forward(policy, ids[rows], pad)
                vpred, new_logprobs = vpred[:, -R - 1 : -1], chosen_logprobs(logits, ids[rows])
                clipped = torch.minimum(
                    torch.maximum(vpred, values[rows] - CLIP_VALUE), values[rows] + CLIP_VALUE
                )
                errors, clipped_errors = (vpred - returns[rows]) ** 2, (clipped - returns[rows]) ** 2
                vf_loss = 0.5 * torch.maximum(errors, clipped_errors).mean()
                ratio = torch.exp(new_logprobs - logprobs[rows])
                gains, clipped_gains = (
                    -advantages[rows] * ratio,
                    -advantages[rows] * ratio.clamp(1 - CLIP, 1 + CLIP),
                )
                pg_loss = torch.maximum(gains, clipped_gains).mean()
                loss = pg_loss + VF_COEF * vf_loss
                loss.backward()
                scaled = logits[:, -R - 1 : -1] / TEMPERATURE
                entropy = (scaled.logsumexp(-1) - (scaled.softmax(-1) * scaled).sum(-1)).mean()
                prefix = f"{key}/epoch_{epoch}/minibatch_{minibatch}"
                trace.update(
                    {
                        f"{prefix}/{name}": value.detach().clone()
                        for name, value in {
                            "indices": rows,
                            "pg_loss": pg_loss,
                            "vf_loss": vf_loss,
                            "loss": loss,
                            "entropy": entropy,
                            "ratio_mean": ratio.mean(),
                            "clipfrac": (clipped_gains > gains).float().mean(),
                            "vf_clipfrac": (clipped_errors > errors).float().mean(),
                            "approxkl": 0.5 * (new_logprobs - logprobs[rows]).square().mean(),
                            "new_logprobs": new_logprobs,
                            "vpred": vpred,
                            "grad_norm": grad_norm(policy),
                        }.items()
                    }
                )
                if epoch == minibatch == 0 and update in (1, LATE):
                    trace.update(gradients(policy, f"{prefix}/grad"))
                adam.update(lr)
        trace.update(weights(policy, f"policy_weights/after_update_{update}"))
    save_file({key: t.clone() for key, t in first.items()}, folder / "trace_policy.safetensors")
    save_file({key: t.clone() for key, t in late.items()}, folder / "trace_policy_late.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    make_world(Path(sys.argv[1]))
