"""`--html`: one page with everything about a plan, which refers to nothing outside itself."""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from transformers import Qwen3MoeConfig

from qwen3cp.errors import InputError
from qwen3cp.parallel import CommConfig
from qwen3cp.planner import figures
from qwen3cp.planner.calibrate import PointError, evaluate, published_points
from qwen3cp.planner.cost import SPLIT, Fit, Prediction, fit, predict
from qwen3cp.planner.counts import DryRun
from qwen3cp.planner.hardware import Efficiencies, Hardware
from qwen3cp.planner.search import Crossover, Curve, Progress, SearchResult, compare
from qwen3cp.version import __version__

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["svg", "write_html"]

GIB, MIB = 2**30, 2**20


@dataclass
class _Table:
    columns: Seq[str]
    numbers: Seq[str]
    """Those of the columns that hold numbers."""
    rows: Seq[Seq[str]]


@dataclass
class _Section:
    title: str
    texts: Seq[str] = ()
    figure: str = ""
    tables: Seq[_Table] = ()
    items: Seq[str] = field(default_factory=list)


def write_html(
    path: str | Path,
    *,
    config: Qwen3MoeConfig,
    run: DryRun,
    hardware: Hardware,
    efficiencies: Efficiencies | None = None,
    result: SearchResult | None = None,
    progress: Progress | None = None,
) -> None:
    """Writes the page of a plan.

    Args:
        run: with ranks="distinct"; of the best candidate, if there is a result.
        result: of a search over as many devices; without one, the topologies of as many ranks are
            compared as they are, with the run's own experts and communication.
        progress: shows how far that is.

    Raises:
        InputError: matplotlib is not installed, or the file cannot be written.
    """
    efficiencies = efficiencies or Efficiencies()
    figures.new_figure(1, 1)  # before anything that takes long: raises without matplotlib
    document = render(
        config=config,
        run=run,
        hardware=hardware,
        efficiencies=efficiencies,
        result=result,
        errors=evaluate([p for p in published_points() if p.is_fitted], efficiencies),
        progress=progress,
    )
    try:
        Path(path).write_text(document, encoding="utf-8")
    except OSError as error:
        raise InputError(f"the page cannot be written to {path}: {error}") from error


def render(
    *,
    config: Qwen3MoeConfig,
    run: DryRun,
    hardware: Hardware,
    efficiencies: Efficiencies,
    result: SearchResult | None,
    errors: Seq[PointError],
    progress: Progress | None = None,
) -> str:
    """The page as text. `errors` are of published points, with these efficiencies."""
    prediction, room = predict(run, hardware, efficiencies), fit(run, hardware)
    if result is None:
        curves, crossovers = compare(config, hardware, efficiencies, run=run, progress=progress)
        here = f"CP {run.cp_size} x TP {run.tp_size}"
        predictions = {here: prediction}
    else:
        curves, crossovers = result.curves, result.crossovers
        predictions = {
            str(ranked.candidate.layout): ranked.prediction
            for ranked in result.best_of_layouts[:10]
        }
    sections = [
        _memory(run, hardware, room),
        _time(predictions, prediction),
        _lengths(curves, crossovers),
        _traffic(run, prediction),
        _layout(run, hardware),
    ]
    if result is not None:
        sections.append(_search(result))
    sections += [*_assumptions(run, hardware, efficiencies)]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    source = resources.files("qwen3cp.planner").joinpath("report.html").read_text("utf-8")
    return environment.from_string(source).render(
        title=f"{run.model or 'Qwen3-MoE'} on {hardware.name}: "
        f"CP {run.cp_size} x TP {run.tp_size}, {run.moe}",
        subtitle=f"{run.prompt:,} tokens x {run.batch}, in chunks of {run.chunk:,}; {run.dtype}; "
        f"communication {_comm(run)}; {hardware.title}",
        notice=_notice(errors),
        facts=_facts(run, prediction, room),
        sections=sections,
        version=__version__,
    )


def svg(figure: Figure, name: str) -> str:
    """An <svg> element to stand in a page among others: no prologue, no outside names, and ids of
    its own, which begin with `name`."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none", "font.size": 10}):
        figure.savefig(
            buffer,
            format="svg",
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    return re.sub(r'xlink:href="#', f'href="#{name}-', text)


def _notice(errors: Seq[PointError]) -> str:
    if not errors:
        return ""
    parts = [
        f"{error.error:+.0%} ({error.point.title})" for error in errors if error.quantity == "ttft"
    ]
    return (
        "Nothing here has run on an NPU. With these efficiencies the time to first token of the "
        f"published points in bfloat16 comes out at {' and '.join(parts)}. Times of a token "
        "after the prompt are a floor: published ones are ten times as long and more."
    )


def _facts(run: DryRun, prediction: Prediction, room: Fit) -> list[dict[str, str]]:
    tpot = prediction.tpot_seconds
    facts = [
        ("time to first token", f"{prediction.ttft_seconds:.3g} s", ""),
        ("a token after it, at least", "" if tpot is None else f"{tpot * 1e3:.3g} ms", ""),
        (
            f"of {room.usable_bytes / GIB:.1f} GiB usable on the fullest rank",
            f"{room.needed_bytes / GIB:.1f} GiB",
            "good" if room.fits else "bad",
        ),
        ("", "fits" if room.fits else "does not fit", "good" if room.fits else "bad"),
        ("ranks", f"{run.world_size}", ""),
        ("parameters", f"{run.num_parameters / 1e9:.1f} B", ""),
    ]
    return [{"name": n, "value": v, "style": s} for n, v, s in facts if v]


def _memory(run: DryRun, hardware: Hardware, room: Fit) -> _Section:
    rows = [
        [
            figures.named_ranks(rank.ranks),
            f"{rank.parameter_bytes / GIB:.2f}",
            f"{rank.kv_bytes / GIB:.2f}",
            f"{rank.peak_activation_bytes / GIB:.2f}",
            f"{rank.constant_bytes / GIB:.3f}",
            f"{rank.memory_bytes / GIB:.2f}",
        ]
        for rank in run.ranks
    ]
    columns = ["ranks", "parameters", "KV cache", "activations", "constants", "all"]
    return _Section(
        title="Memory of a rank, GiB",
        texts=[
            f"{'Fits' if room.fits else 'Does not fit'}: {room.reason}. What kernels and the "
            "communication library need inside is not counted; the unusable share stands for it."
        ],
        figure=svg(figures.draw_memory(run, hardware), "memory"),
        tables=[_Table(columns, columns[1:], rows)],
    )


def _time(predictions: Mapping[str, Prediction], own: Prediction) -> _Section:
    columns = ["", *SPLIT, "all"]
    rows = []
    for phase, scale, unit in (("prefill", 1.0, "s"), ("decode", 1e3, "ms")):
        split = own.split(phase)
        if phase == "decode" and own.tpot_seconds is None:
            continue
        cells = [f"{split[name] * scale:.3g}" for name in SPLIT]
        rows.append([f"{phase}, {unit}", *cells, f"{sum(split.values()) * scale:.3g}"])
    chunks = [step for step in own.steps if step.phase == "prefill"]
    tables = [_Table(columns, columns[1:], rows)]
    if len(chunks) > 1:
        names = ["cached tokens", "new tokens", "s", "attention, s"]
        shown = chunks if len(chunks) <= 12 else [*chunks[:6], *chunks[-6:]]
        steps = [
            [f"{c.start:,}", f"{c.new_tokens:,}", f"{c.seconds:.3g}", f"{c.split['attention']:.3g}"]
            for c in shown
        ]
        tables.append(_Table(names, names, steps))
    return _Section(
        title="Where the time goes",
        texts=[
            "Packing is what quantising and sorting for a collective costs. Launch is of operators "
            "and collectives; host is waiting for the device and comparing the ranks' plans."
        ],
        figure=svg(figures.draw_split(predictions), "split"),
        tables=tables,
    )


def _lengths(curves: Seq[Curve], crossovers: Seq[Crossover]) -> _Section:
    items = [
        f"from {c.prompt:,} tokens on {c.after} is the best, before {c.before}"
        + ("" if c.why == "faster" else ", which does not fit any longer")
        for c in crossovers
    ]
    return _Section(
        title="Time to first token over the prompt length",
        texts=[
            "Each topology with the largest chunks that fit; a line ends where none do."
            + ("" if items else " The best is the same at all of these lengths.")
        ],
        figure=svg(figures.draw_curves(curves, crossovers), "curves"),
        items=items,
    )


def _traffic(run: DryRun, prediction: Prediction) -> _Section:
    rows = []
    for step_phase in ("prefill", "decode"):
        totals: dict[tuple[str, ...], list[int]] = {}
        for step in run.ranks[0].steps:
            for count in step.collectives if step.phase == step_phase else ():
                link = prediction.links.get(count.group, "host")
                key = (count.kind, f"{count.group} ({count.group_size})", link, count.form)
                calls_bytes = totals.setdefault(key, [0, 0])
                calls_bytes[0] += count.total_calls
                calls_bytes[1] += count.total_bytes
        for key, (calls, num_bytes) in totals.items():
            rows.append([step_phase, *key, f"{calls:,}", f"{num_bytes / MIB:,.2f}"])
    columns = ["phase", "kind", "group (ranks)", "link", "form", "calls", "MiB received"]
    hidden = sum(step.hidden_seconds for step in prediction.steps if step.phase == "prefill")
    return _Section(
        title="Bytes that a rank receives",
        texts=[
            f"{hidden * 1e3:.3g} ms of the gathers of keys and values hide behind the query "
            "projection."
            if hidden
            else "No collective is hidden behind operators."
        ],
        figure=svg(figures.draw_bytes(run), "bytes"),
        tables=[_Table(columns, columns[-2:], rows)] if rows else [],
    )


def _layout(run: DryRun, hardware: Hardware) -> _Section:
    return _Section(
        title="Ranks on devices",
        texts=[
            "Equal colours are a TP group; equal tp numbers are a CP group. Rank r is on device r, "
            "so that TP ranks are neighbours. A group is as fast as its slowest link."
        ],
        figure=svg(figures.draw_layout(hardware, run.cp_size, run.tp_size), "layout"),
    )


def _search(result: SearchResult) -> _Section:
    columns = ["CP", "TP", "experts", "communication", "chunk", "TTFT, s", "a token, ms", "GiB"]
    rows = []
    for ranked in result.ranked[:30]:
        layout, tpot = ranked.candidate.layout, ranked.prediction.tpot_seconds
        rows.append(
            [
                str(layout.cp_size),
                str(layout.tp_size),
                layout.moe,
                ranked.candidate.comm_name,
                f"{ranked.candidate.chunk:,}",
                f"{ranked.prediction.ttft_seconds:.3f}",
                "" if tpot is None else f"{tpot * 1e3:.1f}",
                f"{ranked.fit.needed_bytes / GIB:.1f}",
            ]
        )
    refused = [
        [
            str(r.layout),
            "all" if r.candidate is None else f"{r.candidate.chunk:,}, {r.candidate.comm_name}",
            r.reason,
        ]
        for r in result.refused
    ]
    tables = [_Table(columns, [c for c in columns if c not in ("experts", "communication")], rows)]
    if refused:
        tables.append(_Table(["topology", "chunk, communication", "cannot run"], [], refused[:60]))
    return _Section(
        title=f"All candidates on {result.devices} devices",
        texts=[
            f"{len(rows)} of {len(result.ranked)} that can run, the fastest first"
            + (f"; and {len(refused[:60])} of {len(refused)} that cannot." if refused else ".")
        ],
        tables=tables,
    )


def _assumptions(run: DryRun, hardware: Hardware, efficiencies: Efficiencies) -> Iterator[_Section]:
    shares = [
        [
            name,
            f"{getattr(efficiencies, name):g}",
            efficiencies.unit(name),
            efficiencies.source(name)
            if getattr(efficiencies, name) == getattr(Efficiencies(), name)
            else "given",
        ]
        for name in Efficiencies.names()
    ]
    yield _Section(
        title="Efficiencies",
        tables=[_Table(["name", "value", "of what", "where from"], ["value"], shares)],
    )
    links = {
        f"{kind} link": f"{link.bytes_per_second / 1e9:g} GB/s"
        + (" from each peer" if link.per_peer else "")
        + (f", {link.latency_seconds * 1e6:g} us" if link.latency_seconds else "")
        for kind, link in hardware.links.items()
    }
    values = {
        "HBM": f"{hardware.hbm_bytes / GIB:g} GiB, of which {hardware.usable_share_of_hbm:.0%} are "
        "taken as usable",
        "HBM bandwidth": f"{hardware.hbm_bytes_per_second / 2**40:.2f} TiB/s",
        **{f"{dtype} peak": f"{p / 1e12:g} TFLOPS" for dtype, p in hardware.peak_flops.items()},
        **links,
    }
    yield _Section(
        title=f"Hardware: {hardware.title}",
        tables=[_Table(["of one device", ""], [], [[k, v] for k, v in values.items()])],
        items=[f"{what}: {source}" for what, source in hardware.sources.items()],
    )
    notes = [*run.warnings, *run.assumptions]
    if notes:
        yield _Section(title="Warnings and assumptions of the counts", items=notes)


def _comm(run: DryRun) -> str:
    """What of it is not the default."""
    default = dataclasses.asdict(CommConfig())
    changed: dict[str, Any] = {
        name: value
        for name, value in run.comm.items()
        if name in default and value != default[name] and value not in ((), [])
    }
    return ", ".join(f"{name}={value}" for name, value in changed.items()) or "exact"
