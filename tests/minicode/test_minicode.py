"""The embedded world: what it holds, that its verdicts are earned, and that it is written whole or not at
all."""

import json
import multiprocessing
import os
import signal
import sys
import time
import types

import pytest

from benchmark.minicode import (
    World,
    __main__,
    build_pairs,
    grade,
    grade_fast,
    make_rows,
    oracle,
    problems,
    world,
    write_world,
)
from benchmark.minicode.grade import is_plain
from benchmark.minicode.operations import OPERATIONS, SCALAR_OPERATIONS
from benchmark.minicode.pairs import edit_distance
from benchmark.minicode.problems import split_of

SPLITS = ("sft", "preference", "rl", "valid", "test")
SMALL = dict(num_sft=400, num_sft_valid=30, num_preference=150, num_rl=150, num_valid=60, num_test=60)


@pytest.fixture(scope="module")
def world_dir(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("minicode") / "world", seed=3, **SMALL)


@pytest.fixture(scope="module")
def splits(world_dir):
    names = SPLITS + ("sft_valid",)
    texts = {name: (world_dir / f"{name}.jsonl").read_text() for name in names}
    return {name: [json.loads(line) for line in text.splitlines()] for name, text in texts.items()}


def problem(inputs, outputs, task_id="t"):
    """A row of the world with tests of our own."""
    tests = "\n".join(f"assert repr(f({x!r})) == {repr(y)!r}" for x, y in zip(inputs, outputs))
    row = {"task_id": task_id, "prompt": "def f(x):\n", "entry_point": "f", "tests": tests}
    return {**row, "inputs": inputs, "outputs": outputs}


def verdicts(bodies, row, stats=None):
    return grade_fast([row["prompt"]] * len(bodies), bodies, [row] * len(bodies), stats)


# ---------------------------------------------------------------- the table


def test_table_has_44_operations_with_phrasings_implementations_and_mistakes():
    assert len(OPERATIONS) == 44 and len(SCALAR_OPERATIONS) == 7
    phrasings = [text for op in OPERATIONS.values() for text in op.phrasings]
    assert len(phrasings) == len(set(phrasings)) >= 90
    for op in OPERATIONS.values():
        assert len(op.phrasings) >= 2 and 2 <= len(op.correct) <= 3 and 1 <= len(op.wrong) <= 3
        assert ("{k}" in op.phrasings[0]) == (len(op.constants) > 1), op.name


def test_correct_implementations_agree_on_hand_picked_lists():
    lists = [[], [0], [5], [-3, -3], [4, 4, 0, -4], [3, 1, 2, 3, 6, 5, 1], list(range(-9, 13)), [12, 10, 8]]
    for op in OPERATIONS.values():
        for k in op.constants:
            for values in lists:
                answers = {repr(problems._function(text.format(k=k))(list(values))) for text in op.correct}
                assert len(answers) == 1, (op.name, k, values, answers)


@pytest.mark.parametrize(
    "name, k, values, expected",
    [
        ("above", 3, [3, 4, 2], [4]),
        ("at_most", 3, [3, 4, 2], [3, 2]),
        ("multiples", 3, [6, -3, 4], [6, -3]),
        ("floor", 2, [1, 3], [2, 3]),
        ("cap", 2, [1, 3], [1, 2]),
        ("modulo", 3, [-1, 4], [2, 1]),
        ("divide", 2, [-3, 5], [-2, 2]),
        ("by_size", 0, [-3, 1, 2], [1, 2, -3]),
        ("last", 2, [1, 2, 3], [2, 3]),
        ("skip_last", 2, [1], []),
        ("odd_places", 0, [7, 8, 9], [8]),
        ("unique", 0, [2, 1, 2], [2, 1]),
        ("running", 0, [1, 2, 3], [1, 3, 6]),
        ("differences", 0, [1, 4, 2], [3, -2]),
        ("rotate", 0, [1, 2, 3], [2, 3, 1]),
        ("largest", 0, [], 0),
        ("count_above", 1, [1, 2, 3], 2),
        ("any_above", 2, [3], True),
        ("distinct", 0, [1, 1, 2], 2),
    ],
)
def test_reference_by_hand(name, k, values, expected):
    assert repr(problems._function(OPERATIONS[name].correct[0].format(k=k))(values)) == repr(expected)


# ---------------------------------------------------------------- the splits


def test_no_composition_is_in_two_splits(splits):
    found = {name: {tuple(row["operations"]) for row in splits[name]} for name in SPLITS}
    for i, first in enumerate(SPLITS):
        for second in SPLITS[i + 1 :]:
            assert not found[first] & found[second], (first, second)


def test_split_depends_on_the_composition_alone():
    rows = make_rows(World(seed=11, num_valid=40), "valid") + make_rows(World(seed=12, num_valid=40), "valid")
    assert {split_of(row["operations"]) for row in rows} == {"valid"}
    assert {split_of([name]) for name in OPERATIONS} == {"sft"}


def test_split_shares():
    names = list(OPERATIONS)
    pairs = [split_of((a, b)) for a in names for b in names]
    for split, share in problems.SHARES.items():
        assert abs(pairs.count(split) / len(pairs) - share) < 0.04  # 4 standard errors of 1936 draws


def test_problem_lengths_and_scalars_last(splits):
    scalar = {op.name for op in SCALAR_OPERATIONS}
    for name, rows in splits.items():
        lengths = {len(row["operations"]) for row in rows}
        assert lengths == ({1, 2, 3} if name.startswith("sft") else {2, 3})
        assert not any(scalar & set(row["operations"][:-1]) for row in rows)


def test_rows_have_8_tests_with_one_short_list(splits):
    for row in splits["test"]:
        assert len(row["inputs"]) == len(row["outputs"]) == len(row["tests"].splitlines()) == 8
        assert len(row["inputs"][0]) <= 3 and all(5 <= len(values) <= 10 for values in row["inputs"][1:])
        assert all(-9 <= value <= 12 for values in row["inputs"] for value in values)


def test_assert_lines_say_what_inputs_and_outputs_say(splits):
    for row in splits["valid"][:20]:
        namespace = {}
        exec(row["prompt"] + row["canonical_solution"], namespace)
        exec(row["tests"], namespace)
        assert [repr(namespace["f"](values)) for values in row["inputs"]] == [repr(y) for y in row["outputs"]]


def test_prompts_are_distinct_where_nothing_is_demonstrated(splits):
    for name in ("sft_valid", "preference", "rl", "valid", "test"):
        prompts = [row["prompt"] for row in splits[name]]
        assert len(set(prompts)) == len(prompts)
    assert not {row["prompt"] for row in splits["sft"]} & {row["prompt"] for row in splits["sft_valid"]}


def test_mistakes_are_systematic():
    world = World(seed=5, num_sft=1500)
    faulty = set(problems.faulty_operations(world))
    assert len(faulty) == 18  # 40% of 44
    singles = [row for row in make_rows(world, "sft") if len(row["operations"]) == 1]
    rate = {
        side: sum(row["mistakes"] for row in rows) / len(rows)
        for side in (True, False)
        for rows in [[row for row in singles if (row["operations"][0] in faulty) == side]]
    }
    assert abs(rate[True] - world.faulty_rate) < 0.12 and abs(rate[False] - world.background_rate) < 0.07


def test_no_noise_gives_only_correct_demonstrations():
    rows = make_rows(World(seed=5, num_sft=60, faulty_rate=0.0, background_rate=0.0), "sft")
    assert all(grade_fast([row["prompt"] for row in rows], [row["response"] for row in rows], rows))


# ---------------------------------------------------------------- the verdicts


def test_every_canonical_solution_passes(splits):  # PITFALLS EX-7
    rows = [row for rows in splits.values() for row in rows]
    stats = {}
    assert all(grade_fast([r["prompt"] for r in rows], [r["canonical_solution"] for r in rows], rows, stats))
    assert stats["sandboxed"] == stats["killed"] == 0


def test_every_planted_mistake_fails(splits):  # PITFALLS EX-7
    """Each mistake of each operation of a problem, alone among correct lines."""
    programs, rows = [], []
    for row in splits["test"]:
        lines = row["canonical_solution"].split("\n")
        for i, name in enumerate(row["operations"]):
            constants = [
                k
                for k in OPERATIONS[name].constants
                if any(lines[i].endswith(f" {text.format(k=k)}") for text in OPERATIONS[name].correct)
            ]
            for wrong in OPERATIONS[name].wrong:
                start = "    return " if i == len(lines) - 1 else "    x = "
                programs.append(
                    "\n".join(lines[:i] + [start + wrong.format(k=constants[0])] + lines[i + 1 :])
                )
                rows.append(row)
    assert len(programs) > 200
    assert not any(grade_fast([row["prompt"] for row in rows], programs, rows))


def test_demonstrations_with_one_mistake_fail_and_without_pass(splits):
    rows = [row for row in splits["sft"] if row["mistakes"] <= 1]
    passed = grade_fast([row["prompt"] for row in rows], [row["response"] for row in rows], rows)
    assert passed == [row["mistakes"] == 0 for row in rows]


def test_types_are_compared():
    row = problem([[1], [0]], [1, 0])
    assert verdicts(
        ["    return x[0]", "    return x[0] == 1", "    return x[0] / 1", "    return [x[0]]"], row
    ) == [True, False, False, False]
    assert verdicts(
        ["    return (v for v in x)", "    return tuple(x)", "    return x"], problem([[1]], [[1]])
    ) == [False, False, True]
    assert verdicts(["    return [v == 1 for v in x]", "    return x"], problem([[1]], [[True]])) == [
        True,
        False,
    ]


def test_every_test_counts():
    row = problem([[1], [2], [3]], [1, 2, 4])
    assert verdicts(["    return x[0]", "    return x[0] + (x[0] > 2)"], row) == [False, True]


def test_statements_and_mutation():
    row = problem([[3, 1], [2]], [[1, 3], [2]])
    body = "    y = []\n    for v in x:\n        if v not in y:\n            y.append(v)\n"
    body += "    y.sort()\n    return y"
    assert verdicts([body, "    x.sort()\n    return x", "    x.sort()"], row) == [True, True, False]


def test_argument_lists_are_fresh_for_every_program():
    row = problem([[3, 1]], [[3, 1]])
    assert verdicts(["    x.clear()\n    return x", "    return x", "    return x[:]"], row) == [
        False,
        True,
        True,
    ]
    assert row["inputs"] == [[3, 1]]


def test_programs_leave_nothing_behind_for_the_next():
    row = problem([[1]], [[1]])
    bodies = [
        "    sorted = abs\n    return x",
        "    return sorted(x)",
        "    y = 1\n    return [y]",
        "    return [y]",
    ]
    assert verdicts(bodies, row) == [True, True, True, False]


def test_garbage_fails():
    row = problem([[1]], [[1]])
    bodies = [
        "",
        "    return",
        "    return x[",
        "return x",
        "    return y",
        "    return x[9]",
        "    return x\0",
        "    return \ud800",
        "    x = x",
        "    return " + "(" * 150 + "x" + ")" * 150,
        "    break",
    ]
    assert verdicts(bodies[:9] + bodies[10:], row) == [False] * 10
    assert verdicts(bodies[9:10], row) == [True]


def test_looping_and_greedy_programs_fail_alone_and_soon(
    monkeypatch,
):  # PITFALLS EX-5: `v ** v` once ran 20 s
    monkeypatch.setattr(grade, "CPU_SECONDS", 0.1)
    row = problem([[7, 8, 9]], [[7, 8, 9]])
    hostile = [
        "    while True:\n        pass",
        "    x = [v ** 6 for v in x]\n    x = [v ** v for v in x]\n    return x",
        "    return 9 ** 9 ** 9",
        "    return list(range(10 ** 12))",
        "    return x * 10 ** 9",
        "    return [0] * 10 ** 8",
        "    return sum(range(10 ** 12))",
        "    return f(x) + f(x)",
        "    return f([x])",
        "    for v in x:\n        x.append(v)\n    return x",
        "    x[0] = x\n    return x",
        "    return " + "-" * 1500 + "x",
    ]
    bodies = [body for h in hostile for body in (h, "    return x[:]" + " " * hostile.index(h))]
    stats, start = {}, time.perf_counter()
    assert verdicts(bodies, row, stats) == [False, True] * len(hostile)
    assert stats["sandboxed"] == 0 and stats["killed"] >= 3
    assert time.perf_counter() - start < 120
    assert row["inputs"] == [[7, 8, 9]]


@pytest.mark.parametrize(
    "body",
    [
        "    import os\n    return x",
        "    return x.__class__",
        "    return [].__class__.__base__.__subclasses__()",
        "    return __builtins__",
        "    return open",
        "    return print(x)",
        "    return exit(0)",
        "    return eval",
        "    return getattr(x, x)",
        "    return '%9999999d' % 1",
        "    return f'{x}'",
        "    return type(x)",
        "    raise SystemExit",
        "    try:\n        return x\n    except:\n        return x",
        "    class A:\n        pass\n    return x",
        "    def g():\n        pass\n    return x",
        "    global f\n    return x",
        "    x.foo = 1\n    return x",
        "    x.append = 1\n    return x",
        "    return x\nf = abs",
        "    return (y := x)",
        "    yield x",
        "    return 1j",
        "    return x" + " " * 2000,
        "    match x:\n        case _:\n            return x",
        "    with x:\n        return x",
    ],
)
def test_other_constructs_go_to_the_sandbox(body):  # PITFALLS EX-4
    assert not is_plain("def f(x):\n" + body, "f")


@pytest.mark.parametrize(
    "program",
    [
        "@abs\ndef f(x):\n    return x",
        "def g(x):\n    return x",
        "def f(x=open):\n    return x",
        "def f(x: open):\n    return x",
        "async def f(x):\n    return x",
        "f = lambda x: x",
    ],
)
def test_other_definitions_go_to_the_sandbox(program):
    assert not is_plain(program, "f")


def test_sandboxed_programs_are_graded_there_once(monkeypatch):
    calls = []

    def grade(program, tests, entry_point):
        calls.append((program, tests, entry_point))
        return {"passed": "good" in program, "detail": ""}

    monkeypatch.setitem(sys.modules, "benchmark.grading", types.SimpleNamespace(grade=grade))
    row, stats = problem([[1]], [[1]]), {}
    good, bad = "    import good\n    return x", "    import bad\n    return x"
    assert verdicts([good, bad, good, "    return x"], row, stats) == [True, False, True, True]
    assert stats == {"programs": 4, "distinct": 3, "sandboxed": 2, "killed": 0}
    assert calls == [("def f(x):\n" + body, row["tests"], "f") for body in (good, bad)]


def test_full_sandbox_agrees(splits):
    grading = pytest.importorskip("benchmark.grading", reason="benchmark.grading is not there yet")
    row = splits["valid"][0]
    program = row["prompt"] + row["canonical_solution"]
    assert grading.grade(program, row["tests"], "f")["passed"]
    assert not grading.grade(row["prompt"] + "    return 1.5", row["tests"], "f")["passed"]
    aside = row["canonical_solution"].replace("    ", "    import math\n    ", 1)
    assert verdicts([aside], row) == [True]


def test_equal_programs_run_once_per_row():
    rows, stats = [problem([[1]], [[1]], "a"), problem([[1]], [[2]], "b")], {}
    prompts, bodies = ["def f(x):\n"] * 4, ["    return x"] * 4
    assert grade_fast(prompts, bodies, [rows[0], rows[1], rows[0], rows[1]], stats) == [
        True,
        False,
        True,
        False,
    ]
    assert stats["programs"] == 4 and stats["distinct"] == 2


def test_oracle_is_one_or_zero():
    row = problem([[1]], [[1]])
    assert oracle([row["prompt"]] * 2, ["    return x", "    return 1"], [row] * 2) == [1.0, 0.0]


def test_nothing_to_grade():
    assert grade_fast([], [], []) == []


def test_refuses_zero_tests_and_unequal_lengths():  # PITFALLS EX-3
    with pytest.raises(ValueError, match="t: needs at least one test"):
        verdicts(["    return x"], problem([], []))
    with pytest.raises(ValueError, match="1, 2, 1"):
        grade_fast([""], ["", ""], [{}])


def test_a_worker_that_cannot_start_is_an_error_not_a_fail(monkeypatch):  # PITFALLS EX-3
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="did not start"):
        verdicts(["    return x"], problem([[1]], [[1]]))


def test_a_worker_ended_from_outside_costs_no_program_its_pass(monkeypatch):  # PITFALLS EX-3
    started = []
    start = grade._start_worker

    def killed_at_first():
        worker = start()
        if not started:
            os.kill(worker.pid, signal.SIGKILL)
            worker.wait()
        started.append(worker)
        return worker

    monkeypatch.setattr(grade, "_start_worker", killed_at_first)
    assert verdicts(["    return x", "    return x[:]"], problem([[1]], [[1]])) == [True, True]
    assert len(started) == 2 and all(worker.returncode is not None for worker in started)


def test_speed(splits):
    """2000 programs a second are asked of an idle core; CPU time keeps a busy machine from failing the
    test."""
    rows = [row for rows in splits.values() for row in rows] * 2
    prompts = [f"# {i}\n" + row["prompt"] for i, row in enumerate(rows)]
    before = os.times()
    assert all(grade_fast(prompts, [row["canonical_solution"] for row in rows], rows))
    spent = sum(os.times()[:4]) - sum(before[:4])
    assert len(rows) / spent > 1000


# ---------------------------------------------------------------- the files


def test_world_is_a_function_of_its_seed(world_dir, tmp_path):
    again = write_world(tmp_path / "again", seed=3, **SMALL)
    files = sorted(path.relative_to(world_dir) for path in world_dir.rglob("*") if path.is_file())
    assert (
        files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
        and len(files) >= 9
    )
    for name in files:
        assert (world_dir / name).read_bytes() == (again / name).read_bytes(), name
    other = World(seed=4, **SMALL)
    assert make_rows(other, "valid") != make_rows(World(seed=3, **SMALL), "valid")
    assert problems.faulty_operations(other) != problems.faulty_operations(World(seed=3))


def test_tokenizer_round_trip_without_unknown(world_dir, splits):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(world_dir / "tokenizer")
    assert len(tokenizer) == 256
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}) == 3
    texts = [
        row["prompt"] + row[key]
        for rows in splits.values()
        for row in rows
        for key in ("response", "canonical_solution")
        if key in row
    ]
    for text, ids in zip(texts, tokenizer(texts)["input_ids"]):
        assert (
            tokenizer.unk_token_id not in ids and tokenizer.eos_token_id not in ids
        )  # PITFALLS TOK-7: no BOS, no EOS
        assert tokenizer.decode(ids) == text
    rows = [row for rows in splits.values() for row in rows]
    for row in rows:  # PITFALLS BL-3: the boundary is the same in training and scoring
        ids = [tokenizer(text)["input_ids"] for text in (row["prompt"], row["canonical_solution"])]
        assert ids[0] + ids[1] == tokenizer(row["prompt"] + row["canonical_solution"])["input_ids"]
        assert len(ids[0]) <= 60 and len(ids[1]) < 56
    for side in ("left", "right"):
        tokenizer.padding_side = side
        batch = tokenizer([rows[0]["prompt"], "x"], padding=True)["input_ids"]
        assert (batch[1][0] == tokenizer.pad_token_id) == (side == "left")


def test_tokenizer_knows_every_phrase_of_every_world(world_dir):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(world_dir / "tokenizer")
    for op in OPERATIONS.values():
        for text in op.phrasings + op.correct + op.wrong:
            assert tokenizer.unk_token_id not in tokenizer(text.format(k=7))["input_ids"], text


def test_digits_and_separators_stand_alone(world_dir):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(world_dir / "tokenizer")
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert not [token for token in tokens if len(token) > 1 and set(token) & set("\n;,0123456789")]


def test_model_configuration(world_dir):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(world_dir / "model_config")
    tokenizer = AutoTokenizer.from_pretrained(world_dir / "tokenizer")
    assert (config.vocab_size, config.pad_token_id, config.eos_token_id) == (
        len(tokenizer),
        tokenizer.pad_token_id,
        tokenizer.eos_token_id,
    )
    model = AutoModelForCausalLM.from_config(config)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert 100_000 < sum(parameter.numel() for parameter in model.parameters()) < 125_000


def test_record_holds_all_settings(world_dir):
    record = json.loads((world_dir / "world.json").read_text())
    assert World(**record["settings"]) == World(seed=3, **SMALL)
    assert {name: size["rows"] for name, size in record["sizes"].items()} == {
        k[4:]: v for k, v in SMALL.items()
    }


def test_same_world_is_kept_and_another_refused(world_dir):
    stamp = (world_dir / "world.json").stat().st_mtime_ns
    write_world(world_dir, seed=3, **SMALL)
    assert (world_dir / "world.json").stat().st_mtime_ns == stamp
    with pytest.raises(FileExistsError, match="choose another output_dir"):
        write_world(world_dir, seed=4, **SMALL)


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError):
        write_world(tmp_path, seed=1, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def _write_and_die(folder):
    made = world.make_rows

    def dies(world, split, *rest):
        if split == "rl":
            os.kill(os.getpid(), signal.SIGKILL)
        return made(world, split, *rest)

    world.make_rows = dies
    write_world(folder, seed=3, **SMALL)


def test_killed_midway_leaves_no_half_folder(tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=_write_and_die, args=(tmp_path / "world",))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "world").exists() and (tmp_path / "world.partial" / "sft.jsonl").exists()
    write_world(tmp_path / "world", seed=3, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["world"]
    assert (tmp_path / "world" / "world.json").exists()


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(min_operations=1), "min_operations"),
        (dict(max_operations=1), "max_operations"),
        (dict(num_tests=1), "num_tests"),
        (dict(faulty_rate=1.5), "faulty_rate"),
        (dict(num_rl=0), "num_rl"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        World(**settings)


def test_too_small_a_vocabulary_is_refused(tmp_path):
    with pytest.raises(ValueError, match="vocab_size must be at least"):
        write_world(
            tmp_path / "world", vocab_size=20, **{**SMALL, "num_preference": 5, "num_rl": 5, "num_sft": 20}
        )
    assert not list(tmp_path.iterdir())


def test_command_line(tmp_path, monkeypatch, capsys):
    flags = [word for name, size in SMALL.items() for word in (f"--{name}", str(min(size, 20)))]
    command = ["benchmark.minicode", "write", "--output_dir", str(tmp_path / "w"), "--seed", "9"]
    monkeypatch.setattr(sys, "argv", command + flags)
    __main__.main()
    assert json.loads((tmp_path / "w" / "world.json").read_text())["settings"]["seed"] == 9
    assert "preference     20 rows" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["benchmark.minicode", "read"])
    with pytest.raises(SystemExit, match="usage: python -m benchmark.minicode write"):
        __main__.main()


# ---------------------------------------------------------------- the pairs


@pytest.mark.parametrize(
    "a, b, distance",
    [
        ("", "", 0),
        ("abc", "", 3),
        ("", "abc", 3),
        ("abc", "abc", 0),
        ("kitten", "sitting", 3),
        ("flaw", "lawn", 2),
        ("x > 3", "x >= 3", 1),
        ("ab", "ba", 2),
        ("aaaa", "a", 3),
        ("x[::-1]", "x[1:]", 3),
    ],
)
def test_edit_distance_by_hand(a, b, distance):
    assert edit_distance(a, b) == edit_distance(b, a) == distance


def test_edit_distance_equals_the_table():
    import random

    rng = random.Random(1)
    for _ in range(200):
        a, b = ("".join(rng.choices("abcd", k=rng.randint(0, 90))) for _ in range(2))
        row = list(range(len(b) + 1))
        for i, x in enumerate(a, 1):
            last, row[0] = row[0], i
            for j, y in enumerate(b, 1):
                last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
        assert edit_distance(a, b) == row[-1]


def test_pair_of_largest_distance_between_passing_and_failing():
    rows = [{"task_id": "t", "prompt": "p"}]
    responses = [["aaaa", "aabb", "bbbb", "aaab", "zzzzzzzz"]]
    pairs, dropped = build_pairs(rows, responses, [[True, False, True, False, True]])
    assert (
        pairs == [{"task_id": "t", "prompt": "p", "chosen": "zzzzzzzz", "rejected": "aabb"}] and dropped == 0
    )
    pairs, _ = build_pairs(rows, responses, [[True, False, False, False, True]])
    assert (pairs[0]["chosen"], pairs[0]["rejected"]) == ("zzzzzzzz", "aabb")  # 8 three times: the first one
    pairs, _ = build_pairs(rows, [responses[0][:4]], [[True, False, False, False]])
    assert (pairs[0]["chosen"], pairs[0]["rejected"]) == ("aaaa", "bbbb")


def test_prompts_without_a_pair_are_counted_and_dropped():
    rows = [{"task_id": str(i), "prompt": "p"} for i in range(3)]
    pairs, dropped = build_pairs(rows, [["a", "b"]] * 3, [[True, True], [False, False], [False, True]])
    assert [pair["task_id"] for pair in pairs] == ["2"] and dropped == 2
    with pytest.raises(ValueError, match="0: 2 responses but 1 verdicts"):
        build_pairs(rows, [["a", "b"]] * 3, [[True]] * 3)
