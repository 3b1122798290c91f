"""Evaluates a model, or given completions, on code and math problems by executing programs and comparing
final answers.

    python benchmark/evaluate.py --task humaneval --data HumanEval.jsonl.gz --samples completions.jsonl \\
        --output_dir output/he
    python benchmark/evaluate.py --task mbpp --model deepseek-ai/deepseek-coder-6.7b-instruct \\
        --prompt_style chat --output_dir output/mbpp
    python benchmark/evaluate.py --task gsm8k --model output/br/policy --num_samples 5 --temperature 0.8 \\
        --reward_model output/rm/model --output_dir output/bon

1. Read the problems (`--data FILE` in the published format, else from the hub) and check them.
2. Read the completions (`--samples FILE.jsonl` with `task_id` and `completion`), or generate them with
   `--model`, and check them.
3. Grade: programs are found by `benchmark.evaluation.programs` and run by `benchmark.grading`, final answers
   are read by `benchmark.evaluation.answers`. Each verdict is written as it comes; a run that broke off goes
   on where it was.
4. Score the completions with `--reward_model`, for best-of-1 and best-of-n.
5. Print a table; leave DIR/summary.json and DIR/verdicts.jsonl (one line per problem, in the order of the
   data).

pass@1 is greedy unless `--temperature` says otherwise, at a fixed batch size and dtype (both move it), with
its standard error: a difference inside it is no result.
"""

import gzip
import hashlib
import json
import math
import re
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from benchmark.evaluation import answers, programs
from benchmark.grading import GradingError, grade_many
from benchmark.grading.grader import CPU_SECONDS, MEMORY_BYTES, WALL_SECONDS, as_job
from benchmark.records import finished_rows, write_text

CODE_TASKS = ("humaneval", "mbpp", "leetcode", "minicode")
MATH_TASKS = ("gsm8k", "ape210k", "cmath")


@dataclass
class Args:
    # what
    task: Literal["humaneval", "mbpp", "leetcode", "gsm8k", "ape210k", "cmath", "minicode"]
    """the benchmark; it decides the fields of the data, the prompt and the grader"""
    data: str = ""
    """problems in the published format: .jsonl, .json (an array or one object per line), .parquet, each also
    .gz; empty: from the hub (HUB below)"""
    split: Literal["auto", "test", "all"] = "auto"
    """mbpp only: `test` takes ids 11 to 510, `all` takes all; `auto` is `test` for mbpp.jsonl (974 problems)
    and `all` for every other file"""
    limit: int = 0
    """only the first problems; 0: all"""
    output_dir: str = "output/evaluate"
    """folder for everything this run writes; a folder with another run in it is refused, the same run is
    continued"""
    # completions
    samples: str = ""
    """JSONL with `task_id` and `completion` (what follows the prompt, or a whole program, fenced or bare; for
    math the solution text)"""
    allow_missing: bool = False
    """count problems without a completion as failed instead of refusing the file"""
    model: str = ""
    """folder or hub id of a causal language model that writes the completions; exactly one of `samples` and
    `model` is given"""
    prompt_style: Literal["completion", "chat"] = "completion"
    """`completion` hands the model the bare prompt, `chat` an instruction through its chat template"""
    reference: bool = False
    """instead of `samples` or `model`: grade the data's own solutions, and a broken form of each, which
    should fail (WEAK_TESTS lists what does not)"""
    num_samples: int = 1
    """completions per problem (n); above 1 pass@k is estimated from them without bias"""
    temperature: float = 0.0
    """of sampling; 0 is greedy decoding"""
    max_new_tokens: int = 512
    """longest completion, in tokens"""
    batch_size: int = 16
    """sequences generated together; part of the result, since padding and batching move greedy decoding"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """of the model's weights when it generates"""
    device: str = ""
    """torch device; empty: the accelerator where there is one, else the CPU"""
    seed: int = 1
    """of sampling; greedy decoding does not use it"""
    # best of n
    reward_model: str = ""
    """sequence classification model with one label, as `rm_single.py` writes it: adds best-of-1 and
    best-of-n, n being num_samples, the response of highest reward per problem"""
    # grading
    wall_seconds: float = WALL_SECONDS
    """wall time for a whole program with all its tests"""
    cpu_seconds: int = CPU_SECONDS
    """CPU time for a whole program with all its tests"""
    memory_bytes: int = MEMORY_BYTES
    """address space of a program"""
    workers: int = 0
    """programs graded at a time; 0: one per core. Verdicts do not depend on it"""
    progress: bool = True
    """show progress bars"""


MBPP_TEST = (
    "google-research-datasets/mbpp",
    "full",
    "test",
)  # with --split test: the 500 problems; without, the base set of 378
HUB = {  # task -> repository, configuration, split
    "humaneval": ("openai/openai_humaneval", None, "test"),
    "mbpp": ("evalplus/mbppplus", None, "test"),
    "gsm8k": ("openai/gsm8k", "main", "test"),
    "ape210k": ("MU-NLPC/Calc-ape210k", "original-splits", "test"),
    "cmath": ("weitianwen/cmath", None, "test"),
    "leetcode": None,
    "minicode": None,
}

# Problems whose published tests pass a broken reference solution (one whose every answer is off, or the first
# answer given again and again): a pass says little there. Mbpp/82 and /85 allow a relative error of .001,
# more than 1 in their answers; HumanEval/34 has a single test.
WEAK_TESTS = {"humaneval": ("HumanEval/34",), "mbpp": ("82", "85")}
BROKEN = """

def _off(value):
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float, complex)):
        return value + 1
    if isinstance(value, (str, list, tuple)):
        return value + type(value)("x")
    if isinstance(value, (set, frozenset)):
        return value | {"x"}
    return {**value, "x": "x"} if isinstance(value, dict) else "x"


def _broken(function):
    return lambda *arguments, **keywords: _off(function(*arguments, **keywords))


"""
CONSTANT = """

def _broken(function):
    kept = []
    def constant(*arguments, **keywords):
        if not kept:
            kept.append(function(*arguments, **keywords))
        return kept[0]
    return constant


"""


class InputError(ValueError):
    """Something is wrong with a file or a setting; the message names the place and the fix."""


@dataclass
class Problem:
    """One problem of any task. Code: tests and entry_point. Math: gold."""

    task_id: str
    prompt: str
    instruction: str
    tests: str = ""
    entry_point: str = ""
    gold: str = ""
    reference: str = ""
    tags: dict = field(default_factory=dict)


# ---------------------------------------------------------------- files


def read_records(path):
    """[(place, record)] of a .jsonl, .json or .parquet file, gzipped or not. `place` names file and line for
    messages."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if path.name.endswith(".parquet"):
        import pyarrow.parquet

        return [
            (f"{path}, row {i + 1}", row)
            for i, row in enumerate(pyarrow.parquet.read_table(path).to_pylist())
        ]
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text ({error})") from None
    if not text.strip():
        raise InputError(f"{path}: the file is empty")
    if text.lstrip()[0] == "[":
        try:
            records = [(f"{path}, record {i + 1}", record) for i, record in enumerate(json.loads(text))]
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {error.lineno}: malformed JSON ({error.msg})") from None
    else:
        records = []
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    records.append((f"{path}, line {number}", json.loads(line)))
                except json.JSONDecodeError as error:
                    raise InputError(
                        f"{path}, line {number}: malformed JSON ({error.msg}); every line must hold one "
                        "object"
                    ) from None
    for place, record in records:
        if not isinstance(record, dict):
            raise InputError(f"{place}: expected a JSON object, found {type(record).__name__}")
    return records


# ---------------------------------------------------------------- problems


def need(record, place, *names):
    """The first field of `names` that the record has."""
    for name in names:
        if record.get(name) not in (None, ""):
            return record[name]
    raise InputError(
        f"{place}: field `{'` or `'.join(names)}` is missing or empty; the record has {sorted(record)}"
    )


def code_problem(record, place, prompt, instruction, **more):
    """A problem whose tests are in any of the forms that `programs.tests_of` reads."""
    tests, entry_point = programs.tests_of(record)
    if not entry_point:
        raise InputError(f"{place}: no entry_point, and none can be read from the tests: {tests[:80]!r}")
    reference = record.get("canonical_solution") or record.get("completion") or record.get("code") or ""
    task_id = str(need(record, place, "task_id"))
    return Problem(task_id, prompt, instruction, tests, entry_point, reference=reference, **more)


def humaneval_problem(record, place, _):
    prompt = need(record, place, "prompt")
    need(record, place, "test", "tests")
    ask = "Complete the following Python function. Answer with the whole program in one code block."
    return code_problem(record, place, prompt, f"{ask}\n```python\n{prompt.strip()}\n```")


def mbpp_problem(record, place, _):
    description, tests = str(need(record, place, "text", "prompt")).strip(), need(record, place, "test_list")
    if not isinstance(tests, list) or not all(isinstance(test, str) for test in tests):
        raise InputError(f"{place}: zero tests: `test_list` must be a list of assert lines")
    shown, ask = "\n".join(tests[:3]), "Answer with the whole program in one code block."
    instruction = f"{description}\nYour code should pass these tests:\n{shown}\n{ask}"
    return code_problem(record, place, f'"""\n{description}\n{tests[0]}\n"""\n', instruction)


def leetcode_problem(record, place, _):
    """DeepSeek's form (`prompt` ends in the method's signature) or LeetCodeDataset's (`prompt` holds imports,
    the signature is in `starter_code` or meta.lang_code)."""
    meta, prompt = record.get("meta") or {}, need(record, place, "prompt")
    need(record, place, "test", "tests")
    question = record.get("problem_description") or meta.get("question_title") or ""
    starter = record.get("starter_code") or meta.get("lang_code") or ""
    if "class Solution" not in prompt and starter:
        quoted = question.replace("\\", "\\\\").replace('"""', "'" * 3)
        prompt = f'{prompt.rstrip()}\n\n"""\n{quoted}\n"""\n{starter.rstrip()}\n        '
    instruction = (
        record.get("query")
        or f"{record.get('prompt_sft') or prompt}\nAnswer with the whole class in one code block."
    )
    difficulty = record.get("difficulty") or meta.get("difficulty", "")
    return code_problem(record, place, prompt, instruction, tags={"difficulty": difficulty})


def minicode_problem(record, place, _):
    prompt, _ = need(record, place, "prompt"), need(record, place, "tests")
    return code_problem(record, place, prompt, prompt)


def math_problem(record, place, index):
    question = need(record, place, "question_chinese", "original_text", "question", "problem")
    need(record, place, *answers.GOLD_FIELDS)
    gold = answers.gold_of(record)
    chinese = bool(re.search(r"[\u4e00-\u9fff]", question))
    ask = (
        "请一步一步解答，最后一行写“答案是 ”和结果。"
        if chinese
        else "Solve step by step and end with a line `The answer is` and the number."
    )
    identity = next((record[name] for name in ("task_id", "id") if record.get(name) is not None), index)
    prompt = f"问题：{question}\n解答：" if chinese else f"Question: {question}\nAnswer:"
    return Problem(str(identity), prompt, f"{question}\n{ask}", gold=gold)


BUILDERS = {
    "humaneval": humaneval_problem,
    "mbpp": mbpp_problem,
    "leetcode": leetcode_problem,
    "minicode": minicode_problem,
    **dict.fromkeys(MATH_TASKS, math_problem),
}


def load_problems(args):
    """The checked problems of a run, in the order of the data. Raises InputError naming file and line."""
    if args.data:
        records = read_records(args.data)
        source = args.data
    else:
        if HUB[args.task] is None:
            raise InputError(f"--task {args.task} has no data set on the hub; give --data FILE")
        import datasets

        name, config, split = MBPP_TEST if args.task == "mbpp" and args.split == "test" else HUB[args.task]
        source = f"{name} ({split})"
        try:
            records = [
                (f"{source}, row {i + 1}", dict(row))
                for i, row in enumerate(datasets.load_dataset(name, config, split=split))
            ]
        except Exception as error:  # many kinds, none of them ours
            raise InputError(
                f"{source} cannot be loaded from the hub ({type(error).__name__}: {error}); give --data FILE"
            ) from None
    original = args.task == "mbpp" and len(records) == 974
    if args.task == "mbpp" and (args.split == "test" or args.split == "auto" and original):
        records = [
            (place, record)
            for place, record in records
            if str(record.get("task_id")).isdigit() and 11 <= int(record["task_id"]) <= 510
        ]
    problems, places = [], {}
    for index, (place, record) in enumerate(records):
        problem = BUILDERS[args.task](record, place, index)
        if problem.task_id in places:
            raise InputError(
                f"{place}: duplicate task id {problem.task_id} (first at {places[problem.task_id]})"
            )
        places[problem.task_id] = place
        if args.task in CODE_TASKS and not re.search(r"\bassert|\braise\b|fail", problem.tests):
            raise InputError(f"{place}: zero tests for {problem.task_id}: nothing in them can fail")
        problems.append(problem)
    if not problems:
        raise InputError(f"{source}: no problems")
    return problems[: args.limit or None]


# ---------------------------------------------------------------- completions


def read_samples(path, problems, num_samples, allow_missing):
    """{task id: [completion, ...]} with `num_samples` each. Raises InputError naming file and line."""
    known = {problem.task_id: problem.task_id for problem in problems}
    for problem in problems:  # "Mbpp/11", "gsm8k/3" for 11 and 3
        known.setdefault(problem.task_id.rpartition("/")[2], problem.task_id)
    found, places = {problem.task_id: [] for problem in problems}, {}
    for place, record in read_records(path):
        if record.get("task_id") is None:
            raise InputError(f"{place}: field `task_id` is missing")
        given = str(record["task_id"])
        task_id = known.get(given, known.get(given.rpartition("/")[2]) if "/" in given else None)
        if task_id is None:
            raise InputError(
                f"{place}: unknown task id {given!r}; the data has ids such as {problems[0].task_id!r}"
            )
        if not isinstance(record.get("completion"), str):
            raise InputError(f"{place}: missing completion: field `completion` of {given!r} must be a string")
        if len(found[task_id]) == num_samples:
            raise InputError(
                f"{place}: duplicate task id {given!r} (first at {places[task_id]}); "
                "with n completions per problem say --num_samples n"
            )
        places.setdefault(task_id, place)
        found[task_id].append(record["completion"])
    missing = [task_id for task_id, completions in found.items() if len(completions) < num_samples]
    if missing and not allow_missing:
        some = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise InputError(
            f"{path}: missing completion for {len(missing)} of {len(problems)} problems: {some}; "
            "add them, or count them as failed with --allow_missing"
        )
    return found


def generate(args, problems, kept, keep):
    """Fills `kept` ({(task id, sample): completion}) with what is missing, batch by batch, calling keep(task
    id, sample, completion) for each. Prompts, padding, positions and sampling are those of pfppo_single.py; a
    completion ends at any stop token that the model's folder or its tokenizer names."""
    import torch
    from transformers import GenerationConfig

    import pfppo_single as pfppo

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        tokenizer = pfppo.load_pretrained("AutoTokenizer", args.model, "model")
        config = pfppo.load_config(args.model, "model")
        if args.prompt_style == "chat" and not tokenizer.chat_template:
            raise InputError(f"--model {args.model}: no chat template there; use --prompt_style completion")
        prompts = [prompt_of(problem, args.prompt_style) for problem in problems]
        queries = [pfppo.encode_prompt(tokenizer, prompt) for prompt in prompts]
        pfppo.check_rows(config, queries, "model", args.max_new_tokens)
        model = pfppo.load_causal_lm(args.model, getattr(torch, args.dtype)).to(device).eval()
    except SystemExit as error:
        raise InputError(
            f"{error}; or lower --max_new_tokens" if "positions" in str(error) else str(error)
        ) from None
    try:
        named = GenerationConfig.from_pretrained(args.model).eos_token_id
    except OSError:
        named = config.eos_token_id
    stops = [tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])]
    stops = [stop for stop in stops if stop is not None] or [-1]
    wanted = [(i, sample) for i in range(len(problems)) for sample in range(args.num_samples)]
    for start in range(0, len(wanted), args.batch_size):
        # a batch is always the same problems, so a continued run generates the same
        batch = wanted[start : start + args.batch_size]
        if all((problems[i].task_id, sample) in kept for i, sample in batch):
            continue
        ids, mask = pfppo.pad_left([queries[i] for i, _ in batch], device)
        generator = pfppo.random_generator(device, args.seed, start)
        length, temperature = args.max_new_tokens, args.temperature
        responses = pfppo.generate(model, ids, mask, 1, length, temperature, stops[-1], generator=generator)
        for (i, sample), response in zip(batch, responses.tolist()):
            end = min((response.index(stop) for stop in stops if stop in response), default=length)
            text = tokenizer.decode(
                response[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            keep(problems[i].task_id, sample, text)
        if args.progress:
            done = f"\rgenerating {min(start + args.batch_size, len(wanted))}/{len(wanted)}"
            print(done, end="", file=sys.stderr, flush=True)
    if args.progress:
        print(file=sys.stderr)


def prompt_of(problem, style):
    """What the model is asked: an instruction in its chat template, or the bare prompt (a trailing space
    would be a token that continuations seldom follow)."""
    if style == "chat":
        return [{"role": "user", "content": problem.instruction}]
    return problem.prompt.rstrip(" ") if problem.prompt.rstrip(" ").endswith("\n") else problem.prompt


# ---------------------------------------------------------------- grading


def item_of(problem, completion, args):
    """The arguments of `benchmark.grading.grade` for one completion."""
    limits = {
        "wall_seconds": args.wall_seconds,
        "cpu_seconds": args.cpu_seconds,
        "memory_bytes": args.memory_bytes,
    }
    return programs.grading_item(problem.prompt, completion, problem.tests, problem.entry_point) | limits


def pass_at_k(n, c, k):
    """Probability that at least one of k completions passes, estimated without bias from c passes among n (k
    <= n)."""
    if n - c < k:
        return 1.0
    return 1.0 - math.prod((n - c - i) / (n - i) for i in range(k))


def standard_error(rates, num_samples):
    """Of the mean over problems: binomial with one sample per problem, from the spread over problems
    otherwise."""
    mean = sum(rates) / len(rates)
    if num_samples == 1 or len(rates) == 1:
        return math.sqrt(mean * (1 - mean) / len(rates))
    return math.sqrt(sum((rate - mean) ** 2 for rate in rates) / (len(rates) - 1) / len(rates))


class Store:
    """Verdicts of a run, appended as they come (one line per problem, once all its completions are graded),
    and its settings."""

    def __init__(self, args, problems):
        self.folder = Path(args.output_dir)
        self.path = self.folder / "verdicts.jsonl"
        ignored = ("output_dir", "workers", "progress", "device")
        digest = {
            name: file_digest(getattr(args, name)) for name in ("data", "samples") if getattr(args, name)
        }
        versions = {
            "extract_code": programs.EXTRACT_CODE_VERSION,
            "extract_answer": answers.EXTRACT_ANSWER_VERSION,
        }
        self.settings = {
            **{k: v for k, v in asdict(args).items() if k not in ignored},
            "digest": digest,
            "versions": versions,
        }
        settings_path = self.folder / "settings.json"
        if settings_path.is_file():
            found = json.loads(settings_path.read_text())
            if found != self.settings:
                changed = sorted(
                    name for name in {*found, *self.settings} if found.get(name) != self.settings.get(name)
                )
                raise InputError(
                    f"{self.folder} holds another run (differing: {', '.join(changed)}); "
                    "give another --output_dir or remove it"
                )
        elif self.folder.is_dir() and any(self.folder.iterdir()):
            raise InputError(
                f"{self.folder} is not empty and holds no run of this script; give another --output_dir or "
                "remove it"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(settings_path, json.dumps(self.settings, indent=1))
        known = {problem.task_id for problem in problems}
        found = finished_rows(self.path)
        self.verdicts = {verdict["task_id"]: verdict for verdict in found if verdict["task_id"] in known}
        self.file = open(self.path, "a", encoding="utf-8")

    def add(self, problem, results):
        passes = [result["passed"] for result in results]
        verdict = {
            "task_id": problem.task_id,
            "passed": passes[0],
            "detail": results[0]["detail"],
            **problem.tags,
        }
        if len(results) > 1:
            verdict.update(num_passed=sum(passes), num_samples=len(passes), results=results)
        packages = [result["missing_package"] for result in results if "missing_package" in result]
        if packages:
            verdict["missing_packages"] = packages
        self.verdicts[problem.task_id] = verdict
        self.file.write(json.dumps(verdict, ensure_ascii=False) + "\n")
        self.file.flush()

    def finish(self, problems, summary):
        self.file.close()
        lines = [json.dumps(self.verdicts[problem.task_id], ensure_ascii=False) for problem in problems]
        write_text(self.path, "\n".join(lines) + "\n")
        write_text(self.folder / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False))


def file_digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16] if Path(path).is_file() else ""


def grade_all(args, problems, completions, store):
    """Grades what has no verdict yet. completions: {task id: [text, ...]}; an absent one fails."""
    results = {problem.task_id: [None] * args.num_samples for problem in problems}
    todo = []
    for problem in problems:
        if problem.task_id in store.verdicts:
            continue
        for sample in range(args.num_samples):
            texts = completions[problem.task_id]
            if sample >= len(texts):
                results[problem.task_id][sample] = {"passed": False, "detail": "no completion"}
            elif args.task in MATH_TASKS:
                results[problem.task_id][sample] = answers.verdict(texts[sample], problem.gold)
            else:
                todo.append((problem, sample, item_of(problem, texts[sample], args)))

    def take(problem):
        if all(result is not None for result in results[problem.task_id]):
            store.add(problem, results[problem.task_id])

    for problem in problems:
        if problem.task_id not in store.verdicts:
            take(problem)
    for problem, _, item in todo:
        try:
            as_job(**item)
        except GradingError as error:
            raise InputError(f"{problem.task_id}: {error}") from None

    def on_result(index, verdict):
        problem, sample, _ = todo[index]
        results[problem.task_id][sample] = verdict
        take(problem)

    current = None
    try:
        grade_many(
            [item for _, _, item in todo],
            workers=args.workers or None,
            progress=args.progress,
            on_result=on_result,
        )
    except GradingError as error:
        current = error
    if current is not None:
        done = len(store.verdicts)
        raise GradingError(
            f"{current} ({done} of {len(problems)} problems are graded and kept in {store.path}; "
            "the same command continues)"
        )


def weak_tests(args, problems):
    """Ids of the problems whose tests pass a broken form of the reference solution (PITFALLS EX-7)."""
    found = set()
    for source in (BROKEN, CONSTANT):
        items = [item_of(problem, problem.reference, args) for problem in problems]
        for item, problem in zip(items, problems):
            name = problem.entry_point if problem.entry_point.isidentifier() else "_broken_entry_point"
            item["program"] += f"{source}{name} = _broken({problem.entry_point})\n"
            item["entry_point"] = name
        verdicts = grade_many(items, workers=args.workers or None, progress=args.progress)
        found |= {problem.task_id for problem, verdict in zip(problems, verdicts) if verdict["passed"]}
    return [problem.task_id for problem in problems if problem.task_id in found]


# ---------------------------------------------------------------- best of n


def reward_scores(folder, prompts, responses, batch_size=32, device=""):
    """R_φ of every response as floats: the same inputs as in training (pad_batch, score at the last
    token)."""
    from benchmark.rewards import orm

    return orm(prompts, responses, None, source=folder, batch_size=batch_size, device=device)


def best_of(problems, store, completions, scores):
    """(best-of-1, best-of-n): pass rate of the first response, and of the one of highest reward, per
    problem."""
    first, best = [], []
    for problem in problems:
        passes = [
            result["passed"]
            for result in store.verdicts[problem.task_id].get("results", [store.verdicts[problem.task_id]])
        ]
        mine = scores[problem.task_id]
        first.append(passes[0])
        best.append(passes[max(range(len(mine)), key=mine.__getitem__)])
    return sum(first) / len(first), sum(best) / len(best)


# ---------------------------------------------------------------- the run


def check(args):
    if bool(args.samples) + bool(args.model) + args.reference != 1:
        raise InputError("give exactly one of --samples FILE.jsonl, --model DIR_OR_HUB_ID and --reference")
    if args.reference and args.num_samples != 1:
        raise InputError("--reference grades one solution per problem: leave --num_samples at 1")
    if args.num_samples < 1:
        raise InputError(f"--num_samples {args.num_samples}: must be at least 1")
    if args.model and args.num_samples > 1 and args.temperature == 0:
        raise InputError(
            "--num_samples above 1 needs --temperature above 0: greedy completions are all the same"
        )
    if args.reward_model and not Path(args.reward_model).exists() and Path(args.reward_model).is_absolute():
        raise InputError(f"--reward_model {args.reward_model}: no such folder")
    if args.model and Path(args.model).is_dir() and not (Path(args.model) / "config.json").is_file():
        raise InputError(
            f"--model {args.model}: no config.json there; give a folder that save_pretrained wrote, or a hub "
            "id"
        )


def main(args):
    """Runs the evaluation and returns the summary that it writes. Raises InputError or GradingError."""
    start = time.time()
    check(args)
    # 1. problems
    problems = load_problems(args)
    # 2. completions
    completions = (
        read_samples(args.samples, problems, args.num_samples, args.allow_missing) if args.samples else None
    )
    if args.reference:
        without = [problem.task_id for problem in problems if not problem.reference]
        if without or args.task in MATH_TASKS:
            raise InputError(
                f"--reference: {args.data or args.task} has no reference solution for "
                f"{without[:3] or 'its problems'}"
            )
        completions = {problem.task_id: [problem.reference] for problem in problems}
    store = Store(args, problems)
    if completions is None:
        path = store.folder / "samples.jsonl"
        kept = {(line["task_id"], line["sample"]): line["completion"] for line in finished_rows(path)}
        with open(path, "a", encoding="utf-8") as file:

            def keep(task_id, sample, completion):
                if (task_id, sample) not in kept:
                    kept[task_id, sample] = completion
                    file.write(
                        json.dumps(
                            {"task_id": task_id, "sample": sample, "completion": completion},
                            ensure_ascii=False,
                        )
                        + "\n"
                    )
                    file.flush()

            generate(args, problems, kept, keep)
        completions = {
            problem.task_id: [kept[problem.task_id, sample] for sample in range(args.num_samples)]
            for problem in problems
        }
    # 3. verdicts
    grade_all(args, problems, completions, store)
    counts = [
        (len(v["results"]), v["num_passed"]) if "results" in v else (1, int(v["passed"]))
        for v in (store.verdicts[p.task_id] for p in problems)
    ]
    rates = [c / n for n, c in counts]
    ks = [k for k in (1, 5, 10, 100) if k <= args.num_samples]
    summary = {
        "task": args.task,
        "passed": sum(
            c > 0 if n == 1 else store.verdicts[p.task_id]["passed"] for p, (n, c) in zip(problems, counts)
        ),
        "total": len(problems),
        "pass1": sum(rates) / len(rates),
        "pass1_se": standard_error(rates, args.num_samples),
        "pass_at_k": {str(k): sum(pass_at_k(n, c, k) for n, c in counts) / len(counts) for k in ks},
    }
    if args.task == "leetcode":
        groups = {}
        for problem, rate in zip(problems, rates):
            groups.setdefault(problem.tags["difficulty"], []).append(rate)
        summary["by_difficulty"] = {
            name: {"pass1": sum(some) / len(some), "total": len(some)}
            for name, some in sorted(groups.items())
        }
    missing = Counter(
        name for problem in problems for name in store.verdicts[problem.task_id].get("missing_packages", [])
    )
    if missing:
        summary["missing_packages"] = dict(missing.most_common())
    if args.reference:
        summary["weak_tests"] = weak_tests(args, problems)
    # 4. best of n
    if args.reward_model:
        pairs = [(problem, text) for problem in problems for text in completions[problem.task_id]]
        flat = iter(
            reward_scores(
                args.reward_model,
                [prompt_of(problem, args.prompt_style) for problem, _ in pairs],
                [text for _, text in pairs],
                args.batch_size,
                args.device,
            )
        )
        scores = {
            problem.task_id: [next(flat) for _ in completions[problem.task_id]] or [0.0]
            for problem in problems
        }
        summary["best_of"] = dict(
            zip(("1", str(args.num_samples)), best_of(problems, store, completions, scores))
        )
    # 5. report
    summary.update(
        seconds=round(time.time() - start, 1), num_samples=args.num_samples, settings=store.settings
    )
    store.finish(problems, summary)
    print(table(summary))
    return summary


def table(summary):
    rows = [
        (
            f"pass@1 ({summary['passed']}/{summary['total']})",
            f"{100 * summary['pass1']:.1f} ± {100 * summary['pass1_se']:.1f}",
        )
    ]
    rows += [(f"pass@{k}", f"{100 * value:.1f}") for k, value in summary["pass_at_k"].items() if k != "1"]
    rows += [
        (f"pass@1 {name or 'unnamed'} ({group['total']})", f"{100 * group['pass1']:.1f}")
        for name, group in summary.get("by_difficulty", {}).items()
    ]
    rows += (
        [("tests too weak", ", ".join(summary["weak_tests"]) or "none")] if "weak_tests" in summary else []
    )
    rows += [
        (f"best of {n} by reward", f"{100 * value:.1f}") for n, value in summary.get("best_of", {}).items()
    ]
    rows += [
        (f"responses that failed without {name}", str(count))
        for name, count in summary.get("missing_packages", {}).items()
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(
        [f"{summary['task']}, percent", *(f"  {name:<{width}}  {value:>12}" for name, value in rows)]
    )


def cli():
    try:
        main(tyro.cli(Args, description=__doc__))
    except (InputError, GradingError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    cli()
