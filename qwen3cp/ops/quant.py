"""Quantisation of activations."""

import torch
from torch import Tensor

from qwen3cp.ops import rules
from qwen3cp.ops.checks import Kernel, check_float, check_shape, refuse

_OP = "npu_dynamic_quant"
INT8 = 1  # the number under which a torch.dtype argument reaches a kernel as an int


def _check(
    input: Tensor,
    *,
    smooth_scales: Tensor | None = None,
    group_index: Tensor | None = None,
    dst_type: int | None = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> Tensor | None:
    check_float(rules.QUANT_DTYPE, input=input)
    refuse(_OP, group_index=group_index)
    if input.dim() < 2:
        raise rules.QUANT_RANK.broken(f"input must have two or more dimensions, not {input.dim()}")
    if dst_type not in (None, INT8):
        raise NotImplementedError(f"{_OP}: dst_type must be None or torch.int8")
    if quant_mode != "pertoken":
        raise NotImplementedError(f"{_OP}: quant_mode must be 'pertoken', not {quant_mode!r}")
    if dst_type_max != 0.0:
        raise NotImplementedError(f"{_OP}: dst_type_max is not supported")
    if smooth_scales is not None:
        check_float(rules.QUANT_SMOOTH_DTYPE, input=input, smooth_scales=smooth_scales)
        check_shape(rules.QUANT_SMOOTH, "smooth_scales", smooth_scales, (input.shape[-1],))
    return smooth_scales


def dynamic_quant(input: Tensor, **options) -> tuple[Tensor, Tensor]:
    """Per-token symmetric int8: returns (quantised input, float32 scale of each token).

    The NPU multiplies by the rounded factor 127 / amax instead of dividing by the scale, and the
    scale is the reciprocal of that factor. A row of zeros gives zeros and scale 0.
    """
    smooth_scales = _check(input, **options)
    x = input.contiguous().float()
    if smooth_scales is not None:
        x = x * smooth_scales.float()
    amax = x.abs().amax(-1, keepdim=True)
    factor = torch.full_like(amax, 127.0) / amax  # 127.0 / amax would multiply by 1 / amax
    quantised = (x * factor).nan_to_num_(0.0).round_().to(torch.int8)
    return quantised, factor.reciprocal_().squeeze(-1)


def _dynamic_quant_meta(input: Tensor, **options) -> tuple[Tensor, Tensor]:
    _check(input, **options)
    quantised = input.new_empty(input.shape, dtype=torch.int8)
    return quantised, input.new_empty(input.shape[:-1], dtype=torch.float32)


KERNELS = {_OP: Kernel(dynamic_quant, _dynamic_quant_meta, _check)}
