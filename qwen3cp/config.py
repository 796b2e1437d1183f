"""What of a Qwen3-MoE config can run here, and a rank's share of it."""

from __future__ import annotations

import copy

import torch
from transformers import Qwen3MoeConfig

from qwen3cp.errors import ParallelConfigError, UnsupportedConfigError
from qwen3cp.parallel import ParallelContext, div_even

__all__ = [
    "check_dtype",
    "check_supported",
    "head_dim_of",
    "local_config",
    "local_experts",
    "local_vocabulary",
    "max_length_of",
]

HEAD_DIMS = (64, 128)
"""What the attention operator takes in the TND layout with pages."""
MAX_QUERY_HEADS_PER_KV_HEAD = 64
ROPE_TYPES = ("default", "linear", "yarn", "llama3")
"""Those whose frequencies do not depend on the longest position of a batch, of which a CP rank
sees only its part."""

OPERATORS = (
    "npu_fused_infer_attention_score",
    "npu_scatter_nd_update_",
    "npu_rms_norm",
    "npu_add_rms_norm",
    "npu_rotary_mul",
    "npu_swiglu",
    "npu_moe_gating_top_k_softmax",
    "npu_moe_init_routing_v2",
    "npu_grouped_matmul",
    "npu_moe_token_unpermute",
    "npu_dynamic_quant",
)


def head_dim_of(config: Qwen3MoeConfig) -> int:
    """transformers' rule: the config's head_dim, else hidden_size / num_attention_heads."""
    head_dim = getattr(config, "head_dim", None)
    return head_dim or config.hidden_size // config.num_attention_heads


def max_length_of(config: Qwen3MoeConfig) -> int:
    """Tokens of the longest sequence that the positions were made for."""
    rope = config.rope_parameters or {}
    original, factor = rope.get("original_max_position_embeddings"), rope.get("factor")
    scaled = int(original * factor) if original and factor else 0
    return max(config.max_position_embeddings, scaled)


def check_supported(config: Qwen3MoeConfig, ctx: ParallelContext) -> None:
    """Raises for what the operators or the topology cannot run. Makes no communication.

    Raises:
        UnsupportedConfigError: the model.
        ParallelConfigError: heads or widths that TP cannot divide, settings of the communication
            that do not fit the model.
    """
    if getattr(config, "model_type", None) != "qwen3_moe":
        raise UnsupportedConfigError(
            f"model_type is {getattr(config, 'model_type', None)!r}; only 'qwen3_moe' can be run"
        )
    missing = [name for name in OPERATORS if not hasattr(torch.ops.npu, name)]
    if missing:
        raise UnsupportedConfigError(
            f"torch.ops.npu has no {', '.join(missing)}: this torch_npu is too old"
        )
    if config.use_sliding_window:
        raise UnsupportedConfigError(
            "use_sliding_window=True: the layers attend to all earlier tokens, which is not what "
            "the checkpoint was trained for; no released Qwen3-MoE sets it"
        )
    if config.hidden_act != "silu":
        raise UnsupportedConfigError(f"hidden_act is {config.hidden_act!r}; only 'silu' can be run")
    head_dim = head_dim_of(config)
    if head_dim not in HEAD_DIMS:
        raise UnsupportedConfigError(
            f"head_dim is {head_dim}; the attention operator takes {HEAD_DIMS} from paged caches"
        )
    rope_type = (config.rope_parameters or {}).get("rope_type", "default")
    if rope_type not in ROPE_TYPES:
        raise UnsupportedConfigError(
            f"rope_type is {rope_type!r}; only {', '.join(ROPE_TYPES)} can be run, since others "
            "depend on the length of the batch"
        )
    num_heads, num_kv_heads = config.num_attention_heads, config.num_key_value_heads
    ratio = div_even(num_heads, num_kv_heads, "num_attention_heads")
    if ratio > MAX_QUERY_HEADS_PER_KV_HEAD:
        raise UnsupportedConfigError(
            f"{ratio} query heads share a KV head; the attention operator takes at most "
            f"{MAX_QUERY_HEADS_PER_KV_HEAD}"
        )
    if config.num_experts_per_tok > config.num_experts:
        raise UnsupportedConfigError(
            f"num_experts_per_tok = {config.num_experts_per_tok} is more than num_experts = "
            f"{config.num_experts}"
        )
    comm = ctx.comm
    if comm.all_reduce != "exact" and config.hidden_size % (comm.group_size or 1):
        raise ParallelConfigError(
            f"CommConfig(group_size={comm.group_size}) does not divide hidden_size = "
            f"{config.hidden_size}; None takes a token as one group"
        )
    beyond = [layer for layer in comm.skip_layers if layer >= config.num_hidden_layers]
    if beyond:
        raise ParallelConfigError(
            f"CommConfig(skip_layers=...) names the layers {beyond}; the model has 0 to "
            f"{config.num_hidden_layers - 1}"
        )
    local_config(config, ctx)


def check_dtype(dtype: torch.dtype, device: torch.device) -> None:
    """bfloat16 anywhere; float32 on a CPU."""
    allowed = (torch.bfloat16,) if device.type == "npu" else (torch.bfloat16, torch.float32)
    if dtype not in allowed:
        raise UnsupportedConfigError(
            f"dtype {dtype} cannot be run on {device.type}; pass dtype="
            + " or ".join(str(d) for d in allowed)
        )


def local_config(config: Qwen3MoeConfig, ctx: ParallelContext) -> Qwen3MoeConfig:
    """The config of what one TP rank holds of each layer: its heads and its widths.

    With more ranks than KV heads, neighbouring ranks hold the same KV head. With moe="ep" experts
    keep their width, and num_experts stays that of the model: `local_experts` says which are here.
    """
    tp = ctx.tp_size
    num_kv_heads = config.num_key_value_heads
    if tp <= num_kv_heads:
        local_kv_heads = div_even(num_kv_heads, tp, "num_key_value_heads")
    else:
        div_even(tp, num_kv_heads, "tp_size (more than the KV heads)")
        local_kv_heads = 1
    local = copy.deepcopy(config)
    local.head_dim = head_dim_of(config)
    local.num_attention_heads = div_even(config.num_attention_heads, tp, "num_attention_heads")
    local.num_key_value_heads = local_kv_heads
    if ctx.moe == "tp":
        local.moe_intermediate_size = div_even(
            config.moe_intermediate_size, tp, "moe_intermediate_size"
        )
    if has_dense_layer(config):
        local.intermediate_size = div_even(config.intermediate_size, tp, "intermediate_size")
    return local


def local_experts(num_experts: int, rank: int, world_size: int) -> range:
    """The experts of a rank with moe="ep": contiguous, and numbers that differ by at most one.

    5 experts on 2 ranks: 0-1 and 2-4. With more ranks than experts some have none.
    """
    return range(rank * num_experts // world_size, (rank + 1) * num_experts // world_size)


def local_vocabulary(config: Qwen3MoeConfig, ctx: ParallelContext) -> range:
    """The token ids whose rows of lm_head a rank holds: ceil(vocabulary / ranks), fewer or none on
    the last ranks."""
    shard = -(-config.vocab_size // ctx.world_size)
    start = min(ctx.rank * shard, config.vocab_size)
    return range(start, min(start + shard, config.vocab_size))


def is_sparse(config: Qwen3MoeConfig, layer: int) -> bool:
    """Whether a layer has experts, by transformers' rule."""
    return (
        layer not in (config.mlp_only_layers or [])
        and config.num_experts > 0
        and (layer + 1) % config.decoder_sparse_step == 0
    )


def has_dense_layer(config: Qwen3MoeConfig) -> bool:
    if not config.mlp_only_layers and config.decoder_sparse_step == 1:
        return config.num_experts == 0
    return not all(is_sparse(config, layer) for layer in range(config.num_hidden_layers))
