"""One decoder layer."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeDecoderLayer, Qwen3MoeRMSNorm

from qwen3cp.attention import CPQwen3MoeAttention
from qwen3cp.config import is_sparse
from qwen3cp.kv_cache import LayerKV
from qwen3cp.moe import CPQwen3MoeMLP, CPQwen3MoeSparseMoeBlock
from qwen3cp.ops.checks import without_grad
from qwen3cp.parallel import ParallelContext
from qwen3cp.plan import ForwardPlan

__all__ = ["CPQwen3MoeDecoderLayer", "add_norm"]


class CPQwen3MoeDecoderLayer(Qwen3MoeDecoderLayer):
    """A decoder layer that leaves its last addition to the next norm, which the NPU fuses."""

    def __init__(
        self,
        config: Qwen3MoeConfig,
        layer_idx: int,
        *,
        parallel_context: ParallelContext,
        expert_placement: Seq[int] | None = None,
    ) -> None:
        # not transformers' constructor, which would build the whole layer
        nn.Module.__init__(self)
        self.hidden_size = config.hidden_size
        self.self_attn = CPQwen3MoeAttention(config, layer_idx, parallel_context=parallel_context)
        if is_sparse(config, layer_idx):
            self.mlp = CPQwen3MoeSparseMoeBlock(
                config,
                parallel_context=parallel_context,
                layer_idx=layer_idx,
                expert_placement=expert_placement,
            )
        else:
            self.mlp = CPQwen3MoeMLP(config, parallel_context=parallel_context, layer_idx=layer_idx)
        self.input_layernorm = Qwen3MoeRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3MoeRMSNorm(config.hidden_size, config.rms_norm_eps)

    @without_grad
    def forward(
        self,
        hidden: torch.Tensor,
        residual: torch.Tensor | None = None,
        *,
        plan: ForwardPlan,
        kv: LayerKV,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs the layer on this rank's rows.

        The input of the layer is hidden + residual, and so is its output; the first layer of a
        model gets no residual. Collective over cp_group (one gather, in PREFILL) and tp_group (two
        all-reduces).

        Args:
            hidden, residual: [T, H], T rows of this rank (may be 0).
            kv, position_embeddings: as of `CPQwen3MoeAttention`.

        Returns:
            (hidden, residual), both [T, H].
        """
        hidden, residual = add_norm(hidden, residual, self.input_layernorm)
        hidden = self.self_attn(hidden, plan=plan, kv=kv, position_embeddings=position_embeddings)
        hidden, residual = add_norm(hidden, residual, self.post_attention_layernorm)
        if isinstance(self.mlp, CPQwen3MoeSparseMoeBlock):
            return self.mlp(hidden, plan=plan), residual
        return self.mlp(hidden), residual


def add_norm(
    hidden: torch.Tensor, residual: torch.Tensor | None, norm: Qwen3MoeRMSNorm
) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm(hidden + residual), hidden + residual)"""
    weight, epsilon = norm.weight, norm.variance_epsilon
    if residual is None:
        return torch.ops.npu.npu_rms_norm(hidden, weight, epsilon)[0], hidden
    normed, _, total = torch.ops.npu.npu_add_rms_norm(hidden, residual, weight, epsilon)
    return normed, total
