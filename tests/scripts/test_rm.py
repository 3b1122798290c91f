"""rm_single.py: labels, the best-of-K loss, normalisation, bound, resuming, refusals."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import EOS, VOCAB_SIZE, causal_lm, make_tokenizer, read_metrics, reward_model, write_jsonl
from test_sft import largest_difference, settings_of, two_processes

import pfppo_single as pf
import rm_single as rm

PAD, FILE_PAD = VOCAB_SIZE - 1, 999
PAIRS = [
    {"prompt": "say " + "abcde"[: 1 + i % 5], "chosen": "x" * (1 + i % 4), "rejected": "y" * (1 + i % 3)}
    for i in range(19)
]
HELD_OUT = [
    {"prompt": f"held {i}", "chosen": "x" * (1 + i % 2), "rejected": "y" * (1 + i % 3)} for i in range(11)
]
SMOOTH = dict(
    eps=0.1, lr=0.05
)  # Adam with a tiny epsilon turns rounding of a near-zero gradient into a whole step


def settings(world: Path, folder: Path, output_dir: str, **changes) -> dict:
    """A run of 6 steps of 8, 8 and 3 labels, twice, in about a second."""
    write_jsonl(folder / "pairs.jsonl", PAIRS), write_jsonl(folder / "held_out_pairs.jsonl", HELD_OUT)
    return {
        **dict(
            output_dir=str(folder / output_dir),
            model=str(world / "gpt2"),
            train_data=str(folder / "pairs.jsonl"),
            eval_data=str(folder / "held_out_pairs.jsonl"),
            epochs=2,
            batch_size=8,
            micro_batch_size=3,
            response_length=8,
            query_length=16,
            forward_batch_size=64,
            normalize_samples=32,
            normalize_before=True,
            log_every=1,
            **SMOOTH,
        ),
        **changes,
    }


@pytest.fixture
def train(world, tmp_path):
    """train(output_dir, **changes) -> (metrics, reward model): all of main, in this process."""

    def start(output_dir: str = "run", **changes):
        args = settings(world, tmp_path, output_dir, **changes)
        rm.main(rm.Args(**args))
        return read_metrics(Path(args["output_dir"])), rm.RewardModel.from_pretrained(
            Path(args["output_dir"]) / "model"
        ).eval()

    return start


def sampled(folder: Path) -> dict:
    """Settings in which everything that samples is on, with an actual score in a module of that folder."""
    (folder / "rm_two_graders.py").write_text(
        "def longer(prompts, responses, rows):\n    return [float(len(r) > 3) for r in responses]\n"
    )
    return dict(
        epochs=1,
        kl_samples=9,
        reliability_prompts=str(folder / "held_out_pairs.jsonl"),
        actual_score="rm_two_graders:longer",
        reliability_samples=3,
        reliability_groups=3,
        normalize_samples=64,
    )


def id_row(query=(FILE_PAD, FILE_PAD, 5, 6), best=1, **changes) -> dict:
    """A label of K = 3 as token ids: query padded left, responses right, with an id of the file."""
    return {
        "query": list(query),
        "sample0": [7, 8, 9],
        "sample1": [7, FILE_PAD, FILE_PAD],
        "sample2": [7, 8, FILE_PAD],
        "best": best,
        **changes,
    }


def read(path: Path, rows: list[dict], tokenizer=None, **changes) -> list[dict]:
    write_jsonl(path, rows)
    args, tokenizer = rm.Args(**{"label_pad_id": FILE_PAD, **changes}), tokenizer or make_tokenizer()
    return rm.read_labels(
        str(path), "train_data", args, tokenizer, len(tokenizer), rm.stop_token_id(tokenizer, args.stop_token)
    )


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
    # PITFALLS RM-3: divided by the standard deviation (n - 1), not its root: 1, 3, 5 have mean 3 and
    # deviation 2
    rewards = torch.tensor([1.0, 3.0, 5.0])
    assert rm.normalization(rewards) == (pytest.approx(0.5), pytest.approx(-1.5))
    with pytest.raises(ValueError, match="same for every sample"):
        rm.normalization(torch.ones(4))
    with pytest.raises(ValueError, match="not finite"):
        rm.normalization(torch.tensor([1.0, math.nan]))


def test_reliability_by_hand():
    # 8 responses whose actual score is 1 from reward 5 on; one repeat, two groups: rewards 1..4 and 5..8
    rewards = np.array([3.0, 1, 8, 6, 2, 7, 5, 4])
    assert rm.reliability(rewards, (rewards > 4.5).astype(float), 2, 1, 0) == [
        {"reward": [2.5, 6.5], "actual": [0.0, 1.0], "count": [4, 4]}
    ]


def test_reliability_repeats_share_no_response():
    rewards = np.arange(40.0)
    repeats = rm.reliability(rewards, rewards, 4, 10, 0)
    assert sorted(x for repeat in repeats for x in repeat["reward"]) == list(range(40)) and len(repeats) == 10


# ---------------------------------------------------------------- model


def test_the_output_layer_starts_as_in_lm_human_preferences():
    torch.manual_seed(0)
    model = rm.RewardModel(causal_lm("gpt2", n_embd=512, n_head=2).base_model)
    rm.init_head(model)
    assert model.scalar_head.weight.std().item() == pytest.approx(1 / math.sqrt(513), rel=0.1)
    assert (model.scalar_head.bias.item(), model.reward_gain.item(), model.reward_bias.item()) == (0, 1, 0)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_label_rewards_are_those_of_the_rows_alone_and_those_ppo_sees(name):
    # PITFALLS RM-1, TOK-1: in a padded batch, by itself, and through pfppo_single's scoring function
    model = reward_model(name)
    labels = [
        {"query": [5, 6, 7], "samples": [[8, EOS], [9, 3, 2, 1, EOS]], "best": 1},
        {"query": [4], "samples": [[EOS], [6, 5]], "best": 0},
    ]
    batch, best = rm.label_batch(labels, PAD, "cpu")
    with torch.no_grad():
        loss, _, rewards = rm.label_loss(model, rm.trim(batch, torch.arange(4)), best)
        alone = [
            [
                model.score(
                    torch.tensor([label["query"] + sample]),
                    torch.ones(1, len(label["query"] + sample)).bool(),
                ).item()
                for sample in label["samples"]
            ]
            for label in labels
        ]
    torch.testing.assert_close(rewards, torch.tensor(alone), atol=1e-5, rtol=0)
    expected = math.log(1 + math.exp(alone[0][0] - alone[0][1])) + math.log(
        1 + math.exp(alone[1][1] - alone[1][0])
    )
    assert loss.item() == pytest.approx(expected / 2, abs=1e-5)
    torch.testing.assert_close(pf.reward_model_scores(model, batch, 3).view(2, 2), rewards, atol=1e-5, rtol=0)


def test_label_parts_keep_the_responses_of_a_label_together():
    labels = [{"query": [1] * n, "samples": [[2], [3] * n, [4]], "best": 0} for n in (5, 1, 4, 2, 3)]
    batch, _ = rm.label_batch(labels, PAD, "cpu")
    parts = rm.label_parts(batch, 5, 2)
    assert [part.tolist() for part, _ in parts] == [[1, 3], [4, 2], [0]]  # shortest first
    assert [rows.tolist() for _, rows in parts] == [[3, 4, 5, 9, 10, 11], [12, 13, 14, 6, 7, 8], [0, 1, 2]]


# ---------------------------------------------------------------- labels


def test_ids_are_stripped_of_the_padding_of_the_file(tmp_path):
    # PITFALLS TOK-2: real lengths from where the file's own pad id is, whatever the tokenizer's is
    assert read(tmp_path / "labels.jsonl", [id_row()]) == [
        {"query": [5, 6], "samples": [[7, 8, 9], [7], [7, 8]], "best": 1, "row": 1}
    ]


def test_texts_are_closed_with_one_stop_token(tmp_path, tokenizer):
    # PITFALLS RM-1, BL-3: the last attended token is EOS, and the query ids are those sampling starts from
    label = read(tmp_path / "labels.jsonl", [{"prompt": "ab", "chosen": "x<eos>", "rejected": "yz"}])[0]
    assert (
        label["samples"] == [tokenizer("x")["input_ids"] + [EOS], tokenizer("yz")["input_ids"] + [EOS]]
        and label["best"] == 0
    )
    assert label["query"] == rm.encode_prompt(tokenizer, "ab")
    open_end = read(
        tmp_path / "labels.jsonl", [{"prompt": "ab", "chosen": "x", "rejected": "yz"}], stop_token="none"
    )[0]
    assert open_end["samples"] == [tokenizer("x")["input_ids"], tokenizer("yz")["input_ids"]]


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
    label = read(
        tmp_path / "labels.jsonl",
        [{"prompt": "ab", "chosen": "yx", "rejected": "y"}],
        tokenizer,
        stop_token=stop_token,
    )[0]
    texts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("yx", "y")]
    assert label["samples"] == [ids + ([closed] if closed else []) for ids in texts]


def test_long_text_labels_are_dropped_as_a_whole(tmp_path):
    # PITFALLS TOK-8
    rows = [
        {"prompt": "ab", "chosen": "x" * 9, "rejected": "y"},
        {"prompt": "q" * 9, "chosen": "x", "rejected": "y"},
        {"prompt": "ab", "chosen": "x", "rejected": "y"},
    ]
    assert [
        label["row"] for label in read(tmp_path / "labels.jsonl", rows, query_length=4, response_length=4)
    ] == [3]
    with pytest.raises(ValueError, match="longer than --response_length 1"):
        read(tmp_path / "labels.jsonl", rows[:1], response_length=1)


@pytest.mark.parametrize(
    "bad, message",
    [
        (id_row(best=3), r"row 2: best is 3; .* 0 \.\. 2"),
        (id_row(best=-1), "row 2: best is -1"),
        (id_row(best="1"), "row 2: best is '1'"),
        (id_row(sample2=[7, 8]), "row 2: sample2 has 2 ids, row 1 has 3"),
        (id_row(query=[5] * 9), "row 2: query has 9 tokens, more than --query_length 8"),
        (id_row(query="ab"), "row 2: query must be a list of token ids"),
        (id_row(sample0=[7, -1, 8]), "row 2: sample0 must be a list of token ids"),
        (id_row(query=[FILE_PAD]), "row 2: the query or a sample is empty"),
        (id_row(sample0=[7, 8, 1000]), "row 2: token id 1000, but the model has .* --label_pad_id 1000"),
        ({"query": [5], "sample0": [7, 8, 9], "best": 0}, "row 2: no column sample1, sample2"),
        ("text", "row 2: no column"),
    ],
)
def test_bad_id_labels_are_refused_with_file_row_and_fix(tmp_path, bad, message):
    with pytest.raises(ValueError, match=f"--train_data .*labels.jsonl.*{message}"):
        read(tmp_path / "labels.jsonl", [id_row(), bad], query_length=8)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "a", "chosen": "x"}, "row 1: no column rejected"),
        ({"prompt": "a", "chosen": "x", "rejected": 3}, "row 1: chosen and rejected must be texts"),
        ({"text": "a"}, "row 1: no column prompt, chosen, rejected"),
    ],
)
def test_bad_text_labels_are_refused(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "labels.jsonl", [row])


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("labels.json", "", "not JSON"),
        ("labels.json", "{}", "holds a dict"),
        ("labels.json", "[]", "no rows"),
        ("labels.jsonl", '{"query": [1', "line 1: not JSON"),
        ("none.json", None, "no such file"),
    ],
)
def test_bad_label_files_are_refused_before_a_model_is_loaded(
    world, tmp_path, monkeypatch, name, text, message
):
    monkeypatch.setattr(rm, "load_causal_lm", lambda *args: pytest.fail("a model was loaded"))
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=f"--train_data .*{name}.*{message}"):
        rm.main(rm.Args(**settings(world, tmp_path, "run", train_data=str(tmp_path / name))))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(model=""), "--model is needed"),
        (dict(stop_token="99999"), "--stop_token: token id 99999, but the model has"),
        (dict(num_train=20), "--num_train 20: .* has 19 labels"),
        (dict(temperature=0.0), "--temperature must be above 0"),
        (dict(actual_score="a:b"), "--reliability_prompts and --actual_score need each other"),
        (
            dict(response_length=120),
            "--model .*gpt2 has 128 positions, .* 129 tokens together; lower --response_length",
        ),
        (dict(normalize_prompts="none.jsonl"), "--normalize_prompts none.jsonl: no such file"),
    ],
)
def test_bad_settings_are_refused_before_a_model_is_loaded(world, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(rm, "load_causal_lm", lambda *args: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match=message):
        rm.main(rm.Args(**settings(world, tmp_path, "run", **changes)))


def test_a_tokenizer_without_pad_token_is_refused(world, tmp_path):
    causal_lm("gpt2").save_pretrained(tmp_path / "policy")
    make_tokenizer(pad=None).save_pretrained(tmp_path / "policy")
    with pytest.raises(ValueError, match="no pad token; name one with --pad_token"):
        rm.main(rm.Args(**settings(world, tmp_path, "run", model=str(tmp_path / "policy"))))


def test_the_preset_is_the_default_and_flags_win():
    args = rm.parse_args(["--preset", "lm_human_preferences", "--lr", "0.002"])
    assert rm.parse_args(["--lr=0.002", "--preset=lm_human_preferences"]) == args
    assert (args.lr, args.adam_style, args.bound, args.label_pad_id) == (0.002, "tensorflow", "none", 50259)
    assert rm.parse_args([]) == rm.Args()


# ---------------------------------------------------------------- runs


def test_weights_do_not_depend_on_the_micro_batch_size(train):
    # PITFALLS AVG-1: unequal lengths, 8 labels at once or as 3, 3 and 2; gain and bias are trained too
    metrics, at_once = train("a", micro_batch_size=8, normalize_after=False)
    _, parts = train("b", micro_batch_size=3, normalize_after=False)
    assert largest_difference(at_once.state_dict(), parts.state_dict()) < 1e-6
    gain, bias = metrics[0]["normalize_before/gain"], metrics[0]["normalize_before/bias"]
    assert (
        abs(at_once.reward_gain.item() - gain) > 1e-4 and abs(at_once.reward_bias.item() - bias) == 0
    )  # equal for all K responses


def test_training_learns_the_preference(train, tmp_path):
    write_jsonl(tmp_path / "again.jsonl", PAIRS)
    metrics, _ = train(
        epochs=6,
        lr=3e-3,
        eps=1e-8,
        eval_every=1,
        normalize_before=False,
        eval_data=str(tmp_path / "again.jsonl"),
    )
    accuracies = [m["test/accuracy"] for m in metrics if "test/accuracy" in m]
    assert accuracies[0] < 0.85 and accuracies[-1] > 0.95  # .5 is chance


def test_held_out_accuracy_counts_every_label_once(train, tmp_path):
    # PITFALLS SYS-4, RM-2: the saved model ranks 11 labels as the log says
    metrics, model = train(normalize_after=False, normalize_before=False, bound="none", forward_batch_size=8)
    labels = rm.read_labels(
        str(tmp_path / "held_out_pairs.jsonl"), "eval_data", rm.Args(), make_tokenizer(), VOCAB_SIZE, EOS
    )
    right, loss = [], []
    with torch.no_grad():
        for label in labels:
            a, b = (
                model.score(
                    torch.tensor([label["query"] + s]), torch.ones(1, len(label["query"] + s)).bool()
                ).item()
                for s in label["samples"]
            )
            right.append(a > b), loss.append(math.log(1 + math.exp(b - a)))
    assert metrics[-1]["test/accuracy"] == pytest.approx(np.mean(right)) and metrics[-1][
        "test/loss"
    ] == pytest.approx(np.mean(loss), rel=1e-4)


def test_normalised_rewards_of_sft_samples_have_mean_0_and_deviation_1(train, world):
    # RM-3: measured by hand from the saved model on fresh samples of the SFT policy
    metrics, model = train(normalize_samples=400, forward_batch_size=400, bound="none")
    sft_policy = rm.load_causal_lm(str(world / "gpt2")).eval()
    queries = [make_tokenizer()(row["prompt"])["input_ids"] for row in PAIRS]
    rollout = rm.sample_rollout(
        sft_policy, queries, 60, 8, 1.0, EOS, 0, PAD, 600, torch.Generator().manual_seed(5)
    )
    rewards = rm.reward_model_scores(model, rollout, 600)
    assert abs(rewards.mean().item()) < 0.2 and rewards.std().item() == pytest.approx(1, abs=0.2)
    last = metrics[-1]
    assert (
        last["normalize_after/gain"] == pytest.approx(1 / last["normalize_after/std"]) and last["step"] == 7
    )
    assert last["normalize_after/gain"] == pytest.approx(model.reward_gain.item())
    assert metrics[0]["normalize_before/check_std"] == pytest.approx(1, abs=0.2) and metrics[0]["step"] == 0


def test_the_bound_is_what_readers_see_and_changes_nothing_else(train):
    _, free = train("free", bound="none", epochs=1)
    _, bounded = train("bounded", bound="tanh", epochs=1)
    assert largest_difference(free.state_dict(), bounded.state_dict()) == 0
    ids, mask = rm.pad_rows([[5, 6, 7, EOS], [8, 9], [3] * 9], PAD, "right")
    with torch.no_grad():
        score = free.score(ids, mask)
        torch.testing.assert_close(bounded.score(ids, mask), score.tanh())
    assert (bounded.score(ids, mask).argsort() == score.argsort()).all()


def test_the_preset_runs_on_id_labels(train, tmp_path, world):
    # one path through the code: best of 3 as ids, TensorFlow's Adam, untruncated samples, rows behind
    # num_train held out
    rows = [id_row(best=i % 3, query=[5, 6 + i % 9]) for i in range(19)]
    write_jsonl(tmp_path / "ids.jsonl", rows)
    preset = {
        **rm.LM_HUMAN_PREFERENCES,
        "label_pad_id": FILE_PAD,
        "num_train": 13,
        "eval_every": 1,
        "kl_samples": 8,
        "normalize_samples": 8,
        "batch_size": 4,
        "lr": 1e-3,
        "pad_token": "",
    }
    metrics, model = train(train_data=str(tmp_path / "ids.jsonl"), eval_data="", **preset)
    assert len(metrics) == 6 and model.bound == "none"
    assert [m["train/lr"] for m in metrics[1:-1]] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    assert all(abs(m["train/kl"]) > 1e-3 for m in metrics[2:-1]) and "test/accuracy" in metrics[1]


def test_the_start_has_no_kl_to_itself(train):
    metrics, _ = train(kl_samples=8, lr=0.0, eval_every=6, normalize_after=False)
    assert metrics[-1]["train/kl"] == pytest.approx(0, abs=1e-5)


def test_a_resumed_run_equals_one_that_was_never_interrupted(train, monkeypatch, tmp_path):
    # PITFALLS SYS-9, SYS-10: killed in step 4, behind the checkpoint of step 2; gain and bias come from the
    # checkpoint
    metrics, model = train("whole", log_every=4)
    scheduled_lr = rm.scheduled_lr

    def killed(lr, step, *rest):
        if step == 3:
            raise KeyboardInterrupt
        return scheduled_lr(lr, step, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(rm, "scheduled_lr", killed)
        train("killed", log_every=4, checkpoint_every=2)
    rm.main(rm.Args(**settings_of(tmp_path / "killed")))
    resumed = rm.RewardModel.from_pretrained(tmp_path / "killed/model")
    assert largest_difference(model.state_dict(), resumed.state_dict()) == 0
    steady = [
        [{k: v for k, v in m.items() if k != "seconds/step"} for m in x]
        for x in (metrics, read_metrics(tmp_path / "killed"))
    ]
    assert steady[0] == steady[1]
    with pytest.raises(ValueError, match="holds another run: seed"):
        train("killed", log_every=4, checkpoint_every=2, seed=2)


def test_an_evaluation_that_fails_loses_no_step(train, monkeypatch, tmp_path):
    # PITFALLS SYS-9: the last evaluation comes behind the last checkpoint, and may be asked for less memory
    # the second time
    metrics, model = train("whole", kl_samples=8)
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(rm, "response_logprobs", lambda *args: (_ for _ in ()).throw(MemoryError()))
        train("failed", kl_samples=8)
    monkeypatch.setattr(rm, "scheduled_lr", lambda *args: pytest.fail("a step was trained again"))
    again, resumed = train("failed", kl_samples=8, gradient_checkpointing=True)
    steady = [
        [{k: v for k, v in m.items() if k != "seconds/step"} for m in lines] for lines in (metrics, again)
    ]
    assert steady[0] == steady[1] and largest_difference(model.state_dict(), resumed.state_dict()) == 0


def test_a_nan_loss_stops_with_the_step_and_keeps_the_checkpoint(train, monkeypatch, tmp_path):
    best_of_k_loss, calls = rm.best_of_k_loss, []

    def broken(*args):
        calls.append(1)
        loss, accuracy = best_of_k_loss(*args)
        return loss * (
            math.nan if len(calls) > 6 else 1
        ), accuracy  # 3 micro-batches a step: NaN from step 3 on

    monkeypatch.setattr(rm, "best_of_k_loss", broken)
    with pytest.raises(FloatingPointError, match=r"step 3: the loss is nan.*checkpoints"):
        train(checkpoint_every=1)
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step_000002"]


def test_reliability_files(train, module, tmp_path):
    # PAPER Figure 1: 11 prompts x 10 responses of the SFT policy, each scored by R and by s, in ten repeats
    name = module(
        "rm_graders",
        "def longer(prompts, responses, rows):\n    return [float(len(r) > 3) for r in responses]\n",
    )
    _, model = train(
        reliability_prompts=str(tmp_path / "held_out_pairs.jsonl"),
        actual_score=f"{name}:longer",
        reliability_groups=3,
    )
    lines = [json.loads(line) for line in (tmp_path / "run/samples_scored.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == [i for i in range(11) for _ in range(10)]
    assert all(line["actual"] == (len(line["response"]) > 3) and -1 <= line["reward"] <= 1 for line in lines)
    found = json.loads((tmp_path / "run/reliability.json").read_text())
    assert found["responses"] == 110 and len(found["repeats"]) == 10
    for repeat in found["repeats"]:
        assert (
            sum(repeat["count"]) == 11
            and len(repeat["reward"]) == 3
            and repeat["reward"] == sorted(repeat["reward"])
        )
    ends = [
        line for line in lines if len(line["response"]) < 8
    ]  # ended by EOS, so the text gives back the ids
    query, response = (
        make_tokenizer()(HELD_OUT[ends[0]["prompt"]]["prompt"])["input_ids"],
        rm.encode_response(make_tokenizer(), ends[0]["response"], EOS),
    )
    with torch.no_grad():
        row = torch.tensor([query + response])
        assert model.score(row, torch.ones_like(row).bool()).item() == pytest.approx(
            ends[0]["reward"], abs=1e-4
        )


def test_two_processes_train_and_evaluate_as_one(train, world):
    # PITFALLS AVG-1, SYS-2, SYS-4: batches of 8 and 3 labels, 11 held-out labels; the samples to normalise on
    # differ by rank
    metrics, model = train(normalize_before=False, normalize_after=False)
    folder = two_processes(world) / "rm"
    other = rm.RewardModel.from_pretrained(folder / "model")
    assert largest_difference(model.state_dict(), other.state_dict()) < 1e-6
    for one, two in zip(metrics, read_metrics(folder), strict=True):
        for name in set(one) - {"seconds/step"}:
            assert two[name] == pytest.approx(one[name], rel=2e-5, abs=1e-6), name


def test_two_processes_sample_once_and_agree_on_one_normalisation(world):
    # PITFALLS SYS-4, LP-10: 11 prompts x 3 responses in all, one gain for both ranks, other samples on each
    folder = two_processes(world) / "rm_sampled"
    lines = [json.loads(line) for line in (folder / "samples_scored.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == [i for i in range(11) for _ in range(3)]
    metrics, model = read_metrics(folder), rm.RewardModel.from_pretrained(folder / "model")
    assert (
        metrics[-1]["normalize_after/gain"] == pytest.approx(model.reward_gain.item())
        and metrics[-2]["train/kl"] > 0
    )
    assert metrics[-1]["normalize_after/check_std"] == pytest.approx(
        1, abs=0.3
    )  # fails where a rank keeps its own statistics
    ranks = [[line["response"] for line in lines if line["prompt"] % 2 == parity][:15] for parity in (0, 1)]
    assert ranks[0] != ranks[1]
