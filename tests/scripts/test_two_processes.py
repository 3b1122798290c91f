"""pfppo_single.py on two processes: one launch of two_process_driver.py, looked at from several sides."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_rollout, read_metrics, tiny_settings
from safetensors.torch import load_file
from two_process_driver import observed_run, tensors

import pfppo_single as pf

WATCH = """
import json, os
from pathlib import Path
first = json.loads((Path(__file__).parent / "first.json").read_text())  # both prompts of rank 0 in update 1

def actual(prompts, responses, rows):
    with (Path(__file__).parent / f"evaluated_{os.environ.get('RANK', 'alone')}.txt").open("a") as file:
        file.write("".join(p + "\\n" for p in prompts))
    return [float(len(p)) for p in prompts]  # known without sampling

def uneven(prompts, responses, rows):
    if prompts[0] in first:
        return [1.0] * len(responses)
    return [1.0] + [-1.0] * (len(responses) - 1)
"""


@pytest.fixture(scope="module")
def launched(world, tmp_path_factory):
    """Folder with what the two ranks left, what one process found for comparison, and the settings."""
    folder = tmp_path_factory.mktemp("two")
    for name in ("gpt2", "reward"):
        (folder / name).symlink_to(world / name)
    rows = [json.loads(line) for line in (world / "prompts.jsonl").read_text().splitlines()]
    (folder / "first.json").write_text(
        json.dumps([rows[i]["prompt"] for i in pf.prompt_order(len(rows), 0, 2, 1)])
    )
    (folder / "watch_two.py").write_text(WATCH)
    rollout = make_rollout([2, 5, 3, 1, 7, 4, 2, 6], [8, 1, 4, 6, 2, 8, 3, 5])
    rollout["logprobs"], rollout["values"], rollout["advantages"], rollout["returns"] = torch.randn(
        4, 8, 8, generator=torch.Generator().manual_seed(0)
    )
    rollout["logprobs"] -= 3
    torch.save(rollout, folder / "rollout.pt")

    whole = dict(
        tiny_settings(world, folder / "whole"),
        eval_prompts=str(world / "eval.jsonl"),
        actual_score="watch_two:actual",
        adaptive_kl=True,
        kl_horizon=64,
        lr_schedule="linear",
        warmup_updates=1,
        total_episodes=48,
        eval_every=100,
    )
    uneven = dict(
        tiny_settings(world, folder / "uneven"),
        reward="watch_two:uneven",
        normalize_reward=False,
        filter="top",
        threshold_high=0.0,
        total_episodes=16,
        minibatch_size=2,
    )
    settings = {
        "whole": whole,
        "uneven": uneven,
        "interrupted": {**whole, "output_dir": str(folder / "interrupted")},
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    driver = Path(__file__).with_name("two_process_driver.py")
    # `accelerate launch --cpu --num_processes 2` starts one process only (accelerate 1.15, without mpirun);
    # torchrun starts two
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(driver),
        str(folder / "settings.json"),
        str(folder),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]

    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(folder)
    alone = observed_run({**whole, "output_dir": str(folder / "alone")})
    one = tensors(pf.Accelerator(), folder)
    patch.undo()
    seen = [json.loads((folder / f"seen_{rank}.json").read_text()) for rank in (0, 1)]
    two = [torch.load(folder / f"tensors_{rank}.pt") for rank in (0, 1)]
    return {"folder": folder, "alone": alone, "one": one, "two": two, "seen": seen}


@pytest.mark.parametrize("average", ["token", "sequence"])
@pytest.mark.parametrize("split", ["even", "empty"])
def test_gradients_of_two_processes_are_those_of_one(launched, average, split):
    # PITFALLS AVG-1, AVG-5: unequal lengths; also with a rank that has nothing but a masked row
    one, (two, other) = launched["one"], launched["two"]
    names = [name for name in one if name.startswith(f"{average} {split} ")]
    assert len(names) > 50
    for name in names:
        assert torch.equal(two[name], other[name]), "DDP leaves every rank with the same gradient"
    whole, parts = (
        torch.cat([x[name].flatten() for name in names if "stats" not in name]) for x in (one, two)
    )
    assert whole.norm() > 1e-3 and (whole - parts).norm() < 1e-5 * whole.norm()
    torch.testing.assert_close(
        two[f"{average} {split} stats"], one[f"{average} {split} stats"], atol=1e-5, rtol=1e-5
    )


def test_global_whitening_is_the_same_on_one_and_two_processes(launched):
    # PITFALLS AVG-4
    for name in ("whitened True", "whitened False"):
        assert launched["one"][name].abs().sum() > 1
        torch.testing.assert_close(launched["two"][0][name], launched["one"][name], atol=1e-6, rtol=1e-6)


def test_both_ranks_use_one_kl_coefficient(launched):
    # PITFALLS GAE-5, GAE-6: the logged one, moved by the KL of all ranks
    ranks = [seen["whole"]["kl_coef"] for seen in launched["seen"]]
    metrics = [line for line in read_metrics(launched["folder"] / "whole") if "objective/kl" in line]
    assert ranks[0] == ranks[1] == [line["objective/kl_coef"] for line in metrics] and len(set(ranks[0])) == 3
    for line, after in zip(metrics, metrics[1:]):
        expected = pf.next_kl_coef(line["objective/kl_coef"], line["objective/kl"], 6.0, 64, 16)
        assert after["objective/kl_coef"] == pytest.approx(expected)


def test_learning_rate_per_step_does_not_depend_on_the_number_of_processes(launched):
    # PITFALLS SYS-2: warm-up and linear decay, policy and critic, every optimizer step
    lrs = [seen["whole"]["lr"] for seen in launched["seen"]]
    assert lrs[0] == lrs[1] == launched["alone"]["lr"] and len(lrs[0]) == 12
    assert len({lr for lr, _ in lrs[0]}) == 2


def test_ranks_end_with_the_same_weights(launched):
    for name in ("whole", "uneven"):
        ranks = [seen[name]["weights"] for seen in launched["seen"]]
        assert ranks[0] == ranks[1] != 0


def test_evaluation_counts_each_prompt_once(launched):
    # PITFALLS SYS-4, SYS-5: 11 prompts as 6 + 5; the mean is over prompts, not over ranks
    folder = launched["folder"]
    shares = [(folder / f"evaluated_{rank}.txt").read_text().splitlines() for rank in (0, 1)]
    per_evaluation = [share[: 6 - rank] for rank, share in enumerate(shares)]
    assert len(set(per_evaluation[0] + per_evaluation[1])) == 11
    expected = sum(len(p) for p in per_evaluation[0] + per_evaluation[1]) / 11
    alone, two = (read_metrics(folder / name) for name in ("alone", "whole"))
    for line in (alone[0], alone[-1], two[0], two[-1]):
        assert line["eval/greedy_pass1"] == line["eval/sampled_pass1"] == pytest.approx(expected)
    assert two[0]["eval/greedy_reward"] == pytest.approx(alone[0]["eval/greedy_reward"], abs=1e-5)


def test_first_ratio_is_one_on_every_rank(launched):
    # PITFALLS LP-5: the largest over ranks
    for name in ("whole", "uneven"):
        for line in read_metrics(launched["folder"] / name):
            if "ppo/policy/first_ratio_max" in line:
                assert line["ppo/policy/first_ratio_max"] == pytest.approx(1, abs=1e-5)
                assert line["ppo/policy/first_ratio"] == pytest.approx(1, abs=1e-5)


def test_sizes_are_global(launched):
    # 4 prompts x 4 responses and 8 kept rows per update, on one process and on two; every row trained on m =
    # 2 times
    alone, two = (read_metrics(launched["folder"] / name) for name in ("alone", "whole"))
    for name in ("ppo/episode", "ppo/optimizer_step", "filter/kept"):
        assert [line.get(name) for line in alone] == [line.get(name) for line in two]
    assert (
        sum(seen["whole"]["visits"] for seen in launched["seen"]) == launched["alone"]["visits"] == 8 * 2 * 3
    )


def test_a_rank_with_fewer_rows_than_minibatches_trains_none_twice(launched):
    # PITFALLS PF-6: rank 0 keeps 8 rows, rank 1 keeps 1, in 4 minibatches; 2 epochs
    line = read_metrics(launched["folder"] / "uneven")[0]
    assert line["filter/kept"] == 9 and line["ppo/optimizer_step"] == 2 * 4
    assert [seen["uneven"]["visits"] for seen in launched["seen"]] == [16, 2]


def test_sampling_differs_over_ranks(launched):
    # PITFALLS LP-10: two ranks do not repeat what one process would have sampled for all prompts
    alone, two = (read_metrics(launched["folder"] / name)[1] for name in ("alone", "whole"))
    assert alone["objective/score"] != pytest.approx(two["objective/score"], abs=1e-6)


def test_two_processes_continue_exactly(launched):
    # PITFALLS SYS-9
    found = []
    for name in ("whole", "interrupted"):
        folder = launched["folder"] / name
        metrics = [
            {k: v for k, v in line.items() if not k.startswith("seconds/")} for line in read_metrics(folder)
        ]
        found.append((metrics, load_file(folder / "policy" / "model.safetensors")))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(value, found[1][1][name]) for name, value in found[0][1].items())
