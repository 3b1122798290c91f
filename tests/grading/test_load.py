"""The same verdicts on a busy machine as on an idle one, and none later than twice the wall limit."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmark.grading import grade, grade_many, turns
from benchmark.grading import grader as grading

# One core is busy, and the programs and their judges go there: the rest of the machine is left to others.
CORE = min(os.sched_getaffinity(0))
GO = f"import os, time\nos.sched_setaffinity(0, [{CORE}])\n"
WALL = 0.6
LIMITS = {"tests": f"{GO}assert f(1) == 1", "entry_point": "f", "wall_seconds": WALL, "cpu_seconds": 0.4}
LOOP = (
    f"{GO}def f(x):\n    end = time.{{clock}}() + {{seconds}}\n"
    "    while time.{clock}() < end:\n        pass\n    return 1\n"
)
SLEEP = f"{GO}def f(x):\n    time.sleep({{seconds}})\n    return 1\n"
PROGRAMS = {  # name -> (program, what it is told on an idle machine)
    "ends at once": (f"{GO}def f(x):\n    return 1\n", "all tests passed"),
    "computes for 0.3 s": (LOOP.format(clock="process_time", seconds=0.3), "all tests passed"),
    "computes for 0.7 s": (LOOP.format(clock="process_time", seconds=0.7), "timeout: over 0.4 s of CPU time"),
    "computes for ever": (
        f"{GO}def f(x):\n    while True:\n        pass\n",
        "timeout: over 0.4 s of CPU time",
    ),
    "looks at the clock": (LOOP.format(clock="monotonic", seconds=1.5), "timeout: over 0.4 s of CPU time"),
    "sleeps for 0.2 s": (SLEEP.format(seconds=0.2), "all tests passed"),
    "sleeps for 10 s": (SLEEP.format(seconds=10), "timeout: over 0.6 s of wall time"),
}
TOLD = {name: told for name, (_, told) in PROGRAMS.items()}
ROOT = Path(grading.__file__).parents[2]


@pytest.mark.parametrize(
    "load, clocks, goes_on",
    [
        (8.0, (0.4, 0.1), True),  # computed half of the time on a busy machine: it lacked a core
        (8.0, (0.98, 0.0), False),  # had its core all the time
        (0.5, (0.05, 0.0), False),  # waited, and not for a core
    ],
)
def test_without_precedence_the_clocks_decide_a_second_try(monkeypatch, load, clocks, goes_on):
    monkeypatch.setattr("os.getloadavg", lambda: (load, load, load))
    stopped = []
    run = grading.Run(0, 0, grading.as_job("f", **LIMITS), 0, None, first_try=1.0)
    run.started, run.clocks = time.monotonic() - 1, {}
    grader = SimpleNamespace(stop=lambda *what: stopped.append(what))
    for who, seconds in zip(("program", "judge"), clocks):
        grading.Grader.weigh(grader, run, who, seconds)
    assert bool(stopped) is not goes_on


def test_alone_waits_for_those_inside_and_lets_nobody_follow(monkeypatch, tmp_path):
    monkeypatch.setattr(turns, "PATH", str(tmp_path / "lock"))
    script = (
        "import sys\nfrom benchmark.grading import turns\nturns.PATH = sys.argv[1]\n"
        "mine, calls = turns.Turns(), {'leave': lambda t: t.leave(), 'beside': lambda t: t.enter(False), "
        "'alone': lambda t: t.enter(True)}\n"
        "for line in sys.stdin:\n    print(calls[line.strip()](mine), flush=True)\n"
    )
    there = subprocess.Popen(
        [sys.executable, "-c", script, turns.PATH],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )

    def ask(word):
        there.stdin.write(word + "\n")
        there.stdin.flush()
        return there.stdout.readline().strip()

    here = turns.Turns()
    try:
        assert here.enter(alone=False) and ask("beside") == "True"
        assert ask("leave") == "None" and ask("alone") == "False"  # we are inside
        assert not here.enter(alone=False)  # the door is closed
        here.leave()
        assert ask("alone") == "True" and not here.enter(alone=False) and not here.enter(alone=True)
        there.kill()  # its locks end with it
        there.wait()
        assert here.enter(alone=False)
    finally:
        here.close()
        there.kill()
        there.wait()
        there.stdin.close()
        there.stdout.close()


def test_a_lock_that_is_held_too_long_is_ignored(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(turns, "PATH", str(tmp_path / "lock"))
    monkeypatch.setattr(turns, "PATIENCE", 0.05)
    here = turns.Turns()
    monkeypatch.setattr(here, "lock", lambda *what: False)
    assert not here.enter(alone=False)
    time.sleep(0.1)
    assert here.enter(alone=False) and here.enter(alone=True)
    assert capsys.readouterr().err.count("ignored") == 1
    here.close()


# ---------------------------------------------------------------- on a busy core


@pytest.fixture(scope="module")
def busy(tmp_path_factory):
    """Two processes that keep the core busy, and a lock of our own: who grades elsewhere on this machine is
    not waited for."""
    others = [subprocess.Popen([sys.executable, "-c", f"{GO}while True: pass"]) for _ in range(2)]
    grading.close()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(turns, "PATH", str(tmp_path_factory.mktemp("turns") / "lock"))
        yield
        grading.close()
    for other in others:
        other.kill()
        other.wait()


@pytest.fixture(scope="module")
def precedence(busy):
    if not grading.shared_grader().precedence:
        pytest.skip("the kernel grants no precedence to second tries")


def test_one_by_one(precedence):  # PITFALLS EX-5
    told, seconds = {}, {}
    for name, (program, _) in PROGRAMS.items():
        start = time.monotonic()
        told[name] = grade(program, **LIMITS)["detail"]
        seconds[name] = time.monotonic() - start
    assert told == TOLD
    assert max(seconds.values()) < 2 * WALL + 0.5, seconds  # the rest is for this process to get a core


def test_many_at_a_time(precedence):  # PITFALLS EX-5
    items = [{"program": program, **LIMITS} for program, _ in PROGRAMS.values()]
    verdicts = grade_many(items, workers=len(items), progress=False)
    assert dict(zip(PROGRAMS, (verdict["detail"] for verdict in verdicts))) == TOLD


def test_many_processes_have_their_second_tries_one_after_another(precedence):  # PITFALLS EX-5
    script = (
        "import json, sys\nfrom benchmark.grading import grade, turns\nturns.PATH = sys.argv[1]\n"
        "print(grade(**json.loads(sys.argv[2]))['detail'])"
    )
    item = json.dumps({"program": PROGRAMS["computes for 0.3 s"][0], **LIMITS})
    graders = [
        subprocess.Popen(
            [sys.executable, "-c", script, turns.PATH, item],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
        )
        for _ in range(3)
    ]
    assert [grader.communicate(timeout=60)[0].strip() for grader in graders] == ["all tests passed"] * 3


def test_cpu_limit_counts_what_was_computed(
    busy,
):  # the kernel's own limit counts ticks: a third too many here
    limits = {**LIMITS, "wall_seconds": 30, "cpu_seconds": 0.3}
    seconds = (0.25, 0.25, 0.25, 0.25, 0.35)
    programs = [LOOP.format(clock="process_time", seconds=some) for some in seconds]
    verdicts = grade_many([{**limits, "program": program} for program in programs], workers=2, progress=False)
    assert [verdict["passed"] for verdict in verdicts] == [some < 0.3 for some in seconds]
