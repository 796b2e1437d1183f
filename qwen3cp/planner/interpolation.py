"""Counts of the chunks between two that were run."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import replace

from qwen3cp.planner.counts import StepCounts

__all__ = ["between", "fill"]


def fill(starts: Seq[int], count: Callable[[int], StepCounts]) -> list[StepCounts]:
    """The counts of equal chunks, of which as few are run as can be.

    Args:
        starts: cached tokens before each of the chunks, ascending.
        count: runs one.
    """
    first = count(starts[0])
    if len(starts) == 1:
        return [first]
    last = count(starts[-1])
    if len(starts) == 2 or between(first, last, starts[1]) is not None:
        return _fill(starts, first, last, count)
    # the first chunk, which has nothing before it, is often the only one that is different
    return [first, *_fill(starts[1:], count(starts[1]), last, count)]


def _fill(
    starts: Seq[int], first: StepCounts, last: StepCounts, count: Callable[[int], StepCounts]
) -> list[StepCounts]:
    if len(starts) == 1:
        return [last]
    inner = [between(first, last, start) for start in starts[1:-1]]
    if None not in inner:
        return [first, *(step for step in inner if step is not None), last]
    middle = len(starts) // 2
    halfway = count(starts[middle])
    return [
        *_fill(starts[: middle + 1], first, halfway, count)[:-1],
        *_fill(starts[middle:], halfway, last, count),
    ]


def between(first: StepCounts, last: StepCounts, start: int) -> StepCounts | None:
    """The counts of a chunk after `start` tokens: those of attention grow with the tokens before
    it, all others are the same. None if the two make other calls."""
    share = (start - first.start) / (last.start - first.start)

    def mixed(a: int, b: int) -> int:
        return a if a == b else round(a + share * (b - a))

    alike = len(first.operators) == len(last.operators) and all(
        replace(a, flops=0, bytes_read=0, bytes_written=0)
        == replace(b, flops=0, bytes_read=0, bytes_written=0)
        for a, b in zip(first.operators, last.operators, strict=True)
    )
    if not alike or first.collectives != last.collectives:
        return None
    return replace(
        first,
        start=start,
        operators=tuple(
            replace(
                a,
                flops=mixed(a.flops, b.flops),
                bytes_read=mixed(a.bytes_read, b.bytes_read),
                bytes_written=mixed(a.bytes_written, b.bytes_written),
            )
            for a, b in zip(first.operators, last.operators, strict=True)
        ),
        peak_activation_bytes=mixed(first.peak_activation_bytes, last.peak_activation_bytes),
    )
