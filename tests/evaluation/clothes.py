"""The forms in which models give a program: each takes a prompt, the body that continues it, and the name of
the function, and returns an output. The verdict on the output is that on the body."""

import re
import textwrap

CLOTHES = {}


def clothes(function):
    CLOTHES[function.__name__.replace("_", " ")] = function
    return function


def fence(code, label="python"):
    return f"```{label}\n{code.rstrip()}\n```"


def imports_of(prompt):
    return "".join(re.findall(r"^(?:import|from) .*\n", prompt, re.M))


def without_imports(code):
    return re.sub(r"^(?:import|from) .*\n", "", code, flags=re.M).lstrip("\n")


WRONG_FUNCTION = "def {name}(*arguments, **keywords):\n    return 'a mistake'"
STUB = "def {name}(*arguments, **keywords):\n    pass"


# ---------------------------------------------------------------- the body, and what follows it


@clothes
def body(prompt, body, name):
    return body


@clothes
def body_then_function(prompt, body, name):
    return f"{body}\n\n\ndef another(value):\n    return value\n"


@clothes
def body_then_decorated_function(prompt, body, name):
    return (
        f"{body}\n\n@functools.lru_cache(maxsize=None)\ndef fib(n):\n"
        "    return n if n < 2 else fib(n - 1) + fib(n - 2)\n"
    )


@clothes
def body_then_class_and_print(prompt, body, name):
    return (
        f"{body}\n\nclass Stack:\n    def __init__(self):\n        self.items = []\n\nprint(Stack().items)\n"
    )


@clothes
def body_then_comments(prompt, body, name):
    return f"{body}\n\n# Test the function\n# It should work.\nprint({name}.__name__)\nassert False\n"


@clothes
def body_then_main_guard(prompt, body, name):
    return (
        f'{body}\n\nif __name__ == "__main__":\n    import doctest\n'
        f"    doctest.testmod()\n    {name}(input())\n"
    )


@clothes
def body_then_input(prompt, body, name):
    return f"{body}\n\nn = int(input())\nprint({name}(n))\n"


@clothes
def body_then_the_same_function_wrong(prompt, body, name):
    return f"{body}\n\n\n{WRONG_FUNCTION.format(name=name)}\n"


@clothes
def body_then_broken_off_function(prompt, body, name):
    return f'{body}\n\n\ndef next_task(numbers, limit):\n    """Find the numbers that\n    are smaller'


@clothes
def body_then_prose(prompt, body, name):
    return (
        f"{body}\n\nThis function loops over its input. It's simple, isn't it?\n"
        "- linear time\n- constant space\n"
    )


@clothes
def body_then_closing_fence(prompt, body, name):
    return f"{body}```\n\nThe function works as follows:\n\n1. It reads the input.\n2. It returns a value.\n"


@clothes
def body_then_usage_in_a_fence(prompt, body, name):
    return (
        f"{body}\n```\n\nHere is how to use it:\n```python\nfrom solution import {name}\n"
        f"print({name}(1, 2))\n```\n"
    )


@clothes
def body_then_unittest(prompt, body, name):
    return (
        f"{body}\n\nimport unittest\n\nclass Tests(unittest.TestCase):\n"
        "    def test(self):\n        self.fail()\n\nunittest.main()\n"
    )


@clothes
def body_then_next_problem(prompt, body, name):
    return (
        f'{body}\n\n"""\nWrite a function that reverses a string.\n"""\ndef reverse(s):\n    return s[::-1]\n'
    )


@clothes
def body_then_next_turn(prompt, body, name):
    return f"{body}<|im_end|>\n<|im_start|>user\nThanks! Now in Java.<|im_end|>\n"


@clothes
def body_with_end_token(prompt, body, name):
    return f"{body.rstrip()}<|endoftext|>"


@clothes
def body_with_sentence_token(prompt, body, name):
    return f"{body.rstrip()}</s>"


@clothes
def body_with_deepseek_token(prompt, body, name):
    return f"{body}<｜end▁of▁sentence｜>"


@clothes
def body_without_first_indentation(prompt, body, name):
    return body.lstrip()


@clothes
def body_without_any_indentation(prompt, body, name):
    return textwrap.dedent(body)


@clothes
def body_one_space_short(prompt, body, name):
    return body[1:] if body[:1] == " " else body


@clothes
def body_in_a_fence(prompt, body, name):
    return f"Here is the body:\n\n{fence(body)}\n"


@clothes
def body_in_a_fence_without_indentation(prompt, body, name):
    return f"```\n{textwrap.dedent(body)}```"


@clothes
def body_behind_a_sentence(prompt, body, name):
    return f"Here is the rest of the function:\n\n{body}\nIt returns the result.\n"


@clothes
def body_with_two_spaces(prompt, body, name):
    return re.sub(r"^( +)", lambda m: m[1][: len(m[1]) // 2], body, flags=re.M)


@clothes
def body_with_tabs(prompt, body, name):
    return re.sub(r"^((?:    )+)", lambda m: "\t" * (len(m[1]) // 4), body, flags=re.M)


# ---------------------------------------------------------------- whole programs without a fence


@clothes
def whole(prompt, body, name):
    return prompt + body


@clothes
def whole_without_imports(prompt, body, name):
    return without_imports(prompt + body)


@clothes
def whole_with_crlf(prompt, body, name):
    return (prompt + body).replace("\n", "\r\n")


@clothes
def whole_then_explanation(prompt, body, name):
    return f"{prompt}{body}\n\nExplanation: the function doesn't change its input. It's O(n).\n"


@clothes
def whole_between_sentences(prompt, body, name):
    return f"Sure! Here is a solution.\n\n{prompt}{body}\n\nI hope that this helps!\n"


@clothes
def whole_then_headed_explanation(prompt, body, name):
    return f"{prompt}{body}\n### Explanation\n\n- `{name}` returns the result.\n\n**Complexity**: O(n)\n"


@clothes
def whole_then_tests_that_fail(prompt, body, name):
    return f"{prompt}{body}\n\nassert {name} is None\nprint({name}(undefined))\n"


@clothes
def whole_then_main(prompt, body, name):
    return f"{prompt}{body}\n\ndef main():\n    text = input()\n    print({name}(text))\n\nmain()\n"


@clothes
def imports_between_sentences(prompt, body, name):
    program = without_imports(prompt + body)
    return (
        f"First the imports:\n\nimport math\n{imports_of(prompt)}\nThen the function:\n\n"
        f"{program}\nThat's it.\n"
    )


@clothes
def whole_in_python_tags(prompt, body, name):
    return f"[PYTHON]\n{prompt}{body}\n[/PYTHON]"


@clothes
def whole_in_begin_and_done(prompt, body, name):
    return (
        f"[BEGIN]\n{prompt}{body}\n[DONE]\n\nYou are an expert Python programmer.\n"
        f"[BEGIN]\n{STUB.format(name='f')}\n[DONE]"
    )


@clothes
def whole_before_done(prompt, body, name):
    return f"{prompt}{body}[DONE]\n\n{WRONG_FUNCTION.format(name=name)}\n[DONE]\n"


@clothes
def whole_in_code_tags(prompt, body, name):
    return f"<code>{prompt}{body}</code>\nThis is the code."


@clothes
def whole_in_answer_tags(prompt, body, name):
    return (
        f"<think>\nI could return 1.\n{STUB.format(name=name)}\n</think>\n<answer>\n{prompt}{body}\n</answer>"
    )


@clothes
def whole_indented_as_markdown(prompt, body, name):
    return f"Solution:\n\n{textwrap.indent(prompt + body, '    ')}\n"


# ---------------------------------------------------------------- fences


@clothes
def fenced(prompt, body, name):
    return fence(prompt + body)


@clothes
def fenced_between_sentences(prompt, body, name):
    return f"Here is the solution:\n\n{fence(prompt + body)}\n\nIt runs in linear time."


@clothes
def fenced_py(prompt, body, name):
    return fence(prompt + body, "py")


@clothes
def fenced_Python3(prompt, body, name):
    return fence(prompt + body, "Python3")


@clothes
def fenced_without_label(prompt, body, name):
    return fence(prompt + body, "")


@clothes
def fenced_with_attributes(prompt, body, name):
    return fence(prompt + body, 'python title="solution.py"')


@clothes
def fenced_with_tildes(prompt, body, name):
    return f"~~~python\n{prompt}{body}\n~~~"


@clothes
def fenced_with_crlf(prompt, body, name):
    return f"Sure:\n{fence(prompt + body)}\nDone.\n".replace("\n", "\r\n")


@clothes
def fence_behind_words_on_its_line(prompt, body, name):
    return f"Here it is: ```python\n{prompt}{body}```"


@clothes
def fence_not_closed(prompt, body, name):
    return f"Sure!\n```python\n{prompt}{body}"


@clothes
def fence_not_closed_then_explanation(prompt, body, name):
    return f"```python\n{prompt}{body}\n\nThis function is simple. It doesn't need more.\n"


@clothes
def fence_not_closed_then_another(prompt, body, name):
    return f"```python\n{prompt}{body}\n\nExample:\n```python\nprint({name}(1))\n```\n"


@clothes
def fence_not_opened(prompt, body, name):
    return f"{prompt}{body}```\nThis function returns a value.\n```python\nprint(1)\n```\n"


@clothes
def fence_in_a_list(prompt, body, name):
    return f"1. Write it:\n   {fence(prompt + body).replace(chr(10), chr(10) + '   ')}\n2. Run it.\n"


@clothes
def fence_in_a_docstring(prompt, body, name):
    helper = (
        'def helper(x):\n    """Doubles.\n\n    ```python\n    helper(2)\n    ```\n    """\n    return 2 * x'
    )
    return fence(f"{imports_of(prompt)}{helper}\n\n{without_imports(prompt)}{body}")


@clothes
def fence_in_a_docstring_without_a_fence(prompt, body, name):
    return (
        f'{prompt}{body}\n\ndef helper(x):\n    """\n    ```\n    helper(2)\n    ```\n'
        '    """\n    return 2 * x\n'
    )


@clothes
def imports_in_a_fence_of_their_own(prompt, body, name):
    imports = f"import math\n{imports_of(prompt)}"
    return f"Imports:\n{fence(imports)}\nFunction:\n{fence(without_imports(prompt + body))}\n"


@clothes
def helper_in_a_fence_of_its_own(prompt, body, name):
    moved = body.replace("return", "return same_value(", 1) if "\n" not in body.strip() else None
    if moved is None:
        return fence(prompt + body)
    helper = "def same_value(value):\n    return value"
    return f"A helper:\n{fence(helper)}\nThe function:\n{fence(prompt + moved.rstrip() + ')')}\n"


@clothes
def usage_in_the_fence(prompt, body, name):
    return fence(
        f"{prompt}{body}\n\n# Example usage:\nresult = {name}\nprint(result.__name__)\n"
        "assert result(1, 2, 3) == 0"
    )


@clothes
def usage_that_reads_input_in_the_fence(prompt, body, name):
    return fence(f"{prompt}{body}\n\nvalue = input('Enter a value: ')\nprint({name}(value))")


@clothes
def usage_in_a_second_fence(prompt, body, name):
    return (
        f"{fence(prompt + body)}\nUse it:\n```python\nfrom my_module import {name}\n\n"
        f"print({name}(3))\n```\nOutput:\n```\n3\n```"
    )


@clothes
def installation_before(prompt, body, name):
    return f"Install:\n```bash\npip install nothing\n```\n{fence(prompt + body)}"


@clothes
def common_mistake_behind(prompt, body, name):
    return (
        f"{fence(prompt + body)}\nA common mistake is to write:\n"
        f"{fence(WRONG_FUNCTION.format(name=name))}\nDon't do that."
    )


@clothes
def common_mistake_before(prompt, body, name):
    return (
        f"A common mistake:\n{fence(WRONG_FUNCTION.format(name=name))}\nThe right way:\n"
        f"{fence(prompt + body)}"
    )


@clothes
def stub_before(prompt, body, name):
    return f"We are given:\n{fence(STUB.format(name=name))}\nSolution:\n{fence(prompt + body)}"


@clothes
def prompt_quoted_before(prompt, body, name):
    return f"The task:\n{fence(prompt + '    pass')}\n\nSolution:\n{fence(prompt + body)}"


@clothes
def correction_behind(prompt, body, name):
    wrong = fence(WRONG_FUNCTION.format(name=name))
    return (
        f"{wrong}\nWait, that is not what was asked. Here is the corrected version:\n{fence(prompt + body)}"
    )


@clothes
def two_alternatives(prompt, body, name):
    return (
        f"{fence(prompt + body)}\n\nAlternatively, with the same idea:\n\n"
        f"{fence(without_imports(prompt + body))}\n"
    )


@clothes
def wrong_alternative_behind(prompt, body, name):
    return f"{fence(prompt + body)}\n\nAlternatively:\n\n{fence(WRONG_FUNCTION.format(name=name))}\n"


@clothes
def other_language_behind(prompt, body, name):
    return f"{fence(prompt + body)}\nIn JavaScript:\n```javascript\nfunction {name}(x) {{ return x; }}\n```\n"


@clothes
def thinking_before(prompt, body, name):
    return (
        f"<think>\nLet me see.\n{fence(WRONG_FUNCTION.format(name=name))}\n</think>\n\n{fence(prompt + body)}"
    )


@clothes
def thinking_without_its_start(prompt, body, name):
    return f"Maybe:\n{WRONG_FUNCTION.format(name=name)}\nNo.</think>\n{prompt}{body}"


@clothes
def fence_and_end_token(prompt, body, name):
    return f"<|im_start|>assistant\n{fence(prompt + body)}<|im_end|>"


@clothes
def interpreter_session(prompt, body, name):
    lines = [line for line in (prompt + body).split("\n")]
    session = "\n".join((">>> " if line[:1].strip() else "... ") + line for line in lines)
    return f"```pycon\n{session}\n```"


@clothes
def future_import(prompt, body, name):
    return fence(f"from __future__ import annotations\n{prompt}{body}")


@clothes
def module_docstring_and_author(prompt, body, name):
    return fence(f'#!/usr/bin/env python3\n"""Solution."""\n__author__ = "me"\n\n{prompt}{body}')
