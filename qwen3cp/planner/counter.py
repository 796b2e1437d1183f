"""Counting what the operators of a forward do, and the tensors that are alive, as it runs.

The counter sees every operator that is dispatched, on meta tensors as on real ones. What a fused
operator does inside, it does not see: neither its workspace nor its steps.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from qwen3cp.collectives import CommunicationRecord, assume_counts, record_communication
from qwen3cp.model import CPQwen3MoeForCausalLM
from qwen3cp.ops import check_call
from qwen3cp.ops.attention_call import CheckedCall
from qwen3cp.ops.attention_call import check_call as check_attention
from qwen3cp.planner.counts import CollectiveCount, OperatorCount

__all__ = ["ExpectedRouting", "OperatorCounter", "RoutedRows", "part_of_parameter", "visible_pairs"]

ALLOCATE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
ALIAS = {"_unsafe_view", "detach", "lift_fresh", "resize_", "set_"}
"""Operators that move no bytes, beside the views."""
OVERWRITE = {"copy_", "fill_", "zero_"}
"""In-place operators that do not read what they change."""
LOOK_UP = {"embedding": 0, "index_select": 0, "index": 0, "gather": 0}
"""Operators that read some rows of an argument, and its place."""

PART_OF_OPERATOR = {
    "npu_fused_infer_attention_score": "attention",
    "npu_rotary_mul": "norms",
    "npu_scatter_nd_update_": "cache",
    "npu_moe_gating_top_k_softmax": "router",
    "npu_dynamic_quant": "communication",
}
PART_OF_MODULE = {
    "attention": "projections",
    "moe": "experts",
    "exchange": "communication",
    "int8": "communication",
    "collectives": "communication",
}
"""For operators that read no parameter, by the module of this package that calls them."""

FIA, ROUTING, GROUPED = (
    "npu_fused_infer_attention_score",
    "npu_moe_init_routing_v2",
    "npu_grouped_matmul",
)


class RoutedRows(NamedTuple):
    """What becomes of the rows of one sorting by expert."""

    pairs: int
    """(row, expert) pairs whose expert is in the range."""
    experts: int
    """Experts of the range that have at least one."""


class ExpectedRouting(Protocol):
    """Stands in for the values of a routing."""

    def counts(self) -> list[list[int]]:
        """Rows that each rank sends to each in an all_to_all exchange, [from][to]."""
        ...

    def sent_rows(self) -> int:
        """Rows that an all_to_all exchange sends."""
        ...

    def routed_rows(self, rows: int, experts: range, num_experts: int) -> RoutedRows:
        """Of a sorting of rows for some of the experts."""
        ...


@dataclass
class _Work:
    """Of one call."""

    flops: int = 0
    bytes_read: int = 0
    bytes_written: int = 0


@dataclass(frozen=True)
class _Key:
    name: str
    part: str
    flops: int
    bytes_read: int
    bytes_written: int
    overlaps: str | None


class OperatorCounter(TorchDispatchMode):
    """A block in which the operators, collectives and tensors of a model are counted.

    Args:
        model: whose parameters say what an operator is a part of.
        held: tensors that are not activations: parameters, buffers, the cache.
        expected: what is expected of the routing where its result has no values; None reads them.
            With it every call of an NPU operator is held to the rules of `qwen3cp.ops`, too.
    """

    def __init__(
        self,
        model: CPQwen3MoeForCausalLM,
        held: Iterable[torch.Tensor],
        expected: ExpectedRouting | None = None,
    ) -> None:
        super().__init__()
        self.peak_bytes = 0
        """Of live activations."""
        self.peak_operator = ""
        """The operator that ran there, in `peak_layer`."""
        self.peak_layer: int | None = None
        self.host_reads: Counter = Counter()
        """By layer: how often the host reads the split sizes of an exchange."""
        self._model, self._expected = model, expected
        self._device = model.device.type
        self._held = {_storage(x) for x in held}
        self._parts = {_storage(p): part_of_parameter(name) for name, p in model.named_parameters()}
        self._operators: dict[_Key, Counter] = defaultdict(Counter)
        self._records: list[CommunicationRecord] = []
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self._live_bytes = 0
        self._layer: int | None = None
        self._routed: dict[int, RoutedRows] = {}
        self._in_flight: dict[int, str] = {}
        self._pairs: dict[tuple[int, ...], int] = {}
        self._stack = ExitStack()

    # ------------------------------------------------------------------------------- the block

    def __enter__(self) -> OperatorCounter:
        with ExitStack() as stack:
            self._records = stack.enter_context(record_communication()).records
            if self._expected is not None:
                stack.enter_context(assume_counts(self._read_counts))
            for index, layer in enumerate(self._model.model.layers):
                hooks = (
                    layer.register_forward_pre_hook(self._entering(index)),
                    layer.register_forward_hook(self._leaving),
                )
                for hook in hooks:
                    stack.callback(hook.remove)
            super().__enter__()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()

    def _entering(self, index: int) -> Callable[..., None]:
        def enter(*_: Any) -> None:
            self._layer = index

        return enter

    def _read_counts(self) -> list[list[int]]:
        assert self._expected is not None
        self.host_reads[self._layer] += 1
        return self._expected.counts()

    def _leaving(self, *_: Any) -> None:
        self._layer = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "npu" and self._expected is not None:
            # torch_npu's Meta kernels, where it is installed, would let more pass
            check_call(func, args, kwargs, npu_dtypes=self._model.dtype == torch.bfloat16)
        out = func(*args, **kwargs)
        name = func._opname
        if func.is_view or name in ALIAS:
            return out
        inputs = [*self._on_device(args), *self._on_device(kwargs.values())]
        outputs = self._on_device((out,))
        self._track(inputs, outputs, f"{func.namespace}.{name}")
        if not inputs and not outputs or name in ALLOCATE:
            return out
        if func.namespace == "c10d":
            if self._records[-1].asynchronous:
                self._in_flight[_storage(inputs[0])] = self._records[-1].kind  # its result
            return out
        for key in [key for key in map(_storage, inputs) if key in self._in_flight]:
            del self._in_flight[key]
        part = self._part(func, inputs)
        work = self._work(func, part, args, kwargs, inputs, outputs)
        key = _Key(
            f"{func.namespace}.{name}",
            part,
            work.flops,
            work.bytes_read,
            work.bytes_written,
            next(iter(self._in_flight.values()), None),
        )
        self._operators[key][self._layer] += 1
        return out

    # ---------------------------------------------------------------------------------- results

    def operator_counts(self) -> tuple[OperatorCount, ...]:
        return tuple(
            OperatorCount(
                name=key.name,
                part=key.part,
                layers=layers,
                calls=calls,
                flops=key.flops,
                bytes_read=key.bytes_read,
                bytes_written=key.bytes_written,
                overlaps=key.overlaps,
            )
            for key, by_layer in self._operators.items()
            for layers, calls in _alike(by_layer)
        )

    def collective_counts(self) -> tuple[CollectiveCount, ...]:
        alike: dict[tuple, Counter] = defaultdict(Counter)
        for x in self._records:
            kind = (x.kind, x.algorithm, x.group, x.group_size, x.form, x.bytes, x.asynchronous)
            alike[kind][x.layer] += 1
        return tuple(
            CollectiveCount(
                kind=kind,
                algorithm=algorithm,
                group=group,
                group_size=size,
                form=form,
                layers=layers,
                calls=calls,
                bytes=num_bytes,
                asynchronous=asynchronous,
            )
            for (kind, algorithm, group, size, form, num_bytes, asynchronous), by_layer in (
                alike.items()
            )
            for layers, calls in _alike(by_layer)
        )

    # ----------------------------------------------------------------------------------- memory

    def _on_device(self, arguments: Iterable[Any]) -> list[torch.Tensor]:
        """The tensors among arguments, which may be lists of them, on the model's device."""
        found = []
        for x in arguments:
            if isinstance(x, torch.Tensor):
                if x.device.type == self._device:
                    found.append(x)
            elif isinstance(x, list | tuple):
                found += self._on_device(x)
        return found

    def _track(self, inputs: list[torch.Tensor], outputs: list[torch.Tensor], name: str) -> None:
        for key in [key for key, (weak, _) in self._live.items() if weak.expired()]:
            self._live_bytes -= self._live.pop(key)[1]
            self._routed.pop(key, None)
            self._in_flight.pop(key, None)
        for x in (*inputs, *outputs):
            key = _storage(x)
            if key not in self._live and key not in self._held:
                storage = x.untyped_storage()
                self._live[key] = StorageWeakRef(storage), storage.nbytes()
                self._live_bytes += storage.nbytes()
        if self._live_bytes > self.peak_bytes:
            self.peak_bytes = self._live_bytes
            self.peak_operator, self.peak_layer = name, self._layer

    # ------------------------------------------------------------------------------------- work

    def _part(self, func: Any, inputs: list[torch.Tensor]) -> str:
        name = func._opname
        if name in PART_OF_OPERATOR:
            return PART_OF_OPERATOR[name]
        for x in inputs:
            part = self._parts.get(_storage(x))
            if part in ("embedding", "lm_head"):  # which may be tied
                return "embedding" if name == "embedding" else "lm_head"
            if part is not None:
                return part
        return PART_OF_MODULE.get(_calling_module(), "other")

    def _work(
        self,
        func: Any,
        part: str,
        args: tuple,
        kwargs: dict,
        inputs: list[torch.Tensor],
        outputs: list[torch.Tensor],
    ) -> _Work:
        name = func._opname
        if name == FIA:
            return self._attention(check_attention(*args, **kwargs), args)
        if name == ROUTING:
            return self._sorting(part, args, kwargs, outputs)
        if name == GROUPED:
            return self._grouped_matmul(args, kwargs)
        if name == "npu_scatter_nd_update_":
            _, indices, updates = args
            return _Work(0, _num_bytes(indices, updates), _num_bytes(updates))
        if name == "npu_moe_token_unpermute":
            rows, *rest = inputs
            looked_up = rest[0].numel() * rows.shape[1] * rows.element_size()
            return _Work(0, looked_up + _num_bytes(*rest), _num_bytes(*outputs))
        work = _Work(bytes_written=_num_bytes(*outputs))
        if func.overloadpacket in flop_registry:
            work.flops = flop_registry[func.overloadpacket](*args, **kwargs, out_val=outputs[0])
        given = inputs
        if "out" in kwargs:
            given = self._on_device((*args, *(x for k, x in kwargs.items() if k != "out")))
        if name in OVERWRITE:
            given = given[1:]
        if name in LOOK_UP:
            work.bytes_read = _num_bytes(*given[1:], *outputs)
        else:
            work.bytes_read = _num_bytes(*given)
        return work

    def _attention(self, call: CheckedCall, args: tuple) -> _Work:
        query, key = args[:2]
        pairs = 0
        for request, (q, kv) in enumerate(zip(call.q_lengths, call.kv_lengths, strict=True)):
            case = (q, kv, *call.visible(request))
            if case not in self._pairs:
                self._pairs[case] = visible_pairs(*case)
            pairs += self._pairs[case]
        head_dim = query.numel() // max(1, query.shape[0] * call.num_heads)
        widths = call.num_kv_heads * (head_dim + call.value_dim)
        tokens = sum(kv for q, kv in zip(call.q_lengths, call.kv_lengths, strict=True) if q)
        tables = [] if call.block_table is None else [call.block_table]
        written = query.element_size()
        for size in call.output_shape(query):
            written *= size
        return _Work(
            2 * pairs * call.num_heads * (head_dim + call.value_dim),
            _num_bytes(query, *tables) + tokens * widths * key.element_size(),
            written,
        )

    def _sorting(self, part: str, args: tuple, kwargs: dict, outputs: list[torch.Tensor]) -> _Work:
        rows, experts = args
        counts = outputs[2]
        if self._expected is None:
            pairs, busy = int(counts.sum()), int(counts.count_nonzero())
        elif part == "communication":  # by the rank that they are sent to
            pairs, busy = self._expected.sent_rows(), 0
        else:
            chosen = range(*kwargs["active_expert_range"])
            pairs, busy = self._expected.routed_rows(len(rows), chosen, kwargs["expert_num"])
        self._routed[_storage(counts)] = RoutedRows(pairs, busy)
        moved = pairs * rows.shape[1] * rows.element_size()
        return _Work(0, moved + _num_bytes(experts), moved + _num_bytes(outputs[1], counts))

    def _grouped_matmul(self, args: tuple, kwargs: dict) -> _Work:
        (rows,), (weight,) = args
        routed = self._routed[_storage(kwargs["group_list"])]
        _, inner, outer = weight.shape
        size = rows.element_size()
        return _Work(
            2 * routed.pairs * inner * outer,
            (routed.pairs * inner + routed.experts * inner * outer) * size,
            routed.pairs * outer * size,
        )


def part_of_parameter(name: str) -> str:
    """One of `PARTS`, of a parameter's name."""
    if "norm" in name:
        return "norms"
    for part, places in {
        "embedding": ("embed_tokens",),
        "lm_head": ("lm_head",),
        "projections": ("self_attn",),
        "experts": ("mlp.experts",),
        "router": ("mlp.gate.",),
        "mlp": ("mlp",),
    }.items():
        if any(place in name for place in places):
            return part
    raise AssertionError(f"{name} is a part of nothing")


def visible_pairs(q_length: int, kv_length: int, low: int, high: int) -> int:
    """(query, key) pairs that are computed where row i sees the keys i + low .. i + high."""
    row = np.arange(q_length)
    first, end = np.maximum(row + low, 0), np.minimum(row + high + 1, kv_length)
    return int(np.maximum(end - first, 0).sum())


def _alike(by_layer: Counter) -> list[tuple[tuple[int, ...], int]]:
    """(layers, calls in each of them), for layers with as many calls; () is outside the layers."""
    layers: dict[int, list[int]] = defaultdict(list)
    groups = []
    for layer, calls in by_layer.items():
        if layer is None:
            groups.append(((), calls))
        else:
            layers[calls].append(layer)
    return groups + [(tuple(sorted(some)), calls) for calls, some in layers.items()]


def _storage(x: torch.Tensor) -> int:
    return x.untyped_storage()._cdata


def _num_bytes(*tensors: torch.Tensor) -> int:
    """What a tensor that is expanded repeats is counted once."""
    return sum(min(x.numel() * x.element_size(), x.untyped_storage().nbytes()) for x in tensors)


def _calling_module() -> str:
    """The innermost module of this package, beside the planner, that the operator is called in."""
    frame = sys._getframe(1)
    while frame is not None:
        package, _, module = frame.f_globals.get("__name__", "").partition(".")
        if package == "qwen3cp" and not module.startswith("planner"):
            return module
        frame = frame.f_back
    return ""
