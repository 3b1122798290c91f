"""Equality of expressions by math-verify, in a process of its own.

math-verify limits its time by signals, which work in the main thread alone and cannot stop a single long
operation such as 9**9**9. Here it has a process, which the kernel ends at CPU_SECONDS; what takes longer is
not equal. Any thread may ask.
"""

import functools
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

CPU_SECONDS = 3
WALL_SECONDS = 60  # for a machine that stalls
MEMORY_BYTES = 4 << 30
LONGEST = 400  # characters of an expression

_lock, _worker, _owner = threading.Lock(), None, 0


@functools.lru_cache(maxsize=65536)
def equal(answer, gold):
    """Whether math-verify finds that two expressions (LaTeX or plain) are equal. False for what it cannot
    read."""
    if max(len(answer), len(gold)) > LONGEST:
        return False
    with _lock:
        return ask({"answer": answer, "gold": gold})


def ask(question):
    global _worker, _owner
    if _worker is None or _owner != os.getpid() or _worker.poll() is not None:  # a fork must not share it
        _owner = os.getpid()
        _worker = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), str(CPU_SECONDS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        if _worker.stdout.readline() != b"ready\n":
            _worker.wait()
            raise ImportError(
                "answers that are no plain numbers need math-verify: pip install 'pfppo[benchmark]'"
            )
    timer = threading.Timer(WALL_SECONDS, _worker.kill)
    timer.start()
    try:
        _worker.stdin.write(json.dumps(question).encode() + b"\n")
        _worker.stdin.flush()
        line = _worker.stdout.readline()
    except BrokenPipeError:
        line = b""
    finally:
        timer.cancel()
    if line:
        return line == b"true\n"
    _worker.wait()
    return False


def serve():
    """The process: reads questions, answers each in a line. SIGPROF at the end of the CPU time ends it."""
    import resource
    import signal

    from math_verify import LatexExtractionConfig, parse, verify

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    out = sys.stdout.buffer

    def tree(text):
        text = text.strip().strip("$").removeprefix("\\(").removesuffix("\\)")
        return parse(f"${text}$", [LatexExtractionConfig()], parsing_timeout=None)

    parse("$1$", parsing_timeout=None)
    out.write(b"ready\n")
    out.flush()
    for line in sys.stdin.buffer:
        question = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, float(sys.argv[1]))
        try:
            gold, answer = tree(question["gold"]), tree(question["answer"])
            same = bool(gold) and bool(answer) and verify(gold, answer, timeout_seconds=None)
        except Exception:
            same = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        out.write(json.dumps(bool(same)).encode() + b"\n")
        out.flush()


if __name__ == "__main__":
    sys.path.pop(0)  # this folder
    serve()
