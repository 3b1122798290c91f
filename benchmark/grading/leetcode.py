"""What LeetCode gives every program: imports, linked lists and binary trees, and the classes that a prompt describes."""

import ast
import re
import textwrap

# The builtins come last, because math and operator have another pow.
IMPORTS = "".join(
    f"from {module} import *\n"
    for module in (
        "typing collections itertools functools heapq bisect math string operator datetime random copy re builtins"
    ).split()
) + (
    "import bisect, collections, copy, datetime, functools, heapq, itertools, math, operator, random, re, string, sys\n"
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
    """What stands above a program for `prompt`: the imports, the nodes, and the classes that the prompt only describes,
    in comments or in a docstring."""
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
