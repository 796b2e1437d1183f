"""The lm-eval harness on context-parallel ranks. Importing it registers the model `qwen3cp`."""

from qwen3cp.eval.lm import CPQwen3LM

__all__ = ["CPQwen3LM"]
