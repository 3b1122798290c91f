"""When does the held-out loss ask the main job's SFT to stop, and what would stopping there cost?

    python -m benchmark.study.sft_epochs --seeds 1 2 --output_dir output/sft_epochs

Trains SFT as the main job does, with a held-out loss after every pass: `epochs` passes with the learning rate that
falls as in the main job, as many with one that stays, and fewer, whose learning rate falls sooner. Of the long runs the
policy of the lowest held-out loss is looked at too. Then greedy and sampled pass@1 on the prompts for preference data,
which SFT does not see and which are more than the test problems. A killed run continues. Leaves sft_epochs.json,
table.md, loss.png.
"""

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

from benchmark import pipeline, quickstart, records
from benchmark.study import figures

SIZES = ("num_sft", "num_preference", "num_valid", "num_test", "max_operations")


@dataclass
class Args:
    output_dir: str = "output/sft_epochs"
    """a folder a seed, and the results"""
    seeds: tuple[int, ...] = (1, 2)
    """one world and one SFT a seed, those of the main job"""
    epochs: int = 16
    """passes of the long runs; the one whose learning rate falls is what the others are compared with"""
    fewer: tuple[int, ...] = (12, 8)
    """passes of the runs whose learning rate falls sooner"""
    constant: bool = True
    """also a long run whose learning rate stays"""


def passes(policy_dir: Path, rows: list[dict], seed: int) -> dict[str, list[float]]:
    """Whether the greedy and one sampled answer to every problem pass, 1 or 0; kept beside the policy."""
    file = policy_dir.with_name(f"{policy_dir.name}_passes.json")
    if not file.is_file():
        policy, tokenizer = pipeline.load(policy_dir)
        texts = {
            how: pipeline.sample(policy, tokenizer, rows, 1, t, seed)[1] for how, t in TEMPERATURES.items()
        }
        records.write_json(
            file, {how: pipeline.actual_scores(rows, own).tolist() for how, own in texts.items()}
        )
    return json.loads(file.read_text())


TEMPERATURES = {"greedy": 0.0, "sampled": 1.0}


def train(folder: Path, seed: int, name: str, **settings) -> None:
    """SFT of the main job; the checkpoint after every pass is kept in NAME/passes."""
    run = folder / name

    def say(line: str) -> None:
        print(line, flush=True)
        for checkpoint in run.glob("checkpoints/step_*/rank_0.pt"):  # one: the next deletes it
            kept = run / "passes" / f"{checkpoint.parent.name}.pt"
            kept.parent.mkdir(exist_ok=True)
            if not kept.is_file():
                shutil.copy(checkpoint, kept)

    pipeline.sft(folder, seed, name, say, **settings)


def one_run(folder: Path, seed: int, schedule: str, epochs: int, lowest: bool) -> list[dict]:
    """SFT of a seed -> held-out loss after every pass, answers that pass; with `lowest` also of the policy of the
    lowest held-out loss, where it is not the last."""
    steps = math.ceil(len(records.read_rows(folder / "world/sft.jsonl")) / pipeline.SFT["batch_size"])
    name = f"{schedule}_{epochs}"
    train(folder, seed, name, epochs=epochs, lr_schedule=schedule, eval_every=steps, log_every=steps)
    rows = records.read_rows(folder / name / "metrics.jsonl")
    curves = {tag: [row[tag] for row in rows if tag in row] for tag in ("train/loss", "test/loss")}
    prompts, policy = records.read_rows(folder / "world/preference.jsonl"), folder / name / "model"
    run = {"schedule": schedule, "epochs": epochs, "stopped": epochs, **curves}
    runs = [run | {"passed": passes(policy, prompts, seed)}]
    best = 1 + int(np.argmin(run["test/loss"]))
    if lowest and best < epochs:
        early = shutil.copytree(policy, folder / name / "lowest", dirs_exist_ok=True)
        stopped = pipeline.load(policy)[0]
        stopped.load_state_dict(torch.load(folder / name / "passes" / f"step_{best * steps:06d}.pt")[0])
        stopped.save_pretrained(early)
        until = {tag: values[:best] for tag, values in curves.items()}
        runs.append(run | until | {"stopped": best, "passed": passes(early, prompts, seed)})
    return runs


def table(runs: dict[str, list[dict]]) -> str:
    """Runs of every seed -> a row each: last losses, pass@1, and the paired differences to the seed's first run
    with 95% intervals over the problems."""
    header = ["seed", "learning rate", "epochs", "stopped after", "held-out loss", "training loss"]
    header += ["greedy pass@1", "to the first", "sampled pass@1", "to the first"]
    lines = []
    for seed, of_seed in runs.items():
        for run in of_seed:
            cells = [seed, run["schedule"], str(run["epochs"]), str(run["stopped"])]
            cells += [f"{run[tag][-1]:.4f}" for tag in ("test/loss", "train/loss")]
            for how in TEMPERATURES:
                own, first = (np.array(each["passed"][how]) for each in (run, of_seed[0]))
                gap, error = (own - first).mean(), (own - first).std() / math.sqrt(len(own))
                cells += [f"{own.mean():.3f}", f"{gap:+.3f} ± {1.96 * error:.3f}"]
            lines.append(cells)
    return figures.markdown_table(header, lines)


def draw(runs: dict[str, list[dict]], path: Path) -> None:
    """Held-out loss over passes (lines) and training loss (dotted); one panel a seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(runs), figsize=(5 * len(runs), 3.6), sharey=True, squeeze=False)
    for (seed, of_seed), axes in zip(runs.items(), panels[0]):
        for run in (run for run in of_seed if run["stopped"] == run["epochs"]):
            done, name = range(1, run["epochs"] + 1), f"{run['schedule']}, {run['epochs']} epochs"
            (line,) = axes.plot(done, run["test/loss"], ".-", label=name)
            axes.plot(done, run["train/loss"], ":", color=line.get_color(), linewidth=1)
        axes.set(xlabel="epoch", title=f"seed {seed}", yscale="log")
    panels[0, 0].set_ylabel("loss, nats per token\n(dotted: training)")
    panels[0, 0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(args: Args) -> None:
    out, usual = Path(args.output_dir), quickstart.Args()
    runs, kinds = {}, [("cosine", args.epochs, True), *(("cosine", n, False) for n in args.fewer)]
    kinds += [("constant", args.epochs, True)] if args.constant else []
    for seed in args.seeds:
        folder = out / f"seed_{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        pipeline.world(folder, seed, **{name: getattr(usual, name) for name in SIZES})
        runs[str(seed)] = sum((one_run(folder, seed, *kind) for kind in kinds), [])
    text = table(runs)
    for run in sum(runs.values(), []):
        run["passed"] = {how: float(np.mean(passed)) for how, passed in run["passed"].items()}
    about = {"commit": records.commit(), "hardware": records.hardware(), "settings": pipeline.SFT}
    records.write_json(out / "sft_epochs.json", {**about, "runs": runs})
    records.write_text(out / "table.md", text + "\n")
    draw(runs, out / "loss.png")
    print(f"\n{text}\n{about['hardware']}, commit {about['commit']}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
