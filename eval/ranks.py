"""All ranks of all replicas, as the harness needs them: one speaks, the others hear it."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from qwen3cp.errors import CommunicationError, InputError, Qwen3CPError
from qwen3cp.parallel import ParallelContext

__all__ = ["Ranks"]

T = TypeVar("T")

UNLIMITED = timedelta(days=365)


class Ranks:
    """The ranks of all replicas, which exchange objects on the host.

    Collective: every rank must make it, and make the same calls on it.
    """

    def __init__(self, ctx: ParallelContext) -> None:
        self.dp_rank, self.dp_size = ctx.dp_rank, ctx.dp_size
        self.speaks_for_replica = ctx.rank == 0
        self.rank = ctx.dp_rank * ctx.world_size + ctx.rank
        self.size = ctx.dp_size * ctx.world_size
        self._members: list[int] | None = None
        self._group: dist.ProcessGroup | None = None
        self._num_mailboxes = 0
        if self.size > 1:
            whole = ctx.dp_size > 1
            group = dist.group.WORLD if whole else ctx.host_group or ctx.world_group
            assert group is not None
            self._members = dist.get_process_group_ranks(group)
            on_host = torch.device("cpu") in group._device_types
            self._group = group if on_host else self._new_group()

    @property
    def is_first(self) -> bool:
        """The rank that the harness speaks to, and that alone writes and prints."""
        return self.rank == 0

    def share(self, value: T) -> T:
        """The first rank's value, on every rank."""
        if self._group is None:
            return value
        box: list[Any] = [value if self.is_first else None]
        with _named_failure():
            dist.broadcast_object_list(box, group=self._group, group_src=0)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank, in rank order."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.size
        with _named_failure():
            dist.all_gather_object(values, value, group=self._group)
        return values

    def fail_together(self, error: Exception | None) -> None:
        """Raises on every rank if there is an error on one: its own, or one of the same kind."""
        reports = self.gather(None if error is None else report_of(error))
        if error is not None:
            raise error
        for rank, report in enumerate(reports):
            if report is not None:
                error_type, message = report
                raise error_type(f"rank {rank} stopped this call: {message}")

    def mailbox(self) -> Mailbox:
        """For one call; collective."""
        self._num_mailboxes += 1
        return Mailbox(self, f"qwen3cp/eval/{self._num_mailboxes}")

    @contextmanager
    def patient(self) -> Iterator[None]:
        """For the block the ranks wait for one another without a limit of time.

        Between two calls of the harness its first rank alone reads tasks, computes metrics and
        writes, which may take any time.
        """
        before = self._group
        if before is not None:
            self._group = self._new_group(UNLIMITED)
        try:
            yield
        finally:
            self._group = before

    def _new_group(self, timeout: timedelta | None = None) -> dist.ProcessGroup:
        group = dist.new_group(
            self._members, backend="gloo", timeout=timeout, use_local_synchronization=True
        )
        assert isinstance(group, dist.ProcessGroup)
        return group


class Mailbox:
    """Hands what a replica has ready to the first rank while both go on; they wait for nothing.

    It lies in the store that the ranks have met at. What is still in it at the end is left there.
    """

    def __init__(self, ranks: Ranks, name: str) -> None:
        self._ranks = ranks
        self._store = dist.PrefixStore(name, dist.distributed_c10d._get_default_store())
        self._num_sent = 0
        self._num_taken = [0] * ranks.dp_size

    def send(self, value: Any) -> None:
        """Collective over the replica, of which one rank sends. The first rank's own does not."""
        if self._ranks.dp_rank > 0 and self._ranks.speaks_for_replica:
            key = f"{self._ranks.dp_rank}/{self._num_sent}"
            cast(Any, self._store).set(key, pickle.dumps(value))  # bytes, which its stub denies
            self._num_sent += 1

    def take(self) -> Iterator[Any]:
        """On the first rank: what has come since. On the others: nothing."""
        if not self._ranks.is_first:
            return
        for replica in range(1, self._ranks.dp_size):
            while self._store.check([key := f"{replica}/{self._num_taken[replica]}"]):
                value = pickle.loads(self._store.get(key))
                self._store.delete_key(key)
                self._num_taken[replica] += 1
                yield value


def report_of(error: BaseException) -> tuple[type[Exception], str]:
    """What other ranks are told of an error: a type of this package and a message."""
    if isinstance(error, Qwen3CPError):
        return type(error), str(error)
    return InputError if isinstance(error, Exception) else CommunicationError, (
        f"{type(error).__name__}: {error}"
    )


@contextmanager
def _named_failure() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise CommunicationError(
            f"the ranks of the evaluation lost one another: {error}\nLook for the first error "
            "among the ranks, and start all of them again"
        ) from error
