"""What broke in other implementations of the same idea, where no other test would see it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Qwen3MoeConfig

from qwen3cp import CPQwen3MoeForCausalLM, ForwardPhase, ParallelContext, config
from qwen3cp.collectives import record_communication
from qwen3cp.errors import UnsupportedConfigError
from tests.models import load, random_ids, reference_logits
from tests.ranks import context
from tests.test_counts import Recorder


def test_a_missing_operator_is_noticed_when_the_model_is_built(monkeypatch):
    """And not after the first gather, on some of the ranks."""
    monkeypatch.setattr(config, "OPERATORS", (*config.OPERATORS, "npu_not_there"))
    tiny = Qwen3MoeConfig(vocab_size=8, hidden_size=256, num_hidden_layers=1, num_attention_heads=4)
    with pytest.raises(UnsupportedConfigError, match="torch.ops.npu has no npu_not_there"):
        CPQwen3MoeForCausalLM(tiny)


def _short_prompt_in_a_batch(path: Path) -> list[tuple[int, int]]:
    """(gathers, rows of this rank) with a prompt shorter than 2 * cp beside a long one."""
    model = load(path, 4, 1)
    cache = model.new_kv_cache(num_pages=8)
    results = []
    for lengths in ([200], [200, 1], [1], [3, 2]):
        sequences = [cache.new_sequence() for _ in lengths]
        plan = model.plan(cache, sequences, lengths, ForwardPhase.PREFILL)
        with record_communication() as log:
            model.prefill(cache, sequences, random_ids(0, *lengths))
        results.append((log.counts["kv_gather"], plan.num_rows))
        for sequence in sequences:
            cache.free(sequence)
    return results


def test_a_short_prompt_does_not_switch_context_parallelism_off(ranks, checkpoint):
    by_rank = ranks(4).run(_short_prompt_in_a_batch, checkpoint)
    for case, total in enumerate((200, 201, 1, 5)):
        assert {results[case][0] for results in by_rank} == {4}  # one a layer
        rows = [results[case][1] for results in by_rank]
        assert sum(rows) == total
        assert max(rows) - min(rows) <= 1


def _replicas(path: Path) -> torch.Tensor:
    """Two replicas of two CP ranks; each runs another prompt, of another length."""
    ctx = context(2, 1, dp_size=2)
    model = CPQwen3MoeForCausalLM.from_pretrained(path, parallel_context=ctx, dtype=torch.float32)
    cache = model.new_kv_cache(max_tokens=200)
    (prompt,) = random_ids(ctx.dp_rank, 40 + 60 * ctx.dp_rank)
    return model.prefill(cache, [cache.new_sequence()], [prompt])[0]


def test_replicas_run_other_prompts_at_the_same_time(ranks, checkpoint):
    results = ranks(4).run(_replicas, checkpoint)
    for rank, logits in enumerate(results):
        replica = rank // 2
        (prompt,) = random_ids(replica, 40 + 60 * replica)
        expected = reference_logits(checkpoint, prompt)[-1]
        torch.testing.assert_close(logits, expected, rtol=0, atol=2e-4)


def _largest_activation(path: Path, cached: int) -> int:
    """The most elements of a float tensor that prefilling 64 tokens makes, but for the cache."""
    model = load(path, 1, 1)
    cache = model.new_kv_cache(max_tokens=2048)
    pool = cache.layer(0).rows.untyped_storage().data_ptr()
    sequence = cache.new_sequence()
    model.prefill(cache, [sequence], random_ids(0, cached))
    with Recorder() as recorder:
        model.prefill(cache, [sequence], random_ids(1, 64))
    return max(
        torch.Size(shape).numel()
        for _, dtype, shape, pointer in recorder.outputs
        if dtype.is_floating_point and pointer != pool
    )


def test_memory_of_a_chunk_does_not_grow_with_what_is_cached(checkpoint):
    assert _largest_activation(checkpoint, 1900) == _largest_activation(checkpoint, 64)


def _operators(path: Path) -> set[str]:
    model = load(path, 2, 1)
    cache = model.new_kv_cache(num_pages=12)
    sequences = [cache.new_sequence() for _ in range(3)]
    with Recorder() as recorder:
        model.prefill(cache, sequences, random_ids(0, 300, 1, 20))
        model.decode(cache, sequences, [1, 2, 3])
    return set(recorder.calls)


def test_rows_are_put_in_order_without_a_sort(ranks, checkpoint):
    """The order is known from host integers; a sort on the device would leave the AI cores."""
    for operators in ranks(2).run(_operators, checkpoint):
        assert not {x for x in operators if "sort" in x}


def test_dense_layers_are_reduced_over_tp_alone():
    """CP ranks hold other tokens: a sum over them would mix rows. The group is the TP group."""
    from qwen3cp.moe import CPQwen3MoeMLP

    config = Qwen3MoeConfig(hidden_size=64, intermediate_size=32, num_attention_heads=4)
    config.head_dim = 64
    mlp = CPQwen3MoeMLP(config, parallel_context=ParallelContext.single())
    for parameter in mlp.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    rows = torch.randn(5, 64)
    expected = mlp.down_proj(mlp.act_fn(mlp.gate_proj(rows)) * mlp.up_proj(rows))
    with record_communication() as log:
        torch.testing.assert_close(mlp(rows), expected)
    assert log.records == []
