"""SIGKILL at any moment, then the same command: every file ends as if nothing had happened (PITFALLS SYS-9)."""

import json
import random
import signal
from pathlib import Path

import pytest
from conftest import (
    HELD_OUT_PAIRS,
    HELD_OUT_ROWS,
    PAIRS,
    SFT_ROWS,
    one_block,
    read_metrics,
    timeless,
    tiny_settings,
    write_jsonl,
)

SCRIPTS = ("sft_single", "rm_single", "pfppo_single")
REWARD = """
def reward(prompts, responses, rows):
    return [len(r) + r.count("e") / 7 + len(p) / 3 for p, r in zip(prompts, responses)]
"""


@pytest.fixture(scope="module")
def settings(world, tmp_path_factory):
    """settings(script, output_dir) of a run with all the state there is: log lines that are means over steps
    of two checkpoints, evaluations, best and numbered policies, a moving β, samples, TensorFlow's Adam."""
    folder = one_block(tmp_path_factory.mktemp("kills"))
    (folder / "kill_reward.py").write_text(REWARD)
    rows = [a | b for a, b in zip(SFT_ROWS, PAIRS)][:11]
    write_jsonl(folder / "rows.jsonl", rows)
    write_jsonl(folder / "held_out.jsonl", [a | b for a, b in zip(HELD_OUT_ROWS, HELD_OUT_PAIRS)][:3])

    def settings(script: str, output_dir: Path) -> dict:
        if script == "pfppo_single":
            changes = dict(prompts=str(world / "prompts.jsonl"), eval_prompts=str(folder / "held_out.jsonl"))
            changes |= dict(reward="kill_reward:reward", batch_size=2, total_episodes=24, normalize_samples=8)
            changes |= dict(filter="none", kl_target=6.0, kl_horizon=64, lr_schedule="linear", noptepochs=1)
            changes |= dict(adam_style="tensorflow", print_samples_every=1, save_policy_every=2)
            changes |= dict(checkpoint_every=2, eval_every=2)
            return tiny_settings(folder, output_dir) | changes
        common = dict(output_dir=str(output_dir), model=str(folder / "gpt2"), epochs=2, batch_size=4, lr=1e-3)
        common |= dict(train_data=str(folder / "rows.jsonl"), eval_data=str(folder / "held_out.jsonl"))
        common |= dict(micro_batch_size=4, query_length=32, log_every=4, eval_every=3, checkpoint_every=2)
        if script == "rm_single":
            common |= dict(normalize_before=True, normalize_samples=8, kl_samples=4, adam_style="tensorflow")
        return common | dict(response_length=6 if script == "rm_single" else 24)

    settings.path = [folder]
    return settings


def run(forks, settings, script: str, folder: Path, **options) -> dict:
    """The command that writes `folder`, killed or left alone."""
    options |= dict(folder=folder, path=settings.path)
    return forks("fork_server", "run_script", script, settings(script, folder), **options)


def written(folder: Path) -> dict:
    """All that a run leaves, times aside: bytes of files, metrics, the checkpoint's state. Not compared:
    args.json, which holds the folder's name, TensorBoard's files, and an older checkpoint, which stays where a
    kill fell behind the last one and before it was deleted."""
    found = {"folders": sorted(path.name for path in folder.iterdir())}
    *older, _ = sorted((folder / "checkpoints").iterdir())
    for path in [path for path in folder.rglob("*") if path.is_file() and path.parent not in older]:
        name = str(path.relative_to(folder))
        if path.name == "metrics.jsonl":
            found[name] = timeless(read_metrics(folder))
        elif path.name == "state.json":
            state = json.loads(path.read_text())
            found[name] = state | {"metrics": timeless([state.get("metrics", {})])}
        elif path.suffix in (".safetensors", ".pt", ".jsonl", ".json") and path.name != "args.json":
            found[name] = path.read_bytes()
    return found


@pytest.fixture(scope="module")
def whole(forks, settings, tmp_path_factory):
    """whole(script, processes) -> (folder, answer) of the run that nobody killed, made once."""
    runs, folder = {}, tmp_path_factory.mktemp("whole")

    def whole(script: str, processes: int = 1) -> tuple[Path, dict]:
        if (script, processes) not in runs:
            place = folder / f"{script}_{processes}"
            runs[script, processes] = place, run(forks, settings, script, place, processes=processes)
        return runs[script, processes]

    return whole


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("processes, kills", [(1, 8), (2, 2)])
def test_a_run_killed_again_and_again_ends_as_one_left_alone(
    forks, settings, whole, tmp_path, script, processes, kills
):
    # PITFALLS SYS-9, SYS-10: by turns in place of a file operation and at a time, both drawn; a run that gets
    # through is compared, and the next one starts from nothing
    expected, answer = whole(script, processes)
    draw, landed, chain = random.Random(f"{script} {processes}"), 0, 0
    while landed < kills:
        folder, chain, killed = tmp_path / f"chain_{chain}", chain + 1, True
        while killed:
            when = {}
            if landed < kills and landed % 2:
                when["kill_after"] = draw.uniform(0.1, 0.9) * answer["seconds"]
            elif landed < kills:
                when["kill_at"] = draw.randrange(answer["operations"])
            codes = run(forks, settings, script, folder, processes=processes, **when)["codes"]
            killed = -signal.SIGKILL in codes
            landed += killed
        assert written(folder) == written(expected)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_finished_run_stays_as_it_is(forks, settings, whole, script):
    # PITFALLS SYS-10: the last step always writes a checkpoint, so the same command trains nothing
    folder, _ = whole(script)
    (checkpoint,) = (folder / "checkpoints").iterdir()
    before = written(folder), checkpoint.stat().st_mtime_ns
    run(forks, settings, script, folder)
    assert (written(folder), checkpoint.stat().st_mtime_ns) == before
