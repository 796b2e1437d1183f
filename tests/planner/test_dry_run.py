"""The dry run's counts: of every rank alike, against formulas, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import random
from collections import Counter
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen3MoeConfig

from qwen3cp import CommConfig, CPQwen3MoeForCausalLM, ParallelContext
from qwen3cp.errors import InputError, ParallelConfigError, UnsupportedConfigError
from qwen3cp.planner import counter
from qwen3cp.planner.counter import visible_pairs
from qwen3cp.planner.counts import PARTS, DryRun, RankCounts, StepCounts
from qwen3cp.planner.dry_run import UniformRouting, dry_run
from qwen3cp.planner.topology import Topology, Workload, expected_rows, why_illegal

GIB = 1 << 30

SMALL: dict[str, Any] = dict(
    vocab_size=203,
    hidden_size=96,
    intermediate_size=64,
    moe_intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    num_experts=8,
    num_experts_per_tok=2,
    max_position_embeddings=4096,
    norm_topk_prob=True,
)


def small(**overrides: Any) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(**{**SMALL, **overrides})


def full_size(name: str) -> Qwen3MoeConfig:
    layers, hidden, heads, width = {"30b": (48, 2048, 32, 768), "235b": (94, 4096, 64, 1536)}[name]
    return Qwen3MoeConfig(
        **{
            **SMALL,
            "vocab_size": 151936,
            "hidden_size": hidden,
            "moe_intermediate_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "max_position_embeddings": 40960,
        }
    )


def fast(config: Qwen3MoeConfig, **arguments: Any) -> DryRun:
    return dry_run(config, layers="distinct", **arguments)


def received(step: StepCounts, kind: str) -> int:
    return sum(x.total_bytes for x in step.collectives if x.kind == kind)


def flops(step: StepCounts, *parts: str) -> int:
    return sum(x.total_flops for x in step.operators if x.part in parts)


# ---------------------------------------------------------------- one for all: ranks and layers


ALIKE = [
    (small(), dict(cp_size=2, tp_size=2), {}),
    (small(), dict(cp_size=4, tp_size=1), dict(prompt=5, chunk=2)),  # ranks without rows
    (small(), dict(cp_size=3, tp_size=2, moe="ep"), dict(prompt=100, chunk=37, batch=3)),
    (
        small(num_experts=5, vocab_size=17),  # ranks with fewer experts, fewer words, none
        dict(cp_size=4, tp_size=2, moe="ep", comm=CommConfig(exchange="all_to_all")),
        dict(prompt=50, batch=2),
    ),
    (small(attention_bias=True), dict(cp_size=1, tp_size=4), {}),
]


@pytest.mark.parametrize(("config", "topology", "workload"), ALIKE, ids=range(len(ALIKE)))
def test_ranks_that_stand_for_others_count_what_those_count(
    monkeypatch, config, topology, workload
):
    workload = {"prompt": 64, **workload}
    together = fast(config, **topology, **workload)
    world = together.world_size
    assert sorted(rank for kind in together.ranks for rank in kind.ranks) == list(range(world))

    monkeypatch.setattr(Topology, "alike", lambda *_: [(rank,) for rank in range(world)])
    alone = {kind.ranks[0]: kind for kind in fast(config, **topology, **workload).ranks}
    for kind in together.ranks:
        for rank in kind.ranks:
            mine = dataclasses.replace(
                alone[rank], ranks=kind.ranks, cp_rank=kind.cp_rank, tp_rank=kind.tp_rank
            )
            assert mine == kind


def test_ranks_are_run_once_for_all_that_are_alike():
    run = fast(full_size("235b"), cp_size=4, tp_size=4, moe="ep", prompt=131072, chunk=32768)
    assert [kind.ranks for kind in run.ranks] == [
        tuple(range(first, first + 4)) for first in (0, 4, 8, 12)
    ]


LAYERS = [
    (small(num_hidden_layers=5), {}),
    (small(num_hidden_layers=6, decoder_sparse_step=2), dict(tp_size=2)),
    (
        small(num_hidden_layers=6, mlp_only_layers=[0, 3]),
        dict(cp_size=2, moe="ep", comm=CommConfig(exchange="all_to_all")),
    ),
    (
        small(num_hidden_layers=5, tie_word_embeddings=True),
        dict(
            cp_size=2,
            tp_size=2,
            comm=CommConfig(all_reduce="int8_two_step", kv_gather="int8", skip_layers=[0, 2]),
        ),
    ),
]


@pytest.mark.parametrize(("config", "topology"), LAYERS, ids=range(len(LAYERS)))
def test_one_layer_of_each_kind_counts_as_all_layers(config, topology):
    """To the last byte, and the peak's place."""
    workload: dict[str, Any] = dict(prompt=300, chunk=150, batch=2)
    every = dry_run(config, **topology, **workload, layers="all")
    assert fast(config, **topology, **workload) == every
    layers = {layer for x in every.ranks[0].steps[0].operators for layer in x.layers}
    assert layers == set(range(config.num_hidden_layers))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["30b", "235b"])
def test_one_layer_of_each_kind_counts_as_all_layers_of_the_full_models(name):
    arguments: dict[str, Any] = dict(cp_size=2, tp_size=2, moe="ep", prompt=8192, ranks="busiest")
    config = full_size(name)
    assert fast(config, **arguments) == dry_run(config, **arguments)


def test_the_busiest_rank_is_the_one_with_most_flops():
    for lengths in (dict(prompt=1000), dict(prompt=7, batch=3), dict(prompt=1001, chunk=300)):
        arguments: dict[str, Any] = dict(cp_size=4, tp_size=1, **lengths)
        every = fast(small(), **arguments).ranks
        (busiest,) = fast(small(), ranks="busiest", **arguments).ranks
        assert busiest in every
        assert sum(s.flops for s in busiest.steps) == max(
            sum(s.flops for s in rank.steps) for rank in every
        )


# ------------------------------------------------------------------- formulas: a second opinion


@pytest.mark.parametrize(("name", "parameters"), [("30b", 30532122624), ("235b", 235093634560)])
def test_the_whole_model(name, parameters):
    """Public counts of both models; 96 and 188 KiB of keys and values a token."""
    config = full_size(name)
    run = fast(config, prompt=1023)
    assert run.num_parameters == parameters
    (rank,) = run.ranks
    assert rank.parameter_bytes == 2 * parameters
    assert rank.kv_bytes == (1024 + 128) * {"30b": 96, "235b": 188}[name] * 1024


@pytest.mark.parametrize(("name", "linear"), [("30b", 5.46e9), ("235b", 41.9e9)])
def test_flops_of_a_token(name, linear):
    config = full_size(name)
    (rank,) = fast(config, prompt=4096, decode=False).ranks
    (step,) = rank.steps
    products = flops(step, "projections", "experts", "router")
    assert products / 4096 == pytest.approx(linear, rel=0.005)
    hidden, heads, layers = config.hidden_size, config.num_attention_heads, config.num_hidden_layers
    projections = 2 * hidden * 128 * (2 * heads + 2 * 4) * 4096 * layers
    assert flops(step, "projections") == projections
    assert flops(step, "experts") == 6 * hidden * config.moe_intermediate_size * 8 * 4096 * layers
    assert flops(step, "router") == 2 * hidden * 128 * 4096 * layers
    assert flops(step, "attention") == 4 * heads * 128 * (4096 * 4097 // 2) * layers
    assert flops(step, "lm_head") == 2 * hidden * 151936
    assert {x.part for x in step.operators} <= set(PARTS)


@pytest.mark.parametrize("chunk", [None, 8192, 10000])
@pytest.mark.parametrize(("cp", "tp", "moe"), [(1, 4, "tp"), (2, 4, "tp"), (4, 2, "ep")])
def test_work_is_divided_and_nothing_is_lost_by_chunks(cp, tp, moe, chunk):
    """Over all ranks the FLOPs of the attention, and of all else that is not repeated."""
    tokens, config = 32768, full_size("30b")
    run = fast(config, cp_size=cp, tp_size=tp, moe=moe, prompt=tokens, chunk=chunk, decode=False)
    total = sum(
        len(rank.ranks) * np.array([flops(s, "attention") for s in rank.steps]).sum()
        for rank in run.ranks
    )
    assert total == 4 * 32 * 128 * (tokens * (tokens + 1) // 2) * 48
    experts = sum(
        len(rank.ranks) * sum(flops(s, "experts") for s in rank.steps) for rank in run.ranks
    )
    assert experts == 6 * 2048 * 768 * 8 * tokens * 48


def test_bytes_of_the_gathers_and_sums():
    """At 131,072 tokens: (C-1)/C * T * 2 * kv * d * b, and 4(N-1)/N * (T/C) * h bytes a sum."""
    for (cp, tp), gathered in {(2, 1): 128, (2, 4): 32, (4, 4): 48, (8, 1): 224}.items():
        run = fast(full_size("30b"), cp_size=cp, tp_size=tp, prompt=131072, decode=False)
        for rank in run.ranks:
            assert received(rank.steps[0], "kv_gather") == 48 * gathered << 20
    for (cp, tp), summed in {(1, 4): 1536, (2, 4): 768, (2, 2): 512, (4, 2): 256}.items():
        run = fast(full_size("30b"), cp_size=cp, tp_size=tp, prompt=131072, decode=False)
        assert received(run.ranks[0].steps[0], "all_reduce") == 48 * summed << 20


def test_int8_keys_and_values():
    """16.5 MiB of a layer at CP 2 x TP 4: a scale for each token and head."""
    comm = CommConfig(kv_gather="int8")
    run = fast(full_size("30b"), cp_size=2, tp_size=4, comm=comm, prompt=131072, decode=False)
    assert received(run.ranks[0].steps[0], "kv_gather") == 48 * 33 << 19


def test_the_query_projection_is_beside_the_gather():
    (step, *_) = fast(full_size("30b"), cp_size=2, prompt=1024).ranks[0].steps
    beside = {x.name for x in step.operators if x.overlaps == "kv_gather"}
    assert beside == {"aten.mm", "npu.npu_rms_norm", "npu.npu_rotary_mul"}
    (product,) = (x for x in step.operators if x.overlaps and x.name == "aten.mm")
    assert (product.calls, product.layers) == (1, tuple(range(48)))
    assert product.flops == 2 * 512 * 2048 * 4096
    (gather,) = (x for x in step.collectives if x.asynchronous)
    assert (gather.kind, gather.group, gather.group_size) == ("kv_gather", "cp", 2)


def test_decode_reads_the_experts_that_one_token_chooses():
    """8 of 128 experts, and every key once: what bounds the time of a token."""
    (rank,) = fast(full_size("30b"), prompt=4096).ranks
    decode = rank.steps[-1]
    weights = [x for x in decode.operators if x.name == "npu.npu_grouped_matmul"]
    read = sum(x.bytes_read * x.total_calls for x in weights)
    assert read == pytest.approx(48 * 8 * 3 * 2048 * 768 * 2, rel=0.01)
    (attention,) = (x for x in decode.operators if x.part == "attention")
    assert attention.bytes_read == pytest.approx(4097 * 2 * 4 * 128 * 2, rel=0.01)
    assert attention.flops == 4 * 32 * 128 * 4097


def test_the_host_waits_for_the_split_sizes_of_an_exchange_only():
    for form, reads in (("all_gather", 0), ("all_to_all", 48)):
        comm = CommConfig(exchange=cast(Any, form))
        run = fast(full_size("30b"), cp_size=2, moe="ep", comm=comm, prompt=1024)
        assert [step.host_reads for step in run.ranks[0].steps] == [reads, 0]


@given(st.integers(0, 40), st.integers(0, 60), st.integers(-70, 70), st.integers(-70, 70))
def test_visible_pairs(q_length, kv_length, low, high):
    expected = sum(
        row + low <= key <= row + high for row in range(q_length) for key in range(kv_length)
    )
    assert visible_pairs(q_length, kv_length, low, high) == expected


# ------------------------------------------------------------------------------------ topology


@given(
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 300),
    st.integers(1, 4),
    st.integers(1, 300),
)
def test_rows_pairs_and_shares_are_those_of_the_whole(cp, tp, prompt, batch, chunk):
    topology = Topology(cp_size=cp, tp_size=tp)
    workload = Workload(prompt=prompt, batch=batch, chunk=chunk, decode=False)
    starts = [(step.start, step.new_tokens) for step in workload.steps]
    assert [start for start, _ in starts] == list(range(0, prompt, min(chunk, prompt)))
    assert sum(new for _, new in starts) == prompt
    pairs = 0
    for step in workload.steps:
        assert sum(topology.rows(step, batch)) == tp * batch * step.new_tokens
        assert sum(topology.shares(step, batch)) == batch * step.new_tokens
        pairs += sum(topology.attention_pairs(step, batch))
    assert pairs == tp * batch * prompt * (prompt + 1) // 2


@settings(max_examples=300)
@given(st.data())
def test_expected_rows_of_an_exchange(data):
    world = data.draw(st.integers(1, 12))
    experts = data.draw(st.lists(st.integers(0, 9), min_size=world, max_size=world))
    total = sum(experts)
    if not total:
        return
    top_k = data.draw(st.integers(1, total))
    shares = data.draw(st.lists(st.integers(0, 50), min_size=world, max_size=world))
    matrix = np.array(expected_rows(shares, experts, top_k))
    assert matrix.shape == (world, world) and (matrix >= 0).all()
    for sent, share in zip(matrix, shares, strict=True):
        assert sent.sum() <= share * top_k  # no more than the choices
        assert (sent <= share + 1e-9).all()
    none = np.array(experts) == 0
    assert (matrix[:, none] == 0).all()
    everywhere = np.array(experts) > total - top_k  # each choice has one of its experts
    assert (matrix[:, everywhere] == np.array(shares)[:, None]).all()


def test_expected_rows_are_the_mean_of_random_routings():
    experts, top_k, share = [3, 4, 1, 8], 3, 20000
    owners = np.repeat(np.arange(4), experts)
    generator = random.Random(0)
    hit = np.zeros(4)
    for _ in range(share):
        hit[list({owners[i] for i in generator.sample(range(16), top_k)})] += 1
    assert np.array(expected_rows([share] * 4, experts, top_k)) == pytest.approx(
        np.tile(hit, (4, 1)), rel=0.03
    )


def test_expected_experts_are_the_mean_of_random_routings():
    config = small(num_experts=16, num_experts_per_tok=3)
    generator = random.Random(0)
    for rows in (1, 4, 20):
        pairs, busy = [], []
        for _ in range(3000):
            drawn = [e for _ in range(rows) for e in generator.sample(range(16), 3) if e < 6]
            pairs.append(len(drawn))
            busy.append(len(set(drawn)))
        routing = UniformRouting(config, Topology(), 0)
        expected = routing.routed_rows(rows, range(6), 16)
        # rounded up
        assert np.mean(pairs) - 0.1 <= expected.pairs <= np.mean(pairs) + 1.1
        assert np.mean(busy) - 0.1 <= expected.experts <= np.mean(busy) + 1.1


# ------------------------------------------------------------------- full sizes: fits or not


@pytest.mark.parametrize(
    ("name", "arguments", "gib"),
    [
        ("30b", dict(cp_size=1, tp_size=1, prompt=262144, chunk=8192), 81.50),
        ("30b", dict(cp_size=2, tp_size=2, prompt=262144, chunk=32768), 41.62),
        ("30b", dict(cp_size=1, tp_size=4, prompt=262144, chunk=32768), 22.51),
        ("30b", dict(cp_size=2, tp_size=2, prompt=1048576, chunk=65536), 78.63),
        ("30b", dict(cp_size=4, tp_size=4, moe="ep", prompt=1048576, chunk=65536), 30.57),
        ("235b", dict(cp_size=4, tp_size=4, moe="tp", prompt=131072, chunk=32768), 117.00),
        ("235b", dict(cp_size=4, tp_size=4, moe="ep", prompt=131072, chunk=32768), 38.89),
        ("235b", dict(cp_size=2, tp_size=8, moe="ep", prompt=131072), 45.02),
    ],
    ids=str,
)
def test_memory_of_the_full_models(name, arguments, gib):
    """Parameters and cache by formula; the sum as it was first counted. A die has 64 GiB."""
    config = full_size(name)
    rank = fast(config, **arguments, ranks="busiest", decode=False).fullest
    tp, world = arguments["tp_size"], arguments["cp_size"] * arguments["tp_size"]
    hidden, heads, layers = config.hidden_size, config.num_attention_heads, config.num_hidden_layers
    ways = world if arguments.get("moe") == "ep" else tp
    kv_heads = max(1, 4 // tp)
    of_a_layer = (
        3 * 128 * hidden * config.moe_intermediate_size // ways
        + 2 * hidden * 128 * (heads // tp + kv_heads)
        + 128 * hidden
        + 2 * hidden
        + 2 * 128
    )
    rows = 151936 // world
    assert rank.parameter_bytes == 2 * (layers * of_a_layer + (151936 + rows + 1) * hidden)
    pages = arguments["prompt"] // 128 + 2  # one for the token after the prompt, and page 0
    assert rank.kv_bytes == 2 * layers * pages * 128 * 2 * kv_heads * 128
    assert rank.memory_bytes / GIB == pytest.approx(gib, abs=0.01)


# --------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("topology", "limit"),
    [
        (dict(tp_size=3), "num_key_value_heads = 4 cannot be divided evenly by 3"),
        (dict(tp_size=6), "tp_size (more than the KV heads) = 6 cannot be divided evenly by 4"),
        (dict(tp_size=64), "num_attention_heads = 32 cannot be divided evenly by 64"),
        (dict(tp_size=8, hidden=1), "moe_intermediate_size = 100 cannot be divided evenly by 8"),
        (dict(cp_size=0), "cp_size must be a positive integer, got 0"),
        (dict(moe="dp"), "moe must be 'tp' or 'ep', got moe='dp'"),
        (
            dict(tp_size=2, comm=CommConfig(all_reduce="auto", group_size=96)),
            "CommConfig(group_size=96) does not divide hidden_size = 2048",
        ),
    ],
    ids=str,
)
def test_an_illegal_topology_is_refused_with_its_limit(topology, limit):
    config = full_size("30b")
    if topology.pop("hidden", None):
        config.moe_intermediate_size = 100
    with pytest.raises(ParallelConfigError) as raised:
        fast(config, prompt=64, **topology)
    assert limit in str(raised.value)
    assert limit in (why_illegal(config, Topology(**topology)) or "")
    assert why_illegal(config, Topology(cp_size=5, tp_size=2)) is None
    assert not dist.is_initialized()


def test_a_model_that_runs_nowhere_is_refused():
    with pytest.raises(UnsupportedConfigError, match="head_dim is 80"):
        fast(small(head_dim=80), prompt=64)


@pytest.mark.parametrize("name", ["prompt", "batch", "chunk", "new_tokens"])
def test_numbers_below_one_are_refused(name):
    with pytest.raises(InputError, match=f"{name} must be at least 1, got 0"):
        fast(small(), **{"prompt": 64, name: 0})


def test_what_an_npu_would_refuse_is_refused():
    """More tokens in one call than the attention operator takes; in chunks they fit."""
    config = full_size("30b")
    with pytest.raises(InputError) as raised:
        fast(config, prompt=(1 << 20) + 1)
    assert "an NPU would refuse the prefill of 1048577 tokens after 0" in str(raised.value)
    assert "1048576" in str(raised.value)
    assert fast(config, prompt=(1 << 20) + 1, chunk=1 << 19).ranks


def test_every_call_of_an_npu_operator_is_checked(monkeypatch):
    """Also where torch_npu's own Meta kernels, which check little, would be called."""
    checked: Counter = Counter()
    check = counter.check_call

    def counted(op: Any, args: Any, kwargs: Any, *, npu_dtypes: bool) -> None:
        assert npu_dtypes
        check(op, args, kwargs, npu_dtypes=npu_dtypes)
        checked[f"npu.{op._opname}"] += 1

    monkeypatch.setattr(counter, "check_call", counted)
    comm = CommConfig(all_reduce="int8_two_step", kv_gather="int8", exchange="all_to_all")
    run = dry_run(small(), cp_size=2, tp_size=2, moe="ep", comm=comm, prompt=64, ranks="busiest")
    called: Counter = Counter()
    for step in run.ranks[0].steps:
        for x in step.operators:
            if x.name.startswith("npu."):
                called[x.name] += x.total_calls
    assert checked == called and len(called) == 11

    def refuse(*_: Any, **__: Any) -> None:
        raise TypeError("npu_swiglu: not today [a page]")

    monkeypatch.setattr(counter, "check_call", refuse)
    with pytest.raises(InputError, match="an NPU would refuse the prefill of 64 tokens after 0"):
        fast(small(), prompt=64)


def test_nothing_is_left_behind(monkeypatch):
    assert not dist.is_initialized()
    arguments: dict[str, Any] = dict(cp_size=2, tp_size=2, prompt=64)
    fast(small(), **arguments)
    assert not dist.is_initialized()

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(CPQwen3MoeForCausalLM, "decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fast(small(), **arguments)
    assert not dist.is_initialized()
    monkeypatch.undo()
    assert fast(small(), **arguments) == fast(small(), **arguments)
    assert ParallelContext.single().world_size == 1


def test_a_process_group_of_the_caller_stays(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(ParallelConfigError, match="there is a process group in this process"):
            fast(small(), cp_size=2, prompt=64)
        assert dist.is_initialized() and dist.get_backend() == "gloo"
        assert fast(small(), prompt=64).ranks  # one rank needs none
    finally:
        dist.destroy_process_group()


def test_the_config_stays_as_it_was():
    config = small(mlp_only_layers=[1])
    before = config.to_dict()
    fast(config, prompt=64, dtype=torch.float32)
    assert config.to_dict() == before


# ---------------------------------------------------------------------------- the report itself


def test_warnings():
    config = full_size("30b")
    run = fast(config, tp_size=8, cp_size=2, prompt=262144, dtype=torch.float32, decode=False)
    text = "\n".join(run.warnings)
    assert "262145 tokens are beyond the 40960 positions" in text
    assert "an NPU runs bfloat16 only" in text
    assert "tp_size=8 is more than the 4 KV heads: 2 TP ranks hold each of them" in text
    assert fast(config, tp_size=4, prompt=1024).warnings == ()
    (idle,) = fast(config, prompt=64, comm=CommConfig(kv_gather="int8")).warnings
    assert "has no effect with cp_size=1" in idle
    few = fast(small(num_experts=2), cp_size=4, moe="ep", prompt=3)
    assert "4 ranks share 2 experts: 2 of them have none" in few.warnings
    assert any("[3] have no rows" in line for line in few.warnings)


def test_assumptions_name_the_routing():
    (_, routing) = fast(full_size("30b"), cp_size=2, moe="ep", prompt=64).assumptions
    assert "every choice of 8 of 128 experts is equally likely" in routing


@pytest.mark.parametrize("moe", ["tp", "ep"])
def test_json_holds_all_of_it(moe):
    comm = CommConfig(all_reduce="auto", skip_layers=[1])
    run = dry_run(small(), cp_size=2, tp_size=2, moe=moe, comm=comm, prompt=100, chunk=40)
    document = json.loads(json.dumps(run.to_dict()))
    assert DryRun.from_dict(document) == run
    for rank, of_rank in zip(run.ranks, document["ranks"], strict=True):
        assert of_rank["memory_bytes"] == rank.memory_bytes
        assert [s["flops"] for s in of_rank["steps"]] == [s.flops for s in rank.steps]
        assert len(rank.steps) == 4


def test_sums_of_a_rank():
    run = fast(small(), cp_size=2, tp_size=2, prompt=100, chunk=64)
    for rank in run.ranks:
        assert isinstance(rank, RankCounts)
        assert rank.peak_activation_bytes == max(s.peak_activation_bytes for s in rank.steps)
        parts = rank.parameter_bytes + rank.constant_bytes + rank.kv_bytes
        assert rank.memory_bytes == parts + rank.peak_activation_bytes
    assert run.fullest.memory_bytes == max(rank.memory_bytes for rank in run.ranks)


def test_steps():
    steps = Workload(prompt=10, chunk=4).steps
    assert [(s.phase.value, s.start, s.new_tokens) for s in steps] == [
        ("prefill", 0, 4),
        ("prefill", 4, 4),
        ("prefill", 8, 2),
        ("decode", 10, 1),
    ]
