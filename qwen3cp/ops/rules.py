"""What the NPU refuses, rule by rule, each with the public source that says so.

The checks of the operators raise through these rules, with the value that was found. The CPU
kernels, the Meta kernels and `check_call` make the same checks, but for the rules that need the
data of a tensor: those are the CPU kernels' alone.

CANN means release 8.5; ops-transformer and ops-nn are its public kernel sources. An "API page" is
torch_npu's documentation of an operator.
"""

from dataclasses import dataclass

__all__ = ["RULES", "Rule"]


@dataclass(frozen=True)
class Rule:
    """One rule of one operator."""

    op: str
    text: str  # what is accepted
    source: str
    error: type[Exception] = ValueError
    needs_data: bool = False  # so a Meta kernel cannot check it

    def broken(self, message: str) -> Exception:
        """The exception to raise."""
        return self.error(f"{self.op}: {message} [{self.source}]")


# --------------------------------------------------------------------------------------- attention

_FIA = "npu_fused_infer_attention_score"
_FIA_PAGE = "API page npu_fused_infer_attention_score"
_FIA_ACLNN = "CANN aclnnFusedInferAttentionScoreV3"
_FIA_TILING = "ops-transformer fused_infer_attention_score_tiling.cpp"
_PFA_TILING = "ops-transformer prompt_flash_attention_tiling.cpp"
_FIA_WRAPPER = "op-plugin FusedInferAttentionScoreKernelNpuOpApi.cpp"

ATTENTION_DTYPE = Rule(
    _FIA,
    "query, key and value are bfloat16 (float32 on a CPU, for comparisons)",
    f"{_FIA_PAGE}, query; {_FIA_TILING} CheckFAIQKV",
    TypeError,
)
ATTENTION_CONTIGUOUS = Rule(
    _FIA,
    "query, key, value, atten_mask and pse_shift are contiguous: they are not copied",
    f"{_FIA_PAGE}, query, key, value, atten_mask, pse_shift",
)
ATTENTION_QUERY = Rule(
    _FIA,
    "the query has the dimensions of input_layout and num_heads heads",
    f"{_FIA_PAGE}, input_layout, num_heads; {_FIA_TILING} CheckFAIIsTND",
)
ATTENTION_HEADS = Rule(
    _FIA,
    "num_heads is positive and a multiple of num_key_value_heads, at most 64 times as large",
    f"{_FIA_PAGE}, num_key_value_heads; {_FIA_WRAPPER}",
)
ATTENTION_MAX_HEADS = Rule(_FIA, "num_heads is at most 256", f"{_FIA_ACLNN}, constraints on N")
ATTENTION_TND_HEAD_DIM = Rule(
    _FIA,
    "TND: head dims of query and key, and of value, are 64, 128 or 192 alike, or 192 and 128",
    f"{_FIA_PAGE}, constraints of TND; {_PFA_TILING}",
)
ATTENTION_TND_192 = Rule(
    _FIA,
    "TND: head dim 192 needs as many key heads as query heads and no pages",
    f"{_FIA_PAGE}, constraints of TND",
)
ATTENTION_HEAD_DIM = Rule(
    _FIA,
    "other layouts: head dims are multiples of 16 up to 512",
    f"{_FIA_ACLNN}, constraints on D; {_FIA_TILING} TilingProcess4PFA",
)
ATTENTION_KEY_DIM = Rule(
    _FIA,
    "the keys' head dim is the query's",
    f"{_FIA_TILING} CheckFAISinglePara",
)
ATTENTION_FRESH_KV = Rule(
    _FIA,
    "without a block_table, key and value have the query's layout and batch, "
    "num_key_value_heads heads, and the same tokens",
    f"{_FIA_WRAPPER}; {_FIA_TILING} CheckFAIIsTND",
)
ATTENTION_ONE_ROW = Rule(
    _FIA, "BNSD_BSND has more than one query row", f"{_FIA_PAGE}, input_layout"
)
ATTENTION_TABLE_DTYPE = Rule(_FIA, "block_table is int32", f"{_FIA_PAGE}, block_table", TypeError)
ATTENTION_TABLE = Rule(
    _FIA,
    "block_table has two dimensions and a row for each request",
    f"{_PFA_TILING} CheckPATypeAndShape",
)
ATTENTION_BLOCK_SIZE = Rule(
    _FIA,
    "block_size is a multiple of 128 up to 512 (of 16 for one query row in a padded layout)",
    f"{_FIA_ACLNN}, constraints of paged attention; {_PFA_TILING} CheckPATypeAndShape",
)
ATTENTION_CACHE = Rule(
    _FIA,
    "a cache is [blocks, block_size, KV heads * head dim], or for BNSD and TND "
    "[blocks, KV heads, block_size, head dim]",
    f"{_FIA_PAGE}, constraints of paged attention; {_PFA_TILING} CheckPAKeyValueParams",
)
ATTENTION_CACHE_WIDTH = Rule(
    _FIA,
    "KV heads * head dim of a cache is at most 65535",
    f"{_FIA_PAGE}, constraints of paged attention",
)
ATTENTION_TND_LENGTHS = Rule(
    _FIA,
    "TND: actual_seq_lengths and actual_seq_lengths_kv are given, equally long",
    f"{_FIA_PAGE}, actual_seq_lengths; {_FIA_TILING} CheckFAIIsTND",
)
ATTENTION_TND_REQUESTS = Rule(_FIA, "TND: 1 to 4096 requests", f"{_FIA_PAGE}, constraints of TND")
ATTENTION_TND_TOKENS = Rule(_FIA, "TND: at most 1048576 tokens", f"{_FIA_PAGE}, constraints of TND")
ATTENTION_CUMULATIVE = Rule(
    _FIA,
    "TND: actual_seq_lengths is cumulative, and so is actual_seq_lengths_kv without pages; "
    "neither decreases",
    f"{_FIA_PAGE}, actual_seq_lengths",
)
ATTENTION_LAST_LENGTH = Rule(
    _FIA,
    "TND: the last entry of a cumulative list is the number of tokens",
    f"{_FIA_TILING} CheckFAISeqlenDataInTND",
)
ATTENTION_LENGTH = Rule(
    _FIA,
    "a length is at least 0 and at most the rows, the keys, or what the block_table's columns hold",
    f"{_FIA_PAGE}, actual_seq_lengths; {_PFA_TILING} CheckPATypeAndShape",
)
ATTENTION_LENGTH_COUNT = Rule(
    _FIA,
    "padded layouts: a length list has one entry, or at least one for each request",
    f"{_FIA_PAGE}, actual_seq_lengths",
)
ATTENTION_PAGED_LENGTHS = Rule(
    _FIA,
    "a block_table needs actual_seq_lengths_kv",
    f"{_FIA_PAGE}, constraints of paged attention",
)
ATTENTION_BATCH = Rule(
    _FIA, "padded layouts: at most 65536 requests", f"{_FIA_ACLNN}, constraints on B"
)
ATTENTION_NO_KEYS = Rule(
    _FIA,
    "with a block_table, at least one request has keys",
    f"{_PFA_TILING}, lengths of paged attention",
)
ATTENTION_BLOCK_SUM = Rule(
    _FIA,
    "the cache has as many blocks as all requests need, shared ones counted every time",
    f"{_PFA_TILING} CheckPATypeAndShape",
)
ATTENTION_INNER_PRECISE = Rule(
    _FIA,
    "inner_precise is 0 in TND, 0 or 1 for one query row, else 0 to 3",
    f"{_FIA_PAGE}, inner_precise; {_FIA_ACLNN}, constraints of TND",
)
ATTENTION_SPARSE_MODE = Rule(
    _FIA, "sparse_mode is 0 to 4", f"{_FIA_PAGE}, sparse_mode", NotImplementedError
)
ATTENTION_TND_SPARSE_MODE = Rule(
    _FIA,
    "TND: sparse_mode is 0 without atten_mask, or 3 or 4",
    f"{_FIA_TILING} CheckFAIMask",
)
ATTENTION_MASK_NEEDED = Rule(
    _FIA, "sparse_mode 1 to 4 needs atten_mask", f"{_FIA_PAGE}, sparse_mode"
)
ATTENTION_MASK_DTYPE = Rule(
    _FIA, "atten_mask is bool, int8 or uint8", f"{_FIA_PAGE}, atten_mask", TypeError
)
ATTENTION_TEMPLATE = Rule(
    _FIA,
    "sparse_mode 2 to 4: atten_mask is the 2048 x 2048 template, whatever the lengths",
    f"{_FIA_PAGE}, sparse_mode; {_FIA_TILING} CheckFAIMaskShape",
)
ATTENTION_TEMPLATE_DATA = Rule(
    _FIA,
    "sparse_mode 2 to 4: atten_mask is triu(ones, diagonal=1); the NPU does not look",
    f"{_FIA_PAGE}, sparse_mode",
    needs_data=True,
)
ATTENTION_FULL_MASK = Rule(
    _FIA,
    "sparse_mode 0 and 1: atten_mask covers all query rows and keys",
    f"{_FIA_PAGE}, atten_mask; {_PFA_TILING} CheckAttenMaskShape",
)
ATTENTION_ROWS = Rule(
    _FIA,
    "TND, sparse_mode 3: no request has more query rows than keys",
    f"{_PFA_TILING}, sparse modes of TND",
)
ATTENTION_BAND = Rule(
    _FIA,
    "sparse_mode 4: pre_tokens + next_tokens >= 0, pre_tokens >= -rows, next_tokens >= -keys",
    f"{_FIA_TILING} CheckSparseModeParams",
)
ATTENTION_PSE = Rule(
    _FIA,
    "pse_shift is [1 or B, num_heads, rows, keys]; TND has none",
    f"{_FIA_PAGE}, pse_shift and constraints of TND",
)
ATTENTION_PSE_DTYPE = Rule(
    _FIA, "pse_shift has the query's dtype", f"{_FIA_PAGE}, pse_shift", TypeError
)

# ----------------------------------------------------------------------------------- cache writing

_SCATTER = "npu_scatter_nd_update_"
_SCATTER_PAGE = "API page npu_scatter_nd_update_"

SCATTER_DTYPE = Rule(
    _SCATTER,
    "input is bfloat16, float32, bool, int64 or int8, and updates alike",
    f"{_SCATTER_PAGE}, input, updates",
    TypeError,
)
SCATTER_INDICES_DTYPE = Rule(
    _SCATTER, "indices are int32 or int64", f"{_SCATTER_PAGE}, indices", TypeError
)
SCATTER_DEPTH = Rule(
    _SCATTER,
    "the last dimension of indices is between 1 and the dimensions of input",
    f"{_SCATTER_PAGE}, indices",
)
SCATTER_UPDATES = Rule(
    _SCATTER,
    "updates have the shape indices.shape[:-1] + input.shape[depth:]",
    f"{_SCATTER_PAGE}, updates",
)

SCATTER_RANGE = Rule(
    _SCATTER,
    "indices lie within input; the NPU does not look",
    f"{_SCATTER_PAGE}, indices",
    IndexError,
    needs_data=True,
)
SCATTER_UNIQUE = Rule(
    _SCATTER,
    "no entry is written twice, which of them stays is open (looked at with QWEN3CP_DEBUG_OPS=1)",
    "CANN aclnnScatterNdUpdate, constraints",
    needs_data=True,
)

# ------------------------------------------------------------------------------------------- norms

_RMS = "npu_rms_norm"
_ADD_RMS = "npu_add_rms_norm"

RMS_DTYPE = Rule(_RMS, "input is bfloat16 or float32", "API page npu_rms_norm, self", TypeError)
RMS_GAMMA_DTYPE = Rule(
    _RMS, "gamma has the input's dtype or float32", "API page npu_rms_norm, gamma", TypeError
)
RMS_GAMMA = Rule(
    _RMS, "gamma has the shape of the input's last dimensions", "API page npu_rms_norm, gamma"
)
ADD_RMS_DTYPE = Rule(
    _ADD_RMS,
    "x1, x2 and gamma are bfloat16 or float32 alike",
    "CANN aclnnAddRmsNorm, x1, x2, gamma",
    TypeError,
)
ADD_RMS_SHAPE = Rule(_ADD_RMS, "x2 has the shape of x1", "CANN aclnnAddRmsNorm, x2")
ADD_RMS_GAMMA = Rule(
    _ADD_RMS,
    "gamma has the shape of the last dimensions of x1",
    "CANN aclnnAddRmsNorm, gamma",
)

# ------------------------------------------------------------------------------------------ rotary

_ROTARY = "npu_rotary_mul"
_ROTARY_PAGE = "API page npu_rotary_mul"

ROTARY_DTYPE = Rule(
    _ROTARY, "input, r1 and r2 are bfloat16 or float32", f"{_ROTARY_PAGE}, input", TypeError
)
ROTARY_MODE = Rule(_ROTARY, "rotary_mode is 'half' or 'interleave'", f"{_ROTARY_PAGE}, rotary_mode")
ROTARY_COS_SIN = Rule(_ROTARY, "r1 and r2 have the same shape", f"{_ROTARY_PAGE}, constraints")
ROTARY_HEAD_DIM = Rule(
    _ROTARY, "the head dim is even and below 896", f"{_ROTARY_PAGE}, constraints"
)
ROTARY_LAYOUT = Rule(
    _ROTARY,
    "input, r1 and r2 are a layout that the mode knows, with fewer than 1000 batches and heads",
    f"{_ROTARY_PAGE}, constraints",
)

# ------------------------------------------------------------------------------------------ gating

_GATING = "npu_moe_gating_top_k_softmax"
_GATING_PAGE = "API page npu_moe_gating_top_k_softmax"

GATING_DTYPE = Rule(_GATING, "x is bfloat16 or float32", f"{_GATING_PAGE}, x", TypeError)
GATING_RANK = Rule(_GATING, "x has 2 or 3 dimensions", f"{_GATING_PAGE}, x")
GATING_K = Rule(_GATING, "k is 1 to 1024, and at most the experts", f"{_GATING_PAGE}, k")
GATING_FINISHED_DTYPE = Rule(_GATING, "finished is bool", f"{_GATING_PAGE}, finished", TypeError)
GATING_FINISHED = Rule(_GATING, "finished has an entry for each token", f"{_GATING_PAGE}, finished")

# ----------------------------------------------------------------------------------------- routing

_ROUTING = "npu_moe_init_routing_v2"
_ROUTING_PAGE = "API page npu_moe_init_routing_v2"
_ROUTING_TILING = "ops-transformer moe_init_routing_v3_tiling.cpp"

ROUTING_OFFSET = Rule(
    _ROUTING, "offset is None: it belongs to quant_mode 0", f"{_ROUTING_PAGE}, offset"
)
ROUTING_DTYPE = Rule(_ROUTING, "x is bfloat16, float32 or int8", f"{_ROUTING_PAGE}, x", TypeError)
ROUTING_INDEX_DTYPE = Rule(
    _ROUTING, "expert_idx is int32", f"{_ROUTING_PAGE}, expert_idx", TypeError
)
ROUTING_SHAPES = Rule(
    _ROUTING,
    "x is [N, H] and expert_idx [N, K], K at least 1",
    f"{_ROUTING_TILING}, input shapes",
)
ROUTING_ACTIVE_NUM = Rule(_ROUTING, "active_num is -1 or N * K", f"{_ROUTING_TILING}, input shapes")
ROUTING_DROP_PAD = Rule(_ROUTING, "drop_pad_mode is 0", f"{_ROUTING_TILING}, attributes")
ROUTING_NUM_TYPE = Rule(
    _ROUTING,
    "expert_tokens_num_type is 1 or 2, not the default",
    f"{_ROUTING_TILING}, attributes",
)
ROUTING_NUM_FLAG = Rule(
    _ROUTING,
    "expert_tokens_num_flag is True, not the default",
    f"{_ROUTING_TILING}, attributes",
)
ROUTING_QUANT_MODE = Rule(_ROUTING, "quant_mode is -1 or 1", f"{_ROUTING_TILING}, attributes")
ROUTING_RANGE_GIVEN = Rule(
    _ROUTING,
    "active_expert_range is given: its default is that of the process's first call",
    "op-plugin MoeInitRoutingV2KernelNpuOpApi.cpp",
)
ROUTING_RANGE = Rule(
    _ROUTING,
    "0 <= start < end <= expert_num in active_expert_range",
    f"{_ROUTING_TILING}, attributes",
)
ROUTING_EXPERTS = Rule(
    _ROUTING,
    "expert_num is at most 10240, or 5120 with expert_tokens_num_type 2",
    f"{_ROUTING_TILING}, attributes; torch_npu _meta_registrations.py",
)
ROUTING_ROW_TYPE = Rule(_ROUTING, "row_idx_type is 0 or 1", f"{_ROUTING_TILING}, attributes")
ROUTING_INT8 = Rule(
    _ROUTING, "int8 rows are not quantised again", f"{_ROUTING_PAGE}, quant_mode", TypeError
)
ROUTING_SCALE_DTYPE = Rule(_ROUTING, "scale is float32", f"{_ROUTING_PAGE}, scale", TypeError)
ROUTING_SCALE = Rule(
    _ROUTING,
    "scale is [N] with quant_mode -1; [active experts, H] or [1, H] with 1",
    f"{_ROUTING_PAGE}, scale; {_ROUTING_TILING}, input shapes",
)

# --------------------------------------------------------------------------------- grouped product

_GROUPED = "npu_grouped_matmul"
_GROUPED_PAGE = "API page npu_grouped_matmul"

GROUPED_TYPE = Rule(_GROUPED, "group_type is given", "op-plugin GroupedMatmulKernelNpuOpApi.cpp")
GROUPED_DTYPE = Rule(
    _GROUPED,
    "x and weight are bfloat16 or float32 alike",
    f"{_GROUPED_PAGE}, table 2",
    TypeError,
)
GROUPED_SHAPES = Rule(
    _GROUPED,
    "x is [M, K] and weight [E, K, N]",
    f"{_GROUPED_PAGE}, constraints of one x and one weight",
)
GROUPED_INNER = Rule(
    _GROUPED, "K and N are below 65536", f"{_GROUPED_PAGE}, constraints, InnerLimit"
)
GROUPED_X_CONTIGUOUS = Rule(
    _GROUPED,
    "x is contiguous: it may not be transposed",
    f"{_GROUPED_PAGE}, constraints of one x and one weight",
)
GROUPED_WEIGHT_STRIDES = Rule(
    _GROUPED,
    "weight is contiguous, or the transposed view of what is",
    f"{_GROUPED_PAGE}, constraints; torch_npu _meta_registrations.py is_transpose_weight",
)
GROUPED_LIST_GIVEN = Rule(
    _GROUPED, "group_list is given", f"{_GROUPED_PAGE}, constraints of one x and one weight"
)
GROUPED_LIST_DTYPE = Rule(
    _GROUPED, "group_list is int64", f"{_GROUPED_PAGE}, group_list", TypeError
)
GROUPED_LIST = Rule(
    _GROUPED, "group_list has an entry for each expert", f"{_GROUPED_PAGE}, group_list"
)
GROUPED_COUNTS = Rule(
    _GROUPED,
    "group_list_type 1 has at least two groups",
    f"{_GROUPED_PAGE}, group_list",
)
GROUPED_MAX_GROUPS = Rule(
    _GROUPED,
    "at most 1024 groups",
    f"{_GROUPED_PAGE}, constraints of one x and one weight",
)
GROUPED_BIAS_DTYPE = Rule(_GROUPED, "bias is float32", f"{_GROUPED_PAGE}, table 2", TypeError)
GROUPED_BIAS = Rule(_GROUPED, "bias is one tensor [E, N]", f"{_GROUPED_PAGE}, bias")

GROUPED_ROWS = Rule(
    _GROUPED,
    "no group is negative, and together they have no more rows than x",
    f"{_GROUPED_PAGE}, group_list; CANN aclnnGroupedMatmulV5, constraints",
    needs_data=True,
)

# ------------------------------------------------------------------------------------------ swiglu

_SWIGLU = "npu_swiglu"
_SWIGLU_PAGE = "API page npu_swiglu"

SWIGLU_DTYPE = Rule(_SWIGLU, "input is bfloat16 or float32", f"{_SWIGLU_PAGE}, input", TypeError)
SWIGLU_DIM = Rule(_SWIGLU, "dim is one of the input's", f"{_SWIGLU_PAGE}, dim")
SWIGLU_EVEN = Rule(_SWIGLU, "the size of dim is even", f"{_SWIGLU_PAGE}, dim")

# --------------------------------------------------------------------------------------- unpermute

_UNPERMUTE = "npu_moe_token_unpermute"
_UNPERMUTE_PAGE = "CANN aclnnMoeTokenUnpermute"

UNPERMUTE_DTYPE = Rule(
    _UNPERMUTE,
    "permuted_tokens is bfloat16 or float32",
    f"{_UNPERMUTE_PAGE}, permuted_tokens",
    TypeError,
)
UNPERMUTE_INDEX_DTYPE = Rule(
    _UNPERMUTE, "sorted_indices is int32", f"{_UNPERMUTE_PAGE}, sorted_indices", TypeError
)
UNPERMUTE_SHAPES = Rule(
    _UNPERMUTE,
    "permuted_tokens is [rows, H] and sorted_indices [N * K]",
    f"{_UNPERMUTE_PAGE}, permuted_tokens, sorted_indices",
)
UNPERMUTE_PROBS_DTYPE = Rule(
    _UNPERMUTE, "probs is bfloat16 or float32", f"{_UNPERMUTE_PAGE}, probs", TypeError
)
UNPERMUTE_PROBS = Rule(_UNPERMUTE, "probs is [N, K]", f"{_UNPERMUTE_PAGE}, probs")
UNPERMUTE_K = Rule(
    _UNPERMUTE,
    "K is 1 to 512",
    f"{_UNPERMUTE_PAGE}, constraints; ops-transformer moe_token_unpermute_tiling.cpp",
)

UNPERMUTE_INDEX = Rule(
    _UNPERMUTE,
    "sorted_indices are not negative; the NPU does not look",
    "ops-transformer moe_token_unpermute, the kernel",
    IndexError,
    needs_data=True,
)

# -------------------------------------------------------------------------------------------- quant

_QUANT = "npu_dynamic_quant"
_QUANT_PAGE = "API page npu_dynamic_quant"

QUANT_DTYPE = Rule(
    _QUANT,
    "input is bfloat16 (float32 on a CPU, for comparisons)",
    f"{_QUANT_PAGE}, x",
    TypeError,
)
QUANT_RANK = Rule(_QUANT, "input has two or more dimensions", f"{_QUANT_PAGE}, x")
QUANT_SMOOTH_DTYPE = Rule(
    _QUANT, "smooth_scales has the input's dtype", f"{_QUANT_PAGE}, smooth_scales", TypeError
)
QUANT_SMOOTH = Rule(
    _QUANT, "smooth_scales is [size of the last dimension]", f"{_QUANT_PAGE}, smooth_scales"
)

RULES: dict[str, Rule] = {
    name: rule for name, rule in list(globals().items()) if isinstance(rule, Rule)
}
"""Every rule, by name."""
