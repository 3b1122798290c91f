r"""Reads the final answer of a solution (`extract_answer`) and compares it with the right one
(`answers_equal`).

    >>> verdict("5 * 3 = 15. The answer is $15{,}000$ dollars.", "15000")["passed"]
    True

The answer is what stands in the last <answer> tags, else in the whole text: in the last \boxed{} that is not
empty, behind ####, or behind "the answer is" or 答案是, whichever comes last; else it is the last number, of an
equation the right side. What the model asks itself afterwards does not count, and two answers are none.

Numbers are read by `benchmark.evaluation.numbers` and compared as exact fractions, everything else by
math-verify. ANSWERS.md in this folder lists where the two differ on numbers, and why ours decides there.
"""

import re
from fractions import Fraction

from benchmark.evaluation import symbolic
from benchmark.evaluation.numbers import (
    LONGEST,
    NOTE,
    NUMBER_START,
    RELATION,
    SEVERAL,
    SPACE,
    VARIABLE,
    WORDS,
    ZH,
    evaluate_number,
    number_at,
    plain_text,
    read,
    read_words,
)
from benchmark.evaluation.reply import reply

__all__ = ["answers_equal", "evaluate_number", "extract_answer", "gold_of", "verdict"]

EXTRACT_ANSWER_VERSION = 4
GOLD_FIELDS = ("gold", "golden", "ans", "answer", "result", "solution")


def verdict(completion, gold):
    """{"passed", "detail"} of a solution: all verdicts on answers are formed here."""
    answer = extract_answer(completion)
    return {"passed": answers_equal(answer, gold), "detail": f"answer {answer[:80]!r}, gold {gold[:80]!r}"}


def gold_of(row):
    """The right answer of a row of any of the math sets."""
    for name in GOLD_FIELDS:
        if row.get(name) not in (None, ""):
            gold = str(row[name]).rpartition("####")[2].strip()
            return last_box(gold)[1] or gold
    known = ", ".join(GOLD_FIELDS)
    raise ValueError(f"a row has neither tests nor a gold answer ({known}): it has {sorted(row)}")


# ---------------------------------------------------------------- equality


def answers_equal(answer, gold):
    """Whether an extracted answer has the value of the gold answer.

    Numbers are equal as fractions; a decimal of at least two places stands for what rounds to it, within half
    a percent. A percentage is its value, but where gold has no percent sign (GSM8K) `20%` also stands for 20,
    and where gold has the sign of LaTeX (MATH) 20 also stands for `20\\%`. What is no number is compared as
    text, then by math-verify.
    """
    answer, gold = str(answer).strip(), str(gold).strip()
    if not answer or not gold:
        return False
    choice = CHOICE.fullmatch(plain_text(answer).strip())
    if choice and not re.match(r"(?:and|or)\b|[,&]", choice[2]):
        if as_words(gold) in "abcdefghij" or not choice[2]:
            return choice[1].casefold() == as_words(gold)
        answer = choice[2]
    mine, theirs = read(answer), read(gold)
    if mine is None and (same := written_twice(answer)):
        return any(answers_equal(each, gold) for each in same)
    if mine and theirs:
        if any(differ(names, answer, gold) for names in NAMES):
            return False
        if close(mine, theirs, mine.value):
            return True
        if mine.percent and not theirs.percent:
            return close(mine, theirs, mine.value * 100)
        return theirs.percent and not mine.percent and "\\%" in gold and close(mine, theirs, mine.value / 100)
    if as_words(answer) == as_words(gold) != "":
        return True
    if theirs:
        ratio = re.sub(r"(?<=\d)\s+to\s+(?=\d)", ":", answer)
        if ":" in gold and ratio != answer:
            return answers_equal(ratio, gold)
        words = re.search(r"[A-Za-z\u4e00-\u9fff]{2}", re.sub(r"\\[A-Za-z]+", "", answer))
        if words or not re.search(r"[\d\\]", answer):
            return False  # several numbers with words around them, or none: no answer
    answer, gold = latex(answer), latex(gold)
    if BASE.search(answer) or BASE.search(gold):  # math-verify takes the base of a number for a factor
        return False
    if gold[0] in "[(" and (interval := interval_of(answer)):
        answer = interval
    return symbolic.equal(answer, gold)


CHOICE = re.compile(r"(?:option |choice )?\(?([A-J])(?:\)\.?:?|[.:])?(?<!\w(?=.))\s*(.*)")
NAMES = (  # of two answers with different ones one is wrong
    re.compile(r"(?<=\d)\s*(?:\\text\{\s*)?([ap])\.?m\b", re.I),
    re.compile(
        r"\b(Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?|Sept?(?:ember)?"
        r"|Oct(?:ober)?|Nov(?:ember)?|Dec(?:ember)?)\b"
    ),
)
BASE = re.compile(r"\d_\{?\d")
SYMBOLS = {
    "π": r"\pi ",
    "∞": r"\infty ",
    "±": r"\pm ",
    "≤": r"\le ",
    "≥": r"\ge ",
    "∪": r"\cup ",
    "∅": r"\emptyset",
}
SYMBOLS |= {r"\varnothing": r"\emptyset", "−": "-", "×": r"\times ", "²": "^2", "³": "^3"}
RELATED = r"(<|\\l(?:e|eq|t)\b|>|\\g(?:e|eq|t)\b)"


def differ(names, answer, gold):
    mine, theirs = names.search(answer), names.search(gold)
    return bool(mine and theirs) and mine[1].casefold()[:3] != theirs[1].casefold()[:3]


def written_twice(answer):
    """The forms of an answer such as `3/4 or 0.75`; [] where they differ in value."""
    parts = re.split(r"\s*,?\s*(?:\bor\b|或者?|\\text\{\s*or\s*\})\s*", answer[: 2 * LONGEST])
    found = [read(part) for part in parts]
    if not 1 < len(parts) < 5 or not all(found):
        return []
    return parts if all(close(each, found[0], each.value) for each in found) else []


def latex(text):
    """Mathematical signs as commands."""
    text = re.sub(r"√\s*(?:\(([^()]*)\)|(\w+))", lambda m: rf"\sqrt{{{m[1] or m[2]}}}", text)
    for sign, command in SYMBOLS.items():
        text = text.replace(sign, command)
    return text


def interval_of(text):
    """[2, 5) of 2 <= x < 5; "" of what is no inequality in one variable."""
    parts = [part.strip(" $") for part in re.split(RELATED, text)]
    closed = ["e" in part for part in parts[1::2]]
    if len(parts) == 5 and re.fullmatch("[a-z]", parts[2]) and (parts[1] + parts[3]).count(">") == 0:
        if "g" not in parts[1] + parts[3]:
            return f"{'(['[closed[0]]}{parts[0]},{parts[4]}{')]'[closed[1]]}"
    if len(parts) == 3 and re.fullmatch("[a-z]", parts[0]):
        if parts[1] == ">" or "g" in parts[1]:
            return rf"{'(['[closed[0]]}{parts[2]},\infty)"
        return rf"(-\infty,{parts[2]}{')]'[closed[0]]}"
    return ""


def close(mine, theirs, value):
    """Whether values are the same, or one is a decimal that stands for the other, rounded or cut off."""
    difference = abs(value - theirs.value)
    for places in (number.decimals for number in (mine, theirs) if number.decimals >= 2):
        unit = Fraction(1, 10**places)
        if difference <= (unit if places > 3 else unit / 2) and difference <= abs(theirs.value) / 200:
            return True
    return difference == 0


def as_words(text):
    """A text answer without its clothes: (B), \\text{B} and **B**. are one."""
    text = re.sub(r"(?<![\w)}])\*+|\*+(?![\w({\\])", "", text)  # bold, not the power in 2**n
    words = re.sub(r"[\s$`\"']+", "", plain_text(text)).strip(".。:;；").casefold()
    words = re.sub(r"_\((\w+)\)", r"_\1", words)
    return words[1:-1] if re.fullmatch(r"\(\w+\)", words) else words


# ---------------------------------------------------------------- where the answer stands

QUESTION = re.compile(
    r"^[ \t*#>]*(?:(?:(?:Next|New|Example|Sample|Another|Similar|Bonus|Follow-?up)[ ]?)?"
    r"(?:(?:[Qq]uestion|Problem|Exercise|Task|Q)[ ]?\d*[*]*\s?[:：.)]"
    r"|(?:Question|Problem|Exercise)[ ]\d+[ ]*$)"
    r"|Example[ ]\d+[*]*[:.)]|\[INST\]"
    r"|(?:Human|User|Student|Instruction|Input|USER|HUMAN)[*]*[ ]?[:：]"
    r"|###[ ]?(?:Instruction|Input|Question|Problem|User|Human)\b"
    r"|(?:下一题|题目|问题|例题?|练习题?|问)[ ]?\d*[ ]?[:：.、])",
    re.M,
)
ANSWERED = re.compile(r"####|\\boxed|\banswer\b|答|=[^=\n]*\d|\d[^\n]*\s*(?:```\s*)?\Z", re.I)
RESTATED = re.compile(r"[\s*#>]*(?:given|problem|question|题目|问题|已知)\b", re.I)  # its task, once more
SOLVED = re.compile(r"####|\\boxed|\banswer\b|\bsolution\b|答|解", re.I)
STATED = re.compile(r"(?:####\s*|answer is:?\s*|答案(?:是|为|[:：])\s*)\S*\d[^\n]{0,40}\n\s*\n", re.I)
BOXED = re.compile(r"\\boxed\{[^\n]{1,60}\}[^\n]{0,20}\n\s*\n")
ASKED = re.compile(r"\d[^?？]*\bhow (?:many|much|long|far|old)\b[^?？]*[?？]", re.I)
TAGGED = re.compile(r"[<\[](answer|final_answer)[>\]](.*?)(?:[<\[]/\1[>\]]|\Z)", re.S | re.I)
BOX = re.compile(r"\\(?:boxed|fbox)\s*")
JOINED = re.compile(r"[\s$\\)(]*(?:,|and|or|和|或|、)+[\s$\\)(]*([A-Za-z]\s*=\s*)?")
MARK = re.compile(
    r"(?<![A-Za-z])(?:answers?|correct (?:option|choice))\b"
    r"[^.?\n:：=]{0,60}?(?:\b(?:is|are|was|be|equals|equal to)\b|[:：=])"
    r"|\bans\s*[.:=：]|\banswer\s+(?:[-–—→]|[-=]>)\s+(?=[\d$\\])|选(?:择|项)?\s*[:：]?\s*(?=[A-J](?![A-Za-z]))"
    r"|^[ \t#*>]*(?:final )?answer[ \t#*:：]*$"
    r"|(?:答案|最终结果|最后结果)[^。\n:：=\d]{0,12}?(?:是|为|等于|[:：=])|答案|答\s*[:：]",
    re.I | re.M,
)
FILLER = re.compile(
    r"(?:[\s*_:：>`=\"'“”】,]|\\approx"
    r"|(?:therefore|thus|then|about|approximately|around|roughly|exactly|only|simply|just|indeed|also)\b"
    r"|(?:equal to|given by|a total of|the number)\b|应该?是?|是|为|大约|约|等于|一?共有?|总共有?)*",
    re.I,
)
TURNED = re.compile(r"\bis (?:the|our|my) (?:\w+ )?answer\b", re.I)
LONE = re.compile(r"(?<!\w)[A-Za-z]\w*\s*$")  # a variable, not 2x
CHINESE_WORDS = re.compile(f"(?<![期第])({ZH})(?![共样起定些半般直边])(?=[\u4e00-\u9fff])")
OPERATOR = re.compile(
    r"(?:\s+[A-Za-z]+){1,3}\s*(?:[-+*/]|minus|plus|times|x(?=\s*[$\d]))\s*[$\d(]"
)  # 9 eggs * $2
SUBORDINATE = re.compile(r"\b(?:because|since|as|where|which|if|when|while|check)\b|因为|其中", re.I)
EXPRESSION = re.compile(r"\\|[±√π∞]|\$?[A-Za-z]\s*(?:[<>≤≥^²³]|\\[lg]e)")
ASSIGNED = re.compile(r"\$?\s*[A-Za-z]\w{0,12}\s*(?:\(\w{0,3}\)\s*)?[=≈]\s*")
MATHS = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.S)
GOES_ON = re.compile(  # a number that is the beginning of an expression
    r"\s*(?:[-+*^]\s*[\\A-Za-z(]|\*\*(?:[\\A-Za-z]|\([\w+-]+\))|/\s*(?:[\\(]|[A-Za-z]\b)|±)"
    r"|[(,][^\s\u4e00-\u9fff]|_[\d({]"
)
NOT = re.compile(r"\s*(?:not\b|n't\b|不是)")
INSTEAD = re.compile(r"\bbut\b|\brather\b|而是")
DENIED = re.compile(r"\banswer (?:is not|isn't|can't be|cannot be)\b|答案不是", re.I)
REMARK = re.compile(
    r"\b(?:correct|right|wrong|incorrect|reasonable|consistent|found|obtained|below|above|follows|same)\b",
    re.I,
)
CONNECTED = re.compile(  # 12 or 13, 12 eggs and maybe 13
    r"\$?\s*(?:(?:[A-Za-z°%]+\s*){0,2}?,?\s*\b(?:or|and|to)\b|[\u4e00-\u9fff%]{0,3}(?:或者?|和|至|到|~)"
    r"|[,、;](?=\s?[-+$]{0,2}[\d./]+\s?(?:[,.。;、\n$)]|and\b|or\b|和|或|\Z)))"
    r"\s*(?:maybe |possibly |perhaps |even |可能是?)?\$?\s*(?:[A-Za-z]\s*=\s*)?(?=[-\d.(])"
)
COMPOUND = re.compile(  # 2 hours 30
    r"\s*(?:([A-Za-z]+)\s+(?:and\s+)?|['′]|(?![^\d]?[的是比倍共有])[\u4e00-\u9fff]{1,2}(?:零|又)?)(?=\d)"
)
HALF_DAY = re.compile(r"\s*[ap]\.?m\b\.?", re.I)
PREPOSITIONS = set(
    "per in after for of at by with on from over within every out times because since as when if so then "
    "than plus minus until during before is are was each left x".split()
)
LABEL = re.compile(r"(?:\bstep|\bcase|\bpart|\bno\.|\bquestion|\bproblem|第|#)\s*\Z", re.I)
NUMBER_WORDS = re.compile(
    rf"\b(?!one\b(?! hundred| thousand| million))(?:{'|'.join(WORDS)})\b[a-z -]{{0,40}}", re.I
)
SENTENCE = re.compile(r"(?<=[.!?])(?<!i\.e\.)(?<!e\.g\.)\s+|(?<=[。！？；;])")
ASIDE = re.compile(
    r"\s*(?:\(.*\)|（.*）|\[.*\]|(?:[*_#\s]*(?:note|check|verif|confidence)|注|检验|验算).*"
    r"|(?:let.s |let me |we can |to )?(?:verify|double[- ]check(?:ing)?)\b.*"
    r"|(?:would you like|do you want|let me know|feel free|(?:I )?hope this|ask me)\b.*"
    r"|if you\b.*\b(?:let me know|ask|I can)\b.*|如果[你您].*问题.*)\s*\Z",
    re.I,
)
REVOKED = re.compile(
    r"\b(?:wait|actually|oops|sorry|hmm|no)\b[^.!?\n]{0,40}\b(?:that|this|it|I|there)\b[^.!?\n]{0,30}?"
    r"(?<!no )(?<!not )(?<!common )\b(?:wrong|incorrect|mistake|error)\b",
    re.I,
)
SECOND_THOUGHT = re.compile(r"\b(?:wait|mistake|actually|sorry|recheck|recalculate|correction)\b", re.I)


def extract_answer(text):
    """The final answer in a solution, as text; "" when there is none."""
    text = (
        str(text).replace("\x08oxed", "\\boxed").replace("\x0crac", "\\frac")
    )  # escapes that were carried out
    text = text.replace("\\\\", "\\") if "\\\\boxed" in text else text
    text = text if "\n" in text else re.sub(r"\\n(?![a-z])", "\n", text)
    text = up_to_next_question(reply(text))
    tagged = [match[2] for match in TAGGED.finditer(text) if match[2].strip()]
    text = tagged[-1] if tagged else text
    place, answer = max(
        last_box(text), after_hashes(text), after_mark(text), before_mark(text), key=lambda found: found[0]
    )
    if place < 0:
        return last_number(text)
    revoked = REVOKED.search(text, place)
    if revoked and RELATION.search(text, revoked.end()):
        return last_number(text[revoked.end() :])
    return answer


def up_to_next_question(text):
    """A text without the questions that the model goes on to ask itself: below a heading such as `Question:`,
    or in the paragraph behind one that ends in the answer."""
    answered = SOLVED if RESTATED.match(text) else ANSWERED
    for question in QUESTION.finditer(text):
        before = text[: question.start()]
        if answered.search(before[-2000:]):
            text = before
            break
    for stated in STATED.finditer(text):
        paragraph = text[stated.end() : stated.end() + 1000].split("\n\n")[0]
        if re.search(r"\d[^?？]*[?？]", paragraph) and not SECOND_THOUGHT.search(paragraph):
            return text[: stated.end()]
    for boxed in BOXED.finditer(text):
        if ASKED.search(text[boxed.end() : boxed.end() + 1000].split("\n\n")[0]):
            return text[: boxed.end()]
    return text


def last_box(text):
    """(place, content) of the last \\boxed{} with something in it, or of several that are joined by `or`."""
    place, content, end = -1, "", len(text)
    for _ in range(20):
        start = max(text.rfind("\\boxed", 0, end), text.rfind("\\fbox", 0, end))
        if start < 0:
            break
        inner, after = braced(text, BOX.match(text, start).end())
        link = JOINED.fullmatch(text, after, place) if content else None
        if content and not link:
            break
        if inner.strip(" $\\,"):
            content = inner + link[0].removesuffix(link[1] or "") + content if content else inner
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
    """(place, answer) behind the first ####, or the last where the model had second thoughts. A heading is
    none."""
    found, end = [], len(text.rstrip())
    for mark in re.finditer(r"####+(?!#)", text):
        tail = text[mark.end() : mark.end() + 400]
        line = next((line for line in tail.split("\n") if line.strip()), "")
        if re.match(r"\s*\d+[.):]\s+\D", line) or line.rstrip().endswith(":"):
            continue
        answer = direct(line)
        if not answer and not re.search(r"\d", line) and len(line) < 60:  # words, not a heading
            answer = line.strip() if text.find(line, mark.end()) + len(line) >= end else ""
        if answer:
            found.append((mark.start(), answer))
    if len(found) > 1 and not SECOND_THOUGHT.search(text[found[0][0] : found[-1][0]]):
        return found[0] if read(found[0][1]) else found[-1]
    return found[-1] if found else (-1, "")


def after_mark(text):
    """(place, answer) behind the last "the answer is" that an answer directly follows; else a number of the
    sentence behind the last one, else its words."""
    best, weight = (-1, ""), 0
    for mark in reversed(list(MARK.finditer(text))[-100:]):
        tail = text[mark.end() : mark.end() + 400]
        if denied := NOT.match(tail):
            instead = INSTEAD.search(tail.split("\n")[0])
            if not instead:
                continue
            tail = tail[max(instead.end(), denied.end()) :]
        line = next((line for line in tail.split("\n") if line.strip()), "")
        sentence, answer = SENTENCE.split(line.strip())[0], direct(tail)
        in_chinese = (
            mark[0][0] == "答" and mark[0][-1] in ":："
        )  # a sentence follows, often with several numbers
        if answer and not (in_chinese and read(answer)):
            return mark.start(), answer
        number = number_of_sentence(sentence, text[: mark.start()])
        if answer:
            return mark.start(), number or answer
        words = sentence.strip(" *.。:：")
        if in_chinese and (counted := CHINESE_WORDS.findall(words)):
            words = counted[-1]
        if number and weight < 2:
            best, weight = (mark.start(), number), 2
        elif words and len(words) < 60 and not REMARK.search(words) and weight < 1:
            best, weight = (mark.start(), words), 1
    return best


def before_mark(text):
    """(place, answer) of "18 is the answer"."""
    found = list(TURNED.finditer(text))
    if not found:
        return -1, ""
    start = found[-1].start()
    sentence = SENTENCE.split(text[max(0, start - 200) : start].rpartition("\n")[2])[-1]
    answer = number_of_sentence(sentence, "")
    return (found[-1].end(), answer) if answer else (-1, "")


def direct(tail):
    """The answer that `tail` begins with, "" when it begins with words. Two answers come out as both."""
    tail = tail[FILLER.match(tail).end() :]
    if (choice := CHOICE.match(tail.split("\n")[0])) and re.match(r"\)|[.:]\s", tail[choice.end(1) :]):
        return choice[0].strip()
    if reason := re.match(r"([A-J]),?\s+(?:because|since)\b", tail):
        return reason[1]
    if re.match(r"(?:\$|\\\(|\\\[)?\\boxed", tail):
        return last_box(tail.split("\n")[0])[1]
    plain = plain_text(tail)
    begin = ASSIGNED.match(plain).end() if ASSIGNED.match(plain) else 0
    found = number_at(plain, begin) if NUMBER_START.match(plain, SPACE.match(plain, begin).end()) else None
    while found and (sign := RELATION.match(plain, SPACE.match(plain, found.end).end())):
        following = number_at(plain, sign.end())
        if not following:
            break
        begin, found = sign.end(), following
    if found and (begin or OPERATOR.match(plain, found.end)):
        rest = SENTENCE.split(plain[found.end : found.end + 300].split("\n")[0])[0]
        relations = list(RELATION.finditer(rest))
        if relations and not SUBORDINATE.search(rest[: relations[-1].start()]):
            if last := direct(rest[relations[-1].end() :]):
                return last
    if found and not VARIABLE.match(plain, found.end) and not GOES_ON.match(plain, found.end):
        return plain[begin : end_of_all(plain, found)]
    if maths := MATHS.match(tail):
        return next(group for group in maths.groups() if group)
    if found or EXPRESSION.match(tail):
        return re.split(r"[.。;]\s|[.。]?\n|[.。]?\Z", tail)[0]
    relative = re.match(r"[\w-]+ (?:more|less|fewer|times|plus|minus)\b", plain)
    return plain.split("\n")[0][:60] if not relative and read_words(plain[:100]) else ""


def end_of_all(plain, number):
    """Where the last of several connected answers ends: `12 or 13`, `2 hours 30 minutes`."""
    end = number.end
    if half_day := HALF_DAY.match(plain, end):
        return half_day.end()
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
        alone = LONE.search(plain[max(0, relations[0].start() - 20) : relations[0].start()])
        if len(relations) > 1 and alone and SEVERAL.search(plain[: relations[-1].start()]):
            return plain
        if answer := direct(plain[relations[-1].end() :]):
            return answer
    said = NOTE.sub("", plain)  # 160 minutes (2 hours and 40 minutes)
    plain = said if re.search(r"\d", said) else plain
    groups = []  # of connected numbers: (start, end, value of a number alone)
    for start, number in numbers_in(plain):
        if not groups or start >= groups[-1][1]:
            end = end_of_all(plain, number)
            groups.append((start, end, number.value if end == number.end else None))
    result = last_result(before)
    same = [group for group in groups if result is not None and group[2] == result]
    start, end, _ = (same or groups or [(0, 0, None)])[-1]
    if month := re.search(r"[A-Z][a-z]{2,8} $", plain[max(0, start - 12) : start]):
        start -= len(month[0]) if NAMES[1].fullmatch(month[0].strip()) else 0
    symbol = re.compile(r"\s?[π√][^\s,.;。，]*").match(plain, end)
    return plain[start : symbol.end() if symbol else end]


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
        words = NUMBER_WORDS.findall(text[-LONGEST:]) if len(text.split()) > 3 else []
        return words[-1] if words else text.strip()[:LONGEST]
    line = lines[-1][-2000:]
    bold = [
        found
        for found in re.findall(r"\*\*([^*\n]{1,80})\*\*", line)
        if read(found) and re.search(r"\d", found)
    ]
    if bold:
        return bold[-1]
    sentences = [each for each in SENTENCE.split(line) if re.search(r"\d", each)]
    while len(sentences) > 1 and ASIDE.match(sentences[-1][:1000]):
        sentences.pop()
    sentence = sentences[-1]
    if DENIED.search(sentence):
        return ""
    maths = list(MATHS.finditer(sentence))
    if maths and not re.search(r"\d", sentence[maths[-1].end() :]):
        inner = next(group for group in maths[-1].groups() if group)
        if not read(inner):
            return inner
    before = text[: text.rfind(lines[-1])] + line[: line.rfind(sentence)]
    return number_of_sentence(sentence, before) or sentence.strip()
