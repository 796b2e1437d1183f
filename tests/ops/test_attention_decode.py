"""Decode steps of many rows, which share pages, against each row for itself."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from qwen3cp.ops import attention_decode

from .helpers import ONE_BFLOAT16_STEP, run
from .helpers import npu as npu_ops

BLOCK, HEADS, KV_HEADS, DIM, PAGES = 128, 4, 2, 64, 60
TEMPLATE = torch.ones(2048, 2048, dtype=torch.bool).triu(1)


@st.composite
def trees(draw):
    """Lengths and pages of rows of which some begin as the one before, pages in any order."""
    pages = draw(st.permutations(range(PAGES)) if draw(st.booleans()) else st.just(range(PAGES)))
    free = list(pages)
    lengths: list[int] = []
    tables: list[list[int]] = []
    for _ in range(draw(st.integers(1, 9))):
        table: list[int] = []
        if tables and draw(st.integers(0, 3)):
            table = tables[-1][: draw(st.integers(0, lengths[-1] // BLOCK))]
        own = draw(st.integers(0 if table else 1, 3))
        length = len(table) * BLOCK + (
            draw(st.integers((own - 1) * BLOCK + 1, own * BLOCK)) if own else 0
        )
        lengths.append(length)
        tables.append(table + [free.pop() for _ in range(own)])
    return lengths, tables


def call(query, key, value, tables, lengths, layout="TND"):
    table = torch.full((len(tables), max(map(len, tables)) + 1), 10**6, dtype=torch.int32)
    for row, blocks in zip(table, tables, strict=True):
        row[: len(blocks)] = torch.tensor(blocks)
    packed = layout == "TND"
    return run(
        npu_ops.npu_fused_infer_attention_score,
        query if packed else query.view(len(query), HEADS, 1, DIM),
        key,
        value,
        atten_mask=TEMPLATE if packed else None,
        sparse_mode=3 if packed else 0,
        actual_seq_lengths=list(range(1, len(query) + 1)) if packed else None,
        actual_seq_lengths_kv=lengths,
        block_table=table,
        block_size=BLOCK,
        num_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        input_layout=layout,
        scale=0.125,
        softmax_lse_flag=True,
    )


def inputs(lengths, tables, dtype, seed):
    """Query, and caches with NaN wherever no row has a key."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(len(lengths), HEADS, DIM, generator=generator).to(dtype)
    caches = torch.full((2, 2 * PAGES, BLOCK, KV_HEADS * DIM), torch.nan, dtype=dtype)
    for length, table in zip(lengths, tables, strict=True):
        for i, page in enumerate(table):
            filled = caches[:, page, : min(BLOCK, length - i * BLOCK)]
            if filled.isnan().any():
                filled.copy_(torch.randn(filled.shape, generator=generator))
    return query, *caches


@hypothesis_settings(max_examples=80, deadline=None)
@given(
    tree=trees(),
    saved=st.sampled_from([BLOCK, 3 * BLOCK, 1024]),
    short=st.sampled_from([0, BLOCK, 1024]),
    stack=st.sampled_from([1 << 14, 1 << 17, 1 << 21]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    layout=st.sampled_from(["TND", "BNSD"]),
    seed=st.integers(0, 9),
)
def test_each_row_sees_its_own_keys(tree, saved, short, stack, dtype, layout, seed):
    lengths, tables = tree
    query, key, value = inputs(lengths, tables, dtype, seed)
    limits = {"_SAVED_KEYS": saved, "_SHORT_ROW": short, "_STACK_BYTES": stack}
    with patch.multiple(attention_decode, **limits):
        output, lse = call(query, key, value, tables, lengths, layout)
    output, lse = output.view(len(lengths), HEADS, DIM), lse.view(len(lengths), HEADS)
    for i, (length, table) in enumerate(zip(lengths, tables, strict=True)):
        k, v = (x[table].flatten(0, 1)[:length].double() for x in (key, value))
        k, v = (x.view(length, KV_HEADS, DIM).repeat_interleave(2, 1) for x in (k, v))
        scores = torch.einsum("hd,khd->hk", query[i].double(), k) / 8
        expected = torch.einsum("hk,khd->hd", scores.softmax(-1), v)
        # bfloat16: weights are rounded, and so are the parts of a row before they are merged
        tolerance = 1e-5 if dtype == torch.float32 else 1.5 * ONE_BFLOAT16_STEP
        assert (output[i] - expected).norm() <= tolerance * expected.norm()
        torch.testing.assert_close(lse[i].double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-4)


class Copied(TorchDispatchMode):
    """Keys and values that are copied together, and calls of the product."""

    def __init__(self):
        super().__init__()
        self.rows, self.products = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket == torch.ops.aten.index_select:
            self.rows += args[2].numel()
        if "flash_attention" in str(func):
            self.products += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "lengths, tables, rows, products",
    [
        # pages that follow each other are read where they are
        ([700], [[3, 4, 5, 6, 7, 8]], 0, 1),
        ([700, 650], [[3, 4, 5, 6, 7, 8], [20, 21, 22, 23, 24, 25]], 0, 2),
        ([700], [[3, 4, 5, 6, 8, 7]], 2 * 700, 1),
        # short rows are one product
        ([100] * 8, [[i] for i in range(8)], 2 * 8 * 100, 1),
        # eight pages for all of eight rows, and one page of each
        ([1100] * 8, [[*range(8), 10 + i] for i in range(8)], 2 * 8 * 76, 2),
        # two rows share too little
        ([200, 200], [[5, 6], [5, 7]], 2 * 2 * 200, 1),
    ],
)
def test_what_is_copied(lengths, tables, rows, products):
    query, key, value = inputs(lengths, tables, torch.float32, 0)
    calls = Copied()
    with calls:
        attention_decode.attend_rows(
            query,
            key,
            value,
            tables,
            lengths,
            0.125,
            torch.empty_like(query),
            query[..., 0].clone(),
        )
    assert (calls.rows, calls.products) == (rows, products)
