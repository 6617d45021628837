"""The model of ``prediction.py`` against the H200: its errors, and the fit of its parameters."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from math import exp, log
from statistics import median

from benchmarks.harness.prediction import CARDS, Cost, Model, Work, cost, time_of
from emu3_kernels.testing.loops import Block
from emu3_kernels.testing.machine_code import Facts

FLOPS = {
    "attention_fwd_kernel": lambda n: 2 * n["q_ptr"] * _keys(n),
    "attention_fwd_gluon_kernel": lambda n: 2 * n["out_ptr"] * _keys(n),
    "attention_fwd_gluon_blackwell_kernel": lambda n: 2 * n["out_ptr"] * _keys(n),
    "attention_bwd_dq_gluon_kernel": lambda n: 3 * n["out_ptr"] * _keys(n),
    "attention_bwd_dkdv_gluon_kernel": lambda n: (
        4 * n["dk_ptr"] * n["num_heads"] // n["num_kv_heads"] * _keys(n)
    ),
    "attention_bwd_dq_kernel": lambda n: 3 * n["q_ptr"] * _keys(n),
    "attention_bwd_dkdv_kernel": lambda n: 4 * n["q_ptr"] * _keys(n),
    "decode_attention_split_kernel": lambda n: 4 * n["BLOCK_M"] * n["k_ptr"],
    "decode_attention_kernel": lambda n: 4 * n["BLOCK_M"] * n["k_ptr"],
    "causal_conv3d_fwd_kernel": lambda n: 2 * n["y_ptr"] * n["weight_ptr"] // n["out_channels"],
}
"""By kernel, from the sizes of a launch; a causal mask leaves half of two, three or four GEMMs."""

TRIPS = {"nearest_code_fwd_kernel": lambda n: n["num_codes"] // n["CODES"]}
"""Iterations of a program's loop, of kernels that read the same bytes again and again."""


def _keys(sizes: dict[str, int]) -> int:
    """Return how many keys the mask spans: those of a document, where the record states it."""
    return sizes.get("document", sizes["num_keys"])


@dataclass(frozen=True)
class Measured:
    """A call MEASURED on the H200, and the launches COUNTED of the kernels that it ran."""

    op: str
    size: dict
    direction: str
    tiles: str
    us: float
    launches: tuple[Work, ...]
    left_out: str
    """Reason why the time of the call is not that of its kernels; empty if it is."""

    @cached_property
    def costs(self) -> list[Cost]:
        return [cost(work, CARDS["H200"]) for work in self.launches]

    def predicted(self, model: Model) -> float:
        return sum(time_of(cost, model) for cost in self.costs)

    def error(self, model: Model) -> float:
        """Return PREDICTED over MEASURED, less 1."""
        return self.predicted(model) / self.us - 1


def read(text: str) -> list[Measured]:
    """Read ``results/h200_counted.json``."""
    return [
        Measured(**entry | {"launches": tuple(work_of(w) for w in entry["launches"])})
        for entry in json.loads(text)["calls"]
    ]


def work_of(stored: dict) -> Work:
    """Read a launch from JSON: a row of ``codegen.json`` or a launch of ``h200_counted.json``."""
    kernel, sizes = stored["kernel"], stored["sizes"]
    facts = stored["facts"]
    found = tuple(Block(**block) for block in facts["blocks"])
    unused = {"stack": 0, "spills": 0, "loads": {}, "stores": {}}
    return Work(
        Facts(**unused | facts | {"blocks": found}),
        programs=stored["programs"],
        num_warps=stored["num_warps"],
        num_bytes=stored["num_bytes"],
        flops=FLOPS[kernel](sizes) if kernel in FLOPS else 0,
        trips=TRIPS[kernel](sizes) if kernel in TRIPS else 0,
    )


def compared(calls: Sequence[Measured]) -> list[Measured]:
    return [call for call in calls if not call.left_out]


def median_error(calls: Sequence[Measured], model: Model) -> float:
    return median(abs(call.error(model)) for call in compared(calls))


def fit(calls: Sequence[Measured], start: Model) -> Model:
    """Minimise the mean of ``|log(PREDICTED / MEASURED)|``, in which far rows weigh little."""
    from scipy.optimize import minimize

    names = [field.name for field in fields(Model)]
    calls = compared(calls)

    def model_of(logs: Sequence[float]) -> Model:
        return Model(**dict(zip(names, map(exp, logs), strict=True)))

    def loss(logs: Sequence[float]) -> float:
        model = model_of(logs)
        return sum(abs(log(call.predicted(model) / call.us)) for call in calls) / len(calls)

    first = [log(getattr(start, name)) for name in names]
    options = {"maxiter": 400, "xatol": 1e-3, "fatol": 1e-5}
    return model_of(minimize(loss, first, method="Nelder-Mead", options=options).x)


def held_out_error(
    calls: Sequence[Measured], start: Model, group: Callable[[Measured], object]
) -> dict:
    """Return the median error of each ``group`` under a fit to all the others."""
    calls = compared(calls)
    errors = {}
    for key in dict.fromkeys(map(group, calls)):
        model = fit([call for call in calls if group(call) != key], start)
        errors[key] = median_error([call for call in calls if group(call) == key], model)
    return errors
