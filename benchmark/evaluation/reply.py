"""The part of a model's output that is its answer: what programs and final answers are both looked for in."""

import re

THINKING = r"think|thinking|thought|reasoning|scratchpad"
THOUGHT_ENDS = re.compile(rf"</(?:{THINKING})>|\[/THINK\]|◁/think▷|<\|channel\|>final<\|message\|>")
THOUGHT_STARTS = re.compile(rf"<(?:{THINKING})>|\[THINK\]|◁think▷")
ROLE = re.compile(
    r"\A\s*(?:<s>|<bos>|<\|(?:begin_of_text|startoftext)\|>|<\|im_start\|>assistant\n|<\|assistant\|>"
    r"|<\|start_header_id\|>assistant<\|end_header_id\|>|<start_of_turn>model\n)"
)
END_TOKEN = re.compile(r"<[|｜][\w▁ -]{1,40}[|｜]>|</s>|<eos>|<pad>|<(?:end|start)_of_turn>|\[PAD\]")


def reply(text, cut=True):
    """`text` with plain line ends, without the thinking before the answer, and (`cut`) up to the first
    special token.

    Thinking that never ended is no answer.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\ufeff", "").replace("\u00a0", " ")
    ends = list(THOUGHT_ENDS.finditer(text))
    text = text[ends[-1].end() :] if ends else text
    start = THOUGHT_STARTS.search(text)
    text = text[: start.start()] if start else text
    while cut and (role := ROLE.match(text)):
        text = text[role.end() :]
    end = END_TOKEN.search(text) if cut else None
    return text[: end.start()] if end else text
