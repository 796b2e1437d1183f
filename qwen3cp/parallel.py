"""Where a rank is: context parallel (CP) x tensor parallel (TP) ranks and their process groups."""

from __future__ import annotations

import enum
import os
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.distributed as dist

import qwen3cp.ops  # noqa: F401  loads torch_npu, which decides on the device and the backend
from qwen3cp.errors import ParallelConfigError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = [
    "AllReduceForm",
    "CommConfig",
    "ForwardPhase",
    "ParallelContext",
    "default_device",
    "div_even",
]


class ForwardPhase(enum.Enum):
    """What a forward does. Set by the model for its length, never guessed from shapes."""

    PREFILL = "prefill"
    """New tokens are split over the CP ranks; every layer gathers their keys and values."""
    DECODE = "decode"
    """Every CP rank runs all rows; no CP communication in the layers."""


AllReduceForm = Literal["exact", "int8_one_shot", "int8_two_step"]

AUTO_MIN_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class CommConfig:
    """How the ranks communicate. "exact" is the model's own dtype.

    Int8 is for PREFILL: a DECODE is always exact, and so is a module outside a forward.

    all_reduce: how the partial sums of a TP group are added, after the attention and after the MLP
        or the experts of every layer. "int8_one_shot": every rank gets all partial sums, quantised
        once. "int8_two_step": every rank adds a share of them, and the sums are quantised again.
        "auto": whichever of the three sends the fewest bytes, see `collectives.all_reduce_form`.
    group_size: values of a token that share a scale; None is all of them. 128 is about 2.5 times as
        exact where few channels are large, for 3 % more bytes.
    min_bytes: a partial sum of fewer bytes, on each rank, is added exactly. None is 1 MiB with
        "auto", and 0 with a form that is asked for by name.
    kv_gather: how keys and values travel between CP ranks. "int8" has a scale for each token and
        head; every rank caches the same rounded values.
    skip_layers: layers whose reductions and gather are exact.
    exchange: how rows and experts meet in a prefill with moe="ep": "all_gather", "all_to_all", or
        "auto", see `qwen3cp.exchange`.
    exchange_rows: how rows travel to the experts; "int8" has a scale for each row. Their way back
        is exact.
    check_plan: compare, once a forward and on the host, that all ranks run the same plan on the
        same ids with the same settings. It turns a hang or wrong text into an `InputError` on every
        rank.

    Raises:
        ParallelConfigError: a value that is none of these.
    """

    all_reduce: Literal["exact", "auto", "int8_one_shot", "int8_two_step"] = "exact"
    group_size: int | None = None
    min_bytes: int | None = None
    kv_gather: Literal["exact", "int8"] = "exact"
    skip_layers: Collection[int] = ()
    exchange: Literal["auto", "all_gather", "all_to_all"] = "auto"
    exchange_rows: Literal["exact", "int8"] = "exact"
    check_plan: bool = True

    def __post_init__(self) -> None:
        forms = {
            "all_reduce": ("exact", "auto", "int8_one_shot", "int8_two_step"),
            "kv_gather": ("exact", "int8"),
            "exchange": ("auto", "all_gather", "all_to_all"),
            "exchange_rows": ("exact", "int8"),
        }
        for name, allowed in forms.items():
            if getattr(self, name) not in allowed:
                raise ParallelConfigError(
                    f"CommConfig({name}={getattr(self, name)!r}): it must be one of "
                    f"{', '.join(allowed)}"
                )
        if self.group_size is not None:
            _check_size("CommConfig.group_size", self.group_size)
        if self.min_bytes is not None and not _is_integer(self.min_bytes, at_least=0):
            raise ParallelConfigError(
                f"CommConfig.min_bytes must be an integer of at least 0, got {self.min_bytes!r}"
            )
        layers = self.skip_layers
        if not isinstance(layers, Collection) or not all(
            _is_integer(layer, at_least=0) for layer in layers
        ):
            raise ParallelConfigError(
                f"CommConfig.skip_layers must be layer indices, counted from 0, got {layers!r}"
            )
        object.__setattr__(self, "skip_layers", tuple(sorted(set(layers))))

    @cached_property
    def digest(self) -> bytes:
        """Equal on two ranks only if their settings are; made once, for every forward compares
        it."""
        return repr(self).encode()

    @property
    def least_bytes(self) -> int:
        """Bytes of the smallest partial sum that is quantised."""
        if self.min_bytes is not None:
            return self.min_bytes
        return AUTO_MIN_BYTES if self.all_reduce == "auto" else 0


@dataclass(kw_only=True, eq=False)
class ParallelContext:
    """The place of this rank in one replica of cp_size x tp_size ranks, and its groups.

    Passed to the constructor of every module. Ranks of a replica are numbered
    `cp_rank * tp_size + tp_rank` (TP fastest); groups of one rank are None. Replicas
    (`dp_size`) do not communicate in a forward.

    `phase` is the phase of the forward in progress, None outside one.
    """

    cp_rank: int = 0
    cp_size: int = 1
    tp_rank: int = 0
    tp_size: int = 1
    dp_rank: int = 0
    dp_size: int = 1
    cp_group: dist.ProcessGroup | None = None
    tp_group: dist.ProcessGroup | None = None
    world_group: dist.ProcessGroup | None = None
    """The replica's cp_size x tp_size ranks, in rank order."""
    host_group: dist.ProcessGroup | None = None
    """The same ranks on a backend for CPU tensors (gloo), for checks on the host."""
    moe: Literal["tp", "ep"] = "tp"
    """tp: every expert is cut over TP and replicated over CP. ep: whole experts, divided over all
    cp x tp ranks."""
    comm: CommConfig = field(default_factory=CommConfig)
    detached: bool = False
    """A rank of another topology, without its process groups: see `describe`."""
    phase: ForwardPhase | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        for axis in ("cp", "tp", "dp"):
            rank, size = getattr(self, f"{axis}_rank"), getattr(self, f"{axis}_size")
            _check_size(f"{axis}_size", size)
            if not 0 <= rank < size:
                raise ParallelConfigError(f"{axis}_rank={rank} is not in 0..{size - 1}")
        _check_moe(self.moe)
        if not isinstance(self.comm, CommConfig):
            raise ParallelConfigError(f"comm must be a CommConfig, got {self.comm!r}")
        if self.detached:
            return
        _check_group("cp_group", self.cp_group, self.cp_rank, self.cp_size)
        _check_group("tp_group", self.tp_group, self.tp_rank, self.tp_size)
        _check_group("world_group", self.world_group, self.rank, self.world_size)
        if self.comm.check_plan:
            _check_group("host_group", self.host_group, self.rank, self.world_size)
        for name, size in (("cp", self.cp_size), ("tp", self.tp_size)):
            if size == 1:  # a group of this rank alone has nothing to do
                setattr(self, f"{name}_group", None)
        if self.world_size == 1:
            self.world_group = self.host_group = None
        self._warn_of_idle_settings()

    def _warn_of_idle_settings(self) -> None:
        """Once, by one rank: int8 was asked for where nothing travels."""
        if self.rank != 0:
            return
        for name, axis in (("all_reduce", "tp"), ("kv_gather", "cp")):
            value = getattr(self.comm, name)
            if value.startswith("int8") and getattr(self, f"{axis}_size") == 1:
                warnings.warn(
                    f"CommConfig({name}={value!r}) has no effect with {axis}_size=1: there is "
                    "nothing to communicate",
                    stacklevel=4,
                )

    @property
    def rank(self) -> int:
        """Rank in the replica: cp_rank * tp_size + tp_rank."""
        return self.cp_rank * self.tp_size + self.tp_rank

    @property
    def world_size(self) -> int:
        """Ranks of the replica: cp_size * tp_size."""
        return self.cp_size * self.tp_size

    @contextmanager
    def forward(self, phase: ForwardPhase) -> Iterator[None]:
        """Sets `phase` for the block. Forwards do not nest."""
        if not isinstance(phase, ForwardPhase):
            raise ParallelConfigError(f"phase must be a ForwardPhase, got {phase!r}")
        self.check_attached()
        if self.phase is not None:
            raise ParallelConfigError(
                f"a {self.phase.value} forward is already in progress on this context; "
                f"a {phase.value} forward cannot start inside it"
            )
        self.phase = phase
        try:
            yield
        finally:
            self.phase = None

    def check_attached(self) -> None:
        """Raises ParallelConfigError if this is one of several ranks without its groups."""
        if self.detached and self.world_size > 1:
            raise ParallelConfigError(
                f"this context only describes rank {self.rank} of {self.world_size}: it has no "
                "process groups, and cannot run a forward; make it with from_world"
            )

    @contextmanager
    def communication(self, comm: CommConfig) -> Iterator[None]:
        """Sets `comm` for the block, on every rank, to compare settings on one loaded model.

        Not inside a forward.
        """
        if self.phase is not None:
            raise ParallelConfigError(
                f"a {self.phase.value} forward is in progress: settings change between forwards"
            )
        before, self.comm = self.comm, comm
        try:
            yield
        finally:
            self.comm = before

    @classmethod
    def single(cls) -> ParallelContext:
        """One rank, no process group."""
        return cls()

    @classmethod
    def describe(
        cls, rank: int, *, cp_size: int = 1, tp_size: int = 1, moe: Literal["tp", "ep"] = "tp"
    ) -> ParallelContext:
        """A rank of a replica that need not exist: what it holds and reads, without processes.

        It has no groups. A model can be built and loaded with it, but not run.
        """
        _check_size("cp_size", cp_size)
        _check_size("tp_size", tp_size)
        if not 0 <= rank < cp_size * tp_size:
            raise ParallelConfigError(f"rank={rank} is not in 0..{cp_size * tp_size - 1}")
        return cls(
            cp_rank=rank // tp_size,
            cp_size=cp_size,
            tp_rank=rank % tp_size,
            tp_size=tp_size,
            moe=moe,
            detached=True,
        )

    @classmethod
    def from_world(
        cls,
        cp_size: int = 1,
        tp_size: int = 1,
        dp_size: int = 1,
        *,
        moe: Literal["tp", "ep"] = "tp",
        comm: CommConfig | None = None,
        backend: str | None = None,
        timeout: timedelta | float | None = None,
    ) -> ParallelContext:
        """Splits the whole world into dp_size x cp_size x tp_size ranks.

        Global rank = (dp_rank * cp_size + cp_rank) * tp_size + tp_rank. Starts torch.distributed
        from the environment that torchrun or `accelerate launch` sets if nobody has; one rank
        needs neither.

        Collective over the world: every rank must call it, with the same sizes.

        Args:
            backend: of the groups; None is hccl on an NPU, gloo on a CPU.
            timeout: of a collective, in seconds; None is that of the world if it is initialised
                already, else the backend's default. It applies to the groups that this call
                makes; a world that is initialised keeps its own.

        Raises:
            ParallelConfigError: the sizes do not multiply to the world size. Raised before any
                group is made.
        """
        for name, size in (("cp_size", cp_size), ("tp_size", tp_size), ("dp_size", dp_size)):
            _check_size(name, size)
        _check_moe(moe)
        comm = CommConfig() if comm is None else comm
        wanted = dp_size * cp_size * tp_size
        initialized = dist.is_initialized()
        world = dist.get_world_size() if initialized else int(os.environ.get("WORLD_SIZE", "1"))
        if world != wanted:
            raise ParallelConfigError(
                f"dp_size={dp_size} x cp_size={cp_size} x tp_size={tp_size} = {wanted} ranks, but "
                f"the world has {world}: start {wanted} ranks (torchrun --nproc-per-node {wanted}) "
                "or change the sizes"
            )
        if wanted == 1 and not initialized:
            return cls(moe=moe, comm=comm)

        device = default_device()
        if not initialized:
            if device.type == "npu":
                torch.get_device_module(device).set_device(int(os.environ.get("LOCAL_RANK", "0")))
            dist.init_process_group(
                backend or ("hccl" if device.type == "npu" else "gloo"),
                timeout=_as_timedelta(timeout),
            )

        if timeout is None:
            timeout = _world_timeout(device)
        grid = np.arange(wanted).reshape(dp_size, cp_size, tp_size)
        dp_rank, cp_rank, tp_rank = (int(i) for i in np.argwhere(grid == dist.get_rank())[0])

        def make(groups: np.ndarray, backend: str | None) -> dist.ProcessGroup | None:
            """One group per row; every rank makes all of them, in the same order."""
            if groups.shape[1] == 1:
                return None
            if groups.shape[1] == wanted and backend in (None, dist.get_backend()):
                return dist.group.WORLD
            return _new_groups(groups, backend=backend, timeout=_as_timedelta(timeout))

        cp_group = make(grid.transpose(0, 2, 1).reshape(-1, cp_size), backend)
        tp_group = make(grid.reshape(-1, tp_size), backend)
        replicas = grid.reshape(dp_size, -1)
        if cp_size == 1 or tp_size == 1:
            world_group = tp_group if cp_size == 1 else cp_group
        else:
            world_group = make(replicas, backend)
        host_group = world_group
        if world_group is not None and not _runs_on_host(world_group):
            host_group = make(replicas, "gloo")
        return cls(
            cp_rank=cp_rank,
            cp_size=cp_size,
            tp_rank=tp_rank,
            tp_size=tp_size,
            dp_rank=dp_rank,
            dp_size=dp_size,
            cp_group=cp_group,
            tp_group=tp_group,
            world_group=world_group,
            host_group=host_group,
            moe=moe,
            comm=comm,
        )

    @classmethod
    def from_groups(
        cls,
        *,
        cp_group: dist.ProcessGroup | None = None,
        tp_group: dist.ProcessGroup | None = None,
        world_group: dist.ProcessGroup | None = None,
        host_group: dist.ProcessGroup | None = None,
        moe: Literal["tp", "ep"] = "tp",
        comm: CommConfig | None = None,
    ) -> ParallelContext:
        """Uses groups that the caller made; None stands for one rank. Not collective.

        world_group holds the cp x tp ranks, TP fastest; it may be left out when one of the two
        sizes is 1. host_group holds the same ranks on gloo; it may be left out when world_group
        is on gloo itself, or with `CommConfig(check_plan=False)`.
        """
        cp_rank, cp_size = _rank_and_size(cp_group)
        tp_rank, tp_size = _rank_and_size(tp_group)
        if world_group is None and (cp_size == 1 or tp_size == 1):
            world_group = tp_group if cp_size == 1 else cp_group
        if host_group is None and world_group is not None and _runs_on_host(world_group):
            host_group = world_group
        return cls(
            cp_rank=cp_rank,
            cp_size=cp_size,
            tp_rank=tp_rank,
            tp_size=tp_size,
            cp_group=cp_group,
            tp_group=tp_group,
            world_group=world_group,
            host_group=host_group,
            moe=moe,
            comm=CommConfig() if comm is None else comm,
        )

    @classmethod
    def from_device_mesh(
        cls,
        mesh: DeviceMesh,
        *,
        cp: str = "cp",
        tp: str = "tp",
        moe: Literal["tp", "ep"] = "tp",
        comm: CommConfig | None = None,
    ) -> ParallelContext:
        """Uses the axes `cp` and `tp` of a mesh (either may be missing: one rank).

        Collective over the mesh. In the mesh `cp` comes before `tp`, so that TP is the fastest.
        """
        names = mesh.mesh_dim_names or ()
        axes = tuple(name for name in (cp, tp) if name in names)
        if not axes:
            raise ParallelConfigError(f"the mesh has the axes {names}, neither {cp!r} nor {tp!r}")
        if len(axes) == 2 and names.index(cp) > names.index(tp):
            raise ParallelConfigError(
                f"the mesh has the axes {names}: {cp!r} must come before {tp!r}, TP ranks are "
                "neighbours"
            )
        cp_group = mesh.get_group(cp) if cp in axes and mesh[cp].size() > 1 else None
        tp_group = mesh.get_group(tp) if tp in axes and mesh[tp].size() > 1 else None
        world_group = None
        if cp_group is not None and tp_group is not None:
            world_group = mesh[axes]._flatten().get_group()
        replica = cp_group or tp_group if world_group is None else world_group
        host_group = None
        if replica is not None and not _runs_on_host(replica):
            # every replica of the mesh makes its host group, in the same order on all ranks
            size = dist.get_world_size(replica)
            grid = mesh.mesh.movedim([names.index(a) for a in axes], list(range(-len(axes), 0)))
            host_group = _new_groups(grid.reshape(-1, size).numpy(), backend="gloo")
        return cls.from_groups(
            cp_group=cp_group,
            tp_group=tp_group,
            world_group=world_group,
            host_group=host_group,
            moe=moe,
            comm=comm,
        )


def default_device() -> torch.device:
    """The current NPU where there is one, else the CPU."""
    npu = getattr(torch, "npu", None)
    if npu is not None and npu.is_available():
        return torch.device("npu", npu.current_device())
    return torch.device("cpu")


def div_even(total: int, parts: int, what: str) -> int:
    """total / parts, or a ParallelConfigError that names `what` and both numbers."""
    if total % parts:
        raise ParallelConfigError(f"{what} = {total} cannot be divided evenly by {parts}")
    return total // parts


def _check_moe(moe: str) -> None:
    if moe not in ("tp", "ep"):
        raise ParallelConfigError(f"moe must be 'tp' or 'ep', got moe={moe!r}")


def _is_integer(value: Any, *, at_least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= at_least


def _check_size(name: str, size: int) -> None:
    if not _is_integer(size, at_least=1):
        raise ParallelConfigError(f"{name} must be a positive integer, got {size!r}")


def _check_group(name: str, group: dist.ProcessGroup | None, rank: int, size: int) -> None:
    if group is None:
        if size == 1:
            return
        raise ParallelConfigError(
            f"{name} is missing: {size} ranks need one"
            + (" on gloo, or CommConfig(check_plan=False)" if name == "host_group" else "")
        )
    actual = _rank_and_size(group)
    if actual != (rank, size):
        raise ParallelConfigError(
            f"{name} puts this rank at {actual[0]} of {actual[1]}, expected {rank} of {size} "
            "(ranks of a replica are numbered cp_rank * tp_size + tp_rank)"
        )


def _rank_and_size(group: dist.ProcessGroup | None) -> tuple[int, int]:
    if group is None:
        return 0, 1
    rank = dist.get_rank(group)
    if rank < 0:
        raise ParallelConfigError("this rank is not a member of a group that it was given")
    return rank, dist.get_world_size(group)


def _new_groups(groups: np.ndarray, **kwargs: Any) -> dist.ProcessGroup | None:
    """Makes a group of every row, and returns the one that this rank is in."""
    mine = None
    for ranks in groups.tolist():
        group = dist.new_group(ranks, **kwargs)
        if dist.get_rank() in ranks:
            assert isinstance(group, dist.ProcessGroup)
            mine = group
    return mine


def _world_timeout(device: torch.device) -> timedelta | None:
    """The timeout of the world's collectives, which new groups do not take over by themselves."""
    world = dist.group.WORLD
    assert world is not None
    kinds = [kind.type for kind in world._device_types]
    backend = world._get_backend(torch.device(device.type if device.type in kinds else kinds[0]))
    return getattr(getattr(backend, "options", None), "_timeout", None)


def _runs_on_host(group: dist.ProcessGroup) -> bool:
    """Whether the group takes CPU tensors."""
    return torch.device("cpu") in group._device_types


def _as_timedelta(timeout: timedelta | float | None) -> timedelta | None:
    return timedelta(seconds=timeout) if isinstance(timeout, int | float) else timeout
