"""Running code that a model has written, and the programs made of it."""

import time

import pytest

from titan_moe.analysis.evaluate.code import judged, passes

DOCUMENT = {
    "prompt": "def double(x):\n",
    "test": "def check(candidate):\n    assert candidate(4) == 8\n",
    "entry_point": "double",
}


@pytest.mark.parametrize(
    ("program", "passed"),
    [
        ("assert sorted([2, 1]) == [1, 2]", True),
        ("import sys; print('1' * 70000); assert True", True),
        ("assert 1 == 2", False),
        ("def f(:", False),
        ("import sys; sys.exit(0)", False),
        ("import os; os._exit(0)", False),
        ("x = bytearray(2 << 30)", False),
        ("open('file', 'wb').write(bytes(2 << 20))", False),
    ],
)
def test_a_program_passes_only_when_it_reaches_its_end_within_the_limits(program: str, passed: bool) -> None:
    assert passes(program) is passed


def test_an_endless_program_and_its_children_are_ended() -> None:
    began = time.monotonic()
    assert not passes(
        "import subprocess, sys; subprocess.run([sys.executable, '-c', 'while True: pass'], check=True)", seconds=1
    )
    assert not passes("while True: pass", seconds=1)
    assert time.monotonic() - began < 60


def test_programs_are_those_of_humaneval_and_mbpp() -> None:
    right, wrong = ({"doc": DOCUMENT, "filtered_resps": [f"    return {text}\n"]} for text in ("2 * x", "x"))
    assert judged("humaneval", [right, wrong]) == [True, False]
    document = {"test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]}
    texts = ("def add(a, b):\n    return a + b\n", "def add(a, b):\n    return 3\n")
    assert judged("mbpp", [{"doc": document, "filtered_resps": [text]} for text in texts]) == [True, False]
