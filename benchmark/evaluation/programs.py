r"""Finds the program in what a model wrote, by parsing: what compiles is code, what does not is prose.

    >>> print(complete("def double(x):\n", "    return 2 * x\n\nprint(double(2))\n", "double"))
    def double(x):
        return 2 * x

An output is looked at in this order; the first program that compiles and defines the entry point is the answer:

1. The whole text, as the continuation of the prompt or as a program.
2. Its blocks in the order in which they stand: fenced code, what stands between marks such as [PYTHON] or <code>, and
   the text between those. In each, the continuation of the prompt (indented as the prompt's body) up to where it stops
   being one, else the runs of lines that compile. A block with nothing but a stub in it comes last, one that is
   introduced as a mistake last but one, and one that is introduced as a correction first.
3. The same blocks as a continuation that lost its indentation.

Of the program is kept what its entry point needs: no examples, no tests, no prints. What it needs and does not define is
taken from the other blocks: imports or helpers in a fence of their own.
"""

import ast
import builtins
import codeop
import dataclasses
import functools
import html
import keyword
import re
import symtable
import textwrap
import warnings
from dataclasses import dataclass, field

from benchmark.evaluation.reply import reply
from benchmark.grading import leetcode

EXTRACT_CODE_VERSION = 2

TRIES = 60  # parses per run of lines, so that time stays linear in the length of a text
FENCE = re.compile(r"^(?P<before>[^`~]*)(?P<mark>```+|~~~+)(?P<info>[^`~]*)$")
MARK = re.compile(
    r"\[/?(?:PYTHON|BEGIN|DONE|END|CODE|ANSWER|SOLUTION|RESPONSE|TESTS?|INST)\]"
    r"|</?(?:code|python|answer|solution|response|output|final_answer|pre)(?:\s[^<>\n]*)?>"
)
MISTAKE = re.compile(r"\b(?:mistakes?|wrong|incorrect|buggy|broken|draft|first (?:attempt|try)|(?:doesn.t|not) work)\b", re.I)
CORRECTION = re.compile(
    r"\b(?:(?:fixed|corrected|correct|revised|final|right) (?:version|code|solution|program|function|way|one)|correction)\b", re.I
)
INNER = re.compile(r"\s*(?:return|yield|else|elif|except|finally|break|continue)\b")  # never the start of a program
TYPOGRAPHY = str.maketrans("“”„‘’\u00a0\u2003−–", "\"\"\"''  --", "\u200b\u200c\u2060")
BUILTINS = {*dir(builtins), "__name__", "__file__"}
DYNAMIC = {"eval", "exec", "globals", "locals", "vars", "__import__"}
SETTINGS = {"setrecursionlimit", "set_int_max_str_digits", "seed", "stack_size", "filterwarnings", "simplefilter"}
ACTIONS = (ast.Expr, ast.For, ast.While, ast.If, ast.With, ast.Try)
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


# ---------------------------------------------------------------- parsing


def parsed(source):
    """(tree, 0) of a program that compiles, else (None, number of the line at fault)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the programs, for example "is" with a literal
            tree = ast.parse(source)
            compile(tree, "<answer>", "exec", dont_inherit=True)  # only this sees a `return` outside a function
        return tree, 0
    except SyntaxError as error:
        return None, error.lineno or 1
    except (ValueError, RecursionError, MemoryError, OverflowError):
        return None, 1


def can_start(line):
    """Whether a line may be the first of a statement."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            codeop.compile_command(line, symbol="exec")
        return True
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError):
        return False


def longest(head, lines):
    """(tree, n): the most lines that compile behind `head`; the cut is at a line without indentation. (None, 0): none."""
    above, end = head.count("\n"), len(lines)
    for _ in range(TRIES):
        tree, fault = parsed(head + "\n".join(lines[:end]))
        if tree:
            return tree, end
        end = min(fault - above, end) - 1
        while end > 0 and (not lines[end].strip() or lines[end][0].isspace()):
            end -= 1
        if end <= 0:
            break
    return None, 0


@dataclass
class Piece:
    """A top-level statement with the comment lines above it (or several statements that share a line)."""

    source: str
    nodes: list
    first_line: int
    binds: set = field(default_factory=set)
    changes: set = field(default_factory=set)  # names of the objects that it changes: `table` of table[0] = 1
    uses: set = field(default_factory=set)  # global names that it or a function in it refers to

    @property
    def imports(self):
        return all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in self.nodes)

    @property
    def defines_only(self):
        return all(isinstance(node, (*DEFINITIONS, ast.Import, ast.ImportFrom)) for node in self.nodes)


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
            look(node, piece)
    return pieces


def look(statement, piece):
    """Notes what a statement binds and changes in its module, not in its functions."""
    stack = [statement]
    while stack:
        node = stack.pop()
        if isinstance(node, DEFINITIONS):
            piece.binds.add(node.name)
            continue
        if isinstance(node, (ast.Import, ast.ImportFrom)):
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


def global_names(source):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            top = symtable.symtable(source, "<answer>", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return set(re.findall(r"[A-Za-z_]\w*", source))
    names, stack = {symbol.get_name() for symbol in top.get_symbols() if symbol.is_referenced()}, top.get_children()
    while stack:
        table = stack.pop()
        names |= {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global()}
        stack.extend(table.get_children())
    return names


# ---------------------------------------------------------------- the prompt


@dataclass(frozen=True)
class Context:
    """What a program may take for granted, from the prompt. `head` is None where the prompt leaves no definition of the
    entry point open."""

    root: str  # the name that has to be defined: `Solution` of the entry point Solution().order
    above: str  # code above the definition of the entry point
    head: str | None = None  # the prompt's code up to where the body is to be written
    first_line: int = 0  # of the open definition, in head
    indent: str = ""  # of its body
    method: str = ""  # whose body is open, where the entry point is a class
    above_method: int = 0  # lines of head

    @property
    def names(self):
        tree, _ = parsed(self.above)
        return set().union(*[piece.binds for piece in pieces_of(self.above, tree)]) if tree else set()


def root_name(entry_point):
    """`Solution` of Solution().order."""
    found = re.search(r"[A-Za-z_]\w*", entry_point)
    return found[0] if found else entry_point


@functools.lru_cache(maxsize=4096)
def context_of(prompt, entry_point):
    root = root_name(entry_point)
    prompt = prompt.replace("\r\n", "\n")
    lines = prompt.split("\n")
    starts = [i for i, line in enumerate(lines) if re.match(r"(?:async |def |class |from |import |@)", line)][:TRIES]
    texts = [block.text for block in reversed(blocks_of(prompt)) if block.fenced]
    texts = [prompt, *texts, *["\n".join(lines[i:]) for i in starts]]
    read = [context for context in (read_prompt(text, root) for text in texts) if context]
    found = next((context for context in read if context.head is not None), read[0] if read else Context(root, ""))
    if root != "Solution":
        return found
    given = leetcode.prelude(prompt)
    head = None if found.head is None else given + found.head
    lines = given.count("\n")
    return dataclasses.replace(
        found,
        above=given + found.above,
        head=head,
        first_line=found.first_line + lines,
        above_method=found.above_method + lines,
    )


def read_prompt(code, root):
    """The context that a prompt gives which is Python up to a body that is still to be written, else None."""
    bare = code.rstrip()
    last = bare.rpartition("\n")[2]
    tail = code.rpartition("\n")[2]
    indent = tail if tail and not tail.strip() else last[: len(last) - len(last.lstrip())] + "    "
    for source in (code if tail.strip() or not tail else bare + "\n", f"{bare}\n{indent}pass\n"):
        tree, _ = parsed(source)
        if tree is None:
            continue
        pieces = pieces_of(source, tree)
        opened = [piece for piece in pieces if any(isinstance(node, DEFINITIONS) and node.name == root for node in piece.nodes)]
        above, bound = "", {*BUILTINS, "*"}
        for piece in pieces:
            if piece not in opened and (piece.defines_only or not isinstance(piece.nodes[0], (ast.Assert, *ACTIONS))):
                if piece.defines_only or piece.uses <= bound:  # examples do not run above a program
                    above, bound = above + piece.source + "\n", bound | piece.binds
        if not opened:
            return Context(root, above)
        if opened[-1] is not pieces[-1]:
            return Context(root, above)
        node, shift = opened[-1].nodes[-1], above.count("\n") + 1 - opened[-1].first_line
        head = above + "\n".join(code.split("\n")[opened[-1].first_line - 1 :])
        first_line = node.lineno + shift
        while isinstance(node.body[-1], DEFINITIONS):
            node = node.body[-1]
        method = node.name if node is not opened[-1].nodes[-1] else ""
        indent, above_method = " " * node.body[0].col_offset, node.lineno - 1 + shift
        return Context(root, above, head, first_line, indent, method, above_method)
    return None


# ---------------------------------------------------------------- blocks


@dataclass
class Block:
    text: str
    fenced: bool = False
    intro: str = ""  # the last words before a fenced block

    @functools.cached_property
    def runs(self):
        return runs_of(self.text)


def blocks_of(text):
    """The parts of a text between marks and fences."""
    return [block for part in MARK.split(text) for block in fenced_blocks(part.split("\n"))]


def fenced_blocks(lines):
    blocks, between, i = [], [], 0
    while i < len(lines):
        fence = FENCE.match(lines[i])
        if not fence or fence["before"].strip() and not re.fullmatch(r"\s*[\w+#.-]*\s*", fence["info"]):
            between.append(lines[i])
            i += 1
            continue
        between.append(fence["before"])
        end = closing_fence(lines, i, fence["mark"])
        text = fence_content(lines, i, end)
        words = " ".join(between).split()[-25:] + re.findall(r"\A\s*#.*", text)
        blocks += [Block("\n".join(between)), Block(text, True, " ".join(words))]
        between, i = [], end
        if end < len(lines) and not FENCE.match(lines[end])["info"].strip():
            i += 1  # a labelled fence opens the next block
    return [block for block in [*blocks, Block("\n".join(between))] if block.text.strip()]


def closing_fence(lines, start, mark):
    """The line that ends the block which starts at `start`: not one in a docstring of its code."""
    first = None
    for j in range(start + 1, len(lines)):
        fence = FENCE.match(lines[j])
        if fence and fence["mark"].startswith(mark):
            first = j if first is None else first
            text = fence_content(lines, start, j)
            if is_code(text):
                return j
            if text.count('"""') % 2 == text.count("'''") % 2 == 0:
                break
    return len(lines) if first is None else first


def fence_content(lines, start, end):
    """What stands between two fences; the closing one may stand behind code."""
    fence = FENCE.match(lines[end]) if end < len(lines) else None
    text = "\n".join([*lines[start + 1 : end], *([fence["before"]] if fence and fence["before"].strip() else [])])
    if re.match(r"\s*(?:>>>|\.\.\.)", text):  # a session of the interpreter
        session = [line.strip() for line in text.split("\n")]
        text = "\n".join(line[4:] for line in session if line.startswith((">>>", "...")))
    return textwrap.dedent(text) if lines[start][:1].isspace() else text


def is_code(text):
    text = textwrap.dedent(text)
    return any(parsed(source)[0] for source in (text, f"def _():\n{textwrap.indent(text, '    ')}\n"))


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


# ---------------------------------------------------------------- candidates


@dataclass
class Found:
    """A program that defines the entry point, as pieces, and further pieces that may hold what it needs."""

    own: list
    pool: list
    body: str = ""  # of a continuation: the prompt's code with its body
    rank: int = 0  # CORRECTED before 0 before MISTAKEN before STUB


CORRECTED, MISTAKEN, STUB = -1, 1, 2


def continuation(context, lines):
    """The prompt continued by `lines`, as far as they do continue it."""
    if context.head is None or not any(line.strip() for line in lines):
        return None
    head, tail = context.head, context.head.rpartition("\n")[2]
    if not tail.strip():  # the prompt ends with a line end, or in the body's indentation
        head = head[: len(head) - len(tail)]
        if lines[0].strip() and not lines[0].startswith(tail):
            lines = [tail + lines[0].lstrip(), *lines[1:]]
        if not next((line for line in lines if line.strip() and line[0] != "#"), "")[:1].isspace():
            return None
    elif lines[0].startswith(context.indent) or not lines[0].strip():
        head += "\n"
    tree, end = longest(head, lines)
    if tree is None or end < len(lines) and INNER.match(lines[end]):
        return None
    source = head + "\n".join(lines[:end])
    pieces = pieces_of(source, tree)
    at = next((i for i, piece in enumerate(pieces) if piece.nodes[-1].lineno == context.first_line), None)
    if at is None or pieces[at].nodes[-1].end_lineno <= head.count("\n"):
        return None  # nothing was added to the body
    body = "\n".join(source.split("\n")[: pieces[at].nodes[-1].end_lineno]) + "\n"
    return Found(pieces[: at + 1], pieces[at + 1 :], body, STUB * is_stub(pieces[at], context.root))


def whole(context, text, runs=None):
    """The first run of lines that defines the entry point; or one that is indented, as code is in Markdown."""
    runs = runs_of(text) if runs is None else runs
    if not any(context.root in piece.binds for run in runs for piece in run):
        lines = text.split("\n")
        indented = [i for i in indented_starts(lines)][:TRIES]
        ends = [next((j for j in range(i, len(lines)) if lines[j][:1].strip()), len(lines)) for i in indented]
        runs = [run for i, j in zip(indented, ends) for run in runs_of(textwrap.dedent("\n".join(lines[i:j])))]
    for i, run in enumerate(runs):
        defining = [piece for piece in run if context.root in piece.binds]
        if defining:
            pool = [piece for j, other in enumerate(runs) if j != i for piece in other]
            return Found(run, pool, rank=STUB * is_stub(defining[-1], context.root))
    return None


def is_stub(piece, root):
    """Whether a definition has no body yet: nothing but docstrings, `pass`, `...` or raise NotImplementedError."""
    node = next((node for node in piece.nodes if isinstance(node, DEFINITIONS) and node.name == root), None)
    if node is None:
        return False
    functions = [each for each in node.body if isinstance(each, DEFINITIONS)] if isinstance(node, ast.ClassDef) else [node]
    return all(is_empty(statement) for function in functions for statement in function.body)


def is_empty(statement):
    if isinstance(statement, ast.Raise):
        return statement.exc is not None and base_name(statement.exc) == "NotImplementedError"
    return isinstance(statement, (ast.Pass, ast.Import, ast.ImportFrom)) or (
        isinstance(statement, ast.Expr) and isinstance(statement.value, (ast.Constant, ast.Name, ast.Compare))
    )


def program_in(context, block):
    """The program in a block: one that it begins with, else a continuation, else one further down."""
    level = textwrap.dedent(block.text).strip("\n")
    tree, count = longest("", level.split("\n"))
    if tree:
        found = whole(context, "\n".join(level.split("\n")[:count]))
        if found and found.rank == 0:
            found.pool = [piece for run in block.runs for piece in run]
            return found
    bodies = [continuation(context, block.text.split("\n")), whole(context, block.text, block.runs)]
    return min((found for found in bodies if found), key=lambda found: found.rank, default=None)


def find(context, text):
    """The program in `text`, or None."""
    lines, level = text.split("\n"), textwrap.dedent(text)
    if parsed(level)[0] and not any(MARK.fullmatch(line.strip()) for line in lines):
        found = whole(context, level)
        if found and found.rank == 0:
            return found
    found = continuation(context, lines) if text.lstrip("\n")[:1].isspace() else None
    if found and found.rank == 0:
        return found
    blocks, programs = blocks_of(text), []
    for block in blocks:
        found = program_in(context, block)
        if found:
            found.pool = found.pool + [piece for b in blocks if b is not block for run in b.runs for piece in run]
            if found.rank == 0 and CORRECTION.search(block.intro):
                found.rank = CORRECTED
            elif found.rank == 0 and MISTAKE.search(block.intro):
                found.rank = MISTAKEN
            programs.append(found)
    if any(found.rank == CORRECTED for found in programs):
        return [found for found in programs if found.rank == CORRECTED][-1]
    good = [found for found in programs if found.rank < STUB]
    if good:
        return min(good, key=lambda found: found.rank)
    for block in blocks:
        level = context
        if context.method and re.search(rf"^\s*def {context.method}\(", block.text, re.M):  # the method without its class
            head = "".join(line + "\n" for line in context.head.split("\n")[: context.above_method])
            level = dataclasses.replace(context, head=head, indent="    ")
        bodies = [continuation(level, lines) for lines in indented_again(block.text, level.indent)]
        bodies = [each for each in bodies if each and each.rank == 0 and not all(map(is_empty, added(each, level)))]
        if bodies:
            found = max(bodies, key=lambda each: len(each.body.rstrip().split("\n")))
            found.pool = found.pool + [piece for block in blocks for run in block.runs for piece in run]
            return found
    return programs[0] if programs else None


def indented_again(text, indent):
    """The lines of a body that lost its indentation: of its first line, or of all; or that follows some words."""
    lines = [line for line in text.expandtabs(4).split("\n")]
    first = next((i for i, line in enumerate(lines) if line.strip()), 0)
    below_words = [i for i in indented_starts(lines) if i > first][:1]
    for start in [first, *below_words]:
        some = lines[start:]
        widths = [len(line) - len(line.lstrip()) for line in some if line.strip()]
        yield [indent + some[0].lstrip(), *some[1:]]
        for width in (min(widths), widths[0]):
            shift = len(indent) - width
            yield [" " * shift + line if shift > 0 else line[min(-shift, len(line) - len(line.lstrip())) :] for line in some]


def are_words(line):
    """Whether a line is no code, broken code included."""
    return not line[0].isspace() and not can_start(line) and not keyword.iskeyword(line.split()[0])


def indented_starts(lines):
    """Where indented lines begin that belong to no statement above them."""
    above = ""
    for i, line in enumerate(lines):
        if line.strip():
            if line[0].isspace() and (not above or are_words(above)):
                yield i
            above = line


def added(found, context):
    """The statements that a continuation adds to the prompt's body."""
    node, first = found.own[-1].nodes[-1], context.head.count("\n")
    while isinstance(node.body[-1], DEFINITIONS) and node.body[-1].lineno <= first:
        node = node.body[-1]
    return [statement for statement in node.body if statement.lineno > first]


# ---------------------------------------------------------------- what is kept of a program


def places(pieces, also_changes=False):
    """{name: indices of the pieces that bind it}"""
    found = {}
    for i, piece in enumerate(pieces):
        for name in piece.binds | piece.changes if also_changes else piece.binds:
            found.setdefault(name, []).append(i)
    return found


def reach(names, pieces, found):
    """`names` and all that the pieces which bind them refer to, and so on; and the indices of those pieces."""
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

    A statement that is no definition stays where it binds or changes what is needed (a table that is filled), or sets the
    interpreter up. One that only calls the entry point (an example) goes, and one that reads input.
    """
    bound = places(own)
    reached = [set() if piece.defines_only else reach(piece.uses, own, bound)[0] for piece in own]
    quiet = [piece if "input" not in names else Piece("", [], 0) for piece, names in zip(own, reached)]
    imported = set().union(*[piece.binds for piece in own if piece.imports])
    first = bound[root][0]
    acts = {}  # statements that may prepare something
    for i, piece in enumerate(quiet):
        if piece.nodes and isinstance(piece.nodes[0], ACTIONS) and root not in reached[i]:
            called = getattr(getattr(piece.nodes[0], "value", None), "func", None)
            sets_up = i < first or getattr(called, "attr", "") in SETTINGS
            acts[i] = bool(sets_up and piece.changes & imported)
    found, chosen = places(quiet, also_changes=True), set()
    while True:
        wanted, more = reach(wanted, quiet, found)
        more |= {i for i, sets_up in acts.items() if sets_up or (reached[i] & wanted) - BUILTINS}
        if more <= chosen:
            break
        chosen |= more
        wanted = wanted.union(*[own[i].uses for i in more])
    if wanted & DYNAMIC:  # names that cannot be seen
        chosen |= {i for i, piece in enumerate(quiet) if piece.binds and root not in reached[i]}
    unknown = wanted - BUILTINS - set().union(*[own[i].binds for i in chosen])
    chosen |= {i for i, piece in enumerate(own) if unknown and "*" in piece.binds or i == 0 and is_docstring(piece)}
    return [own[i] for i in sorted(chosen)], wanted


def is_docstring(piece):
    return isinstance(piece.nodes[0], ast.Expr) and isinstance(piece.nodes[0].value, ast.Constant)


def supplied(pool, wanted, given):
    """The pieces of `pool` that bind what is wanted and not given, the first of each, with what those need."""
    found, chosen, stack, given = places(pool), set(), list(wanted), given | BUILTINS
    while stack:
        name = stack.pop()
        if name not in given and name in found:
            piece = pool[found[name][0]]
            if not isinstance(piece.nodes[0], ACTIONS):
                chosen.add(found[name][0])
                given = given | piece.binds
                stack += piece.uses
    if wanted - given:
        chosen |= {i for i, piece in enumerate(pool) if "*" in piece.binds and is_standard(piece)}
    return [pool[i] for i in sorted(chosen)]




def is_standard(piece):
    return all(getattr(node, "module", "") in STAR_MODULES for node in piece.nodes)


STAR_MODULES = "typing collections itertools functools heapq bisect math string operator re".split()
FUTURE = re.compile(r"^from __future__ import [^\n(]+\n?", re.M)


def program_of(context, found, names):
    """The text of a program: what the prompt gives, what comes from other blocks, what the entry point needs."""
    roots = {context.root, *names}
    given = context.names
    if found.body:
        wanted, own = set().union(*[piece.uses for piece in found.own]), found.own
        parts = [found.body]
    else:
        own, wanted = kept(found.own, context.root, roots)
        parts = [context.above, *[piece.source + "\n" for piece in own]]
    others = [piece.source + "\n" for piece in supplied(found.pool, wanted, given | {n for p in own for n in p.binds})]
    parts[1:1] = others
    program = "".join(parts)
    futures = dict.fromkeys(FUTURE.findall(program))  # they come first or not at all
    return "".join([*futures, FUTURE.sub("", program)]) if futures else program


# ---------------------------------------------------------------- what others call


def look_for(text, context):
    """The program in an output, or None. A special token ends an output, unless it is part of the only program; signs
    that were changed on the way are read as Python's where nothing else compiles."""
    cut = reply(text)
    texts = [cut, reply(text, cut=False), cut.translate(TYPOGRAPHY), html.unescape(cut), re.sub(r"^> ?", "", cut, flags=re.M)]
    if "\n" not in cut.strip():
        texts.append(cut.replace("\\n", "\n").replace('\\"', '"'))
    return next((found for each in dict.fromkeys(texts) if (found := find(context, each))), None)


def complete(prompt, completion, entry_point, tests=""):
    """The program that `completion` stands for: with all that `prompt` gives it, and what `tests` may call besides the
    entry point. What holds no program becomes one that fails: the prompt and the completion as they are."""
    context = context_of(prompt, entry_point)
    found = look_for(completion, context)
    if found is None:
        return (context.above if context.head is None else context.head) + reply(completion)
    return program_of(context, found, global_names(tests))


def extract_code(text, entry_point=""):
    """The program in an output, or the body of the function `entry_point`; "" when there is none. Without a name it is
    what the output defines last."""
    defined = re.findall(r"^(?:async def|def|class) (\w+)", reply(text), re.M)
    entry_point = entry_point or next(reversed(defined), "_")
    context = Context(entry_point, "", f"def {entry_point}():\n", 1, "    ")
    found = look_for(text, context)
    return program_of(context, found, ()).removeprefix(context.head) if found else ""


def grading_item(prompt, completion, tests, entry_point):
    """The arguments of `benchmark.grading.grade` for a completion: all verdicts on programs are formed from these.

    prompt: text, or the messages of a chat. The functions that it defines are given to the tests as they stand there.
    """
    prompt = prompt if isinstance(prompt, str) else "\n\n".join(str(message["content"]) for message in prompt)
    tests = tests if isinstance(tests, str) else "\n".join(tests)
    context = context_of(prompt, entry_point)
    program = complete(prompt, completion, entry_point, tests)
    return {"program": program, "tests": tests, "entry_point": entry_point, "helpers": context.above if context.names else ""}


def tests_of(row):
    """(tests, entry point) of a row in the form of HumanEval or LeetCodeDataset (`test`), of MBPP (`test_list`), or with
    `tests`; ("", "") when it has none."""
    if row.get("test_list"):
        setup = [*(row.get("test_imports") or []), row.get("test_setup_code") or ""]
        tests = "\n".join([*filter(None, setup), *row["test_list"]])
        defined = re.findall(r"^(?:def|class)[ \t]+(\w+)", row.get("code") or "", re.M)
        called = re.findall(r"\b([A-Za-z_]\w*)\s*\(", row["test_list"][0])
        called = [name for name in called if name in defined] if defined else called
        return tests, row.get("entry_point") or next(iter(called), "")
    tests = row.get("tests") or row.get("test") or ""
    tests = tests if isinstance(tests, str) else "\n".join(tests)
    solution = "Solution" if re.search(r"\bSolution\(", tests) else ""
    return tests, row.get("entry_point") or solution
