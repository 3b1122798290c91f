"""Python text as pieces: the statements of a module, with the names that each binds, changes and uses.

What compiles is code, what does not is prose (`parsed`, `longest`, `runs_of`). Of a program can be kept what
one name needs (`kept`), and what it lacks can be taken from other pieces (`supplied`).
"""

import ast
import builtins
import codeop
import functools
import re
import symtable
import warnings
from dataclasses import dataclass, field

TRIES = 60  # parses per run of lines, so that time stays linear in the length of a text
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
IMPORTS = (ast.Import, ast.ImportFrom)
ACTIONS = (ast.Expr, ast.For, ast.While, ast.If, ast.With, ast.Try)  # statements that may change something
BUILTINS = {*dir(builtins), "__name__", "__file__"}
DYNAMIC = {"eval", "exec", "globals", "locals", "vars", "__import__"}  # reach names that are not to be seen
PROSE = re.compile(r"[ \t]+[A-Z][\w'’]*(?: [\w'’`(),.;:-]+){2,}")
INNER_FUNCTION = re.compile(r"(?:async )?def ")
SETTINGS = set("setrecursionlimit set_int_max_str_digits seed stack_size filterwarnings simplefilter".split())
STAR_MODULES = set("typing collections itertools functools heapq bisect math string operator re".split())


@dataclass
class Piece:
    """A top-level statement with the comment lines above it (or several statements that share a line)."""

    source: str
    nodes: list
    first_line: int
    binds: set = field(default_factory=set)
    changes: set = field(default_factory=set)  # what it changes: `table` of table[0] = 1
    uses: set = field(default_factory=set)  # global names that it refers to, or a function in it

    @property
    def imports(self):
        return all(isinstance(node, IMPORTS) for node in self.nodes)

    @property
    def defines(self):
        return all(isinstance(node, (*DEFINITIONS, *IMPORTS)) for node in self.nodes)

    @property
    def acts(self):
        return isinstance(self.nodes[0], ACTIONS)

    @property
    def is_docstring(self):
        return isinstance(self.nodes[0], ast.Expr) and isinstance(self.nodes[0].value, ast.Constant)


# ---------------------------------------------------------------- what compiles


@functools.lru_cache  # an output is read in several ways, which have most of their lines in common
def parsed(source):
    """(tree, 0) of a program that compiles, else (None, number of the line at fault)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the programs, for example "is" with a literal
            tree = ast.parse(source)
            # A `return` outside a function is only seen here.
            compile(tree, "<answer>", "exec", dont_inherit=True)
        return tree, 0
    except SyntaxError as error:
        return None, error.lineno or 1
    except (ValueError, RecursionError, MemoryError, OverflowError):
        return None, 1


@functools.lru_cache
def can_start(line):
    """Whether a line may be the first of a statement."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            codeop.compile_command(line, symbol="exec")
        return True
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError):
        return False


def longest(head, lines, written=None):
    """(tree, n): the first n lines, as many as compile behind `head`. The cut is at a line that is `written`
    without indentation, at prose behind a `return`, or at an inner function that breaks off with the text.
    (None, 0) when none do."""
    above, end, written = head.count("\n"), len(lines), written or lines
    broken = broken_off(lines)
    for _ in range(TRIES):
        tree, fault = parsed(head + "\n".join(lines[:end]))
        if tree:
            return tree, end
        end = min(fault - above, end) - 1
        if 0 < broken <= end:
            end, broken = broken, 0
            continue
        while end > 0 and not is_behind_return(lines, end):
            if written[end].strip() and not written[end][0].isspace():
                break
            end -= 1
        if end <= 0:
            break
    return None, 0


def broken_off(lines):
    """The number of the line where the last inner function begins, when it lasts to the end of the lines."""
    least = None
    for i in range(len(lines) - 1, 0, -1):
        bare = lines[i].lstrip()
        width = len(lines[i]) - len(bare)
        if bare and INNER_FUNCTION.match(bare) and 0 < width and (least is None or width < least):
            while i > 1 and lines[i - 1].lstrip().startswith("@"):
                i -= 1
            return i
        if bare and width == 0:
            break
        least = width if bare and (least is None or width < least) else least
    return 0


def is_behind_return(lines, i):
    """Whether line i is the first line of indented prose behind a `return`."""
    if not PROSE.match(lines[i]):
        return False
    above = next((line for line in reversed(lines[max(0, i - 3) : i]) if line.strip()), "")
    return above.lstrip().startswith("return") and above[:1].isspace()


def runs_of(text):
    """The runs of lines that compile, as lists of pieces."""
    lines, runs, i, tries = text.split("\n"), [], 0, 0
    while i < len(lines) and tries < TRIES:
        if lines[i].strip() and not lines[i][0].isspace() and can_start(lines[i]):
            tree, count = longest("", lines[i:])
            tries += 1
            if tree:
                runs.append(pieces_of("\n".join(lines[i : i + count]), tree))
                i += count
                continue
        i += 1
    return runs


# ---------------------------------------------------------------- names


def pieces_of(source, tree):
    lines, pieces, end = source.split("\n"), [], 0
    for node in tree.body:
        start = min([node.lineno, *[each.lineno for each in getattr(node, "decorator_list", ())]])
        if pieces and start <= end:
            pieces[-1].nodes.append(node)
            pieces[-1].source += "".join("\n" + line for line in lines[end : node.end_lineno])
        else:
            pieces.append(Piece("\n".join(lines[end : node.end_lineno]), [node], start))
        end = max(end, node.end_lineno)
    for piece in pieces:
        piece.uses = global_names(piece.source)
        for node in piece.nodes:
            note_names(node, piece)
    return pieces


def note_names(statement, piece):
    """Notes in `piece` what a statement binds and changes in its module, not in its functions."""
    stack = [statement]
    while stack:
        node = stack.pop()
        if isinstance(node, DEFINITIONS):
            piece.binds.add(node.name)
            continue
        if isinstance(node, IMPORTS):
            piece.binds |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, (ast.Store, ast.Del)):
            piece.binds.add(node.id)
        elif isinstance(node, (ast.Attribute, ast.Subscript)) and not isinstance(node.ctx, ast.Load):
            piece.changes.add(base_name(node))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            piece.changes.add(base_name(node.func))
        stack.extend(ast.iter_child_nodes(node))


def base_name(node):
    """`a` of a.b[0](c).d."""
    while isinstance(node, (ast.Attribute, ast.Subscript, ast.Call)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


@functools.lru_cache
def global_names(source):
    """The names of its module that a source refers to, in its functions too."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            top = symtable.symtable(source, "<answer>", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return set(re.findall(r"[A-Za-z_]\w*", source))
    names = {symbol.get_name() for symbol in top.get_symbols() if symbol.is_referenced()}
    tables = top.get_children()
    while tables:
        table = tables.pop()
        names |= {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global()}
        tables.extend(table.get_children())
    return names


def all_bound(pieces):
    return set().union(*[piece.binds for piece in pieces])


# ---------------------------------------------------------------- what one name needs


def places(pieces, also_changed=False):
    """{name: numbers of the pieces that bind it}"""
    found = {}
    for i, piece in enumerate(pieces):
        for name in piece.binds | piece.changes if also_changed else piece.binds:
            found.setdefault(name, []).append(i)
    return found


def reach(names, pieces, found):
    """`names` and all that the pieces which bind them refer to, and so on; and the numbers of those
    pieces."""
    seen, chosen, stack = set(names), set(), list(names)
    while stack:
        for i in found.get(stack.pop(), ()):
            if i not in chosen:
                chosen.add(i)
                stack += pieces[i].uses - seen
                seen |= pieces[i].uses
    return seen, chosen


def kept(own, root, wanted):
    """The pieces that the names in `wanted` need, and `wanted` with all names that those refer to.

    A statement that is no definition stays where it binds or changes what is needed (a table that is filled),
    or sets the interpreter up. One that only calls `root` (an example) goes, and one that reads input.
    """
    bound = places(own)
    reached = [set() if piece.defines else reach(piece.uses, own, bound)[0] for piece in own]
    defined = any(
        root in piece.binds and not piece.imports for piece in own
    )  # not `from solution import root`
    unwanted = [
        "input" in names or defined and piece.imports and root in piece.binds
        for piece, names in zip(own, reached)
    ]
    quiet = [Piece("", [], 0) if skip else piece for piece, skip in zip(own, unwanted)]
    imported = all_bound(piece for piece in own if piece.imports)
    preparing = {}  # number of a statement that may prepare something -> whether it does in any case
    for i, piece in enumerate(quiet):
        if piece.nodes and piece.acts and root not in reached[i]:
            called = getattr(getattr(piece.nodes[0], "value", None), "func", None)
            setting = i < bound[root][0] or getattr(called, "attr", "") in SETTINGS
            preparing[i] = bool(setting and piece.changes & imported)
    found, chosen = places(quiet, also_changed=True), set()
    while True:
        wanted, more = reach(wanted, quiet, found)
        more |= {i for i, always in preparing.items() if always or (reached[i] & wanted) - BUILTINS}
        if more <= chosen:
            break
        chosen |= more
        wanted = wanted.union(*[own[i].uses for i in more])
    if wanted & DYNAMIC:
        chosen |= {i for i, piece in enumerate(quiet) if piece.binds and root not in reached[i]}
    unknown = wanted - BUILTINS - all_bound(own[i] for i in chosen)
    chosen |= {i for i, piece in enumerate(own) if unknown and "*" in piece.binds}
    if own[0].is_docstring:
        chosen.add(0)
    return [own[i] for i in sorted(chosen)], wanted


def supplied(pool, wanted, given):
    """The pieces of `pool` that bind what is wanted and not given, the first of each, with what those
    need."""
    found, chosen, stack, given = places(pool), set(), list(wanted), given | BUILTINS
    while stack:
        name = stack.pop()
        if name not in given and name in found and not pool[found[name][0]].acts:
            chosen.add(found[name][0])
            given = given | pool[found[name][0]].binds
            stack += pool[found[name][0]].uses
    if wanted - given:
        chosen |= {
            i
            for i, piece in enumerate(pool)
            if "*" in piece.binds and all(getattr(node, "module", "") in STAR_MODULES for node in piece.nodes)
        }
    return [pool[i] for i in sorted(chosen)]
