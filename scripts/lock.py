"""Writes requirements.txt and requirements-torch.txt, -dev.txt and -hf.txt: packages by version, with hashes of their files.

    python -m pip install uv && python scripts/lock.py                    after a change of pyproject.toml
    python scripts/lock.py --upgrade-package=numpy                        takes the newest numpy that pyproject.toml allows

Versions stay unless pyproject.toml forbids them. The files hold for Linux and macOS, on x86-64 and arm64, from Python 3.10 on.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS, TORCH, DEV, HF = (ROOT / f"requirements{name}.txt" for name in ("", "-torch", "-dev", "-hf"))
# torch comes in builds with other files (for CPUs, for other versions of CUDA), so set-up may take it from elsewhere.
WITH_TORCH = re.compile(r"(torch|triton|nvidia-.*|cuda-.*)==")
HEADERS = {
    REQUIREMENTS: "# The tested set without torch, with hashes. Made by scripts/lock.py; ranges that should work: "
    "pyproject.toml.\n"
    "#   pip install --require-hashes --no-deps -r requirements.txt -r requirements-torch.txt\n",
    DEV: "# What the tests need beside requirements.txt, with hashes. Made by scripts/lock.py.\n",
    HF: "# What the extra hf needs beside requirements.txt, with hashes; all of it is in requirements-dev.txt too. Made by "
    "scripts/lock.py.\n",
    TORCH: "# torch and its CUDA libraries, with hashes: the build that package registries have. Made by scripts/lock.py.\n",
}


def main() -> None:
    """Resolves pyproject.toml with uv, with the extra `dev`, with `hf` and without, and splits the result."""
    known = "".join(path.read_text() for path in HEADERS if path.exists() and path != HF)  # DEV has all of HF
    entries = resolve(known, "--extra=dev", *sys.argv[1:])
    needed, hf = (
        {name_of(entry) for entry in resolve("\n".join(entries), *options)} for options in ((), ("--extra=hf",))
    )
    for path, header in HEADERS.items():
        chosen = [entry for entry in entries if path in files_of(entry, needed, hf)]
        path.write_text("\n".join([header, *chosen]) + "\n")
        print(f"{path.name}: {len(chosen)} packages")


def resolve(known: str, *options: str) -> list[str]:
    """The entries of a lock. known: entries whose versions stay where they can."""
    with tempfile.TemporaryDirectory() as folder:
        lock = Path(folder) / "lock.txt"  # uv keeps the versions that it finds here
        lock.write_text(known)
        uv = [sys.executable, "-m", "uv", "pip", "compile", "--universal", "--python-version=3.10", "--generate-hashes"]
        uv += ["--no-annotate", "--no-header", "--quiet", f"--output-file={lock}", *options]
        subprocess.run([*uv, str(ROOT / "pyproject.toml"), "-"], input=b"setuptools\n", check=True)
        entries = re.split(r"\n(?=\S)", lock.read_text().strip())
    return [entry for entry in entries if "sys_platform == 'win32'" not in entry]


def name_of(entry: str) -> str:
    return entry.partition("==")[0]


def files_of(entry: str, needed: set[str], hf: set[str]) -> list[Path]:
    """The files that an entry belongs in. needed: packages that training needs. hf: and those with the extra `hf`."""
    if name_of(entry) == "triton":  # builds of torch for CPUs come without it, and its kernels are tested there
        return [TORCH, DEV]
    if WITH_TORCH.match(entry):
        return [TORCH]
    if name_of(entry) in needed:
        return [REQUIREMENTS]
    return [DEV, HF] if name_of(entry) in hf else [DEV]


if __name__ == "__main__":
    main()
