"""Text tokenizers: exact ids, round trips, and one clear line for a wrong file."""

import base64
import json
import random
import unicodedata
from pathlib import Path

import pytest
from tokenizers import Tokenizer, normalizers
from transformers.convert_slow_tokenizer import TikTokenConverter

from emu3 import text
from emu3.config import BYTE_VOCABULARY, EMU3_VOCABULARY
from emu3.text import ByteTokenizer, QwenTokenizer

NUM_STRINGS = 5000


@pytest.fixture(scope="module")
def qwen():
    return QwenTokenizer()


@pytest.fixture(scope="module")
def huggingface(tmp_path_factory):
    """Hugging Face's conversion of the same merges, saved as ``tokenizer.json``."""
    merges = text.merges_file(None)
    tokenizer: Tokenizer = TikTokenConverter(str(merges), pattern=text.PIECES).converted()
    tokenizer.normalizer = normalizers.NFC()
    path = tmp_path_factory.mktemp("hub") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def unicode_strings(count, seed=0):
    """Scripts, emoji, combining marks, controls, spaces, line ends and digits, mixed."""
    chosen = random.Random(seed)
    ranges = [(32, 126), (9, 13), (160, 591), (768, 879), (1024, 1279), (1536, 1791), (2304, 2431)]
    ranges += [(4352, 4607), (8192, 8303), (12352, 12543), (19968, 40959), (44032, 55203)]
    ranges += [(128512, 128591), (65024, 65039), (0, 31), (57344, 57400), (1, 1114111)]
    for _ in range(count):
        words = []
        for _ in range(chosen.randint(1, 6)):
            low, high = chosen.choice(ranges)
            letters = [chosen.randint(low, high) for _ in range(chosen.randint(1, 9))]
            words.append("".join(chr(c) for c in letters if not 0xD800 <= c < 0xE000))
        yield chosen.choice(["", " ", "  ", "\n", "\r\n", "'s "]).join(words)


def test_ids_are_those_of_hugging_face_s_tokenizer_from_the_same_merges(qwen, huggingface):
    oracle = Tokenizer.from_file(str(huggingface))
    for words in unicode_strings(NUM_STRINGS):
        assert qwen.encode(words) == oracle.encode(words, add_special_tokens=False).ids, repr(words)


def test_any_unicode_text_comes_back_in_nfc(qwen):
    for words in unicode_strings(NUM_STRINGS, seed=1):
        assert qwen.decode(qwen.encode(words)) == unicodedata.normalize("NFC", words)


def test_known_ids(qwen):
    """Digits and the star of a size are single tokens, as Emu3's grammar needs."""
    assert qwen.encode("0123456789*") == [*range(15, 25), 9]
    assert qwen.encode("90*90") == [24, 15, 9, 24, 15]
    assert qwen.encode("e\u0301") == qwen.encode("\u00e9")
    assert qwen.vocabulary == EMU3_VOCABULARY
    assert qwen.encode("") == []


def test_the_name_of_a_special_token_is_text(qwen):
    """A prompt cannot forge the grammar."""
    for name in ("<|image token|>", "<|extra_203|>", "<|endoftext|>", "<|visual token 000001|>"):
        ids = qwen.encode(name)
        assert max(ids) < EMU3_VOCABULARY.num_text
        assert qwen.decode(ids) == name


def test_a_tokenizer_json_has_the_same_merges(qwen, huggingface):
    other = QwenTokenizer(huggingface.parent)
    for words in unicode_strings(200, seed=2):
        assert other.encode(words) == qwen.encode(words)


def test_a_broken_sequence_becomes_a_replacement_character(qwen):
    assert "\ufffd" in qwen.decode(qwen.encode("\U00013000")[:1])


@pytest.mark.parametrize(
    ("tokenizer", "count"), [("qwen", 151643), (ByteTokenizer(BYTE_VOCABULARY), 256)]
)
def test_ids_that_are_no_text_are_refused(tokenizer, count, request):
    tokenizer = request.getfixturevalue(tokenizer) if tokenizer == "qwen" else tokenizer
    for wrong in (-1, count, EMU3_VOCABULARY.eol):
        with pytest.raises(ValueError, match=rf"must be in \[0, {count}\), got {wrong}$"):
            tokenizer.decode([5, wrong])
    with pytest.raises(ValueError, match=r"text must be Unicode, got 'a.udcff'"):
        tokenizer.encode("a\udcff")


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("qwen.tiktoken", b"not a file of merges", "is not a tiktoken file"),
        ("emu3.tiktoken", b"!! 0\n", "is not a tiktoken file"),
        ("qwen.tiktoken", base64.b64encode(b"a") + b" 0\n", "must have the ids 0 to 151642"),
        ("qwen.tiktoken", b"", r"once each, got 0 ids up to None"),
        ("tokenizer.json", b"{", "is not a byte-level tokenizer.json"),
        ("tokenizer.json", b"[]", "is not a byte-level tokenizer.json"),
        ("tokenizer.json", json.dumps({"model": {"vocab": {"a b": 1}}}).encode(), "byte-level"),
        ("readme.md", b"", "must have one of emu3.tiktoken, qwen.tiktoken, tokenizer.json"),
    ],
)
def test_a_wrong_file_gives_one_line(name, content, line, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=line) as error:
        QwenTokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_without_a_file_the_line_says_where_to_get_one(monkeypatch, tmp_path):
    monkeypatch.setattr(text, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"name a folder with one of .* or install the package"):
        QwenTokenizer()
    with pytest.raises(ValueError, match=r"cannot read .*none\.tiktoken: No such file"):
        QwenTokenizer(Path(tmp_path, "none.tiktoken"))
