"""`python benchmark/compare_reference.py` runs benchmark/lm_human_preferences/compare.py: the place that
results and README name."""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, not this folder
    runpy.run_module("benchmark.lm_human_preferences.compare", run_name="__main__", alter_sys=True)
