"""Grades programs against tests, each in processes of their own; `speed` measures how many per second.

>>> grade("def double(x):\n    return 2 * x\n", "assert double(4) == 8", "double")
{'passed': True, 'detail': 'all tests passed'}
"""

from benchmark.grading.grader import GradingError, grade, grade_many

__all__ = ["GradingError", "grade", "grade_many"]
