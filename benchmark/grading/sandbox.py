"""The inside of the grader: what runs in the two processes of one grading. `benchmark/grading/grader.py` starts it; nothing
here is an interface.

1. A *template* process is started clean (a new interpreter, no environment, no tests, no threads), warms up its
   imports, shuts itself into whatever namespaces the kernel grants, and from then on only forks: one child per
   grading, used once.
2. The `program` template's child holds the program and never hears of the tests. The `judge` template's child holds
   the tests and runs them; what the program defines is present there only as proxies. Both templates run this file;
   they are two processes, so that neither memory holds the other's secret.
3. Plain data crosses (class Link): JSON with a tag for each exact builtin type, checked on arrival, no pickle. A
   program that forges messages can say nothing that it could not have said by returning a value. Objects that are
   not plain data stay where they are and cross as numbers.
4. Comparison happens in the judge on plain data. A program's object is never asked whether it equals something that
   belongs to the tests.

Standard library only, and no import of the rest of the project: the file is run by path in an interpreter that sees
nothing else.
"""

import _signal
import _socket
import ast
import builtins
import ctypes
import datetime
import decimal
import enum
import fractions
import functools
import gc
import importlib
import json
import operator
import os
import random
import resource
import select
import signal
import socket
import struct
import sys
import sysconfig
import time
import types
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple

# Imported once by the template, so that a child that imports them pays nothing. Each makes every fork dearer, so only
# what programs import often.
WARM = "bisect collections.abc contextlib copy heapq itertools math re string typing".split()

MAX_MESSAGE = 32 << 20  # bytes; a larger answer fails the program before it can fill the judge's memory
MAX_REMEMBERED = 5000  # elements of containers whose identity is kept across calls, see Link
FILE_BYTES = 16 << 20  # the largest file that a program may write
PROCESSES = 8  # processes and threads of a program
TESTS_MODULE = "__tests__"  # __name__ of the namespace in which the tests run


class Malformed(Exception):
    """The other side sent something that is no message of ours: a forged or broken answer, counted as a failure of
    the program."""


class ProgramEnded(BaseException):
    """The program's process ended, or tried to (SystemExit, KeyboardInterrupt). No `except Exception` in the tests
    may swallow it."""


class NotTransferable(Exception):
    """The tests hand over an object that cannot cross: the grader's shortcoming, never counted against the program."""


# ---------------------------------------------------------------- plain data across a socket

MUTABLE = {  # exact type -> tag; these have an identity that both sides know by a number
    list: "l",
    dict: "d",
    set: "s",
    bytearray: "y",
    deque: "q",
    Counter: "C",
    OrderedDict: "O",
    defaultdict: "D",
}
SHELLS = {tag: kind for kind, tag in MUTABLE.items()}
FACTORIES = {kind.__name__: kind for kind in (int, float, str, bool, list, dict, set, tuple)}  # of a defaultdict
BUILTIN_TYPES = {
    kind.__name__: kind
    for kind in vars(builtins).values()
    if isinstance(kind, type) and not issubclass(kind, BaseException)
}
BUILTIN_ERRORS = {
    kind.__name__: kind
    for kind in vars(builtins).values()
    if isinstance(kind, type) and issubclass(kind, BaseException)
}
ENCODE, SCAN = (
    json.JSONEncoder(separators=(",", ":")).encode,
    json.JSONDecoder().scan_once,
)  # made once: json.dumps makes an encoder per call
ENDING = ("SystemExit", "KeyboardInterrupt", "GeneratorExit")
DATES = {kind.__name__: kind for kind in (datetime.date, datetime.time, datetime.datetime, datetime.timedelta)}


def contents(value, tag):
    """The elements of a mutable container as a flat list (keys and values in turn); equal lists by identity mean
    that it has not changed."""
    if tag in "lsq":
        return list(value)
    if tag == "y":
        return list(bytes(value))
    pairs = vars(value) if tag == "R" else value
    return [part for pair in list(pairs.items()) for part in pair]


class Link:
    """One end of the socket between judge and program.

    A message is [kind, value, definitions]: `definitions` lists every mutable container that the receiver has not
    seen or that has changed since, as [number, tag, elements, extra]; elsewhere a container is the number alone. So
    sharing, cycles and changes in place look the same on both sides, as in one process.
    """

    first_number = 0

    def __init__(self, sock):
        self.sock, self.buffer = sock, bytearray()
        self.objects, self.numbers, self.seen, self.tags, self.extras = {}, {}, {}, {}, {}
        self.next_number = self.first_number
        self.fresh = []

    # -- bytes
    def send(self, kind, value):
        body = self.pack(value)
        for number, before in list(self.seen.items()):
            now = contents(self.objects[number], self.tags[number])
            if len(now) != len(before) or any(map(operator.is_not, now, before)):
                self.fresh.append(number)
        definitions = []
        while self.fresh:
            number = self.fresh.pop()
            now = contents(self.objects[number], self.tags[number])
            self.seen[number] = now
            definitions.append([number, self.tags[number], [self.pack(part) for part in now], self.extras.get(number)])
        data = ENCODE([kind, body, definitions]).encode()
        try:
            self.sock.sendall(struct.pack("!I", len(data)) + data)
        except OSError:
            raise ProgramEnded("the program's process ended") from None

    def read(self, size):
        while len(self.buffer) < size:
            try:
                chunk = self.sock.recv(1 << 16 if size < 1 << 16 else 1 << 20)
            except OSError:
                chunk = b""
            if not chunk:
                raise ProgramEnded("the program's process ended")
            self.buffer += chunk
        data = bytes(self.buffer[:size])
        del self.buffer[:size]
        return data

    def receive(self):
        (size,) = struct.unpack("!I", self.read(4))
        if size > MAX_MESSAGE:
            raise Malformed(f"an answer of {size} bytes is too large")
        data = self.read(size)
        try:
            text = data.decode()
            (kind, value, definitions), end = SCAN(text, 0)
            if end != len(text):
                raise Malformed("bytes behind the message")
            self.define(definitions)
            return kind, self.unpack(value)
        except (Malformed, ProgramEnded):
            raise
        except (
            ValueError,
            TypeError,
            LookupError,
            AttributeError,
            RecursionError,
            ArithmeticError,
            StopIteration,
        ) as error:
            raise Malformed(f"the program's answer is not plain data ({type(error).__name__})") from None

    # -- values to JSON
    def pack(self, value):
        kind = type(value)
        if value is None or kind is bool or kind is str or kind is float:
            return value
        if kind is int:
            return value if -(1 << 63) < value < 1 << 63 else ["i", hex(value)]
        if kind is tuple:
            return ["t", [self.pack(part) for part in value]]
        if kind in MUTABLE:
            return ["@", self.number(value, MUTABLE[kind])]
        if kind is frozenset:
            return ["z", [self.pack(part) for part in value]]
        if kind is bytes:
            return ["b", value.hex()]
        if kind is complex:
            return ["c", value.real, value.imag]
        if kind is range:
            return ["r", *map(self.pack, (value.start, value.stop, value.step))]
        if kind is slice:
            return ["/", *map(self.pack, (value.start, value.stop, value.step))]
        if kind is decimal.Decimal:
            return ["m", str(value)]
        if kind is fractions.Fraction:
            return ["f", self.pack(value.numerator), self.pack(value.denominator)]
        if (
            kind in (datetime.datetime, datetime.time)
            and value.tzinfo is None
            or kind in (datetime.date, datetime.timedelta)
        ):
            return ["T", kind.__name__, [getattr(value, name) for name in DATE_FIELDS[kind.__name__]]]
        if value is Ellipsis or value is NotImplemented:
            return ["e", str(value)]
        if isinstance(value, type) and BUILTIN_TYPES.get(value.__name__) is value:
            return ["k", value.__name__]
        return self.pack_other(value)

    def number(self, value, tag, extra=None):
        number = self.numbers.get(id(value))
        if number is None:
            if tag == "D":
                factory = value.default_factory
                extra = (
                    factory.__name__
                    if isinstance(factory, type) and FACTORIES.get(factory.__name__) is factory
                    else None
                )
            elif tag == "q":
                extra = value.maxlen
            number = self.next_number
            self.next_number += 2
            self.remember(number, value, tag, extra)
            self.fresh.append(number)
        return number

    def remember(self, number, value, tag, extra):
        self.objects[number], self.numbers[id(value)], self.tags[number], self.extras[number] = (
            value,
            number,
            tag,
            extra,
        )

    def forget(self):
        """Drops the identities of containers seen so far, so that a long test does not compare them all at every
        call."""
        for table in (self.objects, self.numbers, self.seen, self.tags, self.extras):
            table.clear()

    # -- JSON to values; every branch either builds an exact builtin type or raises
    def unpack(self, data):
        kind = type(data)
        if data is None or kind in (bool, str, float, int):
            return data
        if kind is not list:
            raise Malformed("the program's answer is not plain data")
        tag = data[0]
        if tag == "@":
            return self.objects[data[1]]
        if tag == "t":
            return tuple([self.unpack(part) for part in data[1]])
        if tag == "z":
            return frozenset([self.unpack(part) for part in data[1]])
        if tag == "i":
            return int(data[1], 16)
        if tag == "b":
            return bytes.fromhex(data[1])
        if tag == "c":
            return complex(float(data[1]), float(data[2]))
        if tag == "r":
            return range(*map(self.unpack, data[1:4]))
        if tag == "/":
            return slice(*map(self.unpack, data[1:4]))
        if tag == "m":
            return decimal.Decimal(data[1])
        if tag == "f":
            return fractions.Fraction(self.unpack(data[1]), self.unpack(data[2]))
        if tag == "T":
            return DATES[data[1]](*map(int, data[2]))
        if tag == "e":
            return {"Ellipsis": Ellipsis, "NotImplemented": NotImplemented}[data[1]]
        if tag == "k":
            return BUILTIN_TYPES[data[1]]
        return self.unpack_other(tag, data)

    def define(self, definitions):
        for (
            number,
            tag,
            _,
            extra,
        ) in definitions:  # empty containers first: definitions may refer to each other in circles
            if number not in self.objects:
                if type(number) is not int or number % 2 == self.first_number % 2:
                    raise Malformed("a container number of the wrong side")
                if tag == "R":
                    value = self.new_record(extra)
                elif tag == "q":
                    value = deque(maxlen=extra)
                elif tag == "D":
                    value = defaultdict(None if extra is None else FACTORIES[extra])
                else:
                    value = SHELLS[tag]()
                self.remember(number, value, tag, extra)
            elif self.tags[number] != tag:
                raise Malformed("a container changed its type")
        for number, tag, parts, _ in sorted(
            definitions, key=lambda definition: definition[1] in "dsCOD"
        ):  # what may be hashed is filled first
            value, parts = self.objects[number], [self.unpack(part) for part in parts]
            if tag == "l":
                value[:] = parts
            elif tag == "y":
                value[:] = bytes(parts)
            elif tag == "R":
                vars(value).clear()
                vars(value).update(zip(map(str, parts[::2]), parts[1::2]))
            else:
                value.clear()
                if tag == "q":
                    value.extend(parts)
                elif tag == "s":
                    value.update(parts)
                else:
                    for key, part in zip(parts[::2], parts[1::2]):
                        value[key] = part
            self.seen[number] = contents(value, tag)

    # -- conversation: either side may ask the other while it answers (a function handed over as an argument is called
    # back)
    def request(self, *what):
        self.send("request", what)
        while True:
            kind, value = self.receive()
            if kind == "value":
                return value
            if kind == "error":
                raise self.rebuild(*value)
            if kind != "request":
                raise Malformed("an answer of an unknown kind")
            self.answer(*value)

    def answer(self, what, *operands):
        try:
            kind, result = "value", self.perform(what, *operands)
        except (ProgramEnded, Malformed, NotTransferable):
            raise
        except BaseException as error:  # noqa: BLE001  whatever the program raises crosses by name
            kind, result = "error", self.describe(error)
        self.send(kind, result)

    def describe(self, error):
        name = next(kind.__name__ for kind in type(error).__mro__ if BUILTIN_ERRORS.get(kind.__name__) is kind)
        plain = all(type(part) in (str, int, float, bool, type(None)) for part in error.args)
        try:
            return (name, tuple(error.args) if plain else (str(error),))
        except Exception:  # noqa: BLE001  an exception whose text raises
            return (name, ())

    def rebuild(self, name, arguments):
        try:
            return BUILTIN_ERRORS[name](*arguments)
        except TypeError:  # an exception with a signature of its own, such as UnicodeDecodeError
            return BUILTIN_ERRORS[name].__new__(BUILTIN_ERRORS[name])


DATE_FIELDS = {
    "date": ("year", "month", "day"),
    "time": ("hour", "minute", "second", "microsecond"),
    "datetime": ("year", "month", "day", "hour", "minute", "second", "microsecond"),
    "timedelta": ("days", "seconds", "microseconds"),
}


# ---------------------------------------------------------------- the program's side

# what an instance of a subclass becomes: its value in the plain type, without whatever the subclass overrides
BASES = (
    (int, int.__index__),
    (float, float.__float__),
    (complex, complex.__pos__),
    (str, str.__str__),
    (bytes, bytes.__getitem__),
    (tuple, tuple),
    (list, list),
    (Counter, Counter),
    (OrderedDict, OrderedDict),
    (dict, dict),
    (set, set),
    (frozenset, frozenset),
    (bytearray, bytearray),
    (deque, deque),
)


class ProgramLink(Link):
    """The program's end. Nothing here guards anything: the program may rewrite it all and gains nothing."""

    first_number = 1

    def __init__(self, sock):
        super().__init__(sock)
        self.module = types.ModuleType("program")
        self.module.__file__ = "program.py"
        sys.modules["program"] = self.module  # dataclasses and typing look their module up
        self.kept, self.kept_numbers, self.record_classes = {}, {}, {}

    def pack_other(self, value, as_object=False):
        kind = type(value)
        if self.record_classes.get(kind.__name__) is kind and hasattr(value, "__dict__"):
            return ["@", self.number(value, "R", kind.__name__)]
        if not as_object:
            if isinstance(value, tuple) and hasattr(kind, "_fields"):
                return ["n", kind.__name__, list(kind._fields), [self.pack(part) for part in tuple(value)]]
            if not isinstance(value, enum.Enum) or isinstance(value, (int, str)):
                for base, plain in BASES:
                    if isinstance(value, base):
                        return self.pack(plain(value, slice(None)) if base is bytes else plain(value))
        number = self.kept_numbers.setdefault(id(value), len(self.kept))
        self.kept[number] = value
        if isinstance(value, type):
            role = "class"
        elif isinstance(value, types.GeneratorType):
            role = "generator"
        elif isinstance(value, types.CoroutineType):
            role = "coroutine"
        elif hasattr(kind, "__next__"):
            role = "iterator"
        else:
            role = "function" if callable(value) else "object"
        return ["h", number, role]

    def unpack_other(self, tag, data):
        if tag == "h":
            return self.kept[data[1]]
        if tag == "n":  # a function or class of the standard library, by name
            return functools.reduce(getattr, data[2].split("."), importlib.import_module(data[1]))
        if tag == "x":
            return self.rebuild(data[1], self.unpack(data[2]))
        number = data[1]

        def remote(*arguments, **keywords):
            return self.request("callback", number, arguments, tuple(keywords.items()))

        if tag == "I":
            remote_iterator = type("iterator", (), {"__iter__": lambda self: self, "__next__": lambda self: remote()})
            return remote_iterator()
        return remote

    def new_record(self, name):
        if name not in self.record_classes:
            own = vars(self.module).get(name)
            self.record_classes[name] = own if isinstance(own, type) else type(name, (), {})
        return object.__new__(self.record_classes[name])

    def perform(self, what, *operands):
        if what == "load":
            source, wanted, record_names = operands
            exec(compile(source, "<program>", "exec", dont_inherit=True, optimize=0), vars(self.module))
            for name in record_names:
                if isinstance(vars(self.module).get(name), type):
                    self.record_classes[name] = vars(self.module)[name]
            entry_point = vars(self.module).get(wanted[0])
            return entry_point, tuple(name for name in wanted if name in vars(self.module))
        if what == "global":
            return vars(self.module)[operands[0]]
        if what == "forget":
            return self.forget()
        if what == "call":
            function, arguments, keywords = operands
            result = function(*arguments, **dict(keywords))
            if isinstance(function, type) and type(result) is function:
                return Kept(result)
            return result
        if what == "run":  # a coroutine
            import asyncio

            return asyncio.run(operands[0])
        return OPERATIONS[what](*operands)

    def pack(self, value):
        return self.pack_other(value.value, as_object=True) if type(value) is Kept else super().pack(value)


class Kept:
    """Marks an object that the tests made by calling a class of the program: it stays there, even when it derives
    from list or dict."""

    def __init__(self, value):
        self.value = value


COMPARISONS = {
    f"__{name.strip('_')}__": getattr(operator, name)
    for name in "eq lt le gt ge add sub mul truediv floordiv mod pow matmul and_ or_ xor".split()
}
OPERATIONS = {
    "getattr": getattr,
    "setattr": setattr,
    "delattr": delattr,
    "getitem": operator.getitem,
    "setitem": operator.setitem,
    "delitem": operator.delitem,
    "len": len,
    "bool": bool,
    "str": str,
    "repr": repr,
    "int": int,
    "float": float,
    "iter": iter,
    "next": next,
    "isinstance": isinstance,
    "send": lambda generator, value: generator.send(value),
    "close": lambda generator: generator.close(),
    "enter": lambda manager: type(manager).__enter__(manager),
    "exit": lambda manager: type(manager).__exit__(manager, None, None, None),
    **COMPARISONS,
}


def run_program(sock):
    link = ProgramLink(sock)
    link.send("ready", None)
    sys.setrecursionlimit(1040)  # the default 1000 and our own frames
    gc.enable()
    while True:
        kind, value = link.receive()
        link.answer(*value)


# ---------------------------------------------------------------- the judge's side


class Proxy:
    """A program's object as the tests see it. It can be used (called, read, iterated) but never decides whether it
    equals a value of the tests."""

    __slots__ = ("_grader_link", "_grader_number")

    def __init__(self, link, number):
        object.__setattr__(self, "_grader_link", link)
        object.__setattr__(self, "_grader_number", number)

    def _grader_ask(self, what, expected, *operands):
        answer = self._grader_link.request(what, self, *operands)
        if expected is not None and type(answer) is not expected:
            raise TypeError(
                f"the program's object answered {what} with {type(answer).__name__}, not {expected.__name__}"
            )
        return answer

    def __getattr__(self, name):
        return self._grader_ask("getattr", None, name)

    def __setattr__(self, name, value):
        self._grader_ask("setattr", None, name, value)

    def __delattr__(self, name):
        self._grader_ask("delattr", None, name)

    def __getitem__(self, key):
        return self._grader_ask("getitem", None, key)

    def __setitem__(self, key, value):
        self._grader_ask("setitem", None, key, value)

    def __delitem__(self, key):
        self._grader_ask("delitem", None, key)

    def __len__(self):
        return self._grader_ask("len", int)

    def __bool__(self):
        return self._grader_ask("bool", bool)

    def __str__(self):
        return self._grader_ask("str", str)

    def __repr__(self):
        return self._grader_ask("repr", str)

    def __int__(self):
        return self._grader_ask("int", int)

    def __float__(self):
        return self._grader_ask("float", float)

    def __iter__(self):
        iterator = self._grader_ask("iter", None)
        return iterator if type(iterator) is IteratorProxy else iter(iterator)

    def __enter__(self):
        return self._grader_ask("enter", None)

    def __exit__(self, *error):
        self._grader_ask("exit", None)

    def __contains__(self, value):
        # Asking would tell the program the value that the tests look for, and take its word.
        raise TypeError("`in` asks an object of the program about a value of the tests: return a plain container")

    def __eq__(self, other):
        if self is other:
            return True
        if isinstance(other, Proxy) and other._grader_link is self._grader_link:
            return self._grader_ask("__eq__", None, other) is True
        return False

    def __ne__(self, other):
        return not self == other

    def __hash__(self):
        return hash(Proxy)


def _between_proxies(name):
    def method(self, other):
        # Both operands are the program's own, so nothing is disclosed. With a value of the tests the object would
        # learn what is expected.
        if not (isinstance(other, Proxy) and other._grader_link is self._grader_link):
            raise TypeError(f"{name} between an object of the program and a value of the tests: return plain data")
        return self._grader_ask(name, bool if name in ("__lt__", "__le__", "__gt__", "__ge__") else None, other)

    return method


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
            # Out of a call it would end a map() or zip() of the tests early, as if there were nothing left to check.
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
        raise NotTransferable(f"the tests hand over a {kind.__name__}, which cannot cross to the program's process")

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
    """Whether the tests hold anything that can fail: an assert, a raise, or a call of an assert-like method."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Assert, ast.Raise)):
            return True
        if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")).lower().startswith(
            ("assert", "fail")
        ):
            return True
    return False


def imported_names(source, wanted):
    """Standard-library objects that the program's own top-level import statements bind to `wanted` names, imported
    here, not taken from the program."""
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
                    values = {name: space[name] for name in space.get("__all__", [n for n in space if n[0] != "_"])}
                else:
                    values = {alias.asname or alias.name: getattr(importlib.import_module(module), alias.name)}
            except (ImportError, AttributeError):
                continue
            found.update({name: value for name, value in values.items() if name in wanted})
    return found


class MissingEntryPoint(Exception):
    pass


def judge(job, sock, helper_sock=None):
    """Runs the tests against the program behind `sock`. Returns {"passed", "detail"}, or {"error"} for what is not
    the program's fault.

    Names that the tests use and do not define mean, in this order: the entry point (always the program's), builtins,
    functions of `helpers` (trusted source, run here), standard-library modules, what the program imports from the
    standard library (imported here), functions that the program defines above its entry point (asked of a second
    process that holds only that part), and last the program's own.
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
        except Exception as error:  # noqa: BLE001
            return {"error": f"the helpers do not run: {type(error).__name__}: {error}"}
        space.update(
            {
                name: value
                for name, value in helper_space.items()
                if name not in (entry_point, "__name__", "__builtins__")
            }
        )
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
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
            if name not in top_level and name not in space and (name == entry_point or not hasattr(builtins, name))
        )
        candidate, present = link.request("load", job["program"], (entry_point, *unknown), record_names)
        if type(present) is not tuple or entry_point not in present:
            raise MissingEntryPoint(f"NameError: the program does not define {entry_point}")
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
    except MissingEntryPoint as error:
        failure = str(error)
    except BaseException as error:  # noqa: BLE001  whatever stops the tests is a failure
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
    except BaseException:  # noqa: BLE001  the text may be that of an object of the program, which is asked for it
        text = ""
    lines = tests.splitlines()
    where = f" at: {lines[line - 1].strip()}" if line and line <= len(lines) else ""
    return f"{type(error).__name__}{': ' + text if text else ''}{where}"[:300]


def run_judge(sock):
    """Runs job after job until the socket closes: a job with the program's socket (and the helper's) comes in, a
    verdict goes out.

    The tests are trusted and get a fresh namespace each. Where they leave a trace in the interpreter, the verdict
    says that this judge is used up.
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


def move_packages(old, new):
    """Packages that are imported already look for their modules below `new` instead of `old`."""
    for module in list(sys.modules.values()):
        places = getattr(module, "__path__", None)
        if isinstance(places, list):
            places[:] = [new + place[len(old) :] if place.startswith(old + os.sep) else place for place in places]


# ---------------------------------------------------------------- isolation

NEW_NS, NEW_UTS, NEW_IPC, NEW_USER, NEW_PID, NEW_NET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
libc = ctypes.CDLL(None, use_errno=True)
fork = ctypes.PyDLL(
    None
).fork  # without os.fork's handlers, which rewrite much memory in the child for threads that a template does not have

# System calls that a program has no business with, by number (x86_64, aarch64); None where the machine has none.
DENIED = {
    "socket": (41, 198),
    "connect": (42, 203),
    "bind": (49, 200),
    "listen": (50, 201),
    "accept": (43, 202),
    "accept4": (288, 242),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "execve": (59, 221),
    "execveat": (322, 281),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "reboot": (169, 142),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "quotactl": (179, 60),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "perf_event_open": (298, 241),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "acct": (163, 89),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "adjtimex": (159, 171),
    "personality": (135, 92),
    "iopl": (172, None),
    "ioperm": (173, None),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "memfd_create": (319, 279),
}
SIGNALS = {
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
}
FORKS = {"fork": (57, None), "vfork": (58, None)}
UNSHARE, SETNS, CLONE, CLONE3 = (272, 97), (308, 268), (56, 220), (435, 435)
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, audit architecture


def seccomp_program(allow_fork):
    """The filter as bytes of `struct sock_filter`, or None on a machine whose numbers are not listed.

    allow_fork: for a template whose children have a process namespace and a user of their own. It passes the two
    calls by which the template makes such namespaces (of its children, who lack the privilege, the kernel refuses
    them). Without it, no process can be made or signalled at all.
    """
    if os.uname().machine not in MACHINES or sys.maxsize < 1 << 32:
        return None
    column, architecture = MACHINES[os.uname().machine]
    load, jump_equal, jump_above, jump_any, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, refuse, missing = 0x7FFF0000, 0x80000000, 0x00050000 | 1, 0x00050000 | 38  # EPERM, ENOSYS
    rules = [(load, 0, 0, 4), (jump_equal, 1, 0, architecture), (give, 0, 0, kill), (load, 0, 0, 0)]
    if column == 0:
        rules += [(jump_above, 0, 1, 0x40000000), (give, 0, 0, refuse)]  # the x32 numbering of the same calls
    refused = dict(DENIED) if allow_fork else {**DENIED, **SIGNALS, **FORKS, "unshare": UNSHARE, "setns": SETNS}
    for numbers in refused.values():
        if numbers[column] is not None:
            rules += [(jump_equal, 0, 1, numbers[column]), (give, 0, 0, refuse)]
    rules += [
        (jump_equal, 0, 1, CLONE3[column]),
        (give, 0, 0, missing),
    ]  # its flags lie in memory, out of a filter's sight: libc falls back to clone
    namespaces = NEW_NS | NEW_UTS | NEW_IPC | NEW_USER | NEW_PID | NEW_NET | 0x02000000 | 0x80
    if allow_fork:
        rules += [
            (jump_equal, 0, 3, UNSHARE[column]),
            (load, 0, 0, 16),
            (jump_equal, 1, 0, NEW_PID),
            (give, 0, 0, refuse),
            (load, 0, 0, 0),
        ]
        rules += [
            (jump_equal, 0, 3, SETNS[column]),
            (load, 0, 0, 24),
            (jump_equal, 1, 0, NEW_PID),
            (give, 0, 0, refuse),
            (load, 0, 0, 0),
        ]
    tail = [(load, 0, 0, 16), (jump_any, 0, 1, namespaces & 0xFFFFFFFF), (give, 0, 0, refuse)]
    if not allow_fork:
        tail += [(jump_any, 1, 0, 0x10000), (give, 0, 0, refuse)]  # CLONE_THREAD: threads yes, processes no
    rules += [(jump_equal, 0, len(tail), CLONE[column]), *tail, (give, 0, 0, allow)]
    return b"".join(struct.pack("HBBI", *rule) for rule in rules)


def install_seccomp(program):
    """Returns whether the kernel took the filter."""
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
    return libc.prctl(22, 2, ctypes.c_char_p(header), 0, 0) == 0


class Landlock:
    """File access rules that need no privilege: read the standard library, write the own temporary directory,
    nothing else."""

    READ = 1 << 2 | 1 << 3  # read a file, list a directory

    def __init__(self):
        self.abi = libc.syscall(444, None, ctypes.c_size_t(0), ctypes.c_uint(1))

    def restrict(self, rules):
        """rules: (path, access or None for everything). Returns whether they are in force."""
        if self.abi < 1:
            return False
        files = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(self.abi, 16)) - 1
        attributes = struct.pack("QQQ", files, 3, 3 if self.abi >= 6 else 0)[
            : 8 if self.abi < 4 else 16 if self.abi < 6 else 24
        ]
        ruleset = libc.syscall(444, ctypes.c_char_p(attributes), ctypes.c_size_t(len(attributes)), ctypes.c_uint(0))
        if ruleset < 0:
            return False
        for path, access in rules:
            try:
                fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except OSError:
                continue
            access = files if access is None else access
            if not os.path.isdir(path):
                access &= 1 << 1 | 1 << 2 | (1 << 14 if self.abi >= 3 else 0)
            libc.syscall(
                445,
                ctypes.c_int(ruleset),
                ctypes.c_int(1),
                ctypes.c_char_p(struct.pack("=Qi", access, fd)),
                ctypes.c_uint(0),
            )
            os.close(fd)
        done = libc.syscall(446, ctypes.c_int(ruleset), ctypes.c_uint(0)) == 0
        os.close(ruleset)
        return done


def drop_capabilities():
    header = struct.pack("Ii", 0x20080522, 0)
    return libc.capset(ctypes.c_char_p(header), ctypes.c_char_p(b"\0" * 24)) == 0


class Template:
    """A warm process that forks single-use children on request."""

    def __init__(self, role, control, first_uid, base):
        self.role, self.control, self.first_uid, self.base = role, control, first_uid, base
        self.children, self.active = {}, []
        self.pid_namespace = None

    def enter(self):
        """Shuts this process into what the kernel grants; `self.active` says what that is."""
        uid, gid = os.geteuid(), os.getegid()
        if uid and libc.unshare(NEW_USER) == 0:
            for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
                with open(f"/proc/self/{name}", "w") as file:
                    file.write(text)
            self.active.append("user namespace")
        own_processes = libc.unshare(NEW_PID) == 0
        inner = os.fork()
        if inner:  # the outer half stays outside of the namespaces that the inner half opens, to clean up after it
            self.control.close()
            os.waitpid(inner, 0)
            remove(self.base)
            os._exit(0)
        libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # die with the outer half
        os.setsid()
        if own_processes:
            self.pid_namespace = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
            self.active.append("process namespace")
        else:
            libc.prctl(36, 1, 0, 0, 0)  # adopt orphans, so that they can be found and ended
        for flag, name in ((NEW_NET, "network namespace"), (NEW_IPC, "ipc namespace")):
            if libc.unshare(flag) == 0:
                self.active.append(name)
        library = sysconfig.get_path("stdlib")
        names = [name for name in os.listdir(library) if name not in ("site-packages", "dist-packages", "test")]
        readable = [os.path.join(library, name) for name in names]
        self.home = os.path.join(self.base, "runs")
        if (
            libc.unshare(NEW_NS) == 0 and libc.mount(None, b"/", None, 0x4000 | 0x40000, None) == 0
        ):  # recursive, private
            options = b"size=256m,nr_inodes=20000,mode=0711"
            if libc.mount(b"tmpfs", self.base.encode(), b"tmpfs", 2 | 4, options) == 0:  # nosuid, nodev
                self.active.append("mount namespace")
                inside = os.path.join(self.base, "library")
                os.mkdir(inside)
                # The interpreter may live where only its owner may look (/root), so the library is shown again inside.
                if libc.mount(library.encode(), inside.encode(), None, 0x1000 | 0x4000, None) == 0:
                    sys.path[:] = [inside, os.path.join(inside, "lib-dynload")]
                    move_packages(library, inside)
                    readable += [os.path.join(inside, name) for name in names]
                libc.mount(b"tmpfs", b"/proc", b"tmpfs", 1 | 2 | 4, b"size=4k")
        os.mkdir(self.home, 0o711)
        self.drop = uid == 0 and self.probe(self.can_drop)
        self.active += ["unprivileged user"] if self.drop else []
        # Where descendants cannot be both counted and ended with certainty, a program may not fork.
        self.filter = seccomp_program(allow_fork=self.pid_namespace is not None and self.drop)
        self.landlock = Landlock()
        libc.prctl(4, 0, 0, 0, 0)  # not dumpable: /proc/<pid> of judge and templates is closed to others
        libc.prctl(38, 1, 0, 0, 0)  # no new privileges
        readable += ["/lib", "/lib64", "/usr/lib", "/usr/share/zoneinfo", "/dev/urandom", "/dev/zero"]
        rules = [(path, Landlock.READ) for path in readable] + [
            (library, 1 << 3),
            (os.path.join(self.base, "library"), 1 << 3),
        ]
        if self.landlock.restrict([*rules, (self.home, None), ("/dev/null", None)]):
            self.active.append("landlock")
        else:
            self.landlock.abi = 0
        if self.filter and self.probe(lambda: install_seccomp(self.filter)):
            self.active.append("seccomp")
            if self.drop and self.pid_namespace is not None:
                install_seccomp(self.filter)  # once, for all children
                self.filter = None
        else:
            self.filter = None
        if self.pid_namespace is None and not self.filter:
            raise OSError(
                "the kernel grants neither namespaces nor seccomp: a program could end the grader, so none is run"
            )
        if self.drop:
            os.setgroups([])
        for name, value in (
            ("FSIZE", FILE_BYTES),
            ("NOFILE", 64),
            ("CORE", 0),
            ("NPROC", PROCESSES if self.drop else None),
            ("STACK", 64 << 20),
        ):
            kind = getattr(resource, f"RLIMIT_{name}")
            hard = resource.getrlimit(kind)[1]
            if value is not None:
                value = value if hard == resource.RLIM_INFINITY else min(value, hard)
                resource.setrlimit(kind, (value, hard if name == "STACK" else value))
        os.umask(0o077)

    def probe(self, attempt):
        """Whether `attempt` works, tried in a child because it cannot be undone."""
        pid = os.fork()
        if pid == 0:
            done = False
            try:
                done = attempt()
            finally:
                os._exit(0 if done else 1)
        return os.waitpid(pid, 0)[1] == 0

    def can_drop(self):
        uid = self.first_uid
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        return all(os.access(os.path.join(folder, "os.py"), os.R_OK) for folder in sys.path[:1])

    def serve(self):
        """Forks on request until the control socket closes. Requests: {"fork": id, "slot", "memory", "cpu"} with a
        socket, {"kill": id}, {"clock": id}."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        os.set_blocking(reader, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        self.report({"hello": self.role, "isolation": self.active})
        while True:
            ready, _, _ = select.select([self.control, reader], [], [])
            if reader in ready:
                try:
                    os.read(reader, 4096)
                except BlockingIOError:
                    pass
                self.reap()
            if self.control in ready:
                data, descriptors, _, _ = socket.recv_fds(self.control, 1 << 16, 8)
                if not data:
                    return
                request = json.loads(data)
                if "fork" in request:
                    self.fork(request, descriptors)
                elif request.get("kill") in self.children:
                    self.kill(self.children[request["kill"]][0])
                elif "clock" in request:
                    pid = self.children.get(request["clock"], (None,))[0]
                    seconds = (
                        time.clock_gettime(~pid << 3 | 2) if pid else 0.0
                    )  # the CPU-time clock of another process, see clock_getcpuclockid(3)
                    self.report({"id": request["clock"], "clock": seconds, "for": request.get("for")})
                for fd in descriptors:
                    os.close(fd)

    def report(self, message):
        self.control.send(json.dumps(message).encode())

    def fork(self, request, descriptors):
        folder = os.path.join(self.home, f"{request['slot']}")
        uid = self.first_uid + request["slot"]
        try:
            os.mkdir(folder, 0o700)
            if self.drop:
                os.chown(folder, uid, uid)
            if self.pid_namespace is not None:
                if libc.setns(self.pid_namespace, NEW_PID) or libc.unshare(NEW_PID):
                    raise OSError(ctypes.get_errno(), "no process namespace")
            pid = fork()
            if pid < 0:
                raise OSError("fork failed")
        except OSError as error:
            self.report({"id": request["fork"], "error": f"{self.role} process did not start: {error}"})
            return
        if pid == 0:
            code = 1
            try:
                code = self.child(request, descriptors[0], folder, uid)
            finally:
                os._exit(code or 0)
        self.children[request["fork"]] = (pid, folder)

    def child(self, request, descriptor, folder, uid):
        # Little is done here, and in few lines: what can be inherited was set up in the template, and every page that
        # is written is copied.
        _signal.set_wakeup_fd(-1)
        _signal.signal(_signal.SIGCHLD, _signal.SIG_DFL)
        os.setsid()
        os.dup2(descriptor, 3)
        os.closerange(4, 1024)
        os.chdir(folder)
        resource.setrlimit(resource.RLIMIT_AS, (request["memory"], request["memory"]))
        if request["cpu"]:
            resource.setrlimit(resource.RLIMIT_CPU, (request["cpu"], request["cpu"]))
        if self.drop:
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
        else:
            drop_capabilities()
            if self.landlock.abi:
                self.landlock.restrict([("/", Landlock.READ), ("/dev/null", None), (folder, None)])
            libc.prctl(4, 0, 0, 0, 0)  # a change of user has done it already
        if self.filter and not install_seccomp(self.filter):
            return 1
        sock = (
            _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, 3)
            if self.role == "program"
            else socket.socket(fileno=3)
        )
        try:
            (run_program if self.role == "program" else run_judge)(sock)
        except ProgramEnded:
            pass
        return 0

    def kill(self, pid):
        for end in (
            lambda: os.kill(pid, signal.SIGKILL),
            lambda: self.pid_namespace is None and os.killpg(pid, signal.SIGKILL),
        ):
            try:
                end()
            except (ProcessLookupError, PermissionError):
                pass

    def reap(self):
        known = {pid: name for name, (pid, _) in self.children.items()}
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            if pid not in known or known[pid] not in self.children:
                continue  # an orphan that was adopted
            if self.pid_namespace is None:
                self.kill(pid)  # the rest of its group
                self.end_orphans()
            name = known[pid]
            _, folder = self.children.pop(name)
            try:
                remove(folder)
            except (
                OSError
            ):  # what resists is put aside, so that the slot's name is free again; it goes when the template goes
                os.rename(folder, f"{folder}.{os.urandom(8).hex()}")
            seconds = usage.ru_utime + usage.ru_stime
            self.report(
                {
                    "id": name,
                    "role": self.role,
                    "status": os.waitstatus_to_exitcode(status),
                    "cpu": seconds,
                    "kilobytes": usage.ru_maxrss,
                    "faults": usage.ru_minflt,
                }
            )

    def end_orphans(self):
        """Without a process namespace a descendant may have left its group: as adopted children they are found here."""
        try:
            with open(f"/proc/self/task/{os.getpid()}/children") as file:
                adopted = set(map(int, file.read().split())) - {pid for pid, _ in self.children.values()}
        except OSError:
            return
        for pid in adopted:
            self.kill(pid)

    def close(self):
        for pid, _ in self.children.values():
            self.kill(pid)


def remove(folder):
    """Deletes a tree that a program may have made very deep or closed to others: level by level, without recursion
    or long paths."""
    count = 0
    os.chmod(folder, 0o700)
    while names := os.listdir(folder):
        for name in names:
            path = os.path.join(folder, name)
            if not os.path.isdir(path) or os.path.islink(path):
                os.unlink(path)
                continue
            os.chmod(path, 0o700)
            for inner in os.listdir(path):  # its children move up one level, so that it is empty
                inner_path = os.path.join(path, inner)
                if os.path.isdir(inner_path) and not os.path.islink(inner_path):
                    os.chmod(inner_path, 0o700)  # moving a folder rewrites its link to the parent
                    count += 1
                    os.rename(inner_path, os.path.join(folder, f".{count}.{os.urandom(4).hex()}"))
                else:
                    os.unlink(inner_path)
            os.rmdir(path)
    os.rmdir(folder)


def main(role, control_fd, first_uid, base):
    control = socket.socket(fileno=control_fd)
    for name in WARM:
        importlib.import_module(name)
    template = Template(role, control, first_uid, base)
    try:
        template.enter()
    except OSError as error:
        control.send(json.dumps({"error": f"the {role} template cannot start: {error}"}).encode())
        return
    os.dup2(1, 2)  # the owner reads standard error only until here
    try:
        gc.disable()
        gc.collect()
        gc.freeze()  # children share these pages; collecting them would copy every one
        template.serve()
    except OSError:
        pass  # the owner is gone
    finally:
        template.close()


if __name__ == "__main__":
    main(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])  # argv[1] is this file, see BOOT in grading.py
