"""The dry run beside real runs: the loader's parameters, gloo's bytes, the tensors of a CPU run."""

from __future__ import annotations

import resource
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import Qwen3MoeConfig

from qwen3cp import CommConfig, CPQwen3MoeForCausalLM, ParallelContext, collectives
from qwen3cp.collectives import record_communication
from qwen3cp.planner.counter import OperatorCounter
from qwen3cp.planner.counts import OperatorCount, StepCounts
from qwen3cp.planner.dry_run import UniformRouting, dry_run
from qwen3cp.weights import read_config
from tests.ranks import Ranks, context, run

TINY = Path(__file__).parents[1] / "assets" / "tiny-qwen3-moe"
CONFIG = read_config(str(TINY))

# ----------------------------------------------------------------------------- parameters


TOPOLOGIES = [
    (cp, tp, moe)
    for cp in range(1, 9)
    for tp in (1, 2, 4, 8)  # 4 KV heads
    for moe in ("tp", "ep")
    if cp * tp <= 8
]


@pytest.mark.parametrize(("cp", "tp", "moe"), TOPOLOGIES, ids=str)
def test_parameter_bytes_are_those_of_the_loader(cp, tp, moe):
    planned = dry_run(CONFIG, cp_size=cp, tp_size=tp, moe=moe, prompt=8, decode=False)
    bytes_of = {rank: kind.parameter_bytes for kind in planned.ranks for rank in kind.ranks}
    for rank in range(cp * tp):
        ctx = ParallelContext.describe(rank, cp_size=cp, tp_size=tp, moe=moe)
        model = CPQwen3MoeForCausalLM.from_pretrained(
            TINY, parallel_context=ctx, dtype=torch.bfloat16
        )
        assert model.load_report is not None
        assert model.load_report.parameter_bytes == bytes_of[rank]
        assert sum(p.nbytes for p in model.parameters()) == bytes_of[rank]


# ------------------------------------------------------------- what real ranks count


def counted_ranks(
    config: Qwen3MoeConfig,
    cp: int,
    tp: int,
    moe: Any,
    comm: CommConfig,
    prompt: int,
    chunk: int,
    batch: int,
) -> dict[str, Any]:
    """In a rank: what the counter sees of the forwards that a dry run makes, with random weights.

    Also the cache's bytes, the split sizes that each exchange read, and how far the resident memory
    grew beyond what it was before: in a new process, by what the forwards take.
    """
    if cp * tp == 1:
        ctx = ParallelContext(moe=moe, comm=comm)
    else:
        ctx = context(cp, tp, moe=moe)
        ctx.comm = comm
    torch.manual_seed(0)
    model = CPQwen3MoeForCausalLM(config, parallel_context=ctx).eval().requires_grad_(False)
    cache = model.new_kv_cache(num_pages=1 - batch * (-(prompt + 1) // 128))
    sequences = [cache.new_sequence() for _ in range(batch)]
    layers = [cache.layer(i) for i in range(cache.num_layers)]
    rows = [layer.rows for layer in layers]
    held = [*model.parameters(), *model.buffers(), layers[0].causal_mask, *rows]
    matrices: list[list[list[int]]] = []
    read = collectives.gather_counts

    def kept(*arguments: Any) -> list[list[int]]:
        matrices.append(read(*arguments))
        return matrices[-1]

    collectives.gather_counts = kept
    steps = []
    before = resident_bytes()
    try:
        for start in [*range(0, prompt, chunk), None]:
            counter = OperatorCounter(model, held)
            with record_communication() as log, counter:
                if start is None:
                    model.decode(cache, sequences, [0] * batch)
                else:
                    new = min(chunk, prompt - start)
                    ids = torch.randint(0, config.vocab_size, (new,)).tolist()
                    model.prefill(cache, sequences, [ids] * batch)
            assert log.total_bytes == sum(x.total_bytes for x in counter.collective_counts())
            steps.append(
                (
                    counter.operator_counts(),
                    counter.collective_counts(),
                    counter.peak_bytes,
                    log.by_kind,
                )
            )
    finally:
        collectives.gather_counts = read
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "rank": ctx.rank,
        "steps": steps,
        "kv_bytes": cache.num_bytes,
        "matrices": matrices,
        "resident_bytes": most - before,
    }


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def of_the_model(operators: tuple[OperatorCount, ...]) -> Counter:
    """Calls of what a device would run, by layer. On a CPU the plan's own integers are tensors like
    others, so that their operators are seen, too."""
    calls: Counter = Counter()
    for x in operators:
        if x.name.startswith("npu.") or x.name == "aten.mm":
            for layer in x.layers:
                calls[x.name, x.part, layer, x.overlaps] += x.calls
    return calls


def work_of(operators: tuple[OperatorCount, ...], *names: str) -> list[tuple]:
    return sorted(
        (x.name, x.part, x.layers, x.calls, x.flops, x.bytes_read, x.bytes_written)
        for x in operators
        if x.name.removeprefix("npu.npu_") in names
    )


BY_SHAPE = ("aten.mm", "fused_infer_attention_score", "scatter_nd_update_", "rms_norm")
BY_SHAPE += ("add_rms_norm", "rotary_mul", "swiglu", "moe_gating_top_k_softmax", "dynamic_quant")
"""Operators whose work does not depend on where rows are sent."""

RUNS = [
    (2, 1, "tp", {}, (300, 128, 1)),
    (2, 2, "tp", {}, (301, 301, 2)),
    (1, 4, "tp", dict(all_reduce="int8_two_step", group_size=32), (200, 70, 1)),
    (2, 2, "tp", dict(all_reduce="int8_one_shot", kv_gather="int8", skip_layers=[1]), (64, 64, 1)),
    (4, 1, "ep", dict(exchange="all_gather"), (130, 50, 3)),
    (2, 2, "ep", dict(exchange="all_gather", exchange_rows="int8"), (100, 40, 1)),
    (1, 4, "ep", {}, (90, 90, 1)),
    (2, 2, "ep", dict(exchange="all_to_all"), (301, 200, 2)),
    (4, 1, "ep", dict(exchange="all_to_all", exchange_rows="int8", check_plan=False), (50, 50, 1)),
    (4, 1, "tp", {}, (3, 2, 1)),  # ranks without rows
]


@pytest.mark.parametrize(("cp", "tp", "moe", "comm", "sizes"), RUNS, ids=str)
def test_bytes_and_operators_are_those_of_real_ranks(ranks, monkeypatch, cp, tp, moe, comm, sizes):
    """KV bytes, and the bytes of every collective by kind, algorithm, group, form and layer; the
    operators of the model, and their FLOPs and bytes."""
    comm = CommConfig(**comm)
    real = run(ranks, (cp, tp), in_a_topology, moe, comm, *sizes)
    for count in real:
        matrices = iter(count["matrices"])

        class Routing(UniformRouting):
            """Where rows are not sent as expected, but as they were."""

            def counts(self) -> list[list[int]]:
                return next(matrices)  # noqa: B023

        monkeypatch.setattr("qwen3cp.planner.dry_run.UniformRouting", Routing)
        monkeypatch.setattr(
            "qwen3cp.planner.topology.Topology.alike",
            lambda *_, rank=count["rank"]: [(rank,)],
        )
        prompt, chunk, batch = sizes
        planned = dry_run(
            CONFIG,
            cp_size=cp,
            tp_size=tp,
            moe=moe,
            comm=comm,
            dtype=torch.float32,
            prompt=prompt,
            chunk=chunk,
            batch=batch,
        )
        (kind,) = planned.ranks
        assert next(matrices, None) is None
        assert count["kv_bytes"] == kind.kv_bytes
        assert len(count["steps"]) == len(kind.steps)
        for (operators, messages, peak, by_kind), step in zip(
            count["steps"], kind.steps, strict=True
        ):
            assert set(messages) == set(step.collectives)
            assert by_kind == bytes_by_kind(step)
            assert of_the_model(operators) == of_the_model(step.operators)
            for name in BY_SHAPE:
                assert work_of(operators, name) == work_of(step.operators, name), name
            assert peak == pytest.approx(step.peak_activation_bytes, rel=0.15, abs=20_000)


def in_a_topology(cp: int, tp: int, *arguments: Any) -> dict[str, Any]:
    return counted_ranks(CONFIG, cp, tp, *arguments)


def bytes_by_kind(step: StepCounts) -> dict[str, int]:
    kinds = {x.kind for x in step.collectives}
    return {kind: sum(x.total_bytes for x in step.collectives if x.kind == kind) for kind in kinds}


# --------------------------------------------------------------------- a mid-size model


def mid_size() -> Qwen3MoeConfig:
    """80 M parameters, and rows that are long beside the plan's integers."""
    return cast(Any, Qwen3MoeConfig)(
        vocab_size=8192,
        hidden_size=1024,
        intermediate_size=2048,
        moe_intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        mlp_only_layers=[1],
    )


MID_SIZE = [
    (1, 1, "tp", {}, (512, 384, 1)),
    (2, 1, "tp", dict(kv_gather="int8"), (512, 512, 1)),
    (1, 2, "tp", dict(all_reduce="int8_two_step"), (250, 200, 1)),
    (2, 1, "ep", dict(exchange="all_gather"), (400, 400, 1)),
    (2, 1, "ep", dict(exchange="all_to_all"), (400, 400, 1)),
]


@pytest.mark.parametrize(("cp", "tp", "moe", "comm", "sizes"), MID_SIZE, ids=str)
def test_peak_activation_is_that_of_a_real_run(
    ranks, new_process, record_property, cp, tp, moe, comm, sizes
):
    """Live storages at the dispatcher of both; beside it how much memory the process took."""
    comm = CommConfig(**comm)
    if cp * tp == 1:
        real = new_process.run(of_mid_size, cp, tp, moe, comm, *sizes)
    else:
        real = run(ranks, (cp, tp), of_mid_size, moe, comm, *sizes)
    prompt, chunk, batch = sizes
    planned = dry_run(
        mid_size(),
        cp_size=cp,
        tp_size=tp,
        moe=moe,
        comm=comm,
        dtype=torch.float32,
        prompt=prompt,
        chunk=chunk,
        batch=batch,
    )
    kinds = {rank: kind for kind in planned.ranks for rank in kind.ranks}
    for count in real:
        kind = kinds[count["rank"]]
        found = {
            "live": max(peak for _, _, peak, _ in count["steps"]),
            "planned": kind.peak_activation_bytes,
            "resident": count["resident_bytes"],
        }
        print(f"rank {count['rank']}: {found}")
        for name, value in found.items():
            record_property(f"{name}_bytes_of_rank_{count['rank']}", value)
        routed = comm.exchange == "all_to_all"  # as chance has it
        assert found["planned"] == pytest.approx(found["live"], rel=0.15 if routed else 0.01)
        for (_, _, live, _), step in zip(count["steps"], kind.steps, strict=True):
            # the plan's integers, which are on the host, count on a CPU, too
            assert step.peak_activation_bytes == pytest.approx(live, rel=0.15)
        if cp * tp == 1:
            assert found["resident"] > 0.8 * found["live"]


@pytest.fixture
def new_process() -> Iterator[Ranks]:
    """One whose memory nothing has grown yet."""
    process = Ranks(1)
    yield process
    process.close()


def of_mid_size(cp: int, tp: int, *arguments: Any) -> dict[str, Any]:
    return counted_ranks(mid_size(), cp, tp, *arguments)
