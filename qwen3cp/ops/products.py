"""Products of large matrices on a CPU, in the dtype that it is quick at.

See `Settings.bfloat16_products`. All accumulate in float32 and round once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3cp.ops.settings import settings

# From so many rows on, casting the weight costs less than it gains.
_MANY_ROWS = 32
# So many rows are cast at a time: all of a long prompt would set the peak of memory.
_ROWS = 1024


def matmul(x: Tensor, weight: Tensor, *, out: Tensor, bias: Tensor | None = None) -> None:
    """out = x @ weight + bias: [M, K] @ [K, N], where weight may be a transposed view."""
    if _as_it_is(x):
        _multiply(x, weight, bias, out)
        return
    weight, bias = weight.float(), None if bias is None else bias.float()
    for rows, result in zip(x.split(_ROWS), out.split(_ROWS), strict=True):
        product = result.new_empty(result.shape, dtype=torch.float32)
        _multiply(rows.float(), weight, bias, product)
        result.copy_(product)


def linear(x: Tensor, layer: torch.nn.Linear, *, bias: bool = True) -> Tensor:
    """layer(x), with or without its bias."""
    added = layer.bias if bias else None
    if _as_it_is(x):
        return F.linear(x, layer.weight, added)
    out = x.new_empty(x.shape[0], layer.out_features)
    matmul(x, layer.weight.t(), out=out, bias=added)
    return out


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(x, weight, out=out)
    else:
        torch.addmm(bias, x, weight, out=out)


def _as_it_is(x: Tensor) -> bool:
    return (
        x.device.type != "cpu"
        or x.shape[0] < _MANY_ROWS
        or settings.product_dtype(x.dtype) == x.dtype
    )
