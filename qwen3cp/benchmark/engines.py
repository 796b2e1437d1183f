"""The models under measurement behind one face: ours, and transformers'.

Letters: B sequences, S prompt tokens, V vocabulary.
"""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch
from transformers import DynamicCache, Qwen3MoeForCausalLM
from transformers.utils import logging as transformers_logging

from qwen3cp.benchmark.ways import Way, Workload
from qwen3cp.config import check_supported
from qwen3cp.kv_cache import DEFAULT_PAGE_SIZE
from qwen3cp.model import CPQwen3MoeForCausalLM
from qwen3cp.ops import settings as kernel_settings
from qwen3cp.parallel import ForwardPhase, ParallelContext, default_device

__all__ = ["Engine", "OurEngine", "Run", "TransformersEngine", "synchronize"]

EXPERTS = ("eager", "grouped_mm", "batched_mm")
LARGEST_COPY = 1 << 30
"""Bytes of weights that batched_mm may copy in one layer; it copies an expert for each row."""
PROBE_TOKENS = 2048
PROBE_STEPS = 4


class Run(Protocol):
    """One batch from an empty cache."""

    def prefill(self, prompts: torch.Tensor) -> torch.Tensor:
        """int64 [B, S], on the host, to float logits [B, V] of the next tokens."""
        ...

    def decode(self, ids: torch.Tensor) -> torch.Tensor:
        """int64 [B], on the host, to logits [B, V]."""
        ...

    @property
    def cache_bytes(self) -> int:
        """Of the keys and values that it holds memory for."""
        ...


class OurEngine:
    """Loading, `start` and what the run does are collective over the replica."""

    def __init__(self, model_path: str, dtype: str, ctx: ParallelContext) -> None:
        self.model = CPQwen3MoeForCausalLM.from_pretrained(
            model_path, parallel_context=ctx, dtype=dtype, progress=False
        )
        self.device = self.model.device

    def start(self, way: Way, workload: Workload) -> Run:
        with self.model.parallel_context.communication(way.comm):
            check_supported(self.model.config, self.model.parallel_context)
        return _OurRun(self.model, way, workload)

    def prepare(self, phase: ForwardPhase) -> None:
        """Before each phase of a run, outside the time that is taken: nothing to do."""


class _OurRun:
    def __init__(self, model: CPQwen3MoeForCausalLM, way: Way, workload: Workload) -> None:
        length = workload.prompt_tokens + workload.new_tokens
        pages = workload.batch_size * -(-length // DEFAULT_PAGE_SIZE)
        self._model, self._way = model, way
        self._cache = model.new_kv_cache(num_pages=1 + pages)
        self._sequences = [self._cache.new_sequence() for _ in range(workload.batch_size)]
        self.cache_bytes = 0
        for layer in range(self._cache.num_layers):
            rows = self._cache.layer(layer).rows
            rows.zero_()  # a page of memory counts once it is written to
            self.cache_bytes += rows.numel() * rows.element_size()

    def prefill(self, prompts: torch.Tensor) -> torch.Tensor:
        chunk = self._way.chunk_tokens or prompts.shape[1]
        logits = torch.empty(0)
        with (
            self._model.parallel_context.communication(self._way.comm),
            kernel_settings.override(float32_scores=self._float32_scores),
        ):
            for part in prompts.split(chunk, 1):
                logits = self._model.prefill(self._cache, self._sequences, list(part))
        return logits

    def decode(self, ids: torch.Tensor) -> torch.Tensor:
        with (
            self._model.parallel_context.communication(self._way.comm),
            kernel_settings.override(float32_scores=self._float32_scores),
        ):
            return self._model.decode(self._cache, self._sequences, ids)

    @property
    def _float32_scores(self) -> bool:
        return self._way.float32_scores or kernel_settings.float32_scores


class TransformersEngine:
    """transformers' own model, its experts run by whichever implementation is the fastest."""

    def __init__(self, model_path: str, dtype: str) -> None:
        self.device = default_device()
        transformers_logging.disable_progress_bar()
        self.model = Qwen3MoeForCausalLM.from_pretrained(
            model_path, dtype=getattr(torch, dtype)
        ).to(self.device)  # pyright: ignore[reportArgumentType]
        self.model.eval()
        self.chosen: dict[ForwardPhase, str] = {}
        """Set by `choose_experts`."""
        self.probed: dict[str, dict[str, float]] = {}
        """Seconds of each implementation that was tried, by phase."""

    def start(self, way: Way, workload: Workload) -> Run:
        return _TransformersRun(self.model)

    def prepare(self, phase: ForwardPhase) -> None:
        """Before each phase of a run, outside the time that is taken."""
        self.model.set_experts_implementation(self.chosen[phase])

    def choose_experts(self, prompts: torch.Tensor) -> None:
        """Times every implementation on the first tokens of [B, S], one by one."""
        prompts = prompts[:, :PROBE_TOKENS]
        self.probed = {phase.value: {} for phase in ForwardPhase}
        for name in EXPERTS:
            self.model.set_experts_implementation(name)
            # batched_mm copies the weights of each row: long prompts are not for it
            shorter = prompts if self._fits(name, prompts.numel()) else prompts[:, :8]
            try:
                run = _TransformersRun(self.model)
                run.prefill(shorter[:, :8])
                run = _TransformersRun(self.model)
                seconds = _seconds(self.device, lambda r=run, p=shorter: r.prefill(p))
                steps = [
                    _seconds(self.device, lambda r=run: r.decode(prompts[:, 0]))
                    for _ in range(PROBE_STEPS)
                ]
            except (RuntimeError, ValueError, ImportError):  # not on this device or in this torch
                continue
            if shorter is prompts:
                self.probed["prefill"][name] = seconds
            self.probed["decode"][name] = min(steps)
        for phase in ForwardPhase:
            times = self.probed[phase.value]
            self.chosen[phase] = min(times, key=lambda name: times[name])

    def _fits(self, name: str, num_rows: int) -> bool:
        config = self.model.config
        values = 3 * config.moe_intermediate_size * config.hidden_size * config.num_experts_per_tok
        copied = num_rows * values * self.model.dtype.itemsize
        return name != "batched_mm" or copied <= LARGEST_COPY


Engine = OurEngine | TransformersEngine


class _TransformersRun:
    def __init__(self, model: Any) -> None:
        self._model = model
        self._cache = DynamicCache(config=model.config)

    def prefill(self, prompts: torch.Tensor) -> torch.Tensor:
        return self._forward(prompts)

    def decode(self, ids: torch.Tensor) -> torch.Tensor:
        return self._forward(ids[:, None])

    @torch.inference_mode()
    def _forward(self, ids: torch.Tensor) -> torch.Tensor:
        output = self._model(
            ids.to(self._model.device),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1].float()

    @property
    def cache_bytes(self) -> int:
        return sum(
            x.numel() * x.element_size()
            for layer in self._cache.layers
            for x in (getattr(layer, "keys", None), getattr(layer, "values", None))
            if x is not None
        )


def _seconds(device: torch.device, call: Any) -> float:
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Waits for what a device has been given to do."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()
