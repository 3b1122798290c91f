"""`python -m benchmark.minicode write --output_dir DIR`, `python -m benchmark.minicode ask --policy DIR ...`."""

import json
import os
import sys
from dataclasses import asdict, dataclass

from benchmark.minicode import World, write_world


@dataclass(frozen=True)
class WriteArgs(World):
    """Write a world: its six splits, a tokenizer, a model configuration and world.json."""

    output_dir: str = "world"
    """folder to create; must be absent, empty, or hold this very world"""


def write(argv: list[str]) -> None:
    import tyro

    try:
        settings = asdict(tyro.cli(WriteArgs, args=argv, prog="benchmark.minicode write"))
        folder = write_world(settings.pop("output_dir"), **settings)
    except (ValueError, FileExistsError) as error:
        sys.exit(str(error))
    record = json.loads((folder / "world.json").read_text())
    for split, size in record["sizes"].items():
        print(f"{split:10s} {size['rows']:6d} rows {size['compositions']:6d} compositions")
    print(f"wrote {folder}")


def ask(argv: list[str]) -> None:
    """The program that a policy writes greedily for each instruction, such as `keep above 3; reverse the
    order`."""
    if len(argv) < 3 or argv[0] != "--policy":
        sys.exit('usage: python -m benchmark.minicode ask --policy DIR "keep above 3; reverse the order" ...')
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from benchmark import pipeline  # seconds to import

    policy, tokenizer = pipeline.load(argv[1])
    rows = [{"prompt": f"# {text}\ndef f(x):\n"} for text in argv[2:]]
    _, answers = pipeline.sample(policy, tokenizer, rows, 1, 0.0, seed=1)
    for row, answer in zip(rows, answers):
        print(row["prompt"] + answer)


def main() -> None:
    commands = {"write": write, "ask": ask}
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        sys.exit(
            "usage: python -m benchmark.minicode write --output_dir DIR --seed S (write --help lists all "
            "flags)\n"
            '       python -m benchmark.minicode ask --policy DIR "keep above 3; reverse the order"'
        )
    commands[sys.argv[1]](sys.argv[2:])


if __name__ == "__main__":
    main()
