"""Context-parallel Qwen3-MoE inference modules for Ascend NPUs, and the same code on a CPU.

The names below are imported when they are first used, and torch and torch_npu with them, so that
the command line's help and `qwen3cp doctor` run where those do not import.
"""

import importlib
import logging
import sys
from typing import TYPE_CHECKING, Any

from qwen3cp.version import __version__

if TYPE_CHECKING:
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

_MODULES = {
    "attention": ["CPQwen3MoeAttention"],
    "comm_report": ["CommunicationReport", "error_report"],
    "decoder": ["CPQwen3MoeDecoderLayer"],
    "kv_cache": ["PagedCacheAdapter", "PagedKVCache", "Sequence"],
    "model": ["CPQwen3MoeForCausalLM", "CPQwen3MoeModel", "register_auto"],
    "moe": ["CPQwen3MoeMLP", "CPQwen3MoeSparseMoeBlock"],
    "parallel": ["CommConfig", "ForwardPhase", "ParallelContext"],
    "plan": ["AttentionCall", "ForwardPlan"],
    "routing": ["ExpertPlacement", "record_routing"],
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

logging.getLogger(__name__).addHandler(logging.NullHandler())

if "torch" in sys.modules:  # whoever has imported torch finds torch.ops.npu filled
    importlib.import_module("qwen3cp.ops")


def __getattr__(name: str) -> Any:
    if name in ("collectives", "errors", "ops"):
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
