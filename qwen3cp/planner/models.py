"""The released models that can be planned without their files."""

from __future__ import annotations

import functools
import json
from importlib import resources
from typing import Any

from transformers import Qwen3MoeConfig

__all__ = ["KNOWN_MODELS", "known_config"]


@functools.cache
def _configs() -> dict[str, dict[str, Any]]:
    return json.loads(resources.files("qwen3cp.planner").joinpath("models.json").read_text())


KNOWN_MODELS = tuple(_configs())
"""Their hub ids; `known_config` takes them without the part before the slash too."""


def known_config(name: str) -> Qwen3MoeConfig | None:
    """The config of a released model, None if it is not one of `KNOWN_MODELS`."""
    for hub_id, values in _configs().items():
        if name in (hub_id, hub_id.split("/")[1]):
            return Qwen3MoeConfig(**values)
    return None
