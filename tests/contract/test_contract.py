"""Our schemas, calls, tags and Meta kernels against the real torch_npu."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

import qwen3cp
from qwen3cp import CommConfig
from qwen3cp.config import OPERATORS
from qwen3cp.ops import RULES, SCHEMAS
from tests.contract import torch_npu as real
from tests.contract.conftest import require, scenarios
from tests.contract.mutants import CALLS, SOURCES
from tests.contract.record import MORE_STEPS, STEPS, bytes_of_logits
from tests.ops.rule_cases import CASES
from tests.ranks import run

# The overload that takes a list: the model never calls it, and its schema is defined so that a list
# is refused by name.
NEVER_CALLED = {"npu_grouped_matmul.List"}


def operators_in_the_sources() -> set[str]:
    """Every X of `torch.ops.npu.X` in the package but for qwen3cp.ops."""
    package = Path(qwen3cp.__file__).parent
    files = [
        *package.rglob("*.py"),
        *package.glob("weights/**/*.py"),
        *package.glob("eval/**/*.py"),
    ]
    found = set()
    for file in files:
        if file.is_relative_to(package / "ops"):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value).endswith("ops.npu"):
                found.add(node.attr)
    return found


# What is recorded


def test_every_operator_is_recorded(calls):
    names = {call["op"] for call in calls}
    assert names == operators_in_the_sources() == set(OPERATORS)
    assert names == set(SCHEMAS) - NEVER_CALLED


def test_every_step_of_every_scenario_is_recorded(recorded):
    """On every rank; a rank that has none of the rows calls fewer operators."""
    attention = '"op": "npu_fused_infer_attention_score"'
    for name, of_ranks in recorded.items():
        without_settings = name.endswith("{}")
        expected = STEPS + MORE_STEPS if without_settings else STEPS
        assert all(tuple(steps) == expected for steps in of_ranks), name
        for step in expected:
            texts = [text for steps in of_ranks for text in steps[step]]
            assert all(steps[step] for steps in of_ranks), (name, step)
            assert any(attention in text for text in texts), (name, step)


def test_every_setting_of_the_communication_is_recorded():
    """So a new value of a setting cannot be forgotten."""
    used = {(field, value) for *_, comm in scenarios() for field, value in comm.items()}
    for field, hint in get_type_hints(CommConfig).items():
        if "Literal" in str(hint):
            assert {(field, value) for value in get_args(hint)} <= used
    assert {"tp", "ep"} == {moe for *_, moe, _ in scenarios()}


def test_what_the_settings_change_is_recorded(recorded):
    """The forms of a reduction, a gather and an exchange do make other calls."""
    by_scenario = {
        name: {text for steps in of_ranks for text in steps["prefill"]}
        for name, of_ranks in recorded.items()
    }

    def found(*words: str) -> set[str]:
        return set().union(
            *(texts for name, texts in by_scenario.items() if all(word in name for word in words))
        )

    for words in (["one_shot"], ["two_step"], ["kv_gather': 'int8"], ["exchange_rows': 'int8"]):
        assert any('"op": "npu_dynamic_quant"' in text for text in found(*words)), words
    groups = {
        json.loads(text)["args"][0]["shape"][1]
        for text in found("moe")
        if '"op": "npu_dynamic_quant"' in text
    }
    assert groups == {256, 128, 64}  # a token, a group, a head
    to_ranks = {text for text in found("all_to_all") if '"op": "npu_moe_init_routing_v2"' in text}
    assert any('"dtype": "int8"' in text for text in to_ranks)
    ranges = {
        str(json.loads(text)["kwargs"]["active_expert_range"])
        for text in found("cp 2, tp 2", "moe ep")
        if '"op": "npu_moe_init_routing_v2"' in text
    }
    assert {"[0, 4]", "[4, 8]", "[8, 12]", "[12, 16]"} <= ranges


def test_shapes_of_the_call_map(recorded):
    """Those that docs/npu.md gives: 184 rows on CP 2 x TP 2, heads of 64."""
    (name,) = [n for n in recorded if "cp 2, tp 2" in n and "'kv_gather': 'int8'" in n]
    num_rows, rows, heads, kv_heads, dim = 184, 92, 4, 2, 64
    width = kv_heads * dim
    for steps in recorded[name]:
        calls = [json.loads(text) for text in steps["prefill"]]

        def of(op: str, calls=calls) -> list[dict]:
            return [call for call in calls if call["op"] == op]

        rotated = [call["args"][0]["shape"] for call in of("npu_rotary_mul")]
        assert sorted(rotated) == [[1, rows, kv_heads, dim], [1, rows, heads, dim]]
        (packed,) = of("npu_dynamic_quant")
        assert packed["args"][0]["shape"] == [2 * rows * kv_heads, dim]
        (write,) = of("npu_scatter_nd_update_")
        cache, slots, updates = (each["shape"] for each in write["args"])
        assert updates == [2 * num_rows, width] and slots == [2 * num_rows, 1]
        assert cache == [2 * 24 * 128, width]
        (attention,) = of("npu_fused_infer_attention_score")
        options = attention["kwargs"]
        assert attention["args"][0]["shape"] == [rows, heads, dim]
        assert (options["input_layout"], options["sparse_mode"]) == ("TND", 3)
        assert options["atten_mask"]["shape"] == [2048, 2048]
        assert options["actual_seq_lengths"][-1] == rows
        assert len(options["actual_seq_lengths_kv"]) == len(options["actual_seq_lengths"])
        (gating,) = of("npu_moe_gating_top_k_softmax")
        assert gating["args"][0] == {"shape": [rows, 16], "stride": [16, 1], "dtype": "float32"}


# Against torch_npu


def test_version(report, torch_npu):
    assert report["version"] == real.pinned_version()
    assert Path(report["file"]).is_relative_to(torch_npu)


def test_schemas_tags_and_meta_kernels_are_those_of_torch_npu(report):
    assert report["packages"][""] == []


def test_calls_are_accepted_and_give_what_the_cpu_kernels_give(report):
    assert report["calls"] == []


def test_operators_that_torch_npu_has_no_meta_kernel_for(report):
    assert report["without_meta"] == []


def test_full_size_layers(report):
    """30B and 235B, one rank of CP 4 x TP 4, in bfloat16: our checks accept every call, and both
    Meta kernels agree on every output."""
    assert len(report["full_size"]) == 4
    for names, found in report["full_size"].values():
        assert found == []
        assert set(names) == set(OPERATORS)


def test_logits_are_the_same_beside_torch_npu(report, ranks, checkpoint):
    assert report["logits"] == bytes_of_logits(1, 1, checkpoint)
    assert len(report["logits"]) == 6 and all(report["logits"])
    assert report["logits_of_ranks"] == run(ranks, (2, 1), bytes_of_logits, checkpoint)


def test_checks_work_beside_torch_npu(report):
    """Its Meta kernels serve meta tensors then, so the explicit check is what refuses a call."""
    found = report["rules"]
    assert sorted(found) == sorted(CASES)
    for name, refused in found.items():
        assert refused["ours"].endswith(f"[{RULES[name].source}]")
    accepted = [name for name, refused in found.items() if not refused["theirs"]]
    assert len(accepted) > len(found) // 2  # what this is for


# Mutations


@pytest.mark.parametrize("name", SOURCES)
def test_mistakes_in_the_sources_are_caught(report, name):
    found = report["packages"][name]
    assert any(line.startswith(f"{SOURCES[name].op}: ") for line in found), found


@pytest.mark.parametrize("name", CALLS)
def test_mistakes_in_calls_are_caught(report, name):
    found = report["mutated_calls"][name]
    assert any(line.startswith(f"{CALLS[name][0]}: ") for line in found), found


def test_there_are_at_least_ten_mutations():
    assert len(SOURCES) >= 10 and len(CALLS) >= 10


# Where torch_npu cannot be had


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def prepare_fails(match):
    with pytest.raises(real.Unavailable, match=match):
        real.prepare()


def test_without_gcc(empty_cache, monkeypatch):
    monkeypatch.setenv("PATH", str(empty_cache))
    prepare_fails("^gcc is not installed")


def test_without_the_wheel(empty_cache, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    prepare_fails(f"^pip cannot download torch_npu {real.pinned_version()}: ")
    assert list((empty_cache / "qwen3cp").iterdir()) == []  # nothing half done


def test_with_another_torch(empty_cache, monkeypatch):
    monkeypatch.setattr(real.torch, "__version__", "2.9.1+cpu")
    prepare_fails("is made for torch 2.13.0, not 2.9.1")


@pytest.mark.parametrize("ci, outcome", [("true", pytest.fail), ("", pytest.skip)])
def test_what_is_missing_is_named(empty_cache, monkeypatch, ci, outcome):
    monkeypatch.setenv("PATH", str(empty_cache))
    monkeypatch.setenv("CI", ci)
    with pytest.raises(outcome.Exception, match="gcc is not installed"):
        require()
