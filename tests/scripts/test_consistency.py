"""What must agree across files: pitfalls and tests, README and code, launch scripts and bash."""

import importlib
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import model_config

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


# ---------------------------------------------------------------- README and pages


@pytest.fixture(scope="module")
def readme() -> str:
    return README.read_text("utf-8")


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def table(text: str, *header: str) -> list[list[str]]:
    """Rows of the table whose header starts with these cells."""
    lines = text.splitlines()
    starts = [i for i, line in enumerate(lines) if tuple(cells(line)[: len(header)]) == header]
    assert len(starts) == 1, f"{len(starts)} tables with the columns {header}"
    body = lines[starts[0] + 2 :]
    end = next((i for i, line in enumerate(body) if not line.startswith("|")), len(body))
    return [cells(line) for line in body[:end]]


def test_the_page_of_metrics_lists_what_a_run_logs(readme, run, world, module):
    # both ways: each logged tag is explained, each explained tag is logged; README's ten are among them
    source = "def s(prompts, responses, rows):\n    return [1.0] * len(responses)\n"
    module("page_scores", source)
    scores = dict(actual_score="page_scores:s", eval_prompts=world / "eval.jsonl")
    metrics, _ = run(total_episodes=16, **scores)
    logged = {tag for line in metrics for tag in line} - {"step"}
    pages = [(ROOT / "benchmark/pages/metrics.md").read_text("utf-8"), readme]
    all_tags, ten = (
        {tag for row in table(page, "tag") for tag in re.findall(r"`([a-z]+/[a-z0-9_/*]+)`", row[0])}
        for page in pages
    )
    assert all_tags == logged and ten < all_tags


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_page_of_metrics_names_the_tags_of_sft_and_reward_model(name):
    page = (ROOT / "benchmark/pages/metrics.md").read_text("utf-8")
    tags = re.findall(r'"((?:train|test|seconds)/[a-z_]+)"', (ROOT / f"{name}.py").read_text("utf-8"))
    assert [tag for tag in tags if f"`{tag}`" not in page] == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_readme_line_counts_are_those_of_the_files(readme, name):
    # the reader's part is all above the banner
    rows = {row[0]: row[1:3] for row in table(readme, "file", "reader's part", "whole")}
    text = (ROOT / f"{name}.py").read_text("utf-8")
    reader, banner, _ = text.partition("# " + "-" * 108 + "\n# Plumbing")
    assert banner and rows[f"[`{name}.py`]({name}.py)"] == [str(reader.count("\n")), str(text.count("\n"))]


def test_the_tables_of_the_study_are_those_that_were_made():
    page = (ROOT / "benchmark/study/README.md").read_text("utf-8")
    folder, section = re.search(r"<!-- study: (\S+) -->\n(.*?)<!-- end of study -->", page, re.S).groups()
    rows = [line for line in section.splitlines() if line.startswith("|")]
    made = (ROOT / folder / "tables.md").read_text("utf-8").splitlines()
    assert rows and set(rows) <= set(made)


@pytest.mark.parametrize(
    "page", [README, *sorted((ROOT / "benchmark/pages").glob("*.md"))], ids=lambda page: page.name
)
def test_links_and_pictures_exist(page):
    links = re.findall(r"\]\(([^)#\s]+)\)", page.read_text("utf-8"))
    assert [x for x in links if not x.startswith("http") and not (page.parent / x).exists()] == []


def test_equations_name_functions_that_exist(readme):
    # in a script by its short name, or in a file
    for equation, code, places in table(readme, "paper", "in code", "script"):
        names = [place.strip() for place in places.split(",")]
        names = [x[:-3].replace("/", ".") if x.endswith(".py") else f"{x}_single" for x in names]
        modules = [importlib.import_module(name) for name in names]
        for name in re.findall(r"`([A-Za-z_]\w*)`", code):
            assert any(hasattr(module, name) for module in modules), f"{equation}: {name}"


def commands(page: str) -> list[str]:
    """Command lines of the fenced blocks, continued lines joined."""
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```", page, re.M | re.S)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [part.strip() for line in lines for part in re.split("&&|;", line) if line and line[0] != "#"]


def test_readme_commands_parse(readme):
    # every flag of a command of the three scripts exists and takes its value; every module that is run exists
    scripts, modules = set(), set()
    for command in commands(readme):
        words = shlex.split(command, comments=True) if command.count('"') % 2 == 0 else []
        script = next((word for word in words if re.fullmatch(r"\w+_single\.py", word)), None)
        if script:
            module = importlib.import_module(Path(script).stem)
            flags = words[words.index(script) + 1 :]
            module.check_ranges(module.parse_args(module.Args, flags, getattr(module, "PRESETS", None)))
            scripts.add(script)
        elif "-m" in words and words[words.index("-m") + 1].startswith("benchmark"):
            modules.add(words[words.index("-m") + 1])
    modules |= set(re.findall(r"python -m (benchmark[\w.]*)", readme))
    assert scripts == {f"{name}.py" for name in SCRIPTS} and modules
    assert [name for name in modules if importlib.util.find_spec(name) is None] == []


def test_readmes_lines_of_data_are_rows_of_all_stages(readme, tmp_path, tokenizer):
    # the row it shows is taken by SFT, by the reward model and as a prompt, as its commands name the columns
    row = re.search(r"^`({.*})`$", readme, re.MULTILINE).group(1)
    (tmp_path / "train.jsonl").write_text(row.lower() + "\n")
    path, modules = (
        str(tmp_path / "train.jsonl"),
        [importlib.import_module(f"{name}_single") for name in ("sft", "rm", "pfppo")],
    )
    sft, rm, pf = modules
    args = sft.Args(model="m", train_data=path, response_field="chosen")
    assert sft.encode_examples(tokenizer, args, "train_data", 42)[1] == 0
    config = model_config("gpt2")
    labels, left_out = rm.read_labels(
        "train_data", rm.Args(model="m", train_data=path), tokenizer, config, 42
    )
    assert len(labels) == 1 and left_out == 0
    assert len(pf.read_prompts("prompts", pf.Args(policy="p", reward="r", prompts=path), tokenizer)) == 1


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


def test_readme_is_at_most_170_lines_of_120_columns(readme):
    lines = readme.splitlines()
    assert len(lines) <= 170 and [line for line in lines if len(line) > 120] == []
