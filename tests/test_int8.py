"""Int8 values with scales: the arithmetic and the bytes, in one process."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen3cp import CommConfig, ForwardPhase, collectives, int8
from qwen3cp.errors import InputError, ParallelConfigError

PREFILL, DECODE = ForwardPhase.PREFILL, ForwardPhase.DECODE
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


def round_trip(x: torch.Tensor, num_blocks: int) -> torch.Tensor:
    blocks = int8.pack(x, num_blocks)
    out = torch.full_like(x, torch.inf)
    int8.dequantise_(out, blocks)
    return out


def magnitudes(seed: int, rows: int, width: int) -> torch.Tensor:
    """Rows of very different sizes, some of zeros."""
    generator = torch.Generator().manual_seed(seed)
    scale = 10.0 ** torch.randint(-6, 7, (rows, 1), generator=generator)
    kept = torch.rand(rows, 1, generator=generator) < 0.8
    return torch.randn(rows, width, generator=generator) * scale * kept


@given(st.integers(1, 40), st.integers(1, 33), st.integers(1, 5), DTYPES, st.integers(0, 9))
def test_every_value_is_within_half_a_step(rows, width, num_blocks, dtype, seed):
    x = magnitudes(seed, rows, width).to(dtype)
    out = round_trip(x, num_blocks)
    assert out.dtype == dtype
    half_step = x.double().abs().amax(1, keepdim=True) / 254
    rounding = x.double().abs() * torch.finfo(dtype).eps
    # the factor of a group is rounded to float32
    assert ((out.double() - x.double()).abs() <= half_step * (1 + 1e-4) + rounding).all()
    assert torch.equal(out[(x == 0).all(1)], x[(x == 0).all(1)].abs())  # zeros stay zeros


@given(st.integers(1, 40), st.integers(1, 33), st.integers(1, 5))
def test_blocks_hold_the_operators_values_and_scales(rows, width, num_blocks):
    x = magnitudes(0, rows, width)
    blocks = int8.pack(x, num_blocks)
    size = -(-rows // num_blocks)
    assert blocks.dtype == torch.int8
    assert blocks.shape == (num_blocks, int8.block_bytes(size, width))
    assert 0 <= blocks.shape[1] - size * (4 + width) < 4
    values, scales = int8.unpack(blocks, width)
    assert values.untyped_storage().data_ptr() == blocks.untyped_storage().data_ptr()
    expected, expected_scales = torch.ops.npu.npu_dynamic_quant(x)
    assert torch.equal(values.reshape(-1, width)[:rows], expected)
    assert torch.equal(scales.reshape(-1)[:rows], expected_scales)
    assert not values.reshape(-1, width)[rows:].any()
    assert not scales.reshape(-1)[rows:].any()


@given(st.integers(1, 6), st.integers(1, 20), st.integers(1, 20))
def test_the_sum_is_added_in_float32_in_the_order_of_the_blocks(num_blocks, size, width):
    x = magnitudes(1, num_blocks * size, width)
    blocks = int8.pack(x, num_blocks)
    values, scales = torch.ops.npu.npu_dynamic_quant(x)
    terms = (values.double() * scales.double()[:, None]).view(num_blocks, size, width)
    total = int8.sum_of(blocks, width)
    assert total.dtype == torch.float32
    bound = terms.abs().sum(0) * num_blocks * torch.finfo(torch.float32).eps
    assert ((total.double() - terms.sum(0)).abs() <= bound).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_group_with_a_value_that_is_not_finite_is_nan(value, dtype):
    x = torch.randn(6, 16).to(dtype)
    expected = round_trip(x, 2)
    x[1, 3] = x[4, 0] = value
    expected[1] = expected[4] = torch.nan
    torch.testing.assert_close(round_trip(x, 2), expected, rtol=0, atol=0, equal_nan=True)


def test_that_does_not_depend_on_what_the_operator_makes_of_it(monkeypatch):
    """Its cast of NaN and infinity is not documented; a maximum may also skip NaN."""

    def forgets(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values, scales = real(x.nan_to_num(0.0, 0.0, 0.0))
        return values.fill_(7), scales.clamp(min=1.0)

    real = torch.ops.npu.npu_dynamic_quant
    x = torch.randn(5, 8)
    x[0, 0], x[2, 7], x[3] = torch.nan, torch.inf, -torch.inf
    monkeypatch.setattr(torch.ops.npu, "npu_dynamic_quant", forgets)
    out = round_trip(x, 1)
    assert out.isnan().all(1).tolist() == [True, False, True, True, False]
    assert out[[1, 4]].isfinite().all()


def test_groups_too_small_for_a_scale_are_zeros():
    x = torch.full((2, 4), 3e-37)
    x[1] = 4e-37
    out = round_trip(x, 1)
    assert not out[0].any()
    torch.testing.assert_close(out[1], x[1], rtol=1e-4, atol=0)


@given(st.integers(1, 200), st.integers(1, 40), st.integers(1, 5), st.integers(1, 300))
def test_chunks_cover_all_groups_in_whole_shares(num_groups, group_size, num_blocks, most):
    before, int8.CHUNK_VALUES = int8.CHUNK_VALUES, most
    try:
        chunks = list(int8.chunks(num_groups, group_size, num_blocks))
    finally:
        int8.CHUNK_VALUES = before
    covered = [i for start, stop in chunks for i in range(start, stop)]
    assert covered == list(range(num_groups))
    assert all((stop - start) % num_blocks == 0 for start, stop in chunks[:-1])
    assert all(
        (stop - start) * group_size <= max(most, num_blocks * group_size) for start, stop in chunks
    )


# Which form


def place(comm: CommConfig, num_ranks: int, phase: ForwardPhase | None = PREFILL) -> Any:
    """What the choice looks at."""
    return SimpleNamespace(comm=comm, tp_size=num_ranks, phase=phase)


def form(comm: CommConfig, shape: tuple[int, ...], num_ranks: int, **kwargs: Any) -> str:
    phase, layer = kwargs.pop("phase", PREFILL), kwargs.pop("layer", None)
    x = torch.empty(shape, dtype=kwargs.pop("dtype", torch.bfloat16), device="meta")
    return collectives.all_reduce_form(x, place(comm, num_ranks, phase), layer)


FORMS = ["int8_one_shot", "int8_two_step"]


@pytest.mark.parametrize("name", FORMS)
def test_a_form_that_is_asked_for_is_taken_in_a_prefill(name):
    comm = CommConfig(all_reduce=name, skip_layers=[3])
    for num_ranks in (2, 3, 4, 8):
        assert form(comm, (1, 64), num_ranks) == name
        assert form(comm, (1, 64), num_ranks, layer=2) == name
        assert form(comm, (1, 64), num_ranks, layer=3) == "exact"
        assert form(comm, (9999, 64), num_ranks, phase=DECODE) == "exact"
        assert form(comm, (9999, 64), num_ranks, phase=None) == "exact"


@pytest.mark.parametrize("name", [*FORMS, "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_below_the_threshold_are_exact(name, dtype):
    comm = CommConfig(all_reduce=name, min_bytes=128 * 100 * dtype.itemsize)
    assert form(comm, (100, 128), 4, dtype=dtype) != "exact"
    assert form(comm, (99, 128), 4, dtype=dtype) == "exact"


def test_auto_is_exact_below_a_mebibyte():
    comm = CommConfig(all_reduce="auto")
    assert form(comm, (256, 2048), 2) == "int8_one_shot"
    assert form(comm, (255, 2048), 2) == "exact"


@pytest.mark.parametrize("group_size", [None, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auto_takes_one_shot_for_two_ranks_and_two_steps_for_more(group_size, dtype):
    comm = CommConfig(all_reduce="auto", group_size=group_size)
    assert form(comm, (1000, 2048), 2, dtype=dtype) == "int8_one_shot"
    for num_ranks in (3, 4, 5, 8, 16):
        assert form(comm, (1000, 2048), num_ranks, dtype=dtype) == "int8_two_step"


@given(
    st.integers(1, 5000),
    st.integers(1, 40),
    st.sampled_from([None, 1, 2, 4, 128]),
    st.integers(2, 64),
    DTYPES,
)
def test_auto_never_sends_more_than_exact(rows, width, group_size, num_ranks, dtype):
    width *= group_size or 1
    comm = CommConfig(all_reduce="auto", group_size=group_size, min_bytes=0)
    chosen = form(comm, (rows, width), num_ranks, dtype=dtype)
    group_size = group_size or width
    sent = {
        name: collectives.all_reduce_bytes(
            name, rows * width // group_size, group_size, dtype.itemsize, num_ranks
        )
        for name in ("exact", "int8_one_shot", "int8_two_step")
    }
    assert sent["exact"] == 2 * (num_ranks - 1) * rows * width * dtype.itemsize // num_ranks
    assert sent[chosen] == min(sent.values())


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
@pytest.mark.parametrize("group_size", [2048, 128])
@pytest.mark.parametrize("rows", [512, 513, 4096, 32767, 65536])
def test_two_steps_send_about_half_of_a_bfloat16_ring(num_ranks, group_size, rows):
    groups = rows * 2048 // group_size
    ring = collectives.all_reduce_bytes("exact", groups, group_size, 2, num_ranks)
    sent = collectives.all_reduce_bytes("int8_two_step", groups, group_size, 2, num_ranks)
    assert sent <= 0.53 * ring
    one_shot = collectives.all_reduce_bytes("int8_one_shot", groups, group_size, 2, num_ranks)
    assert one_shot == (num_ranks - 1) * groups * (group_size + 4)


@pytest.mark.parametrize("name", [*FORMS, "auto"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int32])
def test_other_dtypes_are_refused(name, dtype):
    comm = CommConfig(all_reduce=name, min_bytes=0)
    with pytest.raises(InputError, match="bfloat16 and float32"):
        form(comm, (4, 8), 2, dtype=dtype)


@pytest.mark.parametrize("name", [*FORMS, "auto"])
def test_a_group_must_divide_a_row(name):
    comm = CommConfig(all_reduce=name, group_size=128, min_bytes=0)
    with pytest.raises(ParallelConfigError, match=r"group_size=128\) .* 192"):
        form(comm, (4, 192), 2)


# Settings


@pytest.mark.parametrize("value", [0, -128, 1.5, "128", True])
def test_group_size_is_a_positive_integer(value):
    with pytest.raises(ParallelConfigError, match="group_size must be a positive integer"):
        CommConfig(group_size=value)


@pytest.mark.parametrize("value", [-1, 1.5, "1", True])
def test_min_bytes_is_an_integer(value):
    with pytest.raises(ParallelConfigError, match="min_bytes must be an integer"):
        CommConfig(min_bytes=value)


@pytest.mark.parametrize("value", [3, "12", [-1], [1.5], [True], [None], ["1"]])
def test_skip_layers_are_layer_indices(value):
    with pytest.raises(ParallelConfigError, match="skip_layers must be layer indices"):
        CommConfig(skip_layers=value)


def test_settings_compare_by_value():
    ours = CommConfig(skip_layers=[3, 1, 3])
    assert ours == CommConfig(skip_layers={1, 3}) == CommConfig(skip_layers=(1, 3))
    assert hash(ours) == hash(CommConfig(skip_layers=(1, 3)))
    assert ours != CommConfig(skip_layers=range(3))
    assert repr(ours) == repr(CommConfig(skip_layers=np.array([1, 3]).tolist()))
