"""Hardware tables and efficiencies: their figures, links, units and refusals."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3cp.errors import InputError
from qwen3cp.planner.hardware import (
    HARDWARE,
    LINK_KINDS,
    Efficiencies,
    Link,
    load_efficiencies,
    load_hardware,
)

A2, A3, SUPER = HARDWARE["a2"], HARDWARE["a3"], HARDWARE["a3-supernode"]


def test_figures_have_units_and_sources():
    for hardware in HARDWARE.values():
        assert hardware.hbm_bytes == 64 * 2**30
        assert hardware.hbm_bytes_per_second == pytest.approx(1.6 * 2**40, rel=1e-6)
        assert hardware.peak("bfloat16") == 354e12
        assert hardware.usable_bytes == int(0.9 * 64 * 2**30)
        named = " ".join(hardware.sources)
        for field in ("hbm_bytes", "peak_flops", "usable_share_of_hbm", "links"):
            assert field in named
        assert all(hardware.sources.values())
    for name in Efficiencies.names():
        assert Efficiencies.source(name) and Efficiencies.unit(name)


@pytest.mark.parametrize(
    ("ranks", "a2", "a3"),
    [
        ([0, 1], "node", "package"),
        ([1, 2], "node", "node"),
        ([0, 7], "node", "node"),
        ([0, 8], "network", "node"),
        ([0, 4, 8, 12], "network", "node"),
        ([15, 16], "network", "network"),
        (range(32), "network", "network"),
    ],
)
def test_link_of_a_group(ranks, a2, a3):
    assert A2.link_of(list(ranks)) == a2
    assert A3.link_of(list(ranks)) == a3


def test_rates():
    assert A2.links["node"].rate(8) == 196e9  # a mesh: seven links of 28 GB/s
    assert A2.links["node"].rate(2) == 28e9
    assert A3.links["node"].rate(2) == A3.links["node"].rate(16) == 196e9
    assert SUPER.links["network"].bytes_per_second == 8 * A3.links["network"].bytes_per_second
    assert SUPER.links["package"] == A3.links["package"]


@given(st.lists(st.integers(0, 63), min_size=1), st.integers(0, 63))
def test_a_larger_group_has_no_faster_link(ranks, another):
    order = list(LINK_KINDS)
    for hardware in HARDWARE.values():
        less, more = hardware.link_of(ranks), hardware.link_of([*ranks, another])
        if hardware.devices_per_package == 1 and "package" in (less, more):
            continue  # one device, which has no link
        assert order.index(less) <= order.index(more)


def test_own_hardware_takes_the_rest_from_its_base(tmp_path):
    file = tmp_path / "bin3.json"
    peaks = {"bfloat16": 295e12}
    file.write_text(json.dumps({"base": "a2", "title": "lower bin", "peak_flops": peaks}))
    own = load_hardware(str(file))
    assert own == dataclasses.replace(A2, name="bin3", title="lower bin", peak_flops=peaks)
    whole = own.to_dict() | {"links": {k: dataclasses.asdict(x) for k, x in own.links.items()}}
    del whole["name"]
    file.write_text(json.dumps(whole))
    assert load_hardware(str(file)) == own
    assert load_hardware("a3") is A3


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"base": "h100"}, "h100"),
        ({"base": "a3", "flops": 1}, "flops"),
        ({"title": "x"}, "missing"),
        ({"base": "a3", "hbm_bytes": 0}, "positive"),
        ({"base": "a3", "usable_share_of_hbm": 1.5}, "at most 1"),
        ({"base": "a3", "devices_per_node": 15}, "multiple"),
        ({"base": "a3", "links": {"node": {"bytes_per_second": 1e9}}}, "package"),
        ({"base": "a3", "links": {"node": {"speed": 1e9}}}, "speed"),
        ({"base": "a3", "peak_flops": {"bfloat16": "fast"}}, "bad.json"),
    ],
)
def test_own_hardware_is_checked(tmp_path, values, named):
    file = tmp_path / "bad.json"
    file.write_text(json.dumps(values))
    with pytest.raises(InputError, match=named):
        load_hardware(str(file))


def test_what_there_is_not(tmp_path):
    with pytest.raises(InputError, match="'h100' is not known: choose one of a2, a3, a3-supernode"):
        load_hardware("h100")
    with pytest.raises(InputError, match="cannot be read"):
        load_hardware(str(tmp_path / "none.json"))
    with pytest.raises(InputError, match="float32"):
        A3.peak("float32")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(InputError, match="JSON object"):
        load_hardware(str(tmp_path / "list.json"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attention", 0.0),
        ("attention", 1.2),
        ("matmul", "half"),
        ("memory", True),
        ("overlap", -0.1),
        ("expert_imbalance", 0.5),
        ("launch_vector_us", float("nan")),
    ],
)
def test_efficiencies_have_bounds(name, value):
    with pytest.raises(InputError, match=name):
        Efficiencies(**{name: value})


def test_efficiencies_in_files(tmp_path):
    file = tmp_path / "efficiencies.json"
    file.write_text('{"attention": 0.4}')
    assert load_efficiencies(file) == Efficiencies(attention=0.4)
    file.write_text(json.dumps({"efficiencies": Efficiencies(matmul=0.6).to_dict(), "fitted": []}))
    assert load_efficiencies(str(file)) == Efficiencies(matmul=0.6)
    assert load_efficiencies(None) == Efficiencies()
    file.write_text('{"attenton": 0.4}')
    with pytest.raises(InputError, match="attenton is no efficiency"):
        load_efficiencies(file)


def test_links_are_on_paper():
    link = Link(bytes_per_second=10.0, per_peer=True)
    assert link.rate(4) == 30.0
