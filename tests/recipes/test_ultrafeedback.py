"""The UltraFeedback recipe: what is left out and counted, pairs, splits, forms of a prompt, the chain."""

import json
import re
import sys
import types

import pytest
from conftest import causal_lm, make_tokenizer, write_jsonl
from in_process import run_in_process

from benchmark.recipes import ultrafeedback as uf


def completion(response, score):
    return {"response": response, "overall_score": score}


def english(text: str) -> bool:
    return not text.startswith("le ")


def test_what_is_left_out_is_counted():
    rows = [
        {"instruction": "One", "completions": [completion("a", 1), completion(" ", 2), completion(None, 2)]},
        {"instruction": " one ", "completions": [completion("b", 1)]},
        {"instruction": "le chat", "completions": [completion("c", 1)]},
        {"instruction": "two", "completions": [completion("le d", 1), completion("e", "N/A")]},
        {"instruction": "", "completions": [completion("f", 1)]},
        {"instruction": "three", "completions": [completion("le g", 1)]},
    ]
    prompts, counts = uf.clean(rows, english, 2, "x")
    assert [(p["instruction"], p["completions"]) for p in prompts] == [
        ("One", [("a", 1.0)]),
        ("two", [("e", None)]),
    ]
    assert counts == {
        "empty completions": 2,
        "rows that repeat an instruction": 1,
        "rows not in English": 1,
        "completions not in English": 2,
        "completions without score": 1,
        "rows without instruction": 1,
        "rows without any completion left": 1,
    }


@pytest.mark.parametrize(
    ("scores", "how", "least", "pairs", "why"),
    [
        ((1, 9, 5), "best_worst", 2, ["91"], ""),
        ((1, 9, 5), "all", 2, ["95", "91", "51"], ""),
        ((1, 9, 5), "all", 5, ["91"], ""),
        ((4, 5), "best_worst", 2, [], "prompts whose scores differ by less than 2"),
        ((4, 4, 4), "all", 0, [], "prompts whose completions tie"),
        ((4, None), "all", 2, [], "prompts with fewer than two scored completions"),
        ((4, 4, 2), "all", 0, ["42", "42"], ""),
    ],
)
def test_pairs_of_a_prompt(scores, how, least, pairs, why):
    prompt = {"completions": [(str(score), score) for score in scores]}
    found, reason = uf.pairs_of(prompt, how, least)
    assert ["".join(pair) for pair in found] == pairs and reason == why


def make_prompts(count: int) -> list[dict]:
    return [{"instruction": f"i{n}", "source": "ab"[n % 2], "completions": []} for n in range(count)]


def test_splits_share_no_prompt_and_divide_every_source_alike():
    splits = uf.split_prompts(make_prompts(200), uf.Args(data="x"))
    sizes = {name: len(part) for name, part in splits.items()}
    assert sizes == dict(sft_valid=4, sft_train=16, rm_valid=4, rm_train=16, rl_valid=32, rl_train=128)
    everything = [p["instruction"] for part in splits.values() for p in part]
    assert len(set(everything)) == 200
    for part in splits.values():
        assert sum(p["source"] == "a" for p in part) * 2 == len(part)


def test_a_prompt_is_a_turn_or_stands_between_tags():
    tokenizer = make_tokenizer()
    assert uf.as_prompt("go", uf.Args(data="x"), tokenizer) == [{"role": "user", "content": "go"}]
    tags = "<instruction>go</instruction><response>"
    assert uf.as_prompt("go", uf.Args(data="x", form="tags"), tokenizer) == tags
    tokenizer.chat_template = None
    assert uf.as_prompt("go", uf.Args(data="x"), tokenizer) == tags


@pytest.fixture
def settings(tmp_path):
    """A tiny GPT-2 without chat template, 60 rows with three scored completions, a langdetect of our own."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    causal_lm("gpt2").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [
        {
            "instruction": f"do {i}",
            "source": "x",
            "completions": [completion("abc", i % 9), completion("xy", 9), completion("z" * (i % 4), 0)],
        }
        for i in range(60)
    ]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    out = str(tmp_path / "out")
    return {"data": str(data), "model": str(tmp_path / "model"), "output_dir": out, "english": False}


def test_small_runs_the_whole_chain_and_goes_on(settings, tmp_path, monkeypatch):
    ran = run_in_process(monkeypatch)
    monkeypatch.setattr(uf, "TAGS", ("", "="))  # the tags are longer than a tiny model's queries
    shares = {"sft_share": 0.3, "rm_share": 0.3}
    uf.main(uf.Args(**settings, **shares, small=True))
    assert ran == ["sft", "rm", "br", "dpo"]
    found = json.loads((tmp_path / "out/results.json").read_text())["policies"]
    assert list(found) == ["sft", "br", "dpo"]
    assert found["sft"]["win_rate"] == 0.5 and found["sft"]["kl"] == 0.0
    assert 0 <= found["br"]["win_rate"] <= 1 and found["br"]["kl"] != 0.0
    assert not list((tmp_path / "out").glob("*/checkpoints"))
    assert "win rate against SFT" in (tmp_path / "out/results.md").read_text()
    assert (tmp_path / "out/samples.md").read_text().count("---") == 5
    ran.clear()
    uf.main(uf.Args(**settings, **shares, small=True))
    assert ran == []


def test_published_settings_reach_the_commands(settings, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "langdetect", None)
    uf.main(uf.Args(**settings, dry_run=True, query_length=64, response_length=64, sft_share=0.4))
    out = capsys.readouterr().out
    sft, rm, br, dpo = [line for line in out.splitlines() if line.startswith("accelerate launch")]
    assert "--epochs 5 --batch_size 16 --lr 2e-05" in sft and "--warmup_steps 2 " in sft
    assert "--epochs 3 --batch_size 16 --lr 1e-05" in rm
    assert "--batch_size 16 --noptepochs 3 --lr 1e-05" in br and "--kl_coef 0.2 --lam 0.9" in br
    assert "--total_episodes 80 " in br  # 24 prompts: one update of 16 x 5
    assert "--epochs 1 --batch_size 16 --lr 1e-05" in dpo and "--beta 0.1" in dpo
    assert "prompts whose completions tie" not in out and "24 ppo_train" in out
    with pytest.raises(SystemExit, match=r"holds another run: limit \(0 there, 30 here\)"):
        uf.main(
            uf.Args(**settings, dry_run=True, query_length=64, response_length=64, sft_share=0.4, limit=30)
        )


def test_english_needs_a_package_and_says_so(settings, monkeypatch):
    monkeypatch.setitem(sys.modules, "langdetect", None)
    with pytest.raises(
        SystemExit, match=r"^--english needs a package: pip install -e '.\[recipes\]'; or give --no-english$"
    ):
        uf.main(uf.Args(**{**settings, "english": True}))


def test_the_detector_is_seeded_and_takes_signs_for_no_english(monkeypatch):
    class LangDetectException(Exception):
        pass

    def detect(text):
        if text == "12":
            raise LangDetectException
        return "en" if "the" in text else "fr"

    factory = types.SimpleNamespace(seed=None)
    fake = types.SimpleNamespace(
        detect=detect, DetectorFactory=factory, LangDetectException=LangDetectException
    )
    monkeypatch.setitem(sys.modules, "langdetect", fake)
    is_english = uf.english_detector()
    assert factory.seed == 0
    assert [is_english(text) for text in ("the cat", "le chat", "12")] == [True, False, False]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "x"}], "rows.jsonl, row 1: no text in a column `instruction`"),
        (
            [{"instruction": "x"}],
            "row 1: needs `completions`, or `chosen` and `rejected`; it has instruction",
        ),
        ([{"instruction": "x", "completions": ["y"]}], "row 1: a completion is no object with `response`"),
        ([{"instruction": "", "completions": []}], "no row is left; see the counts above"),
        ([{"instruction": "x", "chosen": "a", "rejected": "b"}], "nothing is left for sft_"),
    ],
)
def test_files_of_another_form_are_refused_in_one_line(rows, message, settings, tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(SystemExit, match=message):
        uf.main(uf.Args(**settings))


def test_chat_needs_a_template_which_a_file_can_give(settings, tmp_path, capsys):
    with pytest.raises(SystemExit, match="has no chat template; give --chat_template FILE, or --form tags"):
        uf.main(uf.Args(**settings, form="chat"))
    with pytest.raises(SystemExit, match="--chat_template nowhere.jinja: .*No such file"):
        uf.main(uf.Args(**settings, chat_template="nowhere.jinja"))
    file = tmp_path / "template.jinja"
    file.write_text("{% for m in messages %}{{ m['content'] }}={% endfor %}")
    uf.main(uf.Args(**settings, chat_template=str(file), dry_run=True, query_length=64, response_length=64))
    printed = capsys.readouterr().out
    assert re.findall(r"(\w+)_single.py[^\n]*--chat_template (\S+)", printed) == [("sft", str(file))]
    row = json.loads((tmp_path / "out/data/ppo_train.jsonl").read_text().splitlines()[0])
    assert row["prompt"][0]["role"] == "user"


def test_shares_that_leave_nothing_are_refused(settings):
    with pytest.raises(SystemExit, match="leave nothing for PPO and DPO"):
        uf.main(uf.Args(**settings, sft_share=0.5, rm_share=0.5))
