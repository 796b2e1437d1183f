"""What the operator tests share."""

import importlib

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

importlib.import_module("qwen3cp.ops")  # registers the operators
npu = torch.ops.npu

# bfloat16 keeps 8 significant bits, so neighbouring values are at most 2^-7 apart, relatively. An
# oracle that rounds where the kernel rounds may differ by one such step: float32 sums of another
# order can fall on the other side of a tie.
ONE_BFLOAT16_STEP = 2**-7


def run(op, *args, **kwargs):
    """Call an operator, check its Meta kernel against what came out, and return that."""
    result = op(*args, **kwargs)
    on_meta = tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, (args, kwargs))
    expected = op(*on_meta[0], **on_meta[1])
    leaves, meta_leaves = tree_leaves(result), tree_leaves(expected)
    assert type(result) is type(expected) and len(leaves) == len(meta_leaves)
    for leaf, meta_leaf in zip(leaves, meta_leaves, strict=True):
        assert meta_leaf.device.type == "meta"
        assert (leaf.shape, leaf.dtype) == (meta_leaf.shape, meta_leaf.dtype)
    return result


def assert_close(actual: Tensor, expected: Tensor, **tolerances) -> None:
    """Close to a float32 oracle: to 1e-5 in float32, to one rounding step in bfloat16."""
    if actual.dtype == torch.bfloat16:
        tolerances = {"rtol": ONE_BFLOAT16_STEP, "atol": 1e-5} | tolerances
    else:
        tolerances = {"rtol": 1e-5, "atol": 1e-5} | tolerances
    torch.testing.assert_close(actual.float(), expected.float(), **tolerances)
