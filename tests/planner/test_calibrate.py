"""Calibration: known efficiencies come back from synthetic points; what cannot be fitted is
refused; published points are data with sources."""

from __future__ import annotations

import builtins
import dataclasses
import json
from functools import cache
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3cp.errors import InputError
from qwen3cp.planner.calibrate import (
    DEFAULT_FIT,
    Point,
    calibrate,
    evaluate,
    published_points,
    read_points,
    run_point,
)
from qwen3cp.planner.cost import predict
from qwen3cp.planner.counts import DryRun
from qwen3cp.planner.hardware import HARDWARE, Efficiencies, load_efficiencies

MODEL = "Qwen/Qwen3-30B-A3B"
WHERE = [(1, 4, 2048), (1, 4, 131072), (2, 2, 32768), (4, 1, 8192), (2, 4, 262144)]


def points_of(truth: Efficiencies, noise: float = 0.0) -> list[Point]:
    made = []
    for i, (cp, tp, prompt) in enumerate(WHERE):
        shape: dict[str, Any] = dict(model=MODEL, hardware="a3", cp=cp, tp=tp, prompt=prompt)
        run = runs()[i]
        found = predict(run, HARDWARE["a3"], truth)
        factor = 1 + noise * (-1) ** i
        assert found.tpot_seconds is not None
        made.append(
            Point(
                **shape,
                ttft_seconds=found.ttft_seconds * factor,
                tpot_seconds=found.tpot_seconds * factor,
            )
        )
    return made


@cache
def runs() -> list[DryRun]:
    return [
        run_point(
            Point(
                model=MODEL,
                hardware="a3",
                cp=cp,
                tp=tp,
                prompt=prompt,
                ttft_seconds=1.0,
                tpot_seconds=1.0,
            )
        )
        for cp, tp, prompt in WHERE
    ]


@settings(max_examples=10, deadline=None)
@given(
    attention=st.floats(0.2, 0.6),
    matmul=st.floats(0.25, 0.7),
    memory=st.floats(0.3, 0.8),
    launch=st.floats(2, 60),
)
def test_known_efficiencies_come_back(attention, matmul, memory, launch):
    truth = Efficiencies(attention=attention, matmul=matmul, memory=memory, launch_vector_us=launch)
    names = ("attention", "matmul", "memory", "launch_vector_us")
    found = calibrate(points_of(truth), names, runs=runs())
    for name in names:
        assert getattr(found.efficiencies, name) == pytest.approx(getattr(truth, name), rel=1e-3)
    assert all(abs(e.error) < 1e-4 for e in found.after)
    assert all(e is not None and abs(e.error) < 1e-2 for e in found.held_out)
    untouched = set(Efficiencies.names()) - set(names)
    assert all(getattr(found.efficiencies, n) == getattr(Efficiencies(), n) for n in untouched)


def test_noise_leaves_errors_and_no_point_decides_alone():
    found = calibrate(
        points_of(Efficiencies(attention=0.5), noise=0.05), ["attention"], runs=runs()
    )
    assert found.efficiencies.attention == pytest.approx(0.5, rel=0.06)
    for before, after, held_out in zip(found.before, found.after, found.held_out, strict=True):
        assert before.measured == after.measured
        assert held_out is not None
        assert abs(held_out.error) >= abs(after.error) - 1e-3
    squares = [sum(e.error**2 for e in errors) for errors in (found.before, found.after)]
    assert squares[1] < squares[0]


def test_bounds_hold():
    impossible = [
        dataclasses.replace(p, ttft_seconds=p.ttft_seconds / 20, tpot_seconds=None)
        for p in points_of(Efficiencies())
        if p.ttft_seconds
    ]
    found = calibrate(impossible, ["attention", "matmul"], runs=runs())
    assert found.efficiencies.attention == pytest.approx(1.0, abs=1e-3)
    assert any("attention = 1 is at its bound (0.05 to 1)" in w for w in found.warnings)


def test_fewer_times_than_efficiencies():
    few = [dataclasses.replace(p, tpot_seconds=None) for p in points_of(Efficiencies())[:2]]
    with pytest.raises(InputError, match="2 measured times cannot determine 3 efficiencies"):
        calibrate(few, DEFAULT_FIT, runs=runs()[:2])
    found = calibrate(few, ["attention", "matmul"], runs=runs()[:2])
    assert any("as many efficiencies" in w for w in found.warnings)
    assert found.held_out == (None, None)


def test_what_no_point_depends_on():
    with pytest.raises(InputError, match="no measured time depends on link_network"):
        calibrate(points_of(Efficiencies()), ["link_network"], runs=runs())


def test_what_the_points_do_not_tell_apart():
    """One prompt, one topology: only the sum of the parts is seen."""
    same = [points_of(Efficiencies())[1]] * 3
    found = calibrate(same, ["attention", "matmul"], runs=[runs()[1]] * 3, observe="ttft")
    assert any("hardly tell" in w for w in found.warnings)


@pytest.mark.parametrize("names", [[], ["attenton"], ["attention", "attention"]])
def test_names_are_checked(names):
    with pytest.raises(InputError, match="cannot be fitted"):
        calibrate(points_of(Efficiencies()), names, runs=runs())


def test_extrapolations_and_assumptions_are_not_fitted():
    given = points_of(Efficiencies(attention=0.5))
    odd = dataclasses.replace(given[0], ttft_seconds=1e6)
    mixed = [
        *given,
        dataclasses.replace(odd, weights="w8a8"),
        dataclasses.replace(odd, assumed="the model"),
    ]
    found = calibrate(mixed, ["attention"], runs=[*runs(), runs()[0], runs()[0]])
    assert found.efficiencies.attention == pytest.approx(0.5, rel=1e-3)
    assert len(found.after) == 2 * len(given)
    with pytest.raises(InputError, match="0 measured times"):
        calibrate(mixed[-2:], ["attention"], runs=[runs()[0], runs()[0]])


def test_without_scipy(monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("scipy"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(InputError, match=r"pip install 'qwen3cp\[calibrate\]'"):
        calibrate(points_of(Efficiencies()), ["attention"], runs=runs())


def test_result_is_usable(tmp_path):
    found = calibrate(points_of(Efficiencies(attention=0.4)), ["attention"], runs=runs())
    file = tmp_path / "found.json"
    file.write_text(json.dumps(found.to_dict()))
    assert load_efficiencies(file) == found.efficiencies
    from rich.console import Console

    console = Console(width=160, record=True, file=open("/dev/null", "w"))
    console.print(found.to_table())
    text = console.export_text()
    assert "attention = 0.4" in text and "held out" in text


# ----------------------------------------------------------------------------------------- files


def test_json_and_csv_hold_the_same(tmp_path):
    rows = [
        dict(model=MODEL, hardware="a3", cp=2, tp=2, prompt=4096, ttft_seconds=0.5),
        dict(model=MODEL, hardware="a2", tp=4, prompt=8192, tpot_seconds=0.05, kv_gather="int8"),
    ]
    (tmp_path / "points.json").write_text(json.dumps({"points": rows}))
    columns = sorted({name for row in rows for name in row})
    lines = [",".join(columns)]
    lines += [",".join(str(row.get(name, "")) for name in columns) for row in rows]
    (tmp_path / "points.csv").write_text("\n".join(lines) + "\n")
    from_json = read_points(tmp_path / "points.json")
    assert from_json == read_points(str(tmp_path / "points.csv"))
    assert from_json == [Point(**cast(dict[str, Any], row)) for row in rows]
    assert from_json[1].comm.kv_gather == "int8"
    assert from_json[0].title == "Qwen3-30B-A3B, a3, CP 2 x TP 2, 4,096 tokens"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{}", "no points"),
        ('{"points": [1]}', "point 0 is a int"),
        ('{"points": [{"model": "x", "hardware": "a3"}]}', "missing .*prompt"),
        ('{"points": [{"model": "x", "hardware": "a3", "prompt": 8, "ttft": 1}]}', "ttft"),
        ('{"points": [{"model": "x", "hardware": "a3", "prompt": 8}]}', "ttft_seconds or"),
        ('{"points": [{"model": "x", "hardware": "b9", "prompt": 8, "ttft_seconds": 1}]}', "b9"),
        (
            '{"points": [{"model": "x", "hardware": "a3", "prompt": 0, "ttft_seconds": 1}]}',
            "prompt",
        ),
        ('{"points": [{"model": "x", "hardware": "a3", "prompt": 8, "ttft_seconds": -1}]}', "-1"),
        ("[", "cannot be read"),
    ],
)
def test_files_are_checked(tmp_path, text, named):
    file = tmp_path / "points.json"
    file.write_text(text)
    with pytest.raises(InputError, match=named):
        read_points(file)


@pytest.mark.parametrize(
    "text", ["model,prompt\nx\n", "model,prompt,hardware,ttft_seconds\nx,many,a3,1\n"]
)
def test_csv_is_checked(tmp_path, text):
    file = tmp_path / "points.csv"
    file.write_text(text)
    with pytest.raises(InputError, match="points.csv"):
        read_points(file)


# ------------------------------------------------------------------------------------- published


def test_published_points_have_sources_and_marks():
    points = published_points()
    assert all(p.source and p.mark and p.note for p in points)
    fitted = [p for p in points if p.is_fitted]
    assert [(p.cp, p.tp, p.prompt, p.ttft_seconds) for p in fitted] == [
        (1, 4, 256000, 58.04),
        (2, 2, 256000, 49.53),
    ]
    assert {p.hardware for p in points} == {"a2", "a3"}
    assert any(p.weights == "w8a8" and p.ttft_seconds == 17.36 for p in points)


def test_one_set_of_efficiencies_is_near_the_published_points():
    """Not fitted: the defaults. The worst of the two is what the documentation says."""
    points = [p for p in published_points() if p.is_fitted]
    errors = [e.error for e in evaluate(points, observe="ttft")]
    assert [round(100 * e) for e in errors] == [1, 15]
    w8a8 = [p for p in published_points() if p.ttft_seconds == 17.36]
    assert abs(evaluate(w8a8)[0].error) < 0.05
