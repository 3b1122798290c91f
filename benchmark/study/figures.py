"""Pictures and tables of the benchmark. Pure drawing: data in, one PNG or markdown text out."""

from functools import partial
from pathlib import Path

import matplotlib
import matplotlib.lines
import matplotlib.patches
import matplotlib.pyplot as plt
import matplotlib.ticker
import numpy as np

from benchmark.records import half_width

matplotlib.use("Agg")

COLOURS = {
    "sft": "#7f7f7f",
    "ppo_m": "#1f77b4",
    "br": "#d62728",
    "bw": "#2ca02c",
    "random": "#9467bd",
    "ppo_s": "#17becf",
    "bon": "#ff7f0e",
    "oracle": "#000000",
}
LABELS = {
    "sft": "SFT",
    "ppo_s": "PPO-S",
    "ppo_m": "PPO-M",
    "bon": "PF-PPO BoN",
    "br": "PF-PPO BR",
    "bw": "PF-PPO BW",
    "random": "random 2 of 5",
    "oracle": "PPO-M, oracle reward",
    "none": "no filter",
    "top": "top",
    "top_random": "top-random",
    "top_bottom": "top-bottom",
    "pow_1": "pow-1",
    "pow_2": "pow-2",
    "pow_3": "pow-3",
    "raft": "RAFT",
    "bond": "BOND",
    "dpo": "DPO",
    "ipo": "IPO",
    "kto": "KTO",
    "iterative_dpo": "Iterative-DPO",
    "w_r2": "w chosen by R²",
}


BANDS = ("ppo_m", "br", "random")  # the arms whose intervals are drawn: more of them cover each other


REST = "#444444"  # of legend entries that say what a style means, whatever the colour


def legend_below(figure, axes, **styles) -> None:
    """One legend for all panels, where it covers no line. `styles`: line, dotted, band, bar, circle -> what it means
    in every colour."""
    handles, names = axes.get_legend_handles_labels()
    line, shapes = partial(matplotlib.lines.Line2D, [], [], color=REST), {}
    shapes["line"], shapes["dotted"], shapes["bar"] = (
        line(),
        line(linestyle=":"),
        line(linestyle="", marker="|"),
    )
    shapes["circle"] = line(linestyle="", marker="o", markerfacecolor="none")
    shapes["band"] = matplotlib.patches.Patch(color=REST, alpha=0.15, linewidth=0)
    handles += [shapes[style] for style in styles]
    names += styles.values()
    figure.legend(
        handles,
        names,
        loc="upper center",
        bbox_to_anchor=(0.5, 0.01),
        ncol=-(-len(names) // -(-len(names) // 5)),  # rows of equal length, at most five
        fontsize=8,
    )


def label(name: str) -> str:
    return LABELS.get(name, name)


def save(figure, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
    return path


def reliability_curve(axes, repeats: list[dict], colour: str = "#1f77b4") -> None:
    """Figure 1 on one pair of axes: group means over the repeats, and how far single repeats lie around them.
    `repeats`: dicts with lists `reward`, `actual` and `count`, one entry a group."""
    reward, actual = (np.array([repeat[name] for repeat in repeats]) for name in ("reward", "actual"))
    mean, spread = actual.mean(0), actual.std(0, ddof=1) if len(repeats) > 1 else 0 * actual[0]
    size = np.mean([sum(repeat["count"]) for repeat in repeats])
    x, repeated = reward.mean(0), f"{len(repeats)} repeats of {size:.0f} responses"
    axes.plot(x, mean, color=colour, marker="o", markersize=4, label=f"mean of {repeated}")
    band = "a single repeat: ± its standard deviation"
    axes.fill_between(x, mean - spread, mean + spread, color=colour, alpha=0.2, linewidth=0, label=band)
    axes.axhline(actual.mean(), color="#7f7f7f", linestyle="--", linewidth=1, label="all responses")
    axes.set(xlabel="reward R of a group of responses", ylim=(0, 1))
    axes.grid(alpha=0.3)


def reliability(repeats: list[dict], path: Path, title: str = "") -> Path:
    """Figure 1: share of responses that pass in groups of equal count by reward, one curve with its band."""
    figure, axes = plt.subplots(figsize=(5.5, 4))
    reliability_curve(axes, repeats)
    axes.set(ylabel="actual score s, share that passes", title=title or "Does a higher reward mean better?")
    axes.legend(fontsize=8, loc="upper left")
    return save(figure, path)


def training_curves(
    curves: dict[str, dict[str, list[tuple[float, float]]]], path: Path, problems: int = 0
) -> Path:
    """Figure 2. `curves`: method -> {"sampled": [(update, reward on π_θ's samples)], "kept": [(update, reward
    on μ_θ's)], "pass1": [(update, greedy pass@1)]}; `problems`: how many pass@1 is a share of, for its
    standard errors."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2))
    evaluated = sorted({update for lines in curves.values() for update, _ in lines["pass1"]})
    gap = 0.012 * (max(evaluated, default=1) or 1)  # error bars of the methods side by side
    for i, (method, lines) in enumerate(curves.items()):
        colour = COLOURS.get(method)
        left.plot(*zip(*lines["sampled"]), color=colour, label=label(method))
        left.plot(*zip(*lines["kept"]), color=colour, linestyle=":", linewidth=1.5)
        x, y = (np.array(values, dtype=float) for values in zip(*lines["pass1"]))
        error = np.sqrt(y * (1 - y) / problems) if problems else None
        shift = gap * (i - (len(curves) - 1) / 2)
        right.errorbar(
            x + shift,
            y,
            error,
            color=colour,
            marker="o",
            markersize=3,
            capsize=2,
            linewidth=1.5,
            label=label(method),
        )
    left.set(xlabel="update", ylabel="mean reward R of the update's samples", title="Reward")
    right.set(xlabel="update", ylabel="greedy pass@1, validation problems", title="Problems solved")
    left.set_xticks([1, *(update for update in evaluated if update > 1)])  # update 0 has no samples
    right.set_xticks(evaluated)
    for axes in (left, right):
        axes.set_xlim(-2 * gap, max(evaluated, default=1) + 2 * gap)
        axes.grid(alpha=0.3)
    styles = dict(line="left: all samples of the policy", dotted="left: the samples trained on")
    bars = {"bar": f"right: ± standard error, {problems} problems"} if problems else {}
    legend_below(figure, left, **styles, **bars)
    return save(figure, path)


def reliability_panels(worlds: dict[str, list[dict]], path: Path) -> Path:
    """Figure 3: Figure 1 once per title."""
    figure, panels = plt.subplots(1, len(worlds), figsize=(4 * len(worlds), 3.6), sharey=True, squeeze=False)
    for axes, (title, repeats) in zip(panels[0], worlds.items()):
        reliability_curve(axes, repeats)
        axes.set(title=title)
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(nbins=5))
    panels[0][0].set_ylabel("share that passes")
    legend_below(figure, panels[0][0])
    return save(figure, path)


def world_levels(runs: dict[str, list[dict[str, list]]], y: str) -> dict[tuple, float]:
    """{(world, update): mean of y over the runs of BANDS in that world}: what the arms have in common
    there."""
    found: dict[tuple, list[float]] = {}
    for method in BANDS:
        for curve in runs.get(method, []):
            for update, value in zip(curve["update"], curve[y]):
                if value is not None:
                    found.setdefault((curve["world"], update), []).append(value)
    return {key: float(np.mean(values)) for key, values in found.items()}


def band(
    axes, curves: list[dict[str, list]], x: str, y: str, colour, levels: dict | None = None, **style
) -> None:
    """Mean of y over runs at every x that all have; entries that are None are left out. With `levels` (of
    world_levels) also Student's 95% interval of the runs less their world's level (Cousineau-Morey): how far
    arms can be told apart, whatever worlds do."""
    found: dict[float, list[tuple[float, float]]] = {}
    for curve in curves:
        for a, b, update in zip(curve[x], curve[y], curve["update"]):
            if a is not None and b is not None:
                found.setdefault(a, []).append((b, b - levels[curve["world"], update] if levels else b))
    xs = [a for a in sorted(found) if len(found[a]) == len(curves)]
    mean = np.array([np.mean([value for value, _ in found[a]]) for a in xs])
    axes.plot(xs, mean, color=colour, **style)
    if len(curves) > 1 and levels:
        correction = np.sqrt(
            len(BANDS) / (len(BANDS) - 1)
        )  # Morey: taking out a mean of J arms takes 1 / J of the variance along
        error = correction * half_width(np.array([[rest for _, rest in found[a]] for a in xs]).T)
        axes.fill_between(xs, mean - error, mean + error, color=colour, alpha=0.15, linewidth=0)


def study_curves(runs: dict[str, list[dict[str, list]]], path: Path) -> Path:
    """Figure 2 over many runs: method -> curves of benchmark.study.reproduce. Reward of the policy's own
    samples (line) and of kept samples (dotted), greedy pass@1, sampled pass@1."""
    figure, (reward, greedy, sampled) = plt.subplots(1, 3, figsize=(14, 4))
    every = {name: world_levels(runs, name) for name in ("score", "greedy_pass1", "sampled_pass1")}
    for method, curves in runs.items():
        colour, levels = COLOURS.get(method), every if method in BANDS else dict.fromkeys(every)
        if method != "oracle":  # its reward is on another scale
            band(reward, curves, "update", "score", colour, levels["score"], label=label(method))
            band(reward, curves, "update", "kept_score", colour, linestyle=":", linewidth=1)
        band(greedy, curves, "update", "greedy_pass1", colour, levels["greedy_pass1"], label=label(method))
        band(sampled, curves, "update", "sampled_pass1", colour, levels["sampled_pass1"], label=label(method))
    reward.set(ylabel="reward", title="Reward")
    greedy.set(title="Greedy pass@1, validation problems")
    sampled.set(title="Sampled pass@1, validation problems")
    updates = sorted({update for curves in runs.values() for curve in curves for update in curve["update"]})
    for axes in (reward, greedy, sampled):
        axes.set_xlabel("update")
        axes.set_xticks(
            updates[1:] if axes is reward else updates
        )  # rewards are means since the point before
        axes.grid(alpha=0.3)
    legend_below(
        figure,
        greedy,
        line="mean over runs (reward: all samples of the policy)",
        dotted="reward of the samples trained on",
        band="95% interval of a difference between arms",
    )
    return save(figure, path)


def budget_curves(runs: dict[str, list[dict[str, list]]], path: Path) -> Path:
    """Sampled pass@1 against what it cost: responses generated, optimizer steps, and KL to π_SFT (each run's
    points averaged by update)."""
    figure, panels = plt.subplots(1, 3, figsize=(14, 4), sharey=True)
    every = world_levels(runs, "sampled_pass1")
    for method, curves in runs.items():
        colour = COLOURS.get(method)
        for axes, x in zip(panels, ("episodes", "optimizer_step")):
            band(
                axes,
                curves,
                x,
                "sampled_pass1",
                colour,
                every if method in BANDS else None,
                label=label(method),
            )
        points = mean_points(curves, "kl", "sampled_pass1")
        panels[2].plot(
            points[:, 0], points[:, 1], color=colour, marker="o", markersize=3, label=label(method)
        )
    for axes, title in zip(
        panels, ("responses generated", "optimizer steps", "KL to π_SFT, nats per response")
    ):
        axes.set_xlabel(title)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("sampled pass@1, validation problems")
    legend_below(figure, panels[0], line="mean over runs", band="95% interval of a difference between arms")
    return save(figure, path)


def mean_points(curves: list[dict[str, list]], *names: str) -> np.ndarray:
    """Curves of several runs -> (evaluations, len(names)): means over runs, as far as the shortest run goes,
    without empty points."""
    lists = [[point for point in zip(*(c[n] for n in names)) if None not in point] for c in curves]
    shortest = min(map(len, lists))
    return np.mean([points[:shortest] for points in lists], axis=0).reshape(shortest, len(names))


def over_optimisation(panels: dict[str, dict[str, list[dict[str, list]]]], path: Path) -> Path:
    """One panel a title: for every method the mean sampled pass@1 (line) and reward (dotted, right axis)
    against KL."""
    columns = min(3, len(panels))
    figure, grid = plt.subplots(
        -(-len(panels) // columns),
        columns,
        figsize=(5 * columns, 3.4 * -(-len(panels) // columns)),
        squeeze=False,
        sharey=True,
    )
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for i, (axes, (title, runs)) in enumerate(zip(grid.flat, panels.items())):
        right = axes.twinx()
        for method, curves in runs.items():
            points = mean_points(curves, "kl", "sampled_pass1", "sampled_reward")
            axes.plot(
                points[:, 0],
                points[:, 1],
                color=COLOURS.get(method),
                marker="o",
                markersize=3,
                label=label(method),
            )
            right.plot(points[:, 0], points[:, 2], color=COLOURS.get(method), linestyle=":")
        right.set(ylabel="reward" if i % columns == columns - 1 else "", ylim=(-0.1, 0.8))
        axes.set(title=title, xlabel="KL to π_SFT, nats", ylabel="sampled pass@1" if i % columns == 0 else "")
        axes.title.set_fontsize(9)
        axes.grid(alpha=0.3)
    legend_below(figure, grid[0][0], line="sampled pass@1", dotted="reward (right axis)")
    return save(figure, path)


def alarm_curves(runs: dict[str, list[tuple[dict, dict]]], path: Path) -> Path:
    """method -> [(curve, alarm)]: R² of the probe (left) and sampled pass@1 (right) of every run over
    updates, a circle at the alarm."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for method, pairs in runs.items():
        for i, (curve, alarm) in enumerate(pairs):
            name, colour = (label(method) if i == 0 else None), COLOURS.get(method)
            r2 = [float("nan") if v is None else v for v in alarm["probe_r2"]]
            left.plot(alarm["updates"], r2, color=colour, alpha=0.6, label=name)
            right.plot(curve["update"], curve["sampled_pass1"], color=colour, alpha=0.6, label=name)
            if alarm["update"] in curve["update"]:
                at = curve["update"].index(alarm["update"])
                right.plot(
                    alarm["update"], curve["sampled_pass1"][at], "o", color=colour, markerfacecolor="none"
                )
    left.set(xlabel="update", ylabel="R² of the reward model on a probe")
    right.set(xlabel="update", ylabel="sampled pass@1, validation problems")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    legend_below(figure, right, line="one run", circle="where the alarm rings")
    return save(figure, path)


def r2_bars(
    table: dict[str, dict[str, float]],
    path: Path,
    title: str = "R² of each filter on samples of the SFT policy",
) -> Path:
    """A point and a 95% interval a filter, and how no filter fares. `table`: filter -> {"r2", "low", "high"}."""
    names = list(table)
    r2, low, high = (np.array([table[n][key] for n in names]) for key in ("r2", "low", "high"))
    figure, axes = plt.subplots(figsize=(7, 3.8))
    x = np.arange(len(names))
    axes.vlines(
        x, low, high, color="#4c78a8", linewidth=5, alpha=0.35, label="95% interval, bootstrap over prompts"
    )
    axes.plot(x, r2, "o", color="#1f3b63", label="R²")
    if "none" in table:
        axes.axhline(table["none"]["r2"], color="#7f7f7f", linestyle="--", linewidth=1, label="no filter")
    axes.set_xticks(x, [label(n) for n in names], rotation=30, ha="right", fontsize=8)
    rows = table[names[0]].get("rows")
    axes.set(ylabel=f"R², {rows} rows of each" if rows else "R²", ylim=(0, 1), title=title)
    axes.grid(alpha=0.3, axis="y")
    legend_below(figure, axes)
    return save(figure, path)


def markdown_table(header: list[str], rows: list[list]) -> str:
    """Aligned markdown table; numbers are shown with three decimals, None as `missing`."""

    def cell(value) -> str:
        return "missing" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)

    lines = [header, *[[cell(v) for v in row] for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    out = ["| " + " | ".join(v.ljust(w) for v, w in zip(line, widths)) + " |" for line in lines]
    return "\n".join([out[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *out[1:]])
