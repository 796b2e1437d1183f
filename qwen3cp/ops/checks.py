"""Argument checks and helpers that several operators share.

Checks look at shapes, dtypes and host integers only, so the CPU and the Meta kernel of an operator
make the same ones. What can be checked only with the data in hand is checked by the CPU kernel.
"""

from collections.abc import Callable, Iterator
from functools import wraps
from typing import NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from qwen3cp.ops.rules import Rule
from qwen3cp.ops.settings import settings

P = ParamSpec("P")
R = TypeVar("R")


def without_grad(function: Callable[P, R]) -> Callable[P, R]:
    """torch.no_grad() as a decorator that costs nothing where it is off already, as in a forward,
    where a switch for each operator and module would take a tenth of the host's time."""
    switching_off = torch.no_grad()(function)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        run = switching_off if torch.is_grad_enabled() else function
        return run(*args, **kwargs)

    return call


class Kernel(NamedTuple):
    """The two implementations of one operator, and the check that both begin with."""

    cpu: Callable
    meta: Callable
    check: Callable  # takes the operator's arguments, raises by the first rule that they break


def are_symbols(*numbers: int) -> bool:
    """Whether any is a symbol of a graph that is being compiled. Its value must not be looked at:
    the graph would be of that value alone. The CPU kernel sees the number when the graph runs."""
    return any(isinstance(number, torch.SymInt) for number in numbers)


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


def poison_unwritten_(tensor: Tensor, start: int = 0) -> None:
    """In debug mode, make visible that the NPU leaves the rows from start on uninitialised."""
    if not settings.debug:
        return
    tensor = tensor[start:]
    if tensor.numel():
        if tensor.is_floating_point():
            tensor.fill_(torch.nan)
        else:
            tensor.view(torch.uint8).fill_(0x7F)


# Of float32: half a megabyte, so that what a kernel makes of a block stays near the core.
_BLOCK_ELEMENTS = 1 << 17


def fits_block(x: Tensor) -> bool:
    """Whether `row_blocks` leaves x whole."""
    return x.numel() <= _BLOCK_ELEMENTS


def row_blocks(x: Tensor, *others: Tensor, dim: int = 0) -> Iterator[tuple[Tensor, ...]]:
    """The tensors in runs of as many rows (entries of dim) as are worked on at a time.

    What has only one row is in every run.
    """
    if fits_block(x):
        return iter([(x, *others)])
    rows = x.shape[dim]
    step = max(1, _BLOCK_ELEMENTS * rows // x.numel())
    runs = x.split(step, dim)
    of_others = (
        [each] * len(runs) if each.shape[dim] == 1 else each.split(step, dim) for each in others
    )
    return zip(runs, *of_others, strict=True)
