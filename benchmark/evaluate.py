"""`python benchmark/evaluate.py` runs benchmark/evaluation/evaluate.py: the place that results and README
name."""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, not this folder
    runpy.run_module("benchmark.evaluation.evaluate", run_name="__main__", alter_sys=True)
