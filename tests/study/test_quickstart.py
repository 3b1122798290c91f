"""The main job: its sizes, its progress line, its errors in one line, and what it shows at the end."""

import sys

import numpy as np
import pytest

from benchmark import pipeline, quickstart, records
from benchmark.minicode import __main__ as minicode_main
from benchmark.study import figures


def test_fast_changes_the_sizes_that_were_not_given():
    args = quickstart.with_fast_sizes(quickstart.Args(fast=True, num_valid=50))
    assert args.updates == quickstart.FAST["updates"] and args.num_valid == 50
    assert quickstart.with_fast_sizes(quickstart.Args()) == quickstart.Args()


def test_planned_seconds_grow_with_the_sizes():
    usual = quickstart.planned_seconds(quickstart.Args())
    assert usual == {name: stage.seconds for name, stage in quickstart.STAGES.items()}
    half = quickstart.planned_seconds(quickstart.Args(updates=10))
    assert half["ppo"] == 20 + (119 - 20) / 2 and half["sft"] == usual["sft"]
    fast = quickstart.with_fast_sizes(quickstart.Args(fast=True))
    assert 90 < sum(quickstart.planned_seconds(fast).values()) < 150  # "about two minutes"


def test_time_left_follows_the_lines_of_the_runs(monkeypatch, capsys):
    now = [1000.0]
    monkeypatch.setattr(quickstart.time, "time", lambda: now[0])
    progress = quickstart.Progress({"sft": 90.0, "ppo": 200.0})

    def work():
        now[0] += 190  # twice as slow as planned: (190 + 10) / (90 + 10)

    progress.run("sft", work)
    assert progress.left() == pytest.approx(400)

    def train():
        progress.line("br 10/20, 5 s left  objective/score 0.1")  # one of three runs is half done
        return progress.left()

    left, _ = progress.run("ppo", train)
    done = 90 + 200 / 6
    assert left == pytest.approx((190 + 10) / (done + 10) * (290 - done))
    shown = capsys.readouterr().out
    assert "[stage 6/7, 3 min gone, about 7 min left]" in shown and "objective/score 0.1" in shown


def test_stages_that_are_there_already_count_as_nothing(monkeypatch):
    progress = quickstart.Progress({"sft": 90.0, "ppo": 200.0})
    progress.run("sft", lambda: None)
    assert progress.finished == 0 and progress.left() == pytest.approx(200, rel=0.01)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(updates=0), "--updates must lie between 1"),
        (dict(num_valid=10), "--num_valid must be at least 20"),
        (dict(max_operations=1), "--max_operations must be at least 2"),
        (dict(output_dir="other"), "--output_dir other is not empty and holds no quickstart run"),
        (dict(output_dir="file"), "--output_dir file is a file"),
        (dict(output_dir="run", seed=2), "--output_dir run holds a run with another seed"),
    ],
)
def test_user_errors_are_one_line(changes, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    quickstart.open_folder(quickstart.Args(output_dir="run"))
    with pytest.raises(SystemExit) as error:
        quickstart.main(quickstart.Args(**changes))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_failing_script_ends_with_its_own_last_line(tmp_path):
    said = []
    settings = dict(model="none", train_data="none.jsonl", output_dir=tmp_path / "sft", lr="nan")
    with pytest.raises(SystemExit) as error:
        pipeline.launch("sft_single.py", settings, tmp_path / "sft.log", said.append)
    assert str(error.value).startswith("sft_single.py: --lr must ")
    assert str(error.value).endswith(f"(log: {tmp_path}/sft.log)") and "\n" not in str(error.value)
    assert "Traceback" not in " ".join(said) and "Traceback" in (tmp_path / "sft.log").read_text()
    assert "sft_single.py --model" in (tmp_path / "sft.sh").read_text()


def test_too_few_pairs_are_said(tmp_path, monkeypatch):
    (tmp_path / "world").mkdir()
    rows = [{"task_id": str(i), "prompt": "p"} for i in range(30)]
    records.write_rows(tmp_path / "world/preference.jsonl", rows)
    monkeypatch.setattr(pipeline, "load", lambda _: (None, None))
    monkeypatch.setattr(pipeline, "sample", lambda _, __, rows, n, *___: (None, ["same"] * len(rows) * n))
    monkeypatch.setattr(pipeline, "actual_scores", lambda _, texts: np.zeros(len(texts)))
    with pytest.raises(SystemExit, match="only 0 of 30 prompts have a passing and a failing sample"):
        pipeline.preferences(tmp_path, seed=1)
    assert not (tmp_path / "preferences.jsonl").exists()


def answers(passed):
    return [
        {"prompt": f"# p{i}\ndef f(x):\n", "response": f"r{i}", "passed": p} for i, p in enumerate(passed)
    ]


def test_two_problems_before_and_after(tmp_path):
    records.write_rows(tmp_path / "sft_answers.jsonl", answers([True, False, False, True]))
    records.write_rows(tmp_path / "br_answers.jsonl", answers([True, False, True, False]))
    text = quickstart.closing(tmp_path, quickstart.Args())
    assert "got better (1 of 4):\n# p2" in text and "got worse (1 of 4):\n# p3" in text and "p1" not in text
    assert text.endswith(f"-m benchmark.minicode ask --policy {tmp_path}/br/policy p2")
    records.write_rows(tmp_path / "br_answers.jsonl", answers([True, False, True, True]))
    assert "stays wrong (1 of 4):\n# p1" in quickstart.closing(tmp_path, quickstart.Args())


def test_the_line_that_talks_to_a_policy(world, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["minicode", "ask", "--policy", str(world / "gpt2"), "keep 3", "sort"])
    minicode_main.main()
    shown = capsys.readouterr().out
    assert shown.index("# keep 3\ndef f(x):") < shown.index("# sort\ndef f(x):")


def test_pictures_say_what_their_styles_mean(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.append(figure) or path)
    curve = {"sampled": [(1, 0.1), (2, 0.2)], "kept": [(1, 0.3), (2, 0.4)], "pass1": [(0, 0.4), (2, 0.5)]}
    figures.training_curves({"br": curve}, tmp_path / "x.png", problems=100)
    repeats = [{"reward": [-1.0, 1.0], "actual": [0.2, 0.6 + 0.1 * i], "count": [5, 5]} for i in range(3)]
    figures.reliability(repeats, tmp_path / "x.png")
    legends = [drawn[0].legends[0], drawn[1].axes[0].get_legend()]
    texts = [[text.get_text() for text in legend.get_texts()] for legend in legends]
    assert texts[0][0] == "PF-PPO BR" and "left: the samples trained on" in texts[0]
    assert "right: ± standard error, 100 problems" in texts[0]
    assert "mean of 3 repeats of 10 responses" in texts[1] and len(drawn[1].axes[0].lines) == 2
    assert list(drawn[0].axes[1].get_xticks()) == [0, 2]  # where there are points
