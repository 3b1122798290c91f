"""Our curves over recorded ones: table, csv, json and picture.

  python -m benchmark.lm_human_preferences.plot --runs runs/lmhp/policy_steady --output_dir DIR \\
      --bands benchmark/lm_human_preferences/reference/bands_policy_steady.json

`--runs` is a folder of benchmark.lm_human_preferences.run (its seed_*/metrics.jsonl are read) or a
`metrics.jsonl.gz` that an earlier call wrote. Writes NAME.png, NAME.csv, NAME.json, NAME.md,
NAME_metrics.jsonl.gz and NAME_runs.jsonl into DIR, NAME being the name of the runs folder.

Per tag: `distance`, the root mean square over steps between our mean over seeds and the recorded mean;
`split-half`, the same between two halves of the recorded seeds; the means of the last sixth of the steps with
their standard errors. A tag agrees when the distance is at most 1.5 times split-half and the last-window
means are within two combined standard errors.
"""

import argparse
import csv
import gzip
import json
import math
from pathlib import Path

import numpy as np

from benchmark.records import half_width, read_rows

# our tag -> lm-human-preference-details' tag; its `_avg` tags are means over epochs and minibatches, as all
# of ours are
TAGS = {
    "objective/shaped_score": "objective/scores",
    "objective/kl": "objective/kl",
    "objective/entropy": "objective/entropy",
    "objective/kl_coef": "objective/kl_coef",
    "objective/score_total": "objective/score_total",
    "objective/non_score_reward": "objective/non_score_reward",
    "ppo/loss/policy": "ppo/loss/policy_avg",
    "ppo/loss/value": "ppo/loss/value_avg",
    "ppo/returns/mean": "ppo/returns/mean",
    "ppo/returns/var": "ppo/returns/var",
    "ppo/policy/entropy": "ppo/policy/entropy_avg",
    "ppo/policy/approxkl": "ppo/policy/approxkl_avg",
    "ppo/policy/clipfrac": "ppo/policy/clipfrac_avg",
    "ppo/val/clipfrac": "ppo/val/clipfrac_avg",
    "ppo/val/mean": "ppo/val/mean",
    "ppo/val/var": "ppo/val/var",
    "ppo/lr": "ppo/lr",
    "train/loss": "train/loss",
    "train/accuracy": "train/accuracy",
    "test/accuracy": "test/accuracy",
    "train/kl": "train/kl",
    "train/lr": "train/lr",
}
JUDGED = (
    "objective/shaped_score",
    "objective/kl",
    "objective/entropy",
    "ppo/loss/value",
    "train/loss",
    "train/accuracy",
    "test/accuracy",
)
PICTURE = (
    "objective/shaped_score",
    "objective/kl",
    "objective/entropy",
    "objective/kl_coef",
    "objective/score_total",
    "ppo/loss/policy",
    "ppo/loss/value",
    "ppo/returns/mean",
    "ppo/returns/var",
    "train/loss",
    "train/accuracy",
    "test/accuracy",
    "train/kl",
)
DISTANCE_LIMIT, STANDARD_ERRORS = 1.5, 2.0


def read_runs(path: Path) -> dict[int, list[dict]]:
    """Seed -> lines of metrics, from a folder of benchmark.lm_human_preferences.run (finished seeds only) or
    from a metrics.jsonl.gz."""
    seeds: dict[int, list[dict]] = {}
    if path.suffix == ".gz":
        for line in read_rows(path):
            seeds.setdefault(line.pop("seed"), []).append(line)
        return seeds
    if not (path / "runs.jsonl").is_file():
        advice = "give a folder of benchmark.lm_human_preferences.run with at least one finished seed"
        raise FileNotFoundError(f"--runs {path}: no runs.jsonl; {advice}")
    for run in read_rows(path / "runs.jsonl"):
        seeds[run["seed"]] = read_rows(path / f"seed_{run['seed']}" / "metrics.jsonl")
    return seeds


def curve(seeds: dict[int, list[dict]], tag: str, steps: list[int]) -> np.ndarray | None:
    """(seeds, steps) values of a tag; None where no seed logged it. Raises ValueError where a seed lacks a
    step."""
    rows = []
    for seed, lines in sorted(seeds.items()):
        values = {line["step"]: line[tag] for line in lines if tag in line}
        if not values:
            return None
        missing = [step for step in steps if step not in values]
        if missing:
            lacks = f"lacks {len(missing)} of {len(steps)} recorded steps, first {missing[0]}"
            raise ValueError(f"seed {seed}: {tag} {lacks}; finish the run")
        rows.append([values[step] for step in steps])
    return np.array(rows, dtype=np.float64)


def compare_tag(ours: np.ndarray, band: dict) -> dict[str, float | bool]:
    """ours (seeds, steps) against a recorded band -> distance, split-half, last-window means with standard
    errors, agreement."""
    window = max(1, ours.shape[1] // 6)
    last, recorded = ours[:, -window:].mean(1), np.array(band["last_window"]["per_seed"])
    found = {
        "distance": float(np.sqrt(np.square(ours.mean(0) - np.array(band["mean"])).mean())),
        "split_half": band["split_half_rms"],
        "last_ours": float(last.mean()),
        "last_ours_se": float(last.std(ddof=1) / math.sqrt(len(last))) if len(last) > 1 else math.nan,
        "last_recorded": float(recorded.mean()),
        "last_recorded_se": float(recorded.std(ddof=1) / math.sqrt(len(recorded))),
    }
    combined = math.hypot(found["last_ours_se"], found["last_recorded_se"])
    gap = abs(found["last_ours"] - found["last_recorded"])
    tiny = 1e-6 * float(np.abs(band["mean"]).max())  # a schedule has no spread over seeds
    found["last_gap_in_se"] = gap / combined if combined > tiny else 0.0 if gap <= tiny else math.inf
    found["agrees"] = bool(
        found["distance"] <= DISTANCE_LIMIT * found["split_half"] + tiny
        and found["last_gap_in_se"] <= STANDARD_ERRORS
    )
    return found


def table(results: dict[str, dict]) -> str:
    """Markdown table, one row per tag; * marks the tags that the comparison is judged by."""
    columns = ("tag (* judged)", "distance", "split-half", "ratio", "last window, ours")
    columns += ("last window, recorded", "gap in SE", "agrees")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for tag, r in results.items():
        ratio = r["distance"] / r["split_half"] if r["split_half"] else 0.0
        cells = [f"{tag}{'*' if tag in JUDGED else ''}", f"{r['distance']:.4g}", f"{r['split_half']:.4g}"]
        cells += [f"{ratio:.2f}", f"{r['last_ours']:.4g} ± {r['last_ours_se']:.2g}"]
        cells += [f"{r['last_recorded']:.4g} ± {r['last_recorded_se']:.2g}", f"{r['last_gap_in_se']:.2f}"]
        lines.append(f"| {' | '.join([*cells, 'yes' if r['agrees'] else 'NO'])} |")
    return "\n".join(lines) + "\n"


def draw(
    path: Path, title: str, curves: dict[str, np.ndarray], bands: dict[str, dict], label: str = "ours"
) -> None:
    """One panel per tag: our mean and 95% band over the recorded mean and band."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tags = [tag for tag in PICTURE if tag in curves]
    columns = min(3, len(tags))
    rows = math.ceil(len(tags) / columns)
    sizes = dict(figsize=(4.2 * columns, 2.7 * rows), squeeze=False, layout="constrained")
    figure, axes = plt.subplots(rows, columns, **sizes)
    for axis, tag in zip(axes.flat, tags):
        ours, band = curves[tag], bands[TAGS[tag]]
        mean, half = ours.mean(0), np.nan_to_num(half_width(ours))  # one seed: no band
        recorded = (band["mean"], band["ci95_low"], band["ci95_high"], "lm-human-preference-details")
        own = (mean, mean - half, mean + half, f"{label} ({len(ours)} seeds)")
        for colour, (line, below, above, name) in (("tab:orange", recorded), ("tab:blue", own)):
            axis.fill_between(band["steps"], below, above, color=colour, alpha=0.3, linewidth=0)
            axis.plot(band["steps"], line, color=colour, linewidth=1.2, label=name)
        low = min(np.min(band["ci95_low"]), ours.mean(0).min())
        high = max(np.max(band["ci95_high"]), ours.mean(0).max())
        axis.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
        axis.set_title(tag, fontsize=10)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    for axis in list(axes.flat)[len(tags) :]:
        axis.axis("off")
    axes.flat[0].legend(fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("step", fontsize=9)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def write_metrics(path: Path, seeds: dict[int, list[dict]]) -> None:
    """Every compared number of every seed, seven digits, one gzipped line per seed and step."""
    with gzip.open(path, "wt", compresslevel=9) as file:
        for seed, lines in sorted(seeds.items()):
            for line in lines:
                kept = {tag: float(f"{line[tag]:.7g}") for tag in TAGS if tag in line}
                row = {"seed": seed, "step": line["step"], **kept}
                if kept:
                    file.write(json.dumps(row, separators=(",", ":")) + "\n")


def main(runs: Path, bands: Path, output_dir: Path, label: str = "ours") -> int:
    """Writes the files; returns the number of judged tags that disagree."""
    name, recorded, seeds = runs.name.split("_metrics.")[0], json.loads(bands.read_text()), read_runs(runs)
    curves, results = {}, {}
    for ours, theirs in TAGS.items():
        if "mean" not in recorded["tags"].get(theirs, {}):
            continue
        values = curve(seeds, ours, recorded["tags"][theirs]["steps"])
        if values is not None:
            curves[ours], results[ours] = values, compare_tag(values, recorded["tags"][theirs])
    if not results:
        raise ValueError(f"--runs {runs} and --bands {bands} share no tag; give those of the same stage")
    output_dir.mkdir(parents=True, exist_ok=True)
    text = table(results)
    counts = f"seeds {sorted(seeds)} against {recorded['n_seeds']} recorded seeds ({bands.name})"
    print(f"{name}: {counts}\n{text}")
    (output_dir / f"{name}.md").write_text(text)
    judged = [tag for tag in JUDGED if tag in results]
    summary = {"seeds": sorted(seeds), "recorded_seeds": recorded["seeds"], "bands": bands.name}
    summary |= {"judged": judged, "tags": results}
    (output_dir / f"{name}.json").write_text(json.dumps(summary, indent=1) + "\n")
    with (output_dir / f"{name}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["tag", "step", "ours_mean", "ours_sd", "recorded_mean", "recorded_sd"])
        for tag, values in curves.items():
            band = recorded["tags"][TAGS[tag]]
            sd = values.std(0, ddof=1) if len(values) > 1 else np.full(values.shape[1], np.nan)
            mean = [values[:, i].mean() for i in range(values.shape[1])]
            for step, *numbers in zip(band["steps"], mean, sd, band["mean"], band["sd"]):
                writer.writerow([tag, step, *(f"{x:.6g}" for x in numbers)])
    draw(output_dir / f"{name}.png", f"{name}: mean and 95% band over seeds", curves, recorded["tags"], label)
    if runs.is_dir():
        write_metrics(output_dir / f"{name}_metrics.jsonl.gz", seeds)
        (output_dir / f"{name}_runs.jsonl").write_text((runs / "runs.jsonl").read_text())
    wrong = [tag for tag in judged if not results[tag]["agrees"]]
    names = f": {', '.join(wrong)}" if wrong else ""
    print(f"{len(judged) - len(wrong)} judged tags agree, {len(wrong)} do not{names}")
    return len(wrong)


if __name__ == "__main__":
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--runs", required=True, type=Path)
    parser.add_argument("--bands", required=True, type=Path)
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument("--label", default="ours", help="name of the runs in the picture")
    main(**vars(parser.parse_args()))
