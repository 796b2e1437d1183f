"""Root mean square normalisation."""

import torch
from torch import Tensor

from qwen3cp.ops import rules
from qwen3cp.ops.checks import Kernel, check_dtype, check_float, check_shape
from qwen3cp.ops.rules import Rule


def _rstd(x: Tensor, gamma: Tensor, epsilon: float) -> Tensor:
    """1 / sqrt(mean(x^2) + epsilon) over the dimensions of gamma, which are kept with size 1."""
    dims = tuple(range(-gamma.dim(), 0))
    return torch.rsqrt(x.square().mean(dims, keepdim=True) + epsilon)


def _rstd_shape(x: Tensor, gamma: Tensor) -> tuple[int, ...]:
    return (*x.shape[: x.dim() - gamma.dim()], *(1 for _ in gamma.shape))


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
    _check_rms_norm(input, gamma)
    x = input.contiguous().float()
    rstd = _rstd(x, gamma, epsilon)
    return (x * rstd).mul_(gamma.float()).to(input.dtype), rstd


def _rms_norm_meta(input: Tensor, gamma: Tensor, epsilon: float = 1e-06) -> tuple[Tensor, Tensor]:
    _check_rms_norm(input, gamma)
    rstd = input.new_empty(_rstd_shape(input, gamma), dtype=torch.float32)
    return input.new_empty(input.shape), rstd


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
    _check_add_rms_norm(x1, x2, gamma)
    x = (x1.float() + x2.float()).contiguous()
    rstd = _rstd(x, gamma, epsilon)
    normed = (x * rstd).to(x1.dtype)
    return normed.float().mul_(gamma.float()).to(x1.dtype), rstd, x.to(x1.dtype)


def _add_rms_norm_meta(
    x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-06
) -> tuple[Tensor, Tensor, Tensor]:
    _check_add_rms_norm(x1, x2, gamma)
    rstd = x1.new_empty(_rstd_shape(x1, gamma), dtype=torch.float32)
    return x1.new_empty(x1.shape), rstd, x1.new_empty(x1.shape)


KERNELS = {
    "npu_rms_norm": Kernel(rms_norm, _rms_norm_meta, _check_rms_norm),
    "npu_add_rms_norm": Kernel(add_rms_norm, _add_rms_norm_meta, _check_add_rms_norm),
}
