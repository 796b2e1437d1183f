import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from .helpers import assert_close, npu, run

HALF = {
    "BNSD": ("11SD", "B1SD", "BNSD"),
    "BSND": ("1S1D", "BS1D", "BSND"),
    "SBND": ("S11D", "SB1D", "SBND"),
    "TND": ("T1D", "TND"),
}
INTERLEAVE = {"BNSD": ("11SD",), "BSND": ("1S1D",), "SBND": ("S11D",), "TND": ("T1D",)}
CASES = [
    (mode, layout, cos_layout)
    for mode, table in (("half", HALF), ("interleave", INTERLEAVE))
    for layout, cos_layouts in table.items()
    for cos_layout in cos_layouts
]


def oracle(x, cos, sin, mode):
    """Element by element along the head dimension."""
    x, cos, sin = (t.float() for t in torch.broadcast_tensors(x, cos, sin))
    dim = x.shape[-1]
    out = torch.empty_like(x)
    for i in range(dim):
        if mode == "half":
            partner, sign = ((i + dim // 2), -1) if i < dim // 2 else ((i - dim // 2), 1)
        else:
            partner, sign = (i + 1, -1) if i % 2 == 0 else (i - 1, 1)
        out[..., i] = x[..., i] * cos[..., i] + sign * x[..., partner] * sin[..., i]
    return out


@given(
    st.sampled_from(CASES),
    st.tuples(*[st.integers(1, 5)] * 3),
    st.integers(1, 8),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(deadline=None, max_examples=60)
def test_rotary_mul(case, sizes, half_dim, dtype):
    mode, layout, cos_layout = case
    named = dict(zip("BSN", sizes, strict=True)) | {"T": sizes[0], "D": 2 * half_dim, "1": 1}
    x = torch.randn([named[letter] for letter in layout]).to(dtype)
    cos, sin = torch.randn([2] + [named[letter] for letter in cos_layout]).to(dtype)
    out = run(npu.npu_rotary_mul, x, cos, sin, mode)
    assert out.dtype == dtype
    # Terms of a sum may cancel, so the float32 error is absolute.
    assert_close(out, oracle(x, cos, sin, mode).to(dtype))


def test_modes_by_hand():
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    zero, one = torch.zeros(1, 1, 4), torch.ones(1, 1, 4)
    assert npu.npu_rotary_mul(x, zero, one).flatten().tolist() == [-3, -4, 1, 2]
    rotated = npu.npu_rotary_mul(x, zero, one, "interleave")
    assert rotated.flatten().tolist() == [-2, 1, -4, 3]


def test_float32_tables_are_rounded_to_the_dtype_of_the_input():
    x = torch.randn(3, 2, 8).bfloat16()
    cos, sin = torch.randn(2, 3, 1, 8)
    expected = npu.npu_rotary_mul(x, cos.bfloat16(), sin.bfloat16())
    assert torch.equal(npu.npu_rotary_mul(x, cos, sin), expected)


def test_bfloat16_rounds_once():
    x = torch.randn(1, 64, 4, 64).bfloat16()
    cos, sin = torch.randn(2, 1, 64, 1, 64).bfloat16()
    out = npu.npu_rotary_mul(x, cos, sin)
    # A fused multiply-add may decide a tie the other way.
    assert (out != oracle(x, cos, sin, "half").bfloat16()).float().mean() < 0.001


def test_many_tokens_go_in_the_place_of_s():
    cos = torch.ones(1, 1200, 1, 4)
    assert run(npu.npu_rotary_mul, torch.ones(1, 1200, 2, 4), cos, cos).shape == (1, 1200, 2, 4)
    packed = torch.ones(1200, 1, 4)
    assert run(npu.npu_rotary_mul, torch.ones(1200, 2, 4), packed, packed).shape == (1200, 2, 4)
    with pytest.raises(ValueError):  # 1200 heads
        npu.npu_rotary_mul(torch.ones(1, 2, 1200, 4), cos[:, :2], cos[:, :2])
    with pytest.raises(ValueError):  # a batch of 1200
        npu.npu_rotary_mul(torch.ones(1200, 2, 1, 4), cos[:, :2], cos[:, :2])


def test_strided_input_gives_contiguous_output():
    x, (cos, sin) = torch.randn(1, 2, 5, 4), torch.randn(2, 1, 5, 1, 4)
    out = run(npu.npu_rotary_mul, x.transpose(1, 2), cos, sin)
    assert torch.equal(out, npu.npu_rotary_mul(x.transpose(1, 2).contiguous(), cos, sin))


def test_no_tokens():
    x, cos = torch.empty(1, 0, 2, 4), torch.empty(1, 0, 1, 4)
    assert run(npu.npu_rotary_mul, x, cos, cos).shape == x.shape


X, COS = torch.ones(2, 3, 4, 8), torch.ones(2, 3, 1, 8)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    "x, cos, sin, mode",
    [
        (X.half(), COS.half(), COS.half(), "half"),
        (X, COS.half(), COS.half(), "half"),
        (X, COS, COS, "quarter"),
        (X, COS, COS[:1], "half"),
        (X, COS[..., :4], COS[..., :4], "half"),  # half of the head dimension
        (X, torch.ones(1, 1, 1, 8), torch.ones(1, 1, 1, 8), "half"),
        (X, torch.ones(1, 3, 4, 8), torch.ones(1, 3, 4, 8), "half"),
        (X, torch.ones(3, 1, 8), torch.ones(3, 1, 8), "half"),
        (X, COS, COS, "interleave"),  # takes the tables of one sequence only
        (X, X, X, "interleave"),
        (torch.ones(1, 1, 2, 7), torch.ones(1, 1, 1, 7), torch.ones(1, 1, 1, 7), "half"),
        (torch.ones(1, 1, 2, 896), torch.ones(1, 1, 1, 896), torch.ones(1, 1, 1, 896), "half"),
    ],
)
def test_refused(x, cos, sin, mode, device):
    with pytest.raises((TypeError, ValueError)):
        npu.npu_rotary_mul(x.to(device), cos.to(device), sin.to(device), mode)


def test_rotate_is_refused():
    with pytest.raises(NotImplementedError):
        npu.npu_rotary_mul(X, COS, COS, rotate=torch.eye(8))
