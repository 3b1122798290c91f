"""What LeetCode gives every program: imports, linked lists and binary trees, and the classes that a prompt
describes."""

import ast
import re
import textwrap

# The builtins come last, because math and operator have another pow.
IMPORTS = "".join(
    f"from {module} import *\n"
    for module in (
        "typing collections itertools functools heapq bisect math string operator datetime random copy re "
        "builtins"
    ).split()
) + (
    "import bisect, collections, copy, datetime, functools, heapq, itertools, math, operator, random\n"
    "import re, string, sys\n"
    "inf = math.inf\n"
)

# The names and the behaviour are those of newfacade/LeetCodeDataset, whose tests call them.
NODES = '''
class ListNode:
    def __init__(self, val=0, next=None):
        self.val = val
        self.next = next


class TreeNode:
    def __init__(self, val=0, left=None, right=None):
        self.val = val
        self.left = left
        self.right = right


def list_node(values):
    head = None
    for value in reversed(values or ()):
        head = ListNode(value, head)
    return head


def tree_node(values):
    """Values level by level; the children of a missing node are left out."""
    nodes = [None if value is None else TreeNode(value) for value in values or ()]
    children = iter(nodes[1:])
    for node in nodes:
        if node is not None:
            node.left, node.right = next(children, None), next(children, None)
    return nodes[0] if nodes else None


def is_same_list(one, other):
    while one is not None and other is not None:
        if not one.val == other.val:
            return False
        one, other = one.next, other.next
    return one is None and other is None


def is_same_tree(one, other):
    pairs = [(one, other)]
    while pairs:
        one, other = pairs.pop()
        if one is None and other is None:
            continue
        if one is None or other is None or not one.val == other.val:
            return False
        pairs += [(one.left, other.left), (one.right, other.right)]
    return True


'''
NODE_NAMES = frozenset(re.findall(r"^(?:class|def) (\w+)", NODES, re.M))


def prelude(prompt):
    """What stands above a program for `prompt`: the imports, the nodes, and the classes that the prompt only
    describes, in comments or in a docstring."""
    return IMPORTS + NODES + "".join(described_classes(prompt))


def described_classes(prompt):
    """The sources of classes such as `# class Node:` with their commented bodies."""
    lines = [re.sub(r"^(\s*)# ?", r"\1", line) for line in prompt.split("\n")]
    for i, line in enumerate(lines):
        head = re.match(r"(\s*)class (?!Solution\b)\w+.*:\s*$", line)
        if not head:
            continue
        end = i + 1
        while end < len(lines) and (not lines[end].strip() or re.match(rf"{head[1]}\s+\S", lines[end])):
            end += 1
        source = textwrap.dedent("\n".join(lines[i:end])).rstrip()
        try:
            ast.parse(source)
        except (SyntaxError, ValueError):
            continue
        yield source + "\n\n\n"


# The site offers sortedcontainers; programs here see the standard library alone. The part of it that
# solutions use.
SORTED = """
def _sortedcontainers():
    import bisect
    import sys
    import types

    class SortedList:
        def __init__(self, iterable=(), key=None):
            self._key = key or (lambda value: value)
            self._list = sorted(iterable or (), key=key)
            self._keys = [self._key(value) for value in self._list]

        def bisect_left(self, value):
            return bisect.bisect_left(self._keys, self._key(value))

        def bisect_right(self, value):
            return bisect.bisect_right(self._keys, self._key(value))

        bisect = bisect_right

        def add(self, value):
            at = self.bisect_right(value)
            self._list.insert(at, value)
            self._keys.insert(at, self._key(value))

        def update(self, iterable):
            self.__init__([*self._list, *iterable], self._key)

        def index(self, value):
            for at in range(self.bisect_left(value), self.bisect_right(value)):
                if self._list[at] == value:
                    return at
            raise ValueError(f"{value!r} is not in list")

        def __delitem__(self, at):
            del self._list[at], self._keys[at]

        def remove(self, value):
            del self[self.index(value)]

        def discard(self, value):
            if value in self:
                self.remove(value)

        def pop(self, index=-1):
            self._keys.pop(index)
            return self._list.pop(index)

        def clear(self):
            self.__init__((), self._key)

        def count(self, value):
            return self._list[self.bisect_left(value) : self.bisect_right(value)].count(value)

        def copy(self):
            return type(self)(self._list, self._key)

        def irange(self, minimum=None, maximum=None, inclusive=(True, True), reverse=False):
            from_minimum = self.bisect_left if inclusive[0] else self.bisect_right
            to_maximum = self.bisect_right if inclusive[1] else self.bisect_left
            start = 0 if minimum is None else from_minimum(minimum)
            end = len(self) if maximum is None else to_maximum(maximum)
            return iter(self._list[start:end][:: -1 if reverse else 1])

        def __contains__(self, value):
            return value in self._list[self.bisect_left(value) : self.bisect_right(value)]

        def __getitem__(self, index):
            return self._list[index]

        def __len__(self):
            return len(self._list)

        def __iter__(self):
            return iter(self._list)

        def __reversed__(self):
            return reversed(self._list)

        def __eq__(self, other):
            return self._list == list(other)

        def __repr__(self):
            return f"{type(self).__name__}({self._list!r})"

    class SortedSet(SortedList):
        def __init__(self, iterable=(), key=None):
            super().__init__(set(iterable or ()), key)

        def add(self, value):
            if value not in self:
                super().add(value)

    class SortedDict(dict):
        def _sorted(self):
            return SortedList(dict.keys(self))

        def __iter__(self):
            return iter(self._sorted())

        def keys(self):
            return self._sorted()

        def values(self):
            return [self[key] for key in self]

        def items(self):
            return [(key, self[key]) for key in self]

        def peekitem(self, index=-1):
            key = self._sorted()[index]
            return key, self[key]

        def popitem(self, index=-1):
            key = self._sorted()[index]
            return key, self.pop(key)

        def bisect_left(self, key):
            return self._sorted().bisect_left(key)

        def bisect_right(self, key):
            return self._sorted().bisect_right(key)

        bisect = bisect_right

        def irange(self, *arguments, **keywords):
            return self._sorted().irange(*arguments, **keywords)

    module = sys.modules["sortedcontainers"] = types.ModuleType("sortedcontainers")
    module.SortedList = module.SortedKeyList = SortedList
    module.SortedSet, module.SortedDict = SortedSet, SortedDict


_sortedcontainers()


"""
