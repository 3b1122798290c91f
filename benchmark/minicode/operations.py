"""The operations of the embedded world: how each is asked for, done right, and done wrong."""

from typing import NamedTuple


class Operation(NamedTuple):
    """One step of a problem. Implementations are expressions in `x` that change nothing; `{k}` is the
    constant."""

    name: str
    constants: tuple
    phrasings: tuple
    correct: tuple
    wrong: tuple


ANY, SMALL, FACTOR, NONE = (0, 1, 2, 3, 4, 5, 6), (1, 2, 3), (2, 3, 4, 5), (0,)
LIST_OPERATIONS = [
    Operation(*fields)
    for fields in (
        (
            "above",
            ANY,
            ("keep above {k}", "keep over {k}", "drop up to {k}"),
            (
                "[v for v in x if v > {k}]",
                "list(filter(lambda v: v > {k}, x))",
                "[v for v in x if not v <= {k}]",
            ),
            ("[v for v in x if v >= {k}]", "[v for v in x if v < {k}]"),
        ),
        (
            "below",
            ANY,
            ("keep below {k}", "keep under {k}", "drop from {k} up"),
            (
                "[v for v in x if v < {k}]",
                "list(filter(lambda v: v < {k}, x))",
                "[v for v in x if not v >= {k}]",
            ),
            ("[v for v in x if v <= {k}]", "[v for v in x if v > {k}]"),
        ),
        (
            "at_least",
            ANY,
            ("keep at least {k}", "drop below {k}"),
            ("[v for v in x if v >= {k}]", "list(filter(lambda v: v >= {k}, x))"),
            ("[v for v in x if v > {k}]", "[v for v in x if v <= {k}]"),
        ),
        (
            "at_most",
            ANY,
            ("keep at most {k}", "drop above {k}"),
            ("[v for v in x if v <= {k}]", "list(filter(lambda v: v <= {k}, x))"),
            ("[v for v in x if v < {k}]", "[v for v in x if v >= {k}]"),
        ),
        (
            "remove",
            ANY,
            ("remove {k}", "drop every {k}"),
            ("[v for v in x if v != {k}]", "list(filter(lambda v: v != {k}, x))"),
            (
                "[v for v in x if v == {k}]",
                "[v for i, v in enumerate(x) if i != {k}]",
                "[v for v in x if v > {k}]",
            ),
        ),
        (
            "even",
            NONE,
            ("keep even", "drop odd"),
            ("[v for v in x if v % 2 == 0]", "[v for v in x if not v % 2]"),
            ("[v for v in x if v % 2]", "x[::2]"),
        ),
        (
            "odd",
            NONE,
            ("keep odd", "drop even"),
            ("[v for v in x if v % 2 == 1]", "[v for v in x if v % 2]"),
            ("[v for v in x if v % 2 == 0]", "x[1::2]"),
        ),
        (
            "multiples",
            (3, 4, 5),
            ("keep multiples of {k}", "keep divisible by {k}"),
            ("[v for v in x if v % {k} == 0]", "[v for v in x if not v % {k}]"),
            ("[v for v in x if v % {k}]", "[v for v in x if v // {k} == 0]"),
        ),
        (
            "positive",
            NONE,
            ("keep positive", "drop zero and below"),
            ("[v for v in x if v > 0]", "list(filter(lambda v: v > 0, x))"),
            ("[v for v in x if v >= 0]", "[abs(v) for v in x]"),
        ),
        (
            "negative",
            NONE,
            ("keep negative", "drop zero and above"),
            ("[v for v in x if v < 0]", "list(filter(lambda v: v < 0, x))"),
            ("[v for v in x if v <= 0]", "[-v for v in x]"),
        ),
        (
            "add",
            (1, 2, 3, 4, 5),
            ("add {k} to each", "increase each by {k}", "each plus {k}"),
            ("[v + {k} for v in x]", "[{k} + v for v in x]", "list(map(lambda v: v + {k}, x))"),
            ("[v - {k} for v in x]", "[v * {k} for v in x]"),
        ),
        (
            "subtract",
            (1, 2, 3, 4, 5),
            ("subtract {k} from each", "decrease each by {k}", "each minus {k}"),
            ("[v - {k} for v in x]", "list(map(lambda v: v - {k}, x))"),
            ("[{k} - v for v in x]", "[v + {k} for v in x]"),
        ),
        (
            "multiply",
            FACTOR,
            ("multiply each by {k}", "each times {k}"),
            ("[v * {k} for v in x]", "[{k} * v for v in x]", "list(map(lambda v: v * {k}, x))"),
            ("x * {k}", "[v + {k} for v in x]", "[v ** {k} for v in x]"),
        ),
        (
            "square",
            NONE,
            ("square each", "each times itself"),
            ("[v * v for v in x]", "[v ** 2 for v in x]"),
            ("[v * 2 for v in x]", "[v + v for v in x]"),
        ),
        (
            "negate",
            NONE,
            ("negate each", "flip each sign"),
            ("[-v for v in x]", "[0 - v for v in x]"),
            ("[abs(v) for v in x]", "x[::-1]"),
        ),
        (
            "absolute",
            NONE,
            ("absolute of each", "drop each sign"),
            ("[abs(v) for v in x]", "[max(v, -v) for v in x]"),
            ("[-v for v in x]", "[max(v, 0) for v in x]"),
        ),
        (
            "floor",
            ANY,
            ("raise each to at least {k}", "replace below {k} by {k}"),
            ("[max(v, {k}) for v in x]", "[v if v > {k} else {k} for v in x]"),
            ("[min(v, {k}) for v in x]", "[v for v in x if v >= {k}]"),
        ),
        (
            "cap",
            ANY,
            ("cap each at {k}", "replace above {k} by {k}"),
            ("[min(v, {k}) for v in x]", "[v if v < {k} else {k} for v in x]"),
            ("[max(v, {k}) for v in x]", "[v for v in x if v <= {k}]"),
        ),
        (
            "modulo",
            FACTOR,
            ("each modulo {k}", "remainder of each by {k}"),
            ("[v % {k} for v in x]", "list(map(lambda v: v % {k}, x))"),
            ("[v // {k} for v in x]", "[v for v in x if v % {k}]"),
        ),
        (
            "divide",
            FACTOR,
            ("floor divide each by {k}", "divide each by {k} rounding down"),
            ("[v // {k} for v in x]", "list(map(lambda v: v // {k}, x))"),
            ("[v / {k} for v in x]", "[v % {k} for v in x]"),
        ),
        (
            "ascending",
            NONE,
            ("sort ascending", "sort up"),
            ("sorted(x)", "sorted(x[:])"),
            ("sorted(x, reverse=True)", "sorted(set(x))"),
        ),
        (
            "descending",
            NONE,
            ("sort descending", "sort down"),
            ("sorted(x, reverse=True)", "sorted(x)[::-1]"),
            ("sorted(x)", "x[::-1]"),
        ),
        (
            "reverse",
            NONE,
            ("reverse the order", "turn around"),
            ("x[::-1]", "list(reversed(x))"),
            ("sorted(x, reverse=True)", "x[:-1]"),
        ),
        (
            "by_size",
            NONE,
            ("sort by absolute", "sort by distance from zero"),
            ("sorted(x, key=abs)", "sorted(x, key=lambda v: abs(v))"),
            ("sorted(x)", "sorted(abs(v) for v in x)"),
        ),
        (
            "first",
            SMALL,
            ("keep first {k}", "take {k} at the front"),
            ("x[:{k}]", "[v for i, v in enumerate(x) if i < {k}]"),
            ("x[{k}:]", "x[:{k} + 1]", "x[-{k}:]"),
        ),
        (
            "last",
            SMALL,
            ("keep last {k}", "take {k} at the back"),
            ("x[-{k}:]", "[*x[-{k}:]]"),
            ("x[:{k}]", "x[{k}:]", "x[-{k} - 1:]"),
        ),
        (
            "skip_first",
            SMALL,
            ("drop first {k}", "skip {k} at the front"),
            ("x[{k}:]", "[v for i, v in enumerate(x) if i >= {k}]"),
            ("x[:{k}]", "x[{k} + 1:]", "x[:-{k}]"),
        ),
        (
            "skip_last",
            SMALL,
            ("drop last {k}", "skip {k} at the back"),
            ("x[:-{k}]", "[*x[:-{k}]]"),
            ("x[{k}:]", "x[-{k}:]"),
        ),
        (
            "even_places",
            NONE,
            ("keep even places", "every second from the first"),
            ("x[::2]", "[v for i, v in enumerate(x) if i % 2 == 0]"),
            ("x[1::2]", "[v for v in x if v % 2 == 0]"),
        ),
        (
            "odd_places",
            NONE,
            ("keep odd places", "every second from the second"),
            ("x[1::2]", "[v for i, v in enumerate(x) if i % 2]"),
            ("x[::2]", "[v for v in x if v % 2]"),
        ),
        (
            "unique",
            NONE,
            ("drop repeats", "keep first of equals"),
            ("list(dict.fromkeys(x))", "[v for i, v in enumerate(x) if v not in x[:i]]"),
            ("sorted(set(x))", "[v for v in x if x.count(v) == 1]"),
        ),
        (
            "running",
            NONE,
            ("running sums", "sums so far"),
            ("[sum(x[:i + 1]) for i in range(len(x))]", "[sum(x[:i]) for i in range(1, len(x) + 1)]"),
            ("[sum(x[:i]) for i in range(len(x))]", "[sum(x[i:]) for i in range(len(x))]"),
        ),
        (
            "differences",
            NONE,
            ("differences of neighbours", "each minus the one before"),
            ("[b - a for a, b in zip(x, x[1:])]", "[b - a for a, b in zip(x[:-1], x[1:])]"),
            ("[a - b for a, b in zip(x, x[1:])]", "[b + a for a, b in zip(x, x[1:])]"),
        ),
        (
            "pair_sums",
            NONE,
            ("sums of neighbours", "each plus the one before"),
            ("[a + b for a, b in zip(x, x[1:])]", "[b + a for a, b in zip(x, x[1:])]"),
            ("[b - a for a, b in zip(x, x[1:])]", "[a + b for a, b in zip(x, x)]"),
        ),
        (
            "append",
            ANY,
            ("append {k}", "put {k} at the back"),
            ("x + [{k}]", "[*x, {k}]"),
            ("[{k}] + x", "[v + {k} for v in x]"),
        ),
        (
            "prepend",
            ANY,
            ("prepend {k}", "put {k} at the front"),
            ("[{k}] + x", "[{k}, *x]"),
            ("x + [{k}]", "[{k}] + x[1:]"),
        ),
        (
            "rotate",
            NONE,
            ("rotate left", "put the first at the back"),
            ("x[1:] + x[:1]", "[*x[1:], *x[:1]]"),
            ("x[-1:] + x[:-1]", "x[1:]"),
        ),
    )
]
SCALAR_OPERATIONS = [
    Operation(*fields)
    for fields in (
        (
            "sum",
            NONE,
            ("return the sum", "return the total"),
            ("sum(x)", "sum(v for v in x)"),
            ("len(x)", "sum(x[1:])"),
        ),
        (
            "largest",
            NONE,
            ("return the largest or 0", "return the maximum or 0"),
            ("max(x, default=0)", "max(x) if x else 0", "sorted(x)[-1] if x else 0"),
            ("min(x, default=0)", "x[-1] if x else 0"),
        ),
        (
            "smallest",
            NONE,
            ("return the smallest or 0", "return the minimum or 0"),
            ("min(x, default=0)", "min(x) if x else 0", "sorted(x)[0] if x else 0"),
            ("max(x, default=0)", "x[0] if x else 0"),
        ),
        (
            "length",
            NONE,
            ("return the length", "count all"),
            ("len(x)", "sum(1 for v in x)"),
            ("len(x) - 1", "sum(x)"),
        ),
        (
            "count_above",
            ANY,
            ("count above {k}", "count over {k}"),
            ("sum(v > {k} for v in x)", "len([v for v in x if v > {k}])"),
            ("sum(v >= {k} for v in x)", "sum(v for v in x if v > {k})"),
        ),
        (
            "any_above",
            ANY,
            ("return if any is above {k}", "return if any is over {k}"),
            ("any(v > {k} for v in x)", "max(x, default={k}) > {k}"),
            ("all(v > {k} for v in x)", "sum(v > {k} for v in x)"),
        ),
        (
            "distinct",
            NONE,
            ("count distinct", "count without repeats"),
            ("len(set(x))", "len(dict.fromkeys(x))"),
            ("len(x)", "len(x) - len(set(x))"),
        ),
    )
]
OPERATIONS = {operation.name: operation for operation in LIST_OPERATIONS + SCALAR_OPERATIONS}
