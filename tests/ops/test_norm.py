import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from .helpers import assert_close, npu, run

DTYPES = (torch.float32, torch.bfloat16)


def oracle(x, gamma, epsilon):
    """(normalised before gamma, rstd) in float32, one row at a time."""
    rows = x.float().reshape(-1, gamma.numel())
    rstd = torch.stack([1 / torch.sqrt(row.pow(2).sum() / row.numel() + epsilon) for row in rows])
    return (rows * rstd[:, None]).view(x.shape), rstd.view(
        *x.shape[: x.dim() - gamma.dim()], *[1] * gamma.dim()
    )


shapes = st.tuples(
    st.lists(st.integers(1, 3), max_size=3), st.lists(st.integers(1, 9), min_size=1, max_size=2)
)


@given(shapes, st.sampled_from(DTYPES), st.booleans(), st.sampled_from([1e-6, 1e-2]))
@settings(deadline=None, max_examples=40)
def test_rms_norm(shape, dtype, float_gamma, epsilon):
    leading, trailing = shape
    x = torch.randn(*leading, *trailing).to(dtype)
    gamma = torch.randn(*trailing).to(torch.float32 if float_gamma else dtype)
    y, rstd = run(npu.npu_rms_norm, x, gamma, epsilon)
    normed, expected_rstd = oracle(x, gamma, epsilon)
    assert y.dtype == dtype and rstd.dtype == torch.float32
    assert_close(y, (normed * gamma.float()).to(dtype))
    assert_close(rstd, expected_rstd)


@given(shapes, st.sampled_from(DTYPES), st.sampled_from([1e-6, 1e-2]))
@settings(deadline=None, max_examples=40)
def test_add_rms_norm(shape, dtype, epsilon):
    leading, trailing = shape
    x1, x2 = torch.randn(2, *leading, *trailing).to(dtype)
    gamma = torch.randn(*trailing).to(dtype)
    y, rstd, total = run(npu.npu_add_rms_norm, x1, x2, gamma, epsilon)
    x = x1.float() + x2.float()
    normed, expected_rstd = oracle(x, gamma, epsilon)
    assert torch.equal(total, x.to(dtype))
    assert_close(y, (normed.to(dtype).float() * gamma.float()).to(dtype))
    assert_close(rstd, expected_rstd)


def test_rms_norm_rounds_once_and_add_rms_norm_twice():
    x = torch.randn(64, 128).bfloat16()
    gamma = torch.randn(128).bfloat16()
    normed, _ = oracle(x, gamma, 1e-6)
    once = (normed * gamma.float()).bfloat16()
    twice = (normed.bfloat16().float() * gamma.float()).bfloat16()
    differing = (once != twice).float().mean()
    assert differing > 0.1
    # Up to the last float32 bit, which now and then decides a rounding.
    single = npu.npu_rms_norm(x, gamma)[0]
    double = npu.npu_add_rms_norm(x, torch.zeros_like(x), gamma)[0]
    assert (single != once).float().mean() < 0.01
    assert (double != twice).float().mean() < 0.01


def test_the_sum_is_normalised_before_it_is_rounded():
    # 256 + 1 is not a bfloat16; rounded it is 256.
    x1, x2 = torch.tensor([[256.0, 0.0]]).bfloat16(), torch.tensor([[1.0, 0.0]]).bfloat16()
    _, rstd, total = npu.npu_add_rms_norm(x1, x2, torch.ones(2).bfloat16(), 0.0)
    assert total[0, 0] == 256
    torch.testing.assert_close(rstd, torch.full((1, 1), 2**0.5 / 257))


def test_per_head_norm():
    x, gamma = torch.randn(5, 4, 16), torch.randn(16)
    y, rstd = run(npu.npu_rms_norm, x, gamma, 1e-6)
    assert rstd.shape == (5, 4, 1)
    assert_close(y, oracle(x, gamma, 1e-6)[0] * gamma)


def test_strided_input_gives_contiguous_output():
    x, gamma = torch.randn(4, 5, 6), torch.randn(6)
    flipped = x.transpose(0, 1)
    y, _ = run(npu.npu_rms_norm, flipped, gamma)
    assert torch.equal(y, npu.npu_rms_norm(x, gamma)[0].transpose(0, 1))
    y, _, total = run(npu.npu_add_rms_norm, flipped, flipped, gamma)
    assert torch.equal(total, 2 * flipped)


def test_default_epsilon():
    x = torch.full((1, 2), 1e-3)
    assert npu.npu_rms_norm(x, torch.ones(2))[1].item() == pytest.approx((2e-6) ** -0.5)
    zero = torch.zeros_like(x)
    rstd = npu.npu_add_rms_norm(x, zero, torch.ones(2))[1]
    assert rstd.item() == pytest.approx((2e-6) ** -0.5)


def test_no_rows():
    x, gamma = torch.empty(0, 8), torch.ones(8)
    assert [t.shape for t in run(npu.npu_rms_norm, x, gamma)] == [(0, 8), (0, 1)]
    assert [t.shape for t in run(npu.npu_add_rms_norm, x, x, gamma)] == [(0, 8), (0, 1), (0, 8)]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    "x, gamma",
    [
        (torch.ones(2, 4).half(), torch.ones(4).half()),
        (torch.ones(2, 4), torch.ones(4).bfloat16()),
        (torch.ones(2, 4), torch.ones(2)),
        (torch.ones(4), torch.ones(1, 4)),
        (torch.ones(4), torch.tensor(1.0)),
    ],
)
def test_refused(x, gamma, device):
    x, gamma = x.to(device), gamma.to(device)
    with pytest.raises((TypeError, ValueError)):
        npu.npu_rms_norm(x, gamma)
    with pytest.raises((TypeError, ValueError)):
        npu.npu_add_rms_norm(x, x, gamma)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_add_rms_norm_refuses_operands_that_differ(device):
    x, gamma = torch.ones(2, 4, device=device), torch.ones(4, device=device)
    with pytest.raises(ValueError):
        npu.npu_add_rms_norm(x, torch.ones(1, 4, device=device), gamma)
    with pytest.raises(TypeError):
        npu.npu_add_rms_norm(x, x.bfloat16(), gamma)
    with pytest.raises(TypeError):  # unlike npu_rms_norm
        npu.npu_add_rms_norm(x.bfloat16(), x.bfloat16(), gamma)
