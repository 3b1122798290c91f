"""sft_single.py: tokens and masks, the loss over the global batch, learning rate, files, refusals."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import (
    EOS,
    causal_lm,
    make_tokenizer,
    model_config,
    read_metrics,
    same,
    sft_settings,
    timeless,
    weights,
    write_jsonl,
)
from conftest import HELD_OUT_ROWS as HELD_OUT
from conftest import SFT_ROWS as ROWS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import sft_single as sft


@pytest.fixture
def train(world, tmp_path, unchecked):
    """train(output_dir, **changes) -> (metrics, weights): all of main, in this process."""

    def start(output_dir: str = "run", **changes):
        sft.main(sft.Args(**sft_settings(world, tmp_path / output_dir, **changes)))
        return read_metrics(tmp_path / output_dir), loaded(tmp_path / output_dir / "model").state_dict()

    return start


def loaded(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def largest_difference(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


SMOOTH = dict(lr=0.05)


@pytest.fixture
def smooth(monkeypatch):
    """Adam with a large epsilon: with a tiny one, rounding of a near-zero gradient becomes a whole step."""
    adamw = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda *args, **kw: adamw(*args, **{**kw, "eps": 0.1}))


# ---------------------------------------------------------------- tokens


@pytest.mark.parametrize("pad", [None, "<pad>", "<eos>"])
@pytest.mark.parametrize("text, tokens", [("ab", 2), ("", 0), ("ab<eos>", 2), ("a<eos>b<eos>", 1)])
def test_a_response_has_exactly_one_stop_token_its_last(pad, text, tokens):
    # PITFALLS TOK-2, TOK-3: whatever the pad token is
    ids = sft.encode_response(make_tokenizer(pad=pad), text, EOS)
    assert len(ids) == tokens + 1 and ids.count(EOS) == 1 and ids[-1] == EOS


def test_stop_token_none_adds_nothing(tokenizer):
    assert sft.encode_response(tokenizer, "ab", -1) == tokenizer("ab")["input_ids"]


@pytest.mark.parametrize(
    "text, expected", [("eos", EOS), ("none", -1), ("<s>", EOS - 1), ("7", 7), ("x", 24)]
)
def test_a_stop_token_is_named_or_numbered(tokenizer, text, expected):
    # PITFALLS TOK-5
    assert sft.stop_token_id(tokenizer, text) == expected


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """As GPT-2's: a newline is the token Ċ, é is Ã©, ### is one token, #! two."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "##", "###", "Ã©", "<eos>"]
    merges = [("#", "#"), ("##", "#"), ("Ã", "©")]
    inner = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama's, over a alone: what it does not know it drops."""
    inner = Tokenizer(models.BPE({"▁": 0, "a": 1, "<eos>": 2}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")


def test_a_stop_token_by_name_asks_the_tokenizer_for_no_text():
    inner = Tokenizer(models.WordLevel({"a": 0, "<eos>": 1}, unk_token="<unk>"))  # it fails on other words
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")
    assert [sft.stop_token_id(tokenizer, name) for name in ("eos", "none", "0")] == [1, -1, 0]


@pytest.mark.parametrize("text, token", [("\n", "Ċ"), ("###", "###"), (" ", "Ġ"), ("Ċ", "Ċ"), ("é", "Ã©")])
def test_a_text_that_is_one_token_stops(text, token):
    tokenizer = byte_level_tokenizer()
    assert sft.stop_token_id(tokenizer, text) == tokenizer.get_vocab()[token]


@pytest.mark.parametrize(
    "make, text, tokens",
    [
        (byte_level_tokenizer, "###\n", "'###', 'Ċ'"),
        (make_tokenizer, "no", "'n', 'o'"),
        (make_tokenizer, "#", "'<unk>'"),
        (metaspace_tokenizer, "\n", "'▁'"),  # the space would stop every response
    ],
)
def test_a_text_that_is_several_tokens_or_unknown_is_refused_naming_them(make, text, tokens):
    with pytest.raises(SystemExit) as refusal:
        sft.stop_token_id(make(), text)
    said = f"--stop_token {text!r} is no token, but [{tokens}]; give one token, or `none`"
    assert str(refusal.value) == said


def encode(tokenizer, tmp_path, rows: list[dict], **changes) -> tuple[list[dict], int]:
    args = sft.Args(train_data=str(write_jsonl(tmp_path / "rows.jsonl", rows)), **changes)
    return sft.encode_examples(tokenizer, args, "train_data", EOS)


def test_training_sees_the_boundary_that_sampling_sees(tokenizer, tmp_path):
    # PITFALLS BL-3: prompt ids and response ids apart, never the tokens of the concatenated text
    (row,), left_out = encode(tokenizer, tmp_path, [{"prompt": "add ", "response": "x y"}])
    assert row["query_ids"] == sft.encode_prompt(tokenizer, "add ") == tokenizer("add ")["input_ids"]
    assert row["response_ids"] == [*tokenizer("x y")["input_ids"], EOS] and left_out == 0


def test_a_chat_has_one_bos_and_the_assistants_text_alone_is_trained_on(tmp_path):
    # PITFALLS TOK-7: the template writes it (every form of a row: test_rows.py)
    tokenizer = make_tokenizer(bos=True)
    (row,), _ = encode(tokenizer, tmp_path, [{"messages": [USER, ANSWER]}])
    assert tokenizer.decode(row["query_ids"]) == "<s>hi<eos>="
    assert tokenizer.decode(row["response_ids"]) == "yo<eos>"
    assert row["query_ids"].count(tokenizer.bos_token_id) == 1


USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
IMAGE = {"type": "image", "url": "x.png"}
CHATS = {
    "no answer": [USER],
    "nothing": [],
    "a text alone": "hi",
    "no message": ["hi"],
    "an answer without text": [USER, {"role": "assistant"}],
    "a number": [USER, {**ANSWER, "content": 3}],
    "a picture": [USER, {**ANSWER, "content": [IMAGE]}],
    "a part that is no object": [USER, {**ANSWER, "content": ["yo"]}],
    "an answer alone": [ANSWER],
}


@pytest.mark.parametrize("name", CHATS)
def test_a_chat_without_question_and_answer_is_refused_with_its_row(tokenizer, tmp_path, name):
    # in one line, not with a traceback
    rows = [{"messages": [USER, ANSWER]}, {"messages": CHATS[name]}]
    with pytest.raises(SystemExit, match="^--train_data.*row 2") as refusal:
        encode(tokenizer, tmp_path, rows)
    assert "\n" not in str(refusal.value)


def test_long_rows_are_left_out_as_a_whole_and_counted(tokenizer, tmp_path):
    # PITFALLS TOK-8: no truncation of prompt + response as one, so no loss mask is ever empty
    rows = [
        {"prompt": "abcdefgh", "response": "xy"},
        {"prompt": "ab", "response": "uvwx"},
        {"prompt": "cd", "response": ""},
    ]
    found, left_out = encode(tokenizer, tmp_path, rows, query_length=4, response_length=4)
    assert [(row["prompt"], row["response_ids"]) for row in found] == [("cd", [EOS])] and left_out == 2


# ---------------------------------------------------------------- loss


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_response_logprobs_are_the_log_softmax_of_a_plain_forward(name):
    # PITFALLS TOK-1, LP-9: padded or alone, every token is scored by the logits one column earlier
    model, rows = causal_lm(name), [([5, 6, 7], [4, EOS]), ([8], [2, 3, 4, 5, EOS]), ([9, 3], [EOS])]
    rows = [{"query_ids": query, "response_ids": response} for query, response in rows]
    with torch.no_grad():
        logprobs = sft.response_logprobs(model, rows, "cpu")
        for found, row in zip(logprobs, rows):
            query, response = row["query_ids"], row["response_ids"]
            every = model(torch.tensor([query + response])).logits[0].log_softmax(-1)
            expected = [every[len(query) + t - 1, token].item() for t, token in enumerate(response)]
            assert found[5 - len(response) :].tolist() == pytest.approx(expected, abs=1e-4)
            assert (found[: 5 - len(response)] == 0).all()


def test_weights_do_not_depend_on_the_micro_batch_size(train, world, smooth):
    # PITFALLS AVG-1: unequal lengths, 8 rows at once, one by one, or as 3, 3 and 2
    (_, at_once), *others = (
        train(str(size), micro_batch_size=size, epochs=1, eval_data=None, **SMOOTH) for size in (8, 1, 3)
    )
    for _, other in others:
        assert largest_difference(at_once, other) < 1e-6
    assert largest_difference(at_once, causal_lm("gpt2").state_dict()) > 1e-2


def test_the_logged_loss_of_the_first_step_is_that_of_the_start_model(train, tokenizer):
    # PITFALLS AVG-2: the mean over tokens, not over rows or micro-batches
    metrics, _ = train(epochs=1, batch_size=19, eval_data=None)
    model, nll, tokens = causal_lm("gpt2"), 0.0, 0
    for row in ROWS:
        query = tokenizer(row["prompt"])["input_ids"]
        response = [*tokenizer(row["response"])["input_ids"], EOS]
        with torch.no_grad():
            every = model(torch.tensor([query + response])).logits[0].log_softmax(-1)
        nll -= sum(every[len(query) + t - 1, token].item() for t, token in enumerate(response))
        tokens += len(response)
    assert len(metrics) == 1 and metrics[0]["train/loss"] == pytest.approx(nll / tokens, rel=1e-5)


def test_nearly_all_weights_move_in_a_small_step(train):
    # PITFALLS SYS-1: float32 weights
    _, after = train(epochs=1, batch_size=19, lr=5e-7, eval_data=None)
    before = causal_lm("gpt2").state_dict()
    names = [name for name in before if "wte" not in name and "wpe" not in name]
    moved = torch.cat([(after[name] != before[name]).flatten() for name in names])
    assert all(p.dtype == torch.float32 for p in after.values()) and moved.float().mean() > 0.9


def test_training_lowers_the_loss(train, tmp_path):
    write_jsonl(tmp_path / "again.jsonl", ROWS)
    metrics, _ = train(epochs=6, lr=3e-3, eval_every=3, eval_data=str(tmp_path / "again.jsonl"))
    losses = [m["test/loss"] for m in metrics if "test/loss" in m]
    assert losses[-1] < losses[0] - 0.3 and len(losses) == 6


# ---------------------------------------------------------------- order, evaluation, schedule, log


def test_every_row_is_seen_once_per_pass_in_another_order(train, spies):
    # PITFALLS LP-10
    calls = spies.on(sft, "micro_batches", lambda out, rows, _: [row["number"] for row in rows])
    train(eval_data=None)
    assert [len(batch) for batch in calls] == [8, 8, 3, 8, 8, 3, 0]  # the last is the evaluation of nothing
    passes = sum(calls[:3], []), sum(calls[3:], [])
    assert sorted(passes[0]) == sorted(passes[1]) == list(range(19))
    assert passes[0] != passes[1] != list(range(19))


def test_every_held_out_row_counts_once(train, tmp_path, tokenizer):
    # PITFALLS SYS-4, SYS-5: 11 rows in batches of 4, the mean over their tokens
    metrics, _ = train(epochs=1)
    model, args = (
        loaded(tmp_path / "run/model"),
        sft.Args(train_data="", eval_data=str(tmp_path / "held_out.jsonl")),
    )
    rows, _ = sft.encode_examples(tokenizer, args, "eval_data", EOS)
    with torch.no_grad():
        total = -sum(sft.response_logprobs(model, [row], "cpu").sum().item() for row in rows)
    tokens = sum(len(row["response_ids"]) for row in rows)
    assert len(rows) == len(HELD_OUT) == 11
    assert metrics[-1]["test/loss"] == pytest.approx(total / tokens, rel=1e-5)


def test_the_learning_rate_warms_up_and_ends_at_its_final_fraction(train):
    # linear from 1e-3 to 1e-4 over the 4 steps behind the warm-up
    metrics, _ = train(warmup_steps=2, final_lr_fraction=0.1, lr_schedule="linear", eval_data=None)
    assert [m["train/lr"] for m in metrics] == pytest.approx([5e-4, 1e-3, 1e-3, 7.75e-4, 5.5e-4, 3.25e-4])


def test_seconds_per_step_are_those_of_training(train, monkeypatch):
    # a step takes 2 seconds, an evaluation 100: every 2 steps, which 3 is no multiple of
    clock, check_finite, evaluate = [0.0], sft.check_finite, sft.evaluate
    tick = lambda function, seconds: lambda *args: (clock.append(clock[-1] + seconds), function(*args))[1]  # noqa: E731
    monkeypatch.setattr(sft, "time", SimpleNamespace(time=lambda: clock[-1]))
    monkeypatch.setattr(sft, "check_finite", tick(check_finite, 2.0))
    monkeypatch.setattr(sft, "evaluate", tick(evaluate, 100.0))
    metrics, _ = train(eval_every=2, log_every=3)
    assert [m["step"] for m in metrics if "test/loss" in m] == [2, 4, 6]
    assert [(m["step"], m["seconds/step"]) for m in metrics if "seconds/step" in m] == [(3, 2.0), (6, 2.0)]


def test_log_lines_are_means_over_their_steps(train):
    single, _ = train("single", log_every=1, eval_data=None)
    metrics, _ = train("mean", log_every=4, eval_data=None)
    losses = [line["train/loss"] for line in single]
    assert [line["step"] for line in metrics] == [4, 6]
    assert [line["train/loss"] for line in metrics] == pytest.approx(
        [sum(losses[:4]) / 4, sum(losses[4:]) / 2]
    )


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_from_scratch_weights_come_from_the_seed_and_load_again(train, world, tmp_path, name):
    # PITFALLS SYS-8: tied (GPT-2) and untied (Llama) models; the tokenizer's ids are the model's
    model_config(name, eos_token_id=1, bos_token_id=None).save_pretrained(tmp_path / name)
    settings = dict(model=None, model_config=str(tmp_path / name), tokenizer=str(world / "gpt2"))
    settings |= dict(epochs=1, batch_size=19, lr=0.0, eval_data=None)
    _, first = train("first", **settings)
    _, again = train("again", **settings)
    _, other = train("other", **settings, seed=2)
    assert largest_difference(first, again) == 0 and largest_difference(first, other) > 1e-3
    folder = tmp_path / "first/model"
    assert AutoTokenizer.from_pretrained(folder)("ab")["input_ids"] == make_tokenizer()("ab")["input_ids"]
    assert loaded(folder).config.eos_token_id == EOS


def test_an_evaluation_that_fails_loses_no_step(train, monkeypatch, tmp_path):
    # PITFALLS SYS-9: the last evaluation comes behind the last checkpoint, and may be asked for less memory
    # the second time
    metrics, expected = train("whole", epochs=1)
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(sft, "evaluate", lambda *_: (_ for _ in ()).throw(MemoryError))
        train("failed", epochs=1)
    assert [path.name for path in (tmp_path / "failed/checkpoints").iterdir()] == ["step_000003"]
    monkeypatch.setattr(sft, "scheduled_lr", lambda *args: pytest.fail("a step was trained again"))
    again, found = train("failed", epochs=1, forward_batch_size=3)
    assert timeless(again)[:-1] == timeless(metrics)[:-1] and same(found, expected)
    assert timeless(again)[-1] == pytest.approx(timeless(metrics)[-1], rel=1e-5)


def test_a_nan_loss_stops_with_the_step_and_keeps_the_checkpoint(train, monkeypatch, tmp_path):
    token_logprobs, calls = sft.token_logprobs, []

    def broken(*args, **kwargs):
        calls.append(1)  # 3 micro-batches a step, 1 in the steps of 3 rows
        return token_logprobs(*args, **kwargs) * (math.nan if len(calls) > 7 else 1)

    monkeypatch.setattr(sft, "token_logprobs", broken)
    with pytest.raises(FloatingPointError, match=r"step 4: the loss is nan.*checkpoint is kept"):
        train(checkpoint_every=1, eval_data=None)
    checkpoint = tmp_path / "run/checkpoints/step_000003"
    assert [checkpoint] == list(checkpoint.parent.iterdir())
    assert all(torch.isfinite(x).all() for x in weights(checkpoint).values())


# ---------------------------------------------------------------- refusals


REFUSED = [
    (dict(train_data="none.jsonl"), "--train_data none.jsonl"),
    (dict(eval_data="none.jsonl"), "--eval_data none.jsonl"),
    (dict(model=None), "give either --model or --model_config"),
    (dict(model_config="gpt2"), "give either --model or --model_config"),
    (dict(model="none"), "--model none"),
    (dict(tokenizer="none"), "--tokenizer none"),
    (dict(response_field="answer"), "--train_data .*row 1: no column answer; it has"),
    (dict(response_field="number"), "--train_data .*row 1: number must be a text"),
    (dict(batch_size=0), "--batch_size must"),
    (dict(stop_token="<end>"), "--stop_token '<end>'"),
    (dict(stop_token="99999"), "--stop_token.*99999"),
    (dict(query_length=2), "--train_data.*--query_length 2"),
    (
        dict(response_length=1, stop_token="none", eval_data="{}/long.jsonl"),
        "--eval_data.*--response_length 1",
    ),
    (dict(model=None, model_config="{}/small"), "--stop_token.* 10 tokens, not 42"),
    (dict(model=None, model_config="{}/small", stop_token="none"), "--train_data.* 10 tokens, not "),
    (dict(model=None, model_config="{}/short"), "--train_data.* 16 positions, not "),
]


@pytest.mark.parametrize("changes, message", REFUSED, ids=[message for _, message in REFUSED])
def test_bad_settings_are_refused_before_a_model_is_loaded(world, tmp_path, monkeypatch, changes, message):
    # one line that names the field, by --dry_run too; no folder is left behind, so that the corrected command
    # is not refused as another run
    monkeypatch.setattr(sft, "load_causal_lm", None)
    monkeypatch.setattr(transformers, "AutoModelForCausalLM", None)
    for name, sizes in (("small", dict(vocab_size=10)), ("short", dict(n_positions=16))):
        model_config("gpt2", **sizes).save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    write_jsonl(tmp_path / "long.jsonl", [{"prompt": "a", "response": "bb"}])
    changes = {k: v.replace("{}", str(tmp_path)) if isinstance(v, str) else v for k, v in changes.items()}
    for dry_run in (True, False):
        settings = sft_settings(world, tmp_path / "run", **changes, dry_run=dry_run)
        with pytest.raises(SystemExit, match=f"^{message}") as refusal:
            sft.main(sft.Args(**settings))
        assert "\n" not in str(refusal.value) and not (tmp_path / "run").exists()


def test_more_processes_than_rows_in_a_batch_are_refused(world, tmp_path, monkeypatch):
    accelerator = SimpleNamespace(device="cpu", process_index=0, num_processes=4)
    monkeypatch.setattr(sft, "start_accelerator", lambda *_: accelerator)
    with pytest.raises(SystemExit, match="^--batch_size .*4 processes"):
        sft.main(sft.Args(**sft_settings(world, tmp_path / "run", batch_size=3)))


def test_positions_are_counted_from_the_rows_that_are_there(world, tmp_path):
    # whatever the lengths allow
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a" * 27, "response": "b" * 100}])
    changes = dict(train_data=str(rows), response_length=1024, dry_run=True)
    sft.main(sft.Args(**sft_settings(world, tmp_path / "run", **changes)))
    write_jsonl(rows, [{"prompt": "a" * 28, "response": "b" * 100}])
    with pytest.raises(SystemExit, match="^--train_data.* 128 positions, not 129"):
        sft.main(sft.Args(**sft_settings(world, tmp_path / "run", **changes)))


def test_a_dry_run_prints_the_sizes_and_writes_nothing(world, tmp_path, capsys, monkeypatch):
    # PITFALLS AVG-6, TOK-8: rows that are left out are counted
    monkeypatch.setattr(sft, "load_causal_lm", None)
    sft.main(sft.Args(**sft_settings(world, tmp_path / "run", dry_run=True, response_length=5)))
    printed = capsys.readouterr().out
    short = sum(len(row["response"]) < 5 for row in ROWS)
    assert 0 < short < 19 and f"{short} rows ({19 - short} too long: left out), 8 held-out (3)\n" in printed
    assert f"2 x {math.ceil(short / 8)} = {2 * math.ceil(short / 8)} steps of 8 on 1 processes\n" in printed
    assert not (tmp_path / "run").exists()
