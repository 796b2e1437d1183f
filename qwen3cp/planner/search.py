"""Which topology is expected to be the fastest: every legal one is counted, timed and ranked."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from rich.console import Group
from rich.table import Table
from transformers import Qwen3MoeConfig

from qwen3cp.errors import InputError
from qwen3cp.parallel import AllReduceForm, CommConfig
from qwen3cp.planner.cost import Fit, Prediction, StepTime, fit, predict
from qwen3cp.planner.counts import DryRun
from qwen3cp.planner.dry_run import dry_run
from qwen3cp.planner.hardware import Efficiencies, Hardware
from qwen3cp.planner.topology import Topology, why_illegal

__all__ = [
    "CHUNKS",
    "Candidate",
    "Crossover",
    "Curve",
    "Ranked",
    "Refused",
    "SearchResult",
    "Layout",
    "candidates",
    "compare",
    "layouts",
    "search",
]

CHUNKS = (131072, 32768, 8192)
"""Tokens of a sequence in one forward that are tried, beside the whole prompt."""
GROUP_SIZE = 128
"""Values that share a scale in the int8 forms that are tried."""
LENGTHS = tuple(2**n for n in range(10, 21))
"""Prompt lengths, in tokens, between which crossovers are looked for."""
RESOLUTION = 1.02
"""A crossover is known to within this factor, and times within it are a tie."""

Progress = Callable[[Iterable[Any], str], Iterable[Any]]
"""Shows a bar while it passes on what it iterates over, under a title."""


@dataclass(frozen=True, order=True, kw_only=True)
class Layout:
    """Ranks and where the experts are."""

    cp_size: int
    tp_size: int
    moe: Literal["tp", "ep"]

    def __str__(self) -> str:
        return f"CP {self.cp_size} x TP {self.tp_size}, {self.moe}"


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """What can be chosen."""

    layout: Layout
    comm: CommConfig
    chunk: int
    """Tokens of a sequence in one forward; the whole prompt if it is not longer."""

    @property
    def comm_name(self) -> str:
        """What of the communication is not exact, and the form of the exchange."""
        forms = {"int8_one_shot": "int8 one-shot sums", "int8_two_step": "int8 two-step sums"}
        parts = [forms[self.comm.all_reduce]] if self.comm.all_reduce in forms else []
        parts += ["int8 KV"] if self.comm.kv_gather == "int8" else []
        if self.comm.exchange != "auto":
            rows = " of int8 rows" if self.comm.exchange_rows == "int8" else ""
            parts.append(self.comm.exchange.replace("_", "-") + rows)
        return ", ".join(parts) or "exact"

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self.layout), "comm": asdict(self.comm), "chunk": self.chunk}


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """A candidate that can run."""

    candidate: Candidate
    prediction: Prediction
    fit: Fit

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.candidate.to_dict(),
            "ttft_seconds": self.prediction.ttft_seconds,
            "tpot_seconds": self.prediction.tpot_seconds,
            "ttft_split": self.prediction.split("prefill"),
            "tpot_split": self.prediction.split("decode"),
            "links": self.prediction.links,
            "memory": self.fit.to_dict(),
        }


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A topology, or one of its candidates, that cannot run."""

    layout: Layout
    candidate: Candidate | None
    """None if no candidate of the topology can run."""
    why: Literal["illegal", "memory"]
    reason: str
    """With the limit."""

    def to_dict(self) -> dict[str, Any]:
        what = asdict(self.layout) if self.candidate is None else self.candidate.to_dict()
        return {**what, "why": self.why, "reason": self.reason}


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Time to first token of one topology over the length of the prompt."""

    layout: Layout
    prompts: tuple[int, ...]
    seconds: tuple[float | None, ...]
    """None where the topology does not fit."""


@dataclass(frozen=True, kw_only=True)
class Crossover:
    """From this prompt length on another topology is the best."""

    prompt: int
    before: Layout
    after: Layout
    why: Literal["faster", "memory"]
    """memory: the one before does not fit any longer."""


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What `search` found; all times are predicted."""

    model: str
    hardware: str
    devices: int
    prompt: int
    batch: int
    dtype: str
    efficiencies: dict[str, float]
    ranked: tuple[Ranked, ...]
    """The fastest to the first token first."""
    refused: tuple[Refused, ...]
    curves: tuple[Curve, ...]
    crossovers: tuple[Crossover, ...]

    @property
    def best_of_layouts(self) -> list[Ranked]:
        """The best candidate of each topology, the fastest first."""
        best: dict[Layout, Ranked] = {}
        for ranked in self.ranked:
            best.setdefault(ranked.candidate.layout, ranked)
        return list(best.values())

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "hardware": self.hardware,
            "devices": self.devices,
            "prompt": self.prompt,
            "batch": self.batch,
            "dtype": self.dtype,
            "predicted": True,
            "efficiencies": self.efficiencies,
            "ranked": [ranked.to_dict() for ranked in self.ranked],
            "refused": [refused.to_dict() for refused in self.refused],
            "curves": [asdict(curve) for curve in self.curves],
            "crossovers": [asdict(crossover) for crossover in self.crossovers],
        }

    def to_table(self, num_ranked: int = 12) -> Group:
        """The best candidates, what was refused, and the crossovers."""
        parts: list[Any] = [self._ranking(num_ranked)]
        if self.refused:
            parts.append(self._refusals())
        parts.append(self._crossovers())
        return Group(*parts)

    def _ranking(self, num_ranked: int) -> Table:
        shown = self.ranked[:num_ranked]
        table = Table(
            title=f"{self.model}, {self.prompt:,} tokens x {self.batch} on {self.devices} devices "
            f"({self.hardware}): predicted, {len(shown)} of {len(self.ranked)} candidates",
            title_justify="left",
        )
        for name in ("CP", "TP"):
            table.add_column(name, justify="right")
        table.add_column("experts")
        table.add_column("communication")
        for name in ("chunk", "TTFT, s", "a token, ms", "GiB a rank"):
            table.add_column(name, justify="right")
        for ranked in shown:
            layout, tpot = ranked.candidate.layout, ranked.prediction.tpot_seconds
            table.add_row(
                str(layout.cp_size),
                str(layout.tp_size),
                layout.moe,
                ranked.candidate.comm_name,
                f"{ranked.candidate.chunk:,}",
                f"{ranked.prediction.ttft_seconds:.3f}",
                "" if tpot is None else f"{tpot * 1e3:.1f}",
                f"{ranked.fit.needed_bytes / 2**30:.1f}",
            )
        return table

    def _refusals(self) -> Table:
        table = Table(title="cannot run", title_justify="left", show_lines=True)
        for name in ("topology", "why"):
            table.add_column(name, overflow="fold")
        num_partly: dict[Layout, int] = {}
        for refused in self.refused:
            if refused.candidate is None:
                table.add_row(str(refused.layout), refused.reason)
            else:
                num_partly[refused.layout] = num_partly.get(refused.layout, 0) + 1
        for layout, number in num_partly.items():
            first = next(r for r in self.refused if r.candidate and r.layout == layout)
            assert first.candidate is not None
            table.add_row(
                str(layout),
                f"{number} of its candidates; such as chunks of {first.candidate.chunk:,}, "
                f"{first.candidate.comm_name}: {first.reason}",
            )
        return table

    def _crossovers(self) -> Table:
        table = Table(
            title="the best topology by prompt length", title_justify="left", min_width=44
        )
        table.add_column("from tokens", justify="right")
        table.add_column("best")
        if self.crossovers:
            table.add_row("1", str(self.crossovers[0].before))
        for crossover in self.crossovers:
            why = "" if crossover.why == "faster" else " (the one before does not fit)"
            table.add_row(f"{crossover.prompt:,}", f"{crossover.after}{why}")
        if not self.crossovers and self.ranked:
            lengths = f"{LENGTHS[0]:,} to {max(c.prompts[-1] for c in self.curves):,}"
            table.add_row(lengths, str(self.ranked[0].candidate.layout))
        return table


def layouts(devices: int) -> Iterator[Layout]:
    """Every CP x TP with that many ranks, with both places for the experts."""
    for cp_size in range(1, devices + 1):
        if devices % cp_size == 0:
            yield Layout(cp_size=cp_size, tp_size=devices // cp_size, moe="tp")
            if devices > 1:
                yield Layout(cp_size=cp_size, tp_size=devices // cp_size, moe="ep")


def comm_settings(layout: Layout, config: Qwen3MoeConfig, base: CommConfig) -> Iterator[CommConfig]:
    """Every setting of the communication that makes a difference; exact first."""
    cp, tp = layout.cp_size, layout.tp_size
    group_size = base.group_size
    if group_size is None and config.hidden_size % GROUP_SIZE == 0:
        group_size = GROUP_SIZE
    # of the two int8 forms the one with fewer bytes, or with fewer passes for as many
    form: AllReduceForm = "int8_one_shot" if tp == 2 else "int8_two_step"
    sums: tuple[AllReduceForm, ...] = ("exact", form) if tp > 1 else ("exact",)
    gathers: tuple[Any, ...] = ("exact", "int8") if cp > 1 else ("exact",)
    exchanges: list[tuple[Any, Any]] = [("auto", "exact")]
    if layout.moe == "ep":
        # with one CP rank no row travels in the all-gather form
        exchanges = [("all_gather", "exact")]
        exchanges += [("all_gather", "int8")] if cp > 1 else []
        exchanges += [("all_to_all", "exact"), ("all_to_all", "int8")]
    for exchange, rows in exchanges:
        for kv_gather in gathers:
            for all_reduce in sums:
                yield replace(
                    base,
                    all_reduce=all_reduce,
                    group_size=base.group_size if all_reduce == "exact" else group_size,
                    kv_gather=kv_gather,
                    exchange=exchange,
                    exchange_rows=rows,
                )


def candidates(
    layout: Layout,
    config: Qwen3MoeConfig,
    prompt: int,
    chunks: Seq[int] | None = None,
    base: CommConfig | None = None,
) -> Iterator[Candidate]:
    """Every setting and chunk of a topology, larger chunks first."""
    chunks = CHUNKS if chunks is None else chunks
    sizes = sorted({prompt, *(chunk for chunk in chunks if chunk < prompt)}, reverse=True)
    for chunk in sizes:
        for comm in comm_settings(layout, config, base or CommConfig()):
            yield Candidate(layout=layout, comm=comm, chunk=chunk)


@dataclass(frozen=True, kw_only=True)
class _Workload:
    """What all candidates have in common."""

    config: Qwen3MoeConfig
    hardware: Hardware
    efficiencies: Efficiencies
    model: str
    batch: int
    new_tokens: int
    dtype: torch.dtype
    count: Callable[..., DryRun]
    models: dict[Any, Any] = field(default_factory=dict)
    """Empty ones, which dry runs share."""

    def run(self, candidate: Candidate, prompt: int, *, decode: bool) -> DryRun:
        return self.count(
            self.config,
            model=self.model,
            cp_size=candidate.layout.cp_size,
            tp_size=candidate.layout.tp_size,
            moe=candidate.layout.moe,
            comm=candidate.comm,
            dtype=self.dtype,
            prompt=prompt,
            batch=self.batch,
            new_tokens=self.new_tokens,
            chunk=candidate.chunk,
            decode=decode,
            ranks="busiest",
            layers="distinct",
            chunks="ends",
            models=self.models,
        )

    def rank(self, candidate: Candidate, prompt: int, *, decode: bool) -> Ranked:
        run = self.run(candidate, prompt, decode=decode)
        return Ranked(
            candidate=candidate,
            prediction=predict(run, self.hardware, self.efficiencies),
            fit=fit(run, self.hardware),
        )


def search(
    config: Qwen3MoeConfig,
    hardware: Hardware,
    efficiencies: Efficiencies | None = None,
    *,
    devices: int,
    prompt: int,
    batch: int = 1,
    new_tokens: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    model: str = "",
    chunks: Seq[int] | None = None,
    comm: CommConfig | None = None,
    lengths: Seq[int] | None = None,
    progress: Progress | None = None,
    count: Callable[..., DryRun] | None = None,
) -> SearchResult:
    """Ranks every legal candidate of one replica over all devices, by time to first token.

    Args:
        new_tokens: tokens after the prompt that the cache has room for.
        chunks: tokens of a forward to try beside the whole prompt; None is `CHUNKS`.
        comm: what is not searched: skip_layers, min_bytes, group_size, check_plan.
        lengths: of prompts, between which crossovers are looked for; None is `LENGTHS`.
        progress: shows how far it is.
        count: None is `dry_run`.

    Raises:
        InputError: a number that is not positive.
    """
    numbers = {"devices": devices, "prompt": prompt, "batch": batch, "new_tokens": new_tokens}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name} must be a positive integer, got {value!r}")
    if chunks is not None and not all(isinstance(c, int) and c > 0 for c in chunks):
        raise InputError(f"chunks must be positive numbers of tokens, got {list(chunks)}")
    efficiencies = efficiencies or Efficiencies()
    work = _Workload(
        config=config,
        hardware=hardware,
        efficiencies=efficiencies,
        model=model,
        batch=batch,
        new_tokens=new_tokens,
        dtype=dtype,
        count=count or dry_run,
    )
    show: Progress = progress or (lambda items, _: items)

    refused: list[Refused] = []
    jobs: list[Candidate] = []
    for layout in layouts(devices):
        reason = _why_illegal(config, layout, comm)
        if reason is not None:
            refused.append(Refused(layout=layout, candidate=None, why="illegal", reason=reason))
        else:
            jobs += candidates(layout, config, prompt, chunks, comm)
    ranked, too_large = _rank_all(work, show(jobs, "candidates"), prompt)
    refused += _without_room(too_large, ranked)

    ranked.sort(key=lambda r: (r.prediction.ttft_seconds, r.fit.needed_bytes))
    best: dict[Layout, Candidate] = {}
    for each in ranked:
        best.setdefault(each.candidate.layout, each.candidate)
    found = _Curves(work, list(best.values()), chunks)
    curves, crossovers = found.over({*(LENGTHS if lengths is None else lengths), prompt}, show)
    return SearchResult(
        model=model,
        hardware=hardware.name,
        devices=devices,
        prompt=prompt,
        batch=batch,
        dtype=str(dtype).removeprefix("torch."),
        efficiencies=efficiencies.to_dict(),
        ranked=tuple(ranked),
        refused=tuple(refused),
        curves=curves,
        crossovers=crossovers,
    )


def compare(
    config: Qwen3MoeConfig,
    hardware: Hardware,
    efficiencies: Efficiencies | None = None,
    *,
    run: DryRun,
    lengths: Seq[int] | None = None,
    progress: Progress | None = None,
    count: Callable[..., DryRun] | None = None,
) -> tuple[tuple[Curve, ...], tuple[Crossover, ...]]:
    """Times over the prompt length of every legal CP x TP with the run's number of ranks, its
    experts and its communication, and where another one becomes the best."""
    work = _Workload(
        config=config,
        hardware=hardware,
        efficiencies=efficiencies or Efficiencies(),
        model=run.model,
        batch=run.batch,
        new_tokens=run.new_tokens,
        dtype=getattr(torch, run.dtype),
        count=count or dry_run,
    )
    comm = CommConfig(**run.comm)
    legal = [
        Candidate(layout=layout, comm=comm, chunk=run.chunk)
        for layout in layouts(run.world_size)
        if layout.moe == run.moe and _why_illegal(config, layout, comm) is None
    ]
    grid = {*(LENGTHS if lengths is None else lengths), run.prompt}
    return _Curves(work, legal, None).over(grid, progress or (lambda items, _: items))


def _why_illegal(config: Qwen3MoeConfig, layout: Layout, comm: CommConfig | None) -> str | None:
    topology = Topology(
        cp_size=layout.cp_size,
        tp_size=layout.tp_size,
        moe=layout.moe,
        comm=comm or CommConfig(),
    )
    return why_illegal(config, topology)


def _rank_all(
    work: _Workload, jobs: Iterable[Candidate], prompt: int
) -> tuple[list[Ranked], list[Ranked]]:
    """Those that fit, and those that do not; of a topology whose parameters and cache alone are
    too large, the first."""
    ranked: list[Ranked] = []
    too_large: list[Ranked] = []
    hopeless: set[Layout] = set()
    tokens: dict[Layout, tuple[StepTime, ...]] = {}
    for candidate in jobs:
        layout = candidate.layout
        if layout in hopeless:
            continue
        # a decode is exact, and has no chunks: it is the same for all candidates of a layout
        found = work.rank(candidate, prompt, decode=layout not in tokens)
        steps = found.prediction.steps
        if layout not in tokens:
            tokens[layout] = tuple(step for step in steps if step.phase == "decode")
        else:
            both = replace(found.prediction, steps=steps + tokens[layout])
            found = replace(found, prediction=both)
        (ranked if found.fit.fits else too_large).append(found)
        if found.fit.needed_bytes - found.fit.peak_activation_bytes > found.fit.usable_bytes:
            hopeless.add(layout)
    return ranked, too_large


def _without_room(too_large: Seq[Ranked], ranked: Seq[Ranked]) -> Iterator[Refused]:
    """For a topology of which no candidate fits, the one that needs the least stands for all."""
    possible = {r.candidate.layout for r in ranked}
    least: dict[Layout, Ranked] = {}
    for found in too_large:
        layout = found.candidate.layout
        if layout in possible:
            yield Refused(
                layout=layout,
                candidate=found.candidate,
                why="memory",
                reason=found.fit.reason,
            )
        elif layout not in least or found.fit.needed_bytes < least[layout].fit.needed_bytes:
            least[layout] = found
    for layout, found in least.items():
        chunk = f"with chunks of {found.candidate.chunk:,} tokens "
        yield Refused(layout=layout, candidate=None, why="memory", reason=chunk + found.fit.reason)


class _Curves:
    """Times of one candidate of each layout at any prompt length."""

    def __init__(self, work: _Workload, chosen: Seq[Candidate], chunks: Seq[int] | None) -> None:
        self._work, self._chosen = work, chosen
        self._chunks = sorted(CHUNKS if chunks is None else chunks, reverse=True)
        self._times: dict[Layout, dict[int, float | None]] = {}
        self._too_large: dict[Layout, list[tuple[int, int]]] = {}

    def over(
        self, lengths: Iterable[int], show: Progress
    ) -> tuple[tuple[Curve, ...], tuple[Crossover, ...]]:
        """The times at these lengths, with the largest chunks that fit, and the crossovers
        between them."""
        grid = sorted(lengths)
        for length in show(grid, "prompt lengths"):
            for candidate in self._chosen:
                self._time(candidate, length)
        crossovers = self._crossovers(grid)
        curves = [
            Curve(
                layout=candidate.layout,
                prompts=tuple(grid),
                seconds=tuple(self._time(candidate, length) for length in grid),
            )
            for candidate in self._chosen
        ]
        return tuple(curves), tuple(crossovers)

    def _time(self, candidate: Candidate, prompt: int) -> float | None:
        if prompt not in self._times.setdefault(candidate.layout, {}):
            self._times[candidate.layout][prompt] = self._counted(candidate, prompt)
        return self._times[candidate.layout][prompt]

    def _counted(self, candidate: Candidate, prompt: int) -> float | None:
        too_large = self._too_large.setdefault(candidate.layout, [])
        for chunk in [prompt, *(chunk for chunk in self._chunks if chunk < prompt)]:
            if any(chunk >= c and prompt >= p for c, p in too_large):
                continue
            found = self._work.rank(replace(candidate, chunk=chunk), prompt, decode=False)
            if found.fit.fits:
                return found.prediction.ttft_seconds
            too_large.append((chunk, prompt))
        return None

    def _crossovers(self, grid: Seq[int]) -> list[Crossover]:
        """Where another layout becomes the best; one that is ahead by a tie alone does not."""
        found: list[Crossover] = []
        current: Candidate | None = None
        for i, length in enumerate(grid):
            times = [(self._time(c, length) or math.inf, c) for c in self._chosen]
            quickest, best = min(times, key=lambda x: x[0], default=(math.inf, None))
            if best is None or quickest == math.inf:
                continue
            if current is None:
                current = best
                continue
            own = self._time(current, length)
            if own is not None and own <= RESOLUTION * quickest:
                continue
            # back to where the two were even
            last = max(j for j in range(i) if self._ahead(current, best, grid[j]))
            prompt = self._even(current, best, grid[last], grid[last + 1])
            found.append(
                Crossover(
                    prompt=prompt,
                    before=current.layout,
                    after=best.layout,
                    why="memory" if self._time(current, prompt) is None else "faster",
                )
            )
            current = best
        return found

    def _ahead(self, one: Candidate, other: Candidate, prompt: int) -> bool:
        """Whether `one` is not behind at this length; it is where it does not fit."""
        first, second = self._time(one, prompt), self._time(other, prompt)
        return first is not None and (second is None or first <= second)

    def _even(self, one: Candidate, other: Candidate, low: int, high: int) -> int:
        """From where on `one`, which is ahead at `low`, is behind; halves the logarithm."""
        while high > max(low + 1, low * RESOLUTION):
            middle = min(max(round(math.sqrt(low * high)), low + 1), high - 1)
            if self._ahead(one, other, middle):
                low = middle
            else:
                high = middle
        return high
