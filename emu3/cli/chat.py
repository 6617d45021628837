"""``emu3 chat``."""

import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Annotated

import typer

from emu3.cli.common import (
    DECODER,
    Base,
    Device,
    Dtype,
    Model,
    OwnVision,
    QuantizedWeights,
    app,
    beside,
    is_users,
    kind,
    say,
    tell_error,
    usable,
)
from emu3.data.codes import Making
from emu3.generate import generate_text
from emu3.prompt import content_ids
from emu3.settings import parse
from emu3.templates import DESCRIBE, Turn, chat_prompt
from emu3.tools.converse import Conversation, answer_room, split
from emu3.tools.look import is_published, look
from emu3.weights import Pretrained, load

_HELP = (
    "A line is a question; images and videos by their paths in it, or by /image PATH before it. "
    "/reset forgets, /quit ends, Ctrl-C stops an answer."
)
_COMMANDS = "/image", "/video", "/reset", "/help", "/quit"
# What would move the cursor or colour the terminal; tabs and line ends stay.
_CONTROLS = {i: "\ufffd" for i in (*range(32), *range(127, 160)) if chr(i) not in "\t\n"}


@app.command()
def chat(
    files: Annotated[
        list[Path] | None, typer.Argument(help="images and videos, in the order meant")
    ] = None,
    ask: Annotated[str | None, typer.Option(help="one question about all of them")] = None,
    interactive: Annotated[
        bool | None,
        typer.Option(
            help="questions line by line from stdin; by default so in a terminal or without files, "
            "and otherwise every file is captioned"
        ),
    ] = None,
    model: Model = DECODER,
    vision: OwnVision = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="of an answer, at most; by default 1024, or what fits", min=1)
    ] = None,
    fps: Annotated[
        str | None, typer.Option(help="frames per second of videos; by default all frames")
    ] = None,
    device: Annotated[Device, typer.Option(help="device to run on")] = Device.cpu,
    dtype: Annotated[Dtype | None, typer.Option(help="of the decoder")] = None,
    weights: QuantizedWeights = None,
    base: Base = None,
) -> None:
    """Talk about images and videos: questions line by line, one question, or captions.

    In a conversation a line is a question, with images and videos by their paths in it or by
    /image PATH before it; /reset forgets, /quit ends, Ctrl-C stops an answer.
    """
    if ask is not None and interactive:
        raise ValueError("--interactive: must be without --ask")
    rate = parse(Making, {"fps": fps}).fps
    vision = beside(model) if vision is None else vision
    stored = {"weights": weights and weights.value, "base": base}
    loaded = load(model, vision=vision, device=usable(device), dtype=kind(dtype), **stored)
    talk = Conversation(loaded, max_tokens, None if rate is None else Fraction(rate))
    if interactive is None:
        interactive = ask is None and (sys.stdin.isatty() or not files)
    if not (interactive or ask is not None):
        _caption(loaded, files or [], talk)
        return
    talk.show(files or [])
    if ask is not None:
        _answer(talk, ask)
    elif _converse(talk):
        raise typer.Exit(1)


def _caption(loaded: Pretrained, files: list[Path], talk: Conversation) -> None:
    """A published model is asked to describe each file, in Emu3's own prompt."""
    if not files:
        raise ValueError("chat: an image or a video must be given to be captioned")
    text, parts = loaded.text, [look(path, loaded, fps=talk.fps) for path in files]
    if is_published(loaded):
        prompts = [chat_prompt([Turn([one, DESCRIBE])], text) for one in parts]
    else:
        prompts = [[text.vocabulary.bos, *content_ids([one], text)] for one in parts]
    most = answer_room(loaded, prompts, talk.max_tokens)
    answers = generate_text(loaded.model, text, prompts, most)
    for path, words in zip(files, answers, strict=True):
        say(f"{path}: {words}")


def _converse(talk: Conversation) -> int:
    """Answer each line of stdin; return how many lines failed."""
    is_terminal, failed = sys.stdin.isatty(), 0
    if is_terminal:
        say(_HELP)
    for line in _lines(is_terminal):
        try:
            if not _obey(talk, line):
                break
        except KeyboardInterrupt:
            say("")
            if not is_terminal:
                raise
        except Exception as error:
            if not is_users(error):
                raise
            tell_error(error)
            failed += 1
    return failed


def _obey(talk: Conversation, line: str) -> bool:
    """Answer a line, or do what it says; return whether the conversation goes on."""
    command, _, rest = line.strip().partition(" ")
    paths, words = split(line)
    if command == "/quit":
        return False
    if command == "/reset":
        talk.forget()
    elif command == "/help":
        say(_HELP)
    elif command in ("/image", "/video"):
        paths, _ = split(rest)
        talk.show(paths or [Path(rest.strip())])
    elif command.startswith("/") and "/" not in command[1:] and not paths:
        raise ValueError(f"chat: no command {command}; there are {', '.join(_COMMANDS)}")
    elif paths or words:
        talk.show(paths)
        if words:
            _answer(talk, words)
    return True


def _answer(talk: Conversation, words: str) -> None:
    """Print the answer as it comes, without the space that it begins with."""
    begun = False

    def write(piece: str) -> None:
        nonlocal begun
        piece = piece if begun else piece.lstrip()
        begun = begun or bool(piece)
        sys.stdout.write(piece.translate(_CONTROLS))
        sys.stdout.flush()

    talk.ask(words, write)
    say("")


def _lines(is_terminal: bool) -> Iterator[str]:
    if not is_terminal:
        yield from sys.stdin
        return
    # Imported here: with it input() edits lines and recalls them.
    import readline  # noqa: F401

    while True:
        try:
            yield input("> ")
        except EOFError:
            say("")
            return
        except KeyboardInterrupt:
            say("")
