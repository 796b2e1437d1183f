"""Host time and operator calls of a layer, of a decode step and of a short prefill.

The operators of the NPU are replaced by their recorded results, and the products are tiny: what is
left is what a host does for a layer before a device has anything to do, but for the launches.

    python docs/benchmarks/host_overhead.py [--json docs/benchmarks/host_overhead.json]

Times are those of the process: the least of 300 forwards with 10 layers less that with 2, a layer.
"""

from __future__ import annotations

import cProfile
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import typer
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3MoeConfig

from qwen3cp import CommConfig, CPQwen3MoeForCausalLM, ParallelContext
from qwen3cp.ops import SCHEMAS

FEW, MANY = 2, 10  # layers: the difference is that of whole layers
SEQUENCES, PROMPT, REPEATS = 4, 2, 300


def model_of(num_layers: int, context: ParallelContext) -> CPQwen3MoeForCausalLM:
    """The layers of Qwen3-30B-A3B, as narrow as they can be."""
    config = cast(Any, Qwen3MoeConfig)(
        vocab_size=256,
        hidden_size=64,
        num_hidden_layers=num_layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        num_experts=16,
        num_experts_per_tok=8,
        moe_intermediate_size=32,
        norm_topk_prob=True,
    )
    return CPQwen3MoeForCausalLM(config, parallel_context=context)


class Replayed:
    """Operators of a step that return what they returned in the first one."""

    def __init__(self) -> None:
        self.results: list[Any] = []
        self.place = 0
        self.names = [name for name in SCHEMAS if "." not in name]
        self.real = {name: getattr(torch.ops.npu, name) for name in self.names}

    @contextmanager
    def recording(self) -> Iterator[None]:
        self._replace(self._record)
        yield
        self._replace(None)

    @contextmanager
    def replaying(self) -> Iterator[None]:
        self._replace(self._replay)
        yield
        self._replace(None)

    def _replace(self, kind: Callable[[str], Callable[..., Any]] | None) -> None:
        for name in self.names:
            setattr(torch.ops.npu, name, self.real[name] if kind is None else kind(name))

    def _record(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.results.append(self.real[name](*args, **kwargs))
            return self.results[-1]

        return call

    def _replay(self, name: str) -> Callable[..., Any]:
        results = self.results

        def call(*args: Any, **kwargs: Any) -> Any:
            place = self.place % len(results)
            self.place = place + 1
            return results[place]

        return call


class Count(TorchDispatchMode):
    """Operator calls by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[str(func.overloadpacket)] += 1
        return func(*args, **(kwargs or {}))


def measure(model: CPQwen3MoeForCausalLM, prefill: bool) -> tuple[float, int, Counter[str]]:
    """Least seconds and function calls of a forward without the operators of the NPU, and all
    operator calls of one."""
    cache = model.new_kv_cache(num_pages=2 + 2 * SEQUENCES)
    sequences = [cache.new_sequence() for _ in range(SEQUENCES)]
    model.prefill(cache, sequences, [[1] * PROMPT] * SEQUENCES)
    held = [sequence.length for sequence in sequences]
    ids = torch.ones(SEQUENCES, dtype=torch.int64)

    def step() -> None:
        for sequence, length in zip(sequences, held, strict=True):
            cache.truncate(sequence, length)
        if prefill:
            model.prefill(cache, sequences, [[1] * PROMPT] * SEQUENCES)
        else:
            model.decode(cache, sequences, ids)

    replayed, count = Replayed(), Count()
    with count:
        step()
    with replayed.recording():
        step()
    times = []
    with replayed.replaying():
        for _ in range(REPEATS):
            start = time.process_time()
            step()
            times.append(time.process_time() - start)
        profile = cProfile.Profile()
        profile.runcall(step)
    return min(times), sum(entry.callcount for entry in profile.getstats()), count.calls


def of_a_layer(context: ParallelContext, prefill: bool) -> dict[str, Any]:
    """From the difference between models of many and of few layers."""
    (few, few_functions, few_calls), (many, many_functions, many_calls) = (
        measure(model_of(layers, context), prefill) for layers in (FEW, MANY)
    )
    layers = MANY - FEW
    calls = {name: (n - few_calls[name]) / layers for name, n in sorted(many_calls.items())}
    calls = {name: round(n) for name, n in calls.items() if n}
    layer = (many - few) / layers
    return {
        "cp": context.cp_size,
        "tp": context.tp_size,
        "forward": "prefill" if prefill else "decode",
        "microseconds_per_layer": round(layer * 1e6, 1),
        "microseconds_beside_the_layers": round((few - FEW * layer) * 1e6, 1),
        "calls_per_layer": sum(calls.values()),
        "npu_calls_per_layer": sum(n for name, n in calls.items() if name.startswith("npu.")),
        "functions_per_layer": round((many_functions - few_functions) / layers),
        "calls": calls,
    }


def table(results: list[dict[str, Any]]) -> str:
    """Markdown, as in docs/compile.md."""
    lines = [
        "| ranks | forward | operators a layer | of the NPU | Python and C functions a layer "
        "| host us a layer | us beside the layers |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in results:
        lines.append(
            f"| cp {r['cp']}, tp {r['tp']} | {r['forward']} | {r['calls_per_layer']} "
            f"| {r['npu_calls_per_layer']} | {r['functions_per_layer']} "
            f"| {r['microseconds_per_layer']} "
            f"| {r['microseconds_beside_the_layers']} |"
        )
    return "\n".join(lines)


def main(
    json_file: Path | None = typer.Option(None, "--json", help="Where results go, too."),  # noqa: B008
) -> None:
    torch.set_num_threads(1)
    results = [of_a_layer(ParallelContext.single(), prefill) for prefill in (False, True)]
    # a group whose collectives do nothing: two ranks without another process
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    for cp, tp in ((2, 1), (1, 2)):
        context = ParallelContext.from_world(cp, tp, comm=CommConfig(check_plan=False))
        results += [of_a_layer(context, prefill) for prefill in (False, True)]
    dist.destroy_process_group()
    print(table(results))
    if json_file:
        json_file.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
