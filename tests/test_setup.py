"""The one-time set-up: killed at any time, started twice, asked for something else; and the lock that it installs.

The set-up runs for real, in a checkout of two small packages that lie in a folder, without a network.
"""

import base64
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from tests.helpers.commands import ROOT

BACKEND = '''
"""Builds the checkout's own editable wheel."""
import os, time, zipfile
import sys
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

def build_editable(folder, config_settings=None, metadata_directory=None):
    name = "titan_moe-1.0-py3-none-any.whl"
    while os.path.exists("hang"):
        time.sleep(0.05)
    with zipfile.ZipFile(os.path.join(folder, name), "w") as wheel:
        info = "titan_moe-1.0.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\\nName: titan-moe\\nVersion: 1.0\\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(f"{info}/entry_points.txt", "[console_scripts]\\ntitan-moe = setupprobe:main\\n")
        wheel.writestr(f"{info}/RECORD", "")
    return name
'''
PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
[project]
name = "titan-moe"
version = "1.0"
dependencies = [
    "torch>=1.0",
    "setupprobe>=1.0",
]
[project.optional-dependencies]
dev = [
    "testprobe>=1.0",
    "extraprobe>=1.0",
]
"""


def wheel(folder: Path, name: str, version: str, text: str = "def main(): pass\n") -> str:
    """Writes the wheel of a package of one module, and returns its hash as requirements have it."""
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": text,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for file, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content.encode()).digest()).rstrip(b"=").decode()
        record += f"{file},sha256={digest},{len(content.encode())}\n"
    with zipfile.ZipFile(path, "w") as archive:
        for file, content in {**files, f"{info}/RECORD": record}.items():
            archive.writestr(file, content)
    return f"--hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


class Checkout:
    def __init__(self, root: Path) -> None:
        self.root, self.venv = root / "checkout", root / "checkout" / ".venv"
        self.wheels = root / "wheels"
        self.wheels.mkdir()
        (self.root / "scripts").mkdir(parents=True)
        for name in ("setup.sh", "check_environment.py"):
            shutil.copy(ROOT / "scripts" / name, self.root / "scripts")
        (self.root / "backend.py").write_text(BACKEND)
        (self.root / "pyproject.toml").write_text(PYPROJECT)
        self.require("1.0", "1.0")

    def require(self, probe: str, torch: str) -> None:
        probe_hash, torch_hash = wheel(self.wheels, "setupprobe", probe), wheel(self.wheels, "torch", torch)
        (self.root / "requirements.txt").write_text(f"setupprobe=={probe} \\\n    {probe_hash}\n")
        (self.root / "requirements-torch.txt").write_text(f"torch=={torch} \\\n    {torch_hash}\n")
        tests, extra = (
            f"{name}==1.0 \\\n    {wheel(self.wheels, name, '1.0')}\n" for name in ("testprobe", "extraprobe")
        )
        (self.root / "requirements-dev.txt").write_text(tests + extra)
        (self.root / "requirements-hf.txt").write_text(extra)

    def start(self, options: str = "", then: str = "") -> subprocess.Popen[str]:
        settings = {
            **os.environ,
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(self.wheels),
            "PIP_CONFIG_FILE": os.devnull,
        }
        command = ["bash", "-c", f'source "{self.root}/scripts/setup.sh"; _setup {options} && echo "$PYTHON" {then}']
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, env=settings, text=True, start_new_session=True, **pipes)

    def set_up(self, options: str = "", then: str = "") -> tuple[int, str]:
        process = self.start(options, then)
        output, errors = process.communicate(timeout=120)
        return process.returncode, output + errors

    def has(self, module: str) -> bool:
        return bool(list(self.venv.glob(f"lib/*/site-packages/{module}.py")))

    def versions(self) -> list[str]:
        """The installed versions of the two packages and of the checkout's own."""
        code = "from importlib.metadata import version as v; print(*map(v, ('setupprobe', 'torch', 'titan-moe')))"
        found = subprocess.run([self.venv / "bin" / "python", "-c", code], capture_output=True, text=True, check=True)
        return found.stdout.split()


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_set_up_that_was_ended_between_its_installations_begins_anew(checkout: Checkout, number: int) -> None:
    (checkout.root / "hang").touch()
    process = checkout.start()
    end = time.monotonic() + 60
    while not list(checkout.venv.glob("lib/*/site-packages/torch.py")):
        assert time.monotonic() < end
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    time.sleep(1)
    os.killpg(process.pid, number)
    process.communicate(timeout=30)
    assert process.returncode != 0
    assert not (checkout.venv / "bin" / "titan-moe").exists()
    (checkout.root / "hang").unlink()
    status, text = checkout.set_up()
    assert status == 0, text
    assert "Set-up done." in text
    assert checkout.versions() == ["1.0", "1.0", "1.0"]
    assert (checkout.venv / "bin" / "titan-moe").exists()
    assert checkout.set_up() == (0, f"{checkout.venv}/bin/python\n")  # and does nothing the next time


@pytest.mark.slow
def test_two_set_ups_at_once_install_once(checkout: Checkout) -> None:
    processes = [checkout.start(), checkout.start()]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert sorted("One-time set-up" in text for text in errors) == [False, True]


@pytest.mark.slow
def test_a_set_up_that_is_asked_for_something_else_updates_and_keeps_other_packages(checkout: Checkout) -> None:
    assert checkout.set_up()[0] == 0
    (checkout.venv / "mine").touch()
    checkout.require("1.1", "1.1")
    status, text = checkout.set_up()
    assert status == 0, text
    assert checkout.versions() == ["1.1", "1.1", "1.0"]
    assert (checkout.venv / "mine").exists()


@pytest.mark.slow
def test_what_the_tests_need_is_installed_when_they_are_to_run(checkout: Checkout) -> None:
    packages = checkout.venv / "lib"
    assert checkout.set_up()[0] == 0
    (checkout.venv / "mine").touch()
    assert not list(packages.glob("*/site-packages/testprobe.py"))
    for options, installs in (("--dev", True), ("", False), ("--dev", False)):
        status, text = checkout.set_up(options)
        assert status == 0, text
        assert ("One-time set-up" in text) == installs
        assert list(packages.glob("*/site-packages/testprobe.py"))
    assert (checkout.venv / "mine").exists()


ACTIVE = '&& PATH="$_venv/bin:$PATH" && hash -r && _setup'
ADD = "&& _is_own && { _has_extra hf || _add_extra hf; }"


@pytest.mark.slow
def test_an_extra_is_added_once_and_stays_when_the_lock_changes(checkout: Checkout) -> None:
    assert checkout.set_up()[0] == 0
    assert not checkout.has("extraprobe")
    processes = [checkout.start("", ADD), checkout.start("", ADD)]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert sorted("requirements-hf.txt: installing them into .venv" in text for text in errors) == [False, True]
    assert checkout.has("extraprobe")
    assert not checkout.has("testprobe")
    assert checkout.set_up("", ADD) == (0, f"{checkout.venv}/bin/python\n")
    assert checkout.set_up("", f"{ACTIVE} {ADD} && echo own")[1].endswith("own\n")  # also when it is activated
    # An update of the environment installs what its own extras are locked to now.
    (checkout.root / "requirements-hf.txt").write_text(
        f"extraprobe==1.1 \\\n    {wheel(checkout.wheels, 'extraprobe', '1.1')}\n"
    )
    status, text = checkout.set_up("", ADD)
    assert status == 0, text
    assert list(checkout.venv.glob("lib/*/site-packages/extraprobe-1.1.dist-info"))


@pytest.mark.slow
def test_an_extra_that_cannot_be_installed_is_tried_again(checkout: Checkout) -> None:
    good = (checkout.wheels / "extraprobe-1.0-py3-none-any.whl").read_bytes()
    wheel(checkout.wheels, "extraprobe", "1.0", "def main(): 'another file'\n")
    assert checkout.set_up()[0] == 0
    status, text = checkout.set_up("", ADD)
    assert status == 1
    assert "HASHES" in text
    assert "error: they could not be installed" in text
    (checkout.wheels / "extraprobe-1.0-py3-none-any.whl").write_bytes(good)
    assert checkout.set_up("", ADD)[0] == 0
    assert checkout.has("extraprobe")


@pytest.mark.slow
def test_nothing_is_added_to_an_environment_that_set_up_did_not_make(checkout: Checkout) -> None:
    """And one with the packages of the tests has all extras."""
    assert checkout.set_up("--dev")[0] == 0
    assert "requirements-hf" not in checkout.set_up("", ADD)[1]
    (checkout.venv / "set-up").unlink()
    status, text = checkout.set_up("", ADD)
    assert status == 1
    assert text == f"{checkout.venv}/bin/python\n"
    assert not (checkout.venv / "extras").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["setupprobe", "torch"])
def test_a_package_with_another_hash_is_refused(checkout: Checkout, name: str) -> None:
    wheel(checkout.wheels, name, "1.0", "def main(): 'another file'\n")
    status, text = checkout.set_up()
    assert status == 1
    assert "error: the set-up failed" in text
    assert "HASHES" in text


@pytest.mark.slow
def test_another_build_of_torch_is_taken_where_pip_is_told_so(checkout: Checkout) -> None:
    wheel(checkout.wheels, "torch", "1.0+cpu")
    status, text = checkout.set_up()
    assert status == 0, text
    assert checkout.versions() == ["1.0", "1.0+cpu", "1.0"]


def pins() -> dict[str, list[str]]:
    """The lock's entries by package name."""
    found: dict[str, list[str]] = {}
    for name in ("requirements.txt", "requirements-torch.txt", "requirements-dev.txt"):
        text = re.sub(r"^#.*\n", "", (ROOT / name).read_text(), flags=re.MULTILINE).strip()
        for entry in re.split(r"\n(?=\S)", text):
            package = re.match(r"([a-z0-9-]+)==", entry)
            assert package, entry
            found.setdefault(package.group(1), []).append(entry)
    return found


def test_every_package_is_locked_by_version_and_hash() -> None:
    for entries in pins().values():
        for entry in entries:
            assert re.search(r"--hash=sha256:[0-9a-f]{64}\b", entry), entry
    assert "://" not in "".join(map(str, pins().values()))


def test_an_extras_lock_is_a_part_of_that_of_the_tests() -> None:
    extra, tests = ((ROOT / f"requirements-{name}.txt").read_text().split("\n\n", 1)[1] for name in ("hf", "dev"))
    entries, known = (re.split(r"\n(?=\S)", text.strip()) for text in (extra, tests))
    assert set(entries) <= set(known)
    assert any(entry.startswith("datasets==") for entry in entries)


def test_the_lock_is_within_the_ranges_of_pyproject() -> None:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import check_environment
    finally:
        sys.path.pop(0)
    text, locked = (ROOT / "pyproject.toml").read_text(), pins()
    for requirement in check_environment.list_in(text, "dependencies") + check_environment.list_in(text, "dev"):
        requirement, _, _ = requirement.partition(";")
        name = re.split(r"[<>=!~ ]", requirement, maxsplit=1)[0]
        for entry in locked[name]:
            version = re.match(r"[^=]*==([^ ]*)", entry)
            assert version
            assert check_environment.in_range(requirement, version.group(1)), f"{requirement}: {entry.splitlines()[0]}"
