"""Plain data between the judge and the program: what may cross, and the conversation in which it does."""

import builtins
import datetime
import decimal
import fractions
import json
import operator
import struct
from collections import Counter, OrderedDict, defaultdict, deque

MAX_MESSAGE = 32 << 20  # bytes; a larger answer fails the program before it can fill the judge's memory


class Malformed(Exception):
    """The other side sent something that is no message of ours: a forged or broken answer, counted as a
    failure of the program."""


class ProgramEnded(BaseException):
    """The program's process ended, or tried to (SystemExit, KeyboardInterrupt). No `except Exception` in the
    tests may swallow it."""


class NotTransferable(Exception):
    """The tests hand over an object that cannot cross: the grader's shortcoming, never counted against the
    program."""


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
FACTORIES = {
    kind.__name__: kind for kind in (int, float, str, bool, list, dict, set, tuple)
}  # of a defaultdict
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
ENCODE = json.JSONEncoder(separators=(",", ":")).encode  # made once: json.dumps makes an encoder per call
DAY, CLOCK = ("year", "month", "day"), ("hour", "minute", "second", "microsecond")
DATE_FIELDS = {
    datetime.date: DAY,
    datetime.time: CLOCK,
    datetime.datetime: DAY + CLOCK,
    datetime.timedelta: ("days", "seconds", "microseconds"),
}
DATES = {kind.__name__: kind for kind in DATE_FIELDS}


def contents(value, tag):
    """The elements of a mutable container as a flat list (keys and values in turn); equal lists by identity
    mean that it has not changed."""
    if tag in "lsq":
        return list(value)
    if tag == "y":
        return list(bytes(value))
    pairs = vars(value) if tag == "R" else value
    return [part for pair in list(pairs.items()) for part in pair]


class Link:
    """One end of the socket between judge and program.

    A message is [kind, value, definitions]: `definitions` lists every mutable container that the receiver has
    not seen or that has changed since, as [number, tag, elements, extra]; elsewhere a container is the number
    alone. So sharing, cycles and changes in place look the same on both sides, as in one process.
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
            definitions.append(
                [number, self.tags[number], [self.pack(part) for part in now], self.extras.get(number)]
            )
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
            kind, value, definitions = json.loads(data.decode())
            self.define(definitions)
            return kind, self.unpack(value)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError, ArithmeticError) as error:
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
        if kind in DATE_FIELDS and getattr(value, "tzinfo", None) is None:
            return ["T", kind.__name__, [getattr(value, name) for name in DATE_FIELDS[kind]]]
        if value is Ellipsis or value is NotImplemented:
            return ["e", str(value)]
        if isinstance(value, type) and BUILTIN_TYPES.get(value.__name__) is value:
            return ["k", value.__name__]
        return self.pack_other(value)

    def number(self, value, tag, extra=None):
        number = self.numbers.get(id(value))
        if number is None:
            if tag == "D":
                name = getattr(value.default_factory, "__name__", None)
                extra = name if FACTORIES.get(name) is value.default_factory else None
            elif tag == "q":
                extra = value.maxlen
            number = self.next_number
            self.next_number += 2
            self.remember(number, value, tag, extra)
            self.fresh.append(number)
        return number

    def remember(self, number, value, tag, extra):
        self.objects[number], self.numbers[id(value)] = value, number
        self.tags[number], self.extras[number] = tag, extra

    def forget(self):
        """Drops the identities of containers seen so far, so that a long test does not compare them all at
        every call."""
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
        # Empty containers first: definitions may refer to each other in circles.
        for number, tag, _, extra in definitions:
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
        # What may be hashed is filled first.
        for number, tag, parts, _ in sorted(definitions, key=lambda definition: definition[1] in "dsCOD"):
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

    # -- conversation: either side may ask the other while it answers (a function that was handed over is
    # called back)
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
        except BaseException as error:  # whatever the program raises crosses by name
            kind, result = "error", self.describe(error)
        self.send(kind, result)

    def describe(self, error):
        name = next(
            kind.__name__ for kind in type(error).__mro__ if BUILTIN_ERRORS.get(kind.__name__) is kind
        )
        plain = all(type(part) in (str, int, float, bool, type(None)) for part in error.args)
        try:
            return (name, tuple(error.args) if plain else (str(error),))
        except Exception:  # an exception whose text raises
            return (name, ())

    def rebuild(self, name, arguments):
        try:
            return BUILTIN_ERRORS[name](*arguments)
        except TypeError:  # an exception with a signature of its own, such as UnicodeDecodeError
            return BUILTIN_ERRORS[name].__new__(BUILTIN_ERRORS[name])
