"""Experts divided over all ranks: parity with transformers, what travels, what is computed."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from qwen3cp import (
    CommConfig,
    CPQwen3MoeForCausalLM,
    CPQwen3MoeSparseMoeBlock,
    ForwardPhase,
    ParallelContext,
    record_routing,
)
from qwen3cp.collectives import record_communication
from qwen3cp.config import local_experts
from qwen3cp.errors import InputError
from qwen3cp.exchange import all_gather_bytes, all_to_all_bytes, exchange_form
from tests.models import TOLERANCE, load, random_ids, reference, reference_logits, save_random
from tests.ranks import context, run

PREFILL, DECODE = ForwardPhase.PREFILL, ForwardPhase.DECODE
TOPOLOGIES = [(1, 2), (2, 1), (2, 2), (4, 1), (1, 4)]
EXCHANGES = ["all_gather", "all_to_all"]
HIDDEN, TOP_K = 96, 2


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict[int, Path]:
    """Random checkpoints by number of experts; one layer is dense."""
    folder = tmp_path_factory.mktemp("experts")
    return {
        n: save_random(folder / str(n), num_experts=n, mlp_only_layers=[1], norm_topk_prob=n != 13)
        for n in (3, 8, 13, 128)
    }


@cache
def load_ep(path: Path, cp: int, tp: int, placement: Any = None) -> CPQwen3MoeForCausalLM:
    return CPQwen3MoeForCausalLM.from_pretrained(
        path,
        parallel_context=context(cp, tp, moe="ep"),
        dtype=torch.float32,
        expert_placement=placement,
    )


def three_steps(
    cp: int, tp: int, path: Path, lengths: list[int], comm: CommConfig, placement: Any = None
) -> Any:
    """Logits of a prefill, a chunk after it and a decode; what was sent; rows of the experts."""
    model = load_ep(path, cp, tp, placement)
    pool = model.new_kv_cache(num_pages=2 + 2 * sum(-(-2 * n // 128) for n in lengths))
    sequences = [pool.new_sequence() for _ in lengths]
    first, second = (random_ids(seed, *lengths, vocab_size=203) for seed in (1, 2))
    with (
        model.parallel_context.communication(comm),
        record_communication() as log,
        record_routing() as routing,
        Products() as products,
    ):
        logits = [
            model.prefill(pool, sequences, first),
            model.prefill(pool, sequences, second),
            model.decode(pool, sequences, [5] * len(lengths)),
        ]
    return torch.stack(logits).numpy(), log.records, routing.report(model), products.rows


class Products(TorchDispatchMode):
    """Rows that go through the first grouped product of each layer."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ == "npu_grouped_matmul":
            self.rows.append(int((kwargs or {})["group_list"].sum()))
        return func(*args, **(kwargs or {}))


def expected_logits(path: Path, lengths: list[int]) -> np.ndarray:
    first, second = (random_ids(seed, *lengths, vocab_size=203) for seed in (1, 2))
    rows = []
    for a, b in zip(first, second, strict=True):
        logits = reference_logits(path, torch.cat((a, b, torch.tensor([5]))))
        rows.append(logits[[len(a) - 1, len(a) + len(b) - 1, -1]])
    return torch.stack(rows, dim=1).numpy()


# Parity


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
@pytest.mark.parametrize("form", EXCHANGES)
@pytest.mark.parametrize("num_experts", [3, 8, 13, 128])
@pytest.mark.parametrize("lengths", [[150], [1], [3, 40, 1]], ids=str)
def test_parity_and_nothing_is_computed_twice(
    ranks, checkpoints, topology, form, num_experts, lengths
):
    """With fewer rows than ranks, and fewer experts than ranks, too."""
    path = checkpoints[num_experts]
    results = run(ranks, topology, three_steps, path, lengths, CommConfig(exchange=form))
    expected = expected_logits(path, lengths)
    for logits, _, routing, _ in results:
        assert np.abs(logits - expected).max() <= TOLERANCE
        assert np.array_equal(logits, results[0][0])
        assert routing == results[0][2]
    # three forwards through two layers with experts
    pairs = (2 * sum(lengths) + len(lengths)) * TOP_K
    computed = sum(sum(products[::2]) for *_, products in results)
    assert computed == 2 * pairs
    routing = results[0][2]
    assert routing.layers == [0, 2]
    assert [sum(rows) for rows in routing.rows_per_expert] == [pairs, pairs]
    for of_experts, of_ranks in zip(routing.rows_per_expert, routing.rows_per_rank, strict=True):
        world = topology[0] * topology[1]
        slots = [local_experts(num_experts, rank, world) for rank in range(world)]
        assert of_ranks == [sum(of_experts[e] for e in each) for each in slots]


@pytest.mark.parametrize("topology", [(2, 1), (2, 2), (1, 4)], ids=str)
@given(st.integers(0, 10**6), st.sampled_from(EXCHANGES), st.booleans())
@settings(max_examples=6)
def test_any_placement_gives_the_same(ranks, checkpoints, topology, seed, form, per_layer):
    path = checkpoints[13]
    shuffle = random.Random(seed)
    orders = tuple(tuple(shuffle.sample(range(13), 13)) for _ in range(3))
    placement = orders if per_layer else orders[0]
    results = run(ranks, topology, three_steps, path, [30, 2], CommConfig(exchange=form), placement)
    plain = run(ranks, topology, three_steps, path, [30, 2], CommConfig(exchange=form))
    expected = expected_logits(path, [30, 2])
    for logits, _, routing, _ in results:
        assert np.abs(logits - expected).max() <= TOLERANCE
        # experts are counted by their own number; which rank has them is another
        assert routing.rows_per_expert == plain[0][2].rows_per_expert
    world = topology[0] * topology[1]
    for i, layer in enumerate((0, 2)):
        order = orders[layer] if per_layer else orders[0]
        of_ranks = [
            sum(
                results[0][2].rows_per_expert[i][order[slot]]
                for slot in local_experts(13, r, world)
            )
            for r in range(world)
        ]
        assert results[0][2].rows_per_rank[i] == of_ranks


def skewed_logits(cp: int, tp: int, path: Path, form: Any) -> Any:
    """Every row chooses expert 0 and expert 1: of equal weights the lower experts are chosen."""
    model = load_ep(path, cp, tp) if cp * tp > 1 else load(path, 1, 1)
    layers: Any = model.model.layers
    gates = [layers[0].mlp.gate, layers[2].mlp.gate]
    before = [gate.weight.data.clone() for gate in gates]
    try:
        for gate in gates:
            gate.weight.data.zero_()
        with model.parallel_context.communication(CommConfig(exchange=form)):
            pool = model.new_kv_cache(num_pages=4)
            sequences = [pool.new_sequence(), pool.new_sequence()]
            with record_routing() as routing:
                logits = model.prefill(pool, sequences, random_ids(1, 60, 1, vocab_size=203))
            return logits.numpy(), routing.report(model)
    finally:
        for gate, weight in zip(gates, before, strict=True):
            gate.weight.data.copy_(weight)


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
@pytest.mark.parametrize("form", EXCHANGES)
def test_all_rows_to_the_same_experts(ranks, checkpoints, topology, form):
    expected, _ = skewed_logits(1, 1, checkpoints[8], form)
    for logits, routing in run(ranks, topology, skewed_logits, checkpoints[8], form):
        assert np.abs(logits - expected).max() <= TOLERANCE
        assert routing.rows_per_expert == [[61, 61, 0, 0, 0, 0, 0, 0]] * 2
        assert routing.expert_imbalance == [4, 4]


@pytest.mark.parametrize("topology", [(1, 2), (2, 2)], ids=str)
@pytest.mark.parametrize("form", EXCHANGES)
def test_with_int8_sums_after_the_attention(ranks, checkpoints, topology, form):
    """The results of the experts stay exact; the attention's are quantised as with moe="tp"."""
    comm = CommConfig(exchange=form, all_reduce="int8_two_step")
    results = run(ranks, topology, three_steps, checkpoints[8], [50, 2], comm)
    expected = expected_logits(checkpoints[8], [50, 2])
    for logits, records, _, _ in results:
        assert np.array_equal(logits, results[0][0])
        assert 0 < np.linalg.norm(logits - expected) < 0.1 * np.linalg.norm(expected)
        forms = {(r.kind, r.layer, r.form) for r in records if r.phase is PREFILL}
        assert {name for name in forms if name[0] == "expert_exchange"} == {
            ("expert_exchange", 0, "exact"),
            ("expert_exchange", 2, "exact"),
        }
        assert ("all_reduce", 0, "int8_two_step") in forms


def generated(cp: int, tp: int, path: Path) -> Any:
    model = load_ep(path, cp, tp)
    (ids,) = random_ids(8, 40, vocab_size=203)
    output = model.generate(
        ids[None],
        attention_mask=torch.ones(1, 40),
        max_new_tokens=6,
        do_sample=False,
        pad_token_id=0,
    )
    return output.tolist()


@pytest.mark.parametrize("topology", [(2, 1), (2, 2)], ids=str)
def test_generate(ranks, checkpoints, topology):
    path = checkpoints[8]
    (ids,) = random_ids(8, 40, vocab_size=203)
    expected = reference(path).generate(
        ids[None],
        attention_mask=torch.ones(1, 40),
        max_new_tokens=6,
        do_sample=False,
        pad_token_id=0,
    )
    for tokens in run(ranks, topology, generated, path):
        assert tokens == expected.tolist()


# What travels


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
@pytest.mark.parametrize("quantised", [False, True])
def test_bytes_of_the_all_gather_form(ranks, checkpoints, topology, quantised):
    cp, tp = topology
    rows = 240
    comm = CommConfig(exchange="all_gather", exchange_rows="int8" if quantised else "exact")
    results = run(ranks, topology, three_steps, checkpoints[8], [rows], comm)
    # per layer and forward, 2 (W-1)/W * rows * hidden * bytes but for the int8 of the way out
    world, row = cp * tp, HIDDEN * 4
    out = (cp - 1) / cp * rows * ((HIDDEN + 4 if quantised else row) + 8 * TOP_K)
    back = (world - 1) / world * rows * row + (tp - 1) / world * rows * row
    for logits, records, _, _ in results:
        exchanged = [r for r in records if r.kind == "expert_exchange"]
        assert {r.phase for r in exchanged} == {PREFILL}
        assert {r.layer for r in exchanged} == {0, 2}
        assert sum(r.bytes for r in exchanged) == 2 * 2 * (out + back)
        sizes = rows, HIDDEN, 4, TOP_K, cp, tp, quantised
        assert all_gather_bytes(*sizes) == int(out + back)
        if not quantised:
            ring = 2 * (world - 1) / world * rows * row
            assert out + back == ring + (cp - 1) / cp * rows * 8 * TOP_K
        # a decode has no exchange: one sum over all ranks in the two layers with experts
        sums = Counter(
            (r.layer, r.group_size) for r in records if (r.kind, r.phase) == ("all_reduce", DECODE)
        )
        assert sums[0, world] >= 1 and sums[2, world] >= 1
        error = np.abs(logits - expected_logits(checkpoints[8], [rows])).max()
        assert error <= (0.5 if quantised and cp > 1 else TOLERANCE)


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
@pytest.mark.parametrize("quantised", [False, True])
def test_a_row_goes_once_to_each_rank_that_has_its_experts(ranks, checkpoints, topology, quantised):
    """Bytes of the all-to-all form, from the experts that transformers' router chooses."""
    cp, tp = topology
    world, path = cp * tp, checkpoints[8]
    (ids,) = random_ids(1, 240, vocab_size=203)
    chosen: dict[int, torch.Tensor] = {}
    theirs = reference(path)
    hooks = [
        theirs.model.layers[i].mlp.gate.register_forward_hook(
            lambda _, __, out, i=i: chosen.update({i: out[-1]})
        )
        for i in (0, 2)
    ]
    try:
        reference_logits(path, ids)
    finally:
        for hook in hooks:
            hook.remove()
    owner = [r for r in range(world) for _ in local_experts(8, r, world)]
    comm = CommConfig(exchange="all_to_all", exchange_rows="int8" if quantised else "exact")
    results = run(ranks, topology, first_layer_records, path, comm)
    row = HIDDEN * 4
    out = (HIDDEN + 4 if quantised else row) + 8 * TOP_K
    # every row, the rank that has it, and the other ranks that it goes to
    moved = 0
    for token, experts in enumerate(chosen[0].tolist()):
        home = next(rank for rank, (_, tokens) in enumerate(results) if token in tokens)
        moved += len({owner[e] for e in experts} - {home})
    received = sum(sum(r.bytes for r in records) for records, _ in results)
    counts = world * (world - 1) * world * 8  # the matrix of split sizes, 8 bytes each
    to_tp = cp * tp * (tp - 1) * (240 // world) * row
    assert received == moved * (out + row) + counts + to_tp


def first_layer_records(cp: int, tp: int, path: Path, comm: CommConfig) -> Any:
    """(the exchange of layer 0, the tokens that this rank sends) of a prefill of 240 tokens."""
    model = load_ep(path, cp, tp)
    ctx = model.parallel_context
    pool = model.new_kv_cache(max_tokens=240)
    sequence = pool.new_sequence()
    plan = model.plan(pool, [sequence], [240], PREFILL)
    pool.cancel([sequence])
    share = 240 // (cp * tp)
    mine = plan.local_indices[ctx.tp_rank * share : (ctx.tp_rank + 1) * share].tolist()
    with ctx.communication(comm), record_communication() as log:
        model.prefill(pool, [sequence], random_ids(1, 240, vocab_size=203))
    return [r for r in log.records if (r.kind, r.layer) == ("expert_exchange", 0)], mine


def reads_of_the_device(cp: int, tp: int, path: Path, form: str) -> int:
    """Times that a prefill reads a value back, outside the CPU kernels of the operators."""
    model = load_ep(path, cp, tp)
    ctx = model.parallel_context
    pool = model.new_kv_cache(max_tokens=50)
    sequence = pool.new_sequence()
    layer: Any = model.model.layers[0]
    plan = model.plan(pool, [sequence], [50], PREFILL)
    hidden = plan.split(torch.randn(50, HIDDEN, generator=torch.Generator().manual_seed(0)))
    reads = 0

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal reads
            name = func.overloadpacket.__name__
            reads += name in ("_local_scalar_dense", "nonzero", "item")
            return func(*args, **(kwargs or {}))

    tolist = torch.Tensor.tolist

    def counted(self: torch.Tensor) -> Any:
        nonlocal reads
        reads += 1
        return tolist(self)

    exchange: Any = form
    with ctx.communication(CommConfig(exchange=exchange)), ctx.forward(PREFILL), Reads():
        torch.Tensor.tolist = counted
        try:
            layer.mlp(hidden, plan=plan)
        finally:
            torch.Tensor.tolist = tolist
    pool.cancel([sequence])
    return reads - 2  # the CPU kernel of a grouped product reads its group list, twice a layer


@pytest.mark.parametrize("topology", [(2, 1), (2, 2), (1, 4)], ids=str)
def test_the_split_sizes_are_the_one_thing_that_is_read_back(ranks, checkpoints, topology):
    for form, expected in (("all_gather", 0), ("all_to_all", 1)):
        reads = run(ranks, topology, reads_of_the_device, checkpoints[128], form)
        assert reads == [expected] * len(reads), form


# Which form


@pytest.mark.parametrize("form", EXCHANGES)
def test_a_form_that_is_asked_for_is_taken(form):
    ctx = ParallelContext.describe(0, cp_size=4, tp_size=4, moe="ep")
    ctx.comm = CommConfig(exchange=form)
    assert exchange_form(ctx, 1, 2048, 2, 8) == form


@pytest.mark.parametrize(
    ("cp", "tp", "rows", "form"),
    [
        (1, 4, 1 << 20, "all_gather"),  # a single all-reduce, with no more bytes
        (2, 1, 65536, "all_gather"),
        (4, 1, 512, "all_gather"),
        (8, 2, 16384, "all_to_all"),
        (16, 1, 65536, "all_to_all"),
        (16, 1, 64, "all_gather"),
    ],
)
def test_auto_saves_bytes_where_that_pays(cp, tp, rows, form):
    ctx = ParallelContext.describe(0, cp_size=cp, tp_size=tp, moe="ep")
    assert exchange_form(ctx, rows, 2048, 2, 8) == form


def test_expected_bytes_are_those_of_the_published_table():
    """Units of rows * hidden bytes: all-gather and reduce-scatter in bfloat16, and one copy per
    destination with int8 out and bfloat16 back, for CP ranks alone."""
    rows, hidden = 10**6, 4096
    for world, gathered, sent in (
        (2, 2.0, 1.5),
        (4, 3.0, 2.0),
        (8, 3.5, 1.7),
        (16, 3.75, 1.1),
        (32, 3.88, 0.65),
    ):
        ring = all_gather_bytes(rows, hidden, 2, 8, world, 1) / (rows * hidden)
        assert ring == pytest.approx(gathered, abs=0.03)
        copies = all_to_all_bytes(rows, hidden, 2, 8, world, 1, True) / (rows * hidden)
        assert copies == pytest.approx(sent, abs=0.08)


# What a rank has


@pytest.mark.parametrize("topology", [(2, 1), (2, 2), (1, 4)], ids=str)
def test_parameters_of_a_rank(ranks, checkpoints, topology):
    cp, tp = topology
    for num_experts in (8, 13):
        shapes = run(ranks, topology, expert_shapes, checkpoints[num_experts])
        assert sum(shape[0] for shape in shapes) == num_experts
        for rank, shape in enumerate(shapes):
            assert shape == (len(local_experts(num_experts, rank, cp * tp)), 2 * 48, HIDDEN)


def expert_shapes(cp: int, tp: int, path: Path) -> tuple[int, ...]:
    layer: Any = load_ep(path, cp, tp).model.layers[0]
    return tuple(layer.mlp.experts.gate_up_proj.shape)


def block_without_plan(path: Path) -> str:
    model = load_ep(path, 2, 1)
    block: Any = model.model.layers[0].mlp
    assert isinstance(block, CPQwen3MoeSparseMoeBlock)
    with pytest.raises(InputError) as caught:
        block(torch.zeros(3, HIDDEN))
    return str(caught.value)


def test_a_block_on_several_cp_ranks_wants_the_plan(ranks, checkpoints):
    for message in ranks(2).run(block_without_plan, checkpoints[8]):
        assert "needs the plan" in message


def saved_with_placement(cp: int, tp: int, path: Path, folder: Path) -> None:
    load_ep(path, cp, tp, tuple(reversed(range(13)))).save_pretrained(folder)


def test_saving_undoes_a_placement(ranks, checkpoints, tmp_path):
    run(ranks, (2, 2), saved_with_placement, checkpoints[13], tmp_path / "saved")
    (ids,) = random_ids(3, 20, vocab_size=203)
    expected = reference_logits(checkpoints[13], ids)
    assert torch.equal(reference_logits(tmp_path / "saved", ids), expected)


# With other users of a model


def harness_results(cp: int, tp: int, path: Path, ours: bool) -> Any:
    """Log-likelihoods and generated text of the lm-eval harness's own Hugging Face class."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    model = load_ep(path, cp, tp) if ours else reference(path)
    harness: Any = HFLM
    lm = harness(
        pretrained=cast(Any, model),
        tokenizer=AutoTokenizer.from_pretrained(path),
        batch_size=2,
        max_length=512,
    )
    question = "Question: There are 6 boxes with 12 toys each. How many toys are there?\nAnswer:"

    def instances(kind: Any, arguments: list[Any]) -> list[Instance]:
        return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]

    likelihoods = lm.loglikelihood(
        instances("loglikelihood", [(question, " 6 * 12"), (question, " 7"), ("A", " pen and")])
    )
    until = {"until": ["\n\n"], "max_gen_toks": 24, "do_sample": False}
    return likelihoods, lm.generate_until(instances("generate_until", [(question, until)]))


def test_the_harness_scores_as_with_transformers(ranks, checkpoint):
    expected, text = harness_results(1, 1, checkpoint, False)
    assert "72" in text[0]
    for likelihoods, generated_text in run(ranks, (2, 1), harness_results, checkpoint, True):
        assert generated_text == text
        for (ours, is_greedy), (theirs, was_greedy) in zip(likelihoods, expected, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-3) and is_greedy == was_greedy


DRY_RUN = """
import sys
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import Qwen3MoeConfig
from qwen3cp import CommConfig, CPQwen3MoeForCausalLM, ParallelContext
from qwen3cp.collectives import record_communication

rank = int(sys.argv[1])
dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=16)
comm = CommConfig(exchange="all_gather", check_plan=False)
ctx = ParallelContext.from_world(cp_size=4, tp_size=4, moe="ep", comm=comm, backend="fake")
config = Qwen3MoeConfig(
    vocab_size=151936, hidden_size=4096, num_attention_heads=64, num_key_value_heads=4,
    head_dim=128, moe_intermediate_size=1536, num_hidden_layers=3, num_experts=128,
    num_experts_per_tok=8, norm_topk_prob=True, max_position_embeddings=262144,
)
with torch.device("meta"):
    model = CPQwen3MoeForCausalLM(config, parallel_context=ctx).bfloat16()
layer = model.model.layers[0].mlp.experts
held = sum(p.numel() * p.element_size() for p in layer.parameters())
assert held == 4608 * 2**20 // 16, held
cache = model.new_kv_cache(max_tokens=40000)
sequence = cache.new_sequence()
with record_communication() as log:
    logits = model.prefill(cache, [sequence], [torch.zeros(32768, dtype=torch.long)])
    logits = model.decode(cache, [sequence], logits.argmax(-1))
assert (logits.device.type, logits.shape) == ("meta", (1, 151936))
row = 4096 * 2
exchanged = 15 / 16 * 2 * 32768 * row + 3 / 4 * 32768 * 8 * 8
assert log.by_kind["expert_exchange"] == 3 * exchanged, log.by_kind
"""


@pytest.mark.parametrize("rank", [0, 15])
def test_full_size_layers_of_the_235b_run_on_meta_tensors(rank):
    """One rank of 16, with collectives that move nothing: shapes, bytes, and that nothing of a
    device is read."""
    done = subprocess.run(
        [sys.executable, "-c", DRY_RUN, str(rank)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
