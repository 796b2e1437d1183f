"""Switches of the CPU kernels, read from the environment once, when first imported."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass
class Settings:
    """How the CPU kernels behave. Fields may be assigned; tests use `override`."""

    # Attention on bfloat16 may round its scores to bfloat16, as a plain torch.bmm does, and its
    # weights after the division by their sum, as transformers' eager attention does. The NPU keeps
    # scores in float32 and rounds weights before the division; set this to do the same.
    float32_scores: bool = False

    # Multiply large bfloat16 matrices as they are. Without AMX, float32 products of the same
    # matrices are about twice as fast in torch (and as exact or more so).
    bfloat16_products: bool = torch.cpu.get_capabilities().get("amx_bf16", False)

    # Fill what the NPU leaves unwritten with NaN (integers: 0x7F bytes), and look for duplicate
    # scatter indices, whose order is undefined on the NPU.
    debug: bool = False

    def product_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """In which dtype to multiply large matrices of `dtype`, bfloat16 or float32."""
        return dtype if self.bfloat16_products else torch.float32

    @contextmanager
    def override(self, **fields: bool) -> Iterator[None]:
        """Set fields for the length of a `with` block."""
        saved = {name: getattr(self, name) for name in fields}
        try:
            for name, value in fields.items():
                setattr(self, name, value)
            yield
        finally:
            for name, value in saved.items():
                setattr(self, name, value)


settings = Settings(
    float32_scores=os.environ.get("QWEN3CP_FLOAT32_SCORES", "0") == "1",
    debug=os.environ.get("QWEN3CP_DEBUG_OPS", "0") == "1",
)
