"""Tables, statistics and pictures of a study, from its units.jsonl alone; the paper's numbers stand beside
ours.

    python -m benchmark.study.tables benchmark/results/DATE-table2

writes `tables.md`, one `NAME.csv` per table and the pictures into that folder. Nothing is filled by hand: a
missing unit shows as `missing`, `–` marks a cell that does not exist. Below each table stand sentences made
from the numbers: what the paper says, what we found, and whether it agrees, where "agrees" needs a 95%
interval that leaves out 0.

Intervals are Student t. Units of one world share mistakes, SFT policy and reward model: an interval of a
level is over the means of worlds (few of them, hence wide). Differences are paired by (world, seed), so that
worlds drop out; their interval is over pairs, and the same is computed over the means of worlds, which alone
decides where many cells are pooled.
"""

import csv
import json
import math
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

from benchmark.records import finished_rows, half_width
from benchmark.study import figures

# PAPER, Table 2: pass@1 greedy on HumanEval, MBPP, LeetCode.
PAPER_TABLE2 = {
    "sft": (74.2, 70.8, 15.2),
    "raft": (76.9, 71.3, 17.8),
    "bond": (80.8, 75.2, 30.0),
    "dpo": (78.4, 73.7, 23.0),
    "ipo": (78.2, 72.9, 23.2),
    "kto": (77.9, 72.5, 22.4),
    "iterative_dpo": (78.1, 74.8, 23.8),
    "ppo_s": (78.1, 73.8, 25.2),
    "ppo_m": (80.2, 75.0, 29.8),
    "bon": (75.8, 71.7, 16.8),
    "br": (82.9, 75.9, 33.0),
    "bw": (82.4, 76.2, 30.4),
    "random": None,
    "oracle": None,
}
# PAPER, Table 1: R² by policy for no filter, BoN, BR, BW.
PAPER_TABLE1 = {
    "sft": (0.886, 0.454, 0.922, 0.952),
    "middle": (0.907, 0.389, 0.935, 0.956),
    "final": (0.876, 0.431, 0.916, 0.946),
}
# PAPER, sections 4 and 5.4: R² on the SFT policy, HumanEval, MBPP. Its PPO-S figure has no filter over N = 5
# and is left out of R².
PAPER_TABLE3 = {
    "ppo_s": (0.782, 78.1, 73.8),
    "ppo_m": (0.886, 80.8, 75.0),
    "bon": (0.454, 75.8, 71.7),
    "br": (0.841, 82.9, 75.9),
    "bw": (0.952, 82.4, 76.2),
    "top": (0.621, 80.5, 71.2),
    "top_random": (0.889, 81.9, 75.3),
    "top_bottom": (0.927, 81.7, 75.4),
    "pow_1": (0.926, 81.0, 74.2),
    "pow_2": (0.939, 81.3, 75.4),
    "pow_3": (0.946, 81.9, 76.5),
    "random": None,
}
# PAPER, Table 6: prompts x responses, reward-model forwards, policy and critic forward+backward.
PAPER_TABLE6 = {
    "ppo_s": ("5n x 1", 5, 5),
    "ppo_m": ("n x 5", 5, 5),
    "bon": ("n x 5", 5, None),
    "br": ("n x 5", 5, 2),
    "bw": ("n x 5", 5, 2),
    "random": ("n x 5", None, None),
}
BASELINE_ROWS = ("raft", "bond", "dpo", "ipo", "kto", "iterative_dpo")
FILTER_OF = {"ppo_m": "none"}  # a method's filter has its own name otherwise
NOT_THERE = "–"


class Table(NamedTuple):
    """What goes into one section of tables.md; `name` is the csv's."""

    name: str
    title: str
    header: list[str]
    rows: list[list]
    sentences: list[str]


# ---------------------------------------------------------------- statistics


def mean_interval(values: list[float], level: float = 0.95) -> tuple[float, float | None, float | None]:
    """(mean, low, high) of Student's t-interval; low and high are None for fewer than two values."""
    x = np.asarray(values, dtype=float)
    if len(x) < 2:
        return float(x.mean()), None, None
    half = half_width(x, level)
    return float(x.mean()), float(x.mean() - half), float(x.mean() + half)


def t_test(values: list[float]) -> float | None:
    """Two-sided p-value of Student's t against mean 0; None for fewer than two values. Equal values: 1 when
    they are 0, else 0."""
    x = np.asarray(values, dtype=float)
    if len(x) < 2:
        return None
    if np.ptp(x) == 0:
        return float(x[0] == 0)
    t = x.mean() / (x.std(ddof=1) / np.sqrt(len(x)))
    return float(2 * stats.t.sf(abs(t), len(x) - 1))


# Study map: preference pairs (0: all) and noise in the middle of the reward range; KL coefficients; responses
# a prompt.
MAP_QUALITY = ((300, 0.0), (1000, 0.0), (0, 0.0), (0, 0.5), (0, 1.0))
MAP_KL = (0.01, 0.05, 0.2)
MAP_N = (2, 5, 10, 16)


def planned_cells(full: bool) -> list[tuple[int, float, float, int]]:
    """(pairs, noise, kl_coef, N) of study map: a cross through the middle, or every combination."""
    if full:
        return [(*quality, kl, n) for quality in MAP_QUALITY for kl in MAP_KL for n in MAP_N]
    cross = [(*quality, 0.05, 5) for quality in MAP_QUALITY]
    return cross + [(1000, 0.0, kl, 5) for kl in (0.01, 0.2)] + [(0, 0.0, 0.05, n) for n in (2, 10, 16)]


def world_means(values: dict[tuple[int, int], float]) -> list[float]:
    """{(world, seed): value} -> mean of each world."""
    worlds = defaultdict(list)
    for (world, _), value in values.items():
        worlds[world].append(value)
    return [float(np.mean(worlds[world])) for world in sorted(worlds)]


class Difference(NamedTuple):
    """A paired difference; `low`, `high`, `p` over units, the same with `world_` over means of worlds."""

    mean: float
    low: float | None
    high: float | None
    p: float | None
    world_low: float | None
    world_high: float | None
    world_p: float | None
    pairs: int
    worlds: int


def paired_difference(a: dict[tuple[int, int], float], b: dict[tuple[int, int], float]) -> Difference | None:
    """Mean of a - b over the (world, seed) that both have; None when there is none."""
    both = {key: a[key] - b[key] for key in sorted(a.keys() & b.keys())}
    if not both:
        return None
    mean, low, high = mean_interval(list(both.values()))
    means = world_means(both)
    _, world_low, world_high = mean_interval(means)
    return Difference(
        mean,
        low,
        high,
        t_test(list(both.values())),
        world_low,
        world_high,
        t_test(means),
        len(both),
        len(means),
    )


def rank_correlation(x: list[float], y: list[float]) -> tuple[float, float] | None:
    """Spearman's ρ and its p-value; None for fewer than three points."""
    if len(x) < 3:
        return None
    rho, p = stats.spearmanr(x, y)
    return float(rho), float(p)


def value_at(xs: list[float], ys: list[float], x: float) -> float | None:
    """y where the curve through (xs, ys) first reaches x, linear in between; None when it never does."""
    for (x0, y0), (x1, y1) in zip(zip(xs, ys), zip(xs[1:], ys[1:])):
        if x0 <= x <= x1 and x1 > x0:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return ys[0] if xs and xs[0] == x else None


# ---------------------------------------------------------------- units


class Units:
    """Lines of units.jsonl; a unit run twice counts as it was found last."""

    def __init__(self, lines: list[dict]):
        self.lines = list(
            {(u["method"], u.get("variant", ""), u["world"], u["seed"]): u for u in lines}.values()
        )

    def of(self, method: str, variant: str = "") -> dict[tuple[int, int], dict]:
        """{(world, seed): line} of a method."""
        return {
            (u["world"], u["seed"]): u
            for u in self.lines
            if u["method"] == method and u.get("variant", "") == variant
        }

    def values(self, method: str, name: str, variant: str = "") -> dict[tuple[int, int], float]:
        """{(world, seed): value}; `best.NAME` reads the best checkpoint's."""
        best, _, inner = name.rpartition(".")
        found = {
            key: (u.get(best) or {} if best else u).get(inner) for key, u in self.of(method, variant).items()
        }
        return {key: value for key, value in found.items() if value is not None}

    def r2(
        self, method: str, policy: str, name: str, key: str = "r2", variant: str = ""
    ) -> dict[tuple[int, int], float]:
        """{(world, seed): R² of filter `name` on the samples of a policy (sft, middle, final)}; what was
        measured at unequal rows is missing."""
        found = {
            unit: u.get("r2_filters", {}).get(policy, {}).get(name)
            for unit, u in self.of(method, variant).items()
        }
        return {
            unit: r2[key]
            for unit, r2 in found.items()
            if isinstance(r2, dict) and "rows" in r2 and np.isfinite(r2[key])
        }

    def methods(self) -> list[str]:
        return list(dict.fromkeys(u["method"] for u in self.lines))


def number(value: float | None, digits: int = 3, sign: bool = False) -> str:
    return NOT_THERE if value is None else f"{value:{'+' if sign else ''}.{digits}f}"


def with_interval(values: dict[tuple, float]) -> str | None:
    """{(world, ...): value} -> `0.612 [0.590, 0.634]`, mean and interval over the means of worlds, or None
    (missing) without values."""
    if not values:
        return None
    mean, low, high = mean_interval(world_means(values))
    return number(mean) if low is None else f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def p_value(p: float | None) -> str:
    return "p unknown" if p is None else "p < 0.001" if p < 0.001 else f"p {p:.3f}"


def with_p(difference: Difference | None) -> str | None:
    """`+0.012 [-0.004, +0.028], p 0.120, worlds p 0.300`, or None (missing)."""
    if difference is None:
        return None
    d = difference
    interval = "" if d.low is None else f" [{d.low:+.3f}, {d.high:+.3f}]"
    return f"{d.mean:+.3f}{interval}, {p_value(d.p)}; worlds {p_value(d.world_p)}"


def verdict(difference: Difference | None, paper_sign: int) -> str:
    """`agrees`, `disagrees` or `cannot tell` about a difference that the paper has with this sign; "worlds"
    must not contradict."""
    if difference is None or difference.low is None:
        return "cannot tell (too few units)"
    if difference.low <= 0 <= difference.high:
        return "cannot tell"
    sign = "agrees" if (difference.mean > 0) == (paper_sign > 0) else "disagrees"
    sure = difference.world_low is not None and not difference.world_low <= 0 <= difference.world_high
    return sign + (", also over worlds" if sure else ", but not over so few worlds")


def outcome(difference: Difference | None, over_worlds: bool = False) -> str:
    """`wins`, `loses` or `no difference shown`, where the paper says nothing; `too few units` without an
    interval. With `over_worlds` the means of worlds alone decide, as where many units of few worlds are
    pooled."""
    if difference is None or difference.low is None or (over_worlds and difference.world_low is None):
        return "too few units"
    over = difference.world_low is not None and not difference.world_low <= 0 <= difference.world_high
    if not over if over_worlds else difference.low <= 0 <= difference.high:
        return "no difference shown"
    return ("wins" if difference.mean > 0 else "loses") + (
        ", also over worlds" if over else ", but not over so few worlds"
    )


def compare(
    units: Units, a: str, b: str, paper: str, paper_sign: int, name: str = "sampled_pass1", variant: str = ""
) -> str:
    """One sentence: what the paper says of a against b (paper_sign 0: nothing), and what we find."""
    d = paired_difference(units.values(a, name, variant), units.values(b, name, variant))
    shown = {
        "sampled_pass1": "sampled pass@1",
        "greedy_pass1": "greedy pass@1",
        "best.greedy_pass1": "greedy pass@1 of the best checkpoint",
        "best_of_5": "best of 5",
    }[name]
    found = "missing" if d is None else f"{with_p(d)} ({d.pairs} pairs, {d.worlds} worlds)"
    judged = verdict(d, paper_sign) if paper_sign else outcome(d)
    return (
        f"{figures.label(a)} against {figures.label(b)}, {shown}: paper {paper}; here {found}: **{judged}**."
    )


# ---------------------------------------------------------------- tables of study table2


def table1(units: Units) -> Table:
    """R² of filters on the SFT, middle and last policy, all trained methods together."""
    names, columns = ("none", "random", "bon", "br", "bw"), {"none": 0, "bon": 1, "br": 2, "bw": 3}
    header = ["policy", "units", *[figures.label(n) + (" (paper)" if n in columns else "") for n in names]]
    rows, found = [], {}
    for stage in ("sft", "middle", "final"):
        for key in ("r2", "all_rows"):
            for name in names:
                found[stage, name, key] = {
                    (world, f"{method} {seed}"): value
                    for method in units.methods()
                    for (world, seed), value in units.r2(method, stage, name, key).items()
                }
        shown = [with_interval(found[stage, name, "r2"]) for name in names]
        cells = [
            text and text + (f" ({PAPER_TABLE1[stage][columns[name]]:.3f})" if name in columns else "")
            for text, name in zip(shown, names)
        ]
        rows.append([stage, len(found[stage, "none", "r2"]), *cells])
    sentences = []
    for stage in ("sft", "middle", "final"):
        for a, b in (("bon", "none"), ("br", "none"), ("bw", "none")):
            d = paired_difference(found[stage, a, "r2"], found[stage, b, "r2"])
            paper = PAPER_TABLE1[stage][columns[a]] - PAPER_TABLE1[stage][0]
            sentences.append(
                f"R² of {figures.label(a)} against no filter on the {stage} policy: paper {paper:+.3f}; here "
                f"{'missing' if d is None else with_p(d)}: **{verdict(d, 1 if paper > 0 else -1)}**."
            )
    every = [
        f"{figures.label(name)} {np.mean(list(values.values())):.3f}"
        for name in names
        if (values := found["sft", name, "all_rows"])
    ]
    sentences.append(
        "Why equal rows: small groups have noisy means, which lowers R², so on all rows that a filter keeps "
        "no filter (N rows a prompt) "
        "would lead for its size alone. That way, on the sft policy: " + (", ".join(every) or "missing") + "."
    )
    return Table(
        "table1",
        "Table 1: R² of each filter by policy (20 groups of equal count from as many rows of every filter as "
        "BoN leaves; validation "
        "problems, 10 responses each, in groups of N = 5)",
        header,
        rows,
        sentences,
    )


def results_rows(units: Units, names) -> list[list]:
    """Per method: paper, units, greedy and sampled pass@1 of the last and the best checkpoint, KL."""
    rows = []
    for name in names:
        paper = PAPER_TABLE2.get(name)
        best = "" if name == "sft" else "best."
        rows.append(
            [
                figures.label(name),
                NOT_THERE if paper is None else " / ".join(map(str, paper)),
                len(units.of(name)),
                *[
                    with_interval(units.values(name, key))
                    for key in (
                        "greedy_pass1",
                        "sampled_pass1",
                        best + "greedy_pass1",
                        best + "sampled_pass1",
                        "kl",
                    )
                ],
            ]
        )
    return rows


def table2(units: Units) -> list[Table]:
    header = [
        "method",
        "paper HumanEval / MBPP / LeetCode",
        "units",
        "greedy pass@1, last",
        "sampled pass@1, last",
        "greedy, best",
        "sampled, best",
        "KL",
    ]
    claims = [
        compare(units, "br", "ppo_m", "+2.7 / +0.9 / +3.2", 1),
        compare(units, "bw", "ppo_m", "+2.2 / +1.2 / +0.6", 1),
        compare(units, "bon", "ppo_m", "-4.4 / -3.3 / -13.0", -1),
        compare(units, "ppo_m", "ppo_s", "+2.1 / +1.2 / +4.6", 1),
        compare(units, "br", "ppo_m", "+2.7 / +0.9 / +3.2", 1, "greedy_pass1"),
        compare(units, "bw", "ppo_m", "+2.2 / +1.2 / +0.6", 1, "greedy_pass1"),
        compare(units, "br", "ppo_m", "+2.7 / +0.9 / +3.2, by its best checkpoints", 1, "best.greedy_pass1"),
        compare(units, "bw", "ppo_m", "+2.2 / +1.2 / +0.6, by its best checkpoints", 1, "best.greedy_pass1"),
        compare(units, "br", "random", "has no such control", 0),
        compare(units, "bw", "random", "has no such control", 0),
    ]
    claims += [
        compare(
            units,
            "ppo_m",
            name,
            f"{PAPER_TABLE2['ppo_m'][0] - PAPER_TABLE2[name][0]:+.1f} on HumanEval",
            1 if PAPER_TABLE2["ppo_m"][0] > PAPER_TABLE2[name][0] else -1,
            key,
        )
        for name in BASELINE_ROWS
        for key in ("sampled_pass1", "best.greedy_pass1")
    ]
    return [
        Table(
            "table2",
            "Table 2: all methods on the test problems, mean [95% interval over worlds]; best: chosen on "
            "validation problems",
            header,
            results_rows(units, PAPER_TABLE2),
            claims,
        ),
        differences(
            units, PAPER_TABLE2, "table2_differences", "Table 2, differences paired by world and seed"
        ),
        tuned(units),
        *budgets(units),
    ]


def tuned(units: Units) -> Table:
    """The arms of PPO each at the learning rate that the grid on validation problems prefers; without a unit
    `tuned` that is the shared one."""
    names = ("ppo_s", "ppo_m", "br", "bw", "random")
    variant = {name: "tuned" if units.of(name, "tuned") else "" for name in names}
    rows = []
    for name in names:
        rates = {
            u.get("command", "").partition("--lr ")[2].split(" ")[0]
            for u in units.of(name, variant[name]).values()
        }
        rows.append(
            [
                figures.label(name),
                "/".join(sorted(rates)) or None,
                len(units.of(name, variant[name])),
                *[
                    with_interval(units.values(name, key, variant[name]))
                    for key in (
                        "greedy_pass1",
                        "sampled_pass1",
                        "best.greedy_pass1",
                        "best.sampled_pass1",
                        "kl",
                    )
                ],
            ]
        )
    pairs = [
        ("br", "ppo_m", 1),
        ("bw", "ppo_m", 1),
        ("ppo_m", "ppo_s", 1),
        ("br", "random", 0),
        ("bw", "random", 0),
        ("ppo_m", "random", 0),
    ]
    pairs += [
        ("ppo_m", name, 1 if PAPER_TABLE2["ppo_m"][0] > PAPER_TABLE2[name][0] else -1)
        for name in BASELINE_ROWS
    ]
    sentences = []
    for a, b, sign in pairs:
        for key, words in (
            ("sampled_pass1", "sampled"),
            ("greedy_pass1", "greedy"),
            ("best.greedy_pass1", "greedy, best checkpoint"),
        ):
            d = paired_difference(units.values(a, key, variant[a]), units.values(b, key, variant.get(b, "")))
            found = "missing" if d is None else f"{with_p(d)} ({d.pairs} pairs)"
            sentences.append(
                f"Tuned {figures.label(a)} against tuned {figures.label(b)}, {words} pass@1: {found}: "
                + (f"**{verdict(d, sign)}** with the paper." if sign else f"**{outcome(d)}**.")
            )
    return Table(
        "table2_tuned",
        "Table 2 again, each arm at the learning rate its own grid prefers",
        [
            "method",
            "lr",
            "units",
            "greedy pass@1, last",
            "sampled pass@1, last",
            "greedy, best",
            "sampled, best",
            "KL",
        ],
        rows,
        sentences,
    )


def spread(
    values: dict[tuple[int, int], float], like: dict[tuple[int, int], float]
) -> dict[tuple[int, int], float]:
    """One value a world -> the same value for every (world, seed) of another method: the SFT policy stands
    for all seeds of its world."""
    by_world = {world: value for (world, _), value in values.items()}
    return {(world, seed): by_world[world] for world, seed in like if world in by_world}


def differences(units: Units, names, name: str, title: str) -> Table:
    """Paired differences of every method to PPO-M and to random 2 of 5. The p-values are not corrected for
    their number."""
    header = [
        "method",
        "sampled, to PPO-M",
        "sampled, to random 2 of 5",
        "greedy, to PPO-M",
        "greedy, to random 2 of 5",
        "greedy of best, to PPO-M",
    ]
    rows = []
    for method in names:
        cells = []
        for key, other in (
            ("sampled_pass1", "ppo_m"),
            ("sampled_pass1", "random"),
            ("greedy_pass1", "ppo_m"),
            ("greedy_pass1", "random"),
            ("best.greedy_pass1", "ppo_m"),
        ):
            base = units.values(other, key)
            own = (
                spread(units.values("sft", key.removeprefix("best.")), base)
                if method == "sft"
                else units.values(method, key)
            )
            cells.append(NOT_THERE if method == other else with_p(paired_difference(own, base)))
        rows.append([figures.label(method), *cells])
    count = 5 * len(rows) - 5
    return Table(
        name,
        title,
        header,
        rows,
        [
            f"Up to {count} comparisons, p-values uncorrected: about {count / 20:.0f} below 0.05 would come "
            "from chance alone if nothing differed."
        ],
    )


def axis_values(unit: dict, axis: str) -> list:
    """A run's `axis` at its evaluations. Optimizer steps and rows trained on do not count while the critic
    warms up alone, which is so many updates of each: they would charge most to the arm that keeps most
    rows."""
    values = unit.get("curve", {}).get(axis, [])
    warmup = unit.get("command", "").partition("--critic_warmup_updates ")[2].split(" ")[0]
    if not warmup.isdigit() or axis not in ("optimizer_step", "kept_rows"):
        return values
    spent = value_at(unit["curve"]["update"], values, int(warmup))
    return [max(0.0, value - spent) for value in values]


def at_budget(
    units: Units, method: str, axis: str, x: float, name: str = "sampled_pass1", variant: str = ""
) -> dict[tuple[int, int], float]:
    """{(world, seed): validation pass@1 where the run's `axis` (update, optimizer_step, kl, kept_rows,
    episodes) first reaches x, linear between evaluations}."""
    found = {}
    for key, unit in units.of(method, variant).items():
        points = [
            (a, b)
            for a, b in zip(axis_values(unit, axis), unit.get("curve", {}).get(name, []))
            if a is not None and b is not None
        ]
        value = value_at([p[0] for p in points], [p[1] for p in points], x) if points else None
        if value is not None:
            found[key] = value
    return found


def curve_means(units: Units, method: str, end: float, name: str) -> dict[tuple[int, int], float]:
    """{(world, seed): mean height of the curve of `name` over responses generated, from 0 to `end`
    (trapezoids)}; runs that end before, or generate nothing, are left out."""
    found = {}
    for key, unit in units.of(method).items():
        points = [
            (a, b)
            for a, b in zip(axis_values(unit, "episodes"), unit.get("curve", {}).get(name, []))
            if a is not None and b is not None
        ]
        last = value_at([p[0] for p in points], [p[1] for p in points], end)
        if last is not None:
            points = [p for p in points if p[0] < end] + [(end, last)]
            found[key] = (
                sum((x1 - x0) * (y0 + y1) / 2 for (x0, y0), (x1, y1) in zip(points, points[1:])) / end
            )
    return found


def budgets(units: Units) -> list[Table]:
    """Curves compared at equal rollouts (points and whole), equal optimizer steps and equal KL (of unfiltered
    samples), on validation problems: one table for sampled and one for greedy pass@1."""
    names = ("ppo_m", "br", "bw", "random", "bon", "ppo_s", "oracle", *BASELINE_ROWS)
    filtered = ("br", "bw", "random")
    last = [u["curve"]["episodes"][-1] for name in ("ppo_m", *filtered) for u in units.of(name).values()]
    steps = [axis_values(u, "optimizer_step")[-1] for name in filtered for u in units.of(name).values()]
    end = min(last, default=6400)
    columns = [("episodes", round(end * f)) for f in (1 / 3, 2 / 3, 1)]
    columns += [("optimizer_step", round(min(steps, default=108) * f)) for f in (1 / 3, 2 / 3, 1)]
    reached = [
        u["curve"]["kl"][-1] for name in ("ppo_m", *filtered) for u in units.of(name).values()
    ]  # by all of these runs
    columns += [("kl", float(f"{min(reached, default=1) * f:.2g}")) for f in (1 / 3, 2 / 3, 0.99)]
    titles = {"episodes": "responses", "optimizer_step": "step", "kl": "KL"}
    tables = []
    for key, words in (("sampled_pass1", "Sampled"), ("greedy_pass1", "Greedy")):
        rows = []
        for name in names:
            cells = []
            for axis, x in [*columns, ("whole", end)]:
                got, base = (
                    curve_means(units, m, end, key) if axis == "whole" else at_budget(units, m, axis, x, key)
                    for m in (name, "ppo_m")
                )
                d = paired_difference(got, base)
                text = f"{np.mean(list(got.values())):.3f}" if got else NOT_THERE if units.of(name) else None
                cells.append(
                    text
                    if not got or d is None or name == "ppo_m"
                    else f"{text} ({d.mean:+.3f}, {p_value(d.p)})"
                )
            rows.append([figures.label(name), *cells])
        sentences = []
        for axis, words_of_axis in (
            ("episodes", "equal rollouts"),
            ("whole", "equal rollouts, mean over the whole curve"),
            ("optimizer_step", "equal optimizer steps"),
            ("kl", "equal KL"),
        ):
            x = end if axis == "whole" else [c[1] for c in columns if c[0] == axis][2]
            for a in ("br", "bw"):
                for b in ("ppo_m", "random"):
                    d = paired_difference(
                        *(
                            curve_means(units, m, end, key)
                            if axis == "whole"
                            else at_budget(units, m, axis, x, key)
                            for m in (a, b)
                        )
                    )
                    found = "missing" if d is None else f"{with_p(d)} ({d.pairs} pairs)"
                    sentences.append(
                        f"{figures.label(a)} against {figures.label(b)} at {words_of_axis}"
                        f"{'' if axis == 'whole' else f' ({titles[axis]} {x})'}: {found}: **{outcome(d)}**."
                    )
        tables.append(
            Table(
                "table2_budgets" if key == "sampled_pass1" else "table2_budgets_greedy",
                f"{words} pass@1 on validation problems at equal "
                "rollouts, optimizer steps (critic warm-up not counted) and KL, linear between evaluations "
                "(difference to PPO-M); – where "
                "a run does not get there or generates nothing",
                ["method", *[f"{titles[a]} {x}" for a, x in columns], "whole curve"],
                rows,
                sentences,
            )
        )
    return tables


def table3(units: Units) -> Table:
    """Filters: R² on the SFT policy and results; does R² predict the result?"""
    header = [
        "filter",
        "paper R², HumanEval, MBPP",
        "R² on SFT samples",
        "units",
        "greedy pass@1",
        "sampled pass@1",
        "greedy, best",
        "sampled, to PPO-M",
        "sampled, to random 2 of 5",
    ]
    rows, points = [], []
    there = [
        set(found)
        for name in PAPER_TABLE3
        if name != "ppo_s" and (found := units.values(name, "sampled_pass1"))
    ]
    common = set.intersection(*there) if there else set()  # filters are ranked on the same worlds and seeds
    for name, paper in PAPER_TABLE3.items():
        r2, sampled = units.r2("sft", "sft", FILTER_OF.get(name, name)), units.values(name, "sampled_pass1")
        if name != "ppo_s" and r2 and sampled and common:
            points.append(
                (name, float(np.mean(world_means(r2))), float(np.mean([sampled[key] for key in common])))
            )
        rows.append(
            [
                figures.label(name),
                NOT_THERE if paper is None else f"{paper[0]:.3f}, {paper[1]}, {paper[2]}",
                NOT_THERE if name == "ppo_s" else with_interval(r2),
                len(sampled),
                with_interval(units.values(name, "greedy_pass1")),
                with_interval(sampled),
                with_interval(units.values(name, "best.greedy_pass1")),
                *[
                    NOT_THERE
                    if name == other
                    else with_p(paired_difference(sampled, units.values(other, "sampled_pass1")))
                    for other in ("ppo_m", "random")
                ],
            ]
        )
    sentences = []
    for benchmark, column in (("HumanEval", 1), ("MBPP", 2)):
        found = []
        for words, r2_of_br, left_out in (
            ("as its table has them, without PPO-S, which has no filter over N = 5", 0.841, ("ppo_s",)),
            ("with BR's R² of its Table 1 (.922) and with PPO-S", 0.922, ()),
        ):
            points_of_paper = [
                p if name != "br" else (r2_of_br, *p[1:])
                for name, p in PAPER_TABLE3.items()
                if p and name not in left_out
            ]
            rho, p = rank_correlation([x[0] for x in points_of_paper], [x[column] for x in points_of_paper])
            found.append(f"Spearman ρ {rho:+.2f} ({p_value(p)}) over {len(points_of_paper)} rows {words}")
        sentences.append(
            f"Does R² predict the result? The paper's own figures, {benchmark}: {'; '.join(found)}."
        )
    both = [(PAPER_TABLE3[name][0], r2) for name, r2, _ in points if PAPER_TABLE3[name]]
    found = rank_correlation([x[0] for x in both], [x[1] for x in both])
    sentences.append(
        "Do R² here and in the paper order the filters alike? "
        + (
            "Missing."
            if found is None
            else f"Spearman ρ {found[0]:+.2f} ({p_value(found[1])}) over {len(both)} filters."
        )
    )
    sentences.append(
        f"Here, on the {len(common)} pairs of world and seed that all filters have: "
        + correlation_sentence(points)
    )
    sentences.append("Here, without BoN: " + correlation_sentence([x for x in points if x[0] != "bon"]))
    return Table(
        "table3",
        "Table 3: filters, their R² on the SFT policy before any RL (equal rows, as in Table 1), and their "
        "result",
        header,
        rows,
        sentences,
    )


def correlation_sentence(points: list[tuple[str, float, float]]) -> str:
    """points (name, R², pass@1) -> a sentence with Spearman's ρ and a judgement."""
    found = rank_correlation([p[1] for p in points], [p[2] for p in points])
    if found is None or not np.isfinite(found[0]):
        return f"missing (only {len(points)} filters have both)."
    judgement = "cannot tell" if found[1] >= 0.05 else "agrees" if found[0] > 0 else "disagrees"
    return f"Spearman ρ {found[0]:+.2f} ({p_value(found[1])}) over {len(points)} filters: **{judgement}**."


def table5(units: Units) -> Table:
    """Best of 1 (a sample) and best of 5 by the reward model."""
    rows = [
        [
            figures.label(n),
            len(units.of(n)),
            *[with_interval(units.values(n, k)) for k in ("sampled_pass1", "best_of_5")],
            with_p(paired_difference(units.values(n, "best_of_5"), units.values(n, "sampled_pass1"))),
        ]
        for n in PAPER_TABLE2
    ]
    sentences = [
        compare(units, name, "ppo_s", "PF-PPO above PPO-S in best of 1 and best of 5", 1, key)
        for name in ("br", "bw")
        for key in ("sampled_pass1", "best_of_5")
    ]
    return Table(
        "table5",
        "Table 5: best of 1 and best of 5 by the reward model, test problems",
        ["method", "units", "best of 1", "best of 5", "gain"],
        rows,
        sentences,
    )


def table6(units: Units) -> Table:
    """Rows through each model and seconds per update, measured while training; n and m are read off PPO-M's
    own counts."""

    def mean(name: str, group: str, key: str) -> float | None:
        found = [u[group][key] for u in units.of(name).values() if key in u.get(group, {})]
        return float(np.mean(found)) if found else None

    base, per_update = (
        mean("ppo_m", "rows_per_update", "policy_forward"),
        mean("ppo_m", "rows_per_update", "policy_forward_backward"),
    )
    n, m = (base / 5, per_update / base) if base else (None, None)
    header = [
        "method",
        "paper: prompts x responses, reward forwards, forward+backward",
        "reward forwards",
        "reference forwards",
        "policy forwards",
        "policy and critic forward+backward",
        "forward+backward / nm",
        "seconds: generate",
        "score",
        "logprobs",
        "train",
        "update",
    ]
    rows = []
    for name, (shape, forwards, passes) in PAPER_TABLE6.items():
        paper = f"{shape}, {forwards}n, {passes}nm" if passes else NOT_THERE
        counts = [
            mean(name, "rows_per_update", key)
            for key in ("reward_forward", "reference_forward", "policy_forward", "policy_forward_backward")
        ]
        seconds = [
            mean(name, "seconds_per_update", key)
            for key in ("generate", "score", "logprobs", "train", "update")
        ]
        ratio = None if counts[3] is None or not n else counts[3] / (n * m)
        rows.append(
            [
                figures.label(name),
                paper,
                *[None if c is None else f"{c:.0f}" for c in counts],
                None if ratio is None else f"{ratio:.2f}",
                *[None if s is None else f"{s:.2f}" for s in seconds],
            ]
        )
    sentences = []
    for name in ("br", "bw"):
        a, b = mean(name, "rows_per_update", "policy_forward_backward"), per_update
        s, t = mean(name, "seconds_per_update", "update"), mean("ppo_m", "seconds_per_update", "update")
        if a is None or not b or not s or not t:
            sentences.append(f"{figures.label(name)}: missing.")
            continue
        agrees = "agrees" if abs(a / b - 0.4) < 0.02 else "disagrees"
        sentences.append(
            f"{figures.label(name)} passes {a / b:.2f} of PPO-M's rows forward and backward (paper 2nm / 5nm "
            f"= 0.40: **{agrees}**) "
            f"and takes {s / t:.2f} of its seconds per update, evaluation left out."
        )
    return Table(
        "table6",
        f"Table 6: rows and seconds per update, measured (n = {number(n, 0)}, m = {number(m, 0)})",
        header,
        rows,
        sentences,
    )


def over_optimisation(units: Units, names: list[str] | None) -> Table:
    """Does reward keep rising while pass@1 falls: the highest validation pass@1 along a run against its last.
    Without names: every method and variant."""
    groups = (
        [(name, "") for name in names]
        if names is not None
        else list(dict.fromkeys((u["method"], u["variant"]) for u in units.lines))
    )
    rows = []
    for name, variant in groups:
        drops, gains = {}, {}
        for key, unit in units.of(name, variant).items():
            points = list(
                zip(
                    unit.get("curve", {}).get("sampled_pass1", []),
                    unit.get("curve", {}).get("sampled_reward", []),
                )
            )
            points = [p for p in points if None not in p]
            if points:
                best = max(range(len(points)), key=lambda i: points[i][0])
                drops[key], gains[key] = points[-1][0] - points[best][0], points[-1][1] - points[best][1]
        if drops:
            rows.append(
                [
                    figures.label(name),
                    variant or NOT_THERE,
                    len(drops),
                    with_interval(gains),
                    with_interval(drops),
                ]
            )
    return Table(
        "over_optimisation",
        "Over-optimisation: change from the peak of sampled pass@1 (validation) to the end of the run (the "
        "peak is the "
        "highest of noisy points, so a small fall means nothing)",
        ["method", "variant", "units", "reward", "sampled pass@1"],
        rows,
        [],
    )


# ---------------------------------------------------------------- tables of the other studies


# PAPER, Table 4: Ape210K / CMATH with PPO-S and with PF-PPO (BR).
PAPER_TABLE4 = {
    "orm": ("84.1 / 92.3", "86.2 / 95.1", 2.1),
    "oracle": ("82.1 / 90.8", "83.8 / 91.2", 1.7),
    "crm": ("83.9 / 93.1", "84.3 / 94.2", 0.4),
}


def table4(units: Units) -> Table:
    """Three rewards, PPO-S against BR."""
    rows, sentences = [], []
    for name, (paper_s, paper_br, gain) in PAPER_TABLE4.items():
        for method, paper in (("ppo_s", paper_s), ("br", paper_br)):
            rows.append(
                [
                    name,
                    figures.label(method),
                    paper,
                    len(units.of(method, name)),
                    *[
                        with_interval(units.values(method, key, name))
                        for key in ("greedy_pass1", "sampled_pass1", "best.greedy_pass1", "kl")
                    ],
                ]
            )
        for key in ("sampled_pass1", "greedy_pass1"):
            sentences.append(
                f"{name}: " + compare(units, "br", "ppo_s", f"{gain:+.1f} on Ape210K", 1, key, name)
            )
        steps = min((axis_values(u, "optimizer_step")[-1] for u in units.of("br", name).values()), default=0)
        d = paired_difference(
            *(at_budget(units, m, "optimizer_step", steps, variant=name) for m in ("br", "ppo_s"))
        )
        sentences.append(
            f"{name}: PF-PPO BR against PPO-S at equal optimizer steps ({steps:.0f}), sampled pass@1 on "
            "validation problems: "
            f"{'missing' if d is None else with_p(d)}: **{outcome(d)}**."
        )
    for method in ("ppo_s", "br"):
        for a, b in (("orm", "oracle"), ("crm", "orm")):
            numbers = [tuple(map(float, PAPER_TABLE4[name][method == "br"].split(" / "))) for name in (a, b)]
            signs = {math.copysign(1, x - y) for x, y in zip(*numbers)}
            sign = signs.pop() if len(signs) == 1 else 0
            d = paired_difference(
                units.values(method, "sampled_pass1", a), units.values(method, "sampled_pass1", b)
            )
            sentences.append(
                f"{figures.label(method)}, {a} against {b} (the paper has {a} "
                f"{'above' if sign > 0 else 'below' if sign else 'above once and below once'}): "
                f"{'missing' if d is None else with_p(d)}: **{verdict(d, sign) if sign else outcome(d)}**."
            )
    return Table(
        "table4",
        "Table 4: learned reward (orm), executed tests (oracle), both combined (crm)",
        [
            "reward",
            "method",
            "paper Ape210K / CMATH",
            "units",
            "greedy pass@1",
            "sampled pass@1",
            "greedy, best",
            "KL",
        ],
        rows,
        sentences,
    )


def map_cells(units: Units) -> list[dict[str, str]]:
    """The planned cells of study map and others that have units, as {"pairs": ..., "noise": ..., "kl": ...,
    "n": ...} and the variant's name."""
    names = dict.fromkeys(
        f"pairs={pairs or 'all'} noise={noise} kl={kl} n={n}" for pairs, noise, kl, n in planned_cells(False)
    )
    names |= dict.fromkeys(u["variant"] for u in units.lines if "kl=" in u.get("variant", ""))
    return [dict(part.split("=") for part in name.split()) | {"variant": name} for name in names]


def map_tables(units: Units) -> list[Table]:
    """When does filtering help: each cell's differences at equal rollouts (test) and at equal training passes
    (validation)."""
    header = [
        "pairs",
        "noise",
        "KL coefficient",
        "N",
        "pair accuracy",
        "R² none / BR / BW (N = 5)",
        "PPO-M, sampled pass@1",
        "BR to PPO-M",
        "BW to PPO-M",
        "BR to random",
        "BW to random",
    ]
    rows, passes, wins, pooled = [], [], defaultdict(list), defaultdict(lambda: ({}, {}))
    for index, cell in enumerate(map_cells(units)):
        name = cell["variant"]
        quality = f"pairs={cell['pairs']} noise={cell['noise']}"
        accuracy = units.values("sft", "rm_accuracy", quality)
        r2 = [units.r2("sft", "sft", f, variant=quality) for f in ("none", "br", "bw")]
        start = [cell["pairs"], cell["noise"], cell["kl"], cell["n"], with_interval(accuracy)]
        base = units.values("ppo_m", "sampled_pass1", name)
        cells, even = [], []
        ends = [
            axis_values(u, "kept_rows")[-1]
            for f in ("br", "bw", "random")
            for u in units.of(f, name).values()
        ]
        for a, b in (("br", "ppo_m"), ("bw", "ppo_m"), ("br", "random"), ("bw", "random")):
            if cell["n"] == "2":
                cells.append(NOT_THERE), even.append(NOT_THERE)
                continue
            rollouts = [units.values(m, "sampled_pass1", name) for m in (a, b)]
            equal = [at_budget(units, m, "kept_rows", min(ends, default=0), variant=name) for m in (a, b)]
            for key, values, into in (((a, b), rollouts, cells), ((a, b, "passes"), equal, even)):
                d = paired_difference(*values)
                into.append(with_p(d))
                wins[key].append((d, cell))
                for together, one in zip(pooled[key], values):  # all cells of a world are one world's
                    together.update({(world, (index, seed)): value for (world, seed), value in one.items()})
        rows.append(
            [
                *start,
                " / ".join(f"{np.mean(list(v.values())):.2f}" for v in r2) if all(r2) else None,
                with_interval(base),
                *cells,
            ]
        )
        passes.append([*start[:4], *even])
    sentences = []
    for (a, b, *rest), found in wins.items():
        known = [(d, cell) for d, cell in found if d is not None and d.low is not None]
        better = [cell["variant"] for d, cell in known if d.low > 0]
        worse = [cell["variant"] for d, cell in known if d.high < 0]
        where = "equal training passes" if rest else "equal rollouts"
        text = (
            f"{figures.label(a)} against {figures.label(b)} at {where}: better in {len(better)}, worse in "
            f"{len(worse)} of {len(known)} "
            f"cells with enough units (95%, uncorrected; {0.05 * len(known):.1f} expected by chance)"
        )
        text += f"; better: {'; '.join(better)}" if better else ""
        text += f"; worse: {'; '.join(worse)}" if worse else ""
        d = paired_difference(*pooled[(a, b, *rest)])
        if d is not None:
            text += f". All cells together: {with_p(d)} ({d.pairs} pairs): "
            text += f"**{outcome(d, over_worlds=True)}**, judged by worlds"
        sentences.append(text + ".")
    done = {key: sum(d is not None for d, _ in found) for key, found in wins.items()}
    sentences.append(
        f"Units: {min(done.values())} of {len(rows) - sum(row[3] == '2' for row in rows)} cells with N above "
        "2 have all four arms."
    )
    by_quality = defaultdict(list)  # cells of one reward model are one point
    for d, cell in wins.get(("bw", "random"), []):
        if d is not None:
            by_quality[f"pairs={cell['pairs']} noise={cell['noise']}"].append(d.mean)
    trend = [
        (float(np.mean(list(accuracy.values()))), float(np.mean(gains)))
        for quality, gains in by_quality.items()
        if (accuracy := units.values("sft", "rm_accuracy", quality))
    ]
    found = rank_correlation([t[0] for t in trend], [t[1] for t in trend])
    sentences.append(
        "Does BW gain more over random where the reward model is worse? Spearman ρ of pair accuracy and BW - "
        "random over reward models: "
        + (
            "missing."
            if found is None
            else f"{found[0]:+.2f} ({p_value(found[1])}, {len(trend)} reward models)."
        )
    )
    return [
        Table(
            "map",
            "Map: sampled pass@1 on test problems at equal rollouts; – where N = 2 makes all filters one",
            header,
            rows,
            sentences,
        ),
        Table(
            "map_passes",
            "Map: the same differences at equal training passes (rows trained on once the critic is warm), "
            "validation problems",
            [*header[:4], *header[-4:]],
            passes,
            [],
        ),
        over_optimisation(units, None),
    ]


def beyond_tables(units: Units) -> list[Table]:
    """Beyond the paper: does each of the three ideas win?"""

    def against(title: str, a: dict, b: dict) -> str:
        d = paired_difference(a, b)
        return f"{title}: {'missing' if d is None else with_p(d) + f' ({d.pairs} pairs)'}: **{outcome(d)}**."

    passes = (("sampled_pass1", "sampled pass@1"), ("greedy_pass1", "greedy pass@1"))
    chosen = {u["world"]: u["weights"] for u in units.of("w_r2").values()}
    rows = []
    for world, found in sorted(chosen.items()):
        r2 = [found["r2"][name] for name in ("random", "br", "bw", "chosen")]
        rows.append(
            [
                world,
                " ".join(f"{x:.1f}" for x in found["weights"]),
                *[f"{x['search']:.3f} / {x['held_out']:.3f}" for x in r2],
            ]
        )
    gap = {
        (w, 0): found["r2"]["chosen"]["held_out"]
        - max(found["r2"][n]["held_out"] for n in ("random", "br", "bw"))
        for w, found in chosen.items()
    }
    weights = Table(
        "weights",
        "w chosen by R²: R² of two kept rows on the half searched / on held-out prompts",
        ["world", "w, best rank first", "random", "BR", "BW", "chosen"],
        rows,
        [
            against(
                "R² of the chosen w against the best named filter, held-out prompts",
                gap,
                dict.fromkeys(gap, 0.0),
            ),
            *[
                against(
                    f"Trained with the chosen w against {figures.label(b)}, {words}",
                    units.values("w_r2", key),
                    units.values(b, key),
                )
                for b in ("ppo_m", "br", "bw", "random")
                for key, words in passes
            ],
        ],
    )
    plain = [(name, "") for name in ("ppo_m", "br", "bw", "random", "pow_2", "w_r2")] + [
        (name, "centred") for name in ("ppo_m", "bw", "pow_2")
    ]
    results = Table(
        "beyond",
        "Beyond the paper: results on test problems",
        ["method", "reward", "units", "greedy pass@1", "sampled pass@1", "KL"],
        [
            [
                figures.label(n),
                v or "as it is",
                len(units.of(n, v)),
                *[with_interval(units.values(n, k, v)) for k in ("greedy_pass1", "sampled_pass1", "kl")],
            ]
            for n, v in plain
        ],
        [
            against(
                f"Reward centred per prompt, {figures.label(n)}, {words}",
                units.values(n, key, "centred"),
                units.values(n, key),
            )
            for n in ("ppo_m", "bw", "pow_2")
            for key, words in passes
        ],
    )
    rows, sentences, pooled = [], [], ({}, {}, {}, {})
    for method in ("ppo_m", "br", "bw", "random"):
        runs = units.of(method, "alarm")
        last, best = (
            units.values(method, "sampled_pass1", "alarm"),
            units.values(method, "best.sampled_pass1", "alarm"),
        )
        stopped = {
            key: u["alarm"].get("sampled_pass1", u["sampled_pass1"]) for key, u in runs.items()
        }  # no alarm: it runs to the end
        early = {
            key: u["alarm"]["early"]["sampled_pass1"] for key, u in runs.items() if "early" in u["alarm"]
        }
        for together, one in zip(pooled, (stopped, last, best, early)):
            together.update({(world, (method, seed)): value for (world, seed), value in one.items()})
        at = [u["alarm"]["update"] for u in runs.values()]
        rang = [x for x in at if x is not None]
        when = f", mean update {np.mean(rang):.0f}" if rang else ""
        rows.append(
            [
                figures.label(method),
                len(runs),
                f"{len(rang)} of {len(at)}{when}" if at else None,
                *[with_interval(x) for x in (last, stopped, early, best)],
            ]
        )
        sentences += [
            against(f"{figures.label(method)}, stopped by the alarm against fixed length", stopped, last),
            against(
                f"{figures.label(method)}, stopped by the alarm against the best of validation problems",
                stopped,
                best,
            ),
        ]
    for name, one, words, other in (
        ("the alarm", pooled[0], "fixed length", pooled[1]),
        ("the alarm", pooled[0], "the best of validation problems", pooled[2]),
        ("the alarm", pooled[0], "stopped by pass@1 of the same probes", pooled[3]),
        ("pass@1 of the same probes", pooled[3], "fixed length", pooled[1]),
    ):
        d = paired_difference(one, other)
        sentences.append(
            f"All four together, stopped by {name} against {words}: "
            f"{'missing' if d is None else with_p(d) + f' ({d.pairs} pairs)'}: "
            f"**{outcome(d, over_worlds=True)}**, judged by worlds."
        )
    alarm = Table(
        "alarm",
        "R² as an alarm: a reward model that is over-optimised, twice the updates; sampled pass@1 on test "
        "problems",
        [
            "method",
            "units",
            "alarm rang",
            "fixed length",
            "stopped by the alarm",
            "stopped by pass@1 of the same probes",
            "best on validation problems",
        ],
        rows,
        sentences,
    )
    return [weights, results, alarm]


# ---------------------------------------------------------------- writing


def study_tables(units: Units, study: str) -> list[Table]:
    if study == "table4":
        return [table4(units)]
    if study == "map":
        return map_tables(units)
    if study == "beyond":
        return beyond_tables(units)
    trained = [method for method in units.methods() if method != "sft"]
    return [
        table1(units),
        *table2(units),
        table3(units),
        table5(units),
        table6(units),
        over_optimisation(units, trained),
    ]


def spread_of_repeats(repeats: list[dict]) -> tuple[float, float, float, float]:
    """How far apart the lines of Figure 1 lie: root mean square over groups of the variance over repeats of a
    group's actual score, in the two lowest and two highest groups and in all others, each followed by what
    drawing that many responses would give by itself (binomial, √(p (1 − p) / count)). -> (ends, ends by
    counting alone, middle, middle by counting alone)."""
    actual = np.array([repeat["actual"] for repeat in repeats])
    p, count = actual.mean(0), np.array([repeat["count"] for repeat in repeats]).mean(0)
    measured, counting = actual.var(0, ddof=1), p * (1 - p) / count
    ends = np.isin(np.arange(len(p)), (0, 1, len(p) - 2, len(p) - 1))
    return tuple(float(np.sqrt(x[rows].mean())) for rows in (ends, ~ends) for x in (measured, counting))


def reliability_sentences(worlds: dict[int, list[dict]]) -> list[str]:
    """The paper's sentence on Figures 1 and 3 beside ours, over worlds."""
    spread = {(world, 0): spread_of_repeats(repeats) for world, repeats in worlds.items()}
    ends, ends_by_chance, middle, middle_by_chance = (
        np.mean([s[i] for s in spread.values()]) for i in range(4)
    )
    d = paired_difference({k: s[2] for k, s in spread.items()}, {k: s[0] for k, s in spread.items()})
    excess = paired_difference(
        {k: s[2] - s[3] for k, s in spread.items()}, {k: s[0] - s[1] for k, s in spread.items()}
    )
    return [
        "Paper: the lines of ten repeats lie close together at low and high rewards and apart in the "
        f"middle. Here, {len(worlds)} worlds: standard "
        f"deviation over repeats {middle:.3f} in the middle groups, {ends:.3f} in the two groups at each "
        f"end; middle less ends {with_p(d)}: "
        f"**{verdict(d, 1)}**.",
        "But shares near a half spread more than shares near 0 or 1 by counting alone, which here would "
        f"give {middle_by_chance:.3f} and "
        f"{ends_by_chance:.3f}. What is left of the difference beyond counting: {with_p(excess)}: "
        f"**{verdict(excess, 1)}**.",
    ]


def training_sentences(units: Units) -> list[str]:
    """The paper's sentence on Figure 2 (about PPO-M's reward, higher pass@1) beside ours, on the policy's own
    samples at the end of training."""
    found = []
    for method in ("br", "bw"):
        for name, words, paper in (
            ("sampled_reward", "reward of the policy's samples", 0),
            ("kept_score", "reward of the samples trained on", 0),
            ("sampled_pass1", "sampled pass@1", 1),
            ("greedy_pass1", "greedy pass@1", 1),
        ):
            d = paired_difference(
                *({key: u["curve"][name][-1] for key, u in units.of(m).items()} for m in (method, "ppo_m"))
            )
            says = "about equal" if paper == 0 else "higher"
            judged = (
                verdict(d, 1)
                if paper
                else outcome(d).replace("wins", "higher here").replace("loses", "lower here")
            )
            found.append(
                f"{figures.label(method)} against PPO-M at the end, {words}: paper {says}; here "
                f"{with_p(d) or 'missing'}: **{judged}**."
            )
    if units.of("oracle"):
        found.append(
            "PPO-M with the oracle reward is left out of the first panel: its reward, passing or not, is on "
            "another scale."
        )
    return found


def pictures(units: Units, study: str, folder: Path) -> list[tuple[str, str, list[str]]]:
    """Figures 1, 2 and 3 -> (file, caption, sentences)."""
    made = []
    worlds = (
        {}
        if study != "table2"
        else {u["world"]: u["reliability"]["repeats"] for u in units.of("sft").values() if "reliability" in u}
    )
    if worlds:
        first, *others = sorted(worlds)
        figures.reliability(worlds[first], folder / "figure1.png", f"world {first}")
        made.append(
            (
                "figure1.png",
                "Figure 1: mean actual score of reward groups, one line per repeat of the sampling",
                reliability_sentences(worlds),
            )
        )
        if others:
            figures.reliability_panels({f"world {w}": worlds[w] for w in others}, folder / "figure3.png")
            made.append(
                (
                    "figure3.png",
                    "Figure 3: the same in the other worlds",
                    ["Counted in the sentences of Figure 1."],
                )
            )
    if study == "map":
        panels = {}
        for cell in map_cells(units):
            found = {
                m: [u["curve"] for u in units.of(m, cell["variant"]).values()]
                for m in ("ppo_m", "br", "bw", "random")
            }
            panels |= (
                {cell["variant"]: {m: curves for m, curves in found.items() if curves}}
                if any(found.values())
                else {}
            )
        if panels:
            figures.over_optimisation(panels, folder / "over_optimisation.png")
            made.append(
                (
                    "over_optimisation.png",
                    "Over-optimisation: reward (dotted, right axis) and sampled pass@1 (line) as KL grows",
                    [],
                )
            )
        return made
    if study == "beyond":
        found = {
            m: [(u["curve"], u["alarm"]) for u in units.of(m, "alarm").values()]
            for m in ("ppo_m", "br", "bw", "random")
        }
        if any(found.values()):
            figures.alarm_curves({m: runs for m, runs in found.items() if runs}, folder / "alarm.png")
            made.append(
                ("alarm.png", "R² as an alarm: probe and pass@1 over training; a circle where it rings", [])
            )
        return made
    if study == "table4":
        return made
    names = ("ppo_s", "ppo_m", "br", "bw", "random", "bon", "oracle")
    runs = {
        name: [
            {**u["curve"], "optimizer_step": axis_values(u, "optimizer_step"), "world": u["world"]}
            for u in units.of(name).values()
        ]
        for name in names
    }
    runs = {name: curves for name, curves in runs.items() if curves}
    if runs:
        figures.study_curves(runs, folder / "figure2.png")
        figures.budget_curves(runs, folder / "budgets.png")
        made += [
            (
                "figure2.png",
                "Figure 2: reward and pass@1 over training, mean over units; bands for three arms: 95% "
                "interval less what worlds have in common",
                training_sentences(units),
            ),
            (
                "budgets.png",
                "Sampled pass@1 against rollouts, optimizer steps (critic warm-up not counted) and KL",
                [],
            ),
        ]
    return made


def write(folder: Path) -> None:
    """tables.md, csv files and pictures of a study's folder, from units.jsonl (study.json says which
    study)."""
    folder = Path(folder)
    units = Units(finished_rows(folder / "units.jsonl"))
    study = (
        json.loads((folder / "study.json").read_text())["study"]
        if (folder / "study.json").is_file()
        else "table2"
    )
    text = [
        f"# Study {study}: {len(units.lines)} units",
        "",
        "Made by `python -m benchmark.study.tables` from `units.jsonl`; `missing`: no such unit yet, `–`: no "
        "such cell. Commands: field `command` of "
        "each line.",
        "",
    ]
    for table in study_tables(units, study):
        with (folder / f"{table.name}.csv").open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(
                [table.header, *[["missing" if c is None else c for c in row] for row in table.rows]]
            )
        text += [
            f"## {table.title}",
            "",
            figures.markdown_table(table.header, table.rows),
            "",
            *[f"- {s}" for s in table.sentences],
            "",
        ]
    for name, caption, sentences in pictures(units, study, folder):
        text += [f"## {caption}", "", f"![{caption}]({name})", "", *[f"- {s}" for s in sentences], ""]
    (folder / "tables.md").write_text("\n".join(text))
    print(f"tables and pictures: {folder / 'tables.md'}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit("usage: python -m benchmark.study.tables FOLDER (a folder of benchmark.study.reproduce)")
    write(Path(sys.argv[1]))
