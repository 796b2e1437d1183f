"""Products in the dtype that a CPU is quick at, and kernels that work in blocks of rows."""

from typing import Any

import pytest
import torch

from qwen3cp.ops import checks, settings
from qwen3cp.ops.products import linear, matmul

from .helpers import ONE_BFLOAT16_STEP, npu


@pytest.mark.parametrize("bfloat16_products", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [0, 1, 31, 32, 1300])
@pytest.mark.parametrize("has_bias", [False, True])
def test_products_are_rounded_once(rows, dtype, bfloat16_products, has_bias):
    layer = torch.nn.Linear(70, 50, bias=has_bias, dtype=dtype)
    x = torch.randn(rows, 70).to(dtype)
    truth = x.double() @ layer.weight.double().t()
    out = x.new_empty(rows, 50)
    tolerance: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
    if dtype == torch.bfloat16:  # half a step of rounding, and float32 sums near a tie
        tolerance = {"rtol": ONE_BFLOAT16_STEP / 2 * 1.01, "atol": 1e-5}
    with torch.no_grad(), settings.override(bfloat16_products=bfloat16_products):
        matmul(x, layer.weight.t(), out=out)
        torch.testing.assert_close(out.double(), truth, **tolerance)
        torch.testing.assert_close(linear(x, layer, bias=False).double(), truth, **tolerance)
        if has_bias:
            truth = truth + layer.bias.double()
        matmul(x, layer.weight.t(), out=out, bias=layer.bias)
        torch.testing.assert_close(out.double(), truth, **tolerance)
        result = linear(x, layer)
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), truth, **tolerance)


def cases():
    x, y = torch.randn(37, 3, 24).bfloat16(), torch.randn(37, 3, 24).bfloat16()
    gamma, deep = torch.randn(24).bfloat16(), torch.randn(3, 24).bfloat16()
    cos, one = torch.randn(1, 37, 1, 24).bfloat16(), torch.randn(1, 1, 37, 24).bfloat16()
    index = torch.randperm(37 * 3).int()
    return {
        "rms_norm": lambda: npu.npu_rms_norm(x, gamma),
        "rms_norm over two": lambda: npu.npu_rms_norm(x, deep),
        "rms_norm over all": lambda: npu.npu_rms_norm(x, x),
        "add_rms_norm": lambda: npu.npu_add_rms_norm(x, y, gamma),
        "rotary": lambda: npu.npu_rotary_mul(x[None], cos, cos),
        "rotary of few tokens": lambda: npu.npu_rotary_mul(
            x[:, :, None], one[:, :, :1], cos[:, :1]
        ),
        "rotary interleaved": lambda: npu.npu_rotary_mul(
            x[None].transpose(1, 2).contiguous(), one, one, "interleave"
        ),
        "swiglu": lambda: npu.npu_swiglu(x),
        "swiglu of rows": lambda: npu.npu_swiglu(x[1:], 0),
        "unpermute": lambda: npu.npu_moe_token_unpermute(x.view(-1, 24), index, x[:, :, 0].float()),
    }


@pytest.mark.parametrize("name", cases())
def test_blocks_of_rows_change_nothing(name, monkeypatch):
    op = cases()[name]
    expected = op()
    monkeypatch.setattr(checks, "_BLOCK_ELEMENTS", 5 * 3 * 24)
    result = op()
    if isinstance(expected, torch.Tensor):
        expected, result = (expected,), (result,)
    for a, b in zip(result, expected, strict=True):
        assert torch.equal(a, b) and a.isfinite().all()
