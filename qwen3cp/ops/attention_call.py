"""The arguments of the fused attention operator: what is accepted, and what it amounts to.

T tokens, B batch, S sequence, N query heads, Nkv key and value heads, D head dim, Dv head dim of
the values. A "request" is one sequence of the batch: some query rows that attend to some keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen3cp.ops import rules
from qwen3cp.ops.checks import check_dtype, check_float, check_shape, refuse
from qwen3cp.ops.rules import Rule

OP = "npu_fused_infer_attention_score"

# input_layout -> (layout of the query, layout of the output)
_LAYOUTS = {
    "BSH": ("BSH", "BSH"),
    "BSND": ("BSND", "BSND"),
    "BNSD": ("BNSD", "BNSD"),
    "TND": ("TND", "TND"),
    "BNSD_BSND": ("BNSD", "BSND"),
    "BSH_BNSD": ("BSH", "BNSD"),
    "BSND_BNSD": ("BSND", "BNSD"),
    "TND_NTD": ("TND", "NTD"),
}

# (D, Dv) possible with TND
_TND_HEAD_DIMS = ((64, 64), (128, 128), (192, 192), (192, 128))

_TEMPLATE_SIZE = 2048
_TEMPLATE_STEP = 89  # divides 2047, so that the first and the last row are looked at
_COLUMNS = torch.arange(_TEMPLATE_SIZE, device="cpu")
_TEMPLATE_ROWS = _COLUMNS > _COLUMNS[::_TEMPLATE_STEP].unsqueeze(1)


@dataclass(frozen=True)
class CheckedCall:
    """A checked call."""

    query_layout: str
    output_layout: str
    num_heads: int
    num_kv_heads: int
    value_dim: int
    q_lengths: list[int]
    kv_lengths: list[int]
    # One query row a request in a padded layout. The NPU takes its decode kernel, which ignores
    # sparse_mode and marks empty rows differently.
    is_decode: bool
    template: Tensor | None
    mask: Tensor | None  # (B or 1, S, keys), true where masked
    pse_shift: Tensor | None  # (B or 1, N, S, keys)
    block_table: Tensor | None
    block_size: int
    scale: float
    sparse_mode: int
    pre_tokens: int
    next_tokens: int
    zero_masked_rows: bool
    with_lse: bool

    @property
    def is_packed(self) -> bool:
        return self.query_layout == "TND"

    def output_shape(self, query: Tensor) -> tuple[int, ...]:
        if self.is_packed:
            sizes = {"T": query.shape[0]}
        else:
            sizes = {"B": query.shape[0], "S": _seq_size(query, self.query_layout)}
        sizes |= {"N": self.num_heads, "D": self.value_dim, "H": self.num_heads * self.value_dim}
        return tuple(sizes[letter] for letter in self.output_layout)

    def lse_shape(self, query: Tensor) -> tuple[int, ...]:
        if not self.with_lse:
            return (0,)
        if self.is_packed:
            return (query.shape[0], self.num_heads, 1)
        return (query.shape[0], self.num_heads, _seq_size(query, self.query_layout), 1)

    def visible(self, request: int) -> tuple[int, int]:
        """(low, high): query row i may see the keys i + low .. i + high, as far as they exist."""
        q_length, kv_length = self.q_lengths[request], self.kv_lengths[request]
        shift = kv_length - q_length
        everything = (-q_length, kv_length)
        if self.is_decode:
            return everything
        match self.sparse_mode:
            case 0 if self.mask is not None:
                return -self.pre_tokens, self.next_tokens
            case 2:
                return -q_length, 0
            case 3:
                return -q_length, shift
            case 4:
                return shift - self.pre_tokens, shift + self.next_tokens
        return everything


def _seq_size(x: Tensor, layout: str) -> int:
    return x.shape[layout.index("S")]


def check_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    pse_shift: Tensor | None = None,
    atten_mask: Tensor | None = None,
    actual_seq_lengths: Sequence[int] | None = None,
    actual_seq_lengths_kv: Sequence[int] | None = None,
    dequant_scale1: Tensor | None = None,
    quant_scale1: Tensor | None = None,
    dequant_scale2: Tensor | None = None,
    quant_scale2: Tensor | None = None,
    quant_offset2: Tensor | None = None,
    antiquant_scale: Tensor | None = None,
    antiquant_offset: Tensor | None = None,
    key_antiquant_scale: Tensor | None = None,
    key_antiquant_offset: Tensor | None = None,
    value_antiquant_scale: Tensor | None = None,
    value_antiquant_offset: Tensor | None = None,
    block_table: Tensor | None = None,
    query_padding_size: Tensor | None = None,
    kv_padding_size: Tensor | None = None,
    key_shared_prefix: Tensor | None = None,
    value_shared_prefix: Tensor | None = None,
    actual_shared_prefix_len: Sequence[int] | None = None,
    query_rope: Tensor | None = None,
    key_rope: Tensor | None = None,
    key_rope_antiquant_scale: Tensor | None = None,
    num_heads: int = 1,
    scale: float = 1.0,
    pre_tokens: int = 2147483647,
    next_tokens: int = 2147483647,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    sparse_mode: int = 0,
    inner_precise: int = 0,
    block_size: int = 0,
    antiquant_mode: int = 0,  # the three modes say how scales are used; without scales, nothing
    key_antiquant_mode: int = 0,
    value_antiquant_mode: int = 0,
    softmax_lse_flag: bool = False,
) -> CheckedCall:
    refuse(
        OP,
        dequant_scale1=dequant_scale1,
        quant_scale1=quant_scale1,
        dequant_scale2=dequant_scale2,
        quant_scale2=quant_scale2,
        quant_offset2=quant_offset2,
        antiquant_scale=antiquant_scale,
        antiquant_offset=antiquant_offset,
        key_antiquant_scale=key_antiquant_scale,
        key_antiquant_offset=key_antiquant_offset,
        value_antiquant_scale=value_antiquant_scale,
        value_antiquant_offset=value_antiquant_offset,
        query_padding_size=query_padding_size,
        kv_padding_size=kv_padding_size,
        key_shared_prefix=key_shared_prefix,
        value_shared_prefix=value_shared_prefix,
        actual_shared_prefix_len=actual_shared_prefix_len,
        query_rope=query_rope,
        key_rope=key_rope,
        key_rope_antiquant_scale=key_rope_antiquant_scale,
    )
    check_float(rules.ATTENTION_DTYPE, query=query, key=key, value=value)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        _check_contiguous(name, tensor)
    if input_layout not in _LAYOUTS:
        raise NotImplementedError(
            f"{OP}: input_layout {input_layout!r} is not one of {', '.join(_LAYOUTS)}"
        )
    query_layout, output_layout = _LAYOUTS[input_layout]
    if query.dim() != len(query_layout):
        raise rules.ATTENTION_QUERY.broken(
            f"query {tuple(query.shape)} does not fit layout {query_layout}"
        )

    if num_heads <= 0:
        raise rules.ATTENTION_HEADS.broken(f"num_heads must be positive, not {num_heads}")
    num_kv_heads = num_key_value_heads or num_heads
    if num_kv_heads < 0 or num_heads % num_kv_heads or num_heads // num_kv_heads > 64:
        raise rules.ATTENTION_HEADS.broken(
            f"num_heads={num_heads} must be a multiple of "
            f"num_key_value_heads={num_key_value_heads}, at most 64 times as large"
        )
    if num_heads > 256:
        raise rules.ATTENTION_MAX_HEADS.broken(f"num_heads={num_heads} exceeds 256")
    head_dim = _head_dim(rules.ATTENTION_QUERY, "query", query, query_layout, num_heads)
    packed = query_layout == "TND"
    is_decode = not packed and _seq_size(query, query_layout) == 1
    if input_layout == "BNSD_BSND" and is_decode:
        raise rules.ATTENTION_ONE_ROW.broken("input_layout BNSD_BSND needs more than one query row")

    if block_table is None:
        value_dim = _check_fresh_kv(query, key, value, query_layout, num_kv_heads, head_dim)
    else:
        check_dtype(rules.ATTENTION_TABLE_DTYPE, "block_table", block_table, torch.int32)
        if block_table.dim() != 2:
            raise rules.ATTENTION_TABLE.broken(
                f"block_table must have 2 dimensions, not {block_table.dim()}"
            )
        _check_block_size(block_size, is_decode)
        value_dim = _check_paged_kv(key, value, query_layout, num_kv_heads, head_dim, block_size)
    _check_head_dims(packed, head_dim, value_dim, num_heads == num_kv_heads, block_table)

    limit = _num_keys(key, query_layout, block_table, block_size)
    if query.numel() == 0:  # the NPU returns at once
        q_lengths, kv_lengths = [], []
    elif packed:
        q_lengths, kv_lengths = _packed_lengths(
            query, limit, actual_seq_lengths, actual_seq_lengths_kv, block_table is not None
        )
    else:
        if block_table is not None and actual_seq_lengths_kv is None:
            raise rules.ATTENTION_PAGED_LENGTHS.broken("block_table needs actual_seq_lengths_kv")
        batch, seq = query.shape[0], _seq_size(query, query_layout)
        if batch > 65536:
            raise rules.ATTENTION_BATCH.broken(f"batch {batch} exceeds 65536")
        # The decode kernel does not read the query lengths.
        given = None if is_decode else actual_seq_lengths
        q_lengths = _padded_lengths("actual_seq_lengths", given, batch, seq)
        kv_lengths = _padded_lengths("actual_seq_lengths_kv", actual_seq_lengths_kv, batch, limit)
    if block_table is not None and q_lengths:
        _check_blocks(block_table, key, kv_lengths, block_size)

    _check_inner_precise(inner_precise, packed, is_decode)
    has_template = sparse_mode in (2, 3, 4)
    _check_sparse_mode(sparse_mode, atten_mask, packed)
    if q_lengths and not is_decode:
        _check_geometry(sparse_mode, packed, q_lengths, kv_lengths, pre_tokens, next_tokens)
    mask = None
    if atten_mask is not None and not has_template:
        mask = _check_full_mask(atten_mask, query, query_layout, limit, block_table is not None)
    if atten_mask is not None:
        _check_contiguous("atten_mask", atten_mask)
    if pse_shift is not None:
        _check_pse_shift(pse_shift, query, query_layout, num_heads, limit)
    return CheckedCall(
        query_layout=query_layout,
        output_layout=output_layout,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        value_dim=value_dim,
        q_lengths=q_lengths,
        kv_lengths=kv_lengths,
        is_decode=is_decode,
        template=atten_mask if has_template else None,
        mask=mask,
        pse_shift=pse_shift,
        block_table=block_table,
        block_size=block_size,
        scale=scale,
        sparse_mode=sparse_mode,
        pre_tokens=pre_tokens,
        next_tokens=next_tokens,
        zero_masked_rows=inner_precise in (2, 3),
        with_lse=softmax_lse_flag,
    )


def _num_keys(key: Tensor, layout: str, block_table: Tensor | None, block_size: int) -> int:
    """How many keys a request (TND without pages: all of them) may have."""
    if block_table is None:
        return key.shape[0] if layout == "TND" else _seq_size(key, layout)
    return block_table.shape[1] * block_size


def _check_contiguous(name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise rules.ATTENTION_CONTIGUOUS.broken(
            f"{name} must be contiguous; the NPU does not copy it"
        )


def _head_dim(rule: Rule, name: str, x: Tensor, layout: str, num_heads: int) -> int:
    if layout == "BSH":
        if x.shape[2] % num_heads:
            raise rule.broken(f"{name} width {x.shape[2]} is no multiple of {num_heads} heads")
        return x.shape[2] // num_heads
    if x.shape[layout.index("N")] != num_heads:
        raise rule.broken(
            f"{name} {tuple(x.shape)} in layout {layout} does not have {num_heads} heads"
        )
    return x.shape[-1]


def _check_fresh_kv(
    query: Tensor, key: Tensor, value: Tensor, layout: str, num_kv_heads: int, head_dim: int
) -> int:
    """Keys and values in the layout of the query. Returns Dv."""
    if key.dim() != query.dim() or value.dim() != query.dim():
        raise rules.ATTENTION_FRESH_KV.broken(
            f"query, key and value must have equally many dimensions without a "
            f"block_table, not {query.dim()}, {key.dim()} and {value.dim()}"
        )
    key_dim = _head_dim(rules.ATTENTION_FRESH_KV, "key", key, layout, num_kv_heads)
    value_dim = _head_dim(rules.ATTENTION_FRESH_KV, "value", value, layout, num_kv_heads)
    if key_dim != head_dim:
        raise rules.ATTENTION_KEY_DIM.broken(f"key has head dim {key_dim}, query {head_dim}")
    same = [layout.index(letter) for letter in layout if letter in "BST"]
    if any(key.shape[dim] != value.shape[dim] for dim in same):
        raise rules.ATTENTION_FRESH_KV.broken(
            f"key {tuple(key.shape)} and value {tuple(value.shape)} do not agree"
        )
    if layout != "TND" and key.shape[0] != query.shape[0]:
        raise rules.ATTENTION_FRESH_KV.broken(
            f"key has batch {key.shape[0]}, query {query.shape[0]}"
        )
    return value_dim


def _check_paged_kv(
    key: Tensor, value: Tensor, layout: str, num_kv_heads: int, head_dim: int, block_size: int
) -> int:
    """Caches (blocks, block_size, Nkv*D) or (blocks, Nkv, block_size, D). Returns Dv."""
    if key.dim() != value.dim():
        raise rules.ATTENTION_CACHE.broken("key and value caches must have equally many dimensions")
    if key.dim() == 3:
        if max(key.shape[2], value.shape[2]) > 65535:
            raise rules.ATTENTION_CACHE_WIDTH.broken(
                "the last dimension of a 3-D cache must be at most 65535"
            )
        key_dim = _head_dim(rules.ATTENTION_CACHE, "key", key, "BSH", num_kv_heads)
        value_dim = _head_dim(rules.ATTENTION_CACHE, "value", value, "BSH", num_kv_heads)
        expected = (key.shape[0], block_size, num_kv_heads * value_dim)
        check_shape(
            rules.ATTENTION_CACHE,
            "key cache",
            key,
            (key.shape[0], block_size, num_kv_heads * key_dim),
        )
    elif key.dim() == 4:
        if layout not in ("BNSD", "TND"):
            raise rules.ATTENTION_CACHE.broken(
                f"a 4-D cache needs a BNSD or TND query, not {layout}"
            )
        key_dim, value_dim = key.shape[3], value.shape[3]
        expected = (key.shape[0], num_kv_heads, block_size, value_dim)
        check_shape(
            rules.ATTENTION_CACHE,
            "key cache (blocks, heads, block_size, head dim)",
            key,
            (key.shape[0], num_kv_heads, block_size, key_dim),
        )
    elif key.dim() == 5:
        raise NotImplementedError(f"{OP}: 5-D (NZ) caches are not supported, pass the 3-D view")
    else:
        raise rules.ATTENTION_CACHE.broken(f"a cache must have 3 or 4 dimensions, not {key.dim()}")
    if key_dim != head_dim:
        raise rules.ATTENTION_KEY_DIM.broken(
            f"the key cache has head dim {key_dim}, query {head_dim}"
        )
    check_shape(rules.ATTENTION_CACHE, "value cache", value, expected)
    return value_dim


def _check_block_size(block_size: int, is_decode: bool) -> None:
    step = 16 if is_decode else 128
    if block_size <= 0 or block_size % step or block_size > 512:
        raise rules.ATTENTION_BLOCK_SIZE.broken(
            f"block_size must be a multiple of {step} up to 512 here, not {block_size}"
        )


def _check_head_dims(
    packed: bool, head_dim: int, value_dim: int, is_mha: bool, block_table: Tensor | None
) -> None:
    if packed:
        if (head_dim, value_dim) not in _TND_HEAD_DIMS:
            raise rules.ATTENTION_TND_HEAD_DIM.broken(
                f"TND needs head dims (of query and key, of value) among "
                f"{_TND_HEAD_DIMS}, not {(head_dim, value_dim)}"
            )
        if value_dim == 192 and not (is_mha and block_table is None):
            raise rules.ATTENTION_TND_192.broken(
                "TND with head dim 192 needs as many key heads as query heads and no pages"
            )
    elif any(dim % 16 or not 0 < dim <= 512 for dim in (head_dim, value_dim)):
        raise rules.ATTENTION_HEAD_DIM.broken(
            f"head dims must be multiples of 16 up to 512, not {(head_dim, value_dim)}"
        )


def _packed_lengths(
    query: Tensor,
    limit: int,
    q_ends: Sequence[int] | None,
    kv_list: Sequence[int] | None,
    paged: bool,
) -> tuple[list[int], list[int]]:
    """TND: q_ends is cumulative; kv_list is too, but with pages it holds plain lengths."""
    if q_ends is None or kv_list is None:
        raise rules.ATTENTION_TND_LENGTHS.broken(
            "TND needs actual_seq_lengths and actual_seq_lengths_kv"
        )
    if len(q_ends) != len(kv_list):
        raise rules.ATTENTION_TND_LENGTHS.broken(
            f"{len(q_ends)} actual_seq_lengths but {len(kv_list)} actual_seq_lengths_kv"
        )
    if not 1 <= len(q_ends) <= 4096:
        raise rules.ATTENTION_TND_REQUESTS.broken(
            f"TND takes 1 to 4096 requests, not {len(q_ends)}"
        )
    if query.shape[0] > 1048576:
        raise rules.ATTENTION_TND_TOKENS.broken(
            f"{query.shape[0]} tokens exceed the 1048576 that TND takes"
        )
    q_lengths = _differences("actual_seq_lengths", q_ends, query.shape[0])
    if paged:
        return q_lengths, _bounded("actual_seq_lengths_kv", list(kv_list), limit)
    return q_lengths, _differences("actual_seq_lengths_kv", kv_list, limit)


def _differences(name: str, ends: Sequence[int], total: int) -> list[int]:
    lengths = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    if min(lengths) < 0:
        raise rules.ATTENTION_CUMULATIVE.broken(
            f"{name} must be cumulative, so never decrease: {list(ends)}"
        )
    if ends[-1] != total:
        raise rules.ATTENTION_LAST_LENGTH.broken(
            f"the last of {name} is {ends[-1]}, but must equal the {total} tokens; "
            "padding rows need a request of their own"
        )
    return lengths


def _padded_lengths(name: str, lengths: Sequence[int] | None, batch: int, limit: int) -> list[int]:
    if lengths is None:
        return [limit] * batch
    if len(lengths) == 1:
        lengths = [lengths[0]] * batch
    elif len(lengths) < batch:
        raise rules.ATTENTION_LENGTH_COUNT.broken(
            f"{name} has {len(lengths)} entries, but needs 1 or {batch}"
        )
    return _bounded(name, list(lengths[:batch]), limit)


def _bounded(name: str, lengths: list[int], limit: int) -> list[int]:
    if lengths and not 0 <= min(lengths) <= max(lengths) <= limit:
        raise rules.ATTENTION_LENGTH.broken(f"{name} must be between 0 and {limit}: {lengths}")
    return lengths


def _check_blocks(block_table: Tensor, key: Tensor, kv_lengths: list[int], block_size: int) -> None:
    if block_table.shape[0] != len(kv_lengths):
        raise rules.ATTENTION_TABLE.broken(
            f"block_table has {block_table.shape[0]} rows for {len(kv_lengths)} requests"
        )
    if sum(kv_lengths) == 0:
        raise rules.ATTENTION_NO_KEYS.broken(
            "with a block_table, at least one request must have keys"
        )
    needed = sum(-(-length // block_size) for length in kv_lengths)
    if key.shape[0] < needed:
        raise rules.ATTENTION_BLOCK_SUM.broken(
            f"the requests need {needed} blocks (shared blocks count every time), "
            f"but the cache has {key.shape[0]}"
        )


def _check_inner_precise(inner_precise: int, packed: bool, is_decode: bool) -> None:
    allowed = (0,) if packed else (0, 1) if is_decode else (0, 1, 2, 3)
    if inner_precise not in allowed:
        raise rules.ATTENTION_INNER_PRECISE.broken(
            f"inner_precise must be in {allowed} here, not {inner_precise}"
        )


def _check_sparse_mode(sparse_mode: int, atten_mask: Tensor | None, packed: bool) -> None:
    if not 0 <= sparse_mode <= 4:
        raise rules.ATTENTION_SPARSE_MODE.broken(f"sparse_mode must be 0 to 4, not {sparse_mode}")
    if packed and sparse_mode not in (0, 3, 4):
        raise rules.ATTENTION_TND_SPARSE_MODE.broken(
            f"TND takes sparse_mode 0, 3 or 4, not {sparse_mode}"
        )
    if packed and sparse_mode == 0 and atten_mask is not None:
        raise rules.ATTENTION_TND_SPARSE_MODE.broken("TND takes no atten_mask with sparse_mode 0")
    if atten_mask is None:
        if sparse_mode:
            raise rules.ATTENTION_MASK_NEEDED.broken(f"sparse_mode {sparse_mode} needs atten_mask")
        return
    check_dtype(
        rules.ATTENTION_MASK_DTYPE, "atten_mask", atten_mask, torch.bool, torch.int8, torch.uint8
    )
    if sparse_mode >= 2:
        square = (_TEMPLATE_SIZE, _TEMPLATE_SIZE)
        if tuple(atten_mask.shape) not in (square, (1, *square), (1, 1, *square)):
            raise rules.ATTENTION_TEMPLATE.broken(
                f"sparse_mode {sparse_mode} needs the {square} mask template whatever the "
                f"lengths, not {tuple(atten_mask.shape)}"
            )


def _check_geometry(
    sparse_mode: int,
    packed: bool,
    q_lengths: list[int],
    kv_lengths: list[int],
    pre_tokens: int,
    next_tokens: int,
) -> None:
    if sparse_mode == 3 and packed:
        for request, (q, kv) in enumerate(zip(q_lengths, kv_lengths, strict=True)):
            if q > kv:
                raise rules.ATTENTION_ROWS.broken(
                    f"request {request} has {q} query rows but {kv} keys; sparse_mode 3 "
                    "in TND needs a key for every row (give whole lengths, with what is cached)"
                )
    if sparse_mode == 4:
        if pre_tokens + next_tokens < 0:
            raise rules.ATTENTION_BAND.broken(
                f"pre_tokens={pre_tokens} + next_tokens={next_tokens} < 0"
            )
        if pre_tokens < -min(q_lengths) or next_tokens < -min(kv_lengths):
            raise rules.ATTENTION_BAND.broken(
                f"pre_tokens={pre_tokens} must be at least minus the query length, "
                f"next_tokens={next_tokens} at least minus the key length"
            )


def _check_full_mask(
    mask: Tensor, query: Tensor, layout: str, num_keys: int, paged: bool
) -> Tensor:
    """Returns the mask as (B or 1, S, keys), true where masked."""
    batch, rows = query.shape[0], _seq_size(query, layout)
    wide_enough = mask.shape[-1] >= num_keys if paged else mask.shape[-1] == num_keys
    shapes = [(rows,), (1, rows), (1, 1, rows), (batch, 1, rows)]
    if rows == 1:
        shapes.append((batch,))
    if tuple(mask.shape[:-1]) not in shapes or not wide_enough:
        raise rules.ATTENTION_FULL_MASK.broken(
            f"atten_mask {tuple(mask.shape)} does not fit batch {batch}, {rows} query rows "
            f"and {num_keys} keys"
        )
    return mask.reshape(-1, rows, mask.shape[-1]) != 0


def _check_pse_shift(
    pse_shift: Tensor, query: Tensor, layout: str, num_heads: int, num_keys: int
) -> None:
    if layout == "TND":
        raise rules.ATTENTION_PSE.broken("TND takes no pse_shift")
    check_float(rules.ATTENTION_PSE_DTYPE, query=query, pse_shift=pse_shift)
    rows = _seq_size(query, layout)
    shapes = [(batch, num_heads, rows, num_keys) for batch in (1, query.shape[0])]
    if tuple(pse_shift.shape) not in shapes:
        raise rules.ATTENTION_PSE.broken(
            f"pse_shift must be one of {shapes}, not {tuple(pse_shift.shape)}"
        )
    _check_contiguous("pse_shift", pse_shift)


def check_template(template: Tensor) -> None:
    """Refuse a mask that is not triu(ones(2048, 2048), diagonal=1).

    The NPU does not look, and computes wrong results. All of it is four million entries, too many
    for a call in every layer, so this looks at every 89th row.
    """
    rows = template.view(_TEMPLATE_SIZE, _TEMPLATE_SIZE)[::_TEMPLATE_STEP]
    if not torch.equal(rows, _TEMPLATE_ROWS.to(rows.dtype)):
        raise rules.ATTENTION_TEMPLATE_DATA.broken(
            "atten_mask must be triu(ones(2048, 2048), diagonal=1): 1 above the diagonal, "
            "where keys are masked, and 0 elsewhere"
        )
