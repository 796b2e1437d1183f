"""The planner's figures, for the HTML page and the documentation. They need matplotlib."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING, Any

from qwen3cp.planner.cost import SPLIT, Prediction, group_links
from qwen3cp.planner.counts import DryRun, StepCounts
from qwen3cp.planner.hardware import Hardware
from qwen3cp.planner.search import Crossover, Curve, Layout
from qwen3cp.plots import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "draw_bytes",
    "draw_curves",
    "draw_layout",
    "draw_memory",
    "draw_split",
    "named_ranks",
    "tokens",
]

GIB, MIB = 2**30, 2**20
SPLIT_COLORS = {
    "attention": "#4878a8",
    "linear": "#e0a030",
    "vector": "#5a9a68",
    "packing": "#8f6fb0",
    "collectives": "#b05a5a",
    "launch": "#9a9a9a",
    "host": "#d5a6bd",
}
MEMORY_COLORS = {
    "parameters": "#4878a8",
    "KV cache": "#e0a030",
    "activations": "#5a9a68",
    "constants": "#9a9a9a",
}
COLORS = ("#4878a8", "#e0a030", "#5a9a68", "#b05a5a", "#8f6fb0", "#5aa9a9", "#a07850", "#606060")
LIMIT = "#202020"


def draw_memory(run: DryRun, hardware: Hardware) -> Figure:
    """Stacked bars of the bytes of each kind of rank, beside what a device has."""
    height = 1.5 + 0.42 * len(run.ranks)
    figure = new_figure(9, height)
    axes = figure.subplots()
    labels = [named_ranks(rank.ranks) for rank in run.ranks]
    left = [0.0] * len(labels)
    parts = {
        "parameters": [rank.parameter_bytes for rank in run.ranks],
        "KV cache": [rank.kv_bytes for rank in run.ranks],
        "activations": [rank.peak_activation_bytes for rank in run.ranks],
        "constants": [rank.constant_bytes for rank in run.ranks],
    }
    for name, values in parts.items():
        widths = [value / GIB for value in values]
        axes.barh(labels, widths, left=left, color=MEMORY_COLORS[name], label=name, height=0.62)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for i, total in enumerate(left):
        axes.text(total, i, f" {total:.1f}", va="center", fontsize=9)
    usable, whole = hardware.usable_bytes / GIB, hardware.hbm_bytes / GIB
    axes.axvline(usable, color=LIMIT, linestyle="--", label=f"usable, {usable:.1f} GiB")
    axes.axvline(whole, color=LIMIT, linestyle="-", label=f"HBM, {whole:.0f} GiB")
    axes.set(xlabel="GiB on a device", xlim=(0, 1.12 * max(*left, whole)))
    axes.invert_yaxis()
    _plain(axes)
    figure.legend(loc="outside upper center", ncols=6, frameon=False, fontsize=9)
    return figure


def draw_split(predictions: Mapping[str, Prediction]) -> Figure:
    """What the time to first token, and that of a token after it, is made of."""
    height = 1.5 + 0.4 * len(predictions)
    figure = new_figure(9, height)
    decodes = any(p.tpot_seconds is not None for p in predictions.values())
    left, right = figure.subplots(1, 2, sharey=True) if decodes else (figure.subplots(), None)
    sides = [(left, "prefill", 1.0, "time to first token, s")]
    if right is not None:
        sides.append((right, "decode", 1e3, "a token after it, ms"))
    for axes, phase, scale, title in sides:
        start = [0.0] * len(predictions)
        for name in SPLIT:
            widths = [p.split(phase)[name] * scale for p in predictions.values()]
            label = name if axes is left else None
            axes.barh(
                list(predictions),
                widths,
                left=start,
                color=SPLIT_COLORS[name],
                label=label,
                height=0.62,
            )
            start = [a + b for a, b in zip(start, widths, strict=True)]
        for i, total in enumerate(start):
            axes.text(total, i, f" {_short(total)}", va="center", fontsize=9)
        axes.set(xlabel=title, xlim=(0, 1.18 * max(start) or 1))
        _plain(axes)
    left.invert_yaxis()
    figure.legend(loc="outside upper center", ncols=len(SPLIT), frameon=False, fontsize=9)
    return figure


def draw_curves(curves: Seq[Curve], crossovers: Seq[Crossover] = ()) -> Figure:
    """Time to first token over the length of the prompt; and over that of the best at each."""
    figure = new_figure(9, 4.4)
    left, right = figure.subplots(1, 2)
    styles = _styles([curve.layout for curve in curves])
    best: dict[int, float] = {}
    for curve in curves:
        for prompt, seconds in zip(curve.prompts, curve.seconds, strict=True):
            if seconds is not None:
                best[prompt] = min(seconds, best.get(prompt, math.inf))
    for curve in curves:
        points = [p for p in zip(curve.prompts, curve.seconds, strict=True) if p[1] is not None]
        prompts = [prompt for prompt, _ in points]
        seconds = [s for _, s in points if s is not None]
        style: dict[str, Any] = {"marker": "o", "markersize": 3, "linewidth": 1.4}
        style |= styles[curve.layout]
        left.plot(prompts, seconds, label=str(curve.layout), **style)
        right.plot(prompts, [s / best[p] for p, s in zip(prompts, seconds, strict=True)], **style)
    left.set_yscale("log")
    left.set(title="time to first token, s", xlabel="tokens of the prompt")
    right.set(title="times that of the best", xlabel="tokens of the prompt", ylim=(0.95, 3.05))
    shown = [prompt for curve in curves for prompt in curve.prompts]
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        ticks = sorted({2 ** round(math.log2(prompt)) for prompt in shown})
        axes.set_xticks(ticks[:: max(1, len(ticks) // 6)])
        axes.xaxis.set_major_formatter(lambda value, _: tokens(value))
        axes.minorticks_off()
        axes.grid(color="#e4e4e4", linewidth=0.6)
        _plain(axes)
    left.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    for crossover in crossovers:
        right.axvline(crossover.prompt, color=LIMIT, linestyle=":", linewidth=1)
    for i, crossover in enumerate(crossovers):
        right.annotate(
            f"{crossover.prompt:,} ",
            (crossover.prompt, 2.9 - 0.16 * (i % 6)),
            ha="right",
            fontsize=8,
        )
    figure.legend(
        loc="outside lower center", ncols=min(4, max(1, len(curves))), frameon=False, fontsize=9
    )
    return figure


def draw_bytes(run: DryRun) -> Figure:
    """Bytes that a rank receives in each layer: of the whole prefill, and of a decode step."""
    figure = new_figure(9, 3.2)
    steps = run.ranks[0].steps
    phases = [p for p in ("prefill", "decode") if any(step.phase == p for step in steps)]
    panels = figure.subplots(1, len(phases), squeeze=False)[0]
    names = {
        "prefill": ("the whole prefill, MiB a layer", MIB),
        "decode": ("a decode step, KiB a layer", 1024),
    }
    labelled: set[str] = set()
    kinds = sorted({name for phase in phases for name in layer_bytes(steps, phase)})
    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(kinds)}
    for axes, phase in zip(panels, phases, strict=True):
        title, unit = names[phase]
        bottom = [0.0] * run.num_layers
        for name, of_layers in sorted(layer_bytes(steps, phase).items()):
            heights = [of_layers.get(layer, 0) / unit for layer in range(run.num_layers)]
            axes.bar(
                range(run.num_layers),
                heights,
                bottom=bottom,
                width=1.0 if run.num_layers > 30 else 0.85,
                color=colors[name],
                label=None if name in labelled else name,
            )
            labelled.add(name)
            bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
        axes.set(title=title, xlabel="layer", xlim=(-0.6, run.num_layers - 0.4))
        axes.set_ylim(0, 1.15 * max(bottom) or 1)
        if not any(bottom):
            axes.text(0.5, 0.5, "nothing travels", transform=axes.transAxes, ha="center")
        _plain(axes)
    if labelled:
        figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    return figure


def layer_bytes(steps: Iterable[StepCounts], phase: str) -> dict[str, dict[int, int]]:
    """Bytes that a rank receives in the layers, by kind (with its group and form) and layer."""
    found: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for step in steps:
        for count in step.collectives if step.phase == phase else ():
            form = "" if count.form == "exact" else f", {count.form.replace('_', ' ')}"
            name = f"{count.kind.replace('_', ' ')} over {count.group}{form}"
            for layer in count.layers:
                found[name][layer] += count.bytes * count.calls
    return found


def draw_layout(hardware: Hardware, cp_size: int, tp_size: int) -> Figure:
    """Ranks on devices, packages and nodes: equal colours are a TP group, equal places in it a CP
    group."""
    from matplotlib.patches import FancyBboxPatch, Rectangle

    world = cp_size * tp_size
    a_node, a_package = hardware.devices_per_node, hardware.devices_per_package
    num_nodes = -(-world // a_node)
    in_row = min(a_node, max(8, a_package))
    rows_of_node = -(-min(a_node, max(world, 1)) // in_row)
    node_height = rows_of_node + 0.4
    figure = new_figure(9, 0.7 + 0.82 * node_height * num_nodes)
    axes = figure.subplots()
    for node in range(num_nodes):
        top = -node * (node_height + 0.25)
        axes.add_patch(
            FancyBboxPatch(
                (-0.12, top - node_height + 0.08),
                in_row + 0.24,
                node_height,
                boxstyle="round,pad=0,rounding_size=0.12",
                fill=False,
                edgecolor="#606060",
            )
        )
        axes.text(0, top - 0.1, f"node {node}", va="center", fontsize=9, color="#404040")
        for place in range(min(a_node, rows_of_node * in_row)):
            device = node * a_node + place
            x, y = place % in_row, top - 1.2 - place // in_row
            if a_package > 1 and place % a_package == 0:
                axes.add_patch(
                    Rectangle((x + 0.01, y), a_package - 0.02, 0.96, color="#ececec", linewidth=0)
                )
            if device >= world:
                axes.add_patch(
                    Rectangle((x + 0.06, y + 0.06), 0.88, 0.84, fill=False, edgecolor="#c8c8c8")
                )
                continue
            cp_rank, tp_rank = divmod(device, tp_size)
            color = COLORS[cp_rank % len(COLORS)]
            axes.add_patch(Rectangle((x + 0.06, y + 0.06), 0.88, 0.84, color=color, alpha=0.45))
            axes.text(x + 0.5, y + 0.66, f"rank {device}", ha="center", va="center", fontsize=8.5)
            axes.text(
                x + 0.5,
                y + 0.3,
                f"cp {cp_rank}  tp {tp_rank}",
                ha="center",
                va="center",
                fontsize=7.5,
            )
    bottom = -(num_nodes - 1) * (node_height + 0.25) - node_height
    axes.set(xlim=(-0.2, in_row + 0.2), ylim=(bottom, 0.25))
    axes.set_aspect("equal")
    axes.axis("off")
    links = group_links(hardware, cp_size, tp_size)
    sizes = {"cp": cp_size, "tp": tp_size, "world": world}
    used = [
        f"{name} groups of {sizes[name]}: {kind} link"
        for name, kind in links.items()
        if name != "world" or min(cp_size, tp_size) > 1
    ]
    figure.suptitle("; ".join(used) or "one rank, no groups", fontsize=10)
    return figure


def named_ranks(ranks: Seq[int]) -> str:
    """(0, 1, 2, 5) -> "ranks 0-2, 5"; long lists are cut."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][1] == rank - 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    names = [str(a) if a == b else f"{a}-{b}" for a, b in runs]
    if len(names) > 5:
        names = [*names[:4], f"... ({len(ranks)} in all)"]
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(names)


def tokens(count: float) -> str:
    """131072 -> 128k, 1000 -> 1000."""
    number = round(count)
    if number >= 2**20 and number % 2**20 == 0:
        return f"{number // 2**20}M"
    return f"{number // 1024}k" if number >= 1024 and number % 1024 == 0 else f"{number:,}"


def _styles(layouts: Seq[Layout]) -> dict[Layout, dict[str, Any]]:
    """A colour for each CP x TP; solid lines with experts cut over TP, dashed where divided."""
    sizes = list(dict.fromkeys((layout.cp_size, layout.tp_size) for layout in sorted(layouts)))
    return {
        layout: {
            "color": COLORS[sizes.index((layout.cp_size, layout.tp_size)) % len(COLORS)],
            "linestyle": "-" if layout.moe == "tp" else "--",
        }
        for layout in layouts
    }


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)
    axes.title.set_fontsize(10)


def _short(value: float) -> str:
    """Three digits."""
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
