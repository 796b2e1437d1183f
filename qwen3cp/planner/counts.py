"""What a dry run counts: operators, collectives and memory of every kind of rank.

All counts are of one rank. Bytes of a collective are those that the rank receives, as
`qwen3cp.collectives` counts them. Bytes of an operator are those that a device has to touch: rows
that are looked up, not the table; keys that are visible, not the pool.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar, cast

__all__ = ["CollectiveCount", "DryRun", "OperatorCount", "RankCounts", "StepCounts"]

PARTS = (
    "attention",  # the attention operator
    "projections",  # query, key, value and output projections
    "experts",  # their products, and sorting rows by expert and back
    "mlp",  # dense layers
    "router",
    "norms",  # with the rotary embedding
    "cache",  # writing keys and values
    "embedding",
    "lm_head",
    "communication",  # copies, rounding and sums that prepare a collective or read its result
    "other",
)
"""What an operator may be a part of."""


@dataclass(frozen=True, kw_only=True)
class OperatorCount:
    """Calls of one operator that all do the same amount of work."""

    name: str
    """Such as npu.npu_swiglu or aten.mm."""
    part: str
    """One of `PARTS`."""
    layers: tuple[int, ...]
    """The layers that make these calls; empty outside the layers."""
    calls: int
    """In each of the layers."""
    flops: int
    """Of the products in one call; 0 for all else."""
    bytes_read: int
    """By one call, weights included."""
    bytes_written: int
    overlaps: str | None = None
    """The kind of the collective that is in flight meanwhile."""

    @property
    def total_calls(self) -> int:
        return self.calls * max(1, len(self.layers))

    @property
    def total_flops(self) -> int:
        return self.flops * self.total_calls

    @property
    def total_bytes(self) -> int:
        return (self.bytes_read + self.bytes_written) * self.total_calls


@dataclass(frozen=True, kw_only=True)
class CollectiveCount:
    """Collectives of one kind that all move as much."""

    kind: str
    """As of `CommunicationRecord`: kv_gather, all_reduce, logits, expert_exchange, check."""
    algorithm: str
    """all_gather, all_reduce, reduce_scatter, all_to_all or broadcast."""
    group: str
    """cp, tp, world, or host for what the CPUs tell one another."""
    group_size: int
    form: str
    """exact, int8, int8_one_shot or int8_two_step."""
    layers: tuple[int, ...]
    """As of `OperatorCount`."""
    calls: int
    """In each of the layers."""
    bytes: int
    """That the rank receives in one call."""
    asynchronous: bool
    """Whether operators run while it is in flight: those that name it in `overlaps`."""

    @property
    def total_calls(self) -> int:
        return self.calls * max(1, len(self.layers))

    @property
    def total_bytes(self) -> int:
        return self.bytes * self.total_calls


@dataclass(frozen=True, kw_only=True)
class StepCounts:
    """One forward: a chunk of the prefill, or one decode step."""

    phase: str
    """prefill or decode."""
    start: int
    """Tokens of each sequence that are cached already."""
    new_tokens: int
    """Of each sequence."""
    batch: int
    rows: int
    """That this rank runs, of all sequences."""
    attention_calls: int
    """In each layer."""
    operators: tuple[OperatorCount, ...]
    collectives: tuple[CollectiveCount, ...]
    host_reads: int
    """How often the host waits for a value of the device."""
    peak_activation_bytes: int
    """Live tensors other than parameters, constants, keys and values, where they are most.
    What a kernel needs inside is not a part of it."""
    peak_operator: str
    """The operator that ran there, and its layer if it is one's."""
    peak_layer: int | None

    @property
    def flops(self) -> int:
        return sum(x.total_flops for x in self.operators)

    @property
    def operator_calls(self) -> int:
        """Launches of kernels, without those of the collectives."""
        return sum(x.total_calls for x in self.operators)

    @property
    def collective_bytes(self) -> int:
        return sum(x.total_bytes for x in self.collectives)


@dataclass(frozen=True, kw_only=True)
class RankCounts:
    """One kind of rank."""

    ranks: tuple[int, ...]
    """The ranks of the replica that count the same, cp_rank * tp_size + tp_rank. The first of them
    was run."""
    cp_rank: int
    tp_rank: int
    parameter_bytes: int
    constant_bytes: int
    """Buffers of the model and the attention mask."""
    kv_bytes: int
    """Of the cache that holds all sequences, in whole pages, page 0 included."""
    steps: tuple[StepCounts, ...]

    @property
    def peak_activation_bytes(self) -> int:
        return max(step.peak_activation_bytes for step in self.steps)

    @property
    def memory_bytes(self) -> int:
        """All of it, without what kernels and the collectives' library take."""
        return (
            self.parameter_bytes + self.constant_bytes + self.kv_bytes + self.peak_activation_bytes
        )


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """All ranks of one topology, one workload."""

    model: str
    num_layers: int
    num_parameters: int
    """Of the whole model."""
    max_positions: int
    dtype: str
    cp_size: int
    tp_size: int
    moe: str
    comm: dict[str, Any]
    """The fields of `CommConfig`."""
    prompt: int
    """Tokens of each sequence."""
    batch: int
    chunk: int
    """Most new tokens of a sequence in one forward of the prefill."""
    new_tokens: int
    """Tokens after the prompt that the cache has room for."""
    ranks: tuple[RankCounts, ...]
    warnings: tuple[str, ...]
    assumptions: tuple[str, ...]
    """What was taken for what only a run can show."""

    @property
    def world_size(self) -> int:
        return self.cp_size * self.tp_size

    @property
    def fullest(self) -> RankCounts:
        """The kind of rank that needs the most memory."""
        return max(self.ranks, key=lambda rank: rank.memory_bytes)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: all fields, and the sums of each step and rank."""
        document = asdict(self)
        for rank, of_rank in zip(self.ranks, document["ranks"], strict=True):
            of_rank["peak_activation_bytes"] = rank.peak_activation_bytes
            of_rank["memory_bytes"] = rank.memory_bytes
            for step, of_step in zip(rank.steps, of_rank["steps"], strict=True):
                of_step["flops"] = step.flops
                of_step["operator_calls"] = step.operator_calls
                of_step["collective_bytes"] = step.collective_bytes
        return document

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> DryRun:
        """The inverse of `to_dict`, also after a round trip through JSON."""
        ranks = []
        for rank in document["ranks"]:
            steps = [
                _made(
                    StepCounts,
                    step,
                    operators=tuple(_made(OperatorCount, x) for x in step["operators"]),
                    collectives=tuple(_made(CollectiveCount, x) for x in step["collectives"]),
                )
                for step in rank["steps"]
            ]
            ranks.append(_made(RankCounts, rank, steps=tuple(steps)))
        comm = {**document["comm"], "skip_layers": tuple(document["comm"]["skip_layers"])}
        return _made(cls, document, comm=comm, ranks=tuple(ranks))


T = TypeVar("T")


def _made(cls: type[T], document: dict[str, Any], **parts: Any) -> T:
    """JSON has lists where the fields are tuples."""
    names = {field.name for field in fields(cast(Any, cls))} - parts.keys()
    values = {
        name: tuple(x) if isinstance(x, list) else x
        for name, x in document.items()
        if name in names
    }
    return cls(**values, **parts)
