"""Switches of the CPU kernels, read from the environment once, when first imported."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Settings:
    """How the CPU kernels behave. Fields may be assigned; tests use `override`."""

    # Attention on bfloat16 rounds its scores to bfloat16, as a plain torch.bmm does. The NPU keeps
    # them in float32; set this to do the same.
    float32_scores: bool = False

    # Fill what the NPU leaves unwritten with NaN (integers: 0x7F bytes), and look for duplicate
    # scatter indices, whose order is undefined on the NPU.
    debug: bool = False

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
