"""What every result needs: files of rows, written whole or not at all; commit and hardware; Student's
interval."""

import gzip
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]


def write_text(path: Path, text: str) -> None:
    """Write aside, then rename."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def write_json(path: Path, value) -> None:
    write_text(path, json.dumps(value, indent=1))


def write_rows(path: Path, rows: list[dict]) -> None:
    """One line a row."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path: Path, limit: int | None = None) -> list[dict]:
    """Rows of a .jsonl file, gzipped or not."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        rows = [json.loads(line) for line in file]
    return rows[:limit]


def append_rows(path: Path, rows: list[dict]) -> None:
    """Rows in one write, on disk before anything else happens."""
    with path.open("ab", buffering=0) as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
        os.fsync(file.fileno())


def append_row(path: Path, row: dict) -> None:
    append_rows(path, [row])


def finished_rows(path: Path) -> list[dict]:
    """Rows of a file that a killed run may have left, none where there is no file; half a line at the end is
    cut off."""
    if not path.is_file():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        os.truncate(path, len(whole))
    return [json.loads(line) for line in whole.splitlines()]  # of bytes: text also breaks at U+2028


def commit() -> str:
    """Commit of this checkout, "+" behind it where a Python file differs; "unknown" outside a git
    checkout."""
    try:
        head, changes = (
            subprocess.run(
                ["git", *words.split()], cwd=ROOT, capture_output=True, text=True, check=True
            ).stdout.strip()
            for words in ("rev-parse HEAD", "status --porcelain --untracked-files=no -- *.py")
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changes else "")


def hardware() -> str:
    """Processor, cores, and the versions of Python and torch, in one line."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    names = [line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    python, torch = platform.python_version(), importlib.metadata.version("torch")
    return f"{name}, {os.cpu_count()} cores, Python {python}, torch {torch}"


def half_width(values, level: float = 0.95) -> np.ndarray:
    """Half of Student's t-interval of the mean over the first axis; nan for fewer than two values."""
    from scipy import stats  # an extra that training does not need

    x = np.asarray(values, dtype=float)
    if len(x) < 2:
        return np.full(x.shape[1:], np.nan)
    return stats.t.ppf(0.5 + level / 2, len(x) - 1) * x.std(0, ddof=1) / np.sqrt(len(x))
