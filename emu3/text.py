"""Text tokenizers: strings to ids below ``vocabulary.num_text`` and back."""

from collections.abc import Sequence
from typing import Protocol

from emu3.config import Vocabulary


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
        try:
            return list(text.encode())
        except UnicodeEncodeError:
            raise ValueError(f"ByteTokenizer: text must be Unicode, got {text!r}") from None

    def decode(self, ids: Sequence[int]) -> str:
        """Join the bytes; a broken UTF-8 sequence, as a model may emit, becomes U+FFFD."""
        invalid = [i for i in ids if not 0 <= i < 256]
        if invalid:
            raise ValueError(f"ByteTokenizer: ids must be bytes, got {invalid[0]}")
        return bytes(ids).decode(errors="replace")
