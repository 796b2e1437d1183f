"""Every kind of Qwen3-MoE config against transformers, and those that are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Qwen3MoeConfig

from qwen3cp import CPQwen3MoeForCausalLM, ParallelContext
from qwen3cp.config import check_supported, max_length_of
from qwen3cp.errors import ParallelConfigError, UnsupportedConfigError
from tests.models import TOLERANCE, load, random_ids, reference_logits, save_random
from tests.ranks import run

TOPOLOGIES = [(1, 1), (2, 1), (2, 2), (1, 4)]

CONFIGS = {
    "head_dim_not_hidden_over_heads": dict(hidden_size=96, num_attention_heads=4, head_dim=64),
    "head_dim_128": dict(head_dim=128),
    "one_kv_head": dict(num_key_value_heads=1),
    "as_many_kv_heads_as_heads": dict(num_key_value_heads=4),
    "attention_bias": dict(attention_bias=True),
    "dense_layer": dict(mlp_only_layers=[1]),
    "every_second_layer_sparse": dict(decoder_sparse_step=2, num_hidden_layers=4),
    "weights_not_normalised": dict(norm_topk_prob=False),
    "tied_embeddings": dict(tie_word_embeddings=True),
    "yarn": dict(
        rope_parameters=dict(
            rope_type="yarn",
            rope_theta=10000.0,
            factor=4.0,
            original_max_position_embeddings=64,
        )
    ),
    "128_experts_top_8": dict(num_experts=128, num_experts_per_tok=8, moe_intermediate_size=16),
    "vocabulary_smaller_than_shards": dict(vocab_size=5),
    "one_expert": dict(num_experts=1, num_experts_per_tok=1),
}


@pytest.fixture(scope="session")
def random_checkpoints(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("configs")
    return {name: save_random(folder / name, **values) for name, values in CONFIGS.items()}


def logits(cp: int, tp: int, path: Path, prompts: list[torch.Tensor]) -> list[torch.Tensor]:
    model = load(path, cp, tp)
    cache = model.new_kv_cache(num_pages=12)
    sequences = [cache.new_sequence() for _ in prompts]
    first = model.prefill(cache, sequences, prompts)
    second = model.decode(cache, sequences, torch.arange(len(prompts)) % model.vocab_size)
    return [first, second]


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_config_equals_transformers(ranks, random_checkpoints, name, topology):
    path = random_checkpoints[name]
    vocab_size = CONFIGS[name].get("vocab_size", 203)
    prompts = random_ids(11, 1, 6, 150, vocab_size=vocab_size)
    results = run(ranks, topology, logits, path, prompts)
    for result in results:
        for i, ids in enumerate(prompts):
            text = torch.cat((ids, torch.tensor([i % vocab_size])))
            expected = reference_logits(path, text)
            assert expected.abs().max() > 0.1, "logits too small for the tolerance to mean much"
            torch.testing.assert_close(result[0][i], expected[-2], rtol=0, atol=TOLERANCE)
            torch.testing.assert_close(result[1][i], expected[-1], rtol=0, atol=TOLERANCE)


SMALL = dict(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (dict(use_sliding_window=True, sliding_window=128), "use_sliding_window"),
        (dict(hidden_act="gelu"), "hidden_act"),
        (dict(head_dim=256), "head_dim is 256"),
        (dict(head_dim=96), "head_dim is 96"),
        (dict(num_experts_per_tok=5), "num_experts_per_tok"),
        (
            dict(rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)),
            "rope_type is 'dynamic'",
        ),
        (dict(num_attention_heads=130, num_key_value_heads=1), "130 query heads"),
    ],
)
def test_what_cannot_run_is_refused_with_the_reason(overrides, words):
    config = Qwen3MoeConfig(**{**SMALL, **overrides})
    with pytest.raises(UnsupportedConfigError, match=words):
        check_supported(config, ParallelContext.single())
    with pytest.raises(UnsupportedConfigError, match=words):
        CPQwen3MoeForCausalLM(config)


def test_another_architecture_is_refused():
    from transformers import Qwen3Config

    with pytest.raises(UnsupportedConfigError, match="'qwen3'"):
        CPQwen3MoeForCausalLM(Qwen3Config())  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("tp", "overrides", "words"),
    [
        (3, {}, "num_key_value_heads = 4 cannot be divided evenly by 3"),
        (6, {}, r"tp_size .* = 6 cannot be divided evenly by 4"),
        (16, {}, "num_attention_heads = 8 cannot be divided evenly by 16"),
        (2, dict(moe_intermediate_size=33), "moe_intermediate_size = 33"),
        (2, dict(intermediate_size=33, mlp_only_layers=[0]), "intermediate_size = 33"),
    ],
)
def test_what_tp_cannot_divide_is_refused(tp, overrides, words):
    class SizesOnly(ParallelContext):
        """A topology without its groups, which a check of sizes must not need."""

        def __post_init__(self) -> None:
            pass

    config = Qwen3MoeConfig(**{**SMALL, **overrides})
    with pytest.raises(ParallelConfigError, match=words):
        check_supported(config, SizesOnly(tp_size=tp))


def test_longest_prompt_follows_the_config_and_yarn():
    assert max_length_of(Qwen3MoeConfig(max_position_embeddings=40960)) == 40960
    yarn = dict(
        rope_type="yarn", rope_theta=1e6, factor=4.0, original_max_position_embeddings=32768
    )
    config = Qwen3MoeConfig(max_position_embeddings=40960, rope_parameters=yarn)
    assert max_length_of(config) == 131072


def test_two_models_with_other_contexts_live_in_one_process(ranks, random_checkpoints):
    path = random_checkpoints["attention_bias"]
    results = ranks(4).run(_two_models, path)
    assert all(torch.equal(r, results[0]) for r in results)
    expected = reference_logits(path, torch.arange(9))[-1]
    for row in results[0]:
        torch.testing.assert_close(row, expected, rtol=0, atol=TOLERANCE)


def _two_models(path: Path) -> torch.Tensor:
    """Steps of two models with other topologies, one after the other on the same ranks."""
    models = [load(path, 2, 2), load(path, 4, 1), load(path, 1, 1)]
    caches = [model.new_kv_cache(max_tokens=300) for model in models]
    sequences = [cache.new_sequence() for cache in caches]
    ids = torch.arange(9)
    for model, cache, sequence in zip(models, caches, sequences, strict=True):
        model.prefill(cache, [sequence], [ids[:5]])
    logits = []
    for token in ids[5:]:
        logits = [
            model.decode(cache, [sequence], token[None])[0]
            for model, cache, sequence in zip(models, caches, sequences, strict=True)
        ]
    return torch.stack(logits)
