"""The comparison of two runs as one HTML file that needs nothing else."""

from __future__ import annotations

import difflib
import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from qwen3cp.eval.compare import Change, Comparison, Drift, Row
from qwen3cp.eval.compare_report import drift_note, notes, points, share
from qwen3cp.plots import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["page"]

TEMPLATE = Path(__file__).with_name("compare_page.html")
MAX_CHANGES = 300
"""Shown in full; right to wrong comes first."""
COLORS = {"lost": "#c0392b", "gained": "#2e8b57", "other": "#8a8f98"}


def page(found: Comparison) -> str:
    """HTML. Raises InputError if matplotlib is not installed."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["share"] = share
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    shown = found.changes[:MAX_CHANGES]
    return template.render(
        found=found,
        changes=[_card(change) for change in shown],
        left_out=len(found.changes) - len(shown),
        counts={kind: sum(c.kind == kind for c in found.changes) for kind in COLORS},
        drift_note=drift_note,
        notes=notes(found),
        points=points,
        figure=Markup(_figure(found)),
    )


def _card(change: Change) -> dict[str, Any]:
    marked_a, marked_b = _marked(change.text_a, change.text_b)
    # few-shot examples stand before the last blank line
    question = change.prompt.rsplit("\n\n", 1)[-1]
    return {
        "change": change,
        "question": question,
        "whole_prompt": change.prompt if question != change.prompt else None,
        "text_a": marked_a,
        "text_b": marked_b,
    }


def _marked(a: str, b: str) -> tuple[Markup, Markup]:
    """Both texts, escaped, with the words that differ in <mark>."""
    words = [re.findall(r"\s+|\w+|[^\w\s]", text) for text in (a, b)]
    matcher = difflib.SequenceMatcher(None, *words, autojunk=False)
    sides: tuple[list[Markup], list[Markup]] = ([], [])
    for tag, a0, a1, b0, b1 in matcher.get_opcodes():
        for side, text in zip(
            sides, ("".join(words[0][a0:a1]), "".join(words[1][b0:b1])), strict=True
        ):
            if text:
                wrapped = Markup("<mark>{}</mark>").format(text)
                side.append(escape(text) if tag == "equal" else wrapped)
    return Markup("").join(sides[0]), Markup("").join(sides[1])


def _figure(found: Comparison) -> str:
    """An SVG element: differences with their intervals, answers that changed, drift."""
    import matplotlib

    drifts = [drift for drift in found.drifts if sum(drift.histogram[1])]
    heights = [1.2 + 0.42 * max(2, len(found.rows))] if found.rows else []
    heights += [2.6] if drifts else []
    if not heights:
        return ""
    figure = new_figure(10.5, sum(heights))
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
    if found.rows:
        _draw_rows(figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1]), found.rows)
    if drifts:
        _draw_drifts(figure.add_subplot(grid[-1, :]), drifts)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "qwen3cp"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    svg = buffer.getvalue().decode()
    # the prolog and the metadata name documents elsewhere
    return re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)


def _draw_rows(left: Axes, right: Axes, rows: Sequence[Row]) -> None:
    """Differences with intervals; beside them how many answers turned wrong and right."""
    widest = max(1, *(max(row.lost, row.gained) for row in rows))
    for y, row in enumerate(rows):
        low, high = (100 * end for end in row.difference_interval)
        color = "#444444"
        if row.p_value <= 0.05:
            color = COLORS["lost" if row.difference < 0 else "gained"]
        left.plot([low, high], [y, y], color=color, linewidth=2, solid_capstyle="butt")
        left.plot([100 * row.difference], [y], "o", color=color, markersize=6)
        for count, side, kind in ((row.lost, -1, "lost"), (row.gained, 1, "gained")):
            right.barh(y, side * count, height=0.6, color=COLORS[kind])
            right.annotate(
                str(count),
                (side * count, y),
                (side * 4, 0),
                textcoords="offset points",
                ha="left" if side > 0 else "right",
                va="center",
            )
    left.axvline(0, color="#999999", linewidth=1, linestyle=":")
    left.set_yticks(range(len(rows)), [_name(row) for row in rows], fontsize=8)
    left.set_xlabel("B less A, points (95 %)")
    left.set_title("Difference of right answers", fontsize=10)
    right.axvline(0, color="#444444", linewidth=1)
    right.set_xlim(-1.25 * widest, 1.25 * widest)
    right.set_xticks([])
    right.set_yticks([])
    right.spines[["left", "bottom"]].set_visible(False)
    right.set_title("right to wrong  |  wrong to right", fontsize=10)
    for axes in (left, right):
        axes.set_ylim(len(rows) - 0.4, -0.6)  # the first row on top


def _draw_drifts(axes: Axes, drifts: Sequence[Drift]) -> None:
    edges = [f"1e{round(math.log10(edge))}" for edge in drifts[0].histogram[0]]
    names = [f"< {edges[0]}", *(f"≥ {edge}" for edge in edges)]
    width = 0.8 / len(drifts)
    for i, drift in enumerate(drifts):
        counts = drift.histogram[1]
        axes.bar(
            [x + width * (i - (len(drifts) - 1) / 2) for x in range(len(names))],
            [100 * count / sum(counts) for count in counts],
            width=width,
            label=drift.task,
        )
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.set_ylabel("% of them")
    unit = "request" if all(drift.tokens is None for drift in drifts) else "token"
    axes.set_title(f"Size of the change of log-probabilities, per {unit}", fontsize=10)
    axes.legend(fontsize=8, frameon=False)


def _name(row: Row) -> str:
    return f"{row.task}\n{row.metric if row.filter == 'none' else f'{row.filter}, {row.metric}'}"
