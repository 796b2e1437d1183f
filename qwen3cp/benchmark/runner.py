"""Runs every workload in every way, in turns, on the ranks that there are.

Letters: B sequences, S prompt tokens.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from qwen3cp.benchmark.engines import Engine, OurEngine, Run, TransformersEngine, synchronize
from qwen3cp.benchmark.meters import MemoryMeter, PartTimer
from qwen3cp.benchmark.report import Episode, Measured, Report
from qwen3cp.benchmark.ways import Settings, Way, Workload
from qwen3cp.collectives import record_communication
from qwen3cp.parallel import ForwardPhase, ParallelContext

__all__ = ["num_steps", "run_benchmark"]

WAIT = timedelta(days=1)
"""For the ranks that have nothing to do while others run."""
WARM_UP_TOKENS = 128
PHASES = (ForwardPhase.PREFILL, ForwardPhase.DECODE)


def run_benchmark(
    settings: Settings, on_step: Callable[[str], None] | None = None
) -> Report | None:
    """Measures, and returns the report on rank 0. Collective over the whole world.

    Args:
        on_step: told what comes next, `num_steps` times.

    Raises:
        ParallelConfigError: the ways do not fit into the world; before any group is made.
    """
    return _Runner(settings, on_step).run()


def num_steps(settings: Settings) -> int:
    """How often `run_benchmark` calls on_step."""
    per_way = 1 + settings.repeats + settings.parts
    return len(settings.workloads) * len(settings.ways) * per_way


class _Runner:
    def __init__(self, settings: Settings, on_step: Callable[[str], None] | None) -> None:
        self.settings, self.on_step = settings, on_step
        started = dist.is_initialized()
        world = dist.get_world_size() if started else int(os.environ.get("WORLD_SIZE", "1"))
        settings.check_world(world)
        self.contexts: dict[Any, ParallelContext] = {}
        for way in settings.ways:  # groups are made by all ranks, in the same order
            key = (way.cp, way.tp, way.moe)
            if key not in self.contexts:
                self.contexts[key] = ParallelContext.from_world(
                    way.cp,
                    way.tp,
                    dp_size=world // way.num_ranks,
                    moe=way.moe,
                    timeout=settings.timeout,
                )
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.group: Any = dist.new_group(backend="gloo", timeout=WAIT) if world > 1 else None
        self.engines: dict[Any, Engine] = {}

    def run(self) -> Report | None:
        torch.set_num_threads(self.settings.threads)
        for way in self.settings.ways:
            self._load(way)
        measured = []
        for workload in self.settings.workloads:
            measured += self._measure(workload)
        return Report.of(self.settings, measured) if self.rank == 0 else None

    # -------------------------------------------------------------------------------- who runs

    def _copy(self, way: Way) -> int:
        """The replica of this rank."""
        if way.engine == "transformers":
            return self.rank
        return self.contexts[way.cp, way.tp, way.moe].dp_rank

    def _engine(self, way: Way) -> Engine | None:
        """What this rank runs it with; None if it takes no part."""
        return self.engines[self._key(way)] if self._copy(way) < way.copies else None

    def _key(self, way: Way) -> Any:
        return (way.engine, way.dtype, way.cp, way.tp, way.moe)

    def _load(self, way: Way) -> None:
        if self._key(way) not in self.engines and self._copy(way) < way.copies:
            if way.engine == "transformers":
                engine: Engine = TransformersEngine(self.settings.model, way.dtype)
            else:
                ctx = self.contexts[way.cp, way.tp, way.moe]
                engine = OurEngine(self.settings.model, way.dtype, ctx)
            self.engines[self._key(way)] = engine
        self._barrier()

    def _barrier(self) -> None:
        if self.group is not None:
            dist.barrier(self.group)

    def _of_all_ranks(self, mine: Any) -> dict[int, Any]:
        """What the ranks have that took part."""
        if self.group is None:
            return {0: mine}
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, mine, group=self.group)
        return {rank: each for rank, each in enumerate(every) if each is not None}

    # --------------------------------------------------------------------------------- one workload

    def _measure(self, workload: Workload) -> list[Measured]:
        ways = self.settings.ways
        short = Workload(
            batch_size=workload.batch_size,
            prompt_tokens=min(WARM_UP_TOKENS, workload.prompt_tokens),
            new_tokens=min(2, workload.new_tokens),
        )
        experts: dict[Way, dict[str, Any]] = {}
        for way in ways:
            self._tell(way, workload, "warm-up")
            engine = self._engine(way)
            if isinstance(engine, TransformersEngine):
                engine.choose_experts(self._tokens(workload)[0])
                chosen = {phase.value: name for phase, name in engine.chosen.items()}
                experts[way] = {"chosen": chosen, "seconds": engine.probed}
            self._episode(way, short)
        repeats: dict[Way, list[dict[int, Episode]]] = {way: [] for way in ways}
        for repeat in range(self.settings.repeats):
            first = repeat % len(ways)  # none always follows the same
            for way in ways[first:] + ways[:first]:
                self._tell(way, workload, f"{repeat + 1} of {self.settings.repeats}")
                repeats[way].append(self._of_all_ranks(self._episode(way, workload)))
        measured = []
        for way in ways:
            shares, operators = None, None
            if self.settings.parts:
                self._tell(way, workload, "parts")
                shares, operators = self._parts(way, workload, repeats[way])
            measured.append(
                Measured(
                    way=way,
                    workload=workload,
                    repeats=repeats[way],
                    shares=shares,
                    operators=operators,
                    experts=experts.get(way),
                )
            )
        return measured

    def _tokens(self, workload: Workload) -> tuple[torch.Tensor, torch.Tensor]:
        """Random ids: prompts [B, S], and what follows them, [new_tokens, B]."""
        config: Any = next(iter(self.engines.values())).model.config
        generator = torch.Generator().manual_seed(self.settings.seed)
        rows, columns = workload.batch_size, workload.prompt_tokens + workload.new_tokens
        ids = torch.randint(0, config.vocab_size, (rows, columns), generator=generator)
        prompts, rest = ids.split([workload.prompt_tokens, workload.new_tokens], 1)
        return prompts, rest.t().contiguous()

    def _episode(self, way: Way, workload: Workload) -> Episode | None:
        """One prefill and its decode steps. Collective over the world."""
        engine = self._engine(way)
        if engine is None:
            self._barrier()
            self._barrier()
            return None
        prompts, following = self._tokens(workload)
        meter = MemoryMeter(engine.device)
        run = engine.start(way, workload)

        engine.prepare(ForwardPhase.PREFILL)
        meter.start()
        own_cache = run.cache_bytes  # which is a part of the base
        self._barrier()
        with record_communication() as prefill_log:
            start = time.perf_counter()
            logits = _until_known(run.prefill(prompts))
            prefill_seconds = time.perf_counter() - start
        prefill_grown = _less(meter.grown_bytes, run.cache_bytes - own_cache)
        peaks = [meter.peak_resident_bytes], [meter.peak_device_bytes]

        engine.prepare(ForwardPhase.DECODE)
        own_cache = run.cache_bytes
        meter.start()
        self._barrier()
        step_seconds = []
        with record_communication() as decode_log:
            for ids in following:
                start = time.perf_counter()
                _until_known(run.decode(ids))
                step_seconds.append(time.perf_counter() - start)
        decode_grown = _less(meter.grown_bytes, run.cache_bytes - own_cache)
        peaks[0].append(meter.peak_resident_bytes)
        peaks[1].append(meter.peak_device_bytes)

        steps = max(1, workload.new_tokens)
        return Episode(
            copy=self._copy(way),
            prefill_seconds=prefill_seconds,
            step_seconds=step_seconds,
            parameter_bytes=_parameter_bytes(engine.model),
            cache_bytes=run.cache_bytes,
            grown_bytes={"prefill": prefill_grown, "decode": decode_grown},
            peak_resident_bytes=_largest(peaks[0]),
            peak_device_bytes=_largest(peaks[1]),
            communication={
                "prefill": prefill_log.by_kind,
                "decode": {kind: n // steps for kind, n in decode_log.by_kind.items()},
            },
            logits=logits.float().cpu() if self.rank == 0 else None,
        )

    def _parts(
        self, way: Way, workload: Workload, repeats: list[dict[int, Episode]]
    ) -> tuple[dict[str, dict[str, float]], dict[str, int]]:
        """Shares and operator calls by phase, those of this rank. Collective over the world."""
        engine = self._engine(way)
        shares: dict[str, dict[str, float]] = {}
        operators: dict[str, int] = {}
        if engine is None:
            self._barrier()
            return shares, operators
        prompts, following = self._tokens(workload)
        run: Run = engine.start(way, workload)
        self._barrier()
        for phase in PHASES:
            engine.prepare(phase)
            timer = PartTimer(engine.model, engine.device)
            synchronize(engine.device)
            with timer.measure():
                if phase is ForwardPhase.PREFILL:
                    run.prefill(prompts)
                else:
                    for ids in following:
                        run.decode(ids)
            if phase is ForwardPhase.PREFILL or workload.new_tokens:
                name, steps = phase.value, workload.new_tokens
                shares[name] = timer.shares(_median_seconds(repeats, phase, self.rank))
                operators[name] = timer.num_operators // (1 if name == "prefill" else steps)
        return shares, operators

    def _tell(self, way: Way, workload: Workload, what: str) -> None:
        if self.on_step is not None:
            self.on_step(f"{way.name}, {workload.prompt_tokens} tokens: {what}")


def _until_known(logits: torch.Tensor) -> torch.Tensor:
    """Waits until the next tokens are on the host, as a loop that may stop there has to."""
    logits.argmax(-1).tolist()
    return logits


def _median_seconds(repeats: list[dict[int, Episode]], phase: ForwardPhase, rank: int) -> float:
    """Of one rank, of all steps of a decode."""
    mine = [episodes[rank] for episodes in repeats]
    if phase is ForwardPhase.PREFILL:
        return float(torch.tensor([e.prefill_seconds for e in mine]).median())
    return float(torch.tensor([sum(e.step_seconds) for e in mine]).median())


def _parameter_bytes(model: torch.nn.Module) -> int:
    """Each once, also where two share their memory."""
    storages = [p.untyped_storage() for p in model.parameters()]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def _less(value: int | None, minus: int) -> int | None:
    return None if value is None else max(0, value - minus)


def _largest(values: list[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return max(known) if known else None
