"""CP, TP and EP on devices: the bundled checkpoint gives the same answers on every topology."""

from __future__ import annotations

import json

import pytest
import torch

from qwen3cp import CPQwen3MoeForCausalLM
from qwen3cp.ops import settings
from tests.conftest import CHECKPOINT
from tests.models import random_ids, reference_logits

pytestmark = pytest.mark.npu

PROBLEMS = {
    "Question: Mia has 12 flowers. Mia buys 15 more. How many flowers does Mia have now?\n"
    "Answer:": "#### 27",
    "Question: There are 6 boxes with 12 toys each. How many toys are there in total?\n"
    "Answer:": "#### 72",
}
TOPOLOGIES = [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)]
OPTIONS = {
    "exact": [],
    "experts divided, all-gather": ["--moe", "ep", "--exchange", "all_gather"],
    "experts divided, all-to-all": ["--moe", "ep", "--exchange", "all_to_all"],
    "int8": ["--int8", "two_step", "--min-bytes", "0", "--int8-kv"],
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("cp", "tp"), TOPOLOGIES)
def test_answers(machine, cp, tp, options, record_property):
    if cp * tp == 1 and options != "exact":
        pytest.skip("one rank has nobody to communicate with")
    prompts = [word for prompt in PROBLEMS for word in ("--prompt", prompt)]
    sizes = ["--cp", str(cp), "--tp", str(tp), "--dtype", "bfloat16"]
    output = machine.run(
        *("generate", str(CHECKPOINT), *sizes, *OPTIONS[options], *prompts),
        *("--temperature", "0", "--max-new-tokens", "48", "--json"),
        ranks=cp * tp,
    )
    document = json.loads(output)
    assert document["device"].startswith(machine.device.type)
    texts = [result["text"] for result in document["results"]]
    record_property("answers", texts)
    for text, answer in zip(texts, PROBLEMS.values(), strict=True):
        assert f"{answer}\n" in f"{text}\n"


def test_logits_are_as_good_as_the_reference_kernels(machine, record_property):
    """Error against float32, on the device and with the reference kernels, both bfloat16."""
    (ids,) = random_ids(0, 1500)
    exact = reference_logits(CHECKPOINT, ids)
    errors = {}
    for device in {"cpu": None, str(machine.device): None}:
        model = CPQwen3MoeForCausalLM.from_pretrained(
            CHECKPOINT, dtype=torch.bfloat16, device=device, progress=False
        )
        with settings.override(float32_scores=True):
            logits = model(ids[None].to(model.device)).logits[0].float().cpu()
        errors[device] = float((logits - exact).norm() / exact.norm())
    record_property("relative L2 errors", errors)
    assert errors[str(machine.device)] <= 1.5 * errors["cpu"]


@pytest.mark.parametrize("length", [2_000, 8_000, 32_000])
def test_chunks_change_nothing(machine, length, record_property):
    """One long prefill and the same in chunks: the same next token."""
    model = CPQwen3MoeForCausalLM.from_pretrained(
        CHECKPOINT, dtype=torch.bfloat16, device=machine.device, progress=False
    )
    if machine.device.type == "cpu" and length > 2_000:
        pytest.skip(f"{length} tokens take too long on a CPU")
    ids = random_ids(1, length)[0].tolist()
    cache = model.new_kv_cache(max_tokens=2 * length + 256)
    whole, chunked = cache.new_sequence(), cache.new_sequence()
    expected = model.prefill(cache, [whole], [ids])
    found = torch.zeros_like(expected)
    for start in range(0, length, 1536):
        found = model.prefill(cache, [chunked], [ids[start : start + 1536]])
    error = float((found - expected).norm() / expected.norm())
    record_property("relative L2", error)
    assert error < 0.05
