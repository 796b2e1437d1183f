"""For every rule of `qwen3cp.ops.rules`: a call that breaks it, and one at the limit that does not.

Tensors are given as meta tensors; `on` puts a call on a device.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

importlib.import_module("qwen3cp.ops")
bfloat16, float32, int32, int64, int8 = (
    torch.bfloat16,
    torch.float32,
    torch.int32,
    torch.int64,
    torch.int8,
)
Call = tuple[tuple[Any, ...], dict[str, Any]]


class Case(NamedTuple):
    op: str
    broken: Call
    accepted: Call
    runs: bool = True  # the accepted call is small enough for the CPU kernel


def t(*shape: int, dtype: torch.dtype = bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def on(device: str, call: Call) -> Call:
    """The call with tensors of zeros on a device; the mask of modes 2 to 4 is the template."""
    args, kwargs = call
    if device == "meta":
        return call

    def make(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        made = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
        return made.zero_() if made.numel() < 1 << 24 else made  # larger ones are not touched

    args, kwargs = tree_map(make, (args, kwargs))
    mask = kwargs.get("atten_mask")
    if mask is not None and kwargs.get("sparse_mode", 0) >= 2 and mask.shape[-1] == 2048:
        mask.copy_(torch.ones(2048, 2048).triu(1))
    return args, kwargs


# --------------------------------------------------------------------------------------- attention

TEMPLATE = t(2048, 2048, dtype=torch.bool)


def packed(**changes: Any) -> Call:
    """TND with pages: two requests of 2 and 1 rows that see 130 and 3 keys."""
    arguments: dict[str, Any] = {
        "query": t(3, 4, 64),
        "key": t(6, 128, 128),
        "value": t(6, 128, 128),
        "atten_mask": TEMPLATE,
        "actual_seq_lengths": [2, 3],
        "actual_seq_lengths_kv": [130, 3],
        "block_table": t(2, 2, dtype=int32),
        "block_size": 128,
        "num_heads": 4,
        "num_key_value_heads": 2,
        "input_layout": "TND",
        "sparse_mode": 3,
    } | changes
    return tuple(arguments.pop(name) for name in ("query", "key", "value")), arguments


def fresh(dim: int = 64, value_dim: int = 64, kv_heads: int = 2, **changes: Any) -> Call:
    """TND without pages: the same rows, 7 keys."""
    arguments: dict[str, Any] = {
        "query": t(3, 4, dim),
        "key": t(7, kv_heads, dim),
        "value": t(7, kv_heads, value_dim),
        "num_key_value_heads": kv_heads,
        "actual_seq_lengths_kv": [4, 7],
        "block_table": None,
        "block_size": 0,
    }
    return packed(**(arguments | changes))


def padded(dim: int = 16, batch: int = 2, rows: int = 3, **changes: Any) -> Call:
    """BSND: requests of some rows and 5 keys."""
    arguments: dict[str, Any] = {
        "query": t(batch, rows, 4, dim),
        "key": t(batch, 5, 2, dim),
        "value": t(batch, 5, 2, dim),
        "num_heads": 4,
        "num_key_value_heads": 2,
        "input_layout": "BSND",
    } | changes
    return tuple(arguments.pop(name) for name in ("query", "key", "value")), arguments


def decode(block_size: int = 16, **changes: Any) -> Call:
    """BSND with pages, one row a request."""
    arguments: dict[str, Any] = {
        "rows": 1,
        "key": t(4, block_size, 32),
        "value": t(4, block_size, 32),
        "actual_seq_lengths_kv": [20, 3],
        "block_table": t(2, 2, dtype=int32),
        "block_size": block_size,
    }
    return padded(**(arguments | changes))


def caches(*shape: int) -> dict[str, Any]:
    return {"key": t(*shape), "value": t(*shape)}


def strided(x: Tensor) -> Tensor:
    """The same shape, not contiguous."""
    return t(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)[..., ::2]


def one_key(tokens: int) -> dict[str, Any]:
    """Many rows of one request, one head and one key."""
    return {
        "query": t(tokens, 1, 64),
        "actual_seq_lengths": [tokens],
        "actual_seq_lengths_kv": [1],
        "block_table": t(1, 1, dtype=int32),
        **caches(1, 128, 64),
        "num_heads": 1,
        "num_key_value_heads": 1,
        "sparse_mode": 0,
        "atten_mask": None,
    }


def empty_requests(count: int) -> dict[str, Any]:
    return {
        "actual_seq_lengths": [3] * count,
        "actual_seq_lengths_kv": [3] * count,
        "block_table": t(count, 1, dtype=int32),
        **caches(count, 128, 128),
    }


def heads(num_heads: int, kv_heads: int) -> dict[str, Any]:
    return {
        "query": t(3, num_heads, 64),
        **caches(6, 128, kv_heads * 64),
        "num_heads": num_heads,
        "num_key_value_heads": kv_heads,
    }


def band(pre: int, post: int) -> dict[str, Any]:
    return {"sparse_mode": 4, "pre_tokens": pre, "next_tokens": post}


ATTENTION = {
    "ATTENTION_DTYPE": (packed(query=t(3, 4, 64, dtype=torch.float16)), packed()),
    "ATTENTION_CONTIGUOUS": (packed(query=strided(t(3, 4, 64))), packed()),
    "ATTENTION_QUERY": (packed(query=t(3, 5, 64)), packed()),
    "ATTENTION_HEADS": (packed(**heads(130, 2)), packed(**heads(128, 2))),
    "ATTENTION_MAX_HEADS": (packed(**heads(260, 5)), packed(**heads(256, 4))),
    "ATTENTION_TND_HEAD_DIM": (fresh(256, 256), fresh(192, 128)),
    "ATTENTION_TND_192": (fresh(192, 192), fresh(192, 192, 4)),
    "ATTENTION_HEAD_DIM": (padded(528), padded(512)),
    "ATTENTION_KEY_DIM": (packed(key=t(6, 128, 256)), packed()),
    "ATTENTION_FRESH_KV": (fresh(value=t(6, 2, 64)), fresh()),
    "ATTENTION_ONE_ROW": (
        padded(query=t(2, 4, 1, 16), **caches(2, 2, 5, 16), input_layout="BNSD_BSND"),
        padded(query=t(2, 4, 2, 16), **caches(2, 2, 5, 16), input_layout="BNSD_BSND"),
    ),
    "ATTENTION_TABLE_DTYPE": (packed(block_table=t(2, 2, dtype=int64)), packed()),
    "ATTENTION_TABLE": (packed(block_table=t(3, 2, dtype=int32)), packed()),
    "ATTENTION_BLOCK_SIZE": (
        packed(block_size=640, **caches(6, 640, 128)),
        packed(block_size=512, **caches(6, 512, 128)),
    ),
    "ATTENTION_CACHE": (
        packed(**caches(6, 128, 2, 64)),
        packed(**caches(6, 2, 128, 64)),
    ),
    "ATTENTION_CACHE_WIDTH": (
        decode(
            query=t(2, 1, 128, 512), **caches(4, 16, 65536), num_heads=128, num_key_value_heads=128
        ),
        decode(
            query=t(2, 1, 127, 512), **caches(4, 16, 65024), num_heads=127, num_key_value_heads=127
        ),
    ),
    "ATTENTION_TND_LENGTHS": (packed(actual_seq_lengths_kv=None), packed()),
    "ATTENTION_TND_REQUESTS": (packed(**empty_requests(4097)), packed(**empty_requests(4096))),
    "ATTENTION_TND_TOKENS": (packed(**one_key(1048577)), packed(**one_key(1048576))),
    "ATTENTION_CUMULATIVE": (packed(actual_seq_lengths=[4, 3]), packed(actual_seq_lengths=[3, 3])),
    "ATTENTION_LAST_LENGTH": (packed(actual_seq_lengths=[1, 2]), packed(actual_seq_lengths=[1, 3])),
    "ATTENTION_LENGTH": (
        packed(actual_seq_lengths_kv=[257, 3]),
        packed(actual_seq_lengths_kv=[256, 3]),
    ),
    "ATTENTION_LENGTH_COUNT": (
        padded(batch=3, actual_seq_lengths=[1, 2]),
        padded(batch=3, actual_seq_lengths=[2]),
    ),
    "ATTENTION_PAGED_LENGTHS": (decode(actual_seq_lengths_kv=None), decode()),
    "ATTENTION_BATCH": (padded(batch=65537), padded(batch=65536)),
    "ATTENTION_NO_KEYS": (
        packed(actual_seq_lengths_kv=[0, 0], sparse_mode=0, atten_mask=None),
        packed(actual_seq_lengths_kv=[0, 1], sparse_mode=0, atten_mask=None),
    ),
    "ATTENTION_BLOCK_SUM": (packed(**caches(2, 128, 128)), packed(**caches(3, 128, 128))),
    "ATTENTION_INNER_PRECISE": (decode(inner_precise=2), decode(inner_precise=1)),
    "ATTENTION_SPARSE_MODE": (packed(sparse_mode=5), packed(sparse_mode=4)),
    "ATTENTION_TND_SPARSE_MODE": (packed(sparse_mode=2), packed(sparse_mode=3)),
    "ATTENTION_MASK_NEEDED": (packed(atten_mask=None), packed(atten_mask=None, sparse_mode=0)),
    "ATTENTION_MASK_DTYPE": (
        packed(atten_mask=t(2048, 2048, dtype=float32)),
        packed(atten_mask=t(2048, 2048, dtype=int8)),
    ),
    "ATTENTION_TEMPLATE": (
        packed(atten_mask=t(1024, 1024, dtype=torch.bool)),
        packed(atten_mask=t(1, 1, 2048, 2048, dtype=torch.bool)),
    ),
    "ATTENTION_FULL_MASK": (
        padded(atten_mask=t(3, 4, dtype=torch.bool)),
        padded(atten_mask=t(3, 5, dtype=torch.bool)),
    ),
    "ATTENTION_ROWS": (packed(actual_seq_lengths_kv=[1, 3]), packed(actual_seq_lengths_kv=[2, 1])),
    "ATTENTION_BAND": (packed(**band(1, -2)), packed(**band(1, -1))),
    "ATTENTION_PSE": (padded(pse_shift=t(3, 4, 3, 5)), padded(pse_shift=t(1, 4, 3, 5))),
    "ATTENTION_PSE_DTYPE": (
        padded(pse_shift=t(1, 4, 3, 5, dtype=float32)),
        padded(pse_shift=t(1, 4, 3, 5)),
    ),
}

# ---------------------------------------------------------------------- cache, norms, rotary, quant


def scatter(
    indices: Tensor | None = None, updates: Tensor | None = None, dtype: torch.dtype = bfloat16
) -> Call:
    if indices is None:
        indices = t(1, 1, dtype=int64)
    return (t(4, 3, dtype=dtype), indices, t(1, 3, dtype=dtype) if updates is None else updates), {}


SCATTER = {
    "SCATTER_DTYPE": (scatter(dtype=int32), scatter(dtype=int8)),
    "SCATTER_INDICES_DTYPE": (
        scatter(t(1, 1, dtype=torch.int16)),
        scatter(t(1, 1, dtype=int32)),
    ),
    "SCATTER_DEPTH": (scatter(t(1, 3, dtype=int64)), scatter(t(1, 2, dtype=int64), t(1))),
    "SCATTER_UPDATES": (scatter(updates=t(2, 3)), scatter()),
}

RMS = {
    "RMS_DTYPE": (((t(2, 8, dtype=torch.float16), t(8, dtype=float32)), {}), ((t(2, 8), t(8)), {})),
    "RMS_GAMMA_DTYPE": (((t(2, 8), t(8, dtype=int32)), {}), ((t(2, 8), t(8, dtype=float32)), {})),
    "RMS_GAMMA": (((t(2, 8), t(4)), {}), ((t(2, 8), t(2, 8)), {})),
}
ADD_RMS = {
    "ADD_RMS_DTYPE": (
        ((t(2, 8), t(2, 8), t(8, dtype=float32)), {}),
        ((t(2, 8), t(2, 8), t(8)), {}),
    ),
    "ADD_RMS_SHAPE": (((t(2, 8), t(1, 8), t(8)), {}), ((t(2, 8), t(2, 8), t(8)), {})),
    "ADD_RMS_GAMMA": (((t(2, 8), t(2, 8), t(1, 4)), {}), ((t(2, 8), t(2, 8), t(2, 8)), {})),
}


def rotary(x: Tensor, cos: Tensor, sin: Tensor | None = None, **options: Any) -> Call:
    return (x, cos, cos if sin is None else sin), options


ROTARY = {
    "ROTARY_DTYPE": (
        rotary(t(1, 5, 2, 8, dtype=torch.float16), t(1, 5, 1, 8)),
        rotary(t(1, 5, 2, 8), t(1, 5, 1, 8, dtype=float32)),
    ),
    "ROTARY_MODE": (
        rotary(t(1, 5, 2, 8), t(1, 5, 1, 8), rotary_mode="quarter"),
        rotary(t(1, 5, 2, 8), t(1, 5, 1, 8), rotary_mode="interleave"),
    ),
    "ROTARY_COS_SIN": (
        rotary(t(1, 5, 2, 8), t(1, 5, 1, 8), t(1, 5, 2, 8)),
        rotary(t(1, 5, 2, 8), t(1, 5, 1, 8)),
    ),
    "ROTARY_HEAD_DIM": (
        rotary(t(1, 5, 2, 896), t(1, 5, 1, 896)),
        rotary(t(1, 5, 2, 894), t(1, 5, 1, 894)),
    ),
    "ROTARY_LAYOUT": (
        rotary(t(1, 5, 1000, 8), t(1, 5, 1, 8)),
        rotary(t(1, 5, 999, 8), t(1, 5, 1, 8)),
    ),
}

QUANT = {
    "QUANT_DTYPE": (((t(2, 8, dtype=torch.float16),), {}), ((t(2, 8),), {})),
    "QUANT_RANK": (((t(8),), {}), ((t(1, 8),), {})),
    "QUANT_SMOOTH_DTYPE": (
        ((t(2, 8),), {"smooth_scales": t(8, dtype=float32)}),
        ((t(2, 8),), {"smooth_scales": t(8)}),
    ),
    "QUANT_SMOOTH": (
        ((t(2, 8),), {"smooth_scales": t(2, 8)}),
        ((t(2, 8),), {"smooth_scales": t(8)}),
    ),
}

# ----------------------------------------------------------------------------------------- experts


def gating(x: Tensor, **options: Any) -> Call:
    return (x,), options


GATING = {
    "GATING_DTYPE": (gating(t(3, 4, dtype=torch.float16)), gating(t(3, 4, dtype=float32))),
    "GATING_RANK": (gating(t(4)), gating(t(2, 3, 4))),
    "GATING_K": (gating(t(3, 2000), k=1025), gating(t(3, 2000), k=1024)),
    "GATING_FINISHED_DTYPE": (
        gating(t(3, 4), finished=t(3, dtype=int32)),
        gating(t(3, 4), finished=t(3, dtype=torch.bool)),
    ),
    "GATING_FINISHED": (
        gating(t(3, 4), finished=t(4, dtype=torch.bool)),
        gating(t(3, 4), finished=t(3, dtype=torch.bool)),
    ),
}


def routing(
    dtype: torch.dtype = bfloat16,
    rows: int = 5,
    index_dtype: torch.dtype = int32,
    drop: str | None = None,
    **changes: Any,
) -> Call:
    options: dict[str, Any] = {
        "expert_num": 4,
        "expert_tokens_num_type": 1,
        "expert_tokens_num_flag": True,
        "active_expert_range": [0, 4],
        "quant_mode": -1,
    } | changes
    if drop is not None:
        del options[drop]
    return (t(rows, 8, dtype=dtype), t(5, 2, dtype=index_dtype)), options


ROUTING = {
    "ROUTING_OFFSET": (routing(offset=t(1, dtype=float32)), routing()),
    "ROUTING_DTYPE": (routing(torch.float16), routing(int8)),
    "ROUTING_INDEX_DTYPE": (routing(index_dtype=int64), routing()),
    "ROUTING_SHAPES": (routing(rows=4), routing()),
    "ROUTING_ACTIVE_NUM": (routing(active_num=9), routing(active_num=10)),
    "ROUTING_DROP_PAD": (routing(drop_pad_mode=1), routing(drop_pad_mode=0)),
    "ROUTING_NUM_TYPE": (routing(drop="expert_tokens_num_type"), routing(expert_tokens_num_type=2)),
    "ROUTING_NUM_FLAG": (routing(drop="expert_tokens_num_flag"), routing()),
    "ROUTING_QUANT_MODE": (routing(quant_mode=0), routing(quant_mode=1)),
    "ROUTING_RANGE_GIVEN": (routing(drop="active_expert_range"), routing()),
    "ROUTING_RANGE": (
        routing(active_expert_range=[2, 5]),
        routing(active_expert_range=[3, 4]),
    ),
    "ROUTING_EXPERTS": (routing(expert_num=10241), routing(expert_num=10240)),
    "ROUTING_ROW_TYPE": (routing(row_idx_type=2), routing(row_idx_type=1)),
    "ROUTING_INT8": (routing(int8, quant_mode=1), routing(int8, quant_mode=-1)),
    "ROUTING_SCALE_DTYPE": (routing(scale=t(5)), routing(scale=t(5, dtype=float32))),
    "ROUTING_SCALE": (
        routing(scale=t(4, dtype=float32)),
        routing(scale=t(4, 8, dtype=float32), quant_mode=1),
    ),
}


def grouped(
    x: Tensor | None = None,
    weight: Tensor | None = None,
    groups: Tensor | None = None,
    drop: str | None = None,
    **changes: Any,
) -> Call:
    x = t(6, 8) if x is None else x
    weight = t(2, 8, 4) if weight is None else weight
    options: dict[str, Any] = {
        "group_list": t(weight.shape[0], dtype=int64) if groups is None else groups,
        "group_list_type": 1,
        "group_type": 0,
        "split_item": 2,
    } | changes
    if drop is not None:
        del options[drop]
    return ([x], [weight]), options


GROUPED = {
    "GROUPED_TYPE": (grouped(drop="group_type"), grouped()),
    "GROUPED_DTYPE": (grouped(t(6, 8, dtype=float32)), grouped()),
    "GROUPED_SHAPES": (grouped(weight=t(2, 4, 8)), grouped()),
    "GROUPED_INNER": (grouped(weight=t(2, 8, 65536)), grouped(weight=t(2, 8, 65535))),
    "GROUPED_X_CONTIGUOUS": (grouped(t(8, 6).t()), grouped()),
    "GROUPED_WEIGHT_STRIDES": (
        grouped(weight=strided(t(2, 8, 4))),
        grouped(weight=t(2, 4, 8).transpose(1, 2)),
    ),
    "GROUPED_LIST_GIVEN": (grouped(group_list=None), grouped()),
    "GROUPED_LIST_DTYPE": (grouped(groups=t(2, dtype=int32)), grouped()),
    "GROUPED_LIST": (grouped(groups=t(3, dtype=int64)), grouped()),
    "GROUPED_COUNTS": (
        grouped(weight=t(1, 8, 4)),
        grouped(weight=t(1, 8, 4), group_list_type=0),
    ),
    "GROUPED_MAX_GROUPS": (grouped(weight=t(1025, 8, 4)), grouped(weight=t(1024, 8, 4))),
    "GROUPED_BIAS_DTYPE": (grouped(bias=[t(2, 4)]), grouped(bias=[t(2, 4, dtype=float32)])),
    "GROUPED_BIAS": (
        grouped(bias=[t(4, dtype=float32)]),
        grouped(bias=[t(2, 4, dtype=float32)]),
    ),
}

SWIGLU = {
    "SWIGLU_DTYPE": (((t(2, 8, dtype=torch.float16),), {}), ((t(2, 8),), {})),
    "SWIGLU_DIM": (((t(2, 8), 2), {}), ((t(2, 8), 1), {})),
    "SWIGLU_EVEN": (((t(2, 7),), {}), ((t(2, 7), 0), {})),
}


def unpermute(
    rows: Tensor | None = None, indices: Tensor | None = None, probs: Tensor | None = None
) -> Call:
    rows = t(6, 8) if rows is None else rows
    indices = t(6, dtype=int32) if indices is None else indices
    return (rows, indices, probs), {}


UNPERMUTE = {
    "UNPERMUTE_DTYPE": (unpermute(t(6, 8, dtype=torch.float16)), unpermute()),
    "UNPERMUTE_INDEX_DTYPE": (unpermute(indices=t(6, dtype=int64)), unpermute()),
    "UNPERMUTE_SHAPES": (unpermute(indices=t(3, 2, dtype=int32)), unpermute()),
    "UNPERMUTE_PROBS_DTYPE": (
        unpermute(probs=t(3, 2, dtype=torch.float16)),
        unpermute(probs=t(3, 2, dtype=float32)),
    ),
    "UNPERMUTE_PROBS": (unpermute(probs=t(3, 3)), unpermute(probs=t(3, 2))),
    "UNPERMUTE_K": (
        unpermute(indices=t(513, dtype=int32), probs=t(1, 513)),
        unpermute(indices=t(512, dtype=int32), probs=t(1, 512)),
    ),
}

# Accepted calls that only the check sees: their product would take long.
TOO_LARGE = {"ATTENTION_TND_TOKENS", "ATTENTION_TND_REQUESTS", "ATTENTION_BATCH"}

CASES: dict[str, Case] = {
    name: Case(op, *pair, runs=name not in TOO_LARGE)
    for op, pairs in {
        "npu_fused_infer_attention_score": ATTENTION,
        "npu_scatter_nd_update_": SCATTER,
        "npu_rms_norm": RMS,
        "npu_add_rms_norm": ADD_RMS,
        "npu_rotary_mul": ROTARY,
        "npu_dynamic_quant": QUANT,
        "npu_moe_gating_top_k_softmax": GATING,
        "npu_moe_init_routing_v2": ROUTING,
        "npu_grouped_matmul": GROUPED,
        "npu_swiglu": SWIGLU,
        "npu_moe_token_unpermute": UNPERMUTE,
    }.items()
    for name, pair in pairs.items()
}
