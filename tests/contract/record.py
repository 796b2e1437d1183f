"""The operator calls that the model makes, recorded from real runs on CPU ranks, as plain data."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qwen3cp import CommConfig, CPQwen3MoeForCausalLM
from tests.models import load, random_ids

STEPS = ("prefill", "chunk", "decode")
MORE_STEPS = ("one sequence of three", "forked", "two calls", "padded batch")


def to_data(value: Any) -> Any:
    """Tensors as shape, strides and dtype; everything else as it is. For JSON."""
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return {"shape": list(value.shape), "stride": list(value.stride()), "dtype": dtype}
    if isinstance(value, (list, tuple)):
        return [to_data(each) for each in value]
    assert value is None or isinstance(value, (bool, int, float, str)), value
    return value


def to_meta(value: Any) -> Any:
    """The same with meta tensors."""
    if isinstance(value, dict) and "shape" not in value:  # keyword arguments
        return {name: to_meta(each) for name, each in value.items()}
    if isinstance(value, dict):
        dtype = getattr(torch, value["dtype"])
        return torch.empty_strided(value["shape"], value["stride"], dtype=dtype, device="meta")
    if isinstance(value, list):
        return [to_meta(each) for each in value]
    return value


class Recorder(TorchDispatchMode):
    """Every call of an operator of the namespace npu, with all arguments and what came out."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[dict[str, Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace != "npu":
            return func(*args, **kwargs)
        before = to_data(args), {name: to_data(value) for name, value in kwargs.items()}
        result = func(*args, **kwargs)
        name = func.name().removeprefix("npu::")
        self.calls.append(
            {"op": name, "args": before[0], "kwargs": before[1], "out": to_data(result)}
        )
        return result


def record_steps(
    cp: int, tp: int, path: Path, dtype: torch.dtype, moe: str, comm: dict[str, Any]
) -> dict[str, list[str]]:
    """In each rank: the distinct calls of every step, as JSON.

    With settings of the communication only STEPS, which they change.
    """
    options = {} if moe == "tp" else {"moe": moe}
    model = cast(CPQwen3MoeForCausalLM, load(path, cp, tp, dtype, **options))
    steps: dict[str, list[str]] = {}

    def step(name: str, run: Any, *args: Any, **kwargs: Any) -> None:
        with Recorder() as recorder:
            run(*args, **kwargs)
        steps[name] = sorted({json.dumps(call, sort_keys=True) for call in recorder.calls})

    with model.parallel_context.communication(CommConfig(**comm)):
        cache = model.new_kv_cache(num_pages=24)
        sequences = [cache.new_sequence() for _ in range(3)]
        step("prefill", model.prefill, cache, sequences, random_ids(1, 150, 1, 33))
        step("chunk", model.prefill, cache, sequences[:2], random_ids(2, 140, 7))
        step("decode", model.decode, cache, sequences, [3, 4, 5])
        if comm:
            return steps
        step("one sequence of three", model.decode, cache, sequences[:1], [6])
        fork = cache.fork(sequences[0])
        step("forked", model.prefill, cache, [sequences[0], fork], random_ids(3, 2, 3))
        # a pool that just holds the prompt: early and late blocks are calls of their own
        tight = model.new_kv_cache(num_pages=6)
        step("two calls", model.prefill, tight, [tight.new_sequence()], random_ids(4, 600))
        mask = torch.ones(2, 12, dtype=torch.long)
        mask[0, :5] = 0
        ids = random_ids(5, 24)[0].view(mask.shape)
        step("padded batch", model, input_ids=ids, attention_mask=mask)
    return steps


def unique(recorded: Iterable[dict[str, list[str]]]) -> list[dict[str, Any]]:
    """Calls of many ranks and steps, each once."""
    texts = {text for steps in recorded for step in steps.values() for text in step}
    return [json.loads(text) for text in sorted(texts)]


def bytes_of_logits(cp: int, tp: int, path: Path) -> list[str]:
    """Of a prefill, a chunk and a decode, in float32 and bfloat16, as hex of their bytes."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        options = {"moe": "ep"} if cp * tp > 1 else {}
        model = cast(CPQwen3MoeForCausalLM, load(path, cp, tp, dtype, **options))
        cache = model.new_kv_cache(max_tokens=600)
        sequence = cache.new_sequence()
        comm = CommConfig(kv_gather="int8", exchange="all_to_all", exchange_rows="int8")
        with model.parallel_context.communication(comm if cp > 1 else CommConfig()):
            steps: list[tuple[Any, Any]] = [
                (model.prefill, random_ids(5, 200)),
                (model.prefill, random_ids(6, 57)),
                (model.decode, [9]),
            ]
            for run, ids in steps:
                found.append(run(cache, [sequence], ids).numpy().tobytes().hex())
    return found
