"""Writes requirements.txt and requirements-torch.txt: every package by version, with the hashes of its files.

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
REQUIREMENTS, TORCH = ROOT / "requirements.txt", ROOT / "requirements-torch.txt"
# torch comes in builds with other files (for CPUs, for other versions of CUDA), so set-up may take it from elsewhere.
WITH_TORCH = re.compile(r"(torch|triton|nvidia-.*|cuda-.*)==")
HEADERS = {
    REQUIREMENTS: "# The tested set without torch, with hashes. Made by scripts/lock.py; ranges that should work: "
    "pyproject.toml.\n"
    "#   pip install --require-hashes --no-deps -r requirements.txt -r requirements-torch.txt\n",
    TORCH: "# torch and its CUDA libraries, with hashes: the build that package registries have. Made by scripts/lock.py.\n",
}


def main() -> None:
    """Resolves pyproject.toml with uv, and splits the result."""
    with tempfile.TemporaryDirectory() as folder:
        lock = Path(folder) / "lock.txt"  # uv keeps the versions that it finds here
        lock.write_text("".join(path.read_text() for path in HEADERS if path.exists()))
        uv = [sys.executable, "-m", "uv", "pip", "compile", "--universal", "--python-version=3.10", "--generate-hashes"]
        uv += ["--no-build", "--no-annotate", "--no-header", "--quiet", "--extra=dev", f"--output-file={lock}"]
        subprocess.run([*uv, *sys.argv[1:], str(ROOT / "pyproject.toml"), "-"], input=b"setuptools\n", check=True)
        entries = re.split(r"\n(?=\S)", lock.read_text().strip())
    entries = [entry for entry in entries if "sys_platform == 'win32'" not in entry]
    for path, header in HEADERS.items():
        chosen = [entry for entry in entries if (WITH_TORCH.match(entry) is not None) == (path == TORCH)]
        path.write_text("\n".join([header, *chosen]) + "\n")
        print(f"{path.name}: {len(chosen)} packages")


if __name__ == "__main__":
    main()
