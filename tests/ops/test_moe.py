"""Gating, routing, grouped products, SwiGLU and summing up, each alone and then together."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_map

from qwen3cp.ops import settings

from .helpers import assert_close, npu, run

DTYPES = (torch.float32, torch.bfloat16)
POISON = {
    torch.int8: 0x7F,
    torch.int32: 0x7F7F7F7F,
    torch.int64: 0x7F7F7F7F7F7F7F7F,
}


def is_poison(x):
    if x.is_floating_point():
        return bool(x.isnan().all())
    return bool((x == POISON[x.dtype]).all())


# ---------------------------------------------------------------------------------------- gating


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=2),
    st.integers(1, 9),
    st.data(),
    st.sampled_from(DTYPES),
    st.booleans(),
)
@hypothesis_settings(deadline=None, max_examples=50)
def test_gating(leading, num_experts, data, dtype, with_finished):
    k = data.draw(st.integers(1, num_experts))
    # Few values, so that there are ties.
    x = torch.randint(-3, 3, (*leading, num_experts)).to(dtype)
    finished = torch.rand(leading) < 0.5 if with_finished else None
    y, experts, row_idx = run(npu.npu_moe_gating_top_k_softmax, x, finished, k)
    assert y.dtype == dtype and experts.dtype == row_idx.dtype == torch.int32
    assert y.shape == experts.shape == row_idx.shape == (*leading, k)
    num_tokens = math.prod(leading)
    for token, logits in enumerate(x.flatten(0, -2).tolist()):
        total = sum(math.exp(value) for value in logits)
        order = sorted(range(num_experts), key=lambda e: (-logits[e], e))[:k]
        weights = torch.tensor([math.exp(logits[e]) / total for e in order])
        assert_close(y.view(-1, k)[token], weights.to(dtype))
        is_finished = finished is not None and finished.flatten()[token]
        expected = [num_experts] * k if is_finished else order
        assert experts.view(-1, k)[token].tolist() == expected
        rows = [choice * num_tokens + token for choice in range(k)]
        assert row_idx.view(-1, k)[token].tolist() == rows


def test_gating_worked_example():
    x = torch.tensor([[1.0, 3.0, 2.0, 3.0]])
    y, experts, row_idx = run(npu.npu_moe_gating_top_k_softmax, x, k=2)
    torch.testing.assert_close(y, torch.tensor([[0.3995, 0.3995]]), atol=5e-5, rtol=0)
    assert experts.tolist() == [[1, 3]] and row_idx.tolist() == [[0, 1]]


def test_gating_does_not_renormalise():
    y, _, _ = npu.npu_moe_gating_top_k_softmax(torch.zeros(1, 8), k=4)
    assert y.sum().item() == pytest.approx(0.5)


def test_gating_ties_are_stable_among_many_experts():
    _, experts, _ = npu.npu_moe_gating_top_k_softmax(torch.zeros(3, 128), k=8)
    assert experts.tolist() == [list(range(8))] * 3


def test_gating_chooses_before_it_rounds():
    # These weights are equal once rounded to bfloat16.
    x = torch.full((1, 64), -20.0).bfloat16()
    x[0, :2] = torch.tensor([1.0, 1.0078125])
    y, experts, _ = npu.npu_moe_gating_top_k_softmax(x, k=2)
    assert experts.tolist() == [[1, 0]] and y[0, 0] >= y[0, 1]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    "x, finished, k",
    [
        (torch.ones(2, 4).half(), None, 1),
        (torch.ones(4), None, 1),
        (torch.ones(1, 1, 2, 4), None, 1),
        (torch.ones(2, 4), None, 0),
        (torch.ones(2, 4), None, 5),
        (torch.ones(2, 2000), None, 1025),
        (torch.ones(2, 4), torch.zeros(2), 1),
        (torch.ones(2, 4), torch.zeros(3, dtype=torch.bool), 1),
    ],
)
def test_gating_refused(x, finished, k, device):
    finished = None if finished is None else finished.to(device)
    with pytest.raises((TypeError, ValueError)):
        npu.npu_moe_gating_top_k_softmax(x.to(device), finished, k)


# --------------------------------------------------------------------------------------- routing

EXPERTS = torch.tensor([[2, 0], [0, 3], [2, 1]], dtype=torch.int32)
ROUTING = {"expert_tokens_num_type": 1, "expert_tokens_num_flag": True}


def route(x, experts, active_range, expert_num=4, **options):
    return run(
        npu.npu_moe_init_routing_v2,
        x,
        experts,
        expert_num=expert_num,
        active_expert_range=active_range,
        **ROUTING | options,
    )


@given(
    st.integers(0, 6),
    st.integers(1, 4),
    st.integers(1, 6),
    st.data(),
    st.sampled_from([*DTYPES, torch.int8]),
    st.booleans(),
    st.sampled_from([0, 1]),
    st.sampled_from([1, 2]),
)
@hypothesis_settings(deadline=None, max_examples=60)
def test_routing(num_tokens, k, num_experts, data, dtype, scaled, row_idx_type, num_type):
    start = data.draw(st.integers(0, num_experts - 1))
    end = data.draw(st.integers(start + 1, num_experts))
    experts = torch.randint(-1, num_experts, (num_tokens, k), dtype=torch.int32)
    x = torch.randint(-99, 99, (num_tokens, 3)).to(dtype)
    scale = torch.rand(num_tokens) if scaled else None
    with settings.override(debug=True):
        rows, row_idx, tokens, row_scale = route(
            x,
            experts,
            [start, end],
            expert_num=num_experts,
            scale=scale,
            active_num=data.draw(st.sampled_from([-1, num_tokens * k])),
            row_idx_type=row_idx_type,
            expert_tokens_num_type=num_type,
        )
    # Buckets, filled in flat order.
    buckets = {expert: [] for expert in range(start, end)}
    for flat, expert in enumerate(experts.flatten().tolist()):
        if expert in buckets:
            buckets[expert].append(flat)
    sources = [flat for expert in range(start, end) for flat in buckets[expert]]
    active = len(sources)

    assert rows.dtype == dtype and rows.shape == (num_tokens * k, 3)
    for row, flat in enumerate(sources):
        assert torch.equal(rows[row], x[flat // k])
    assert is_poison(rows[active:])
    if scale is None:
        assert is_poison(row_scale)
    else:
        assert row_scale[:active].tolist() == [scale[flat // k].item() for flat in sources]
        assert is_poison(row_scale[active:])

    assert row_idx.dtype == torch.int32
    if row_idx_type == 0:
        expected = [-1] * (num_tokens * k)
        for row, flat in enumerate(sources):
            expected[flat] = row
        assert row_idx.tolist() == expected
    else:
        assert row_idx[:active].tolist() == sources and is_poison(row_idx[active:])

    assert tokens.dtype == torch.int64
    if num_type == 1:
        assert tokens.tolist() == [len(bucket) for bucket in buckets.values()]
    else:
        pairs = [[expert, len(bucket)] for expert, bucket in buckets.items() if bucket]
        expected = (pairs + [[0, 0]])[:num_experts]
        assert tokens.shape == (num_experts, 2)
        assert tokens[: len(expected)].tolist() == expected
        assert is_poison(tokens[len(expected) :])


def test_routing_worked_example_all_experts():
    x = torch.tensor([[0.0], [1.0], [2.0]])
    rows, row_idx, counts, _ = route(x, EXPERTS, [0, 4])
    assert rows.flatten().tolist() == [0, 1, 2, 0, 2, 1]
    assert row_idx.tolist() == [3, 0, 1, 5, 4, 2]
    assert counts.tolist() == [2, 1, 2, 1]
    assert route(x, EXPERTS, [0, 4], row_idx_type=1)[1].tolist() == [1, 2, 5, 0, 4, 3]
    key_value = route(x, EXPERTS, [0, 4], expert_tokens_num_type=2)[2]
    assert key_value.tolist() == [[0, 2], [1, 1], [2, 2], [3, 1]]


def test_routing_worked_example_some_experts():
    x = torch.tensor([[0.0], [1.0], [2.0]])
    with settings.override(debug=True):
        rows, row_idx, counts, _ = route(x, EXPERTS, [2, 4])
    assert rows[:3].flatten().tolist() == [0, 2, 1]
    assert rows[3:].isnan().all()
    assert row_idx.tolist() == [0, -1, -1, 2, 1, -1]
    assert counts.tolist() == [2, 1]


def test_routing_is_stable():
    experts = torch.full((40, 8), 5, dtype=torch.int32)
    row_idx = route(torch.ones(40, 2), experts, [0, 128], expert_num=128)[1]
    assert row_idx.tolist() == list(range(320))


def test_routing_without_tokens():
    no_experts = torch.empty(0, 2, dtype=torch.int32)
    rows, row_idx, counts, scale = route(torch.empty(0, 5), no_experts, [0, 4])
    assert rows.shape == (0, 5) and row_idx.shape == scale.shape == (0,)
    assert counts.tolist() == [0, 0, 0, 0]


def truncate_to_half(value):
    half = torch.tensor(value).half()
    if abs(half.item()) > abs(value):
        half = torch.nextafter(half.float(), torch.tensor(0.0)).half()  # lands on half again
        step = half.view(torch.int16) - 1
        half = step.view(torch.float16)
    return half.item()


@given(st.data(), st.sampled_from(DTYPES), st.sampled_from([None, "shared", "per expert"]))
@hypothesis_settings(deadline=None, max_examples=30)
def test_routing_with_quantisation(data, dtype, smooth):
    num_tokens, k, width = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 3), st.just(5)))
    experts = torch.randint(0, 4, (num_tokens, k), dtype=torch.int32)
    x = torch.randn(num_tokens, width).to(dtype)
    x[0] *= 0
    scale = {None: None, "shared": torch.rand(1, width), "per expert": torch.rand(3, width)}[smooth]
    with settings.override(debug=True):
        rows, row_idx, counts, row_scale = route(x, experts, [1, 4], quant_mode=1, scale=scale)
    assert rows.dtype == torch.int8 and row_scale.dtype == torch.float32
    active = int(counts.sum())
    assert is_poison(rows[active:]) and is_poison(row_scale[active:])
    for flat, row in enumerate(row_idx.tolist()):
        if row < 0:
            continue
        values = x[flat // k].float()
        if scale is not None:
            expert = int(experts.flatten()[flat])
            values = values * scale[0 if smooth == "shared" else expert - 1]
        expected_scale = values.abs().max() / 127
        assert_close(row_scale[row], expected_scale)
        if expected_scale == 0:
            assert not rows[row].any()
            continue
        for value, quantised in zip((values / expected_scale).tolist(), rows[row], strict=True):
            half = truncate_to_half(value)
            rounded = math.floor(abs(half) + 0.5)
            assert int(quantised) == (rounded if value >= 0 else -rounded)


def test_routing_rounds_half_away_unlike_dynamic_quant():
    x = torch.tensor([[127.0, 62.5, -62.5, 63.49]])
    expert = torch.zeros(1, 1, dtype=torch.int32)
    assert route(x, expert, [0, 1], quant_mode=1)[0].tolist() == [[127, 63, -63, 63]]
    assert npu.npu_dynamic_quant(x)[0].tolist() == [[127, 62, -62, 63]]


X = torch.ones(3, 2)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    "changes",
    [
        {"x": X.half()},
        {"x": X[:2]},
        {"x": X[0]},
        {"expert_idx": EXPERTS.long()},
        {"expert_idx": EXPERTS.flatten()},
        {"expert_idx": torch.empty(3, 0, dtype=torch.int32)},
        {"active_num": 0},
        {"active_num": 5},
        {"drop_pad_mode": 1, "expert_capacity": 1},
        {"expert_tokens_num_type": 0},
        {"expert_tokens_num_type": 3},
        {"expert_tokens_num_flag": False},
        {"quant_mode": 0, "scale": torch.ones(1)},
        {"quant_mode": 2},
        {"active_expert_range": []},
        {"active_expert_range": [2, 2]},
        {"active_expert_range": [-1, 2]},
        {"active_expert_range": [0, 5]},
        {"expert_num": -1},
        {"row_idx_type": 2},
        {"offset": torch.ones(1)},
        {"x_dtype": torch.int8},
        {"scale": torch.ones(2)},
        {"scale": torch.ones(3).bfloat16()},
        {"quant_mode": 1, "scale": torch.ones(3)},
        {"quant_mode": 1, "scale": torch.ones(2, 2)},
        {"quant_mode": 1, "x": X.to(torch.int8)},
    ],
)
def test_routing_refused(changes, device):
    arguments = {
        "x": X,
        "expert_idx": EXPERTS,
        "expert_num": 4,
        "active_expert_range": [0, 4],
        **ROUTING,
    }
    arguments = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in (arguments | changes).items()
    }
    with pytest.raises((TypeError, ValueError, NotImplementedError)):
        npu.npu_moe_init_routing_v2(**arguments)


@pytest.mark.parametrize("missing", ["expert_num", "active_expert_range", *ROUTING])
def test_routing_defaults_are_refused(missing):
    arguments = {"expert_num": 4, "active_expert_range": [0, 4], **ROUTING}
    del arguments[missing]
    with pytest.raises(ValueError):
        npu.npu_moe_init_routing_v2(X, EXPERTS, **arguments)


# ------------------------------------------------------------------------------- grouped product


def grouped(x, weight, groups, **options):
    options = {"group_type": 0, "split_item": 2, "group_list_type": 1} | options
    if groups is not None:
        groups = torch.tensor(groups, dtype=torch.int64, device=x.device)
    return run(npu.npu_grouped_matmul, [x], [weight], group_list=groups, **options)


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=5),
    st.integers(0, 2),
    st.tuples(st.integers(1, 6), st.integers(1, 6)),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
@hypothesis_settings(deadline=None, max_examples=60)
def test_grouped_matmul(counts, tail, sizes, dtype, transposed, cumulative, with_bias):
    depth, width = sizes
    num_rows = sum(counts) + tail
    x = torch.randn(num_rows, depth).to(dtype)
    if transposed:
        weight = torch.randn(len(counts), width, depth).to(dtype).transpose(1, 2)
    else:
        weight = torch.randn(len(counts), depth, width).to(dtype)
    bias = torch.randn(len(counts), width) if with_bias else None
    cumulative = cumulative or len(counts) == 1  # counts of one group are refused
    groups = torch.tensor(counts).cumsum(0).tolist() if cumulative else counts
    with settings.override(debug=True):
        (out,) = grouped(
            x,
            weight,
            groups,
            group_list_type=0 if cumulative else 1,
            bias=None if bias is None else [bias],
        )
    assert out.dtype == dtype and out.shape == (num_rows, width)
    row = 0
    for expert, count in enumerate(counts):
        for _ in range(count):
            expected = (x[row].float()[:, None] * weight[expert].float()).sum(0)
            if bias is not None:
                expected += bias[expert]
            # Products may cancel, so an error in a float32 sum is absolute.
            assert_close(out[row], expected.to(dtype))
            row += 1
    assert is_poison(out[row:])


def test_group_list_types_agree():
    x, weight = torch.randn(3, 4), torch.randn(3, 4, 2)
    (by_counts,) = grouped(x, weight, [2, 0, 1])
    (by_ends,) = grouped(x, weight, [2, 2, 3], group_list_type=0)
    assert torch.equal(by_counts, by_ends)
    assert_close(by_counts[2], x[2] @ weight[2])


def test_default_group_list_type_is_cumulative():
    x, weight = torch.randn(3, 4), torch.randn(3, 4, 2)
    ends = torch.tensor([2, 2, 3])
    (default,) = npu.npu_grouped_matmul([x], [weight], group_list=ends, group_type=0, split_item=3)
    assert torch.equal(default, grouped(x, weight, [2, 0, 1])[0])


def test_grouped_matmul_without_rows():
    assert grouped(torch.empty(0, 4), torch.randn(3, 4, 2), [0, 0, 0])[0].shape == (0, 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_output_dtype_of_x(dtype):
    x, weight = torch.ones(1, 2).to(dtype), torch.ones(1, 2, 3).to(dtype)
    assert grouped(x, weight, [1], group_list_type=0, output_dtype=dtype)[0].dtype == dtype


@pytest.mark.parametrize("groups, kind", [([1, 3, -1], 1), ([2, 1, 3], 0), ([2, 1, 1], 1)])
def test_groups_that_do_not_fit(groups, kind):
    groups = torch.tensor(groups)
    with pytest.raises(ValueError):
        npu.npu_grouped_matmul(
            [torch.ones(3, 4)],
            [torch.ones(3, 4, 2)],
            group_list=groups,
            group_type=0,
            split_item=2,
            group_list_type=kind,
        )


ROWS, WEIGHT, GROUPS = torch.ones(3, 4), torch.ones(2, 4, 5), torch.tensor([1, 2])


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    "changes",
    [
        {"x": [ROWS.half()], "weight": [WEIGHT.half()]},
        {"weight": [WEIGHT.bfloat16()]},
        {"x": [ROWS, ROWS]},
        {"weight": [WEIGHT[0], WEIGHT[1]]},
        {"x": [ROWS[0]]},
        {"weight": [WEIGHT.transpose(1, 2)]},
        {"x": [torch.ones(4, 3).t()]},
        {"weight": [torch.ones(2, 4, 1).expand(2, 4, 65536)]},
        {"group_list": None},
        {"group_list": [1, 3], "group_type": None},
        {"group_list": GROUPS.int()},
        {"group_list": torch.tensor([1, 1, 1])},
        {
            "group_list": torch.zeros(1025, dtype=torch.int64),
            "weight": [torch.ones(1, 4, 1).expand(1025, 4, 1)],
        },
        {"group_list_type": 2, "group_list": torch.tensor([[0, 1], [1, 2]])},
        {"group_type": None},
        {"group_type": -1},
        {"group_type": 2},
        {"split_item": 0},
        {"split_item": 1},
        {"act_type": 1},
        {"output_dtype": torch.bfloat16},
        {"output_dtype": torch.int8},
        {"bias": [torch.ones(2, 5).bfloat16()]},
        {"bias": [torch.ones(5)]},
        {"bias": [torch.ones(5), torch.ones(5)]},
        {"scale": [torch.ones(2, 5)]},
        {"offset": [torch.ones(2, 5)]},
        {"antiquant_scale": [torch.ones(2, 5)]},
        {"antiquant_offset": [torch.ones(2, 5)]},
        {"per_token_scale": [torch.ones(3)]},
        {"activation_input": [ROWS]},
        {"activation_quant_scale": [ROWS]},
        {"activation_quant_offset": [ROWS]},
        {"x_dtype": torch.int8},
        {"weight_dtype": torch.int8},
        {"scale_dtype": torch.int8},
        {"per_token_scale_dtype": torch.int8},
    ],
)
def test_grouped_matmul_refused(changes, device):
    arguments = {
        "x": [ROWS],
        "weight": [WEIGHT],
        "group_list": GROUPS,
        "group_type": 0,
        "split_item": 2,
        "group_list_type": 1,
    }
    arguments = tree_map(
        lambda value: value.to(device) if isinstance(value, torch.Tensor) else value,
        arguments | changes,
    )
    with pytest.raises((TypeError, ValueError, NotImplementedError)):
        npu.npu_grouped_matmul(**arguments)


# ---------------------------------------------------------------------------------------- swiglu


@given(st.lists(st.integers(0, 4), min_size=1, max_size=3), st.data(), st.sampled_from(DTYPES))
@hypothesis_settings(deadline=None, max_examples=40)
def test_swiglu(shape, data, dtype):
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    shape[dim] *= 2
    x = torch.randn(shape).to(dtype)
    out = run(npu.npu_swiglu, x, dim)
    half = shape[dim] // 2
    a, b = x.float().narrow(dim, 0, half), x.float().narrow(dim, half, half)
    assert out.dtype == dtype
    assert_close(out, (a / (1 + torch.exp(-a)) * b).to(dtype))


def test_swiglu_of_strided_input_is_contiguous():
    x = torch.randn(3, 4, 6).transpose(0, 1)
    assert torch.equal(run(npu.npu_swiglu, x), npu.npu_swiglu(x.contiguous()))


def test_swiglu_splits_the_last_dimension_by_default():
    out = npu.npu_swiglu(torch.tensor([[100.0, 0.0, 2.0, 3.0]]))
    assert out.tolist() == [[200.0, 0.0]]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    "x, dim", [(torch.ones(2, 4).half(), -1), (torch.ones(2, 3), -1), (torch.ones(2, 4), 2)]
)
def test_swiglu_refused(x, dim, device):
    with pytest.raises((TypeError, ValueError)):
        npu.npu_swiglu(x.to(device), dim)


# ------------------------------------------------------------------------------------- unpermute


@given(
    st.integers(0, 5),
    st.integers(1, 4),
    st.integers(0, 3),
    st.sampled_from(DTYPES),
    st.sampled_from([*DTYPES, None]),
)
@hypothesis_settings(deadline=None, max_examples=50)
def test_unpermute(num_tokens, k, missing, dtype, probs_dtype):
    k = 1 if probs_dtype is None else k
    num_pairs = num_tokens * k
    num_rows = max(0, num_pairs - missing)  # indices past the last row are skipped
    rows = torch.randn(num_rows, 3).to(dtype)
    indices = torch.randperm(num_pairs).int()
    probs = None if probs_dtype is None else torch.rand(num_tokens, k).to(probs_dtype)
    if probs is not None:
        probs[torch.rand(num_tokens, k) < 0.3] = 0
    out = run(npu.npu_moe_token_unpermute, rows, indices, probs)
    assert out.dtype == dtype and out.shape == (num_tokens, 3)
    for token in range(num_tokens):
        total = torch.zeros(3)
        for choice in range(k):
            row = int(indices[token * k + choice])
            if row < num_rows:
                weight = 1.0 if probs is None else probs[token, choice].float()
                total = total + weight * rows[row].float()
        assert_close(out[token], total.to(dtype))


def test_unpermute_worked_example():
    rows = 10 * torch.arange(6.0)[:, None]
    indices = torch.tensor([3, 0, 1, 5, 4, 2], dtype=torch.int32)
    probs = torch.tensor([[0.5, 0.5], [0.25, 0.75], [1.0, 0.0]])
    out = run(npu.npu_moe_token_unpermute, rows, indices, probs)
    assert out.flatten().tolist() == [15, 40, 40]


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf])
def test_unpermute_skips_rows_with_probability_zero(garbage):
    rows = torch.tensor([[1.0], [garbage]])
    indices = torch.tensor([0, 1, 1, 0], dtype=torch.int32)
    probs = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    assert npu.npu_moe_token_unpermute(rows, indices, probs).flatten().tolist() == [2, 3]


def test_unpermute_rounds_once():
    # 1 + 2^-9 + 2^-9 is a bfloat16 step more than 1; step by step it would stay 1.
    rows = torch.tensor([[1.0], [2**-9], [2**-9], [2**-8]]).bfloat16()
    indices = torch.arange(4, dtype=torch.int32)
    out = npu.npu_moe_token_unpermute(rows, indices, torch.ones(1, 4))
    assert out.item() == 1 + 2**-7


PERMUTED, INDICES, PROBS = torch.ones(4, 3), torch.arange(4, dtype=torch.int32), torch.ones(2, 2)


def test_unpermute_refuses_negative_indices():
    with pytest.raises(IndexError):
        npu.npu_moe_token_unpermute(PERMUTED, INDICES - 1, PROBS)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    "changes",
    [
        {"permuted_tokens": PERMUTED.half()},
        {"permuted_tokens": PERMUTED[0]},
        {"sorted_indices": INDICES.long()},
        {"sorted_indices": INDICES.view(2, 2)},
        {"probs": PROBS.half()},
        {"probs": PROBS.flatten()},
        {"probs": torch.ones(2, 3)},
        {"probs": torch.ones(1, 513), "sorted_indices": torch.zeros(513, dtype=torch.int32)},
        {"padded_mode": True},
        {"restore_shape": [2, 3]},
    ],
)
def test_unpermute_refused(changes, device):
    arguments = {"permuted_tokens": PERMUTED, "sorted_indices": INDICES, "probs": PROBS} | changes
    arguments = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }
    with pytest.raises((TypeError, ValueError, NotImplementedError)):
        npu.npu_moe_token_unpermute(**arguments)


# -------------------------------------------------------------------------------------- together


@given(st.integers(1, 6), st.sampled_from([[0, 8], [2, 5]]))
@hypothesis_settings(deadline=None, max_examples=20)
def test_expert_layer(num_tokens, active_range):
    """One layer, as the model calls it, with all experts or with those of one rank."""
    hidden, inner, num_experts, k = 4, 3, 8, 2
    start, end = active_range
    x = torch.randn(num_tokens, hidden)
    logits = torch.randn(num_tokens, num_experts)
    gate_up = torch.randn(num_experts, 2 * inner, hidden)
    down = torch.randn(num_experts, hidden, inner)
    with settings.override(debug=True):
        weights, experts, _ = npu.npu_moe_gating_top_k_softmax(logits, None, k)
        weights = weights / weights.sum(-1, keepdim=True)
        rows, row_idx, counts, _ = route(x, experts, active_range, expert_num=num_experts)
        local = {"group_type": 0, "split_item": 2, "group_list_type": 1, "group_list": counts}
        (rows,) = npu.npu_grouped_matmul([rows], [gate_up[start:end].transpose(1, 2)], **local)
        rows = npu.npu_swiglu(rows)
        (rows,) = npu.npu_grouped_matmul([rows], [down[start:end].transpose(1, 2)], **local)
        probs = weights.masked_fill((experts < start) | (experts >= end), 0.0)
        out = npu.npu_moe_token_unpermute(rows, row_idx.abs(), probs)
    expected = torch.zeros(num_tokens, hidden)
    for token in range(num_tokens):
        chosen = logits[token].softmax(0).topk(k)
        for weight, expert in zip(*chosen, strict=True):
            if start <= expert < end:
                gate, up = (gate_up[expert] @ x[token]).chunk(2)
                inner_rows = torch.nn.functional.silu(gate) * up
                expected[token] += weight / chosen.values.sum() * (down[expert] @ inner_rows)
    assert_close(out, expected)
