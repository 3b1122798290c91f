"""Flags: every field is read, documented, checked and shown; presets; required fields."""

import ast
import dataclasses
import importlib
import inspect
import math
import re
import typing

import pytest

import pfppo_single as pf
import rm_single as rm
import sft_single as sft

SCRIPTS = {"sft_single": sft, "rm_single": rm, "pfppo_single": pf}
REQUIRED = {
    "sft_single": dict(model="m", train_data="rows.jsonl"),
    "rm_single": dict(model="m", train_data="rows.jsonl"),
    "pfppo_single": dict(policy="p", reward="r", prompts="rows.jsonl"),
}


def parse(name: str, *flags: str, required: bool = True):
    """The Args of a command line, the required fields filled in."""
    first = [text for field, value in REQUIRED[name].items() for text in (f"--{field}", value)]
    script = SCRIPTS[name]
    return script.parse_args(script.Args, [*first * required, *flags], getattr(script, "PRESETS", None))


def class_body(name: str) -> list[ast.stmt]:
    tree = ast.parse(inspect.getsource(SCRIPTS[name]))
    return next(node for node in tree.body if getattr(node, "name", None) == "Args").body


# ---------------------------------------------------------------- documented, read


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_field_has_a_sentence(name):
    body = class_body(name)
    for node, behind in zip(body, [*body[1:], None]):
        if isinstance(node, ast.AnnAssign):
            text = behind.value.value if isinstance(behind, ast.Expr) else ""
            assert len(text) > 6, f"no sentence under {node.target.id}"


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_field_belongs_to_a_group(name):
    # a comment line opens a group; no group is empty or named twice
    lines = inspect.getsource(SCRIPTS[name].Args).split("\n")
    lines = [line for line in lines if re.match(r"    (# .+|\w+: .+)$", line)]
    groups = [line for line in lines if line.startswith("    #")]
    assert lines[0] == "    # run" and len(groups) == len(set(groups)) > 3
    for group in groups:
        assert not lines[(lines.index(group) + 1) % len(lines)].startswith("    #")


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_field_is_read(name):
    # outside Args, as args.field or by its name in a text, as `getattr(args, field)` takes it; `preset` is
    # read by parse_args
    tree = ast.parse(inspect.getsource(SCRIPTS[name]))
    outside = [node for top in tree.body if getattr(top, "name", None) != "Args" for node in ast.walk(top)]
    read = {
        node.attr for node in outside if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "args"
    }
    read |= {node.value for node in outside if isinstance(node, ast.Constant)} | {"preset"}
    assert [field.name for field in dataclasses.fields(SCRIPTS[name].Args) if field.name not in read] == []


# ---------------------------------------------------------------- parsing


@pytest.mark.parametrize("name", SCRIPTS)
def test_flags_that_are_not_given_keep_their_defaults(name):
    assert parse(name) == SCRIPTS[name].Args(**REQUIRED[name])


@pytest.mark.parametrize(
    "name, field", [(n, f) for n in SCRIPTS for f in REQUIRED[n] if (n, f) != ("sft_single", "model")]
)
def test_a_missing_required_field_is_named(name, field, capsys):
    # SFT asks for a model or a configuration, main refuses neither
    flags = [x for key, value in REQUIRED[name].items() if key != field for x in (f"--{key}", value)]
    with pytest.raises(SystemExit) as refusal:
        parse(name, *flags, required=False)
    assert refusal.value.code == 2 and f"--{field}" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["rm_single", "pfppo_single"])
@pytest.mark.parametrize("preset", ["pfppo", "lm_human_preferences"])
def test_presets_are_flags_of_the_script(name, preset):
    # each is taken, and gives values that are in range
    args = parse(name, f"--preset={preset}")
    SCRIPTS[name].check_ranges(args)
    assert args.preset == preset
    assert (args == SCRIPTS[name].Args(**REQUIRED[name])) == (preset == "pfppo")


def test_flags_win_over_the_preset_wherever_they_stand():
    # numbers, choices, switches in both directions, tuples
    flags = "--lr 0.5 --critic separate --reshuffle --no-whiten_rewards --rank_weights 0.5 0 0.5".split()
    before = parse("pfppo_single", *flags, "--preset", "lm_human_preferences")
    behind = parse("pfppo_single", "--preset=lm_human_preferences", *flags)
    assert before == behind and behind.preset == "lm_human_preferences"
    assert (behind.lr, behind.critic, behind.reshuffle, behind.whiten_rewards) == (
        0.5,
        "separate",
        True,
        False,
    )
    assert behind.rank_weights == (0.5, 0, 0.5) and behind.temperature == 0.7


def test_a_preset_can_be_switched_off_field_by_field():
    args = parse("pfppo_single", "--preset", "lm_human_preferences", "--missing_stop_score", "None")
    assert args.missing_stop_score is None


@pytest.mark.parametrize(
    "name, flags, message",
    [
        ("pfppo_single", ["--filter", "best"], "--filter"),
        ("pfppo_single", ["--preset", "other"], "--preset"),
        ("rm_single", ["--preset=other"], "--preset"),
        ("sft_single", ["--lr", "fast"], "--lr"),
        ("rm_single", ["--batch_size", "1.5"], "--batch_size"),
        ("sft_single", ["--no_such_flag", "1"], "--no_such_flag"),
    ],
)
def test_unknown_flags_and_values_are_refused(name, flags, message, capsys):
    with pytest.raises(SystemExit):
        parse(name, *flags)
    assert message in capsys.readouterr().err


# ---------------------------------------------------------------- ranges


def numeric_fields():
    """(script, field, least, a value in range) of every field that holds a number or a tuple of numbers."""
    for name, script in SCRIPTS.items():
        for field in dataclasses.fields(script.Args):
            kinds = typing.get_args(field.type) or (field.type,)
            if bool in kinds or not {int, float} & set(kinds):
                continue
            least = getattr(field.type, "__metadata__", (None,))[0]
            yield pytest.param(name, field.name, least, id=f"{name[:-7]}-{field.name}")


NUMBERS = list(numeric_fields())


def with_value(name: str, field: str, number: float):
    """Args with a number in a field, or twice where the field is a tuple."""
    tuples = (
        typing.get_origin({f.name: f.type for f in dataclasses.fields(SCRIPTS[name].Args)}[field]) is tuple
    )
    return SCRIPTS[name].Args(**{**REQUIRED[name], field: (number, number) if tuples else number})


@pytest.mark.parametrize("name, field, least", NUMBERS)
def test_a_number_that_is_not_finite_is_refused_by_name(name, field, least):
    # NaN compares with nothing, so `x < 0` alone would let it through
    for number in (math.nan, math.inf, -math.inf):
        with pytest.raises(SystemExit, match=f"^--{field} must"):
            SCRIPTS[name].check_ranges(with_value(name, field, number))


@pytest.mark.parametrize("name, field, least", [x for x in NUMBERS if x.values[2] is not None])
def test_a_number_below_the_least_is_refused_by_name(name, field, least):
    with pytest.raises(SystemExit, match=f"^--{field} must"):
        SCRIPTS[name].check_ranges(with_value(name, field, least - 1))
    SCRIPTS[name].check_ranges(with_value(name, field, least))


def test_numbers_without_a_least_value_are_few():
    # what a new field gets by forgetting its range
    free = {param.values[1] for param in NUMBERS if param.values[2] is None}
    assert free == {"missing_stop_score", "rank_weights", "thresholds"}


@pytest.mark.parametrize("field", ["final_lr_fraction", "gamma", "lam"])
def test_a_share_above_one_is_refused(field):
    name = "pfppo_single" if field != "final_lr_fraction" else "sft_single"
    with pytest.raises(SystemExit, match=f"^--{field} must lie between 0 and 1, not at 1.5"):
        SCRIPTS[name].check_ranges(with_value(name, field, 1.5))


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_seed_that_numpy_does_not_take_is_refused(name):
    # such as one from a clock
    with pytest.raises(SystemExit, match="^--seed must lie between 0 and 2147483648, not at 17"):
        SCRIPTS[name].check_ranges(with_value(name, "seed", 1764201600000000000))


@pytest.mark.parametrize("field", ["temperature", "eps", "cliprange", "cliprange_value"])
def test_what_is_divided_by_is_not_zero(field):
    with pytest.raises(SystemExit, match=f"^--{field} must"):
        pf.check_ranges(with_value("pfppo_single", field, 0.0))


# ---------------------------------------------------------------- as a command


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_shows_commands_groups_and_every_field(name, forks, tmp_path):
    answer = forks("fork_server", "run_command", [f"{name}.py", "--help"], folder=tmp_path / name)
    (printed,) = answer["printed"]
    assert answer["codes"] == [0] and f"accelerate launch --cpu --num_processes 1 {name}.py --" in printed
    source = inspect.getsource(SCRIPTS[name].Args)
    fields = [field.name for field in dataclasses.fields(SCRIPTS[name].Args)]
    assert re.findall(r"^  --(\w+) \S", printed, re.M) == fields
    for field in fields:
        sentence = re.search(rf'    {field}: .*\n    """(.+)', source)[1].removesuffix('"""')
        assert f"\n    {sentence}\n" in printed, field
    groups = re.findall(r"^    (# .+)$", source, re.M)
    assert [line.strip() for line in printed.split("\n") if line.strip().startswith("# ")] == groups
    assert '"""' not in printed


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_user_error_is_one_line_and_status_1(name, forks, tmp_path):
    flags = [x for key, value in REQUIRED[name].items() for x in (f"--{key}", value)]
    answer = forks("fork_server", "run_command", [f"{name}.py", *flags, "--batch_size", "0"], folder=tmp_path)
    assert answer["codes"] == [1]
    assert answer["printed"][0].splitlines() == ["--batch_size must lie between 1 and inf, not at 0"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_importing_args_needs_no_flags(name):
    # other programs build Args by keyword, required fields included
    with pytest.raises(TypeError, match="required keyword-only"):
        importlib.import_module(name).Args()


REFUSED = {
    "sft_single": "--train_data x --model x --model_config y",
    "rm_single": "--train_data x --model x --lr nan",
    "pfppo_single": "--policy x --reward a:b --prompts x --minibatch_size 7",
}


@pytest.mark.parametrize("script", REFUSED)
def test_settings_are_refused_before_transformers_is_imported(script, bare, tmp_path):
    # it takes as long as torch itself, and a user who mistyped a flag waits for it
    code = f"""
        import sys
        import {script} as script
        try:
            script.main(script.parse_args(script.Args, {REFUSED[script].split()}))
        except SystemExit as refusal:
            print(refusal.code, "transformers" in sys.modules)
    """
    (printed,) = bare("fork_server", "run_code", code, folder=tmp_path)["printed"]
    assert printed.startswith(("--", "give")) and printed.endswith(" False\n")
