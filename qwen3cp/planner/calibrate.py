"""Measured points: how far predictions are from them, and efficiencies that fit them.

A file of points is JSON, {"points": [{...}, ...]}, or CSV with the same names as columns:

    model           a name of `KNOWN_MODELS`, a folder or a config.json
    hardware        a2, a3, a3-supernode, or a JSON file of hardware
    cp, tp          ranks (1); moe: tp or ep (tp)
    prompt          tokens of each sequence; batch: sequences (1); chunk: tokens a forward (all)
    dtype           bfloat16 (the default)
    all_reduce, group_size, kv_gather, exchange, exchange_rows, min_bytes
                    as of `CommConfig`
    ttft_seconds, tpot_seconds
                    what was measured: time to first token, time of a token after the prompt
    name, source, mark, note, assumed
                    free text; what is assumed makes a point one that is not fitted
    weights         "w8a8" for a point that this package cannot run: it is extrapolated to, and
                    not fitted

A point needs model, hardware, prompt and one of the two times.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.table import Table

from qwen3cp.errors import InputError, Qwen3CPError
from qwen3cp.options import moe_form
from qwen3cp.parallel import CommConfig
from qwen3cp.planner.cost import predict
from qwen3cp.planner.counts import DryRun
from qwen3cp.planner.dry_run import dry_run
from qwen3cp.planner.hardware import Efficiencies, load_hardware, read_json
from qwen3cp.planner.models import read_model

__all__ = [
    "DEFAULT_FIT",
    "Calibration",
    "Point",
    "PointError",
    "calibrate",
    "evaluate",
    "published_points",
    "read_points",
    "run_point",
]

DEFAULT_FIT = ("attention", "matmul", "link_node")
COMM_FIELDS = ("all_reduce", "group_size", "min_bytes", "kv_gather", "exchange", "exchange_rows")
Observe = Literal["ttft", "tpot", "both"]


@dataclass(frozen=True, kw_only=True)
class Point:
    """One measurement. Fields as in the module's docstring.

    Raises:
        InputError: a value that cannot be.
    """

    model: str
    hardware: str
    prompt: int
    cp: int = 1
    tp: int = 1
    moe: str = "tp"
    batch: int = 1
    chunk: int | None = None
    dtype: str = "bfloat16"
    all_reduce: str = "exact"
    group_size: int | None = None
    min_bytes: int | None = None
    kv_gather: str = "exact"
    exchange: str = "auto"
    exchange_rows: str = "exact"
    ttft_seconds: float | None = None
    tpot_seconds: float | None = None
    weights: str | None = None
    name: str = ""
    source: str = ""
    mark: str = ""
    note: str = ""
    assumed: str = ""

    def __post_init__(self) -> None:
        for name in ("prompt", "cp", "tp", "batch"):
            if not _is_count(getattr(self, name)):
                raise InputError(f"{name} must be a positive integer, got {getattr(self, name)!r}")
        if self.chunk is not None and not _is_count(self.chunk):
            raise InputError(f"chunk must be a positive integer, got {self.chunk!r}")
        if self.weights not in (None, "w8a8"):
            raise InputError(f"weights must be 'w8a8' or left out, got {self.weights!r}")
        times = [t for t in (self.ttft_seconds, self.tpot_seconds) if t is not None]
        for seconds in times:
            number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
            if not number or not 0 < seconds < math.inf:
                raise InputError(f"a time must be a positive number of seconds, got {seconds!r}")
        if not times:
            raise InputError("a point needs ttft_seconds or tpot_seconds")
        load_hardware(self.hardware)
        _ = self.comm

    @property
    def comm(self) -> CommConfig:
        return CommConfig(**{name: getattr(self, name) for name in COMM_FIELDS})

    @property
    def is_fitted(self) -> bool:
        """Not extrapolated to, and nothing about it assumed."""
        return self.weights is None and not self.assumed

    @property
    def title(self) -> str:
        return self.name or (
            f"{self.model.split('/')[-1]}, {self.hardware}, CP {self.cp} x TP {self.tp}, "
            f"{self.prompt:,} tokens"
        )


@dataclass(frozen=True, kw_only=True)
class PointError:
    """A prediction beside what was measured."""

    point: Point
    quantity: Literal["ttft", "tpot"]
    measured: float
    """Seconds."""
    predicted: float

    @property
    def error(self) -> float:
        """Of the prediction, as a share of what was measured: 0.1 is 10 % too slow."""
        return self.predicted / self.measured - 1


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Efficiencies that were fitted to measured points, all of them together."""

    efficiencies: Efficiencies
    names: tuple[str, ...]
    before: tuple[PointError, ...]
    after: tuple[PointError, ...]
    held_out: tuple[PointError | None, ...]
    """The same with efficiencies that were fitted to the other points alone; None where too few
    of them are left."""
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "efficiencies": self.efficiencies.to_dict(),
            "fitted": list(self.names),
            "points": [
                {
                    "name": after.point.title,
                    "quantity": after.quantity,
                    "measured_seconds": after.measured,
                    "error_before": before.error,
                    "error_after": after.error,
                    "error_held_out": None if held_out is None else held_out.error,
                }
                for before, after, held_out in zip(
                    self.before, self.after, self.held_out, strict=True
                )
            ],
            "warnings": list(self.warnings),
        }

    def to_table(self) -> Table:
        fitted = ", ".join(f"{n} = {getattr(self.efficiencies, n):.4g}" for n in self.names)
        table = Table(title=f"fitted: {fitted}", title_justify="left")
        table.add_column("point")
        for name in ("measured, s", "before", "after", "held out"):
            table.add_column(name, justify="right")
        for before, after, held_out in zip(self.before, self.after, self.held_out, strict=True):
            table.add_row(
                f"{after.point.title}, {after.quantity}",
                f"{after.measured:.4g}",
                f"{before.error:+.1%}",
                f"{after.error:+.1%}",
                "" if held_out is None else f"{held_out.error:+.1%}",
            )
        return table


def published_points() -> list[Point]:
    """What others measured, with sources; none of them was measured with this package."""
    text = resources.files("qwen3cp.planner").joinpath("points.json").read_text()
    return [Point(**fields) for fields in json.loads(text)["points"]]


def read_points(path: str | Path) -> list[Point]:
    """The points of a JSON or CSV file. Raises InputError, which names the point."""
    if str(path).endswith(".csv"):
        rows: Iterable[Any] = _read_csv(path)
    else:
        rows = read_json(path).get("points", [])
    if not isinstance(rows, list) or not rows:
        raise InputError(f'{path} has no points: {{"points": [{{...}}]}}, or rows of a CSV file')
    known = {f.name for f in dataclasses.fields(Point)}
    points = []
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise InputError(f"{path}: point {i} is a {type(row).__name__}, not an object")
        unknown, missing = sorted(set(row) - known), {"model", "hardware", "prompt"} - set(row)
        if unknown or missing:
            what = f"unknown {unknown}" if unknown else f"missing {sorted(missing)}"
            raise InputError(f"{path}: point {i}: {what}; fields are {', '.join(sorted(known))}")
        try:
            points.append(Point(**row))
        except (Qwen3CPError, TypeError) as error:
            raise InputError(f"{path}: point {i}: {error}") from error
    return points


def run_point(point: Point) -> DryRun:
    """The dry run of a point. Raises what `dry_run` raises."""

    return dry_run(
        read_model(point.model)[0],
        model=point.model,
        cp_size=point.cp,
        tp_size=point.tp,
        moe=moe_form(point.moe),
        comm=point.comm,
        dtype=getattr(torch, point.dtype),
        prompt=point.prompt,
        batch=point.batch,
        chunk=point.chunk,
        decode=point.tpot_seconds is not None,
        ranks="busiest",
        layers="distinct",
        chunks="ends",
    )


def evaluate(
    points: Seq[Point],
    efficiencies: Efficiencies | None = None,
    *,
    runs: Seq[DryRun] | None = None,
    observe: Observe = "both",
) -> list[PointError]:
    """What is predicted for the points, beside what was measured, with one set of efficiencies."""
    runs = [run_point(point) for point in points] if runs is None else runs
    errors: list[PointError] = []
    for point, run in zip(points, runs, strict=True):
        prediction = predict(
            run,
            load_hardware(point.hardware),
            efficiencies,
            matmul_dtype="int8" if point.weights == "w8a8" else None,
        )
        if point.ttft_seconds is not None and observe != "tpot":
            errors.append(
                PointError(
                    point=point,
                    quantity="ttft",
                    measured=point.ttft_seconds,
                    predicted=prediction.ttft_seconds,
                )
            )
        if point.tpot_seconds is not None and observe != "ttft":
            assert prediction.tpot_seconds is not None
            errors.append(
                PointError(
                    point=point,
                    quantity="tpot",
                    measured=point.tpot_seconds,
                    predicted=prediction.tpot_seconds,
                )
            )
    return errors


def calibrate(
    points: Seq[Point],
    names: Seq[str] = DEFAULT_FIT,
    *,
    start: Efficiencies | None = None,
    observe: Observe = "both",
    runs: Seq[DryRun] | None = None,
) -> Calibration:
    """Fits the named efficiencies to all points together, by least squares of the logarithms of
    predicted over measured times, within their bounds. The others stay as in `start`.

    Points in W8A8, and those about which something is assumed, are not fitted.

    Args:
        observe: which of the measured times count.
        runs: the points' dry runs, where they are at hand.

    Raises:
        InputError: an unknown or repeated name; fewer measured times than names; a name that none
            of the times depends on; scipy is not installed.
    """
    start = start or Efficiencies()
    names = tuple(names)
    unknown = [name for name in names if name not in Efficiencies.names()]
    if unknown or not names or len(set(names)) < len(names):
        raise InputError(
            f"{', '.join(unknown or names) or 'nothing'} cannot be fitted: name one or more of "
            f"{', '.join(Efficiencies.names())}, each once"
        )
    runs = [run_point(p) for p in points if p.is_fitted] if runs is None else _fitted(points, runs)
    points = [p for p in points if p.is_fitted]
    before = evaluate(points, start, runs=runs, observe=observe)
    if len(before) < len(names):
        raise InputError(
            f"{len(before)} measured times cannot determine {len(names)} efficiencies "
            f"({', '.join(names)}): measure at least {len(names)} points, which are neither in "
            "W8A8 nor assumed, or fit fewer"
        )

    def errors_at(values: Seq[float]) -> list[PointError]:
        here = dataclasses.replace(start, **dict(zip(names, map(float, values), strict=True)))
        return evaluate(points, here, runs=runs, observe=observe)

    def residuals(values: Seq[float]) -> np.ndarray:
        return np.log([1 + e.error for e in errors_at(values)])

    at_start = [getattr(start, name) for name in names]
    _check_effects(residuals, names, at_start)
    everything = range(len(before))
    values = _least_squares(residuals, names, at_start, list(everything))
    warnings = _warnings(residuals, names, values, len(before))
    held_out: list[PointError | None] = []
    for i in everything:
        others = [j for j in everything if j != i]
        if len(others) < len(names):
            held_out.append(None)
        else:
            held_out.append(errors_at(_least_squares(residuals, names, at_start, others))[i])
    return Calibration(
        efficiencies=dataclasses.replace(start, **dict(zip(names, values, strict=True))),
        names=names,
        before=tuple(before),
        after=tuple(errors_at(values)),
        held_out=tuple(held_out),
        warnings=tuple(warnings),
    )


def _fitted(points: Seq[Point], runs: Seq[DryRun]) -> list[DryRun]:
    return [run for point, run in zip(points, runs, strict=True) if point.is_fitted]


def _least_squares(
    residuals: Callable[[Seq[float]], np.ndarray],
    names: Seq[str],
    start: Seq[float],
    which: Seq[int],
) -> list[float]:
    try:
        from scipy.optimize import least_squares
    except ImportError as error:
        raise InputError("a calibration needs scipy: pip install 'qwen3cp[calibrate]'") from error
    low, high = np.array([Efficiencies.bounds(name) for name in names]).T
    # inside the bounds, where derivatives are taken on both sides
    inside = np.clip(start, low + 1e-6 * (high - low), high - 1e-6 * (high - low))
    found = least_squares(
        lambda values: residuals(values)[list(which)],
        inside,
        bounds=(low, high),
        x_scale=np.maximum(inside, 1e-3),
        xtol=1e-10,
        ftol=1e-12,
        gtol=1e-12,
    )
    return [float(value) for value in found.x]


def _check_effects(
    residuals: Callable[[Seq[float]], np.ndarray], names: Seq[str], start: Seq[float]
) -> None:
    for i, name in enumerate(names):
        ends = []
        for end in Efficiencies.bounds(name):
            values = list(start)
            values[i] = end
            ends.append(residuals(values))
        if np.allclose(ends[0], ends[1], rtol=0, atol=1e-9):
            raise InputError(
                f"no measured time depends on {name}: leave it out, or measure a point that does"
            )


def _warnings(
    residuals: Callable[[Seq[float]], np.ndarray],
    names: Seq[str],
    values: Seq[float],
    num_times: int,
) -> list[str]:
    warnings = []
    if num_times == len(names):
        warnings.append(
            f"{num_times} measured times and as many efficiencies: the errors after the fit say "
            "nothing about other points"
        )
    for name, value in zip(names, values, strict=True):
        low, high = Efficiencies.bounds(name)
        if min(value - low, high - value) < 1e-3 * (high - low):
            warnings.append(f"{name} = {value:.4g} is at its bound ({low:g} to {high:g})")
    # relative change of the times for a relative change of each
    columns = []
    for i in range(len(names)):
        step = 1e-4 * max(abs(values[i]), 1e-3)
        moved = [list(values), list(values)]
        low, high = Efficiencies.bounds(names[i])
        moved[0][i], moved[1][i] = max(low, values[i] - step), min(high, values[i] + step)
        width = (moved[1][i] - moved[0][i]) / max(abs(values[i]), 1e-3)
        columns.append((residuals(moved[1]) - residuals(moved[0])) / width)
    singular = np.linalg.svd(np.array(columns).T, compute_uv=False)
    if singular[-1] < 1e-3:
        warnings.append(
            "the points hardly tell these efficiencies apart: measure other prompt lengths or "
            "topologies, or fit fewer"
        )
    return warnings


def _read_csv(path: str | Path) -> list[dict[str, Any]]:
    """Cells as numbers where the field is one; empty cells are left out."""
    kinds = {f.name: str(f.type) for f in dataclasses.fields(Point)}
    rows = []
    try:
        with open(path, newline="") as file:
            for line in csv.DictReader(file):
                cells: Mapping[Any, Any] = line
                if None in cells or None in cells.values():
                    raise ValueError(f"line {len(rows) + 2} has another number of cells")
                row = {n.strip(): c.strip() for n, c in cells.items() if c.strip()}
                rows.append({n: _typed(c, kinds.get(n, "str")) for n, c in row.items()})
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    return rows


def _typed(cell: str, kind: str) -> Any:
    if kind.startswith("int"):
        return int(cell)
    return float(cell) if kind.startswith("float") else cell


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
