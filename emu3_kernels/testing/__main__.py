"""Check a backend in a file of your own: ``python -m emu3_kernels.testing swiglu my_backend.py``.

The file has a dict ``BACKENDS`` with a ``Backend`` by op, as the backends of this library have. The
name of the file becomes the name of the backend. The value and every gradient at every size and
dtype of the op are compared with the reference at float64, on a GPU if there is one.
"""

import argparse
import os
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import torch

# Triton decides whether it interprets when it decorates a kernel: before the file is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def main() -> int:
    from emu3_kernels.ops import OPS
    from emu3_kernels.testing.suite import outcomes

    parser = argparse.ArgumentParser("python -m emu3_kernels.testing", description=__doc__)
    parser.add_argument("op", choices=OPS, metavar="op", help=f"one of {', '.join(OPS)}")
    parser.add_argument("file", type=Path, help="a Python file with BACKENDS[op]")
    given = parser.parse_args()
    name = register(given.op, given.file)
    # torch.empty now returns NaN: an element that is never written fails.
    torch.use_deterministic_algorithms(True, warn_only=True)
    ran = failed = 0
    for outcome in outcomes(given.op, name):
        ran += outcome.refusal is None
        failed += outcome.failure is not None
        result = outcome.failure or outcome.refusal or "accurate"
        dtype = str(outcome.dtype).removeprefix("torch.")
        size = " ".join(f"{key}={value}" for key, value in outcome.size.items())
        print(f"{given.op}  {dtype:8}  {size:40}  {result}")
    print(f"{name}: {ran - failed} of {ran} calls are accurate")
    return 0 if ran and not failed else 1


def register(op: str, path: Path) -> str:
    """Import ``path``, add its backend to ``op`` and return the name of that: the file's."""
    from emu3_kernels.runtime.dispatch import backends

    spec = spec_from_file_location(path.stem, path)
    if spec is None or not path.exists():
        raise SystemExit(f"file must be a Python file, got {path}")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    stated = getattr(module, "BACKENDS", {})
    if op not in stated:
        raise SystemExit(f"{path} must have BACKENDS[{op!r}], got {sorted(stated)}")
    if path.stem in backends(op):
        raise SystemExit(f"{op} already has a backend {path.stem!r}: rename {path}")
    backends(op).add(path.stem, stated[op])
    return path.stem


if __name__ == "__main__":
    raise SystemExit(main())
