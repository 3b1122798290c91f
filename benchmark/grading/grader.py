"""Grades programs against tests so that no program can talk its way to a pass.

    >>> grade("def double(x):\n    return 2 * x\n", "assert double(4) == 8", "double")
    {'passed': True, 'detail': 'all tests passed'}

1. The program and the tests run in two fresh processes, forked from two warm templates that hold neither
   (`benchmark/grading/sandbox/`). Plain data crosses.
2. The verdict is formed in the judge's process, from comparisons made there, and comes back over a socket
   that the program does not have. A judge is trusted and serves job after job; a program's process is used
   once, then killed and waited for, with all that it started.
3. Limits are on CPU time for the whole program. A program that runs out of wall time beside others is tried
   once more alone; alone, one that computes and only lacks a core on a busy machine gets up to five times the
   wall limit, one that waits does not. So verdicts do not depend on the number of workers.
4. Three outcomes: pass, fail, and `GradingError`, which is raised and never counted: the grader or the tests
   are at fault, not the program.

Linux only. What the kernel grants (namespaces, landlock, seccomp, a user of its own) is used and said once on
standard error.
"""

import ast
import atexit
import json
import os
import re
import selectors
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from pathlib import Path

from benchmark.grading import leetcode

# The project is not on the templates' path: they import the folder sandbox/, found by its place, in an empty
# environment with a fixed hash seed.
BOOT = (
    "import sys; sys.path[0] = sys.argv[1]; from sandbox.template import main; "
    "del sys.path[0]; main(*sys.argv[2:])"
)
START_SECONDS = 60  # for a template to start; more means that something is wrong

END_SECONDS = 30  # for killed processes to be gone
WALL_SECONDS = 10.0
CPU_SECONDS = 12
MOST_WALLS = (
    5  # times the wall limit for a program that runs alone, computes all the time and waits for cores
)
MEMORY_BYTES = 2 << 30
ENTRY_POINT = "_entry_point"  # what an entry point that is an expression is called in the program
JUDGE_BYTES = 4 << 30


class GradingError(RuntimeError):
    """Grading itself failed (tests that do not compile or are empty, a process that cannot start). Never a
    verdict on the program."""


class Run:
    """One grading under way."""

    def __init__(self, name, index, job, slot, judge, again):
        self.name, self.index, self.job, self.slot, self.judge, self.again = (
            name,
            index,
            job,
            slot,
            judge,
            again,
        )
        self.started = time.monotonic()
        self.deadline = self.started + job["wall"]
        self.verdict = None
        self.programs = 2 if job["helper_names"] else 1  # processes
        self.clocks = {}  # who -> CPU seconds, asked for at the wall limit
        self.exits = {}  # number of the process -> report of the template
        self.expired = self.judge_lost = False
        self.crowded = False  # others ran at the same time
        self.error = None

    def program_cpu(self):
        """CPU seconds of the program's process."""
        return max((message["cpu"] for message in self.exits.values()), default=0.0)


class Judge:
    """A process that runs tests, one job after another; its socket brings back verdicts."""

    def __init__(self, name, sock):
        self.name, self.sock, self.data, self.run = name, sock, b"", None
        self.clock = 0.0  # its CPU seconds at the end of its last job


class Template:
    """The owner's end of a template process: asks for children, hears of their end."""

    def __init__(self, role, first_uid):
        self.base = tempfile.mkdtemp(prefix="grading-")
        os.chmod(self.base, 0o711)
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # A new interpreter, not a fork: the caller may hold threads, a GPU, and the tests.
        self.process = subprocess.Popen(
            [sys.executable, *"-s -S -X utf8 -c".split(), BOOT, str(Path(__file__).parent), role]
            + [str(theirs.fileno()), str(first_uid), self.base],
            env={"PYTHONHASHSEED": "0"},
            cwd="/",
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        theirs.close()
        self.control.settimeout(START_SECONDS)
        self.role = role

    def hello(self):
        message = self.receive()
        if "error" in message:
            raise GradingError(message["error"])
        return message["isolation"]

    def receive(self):
        try:
            data = self.control.recv(1 << 16)
        except OSError as error:
            raise GradingError(f"the {self.role} template does not answer: {error}") from None
        if not data:
            text = self.process.stderr.read().decode(errors="replace").strip()
            raise GradingError(
                f"the {self.role} template ended: {text.splitlines()[-1] if text else 'no message'}"
            )
        return json.loads(data)

    def send(self, message, descriptors=()):
        try:
            socket.send_fds(self.control, [json.dumps(message).encode()], list(descriptors))
        except OSError as error:
            raise GradingError(f"the {self.role} template does not listen: {error}") from None

    def close(self):
        self.control.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stderr.close()
        shutil.rmtree(self.base, ignore_errors=True)  # gone already, unless the template was killed


class Grader:
    """Two templates and the loop that keeps several gradings under way. One per process; `grade` and
    `grade_many` share it."""

    def __init__(self):
        if not sys.platform.startswith("linux"):
            raise GradingError("grading needs Linux: it isolates programs by means of its kernel")
        self.owner = os.getpid()
        first_uid = (
            100_000 + self.owner % 20_000 * 128
        )  # users of their own, so that limits per user hold per program
        self.templates = {
            role: Template(role, first_uid + 64 * (role == "judge")) for role in ("program", "judge")
        }
        try:
            isolation = [template.hello() for template in self.templates.values()][0]
        except BaseException:
            self.close()
            raise
        self.isolation = ["own process group", "resource limits", *isolation]
        self.next_id, self.judges, self.idle = 0, {}, []
        self.selector = selectors.DefaultSelector()
        for template in self.templates.values():
            self.selector.register(template.control, selectors.EVENT_READ, template)

    def close(self):
        for template in self.templates.values():
            template.close()  # its children end with it

    def run(self, jobs, workers, done):
        """Grades jobs (dicts as of `as_job`), at most `workers` at a time; calls done(index, verdict) as each
        ends, in no order."""
        waiting, alone, active = deque(enumerate(jobs)), deque(), {}
        while waiting or alone or active:
            while waiting and len(active) < workers or not waiting and not active and alone:
                again = not waiting
                index, job = (waiting or alone).popleft()
                name, run = self.start(index, job, active, again)
                active[name] = run
                for other in active.values() if len(active) > 1 else ():
                    other.crowded = True
            soonest = min(run.deadline for run in active.values())
            for key, _ in self.selector.select(max(0.0, soonest - time.monotonic())):
                if isinstance(key.data, Template):
                    self.hear(key.data, active)
                else:
                    self.listen(key.data)
            for name, run in list(active.items()):
                if run.error:
                    raise GradingError(run.error)
                if run.verdict and len(run.exits) == run.programs:
                    del active[name]
                    if run.expired and not run.again and (run.crowded or run.program_cpu() > 1):
                        alone.append(
                            (run.index, run.job)
                        )  # its time may have gone to others: once more, alone
                    else:
                        done(run.index, self.conclude(run))
                elif time.monotonic() > run.deadline:
                    if run.expired or run.verdict:
                        raise GradingError("a process does not end although it was killed")
                    if run.crowded:  # it is tried again alone, and there it counts how much it computes
                        self.expire(run)
                        continue
                    # A program that computes may have waited for a core, one that sleeps has not: ask how far
                    # it has come, decide in `weigh`.
                    run.deadline += run.job["wall"]
                    run.clocks.clear()
                    self.templates["program"].send({"clock": f"{name}:0"})
                    self.templates["judge"].send({"clock": f"{run.judge.name}:judge", "for": name})

    def start(self, index, job, active, again):
        name, self.next_id = self.next_id, self.next_id + 1
        slot = min(set(range(len(active) + 1)) - {run.slot for run in active.values()})
        judge = self.idle.pop() if self.idle else self.new_judge()
        run = judge.run = Run(name, index, job, slot, judge, again)
        # The second one is for the part of the program that the tests' helpers come from.
        pairs = [socket.socketpair() for _ in range(run.programs)]
        try:
            for number, (_, program_end) in enumerate(pairs):
                request = {
                    "fork": f"{name}:{number}",
                    "slot": 2 * slot + number,
                    "memory": job["memory"],
                    "cpu": job["cpu"],
                }
                self.templates["program"].send(request, [program_end.fileno()])
            data = json.dumps(job).encode()
            data = struct.pack("!I", len(data)) + data
            sent = socket.send_fds(judge.sock, [data[:4096]], [judge_end.fileno() for judge_end, _ in pairs])
            judge.sock.sendall(data[sent:])
        except OSError as error:
            raise GradingError(f"the judge's process does not listen: {error}") from None
        finally:
            for pair in pairs:
                for link in pair:
                    link.close()
        return name, run

    def new_judge(self):
        name, self.next_id = self.next_id, self.next_id + 1
        mine, theirs = socket.socketpair()
        slot = min(set(range(len(self.judges) + 1)) - set(self.judges.values()))
        self.templates["judge"].send(
            {"fork": f"{name}:judge", "slot": slot, "memory": JUDGE_BYTES, "cpu": 0}, [theirs.fileno()]
        )
        theirs.close()
        mine.settimeout(START_SECONDS)
        judge = Judge(name, mine)
        self.judges[name] = slot
        self.selector.register(mine, selectors.EVENT_READ, judge)
        return judge

    def expire(self, run):
        if not run.expired and not run.verdict:
            run.expired, run.verdict = True, {"passed": False}
            self.finish(run)

    def drop_judge(self, judge):
        self.selector.unregister(judge.sock)
        judge.sock.close()  # it ends when its socket closes, or when it is killed
        judge.run = None
        self.templates["judge"].send({"kill": f"{judge.name}:judge"})

    def listen(self, judge):
        try:
            chunk = judge.sock.recv(1 << 16)
        except OSError:
            chunk = b""
        judge.data += chunk
        run = judge.run
        if run is None:  # an idle judge ended: none of our gradings is touched
            self.idle.remove(judge)
            self.drop_judge(judge)
        elif not chunk:
            run.judge_lost = True  # how it ended comes from its template, see `hear`
            self.finish(run)
        else:
            try:
                run.verdict = json.loads(judge.data)
            except ValueError:
                return  # more to come
            self.finish(run)

    def finish(self, run):
        """The judge has spoken or is gone: the program's processes are ended, the judge is kept for the next
        job if it is clean."""
        judge, run.judge.data = run.judge, b""
        run.deadline = time.monotonic() + END_SECONDS
        for number in range(run.programs):
            self.templates["program"].send({"kill": f"{run.name}:{number}"})
        if run.verdict is None or run.expired or run.verdict.get("used_up"):
            self.drop_judge(judge)
        else:
            judge.run, judge.clock = None, run.verdict["clock"]
            self.idle.append(judge)

    def hear(self, template, active):
        message = template.receive()
        name, who = message["id"].split(":")
        if who == "judge":
            if "error" in message:
                raise GradingError(message["error"])
            if "clock" in message:
                if message["for"] in active:
                    run = active[message["for"]]
                    self.weigh(run, "judge", message["clock"] - run.judge.clock)
                return
            self.judges.pop(int(name), None)
            for run in active.values():
                if run.judge_lost and run.judge.name == int(name):
                    if message["status"] not in (-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS):
                        raise GradingError(
                            f"the judge's process ended without a verdict (status {message['status']})"
                        )
                    run.verdict = {"passed": False, "detail": "the tests crashed on the program's answers"}
            return
        run = active.get(int(name))
        if run is None:
            return
        if "error" in message:
            run.error = message["error"]
        elif "clock" in message:
            self.weigh(run, "program", message["clock"])
        else:
            run.exits[int(who)] = message

    def weigh(self, run, who, seconds):
        """Decides at the wall limit, once the CPU times of program and judge are known, whether a run may go
        on."""
        run.clocks[who] = seconds
        if len(run.clocks) == 2:
            elapsed = time.monotonic() - run.started
            fair = min(
                1.0, (os.cpu_count() or 1) / max(os.getloadavg()[0], 0.1)
            )  # of a core, for each who wants one
            if (
                sum(run.clocks.values()) < 0.15 * fair * elapsed
                or elapsed > (MOST_WALLS - 0.5) * run.job["wall"]
            ):
                self.expire(run)

    def conclude(self, run):
        verdict, job = run.verdict, run.job
        if run.expired:
            return {"passed": False, "detail": f"timeout: over {job['wall']:g} s of wall time"}
        if "error" in verdict:
            raise GradingError(verdict["error"])
        if not verdict["passed"] and run.program_cpu() >= job["cpu"] - 0.1:
            verdict["detail"] = f"timeout: over {job['cpu']} s of CPU time"
        return {
            "passed": verdict["passed"] is True,
            "detail": verdict["detail"].encode("utf-8", "replace").decode(),
        }


_grader, _lock, _told = None, threading.RLock(), False


def shared_grader():
    """The process's grader, started when it is first needed (again after a fork, which must not share it)."""
    global _grader, _told
    if _grader is None or _grader.owner != os.getpid():
        _grader = Grader()
        if not _told:
            print(f"grading: isolation active: {', '.join(_grader.isolation)}", file=sys.stderr)
            _told = True
    return _grader


def close():
    """Ends the templates. The next grading starts new ones."""
    global _grader
    with _lock:
        if _grader is not None and _grader.owner == os.getpid():
            _grader.close()
        _grader = None


atexit.register(close)


def as_job(
    program,
    tests,
    entry_point,
    helpers="",
    wall_seconds=WALL_SECONDS,
    cpu_seconds=CPU_SECONDS,
    memory_bytes=MEMORY_BYTES,
):
    """Checks one item and puts it into the form that the judge reads."""
    tests = tests if isinstance(tests, str) else "\n".join(tests)
    if not tests.strip():
        raise GradingError("zero tests: `tests` is empty")
    if not isinstance(program, str) or not isinstance(entry_point, str) or not entry_point:
        raise GradingError("`program` and `entry_point` must be strings, the entry point not empty")
    name = entry_point
    if not entry_point.isidentifier():  # an expression such as Solution().order
        try:
            ast.parse(entry_point, mode="eval")
        except SyntaxError as error:
            raise GradingError(
                f"`entry_point` {entry_point!r} is no name and no expression: {error}"
            ) from None
        name = re.search(r"[A-Za-z_]\w*", entry_point)[0]
        program, entry_point = f"{program}\n\n{ENTRY_POINT} = {entry_point}\n", ENTRY_POINT
    if name == "Solution":
        program, helpers = [
            leetcode.SORTED + code if "sortedcontainers" in code else code for code in (program, helpers)
        ]
    called = set(re.findall(r"[A-Za-z_]\w*", tests))
    if not helpers and name == "Solution" and called & leetcode.NODE_NAMES:
        helpers, program = leetcode.NODES, leetcode.NODES + program  # lists and trees, as the site has them
    # Functions above the entry point that the tests call by name (HumanEval/32, /38, /50) are asked of a
    # process that holds that part of the program alone, so that what follows cannot change them.
    prefix = re.split(rf"^(?:def|class) {re.escape(name)}\b", program, maxsplit=1, flags=re.M)[0]
    above = (
        []
        if helpers
        else [found for found in re.findall(r"^def (\w+)\(", prefix, flags=re.M) if found in called]
    )
    return {
        "program": program,
        "tests": tests,
        "entry_point": entry_point,
        "helpers": helpers or "",
        "wall": wall_seconds,
        "cpu": cpu_seconds,
        "memory": memory_bytes,
        "helper_names": sorted(set(above)),
        "helper_source": prefix if above else "",
    }


def grade(program, tests, entry_point, **limits):
    """Runs `tests` against `program`.

    tests: source that defines check(candidate), or assert lines (one string or a list). entry_point: the name
    of what is tested, or an expression such as `Solution().order`. Keywords: helpers (trusted source whose
    functions the tests may call, e.g. a HumanEval prompt), wall_seconds, cpu_seconds, memory_bytes. Returns
    {"passed": bool, "detail": one line}. Raises GradingError when the tests are empty or do not compile, or a
    process cannot be started.
    """
    return grade_many(
        [{"program": program, "tests": tests, "entry_point": entry_point, **limits}],
        workers=1,
        progress=False,
    )[0]


def grade_many(items, workers=None, progress=True, on_result=None):
    """Grades items (dicts of `grade`'s arguments), `workers` at a time (default: one per core). Returns their
    verdicts in the order of items.

    on_result(index, verdict) is called as each is known, so that a caller can keep what was graded when a
    later item raises GradingError.
    """
    jobs = [as_job(**item) for item in items]
    verdicts, started, shown = [None] * len(jobs), time.monotonic(), 0.0
    if not jobs:
        return verdicts
    finished = 0

    def done(index, verdict):
        nonlocal finished, shown
        verdicts[index] = verdict
        finished += 1
        if on_result:
            on_result(index, verdict)
        now = time.monotonic()
        if progress and (now - shown > 0.2 or finished == len(jobs)):
            shown = now
            passed = sum(verdict["passed"] for verdict in verdicts if verdict)
            filled = 30 * finished // len(jobs)
            bar, rate = "#" * filled + "." * (30 - filled), finished / (now - started)
            line = f"\rgrading [{bar}] {finished}/{len(jobs)} passed {passed} {rate:.0f}/s"
            print(line, end="\n" if finished == len(jobs) else "", file=sys.stderr, flush=True)

    with _lock:
        try:
            shared_grader().run(jobs, max(1, min(workers or os.cpu_count() or 1, 32)), done)
        except BaseException:
            close()  # children of a run that was broken off must not outlive it
            raise
    return verdicts
