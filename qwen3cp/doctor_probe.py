"""What `qwen3cp doctor` runs in processes of its own: each step prints one line of JSON.

A broken torch_npu can end the process that imports it, so nothing here runs in doctor's own.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any


def probe_torch() -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    return {
        "version": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "backends": [b for b in ("gloo", "mpi", "nccl") if dist.is_backend_available(b)],
    }


def probe_torch_npu() -> dict[str, Any]:
    import importlib

    import torch

    torch_npu = importlib.import_module("torch_npu")
    npu = torch_npu.npu
    available = bool(npu.is_available())
    devices = []
    for index in range(npu.device_count() if available else 0):
        properties = npu.get_device_properties(index)
        devices.append({"name": properties.name, "bytes": properties.total_memory})
    backends = [name for name in ("hccl", "gloo") if torch.distributed.is_backend_available(name)]
    return {
        "version": torch_npu.__version__,
        "available": available,
        "devices": devices,
        "backends": backends,
    }


def probe_operators() -> dict[str, Any]:
    """Which of the operators that the model calls are there, with the schemas that it expects."""
    import torch

    from qwen3cp.ops import HAS_TORCH_NPU, SCHEMAS

    missing, differ = [], {}
    for name, text in SCHEMAS.items():
        schema = torch._C.parse_schema(f"npu::{text}")
        operator = getattr(torch.ops.npu, schema.name.removeprefix("npu::"), None)
        overload = getattr(operator, schema.overload_name or "default", None)
        if overload is None:
            missing.append(name)
        elif overload._schema != schema:
            differ[name] = str(overload._schema)
    return {
        "source": "torch_npu" if HAS_TORCH_NPU else "qwen3cp",
        "number": len(SCHEMAS),
        "missing": missing,
        "differ": differ,
    }


def probe_run() -> dict[str, Any]:
    """A random two-layer model on the CPU, and on the first NPU: prefill and one decode step."""
    import torch
    from transformers import Qwen3MoeConfig

    from qwen3cp.model import CPQwen3MoeForCausalLM
    from qwen3cp.parallel import default_device
    from qwen3cp.weights import make_random

    sizes: dict[str, Any] = dict(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=256,
        moe_intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=128,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        initializer_range=0.06,
    )
    config = Qwen3MoeConfig(**sizes)
    ids = [(7 * i) % 256 for i in range(300)]
    logits = {}
    with tempfile.TemporaryDirectory() as folder:
        make_random(config, Path(folder) / "model", dtype=torch.bfloat16)
        for device in {"cpu": None, str(default_device()): None}:
            model = CPQwen3MoeForCausalLM.from_pretrained(
                Path(folder) / "model", device=device, progress=False
            )
            cache = model.new_kv_cache(max_tokens=512)
            sequence = cache.new_sequence()
            first = model.prefill(cache, [sequence], [ids])
            second = model.decode(cache, [sequence], [1])
            logits[device] = torch.cat([first, second]).float().cpu()
    expected = logits.pop("cpu")
    return {
        "finite": bool(expected.isfinite().all()),
        "devices": {
            device: float((found - expected).norm() / expected.norm())
            for device, found in logits.items()
        },
    }


PROBES = {
    "torch": probe_torch,
    "torch_npu": probe_torch_npu,
    "operators": probe_operators,
    "run": probe_run,
}


if __name__ == "__main__":
    print(json.dumps(PROBES[sys.argv[1]]()))
