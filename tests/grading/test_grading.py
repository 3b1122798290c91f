"""The grader: what must pass passes, what must fail fails, and nothing stays behind. Probes are in
tests/grading/data/probes.jsonl, one program per line."""

import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from benchmark.grading import GradingError, grade, grade_many
from benchmark.grading import grader as grading
from benchmark.grading.sandbox.isolation import move_packages
from benchmark.grading.sandbox.judge import JudgeLink
from benchmark.grading.sandbox.link import Malformed, ProgramEnded
from benchmark.grading.sandbox.program import ProgramLink

PROBES = [
    json.loads(line)
    for line in Path(__file__).with_name("data").joinpath("probes.jsonl").read_text().splitlines()
]
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "sandbox_probes.jsonl"
# They run into a time limit: graded with short ones.
SLOW = """sleeps blocks_on_lock stopped catches_everything_and_spins ignores_signals infinite_generator
infinite_print infinite_loop sleeps_and_catches""".split()
RIGHT = "def double(x):\n    return 2 * x\n"
TESTS = "assert double(4) == 8\nassert double(-1) == -2\n"


def items_of(probes, **limits):
    return [
        {**{name: probe[name] for name in ("program", "tests", "entry_point")}, **limits} for probe in probes
    ]


def misjudged(probes, workers=8, **limits):
    verdicts = grade_many(items_of(probes, **limits), workers=workers, progress=False)
    return [
        (p["name"], p["why"], v["detail"])
        for p, v in zip(probes, verdicts)
        if v["passed"] != (p["expected"] == "pass")
    ]


@pytest.fixture(scope="module", autouse=True)
def ended():
    yield
    grading.close()


# ---------------------------------------------------------------- probes


def test_probes_are_many_and_named_once():
    assert (
        sum(p["expected"] == "fail" for p in PROBES) >= 100
        and sum(p["expected"] == "pass" for p in PROBES) >= 25
    )
    assert len({p["name"] for p in PROBES}) == len(PROBES)


def test_no_hostile_program_passes():  # PITFALLS EX-1 EX-2 EX-4
    assert misjudged([p for p in PROBES if p["expected"] == "fail" and p["name"] not in SLOW]) == []


def test_every_honest_program_passes():
    assert misjudged([p for p in PROBES if p["expected"] == "pass" and p["name"] not in SLOW]) == []


def test_programs_that_take_too_long_fail():  # PITFALLS EX-5
    slow = [p for p in PROBES if p["name"] in SLOW]
    assert len(slow) >= 6 and misjudged(slow, wall_seconds=0.3, cpu_seconds=0.3) == []


def test_shared_probes():
    if not SHARED.is_file():
        pytest.skip("the shared probes are not beside this checkout")
    probes = [json.loads(line) for line in SHARED.read_text().splitlines()]
    assert misjudged([p for p in probes if p["name"] not in SLOW]) == []
    assert misjudged([p for p in probes if p["name"] in SLOW], wall_seconds=0.3, cpu_seconds=0.3) == []


def test_same_verdicts_and_order_with_1_and_16_workers():  # PITFALLS EX-5
    items = items_of([p for p in PROBES if p["name"] not in SLOW][::8])
    verdicts = [
        [v["passed"] for v in grade_many(items, workers=workers, progress=False)] for workers in (1, 16)
    ]
    assert verdicts[0] == verdicts[1] and True in verdicts[0] and False in verdicts[0]


# ---------------------------------------------------------------- limits


def test_cpu_limit_holds_where_wall_time_is_ample():
    verdict = grade(
        "def double(x):\n    while True:\n        pass\n", TESTS, "double", wall_seconds=60, cpu_seconds=0.3
    )
    assert not verdict["passed"] and "CPU" in verdict["detail"]


def test_computing_programs_that_share_cores_are_not_timed_out_by_the_wall():  # PITFALLS EX-5
    program = (
        "import time\ndef double(x):\n    end = time.process_time() + 0.06\n"
        "    while time.process_time() < end:\n        pass\n    return 2 * x\n"
    )
    items = [{"program": program, "tests": TESTS, "entry_point": "double", "wall_seconds": 1.2}] * 8
    assert [v["passed"] for v in grade_many(items, workers=8, progress=False)] == [True] * 8


def test_memory_limit():
    program = "import mmap\ndef double(x):\n    return 2 * x if mmap.mmap(-1, 500 << 20) else 0\n"
    assert grade(program, TESTS, "double")["passed"]
    assert not grade(program, TESTS, "double", memory_bytes=300 << 20)["passed"]


# ---------------------------------------------------------------- three outcomes


@pytest.mark.parametrize(
    "tests", ["", "  \n", [], "x = 1\n", "def check(candidate):\n    pass\n", "assert 1 == 1\n"]
)
def test_zero_tests_is_an_error(tests):  # PITFALLS EX-3
    with pytest.raises(GradingError, match="zero tests"):
        grade(RIGHT, tests, "double")


def test_tests_that_do_not_compile_are_an_error():
    with pytest.raises(GradingError, match="do not compile"):
        grade(RIGHT, "assert double(1) ==", "double")


def test_verdicts_before_an_error_are_handed_out():
    items = [
        {"program": RIGHT, "tests": tests, "entry_point": "double"}
        for tests in (TESTS, TESTS, "def check(candidate):\n    pass\n")
    ]
    kept = {}
    with pytest.raises(GradingError):
        grade_many(items, workers=1, progress=False, on_result=kept.__setitem__)
    assert {index: verdict["passed"] for index, verdict in kept.items()} == {0: True, 1: True}


def test_grading_goes_on_after_an_error():
    with pytest.raises(GradingError):
        grade(RIGHT, "assert (", "double")
    assert grade(RIGHT, TESTS, "double")["passed"]


def test_a_lost_template_is_an_error_and_the_next_grading_starts_anew():
    grade(RIGHT, TESTS, "double")
    grading._grader.templates["program"].process.kill()
    grading._grader.templates["program"].process.wait()
    with pytest.raises(GradingError):
        grade(RIGHT, TESTS, "double")
    assert grade(RIGHT, TESTS, "double")["passed"]


# ---------------------------------------------------------------- what the tests may name


def test_helpers_run_beside_the_tests_and_cannot_be_redefined():  # HumanEval/38
    prompt = "def encode(s):\n    return s[1:] + s[0]\n\ndef decode(s):\n"
    tests = "def check(candidate):\n    assert candidate(encode('abc')) == 'abc'\n"
    right = prompt + "    return s[-1] + s[:-1]\n"
    forged = prompt + "    return s\n\nencode = lambda s: s\n"
    helpers = prompt + "    pass\n"
    assert grade(right, tests, "decode", helpers=helpers)["passed"]
    assert not grade(forged, tests, "decode", helpers=helpers)["passed"]
    assert not grade(forged, tests, "decode")["passed"]


def test_detail_names_the_failing_line():
    assert (
        grade("def double(x):\n    return x\n", TESTS, "double")["detail"]
        == "AssertionError at: assert double(4) == 8"
    )


# ---------------------------------------------------------------- nothing stays behind


def children_of(pid):
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                fields = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == pid and fields[0] != "Z":
                found.append(int(name))
    return found


def test_no_process_and_no_file_stays_behind(tmp_path):  # PITFALLS EX-4
    script = (
        "import json, os, sys\nfrom benchmark.grading import grade_many\n"
        "verdicts = grade_many(json.loads(sys.stdin.read()), workers=4, progress=False)\n"
        "print(os.getpid(), [verdict['passed'] for verdict in verdicts])"
    )
    names = ("fork_daemon", "fork_bomb", "deep_directories", "left_files", "writes_home", "exit_in_thread")
    probes = [p for p in PROBES if p["name"] in names]
    assert len(probes) == len(names)
    result = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps(items_of(probes)),
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(grading.__file__).parents[2],
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert "True" not in result.stdout and "False" in result.stdout, result.stderr
    marks = [
        name
        for name in os.listdir("/proc")
        if name.isdigit()
        and b"sandbox.template" in read(f"/proc/{name}/cmdline")
        and environ_is(name, result.stdout)
    ]
    assert marks == [] and list(tmp_path.iterdir()) == []
    if (
        "landlock" in result.stderr
    ):  # without it only the file permissions of its user keep a program from writing
        assert not any(Path(place, "pwned").exists() for place in ("/tmp", "/var/tmp", "/dev/shm", "/work"))


def read(path):
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""


def environ_is(pid, printed):
    """Whether the process was started by the run that printed its pid: users of their own begin at a number
    made from it."""
    owner = int(printed.split()[0])
    return str(100_000 + owner % 20_000 * 128).encode() in read(f"/proc/{pid}/cmdline").split(b"\0")


def test_close_ends_every_child():
    grade(RIGHT, TESTS, "double")
    templates = [template.process.pid for template in grading._grader.templates.values()]
    assert set(templates) <= set(children_of(os.getpid()))
    grading.close()
    assert not set(templates) & set(children_of(os.getpid()))


def test_killed_owner_takes_its_templates_along():
    script = (
        "import time\nfrom benchmark.grading import grader as grading\n"
        "grading.grade('def f():\\n    return 1\\n', 'assert f() == 1', 'f')\n"
        "print(*[t.process.pid for t in grading._grader.templates.values()], flush=True)\ntime.sleep(60)"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(grading.__file__).parents[2],
        stderr=subprocess.DEVNULL,
    )
    templates = list(map(int, owner.stdout.readline().split()))
    assert len(templates) == 2
    owner.kill()
    owner.wait()
    owner.stdout.close()
    end = time.monotonic() + 10
    while (
        any(b"sandbox.template" in read(f"/proc/{pid}/cmdline") for pid in templates)
        and time.monotonic() < end
    ):
        time.sleep(0.05)
    assert not any(b"sandbox.template" in read(f"/proc/{pid}/cmdline") for pid in templates)


def test_two_threads_may_grade_at_once():
    verdicts = []
    threads = [
        threading.Thread(target=lambda p=p: verdicts.append(grade(p, TESTS, "double")["passed"]))
        for p in (RIGHT, "def double(x):\n    return x\n")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(verdicts) == [False, True]


def test_isolation_is_said_once():
    command = [
        sys.executable,
        "-c",
        "from benchmark.grading import grade\n"
        "for _ in 'ab':\n    grade('def f():\\n    return 1\\n', 'assert f() == 1', 'f')",
    ]
    said = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(grading.__file__).parents[2]
    ).stderr
    assert said.count("isolation active") == 1 and "resource limits" in said


# ---------------------------------------------------------------- the transport: forged messages


def judge_end(message):
    """A judge's link that receives the given bytes, or the JSON of anything else."""
    ours, theirs = socket.socketpair()
    data = message if isinstance(message, bytes) else json.dumps(message).encode()
    theirs.sendall(data if isinstance(message, bytes) else struct.pack("!I", len(data)) + data)
    theirs.close()
    return JudgeLink(ours, {})


@pytest.mark.parametrize(
    "message",
    [
        struct.pack("!I", 1 << 31) + b"x",  # too large
        struct.pack("!I", 2) + b"{]",
        ["value", {"a": 1}, []],  # an object where only tagged lists are known
        ["value", ["?", 1], []],
        ["value", ["@", 7], []],  # a container that was never defined
        ["value", ["@", 1], [[1, "?", [], None]]],
        ["value", ["@", 2], [[2, "l", [], None]]],  # a number of the judge's side
        ["value", ["@", 1], [[1, "l", [], None], [1, "d", [], None]]],  # a container that changes its type
        ["value", ["@", 1], [[1, "R", [], "Path"]]],  # an instance of a class that the tests do not define
        ["value", ["h", "1", "object"], []],
        ["value", ["h", 1, "__class__"], []],
        ["value", ["n", "P", ["x", "x; import os"], [1, 2, 3]], []],
        ["value", ["k", "eval"], []],
        ["value", ["i", 5], []],
        ["value", ["t", 5], []],
        ["value", ["F", 0], []],  # only the judge hands functions over
    ],
)
def test_forged_messages_are_refused(message):
    with pytest.raises((Malformed, ProgramEnded)):
        judge_end(message).receive()


def test_a_program_cannot_call_what_it_was_not_given():
    link = judge_end(["request", ["t", ["callback", 0, ["t", []], ["t", []]]], []])
    link.answer = lambda *what: pytest.fail("called") if link.lent else link.perform(*what)
    with pytest.raises((IndexError, ProgramEnded, TypeError)):
        link.request("global", "x")


@pytest.mark.parametrize(
    "answer",
    [
        ["news", None, []],  # neither a value nor an error nor a request
        ["error", ["t", ["SystemExit", ["t", [0]]]], []],
        ["error", ["t", ["ValueError", ["t", [["t", []]]]]], []],  # arguments that are not plain
        ["error", ["t", ["NoError", ["t", []]]], []],
        ["request", ["t", ["exec", 0, ["t", []], ["t", []]]], []],
    ],
)
def test_forged_answers_fail_the_program(answer):
    with pytest.raises(ProgramEnded):
        judge_end(answer).request("global", "x")


def test_values_cross_unchanged():
    left, right = socket.socketpair()
    judge, program = JudgeLink(left, {}), ProgramLink(right)
    shared = [1, 2]
    values = [
        None,
        True,
        1,
        -(10**30),
        1.5,
        float("inf"),
        "\ud800é",
        b"\0",
        (1, [2]),
        {"a": {1, 2}},
        frozenset([3]),
        range(3),
        2j,
        shared,
        shared,
    ]
    program.send("value", tuple(values))
    got = list(judge.receive()[1])
    assert got == values and [type(v) for v in got] == [type(v) for v in values]
    assert got[-1] is got[-2]


def test_changes_in_place_cross_back():
    left, right = socket.socketpair()
    judge, program = JudgeLink(left, {}), ProgramLink(right)
    data = [[3], {"k": 1}]
    judge.send("request", ("x", data))
    theirs = program.receive()[1][1]
    theirs[0].append(4)
    theirs[1]["k"] = theirs[0]
    program.send("value", None)
    judge.receive()
    assert data == [[3, 4], {"k": [3, 4]}] and data[1]["k"] is data[0]


def test_packages_imported_before_the_library_moved_find_their_modules(monkeypatch, tmp_path):
    # a Python under /root: judge and program see its library in another place, `import unittest` needs
    # importlib.machinery from there
    old, new = tmp_path / "old", tmp_path / "new"
    for folder in (old, new):
        (folder / "moved_package").mkdir(parents=True)
    (old / "moved_package/__init__.py").touch()
    (new / "moved_package/part.py").touch()
    monkeypatch.syspath_prepend(old)
    package = __import__("moved_package")
    move_packages(str(tmp_path / "ol"), str(new))  # another folder with the same beginning
    assert package.__path__ == [str(old / "moved_package")]
    move_packages(str(old), str(new))
    assert __import__("moved_package.part").part.__file__ == str(new / "moved_package/part.py")
    del sys.modules["moved_package"], sys.modules["moved_package.part"]
