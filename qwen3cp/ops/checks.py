"""Argument checks and helpers that several operators share.

Checks look at shapes, dtypes and host integers only, so the CPU and the Meta kernel of an operator
make the same ones. What can be checked only with the data in hand is checked by the CPU kernel.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from qwen3cp.ops.rules import Rule
from qwen3cp.ops.settings import settings


class Kernel(NamedTuple):
    """The two implementations of one operator, and the check that both begin with."""

    cpu: Callable
    meta: Callable
    check: Callable  # takes the operator's arguments, raises by the first rule that they break


def check_float(rule: Rule, **tensors: Tensor) -> None:
    """Accept bfloat16, and float32 as an extension for comparisons; all tensors alike."""
    (first_name, first), *rest = tensors.items()
    if first.dtype not in (torch.bfloat16, torch.float32):
        raise rule.broken(f"{first_name} must be bfloat16 or float32, not {first.dtype}")
    for name, tensor in rest:
        if tensor.dtype != first.dtype:
            raise rule.broken(
                f"{name} is {tensor.dtype}, but must be {first.dtype} like {first_name}"
            )


def check_dtype(rule: Rule, name: str, tensor: Tensor, *allowed: torch.dtype) -> None:
    if tensor.dtype not in allowed:
        raise rule.broken(f"{name} must be one of {allowed}, not {tensor.dtype}")


def check_shape(rule: Rule, name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise rule.broken(f"{name} must have shape {expected}, not {tuple(tensor.shape)}")


def refuse(op: str, **arguments: object) -> None:
    """Refuse optional arguments that this package does not implement, when they are given."""
    for name, value in arguments.items():
        if value is not None:
            raise NotImplementedError(f"{op}: {name} is not supported and must be None")


def poison_unwritten_(tensor: Tensor) -> None:
    """In debug mode, make visible that the NPU leaves this memory uninitialised."""
    if settings.debug and tensor.numel():
        if tensor.is_floating_point():
            tensor.fill_(torch.nan)
        else:
            tensor.view(torch.uint8).fill_(0x7F)
