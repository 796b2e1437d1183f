"""Root mean square normalisation."""

from collections.abc import Iterator

import torch
from torch import Tensor

from qwen3cp.ops import rules
from qwen3cp.ops.checks import Kernel, check_dtype, check_float, check_shape, fits_block, row_blocks
from qwen3cp.ops.rules import Rule


def _normalise(x: Tensor, epsilon: float, rstd: Tensor, out: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) of each row, in float32; rstd and out are written."""
    torch.linalg.vector_norm(x, dim=-1, keepdim=True, out=rstd)  # one pass over x
    rstd.mul_(rstd).div_(x.shape[-1]).add_(epsilon).rsqrt_()
    return torch.mul(x, rstd, out=out)


def _rows(gamma: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Blocks of rows, each of what gamma spans, and of their rstd, which comes last."""
    if gamma.dim() == 1 and fits_block(tensors[0]):
        return iter([tensors])
    *whole, rstd = tensors
    size = gamma.numel()
    return row_blocks(*(x.reshape(-1, size) for x in whole), rstd.view(-1, 1))


def _new_rstd(x: Tensor, gamma: Tensor) -> Tensor:
    shape = (*x.shape[: x.dim() - gamma.dim()], *(1 for _ in gamma.shape))
    return x.new_empty(shape, dtype=torch.float32)


def _check_gamma(rule: Rule, x: Tensor, gamma: Tensor) -> None:
    if not 1 <= gamma.dim() <= x.dim():
        raise rule.broken(f"gamma has {gamma.dim()} dimensions, the input {x.dim()}")
    check_shape(rule, "gamma", gamma, tuple(x.shape[x.dim() - gamma.dim() :]))


def _check_rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-06) -> None:
    check_float(rules.RMS_DTYPE, input=input)
    check_dtype(rules.RMS_GAMMA_DTYPE, "gamma", gamma, input.dtype, torch.float32)
    _check_gamma(rules.RMS_GAMMA, input, gamma)


def rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-06) -> tuple[Tensor, Tensor]:
    """Returns (normalised input, rstd). Everything in float32, rounded once, at the end."""
    out, rstd = _rms_norm_meta(input, gamma, epsilon)  # makes the checks
    scale = gamma.float().view(-1)
    for x, y, r in _rows(gamma, input, out, rstd):
        x = x.float()
        normalised = y if y.dtype == torch.float32 else x  # of another dtype, x is a copy
        torch.mul(_normalise(x, epsilon, r, out=normalised), scale, out=y)
    return out, rstd


def _rms_norm_meta(input: Tensor, gamma: Tensor, epsilon: float = 1e-06) -> tuple[Tensor, Tensor]:
    _check_rms_norm(input, gamma)
    return input.new_empty(input.shape), _new_rstd(input, gamma)


def _check_add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-06) -> None:
    check_float(rules.ADD_RMS_DTYPE, x1=x1, x2=x2, gamma=gamma)
    check_shape(rules.ADD_RMS_SHAPE, "x2", x2, tuple(x1.shape))
    _check_gamma(rules.ADD_RMS_GAMMA, x1, gamma)


def add_rms_norm(
    x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-06
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (normalised sum, rstd, sum).

    Unlike npu_rms_norm this rounds twice, before and after the product with gamma. The sum is
    normalised before it is rounded.
    """
    out, rstd, total = _add_rms_norm_meta(x1, x2, gamma, epsilon)  # makes the checks
    scale = gamma.reshape(-1)
    for a, b, y, added, r in _rows(gamma, x1, x2, out, total, rstd):
        if y.dtype == torch.float32:
            normalised = _normalise(torch.add(a, b, out=added), epsilon, r, out=y)
        else:
            x = a.float().add_(b.float())
            added.copy_(x)
            normalised = _normalise(x, epsilon, r, out=x).to(y.dtype)
        torch.mul(normalised, scale, out=y)
    return out, rstd, total


def _add_rms_norm_meta(
    x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-06
) -> tuple[Tensor, Tensor, Tensor]:
    _check_add_rms_norm(x1, x2, gamma)
    return x1.new_empty(x1.shape), _new_rstd(x1, gamma), x1.new_empty(x1.shape)


KERNELS = {
    "npu_rms_norm": Kernel(rms_norm, _rms_norm_meta, _check_rms_norm),
    "npu_add_rms_norm": Kernel(add_rms_norm, _add_rms_norm_meta, _check_add_rms_norm),
}
