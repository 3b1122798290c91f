"""The main job: from nothing to a trained PF-PPO policy on the embedded world, its table and its picture.

    python -m benchmark.quickstart --output_dir output/quickstart --seed 1

About eight minutes on two CPU cores. Stages and files are those of benchmark/pipeline.py; a killed run
continues. Leaves `summary.json` (methods -> sft, ppo_m, br, bw -> greedy_pass1, greedy_pass1_se,
sampled_pass1, reward, kl, r2, seconds), `table.md`, `training.png` (Figure 2), `reliability.png` (Figure 1)
and `r2.png` in the output folder.
"""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro

from benchmark import pipeline, records
from benchmark.study import figures

METHODS = ("ppo_m", "br", "bw")


@dataclass
class Args:
    output_dir: str = "output/quickstart"
    """folder for everything; a folder made with other settings is refused"""
    seed: int = 1
    """seed of the world, of every training stage and of all sampling"""
    updates: int = 20
    """PPO updates per method"""
    num_sft: int = 6000
    """demonstrations in the world"""
    sft_epochs: int = 16
    """passes over the demonstrations"""
    num_preference: int = 4000
    """prompts for preference data"""
    num_valid: int = 300
    """validation problems (training curves, R²)"""
    num_test: int = 600
    """test problems (the final table, looked at once)"""
    parallel: int = 2
    """PPO runs at a time, one thread each"""


def read_curve(folder: Path, tag: str) -> list[tuple[float, float]]:
    rows = records.read_rows(folder / "metrics.jsonl")
    return [(row["step"], row[tag]) for row in rows if tag in row]


def main(args: Args) -> dict:
    start, folder = time.time(), Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    settings = asdict(args)
    if (folder / "quickstart.json").is_file():
        old = json.loads((folder / "quickstart.json").read_text())
        changed = [k for k in settings if k not in ("output_dir", "parallel") and old.get(k) != settings[k]]
        if changed:
            raise SystemExit(
                f"--output_dir {folder} holds a run with another {', '.join(changed)}; name a new folder or "
                "delete this one"
            )
    elif any(folder.iterdir()):
        raise SystemExit(f"--output_dir {folder} is not empty and holds no quickstart run; name a new folder")
    records.write_json(folder / "quickstart.json", settings)
    seconds_file = folder / "seconds.json"
    seconds = json.loads(seconds_file.read_text()) if seconds_file.is_file() else {}
    torch.set_num_threads(1)

    def stage(name: str, text: str, work):
        """Run one stage, say so, and remember how long it took when it was first done."""
        print(f"\n== {text} ({time.time() - start:.0f} s)", flush=True)
        began = time.time()
        out = work()
        seconds.setdefault(name, round(time.time() - began, 1))
        records.write_json(seconds_file, seconds)
        return out

    stage(
        "world",
        "1/7 the embedded world",
        lambda: pipeline.world(
            folder,
            args.seed,
            num_sft=args.num_sft,
            num_preference=args.num_preference,
            num_valid=args.num_valid,
            num_test=args.num_test,
        ),
    )
    sft = stage(
        "sft",
        "2/7 supervised fine-tuning",
        lambda: pipeline.sft(folder, args.seed, threads=1, epochs=args.sft_epochs),
    )
    stage(
        "preferences",
        "3/7 preference data: sample, execute, pair",
        lambda: pipeline.preferences(folder, args.seed),
    )
    rm = stage("rm", "4/7 reward model (Eq. 1, 2)", lambda: pipeline.rm(folder, args.seed, threads=1))
    figures.reliability(
        json.loads((folder / "rm/reliability.json").read_text())["repeats"], folder / "reliability.png"
    )
    valid = records.read_rows(folder / "world/valid.jsonl")
    table = stage(
        "r2",
        "5/7 R² of every filter on the SFT policy, before any RL",
        lambda: pipeline.r2_table(sft, rm, valid, folder / "r2_filters.json", args.seed),
    )
    figures.r2_bars(table, folder / "r2.png")
    print(
        figures.markdown_table(
            ["filter", "R²", "95% low", "95% high"],
            [[n, t["r2"], t["low"], t["high"]] for n, t in table.items()],
        )
    )

    def train() -> None:
        with ThreadPoolExecutor(args.parallel) as pool:
            runs = [pool.submit(pipeline.ppo, folder, method, args.seed, args.updates) for method in METHODS]
            [run.result() for run in runs]

    stage(
        "ppo",
        f"6/7 PPO-M, PF-PPO BR, PF-PPO BW: {args.updates} updates each, {args.parallel} at a time",
        train,
    )

    def results() -> dict:
        test, found = records.read_rows(folder / "world/test.jsonl"), {}
        for method in ("sft", *METHODS):
            out = folder / f"{method}_test.json"
            if not out.is_file():
                policy = sft if method == "sft" else folder / method / "policy"
                records.write_json(out, pipeline.result(policy, sft, rm, test, args.seed))
                if method != "sft":  # the checkpoint that was best on the validation problems
                    best = pipeline.result(folder / method / "policy_best", sft, rm, test, args.seed)
                    records.write_json(out, {**json.loads(out.read_text()), "best_checkpoint": best})
            found[method] = json.loads(out.read_text())
            rows = records.read_rows(folder / method / "metrics.jsonl") if method != "sft" else []
            found[method]["seconds"] = (
                round(sum(r.get("seconds/update", 0.0) for r in rows), 1) if rows else seconds["sft"]
            )
        return found

    methods = stage("result", "7/7 the test problems, once", results)
    curves = {
        m: {
            "sampled": read_curve(folder / m, "objective/score"),
            "kept": read_curve(folder / m, "filter/score"),
            "pass1": read_curve(folder / m, "eval/greedy_pass1"),
        }
        for m in METHODS
    }
    figures.training_curves(curves, folder / "training.png")
    rows = [
        [
            figures.label(m),
            f"{r['greedy_pass1']:.3f} ± {r['greedy_pass1_se']:.3f}",
            r.get("best_checkpoint", r)["greedy_pass1"],
            r["sampled_pass1"],
            r["reward"],
            r["kl"],
            r["r2"],
            f"{r['seconds']:.0f}",
        ]
        for m, r in methods.items()
    ]
    text = figures.markdown_table(
        [
            "method",
            "greedy pass@1 ± SE",
            "best checkpoint",
            "sampled pass@1",
            "reward",
            "KL",
            "R²",
            "seconds",
        ],
        rows,
    )
    (folder / "table.md").write_text(text + "\n")
    summary = {
        "methods": methods,
        "r2_sft": table,
        "preferences": json.loads((folder / "preferences.json").read_text()),
        "seconds": seconds,
        "seconds_total": round(sum(seconds.values()), 1),
        "settings": settings,
        "commit": records.commit(),
        "hardware": records.hardware(),
    }
    records.write_json(folder / "summary.json", summary)
    print(
        f"\n{text}\n\n{len(records.read_rows(folder / 'world/test.jsonl'))} unseen problems; "
        f"{time.time() - start:.0f} s in all. "
        f"Pictures: {folder / 'training.png'}, {folder / 'reliability.png'}, {folder / 'r2.png'}"
    )
    return summary


if __name__ == "__main__":
    main(tyro.cli(Args))
