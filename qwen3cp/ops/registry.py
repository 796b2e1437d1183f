"""The operators by name: kernels, tags, and the check of a call without a kernel."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qwen3cp.ops import attention, cache, moe, norm, quant, rotary, rules
from qwen3cp.ops.checks import Kernel

__all__ = ["KERNELS", "check_call", "tags_of"]

KERNELS: dict[str, Kernel] = {
    **attention.KERNELS,
    **cache.KERNELS,
    **norm.KERNELS,
    **rotary.KERNELS,
    **moe.KERNELS,
    **quant.KERNELS,
}

# Operators of which the CPU kernels take float32, for comparisons, and the NPU does not.
_NO_FLOAT32 = {
    rules.ATTENTION_DTYPE.op: rules.ATTENTION_DTYPE,
    rules.QUANT_DTYPE.op: rules.QUANT_DTYPE,
}


def tags_of(schema: str) -> tuple[torch.Tag, ...]:
    """torch_npu's tags. Without that of in-place operators, compilation refuses an operator that
    returns the tensor it changes."""
    in_place = (torch.Tag.inplace,) if "(a!)" in schema else ()
    return (torch.Tag.pt2_compliant_tag, *in_place)


def check_call(
    op: str | torch._ops.OpOverload,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    npu_dtypes: bool = False,
) -> None:
    """Raises if an NPU would refuse this call of one of the operators; runs nothing.

    For tensors on any device, meta and fake ones too. Where torch_npu is absent the Meta kernels
    make this check themselves. Where it is present its own serve meta tensors, and they check
    little: a dispatch mode that sees the calls can call this. The rules that need a tensor's data
    are not checked (`Rule.needs_data`).

    Args:
        op: as a dispatch mode gets it, or its name: "npu_swiglu", "npu_grouped_matmul.List".
        args, kwargs: as a dispatch mode gets them; what is left out is the schema's default.
        npu_dtypes: refuse float32 too where only this package's CPU kernels take it.

    Raises:
        ValueError, TypeError, NotImplementedError: by the first rule of `ops.rules` that is broken.
        KeyError: this package has no such operator.
    """
    name = op if isinstance(op, str) else op.name()
    name = name.removeprefix("npu::").removesuffix(".default")
    KERNELS[name].check(*args, **(kwargs or {}))
    first = args[0] if args else None
    if npu_dtypes and name in _NO_FLOAT32 and isinstance(first, Tensor):
        if first.dtype == torch.float32:
            raise _NO_FLOAT32[name].broken("float32 is for comparisons on a CPU, pass bfloat16")
