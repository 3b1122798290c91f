"""What must agree across files: pitfalls and tests, README and code, launch scripts and bash."""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tyro

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PITFALLS = ROOT / "tests" / "PITFALLS.md"
LONGER_LIST = (
    ROOT.parent / "shared" / "PITFALLS.md"
)  # the list that the page follows; not part of the repository
SCRIPTS = ("sft_single", "rm_single", "pfppo_single")
SECTIONS = ("TOK", "LP", "GAE", "AVG", "PF", "RM", "BL", "SYS", "EX")


def listed(page: Path) -> list[str]:
    """Ids of a page of pitfalls, in its order."""
    return re.findall(r"^- \*\*([A-Z]+-\d+)\*\*", page.read_text("utf-8"), re.M)


def cited() -> set[str]:
    """Ids cited in comments of the tests: what a line starts or ends with, `PITFALLS TOK-1, TOK-2: ...`
    behind its mark."""
    lines = [
        line for path in (ROOT / "tests").rglob("test_*.py") for line in path.read_text("utf-8").splitlines()
    ]
    return {
        found
        for line in lines
        if "# PITFALLS" in line
        for found in re.findall(rf"\b(?:{'|'.join(SECTIONS)})-\d+\b", line.split("# PITFALLS")[1])
    }


@pytest.mark.parametrize("section", SECTIONS)
def test_every_pitfall_of_the_page_is_tested_by_id(section):
    here = [name for name in listed(PITFALLS) if name.startswith(f"{section}-")]
    assert here == [f"{section}-{i}" for i in range(1, len(here) + 1)] and here
    assert [name for name in here if name not in cited()] == []


def test_tests_cite_only_pitfalls_of_the_page():
    assert cited() - set(listed(PITFALLS)) == set()


def test_the_page_has_every_pitfall_of_the_longer_list():
    if not LONGER_LIST.is_file():
        pytest.skip("the longer list of pitfalls is not beside this checkout")
    assert listed(PITFALLS) == listed(LONGER_LIST)


# ---------------------------------------------------------------- README


@pytest.fixture(scope="module")
def readme() -> str:
    if not README.is_file():
        pytest.skip("README.md is not written yet")
    return README.read_text("utf-8")


def table_under(readme: str, *first_row: str) -> list[list[str]]:
    """Cells of the table whose header starts with these cells."""
    lines = readme.splitlines()
    start = next(
        (
            i
            for i, line in enumerate(lines)
            if [c.strip() for c in line.strip("|").split("|")][: len(first_row)] == list(first_row)
        ),
        None,
    )
    assert start is not None, f"README.md has no table with the columns {first_row}"
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def test_readme_lists_the_metrics_that_a_run_logs(readme, run, world, module):
    # both ways: each logged tag is explained, each explained tag is logged
    module(
        "readme_scores",
        "def s(prompts, responses, rows):\n    return [1.0] * len(responses)\ndef m(responses):\n    return "
        "{'x': 0.5}\n",
    )
    metrics, _ = run(
        eval_prompts=world / "eval.jsonl",
        actual_score="readme_scores:s",
        monitor="readme_scores:m",
        total_episodes=16,
    )
    logged = {re.sub("monitor/.*", "monitor/*", tag) for line in metrics for tag in line} - {"step"}
    listed = {
        tag for row in table_under(readme, "tag") for tag in re.findall(r"`([a-z]+/[a-z0-9_/*]+)`", row[0])
    }
    other_scripts = "".join((ROOT / f"{name}.py").read_text("utf-8") for name in SCRIPTS[:2])
    assert logged - listed == set()
    assert {tag for tag in listed - logged if f'"{tag}"' not in other_scripts} == set()


def test_readme_line_counts_are_those_of_the_files(readme):
    for name, lines, *_ in table_under(readme, "file", "lines"):
        script = re.search(r"\w+_single\.py", name)
        if script and "@" in lines:
            pytest.skip("README.md still has placeholders")
        if script:
            assert int(lines) == len((ROOT / script.group()).read_text("utf-8").splitlines()), script.group()


def test_readme_tables_of_the_study_are_those_that_were_made(readme):
    folder, section = re.search(r"<!-- study: (\S+) -->\n(.*?)<!-- end of study -->", readme, re.S).groups()
    rows = [line for line in section.splitlines() if line.startswith("|")]
    made = (ROOT / folder / "tables.md").read_text("utf-8").splitlines()
    assert rows and set(rows) <= set(made)


def test_readme_links_and_pictures_exist(readme):
    links = re.findall(r"\]\(([^)#]+)\)", readme)
    assert [link for link in links if not link.startswith("http") and not (ROOT / link).exists()] == []


def test_readme_equations_name_functions_that_exist(readme):
    for equation, code, scripts in table_under(readme, "paper", "in code", "script"):
        modules = [importlib.import_module(f"{name.strip()}_single") for name in scripts.split(",")]
        for name in re.findall(r"`([A-Za-z_][\w.]*)`", code):
            owner, _, attribute = name.partition(".")
            assert any(
                hasattr(getattr(m, owner, None), attribute) if attribute else hasattr(m, owner)
                for m in modules
            ), f"{equation}: {name}"


def readme_commands(readme: str) -> list[str]:
    """Command lines of the fenced blocks, continued lines joined."""
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```", readme, re.M | re.S)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [part.strip() for line in lines for part in line.split("&&") if line and not line.startswith("#")]


def test_readme_commands_parse(readme):
    # every flag of a command of the three scripts exists and takes its value; every module and file that is
    # run exists
    checked = 0
    for command in readme_commands(readme):
        words = shlex.split(command, comments=True)
        script = next((word for word in words if re.fullmatch(r"(.*/)?\w+_single\.py", word)), None)
        if script:
            module, flags = importlib.import_module(Path(script).stem), words[words.index(script) + 1 :]
            module.parse_args(flags) if hasattr(module, "parse_args") else tyro.cli(module.Args, args=flags)
            checked += 1
        elif "-m" in words and words[words.index("-m") + 1].startswith("benchmark"):
            place = ROOT / words[words.index("-m") + 1].replace(".", "/")
            assert place.with_name(place.name + ".py").is_file() or (place / "__main__.py").is_file(), command
            checked += 1
        for word in words:
            if re.fullmatch(r"(benchmark|tests)/[\w/]+\.(py|sh)", word):
                assert (ROOT / word).is_file(), command
    assert checked >= 3


# ---------------------------------------------------------------- launch scripts


def test_launch_scripts_pass_bash():
    # PITFALLS SYS-12: valid syntax, and no comment or blank behind a trailing backslash, which would cut the
    # command
    scripts = sorted((ROOT / "benchmark").rglob("*.sh"))
    if not scripts:
        pytest.skip("no launch script yet")
    for script in scripts:
        done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert not re.search(r"\\[ \t]+(#.*)?$|\\\n\s*#", script.read_text("utf-8"), re.M), script


# ---------------------------------------------------------------- ruff


@pytest.mark.parametrize("command", ["format --check", "check"])
def test_benchmark_and_tests_pass_ruff(command):
    pytest.importorskip("ruff", reason="ruff is part of the extra `test`")
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command.split(), "--no-cache", "benchmark", "tests"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
