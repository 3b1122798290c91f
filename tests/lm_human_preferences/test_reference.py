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
from conftest import read_metrics
from make_llama_world import HYPERPARAMETERS, PENALTY, make_world
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GenerationMixin

import pfppo_single as pfppo
import rm_single as rm
from benchmark.lm_human_preferences import compare as compare_reference
from benchmark.lm_human_preferences import import_reference, peer_policy, plot, run

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "reference" / "lm_human_preferences"
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="the recorded world is not shipped; it is looked for in ../shared/reference"
)


@pytest.fixture(scope="module")
def llama_world(tmp_path_factory) -> Path:
    """Rotary positions, grouped heads, untied output, short queries, two minibatches; recorded by a second
    implementation."""
    folder = tmp_path_factory.mktemp("llama_world")
    make_world(folder)
    return folder


def verdicts(report) -> dict[str, str]:
    return {row["tensor"]: row["verdict"] for row in compare_reference.summarise(report, None)}


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
        args = compare_reference.policy_args(llama_world, HYPERPARAMETERS["policy"])
        compare_reference.compare_policy(report, llama_world, path.name, args, "sdpa")
        path.unlink()
        return verdicts(report), report.untested()

    return compare


# ---------------------------------------------------------------- the same numbers from the same samples


@needs_shared
def test_every_recorded_tensor_is_reproduced(capsys):  # PITFALLS RM-5, TOK-1, LP-3, AVG-3, GAE-7, GAE-8
    status = compare_reference.main(SHARED)
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert "835 recorded tensors compared, 0 untested" in printed


@pytest.fixture(scope="module")
def peer(tmp_path_factory) -> tuple[list[dict], list]:
    """Three updates of the peer's loop with seed 1: its metrics, and what was drawn (queries, mask, responses)."""
    folder, drawn, plain = tmp_path_factory.mktemp("peer"), [], GenerationMixin.generate

    def kept(self, input_ids, attention_mask, **settings):
        sequences = plain(self, input_ids=input_ids, attention_mask=attention_mask, **settings)
        drawn.append((input_ids, attention_mask.bool(), sequences[:, input_ids.shape[1] :]))
        return sequences

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GenerationMixin, "generate", kept)
        peer_policy.main(peer_policy.Args(world=str(SHARED), output_dir=str(folder), seed=1, updates=3))
    return read_metrics(folder), drawn


@needs_shared
def test_the_peers_loop_written_again_repeats_recorded_seed_1(peer):
    ours, recorded = peer[0], json.loads((SHARED / "curves_policy_steady.json").read_text())["seeds"]["1"]
    names = {"objective/shaped_score": "objective/scores", "ppo/loss/value": "ppo/loss/value_avg"}
    for tag in ours[0].keys() - {"step"}:
        assert [row[tag] for row in ours] == pytest.approx(recorded[names.get(tag, tag)][:3], abs=2e-5), tag


@needs_shared
def test_main_follows_the_peers_loop_on_the_same_queries_and_responses(peer, tmp_path, monkeypatch):
    # what neither tensors of one update nor curves show: state from update to update (Adam, learning rate, KL
    # coefficient, values)
    expected, drawn = peer
    import_reference.main(SHARED, tmp_path / "reward")
    flags = (
        f"--preset lm_human_preferences --policy {SHARED}/model --reward {tmp_path}/reward "
        f"--prompts {SHARED}/queries.jsonl --prompt_field text --query_length 24 --batch_size 64 "
        "--minibatch_size 64 --total_episodes 7680 --lr 0.00025 --stop_token 4 --kl_target 3 "
        f"--kl_horizon 2000 --print_samples_every 0 --output_dir {tmp_path}/ours"
    )
    args = pfppo.parse_args(pfppo.Args, flags.split(), pfppo.PRESETS)
    rows = pfppo.read_prompts("prompts", args, AutoTokenizer.from_pretrained(args.policy))
    where = {tuple(row["query_ids"]): i for i, row in enumerate(rows)}
    queries = [query[real] for queries, mask, _ in drawn for query, real in zip(queries, mask)]
    order = [where[tuple(query.tolist())] for query in queries]
    responses = iter([r for _, _, r in drawn])

    def order_of(num_prompts, start, count, *rest):
        if start >= len(order):
            raise KeyboardInterrupt  # behind the last recorded update
        return order[start : start + count]

    monkeypatch.setattr(pfppo, "read_prompts", lambda name, *_: rows if name == "prompts" else [])
    monkeypatch.setattr(pfppo, "prompt_order", order_of)
    monkeypatch.setattr(pfppo, "generate", lambda *rest: next(responses))
    monkeypatch.setattr(pfppo, "check_cache", lambda *_: None)  # it samples too
    with pytest.raises(KeyboardInterrupt):
        pfppo.main(args)
    ours = read_metrics(tmp_path / "ours")
    assert len(expected) == len(ours) == 3
    for tag in expected[0].keys():
        values = pytest.approx([row[tag] for row in expected], rel=1e-3, abs=1e-4)
        assert [row[tag] for row in ours] == values, tag


def test_another_architecture_and_other_sizes_are_reproduced(llama_world, forks, tmp_path):  # PITFALLS RM-5
    command = ["benchmark/compare_reference.py", str(llama_world)]
    answer = forks("fork_server", "run_command", command, folder=tmp_path)
    (printed,) = answer["printed"]
    assert answer["codes"] == [0], printed
    assert "0 untested, 0 names within rounding, 0 names past their tolerance" in printed


def test_an_unchanged_update_passes(late_update):
    unchanged, untested = late_update()
    assert set(unchanged.values()) == {"ok"} and untested == []


KL_COEF = "update_*/kl_coef_after"


def always_shifted(values, mask, shift_mean=True, whiten=pfppo.whiten):
    return whiten(values, mask, True)


def next_lr(lr, step, num_steps, *rest, scheduled_lr=pfppo.scheduled_lr, **named):
    return scheduled_lr(lr, step + 1, num_steps, *rest, **named)


@pytest.mark.parametrize(
    "name, wrong, tensor",
    [
        ("adam_epsilon", lambda eps, style, step: eps, "policy_weights/after_update_*/NAME"),
        ("whiten", always_shifted, "update_*/rewards_after_whitening"),
        ("gae", lambda *x, f=pfppo.gae: f(*x[:4], x[4] + 0.01), "update_*/advantages"),
        (
            "stop_masks",
            lambda r, s, after, f=pfppo.stop_masks: f(r, s, 0),
            "update_*/postprocessed_responses",
        ),
        ("scheduled_lr", next_lr, "update_*/lr"),
        ("next_kl_coef", lambda kl_coef, kl, target, x: kl_coef * (1 + (kl / target - 1) * x), KL_COEF),
        ("loss_weights", lambda mask, f=pfppo.loss_weights: 2 * f(mask), "update_*/epoch_*/minibatch_*/loss"),
    ],
)
def test_a_wrong_function_is_found(late_update, monkeypatch, name, wrong, tensor):
    monkeypatch.setattr(pfppo, name, wrong)
    assert late_update()[0][tensor] == "FAIL"


def test_a_recorded_nan_fails(late_update):
    changed, _ = late_update(lambda trace: trace["update_4/kl"][0, 0].fill_(float("nan")))
    assert changed["update_*/kl"] == "FAIL"


def test_a_nan_in_recorded_inputs_fails(late_update):
    name = "adam/exp_avg/lm_backbone.lm_head.weight"
    assert late_update(lambda trace: trace[name].fill_(float("nan")))[0]["adam/exp_avg/NAME"] == "FAIL"


def test_an_untested_key_is_reported(late_update):
    _, untested = late_update(lambda trace: trace.update({"update_4/new": torch.zeros(1)}))
    assert untested == [("trace_changed.safetensors", "update_4/new")]


def test_a_query_that_no_text_gives_fails(late_update):
    changed, _ = late_update(lambda trace: trace["update_4/queries"][0, -1].fill_(38))
    assert changed["update_*/queries"] == "FAIL"


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
    report, args = (
        compare_reference.Report(),
        compare_reference.reward_args(llama_world, HYPERPARAMETERS["reward"]),
    )
    compare_reference.compare_reward(report, llama_world, "trace_reward.safetensors", args, "sdpa")
    assert verdicts(report)["weights/after_step_*/NAME"] == "FAIL"
    assert verdicts(report)["step_*/loss"] != "ok"


# ---------------------------------------------------------------- settings and files of a recorded world


def test_settings_are_the_presets_where_nothing_was_changed():
    args = compare_reference.policy_args(Path("w"), {})
    files = dict(policy="w/model", reward="w/reward_model.safetensors", prompts="w/queries.jsonl")
    flags = [f"--{name}={value}" for name, value in files.items()]
    flags += [
        "--preset=lm_human_preferences",
        "--prompt_field=text",
        "--batch_size=64",
        "--minibatch_size=64",
    ]
    assert args == pfppo.parse_args(pfppo.Args, flags, pfppo.PRESETS)


def test_changed_settings_reach_our_fields():
    changed = {**HYPERPARAMETERS["policy"], "use_tensorflow_adam": False}
    args = compare_reference.policy_args(Path("w"), changed)
    assert (args.batch_size, args.minibatch_size, args.missing_stop_score) == (16, 8, PENALTY)
    assert (args.stop_token, args.adam_style) == ("7", "torch")
    assert compare_reference.policy_args(Path("w"), {"rewards": {"adaptive_kl": None}}).kl_target == 0


def test_a_converted_reward_model_gives_the_recorded_scores(llama_world, tmp_path):  # PITFALLS RM-2
    import_reference.main(llama_world, tmp_path / "reward")
    trace = load_file(llama_world / "trace_policy.safetensors")
    ids, tokenizer = (
        trace["update_1/postprocessed_query_responses"],
        AutoTokenizer.from_pretrained(llama_world / "model"),
    )
    pfppo.check_reward_model(str(tmp_path / "reward"), "reward", tokenizer, [], 0)
    with torch.no_grad():
        scores = pfppo.load_reward_model(str(tmp_path / "reward"))(ids, ids != 40)[:, -1]
    assert torch.allclose(scores, trace["update_1/raw_scores"], atol=1e-6)


def test_weights_of_another_architecture_are_refused(llama_world):
    recorded = load_file(llama_world / "reward_model.safetensors")
    recorded["lm_backbone.transformer.wte.weight"] = recorded.pop("lm_backbone.model.embed_tokens.weight")
    with pytest.raises(KeyError, match="transformer.wte"):
        import_reference.reward_model_from(llama_world, recorded)


def test_labels_from_parquet_are_those_from_json(llama_world, tmp_path, monkeypatch):
    from datasets import Dataset

    monkeypatch.setenv("HF_HOME", str(tmp_path))
    paths = (llama_world / "labels.json", tmp_path / "labels.parquet")
    Dataset.from_list(json.loads(paths[0].read_text())).to_parquet(paths[1])
    tokenizer = compare_reference.peer_tokenizer(llama_world)
    config = rm.load_config(llama_world / "model", "model")
    args = compare_reference.reward_args(llama_world, HYPERPARAMETERS["reward"])
    read = []
    for path in paths:
        args.train_data = str(path)
        read.append(rm.read_labels("train_data", args, tokenizer, config, -1)[0])
    assert read[0] == read[1] and len(read[0]) == 72


# ---------------------------------------------------------------- curves


def band(mean: list[float], per_seed: list[float], split_half: float) -> dict:
    return {"mean": mean, "last_window": {"per_seed": per_seed}, "split_half_rms": split_half}


def test_distance_and_last_window_by_hand():
    # last sixth of 8 steps: the last one; 3 and 5
    ours = np.array([[0.0] * 6 + [1.0, 3.0], [2.0] * 6 + [3.0, 5.0]])
    found = plot.compare_tag(ours, band([1.0] * 6 + [2.0, 5.0], [4.0, 6.0], 0.3))
    assert found["distance"] == pytest.approx((1 / 8) ** 0.5)  # the means differ in the last step alone, by 1
    assert (found["last_ours"], found["last_ours_se"]) == (4, 1)
    assert (found["last_recorded"], found["last_recorded_se"]) == (5, 1)
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
    seeds = plot.read_runs(folders[-1])
    summary = json.loads((folders[-1].parent / f"{stage}.json").read_text())
    bands = ROOT / "benchmark" / "lm_human_preferences" / "reference" / summary["bands"]
    bands = json.loads(bands.read_text())["tags"]
    for tag, result in summary["tags"].items():
        band = bands[plot.TAGS[tag]]
        found = plot.compare_tag(plot.curve(seeds, tag, band["steps"]), band)
        assert found["agrees"] == result["agrees"]
        assert found["distance"] == pytest.approx(result["distance"], rel=1e-3, abs=1e-9)


def test_finished_seeds_are_skipped_and_failed_ones_run_again(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    script = (
        "import sys, pathlib; p = pathlib.Path(sys.argv[2]); p.mkdir(exist_ok=True); "
        "(p / 'n').open('a').write('x'); sys.exit(sys.argv[1] == '2')"
    )
    arguments = ["run", "--name", "a", "--root", str(tmp_path), "--seeds", "1-2", "--"]
    arguments += [sys.executable, "-c", script, "{seed}", "{output_dir}"]
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", arguments)
        assert run.main() == 1
    assert [(tmp_path / "a" / f"seed_{seed}" / "n").read_text() for seed in (1, 2)] == ["x", "xx"]
    assert run.finished_seeds(tmp_path / "a") == {1}


def test_seeds_are_parsed():
    assert run.parse_seeds("1-3,7") == [1, 2, 3, 7]


# ---------------------------------------------------------------- the commands that are written down


SCRIPTS = {"rm_single.py": rm, "pfppo_single.py": pfppo}
COMMANDS = ("lm_human_preferences/lm_human_preferences.sh", "recipes/lm_human_preferences_full.sh")
WORDS = {  # what a shell fills in, the longer ones first
    "$ROOT/$TASK/reward_$SEED/model": "$TMP/reward",
    "$ROOT/recorded_reward_model": "$TMP/reward",
    "$LABELS": f"{SHARED}/labels.json",
    "$BOOKS": "$TMP/queries.jsonl",
    "$WORLD/queries.jsonl": "$TMP/queries.jsonl",
    "$ROOT/$TASK": "$TMP/run",
    "{output_dir}": "$TMP/run",
    "{seed}": "1",
    "$SEED": "1",
    "$WORLD": str(SHARED),
    "gpt2": f"{SHARED}/model",
}


def launch_lines(path: Path) -> dict[str, list[str]]:
    """`pfppo_single.py` or `rm_single.py` -> the flags behind it, of every launch line of a shell script."""
    text = re.sub(r"\\\n", " ", path.read_text())
    lines = [line.split("_single.py ") for line in text.splitlines() if not line.startswith("#")]
    return {f"{line[0].split()[-1]}_single.py": shlex.split(line[1]) for line in lines if len(line) == 2}


@pytest.mark.parametrize("path", COMMANDS)
def test_scripts_parse_and_their_flags_exist(path):  # PITFALLS SYS-12
    assert subprocess.run(["bash", "-n", ROOT / "benchmark" / path]).returncode == 0
    lines = launch_lines(ROOT / "benchmark" / path)
    assert lines.keys() == SCRIPTS.keys()
    for name, flags in lines.items():
        flags = [flag.replace("{seed}", "1").replace("$SEED", "1") for flag in flags]
        args = SCRIPTS[name].parse_args(SCRIPTS[name].Args, flags, SCRIPTS[name].PRESETS)
        assert args.preset == "lm_human_preferences"


@needs_shared
@pytest.mark.parametrize("path", COMMANDS)
def test_commands_pass_a_dry_run_on_local_files(path, tmp_path, capsys):  # PITFALLS SYS-12
    import_reference.main(SHARED, tmp_path / "reward")
    queries = (SHARED / "queries.jsonl").read_text().splitlines(keepends=True)[:512]
    (tmp_path / "queries.jsonl").write_text("".join(queries))
    for name, flags in launch_lines(ROOT / "benchmark" / path).items():
        for word, local in WORDS.items():
            flags = [flag.replace(word, local).replace("$TMP", str(tmp_path)) for flag in flags]
        script = SCRIPTS[name]
        script.main(script.parse_args(script.Args, [*flags, "--dry_run"], script.PRESETS))
    printed = capsys.readouterr().out
    assert "4992 labels (0 longer ones left out) of 4 responses" in printed and "updates of" in printed


def test_the_full_size_recipe_has_the_published_hyperparameters():
    lines = launch_lines(ROOT / "benchmark" / COMMANDS[1])
    lines = {name: [flag.replace("$SEED", "1") for flag in flags] for name, flags in lines.items()}
    policy, reward = (
        SCRIPTS[name].parse_args(SCRIPTS[name].Args, lines[name], SCRIPTS[name].PRESETS)
        for name in ("pfppo_single.py", "rm_single.py")
    )
    published = dict(batch_size=512, total_episodes=1000000, lr=1e-5, eps=1e-5, lr_schedule="linear")
    published |= dict(kl_coef=0.15, kl_target=6.0, kl_horizon=10000, temperature=0.7, response_length=24)
    published |= dict(stop_token="13", stop_after=16, missing_stop_score=-1.0, noptepochs=4, cliprange=0.2)
    published |= dict(cliprange_value=0.2, vf_coef=0.1, lam=0.95, gamma=1.0, whiten_rewards=True)
    assert {name: getattr(policy, name) for name in published} == published  # LMHP launch.py
    published = dict(batch_size=32, lr=5e-5, eps=1e-5, num_train=4992, temperature=0.7, response_length=24)
    published |= dict(normalize_before=True, normalize_after=True, lr_schedule="linear")
    assert {name: getattr(reward, name) for name in published} == published
