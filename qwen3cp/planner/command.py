"""`qwen3cp plan`: what a topology needs, whether it fits, how long it is expected to take."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwen3cp.errors import InputError
from qwen3cp.options import (
    AsJson,
    Cp,
    Exchange,
    GroupSize,
    Int8,
    Int8KV,
    MinBytes,
    Moe,
    RankOptions,
    SkipLayers,
    Tp,
    moe_form,
    reported,
)

if TYPE_CHECKING:
    from rich.table import Table

    from qwen3cp.planner.counts import DryRun, RankCounts, StepCounts
    from qwen3cp.planner.hardware import Efficiencies, Hardware

__all__ = ["plan"]

TABLE_WIDTH = 120
MOST_FORWARDS = 8
"""Of a prefill that are shown one by one, beside the last."""


_NOT_WITH_SEARCH: dict[str, tuple[str, Any]] = {
    "cp": ("--cp", 1),
    "tp": ("--tp", 1),
    "moe": ("--moe", "tp"),
    "exchange": ("--exchange", "auto"),
    "int8": ("--int8", "exact"),
    "int8_kv": ("--int8-kv", False),
}


@dataclass(frozen=True, kw_only=True)
class PlanOptions(RankOptions):
    """The arguments of `qwen3cp plan` that say what is run."""

    prompt: int
    batch: int
    chunk: int | None
    new_tokens: int

    def check_for_search(self) -> None:
        """Raises for what a search chooses itself, or has no use for."""
        given = [
            option
            for name, (option, default) in _NOT_WITH_SEARCH.items()
            if getattr(self, name) != default
        ]
        if given:
            raise InputError(f"--search tries all there is: leave out {', '.join(given)}")

    def check(self) -> None:
        super().check()
        given = {
            "--prompt": self.prompt,
            "--batch": self.batch,
            "--chunk": self.chunk,
            "--new-tokens": self.new_tokens,
        }
        for name, value in given.items():
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")


def plan(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Checkpoint folder, config.json, or hub id. Not needed with --calibrate.",
            metavar="MODEL_OR_CONFIG",
        ),
    ] = None,
    cp: Cp = 1,
    tp: Tp = 1,
    moe: Moe = "tp",
    exchange: Exchange = "auto",
    prompt: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 32768,
    batch: Annotated[int, typer.Option(help="Prompts at a time.")] = 1,
    chunk: Annotated[
        int | None, typer.Option(help="Most tokens of a prompt in one forward. Default: all.")
    ] = None,
    new_tokens: Annotated[
        int, typer.Option(help="Tokens after the prompt that the cache has room for.")
    ] = 1,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16 or float32.")] = "bfloat16",
    int8: Int8 = "exact",
    int8_kv: Int8KV = False,
    group_size: GroupSize = None,
    min_bytes: MinBytes = None,
    skip_layers: SkipLayers = None,
    hardware: Annotated[
        str, typer.Option(help="a2, a3, a3-supernode, or a JSON file with numbers of your own.")
    ] = "a3",
    efficiencies: Annotated[
        str | None,
        typer.Option(
            help="JSON file with efficiencies, such as --calibrate saves.", metavar="FILE"
        ),
    ] = None,
    search: Annotated[
        bool, typer.Option("--search", help="Rank every topology of --devices ranks.")
    ] = False,
    devices: Annotated[int | None, typer.Option(help="With --search: how many ranks.")] = None,
    calibrate: Annotated[
        str | None,
        typer.Option(help="Fit the efficiencies to measured points: JSON or CSV.", metavar="FILE"),
    ] = None,
    fit: Annotated[
        str | None,
        typer.Option(help="With --calibrate: which, such as attention,matmul.", metavar="NAMES"),
    ] = None,
    save_efficiencies: Annotated[
        str | None, typer.Option(help="With --calibrate: write them here.", metavar="FILE")
    ] = None,
    html: Annotated[
        str | None, typer.Option(help="Write the plan as one self-contained page.", metavar="FILE")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Tell what a topology needs and how long it is expected to take, without an NPU.

    Runs the model's own code for every kind of rank on tensors without values: no weights are
    read. Memory, FLOPs and bytes are counted; times are predicted from them.
    """
    with reported():
        options = PlanOptions(
            model=model or "",
            cp=cp,
            tp=tp,
            moe=moe,
            exchange=exchange,
            dtype=dtype,
            timeout=None,
            int8=int8,
            int8_kv=int8_kv,
            group_size=group_size,
            min_bytes=min_bytes,
            skip_layers=skip_layers,
            prompt=prompt,
            batch=batch,
            chunk=chunk,
            new_tokens=new_tokens,
        )
        options.check()
        if search != (devices is not None):
            raise InputError("--search and --devices go together: pass both, or neither")
        if calibrate is None and (fit is not None or save_efficiencies is not None):
            raise InputError("--fit and --save-efficiencies belong to --calibrate: pass it, too")
        if model is None and (calibrate is None or search or html is not None):
            raise InputError("there is nothing to plan: pass MODEL_OR_CONFIG")
        if search:
            options.check_for_search()
        for option, path in (("--html", html), ("--save-efficiencies", save_efficiencies)):
            if path is not None and not Path(path).absolute().parent.is_dir():
                raise InputError(f"{option} {path}: there is no such folder")

        from qwen3cp.planner.hardware import load_efficiencies, load_hardware

        shares, machine, document = load_efficiencies(efficiencies), load_hardware(hardware), {}
        if calibrate is not None:
            shares, document["calibration"] = _calibrate(
                calibrate, fit, shares, save_efficiencies, as_json
            )
        if model is not None:
            document |= _plan(options, machine, shares, devices, html, as_json)
        if as_json:
            print(json.dumps(document, indent=2))


def _plan(
    options: PlanOptions,
    hardware: Hardware,
    efficiencies: Efficiencies,
    devices: int | None,
    html: str | None,
    as_json: bool,
) -> dict[str, Any]:
    from qwen3cp.planner.cost import fit, predict
    from qwen3cp.planner.dry_run import dry_run
    from qwen3cp.planner.models import read_model
    from qwen3cp.planner.report import write_html
    from qwen3cp.planner.search import search
    from qwen3cp.weights.loader import resolve_dtype

    config, source = read_model(options.model)
    dtype = resolve_dtype(options.dtype, config)
    workload: dict[str, Any] = {
        "model": options.model,
        "prompt": options.prompt,
        "batch": options.batch,
        "dtype": dtype,
    }
    document: dict[str, Any] = {}
    result, topology = None, {"cp_size": options.cp, "tp_size": options.tp}
    settings: dict[str, Any] = {
        "moe": moe_form(options.moe),
        "comm": options.comm(),
        "chunk": options.chunk,
    }
    if devices is not None:
        result = search(
            config,
            hardware,
            efficiencies,
            devices=devices,
            comm=options.comm(),
            chunks=None if options.chunk is None else [options.chunk],
            progress=_progress,
            new_tokens=options.new_tokens,
            **workload,
        )
        document["search"] = result.to_dict()
        if not as_json:
            _print(result.to_table())
        if html is None:
            return document
        if not result.ranked:
            raise InputError("no topology fits, so there is no plan for --html to show")
        best = result.ranked[0].candidate
        topology = {"cp_size": best.layout.cp_size, "tp_size": best.layout.tp_size}
        settings = {"moe": best.layout.moe, "comm": best.comm, "chunk": best.chunk}
    run = dry_run(config, **workload, **topology, **settings, new_tokens=options.new_tokens)
    if result is None:
        room, prediction = fit(run, hardware), predict(run, hardware, efficiencies)
        document |= {
            "config": source,
            "hardware": hardware.to_dict(),
            "fit": room.to_dict(),
            "prediction": prediction.to_dict(),
            "dry_run": run.to_dict(),
        }
        if not as_json:
            print(f"{run.model} ({source}): {run.num_parameters / 1e9:.2f} G parameters")
            print(
                f"cp={run.cp_size} tp={run.tp_size} moe={run.moe}, {run.dtype}; {run.batch} x "
                f"{run.prompt} tokens in chunks of {run.chunk}, room for {run.new_tokens} more"
            )
            _print(memory_table(run), work_table(run), collectives_table(run))
            _print(prediction.to_table())
            print(f"{'fits' if room.fits else 'does not fit'} on {hardware.name}: {room.reason}")
            for line in run.warnings:
                print(f"warning: {line}")
            for line in run.assumptions:
                print(f"assumed: {line}")
    if html is not None:
        write_html(
            html,
            config=config,
            run=run,
            hardware=hardware,
            efficiencies=efficiencies,
            result=result,
            progress=_progress,
        )
    return document


def _calibrate(
    path: str, names: str | None, start: Efficiencies, out: str | None, as_json: bool
) -> tuple[Efficiencies, dict[str, Any]]:
    from qwen3cp.planner.calibrate import DEFAULT_FIT, calibrate, read_points

    chosen = DEFAULT_FIT if names is None else names.replace(",", " ").split()
    calibration = calibrate(read_points(path), chosen, start=start)
    if not as_json:
        _print(calibration.to_table())
        for line in calibration.warnings:
            print(f"warning: {line}")
    if out is not None:
        text = json.dumps(calibration.efficiencies.to_dict(), indent=2)
        try:
            Path(out).write_text(text + "\n")
        except OSError as error:
            raise InputError(f"--save-efficiencies {out} cannot be written: {error}") from error
    return calibration.efficiencies, calibration.to_dict()


# ---------------------------------------------------------------------------------------- tables


def memory_table(run: DryRun) -> Table:
    """Of each kind of rank, in GiB."""
    names = "parameters", "KV cache", "activations", "sum"
    table = _table("memory of a rank, GiB", left=["ranks"], right=names)
    table.add_column("activations are most in")
    for rank in run.ranks:
        parts = (rank.parameter_bytes, rank.kv_bytes, rank.peak_activation_bytes, rank.memory_bytes)
        step = max(rank.steps, key=lambda step: step.peak_activation_bytes)
        layer = "" if step.peak_layer is None else f" in layer {step.peak_layer}"
        table.add_row(
            ranges(rank.ranks),
            *(f"{x / 2**30:.3f}" for x in parts),
            f"{_step_name(step)}: {step.peak_operator}{layer}",
        )
    return table


def work_table(run: DryRun) -> Table:
    """FLOPs, operators and bytes of each forward, on the rank that has most FLOPs in it."""
    names = "rows", "TFLOP", "attention", "experts", "operators", "GB moved", "GB received", "waits"
    table = _table("work of the busiest rank in each forward", left=["forward"], right=names)
    same_steps = zip(*(rank.steps for rank in run.ranks), strict=True)
    steps = [max(of_ranks, key=lambda step: step.flops) for of_ranks in same_steps]
    prefill = [step for step in steps if step.phase == "prefill"]
    for place, step in enumerate(prefill):
        if place < MOST_FORWARDS or step is prefill[-1]:
            table.add_row(_step_name(step), *_work(step))
        elif place == MOST_FORWARDS:
            table.add_row("...")
    if len(prefill) > 1:
        table.add_row("prefill, all", *_work(*prefill))
    for step in steps[len(prefill) :]:
        table.add_row(_step_name(step), *_work(step))
    return table


def collectives_table(run: DryRun) -> Table:
    """What one rank receives in each phase."""
    rank = max(run.ranks, key=_received)
    table = _table(
        f"collectives of rank {rank.ranks[0]}",
        left=["phase", "kind", "algorithm", "form", "group", "layers"],
        right=["calls", "MB a layer", "MB"],
    )
    for phase in ("prefill", "decode"):
        rows: dict[tuple, list[int]] = defaultdict(lambda: [0, 0])
        for step in rank.steps:
            for x in step.collectives if step.phase == phase else ():
                group = f"{x.group} of {x.group_size}"
                total = rows[x.kind, x.algorithm, x.form, group, x.layers]
                total[0] += x.total_calls
                total[1] += x.total_bytes
        for (kind, algorithm, form, group, layers), (calls, received) in rows.items():
            per_layer = f"{received / len(layers) / 1e6:,.3f}" if layers else ""
            table.add_row(
                phase,
                kind,
                algorithm,
                form,
                group,
                ranges(layers),
                f"{calls:,}",
                per_layer,
                f"{received / 1e6:,.3f}",
            )
    return table


def ranges(numbers: Iterable[int]) -> str:
    """Such as 0-3, 5 for 0, 1, 2, 3, 5."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs)


def _work(*steps: StepCounts) -> list[str]:
    """A row of `work_table`."""
    operators = [operator for step in steps for operator in step.operators]

    def flops(*parts: str) -> str:
        chosen = [x.total_flops for x in operators if not parts or x.part in parts]
        return f"{sum(chosen) / 1e12:,.3f}"

    return [
        f"{sum(step.rows for step in steps):,}",
        flops(),
        flops("attention"),
        flops("experts", "mlp"),
        f"{sum(step.operator_calls for step in steps):,}",
        f"{sum(x.total_bytes for x in operators) / 1e9:,.3f}",
        f"{sum(step.collective_bytes for step in steps) / 1e9:,.4f}",
        str(sum(step.host_reads for step in steps)),
    ]


def _received(rank: RankCounts) -> int:
    return sum(step.collective_bytes for step in rank.steps)


def _step_name(step: StepCounts) -> str:
    if step.phase == "decode":
        return f"decode after {step.start:,}"
    return f"prefill {step.start:,} to {step.start + step.new_tokens:,}"


def _table(title: str, *, left: Iterable[str], right: Iterable[str]) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for name in left:
        table.add_column(name)
    for name in right:
        table.add_column(name, justify="right")
    return table


def _print(*parts: Any) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else TABLE_WIDTH, highlight=False)
    for part in parts:
        console.print(part)


def _progress(items: Iterable[Any], what: str) -> Iterable[Any]:
    from tqdm import tqdm

    return tqdm(items, desc=what, leave=False, disable=not sys.stderr.isatty())
