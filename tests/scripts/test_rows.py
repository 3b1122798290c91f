"""Rows in the forms that people have, and what each script does with them."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import CHAT_TEMPLATE, make_tokenizer, rm_settings, sft_settings, tiny_settings, write_jsonl
from transformers import AutoTokenizer

import pfppo_single as pf
import rm_single as rm
import sft_single as sft

USER, GOOD, BAD = (
    {"role": "user", "content": "two"},
    {"role": "assistant", "content": "good"},
    {"role": "assistant", "content": "bad"},
)


def sft_rows(tmp_path, rows, **changes):
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    args = sft.Args(train_data=str(path), model="none", **changes)
    tokenizer = make_tokenizer()
    examples, left_out = sft.encode_examples(tokenizer, args, "train_data", tokenizer.eos_token_id)
    return [
        (tokenizer.decode(e["query_ids"]), tokenizer.decode(e["response_ids"])) for e in examples
    ], left_out


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "response": "good"},
        {"prompt": [USER], "completion": "good"},
        {"prompt": [USER], "completion": [GOOD]},
        {"messages": [USER, GOOD]},
        {
            "prompt": [{**USER, "content": [{"type": "text", "text": "t"}, {"type": "text", "text": "wo"}]}],
            "response": "good",
        },
    ],
    ids=["response", "completion", "completion messages", "messages", "content as parts"],
)
def test_every_form_of_a_chat_gives_the_same_ids(tmp_path, row):
    assert sft_rows(tmp_path, [row]) == ([("two<eos>=", "good<eos>")], 0)


def test_a_text_prompt_is_read_as_it_is(tmp_path):
    assert sft_rows(tmp_path, [{"prompt": "two", "completion": "good"}]) == ([("two", "good<eos>")], 0)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": "good", "rejected": "bad"},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "two", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    ],
    ids=["texts", "messages", "implicit prompt", "prompt repeated in the conversations"],
)
def test_every_form_of_a_preference_gives_the_same_label(tmp_path, row):
    path, tokenizer = write_jsonl(tmp_path / "pairs.jsonl", [row]), make_tokenizer()
    args = rm.Args(model="none", train_data=str(path))
    config = __import__("conftest").model_config("gpt2")
    (label,), left_out = rm.read_labels("train_data", args, tokenizer, config, tokenizer.eos_token_id)
    assert tokenizer.decode(label["query"]) == "two<eos>=" and left_out == 0 and label["best"] == 0
    assert [tokenizer.decode(sample) for sample in label["samples"]] == ["good<eos>", "bad<eos>"]


def test_conversations_with_other_prompts_are_refused(tmp_path):
    other = {"role": "user", "content": "three"}
    path = write_jsonl(tmp_path / "pairs.jsonl", [{"chosen": [USER, GOOD], "rejected": [other, BAD]}])
    args, tokenizer = rm.Args(model="none", train_data=str(path)), make_tokenizer()
    with pytest.raises(SystemExit, match=r"--train_data .*row 1: .*differ"):
        rm.read_labels("train_data", args, tokenizer, __import__("conftest").model_config("gpt2"), 1)


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def write_folder(path, rows):
    __import__("datasets").Dataset.from_list(rows).save_to_disk(path)


WRITERS = {
    "rows.jsonl": lambda path, rows: path.write_text(
        "\ufeff" + "".join(json.dumps(r) + "\n" for r in rows), "utf-8"
    ),
    "rows.json": lambda path, rows: path.write_text(json.dumps(rows)),
    "rows.csv": write_csv,
    "rows.parquet": lambda path, rows: __import__("datasets").Dataset.from_list(rows).to_parquet(path),
    "folder": write_folder,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name):
    rows = [{"prompt": "two", "response": "None"}, {"prompt": "NA", "response": "bad"}]
    WRITERS[name](tmp_path / name, rows)
    assert sft.load_rows(str(tmp_path / name), "train_data", ("prompt", "response")) == rows


@pytest.mark.parametrize(
    "prompt",
    [[{"role": "user"}], [{"role": "user", "content": 3}], ["two"], 7],
    ids=["no content", "a number", "no message", "no prompt"],
)
def test_a_row_that_the_template_refuses_is_named(prompt):
    rows = [{"prompt": "fine"}, {"prompt": prompt}]
    with pytest.raises(SystemExit, match="--prompts, row 2: prompt"):
        pf.encode_queries(make_tokenizer(), rows, "prompt", 9, "prompts")


def test_a_number_as_a_prompt_is_no_matter_of_templates():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(SystemExit, match="refused by the tokenizer: 'int' object is not iterable"):
        pf.encode_queries(tokenizer, [{"prompt": 7}], "prompt", 9, "prompts")


@pytest.mark.parametrize("script", [sft, rm], ids=lambda module: module.__name__)
def test_half_a_character_in_an_answer_is_refused_with_its_row(script):
    # a text that was cut inside of an emoji, by JavaScript for example; tokenizers raise a TypeError
    with pytest.raises(SystemExit, match="^row 1: chosen has half of a character"):
        script.split_answer({"prompt": "a", "chosen": "ok \ud83d"}, "prompt", "chosen", "row 1")
    row = {"prompt": "a", "chosen": "ok \U0001f600"}
    assert script.split_answer(row, "prompt", "chosen", "row 1") == ("a", row["chosen"])


def test_tools_reach_the_template():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for t in tools or [] %}{{ t['name'] }}{% endfor %}" + CHAT_TEMPLATE
    (row,) = pf.encode_queries(
        tokenizer, [{"prompt": [USER], "tools": [{"name": "add"}]}], "prompt", 99, "prompts"
    )
    assert tokenizer.decode(row["query_ids"]).startswith("add")


class Console:
    def __init__(self):
        self.text = ""

    def print(self, text):
        self.text += text + "\n"


def shown(prompt, template=CHAT_TEMPLATE, stop="<eos>"):
    console, tokenizer = Console(), make_tokenizer()
    tokenizer.chat_template = template
    stop_id = tokenizer.get_vocab()[stop]
    pf.show_first(console, tokenizer, prompt, tokenizer("two")["input_ids"], [stop_id], stop_id)
    return console.text


def test_the_first_row_is_shown_with_its_special_tokens():
    assert "first query: 'two'" in shown([USER]) and "first response: '<eos>'" in shown([USER])


def test_a_template_that_ends_answers_with_another_token_says_so():
    assert "'<eos>'; see --stop_token" in shown([USER], stop="<pad>") and "see --stop_token" not in shown(
        [USER]
    )


def test_texts_for_a_chat_tokenizer_are_mentioned_only_where_it_has_a_template():
    assert "chat template is not applied" in shown("two") and "chat template" not in shown(
        "two", template=None
    )


ROWS = [{"prompt": "a"}, {"prompt": "b"}]


@pytest.mark.parametrize(
    "values",
    [[1, 0], [True, 0.5], np.array([1.0, 2.0]), torch.tensor([1.0, 2.0]), [np.float32(1), torch.tensor(2.0)]],
    ids=["int", "bool", "numpy", "torch", "scalars"],
)
def test_numbers_of_every_kind_are_taken(values):
    found = pf.call_function(lambda prompts, responses, rows: values, ROWS, ["x", "y"], "prompt")
    assert [type(v) for v in found] == [float, float]


@pytest.mark.parametrize(
    "values",
    [None, 3.0, [1.0], np.zeros((2, 1)), ["1", "2"], [None, 1.0]],
    ids=["none", "scalar", "too few", "a column", "texts", "one none"],
)
def test_other_values_are_refused_with_the_flag(values):
    with pytest.raises(SystemExit, match="^--reward .*must return a list of 2 finite numbers"):
        pf.call_function(lambda prompts, responses, rows: values, ROWS, ["x", "y"], "prompt")


# ---------------------------------------------------------------- a chat template of a file

TEMPLATE = "{% for m in messages %}{{ m['role'] }}={{ m['content'] }}\n{% endfor %}"


def bare_model(world, tmp_path, name: str = "gpt2") -> str:
    """A model of the world whose tokenizer has no chat template."""
    shutil.copytree(world / name, tmp_path / name, ignore=shutil.ignore_patterns("chat_template.jinja"))
    assert pf.load_pretrained("AutoTokenizer", str(tmp_path / name), "model").chat_template is None
    return str(tmp_path / name)


def template_file(tmp_path, text: str = TEMPLATE) -> str:
    (tmp_path / "chat.jinja").write_text(text)
    return str(tmp_path / "chat.jinja")


def test_a_template_replaces_the_tokenizers_own(world, tmp_path):
    tokenizer = pf.load_pretrained("AutoTokenizer", str(world / "gpt2"), "model", template_file(tmp_path))
    assert tokenizer.decode(pf.encode_prompt(tokenizer, [USER])) == "user=two\n"


CHATS = dict(query_length=64, response_length=16, micro_batch_size=8)


def test_later_stages_find_the_template_in_the_model(world, tmp_path):
    # SFT saves it; the reward model and PPO then read messages without the flag
    rows = [{"prompt": [USER], "response": "ok", "chosen": "good", "rejected": "bad"}] * 8
    data = str(write_jsonl(tmp_path / "chats.jsonl", rows))
    settings = dict(train_data=data, eval_data=None, epochs=1) | CHATS
    model = dict(model=bare_model(world, tmp_path), chat_template=template_file(tmp_path))
    sft.main(sft.Args(**sft_settings(world, tmp_path / "sft", **settings, **model)))
    trained = str(tmp_path / "sft/model")
    rm.main(rm.Args(**rm_settings(world, tmp_path / "rm", **settings, model=trained)))
    ppo = dict(policy=trained, reward=str(tmp_path / "rm/model"), prompts=data, dry_run=True) | CHATS
    pf.main(pf.Args(**tiny_settings(world, tmp_path / "br") | ppo))
    for folder in (trained, str(tmp_path / "rm/model")):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.decode(pf.encode_prompt(tokenizer, [USER])) == "user=two\n"


def test_pfppo_saves_the_template_with_the_policy(run, world, tmp_path):
    data = write_jsonl(tmp_path / "chats.jsonl", [{"prompt": [USER]}] * 8)
    settings = dict(policy=bare_model(world, tmp_path), chat_template=template_file(tmp_path))
    _, folder = run(**settings, prompts=data, total_episodes=16, **CHATS)
    assert AutoTokenizer.from_pretrained(folder / "policy").chat_template == TEMPLATE


@pytest.mark.parametrize(
    "text, message",
    [
        (None, r"\[Errno 2\] No such file.*; give a Jinja file"),
        ("{% for m in messages %}", "Unexpected end of template.*; give a Jinja file"),
        ("{{ raise_exception('system first') }}", "system first; give a Jinja file"),
        ("", "it renders to nothing; give a Jinja file"),
    ],
    ids=["no file", "no Jinja", "raises", "empty"],
)
def test_a_template_that_does_not_render_is_refused_in_one_line(world, tmp_path, text, message):
    path = str(tmp_path / "none.jinja") if text is None else template_file(tmp_path, text)
    with pytest.raises(SystemExit, match=f"^--chat_template {path}: {message}$"):
        pf.load_pretrained("AutoTokenizer", str(world / "gpt2"), "policy", path)


@pytest.mark.parametrize("script", [sft, rm, pf], ids=lambda module: module.__name__)
def test_messages_without_a_template_are_refused_with_the_flag_to_give(world, tmp_path, script):
    rows = [{"prompt": [USER], "response": "ok", "chosen": "good", "rejected": "bad"}] * 8
    data, model = str(write_jsonl(tmp_path / "chats.jsonl", rows)), bare_model(world, tmp_path)
    settings = {sft: sft_settings, rm: rm_settings, pf: tiny_settings}[script](world, tmp_path / "run")
    settings |= dict(policy=model, prompts=data) if script is pf else dict(model=model, train_data=data)
    message = "row 1: prompt is refused by the tokenizer: it has no chat template; --chat_template FILE of the three"
    with pytest.raises(SystemExit, match=message) as refusal:
        script.main(script.Args(**settings))
    assert "\n" not in str(refusal.value) and not (tmp_path / "run").exists()
