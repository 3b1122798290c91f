"""A run, its folder and the functions that it calls: stopped, started twice, on changed data, with a full disk."""

import codecs
import errno
import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import (
    read_metrics,
    rm_settings,
    same,
    sft_settings,
    timeless,
    tiny_settings,
    weights,
    write_jsonl,
)
from transformers import GPT2Config, T5Config

import pfppo_single as pf
import rm_single as rm
import sft_single as sft

FOUR_UPDATES = dict(batch_size=2, total_episodes=32, noptepochs=1, checkpoint_every=100)


# ---------------------------------------------------------------- SIGTERM


@pytest.mark.parametrize("script, settings", [(sft, sft_settings), (rm, rm_settings)], ids=["sft", "rm"])
def test_sigterm_saves_a_checkpoint_and_the_command_goes_on(world, tmp_path, monkeypatch, script, settings):
    script.main(script.Args(**settings(world, tmp_path / "whole")))
    check_finite, calls = script.check_finite, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return check_finite(*arguments)

    monkeypatch.setattr(script, "check_finite", interrupted)
    args = script.Args(**settings(world, tmp_path / "run"))
    with pytest.raises(SystemExit, match="^stopped after step 2, as asked; the same command goes on"):
        script.run(script.main, args)
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step_000002"]
    script.main(args)
    assert same(weights(tmp_path / "run/model"), weights(tmp_path / "whole/model"))
    assert timeless(read_metrics(tmp_path / "run")) == timeless(read_metrics(tmp_path / "whole"))


def test_a_second_sigterm_ends_the_process_at_once(bare, tmp_path):
    code = """
    import os, signal, time
    import pfppo_single as pf

    def main(args):
        for _ in range(2):
            print("alive", flush=True)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
        print("still alive")

    pf.run(main, pf.Args(policy="p", reward="r", prompts="q"))
    """
    answer = bare("fork_server", "run_code", code, folder=tmp_path)
    said = [line for line in answer["printed"][0].splitlines() if "alive" in line]
    assert answer["codes"] == [-signal.SIGTERM] and said == ["alive", "alive"]


@pytest.mark.parametrize("rank", [0, 1])
def test_sigterm_on_one_rank_ends_all_ranks(forks, world, tmp_path, rank):
    settings = tiny_settings(world, tmp_path / "run") | FOUR_UPDATES
    driver = dict(processes=2, path=[Path(__file__).parent])
    answer = forks("two_process_driver", "stopped", settings, rank, folder=tmp_path / "run", **driver)
    assert answer["results"] == ["stopped after update 2, as asked; the same command goes on"] * 2
    assert (tmp_path / "run/checkpoints/step_000002/state.json").is_file()


# ---------------------------------------------------------------- functions of users


FAILING = """
import sys
calls, fails_at = [], 3
def reward(prompts, responses, rows):
    calls.append(1)
    if len(calls) == fails_at:
        HOW
    return [float(len(r)) for r in responses]
"""


REWARDED = dict(FOUR_UPDATES, reward="failing_reward:reward", normalize_reward=False)


@pytest.fixture(scope="module")
def rewarded(world, tmp_path_factory):
    """Metrics of the run whose reward never fails."""
    folder = tmp_path_factory.mktemp("rewarded")
    (folder / "failing_reward.py").write_text(FAILING.replace("], 3", "], 0").replace("HOW", "pass"))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        pf.main(pf.Args(**tiny_settings(world, folder / "run") | REWARDED))
    del sys.modules["failing_reward"]
    return read_metrics(folder / "run")


@pytest.mark.parametrize("how", ["raise KeyError('x')", "sys.exit(0)", "return None", "return {'a': 1.0}"])
def test_a_reward_that_fails_costs_no_update(rewarded, run, module, monkeypatch, tmp_path, how):
    name = module("failing_reward", FAILING.replace("HOW", how))
    with pytest.raises(SystemExit, match="^--reward ") as refusal:
        run(output_dir=str(tmp_path / "run"), **REWARDED)  # in the third update
    assert refusal.value.code not in (0, None)
    sys.modules[name].fails_at = 0
    sampled, sample = [], pf.sample_rollout
    monkeypatch.setattr(pf, "sample_rollout", lambda *a: (sampled.append(1), sample(*a))[1])
    metrics, _ = run(output_dir=str(tmp_path / "run"), **REWARDED)
    assert len(sampled) == 2  # updates 3 and 4
    assert timeless(metrics) == timeless(rewarded)


def test_an_evaluation_that_fails_costs_no_update(run, module, monkeypatch, world, tmp_path):
    name = module("failing_score", FAILING.replace("HOW", "raise MemoryError"))
    settings = dict(FOUR_UPDATES, actual_score=f"{name}:reward", eval_every=2, normalize_reward=False)
    settings |= dict(eval_prompts=str(write_jsonl(tmp_path / "eval.jsonl", [{"prompt": "held"}] * 2)))
    with pytest.raises(SystemExit, match="^--actual_score failed: MemoryError"):
        run(output_dir=str(tmp_path / "run"), **settings)  # greedy, of the evaluation after update 2
    sys.modules[name].fails_at = 0
    trained, losses = [], pf.minibatch_loss
    monkeypatch.setattr(pf, "minibatch_loss", lambda *a: (trained.append(1), losses(*a))[1])
    metrics, _ = run(output_dir=str(tmp_path / "run"), **settings)
    there = len(trained)
    whole, _ = run(output_dir=str(tmp_path / "whole"), **settings)
    assert timeless(metrics) == timeless(whole) and [line["step"] for line in metrics] == [0, 1, 2, 3, 4]
    assert 2 * there == len(trained) - there  # updates 3 and 4 of 4


def test_a_reward_that_fails_on_one_rank_ends_all_ranks_in_time(forks, world, tmp_path):
    (tmp_path / "rank_reward.py").write_text(
        "import os\ndef reward(prompts, responses, rows):\n"
        "    assert os.environ['RANK'] == '0', 'only here'\n    return [1.0] * len(prompts)\n"
    )
    settings = tiny_settings(world, tmp_path / "run") | dict(reward="rank_reward:reward")
    settings |= dict(normalize_reward=False)
    driver, start = dict(processes=2, path=[Path(__file__).parent, tmp_path]), time.monotonic()
    answer = forks("two_process_driver", "failed", settings, folder=tmp_path / "run", **driver)
    (message,) = set(answer["results"])
    assert message == "--reward failed: AssertionError: only here"
    assert time.monotonic() - start < 60


def test_functions_work_on_copies(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    rows = [{"prompt": "a", "tests": ["x"]}, {"prompt": "b", "tests": ["y"]}]

    def careless(prompts, responses, rows):
        os.chdir("elsewhere")
        for row in rows:
            row["tests"].append("z")
            del row["prompt"]
        responses.clear()
        return [1.0] * 4

    texts = ["1", "2", "3", "4"]
    assert pf.call_function(careless, rows, texts, "prompt") == [1.0] * 4
    assert rows == [{"prompt": "a", "tests": ["x"]}, {"prompt": "b", "tests": ["y"]}]
    assert texts == ["1", "2", "3", "4"] and Path.cwd() == tmp_path


def generator():
    yield 1.0
    yield 2.0


@pytest.mark.parametrize(
    "values", [{"a": 1.0, "b": 2.0}, "12", generator(), [[1.0], [2.0]], {1.0, 2.0}, b"12"]
)
def test_what_is_no_list_of_numbers_is_refused_with_the_flag(values):
    rows = [{"prompt": "a"}, {"prompt": "b"}]
    with pytest.raises(SystemExit, match="^--actual_score must return a list of 2 finite numbers, not "):
        pf.call_function(lambda *_: values, rows, ["x", "y"], "prompt", "actual_score")


# ---------------------------------------------------------------- two runs at once, changed data


def test_a_second_run_in_a_folder_is_refused_until_the_first_has_died(forks, tmp_path):
    args = pf.Args(policy="p", reward="r", prompts="q", output_dir=str(tmp_path / "run"))
    code = f"""
    import os, signal, time
    import pfppo_single as pf
    accelerator = pf.start_accelerator()
    pf.open_run(accelerator, pf.{args!r})
    open({str(tmp_path / "open")!r}, "w").close()
    while not os.path.exists({str(tmp_path / "refused")!r}):
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGKILL)  # the system releases the lock
    """
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(forks, "fork_server", "run_code", code, folder=tmp_path / "log")
        while not (tmp_path / "open").exists():
            assert not other.done(), other.result()
            time.sleep(0.02)
        with pytest.raises(SystemExit) as refusal:
            try:
                pf.open_run(Accelerator(cpu=True), args)
            finally:
                (tmp_path / "refused").touch()
    assert re.search("run: process [0-9]+ is writing there; wait for it, or end it$", str(refusal.value))
    assert other.result()["codes"] == [-signal.SIGKILL]
    pf.open_run(Accelerator(cpu=True), args)


@pytest.mark.parametrize("left", ["args.json.tmp", "lock"])
def test_a_folder_that_a_kill_left_before_args_json_goes_on(tmp_path, left):
    (tmp_path / left).write_text("{")
    args = pf.Args(policy="p", reward="r", prompts="q", output_dir=str(tmp_path))
    assert (pf.open_run(Accelerator(cpu=True), args) / "args.json").is_file()


def test_data_that_changed_make_another_run(tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "a"}\n')
    args = pf.Args(policy="p", reward="r", prompts=str(data), output_dir=str(tmp_path / "run"))
    pf.open_run(Accelerator(cpu=True), args)
    os.utime(data)
    pf.open_run(Accelerator(cpu=True), args)  # the same content
    data.write_text('{"prompt": "b"}\n')
    with pytest.raises(SystemExit, match="holds another run: sha256 of prompts"):
        pf.open_run(Accelerator(cpu=True), args)


def test_what_a_kill_left_of_older_checkpoints_goes_at_the_next_one(tmp_path):
    accelerator = Accelerator(cpu=True)
    for name in ("step_000001", "step_000002", "tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    pf.save_checkpoint(accelerator, tmp_path, 3, {})
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000003"]


# ---------------------------------------------------------------- a full disk


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("No space left on device (os error 28)")],
)
def test_a_full_disk_is_said_in_one_line(tmp_path, error):
    args = pf.Args(policy="p", reward="r", prompts="q", output_dir=str(tmp_path / "run"))

    def main(args):
        raise error

    with pytest.raises(
        SystemExit, match="^--output_dir .*run: the disk is full; make room, then the same"
    ) as end:
        pf.run(main, args)
    assert "\n" not in str(end.value)


def test_other_errors_stay_what_they_are(tmp_path):
    args = pf.Args(policy="p", reward="r", prompts="q", output_dir=str(tmp_path / "run"))
    with pytest.raises(ZeroDivisionError):
        pf.run(lambda args: 1 / 0, args)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a disk to fill")
@pytest.mark.parametrize("megabytes", [1, 2, 3])
def test_a_disk_that_fills_while_a_run_saves_loses_nothing(world, tmp_path, forks, megabytes):
    # a small disk; then room is made, and the same command ends as if nothing had happened
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", str(disk)]).returncode:
        pytest.skip("this machine lets nobody mount a disk")
    try:
        flags = [
            f"--{k}={v}"
            for k, v in sft_settings(world, disk / "run", checkpoint_every=1).items()
            if v is not None
        ]
        (disk / "ballast").write_bytes(b"x" * (megabytes * 1_000_000 - 500_000))
        answer = forks("fork_server", "run_command", ["sft_single.py", *flags], folder=tmp_path / "full")
        assert answer["codes"] == [1] and "the disk is full" in answer["printed"][0].splitlines()[-1]
        (disk / "ballast").unlink()
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        answer = forks("fork_server", "run_command", ["sft_single.py", *flags], folder=tmp_path / "again")
        assert answer["codes"] == [0], answer["printed"]
        sft.main(sft.Args(**sft_settings(world, tmp_path / "whole", checkpoint_every=1)))
        assert same(weights(disk / "run/model"), weights(tmp_path / "whole/model"))
    finally:
        subprocess.run(["umount", str(disk)])


# ---------------------------------------------------------------- files of rows


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("rows.jsonl", '{"prompt": "é"}\n'.encode("latin-1"), "row 1: not JSON in UTF-8"),
        (
            "rows.jsonl",
            b'{"prompt": "a"}\n' + '{"prompt": "é"}\n'.encode("latin-1"),
            "row 2: not JSON in UTF-8",
        ),
        ("rows.jsonl", '{"prompt": "a"}\n'.encode("utf-16"), "row 1: not JSON in UTF-8"),
        ("rows.jsonl", bytes(range(256)), "row 1: not JSON in UTF-8"),
        ("rows.jsonl.gz", b'{"prompt": "a"}\n', "Not a gzipped file"),
        ("rows.json", bytes(range(256)), "not JSON in UTF-8"),
        ("rows.txt", b'{"prompt": "a"}\n', r"\.txt is unknown; give .jsonl"),
        ("rows", b'{"prompt": "a"}\n', "is unknown; give .jsonl"),
        ("rows.parquet", b"PAR1", ": Parquet file size is 4 bytes"),
        ("folder", None, "folder"),
    ],
)
def test_files_in_other_forms_are_refused_in_one_line(tmp_path, name, data, message):
    path = tmp_path / name
    path.mkdir() if data is None else path.write_bytes(data)
    with pytest.raises(SystemExit, match=f"^--prompts {path}.*{message}") as refusal:
        pf.load_rows(str(path), "prompts")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("bom", [b"", codecs.BOM_UTF8])
def test_compressed_rows_are_read(tmp_path, bom):
    with gzip.open(tmp_path / "rows.jsonl.gz", "wb") as file:
        file.write(bom + '{"prompt": "é"}\n\n{"prompt": "b"}'.encode())
    assert pf.load_rows(str(tmp_path / "rows.jsonl.gz"), "prompts") == [{"prompt": "é"}, {"prompt": "b"}]


# ---------------------------------------------------------------- imports


@pytest.mark.parametrize("script", ["sft_single", "rm_single", "pfppo_single"])
def test_what_is_slow_to_import_is_imported_where_it_is_used(script, bare, tmp_path):
    # a bad setting is refused before these are needed; seconds are not tested
    slow = ["datasets", "pandas", "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch._dynamo"]
    slow += ["transformers.models.auto.tokenization_auto", "tensorboard"]
    code = f"import sys, {script}; print([name for name in {slow!r} if name in sys.modules])"
    (printed,) = bare("fork_server", "run_code", code, folder=tmp_path)["printed"]
    assert printed.strip() == "[]"


def test_json_is_what_args_json_holds(tmp_path):
    # every field, the number of processes, a hash per file of data
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    args = pf.Args(
        policy="p", reward="r", prompts=str(tmp_path / "rows.jsonl"), output_dir=str(tmp_path / "run")
    )
    held = json.loads((pf.open_run(Accelerator(cpu=True), args) / "args.json").read_text())
    assert held["num_processes"] == 1 and len(held["sha256 of prompts"]) == 64


def test_a_dry_run_says_what_the_models_take(run, capsys):
    # GPT-2 of README's 1.3B: policy and critic 4 + 4 + 8 bytes a weight, reference and reward model 4
    config = GPT2Config(n_embd=2048, n_layer=24, n_head=16)
    line = pf.memory_line(Accelerator(cpu=True), config, 2, 2, torch.float32, False)
    weights = 50257 * 2048 + 1024 * 2048 + 24 * (12 * 2048**2 + 13 * 2048) + 2 * 2048
    assert f"; {40 * weights / 1e9:.2f} GB a rank for weights, gradients" in line
    with pytest.raises(
        SystemExit, match="^folder: no causal language model: Unrecognized configuration class"
    ):
        pf.memory_line(None, T5Config(name_or_path="folder"), 2, 2, torch.float32, False)
    with pytest.raises(FileNotFoundError):  # it writes nothing
        run(dry_run=True)
    assert "all checks passed, nothing was written; 0.00 GB a rank" in capsys.readouterr().out
