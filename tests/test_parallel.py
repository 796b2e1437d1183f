"""Where a rank is, and which groups it is in; on real gloo ranks where groups are needed."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, cast
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from qwen3cp import CommConfig, ForwardPhase, ParallelContext
from qwen3cp.errors import ParallelConfigError
from qwen3cp.parallel import default_device, div_even
from tests.ranks import Ranks, context

SIZES = {(4, 1): "cp4", (2, 2): "cp2 tp2", (1, 4): "tp4"}


def members(group: dist.ProcessGroup | None) -> list[int] | None:
    return None if group is None else dist.get_process_group_ranks(group)


def describe(ctx: ParallelContext) -> dict[str, Any]:
    """All of a context that another process can be told."""
    return {
        "cp": (ctx.cp_rank, ctx.cp_size),
        "tp": (ctx.tp_rank, ctx.tp_size),
        "dp": (ctx.dp_rank, ctx.dp_size),
        "rank": (ctx.rank, ctx.world_size),
        "cp_group": members(ctx.cp_group),
        "tp_group": members(ctx.tp_group),
        "world_group": members(ctx.world_group),
        "host_group": members(ctx.host_group),
        "phase": ctx.phase,
    }


def expected(rank: int, cp: int, tp: int, dp: int = 1) -> dict[str, Any]:
    """The same from the numbering alone: TP ranks are neighbours, then CP, then replicas."""
    replica, within = rank // (cp * tp), rank % (cp * tp)
    cp_rank, tp_rank = within // tp, within % tp
    first = replica * cp * tp
    replica_ranks = [first + i for i in range(cp * tp)]
    world = replica_ranks if cp * tp > 1 else None
    return {
        "cp": (cp_rank, cp),
        "tp": (tp_rank, tp),
        "dp": (replica, dp),
        "rank": (within, cp * tp),
        "cp_group": [first + c * tp + tp_rank for c in range(cp)] if cp > 1 else None,
        "tp_group": [first + cp_rank * tp + t for t in range(tp)] if tp > 1 else None,
        "world_group": world,
        "host_group": world,
        "phase": None,
    }


# One process


def test_single_is_one_rank_without_groups():
    ctx = ParallelContext.single()
    assert describe(ctx) == expected(0, 1, 1)
    assert ctx.comm == CommConfig(all_reduce="exact", kv_gather="exact", check_plan=True)
    assert ctx.moe == "tp"


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert not dist.is_initialized()
    yield
    assert not dist.is_initialized()


@pytest.mark.usefixtures("no_launcher")
def test_one_rank_needs_no_launcher():
    comm = CommConfig(check_plan=False)
    ctx = ParallelContext.from_world(comm=comm)
    assert describe(ctx) == expected(0, 1, 1)
    assert ctx.comm is comm


@pytest.mark.usefixtures("no_launcher")
@pytest.mark.parametrize("sizes", [(2, 1, 1), (1, 2, 1), (1, 1, 2)])
def test_more_ranks_need_a_launcher(sizes):
    with pytest.raises(ParallelConfigError, match="the world has 1: .*torchrun --nproc-per-node 2"):
        ParallelContext.from_world(*sizes)


@pytest.mark.usefixtures("no_launcher")
@pytest.mark.parametrize("axis", ["cp_size", "tp_size", "dp_size"])
@pytest.mark.parametrize("size", [0, -1, 1.0, 2.5, "1", True, None])
def test_sizes_are_positive_integers(axis, size):
    with pytest.raises(ParallelConfigError, match=f"{axis} must be a positive integer"):
        ParallelContext.from_world(**{axis: size})
    with pytest.raises(ParallelConfigError, match=f"{axis} must be a positive integer"):
        ParallelContext(**{axis: size})


@pytest.mark.parametrize("axis", ["cp", "tp", "dp"])
@pytest.mark.parametrize(("rank", "size"), [(1, 1), (-1, 1), (2, 2), (-1, 2), (5, 2)])
def test_a_rank_lies_within_its_size(axis, rank, size):
    with pytest.raises(ParallelConfigError, match=rf"{axis}_rank={rank} is not in 0\.\.{size - 1}"):
        ParallelContext(**cast(Any, {f"{axis}_rank": rank, f"{axis}_size": size}))


@pytest.mark.parametrize("axis", ["cp", "tp"])
def test_several_ranks_need_a_group(axis):
    with pytest.raises(ParallelConfigError, match=f"{axis}_group is missing: 2 ranks need one"):
        ParallelContext(**cast(Any, {f"{axis}_size": 2}))


@pytest.mark.parametrize("moe", ["cp", "", None])
def test_only_known_ways_to_spread_experts(moe):
    with pytest.raises(ParallelConfigError, match="moe="):
        ParallelContext(moe=moe)


@pytest.mark.parametrize("name", ["all_reduce", "kv_gather"])
@pytest.mark.parametrize("value", ["nonsense", "", None, True])
def test_only_known_ways_to_communicate(name, value):
    with pytest.raises(ParallelConfigError, match=name):
        CommConfig(**{name: value})


@pytest.mark.parametrize("phase", list(ForwardPhase))
def test_a_forward_sets_the_phase_for_its_length(phase):
    ctx = ParallelContext.single()
    with ctx.forward(phase):
        assert ctx.phase is phase
    assert ctx.phase is None


@pytest.mark.parametrize("inner", list(ForwardPhase))
def test_forwards_do_not_nest(inner):
    ctx, other = ParallelContext.single(), ParallelContext.single()
    with ctx.forward(ForwardPhase.PREFILL):
        with pytest.raises(ParallelConfigError, match=f"a {inner.value} forward cannot start"):
            with ctx.forward(inner):
                raise AssertionError("entered")
        assert ctx.phase is ForwardPhase.PREFILL
        with other.forward(inner):
            assert (ctx.phase, other.phase) == (ForwardPhase.PREFILL, inner)
    assert ctx.phase is other.phase is None


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_phase_ends_with_an_exception(error):
    ctx = ParallelContext.single()
    with pytest.raises(error):
        with ctx.forward(ForwardPhase.DECODE):
            raise error
    assert ctx.phase is None


@pytest.mark.parametrize("phase", ["prefill", None, 1])
def test_a_phase_is_a_forward_phase(phase):
    with pytest.raises(ParallelConfigError, match="must be a ForwardPhase"):
        with ParallelContext.single().forward(phase):
            raise AssertionError("entered")


def test_div_even():
    assert div_even(12, 4, "heads") == 3
    with pytest.raises(ParallelConfigError, match="heads = 10 cannot be divided evenly by 4"):
        div_even(10, 4, "heads")


def test_the_default_device_is_the_cpu_without_an_npu():
    with mock.patch.object(torch, "npu", None, create=True):
        assert default_device() == torch.device("cpu")


# Four ranks


def world_context(cp: int, tp: int, dp: int = 1) -> dict[str, Any]:
    return describe(ParallelContext.from_world(cp, tp, dp))


@pytest.mark.parametrize(("cp", "tp", "dp"), [(*s, 1) for s in SIZES] + [(2, 1, 2), (1, 2, 2)])
def test_from_world_is_the_grid(ranks, cp, tp, dp):
    assert ranks(4).run(world_context, cp, tp, dp) == [expected(r, cp, tp, dp) for r in range(4)]


def test_replicas_of_one_rank_have_no_groups(ranks):
    assert ranks(4).run(world_context, 1, 1, 4) == [expected(r, 1, 1, 4) for r in range(4)]


def world_context_on_gloo(cp: int, tp: int) -> dict[str, Any]:
    return describe(ParallelContext.from_world(cp, tp, backend="gloo", timeout=30.0))


def test_from_world_with_a_backend_and_a_timeout(ranks):
    assert ranks(4).run(world_context_on_gloo, 2, 2) == [expected(r, 2, 2) for r in range(4)]


def wrong_sizes(cp: int, tp: int, dp: int) -> str:
    """The message of the error; no rank makes a group, and all can go on together."""
    with mock.patch.object(dist, "new_group", side_effect=AssertionError("a group was made")):
        with pytest.raises(ParallelConfigError) as info:
            ParallelContext.from_world(cp, tp, dp)
    dist.barrier()
    return str(info.value)


@pytest.mark.parametrize("sizes", [(2, 1, 1), (1, 1, 1), (4, 2, 1), (2, 2, 2), (3, 1, 1)])
def test_sizes_that_do_not_fill_the_world_are_refused_everywhere(ranks, sizes):
    cp, tp, dp = sizes
    product = f"dp_size={dp} x cp_size={cp} x tp_size={tp} = {cp * tp * dp} ranks"
    for message in ranks(4).run(wrong_sizes, *sizes):
        assert message.startswith(f"{product}, but the world has 4")


def own_groups(ranks_of_groups: list[list[int]]) -> dist.ProcessGroup:
    """Makes the groups on all ranks; returns the one that this rank is in."""
    mine, _ = dist.new_subgroups_by_enumeration(ranks_of_groups)
    assert isinstance(mine, dist.ProcessGroup)
    return mine


def grid_groups(cp: int, tp: int) -> dict[str, Any]:
    """Groups of all four ranks as a caller would make them, those of one rank too."""
    return {
        "cp_group": own_groups([[c * tp + t for c in range(cp)] for t in range(tp)]),
        "tp_group": own_groups([[c * tp + t for t in range(tp)] for c in range(cp)]),
    }


def groups_context(cp: int, tp: int) -> list[dict[str, Any]]:
    groups = grid_groups(cp, tp)
    world = own_groups([list(range(4))])
    contexts = [ParallelContext.from_groups(**groups, world_group=world)]
    if 1 in (cp, tp):
        contexts.append(ParallelContext.from_groups(**groups))
    return [describe(ctx) for ctx in contexts]


@pytest.mark.parametrize(("cp", "tp"), SIZES)
def test_from_groups_is_from_world(ranks, cp, tp):
    for rank, contexts in enumerate(ranks(4).run(groups_context, cp, tp)):
        assert contexts == [expected(rank, cp, tp)] * len(contexts)


def bad_groups() -> list[str]:
    """What is wrong with each set of groups; all ranks make all groups first."""
    groups = grid_groups(2, 2)
    world = own_groups([[0, 1, 2, 3]])
    three = dist.new_group([0, 1, 2])
    rank = dist.get_rank()
    sizes: dict[str, Any] = {"cp_rank": rank // 2, "cp_size": 2, "tp_rank": rank % 2, "tp_size": 2}
    attempts: list[Any] = [
        lambda: ParallelContext.from_groups(**groups),
        lambda: ParallelContext.from_groups(**groups, world_group=groups["tp_group"]),
        lambda: ParallelContext(**sizes, **groups, world_group=world),
        lambda: ParallelContext(
            **sizes, cp_group=world, tp_group=groups["tp_group"], world_group=world
        ),
        lambda: ParallelContext(tp_group=groups["tp_group"]),
        lambda: ParallelContext(cp_group=world),
        lambda: ParallelContext(**{**sizes, "tp_rank": 1 - rank % 2}, **groups, world_group=world),
        lambda: ParallelContext.from_groups(cp_group=cast(Any, three if rank == 3 else None)),
    ]
    messages = []
    for attempt in attempts:
        try:
            attempt()
            messages.append("accepted")
        except ParallelConfigError as error:
            messages.append(str(error))
    return messages


def test_groups_that_do_not_fit_are_refused(ranks):
    for rank, messages in enumerate(ranks(4).run(bad_groups)):
        patterns = [
            "world_group is missing: 4 ranks need one",
            f"world_group puts this rank at {rank % 2} of 2, expected {rank} of 4",
            "host_group is missing: 4 ranks need one on gloo",
            f"cp_group puts this rank at {rank} of 4, expected {rank // 2} of 2",
            f"tp_group puts this rank at {rank % 2} of 2, expected 0 of 1",
            f"cp_group puts this rank at {rank} of 4, expected 0 of 1",
            f"tp_group puts this rank at {rank % 2} of 2, expected {1 - rank % 2} of 2",
            "not a member" if rank == 3 else "accepted",
        ]
        for message, pattern in zip(messages, patterns, strict=True):
            assert pattern in message


def unchecked_context() -> dict[str, Any]:
    comm = CommConfig(check_plan=False)
    groups, world = grid_groups(2, 2), own_groups([[0, 1, 2, 3]])
    rank = dist.get_rank()
    return describe(
        ParallelContext(
            cp_rank=rank // 2,
            cp_size=2,
            tp_rank=rank % 2,
            tp_size=2,
            **groups,
            world_group=world,
            comm=comm,
        )
    )


def test_no_host_group_is_needed_without_checks(ranks):
    for rank, ctx in enumerate(ranks(4).run(unchecked_context)):
        assert ctx == expected(rank, 2, 2) | {"host_group": None}


def mesh_context(shape: tuple[int, ...], names: tuple[str, ...]) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    return describe(ParallelContext.from_device_mesh(mesh))


@pytest.mark.parametrize(
    ("shape", "names", "cp", "tp"),
    [
        ((2, 2), ("cp", "tp"), 2, 2),
        ((4, 1), ("cp", "tp"), 4, 1),
        ((1, 4), ("cp", "tp"), 1, 4),
        ((4,), ("cp",), 4, 1),
        ((4,), ("tp",), 1, 4),
        ((1, 2, 2), ("dp", "cp", "tp"), 2, 2),
        ((2, 2, 1), ("dp", "cp", "tp"), 2, 1),
        ((2, 1, 2), ("dp", "cp", "tp"), 1, 2),
        ((2, 2), ("dp", "tp"), 1, 2),
    ],
)
def test_from_device_mesh_is_from_world(ranks, shape, names, cp, tp):
    replicas = 4 // (cp * tp)
    for rank, ctx in enumerate(ranks(4).run(mesh_context, shape, names)):
        # a mesh's other axes are the caller's: each replica is a context of its own
        assert ctx == expected(rank, cp, tp, replicas) | {"dp": (0, 1)}


def renamed_mesh_context() -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("seq", "model"))
    return describe(ParallelContext.from_device_mesh(mesh, cp="seq", tp="model"))


def test_mesh_axes_may_have_other_names(ranks):
    assert ranks(4).run(renamed_mesh_context) == [expected(r, 2, 2) for r in range(4)]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("tp", "cp"), "'cp' must come before 'tp'"),
        (("a", "b"), "the axes ('a', 'b'), neither 'cp' nor 'tp'"),
    ],
)
def test_meshes_that_do_not_fit_are_refused(ranks, names, message):
    for outcome in ranks(4).outcomes(mesh_context, (2, 2), names):
        assert isinstance(outcome, ParallelConfigError)
        assert message in str(outcome)


def two_contexts() -> list[float]:
    """The sum of 1, 10, 100, 1000 over this rank's TP group in two contexts of one process."""
    mine = torch.tensor([10.0 ** dist.get_rank()])
    sums = []
    for ctx in (context(2, 2), context(1, 4)):
        total = mine.clone()
        dist.all_reduce(total, group=ctx.tp_group)
        sums.append(total.item())
    return sums


def test_two_contexts_live_in_one_process(ranks):
    results = ranks(4).run(two_contexts)
    assert results == [[11, 1111], [11, 1111], [1100, 1111], [1100, 1111]]


def start_from_environment(port: int) -> dict[str, Any]:
    """Ends the world of the tests and lets from_world start one as torchrun would have it."""
    rank, size = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    with pytest.raises(ParallelConfigError, match="the world has 2"):
        ParallelContext.from_world(4)
    assert not dist.is_initialized()
    ctx = ParallelContext.from_world(2, timeout=timedelta(seconds=60))
    total = torch.tensor([rank + 1])
    dist.all_reduce(total, group=ctx.cp_group)
    return describe(ctx) | {"sum": total.item(), "backend": dist.get_backend(ctx.cp_group)}


def test_from_world_starts_the_ranks_of_a_launcher():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pair = Ranks(2)
    try:
        for rank, ctx in enumerate(pair.run(start_from_environment, port)):
            assert ctx == expected(rank, 2, 1) | {"sum": 3, "backend": "gloo"}
    finally:
        pair.close()
