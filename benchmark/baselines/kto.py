"""KTO: responses marked desirable or not, without pairing; each is compared with a running estimate of the KL
divergence.

  1. take the next batch of responses, chosen and rejected ones mixed
  2. KL estimate z: mean log-ratio of the batch's responses to other prompts of the batch, without gradient,
     at least 0
  3. one optimizer step on 1 - σ(β(r - z)) for the chosen and 1 - σ(β(z - r)) for the rejected,
     r = log π_θ - log π_SFT

Run:  python -m benchmark.baselines.kto --policy sft/model --train_data preferences.jsonl --output_dir kto/ \\
          --eval_prompts valid.jsonl --actual_score benchmark.minicode:oracle
In:   JSONL rows prompt, chosen, rejected, the file of DPO; its two responses are never compared with each
      other.
Out:  policy, policy_best, metrics.jsonl, checkpoints; the same command continues.

Source: KTO arXiv 2402.01306 Eq. 8. Defaults: README.md beside this file.
"""

from dataclasses import dataclass

import torch
import tyro

import pfppo_single as pfppo
from benchmark.baselines import common


@dataclass
class Args(common.Args):
    # data
    train_data: str = ""
    """preference pairs: .jsonl, .json, .parquet, or hub id `name:split`"""
    chosen_field: str = "chosen"
    """column with the desirable response"""
    rejected_field: str = "rejected"
    """column with the undesirable response"""
    # training
    beta: float = 0.1
    """β: how fast the value of a response saturates"""
    desirable_weight: float = 1.0
    """λ_D: weight of the chosen responses"""
    undesirable_weight: float = 1.0
    """λ_U: weight of the rejected responses"""
    epochs: int = 1
    """passes over the responses"""
    batch_size: int = 128
    """responses per optimizer step; the KL estimate is over all of them"""
    lr: float = 1e-4
    """learning rate"""
    eval_every: int = 10
    """optimizer steps between evaluations"""
    checkpoint_every: int = 20
    """optimizer steps between checkpoints"""


def mismatched_rows(prompt_ids: torch.Tensor) -> torch.Tensor:
    """prompt_ids (rows,) -> a permutation (rows,): row i gets the response of row [i], which belongs to
    another prompt. Raises ValueError when one prompt has more than half of the rows."""
    order = prompt_ids.argsort(
        stable=True
    )  # rows of a prompt are adjacent: a shift by the longest run leaves every prompt
    shift = int(prompt_ids.unique(return_counts=True)[1].max())
    if 2 * shift > len(order):
        raise ValueError(
            f"one prompt has {shift} of a batch's {len(order)} responses, which cannot all be mismatched; "
            "raise --batch_size"
        )
    other = torch.empty_like(order)
    other[order] = order.roll(shift)
    return other


def shifted_kl(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """log π_θ and log π_SFT (rows,) of mismatched responses -> z (): mean log-ratio, at least 0, no
    gradient."""
    return (logprobs - ref_logprobs).mean().clamp(min=0).detach()


def kto_loss(
    logratios: torch.Tensor,
    is_chosen: torch.Tensor,
    kl: torch.Tensor,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> torch.Tensor:
    """logratios, is_chosen (rows,), kl () -> λ - λσ(± β(r - z)) per response (rows,)."""
    sign = torch.where(is_chosen, 1.0, -1.0)
    weight = torch.where(is_chosen, desirable_weight, undesirable_weight)
    return weight * (1 - torch.sigmoid(sign * beta * (logratios - kl)))


def main(args: Args) -> None:
    common.check_args(args, ("policy", "train_data", "output_dir"))
    run = common.Run(args)
    pairs = common.load_pairs(args, run.tokenizer, run.stop_id)
    num_steps = max(1, args.epochs * 2 * len(pairs) // args.batch_size)
    print(f"{num_steps} optimizer steps of {args.batch_size} responses")
    responses = [pair[name] for name in ("chosen_ids", "rejected_ids") for pair in pairs]
    queries = [tuple(pair["query_ids"]) for pair in pairs] * 2
    rollout = common.make_rollout(queries, responses, run.pad_id, run.device)  # (2P, ...)
    is_chosen = torch.arange(len(queries), device=run.device) < len(pairs)
    numbers = {
        query: number for number, query in enumerate(dict.fromkeys(queries))
    }  # a prompt may have several pairs
    prompt_ids = torch.tensor([numbers[query] for query in queries], device=run.device)
    order = pfppo.prompt_order(2 * len(pairs), 0, num_steps * args.batch_size, args.seed)
    batches = torch.tensor(order, device=run.device).split(args.batch_size)
    others = [mismatched_rows(prompt_ids[batch]) for batch in batches]  # refused here, before training
    if args.dry_run:
        return
    run.start(num_steps)
    ref_logprobs = run.logprobs(run.ref_policy, rollout)  # (2P,)

    for step in range(run.state["step"], num_steps):
        # ---------------- 1. the next batch of responses
        rows = batches[step]

        # ---------------- 2. KL estimate on mismatched pairs of the whole batch
        mismatched = {name: rollout[name][rows] for name in ("queries", "query_mask")}
        mismatched.update(
            {name: rollout[name][rows][others[step]] for name in ("responses", "response_mask")}
        )
        kl = shifted_kl(run.logprobs(run.policy, mismatched), run.logprobs(run.ref_policy, mismatched))

        # ---------------- 3. one optimizer step
        total, chosen_sum, rejected_sum = 0.0, 0.0, 0.0
        for part in rows.split(args.micro_batch_size):
            logratios = (
                common.sequence_logprobs(run.policy, rollout, part, args.temperature) - ref_logprobs[part]
            )
            losses = kto_loss(
                logratios, is_chosen[part], kl, args.beta, args.desirable_weight, args.undesirable_weight
            )
            run.accelerator.backward(losses.sum() / len(rows))
            total += losses.sum().item() / len(rows)
            chosen_sum += logratios[is_chosen[part]].sum().item()
            rejected_sum += logratios[~is_chosen[part]].sum().item()
        run.optimizer_step(total, num_steps)
        chosen = int(is_chosen[rows].sum())
        run.end_step(
            {
                "train/loss": total,
                "train/kl": kl.item(),
                "train/chosen_logratio": chosen_sum / max(1, chosen),
                "train/rejected_logratio": rejected_sum / max(1, len(rows) - chosen),
            }
        )
    run.finish()


if __name__ == "__main__":
    main(tyro.cli(Args))
