"""Which blocks of which checkpoint tensors make up each parameter of a rank.

The tables name every tensor of a Qwen3-MoE checkpoint. Reading and writing both go by them: a
loader fills each parameter from its pieces, a saver finds each tensor on disk in the ranks' pieces.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Sequence
from typing import NamedTuple

from transformers import Qwen3MoeConfig

from qwen3cp.config import (
    head_dim_of,
    is_sparse,
    local_config,
    local_experts,
    local_vocabulary,
)
from qwen3cp.parallel import ParallelContext
from qwen3cp.routing import ExpertPlacement

__all__ = ["Parameter", "Piece", "is_ignored", "parameter_layout"]


class Piece(NamedTuple):
    """A block of one tensor on disk, and where it goes.

    A tensor of more than two dimensions is seen as rows of its last one, a vector as rows of one
    element. A block is always one run of elements of the parameter.
    """

    source: str
    shape: tuple[int, ...]
    """Of the whole tensor on disk."""
    rows: range
    columns: range
    start: int
    """The element of the flattened parameter that the first element of the block goes to."""

    @property
    def num_rows(self) -> int:
        return len(self.rows)

    @property
    def num_columns(self) -> int:
        return len(self.columns)

    @property
    def numel(self) -> int:
        return self.num_rows * self.num_columns

    @property
    def is_contiguous(self) -> bool:
        """Whether the block is one run of bytes on disk, too."""
        return self.num_rows == 1 or self.num_columns == row_length(self.shape)


class Parameter(NamedTuple):
    """A parameter of a rank: its name in the model, its shape there, and what it is made of."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def row_length(shape: tuple[int, ...]) -> int:
    """Columns of a tensor on disk."""
    return shape[-1] if len(shape) > 1 else 1


def is_ignored(name: str, config: Qwen3MoeConfig) -> bool:
    """Tensors that some checkpoints hold and no parameter needs."""
    return name.endswith("rotary_emb.inv_freq") or (
        config.tie_word_embeddings and name == "lm_head.weight"
    )


def parameter_layout(
    config: Qwen3MoeConfig,
    ctx: ParallelContext,
    tensors: Container[str] = (),
    placement: ExpertPlacement | None = None,
) -> list[Parameter]:
    """Every parameter of a rank, in the model's order. Pure: `ParallelContext.describe` will do.

    With tied embeddings lm_head.weight is not among them: it is rows of the embedding.

    Args:
        tensors: the names on disk, which tell the two forms of the experts apart: one tensor per
            expert and projection (Qwen's releases), or one of all experts. Per expert by default.
        placement: which expert each slot of a layer holds; None is their own order.
    """
    return list(_parameters(config, ctx, tensors, placement))


def _parameters(
    config: Qwen3MoeConfig,
    ctx: ParallelContext,
    tensors: Container[str],
    placement: ExpertPlacement | None,
) -> Iterator[Parameter]:
    vocab, hidden = config.vocab_size, config.hidden_size
    local = local_config(config, ctx)
    yield _whole("model.embed_tokens.weight", (vocab, hidden))
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        yield from _attention(f"{prefix}self_attn.", config, local, ctx)
        if not is_sparse(config, layer):
            yield from _dense(f"{prefix}mlp.", config, ctx)
        else:
            yield _whole(f"{prefix}mlp.gate.weight", (config.num_experts, hidden))
            order = placement.layers[layer] if placement else range(config.num_experts)
            yield from _experts(f"{prefix}mlp.experts.", config, ctx, tensors, order)
        yield _whole(f"{prefix}input_layernorm.weight", (hidden,))
        yield _whole(f"{prefix}post_attention_layernorm.weight", (hidden,))
    yield _whole("model.norm.weight", (hidden,))
    if not config.tie_word_embeddings:
        yield _rows("lm_head.weight", (vocab, hidden), local_vocabulary(config, ctx))


def _whole(name: str, shape: tuple[int, ...]) -> Parameter:
    return _rows(name, shape, range(0, shape[0]))


def _rows(name: str, shape: tuple[int, ...], rows: range) -> Parameter:
    piece = Piece(name, shape, rows, range(0, row_length(shape)), 0)
    return Parameter(name, (piece.num_rows, *shape[1:]), (piece,))


def _columns(name: str, shape: tuple[int, int], columns: range) -> Parameter:
    piece = Piece(name, shape, range(0, shape[0]), columns, 0)
    return Parameter(name, (shape[0], piece.num_columns), (piece,))


def _attention(
    prefix: str, config: Qwen3MoeConfig, local: Qwen3MoeConfig, ctx: ParallelContext
) -> Iterator[Parameter]:
    hidden, head_dim = config.hidden_size, head_dim_of(config)
    query_width = config.num_attention_heads * head_dim
    kv_width = config.num_key_value_heads * head_dim
    query = _share(ctx.tp_rank, local.num_attention_heads * head_dim)
    # ranks that share a KV head are neighbours
    first_kv_head = ctx.tp_rank * config.num_key_value_heads // ctx.tp_size
    kv = range(first_kv_head * head_dim, (first_kv_head + local.num_key_value_heads) * head_dim)
    by_rows = {"q": (query_width, query), "k": (kv_width, kv), "v": (kv_width, kv)}

    for name, (width, rows) in by_rows.items():
        yield _rows(f"{prefix}{name}_proj.weight", (width, hidden), rows)
        if config.attention_bias:
            yield _rows(f"{prefix}{name}_proj.bias", (width,), rows)
    yield _columns(f"{prefix}o_proj.weight", (hidden, query_width), query)
    if config.attention_bias:
        yield _whole(f"{prefix}o_proj.bias", (hidden,))
    yield _whole(f"{prefix}q_norm.weight", (head_dim,))
    yield _whole(f"{prefix}k_norm.weight", (head_dim,))


def _dense(prefix: str, config: Qwen3MoeConfig, ctx: ParallelContext) -> Iterator[Parameter]:
    hidden, width = config.hidden_size, config.intermediate_size
    share = _share(ctx.tp_rank, width // ctx.tp_size)
    yield _rows(f"{prefix}gate_proj.weight", (width, hidden), share)
    yield _rows(f"{prefix}up_proj.weight", (width, hidden), share)
    yield _columns(f"{prefix}down_proj.weight", (hidden, width), share)


def _experts(
    prefix: str,
    config: Qwen3MoeConfig,
    ctx: ParallelContext,
    tensors: Container[str],
    order: Sequence[int],
) -> Iterator[Parameter]:
    """gate_up_proj [E, 2I, H], gate rows before up rows, and down_proj [E, H, I] of this rank."""
    hidden, width, num_experts = (
        config.hidden_size,
        config.moe_intermediate_size,
        config.num_experts,
    )
    if ctx.moe == "ep":
        slots, share = local_experts(num_experts, ctx.rank, ctx.world_size), range(0, width)
    else:
        slots, share = range(num_experts), _share(ctx.tp_rank, width // ctx.tp_size)
    experts = [order[slot] for slot in slots]
    gate_up_name, down_name = f"{prefix}gate_up_proj", f"{prefix}down_proj"
    all_hidden = range(0, hidden)
    local_width = len(share)
    size = local_width * hidden  # elements of one expert's gate, up or down
    gate_up, down = [], []
    if gate_up_name in tensors:  # transformers' `save_original_format=False`
        gate_up_shape, down_shape = (num_experts, 2 * width, hidden), (num_experts, hidden, width)
        for place, expert in enumerate(experts):
            for half in range(2):
                first = (2 * expert + half) * width
                rows = range(first + share.start, first + share.stop)
                start = (2 * place + half) * size
                gate_up.append(Piece(gate_up_name, gate_up_shape, rows, all_hidden, start))
            rows = range(expert * hidden, (expert + 1) * hidden)
            down.append(Piece(down_name, down_shape, rows, share, place * size))
    else:
        by_rows, by_columns = (width, hidden), (hidden, width)
        for place, expert in enumerate(experts):
            source = f"{prefix}{expert}."
            for half, name in enumerate(("gate_proj.weight", "up_proj.weight")):
                start = (2 * place + half) * size
                gate_up.append(Piece(source + name, by_rows, share, all_hidden, start))
            name = f"{source}down_proj.weight"
            down.append(Piece(name, by_columns, all_hidden, share, place * size))
    yield Parameter(gate_up_name, (len(experts), 2 * local_width, hidden), tuple(gate_up))
    yield Parameter(down_name, (len(experts), hidden, local_width), tuple(down))


def _share(rank: int, size: int) -> range:
    return range(rank * size, (rank + 1) * size)
