"""Pictures and tables of the benchmark. Pure drawing: data in, one PNG or markdown text out."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

COLOURS = {"sft": "#7f7f7f", "ppo_m": "#1f77b4", "br": "#d62728", "bw": "#2ca02c", "random": "#9467bd", "ppo_s": "#17becf", "bon": "#ff7f0e",
           "oracle": "#000000"}  # fmt: skip
LABELS = {"sft": "SFT", "ppo_s": "PPO-S", "ppo_m": "PPO-M", "bon": "PF-PPO BoN", "br": "PF-PPO BR", "bw": "PF-PPO BW", "random": "random 2 of 5",
          "oracle": "PPO-M, oracle reward", "none": "no filter", "top": "top", "top_random": "top-random", "top_bottom": "top-bottom",
          "pow_1": "pow-1", "pow_2": "pow-2", "pow_3": "pow-3"}  # fmt: skip


def label(name: str) -> str:
    return LABELS.get(name, name)


def save(figure, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def reliability(repeats: list[dict], path: Path, title: str = "") -> Path:
    """Figure 1: one line a repeat, mean actual score of each reward group against its mean reward.
    `repeats`: dicts with lists `reward` and `actual`, one entry a group."""
    figure, axes = plt.subplots(figsize=(5, 3.8))
    for repeat in repeats:
        axes.plot(repeat["reward"], repeat["actual"], marker="o", markersize=3, linewidth=1, alpha=0.7)
    axes.set(xlabel="reward R (group mean)", ylabel="actual score s (share that passes)", title=title or "Reliability of the reward model")
    axes.grid(alpha=0.3)
    return save(figure, path)


def training_curves(curves: dict[str, dict[str, list[tuple[float, float]]]], path: Path, levels: dict[str, float] | None = None) -> Path:
    """Figure 2. `curves`: method -> {"sampled": [(update, reward on π_θ's samples)], "kept": [(update, reward on μ_θ's)],
    "pass1": [(update, greedy pass@1)]}; `levels`: name -> horizontal line in the right panel."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    for method, lines in curves.items():
        colour = COLOURS.get(method)
        left.plot(*zip(*lines["sampled"]), color=colour, label=label(method))
        left.plot(*zip(*lines["kept"]), color=colour, linestyle=":", linewidth=1)
        right.plot(*zip(*lines["pass1"]), color=colour, marker="o", markersize=3, label=label(method))
    for name, value in (levels or {}).items():
        right.axhline(value, color=COLOURS.get(name, "#7f7f7f"), linestyle="--", linewidth=1, label=label(name))
    left.set(xlabel="update", ylabel="reward", title="Reward: policy's samples (line), kept samples (dotted)")
    right.set(xlabel="update", ylabel="greedy pass@1, validation problems", title="Problems solved")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return save(figure, path)


def r2_bars(table: dict[str, dict[str, float]], path: Path, title: str = "R² of each filter on SFT samples") -> Path:
    """Bars with 95% intervals. `table`: filter -> {"r2", "low", "high"}."""
    names = list(table)
    r2 = np.array([table[n]["r2"] for n in names])
    error = np.abs(np.array([[table[n]["r2"] - table[n]["low"], table[n]["high"] - table[n]["r2"]] for n in names]).T)
    figure, axes = plt.subplots(figsize=(7, 3.5))
    axes.bar(range(len(names)), r2, yerr=error, capsize=3, color="#4c78a8")
    axes.set_xticks(range(len(names)), [label(n) for n in names], rotation=30, ha="right", fontsize=8)
    axes.set(ylabel="R²", ylim=(0, 1), title=title)
    axes.grid(alpha=0.3, axis="y")
    return save(figure, path)


def markdown_table(header: list[str], rows: list[list]) -> str:
    """Aligned markdown table; numbers are shown with three decimals, None as `missing`."""
    def cell(value) -> str:
        return "missing" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)

    lines = [header, *[[cell(v) for v in row] for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    out = ["| " + " | ".join(v.ljust(w) for v, w in zip(line, widths)) + " |" for line in lines]
    return "\n".join([out[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *out[1:]])
