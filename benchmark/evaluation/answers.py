r"""Reads the final answer of a solution (`extract_answer`) and compares it with the right one (`answers_equal`).

    >>> verdict("5 * 3 = 15. The answer is $15{,}000$ dollars.", "15000")["passed"]
    True

The answer is what stands, in this order: in <answer> tags; in the last \boxed{} that is not empty; behind the first ####;
behind the last "the answer is" or 答案是; else it is the last number, of an equation the right side. What the model asks
itself afterwards does not count, and two answers are none.

Numbers (signs, separators, units, currency, per cent, fractions, powers, arithmetic that was not carried out, Chinese
notation) are compared as exact fractions. Everything else is compared by math-verify. ANSWERS.md in this folder lists
what differs between the two, and why.
"""

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

from benchmark.evaluation import symbolic
from benchmark.evaluation.reply import reply

EXTRACT_ANSWER_VERSION = 2

# ---------------------------------------------------------------- plain text

WIDE = str.maketrans(
    "０１２３４５６７８９．，％（）＋－＝：／＊＄￥﹕−–‐‑×÷·∙⋅∶＜＞［］｛｝＾　\u00a0\u202f\u2009",
    "0123456789.,%()+-=:/*$¥:----*/***:<>[]{}^    ",
)
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
SPACING = re.compile(r"\\(?:left|right|displaystyle|textstyle|limits|[bB]ig+[lr]?|[!,;:> ]|q?quad\b)|~")
WORDS_IN_LATEX = re.compile(r"\\(?:text|mathrm|mathbf|mbox|textbf|textit|operatorname|mathit|rm)\s*\{([^{}]*)\}")
CHINESE_FRACTION = re.compile(r"([零一二三四五六七八九十百千]+)分之([零一二三四五六七八九十百千]+)")
FRACTION = re.compile(r"\\[dtc]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))")
REPLACED = {
    r"\times": "*", r"\cdot": "*", r"\div": "/", r"\%": "%", r"\$": "$", r"\#": "#", r"\approx": "≈", r"\circ": "°",
    r"\degree": "°", r"\euro": "€", r"\pounds": "£", r"\(": "", r"\)": "", r"\[": "", r"\]": "", "{,}": ",", "^": "**",
}  # fmt: skip


def plain_text(text):
    """`text` with its wide characters, simple LaTeX, vulgar fractions and superscripts as a calculator would take them."""
    text = "".join(map(one_character, text.translate(WIDE)))
    text = re.sub(r"(?<=[\d)])[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda m: "**" + m[0].translate(SUPERSCRIPTS), text)
    text = re.sub(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ|°)", "°", text.replace("{,}", ",").replace("\\,", ""))
    text = WORDS_IN_LATEX.sub(r" \1 ", SPACING.sub(" ", text))
    text = re.sub(r"(?<=\d)\s+(?=\\[dtc]?frac)", "", text)
    for _ in range(3):  # nested fractions
        text = FRACTION.sub(lambda m: f"({in_parentheses(m[1] or m[2])}/{in_parentheses(m[3] or m[4])})", text)
    for latex, sign in REPLACED.items():
        text = text.replace(latex, sign)
    text = text.replace("{", "(").replace("}", ")")
    text = re.sub(r"(\d)\s*dollars?,?\s*(?:and\s*)?(\d\d)\s*cents?\b", r"\1.\2 dollars", text)
    text = re.sub(r"(\d)元(\d)角(?:(\d)分)?", r"\1.\2\3元", text)
    text = re.sub(r"(?<=\d)\s*比\s*(?=\d)", ":", text)
    text = CHINESE_FRACTION.sub(lambda m: f"{chinese_number(m[1])}分之{chinese_number(m[2])}", text)
    text = re.sub(r"百分之\s*(\d+(?:\.\d+)?)", r"\1%", text)
    text = re.sub(r"(?<=\d)\s*又\s*(\d+)\s*分之\s*(\d+)", r"(\2/\1)", text)
    text = re.sub(r"(\d+)\s*分之\s*(\d+)", r"(\2/\1)", text)
    return re.sub(r"(?<=\d)\s*又\s*\(?\s*(\d+)\s*/\s*(\d+)\s*\)?", r"(\1/\2)", text)


def one_character(sign):
    parts = unicodedata.normalize("NFKC", sign).split("⁄") if sign > "~" else ()
    return f"({parts[0]}/{parts[1]})" if len(parts) == 2 and all(parts) else sign


def in_parentheses(text):
    return text if re.fullmatch(r"\d+", text) else f"({text})"


# ---------------------------------------------------------------- numbers

SPACE = re.compile(r"\s*")
GROUPED = re.compile(r"\d{1,3}(?:([, '_])\d{3})(?:\1\d{3})*(?![\d])(?:\.\d+)?|\d{1,2}(?:,\d\d)+,\d{3}(?!\d)")
DECIMAL = re.compile(r"(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3}(?!\w|\.\d))?")
MIXED = re.compile(r"\(\s*(\d+)\s*/\s*(\d+)\s*\)|\s+(\d+)/(\d+)(?!\d|\.\d)")
TIMES = re.compile(r"\s*(\*\*|[*/:]|[xX](?=\s*\d))\s*")
PLUS = re.compile(r"\s*([-+])\s*")
PERCENT = re.compile(r"\s*(?:%|per\s?cent\b|percentage\b|pct\b)", re.I)
FACTORS = {
    "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "k": 10**3, "K": 10**3,
    "百": 10**2, "千": 10**3, "万": 10**4, "亿": 10**8,
}  # fmt: skip
FACTOR = re.compile(
    r"\s*(hundred|thousand|million|billion|trillion)(?![A-Za-z])|([kK])(?![A-Za-z])|\s*(百(?!分)|千(?![克米瓦卡])|万|亿)"
)
SIGN = re.compile(
    r"\s*(?:(-|minus\b|negative\b|负)|\+|(?:US|A|C|HK|NT|S)?[$€£¥₹₩](?=\s*[-\d.(])|(?:USD|EUR|RMB|CNY|Rs\.?)(?=\s*\d))\s*"
)
LONGEST = 300  # digits of a number, characters of an expression


@dataclass
class Number:
    value: Fraction
    end: int  # where its text ends
    percent: bool = False
    decimals: int = 0  # of a number that was written as a decimal


def number_at(text, start=0):
    """The number, or the arithmetic of numbers, that begins at `start` of a plain text: the longest that makes sense."""
    try:
        return sum_at(text, SPACE.match(text, start).end(), 0)
    except (ZeroDivisionError, OverflowError):
        return None


def sum_at(text, at, depth):
    left = product_at(text, at, depth)
    while left and (sign := PLUS.match(text, left.end)) and (right := product_at(text, sign.end(), depth)):
        left = Number(left.value + right.value if sign[1] == "+" else left.value - right.value, right.end)
    return left


def product_at(text, at, depth):
    left = signed_at(text, at, depth)
    while left and (sign := TIMES.match(text, left.end)) and (right := signed_at(text, sign.end(), depth)):
        if sign[1] == "**":
            return None  # a power of a power
        left = Number(left.value / right.value if sign[1] in "/:" else left.value * right.value, right.end)
    return left


def signed_at(text, at, depth):
    sign = SIGN.match(text, at)
    if not sign:
        return power_at(text, at, depth)
    found = signed_at(text, sign.end(), depth + 1) if depth < 20 else None
    if found and sign[1]:
        found.value = -found.value
    return found


def power_at(text, at, depth):
    base = atom_at(text, at, depth)
    sign = TIMES.match(text, base.end) if base else None
    if not sign or sign[1] != "**":
        return base
    exponent = signed_at(text, sign.end(), depth + 1)
    if not exponent or exponent.value.denominator > 1 or abs(exponent.value) > 64 or abs(base.value) > 10**9:
        return None
    return Number(base.value ** int(exponent.value), exponent.end)


def atom_at(text, at, depth):
    if text[at : at + 1] == "(":
        inner = sum_at(text, SPACE.match(text, at + 1).end(), depth + 1) if depth < 20 else None
        end = SPACE.match(text, inner.end).end() if inner else -1
        if inner is None or text[end : end + 1] != ")":
            return None
        found = Number(inner.value, end + 1)
    else:
        match = GROUPED.match(text, at) or DECIMAL.match(text, at)
        if not match or len(match[0]) > LONGEST:
            return None
        digits = re.sub(r"[, '_]", "", match[0])
        found = Number(Fraction(digits), match.end(), decimals=len(digits.partition(".")[2]))
        mixed = MIXED.match(text, match.end()) if digits.isdigit() else None
        if mixed and int(mixed[2] or mixed[4]):
            found = Number(found.value + Fraction(int(mixed[1] or mixed[3]), int(mixed[2] or mixed[4])), mixed.end())
    while factor := FACTOR.match(text, found.end):
        found = Number(found.value * FACTORS[factor[0].strip()], factor.end())
    if percent := PERCENT.match(text, found.end):
        found = Number(found.value / 100, percent.end(), True, found.decimals and found.decimals + 2)
    return found


# ---------------------------------------------------------------- the value of an answer

ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
WORDS = {word: i for i, word in enumerate(ONES)} | {word: 10 * i for i, word in enumerate(TENS, 2)}
PARTS = dict(half=2, halve=2, third=3, quarter=4, fourth=4, fifth=5, sixth=6, seventh=7, eighth=8, ninth=9, tenth=10)
CHINESE = {sign: i for i, sign in enumerate("零一二三四五六七八九")} | {"两": 2, "〇": 0, "十": 10, "百": 100, "千": 1000}
NUMBER_START = re.compile(r"(?<![A-Za-z0-9_.\\])(?:[-+$€£¥₹₩(]|\.?\d|负|minus\b|negative\b|(?:USD|EUR|RMB|CNY|Rs\.?)\s*\d)")
RELATION = re.compile(r"(?<![<>!≤≥])[=≈](?!=)")
SEVERAL = re.compile(r"\d.*(?:\bor\b|\band\b|或者?|和|[,;、])\s*\$?[A-Za-z]\w*\s*$", re.S)  # x = 1 or x = 2
VARIABLE = re.compile(r"\s*(?:[xyznkabcijpqruvw]\b(?!\s+\w)|[xyz]+\b|\\)")  # 5x, 3\sqrt2: no number with a unit
UNIT_POWER = re.compile(r"(?<=[A-Za-z])\s*(?:\*\*)?\s*(?:\(-?[123]\)|-?[123²³])(?!\d)")
NOTE = re.compile(r"\([^()]*[A-Za-z\u4e00-\u9fff][^()]*\)")


def read(text):
    """The one number that an answer consists of, with or without units, currency and words around it; else None."""
    if len(text) > 2 * LONGEST:
        return None
    plain = re.sub(r"\*\*(?=\D|$)|(?<=\s)\*\*|^\*\*|[`\"]", "", plain_text(text)).strip()
    sides = RELATION.split(plain)
    if len(sides) > 2 and SEVERAL.search(sides[-2]):
        return None  # x = 1 or x = 2
    plain = next((side for side in reversed(sides) if side.strip()), "")
    if not re.search(r"\d", plain):
        return read_words(plain)
    for start in NUMBER_START.finditer(plain):
        found = number_at(plain, start.start())
        if found:
            before, after = plain[: start.start()], UNIT_POWER.sub("", NOTE.sub("", plain[found.end :]))
            if plain.startswith("!", found.end) or VARIABLE.match(plain, found.end) or re.search(r"[\\\d*^<>|]|[-+/]\s*[(\\]|^\s*[-+/]", after):
                return None
            return None if re.search(r"[\\*/^_<>|]|[-+]\s*$|[(\[]\s*$", before) else found
    return None


def read_words(text):
    """twelve, twenty-five thousand, two thirds, 一百二十."""
    total = part = 0
    tokens = re.findall(r"[a-z]+", text.lower())
    if tokens[:1] and tokens[0] in WORDS and tokens[1:2] != ["of"]:
        for token in tokens:
            if token in WORDS:
                part += WORDS[token]
            elif token == "hundred":
                part *= 100
            elif token in FACTORS:
                total, part = total + part * FACTORS[token], 0
            elif token.removesuffix("s") in PARTS:
                return Number(Fraction(total + part or 1, PARTS[token.removesuffix("s")]), 0)
            elif token != "and":
                break
        return Number(Fraction(total + part), 0)
    signs = re.match(r"(?:大?约)?([零〇一二两三四五六七八九十百千]+)(?![共样起定些半般直边])", text)
    return Number(Fraction(chinese_number(signs[1])), 0) if signs else None


def chinese_number(text):
    """120 of 一百二十."""
    total = digit = 0
    for sign in text:
        if CHINESE[sign] < 10:
            digit = CHINESE[sign]
        else:
            total, digit = total + (digit or 1) * CHINESE[sign], 0
    return total + digit


def evaluate_number(text):
    """The value of a number, mixed fraction such as 4(5/11), percentage, ratio or arithmetic expression, else None."""
    found = read(text)
    return found.value if found else None


def answers_equal(answer, gold):
    """Whether an extracted answer has the value of the gold answer.

    Numbers are equal as fractions; a decimal of at least two places stands for what rounds to it, within half a percent.
    A percentage is its value, but where gold has no percent sign (GSM8K) `20%` also stands for 20, and where gold has the
    sign of LaTeX (MATH) 20 also stands for `20\\%`. What is no number is compared as text, then by math-verify.
    """
    answer, gold = str(answer).strip(), str(gold).strip()
    if not answer or not gold:
        return False
    mine, theirs = read(answer), read(gold)
    if mine and theirs:
        if close(mine, theirs, mine.value):
            return True
        if mine.percent and not theirs.percent:
            return close(mine, theirs, mine.value * 100)
        return theirs.percent and not mine.percent and "\\%" in gold and close(mine, theirs, mine.value / 100)
    if as_words(answer) == as_words(gold) != "":
        return True
    if theirs and not mine and not re.search(r"[\d\\]", answer):
        return False
    ratio = re.sub(r"(?<=\d)\s+to\s+(?=\d)", ":", answer)
    if theirs and ":" in gold and ratio != answer:
        return answers_equal(ratio, gold)
    if theirs and not mine and re.search(r"[A-Za-z\u4e00-\u9fff]{2}", re.sub(r"\\[A-Za-z]+", "", answer)):
        return False  # words around several numbers: no answer
    return symbolic.equal(answer, gold)


def close(mine, theirs, value):
    """Whether values are the same, or one is a decimal that stands for the other, rounded or cut off."""
    difference = abs(value - theirs.value)
    places = [number.decimals for number in (mine, theirs) if number.decimals >= 2]
    near = any(2 * difference <= Fraction(1, 10**n) or n > 3 and difference <= Fraction(1, 10**n) for n in places)
    return difference == 0 or near and difference <= abs(theirs.value) / 200


def as_words(text):
    """A text answer without its clothes: (B), \\text{B} and **B**. are one."""
    words = re.sub(r"[\s$*`\"']+", "", plain_text(text)).strip(".。:;；").casefold()
    return words[1:-1] if re.fullmatch(r"\(\w+\)", words) else words


# ---------------------------------------------------------------- where the answer stands

QUESTION = re.compile(
    r"^[ \t*#>]*(?:(?:(?:Next|New|Example|Sample)[ ]?)?(?:Question|Problem|Exercise|Task|Q)[ ]?\d*[*]*\s?[:：.)]"
    r"|(?:Human|User|Student|Instruction|Input|USER|HUMAN)[*]*[ ]?[:：]"
    r"|###[ ]?(?:Instruction|Input|Question|Problem|User|Human)\b|(?:下一题|题目|问题|例题?|练习题?|问)[ ]?\d*[ ]?[:：.、])",
    re.M,
)
ANSWERED = re.compile(r"####|\\boxed|\banswer\b|答|=[^=\n]*\d|\d[^\n]*\s*\Z", re.I)
BOX = re.compile(r"\\(?:boxed|fbox)\s*")
JOINED = re.compile(r"[\s$\\)(]*(?:,|and|or|和|或|、)+[\s$\\)(]*")
EXPLICIT = re.compile(r"####\s*\S*\d|\\boxed\{[^}]|answer is:?\s*\S*\d|答案(?:是|为|[:：])\s*\S*\d", re.I)
TAGGED = re.compile(r"<(answer|final_answer)>(.*?)(?:</\1>|\Z)", re.S)
MARK = re.compile(
    r"\banswers?\b[^.\n:：=]{0,60}?(?:\b(?:is|are|was|be|equals|equal to)\b|[:：=])|^[ \t#*>]*(?:final )?answer[ \t#*:：]*$"
    r"|(?:答案|最终结果|最后结果)[^。\n:：=\d]{0,12}?(?:是|为|等于|[:：=])|答案|答\s*[:：]",
    re.I | re.M,
)
FILLER = re.compile(
    r"(?:[\s*_:：>`=\"'“”】]|therefore\b|thus\b|then\b|about\b|approximately\b|around\b|roughly\b|exactly\b|only\b|simply\b|just\b"
    r"|indeed\b|equal to\b|given by\b|a total of\b|the number\b|also\b|,|是|为|应该?是?|大约|约|等于|一?共有?|总共有?|\\approx)*",
    re.I,
)
ASSIGNED = re.compile(r"\$?\s*[A-Za-z]\w{0,12}\s*(?:\(\w{0,3}\)\s*)?[=≈]\s*")
MATHS = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.S)
DENIED = re.compile(r"\banswer (?:is not|isn't|can't be|cannot be)\b|答案不是", re.I)
WEAK = re.compile(r"\b(?:correct|right|wrong|incorrect|reasonable|consistent|found|obtained|below|above|follows|same|clear)\b", re.I)
CONNECTED = re.compile(
    r"\$?\s*(?:(?:[A-Za-z°%]+\s*){0,2}?,?\s*\b(?:or|and|to)\b|[\u4e00-\u9fff%]{0,3}(?:或者?|和|至|到|~)"
    r"|[,、;](?=\s?[-+$]{0,2}[\d./]+\s?(?:[,.。;、\n$)]|and\b|or\b|和|或|\Z)))"
    r"\s*(?:maybe |possibly |perhaps |even |可能是?)?\$?\s*(?:[A-Za-z]\s*=\s*)?(?=[-\d.(])"
)
COMPOUND = re.compile(r"\s*(?:([A-Za-z]+)\s+(?:and\s+)?|[\u4e00-\u9fff]{1,2}(?:零|又)?)(?=\d)")
PREPOSITIONS = set(
    "per in after for of at by with on from over within every out times because since as when if so then than plus minus "
    "until during before is are was each left x".split()
)
LABEL = re.compile(r"(?:\bstep|\bcase|\bpart|\bno\.|\bquestion|\bproblem|第|#)\s*\Z", re.I)
SENTENCE = re.compile(r"(?<=[.!?])\s+|(?<=[。！？；;])")
ASIDE = re.compile(r"\s*(?:\(.*\)|（.*）|\[.*\]|(?:note|check|verif|注|检验|验算).*)\s*\Z", re.I)
SECOND_THOUGHT = re.compile(r"\b(?:wait|mistake|actually|sorry|recheck|recalculate|correction)\b", re.I)


def extract_answer(text):
    """The final answer in a solution, as text; "" when there is none."""
    text = str(text).replace("\x08oxed", "\\boxed").replace("\x0crac", "\\frac")  # escapes that were read as signs
    text = text.replace("\\\\", "\\") if "\\\\boxed" in text else text
    text = up_to_next_question(reply(text))
    tagged = [match[2] for match in TAGGED.finditer(text) if match[2].strip()]
    text = tagged[-1] if tagged else text
    boxed_at, boxed = last_box(text)
    hashed_at, hashed = after_hashes(text)
    marked_at, marked = after_mark(text)
    at, answer = max((boxed_at, boxed), (hashed_at, hashed), (marked_at, marked), key=lambda each: each[0])
    return answer if at >= 0 else last_number(text)


def up_to_next_question(text):
    """A text without the questions that the model goes on to ask itself: below a heading such as `Question:`, or in a
    paragraph behind an explicit answer."""
    for question in QUESTION.finditer(text):
        before = text[: question.start()]
        if ANSWERED.search(before[-2000:]):
            text = before
            break
    answered = EXPLICIT.search(text)
    for gap in re.finditer(r"\n\s*\n", text) if answered else ():
        paragraph = text[gap.end() :].split("\n\n")[0][:1000]
        if gap.start() > answered.end() and re.search(r"[?？]", paragraph) and not SECOND_THOUGHT.search(paragraph):
            return text[: gap.start()]
    return text


def last_box(text):
    """(place, content) of the last \\boxed{} with something in it, or of several that are joined by `or`."""
    place, content, end = -1, "", len(text)
    for _ in range(20):
        start = max(text.rfind("\\boxed", 0, end), text.rfind("\\fbox", 0, end))
        if start < 0:
            break
        inner, after = braced(text, BOX.match(text, start).end())
        if content and not JOINED.fullmatch(text, after, place):
            break
        if inner.strip(" $\\,"):
            content = inner + text[after:place] + content if content else inner
            place = start
        end = start
    return place, content


def braced(text, start):
    """(content, end) of the group at `start`: to its closing brace, or one word without braces."""
    if text[start : start + 1] != "{":
        word = re.compile(r"[^\s$.,]*").match(text, start)
        return word[0], word.end()
    depth = 0
    for i in range(start, min(len(text), start + 2000)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[start + 1 : i], i + 1
    return text[start + 1 : start + 2000], min(len(text), start + 2000)


def after_hashes(text):
    """(place, answer) behind the first ####, or the last where the model had second thoughts. A heading is no answer."""
    found = []
    for mark in re.finditer(r"####+(?!#)", text):
        tail = text[mark.end() : mark.end() + 400]
        line = next((line for line in tail.split("\n") if line.strip()), "")
        if re.match(r"\s*\d+[.):]\s+\D", line) or line.rstrip().endswith(":"):
            continue
        answer = direct(line) or (line.strip() if not re.search(r"\d", line) and len(line) < 60 else "")
        if answer:
            found.append((mark.start(), answer))
    if len(found) > 1 and not SECOND_THOUGHT.search(text[found[0][0] : found[-1][0]]):
        return found[0] if read(found[0][1]) else found[-1]
    return found[-1] if found else (-1, "")


def after_mark(text):
    """(place, answer) behind the last "the answer is" that an answer directly follows; else a number of the sentence
    behind the last one, else its words."""
    best, weight = (-1, ""), 0
    for mark in reversed(list(MARK.finditer(text))[-100:]):
        tail = text[mark.end() : mark.end() + 400]
        if denied := re.match(r"\s*(?:not\b|n't\b|不是)", tail):
            turn = re.search(r"\bbut\b|\brather\b|而是", tail.split("\n")[0])
            if not turn:
                continue
            tail = tail[max(turn.end(), denied.end()) :]
        line = next((line for line in tail.split("\n") if line.strip()), "")
        sentence, answer = SENTENCE.split(line.strip())[0], direct(tail)
        if answer and not (mark[0][0] == "答" and mark[0][-1] in ":：" and read(answer)):
            return mark.start(), answer
        number = number_of_sentence(sentence, text[: mark.start()])
        if answer:  # behind 答: stands a sentence, often with several numbers
            return mark.start(), number or answer
        words = sentence.strip(" *.。:：")
        if number and weight < 2:
            best, weight = (mark.start(), number), 2
        elif words and len(words) < 60 and not WEAK.search(words) and weight < 1:
            best, weight = (mark.start(), words), 1
    return best


def direct(tail):
    """The answer that `tail` begins with, "" when it begins with words. Two answers come out as both."""
    start = FILLER.match(tail).end()
    tail = tail[start:]
    if tail.startswith(("\\boxed", "$\\boxed", "\\(\\boxed", "\\[\\boxed")):
        return last_box(tail.split("\n")[0])[1]
    plain = plain_text(tail)
    begin = start = ASSIGNED.match(plain).end() if ASSIGNED.match(plain) else 0
    found = number_at(plain, start) if NUMBER_START.match(plain, SPACE.match(plain, start).end()) else None
    while found and (sign := RELATION.match(plain, SPACE.match(plain, found.end).end())):
        following = number_at(plain, sign.end())
        if not following:
            break
        begin, found = sign.end(), following
    maths = MATHS.match(tail)
    if not found or VARIABLE.match(plain, found.end) or re.match(r"\s*[-+*/^]\s*[\\A-Za-z(]|[(,]\S", plain[found.end :]):
        if maths:
            return next(group for group in maths.groups() if group)
        if tail.startswith("\\") or found:
            return re.split(r"[.。;]\s|[.。]?\n|[.。]?\Z", tail)[0]
        words = read_words(plain[:100])
        return plain.split("\n")[0][:60] if words else ""
    return plain[begin : end_of_all(plain, found)]


def end_of_all(plain, number):
    """Where the last of several connected answers ends: `12 or 13`, `2 hours 30 minutes`."""
    end = number.end
    for _ in range(10):
        link = CONNECTED.match(plain, end)
        if not link and (link := COMPOUND.match(plain, end)) and (link[1] or "").lower() in PREPOSITIONS:
            return end
        following = number_at(plain, link.end()) if link else None
        if not following:
            return end
        end = following.end
    return end


def numbers_in(plain):
    """[(start, Number)] of a plain text, without the numbers of steps."""
    found, end = [], 0
    for start in NUMBER_START.finditer(plain):
        if start.start() >= end and (number := number_at(plain, start.start())):
            end = number.end
            if not LABEL.search(plain[max(0, start.start() - 12) : start.start()]):
                found.append((start.start(), number))
    return found


def number_of_sentence(sentence, before):
    """Of several numbers in a sentence the one that was computed last before it, else the last."""
    plain = plain_text(sentence[-1000:])
    relations = [match for match in RELATION.finditer(plain)]
    if relations:
        if len(relations) > 1 and SEVERAL.search(plain[: relations[-1].start()]):
            return plain
        if answer := direct(plain[relations[-1].end() :]):
            return answer
    groups = []  # of connected numbers: (start, end, value of a number alone)
    for start, number in numbers_in(plain):
        if not groups or start >= groups[-1][1]:
            end = end_of_all(plain, number)
            groups.append((start, end, number.value if end == number.end else None))
    result = last_result(before)
    same = [group for group in groups if result is not None and group[2] == result]
    start, end, _ = (same or groups or [(0, 0, None)])[-1]
    return plain[start:end]


def last_result(text):
    plain = plain_text(text[-1000:])
    for match in reversed(list(RELATION.finditer(plain))):
        if found := number_at(plain, match.end()):
            return found.value
    return None


def last_number(text):
    """The answer of a text without any mark: from the last line with a number that is not an aside."""
    lines = [line for line in text.split("\n") if re.search(r"\d", line)]
    while len(lines) > 1 and ASIDE.match(lines[-1][:1000]):
        lines.pop()
    if not lines:
        return text.strip()[:LONGEST]
    line = lines[-1][-2000:]
    bold = [match[1] for match in re.finditer(r"\*\*([^*\n]{1,80})\*\*", line) if read(match[1]) and re.search(r"\d", match[1])]
    if bold:
        return bold[-1]
    before = text[: text.rfind(lines[-1])]
    sentences = [each for each in SENTENCE.split(line) if re.search(r"\d", each)]
    if DENIED.search(sentences[-1]):
        return ""
    maths = [match for match in MATHS.finditer(sentences[-1])]
    if maths and not re.search(r"\d", sentences[-1][maths[-1].end() :]):
        inner = next(group for group in maths[-1].groups() if group)
        if not read(inner):
            return inner
    earlier = line[: line.rfind(sentences[-1])]
    return number_of_sentence(sentences[-1], before + earlier) or sentences[-1].strip()


# ---------------------------------------------------------------- verdicts

GOLD_FIELDS = ("gold", "golden", "ans", "answer", "result", "solution")


def gold_of(row):
    """The right answer of a row of any of the math sets."""
    for name in GOLD_FIELDS:
        if row.get(name) not in (None, ""):
            gold = str(row[name]).rpartition("####")[2].strip()
            return last_box(gold)[1] or gold
    raise ValueError(f"a row has neither tests nor a gold answer ({', '.join(GOLD_FIELDS)}): it has {sorted(row)}")


def verdict(completion, gold):
    """{"passed", "detail"} of a solution: all verdicts on answers are formed here."""
    answer = extract_answer(completion)
    return {"passed": answers_equal(answer, gold), "detail": f"answer {answer[:80]!r}, gold {gold[:80]!r}"}
