"""The NPU operators of the model, also where there is no NPU.

Model code calls `torch.ops.npu.*`. With torch_npu installed its kernels serve NPU tensors and this
module adds CPU kernels beside them. Without it, this module defines the same operators from the
same schemas, with CPU and Meta kernels.
"""

import importlib
import importlib.util

import torch

from qwen3cp.ops.registry import KERNELS, check_call, tags_of
from qwen3cp.ops.rules import RULES
from qwen3cp.ops.schemas import SCHEMAS
from qwen3cp.ops.settings import settings

__all__ = ["HAS_TORCH_NPU", "RULES", "SCHEMAS", "check_call", "settings"]

HAS_TORCH_NPU = importlib.util.find_spec("torch_npu") is not None

# torch_npu must define its operators first: defining ours and importing it later aborts the
# process.
if HAS_TORCH_NPU:
    try:
        importlib.import_module("torch_npu")
    except Exception as error:
        raise ImportError(
            f"torch_npu is installed but cannot be imported: {error}. Load the CANN environment "
            "(set_env.sh), or use a Python environment without torch_npu to run on the CPU. "
            "TORCH_DEVICE_BACKEND_AUTOLOAD=0 only keeps `import torch` from loading torch_npu."
        ) from error

# The registrations last as long as this object.
_library = torch.library.Library("npu", "FRAGMENT")
for _name, _schema in SCHEMAS.items():
    if not HAS_TORCH_NPU:
        _library.define(_schema, tags=tags_of(_schema))
        _library.impl(_name, KERNELS[_name].meta, "Meta")
    # Inference only: what the kernels do inside is not recorded, and backward warns.
    _library.impl(_name, torch.no_grad()(KERNELS[_name].cpu), "CPU")
