"""The tokenizer and text of a run: its own, those of the weights that it starts from, or new ones from the configuration.

Nothing here imports torch.
"""

import logging
from pathlib import Path
from typing import Any

from titan_moe.checkpoint.run_dir import RunDir, newest_of
from titan_moe.checkpoint.state import State, read_state
from titan_moe.config.extensions import is_streamed
from titan_moe.config.tables import Config
from titan_moe.config.trust import BUILT_IN_CORPORA
from titan_moe.data.prepare import Prepared, cache_root, prepare
from titan_moe.data.stored import stored_text, stored_tokenizer
from titan_moe.data.tokenizer import Tokenizer
from titan_moe.errors import UserError

log = logging.getLogger("titan_moe")


def prepare_run(config: Config, run_dir: RunDir, newest: Path | None = None) -> Prepared:
    """Tokenizer and text of a run that starts or goes on. Raises UserError.

    newest: the run's newest checkpoint, if the caller has looked for it.

    A run that goes on keeps the tokenizer in its directory, and a run that starts from other weights takes theirs, unless
    `tokenizer.path` is given, whose fingerprint is then compared with the checkpoint's. A run whose text is gone goes on with
    the token shards in the cache."""
    newest = newest or run_dir.newest()
    key = "load_path" if config.checkpoint.load_path else "upcycle_path"
    start = getattr(config.checkpoint, key)
    if newest is None and not start:
        return prepare(config)
    checkpoint = newest or newest_of(start)
    state = run_dir.state(checkpoint) if newest else read_state(checkpoint, f"checkpoint.{key} = {start!r}")
    tokenizer = (
        None if config.tokenizer.path else stored_tokenizer(run_of(checkpoint), state.tokenizer, cache_root(config))
    )
    streamed = is_streamed(config.data.corpus)
    if newest is not None and tokenizer is not None and (streamed or text_is_gone(config, state)):
        prepared = stored_text(state.data, tokenizer, cache_root(config))
        if prepared is not None and not (streamed and prepared.manifest.stream):
            # Of a stream: an earlier version tokenised it before training, and the run goes on in the order of that version.
            why = "was tokenised before it was streamed" if streamed else "is gone"
            log.warning(f"data.corpus = {config.data.corpus!r} {why}; going on with its tokens in {prepared.folder}")
            return prepared
    return prepare(config, tokenizer=tokenizer)


def text_is_gone(config: Config, state: State) -> bool:
    """Whether `data.corpus` is that of the checkpoint and names a path where there is nothing."""
    named = as_paths(config.data.corpus)
    return named == as_paths(state.config.get("data", {}).get("corpus")) and any(
        "/" in name and not Path(name).exists() for name in named
    )


def as_paths(corpus: Any) -> list[str]:
    """`data.corpus` as a list, with `~` replaced; empty for what is none."""
    named = corpus if isinstance(corpus, list) else [corpus]
    return [str(Path(name).expanduser()) for name in named if isinstance(name, str)]


def run_of(checkpoint: Path) -> Path:
    """The run directory of a checkpoint."""
    return checkpoint.absolute().parent.parent


def prepare_inspection(config: Config, state: State, checkpoint: Path, text: str) -> Prepared:
    """Tokenizer and text for reading a checkpoint with. Raises UserError.

    config: from the checkpoint, without files that it names unless the user trusts it. text: a corpus that the user named; ""
    means the run's own text, from the cache, or made again from `config.data.corpus`."""
    cache = cache_root(config)
    tokenizer = own_tokenizer(config, state, checkpoint)
    if text:
        return prepare(config, text, tokenizer)
    if tokenizer is not None:
        prepared = stored_text(state.data, tokenizer, cache)
        if prepared is not None:
            return prepared
    stored = state.config.get("data", {}).get("corpus")
    if config.data.corpus != stored and stored not in BUILT_IN_CORPORA:
        default = Config().data.corpus
        if config.data.corpus == default:
            raise UserError(
                f"{checkpoint}: its text, data.corpus = {stored!r}, is not in the cache; give a text yourself with --text or "
                "--data.corpus=..., or --trust the checkpoint to read what it names"
            )
    prepared = prepare(config, tokenizer=tokenizer)
    if prepared.tokenizer.fingerprint != state.tokenizer:
        raise UserError(
            f"{checkpoint}: its tokenizer is neither in the run directory nor in the cache; give --tokenizer.path"
        )
    if prepared.manifest.fingerprint != state.data:
        log.warning(f"{checkpoint}: data.corpus = {config.data.corpus!r} is not the text that it was trained with")
    return prepared


def own_tokenizer(config: Config, state: State, checkpoint: Path) -> Tokenizer | None:
    """The checkpoint's tokenizer; None when only `prepare` may still make it, from the text. Raises UserError."""
    tokenizer = stored_tokenizer(run_of(checkpoint), state.tokenizer, cache_root(config))
    if tokenizer is not None or not config.tokenizer.path:
        return tokenizer
    from titan_moe.data.tokenizer import read_tokenizer

    tokenizer = read_tokenizer(config.tokenizer.path, "tokenizer.path")
    if tokenizer.fingerprint != state.tokenizer:
        raise UserError(f"tokenizer.path: not the tokenizer that {checkpoint} was trained with")
    return tokenizer
