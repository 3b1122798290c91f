"""The MBPP recipe: which problems it takes, its prompts, pairs and commands, the whole on a tiny world."""

import json

import numpy as np
import pytest
from conftest import causal_lm, make_tokenizer, write_jsonl
from in_process import run_in_process

from benchmark.recipes import mbpp

PROBLEMS = [
    {
        "task_id": task_id,
        "text": f"add {i}",
        "code": f"import math\r\ndef f{i}(a, b):\r\n  c = a + {i}\r\n  return c",
        "test_list": [f"assert f{i}(1, 2) == {1 + i}"],
        "test_setup_code": "",
    }
    for i, task_id in enumerate([*range(601, 613), *range(511, 518), *range(11, 16)])
]


def test_one_line_programs_are_told_from_others():
    def start(code: str):
        return mbpp.one_line({"code": code})

    assert start("def f(a):\r\n\treturn a") == "def f(a):\n    return"
    assert (
        start("import re\ndef f(a, b = 1):\n  x = a\n  return x") == "import re\ndef f(a, b=1):\n    return"
    )
    assert start("def f(a):\n  x = a\n  y = x\n  return y") is None
    assert start("def f(a):\n  for x in a: print(x)\n  return a") is None
    assert start("def f(a):\n  return a\ndef g(a):\n  return a") is None
    assert start("X = 1\ndef f(a):\n  return a") is None
    assert start("def f(a:\n") is None


@pytest.fixture
def settings(tmp_path):
    """(Args settings) of a tiny Llama with a chat template, and of a file of one-line problems."""
    causal_lm("llama", max_position_embeddings=256).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    problems = write_jsonl(tmp_path / "mbpp.jsonl", PROBLEMS)
    return {"model": str(tmp_path / "model"), "mbpp": str(problems), "output_dir": str(tmp_path / "out")}


def test_the_answer_is_begun_in_the_chat_template(settings):
    args, tokenizer = mbpp.Args(**settings), make_tokenizer()
    splits = mbpp.make_data(args, tokenizer)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 12, "valid": 7, "test": 5}
    row = splits["train"][0]
    assert row["entry_point"] == "f0"
    chat = "add 0\nExample: f0(1, 2) == 1<eos>="
    assert row["prompt"] == chat + "```python\nimport math\ndef f0(a, b):\n    return"
    assert not {r["task_id"] for r in splits["train"]} & {r["task_id"] for r in splits["test"]}


def test_pairs_are_of_one_problem_and_not_repeated():
    rows = [{"task_id": 1, "prompt": "p"}, {"task_id": 2, "prompt": "q"}]
    lines = [{"responses": ["a", "b", "a", "c"], "actual": [1, 0, 1, 0]}, {"responses": ["d"], "actual": [0]}]
    pairs = mbpp.make_pairs(rows, lines, most=8, seed=1)
    assert sorted((p["task_id"], p["chosen"], p["rejected"]) for p in pairs) == [(1, "a", "b"), (1, "a", "c")]
    assert len(mbpp.make_pairs(rows, lines, most=1, seed=1)) == 1


def test_error_of_a_mean_is_over_problems():
    mean, error = mbpp.mean_and_error([[1, 1], [0, 0], [1, 0]])
    assert mean == pytest.approx(0.5)
    assert error == pytest.approx(np.std([1, 0, 0.5], ddof=1) / np.sqrt(3))


def test_dry_run_prints_commands_that_the_scripts_take(settings, capsys, tmp_path):
    mbpp.main(mbpp.Args(**settings, dry_run=True))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("accelerate launch")]
    assert len(lines) == 2 + 3 * 2 * 2  # reward model, R², methods x rewards x seeds
    assert sum("--filter br" in line for line in lines) == 4
    assert not (tmp_path / "out").exists()


def test_small_runs_every_stage_and_goes_on(settings, monkeypatch, tmp_path):
    ran = run_in_process(monkeypatch)
    monkeypatch.setattr(mbpp, "oracle", lambda prompts, texts, rows: [float(len(t) % 2) for t in texts])
    monkeypatch.setattr(mbpp, "RM", {**mbpp.RM, "normalize_samples": 4, "epochs": 1})
    monkeypatch.setattr(mbpp, "PPO", {**mbpp.PPO, "normalize_samples": 10, "noptepochs": 1})
    monkeypatch.setattr(mbpp, "TEXT", {**mbpp.TEXT, "response_length": 6})
    for name in ("SAMPLING", "RM", "PPO"):
        monkeypatch.setitem(getattr(mbpp, name), "response_length", 6)
    mbpp.main(mbpp.Args(**settings, small=True, methods=("br",)))
    assert ran == ["rm", "r2", "tests_br_1", "rm_br_1"]
    out = tmp_path / "out"
    results = json.loads((out / "results.json").read_text())
    assert list(results["runs"]) == ["sft", *ran[2:]]
    entry = results["runs"]["rm_br_1"]
    assert entry["updates"] == 1 and np.isfinite(entry["eval/kl"])
    assert {"greedy_pass1", "greedy_se", "sampled_gain_se", "seconds/train"} <= set(entry)
    assert "rm_br_1" in (out / "results.md").read_text() and (out / "curves.png").is_file()
    assert (out / "samples.md").read_text().count("## MBPP") == 4
    assert not (out / "tests_br_1/checkpoints").exists() and (out / "tests_br_1/policy").is_dir()
    ran.clear()
    monkeypatch.setattr(mbpp, "draw_curves", lambda *_: None)
    mbpp.main(mbpp.Args(**settings, small=True, methods=("br",)))
    assert ran == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mbpp": "nowhere.jsonl"}, "--mbpp nowhere.jsonl"),
        ({"methods": ("best",)}, "--methods best: choose from ppo_m"),
        ({"model": "nowhere"}, "--model nowhere"),
    ],
)
def test_bad_settings_are_refused_in_one_line(settings, changes, message):
    with pytest.raises(SystemExit, match=message):
        mbpp.main(mbpp.Args(**{**settings, **changes}))


def test_a_file_of_another_form_and_one_without_short_problems_are_refused(settings, tmp_path):
    other = write_jsonl(tmp_path / "other.jsonl", [{"prompt": "x"}])
    with pytest.raises(SystemExit, match="other.jsonl, row 1: no column task_id, text, code, test_list"):
        mbpp.main(mbpp.Args(**{**settings, "mbpp": str(other)}))
    long = write_jsonl(tmp_path / "long.jsonl", [{**PROBLEMS[0], "code": "print(1)"}])
    with pytest.raises(SystemExit, match="no one-line problem with task_id 601 to 974"):
        mbpp.main(mbpp.Args(**{**settings, "mbpp": str(long)}))


def test_a_tokenizer_without_template_is_refused(settings, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "bare")
    with pytest.raises(SystemExit, match="its tokenizer has no chat template"):
        mbpp.make_data(mbpp.Args(**settings), tokenizer)


def test_too_few_solved_problems_are_refused(settings, monkeypatch):
    monkeypatch.setattr(mbpp, "oracle", lambda prompts, texts, rows: [0.0] * len(texts))
    monkeypatch.setitem(mbpp.SAMPLING, "response_length", 3)
    with pytest.raises(SystemExit, match="0 train problems are solved sometimes.*raise --samples"):
        mbpp.main(mbpp.Args(**settings, rewards=("tests",), samples=2))
    with pytest.raises(
        SystemExit, match=r"holds another run: samples \(2 there, 3 here\); name a new folder"
    ):
        mbpp.main(mbpp.Args(**settings, rewards=("tests",), samples=3))  # the old samples were taken, unsaid


def test_methods_are_compared_on_the_same_problems_rewards_and_seeds():
    # br against random by hand, two problems: greedy gaps (1, 0) and (0, 1) -> (0.5, 0.5), no error; sampled gaps
    # (0.5, 0) and (0, 0) -> (0.25, 0), mean 0.125, error sqrt(2 * 0.125**2) / sqrt(2)
    def found(greedy, sampled):
        return {"greedy": greedy, "sampled": sampled}

    tests = {
        "tests_br_1": found([1, 0], [[1, 0], [0, 0]]),
        "tests_random_1": found([0, 0], [[0, 0], [0, 0]]),
        "rm_br_1": found([0, 1], [[0, 0], [1, 1]]),
        "rm_random_1": found([0, 0], [[0, 0], [1, 1]]),
        "tests_ppo_m_2": found([1, 1], [[1, 1], [1, 1]]),  # a seed that the others have not run
    }
    both, paid_by_tests, paid_by_rm = mbpp.compare_methods(tests)
    assert (both["ahead"], both["of"], both["paid by"], both["runs"]) == ("br", "random", "tests and rm", 2)
    assert (both["greedy"], both["greedy_se"]) == (0.5, 0)
    assert both["sampled"] == 0.125 and both["sampled_se"] == pytest.approx(0.125)
    assert (paid_by_tests["runs"], paid_by_tests["greedy"], paid_by_rm["greedy"]) == (1, 0.5, 0.5)
    tests["sft"] = found([1, 1], [[1, 1], [1, 1]])  # where all began
    gains = {
        (x["ahead"], x["paid by"]): x["greedy"] for x in mbpp.compare_methods(tests) if x["of"] == "start"
    }
    assert gains["br", "tests and rm"] == -0.5 and gains["ppo_m", "tests"] == 0
