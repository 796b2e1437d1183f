import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from .helpers import assert_close, npu, run


def oracle(x, smooth):
    """One row at a time: q = rint(v * (127 / amax)), scale = 1 / (127 / amax), in float32."""
    rows = x.float().reshape(-1, x.shape[-1])
    quantised, scales = [], []
    for row in rows:
        if smooth is not None:
            row = row * smooth.float()
        amax = row.abs().max()
        if amax == 0:
            quantised.append([0] * len(row))
            scales.append(0.0)
            continue
        factor = torch.tensor(127.0) / amax
        quantised.append([round(value) for value in (row * factor).tolist()])
        scales.append((1 / factor).item())
    return torch.tensor(quantised).view(x.shape), torch.tensor(scales).view(x.shape[:-1])


@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=2),
    st.integers(1, 9),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.booleans(),
)
@settings(deadline=None, max_examples=40)
def test_dynamic_quant(leading, width, dtype, smoothed):
    x = torch.randn(*leading, width).to(dtype)
    x.view(-1, width)[0] *= 0  # a row of zeros
    smooth = torch.rand(width).to(dtype) if smoothed else None
    quantised, scale = run(npu.npu_dynamic_quant, x, smooth_scales=smooth)
    expected, expected_scale = oracle(x, smooth)
    assert quantised.dtype == torch.int8 and torch.equal(quantised.long(), expected)
    assert_close(scale, expected_scale)


def test_worked_example():
    x = torch.tensor([[1.0, -2.0, 0.5]])
    quantised, scale = run(npu.npu_dynamic_quant, x)
    assert quantised.tolist() == [[64, -127, 32]]
    assert scale.item() == pytest.approx(2 / 127)


def test_ties_go_to_even():
    # A factor of 1, so values are their own quotients.
    x = torch.tensor([[127.0, 62.5, 63.5, -62.5]])
    assert npu.npu_dynamic_quant(x)[0].tolist() == [[127, 62, 64, -62]]


def test_zeros():
    quantised, scale = npu.npu_dynamic_quant(torch.zeros(2, 4))
    assert not quantised.any() and scale.tolist() == [0, 0]


def test_round_trip_error():
    x = torch.randn(50, 64)
    quantised, scale = npu.npu_dynamic_quant(x)
    error = (quantised * scale[:, None] - x).abs()
    assert (error <= scale[:, None] * (0.5 + 1e-4)).all()


@pytest.mark.parametrize("dst_type", [None, torch.int8, 1])
def test_dst_type(dst_type):
    assert run(npu.npu_dynamic_quant, torch.ones(1, 4), dst_type=dst_type)[0].dtype == torch.int8


def test_strided_input_gives_contiguous_output():
    x = torch.randn(3, 4, 5).transpose(0, 1)
    quantised, scale = run(npu.npu_dynamic_quant, x)
    assert torch.equal(quantised, npu.npu_dynamic_quant(x.contiguous())[0])


def test_no_rows():
    quantised, scale = run(npu.npu_dynamic_quant, torch.empty(0, 4))
    assert quantised.shape == (0, 4) and scale.shape == (0,)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    "changes",
    [
        {"input": torch.ones(2, 4).half()},
        {"input": torch.ones(4)},
        {"smooth_scales": torch.ones(3)},
        {"smooth_scales": torch.ones(4).bfloat16()},
        {"group_index": torch.ones(2, dtype=torch.int32)},
        {"dst_type": torch.int32},
        {"dst_type": torch.quint4x2},
        {"quant_mode": "pertensor"},
        {"dst_type_max": 15.0},
    ],
)
def test_refused(changes, device):
    arguments = {"input": torch.ones(2, 4)} | changes
    arguments = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }
    with pytest.raises((TypeError, ValueError, NotImplementedError)):
        npu.npu_dynamic_quant(**arguments)


def test_scale_is_the_reciprocal_of_the_rounded_factor():
    x = torch.rand(1000, 1) + 0.1
    _, scale = npu.npu_dynamic_quant(x)
    expected = [torch.tensor(127.0).div(value).reciprocal().item() for value in x.flatten()]
    assert scale.tolist() == expected
    assert not torch.equal(scale, x.flatten() / 127)
