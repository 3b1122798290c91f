"""The shape of the three scripts: each stands alone and is read top to bottom; what they share is
byte-identical."""

import ast
import difflib
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("sft_single.py", "rm_single.py", "pfppo_single.py")
OWN = {"Args", "main", "evaluate", "micro_batches", "response_logprobs"}  # one name, a stage's own rows
RULE = "# " + "-" * 108
OWN_BANNER = f"{RULE}\n# Plumbing of this script alone\n{RULE}\n"
BANNER = f"{RULE}\n# Plumbing: the same in all three scripts; a reader of the paper can stop here\n{RULE}\n"


def text_of(script: str) -> str:
    return (ROOT / script).read_text("utf-8")


@functools.cache
def definitions(text: str) -> dict[str, str]:
    """Name -> source of every top-level function and class, decorators included."""
    lines, found = text.splitlines(), {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            assert node.name not in found, f"{node.name} is defined twice"
            found[node.name] = "\n".join(lines[first - 1 : node.end_lineno])
    return found


def common(plumbing: str) -> str:
    """What stands behind the banner in all three scripts, without what a script adds for itself."""
    return plumbing.partition("\nif __name__")[0].partition(OWN_BANNER)[0]


@pytest.mark.parametrize("script", SCRIPTS)
def test_main_comes_right_behind_args(script):
    # between the two nothing but presets
    body = ast.parse(text_of(script)).body
    names = [
        getattr(node, "name", None) or ast.unparse(node.targets[0])
        for node in body
        if hasattr(node, "name") or isinstance(node, ast.Assign)
    ]
    between = names[names.index("Args") + 1 : names.index("main")]
    assert set(between) <= {"LM_HUMAN_PREFERENCES", "PRESETS"}
    kinds = [type(node) for node in body if getattr(node, "name", None)]
    assert kinds[:2] == [ast.ClassDef, ast.FunctionDef], "Args and main are the first definitions"


@pytest.mark.parametrize("script", SCRIPTS)
def test_there_is_one_banner_and_all_behind_it_is_plumbing(script):
    algorithm, _, plumbing = text_of(script).partition(BANNER)
    assert plumbing and BANNER not in plumbing
    assert "Plumbing" not in algorithm
    others = [text_of(other).partition(BANNER)[0] for other in SCRIPTS]
    for name in definitions(common(plumbing)):
        assert f"\ndef {name}(" not in algorithm and all(f"\ndef {name}(" not in other for other in others)


@pytest.mark.parametrize("script", SCRIPTS[:2])
def test_plumbing_is_one_block(script):
    # up to the guard, which names the presets where there are any
    ours, theirs = (common(text_of(name).partition(BANNER)[2]).rstrip() for name in (script, SCRIPTS[2]))
    assert ours.count("\ndef ") > 15
    assert [line for line in difflib.ndiff(ours.split("\n"), theirs.split("\n")) if line[0] != " "] == []


@pytest.mark.parametrize(
    "one, other", [(SCRIPTS[0], SCRIPTS[1]), (SCRIPTS[0], SCRIPTS[2]), (SCRIPTS[1], SCRIPTS[2])]
)
def test_functions_of_one_name_are_byte_identical(one, other):
    ours, theirs = definitions(text_of(one)), definitions(text_of(other))
    shared = set(ours) & set(theirs) - OWN
    assert len(shared) > 20
    assert [name for name in sorted(shared) if ours[name] != theirs[name]] == []


@functools.cache
def used(text: str) -> set[str]:
    return {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_function_and_class_is_used(script):
    # a copy that nothing calls is noise for the reader; plumbing is used by two scripts at least
    text = text_of(script)
    plumbing = definitions(common(text.partition(BANNER)[2]))
    assert set(definitions(text)) - set(plumbing) <= used(text)
    for name in plumbing:
        assert sum(name in used(text_of(other)) for other in SCRIPTS) > 1, name


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_function_says_what_it_does(script):
    # the top-level ones and the classes; main's chapters say what it does
    for node in ast.parse(text_of(script)).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name not in ("main", "Args"):
            assert ast.get_docstring(node), f"{node.name} has no docstring"


@pytest.mark.parametrize("script", SCRIPTS)
def test_chapters_of_main_are_the_numbers_of_the_docstring(script):
    docstring = ast.get_docstring(ast.parse(text_of(script)))
    numbers = sorted({int(n) for n in re.findall(r"(?:^|   )  ?(\d)\. [a-z]", docstring, re.M)})
    chapters = re.findall(r"# -{16,} (.*)", definitions(text_of(script))["main"])
    found = sorted({int(n) for chapter in chapters for n in re.findall(r"\b(\d)\. ", chapter)})
    assert found == numbers == list(range(1, max(numbers) + 1)) and len(numbers) > 3


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_line_is_exempt_from_the_formatter(script):
    assert not re.search(r"#\s*(fmt|ruff|noqa|yapf|isort)\b", text_of(script))


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_line_is_wider_than_110(script):
    # docstrings and comments too, which the formatter leaves alone
    assert [line for line in text_of(script).split("\n") if len(line) > 110] == []


@pytest.mark.parametrize("command", ["format --check", "check"])
def test_scripts_pass_ruff(command):
    pytest.importorskip("ruff", reason="ruff is part of the extra `test`")
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command.split(), "--no-cache", *SCRIPTS],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_importing_the_scripts_does_nothing(bare, tmp_path):
    # PITFALLS SYS-11: no download, no parsing of flags, no device, no optional or slow dependency
    code = (
        "import sys; sys.argv.append('--no_such_flag')\n"
        "import sft_single, rm_single, pfppo_single, torch\n"
        "from accelerate.state import PartialState\n"
        "assert not PartialState._shared_state and not torch.cuda.is_initialized()\n"
        "bad = {'deepspeed', 'vllm', 'flash_attn', 'bitsandbytes', 'ray', 'matplotlib', 'benchmark',\n"
        "       'datasets', 'tensorboard'} & set(sys.modules)\n"
        "assert not bad, bad\n"
    )
    answer = bare("fork_server", "run_code", code, folder=tmp_path)
    assert (answer["codes"], answer["printed"]) == ([0], [""])
