"""What is read beside the clock: memory, and the time of each part of a forward."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from qwen3cp import collectives
from qwen3cp.benchmark.engines import synchronize

__all__ = ["PARTS", "MemoryMeter", "PartTimer"]

PARTS = ("attention", "experts", "projections", "collectives", "other", "host")
"""attention: what self_attn runs but its projections: norms and rotation of its heads, writing to
the cache, the attention itself. experts: all of the MLP, the router too. projections: of queries,
keys, values and outputs, and lm_head. collectives: starting them and waiting for them. other: norms
of the residual, embedding, rotary tables. host: the time that no operator takes: Python, plans."""

_PRODUCTS = ("linear", "mm", "addmm", "bmm", "baddbmm", "matmul")
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


class MemoryMeter:
    """The most memory that this process holds at a time, from `start` on.

    Resident memory is that of Linux (VmHWM), None elsewhere; device memory is None on a CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = None if device.type == "cpu" else torch.get_device_module(device)
        self._resident = self._allocated = 0

    def start(self) -> None:
        """Gives back what was freed, and takes what is held for the base."""
        gc.collect()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
        self._resident = 0
        try:
            _CLEAR_REFS.write_text("5")  # the peak starts again from what is held now
            self._resident = _status("VmRSS")
        except OSError:
            pass
        if self._device is not None:
            self._device.synchronize()
            self._device.reset_peak_memory_stats()
            self._allocated = self._device.memory_allocated()

    @property
    def peak_resident_bytes(self) -> int | None:
        return _status("VmHWM") if self._resident else None

    @property
    def peak_device_bytes(self) -> int | None:
        return None if self._device is None else self._device.max_memory_allocated()

    @property
    def grown_bytes(self) -> int | None:
        """How far the peak, of the device or else of the host, is above the base."""
        if self._device is not None:
            return self._device.max_memory_allocated() - self._allocated
        return _status("VmHWM") - self._resident if self._resident else None


def _status(name: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) << 10
    raise OSError(f"this system does not tell {name}")


class PartTimer(TorchDispatchMode):
    """Takes the time of every operator, waiting for each, and says which part it is of.

    What an operator of a CPU kernel runs inside is a part of it. The wait makes a device do one
    thing at a time, so nothing overlaps here.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__()
        self._model, self._device = model, device
        self._scopes = ["model"]
        self.seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self.num_operators = 0

    @contextmanager
    def measure(self) -> Iterator[None]:
        with ExitStack() as stack:
            for name, module in self._model.named_modules():
                scope = name.rpartition(".")[2]
                if scope in ("self_attn", "mlp"):
                    enter, leave = self._hooks(scope)
                    stack.callback(module.register_forward_pre_hook(enter).remove)
                    stack.callback(module.register_forward_hook(leave).remove)
            spans = stack.enter_context(collectives.time_collectives())
            stack.enter_context(self)
            yield
            self.seconds["collectives"] += sum(span.end - span.start for span in spans)

    def shares(self, seconds: float) -> dict[str, float]:
        """Of the time that the same work took without this timer, which makes no operator slower
        but the host; they add up to 1."""
        total = sum(self.seconds.values())
        times = {**self.seconds, "host": max(0.0, seconds - total)}
        whole = sum(times.values())
        return {part: spent / whole for part, spent in times.items()}

    def _hooks(self, scope: str) -> tuple[Any, Any]:
        def enter(*_: object) -> None:
            self._scopes.append(scope)

        def leave(*_: object) -> None:
            self._scopes.pop()

        return enter, leave

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        self.num_operators += 1
        if func.namespace in ("c10d", "_c10d_functional"):  # whose time is that of the collective
            return func(*args, **(kwargs or {}))
        start = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        synchronize(self._device)
        self.seconds[self._part_of(func)] += time.perf_counter() - start
        return result

    def _part_of(self, func: Any) -> str:
        scope = self._scopes[-1]
        if scope == "mlp":
            return "experts"
        if func.overloadpacket.__name__ in _PRODUCTS:
            return "projections"
        return "attention" if scope == "self_attn" else "other"
