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
        assert leaf.is_contiguous() and meta_leaf.is_contiguous()
    return result


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Close to a float32 oracle: to 1e-5 in float32, to one rounding step in bfloat16."""
    rtol = ONE_BFLOAT16_STEP if actual.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(actual.float(), expected.float(), rtol=rtol, atol=1e-5)
