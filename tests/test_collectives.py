"""Collectives on real gloo ranks: what they move, what they count, how they fail."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from qwen3cp import CommConfig, ForwardPhase, ParallelContext, collectives
from qwen3cp.errors import (
    CheckpointError,
    CommunicationError,
    InputError,
    KVCacheFullError,
    ParallelConfigError,
)
from qwen3cp.plan import ForwardPlan
from tests.ranks import Ranks, context

SIZES = [(4, 1), (2, 2), (1, 4)]
PREFILL, DECODE = ForwardPhase.PREFILL, ForwardPhase.DECODE


def tp_ranks(rank: int, tp: int) -> list[int]:
    return [rank // tp * tp + t for t in range(tp)]


def cp_ranks(rank: int, cp: int, tp: int) -> list[int]:
    return [c * tp + rank % tp for c in range(cp)]


def as_bits(x: torch.Tensor) -> np.ndarray:
    return x.contiguous().view(torch.uint8).numpy().copy()


# All-reduce


def integers(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Small enough that a sum of four is exact in bfloat16."""
    generator = torch.Generator().manual_seed(100 + rank)
    return torch.randint(-30, 31, shape, generator=generator).to(dtype)


def reduce_integers(cp: int, tp: int, shape: tuple[int, ...], dtype: torch.dtype) -> list[Any]:
    ctx = context(cp, tp)
    x = integers(ctx.rank, shape, dtype)
    before = x.clone()
    total = collectives.all_reduce(x, ctx)
    assert total.dtype == dtype
    assert torch.equal(x, before), "the input was changed"
    if tp > 1:
        assert total.data_ptr() != x.data_ptr() or x.numel() == 0
    in_place = collectives.all_reduce(x, ctx, in_place=True)
    assert in_place is x
    return [total.double().numpy(), in_place.double().numpy()]


@pytest.mark.parametrize(("cp", "tp"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 7), (1, 1), (3, 2, 33), (0, 8)])
def test_all_reduce_sums_over_the_tp_group_alone(ranks, cp, tp, dtype, shape):
    results = ranks(4).run(reduce_integers, cp, tp, shape, dtype)
    for rank, (total, in_place) in enumerate(results):
        terms = [integers(r, shape, dtype).double().numpy() for r in tp_ranks(rank, tp)]
        assert np.array_equal(total, sum(terms))
        assert np.array_equal(in_place, total)


def reduce_reals(cp: int, tp: int, dtype: torch.dtype) -> np.ndarray:
    ctx = context(cp, tp)
    generator = torch.Generator().manual_seed(ctx.rank)
    x = (torch.randn(37, 53, generator=generator) * 10.0 ** (ctx.rank - 2)).to(dtype)
    return as_bits(collectives.all_reduce(x, ctx))


@pytest.mark.parametrize(("cp", "tp"), [(2, 2), (1, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_reduce_gives_every_rank_the_same_bits(ranks, cp, tp, dtype):
    results = ranks(4).run(reduce_reals, cp, tp, dtype)
    for rank, bits in enumerate(results):
        assert np.array_equal(bits, results[tp_ranks(rank, tp)[0]])
    assert cp == 1 or not np.array_equal(results[0], results[-1])


# Gathers


def packed_rows(rank: int, rows: int, width: int) -> np.ndarray:
    """[2, rows, width]: every element of every rank is another."""
    return rank * 10_000 + np.arange(2 * rows * width, dtype=np.float32).reshape(2, rows, width)


def gather_kv(cp: int, tp: int, rows: int, width: int, phase: ForwardPhase) -> Any:
    ctx = context(cp, tp)
    packed = torch.from_numpy(packed_rows(ctx.rank, rows, width))
    with collectives.record_communication() as log, ctx.forward(phase):
        gathered = collectives.kv_gather(packed, ctx, split=phase is PREFILL).wait()
    return gathered.numpy().copy(), log.records


@pytest.mark.parametrize(("cp", "tp"), SIZES)
@pytest.mark.parametrize(("rows", "width"), [(1, 4), (5, 3)])
@pytest.mark.parametrize("phase", [PREFILL, DECODE])
def test_kv_gather_is_the_keys_then_values_of_each_cp_rank(ranks, cp, tp, rows, width, phase):
    for rank, (gathered, records) in enumerate(ranks(4).run(gather_kv, cp, tp, rows, width, phase)):
        moves = phase is PREFILL and cp > 1
        sources = cp_ranks(rank, cp, tp) if moves else [rank]
        expected = []
        for source in sources:
            keys, values = packed_rows(source, rows, width)
            expected += [*keys, *values]
        assert np.array_equal(gathered, np.stack(expected))
        assert len(records) == (1 if moves else 0)
        for record in records:
            assert record.bytes == (cp - 1) * 2 * rows * width * 4
            assert (record.kind, record.group_size, record.phase) == ("kv_gather", cp, PREFILL)


def gather_shards(cp: int, tp: int, num_rows: int, vocab_size: int) -> np.ndarray:
    ctx = context(cp, tp)
    shard = -(-vocab_size // ctx.world_size)
    ids = ctx.rank * shard + torch.arange(shard)
    rows = 1000 * torch.arange(num_rows)[:, None] + ids
    logits = torch.where(ids < vocab_size, rows, torch.nan)
    return collectives.gather_vocabulary(logits, ctx, vocab_size).numpy()


@pytest.mark.parametrize(("cp", "tp"), SIZES)
@pytest.mark.parametrize("vocab_size", [16, 13, 5, 3, 1])
def test_gather_vocabulary_joins_shards_that_need_not_be_full(ranks, cp, tp, vocab_size):
    expected = [[1000 * row + token for token in range(vocab_size)] for row in range(3)]
    for logits in ranks(4).run(gather_shards, cp, tp, 3, vocab_size):
        assert logits.tolist() == expected


def test_gather_vocabulary_of_no_rows(ranks):
    for logits in ranks(4).run(gather_shards, 2, 2, 0, 13):
        assert logits.shape == (0, 13)


def split_and_gather(cp: int, tp: int, new: list[int], phase: ForwardPhase) -> Any:
    ctx = context(cp, tp)
    plan = ForwardPlan.build(
        new,
        cached_lengths=[0] * len(new),
        block_tables=[[1 + i] for i in range(len(new))],
        num_pages=len(new) + 1,
        phase=phase,
        cp_rank=ctx.cp_rank,
        cp_size=cp,
    )
    whole = torch.arange(sum(new) * 6, dtype=torch.float32).view(sum(new), 2, 3)
    local = plan.split(whole)
    assert local.shape == (plan.num_rows, 2, 3)
    with collectives.record_communication() as log:
        gathered = plan.gather(local * 2, ctx)
    assert torch.equal(gathered, whole * 2)
    return plan.num_rows, [(r.kind, r.bytes) for r in log.records]


@pytest.mark.parametrize(("cp", "tp"), SIZES)
@pytest.mark.parametrize("new", [[1], [3, 1], [13, 9], [40]])
def test_a_plan_gathers_what_it_split(ranks, cp, tp, new):
    longest = -(-sum(new) // cp)
    expected = [("hidden_states", (cp - 1) * longest * 6 * 4)] if cp > 1 else []
    results = ranks(4).run(split_and_gather, cp, tp, new, PREFILL)
    assert [records for _, records in results] == [expected] * 4
    assert sum(rows for rows, _ in results) == sum(new) * tp
    assert ranks(4).run(split_and_gather, cp, tp, new, DECODE) == [(sum(new), [])] * 4


# Logs


def log_everything(cp: int, tp: int) -> Any:
    ctx = context(cp, tp)
    rows = torch.zeros(6, 10, dtype=torch.bfloat16)
    with collectives.record_communication() as outer:
        with ctx.forward(PREFILL):
            collectives.kv_gather(torch.zeros(2, 3, 5), ctx, split=True).wait()
            collectives.all_reduce(rows, ctx)
            with collectives.record_communication() as inner:
                collectives.all_reduce(rows, ctx, in_place=True)
        with ctx.forward(DECODE):
            collectives.kv_gather(torch.zeros(2, 3, 5), ctx, split=False).wait()
            collectives.gather_vocabulary(rows, ctx, 31)
            collectives.gather_rows(rows, ctx)
        collectives.gather_rows(rows, ctx, kind="logits")
        collectives.broadcast(torch.zeros(7, dtype=torch.int64), ctx)
        collectives.agree(ctx, None)
    collectives.all_reduce(rows, ctx)  # in no block: in no log
    tell = [(r.kind, r.bytes, r.group_size, r.phase) for r in outer.records]
    return tell, inner, outer.total_bytes, outer.by_kind, outer.counts


@pytest.mark.parametrize(("cp", "tp"), SIZES)
def test_logs_count_what_a_rank_receives(ranks, cp, tp):
    size = 6 * 10 * 2
    for rank, (records, inner, total, by_kind, counts) in enumerate(
        ranks(4).run(log_everything, cp, tp)
    ):
        reduce = ("all_reduce", 2 * (tp - 1) * size // tp, tp, PREFILL)
        gather = ("hidden_states", (cp - 1) * size, cp, DECODE)
        expected = [
            *([("kv_gather", (cp - 1) * 2 * 3 * 5 * 4, cp, PREFILL)] if cp > 1 else []),
            *([reduce, reduce] if tp > 1 else []),
            ("logits", 3 * size, 4, DECODE),
            *([gather, ("logits", (cp - 1) * size, cp, None)] if cp > 1 else []),
            ("check", 0 if rank == 0 else 7 * 8, 4, None),
            ("check", 3 * 17, 4, None),
        ]
        assert records == expected
        assert [(r.kind, r.bytes, r.group_size, r.phase) for r in inner.records] == (
            [reduce] if tp > 1 else []
        )
        assert total == sum(num_bytes for _, num_bytes, _, _ in expected)
        kinds = {kind for kind, *_ in expected}
        assert by_kind == {k: sum(b for kind, b, *_ in expected if kind == k) for k in kinds}
        assert counts == {k: sum(1 for kind, *_ in expected if kind == k) for k in kinds}


def test_one_rank_has_no_collectives():
    ctx = ParallelContext.single()
    rows = torch.arange(6.0).view(2, 3)
    packed = torch.arange(12.0).view(2, 2, 3)
    with collectives.record_communication() as log:
        assert collectives.all_reduce(rows, ctx) is rows
        assert collectives.gather_rows(rows, ctx) is rows
        assert collectives.broadcast(rows, ctx) is rows
        assert torch.equal(collectives.gather_vocabulary(rows, ctx, 2), rows[:, :2])
        with ctx.forward(PREFILL):
            gathered = collectives.kv_gather(packed, ctx, split=True).wait()
        assert torch.equal(gathered, packed.view(4, 3))
        collectives.agree(ctx, None)
    assert log.records == []
    assert (log.total_bytes, log.by_kind, log.counts) == (0, {}, {})


def log_around_an_error() -> list[int]:
    ctx = context(1, 4)
    with collectives.record_communication() as outer:
        inner = collectives.record_communication()
        with pytest.raises(KeyError), inner as inner_log:
            collectives.broadcast(torch.zeros(1), ctx)
            raise KeyError
        collectives.broadcast(torch.zeros(1), ctx)
    collectives.broadcast(torch.zeros(1), ctx)
    return [len(outer.records), len(inner_log.records)]


def test_a_log_ends_with_its_block(ranks):
    assert ranks(4).run(log_around_an_error) == [[2, 1]] * 4


# Agreement


def agree_on(
    errors: dict[int, Exception], digests: dict[int, bytes], check_plan: bool = True
) -> str:
    """'fine', or the error of this rank; all ranks go on together afterwards."""
    ctx = context(2, 2) if check_plan else context(2, 2, comm=CommConfig(check_plan=False))
    outcome = "fine"
    try:
        collectives.agree(ctx, errors.get(ctx.rank), digests.get(ctx.rank, bytes(range(16))))
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}"
    dist.barrier()
    return outcome


def test_ranks_that_agree_go_on(ranks):
    assert ranks(4).run(agree_on, {}, {}) == ["fine"] * 4


@pytest.mark.parametrize("failing", range(4))
@pytest.mark.parametrize(
    ("error", "name"),
    [
        (InputError("no ids"), "InputError"),
        (KVCacheFullError("no pages"), "KVCacheFullError"),
        (CheckpointError("no tensor"), "CheckpointError"),
        (ParallelConfigError("no rank"), "ParallelConfigError"),
        (ZeroDivisionError("by zero"), "InputError"),
    ],
)
def test_one_ranks_error_is_every_ranks(ranks, failing, error, name):
    told = f"{name}: rank {failing} stopped this call: {error}"
    expected = [told] * 4
    expected[failing] = f"{type(error).__name__}: {error}"
    assert ranks(4).run(agree_on, {failing: error}, {}) == expected


def test_the_first_failing_rank_is_heard(ranks):
    errors = {3: KVCacheFullError("third"), 1: InputError("first")}
    assert ranks(4).run(agree_on, errors, {2: bytes(16)}) == [
        "InputError: rank 1 stopped this call: first",
        "InputError: first",
        "InputError: rank 1 stopped this call: first",
        "KVCacheFullError: third",
    ]


@pytest.mark.parametrize("place", [0, 15])
@pytest.mark.parametrize("different", [[0], [2], [1, 3]])
def test_ranks_with_other_digests_are_named(ranks, place, different):
    digest = bytearray(range(16))
    digest[place] ^= 128
    named = different if different != [0] else [1, 2, 3]
    for rank, outcome in enumerate(
        ranks(4).run(agree_on, {}, {r: bytes(digest) for r in different})
    ):
        assert outcome.startswith(f"InputError: ranks {named} were given other sequences")
        assert f"this is rank {rank}" in outcome


def test_without_checks_an_error_stays_on_its_rank(ranks):
    outcomes = ranks(4).run(agree_on, {2: InputError("mine")}, {1: bytes(16)}, False)
    assert outcomes == ["fine", "fine", "InputError: mine", "fine"]


def test_an_error_of_one_rank_is_raised_as_it_is():
    error = KeyError("x")
    with pytest.raises(KeyError) as info:
        collectives.agree(ParallelContext.single(), error)
    assert info.value is error


def broadcast_rank(cp: int, tp: int) -> list[int]:
    ctx = context(cp, tp)
    x = torch.tensor([ctx.rank + 5, ctx.rank * 2])
    assert collectives.broadcast(x, ctx) is x
    return x.tolist()


@pytest.mark.parametrize(("cp", "tp"), SIZES)
def test_broadcast_gives_rank_0s(ranks, cp, tp):
    assert ranks(4).run(broadcast_rank, cp, tp) == [[5, 0]] * 4


def broadcast_in_replica() -> list[int]:
    ctx = ParallelContext.from_world(2, 1, dp_size=2)
    return collectives.broadcast(torch.tensor([dist.get_rank()]), ctx).tolist()


def test_broadcast_stays_in_its_replica(ranks):
    assert ranks(4).run(broadcast_in_replica) == [[0], [0], [2], [2]]


# A rank that ends


def outlive_the_other_rank() -> dict[str, Exception | None]:
    """Rank 1 ends while rank 0 is in a gather; what rank 0 then gets from each collective."""
    cp, tp = context(2, 1), context(1, 2)
    x = torch.zeros(4, 4)
    collectives.agree(cp, None)
    if cp.rank == 1:
        time.sleep(0.5)
        os._exit(3)
    attempts: dict[str, Callable[[], Any]] = {
        "kv_gather": lambda: collectives.kv_gather(x[None], cp, split=True).wait(),
        "all_reduce": lambda: collectives.all_reduce(x, tp),
        "hidden_states": lambda: collectives.gather_rows(x, cp),
        "logits": lambda: collectives.gather_vocabulary(x, tp, 8),
        "check": lambda: collectives.agree(cp, None),
        "check, broadcast": lambda: collectives.broadcast(x, cp),
    }
    outcomes: dict[str, Exception | None] = {}
    for name, attempt in attempts.items():
        outcomes[name] = None
        try:
            attempt()
        except Exception as error:
            outcomes[name] = error
    return outcomes


def test_a_rank_that_ends_is_a_communication_error_on_the_others():
    pair = Ranks(2, timeout=20)
    try:
        survivor, dead = pair.outcomes(outlive_the_other_rank)
        assert isinstance(dead, EOFError)
        assert len(survivor) == 6
        for name, error in survivor.items():
            kind = name.split(",")[0]
            assert type(error) is CommunicationError, name
            assert f"{kind} over 2 ranks, on cp_rank 0, tp_rank 0 failed" in str(error)
            assert "Another rank has probably ended or hangs" in str(error)
    finally:
        pair.close()
