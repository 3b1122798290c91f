"""Grades programs against tests so that no program can talk its way to a pass.

    >>> grade("def double(x):\n    return 2 * x\n", "assert double(4) == 8", "double")
    {'passed': True, 'detail': 'all tests passed'}

1. The program and the tests run in two fresh processes, forked from two warm templates that hold neither
   (`benchmark/grading/sandbox/`). Plain data crosses.
2. The verdict is formed in the judge's process, from comparisons made there, and comes back over a socket
   that the program does not have. A judge is trusted and serves job after job; a program's process is used
   once, then killed and waited for, with all that it started.
3. The CPU time of a program is limited, read from its own clock, and so its verdict does not depend on what
   else the machine does. The wall limit is for programs that wait. One that passes it is stopped and tried
   once more while no other program of ours runs, in no process of this user (`turns`), and before everything
   else that wants a core (real-time scheduling, where the kernel grants it). What it does then counts. Both
   tries end within twice the wall limit, not counting the wait for its turn.
4. Three outcomes: pass, fail, and `GradingError`, which is raised and never counted: the grader or the tests
   are at fault, not the program.
5. A program finds the standard library and what is installed in the site-packages of this interpreter, to
   read, without this project and what .pth files add. A program that fails because it lacks another package
   has its name in the verdict (`missing_package`). Numeric libraries get one thread. A scalar of numpy that a
   program returns counts as the number or string that it holds, an array stays an object of the program. The
   tests find the standard library alone.

What load may still change:
- a program that computes until a time on the clock uses less CPU time on a busy machine: one that ends
  between CPU and wall limit passes there and fails on an idle one;
- one whose CPU time comes within some percent of its limit: a core that is shared by hyperthreads or clocked
  down does less in a second. With a CPU limit above 0.9 of the wall limit, also one that needs about that;
- one whose threads or children do the work: they do not inherit the precedence;
- where the kernel grants no precedence (not root, a container without CAP_SYS_NICE), one that needs more CPU
  time than the cores have left: its second try gets up to twice the wall limit, so the verdict comes after
  three;
- other users' graders, and those in containers with a /tmp of their own, are not waited for.

Linux only. What the kernel grants (namespaces, landlock, seccomp, a user of its own) is used and said once on
standard error.
"""

import ast
import atexit
import json
import math
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
from benchmark.grading.turns import Turns

# The project is not on the templates' path: they import the folder sandbox/, found by its place, in an empty
# environment with a fixed hash seed.
BOOT = (
    "import sys; sys.path[0] = sys.argv[1]; from sandbox.template import main; "
    "del sys.path[0]; main(*sys.argv[2:])"
)
START_SECONDS = 60  # for a template to start; more means that something is wrong

END_SECONDS = 30  # for killed processes to be gone
WALL_SECONDS = 10.0
CPU_SECONDS = 9  # below the wall limit, so that endless loops end here, without a second try
# The kernel's own limit counts ticks, which fall on a program too often or too seldom on a busy machine.
CPU_BACKSTOP = 2  # times the limit; before that, a program's clock is looked at
BOTH_TRIES = 1.98  # times the wall limit; the rest of 2 is for ending them
MEMORY_BYTES = 2 << 30
ENTRY_POINT = "_entry_point"  # what an entry point that is an expression is called in the program
JUDGE_BYTES = 4 << 30
POLL_SECONDS = 0.005  # between two looks whether another process has ended its second try
# Pools of threads would count against the limit on processes, and wait for each other on a busy machine.
ONE_THREAD = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL", "NUMEXPR", "RAYON")}


class GradingError(RuntimeError):
    """Grading itself failed (tests that do not compile or are empty, a process that cannot start). Never a
    verdict on the program."""


class Run:
    """One grading under way. first_try: seconds that the try before this one took, None without one."""

    def __init__(self, name, index, job, slot, judge, first_try):
        self.name, self.index, self.job, self.slot, self.judge = name, index, job, slot, judge
        self.again = first_try is not None
        self.started = time.monotonic()
        self.deadline = self.started + job["wall"]
        if self.again:
            self.deadline = self.started + max(0.75 * job["wall"], BOTH_TRIES * job["wall"] - first_try)
        self.look = self.started + job["cpu"]  # when the program may have used up its CPU time
        self.verdict = None
        self.programs = 2 if job["helper_names"] else 1  # processes
        self.clocks = None  # who -> CPU seconds, asked for at the wall limit of a second try
        self.exits = {}  # number of the process -> report of the template
        self.stopped = None  # the limit that ended it: "wall" or "CPU"
        self.judge_lost = False
        self.error = None

    def lacked_core(self):
        """Whether it has not computed all the time, so that a second try may end otherwise."""
        return self.program_cpu() < min(self.job["cpu"], 0.95 * self.job["wall"])

    def program_cpu(self):
        """CPU seconds of the program's process."""
        return max((message["cpu"] for message in self.exits.values()), default=0.0)


class Judge:
    """A process that runs tests, one job after another; its socket brings back verdicts."""

    def __init__(self, name, sock):
        self.name, self.sock, self.data, self.run = name, sock, b"", None
        self.clock = 0.0  # its CPU seconds at the end of its last job


def installed():
    """The folders of installed packages, in the order in which this interpreter searches them."""
    return [place for place in sys.path if Path(place).name in ("site-packages", "dist-packages")]


class Template:
    """The owner's end of a template process: asks for children, hears of their end."""

    def __init__(self, role, first_uid):
        self.base = tempfile.mkdtemp(prefix="grading-")
        os.chmod(self.base, 0o711)
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # A new interpreter, not a fork: the caller may hold threads, a GPU, and the tests.
        self.process = subprocess.Popen(
            [sys.executable, *"-s -S -X utf8 -c".split(), BOOT, str(Path(__file__).parent), role]
            + [str(theirs.fileno()), str(first_uid), self.base]
            + (installed() if role == "program" else []),
            env={"PYTHONHASHSEED": "0", **ONE_THREAD},
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
        return message

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
        try:
            self.turns = Turns()
        except OSError as error:
            raise GradingError(f"no lock among grading processes: {error}") from None
        first_uid = (
            100_000 + self.owner % 20_000 * 128
        )  # users of their own, so that limits per user hold per program
        self.templates = {
            role: Template(role, first_uid + 64 * (role == "judge")) for role in ("program", "judge")
        }
        try:
            hello = [template.hello() for template in self.templates.values()][0]
        except BaseException:
            self.close()
            raise
        self.isolation = ["own process group", "resource limits", *hello["isolation"]]
        self.precedence = hello["precedence"]  # of second tries
        self.isolation += ["precedence of second tries"] if self.precedence else []
        self.next_id, self.judges, self.idle = 0, {}, []
        self.selector = selectors.DefaultSelector()
        for template in self.templates.values():
            self.selector.register(template.control, selectors.EVENT_READ, template)

    def close(self):
        for template in self.templates.values():
            template.close()  # its children end with it
        self.turns.close()

    def run(self, jobs, workers, done):
        """Grades jobs (dicts as of `as_job`), at most `workers` at a time; calls done(index, verdict) as each
        ends, in no order."""
        waiting, again, active = deque((index, job, None) for index, job in enumerate(jobs)), deque(), {}
        while waiting or again or active:
            while waiting and len(active) < workers and self.turns.enter(alone=False):
                self.start(*waiting.popleft(), active)
            if again and not waiting and not active and self.turns.enter(alone=True):
                self.start(*again.popleft(), active)
            if not active:  # another process has its second try
                time.sleep(POLL_SECONDS)
                continue
            soonest = min(min(run.deadline, run.look) for run in active.values())
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
                    if run.stopped == "wall" and not run.again and run.lacked_core():
                        again.append((run.index, run.job, time.monotonic() - run.started))
                    else:
                        done(run.index, self.conclude(run))
                elif time.monotonic() > run.deadline:
                    if run.verdict:
                        raise GradingError("a process does not end although it was killed")
                    self.pass_limit(run)
                elif time.monotonic() > run.look:
                    run.look = run.deadline
                    self.ask_programs(run)
            if not active:
                self.turns.leave()

    def pass_limit(self, run):
        """Stops a run at its wall limit, unless its second try may lack a core: then its clocks decide, see
        `weigh`."""
        if not run.again or self.precedence or run.clocks is not None:
            self.stop(run, "wall")
            return
        run.deadline, run.clocks = run.started + 2 * run.job["wall"], {}
        self.ask_programs(run)
        self.templates["judge"].send({"clock": f"{run.judge.name}:judge", "for": run.name})

    def ask_programs(self, run):
        """Asks for the CPU time of the program's processes, which `hear` gets."""
        for number in range(run.programs):
            self.templates["program"].send({"clock": f"{run.name}:{number}"})

    def start(self, index, job, first_try, active):
        """Starts a grading; first_try as in Run."""
        name, self.next_id = self.next_id, self.next_id + 1
        slot = min(set(range(len(active) + 1)) - {run.slot for run in active.values()})
        again = first_try is not None
        first = again and self.precedence  # before what else the machine does
        judge = self.idle.pop() if self.idle and not again else self.new_judge(first)
        run = judge.run = active[name] = Run(name, index, job, slot, judge, first_try)
        # The second one is for the part of the program that the tests' helpers come from.
        pairs = [socket.socketpair() for _ in range(run.programs)]
        try:
            for number, (_, program_end) in enumerate(pairs):
                request = {
                    "fork": f"{name}:{number}",
                    "slot": 2 * slot + number,
                    "memory": job["memory"],
                    "cpu": CPU_BACKSTOP * math.ceil(job["cpu"]),
                    "first": first,
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

    def new_judge(self, first=False):
        name, self.next_id = self.next_id, self.next_id + 1
        mine, theirs = socket.socketpair()
        slot = min(set(range(len(self.judges) + 1)) - set(self.judges.values()))
        request = {"fork": f"{name}:judge", "slot": slot, "memory": JUDGE_BYTES, "cpu": 0, "first": first}
        self.templates["judge"].send(request, [theirs.fileno()])
        theirs.close()
        mine.settimeout(START_SECONDS)
        judge = Judge(name, mine)
        self.judges[name] = slot
        self.selector.register(mine, selectors.EVENT_READ, judge)
        return judge

    def stop(self, run, limit):
        if not run.verdict:
            run.stopped, run.verdict = limit, {"passed": False, "detail": ""}
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
        job if it is clean and has no precedence."""
        judge, run.judge.data = run.judge, b""
        run.deadline, run.look = time.monotonic() + END_SECONDS, math.inf
        for number in range(run.programs):
            self.templates["program"].send({"kill": f"{run.name}:{number}"})
        if run.verdict is None or run.stopped or run.again or run.verdict.get("used_up"):
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
            seconds = message["clock"]
            if seconds >= run.job["cpu"]:
                self.stop(run, "CPU")
            elif not run.verdict:
                run.look = min(run.look, time.monotonic() + max(0.01, run.job["cpu"] - seconds))
            if who == "0":
                self.weigh(run, "program", seconds)
        else:
            run.exits[int(who)] = message

    def weigh(self, run, who, seconds):
        """Ends a second try at its wall limit, once the CPU times of program and judge are known, unless it
        computes and lacks a core."""
        if run.clocks is None:
            return
        run.clocks[who] = seconds
        if len(run.clocks) == 2:
            share = sum(run.clocks.values()) / (time.monotonic() - run.started)
            fair = min(1.0, (os.cpu_count() or 1) / max(os.getloadavg()[0], 0.1))  # for each who wants a core
            if not 0.15 * fair < share < 0.95:
                self.stop(run, "wall")

    def conclude(self, run):
        verdict, job = run.verdict, run.job
        if "error" in verdict:
            raise GradingError(verdict["error"])
        if run.stopped == "CPU" or run.program_cpu() > job["cpu"]:
            return {"passed": False, "detail": f"timeout: over {job['cpu']:g} s of CPU time"}
        if run.stopped:
            return {"passed": False, "detail": f"timeout: over {job['wall']:g} s of wall time"}
        detail = verdict["detail"].encode("utf-8", "replace").decode()
        missing = {"missing_package": verdict["missing_package"]} if "missing_package" in verdict else {}
        return {"passed": verdict["passed"] is True, "detail": detail, **missing}


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
    {"passed": bool, "detail": one line}, and "missing_package" where the program failed because it imports
    one that is not there. Raises GradingError when the tests are empty or do not compile, or a process cannot
    be started.
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
