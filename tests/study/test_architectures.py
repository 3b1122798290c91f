"""The sweep over architectures: one that works, one that is refused, and what the table says of them."""

import json

import pytest

from benchmark import records
from benchmark.study import architectures

NAMES = ("llama", "gemma3n_text", "mamba")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(architectures, "LENGTH", 3)
        architectures.main(architectures.Args(output_dir=str(folder), only=NAMES, seconds=60))
    return folder


def test_each_name_has_its_line_and_its_outcome(folder):
    rows = records.read_rows(folder / "architectures.jsonl")
    outcomes = {row["name"]: architectures.outcomes(row) for row in rows}
    assert list(outcomes) == list(NAMES)
    assert [outcome for outcome, _ in outcomes["llama"].values()] == ["works"] * 4
    assert [outcome for outcome, _ in outcomes["gemma3n_text"].values()][:3] == ["works"] * 3
    assert outcomes["mamba"]["policy"][0] == "refused" and "cache" in outcomes["mamba"]["policy"][1]


def test_the_table_has_the_columns_and_counts(folder):
    lines = (folder / "table.md").read_text().splitlines()
    columns = " | ".join(architectures.COLUMNS)
    assert f"| outcome | {columns} |" in lines and f"| architecture | {columns} | why |" in lines
    assert (
        "| wrong without a word | 0 | 0 | 0 | 0 |" in lines and "| refused wrongly | 0 | 0 | 0 | 0 |" in lines
    )
    assert "| llama | works | works | works | works |  |" in lines


def test_what_is_there_is_not_run_again(folder, monkeypatch):
    before = (folder / "architectures.jsonl").read_text()
    monkeypatch.setattr(architectures, "in_child", lambda *_: pytest.fail("ran again"))
    architectures.main(architectures.Args(output_dir=str(folder), only=NAMES))
    assert (folder / "architectures.jsonl").read_text() == before


@pytest.mark.parametrize(
    "check, found, outcome",
    [
        ({}, {"greedy": True, "padded": 1e-6}, "works"),
        ({}, {"greedy": False, "padded": 1e-6}, "wrong without a word"),
        ({}, {"greedy": True, "padded": float("nan")}, "wrong without a word"),
        ({"message": "no"}, {"greedy": True, "padded": 0.5}, "refused"),
        ({"message": "no"}, {"greedy": True, "padded": 1e-6}, "refused wrongly"),
        ({"message": "no\nno", "lines": 2}, {"greedy": False}, "error"),
        ({"error": "KeyError"}, {"greedy": False}, "error"),
        ({}, {"error": "KeyError"}, "error"),
    ],
)
def test_outcomes_are_told_apart(check, found, outcome):
    assert architectures.judged(check, json.loads(json.dumps(found)))[0] == outcome


def test_a_child_that_takes_too_long_ends(monkeypatch):
    monkeypatch.setattr(architectures, "try_architecture", lambda name: [0 for _ in iter(int, 1)])
    args = architectures.Args(output_dir="", seconds=1)
    assert architectures.in_child("llama", args)["build"] == "over 1 s"
