"""Every collective of the model: one place that counts bytes, names failures and is tested.

All of them take the `ParallelContext` that says which group; with one rank in the group they are
no-ops that count nothing. Bytes are per rank: what this rank receives under the bandwidth-optimal
algorithm (n ranks): all-gather (n-1) * shard, all-reduce 2 (n-1) / n * input, broadcast the
message on every receiver.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from qwen3cp.errors import CommunicationError, InputError, Qwen3CPError
from qwen3cp.parallel import ForwardPhase, ParallelContext, default_device

# renamed in torch 2.13, where the old name warns
_all_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

__all__ = [
    "CommunicationLog",
    "CommunicationRecord",
    "PendingGather",
    "agree",
    "all_reduce",
    "broadcast",
    "fail_together",
    "gather_rows",
    "gather_vocabulary",
    "kv_gather",
    "pass_on",
    "receive",
    "record_communication",
    "send_to_first",
]


@dataclass(frozen=True)
class CommunicationRecord:
    """One collective, as this rank saw it."""

    kind: str
    """kv_gather, all_reduce, logits, hidden_states, expert_exchange, check or weights."""
    bytes: int
    """Bytes that this rank receives."""
    group_size: int
    phase: ForwardPhase | None


@dataclass
class CommunicationLog:
    """The collectives of a `record_communication()` block, in order."""

    records: list[CommunicationRecord] = field(default_factory=list)

    @property
    def total_bytes(self) -> int:
        return sum(record.bytes for record in self.records)

    @property
    def by_kind(self) -> dict[str, int]:
        """Bytes of each kind of collective."""
        totals: dict[str, int] = {}
        for record in self.records:
            totals[record.kind] = totals.get(record.kind, 0) + record.bytes
        return totals

    @property
    def counts(self) -> dict[str, int]:
        """How many collectives there were of each kind."""
        counts: dict[str, int] = {}
        for record in self.records:
            counts[record.kind] = counts.get(record.kind, 0) + 1
        return counts


_open_logs: ContextVar[tuple[CommunicationLog, ...]] = ContextVar("open_logs", default=())


@contextmanager
def record_communication() -> Iterator[CommunicationLog]:
    """Logs the collectives of the block, of every model and context. Blocks may nest."""
    log = CommunicationLog()
    token = _open_logs.set((*_open_logs.get(), log))
    try:
        yield log
    finally:
        _open_logs.reset(token)


class PendingGather:
    """A gather in flight."""

    def __init__(self, result: torch.Tensor, work: dist.Work | None, what: str) -> None:
        self._result: torch.Tensor | None = result
        self._work, self._what = work, what

    def wait(self) -> torch.Tensor:
        """The result, once: nothing of it is kept here, since it is the largest buffer around."""
        if self._work is not None:
            with _named_failure(self._what):
                self._work.wait()
        result, self._result, self._work = self._result, None, None
        assert result is not None, "wait() was called twice"
        return result


def kv_gather(packed: torch.Tensor, ctx: ParallelContext, *, split: bool) -> PendingGather:
    """Starts gathering the keys and values of every CP rank's rows.

    Collective over cp_group if the rows are split over it; else does nothing.

    Args:
        packed: [2, R, kv_width], keys then values, padded to R rows on every rank.
        split: `ForwardPlan.is_split`.

    Returns:
        What `wait()`s to [C * 2 * R, kv_width]: the ranks' keys and values in rank order.
    """
    rows = packed.view(-1, packed.shape[-1])
    if ctx.cp_group is None or not split:
        return PendingGather(rows, None, "")
    gathered = rows.new_empty(ctx.cp_size * rows.shape[0], rows.shape[1])
    what = _record("kv_gather", (ctx.cp_size - 1) * _num_bytes(rows), ctx.cp_size, ctx)
    with _named_failure(what):
        work = _all_gather_into(gathered, rows, group=ctx.cp_group, async_op=True)
    return PendingGather(gathered, work, what)


def all_reduce(x: torch.Tensor, ctx: ParallelContext, *, in_place: bool = False) -> torch.Tensor:
    """Sums x over the TP ranks. Collective over tp_group: every rank must call it.

    The result is the same, bit for bit, on every rank of the group.

    Args:
        x: the same shape on every rank; with `in_place` it must be contiguous and is overwritten.
    """
    if ctx.tp_group is None:
        return x
    total = x if in_place else x.clone(memory_format=torch.contiguous_format)
    if total.numel() == 0:  # all TP ranks hold the same rows, so all of them stop here
        return total
    num_bytes = 2 * (ctx.tp_size - 1) * _num_bytes(total) // ctx.tp_size
    with _named_failure(_record("all_reduce", num_bytes, ctx.tp_size, ctx)):
        dist.all_reduce(total, group=ctx.tp_group)
    return total


def gather_rows(
    rows: torch.Tensor, ctx: ParallelContext, *, kind: str = "hidden_states"
) -> torch.Tensor:
    """[R, ...] of every CP rank -> [C * R, ...], in rank order.

    Collective over cp_group: every rank must call it, with the same R.
    """
    return _all_gather(rows, ctx.cp_group, ctx.cp_size, kind, ctx)


def gather_vocabulary(logits: torch.Tensor, ctx: ParallelContext, vocab_size: int) -> torch.Tensor:
    """[rows, shard] of every rank of the replica -> [rows, vocab_size].

    Collective over world_group. All ranks hold the same rows and shards of
    ceil(vocab_size / world_size) columns, in rank order, the last of them padded.
    """
    num_rows, shard = logits.shape
    gathered = _all_gather(logits, ctx.world_group, ctx.world_size, "logits", ctx)
    gathered = gathered.view(ctx.world_size, num_rows, shard).transpose(0, 1)
    return gathered.reshape(num_rows, ctx.world_size * shard)[:, :vocab_size]


def broadcast(x: torch.Tensor, ctx: ParallelContext) -> torch.Tensor:
    """Overwrites x with rank 0's, and returns it. Collective over world_group."""
    if ctx.world_group is None:
        return x
    received = 0 if ctx.rank == 0 else _num_bytes(x)
    with _named_failure(_record("check", received, ctx.world_size, ctx)):
        dist.broadcast(x, group=ctx.world_group, group_src=0)
    return x


def agree(ctx: ParallelContext, error: Exception | None, digest: bytes = bytes(16)) -> None:
    """Lets every rank go on, or none: raises where a rank has an error or another digest.

    Collective over host_group, on the host: every rank must call it, also one that has an error.
    With one rank, or `CommConfig(check_plan=False)`, it only raises this rank's error.

    Args:
        error: what is wrong on this rank, None if nothing is.
        digest: 16 bytes that must be equal on all ranks.

    Raises:
        This rank's own error; or an error of the type of the first failing rank's, with its
        message; or InputError if the digests differ.
    """
    if ctx.host_group is None or not ctx.comm.check_plan:
        if error is not None:
            raise error
        return
    status = 0 if error is None else 1
    mine = torch.frombuffer(bytearray(bytes([status]) + digest), dtype=torch.uint8)
    all_ranks = _all_gather(mine[None], ctx.host_group, ctx.world_size, "check", ctx)
    failed = all_ranks[:, 0].nonzero().flatten().tolist()
    if failed:
        reports: list[Any] = [None] * ctx.world_size
        with _named_failure("check"):
            dist.all_gather_object(reports, _report(error), group=ctx.host_group)
        if error is not None:
            raise error
        error_type, message = reports[failed[0]]
        raise error_type(f"rank {failed[0]} stopped this call: {message}")
    different = (all_ranks != all_ranks[0]).any(1).nonzero().flatten().tolist()
    if different:
        raise InputError(
            f"ranks {different} were given other sequences, lengths or ids than rank 0 "
            f"(this is rank {ctx.rank}): every rank of a replica must make the same call"
        )


def _report(error: Exception | None) -> tuple[type[Exception], str] | None:
    """What the other ranks are told: an error type of this package and a message."""
    if error is None:
        return None
    return (type(error) if isinstance(error, Qwen3CPError) else InputError), str(error)


def _all_gather(
    x: torch.Tensor, group: dist.ProcessGroup | None, size: int, kind: str, ctx: ParallelContext
) -> torch.Tensor:
    if group is None:
        return x
    gathered = x.new_empty(size * x.shape[0], *x.shape[1:])
    if gathered.numel() == 0:  # on all ranks, since all give the same shape
        return gathered
    with _named_failure(_record(kind, (size - 1) * _num_bytes(x), size, ctx)):
        _all_gather_into(gathered, x.contiguous(), group=group)
    return gathered


def _num_bytes(x: torch.Tensor) -> int:
    return x.numel() * x.element_size()


def _record(kind: str, num_bytes: int, group_size: int, ctx: ParallelContext) -> str:
    """Logs a collective and returns what to call it in an error message."""
    for log in _open_logs.get():
        log.records.append(CommunicationRecord(kind, num_bytes, group_size, ctx.phase))
    return f"{kind} over {group_size} ranks, on cp_rank {ctx.cp_rank}, tp_rank {ctx.tp_rank}"


@contextmanager
def _named_failure(what: str) -> Iterator[None]:
    """torch.distributed's errors, which are RuntimeErrors of the backend, as ours."""
    try:
        yield
    except RuntimeError as error:
        raise CommunicationError(
            f"the collective {what} failed: {error}\nAnother rank has probably ended or hangs; "
            "look for the first error among the ranks, and start all of them again"
        ) from error


def fail_together(
    ctx: ParallelContext,
    error: Exception | None,
    digest: bytes = bytes(16),
    what: str = "arguments",
) -> None:
    """`agree`, for loading and saving: whatever `CommConfig.check_plan` says.

    Collective over host_group, or world_group if there is none: every rank must call it, also one
    that has an error.

    Args:
        error: what is wrong on this rank, None if nothing is.
        digest: 16 bytes that must be equal on all ranks, of `what`.

    Raises:
        This rank's own error; or an error of the type of the first failing rank's, with its
        message; or InputError if the digests differ.
    """
    group = ctx.host_group or ctx.world_group
    if group is None:
        if error is not None:
            raise error
        return
    mine = torch.frombuffer(bytearray([error is not None, *digest]), dtype=torch.uint8)
    if torch.device("cpu") not in group._device_types:
        mine = mine.to(default_device())
    all_ranks = _all_gather(mine[None], group, ctx.world_size, "check", ctx).cpu()
    failed = all_ranks[:, 0].nonzero().flatten().tolist()
    if failed:
        reports: list[Any] = [None] * ctx.world_size
        with _named_failure("check"):
            dist.all_gather_object(reports, _report(error), group=group)
        if error is not None:
            raise error
        error_type, message = reports[failed[0]]
        raise error_type(f"rank {failed[0]} stopped this call: {message}")
    different = (all_ranks != all_ranks[0]).any(1).nonzero().flatten().tolist()
    if different:
        raise InputError(
            f"ranks {different} were given another {what} than rank 0 (this is rank {ctx.rank}): "
            "every rank of a replica must make the same call"
        )


def pass_on(x: torch.Tensor, ctx: ParallelContext, cp_rank: int) -> None:
    """Overwrites x with that of one CP rank. Collective over cp_group.

    Args:
        x: contiguous, of the same shape and dtype on every rank.
    """
    if ctx.cp_group is None:
        return
    received = 0 if ctx.cp_rank == cp_rank else _num_bytes(x)
    with _named_failure(_record("weights", received, ctx.cp_size, ctx)):
        dist.broadcast(x.detach().view(-1).view(torch.uint8), group=ctx.cp_group, group_src=cp_rank)


def send_to_first(x: torch.Tensor, ctx: ParallelContext) -> None:
    """Sends a contiguous x to rank 0, which must `receive` it. Waits for that."""
    with _named_failure(_record("weights", 0, 2, ctx)):
        dist.send(x.detach().view(-1).view(torch.uint8), group=ctx.world_group, group_dst=0)


def receive(x: torch.Tensor, ctx: ParallelContext, rank: int) -> torch.Tensor:
    """Overwrites a contiguous x with what a rank of the replica sends, and returns it."""
    with _named_failure(_record("weights", _num_bytes(x), 2, ctx)):
        dist.recv(x.view(-1).view(torch.uint8), group=ctx.world_group, group_src=rank)
    return x
