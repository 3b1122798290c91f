"""R² of filters: the measure on numbers worked by hand, equal rows, intervals, and what benchmark.r2 makes of a
user's own policy, reward and grader."""

import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from conftest import write_jsonl

import pfppo_single as pf
from benchmark import r2, records


@pytest.fixture
def quiet(monkeypatch):
    """Pictures are drawn in tests of their own."""
    monkeypatch.setattr(r2, "draw", lambda *_: None)


def samples(prompts=200, n=10, seed=7, slope=0.3):
    """Graded samples whose pass rate is linear in the reward: every filter's R² would be 1 without noise."""
    rng = np.random.default_rng(seed)
    reward = rng.uniform(-1, 1, prompts * n).astype(np.float32)
    actual = (rng.uniform(size=prompts * n) < 0.5 + slope * reward).astype(float)
    return {"prompt_ids": np.repeat(np.arange(prompts), n), "reward": reward, "actual": actual}


# ---------------------------------------------------------------- the measure


def test_r2_by_hand():
    # PITFALLS PF-11: groups of equal count; rewards (1 1) (2 2) (3 3), scores 0, 1, 0.5: slope 0.25, ŝ =
    # 0.25, 0.5, 0.75, Σ(s - ŝ)² = 0.0625 + 0.25 + 0.0625 = 0.375, Σ(s - s̄)² = 0.5, R² = 1 - 0.75
    rewards, actual = np.array([3.0, 1, 2, 3, 1, 2]), np.array([0.0, 0, 1, 1, 0, 1])
    assert r2.reward_r2(rewards, actual, num_groups=3) == pytest.approx(0.25)


def test_r2_of_a_line_is_one_and_of_noise_about_zero():
    # PITFALLS PF-11
    generator = np.random.default_rng(0)
    rewards = generator.uniform(-1, 1, 4000)
    assert r2.reward_r2(rewards, 0.5 + 0.4 * rewards) == pytest.approx(1)
    assert r2.reward_r2(rewards, -3 * rewards) == pytest.approx(1)
    noise = [r2.reward_r2(rewards, generator.integers(0, 2, 4000).astype(float)) for _ in range(40)]
    assert 0 <= min(noise) and np.mean(noise) < 0.1  # 1/19 is expected of a line through 20 points of noise


def test_r2_of_a_constant_is_undefined():
    # PITFALLS PF-11: reported as NaN, never as a number
    line = np.linspace(0, 1, 50)
    assert math.isnan(r2.reward_r2(line, np.ones(50))) and math.isnan(r2.reward_r2(np.ones(50), line))
    assert math.isnan(r2.reward_r2(line[:1], line[:1]))


def test_r2_groups_have_equal_count():
    # PITFALLS PF-11: pairs (0 1) (2 3) (4 5) (6 1000) with scores 0, 1/2, 1/2, 1; equal width would be 7
    # against 1
    rewards, actual = np.array([0.0, 1, 2, 3, 4, 5, 6, 1000]), np.array([0.0, 0, 1, 0, 0, 1, 1, 1])
    r, s = np.array([0.5, 2.5, 4.5, 503]), np.array([0, 0.5, 0.5, 1])
    assert r2.reward_r2(rewards, actual, num_groups=4) == pytest.approx(np.corrcoef(r, s)[0, 1] ** 2)


def test_reliability_by_hand():
    rewards = np.array([9.0, 1, 8, 2, 7, 3, 6, 4])
    assert r2.reliability(rewards, (rewards > 4.5).astype(float), 2, 1, 0) == [
        {"reward": [2.5, 7.5], "actual": [0.0, 1.0], "count": [4, 4]}
    ]


def test_reliability_repeats_share_no_response():
    rewards = np.arange(400.0)
    repeats = r2.reliability(rewards, rewards, 4, 10, 0)
    assert len(repeats) == 10 and all(sum(repeat["count"]) == 40 for repeat in repeats)
    total = sum(r * c for repeat in repeats for r, c in zip(repeat["reward"], repeat["count"]))
    assert total == pytest.approx(rewards.sum())  # every response once


# ---------------------------------------------------------------- filters at equal rows


@pytest.mark.parametrize("name", r2.FILTERS)
def test_a_filter_keeps_what_pfppo_keeps(name):
    found, flags = r2.regroup(samples(), 5), {"pow_k": 1.0, **r2.FILTERS[name]}
    rows = r2.make_filter(5, **r2.FILTERS[name])(found, torch.Generator().manual_seed(3))
    args = pf.parse_args(pf.Args, r2.flag(name).split() + "--policy p --reward r --prompts x".split())
    num_kept, weights, _ = pf.check_args(args, 1)
    scores, ids = torch.from_numpy(found["reward"]), torch.from_numpy(found["prompt_ids"])
    keep = partial(pf.filter_responses, draw="exact", thresholds=(-0.3, 0.3), pow_k=flags["pow_k"])
    expected = keep(scores, ids, torch.Generator().manual_seed(3), flags["filter"], weights, num_kept)
    assert rows.tolist() == expected.tolist()


def test_filters_are_compared_at_the_same_number_of_rows():
    found = samples(400, slope=0.4)
    table = r2.r2_of_filters(found, r2.named_filters(5, ("none", "random", "bon")), seed=1, n=5)
    assert {entry["rows"] for entry in table.values()} == {800}  # BoN: one row of each of 400 * 10 / 5 groups
    assert table["none"]["all_rows"] > table["none"]["r2"]  # 4000 rows have less noisy group means than 800
    assert table["none"]["r2"] == pytest.approx(table["random"]["r2"], abs=0.1)  # the same distribution


def test_numbers_are_those_of_the_recorded_studies():
    # what benchmark/pipeline.py at 4137784 gives for these samples
    names = ("none", "random", "bon", "br", "bw", "pow_2", "top_bottom")
    table = r2.r2_of_filters(samples(), r2.named_filters(5, names), seed=3, n=5)
    recorded = (
        0.7383738993,
        0.7420990894,
        0.5170636222,
        0.7481417772,
        0.8637372466,
        0.8866170569,
        0.8450282588,
    )
    assert [table[name]["r2"] for name in names] == pytest.approx(recorded, abs=1e-9)
    assert table["bw"]["all_rows"] == pytest.approx(0.9376919156, abs=1e-9)
    values = r2.bootstrap_r2(r2.regroup(samples(), 5), 5, r2.make_filter(5, filter="bw"), 3, 20, 20, 400)
    assert r2.interval(values) == pytest.approx((0.6816926476, 0.9035734248), abs=1e-9)


def test_regrouped_samples_keep_neighbours_together():
    found = r2.regroup({"prompt_ids": np.array([7, 7, 7, 7, 8, 8, 8, 8]), "reward": np.arange(8)}, 2)
    assert found["prompt_ids"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    with pytest.raises(ValueError, match="groups of 3"):
        r2.regroup(found, 3)


def test_every_filter_sees_the_same_prompts_so_equal_filters_have_no_lead():
    filters = {"none": r2.make_filter(5, filter="none"), "again": r2.make_filter(5, filter="none")}
    entry = r2.r2_of_filters(samples(40), filters, seed=1, n=5, num_groups=5, resamples=10)["again"]
    assert (entry["lead"], entry["lead_low"], entry["lead_high"]) == (0, 0, 0)
    assert entry["low"] < entry["high"]


def test_filters_made_for_a_bounded_reward_are_left_out_of_another():
    found = samples(40)
    assert r2.measure(found, 5, 1, num_groups=5, resamples=2)["left_out"] == {}
    found["reward"] = found["reward"] * 10
    measured = r2.measure(found, 5, 1, num_groups=5, resamples=2)
    assert set(measured["left_out"]) == set(r2.BOUNDED)
    assert list(measured["filters"]) == ["none", "random", "bon", "br", "bw"]


# ---------------------------------------------------------------- what it says


def entry(value, low=None, high=None):
    lead = {} if low is None else {"lead": value - 0.5, "lead_low": low, "lead_high": high}
    return {"r2": value, "all_rows": value, "rows": 80, "low": value - 0.1, "high": value + 0.1, **lead}


@pytest.mark.parametrize(
    "filters, expected",
    [
        ({"bw": entry(0.8, 0.1, 0.4), "br": entry(0.6, -0.1, 0.2)}, "Use --filter bw"),
        ({"pow_2": entry(0.8, 0.1, 0.4)}, "Use --filter pow --pow_k 2"),
        ({"bw": entry(0.8, -0.1, 0.4)}, "The intervals overlap"),
        ({"bw": entry(0.4, -0.3, 0.1)}, "No filter has the highest R²"),
    ],
)
def test_advice_needs_a_lead_whose_interval_is_above_zero(filters, expected):
    text = r2.advice({"filters": {"none": entry(0.5), **filters}, "N": 5})
    assert expected in text[0] + text[1] and "--filter" in text[-1]


def test_with_two_responses_random_is_not_named_beside_no_filter():
    # random keeps both of two
    found = {"filters": {"none": entry(0.5), "bw": entry(0.4, -0.3, 0.1)}, "N": 2}
    assert r2.advice(found)[-1] == "Use --filter none: nothing measured here speaks against it."


@pytest.mark.parametrize(
    "changes, why",
    [
        (dict(actual=0.0), "no graded response passes"),
        (dict(actual=1.0), "every graded response passes"),
        (dict(actual=0.25), "every graded response has the actual score 0.25"),
        (dict(reward=0.5), "every response has the reward 0.5"),
    ],
)
def test_where_all_scores_are_equal_one_line_says_so_and_no_flag_is_named(changes, why):
    found = samples(20)
    found |= {name: np.full_like(found[name], value) for name, value in changes.items()}
    text = r2.report(r2.measure(found, 5, 1, num_groups=5, resamples=3))
    assert text.splitlines()[-1] == f"Nothing can be said of any filter: {why}."
    assert "--filter" not in text and "nan" not in text


def test_where_few_responses_pass_no_flag_is_named():
    # three of 200: most draws of ten rows hold none, so that R² without a filter is undefined
    found = samples(20)
    found["actual"] = (found["reward"] > np.sort(found["reward"])[-4]).astype(float)
    measured = r2.measure(found, 5, 1, num_groups=5, resamples=20)
    assert math.isfinite(measured["filters"]["bon"]["r2"])
    text = r2.report(measured)
    assert text.splitlines()[-1].startswith("Nothing can be said of any filter: too few graded responses")
    assert "--filter" not in text and "nan" not in text


def test_an_interval_does_not_rest_on_the_few_draws_where_r2_is_defined():
    values = np.linspace(0, 1, 20)
    assert r2.interval(values) == pytest.approx((0.025, 0.975))
    values[3] = math.nan  # one in twenty
    assert all(map(math.isfinite, r2.interval(values)))
    values[4] = math.nan
    assert all(map(math.isnan, r2.interval(values)))


def test_the_bootstrap_draws_prompts_with_all_their_responses():
    # responses of a prompt are alike: drawn apart, its two groups of 5 would make intervals too narrow
    drawn, rewards = [], np.arange(100.0)  # 10 responses to each of 10 prompts

    def keep(groups, generator):
        drawn.append((groups["prompt_ids"].tolist(), groups["reward"].tolist()))
        return np.arange(100)

    graded = {"prompt_ids": np.repeat(np.arange(10), 10), "reward": rewards, "actual": rewards % 2}
    r2.bootstrap_r2(graded, 5, keep, seed=1, resamples=3, num_groups=5, rows=100)
    assert len(drawn) == 3 and len({tuple(reward) for _, reward in drawn}) == 3
    for ids, reward in drawn:
        assert ids == [i // 5 for i in range(100)]
        whole = [[10 * int(reward[i] // 10) + k for k in range(10)] for i in range(0, 100, 10)]
        assert [reward[i : i + 10] for i in range(0, 100, 10)] == whole


# ---------------------------------------------------------------- a user's own data

GRADERS = """
def vowels(prompts, responses, rows):
    return [sum(c in "aeiou" for c in text) / 10 for text in responses]

def starts(prompts, responses, rows):
    assert all(row["prompt"] == prompt for prompt, row in zip(prompts, rows))
    return [float(text[:1] < "m") for text in responses]
"""


@pytest.fixture
def settings(world, module, tmp_path):
    name = module("own_graders", GRADERS)
    return dict(
        policy=str(world / "gpt2"),
        reward=f"{name}:vowels",
        actual_score=f"{name}:starts",
        prompts=str(world / "prompts.jsonl"),
        output_dir=str(tmp_path / "r2"),
        num_responses=4,
        num_samples=8,
        response_length=8,
        query_length=16,
        save_every=5,
        resamples=3,
    )


def test_own_policy_reward_and_grader(settings, tmp_path, capsys):
    found = r2.main(r2.Args(**settings))
    lines = records.read_rows(tmp_path / "r2/samples.jsonl")
    assert [len(line["responses"]) for line in lines] == [8] * 12 and found["graded"] == 96
    assert all(line["actual"] == [float(text[:1] < "m") for text in line["responses"]] for line in lines)
    assert found["groups"] == 12  # 12 prompts x 8 / 4 leave BoN 24 rows, two for each of 12 groups
    shown = capsys.readouterr().out
    assert "96 graded responses (12 prompts x 8)" in shown
    assert "Use --filter" in "\n".join(shown.splitlines()[-3:])
    for name in ("r2.png", "reliability.png", "r2.json", "r2.md"):
        assert (tmp_path / "r2" / name).is_file()


def test_a_killed_run_goes_on_with_the_same_samples(settings, tmp_path, monkeypatch, quiet):
    r2.main(r2.Args(**settings))
    whole = (tmp_path / "r2/samples.jsonl").read_bytes()
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "args.json").write_text((tmp_path / "r2/args.json").read_text().replace("/r2", "/cut"))
    (cut / "samples.jsonl").write_bytes(b"".join(whole.splitlines(keepends=True)[:7]) + b'{"prompt": "ha')
    r2.main(r2.Args(**{**settings, "output_dir": str(cut)}))
    assert (cut / "samples.jsonl").read_bytes() == whole
    monkeypatch.setattr(r2, "collect", None)  # everything is there: nothing is sampled again
    r2.main(r2.Args(**{**settings, "output_dir": str(cut)}))


def test_messages_are_read_in_the_template_of_a_file(settings, tmp_path, monkeypatch):
    rows, seen = [{"prompt": [{"role": "user", "content": "two"}]}] * 12, {}
    settings["prompts"] = str(write_jsonl(tmp_path / "chats.jsonl", rows))
    (tmp_path / "chat.jinja").write_text(
        "{% for m in messages %}{{ m['role'] }}={{ m['content'] }}\n{% endfor %}"
    )

    def collect(policy, tokenizer, judges, rows, *_, **__):
        seen["first"] = tokenizer.decode(rows[0]["query_ids"])
        raise SystemExit

    monkeypatch.setattr(r2, "collect", collect)
    with pytest.raises(SystemExit):
        r2.main(r2.Args(**settings, chat_template=str(tmp_path / "chat.jinja")))
    assert seen["first"] == "user=two\n"


def test_a_reward_model_scores_as_in_pfppo(settings, world, quiet):
    found = r2.main(r2.Args(**{**settings, "reward": str(world / "reward_tanh")}))
    lines = records.read_rows(records.Path(settings["output_dir"]) / "samples.jsonl")
    rewards = np.array([x for line in lines for x in line["reward"]])
    assert (
        np.abs(rewards).max() <= 1
        and len(np.unique(rewards)) > 20
        and found["left_out"].keys() < {*r2.BOUNDED}
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(num_samples=6), "--num_samples 6 must be a multiple of --num_responses 4"),
        (dict(num_responses=1), "--num_responses must be at least 2"),
        (dict(actual_score="nowhere:none"), "--actual_score nowhere:none"),
        (dict(num_prompts=2), "2 are too few"),
        (dict(num_prompts=1, num_samples=40), "1 are too few for R²; give at least 2"),
        (dict(temperature=0.0), "--temperature must lie between"),
    ],
)
def test_user_errors_are_one_line(settings, changes, message):
    with pytest.raises(SystemExit) as error:
        r2.main(r2.Args(**{**settings, **changes}))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_other_settings_in_the_same_folder_are_refused(settings, tmp_path, quiet):
    (tmp_path / "r2").mkdir()
    args = {**r2.Args(**settings).__dict__, "num_processes": 1, "temperature": 0.7}
    (tmp_path / "r2/args.json").write_text(json.dumps(args))
    with pytest.raises(SystemExit, match="holds another run: temperature"):
        r2.main(r2.Args(**settings))
