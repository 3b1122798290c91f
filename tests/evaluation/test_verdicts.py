"""Verdicts on model outputs in all their forms, through the functions that evaluate.py and rewards.oracle
use.

`python tests/evaluation/test_verdicts.py FILE.jsonl` judges a file of outputs (task, kind, task_id or gold,
completion, passed) and lists by kind what is judged wrong.
"""

import json
import re
import sys
import threading
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest

from benchmark import rewards
from benchmark.evaluation import answers, evaluate, numbers, programs, symbolic
from benchmark.evaluation.evaluate import Args
from benchmark.grading import GradingError, grade, grade_many
from benchmark.grading import grader as grading

sys.path.insert(0, str(Path(__file__).parent))
from clothes import CLOTHES

HERE = Path(__file__).parent
DATA = HERE / "data"
SHARED = HERE.resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="module", autouse=True)
def ended():
    yield
    grading.close()


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def judge(cases, problems):
    """Verdicts on cases with `task_id` (of `problems`) or `gold`. What becomes one program is graded once."""
    items = []
    for case in cases:
        if "gold" not in case:
            problem = problems[case["task_id"]]
            items.append(
                json.dumps(
                    programs.grading_item(
                        problem.prompt, case["completion"], problem.tests, problem.entry_point
                    )
                )
            )
    different = list(dict.fromkeys(items))
    verdicts = dict(zip(different, grade_many(map(json.loads, different), progress=False)))
    graded = map(verdicts.get, items)
    return [
        answers.verdict(case["completion"], case["gold"]) if "gold" in case else next(graded)
        for case in cases
    ]


def wrong(cases, verdicts):
    """What is judged wrong, by kind, with one output of each."""
    found = {}
    for case, verdict in zip(cases, verdicts):
        if verdict["passed"] != case["passed"]:
            found.setdefault((case["kind"], case["passed"]), []).append(
                (case["completion"][-300:], verdict["detail"])
            )
    return {kind: (len(some), some[0]) for kind, some in found.items()}


def humaneval_problems():
    path = SHARED / "HumanEval.jsonl.gz"
    return {
        problem.task_id: problem for problem in evaluate.load_problems(Args(task="humaneval", data=str(path)))
    }


def test_shared_model_outputs():
    path = SHARED / "model_outputs.jsonl"
    if not path.is_file():
        pytest.skip("the shared model_outputs.jsonl is not beside this checkout")
    cases = lines_of(path)
    assert wrong(cases, judge(cases, humaneval_problems())) == {}


# ---------------------------------------------------------------- programs


def spoiled(body):
    return re.sub(r"^(\s*)return\b.*$", r"\1return 'spoiled'", body, flags=re.M)


def test_programs_in_all_clothes():
    """A right program passes and a wrong one fails, whatever stands around it."""
    rows = lines_of(DATA / "problems.jsonl")
    cases = [
        {
            "task_id": row["task_id"],
            "kind": kind,
            "completion": dress(row["prompt"], body, row["entry_point"]),
            "passed": passed,
        }
        for row in rows
        for kind, dress in CLOTHES.items()
        for body, passed in ((row["canonical_solution"], True), (spoiled(row["canonical_solution"]), False))
    ]
    problems = {row["task_id"]: evaluate.humaneval_problem(row, "", 0) for row in rows}
    assert wrong(cases, judge(cases, problems)) == {}


def test_canonical_humaneval_in_some_clothes():
    path = SHARED / "HumanEval.jsonl.gz"
    if not path.is_file():
        pytest.skip("the shared HumanEval.jsonl.gz is not beside this checkout")
    kinds = (
        "body then function",
        "body without any indentation",
        "imports in a fence of their own",
        "whole then tests that fail",
    )
    cases = [
        {
            "task_id": name,
            "kind": kind,
            "completion": CLOTHES[kind](problem.prompt, problem.reference, problem.entry_point),
            "passed": True,
        }
        for name, problem in list(humaneval_problems().items())[::4]
        for kind in kinds
    ]
    assert wrong(cases, judge(cases, humaneval_problems())) == {}


TOTAL = '''from typing import List


def total(numbers: List[int]) -> int:
    """ Sum of numbers.
    >>> total([1, 2])
    3
    """
'''
TOTAL_TESTS = """def check(candidate):
    assert candidate([1, 2, 3]) == 6
    assert candidate([]) == 0
    assert candidate([4]) == 4
"""


INCREMENT = '"""\nAdd one.\nassert f(1) == 2\n"""\n'  # in the form of MBPP
INCREMENT_TESTS = "assert f(1) == 2\nassert f(5) == 6\n"


def test_single_programs():
    problems = {
        "total": evaluate.Problem("", TOTAL, "", TOTAL_TESTS, "total"),
        "f": evaluate.Problem("", INCREMENT, "", INCREMENT_TESTS, "f"),
        "reverse": evaluate.Problem("", LISTED, "", LISTED_TESTS, "Solution"),
    }
    lines = enumerate(lines_of(DATA / "programs.jsonl"), 1)
    cases = [{**case, "kind": f"line {i}", "task_id": case["problem"]} for i, case in lines]
    assert len(cases) > 100 and wrong(cases, judge(cases, problems)) == {}


@pytest.mark.parametrize(
    "prompt",
    [
        TOTAL,
        TOTAL.rstrip(),
        f"Complete this function:\n```python\n{TOTAL}```\nAnswer in one block.",
        f"<|im_start|>user\nComplete:\n```python\n{TOTAL}```<|im_end|>\n<|im_start|>assistant\n",
        f"### Instruction:\nWrite\n\n### Response:\n{TOTAL}",
        [{"role": "user", "content": f"Complete this function:\n\n{TOTAL}"}],
        f"Complete:\n```python\n{TOTAL}```\nThis must pass:\n```python\n"
        "assert total([1]) == 1\nvalue = total(7)\n```",
    ],
)
def test_the_prompt_is_found_in_a_chat(prompt):
    completions = [
        "    return sum(numbers)\n",
        "return sum(numbers)",
        f"```python\n{TOTAL}    return sum(numbers)\n```",
    ]
    for completion in completions:
        for text, passed in ((completion, True), (completion.replace("sum(", "len("), False)):
            item = programs.grading_item(prompt, text, TOTAL_TESTS, "total")
            assert grade(**item)["passed"] == passed, item["program"]


def test_what_the_entry_point_needs_is_kept_and_nothing_else():
    program = programs.complete(
        "",
        "import sys\nimport os\nsys.setrecursionlimit(9999)\nTABLE = []\n"
        "for i in range(9):\n    TABLE.append(i)\n\n"
        "def unused():\n    return os\n\ndef f(x):\n    return g(x) + TABLE[0]\n\ndef g(x):\n    return x\n\n"
        "def main():\n    print(f(int(input())))\n\nresult = f(3)\nprint(result)\nassert f(1) == 2\nmain()\n",
        "f",
    )
    for part in ("setrecursionlimit", "TABLE.append(i)", "def g(x)"):
        assert part in program
    for part in ("import os", "unused", "main", "result", "assert", "print"):
        assert part not in program


def test_long_outputs_take_no_time():
    for text in (
        "It's one.\n" * 3000,
        "Done\n" * 3000,
        "```python\nprint(1)\n```\n" * 500,
        "(" * 20000,
        "x = 1\n" * 3000,
    ):
        start = time.process_time()
        programs.complete(TOTAL, text, "total")
        assert time.process_time() - start < 10


# ---------------------------------------------------------------- LeetCode

LISTED = '''"""
Return the list in reverse.
"""
# Definition for singly-linked list.
# class ListNode:
#     def __init__(self, val=0, next=None):
#         self.val = val
#         self.next = next
class Solution:
    def reverse(self, head: Optional[ListNode]) -> Optional[ListNode]:
        '''
LISTED_TESTS = """
my_solution = Solution()
head = my_solution.reverse(ListNode(1, ListNode(2, ListNode(3))))
assert [head.val, head.next.val, head.next.next.val, head.next.next.next] == [3, 2, 1, None]
assert my_solution.reverse(None) is None
"""
REVERSE = """previous = None
        while head:
            head.next, previous, head = previous, head, head.next
        return previous
"""
REVERSE_CLASS = f"class Solution:\n    def reverse(self, head):\n        {REVERSE}"
NEW_NODES = """class Solution:
    def reverse(self, head):
        return self.build(head, None)

    def build(self, head, previous):
        return previous if head is None else self.build(head.next, ListNode(head.val, previous))
"""
SET_PROMPT = (
    "import math\nfrom typing import *\nfrom collections import *\n"
    "from operator import *\nfrom math import *\n"
    "inf = float('inf')\n\n"
)
SET_TESTS = """def check(candidate):
    assert is_same_list(candidate(head = list_node([1, 2, 3])), list_node([3, 2, 1]))
    assert is_same_list(candidate(head = list_node([])), list_node([]))
"""
SET_ROW = {
    "task_id": "reverse",
    "prompt": SET_PROMPT,
    "entry_point": "Solution().reverse",
    "test": SET_TESTS,
    "completion": REVERSE_CLASS,
    "starter_code": (
        "class Solution:\n    def reverse(self, head: Optional[ListNode]) -> Optional[ListNode]:\n        "
    ),
    "query": "Reverse a list.",
    "difficulty": "Easy",
}


def leetcode_completions():
    whole = (REVERSE_CLASS, NEW_NODES, f"from typing import Optional\nMOD = 7\n\n{REVERSE_CLASS}")
    method = REVERSE_CLASS.partition("\n")[2]
    return [
        *whole,
        *[f"Here it is:\n```python\n{code}```\nIt is linear." for code in (*whole, method)],
        f"{REVERSE_CLASS}\ns = Solution()\nprint(s.reverse([1]))\n",
        "class ListNode:\n    def __init__(self, x):\n        self.val = x\n"
        f"        self.next = None\n\n{REVERSE_CLASS}",
    ]


@pytest.mark.parametrize(
    "prompt, tests, entry_point",
    [(LISTED, LISTED_TESTS, "Solution"), (LISTED, SET_TESTS, "Solution().reverse")],
)
def test_leetcode_gives_the_nodes(prompt, tests, entry_point):
    for text in (
        REVERSE,
        f"        {REVERSE}",
        f"{REVERSE}\n    def unused(self):\n        return 1\n",
        *leetcode_completions(),
    ):
        for completion, passed in ((text, True), (text.replace("return previous", "return None"), False)):
            item = programs.grading_item(prompt, completion, tests, entry_point)
            assert grade(**item)["passed"] == passed, item["program"]


def test_an_entry_point_may_be_an_expression():
    double = "class Solution:\n    def double(self, x):\n        return 2 * x\n"
    tests = "def check(candidate):\n    assert candidate(x=2) == 4\n"
    assert grade(double, tests, "Solution().double")["passed"]
    assert not grade(double.replace("2 *", "3 *"), tests, "Solution().double")["passed"]
    assert not grade(double, tests, "Solution().triple")["passed"]
    assert not grade("x = 1", tests, "Solution().double")["passed"]
    assert grade(SET_PROMPT + NEW_NODES, SET_TESTS, "Solution().reverse")["passed"]
    with pytest.raises(GradingError, match="no expression"):
        grade(double, tests, "Solution(.double")


MIRROR_TESTS = """def check(candidate):
    assert is_same_tree(candidate(root = tree_node([1, 2, None, 3])), tree_node([1, None, 2, None, 3]))
    assert candidate(None) is None
"""
MIRROR = """class Solution:
    def mirror(self, root: Optional[TreeNode]) -> Optional[TreeNode]:
        if root:
            root.left, root.right = self.mirror(root.right), self.mirror(root.left)
        return root
"""
SMALLEST_TESTS = """def check(candidate):
    assert candidate(nums = [3, 1, 2], k = 2) == 2
    assert candidate([5], 1) == 5
"""
SMALLEST = """from sortedcontainers import SortedList

class Solution:
    def smallest(self, nums: List[int], k: int) -> int:
        found = SortedList()
        for num in nums:
            found.add(num)
        return found[k - 1]
"""


def test_leetcode_data_set(tmp_path):
    rows = [
        SET_ROW,
        {
            **SET_ROW,
            "task_id": "1",
            "entry_point": "Solution().mirror",
            "test": MIRROR_TESTS,
            "completion": MIRROR,
        },
        {**SET_ROW, "task_id": "2", "entry_point": "Solution().smallest", "test": SMALLEST_TESTS}
        | {"completion": SMALLEST},
    ]
    data = tmp_path / "set.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = Args(
        task="leetcode", data=str(data), reference=True, output_dir=str(tmp_path / "out"), progress=False
    )
    summary = evaluate.main(args)
    assert (summary["passed"], summary["total"], summary["weak_tests"]) == (3, 3, [])
    prompt = evaluate.load_problems(args)[0].prompt
    assert prompt.startswith(SET_PROMPT) and prompt.endswith(SET_ROW["starter_code"])
    assert grade(**programs.grading_item(prompt, REVERSE, SET_TESTS, "Solution().reverse"))["passed"]


NODE_PROMPT = '''"""
# Definition for a Node.
class Node:
    def __init__(self, val, children=None):
        self.val = val
"""
class Solution:
    def value(self, root: 'Node') -> int:
        '''


def test_classes_that_a_prompt_describes():
    tests = "assert Solution().value(Node(4)) == 4\nassert Solution().value(Node(5)) == 5\n"
    assert grade(**programs.grading_item(NODE_PROMPT, "return Node(root.val).val", tests, "Solution"))[
        "passed"
    ]


# ---------------------------------------------------------------- answers


@pytest.mark.parametrize("task", ["gsm8k", "ape210k", "cmath", "math"])
def test_answers(task):
    cases = [case for case in lines_of(DATA / "answers.jsonl") if case["task"] == task]
    assert len(cases) > 25 and wrong(cases, judge(cases, {})) == {}


def test_math_verify_decides_what_is_no_number():
    assert answers.answers_equal(r"\sqrt{18}", r"3\sqrt{2}") and not answers.answers_equal(
        r"\sqrt{8}", r"3\sqrt{2}"
    )
    assert answers.answers_equal("(x+1)^2", "x^2+2x+1") and not answers.answers_equal("2x", "2")


@pytest.mark.parametrize(
    "text",
    ["2(x+1)", r"4\left(x + 5\right)(x-5)", "3(x+y)", "x + 5", "2k+2", "2k(k+1)", "2e", "2^{n}", "-2(x-1)"],
)
def test_an_expression_with_a_letter_is_no_number(text):
    """2(x+1) was once read as 2, a sum as its last term, 2k as two thousand."""
    assert numbers.read(text) is None


def test_a_number_with_words_behind_it_is_one():
    for text in (
        "160 (2 hours + 40 minutes)",
        "$160 (each)",
        "160（分钟，即2小时40分）",
        r"{\bf 160}",
        "$0.16k (net)",
    ):
        assert numbers.read(text).value == 160, text


@pytest.mark.parametrize(
    "text",
    [
        "It takes 160 minutes (2 hours and 40 minutes).",
        "答案：160分钟（即2小时40分）",
        "So it takes 160 minutes. Let me know if step 2 is unclear.",
        "So it takes 160 minutes.\n\nWould you like to see it with 3 files?",
        "So it takes 160 minutes.\n\nDouble-checking: 160 - 40 = 120.",
        "所以要160分钟。\n\n如果你还有其他问题（比如第2题），请提问！",
    ],
)
def test_what_follows_the_answer_is_not_the_answer(text):
    assert numbers.read(answers.extract_answer(text)).value == 160


def test_powers_are_not_bold():
    assert numbers.read("2*10**-5").value == numbers.read(r"2\times10^{-5}").value == 2 * Fraction(1, 10**5)
    assert not answers.answers_equal("2n", "2^n") and answers.answers_equal("**2n**", "2n")


@pytest.mark.parametrize(
    "text",
    [
        "The answer is **18**, not 20.",
        "The answer is **18** dollars, from 9 eggs at 2 dollars.",
        "The answer is **18**!",
        "答案：**18**（9个鸡蛋，每个2元）",
    ],
)
def test_an_answer_in_bold_ends_where_the_bold_ends(text):
    assert answers.verdict(text, "18")["passed"]


def test_the_task_that_a_model_repeats_first_is_not_one_it_asks_itself():
    for text in (
        "### Problem\n16 eggs.\n### Question\nDollars?\n### Solution\n9 * 2 = 18\n### Answer\n18",
        "Given:\n- eggs = 16\n\nTask: find dollars.\n\n9 * 2 = 18 dollars.",
        "Question: dollars?\nSolution: 9 * 2 = 18\n\nQuestion: Tom has 5 and 3. How many?\nAnswer: 8",
    ):
        assert answers.verdict(text, "18")["passed"]


def test_a_letter_with_its_reason_is_a_choice():
    assert answers.verdict("The best answer is A because B has 2 flaws.", "A")["passed"]


def test_two_solutions_in_boxes_of_their_own():
    assert answers.extract_answer(r"$x = \boxed{1}$ and $x = \boxed{2}$.") == "1$ and $2"


DIFFERING = {  # kinds of the table in ANSWERS.md
    "separators",
    "signs",
    "currency",
    "percent",
    "fractions",
    "mixed numbers",
    "powers of ten",
    "words for large numbers",
    "number words",
    "ratios",
    "units",
    "bold and marks",
    "choices",
    "times and dates",
    "expressions",
    "further",
}


def test_where_math_verify_differs():
    """On numbers it agrees except in the kinds that ANSWERS.md lists, and there ours is right."""
    different = set()
    for case in lines_of(DATA / "answers.jsonl"):
        answer, gold = answers.extract_answer(case["completion"]), case["gold"]
        if case["kind"] in different or not (numbers.read(answer) and numbers.read(gold)):
            continue  # one difference a kind is enough; `test_answers` holds that ours is right in all
        if symbolic.equal(answer, gold) != case["passed"]:
            different.add(case["kind"])
            assert answers.answers_equal(answer, gold) == case["passed"]
    assert different == DIFFERING - {"ratios"}  # `3 to 8` is no number before its gold answer is seen


def test_answers_from_any_thread():
    found = []
    questions = [(r"\frac{\sqrt{4}}{2}", "1"), (r"\pi^2", r"\pi"), (r"x+x", "2x")]
    threads = [
        threading.Thread(target=lambda pair=pair: found.append(answers.answers_equal(*pair)))
        for pair in questions
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(found) == {True: 2, False: 1}


def test_no_answer_hangs(monkeypatch):
    monkeypatch.setattr(symbolic, "CPU_SECONDS", 0.25)
    monkeypatch.setattr(symbolic, "_worker", None)  # one that is started with it
    for text in (
        r"\boxed{9^{9^{9^{9}}}}",
        r"\boxed{" * 500,
        r"\boxed{\sqrt{" + "(" * 300,
        r"\boxed{10^{10^{10}}}",
    ):
        start = time.monotonic()
        assert not answers.verdict(text, "5")["passed"]
        assert time.monotonic() - start < symbolic.WALL_SECONDS
    assert answers.verdict(r"\boxed{\sqrt{25}}", "5")["passed"]  # and the next one is judged again


@pytest.mark.parametrize(
    "unit",
    ["1", "12 ", "1,", "(1", "\\boxed{", "the answer is ", "#### 5\n", "答：一共3个。", "1分之", "$1", "a. "],
)
def test_answers_take_time_linear_in_the_text(unit):
    """Ten times the text takes about ten times the time; 8000 digits once took 14 seconds."""

    def seconds(count):
        start = time.process_time()
        assert answers.verdict(unit * count + "\nThe answer is 5.", "5")["passed"]
        return time.process_time() - start

    seconds(100)
    assert seconds(10000) < 40 * max(seconds(1000), 0.01)


# ---------------------------------------------------------------- one verdict


def test_oracle_and_evaluate_agree(tmp_path):
    rows = lines_of(DATA / "problems.jsonl")
    samples, prompts, responses = [], [], []
    for i, row in enumerate(rows):
        for j, dress in enumerate(list(CLOTHES.values())[i::7]):
            body = row["canonical_solution"] if j % 2 else spoiled(row["canonical_solution"])
            text = dress(row["prompt"], body, row["entry_point"])
            samples.append({**row, "task_id": f"{row['task_id']}-{j}", "completion": text})
    for name, fields in (
        ("data", ("task_id", "prompt", "entry_point", "test")),
        ("samples", ("task_id", "completion")),
    ):
        records = [{field: sample[field] for field in fields} for sample in samples]
        (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    evaluate.main(
        Args(
            task="humaneval",
            data=str(tmp_path / "data"),
            samples=str(tmp_path / "samples"),
            output_dir=str(tmp_path / "out"),
            progress=False,
        )
    )
    verdicts = [float(line["passed"]) for line in lines_of(tmp_path / "out" / "verdicts.jsonl")]
    prompts, responses = (
        [sample["prompt"] for sample in samples],
        [sample["completion"] for sample in samples],
    )
    assert rewards.oracle(prompts, responses, samples) == verdicts
    renamed = [{"tests": sample["test"], "entry_point": sample["entry_point"]} for sample in samples]
    assert rewards.oracle(prompts, responses, renamed) == verdicts and 0 < sum(verdicts) < len(verdicts)


def test_oracle_reads_rows_of_all_sets():
    mbpp = {
        "text": "Double.",
        "test_list": ["assert double(2) == 4", "assert double(0) == 0"],
        "code": "def double(x): ...",
    }
    rows = [
        mbpp,
        SET_ROW,
        {"problem": "?", "solution": r"So \boxed{\frac{1}{2}}."},
        {"question": "?", "answer": "x\n#### 1,200"},
    ]
    responses = [
        "[BEGIN]\ndef double(x):\n    return 2 * x\n[DONE]",
        REVERSE_CLASS,
        r"\boxed{0.5}",
        "It is 1200.",
    ]
    assert rewards.oracle(["?"] * 4, responses, rows) == [1.0, 1.0, 1.0, 1.0]
    assert rewards.oracle(["?"] * 4, ["1"] * 4, rows) == [0.0] * 4


if __name__ == "__main__":
    found = lines_of(Path(sys.argv[1]))
    outcome = wrong(found, judge(found, humaneval_problems()))
    for kind, (count, (text, detail)) in outcome.items():
        print(f"{count} wrong of kind {kind[0]!r} (should be {kind[1]}): {detail}\n{text}\n")
    print(f"{sum(count for count, _ in outcome.values())} of {len(found)} wrong")
    grading.close()
