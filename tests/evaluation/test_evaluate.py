"""Reading answers, the evaluation script, rewards. Real data sets are looked for beside the checkout; what
needs them is skipped without."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, GPT2Model, PreTrainedTokenizerFast

from benchmark import rewards
from benchmark.evaluation import evaluate
from benchmark.evaluation.answers import answers_equal, evaluate_number, extract_answer
from benchmark.evaluation.evaluate import Args, InputError, main, pass_at_k, standard_error
from benchmark.evaluation.programs import complete, extract_code
from benchmark.grading import grader as grading

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
ROOT = Path(evaluate.__file__).resolve().parents[2]
HE = SHARED / "HumanEval.jsonl.gz"


@pytest.fixture(scope="module", autouse=True)
def ended():
    yield
    grading.close()


def shared(name):
    if not (SHARED / name).is_file():
        pytest.skip(f"the shared {name} is not beside this checkout")
    return str(SHARED / name)


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


PROBLEMS = [
    {
        "task_id": "m/0",
        "prompt": "def add(a, b):\n",
        "entry_point": "add",
        "tests": "assert add(1, 2) == 3\nassert add(0, 0) == 0\n",
        "canonical_solution": "    return a + b\n",
    },
    {
        "task_id": "m/1",
        "prompt": "def neg(a):\n",
        "entry_point": "neg",
        "tests": "assert neg(1) == -1\nassert neg(2) == -2\n",
        "canonical_solution": "    return -a\n",
    },
    {
        "task_id": "m/2",
        "prompt": "def one():\n",
        "entry_point": "one",
        "tests": "assert one() == 1\n",
        "canonical_solution": "    return 1\n",
    },
]
SAMPLES = [{"task_id": p["task_id"], "completion": p["canonical_solution"]} for p in PROBLEMS]


@pytest.fixture
def world(tmp_path):
    """Arguments of a run on three problems, and a way to change its files."""
    data, samples = (
        write_lines(tmp_path / "data.jsonl", PROBLEMS),
        write_lines(tmp_path / "samples.jsonl", SAMPLES),
    )
    return Args(task="minicode", data=data, samples=samples, output_dir=str(tmp_path / "out"), progress=False)


# ---------------------------------------------------------------- extract_code: PITFALLS EX-6

F = "def f(x):\n    return x"


@pytest.mark.parametrize("label", ["python", "py", "Python", "", "python3"])
def test_fence_labels(label):  # PITFALLS EX-6
    assert extract_code(f"```{label}\n{F}\n```").strip() == F


@pytest.mark.parametrize(
    "text",
    [
        f"Here is it:\r\n```python\r\n{F}\r\n```\r\nDone.".replace("\n", "\r\n").replace(
            "\r\r", "\r"
        ),  # CRLF
        f"```python\n{F}\n```\nUse it:\n```python\nprint(f(3))\n```",  # the second fence is a use
        f"Install:\n```bash\npip install x\n```\n```python\n{F}\n```",
        f"Draft:\n```python\ndef f(x):\n    pass\n```\nBetter:\n```python\n{F}\n```",
        f"Sure!\n```python\n{F}\n",  # never closed
        f"{F}\n```\nThis function returns its argument.",  # closed but never opened
        f"{F}",
        f"Here is the function that you asked for.\n\n{F}\n\nThis function returns what it is given.",
        f"<think>def f(x): return 0\n```python\ndef f(x):\n    return 0\n```</think>\n```python\n{F}\n```",
        f"1. Write it:\n   ```python\n   {F.replace(chr(10), chr(10) + '   ')}\n   ```",
        f"~~~python\n{F}\n~~~",
    ],
)
def test_extract_code(text):  # PITFALLS EX-6
    assert extract_code(text, "f").strip() == F


def test_a_bare_body_keeps_its_indentation():
    assert extract_code("    y = x\n    return y\n") == "    y = x\n    return y\n"
    assert extract_code("    return x\n```\nExplanation.", "f") == "    return x\n"


def test_module_docstring_is_no_prose():
    code = '"""\nGiven some numbers find the largest of them.\n"""\n' + F
    assert extract_code(code, "f").strip() == code


@pytest.mark.parametrize(
    "completion",
    [
        "    return x\n",
        "return x\n",
        "```python\n    return x\n```",
        "```\nreturn x\n```",
        f"```python\n{F}\n```",
        F,
        "if x:\n        return x\n    return x",
        "y = x\nreturn y",
    ],
)
def test_completions_in_every_form_complete_the_prompt(completion):
    space = {}
    exec(complete("def f(x):\n", completion, "f"), space)
    assert space["f"](3) == 3


def test_leetcode_prompt_that_ends_in_an_indentation():
    prompt = "class Solution:\n    def total(self, nums: List[int]) -> int:\n        "
    for completion in (
        "return sum(nums)",
        "        return sum(nums)",
        "t = sum(nums)\n        return t",
        "t = sum(nums)\nreturn t",
        "```python\nclass Solution:\n    def total(self, nums: List[int]) -> int:\n        return "
        "sum(nums)\n```",
    ):
        space = {}
        exec(complete(prompt, completion, "Solution"), space)
        assert space["Solution"]().total([1, 2]) == 3


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    "text, value",
    [
        ("4(5/11)", 49 / 11),
        ("4又5/11", 49 / 11),
        ("5分之3", 0.6),
        ("(1/10)", 0.1),
        ("65%", 0.65),
        ("百分之65", 0.65),
        ("(45+39)/(45-39)", 14),
        ("50/(4/5)", 62.5),
        ("1,234.5", 1234.5),
        ("$72", 72),
        ("3:8", 0.375),
        ("\\frac{3}{8}", 0.375),
        ("2\\frac{1}{2}", 2.5),
        ("４５％", 0.45),
        ("2**3", 8),
        ("(1-20%)*(1-25%)", 0.6),
        ("3(1/5)*3(1/5)/1(3/5)", 6.4),
        ("007", 7),
    ],
)
def test_values(text, value):
    assert float(evaluate_number(text)) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("text", ["", "abc", "1/0", "9**9**9", "(" * 300, "import os", "10**100", "1 2"])
def test_no_values(text):
    assert evaluate_number(text) is None or text == "1 2"


@pytest.mark.parametrize(
    "answer, gold",
    [
        ("49/11", "4(5/11)"),
        ("4.4545", "4(5/11)"),
        ("0.65", "65%"),
        ("13/20", "65%"),
        ("14", "(45+39)/(45-39)"),
        ("10", "10.00"),
        ("20%", "20"),
        ("6.67", "(20/3)"),
        ("25千克", "25"),
        ("72 dollars", "72"),
        ("5 km/h", "5"),
        ("x=3750", "3750"),
        ("60%", "(1-20%)*(1-25%)"),
    ],
)
def test_equal_answers(answer, gold):
    assert answers_equal(answer, gold)


@pytest.mark.parametrize(
    "answer, gold",
    [
        ("65", "65%"),
        ("0.65%", "65%"),
        ("4", "4(5/11)"),
        ("5/11", "4(5/11)"),
        ("20/11", "4(5/11)"),
        ("", "3"),
        ("many", "3"),
        ("0.33", "1/3"),
        ("-5", "5"),
        ("1234", "123"),
        ("0.2%", "20"),
        ("", ""),
    ],
)
def test_different_answers(answer, gold):
    assert not answers_equal(answer, gold)


@pytest.mark.parametrize(
    "text, answer",
    [
        ("5 * 3 = 15\n#### 1,234", "1234"),
        ("First 3, then 4.\nThe answer is 72.", "72"),
        ("so it is \\boxed{\\frac{3}{8}} of 7", "3/8"),
        ("She has 3 apples and 4 pears, so 7 in total.", "7"),
        ("x=6000/(1+(3/5))\nx=3750\n答：洗衣机的价钱是3750元。", "3750"),
        ("答案是：4(5/11)", "4(5/11)"),
        ("x=(22.6-4*1.9)/6", "2.5"),
        ("因此，答案是 3/8 米。", "3/8"),
        ("The answer is 5 + 3 = 8 apples.", "8"),
        ("Not 5.\n**Answer: 42**", "42"),
        ("<think>The answer is 3.</think>The answer is 4.", "4"),
    ],
)
def test_extract_answer(text, answer):
    assert answers_equal(extract_answer(text), answer)


# ---------------------------------------------------------------- numbers of a summary


def test_pass_at_k_by_hand():
    # 5 samples, 2 pass: 1 - C(3,2)/C(5,2) = 1 - 3/10
    assert pass_at_k(5, 2, 2) == pytest.approx(0.7) and pass_at_k(5, 2, 1) == pytest.approx(0.4)
    assert pass_at_k(5, 0, 5) == 0 and pass_at_k(5, 1, 5) == 1


def test_standard_error_by_hand():  # PITFALLS EX-8
    assert standard_error([1.0, 1.0, 0.0, 1.0], 1) == pytest.approx((0.75 * 0.25 / 4) ** 0.5)
    assert standard_error([0.2, 0.6], 5) == pytest.approx(0.2)  # sd sqrt(.08), over sqrt 2


# ---------------------------------------------------------------- the script


def test_summary_and_verdicts(world):
    Path(world.samples).write_text(Path(world.samples).read_text().replace("return -a", "return a"))
    summary = main(world)
    assert (summary["passed"], summary["total"], summary["pass1"]) == (2, 3, pytest.approx(2 / 3))
    assert json.loads(Path(world.output_dir, "summary.json").read_text())["pass1_se"] == pytest.approx(
        (2 / 9 / 3) ** 0.5
    )
    verdicts = [
        json.loads(line) for line in Path(world.output_dir, "verdicts.jsonl").read_text().splitlines()
    ]
    assert [(v["task_id"], v["passed"]) for v in verdicts] == [("m/0", True), ("m/1", False), ("m/2", True)]


def test_missing_packages_are_counted_apart(world):
    needs = "    import no_such_package\n    return no_such_package.add(a, b)\n"
    write_lines(Path(world.samples), [{"task_id": "m/0", "completion": needs}, *SAMPLES[1:]])
    summary = main(world)
    assert (summary["passed"], summary["missing_packages"]) == (2, {"no_such_package": 1})


def test_command_line(world, tmp_path):
    command = [
        sys.executable,
        "benchmark/evaluate.py",
        "--task",
        "minicode",
        "--data",
        world.data,
        "--samples",
        world.samples,
        "--output_dir",
        str(tmp_path / "cli"),
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and "100.0" in result.stdout, result.stderr
    Path(world.samples).write_text("{broken\n")
    result = subprocess.run(
        [*command[:-1], str(tmp_path / "other")], cwd=ROOT, capture_output=True, text=True
    )
    assert (
        result.returncode == 1
        and "samples.jsonl, line 1" in result.stderr
        and "Traceback" not in result.stderr
    )


def test_two_samples_per_problem(world):
    wrong = [{**sample, "completion": "    return None\n"} for sample in SAMPLES]
    write_lines(Path(world.samples), [*SAMPLES[:2], *wrong, *SAMPLES[2:]])
    world.num_samples = 2
    summary = main(world)
    assert (
        summary["pass1"] == pytest.approx(0.5) and summary["passed"] == 2
    )  # the first sample of m/2 is the wrong one


def test_reference_solutions_and_broken_ones(world):  # PITFALLS EX-7
    world.samples, world.reference = "", True
    summary = main(world)
    assert summary["passed"] == 3 and summary["weak_tests"] == ["m/2"]  # a single test cannot tell a constant


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda data, samples: samples.write_text(samples.read_text() + "{broken\n"),
            "samples.jsonl, line 4: malformed",
        ),
        (
            lambda data, samples: samples.write_text(samples.read_text() + json.dumps(SAMPLES[0])),
            "samples.jsonl, line 4: duplicate task id 'm/0' .*line 1",
        ),
        (
            lambda data, samples: write_lines(samples, [*SAMPLES, {"task_id": "m/9", "completion": ""}]),
            "samples.jsonl, line 4: unknown task id 'm/9'",
        ),
        (
            lambda data, samples: write_lines(samples, [{"task_id": "m/0"}]),
            "samples.jsonl, line 1: missing completion",
        ),
        (
            lambda data, samples: write_lines(samples, SAMPLES[:1]),
            "missing completion for 2 of 3 problems: m/1, m/2",
        ),
        (lambda data, samples: samples.write_text(""), "samples.jsonl: the file is empty"),
        (lambda data, samples: samples.unlink(), "samples.jsonl: no such file"),
        (
            lambda data, samples: data.write_text(data.read_text() + "nonsense\n"),
            "data.jsonl, line 4: malformed",
        ),
        (
            lambda data, samples: write_lines(data, [*PROBLEMS, PROBLEMS[0]]),
            "data.jsonl, line 4: duplicate task id m/0",
        ),
        (
            lambda data, samples: write_lines(data, [{**PROBLEMS[0], "tests": ""}]),
            "data.jsonl, line 1: field `tests` is missing or empty",
        ),
        (
            lambda data, samples: write_lines(data, [{**PROBLEMS[0], "tests": "x = 1"}]),
            "data.jsonl, line 1: zero tests",
        ),
        (lambda data, samples: data.write_text("[1]"), "data.jsonl, record 1: expected a JSON object"),
    ],
)
def test_bad_files_are_named(world, change, message):
    change(Path(world.data), Path(world.samples))
    with pytest.raises(InputError, match=message):
        main(world)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model": "x"}, "exactly one"),
        ({"samples": ""}, "exactly one"),
        ({"num_samples": 0}, "num_samples 0"),
        ({"reward_model": "/nowhere"}, "no such folder"),
        ({"samples": "", "model": "/tmp"}, "no config.json"),
        ({"samples": "", "model": "x", "num_samples": 2}, "temperature"),
    ],
)
def test_bad_settings_are_refused(world, change, message):
    for name, value in change.items():
        setattr(world, name, value)
    with pytest.raises(InputError, match=message):
        main(world)


def test_missing_completions_can_count_as_failed(world):
    write_lines(Path(world.samples), SAMPLES[:1])
    world.allow_missing = True
    summary = main(world)
    assert (summary["passed"], summary["total"]) == (1, 3)


def test_a_run_that_broke_off_goes_on(world, monkeypatch):
    main(world)
    path = Path(world.output_dir, "verdicts.jsonl")
    lines = path.read_text().splitlines()
    path.write_text(lines[0] + "\n" + lines[1][:10])  # killed while it wrote the second line
    graded = []
    monkeypatch.setattr(
        evaluate, "grade_many", lambda items, **kw: graded.extend(items) or grading.grade_many(items, **kw)
    )
    assert main(world)["passed"] == 3
    assert [item["entry_point"] for item in graded] == ["neg", "one"] and len(
        path.read_text().splitlines()
    ) == 3


def test_graded_work_is_kept_when_grading_fails(world, monkeypatch):  # PITFALLS EX-3
    data = [*PROBLEMS[:2], {**PROBLEMS[2], "tests": "assert one( == 1"}]
    write_lines(Path(world.data), data)
    world.workers = 1
    with pytest.raises(grading.GradingError, match="2 of 3 problems are graded and kept"):
        main(world)
    assert len(Path(world.output_dir, "verdicts.jsonl").read_text().splitlines()) == 2


def test_a_folder_of_another_run_is_refused(world):
    main(world)
    world.wall_seconds = 3.0
    with pytest.raises(InputError, match="holds another run .*wall_seconds"):
        main(world)


@pytest.mark.parametrize(
    "task, row, right, wrong",
    [
        (
            "gsm8k",
            {"question": "How many?", "answer": "2*36=<<2*36=72>>72\n#### 72"},
            "It is 72.",
            "It is 7.",
        ),
        (
            "ape210k",
            {
                "id": "294840",
                "segmented_text": "",
                "original_text": "(4/7)x-2(5/11)=0.25-(1/28)x",
                "ans": "4(5/11)",
                "equation": "x=1",
            },
            "x=49/11",
            "x=4",
        ),
        (
            "cmath",
            {"grade": 1, "question": "一共多少？", "golden": "15", "reasoning_step": 2, "num_digits": 2},
            "一共有15个。答案是 15",
            "一共有14个",
        ),
    ],
)
def test_math_tasks(tmp_path, task, row, right, wrong):
    data = write_lines(tmp_path / "data.json", [row, {**row, "id": "2"} if "id" in row else row])
    ids = ["294840", "2"] if "id" in row else [0, "1"]
    samples = write_lines(
        tmp_path / "s.jsonl",
        [{"task_id": ids[0], "completion": right}, {"task_id": ids[1], "completion": wrong}],
    )
    summary = main(Args(task=task, data=data, samples=samples, output_dir=str(tmp_path / "out")))
    assert (summary["passed"], summary["total"]) == (1, 2)


def test_leetcode(tmp_path):
    prompt = (
        '"""\nGiven nums return its sum.\n"""\n'
        "class Solution:\n    def total(self, nums: List[int]) -> int:\n        "
    )
    test = (
        "\nmy_solution = Solution()\n\ntest_input = { 'nums': [1,2] }\n"
        "assert my_solution.total(**test_input) == 3\n"
    )
    row = {"task_id": "weekly-1-total", "prompt": prompt, "test": test, "meta": {"difficulty": "Easy"}}
    data = write_lines(
        tmp_path / "lc.jsonl", [row, {**row, "task_id": "weekly-1-other", "meta": {"difficulty": "Hard"}}]
    )
    whole = (
        "```python\nclass Solution:\n    def total(self, nums: List[int]) -> int:\n"
        "        return sum(Counter(nums).elements())\n```"
    )
    rows = [
        {"task_id": "weekly-1-total", "completion": whole},
        {"task_id": "weekly-1-other", "completion": "return 0"},
    ]
    summary = main(
        Args(
            task="leetcode",
            data=data,
            samples=write_lines(tmp_path / "s.jsonl", rows),
            output_dir=str(tmp_path / "out"),
            progress=False,
        )
    )
    assert summary["by_difficulty"] == {
        "Easy": {"pass1": 1.0, "total": 1},
        "Hard": {"pass1": 0.0, "total": 1},
    }


# ---------------------------------------------------------------- real files


def canonical(name, field):
    path = shared(name)
    text = gzip.open(path, "rt").read() if path.endswith(".gz") else Path(path).read_text()
    return path, [
        {"task_id": row["task_id"], "completion": row[field]} for row in map(json.loads, text.splitlines())
    ]


def test_canonical_humaneval(tmp_path):  # PITFALLS EX-7
    data, rows = canonical("HumanEval.jsonl.gz", "canonical_solution")
    summary = main(
        Args(
            task="humaneval",
            data=data,
            samples=write_lines(tmp_path / "s.jsonl", rows),
            output_dir=str(tmp_path / "out"),
            progress=False,
        )
    )
    assert (summary["passed"], summary["total"]) == (164, 164)


def test_canonical_mbpp(tmp_path):  # PITFALLS EX-7
    data, rows = canonical("mbpp_base_378.jsonl", "code")
    rows = [
        {"task_id": f"Mbpp/{row['task_id']}", "completion": f"```python\r\n{row['completion']}\r\n```"}
        for row in rows
    ]
    short = tmp_path / "short.jsonl"  # without the test for which Mbpp/123 computes for four seconds
    short.write_text(Path(data).read_text().replace('"assert amicable_numbers_sum(9999)==31626", ', ""))
    summary = main(
        Args(
            task="mbpp",
            data=str(short),
            samples=write_lines(tmp_path / "s.jsonl", rows),
            output_dir=str(tmp_path / "out"),
            progress=False,
        )
    )
    assert (summary["passed"], summary["total"]) == (378, 378)


@pytest.mark.parametrize("task, name", [("humaneval", "HumanEval.jsonl.gz"), ("mbpp", "mbpp_base_378.jsonl")])
def test_broken_solutions_fail_except_the_named(task, name):  # PITFALLS EX-7
    args = Args(task=task, data=shared(name), progress=False)
    weak = evaluate.WEAK_TESTS[task]
    problems = [p for i, p in enumerate(evaluate.load_problems(args)) if i % 8 == 0 or p.task_id in weak]
    assert evaluate.weak_tests(args, problems) == list(weak)


def test_mbpp_test_split_has_500():
    problems = evaluate.load_problems(Args(task="mbpp", data=shared("mbpp.jsonl")))
    assert len(problems) == 500 and (problems[0].task_id, problems[-1].task_id) == ("11", "510")
    assert all(problem.entry_point for problem in problems)


def test_the_tests_helpers_cannot_be_forged(tmp_path):  # HumanEval/32 /38 /50
    path, rows = canonical("HumanEval.jsonl.gz", "canonical_solution")
    forged = {
        "HumanEval/32": "    return 0.0\n\ndef poly(xs, x):\n    return 0.0\n",
        "HumanEval/38": "    return s\n\ndef encode_cyclic(s):\n    return s\n",
        "HumanEval/50": (
            "```python\ndef encode_shift(s):\n    return s\n\ndef decode_shift(s):\n    return s\n```"
        ),
    }
    samples = write_lines(
        tmp_path / "s.jsonl", [{"task_id": name, "completion": text} for name, text in forged.items()]
    )
    summary = main(
        Args(
            task="humaneval",
            data=path,
            samples=samples,
            output_dir=str(tmp_path / "out"),
            allow_missing=True,
            progress=False,
        )
    )
    assert summary["passed"] == 0


# ---------------------------------------------------------------- models


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(policy folder, reward model folder): random GPT-2 over characters, with hostile generation
    defaults."""
    from rm_single import RewardModel, as_classifier

    torch.manual_seed(0)
    characters = [chr(i) for i in range(32, 127)] + ["\n"]
    raw = Tokenizer(
        models.WordLevel(
            {token: i for i, token in enumerate(["<eos>", "<pad>", "<unk>", *characters])}, unk_token="<unk>"
        )
    )
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    config = GPT2Config(
        vocab_size=len(characters) + 3,
        n_positions=256,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    policy, reward = tmp_path_factory.mktemp("policy"), tmp_path_factory.mktemp("reward")
    model = GPT2LMHeadModel(config)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.01, top_k=1, repetition_penalty=9.0, max_new_tokens=1, eos_token_id=5
    )
    model.save_pretrained(policy)
    as_classifier(RewardModel(GPT2Model(config), bound="tanh")).save_pretrained(reward)
    for folder in (policy, reward):
        tokenizer.save_pretrained(folder)
    return str(policy), str(reward)


def test_greedy_completions_do_not_depend_on_padding_or_checkpoint_defaults(
    tiny, tmp_path
):  # PITFALLS TOK-1 LP-1
    data = write_lines(tmp_path / "data.jsonl", PROBLEMS)
    found = []
    for size in (1, 3):
        args = Args(
            task="minicode",
            data=data,
            model=tiny[0],
            batch_size=size,
            max_new_tokens=12,
            output_dir=str(tmp_path / f"out{size}"),
            progress=False,
        )
        main(args)
        found.append(
            [
                json.loads(line)["completion"]
                for line in Path(args.output_dir, "samples.jsonl").read_text().splitlines()
            ]
        )
    assert found[0] == found[1] and max(map(len, found[0])) > 1
    # By hand: the likeliest token again and again, without any warping.
    model = GPT2LMHeadModel.from_pretrained(tiny[0]).eval()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny[0])
    ids = tokenizer(PROBLEMS[0]["prompt"], return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(12):
            ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    text = tokenizer.decode(ids[0, start:], skip_special_tokens=True)
    assert text.startswith(found[0][0]) and found[0][0]


def test_sampling_and_best_of_n(tiny, tmp_path):
    data = write_lines(tmp_path / "data.jsonl", PROBLEMS)
    args = Args(
        task="minicode",
        data=data,
        model=tiny[0],
        num_samples=5,
        temperature=1.0,
        max_new_tokens=6,
        reward_model=tiny[1],
        output_dir=str(tmp_path / "out"),
        progress=False,
    )
    summary = main(args)
    assert set(summary["best_of"]) == {"1", "5"} and set(summary["pass_at_k"]) == {"1", "5"}
    texts = [
        json.loads(line)["completion"]
        for line in Path(args.output_dir, "samples.jsonl").read_text().splitlines()
    ]
    assert len(texts) == 15 and len(set(texts)) > 5


def test_best_of_n_scores_what_the_model_was_asked(tmp_path, monkeypatch):
    """The instruction as messages under --prompt_style chat, the bare prompt else."""
    seen = []
    monkeypatch.setattr(
        evaluate, "reward_scores", lambda folder, prompts, *rest: seen.extend(prompts) or [0.0]
    )
    data = write_lines(tmp_path / "data.jsonl", [{"task_id": "a", "question": "1 + 1?", "answer": "2"}])
    samples = write_lines(tmp_path / "samples.jsonl", [{"task_id": "a", "completion": "2"}])
    given = dict(task="gsm8k", data=data, samples=samples, reward_model="rm")
    for style in ("chat", "completion"):
        main(Args(**given, prompt_style=style, output_dir=str(tmp_path / style)))
    [[turn], bare] = seen
    assert turn["role"] == "user" and turn["content"].startswith("1 + 1?\n") and bare.startswith("Question: ")


def test_best_of_n_takes_the_response_of_highest_reward():
    class Graded:
        verdicts = {
            "a": {"results": [{"passed": False}, {"passed": True}]},
            "b": {"results": [{"passed": True}, {"passed": False}]},
        }

    problems = [evaluate.Problem("a", "", ""), evaluate.Problem("b", "", "")]
    assert evaluate.best_of(problems, Graded, None, {"a": [0.1, 0.9], "b": [0.2, 0.3]}) == (0.5, 0.5)
    assert evaluate.best_of(problems, Graded, None, {"a": [0.1, 0.9], "b": [0.4, 0.3]}) == (0.5, 1.0)


# ---------------------------------------------------------------- rewards


def test_oracle_grades_prompt_and_response():
    rows = [PROBLEMS[0], PROBLEMS[0], PROBLEMS[1], {"golden": "15"}, {"answer": "#### 7"}]
    prompts = [row.get("prompt", "?") for row in rows]
    responses = [
        "    return a + b\n",
        "    return a\n",
        "```python\ndef neg(a):\n    return -a\n```",
        "答案是 15",
        "The answer is 8.",
    ]
    assert rewards.oracle(prompts, responses, rows) == [1.0, 0.0, 1.0, 1.0, 0.0]


def test_oracle_uses_the_fast_grader_for_the_embedded_world():
    minicode = pytest.importorskip("benchmark.minicode")
    rows = minicode.make_rows(minicode.World(seed=1), "valid")[:6]
    prompts = [row["prompt"] for row in rows]
    assert rewards.oracle(prompts, [row["canonical_solution"] for row in rows], rows) == [1.0] * 6
    assert rewards.oracle(prompts, ["    return None\n"] * 6, rows) == [0.0] * 6


def test_combined_reward_by_hand():
    assert [rewards.combine(*pair) for pair in ((1, 1), (-1, 1), (0.5, 1), (1, 0), (-1, 0))] == [
        1,
        0,
        0.75,
        0,
        -1,
    ]


def test_orm_and_crm(tiny):
    prompts, responses, rows = (
        ["def add(a, b):\n"] * 2,
        ["    return a + b\n", "    return a\n"],
        [PROBLEMS[0]] * 2,
    )
    learned = rewards.orm(prompts, responses, rows, source=tiny[1])
    alone = rewards.orm(prompts[1:], responses[1:], rows[1:], source=tiny[1])
    assert learned[1] == pytest.approx(alone[0], abs=1e-5) and all(abs(value) < 1 for value in learned)
    combined = rewards.crm(prompts, responses, rows, source=tiny[1])
    assert combined == pytest.approx([(learned[0] + 1) / 2, (learned[1] + 1) / 2 - 1])
    with pytest.raises(ValueError, match="behind @"):
        rewards.orm(prompts, responses, rows)


def test_suspicious_share():  # PITFALLS EX-9
    responses = [
        "    return x\n",
        "    import sys\n    sys.exit(0)\n",
        "    print('All tests passed')\n",
        "    def __eq__(self, o): return True\n",
    ]
    shares = rewards.suspicious_share(responses)
    assert (
        shares["suspicious"] == 0.75
        and shares["interpreter"] == 0.25
        and shares["pass_markers"] == 0.25
        and shares["comparison"] == 0.25
    )
    assert rewards.suspicious_share([])["suspicious"] == 0
