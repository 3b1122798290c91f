"""rm_single.py: labels, the best-of-K loss, normalisation, bound, what a run writes, refusals."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from conftest import (
    EOS,
    HELD_OUT_PAIRS,
    PAIRS,
    VOCAB_SIZE,
    causal_lm,
    make_tokenizer,
    model_config,
    read_metrics,
    reward_model,
    rm_settings,
    same,
    timeless,
    weights,
    write_jsonl,
)

import pfppo_single as pf
import rm_single as rm

FILE_PAD = 999
IMAGE = [{"role": "assistant", "content": [{"type": "image", "url": "x.png"}]}]  # no text in it
SMOOTH = dict(eps=0.1, lr=0.05)  # with a tiny epsilon Adam turns rounding of a near-zero gradient into a step


@pytest.fixture
def train(world, tmp_path, unchecked):
    """train(output_dir, **changes) -> (metrics, reward model as PPO loads it): all of main, in this process, by
    itself without normalisation."""

    def start(output_dir: str = "run", **changes):
        changes = dict(normalize_before=False, normalize_after=False) | changes
        rm.main(rm.Args(**rm_settings(world, tmp_path / output_dir, **changes)))
        return finished(tmp_path / output_dir)

    return start


def finished(folder: Path) -> tuple[list[dict], rm.RewardModel]:
    return read_metrics(folder), pf.load_reward_model(str(folder / "model")).eval()


NORMALIZE = dict(normalize_before=True, normalize_after=True)


@pytest.fixture(scope="module")
def normalised(world, tmp_path_factory):
    """(metrics, unbounded model) of a run that normalises on 400 samples, twice."""
    folder = tmp_path_factory.mktemp("normalised") / "run"
    settings = dict(normalize_samples=400, forward_batch_size=400, bound="none", **NORMALIZE)
    rm.main(rm.Args(**rm_settings(world, folder, **settings)))
    return finished(folder)


def largest_difference(a: torch.nn.Module, b: torch.nn.Module) -> float:
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def rewards_of(model, label: dict) -> list[float]:
    """Unbounded rewards of a label's samples, each by itself."""
    rows = [label["query"] + sample for sample in label["samples"]]
    with torch.no_grad():
        return [model(*pf.pad_left([row], "cpu"))[0, -1].item() for row in rows]


def id_row(query=(FILE_PAD, FILE_PAD, 5, 6), best=1, **changes) -> dict:
    """A label of K = 3 as token ids: query padded left, responses right, with an id of the file."""
    row = {"query": list(query), "sample0": [7, 8, 9], "sample1": [7, FILE_PAD, FILE_PAD]}
    return row | {"sample2": [7, 8, FILE_PAD], "best": best} | changes


def read(path: Path, rows: list[dict], tokenizer=None, **changes) -> tuple[list[dict], int]:
    """read_labels as main calls it, for a GPT-2 of 43 tokens or more."""
    settings = dict(model="m", train_data=str(write_jsonl(path, rows)), label_pad_id=FILE_PAD)
    args, tokenizer = rm.Args(**settings | changes), tokenizer or make_tokenizer()
    stop_id = rm.stop_token_id(tokenizer, args.stop_token)
    config = model_config("gpt2", vocab_size=len(tokenizer))
    return rm.read_labels("train_data", args, tokenizer, config, stop_id)


# ---------------------------------------------------------------- maths


def test_with_two_rewards_the_loss_is_eq_2():
    # -log σ(R_w - R_l) by hand: differences 1 and -2; best may be either column
    rewards, best = torch.tensor([[1.5, 0.5], [3.0, 1.0]]), torch.tensor([0, 1])
    loss, accuracy = rm.best_of_k_loss(rewards, best)
    assert loss.item() == pytest.approx((math.log(1 + math.exp(-1)) + math.log(1 + math.exp(2))) / 2)
    assert accuracy.item() == 0.5


def test_with_four_rewards_the_loss_is_cross_entropy():
    # softmax of log(1), log(2), log(3), log(4) is .1 .2 .3 .4
    loss, accuracy = rm.best_of_k_loss(torch.tensor([[1.0, 2.0, 3.0, 4.0]]).log(), torch.tensor([2]))
    assert loss.item() == pytest.approx(-math.log(0.3)) and accuracy.item() == 0


def test_a_tie_counts_as_a_guess():
    # a constant reward model must not look right because the chosen response stands first
    _, accuracy = rm.best_of_k_loss(torch.tensor([[2.0, 2.0, 2.0, 0.0]]), torch.tensor([0]))
    assert accuracy.item() == pytest.approx(1 / 3)


def test_normalization_gives_mean_0_and_standard_deviation_1():
    # PITFALLS RM-3: divided by the standard deviation (n - 1), not its root: 1, 3, 5 have mean 3, deviation 2
    assert rm.normalization(torch.tensor([1.0, 3.0, 5.0])) == (pytest.approx(0.5), pytest.approx(-1.5))


@pytest.mark.parametrize("rewards", [[1.0, 1.0, 1.0], [1.0, math.nan, 2.0], [1.0, math.inf, 2.0]])
def test_rewards_that_cannot_be_normalised_are_refused(rewards):
    with pytest.raises(SystemExit, match="^--normalize_samples: .* not finite"):
        rm.normalization(torch.tensor(rewards))


# ---------------------------------------------------------------- model


def test_the_output_layer_starts_as_in_lm_human_preferences():
    torch.manual_seed(0)
    model = rm.RewardModel(causal_lm("gpt2", n_embd=512, n_head=2).base_model)
    rm.init_head(model)
    assert model.scalar_head.weight.std().item() == pytest.approx(1 / math.sqrt(513), rel=0.1)
    assert (model.scalar_head.bias.item(), model.reward_gain.item(), model.reward_bias.item()) == (0, 1, 0)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_label_rewards_are_those_of_the_rows_alone(name):
    # PITFALLS RM-1, TOK-1: unequal lengths in one batch; `best` stays beside its label
    model = reward_model(name)
    labels = [
        {"query": [5, 6, 7], "samples": [[8, EOS], [9, 3, 2, 1, EOS]], "best": 1},
        {"query": [4], "samples": [[EOS], [6, 5]], "best": 0},
    ]
    with torch.no_grad():
        rewards, best = rm.label_rewards(model, labels, "cpu")
    expected = torch.tensor([rewards_of(model, label) for label in labels])
    torch.testing.assert_close(rewards, expected, atol=1e-5, rtol=0)
    assert best.tolist() == [1, 0]


def test_ppo_asks_what_the_labels_taught():
    # PITFALLS RM-1: the same ids, the same place, through pfppo_single's rollout and scoring function
    model, query, samples = reward_model(), [5, 6, 7], [[8, EOS], [9, 3, 2, 1, EOS]]
    queries, query_mask = pf.pad_left([query, query], "cpu")
    responses = torch.tensor([sample + [0] * (6 - len(sample)) for sample in samples])
    mask, _ = pf.stop_masks(responses.clone(), EOS, 0)
    rollout = {"queries": queries, "query_mask": query_mask, "responses": responses}
    rollout |= {"response_mask": mask, "score_mask": mask}
    expected = torch.tensor(rewards_of(model, {"query": query, "samples": samples}))
    torch.testing.assert_close(pf.reward_model_scores(model, rollout, 1), expected, atol=1e-5, rtol=0)


def test_a_part_keeps_the_responses_of_a_label_together():
    labels = [{"query": [1] * n, "samples": [[2], [3] * n], "best": 0} for n in (5, 1, 4, 2, 3)]
    parts = rm.micro_batches(labels, 2)
    assert [[len(label["query"]) for label in part] for part in parts] == [[1, 2], [3, 4], [5]]


# ---------------------------------------------------------------- labels


def test_ids_are_stripped_of_the_padding_of_the_file(tmp_path):
    # PITFALLS TOK-2: real lengths from where the file's own pad id is
    labels, left_out = read(tmp_path / "labels.jsonl", [id_row()])
    assert labels == [{"query": [5, 6], "samples": [[7, 8, 9], [7], [7, 8]], "best": 1}] and left_out == 0


def test_text_labels_start_with_the_ids_sampling_starts_from(tmp_path, tokenizer):
    # PITFALLS RM-1, BL-3
    (label,), _ = read(tmp_path / "labels.jsonl", [{"prompt": "ab", "chosen": "x", "rejected": "yz"}])
    assert label["query"] == rm.encode_prompt(tokenizer, "ab") and label["best"] == 0


@pytest.mark.parametrize(
    "stop_token, closed",
    [
        ("eos", EOS),
        ("<eos>", EOS),
        (str(EOS), EOS),
        ("<s>", EOS - 1),
        ("<|im_end|>", VOCAB_SIZE),
        ("none", None),
        ("x", None),
    ],
)
def test_texts_are_closed_by_whatever_special_token_stops_a_sample(tmp_path, stop_token, closed):
    # PITFALLS RM-1: PPO reads the reward at the stop token, so labels end with it under each of its names; an
    # ordinary token (LMHP's ".") stops samples but is not written behind texts
    tokenizer = make_tokenizer(bos=True)
    tokenizer.add_tokens(["<|im_end|>"], special_tokens=True)
    rows = [{"prompt": "ab", "chosen": "yx", "rejected": "y"}]
    (label,), _ = read(tmp_path / "labels.jsonl", rows, tokenizer, stop_token=stop_token)
    texts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("yx", "y")]
    assert label["samples"] == [ids + ([closed] if closed else []) for ids in texts]


def test_long_text_labels_are_left_out_as_a_whole_and_counted(tmp_path):
    # PITFALLS TOK-8
    rows = [
        {"prompt": "ab", "chosen": "x" * 9, "rejected": "y"},
        {"prompt": "q" * 9, "chosen": "x", "rejected": "y"},
        {"prompt": "cd", "chosen": "x", "rejected": "y"},
    ]
    labels, left_out = read(tmp_path / "labels.jsonl", rows, query_length=4, response_length=4)
    assert [label["query"] for label in labels] == [make_tokenizer()("cd")["input_ids"]] and left_out == 2


def test_labels_left_out_are_counted_on_the_console(world, tmp_path, capsys):
    # PITFALLS TOK-8: of training and held-out labels apart; two letters and the stop token fit
    settings = rm_settings(world, tmp_path / "run", response_length=3, dry_run=True)
    rm.main(rm.Args(**settings))
    short, held_out = (
        sum(max(len(row["chosen"]), len(row["rejected"])) <= 2 for row in rows)
        for rows in (PAIRS, HELD_OUT_PAIRS)
    )
    printed = capsys.readouterr().out
    assert 0 < short < 19 and f"{short} labels ({19 - short} longer ones left out) of 2 responses" in printed
    assert 0 < held_out < 11 and f"{held_out} held-out ({11 - held_out} left out)" in printed


@pytest.mark.parametrize(
    "bad, message",
    [
        (id_row(best=3), r"row 2: best is 3; .* 0 \.\. 2"),
        (id_row(best=-1), "row 2: best is -1"),
        (id_row(best="1"), "row 2: best is '1'"),
        (id_row(sample2=[7, 8]), r"row 2: samples of \[2, 3\] ids.*--label_pad_id"),
        (id_row(query=[5] * 9), "row 2: query .* 9 tokens; raise --query_length"),
        (id_row(query="ab"), "row 2: query must be a list of token ids"),
        (id_row(sample0=[7, -1, 8]), "row 2: sample0 must be a list of token ids"),
        (id_row(query=[FILE_PAD]), "row 2: the query or a sample is empty"),
        (id_row(sample0=[7, 8, 1000]), "the model has .* tokens, not 1000"),
        ({"query": [5], "sample0": [7, 8, 9], "best": 0}, "row 2: no column sample1, sample2"),
        ("text", "row 2: 'text' is no object"),
    ],
)
def test_bad_id_labels_are_refused_with_file_row_and_fix(tmp_path, bad, message):
    with pytest.raises(SystemExit, match=f"^--train_data.*{message}"):
        read(tmp_path / "labels.jsonl", [id_row(), bad], query_length=8)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "a", "chosen": "x"}, "row 1: no column rejected"),
        ({"prompt": "a", "chosen": "x", "rejected": 3}, "row 1: rejected must be a text"),
        ({"chosen": "x", "rejected": "y"}, "row 1: no column prompt; it has chosen, rejected"),
        ({"prompt": "a", "chosen": "x", "rejected": IMAGE}, "row 1: rejected must be a text"),
        ({"query": [5], "sample0": [7], "best": 0}, "row 1: needs sample0, sample1, ..., two or more"),
        (
            {"prompt": "a", "chosen": "x" * 513, "rejected": "y"},
            "every response is longer than --response_length",
        ),
    ],
)
def test_labels_of_a_wrong_form_are_refused(tmp_path, row, message):
    with pytest.raises(SystemExit, match=f"^--train_data .*labels.jsonl.*{message}"):
        read(tmp_path / "labels.jsonl", [row])


# ---------------------------------------------------------------- refusals


REFUSED = [
    (dict(model="none"), "--model none"),
    (dict(model="{}/t5"), "--model .*t5: transformers has no sequence classification"),
    (dict(model="{}/bert"), "--model .*bert: that form of it has no layer `score`"),
    (dict(train_data="none.jsonl"), "--train_data none.jsonl"),
    (dict(eval_data="none.jsonl"), "--eval_data none.jsonl"),
    (dict(normalize_prompts="none.jsonl"), "--normalize_prompts none.jsonl"),
    (dict(stop_token="99999"), "--stop_token.*99999"),
    (dict(num_train=20), "--num_train 20: .* 19 labels; lower it"),
    (dict(response_length=120), "--.* 128 positions, not 1[0-9]*; lower --query_length or --response_length"),
    (dict(prompt_field="question"), "--train_data.*row 1: no column question"),
]


@pytest.mark.parametrize("changes, message", REFUSED, ids=[message for _, message in REFUSED])
def test_bad_settings_are_refused_before_a_model_is_loaded(world, tmp_path, monkeypatch, changes, message):
    # by --dry_run too, and with no folder left behind
    monkeypatch.setattr(rm, "load_causal_lm", None)
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert/config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "t5").mkdir()
    (tmp_path / "t5/config.json").write_text('{"model_type": "mamba"}')
    changes = {k: v.replace("{}", str(tmp_path)) if isinstance(v, str) else v for k, v in changes.items()}
    for dry_run in (True, False):
        settings = rm_settings(world, tmp_path / "run", **changes, dry_run=dry_run)
        with pytest.raises(SystemExit, match=f"^{message}") as refusal:
            rm.main(rm.Args(**settings))
        assert "\n" not in str(refusal.value) and not (tmp_path / "run").exists()


def test_without_sampling_positions_are_counted_from_the_labels_alone(world, tmp_path):
    # response_length says nothing then but what is left out
    settings = dict(normalize_before=False, normalize_after=False, response_length=1024, dry_run=True)
    rm.main(rm.Args(**rm_settings(world, tmp_path / "run", **settings)))


# ---------------------------------------------------------------- runs


def test_weights_do_not_depend_on_the_micro_batch_size(train):
    # PITFALLS AVG-1: unequal lengths, 8 labels at once or as 3, 3 and 2
    (_, at_once), (_, parts) = (
        train(str(size), micro_batch_size=size, epochs=1, **SMOOTH) for size in (8, 3)
    )
    assert largest_difference(at_once, parts) < 1e-6


def test_gain_is_trained_too_and_bias_has_no_gradient(train):
    # the bias is the same for all K responses
    metrics, model = train(normalize_before=True, epochs=1, **SMOOTH)
    gain, bias = metrics[0]["normalize_before/gain"], metrics[0]["normalize_before/bias"]
    assert abs(model.reward_gain.item() - gain) > 1e-4 and abs(model.reward_bias.item() - bias) == 0
    last = metrics[-1]
    assert (last["train/gain"], last["train/bias"]) == (model.reward_gain.item(), model.reward_bias.item())


def test_training_learns_the_preference(train, tmp_path):
    write_jsonl(tmp_path / "again.jsonl", PAIRS)
    settings = dict(epochs=6, lr=3e-3, eval_every=2, eval_data=str(tmp_path / "again.jsonl"))
    metrics, _ = train(**settings)
    accuracies = [m["test/accuracy"] for m in metrics if "test/accuracy" in m]
    assert accuracies[0] < 0.85 and accuracies[-1] > 0.95  # .5 is chance


def test_held_out_accuracy_counts_every_label_once(train, tmp_path):
    # PITFALLS SYS-4, RM-2: the saved model ranks 11 labels as the log says
    metrics, model = train(forward_batch_size=8, epochs=1)
    labels, _ = read(tmp_path / "held.jsonl", HELD_OUT_PAIRS)
    differences = np.array([best - other for best, other in (rewards_of(model, label) for label in labels)])
    assert len(labels) == 11 and metrics[-1]["test/accuracy"] == pytest.approx((differences > 0).mean())
    assert metrics[-1]["test/loss"] == pytest.approx(np.log1p(np.exp(-differences)).mean(), rel=1e-4)


def test_normalised_rewards_of_sft_samples_have_mean_0_and_deviation_1(normalised):
    # PITFALLS RM-3: measured from the saved model on fresh samples of the SFT policy
    metrics, model = normalised
    rows = [{"query_ids": make_tokenizer()(row["prompt"])["input_ids"]} for row in PAIRS]
    args = pf.Args(policy="", reward="", prompts="", response_length=8, forward_batch_size=600)
    generator = torch.Generator().manual_seed(5)
    rollout = pf.sample_rollout(causal_lm("gpt2"), rows, 60, 1.0, args, EOS, generator)
    rewards = pf.reward_model_scores(model, rollout, 600)
    assert abs(rewards.mean().item()) < 0.2 and rewards.std().item() == pytest.approx(1, abs=0.2)
    assert metrics[-1]["step"] == 7
    assert metrics[-1]["normalize_after/gain"] == pytest.approx(1 / metrics[-1]["normalize_after/std"])
    assert metrics[-1]["normalize_after/gain"] == pytest.approx(model.reward_gain.item())


def test_normalisation_is_checked_on_fresh_samples(normalised):
    # PITFALLS RM-3: other samples than those it was set on, before training and after
    metrics, _ = normalised
    for line, name in ((metrics[0], "normalize_before"), (metrics[-1], "normalize_after")):
        assert 0.8 < line[f"{name}/check_std"] < 1.2 and abs(line[f"{name}/check_mean"]) < 0.2
        assert abs(line[f"{name}/check_std"] - 1) > 1e-4, "that would be the samples it was set on"
    assert metrics[0]["step"] == 0


def test_normalisation_samples_the_prompts_that_are_given(train, tmp_path, spies):
    # and the queries of the labels where none are
    seen = spies.on(rm, "sample", lambda out, *_: {tuple(label["query"]) for label in out})
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "zz"}, {"prompt": "yyy"}])
    train("given", normalize_prompts=str(prompts), epochs=1, **NORMALIZE)
    train("labels", epochs=1, **NORMALIZE)
    tokenizer = make_tokenizer()
    given = {tuple(tokenizer(text)["input_ids"]) for text in ("zz", "yyy")}
    labels = {tuple(tokenizer(row["prompt"])["input_ids"]) for row in PAIRS}
    assert seen == [given] * 4 + [labels] * 4


def test_the_bound_is_what_readers_see_and_changes_nothing_else(train):
    (_, free), (_, bounded) = (train(bound, bound=bound, epochs=1, **NORMALIZE) for bound in ("none", "tanh"))
    assert largest_difference(free, bounded) == 0 and (free.bound, bounded.bound) == ("none", "tanh")


def test_the_preset_runs_on_id_labels(world, tmp_path):
    # PITFALLS RM-5: one path through the code: best of 3 as ids, TensorFlow's Adam, untruncated samples, rows
    # behind num_train held out
    rows = [id_row(best=i % 3, query=[5, 6 + i % 9]) for i in range(19)]
    settings = dict(output_dir=tmp_path / "run", model=world / "gpt2", num_train=13, label_pad_id=FILE_PAD)
    settings |= dict(train_data=write_jsonl(tmp_path / "ids.jsonl", rows), eval_every=1, kl_samples=8)
    settings |= dict(normalize_samples=8, batch_size=4, lr=1e-3)
    flags = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    rm.main(rm.parse_args(rm.Args, ["--preset", "lm_human_preferences", *flags], rm.PRESETS))
    metrics = read_metrics(tmp_path / "run")
    assert [line["step"] for line in metrics] == [0, 1, 2, 3, 4, 5]
    assert [m["train/lr"] for m in metrics[1:-1]] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    assert all(abs(m["train/kl"]) > 1e-3 and "test/accuracy" in m for m in metrics[2:-1])
    assert pf.load_reward_model(str(tmp_path / "run/model")).bound == "none"


def test_the_start_has_no_kl_to_itself(train):
    metrics, _ = train(kl_samples=8, lr=0.0, epochs=1)
    assert metrics[-1]["train/kl"] == pytest.approx(0, abs=1e-5)


def test_skipped_steps_do_not_count_for_tensorflow_epsilon(train, spies, monkeypatch):
    # PITFALLS RM-5: under fp16 a step with an overflow is none, for Adam either; here the first and third
    skipped = iter([True, False, True, False, False, False])
    monkeypatch.setattr(AcceleratedOptimizer, "step_was_skipped", property(lambda _: next(skipped)))
    steps = spies.on(rm, "adam_epsilon", lambda out, eps, style, step: step)
    train(adam_style="tensorflow")
    assert steps == [1, 1, 2, 2, 3, 4]


def test_seconds_per_step_are_those_of_training(train, monkeypatch):
    # a step takes 2 seconds, an evaluation 100: every 2 steps, which 3 is no multiple of
    clock, check_finite, evaluate = [0.0], rm.check_finite, rm.evaluate

    def slow(function, seconds):
        return lambda *args: (clock.append(clock[-1] + seconds), function(*args))[1]

    monkeypatch.setattr(rm, "time", SimpleNamespace(time=lambda: clock[-1]))
    monkeypatch.setattr(rm, "check_finite", slow(check_finite, 2.0))
    monkeypatch.setattr(rm, "evaluate", slow(evaluate, 100.0))
    metrics, _ = train(eval_every=2, log_every=3)
    assert [m["step"] for m in metrics if "test/loss" in m] == [2, 4, 6]
    assert [(m["step"], m["seconds/step"]) for m in metrics if "seconds/step" in m] == [(3, 2.0), (6, 2.0)]


def test_an_evaluation_that_fails_loses_no_step(train, monkeypatch, tmp_path):
    # PITFALLS SYS-9: the last evaluation comes behind the last checkpoint, and may be asked for less memory
    # the second time
    settings = dict(kl_samples=8, epochs=1, normalize_after=True)
    metrics, model = train("whole", **settings)
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(rm, "response_logprobs", lambda *args: (_ for _ in ()).throw(MemoryError()))
        train("failed", **settings)
    assert [path.name for path in (tmp_path / "failed/checkpoints").iterdir()] == ["step_000003"]
    monkeypatch.setattr(rm, "scheduled_lr", lambda *args: pytest.fail("a step was trained again"))
    again, resumed = train("failed", **settings, gradient_checkpointing=True)
    assert timeless(metrics) == timeless(again) and same(model.state_dict(), resumed.state_dict())


def test_a_nan_loss_stops_with_the_step_and_keeps_the_checkpoint(train, monkeypatch, tmp_path):
    best_of_k_loss, calls = rm.best_of_k_loss, []

    def broken(*args):
        calls.append(1)
        loss, accuracy = best_of_k_loss(*args)
        return loss * (math.nan if len(calls) > 6 else 1), accuracy  # 3 micro-batches a step: from step 3 on

    monkeypatch.setattr(rm, "best_of_k_loss", broken)
    with pytest.raises(FloatingPointError, match=r"step 3: the loss is nan.*checkpoint is kept"):
        train(checkpoint_every=1, epochs=1)
    checkpoint = tmp_path / "run/checkpoints/step_000002"
    assert [checkpoint] == list(checkpoint.parent.iterdir())
    assert all(torch.isfinite(x).all() for x in weights(checkpoint).values())


def test_args_say_how_the_run_was_made(train, tmp_path):
    train(epochs=1)
    saved = json.loads((tmp_path / "run/args.json").read_text())
    assert saved["epochs"] == 1 and saved["num_processes"] == 1 and saved["preset"] == "pfppo"
