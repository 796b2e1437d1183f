"""The HTML page: it stands alone, it is well formed, and its numbers are those of the plan."""

from __future__ import annotations

import builtins
import dataclasses
import re
from html.parser import HTMLParser
from typing import Any, cast

import pytest

from qwen3cp.errors import InputError
from qwen3cp.parallel import CommConfig
from qwen3cp.planner import figures
from qwen3cp.planner.calibrate import PointError, published_points
from qwen3cp.planner.cost import fit, predict
from qwen3cp.planner.dry_run import dry_run
from qwen3cp.planner.hardware import HARDWARE, Efficiencies
from qwen3cp.planner.report import render, svg, write_html
from qwen3cp.planner.search import search
from tests.planner.samples import SMALL

A3 = HARDWARE["a3"]
ERRORS = [PointError(point=published_points()[0], quantity="ttft", measured=2.0, predicted=2.5)]
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Checker(HTMLParser):
    """Every tag is closed, in order; ids are unique; what is referred to is in the page."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.referred: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        for name, value in attrs:
            if name == "id":
                self.ids.append(str(value))
            if name in ("href", "src", "xlink:href", "action", "data"):
                self.referred.append(str(value))
            self.referred += re.findall(r"url\((.*?)\)", value or "")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def check(page: str) -> str:
    """The text of a page that stands alone."""
    checker = Checker()
    checker.feed(page)
    assert not checker.open
    assert len(set(checker.ids)) == len(checker.ids)
    assert all(r.startswith("#") and r[1:] in checker.ids for r in checker.referred)
    assert not re.search(r"https?:|//[a-z]|@import|<script|<link|<img", page)
    return " ".join(" ".join(checker.text).split())


@pytest.fixture(scope="module")
def run():
    comm = CommConfig(skip_layers=[1], all_reduce="int8_two_step", group_size=128)
    return dry_run(
        SMALL, model="small", prompt=2000, chunk=512, cp_size=2, tp_size=2, moe="ep", comm=comm
    )


@pytest.fixture(scope="module")
def page(run):
    return render(
        config=SMALL,
        run=run,
        hardware=A3,
        efficiencies=Efficiencies(attention=0.4),
        result=None,
        errors=ERRORS,
    )


def test_the_page_of_a_plan(page, run):
    text = check(page)
    prediction = predict(run, A3, Efficiencies(attention=0.4))
    assert prediction.tpot_seconds is not None
    room = fit(run, A3)
    assert f"{prediction.ttft_seconds:.3g} s" in text
    assert f"{prediction.tpot_seconds * 1e3:.3g} ms" in text
    assert room.reason in text
    assert "Predicted, not measured" in text and "+25%" in text
    assert "all_reduce=int8_two_step" in text
    assert page.count("<svg") == 5
    for title in ("Memory of a rank", "time goes", "prompt length", "Bytes", "Ranks on devices"):
        assert title in text
    for name in Efficiencies.names():
        assert name in text
    for source in A3.sources.values():
        assert source in text
    for rank in run.ranks:
        assert figures.named_ranks(rank.ranks) in text
    for note in (*run.warnings, *run.assumptions):
        assert note in text


def test_the_page_of_a_search(tmp_path):
    found = search(SMALL, A3, devices=2, prompt=256, chunks=[], lengths=[64, 256], model="small")
    best = found.ranked[0].candidate
    run = dry_run(
        SMALL,
        model="<b>small</b> & co",
        prompt=256,
        cp_size=best.layout.cp_size,
        tp_size=best.layout.tp_size,
        moe=best.layout.moe,
        comm=best.comm,
    )
    text = check(
        render(
            config=SMALL,
            run=run,
            hardware=A3,
            efficiencies=Efficiencies(),
            result=found,
            errors=[],
        )
    )
    assert "<b>small</b> & co" in text  # as text
    assert f"of {len(found.ranked)} that can run" in text
    assert f"{found.ranked[0].prediction.ttft_seconds:.3f}" in text
    for ranked in found.best_of_layouts:
        assert str(ranked.candidate.layout) in text


def test_one_rank(tmp_path):
    run = dry_run(SMALL, prompt=64, decode=False)
    file = tmp_path / "one.html"
    write_html(file, config=SMALL, run=run, hardware=HARDWARE["a2"])
    text = check(file.read_text())
    assert "nothing travels" in text and "one rank, no groups" in text
    assert "+1%" in text and "+15%" in text  # the published points, with the defaults


def test_figures_have_units_and_limits(run):
    axes = figures.draw_memory(run, A3).axes[0]
    assert "GiB" in axes.get_xlabel()
    lines = {round(cast(Any, line).get_xdata()[0], 1) for line in axes.lines}
    assert {57.6, 64.0} <= lines
    prediction = predict(run, A3)
    assert prediction.tpot_seconds is not None
    left, right = figures.draw_split({"x": prediction}).axes
    assert left.get_xlabel().endswith(", s") and right.get_xlabel().endswith(", ms")
    width = sum(cast(Any, bar).get_width() for bar in left.patches)
    assert width == pytest.approx(prediction.ttft_seconds)
    assert sum(cast(Any, bar).get_width() for bar in right.patches) == pytest.approx(
        prediction.tpot_seconds * 1e3
    )
    totals = figures.layer_bytes(run.ranks[0].steps, "prefill")
    sent = sum(sum(layers.values()) for layers in totals.values())
    assert sent == sum(
        c.total_bytes
        for s in run.ranks[0].steps
        if s.phase == "prefill"
        for c in s.collectives
        if c.layers
    )
    assert any("int8" in name for name in totals) and any("int8" not in name for name in totals)


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (4, 4), (2, 12), (8, 4), (3, 5)])
def test_every_rank_is_on_a_device(shape):
    cp, tp = shape
    for hardware in HARDWARE.values():
        figure = figures.draw_layout(hardware, cp, tp)
        texts = [t.get_text() for t in figure.axes[0].texts]
        assert sum(t.startswith("rank ") for t in texts) == cp * tp
        assert {f"cp {c}  tp {t}" for c in range(cp) for t in range(tp)} <= set(texts)
        nodes = -(-cp * tp // hardware.devices_per_node)
        assert sum(t.startswith("node ") for t in texts) == nodes


def test_an_svg_keeps_to_itself():
    figure = figures.draw_layout(A3, 2, 2)
    one, again, other = svg(figure, "a"), svg(figure, "a"), svg(figure, "b")
    assert one == again and one.startswith("<svg") and one.rstrip().endswith("</svg>")
    ids = [set(re.findall(r'\bid="(.*?)"', text)) for text in (one, other)]
    assert ids[0] and not ids[0] & ids[1]


def test_names():
    assert figures.named_ranks((3,)) == "rank 3"
    assert figures.named_ranks((0, 1, 2, 5)) == "ranks 0-2, 5"
    assert figures.named_ranks(tuple(range(0, 40, 2))) == "ranks 0, 2, 4, 6, ... (20 in all)"
    assert [figures.tokens(n) for n in (1000, 8192, 131072, 2**20)] == ["1,000", "8k", "128k", "1M"]


def test_without_matplotlib(tmp_path, monkeypatch, run):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(InputError, match=r"pip install 'qwen3cp\[plot\]'"):
        write_html(tmp_path / "x.html", config=SMALL, run=run, hardware=A3)
    assert not list(tmp_path.iterdir())


def test_where_it_cannot_be_written(tmp_path):
    run = dry_run(SMALL, prompt=8, decode=False)
    with pytest.raises(InputError, match="cannot be written"):
        write_html(tmp_path / "no" / "x.html", config=SMALL, run=run, hardware=A3)


def test_too_large_is_said():
    small = dataclasses.replace(A3, hbm_bytes=2**20)
    run = dry_run(SMALL, prompt=64, decode=False)
    text = check(
        render(
            config=SMALL,
            run=run,
            hardware=small,
            efficiencies=Efficiencies(),
            result=None,
            errors=[],
        )
    )
    assert "does not fit" in text
