"""What documents and sources of the operators leave open, asked of the device.

The first half is what the code relies on: it has to hold. The second half are questions whose
answers only go into the report; they may be refused, but the device has to work afterwards.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

pytestmark = pytest.mark.npu

npu = torch.ops.npu
BF16 = torch.bfloat16
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def normal(*shape: int, device: torch.device, dtype: torch.dtype = BF16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator).to(device, dtype)


def attention(device: torch.device, **changes: Any) -> Any:
    """A call as the model makes it: 5 tokens of one sequence that has 130, head_dim 128."""
    dtype = changes.pop("dtype", BF16)
    page = changes.pop("block_size", 128)
    arguments: dict[str, Any] = dict(
        atten_mask=torch.ones(2048, 2048, dtype=torch.bool, device=device).triu_(1),
        actual_seq_lengths=[5],
        actual_seq_lengths_kv=[130],
        block_table=torch.arange(1, 1 + -(-130 // page), dtype=torch.int32, device=device)[None],
        num_heads=4,
        num_key_value_heads=2,
        scale=128**-0.5,
        input_layout="TND",
        sparse_mode=3,
        block_size=page,
    )
    pages = 2 + -(-130 // page)
    key, value = (normal(pages, page, 256, device=device, dtype=dtype) for _ in range(2))
    query = normal(5, 4, 128, device=device, dtype=dtype)
    return npu.npu_fused_infer_attention_score(query, key, value, **{**arguments, **changes})


# ------------------------------------------------------------------- what the code relies on


def test_zero_rows_quantise_to_zeros(machine):
    rows = torch.zeros(4, 128, dtype=BF16, device=machine.device)
    values, scales = npu.npu_dynamic_quant(rows)
    assert not values.cpu().any()
    assert scales.cpu().isfinite().all()


def test_amax_passes_nan_on(machine):
    rows = normal(4, 128, device=machine.device)
    rows[2, 5] = float("nan")
    assert rows.abs().amax(-1).isnan().cpu().tolist() == [False, False, True, False]


def test_a_product_is_written_into_a_view(machine):
    x, weight = normal(64, 128, device=machine.device), normal(256, 128, device=machine.device)
    out = torch.zeros(2, 70, 256, dtype=BF16, device=machine.device)
    view = out[1, :64]
    torch.mm(x, weight.t(), out=view)
    assert view.data_ptr() == out[1].data_ptr()
    torch.testing.assert_close(out[1, :64], F.linear(x, weight))
    assert not out[0].cpu().any() and not out[1, 64:].cpu().any()


def test_float32_scales_are_views_of_bytes(machine):
    scales = torch.rand(6, device=machine.device)
    sent = torch.empty(40, dtype=torch.int8, device=machine.device)
    sent[:24].view(torch.float32).copy_(scales)
    assert torch.equal(sent.clone()[:24].view(torch.float32).cpu(), scales.cpu())


def test_grouped_product_with_fewer_rows_than_its_buffer(machine):
    x = normal(32, 64, device=machine.device)
    weight = normal(2, 128, 64, device=machine.device).transpose(1, 2)
    groups = torch.tensor([5, 8], device=machine.device)
    (found,) = npu.npu_grouped_matmul(
        [x], [weight], group_list=groups, split_item=3, group_type=0, group_list_type=1
    )
    expected = torch.cat([x[:5] @ weight[0], x[5:13] @ weight[1]])
    torch.testing.assert_close(found[:13], expected, rtol=2e-2, atol=2e-2)


def test_weights_of_float32_unpermute_rows_of_bfloat16(machine):
    rows = normal(6, 64, device=machine.device)
    index = torch.tensor([3, 0, 1, 5, 2, 4], dtype=torch.int32, device=machine.device)
    weights = torch.rand(3, 2, device=machine.device)
    found = npu.npu_moe_token_unpermute(rows, index, weights)
    expected = (rows[index.long()].float().view(3, 2, 64) * weights[..., None]).sum(1)
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("width", [32, 48, 68, 2052])
def test_rows_of_bytes_are_routed(machine, width):
    """The exchange sorts rows with their scales as bytes, of widths that are no multiple of 32."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(-128, 128, (5, width), generator=generator, dtype=torch.int8)
    experts = torch.tensor([[1], [0], [2], [0], [1]], dtype=torch.int32)
    found, index, counts, _ = npu.npu_moe_init_routing_v2(
        rows.to(machine.device),
        experts.to(machine.device),
        active_num=5,
        expert_num=3,
        expert_tokens_num_type=1,
        expert_tokens_num_flag=True,
        active_expert_range=[0, 3],
    )
    assert counts.cpu().tolist() == [2, 2, 1]
    order = [1, 3, 0, 4, 2]
    assert torch.equal(found.cpu()[:5], rows[order])


def test_no_rows_are_no_trouble(machine):
    """A rank without rows runs norms and projections on empty tensors."""
    empty = torch.empty(0, 128, dtype=BF16, device=machine.device)
    gamma = torch.ones(128, dtype=BF16, device=machine.device)
    assert npu.npu_rms_norm(empty, gamma, 1e-6)[0].shape == (0, 128)
    assert npu.npu_add_rms_norm(empty, empty, gamma, 1e-6)[0].shape == (0, 128)
    assert F.linear(empty, normal(256, 128, device=machine.device)).shape == (0, 256)
    assert npu.npu_swiglu(empty, dim=-1).shape == (0, 64)


# ------------------------------------------------------------------------- what is only asked


def fully_masked_row(device: torch.device, inner_precise: int) -> Any:
    mask = torch.ones(1, 5, 130, dtype=torch.bool, device=device)
    out, lse = npu.npu_fused_infer_attention_score(
        normal(1, 5, 512, device=device),
        normal(1, 130, 256, device=device),
        normal(1, 130, 256, device=device),
        atten_mask=mask,
        num_heads=4,
        num_key_value_heads=2,
        scale=128**-0.5,
        input_layout="BSH",
        inner_precise=inner_precise,
        softmax_lse_flag=True,
    )
    return {"values": out.flatten()[:4].tolist(), "lse": lse.flatten()[:2].tolist()}


def negative_slot(device: torch.device) -> Any:
    cache = torch.zeros(2, 2, 128, 2, 64, dtype=BF16, device=device)
    rows = torch.ones(2, 3, 2, 64, dtype=BF16, device=device)
    slots = torch.tensor([5, -1, 7], dtype=torch.int32, device=device)
    npu.npu_scatter_pa_kv_cache(rows[0], rows[1], cache[0], cache[1], slots, cache_mode="Norm")
    return {"slots written": cache[0].flatten(0, 1).any(-1).any(-1).nonzero().flatten().tolist()}


def int32_product(device: torch.device) -> Any:
    x = torch.full((16, 64), 2, dtype=torch.int8, device=device)
    weight = torch.full((64, 32), 3, dtype=torch.int8, device=device)
    scale = torch.full((32,), 0.5, device=device)
    out = npu.npu_quant_matmul(x, weight, scale, output_dtype=torch.int32)
    return {"384 of int32 with the scale 0.5": int(out.flatten()[0])}


def ties(device: torch.device) -> Any:
    logits = torch.zeros(2, 128, device=device)
    _, experts, _ = npu.npu_moe_gating_top_k_softmax(logits, None, k=8)
    return {"experts of equal logits": experts.tolist()}


def block_quantisation(device: torch.device) -> Any:
    rows = normal(2, 128, device=device)
    _, scale = npu.npu_dynamic_block_quant(rows, row_block_size=1, col_block_size=128)
    return {"scale x amax": (scale.flatten().float() * rows.abs().amax(-1).float()).tolist()}


def float16_in_tnd(device: torch.device) -> Any:
    out = attention(device, dtype=torch.float16)[0]
    return {"finite": bool(out.isfinite().all())}


def pages_of_16(device: torch.device) -> Any:
    out = attention(device, block_size=16)[0]
    return {"finite": bool(out.isfinite().all())}


def zero_row_of_block_quantisation(device: torch.device) -> Any:
    rows = torch.zeros(2, 128, dtype=BF16, device=device)
    values, scale = npu.npu_dynamic_block_quant(rows, row_block_size=1, col_block_size=128)
    return {"values": int(values.abs().max()), "scales": scale.flatten().tolist()}


QUESTIONS: dict[str, Callable[[torch.device], Any]] = {
    "a fully masked row, inner_precise 0": functools.partial(fully_masked_row, inner_precise=0),
    "a fully masked row, inner_precise 1": functools.partial(fully_masked_row, inner_precise=1),
    "a zero row in block quantisation": zero_row_of_block_quantisation,
    "float16 in TND": float16_in_tnd,
    "pages of 16 in TND": pages_of_16,
    "a negative slot in npu_scatter_pa_kv_cache": negative_slot,
    "int32 output of npu_quant_matmul": int32_product,
    "scale of npu_dynamic_block_quant": block_quantisation,
    "order of ties in the gating": ties,
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_question(machine, question, record_property):
    try:
        answer = QUESTIONS[question](machine.device)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        answer = {"refused": str(error).splitlines()[0]}
    record_property("answer", answer)
    assert answer
    works = torch.ones(3, device=machine.device).sum()
    assert float(works) == 3, "the device does not work any more after this question"


INT8_SUM = """
    import json, os, sys
    import torch
    import torch.distributed as dist
    from qwen3cp.parallel import ParallelContext, default_device
    ctx = ParallelContext.from_world(1, 2, backend=sys.argv[1] or None)
    device = torch.device("cpu") if sys.argv[1] == "gloo" else default_device()
    x = torch.tensor([100, -100, 1], dtype=torch.int8, device=device)
    dist.all_reduce(x)
    if ctx.rank == 0:
        print(json.dumps(x.tolist()))
    dist.destroy_process_group()
"""


def test_int8_sum_over_two_devices(machine, tmp_path, record_property):
    """Whether the sum of int8 over hccl wraps around, or saturates. The code never uses it."""
    if machine.num_devices < 2:
        pytest.skip(f"2 NPUs are needed, and this machine has {machine.num_devices}")
    script = tmp_path / "sum.py"
    script.write_text(textwrap.dedent(INT8_SUM))
    backend = "gloo" if machine.device.type == "cpu" else ""
    done = subprocess.run(
        [*TORCHRUN, "--standalone", "--nproc-per-node", "2", script, backend],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    record_property("100 + 100, -100 - 100, 1 + 1", done.stdout.strip())
    assert done.stdout.strip().endswith(", 2]")
