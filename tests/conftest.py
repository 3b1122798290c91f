"""How the tests are run. All of them run on two processes where pytest-xdist is there, a file on one of them; some
files or tests by name run in this process. `-n 0` runs everything in it, `-n 2 --dist loadfile` anything on two.

The fixtures, and what tests take `from conftest`, are those of tiny.py, which imports torch and transformers: it is
loaded by the processes that run tests, and under xdist the one that hands tests out is none of them."""

import importlib
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read at import; subprocesses inherit it
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

LONGEST = """test_shard test_verdicts test_load test_grading test_reference test_kills test_memory_plan
test_runs test_pfppo_run test_baselines""".split()  # begun first, so that no process is left with one of them

pytest.register_assert_rewrite("tiny")
sys.path.insert(0, str(Path(__file__).parent))


def __getattr__(name):
    if name.startswith(("_", "pytest")):  # what pytest looks for in every plugin
        raise AttributeError(name)
    return getattr(importlib.import_module("tiny"), name)


def is_worker(config) -> bool:
    return hasattr(config, "workerinput")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    whole = config.args_source == pytest.Config.ArgsSource.TESTPATHS
    alone = is_worker(config) or config.option.usepdb or config.option.collectonly
    if whole and not alone and getattr(config.option, "numprocesses", 0) is None:  # not given; 0: no xdist
        config.option.numprocesses, config.option.dist = 2, "loadfile"
        config.option.loadscopereorder = False


def pytest_configure(config):
    hands_out = getattr(config.option, "dist", "no") != "no" and not is_worker(config)
    if not hands_out:
        config.bare = importlib.import_module("fork_server").fork_bare()  # before tiny imports transformers
        config.pluginmanager.register(importlib.import_module("tiny"))


def pytest_collection_modifyitems(config, items):
    if is_worker(config):
        places = {name: place for place, name in enumerate(LONGEST)}
        items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))
