"""What a graded program may import."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmark.grading import grade
from benchmark.grading import grader as grading

BODY = "def f(x):\n    return {value}\n"
TESTS = "assert f(4) == 8\nassert f(5) == 10\n"


@pytest.fixture(scope="module", autouse=True)
def ended():
    yield
    grading.close()


@pytest.fixture
def numpy():
    return pytest.importorskip("numpy")


@pytest.mark.parametrize(
    "value",
    ["int(np.sum([x, x]))", "np.sum([x, x])", "np.float32(2 * x)", "np.array([2 * x])[0]", "np.uint8(2 * x)"],
)
def test_numpy_is_there_and_its_scalars_are_numbers(numpy, value):
    assert grade(f"import numpy as np\n{BODY.format(value=value)}", TESTS, "f")["passed"]


def test_scalars_inside_of_containers_are_numbers(numpy):
    program = (
        "import numpy as np\ndef f(x):\n    return {np.int64(1): list(np.arange(x)), 'b': np.bool_(True)}\n"
    )
    assert grade(program, "assert f(2) == {1: [0, 1], 'b': True}", "f")["passed"]
    assert not grade(program, "assert f(2) == {1: [0, 2], 'b': True}", "f")["passed"]


@pytest.mark.parametrize(
    "value", ["np.int64(9)", "np.array([8, 10])", "np.float64('nan')", "Always(8)", "np.array(Always(8))"]
)
def test_numpy_opens_no_way_to_a_pass(numpy, value):  # PITFALLS EX-1
    program = (
        "import numpy as np\nclass Always(np.int64):\n    def __eq__(self, other):\n        return True\n"
        "    def item(self):\n        return 9\n    __array_ufunc__ = __array__ = lambda *a, **k: True\n"
    )
    assert not grade(program + BODY.format(value=value), TESTS, "f")["passed"]


def test_numpy_starts_no_threads(numpy):
    count = (
        "import threading\ndef f(x):\n    product\n    end, count = threading.Event(), 0\n    try:\n"
        "        while count < 50:\n            threading.Thread(target=end.wait, daemon=True).start()\n"
        "            count += 1\n    except RuntimeError:\n        pass\n    end.set()\n    return count\n"
    )
    with_numpy = "import numpy as np\n" + count.replace(
        "product", "np.ones((300, 300)) @ np.ones((300, 300))"
    )
    counted = [
        n for n in range(12) if grade(count.replace("product", "pass"), f"assert f(0) == {n}", "f")["passed"]
    ]
    if not counted:
        pytest.skip("the number of threads is not limited here")
    assert grade(with_numpy, f"assert f(0) == {counted[0]}", "f")["passed"]


@pytest.mark.parametrize(
    "program, missing",
    [
        ("import not_there\ndef f(x):\n    return 2 * x\n", "not_there"),
        ("def f(x):\n    from not_there.part import g\n    return g(x)\n", "not_there"),
        ("import benchmark.grading\ndef f(x):\n    return 2 * x\n", "benchmark"),
        ("import json.not_there\ndef f(x):\n    return 2 * x\n", None),
        ("try:\n    import not_there\nexcept ImportError:\n    pass\ndef f(x):\n    return x\n", None),
        ("def f(x):\n    return not_there(x)\n", None),
        ("def f(x):\n    raise ImportError(\"No module named 'not_there'\")\n", None),
        ("def f(x):\n    raise ModuleNotFoundError('No module named ' + repr('x' * 1000))\n", None),
    ],
)
def test_a_missing_package_is_named(program, missing):
    verdict = grade(program, TESTS, "f")
    assert not verdict["passed"] and verdict.get("missing_package") == missing
    assert ("missing_package" in verdict) is (missing is not None)


def test_a_pass_names_no_package():
    program = "try:\n    import not_there\nexcept ImportError:\n    pass\ndef f(x):\n    return 2 * x\n"
    assert grade(program, TESTS, "f") == {"passed": True, "detail": "all tests passed"}


def test_packages_are_read_where_only_their_owner_may_look_and_are_not_written(tmp_path):  # PITFALLS EX-4
    place = tmp_path / "closed" / "site-packages"
    for name in ("there", "benchmark"):
        (place / name).mkdir(parents=True)
        (place / name / "__init__.py").write_text("def g(x):\n    return 2 * x\n")
    (tmp_path / "closed").chmod(0o700)
    programs = {
        "imports": "from there import g as f\n",
        "imports ours": "from benchmark import g as f\n",
        "writes": "import there\ndef f(x):\n    open(there.__path__[0] + '/new', 'w')\n",
        "appends": "import there\ndef f(x):\n    open(there.__file__, 'a').write('x = 1')\n",
        "removes": "import there, os\ndef f(x):\n    os.unlink(there.__file__)\n",
    }
    script = (
        "import json, sys\nfrom benchmark.grading import grade\n"
        "programs, tests = json.loads(sys.stdin.read())\n"
        "print(json.dumps({name: grade(program, tests, 'f') for name, program in programs.items()}))"
    )
    root = Path(grading.__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps([programs, TESTS]),
        capture_output=True,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": f"{root}:{place}"},
    )
    verdicts = json.loads(result.stdout)
    assert verdicts["imports"]["passed"], verdicts["imports"]
    if "landlock" in result.stderr:
        assert not verdicts["imports ours"]["passed"]
    for name in ("writes", "appends", "removes"):
        assert re.match("(Permission|OS)Error", verdicts[name]["detail"]), verdicts[name]
    assert sorted(path.name for path in (place / "there").iterdir()) == ["__init__.py"]
    assert (place / "there/__init__.py").read_text() == "def g(x):\n    return 2 * x\n"
