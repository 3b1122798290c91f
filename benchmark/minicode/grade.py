"""Grades programs of the embedded world by running them, many per process where that is safe."""

import ast
import builtins
import inspect
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import warnings

# Programs of the world and their near neighbours are run, many per process, by a worker that offers nothing
# but these names. They cannot import, reach an attribute that is not a plain container method, or build a
# string, so that no program can touch the worker or the next program. Everything else goes to the full
# sandbox, a process per program.
SAFE_BUILTINS = frozenset(
    "abs all any bool dict divmod enumerate filter float frozenset int len list map max min pow range "
    "reversed round "
    "set sorted sum tuple zip".split()
)
SAFE_METHODS = frozenset(
    "add append clear copy count difference discard extend fromkeys get index insert intersection items keys "
    "pop "
    "remove reverse setdefault sort union update values".split()
)
SAFE_NODES = frozenset(
    getattr(ast, name)
    for name in (
        "arguments arg Return Assign AugAssign Delete For While If Expr Pass Break Continue BoolOp BinOp "
        "UnaryOp Lambda "
        "IfExp Dict Set ListComp SetComp DictComp GeneratorExp Compare Call keyword Subscript Starred List "
        "Tuple Slice "
        "comprehension Load Store Del And Or Add Sub Mult Div FloorDiv Mod Pow LShift RShift BitOr BitXor "
        "BitAnd Invert "
        "Not UAdd USub Eq NotEq Lt LtE Gt GtE Is IsNot In NotIn"
    ).split()
)
BUILTIN_NAMES = frozenset(dir(builtins))
CPU_SECONDS = 0.5  # per program, for all its tests; programs of the world take microseconds
WALL_SECONDS = 60  # per chunk, only for a worker that waits without computing
MEMORY_BYTES = 512 * 2**20
CHUNK = 64  # programs sent to the worker at once
LONGEST_PROGRAM = 2000  # characters; longer ones go to the full sandbox


def is_plain(program, entry_point):
    """True when `program` may run in the shared worker, False when it needs the full sandbox.

    Raises SyntaxError or ValueError when it is no Python program.
    """
    if len(program) > LONGEST_PROGRAM:
        return False
    try:
        tree = ast.parse(program)
    except (RecursionError, MemoryError):  # nested too deeply for this process to judge
        return False
    if len(tree.body) != 1 or type(tree.body[0]) is not ast.FunctionDef or tree.body[0].name != entry_point:
        return False
    if tree.body[0].decorator_list:
        return False
    stack = list(ast.iter_child_nodes(tree.body[0]))
    while stack:
        node = stack.pop()
        kind = type(node)
        if kind is list:
            stack.extend(node)
        elif kind is ast.Name:
            # A name that is no builtin is local or undefined; either way it behaves here as it would
            # anywhere.
            if node.id.startswith("__") or node.id in BUILTIN_NAMES and node.id not in SAFE_BUILTINS:
                return False
        elif kind is ast.Attribute:
            if node.attr not in SAFE_METHODS or type(node.ctx) is not ast.Load:
                return False
            stack.append(node.value)
        elif kind is ast.Constant:
            if type(node.value) not in (int, bool, float, type(None)):
                return False
        elif kind in SAFE_NODES:
            stack.extend([getattr(node, field) for field in node._fields])
        elif kind not in (str, int, type(None)):  # names of arguments and flags are not nodes
            return False
    return True


def _serve():
    """Body of the worker process, which imports nothing of ours: answers chunks of [program, entry_point,
    inputs].

    For each program one line: the list of the outputs' reprs, or the name of the exception. A program that
    exceeds its CPU time ends the process (SIGPROF, also inside one long C call); the parent then knows which
    one it was.
    """
    import builtins
    import json
    import os
    import resource
    import signal
    import sys

    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    limits = json.loads(requests.readline())
    for kind, limit in (("RLIMIT_AS", limits["memory"]), ("RLIMIT_FSIZE", 0), ("RLIMIT_CORE", 0)):
        try:
            resource.setrlimit(getattr(resource, kind), (limit, limit))
        except (ValueError, OSError):  # macOS refuses RLIMIT_AS
            pass
    safe = {name: getattr(builtins, name) for name in limits["builtins"]}
    sys.setrecursionlimit(400)
    replies.write(b"ready\n")
    replies.flush()
    for line in requests:
        for program, entry_point, inputs in json.loads(line):
            signal.setitimer(signal.ITIMER_PROF, limits["cpu"])
            try:
                namespace = {"__builtins__": dict(safe)}
                exec(compile(program, "program", "exec"), namespace)
                function = namespace[entry_point]
                reply = [repr(function(value))[:2000] for value in inputs]
            except BaseException as error:
                reply = type(error).__name__
            namespace = function = None
            signal.setitimer(signal.ITIMER_PROF, 0)
            replies.write(json.dumps(reply).encode() + b"\n")
            replies.flush()


WORKER_SOURCE = (
    inspect.getsource(_serve) + "\n_serve()\n"
)  # read now: an edit of this file must not change a run


def _start_worker():
    """A fresh interpreter with an empty environment that holds only `_serve`."""
    environment = {key: os.environ[key] for key in ("LD_LIBRARY_PATH",) if key in os.environ}
    worker = subprocess.Popen(
        [sys.executable, "-I", "-S", "-W", "ignore", "-c", WORKER_SOURCE],
        cwd="/",
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    limits = {"memory": MEMORY_BYTES, "cpu": CPU_SECONDS, "builtins": sorted(SAFE_BUILTINS)}
    try:
        worker.stdin.write(json.dumps(limits).encode() + b"\n")
        worker.stdin.flush()
        ready = worker.stdout.readline()
    except BrokenPipeError:
        ready = b""
    if ready != b"ready\n":
        raise RuntimeError(
            f"the grading worker did not start (exit status {_stop(worker)}): nothing was graded"
        )
    return worker


def _stop(worker):
    """Kill the worker's process group, wait, and return the exit status (minus the signal that ended it)."""
    worker.stdout.close()
    try:
        worker.stdin.close()
    except BrokenPipeError:
        pass
    try:
        return worker.wait(
            timeout=5
        )  # it ends by itself once its input is closed, unless it is stuck in a program
    except subprocess.TimeoutExpired:
        os.killpg(worker.pid, signal.SIGKILL)
        return worker.wait()


def _execute(jobs):
    """Answers of the worker to jobs (program, entry_point, inputs), in order; "killed" for a program that
    ended it."""
    answers, alone = [], False
    worker = _start_worker()
    try:
        while len(answers) < len(jobs):
            chunk = jobs[len(answers) : len(answers) + (1 if alone else CHUNK)]
            timer = threading.Timer(WALL_SECONDS, worker.kill)
            timer.start()
            replies = []
            try:
                worker.stdin.write(json.dumps(chunk).encode() + b"\n")
                worker.stdin.flush()
                for line in itertools.islice(worker.stdout, len(chunk)):
                    if line.endswith(b"\n"):
                        replies.append(json.loads(line))
            except BrokenPipeError:
                pass
            finally:
                timer.cancel()
            answers += replies
            if len(replies) == len(chunk):
                alone = False
                continue
            # The first program without an answer ended the worker. Out of CPU time: it fails. Ended by
            # something else (the machine stalled or ran out of memory): one more chance, alone.
            if _stop(worker) == -signal.SIGPROF or alone:
                answers.append("killed")
                alone = False
            else:
                alone = True
            worker = _start_worker()
    finally:
        _stop(worker)
    return answers


def grade_fast(prompts, responses, rows, stats=None):
    """For each i whether the program prompts[i] + responses[i] passes the tests of rows[i]: a list of bools.

    Programs run in separate processes; only plain data comes back and is compared here, and the expected
    outputs never leave this process. Equal programs on equal tests run once. `stats`, a dict, receives the
    counts `programs`, `distinct`, `sandboxed` (graded by `benchmark.grading`, about a hundred times slower)
    and `killed`.
    """
    if not len(prompts) == len(responses) == len(rows):
        raise ValueError(
            f"prompts, responses and rows differ in length: {len(prompts)}, {len(responses)}, {len(rows)}"
        )
    keys = [(prompt + response, row["tests"]) for prompt, response, row in zip(prompts, responses, rows)]
    verdicts, fast, slow = {}, {}, {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the programs, for example "is" with a literal
        for key, row in zip(keys, rows):
            if key in verdicts:
                continue
            if not row["inputs"] or len(row["inputs"]) != len(row["outputs"]):
                raise ValueError(f"{row['task_id']}: needs at least one test and as many inputs as outputs")
            verdicts[key] = False
            try:
                (fast if is_plain(key[0], row["entry_point"]) else slow)[key] = row
            except (SyntaxError, ValueError):
                pass  # not a Python program
    jobs = [(program, row["entry_point"], row["inputs"]) for (program, _), row in fast.items()]
    answers = _execute(jobs) if jobs else []
    for (key, row), answer in zip(fast.items(), answers):
        verdicts[key] = answer == [repr(output) for output in row["outputs"]]
    if slow:
        from benchmark.grading import grade

        for key, row in slow.items():
            verdicts[key] = bool(grade(key[0], row["tests"], row["entry_point"])["passed"])
    if stats is not None:
        stats.update(
            programs=len(keys), distinct=len(verdicts), sandboxed=len(slow), killed=answers.count("killed")
        )
    return [verdicts[key] for key in keys]


def oracle(prompts, responses, rows):
    """The actual score as a reward: 1.0 where the program passes its tests, else 0.0."""
    return [float(passed) for passed in grade_fast(prompts, responses, rows)]
