"""Writing rows of keys and values into a cache."""

import torch
from torch import Tensor

from qwen3cp.ops import rules
from qwen3cp.ops.checks import Kernel, check_dtype, check_shape
from qwen3cp.ops.settings import settings

_SCATTER = "npu_scatter_nd_update_"


def _check_scatter(input: Tensor, indices: Tensor, updates: Tensor) -> None:
    dtypes = (torch.bfloat16, torch.float32, torch.bool, torch.int64, torch.int8)
    check_dtype(rules.SCATTER_DTYPE, "input", input, *dtypes)
    check_dtype(rules.SCATTER_DTYPE, "updates", updates, input.dtype)
    check_dtype(rules.SCATTER_INDICES_DTYPE, "indices", indices, torch.int32, torch.int64)
    if indices.dim() == 0 or not 1 <= indices.shape[-1] <= input.dim():
        raise rules.SCATTER_DEPTH.broken(
            f"the last dimension of indices must be between 1 and the "
            f"{input.dim()} dimensions of input, but indices are {tuple(indices.shape)}"
        )
    depth = indices.shape[-1]
    expected = (*indices.shape[:-1], *input.shape[depth:])
    check_shape(rules.SCATTER_UPDATES, "updates", updates, expected)


def scatter_nd_update_(input: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """input[indices[n, :depth]] = updates[n], in place; depth is the last size of indices."""
    _check_scatter(input, indices, updates)
    depth = indices.shape[-1]
    rows = indices.reshape(-1, depth)
    if rows.shape[0] == 0:
        return input
    columns = rows.unbind(1)
    for column, size in zip(columns, input.shape, strict=False):
        low, high = (int(end) for end in column.aminmax())
        if low < 0 or high >= size:
            raise rules.SCATTER_RANGE.broken(f"indices {low}..{high} do not fit a size of {size}")
    if settings.debug and rows.unique(dim=0).shape[0] != rows.shape[0]:
        raise rules.SCATTER_UNIQUE.broken("duplicate indices, the order of the writes is undefined")
    input.index_put_(columns, updates.reshape(-1, *input.shape[depth:]))
    return input


def _scatter_nd_update_meta(input: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    _check_scatter(input, indices, updates)
    return input


KERNELS = {_SCATTER: Kernel(scatter_nd_update_, _scatter_nd_update_meta, _check_scatter)}
