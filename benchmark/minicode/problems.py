"""The embedded world: small Python problems on a list of integers, made from a seed, graded by running the code.

A problem chains one to three of 44 operations (37 list -> list; 7 list -> scalar, which come last). The prompt is a
comment with the instruction and a signature, the response one line per operation:

    # keep above 3; reverse the order
    def f(x):
        x = [v for v in x if v > 3]
        return x[::-1]

Every operation has two or three phrasings, two or three equivalent correct implementations and one to three plausible
mistakes. The demonstrations hold systematic mistakes as real corpora do: some operations are mostly shown wrong.
Compositions are split by a hash of the operations' names, the same in every world, so no composition that
demonstrates, ranks or trains is ever tested. Every choice is made on `valid`; `test` is looked at once per result.
With the world's tokenizer a prompt has about 23 tokens (at most 50), a response with its end 21 (1 in 2000 over 48).

    python -m benchmark.minicode write --output_dir DIR --seed 1      # every field of World is a flag

leaves `sft sft_valid preference rl valid test` as .jsonl, `tokenizer/`, `model_config/` and `world.json` in DIR. Rows:
    task_id, prompt, entry_point ("f"), tests (8 assert lines; repr compares types too: True is not 1)
    inputs, outputs         the same tests as data: f(inputs[i]) must give outputs[i]
    operations              names of the composed operations
    canonical_solution      a correct response
    response, mistakes      sft and sft_valid only: the demonstration, and how many of its lines are wrong

From Python:
    write_world(output_dir, seed=1, **fields of World)      deterministic, written aside and renamed
    make_rows(World(seed=1), "valid") -> rows               one split, nothing written
    grade_fast(prompts, responses, rows) -> list[bool]      executes prompt + response in a separate process
    oracle(prompts, responses, rows) -> list[float]         the same as a reward: `benchmark.minicode:oracle`
    build_pairs(rows, responses, passed) -> (pairs, number of prompts dropped)
"""

import ast
import builtins
import hashlib
import inspect
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple


class Operation(NamedTuple):
    """One step of a problem. Implementations are expressions in `x` that change nothing; `{k}` is the constant."""

    name: str
    constants: tuple
    phrasings: tuple
    correct: tuple
    wrong: tuple


ANY, SMALL, FACTOR, NONE = (0, 1, 2, 3, 4, 5, 6), (1, 2, 3), (2, 3, 4, 5), (0,)
LIST_OPERATIONS = [Operation(*fields) for fields in (
    ("above", ANY, ("keep above {k}", "keep over {k}", "drop up to {k}"),
     ("[v for v in x if v > {k}]", "list(filter(lambda v: v > {k}, x))", "[v for v in x if not v <= {k}]"),
     ("[v for v in x if v >= {k}]", "[v for v in x if v < {k}]")),
    ("below", ANY, ("keep below {k}", "keep under {k}", "drop from {k} up"),
     ("[v for v in x if v < {k}]", "list(filter(lambda v: v < {k}, x))", "[v for v in x if not v >= {k}]"),
     ("[v for v in x if v <= {k}]", "[v for v in x if v > {k}]")),
    ("at_least", ANY, ("keep at least {k}", "drop below {k}"),
     ("[v for v in x if v >= {k}]", "list(filter(lambda v: v >= {k}, x))"),
     ("[v for v in x if v > {k}]", "[v for v in x if v <= {k}]")),
    ("at_most", ANY, ("keep at most {k}", "drop above {k}"),
     ("[v for v in x if v <= {k}]", "list(filter(lambda v: v <= {k}, x))"),
     ("[v for v in x if v < {k}]", "[v for v in x if v >= {k}]")),
    ("remove", ANY, ("remove {k}", "drop every {k}"),
     ("[v for v in x if v != {k}]", "list(filter(lambda v: v != {k}, x))"),
     ("[v for v in x if v == {k}]", "[v for i, v in enumerate(x) if i != {k}]", "[v for v in x if v > {k}]")),
    ("even", NONE, ("keep even", "drop odd"),
     ("[v for v in x if v % 2 == 0]", "[v for v in x if not v % 2]"), ("[v for v in x if v % 2]", "x[::2]")),
    ("odd", NONE, ("keep odd", "drop even"),
     ("[v for v in x if v % 2 == 1]", "[v for v in x if v % 2]"), ("[v for v in x if v % 2 == 0]", "x[1::2]")),
    ("multiples", (3, 4, 5), ("keep multiples of {k}", "keep divisible by {k}"),
     ("[v for v in x if v % {k} == 0]", "[v for v in x if not v % {k}]"),
     ("[v for v in x if v % {k}]", "[v for v in x if v // {k} == 0]")),
    ("positive", NONE, ("keep positive", "drop zero and below"),
     ("[v for v in x if v > 0]", "list(filter(lambda v: v > 0, x))"),
     ("[v for v in x if v >= 0]", "[abs(v) for v in x]")),
    ("negative", NONE, ("keep negative", "drop zero and above"),
     ("[v for v in x if v < 0]", "list(filter(lambda v: v < 0, x))"),
     ("[v for v in x if v <= 0]", "[-v for v in x]")),
    ("add", (1, 2, 3, 4, 5), ("add {k} to each", "increase each by {k}", "each plus {k}"),
     ("[v + {k} for v in x]", "[{k} + v for v in x]", "list(map(lambda v: v + {k}, x))"),
     ("[v - {k} for v in x]", "[v * {k} for v in x]")),
    ("subtract", (1, 2, 3, 4, 5), ("subtract {k} from each", "decrease each by {k}", "each minus {k}"),
     ("[v - {k} for v in x]", "list(map(lambda v: v - {k}, x))"), ("[{k} - v for v in x]", "[v + {k} for v in x]")),
    ("multiply", FACTOR, ("multiply each by {k}", "each times {k}"),
     ("[v * {k} for v in x]", "[{k} * v for v in x]", "list(map(lambda v: v * {k}, x))"),
     ("x * {k}", "[v + {k} for v in x]", "[v ** {k} for v in x]")),
    ("square", NONE, ("square each", "each times itself"),
     ("[v * v for v in x]", "[v ** 2 for v in x]"), ("[v * 2 for v in x]", "[v + v for v in x]")),
    ("negate", NONE, ("negate each", "flip each sign"),
     ("[-v for v in x]", "[0 - v for v in x]"), ("[abs(v) for v in x]", "x[::-1]")),
    ("absolute", NONE, ("absolute of each", "drop each sign"),
     ("[abs(v) for v in x]", "[max(v, -v) for v in x]"), ("[-v for v in x]", "[max(v, 0) for v in x]")),
    ("floor", ANY, ("raise each to at least {k}", "replace below {k} by {k}"),
     ("[max(v, {k}) for v in x]", "[v if v > {k} else {k} for v in x]"),
     ("[min(v, {k}) for v in x]", "[v for v in x if v >= {k}]")),
    ("cap", ANY, ("cap each at {k}", "replace above {k} by {k}"),
     ("[min(v, {k}) for v in x]", "[v if v < {k} else {k} for v in x]"),
     ("[max(v, {k}) for v in x]", "[v for v in x if v <= {k}]")),
    ("modulo", FACTOR, ("each modulo {k}", "remainder of each by {k}"),
     ("[v % {k} for v in x]", "list(map(lambda v: v % {k}, x))"),
     ("[v // {k} for v in x]", "[v for v in x if v % {k}]")),
    ("divide", FACTOR, ("floor divide each by {k}", "divide each by {k} rounding down"),
     ("[v // {k} for v in x]", "list(map(lambda v: v // {k}, x))"), ("[v / {k} for v in x]", "[v % {k} for v in x]")),
    ("ascending", NONE, ("sort ascending", "sort up"),
     ("sorted(x)", "sorted(x[:])"), ("sorted(x, reverse=True)", "sorted(set(x))")),
    ("descending", NONE, ("sort descending", "sort down"),
     ("sorted(x, reverse=True)", "sorted(x)[::-1]"), ("sorted(x)", "x[::-1]")),
    ("reverse", NONE, ("reverse the order", "turn around"),
     ("x[::-1]", "list(reversed(x))"), ("sorted(x, reverse=True)", "x[:-1]")),
    ("by_size", NONE, ("sort by absolute", "sort by distance from zero"),
     ("sorted(x, key=abs)", "sorted(x, key=lambda v: abs(v))"), ("sorted(x)", "sorted(abs(v) for v in x)")),
    ("first", SMALL, ("keep first {k}", "take {k} at the front"),
     ("x[:{k}]", "[v for i, v in enumerate(x) if i < {k}]"), ("x[{k}:]", "x[:{k} + 1]", "x[-{k}:]")),
    ("last", SMALL, ("keep last {k}", "take {k} at the back"),
     ("x[-{k}:]", "[*x[-{k}:]]"), ("x[:{k}]", "x[{k}:]", "x[-{k} - 1:]")),
    ("skip_first", SMALL, ("drop first {k}", "skip {k} at the front"),
     ("x[{k}:]", "[v for i, v in enumerate(x) if i >= {k}]"), ("x[:{k}]", "x[{k} + 1:]", "x[:-{k}]")),
    ("skip_last", SMALL, ("drop last {k}", "skip {k} at the back"),
     ("x[:-{k}]", "[*x[:-{k}]]"), ("x[{k}:]", "x[-{k}:]")),
    ("even_places", NONE, ("keep even places", "every second from the first"),
     ("x[::2]", "[v for i, v in enumerate(x) if i % 2 == 0]"), ("x[1::2]", "[v for v in x if v % 2 == 0]")),
    ("odd_places", NONE, ("keep odd places", "every second from the second"),
     ("x[1::2]", "[v for i, v in enumerate(x) if i % 2]"), ("x[::2]", "[v for v in x if v % 2]")),
    ("unique", NONE, ("drop repeats", "keep first of equals"),
     ("list(dict.fromkeys(x))", "[v for i, v in enumerate(x) if v not in x[:i]]"),
     ("sorted(set(x))", "[v for v in x if x.count(v) == 1]")),
    ("running", NONE, ("running sums", "sums so far"),
     ("[sum(x[:i + 1]) for i in range(len(x))]", "[sum(x[:i]) for i in range(1, len(x) + 1)]"),
     ("[sum(x[:i]) for i in range(len(x))]", "[sum(x[i:]) for i in range(len(x))]")),
    ("differences", NONE, ("differences of neighbours", "each minus the one before"),
     ("[b - a for a, b in zip(x, x[1:])]", "[b - a for a, b in zip(x[:-1], x[1:])]"),
     ("[a - b for a, b in zip(x, x[1:])]", "[b + a for a, b in zip(x, x[1:])]")),
    ("pair_sums", NONE, ("sums of neighbours", "each plus the one before"),
     ("[a + b for a, b in zip(x, x[1:])]", "[b + a for a, b in zip(x, x[1:])]"),
     ("[b - a for a, b in zip(x, x[1:])]", "[a + b for a, b in zip(x, x)]")),
    ("append", ANY, ("append {k}", "put {k} at the back"),
     ("x + [{k}]", "[*x, {k}]"), ("[{k}] + x", "[v + {k} for v in x]")),
    ("prepend", ANY, ("prepend {k}", "put {k} at the front"),
     ("[{k}] + x", "[{k}, *x]"), ("x + [{k}]", "[{k}] + x[1:]")),
    ("rotate", NONE, ("rotate left", "put the first at the back"),
     ("x[1:] + x[:1]", "[*x[1:], *x[:1]]"), ("x[-1:] + x[:-1]", "x[1:]")),
)]
SCALAR_OPERATIONS = [Operation(*fields) for fields in (
    ("sum", NONE, ("return the sum", "return the total"),
     ("sum(x)", "sum(v for v in x)"), ("len(x)", "sum(x[1:])")),
    ("largest", NONE, ("return the largest or 0", "return the maximum or 0"),
     ("max(x, default=0)", "max(x) if x else 0", "sorted(x)[-1] if x else 0"),
     ("min(x, default=0)", "x[-1] if x else 0")),
    ("smallest", NONE, ("return the smallest or 0", "return the minimum or 0"),
     ("min(x, default=0)", "min(x) if x else 0", "sorted(x)[0] if x else 0"),
     ("max(x, default=0)", "x[0] if x else 0")),
    ("length", NONE, ("return the length", "count all"),
     ("len(x)", "sum(1 for v in x)"), ("len(x) - 1", "sum(x)")),
    ("count_above", ANY, ("count above {k}", "count over {k}"),
     ("sum(v > {k} for v in x)", "len([v for v in x if v > {k}])"),
     ("sum(v >= {k} for v in x)", "sum(v for v in x if v > {k})")),
    ("any_above", ANY, ("return if any is above {k}", "return if any is over {k}"),
     ("any(v > {k} for v in x)", "max(x, default={k}) > {k}"), ("all(v > {k} for v in x)", "sum(v > {k} for v in x)")),
    ("distinct", NONE, ("count distinct", "count without repeats"),
     ("len(set(x))", "len(dict.fromkeys(x))"), ("len(x)", "len(x) - len(set(x))")),
)]
OPERATIONS = {operation.name: operation for operation in LIST_OPERATIONS + SCALAR_OPERATIONS}
SHARES = {"sft": 0.40, "preference": 0.20, "rl": 0.20, "valid": 0.08, "test": 0.12}


@dataclass(frozen=True)
class World:
    """Everything that fixes a world."""

    seed: int = 1
    """redraws the planted mistakes and every row; the split of the compositions is the same for all seeds"""
    num_sft: int = 6000
    """demonstrations for supervised fine-tuning"""
    num_sft_valid: int = 300
    """held-out demonstrations (prompts not among the demonstrations, same compositions and mistakes)"""
    num_preference: int = 4000
    """prompts for preference data"""
    num_rl: int = 4000
    """prompts for reinforcement learning"""
    num_valid: int = 300
    """problems on which every choice is made"""
    num_test: int = 600
    """problems looked at once per result"""
    min_operations: int = 2
    """fewest operations per problem, at least 2 (demonstrations also show single operations)"""
    max_operations: int = 3
    """most operations per problem, in every split: the difficulty"""
    num_tests: int = 8
    """hidden tests per problem: one short list, the rest of 5 to 10 values"""
    faulty_share: float = 0.4
    """share of the operations that are systematically demonstrated wrong"""
    faulty_rate: float = 0.5
    """probability that a line of a faulty operation is wrong in a demonstration"""
    background_rate: float = 0.1
    """the same for every other operation"""
    vocab_size: int = 256
    """entries of the tokenizer"""

    def __post_init__(self):
        if not 2 <= self.min_operations <= self.max_operations:
            raise ValueError(
                f"need 2 <= min_operations <= max_operations, got {self.min_operations} and {self.max_operations}"
            )
        if self.num_tests < 2:
            raise ValueError(f"num_tests must be at least 2, got {self.num_tests}")
        for name in ("faulty_share", "faulty_rate", "background_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a probability, got {getattr(self, name)}")
        for name in ("num_sft", "num_sft_valid", "num_preference", "num_rl", "num_valid", "num_test"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


# ---------------------------------------------------------------------------------------------------- making problems


def split_of(names):
    """The one split in which the composition `names` may appear; single operations are only demonstrated."""
    if len(names) == 1:
        return "sft"
    point = int(hashlib.sha256("|".join(names).encode()).hexdigest()[:12], 16) / 16**12
    for split, share in SHARES.items():
        point -= share
        if point < 0:
            return split
    return "test"  # the shares add up to 1 only within rounding


def faulty_operations(world):
    """Names of the operations that the demonstrations of this world mostly get wrong, sorted."""
    rng = random.Random(f"{world.seed}/faults")
    return sorted(rng.sample(list(OPERATIONS), round(world.faulty_share * len(OPERATIONS))))


@lru_cache(maxsize=None)
def _function(expression):
    return eval("lambda x: " + expression)  # our own table, never a model's text


def _body(expressions):
    """Response text of a chain of expressions: one line per operation."""
    return "".join(f"    x = {expression}\n" for expression in expressions[:-1]) + f"    return {expressions[-1]}"


def _draw_inputs(rng, world, constants):
    """Lists of integers in -9..12: one of length 0-3, the rest 5-10; half of them get a threshold of the problem."""
    lengths = [rng.randint(0, 3)] + [rng.randint(5, 10) for _ in range(world.num_tests - 1)]
    inputs = [rng.choices(range(-9, 13), k=length) for length in lengths]
    for values in inputs:
        if values and rng.random() < 0.5:
            values[rng.randrange(len(values))] = rng.choice(constants)
    return inputs


def _every_mistake_shows(operations, constants, stages):
    """True when each mistake, alone in an otherwise correct program, changes the repr of the outcome of some test.

    `stages[i]` are the values of all tests before operation i, `stages[-1]` the outputs.
    """
    expected = [repr(output) for output in stages[-1]]
    for i, (operation, k) in enumerate(zip(operations, constants)):
        rest = [_function(op.correct[0].format(k=c)) for op, c in zip(operations[i + 1 :], constants[i + 1 :])]
        for wrong in operation.wrong:
            mistake = _function(wrong.format(k=k))
            for values, output in zip(stages[i], expected):
                values = mistake(values)
                for function in rest:
                    values = function(values)
                if repr(values) != output:
                    break
            else:
                return False
    return True


def _draw_problem(rng, world, split):
    """Operations, constants, inputs and outputs of one problem in whose tests every planted mistake shows."""
    while True:
        shortest = 1 if split == "sft" else world.min_operations
        lengths = range(shortest, world.max_operations + 1)  # demonstrations: more of the longer, harder ones
        length = rng.choices(lengths, weights=lengths if split == "sft" else None)[0]
        last = rng.choice(LIST_OPERATIONS + SCALAR_OPERATIONS)
        operations = rng.sample([op for op in LIST_OPERATIONS if op is not last], length - 1) + [last]
        if split_of([op.name for op in operations]) != split:
            continue
        for _ in range(3):  # a mistake may stay hidden for these constants or lists; some compositions hide it always
            constants = [rng.choice(op.constants) for op in operations]
            stages = [_draw_inputs(rng, world, constants)]
            for operation, k in zip(operations, constants):
                stages.append([_function(operation.correct[0].format(k=k))(values) for values in stages[-1]])
            if _every_mistake_shows(operations, constants, stages):
                return operations, constants, stages[0], stages[-1]


def make_rows(world, split, demonstrations=None):
    """All rows of one split (sft, sft_valid, preference, rl, valid, test), a list of dicts as in the module docstring.

    Prompts are distinct, except among the demonstrations, where one prompt may be answered in several ways. The rows of
    sft_valid avoid the prompts of the demonstrations, which are made once more unless they are given.
    """
    demonstrated = split in ("sft", "sft_valid")
    rng = random.Random(f"{world.seed}/{split}")
    faulty = set(faulty_operations(world))
    if split == "sft_valid" and demonstrations is None:
        demonstrations = make_rows(world, "sft")
    seen = {row["prompt"] for row in demonstrations} if split == "sft_valid" else set()
    rows, attempts, size = [], 0, getattr(world, f"num_{split}")
    while len(rows) < size:
        attempts += 1
        if attempts > 1000 + 100 * size:
            raise ValueError(f"num_{split}={size}: no more than {len(rows)} distinct prompts found; ask for fewer")
        operations, constants, inputs, outputs = _draw_problem(rng, world, "sft" if demonstrated else split)
        phrases = [rng.choice(op.phrasings).format(k=k) for op, k in zip(operations, constants)]
        # The semicolon announces the last operation: two layers then find the phrase that belongs to each line.
        instruction = "; ".join(part for part in (", ".join(phrases[:-1]), phrases[-1]) if part)
        prompt = f"# {instruction}\ndef f(x):\n"
        if prompt in seen:
            continue
        if split != "sft":
            seen.add(prompt)
        row = {
            "task_id": f"minicode/{split}/{len(rows)}",
            "prompt": prompt,
            "entry_point": "f",
            "tests": "\n".join(f"assert repr(f({x!r})) == {repr(y)!r}" for x, y in zip(inputs, outputs)),
            "inputs": inputs,
            "outputs": outputs,
            "operations": [op.name for op in operations],
            "canonical_solution": _body([rng.choice(op.correct).format(k=k) for op, k in zip(operations, constants)]),
        }
        if demonstrated:
            rates = [world.faulty_rate if op.name in faulty else world.background_rate for op in operations]
            slips = [rng.random() < rate for rate in rates]
            drawn = [rng.choice(op.wrong if slip else op.correct) for op, slip in zip(operations, slips)]
            row["response"] = _body([text.format(k=k) for text, k in zip(drawn, constants)])
            row["mistakes"] = sum(slips)
        rows.append(row)
    return rows


# ------------------------------------------------------------------------------------------------------------ writing


def make_tokenizer(texts, vocab_size):
    """A BPE tokenizer trained on `texts` that splits only at newline, `;`, `,` and single digits; no BOS.

    Its alphabet is that of the whole operation table, so that no prompt of any world holds an unknown character.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    table = [text for op in OPERATIONS.values() for text in op.phrasings + op.correct + op.wrong]
    alphabet = sorted(set("".join(table) + "# \ndef f(x):\n    x = return;,0123456789") - set("{}"))
    specials = ["<pad>", "<eos>", "<unk>"]
    smallest = len(alphabet) + len(specials)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size must be at least {smallest} (one per character), got {vocab_size}")
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\n;,0-9]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        clean_up_tokenization_spaces=False, model_max_length=256,
    )


def write_world(output_dir, seed=1, **settings):
    """Write the world `World(seed, **settings)` into the folder `output_dir` and return its path.

    The folder appears complete or not at all: files are written to `output_dir`.partial, which is then renamed. A
    folder that already holds this very world is left as it is; one that holds anything else raises FileExistsError.
    """
    world = World(seed=seed, **settings)
    output_dir = Path(output_dir).absolute()
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        record = output_dir / "world.json"
        if record.is_file() and json.loads(record.read_text())["settings"] == asdict(world):
            return output_dir
        raise FileExistsError(f"{output_dir} holds something else: choose another output_dir or remove it")
    partial = output_dir.with_name(output_dir.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    partial.mkdir(parents=True)
    try:
        sizes, demonstrations = {}, make_rows(world, "sft")
        for split in ("sft", "sft_valid", "preference", "rl", "valid", "test"):
            rows = demonstrations if split == "sft" else make_rows(world, split, demonstrations)
            sizes[split] = {"rows": len(rows), "compositions": len({tuple(row["operations"]) for row in rows})}
            if split == "sft":
                sizes[split]["wrong_demonstrations"] = sum(row["mistakes"] > 0 for row in rows) / len(rows)
            (partial / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        from transformers import LlamaConfig  # seconds to import

        tokenizer = make_tokenizer([row["prompt"] + row["response"] for row in demonstrations], world.vocab_size)
        tokenizer.save_pretrained(partial / "tokenizer")
        LlamaConfig(
            architectures=["LlamaForCausalLM"], vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, intermediate_size=160, tie_word_embeddings=True,
            max_position_embeddings=256, bos_token_id=None, pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        ).save_pretrained(partial / "model_config")
        record = {"settings": asdict(world), "shares": SHARES, "faulty_operations": faulty_operations(world)}
        record["sizes"] = sizes
        (partial / "world.json").write_text(json.dumps(record, indent=2) + "\n")
        os.rename(partial, output_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return output_dir


# ------------------------------------------------------------------------------------------------------------ grading

# Programs of the world and their near neighbours are run, many per process, by a worker that offers nothing but these
# names. They cannot import, reach an attribute that is not a plain container method, or build a string, so that no
# program can touch the worker or the next program. Everything else goes to the full sandbox, a process per program.
SAFE_BUILTINS = frozenset(
    "abs all any bool dict divmod enumerate filter float frozenset int len list map max min pow range reversed round "
    "set sorted sum tuple zip".split()
)
SAFE_METHODS = frozenset(
    "add append clear copy count difference discard extend fromkeys get index insert intersection items keys pop "
    "remove reverse setdefault sort union update values".split()
)
SAFE_NODES = frozenset(getattr(ast, name) for name in (
    "arguments arg Return Assign AugAssign Delete For While If Expr Pass Break Continue BoolOp BinOp UnaryOp Lambda "
    "IfExp Dict Set ListComp SetComp DictComp GeneratorExp Compare Call keyword Subscript Starred List Tuple Slice "
    "comprehension Load Store Del And Or Add Sub Mult Div FloorDiv Mod Pow LShift RShift BitOr BitXor BitAnd Invert "
    "Not UAdd USub Eq NotEq Lt LtE Gt GtE Is IsNot In NotIn").split())
BUILTIN_NAMES = frozenset(dir(builtins))
CPU_SECONDS = 0.5  # per program, for all its tests; programs of the world take microseconds
WALL_SECONDS = 60  # per chunk, only for a worker that waits without computing
MEMORY_BYTES = 512 * 2**20
CHUNK = 64  # programs sent to the worker at once
LONGEST_PROGRAM = 2000  # characters; longer ones go to the full sandbox


def is_plain(program, entry_point):
    """True when `program` may run in the shared worker, False when it needs the full sandbox.

    Raises SyntaxError or ValueError when it is no Python program.
    """
    if len(program) > LONGEST_PROGRAM:
        return False
    try:
        tree = ast.parse(program)
    except (RecursionError, MemoryError):  # nested too deeply for this process to judge
        return False
    if len(tree.body) != 1 or type(tree.body[0]) is not ast.FunctionDef or tree.body[0].name != entry_point:
        return False
    if tree.body[0].decorator_list:
        return False
    stack = list(ast.iter_child_nodes(tree.body[0]))
    while stack:
        node = stack.pop()
        kind = type(node)
        if kind is list:
            stack.extend(node)
        elif kind is ast.Name:
            # A name that is no builtin is local or undefined; either way it behaves here as it would anywhere.
            if node.id.startswith("__") or node.id in BUILTIN_NAMES and node.id not in SAFE_BUILTINS:
                return False
        elif kind is ast.Attribute:
            if node.attr not in SAFE_METHODS or type(node.ctx) is not ast.Load:
                return False
            stack.append(node.value)
        elif kind is ast.Constant:
            if type(node.value) not in (int, bool, float, type(None)):
                return False
        elif kind in SAFE_NODES:
            stack.extend([getattr(node, field) for field in node._fields])
        elif kind not in (str, int, type(None)):  # names of arguments and flags are not nodes
            return False
    return True


def _serve():
    """Body of the worker process, which imports nothing of ours: answers chunks of [program, entry_point, inputs].

    For each program one line: the list of the outputs' reprs, or the name of the exception. A program that exceeds its
    CPU time ends the process (SIGPROF, also inside one long C call); the parent then knows which one it was.
    """
    import builtins
    import json
    import os
    import resource
    import signal
    import sys

    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    limits = json.loads(requests.readline())
    for kind, limit in (("RLIMIT_AS", limits["memory"]), ("RLIMIT_FSIZE", 0), ("RLIMIT_CORE", 0)):
        try:
            resource.setrlimit(getattr(resource, kind), (limit, limit))
        except (ValueError, OSError):  # macOS refuses RLIMIT_AS
            pass
    safe = {name: getattr(builtins, name) for name in limits["builtins"]}
    sys.setrecursionlimit(400)
    replies.write(b"ready\n")
    replies.flush()
    for line in requests:
        for program, entry_point, inputs in json.loads(line):
            signal.setitimer(signal.ITIMER_PROF, limits["cpu"])
            try:
                namespace = {"__builtins__": dict(safe)}
                exec(compile(program, "program", "exec"), namespace)
                function = namespace[entry_point]
                reply = [repr(function(value))[:2000] for value in inputs]
            except BaseException as error:
                reply = type(error).__name__
            namespace = function = None
            signal.setitimer(signal.ITIMER_PROF, 0)
            replies.write(json.dumps(reply).encode() + b"\n")
            replies.flush()


WORKER_SOURCE = inspect.getsource(_serve) + "\n_serve()\n"  # read now: an edit of this file must not change a run


def _start_worker():
    """A fresh interpreter with an empty environment that holds only `_serve`."""
    environment = {key: os.environ[key] for key in ("LD_LIBRARY_PATH",) if key in os.environ}
    worker = subprocess.Popen(
        [sys.executable, "-I", "-S", "-W", "ignore", "-c", WORKER_SOURCE], cwd="/", env=environment,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
    )
    limits = {"memory": MEMORY_BYTES, "cpu": CPU_SECONDS, "builtins": sorted(SAFE_BUILTINS)}
    try:
        worker.stdin.write(json.dumps(limits).encode() + b"\n")
        worker.stdin.flush()
        ready = worker.stdout.readline()
    except BrokenPipeError:
        ready = b""
    if ready != b"ready\n":
        raise RuntimeError(f"the grading worker did not start (exit status {_stop(worker)}): nothing was graded")
    return worker


def _stop(worker):
    """Kill the worker's process group, wait, and return the exit status (minus the signal that ended it)."""
    worker.stdout.close()
    try:
        worker.stdin.close()
    except BrokenPipeError:
        pass
    try:
        return worker.wait(timeout=5)  # it ends by itself once its input is closed, unless it is stuck in a program
    except subprocess.TimeoutExpired:
        os.killpg(worker.pid, signal.SIGKILL)
        return worker.wait()


def _execute(jobs):
    """Answers of the worker to jobs (program, entry_point, inputs), in order; "killed" for a program that ended it."""
    answers, alone = [], False
    worker = _start_worker()
    try:
        while len(answers) < len(jobs):
            chunk = jobs[len(answers) : len(answers) + (1 if alone else CHUNK)]
            timer = threading.Timer(WALL_SECONDS, worker.kill)
            timer.start()
            replies = []
            try:
                worker.stdin.write(json.dumps(chunk).encode() + b"\n")
                worker.stdin.flush()
                for line in itertools.islice(worker.stdout, len(chunk)):
                    if line.endswith(b"\n"):
                        replies.append(json.loads(line))
            except BrokenPipeError:
                pass
            finally:
                timer.cancel()
            answers += replies
            if len(replies) == len(chunk):
                alone = False
                continue
            # The first program without an answer ended the worker. Out of CPU time: it fails. Ended by something else
            # (the machine stalled or ran out of memory): one more chance, alone.
            if _stop(worker) == -signal.SIGPROF or alone:
                answers.append("killed")
                alone = False
            else:
                alone = True
            worker = _start_worker()
    finally:
        _stop(worker)
    return answers


def grade_fast(prompts, responses, rows, stats=None):
    """For each i whether the program prompts[i] + responses[i] passes the tests of rows[i]: a list of bools.

    Programs run in separate processes; only plain data comes back and is compared here, and the expected outputs never
    leave this process. Equal programs on equal tests run once. `stats`, a dict, receives the counts `programs`,
    `distinct`, `sandboxed` (graded by `benchmark.grading`, about a hundred times slower) and `killed`.
    """
    if not len(prompts) == len(responses) == len(rows):
        raise ValueError(f"prompts, responses and rows differ in length: {len(prompts)}, {len(responses)}, {len(rows)}")
    keys = [(prompt + response, row["tests"]) for prompt, response, row in zip(prompts, responses, rows)]
    verdicts, fast, slow = {}, {}, {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the programs, for example "is" with a literal
        for key, row in zip(keys, rows):
            if key in verdicts:
                continue
            if not row["inputs"] or len(row["inputs"]) != len(row["outputs"]):
                raise ValueError(f"{row['task_id']}: needs at least one test and as many inputs as outputs")
            verdicts[key] = False
            try:
                (fast if is_plain(key[0], row["entry_point"]) else slow)[key] = row
            except (SyntaxError, ValueError):
                pass  # not a Python program
    jobs = [(program, row["entry_point"], row["inputs"]) for (program, _), row in fast.items()]
    answers = _execute(jobs) if jobs else []
    for (key, row), answer in zip(fast.items(), answers):
        verdicts[key] = answer == [repr(output) for output in row["outputs"]]
    if slow:
        from benchmark.grading import grade

        for key, row in slow.items():
            verdicts[key] = bool(grade(key[0], row["tests"], row["entry_point"])["passed"])
    if stats is not None:
        stats.update(programs=len(keys), distinct=len(verdicts), sandboxed=len(slow), killed=answers.count("killed"))
    return [verdicts[key] for key in keys]


def oracle(prompts, responses, rows):
    """The actual score as a reward: 1.0 where the program passes its tests, else 0.0."""
    return [float(passed) for passed in grade_fast(prompts, responses, rows)]


# --------------------------------------------------------------------------------------------------------- preferences


def edit_distance(a, b):
    """Levenshtein distance of two strings, in characters.

    One column of the usual table at a time, its vertical steps (+1 or -1) held in the bits of two integers
    (G. Myers, JACM 1999; H. Hyyrö 2003): a hundred times faster than the table in Python.
    """
    if not a:
        return len(b)
    positions = {}
    for i, character in enumerate(a):
        positions[character] = positions.get(character, 0) | 1 << i
    full, last = (1 << len(a)) - 1, 1 << (len(a) - 1)
    plus, minus, distance = full, 0, len(a)
    for character in b:
        match = positions.get(character, 0)
        diagonal = (((match & plus) + plus) ^ plus) | match | minus
        across_plus = minus | ~(diagonal | plus) & full
        across_minus = plus & diagonal
        distance += bool(across_plus & last) - bool(across_minus & last)
        across_plus = across_plus << 1 | 1
        plus = (across_minus << 1 | ~(diagonal | across_plus)) & full
        minus = across_plus & diagonal & full
    return distance


def build_pairs(rows, responses, passed):
    """Preference data: per prompt the (passing, failing) pair of largest edit distance, the first one of equals. DEPARTS PAPER,
    which takes the most distant pair of all and labels it by the tests: a pair of equal outcome has no label.

    responses[i] and passed[i] are the texts and verdicts of the samples of rows[i]. Returns (pairs, dropped): rows
    `task_id`, `prompt`, `chosen`, `rejected`, and the number of prompts without a passing or without a failing sample.
    """
    if not len(rows) == len(responses) == len(passed):
        raise ValueError(f"rows, responses and passed differ in length: {len(rows)}, {len(responses)}, {len(passed)}")
    pairs = []
    for row, texts, verdicts in zip(rows, responses, passed):
        if len(texts) != len(verdicts):
            raise ValueError(f"{row['task_id']}: {len(texts)} responses but {len(verdicts)} verdicts")
        good = dict.fromkeys(text for text, verdict in zip(texts, verdicts) if verdict)
        bad = dict.fromkeys(text for text, verdict in zip(texts, verdicts) if not verdict)
        if good and bad:
            chosen, rejected = max(itertools.product(good, bad), key=lambda pair: edit_distance(*pair))
            pairs.append({"task_id": row["task_id"], "prompt": row["prompt"], "chosen": chosen, "rejected": rejected})
    return pairs, len(rows) - len(pairs)


@dataclass(frozen=True)
class WriteArgs(World):
    """Write a world: its six splits, a tokenizer, a model configuration and world.json."""

    output_dir: str = "world"
    """folder to create; must be absent, empty, or hold this very world"""


def main():
    import tyro

    commands = {"write": WriteArgs}
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        sys.exit("usage: python -m benchmark.minicode write --output_dir DIR --seed S (write --help lists all flags)")
    settings = asdict(tyro.cli(commands[sys.argv[1]], args=sys.argv[2:], prog="benchmark.minicode write"))
    folder = write_world(settings.pop("output_dir"), **settings)
    record = json.loads((folder / "world.json").read_text())
    for split, size in record["sizes"].items():
        print(f"{split:10s} {size['rows']:6d} rows {size['compositions']:6d} compositions")
    print(f"wrote {folder}")


if __name__ == "__main__":
    main()
