"""Counting the rows of experts, and placing hot experts apart."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen3cp import CPQwen3MoeForCausalLM, ExpertPlacement, record_routing
from qwen3cp.config import local_experts
from qwen3cp.errors import InputError
from qwen3cp.routing import RoutingReport
from tests.models import load, random_ids, reference, save_random
from tests.ranks import context, run

EXPERTS, TOP_K = 13, 2


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("routed") / "checkpoint"
    return save_random(path, num_experts=EXPERTS, mlp_only_layers=[1])


def counted(cp: int, tp: int, path: Path, moe: str) -> RoutingReport:
    """Of a prefill of 40 and 3 tokens, and a decode."""
    ctx = context(cp, tp, moe=moe) if cp * tp > 1 else None
    if moe == "tp":
        model = load(path, cp, tp)
    else:
        model = CPQwen3MoeForCausalLM.from_pretrained(
            path, parallel_context=ctx, dtype=torch.float32
        )
    pool = model.new_kv_cache(num_pages=4)
    sequences = [pool.new_sequence(), pool.new_sequence()]
    with record_routing() as log:
        model.prefill(pool, sequences, random_ids(1, 40, 3, vocab_size=203))
        model.decode(pool, sequences, [7, 9])
    model.prefill(pool, sequences, [[1], [2]])  # not counted
    return log.report(model)


def chosen_by_transformers(path: Path) -> list[list[int]]:
    """Rows of each expert in the layers that have some."""
    model = reference(path)
    counts = {0: torch.zeros(EXPERTS), 2: torch.zeros(EXPERTS)}

    def count(_, __, out, layer: int) -> None:
        counts[layer] += torch.bincount(out[-1].flatten(), minlength=EXPERTS)

    hooks = [
        model.model.layers[i].mlp.gate.register_forward_hook(
            lambda *args, i=i: count(*args, layer=i)
        )
        for i in counts
    ]
    try:
        for ids, following in zip(random_ids(1, 40, 3, vocab_size=203), (7, 9), strict=True):
            model(torch.cat((ids, torch.tensor([following])))[None])
    finally:
        for hook in hooks:
            hook.remove()
    return [counts[i].int().tolist() for i in (0, 2)]


@pytest.mark.parametrize("topology", [(1, 1), (1, 2), (2, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("moe", ["tp", "ep"])
def test_every_row_is_counted_once(ranks, small, topology, moe):
    expected = chosen_by_transformers(small)
    reports = run(ranks, topology, counted, small, moe)
    for report in reports:
        assert report == reports[0]
        assert report.layers == [0, 2]
        assert report.rows_per_expert == expected
        assert report.expert_imbalance == [max(rows) * EXPERTS / sum(rows) for rows in expected]
        for rows, of_ranks, imbalance in zip(
            expected, report.rows_per_rank, report.rank_imbalance, strict=True
        ):
            assert sum(of_ranks) == sum(rows) == (40 + 3 + 2) * TOP_K
            assert imbalance == max(of_ranks) * len(of_ranks) / sum(rows)


@given(
    st.lists(st.integers(0, 1000), min_size=1, max_size=40),
    st.integers(1, 8),
)
def test_a_balanced_placement_is_no_worse_than_the_longest_processing_time_rule(rows, world):
    placement = ExpertPlacement.balanced([rows], world)
    (order,) = placement.layers
    loads = [
        sum(rows[order[slot]] for slot in local_experts(len(rows), r, world)) for r in range(world)
    ]
    assert sorted(order) == list(range(len(rows)))
    assert sum(loads) == sum(rows)
    # while a rank has room, no other ends up with more than it and one expert beyond the mean
    most = max(len(local_experts(len(rows), r, world)) for r in range(world))
    hottest = sorted(rows, reverse=True)
    assert max(loads) <= sum(hottest[:most])
    assert max(loads) >= max(sum(rows) / world, max(rows)) or sum(rows) == 0


def test_hot_experts_are_spread():
    rows = [100, 100, 1, 1, 100, 100, 1, 1]
    (order,) = ExpertPlacement.balanced([rows], 4).layers
    assert [rows[order[2 * r]] + rows[order[2 * r + 1]] for r in range(4)] == [101] * 4


def balanced_run(cp: int, tp: int, path: Path) -> tuple[list[float], list[float]]:
    ctx: Any = context(cp, tp, moe="ep")
    model = load_with(path, ctx, None)
    with record_routing() as log:
        prefill(model)
    before = log.report(model)
    model = load_with(path, ctx, before.balanced_placement(3, cp * tp))
    with record_routing() as log:
        prefill(model)
    after = log.report(model)
    assert after.rows_per_expert == before.rows_per_expert
    return before.rank_imbalance, after.rank_imbalance


def load_with(path: Path, ctx: Any, placement: Any) -> CPQwen3MoeForCausalLM:
    return CPQwen3MoeForCausalLM.from_pretrained(
        path, parallel_context=ctx, dtype=torch.float32, expert_placement=placement
    )


def prefill(model: CPQwen3MoeForCausalLM) -> torch.Tensor:
    pool = model.new_kv_cache(num_pages=8)
    return model.prefill(pool, [pool.new_sequence()], random_ids(1, 400, vocab_size=203))


def test_a_placement_from_a_record_balances_the_ranks(ranks, small):
    for before, after in run(ranks, (2, 2), balanced_run, small):
        assert np.mean(after) < np.mean(before)
        assert max(after) < 1.4  # 13 experts on 4 ranks: one has four of them


# Files and mistakes


@given(st.integers(1, 5).flatmap(lambda n: st.lists(st.permutations(range(n)), max_size=4)))
def test_a_placement_is_saved_and_loaded(layers):
    placement = ExpertPlacement(tuple(layers))
    with tempfile.NamedTemporaryFile() as file:
        placement.save(file.name)
        assert ExpertPlacement.load(file.name) == placement


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"layers": [[0, 0]]}', '{"layers": [1]}', '{"layers": [["a"]]}']
)
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "placement.json").write_text(content)
    with pytest.raises(InputError, match="placement"):
        ExpertPlacement.load(tmp_path / "placement.json")
    with pytest.raises(InputError, match="is no expert placement"):
        ExpertPlacement.load(tmp_path / "missing.json")


@pytest.mark.parametrize(
    "placement",
    [
        [0, 1],
        list(range(EXPERTS - 1)),
        [0] * EXPERTS,
        [*range(EXPERTS - 1), EXPERTS],
        [list(range(EXPERTS))] * 2,
        [list(range(EXPERTS))] * 4,
        [list(range(EXPERTS)), list(range(EXPERTS)), [0]],
        5,
        [1.0] * EXPERTS,
    ],
)
def test_placements_that_do_not_fit_are_refused(small, placement):
    with pytest.raises(InputError, match="placement"):
        CPQwen3MoeForCausalLM.from_pretrained(small, expert_placement=placement)


def place_differently(path: Path) -> str:
    ctx: Any = context(2, 1, moe="ep")
    order = list(range(EXPERTS)) if ctx.rank else list(reversed(range(EXPERTS)))
    with pytest.raises(InputError) as caught:
        load_with(path, ctx, order)
    return str(caught.value)


def test_ranks_must_place_alike(ranks, small):
    for message in ranks(2).run(place_differently, small):
        assert "expert_placement" in message


# What a report shows


REPORT = RoutingReport(
    layers=[0, 2],
    rows_per_expert=[[3, 1, 0, 0], [1, 1, 1, 1]],
    rows_per_rank=[[4, 0], [2, 2]],
    moe="ep",
)


def test_imbalance_is_the_busiest_over_the_mean():
    assert REPORT.expert_imbalance == [3, 1]
    assert REPORT.rank_imbalance == [2, 1]
    idle = RoutingReport([0], [[0, 0]], [[0, 0]], "ep")
    assert (idle.expert_imbalance, idle.rank_imbalance) == ([1], [1])


def test_json_and_table():
    document = json.loads(REPORT.to_json())
    assert document["rows_per_expert"] == REPORT.rows_per_expert
    assert document["rank_imbalance"] == [2, 1]
    rows = [line.split() for line in REPORT.to_table().splitlines() if line.startswith("│")]
    assert [[cell for cell in row if cell != "│"] for row in rows] == [
        ["0", "4", "3.00", "2.00"],
        ["2", "4", "1.00", "1.00"],
    ]


def test_plot(tmp_path):
    REPORT.plot(tmp_path / "routing.svg")
    assert (tmp_path / "routing.svg").read_text().rstrip().endswith("</svg>")
    with pytest.raises(InputError, match="cannot be written"):
        REPORT.plot(tmp_path / "none" / "routing.svg")
