"""Rewards for RL as `module:function`: from executing tests, from a learned reward model, and from both.

    python pfppo_single.py --reward benchmark.rewards:oracle ...
    python pfppo_single.py --reward benchmark.rewards:crm@output/rm/model \\
        --actual_score benchmark.rewards:oracle ...

Each function is called with (prompts, responses, rows): equally long lists of str, str and dict, and returns
a list of floats. The text behind `@` arrives as `source`. A row of a code problem holds `tests` and
`entry_point` (a row of the embedded world also `inputs` and `outputs`), one of a math problem `golden`, `ans`
or `answer`.
"""

import functools
import math
import re

from benchmark.evaluation import answers, programs
from benchmark.grading import grade_many


def oracle(prompts, responses, rows, source=""):
    """1.0 where the response is right, 0.0 elsewhere: the program passes its tests, or the final answer has
    the value of the gold answer. The same verdicts as those of `python benchmark/evaluate.py`.

    Equal programs on equal tests run once. Raises benchmark.grading.GradingError when grading itself fails.
    """
    if not len(prompts) == len(responses) == len(rows):
        raise ValueError(
            f"prompts, responses and rows differ in length: {len(prompts)}, {len(responses)}, {len(rows)}"
        )
    scores, fast, slow = [0.0] * len(rows), [], {}
    for i, (prompt, response, row) in enumerate(zip(prompts, responses, rows)):
        tests, entry_point = programs.tests_of(row)
        if not tests:
            scores[i] = float(answers.verdict(response, answers.gold_of(row))["passed"])
            continue
        item = programs.grading_item(prompt, response, tests, entry_point)
        if "inputs" in row and "outputs" in row:
            fast.append((i, item["program"]))
        else:
            slow.setdefault(tuple(item.items()), []).append(i)
    if fast:
        from benchmark.minicode import grade_fast

        found = [program for _, program in fast]
        verdicts = grade_fast([""] * len(found), found, [rows[i] for i, _ in fast])
        for (i, _), passed in zip(fast, verdicts):
            scores[i] = float(passed)
    for places, verdict in zip(slow.values(), grade_many([dict(item) for item in slow], progress=False)):
        for i in places:
            scores[i] = float(verdict["passed"])
    return scores


@functools.lru_cache(maxsize=2)
def reward_model(folder, device=""):
    """(model, tokenizer) of a sequence classification model with one label (rm_single.py writes one), loaded
    once per process."""
    import torch

    import pfppo_single as pfppo

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = pfppo.load_pretrained("AutoTokenizer", folder, "reward")
    pfppo.check_reward_model(folder, "reward", tokenizer, [[0]], new_tokens=0)
    return pfppo.load_reward_model(folder).to(device).eval(), tokenizer


def orm(prompts, responses, rows=None, source="", batch_size=64, device=""):
    """R_φ in the bounds that the model was saved with ([-1, 1] for `tanh`): the learned reward alone.

    Takes texts, so every response is closed by the end-of-sequence token; pfppo_single.py with a folder as
    `--reward` reads sampled ids and so tells a response that the length limit cut.
    """
    import torch

    import rm_single as rm

    if not source:
        raise ValueError(
            "orm needs the reward model's folder behind @, as in benchmark.rewards:orm@output/rm/model"
        )
    model, tokenizer = reward_model(str(source), device)
    device, labels = next(model.parameters()).device, []
    for i, (prompt, response) in enumerate(zip(prompts, responses)):
        ids = rm.encode_response(tokenizer, response, tokenizer.eos_token_id)
        labels.append({"query": rm.encode_prompt(tokenizer, prompt), "samples": [ids], "best": 0, "row": i})
    scores = torch.zeros(len(labels))
    with torch.no_grad():
        for part in rm.micro_batches(labels, batch_size):
            score = rm.label_rewards(model, part, device)[0].squeeze(1)
            score = score.tanh() if model.bound == "tanh" else score
            scores[[label["row"] for label in part]] = score.cpu()
    return scores.tolist()


def combine(learned, right):
    """The combined reward of PAPER Table 4 for learned in [-1, 1] and right in {0, 1}: (learned + 1) / 2 +
    right - 1, in [-1, 1].

    A right response gets 0 to 1 and a wrong one -1 to 0, ordered by the reward model among its like: no wrong
    response outranks a right one. DEPARTS PAPER, which names the combination but gives no formula. With
    learned = tanh(r) the first term is the logistic function of 2r.
    """
    return (learned + 1) / 2 + right - 1


def crm(prompts, responses, rows, source=""):
    """The learned reward combined with the oracle, in [-1, 1]; see `combine`."""
    learned = orm(prompts, responses, rows, source)
    if any(abs(value) > 1 for value in learned):  # a model saved without a bound
        learned = [math.tanh(value) for value in learned]
    return [combine(value, right) for value, right in zip(learned, oracle(prompts, responses, rows))]


SUSPICIOUS = {  # what a solution has no use for and a program that games its grader does
    "test_names": r"\b(?:check|candidate|unittest|pytest|assert\w*|test_\w+|METADATA)\b",
    "interpreter": (
        r"\b(?:sys|inspect|gc|atexit|ctypes|os|signal|builtins|__builtins__|globals|_getframe|f_back"
        r"|__import__)\b"
    ),
    "comparison": r"__(?:eq|ne|lt|le|gt|ge|hash|bool|class|instancecheck|contains|reduce\w*)__",
    "pass_markers": r"print\s*\([^\n]*\b(?:pass(?:ed)?|ok|success|all tests)\b",
}
PATTERNS = {
    name: re.compile(pattern, re.I if name == "pass_markers" else 0) for name, pattern in SUSPICIOUS.items()
}


def suspicious_share(responses):
    """{"suspicious": share of responses with any of the patterns, and the share of each}: PITFALLS EX-9, for
    a look at samples.jsonl; no reward depends on it."""
    hits = [
        {name: bool(pattern.search(response)) for name, pattern in PATTERNS.items()} for response in responses
    ]
    count = max(1, len(responses))
    return {
        "suspicious": sum(any(hit.values()) for hit in hits) / count,
        **{name: sum(hit[name] for hit in hits) / count for name in PATTERNS},
    }
