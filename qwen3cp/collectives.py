"""Every collective of the model: one place that counts bytes, names failures and is tested.

All of them take the `ParallelContext` that says which group; with one rank in the group they are
no-ops that count nothing. In compiled code those of a decode are operators, `torch.ops.qwen3cp.*`,
which the compiler does not look into and which call the same functions here when the graph runs.

Bytes are per rank: what this rank receives under the bandwidth-optimal
algorithm (n ranks): all-gather (n-1) * shard, all-reduce 2 (n-1) / n * input, all-to-all what comes
from the others, broadcast the message on every receiver.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist

from qwen3cp import int8
from qwen3cp.errors import CommunicationError, InputError, ParallelConfigError, Qwen3CPError
from qwen3cp.parallel import AllReduceForm, ForwardPhase, ParallelContext, default_device

# renamed in torch 2.13, where the old name warns
_all_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_into = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_to_all = dist.all_to_all_single

__all__ = [
    "CollectiveSpan",
    "CommunicationLog",
    "CommunicationRecord",
    "Message",
    "PendingGather",
    "agree",
    "all_reduce",
    "all_reduce_bytes",
    "all_reduce_form",
    "assume_counts",
    "broadcast",
    "fail_together",
    "gather_counts",
    "gather_ranks",
    "gather_rows",
    "gather_vocabulary",
    "kv_gather",
    "observe_messages",
    "pass_on",
    "receive",
    "record_communication",
    "send_to_first",
    "time_collectives",
]


GroupName = Literal["cp", "tp", "world", "host"]
"""A group of a `ParallelContext`; host is that of `fail_together`."""


@dataclass(frozen=True)
class CommunicationRecord:
    """One collective, as this rank saw it."""

    kind: str
    """kv_gather, all_reduce, logits, hidden_states, expert_exchange, check or weights."""
    algorithm: str
    """all_gather, all_reduce, reduce_scatter, all_to_all, broadcast or point_to_point."""
    group: GroupName
    bytes: int
    """Bytes that this rank receives."""
    group_size: int
    phase: ForwardPhase | None
    layer: int | None = None
    """The layer that it is a part of, if it is one's."""
    form: str = "exact"
    """How the message travels: exact, int8, int8_one_shot or int8_two_step."""
    asynchronous: bool = False
    """Whether this rank goes on while it is in flight."""


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


@dataclass(frozen=True)
class CollectiveSpan:
    """While this rank was inside a collective: starting it, waiting for it, or both."""

    what: str
    """Its kind and where; a gather that is started and waited for has two spans."""
    start: float
    end: float
    """Seconds of `time.perf_counter`."""


_open_spans: ContextVar[list[CollectiveSpan] | None] = ContextVar("open_spans", default=None)


@contextmanager
def time_collectives() -> Iterator[list[CollectiveSpan]]:
    """Lists when this rank was inside the collectives of the block, in order.

    On an NPU, whose collectives are only enqueued, that is the time of the host.
    """
    spans: list[CollectiveSpan] = []
    token = _open_spans.set(spans)
    try:
        yield spans
    finally:
        _open_spans.reset(token)


@dataclass(frozen=True)
class Message:
    """What this rank gives to a gather of keys and values, or to a reduction, before it travels."""

    kind: str
    """kv_gather or all_reduce."""
    tensor: torch.Tensor
    """Overwritten by the reduction."""
    layer: int | None
    form: str
    """How it travels, as of `CommunicationRecord`."""


ResultObserver = Callable[[torch.Tensor], None]

_observer: ContextVar[Callable[[Message], ResultObserver] | None] = ContextVar(
    "observer", default=None
)


@contextmanager
def observe_messages(observer: Callable[[Message], ResultObserver]) -> Iterator[None]:
    """Calls observer(message) before each `kv_gather` and `all_reduce` of the block that moves
    anything, and what that returns with the result. The observer may itself communicate, if that
    of every rank does; it is not told of that."""
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


class PendingGather:
    """A gather in flight."""

    def __init__(
        self,
        result: torch.Tensor,
        work: dist.Work | None,
        what: str,
        finish: Callable[[torch.Tensor], torch.Tensor] | None = None,
        observe_result: ResultObserver | None = None,
    ) -> None:
        self._result: torch.Tensor | None = result
        self._work, self._what = work, what
        self._finish, self._observe_result = finish, observe_result

    def wait(self) -> torch.Tensor:
        """The result, once: nothing of it is kept here, since it is the largest buffer around."""
        if self._work is not None:
            with _named_failure(self._what):
                self._work.wait()
        result, self._result, self._work = self._result, None, None
        assert result is not None, "wait() was called twice"
        if self._finish is not None:
            result = self._finish(result)
        if self._observe_result is not None:
            self._observe_result(result)
        return result


def kv_gather(
    packed: torch.Tensor,
    ctx: ParallelContext,
    *,
    split: bool,
    head_dim: int | None = None,
    layer: int | None = None,
) -> PendingGather:
    """Starts gathering the keys and values of every CP rank's rows.

    Collective over cp_group if the rows are split over it; else does nothing. With
    `CommConfig(kv_gather="int8")` they travel as int8 with a float32 scale for each token and head,
    and every rank gets the same rounded values, also of its own rows.

    Args:
        packed: [2, R, kv_width], keys then values, padded to R rows on every rank.
        split: `ForwardPlan.is_split`.
        head_dim: width of a head; None takes all heads for one.
        layer: the index of the layer, for `CommConfig.skip_layers` and the log.

    Returns:
        What `wait()`s to [C * 2 * R, kv_width]: the ranks' keys and values in rank order.
    """
    sent = packed.view(-1, packed.shape[-1])
    if ctx.cp_group is None or not split:
        ctx.check_attached()
        return PendingGather(sent, None, "")
    quantised = ctx.comm.kv_gather == "int8" and layer not in ctx.comm.skip_layers
    form = "int8" if quantised else "exact"
    observe_result = _observe("kv_gather", packed, layer, form)
    finish = None
    if quantised:
        heads = packed.view(-1, head_dim or packed.shape[-1])
        shape = (ctx.cp_size * len(sent), packed.shape[-1])
        finish = partial(_dequantised, shape, heads.shape[-1], packed.dtype)
        sent = int8.pack(heads, 1)
    gathered = sent.new_empty(ctx.cp_size * len(sent), sent.shape[1])
    received = (ctx.cp_size - 1) * _num_bytes(sent)
    what = _record("kv_gather", "all_gather", "cp", received, ctx, layer, form, asynchronous=True)
    with _named_failure(what):
        work = _all_gather_into(gathered, sent, group=ctx.cp_group, async_op=True)
    return PendingGather(gathered, work, what, finish, observe_result)


def all_reduce(
    x: torch.Tensor,
    ctx: ParallelContext,
    *,
    in_place: bool = False,
    layer: int | None = None,
    form: AllReduceForm | None = None,
) -> torch.Tensor:
    """Sums x over the TP ranks. Collective over tp_group: every rank must call it.

    The result is the same, bit for bit, on every rank of the group. In PREFILL it may be summed
    from int8 values (see `CommConfig`); a group of values that holds one which is not finite is
    then NaN as a whole.

    Args:
        x: the same shape on every rank, tokens in rows; with `in_place` it must be contiguous and
            is overwritten.
        layer: the index of the layer, for `CommConfig.skip_layers` and the log.
        form: None is `all_reduce_form(x, ctx, layer)`.

    Raises:
        ParallelConfigError: `CommConfig.group_size` does not divide the last dimension of x.
        InputError: x is neither bfloat16 nor float32 and would travel as int8.
    """
    if ctx.tp_group is None:
        ctx.check_attached()
        return x
    if x.numel() == 0:  # all TP ranks hold the same rows, so all of them stop here
        return x if in_place else torch.empty_like(x, memory_format=torch.contiguous_format)
    if torch.compiler.is_compiling():
        total = x if in_place else x.clone(memory_format=torch.contiguous_format)
        torch.ops.qwen3cp.all_reduce_(total, ctx.name, layer, form)
        return total
    form = all_reduce_form(x, ctx, layer) if form is None else form
    observe_result = _observe("all_reduce", x, layer, form)
    if form == "exact":
        total = x if in_place else x.clone(memory_format=torch.contiguous_format)
        _sum_exactly(total, "tp", "all_reduce", ctx, layer)
    else:
        x = x.contiguous()
        total = x if in_place else torch.empty_like(x)
        group_size = _group_size(x, ctx)
        terms, sums = x.view(-1, group_size), total.view(-1, group_size)
        sum_chunk = _one_shot if form == "int8_one_shot" else _two_step
        for start, stop in int8.chunks(len(terms), group_size, _num_blocks(form, ctx.tp_size)):
            sum_chunk(terms[start:stop], sums[start:stop], ctx, layer)
    if observe_result is not None:
        observe_result(total)
    return total


def all_reduce_form(
    x: torch.Tensor, ctx: ParallelContext, layer: int | None = None
) -> AllReduceForm:
    """How `all_reduce` sums x: exact, int8_one_shot or int8_two_step. Not collective.

    Exact outside PREFILL, in `CommConfig.skip_layers`, and for messages of less than
    `CommConfig.min_bytes`. "auto" is then the form by which a rank receives the fewest bytes
    (`all_reduce_bytes`); of equal ones the exact, then the one-shot, which rounds less.
    """
    comm = ctx.comm
    if (
        comm.all_reduce == "exact"
        or ctx.phase is not ForwardPhase.PREFILL
        or layer in comm.skip_layers
        or _num_bytes(x) < comm.least_bytes
    ):
        return "exact"
    if x.dtype not in (torch.bfloat16, torch.float32):
        raise InputError(
            f"x is {x.dtype}; int8 reductions take bfloat16 and float32: use "
            "CommConfig(all_reduce='exact')"
        )
    group_size = _group_size(x, ctx)
    if comm.all_reduce != "auto":
        return comm.all_reduce
    forms: tuple[AllReduceForm, ...] = ("exact", "int8_one_shot", "int8_two_step")
    num_groups = x.numel() // group_size
    return min(
        forms,
        key=lambda form: all_reduce_bytes(
            form, num_groups, group_size, x.element_size(), ctx.tp_size
        ),
    )


def all_reduce_bytes(
    form: AllReduceForm, num_groups: int, group_size: int, element_size: int, num_ranks: int
) -> int:
    """Bytes that a rank receives when num_ranks ranks sum num_groups * group_size values.

    With G groups of g values and n ranks: exact 2 (n-1) / n * G * g * element_size; one-shot
    (n-1) * G * (g + 4); two-step 2 (n-1) * ceil(G / n) * (g + 4). A message beyond
    `int8.CHUNK_VALUES` travels in chunks; where g is not a multiple of 4, a block of one is filled
    up to one.
    """
    if form == "exact":
        return 2 * (num_ranks - 1) * num_groups * group_size * element_size // num_ranks
    num_blocks = _num_blocks(form, num_ranks)
    steps = 1 if form == "int8_one_shot" else 2
    return sum(
        steps * (num_ranks - 1) * int8.block_bytes(-(-(stop - start) // num_blocks), group_size)
        for start, stop in int8.chunks(num_groups, group_size, num_blocks)
    )


def _num_blocks(form: AllReduceForm, num_ranks: int) -> int:
    """How many blocks a rank's values are cut into: one for all, or one for each rank."""
    return 1 if form == "int8_one_shot" else num_ranks


def _group_size(x: torch.Tensor, ctx: ParallelContext) -> int:
    """Values that share a scale: a row, or as many as the config says."""
    width = x.shape[-1] if x.dim() else 1
    group_size = width if ctx.comm.group_size is None else ctx.comm.group_size
    if width % group_size:
        raise ParallelConfigError(
            f"CommConfig(group_size={group_size}) does not divide rows of {width} values; None "
            "takes a row as one group"
        )
    return group_size


def _dequantised(
    shape: tuple[int, int], group_size: int, dtype: torch.dtype, blocks: torch.Tensor
) -> torch.Tensor:
    out = torch.empty(shape, dtype=dtype, device=blocks.device)
    int8.dequantise_(out.view(-1, group_size), blocks)
    return out


def _one_shot(
    terms: torch.Tensor, out: torch.Tensor, ctx: ParallelContext, layer: int | None
) -> None:
    """out = the sum of every rank's terms, [G, g]: all of them go to all ranks, which add."""
    blocks, form = int8.pack(terms, 1), "int8_one_shot"
    gathered = _all_gather(blocks, "tp", "all_reduce", ctx, layer, form)
    out.copy_(int8.sum_of(gathered, terms.shape[1]))


def _two_step(
    terms: torch.Tensor, out: torch.Tensor, ctx: ParallelContext, layer: int | None
) -> None:
    """out = the sum of every rank's terms, [G, g]: each rank adds its share, and all get all."""
    group_size, form = terms.shape[1], "int8_two_step"
    blocks = int8.pack(terms, ctx.tp_size)
    shares = torch.empty_like(blocks)
    received = (ctx.tp_size - 1) * _num_bytes(blocks[0])
    what = _record("all_reduce", "all_to_all", "tp", received, ctx, layer, form)
    with _named_failure(what):
        _all_to_all(shares, blocks, group=ctx.tp_group)
    # the NPU quantises no float32, unless all of this is in it
    share = int8.sum_of(shares, group_size).to(terms.dtype)
    block = int8.pack(share, 1)
    what = _record("all_reduce", "all_gather", "tp", received, ctx, layer, form)
    with _named_failure(what):
        _all_gather_into(blocks, block, group=ctx.tp_group)
    int8.dequantise_(out, blocks)


def gather_rows(
    rows: torch.Tensor,
    ctx: ParallelContext,
    *,
    kind: str = "hidden_states",
    layer: int | None = None,
) -> torch.Tensor:
    """[R, ...] of every CP rank -> [C * R, ...], in rank order.

    Collective over cp_group: every rank must call it, with the same R.
    """
    return _all_gather(rows, "cp", kind, ctx, layer)


def gather_vocabulary(logits: torch.Tensor, ctx: ParallelContext, vocab_size: int) -> torch.Tensor:
    """[rows, shard] of every rank of the replica -> [rows, vocab_size].

    Collective over world_group. All ranks hold the same rows and shards of
    ceil(vocab_size / world_size) columns, in rank order, the last of them padded.
    """
    num_rows, shard = logits.shape
    gathered = gather_ranks(logits, ctx, "logits")
    gathered = gathered.view(ctx.world_size, num_rows, shard).transpose(0, 1)
    return gathered.reshape(num_rows, ctx.world_size * shard)[:, :vocab_size]


def gather_ranks(
    x: torch.Tensor, ctx: ParallelContext, kind: str = "check", layer: int | None = None
) -> torch.Tensor:
    """x of every rank of the replica, of the same shape: [world_size, ...], in rank order.

    Collective over world_group.
    """
    if torch.compiler.is_compiling() and ctx.world_group is not None:
        return torch.ops.qwen3cp.gather_ranks(x, ctx.name, ctx.world_size, kind, layer)
    return _all_gather(x[None], "world", kind, ctx, layer)


_assumed_counts: ContextVar[Callable[[], list[list[int]]] | None] = ContextVar(
    "assumed_counts", default=None
)


@contextmanager
def assume_counts(counts: Callable[[], list[list[int]]]) -> Iterator[None]:
    """Makes `gather_counts` return counts() in the block: for tensors without values."""
    token = _assumed_counts.set(counts)
    try:
        yield
    finally:
        _assumed_counts.reset(token)


def gather_counts(
    counts: torch.Tensor, ctx: ParallelContext, kind: str, layer: int | None = None
) -> list[list[int]]:
    """The counts [n] of every rank, in rank order, on the host, which waits for them.

    Collective over world_group.
    """
    gathered = gather_ranks(counts, ctx, kind, layer)
    assumed = _assumed_counts.get()
    return gathered.tolist() if assumed is None else assumed()


def gather_tp(
    rows: torch.Tensor, ctx: ParallelContext, kind: str, layer: int | None = None
) -> torch.Tensor:
    """[n, ...] of every TP rank -> [N * n, ...], in rank order. Collective over tp_group."""
    return _all_gather(rows, "tp", kind, ctx, layer)


def all_reduce_world(
    x: torch.Tensor, ctx: ParallelContext, kind: str, layer: int | None = None
) -> torch.Tensor:
    """Sums a contiguous x over all ranks of the replica, in place. Collective over world_group."""
    if ctx.world_group is None or x.numel() == 0:
        ctx.check_attached()
        return x
    if torch.compiler.is_compiling():
        torch.ops.qwen3cp.all_reduce_world_(x, ctx.name, kind, layer)
        return x
    _sum_exactly(x, "world", kind, ctx, layer)
    return x


def reduce_scatter_world(
    x: torch.Tensor, ctx: ParallelContext, kind: str, layer: int | None = None
) -> torch.Tensor:
    """The sum over all ranks of [W * n, H], of which each gets its n rows. Collective over
    world_group."""
    if ctx.world_group is None:
        return x
    share = x.new_empty(len(x) // ctx.world_size, *x.shape[1:])
    received = (ctx.world_size - 1) * _num_bytes(share)
    with _named_failure(_record(kind, "reduce_scatter", "world", received, ctx, layer)):
        _reduce_scatter_into(share, x, group=ctx.world_group)
    return share


def all_to_all_rows(
    rows: torch.Tensor,
    to_ranks: list[int],
    from_ranks: list[int],
    ctx: ParallelContext,
    kind: str,
    layer: int | None = None,
) -> torch.Tensor:
    """Sends to_ranks[r] of the rows to each rank r in turn, and gets from_ranks[r] of each.

    Collective over world_group: to_ranks[r] on rank q is from_ranks[q] on rank r.
    """
    if ctx.world_group is None:
        return rows
    received = rows.new_empty(sum(from_ranks), *rows.shape[1:])
    row_bytes = math.prod(rows.shape[1:]) * rows.element_size()
    num_bytes = (sum(from_ranks) - from_ranks[ctx.rank]) * row_bytes
    with _named_failure(_record(kind, "all_to_all", "world", num_bytes, ctx, layer)):
        _all_to_all(received, rows.contiguous(), from_ranks, to_ranks, group=ctx.world_group)
    return received


def broadcast(x: torch.Tensor, ctx: ParallelContext) -> torch.Tensor:
    """Overwrites x with rank 0's, and returns it. Collective over world_group."""
    if ctx.world_group is None:
        return x
    received = 0 if ctx.rank == 0 else _num_bytes(x)
    with _named_failure(_record("check", "broadcast", "world", received, ctx)):
        dist.broadcast(x, group=ctx.world_group, group_src=0)
    return x


def agree(ctx: ParallelContext, error: Exception | None, digest: bytes = bytes(16)) -> None:
    """`fail_together` before a forward; `CommConfig(check_plan=False)` switches it off.

    Without it, or with one rank, it only raises this rank's error.
    """
    if ctx.comm.check_plan:
        fail_together(ctx, error, digest, "sequences, lengths, ids or settings")
    elif error is not None:
        raise error


def fail_together(
    ctx: ParallelContext,
    error: Exception | None,
    digest: bytes = bytes(16),
    what: str = "arguments",
) -> None:
    """Lets every rank go on, or none: raises where a rank has an error or another digest.

    Collective over host_group, or world_group if there is none: every rank must call it, also one
    that has an error.

    Args:
        error: what is wrong on this rank, None if nothing is.
        digest: 16 bytes that must be equal on all ranks, of `what`.

    Raises:
        This rank's own error; or an error of the type of the first failing rank's, with its
        message; or InputError if the digests differ.
    """
    group, _ = _group(ctx, "host")
    if group is None:
        if error is not None:
            raise error
        return
    mine = torch.frombuffer(bytearray([error is not None, *digest]), dtype=torch.uint8)
    if torch.device("cpu") not in group._device_types:
        mine = mine.to(default_device())
    all_ranks = _all_gather(mine[None], "host", "check", ctx).cpu()
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
            f"ranks {different} were given other {what} than rank 0 (this is rank {ctx.rank}): "
            "every rank of a replica must make the same call"
        )


def _report(error: Exception | None) -> tuple[type[Exception], str] | None:
    """What the other ranks are told: an error type of this package and a message."""
    if error is None:
        return None
    return (type(error) if isinstance(error, Qwen3CPError) else InputError), str(error)


def _group(ctx: ParallelContext, name: GroupName) -> tuple[dist.ProcessGroup | None, int]:
    """A group, None if it is of one rank, and its size."""
    if name == "host":
        return ctx.host_group or ctx.world_group, ctx.world_size
    return getattr(ctx, f"{name}_group"), getattr(ctx, f"{name}_size")


def _all_gather(
    x: torch.Tensor,
    name: GroupName,
    kind: str,
    ctx: ParallelContext,
    layer: int | None = None,
    form: str = "exact",
) -> torch.Tensor:
    group, size = _group(ctx, name)
    if group is None:
        return x
    gathered = x.new_empty(size * x.shape[0], *x.shape[1:])
    if gathered.numel() == 0:  # on all ranks, since all give the same shape
        return gathered
    received = (size - 1) * _num_bytes(x)
    with _named_failure(_record(kind, "all_gather", name, received, ctx, layer, form)):
        _all_gather_into(gathered, x.contiguous(), group=group)
    return gathered


def _sum_exactly(
    x: torch.Tensor,
    name: GroupName,
    kind: str,
    ctx: ParallelContext,
    layer: int | None,
) -> None:
    """Overwrites a contiguous x with its sum over the group."""
    group, size = _group(ctx, name)
    received = all_reduce_bytes("exact", 1, x.numel(), x.element_size(), size)
    with _named_failure(_record(kind, "all_reduce", name, received, ctx, layer)):
        dist.all_reduce(x, group=group)


def _num_bytes(x: torch.Tensor) -> int:
    return x.numel() * x.element_size()


def pass_on(x: torch.Tensor, ctx: ParallelContext, cp_rank: int) -> None:
    """Overwrites x with that of one CP rank. Collective over cp_group.

    Args:
        x: contiguous, of the same shape and dtype on every rank.
    """
    if ctx.cp_group is None:
        return
    received = 0 if ctx.cp_rank == cp_rank else _num_bytes(x)
    with _named_failure(_record("weights", "broadcast", "cp", received, ctx)):
        dist.broadcast(x.detach().view(-1).view(torch.uint8), group=ctx.cp_group, group_src=cp_rank)


def send_to_first(x: torch.Tensor, ctx: ParallelContext) -> None:
    """Sends a contiguous x to rank 0, which must `receive` it. Waits for that."""
    with _named_failure(_record("weights", "point_to_point", "world", 0, ctx)):
        dist.send(x.detach().view(-1).view(torch.uint8), group=ctx.world_group, group_dst=0)


def receive(x: torch.Tensor, ctx: ParallelContext, rank: int) -> torch.Tensor:
    """Overwrites a contiguous x with what a rank of the replica sends, and returns it."""
    with _named_failure(_record("weights", "point_to_point", "world", _num_bytes(x), ctx)):
        dist.recv(x.view(-1).view(torch.uint8), group=ctx.world_group, group_src=rank)
    return x


def _observe(
    kind: str, tensor: torch.Tensor, layer: int | None, form: str
) -> ResultObserver | None:
    observer = _observer.get()
    if observer is None:
        return None

    def unobserved(call: Callable[[Any], Any], argument: Any) -> Any:
        token = _observer.set(None)
        try:
            return call(argument)
        finally:
            _observer.reset(token)

    return partial(unobserved, unobserved(observer, Message(kind, tensor, layer, form)))


def _record(
    kind: str,
    algorithm: str,
    group: GroupName,
    num_bytes: int,
    ctx: ParallelContext,
    layer: int | None = None,
    form: str = "exact",
    *,
    asynchronous: bool = False,
) -> str:
    """Logs a collective and returns what to call it in an error message."""
    size = 2 if algorithm == "point_to_point" else _group(ctx, group)[1]
    for log in _open_logs.get():
        log.records.append(
            CommunicationRecord(
                kind=kind,
                algorithm=algorithm,
                group=group,
                bytes=num_bytes,
                group_size=size,
                phase=ctx.phase,
                layer=layer,
                form=form,
                asynchronous=asynchronous,
            )
        )
    return f"{kind} over {size} ranks, on cp_rank {ctx.cp_rank}, tp_rank {ctx.tp_rank}"


@contextmanager
def _named_failure(what: str) -> Iterator[None]:
    """torch.distributed's errors, which are RuntimeErrors of the backend, as ours."""
    spans = _open_spans.get()
    start = time.perf_counter() if spans is not None else 0.0
    try:
        yield
        if spans is not None:
            spans.append(CollectiveSpan(what, start, time.perf_counter()))
    except RuntimeError as error:
        raise CommunicationError(
            f"the collective {what} failed: {error}\nAnother rank has probably ended or hangs; "
            "look for the first error among the ranks, and start all of them again"
        ) from error


@torch.library.custom_op(
    "qwen3cp::all_reduce_",
    mutates_args=("x",),
    schema="(Tensor(a!) x, str context, int? layer, str? form) -> ()",
)
def _all_reduce_op(
    x: torch.Tensor, context: str, layer: int | None, form: AllReduceForm | None
) -> None:
    all_reduce(x, ParallelContext.named(context), in_place=True, layer=layer, form=form)


@torch.library.custom_op(
    "qwen3cp::all_reduce_world_",
    mutates_args=("x",),
    schema="(Tensor(a!) x, str context, str kind, int? layer) -> ()",
)
def _all_reduce_world_op(x: torch.Tensor, context: str, kind: str, layer: int | None) -> None:
    all_reduce_world(x, ParallelContext.named(context), kind, layer)


@torch.library.custom_op(
    "qwen3cp::gather_ranks",
    mutates_args=(),
    schema="(Tensor x, str context, int world_size, str kind, int? layer) -> Tensor",
)
def _gather_ranks_op(
    x: torch.Tensor, context: str, world_size: int, kind: str, layer: int | None
) -> torch.Tensor:
    return gather_ranks(x, ParallelContext.named(context), kind, layer)


@_all_reduce_op.register_fake
def _(*arguments: Any) -> None:
    return None


@_all_reduce_world_op.register_fake
def _(*arguments: Any) -> None:
    return None


@_gather_ranks_op.register_fake
def _(x: torch.Tensor, context: str, world_size: int, *arguments: Any) -> torch.Tensor:
    return x.new_empty(world_size, *x.shape)
