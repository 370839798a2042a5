"""Tokenizers and token shards that are there already, known by their fingerprints: what a run needs when its text is gone."""

import hashlib
from pathlib import Path

from titan_moe.data.prepare import Prepared
from titan_moe.data.shards import read_manifest
from titan_moe.data.tokenizer import TOKENIZER_BYTES, Tokenizer, is_json, tokenizer_of
from titan_moe.errors import UserError
from titan_moe.runtime.files import read_file

TOKENIZER_FILE = "tokenizer.model"
JSON_FILE = "tokenizer.json"


def stored_tokenizer(run: Path, fingerprint: str, cache: Path) -> Tokenizer | None:
    """The tokenizer with this fingerprint, from a run directory or else from the cache; None if neither has it.

    Raises UserError when the run directory has another one, or one that can't be read."""
    for path in (run / JSON_FILE, run / TOKENIZER_FILE):
        if not path.is_symlink() and not path.exists():
            continue
        try:
            model = read_file(path, TOKENIZER_BYTES)
        except OSError as error:
            raise UserError(f"{path}: can't be read: {error.strerror}") from error
        if hashlib.sha256(model).hexdigest() != fingerprint:
            raise UserError(
                f"{path}: not the tokenizer that the run's checkpoints were trained with; bring that one back"
            )
        return tokenizer_of(model, str(path))
    for path in sorted((cache / "tokenizers").glob("*.model")):
        try:
            model = read_file(path, TOKENIZER_BYTES)
        except OSError:  # another user's, perhaps; the next one may be the one
            continue
        if hashlib.sha256(model).hexdigest() == fingerprint:
            return Tokenizer(model, str(path))
    return None


def tokenizer_file(model: bytes) -> str:
    """The name that a tokenizer's file has in a run directory."""
    return JSON_FILE if is_json(model) else TOKENIZER_FILE


def stored_text(data: str, tokenizer: Tokenizer, cache: Path) -> Prepared | None:
    """The token shards with this fingerprint, made with this tokenizer, if the cache has them."""
    for path in sorted((cache / "tokens").glob("[!.]*/manifest.json")):
        try:
            manifest = read_manifest(path.parent)
        except UserError:  # damaged, or of another version: not these
            continue
        if (manifest.fingerprint, manifest.tokenizer) == (data, tokenizer.fingerprint):
            return Prepared(tokenizer, path.parent, manifest)
    return None
