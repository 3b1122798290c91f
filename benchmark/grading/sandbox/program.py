"""The program's side: holds the program, answers the judge, and never hears of the tests."""

import enum
import functools
import gc
import importlib
import operator
import sys
import types
from collections import Counter, OrderedDict, deque

from .link import Link

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
            remote_iterator = type(
                "iterator", (), {"__iter__": lambda self: self, "__next__": lambda self: remote()}
            )
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
    """Marks an object that the tests made by calling a class of the program: it stays there, even when it
    derives from list or dict."""

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
