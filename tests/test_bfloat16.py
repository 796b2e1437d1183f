"""bfloat16 is as close to the float32 truth as transformers' own bfloat16, within 1.5x."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qwen3cp.ops.settings import settings
from tests.models import load, random_ids, reference, reference_logits
from tests.ranks import run

LENGTHS = (700, 64, 129, 1, 3)  # 897 positions a seed
SEEDS = (0, 1, 2)
ALLOWED = 1.5


def bfloat16_logits(cp: int, tp: int, path: Path, prompts: list[torch.Tensor], switches):
    model = load(path, cp, tp, torch.bfloat16)
    with settings.override(**switches):
        outputs = [model(ids[None], use_cache=False).logits[0] for ids in prompts]
    assert all(x.dtype == torch.bfloat16 for x in outputs)
    return [x.float() for x in outputs]


def relative_error(ours: list[torch.Tensor], truth: list[torch.Tensor]) -> float:
    return float((torch.cat(ours) - torch.cat(truth)).norm() / torch.cat(truth).norm())


@pytest.fixture(scope="module")
def truths(checkpoint):
    """Prompts, float32 logits and the error of transformers' bfloat16, over all seeds."""
    prompts = [ids for seed in SEEDS for ids in random_ids(seed, *LENGTHS)]
    truth = [reference_logits(checkpoint, ids) for ids in prompts]
    theirs = reference(checkpoint, torch.bfloat16)
    with torch.no_grad():
        logits = [theirs(ids[None]).logits[0].float() for ids in prompts]
    assert sum(map(len, prompts)) >= 2000
    return prompts, truth, relative_error(logits, truth)


@pytest.mark.parametrize("topology", [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (1, 4)], ids=str)
def test_error_against_float32(ranks, checkpoint, truths, topology):
    prompts, truth, theirs = truths
    results = run(ranks, topology, bfloat16_logits, checkpoint, prompts, {"float32_scores": True})
    ours = relative_error(results[0], truth)
    assert 0 < ours <= ALLOWED * theirs, (ours, theirs)


@pytest.mark.parametrize("bfloat16_products", [False, True])
def test_default_rounding_stays_within_twice_the_error(checkpoint, truths, bfloat16_products):
    prompts, truth, theirs = truths
    switches = {"float32_scores": False, "bfloat16_products": bfloat16_products}
    ours = relative_error(bfloat16_logits(1, 1, checkpoint, prompts, switches), truth)
    assert 0 < ours <= 2 * theirs, (ours, theirs)


def test_dtypes_of_outputs_and_cache(checkpoint):
    model = load(checkpoint, 1, 1, torch.bfloat16)
    cache = model.new_kv_cache(max_tokens=64)
    assert cache.dtype == torch.bfloat16
    logits = model.prefill(cache, [cache.new_sequence()], [[1, 2, 3]])
    assert logits.dtype == torch.float32
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
