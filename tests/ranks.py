"""Real gloo ranks for tests: processes that stay up and run one function after another.

Every topology of n ranks is made on the same n processes, so a test session starts few of them.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

TIMEOUT = 120.0


class Ranks:
    """`size` processes with one gloo world. `run` calls a function on all of them."""

    def __init__(self, size: int, timeout: float = TIMEOUT) -> None:
        self.size = size
        spawn = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        self._pipes: list[Connection] = []
        self.processes = []
        for rank in range(size):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(
                target=_serve,
                args=(theirs, rank, size, f"file://{self._folder.name}/rendezvous", timeout),
                daemon=True,
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self.processes.append(process)

    def start(self, function: Callable[..., Any], *args: Any) -> None:
        for pipe in self._pipes:
            pipe.send((function, args))

    def collect(self, timeout: float = TIMEOUT) -> list[Any]:
        """What each rank returned; an exception it raised, or the EOFError of one that died, is
        returned in its place."""
        results = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(timeout):
                raise TimeoutError(f"rank {rank} of {self.size} gave no result in {timeout} s")
            try:
                results.append(pipe.recv())
            except EOFError as error:
                results.append(error)
        return results

    def outcomes(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Runs function(*args) on every rank; returns results and exceptions by rank."""
        self.start(function, *args)
        return self.collect()

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Runs function(*args) on every rank; raises what any of them raised."""
        outcomes = self.outcomes(function, *args)
        for rank, outcome in enumerate(outcomes):
            if isinstance(outcome, BaseException):
                raise AssertionError(f"rank {rank} of {self.size} failed") from outcome
        return outcomes

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self._folder.cleanup()


def run(
    ranks: Callable[[int], Ranks], topology: tuple[int, int], function: Callable, *args: Any
) -> list[Any]:
    """function(cp, tp, *args) on every rank of a topology; the results by rank."""
    cp, tp = topology
    if cp * tp == 1:
        return [function(cp, tp, *args)]
    return ranks(cp * tp).run(function, cp, tp, *args)


def context(cp: int, tp: int, **kwargs: Any) -> Any:
    """In a rank: the ParallelContext of a topology, made once per process."""
    from qwen3cp import ParallelContext

    key = (cp, tp, tuple(sorted(kwargs.items())))
    if key not in _contexts:
        _contexts[key] = ParallelContext.from_world(cp, tp, **kwargs)
    return _contexts[key]


_contexts: dict[Any, Any] = {}


def _serve(pipe: Connection, rank: int, size: int, init_method: str, timeout: float) -> None:
    os.environ["QWEN3CP_DEBUG_OPS"] = "1"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=init_method,
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout),
    )
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            result = function(*args)
        except BaseException as error:
            error.add_note(f"on rank {rank}:\n{traceback.format_exc()}")
            result = error
        pipe.send(result)
