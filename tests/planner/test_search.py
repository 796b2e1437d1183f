"""The search against every candidate tried by hand; refusals; crossovers."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3cp.errors import InputError
from qwen3cp.parallel import CommConfig
from qwen3cp.planner.cost import fit, predict
from qwen3cp.planner.dry_run import dry_run
from qwen3cp.planner.hardware import HARDWARE, Efficiencies
from qwen3cp.planner.interpolation import between
from qwen3cp.planner.models import KNOWN_MODELS, known_config, read_model
from qwen3cp.planner.search import (
    RESOLUTION,
    Candidate,
    Layout,
    candidates,
    compare,
    layouts,
    search,
)
from tests.planner.samples import SMALL, operator, run_of, step

A3 = HARDWARE["a3"]
LENGTHS = (64, 512, 4096, 32768)


@pytest.fixture(scope="module")
def found():
    return search(SMALL, A3, devices=2, prompt=4096, model="small", chunks=[1024], lengths=LENGTHS)


def test_the_ranking_is_that_of_all_candidates_tried_by_hand(found):
    times, models = {}, {}
    for (cp, tp), moe, chunk in itertools.product([(1, 2), (2, 1)], ("tp", "ep"), (4096, 1024)):
        sums = ["exact"] if tp == 1 else ["exact", "int8_one_shot"]
        gathers = ["exact", "int8"] if cp > 1 else ["exact"]
        exchanges = [("auto", "exact")]
        if moe == "ep":
            exchanges = list(itertools.product(("all_gather", "all_to_all"), ("exact", "int8")))
            if cp == 1:
                exchanges.remove(("all_gather", "int8"))  # no row travels
        for reduce, gather, (exchange, rows) in itertools.product(sums, gathers, exchanges):
            comm = CommConfig(
                all_reduce=cast(Any, reduce),
                group_size=None if reduce == "exact" else 128,
                kv_gather=cast(Any, gather),
                exchange=cast(Any, exchange),
                exchange_rows=cast(Any, rows),
            )
            run = dry_run(
                SMALL,
                prompt=4096,
                cp_size=cp,
                tp_size=tp,
                moe=moe,
                comm=comm,
                chunk=chunk,
                models=models,
            )
            assert fit(run, A3).fits
            prediction = predict(run, A3)
            key = (cp, tp, moe, chunk, comm)
            times[key] = prediction.ttft_seconds, prediction.tpot_seconds
    ranked = {
        (
            r.candidate.layout.cp_size,
            r.candidate.layout.tp_size,
            r.candidate.layout.moe,
            r.candidate.chunk,
            r.candidate.comm,
        ): (r.prediction.ttft_seconds, r.prediction.tpot_seconds)
        for r in found.ranked
    }
    assert len(ranked) == len(found.ranked)
    assert ranked.keys() == times.keys()
    for key, (ttft, tpot) in times.items():
        assert ranked[key][0] == pytest.approx(ttft, rel=1e-6)
        assert ranked[key][1] == pytest.approx(tpot, rel=1e-6)
    order = [r.prediction.ttft_seconds for r in found.ranked]
    assert order == sorted(order)


def test_bests_and_curves(found):
    assert not found.refused
    best = found.best_of_layouts
    assert best[0] is found.ranked[0]
    assert {r.candidate.layout for r in best} == set(layouts(2)) == {c.layout for c in found.curves}
    for curve in found.curves:
        assert curve.prompts == LENGTHS
        assert list(curve.seconds) == sorted(curve.seconds)
        own = next(r for r in best if r.candidate.layout == curve.layout)
        at_prompt = curve.seconds[LENGTHS.index(4096)]
        assert at_prompt <= own.prediction.ttft_seconds * 1.5


def test_the_best_by_crossovers_is_the_best_of_the_curves(found):
    for i, prompt in enumerate(LENGTHS):
        times = {c.layout: c.seconds[i] for c in found.curves}
        first = (
            found.crossovers[0].before
            if found.crossovers
            else min(times, key=lambda layout: times[layout])
        )
        best = [first, *(c.after for c in found.crossovers if c.prompt <= prompt)][-1]
        assert times[best] <= RESOLUTION * min(times.values())
    prompts = [c.prompt for c in found.crossovers]
    assert prompts == sorted(prompts)
    for a, b in itertools.pairwise(found.crossovers):
        assert a.after == b.before


def test_a_crossover_is_where_two_times_are_equal():
    """TP against CP for the 30B on four dies with room for anything: few tokens are better off
    with TP."""
    config = known_config("Qwen3-30B-A3B")
    assert config is not None
    roomy = dataclasses.replace(A3, hbm_bytes=1 << 50)
    run = dry_run(config, prompt=8192, tp_size=4, layers="distinct", ranks="busiest")
    curves, crossovers = compare(config, roomy, run=run, lengths=[128, 1024, 8192, 65536])
    assert {str(c.layout) for c in curves} == {
        "CP 1 x TP 4, tp",
        "CP 2 x TP 2, tp",
        "CP 4 x TP 1, tp",
    }
    assert crossovers
    for crossover in crossovers:
        before, after = (
            predict(
                dry_run(
                    config,
                    prompt=crossover.prompt,
                    cp_size=layout.cp_size,
                    tp_size=layout.tp_size,
                    layers="distinct",
                    ranks="busiest",
                ),
                roomy,
            ).ttft_seconds
            for layout in (crossover.before, crossover.after)
        )
        assert crossover.why == "faster"
        assert after <= before <= 1.05 * after


def test_a_layout_that_does_not_fit_hands_over_to_one_that_does():
    small = dataclasses.replace(A3, hbm_bytes=40 * 2**20, usable_share_of_hbm=1.0)
    found = search(
        SMALL, small, devices=2, prompt=1024, chunks=[256], lengths=[256, 16384, 32768, 1 << 20]
    )
    lost = [c for c in found.crossovers if c.why == "memory"]
    ends = {
        c.layout: max(p for p, s in zip(c.prompts, c.seconds, strict=True) if s)
        for c in found.curves
    }
    assert any(end < 1 << 18 for end in ends.values())
    for crossover in lost:
        assert ends[crossover.before] < ends[crossover.after]
    assert all(None in c.seconds for c in found.curves)  # the longest fit nowhere


@pytest.mark.parametrize(
    ("devices", "prompt", "layout", "limit"),
    [
        (3, 100, (1, 3), "num_key_value_heads = 4 cannot be divided evenly by 3"),
        (16, 100, (1, 16), "num_attention_heads = 8 cannot be divided evenly by 16"),
        (6, 100, (1, 6), "= 6 cannot be divided evenly by 4"),
    ],
)
def test_illegal_layouts_quote_the_limit(devices, prompt, layout, limit):
    found = search(SMALL, A3, devices=devices, prompt=prompt, chunks=[], lengths=[prompt])
    cp, tp = layout
    refused = [r for r in found.refused if (r.layout.cp_size, r.layout.tp_size) == (cp, tp)]
    assert {r.layout.moe for r in refused} == {"tp", "ep"}
    assert all(r.why == "illegal" and r.candidate is None and limit in r.reason for r in refused)
    shown = {r.candidate.layout for r in found.ranked} | {r.layout for r in found.refused}
    assert shown == set(layouts(devices))


def test_what_does_not_fit_says_what_it_needs():
    """235B in bfloat16 has 438 GiB: not on 4 dies, and on 8 only with divided experts."""
    config = known_config("Qwen3-235B-A22B")
    assert config is not None
    found = search(config, A3, devices=4, prompt=8192, chunks=[], lengths=[8192])
    assert not found.ranked and not found.crossovers
    assert all(r.why == "memory" and r.candidate is None for r in found.refused)
    assert all("57.6 of 64.0 GiB are usable" in r.reason for r in found.refused)
    assert all("parameters" in r.reason for r in found.refused)


def test_a_chunk_that_does_not_fit_is_refused_alone():
    run = dry_run(SMALL, prompt=16384, layers="distinct")
    chunked = dry_run(SMALL, prompt=16384, chunk=1024, layers="distinct")
    limit = (run.fullest.memory_bytes + chunked.fullest.memory_bytes) // 2
    tight = dataclasses.replace(A3, hbm_bytes=limit, usable_share_of_hbm=1.0)
    found = search(SMALL, tight, devices=1, prompt=16384, chunks=[1024], lengths=[16384])
    assert [r.candidate.chunk for r in found.ranked] == [1024]
    (refused,) = found.refused
    assert refused.candidate is not None and refused.candidate.chunk == 16384
    assert refused.why == "memory" and "activations" in refused.reason


@given(st.integers(1, 96))
def test_layouts_are_all_factorisations(devices):
    pairs = [(x.cp_size, x.tp_size) for x in layouts(devices) if x.moe == "tp"]
    assert all(cp * tp == devices for cp, tp in pairs) and len(set(pairs)) == len(pairs)
    assert len(pairs) == sum(devices % n == 0 for n in range(1, devices + 1))
    assert len(list(layouts(devices))) == (1 if devices == 1 else 2 * len(pairs))


@given(
    cp=st.integers(1, 8),
    tp=st.integers(1, 8),
    moe=st.sampled_from(["tp", "ep"]),
    prompt=st.integers(1, 300_000),
)
def test_no_candidate_comes_twice(cp, tp, moe, prompt):
    layout = Layout(cp_size=cp, tp_size=tp, moe=moe)
    found = list(candidates(layout, SMALL, prompt))
    assert found[0].comm.all_reduce == "exact" and found[0].chunk == prompt
    assert len({(c.chunk, c.comm) for c in found}) == len(found)
    assert all(c.chunk <= prompt for c in found)
    assert all(c.comm.all_reduce == "exact" for c in found if tp == 1)
    assert all(c.comm.kv_gather == "exact" for c in found if cp == 1)
    assert all(c.comm.exchange == "auto" for c in found if moe == "tp")


def test_names_of_the_settings():
    def name(**comm):
        layout = Layout(cp_size=2, tp_size=2, moe="ep")
        return Candidate(layout=layout, comm=CommConfig(**comm), chunk=1).comm_name

    assert name() == "exact"
    assert name(all_reduce="int8_two_step", kv_gather="int8") == "int8 two-step sums, int8 KV"
    assert name(exchange="all_to_all", exchange_rows="int8") == "all-to-all of int8 rows"


def test_json_and_table(found):
    from rich.console import Console

    document = json.loads(json.dumps(found.to_dict()))
    assert document["predicted"] is True and len(document["ranked"]) == len(found.ranked)
    first = document["ranked"][0]
    assert first["ttft_seconds"] == found.ranked[0].prediction.ttft_seconds
    assert CommConfig(**first["comm"]) == found.ranked[0].candidate.comm
    console = Console(width=200, record=True, file=open("/dev/null", "w"))
    console.print(found.to_table())
    text = console.export_text()
    assert "predicted" in text and f"{found.ranked[0].prediction.ttft_seconds:.3f}" in text


def test_progress_is_shown():
    titles = []

    def progress(items, title):
        items = list(items)
        titles.append((title, len(items)))
        return items

    search(SMALL, A3, devices=1, prompt=16, chunks=[], lengths=[8, 16], progress=progress)
    assert titles == [("candidates", 1), ("prompt lengths", 2)]


@pytest.mark.parametrize(
    "wrong", [dict(devices=0), dict(prompt=0), dict(batch=True), dict(chunks=[0])]
)
def test_numbers_are_checked(wrong):
    values = dict(devices=1, prompt=8, chunks=[], lengths=[8])
    with pytest.raises(InputError, match=next(iter(wrong))):
        search(SMALL, A3, **values | wrong)


# --------------------------------------------------------------------------------- interpolation


@settings(max_examples=15, deadline=None)
@given(
    prompt=st.integers(1, 5000),
    chunk=st.integers(300, 1500),
    cp=st.sampled_from([1, 2, 4]),
    batch=st.integers(1, 2),
)
def test_chunks_between_the_ends_are_as_if_they_were_run(prompt, chunk, cp, batch):
    shape: dict[str, Any] = dict(
        prompt=prompt, chunk=chunk, cp_size=cp, batch=batch, ranks="busiest"
    )
    every, ends = (dry_run(SMALL, layers="distinct", chunks=c, **shape) for c in ("all", "ends"))
    a, b = every.ranks[0], ends.ranks[0]
    assert len(a.steps) == len(b.steps)
    for x, y in zip(a.steps, b.steps, strict=True):
        assert (x.phase, x.start, x.new_tokens) == (y.phase, y.start, y.new_tokens)
        assert y.flops == pytest.approx(x.flops, rel=1e-3)
        assert x.collectives == y.collectives
        assert y.peak_activation_bytes == pytest.approx(x.peak_activation_bytes, rel=1e-2)
    times = [predict(run, A3).ttft_seconds for run in (every, ends)]
    assert times[0] == pytest.approx(times[1], rel=1e-4)


def test_what_is_not_alike_is_not_interpolated():
    one, two = (
        step(start=8 * i, operators=(operator(part="attention", calls=1, flops=100 * i),))
        for i in (0, 2)
    )
    middle = between(one, two, 8)
    assert middle is not None and middle.operators[0].flops == 100 and middle.start == 8
    split = dataclasses.replace(two, operators=(dataclasses.replace(two.operators[0], calls=2),))
    assert between(one, split, 8) is None
    assert between(one, dataclasses.replace(two, operators=()), 8) is None


def test_models_are_kept():
    models: dict = {}
    first, again, fresh = (
        dry_run(SMALL, prompt=100, cp_size=2, tp_size=2, models=kept)
        for kept in (models, models, None)
    )
    assert first == again == fresh
    assert len(models) == 1 + len(first.ranks)


# ---------------------------------------------------------------------------------------- models


def test_the_released_models_have_their_published_sizes():
    sizes = {"Qwen/Qwen3-30B-A3B": 30_532_122_624, "Qwen/Qwen3-235B-A22B": 235_093_634_560}
    assert set(KNOWN_MODELS) == set(sizes)
    for name, size in sizes.items():
        config, source = read_model(name)
        assert source == "the config that comes with this package"
        run = dry_run(config, prompt=1, decode=False, layers="distinct", ranks="busiest")
        assert run.num_parameters == size
    assert known_config("Qwen3-30B-A3B") is not None and known_config("Qwen3-32B") is None


def test_sums_of_times_stay_finite():
    run = run_of(step(operators=(operator(flops=10**18),)))
    assert math.isfinite(predict(run, A3, Efficiencies()).ttft_seconds)
