"""Users' mistakes: a typed error on every rank, no hang, the cache as it was."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3cp import CommConfig, ForwardPhase, PagedKVCache, ParallelContext, errors
from qwen3cp.errors import InputError, KVCacheFullError
from tests.models import load, random_ids, reference_logits
from tests.ranks import context, run

TOPOLOGIES = [(1, 1), (2, 1), (2, 2)]


class Bench:
    """A model, a cache with one sequence of 130 tokens, and one that was freed."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.cache = model.new_kv_cache(num_pages=6)
        self.used = self.cache.new_sequence()
        self.prompt = random_ids(1, 130)[0]
        model.prefill(self.cache, [self.used], [self.prompt])
        self.freed = self.cache.new_sequence()
        self.cache.free(self.freed)
        self.foreign = model.new_kv_cache(num_pages=3).new_sequence()

    def state(self) -> Any:
        contents = [self.cache.read(self.used, i) for i in range(self.cache.num_layers)]
        return self.cache.num_free_pages, self.used.length, self.used.pages, contents


def prefill(sequences: str, prompts: Any) -> Callable[[Bench], Any]:
    def call(bench: Bench) -> Any:
        named = [getattr(bench, name) for name in sequences.split()]
        return bench.model.prefill(bench.cache, named, prompts)

    return call


def decode(sequences: str, ids: Any) -> Callable[[Bench], Any]:
    def call(bench: Bench) -> Any:
        named = [getattr(bench, name) for name in sequences.split()]
        return bench.model.decode(bench.cache, named, ids)

    return call


MISTAKES: dict[str, tuple[Callable[[Bench], Any], type[Exception], str]] = {
    "empty batch": (prefill("", []), InputError, "empty batch"),
    "empty prompt": (prefill("used", [[]]), InputError, "prompt 0 is empty"),
    "id too large": (prefill("used", [[1, 640]]), InputError, "the id 640, outside .* 0..639"),
    "id negative": (prefill("used", [[1, -3]]), InputError, "the id -3"),
    "float ids": (prefill("used", [torch.ones(3)]), InputError, "int64 or int32.*float32"),
    "bool ids": (prefill("used", [torch.ones(3).bool()]), InputError, "torch.bool"),
    "two axes": (prefill("used", [torch.ones(1, 3).long()]), InputError, "one axis"),
    "no tensor": (prefill("used", ["text"]), InputError, "prompt 0 cannot be read"),
    "fewer prompts": (prefill("used freed", [[1]]), InputError, "2 sequences, but 1 prompts"),
    "freed": (prefill("freed", [[1]]), InputError, "was freed"),
    "foreign": (prefill("foreign", [[1]]), InputError, "another cache"),
    "given twice": (prefill("used used", [[1], [2]]), InputError, "twice"),
    "too long": (prefill("used", [[1] * 8063]), InputError, "8193 tokens.*8192"),
    "full": (prefill("used", [[1] * 600]), KVCacheFullError, "4 pages .* only 3 of 5 are free"),
    "other cache": (
        lambda b: b.model.prefill(
            PagedKVCache(num_layers=2, num_pages=3, kv_width=64, dtype=torch.float32), [], [[1]]
        ),
        InputError,
        "1 prompts",
    ),
    "cache of another model": (
        lambda b: _on_foreign_cache(b),
        InputError,
        "the cache has .* this model needs",
    ),
    "no cache": (
        lambda b: b.model.prefill({}, [b.used], [[1]]),
        InputError,
        "dict, not a PagedKVCache",
    ),
    "decode: id too large": (decode("used", [640]), InputError, "640"),
    "decode: two ids": (decode("used", [1, 2]), InputError, "1 sequences, but 2 next ids"),
    "decode: no ids": (decode("", []), InputError, "empty"),
    "decode: float": (decode("used", torch.ones(1)), InputError, "float32"),
    "decode: freed": (decode("freed", [1]), InputError, "freed"),
    "decode: foreign": (decode("foreign", [1]), InputError, "another cache"),
    "decode: two axes": (decode("used", torch.ones(1, 1).long()), InputError, "one axis"),
    "plan: no tokens": (
        lambda b: b.model.plan(b.cache, [b.used], [0], ForwardPhase.PREFILL),
        InputError,
        "0 new tokens",
    ),
    "forward: mask": (
        lambda b: b.model(torch.ones(1, 4).long(), attention_mask=torch.ones(1, 5).long()),
        InputError,
        "attention_mask has the shape",
    ),
    "forward: empty": (lambda b: b.model(torch.ones(1, 0).long()), InputError, "empty"),
    "forward: float": (lambda b: b.model(torch.ones(1, 4)), InputError, "float32"),
    "forward: one axis": (lambda b: b.model(torch.ones(4).long()), InputError, "batch, columns"),
    "forward: ids": (lambda b: b.model(torch.full((1, 4), 640)), InputError, "640"),
    "forward: nothing": (lambda b: b.model(), InputError, "input_ids is missing"),
    "cache size": (lambda b: b.model.new_kv_cache(), InputError, "either max_tokens or num_pages"),
    "cache of nothing": (lambda b: b.model.new_kv_cache(max_tokens=0), InputError, "positive"),
    "page size": (
        lambda b: b.model.new_kv_cache(max_tokens=9, page_size=1),
        InputError,
        "page_size must be",
    ),
}


def _on_foreign_cache(bench: Bench) -> Any:
    cache = PagedKVCache(num_layers=2, num_pages=3, kv_width=64, dtype=torch.float32)
    return bench.model.prefill(cache, [cache.new_sequence()], [[1]])


def make_mistakes(cp: int, tp: int, path: Path) -> dict[str, tuple[str, str]]:
    """Every mistake on this rank: what was raised. The cache is compared after each; at the end
    the sequence goes on as if nothing had happened."""
    bench = Bench(load(path, cp, tp))
    before = bench.state()
    raised = {}
    for name, (call, _, _) in MISTAKES.items():
        try:
            call(bench)
        except errors.Qwen3CPError as error:
            raised[name] = (type(error).__name__, str(error))
        after = bench.state()
        assert before[:3] == after[:3], name
        for old, new in zip(before[3], after[3], strict=True):
            assert torch.equal(old[0], new[0]) and torch.equal(old[1], new[1]), name
        assert bench.model.parallel_context.phase is None
    logits = bench.model.decode(bench.cache, [bench.used], [7])
    expected = reference_logits(path, torch.cat((bench.prompt, torch.tensor([7]))))[-1]
    torch.testing.assert_close(logits[0], expected, rtol=0, atol=2e-4)
    return raised


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
def test_every_mistake_raises_its_error_on_every_rank(ranks, checkpoint, topology):
    results = run(ranks, topology, make_mistakes, checkpoint)
    for raised in results:
        for name, (_, error_type, words) in MISTAKES.items():
            assert name in raised, f"{name} was not noticed"
            assert raised[name][0] == error_type.__name__, (name, raised[name])
            assert re.search(words, raised[name][1]), (name, raised[name])


def _one_bad_id(cp: int, tp: int, path: Path, lengths: list[int], at: int, bad: int) -> str:
    model = load(path, cp, tp)
    cache = model.new_kv_cache(num_pages=12)
    sequences = [cache.new_sequence() for _ in lengths]
    flat = torch.cat(random_ids(0, *lengths))
    flat[at % len(flat)] = bad
    with pytest.raises(InputError) as caught:
        model.prefill(cache, sequences, list(flat.split(lengths)))
    assert (cache.num_free_pages, [s.length for s in sequences]) == (11, [0] * len(lengths))
    return str(caught.value)


@given(
    st.lists(st.integers(1, 200), min_size=1, max_size=4),
    st.integers(0, 10_000),
    st.one_of(st.integers(-(2**40), -1), st.integers(640, 2**40)),
    st.sampled_from([(1, 1), (2, 1), (2, 2)]),
)
@settings(max_examples=15)
def test_one_id_outside_the_vocabulary_anywhere(ranks, checkpoint, lengths, at, bad, topology):
    messages = run(ranks, topology, _one_bad_id, checkpoint, lengths, at, bad)
    for message in messages:
        assert f"the id {bad}, outside the vocabulary 0..639" in message


def _longer_than_trained(path: Path) -> float:
    model = load(path, 1, 1)
    limit = model.max_sequence_length
    model.max_sequence_length = 5
    try:
        with pytest.raises(InputError, match="max_sequence_length"):
            model(torch.arange(6)[None])
        model.max_sequence_length = 6
        return float(model(torch.arange(6)[None]).logits.abs().max())
    finally:
        model.max_sequence_length = limit


def test_the_length_limit_can_be_raised(checkpoint):
    assert _longer_than_trained(checkpoint) > 0


def one_rank_differs(cp: int, tp: int, path: Path, kind: str) -> tuple[str, str, bool]:
    """The last rank of the world makes another call than the others."""
    model = load(path, cp, tp)
    odd = model.parallel_context.rank == model.parallel_context.world_size - 1
    cache = model.new_kv_cache(num_pages=4)
    sequence = cache.new_sequence()
    ids: Any = [5, 6, 7]
    try:
        if kind == "length":
            model.prefill(cache, [sequence], [ids[:2] if odd else ids])
        elif kind == "ids":
            model.prefill(cache, [sequence], [[5, 6, 8] if odd else ids])
        elif kind == "bad id":
            model.prefill(cache, [sequence], [[5, 6, 640] if odd else ids])
        elif kind == "full cache":
            if odd:
                cache.reserve([cache.new_sequence()], [3 * 128])
            model.prefill(cache, [sequence], [ids])
        elif kind == "rows":
            model(torch.tensor([ids]), logits_to_keep=1 if odd else 2)
        elif kind == "phase":
            model.prefill(cache, [sequence], [ids])
            if odd:
                model.decode(cache, [sequence], [1])
            else:
                model.prefill(cache, [sequence], [[1]])
        elif kind == "not an error of ours":
            prompts: Any = [[object()]] if odd else [ids]
            model.prefill(cache, [sequence], prompts)
    except errors.Qwen3CPError as error:
        unchanged = sequence.length == (3 if kind == "phase" else 0)
        return type(error).__name__, str(error), unchanged
    return "nothing", "", False


@pytest.mark.parametrize("topology", [(2, 1), (1, 2), (2, 2)], ids=str)
@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("length", "InputError"),
        ("ids", "InputError"),
        ("bad id", "InputError"),
        ("full cache", "KVCacheFullError"),
        ("rows", "InputError"),
        ("phase", "InputError"),
        ("not an error of ours", "InputError"),
    ],
)
def test_ranks_that_make_other_calls_are_told_apart_and_do_not_hang(
    ranks, checkpoint, topology, kind, error
):
    cp, tp = topology
    results = ranks(cp * tp).run(one_rank_differs, cp, tp, checkpoint, kind)
    for rank, (name, message, unchanged) in enumerate(results):
        assert name == error, (rank, name, message)
        assert unchanged, rank
        assert f"{cp * tp - 1}" in message or rank == cp * tp - 1


def _without_check(path: Path) -> list[Any]:
    from qwen3cp import CPQwen3MoeForCausalLM
    from qwen3cp.collectives import record_communication

    ctx = context(2, 1, comm=CommConfig(check_plan=False))
    model = CPQwen3MoeForCausalLM.from_pretrained(path, parallel_context=ctx, dtype=torch.float32)
    cache = model.new_kv_cache(max_tokens=100)
    with record_communication() as log:
        logits = model.prefill(cache, [cache.new_sequence()], [[1, 2, 3]])
    return [logits, log.counts]


def test_the_check_can_be_switched_off(ranks, checkpoint):
    expected = reference_logits(checkpoint, torch.tensor([1, 2, 3]))[-1]
    for logits, counts in ranks(2).run(_without_check, checkpoint):
        torch.testing.assert_close(logits[0], expected, rtol=0, atol=2e-4)
        assert "check" not in counts


def _decode_empty(path: Path) -> str:
    model = load(path, 1, 1)
    cache = model.new_kv_cache(num_pages=3)
    with pytest.raises(InputError, match=r"sequences \[0\] are empty") as caught:
        model.decode(cache, [cache.new_sequence()], [1])
    assert cache.num_free_pages == 2
    return str(caught.value)


def test_decode_of_an_empty_sequence_is_refused(checkpoint):
    assert "prefill" in _decode_empty(checkpoint)


def test_a_forward_inside_a_forward_is_refused(checkpoint):
    model = load(checkpoint, 1, 1)
    cache = model.new_kv_cache(num_pages=3)
    sequence = cache.new_sequence()
    with model.parallel_context.forward(ForwardPhase.PREFILL):
        with pytest.raises(errors.ParallelConfigError, match="already in progress"):
            model.prefill(cache, [sequence], [[1]])
    assert (sequence.length, cache.num_free_pages) == (0, 2)
    model.prefill(cache, [sequence], [[1]])


def test_world_of_another_size_is_refused_before_anything_is_started():
    with pytest.raises(errors.ParallelConfigError, match="= 4 ranks, but the world has 1"):
        ParallelContext.from_world(2, 2)
    assert not torch.distributed.is_initialized()


def test_errors_are_value_errors_where_the_caller_is_wrong():
    for name in errors.__all__:
        error = getattr(errors, name)
        assert issubclass(error, errors.Qwen3CPError)
    for error in (
        errors.ParallelConfigError,
        errors.InputError,
        errors.UnsupportedConfigError,
        errors.CheckpointError,
    ):
        assert issubclass(error, ValueError)
