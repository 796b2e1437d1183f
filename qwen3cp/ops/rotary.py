"""Rotary position embedding."""

from collections.abc import Callable

import torch
from torch import Tensor

from qwen3cp.ops import rules
from qwen3cp.ops.checks import Kernel, check_float, refuse, row_blocks

_OP = "npu_rotary_mul"

# Layouts of the input, each with the shapes that cos and sin may have in it ("1" broadcasts). They
# are tried in this order: first that of the model.
_COS_SHAPES = {
    "half": {
        "BSND": ("1S1D", "BS1D", "BSND"),
        "BNSD": ("11SD", "B1SD", "BNSD"),
        "SBND": ("S11D", "SB1D", "SBND"),
        "TND": ("T1D", "TND"),
    },
    "interleave": {"BNSD": ("11SD",), "BSND": ("1S1D",), "SBND": ("S11D",), "TND": ("T1D",)},
}
_HALVES: dict[str, Callable[[Tensor], tuple[Tensor, ...]]] = {
    "half": lambda x: x.chunk(2, dim=-1),
    "interleave": lambda x: (x[..., 0::2], x[..., 1::2]),
}
_MAX_HEADS_OR_BATCH = 1000  # exclusive; token counts are not limited
_MAX_HEAD_DIM = 896  # exclusive


def _fits(x: Tensor, cos: Tensor, layout: str, cos_layout: str) -> bool:
    if x.dim() != len(layout) or cos.dim() != x.dim():
        return False
    for letter, cos_letter, size, cos_size in zip(
        layout, cos_layout, x.shape, cos.shape, strict=True
    ):
        if letter in "BN" and size >= _MAX_HEADS_OR_BATCH:
            return False
        if cos_size != (1 if cos_letter == "1" else size):
            return False
    return True


def _check(
    input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None
) -> None:
    refuse(_OP, rotate=rotate)
    for name, tensor in (("input", input), ("r1", r1), ("r2", r2)):
        check_float(rules.ROTARY_DTYPE, **{name: tensor})
    if rotary_mode not in _COS_SHAPES:
        raise rules.ROTARY_MODE.broken(
            f"rotary_mode must be 'half' or 'interleave', not {rotary_mode!r}"
        )
    if r1.shape != r2.shape:
        raise rules.ROTARY_COS_SIN.broken(
            f"r1 {tuple(r1.shape)} and r2 {tuple(r2.shape)} must have the same shape"
        )
    head_dim = input.shape[-1]
    if head_dim % 2 or head_dim >= _MAX_HEAD_DIM:
        raise rules.ROTARY_HEAD_DIM.broken(
            f"the head dimension must be even and below {_MAX_HEAD_DIM}, not {head_dim}"
        )
    allowed = _COS_SHAPES[rotary_mode]
    if not any(
        _fits(input, r1, layout, cos_layout)
        for layout, cos_layouts in allowed.items()
        for cos_layout in cos_layouts
    ):
        raise rules.ROTARY_LAYOUT.broken(
            f"input {tuple(input.shape)} with cos and sin {tuple(r1.shape)} is none of the "
            f"layouts of mode {rotary_mode!r}: {allowed} "
            f"(B and N below {_MAX_HEADS_OR_BATCH}, so tokens go in the place of S)"
        )


def rotary_mul(
    input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None
) -> Tensor:
    """input * r1 + rotate(input) * r2 with r1 = cos and r2 = sin, in float32, rounded once.

    rotate turns (a, b) into (-b, a), where a and b are the halves of the head dimension (mode
    "half") or its even and odd entries (mode "interleave").
    """
    _check(input, r1, r2, rotary_mode, rotate)
    out = input.new_empty(input.shape)
    # cos and sin of another dtype are first cast to that of the input.
    halves = _HALVES[rotary_mode]
    cos, sin = (r.to(input.dtype).float() for r in (r1, r2))
    longest = max(range(input.dim() - 1), key=lambda d: input.shape[d])
    for x, y, c, s in row_blocks(input, out, cos, sin, dim=longest):
        x = x.float()
        rotated = torch.mul(x, c, out=y if y.dtype == torch.float32 else None)
        (x_a, x_b), (s_a, s_b), (a, b) = (halves(each) for each in (x, s, rotated))
        a.addcmul_(x_b, s_a, value=-1)
        b.addcmul_(x_a, s_b)
        if rotated is not y:
            y.copy_(rotated)
    return out


def _rotary_mul_meta(
    input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None
) -> Tensor:
    _check(input, r1, r2, rotary_mode, rotate)
    return input.new_empty(input.shape)


KERNELS = {_OP: Kernel(rotary_mul, _rotary_mul_meta, _check)}
