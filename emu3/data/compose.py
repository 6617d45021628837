"""Samples with codes to documents with ids."""

from collections.abc import Sequence

from emu3.data.store import Document, Kind
from emu3.prompt import Part, content_ids
from emu3.templates import SYSTEM, Turn
from emu3.text import TextTokenizer


def parts_document(parts: Sequence[Part], text: TextTokenizer) -> Document:
    """``BOS part … part EOS``; of one caption and one image or clip, the caption first.

    Texts are stripped at the ends of the document.

    Raises:
        ValueError: there is nothing in it, or its codes do not fit the vocabulary.
    """
    ids = text.vocabulary
    seen = [part for part in parts if not isinstance(part, str)]
    words = [part for part in parts if isinstance(part, str) and part.strip()]
    if not seen and not words:
        raise ValueError("is empty: neither text nor image")
    if not seen:
        return Document([ids.bos, *text.encode("".join(words).strip()), ids.eos], Kind.TEXT)
    if len(seen) == 1 and len(words) <= 1:
        caption = text.encode("".join(words).strip())
        content = [*caption, *content_ids(seen, text)]
        return Document([ids.bos, *content, ids.eos], Kind.PAIR, caption=len(caption))
    return Document([ids.bos, *content_ids(parts, text), ids.eos], Kind.MIXED)


def chat_document(turns: Sequence[Turn], text: TextTokenizer, system: str = SYSTEM) -> Document:
    """``BOS system USER: {said}. ASSISTANT: {answer}``, more turns behind a space, and EOS.

    The ids of ``chat_prompt``, whose answers are learned; EOS belongs to the last answer.

    Raises:
        ValueError: no turn, or one in which nothing is said or answered.
    """
    ids = [text.vocabulary.bos]
    answers = []
    for number, turn in enumerate(turns):
        said = any(not isinstance(part, str) or part.strip() for part in turn.said)
        answer = (turn.answer or "").strip()
        if not said or not answer:
            raise ValueError(f"has nothing {'answered' if said else 'said'} in turn {number + 1}")
        opening = " USER: " if number else f"{system}USER: "
        ids += content_ids([opening, *turn.said, ". ASSISTANT:"], text)
        start = len(ids)
        ids += text.encode(f" {answer}")
        answers.append((start, len(ids)))
    if not answers:
        raise ValueError("has no turn")
    answers[-1] = (answers[-1][0], len(ids) + 1)
    return Document([*ids, text.vocabulary.eos], Kind.CHAT, answers=answers)
