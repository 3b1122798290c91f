"""`python -m benchmark.minicode write --output_dir DIR`."""

import json
import sys
from dataclasses import asdict, dataclass

from benchmark.minicode import World, write_world


@dataclass(frozen=True)
class WriteArgs(World):
    """Write a world: its six splits, a tokenizer, a model configuration and world.json."""

    output_dir: str = "world"
    """folder to create; must be absent, empty, or hold this very world"""


def main():
    import tyro

    commands = {"write": WriteArgs}
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        sys.exit(
            "usage: python -m benchmark.minicode write --output_dir DIR --seed S (write --help lists all "
            "flags)"
        )
    settings = asdict(tyro.cli(commands[sys.argv[1]], args=sys.argv[2:], prog="benchmark.minicode write"))
    folder = write_world(settings.pop("output_dir"), **settings)
    record = json.loads((folder / "world.json").read_text())
    for split, size in record["sizes"].items():
        print(f"{split:10s} {size['rows']:6d} rows {size['compositions']:6d} compositions")
    print(f"wrote {folder}")


if __name__ == "__main__":
    main()
