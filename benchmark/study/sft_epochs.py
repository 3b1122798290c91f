"""When does the held-out loss ask the main job's SFT to stop, and what would stopping there cost?

    python -m benchmark.study.sft_epochs --seeds 1 2 --output_dir output/sft_epochs

Trains SFT as the main job does, with a held-out loss after every pass, for each of `epochs`: the falling schedule
ends with the run, so fewer passes are a run of their own. With a constant learning rate a shorter run is the
beginning of a longer one. Then greedy and sampled pass@1 on the prompts for preference data, which SFT does not
see and which are more than the test problems. A killed run continues. Leaves sft_epochs.json, table.md, loss.png.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
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
    epochs: tuple[int, ...] = (16, 12, 8)
    """lengths of the runs whose learning rate falls; the first is what the others are compared with"""
    constant: tuple[int, ...] = (16,)
    """lengths of the runs whose learning rate stays"""


def passes(policy_dir: Path, rows: list[dict], seed: int) -> dict[str, list[float]]:
    """Whether the greedy and one sampled answer to every problem pass, 1 or 0."""
    policy, tokenizer = pipeline.load(policy_dir)
    texts = {how: pipeline.sample(policy, tokenizer, rows, 1, t, seed)[1] for how, t in TEMPERATURES.items()}
    return {how: pipeline.actual_scores(rows, answers).tolist() for how, answers in texts.items()}


TEMPERATURES = {"greedy": 0.0, "sampled": 1.0}


def one_run(folder: Path, seed: int, schedule: str, epochs: int) -> dict:
    """SFT of a seed -> held-out loss after every pass, answers that pass."""
    steps = math.ceil(len(records.read_rows(folder / "world/sft.jsonl")) / pipeline.SFT["batch_size"])
    name = f"{schedule}_{epochs}"
    settings = dict(epochs=epochs, lr_schedule=schedule, eval_every=steps, log_every=steps)
    pipeline.sft(folder, seed, name, print, **settings)
    rows = records.read_rows(folder / name / "metrics.jsonl")
    curves = {tag: [row[tag] for row in rows if tag in row] for tag in ("train/loss", "test/loss")}
    prompts = records.read_rows(folder / "world/preference.jsonl")
    passed = passes(folder / name / "model", prompts, seed)
    return {"schedule": schedule, "epochs": epochs, **curves, "passed": passed}


def table(runs: dict[str, list[dict]]) -> str:
    """Runs of every seed -> a row each: losses, pass@1, and the paired differences to the seed's first run."""
    header = ["seed", "learning rate", "epochs", "held-out loss, last", "lowest", "after epoch"]
    header += ["training loss, last", "greedy pass@1", "to the first", "sampled pass@1", "to the first"]
    lines = []
    for seed, of_seed in runs.items():
        for run in of_seed:
            loss = run["test/loss"]
            cells = [seed, run["schedule"], str(run["epochs"])]
            cells += [f"{loss[-1]:.4f}", f"{min(loss):.4f}", str(1 + int(np.argmin(loss)))]
            cells += [f"{run['train/loss'][-1]:.4f}"]
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
        for run in of_seed:
            passed = range(1, run["epochs"] + 1)
            (line,) = axes.plot(
                passed, run["test/loss"], ".-", label=f"{run['schedule']}, {run['epochs']} epochs"
            )
            axes.plot(passed, run["train/loss"], ":", color=line.get_color(), linewidth=1)
        axes.set(xlabel="epoch", title=f"seed {seed}", yscale="log")
    panels[0, 0].set_ylabel("loss, nats per token\n(dotted: training)")
    panels[0, 0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(args: Args) -> None:
    out, usual = Path(args.output_dir), quickstart.Args()
    runs, kinds = {}, [*(("cosine", n) for n in args.epochs), *(("constant", n) for n in args.constant)]
    for seed in args.seeds:
        folder = out / f"seed_{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        pipeline.world(folder, seed, **{name: getattr(usual, name) for name in SIZES})
        runs[str(seed)] = [one_run(folder, seed, *kind) for kind in kinds]
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
