"""The lm-eval harness on context-parallel ranks. Importing it makes `qwen3cp` a model of lm-eval.

The model itself is imported when it is first used, and torch with it.
"""

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen3cp.eval.lm import CPQwen3LM

__all__ = ["CPQwen3LM"]

if find_spec("lm_eval") is not None:
    import lm_eval.models  # noqa: F401  (its own models: it would not register them after ours)
    from lm_eval.api.registry import model_registry

    model_registry.register("qwen3cp", target="qwen3cp.eval.lm:CPQwen3LM")


def __getattr__(name: str) -> Any:
    if name == "CPQwen3LM":
        from qwen3cp.eval.lm import CPQwen3LM

        return CPQwen3LM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
