"""The three scripts on two processes: one launch of two_process_driver.py, looked at from several sides."""

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    make_rollout,
    read_metrics,
    rm_settings,
    sft_settings,
    tiny_settings,
    weights,
    write_jsonl,
)
from two_process_driver import observed_run, tensors

import pfppo_single as pf
import rm_single as rm
import sft_single as sft

WATCH = """
import json, os
from pathlib import Path
first = set(json.loads((Path(__file__).parent / "first.json").read_text()))  # the two prompts of rank 0, update 1

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
def launched(world, tmp_path_factory, forks):
    """Folder with what the two ranks left, what one process found for comparison, and what each saw."""
    folder = tmp_path_factory.mktemp("two")
    for name in ("gpt2", "reward"):
        (folder / name).symlink_to(world / name)
    rows = [json.loads(line) for line in (world / "prompts.jsonl").read_text().splitlines()]
    first = [rows[i]["prompt"] for i in pf.prompt_order(len(rows), 0, 2, 1)]
    (folder / "first.json").write_text(json.dumps(first))
    (folder / "watch_two.py").write_text(WATCH)
    rollout = make_rollout([2, 5, 3, 1, 7, 4, 2, 6], [8, 1, 4, 6, 2, 8, 3, 5])
    draws = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0))
    rollout |= dict(zip(("logprobs", "values", "advantages", "returns"), draws))
    rollout["logprobs"] -= 3
    torch.save(rollout, folder / "rollout.pt")

    whole = tiny_settings(world, folder / "whole") | dict(filter="none", kl_target=6.0, kl_horizon=64)
    whole |= dict(eval_prompts=str(world / "eval.jsonl"), actual_score="watch_two:actual", eval_every=100)
    whole |= dict(lr_schedule="linear", total_episodes=48, critic_warmup_updates=1)
    whole |= dict(minibatch_size=8, micro_batch_size=4)
    uneven = tiny_settings(world, folder / "uneven") | dict(filter="top", thresholds=(-1.0, 0.0))
    uneven |= dict(reward="watch_two:uneven", normalize_reward=False, total_episodes=16, minibatch_size=2)
    uneven["prompts"] = str(write_jsonl(folder / "prompts.jsonl", [*rows, {"prompt": "q" * 17}]))
    unsampled = dict(normalize_before=False, normalize_after=False, lr=0.05, eps=0.1)
    sampled = dict(epochs=1, kl_samples=9, normalize_samples=64)
    settings = {"whole": whole, "uneven": uneven, "sft": sft_settings(world, folder / "sft", lr=0.05)}
    settings["rm"] = rm_settings(world, folder / "rm", **unsampled)
    settings["rm_sampled"] = rm_settings(world, folder / "rm_sampled", **sampled)
    path = [folder, Path(__file__).parent]
    run = forks(
        "two_process_driver",
        "everything",
        str(folder),
        settings,
        folder=folder / "log",
        processes=2,
        path=path,
    )

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        alone = observed_run(whole | dict(output_dir=str(folder / "alone")))
        rm.main(rm.Args(**settings["rm"] | dict(output_dir=str(folder / "rm_alone"))))
        adamw = torch.optim.AdamW
        patch.setattr(torch.optim, "AdamW", lambda *args, **kwargs: adamw(*args, **{**kwargs, "eps": 0.1}))
        sft.main(sft.Args(**settings["sft"] | dict(output_dir=str(folder / "sft_alone"))))
    two = [torch.load(folder / f"tensors_{rank}.pt") for rank in (0, 1)]
    return {
        "folder": folder,
        "alone": alone,
        "one": tensors(pf.start_accelerator(), folder),
        "two": two,
        "seen": run["results"],
        "printed": run["printed"],
    }


@pytest.mark.parametrize("split", ["even", "empty"])
def test_gradients_of_two_processes_are_those_of_one(launched, split):
    # PITFALLS AVG-1, AVG-5: unequal lengths; also with a rank that has nothing but a masked row
    one, (two, other) = launched["one"], launched["two"]
    names = [name for name in one if name.startswith(f"{split} ")]
    assert len(names) > 50
    for name in names:
        assert torch.equal(two[name], other[name]), "DDP leaves every rank with the same gradient"
    whole, parts = (
        torch.cat([x[name].flatten() for name in names if "stats" not in name]) for x in (one, two)
    )
    assert whole.norm() > 1e-3 and (whole - parts).norm() < 1e-5 * whole.norm()
    torch.testing.assert_close(two[f"{split} stats"], one[f"{split} stats"], atol=1e-5, rtol=1e-5)


def test_global_whitening_is_the_same_on_one_and_two_processes(launched):
    # PITFALLS AVG-4
    for name in ("whitened True", "whitened False"):
        assert launched["one"][name].abs().sum() > 1
        torch.testing.assert_close(launched["two"][0][name], launched["one"][name], atol=1e-6, rtol=1e-6)


def test_both_ranks_use_one_kl_coefficient(launched):
    # PITFALLS GAE-5, GAE-6: the logged one, moved by the KL of all ranks
    ranks = [seen["whole"]["kl_coef"] for seen in launched["seen"]]
    metrics = [line for line in read_metrics(launched["folder"] / "whole") if "objective/kl" in line]
    assert ranks[0] == ranks[1] == [line["objective/kl_coef"] for line in metrics]
    assert len(set(ranks[0])) == 3
    for line, after in zip(metrics, metrics[1:]):
        expected = pf.next_kl_coef(line["objective/kl_coef"], line["objective/kl"], 6.0, 16 / 64)
        assert after["objective/kl_coef"] == pytest.approx(expected)


def test_learning_rate_per_step_does_not_depend_on_the_number_of_processes(launched):
    # PITFALLS SYS-2: warm-up of the critic and linear decay, every optimizer step of both groups
    lrs = [seen["whole"]["lr"] for seen in launched["seen"]]
    assert lrs[0] == lrs[1] == launched["alone"]["lr"] and len(lrs[0]) == 12
    assert [policy_lr for policy_lr, _ in lrs[0][::4]] == pytest.approx([0, 2e-3 / 3, 1e-3 / 3])


def test_ranks_end_with_the_same_weights(launched):
    for name in ("whole", "uneven"):
        ranks = [seen[name]["weights"] for seen in launched["seen"]]
        assert ranks[0] == ranks[1] != 0


def test_checkpoints_name_weights_as_the_model_does(launched):
    # a launch with DDP or torch.compile puts words in front, which one without them would not find
    (checkpoint,) = (launched["folder"] / "whole/checkpoints").iterdir()
    assert {name.partition(".")[0] for name in weights(checkpoint)} == {"policy", "critic"}


def test_evaluation_counts_each_prompt_once(launched):
    # PITFALLS SYS-4, SYS-5: 11 prompts as 6 + 5; the mean is over prompts, not over ranks
    folder = launched["folder"]
    shares = [(folder / f"evaluated_{rank}.txt").read_text().splitlines() for rank in (0, 1)]
    prompts = shares[0][:6] + shares[1][:5]
    assert len(set(prompts)) == 11
    expected = sum(map(len, prompts)) / 11
    alone, two = (read_metrics(folder / name) for name in ("alone", "whole"))
    for line in (alone[0], alone[-1], two[0], two[-1]):
        assert line["eval/greedy_pass1"] == line["eval/sampled_pass1"] == pytest.approx(expected)
    assert two[0]["eval/greedy_reward"] == pytest.approx(alone[0]["eval/greedy_reward"], abs=1e-5)


def test_first_ratio_is_one_on_every_rank(launched):
    # PITFALLS LP-5: the largest over ranks
    for name in ("whole", "uneven"):
        lines = [line for line in read_metrics(launched["folder"] / name) if "ppo/episode" in line]
        for line in lines:
            assert line["ppo/policy/first_ratio_max"] == pytest.approx(1, abs=1e-5)
            assert line["ppo/policy/first_ratio"] == pytest.approx(1, abs=1e-5)


def test_sizes_are_global(launched):
    # 4 prompts x 4 responses per update, on one process and on two; every row trained on m = 2 times
    alone, two = (read_metrics(launched["folder"] / name) for name in ("alone", "whole"))
    for name in ("ppo/episode", "ppo/optimizer_step", "filter/kept"):
        assert [line.get(name) for line in alone] == [line.get(name) for line in two]
    assert sum(seen["whole"]["visits"] for seen in launched["seen"]) == 16 * 2 * 3
    assert launched["alone"]["visits"] == 16 * 2 * 3


def test_a_rank_with_fewer_rows_than_minibatches_trains_none_twice(launched):
    # PITFALLS PF-6: rank 0 keeps 8 rows, rank 1 keeps 1, in 4 minibatches; 2 epochs
    line = read_metrics(launched["folder"] / "uneven")[0]
    assert line["filter/kept"] == 9 and line["ppo/optimizer_step"] == 2 * 4
    assert [seen["uneven"]["visits"] for seen in launched["seen"]] == [16, 2]


def test_sampling_differs_over_ranks(launched):
    # PITFALLS LP-10: two ranks do not repeat what one process would have sampled for all prompts
    alone, two = (read_metrics(launched["folder"] / name)[1] for name in ("alone", "whole"))
    assert alone["objective/score"] != pytest.approx(two["objective/score"], abs=1e-6)


def test_rank_1_prints_nothing(launched):
    # sizes, prompts that were left out, log lines, ends: once, whatever the number of ranks
    first, second = launched["printed"]
    for text in ("--prompts: 1 of 13 queries are empty or longer", "filter top keeps", "sft 1/6", "done: "):
        assert text in first and text not in second, text
    assert first.count("done: ") == 5


# ---------------------------------------------------------------- SFT and reward model


@pytest.mark.parametrize("name", ["sft", "rm"])
def test_two_processes_train_and_evaluate_as_one(launched, name):
    # PITFALLS AVG-1, SYS-2, SYS-4: batches of 8 and 3 rows or labels, 11 held-out ones
    one, two = (launched["folder"] / folder for folder in (f"{name}_alone", name))
    ours, theirs = weights(one / "model"), weights(two / "model")
    assert ours.keys() == theirs.keys()
    assert max((value - theirs[key]).abs().max().item() for key, value in ours.items()) < 1e-6
    lines = list(zip(read_metrics(one), read_metrics(two), strict=True))
    for line, other in lines:
        assert line.keys() == other.keys()
        for tag in set(line) - {"seconds/step"}:
            assert other[tag] == pytest.approx(line[tag], rel=2e-5, abs=1e-6), tag
    assert len(lines) == 6 and "test/loss" in lines[-1][0]


def test_two_processes_agree_on_one_normalisation(launched):
    # PITFALLS SYS-4: one gain for both ranks, from samples of both
    folder = launched["folder"] / "rm_sampled"
    metrics, model = read_metrics(folder), pf.load_reward_model(str(folder / "model"))
    assert metrics[-1]["normalize_after/gain"] == pytest.approx(model.reward_gain.item())
    assert metrics[-1]["normalize_after/gain"] == pytest.approx(1 / metrics[-1]["normalize_after/std"])
    assert (
        metrics[-1]["normalize_after/check_std"] == pytest.approx(1, abs=0.3) and metrics[-2]["train/kl"] > 0
    )


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_ranks_sample_different_prompts_for_the_reward_model(world, stage):
    # PITFALLS LP-10: 12 samples are one for each of 12 prompts, and each rank draws by itself
    model, queries = pf.load_causal_lm(str(world / "gpt2")).eval(), [[i] for i in range(12)]
    args, found = rm.Args(model="", train_data="", response_length=8), []
    for rank in (0, 1):
        accelerator = SimpleNamespace(process_index=rank, num_processes=2, device="cpu", autocast=nullcontext)
        found.append(rm.sample(accelerator, model, queries, 12, args, -1, stage, 0))
    assert sorted(label["query"] for label in found[0] + found[1]) == queries
    assert [label["samples"] for label in found[0]] != [label["samples"] for label in found[1]]
