"""Tensors as int8 values with float32 scales, and the form in which they travel. No communication.

A tensor is seen as G groups of g values that share a scale, [G, g]: a group is a token, 128
neighbouring values of one, or a head. Quantisation is symmetric: value = int8 * scale, where 127 *
scale is the largest magnitude of the group, so that no value is off by more than half a scale.

What one rank sends to another is a block of m groups as bytes: first their m float32 scales, then
their m * g int8 values, so that both go in one collective.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

import qwen3cp.ops  # noqa: F401

__all__ = ["CHUNK_VALUES", "block_bytes", "chunks", "dequantise_", "pack", "sum_of", "unpack"]

CHUNK_VALUES = 1 << 23
"""Values that are quantised at a time: 8 MiB on the wire, enough to fill a link, few enough that
the temporaries stay small beside a long prompt's activations."""

SCALE_BYTES = 4


def chunks(num_groups: int, group_size: int, num_blocks: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of the groups that travel together; but for the last a multiple of num_blocks.

    The last chunk is filled up with groups of zeros: blocks of one collective have one size.
    """
    step = max(1, CHUNK_VALUES // group_size // num_blocks) * num_blocks
    for start in range(0, num_groups, step):
        yield start, min(start + step, num_groups)


def block_bytes(num_groups: int, group_size: int) -> int:
    """Bytes of a block, with the values filled up to whole floats for the next block's scales."""
    return SCALE_BYTES * (num_groups - -num_groups * group_size // SCALE_BYTES)


def pack(x: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """Quantises x, [G > 0, g] in bfloat16 or float32: int8 [num_blocks, block_bytes(m, g)].

    m is ceil(G / num_blocks); groups that are missing in the last blocks are zeros. A group that
    holds a value that is not finite gets the scale NaN, and so comes out NaN as a whole. Groups
    with no magnitude above 3.7e-37 come out as zeros.
    """
    size = -(-len(x) // num_blocks)
    if len(x) < num_blocks * size:
        x = torch.nn.functional.pad(x, (0, 0, 0, num_blocks * size - len(x)))
    quantised, scales = torch.ops.npu.npu_dynamic_quant(x)
    # what a kernel makes of a NaN or an infinity is not documented; NaN passes through amax
    finite = x.abs().amax(-1).isfinite()
    blocks = x.new_empty(num_blocks, block_bytes(size, x.shape[1]), dtype=torch.int8)
    values, block_scales = unpack(blocks, x.shape[1])
    values.copy_(quantised.view(values.shape))
    block_scales.copy_(scales.where(finite, torch.nan).view(block_scales.shape))
    return blocks


def unpack(blocks: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of n blocks of m groups: values, int8 [n, m, g], and scales, float32 [n, m, 1]."""
    size = blocks.shape[1] // (SCALE_BYTES + group_size)
    end = SCALE_BYTES * size
    scales = blocks[:, :end].view(torch.float32)
    return blocks[:, end : end + size * group_size].unflatten(1, (size, group_size)), scales[
        ..., None
    ]


def sum_of(blocks: torch.Tensor, group_size: int) -> torch.Tensor:
    """The sum over n blocks of what they stand for, added in float32 in their order: [m, g]."""
    values, scales = unpack(blocks, group_size)
    total = values[0].float().mul_(scales[0])
    for block, scale in zip(values[1:], scales[1:], strict=True):
        total.addcmul_(block.float(), scale)
    return total


def dequantise_(out: torch.Tensor, blocks: torch.Tensor) -> None:
    """Writes what n blocks stand for to `out`, [G, g] with G <= n * m, in its dtype."""
    values, scales = unpack(blocks, out.shape[1])
    start = 0
    for block, scale in zip(values, scales, strict=True):
        part = out[start : start + len(block)]
        part.copy_(block[: len(part)].float().mul_(scale[: len(part)]))
        start += len(block)
