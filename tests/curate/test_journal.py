"""Records that outlive kills, ranks and runs."""

import pytest

from emu3.tools.curate.journal import Journal


def values(out) -> dict[str, int]:
    return {key: record["value"] for key, record in Journal(out, "votes").records.items()}


def test_the_newest_record_of_a_key_counts_whatever_rank_wrote_it(tmp_path, monkeypatch):
    for rank, value in ((3, 1), (0, 2), (1, 3), (3, 4), (0, 5)):
        monkeypatch.setenv("RANK", str(rank))
        journal = Journal(tmp_path, "votes")
        journal.add("a", value=value)
        journal.add(f"of {rank}", value=value)
        journal.close()
        assert values(tmp_path)["a"] == value
    assert values(tmp_path) == {"a": 5, "of 0": 5, "of 1": 3, "of 3": 4}
    assert Journal(tmp_path, "other").records == {}


def test_a_line_that_broke_off_is_passed_over_and_spoils_no_other(tmp_path):
    for number in range(3):
        journal = Journal(tmp_path, "votes")
        journal.add(str(number), value=number)
        journal.close()
        path = tmp_path / "scores/votes-00000.jsonl"
        if number == 1:
            path.write_bytes(path.read_bytes()[:-5])
    assert values(tmp_path) == {"0": 0, "2": 2}
    with path.open("ab") as file:
        file.write(b"\n\x00\x00 torn\n[1, 2]\n")
    assert values(tmp_path) == {"0": 0, "2": 2}


def test_two_runs_may_not_write_to_one_folder(tmp_path):
    one, other = Journal(tmp_path, "votes"), Journal(tmp_path, "votes")
    one.add("a", value=1)
    with pytest.raises(ValueError, match=r"another process is writing .*votes-00000\.jsonl"):
        other.add("b", value=2)
    one.close()
    other.add("b", value=2)
    assert values(tmp_path) == {"a": 1, "b": 2}
