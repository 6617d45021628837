"""``emu3 chat``: questions line by line, answers as they come, and a chat that goes on."""

import os
import select
import signal
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from emu3.cli import app
from emu3.cli.chat import _converse
from emu3.data.media import write_image
from emu3.generate import generate_text
from emu3.generate.text import Pieces
from emu3.prompt import parse_document
from emu3.templates import Turn, chat_prompt
from emu3.text import ByteTokenizer
from emu3.tools.converse import Conversation, split
from emu3.weights import load
from tests.model.tiny import TINY, tiny_model
from tests.train.tiny_files import tiny_files

TEXT = ByteTokenizer(TINY.vocabulary)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return tiny_files(tmp_path_factory.mktemp("model"))


@pytest.fixture
def prompts(monkeypatch):
    """The prompts that are asked, each answered by " yes"."""
    asked = []

    def answer(model, text, prompts, max_new_tokens, on_text=None, past=None):
        asked.extend(prompts)
        on_text(0, " y")
        on_text(0, "es")
        return [" yes"]

    monkeypatch.setattr("emu3.tools.converse.generate_text", answer)
    return asked


def chat(files, lines, *words):
    return CliRunner().invoke(app, ["chat", *files, *words], input="".join(f"{i}\n" for i in lines))


def pictures(folder):
    for name, level in (("a.png", 10), ("b c.png", 200)):
        write_image(folder / name, torch.full((3, 8, 8), level, dtype=torch.uint8))


def test_a_pipe_is_answered_line_by_line_with_all_turns_before(tmp_path, files, prompts):
    pictures(tmp_path)
    lines = [f"what is in '{tmp_path}/b c.png'?", "", "and now", "/reset", "hello", "/quit", "more"]
    done = chat(files, lines)
    assert (done.exit_code, done.stdout, done.stderr) == (0, "yes\nyes\nyes\n", "")
    image, words = parts_of(prompts[0])[1:]
    assert (image.shape, words) == ((4, 4), "what is in?. ASSISTANT:")
    assert parts_of(prompts[1])[2] == "what is in?. ASSISTANT: yes USER: and now. ASSISTANT:"
    assert prompts[2:] == [chat_prompt([Turn(["hello"])], TEXT)]


def parts_of(prompt):
    return parse_document([*prompt, TINY.vocabulary.eos], TEXT)


def test_what_is_shown_goes_before_the_next_question(tmp_path, files, prompts):
    pictures(tmp_path)
    done = chat(
        files, [f"/image {tmp_path}/b\\ c.png", "which?"], "--interactive", f"{tmp_path}/a.png"
    )
    assert (done.exit_code, done.stdout) == (0, "yes\n")
    kinds = [type(part).__name__ for part in parts_of(prompts[0])]
    assert kinds == ["str", "Tensor", "Tensor", "str"]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("see none.png", "emu3: image: none.png cannot be read: No such file or directory"),
        ("/image notes.txt", "emu3: notes.txt: an image or a video must end in one of .avi"),
        ("/imagine x", "emu3: chat: no command /imagine; there are /image, /video, /reset"),
        ("word " * 120, "emu3: generate: a prompt may have 512 tokens before 1 new ones, got 6"),
    ],
)
def test_a_bad_line_is_told_in_one_and_the_chat_goes_on(line, told, files, monkeypatch):
    monkeypatch.setattr("emu3.tools.converse.MOST_TOKENS", 2)
    done = chat(files, [line, "hello"])
    assert done.exit_code == 1
    assert done.stderr.startswith(told)
    assert (done.stderr.count("\n"), done.stdout.count("\n")) == (1, 1)


def test_an_interrupt_stops_an_answer_and_not_the_chat(files, prompts, monkeypatch, capsys):
    lines = iter(["first", "second", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    talk = Conversation(load(files[1], vision=files[3]))
    ask, calls = talk.ask, []

    def stopped(words, on_text):
        def stops(piece):
            on_text(piece)
            if not calls:
                calls.append(piece)
                raise KeyboardInterrupt

        ask(words, stops)

    monkeypatch.setattr(talk, "ask", stopped)
    assert _converse(talk) == 0
    assert capsys.readouterr().out.endswith("y\nyes\n")
    assert [turn.answer for turn in talk.turns] == [" y", " yes"]


def test_an_answer_cannot_command_the_terminal(files, monkeypatch):
    monkeypatch.setattr(
        "emu3.tools.converse.generate_text", lambda *_, on_text, past: on_text(0, "a\x1b[2Jb\r\tc")
    )
    assert chat(files, ["x"]).stdout == "a�[2Jb�\tc\n"


def test_words_come_in_pieces_that_make_up_the_answer():
    model, pieces = tiny_model(), {0: "", 1: ""}
    prompts = [chat_prompt([Turn([words])], TEXT) for words in ("a", "bc")]

    def tell(number, piece):
        assert piece
        pieces[number] += piece

    answers = generate_text(model, TEXT, prompts, 20, on_text=tell)
    assert list(pieces.values()) == answers
    assert any(answers)


@settings(max_examples=40)
@given(st.one_of(st.binary(max_size=9), st.text(max_size=4).map(str.encode)))
def test_pieces_are_whole_characters(data):
    pieces, ids = Pieces(TEXT), list(data)
    told = [pieces.next(ids[:n]) for n in range(len(ids))] + [pieces.next(ids, is_last=True)]
    assert "".join(told) == data.decode(errors="replace")


@pytest.mark.e2e
def test_in_a_terminal_an_interrupt_stops_an_answer_of_many_tokens(tmp_path):
    files = tiny_files(tmp_path, max_position_embeddings=8192)
    ours, theirs = os.openpty()
    command = [sys.executable, "-m", "emu3", "chat", *files, "--max-tokens", "8000"]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    until(ours, b"> ")
    os.write(ours, b"hello\n")
    answer = until(ours, b"hello\r\n", least=100)
    process.send_signal(signal.SIGINT)
    answer += until(ours, b"> ")
    os.write(ours, b"/quit\n")
    assert process.wait(timeout=30) == 0
    os.close(ours)
    assert len(answer) < 7000


def until(terminal, mark, least=0):
    """What a terminal shows up to ``mark``, and ``least`` bytes after it."""
    shown = b""
    while mark not in shown or len(shown.partition(mark)[2]) < least:
        assert select.select([terminal], [], [], 60)[0], shown
        shown += os.read(terminal, 4096)
    return shown


@pytest.mark.parametrize(
    ("line", "paths", "words"),
    [
        ("what is it?", [], "what is it?"),
        ("it's a.png or 'b c.jpg'?", ["a.png", "b c.jpg"], "it's or?"),
        ("/tmp/x/y.MP4 how many", ["/tmp/x/y.MP4"], "how many"),
        ('compare "a b.png" b\\ c.webp.', ["a b.png", "b c.webp"], "compare."),
        ("  two  spaces ", [], "two  spaces"),
    ],
)
def test_paths_are_found_in_a_line(line, paths, words):
    found, rest = split(line)
    assert ([str(path) for path in found], rest) == (paths, words)
