"""Fused attention over packed, padded or paged sequences."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from qwen3cp.ops.attention_call import OP, CheckedCall, check_call, check_template
from qwen3cp.ops.checks import Kernel
from qwen3cp.ops.settings import settings

# What takes the place of a masked score. It is replaced, not added to, so a row with all of its
# keys masked comes out as the average of the values.
_MASKED_SCORE = torch.finfo(torch.float32).min

# Scores held at a time: 16 MB of float32 before temporaries.
_MAX_SCORES = 1 << 22
# Enough rows for a good product, few enough that causal rows skip most of the keys they cannot see.
_MAX_BLOCK_ROWS = 256


def fused_infer_attention_score(
    query: Tensor, key: Tensor, value: Tensor, **options
) -> tuple[Tensor, Tensor]:
    """softmax(scale * query @ key^T, masked) @ value for each request: (output, log-sum-exp).

    One loop over the requests, one over blocks of query rows. The query heads that share a head of
    keys are rows of one product, so keys and values are not repeated.
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
    queries = _per_request(query, call.query_layout, heads, call.q_lengths)
    outputs = _per_request(output, call.output_layout, heads, call.q_lengths)
    lses: Sequence[Tensor | None] = [None] * len(queries)
    if call.with_lse:
        lses = _per_request(lse, "TND" if call.is_packed else "BNSD", heads, call.q_lengths)
    if call.block_table is None:
        keys = _per_request(key, call.query_layout, kv_heads, call.kv_lengths)
        values = _per_request(value, call.query_layout, kv_heads, call.kv_lengths)
    else:
        keys, values = _read_pages(key, call), _read_pages(value, call)
    requests = zip(queries, keys, values, outputs, lses, strict=True)
    for request, (q, k, v, out, out_lse) in enumerate(requests):
        if q.shape[0] and k.shape[0]:
            _attend(call, request, q, k, v, out, out_lse)
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


def _read_pages(cache: Tensor, call: CheckedCall) -> Iterator[Tensor]:
    """(length, Nkv, D) of each request, read out of the cache one request at a time."""
    assert call.block_table is not None
    for blocks, q_length, kv_length in zip(
        call.block_table, call.q_lengths, call.kv_lengths, strict=True
    ):
        length = kv_length if q_length else 0
        pages = cache.index_select(0, blocks[: -(-length // call.block_size)])
        if cache.dim() == 4:  # (blocks, Nkv, block_size, D)
            rows = pages.transpose(1, 2).flatten(0, 1)
        else:  # (blocks, block_size, Nkv * D)
            rows = pages.flatten(0, 1).unflatten(1, (call.num_kv_heads, -1))
        yield rows[:length]


def _attend(
    call: CheckedCall,
    request: int,
    query: Tensor,  # (rows, N, D)
    key: Tensor,  # (keys, Nkv, D)
    value: Tensor,  # (keys, Nkv, Dv)
    output: Tensor,  # (rows, N, Dv), written
    lse: Tensor | None,  # (rows, N, 1), written
) -> None:
    num_rows, num_heads, head_dim = query.shape
    num_keys, num_kv_heads, value_dim = value.shape
    key = key.transpose(0, 1).contiguous()
    value = value.transpose(0, 1).contiguous().float()
    if settings.float32_scores:
        query, key = query.float(), key.float()

    low, high = call.visible(request)
    block_rows = max(1, min(_MAX_BLOCK_ROWS, _MAX_SCORES // (num_heads * num_keys)))
    # Rows before -high or from num_keys - low on see no key.
    first_row, end_row = max(0, -high), min(num_rows, num_keys - low)
    for start in range(first_row, end_row, block_rows):
        end = min(start + block_rows, end_row)
        first_key, end_key = max(0, start + low), min(num_keys, end + high)
        # (Nkv, heads of a group * rows, D): the rows of a group in one product
        q = query[start:end].transpose(0, 1).reshape(num_kv_heads, -1, head_dim)
        scores = torch.bmm(q, key[:, first_key:end_key].transpose(1, 2)).float()
        scores *= call.scale
        by_head = scores.view(num_heads, end - start, end_key - first_key)
        if call.pse_shift is not None:
            pse = call.pse_shift[request if call.pse_shift.shape[0] > 1 else 0]
            by_head += pse[:, start:end, first_key:end_key]
        rows, keys = range(start, end), range(first_key, end_key)
        masked = _masked(call, request, rows, keys, low, high, query.device)
        if masked is not None:
            by_head.masked_fill_(masked, _MASKED_SCORE)

        maximum = scores.amax(-1, keepdim=True)
        weights = scores.sub_(maximum).exp_()
        total = weights.sum(-1, keepdim=True)
        # The weights are rounded before the product, their sum is not.
        weights = weights.to(output.dtype).float()
        result = torch.bmm(weights, value[:, first_key:end_key]).div_(total)
        output[start:end] = result.view(num_heads, -1, value_dim).transpose(0, 1)
        if lse is not None:
            lse[start:end] = (maximum + total.log()).view(num_heads, -1, 1).transpose(0, 1)
        if call.zero_masked_rows and masked is not None:
            empty = masked.all(-1).view(-1, 1, 1)
            output[start:end].masked_fill_(empty, 0.0)
            if lse is not None:
                lse[start:end].masked_fill_(empty, torch.inf)


def _masked(
    call: CheckedCall,
    request: int,
    rows: range,
    keys: range,
    low: int,
    high: int,
    device: torch.device,
) -> Tensor | None:
    """(rows, keys), true where a row may not see a key; None if all may see all."""
    masked = None
    if rows.stop - 1 + low > keys.start or rows.start + high < keys.stop - 1:
        row = torch.arange(rows.start, rows.stop, device=device).unsqueeze(1)
        distance = torch.arange(keys.start, keys.stop, device=device) - row
        masked = (distance < low) | (distance > high)
    if call.mask is not None:
        mask = call.mask[request if call.mask.shape[0] > 1 else 0]
        mask = mask[rows.start : rows.stop, keys.start : keys.stop]
        masked = mask if masked is None else masked | mask
    return masked


def _fused_infer_attention_score_meta(
    query: Tensor, key: Tensor, value: Tensor, **options
) -> tuple[Tensor, Tensor]:
    call = check_call(query, key, value, **options)
    output = query.new_empty(call.output_shape(query))
    return output, query.new_empty(call.lse_shape(query), dtype=torch.float32)


KERNELS = {OP: Kernel(fused_infer_attention_score, _fused_infer_attention_score_meta, check_call)}
