import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from qwen3cp.ops import settings

from .helpers import npu, run

DTYPES = (torch.bfloat16, torch.float32, torch.bool, torch.int64, torch.int8)


@given(
    st.data(),
    st.lists(st.integers(1, 4), min_size=1, max_size=3),
    st.sampled_from(DTYPES),
    st.sampled_from([torch.int32, torch.int64]),
)
@hypothesis_settings(deadline=None, max_examples=60)
def test_scatter_nd_update(data, shape, dtype, index_dtype):
    depth = data.draw(st.integers(1, len(shape)))
    places = [
        list(place)
        for place in torch.cartesian_prod(*[torch.arange(n) for n in shape[:depth]])
        .view(-1, depth)
        .tolist()
    ]
    chosen = data.draw(st.lists(st.sampled_from(places), unique_by=tuple, max_size=6))
    indices = torch.tensor(chosen, dtype=index_dtype).view(-1, depth)
    cache = torch.randint(0, 100, shape).to(dtype)
    updates = torch.randint(0, 100, (len(chosen), *shape[depth:])).to(dtype)
    expected = cache.clone()
    for place, update in zip(chosen, updates, strict=True):
        expected[tuple(place)] = update
    result = run(npu.npu_scatter_nd_update_, cache, indices, updates)
    assert result is cache
    assert torch.equal(cache, expected)


def test_writes_through_a_view():
    cache = torch.zeros(2, 4, 6)
    slots = torch.tensor([[7], [1]])
    npu.npu_scatter_nd_update_(cache.view(8, 6), slots, torch.ones(2, 6))
    assert cache.sum(-1).nonzero().tolist() == [[0, 1], [1, 3]]


def test_indices_of_more_dimensions():
    cache = torch.zeros(6, 2)
    indices = torch.tensor([[[0], [3]], [[5], [1]]])
    updates = torch.arange(8.0).view(2, 2, 2)
    run(npu.npu_scatter_nd_update_, cache, indices, updates)
    assert cache[:, 0].tolist() == [0, 6, 0, 2, 0, 4]


def test_one_index():
    cache = torch.zeros(3, 2)
    run(npu.npu_scatter_nd_update_, cache, torch.tensor([1]), torch.ones(2))
    assert cache.tolist() == [[0, 0], [1, 1], [0, 0]]


@pytest.mark.parametrize("bad", [-1, 4])
@pytest.mark.parametrize("column", [0, 1])
def test_indices_out_of_range(bad, column):
    index = [0, 0]
    index[column] = bad
    cache = torch.zeros(4, 4)
    with pytest.raises(IndexError):
        npu.npu_scatter_nd_update_(cache, torch.tensor([[1, 1], index]), torch.ones(2))
    assert not cache.any()


def test_duplicates_are_refused_in_debug_mode():
    cache, indices, updates = torch.zeros(4, 2), torch.tensor([[1], [1]]), torch.ones(2, 2)
    with settings.override(debug=True), pytest.raises(ValueError):
        npu.npu_scatter_nd_update_(cache, indices, updates)
    with settings.override(debug=False):
        npu.npu_scatter_nd_update_(cache, indices, updates)
    assert cache[1].tolist() == [1, 1]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    "cache, indices, updates",
    [
        (torch.zeros(4, 2).half(), torch.tensor([[1]]), torch.ones(1, 2).half()),
        (torch.zeros(4, 2).int(), torch.tensor([[1]]), torch.ones(1, 2).int()),
        (torch.zeros(4, 2), torch.tensor([[1]]), torch.ones(1, 2).bfloat16()),
        (torch.zeros(4, 2), torch.tensor([[1.0]]), torch.ones(1, 2)),
        (torch.zeros(4, 2), torch.tensor([[1, 1, 1]]), torch.ones(1)),
        (torch.zeros(4, 2), torch.tensor(1), torch.ones(2)),
        (torch.zeros(4, 2), torch.zeros(2, 0, dtype=torch.int64), torch.ones(2, 4, 2)),
        (torch.zeros(4, 2), torch.tensor([[1]]), torch.ones(2, 2)),
        (torch.zeros(4, 2), torch.tensor([[1]]), torch.ones(1, 3)),
    ],
)
def test_refused(cache, indices, updates, device):
    with pytest.raises((TypeError, ValueError)):
        npu.npu_scatter_nd_update_(cache.to(device), indices.to(device), updates.to(device))
