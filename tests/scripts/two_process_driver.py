"""What test_two_processes.py runs on two ranks, and in its own process for comparison. Usage: driver.py
SETTINGS.json FOLDER"""

import json
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [
        str(Path(__file__).resolve().parents[2]),
        sys.argv[2],
    ]  # the scripts, and the folder of the reward functions

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

import pfppo_single as pf


def gradients(accelerator, folder: Path, average: str, empty_rank: bool) -> dict[str, torch.Tensor]:
    """Gradients and stats of one minibatch of 8 rows in micro-batches of 3, from the shipped functions under
    DDP. Rows are split evenly over the ranks, or all are on rank 0 and the others have one fully masked
    row."""
    model = pf.PolicyAndCritic(
        pf.load_causal_lm(str(folder / "gpt2")), pf.RewardModel.from_pretrained(folder / "reward")
    )
    model = accelerator.prepare(model)
    rollout, rank, world = (
        torch.load(folder / "rollout.pt"),
        accelerator.process_index,
        accelerator.num_processes,
    )
    rows = torch.arange(8) if empty_rank else torch.arange(8).chunk(world)[rank]
    if empty_rank and rank:
        rows = torch.zeros(1, dtype=torch.long)
        rollout["response_mask"] = torch.zeros_like(rollout["response_mask"])
    mask = rollout["response_mask"]
    rollout["loss_weights"] = torch.zeros(mask.shape)
    rollout["loss_weights"][rows] = pf.loss_weights(
        mask[rows], average, lambda x: accelerator.reduce(x, "sum"), world
    )
    parts, stats = pf.micro_batches(rollout, rows, 3), 0
    for i, part in enumerate(parts):
        with accelerator.no_sync(model) if i + 1 < len(parts) else torch.enable_grad():
            loss, part_stats = pf.minibatch_loss(model, pf.trim(rollout, part), 0.9, 0.2, 0.2, 0.1)
            accelerator.backward(loss)
        stats = stats + part_stats
    found = {name: p.grad for name, p in accelerator.unwrap_model(model).named_parameters()}
    return {**found, "stats": accelerator.reduce(stats, "mean")}


def whitened(accelerator, folder: Path) -> dict[str, torch.Tensor]:
    """The advantages of the rollout whitened over all ranks; shifted and with its mean kept."""
    rollout, found = torch.load(folder / "rollout.pt"), {}
    rows = torch.arange(8).chunk(accelerator.num_processes)[accelerator.process_index]
    for shift_mean in (True, False):
        part = pf.whiten(
            rollout["advantages"][rows],
            rollout["response_mask"][rows],
            shift_mean,
            lambda x: accelerator.reduce(x, "sum"),
        )
        found[f"whitened {shift_mean}"] = accelerator.gather(part)
    return found


def tensors(accelerator, folder: Path) -> dict[str, torch.Tensor]:
    """All that must not depend on the number of processes."""
    found = whitened(accelerator, folder)
    for average in ("token", "sequence"):
        for empty_rank in (False, True):
            for name, value in gradients(accelerator, folder, average, empty_rank).items():
                found[f"{average} {'empty' if empty_rank else 'even'} {name}"] = value
    return found


def observed_run(settings: dict) -> dict:
    """One run of main; what this rank saw: KL coefficients, learning rates, visits of rows, a fingerprint of
    the weights."""
    seen = {"kl_coef": [], "lr": [], "visits": 0, "weights": 0.0}
    originals = pf.cumulative_rewards, pf.minibatch_loss

    def cumulative_rewards(scores, logprobs, ref_logprobs, mask, kl_coef):
        seen["kl_coef"].append(kl_coef)
        return originals[0](scores, logprobs, ref_logprobs, mask, kl_coef)

    def minibatch_loss(model, batch, *args):
        seen["visits"] += int((batch["loss_weights"] > 0).any(1).sum())
        return originals[1](model, batch, *args)

    def after(optimizer, *_):
        seen["lr"].append([group["lr"] for group in optimizer.param_groups])
        seen["weights"] = sum(
            p.double().abs().sum().item() for group in optimizer.param_groups for p in group["params"]
        )

    pf.cumulative_rewards, pf.minibatch_loss, hook = (
        cumulative_rewards,
        minibatch_loss,
        register_optimizer_step_post_hook(after),
    )
    try:
        pf.main(pf.Args(**settings))
    finally:
        hook.remove()
        pf.cumulative_rewards, pf.minibatch_loss = originals
    return seen


def interrupted_run(settings: dict) -> None:
    """The run dies in update 2 on every rank and is started again."""
    original, calls = pf.gae, []

    def dies(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args)

    pf.gae = dies
    try:
        pf.main(pf.Args(**settings))
    except KeyboardInterrupt:
        pf.gae = original
        pf.main(pf.Args(**settings))


def main() -> None:
    folder, settings = Path(sys.argv[2]), json.loads(Path(sys.argv[1]).read_text())
    accelerator = pf.Accelerator()
    rank = accelerator.process_index
    torch.save(tensors(accelerator, folder), folder / f"tensors_{rank}.pt")
    seen = {name: observed_run(settings[name]) for name in ("whole", "uneven")}
    interrupted_run(settings["interrupted"])
    (folder / f"seen_{rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
