"""Models for tests: transformers' own as the reference, ours on any topology, random ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from qwen3cp import CPQwen3MoeForCausalLM, ParallelContext
from tests.ranks import context

TOPOLOGIES = [(1, 1), (2, 1), (1, 2), (4, 1), (2, 2), (1, 4)]
TOLERANCE = 2e-4  # of float32 logits
NEAR_TIE = 1e-3  # of the two best logits: either token will do

_ours: dict[Any, CPQwen3MoeForCausalLM] = {}
_references: dict[Any, Any] = {}


def load(path: Path, cp: int, tp: int, dtype: torch.dtype = torch.float32, **kwargs: Any):
    """Our model, loaded once per process and topology."""
    key = (path, cp, tp, dtype, tuple(kwargs.items()))
    if key not in _ours:
        ctx = ParallelContext.single() if cp * tp == 1 else context(cp, tp, **kwargs)
        _ours[key] = CPQwen3MoeForCausalLM.from_pretrained(path, parallel_context=ctx, dtype=dtype)
    return _ours[key]


def reference(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' model, loaded once per process."""
    if (path, dtype) not in _references:
        model = Qwen3MoeForCausalLM.from_pretrained(
            path, dtype=dtype, experts_implementation="eager"
        )
        _references[path, dtype] = model.eval()
    return _references[path, dtype]


@torch.no_grad()
def reference_logits(path: Path, ids: torch.Tensor) -> torch.Tensor:
    """float32 [tokens, vocabulary] of one sequence."""
    return reference(path)(ids[None]).logits[0]


def random_ids(seed: int, *lengths: int, vocab_size: int = 640) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab_size, (n,), generator=generator) for n in lengths]


def save_random(path: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """A random checkpoint that transformers writes, with weights large enough to matter."""
    values = dict(
        vocab_size=203,
        hidden_size=96,
        intermediate_size=64,
        moe_intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=4096,
        norm_topk_prob=True,
    )
    torch.manual_seed(seed)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**values, **overrides}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            else:
                parameter.normal_(std=0.5)
    model.save_pretrained(path, max_shard_size="500KB")
    return path
