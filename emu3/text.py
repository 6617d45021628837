"""Text tokenizers: strings to ids below ``vocabulary.num_text`` and back."""

import json
import unicodedata
from base64 import b64decode, b64encode
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import tiktoken

from emu3.config import EMU3_VOCABULARY, Vocabulary

QWEN_FILES = ("emu3.tiktoken", "qwen.tiktoken", "tokenizer.json")
"""Names of the files with the merges, as the published folders have them."""

PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""What is never merged across: contractions, words with what stands before them, single digits,
punctuation, line ends, spaces."""


class TextTokenizer(Protocol):
    """What the prompt grammar needs of a text tokenizer."""

    vocabulary: Vocabulary

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class ByteTokenizer:
    """One id per UTF-8 byte; no vocabulary file, every string is representable."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        if vocabulary.num_text < 256:
            raise ValueError(
                f"ByteTokenizer: the vocabulary needs 256 text ids, got {vocabulary.num_text}"
            )
        self.vocabulary = vocabulary

    def encode(self, text: str) -> list[int]:
        """Raises ``ValueError`` for bytes of a command line that are not UTF-8."""
        return list(_utf8("ByteTokenizer", text))

    def decode(self, ids: Sequence[int]) -> str:
        """Join the bytes; a broken UTF-8 sequence, as a model may emit, becomes U+FFFD."""
        _check_ids("ByteTokenizer", ids, 256)
        return bytes(ids).decode(errors="replace")


class QwenTokenizer:
    """Emu3's byte-pair encoding: Qwen's, 151,643 ids of text, after NFC.

    The names of special tokens (``<|image token|>``) are text like any other: a prompt cannot
    forge the grammar.

    Args:
        path: ``emu3.tiktoken``, ``qwen.tiktoken``, a ``tokenizer.json`` of Hugging Face, or a
            folder with one of them; None takes the copy in the package ``dashscope``.
        vocabulary: the ids of the grammar around them.

    Raises:
        ValueError: one line, if there is no such file or its ids are not Qwen's.
    """

    def __init__(self, path: Path | None = None, vocabulary: Vocabulary = EMU3_VOCABULARY) -> None:
        path = merges_file(path)
        ranks = _read_json(path) if path.suffix == ".json" else _read_tiktoken(path)
        if sorted(ranks.values()) != list(range(vocabulary.num_text)):
            raise ValueError(
                f"QwenTokenizer: {path} must have the ids 0 to {vocabulary.num_text - 1} once "
                f"each, got {len(ranks)} ids up to {max(ranks.values(), default=None)}"
            )
        self.vocabulary = vocabulary
        self._bpe = tiktoken.Encoding(
            "qwen", pat_str=PIECES, mergeable_ranks=ranks, special_tokens={}
        )

    def as_tiktoken(self) -> bytes:
        """The content of a tiktoken file with the same merges."""
        ranks = sorted(self._bpe._mergeable_ranks.items(), key=lambda item: item[1])
        return b"".join(b64encode(token) + b" %d\n" % rank for token, rank in ranks)

    @staticmethod
    def is_in(folder: Path) -> bool:
        """Whether ``folder`` has a file with the merges."""
        return any((folder / name).is_file() for name in QWEN_FILES)

    def encode(self, text: str) -> list[int]:
        """Raises ``ValueError`` for bytes of a command line that are not UTF-8."""
        _utf8("QwenTokenizer", text)
        return self._bpe.encode_ordinary(unicodedata.normalize("NFC", text))

    def decode(self, ids: Sequence[int]) -> str:
        """Join the bytes; a broken UTF-8 sequence, as a model may emit, becomes U+FFFD."""
        _check_ids("QwenTokenizer", ids, self.vocabulary.num_text)
        return self._bpe.decode(list(ids), errors="replace")


def _utf8(tokenizer: str, text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{tokenizer}: text must be Unicode, got {text!r}") from None


def _check_ids(tokenizer: str, ids: Sequence[int], count: int) -> None:
    invalid = [i for i in ids if not 0 <= i < count]
    if invalid:
        raise ValueError(f"{tokenizer}: ids of text must be in [0, {count}), got {invalid[0]}")


def merges_file(path: Path | None) -> Path:
    """The file of Qwen's merges: ``path`` itself, in that folder, or for None in ``dashscope``."""
    if path is None:
        package = find_spec("dashscope")
        if package is None or package.origin is None:
            raise ValueError(
                f"QwenTokenizer: name a folder with one of {', '.join(QWEN_FILES)}, or install "
                "the package dashscope, which has a copy"
            )
        path = Path(package.origin).parent / "resources"
    if not path.is_dir():
        return path
    for name in QWEN_FILES:
        if (path / name).is_file():
            return path / name
    raise ValueError(f"QwenTokenizer: {path} must have one of {', '.join(QWEN_FILES)}")


def _read_tiktoken(path: Path) -> dict[bytes, int]:
    """Lines of a token in base64, a space and its id."""
    try:
        lines = (line.split() for line in path.read_bytes().splitlines() if line)
        return {b64decode(token, validate=True): int(rank) for token, rank in lines}
    except OSError as error:
        raise ValueError(f"QwenTokenizer: cannot read {path}: {error.strerror}") from None
    except ValueError:
        raise ValueError(f"QwenTokenizer: {path} is not a tiktoken file") from None


def _read_json(path: Path) -> dict[bytes, int]:
    """The vocabulary of a byte-level tokenizer, whose tokens have a character for each byte."""
    byte_of = {character: byte for byte, character in _characters().items()}
    try:
        model = json.loads(path.read_bytes())["model"]
        return {
            bytes(byte_of[c] for c in token): rank
            for token, rank in model["vocab"].items()
            if rank < EMU3_VOCABULARY.num_text
        }
    except OSError as error:
        raise ValueError(f"QwenTokenizer: cannot read {path}: {error.strerror}") from None
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ValueError(f"QwenTokenizer: {path} is not a byte-level tokenizer.json") from None


def _characters() -> dict[int, str]:
    """GPT-2's character for every byte: itself if it is printable, else one from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in printable)
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + n) for n, byte in enumerate(others)
    }
