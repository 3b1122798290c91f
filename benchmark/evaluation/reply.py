"""The part of a model's output that is its answer: what programs and final answers are both looked for in."""

import re

THINKING = r"(?:seed:)?think|thinking|thought|reasoning|scratchpad"
THOUGHT_ENDS = re.compile(
    rf"</(?:{THINKING})>|\[/THINK\]|◁/think▷|<\|end_of_thought\|>|<\|channel\|>final<\|message\|>", re.I
)
THOUGHT_STARTS = re.compile(
    rf"<(?:{THINKING})>|\[THINK\]|◁think▷|<\|begin_of_thought\|>|<\|channel\|>analysis<\|message\|>", re.I
)
REFLECTION = re.compile(r"<reflection>.*?(?:</reflection>|\Z)", re.S | re.I)  # may also follow the answer
ROLE = re.compile(
    r"\A\s*(?:<s>|<bos>|<\|(?:begin_of_text|startoftext)\|>|<\|im_start\|>assistant\n|<\|assistant\|>"
    r"|<\|start_header_id\|>assistant<\|end_header_id\|>|<start_of_turn>model\n"
    r"|<\|?fim_(?:prefix|middle)\|?>|<(?:PRE|MID)>|<\|begin_of_solution\|>)"
)
END_TOKEN = re.compile(
    r"<[|｜](?!python_tag)[\w▁ -]{1,40}[|｜]>|</s>|<eos>|<pad>|<unk>|<(?:end|start)_of_turn>|\[PAD\]"
    r"|<(?:EO[TSD]|PRE|SUF|MID|fim_\w{3,9}|file_sep|gh_stars|extra_id_\d+"
    r"|(?:commit|issue|jupyter)_[a-z]{3,12})>"
    r"|<(?:filename|reponame)>(?=[\w/])"
)


def reply(text, cut=True):
    """`text` with plain line ends, without the thinking before the answer, and (`cut`) up to the first
    special token.

    Thinking that never ended is no answer.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\u00a0", " ")
    text = REFLECTION.sub("", re.sub("[\ufeff\0]", "", text))
    ends = list(THOUGHT_ENDS.finditer(text))
    text = text[ends[-1].end() :] if ends else text
    start = THOUGHT_STARTS.search(text)
    text = text[: start.start()] if start else text
    while cut and (role := ROLE.match(text)):
        text = text[role.end() :]
    end = END_TOKEN.search(text) if cut else None
    return text[: end.start()] if end else text
