"""Steps of recipes: what a user types is what runs, what is there is not redone, a failure is one line."""

import subprocess
import sys
from pathlib import Path

import pytest
from in_process import run_in_process

from benchmark import pipeline
from benchmark.recipes.steps import Step, run_step, run_steps


def step(tmp_path, **changes) -> Step:
    settings = {"policy": "sft", "reward": "rm", "prompts": "a b.jsonl", "normalize_reward": False}
    return Step("ppo", "pfppo_single", settings | changes, tmp_path / "policy")


def test_the_line_is_what_a_shell_takes(tmp_path):
    line = step(tmp_path).line("--cpu --num_processes 1")
    assert line.startswith("accelerate launch --cpu --num_processes 1 pfppo_single.py --policy sft")
    assert "--prompts 'a b.jsonl' --no-normalize_reward" in line


def test_a_baseline_is_launched_as_a_module(tmp_path):
    dpo = Step("dpo", "benchmark.baselines.dpo", {"policy": "sft", "train_data": "x"}, tmp_path)
    line = dpo.line("--mixed_precision bf16")
    assert line.startswith("accelerate launch --mixed_precision bf16 -m benchmark.baselines.dpo --policy sft")


def test_a_flag_that_the_script_does_not_take_is_refused_by_a_dry_run(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_steps([step(tmp_path, lamda=1)], "", tmp_path, dry_run=True)
    run_steps([step(tmp_path)], "", tmp_path, dry_run=True)
    assert "[1/1] ppo\naccelerate launch" in capsys.readouterr().out


def test_a_step_whose_output_is_there_is_skipped(tmp_path, monkeypatch, capsys):
    ran = run_in_process(monkeypatch)
    (tmp_path / "policy").mkdir()
    run_steps([step(tmp_path)], "", tmp_path, dry_run=False)
    assert ran == [] and "there already" in capsys.readouterr().out


def test_paths_are_those_of_the_callers_folder(tmp_path, monkeypatch):
    """From any folder: relative paths were once looked for in the repository."""
    seen = []

    def look(command, **settings):
        seen.append((settings.get("cwd"), next(word for word in command if word.endswith("_single.py"))))
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", look)
    for start in (
        lambda: run_step(step(tmp_path), "", tmp_path),
        lambda: pipeline.launch("sft_single.py", {}, tmp_path / "x.log"),
    ):
        with pytest.raises(KeyboardInterrupt):
            start()
    assert [cwd for cwd, _ in seen] == [None, None] and all(Path(script).is_file() for _, script in seen)
    assert all(Path(script).is_absolute() for _, script in seen)


def test_a_step_that_fails_ends_with_the_scripts_own_line(tmp_path, monkeypatch):
    start = subprocess.Popen

    def fail(command, **settings):
        text = "import sys; print('update 1'); sys.exit('--reward rm: no such folder')"
        return start([sys.executable, "-S", "-c", text], **settings)

    monkeypatch.setattr(subprocess, "Popen", fail)
    with pytest.raises(SystemExit, match="ppo: --reward rm: no such folder"):
        run_step(step(tmp_path), "", tmp_path)
    assert not (tmp_path / "steps.jsonl").exists()
