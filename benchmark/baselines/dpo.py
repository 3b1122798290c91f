"""DPO and IPO: a policy straight from preference pairs, without reward model and without sampling.

  1. log π_SFT of both responses of every pair, once
  2. take the next batch of pairs
  3. one optimizer step on the loss of the pair's log-ratios, log π_θ(y|c) - log π_SFT(y|c)

Run:  python -m benchmark.baselines.dpo --policy sft/model --train_data preferences.jsonl --output_dir dpo/ \\
          --eval_data held_out.jsonl          (IPO: --loss_type ipo)
In:   rows prompt, chosen, rejected, in every form that rm_single.py reads.
Out:  policy, policy_best, metrics.jsonl, checkpoints; the same command continues.

Sources: DPO arXiv 2305.18290 Eq. 7; IPO arXiv 2310.12036 Eq. 17. Defaults: README.md beside this file.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from benchmark.baselines import common
from pfppo_single import Amount, Count, Positive


@dataclass(kw_only=True)
class Args(common.PairArgs):
    loss_type: Literal["dpo", "ipo"] = "dpo"
    """dpo: -log σ(β · difference of log-ratios); ipo: (difference - 1/(2β))² on log-ratios per token"""
    beta: Positive = 0.1
    """β of DPO, τ of IPO"""
    epochs: Count = 1
    """passes over the pairs"""
    batch_size: Count = 64
    """pairs per optimizer step"""
    lr: Amount = 1e-4
    """learning rate"""
    eval_every: Count = 10
    """optimizer steps between evaluations"""
    checkpoint_every: Count = 20
    """optimizer steps between checkpoints"""


def preference_loss(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    beta: float,
    loss_type: str,
) -> Tensor:
    """All (pairs,): Σ_t log π_θ - log π_SFT of a response, and its tokens -> loss per pair (pairs,)."""
    if loss_type == "dpo":
        return -F.logsigmoid(beta * (chosen_logratios - rejected_logratios))
    # DEPARTS IPO's Eq. 17: means over tokens in place of sums, without which the squared loss follows the
    # length; its authors confirmed that their numbers were made so (huggingface/trl#1265)
    margin = chosen_logratios / chosen_lengths - rejected_logratios / rejected_lengths
    return (margin - 1 / (2 * beta)).square()


def train_on_pairs(
    run: common.Run, rollout: dict[str, Tensor], ref_logprobs: Tensor, pairs: list[int]
) -> dict[str, float]:
    """One optimizer step -> its metrics. rollout: 2P rows, all chosen before all rejected; `pairs`: some of
    0 .. P-1."""
    args, num_pairs, lengths = run.args, len(ref_logprobs) // 2, rollout["response_mask"].sum(1)
    totals = {"loss": 0.0, "accuracy": 0.0, "chosen_logratio": 0.0, "rejected_logratio": 0.0, "margin": 0.0}
    for part in torch.tensor(pairs, device=run.device).split(args.micro_batch_size):
        rows = torch.cat([part, part + num_pairs])
        logprobs = common.sequence_logprobs(run.policy, rollout, rows, args.temperature)
        chosen, rejected = (logprobs - ref_logprobs[rows]).chunk(2)
        losses = preference_loss(chosen, rejected, *lengths[rows].chunk(2), args.beta, args.loss_type)
        loss = losses.sum() / len(pairs)
        run.accelerator.backward(loss)
        margin = chosen - rejected
        sums = (loss * len(pairs), (margin > 0).sum(), chosen.sum(), rejected.sum(), margin.sum())
        totals = {name: totals[name] + x.item() / len(pairs) for name, x in zip(totals, sums)}
    run.optimizer_step(totals["loss"])
    return {f"train/{name}": value for name, value in totals.items()}


def main(args: Args) -> None:
    run = common.Run(args)
    pairs = common.read_pairs(args, run.tokenizer, run.config, run.stop_id)
    num_steps = max(1, args.epochs * len(pairs) // args.batch_size)
    order = common.pass_order(len(pairs), num_steps, args.batch_size, args.seed)
    if args.dry_run:
        return
    run.start(num_steps, num_steps)

    # ---------------- 1. log π_SFT of both responses of every pair
    rollout = common.pair_rollout(pairs, run.device)  # (2P, ...)
    ref_logprobs = run.logprobs(run.ref_policy, rollout)  # (2P,)

    for step in range(run.state["step"], num_steps):
        # ---------------- 2. the next batch of pairs
        batch = order[step * args.batch_size : (step + 1) * args.batch_size]
        # ---------------- 3. one optimizer step
        run.end_step(train_on_pairs(run, rollout, ref_logprobs, batch))
    run.finish()


if __name__ == "__main__":
    main(tyro.cli(Args, use_underscores=True))
