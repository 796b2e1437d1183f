"""Which slices of which checkpoint tensors make up each parameter of a rank.

The tables name every tensor of a Qwen3-MoE checkpoint; the functions below turn them into pieces.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass

from transformers import Qwen3MoeConfig

from qwen3cp.config import head_dim_of, is_sparse, local_config
from qwen3cp.parallel import ParallelContext

__all__ = ["Piece", "is_ignored", "parameter_layout"]

Slices = tuple[slice, ...]
ALL = slice(None)


@dataclass(frozen=True)
class Piece:
    """A slice of one tensor on disk, and where it goes in one parameter."""

    parameter: str
    target: Slices
    source: str
    source_shape: tuple[int, ...]
    """Of the whole tensor on disk."""
    source_slice: Slices


def is_ignored(name: str, config: Qwen3MoeConfig) -> bool:
    """Tensors that some checkpoints hold and no parameter needs."""
    return name.endswith("rotary_emb.inv_freq") or (
        config.tie_word_embeddings and name == "lm_head.weight"
    )


def parameter_layout(
    config: Qwen3MoeConfig,
    ctx: ParallelContext,
    local_vocabulary: range,
    tensors: Container[str],
) -> Iterator[Piece]:
    """Every piece of every parameter of this rank. Pure.

    Args:
        tensors: the names on disk, which tell the two forms of the experts apart: one tensor per
            expert and projection, or one of all experts.
    """
    vocab, hidden = config.vocab_size, config.hidden_size
    yield from _whole("model.embed_tokens.weight", (vocab, hidden))
    yield from _whole("model.norm.weight", (hidden,))
    if not config.tie_word_embeddings:
        rows = slice(local_vocabulary.start, local_vocabulary.stop)
        yield Piece("lm_head.weight", (ALL,), "lm_head.weight", (vocab, hidden), (rows,))
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        yield from _whole(f"{prefix}input_layernorm.weight", (hidden,))
        yield from _whole(f"{prefix}post_attention_layernorm.weight", (hidden,))
        yield from _attention(f"{prefix}self_attn.", config, ctx)
        if not is_sparse(config, layer):
            yield from _dense(f"{prefix}mlp.", config, ctx)
        elif f"{prefix}mlp.experts.gate_up_proj" in tensors:
            yield from _fused_experts(f"{prefix}mlp.", config, ctx)
        else:
            yield from _experts(f"{prefix}mlp.", config, ctx)


def _whole(name: str, shape: tuple[int, ...]) -> Iterator[Piece]:
    yield Piece(name, (ALL,), name, shape, (ALL,))


def _rows(name: str, shape: tuple[int, ...], rows: slice) -> Piece:
    return Piece(name, (ALL,), name, shape, (rows,))


def _columns(name: str, shape: tuple[int, ...], columns: slice) -> Piece:
    return Piece(name, (ALL,), name, shape, (ALL, columns))


def _attention(prefix: str, config: Qwen3MoeConfig, ctx: ParallelContext) -> Iterator[Piece]:
    hidden, head_dim = config.hidden_size, head_dim_of(config)
    local = local_config(config, ctx)
    query_width = config.num_attention_heads * head_dim
    kv_width = config.num_key_value_heads * head_dim
    query = _share(ctx.tp_rank, local.num_attention_heads * head_dim)
    # ranks that share a KV head are neighbours
    first_kv_head = ctx.tp_rank * config.num_key_value_heads // ctx.tp_size
    kv = slice(first_kv_head * head_dim, (first_kv_head + local.num_key_value_heads) * head_dim)

    yield _rows(f"{prefix}q_proj.weight", (query_width, hidden), query)
    yield _rows(f"{prefix}k_proj.weight", (kv_width, hidden), kv)
    yield _rows(f"{prefix}v_proj.weight", (kv_width, hidden), kv)
    yield _columns(f"{prefix}o_proj.weight", (hidden, query_width), query)
    yield from _whole(f"{prefix}q_norm.weight", (head_dim,))
    yield from _whole(f"{prefix}k_norm.weight", (head_dim,))
    if config.attention_bias:
        yield _rows(f"{prefix}q_proj.bias", (query_width,), query)
        yield _rows(f"{prefix}k_proj.bias", (kv_width,), kv)
        yield _rows(f"{prefix}v_proj.bias", (kv_width,), kv)
        yield from _whole(f"{prefix}o_proj.bias", (hidden,))


def _dense(prefix: str, config: Qwen3MoeConfig, ctx: ParallelContext) -> Iterator[Piece]:
    hidden, width = config.hidden_size, config.intermediate_size
    share = _share(ctx.tp_rank, width // ctx.tp_size)
    yield _rows(f"{prefix}gate_proj.weight", (width, hidden), share)
    yield _rows(f"{prefix}up_proj.weight", (width, hidden), share)
    yield _columns(f"{prefix}down_proj.weight", (hidden, width), share)


def _experts(prefix: str, config: Qwen3MoeConfig, ctx: ParallelContext) -> Iterator[Piece]:
    """One tensor per expert and projection: Qwen's releases."""
    hidden, width = config.hidden_size, config.moe_intermediate_size
    local_width = width // ctx.tp_size
    share = _share(ctx.tp_rank, local_width)
    gate_up, down = f"{prefix}experts.gate_up_proj", f"{prefix}experts.down_proj"
    yield from _whole(f"{prefix}gate.weight", (config.num_experts, hidden))
    for expert in range(config.num_experts):
        source = f"{prefix}experts.{expert}."
        gate_rows, up_rows = slice(0, local_width), slice(local_width, 2 * local_width)
        for name, rows in (("gate_proj", gate_rows), ("up_proj", up_rows)):
            target = (slice(expert, expert + 1), rows)
            yield Piece(gate_up, target, f"{source}{name}.weight", (width, hidden), (share,))
        yield Piece(
            down,
            (slice(expert, expert + 1),),
            f"{source}down_proj.weight",
            (hidden, width),
            (ALL, share),
        )


def _fused_experts(prefix: str, config: Qwen3MoeConfig, ctx: ParallelContext) -> Iterator[Piece]:
    """One tensor of all experts: transformers' `save_original_format=False`."""
    hidden, width, experts = config.hidden_size, config.moe_intermediate_size, config.num_experts
    local_width = width // ctx.tp_size
    gate, up = (
        slice(start + ctx.tp_rank * local_width, start + (ctx.tp_rank + 1) * local_width)
        for start in (0, width)
    )
    gate_up, down = f"{prefix}experts.gate_up_proj", f"{prefix}experts.down_proj"
    shape = (experts, 2 * width, hidden)
    yield from _whole(f"{prefix}gate.weight", (experts, hidden))
    yield Piece(gate_up, (ALL, slice(0, local_width)), gate_up, shape, (ALL, gate))
    yield Piece(gate_up, (ALL, slice(local_width, None)), gate_up, shape, (ALL, up))
    share = _share(ctx.tp_rank, local_width)
    yield Piece(down, (ALL,), down, (experts, hidden, width), (ALL, ALL, share))


def _share(rank: int, size: int) -> slice:
    return slice(rank * size, (rank + 1) * size)
