"""Writes the shards of a stream: in the calling process, or in one of its own while a run reads them.

    python -m titan_moe.data.stream_writer FOLDER TOKENS PARENT

One process at a time writes, whoever has the lock of the folder; others wait, and go on when it ends. The process ends with
its parent. It does not use the parent's memory, so a tokenizer or package that fails there does not end the run.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from titan_moe.data.streams import TOKENIZER_FILE, Rows, ShardContent, StreamedShard, StreamFolder
from titan_moe.data.tokenise import BATCH_CHARACTERS, batches
from titan_moe.data.tokenizer import TOKENIZER_BYTES, Tokenizer, tokenizer_of
from titan_moe.errors import UserError
from titan_moe.runtime.cpus import available_cpus
from titan_moe.runtime.files import open_append, read_file
from titan_moe.runtime.lock import FileLock
from titan_moe.runtime.owner import remove_abandoned

POLL_SECONDS = 0.5
NICE = 10  # the run's own threads come first
ATTEMPTS = 3  # starts of the process without a new shard, after which a run that needs one stops
PAUSES = (0.0, 0.0, 10.0, 60.0)  # seconds before the process is started again, by the number of such starts


def write_stream(stream: StreamFolder, tokens: int, told: Callable[[int], None] = lambda _: None) -> None:
    """Writes shards until so many tokens are there, or the stream has ended. Raises UserError, OSError.

    told: called with the tokens that are there, after each batch of documents."""
    lock = FileLock(stream.folder / ".lock")
    while not stream.has(tokens):
        if not lock.acquire():
            time.sleep(POLL_SECONDS)
            stream.update()
            continue
        try:
            stream.update()
            remove_abandoned(stream.folder)
            Writer(stream).write(tokens, told)
        finally:
            lock.release()


class Writer:
    """Writes shards while it has the lock."""

    def __init__(self, stream: StreamFolder) -> None:
        self.stream, definition = stream, stream.definition
        self.name, self.budget, self.size = (definition[key] for key in ("corpus", "tokens", "shuffle_tokens"))
        path = stream.folder / TOKENIZER_FILE
        self.tokenizer: Tokenizer = tokenizer_of(read_file(path, TOKENIZER_BYTES), str(path))
        if self.tokenizer.fingerprint != stream.manifest.tokenizer:
            raise UserError(f"{path}: damaged (its checksum differs); delete {stream.folder} to prepare it again")

    def write(self, tokens: int, told: Callable[[int], None]) -> None:
        stream = self.stream
        rows: Rows | None = None
        while not stream.has(tokens):
            index = len(stream.shards)
            if rows is None:
                position = stream.shards[-1].position if index else None
                rows = Rows(self.name, "train", position, stream.validation_texts())
            self.write_shard(index, rows, told)
            stream.update()
            if len(stream.shards) > index + 1:
                rows = None  # the next shards were there: this one was lost, and has been written again
        told(stream.tokens)

    def write_shard(self, index: int, rows: Rows, told: Callable[[int], None]) -> StreamedShard:
        """Writes the documents from `rows` on as one shard, up to the end of a batch of documents."""
        shard, before, ended = ShardContent(), self.stream.tokens, True
        documents = ((document, "train") for document in rows)
        for batch in batches(documents, min(BATCH_CHARACTERS, self.size)):
            texts = [document.text for document, _ in batch]
            for text, ids in zip(texts, self.tokenizer.encode_batch(texts, available_cpus()), strict=True):
                if not self.budget or before + shard.tokens < self.budget:
                    with_ends = np.array([self.tokenizer.bos, *ids, self.tokenizer.eos], dtype=np.int64)
                    shard.add(with_ends, len(text.encode("utf-8")))
            told(before + shard.tokens)
            if self.budget and before + shard.tokens >= self.budget:
                break
            if shard.tokens >= self.size:
                ended = False
                break
        return self.stream.write(index, shard, ended, rows.position())


class BackgroundWriter:
    """The process that writes a stream's shards while a run reads them. When it fails or is killed it is started again: the
    run may not need its tokens before the hub is back."""

    def __init__(self, stream: StreamFolder, tokens: int, log: Path) -> None:
        """tokens: that the run reads. log: receives what the process prints."""
        self.stream, self.tokens, self.log = stream, tokens, log
        self.process: subprocess.Popen[bytes] | None = None
        self.attempts, self.shards = 0, -1
        self.ended_at: float | None = None

    @property
    def error(self) -> str | None:
        """Why the process has ended several times without a new shard, the last time just now; None while it may go on."""
        return last_line(self.log) if self.attempts >= ATTEMPTS and self.ended_at is not None else None

    def keep_going(self) -> None:
        """Starts the process unless it runs, or all tokens are there. Call it often: after a failure it pauses."""
        if self.process is not None and self.process.poll() in (None, 0):
            return
        self.stream.update()
        if self.stream.has(self.tokens):
            return
        if len(self.stream.shards) > self.shards:
            self.attempts, self.shards = 0, len(self.stream.shards)
        if self.process is not None:
            self.ended_at = self.ended_at or time.monotonic()
            if time.monotonic() < self.ended_at + PAUSES[min(self.attempts, len(PAUSES) - 1)]:
                return
        self.attempts, self.ended_at = self.attempts + 1, None
        words = [str(self.stream.folder), str(self.tokens), str(os.getpid())]
        with open_append(self.log) as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "titan_moe.data.stream_writer", *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # a Ctrl-C is the trainer's, which then stops this process
            )

    def stop(self) -> None:
        """Ends the process. Complete shards stay."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].removeprefix("error: ") if lines else "it says nothing"


def end_with(parent: int) -> None:
    """Ends this process when its parent has ended."""
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """Exit status 2, and one line on stderr, for what the user can mend."""
    folder, tokens, parent = sys.argv[1:]
    threading.Thread(target=end_with, args=(int(parent),), daemon=True).start()
    os.nice(NICE)
    try:
        write_stream(StreamFolder(Path(folder)), int(tokens))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"error: data.cache_dir: {error.filename or folder}: {error.strerror}; make room", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
