"""Continuous batching: what is shared, what is in the batch, which pages; against transformers."""

from collections import Counter
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3cp import ForwardPhase
from qwen3cp.errors import KVCacheFullError
from qwen3cp.eval import batching
from qwen3cp.eval.batching import Batch, Generated, Run, Scored, shared_prefixes, sharing_order
from tests.models import load, random_ids, reference, reference_logits


def tokens_of(*values: int) -> np.ndarray:
    return np.asarray(values, np.int32)


# ------------------------------------------------------------------------------- pure functions


def common(a: np.ndarray, b: np.ndarray) -> int:
    length = 0
    for x, y in zip(a.tolist(), b.tolist(), strict=False):
        if x != y:
            break
        length += 1
    return length


small_runs = st.lists(
    st.lists(st.integers(0, 2), min_size=1, max_size=12).map(lambda x: tokens_of(*x)),
    min_size=1,
    max_size=12,
)


@given(small_runs, st.integers(1, 4), st.data())
def test_shared_prefixes(runs, least, data):
    runs = [runs[i] for i in sharing_order(runs)]
    assert [r.tolist() for r in runs] == sorted(r.tolist() for r in runs)
    limits = [data.draw(st.integers(0, len(run))) for run in runs]
    prefixes = shared_prefixes(runs, limits, least)
    users = Counter()
    seen = {}
    for run, limit, prefix in zip(runs, limits, prefixes, strict=True):
        if prefix is None:
            continue
        users[id(prefix)] += 1
        assert prefix.length <= limit
        assert prefix.tokens.tolist() == run[: prefix.length].tolist()
        while prefix is not None and id(prefix) not in seen:
            seen[id(prefix)] = prefix
            parent = prefix.parent
            assert prefix.length - (parent.length if parent else 0) >= least
            if parent is not None:
                assert prefix.tokens[: parent.length].tolist() == parent.tokens.tolist()
                users[id(parent)] += 1
            prefix = parent
    assert {key: prefix.users for key, prefix in seen.items()} == users
    assert all(count >= 2 for count in users.values())


@given(small_runs)
def test_all_that_is_shared_is_shared(runs):
    """Without limits, a run begins with the longest that it has in common with any other."""
    runs = [runs[i] for i in sharing_order(runs)]
    prefixes = shared_prefixes(runs, [len(run) for run in runs], 1)
    for i, prefix in enumerate(prefixes):
        others = [common(runs[i], other) for j, other in enumerate(runs) if j != i]
        assert (prefix.length if prefix else 0) == max(others, default=0)


@given(st.lists(st.integers(0, 50), max_size=20), st.integers(1, 30), st.integers(1, 5))
def test_packed(lengths, most_tokens, most_rows):
    forwards = list(batching._packed(lengths, most_tokens, most_rows))
    placed = [(w, i) for parts in forwards for w, start, stop in parts for i in range(start, stop)]
    assert placed == [(w, i) for w, length in enumerate(lengths) for i in range(length)]
    for parts in forwards:
        assert 1 <= len(parts) <= most_rows
        assert sum(stop - start for _, start, stop in parts) <= most_tokens
        assert len({which for which, _, _ in parts}) == len(parts)


# -------------------------------------------------------------------------------------- batches


@pytest.fixture(scope="module")
def model(checkpoint):
    return load(checkpoint, 1, 1)


def generation(ids: torch.Tensor, most: int, **options) -> Run:
    tokens = ids.numpy().astype(np.int32)
    return Run(tokens=tokens, first_wanted=len(tokens) - 1, max_new_tokens=most, **options)


def run_all(model, cache, runs, **options) -> list:
    batch = Batch(model, cache, **{"max_rows": 64, "prefill_tokens": 4096, **options})
    results = dict(batch.run(runs))
    assert cache.num_free_pages == cache.num_pages - 1
    return [results[i] for i in range(len(runs))]


class Watch:
    """Rows of each decode, and attention calls of each plan."""

    def __init__(self, model, cache, monkeypatch) -> None:
        self.decodes, self.prefills, self.calls = [], [], []
        plan = cache.plan

        def watched(sequences, new_lengths, phase, ctx):
            made = plan(sequences, new_lengths, phase, ctx)
            if phase is ForwardPhase.DECODE:
                self.decodes.append(len(sequences))
                self.calls.append(made.num_attention_calls)
                self.events.append("decode")
            else:
                self.prefills.append(sum(new_lengths))
                self.events.append("prefill")
            return made

        self.events = []
        monkeypatch.setattr(cache, "plan", watched)


@pytest.fixture(scope="module")
def expected(checkpoint):
    """Prompts and transformers' greedy continuations."""
    prompts = [*random_ids(3, 5, 140, 1, 33, 260, 80), torch.arange(200) % 640]
    prompts += [torch.cat((prompts[4], more)) for more in random_ids(4, 9, 30)]
    prompts += [torch.cat((prompts[4][:150], more)) for more in random_ids(5, 3, 40)]
    answers = []
    for ids in prompts:
        out = reference(checkpoint).generate(
            ids[None],
            attention_mask=torch.ones_like(ids)[None],
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
        )
        answers.append(out[0, len(ids) :].tolist())
    return prompts, answers


@pytest.mark.parametrize(
    "options",
    [
        {"max_rows": 64, "num_pages": 100, "prefill_tokens": 4096},
        {"max_rows": 1, "num_pages": 5, "prefill_tokens": 64},
        {"max_rows": 3, "num_pages": 6, "prefill_tokens": 100},
        {"max_rows": 64, "num_pages": 9, "prefill_tokens": 1000},
    ],
    ids=["roomy", "one row", "tight", "few pages"],
)
def test_generates_what_transformers_does(model, expected, options):
    prompts, answers = expected
    cache = model.new_kv_cache(num_pages=options.pop("num_pages"))
    runs = [generation(ids, 1 + i) for i, ids in enumerate(prompts)]
    results = run_all(model, cache, runs, **options)
    assert [r.tokens for r in results] == [a[: 1 + i] for i, a in enumerate(answers)]


def test_log_probabilities_of_an_answer(model, checkpoint, expected):
    prompts, answers = expected
    cache = model.new_kv_cache(num_pages=100)
    (result,) = run_all(model, cache, [generation(prompts[1], 12)])
    whole = torch.cat((prompts[1], torch.tensor(answers[1])))
    logprobs = reference_logits(checkpoint, whole).log_softmax(-1)
    wanted = [float(logprobs[len(prompts[1]) - 1 + i, t]) for i, t in enumerate(answers[1])]
    assert result.logprobs == pytest.approx(wanted, abs=1e-4)


def test_a_waiting_run_takes_the_place_of_one_that_ends(model, expected, monkeypatch):
    """In the step in which one ends, the next is prefilled: no decode has an empty row."""
    prompts, _ = expected
    cache = model.new_kv_cache(num_pages=100)
    watch = Watch(model, cache, monkeypatch)
    lengths = [3, 9, 5, 4, 7]
    runs = [generation(p, n) for p, n in zip(random_ids(1, 6, 9, 4, 7, 8), lengths, strict=True)]
    run_all(model, cache, runs, max_rows=2)
    tokens = sum(lengths) - len(runs)  # the first of each comes from its prefill
    together = tokens - 2 * watch.decodes.count(2)
    assert watch.decodes == [2] * watch.decodes.count(2) + [1] * together
    # 2 rows at once, then one by one: a prefill right after the decode in which a row ended
    order = [runs[i] for i in sharing_order([run.tokens for run in runs])]
    remaining = [run.max_new_tokens - 1 for run in order]
    events, running = ["prefill"], [remaining.pop(0), remaining.pop(0)]
    while running:
        running = [left - 1 for left in running]
        events.append("decode")
        freed = running.count(0)
        running = [left for left in running if left]
        if freed and remaining:
            running += [remaining.pop(0) for _ in range(min(freed, len(remaining)))]
            events.append("prefill")
    assert watch.events == events


def test_admission_counts_pages_as_the_attention_call_does(model, monkeypatch):
    """Four rows that share three pages fit into eight, but one call takes only two of them."""
    prefix, *ends = random_ids(7, 3 * 128, 9, 9, 9, 9)
    runs = [generation(torch.cat((prefix, end)), 4) for end in ends]
    cache = model.new_kv_cache(num_pages=9)
    watch = Watch(model, cache, monkeypatch)
    run_all(model, cache, runs)
    assert set(watch.calls) == {1}
    assert max(watch.decodes) == 2
    # with room for all, all run together
    cache = model.new_kv_cache(num_pages=16)
    watch = Watch(model, cache, monkeypatch)
    run_all(model, cache, runs)
    assert watch.decodes == [4, 4, 4] and set(watch.calls) == {1}


def test_shared_beginnings_run_once(model, monkeypatch):
    shots, *questions = random_ids(8, 200, 60, 60, 30)
    endings = [
        torch.cat((shots, question, x)) for question in questions for x in random_ids(9, 5, 6)
    ]
    cache = model.new_kv_cache(num_pages=100)
    watch = Watch(model, cache, monkeypatch)
    run_all(model, cache, [generation(ids, 1) for ids in endings])
    assert sum(watch.prefills) == 200 + (60 + 60 + 30) + 3 * (5 + 6)
    assert len(watch.prefills) == 3  # all prefixes of a depth in one forward
    # a prefix that another run is, too: its last token is run again for its logits
    watch.prefills.clear()
    run_all(model, cache, [generation(shots, 1), *(generation(e, 1) for e in endings[:2])])
    assert sum(watch.prefills) == 199 + 1 + (61 + 5 + 6)


def test_long_prompts_go_in_chunks(model, monkeypatch):
    cache = model.new_kv_cache(num_pages=100)
    watch = Watch(model, cache, monkeypatch)
    run_all(model, cache, [generation(random_ids(2, 700)[0], 1)], prefill_tokens=256)
    assert watch.prefills == [256, 256, 188]


def test_scores(model, checkpoint, monkeypatch):
    """Log-probabilities, and never the logits of all tokens at once."""
    ids = random_ids(6, 300)[0]
    best = int(reference_logits(checkpoint, ids)[-1].argmax())
    sizes = []
    logits_of = type(model)._logits

    def watched(self, hidden, residual, plan, tokens):
        sizes.append(len(tokens))
        return logits_of(self, hidden, residual, plan, tokens)

    monkeypatch.setattr(type(model), "_logits", watched)
    monkeypatch.setattr(batching, "CHUNK_LOGITS", 16 * model.vocab_size)
    cache = model.new_kv_cache(num_pages=100)
    run = Run(tokens=ids.numpy().astype(np.int32), first_wanted=250, choices=(3, best, 7))
    other = Run(tokens=run.tokens[:280], first_wanted=260, choices=(5,))
    first, second = run_all(model, cache, [run, other])
    assert max(sizes) <= 16 and sum(sizes) == 50 + 20
    logprobs = reference_logits(checkpoint, ids).log_softmax(-1)
    nexts = ids[251:].tolist()
    wanted = [float(logprobs[250 + i, token]) for i, token in enumerate(nexts)]
    wanted += [float(logprobs[-1, token]) for token in (3, best, 7)]
    assert isinstance(first, Scored)
    assert first.logprobs == pytest.approx(wanted, abs=1e-3)
    likeliest = logprobs.argmax(-1)[250:].tolist()
    greedy = [token == likeliest[i] for i, token in enumerate(nexts)] + [False, True, False]
    assert first.greedy == greedy
    assert second.logprobs[:-1] == pytest.approx(wanted[10:29], abs=1e-3)


def test_one_row_serves_all_choices_of_a_context(model, monkeypatch):
    wanted = []
    logits_of = type(model)._logits

    def watched(self, hidden, residual, plan, tokens):
        wanted.append(len(tokens))
        return logits_of(self, hidden, residual, plan, tokens)

    monkeypatch.setattr(type(model), "_logits", watched)
    tokens = random_ids(6, 40)[0].numpy().astype(np.int32)
    cache = model.new_kv_cache(num_pages=5)
    (result,) = run_all(model, cache, [Run(tokens=tokens, first_wanted=39, choices=(1, 2, 3, 4))])
    assert wanted == [1] and len(result.logprobs) == 4


def test_a_run_without_room_is_refused_before_any_forward(model, monkeypatch):
    cache = model.new_kv_cache(num_pages=3)
    watch = Watch(model, cache, monkeypatch)
    fits = generation(random_ids(0, 250)[0], 7)  # the last new token is not run
    assert run_all(model, cache, [fits])
    watch.events.clear()
    with pytest.raises(KVCacheFullError, match="needs 257 tokens.*256.*cache_tokens"):
        run_all(model, cache, [generation(random_ids(0, 5)[0], 1), generation(fits_ids(), 8)])
    assert watch.events == []


def fits_ids() -> torch.Tensor:
    return random_ids(0, 250)[0]


@pytest.mark.parametrize("fails", [1, 2, 9])
def test_all_pages_are_free_after_an_error(model, expected, fails):
    prompts, _ = expected
    cache = model.new_kv_cache(num_pages=12)
    count = 0

    def ends(new: list[int]) -> bool:
        nonlocal count
        count += 1
        if count == fails:
            raise RuntimeError("stop")
        return False

    batch = Batch(model, cache, max_rows=3, prefill_tokens=100)
    with pytest.raises(RuntimeError, match="stop"):
        list(batch.run([generation(ids, 6, ends=ends) for ids in prompts]))
    assert cache.num_free_pages == cache.num_pages - 1
    # and after a caller that takes no more answers
    answers = batch.run([generation(ids, 3) for ids in prompts])
    assert isinstance(next(answers)[1], Generated)
    cast(Any, answers).close()
    assert cache.num_free_pages == cache.num_pages - 1
    assert len(run_all(model, cache, [generation(ids, 2) for ids in prompts])) == len(prompts)


@settings(max_examples=12)
@given(data=st.data())
def test_little_room_changes_no_answer(model, data):
    """Whatever is shared, however few the pages: the same answers as with room for all."""
    pool = random_ids(11, 300)[0]
    lengths = data.draw(st.lists(st.integers(1, 300), min_size=2, max_size=6))
    runs = []
    for i, length in enumerate(lengths):
        ids = pool[:length].clone()
        ids[data.draw(st.integers(0, length - 1)) :] += i  # shares what is before
        runs.append(generation(ids % 640, data.draw(st.integers(1, 4))))
    large = run_all(model, model.new_kv_cache(num_pages=60), runs)
    least = 1 + max(-(-run.longest // 128) for run in runs)
    small = run_all(
        model,
        model.new_kv_cache(num_pages=least + data.draw(st.integers(0, 3))),
        runs,
        max_rows=data.draw(st.integers(1, 4)),
        prefill_tokens=data.draw(st.sampled_from([50, 128, 500])),
    )
    for a, b in zip(large, small, strict=True):
        assert a.tokens == b.tokens and a.logprobs == pytest.approx(b.logprobs, abs=1e-3)
