"""Calls of the operators with their arguments and results, as a model on the CPU makes them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from qwen3cp import CommConfig, CPQwen3MoeForCausalLM, ParallelContext
from qwen3cp.ops import settings

LENGTHS = (300, 17, 1, 129)
"""Of the prompts: over a page border, short, a single token, one token past a page."""


@dataclass
class Call:
    operator: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any

    def run_on(self, device: torch.device) -> Any:
        def move(value: Any) -> Any:
            return value.to(device) if isinstance(value, torch.Tensor) else value

        args, kwargs = tree_map(move, (self.args, self.kwargs))
        return getattr(torch.ops.npu, self.operator)(*args, **kwargs)


class Recorder(TorchDispatchMode):
    """Keeps one call of each operator for each set of shapes, dtypes and plain arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, Call] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace != "npu":
            return func(*args, **kwargs)
        operator = func._schema.name.removeprefix("npu::")
        key = repr((operator, tree_map(_describe, (args, kwargs))))
        if key in self.calls:
            return func(*args, **kwargs)
        copied_args, copied_kwargs = tree_map(_copy, (args, kwargs))
        result = func(*args, **kwargs)
        self.calls[key] = Call(operator, copied_args, copied_kwargs, tree_map(_copy, result))
        return result


def _describe(value: Any) -> Any:
    return (value.shape, value.dtype) if isinstance(value, torch.Tensor) else value


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def record(
    cp: int, tp: int, path: Path, moe: Literal["tp", "ep"], comm: dict[str, Any]
) -> list[Call]:
    """Prefill, a chunk after it, and a decode step in bfloat16: this rank's calls.

    Collective over cp x tp ranks.
    """
    ctx = ParallelContext.single()
    if cp * tp > 1:
        ctx = ParallelContext.from_world(
            cp,
            tp,
            moe=moe,
            comm=CommConfig(**comm),
            backend="gloo",
        )
    model = CPQwen3MoeForCausalLM.from_pretrained(
        path, parallel_context=ctx, dtype=torch.bfloat16, device="cpu", progress=False
    )
    generator = torch.Generator().manual_seed(1)
    cache = model.new_kv_cache(max_tokens=2048)
    sequences = [cache.new_sequence() for _ in LENGTHS]
    with Recorder() as recorder, settings.override(float32_scores=True):
        for lengths in (LENGTHS, (5, 200, 3, 1)):
            prompts = [
                torch.randint(0, model.vocab_size, (n,), generator=generator).tolist()
                for n in lengths
            ]
            model.prefill(cache, sequences, prompts)
        model.decode(cache, sequences, [1, 2, 3, 4])
    return list(recorder.calls.values())
