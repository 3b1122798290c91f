"""What test_two_processes.py runs on two ranks, and in its own process for comparison."""

import os
import signal
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

import pfppo_single as pf
import rm_single as rm
import sft_single as sft

ARGS = pf.Args(policy="", reward="", prompts="", temperature=0.9)


def gradients(accelerator, folder: Path, empty_rank: bool) -> dict[str, torch.Tensor]:
    """Gradients and stats of one minibatch of 8 rows in micro-batches of 3, from the shipped functions under
    DDP. Rows are split evenly over the ranks, or all are on rank 0 and the others have one fully masked
    row."""
    policy, critic = pf.load_causal_lm(str(folder / "gpt2")), pf.load_reward_model(str(folder / "reward"))
    model = accelerator.prepare(pf.PolicyAndCritic(policy, critic))
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
    rollout["loss_weights"][rows] = pf.loss_weights(mask[rows], lambda x: accelerator.reduce(x, "sum"), world)
    parts, stats = pf.micro_batches(rollout, rows, 3), 0
    for i, part in enumerate(parts):
        with accelerator.no_sync(model) if i + 1 < len(parts) else torch.enable_grad():
            loss, part_stats, _ = pf.minibatch_loss(model, pf.trim(rollout, part), ARGS)
            accelerator.backward(loss)
        stats = stats + part_stats
    found = {name: p.grad for name, p in accelerator.unwrap_model(model).named_parameters()}
    return {**found, "stats": accelerator.reduce(stats, "mean")}


def whitened(accelerator, folder: Path) -> dict[str, torch.Tensor]:
    """The advantages of the rollout whitened over all ranks; shifted and with its mean kept."""
    rollout, found = torch.load(folder / "rollout.pt"), {}
    rows = torch.arange(8).chunk(accelerator.num_processes)[accelerator.process_index]
    values, mask = rollout["advantages"][rows], rollout["response_mask"][rows]
    for shift_mean in (True, False):
        part = pf.whiten(values, mask, shift_mean, lambda x: accelerator.reduce(x, "sum"))
        found[f"whitened {shift_mean}"] = accelerator.gather(part)
    return found


def tensors(accelerator, folder: Path) -> dict[str, torch.Tensor]:
    """All that must not depend on the number of processes."""
    found = whitened(accelerator, folder)
    for split, empty_rank in (("even", False), ("empty", True)):
        for name, value in gradients(accelerator, folder, empty_rank).items():
            found[f"{split} {name}"] = value
    return found


def observed_run(settings: dict) -> dict:
    """One run of main; what this rank saw: KL coefficients, learning rates, visits of rows, a fingerprint of
    the weights."""
    seen = {"kl_coef": [], "lr": [], "visits": 0, "weights": 0.0}
    originals = pf.cumulative_rewards, pf.minibatch_loss

    def cumulative_rewards(scores, kl, mask, kl_coef):
        seen["kl_coef"].append(kl_coef)
        return originals[0](scores, kl, mask, kl_coef)

    def minibatch_loss(model, batch, args):
        seen["visits"] += int((batch["loss_weights"] > 0).any(1).sum())
        return originals[1](model, batch, args)

    def after(optimizer, *_):
        seen["lr"].append([group["lr"] for group in optimizer.param_groups])
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        seen["weights"] = sum(p.double().abs().sum().item() for p in parameters)

    pf.cumulative_rewards, pf.minibatch_loss = cumulative_rewards, minibatch_loss
    hook = register_optimizer_step_post_hook(after)
    try:
        pf.main(pf.Args(**settings))
    finally:
        hook.remove()
        pf.cumulative_rewards, pf.minibatch_loss = originals
    return seen


def smooth_adam() -> None:
    """Adam with a large epsilon, for good: with a tiny one, rounding of a near-zero gradient becomes a whole
    step."""
    adamw = torch.optim.AdamW
    torch.optim.AdamW = lambda *args, **kwargs: adamw(*args, **{**kwargs, "eps": 0.1})


def everything(folder: str, settings: dict) -> dict:
    """All of it on this rank -> what it saw of the two PPO runs; the tensors go to tensors_RANK.pt."""
    accelerator = pf.start_accelerator()
    found = tensors(accelerator, Path(folder))
    torch.save(found, Path(folder) / f"tensors_{accelerator.process_index}.pt")
    seen = {name: observed_run(settings[name]) for name in ("whole", "uneven")}
    smooth_adam()
    sft.main(sft.Args(**settings["sft"]))
    for name in ("rm", "rm_sampled"):
        rm.main(rm.Args(**settings[name]))
    return seen


def stopped(settings: dict, rank: int) -> str:
    """What a PPO run says that ends because `rank` got SIGTERM in its second update."""
    scored = pf.reward_model_scores

    def interrupted(*arguments):
        if int(os.environ["RANK"]) == rank and (Path(settings["output_dir"]) / "metrics.jsonl").is_file():
            os.kill(os.getpid(), signal.SIGTERM)
        return scored(*arguments)

    pf.reward_model_scores = interrupted
    try:
        pf.main(pf.Args(**settings))
    except SystemExit as exit:
        return str(exit)
    return "nothing stopped it"


def failed(settings: dict) -> str:
    """What a PPO run says whose reward function fails on one rank."""
    try:
        pf.main(pf.Args(**settings))
    except SystemExit as exit:
        return str(exit)
    return "nothing failed"
