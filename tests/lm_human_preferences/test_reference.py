"""The recorded tensors of lm-human-preference-details against the shipped functions, and the tools around the
recorded curves."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from make_llama_world import HYPERPARAMETERS, PENALTY, make_world
from safetensors.torch import load_file, save_file
from transformers import GenerationMixin

import pfppo_single as pfppo
import rm_single as rm
from benchmark.lm_human_preferences import compare as compare_reference
from benchmark.lm_human_preferences import import_reference, peer_policy, plot, run

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "reference" / "lm_human_preferences"


@pytest.fixture(scope="module")
def llama_world(tmp_path_factory) -> Path:
    """Rotary positions, grouped heads, untied output, short queries, two minibatches; recorded by a second
    implementation."""
    folder = tmp_path_factory.mktemp("llama_world")
    make_world(folder)
    return folder


@pytest.fixture
def late_update(llama_world):
    """Compare one update of the Llama world; the recorded tensors may be changed first."""

    def compare(change=None) -> tuple[dict[str, str], list]:
        path = llama_world / "trace_changed.safetensors"
        trace = load_file(llama_world / "trace_policy_late.safetensors")
        if change is not None:
            change(trace)
        save_file(trace, path)
        report = compare_reference.Report()
        compare_reference.compare_policy(
            report, llama_world, path.name, compare_reference.policy_args(HYPERPARAMETERS["policy"]), "sdpa"
        )
        path.unlink()
        return {
            row["tensor"]: row["verdict"] for row in compare_reference.summarise(report, None)
        }, report.untested()

    return compare


# ---------------------------------------------------------------- the same numbers from the same samples


@pytest.mark.skipif(
    not SHARED.is_dir(), reason="the recorded world is not shipped; it is looked for in ../shared/reference"
)
def test_every_recorded_tensor_is_reproduced(capsys):  # PITFALLS RM-5, TOK-1, LP-3, AVG-3, GAE-7, GAE-8
    status = compare_reference.main(SHARED)
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert "835 recorded tensors compared, 0 untested" in printed


@pytest.mark.skipif(
    not SHARED.is_dir(), reason="the recorded world is not shipped; it is looked for in ../shared/reference"
)
def test_the_peers_loop_written_again_repeats_recorded_seed_1(tmp_path):
    peer_policy.main(peer_policy.Args(world=str(SHARED), output_dir=str(tmp_path), seed=1, updates=3))
    ours = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    recorded = json.loads((SHARED / "curves_policy_steady.json").read_text())["seeds"]["1"]
    names = {"objective/shaped_score": "objective/scores", "ppo/loss/value": "ppo/loss/value_avg"}
    for tag in ours[0].keys() - {"step"}:
        assert [row[tag] for row in ours] == pytest.approx(recorded[names.get(tag, tag)][:3], abs=2e-5), tag


@pytest.mark.skipif(
    not SHARED.is_dir(), reason="the recorded world is not shipped; it is looked for in ../shared/reference"
)
def test_main_follows_the_peers_loop_on_the_same_queries_and_responses(tmp_path, monkeypatch):
    # what neither tensors of one update nor curves show: state from update to update (Adam, learning rate, KL
    # coefficient, values)
    drawn, plain = [], GenerationMixin.generate

    def kept(self, input_ids, attention_mask, **settings):
        sequences = plain(self, input_ids=input_ids, attention_mask=attention_mask, **settings)
        drawn.append((input_ids, attention_mask.bool(), sequences[:, input_ids.shape[1] :]))
        return sequences

    with monkeypatch.context() as patch:
        patch.setattr(GenerationMixin, "generate", kept)
        peer_policy.main(
            peer_policy.Args(world=str(SHARED), output_dir=str(tmp_path / "peer"), seed=11, updates=6)
        )
    import_reference.main(SHARED, tmp_path / "reward")
    args = pfppo.parse_args(
        f"--preset lm_human_preferences --policy {SHARED}/model --reward {tmp_path}/reward --prompts "
        f"{SHARED}/queries.jsonl --prompt_field text "
        "--query_length 24 --batch_size 64 --minibatch_size 64 --total_episodes 7680 --lr 0.00025 "
        "--stop_token 4 --kl_target 3 --kl_horizon 2000 "
        f"--print_samples_every 0 --output_dir {tmp_path}/ours".split()
    )
    rows = pfppo.encode_queries(
        pfppo.load_tokenizer(args.policy, args.pad_token),
        pfppo.load_rows(args.prompts, "prompts"),
        args,
        "prompts",
    )
    where = {tuple(row["query_ids"]): i for i, row in enumerate(rows)}
    order = [
        where[tuple(query[real].tolist())] for queries, mask, _ in drawn for query, real in zip(queries, mask)
    ]
    responses = iter([r for _, _, r in drawn])

    def order_of(num_prompts, start, count, *rest):
        if start >= len(order):
            raise KeyboardInterrupt  # behind the last recorded update
        return order[start : start + count]

    monkeypatch.setattr(pfppo, "prompt_order", order_of)
    monkeypatch.setattr(pfppo, "generate", lambda *rest: next(responses))
    with pytest.raises(KeyboardInterrupt):
        pfppo.main(args)
    peer, ours = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("peer", "ours")
    )
    assert len(peer) == len(ours) == 6
    for tag in peer[0].keys():
        assert [row[tag] for row in ours] == pytest.approx([row[tag] for row in peer], rel=1e-3, abs=1e-4), (
            tag
        )


def test_another_architecture_and_other_sizes_are_reproduced_by_the_same_command(
    llama_world,
):  # PITFALLS RM-5
    command = [sys.executable, "benchmark/compare_reference.py", str(llama_world)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 untested, 0 names within rounding, 0 names past their tolerance" in result.stdout


def test_an_unchanged_update_passes(late_update):
    verdicts, untested = late_update()
    assert set(verdicts.values()) == {"ok"} and untested == []


@pytest.mark.parametrize(
    "name, wrong, tensor",
    [
        ("adam_epsilon", lambda eps, style, step: eps, "policy_weights/after_update_*/NAME"),
        (
            "whiten",
            lambda x, mask, shift_mean=True, f=pfppo.whiten: f(x, mask, True),
            "update_*/rewards_after_whitening",
        ),
        (
            "gae",
            lambda r, v, m, gamma, lam, f=pfppo.gae: f(r, v, m, gamma, lam + 0.01),
            "update_*/advantages",
        ),
        (
            "stop_masks",
            lambda r, s, after, f=pfppo.stop_masks: f(r, s, 0),
            "update_*/postprocessed_responses",
        ),
        (
            "scheduled_lr",
            lambda lr, step, n, *rest, f=pfppo.scheduled_lr: f(lr, step + 1, n, *rest),
            "update_*/lr",
        ),
        (
            "next_kl_coef",
            lambda coef, kl, target, horizon, n: coef * (1 + (kl / target - 1) * n / horizon),
            "update_*/kl_coef_after",
        ),
        (
            "loss_weights",
            lambda mask, average, f=pfppo.loss_weights: 2 * f(mask, average),
            "update_*/epoch_*/minibatch_*/loss",
        ),
    ],
)
def test_a_wrong_function_is_found(late_update, monkeypatch, name, wrong, tensor):
    monkeypatch.setattr(pfppo, name, wrong)
    assert late_update()[0][tensor] == "FAIL"


def test_a_recorded_nan_fails(late_update):
    verdicts, _ = late_update(lambda trace: trace["update_6/kl"][0, 0].fill_(float("nan")))
    assert verdicts["update_*/kl"] == "FAIL"


def test_a_nan_in_recorded_inputs_fails(late_update):
    verdicts, _ = late_update(
        lambda trace: trace["adam/exp_avg/lm_backbone.lm_head.weight"].fill_(float("nan"))
    )
    assert verdicts["adam/exp_avg/NAME"] == "FAIL"


def test_an_untested_key_is_reported(late_update):
    assert late_update(lambda trace: trace.update({"update_6/new": torch.zeros(1)}))[1] == [
        ("trace_changed.safetensors", "update_6/new")
    ]


def test_a_query_that_no_text_gives_fails(late_update):
    verdicts, _ = late_update(lambda trace: trace["update_6/queries"][0, -1].fill_(38))
    assert verdicts["update_*/queries"] == "FAIL"


def test_an_untested_key_gives_exit_status_1(monkeypatch, llama_world):
    report = compare_reference.Report()
    report.check("trace", "a", torch.zeros(2), torch.zeros(2), 0.0)
    monkeypatch.setattr(compare_reference, "compare", lambda folder, attention: report)
    report.keys["trace"] = ["a"]
    assert compare_reference.main(llama_world) == 0
    report.keys["trace"] = ["a", "b"]
    assert compare_reference.main(llama_world) == 1


@pytest.mark.parametrize(
    "difference, own, verdict",
    [
        (0.9e-5, None, "ok"),
        (3e-5, 0.1e-5, "FAIL"),
        (3e-5, 0.5e-5, "ok (rounding)"),
        (2e-4, 1e-4, "FAIL"),
        (float("nan"), 1.0, "FAIL"),
    ],
)
def test_rounding_is_bounded_by_our_own_and_by_ten_tolerances(difference, own, verdict):
    first, second = compare_reference.Report(), compare_reference.Report()
    first.check("f", "k", torch.zeros(1), torch.tensor([difference]), 1e-5)
    second.check("f", "k", torch.zeros(1), torch.tensor([difference + (own or 0.0)]), 1e-5)
    assert compare_reference.summarise(first, second)[0]["verdict"] == verdict


def test_an_optimizer_step_of_the_reward_model_depends_on_adam(llama_world, monkeypatch):
    monkeypatch.setattr(rm, "adam_epsilon", lambda eps, style, step: eps)
    report = compare_reference.Report()
    compare_reference.compare_reward(
        report,
        llama_world,
        "trace_reward.safetensors",
        compare_reference.reward_args(HYPERPARAMETERS["reward"], {}),
        "sdpa",
    )
    verdicts = {row["tensor"]: row["verdict"] for row in compare_reference.summarise(report, None)}
    assert verdicts["weights/after_step_*/NAME"] == "FAIL" and verdicts["step_*/loss"] != "ok"


# ---------------------------------------------------------------- settings and files of a recorded world


def test_settings_are_the_presets_where_nothing_was_changed():
    assert compare_reference.policy_args({}) == pfppo.Args(
        preset="lm_human_preferences",
        **{**pfppo.LM_HUMAN_PREFERENCES, "batch_size": 64, "minibatch_size": 64},
    )


def test_changed_settings_reach_our_fields():
    args = compare_reference.policy_args({**HYPERPARAMETERS["policy"], "use_tensorflow_adam": False})
    assert (args.batch_size, args.minibatch_size, args.penalty_value, args.stop_token, args.adam_style) == (
        16,
        8,
        PENALTY,
        "7",
        "torch",
    )
    assert compare_reference.policy_args({"rewards": {"adaptive_kl": None}}).adaptive_kl is False


def test_a_converted_reward_model_gives_the_recorded_scores(llama_world, tmp_path):  # PITFALLS RM-2
    import_reference.main(llama_world, tmp_path)
    model, trace = (
        pfppo.RewardModel.from_pretrained(tmp_path),
        load_file(llama_world / "trace_policy.safetensors"),
    )
    ids = trace["update_1/postprocessed_query_responses"]
    with torch.no_grad():
        assert torch.allclose(model.score(ids, ids != 40), trace["update_1/raw_scores"], atol=1e-6)


def test_weights_of_another_architecture_are_refused(llama_world):
    recorded = load_file(llama_world / "reward_model.safetensors")
    recorded["lm_backbone.transformer.wte.weight"] = recorded.pop("lm_backbone.model.embed_tokens.weight")
    with pytest.raises(KeyError, match="transformer.wte"):
        import_reference.reward_model_from(llama_world, recorded)


def test_labels_from_parquet_are_those_from_json(llama_world, tmp_path, monkeypatch):
    from datasets import Dataset

    monkeypatch.setenv("HF_HOME", str(tmp_path))
    Dataset.from_list(json.loads((llama_world / "labels.json").read_text())).to_parquet(
        tmp_path / "labels.parquet"
    )
    tokenizer = compare_reference.peer_tokenizer(llama_world)
    args = compare_reference.reward_args(HYPERPARAMETERS["reward"], {})
    read = [
        rm.read_labels(str(path), "train_data", args, tokenizer, 40, -1)
        for path in (llama_world / "labels.json", tmp_path / "labels.parquet")
    ]
    assert read[0] == read[1] and len(read[0]) == 72


# ---------------------------------------------------------------- curves


def band(mean: list[float], per_seed: list[float], split_half: float) -> dict:
    return {"mean": mean, "last_window": {"per_seed": per_seed}, "split_half_rms": split_half}


def test_distance_and_last_window_by_hand():
    ours = np.array(
        [[0.0] * 6 + [1.0, 3.0], [2.0] * 6 + [3.0, 5.0]]
    )  # last sixth of 8 steps: the last one; 3 and 5
    found = plot.compare_tag(ours, band([1.0] * 6 + [2.0, 5.0], [4.0, 6.0], 0.3))
    assert found["distance"] == pytest.approx((1 / 8) ** 0.5)  # the means differ in the last step alone, by 1
    assert (found["last_ours"], found["last_ours_se"], found["last_recorded"], found["last_recorded_se"]) == (
        4,
        1,
        5,
        1,
    )
    assert found["last_gap_in_se"] == pytest.approx(1 / 2**0.5)
    assert found["agrees"] is True  # 0.354 <= 1.5 · 0.3


@pytest.mark.parametrize("mean, last, agrees", [(1.0, 5.0, True), (1.6, 5.0, False), (1.0, 9.0, False)])
def test_agreement_needs_both_the_distance_and_the_last_window(mean, last, agrees):
    ours = np.array([[0.0, 4.0], [2.0, 6.0]])
    assert plot.compare_tag(ours, band([mean, 5.0], [last - 1, last + 1], 0.2))["agrees"] is agrees


def test_a_missing_step_is_an_error():
    with pytest.raises(ValueError, match="seed 3: a lacks 1 of 2 recorded steps, first 2"):
        plot.curve({3: [{"step": 1, "a": 0.5}]}, "a", [1, 2])


@pytest.mark.parametrize("stage", ["reward", "policy_steady"])
def test_committed_metrics_give_the_committed_table(stage):
    folders = sorted((ROOT / "benchmark" / "results").glob(f"*-lmhp*/{stage}_metrics.jsonl.gz"))
    if not folders:
        pytest.skip("no committed results")
    seeds, summary = (
        plot.read_runs(folders[-1]),
        json.loads((folders[-1].parent / f"{stage}.json").read_text()),
    )
    bands = json.loads(
        (ROOT / "benchmark" / "lm_human_preferences" / "reference" / summary["bands"]).read_text()
    )["tags"]
    for tag, result in summary["tags"].items():
        found = plot.compare_tag(
            plot.curve(seeds, tag, bands[plot.TAGS[tag]]["steps"]), bands[plot.TAGS[tag]]
        )
        assert found["agrees"] == result["agrees"] and found["distance"] == pytest.approx(
            result["distance"], rel=1e-3, abs=1e-9
        )


def test_finished_seeds_are_skipped_and_failed_ones_run_again(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    script = (
        "import sys, pathlib; p = pathlib.Path(sys.argv[2]); p.mkdir(exist_ok=True); "
        "(p / 'n').open('a').write('x'); sys.exit(sys.argv[1] == '2')"
    )
    arguments = [
        "run",
        "--name",
        "a",
        "--root",
        str(tmp_path),
        "--seeds",
        "1-2",
        "--",
        sys.executable,
        "-c",
        script,
        "{seed}",
        "{output_dir}",
    ]
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", arguments)
        assert run.main() == 1
    assert [(tmp_path / "a" / f"seed_{seed}" / "n").read_text() for seed in (1, 2)] == ["x", "xx"]
    assert run.finished_seeds(tmp_path / "a") == {1}


def test_seeds_are_parsed():
    assert run.parse_seeds("1-3,7") == [1, 2, 3, 7]


# ---------------------------------------------------------------- the commands that are written down


def launch_lines(path: Path) -> list[list[str]]:
    """Words behind `pfppo_single.py` or `rm_single.py`, that name first, of every launch line of a shell
    script."""
    text = re.sub(r"\\\n", " ", path.read_text())
    lines = [
        shlex.split(line) for line in text.splitlines() if "_single.py" in line and not line.startswith("#")
    ]
    lines = [line[next(i for i, word in enumerate(line) if word.endswith("_single.py")) :] for line in lines]
    return [[word.replace("{seed}", "1").replace("$SEED", "1") for word in line] for line in lines]


@pytest.mark.parametrize(
    "path",
    [
        "benchmark/lm_human_preferences/lm_human_preferences.sh",
        "benchmark/recipes/lm_human_preferences_full.sh",
    ],
)
def test_scripts_parse_and_their_flags_exist(path):  # PITFALLS SYS-12
    assert subprocess.run(["bash", "-n", ROOT / path]).returncode == 0
    lines = launch_lines(ROOT / path)
    assert sorted(line[0] for line in lines) == ["pfppo_single.py", "rm_single.py"]
    for name, *flags in lines:
        args = {"rm_single.py": rm, "pfppo_single.py": pfppo}[name].parse_args(flags)
        assert args.preset == "lm_human_preferences"


def test_the_full_size_recipe_has_the_published_hyperparameters():
    lines = {
        line[0]: line[1:] for line in launch_lines(ROOT / "benchmark/recipes/lm_human_preferences_full.sh")
    }
    policy, reward = pfppo.parse_args(lines["pfppo_single.py"]), rm.parse_args(lines["rm_single.py"])
    published = dict(
        batch_size=512,
        total_episodes=1000000,
        lr=1e-5,
        kl_coef=0.15,
        kl_target=6.0,
        temperature=0.7,
        response_length=24,
        stop_token="13",
        stop_after=16,
        noptepochs=4,
        cliprange=0.2,
        vf_coef=0.1,
        lam=0.95,
        gamma=1.0,
    )  # LMHP launch.py
    assert {name: getattr(policy, name) for name in published} == published
    published = dict(
        batch_size=32,
        lr=5e-5,
        num_train=4992,
        temperature=0.7,
        response_length=24,
        normalize_before=True,
        normalize_after=True,
    )
    assert {name: getattr(reward, name) for name in published} == published
