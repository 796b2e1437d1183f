"""Logits, tokens and cache contents equal transformers', on every topology, real ranks."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models import (
    NEAR_TIE,
    TOLERANCE,
    TOPOLOGIES,
    load,
    random_ids,
    reference_logits,
)
from tests.ranks import run

LENGTHS = (1, 2, 3, 7, 127, 128, 129, 1000)


def assert_same_on_all_ranks(results: list[list[torch.Tensor]]) -> None:
    for rank, result in enumerate(results):
        for ours, first in zip(result, results[0], strict=True):
            assert torch.equal(ours, first), f"rank {rank} has other bits than rank 0"


def assert_close(ours: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=0, atol=TOLERANCE)


def all_logits(cp: int, tp: int, path: Path, prompts: list[torch.Tensor]) -> list[torch.Tensor]:
    """Logits of all positions of each prompt by itself, then prefill and decode of the batch."""
    model = load(path, cp, tp)
    alone = [model(ids[None], use_cache=False).logits[0] for ids in prompts]
    cache = model.new_kv_cache(num_pages=40)
    sequences = [cache.new_sequence() for _ in prompts]
    first = model.prefill(cache, sequences, prompts)
    second = model.decode(cache, sequences, torch.arange(len(prompts)))
    assert [s.length for s in sequences] == [len(ids) + 1 for ids in prompts]
    return [*alone, first, second]


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
def test_logits_of_all_lengths_alone_and_in_one_batch(ranks, checkpoint, topology):
    prompts = random_ids(0, *LENGTHS)
    results = run(ranks, topology, all_logits, checkpoint, prompts)
    assert_same_on_all_ranks(results)
    *alone, first, second = results[0]
    for i, ids in enumerate(prompts):
        expected = reference_logits(checkpoint, torch.cat((ids, torch.tensor([i]))))
        assert_close(alone[i], expected[:-1])
        assert_close(first[i], expected[-2])
        assert_close(second[i], expected[-1])


def chunked(
    cp: int, tp: int, path: Path, prompts: list[torch.Tensor], chunks: list[list[int]]
) -> list[torch.Tensor]:
    """Prefills each prompt in chunks of the given sizes, the batch shrinking as prompts end; then
    a decode step and one more prefill of 5 tokens. Returns the last logits and the cache."""
    model = load(path, cp, tp)
    cache = model.new_kv_cache(num_pages=30)
    sequences = [cache.new_sequence() for _ in prompts]
    pieces = [torch.split(ids, sizes) for ids, sizes in zip(prompts, chunks, strict=True)]
    for step in range(max(len(p) for p in pieces)):
        rows = [i for i, p in enumerate(pieces) if step < len(p)]
        model.prefill(cache, [sequences[i] for i in rows], [pieces[i][step] for i in rows])
    decoded = model.decode(cache, sequences, [3] * len(prompts))
    more = [torch.arange(5) + i for i in range(len(prompts))]
    continued = model.prefill(cache, sequences, more)
    contents = [
        torch.cat(cache.read(s, layer), -1) for s in sequences for layer in range(cache.num_layers)
    ]
    return [decoded, continued, *contents]


@st.composite
def prompts_in_chunks(draw):
    lengths = draw(st.lists(st.integers(1, 200), min_size=1, max_size=3))
    chunks = []
    for length in lengths:
        cuts = draw(st.sets(st.integers(1, max(1, length - 1)), max_size=4))
        edges = [0, *sorted(c for c in cuts if c < length), length]
        chunks.append([b - a for a, b in itertools.pairwise(edges)])
    return lengths, chunks, draw(st.integers(0, 1000))


@given(prompts_in_chunks())
@settings(max_examples=8)
def test_prefill_in_chunks_then_decode_then_prefill_again(ranks, checkpoint, case):
    lengths, chunks, seed = case
    prompts = random_ids(seed, *lengths)
    whole = run(ranks, (1, 1), chunked, checkpoint, prompts, [[n] for n in lengths])[0]
    for topology in TOPOLOGIES:
        results = run(ranks, topology, chunked, checkpoint, prompts, chunks)
        assert_same_on_all_ranks([r[:2] for r in results])
        decoded, continued = results[0][:2]
        for i, ids in enumerate(prompts):
            text = torch.cat((ids, torch.tensor([3]), torch.arange(5) + i))
            expected = reference_logits(checkpoint, text)
            assert_close(decoded[i], expected[-6])
            assert_close(continued[i], expected[-1])
        # the cache holds the same keys and values, position by position, in each TP rank's heads
        cp, tp = topology
        for rank, (_, _, *contents) in enumerate(results):
            heads = slice(rank % tp, None, tp)
            for ours, all_heads in zip(contents, whole[2:], strict=True):
                expected = all_heads.view(len(all_heads), 2, tp, -1)[:, :, heads].flatten(1)
                torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def forked(cp: int, tp: int, path: Path, prompt: torch.Tensor) -> list[torch.Tensor]:
    """Forks after a prefill and again after a decode step; each branch goes its own way."""
    model = load(path, cp, tp)
    cache = model.new_kv_cache(num_pages=24)
    root = cache.new_sequence()
    model.prefill(cache, [root], [prompt])
    left, right = cache.fork(root), cache.fork(root)
    a = model.decode(cache, [root, left, right], [1, 2, 3])
    late = cache.fork(left)
    b = model.prefill(cache, [right, late], [torch.arange(7), torch.arange(3)])
    c = model.decode(cache, [late, right, root, left], [4, 5, 6, 7])
    for sequence in (root, left, right, late):
        cache.free(sequence)
    assert cache.num_free_pages == cache.num_pages - 1
    return [a, b, c]


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
@pytest.mark.parametrize("length", [1, 128, 300])
def test_forked_sequences(ranks, checkpoint, topology, length):
    (prompt,) = random_ids(7, length)
    results = run(ranks, topology, forked, checkpoint, prompt)
    assert_same_on_all_ranks(results)
    a, b, c = results[0]

    def expect(*ids: int) -> torch.Tensor:
        return reference_logits(checkpoint, torch.cat((prompt, torch.tensor(ids))))[-1]

    for i, ids in enumerate([(1,), (2,), (3,)]):
        assert_close(a[i], expect(*ids))
    for i, ids in enumerate([(3, *range(7)), (2, *range(3))]):
        assert_close(b[i], expect(*ids))
    for i, ids in enumerate([(2, *range(3), 4), (3, *range(7), 5), (1, 6), (2, 7)]):
        assert_close(c[i], expect(*ids))


def step_by_step(cp: int, tp: int, path: Path, text: torch.Tensor) -> list[torch.Tensor]:
    model = load(path, cp, tp)
    cache = model.new_kv_cache(max_tokens=300)
    sequence = cache.new_sequence()
    logits = [model.prefill(cache, [sequence], [text[:1]])]
    logits += [model.decode(cache, [sequence], token[None]) for token in text[1:]]
    return [torch.cat(logits)]


@pytest.mark.parametrize("topology", [(1, 1), (2, 2)], ids=str)
def test_decoding_step_by_step_equals_one_prefill(ranks, checkpoint, topology):
    (text,) = random_ids(3, 140)  # crosses a page
    results = run(ranks, topology, step_by_step, checkpoint, text)
    assert_close(results[0][0], reference_logits(checkpoint, text))


@given(
    st.lists(st.integers(1, 150), min_size=1, max_size=4),
    st.integers(0, 1000),
    st.sampled_from(TOPOLOGIES),
)
@settings(max_examples=12)
def test_greedy_tokens_of_any_batch_equal_transformers(ranks, checkpoint, lengths, seed, topology):
    prompts = random_ids(seed, *lengths)
    results = run(ranks, topology, greedy, checkpoint, prompts, 5)
    assert_same_on_all_ranks(results)
    for ids, ours in zip(prompts, results[0][0], strict=True):
        assert_greedy(checkpoint, ids, ours)


def run_program(cp: int, tp: int, path: Path, program: list[tuple]) -> list[torch.Tensor]:
    """Runs calls on one cache; returns the logits of each call that gives some."""
    model = load(path, cp, tp)
    cache = model.new_kv_cache(num_pages=16)
    sequences = {}
    logits = []
    for call, *arguments in program:
        if call == "prefill":
            names, pieces = arguments
            for name in names:
                sequences.setdefault(name, cache.new_sequence())
            logits.append(model.prefill(cache, [sequences[n] for n in names], pieces))
        elif call == "decode":
            names, tokens = arguments
            logits.append(model.decode(cache, [sequences[n] for n in names], tokens))
        elif call == "fork":
            source, name = arguments
            sequences[name] = cache.fork(sequences[source])
        elif call == "truncate":
            name, length = arguments
            cache.truncate(sequences[name], length)
        elif call == "free":
            cache.free(sequences.pop(*arguments))
    for sequence in sequences.values():
        cache.free(sequence)
    assert cache.num_free_pages == cache.num_pages - 1
    return logits


@st.composite
def programs(draw):
    """A program for `run_program`, and the text whose last logits each row of its logits is."""
    texts: dict[int, list[int]] = {}
    program, expected = [], []
    count = 0

    def some_tokens(most: int) -> list[int]:
        length, seed = draw(st.integers(1, most)), draw(st.integers(0, 99))
        return random_ids(seed, length)[0].tolist()

    for _ in range(draw(st.integers(2, 8))):
        calls = ["prefill"] + ["prefill", "decode", "decode", "fork", "truncate", "free"] * bool(
            texts
        )
        call = draw(st.sampled_from(calls))
        if call in ("prefill", "decode"):
            names = draw(st.lists(st.sampled_from(sorted(texts)), unique=True)) if texts else []
            if call == "prefill" and (not names or draw(st.booleans())) and len(texts) < 4:
                names.append(count)
                count += 1
            if not names:
                continue
            most = 150 if call == "prefill" else 1
            pieces = [some_tokens(most) for _ in names]
            if any(
                len(texts.get(n, [])) + len(p) > 380 for n, p in zip(names, pieces, strict=True)
            ):
                continue
            for name, piece in zip(names, pieces, strict=True):
                texts[name] = [*texts.get(name, []), *piece]
            program.append((call, names, pieces if call == "prefill" else sum(pieces, [])))
            expected.append([list(texts[name]) for name in names])
        elif call == "fork" and len(texts) < 4:
            source = draw(st.sampled_from(sorted(texts)))
            texts[count] = list(texts[source])
            program.append((call, source, count))
            count += 1
        elif call == "truncate":
            name = draw(st.sampled_from(sorted(texts)))
            length = draw(st.integers(1, len(texts[name])))
            texts[name] = texts[name][:length]
            program.append((call, name, length))
        elif call == "free":
            name = draw(st.sampled_from(sorted(texts)))
            del texts[name]
            program.append((call, name))
    return program, expected


@given(programs(), st.sampled_from(TOPOLOGIES))
@settings(max_examples=40)
def test_any_program_of_calls(ranks, checkpoint, case, topology):
    """Prefills, decodes, forks, truncations and frees in any order, on shared pages."""
    program, expected = case
    results = run(ranks, topology, run_program, checkpoint, program)
    assert_same_on_all_ranks(results)
    for logits, texts in zip(results[0], expected, strict=True):
        for row, text in zip(logits, texts, strict=True):
            assert_close(row, reference_logits(checkpoint, torch.tensor(text))[-1])


def test_caches_can_be_made_in_inference_mode_and_used_outside(checkpoint):
    model = load(checkpoint, 1, 1)
    (text,) = random_ids(4, 7)
    with torch.inference_mode():
        cache = model.new_kv_cache(num_pages=3)
        root = cache.new_sequence()
        model.prefill(cache, [root], [text[:4]])
    model.decode(cache, [root], text[4:5])
    cache.grow(6)
    with torch.inference_mode():
        fork = cache.fork(root)
        cache.grow(7)
        model.decode(cache, [fork], text[5:6])
    logits = model.decode(cache, [fork], text[6:])
    assert_close(logits[0], reference_logits(checkpoint, text)[-1])


def greedy(
    cp: int, tp: int, path: Path, prompts: list[torch.Tensor], steps: int
) -> list[torch.Tensor]:
    model = load(path, cp, tp)
    cache = model.new_kv_cache(num_pages=64)
    sequences = [cache.new_sequence() for _ in prompts]
    logits = model.prefill(cache, sequences, prompts)
    tokens = [logits.argmax(-1)]
    for _ in range(steps - 1):
        tokens.append(model.decode(cache, sequences, tokens[-1]).argmax(-1))
    return [torch.stack(tokens, 1)]


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
def test_greedy_tokens_equal_transformers(ranks, checkpoint, topology):
    """The first problems of the file, and one of each longer kind."""
    import json

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    lines = [json.loads(x) for x in (checkpoint / "problems-test.jsonl").open()]
    chosen = lines[:3] + [next(x for x in lines if x["kind"] == k) for k in ("facts", "long")]
    prompts = [
        tokenizer(f"Question: {x['question']}\nAnswer:", return_tensors="pt").input_ids[0]
        for x in chosen
    ]
    results = run(ranks, topology, greedy, checkpoint, prompts, 24)
    assert_same_on_all_ranks(results)
    for ids, ours in zip(prompts, results[0][0], strict=True):
        assert_greedy(checkpoint, ids, ours)


def assert_greedy(path: Path, prompt: torch.Tensor, tokens: torch.Tensor) -> None:
    """The tokens are transformers' own, up to the first near tie, where either will do."""
    logits = reference_logits(path, torch.cat((prompt, tokens)))[len(prompt) - 1 : -1]
    for step, (token, row) in enumerate(zip(tokens, logits, strict=True)):
        best = row.topk(2).values
        if token != row.argmax():
            assert best[0] - best[1] < NEAR_TIE, f"token {step} differs and was no tie"
            assert row[token] > best[0] - NEAR_TIE, f"token {step} is not one of the tie"
            return
