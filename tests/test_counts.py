"""What a forward calls, sends and holds, counted at the dispatcher and at the collectives."""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen3MoeConfig

from qwen3cp import CPQwen3MoeForCausalLM, ForwardPhase, PagedCacheAdapter, collectives
from qwen3cp.collectives import PendingGather, record_communication
from tests.models import load, random_ids, save_random
from tests.ranks import run

PREFILL, DECODE = ForwardPhase.PREFILL, ForwardPhase.DECODE
FIA = "npu.npu_fused_infer_attention_score"

OPERATORS_OF_A_LAYER = {
    "npu.npu_rms_norm": 2,  # q_norm, k_norm
    "npu.npu_add_rms_norm": 2,
    "npu.npu_rotary_mul": 2,
    "npu.npu_scatter_nd_update_": 1,
    FIA: 1,
    "npu.npu_moe_gating_top_k_softmax": 1,
    "npu.npu_moe_init_routing_v2": 1,
    "npu.npu_grouped_matmul": 2,
    "npu.npu_swiglu": 1,
    "npu.npu_moe_token_unpermute": 1,
}
MAKE_COPIES = ("aten.clone", "aten.cat", "aten.index", "aten.index_select", "aten.copy_")


class Recorder(TorchDispatchMode):
    """Names of the operators that are called, in order, and the shapes that they return."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.outputs: list[tuple[str, torch.dtype, tuple[int, ...], int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func.overloadpacket)
        self.calls.append(name)
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                pointer = tensor.untyped_storage().data_ptr()
                self.outputs.append((name, tensor.dtype, tuple(tensor.shape), pointer))
        return out


def count(call: Callable[[], Any]) -> tuple[Counter, collectives.CommunicationLog]:
    with record_communication() as log, Recorder() as recorder:
        call()
    return Counter(recorder.calls), log


def calls_of_all_kinds(
    cp: int, tp: int, path: Path, lengths: list[int]
) -> list[tuple[Counter, Counter, dict[str, int], int]]:
    """(operators, collectives by kind, bytes by kind, padded rows) of a prefill, a chunk after
    it and a decode step."""
    model = load(path, cp, tp)
    cache = model.new_kv_cache(num_pages=64)
    sequences = [cache.new_sequence() for _ in lengths]
    prompts = random_ids(0, *lengths, vocab_size=203)
    results = []
    for phase, call in (
        (PREFILL, lambda: model.prefill(cache, sequences, prompts)),
        (PREFILL, lambda: model.prefill(cache, sequences, prompts)),
        (DECODE, lambda: model.decode(cache, sequences, [1] * len(lengths))),
    ):
        new = lengths if phase is PREFILL else [1] * len(lengths)
        plan = model.plan(cache, sequences, new, phase)
        cache.cancel(sequences)
        operators, log = count(call)
        results.append((operators, Counter(log.counts), log.by_kind, plan.padded_rows))
    return results


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Path:
    return save_random(tmp_path_factory.mktemp("small") / "checkpoint")


LAYERS, KV_HEADS, HEAD_DIM, HIDDEN, VOCAB, HEADS = 3, 2, 64, 96, 203, 4


@pytest.mark.parametrize("topology", [(1, 1), (2, 1), (1, 2), (4, 1), (2, 2), (1, 4)], ids=str)
@pytest.mark.parametrize("lengths", [[300], [1], [5, 129, 1, 64]], ids=str)
def test_operators_collectives_and_bytes_of_a_forward(ranks, small, topology, lengths):
    cp, tp = topology
    results = run(ranks, topology, calls_of_all_kinds, small, lengths)
    for rank_results in results:
        for step, (operators, counts, sent, padded_rows) in enumerate(rank_results):
            split = cp > 1 and step < 2
            total = sum(lengths) if step < 2 else len(lengths)
            if not split or total >= cp:  # else some rank has no row, and skips its operators
                for name, per_layer in OPERATORS_OF_A_LAYER.items():
                    # the first layer's input norm has no residual to add; the final norm has
                    first_norm = 1 if name == "npu.npu_rms_norm" else 0
                    assert operators[name] == per_layer * LAYERS + first_norm, (name, step)
            assert operators[FIA] <= LAYERS

            # one gather a layer in prefill, none in decode
            assert counts["kv_gather"] == (LAYERS if split else 0)
            width = max(1, KV_HEADS // tp) * HEAD_DIM
            gathered = LAYERS * (cp - 1) * padded_rows * 2 * width * 4 if split else 0
            assert sent.get("kv_gather", 0) == gathered

            # two reductions a layer over TP; a rank without rows has nothing to reduce
            if tp > 1 and (not split or total >= cp):
                assert counts["all_reduce"] == 2 * LAYERS
            elif tp == 1:
                assert counts["all_reduce"] == 0

            # the logits: the rows that are asked for, and one gather of the vocabulary
            assert counts["logits"] == (1 if cp * tp > 1 else 0) + (1 if split else 0)
            rows = len(lengths)
            shard = math.ceil(VOCAB / (cp * tp))
            most = (cp - 1) * rows * HIDDEN * 4 if split else 0
            vocabulary = (cp * tp - 1) * rows * shard * 4
            assert vocabulary <= sent.get("logits", 0) <= vocabulary + most

            assert counts["check"] == (1 if cp * tp > 1 else 0)
            assert set(counts) <= {"kv_gather", "all_reduce", "logits", "check"}


def test_all_reduce_bytes_are_those_of_the_local_rows(ranks, small):
    for rank_results in ranks(4).run(calls_of_all_kinds, 2, 2, small, [300]):
        prefill, _, decode = rank_results
        rows = 150
        assert prefill[2]["all_reduce"] == LAYERS * 2 * (2 * (2 - 1) * rows * HIDDEN * 4 // 2)
        assert decode[2]["all_reduce"] == LAYERS * 2 * (2 * (2 - 1) * 1 * HIDDEN * 4 // 2)


def test_the_keys_are_the_only_copy_of_a_layer(small):
    """Keys are copied into the buffer that is gathered; nothing else is copied in a layer."""
    model = load(small, 1, 1)
    cache = model.new_kv_cache(num_pages=8)
    sequence = cache.new_sequence()
    plan = model.plan(cache, [sequence], [40], PREFILL)
    hidden = model.model.embed_tokens(torch.arange(40))
    position_embeddings = model.model.position_embeddings(plan)
    with model.parallel_context.forward(PREFILL), Recorder() as recorder:
        model.model.layers[0](
            hidden,
            None,
            plan=plan,
            kv=cache.layer(0),
            position_embeddings=position_embeddings,
        )
    copies = Counter(name for name in recorder.calls if name.startswith(MAKE_COPIES))
    assert copies == {"aten.copy_": 1}


# What views, products and allocations of a layer are made beside the operators of the NPU; a
# decode and a prefill on one rank make the same.
OTHER_CALLS_OF_A_LAYER = {
    "aten.new_empty": 1,  # keys and values, packed
    "aten.unbind": 2,  # of them, and of the cache
    "aten.mm": 5,  # key, value, query, output, router
    "aten.t": 5,
    "aten.view": 6,
    "aten.select": 1,
    "aten.transpose": 2,  # the experts' weights
    "aten.copy_": 1,  # keys
    "aten.sum": 1,  # the weights of a token's experts, renormalised
    "aten.div": 1,
}


@pytest.mark.parametrize("phase", [PREFILL, DECODE])
def test_every_operator_call_of_a_layer(small, phase):
    model = load(small, 1, 1)
    cache = model.new_kv_cache(num_pages=8)
    sequences = [cache.new_sequence() for _ in range(3)]
    model.prefill(cache, sequences, random_ids(0, 4, 200, 3, vocab_size=203))
    plan = model.plan(cache, sequences, [1, 1, 1], phase)
    hidden = model.model.embed_tokens(torch.arange(3)).detach()
    cos, sin = (x.unsqueeze(2) for x in model.model.position_embeddings(plan))
    with model.parallel_context.forward(phase), torch.no_grad(), Recorder() as recorder:
        model.model.layers[1](
            hidden,
            hidden,
            plan=plan,
            kv=cache.layer(1),
            position_embeddings=(cos, sin),
        )
    assert Counter(recorder.calls) == {**OPERATORS_OF_A_LAYER, **OTHER_CALLS_OF_A_LAYER}


def held_in_prefill(path: Path, length: int) -> list[tuple[str, str, tuple[int, ...]]]:
    """What of a prefill on 4 CP ranks has an axis as long as the sequence."""
    model = load(path, 4, 1)
    cache = model.new_kv_cache(max_tokens=length)
    pool = {cache.layer(i).rows.untyped_storage().data_ptr() for i in range(cache.num_layers)}
    sequence = cache.new_sequence()
    (prompt,) = random_ids(0, length, vocab_size=203)
    with Recorder() as recorder:
        model.prefill(cache, [sequence], [prompt])
    return [
        (name, str(dtype), shape)
        for name, dtype, shape, pointer in recorder.outputs
        if dtype.is_floating_point and pointer not in pool and max(shape, default=0) >= length
    ]


def test_no_rank_holds_activations_of_the_whole_sequence(ranks, small):
    """But the gathered keys and values of one layer: [4 * 2 * rows, width]."""
    length = 1000  # rows are 250, and 500 with two experts a token: shorter than the sequence
    for held in ranks(4).run(held_in_prefill, small, length):
        assert {shape for _, _, shape in held} == {(4 * 2 * 250, KV_HEADS * HEAD_DIM)}
        assert len({name for name, _, _ in held}) <= 3  # made, gathered, seen again as a view
        assert held


def most_gathers_alive(path: Path) -> int:
    """The most gathered buffers that were alive when a layer started a gather."""
    model = load(path, 2, 1)
    buffers: list[weakref.ref] = []
    most = 0
    start = collectives.kv_gather

    def watched(packed, ctx, **kwargs) -> PendingGather:
        nonlocal most
        pending = start(packed, ctx, **kwargs)
        buffers.append(weakref.ref(pending._result))
        most = max(most, sum(ref() is not None for ref in buffers))
        return pending

    collectives.kv_gather = watched
    try:
        cache = model.new_kv_cache(max_tokens=300)
        model.prefill(cache, [cache.new_sequence()], random_ids(0, 300, vocab_size=203))
    finally:
        collectives.kv_gather = start
    return most


def test_one_layer_of_gathered_keys_and_values_at_a_time(ranks, small):
    assert ranks(2).run(most_gathers_alive, small) == [1, 1]


def order_of_attention(path: Path) -> list[str]:
    """Gather, query product and wait of one layer, in the order in which they happen."""
    model = load(path, 2, 1)
    attention: Any = model.model.layers[1].self_attn
    events: list[str] = []
    wait, query = PendingGather.wait, attention.q_proj.weight.data_ptr()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "allgather" in str(func) or "all_gather" in str(func):
                events.append("gather")
            tensors = [x for x in args if isinstance(x, torch.Tensor)]
            if str(func.overloadpacket) in ("aten.mm", "aten.addmm") and any(
                x.untyped_storage().data_ptr() == query for x in tensors
            ):
                events.append("query product")
            return func(*args, **(kwargs or {}))

    def logged(self: PendingGather) -> torch.Tensor:
        events.append("wait")
        return wait(self)

    cache = model.new_kv_cache(max_tokens=300)
    sequence = cache.new_sequence()
    plan = model.plan(cache, [sequence], [20], PREFILL)
    hidden = plan.split(torch.randn(20, HIDDEN))
    PendingGather.wait = logged
    try:
        with model.parallel_context.forward(PREFILL), torch.no_grad(), Watch():
            attention(
                hidden,
                plan=plan,
                kv=cache.layer(1),
                position_embeddings=model.model.position_embeddings(plan),
            )
    finally:
        PendingGather.wait = wait
    return events


def test_the_query_is_computed_while_the_gather_flies(ranks, small):
    expected = ["gather", "query product", "wait"]
    assert ranks(2).run(order_of_attention, small) == [expected, expected]


def split_calls(
    cp: int, tp: int, path: Path, lengths: list[int], prefix: int
) -> list[tuple[int, int, int, int]]:
    """Pools as small as the tokens allow: (attention calls, planned calls, pages before and
    after) of a prefill after a cached prefix."""
    model = load(path, cp, tp)
    pages = sum(-(-(prefix + n) // 128) for n in lengths)
    cache = model.new_kv_cache(num_pages=1 + pages)
    sequences = [cache.new_sequence() for _ in lengths]
    if prefix:
        model.prefill(cache, sequences, random_ids(1, *[prefix] * len(lengths), vocab_size=203))
    plan = model.plan(cache, sequences, lengths, PREFILL)
    cache.cancel(sequences)
    before = cache.num_pages
    operators, _ = count(
        lambda: model.prefill(cache, sequences, random_ids(2, *lengths, vocab_size=203)),
    )
    return [(operators[FIA], plan.num_attention_calls, before, cache.num_pages)]


@given(
    st.lists(st.integers(1, 400), min_size=1, max_size=4),
    st.integers(0, 300),
    st.sampled_from([(1, 1), (2, 1), (4, 1), (2, 2)]),
)
@settings(max_examples=15)
def test_attention_is_split_in_two_at_most_and_the_pool_stays(
    ranks, small, lengths, prefix, topology
):
    results = run(ranks, topology, split_calls, small, lengths, prefix)
    for ((calls, planned, before, after),) in results:
        assert calls == LAYERS * planned
        assert planned <= 2
        assert before == after


def test_decode_of_forks_that_share_pages_is_split_and_right(small):
    """Sixteen forks of two full pages count 48 pages in a pool of 20."""
    model = load(small, 1, 1)
    cache = model.new_kv_cache(num_pages=20)
    root = cache.new_sequence()
    (prompt,) = random_ids(5, 256, vocab_size=203)
    model.prefill(cache, [root], [prompt])
    forks = [root, *(cache.fork(root) for _ in range(15))]
    plan = model.plan(cache, forks, [1] * 16, DECODE)
    cache.cancel(forks)
    assert plan.num_attention_calls == 3  # six forks of three pages a call
    ids = torch.arange(16)
    together = model.decode(cache, forks, ids)
    for i, token in enumerate(ids):
        alone = model.new_kv_cache(num_pages=4)
        sequence = alone.new_sequence()
        model.prefill(alone, [sequence], [prompt])
        expected = model.decode(alone, [sequence], token[None])[0]
        torch.testing.assert_close(together[i], expected, rtol=0, atol=2e-4)


def full_size(name: str) -> Qwen3MoeConfig:
    """The published sizes of Qwen3-30B-A3B and Qwen3-235B-A22B, with two layers."""
    hidden, heads, width = {"30b": (2048, 32, 768), "235b": (4096, 64, 1536)}[name]
    sizes: dict[str, Any] = dict(
        vocab_size=151936,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=4,
        head_dim=128,
        moe_intermediate_size=width,
        num_hidden_layers=2,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        max_position_embeddings=262144,
    )
    return Qwen3MoeConfig(**sizes)


@pytest.mark.parametrize("name", ["30b", "235b"])
def test_nothing_is_read_back_from_the_device(name):
    """On meta tensors, reading a value raises; ids and lengths of a prefill are host integers."""
    with torch.device("meta"):
        model = CPQwen3MoeForCausalLM(full_size(name)).bfloat16()
    cache = model.new_kv_cache(num_pages=200)
    assert cache.device.type == "meta"
    sequences = [cache.new_sequence() for _ in range(3)]
    prompts = random_ids(0, 4096, 1, 700)
    logits = model.prefill(cache, sequences, prompts)
    assert (logits.shape, logits.device.type) == ((3, 151936), "meta")
    next_ids = logits.argmax(-1)
    for _ in range(2):
        logits = model.decode(cache, sequences, next_ids)
        next_ids = logits.argmax(-1)
    assert [s.length for s in sequences] == [4098, 3, 702]
    assert (logits.shape, logits.dtype) == ((3, 151936), torch.float32)

    # the same through transformers' forward, as generate() decodes: ids and mask on the device
    past = PagedCacheAdapter(cache)
    past.advance(sequences, 4098, set())
    output = model(
        next_ids[:, None],
        attention_mask=torch.ones(3, 4099, device="meta"),
        past_key_values=past,
        logits_to_keep=1,
        phase=DECODE,
    )
    assert output.logits.shape == (3, 1, 151936)
    assert past.get_seq_length() == 4099
