"""Fused attention against a loop over heads and rows."""

import re
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from transformers.models.qwen3_moe.modeling_qwen3_moe import eager_attention_forward

from qwen3cp.ops import attention, settings

from .helpers import ONE_BFLOAT16_STEP, npu, run

DTYPES = (torch.float32, torch.bfloat16)
LOWEST = torch.finfo(torch.float32).min
TEMPLATE = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
UNLIMITED = 2147483647


def fia(*args, **kwargs):
    return npu.npu_fused_infer_attention_score(*args, **kwargs)


# ---------------------------------------------------------------------------------------- oracle


def keeps(mode, i, j, *, q, k, pre, post, masked):
    """Whether row i of q may see key j of k, word for word from the operator's description."""
    if mode == 0:
        return masked is None or (not masked[i][j] and i - pre <= j <= i + post)
    if mode == 1:
        return not masked[i][j]
    if mode == 2:
        return j <= i
    if mode == 3:
        return j <= i + (k - q)
    return i + (k - q) - pre <= j <= i + (k - q) + post


def oracle(query, key, value, keep, scale, bias=None):
    """(rows, N, D), (keys, Nkv, D), (keys, Nkv, Dv), keep(i, j) -> output, log-sum-exp (rows, N).

    Rows without a key are 0 and +inf. Weights are rounded to the dtype of the query before they
    meet the values; their sum is not.
    """
    rows, heads, _ = query.shape
    output = torch.zeros(rows, heads, value.shape[2])
    lse = torch.full((rows, heads), torch.inf)
    for i in range(rows):
        seen = [j for j in range(key.shape[0]) if keep(i, j)]
        if not seen:
            continue
        for head in range(heads):
            kv_head = head // (heads // key.shape[1])
            scores = scale * (key[seen, kv_head].float() @ query[i, head].float())
            if bias is not None:
                scores += bias[head, i, seen].float()
            weights = torch.exp(scores - scores.max())
            rounded = weights.to(query.dtype).float()
            output[i, head] = rounded @ value[seen, kv_head].float() / weights.sum()
            lse[i, head] = torch.logsumexp(scores, 0)
    return output, lse


def assert_attention_close(output, lse, expected_output, expected_lse):
    if output.dtype == torch.float32:
        torch.testing.assert_close(output, expected_output, rtol=1e-5, atol=1e-5)
    else:
        # A weight may round the other way, by half a step of at most the whole sum of values.
        torch.testing.assert_close(
            output.float(), expected_output, rtol=ONE_BFLOAT16_STEP, atol=2**-8
        )
    torch.testing.assert_close(lse, expected_lse, rtol=1e-6, atol=1e-4)


# ---------------------------------------------------------------------------------------- inputs


def paged(rows, block_size, rank, columns):
    """Put each request's rows (length, Nkv, D) into a cache. Returns (cache, block_table).

    Cache rows that hold nothing are NaN, table entries that are not needed point nowhere.
    """
    needed = [-(-len(request) // block_size) for request in rows]
    spare = 2
    cache = torch.full((sum(needed) + spare, block_size, *rows[0].shape[1:]), torch.nan)
    cache = cache.to(rows[0].dtype)
    table = torch.full((len(rows), columns), 10**6, dtype=torch.int32)
    free = torch.randperm(len(cache), generator=torch.Generator().manual_seed(1)).tolist()
    for request, count, entries in zip(rows, needed, table, strict=True):
        for column in range(count):
            block = free.pop()
            part = request[column * block_size : (column + 1) * block_size]
            cache[block, : len(part)] = part
            entries[column] = block
    if rank == 3:
        return cache.flatten(2), table
    return cache.transpose(1, 2).contiguous(), table


def from_bsnd(x, layout):
    return {"BSH": lambda: x.flatten(2), "BSND": lambda: x, "BNSD": lambda: x.transpose(1, 2)}[
        layout
    ]().contiguous()


def to_bsnd(x, layout, heads):
    if layout == "BSH":
        return x.view(*x.shape[:2], heads, -1)
    return x.transpose(1, 2) if layout == "BNSD" else x


def drawn_heads(draw):
    kv_heads = draw(st.integers(1, 2))
    return kv_heads * draw(st.integers(1, 3)), kv_heads


@dataclass
class Case:
    """One drawn call, and the requests that it amounts to."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    options: dict[str, Any]
    requests: list[tuple] = field(default_factory=list)  # (q, k, v, keep, bias)
    is_decode: bool = False


@st.composite
def packed_cases(draw):
    """TND: fresh or paged, modes 0, 3 and 4."""
    dtype = draw(st.sampled_from(DTYPES))
    heads, kv_heads = drawn_heads(draw)
    dim = 64
    mode = draw(st.sampled_from([0, 3, 4]))
    rank = draw(st.sampled_from([None, 3, 4]))
    q_lengths = draw(st.lists(st.integers(0, 5), min_size=1, max_size=3))
    longest = 10 if rank is None else 260
    kv_lengths = [draw(st.integers(q if mode == 3 else 0, q + longest)) for q in q_lengths]
    if rank is not None and not any(kv_lengths):
        kv_lengths[0] += 1
    pre = draw(st.integers(-min(q_lengths), 12)) if mode == 4 else UNLIMITED
    post = draw(st.integers(max(-min(kv_lengths), -pre), 12)) if mode == 4 else UNLIMITED
    queries = [torch.randn(q, heads, dim).to(dtype) for q in q_lengths]
    keys = [torch.randn(kv, kv_heads, dim).to(dtype) for kv in kv_lengths]
    values = [torch.randn(kv, kv_heads, dim).to(dtype) for kv in kv_lengths]
    options = {
        "actual_seq_lengths": list(accumulate(q_lengths)),
        "num_heads": heads,
        "num_key_value_heads": 0 if heads == kv_heads else kv_heads,
        "scale": dim**-0.5,
        "input_layout": draw(st.sampled_from(["TND", "TND_NTD"])),
        "softmax_lse_flag": True,
    }
    if mode:
        mask = TEMPLATE.to(draw(st.sampled_from([torch.bool, torch.int8, torch.uint8])))
        shape = draw(st.sampled_from([(2048, 2048), (1, 2048, 2048), (1, 1, 2048, 2048)]))
        options |= {"sparse_mode": mode, "atten_mask": mask.view(shape)}
    if mode == 4:
        options |= {"pre_tokens": pre, "next_tokens": post}
    if rank is None:
        options["actual_seq_lengths_kv"] = list(accumulate(kv_lengths))
        key, value = torch.cat(keys), torch.cat(values)
    else:
        key, table = paged(keys, 128, rank, columns=3)
        value, _ = paged(values, 128, rank, columns=3)
        options |= {
            "actual_seq_lengths_kv": kv_lengths,
            "block_table": table,
            "block_size": 128,
        }
    case = Case(torch.cat(queries), key, value, options)
    for q, k, v in zip(queries, keys, values, strict=True):
        keep = partial(keeps, mode, q=len(q), k=len(k), pre=pre, post=post, masked=None)
        case.requests.append((q, k, v, keep, None))
    return case


@st.composite
def padded_cases(draw):
    """BSH, BSND, BNSD: fresh or paged, all modes, with masks and position biases."""
    dtype = draw(st.sampled_from(DTYPES))
    heads, kv_heads = drawn_heads(draw)
    batch, rows = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    is_decode = rows == 1
    dim, value_dim = 16, draw(st.sampled_from([16, 32]))
    layouts = ["BSH", "BSND", "BNSD", "BSH_BNSD", "BSND_BNSD"]
    layout = draw(st.sampled_from(layouts if is_decode else [*layouts, "BNSD_BSND"]))
    mode = draw(st.integers(0, 4))
    rank = draw(st.sampled_from([None, 3, 4] if layout.startswith("BNSD") else [None, 3]))
    block_size = 16 if is_decode else 128
    num_keys = draw(st.integers(1, 8)) if rank is None else 2 * block_size

    q_lengths = [draw(st.integers(0, rows)) for _ in range(batch)]
    kv_lengths = [draw(st.integers(0, num_keys)) for _ in range(batch)]
    options: dict[str, Any] = {
        "num_heads": heads,
        "num_key_value_heads": kv_heads,
        "scale": draw(st.sampled_from([0.25, 2.0])),
        "input_layout": layout,
        "sparse_mode": mode,
        "softmax_lse_flag": True,
    }
    match draw(st.sampled_from(["all", "more", "one", "none"])):
        case "all":
            options |= {"actual_seq_lengths": q_lengths, "actual_seq_lengths_kv": kv_lengths}
        case "more":
            options |= {
                "actual_seq_lengths": [*q_lengths, 0],
                "actual_seq_lengths_kv": [*kv_lengths, 0],
            }
        case "one":
            q_lengths, kv_lengths = [q_lengths[0]] * batch, [kv_lengths[0]] * batch
            options |= {
                "actual_seq_lengths": q_lengths[:1],
                "actual_seq_lengths_kv": kv_lengths[:1],
            }
        case "none":
            q_lengths, kv_lengths = [rows] * batch, [num_keys] * batch
            if rank is not None:
                options["actual_seq_lengths_kv"] = kv_lengths
    if is_decode:
        q_lengths = [1] * batch  # not read by the decode kernel
    if rank is not None and not any(kv_lengths):
        kv_lengths = [1] * batch
        options["actual_seq_lengths_kv"] = kv_lengths

    pre, post = UNLIMITED, UNLIMITED
    if draw(st.booleans()):
        pre = draw(st.integers(-min(q_lengths), 6))
        post = draw(st.integers(max(-min(kv_lengths), -pre), 6))
        options |= {"pre_tokens": pre, "next_tokens": post}
    masked = None
    if mode >= 2:
        options["atten_mask"] = TEMPLATE
    elif mode == 1 or draw(st.booleans()):
        shapes = [(rows,), (1, rows), (1, 1, rows), (batch, 1, rows)]
        if is_decode:
            shapes.append((batch,))
        shape = draw(st.sampled_from(shapes))
        mask = torch.rand(*shape, num_keys) < 0.4
        if is_decode:
            mask[..., 0] = False  # a row that is masked from end to end is garbage here
        else:
            options["inner_precise"] = draw(st.sampled_from([2, 3]))
        options["atten_mask"] = mask.to(draw(st.sampled_from([torch.bool, torch.int8])))
        masked = mask.reshape(-1, rows, num_keys).expand(batch, -1, -1).tolist()
    bias = None
    if draw(st.booleans()):
        bias = torch.randn(draw(st.sampled_from([1, batch])), heads, rows, num_keys).to(dtype)
        options["pse_shift"] = bias

    queries = [torch.randn(q, heads, dim).to(dtype) for q in q_lengths]
    keys = [torch.randn(kv, kv_heads, dim).to(dtype) for kv in kv_lengths]
    values = [torch.randn(kv, kv_heads, value_dim).to(dtype) for kv in kv_lengths]

    def padded(requests, length):
        out = torch.full((batch, length, *requests[0].shape[1:]), torch.nan).to(dtype)
        for row, request in zip(out, requests, strict=True):
            row[: len(request)] = request
        return from_bsnd(out, layout[:4].rstrip("_"))

    if rank is None:
        key, value = padded(keys, num_keys), padded(values, num_keys)
    else:
        key, table = paged(keys, block_size, rank, columns=2)
        value, _ = paged(values, block_size, rank, columns=2)
        options |= {"block_table": table, "block_size": block_size}
    case = Case(padded(queries, rows), key, value, options, is_decode=is_decode)
    for b, (q, k, v) in enumerate(zip(queries, keys, values, strict=True)):
        request_mask = None if masked is None else masked[b]
        if is_decode:  # the modes have no say
            seen_by = 0 if request_mask is None else 1
        else:
            seen_by = mode
        keep = partial(keeps, seen_by, q=len(q), k=len(k), pre=pre, post=post, masked=request_mask)
        case.requests.append((q, k, v, keep, None if bias is None else bias[b % len(bias)]))
    return case


# --------------------------------------------------------------------------- against the oracle


def through(path):
    """Send small cases through the kernel's path for large ones, in several blocks, or not."""
    if path == "at once":
        return nullcontext()
    rows: Any = {"_MIN_BLOCK_ROWS": 4, "_MAX_BLOCK_ROWS": 4}
    return patch.multiple(attention, _FEW_ROWS=0, _FEW_KEYS=0, **rows)


PATHS = pytest.mark.parametrize("path", ["at once", "in blocks"])


@PATHS
@given(case=packed_cases())
@hypothesis_settings(deadline=None, max_examples=60)
def test_packed(path, case):
    with settings.override(float32_scores=True), through(path):
        output, lse = run(fia, case.query, case.key, case.value, **case.options)
    tokens, heads, _ = case.query.shape
    assert output.dtype == case.query.dtype and lse.shape == (tokens, heads, 1)
    if case.options["input_layout"] == "TND_NTD":
        output = output.transpose(0, 1)
    start = 0
    for q, k, v, keep, _ in case.requests:
        rows = slice(start, start + len(q))
        expected = oracle(q, k, v, keep, case.options["scale"])
        assert_attention_close(output[rows], lse[rows].squeeze(-1), *expected)
        start += len(q)


@PATHS
@given(case=padded_cases())
@hypothesis_settings(deadline=None, max_examples=120)
def test_padded(path, case):
    with settings.override(float32_scores=True), through(path):
        output, lse = run(fia, case.query, case.key, case.value, **case.options)
    heads = case.options["num_heads"]
    assert output.dtype == case.query.dtype
    output = to_bsnd(output, case.options["input_layout"][-4:].lstrip("_"), heads)
    assert lse.shape == (output.shape[0], heads, output.shape[1], 1)
    lse = lse.squeeze(-1).transpose(1, 2)
    for b, (q, k, v, keep, bias) in enumerate(case.requests):
        expected, expected_lse = oracle(q, k, v, keep, case.options["scale"], bias)
        if case.is_decode:
            expected_lse = expected_lse.masked_fill(expected_lse == torch.inf, LOWEST)
        assert_attention_close(output[b, : len(q)], lse[b, : len(q)], expected, expected_lse)


def packed_call(q_lengths, kv_lengths, *, heads=4, kv_heads=2, dim=64, dtype=torch.float32):
    """A causal call over fresh keys: ((query, key, value), options)."""
    tensors = (
        torch.randn(sum(q_lengths), heads, dim).to(dtype),
        torch.randn(sum(kv_lengths), kv_heads, dim).to(dtype),
        torch.randn(sum(kv_lengths), kv_heads, dim).to(dtype),
    )
    options = {
        "atten_mask": TEMPLATE,
        "actual_seq_lengths": list(accumulate(q_lengths)),
        "actual_seq_lengths_kv": list(accumulate(kv_lengths)),
        "num_heads": heads,
        "num_key_value_heads": kv_heads,
        "scale": dim**-0.5,
        "input_layout": "TND",
        "sparse_mode": 3,
    }
    return tensors, options


def whole(query, key, value, keep, scale):
    """The oracle at once, for lengths where loops take too long; `keep` is a matrix."""
    grouped = query.float().unflatten(1, (key.shape[1], -1))
    scores = scale * torch.einsum("qngd,knd->ngqk", grouped, key.float())
    scores = scores.masked_fill(~keep, -torch.inf)
    output = torch.einsum("ngqk,knd->qngd", scores.softmax(-1), value.float())
    return output.flatten(1, 2), scores.logsumexp(-1).flatten(0, 1).t()


@pytest.mark.parametrize("dim", [64, 128])  # of the longer heads causal rows go in blocks, too
@pytest.mark.parametrize(
    "mode, pre, post", [(0, 0, 0), (3, 0, 0), (4, 40, 0), (4, 698, 0), (4, 699, 0), (4, 5, 300)]
)
def test_more_rows_than_fit_a_block(mode, pre, post, dim):
    q, kv = 600, 700
    tensors, options = packed_call([q], [kv], dim=dim)
    options |= {"sparse_mode": mode, "pre_tokens": pre, "next_tokens": post}
    if mode == 0:
        del options["atten_mask"]
    output, lse = fia(*tensors, **options, softmax_lse_flag=True)
    distance = torch.arange(kv) - torch.arange(q)[:, None] - (kv - q)
    keep = {
        0: torch.ones(q, kv, dtype=torch.bool),
        3: distance <= 0,
        4: (distance >= -pre) & (distance <= post),
    }[mode]
    expected = whole(*tensors, keep, options["scale"])
    assert_attention_close(output, lse.squeeze(-1), *expected)


def test_long_rows_of_many_heads():
    # One row alone has more scores than are held at a time.
    tensors, options = packed_call([2], [66000], heads=64, kv_heads=1)
    output, lse = fia(*tensors, **options, softmax_lse_flag=True)
    keep = torch.arange(66000) <= torch.arange(2)[:, None] + 65998
    assert_attention_close(output, lse.squeeze(-1), *whole(*tensors, keep, options["scale"]))


def test_rounded_scores_are_close():
    """The default on bfloat16, whose scores are rounded once more than on the NPU."""
    tensors, options = packed_call([64], [128], dtype=torch.bfloat16)
    exact = packed_call([64], [128])[1]
    truth, truth_lse = fia(*(x.float() for x in tensors), **exact, softmax_lse_flag=True)
    errors = {}
    for float32_scores in (True, False):
        with settings.override(float32_scores=float32_scores):
            output, lse = fia(*tensors, **options, softmax_lse_flag=True)
        errors[float32_scores] = ((output.float() - truth).norm() / truth.norm()).item()
        # Scores reach 4 here; half a step of that is 2^-7.
        assert (lse - truth_lse).abs().max() < (1e-4 if float32_scores else 2**-7)
    # Output is rounded to 2^-9 at worst, so much less on average; weights and scores add theirs.
    assert errors[True] < 2**-8
    assert errors[False] < 2**-7


@pytest.mark.parametrize("bfloat16_products", [False, True])
@pytest.mark.parametrize("cached", [0, 333])
def test_default_error_is_that_of_transformers_eager_attention(cached, bfloat16_products):
    rows = 600
    tensors, options = packed_call([rows], [cached + rows], dim=128, dtype=torch.bfloat16)
    keep = torch.ones(rows, cached + rows, dtype=torch.bool).tril(cached)
    truth, truth_lse = whole(*tensors, keep, options["scale"])
    module: Any = torch.nn.Module().eval()
    module.num_key_value_groups = 2
    query, key, value = (x.transpose(0, 1)[None] for x in tensors)
    bias = torch.zeros(keep.shape).masked_fill_(~keep, -1e30).bfloat16()
    theirs, _ = eager_attention_forward(module, query, key, value, bias, options["scale"])
    with settings.override(float32_scores=False, bfloat16_products=bfloat16_products):
        ours, lse = fia(*tensors, **options, softmax_lse_flag=True)
    error, allowed = ((x.float() - truth).norm() for x in (ours, theirs[0]))
    assert 0 < error <= 1.05 * allowed
    assert (lse.squeeze(-1) - truth_lse).abs().max() < 2**-6  # half a step of a score of 4 to 8


@pytest.mark.parametrize("rank", [3, 4])
@pytest.mark.parametrize("rows", [1, 300])
def test_pages_in_any_order(rows, rank):
    keys, heads, dim = 700, 2, 64
    query = torch.randn(rows, 4, dim)
    cache = torch.randn(9, 128, heads, dim)
    outputs = []
    for order in ([2, 3, 4, 5, 6, 7], [7, 2, 4, 3, 6, 5], [5, 6, 7, 2, 3, 4]):
        pages = torch.full_like(cache, torch.nan)
        pages[order] = cache[2:8]
        pages = pages.flatten(2) if rank == 3 else pages.transpose(1, 2).contiguous()
        outputs.append(
            fia(
                query,
                pages,
                pages,
                atten_mask=TEMPLATE,
                actual_seq_lengths=[rows],
                actual_seq_lengths_kv=[keys],
                block_table=torch.tensor([order], dtype=torch.int32),
                block_size=128,
                num_heads=4,
                num_key_value_heads=heads,
                input_layout="TND",
                sparse_mode=3,
            )[0]
        )
    assert outputs[0].isfinite().all()
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_weights_are_rounded_and_their_sum_is_not():
    weight = torch.tensor(-0.7).bfloat16().float().exp()  # beside a weight of 1
    query, key, value = (torch.zeros(n, 1, 64).bfloat16() for n in (1, 2, 2))
    query[0, 0, 0], key[1, 0, 0] = 1, -0.7
    value[:, 0, 0] = torch.stack((-weight, torch.tensor(1.0)))
    options = {"actual_seq_lengths": [1], "actual_seq_lengths_kv": [2], "input_layout": "TND"}
    output, lse = fia(query, key, value, **options, softmax_lse_flag=True)
    assert output[0, 0, 0] == 0  # the two cancel only if the weight is rounded as the value is
    torch.testing.assert_close(lse.flatten()[0], (1 + weight).log())
    output, _ = fia(query.float(), key.float(), value.float(), **options)
    assert output[0, 0, 0] != 0


def test_float32_is_never_rounded():
    tensors, options = packed_call([8], [8])
    with settings.override(float32_scores=False):
        output, _ = fia(*tensors, **options)
    with settings.override(float32_scores=True):
        assert torch.equal(output, fia(*tensors, **options)[0])


# ------------------------------------------------------------------------------- worked examples


def visible_keys(**options):
    """Which keys each row sees, read off one-hot values with uniform weights."""
    q, kv = 2, 5
    value = torch.zeros(1, kv, 1, 16)
    value[0, range(kv), 0, range(kv)] = 1
    output, _ = fia(
        torch.zeros(1, q, 1, 16), torch.zeros(1, kv, 1, 16), value, input_layout="BSND", **options
    )
    return [row.nonzero().flatten().tolist() for row in output[0, :, 0]]


def test_modes_by_hand():
    everything = list(range(5))
    assert visible_keys() == [everything, everything]
    template = {"atten_mask": TEMPLATE}
    assert visible_keys(sparse_mode=2, **template) == [[0], [0, 1]]
    assert visible_keys(sparse_mode=3, **template) == [[0, 1, 2, 3], everything]
    band = {"pre_tokens": 2, "next_tokens": 0}
    assert visible_keys(sparse_mode=4, **band, **template) == [[1, 2, 3], [2, 3, 4]]
    # pre_tokens and next_tokens are ignored without a mask, and in modes 1, 2 and 3
    assert visible_keys(sparse_mode=3, **band, **template) == [[0, 1, 2, 3], everything]
    assert visible_keys(**band) == [everything, everything]
    mask = {"atten_mask": torch.tensor([[0, 0, 1, 0, 0]] * 2, dtype=torch.int8)}
    assert visible_keys(sparse_mode=1, **band, **mask) == [[0, 1, 3, 4]] * 2
    assert visible_keys(sparse_mode=0, **band, **mask) == [[0], [0, 1]]


def test_a_chunk_over_a_longer_cache_sees_the_cache():
    """Key lengths must count the cached prefix; the query lengths in their place are wrong."""
    (query, key, value), options = packed_call([3, 2], [3, 2])
    prefix = [4, 6]
    keys = [torch.randn(n + m, 2, 64) for n, m in zip(prefix, [3, 2], strict=True)]
    values = [torch.randn_like(k) for k in keys]
    cache, table = paged(keys, 128, 3, columns=1)
    value_cache, _ = paged(values, 128, 3, columns=1)
    options |= {"block_table": table, "block_size": 128}
    options["actual_seq_lengths_kv"] = [7, 8]
    output, _ = fia(query, cache, value_cache, **options)
    for rows, k, v in zip((query[:3], query[3:]), keys, values, strict=True):
        keep = torch.arange(len(k)) <= torch.arange(len(rows))[:, None] + len(k) - len(rows)
        expected, _ = whole(rows, k, v, keep, options["scale"])
        start = 0 if len(rows) == 3 else 3
        torch.testing.assert_close(
            output[start : start + len(rows)], expected, rtol=1e-5, atol=1e-5
        )
    options["actual_seq_lengths_kv"] = [3, 2]
    assert (fia(query, cache, value_cache, **options)[0] - output).abs().max() > 0.1


def test_packed_without_mask_stays_within_requests():
    (query, key, value), options = packed_call([2, 3], [4, 5])
    del options["atten_mask"], options["sparse_mode"]
    output, _ = fia(query, key, value, **options)
    for rows, keys in ((slice(0, 2), slice(0, 4)), (slice(2, 5), slice(4, 9))):
        keep = torch.ones(rows.stop - rows.start, keys.stop - keys.start, dtype=torch.bool)
        expected, _ = whole(query[rows], key[keys], value[keys], keep, options["scale"])
        torch.testing.assert_close(output[rows], expected, rtol=1e-5, atol=1e-5)
    # Without scores the result is the mean over the request, no other keys.
    uniform, _ = fia(torch.zeros_like(query), key, value, **options)
    expected = value[:4].mean(0).repeat_interleave(2, dim=0)
    torch.testing.assert_close(uniform[0], expected, rtol=1e-5, atol=1e-5)


def test_default_scale_is_one():
    tensors, options = packed_call([4], [4])
    del options["scale"]
    output, _ = fia(*tensors, **options)
    assert torch.equal(output, fia(*tensors, **options, scale=1.0)[0])
    assert not torch.equal(output, fia(*tensors, **options, scale=0.125)[0])


def test_requests_may_share_pages():
    (query, key, value), options = packed_call([2, 1], [5, 5])
    cache, table = paged([key[:5]], 128, 3, columns=1)
    value_cache, _ = paged([value[:5]], 128, 3, columns=1)
    options |= {"block_table": table.expand(2, 1).contiguous(), "block_size": 128}
    options["actual_seq_lengths_kv"] = [5, 5]
    output, _ = fia(query, cache, value_cache, **options)
    expected, _ = whole(
        query[2:], key[:5], value[:5], torch.ones(1, 5, dtype=torch.bool), options["scale"]
    )
    torch.testing.assert_close(output[2:], expected, rtol=1e-5, atol=1e-5)


def test_a_4d_cache_has_heads_before_rows():
    """(blocks, Nkv, block_size, D); where the two sizes agree, nothing but the result can tell."""
    heads = 128
    key = torch.randn(3, heads, 64)
    (query, _, _), options = packed_call([1], [3], heads=heads, kv_heads=heads)
    options["actual_seq_lengths_kv"] = [3]
    rows_first = torch.zeros(1, 128, heads, 64)
    rows_first[0, :3] = key
    options |= {"block_table": torch.zeros(1, 1, dtype=torch.int32), "block_size": 128}
    flat = rows_first.flatten(2)
    expected, _ = fia(query, flat, flat, **options)
    heads_first = rows_first.transpose(1, 2).contiguous()
    output, _ = fia(query, heads_first, heads_first, **options)
    torch.testing.assert_close(output, expected)
    misread, _ = fia(query, rows_first, rows_first, **options)
    assert (misread - expected).abs().max() > 0.1


# -------------------------------------------------------------------------------- degenerate rows


def test_no_lse_unless_asked():
    tensors, options = packed_call([2], [2])
    lse = run(fia, *tensors, **options)[1]
    assert lse.shape == (0,) and lse.dtype == torch.float32


def test_packed_request_without_keys():
    tensors, options = packed_call([2, 1], [0, 3])
    del options["atten_mask"], options["sparse_mode"]
    output, lse = fia(*tensors, **options, softmax_lse_flag=True)
    assert not output[:2].any() and output[2].any()
    assert (lse[:2] == torch.inf).all() and lse[2].isfinite().all()


@pytest.mark.parametrize("rows, sentinel", [(1, LOWEST), (2, torch.inf)])
def test_padded_request_without_keys(rows, sentinel):
    query, key = torch.randn(2, rows, 2, 16), torch.randn(2, 3, 2, 16)
    output, lse = fia(
        query,
        key,
        key,
        actual_seq_lengths_kv=[0, 3],
        num_heads=2,
        input_layout="BSND",
        softmax_lse_flag=True,
    )
    assert not output[0].any() and (lse[0] == sentinel).all()
    assert lse[1].isfinite().all()


def test_rows_before_the_first_key():
    query, key = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 1, 16)
    output, lse = fia(
        query,
        key,
        key,
        input_layout="BSND",
        sparse_mode=3,
        atten_mask=TEMPLATE,
        softmax_lse_flag=True,
    )
    assert not output[0, :2].any() and (lse[0, 0, :2] == torch.inf).all()
    assert output[0, 2:].all() and lse[0, 0, 2:].isfinite().all()


def test_rows_masked_from_end_to_end():
    query, key = torch.randn(1, 2, 1, 16), torch.randn(1, 3, 1, 16)
    mask = torch.tensor([[True, True, True], [False, True, True]])
    options = {"input_layout": "BSND", "atten_mask": mask, "softmax_lse_flag": True}
    output, lse = fia(query, key, key, **options)
    torch.testing.assert_close(output[0, 0], key[0].mean(0))
    assert lse[0, 0, 0] == LOWEST
    output, lse = fia(query, key, key, inner_precise=2, **options)
    assert not output[0, 0].any() and lse[0, 0, 0] == torch.inf
    torch.testing.assert_close(output[0, 1], key[0, 0])


def test_zeroing_masked_rows_leaves_rows_with_keys():
    """Causal, of more rows than a block has: every row sees a key."""
    query, key = torch.randn(1, 600, 4, 64), torch.randn(1, 600, 2, 64)
    options = {"num_heads": 4, "num_key_value_heads": 2, "input_layout": "BSND", "scale": 0.125}
    options |= {"atten_mask": TEMPLATE, "sparse_mode": 3}
    output, _ = fia(query, key, key, **options, inner_precise=2)
    assert torch.equal(output, fia(query, key, key, **options)[0])


def test_no_query_returns_at_once():
    query, key = torch.empty(0, 4, 64), torch.randn(3, 2, 64)
    options = {"num_heads": 4, "num_key_value_heads": 2, "input_layout": "TND"}
    output, lse = run(fia, query, key, key, softmax_lse_flag=True, **options)
    assert output.shape == (0, 4, 64) and lse.shape == (0, 4, 1)


def test_no_keys_at_all():
    key = torch.empty(1, 0, 2, 16)
    output, _ = run(fia, torch.randn(1, 3, 2, 16), key, key, num_heads=2, input_layout="BSND")
    assert not output.any() and output.shape == (1, 3, 2, 16)


# ----------------------------------------------------------------------------------------- checks


def packed_arguments():
    """A paged TND call that is accepted: two requests of 2 and 1 rows over 130 and 3 keys."""
    return {
        "query": torch.zeros(3, 4, 64),
        "key": torch.zeros(6, 128, 128),
        "value": torch.zeros(6, 128, 128),
        "atten_mask": TEMPLATE,
        "actual_seq_lengths": [2, 3],
        "actual_seq_lengths_kv": [130, 3],
        "block_table": torch.zeros(2, 2, dtype=torch.int32),
        "block_size": 128,
        "num_heads": 4,
        "num_key_value_heads": 2,
        "scale": 0.125,
        "input_layout": "TND",
        "sparse_mode": 3,
    }


def fresh_arguments():
    """The same without pages."""
    arguments = packed_arguments()
    del arguments["block_table"], arguments["block_size"]
    return arguments | {
        "key": torch.zeros(7, 2, 64),
        "value": torch.zeros(7, 2, 64),
        "actual_seq_lengths_kv": [4, 7],
    }


def padded_arguments():
    """A BSND call that is accepted: two requests of 3 rows and 5 keys."""
    return {
        "query": torch.zeros(2, 3, 4, 16),
        "key": torch.zeros(2, 5, 2, 16),
        "value": torch.zeros(2, 5, 2, 16),
        "num_heads": 4,
        "num_key_value_heads": 2,
        "input_layout": "BSND",
    }


def decode_arguments():
    """A paged BSND call of one row a request that is accepted."""
    return {
        "query": torch.zeros(2, 1, 4, 16),
        "key": torch.zeros(4, 16, 32),
        "value": torch.zeros(4, 16, 32),
        "actual_seq_lengths_kv": [20, 3],
        "block_table": torch.zeros(2, 2, dtype=torch.int32),
        "block_size": 16,
        "num_heads": 4,
        "num_key_value_heads": 2,
        "input_layout": "BSND",
    }


def with_device(arguments, device):
    return {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    "arguments", [packed_arguments, fresh_arguments, padded_arguments, decode_arguments]
)
def test_accepted(arguments, device):
    output, _ = fia(**with_device(arguments(), device))
    assert output.shape == arguments()["query"].shape


MASK = torch.zeros(3, 5, dtype=torch.bool)


def caches(*shape):
    return {"key": torch.zeros(shape), "value": torch.zeros(shape)}


def zero_heads(dim, value_dim):
    return {
        "query": torch.zeros(3, 4, dim),
        "key": torch.zeros(7, 2, dim),
        "value": torch.zeros(7, 2, value_dim),
    }


# What the message speaks of, and the arguments that make it
BAD = {
    packed_arguments: [
        ("query must be bfloat16", {"query": torch.zeros(3, 4, 64).half()}),
        ("key is torch.float32", {"query": torch.zeros(3, 4, 64).bfloat16()}),
        ("query must be contiguous", {"query": torch.zeros(4, 3, 64).transpose(0, 1)}),
        ("key must be contiguous", {"key": torch.zeros(128, 6, 128).transpose(0, 1)}),
        ("value must be contiguous", {"value": torch.zeros(128, 6, 128).transpose(0, 1)}),
        ("layout TND", {"query": torch.zeros(3, 256)}),
        ("4 heads", {"query": torch.zeros(3, 5, 64)}),
        ("must be positive", {"num_heads": 0}),
        ("must be a multiple", {"num_key_value_heads": 3}),
        ("must be a multiple", {"num_key_value_heads": -1}),
        ("exceeds 256", {"num_heads": 512, "num_key_value_heads": 16}),
        ("at most 64 times", {"num_heads": 130}),
        ("SBH", {"input_layout": "SBH"}),
        ("'NTD'", {"input_layout": "NTD"}),
        ("NTD_TND", {"input_layout": "NTD_TND"}),
        ("BSND_NBSD", {"input_layout": "BSND_NBSD"}),
        # length lists
        ("needs actual_seq_lengths", {"actual_seq_lengths": None}),
        ("needs actual_seq_lengths", {"actual_seq_lengths_kv": None}),
        ("1 actual_seq_lengths but 2", {"actual_seq_lengths": [3]}),
        ("must equal the 3 tokens", {"actual_seq_lengths": [2, 2]}),
        ("must equal the 3 tokens", {"actual_seq_lengths": [2, 4]}),
        ("cumulative", {"actual_seq_lengths": [4, 3]}),
        ("cumulative", {"actual_seq_lengths": [-1, 3]}),
        ("not 0", {"actual_seq_lengths": [], "actual_seq_lengths_kv": []}),
        ("between 0 and 256", {"actual_seq_lengths_kv": [130, -1]}),
        ("between 0 and 256", {"actual_seq_lengths_kv": [257, 3]}),
        ("a key for every row", {"actual_seq_lengths_kv": [1, 3]}),
        (
            "at least one request",
            {"actual_seq_lengths_kv": [0, 0], "sparse_mode": 0, "atten_mask": None},
        ),
        (
            "4096 requests",
            {"actual_seq_lengths": [3] * 4097, "actual_seq_lengths_kv": [3] * 4097},
        ),
        (
            "1048577 tokens",
            {
                "query": torch.empty(1048577, 1, 64),
                **caches(6, 128, 64),
                "num_heads": 1,
                "num_key_value_heads": 1,
            },
        ),
        # pages
        ("block_table", {"block_table": torch.zeros(2, 2, dtype=torch.int64)}),
        ("3 rows for 2", {"block_table": torch.zeros(3, 2, dtype=torch.int32)}),
        ("2 dimensions", {"block_table": torch.zeros(4, dtype=torch.int32)}),
        ("multiple of 128", {"block_size": 0}),
        ("multiple of 128", {"block_size": 64, **caches(12, 64, 128)}),
        ("up to 512", {"block_size": 640, **caches(3, 640, 128)}),
        ("key cache", {"block_size": 256}),
        ("3 blocks", caches(2, 128, 128)),
        ("value cache", {"value": torch.zeros(5, 128, 128)}),
        ("width 129", {"key": torch.zeros(6, 128, 129)}),
        ("head dim 32", {"key": torch.zeros(6, 128, 64)}),
        ("equally many dimensions", {"value": torch.zeros(6, 2, 128, 64)}),
        ("blocks, heads, block_size", caches(6, 128, 2, 64)),
        ("NZ", caches(6, 2, 8, 128, 16)),
        ("3 or 4 dimensions", caches(6, 128)),
        # masks
        ("needs atten_mask", {"atten_mask": None}),
        ("torch.float32", {"atten_mask": TEMPLATE.float()}),
        ("mask template", {"atten_mask": TEMPLATE[:1024, :1024]}),
        ("mask template", {"atten_mask": TEMPLATE.expand(2, 2048, 2048)}),
        ("no atten_mask", {"sparse_mode": 0}),
        ("0, 3 or 4", {"sparse_mode": 1}),
        ("0, 3 or 4", {"sparse_mode": 2}),
        ("0 to 4", {"sparse_mode": 5}),
        ("0 to 4", {"sparse_mode": 8}),
        ("0 to 4", {"sparse_mode": -1}),
        ("< 0", {"sparse_mode": 4, "pre_tokens": 1, "next_tokens": -2}),
        ("pre_tokens=-2", {"sparse_mode": 4, "pre_tokens": -2, "next_tokens": 5}),
        ("next_tokens=-4", {"sparse_mode": 4, "pre_tokens": 5, "next_tokens": -4}),
        ("inner_precise", {"inner_precise": 1}),
        ("no pse_shift", {"pse_shift": torch.zeros(1, 4, 3, 256)}),
        *(
            (name, {name: torch.ones(1)})
            for name in (
                "dequant_scale1",
                "quant_scale1",
                "dequant_scale2",
                "quant_scale2",
                "quant_offset2",
                "antiquant_scale",
                "antiquant_offset",
                "key_antiquant_scale",
                "key_antiquant_offset",
                "value_antiquant_scale",
                "value_antiquant_offset",
                "query_padding_size",
                "kv_padding_size",
                "key_shared_prefix",
                "value_shared_prefix",
                "query_rope",
                "key_rope",
                "key_rope_antiquant_scale",
            )
        ),
        ("actual_shared_prefix_len", {"actual_shared_prefix_len": [1]}),
    ],
    fresh_arguments: [
        ("equally many dimensions", {"key": torch.zeros(7, 128)}),
        ("do not agree", {"value": torch.zeros(6, 2, 64)}),
        ("2 heads", {"key": torch.zeros(7, 4, 64)}),
        ("head dim 128", {"key": torch.zeros(7, 2, 128)}),
        ("cumulative", {"actual_seq_lengths_kv": [4, 3]}),
        ("must equal the 7 tokens", {"actual_seq_lengths_kv": [4, 6]}),
        ("must equal the 7 tokens", {"actual_seq_lengths_kv": [4, 8]}),
        ("head dims", zero_heads(32, 32)),
        ("head dims", zero_heads(256, 256)),
        ("head dims", zero_heads(128, 64)),
        ("head dims", zero_heads(64, 128)),
        ("head dim 192", zero_heads(192, 192)),
    ],
    padded_arguments: [
        ("batch 3", caches(3, 5, 2, 16)),
        (
            "batch 65537",
            {"query": torch.zeros(65537, 2, 4, 16), **caches(65537, 1, 2, 16)},
        ),
        ("multiples of 16", {"query": torch.zeros(2, 3, 4, 8), **caches(2, 5, 2, 8)}),
        ("multiples of 16", {"value": torch.zeros(2, 5, 2, 24)}),
        ("up to 512", {"value": torch.zeros(2, 5, 2, 528)}),
        ("between 0 and 3", {"actual_seq_lengths": [4, 1]}),
        ("between 0 and 3", {"actual_seq_lengths": [-1, 1]}),
        ("0 entries", {"actual_seq_lengths": []}),
        ("between 0 and 5", {"actual_seq_lengths_kv": [6, 1]}),
        ("inner_precise", {"inner_precise": 4}),
        ("needs atten_mask", {"sparse_mode": 1}),
        ("does not fit", {"atten_mask": MASK[:2]}),
        ("does not fit", {"atten_mask": MASK[:, :4]}),
        ("does not fit", {"atten_mask": torch.zeros(3, 6, dtype=torch.bool)}),
        ("does not fit", {"atten_mask": torch.zeros(2, 3, 5, dtype=torch.bool)}),
        ("does not fit", {"atten_mask": torch.zeros(2, 4, 3, 5, dtype=torch.bool)}),
        ("torch.int32", {"atten_mask": MASK.int()}),
        ("mask template", {"atten_mask": MASK, "sparse_mode": 3}),
        ("pse_shift", {"pse_shift": torch.zeros(3, 4, 3, 5)}),
        ("pse_shift", {"pse_shift": torch.zeros(1, 4, 3, 4)}),
        ("pse_shift", {"pse_shift": torch.zeros(1, 4, 3, 5).bfloat16()}),
    ],
    decode_arguments: [
        ("needs actual_seq_lengths_kv", {"actual_seq_lengths_kv": None}),
        ("2 entries", {"query": torch.zeros(3, 1, 4, 16)}),
        ("at least one request", {"actual_seq_lengths_kv": [0, 0]}),
        ("between 0 and 32", {"actual_seq_lengths_kv": [33, 3]}),
        ("multiple of 16", {"block_size": 24, **caches(4, 24, 32)}),
        ("up to 512", {"block_size": 528, **caches(4, 528, 32)}),
        ("4-D cache", caches(4, 2, 16, 16)),
        ("multiple of 128", {"query": torch.zeros(2, 3, 4, 16)}),
        ("inner_precise", {"inner_precise": 2}),
        ("does not fit", {"atten_mask": torch.zeros(2, 31, dtype=torch.bool)}),
        ("at most 65535", caches(4, 16, 65536)),
        (
            "BNSD_BSND",
            {"query": torch.zeros(2, 4, 1, 16), "input_layout": "BNSD_BSND"},
        ),
    ],
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    "arguments, reason, changes",
    [
        pytest.param(arguments, *case, id=f"{arguments.__name__}-{number}-{'-'.join(case[1])}")
        for arguments, cases in BAD.items()
        for number, case in enumerate(cases)
    ],
)
def test_refused(arguments, reason, changes, device):
    errors = (TypeError, ValueError, NotImplementedError)
    with pytest.raises(errors, match=re.escape(reason)):
        fia(**with_device(arguments() | changes, device))


@pytest.mark.parametrize(
    "wrong",
    [
        TEMPLATE.logical_not(),
        torch.ones(2048, 2048, dtype=torch.bool).tril(),
        torch.ones(2048, 2048, dtype=torch.bool).tril(-1),
        torch.ones(2048, 2048, dtype=torch.bool).triu(),
        torch.ones(2048, 2048, dtype=torch.bool).triu(2),
        torch.zeros(2048, 2048, dtype=torch.bool),
        torch.ones(2048, 2048, dtype=torch.bool),
        TEMPLATE | TEMPLATE.roll(4, 0).t(),
        TEMPLATE.to(torch.int8) * 2,
    ],
)
def test_wrong_templates_are_refused(wrong):
    with pytest.raises(ValueError):
        fia(**packed_arguments() | {"atten_mask": wrong})


def test_blocks_out_of_range_are_refused():
    arguments = packed_arguments()
    arguments["block_table"][0, 1] = 6
    with pytest.raises((IndexError, RuntimeError)):
        fia(**arguments)
