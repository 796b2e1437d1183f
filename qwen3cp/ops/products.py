"""Products of large matrices in the dtype that the CPU is quick at."""

import torch
from torch import Tensor

from qwen3cp.ops.settings import settings

# From so many rows on, casting the right factor costs less than it gains.
_MANY_ROWS = 32


def matmul(x: Tensor, weight: Tensor, *, out: Tensor) -> None:
    """out = x @ weight, accumulated in float32 and rounded once.

    [M, K] @ [K, N]; weight may be a transposed view. See `Settings.bfloat16_products`.
    """
    dtype = settings.product_dtype(x.dtype)
    if dtype == x.dtype or x.shape[0] < _MANY_ROWS:
        torch.mm(x, weight, out=out)
    else:
        out.copy_(torch.mm(x.to(dtype), weight.to(dtype)))
