"""DPO and IPO: a policy straight from preference pairs, without reward model and without sampling.

  1. log π_SFT of both responses of every pair, once
  2. take the next batch of pairs
  3. one optimizer step on the loss of the pair's log-ratios, log π_θ(y|c) - log π_SFT(y|c)

Run:  python -m benchmark.baselines.dpo --policy sft/model --train_data preferences.jsonl --output_dir dpo/ \\
          --eval_prompts valid.jsonl --actual_score benchmark.minicode:oracle          (IPO: --loss_type ipo)
In:   JSONL rows prompt, chosen, rejected.
Out:  policy, policy_best, metrics.jsonl, checkpoints; the same command continues.

Sources: DPO arXiv 2305.18290 Eq. 7; IPO arXiv 2310.12036 Eq. 17. Defaults: README.md beside this file.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
import tyro

import pfppo_single as pfppo
from benchmark.baselines import common


@dataclass
class Args(common.Args):
    # data
    train_data: str = ""
    """preference pairs: .jsonl, .json, .parquet, or hub id `name:split`"""
    chosen_field: str = "chosen"
    """column with the better response"""
    rejected_field: str = "rejected"
    """column with the worse response"""
    # training
    loss_type: Literal["dpo", "ipo"] = "dpo"
    """dpo: -log σ(β · difference of log-ratios); ipo: (difference - 1/(2β))² on log-ratios per token"""
    beta: float = 0.1
    """β of DPO, τ of IPO"""
    epochs: int = 1
    """passes over the pairs"""
    batch_size: int = 64
    """pairs per optimizer step"""
    lr: float = 1e-4
    """learning rate"""
    eval_every: int = 10
    """optimizer steps between evaluations"""
    checkpoint_every: int = 20
    """optimizer steps between checkpoints"""


def preference_loss(
    chosen_logratios: torch.Tensor,
    rejected_logratios: torch.Tensor,
    chosen_lengths: torch.Tensor,
    rejected_lengths: torch.Tensor,
    beta: float,
    loss_type: str,
) -> torch.Tensor:
    """All (pairs,): Σ_t log π_θ - log π_SFT of a response, and its tokens -> loss per pair (pairs,)."""
    if loss_type == "dpo":
        return -F.logsigmoid(beta * (chosen_logratios - rejected_logratios))
    # DEPARTS IPO's Eq. 17: means over tokens in place of sums, without which the squared loss follows the
    # length; its authors confirmed that their numbers were made so (huggingface/trl#1265)
    margin = chosen_logratios / chosen_lengths - rejected_logratios / rejected_lengths
    return (margin - 1 / (2 * beta)).square()


def train_on_pairs(
    run: common.Run,
    rollout: dict[str, torch.Tensor],
    ref_logprobs: torch.Tensor,
    pairs: list[int],
    beta: float,
    loss_type: str,
    num_optimizer_steps: int,
) -> dict[str, float]:
    """One optimizer step -> its metrics. rollout: 2P rows, all chosen before all rejected; `pairs`: some of 0
    .. P-1."""
    num_pairs, lengths = len(ref_logprobs) // 2, rollout["response_mask"].sum(1)
    totals = {"loss": 0.0, "accuracy": 0.0, "chosen_logratio": 0.0, "rejected_logratio": 0.0}
    for part in torch.tensor(pairs, device=run.device).split(run.args.micro_batch_size):
        rows = torch.cat([part, part + num_pairs])
        logratios = (
            common.sequence_logprobs(run.policy, rollout, rows, run.args.temperature) - ref_logprobs[rows]
        )
        chosen, rejected = logratios.chunk(2)
        chosen_lengths, rejected_lengths = lengths[rows].chunk(2)
        loss = preference_loss(
            chosen, rejected, chosen_lengths, rejected_lengths, beta, loss_type
        ).sum() / len(pairs)
        run.accelerator.backward(loss)
        sums = (
            loss.detach() * len(pairs),
            (chosen > rejected).sum(),
            chosen.detach().sum(),
            rejected.detach().sum(),
        )
        totals = {name: totals[name] + x.item() / len(pairs) for name, x in zip(totals, sums)}
    run.optimizer_step(totals["loss"], num_optimizer_steps)
    return {f"train/{name}": value for name, value in totals.items()}


def main(args: Args) -> None:
    common.check_args(args, ("policy", "train_data", "output_dir"))
    run = common.Run(args)
    pairs = common.load_pairs(args, run.tokenizer, run.stop_id)
    num_steps = max(1, args.epochs * len(pairs) // args.batch_size)
    print(f"{num_steps} optimizer steps of {args.batch_size} pairs")
    if args.dry_run:
        return
    run.start(num_steps)

    # ---------------- 1. log π_SFT of both responses of every pair
    responses = [pair[name] for name in ("chosen_ids", "rejected_ids") for pair in pairs]
    queries = [pair["query_ids"] for pair in pairs] * 2
    rollout = common.make_rollout(queries, responses, run.pad_id, run.device)  # (2P, ...)
    ref_logprobs = run.logprobs(run.ref_policy, rollout)  # (2P,)

    order = pfppo.prompt_order(len(pairs), 0, num_steps * args.batch_size, args.seed)
    for step in range(run.state["step"], num_steps):
        # ---------------- 2. the next batch of pairs
        batch = order[step * args.batch_size : (step + 1) * args.batch_size]
        # ---------------- 3. one optimizer step
        run.end_step(train_on_pairs(run, rollout, ref_logprobs, batch, args.beta, args.loss_type, num_steps))
    run.finish()


if __name__ == "__main__":
    main(tyro.cli(Args))
