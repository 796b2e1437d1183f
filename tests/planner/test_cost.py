"""From counts to seconds: by hand on counts that are written down, in trends on real dry runs."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3cp.errors import InputError
from qwen3cp.parallel import CommConfig
from qwen3cp.planner.cost import SPLIT, fit, group_links, predict
from qwen3cp.planner.dry_run import dry_run
from qwen3cp.planner.hardware import HARDWARE, Efficiencies
from qwen3cp.planner.models import known_config
from tests.planner.samples import SMALL, collective, operator, run_of, step

A2, A3 = HARDWARE["a2"], HARDWARE["a3"]
BARE = Efficiencies(
    attention=1.0,
    matmul=0.5,
    memory=0.25,
    link_package=0.5,
    link_node=0.5,
    link_network=0.5,
    launch_matmul_us=0,
    launch_vector_us=0,
    launch_collective_us=0,
    host_sync_us=0,
)
HBM = A3.hbm_bytes_per_second


def split_of(*operators, collectives=(), efficiencies=BARE, hardware=A3, **fields):
    counted = step(operators=tuple(operators), collectives=tuple(collectives), **fields)
    prediction = predict(run_of(counted), hardware, efficiencies)
    found = prediction.split()
    assert sum(found.values()) == pytest.approx(prediction.ttft_seconds)
    return {name: seconds for name, seconds in found.items() if seconds}


# --------------------------------------------------------------------------------------- by hand


def test_products_or_memory_whichever_takes_longer():
    assert split_of(operator(flops=354 * 10**12)) == {"linear": pytest.approx(2 * 2.0)}
    wide = operator(flops=10**9, bytes_read=int(HBM / 4), bytes_written=int(HBM / 4))
    assert split_of(wide) == {"linear": pytest.approx(2 * 2.0)}
    assert split_of(operator(part="norms", bytes_read=int(HBM / 4))) == {
        "vector": pytest.approx(2 * 1.0)
    }


def test_parts():
    found = split_of(
        operator(part="attention", flops=354 * 10**12, layers=(1,)),
        operator(part="communication", bytes_written=int(HBM / 4), layers=()),
    )
    assert found == {"attention": pytest.approx(1.0), "packing": pytest.approx(1.0)}


def test_a_collective_takes_its_bytes_over_its_link():
    sum_of_two = collective(bytes=112 * 10**9, calls=3)
    assert split_of(collectives=[sum_of_two]) == {"collectives": pytest.approx(2 * 3 * 1.0)}
    assert split_of(collectives=[sum_of_two], hardware=A2) == {
        "collectives": pytest.approx(2 * 3 * 8.0)  # 28 GB/s
    }


def test_launches_and_waits_are_counted():
    launches = dataclasses.replace(
        BARE, launch_matmul_us=5, launch_vector_us=2, launch_collective_us=10, host_sync_us=100
    )
    found = split_of(
        operator(flops=1, calls=3),
        operator(part="attention", flops=1),
        operator(part="norms"),
        collectives=[collective(), collective(group="host", kind="check", layers=())],
        host_reads=2,
        efficiencies=launches,
    )
    assert found["launch"] == pytest.approx(2 * (3 * 5 + 5 + 2 + 10) * 1e-6)
    assert found["host"] == pytest.approx(3 * 100e-6)


@pytest.mark.parametrize(("beside", "exposed"), [(0.0, 1.0), (0.25, 0.75), (3.0, 0.0)])
def test_the_gather_hides_behind_what_runs_beside_it(beside, exposed):
    """Layer by layer: a layer without operators beside its gather hides nothing."""
    gather = collective(
        kind="kv_gather", group="cp", bytes=112 * 10**9, asynchronous=True, layers=(0, 1)
    )
    query = operator(flops=int(beside * 177e12), layers=(0,), overlaps="kv_gather")
    run = run_of(step(operators=(query,), collectives=(gather,)), cp_size=2, tp_size=1)
    prediction = predict(run, A3, BARE)
    assert prediction.split()["collectives"] == pytest.approx(exposed + 1.0)
    assert prediction.steps[0].hidden_seconds == pytest.approx(1 - exposed)
    half = predict(run, A3, dataclasses.replace(BARE, overlap=0.5))
    assert half.split()["collectives"] == pytest.approx(2 - 0.5 * (1 - exposed))
    blocking = dataclasses.replace(gather, asynchronous=False)
    run = run_of(step(operators=(query,), collectives=(blocking,)), cp_size=2, tp_size=1)
    assert predict(run, A3, BARE).split()["collectives"] == pytest.approx(2.0)


def test_the_slowest_rank_counts_in_each_step():
    quick, slow = (operator(flops=n * 354 * 10**12, layers=()) for n in (1, 2))
    one = run_of(step(operators=(quick,)), step(operators=(slow,), phase="decode"))
    first = one.ranks[0]
    second = dataclasses.replace(
        first,
        ranks=(2,),
        steps=(step(operators=(slow,)), step(operators=(quick,), phase="decode")),
    )
    prediction = predict(dataclasses.replace(one, ranks=(first, second)), A3, BARE)
    assert prediction.ttft_seconds == pytest.approx(4.0)
    assert prediction.tpot_seconds == pytest.approx(4.0)
    assert [s.slowest_rank for s in prediction.steps] == [2, 0]


def test_chunks_are_added_up_and_decode_steps_averaged():
    seconds = [operator(flops=n * 177 * 10**12, layers=()) for n in (1, 2, 3, 5)]
    chunks = [step(operators=(x,)) for x in seconds[:2]]
    tokens = [step(operators=(x,), phase="decode") for x in seconds[2:]]
    prediction = predict(run_of(*chunks, *tokens), A3, BARE)
    assert prediction.ttft_seconds == pytest.approx(3.0)
    assert prediction.tpot_seconds == pytest.approx(4.0)
    assert predict(run_of(*chunks), A3, BARE).tpot_seconds is None


def test_uneven_experts_take_longer_only_if_they_are_divided():
    experts = operator(part="experts", flops=177 * 10**12, layers=())
    uneven = dataclasses.replace(BARE, expert_imbalance=1.5)
    for moe, expected in (("tp", 1.0), ("ep", 1.5)):
        run = run_of(step(operators=(experts,)), moe=moe)
        assert predict(run, A3, uneven).ttft_seconds == pytest.approx(expected)


def test_w8a8_is_extrapolated_in_products_alone():
    counted = [
        operator(flops=354 * 10**12, layers=()),
        operator(part="attention", flops=354 * 10**12, layers=()),
        operator(part="router", flops=354 * 10**12, layers=()),
    ]
    run = run_of(step(operators=tuple(counted)))
    found = predict(run, A3, BARE, matmul_dtype="int8").split()
    assert found["linear"] == pytest.approx(2 * 354 / 752 + 2)
    assert found["attention"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("hardware", "cp", "tp", "links"),
    [
        (A3, 1, 1, {}),
        (A3, 2, 2, {"cp": "node", "tp": "package", "world": "node"}),
        (A3, 8, 2, {"cp": "node", "tp": "package", "world": "node"}),
        (A3, 2, 1, {"cp": "package", "world": "package"}),
        (A3, 4, 8, {"cp": "network", "tp": "node", "world": "network"}),
        (A2, 2, 4, {"cp": "node", "tp": "node", "world": "node"}),
        (A2, 1, 16, {"tp": "network", "world": "network"}),
        (A2, 4, 6, {"cp": "network", "tp": "network", "world": "network"}),  # 6-11 straddle
    ],
)
def test_links_of_the_groups(hardware, cp, tp, links):
    assert group_links(hardware, cp, tp) == links


def test_memory_against_the_limit():
    run = run_of(step(peak_activation_bytes=840))
    exact = dataclasses.replace(A3, hbm_bytes=1000, usable_share_of_hbm=1.0)
    assert fit(run, exact).fits
    small = dataclasses.replace(exact, hbm_bytes=999)
    refused = fit(run, small)
    assert not refused.fits and refused.needed_bytes == 1000 and refused.usable_bytes == 999
    room = fit(run_of(step(peak_activation_bytes=2**37)), A3)
    assert "needs 128.0 GiB" in room.reason and "57.6 of 64.0 GiB are usable" in room.reason
    assert json.loads(json.dumps(room.to_dict()))["fits"] is False


def test_json_and_units():
    run = run_of(step(operators=(operator(flops=10**12),)), step(phase="decode"))
    document = json.loads(json.dumps(predict(run, A3).to_dict()))
    assert document["predicted"] is True
    assert set(document["ttft_split"]) == set(SPLIT)
    assert sum(document["ttft_split"].values()) == pytest.approx(document["ttft_seconds"])
    assert document["efficiencies"] == Efficiencies().to_dict()
    with pytest.raises(InputError, match="float32"):
        predict(dataclasses.replace(run, dtype="float32"), A3)


# ---------------------------------------------------------------------------------------- trends

counts = st.integers(0, 10**15)


@given(
    flops=counts,
    read=counts,
    sent=counts,
    more=st.integers(0, 10**15),
    part=st.sampled_from(["attention", "projections", "experts", "norms", "communication"]),
)
def test_more_of_anything_never_takes_less(flops, read, sent, more, part):
    def seconds(flops, read, sent):
        counted = step(
            operators=(operator(part=part, flops=flops, bytes_read=read),),
            collectives=(collective(bytes=sent),),
        )
        return predict(run_of(counted), A3).ttft_seconds

    before = seconds(flops, read, sent)
    assert seconds(flops + more, read, sent) >= before
    assert seconds(flops, read + more, sent) >= before
    assert seconds(flops, read, sent + more) >= before


@settings(max_examples=50)
@given(st.data())
def test_a_higher_share_never_takes_longer(data):
    name = data.draw(st.sampled_from(Efficiencies.names()))
    low, high = Efficiencies.bounds(name)
    a, b = sorted(data.draw(st.tuples(*[st.floats(low, high)] * 2)))
    counted = step(
        operators=(
            operator(part="attention", flops=10**13, overlaps="kv_gather"),
            operator(part="experts", flops=10**13),
            operator(part="norms", bytes_read=10**9),
        ),
        collectives=(
            collective(bytes=10**9),
            collective(kind="kv_gather", group="cp", bytes=10**9, asynchronous=True),
        ),
        host_reads=1,
    )
    run = run_of(counted, cp_size=2, moe="ep")
    less, more = (predict(run, A3, Efficiencies(**{name: x})).ttft_seconds for x in (a, b))
    grows = name.endswith("_us") or name == "expert_imbalance"
    assert less <= more if grows else less >= more


@pytest.mark.parametrize(("cp", "tp"), [(1, 2), (2, 1), (2, 2)])
def test_trends_of_dry_runs(cp, tp):
    """Longer prompts take longer, a further cached token does too, and chunks change no FLOPs."""
    settings: dict[str, Any] = dict(cp_size=cp, tp_size=tp, layers="distinct", ranks="busiest")
    times = []
    for prompt in (100, 1000, 10_000, 100_000):
        prediction = predict(dry_run(SMALL, prompt=prompt, **settings), A3)
        assert prediction.tpot_seconds is not None
        times.append((prediction.ttft_seconds, prediction.tpot_seconds))
    assert times == sorted(times)
    whole, chunked = (dry_run(SMALL, prompt=4096, chunk=n, **settings) for n in (4096, 512))
    attention = [
        sum(x.total_flops for s in run.ranks[0].steps for x in s.operators if x.part == "attention")
        for run in (whole, chunked)
    ]
    assert attention[0] == pytest.approx(attention[1], rel=1e-3)


def test_more_devices_in_a_group_receive_more_and_compute_less():
    large = known_config("Qwen3-30B-A3B")
    assert large is not None
    splits = [
        predict(
            dry_run(large, prompt=32768, cp_size=cp, layers="distinct", ranks="busiest"), A3
        ).split()
        for cp in (1, 2, 4, 8)
    ]
    for name in ("attention", "linear", "vector"):
        assert [s[name] for s in splits] == sorted((s[name] for s in splits), reverse=True)
    # by formula: (C-1)/C * T * 2 * Hkv * d * 2 bytes a layer
    run = dry_run(large, prompt=131072, cp_size=4, tp_size=4, layers="distinct", ranks="busiest")
    (gather,) = (x for x in run.ranks[0].steps[0].collectives if x.kind == "kv_gather")
    assert gather.bytes == 3 * 131072 // 4 * 2 * 128 * 2


def test_int8_costs_passes_over_memory_and_saves_bytes():
    """As many bytes for each value of a two-step sum as docs/int8-communication.md says."""
    large = known_config("Qwen3-30B-A3B")
    assert large is not None
    settings: dict[str, Any] = dict(
        prompt=65536, tp_size=4, layers="distinct", ranks="busiest", decode=False
    )
    exact = dry_run(large, **settings)
    comm = CommConfig(all_reduce="int8_two_step", group_size=128)
    int8 = dry_run(large, comm=comm, **settings)
    splits = [predict(run, A3).split() for run in (exact, int8)]
    assert splits[0]["packing"] == 0
    assert splits[1]["collectives"] == pytest.approx(0.52 * splits[0]["collectives"], rel=0.02)
    values = 2 * 48 * 65536 * 2048
    passes = splits[1]["packing"] * A3.hbm_bytes_per_second * 0.6 / values
    assert passes == pytest.approx(47 + 13 / 4, rel=0.02)
    assert splits[1]["attention"] == splits[0]["attention"]


def test_bfloat16_only():
    run = dry_run(SMALL, prompt=8, dtype=torch.float32)
    with pytest.raises(InputError, match="float32: choose one of bfloat16"):
        predict(run, A3)
