"""Records of many forms, rows of tables and lines of JSON, to samples."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from emu3.data.media import IMAGES, VIDEOS
from emu3.data.store import Document
from emu3.prompt import Part
from emu3.templates import Turn

CODES = ".safetensors"
_MEDIA = {
    **dict.fromkeys(("image", "images", *(ending[1:] for ending in sorted(IMAGES))), False),
    **dict.fromkeys(("video", "videos", *(ending[1:] for ending in sorted(VIDEOS))), True),
}
"""Names of fields, and whether they hold videos."""
_TEXTS = "text", "caption", "txt"
_CHATS = "conversations", "texts", "messages"
FIELDS = (*_MEDIA, *_TEXTS, *_CHATS, "span")
"""Every name of a field that is read."""
_USERS, _ASSISTANTS = {"human", "user"}, {"gpt", "assistant"}
# Whitespace at a mark is of the text around it, not of what the model sees.
_MARK = re.compile(r"\s*<(?:image|video)>\s*")


@dataclass(frozen=True)
class Medium:
    """An image or a video, not read yet: a file, its bytes, or codes ``[h, w]``."""

    data: Path | bytes | Tensor
    is_video: bool = False
    span: tuple[float, float] | None = None
    """Seconds of a video; None is all of it."""


@dataclass(frozen=True)
class Sample:
    """What becomes a document: texts and media in their order, or turns, or ids that are made."""

    origin: str
    """Where it comes from, for errors."""
    parts: Sequence[Part | Medium] = ()
    turns: Sequence[Turn] = ()
    made: Document | None = None
    """A document from the tars of a store."""
    tokenizers: tuple[str, str | None] | None = None
    """Fingerprints of the text and the vision tokenizer of ``made``."""
    error: str | None = None
    """Why there is no sample."""


def sample_of(record: Mapping[str, Any], folder: Path, origin: str) -> Sample:
    """The sample of a record.

    Media are in the fields ``image``, ``images``, ``video``, ``videos``, or named as an ending,
    each a path below ``folder``, bytes, ``{"bytes", "path"}``, ``{"path", "offset", "size"}`` for
    bytes of a file, or a list of these; ``span`` has the seconds of a video. Texts are in
    ``text``, ``caption`` or ``txt``; conversations in ``conversations`` or ``messages`` (``from``
    and ``value``, or ``role`` and ``content``), or in ``texts`` (``user`` and ``assistant``).
    ``<image>`` and ``<video>`` in a text stand for the media in their order.
    """
    try:
        media = list(_media(record, folder))
        chat = next((record[name] for name in _CHATS if record.get(name)), None)
        if chat is not None:
            return Sample(origin, turns=_turns(chat, media))
        words = next((record[name] for name in _TEXTS if record.get(name)), "")
        if not isinstance(words, str):
            raise ValueError(f"has a text that is no string but {type(words).__name__}")
        return Sample(origin, parts=_parts(words, media))
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        return Sample(origin, error=f"{origin}: {' '.join(str(error).split())}")


def _media(record: Mapping[str, Any], folder: Path) -> Iterator[Medium]:
    span = _span(record.get("span"))
    for name, is_video in _MEDIA.items():
        values = record.get(name)
        if values is None:
            continue
        for value in values if isinstance(values, list) else [values]:
            yield Medium(_content(value, folder), is_video, span if is_video else None)


def _span(value: Any) -> tuple[float, float] | None:
    if value is None:
        return None
    first, last = map(float, value)
    if not 0 <= first < last:
        raise ValueError(f"has a span that must be two rising seconds, got {value}")
    return first, last


def _content(value: Any, folder: Path) -> Path | bytes:
    if isinstance(value, Mapping) and value.get("offset") is not None:
        with open(folder / value["path"], "rb") as file:
            file.seek(value["offset"])
            content = file.read(value["size"])
        if len(content) < value["size"]:
            raise ValueError(f"{value['path']} ends before {value['offset']} + {value['size']}")
        return content
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise ValueError(f"has an image or video that is neither a path nor bytes, but {value!r}")
    return folder / value


def _parts(words: str, media: Sequence[Medium]) -> list[Part | Medium]:
    texts = _MARK.split(words)
    if len(texts) == 1:
        if len(media) > 1:
            raise ValueError(f"must have a mark such as <image> for each of {len(media)} images")
        return [words, *media] if words.strip() else list(media)
    return _marked(texts, iter(media), len(media))


def _marked(texts: Sequence[str], media: Iterator[Medium], count: int) -> list[Part | Medium]:
    parts: list[Part | Medium] = [texts[0]]
    for words in texts[1:]:
        medium = next(media, None)
        if medium is None:
            raise ValueError(f"has more marks such as <image> than its {count} images")
        parts += [medium, words]
    return [part for part in parts if part != ""]


def _turns(chat: Sequence[Mapping[str, Any]], media: Sequence[Medium]) -> list[Turn]:
    spoken = [turn for one in chat for turn in _spoken(one)]
    for number, (speaker, _) in enumerate(spoken):
        if speaker not in (_ASSISTANTS if number % 2 else _USERS):
            raise ValueError(f"must alternate between human and gpt, got {speaker} in {number + 1}")
    if len(spoken) % 2:
        raise ValueError("must end in an answer")
    waiting, unmarked = iter(media), not any(_MARK.search(said) for _, said in spoken)
    turns = []
    for (_, said), (_, answer) in zip(spoken[::2], spoken[1::2], strict=True):
        parts = _marked(_MARK.split(said), waiting, len(media))
        turns.append(Turn([*waiting, *parts] if unmarked else parts, answer))
    if left := len(list(waiting)):
        raise ValueError(f"has {left} images more than marks such as <image>")
    return turns


def _spoken(turn: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Who speaks, and what."""
    if "user" in turn:
        yield "user", turn["user"]
        yield "assistant", turn["assistant"]
    elif "from" in turn:
        yield turn["from"], turn["value"]
    else:
        yield turn["role"], turn["content"]
