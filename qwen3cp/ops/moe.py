"""Mixture of experts: choosing experts, sorting rows by expert, grouped products, summing up.

N tokens, K experts a token, E experts, H hidden size. Every (token, choice) pair has the flat
index token * K + choice.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3cp.ops import rules
from qwen3cp.ops.checks import (
    Kernel,
    check_dtype,
    check_float,
    check_shape,
    poison_unwritten_,
    refuse,
    row_blocks,
)
from qwen3cp.ops.products import matmul

_GATING = "npu_moe_gating_top_k_softmax"
_ROUTING = "npu_moe_init_routing_v2"
_GROUPED = "npu_grouped_matmul"
_SWIGLU = "npu_swiglu"
_UNPERMUTE = "npu_moe_token_unpermute"

# expert_tokens_num_type of npu_moe_init_routing_v2
COUNTS = 1
KEY_VALUE = 2
_MAX_EXPERTS = 10240

_SUM = 0  # the mode of torch.embedding_bag

# dtype arguments reach a kernel as these numbers
_DTYPE_NUMBERS = {torch.float32: 6, torch.bfloat16: 15}


# ---------------------------------------------------------------------------------------- gating


def _check_gating(x: Tensor, finished: Tensor | None = None, k: int = 1) -> None:
    check_float(rules.GATING_DTYPE, x=x)
    if x.dim() not in (2, 3):
        raise rules.GATING_RANK.broken(f"x must have 2 or 3 dimensions, not {x.dim()}")
    if not 1 <= k <= min(1024, x.shape[-1]):
        raise rules.GATING_K.broken(f"k={k} must be in 1..1024 and at most E={x.shape[-1]}")
    if finished is not None:
        check_dtype(rules.GATING_FINISHED_DTYPE, "finished", finished, torch.bool)
        check_shape(rules.GATING_FINISHED, "finished", finished, tuple(x.shape[:-1]))


def gating_top_k_softmax(
    x: Tensor, finished: Tensor | None = None, k: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the K largest softmax weights (not renormalised), their experts, and row indices.

    The order is descending; of equal weights the lower expert comes first. Row indices count
    choice-major: token i, choice c has c * N + i. A finished token gets expert E, which is none.
    """
    _check_gating(x, finished, k)
    weights, experts = x.float().softmax(-1).sort(dim=-1, descending=True, stable=True)
    weights = weights[..., :k].to(x.dtype).contiguous()
    experts = experts[..., :k].to(torch.int32).contiguous()
    if finished is not None:
        experts.masked_fill_(finished.unsqueeze(-1), x.shape[-1])
    row_idx = torch.arange(experts.numel(), dtype=torch.int32, device=x.device)
    row_idx = row_idx.view(k, -1).t().contiguous()
    return weights, experts, row_idx.view(experts.shape)


def _gating_top_k_softmax_meta(
    x: Tensor, finished: Tensor | None = None, k: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    _check_gating(x, finished, k)
    shape = (*x.shape[:-1], k)
    experts = x.new_empty(shape, dtype=torch.int32)
    return x.new_empty(shape), experts, torch.empty_like(experts)


# --------------------------------------------------------------------------------------- routing


class _Routing(NamedTuple):
    """A checked call of npu_moe_init_routing_v2."""

    start: int  # of the active experts
    end: int
    expert_num: int
    scale: Tensor | None
    quantise: bool
    num_type: int
    row_idx_type: int


def _check_routing(
    x: Tensor,
    expert_idx: Tensor,
    *,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    active_num: int = -1,
    expert_capacity: int = -1,  # of drop_pad_mode 1 only
    expert_num: int = -1,
    drop_pad_mode: int = 0,
    expert_tokens_num_type: int = 0,
    expert_tokens_num_flag: bool = False,
    quant_mode: int = -1,
    active_expert_range: Sequence[int] = (),
    row_idx_type: int = 0,
    x_dtype: int | None = None,
) -> _Routing:
    """Accept what CANN 8.5 accepts, which is less than the schema's defaults promise."""
    refuse(_ROUTING, x_dtype=x_dtype)
    if offset is not None:
        raise rules.ROUTING_OFFSET.broken(
            "offset belongs to quant_mode 0, which CANN does not accept"
        )
    check_dtype(rules.ROUTING_DTYPE, "x", x, torch.bfloat16, torch.float32, torch.int8)
    check_dtype(rules.ROUTING_INDEX_DTYPE, "expert_idx", expert_idx, torch.int32)
    if (
        x.dim() != 2
        or expert_idx.dim() != 2
        or x.shape[0] != expert_idx.shape[0]
        or expert_idx.shape[1] == 0
    ):
        raise rules.ROUTING_SHAPES.broken(
            f"x must be (N, H) and expert_idx (N, K) with K at least 1, "
            f"not {tuple(x.shape)} and {tuple(expert_idx.shape)}"
        )
    if active_num != -1 and active_num != expert_idx.numel():
        raise rules.ROUTING_ACTIVE_NUM.broken(
            f"CANN accepts active_num -1 or N*K={expert_idx.numel()}, not {active_num}"
        )
    if drop_pad_mode != 0:
        raise rules.ROUTING_DROP_PAD.broken(
            f"CANN accepts drop_pad_mode 0 only, not {drop_pad_mode}"
        )
    if expert_tokens_num_type not in (COUNTS, KEY_VALUE):
        raise rules.ROUTING_NUM_TYPE.broken(
            f"CANN accepts expert_tokens_num_type 1 (counts) or 2 (key-value), "
            f"not {expert_tokens_num_type}; the default is not accepted"
        )
    if not expert_tokens_num_flag:
        raise rules.ROUTING_NUM_FLAG.broken("CANN accepts expert_tokens_num_flag=True only")
    if quant_mode not in (-1, 1):
        raise rules.ROUTING_QUANT_MODE.broken(f"CANN accepts quant_mode -1 or 1, not {quant_mode}")
    if len(active_expert_range) != 2:
        raise rules.ROUTING_RANGE_GIVEN.broken(
            "active_expert_range must be given as [start, end]; the default is "
            "remembered from the first call of the process"
        )
    start, end = active_expert_range
    if not 0 <= start < end <= expert_num:
        raise rules.ROUTING_RANGE.broken(
            f"active_expert_range must satisfy 0 <= start < end <= expert_num, "
            f"not [{start}, {end}] with expert_num={expert_num}"
        )
    most = _MAX_EXPERTS // (2 if expert_tokens_num_type == KEY_VALUE else 1)
    if expert_num > most:
        raise rules.ROUTING_EXPERTS.broken(
            f"expert_num={expert_num} exceeds {most} with "
            f"expert_tokens_num_type={expert_tokens_num_type}"
        )
    if row_idx_type not in (0, 1):
        raise rules.ROUTING_ROW_TYPE.broken(f"row_idx_type must be 0 or 1, not {row_idx_type}")
    if quant_mode == 1 and x.dtype == torch.int8:
        raise rules.ROUTING_INT8.broken("x is int8 already, quant_mode must be -1")
    if scale is not None:
        check_dtype(rules.ROUTING_SCALE_DTYPE, "scale", scale, torch.float32)
        if quant_mode == -1:
            check_shape(rules.ROUTING_SCALE, "scale", scale, (x.shape[0],))
        elif scale.dim() != 2 or scale.shape[0] != 1:
            check_shape(rules.ROUTING_SCALE, "scale", scale, (end - start, x.shape[1]))
        else:
            check_shape(rules.ROUTING_SCALE, "scale", scale, (1, x.shape[1]))
    return _Routing(
        start, end, expert_num, scale, quant_mode == 1, expert_tokens_num_type, row_idx_type
    )


def init_routing_v2(
    x: Tensor, expert_idx: Tensor, **options
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sort the rows of x by expert: (expanded_x, expanded_row_idx, expert_tokens, expanded_scale).

    Only pairs whose expert is in active_expert_range take part; they fill the first rows of
    expanded_x, by expert and then by flat index, and the rest is left unwritten. With
    row_idx_type 0, expanded_row_idx holds each pair's row (-1 if inactive); with 1, each row's
    pair. Example, two experts a token, all four active:

        expert_idx [[2, 0], [0, 3], [2, 1]]   rows of x 0, 1, 2, 0, 2, 1   counts [2, 1, 2, 1]
        expanded_row_idx [3, 0, 1, 5, 4, 2]
    """
    call = _check_routing(x, expert_idx, **options)
    start, end, scale = call.start, call.end, call.scale
    num_pairs = expert_idx.numel()
    experts, order, active = _sort_active(expert_idx.reshape(-1), start, end)
    tokens = order // expert_idx.shape[1]

    expanded_scale = x.new_empty(num_pairs, dtype=torch.float32)
    if call.quantise:
        expanded_x = x.new_empty(num_pairs, x.shape[1], dtype=torch.int8)
        rows = x[tokens].float()
        if scale is not None:
            rows *= scale if scale.shape[0] == 1 else scale[experts - start]
        expanded_x[:active], expanded_scale[:active] = _routing_quant(rows)
    else:
        expanded_x = x.new_empty(num_pairs, x.shape[1])
        torch.index_select(x, 0, tokens, out=expanded_x[:active])
        if scale is not None:
            expanded_scale[:active] = scale[tokens]
    has_scale = call.quantise or scale is not None
    poison_unwritten_(expanded_x, active)
    poison_unwritten_(expanded_scale, active if has_scale else 0)

    if call.row_idx_type == 0:
        expanded_row_idx = expert_idx.new_full((num_pairs,), -1)
        rows = torch.arange(active, dtype=torch.int32, device=x.device)
        expanded_row_idx.scatter_(0, order, rows)
    else:
        expanded_row_idx = expert_idx.new_empty(num_pairs)
        expanded_row_idx[:active] = order.to(torch.int32)
        poison_unwritten_(expanded_row_idx, active)

    counts = torch.bincount(experts - start if start else experts, minlength=end - start)
    if call.num_type == KEY_VALUE:
        counts = _key_value(counts, start, call.expert_num)
    return expanded_x, expanded_row_idx, counts, expanded_scale


def _sort_active(flat: Tensor, start: int, end: int) -> tuple[Tensor, Tensor, int]:
    """The experts of start..end in order, the flat index of each, and how many they are."""
    active = flat.numel()
    low, high = flat.aminmax() if active else (start, start)
    if start <= int(low) and int(high) < end:  # all are, as on a rank that has all experts
        experts, order = flat.sort(stable=True)
        return experts, order, active
    is_active = (flat >= start) & (flat < end)
    experts, order = torch.where(is_active, flat, end).sort(stable=True)
    active = int(is_active.sum())
    return experts[:active], order[:active], active


def _key_value(counts: Tensor, start: int, expert_num: int) -> Tensor:
    """(expert, count) for each expert with rows, then one pair of zeros; the rest is unwritten."""
    busy = counts.nonzero().squeeze(1)
    pairs = counts.new_empty(expert_num, 2)
    pairs[: len(busy)] = torch.stack((busy + start, counts[busy]), dim=1)
    pairs[len(busy) : len(busy) + 1] = 0
    poison_unwritten_(pairs, len(busy) + 1)
    return pairs


def _routing_quant(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Per-row int8 in the rounding of this operator, which is not that of npu_dynamic_quant.

    The quotient is truncated to float16, then rounded half away from zero.
    """
    scale = rows.abs().amax(-1, keepdim=True) / 127.0
    quotient = (rows / scale).nan_to_num_(0.0)
    half = quotient.half()
    # Halves are sign and magnitude: one less in the bits is the next value towards zero.
    half.view(torch.int16).sub_((half.float().abs() > quotient.abs()).to(torch.int16))
    magnitude = (half.float().abs() + 0.5).floor()
    return magnitude.copysign(quotient).to(torch.int8), scale.squeeze(-1)


def _init_routing_v2_meta(
    x: Tensor, expert_idx: Tensor, **options
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = _check_routing(x, expert_idx, **options)
    num_pairs = expert_idx.numel()
    is_counts = call.num_type == COUNTS
    tokens_shape = (call.end - call.start,) if is_counts else (call.expert_num, 2)
    return (
        x.new_empty(num_pairs, x.shape[1], dtype=torch.int8 if call.quantise else x.dtype),
        x.new_empty(num_pairs, dtype=torch.int32),
        x.new_empty(tokens_shape, dtype=torch.int64),
        x.new_empty(num_pairs, dtype=torch.float32),
    )


# ------------------------------------------------------------------------------- grouped product


def _check_grouped_matmul(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    *,
    bias: Sequence[Tensor] | None = None,
    scale: Sequence[Tensor] | None = None,
    offset: Sequence[Tensor] | None = None,
    antiquant_scale: Sequence[Tensor] | None = None,
    antiquant_offset: Sequence[Tensor] | None = None,
    per_token_scale: Sequence[Tensor] | None = None,
    group_list: Tensor | None = None,
    activation_input: Sequence[Tensor] | None = None,
    activation_quant_scale: Sequence[Tensor] | None = None,
    activation_quant_offset: Sequence[Tensor] | None = None,
    split_item: int | None = 0,
    group_type: int | None = None,
    group_list_type: int | None = 0,
    act_type: int | None = 0,
    tuning_config: Sequence[int] | None = None,  # a hint for the NPU's tiling
    output_dtype: int | None = None,
    x_dtype: int | None = None,
    weight_dtype: int | None = None,
    scale_dtype: int | None = None,
    per_token_scale_dtype: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, bool]:
    refuse(
        _GROUPED,
        scale=scale,
        offset=offset,
        antiquant_scale=antiquant_scale,
        antiquant_offset=antiquant_offset,
        per_token_scale=per_token_scale,
        activation_input=activation_input,
        activation_quant_scale=activation_quant_scale,
        activation_quant_offset=activation_quant_offset,
        x_dtype=x_dtype,
        weight_dtype=weight_dtype,
        scale_dtype=scale_dtype,
        per_token_scale_dtype=per_token_scale_dtype,
    )
    if group_type is None:
        raise rules.GROUPED_TYPE.broken("group_type must be passed (0 splits the rows of x)")
    if group_type != 0:
        raise NotImplementedError(f"{_GROUPED}: group_type must be 0, not {group_type}")
    if split_item not in (2, 3):
        raise NotImplementedError(f"{_GROUPED}: split_item must be 2 or 3, not {split_item}")
    if group_list_type not in (0, 1):
        raise NotImplementedError(
            f"{_GROUPED}: group_list_type must be 0 (cumulative) or 1 (counts), "
            f"not {group_list_type}; pairs (2) are for int8 only"
        )
    if act_type != 0:
        raise NotImplementedError(f"{_GROUPED}: act_type must be 0, not {act_type}")
    if len(x) != 1 or len(weight) != 1:
        raise NotImplementedError(
            f"{_GROUPED}: x and weight must be lists of one tensor, not {len(x)} and {len(weight)}"
        )
    rows, experts = x[0], weight[0]
    check_float(rules.GROUPED_DTYPE, x=rows, weight=experts)
    if rows.dim() != 2 or experts.dim() != 3 or rows.shape[1] != experts.shape[1]:
        raise rules.GROUPED_SHAPES.broken(
            f"x must be (M, K) and weight (E, K, N), "
            f"not {tuple(rows.shape)} and {tuple(experts.shape)}"
        )
    num_experts, _, width = experts.shape
    if max(rows.shape[1], width) >= 65536:
        raise rules.GROUPED_INNER.broken(f"K={rows.shape[1]} and N={width} must be below 65536")
    if not rows.is_contiguous():
        raise rules.GROUPED_X_CONTIGUOUS.broken("x must be contiguous")
    if not (experts.is_contiguous() or experts.transpose(1, 2).is_contiguous()):
        raise rules.GROUPED_WEIGHT_STRIDES.broken(
            f"weight must be contiguous, or the transposed view of what is, but "
            f"{tuple(experts.shape)} has the strides {experts.stride()}"
        )
    if output_dtype not in (None, _DTYPE_NUMBERS[rows.dtype]):
        raise NotImplementedError(f"{_GROUPED}: output_dtype must be None or that of x")
    if group_list is None:
        raise rules.GROUPED_LIST_GIVEN.broken("group_list must be given")
    check_dtype(rules.GROUPED_LIST_DTYPE, "group_list", group_list, torch.int64)
    check_shape(rules.GROUPED_LIST, "group_list", group_list, (num_experts,))
    if num_experts > 1024:
        raise rules.GROUPED_MAX_GROUPS.broken(f"{num_experts} groups, at most 1024 are possible")
    if group_list_type == 1 and num_experts < 2:
        raise rules.GROUPED_COUNTS.broken(
            "counts (group_list_type 1) need two or more groups; of one group they are the same "
            "as type 0, which takes it"
        )
    if bias is not None:
        if len(bias) != 1:
            raise rules.GROUPED_BIAS.broken(f"bias must be a list of one tensor, not {len(bias)}")
        check_dtype(rules.GROUPED_BIAS_DTYPE, "bias", bias[0], torch.float32)
        check_shape(rules.GROUPED_BIAS, "bias", bias[0], (num_experts, width))
    return rows, experts, bias[0] if bias is not None else None, group_list, group_list_type == 1


def grouped_matmul(x: Sequence[Tensor], weight: Sequence[Tensor], **options) -> list[Tensor]:
    """[x @ weight[e] (+ bias[e])], where expert e takes the next group of rows of x.

    Products accumulate in float32 and are rounded once. Rows after the last group are left
    unwritten.
    """
    rows, experts, bias, group_list, is_counts = _check_grouped_matmul(x, weight, **options)
    counts = group_list if is_counts else group_list.diff(prepend=group_list.new_zeros(1))
    sizes: list[int] = counts.tolist()
    if min(sizes, default=0) < 0:
        raise rules.GROUPED_ROWS.broken(f"group_list has a negative group: {sizes}")
    if sum(sizes) > rows.shape[0]:
        raise rules.GROUPED_ROWS.broken(
            f"group_list needs {sum(sizes)} rows, but x has {rows.shape[0]}"
        )
    out = rows.new_empty(rows.shape[0], experts.shape[2])
    start = 0
    for expert, size in enumerate(sizes):
        if size == 0:
            continue
        group, out_group = rows[start : start + size], out[start : start + size]
        if bias is None:
            matmul(group, experts[expert], out=out_group)
        else:
            out_group.copy_(torch.addmm(bias[expert], group.float(), experts[expert].float()))
        start += size
    poison_unwritten_(out, start)
    return [out]


def _grouped_matmul_meta(x: Sequence[Tensor], weight: Sequence[Tensor], **options) -> list[Tensor]:
    rows, experts, *_ = _check_grouped_matmul(x, weight, **options)
    return [rows.new_empty(rows.shape[0], experts.shape[2])]


def _refuse_grouped_matmul_list(x: Sequence[Tensor], weight: Sequence[Tensor], **options) -> None:
    raise NotImplementedError(
        f"{_GROUPED}: group_list must be a Tensor, a list of ints is not supported"
    )


# ---------------------------------------------------------------------------------------- swiglu


def _check_swiglu(input: Tensor, dim: int = -1) -> tuple[int, ...]:
    """Returns the shape of the result."""
    check_float(rules.SWIGLU_DTYPE, input=input)
    if not -input.dim() <= dim < input.dim():
        raise rules.SWIGLU_DIM.broken(f"dim={dim} is not a dimension of {tuple(input.shape)}")
    if input.shape[dim] % 2:
        raise rules.SWIGLU_EVEN.broken(f"size {input.shape[dim]} of dimension {dim} must be even")
    shape = list(input.shape)
    shape[dim] //= 2
    return tuple(shape)


def swiglu(input: Tensor, dim: int = -1) -> Tensor:
    """silu(a) * b, where a and b are the halves of dim, in float32, rounded once."""
    out = input.new_empty(_check_swiglu(input, dim))
    for y, a, b in row_blocks(out, *input.chunk(2, dim=dim)):
        torch.mul(F.silu(a.float()), b, out=y)
    return out


def _swiglu_meta(input: Tensor, dim: int = -1) -> Tensor:
    return input.new_empty(_check_swiglu(input, dim))


# ------------------------------------------------------------------------------------- unpermute


def _check_unpermute(
    permuted_tokens: Tensor,
    sorted_indices: Tensor,
    probs: Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: Sequence[int] | None = None,
) -> tuple[int, int]:
    """Returns (number of tokens, choices of each)."""
    refuse(_UNPERMUTE, restore_shape=restore_shape)
    if padded_mode:
        raise NotImplementedError(f"{_UNPERMUTE}: padded_mode must be False")
    check_float(rules.UNPERMUTE_DTYPE, permuted_tokens=permuted_tokens)
    check_dtype(rules.UNPERMUTE_INDEX_DTYPE, "sorted_indices", sorted_indices, torch.int32)
    if permuted_tokens.dim() != 2 or sorted_indices.dim() != 1:
        raise rules.UNPERMUTE_SHAPES.broken(
            f"permuted_tokens must be (rows, H) and sorted_indices (N*K,), "
            f"not {tuple(permuted_tokens.shape)} and {tuple(sorted_indices.shape)}"
        )
    if probs is None:
        return sorted_indices.shape[0], 1
    check_dtype(rules.UNPERMUTE_PROBS_DTYPE, "probs", probs, torch.bfloat16, torch.float32)
    if probs.dim() != 2 or probs.numel() != sorted_indices.shape[0]:
        raise rules.UNPERMUTE_PROBS.broken(
            f"probs must be (N, K) with N*K={sorted_indices.shape[0]}, not {tuple(probs.shape)}"
        )
    num_tokens, num_choices = probs.shape
    if not 1 <= num_choices <= 512:
        raise rules.UNPERMUTE_K.broken(f"K={num_choices} must be in 1..512")
    return num_tokens, num_choices


def token_unpermute(
    permuted_tokens: Tensor,
    sorted_indices: Tensor,
    probs: Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: Sequence[int] | None = None,
) -> Tensor:
    """out[i] = sum over k of probs[i, k] * permuted_tokens[sorted_indices[i * K + k]].

    Summed in float32 in the order of k, rounded once. Pairs with probability 0 and indices past
    the last row are skipped, so whatever stands in those rows, NaN too, has no effect. The NPU
    does not check for negative indices; here they are an error.
    """
    num_tokens, num_choices = _check_unpermute(
        permuted_tokens, sorted_indices, probs, padded_mode, restore_shape
    )
    num_rows, hidden = permuted_tokens.shape
    out = permuted_tokens.new_empty(num_tokens, hidden)
    if num_rows == 0:
        return out.zero_()
    if num_tokens == 0:
        return out
    indices = sorted_indices.view(num_tokens, num_choices)
    low, high = indices.aminmax()
    if int(low) < 0:
        raise rules.UNPERMUTE_INDEX.broken("sorted_indices has negative entries")
    if probs is None:
        probs = indices.new_ones(indices.shape, dtype=torch.float32)
    some_skipped = int(high) >= num_rows or not bool(probs.all())
    is_float = permuted_tokens.dtype == torch.float32
    for y, index, weight in row_blocks(out, indices, probs.float()):
        rows, index, weight = permuted_tokens, index.reshape(-1), weight.reshape(-1)
        if some_skipped or not is_float:
            rows = rows.index_select(0, index.clamp(max=num_rows - 1)).float()
            if some_skipped:
                skipped = (index >= num_rows) | (weight == 0)
                rows.masked_fill_(skipped.unsqueeze(1), 0.0)
            index = torch.arange(len(index), dtype=torch.int32, device=index.device)
        starts = torch.arange(0, len(index), num_choices, dtype=torch.int32, device=index.device)
        # what F.embedding_bag calls after checks that cost more than a few rows' sum
        sums = torch.embedding_bag(rows, index, starts, False, _SUM, False, weight)
        y.copy_(sums[0])
    return out


def _token_unpermute_meta(
    permuted_tokens: Tensor,
    sorted_indices: Tensor,
    probs: Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: Sequence[int] | None = None,
) -> Tensor:
    num_tokens, _ = _check_unpermute(
        permuted_tokens, sorted_indices, probs, padded_mode, restore_shape
    )
    return permuted_tokens.new_empty(num_tokens, permuted_tokens.shape[1])


KERNELS = {
    _GATING: Kernel(gating_top_k_softmax, _gating_top_k_softmax_meta, _check_gating),
    _ROUTING: Kernel(init_routing_v2, _init_routing_v2_meta, _check_routing),
    _GROUPED: Kernel(grouped_matmul, _grouped_matmul_meta, _check_grouped_matmul),
    f"{_GROUPED}.List": Kernel(*[_refuse_grouped_matmul_list] * 3),
    _SWIGLU: Kernel(swiglu, _swiglu_meta, _check_swiglu),
    _UNPERMUTE: Kernel(token_unpermute, _token_unpermute_meta, _check_unpermute),
}
