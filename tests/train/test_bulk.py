"""The same work on many files: which, in what order, whose share, and past the bad ones."""

from io import StringIO
from pathlib import PurePath
from threading import Event

import pytest
import torch
from rich.console import Console

from emu3.tools.bulk import Item, each, find, from_input


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_files_are_found_below_folders_in_the_order_of_their_names(tmp_path):
    touch(tmp_path, "in/b.png", "in/a/z.PNG", "in/a/x.txt", "in/.cache/c.png", "in/.d.png", "e.png")
    (tmp_path / "in" / "folder.png").mkdir()
    found = find([tmp_path / "in", tmp_path / "e.png"], {".png"})
    assert [item.name.as_posix() for item in found.items] == ["a/z.PNG", "b.png", "e.png"]
    assert [item.source for item in found.items] == [
        tmp_path / "in/a/z.PNG",
        tmp_path / "in/b.png",
        tmp_path / "e.png",
    ]


def test_a_file_given_twice_is_worked_on_once(tmp_path):
    touch(tmp_path, "in/b.png")
    assert len(find([tmp_path / "in/b.png", tmp_path / "in"], {".png"}).items) == 1


@pytest.mark.parametrize(
    ("inputs", "line"),
    [
        (["none"], "no file or folder .*none"),
        (["in/x.txt"], r"x\.txt: must end in one of \.jpg, \.png"),
        (["empty"], r"no file in .*empty ends in one of \.jpg, \.png$"),
        (["gifs"], r"no file in .*gifs ends in one of \.jpg, \.png; there are 2 \.gif"),
        (["in", "other"], r"in/b\.png and .*other/b\.png would both become b\.png"),
    ],
)
def test_inputs_that_cannot_be_meant_are_refused(inputs, line, tmp_path):
    touch(tmp_path, "in/b.png", "in/x.txt", "other/b.png", "gifs/a.gif", "gifs/b.gif")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=line):
        find([tmp_path / name for name in inputs], {".png", ".jpg"})


ITEMS = [Item(PurePath(f"/in/{n}"), PurePath(str(n))) for n in range(7)]


def test_a_bad_file_costs_only_itself_and_names_itself_once(capsys):
    worked = []

    def work(item, given, tell):
        worked.append(item)
        if item.name.name in "25":
            raise ValueError(f"broken\n{item.source if item.name.name == '5' else ''}")

    outcome = each(ITEMS, str, work, lambda item: item.name.name == "3")
    assert worked == [*ITEMS[:3], *ITEMS[4:]]
    assert (outcome.done, outcome.skipped) == (4, 1)
    assert outcome.errors == ["/in/2: broken", "broken /in/5"]
    assert capsys.readouterr().err == "emu3: /in/2: broken\nemu3: broken /in/5\n"


def test_a_terminal_shows_how_many_files_are_done_and_how_far_the_one_at_work_is(monkeypatch):
    screen = StringIO()
    terminal = Console(file=screen, force_terminal=True, width=120)
    monkeypatch.setattr("emu3.tools.bulk.Console", lambda **_: terminal)
    each(ITEMS, str, lambda item, _, tell: tell("frame 8"), lambda item: False)
    assert "7/7" in screen.getvalue()
    assert "6 frame 8" in screen.getvalue()


def test_what_was_read_reaches_its_own_file_and_a_bad_read_costs_only_itself():
    """The first file is read only after the third was."""
    read, pairs, third = [], [], Event()

    def overtaken(item):
        if item.name.name == "0":
            assert third.wait(timeout=60)
        read.append(item)
        if item.name.name == "2":
            third.set()
        if item.name.name == "4":
            raise ValueError("broken")
        return int(item.name.name)

    outcome = each(
        ITEMS, overtaken, lambda item, given, _: pairs.append((item, given)), lambda item: False
    )
    assert pairs == [(item, int(item.name.name)) for item in ITEMS if item.name.name != "4"]
    assert outcome.errors == ["/in/4: broken"]
    assert len(read) == len(ITEMS)


def test_no_more_is_read_than_a_few_files_ahead():
    many = [Item(PurePath(f"/in/{n}"), PurePath(str(n))) for n in range(50)]
    read, most = [], []
    each(
        many,
        read.append,
        lambda item, *_: most.append(len(read) - int(str(item.name))),
        lambda _: 0,
    )
    assert len(read) == 50
    assert max(most) <= 9


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (IndexError("list index\nout of range"), "/in/2: IndexError: list index"),
        (KeyError("x"), "/in/2: KeyError: 'x'"),
        (StopIteration(), "/in/2: StopIteration:"),
        (MemoryError(), "/in/2: too large for the memory"),
        (torch.OutOfMemoryError("CUDA out of memory."), "/in/2: too large for the memory"),
        (RuntimeError("CUDA error: out of memory\n"), "/in/2: too large for the memory"),
        (RuntimeError("expected scalar type Half"), "/in/2: RuntimeError: expected scalar type"),
    ],
)
@pytest.mark.parametrize("part", ["read", "work"])
def test_any_fault_of_a_file_costs_only_itself(error, line, part, capsys):
    """All but a ValueError ended the run."""
    worked = []

    def fail(here, item):
        if here == part and item.name.name == "2":
            raise error

    def work(item, given, tell):
        fail("work", item)
        worked.append(item)

    outcome = each(ITEMS, lambda item: fail("read", item), work, lambda item: False)
    assert worked == [*ITEMS[:2], *ITEMS[3:]]
    assert [found.startswith(line) for found in outcome.errors] == [True]
    assert capsys.readouterr().err.count("\n") == 1


def test_an_input_that_cannot_be_read_costs_only_itself_also_at_work():
    """A disk or a share may fail in the middle of a video; only an output ends the run."""

    def unplugged():
        yield 1
        raise OSError("Input/output error")

    outcome = each(ITEMS, str, lambda *_: list(from_input(unplugged())), lambda item: False)
    assert outcome.errors == [f"/in/{n}: Input/output error" for n in range(7)]


def test_a_name_is_told_as_it_is_in_one_line(capsys):
    """``:smile:`` came out as an emoji, and a name of two lines as two."""
    items = [Item(PurePath("/in/:smile:[red]\n.png"), PurePath("x"))]
    each(items, lambda item: 1 / 0, lambda *_: None, lambda item: False)
    line = "emu3: /in/:smile:[red] .png: ZeroDivisionError: division by zero\n"
    assert capsys.readouterr().err == line


def test_a_full_disk_ends_the_run():
    worked = []

    def work(item, given, tell):
        worked.append(item)
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        each(ITEMS, str, work, lambda item: False)
    assert worked == ITEMS[:1]


def test_under_torchrun_a_rank_waits_for_the_others_before_it_fails(monkeypatch):
    happened = []
    monkeypatch.setattr("emu3.tools.bulk.dist.is_torchelastic_launched", lambda: True)
    monkeypatch.setattr("emu3.tools.bulk.atexit.register", lambda call: None)
    for name in ("init_process_group", "barrier"):
        monkeypatch.setattr(
            f"emu3.tools.bulk.dist.{name}", lambda *_, name=name, **__: happened.append(name)
        )

    def work(item, given, tell):
        happened.append("work")
        raise ValueError("broken")

    each(ITEMS[:1], str, work, lambda item: False)
    assert happened == ["work", "init_process_group", "barrier"]


@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_the_shares_of_all_ranks_are_every_file_once(ranks, monkeypatch):
    worked = []
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    for rank in range(ranks):
        monkeypatch.setenv("RANK", str(rank))
        outcome = each(ITEMS, str, lambda item, *_: worked.append(item), lambda item: False)
        assert outcome.done in (len(ITEMS) // ranks, len(ITEMS) // ranks + 1)
    assert sorted(worked, key=lambda item: item.name) == ITEMS
