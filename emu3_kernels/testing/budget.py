"""The only tolerance of the suite: measured on plain PyTorch at the same dtype, never guessed."""

import torch
from torch import Tensor


def assert_as_accurate(name: str, actual: Tensor, low: Tensor, exact: Tensor) -> None:
    """Allow ``actual`` twice the error that ``low`` makes against ``exact``.

    ``low`` is the reference at the dtype under test and ``exact`` the reference
    at float64. Integers must be equal.
    """
    assert (actual.dtype, actual.shape) == (low.dtype, low.shape), name
    if actual.numel() == 0:
        return
    if not actual.is_floating_point():
        assert torch.equal(actual, exact.to(actual.dtype)), f"{name}: integers differ"
        return
    assert_within(name, actual, exact, budget(low, exact))


def budget(low: Tensor, exact: Tensor) -> Tensor:
    rounding = torch.finfo(low.dtype).eps * exact.abs().max()
    return 2 * ((low.double() - exact).abs().max() + rounding)


def assert_within(name: str, actual: Tensor, exact: Tensor, budget: Tensor) -> None:
    error = (actual.double() - exact).abs().max()
    assert error <= budget, f"{name}: error {error:.2e} exceeds its budget of {budget:.2e}"
