"""Expert parallelism in a prefill: rows go where their experts are, and results come back.

Each CP rank has rows of its own, of which its TP ranks hold copies; experts are divided over all
cp x tp ranks. Two forms, which handle each row once:

all_gather: rows are gathered over CP, each rank runs its experts on all of them, and the partial
results are reduce-scattered over all ranks and gathered over TP. No split size depends on routing,
so nothing is read back from the device. With one CP rank that is a single all-reduce.

all_to_all: the TP ranks take a share of the rows each, and send every row once to each rank that
has one of its experts. That rank adds up what its experts make of it, and sends the sum back. The
split sizes are read back once a layer.

Letters: T rows of this rank, R padded rows of a CP rank, C and N CP and TP ranks, W = C * N, H
hidden size, k experts a token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from qwen3cp import collectives, int8
from qwen3cp.parallel import ParallelContext

__all__ = ["all_gather_bytes", "all_to_all_bytes", "exchange", "exchange_form"]

KIND = "expert_exchange"
SAVED_BYTES = 16 << 20
"""What all_to_all must save to be chosen: about what a link of 140 GB/s carries in the 0.1 ms that
reading the split sizes and four more launches take."""

Experts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(rows [n, H], weights [n, k], experts [n, k]) -> [n, H], summed over the experts of this rank."""


def exchange_form(
    ctx: ParallelContext, padded_rows: int, hidden_size: int, element_size: int, top_k: int
) -> Literal["all_gather", "all_to_all"]:
    """Which form runs: `CommConfig.exchange`, or for "auto" all_to_all if it is expected to save
    more than `SAVED_BYTES` of `all_gather_bytes`. The same on every rank. Not collective."""
    if ctx.comm.exchange != "auto":
        return ctx.comm.exchange
    sizes = padded_rows * ctx.cp_size, hidden_size, element_size, top_k
    quantised = ctx.comm.exchange_rows == "int8"
    arguments = *sizes, ctx.cp_size, ctx.tp_size, quantised
    saved = all_gather_bytes(*arguments) - all_to_all_bytes(*arguments)
    return "all_to_all" if saved > SAVED_BYTES else "all_gather"


def all_gather_bytes(
    num_rows: int,
    hidden_size: int,
    element_size: int,
    top_k: int,
    cp_size: int,
    tp_size: int,
    quantised: bool = False,
) -> int:
    """Bytes that a rank receives to exchange num_rows rows of all CP ranks by all_gather.

    2 (W-1)/W * rows * H * b for rows of b bytes a value: (C-1)/C on the way out, the rest on the
    way back. And 8 k (C-1)/C a row for its experts and weights. With int8, H + 4 a row goes out.
    """
    world = cp_size * tp_size
    row = hidden_size * element_size
    out = (hidden_size + 4 if quantised else row) + 8 * top_k
    if cp_size == 1:
        return 2 * (world - 1) * num_rows * row // world
    back = (world - 1) * row + (tp_size - 1) * row
    return num_rows * ((cp_size - 1) * out * tp_size + back) // world


def all_to_all_bytes(
    num_rows: int,
    hidden_size: int,
    element_size: int,
    top_k: int,
    cp_size: int,
    tp_size: int,
    quantised: bool = False,
) -> int:
    """The same by all_to_all, where every expert is as likely as any other.

    A row goes to W (1 - (1 - 1/W)^k) ranks, of which (W-1)/W are others; each of the W ranks has
    rows / W of them. The results are then gathered over TP.
    """
    world = cp_size * tp_size
    row = hidden_size * element_size
    out = (hidden_size + 4 if quantised else row) + 8 * top_k
    copies = world * (1 - (1 - 1 / world) ** top_k) * (world - 1) / world
    return int(num_rows / world * (copies * (out + row) + (tp_size - 1) * row))


def exchange(
    hidden: torch.Tensor,
    route: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    run: Experts,
    ctx: ParallelContext,
    *,
    padded_rows: int,
    top_k: int,
    owners: torch.Tensor,
    layer: int | None = None,
) -> torch.Tensor:
    """The experts' output for the T rows of this rank: [T, H] -> [T, H].

    Collective over world_group, cp_group and tp_group: every rank must call it, also without rows.

    Args:
        route: rows -> (weights float32, expert slots int32), both [n, k].
        run: what this rank's experts make of rows.
        padded_rows: R, the same on every rank.
        owners: int32 [slots]: the rank of the replica that has each expert slot.
    """
    form = exchange_form(ctx, padded_rows, hidden.shape[1], hidden.element_size(), top_k)
    if form == "all_to_all":
        return _by_all_to_all(hidden, route, run, ctx, top_k, owners, layer)
    if ctx.cp_size == 1:
        weights, experts = route(hidden)
        return collectives.all_reduce_world(run(hidden, weights, experts), ctx, KIND, layer)
    return _by_all_gather(hidden, route, run, ctx, padded_rows, top_k, len(owners), layer)


def _by_all_gather(
    hidden: torch.Tensor,
    route: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    run: Experts,
    ctx: ParallelContext,
    padded_rows: int,
    top_k: int,
    num_slots: int,
    layer: int | None,
) -> torch.Tensor:
    num_rows, width = hidden.shape
    size = -(-padded_rows // ctx.tp_size) * ctx.tp_size  # each TP rank's share is whole
    routing = torch.zeros(size, 2, top_k, dtype=torch.int32, device=hidden.device)
    routing[num_rows:, 1] = num_slots  # no rank has that one
    if num_rows:
        weights, experts = route(hidden)
        routing[:num_rows, 0] = weights.view(torch.int32)
        routing[:num_rows, 1] = experts
    rows = hidden
    if num_rows < size:
        rows = torch.nn.functional.pad(hidden, (0, 0, 0, size - num_rows))
    if ctx.comm.exchange_rows == "int8":
        blocks = collectives.gather_rows(int8.pack(rows, 1), ctx, kind=KIND, layer=layer)
        rows = hidden.new_empty(ctx.cp_size * size, width)
        int8.dequantise_(rows, blocks)
    else:
        rows = collectives.gather_rows(rows, ctx, kind=KIND, layer=layer)
    routing = collectives.gather_rows(routing, ctx, kind=KIND, layer=layer)
    weights, experts = routing[:, 0].contiguous().view(torch.float32), routing[:, 1].contiguous()
    partial = run(rows, weights, experts)
    share = collectives.reduce_scatter_world(partial, ctx, KIND, layer)
    return collectives.gather_tp(share, ctx, KIND, layer)[:num_rows]


def _by_all_to_all(
    hidden: torch.Tensor,
    route: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    run: Experts,
    ctx: ParallelContext,
    top_k: int,
    owners: torch.Tensor,
    layer: int | None,
) -> torch.Tensor:
    num_rows, width = hidden.shape
    size = -(-num_rows // ctx.tp_size)
    mine = hidden[ctx.tp_rank * size : (ctx.tp_rank + 1) * size]
    quantised = ctx.comm.exchange_rows == "int8"
    row_bytes = int8.block_bytes(1, width) if quantised else width * hidden.element_size()
    if len(mine):
        weights, experts = route(mine)
        if quantised:
            # one block a row: its scale, then its values
            packed = int8.pack(mine, len(mine))
        else:
            packed = mine.contiguous().view(torch.int8)
        # rows and their routing as bytes, which travel together
        packed = torch.cat((packed, weights.view(torch.int8), experts.view(torch.int8)), dim=1)
        sent, place, counts, _ = torch.ops.npu.npu_moe_init_routing_v2(
            packed,
            _destinations(owners[experts.long()], ctx.world_size),
            active_num=experts.numel(),
            expert_num=ctx.world_size + 1,
            expert_tokens_num_type=1,
            expert_tokens_num_flag=True,
            active_expert_range=[0, ctx.world_size],
            quant_mode=-1,
        )
    else:
        place = None
        sent = torch.empty(0, row_bytes + 8 * top_k, dtype=torch.int8, device=hidden.device)
        counts = torch.zeros(ctx.world_size, dtype=torch.int64, device=hidden.device)
    # the one thing that is read back: how many rows each rank sends to each
    matrix = collectives.gather_counts(counts, ctx, KIND, layer)
    to_ranks, from_ranks = matrix[ctx.rank], [row[ctx.rank] for row in matrix]
    sent = sent[: sum(to_ranks)]
    received = collectives.all_to_all_rows(sent, to_ranks, from_ranks, ctx, KIND, layer)
    rows = received[:, :row_bytes]
    if quantised:
        values, scales = int8.unpack(rows, width)
        rows = values[:, 0].float().mul_(scales[:, 0]).to(hidden.dtype)
    else:
        rows = rows.contiguous().view(hidden.dtype)
    weights, experts = received[:, row_bytes:].contiguous().view(torch.int32).chunk(2, dim=1)
    partial = run(rows, weights.contiguous().view(torch.float32), experts.contiguous())
    returned = collectives.all_to_all_rows(partial, from_ranks, to_ranks, ctx, KIND, layer)
    share = hidden.new_zeros(size, width)
    if place is not None:
        # a sum over the ranks that a row went to; the others have the index -1
        share[: len(mine)] = torch.ops.npu.npu_moe_token_unpermute(
            returned, place.abs(), (place >= 0).float().view(len(mine), top_k)
        )
    return collectives.gather_tp(share, ctx, KIND, layer)[:num_rows]


def _destinations(ranks: torch.Tensor, world_size: int) -> torch.Tensor:
    """The rank of each of a row's experts, [n, k], with repeated ones replaced by world_size."""
    same = ranks[:, :, None] == ranks[:, None, :]
    repeated = same.tril(-1).any(-1)
    return ranks.masked_fill(repeated, world_size)
