"""The generic suite finds what is wrong, and its disk cache is safe."""

from unittest import mock

import pytest
import torch

from emu3_kernels import rope, rope_tables
from emu3_kernels.runtime.dispatch import Backends
from emu3_kernels.testing import suite
from emu3_kernels.testing.cache import cached, cached_all
from emu3_kernels.testing.copies import on_copies
from emu3_kernels.testing.suite import cases, check_backend, check_call, truth


def test_a_result_is_made_once(tmp_path, monkeypatch):
    monkeypatch.setenv("EMU3_TEST_CACHE", str(tmp_path))
    make = mock.Mock(return_value=b"made")
    assert [cached("key", make), cached("key", make), cached("other", make)] == [b"made"] * 3
    assert make.call_count == 2


def test_of_equal_keys_one_is_made(tmp_path, monkeypatch):
    monkeypatch.setenv("EMU3_TEST_CACHE", str(tmp_path))
    make = mock.Mock(return_value=[b"first", b"second"])
    assert cached_all(["a", "b", "a"], make) == [b"first", b"second", b"first"]
    make.assert_called_once_with([0, 1])


@pytest.mark.parametrize("damaged", [b"", b"short", bytes(32) + b"made"])
def test_a_damaged_file_is_made_anew(damaged, tmp_path, monkeypatch):
    monkeypatch.setenv("EMU3_TEST_CACHE", str(tmp_path))
    cached("key", lambda: b"made")
    (path,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    path.write_bytes(damaged)
    assert cached("key", lambda: b"again") == b"again"
    assert cached("key", lambda: b"never") == b"again"


def test_a_folder_that_cannot_be_written_to_keeps_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("EMU3_TEST_CACHE", str(tmp_path / "file"))
    assert [cached("key", lambda: b"1"), cached("key", lambda: b"2")] == [b"1", b"2"]


def test_the_truth_from_the_disk_is_the_computed_one(tmp_path, monkeypatch):
    monkeypatch.setenv("EMU3_TEST_CACHE", str(tmp_path))
    size = cases("add_rms_norm").check[-1]
    computed, kept = (truth("add_rms_norm", size, torch.bfloat16) for _ in range(2))
    for before, after in zip(computed, kept, strict=True):
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


def slightly_wrong(op):
    def function(**inputs):
        inputs.pop("backend")
        return suite.reference(op)(**inputs) * 1.001

    return function


def test_a_backend_that_is_slightly_wrong_fails(monkeypatch):
    monkeypatch.setattr(suite, "public", slightly_wrong)
    with pytest.raises(AssertionError, match=r"output 0: error .* exceeds its budget"):
        check_call("swiglu", "reference", cases("swiglu").check[-1], torch.float32)
    with pytest.raises(AssertionError, match="swiglu: backend 'reference' fails"):
        check_backend("swiglu", "reference")


def test_a_backend_that_refuses_every_call_fails(monkeypatch):
    def refuses(op):
        def function(**_):
            raise NotImplementedError(f"{op}: backend 'mine' cannot run this call: it is lazy")

        return function

    monkeypatch.setattr(suite, "public", refuses)
    with pytest.raises(AssertionError, match="swiglu: backend 'mine' refuses every call"):
        check_backend("swiglu", "mine")


def test_a_dtype_that_must_run_may_not_be_refused():
    size = cases("swiglu").check[-1]
    assert "float16 is left to" in check_call("swiglu", "cpu", size, torch.float16)
    with (
        mock.patch.object(suite, "must_run", return_value=(torch.float16,)),
        pytest.raises(AssertionError, match="float16 is left to"),
    ):
        check_call("swiglu", "cpu", size, torch.float16)


def test_a_backend_of_a_gpu_runs_on_copies_whose_writes_and_gradients_come_back():
    """Tensors of the CPU, also views of one storage: as on a GPU, whose results return."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("every test runs so beside a GPU")
    seen = []
    named = Backends._named

    def see(self, asked, *args):
        seen.extend(args if asked == "triton" else ())
        return named(self, asked, *args)

    with mock.patch.object(Backends, "_named", see), on_copies("cpu"):
        size = cases("rope_append").check[-1]
        assert check_call("rope_append", "triton", size, torch.float32) is None
        packed = torch.randn(2, 5, 8, 70)
        q, k, _ = packed.split((4, 2, 2), dim=2)
        expected = rope(q, k, *rope_tables(16, 70), backend="reference")
        results = rope(q, k, *rope_tables(16, 70), out=(q, k), backend="triton")
        assert [result is out for result, out in zip(results, (q, k), strict=True)] == [True] * 2
        for result, right in zip((q, k), expected, strict=True):
            torch.testing.assert_close(result, right)
        assert check_call("swiglu", "triton", cases("swiglu").check[-1], torch.float32) is None
    tensors = [x for x in seen if isinstance(x, torch.Tensor)]
    addresses = {x.data_ptr() for x in (q, k)}
    assert tensors
    assert not addresses & {x.data_ptr() for x in tensors}
