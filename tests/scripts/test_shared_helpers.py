"""The three scripts stand alone: what they share is byte-identical, every field is read and documented,
importing does nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("sft_single.py", "rm_single.py", "pfppo_single.py")
OWN = {"Args", "check_args", "main"}  # each script's own by design


def definitions(script: str) -> dict[str, str]:
    """Name -> source of every top-level function and class, decorators included."""
    lines, found = (ROOT / script).read_text(encoding="utf-8").splitlines(), {}
    for node in ast.parse("\n".join(lines)).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            assert node.name not in found, f"{script} defines {node.name} twice"
            found[node.name] = "\n".join(lines[first - 1 : node.end_lineno])
    return found


@pytest.mark.parametrize(
    "one, other", [(SCRIPTS[0], SCRIPTS[1]), (SCRIPTS[0], SCRIPTS[2]), (SCRIPTS[1], SCRIPTS[2])]
)
def test_helpers_of_one_name_are_byte_identical(one, other):
    ours, theirs = definitions(one), definitions(other)
    shared = set(ours) & set(theirs) - OWN
    assert len(shared) > 15
    assert [name for name in sorted(shared) if ours[name] != theirs[name]] == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_helper_is_used(script):
    # a copy that nothing calls is noise for the reader
    text = (ROOT / script).read_text(encoding="utf-8")
    names = [node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)]
    attributes = [node.attr for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute)]
    entry = {"main"} if script == "sft_single.py" else {"main", "parse_args"}
    assert [name for name in definitions(script) if name not in {*names, *attributes, *entry}] == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_field_is_documented_and_read(script):
    tree = ast.parse((ROOT / script).read_text(encoding="utf-8"))
    body = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args").body
    fields = [node.target.id for node in body if isinstance(node, ast.AnnAssign)]
    for node, after in zip(body, [*body[1:], None]):
        if isinstance(node, ast.AnnAssign):
            text = (
                after.value.value
                if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                else ""
            )
            assert isinstance(text, str) and len(text) > 5, f"{script}: no sentence under {node.target.id}"
    outside = [
        node
        for top in tree.body
        if not (isinstance(top, ast.ClassDef) and top.name == "Args")
        for node in ast.walk(top)
    ]
    read = {
        node.attr
        for node in outside
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in ("args", "limit")
    }
    assert [field for field in fields if field not in read and field != "preset"] == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_presets_name_fields_that_exist(script):
    module = __import__(script.removesuffix(".py"))
    for preset in getattr(module, "PRESETS", {}).values():
        module.Args(**preset)


def test_importing_the_scripts_does_nothing():
    # PITFALLS SYS-11: no download, no parsing of flags, no device, no optional dependency
    code = (
        "import sys; sys.argv.append('--no_such_flag')\n"
        "import sft_single, rm_single, pfppo_single, torch\n"
        "from accelerate.state import PartialState\n"
        "assert not PartialState._shared_state and not torch.cuda.is_initialized()\n"
        "bad = {'deepspeed', 'vllm', 'flash_attn', 'bitsandbytes', 'ray', 'matplotlib', 'benchmark'} & "
        "set(sys.modules)\n"
        "assert not bad, bad\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
