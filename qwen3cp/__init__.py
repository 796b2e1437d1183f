"""Context-parallel Qwen3-MoE inference modules for Ascend NPUs, and the same code on a CPU."""

import logging

from qwen3cp import collectives, errors, ops
from qwen3cp.attention import CPQwen3MoeAttention
from qwen3cp.comm_report import CommunicationReport, error_report
from qwen3cp.decoder import CPQwen3MoeDecoderLayer
from qwen3cp.kv_cache import PagedCacheAdapter, PagedKVCache, Sequence
from qwen3cp.model import CPQwen3MoeForCausalLM, CPQwen3MoeModel, register_auto
from qwen3cp.moe import CPQwen3MoeMLP, CPQwen3MoeSparseMoeBlock
from qwen3cp.parallel import CommConfig, ForwardPhase, ParallelContext
from qwen3cp.plan import AttentionCall, ForwardPlan
from qwen3cp.routing import ExpertPlacement, record_routing
from qwen3cp.version import __version__

__all__ = [
    "AttentionCall",
    "CPQwen3MoeAttention",
    "CPQwen3MoeDecoderLayer",
    "CPQwen3MoeForCausalLM",
    "CPQwen3MoeMLP",
    "CPQwen3MoeModel",
    "CPQwen3MoeSparseMoeBlock",
    "CommConfig",
    "CommunicationReport",
    "ExpertPlacement",
    "ForwardPhase",
    "ForwardPlan",
    "PagedCacheAdapter",
    "PagedKVCache",
    "ParallelContext",
    "Sequence",
    "__version__",
    "collectives",
    "error_report",
    "errors",
    "ops",
    "record_routing",
    "register_auto",
]

logging.getLogger(__name__).addHandler(logging.NullHandler())
