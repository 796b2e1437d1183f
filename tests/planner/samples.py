"""Counts that are written down, and configs, for tests of what is made of them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, cast

from transformers import Qwen3MoeConfig

from qwen3cp.parallel import CommConfig
from qwen3cp.planner.counts import CollectiveCount, DryRun, OperatorCount, RankCounts, StepCounts

SMALL: Qwen3MoeConfig = cast(Any, Qwen3MoeConfig)(
    vocab_size=640,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=128,
    decoder_sparse_step=1,
    mlp_only_layers=[],
    norm_topk_prob=True,
    max_position_embeddings=1 << 20,
)


def operator(**fields: Any) -> OperatorCount:
    values: dict[str, Any] = dict(
        name="aten.mm",
        part="projections",
        layers=(0, 1),
        calls=1,
        flops=0,
        bytes_read=0,
        bytes_written=0,
    )
    return OperatorCount(**values | fields)


def collective(**fields: Any) -> CollectiveCount:
    values: dict[str, Any] = dict(
        kind="all_reduce",
        algorithm="all_reduce",
        group="tp",
        group_size=2,
        form="exact",
        layers=(0, 1),
        calls=1,
        bytes=0,
        asynchronous=False,
    )
    return CollectiveCount(**values | fields)


def step(**fields: Any) -> StepCounts:
    values: dict[str, Any] = dict(
        phase="prefill",
        start=0,
        new_tokens=8,
        batch=1,
        rows=8,
        attention_calls=1,
        operators=(),
        collectives=(),
        host_reads=0,
        peak_activation_bytes=1000,
        peak_operator="aten.mm",
        peak_layer=None,
    )
    return StepCounts(**values | fields)


def run_of(*steps: StepCounts, **fields: Any) -> DryRun:
    """A run of one kind of rank."""
    ranks = (
        RankCounts(
            ranks=(0, 1),
            cp_rank=0,
            tp_rank=0,
            parameter_bytes=100,
            constant_bytes=10,
            kv_bytes=50,
            steps=steps,
        ),
    )
    values: dict[str, Any] = dict(
        model="sample",
        num_layers=2,
        num_parameters=1000,
        max_positions=4096,
        dtype="bfloat16",
        cp_size=1,
        tp_size=2,
        moe="tp",
        comm=asdict(CommConfig()),
        prompt=8,
        batch=1,
        chunk=8,
        new_tokens=1,
        ranks=ranks,
        warnings=(),
        assumptions=(),
    )
    return DryRun(**values | fields)
