"""The judge's side: what the program defines is a proxy here, and the tests run on proxies and plain data."""

import ast
import builtins
import decimal
import gc
import importlib
import json
import os
import random
import socket
import struct
import sys
import time
import types
from collections import namedtuple

from .link import BUILTIN_ERRORS, Link, Malformed, NotTransferable, ProgramEnded
from .program import COMPARISONS

ENDING = ("SystemExit", "KeyboardInterrupt", "GeneratorExit")
MAX_REMEMBERED = 5000  # elements of containers whose identity is kept across calls, see Link
TESTS_MODULE = "__tests__"  # __name__ of the namespace in which the tests run


def _asking(what, expected):
    def method(self, *operands):
        return self._grader_ask(what, expected, *operands)

    return method


def _between_proxies(name):
    def method(self, other):
        # Both operands are the program's own, so nothing is disclosed. With a value of the tests the object
        # would learn what is expected.
        if not (isinstance(other, Proxy) and other._grader_link is self._grader_link):
            raise TypeError(
                f"{name} between an object of the program and a value of the tests: return plain data"
            )
        return self._grader_ask(
            name, bool if name in ("__lt__", "__le__", "__gt__", "__ge__") else None, other
        )

    return method


class Proxy:
    """A program's object as the tests see it. It can be used (called, read, iterated) but never decides
    whether it equals a value of the tests."""

    __slots__ = ("_grader_link", "_grader_number")

    def __init__(self, link, number):
        object.__setattr__(self, "_grader_link", link)  # its own __setattr__ is the program's
        object.__setattr__(self, "_grader_number", number)

    def _grader_ask(self, what, expected, *operands):
        answer = self._grader_link.request(what, self, *operands)
        if expected is not None and type(answer) is not expected:
            raise TypeError(
                f"the program's object answered {what} with {type(answer).__name__}, not {expected.__name__}"
            )
        return answer

    def __iter__(self):
        iterator = self._grader_ask("iter", None)
        return iterator if type(iterator) is IteratorProxy else iter(iterator)

    def __exit__(self, *error):
        self._grader_ask("exit", None)

    def __contains__(self, value):
        # Asking would tell the program the value that the tests look for, and take its word.
        raise TypeError(
            "`in` asks an object of the program about a value of the tests: return a plain container"
        )

    def __eq__(self, other):
        if self is other:
            return True
        if isinstance(other, Proxy) and other._grader_link is self._grader_link:
            return self._grader_ask("__eq__", None, other) is True
        return False

    def __hash__(self):
        return hash(Proxy)


# What is asked of the object, and the type that Python demands of the answer.
for _name, _what, _expected in (
    ("__getattr__", "getattr", None),
    ("__setattr__", "setattr", None),
    ("__delattr__", "delattr", None),
    ("__getitem__", "getitem", None),
    ("__setitem__", "setitem", None),
    ("__delitem__", "delitem", None),
    ("__len__", "len", int),
    ("__bool__", "bool", bool),
    ("__str__", "str", str),
    ("__repr__", "repr", str),
    ("__int__", "int", int),
    ("__float__", "float", float),
    ("__enter__", "enter", None),
):
    setattr(Proxy, _name, _asking(_what, _expected))
for _name in COMPARISONS:
    if _name != "__eq__":
        setattr(Proxy, _name, _between_proxies(_name))


class FunctionProxy(Proxy):
    __slots__ = ()

    def __call__(self, *arguments, **keywords):
        return self._grader_ask("call", None, arguments, tuple(keywords.items()))


class ClassProxy(FunctionProxy):
    __slots__ = ()

    def __instancecheck__(self, value):
        return isinstance(value, Proxy) and self._grader_link.request("isinstance", value, self) is True


class IteratorProxy(Proxy):
    __slots__ = ()

    def __iter__(self):
        return self

    def __next__(self):
        return self._grader_ask("next", None)


ROLES = {"function": FunctionProxy, "class": ClassProxy, "iterator": IteratorProxy, "object": Proxy}


class JudgeLink(Link):
    """The judge's end: the side that must not be fooled."""

    first_number = 0

    def __init__(self, sock, record_namespace):
        super().__init__(sock)
        self.record_namespace = record_namespace  # where classes that the tests define are found by name
        self.proxies, self.proxy_numbers, self.lent, self.named_tuples = {}, {}, [], {}
        self.uses, self.depth = 0, 0
        self.fatal = None  # why the program has failed whatever the tests do next

    def request(self, what, *operands):
        if self.fatal:
            raise ProgramEnded(self.fatal)
        self.uses += what not in ("load", "global", "forget")
        if self.depth == 0 and sum(map(len, self.seen.values())) > MAX_REMEMBERED and what != "forget":
            self.request("forget")
            self.forget()
        self.depth += 1
        try:
            return super().request(what, *operands)
        except StopIteration as stop:
            if what in ("next", "send"):
                raise
            # Out of a call it would end a map() or zip() of the tests early, as if there were nothing left to
            # check.
            raise RuntimeError(f"the program raised StopIteration: {stop}") from None
        except (ProgramEnded, Malformed) as error:
            self.fatal = self.fatal or str(error)
            raise ProgramEnded(self.fatal) from None
        finally:
            self.depth -= 1

    def rebuild(self, name, arguments):
        if name in ENDING or BUILTIN_ERRORS.get(name) is None:
            raise ProgramEnded(f"the program raised {name}")
        if type(arguments) is not tuple or not all(
            type(part) in (str, int, float, bool, type(None)) for part in arguments
        ):
            raise Malformed("an exception that is not plain data")
        error = super().rebuild(name, arguments)
        error.of_the_program = True
        return error

    def perform(self, what, *operands):
        number, arguments, keywords = operands
        if what != "callback":
            raise Malformed("the program asked for something else than a function that it was given")
        try:
            return self.lent[number](*arguments, **dict(keywords))
        except AssertionError:
            self.fatal = self.fatal or "an assertion failed in a function that the tests handed over"
            raise

    def pack_other(self, value):
        if isinstance(value, Proxy):
            if value._grader_link is not self:
                raise ProgramEnded("an object of the tests' helper cannot be handed to the program")
            return ["h", value._grader_number]
        if id(value) in self.proxy_numbers:
            return ["h", self.proxy_numbers[id(value)]]
        kind = type(value)
        if kind.__module__ == TESTS_MODULE and not isinstance(value, type) and hasattr(value, "__dict__"):
            return ["@", self.number(value, "R", kind.__name__)]
        if isinstance(value, BaseException):
            return ["x", *map(self.pack, self.describe(value))]
        module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
        if isinstance(value, types.BuiltinFunctionType) and isinstance(value.__self__, types.ModuleType):
            module = value.__self__.__name__
        if (
            isinstance(module, str)
            and isinstance(name, str)
            and module.split(".")[0] in sys.stdlib_module_names
            and "<" not in name
        ):
            return ["n", module, name]
        if hasattr(kind, "__next__"):
            self.lent.append(value.__next__)
            return ["I", len(self.lent) - 1]
        if callable(value):
            if value not in self.lent:
                self.lent.append(value)
            return ["F", self.lent.index(value)]
        raise NotTransferable(
            f"the tests hand over a {kind.__name__}, which cannot cross to the program's process"
        )

    def unpack_other(self, tag, data):
        if tag == "n":
            name, fields = str(data[1]), tuple(map(str, data[2]))
            if (name, fields) not in self.named_tuples:
                if len(self.named_tuples) >= 100:
                    raise Malformed("too many named tuples")
                self.named_tuples[name, fields] = namedtuple(name, fields, rename=True)
            return self.named_tuples[name, fields](*[self.unpack(part) for part in data[3]])
        if tag != "h" or type(data[1]) is not int:
            raise Malformed("the program's answer is not plain data")
        number, role = data[1], data[2]
        if number not in self.proxies:
            if role == "generator":
                proxy = self.generator(FunctionProxy(self, number))
            elif role == "coroutine":
                proxy = self.coroutine(FunctionProxy(self, number))
            else:
                proxy = ROLES[role](self, number)
            self.proxies[number] = proxy
            self.proxy_numbers[id(proxy)] = number
        return self.proxies[number]

    def generator(self, remote):
        value = None
        while True:
            try:
                item = remote._grader_ask("send", None, value)
            except StopIteration as stop:
                return stop.value
            value = yield item

    async def coroutine(self, remote):
        return remote._grader_ask("run", None)

    def new_record(self, name):
        kind = self.record_namespace.get(name)
        if not (isinstance(kind, type) and kind.__module__ == TESTS_MODULE):
            raise Malformed("an instance of a class that the tests do not define")
        return object.__new__(kind)


def can_fail(tree):
    """Whether the tests hold anything that can fail: an assert, a raise, or a call of an assert-like
    method."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Assert, ast.Raise)):
            return True
        if isinstance(node, ast.Call) and getattr(
            node.func, "attr", getattr(node.func, "id", "")
        ).lower().startswith(("assert", "fail")):
            return True
    return False


def imported_names(source, wanted):
    """Standard-library objects that the program's own top-level import statements bind to `wanted` names,
    imported here, not taken from the program."""
    found = {}
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return found
    for node in body:
        for alias in node.names if isinstance(node, (ast.Import, ast.ImportFrom)) else ():
            module = node.module if isinstance(node, ast.ImportFrom) else alias.name
            if getattr(node, "level", 0) or not module or module.split(".")[0] not in sys.stdlib_module_names:
                continue
            if alias.name != "*" and (alias.asname or alias.name.split(".")[0]) not in wanted:
                continue
            try:
                if isinstance(node, ast.Import):
                    whole = importlib.import_module(module)
                    values = (
                        {alias.asname: whole}
                        if alias.asname
                        else {module.split(".")[0]: sys.modules[module.split(".")[0]]}
                    )
                elif alias.name == "*":
                    space = vars(importlib.import_module(module))
                    values = {
                        name: space[name] for name in space.get("__all__", [n for n in space if n[0] != "_"])
                    }
                else:
                    values = {
                        alias.asname or alias.name: getattr(importlib.import_module(module), alias.name)
                    }
            except (ImportError, AttributeError):
                continue
            found.update({name: value for name, value in values.items() if name in wanted})
    return found


def judge(job, sock, helper_sock=None):
    """Runs the tests against the program behind `sock`. Returns {"passed", "detail"}, or {"error"} for what
    is not the program's fault.

    Names that the tests use and do not define mean, in this order: the entry point (always the program's),
    builtins, functions of `helpers` (trusted source, run here), standard-library modules, what the program
    imports from the standard library (imported here), functions that the program defines above its entry
    point (asked of a second process that holds only that part), and last the program's own.
    """
    entry_point, space = job["entry_point"], {"__name__": TESTS_MODULE, "__builtins__": builtins}
    try:
        tree = ast.parse(job["tests"])
        code = compile(tree, "<tests>", "exec", dont_inherit=True, optimize=0)
    except (SyntaxError, ValueError, RecursionError) as error:
        return {"error": f"the tests do not compile: {error}"}
    if not can_fail(tree):
        return {"error": "zero tests: nothing in the tests can fail"}
    top_level = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    if job["helpers"]:
        try:
            helper_space = dict(space)
            exec(compile(job["helpers"], "<helpers>", "exec", dont_inherit=True, optimize=0), helper_space)
        except Exception as error:
            return {"error": f"the helpers do not run: {type(error).__name__}: {error}"}
        space.update(
            {
                name: value
                for name, value in helper_space.items()
                if name not in (entry_point, "__name__", "__builtins__")
            }
        )
    used = {
        node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    }
    link = JudgeLink(sock, space)
    try:
        if link.receive()[0] != "ready":
            return {"error": "the program's process did not start"}
        if helper_sock:
            helper_link = JudgeLink(helper_sock, space)
            if helper_link.receive()[0] != "ready":
                return {"error": "the helper's process did not start"}
    except (ProgramEnded, Malformed) as error:
        return {"error": f"a process did not start: {error}"}
    links = [link]
    try:
        record_names = tuple(node.name for node in tree.body if isinstance(node, ast.ClassDef))
        unknown = sorted(
            name
            for name in used
            if name not in top_level
            and name not in space
            and (name == entry_point or not hasattr(builtins, name))
        )
        candidate, present = link.request("load", job["program"], (entry_point, *unknown), record_names)
        if type(present) is not tuple or entry_point not in present:
            return {"passed": False, "detail": f"NameError: the program does not define {entry_point}"}
        imports = None
        for name in unknown:
            if name in ("candidate", entry_point):
                space[name] = candidate
            elif name in sys.stdlib_module_names:
                space[name] = importlib.import_module(name)
            elif name in present:
                imports = imported_names(job["program"], set(unknown)) if imports is None else imports
                if name in imports:
                    space[name] = imports[name]
                elif name in job["helper_names"]:
                    if helper_link not in links:
                        helper_link.request("load", job["helper_source"], (name,), ())
                        links.append(helper_link)
                    space[name] = helper_link.request("global", name)
                else:
                    space[name] = link.request("global", name)
        exec(code, space)
        if "check" in top_level and isinstance(space["check"], types.FunctionType):
            space["check"](*[candidate] * min(1, space["check"].__code__.co_argcount))
        failure = None
    except NotTransferable as error:
        return {"error": str(error)}
    except ProgramEnded as error:
        failure = str(error)
    except BaseException as error:  # whatever stops the tests is a failure
        if isinstance(error, ImportError) and not hasattr(error, "of_the_program"):
            return {"error": f"the tests need what the judge does not have: {error}"}
        failure = explain(error, job["tests"])
    failure = next((each.fatal for each in links if each.fatal), None) or failure
    if failure is None and not any(each.uses for each in links):
        return {"error": "zero tests: the tests ended without using the program"}
    return {"passed": failure is None, "detail": failure or "all tests passed"}


def explain(error, tests):
    line, trace = None, error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == "<tests>":
            line = trace.tb_lineno
        trace = trace.tb_next
    try:
        text = " ".join(str(error).split())
    except BaseException:  # the text may be that of an object of the program, which is asked for it
        text = ""
    lines = tests.splitlines()
    where = f" at: {lines[line - 1].strip()}" if line and line <= len(lines) else ""
    return f"{type(error).__name__}{': ' + text if text else ''}{where}"[:300]


def run_judge(sock):
    """Runs job after job until the socket closes: a job with the program's socket (and the helper's) comes
    in, a verdict goes out.

    The tests are trusted and get a fresh namespace each. Where they leave a trace in the interpreter, the
    verdict says that this judge is used up.
    """
    gc.enable()
    before = interpreter_state()
    while True:
        data, descriptors, _, _ = socket.recv_fds(sock, 1 << 16, 4)
        if not data:
            return
        (size,) = struct.unpack("!I", data[:4])
        chunks = [data[4:]]
        while (size := size - len(chunks[-1])) > 0:
            chunks.append(sock.recv(min(size, 1 << 20)))
            if not chunks[-1]:
                return
        links = [socket.socket(fileno=fd) for fd in descriptors]
        random.seed(2)
        try:
            verdict = judge(json.loads(b"".join(chunks)), *links)
        except MemoryError:
            verdict = {"passed": False, "detail": "MemoryError while the tests ran", "used_up": True}
        for link in links:
            link.close()
        verdict["clock"] = time.process_time()
        verdict["used_up"] = verdict.get("used_up", False) or interpreter_state() != before
        sock.sendall(json.dumps(verdict).encode())


def interpreter_state():
    """What tests might change for those after them."""
    return (
        dict(vars(builtins)),
        sys.getrecursionlimit(),
        repr(decimal.getcontext()),
        os.getcwd(),
        sys.stdout,
        sys.stdin,
        len(os.environ),
        sys.gettrace(),
        [
            len(vars(sys.modules[name]))
            for name in ("math", "random", "copy", "itertools", "collections", "json", "re", "time")
        ],
    )
