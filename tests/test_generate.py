"""transformers' generate on our model gives what it gives on theirs, on every rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, DynamicCache, StoppingCriteria, TextStreamer
from transformers import LogitsProcessor as Processor

from qwen3cp import PagedCacheAdapter
from qwen3cp.errors import InputError, KVCacheFullError
from tests.models import load, random_ids, reference
from tests.ranks import run

TOPOLOGIES = [(1, 1), (2, 1), (1, 2), (2, 2)]
QUESTIONS = [
    "Tom has 12 apples. Tom buys 30 more. How many apples does Tom have now?",
    "There are 6 boxes with 11 coins each. How many coins are there in total?",
    "Ana had 41 pens. Ana gave away 17 of them. How many pens are left?",
]


class Never(Processor):
    """Forbids one token."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids, scores):
        return scores.index_fill(1, torch.tensor([self.token]), float("-inf"))


class AfterLength(StoppingCriteria):
    """Stops every row at a length; on other ranks than 0 it would stop earlier."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        stop = input_ids.shape[1] >= self.length
        return torch.full((len(input_ids),), stop, dtype=torch.bool)


def inputs_of(path: Path, count: int = 3) -> dict[str, torch.Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    texts = [f"Question: {q}\nAnswer:" for q in QUESTIONS[:count]]
    return dict(tokenizer(texts, return_tensors="pt", padding=True))


CASES: dict[str, dict[str, Any]] = {
    "greedy": dict(max_new_tokens=20, do_sample=False),
    "greedy, one row": dict(rows=1, max_new_tokens=20, do_sample=False),
    "stops at the end of text": dict(max_new_tokens=80, do_sample=False),
    "sampling": dict(max_new_tokens=20, do_sample=True, temperature=0.9, top_k=20, top_p=0.95),
    "samples of each": dict(max_new_tokens=8, do_sample=True, num_return_sequences=3),
    "penalties": dict(
        max_new_tokens=12, do_sample=False, repetition_penalty=1.3, no_repeat_ngram_size=2
    ),
    "processors": dict(max_new_tokens=12, do_sample=False, logits_processor=[Never(16)]),
    "stopping criteria": dict(
        max_new_tokens=30, do_sample=False, stopping_criteria=[AfterLength(60)]
    ),
    "stop strings": dict(max_new_tokens=40, do_sample=False, stop_strings=["####", ">>"]),
    "prefill in chunks": dict(max_new_tokens=12, do_sample=False, prefill_chunk_size=4),
    "without a cache": dict(max_new_tokens=6, do_sample=False, use_cache=False),
    "beam search": dict(max_new_tokens=12, do_sample=False, num_beams=3),
    "beam search, several results": dict(
        max_new_tokens=10, do_sample=False, num_beams=4, num_return_sequences=2
    ),
    "beam sampling": dict(max_new_tokens=8, do_sample=True, num_beams=2),
    "prompt lookup": dict(rows=1, max_new_tokens=30, do_sample=False, prompt_lookup_num_tokens=4),
    "crossing a page": dict(rows=2, max_new_tokens=120, do_sample=False, eos_token_id=0),
}


def generate(model: Any, path: Path, name: str) -> torch.Tensor:
    options = dict(CASES[name])
    inputs = inputs_of(path, options.pop("rows", 3))
    if "stop_strings" in options:
        options["tokenizer"] = AutoTokenizer.from_pretrained(path)
    return model.generate(**inputs, **options)


def ours(cp: int, tp: int, path: Path, name: str) -> torch.Tensor:
    model = load(path, cp, tp)
    torch.manual_seed(5 + model.parallel_context.rank)  # rank 0's counts
    return generate(model, path, name)


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_generate_equals_transformers(ranks, checkpoint, name, topology):
    torch.manual_seed(5)
    expected = generate(reference(checkpoint), checkpoint, name)
    results = run(ranks, topology, ours, checkpoint, name)
    for result in results:
        assert result.tolist() == expected.tolist()


def _other_clocks(path: Path) -> torch.Tensor:
    """Ranks whose stopping criteria disagree: rank 0's answer counts."""
    model = load(path, 2, 1)
    limit = AfterLength(40 if model.parallel_context.rank == 0 else 36)
    inputs = inputs_of(path)
    return model.generate(**inputs, max_new_tokens=30, do_sample=False, stopping_criteria=[limit])


def test_rank_0_decides_when_to_stop(ranks, checkpoint):
    first, second = ranks(2).run(_other_clocks, checkpoint)
    assert first.shape[1] == 40
    assert torch.equal(first, second)


def _assisted(path: Path) -> torch.Tensor:
    model = load(path, 2, 1)
    assistant = load(path, 1, 1)
    return model.generate(
        **inputs_of(path, 1), max_new_tokens=20, do_sample=False, assistant_model=assistant
    )


def test_assisted_generation(ranks, checkpoint):
    expected = reference(checkpoint).generate(
        **inputs_of(checkpoint, 1), max_new_tokens=20, do_sample=False
    )
    for result in ranks(2).run(_assisted, checkpoint):
        assert torch.equal(result, expected)


def test_generation_config_of_the_checkpoint_is_read(checkpoint):
    model = load(checkpoint, 1, 1)
    assert model.generation_config.eos_token_id == 510
    assert model.generation_config.pad_token_id == 510
    assert model.generation_config.do_sample is False


def test_streamer_gets_what_transformers_gives(checkpoint):
    class Collect(TextStreamer):
        def __init__(self, tokenizer) -> None:
            super().__init__(tokenizer)
            self.pieces: list[str] = []

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.pieces.append(text)

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    streamed = []
    for model in (load(checkpoint, 1, 1), reference(checkpoint)):
        streamer = Collect(tokenizer)
        model.generate(**inputs_of(checkpoint, 1), max_new_tokens=20, streamer=streamer)
        streamed.append(streamer.pieces)
    assert streamed[0] == streamed[1]
    assert len(streamed[0]) > 3


@pytest.mark.parametrize("padded", [False, True])
def test_generate_goes_on_from_a_returned_cache(checkpoint, padded):
    """A second turn on the pages of the first, as with transformers' own cache."""
    results = []
    for model in (load(checkpoint, 1, 1), reference(checkpoint)):
        inputs = inputs_of(checkpoint, 3 if padded else 1)
        first = model.generate(
            **inputs, max_new_tokens=9, eos_token_id=0, return_dict_in_generate=True
        )
        rows = len(first.sequences)
        turn = torch.cat((first.sequences, torch.arange(6).repeat(rows, 1)), 1)
        new = torch.ones(rows, turn.shape[1] - inputs["attention_mask"].shape[1], dtype=torch.long)
        mask = torch.cat((inputs["attention_mask"], new), 1)
        second = model.generate(
            turn,
            attention_mask=mask,
            past_key_values=first.past_key_values,
            max_new_tokens=9,
            eos_token_id=0,
        )
        results.append(second)
    assert torch.equal(*results)


def _chunks_of_padding(cp: int, tp: int, path: Path) -> torch.Tensor:
    model = load(path, cp, tp)
    return model.generate(**padded_further(path), max_new_tokens=6, prefill_chunk_size=4)


def padded_further(path: Path) -> dict[str, torch.Tensor]:
    """A batch with ten columns of padding before its longest row."""
    inputs = inputs_of(path)
    pad = torch.full((3, 10), 510)
    return dict(
        input_ids=torch.cat((pad, inputs["input_ids"]), 1),
        attention_mask=torch.cat((torch.zeros_like(pad), inputs["attention_mask"]), 1),
    )


@pytest.mark.parametrize("topology", [(1, 1), (2, 1)], ids=str)
def test_chunks_that_are_padding_in_every_row(ranks, checkpoint, topology):
    expected = reference(checkpoint).generate(**padded_further(checkpoint), max_new_tokens=6)
    for result in run(ranks, topology, _chunks_of_padding, checkpoint):
        assert torch.equal(result, expected)


def test_assisted_generation_takes_a_padded_prompt_at_once(checkpoint):
    inputs = {name: x[:1] for name, x in padded_further(checkpoint).items()}
    options = dict(max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=4)
    ours = load(checkpoint, 1, 1).generate(**inputs, **options, prefill_chunk_size=4)
    assert torch.equal(ours, reference(checkpoint).generate(**inputs, **options))


def test_generate_on_pages_of_ones_own(checkpoint):
    model = load(checkpoint, 1, 1)
    cache = model.new_kv_cache(num_pages=8)
    past = PagedCacheAdapter(cache)
    inputs = inputs_of(checkpoint)
    out = model.generate(**inputs, max_new_tokens=5, past_key_values=past)
    assert torch.equal(out, reference(checkpoint).generate(**inputs, max_new_tokens=5))
    assert cache.num_free_pages == 7 - 3
    past.reset()
    assert cache.num_free_pages == 7
    small = PagedCacheAdapter(model.new_kv_cache(num_pages=3))
    with pytest.raises(KVCacheFullError):
        model.generate(**inputs, max_new_tokens=5, past_key_values=small)


def test_a_loop_over_forward_as_with_transformers(checkpoint):
    """model(...), then model(next, past_key_values=...): the pool grows as it must."""
    text = random_ids(2, 400)[0]
    outputs = []
    for model in (load(checkpoint, 1, 1), reference(checkpoint)):
        past, logits = None, []
        with torch.no_grad():
            for piece in text[None].split([3, 250, 1, 1, 145], dim=1):
                out = model(piece, past_key_values=past, use_cache=True)
                past = out.past_key_values
                logits.append(out.logits)
        outputs.append(torch.cat(logits, 1))
    torch.testing.assert_close(*outputs, rtol=0, atol=2e-4)


def _hidden_states(cp: int, tp: int, path: Path, ids, mask) -> list[torch.Tensor]:
    model = load(path, cp, tp)
    out = model(ids, attention_mask=mask, output_hidden_states=True, logits_to_keep=2)
    base = model.model(ids, attention_mask=mask)
    return [out.logits, base.last_hidden_state, *out.hidden_states]


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
def test_hidden_states_come_back_gathered_and_in_order(ranks, checkpoint, topology):
    ids = torch.stack(random_ids(4, 30, 30))
    mask = torch.ones_like(ids)
    mask[0, :11] = 0
    results = run(ranks, topology, _hidden_states, checkpoint, ids, mask)
    with torch.no_grad():
        expected = reference(checkpoint)(ids, attention_mask=mask, output_hidden_states=True)
    real = mask.bool()
    for logits, last, *states in results:
        torch.testing.assert_close(logits, expected.logits[:, -2:], rtol=0, atol=2e-4)
        assert len(states) == len(expected.hidden_states)
        for ours, theirs in zip(states, expected.hidden_states, strict=True):
            torch.testing.assert_close(ours[real], theirs[real], rtol=1e-4, atol=2e-4)
            assert not ours[~real].any()
        assert torch.equal(last, states[-1])


@pytest.mark.parametrize(
    "keep", [0, 1, 7, torch.tensor([5]), torch.tensor([8, 2, 2, 0, -1]), torch.tensor([[1], [3]])]
)
@pytest.mark.parametrize("topology", [(1, 1), (2, 1)], ids=str)
def test_logits_to_keep(ranks, checkpoint, topology, keep):
    ids = torch.stack(random_ids(6, 9, 9))
    with torch.no_grad():
        expected = reference(checkpoint)(ids, logits_to_keep=keep).logits
    results = run(ranks, topology, _kept, checkpoint, ids, keep)
    for result in results:
        torch.testing.assert_close(result, expected, rtol=0, atol=2e-4)


def _kept(cp: int, tp: int, path: Path, ids, keep) -> torch.Tensor:
    return load(path, cp, tp)(ids, logits_to_keep=keep).logits


def test_right_padded_batches_give_transformers_logits(checkpoint):
    ids = torch.stack(random_ids(8, 12, 12))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    model = load(checkpoint, 1, 1)
    with torch.no_grad():
        expected = reference(checkpoint)(ids, attention_mask=mask).logits
    out = model(ids, attention_mask=mask)
    real = mask.bool()
    torch.testing.assert_close(out.logits[real], expected[real], rtol=0, atol=2e-4)
    with pytest.raises(InputError, match="rows \\[1\\] ended with padding"):
        model(ids[:, :1], past_key_values=out.past_key_values)


def test_tuple_output_and_no_cache(checkpoint):
    model = load(checkpoint, 1, 1)
    ids = torch.arange(5)[None]
    assert model(ids, use_cache=False).past_key_values is None
    (logits,) = model(ids, use_cache=False, return_dict=False)
    assert torch.equal(logits, model(ids).logits)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(labels=torch.zeros(1, 5, dtype=torch.long)), "labels"),
        (dict(output_attentions=True), "output_attentions"),
        (dict(output_router_logits=True), "output_router_logits"),
        (dict(inputs_embeds=torch.zeros(1, 5, 256)), "inputs_embeds"),
        (dict(past_key_values=DynamicCache()), "DynamicCache"),
        (dict(position_ids=torch.tensor([[0, 1, 2, 3, 5]])), "position_ids"),
        (dict(attention_mask=torch.ones(1, 4, dtype=torch.long)), "attention_mask"),
        (dict(attention_mask=torch.tensor([[1, 1, 0, 1, 1]])), "padding between"),
        (dict(attention_mask=torch.zeros(1, 5, dtype=torch.long)), "no tokens"),
        (dict(attention_mask=torch.full((1, 5), 2)), "only 0"),
        (dict(attention_mask=torch.ones(1, 1, 5, 5)), "shape"),
        (dict(phase="prefill"), "ForwardPhase"),
        (dict(nonsense=3), "nonsense"),
        (dict(logits_to_keep=-1), "logits_to_keep"),
        (dict(logits_to_keep=torch.tensor([5])), "logits_to_keep"),
    ],
)
def test_forward_refuses_what_it_cannot_honour(checkpoint, options, words):
    with pytest.raises(InputError, match=words):
        load(checkpoint, 1, 1)(torch.arange(5)[None], **options)


def test_generate_refuses_other_caches_and_empty_rows(checkpoint):
    model = load(checkpoint, 1, 1)
    inputs = inputs_of(checkpoint)
    with pytest.raises(InputError, match="cache_implementation"):
        model.generate(**inputs, max_new_tokens=2, cache_implementation="static")
    with pytest.raises(InputError, match="DynamicCache"):
        model.generate(**inputs, max_new_tokens=2, past_key_values=DynamicCache())
    inputs["attention_mask"][1] = 0
    for chunk in (None, 4):
        with pytest.raises(InputError, match="rows \\[1\\]"):
            model.generate(**inputs, max_new_tokens=2, prefill_chunk_size=chunk)


def test_register_auto_is_explicit(checkpoint):
    import subprocess
    import sys

    code = f"""
from transformers import AutoModelForCausalLM
import qwen3cp
before = AutoModelForCausalLM.from_pretrained({str(checkpoint)!r})
qwen3cp.register_auto()
after = AutoModelForCausalLM.from_pretrained({str(checkpoint)!r}, dtype="float32")
print(type(before).__name__, type(after).__name__, after.dtype)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [
        "Qwen3MoeForCausalLM",
        "CPQwen3MoeForCausalLM",
        "torch.float32",
    ]
