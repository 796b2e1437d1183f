"""What a run of the benchmark found: statistics, ratios, JSON, tables and a plot.

Letters: B sequences, V vocabulary.
"""

from __future__ import annotations

import io
import json
import os
import platform
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

from qwen3cp.benchmark.meters import PARTS
from qwen3cp.benchmark.ways import Settings, Way, Workload
from qwen3cp.parallel import default_device
from qwen3cp.plots import new_figure, save_figure
from qwen3cp.version import __version__

__all__ = ["Episode", "Measured", "Ratio", "Report", "Result", "Spread"]

MEASURES = ("prefill", "decode")


@dataclass(frozen=True, kw_only=True)
class Episode:
    """One prefill and the decode steps after it, on one rank."""

    copy: int
    """The replica that the rank is in."""
    prefill_seconds: float
    step_seconds: list[float]
    parameter_bytes: int
    cache_bytes: int
    grown_bytes: dict[str, int | None]
    """By phase: the most memory beyond parameters and cache."""
    peak_resident_bytes: int | None
    peak_device_bytes: int | None
    communication: dict[str, dict[str, int]]
    """By phase: the bytes of each kind of collective; those of a decode are of one step."""
    logits: torch.Tensor | None
    """float32 [B, V] of the prefill, on rank 0."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """All that was seen of one way on one workload."""

    way: Way
    workload: Workload
    repeats: list[dict[int, Episode]]
    """For each repeat the episode of each rank that took part."""
    shares: dict[str, dict[str, float]] | None
    """By phase: the share of each part in the time of rank 0."""
    operators: dict[str, int] | None
    """By phase: operator calls of rank 0, in one step of a decode."""
    experts: dict[str, Any] | None
    """transformers: the implementation of the experts that was chosen, and the times of all."""


@dataclass(frozen=True)
class Spread:
    """A number that was measured several times."""

    median: float
    low: float
    high: float
    samples: list[float]

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        return cls(statistics.median(samples), min(samples), max(samples), list(samples))


@dataclass(frozen=True, kw_only=True)
class RankResult:
    """One rank; of several repeats the most memory."""

    rank: int
    parameter_bytes: int
    cache_bytes: int
    prefill_grown_bytes: int | None
    """The most memory beyond parameters and cache, of the device or else resident; None where the
    system does not tell."""
    decode_grown_bytes: int | None
    peak_resident_bytes: int | None
    """Of the whole process, with every model that the run compares."""
    peak_device_bytes: int | None
    prefill_communication: dict[str, int]
    """Bytes received, by kind of collective."""
    decode_communication: dict[str, int]
    """Of one step."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One way on one workload."""

    way: str
    settings: dict[str, Any]
    """The fields of the `Way`."""
    batch_size: int
    prompt_tokens: int
    new_tokens: int
    seconds_to_first_token: Spread
    """Of the slowest rank; of several copies the harmonic mean."""
    prefill_tokens_per_second: Spread
    """Of all copies together."""
    seconds_per_token: Spread | None
    """Of a decode step of the whole batch: of each repeat the median of its steps."""
    decode_tokens_per_second: Spread | None
    ranks: list[RankResult]
    shares: dict[str, dict[str, float]] | None
    """prefill and decode: the share of each part in the time."""
    operators: dict[str, int] | None
    """Operator calls of a prefill and of a decode step."""
    experts: dict[str, Any] | None
    """transformers: which implementation of the experts was chosen, and the seconds of all."""
    logits_difference: float | None
    """Relative L2 difference of the first logits from those of `logits_against`."""
    logits_against: str | None


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Tokens a second of one way, divided by those of another in the same repeat."""

    measure: str
    """prefill or decode."""
    way: str
    against: str
    batch_size: int
    prompt_tokens: int
    ratio: Spread


@dataclass(frozen=True, kw_only=True)
class Report:
    """All results of a run."""

    machine: dict[str, Any]
    model: str
    repeats: int
    seed: int
    results: list[Result]
    ratios: list[Ratio]

    @classmethod
    def of(cls, settings: Settings, measured: Sequence[Measured]) -> Report:
        """From what was measured; on rank 0."""
        results, ratios = [], []
        for workload in settings.workloads:
            of_workload = {m.way: m for m in measured if m.workload == workload}
            by_way = {
                way: _result(m, _logits_baseline(way, of_workload))
                for way, m in of_workload.items()
            }
            results += by_way.values()
            for way, other in pairs(list(by_way)):
                ratios += _ratios(by_way[way], by_way[other])
        return cls(
            machine=describe_machine(settings.threads),
            model=settings.model,
            repeats=settings.repeats,
            seed=settings.seed,
            results=results,
            ratios=ratios,
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)

    def to_table(self) -> str:
        """As text: what was measured, its parts, and the ratios."""
        console = Console(file=io.StringIO(), width=150, highlight=False)
        with console.capture() as text:
            console.print(_machine_line(self.machine))
            console.print(self._results_table())
            if any(result.shares for result in self.results):
                console.print(self._shares_table())
            if any(rank.prefill_communication for r in self.results for rank in r.ranks):
                console.print(self._communication_table())
            if self.ratios:
                console.print(self._ratios_table())
            for result in self.results:
                if result.experts is not None:
                    chosen = result.experts["chosen"]
                    console.print(
                        f"{result.way}, {result.prompt_tokens} tokens: experts by "
                        f"{chosen['prefill']} in the prefill, {chosen['decode']} in the decode"
                    )
        return text.get().rstrip()

    def _results_table(self) -> Table:
        table = Table("way", title="medians")
        for name in (
            "batch",
            "prompt",
            "first token, s",
            "prompt tokens/s",
            "ms/token",
            "tokens/s",
            "parameters + cache, MiB",
            "beyond, MiB",
        ):
            table.add_column(name, justify="right")
        for result in self.results:
            steps, rate = result.seconds_per_token, result.decode_tokens_per_second
            rank = max(result.ranks, key=lambda r: r.prefill_grown_bytes or 0)
            table.add_row(
                result.way,
                str(result.batch_size),
                str(result.prompt_tokens),
                f"{result.seconds_to_first_token.median:.3f}",
                f"{result.prefill_tokens_per_second.median:.0f}",
                f"{steps.median * 1e3:.2f}" if steps else "",
                f"{rate.median:.1f}" if rate else "",
                f"{_mebibytes(rank.parameter_bytes)} + {_mebibytes(rank.cache_bytes)}",
                _mebibytes(rank.prefill_grown_bytes),
            )
        return table

    def _shares_table(self) -> Table:
        table = Table("way", "prompt", "", title="share of the time, on rank 0")
        for name in (*PARTS, "operators"):
            table.add_column(name, justify="right")
        for result in self.results:
            for measure, shares in (result.shares or {}).items():
                table.add_row(
                    result.way,
                    str(result.prompt_tokens),
                    measure,
                    *(f"{shares[part]:.1%}" for part in PARTS),
                    str((result.operators or {})[measure]),
                )
        return table

    def _communication_table(self) -> Table:
        table = Table("way", "batch", "prompt", "kind", title="received, by the rank with the most")
        table.add_column("prefill, MiB", justify="right")
        table.add_column("a decode step, KiB", justify="right")
        for result in self.results:
            kinds = ({**r.prefill_communication, **r.decode_communication} for r in result.ranks)
            for kind in dict.fromkeys(kind for of_rank in kinds for kind in of_rank):
                prefill = max(r.prefill_communication.get(kind, 0) for r in result.ranks)
                decode = max(r.decode_communication.get(kind, 0) for r in result.ranks)
                table.add_row(
                    result.way,
                    str(result.batch_size),
                    str(result.prompt_tokens),
                    kind,
                    f"{prefill / 2**20:.3f}",
                    f"{decode / 2**10:.2f}",
                )
        return table

    def _ratios_table(self) -> Table:
        table = Table(
            "",
            "way",
            "against",
            title="tokens/s against each other, median (lowest to highest) of the repeats",
        )
        for name in ("batch", "prompt", "ratio"):
            table.add_column(name, justify="right")
        for ratio in self.ratios:
            table.add_row(
                ratio.measure,
                ratio.way,
                ratio.against,
                str(ratio.batch_size),
                str(ratio.prompt_tokens),
                _spread(ratio.ratio, 2),
            )
        return table

    def plot(self, path: str | Path) -> None:
        """Draws tokens/s over the length of the prompt: svg, png or pdf, by the file's name.

        Raises:
            InputError: matplotlib is not installed, or cannot write such a file.
        """
        figure = new_figure(10, 4)
        prefill_axes, decode_axes = figure.subplots(1, 2)
        for (way, batch_size), results in self._lines():
            label = way if batch_size == 1 else f"{way}, batch of {batch_size}"
            prefill = [result.prefill_tokens_per_second for result in results]
            lengths = [result.prompt_tokens for result in results]
            _draw(prefill_axes, lengths, prefill, label)
            decode = [r.decode_tokens_per_second for r in results if r.decode_tokens_per_second]
            if decode:
                _draw(decode_axes, lengths, decode, label)
        prefill_axes.set(xlabel="prompt tokens", ylabel="prefill, tokens/s", ylim=(0, None))
        decode_axes.set(xlabel="prompt tokens", ylabel="decode, tokens/s", ylim=(0, None))
        prefill_axes.legend(frameon=False, fontsize="small")
        figure.suptitle(_machine_line(self.machine), fontsize="small")
        save_figure(figure, path)

    def _lines(self) -> Iterator[tuple[tuple[str, int], list[Result]]]:
        names = dict.fromkeys((r.way, r.batch_size) for r in self.results)
        for name in names:
            of_name = [r for r in self.results if (r.way, r.batch_size) == name]
            yield name, sorted(of_name, key=lambda r: r.prompt_tokens)


def pairs(ways: Sequence[Way]) -> list[tuple[Way, Way]]:
    """Which ways of one run are divided by which.

    Each by transformers and by the first way; each of several ranks by as many copies of one rank;
    each in chunks by the same in one piece; each with float32 scores by the same without. All of
    one dtype, but for the first ways of the dtypes.
    """
    ours = [way for way in ways if way.engine == "qwen3cp"]
    found: dict[tuple[Way, Way], None] = {}
    for way in ours:
        of_dtype = [other for other in ours if other.dtype == way.dtype]
        candidates = [other for other in ways if other.engine == "transformers"]
        candidates += [ours[0], of_dtype[0]]
        candidates += [
            other
            for other in of_dtype
            if _differ_in(way, other) <= {"cp", "tp", "moe", "comm", "copies"}
            and other.num_ranks == 1
            and other.copies == way.num_ranks > 1
        ]
        candidates += [
            other
            for other in of_dtype
            if (_differ_in(way, other) == {"chunk_tokens"} and not other.chunk_tokens)
            or (_differ_in(way, other) == {"float32_scores"} and way.float32_scores)
        ]
        for other in candidates:
            same_dtype = other.dtype == way.dtype
            if other != way and (same_dtype or (way, other) == (of_dtype[0], ours[0])):
                found[way, other] = None
    return list(found)


def _differ_in(way: Way, other: Way) -> set[str]:
    return {name for name, value in vars(way).items() if value != vars(other)[name]}


def _result(measured: Measured, baseline: Measured | None) -> Result:
    way, workload = measured.way, measured.workload
    prefill = [_seconds(e, lambda rank: [rank.prefill_seconds]) for e in measured.repeats]
    tokens = workload.batch_size * workload.prompt_tokens * way.copies
    steps = None
    if workload.new_tokens:
        steps = [_seconds(e, lambda rank: rank.step_seconds) for e in measured.repeats]
    rows = workload.batch_size * way.copies
    against = baseline.way.name if baseline is not None else None
    difference = None
    if baseline is not None:
        mine, other = (m.repeats[0][0].logits for m in (measured, baseline))
        assert mine is not None and other is not None, "rank 0 takes part in every way"
        difference = float((mine - other).norm() / other.norm())
    return Result(
        way=way.name,
        settings=way.to_dict(),
        batch_size=workload.batch_size,
        prompt_tokens=workload.prompt_tokens,
        new_tokens=workload.new_tokens,
        seconds_to_first_token=Spread.of(prefill),
        prefill_tokens_per_second=Spread.of([tokens / s for s in prefill]),
        seconds_per_token=Spread.of(steps) if steps else None,
        decode_tokens_per_second=Spread.of([rows / s for s in steps]) if steps else None,
        ranks=[_rank_result(rank, measured.repeats) for rank in sorted(measured.repeats[0])],
        shares=measured.shares,
        operators=measured.operators,
        experts=measured.experts,
        logits_difference=difference,
        logits_against=against,
    )


def _seconds(episodes: dict[int, Episode], times_of: Any) -> float:
    """Of one repeat: the median over the steps, of the slowest rank of a copy in each, of the
    copies' harmonic mean, by which their tokens/s add up."""
    copies: dict[int, list[list[float]]] = {}
    for episode in episodes.values():
        copies.setdefault(episode.copy, []).append(times_of(episode))
    slowest = [
        statistics.median(max(step) for step in zip(*ranks, strict=True))
        for ranks in copies.values()
    ]
    return statistics.harmonic_mean(slowest)


def _rank_result(rank: int, repeats: list[dict[int, Episode]]) -> RankResult:
    mine = [episodes[rank] for episodes in repeats]

    def most(values: list[int | None]) -> int | None:
        known = [value for value in values if value is not None]
        return max(known) if known else None

    return RankResult(
        rank=rank,
        parameter_bytes=mine[0].parameter_bytes,
        cache_bytes=mine[0].cache_bytes,
        prefill_grown_bytes=most([e.grown_bytes["prefill"] for e in mine]),
        decode_grown_bytes=most([e.grown_bytes["decode"] for e in mine]),
        peak_resident_bytes=most([e.peak_resident_bytes for e in mine]),
        peak_device_bytes=most([e.peak_device_bytes for e in mine]),
        prefill_communication=mine[0].communication["prefill"],
        decode_communication=mine[0].communication["decode"],
    )


def _logits_baseline(way: Way, of_workload: dict[Way, Measured]) -> Measured | None:
    """transformers of the same dtype, else the first way."""
    for other in of_workload:
        if other.engine == "transformers" and other.dtype == way.dtype and other != way:
            return of_workload[other]
    first = next(iter(of_workload))
    return of_workload[first] if way.engine != "transformers" and way != first else None


def _ratios(result: Result, other: Result) -> list[Ratio]:
    found = []
    for measure in MEASURES:
        mine, theirs = (getattr(r, f"{measure}_tokens_per_second") for r in (result, other))
        if mine is not None:
            found.append(
                Ratio(
                    measure=measure,
                    way=result.way,
                    against=other.way,
                    batch_size=result.batch_size,
                    prompt_tokens=result.prompt_tokens,
                    ratio=Spread.of(
                        [a / b for a, b in zip(mine.samples, theirs.samples, strict=True)]
                    ),
                )
            )
    return found


def describe_machine(threads: int) -> dict[str, Any]:
    """Of this process: device, cores, and the versions that matter."""
    device = default_device()
    name = _cpu_name()
    if device.type != "cpu":
        name = str(torch.get_device_module(device).get_device_name())
    return {
        "device": device.type,
        "name": name,
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "qwen3cp": __version__,
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _machine_line(machine: dict[str, Any]) -> str:
    return (
        f"{machine['name']}, {machine['cores']} cores, {machine['threads']} thread(s) a rank, "
        f"torch {machine['torch']}, transformers {machine['transformers']}"
    )


def _draw(axes: Any, lengths: list[int], values: list[Spread], label: str) -> None:
    medians = [value.median for value in values]
    low = [value.median - value.low for value in values]
    high = [value.high - value.median for value in values]
    axes.errorbar(lengths, medians, yerr=(low, high), marker="o", capsize=3, label=label)


def _spread(value: Spread, digits: int) -> str:
    median, low, high = (f"{x:.{digits}f}" for x in (value.median, value.low, value.high))
    return f"{median} ({low} to {high})"


def _mebibytes(num_bytes: int | None) -> str:
    return "" if num_bytes is None else f"{num_bytes / 2**20:.1f}"
