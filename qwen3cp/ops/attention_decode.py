"""Attention of one row of each request to a paged cache: a decode step.

Blocks that neighbouring requests begin with are read once for all of them, short rows are stacked
into one product, and the two parts of a row are put together by their log-sum-exp.

n rows, N query heads, Nkv key heads, G = N / Nkv, D head dim, L keys.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# Shared blocks are read apart where that saves reading so many keys.
_SAVED_KEYS = 1024
# Rows of up to so many keys are copied into stacks of up to so many bytes of keys, of which each
# row fills such a part. Longer rows go alone, without a copy if their blocks follow each other.
_SHORT_ROW = 256
_STACK_BYTES = 1 << 21
_LEAST_FULL = 0.75


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    *,
    bias: Tensor | None = None,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """torch's flash attention, which rounds where the NPU rounds.

    Args:
        query: [B, heads, rows, D], as many heads as keys have.
        key, value: [B, heads, L, D].
        bias: added to the scores, [B, 1 or heads, rows, L].
        is_causal: whether row i sees the keys up to i.

    Returns:
        The output, as query, and the log-sum-exp, float32 [B, heads, rows].
    """
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, is_causal=is_causal, attn_mask=bias, scale=scale
    )


def run_of(blocks: Sequence[int]) -> slice | None:
    """The part of the cache that these blocks are, if they follow each other."""
    first = blocks[0] if blocks else 0
    end = first + len(blocks)
    return slice(first, end) if list(blocks) == list(range(first, end)) else None


def attend_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Sequence[Sequence[int]],
    lengths: Sequence[int],
    scale: float,
    output: Tensor,
    lse: Tensor,
) -> None:
    """softmax(scale * query @ key^T) @ value of each row; rows without keys are left as they are.

    Args:
        query: [n, N, D], a row of each request.
        key, value: [blocks, block_size, Nkv * D], the caches.
        blocks: of each request, at least those of its keys.
        lengths: keys of each request.
        output: [n, N, D], written.
        lse: float32 [n, N], written.
    """
    caches = _Caches(key, value, query.shape[2])
    grouped = query.unflatten(1, (caches.num_heads, -1))  # [n, Nkv, G, D]
    block_size = key.shape[1]
    start = [0] * len(lengths)  # the keys before it were read together
    shared = []
    for first, end, count in _shared(blocks, lengths, block_size):
        keys, values, _ = caches.read([blocks[first][:count]], [count * block_size])
        rows = grouped[first:end].transpose(0, 1).flatten(1, 2).unsqueeze(0)
        parts = flash_attention(rows, keys, values, scale)
        parts = (x[0].unflatten(1, (end - first, -1)).transpose(0, 1).flatten(1, 2) for x in parts)
        shared.append((slice(first, end), *parts))
        start[first:end] = [count * block_size] * (end - first)

    left = [length - done for length, done in zip(lengths, start, strict=True)]
    for rows in _stacks(left, _STACK_BYTES // key[0, 0].nbytes):
        own = [blocks[row][start[row] // block_size :] for row in rows]
        keys, values, bias = caches.read(own, [left[row] for row in rows])
        at = slice(rows[0], rows[0] + 1) if len(rows) == 1 else torch.tensor(rows)
        if bias is not None:
            bias = bias.expand(-1, -1, grouped.shape[2], -1)
        out, out_lse = flash_attention(grouped[at], keys, values, scale, bias=bias)
        output[at], lse[at] = out.flatten(1, 2), out_lse.flatten(1, 2)

    for seen, out, out_lse in shared:
        for row in range(seen.start, seen.stop):
            if left[row] == 0:
                output[row], lse[row] = 0.0, -torch.inf
        merge_(output[seen], lse[seen], out, out_lse)


def _shared(
    blocks: Sequence[Sequence[int]], lengths: Sequence[int], block_size: int
) -> Iterator[tuple[int, int, int]]:
    """Rows first .. end - 1 begin with the same `count` full blocks: (first, end, count)."""
    first = 0
    while first < len(lengths):
        end, count = first + 1, lengths[first] // block_size
        while end < len(lengths) and lengths[end] >= block_size:
            common = min(count, lengths[end] // block_size)
            same = next((i for i in range(common) if blocks[first][i] != blocks[end][i]), common)
            # as many as possible of the rows that share what these two do
            if same == 0 or same < count and end > first + 1:
                break
            count, end = same, end + 1
        if (end - first - 1) * count * block_size >= _SAVED_KEYS:
            yield first, end, count
        first = end


def _stacks(lengths: Sequence[int], most_keys: int) -> Iterator[list[int]]:
    """Rows that go together."""
    stack: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if lengths[row] == 0:
            break
        longest = lengths[stack[0]] if stack else 0
        is_full = longest > _SHORT_ROW or (len(stack) + 1) * longest > most_keys
        if stack and (is_full or lengths[row] < _LEAST_FULL * longest):
            yield stack
            stack = []
        stack.append(row)
    if stack:
        yield stack


class _Caches:
    """Reads keys and values, of which copies last until the next are read."""

    def __init__(self, key: Tensor, value: Tensor, head_dim: int) -> None:
        self.block_size = key.shape[1]
        self.num_heads = key.shape[2] // head_dim
        self._rows = [cache.flatten(0, 1) for cache in (key, value)]
        self._copies = key.new_empty(2, 0, key.shape[2])

    def read(
        self, blocks: Sequence[Sequence[int]], lengths: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of each request the first keys and values of these blocks.

        Returns:
            Keys and values, [n, Nkv, L, D] for the largest L, and what masks the keys past the end
            of shorter ones, [n, 1, 1, L].
        """
        longest = max(lengths)
        used = [b[: -(-n // self.block_size)] for b, n in zip(blocks, lengths, strict=True)]
        run = run_of(used[0]) if len(used) == 1 else None
        if run is not None:
            begin = run.start * self.block_size
            keys, values = (rows[begin : begin + longest] for rows in self._rows)
            return self._heads(keys, 1), self._heads(values, 1), None

        columns = max(map(len, used))
        padded = torch.tensor([[*b, *[b[0]] * (columns - len(b))] for b in used])
        within = torch.arange(self.block_size)
        slots = (padded.unsqueeze(-1) * self.block_size + within).flatten(1)[:, :longest]
        bias = None
        if min(lengths) < longest:
            past = torch.arange(longest) >= torch.tensor(lengths).unsqueeze(1)
            # what is there instead was never written, and may be NaN
            slots = torch.where(past, slots[:, :1], slots)
            bias = torch.zeros(past.shape).masked_fill_(past, -torch.inf)[:, None, None]
        if self._copies.shape[1] < slots.numel():
            self._copies = self._copies.new_empty(2, slots.numel(), self._copies.shape[2])
        keys, values = self._copies[:, : slots.numel()]
        for rows, copy in zip(self._rows, (keys, values), strict=True):
            torch.index_select(rows, 0, slots.flatten(), out=copy)
        return self._heads(keys, len(used)), self._heads(values, len(used)), bias

    def _heads(self, rows: Tensor, num_requests: int) -> Tensor:
        """[n * L, Nkv * D] -> [n, Nkv, L, D]"""
        return rows.view(
            num_requests, -1, self.num_heads, rows.shape[1] // self.num_heads
        ).transpose(1, 2)


def merge_(output: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """Makes of the attention to some keys that to those of the other as well, in float32."""
    total = torch.logaddexp(lse, other_lse)
    weight, other_weight = ((x - total).exp_().unsqueeze(-1) for x in (lse, other_lse))
    output.copy_(output.float().mul_(weight).addcmul_(other.float(), other_weight))
    lse.copy_(total)
