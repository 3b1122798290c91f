"""KTO: responses marked desirable or not, without pairing; each is compared with a running estimate of the KL
divergence.

  1. take the next batch of responses, chosen and rejected ones mixed
  2. KL estimate z: mean log-ratio of the batch's responses to other prompts of the batch, without gradient,
     at least 0
  3. one optimizer step on 1 - σ(β(r - z)) for the chosen and 1 - σ(β(z - r)) for the rejected,
     r = log π_θ - log π_SFT

Run:  python -m benchmark.baselines.kto --policy sft/model --train_data preferences.jsonl --output_dir kto/ \\
          --eval_data held_out.jsonl
In:   rows prompt, chosen, rejected, the file of DPO; its two responses are never compared with each other.
Out:  policy, policy_best, metrics.jsonl, checkpoints; the same command continues.

Source: KTO arXiv 2402.01306 Eq. 8. Defaults: README.md beside this file.
"""

from dataclasses import dataclass

import torch
import tyro
from torch import Tensor

import pfppo_single as pfppo
from benchmark.baselines import common
from pfppo_single import Amount, Count, Positive


@dataclass(kw_only=True)
class Args(common.PairArgs):
    beta: Positive = 0.1
    """β: how fast the value of a response saturates"""
    desirable_weight: Amount = 1.0
    """λ_D: weight of the chosen responses"""
    undesirable_weight: Amount = 1.0
    """λ_U: weight of the rejected responses"""
    epochs: Count = 1
    """passes over the responses"""
    batch_size: Count = 128
    """responses per optimizer step; the KL estimate is over all of them"""
    lr: Amount = 1e-4
    """learning rate"""
    eval_every: Count = 10
    """optimizer steps between evaluations"""
    checkpoint_every: Count = 20
    """optimizer steps between checkpoints"""


def mismatched_rows(prompt_ids: Tensor) -> Tensor:
    """prompt_ids (rows,) -> a permutation (rows,): row i gets the response of row [i], which belongs to
    another prompt. Refuses a batch of which one prompt has more than half."""
    # rows of a prompt become adjacent: a shift by the longest run leaves every prompt
    order, shift = prompt_ids.argsort(stable=True), int(prompt_ids.unique(return_counts=True)[1].max())
    batch = f"one prompt has {shift} of a batch's {len(order)} responses"
    pfppo.refuse((2 * shift > len(order), f"{batch}: they cannot all be mismatched; raise --batch_size"))
    other = torch.empty_like(order)
    other[order] = order.roll(shift)
    return other


def shifted_kl(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log π_θ and log π_SFT (rows,) of mismatched responses -> z (): mean log-ratio, at least 0, no
    gradient."""
    return (logprobs - ref_logprobs).mean().clamp(min=0).detach()


def kto_loss(
    logratios: Tensor,
    is_chosen: Tensor,
    kl: Tensor,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> Tensor:
    """logratios, is_chosen (rows,), kl () -> λ - λσ(± β(r - z)) per response (rows,)."""
    sign = torch.where(is_chosen, 1.0, -1.0)
    weight = torch.where(is_chosen, desirable_weight, undesirable_weight)
    return weight * (1 - torch.sigmoid(sign * beta * (logratios - kl)))


def main(args: Args) -> None:
    run = common.Run(args)
    pairs = common.read_pairs(args, run.tokenizer, run.config, run.stop_id)
    num_steps = max(1, args.epochs * 2 * len(pairs) // args.batch_size)
    rollout = common.pair_rollout(pairs, run.device)  # (2P, ...)
    is_chosen = torch.arange(2 * len(pairs), device=run.device) < len(pairs)
    queries = [tuple(pair["query"]) for pair in pairs] * 2  # a prompt may have several pairs
    numbers = {query: number for number, query in enumerate(dict.fromkeys(queries))}
    prompt_ids = torch.tensor([numbers[query] for query in queries], device=run.device)
    order = common.pass_order(2 * len(pairs), num_steps, args.batch_size, args.seed, "response")
    batches = torch.tensor(order, device=run.device).split(args.batch_size)
    others = [mismatched_rows(prompt_ids[batch]) for batch in batches]  # refused here, before training
    if args.dry_run:
        return
    run.start(num_steps, num_steps)
    ref_logprobs = run.logprobs(run.ref_policy, rollout)  # (2P,)

    for step in range(run.state["step"], num_steps):
        # ---------------- 1. the next batch of responses
        rows = batches[step]

        # ---------------- 2. KL estimate on mismatched pairs of the whole batch
        mismatched = {name: rollout[name][rows] for name in ("queries", "query_mask")}
        for name in ("responses", "response_mask", "score_mask"):
            mismatched[name] = rollout[name][rows][others[step]]
        kl = shifted_kl(run.logprobs(run.policy, mismatched), run.logprobs(run.ref_policy, mismatched))

        # ---------------- 3. one optimizer step
        weights = (args.desirable_weight, args.undesirable_weight)
        total, chosen_sum, rejected_sum = 0.0, 0.0, 0.0
        for part in rows.split(args.micro_batch_size):
            logprobs = common.sequence_logprobs(run.policy, rollout, part, args.temperature)
            logratios = logprobs - ref_logprobs[part]
            losses = kto_loss(logratios, is_chosen[part], kl, args.beta, *weights)
            run.accelerator.backward(losses.sum() / len(rows))
            total += losses.sum().item() / len(rows)
            chosen_sum += logratios[is_chosen[part]].sum().item()
            rejected_sum += logratios[~is_chosen[part]].sum().item()
        run.optimizer_step(total)
        chosen = int(is_chosen[rows].sum())
        metrics = {"train/loss": total, "train/kl": kl.item()}
        metrics["train/chosen_logratio"] = chosen_sum / max(1, chosen)
        metrics["train/rejected_logratio"] = rejected_sum / max(1, len(rows) - chosen)
        run.end_step(metrics)
    run.finish()


if __name__ == "__main__":
    main(tyro.cli(Args, use_underscores=True))
