"""The main job: its sizes, its progress line, its errors in one line, and what it shows at the end."""

import re
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from benchmark import pipeline, quickstart, records
from benchmark.minicode import __main__ as minicode_main
from benchmark.study import figures, sft_epochs


def test_fast_changes_the_sizes_that_were_not_given():
    args = quickstart.with_fast_sizes(quickstart.Args(fast=True, num_valid=50))
    assert args.updates == quickstart.FAST["updates"] and args.num_valid == 50
    assert quickstart.with_fast_sizes(quickstart.Args()) == quickstart.Args()


def test_planned_seconds_grow_with_the_sizes():
    usual = quickstart.planned_seconds(quickstart.Args())
    assert usual == {name: stage.seconds for name, stage in quickstart.STAGES.items()}
    half = quickstart.planned_seconds(quickstart.Args(updates=10))
    stage = quickstart.STAGES["ppo"]
    assert half["ppo"] == stage.fixed + (stage.seconds - stage.fixed) / 2 and half["sft"] == usual["sft"]
    fast = quickstart.with_fast_sizes(quickstart.Args(fast=True))
    assert 80 < sum(quickstart.planned_seconds(fast).values()) < 120


def test_time_left_follows_the_lines_of_the_runs(monkeypatch, capsys):
    now = [1000.0]
    monkeypatch.setattr(quickstart.time, "time", lambda: now[0])
    progress = quickstart.Progress({"sft": 90.0, "ppo": 200.0})

    def work():
        now[0] += 190  # twice as slow as planned: (190 + 10) / (90 + 10)

    progress.run("sft", work)
    assert progress.left() == pytest.approx(400)

    def train():
        progress.line("br 10/20, 5 s left  objective/score 0.1")  # one of four runs is half done
        return progress.left()

    left, _ = progress.run("ppo", train)
    done = 90 + 200 / 8
    assert left == pytest.approx((190 + 10) / (done + 10) * (290 - done))
    shown = capsys.readouterr().out
    assert "[stage 5/5, 3 min gone, about 7 min left]" in shown and "objective/score 0.1" in shown


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
    assert "sft_single.py --model" in (tmp_path / "sft.sh").read_text()


def test_a_traceback_is_in_the_log_alone(tmp_path):
    said, script = [], tmp_path / "broken.py"
    script.write_text("print('begins', flush=True)\nraise ValueError('out of numbers')\n")
    with pytest.raises(SystemExit) as error:
        pipeline.launch(str(script), {}, tmp_path / "x.log", said.append)
    assert str(error.value) == f"{script}: ValueError: out of numbers (log: {tmp_path}/x.log)"
    assert said[1:] == ["begins"] and "Traceback" in (tmp_path / "x.log").read_text()


def test_the_kept_command_says_how_many_threads():
    one, two = (pipeline.command_line("sft_single.py", {"seed": 1}, threads) for threads in (1, 2))
    assert one == "accelerate launch --cpu --num_processes 1 sft_single.py --seed 1"
    assert two == f"OMP_NUM_THREADS=2 {one}"


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


def test_processes_that_share_the_prompts_change_no_sample(tmp_path, monkeypatch):
    (tmp_path / "world").mkdir()
    rows = [{"task_id": str(i), "prompt": str(i)} for i in range(1500)]
    records.write_rows(tmp_path / "world/preference.jsonl", rows)
    monkeypatch.setattr(pipeline, "load", lambda _: (None, None))

    def sample(_, __, rows, n, temperature, seed):
        return None, [f"{seed} {row['prompt']} {i}" for row in rows for i in range(n)]

    monkeypatch.setattr(pipeline, "sample", sample)
    monkeypatch.setattr(pipeline, "actual_scores", lambda _, texts: np.arange(len(texts)) % 5 < 2)

    def other_order(work, *arguments):  # processes finish in an order of their own
        done = {i: work(*each) for i, each in reversed(list(enumerate(zip(*arguments))))}
        return [done[i] for i in sorted(done)]

    for name, run in (("one", map), ("two", other_order)):
        pipeline.preferences(tmp_path, seed=3, name=name, run=run)
    assert (tmp_path / "one.jsonl").read_text() == (tmp_path / "two.jsonl").read_text()
    chosen = [row["chosen"].split() for row in records.read_rows(tmp_path / "one.jsonl")]
    assert {int(prompt) // 640: int(seed) for seed, prompt, _ in chosen} == {0: 300009, 1: 300649, 2: 301289}


@pytest.fixture
def lanes(tmp_path, monkeypatch):
    """side_by_side with stages that only say that they ran; `fail` names one that does not end well."""
    ran = []

    def run(fail=None):
        def stage(name, out=None):
            ran.append(name)
            if name == fail:
                raise SystemExit(f"{name} failed")
            return out

        monkeypatch.setattr(pipeline, "ppo", lambda folder, method, *_, **__: stage(method))
        monkeypatch.setattr(quickstart, "r2_of_sft", lambda *_: stage("r2", {"filters": {}}))
        monkeypatch.setattr(quickstart.r2, "report", lambda found: "table")
        passed = {"greedy_pass1": 0.5}
        monkeypatch.setattr(quickstart, "test_problems", lambda _, name, __: stage(f"test_{name}", passed))
        seconds, said = {}, []
        with ThreadPoolExecutor(2) as pool:
            args = quickstart.Args(parallel=1)
            out = quickstart.side_by_side(tmp_path, args, pool, said.append, seconds.__setitem__)
        return out, seconds, said

    run.ran = ran
    return run


def test_r2_comes_before_the_second_run_and_tests_come_last(lanes):
    (found, methods), seconds, said = lanes()
    order = ["ppo_m", "r2", "br", "bw", "test_sft", "test_ppo_m", "test_br", "test_bw"]
    assert lanes.ran == order == list(seconds)
    assert found == {"filters": {}} and list(methods) == ["sft", "ppo_m", "br", "bw"]
    assert said[0] == "table" and said[-1] == "test 4/4  PF-PPO BW 0.500"


def test_a_run_that_fails_ends_the_job(lanes):
    with pytest.raises(SystemExit, match="br failed"):
        lanes(fail="br")
    assert "test_br" not in lanes.ran


IMPORTS = """
import os, signal
from pathlib import Path
from benchmark import pipeline, workers

def say(line):
    if str(line).isdigit():
        print("began", line, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
"""
WORKER = """
from multiprocessing import forkserver
forkserver.set_forkserver_preload = len  # it would import for seconds
say(workers.start(1).submit(os.getpid).result())
"""
SCRIPT = """
Path("sleeper.py").write_text("import os, time; print(os.getpid(), flush=True); time.sleep(60)")
pipeline.launch(os.path.abspath("sleeper.py"), {}, Path("x.log"), say)
"""


@pytest.mark.parametrize("work", [WORKER, SCRIPT], ids=["worker", "script"])
def test_what_a_job_begins_ends_with_it(work, forks, tmp_path):
    # the job is killed as the system kills it: nothing of it can clean up
    code = f"{IMPORTS}os.chdir({str(tmp_path)!r}){work}"
    answer = forks("fork_server", "run_code", code, folder=tmp_path / "job")
    assert answer["codes"] == [-signal.SIGKILL], answer["printed"]
    worker = int(re.search("^began ([0-9]+)$", answer["printed"][0], re.M)[1])
    for _ in range(200):
        if not Path(f"/proc/{worker}").exists() or "Z" in Path(f"/proc/{worker}/stat").read_text().split()[2]:
            return
        time.sleep(0.1)
    pytest.fail(f"worker {worker} lives on")


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


# ---------------------------------------------------------------- how many epochs SFT needs


def sft_run(epochs, stopped, passed):
    run = {
        "schedule": "cosine",
        "epochs": epochs,
        "stopped": stopped,
        "train/loss": [0.5],
        "test/loss": [0.6],
    }
    return run | {"passed": {"greedy": passed, "sampled": passed}}


def test_fewer_epochs_are_compared_on_the_same_problems():
    # differences -1, 0, 0, 0: mean -0.25, standard deviation √3/4, standard error √3/8, times 1.96: 0.424
    runs = [sft_run(3, 3, [1, 1, 0, 0]), sft_run(3, 2, [0, 1, 0, 0])]
    last = sft_epochs.table({"1": runs}).splitlines()[-1]
    assert [cell.strip() for cell in last.split("|")[7:9]] == ["0.250", "-0.250 ± 0.424"]
