"""Attention of one layer, on this rank's rows and heads.

Letters: T rows of this rank, R rows padded for the gather, N query heads, K KV heads, D head_dim,
W = K * D; all of this TP rank. H hidden size.
"""

from __future__ import annotations

import torch
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeAttention

from qwen3cp import collectives
from qwen3cp.config import check_supported, local_config
from qwen3cp.errors import InputError
from qwen3cp.kv_cache import LayerKV
from qwen3cp.ops.checks import without_grad
from qwen3cp.ops.products import linear, matmul
from qwen3cp.parallel import ParallelContext
from qwen3cp.plan import ForwardPlan

__all__ = ["CPQwen3MoeAttention"]


class CPQwen3MoeAttention(Qwen3MoeAttention):
    """Qwen3-MoE attention over a paged cache, split over CP rows and TP heads.

    Parameters keep transformers' names and hold this TP rank's heads: q_proj [N*D, H], k_proj and
    v_proj [W, H], o_proj [H, N*D]; q_norm and k_norm [D] are whole. An o_proj bias is whole too,
    and added by TP rank 0 alone.
    """

    def __init__(
        self, config: Qwen3MoeConfig, layer_idx: int, *, parallel_context: ParallelContext
    ) -> None:
        check_supported(config, parallel_context)
        local = local_config(config, parallel_context)
        super().__init__(local, layer_idx)
        self.config = config
        self.num_heads = local.num_attention_heads
        self.num_kv_heads = local.num_key_value_heads
        self.parallel_context = parallel_context

    @without_grad
    def forward(
        self,
        hidden: torch.Tensor,
        *,
        plan: ForwardPlan,
        kv: LayerKV,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """Writes the keys and values of all new tokens to the cache and attends to the visible.

        Collective over cp_group (one gather, in PREFILL) and tp_group (one all-reduce).

        Args:
            hidden: [T, H], normalised; T may be 0.
            kv: this layer's part of the cache that the plan was made with.
            position_embeddings: cos and sin of `plan.positions`, [T, D] with any axes of 1, such
                as transformers' rotary module returns for `plan.positions[None]`.

        Returns:
            [T, H]

        Raises:
            InputError: the plan is of another topology, phase or number of rows.
        """
        ctx = self.parallel_context
        _check_plan(plan, hidden, ctx)
        cos, sin = position_embeddings
        # the operator takes at most 999 batches, so tokens go in its S axis
        for_operator = (1, plan.num_rows, 1, self.head_dim)
        if cos.shape != for_operator:
            cos, sin = cos.view(for_operator), sin.view(for_operator)
        packed = hidden.new_empty(2, plan.padded_rows, self.num_kv_heads * self.head_dim)
        key, value = packed.unbind()
        if plan.num_rows < plan.padded_rows:
            key, value = key[: plan.num_rows], value[: plan.num_rows]
        rotated = self._norm_and_rotate(linear(hidden, self.k_proj), self.k_norm, cos, sin)
        key.copy_(rotated.view(key.shape))
        del rotated
        matmul(hidden, self.v_proj.weight.t(), out=value, bias=self.v_proj.bias)
        gather = collectives.kv_gather(
            packed, ctx, split=plan.is_split, head_dim=self.head_dim, layer=self.layer_idx
        )

        # in flight: the gather
        query = self._norm_and_rotate(linear(hidden, self.q_proj), self.q_norm, cos, sin)[0]

        torch.ops.npu.npu_scatter_nd_update_(kv.rows, plan.slots, gather.wait())
        attended = self._attend(query, plan, kv)
        del packed, key, value, query  # not held beside the sum
        partial = linear(attended.flatten(1), self.o_proj, bias=ctx.tp_rank == 0)
        return collectives.all_reduce(partial, ctx, in_place=True, layer=self.layer_idx)

    def _norm_and_rotate(
        self, projected: torch.Tensor, norm: torch.nn.Module, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        """[T, heads * D] -> [1, T, heads, D]"""
        # one name for all, so that no step holds more than what it reads and what it makes
        x = projected.view(1, -1, projected.shape[1] // self.head_dim, self.head_dim)
        del projected
        x = torch.ops.npu.npu_rms_norm(x, norm.weight, norm.variance_epsilon)[0]
        return torch.ops.npu.npu_rotary_mul(x, cos, sin)

    def _attend(self, query_TND: torch.Tensor, plan: ForwardPlan, kv: LayerKV) -> torch.Tensor:
        """[T, N, D] -> [T, N, D], in one call unless the plan had to split it."""
        key, value = kv.pages()
        outputs = [
            torch.ops.npu.npu_fused_infer_attention_score(
                query_TND if len(plan.calls) == 1 else query_TND[call.start : call.stop],
                key,
                value,
                atten_mask=kv.causal_mask,
                actual_seq_lengths=call.query_ends,
                actual_seq_lengths_kv=call.kv_lengths,
                block_table=call.block_table,
                num_heads=self.num_heads,
                num_key_value_heads=self.num_kv_heads,
                scale=self.scaling,
                input_layout="TND",
                sparse_mode=3,
                block_size=kv.page_size,
            )[0]
            for call in plan.calls
        ]
        if not outputs:  # no rows: the operator takes none
            return query_TND
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _check_plan(plan: ForwardPlan, hidden: torch.Tensor, ctx: ParallelContext) -> None:
    if (plan.cp_rank, plan.cp_size) != (ctx.cp_rank, ctx.cp_size):
        raise InputError(
            f"the plan is of CP rank {plan.cp_rank} of {plan.cp_size}, this is rank {ctx.cp_rank} "
            f"of {ctx.cp_size}"
        )
    if ctx.phase not in (None, plan.phase):
        raise InputError(f"a {plan.phase.value} plan was given to a {ctx.phase} forward")
    if hidden.dim() != 2 or hidden.shape[0] != plan.num_rows:
        raise InputError(
            f"hidden has the shape {tuple(hidden.shape)}, the plan has {plan.num_rows} rows on "
            "this rank: split them with plan.split"
        )
