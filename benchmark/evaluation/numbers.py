r"""Reads a number as people write it: signs, separators, units, currency, per cent, fractions, powers,
arithmetic that was not carried out, number words, in English, Chinese and simple LaTeX.

    >>> read(r"\$1{,}234.50 per week").value, read("4又5/11").value, read("12 or 13")
    (Fraction(2469, 2), Fraction(49, 11), None)
"""

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

LONGEST = 300  # digits of a number, characters of an expression

# ---------------------------------------------------------------- plain text

WIDE = str.maketrans(
    "０１２３４５６７８９．，％（）＋－＝：／＊＄￥﹕−–‐‑×÷·∙⋅∶＜＞［］｛｝＾　\u00a0\u202f\u2009",
    "0123456789.,%()+-=:/*$¥:----*/***:<>[]{}^    ",
)
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
SPACING = re.compile(
    r"\\(?:left|right|displaystyle|textstyle|limits|[bB]ig+[lr]?|[,;:> ]|q?quad\b|(?:bf|rm)\b(?!\s*\{))|~"
)
TEXT = re.compile(
    r"\\(?:text|mathrm|mathbf|mbox|textbf|textit|operatorname|mathit|rm|underline|boldsymbol|bm)"
    r"\s*\{([^{}]*)\}"
)
COLOR = re.compile(r"\\(?:text)?color\s*\{\w+\}")
REPEATING = re.compile(r"(\d{0,9})\.(\d{0,9})\\(?:overline|bar|dot)\s*\{?(\d{1,9})\}?")
DEGREES = re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ|°)")
FRACTION = re.compile(r"\\[dtc]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))")
SIGNS = {r"\times": "*", r"\cdot": "*", r"\div": "/", r"\%": "%", r"\$": "$", r"\#": "#", "^": "**", "{": "("}
SIGNS |= {"}": ")", r"\approx": "≈", r"\circ": "°", r"\degree": "°", r"\euro": "€", r"\pounds": "£"}
DIGIT = "(?:[零〇一二两三四五六七八九十百]|千(?![克米瓦卡]))"
ZH = f"{DIGIT}(?:{DIGIT}|[万亿]){{0,20}}(?:点[零〇一二三四五六七八九]{{1,10}})?"  # a number in Chinese
CHINESE = {sign: i for i, sign in enumerate("零一二三四五六七八九十")} | {
    "〇": 0,
    "两": 2,
    "百": 100,
    "千": 1000,
}
EUROPEAN = re.compile(  # 1.234.567 and 1.234,56, which have no other reading
    r"(?<![\d.,])\d{1,3}(?:(?:\.\d{3})+,\d{1,2}|(?:\.\d{3}){2,})(?!\d|[.,]\d)"
)
AND_A_PART = re.compile(r"(?<=\d)\s+and\s+(?:(?:an?|one)[ -](half|third|quarter)\b|(\d)/(\d{1,2})(?![\d/.]))")


def plain_text(text):
    """`text` with wide characters, simple LaTeX, fractions and superscripts as a calculator would take
    them."""
    text = "".join(map(one_character, text.translate(WIDE)))
    text = re.sub(r"(?<=[\d)])[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda m: "**" + m[0].translate(SUPERSCRIPTS), text)
    text = REPEATING.sub(repeating, COLOR.sub("", text))
    text = DEGREES.sub("°", text.replace("{,}", ",").replace("\\,", "").replace("\\!", ""))
    text = re.sub(r"(?<=[A-Za-z])\s+\^", "^", TEXT.sub(r" \1 ", SPACING.sub(" ", text)))
    text = re.sub(r"(?<=\d)\s+(?=\\[dtc]?frac)", "", text)
    text = AND_A_PART.sub(lambda m: f"({m[2] or 1}/{m[3] or PARTS[m[1]]})", text)
    for _ in range(3):  # nested fractions
        text = FRACTION.sub(lambda m: f"({grouped(m[1] or m[2])}/{grouped(m[3] or m[4])})", text)
    text = re.sub(r"\\[()\[\]]", "", text)
    for latex, sign in SIGNS.items():
        text = text.replace(latex, sign)
    text = re.sub(r"(\d)\s*dollars?,?\s*(?:and\s*)?(\d\d)\s*cents?\b", r"\1.\2 dollars", text)
    text = EUROPEAN.sub(lambda m: m[0].replace(".", "").replace(",", "."), text)
    text = re.sub(r"([$€£¥]\s?\d[\d.,]{0,20})\s?(?:M|mn)(?![A-Za-z\d$])", r"\1 million", text)
    text = re.sub(r"([$€£¥]\s?\d[\d.,]{0,20})\s?(?:B|bn)(?![A-Za-z\d$])", r"\1 billion", text)
    text = re.sub(
        f"(\\d{{1,9}}|{ZH})个半", lambda m: f"{m[1] if m[1].isascii() else chinese_number(m[1])}.5个", text
    )
    text = re.sub(r"(\d)元(\d)角(?:(\d)分)?", r"\1.\2\3元", text)
    text = re.sub(r"(?<=\d)\s*比\s*(?=\d)", ":", text)
    text = re.sub(f"({ZH})分之({ZH})", lambda m: f"{chinese_number(m[1])}分之{chinese_number(m[2])}", text)
    text = re.sub(r"百分之\s*(\d+(?:\.\d+)?)", r"\1%", text)
    text = re.sub(r"(?<=\d)\s*又\s*(\d+)\s*分之\s*(\d+)", r"(\2/\1)", text)
    text = re.sub(r"(\d+)\s*分之\s*(\d+)", r"(\2/\1)", text)
    return re.sub(r"(?<=\d)\s*又\s*\(?\s*(\d+)\s*/\s*(\d+)\s*\)?", r"(\1/\2)", text)


def one_character(sign):
    """(1/2) of ½."""
    parts = unicodedata.normalize("NFKC", sign).split("⁄") if sign > "~" else ()
    return f"({parts[0]}/{parts[1]})" if len(parts) == 2 and all(parts) else sign


def repeating(match):
    """(3/9) of 0.333..., the period under a bar."""
    whole, start, period = match.groups()
    below = 10 ** len(start) * (10 ** len(period) - 1)
    return f"({int(whole or 0) * below + int(start + period) - int(start or 0)}/{below})"


def grouped(text):
    return text if text.isdigit() else f"({text})"


# ---------------------------------------------------------------- arithmetic

SPACE = re.compile(r"\s*")
SEPARATED = re.compile(r"\d{1,3}(?:([, '_])\d{3})(?:\1\d{3})*(?!\d)(?:\.\d+)?|\d{1,2}(?:,\d\d)+,\d{3}(?!\d)")
DECIMAL = re.compile(r"(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3}(?!\w|\.\d))?")
MIXED = re.compile(r"\(\s*(\d+)\s*/\s*(\d+)\s*\)|\s+(\d+)/(\d+)(?!\d|\.\d)")
TIMES = re.compile(r"\s*(\*\*|[*/:]|[xX](?=\s*\d))\s*")
PLUS = re.compile(r"\s*([-+])\s*")
PERCENT = re.compile(r"\s*(?:%|per\s?cent\b|percentage\b|pct\b)", re.I)
FACTORS = {
    "hundred": 2,
    "thousand": 3,
    "lakh": 5,
    "million": 6,
    "crore": 7,
    "billion": 9,
    "trillion": 12,
    "k": 3,
}
FACTORS = {word: 10**n for word, n in {**FACTORS, "百": 2, "千": 3, "万": 4, "亿": 8}.items()}
FACTOR = re.compile(
    r"\s*(?i:hundred|thousand|lakh|million|crore|billion|trillion)s?(?![A-Za-z])"
    r"|[kK](?![A-Za-z(]|\s*[-+*]\s*[\d(])"  # not the k of 2k + 2
    r"|\s*(?:百(?!分)|千(?![克米瓦卡])|万|亿)"
)
CODE = r"(?:USD|EUR|RMB|CNY|Rs\.?)"
SIGN = re.compile(
    r"\s*(?:(-|minus\b|negative\b|负)|\+|(?:US|A|C|HK|NT|S)?[$€£¥₹₩](?=\s*[-\d.(])" + rf"|{CODE}(?=\s*\d))\s*"
)
NUMBER_START = re.compile(rf"(?<![A-Za-z0-9_.\\])(?:[-+$€£¥₹₩(]|\.?\d|负|minus\b|negative\b|{CODE}\s*\d)")


@dataclass
class Number:
    value: Fraction
    end: int  # where its text ends
    percent: bool = False
    decimals: int = 0  # of a number that was written as a decimal


def number_at(text, start=0):
    """The number, or the arithmetic of numbers, that begins at `start` of a plain text: the longest that has
    a value."""
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
    if not exponent:
        return base  # **18** in bold
    if exponent.value.denominator > 1 or abs(exponent.value) > 64 or abs(base.value) > 10**9:
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
        match = SEPARATED.match(text, at) or DECIMAL.match(text, at)
        if not match or len(match[0]) > LONGEST:
            return None
        digits = re.sub(r"[, '_]", "", match[0])
        found = Number(Fraction(digits), match.end(), decimals=len(digits.partition(".")[2]))
        mixed = MIXED.match(text, match.end()) if digits.isdigit() else None
        if mixed and int(mixed[2] or mixed[4]):
            part = Fraction(int(mixed[1] or mixed[3]), int(mixed[2] or mixed[4]))
            found = Number(found.value + part, mixed.end())
    while factor := FACTOR.match(text, found.end):
        found = Number(found.value * FACTORS[factor[0].strip().lower().removesuffix("s")], factor.end())
    if percent := PERCENT.match(text, found.end):
        found = Number(found.value / 100, percent.end(), True, found.decimals and found.decimals + 2)
    return found


# ---------------------------------------------------------------- words

ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen".split()
ONES += "sixteen seventeen eighteen nineteen".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
WORDS = {word: i for i, word in enumerate(ONES)} | {word: 10 * i for i, word in enumerate(TENS, 2)}
PARTS = "half third fourth fifth sixth seventh eighth ninth tenth".split()
PARTS = {word: i for i, word in enumerate(PARTS, 2)} | {"halve": 2, "quarter": 4}
CHINESE_START = re.compile(f"(?:大?约)?(负)?({ZH})(?![共样起定些半般直边])")


def read_words(text):
    """The number of a text that begins with one in words: twelve, twenty-five thousand, two thirds, 一百二十."""
    total, part, tokens = 0, 0, re.findall(r"[a-z]+", text.lower())
    if tokens and tokens[0] in ("minus", "negative"):
        found = read_words(text.lower().split(tokens[0], 1)[1])
        return Number(-found.value, 0) if found else None
    if tokens[:1] == ["half"] or tokens[:1] in (["a"], ["an"]) and is_factor(tokens[1:2]):
        tokens = ["one", *(tokens if tokens[0] == "half" else tokens[1:])]
    if not tokens or tokens[0] not in WORDS or "of" in tokens[1:3]:
        signs = CHINESE_START.match(text)
        return Number(Fraction(chinese_number(signs[2])) * (-1 if signs[1] else 1), 0) if signs else None
    for i, token in enumerate(tokens):
        if token == "and" and is_factor(tokens[i + 2 : i + 3], PARTS):  # three and a half
            count = 1 if tokens[i + 1] in ("a", "an") else WORDS.get(tokens[i + 1], 0)
            return Number(total + part + Fraction(count, PARTS[singular(tokens[i + 2])]), 0)
        if token in WORDS:
            part += WORDS[token]
        elif token == "hundred":
            part *= 100
        elif token in FACTORS:
            total, part = total + part * FACTORS[token], 0
        elif singular(token) in PARTS:
            return Number(Fraction(total + part, PARTS[singular(token)]), 0)
        elif token in ("or", "to") and is_factor(tokens[i + 1 : i + 2], WORDS):
            return None  # twelve or thirteen
        elif token != "and":
            break
    return Number(Fraction(total + part), 0)


def singular(word):
    return word.removesuffix("s")


def is_factor(tokens, words=None):
    """Whether a word multiplies, as hundred, or divides, as half."""
    return bool(tokens) and singular(tokens[0]) in (words or {**PARTS, **FACTORS})


def chinese_number(text):
    """120 of 一百二十, 3/2 of 一点五."""
    whole, _, places = text.partition("点")
    if places:
        digits = "".join(str(CHINESE[sign]) for sign in places)
        return chinese_number(whole) + Fraction(int(digits), 10 ** len(digits))
    for sign in "亿万":
        if sign in text:
            before, _, behind = text.rpartition(sign)
            return (chinese_number(before) or 1) * FACTORS[sign] + chinese_number(behind)
    total = digit = 0
    for sign in text:
        if CHINESE[sign] < 10:
            digit = CHINESE[sign]
        else:
            total, digit = total + (digit or 1) * CHINESE[sign], 0
    return total + digit


# ---------------------------------------------------------------- a number and what may stand around it

RELATION = re.compile(r"(?<![<>!≤≥])[=≈](?!=)")
SEVERAL = re.compile(r"\d.*(?:\bor\b|\band\b|或者?|和|[,;、])\s*\$?[A-Za-z]\w*\s*$", re.S)  # x = 1 or x = 2
VARIABLE = re.compile(
    r"\s*(?:[xyznkabceijpqruvw]\b(?!\s+\w|\.m\b)|[xyz]+\b|\\|[π√∞]"
    r"|\(\s*\d*[A-Za-z]\s*[-+]\s*(?![A-Za-z]{2}))"
)  # 5x, 3\sqrt2, 2(x - 1): no number with a unit
UNIT_POWER = re.compile(r"(?<=[A-Za-z])(?:\s*\*\*\s*)?(?:\(-?[123]\)|-?[123²³])(?!\d)")
NOTE = re.compile(  # words, not the sum in 2(x + 1)
    r"\((?:(?=[^()]*[A-Za-z])[^()\\*+-]*|[^()\\]*(?:[A-Za-z]{3}|[\u4e00-\u9fff])[^()\\]*)\)"
)
BOLD = re.compile(  # not the power of 10**(-5)
    r"(?<![\w)}])\*\*|\*\*(?!\d|-\d|\((?!\s*[A-Za-z]{3}|[\u4e00-\u9fff]))|[`\"]"
)
MATHS_BEFORE = re.compile(r"[\\*/^_<>|±√≤≥]|[-+]\s*$|[(\[]\s*$")
TERM_BEFORE = re.compile(r"(?:(?<![A-Za-z])[A-Za-z]|[xyz]{2}|[)!])\s*$")  # of - 5: x - 5 is no number
MATHS_AFTER = re.compile(r"[\\\d*^<>|±√≤≥]|[-+/]\s*[(\\]|^\s*(?:[-+]|/(?!\s*[A-Za-z]{2}))|^[!_]")


def read(text):
    """The one number that an answer consists of, with or without units, currency and words around it; else
    None."""
    if len(text) > 2 * LONGEST:
        return None
    sides = RELATION.split(BOLD.sub("", plain_text(text)).strip())
    if len(sides) > 2 and SEVERAL.search(sides[-2]):
        return None
    if len(sides) == 2 and re.fullmatch(r"\s*[A-Za-z]\s*", sides[1]):  # 18 = x
        sides.pop()
    side = next((side for side in reversed(sides) if side.strip()), "")
    if not re.search(r"\d", side):
        return read_words(side)
    for start in NUMBER_START.finditer(side):
        found = number_at(side, start.start())
        if found:
            before, after = side[: start.start()], UNIT_POWER.sub("", NOTE.sub("", side[found.end :]))
            alone = not MATHS_BEFORE.search(before) and not MATHS_AFTER.search(after)
            alone &= side[start.start()] not in "+-" or not TERM_BEFORE.search(before)
            return found if alone and not VARIABLE.match(side, found.end) else None
    return None


def evaluate_number(text):
    """The value of a number, mixed fraction such as 4(5/11), percentage, ratio or arithmetic expression, or
    None."""
    found = read(text)
    return found.value if found else None
