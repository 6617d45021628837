"""The page of weights in 8 and 4 bits, on small models."""

import pytest
import torch

from benchmarks.report import weights_page
from benchmarks.suites import weights

TINY = {"hidden_size": 64, "num_heads": 2, "num_kv_heads": 1, "head_dim": 32}


@torch.no_grad()
def test_a_step_reads_half_and_a_quarter_of_the_bytes():
    model = weights.model_8b(2, intermediate_size=128, **TINY)
    found = weights.decode(model, seconds=0.01, context=16)
    assert list(found) == ["bf16", "int8", "int4"]
    ids, layer = model.settings.vocabulary, 64 * (4 * 32 + 64 + 3 * 128)
    elements = 2 * layer + ids.num_visual * 64
    assert found["bf16"]["bytes"] == 2 * elements
    assert elements < found["int8"]["bytes"] < 1.07 * elements
    assert found["int4"]["bytes"] == pytest.approx(elements * (1 / 2 + 2 / 64), rel=1e-6)
    assert all(one["tokens_per_s"] == pytest.approx(1e3 / one["ms"]) for one in found.values())


@torch.no_grad()
def test_the_page_tells_times_bytes_and_accuracies(tmp_path):
    row = weights.matrix(64, 32, 2, seconds=0.01)
    one = {"bytes": 10, "ms": 2.0, "tokens_per_s": 500.0, "gb_per_s": 1.5}
    mini = {"logit_error": 0.01} | {f"{kind}_accuracy": 0.98 for kind in weights_page.ACCURACIES}
    kinds = dict.fromkeys(("bf16", "int8", "int4"))
    found = {
        "machine": {"cpu": "a processor", "cpu_level": "avx2"},
        "threads": 1,
        "matrices": [row],
        "decode": dict.fromkeys(kinds, one),
        "miniature": dict.fromkeys(kinds, mini),
    }
    page = weights.write(tmp_path, found).read_text()
    assert "| 2 x 64 x 32 | " in page
    assert "| int8 | 0 MB (1.00x) | 2.0 ms | 500.00 (1.00x) | 1.5 |" in page
    assert "| int4 | 1.00% | 98.0% | 98.0% | 98.0% | 98.0% |" in page
    assert (tmp_path / "weights.png").stat().st_size > 1000
