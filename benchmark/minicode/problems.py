"""The problems of the embedded world: the settings of a world, and the rows of its splits."""

import hashlib
import random
from dataclasses import dataclass
from functools import lru_cache

from benchmark.minicode.operations import LIST_OPERATIONS, OPERATIONS, SCALAR_OPERATIONS

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
                f"need 2 <= min_operations <= max_operations, got {self.min_operations} and "
                f"{self.max_operations}"
            )
        if self.num_tests < 2:
            raise ValueError(f"num_tests must be at least 2, got {self.num_tests}")
        for name in ("faulty_share", "faulty_rate", "background_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a probability, got {getattr(self, name)}")
        for name in ("num_sft", "num_sft_valid", "num_preference", "num_rl", "num_valid", "num_test"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


# ---------------------------------------------------------------- making problems


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
    return (
        "".join(f"    x = {expression}\n" for expression in expressions[:-1])
        + f"    return {expressions[-1]}"
    )


def _draw_inputs(rng, world, constants):
    """Lists of integers in -9..12: one of length 0-3, the rest 5-10; half of them get a threshold of the
    problem."""
    lengths = [rng.randint(0, 3)] + [rng.randint(5, 10) for _ in range(world.num_tests - 1)]
    inputs = [rng.choices(range(-9, 13), k=length) for length in lengths]
    for values in inputs:
        if values and rng.random() < 0.5:
            values[rng.randrange(len(values))] = rng.choice(constants)
    return inputs


def _every_mistake_shows(operations, constants, stages):
    """True when each mistake, alone in an otherwise correct program, changes the repr of the outcome of some
    test.

    `stages[i]` are the values of all tests before operation i, `stages[-1]` the outputs.
    """
    expected = [repr(output) for output in stages[-1]]
    for i, (operation, k) in enumerate(zip(operations, constants)):
        rest = [
            _function(op.correct[0].format(k=c)) for op, c in zip(operations[i + 1 :], constants[i + 1 :])
        ]
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
        for _ in range(
            3
        ):  # a mistake may stay hidden for these constants or lists; some compositions hide it always
            constants = [rng.choice(op.constants) for op in operations]
            stages = [_draw_inputs(rng, world, constants)]
            for operation, k in zip(operations, constants):
                stages.append([_function(operation.correct[0].format(k=k))(values) for values in stages[-1]])
            if _every_mistake_shows(operations, constants, stages):
                return operations, constants, stages[0], stages[-1]


def make_rows(world, split, demonstrations=None):
    """All rows of one split (sft, sft_valid, preference, rl, valid, test), a list of dicts as in the module
    docstring.

    Prompts are distinct, except among the demonstrations, where one prompt may be answered in several ways.
    The rows of sft_valid avoid the prompts of the demonstrations, which are made once more unless they are
    given.
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
            raise ValueError(
                f"num_{split}={size}: no more than {len(rows)} distinct prompts found; ask for fewer"
            )
        operations, constants, inputs, outputs = _draw_problem(rng, world, "sft" if demonstrated else split)
        phrases = [rng.choice(op.phrasings).format(k=k) for op, k in zip(operations, constants)]
        # The semicolon announces the last operation: two layers then find the phrase that belongs to each
        # line.
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
            "canonical_solution": _body(
                [rng.choice(op.correct).format(k=k) for op, k in zip(operations, constants)]
            ),
        }
        if demonstrated:
            rates = [world.faulty_rate if op.name in faulty else world.background_rate for op in operations]
            slips = [rng.random() < rate for rate in rates]
            drawn = [rng.choice(op.wrong if slip else op.correct) for op, slip in zip(operations, slips)]
            row["response"] = _body([text.format(k=k) for text, k in zip(drawn, constants)])
            row["mistakes"] = sum(slips)
        rows.append(row)
    return rows
