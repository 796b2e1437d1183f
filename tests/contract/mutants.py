"""Deliberate mistakes, each of which the contract must catch.

In copies of qwen3cp/ops (a schema, a tag, a shape rule or a dtype of a Meta kernel) and in recorded
calls (arguments and outputs).
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tests.contract.torch_npu import ROOT


class Edit(NamedTuple):
    """Replace the one occurrence of `old` in a file of qwen3cp/ops."""

    op: str  # that must be named by what is found
    file: str
    old: str
    new: str


FIA = "npu_fused_infer_attention_score"
ROUTING = "npu_moe_init_routing_v2"

SOURCES = {
    "an argument's name": Edit(FIA, "schemas.py", "actual_seq_lengths_kv=None", "actual_kv=None"),
    "a float default": Edit(
        "npu_rms_norm",
        "schemas.py",
        '"npu_rms_norm(Tensor input, Tensor gamma, float epsilon=1e-06)',
        '"npu_rms_norm(Tensor input, Tensor gamma, float epsilon=1e-05)',
    ),
    "an int default": Edit(
        ROUTING, "schemas.py", "int expert_tokens_num_type=0", "int expert_tokens_num_type=1"
    ),
    "a string default": Edit(
        "npu_rotary_mul", "schemas.py", "rotary_mode='half'", "rotary_mode='interleave'"
    ),
    "a list default": Edit(
        ROUTING, "schemas.py", "active_expert_range=[]", "active_expert_range=[0, 1]"
    ),
    "the order of arguments": Edit(
        "npu_moe_gating_top_k_softmax",
        "schemas.py",
        "Tensor? finished=None, int k=1",
        "int k=1, Tensor? finished=None",
    ),
    "the type of a list": Edit(
        FIA, "schemas.py", "SymInt[]? actual_seq_lengths=None", "int[]? actual_seq_lengths=None"
    ),
    "an optional argument": Edit(
        "npu_moe_token_unpermute", "schemas.py", "Tensor? probs=None", "Tensor probs"
    ),
    "keyword-only arguments": Edit(
        "npu_dynamic_quant",
        "schemas.py",
        "npu_dynamic_quant(Tensor input, *, ",
        "npu_dynamic_quant(Tensor input, ",
    ),
    "an alias": Edit(
        "npu_scatter_nd_update_", "schemas.py", "(Tensor(a!) input,", "(Tensor input,"
    ),
    "the number of results": Edit(
        "npu_swiglu",
        "schemas.py",
        "npu_swiglu(Tensor input, int dim=-1) -> Tensor",
        "npu_swiglu(Tensor input, int dim=-1) -> (Tensor, Tensor)",
    ),
    "a missing argument": Edit(
        "npu_grouped_matmul", "schemas.py", "int[]? tuning_config=None, ", ""
    ),
    "a tag": Edit(
        "npu_scatter_nd_update_", "registry.py", "torch.Tag.inplace,", "torch.Tag.pointwise,"
    ),
    "a tag of all operators": Edit(
        FIA, "registry.py", "(torch.Tag.pt2_compliant_tag, *in_place)", "in_place"
    ),
    "the shape of attention": Edit(
        FIA, "attention_call.py", '{"N": self.num_heads, "D"', '{"N": self.num_kv_heads, "D"'
    ),
    "the shape without LSE": Edit(FIA, "attention_call.py", "return (0,)", "return (1,)"),
    "the shape of rstd": Edit(
        "npu_rms_norm", "norm.py", "*(1 for _ in gamma.shape)", "*gamma.shape"
    ),
    "the shape of counts": Edit(
        ROUTING,
        "moe.py",
        "tokens_shape = (call.end - call.start,)",
        "tokens_shape = (call.expert_num,)",
    ),
    "the width of a grouped product": Edit(
        "npu_grouped_matmul",
        "moe.py",
        "return [rows.new_empty(rows.shape[0], experts.shape[2])]",
        "return [rows.new_empty(rows.shape[0], experts.shape[1])]",
    ),
    "the half of SwiGLU": Edit("npu_swiglu", "moe.py", "shape[dim] //= 2", "shape[-1] //= 2"),
    "the rows of unpermutation": Edit(
        "npu_moe_token_unpermute",
        "moe.py",
        "return permuted_tokens.new_empty(num_tokens, permuted_tokens.shape[1])",
        "return permuted_tokens.new_empty(permuted_tokens.shape)",
    ),
    "the dtype of counts": Edit(
        ROUTING,
        "moe.py",
        "x.new_empty(tokens_shape, dtype=torch.int64)",
        "x.new_empty(tokens_shape, dtype=torch.int32)",
    ),
    "the dtype of experts": Edit(
        "npu_moe_gating_top_k_softmax",
        "moe.py",
        "experts = x.new_empty(shape, dtype=torch.int32)",
        "experts = x.new_empty(shape, dtype=torch.int64)",
    ),
    "the dtype of scales": Edit(
        "npu_dynamic_quant",
        "quant.py",
        "input.new_empty(input.shape[:-1], dtype=torch.float32)",
        "input.new_empty(input.shape[:-1])",
    ),
    "the dtype of a sum": Edit(
        "npu_add_rms_norm",
        "norm.py",
        "_new_rstd(x1, gamma), x1.new_empty(x1.shape)",
        "_new_rstd(x1, gamma), x1.new_empty(x1.shape, dtype=torch.float32)",
    ),
}


def write_packages(folder: Path) -> dict[str, str]:
    """Where the sources are: the package's own, by the name "", and a mutated copy of each."""
    packages = {"": str(ROOT / "qwen3cp")}
    for number, (name, edit) in enumerate(SOURCES.items()):
        root = folder / f"mutant-{number}"
        shutil.copytree(ROOT / "qwen3cp" / "ops", root / "ops")
        file = root / "ops" / edit.file
        text = file.read_text()
        assert text.count(edit.old) == 1, f"{name}: {edit.old!r} is not once in {edit.file}"
        file.write_text(text.replace(edit.old, edit.new))
        packages[name] = str(root)
    return packages


def _set(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda call: call["kwargs"].update(changes)


def _rename(old: str, new: str) -> Callable[[dict[str, Any]], None]:
    def change(call: dict[str, Any]) -> None:
        call["kwargs"][new] = call["kwargs"].pop(old)

    return change


def _drop_last(call: dict[str, Any]) -> None:
    call["args"].pop()


def _append(value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda call: call["args"].append(value)


def _tensor_for_list(call: dict[str, Any]) -> None:
    call["args"][0] = call["args"][0][0]


def _without_group_type(call: dict[str, Any]) -> None:
    del call["kwargs"]["group_type"]


def _other_output(call: dict[str, Any]) -> None:
    call["out"][1]["dtype"] = "float32"


CALLS: dict[str, tuple[str, Callable[[dict[str, Any]], None]]] = {
    "an argument that is not there": (FIA, _set(is_causal=True)),
    "a renamed argument": (FIA, _rename("atten_mask", "attn_mask")),
    "floats in a list of lengths": (FIA, _set(actual_seq_lengths=[1.5])),
    "a number for a list": (ROUTING, _set(active_expert_range=4)),
    "a list of three for int[2]": (ROUTING, _set(active_expert_range=[0, 1, 2])),
    "a string for a number": (FIA, _set(num_heads="8")),
    "a tensor for a list of tensors": ("npu_grouped_matmul", _tensor_for_list),
    "group_type left out": ("npu_grouped_matmul", _without_group_type),
    "a missing positional argument": ("npu_scatter_nd_update_", _drop_last),
    "one positional argument too many": ("npu_scatter_nd_update_", _append(None)),
    "keyword arguments as positional": ("npu_dynamic_quant", _append(None)),
    "the dtype of an output": ("npu_moe_gating_top_k_softmax", _other_output),
}


def mutated_calls(calls: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    found = {}
    for name, (op, change) in CALLS.items():
        call = copy.deepcopy(next(call for call in calls if call["op"] == op))
        change(call)
        found[name] = call
    return found
