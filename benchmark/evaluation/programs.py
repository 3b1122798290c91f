r"""Finds the program in what a model wrote, by parsing: what compiles is code, what does not is prose.

    >>> print(complete("def double(x):\n", "    return 2 * x\n\nprint(double(2))", "double"), end="")
    def double(x):
        return 2 * x

An output is looked at in this order; the first program that compiles and defines the entry point is the
answer:

1. What stands in <answer> tags, then the whole text, as a program or as the continuation of the prompt.
2. Its blocks in the order in which they stand: fenced code, what stands between marks such as [PYTHON] or
   <code>, and the text between those. In each: the program that it begins with, the continuation of the
   prompt (indented as the prompt's body) up to where it stops being one, a program further down. A block that
   is introduced as a correction or as the complete code comes first, one that is introduced as a mistake last
   but one, one that holds only a stub last. One that does not return yet yields to the first that goes
   on with its lines and returns.
3. The same blocks as a continuation that lost its indentation; the fenced blocks joined.
4. The text in other transports: inline code, a session of the interpreter, numbered lines, a diff, strings of
   JSON, HTML.

Of the program is kept what its entry point needs: no examples, no tests, no prints. What it needs and does
not define is taken from the other blocks: imports or helpers in a fence of their own.
"""

import ast
import dataclasses
import functools
import html
import json
import keyword
import re
import textwrap
from dataclasses import dataclass

from benchmark.evaluation.pieces import (
    BUILTINS,
    DEFINITIONS,
    IMPORTS,
    TRIES,
    all_bound,
    base_name,
    can_start,
    global_names,
    kept,
    longest,
    parsed,
    pieces_of,
    runs_of,
    supplied,
)
from benchmark.evaluation.reply import reply
from benchmark.grading import leetcode

EXTRACT_CODE_VERSION = 4

FENCE = re.compile(r"^(?P<before>[^`~]*)(?P<mark>```+|~~~+)(?P<info>[^`~]*)$")
NAMES = "PYTHON|BEGIN|END|CODE|code|ANSWER|SOLUTION|RESPONSE|TESTS?|INST"
MARK = re.compile(  # but not the index in table[END]
    rf"\[(?:DONE|/(?:DONE|{NAMES}))\]|(?<![\w\])])\[(?:{NAMES})\]|<\|python_tag\|>"
    r"|</?(?:code|python|answer|solution|response|output|final_answer|pre)(?:\s[^<>\n]*)?>"
)
TAGGED = re.compile(r"^[ \t]*<(answer|final_answer|solution)>(.*?)(?:^[ \t]*</\1>|\Z)", re.S | re.I | re.M)
MISTAKE = re.compile(
    r"\b(?:mistakes?|wrong|incorrect|bug|buggy|broken|draft|first (?:attempt|try)|pitfall"
    r"|(?:doesn.t|not) work|not (?:the |a )?(?:correct|right)|(?:don.t|do not) (?:do|write)"
    r"|what not to do|avoid (?:this|writing))\b|\bbad(?: \w+)?\s*[:*]|❌|🚫",
    re.I,
)
AVOIDED = re.compile(
    r"\b(?:avoid(?:s|ed|ing)?|without|no|free of) (?:\w+ ){0,3}(?:mistake|pitfall|bug)s?\b", re.I
)
PROGRAM = r"(?:version|code|solution|program|function|implementation)"
PRESENTED = re.compile(
    rf"\bhere(?:.s| is) (?:\w+ ){{1,3}}{PROGRAM}\b|\b(?:solution|code|implementation)\W*$", re.I
)
CORRECTION = re.compile(
    r"\bcorrection\b|(?<!not )(?<!not the )(?<!not a )"
    rf"\b(?:fixed|corrected|correct|revised|updated|final|right) (?:{PROGRAM}|answer|way|one)\b"
    rf"|\b(?:complete|full|entire|whole) {PROGRAM}\b|\ball together\b|\bthe fix\b"
    r"|\bfix(?:es|ed|ing) (?:the|this|that|it)\b|\b(?:fixed|corrected)\W*:\W*\Z"
    r"|\b(?:bug|mistake|error|issue)s? (?:\w+ )?fixed\b|\boops\b|\bapologi[sz]e\b"
    r"|\b(?:let me|let.s|I.ll|I will|we (?:should|need to|must)) (?:just )?"
    r"(?:fix|correct|rewrite|redo|revise|adjust|(?:try|start) (?:(?:this|that|it) )?(?:again|over))\b",
    re.I,
)
WITHDRAWN = re.compile(  # said of the program above
    r"\W*(?:(?:wait|hmm|no|but|however|actually|unfortunately)\b\W*)*"
    r"(?:this|that|it|the (?:above|previous|first))\b"
    r"[^.!?:\n]*(?:\b(?:wrong|incorrect|fails?|mistake|bug|(?:not|\w+n.t) (?:work|correct|right))\b)"
    r"[^.!?:\n]*[.!?](?!\w)",
    re.I,
)
OTHERWISE = re.compile(
    r"\balternativ|\banother (?:way|option|version|solution)\b"
    r"|\bif you (?:also |only )?(?:need|want|prefer|like|have)\b",
    re.I,
)
FIRST_LINE = re.compile(
    r"\s*(?:[Pp]y(?:thon)?3?\s+)?((?:async def|def|class|import|from|@)\s?\w.*)"
)  # of code
SESSION = re.compile(r"[ \t]*(?:>>>|In \[\d+\]:|\.\.\.:?)(?: (.*)|$)")
QUOTED = re.compile(r"^(['\"])\1\1py(?:thon)?3?\s*$", re.M)
NUMBERED = re.compile(r"[ \t]*(\d{1,4})(?:[ \t]?[:.|)│]|(?=[ \t]|$))[ \t]?(.*)")
INNER = re.compile(r"\s*(?:return|yield|else|elif|except|finally|break|continue)\b")  # never begins a program
FUTURE = re.compile(r"^from __future__ import [^\n(]+\n?", re.M)
TYPOGRAPHY = str.maketrans("“”„‘’\u00a0\u2003−–", '"""\'\'  --', "\u200b\u200c\u2060")


# ---------------------------------------------------------------- the prompt


@dataclass(frozen=True)
class Context:
    """What a program may take for granted, from the prompt."""

    root: str  # the name that has to be defined: `Solution` of the entry point Solution().order
    above: str  # the prompt's code above the definition of the entry point
    head: str | None = None  # that, and the definition up to where its body is to be written, if one is open
    first_line: int = 0  # of the open definition, in head
    indent: str = ""  # of its body
    method: str = ""  # whose body is open, where the entry point is a class
    above_method: int = 0  # lines of head

    @functools.cached_property
    def names(self):
        tree, _ = parsed(self.above)
        return all_bound(pieces_of(self.above, tree)) if tree else set()


@functools.lru_cache(maxsize=4096)
def context_of(prompt, entry_point):
    """The context that a prompt gives: it is code, has code in a fence, or ends in code."""
    root = next(iter(re.findall(r"[A-Za-z_]\w*", entry_point)), entry_point)
    prompt = prompt.replace("\r\n", "\n")
    best = None
    for code in codes_of(prompt):
        found = read_prompt(code, root)
        best = found if found and (best is None or found.head is not None) else best
        if best and best.head is not None:
            break
    best = best or Context(root, "")
    if root != "Solution":
        return best
    given = leetcode.prelude(prompt)
    return dataclasses.replace(
        best,
        above=given + best.above,
        head=None if best.head is None else given + best.head,
        first_line=best.first_line + given.count("\n"),
        above_method=best.above_method + given.count("\n"),
    )


def codes_of(prompt):
    """What may be code in a prompt: all of it, what stands in its fences, its end."""
    yield prompt
    yield from (block.text for block in reversed(blocks_of(prompt)) if block.fenced)
    lines = prompt.split("\n")
    starts = [i for i, line in enumerate(lines) if re.match(r"(?:async |def |class |from |import |@)", line)]
    yield from ("\n".join(lines[i:]) for i in starts[:TRIES])


def read_prompt(code, root):
    """The context of a prompt that is Python up to a body which is still to be written; None if it is not."""
    bare, tail = code.rstrip(), code.rpartition("\n")[2]
    last = bare.rpartition("\n")[2]
    indent = tail if tail and not tail.strip() else last[: len(last) - len(last.lstrip())] + "    "
    for source in (code if tail.strip() or not tail else bare + "\n", f"{bare}\n{indent}pass\n"):
        tree, _ = parsed(source)
        if tree:
            return context_in(code, pieces_of(source, tree), root)
    return None


def context_in(code, pieces, root):
    opened, above, bound = None, "", {*BUILTINS, "*"}
    for piece in pieces:
        if any(isinstance(node, DEFINITIONS) and node.name == root for node in piece.nodes):
            opened = piece
        elif piece.defines or piece.binds and not piece.acts and piece.uses <= bound:  # examples stay behind
            above, bound = above + piece.source + "\n", bound | piece.binds
    if opened is None or opened is not pieces[-1]:
        return Context(root, above)
    head = above + "\n".join(code.split("\n")[opened.first_line - 1 :])
    shift = above.count("\n") + 1 - opened.first_line
    outer = node = opened.nodes[-1]
    while isinstance(node.body[-1], DEFINITIONS):
        node = node.body[-1]
    indent, method = " " * node.body[0].col_offset, node.name if node is not outer else ""
    return Context(root, above, head, outer.lineno + shift, indent, method, node.lineno - 1 + shift)


# ---------------------------------------------------------------- blocks


@dataclass
class Block:
    text: str
    fenced: bool = False
    intro: str = ""  # the text before a fenced block, and the block's first line if that is a comment

    @functools.cached_property
    def runs(self):
        return runs_of(self.text)


def blocks_of(text):
    """The parts of a text between marks and fences. A mark in fenced code that compiles is part of it."""
    blocks = []
    for block in fenced_blocks(text.split("\n")):
        if block.fenced and parsed(textwrap.dedent(block.text))[0]:
            blocks.append(block)
            continue
        parts = [part for part in MARK.split(block.text) if part.strip()]
        if len(parts) > 1 and block.fenced:
            blocks += [inner for part in parts for inner in fenced_blocks(part.split("\n"))]
        else:
            blocks += [dataclasses.replace(block, text=part) for part in parts]
    return blocks


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
        intro = "\n".join(between)[-1000:] + "\n" + "".join(re.findall(r"\A\s*#.*", text))
        blocks += [Block("\n".join(between)), Block(text, True, intro)]
        between, i = [], end
        if end < len(lines) and not MARK.sub("", FENCE.match(lines[end])["info"]).strip():
            i += 1  # a labelled fence opens the next block
    return [block for block in [*blocks, Block("\n".join(between))] if block.text.strip()]


def closing_fence(lines, start, mark):
    """The line that ends the block which begins at `start`: not one in a docstring of its code."""
    first = None
    for j in range(start + 1, len(lines)):
        fence = FENCE.match(lines[j])
        if fence and fence["mark"].startswith(mark):
            first = j if first is None else first
            text = fence_content(lines, start, j)
            level = textwrap.dedent(text)
            if parsed(level)[0] or parsed(f"def _():\n{textwrap.indent(level, '    ')}\n")[0]:
                return j
            if text.count('"""') % 2 == text.count("'''") % 2 == 0:
                break
    return len(lines) if first is None else first


def fence_content(lines, start, end):
    """What stands between two fences; the closing one may stand behind code."""
    fence = FENCE.match(lines[end]) if end < len(lines) else None
    behind = [fence["before"]] if fence and fence["before"].strip() else []
    first = FIRST_LINE.match(FENCE.match(lines[start])["info"])
    text = "\n".join([*([first[1]] if first else []), *lines[start + 1 : end], *behind])
    if re.match(r"\s*(?:>>>|\.\.\.)", text):
        text = session(text)
    return textwrap.dedent(text) if lines[start][:1].isspace() else text


def session(text):
    """What was typed in a session of the interpreter."""
    lines = [SESSION.match(line) for line in text.split("\n")]
    return "\n".join(line[1] or "" for line in lines if line)


def introduced(block, has_program_above):
    """CORRECTED, MISTAKEN or 0, by the words before a block."""
    text = AVOIDED.sub("", block.intro)
    last = [part for part in re.split(r"\n\s*\n", text) if part.strip()][-1:]
    words = " ".join(text.split()[-25:])
    otherwise = OTHERWISE.search(words)
    if not otherwise and (CORRECTION.search(words) or has_program_above and WITHDRAWN.match(text)):
        return CORRECTED
    if last and PRESENTED.search(last[0]) and not MISTAKE.search(last[0]):
        return 0
    return MISTAKEN if MISTAKE.search(words) else 0


# ---------------------------------------------------------------- candidates


@dataclass
class Found:
    """A program that defines the entry point, as pieces, and further pieces that may hold what it needs."""

    own: list
    pool: list
    body: str = ""  # of a continuation: the prompt's code with its body
    rank: int = 0  # CORRECTED before 0 before MISTAKEN before STUB


CORRECTED, MISTAKEN, STUB = -1, 1, 2


def continuation(context, lines, written=None):
    """The prompt continued by `lines`, as far as they do continue it. `written`: the lines as they were."""
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
    tree, end = longest(head, lines, written)
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
    """The first run of lines that defines the entry point; or one that is indented, as code is in
    Markdown."""
    runs = runs_of(text) if runs is None else runs
    if not any(context.root in piece.binds for run in runs for piece in run):
        lines, runs = text.split("\n"), []
        for start in list(indented_starts(lines))[:TRIES]:
            end = next((i for i in range(start, len(lines)) if lines[i][:1].strip()), len(lines))
            runs += runs_of(textwrap.dedent("\n".join(lines[start:end])))
    for run in runs:
        defining = [piece for piece in run if context.root in piece.binds]
        if defining:
            pool = [piece for other in runs if other is not run for piece in other]
            only = all(piece.imports for piece in defining)  # perhaps a test's `from solution import f`
            return Found(run, pool, rank=STUB * is_stub(defining[-1], context.root) or MISTAKEN * only)
    return None


def is_stub(piece, root):
    """Whether a definition has no body yet: docstrings, `pass`, `...` or raise NotImplementedError alone."""
    node = next((node for node in piece.nodes if isinstance(node, DEFINITIONS) and node.name == root), None)
    if node is None:
        return False
    is_class = isinstance(node, ast.ClassDef)
    functions = [each for each in node.body if isinstance(each, DEFINITIONS)] if is_class else [node]
    return all(is_empty(statement) for function in functions for statement in function.body)


def is_empty(statement):
    if isinstance(statement, ast.Raise):
        return statement.exc is not None and base_name(statement.exc) == "NotImplementedError"
    if isinstance(statement, ast.Expr):
        acts = (ast.Call, ast.Await, ast.Yield, ast.YieldFrom, ast.NamedExpr)
        return not any(isinstance(node, acts) for node in ast.walk(statement))
    return isinstance(statement, (ast.Pass, *IMPORTS))


def program_in(context, block):
    """The program in a block: one that it begins with, else a continuation, else one further down."""
    lines = textwrap.dedent(block.text).strip("\n").split("\n")
    tree, count = longest("", lines)
    found = whole(context, "\n".join(lines[:count])) if tree else None
    if found and found.rank == 0:
        found.pool = [piece for run in block.runs for piece in run]
        return found
    both = [continuation(context, block.text.split("\n")), whole(context, block.text, block.runs)]
    return min((found for found in both if found), key=lambda found: found.rank, default=None)


def find(context, text):
    """The program in `text`, or None."""
    level = textwrap.dedent(text)
    marked = any(MARK.fullmatch(line.strip()) for line in text.split("\n"))
    found = whole(context, level) if not marked and parsed(level)[0] else None
    if not found and text.lstrip("\n")[:1].isspace():
        found = continuation(context, text.split("\n"))
    if found and found.rank == 0:
        return found
    blocks, programs = blocks_of(text), []
    for block in blocks:
        found = program_in(context, block)
        if found:
            found.pool = found.pool + [
                piece for other in blocks if other is not block for run in other.runs for piece in run
            ]
            found.rank = found.rank or introduced(block, bool(programs))
            programs.append(found)
    corrected = [found for found in programs if found.rank == CORRECTED]
    good = [found for found in programs if found.rank < STUB]
    if good:
        best = corrected[-1] if corrected else min(good, key=lambda found: found.rank)
        grown = [found for found in good if returns(found) and grows(best, found, context.root)]
        best = grown[0] if grown and not returns(best) else best
        return joined(context, blocks) or best if best.body and not returns(best) else best
    return body_without_indentation(context, blocks) or joined(context, blocks) or next(iter(programs), None)


def joined(context, blocks):
    """The program, or the continuation that returns, in all fenced blocks together."""
    if any(OTHERWISE.search(block.intro) for block in blocks):
        return None
    text = "\n".join(block.text.strip("\n") for block in blocks if block.fenced)
    found = continuation(context, text.split("\n")) or whole(context, text)
    return found if found and found.rank == 0 and returns(found) else None


def returns(found):
    return any(
        isinstance(node, (ast.Return, ast.Yield, ast.YieldFrom))
        for piece in found.own
        for statement in piece.nodes
        for node in ast.walk(statement)
    )


def grows(first, later, root):
    """Whether a later program begins with all lines of the first, which a model wrote step by step."""
    texts = [[piece.source for piece in found.own if root in piece.binds][-1] for found in (first, later)]
    return texts[1].startswith(texts[0] + "\n")


def body_without_indentation(context, blocks):
    """A continuation whose lines, or whose first line, lost their indentation; of the ways to give it back
    the one that keeps most lines."""
    for block in blocks:
        level = context
        if context.method and re.search(rf"^\s*def {context.method}\(", block.text, re.M):
            head = context.head.split("\n")[: context.above_method]  # the method without its class
            level = dataclasses.replace(context, head="\n".join([*head, ""]), indent="    ")
        bodies = [continuation(level, *lines) for lines in indented_again(block.text, level.indent)]
        bodies = [each for each in bodies if each and each.rank == 0 and adds_something(each, level)]
        if bodies:
            found = max(bodies, key=lambda each: len(each.body.rstrip().split("\n")))
            found.pool = found.pool + [piece for block in blocks for run in block.runs for piece in run]
            return found
    return None


def indented_again(text, indent):
    """(lines with the indentation of a body, lines as written): the first line is indented, or all are; also
    those of a body that follows words."""
    lines = text.expandtabs(4).split("\n")
    filled = [i for i, line in enumerate(lines) if line.strip()]
    below_words = next((i for i in filled if not is_words(lines[i])), 0)
    for start in dict.fromkeys([*filled[:1], *list(indented_starts(lines))[:1], below_words]):
        body = lines[start:]
        yield [indent + body[0].lstrip(), *body[1:]], body
        rest = textwrap.dedent("\n".join(body[1:])).split("\n")
        yield [indent + body[0].lstrip(), *[indent + line if line else line for line in rest]], body
        widths = [width(line) for line in body if line.strip()]
        for shift in {len(indent) - min(widths), len(indent) - widths[0]}:
            yield (
                [" " * shift + line if shift > 0 else line[min(-shift, width(line)) :] for line in body],
                body,
            )


def width(line):
    return len(line) - len(line.lstrip())


def is_words(line):
    """Whether a line is no code, not even broken code."""
    return not line[0].isspace() and not can_start(line) and not keyword.iskeyword(line.split()[0])


def indented_starts(lines):
    """Where indented lines begin that belong to no statement above them, not even to a broken one."""
    above = ""
    for i, line in enumerate(lines):
        if line.strip():
            if line[0].isspace() and (not above or is_words(above)):
                yield i
            above = line


def adds_something(found, context):
    """Whether a continuation adds a statement to the prompt's body, not only words that happen to be
    names."""
    node, first = found.own[-1].nodes[-1], context.head.count("\n")
    while isinstance(node.body[-1], DEFINITIONS) and node.body[-1].lineno <= first:
        node = node.body[-1]
    return not all(is_empty(statement) for statement in node.body if statement.lineno > first)


# ---------------------------------------------------------------- what others call


def readings(text):
    """The ways to read an output, in order: a special token ends it, unless it is part of the only program;
    signs that were changed on the way are read as Python's where nothing else compiles."""
    cut = reply(text)
    tagged = [match[2] for match in TAGGED.finditer(cut)]
    yield from [part for part in tagged[-1:] if re.search(r"\b(?:def|class|lambda|return)\b", part)]
    yield cut
    yield reply(text, cut=False)
    yield cut.translate(TYPOGRAPHY)
    yield html.unescape(re.sub(r"<br ?/?>\n?", "\n", cut)).translate(TYPOGRAPHY)
    yield re.sub(r"^> ?", "", cut, flags=re.M)
    if "\n" not in cut.strip():
        yield cut.replace("\\n", "\n").replace('\\"', '"')
    yield from transported(cut)


def transported(text):
    """Readings of a text whose code was carried by something else than plain lines and fences."""
    lines = text.split("\n")
    if "`" in text and "```" not in text:
        yield "\n".join(text.split("`")[1::2])
    if QUOTED.search(text):
        yield re.sub(r"^(['\"])\1\1(?=\s*$|py)", "```", text, flags=re.M)
    if re.search(r"^[ \t]*(?:>>>|In \[\d+\]:) ", text, re.M):
        yield session(text)
    numbered = [NUMBERED.match(line) for line in lines]
    numbers = [int(match[1]) for match in numbered if match]
    if any(after == number + 1 for number, after in zip(numbers, numbers[1:])):
        yield "\n".join(match[2] if match else line for match, line in zip(numbered, lines))
    if any(line.startswith("+") for line in lines):
        kept = [line for line in lines if not line.startswith(("-", "@@", "+++"))]
        yield "\n".join(line[1:] if line.startswith(("+", " ")) else line for line in kept)
    if "\\n" in text:
        yield "\n\n".join(strings_of(text))
    if "\\_" in text:
        yield text.replace("\\_", "_").replace("\\*", "*")


def strings_of(text):
    """The strings of JSON in a text that have several lines."""
    for part in re.split(r'(?<!\\)"', text):
        if "\\n" in part and "\n" not in part:
            try:
                yield json.loads(f'"{part}"')
            except ValueError:
                continue


def look_for(text, context):
    """The program in an output, or None; a stub only where no reading gives more."""
    seen, stub = set(), None
    for reading in readings(text):
        if reading not in seen and (found := find(context, reading)):
            if found.rank < STUB:
                return found
            stub = stub or found
        seen.add(reading)
    return stub


def program_of(context, found, names):
    """The text of a program: what the prompt gives, what other blocks supply, what the entry point needs."""
    if found.body:
        own, wanted = found.own, set().union(*[piece.uses for piece in found.own])
    else:
        own, wanted = kept(found.own, context.root, {context.root, *names})
    others = "".join(f"{p.source}\n" for p in supplied(found.pool, wanted, context.names | all_bound(own)))
    if found.body:
        program = found.body + others
    else:
        program = context.above + others + "".join(f"{piece.source}\n" for piece in own)
    futures = dict.fromkeys(FUTURE.findall(program))  # they come first or not at all
    return "".join([*futures, FUTURE.sub("", program)]) if futures else program


def complete(prompt, completion, entry_point, tests=""):
    """The program that `completion` stands for: with all that `prompt` gives it, and with what `tests` call
    besides the entry point. What holds no program becomes one that fails: the prompt and the completion as
    they are."""
    context = context_of(prompt, entry_point)
    found = look_for(completion, context)
    if found is None:
        return (context.above if context.head is None else context.head) + reply(completion)
    return program_of(context, found, global_names(tests))


def extract_code(text, entry_point=""):
    """The program in an output, or the body of the function `entry_point`; "" when there is none. Without a
    name it is what the output defines last."""
    defined = re.findall(r"^(?:async def|def|class) (\w+)", reply(text), re.M)
    entry_point = entry_point or next(reversed(defined), "_")
    context = Context(entry_point, "", f"def {entry_point}():\n", 1, "    ")
    found = look_for(text, context)
    return program_of(context, found, ()).removeprefix(context.head) if found else ""


def grading_item(prompt, completion, tests, entry_point):
    """The arguments of `benchmark.grading.grade` for a completion: all verdicts on programs are formed from
    these.

    prompt: text, or the messages of a chat. What it defines is given to the tests as it stands there.
    """
    if not isinstance(prompt, str):
        prompt = "\n\n".join(str(turn["content"]) for turn in prompt if turn.get("role") != "assistant")
    tests = tests if isinstance(tests, str) else "\n".join(tests)
    context = context_of(prompt, entry_point)
    return {
        "program": complete(prompt, completion, entry_point, tests),
        "tests": tests,
        "entry_point": entry_point,
        "helpers": context.above if context.names else "",
    }


def tests_of(row):
    """(tests, entry point) of a row in the form of HumanEval or LeetCodeDataset (`test`), of MBPP
    (`test_list`), or with `tests`; ("", "") when it has none."""
    if row.get("test_list"):
        setup = [*(row.get("test_imports") or []), row.get("test_setup_code") or ""]
        tests = "\n".join([*filter(None, setup), *row["test_list"]])
        defined = re.findall(r"^(?:def|class)[ \t]+(\w+)", row.get("code") or "", re.M)
        called = re.findall(r"\b([A-Za-z_]\w*)\s*\(", row["test_list"][0])
        called = [name for name in called if name in defined] if defined else called
        return tests, row.get("entry_point") or next(iter(called), "")
    tests = row.get("tests") or row.get("test") or ""
    tests = tests if isinstance(tests, str) else "\n".join(tests)
    return tests, row.get("entry_point") or ("Solution" if re.search(r"\bSolution\(", tests) else "")
