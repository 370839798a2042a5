"""The directory of the compiled kernels: who may write to it, and what is never loaded from it."""

import hashlib
import os
import pwd
import shutil
import stat
from pathlib import Path

import pytest
import torch

from torchtitan_ext.ops import build, native

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C compiler here")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that the real compiler made."""
    folder = tmp_path_factory.mktemp("compiled")
    compiler = shutil.which(os.environ.get("CC", "gcc")) or shutil.which("cc")
    assert compiler is not None
    return build._compile(compiler, folder, "key")


@pytest.fixture
def cache(tmp_path: Path, compiled: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a compiler that is quick: it copies `compiled` and adds a line to `calls`."""
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\necho >>{tmp_path}/calls\nfor last; do :; done\ncp {compiled} "$last"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setenv("TITAN_MOE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def calls(cache: Path) -> int:
    """How often the compiler ran."""
    return len((cache.parent / "calls").read_text().splitlines())


def kept(cache: Path) -> Path:
    """The one library in the cache, whose content has the checksum in its name."""
    (path,) = cache.glob("kernels-*/*")
    assert path.stem.rpartition("-")[2] == hashlib.sha256(path.read_bytes()).hexdigest()
    return path


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_the_library_is_kept_where_only_this_user_can_write(cache: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        build.load()
        build.load()
    finally:
        os.umask(before)
    assert calls(cache) == 1
    assert stat.S_IMODE(kept(cache).parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(kept(cache).stat().st_mode) == 0o600


DAMAGE = {
    "empty": lambda raw: raw[:0],
    "truncated": lambda raw: raw[: len(raw) // 2],
    "a bit flipped": lambda raw: raw[:5000] + bytes([raw[5000] ^ 64]) + raw[5001:],
}


@pytest.mark.parametrize("kind", [*DAMAGE, "writable by others", "a link", "another user's"])
def test_a_library_that_is_damaged_or_not_safe_is_compiled_again(
    cache: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    build.load()
    path = kept(cache)
    if kind in DAMAGE:
        path.write_bytes(DAMAGE[kind](path.read_bytes()))
    elif kind == "writable by others":
        path.chmod(0o620)
    elif kind == "a link":
        path.rename(cache / "moved")
        path.symlink_to(cache / "moved")
    elif os.getuid() == 0:
        os.chown(path, 65534, 65534)
    else:
        pytest.skip("only root can give a file away")
    build.load()
    assert calls(cache) == 2
    assert "compiled again" in caplog.text
    found = kept(cache).lstat()
    assert stat.S_ISREG(found.st_mode)
    assert found.st_uid == os.getuid()
    assert stat.S_IMODE(found.st_mode) == 0o600
    caplog.clear()
    build.load()
    assert calls(cache) == 2
    assert not caplog.records


@pytest.mark.parametrize("kind", ["writable by others", "a link", "another user's", "a file", "no home"])
def test_without_a_safe_directory_the_library_is_compiled_for_this_process(
    cache: Path, kind: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    build.load()
    folder = kept(cache).parent
    reason = str(folder)
    if kind == "writable by others":
        folder.chmod(0o777)
    elif kind == "a link":
        folder.rename(cache / "moved")
        folder.symlink_to(cache / "moved")
    elif kind == "a file":
        monkeypatch.setenv("TITAN_MOE_CACHE", str(tmp_path / "compiler"))
        reason = str(tmp_path / "compiler")
    elif kind == "no home":
        for name in ("TITAN_MOE_CACHE", "XDG_CACHE_HOME", "HOME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
        reason = "home"
    elif os.getuid() == 0:
        os.chown(folder, 65534, 65534)
    else:
        pytest.skip("only root can give a directory away")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    library = build.load()
    assert library.token_gram_float
    assert calls(cache) == 2
    (record,) = caplog.records
    assert reason in record.getMessage()
    assert not list(tmp_path.glob("titan-moe-kernels-*"))


def test_the_directory_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    name = f"kernels-{os.getuid()}"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TITAN_MOE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert build._private_folder() == tmp_path / "home/.cache/titan_moe" / name
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert build._private_folder() == tmp_path / "xdg/titan_moe" / name
    monkeypatch.setenv("TITAN_MOE_CACHE", "~/own")
    assert build._private_folder() == tmp_path / "home/own" / name


def test_the_warning_says_what_the_compiler_said(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    (cache.parent / "compiler").write_text("#!/bin/sh\necho no such processor >&2\nexit 1\n")
    native.library.cache_clear()
    try:
        assert native.library() is None
    finally:
        native.library.cache_clear()
    (record,) = caplog.records
    assert "no such processor" in record.getMessage()


def test_the_kernels_can_be_switched_off(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    native.library.cache_clear()
    monkeypatch.setenv("TITAN_MOE_KERNELS", "0")
    try:
        assert not native.supports("token_gram", torch.ones(1))
    finally:
        native.library.cache_clear()
    assert not caplog.records
