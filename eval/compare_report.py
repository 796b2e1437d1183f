"""`qwen3cp compare`: the comparison of two runs as tables, JSON or an HTML page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qwen3cp.errors import InputError
from qwen3cp.eval.compare import Comparison, Drift, Row, compare_runs
from qwen3cp.eval.runs import read_run
from qwen3cp.options import AsJson, reported

__all__ = ["compare", "print_tables"]

RunPath = Annotated[str, typer.Argument(help="Output folder of a run, or a results file in one.")]
SHOWN = 10
"""Documents that a note lists."""


def compare(
    a: RunPath,
    b: RunPath,
    html: Annotated[
        str | None, typer.Option(help="Write a page that also shows the answers.", metavar="FILE")
    ] = None,
    allow_different_prompts: Annotated[
        bool, typer.Option(help="Pair documents that were asked differently.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Compare two runs of lm-eval, document by document: A is the reference.

    Both need --log_samples and --output_path, from `qwen3cp eval` or any model of lm-eval.
    """
    with reported():
        if html is not None and not Path(html).absolute().parent.is_dir():
            raise InputError(f"--html {html}: there is no such folder")
        found = compare_runs(
            read_run(a), read_run(b), allow_different_prompts=allow_different_prompts
        )
        if html is not None:
            from qwen3cp.eval.compare_page import page

            try:
                Path(html).write_text(page(found), encoding="utf-8")
            except OSError as error:
                raise InputError(f"--html {html} cannot be written: {error}") from error
        if as_json:
            print(json.dumps(found.to_dict(), indent=2, ensure_ascii=False))
            return
        console = Console(highlight=False)
        if not console.is_terminal:  # a file or a pipe wraps nothing
            console.width = 160
        print_tables(found, console)
        if html is not None:
            console.print(f"[dim]written: {escape(html)}[/dim]")


def share(right: int, documents: int, interval: tuple[float, float]) -> str:
    """82.50 (73.8 to 88.8)"""
    low, high = (100 * end for end in interval)
    return f"{100 * right / documents:.2f} ({low:.1f} to {high:.1f})"


def points(row: Row) -> str:
    """-1.50 (-3.80 to +0.80)"""
    low, high = (100 * end for end in row.difference_interval)
    return f"{100 * row.difference:+.2f} ({low:+.2f} to {high:+.2f})"


def drift_note(drift: Drift) -> str:
    """What the numbers are of."""
    if drift.tokens is None:
        return f"{drift.requests:,} sums, per request"
    if not drift.by_token:
        return f"{drift.tokens:,} tokens, averages of {drift.requests:,} sums"
    note = f"{drift.tokens:,} tokens"
    if drift.diverged:
        ties = f", {drift.ties} at a near tie" if drift.ties else ""
        note += f", up to where {drift.diverged} texts part{ties}"
    return note


def notes(found: Comparison) -> list[str]:
    """What is not in the tables, in sentences."""
    lines = list(found.notes)
    for name, only in (("A", found.only_in_a), ("B", found.only_in_b)):
        for task, documents in only.items():
            more = ", ..." if len(documents) > SHOWN else ""
            listed = ", ".join(map(str, documents[:SHOWN]))
            lines.append(
                f"{task}: {len(documents)} documents are in {name} only, and are left out: "
                f"{listed}{more}"
            )
    return lines


def print_tables(found: Comparison, console: Console) -> None:
    console.print(f"A: {escape(found.path_a)}\nB: {escape(found.path_b)}", soft_wrap=True)
    if found.rows:
        table = Table(title="Right answers, % (95 %)", box=SIMPLE_HEAD, title_justify="left")
        for name in ("task", "filter", "metric"):
            table.add_column(name)
        for name in ("documents", "A", "B", "B less A, points", "p"):
            table.add_column(name, justify="right")
        for row in found.rows:
            table.add_row(
                *map(escape, (row.task, row.filter, row.metric)),
                f"{row.documents:,}",
                share(row.right_a, row.documents, row.interval_a),
                share(row.right_b, row.documents, row.interval_b),
                points(row),
                f"{row.p_value:.3g}",
            )
        console.print(table)
        table = Table(title="Answers that changed", box=SIMPLE_HEAD, title_justify="left")
        for name in ("task", "filter", "metric"):
            table.add_column(name)
        for name in ("right to wrong", "wrong to right", "wrong to other wrong", "texts differ"):
            table.add_column(name, justify="right")
        for row in found.rows:
            texts = found.texts_differ.get(row.task)
            counts = (row.lost, row.gained, row.other, "" if texts is None else texts)
            table.add_row(*map(escape, (row.task, row.filter, row.metric)), *map(str, counts))
        console.print(table)
    if found.values:
        table = Table(title="Other metrics", box=SIMPLE_HEAD, title_justify="left")
        for name in ("task", "filter", "metric"):
            table.add_column(name)
        for name in ("A", "B", "B less A"):
            table.add_column(name, justify="right")
        for value in found.values:
            table.add_row(
                *map(escape, (value.task, value.filter, value.metric)),
                f"{value.a:.6g}",
                f"{value.b:.6g}",
                f"{value.b - value.a:+.3g}",
            )
        console.print(table)
    if found.drifts:
        title = "Log-probabilities, B less A, per token"
        table = Table(title=title, box=SIMPLE_HEAD, title_justify="left")
        table.add_column("task")
        for name in ("mean", "mean size", "root mean square", "largest"):
            table.add_column(name, justify="right")
        table.add_column("of")
        for drift in found.drifts:
            table.add_row(
                escape(drift.task),
                f"{drift.mean:+.2e}",
                f"{drift.mean_absolute:.2e}",
                f"{drift.root_mean_square:.2e}",
                f"{drift.largest:.2e}",
                drift_note(drift),
            )
        console.print(table)
    for row in found.rows:
        where = f"{row.task}, {row.filter}, {row.metric}"
        console.print(f"{escape(where)}: {row.verdict}", soft_wrap=True)
    for note in notes(found):
        console.print(f"[yellow]note:[/yellow] {escape(note)}", soft_wrap=True)
