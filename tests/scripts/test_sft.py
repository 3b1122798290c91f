"""sft_single.py: tokens and masks, the loss over the global batch, resuming, refusals."""

import functools
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import EOS, VOCAB_SIZE, causal_lm, make_tokenizer, model_config, read_metrics, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

import sft_single as sft

ROOT, PAD = Path(__file__).resolve().parents[2], VOCAB_SIZE - 1
ROWS = [
    {"prompt": "copy " + "ab3 x"[: 1 + i % 5], "response": "=" + "xy1" * (i % 4) + "z" * (i % 3)}
    for i in range(19)
]
HELD_OUT = [{"prompt": f"held {'q' * (i % 4)}{i}", "response": "ok" * (1 + i % 3), "n": i} for i in range(11)]


SMOOTH = dict(
    eps=0.1, lr=0.05
)  # Adam with a tiny epsilon turns rounding of a near-zero gradient into a whole step


def settings(world: Path, folder: Path, output_dir: str, **changes) -> dict:
    """A run of 6 steps of 8, 8 and 3 rows, twice, in under a second."""
    write_jsonl(folder / "sft.jsonl", ROWS), write_jsonl(folder / "held_out.jsonl", HELD_OUT)
    return {
        **dict(
            output_dir=str(folder / output_dir),
            model=str(world / "gpt2"),
            train_data=str(folder / "sft.jsonl"),
            eval_data=str(folder / "held_out.jsonl"),
            epochs=2,
            batch_size=8,
            micro_batch_size=3,
            lr=1e-3,
            query_length=32,
            response_length=24,
            forward_batch_size=4,
            print_samples=1,
            log_every=1,
        ),
        **changes,
    }


@pytest.fixture
def train(world, tmp_path):
    """train(output_dir, **changes) -> (metrics, weights): all of main, in this process."""

    def start(output_dir: str = "run", **changes):
        args = settings(world, tmp_path, output_dir, **changes)
        sft.main(sft.Args(**args))
        model = AutoModelForCausalLM.from_pretrained(Path(args["output_dir"]) / "model")
        return read_metrics(Path(args["output_dir"])), model.state_dict()

    return start


def largest_difference(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


# ---------------------------------------------------------------- tokens


@pytest.mark.parametrize("pad", ["<pad>", "<eos>"])
@pytest.mark.parametrize("text, tokens", [("ab", 2), ("", 0), ("ab<eos>", 2), ("a<eos>b<eos>", 1)])
def test_a_response_has_exactly_one_stop_token_and_it_is_a_label(pad, text, tokens):
    # PITFALLS TOK-2, TOK-3: also with pad = eos, where masks by id would lose it; masks are bool (TOK-9)
    tokenizer = make_tokenizer(pad=pad)
    ids = sft.encode_response(tokenizer, text, EOS)
    assert len(ids) == tokens + 1 and ids.count(EOS) == 1 and ids[-1] == EOS
    batch = sft.pad_batch([[1, EOS, 2], [3]], [ids, [4] * 6], tokenizer.pad_token_id, "cpu")
    assert batch["responses"][0][batch["response_mask"][0]].tolist() == ids
    assert batch["response_mask"].dtype == torch.bool
    assert batch["query_mask"].sum(1).tolist() == [3, 1]  # the EOS inside a prompt is attended


def test_stop_token_none_adds_nothing():
    assert sft.encode_response(make_tokenizer(), "ab", -1) == make_tokenizer()("ab")["input_ids"]


def test_training_sees_the_boundary_that_sampling_sees(tokenizer):
    # PITFALLS BL-3: prompt ids + response ids, never the tokens of the concatenated text
    row = sft.encode_examples(
        tokenizer, [{"prompt": "add ", "response": "x y"}], sft.Args(), "train_data", EOS
    )[0]
    batch = sft.trim(
        sft.pad_batch([row["query_ids"], [5] * 9], [row["response_ids"], [6]], PAD, "cpu"),
        torch.tensor([0, 1]),
    )
    ids = batch["query_responses"][0][batch["mask"][0]].tolist()
    assert ids == tokenizer("add ")["input_ids"] + tokenizer("x y")["input_ids"] + [EOS]
    assert row["query_ids"] == sft.encode_prompt(tokenizer, "add ")


def test_chat_messages_become_prompt_and_response():
    # PITFALLS TOK-7: one BOS, written by the template; the assistant's text alone is trained on
    tokenizer = make_tokenizer(bos=True)
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    row = sft.encode_examples(
        tokenizer, [{"chat": messages}], sft.Args(messages_field="chat"), "train_data", EOS
    )[0]
    text = tokenizer.decode(row["query_ids"] + row["response_ids"])
    assert text == "<s>hi<eos>=yo<eos>" and row["query_ids"].count(tokenizer.bos_token_id) == 1
    with pytest.raises(
        ValueError, match="--train_data, row 1: chat must end with a message of role assistant"
    ):
        sft.encode_examples(
            tokenizer, [{"chat": messages[:1]}], sft.Args(messages_field="chat"), "train_data", EOS
        )


def test_long_rows_are_dropped_or_cut_before_padding(tokenizer):
    # PITFALLS TOK-8: no truncation of prompt + response as one, so no loss mask is ever empty
    rows = [
        {"prompt": "abcdefgh", "response": "xy"},
        {"prompt": "ab", "response": "uvwxyz"},
        {"prompt": "cd", "response": ""},
    ]

    def encode(**changes):
        return sft.encode_examples(
            tokenizer, rows, sft.Args(query_length=4, response_length=4, **changes), "train_data", EOS
        )

    assert [row["prompt"] for row in encode()] == ["cd"] and encode()[0]["response_ids"] == [EOS]
    cut = encode(long_queries="keep_end", long_responses="cut")
    assert tokenizer.decode(cut[0]["query_ids"]) == "efgh" and cut[0]["response_ids"][-1] == EOS
    assert tokenizer.decode(cut[1]["response_ids"]) == "uvwx"  # no stop token: it was not written here
    with pytest.raises(ValueError, match="--response_length 1"):
        sft.encode_examples(tokenizer, rows[:2], sft.Args(response_length=1), "train_data", EOS)


# ---------------------------------------------------------------- loss


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_response_logprobs_are_the_log_softmax_of_a_plain_forward(name):
    # PITFALLS TOK-1, LP-9: padded on both sides or alone, every token is scored by the logits one column
    # earlier
    model, queries, responses = (
        causal_lm(name),
        [[5, 6, 7], [8], [9, 3]],
        [[4, EOS], [2, 3, 4, 5, EOS], [EOS]],
    )
    batch = sft.trim(sft.pad_batch(queries, responses, PAD, "cpu"), torch.arange(3))
    with torch.no_grad():
        logprobs = sft.response_logprobs(model, batch)
        for i, (query, response) in enumerate(zip(queries, responses)):
            every = model(torch.tensor([query + response])).logits[0].log_softmax(-1)
            expected = [every[len(query) + t - 1, token].item() for t, token in enumerate(response)]
            assert logprobs[i][batch["response_mask"][i]].tolist() == pytest.approx(expected, abs=1e-4)
            assert (logprobs[i][~batch["response_mask"][i]] == 0).all()


def test_the_loss_is_the_mean_over_the_tokens_of_the_batch():
    # PITFALLS AVG-1: -(1 + 2 + 3 + 10) / 4, not the mean of the row means 2 and 10; on two ranks the sum
    # counts double
    mask = torch.tensor([[True, True, True], [True, False, False]])
    logprobs = -torch.tensor([[1.0, 2.0, 3.0], [10.0, 99.0, 99.0]])
    assert -(logprobs * sft.loss_weights(mask, "token")).sum().item() == pytest.approx(4.0)
    on_rank = sft.loss_weights(mask[1:], "token", all_sum=lambda count: count + 3, num_processes=2)
    assert -(logprobs[1:] * on_rank).sum().item() == pytest.approx(2 * 10 / 4)


def test_weights_do_not_depend_on_the_micro_batch_size(train, world):
    # PITFALLS AVG-1: unequal lengths, 8 rows at once or one by one
    _, at_once = train("a", micro_batch_size=8, **SMOOTH)
    _, one_by_one = train("b", micro_batch_size=1, **SMOOTH)
    _, uneven = train("c", micro_batch_size=3, **SMOOTH)
    assert largest_difference(uneven, one_by_one) < 1e-6
    start = sft.load_causal_lm(str(world / "gpt2")).state_dict()
    assert largest_difference(at_once, start) > 1e-2 > 1e4 * largest_difference(at_once, one_by_one)


def test_the_logged_loss_of_the_first_step_is_that_of_the_start_model(train, world, tokenizer):
    metrics, _ = train(epochs=1, batch_size=19)
    model = sft.load_causal_lm(str(world / "gpt2")).eval()
    nll, tokens = 0.0, 0
    for row in ROWS:
        query, response = (
            tokenizer(row["prompt"])["input_ids"],
            tokenizer(row["response"])["input_ids"] + [EOS],
        )
        with torch.no_grad():
            every = model(torch.tensor([query + response])).logits[0].log_softmax(-1)
        nll -= sum(every[len(query) + t - 1, token].item() for t, token in enumerate(response))
        tokens += len(response)
    assert len(metrics) == 1 and metrics[0]["train/loss"] == pytest.approx(nll / tokens, rel=1e-5)


def test_weights_are_float32_and_there_is_no_dropout(train, world):
    # PITFALLS SYS-1, LP-6: float32 weights, and after one step more than 90% of them have moved
    before = sft.load_causal_lm(str(world / "gpt2"))
    assert all(module.p == 0 for module in before.modules() if isinstance(module, torch.nn.Dropout))
    _, after = train(epochs=1, batch_size=19, lr=5e-7)
    moved = torch.cat(
        [
            (after[name] != p).flatten()
            for name, p in before.state_dict().items()
            if "wte" not in name and "wpe" not in name
        ]
    )
    assert all(p.dtype == torch.float32 for p in after.values()) and moved.float().mean() > 0.9


def test_training_lowers_the_loss(train, tmp_path):
    write_jsonl(tmp_path / "again.jsonl", ROWS)
    metrics, _ = train(epochs=12, lr=3e-3, eval_every=3, eval_data=str(tmp_path / "again.jsonl"))
    losses = [m["test/loss"] for m in metrics if "test/loss" in m]
    assert losses[-1] < losses[0] - 0.3 and len(losses) == 12


# ---------------------------------------------------------------- order, evaluation, schedule


def test_every_row_is_seen_once_per_pass_in_another_order(train, monkeypatch):
    seen, encoded = [], {tuple(ids): i for i, ids in enumerate(row_ids())}
    pad_batch = sft.pad_batch

    def watched(queries, responses, *rest):
        seen.append([encoded[tuple(q + r)] for q, r in zip(queries, responses)])
        return pad_batch(queries, responses, *rest)

    monkeypatch.setattr(sft, "pad_batch", watched)
    train(eval_data="")
    assert [len(batch) for batch in seen] == [8, 8, 3] * 2
    passes = sum(seen[:3], []), sum(seen[3:], [])
    assert sorted(passes[0]) == sorted(passes[1]) == list(range(19)) and passes[0] != passes[1] != list(
        range(19)
    )


def row_ids() -> list[list[int]]:
    tokenizer = make_tokenizer()
    return [tokenizer(row["prompt"] + row["response"])["input_ids"] + [EOS] for row in ROWS]


def test_every_held_out_row_counts_once(train, world, tokenizer, module):
    # PITFALLS SYS-4, SYS-5: 11 rows in batches of 4; loss over tokens, pass@1 over rows
    name = module(
        "sft_graders", "def seven(prompts, responses, rows):\n    return [row['n'] == 7 for row in rows]\n"
    )
    metrics, weights = train(actual_score=f"{name}:seven")
    model = sft.load_causal_lm(str(world / "gpt2"))
    model.load_state_dict(weights)
    rows = sft.encode_examples(tokenizer, HELD_OUT, sft.Args(), "eval_data", EOS)
    sums = [0.0, 0]
    with torch.no_grad():
        for row in rows:
            batch = sft.trim(
                sft.pad_batch([row["query_ids"]], [row["response_ids"]], PAD, "cpu"), torch.tensor([0])
            )
            sums = [
                sums[0] - sft.response_logprobs(model, batch).sum().item(),
                sums[1] + len(row["response_ids"]),
            ]
    assert metrics[-1]["test/loss"] == pytest.approx(sums[0] / sums[1], rel=1e-5)
    assert metrics[-1]["test/greedy_pass1"] == pytest.approx(1 / 11)


def test_samples_are_greedy_responses_of_the_last_weights(train, world, tmp_path, tokenizer):
    _, weights = train()
    model = sft.load_causal_lm(str(world / "gpt2"))
    model.load_state_dict(weights)
    line = json.loads((tmp_path / "run/samples.jsonl").read_text().splitlines()[-1])
    ids, text = tokenizer(HELD_OUT[0]["prompt"])["input_ids"], []
    with torch.no_grad():
        while len(text) < 24 and EOS not in text:
            text.append(model(torch.tensor([ids + text])).logits[0, -1].argmax().item())
    assert (
        line["response"] == tokenizer.decode(text, skip_special_tokens=True)
        and line["prompt"] == HELD_OUT[0]["prompt"]
    )


def test_the_learning_rate_warms_up_and_ends_at_its_final_fraction(train):
    metrics, _ = train(warmup_steps=2, final_lr_fraction=0.1, lr_schedule="linear")
    lrs = [m["train/lr"] for m in metrics]
    # linear from 1e-3 to 1e-4 over the 4 steps behind the warm-up
    assert lrs == pytest.approx([5e-4, 1e-3, 1e-3, 7.75e-4, 5.5e-4, 3.25e-4])


# ---------------------------------------------------------------- files


def test_from_scratch_weights_come_from_the_seed_and_load_again(train, world, tmp_path):
    # PITFALLS SYS-8: tied (GPT-2) and untied (Llama) models give equal logits after saving
    for name in ("gpt2", "llama"):
        model_config(name).save_pretrained(tmp_path / name)
        one, two = (
            dict(model="", model_config=str(tmp_path / name), tokenizer=str(world / "gpt2"), seed=seed)
            for seed in (1, 2)
        )
        _, weights = train(f"{name}_1", **one)
        _, again = train(f"{name}_again", **one)
        _, other = train(f"{name}_2", **two)
        assert largest_difference(weights, again) == 0 and largest_difference(weights, other) > 1e-3
        folder = tmp_path / f"{name}_1/model"
        assert AutoTokenizer.from_pretrained(folder)("ab")["input_ids"] == make_tokenizer()("ab")["input_ids"]
        assert AutoModelForCausalLM.from_pretrained(folder).config.eos_token_id == EOS


def test_a_resumed_run_equals_one_that_was_never_interrupted(train, monkeypatch, tmp_path):
    # PITFALLS SYS-9, SYS-10: killed in step 4, behind the checkpoint of step 2; log lines are means over 4
    # steps
    metrics, weights = train("whole", log_every=4, eval_every=3)
    scheduled_lr = sft.scheduled_lr

    def killed(lr, step, *rest):
        if step == 3:
            raise KeyboardInterrupt
        return scheduled_lr(lr, step, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sft, "scheduled_lr", killed)
        train(
            "killed", log_every=4, checkpoint_every=2, eval_every=3
        )  # a sample of step 3, behind the checkpoint
    (tmp_path / "killed/checkpoints/tmp").mkdir()  # what a kill while writing leaves behind
    resumed = settings_of(tmp_path / "killed")
    sft.main(sft.Args(**resumed))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "killed/model")
    assert largest_difference(weights, model.state_dict()) == 0
    drop = ("seconds/step",)
    assert [{k: v for k, v in m.items() if k not in drop} for m in read_metrics(tmp_path / "killed")] == [
        {k: v for k, v in m.items() if k not in drop} for m in metrics
    ]
    assert (tmp_path / "killed/samples.jsonl").read_text() == (tmp_path / "whole/samples.jsonl").read_text()
    assert [path.name for path in (tmp_path / "killed/checkpoints").iterdir()] == ["step_000006"]


def test_an_evaluation_that_fails_loses_no_step(train, monkeypatch, module, tmp_path):
    # PITFALLS SYS-9: the last evaluation comes behind the last checkpoint, and may be asked for less memory
    # the second time
    name = module(
        "sft_failing", "def score(prompts, responses, rows):\n    return [float(len(r)) for r in responses]\n"
    )
    metrics, weights = train("whole", actual_score=f"{name}:score", print_samples=2)
    module(name, "def score(prompts, responses, rows):\n    raise MemoryError\n")
    with pytest.raises(MemoryError):
        train("failed", actual_score=f"{name}:score", print_samples=2)
    module(name, "def score(prompts, responses, rows):\n    return [float(len(r)) for r in responses]\n")
    monkeypatch.setattr(sft, "scheduled_lr", lambda *args: pytest.fail("a step was trained again"))
    state = tmp_path / "failed/checkpoints/step_000006/state.json"
    unfinished = state.read_text()
    for attempt in range(
        3
    ):  # the second time nothing is left to do; the third, the run was killed behind its last line of metrics
        state.write_text(unfinished) if attempt == 2 else None
        again, resumed = train("failed", actual_score=f"{name}:score", print_samples=2, forward_batch_size=3)
        steady = [
            [{k: v for k, v in m.items() if k != "seconds/step"} for m in lines] for lines in (metrics, again)
        ]
        assert [m["step"] for m in again] == [1, 2, 3, 4, 5, 6] and steady[0][:-1] == steady[1][:-1]
        assert (
            steady[0][-1] == pytest.approx(steady[1][-1], rel=1e-5)
            and largest_difference(weights, resumed) == 0
        )
        assert (tmp_path / "failed/samples.jsonl").read_text() == (
            tmp_path / "whole/samples.jsonl"
        ).read_text()


def test_a_grader_that_returns_too_few_values_is_refused(train, module):
    name = module(
        "sft_short", "def short(prompts, responses, rows):\n    return [1.0] * (len(responses) - 1)\n"
    )
    with pytest.raises(ValueError, match="returned 10 values for 11 responses"):
        train(actual_score=f"{name}:short")


def settings_of(folder: Path) -> dict:
    return {k: v for k, v in json.loads((folder / "args.json").read_text()).items() if k != "num_processes"}


def test_a_nan_loss_stops_with_the_step_and_keeps_the_checkpoint(train, monkeypatch, tmp_path):
    token_logprobs, calls = sft.token_logprobs, []

    def broken(*args):
        calls.append(1)
        return token_logprobs(*args) * (
            math.nan if len(calls) > 9 else 1
        )  # 3 micro-batches a step: NaN from step 4 on

    monkeypatch.setattr(sft, "token_logprobs", broken)
    with pytest.raises(FloatingPointError, match=r"step 4: the loss is nan.*checkpoints"):
        train(checkpoint_every=1, eval_data="")
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step_000003"]


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(train_data="none.jsonl"), "--train_data none.jsonl: no such file"),
        (dict(train_data=""), "--train_data is needed"),
        (dict(model=""), "either --model .* or --model_config"),
        (dict(response_field="answer"), "row 1: no column answer"),
        (dict(batch_size=0), "--batch_size must be at least 1"),
        (dict(actual_score="json:none", eval_data="EVAL"), "--actual_score json:none"),
        (dict(stop_token="<end>"), "--stop_token <end>"),
        (dict(stop_token="99999"), "token id 99999, but the model has"),
        (dict(query_length=2), "--query_length 2"),
        (
            dict(response_length=124),
            "--model .*gpt2 has 128 positions, .* 130 tokens together; lower --response_length",
        ),  # it will be asked
    ],
)
def test_bad_settings_are_refused_before_a_model_is_loaded(world, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(sft, "load_causal_lm", lambda *args: pytest.fail("a model was loaded"))
    args = settings(world, tmp_path, "run", **changes)
    args["eval_data"] = str(tmp_path / "held_out.jsonl") if args["eval_data"] == "EVAL" else args["eval_data"]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        sft.main(sft.Args(**args))
    assert not (tmp_path / "run").exists()  # so that the corrected command is not refused as another run


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "no rows"),
        ('{"prompt": "a"', "line 1: not JSON"),
        ('{"prompt": "a"}\n', "row 1: no column response"),
    ],
)
def test_bad_files_are_refused_with_file_and_line(world, tmp_path, text, message):
    args = settings(world, tmp_path, "run")
    (tmp_path / "sft.jsonl").write_text(text)
    with pytest.raises(ValueError, match=f"sft.jsonl.*{message}"):
        sft.main(sft.Args(**args))


def test_the_folder_of_another_run_and_a_foreign_tokenizer_are_refused(train, world, tmp_path):
    train()
    with pytest.raises(ValueError, match=r"holds another run: lr \(0.001 there, 0.002 here\)"):
        train(lr=2e-3)
    model_config("gpt2", vocab_size=10).save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match=f"--train_data: token id {EOS}, but the model has 10 tokens"):
        train("other", model="", model_config=str(tmp_path / "small"), tokenizer=str(world / "gpt2"))


def test_evaluation_prompts_that_are_too_long_are_refused(world, tmp_path, capsys, monkeypatch):
    # PITFALLS TOK-8: pass@1 over short prompts alone would pass for pass@1; held-out rows that are left out
    # are counted
    monkeypatch.setattr(sft, "load_causal_lm", lambda *args: pytest.fail("a model was loaded"))
    write_jsonl(tmp_path / "ask.jsonl", [{"prompt": "q" * n} for n in (3, 33, 34)])
    with pytest.raises(
        ValueError, match="--eval_prompts: 2 of 3 queries .* --query_length 32; .* --long_queries"
    ):
        sft.main(sft.Args(**settings(world, tmp_path, "run", eval_prompts=str(tmp_path / "ask.jsonl"))))
    sft.main(sft.Args(**settings(world, tmp_path, "run", dry_run=True, response_length=5)))
    assert (
        "held-out rows: 8" in (printed := capsys.readouterr().out) and "held-out rows left out: 3" in printed
    )


def test_positions_are_counted_from_the_rows_that_are_there(world, tmp_path, capsys):
    # without evaluation nothing is generated, so only the training rows must fit, whatever the lengths allow
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a" * 27, "response": "b" * 100}])
    changes = dict(train_data=str(rows), eval_data="", response_length=1024, dry_run=True)
    sft.main(sft.Args(**settings(world, tmp_path, "run", **changes)))
    write_jsonl(rows, [{"prompt": "a" * 28, "response": "b" * 100}])
    with pytest.raises(ValueError, match="--model .*gpt2 has 128 positions, .* 129 tokens"):
        sft.main(sft.Args(**settings(world, tmp_path, "run", **changes)))


def test_dry_run_reads_the_data_and_writes_nothing(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sft, "load_causal_lm", lambda *args: pytest.fail("a model was loaded"))
    sft.main(sft.Args(**settings(world, tmp_path, "run", dry_run=True)))
    assert "optimizer steps: 6" in capsys.readouterr().out and not (tmp_path / "run").exists()


# ---------------------------------------------------------------- two processes

TWO = """
import json, sys
sys.path[:0] = [sys.argv[1], str(__file__).rsplit("/", 1)[0]]
import sft_single, rm_single
for name, settings in json.load(open(sys.argv[2])):
    module = {"sft": sft_single, "rm": rm_single}[name]
    module.main(module.Args(**settings))
"""


@functools.cache
def two_processes(world: Path) -> Path:
    """One launch of two processes that trains both scripts (test_rm.py reads its part); returns the folder of
    the outputs."""
    import test_rm

    folder = Path(tempfile.mkdtemp(dir=world))
    runs = [
        ("sft", settings(world, folder, "sft", **SMOOTH)),
        ("rm", test_rm.settings(world, folder, "rm", normalize_before=False, normalize_after=False)),
    ]
    runs.append(("rm", test_rm.settings(world, folder, "rm_sampled", **test_rm.sampled(folder))))
    (folder / "runs.json").write_text(json.dumps(runs))
    (folder / "two.py").write_text(TWO)
    # `accelerate launch --cpu --num_processes 2` starts one process (accelerate 1.15 leaves more to mpirun);
    # torchrun starts two
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(folder / "two.py"),
        str(ROOT),
        str(folder / "runs.json"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((folder / "rm_sampled/args.json").read_text())["num_processes"] == 2
    return folder


def test_two_processes_train_and_evaluate_as_one(train, world):
    # PITFALLS AVG-1, SYS-2, SYS-4: batches of 8 and 3 rows, 11 held-out rows
    metrics, weights = train(**SMOOTH)
    folder = two_processes(world) / "sft"
    other = AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()
    assert largest_difference(weights, other) < 1e-6
    for one, two in zip(metrics, read_metrics(folder), strict=True):
        assert one.keys() == two.keys()
        for name in set(one) - {"seconds/step"}:
            assert two[name] == pytest.approx(one[name], rel=2e-5), name
