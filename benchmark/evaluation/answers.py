"""Reads what models write: the program in an answer (`extract_code`) and the final number of a solution
(`extract_answer`, `answers_equal`).

Both are rules, not judgement, and results depend on them: a change of either raises its version, which every
summary names.
"""

import ast
import re
from fractions import Fraction

EXTRACT_CODE_VERSION = 1
EXTRACT_ANSWER_VERSION = 1

FENCE = re.compile(r"^[ \t]*(```+|~~~+)[ \t]*([\w+#.-]*)[^\n`]*$", re.M)
PYTHON_LABELS = ("", "python", "py", "python3", "python2", "ipython", "pycon", "sage")
CODE_START = re.compile(
    r"^(?:def |class |async def |import |from \S+ "
    r"import|@\w|#|\"\"\"|'''|[A-Za-z_]\w*(?:\s*:[^=\n]+)?\s*=[^=])"
)
PROSE = re.compile(r"^[A-Z][A-Za-z'’]*,?(?: [A-Za-z'’`]+[,.;:]?){2,}")


# ---------------------------------------------------------------- programs


def defines(code, entry_point):
    """Whether code defines entry_point at its top level."""
    name = re.escape(entry_point)
    return bool(
        re.search(
            rf"^(?:async[ \t]+)?(?:def|class)[ \t]+{name}\b|^{name}[ \t]*(?::[^=\n]+)?=[^=]", code, re.M
        )
    )


def extract_code(text, entry_point=None):
    """The program in what a model wrote; leading spaces stay, so that a function body remains one.

    In this order: what follows a closing </think>; the fenced blocks labelled as Python or not at all (also
    an unclosed one, and what precedes a closing fence that was never opened): of several the last that
    defines entry_point, else the last that defines anything, else the first; without fences the text without
    the prose before and after it.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = text.rpartition("</think>")[2] if "</think>" in text else text
    blocks = _blocks(text)
    if not blocks:
        return _without_prose(text)
    wanted = [code for code in blocks if entry_point and defines(code, entry_point)]
    if wanted:
        return wanted[-1]
    defining = [code for code in blocks if re.search(r"^(?:async )?(?:def|class) ", code, re.M)]
    return (defining[-1:] or blocks)[0]


def _blocks(text):
    fences = list(FENCE.finditer(text))
    if not fences:
        return []
    blocks, others = [], []
    before = text[: fences[0].start()]
    if (
        not fences[0][2]
        and re.search(r"^(?:[ \t]+\S|def |class |import |from |return\b)", before, re.M)
        and not _opens(fences)
    ):
        blocks.append(before)  # the prompt opened the fence, the answer only closes it
        fences = fences[1:]
    while fences:
        opening, rest = fences[0], fences[1:]
        closing = next(
            (
                fence
                for fence in rest
                if not fence[2] and fence[1][0] == opening[1][0] and len(fence[1]) >= len(opening[1])
            ),
            None,
        )
        body = text[opening.end() + 1 : closing.start() if closing else len(text)]
        (blocks if opening[2].lower() in PYTHON_LABELS else others).append(_dedented(body, opening))
        fences = [fence for fence in rest if closing and fence.start() > closing.start()]
    blocks = [block for block in blocks if block.strip()]
    return blocks or others


def _opens(fences):
    """Whether the first, unlabelled fence opens a block: then it has a partner before any labelled one."""
    return len(fences) > 1 and not fences[1][2] and len(fences) % 2 == 0


def _dedented(body, opening):
    """A block inside a list item is indented as a whole, with its fence."""
    indent = len(opening[0]) - len(opening[0].lstrip())
    lines = body.split("\n")
    if indent and all(not line.strip() or line[:indent].isspace() for line in lines):
        return "\n".join(line[indent:] for line in lines)
    return body


def _without_prose(text):
    lines = text.split("\n")
    if not any(re.match(r"(?:async def|def|class) ", line) for line in lines):
        return text  # the body of a function, or no program at all
    start = next((i for i, line in enumerate(lines) if CODE_START.match(line)), 0)
    kept, quoted = [], None
    for line in lines[start:]:
        if quoted is None and PROSE.match(line):
            break
        kept.append(line)
        for mark in re.findall(r'"""|\'\'\'', line):
            quoted = mark if quoted is None else None if quoted == mark else quoted
    return "\n".join(kept)


def complete(prompt, completion, entry_point, imports="", whole_prefix=None):
    """The program that `completion` stands for.

    A completion that defines the entry point is a whole program and goes behind `whole_prefix` (what it may
    take for granted; default: the imports), any other one continues the prompt. A body whose first line, or
    every line, lost its indentation gets it back.
    """
    code = extract_code(completion, entry_point)
    if defines(code, entry_point):
        futures = re.findall(r"^from __future__ import [^\n(]+$", code, re.M)  # they come first or not at all
        return (
            "\n".join([*futures, imports if whole_prefix is None else whole_prefix, code])
            if imports or whole_prefix
            else code
        )
    lines = code.split("\n")
    first = next((i for i, line in enumerate(lines) if line.strip()), None)
    last = prompt.rstrip(" ").rpartition("\n")[2]
    open_indent = (
        len(prompt) - len(prompt.rstrip(" ")) if not last else 0
    )  # the prompt ends in the indentation of the body (LeetCode)
    if open_indent:
        prompt = prompt[: len(prompt) - open_indent]
        if first is not None and not lines[first].startswith(" " * open_indent):
            indent = len(lines[first]) - len(lines[first].lstrip())
            rest = [line for line in lines[first + 1 :] if line.strip()]
            whole = any(len(line) - len(line.lstrip()) < open_indent for line in rest)
            shift = " " * (open_indent - indent)
            lines = [
                shift + line if line.strip() and (i == first or whole) else line
                for i, line in enumerate(lines)
            ]
    elif first is not None and not lines[first][0].isspace():
        indents = [len(line) - len(line.lstrip()) for line in lines[first + 1 :] if line.strip()] or [8]
        block = re.match(r"(?:if|for|while|with|try|def|class|else)\b.*:\s*(?:#.*)?$", lines[first])
        # What follows tells whether the first line alone was stripped, or the whole body moved left.
        whole = not (indents[0] >= 8 or indents[0] > min(indents) >= 4) if block else indents[0] == 0
        lines = [
            "    " + line if line.strip() and (i == first or whole) else line for i, line in enumerate(lines)
        ]
    return f"{imports}\n{prompt}" + "\n".join(lines) if imports else prompt + "\n".join(lines)


# ---------------------------------------------------------------- numbers

WIDE = str.maketrans(
    "０１２３４５６７８９．，％（）＋－＝：／＊＄￥﹕−–×÷·∶％＜＞［］", "0123456789.,%()+-=:/*$¥:--*/*:%<>[]"
)
ANSWER_MARK = re.compile(
    r"(?:####|(?:the\s+)?(?:final\s+)?answer\s*(?:is|:|=)|answer\s+to\s+the\s+\w+\s+is"
    r"|答案?\s*(?:是|为|:|=)|答\s*:|因此|所以结果(?:是|为))\s*:?\s*",
    re.I,
)
EXPRESSION = re.compile(r"[-+]?[(\d.][\d.,+\-*/()%^ :\[\]]*")
NUMBER = re.compile(
    r"-?(?:\d+\(\d+/\d+\)|\(\d+/\d+\)|\d+(?:\.\d+)?\s*/\s*\d+(?:\.\d+)?(?![\d.])"
    r"|\d[\d,]*(?:\.\d+)?|\.\d+)\s*%?"
)


def plain_text(text):
    """Wide characters, LaTeX and thousands separators in the plain form that Python reads."""
    text = str(text).translate(WIDE)
    text = re.sub(r"\\(?:left|right|displaystyle|!|,|;|quad|:)", "", text)
    text = re.sub(r"\\(?:text|mathrm|mbox|operatorname|textbf|mathbf)\s*\{([^{}]*)\}", r" \1 ", text)
    for _ in range(3):  # nested fractions
        text = re.sub(r"(?<=\d)\s*\\[dtc]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"((\1)/(\2))", text)
        text = re.sub(r"\\[dtc]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"((\1)/(\2))", text)
    text = re.sub(r"\\[dtc]?frac\s*(\d)\s*(\d)", r"(\1/\2)", text)
    text = (
        text.replace("\\times", "*")
        .replace("\\cdot", "*")
        .replace("\\div", "/")
        .replace("\\%", "%")
        .replace("\\$", "")
        .replace("^", "**")
    )
    text = (
        text.replace("$", "")
        .replace("¥", "")
        .replace("{", "(")
        .replace("}", ")")
        .replace("[", "(")
        .replace("]", ")")
    )
    text = (
        re.sub(r"(\d+)\s*又\s*\(?\s*(\d+)\s*(?:/|分之)\s*(\d+)\s*\)?", r"\1(\2/\3)", text)
        if "分之" not in text
        else _chinese_fraction(text)
    )
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)


def _chinese_fraction(text):
    text = re.sub(r"(\d+)\s*又\s*(\d+)\s*分之\s*(\d+)", r"\1(\3/\2)", text)
    return re.sub(r"百分之\s*(\d+(?:\.\d+)?)", r"\1%", re.sub(r"(\d+)\s*分之\s*(\d+)", r"(\2/\1)", text))


def evaluate_number(text):
    """The value of a number, mixed fraction such as 4(5/11), percentage, ratio or arithmetic expression as a
    Fraction, or None."""
    text = plain_text(text).strip().strip(".。．;；,， ").replace(" ", "")
    text = re.sub(r"(\d+)\(\((\d+)\)/\((\d+)\)\)", r"\1(\2/\3)", text)
    text = re.sub(r"(?<![\d.)])(\d+)\((\d+)/(\d+)\)", r"(\1+\2/\3)", text)  # a mixed number, not a product
    text = (
        re.sub(r"(\d+(?:\.\d+)?|\))%", r"\1/100", text)
        if re.fullmatch(r"[^%]*%", text) and not re.search(r"[*/+(-]", text[1:])
        else re.sub(r"(\d+(?:\.\d+)?)%", r"(\1/100)", text)
    )
    text = re.sub(r"^(\d+(?:\.\d+)?):(\d+(?:\.\d+)?)$", r"\1/\2", text)
    text = re.sub(r"(?<![\d.])0+(?=\d)", "", text)
    if not text or len(text) > 200 or not re.fullmatch(r"[\d.+\-*/() ]+", text):
        return None
    try:
        return _value(ast.parse(text, mode="eval").body)
    except (
        SyntaxError,
        ValueError,
        ZeroDivisionError,
        OverflowError,
        RecursionError,
        MemoryError,
        TypeError,
    ):
        return None


def _value(node):
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return Fraction(repr(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        return -_value(node.operand) if isinstance(node.op, ast.USub) else _value(node.operand)
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Add):
            return left + right
        if isinstance(node.op, ast.Sub):
            return left - right
        if isinstance(node.op, ast.Mult):
            return left * right
        if isinstance(node.op, ast.Div):
            return left / right
        if isinstance(node.op, ast.Pow) and right.denominator == 1 and abs(right) <= 64 and abs(left) < 10**9:
            return left ** int(right)
    raise ValueError("not arithmetic")


def _boxed(text):
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if start < 0:
        return None
    depth, begin = 0, text.index("{", start) + 1
    for i in range(begin, len(text)):
        if text[i] == "}" and depth == 0:
            return text[begin:i]
        depth += (text[i] == "{") - (text[i] == "}")
    return text[begin:]


def extract_answer(text):
    """The final answer in a solution, as text: the last \\boxed{}, else what follows the last mark (####,
    "the answer is", 答案是), else what follows x=, else the last number. Of an equation the right side. "" when
    there is none."""
    text = str(text).replace("\r\n", "\n")
    text = text.rpartition("</think>")[2] if "</think>" in text else text
    boxed = _boxed(text)
    if boxed is not None:
        return _right_side(boxed)
    text = plain_text(
        text.replace("**", " ") if re.search(r"\*\*[^*\n]*[^\d*\n(][^*\n]*\*\*", text) else text
    )
    marks = [
        mark
        for mark in ANSWER_MARK.finditer(text)
        if NUMBER.search(text[mark.end() :].split("\n")[0] or "") or mark[0].startswith("####")
    ]
    if marks:
        line = text[marks[-1].end() :].lstrip().split("\n")[0]
        found = _right_side(line)
        if found:
            return found
    equations = re.findall(r"\bx\s*=\s*([^\n,，。;；]+)", text)
    if equations and _right_side(equations[-1]):
        return _right_side(equations[-1])
    numbers = NUMBER.findall(text)
    return numbers[-1].strip().rstrip(",") if numbers else text.strip()


def _right_side(text):
    """Of `6000/(1+3/5) = 3750 元` the last part that holds a number, without its unit."""
    text = plain_text(text).replace("≈", "=").replace("approx", "=")
    for part in reversed(text.split("=")):
        for match in EXPRESSION.finditer(part):
            candidate = match[0].rstrip("+-*/(^:., ")
            while candidate and candidate.count("(") < candidate.count(")") and candidate.endswith(")"):
                candidate = candidate[:-1].rstrip()
            if evaluate_number(candidate) is not None:
                return candidate.strip()
            number = NUMBER.search(part)
            if number:
                return number[0].strip()
    return text.strip()


def answers_equal(answer, gold):
    """Whether an extracted answer has the value of the gold answer.

    Values are compared exactly as fractions; a decimal of at least two places stands for what rounds to it,
    within half a percent. A percentage is its value, but where gold has no percent sign (GSM8K) `20%` also
    stands for 20. What is no number is compared as text.
    """
    answer, gold = str(answer), str(gold)
    mine, theirs = (
        evaluate_number(_right_side(answer) if answer.strip() else ""),
        evaluate_number(_right_side(gold)),
    )
    if theirs is None:
        return plain_text(answer).strip().casefold() == plain_text(gold).strip().casefold() != ""
    if mine is None:
        return False
    if _close(mine, theirs, answer, gold):
        return True
    percent = plain_text(_right_side(answer)).strip().endswith("%") and "%" not in plain_text(gold)
    return percent and _close(mine * 100, theirs, answer, gold)


def _close(mine, theirs, answer, gold):
    if abs(mine - theirs) <= Fraction(1, 10**6) * max(1, abs(theirs)):
        return True
    for rounded, exact, text in ((mine, theirs, answer), (theirs, mine, gold)):
        decimals = re.fullmatch(r"\s*[-+]?\d*\.(\d{2,})\s*", _right_side(text))
        if (
            decimals
            and abs(rounded - exact) <= Fraction(1, 2 * 10 ** len(decimals[1]))
            and abs(rounded - exact) <= abs(exact) / 200
        ):
            return True
    return False
