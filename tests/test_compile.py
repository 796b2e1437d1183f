"""torch.compile of the decode step: one graph, one more at the second length, the eager tokens."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.backends.registry import lookup_backend

from qwen3cp import CPQwen3MoeForCausalLM, ForwardPhase, errors
from qwen3cp.collectives import record_communication
from qwen3cp.routing import record_routing
from tests.models import load, random_ids, save_random
from tests.ranks import run

DECODE = ForwardPhase.DECODE
VOCAB = 203
LENGTHS = [100, 300, 1]
# Tokens that are appended between steps, to each sequence: pages are crossed one by one and many
# at a time, and the order of the lengths changes.
GROWTH = [[0, 0, 0], [0, 0, 0], [27, 0, 0], [0, 0, 127], [400, 1, 0], [0, 1000, 300], [0, 0, 900]]


class Graphs:
    """A backend that keeps the graphs that it is given, and runs them as another one does."""

    def __init__(self, backend: str = "aot_eager") -> None:
        self._backend = lookup_backend(backend)
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        self.graphs.append(graph)
        return self._backend(graph, inputs)


def compiled(model: CPQwen3MoeForCausalLM, backend: Any) -> CPQwen3MoeForCausalLM:
    """A model with the same parameters and context whose decode is compiled."""
    torch._dynamo.reset()
    twin = copy.copy(model)
    twin.compile_decode(backend=backend)
    return twin


@dataclass
class Comparison:
    """Of eager and compiled decodes, side by side, on one rank."""

    graphs: list[int] = field(default_factory=list)
    """Compiled so far, after each step."""
    difference: float = 0.0
    """The largest of logits, keys and values."""
    same_tokens: bool = True
    same_communication: bool = True
    operators: list[str] = field(default_factory=list)
    """Of the last graph."""
    inputs: Counter[str] = field(default_factory=Counter)
    """Of the last graph: lengths, and integer tensors by dtype and number of axes."""


def compare(cp: int, tp: int, path: Path, moe: str, backend: str) -> Comparison:
    kwargs: dict[str, Any] = {} if moe == "tp" else {"moe": moe}
    eager = load(path, cp, tp, **kwargs)
    graphs = Graphs(backend)
    models = [eager, compiled(eager, graphs)]
    caches = [eager.new_kv_cache(num_pages=64) for _ in models]
    batches = [[cache.new_sequence() for _ in LENGTHS] for cache in caches]
    found = Comparison()
    for step, growth in enumerate([LENGTHS, *GROWTH]):
        grown = [i for i, new in enumerate(growth) if new]
        prompts = random_ids(step, *[growth[i] for i in grown], vocab_size=VOCAB)
        (ids,) = random_ids(100 + step, len(LENGTHS), vocab_size=VOCAB)
        logits, logs = [], []
        for model, cache, batch in zip(models, caches, batches, strict=True):
            if grown:
                eager.prefill(cache, [batch[i] for i in grown], prompts)
            with record_communication() as log:
                logits.append(model.decode(cache, batch, ids))
            logs.append(log.records)
        found.graphs.append(len(graphs.graphs))
        found.difference = max(found.difference, (logits[0] - logits[1]).abs().max().item())
        found.same_tokens &= torch.equal(logits[0].argmax(-1), logits[1].argmax(-1))
        found.same_communication &= logs[0] == logs[1]
    for layer in range(eager.config.num_hidden_layers):
        for sequences in zip(*batches, strict=True):
            held = [cache.read(s, layer) for cache, s in zip(caches, sequences, strict=True)]
            for x, y in zip(*held, strict=True):
                found.difference = max(found.difference, (x - y).abs().max().item())
    nodes = graphs.graphs[-1].graph.nodes
    found.operators = [str(node.target) for node in nodes if node.op == "call_function"]
    for node in nodes:
        value = node.meta.get("example_value")
        if node.op == "placeholder" and isinstance(value, torch.SymInt):
            found.inputs["length"] += 1
        elif node.op == "placeholder" and not value.is_floating_point():
            found.inputs[f"{value.dtype} {value.dim()}"] += 1
    return found


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Path:
    """A dense layer and one of experts."""
    folder = tmp_path_factory.mktemp("compiled") / "checkpoint"
    return save_random(folder, num_hidden_layers=2, mlp_only_layers=[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "moe", "backend"),
    [((1, 1), "tp", "aot_eager"), ((2, 2), "tp", "aot_eager"), ((2, 2), "ep", "eager")],
    ids=str,
)
def test_one_graph_for_all_lengths(ranks, small, topology, moe, backend):
    results = run(ranks, topology, compare, small, moe, backend)
    for found in results:
        assert found.graphs == [1] + [2] * len(GROWTH)  # the second at the second length
        assert found.same_tokens
        assert found.difference == 0
        assert found.same_communication
        assert sum("fused_infer_attention" in name for name in found.operators) == 2
        # the same collectives on every rank, in the same order
        collectives_of = [n for n in found.operators if n.startswith("qwen3cp.")]
        assert collectives_of == [n for n in results[0].operators if n.startswith("qwen3cp.")]
        reductions = 4 if topology == (2, 2) else 0
        assert sum("all_reduce" in name for name in collectives_of) == reductions
        # what changes from step to step comes in from outside
        assert found.inputs["length"] >= len(LENGTHS)
        assert found.inputs["torch.int32 2"] == 1  # the block table
        assert found.inputs["torch.int64 2"] == 1  # slots
        assert found.inputs["torch.int64 1"] == 2  # ids and positions


def test_compiled_by_hand(small):
    """What `compile_decode` compiles is public, and needs nothing of it."""
    torch._dynamo.reset()
    model, graphs = load(small, 1, 1), Graphs("eager")
    step = torch.compile(model.decode_step, fullgraph=True, backend=graphs)
    cache = model.new_kv_cache(num_pages=16)
    sequence = cache.new_sequence()
    model.prefill(cache, [sequence], random_ids(0, 127, vocab_size=VOCAB))
    for growth in (0, 0, 0, 126, 300):
        if growth:
            model.prefill(cache, [sequence], random_ids(0, growth, vocab_size=VOCAB))
        plan = model.plan(cache, [sequence], [1], DECODE)
        with model.parallel_context.forward(DECODE), torch.no_grad():
            logits = step(torch.tensor([5]), plan, cache)
        expected = model.decode(cache, [sequence], [5])  # writes the same to the same place
        assert torch.equal(logits.float(), expected)
    assert len(graphs.graphs) == 2


def test_batches_that_shrink_and_other_pools(small):
    """A graph for each batch size, however few torch.compile keeps by itself; none for a pool."""
    eager, graphs = load(small, 1, 1), Graphs("eager")
    model = compiled(eager, graphs)
    counts = []
    for size in (3, 2, 1):
        for pages in (20, 21 + size, 70):
            logits = []
            for each in (model, eager):
                cache = each.new_kv_cache(num_pages=pages)
                batch = [cache.new_sequence() for _ in range(size)]
                lengths = [3 + 2 * pages] * size
                each.prefill(cache, batch, random_ids(size, *lengths, vocab_size=VOCAB))
                with torch._dynamo.config.patch(recompile_limit=1):
                    logits.append(each.decode(cache, batch, [7] * size))
            assert torch.equal(*logits)
        counts.append(len(graphs.graphs))
    assert counts == [2, 3, 4]


def test_generate_and_forward(small):
    eager, graphs = load(small, 1, 1), Graphs("eager")
    model = compiled(eager, graphs)
    ids = torch.stack(random_ids(3, 120, 120, vocab_size=VOCAB))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    arguments = dict(attention_mask=mask, max_new_tokens=20, do_sample=False)
    expected = eager.generate(ids, **arguments)
    assert torch.equal(model.generate(ids, **arguments), expected)
    assert len(graphs.graphs) == 2
    # hidden states are not a result of the step
    past = model(ids).past_key_values
    output = model(ids[:, :1], past_key_values=past, phase=DECODE, output_hidden_states=True)
    assert len(output.hidden_states) == 3
    assert len(graphs.graphs) == 2


def test_routing_is_recorded_eagerly(small):
    eager, graphs = load(small, 1, 1), Graphs("eager")
    model = compiled(eager, graphs)
    cache = model.new_kv_cache(num_pages=8)
    batch = [cache.new_sequence() for _ in range(2)]
    model.prefill(cache, batch, random_ids(0, 4, 9, vocab_size=VOCAB))
    with record_routing() as log:
        model.decode(cache, batch, [1, 2])
    assert sum(sum(rows) for rows in log.report(model).rows_per_expert) == 2 * 2
    assert not graphs.graphs


def test_a_copy_runs_its_own_weights(small):
    model = compiled(load(small, 1, 1), "eager")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.mul_(2)
    logits = []
    for each in (model, twin):
        cache = each.new_kv_cache(num_pages=8)
        sequence = cache.new_sequence()
        each.prefill(cache, [sequence], random_ids(0, 9, vocab_size=VOCAB))
        logits.append(each.decode(cache, [sequence], [5]))
    assert torch.equal(logits[1], 2 * logits[0])


def test_disable_ends_it(small):
    model, graphs = compiled(load(small, 1, 1), graphs := Graphs("eager")), graphs
    model.compile_decode(disable=True)
    cache = model.new_kv_cache(num_pages=8)
    sequence = cache.new_sequence()
    model.prefill(cache, [sequence], random_ids(0, 9, vocab_size=VOCAB))
    model.decode(cache, [sequence], [5])
    assert not graphs.graphs


def failure_in_a_graph(cp: int, tp: int, path: Path) -> list[Any]:
    """A compiled step with a collective that fails, and the same step again."""
    model = compiled(load(path, cp, tp), "eager")
    cache = model.new_kv_cache(num_pages=8)
    sequence = cache.new_sequence()
    model.prefill(cache, [sequence], random_ids(0, 9, vocab_size=VOCAB))
    expected = model.decode(cache, [sequence], [5])
    cache.truncate(sequence, 9)
    all_reduce = dist.all_reduce

    def failing(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("Connection closed by peer")

    dist.all_reduce = failing
    try:
        model.decode(cache, [sequence], [5])
        message = ""
    except errors.CommunicationError as error:
        message = str(error)
    finally:
        dist.all_reduce = all_reduce
    length = sequence.length
    again = model.decode(cache, [sequence], [5])
    return [message, length, torch.equal(again, expected)]


def test_a_failing_collective_is_named(ranks, small):
    for message, length, same in ranks(2).run(failure_in_a_graph, 1, 2, small):
        assert "all_reduce over 2 ranks" in message
        assert length == 9
        assert same


def test_the_kernel_checks_lengths_when_the_graph_runs(small):
    """The graph has symbols in their place; what a caller gives is checked all the same."""
    torch._dynamo.reset()
    model = load(small, 1, 1)
    step = torch.compile(model.decode_step, fullgraph=True, backend="aot_eager")
    cache = model.new_kv_cache(num_pages=8)
    sequence = cache.new_sequence()
    model.prefill(cache, [sequence], random_ids(0, 9, vocab_size=VOCAB))
    with model.parallel_context.forward(DECODE), torch.no_grad():
        for _ in range(2):
            plan = model.plan(cache, [sequence], [1], DECODE)
            step(torch.tensor([5]), plan, cache)
            cache.commit([sequence], [1])
        plan = model.plan(cache, [sequence], [1], DECODE)
        (call,) = plan.calls
        wrong = replace(plan, calls=(replace(call, kv_lengths=[5000]),))
        with pytest.raises(ValueError, match="between 0 and 256"):
            step(torch.tensor([5]), wrong, cache)
