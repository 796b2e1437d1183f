"""Products of large matrices on a CPU, in the dtype that it is quick at.

See `Settings.bfloat16_products`. All accumulate in float32 and round once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3cp.ops.settings import settings

# From so many rows on, casting the weight costs less than it gains.
_MANY_ROWS = 32


def matmul(x: Tensor, weight: Tensor, *, out: Tensor) -> None:
    """out = x @ weight: [M, K] @ [K, N], where weight may be a transposed view."""
    if _as_it_is(x):
        torch.mm(x, weight, out=out)
    else:
        out.copy_(torch.mm(x.float(), weight.float()))


def linear(x: Tensor, layer: torch.nn.Linear, *, bias: bool = True) -> Tensor:
    """layer(x), with or without its bias."""
    added = layer.bias if bias else None
    if _as_it_is(x):
        return F.linear(x, layer.weight, added)
    added = None if added is None else added.float()
    return F.linear(x.float(), layer.weight.float(), added).to(x.dtype)


def _as_it_is(x: Tensor) -> bool:
    return (
        x.device.type != "cpu"
        or x.shape[0] < _MANY_ROWS
        or settings.product_dtype(x.dtype) == x.dtype
    )
