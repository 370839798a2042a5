"""Runs code that a model has written, in a child process with limits, and tells whether it passes its tests.

The limits stop endless loops, large allocations and large files. They are no sandbox: the code can read what this user can.
"""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from typing import Any

SECONDS = 10
MEMORY = 1 << 30  # bytes of address space
FILE = 1 << 20  # bytes of a written file
# The child sets its own limits before it runs the program, which it reads from stdin.
CHILD = """
import resource, sys
for name, limit in ((resource.RLIMIT_AS, {memory}), (resource.RLIMIT_CPU, {seconds}), (resource.RLIMIT_FSIZE, {file}),
                    (resource.RLIMIT_CORE, 0)):
    resource.setrlimit(name, (limit, limit))
program = sys.stdin.read()
sys.stdin = None
exec(compile(program, "program", "exec"), {{"__name__": "__main__"}})
sys.__stdout__.write("\\n{token}")
sys.__stdout__.flush()
"""


def program_of(task: str, document: dict[str, Any], text: str) -> str:
    """A task's document and the model's text for it as a program that raises an error unless all tests pass.

    The same programs as in lm-evaluation-harness. Raises KeyError for another task."""
    parts = {
        "humaneval": lambda: f"{document['prompt']}{text}\n{document['test']}\ncheck({document['entry_point']})\n",
        "mbpp": lambda: "\n".join([text, *document["test_list"], ""]),
    }
    return parts[task]()


def passes(program: str, seconds: int = SECONDS) -> bool:
    """Whether a program runs to its end without an error, in its own process, session and directory.

    A program that leaves early, by `sys.exit()` say, does not reach its end."""
    token = secrets.token_hex(16)
    child = CHILD.format(memory=MEMORY, seconds=seconds, file=FILE, token=token)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", child],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": os.defpath, "HOME": folder, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(program.encode("utf-8", "replace"), timeout=2 * seconds)
        finally:
            end_session(process)
        output.seek(max(0, output.seek(0, os.SEEK_END) - len(token)))
        return process.returncode == 0 and output.read() == token.encode()


def end_session(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and all that it started in its session, and waits for it."""
    with contextlib.suppress(ProcessLookupError):  # all have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def judged(task: str, samples: Iterable[dict[str, Any]]) -> list[bool]:
    """Whether the model's text passes, per document. samples: of the harness."""
    return [passes(program_of(task, one["doc"], one["filtered_resps"][0])) for one in samples]
