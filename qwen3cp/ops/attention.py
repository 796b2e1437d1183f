"""Fused attention over packed, padded or paged sequences.

T rows of the batch, N query heads, Nkv key and value heads, G = N / Nkv query heads that share one,
D head dim, Dv head dim of the values.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from qwen3cp.ops.attention_call import OP, CheckedCall, check_call, check_template
from qwen3cp.ops.attention_decode import attend_rows, flash_attention, merge_, run_of
from qwen3cp.ops.checks import Kernel
from qwen3cp.ops.settings import settings

# What takes the place of a masked score. It is replaced, not added to, so a row with all of its
# keys masked comes out as the average of the values.
_MASKED_SCORE = torch.finfo(torch.float32).min

# Up to so many rows (of all G heads), or keys, torch's own flash attention is the quickest.
_FEW_ROWS = 64
_FEW_KEYS = 256
# Rows (of all G heads) of a block: enough for a good product, few enough that causal rows skip most
# of the keys they cannot see. Between the two, so many that the scores of a block take this much.
_MIN_BLOCK_ROWS, _MAX_BLOCK_ROWS = 128, 256
_BLOCK_BYTES = 1 << 22


def fused_infer_attention_score(
    query: Tensor, key: Tensor, value: Tensor, **options
) -> tuple[Tensor, Tensor]:
    """softmax(scale * query @ key^T, masked) @ value for each request: (output, log-sum-exp).

    The query heads that share a head of keys are rows of one product, so keys and values are not
    repeated; keys that no row sees are not touched.
    """
    call = check_call(query, key, value, **options)
    if call.template is not None:
        check_template(call.template)
    # Rows that see no key stay as they are filled here.
    output = query.new_zeros(call.output_shape(query))
    no_key = _MASKED_SCORE if call.is_decode else torch.inf
    lse = query.new_full(call.lse_shape(query), no_key, dtype=torch.float32)
    if query.numel() == 0 or key.numel() == 0:
        return output, lse

    heads, kv_heads = call.num_heads, call.num_kv_heads
    blocks = [] if call.block_table is None else _blocks(call, len(key))
    if _is_row_each(call, key, value):
        rows = query.view(len(call.kv_lengths), heads, -1)
        row_lse = lse if call.with_lse else lse.new_empty(len(rows) * heads)
        attend_rows(
            rows,
            key,
            value,
            blocks,
            call.kv_lengths,
            call.scale,
            output.view(rows.shape),
            row_lse.view(len(rows), heads),
        )
        return output, lse

    queries = _per_request(query, call.query_layout, heads, call.q_lengths)
    outputs = _per_request(output, call.output_layout, heads, call.q_lengths)
    lses: Sequence[Tensor | None] = [None] * len(queries)
    if call.with_lse:
        lses = _per_request(lse, "TND" if call.is_packed else "BNSD", heads, call.q_lengths)
    if call.block_table is None:
        keys = _per_request(key, call.query_layout, kv_heads, call.kv_lengths)
        values = _per_request(value, call.query_layout, kv_heads, call.kv_lengths)
    else:
        keys, values = (_read_pages(cache, blocks, call) for cache in (key, value))
    requests = zip(queries, keys, values, outputs, lses, strict=True)
    for request, (q, k, v, out, out_lse) in enumerate(requests):
        low, high = call.visible(request)
        # Rows before -high or from num_keys - low on see no key.
        rows = range(max(0, -high), min(q.shape[0], k.shape[0] - low))
        if not rows or not k.shape[0]:
            continue
        is_small = len(rows) * heads <= _FEW_ROWS * kv_heads or k.shape[0] <= _FEW_KEYS
        can_flash = q.shape[2] == v.shape[2]
        if can_flash and len(q) > 1 and _is_causal(call, request):
            is_whole = len(q) == len(k)
            if _has_short_heads(q) or is_small and is_whole:
                _attend_causally(q, k, v, call.scale, out, out_lse)
                continue
        attend = _attend_at_once if is_small and can_flash else _attend_in_blocks
        attend(call, request, rows, q, k, v, out, out_lse)
    return output, lse


def _per_request(x: Tensor, layout: str, num_heads: int, lengths: list[int]) -> Sequence[Tensor]:
    """Views (length, heads, head dim) of each request."""
    match layout:
        case "TND":
            return x.split(lengths)
        case "NTD":
            return x.transpose(0, 1).split(lengths)
        case "BSH":
            x = x.view(*x.shape[:2], num_heads, -1)
        case "BNSD":
            x = x.transpose(1, 2)
    return [x[request, :length] for request, length in enumerate(lengths)]


def _is_row_each(call: CheckedCall, key: Tensor, value: Tensor) -> bool:
    """Whether one row of each request sees all of its keys, in caches that `attend_rows` takes."""
    if call.block_table is None or key.dim() != 3 or key.shape != value.shape:
        return False
    if call.mask is not None or call.pse_shift is not None or set(call.q_lengths) != {1}:
        return False
    seen = (call.visible(request) for request in range(len(call.kv_lengths)))
    return all(
        low <= 0 and high >= length - 1
        for (low, high), length in zip(seen, call.kv_lengths, strict=True)
    )


def _blocks(call: CheckedCall, num_blocks: int) -> list[list[int]]:
    """The blocks of each request's keys, of so many that a cache has."""
    assert call.block_table is not None
    blocks = [
        row[: -(-length // call.block_size)] if rows else []
        for row, rows, length in zip(
            call.block_table.tolist(), call.q_lengths, call.kv_lengths, strict=True
        )
    ]
    used = [block for row in blocks for block in row]
    if used and not 0 <= min(used) <= max(used) < num_blocks:
        raise IndexError(
            f"{OP}: block_table has blocks {min(used)}..{max(used)}, the cache has {num_blocks}"
        )
    return blocks


def _read_pages(
    cache: Tensor, all_blocks: Sequence[Sequence[int]], call: CheckedCall
) -> Iterator[Tensor]:
    """(length, Nkv, D) of each request: views where its pages follow each other, else copies, which
    last until the next request is read."""
    if cache.dim() == 4:  # (blocks, Nkv, block_size, D)
        pages = cache.transpose(1, 2)
    else:  # (blocks, block_size, Nkv * D)
        pages = cache.unflatten(2, (call.num_kv_heads, -1))
    longest = max(map(len, all_blocks))
    copies: Tensor | None = None
    for blocks, length in zip(all_blocks, call.kv_lengths, strict=True):
        run = run_of(blocks)
        if run is not None:
            read = pages[run]
        else:
            if copies is None:  # one buffer for all: new memory costs more than what is copied
                copies = pages.new_empty(longest, *pages.shape[1:])
            read = copies[: len(blocks)]
            torch.index_select(pages, 0, torch.tensor(blocks, device=cache.device), out=read)
        yield read.flatten(0, 1)[:length]


def _is_causal(call: CheckedCall, request: int) -> bool:
    """Whether the rows are the last of the keys, and each sees the keys up to its own."""
    rows, keys = call.q_lengths[request], call.kv_lengths[request]
    low, high = call.visible(request)
    is_last = high == keys - rows >= 0 and low <= 1 - rows
    return is_last and call.mask is None and call.pse_shift is None


def _has_short_heads(query: Tensor) -> bool:
    """Whether in blocks a softmax would take longer than the products around it."""
    return query.dtype == torch.float32 and query.shape[2] <= 64


def _attend_causally(
    query: Tensor,  # (rows, N, D)
    key: Tensor,  # (keys, Nkv, D)
    value: Tensor,  # (keys, Nkv, D)
    scale: float,
    output: Tensor,  # (rows, N, D), written
    lse: Tensor | None,  # (rows, N, 1), written
) -> None:
    """The rows of the last keys: those before, which all rows see, and then each with its own."""
    q = query.unflatten(1, (key.shape[1], -1)).permute(2, 1, 0, 3)  # (G, Nkv, rows, D)
    # the heads that share keys are the batch
    k, v = (x.transpose(0, 1).expand(q.shape[0], -1, -1, -1) for x in (key, value))
    seen_by_all = key.shape[0] - query.shape[0]
    result, result_lse = flash_attention(
        q, k[:, :, seen_by_all:], v[:, :, seen_by_all:], scale, is_causal=True
    )
    if seen_by_all:
        merge_(
            result,
            result_lse,
            *flash_attention(q, k[:, :, :seen_by_all], v[:, :, :seen_by_all], scale),
        )
    output.copy_(result.permute(2, 1, 0, 3).flatten(1, 2))
    if lse is not None:
        lse[..., 0] = result_lse.permute(2, 1, 0).flatten(1, 2)


def _attend_at_once(
    call: CheckedCall,
    request: int,
    rows: range,
    query: Tensor,  # (rows, N, D)
    key: Tensor,  # (keys, Nkv, D)
    value: Tensor,  # (keys, Nkv, D)
    output: Tensor,  # (rows, N, D), written
    lse: Tensor | None,  # (rows, N, 1), written
) -> None:
    """Few rows, or few keys."""
    num_kv_heads, head_dim = key.shape[1:]
    q = query[rows.start : rows.stop].unflatten(1, (num_kv_heads, -1))  # (rows, Nkv, G, D)
    q = q.transpose(0, 1).reshape(1, num_kv_heads, -1, head_dim)

    keys = range(key.shape[0])
    masked = _masked(call, request, rows, keys)
    bias = None
    if masked is not None or call.pse_shift is not None:
        # float32 swallows a score that is added to the masked score
        bias = query.new_zeros(1, 1, len(rows), 1, len(keys), dtype=torch.float32)
        if masked is not None:
            bias.masked_fill_(masked.view(1, 1, len(rows), 1, len(keys)), _MASKED_SCORE)
        if call.pse_shift is not None:  # (Nkv, G, rows, keys) -> (1, Nkv, rows, G, keys)
            pse = _pse(call, request, rows, keys).unflatten(0, (num_kv_heads, -1))
            bias = bias + pse.transpose(1, 2).unsqueeze(0)
        bias = bias.expand(-1, -1, -1, q.shape[2] // len(rows), -1).flatten(2, 3)
    k, v = (x.transpose(0, 1).unsqueeze(0) for x in (key, value))
    result, result_lse = flash_attention(q, k, v, call.scale, bias=bias)
    seen = slice(rows.start, rows.stop)
    output[seen] = result[0].unflatten(1, (len(rows), -1)).transpose(0, 1).flatten(1, 2)
    if lse is not None:
        lse[seen, :, 0] = result_lse[0].unflatten(1, (len(rows), -1)).transpose(0, 1).flatten(1, 2)
    _zero_masked_rows(call, masked, output[seen], None if lse is None else lse[seen])


def _attend_in_blocks(
    call: CheckedCall,
    request: int,
    rows: range,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor | None,
) -> None:
    """Many rows: one head of keys at a time, and of its rows a block, all visible keys at once."""
    num_keys, num_kv_heads, _ = key.shape
    group = call.num_heads // num_kv_heads
    dtype = torch.float32 if settings.float32_scores else settings.product_dtype(query.dtype)
    block_rows = _BLOCK_BYTES // (dtype.itemsize * num_keys)
    block_rows = min(max(block_rows, _MIN_BLOCK_ROWS), _MAX_BLOCK_ROWS)
    block_rows = max(1, block_rows // group)
    buffer = query.new_empty(block_rows * group * num_keys, dtype=dtype)
    blocks = list(_blocks_of_rows(call, request, rows, num_keys, block_rows))
    seen_masks: dict[tuple[int, int, int], Tensor | None] = {}

    def mask_of(block: range, part: range) -> Tensor | None:
        """_masked(...), which without a mask of the caller's is the same for most blocks."""
        if call.mask is not None:
            return _masked(call, request, block, part)
        shape = len(block), len(part), block.start - part.start
        if shape not in seen_masks:
            seen_masks[shape] = _masked(call, request, block, part)
        return seen_masks[shape]

    for head in range(num_kv_heads):
        heads = slice(head * group, (head + 1) * group)
        k = key[:, head].to(dtype).t().contiguous()  # (D, keys), the quicker form for a product
        v = value[:, head].to(dtype).contiguous()
        for block, keys, parts in blocks:
            at = slice(block.start, block.stop)
            q = query[at, heads].to(dtype).flatten(0, 1)  # (rows * G, D)
            scores = buffer[: len(q) * len(keys)].view(-1, len(keys))
            k_seen, v_seen = k[:, keys.start : keys.stop], v[keys.start : keys.stop]
            torch.addmm(scores, q, k_seen, beta=0, alpha=call.scale, out=scores)
            by_row = scores.view(-1, group, len(keys))
            if call.pse_shift is not None:
                by_row += _pse(call, request, block, keys)[heads].transpose(0, 1)
            masked = None
            for part in parts:
                masked = mask_of(block, part)
                if masked is not None:
                    hidden = by_row.narrow(2, part.start - keys.start, len(part))
                    hidden.masked_fill_(masked.unsqueeze(1), torch.finfo(dtype).min)
            out, out_lse = output[at, heads], None if lse is None else lse[at, heads]
            if out_lse is not None:
                out_lse[..., 0] = scores.float().logsumexp(-1).view(-1, group)
            out.copy_(_weighted_sum(scores, v_seen, query.dtype).view_as(out))
            _zero_masked_rows(call, masked, out, out_lse)


def _blocks_of_rows(
    call: CheckedCall, request: int, rows: range, num_keys: int, block_rows: int
) -> Iterator[tuple[range, range, list[range]]]:
    """Blocks of rows, the keys that some of each may see, and those of them that not all may."""
    low, high = call.visible(request)
    for start in range(rows.start, rows.stop, block_rows):
        block = range(start, min(start + block_rows, rows.stop))
        keys = range(max(0, block.start + low), min(num_keys, block.stop + high))
        yield block, keys, list(_partly_visible(call, block, keys, low, high))


def _weighted_sum(scores: Tensor, value: Tensor, dtype: torch.dtype) -> Tensor:
    """softmax(scores) @ value; the scores are overwritten."""
    if dtype == torch.bfloat16 and settings.float32_scores:
        # as the NPU: weights are rounded before the product, their sum is not
        weights = scores.sub_(scores.amax(-1, keepdim=True)).exp_()
        total = weights.sum(-1, keepdim=True)
        bits = weights.view(torch.int32)  # to bfloat16, ties away from zero
        bits.add_(1 << 15).bitwise_and_(-1 << 16)
        return torch.mm(weights, value).div_(total)
    return torch.mm(torch.softmax(scores, -1, out=scores), value)


def _partly_visible(
    call: CheckedCall, rows: range, keys: range, low: int, high: int
) -> Iterator[range]:
    """The runs of keys that not all of the rows may see."""
    first_common = max(keys.start, rows.stop - 1 + low)
    end_common = min(keys.stop, rows.start + high + 1)
    if call.mask is not None or call.zero_masked_rows or first_common >= end_common:
        yield keys
        return
    if keys.start < first_common:
        yield range(keys.start, first_common)
    if end_common < keys.stop:
        yield range(end_common, keys.stop)


def _masked(call: CheckedCall, request: int, rows: range, keys: range) -> Tensor | None:
    """(rows, keys), true where a row may not see a key; None if all may see all."""
    masked = None
    low, high = call.visible(request)
    all_masked = partial(torch.ones, len(rows), len(keys), dtype=torch.bool)
    if rows.start + high < keys.stop - 1:
        masked = all_masked().triu_(rows.start - keys.start + high + 1)
    if rows.stop - 1 + low > keys.start:
        below = all_masked().tril_(rows.start - keys.start + low - 1)
        masked = below if masked is None else masked | below
    if call.mask is not None:
        mask = call.mask[request if call.mask.shape[0] > 1 else 0]
        mask = mask[rows.start : rows.stop, keys.start : keys.stop]
        masked = mask if masked is None else masked | mask
    return masked


def _pse(call: CheckedCall, request: int, rows: range, keys: range) -> Tensor:
    """(N, rows, keys): what is added to the scores."""
    assert call.pse_shift is not None
    pse = call.pse_shift[request if call.pse_shift.shape[0] > 1 else 0]
    return pse[:, rows.start : rows.stop, keys.start : keys.stop]


def _zero_masked_rows(
    call: CheckedCall, masked: Tensor | None, output: Tensor, lse: Tensor | None
) -> None:
    if call.zero_masked_rows and masked is not None:
        empty = masked.all(-1).view(-1, 1, 1)
        output.masked_fill_(empty, 0.0)
        if lse is not None:
            lse.masked_fill_(empty, torch.inf)


def _fused_infer_attention_score_meta(
    query: Tensor, key: Tensor, value: Tensor, **options
) -> tuple[Tensor, Tensor]:
    call = check_call(query, key, value, **options)
    output = query.new_empty(call.output_shape(query))
    return output, query.new_empty(call.lse_shape(query), dtype=torch.float32)


KERNELS = {OP: Kernel(fused_infer_attention_score, _fused_infer_attention_score_meta, check_call)}
