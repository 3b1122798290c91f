"""The index of the results: every folder has its row, and what took the place of an old name exists."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmark" / "results"
INDEX = (RESULTS / "README.md").read_text("utf-8")


def test_every_folder_has_one_row_in_the_index():
    rows = re.findall(r"^\| \[([^]]+)\]\(([^)]+)\) \|", INDEX, re.M)
    assert all(name == link for name, link in rows)
    assert sorted(name for name, _ in rows) == sorted(
        path.name for path in RESULTS.iterdir() if path.is_dir()
    )


def test_new_names_exist():
    table = INDEX.partition("| then | now |")[2]
    new = re.findall(
        r"`([^`]+)`", " ".join(row.split("|")[2] for row in table.splitlines() if row.count("|") == 3)
    )
    assert len(new) > 10
    for name in new:
        place = ROOT / (name if "/" in name else name.split(":")[0].replace(".", "/") + ".py")
        assert place.exists(), name
