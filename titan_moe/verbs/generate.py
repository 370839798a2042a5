"""Continues prompts with a checkpoint's model. The new text goes to stdout as it is made, all else to stderr.

examples: titan-moe generate runs/debug --prompt "def main(" --temperature 0
          titan-moe generate runs/debug --prompt "import" --prompt "class" --top-p 0.9 --stop "\\n\\n" --seed 1
          titan-moe generate runs/debug --interactive
          torchrun --nproc-per-node 2 -m titan_moe.cli generate runs/debug --prompt "class" --parallelism.tp=2
          torchrun --nproc-per-node 2 -m titan_moe.cli generate runs/debug --prompt a --share-prompts --parallelism.ep=2
"""

import os
import re
import signal
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from titan_moe.config.load import world_size_from_environment
from titan_moe.errors import UserError
from titan_moe.runtime.ranks import check_ranks
from titan_moe.verbs.arguments import add_number, add_overrides, add_placement, add_trust, path_argument

if TYPE_CHECKING:
    from titan_moe.config.tables import Parallelism
    from titan_moe.generate.load import Loaded
    from titan_moe.generate.loop import Options, Piece
    from titan_moe.generate.ranks import SameOnAllRanks

ESCAPES = {"\\n": "\n", "\\t": "\t", "\\\\": "\\"}


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("path", type=path_argument, metavar="RUN", help="a run directory or one of its checkpoints")
    meaning = "text to continue; several make a batch (an empty one starts a new document)"
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help=meaning)
    meaning = "read prompts from stdin, one a line, each a new document"
    parser.add_argument("--interactive", action="store_true", help=meaning)
    meaning = "new tokens per prompt, at most"
    add_number(parser, "--max-tokens", 128, meaning, alias="--tokens")
    meaning = "divides the logits; 0: always the most probable token"
    add_fraction(parser, "--temperature", 1.0, meaning, lambda x: x >= 0, "0 or more")
    add_number(parser, "--top-k", 0, "sample from this many most probable tokens; 0: from all", 0)
    meaning = "sample from the most probable tokens that together have this probability; 1: from all"
    add_fraction(parser, "--top-p", 1.0, meaning, lambda x: 0 < x <= 1, "above 0, at most 1")
    meaning = "sample from tokens with at least this fraction of the largest probability; 0: from all"
    add_fraction(parser, "--min-p", 0.0, meaning, lambda x: 0 <= x <= 1, "from 0 to 1")
    meaning = "divides positive logits of tokens in the text, multiplies negative ones; 1: off"
    add_fraction(parser, "--repetition-penalty", 1.0, meaning, lambda x: x > 0, "above 0")
    meaning = "end a text before this string (\\n and \\t as in C); may be given several times"
    parser.add_argument("--stop", action="append", default=[], type=stop_string, metavar="TEXT", help=meaning)
    add_number(parser, "--seed", 0, "of the random numbers; a text does not depend on the other prompts", 0)
    meaning = "every rank continues prompts of its own, and texts appear when all have ended; needs parallelism.ep"
    parser.add_argument("--share-prompts", action="store_true", help=meaning)
    add_placement(parser)
    add_trust(parser)
    add_overrides(parser)


def add_fraction(
    parser: ArgumentParser, option: str, default: float, meaning: str, valid: Callable[[float], bool], allowed: str
) -> None:
    """Adds an option for a number. UserError names the option, the value, the meaning and the values that are allowed."""

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not (valid(value) and abs(value) < float("inf")):
            raise UserError(f"{option} = {text[:80]!r}: {meaning}; give a number {allowed}")
        return value

    parser.add_argument(option, type=number, default=default, metavar="X", help=f"{meaning} (default: {default:g})")


def stop_string(text: str) -> str:
    """A stop string, with its escapes resolved. Raises UserError for an empty one."""
    if not text:
        raise UserError("--stop = '': is empty; give the text to end before")
    return re.sub(r"\\[nt\\]", lambda escape: ESCAPES[escape.group()], text)


def run(arguments: Namespace) -> int:
    if not arguments.prompt and not arguments.interactive:
        raise UserError("--prompt: none is given; give one or several, or --interactive")
    check_ranks()
    for prompt in arguments.prompt:
        check_text(prompt)
    from titan_moe.checkpoint.chosen import from_checkpoint
    from titan_moe.generate.load import load_model
    from titan_moe.generate.loop import Options
    from titan_moe.generate.ranks import SameOnAllRanks, inference_mesh
    from titan_moe.generate.sampling import Sampling
    from titan_moe.parallel.mesh import stop_processes
    from titan_moe.runtime.device import pick_device

    a, world = arguments, world_size_from_environment()
    # Batches and sequences are those of training, which would have to be shared out among the ranks.
    words = (
        [*a.overrides, f"--training.batch_size={world}", f"--training.seq_len={2 * world}"]
        if world > 1
        else a.overrides
    )
    (checkpoint,), config = from_checkpoint([a.path], False, words, world, a.trust)
    device = pick_device()
    if a.share_prompts:
        check_shared(config.parallelism, a.interactive)
    mesh = inference_mesh(config, world, device)
    loaded = load_model(checkpoint, config, mesh, same_tokens=not a.share_prompts, placement=a.placement)
    sampling = Sampling(a.repetition_penalty, a.temperature, a.top_k, a.top_p, a.min_p)
    options = Options(a.max_tokens, tuple(a.stop), a.seed, sampling)
    session = Session(loaded, options, SameOnAllRanks(), a.share_prompts)
    if mesh.first:
        session.lead(a.prompt, a.interactive)
    else:
        session.follow()
    stop_processes()
    return 0


def check_shared(parallelism: "Parallelism", interactive: bool) -> None:
    """Raises UserError for what can't go with `--share-prompts`."""
    if interactive:
        raise UserError("--share-prompts: with --interactive there is one prompt at a time; leave one of the two out")
    if parallelism.ep == 1 or parallelism.tp > 1:
        raise UserError(
            "--share-prompts: needs ranks with experts of their own that can have texts of their own; start several and give "
            "--parallelism.ep, and leave --parallelism.tp at 1"
        )


class Session:
    """Texts that all ranks make together."""

    def __init__(self, loaded: "Loaded", options: "Options", same: "SameOnAllRanks", share: bool = False) -> None:
        """share: each rank continues prompts of its own."""
        self.loaded, self.options, self.same, self.share = loaded, options, same, share
        self.several = same.group is not None

    def pieces(self, prompts: list[str]) -> "Iterator[Piece]":
        """Makes the texts of some prompts; every rank must read all pieces."""
        from titan_moe.generate.loop import generate

        tokenizer = self.loaded.tokenizer
        texts = [[tokenizer.bos, *tokenizer.encode(prompt)] for prompt in prompts]
        if self.share:
            from titan_moe.generate.shared import shared_pieces

            return shared_pieces(self.loaded, texts, self.options)
        return generate(self.loaded.model, tokenizer, texts, self.options, agreed=self.same.tokens)

    def lead(self, prompts: list[str], interactive: bool) -> None:
        """Rank 0: reads prompts and writes texts."""
        from titan_moe.generate.terminal import converse

        try:
            if prompts:
                self.answer(prompts)
            if interactive:
                converse(self.answer_line)
            self.same.prompts(None)
        except (KeyboardInterrupt, BrokenPipeError) as error:
            self.interrupted(error)

    def answer(self, prompts: list[str]) -> None:
        from titan_moe.generate.terminal import write_pieces

        self.same.prompts(prompts)
        try:
            write_pieces(self.pieces(prompts), prompts)
        except KeyboardInterrupt as error:  # with one rank the session may go on
            self.interrupted(error)

    def interrupted(self, error: BaseException) -> None:
        """Ends rank 0 of several, while the others may be in the middle of a text. Raises the error on a single one."""
        from titan_moe.generate.ranks import leave

        if not self.several:
            raise error
        if isinstance(error, KeyboardInterrupt):
            print("interrupted", file=sys.stderr)
            leave(128 + signal.SIGINT)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left has no reader
        leave(128 + signal.SIGPIPE)

    def answer_line(self, line: str) -> None:
        try:
            check_text(line)
        except UserError as error:  # a wrong line does not end the session
            print(f"error: {error}", file=sys.stderr)
            return
        self.answer([line])

    def follow(self) -> None:
        """Another rank: makes the same texts, and ends with rank 0, whatever ended that."""
        from titan_moe.generate.ranks import leave
        from titan_moe.runtime.heartbeat import is_collective_failure

        signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            while (prompts := self.same.prompts(None)) is not None:
                for _ in self.pieces(prompts):
                    pass
        except Exception as error:
            if not is_collective_failure(error):
                raise
            leave(130)


def check_text(text: str) -> None:
    """Raises UserError for what is not UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"--prompt = {text[:80]!a}: is not UTF-8 text") from None
