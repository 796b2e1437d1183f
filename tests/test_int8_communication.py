"""Int8 reductions and gathers on real gloo ranks: error, bytes, memory, and what a model does."""

from __future__ import annotations

import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qwen3cp import CommConfig, ForwardPhase, ParallelContext, collectives, int8
from qwen3cp.collectives import record_communication
from qwen3cp.errors import InputError, ParallelConfigError
from qwen3cp.parallel import AllReduceForm
from tests.models import load, random_ids, save_random
from tests.ranks import context, run

PREFILL, DECODE = ForwardPhase.PREFILL, ForwardPhase.DECODE
FORMS: tuple[AllReduceForm, ...] = ("int8_one_shot", "int8_two_step")
ROWS, WIDTH = 512, 2048


def reduce(x: torch.Tensor, ctx: ParallelContext, comm: CommConfig, **kwargs: Any) -> torch.Tensor:
    with ctx.communication(comm), ctx.forward(PREFILL):
        return collectives.all_reduce(x, ctx, **kwargs)


# Errors, against the float64 sum


def partial_sum(rank: int, data: str) -> torch.Tensor:
    """Standard normal; with outliers, 8 channels are 30 times larger: other ones on each rank, or
    the same, spread evenly."""
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(ROWS, WIDTH, generator=generator)
    if data == "outliers of each rank":
        x[:, torch.randperm(WIDTH, generator=generator)[:8]] *= 30
    elif data == "outliers of all ranks":
        x[:, torch.arange(8) * (WIDTH // 8) + 3] *= 30
    return x


DATA = ("normal", "outliers of each rank", "outliers of all ranks")


def measure_errors(num_ranks: int) -> dict[Any, tuple[float, int, bytes]]:
    """(relative L2 error, bytes received, the result) by data, form and group size."""
    ctx = context(1, num_ranks)
    results = {}
    for data in DATA:
        x = partial_sum(ctx.rank, data)
        exact = sum(partial_sum(rank, data).double() for rank in range(num_ranks))
        assert isinstance(exact, torch.Tensor)
        for form in FORMS:
            for group_size in (None, 128):
                comm = CommConfig(all_reduce=form, group_size=group_size)
                with record_communication() as log:
                    total = reduce(x, ctx, comm)
                error = (total.double() - exact).norm() / exact.norm()
                results[data, form, group_size] = (
                    float(error),
                    log.total_bytes,
                    total.numpy().tobytes(),
                )
    return results


# In percent, for 2, 3, 4 and 8 ranks, computed apart from this package.
EXPECTED_ERROR = {
    ("normal", "int8_one_shot", None): (0.83, 0.83, 0.83, 0.83),
    ("normal", "int8_one_shot", 128): (0.65, 0.65, 0.65, 0.65),
    ("normal", "int8_two_step", None): (1.17, 1.17, 1.17, 1.17),
    ("normal", "int8_two_step", 128): (0.91, 0.91, 0.91, 0.91),
    ("outliers of each rank", "int8_one_shot", None): (6.0, 6.0, 6.0, 6.0),
    ("outliers of each rank", "int8_one_shot", 128): (2.2, 2.2, 2.2, 2.2),
    ("outliers of each rank", "int8_two_step", None): (7.6, 7.3, 7.1, 6.7),
    ("outliers of each rank", "int8_two_step", 128): (3.0, 3.0, 3.0, 2.8),
    ("outliers of all ranks", "int8_one_shot", None): (6.0, 6.0, 6.0, 6.0),
    ("outliers of all ranks", "int8_one_shot", 128): (2.3, 2.3, 2.3, 2.3),
    ("outliers of all ranks", "int8_two_step", None): (8.5, 8.5, 8.5, 8.5),
    ("outliers of all ranks", "int8_two_step", 128): (3.2, 3.2, 3.2, 3.2),
}


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 8])
def test_errors_and_bytes_on_normal_and_outlying_data(ranks, num_ranks):
    of_ranks = ranks(num_ranks).run(measure_errors, num_ranks)
    ring = 2 * (num_ranks - 1) / num_ranks * ROWS * WIDTH * 2  # of bfloat16
    for key, expected in EXPECTED_ERROR.items():
        _, form, group_size = key
        error, received, _ = of_ranks[0][key]
        percent = expected[(2, 3, 4, 8).index(num_ranks)]
        assert error * 100 == pytest.approx(percent, rel=0.1), key
        groups, size = ROWS * WIDTH // (group_size or WIDTH), group_size or WIDTH
        share = -(-groups // num_ranks)
        if form == "int8_one_shot":
            assert received == (num_ranks - 1) * groups * (size + 4)
        else:
            assert received == 2 * (num_ranks - 1) * share * (size + 4)
            assert received <= 0.53 * ring
        assert len({results[key][2] for results in of_ranks}) == 1, "ranks differ"


def terms_of_ranks(seed: int, num_ranks: int, rows: int, width: int) -> torch.Tensor:
    """[ranks, rows, width], rows of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    scale = 10.0 ** torch.randint(-3, 4, (num_ranks, rows, 1), generator=generator)
    return torch.randn(num_ranks, rows, width, generator=generator) * scale


def reduce_terms(
    num_ranks: int, seed: int, rows: int, width: int, dtype: torch.dtype, comm: CommConfig
) -> np.ndarray:
    ctx = context(1, num_ranks)
    x = terms_of_ranks(seed, num_ranks, rows, width).to(dtype)[ctx.rank]
    before = x.clone()
    total = reduce(x, ctx, comm)
    assert torch.equal(x, before), "the input was changed"
    assert total.dtype == dtype and total.data_ptr() != x.data_ptr()
    assert torch.equal(reduce(x.view(1, rows, width), ctx, comm)[0], total)  # any leading axes
    in_place = reduce(x, ctx, comm, in_place=True)
    assert in_place is x and torch.equal(x, total)
    return total.double().numpy()


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
@given(
    st.integers(0, 99),
    st.integers(1, 13),
    st.sampled_from([(1, None), (33, None), (33, 11), (64, 32), (256, 128), (12, 1)]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from(FORMS),
)
@settings(max_examples=25)
def test_no_value_is_off_by_more_than_its_half_steps(
    ranks, num_ranks, seed, rows, widths, dtype, form
):
    width, group_size = widths
    comm = CommConfig(all_reduce=form, group_size=group_size)
    results = ranks(num_ranks).run(reduce_terms, num_ranks, seed, rows, width, dtype, comm)
    terms = terms_of_ranks(seed, num_ranks, rows, width).to(dtype).double()
    exact = terms.sum(0)

    def half_step(x: torch.Tensor) -> torch.Tensor:
        groups = x.unflatten(-1, (-1, group_size or width))
        return (groups.abs().amax(-1, keepdim=True) / 254).expand(groups.shape).flatten(-2)

    eps = torch.finfo(dtype).eps
    bound = half_step(terms).sum(0) * (1 + 1e-4) + eps * terms.abs().sum(0)
    if form == "int8_two_step":  # of the sum, which is off by the first bound already
        bound = bound + half_step(exact.abs() + bound) * (1 + 1e-4) + eps * exact.abs()
    bound = bound * (1 + eps)  # the result is rounded to dtype
    for total in results:
        assert np.array_equal(total, results[0])
        assert (np.abs(total - exact.numpy()) <= bound.numpy() + eps * np.abs(exact.numpy())).all()


def reduce_with_bad_values(
    num_ranks: int, form: AllReduceForm, dtype: torch.dtype
) -> tuple[Any, Any]:
    ctx = context(1, num_ranks)
    comm = CommConfig(all_reduce=form, group_size=4)
    x = terms_of_ranks(5, num_ranks, 7, 12).to(dtype)[ctx.rank]
    x[2] = 0
    x[:, 8:] = 0
    clean = reduce(x, ctx, comm)
    # group 0 of row 0 on rank 0, group 1 of row 3 on the last rank, group 0 of row 6 on both
    if ctx.rank == 0:
        x[0, 1], x[6, 3] = torch.nan, torch.inf
    if ctx.rank == num_ranks - 1:
        x[3, 7], x[6, 0] = -torch.inf, -torch.inf
    return clean.float().numpy(), reduce(x, ctx, comm).float().numpy()


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_groups_that_are_not_finite_are_nan_on_all_ranks_and_zeros_stay(
    ranks, num_ranks, form, dtype
):
    for clean, total in ranks(num_ranks).run(reduce_with_bad_values, num_ranks, form, dtype):
        expected = clean.copy()
        expected[0, :4] = expected[3, 4:8] = expected[6, :4] = np.nan
        assert np.array_equal(total, expected, equal_nan=True)
        assert not clean[2].any() and not clean[:, 8:].any()
        assert clean[[0, 1, 3, 4, 5, 6], :8].all()


# Collectives and memory


class Collectives(TorchDispatchMode):
    """Counts what torch.distributed is asked for, and the bytes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, torch.dtype]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            tensors = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
            self.calls.append((func.overloadpacket.__name__, tensors[0].dtype))
        return func(*args, **(kwargs or {}))


def collectives_of_a_sum(num_ranks: int, form: AllReduceForm, chunk: int | None) -> Any:
    ctx = context(1, num_ranks)
    x = terms_of_ranks(1, num_ranks, 23, 8)[ctx.rank]
    comm = CommConfig(all_reduce=form)
    before = int8.CHUNK_VALUES
    int8.CHUNK_VALUES = chunk or before
    try:
        with record_communication() as log, Collectives() as called:
            total = reduce(x, ctx, comm)
        expected = collectives.all_reduce_bytes(form, 23, 8, 4, num_ranks)
    finally:
        int8.CHUNK_VALUES = before
    assert log.total_bytes == expected
    assert {(r.kind, r.form, r.phase) for r in log.records} == {("all_reduce", form, PREFILL)}
    return called.calls, len(log.records), total.numpy()


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("form", FORMS)
def test_values_and_scales_travel_together_and_chunks_change_nothing(ranks, num_ranks, form):
    whole = ranks(num_ranks).run(collectives_of_a_sum, num_ranks, form, None)
    # chunks of 5 rows, or of the multiple of the ranks below it
    in_chunks = ranks(num_ranks).run(collectives_of_a_sum, num_ranks, form, 40)
    num_chunks = {1: 5, 2: 6, 3: 8}[1 if form == "int8_one_shot" else num_ranks]
    steps = (
        ["_allgather_base_"] if form == "int8_one_shot" else ["alltoall_base_", "_allgather_base_"]
    )
    for (calls, records, total), (chunk_calls, chunk_records, chunk_total) in zip(
        whole, in_chunks, strict=True
    ):
        assert calls == [(step, torch.int8) for step in steps]
        assert records == len(steps)
        assert chunk_calls == [(step, torch.int8) for step in steps] * num_chunks
        assert chunk_records == len(steps) * num_chunks
        assert np.array_equal(total, chunk_total)


class LiveBytes(TorchDispatchMode):
    """The most bytes of tensors alive at a time, of those that the block makes."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {
            x.untyped_storage()._cdata
            for x in tree_leaves((args, kwargs))
            if isinstance(x, torch.Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in known:
                storage = x.untyped_storage()
                self._storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._storages = {k: v for k, v in self._storages.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._storages.values()))
        return out


def memory_of_a_sum(form: AllReduceForm, group_size: int | None, in_place: bool) -> tuple[int, int]:
    ctx = context(1, 4)
    x = torch.randn(32768, 2048, dtype=torch.bfloat16)
    comm = CommConfig(all_reduce=form, group_size=group_size)
    with LiveBytes() as live:
        total = reduce(x, ctx, comm, in_place=in_place)
    assert total.isfinite().all()
    return live.peak - (0 if in_place else x.nbytes), x.nbytes


@pytest.mark.slow
@pytest.mark.parametrize("group_size", [None, 128])
@pytest.mark.parametrize("in_place", [True, False])
def test_memory_of_a_long_sum_is_a_chunks(ranks, group_size, in_place):
    """32768 x 2048 on 4 ranks: 128 MiB, of which less than the same again is held beside it."""
    for peak, size in ranks(4).run(memory_of_a_sum, "int8_two_step", group_size, in_place):
        assert 0 < peak < 0.75 * size


# Keys and values


def gather_int8(cp: int, rows: int, heads: int, head_dim: int, seed: int, dtype: torch.dtype):
    """(what arrives, what was sent by all) and the log."""
    ctx = context(cp, 1)
    width = heads * head_dim
    sent = terms_of_ranks(seed, cp, 2 * rows, width).to(dtype)
    packed = sent[ctx.rank].view(2, rows, width).clone()
    with (
        record_communication() as log,
        ctx.communication(CommConfig(kv_gather="int8")),
        ctx.forward(PREFILL),
    ):
        pending = collectives.kv_gather(packed, ctx, split=True, head_dim=head_dim, layer=0)
        dead = weakref.ref(packed)
        del packed
        assert dead() is None, "the buffer that was sent is kept"
        gathered = pending.wait()
    return gathered, sent.view(-1, width), log.records


def gather_heads(
    cp: int, rows: int, heads: int, head_dim: int, seed: int, dtype: torch.dtype
) -> np.ndarray:
    gathered, sent, (record,) = gather_int8(cp, rows, heads, head_dim, seed, dtype)
    assert gathered.dtype == dtype and gathered.shape == sent.shape
    assert (record.kind, record.form, record.layer) == ("kv_gather", "int8", 0)
    of_a_rank = 2 * rows * heads * (head_dim + 4)
    assert (cp - 1) * of_a_rank <= record.bytes < (cp - 1) * (of_a_rank + 4)
    heads_sent = sent.double().view(-1, head_dim)
    half_step = heads_sent.abs().amax(1, keepdim=True) / 254
    rounding = heads_sent.abs() * torch.finfo(dtype).eps
    error = (gathered.double().view(-1, head_dim) - heads_sent).abs()
    assert (error <= half_step * (1 + 1e-4) + rounding).all()
    assert (error > 0).any() or head_dim == 1
    return gathered.float().numpy()


@pytest.mark.parametrize("cp", [2, 4])
@given(
    st.integers(1, 9),
    st.integers(1, 4),
    st.sampled_from([3, 64, 128]),
    st.integers(0, 9),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(max_examples=15)
def test_gathered_heads_are_within_half_a_step_on_all_ranks(
    ranks, cp, rows, heads, head_dim, seed, dtype
):
    """Also on the rank that sent them: every rank stores the same."""
    results = ranks(cp).run(gather_heads, cp, rows, heads, head_dim, seed, dtype)
    assert all(np.array_equal(result, results[0]) for result in results)


# A model


@pytest.fixture(scope="session")
def biased(tmp_path_factory) -> Path:
    """With attention biases, large ones, and a dense layer."""
    path = tmp_path_factory.mktemp("biased") / "checkpoint"
    return save_random(
        path,
        hidden_size=128,
        attention_bias=True,
        mlp_only_layers=[1],
        num_key_value_heads=2,
        moe_intermediate_size=64,
    )


def logits_and_log(
    cp: int, tp: int, path: Path, comm: CommConfig, dtype: torch.dtype, chunks: list[int]
) -> Any:
    """Logits after a prefill in chunks and after a decode step, and what was sent."""
    model = load(path, cp, tp, dtype)
    cache = model.new_kv_cache(num_pages=20)
    sequences = [cache.new_sequence(), cache.new_sequence()]
    ids = random_ids(3, *(2 * chunks), vocab_size=203)
    with model.parallel_context.communication(comm), record_communication() as log:
        logits = [
            model.prefill(cache, sequences, ids[2 * i : 2 * i + 2]) for i in range(len(chunks))
        ]
        logits.append(model.decode(cache, sequences, [1, 2]))
    layers = [cache.read(sequence, i) for sequence in sequences for i in range(cache.num_layers)]
    stored = [(key.float().numpy(), value.float().numpy()) for key, value in layers]
    return torch.stack(logits).numpy(), log.records, stored


def relative(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("topology", [(1, 2), (2, 2), (1, 4), (2, 1), (4, 1)], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_is_close_to_its_exact_self_and_the_same_on_all_ranks(
    ranks, biased, topology, form, dtype
):
    cp, tp = topology
    chunks = [40, 7]
    comm = CommConfig(all_reduce=form, group_size=64, kv_gather="int8", skip_layers=[2])
    exact = run(ranks, topology, logits_and_log, biased, CommConfig(), dtype, chunks)
    results = run(ranks, topology, logits_and_log, biased, comm, dtype, chunks)
    for rank, (logits, records, stored) in enumerate(results):
        assert np.array_equal(logits, results[0][0])
        # a bias that is added twice, or not at all, changes them by more than all of it
        assert 0 < relative(logits, exact[0][0]) < 0.1
        # CP ranks store the same keys and values
        for ours, theirs in zip(stored, results[rank % tp][2], strict=True):
            assert np.array_equal(ours[0], theirs[0]) and np.array_equal(ours[1], theirs[1])

        forms = Counter((r.kind, r.layer, r.form, r.phase) for r in records if r.layer is not None)
        expected: Counter = Counter()
        steps = 2 if form == "int8_two_step" else 1
        for layer in range(3):
            skipped = layer == 2
            if tp > 1:
                sums = "exact" if skipped else form
                expected["all_reduce", layer, sums, PREFILL] = 4 * (1 if skipped else steps)
                expected["all_reduce", layer, "exact", DECODE] = 2
            if cp > 1:
                expected["kv_gather", layer, "exact" if skipped else "int8", PREFILL] = 2
        assert forms == expected


def test_the_gather_rounds_the_same_however_the_tokens_are_split(ranks, biased):
    """Scales belong to a token and head, so the number of CP ranks cannot matter but by the
    float32 rounding of the products before."""
    comm = CommConfig(kv_gather="int8")
    two = ranks(2).run(logits_and_log, 2, 1, biased, comm, torch.float32, [50])[0]
    four = ranks(4).run(logits_and_log, 4, 1, biased, comm, torch.float32, [50])[0]
    first_layer = [(0, 0), (3, 3)]  # of both sequences; later layers see what was rounded
    for ours, theirs in first_layer:
        for a, b in zip(two[2][ours], four[2][theirs], strict=True):
            step = np.abs(a).reshape(len(a), -1, 64).max(-1).repeat(64, -1).reshape(a.shape) / 127
            assert (np.abs(a - b) <= step * 1.01).all()
            assert (np.abs(a - b) > step * 0.5).mean() < 1e-3


def generate_with_log(cp: int, tp: int, path: Path, comm: CommConfig) -> Any:
    model = load(path, cp, tp)
    (ids,) = random_ids(4, 30, vocab_size=203)
    with model.parallel_context.communication(comm), record_communication() as log:
        output = model.generate(
            ids[None],
            attention_mask=torch.ones(1, 30),
            max_new_tokens=5,
            do_sample=False,
            pad_token_id=0,
        )
    return output.tolist(), Counter(
        (r.form, r.phase) for r in log.records if r.kind == "all_reduce"
    )


@pytest.mark.parametrize("form", FORMS)
def test_generate_quantises_the_prefill_and_decodes_exactly(ranks, biased, form):
    results = ranks(2).run(generate_with_log, 1, 2, biased, CommConfig(all_reduce=form))
    steps = 2 if form == "int8_two_step" else 1
    for tokens, counts in results:
        assert tokens == results[0][0] and len(tokens[0]) == 35
        assert counts == {(form, PREFILL): 6 * steps, ("exact", DECODE): 6 * 4}


def reduce_outside_a_forward(num_ranks: int) -> list[str]:
    ctx = context(1, num_ranks)
    with ctx.communication(CommConfig(all_reduce="int8_two_step")):
        with record_communication() as log:
            collectives.all_reduce(torch.ones(2, 4), ctx)
            with ctx.forward(DECODE):
                collectives.all_reduce(torch.ones(2, 4), ctx)
            with ctx.forward(PREFILL):
                collectives.all_reduce(torch.ones(2, 4), ctx, layer=1)
                collectives.all_reduce(torch.ones(2, 4), ctx, form="exact")
    return [record.form for record in log.records]


def test_sums_outside_a_prefill_are_exact(ranks):
    expected = ["exact", "exact", "int8_two_step", "int8_two_step", "exact"]
    assert ranks(2).run(reduce_outside_a_forward, 2) == [expected] * 2


# Settings that do not fit


def load_with(path: Path, comm: dict[str, Any]) -> str:
    """The error of loading, after which the ranks can still talk."""
    from qwen3cp import CPQwen3MoeForCausalLM

    ctx = context(1, 2, comm=CommConfig(**comm))
    with record_communication() as log, pytest.raises(ParallelConfigError) as caught:
        CPQwen3MoeForCausalLM.from_pretrained(path, parallel_context=ctx)
    assert set(log.counts) <= {"check"}
    assert collectives.all_reduce(torch.ones(1), ctx).item() == 2
    return str(caught.value)


@pytest.mark.parametrize(
    ("comm", "message"),
    [
        (
            {"all_reduce": "auto", "group_size": 96},
            "group_size=96) does not divide hidden_size = 128",
        ),
        ({"all_reduce": "int8_two_step", "group_size": 256}, "group_size=256"),
        ({"kv_gather": "int8", "skip_layers": (1, 3)}, "layers [3]; the model has 0 to 2"),
    ],
)
def test_settings_that_do_not_fit_the_model_stop_every_rank(ranks, biased, comm, message):
    for error in ranks(2).run(load_with, biased, comm):
        assert message in error


def forward_with_other_settings(path: Path) -> int:
    model = load(path, 1, 2)
    ctx = model.parallel_context
    cache = model.new_kv_cache(num_pages=4)
    sequence = cache.new_sequence()
    form: Any = FORMS[ctx.rank]
    with (
        ctx.communication(CommConfig(all_reduce=form)),
        record_communication() as log,
        pytest.raises(InputError, match="settings"),
    ):
        model.prefill(cache, [sequence], [[1, 2, 3]])
    assert set(log.counts) == {"check"}
    assert sequence.length == 0
    return cache.num_free_pages


def test_ranks_with_other_settings_are_told_before_they_communicate(ranks, biased):
    assert ranks(2).run(forward_with_other_settings, biased) == [3, 3]


@pytest.mark.parametrize(
    ("comm", "message"),
    [
        ({"all_reduce": "int8_one_shot"}, "all_reduce='int8_one_shot'.*tp_size=1"),
        ({"all_reduce": "int8_two_step"}, "all_reduce='int8_two_step'.*tp_size=1"),
        ({"kv_gather": "int8"}, "kv_gather='int8'.*cp_size=1"),
    ],
)
def test_int8_on_one_rank_is_exact_and_says_so_once(biased, comm, message, recwarn):
    from qwen3cp import CPQwen3MoeForCausalLM

    with pytest.warns(UserWarning, match=message) as warned:
        ctx = ParallelContext.from_world(comm=CommConfig(**comm))
    assert len(warned) == 1 and warned[0].filename.endswith("parallel.py")
    model = CPQwen3MoeForCausalLM.from_pretrained(biased, parallel_context=ctx, dtype=torch.float32)
    exact = load(biased, 1, 1)
    (ids,) = random_ids(9, 12, vocab_size=203)
    assert torch.equal(model(ids[None]).logits, exact(ids[None]).logits)
    assert not [w for w in recwarn if "CommConfig" in str(w.message)]


def test_auto_and_exact_warn_of_nothing(recwarn):
    for name in ("auto", "exact"):
        ParallelContext.from_world(comm=CommConfig(all_reduce=name))
    assert not len(recwarn)


def test_settings_change_between_forwards_only():
    ctx = ParallelContext.single()
    with ctx.forward(PREFILL), pytest.raises(ParallelConfigError, match="prefill forward is in"):
        with ctx.communication(CommConfig()):
            pass
    before, other = ctx.comm, CommConfig(skip_layers=[1])
    with pytest.raises(RuntimeError, match="stop"), ctx.communication(other):
        assert ctx.comm is other
        raise RuntimeError("stop")
    assert ctx.comm is before


@pytest.mark.parametrize("comm", [None, "int8", {"all_reduce": "auto"}])
def test_the_settings_of_a_context_are_a_comm_config(comm):
    with pytest.raises(ParallelConfigError, match="comm must be a CommConfig"):
        ParallelContext(comm=comm)
