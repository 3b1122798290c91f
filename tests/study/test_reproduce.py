"""The study's statistics against numbers worked by hand, its plan, and what survives a kill."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

import pfppo_single as pfppo
from benchmark import pipeline, records
from benchmark.study import figures, growth, ppo_speed, reproduce, tables
from benchmark.study import rewards as study_rewards

# ---------------------------------------------------------------- statistics


def test_mean_interval_is_students_t():
    # 1, 2, 3: mean 2, standard deviation 1, standard error 1/√3, t(0.975, 2) = 4.3026527
    mean, low, high = tables.mean_interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert low == pytest.approx(2 - 4.3026527 / math.sqrt(3), abs=1e-6)
    assert high == pytest.approx(2 + 4.3026527 / math.sqrt(3), abs=1e-6)


def test_one_value_has_no_interval():
    assert tables.mean_interval([0.4]) == (0.4, None, None)


def test_t_test_with_one_degree_of_freedom():
    # 1 and 3: mean 2, standard error 1, t = 2; for one degree of freedom p = 1 - 2·atan(t)/π
    assert tables.t_test([1.0, 3.0]) == pytest.approx(1 - 2 * math.atan(2) / math.pi, abs=1e-9)


def test_t_test_of_equal_values():
    assert (
        tables.t_test([0.0, 0.0]) == 1.0 and tables.t_test([0.1, 0.1]) == 0.0 and tables.t_test([0.1]) is None
    )


def test_paired_difference_uses_only_pairs_that_both_have():
    a = {(1, 1): 0.5, (1, 2): 0.7, (2, 1): 0.9, (3, 1): 9.0}
    b = {(1, 1): 0.4, (1, 2): 0.4, (2, 1): 0.7, (4, 1): 5.0}
    d = tables.paired_difference(a, b)  # differences .1, .3, .2
    assert (d.pairs, d.worlds) == (3, 2)
    assert d.mean == pytest.approx(0.2)
    # standard deviation .1, standard error .1/√3, t = 2√3; for two degrees of freedom p = 1 - t/√(2 + t²)
    t = 2 * math.sqrt(3)
    assert d.p == pytest.approx(1 - t / math.sqrt(2 + t * t), abs=1e-9)
    assert d.high - d.mean == pytest.approx(4.3026527 * 0.1 / math.sqrt(3), abs=1e-6)


def test_worlds_count_once_whatever_their_seeds():
    # world means of the differences: world 1 (.1 + .3) / 2 = .2, world 2 .6; t = .4 / .2 = 2, one degree of
    # freedom
    d = tables.paired_difference(
        {(1, 1): 0.1, (1, 2): 0.3, (2, 1): 0.6}, {(1, 1): 0.0, (1, 2): 0.0, (2, 1): 0.0}
    )
    assert d.worlds == 2
    assert d.world_p == pytest.approx(1 - 2 * math.atan(2) / math.pi, abs=1e-9)


def test_no_common_unit_is_no_difference():
    assert tables.paired_difference({(1, 1): 0.1}, {(2, 1): 0.1}) is None


def test_rank_correlation_sees_order_alone():
    # ranks 1 2 3 4 against 2 1 4 3: ρ = 1 - 6·4 / (4·15) = 0.6
    rho, _ = tables.rank_correlation([0.1, 0.2, 0.9, 5.0], [2.0, 1.0, 40.0, 3.0])
    assert rho == pytest.approx(0.6)
    assert tables.rank_correlation([1.0, 2.0], [1.0, 2.0]) is None


def test_value_at_interpolates_and_stops_where_the_curve_ends():
    assert tables.value_at([0, 10, 20], [0.4, 0.6, 0.5], 15) == pytest.approx(0.55)
    assert tables.value_at([0, 10, 20], [0.4, 0.6, 0.5], 21) is None


def test_value_at_takes_the_first_crossing():
    assert tables.value_at([0.0, 2.0, 1.0, 3.0], [0.0, 2.0, 7.0, 8.0], 1.5) == pytest.approx(
        1.5
    )  # KL can fall again


@pytest.mark.parametrize(
    "a, sign, expected",
    [((0.1, 0.3), 1, "agrees"), ((0.1, 0.3), -1, "disagrees"), ((-0.1, 0.3), 1, "cannot tell")],
)
def test_verdict_needs_an_interval_without_zero(a, sign, expected):
    low, high = a
    d = tables.Difference((low + high) / 2, low, high, 0.01, low, high, 0.01, 4, 3)
    assert tables.verdict(d, sign).startswith(expected)


def test_pooled_cells_are_judged_by_worlds_alone():
    over_units = tables.Difference(0.2, 0.1, 0.3, 0.01, -0.1, 0.5, 0.2, 12, 3)
    assert tables.outcome(over_units) == "wins, but not over so few worlds"
    assert tables.outcome(over_units, over_worlds=True) == "no difference shown"
    over_worlds = tables.Difference(-0.2, -0.3, 0.1, 0.2, -0.3, -0.1, 0.01, 12, 3)
    assert tables.outcome(over_worlds, over_worlds=True) == "loses, also over worlds"


def test_level_has_the_interval_of_its_worlds():
    # world means .4 and .6 whatever their seeds: mean .5, standard error .1, t(0.975, 1) = 12.7062
    assert (
        tables.with_interval({(1, 1): 0.3, (1, 2): 0.5, (2, 1): 0.6})
        == f"0.500 [{0.5 - 1.27062:.3f}, {0.5 + 1.27062:.3f}]"
    )
    assert tables.with_interval({(1, 1): 0.3, (1, 2): 0.5}) == "0.400"


def test_verdict_without_units_is_no_verdict():
    assert tables.verdict(None, 1).startswith("cannot tell")


# ---------------------------------------------------------------- units and tables


def unit(method, world, seed, sampled, **more):
    curve = {
        "update": [0, 5],
        "episodes": [0, 1600],
        "optimizer_step": [0, 75],
        "kept_rows": [0, 1600],
        "greedy_pass1": [0.4, sampled],
        "sampled_pass1": [0.3, sampled],
        "kl": [0.0, 2.0],
        "sampled_reward": [0.0, 1.0],
        "score": [None, 0.5],
        "kept_score": [None, 0.5],
    }
    return {
        "method": method,
        "variant": "",
        "world": world,
        "seed": seed,
        "greedy_pass1": sampled + 0.1,
        "sampled_pass1": sampled,
        "best": {"greedy_pass1": sampled, "sampled_pass1": sampled},
        "kl": 2.0,
        "best_of_5": sampled + 0.2,
        "curve": curve,
        **more,
    }


def write_study(folder, units):
    folder.mkdir(exist_ok=True)
    (folder / "units.jsonl").write_text("".join(json.dumps(u) + "\n" for u in units))
    (folder / "study.json").write_text(json.dumps({"study": "table2"}))
    tables.write(folder)
    return (folder / "tables.md").read_text()


def test_missing_units_show_as_missing(tmp_path):
    text = write_study(
        tmp_path / "study", [unit("ppo_m", w, s, 0.5 + 0.01 * s) for w in (1, 2) for s in (1, 2)]
    )
    raft = next(line for line in text.splitlines() if line.startswith("| RAFT"))
    assert raft.count("missing") == 5
    row = next(line for line in text.splitlines() if line.startswith("| PPO-M"))
    assert "0.515 [" in row and "missing" not in row


def test_tables_can_be_made_before_any_unit_is_done(tmp_path):
    assert "missing" in write_study(tmp_path / "study", [])


def test_a_unit_run_twice_counts_once():
    units = tables.Units([unit("br", 1, 1, 0.5), unit("br", 1, 1, 0.6)])
    assert units.values("br", "sampled_pass1") == {(1, 1): 0.6}


def test_comparison_at_equal_optimizer_steps_reads_the_curve():
    units = tables.Units([unit("br", 1, 1, 0.5)])
    assert tables.at_budget(units, "br", "optimizer_step", 30) == {
        (1, 1): pytest.approx(0.38)
    }  # 30/75 of the way from .3 to .5


def test_critic_warm_up_costs_no_steps_and_no_rows():
    curve = {
        "update": [0, 5, 10],
        "optimizer_step": [0, 75, 150],
        "kept_rows": [0.0, 1600.0, 3200.0],
        "episodes": [0, 1600, 3200],
    }
    run = {
        "command": "accelerate launch pfppo_single.py --lr 0.0001 --critic_warmup_updates 2 --kl_coef 0.05",
        "curve": curve,
    }
    assert tables.axis_values(run, "optimizer_step") == [0, 45, 120]  # 2 of 5 updates: 30 of 75 steps
    assert tables.axis_values(run, "kept_rows") == [0, 960, 2560]
    assert tables.axis_values(run, "episodes") == [0, 1600, 3200]  # they are generated all the same
    assert tables.axis_values(
        {**run, "command": "accelerate launch -m benchmark.baselines.dpo"}, "optimizer_step"
    ) == [0, 75, 150]


def test_whole_curve_is_the_mean_height():
    units = tables.Units([unit("br", 1, 1, 0.5), unit("dpo", 1, 1, 0.5)])
    assert tables.curve_means(units, "br", 800, "sampled_pass1") == {
        (1, 1): pytest.approx(0.35)
    }  # from .3 to .4 in a line
    units.lines[1]["curve"]["episodes"] = [0, 0]  # generates nothing
    assert tables.curve_means(units, "dpo", 800, "sampled_pass1") == {}


def test_sft_stands_for_every_seed_of_its_world():
    assert tables.spread({(1, 1): 0.4, (2, 1): 0.5}, {(1, 1): 0, (1, 2): 0, (3, 1): 0}) == {
        (1, 1): 0.4,
        (1, 2): 0.4,
    }


def test_spread_of_repeats_beside_what_counting_gives():
    repeats = [
        {"actual": [0.0, 0.0, 0.4, 1.0, 1.0], "count": [25] * 5},
        {"actual": [0.0, 0.0, 0.6, 1.0, 0.8], "count": [25] * 5},
    ]
    # variances over the two repeats: 0 0 .02 0 .02; at the ends p is 0 0 1 .9, in the middle .5
    assert tables.spread_of_repeats(repeats) == pytest.approx(
        ((0.02 / 4) ** 0.5, (0.09 / 25 / 4) ** 0.5, 0.02**0.5, 0.1)
    )


def test_bands_leave_out_what_worlds_have_in_common():
    runs = {
        "ppo_m": [{"world": w, "update": [0], "y": [level - 0.1]} for w, level in ((1, 0.2), (2, 0.8))],
        "br": [{"world": w, "update": [0], "y": [level + 0.1]} for w, level in ((1, 0.2), (2, 0.8))],
    }
    levels = figures.world_levels(runs, "y")
    assert levels == {(1, 0): pytest.approx(0.2), (2, 0): pytest.approx(0.8)}
    drawn = SimpleNamespace(
        plot=lambda *_, **__: None, fill_between=lambda xs, low, high, **_: bands.append((low[0], high[0]))
    )
    bands = []
    figures.band(drawn, runs["br"], "update", "y", "red", levels)
    assert bands == [(pytest.approx(0.6), pytest.approx(0.6))]  # .1 above its world in both: nothing is left
    runs["br"][0]["y"] = [
        0.4
    ]  # .2 and .1 above: standard deviation .1 / √2, standard error .05, t(.975, 1) = 12.7062, Morey √(3/2)
    figures.band(drawn, runs["br"], "update", "y", "red", levels)
    assert bands[1][1] - 0.65 == pytest.approx(12.7062 * 0.05 * math.sqrt(1.5), rel=1e-5)


def test_figure_2_is_judged_on_the_last_evaluation():
    units = tables.Units(
        [
            unit(m, w, 1, 0.5 + gain + 0.001 * w * gain)
            for m, gain in (("ppo_m", 0.0), ("br", 0.1))
            for w in (1, 2, 3)
        ]
    )
    sentence = next(s for s in tables.training_sentences(units) if "BR" in s and "sampled pass@1" in s)
    assert "+0.100" in sentence and "agrees, also over worlds" in sentence


def test_cells_of_the_map_are_also_judged_together():
    cells = ["pairs=300 noise=0.0 kl=0.05 n=5", "pairs=all noise=0.0 kl=0.05 n=5"]
    lines = [
        {**unit(m, w, 1, 0.5 + 0.001 * w + gain), "variant": cell}
        for cell in cells
        for w in (1, 2, 3)
        for m, gain in (("ppo_m", 0.0), ("br", 0.02))
    ]
    table = tables.map_tables(tables.Units(lines))[0]
    sentence = next(s for s in table.sentences if s.startswith("PF-PPO BR against PPO-M at equal rollouts"))
    assert (
        "All cells together: +0.020 [+0.020, +0.020]" in sentence
        and "(6 pairs): **wins, also over worlds**" in sentence
    )


def test_every_method_of_the_issue_has_a_row():
    names = (
        "sft raft bond dpo ipo kto iterative_dpo ppo_s ppo_m bon br bw random top top_random top_bottom "
        "pow_1 pow_2 pow_3 oracle"
    )
    assert set(reproduce.ORDER) == set(names.split())
    assert set(tables.PAPER_TABLE2) | set(tables.PAPER_TABLE3) == set(names.split())


# ---------------------------------------------------------------- runner


def test_default_plan_has_the_paired_main_comparison_first():
    runs = [u for u in reproduce.planned_units(reproduce.Args()) if not u.stage]
    main = [u for u in runs if u.method in reproduce.MAIN and not u.variant]
    assert (
        runs[: len(main)] == main
        and {u.seed for u in main} == {1, 2}
        and {u.world for u in main} == {1, 2, 3}
    )
    assert {u.method for u in runs} == set(reproduce.ORDER)


def test_worlds_of_the_main_job_are_used_and_other_sizes_refused(tmp_path):
    source = tmp_path / "quickstart/seed_1"
    (source / "world").mkdir(parents=True)
    args = reproduce.Args(
        worlds=(1,), worlds_from=str(tmp_path / "quickstart"), work_dir=str(tmp_path / "work")
    )
    sizes = {
        name: getattr(args, name)
        for name in ("num_sft", "sft_epochs", "num_preference", "num_valid", "num_test")
    }
    (source / "quickstart.json").write_text(json.dumps({**sizes, "seed": 1}))
    place = reproduce.Workplace(args)
    reproduce.borrow_worlds(place)
    assert reproduce.stage_done(reproduce.Unit(1, 1, stage="world"), place) and not reproduce.stage_done(
        reproduce.Unit(1, 1, stage="rm"), place
    )
    (source / "quickstart.json").write_text(json.dumps({**sizes, "seed": 1, "num_sft": 5}))
    with pytest.raises(SystemExit, match="num_sft 5 there"):
        reproduce.borrow_worlds(place)


def test_plan_goes_seed_by_seed_and_round_the_worlds():
    runs = [
        u
        for u in reproduce.planned_units(reproduce.Args(methods=("ppo_m", "br"), worlds=(1, 2), seeds=(1, 2)))
        if not u.stage
    ]
    assert [(u.method, u.world, u.seed) for u in runs][:4] == [
        ("ppo_m", 1, 1),
        ("ppo_m", 2, 1),
        ("br", 1, 1),
        ("br", 2, 1),
    ]
    assert len(runs) == 8 and {u.seed for u in runs[4:]} == {2}


def test_full_plan_has_twelve_units_of_every_rl_row_and_six_of_the_others():
    runs = [u for u in reproduce.planned_units(reproduce.Args(full=True)) if not u.stage]
    count = {name: sum(u.method == name and not u.variant for u in runs) for name in reproduce.ORDER}
    assert {
        name: sum(u.method == name and u.variant == "tuned" for u in runs) for name in reproduce.TUNED
    } == dict.fromkeys(reproduce.TUNED, 12)
    assert count.pop("sft") == 3
    assert {name for name, n in count.items() if n == 6} == set(reproduce.BASELINES)
    assert {name for name, n in count.items() if n == 12} == set(count) - set(reproduce.BASELINES)


def test_default_plan_is_assumed_to_take_about_an_hour():
    units = reproduce.planned_units(reproduce.Args())
    assert sum(reproduce.expected_seconds(u, {}) for u in units) / 2 < 4200


def test_unknown_method_is_refused():
    with pytest.raises(SystemExit, match="nonsense"):
        reproduce.planned_units(reproduce.Args(methods=("nonsense",)))


def test_half_a_line_of_a_killed_run_is_cut_off(tmp_path):
    path = tmp_path / "units.jsonl"
    records.append_row(path, {"method": "br", "seed": 1})
    with path.open("a") as file:
        file.write('{"method": "b')
    assert records.finished_rows(path) == [{"method": "br", "seed": 1}]
    records.append_row(path, {"method": "bw", "seed": 1})
    assert [line["method"] for line in records.finished_rows(path)] == ["br", "bw"]


def test_a_line_separator_in_a_text_ends_no_row(tmp_path):
    """evaluate.py writes texts as they are; U+2028 in one kept a run from going on."""
    row = {"task_id": "a", "completion": "one\u2028two\x85"}
    (tmp_path / "samples.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert records.finished_rows(tmp_path / "samples.jsonl") == [row]


def test_two_runs_in_one_folder_are_refused(tmp_path):
    held = reproduce.lock(tmp_path)
    with pytest.raises(SystemExit, match="another run"):
        reproduce.lock(tmp_path)
    held.close()
    reproduce.lock(tmp_path).close()


def test_other_settings_in_the_same_folder_are_refused(tmp_path):
    reproduce.check_study(reproduce.Args(updates=30), tmp_path)
    reproduce.check_study(reproduce.Args(updates=30, worlds=(1,)), tmp_path)
    with pytest.raises(SystemExit, match="updates"):
        reproduce.check_study(reproduce.Args(updates=20), tmp_path)


def test_curve_sums_kept_rows_and_averages_scores_since_the_last_evaluation():
    metrics = [
        {"step": 0, "eval/greedy_pass1": 0.4, "eval/kl": 0.0},
        {"step": 1, "filter/kept": 128, "objective/score": 1.0, "ppo/optimizer_step": 6, "ppo/episode": 320},
        {
            "step": 2,
            "filter/kept": 128,
            "objective/score": 2.0,
            "ppo/optimizer_step": 12,
            "ppo/episode": 640,
            "eval/greedy_pass1": 0.5,
        },
    ]
    curve = reproduce.curve(metrics)
    assert (
        curve["kept_rows"] == [0, 256]
        and curve["score"] == [None, 1.5]
        and curve["optimizer_step"] == [0, 12]
    )


def test_best_checkpoint_is_the_first_of_equals():
    assert (
        pipeline.best_update(
            [{"step": s, "eval/greedy_pass1": p} for s, p in ((0, 0.4), (5, 0.6), (10, 0.6))]
        )
        == 5
    )


def test_reported_command_holds_every_flag():
    place = reproduce.Workplace(reproduce.Args(updates=4))
    script, settings = place.run(reproduce.Unit(1, 7, "bw"))
    command = reproduce.pipeline.command_line(script, settings)
    assert (
        command.startswith("accelerate launch --cpu --num_processes 1 pfppo_single.py ")
        and "--filter bw" in command
        and "--seed 7" in command
    )
    assert "--total_episodes 1280" in command


def test_runs_with_other_flags_get_other_folders():
    place = reproduce.Workplace(reproduce.Args())
    folders = {
        place.run(reproduce.Unit(1, 1, "br", changes=changes))[1]["output_dir"]
        for changes in ((), (("kl_coef", 0.2),))
    }
    assert len(folders) == 2


@pytest.mark.parametrize("study", ["table2", "table4", "map", "beyond"])
def test_every_unit_has_a_key_and_a_folder_of_its_own(study):
    args = reproduce.Args(study=study, full=True)
    units = reproduce.planned_units(args)
    assert len({u.key for u in units}) == len(units)
    place = reproduce.Workplace(args)
    runs = [u for u in units if u.method not in ("", "sft", "w_r2") and u.method not in reproduce.BASELINES]
    assert len({place.run(u)[1]["output_dir"] for u in runs}) == len(runs)


@pytest.mark.parametrize("study", ["table2", "table4", "map", "beyond"])
def test_what_a_unit_needs_comes_before_it(study):
    units = reproduce.planned_units(reproduce.Args(study=study))
    place = {unit: i for i, unit in enumerate(units)}
    assert all(place[part] < place[unit] for unit in units for part in reproduce.parts_needed(unit))


def test_every_cell_of_the_map_generates_as_many_responses_per_update():
    for unit in reproduce.planned_units(reproduce.Args(study="map", full=True)):
        changes = dict(unit.changes)
        if unit.method not in ("", "sft"):
            assert changes["batch_size"] * changes["num_responses"] == 320
            kept = changes["batch_size"] * (2 if unit.method != "ppo_m" else changes["num_responses"])
            assert kept % changes.get("minibatch_size", 64) == 0


def test_full_map_repeats_the_cross_over_seeds_and_every_other_combination_once():
    units = [
        u
        for u in reproduce.planned_units(reproduce.Args(study="map", full=True, worlds=(1,)))
        if u.method == "ppo_m"
    ]
    seeds = {}
    for unit in units:
        seeds.setdefault(unit.variant, []).append(unit.seed)
    assert len(seeds) == 60 and sum(len(found) == 4 for found in seeds.values()) == 10
    assert seeds["pairs=1000 noise=0.0 kl=0.2 n=5"] == [1, 2, 3, 4] and seeds[
        "pairs=300 noise=0.0 kl=0.2 n=16"
    ] == [1]


# ---------------------------------------------------------------- beyond the paper


def test_alarm_waits_for_two_low_probes():
    # the first two probes average .8; half of it is .4; (.6 + .3) / 2 = .45 does not ring, (.3 + .3) / 2 does
    assert reproduce.alarm_update([0, 5, 10, 15, 20], [0.9, 0.7, 0.6, 0.3, 0.3]) == 20
    assert reproduce.alarm_update([0, 5, 10, 15], [0.9, 0.7, 0.6, 0.3]) is None
    assert reproduce.alarm_update([0, 5, 10, 15], [0.9, 0.7, 0.6, math.nan]) == 15  # (.6 + 0) / 2 = .3


def test_early_stopping_keeps_the_best_before_two_probes_without_a_new_one():
    # .5 is the best; .4 and .5 are not above it: stop at 15, and the .9 that would have come is never seen
    assert reproduce.patience_updates([0, 5, 10, 15, 20], [0.3, 0.5, 0.4, 0.5, 0.9]) == (15, 5)
    assert reproduce.patience_updates([0, 5, 10, 15, 20], [0.3, 0.5, 0.4, 0.6, 0.5]) == (20, 15)


def test_only_numbers_that_a_table_reads_are_measured_again():
    assert (
        reproduce.needed_version(reproduce.Unit(1, 1, "br", variant="alarm"), "beyond") == reproduce.VERSION
    )
    assert reproduce.needed_version(reproduce.Unit(1, 1, "br"), "table2") == 2
    assert (
        reproduce.needed_version(reproduce.Unit(1, 1, "br"), "beyond")
        == reproduce.needed_version(reproduce.Unit(1, 1, "dpo"), "table2")
        == 1
    )


def test_simplex_holds_every_weight_vector_once():
    found = reproduce.simplex(
        3, 4, 0.5
    )  # quarters, none above a half: the orders of (½, ½, 0) and of (½, ¼, ¼)
    assert sorted(found) == sorted(
        [[0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5], [0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.25, 0.25, 0.5]]
    )


def test_centred_reward_has_mean_zero_per_prompt_and_leaves_single_responses():
    assert study_rewards.centre([1.0, 3.0, 5.0, 2.0, 4.0], [2, 1, 2]) == [-1.0, 1.0, 5.0, -1.0, 1.0]


def test_chosen_weights_are_what_trains(tmp_path):
    place = reproduce.Workplace(reproduce.Args(work_dir=str(tmp_path)))
    place.world(1).mkdir()
    (place.world(1) / "weights.json").write_text(json.dumps({"weights": [0.5, 0.1, 0.0, 0.1, 0.3]}))
    script, settings = place.run(reproduce.Unit(1, 1, "w_r2"))
    command = reproduce.pipeline.command_line(script, settings)
    assert "--rank_weights 0.5 0.1 0.0 0.1 0.3 " in command and "--num_kept 2 " in command


def test_noise_acts_in_the_middle_of_the_range_only():
    assert (
        study_rewards.middle_noise(1.0, 2.0, 0.5) == 1.0
        and study_rewards.middle_noise(-1.0, 2.0, 0.5) == -1.0
    )
    assert (
        study_rewards.middle_noise(0.0, 2.0, 0.5) == 1.0 and study_rewards.middle_noise(0.5, 2.0, 0.5) == 1.25
    )


def test_noise_belongs_to_the_text():
    values = [study_rewards.text_noise("p", f"response {i}") for i in range(2000)]
    assert (
        study_rewards.text_noise("p", "response 0")
        == values[0]
        != study_rewards.text_noise("q", "response 0")
    )
    mean = sum(values) / len(values)
    assert (
        abs(mean) < 0.1 and abs(sum((v - mean) ** 2 for v in values) / len(values) - 1) < 0.15
    )  # 4 standard errors


# ---------------------------------------------------------------- the scheduler, on units of numbers alone


@pytest.fixture
def pretend(monkeypatch, tmp_path):
    """Units take no time: a part of a world leaves a file, a method its seed as pass@1; BW of world 2 fails
    while `broken` is there."""
    done, broken = tmp_path / "done", tmp_path / "broken"
    done.mkdir()

    def run_unit(unit, place, result, old=None):
        if unit.stage:
            (done / str(unit)).touch()
        elif unit.method == "bw" and unit.world == 2 and broken.exists():
            raise RuntimeError("planted failure")
        if old:
            numbers = {**old, "r2_filters": "new"}
            return result.write_text(json.dumps(numbers))
        numbers = {
            name: unit.seed / 10 for name in ("greedy_pass1", "sampled_pass1", "kl", "seconds", "cpu_seconds")
        }
        result.parent.mkdir(parents=True, exist_ok=True)
        result.write_text(
            json.dumps(
                {**numbers, "command": "accelerate launch ..."} | ({} if not unit.stage else {"seconds": 0.1})
            )
        )

    monkeypatch.setattr(reproduce, "run_unit", run_unit)
    monkeypatch.setattr(reproduce, "stage_done", lambda unit, place: (done / str(unit)).exists())
    monkeypatch.setattr(reproduce.tables, "write", lambda folder: None)
    return broken


def study_args(tmp_path):
    return reproduce.Args(
        output_dir=str(tmp_path / "results"),
        work_dir=str(tmp_path / "work"),
        methods=("br", "bw"),
        worlds=(1, 2),
        seeds=(1, 2),
    )


def lines_of(tmp_path):
    return [json.loads(line) for line in (tmp_path / "results/units.jsonl").read_text().splitlines()]


def test_every_finished_unit_is_one_line_with_what_others_rely_on(pretend, tmp_path):
    assert reproduce.main(study_args(tmp_path)) == 0
    lines = lines_of(tmp_path)
    assert sorted((u["method"], u["world"], u["seed"]) for u in lines) == [
        (m, w, s) for m in ("br", "bw") for w in (1, 2) for s in (1, 2)
    ]
    for name in (
        "method",
        "world",
        "seed",
        "greedy_pass1",
        "sampled_pass1",
        "kl",
        "seconds",
        "commit",
        "command",
    ):
        assert all(name in u for u in lines), name


def test_a_failed_unit_is_reported_and_tried_again_and_finished_ones_are_not(pretend, tmp_path, capfd):
    pretend.touch()
    assert reproduce.main(study_args(tmp_path)) == 1
    assert len(lines_of(tmp_path)) == 6 and "FAILED bw, world 2, seed 1" in capfd.readouterr().out
    pretend.unlink()
    assert reproduce.main(study_args(tmp_path)) == 0
    assert len(lines_of(tmp_path)) == 8 and "2 units to do" in capfd.readouterr().out


def test_r2_of_an_older_version_is_measured_again_and_nothing_else(pretend, tmp_path):
    args = study_args(tmp_path)
    assert reproduce.main(args) == 0
    path = tmp_path / "results/units.jsonl"
    old = [{**line, "version": 1, "commit": "then"} for line in lines_of(tmp_path)]
    path.write_text("".join(json.dumps(line) + "\n" for line in old))
    assert reproduce.main(args) == 0
    lines = lines_of(tmp_path)
    assert len(lines) == len(old) and all(
        line["version"] == reproduce.VERSION and line["r2_filters"] == "new" for line in lines
    )
    assert {line["commit"] for line in lines} == {"then"} and [line["kl"] for line in lines] == [
        line["kl"] for line in old
    ]


def test_dry_run_prints_the_budget_and_does_nothing(pretend, tmp_path, capfd):
    args = study_args(tmp_path)
    args.dry_run = True
    assert reproduce.main(args) == 0
    assert (
        "16 units to do, 0 done; about" in capfd.readouterr().out
        and not (tmp_path / "results/units.jsonl").exists()
    )


def test_the_speed_comparison_names_what_its_world_lacks(tmp_path):
    (tmp_path / "world").mkdir()
    (tmp_path / "world/rl.jsonl").touch()
    with pytest.raises(SystemExit, match="no sft/model; give a folder of benchmark.quickstart"):
        ppo_speed.main(ppo_speed.Args(workloads=("world",), world=str(tmp_path)))


def test_products_of_an_update_by_hand():
    # one layer of width 1, vocabulary 3, query of 2 and response of 1 tokens, 1 prompt of 5 responses
    load = ppo_speed.Workload(1, 1, 2, 1, 1, 1, 1, 0.0, 3)
    row = 24 * 3 + 4 * 9 / 2  # of a row's 3 tokens; attention reads half of 3 x 3
    query, last, head = 24 * 2 + 4 * 4 / 2, 24 + 4 * (9 - 4) / 2, 2 * 3
    assert ppo_speed.products(load, kept=0.4, length=1.0) == pytest.approx(
        {
            "generate": query + 5 * (last + head),
            "score": 5 * row,
            "logprobs": 2 * (3 * row + 2 * head),
            "train": 2 * 3 * 3 * (2 * row + head),
        }
    )


def test_a_workloads_policy_stops_as_often_as_it_is_told(tmp_path):
    load = ppo_speed.Workload(1, 32, 4, 8, 2, 2, 2, stop_probability=1 / 4, vocabulary=50)
    ppo_speed.make_models(tmp_path, load)
    policy = pfppo.load_causal_lm(str(tmp_path / "sft/model")).eval()
    with torch.no_grad():
        probabilities = policy(torch.randint(50, (6, 9))).logits.softmax(-1)
    assert probabilities[..., -1].mean().item() == pytest.approx(1 / 4, abs=0.03)


def test_the_table_compares_with_trls_faster_setting():
    ours, slow, fast = ({"seconds": [x, x, 9.0], "megabytes": 1.0} for x in (2.0, 8.0, 6.0))
    lines = ppo_speed.table(
        "mini", {"ours": [ours], "TRL": [slow], "TRL, checkpointing": [fast]}
    ).splitlines()
    assert lines[0] == "mini" and lines[3].startswith("| ours | 2.00 | 2.00 | 3.00 |")


def test_operations_belong_to_a_kind_by_name_or_by_the_last_axis_they_read():
    load = ppo_speed.Workload(width=64, vocabulary=512)
    kinds = [
        ppo_speed.kind_of("aten::addmm", [[256], [3072, 64], [64, 256]], load),
        ppo_speed.kind_of("aten::gelu", [[64, 48, 256]], load),
        ppo_speed.kind_of("aten::exp", [[64, 24, 512]], load),
        ppo_speed.kind_of("aten::_scaled_dot_product_flash_attention_for_cpu", [[64, 2, 48, 32]], load),
        ppo_speed.kind_of("aten::exponential_", [[320, 512], []], load),
        ppo_speed.kind_of("aten::copy_", [[64, 48, 64]], load),
    ]
    assert kinds[:3] == ["matrix products", "activation", "over the vocabulary"]
    assert kinds[3:] == ["attention", "drawing tokens", "other operations"]


def test_a_line_through_the_seconds_by_hand():
    assert growth.straightness((1, 2, 4), [3.0, 5.0, 9.0]) == pytest.approx(1.0)
    # the line through (0, 0), (1, 1), (2, 0) is flat at 1/3: it explains nothing
    assert growth.straightness((0, 1, 2), [0.0, 1.0, 0.0]) == pytest.approx(0.0)
