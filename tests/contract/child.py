"""In a process of its own, with the real torch_npu: holds schemas, tags, calls and Meta kernels to
it. `python -m tests.contract.child TASK REPORT`, both JSON."""

from __future__ import annotations

import importlib
import json
import sys
import types
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen3MoeConfig

from qwen3cp import CommConfig, CPQwen3MoeForCausalLM, ParallelContext, ops
from qwen3cp.ops.registry import KERNELS
from tests.contract.record import bytes_of_logits, to_data, to_meta
from tests.models import random_ids
from tests.ops.rule_cases import CASES, on
from tests.ranks import Ranks


def overload(name: str) -> torch._ops.OpOverload:
    packet, _, overload_name = name.partition(".")
    return getattr(getattr(torch.ops.npu, packet), overload_name or "default")


def has_meta(name: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"npu::{name}", "Meta")


def outputs(result: Any) -> list[Any]:
    """Shapes and dtypes; strides are compared as "contiguous or not"."""
    found = []
    for leaf in tree_leaves(result):
        assert isinstance(leaf, Tensor), leaf
        found.append([list(leaf.shape), str(leaf.dtype), leaf.is_contiguous()])
    return found


def outputs_of_data(data: Any) -> list[Any]:
    return outputs(to_meta(data))


class Attempt:
    """What came out, or the error."""

    def __init__(self, function: Any, *args: Any, **kwargs: Any) -> None:
        self.out, self.error = None, ""
        try:
            self.out = outputs(function(*args, **kwargs))
        except Exception as error:
            self.error = f"{type(error).__name__}: {error}".splitlines()[0]


def full_call(schema: torch.FunctionSchema, call: dict[str, Any]) -> dict[str, Any]:
    """Every argument by keyword, with the schema's defaults."""
    given = dict(zip((a.name for a in schema.arguments), call["args"], strict=False))
    given |= call["kwargs"]
    defaults = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    return {**defaults, **given}


def call_violations(calls: list[dict[str, Any]], our_schemas: dict[str, Any]) -> list[str]:
    """Calls that the real schema does not accept, or whose outputs differ from those of the real
    Meta kernel. Each is made as it was recorded, and with every default of ours passed."""
    found = []
    for call in calls:
        name = call["op"]
        forms = [(call["args"], call["kwargs"]), ([], full_call(our_schemas[name], call))]
        for args, kwargs in forms:
            real = Attempt(overload(name), *to_meta(args), **to_meta(kwargs))
            if real.error:
                found.append(f"{name}: torch_npu refuses the call: {real.error}")
            elif real.out != (expected := outputs_of_data(call["out"])):
                found.append(f"{name}: torch_npu gives {real.out}, the CPU kernel {expected}")
    return found


def package_violations(
    schemas: dict[str, str], kernels: dict[str, Any], tags_of: Any, real_outputs: list[Any]
) -> list[str]:
    """Schemas, tags and Meta kernels of one copy of qwen3cp.ops against torch_npu's."""
    found = []
    for name, text in schemas.items():
        real = overload(name)
        try:
            ours = str(torch._C.parse_schema(f"npu::{text}"))
        except RuntimeError as error:
            ours = f"no schema: {error}"
        if ours != str(real._schema):
            found.append(f"{name}: the schema is {real._schema}, not {ours}")
        if set(tags_of(text)) != set(real.tags):
            found.append(f"{name}: the tags are {real.tags}, not {tags_of(text)}")
    for call, expected in real_outputs:
        name = call["op"]
        ours = Attempt(kernels[name].meta, *to_meta(call["args"]), **to_meta(call["kwargs"]))
        if ours.out != expected:
            found.append(f"{name}: torch_npu gives {expected}, our Meta {ours.out or ours.error}")
    return found


def load_ops(root: Path) -> tuple[dict[str, str], dict[str, Any], Any]:
    """Schemas, kernels and tags of a copy of the package's sources, which is not registered."""
    for name in [n for n in sys.modules if n == "qwen3cp" or n.startswith("qwen3cp.")]:
        del sys.modules[name]
    for name, path in (("qwen3cp", root), ("qwen3cp.ops", root / "ops")):
        module = types.ModuleType(name)
        module.__path__ = [str(path)]
        sys.modules[name] = module
    schemas = importlib.import_module("qwen3cp.ops.schemas").SCHEMAS
    registry = importlib.import_module("qwen3cp.ops.registry")
    return schemas, registry.KERNELS, registry.tags_of


class Compare(TorchDispatchMode):
    """Of npu calls on meta tensors: our checks accept them, and both Meta kernels agree."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace != "npu":
            return func(*args, **kwargs)
        name = func.name().removeprefix("npu::")
        self.names.add(name)
        ops.check_call(func, args, kwargs, npu_dtypes=True)
        ours = outputs(KERNELS[name].meta(*args, **kwargs))
        result = func(*args, **kwargs)
        if outputs(result) != ours:
            self.found.append(f"{name}: torch_npu {outputs(result)}, ours {ours}: {to_data(args)}")
        return result


def full_size(layers: int, **sizes: Any) -> Qwen3MoeConfig:
    return cast(Any, Qwen3MoeConfig)(
        vocab_size=151936,
        num_key_value_heads=4,
        head_dim=128,
        num_hidden_layers=layers,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        max_position_embeddings=262144,
        **sizes,
    )


SIZES = {
    "30B": dict(hidden_size=2048, num_attention_heads=32, moe_intermediate_size=768),
    "235B": dict(hidden_size=4096, num_attention_heads=64, moe_intermediate_size=1536),
}


def run_full_size() -> dict[str, Any]:
    """Two layers of the released sizes, as one rank of 16, on meta tensors."""
    dist.init_process_group("fake", store=FakeStore(), rank=5, world_size=16)
    report = {}
    for name, sizes in SIZES.items():
        for moe in ("tp", "ep"):
            comm = CommConfig(
                all_reduce="int8_two_step",
                kv_gather="int8",
                exchange="all_gather",
                exchange_rows="int8",
                check_plan=False,
            )
            ctx = ParallelContext.from_world(4, 4, moe=moe, comm=comm, backend="fake")
            with torch.device("meta"):
                model = CPQwen3MoeForCausalLM(full_size(2, **sizes), parallel_context=ctx)
            model = model.bfloat16()
            cache = model.new_kv_cache(max_tokens=20000)
            sequences = [cache.new_sequence() for _ in range(2)]
            with Compare() as compare:
                model.prefill(cache, sequences, random_ids(0, 9000, 5, vocab_size=151936))
                logits = model.prefill(cache, sequences, random_ids(1, 700, 30))
                model.decode(cache, sequences, logits.argmax(-1))
            report[f"{name}, moe {moe}"] = [sorted(compare.names), compare.found]
    dist.destroy_process_group()
    return report


def check_rules() -> dict[str, dict[str, Any]]:
    """Of every rule that a shape or a host integer can break: is the call refused by our check, and
    by torch_npu's Meta kernel?"""
    report = {}
    for name, case in CASES.items():
        args, kwargs = on("meta", case.broken)
        try:
            ops.check_call(case.op, args, kwargs)
            ours = ""
        except Exception as error:
            ours = str(error)
        theirs = Attempt(overload(case.op), *args, **kwargs).error
        report[name] = {"ours": ours, "theirs": theirs}
    return report


def main(task_file: str, report_file: str) -> None:
    torch.set_num_threads(1)
    task = json.loads(Path(task_file).read_text())
    assert ops.HAS_TORCH_NPU
    torch_npu = importlib.import_module("torch_npu")
    report: dict[str, Any] = {"version": torch_npu.__version__, "file": torch_npu.__file__}

    report["without_meta"] = [name for name in ops.SCHEMAS if not has_meta(name)]
    report["rules"] = check_rules()
    report["full_size"] = run_full_size()
    report["logits"] = bytes_of_logits(1, 1, Path(task["checkpoint"]))
    ranks = Ranks(2)
    report["logits_of_ranks"] = ranks.run(bytes_of_logits, 2, 1, Path(task["checkpoint"]))
    ranks.close()

    calls = task["calls"]
    our_schemas = {n: torch._C.parse_schema(f"npu::{text}") for n, text in ops.SCHEMAS.items()}
    report["calls"] = call_violations(calls, our_schemas)
    report["mutated_calls"] = {
        name: call_violations([call], our_schemas) for name, call in task["mutated_calls"].items()
    }
    real_outputs = [
        (call, Attempt(overload(call["op"]), *to_meta(call["args"]), **to_meta(call["kwargs"])).out)
        for call in calls
    ]
    report["packages"] = {
        name: package_violations(*load_ops(Path(root)), real_outputs)
        for name, root in task["packages"].items()
    }
    Path(report_file).write_text(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
