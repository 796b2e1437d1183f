"""The operators as torch sees them: schemas, tags, compilation, and life beside torch_npu."""

import inspect
import os
import subprocess
import sys
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves

from qwen3cp import ops
from qwen3cp.ops import attention_call, cache, moe, norm, quant, rotary

from .helpers import npu

NAMES = list(ops.SCHEMAS)


def overload(name):
    packet, _, overload_name = name.partition(".")
    return getattr(getattr(npu, packet), overload_name or "default")


@pytest.mark.parametrize("name", NAMES)
def test_schemas(name):
    schema = torch._C.parse_schema(f"npu::{ops.SCHEMAS[name]}")
    registered = overload(name)._schema
    assert registered == schema
    assert torch._C.parse_schema(str(registered)) == schema


@pytest.mark.parametrize("name", NAMES)
def test_operators_that_change_an_argument_say_so(name):
    in_place = name.endswith("_")
    assert overload(name)._schema.is_mutable == in_place
    expected = {torch.Tag.pt2_compliant_tag} | ({torch.Tag.inplace} if in_place else set())
    assert set(overload(name).tags) == expected


# Where each operator's arguments are taken apart. A kernel receives only what differs from the
# schema's defaults, so it must repeat them all.
SIGNATURES = {
    "npu_fused_infer_attention_score": attention_call.check_call,
    "npu_scatter_nd_update_": cache.scatter_nd_update_,
    "npu_rms_norm": norm.rms_norm,
    "npu_add_rms_norm": norm.add_rms_norm,
    "npu_rotary_mul": rotary.rotary_mul,
    "npu_swiglu": moe.swiglu,
    "npu_moe_gating_top_k_softmax": moe.gating_top_k_softmax,
    "npu_moe_init_routing_v2": moe._check_routing,
    "npu_grouped_matmul": moe._check_grouped_matmul,
    "npu_moe_token_unpermute": moe.token_unpermute,
    "npu_dynamic_quant": quant._check,
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_kernels_repeat_the_defaults(name):
    parameters = inspect.signature(SIGNATURES[name]).parameters
    arguments = overload(name)._schema.arguments
    assert list(parameters) == [argument.name for argument in arguments]
    for argument in arguments:
        default = parameters[argument.name].default
        if not argument.has_default_value():
            assert default is inspect.Parameter.empty
        elif isinstance(argument.default_value, list):
            assert list(default) == argument.default_value
        else:
            assert default == argument.default_value
            assert type(default) is type(argument.default_value)


def test_group_list_chooses_the_overload():
    x, weight = [torch.ones(2, 3)], [torch.ones(1, 3, 4)]
    options = {"group_type": 0, "split_item": 2}
    npu.npu_grouped_matmul(x, weight, group_list=torch.tensor([2]), **options)
    with pytest.raises(NotImplementedError, match="list of ints"):
        npu.npu_grouped_matmul(x, weight, group_list=[2], **options)


def sample_calls():
    """(operator, arguments, options), one for each operator of the model."""
    tokens, experts = torch.randn(5, 8), torch.randint(0, 4, (5, 2), dtype=torch.int32)
    q_lengths = [2, 3]
    return [
        (
            "npu_fused_infer_attention_score",
            (torch.randn(5, 4, 64), torch.randn(4, 128, 128), torch.randn(4, 128, 128)),
            {
                "atten_mask": torch.ones(2048, 2048, dtype=torch.bool).triu(1),
                "actual_seq_lengths": list(accumulate(q_lengths)),
                "actual_seq_lengths_kv": [140, 7],
                "block_table": torch.tensor([[2, 0], [1, 0]], dtype=torch.int32),
                "block_size": 128,
                "num_heads": 4,
                "num_key_value_heads": 2,
                "scale": 0.125,
                "input_layout": "TND",
                "sparse_mode": 3,
                "softmax_lse_flag": True,
            },
        ),
        (
            "npu_scatter_nd_update_",
            (torch.zeros(4, 3), torch.tensor([[1], [3]]), torch.ones(2, 3)),
            {},
        ),
        ("npu_rms_norm", (tokens, torch.randn(8), 1e-5), {}),
        ("npu_add_rms_norm", (tokens, tokens.clone(), torch.randn(8), 1e-5), {}),
        (
            "npu_rotary_mul",
            (torch.randn(1, 5, 2, 8), torch.randn(1, 5, 1, 8), torch.randn(1, 5, 1, 8)),
            {},
        ),
        ("npu_swiglu", (tokens,), {}),
        ("npu_moe_gating_top_k_softmax", (tokens,), {"k": 2}),
        (
            "npu_moe_init_routing_v2",
            (tokens, experts),
            {
                "expert_num": 4,
                "expert_tokens_num_type": 1,
                "expert_tokens_num_flag": True,
                "active_expert_range": [0, 4],
                "quant_mode": 1,
            },
        ),
        (
            "npu_grouped_matmul",
            ([tokens], [torch.randn(2, 8, 3)]),
            {
                "group_list": torch.tensor([2, 3]),
                "group_type": 0,
                "split_item": 2,
                "group_list_type": 1,
            },
        ),
        (
            "npu_moe_token_unpermute",
            (torch.randn(10, 8), torch.randperm(10).int(), torch.rand(5, 2)),
            {},
        ),
        ("npu_dynamic_quant", (tokens,), {}),
    ]


@pytest.mark.parametrize("name", SIGNATURES)
def test_opcheck(name):
    (call,) = [call for call in sample_calls() if call[0] == name]
    _, arguments, options = call
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(overload(name), arguments, options, test_utils=checks)


@pytest.mark.parametrize("name", SIGNATURES)
def test_default_device_does_not_matter(name):
    (call,) = [call for call in sample_calls() if call[0] == name]
    _, arguments, options = call
    with torch.device("meta"):
        result = overload(name)(*arguments, **options)
    assert {leaf.device.type for leaf in tree_leaves(result)} == {"cpu"}


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_code_sees_the_write(dynamic):
    def write(pool, slots, rows):
        rows, _ = npu.npu_rms_norm(rows, rows[0])
        npu.npu_scatter_nd_update_(pool.view(-1, pool.shape[-1]), slots, rows)
        return npu.npu_swiglu(pool).sum()

    torch._dynamo.reset()
    compiled = torch.compile(write, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for num_rows in (2, 3):
        slots, rows = torch.randperm(8)[:num_rows, None], torch.randn(num_rows, 4)
        eager_pool, compiled_pool = torch.zeros(2, 2, 4, 4)
        expected = write(eager_pool, slots, rows)
        torch.testing.assert_close(compiled(compiled_pool, slots, rows), expected)
        assert torch.equal(eager_pool, compiled_pool)


def test_compiled_attention():
    ((_, (query, key, value), options),) = sample_calls()[:1]

    def attend(query, key, value):
        return npu.npu_fused_infer_attention_score(query * 2, key, value, **options)[0] + 1

    torch._dynamo.reset()
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(query, key, value), attend(query, key, value))


def test_parameters_that_require_grad():
    gamma = torch.nn.Parameter(torch.ones(8))
    weight = torch.nn.Parameter(torch.ones(1, 8, 4))
    rows = npu.npu_rms_norm(torch.ones(2, 8), gamma)[0]
    groups = torch.tensor([2])
    (out,) = npu.npu_grouped_matmul([rows], [weight], group_list=groups, group_type=0, split_item=2)
    torch.testing.assert_close(out.detach(), torch.full((2, 4), 8.0))


def test_override_restores_settings():
    before = ops.settings.debug
    with pytest.raises(KeyError), ops.settings.override(debug=not before):
        assert ops.settings.debug is not before
        raise KeyError
    assert ops.settings.debug is before


# -------------------------------------------------------------------------------- beside torch_npu


def run_with_torch_npu(tmp_path, torch_npu, script):
    """Run a script in a process that finds the given source when it imports torch_npu."""
    (tmp_path / "torch_npu.py").write_text(torch_npu)
    # Only the operators: other parts of the package import what looks for torch_npu too.
    package = Path(ops.__file__).parents[1]
    script = f"""
import sys, types
sys.modules["qwen3cp"] = types.ModuleType("qwen3cp")
sys.modules["qwen3cp"].__path__ = [{str(package)!r}]
{script}
"""
    env = os.environ | {
        "PYTHONPATH": str(tmp_path),
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        "QWEN3CP_DEBUG_OPS": "1",
        "QWEN3CP_FLOAT32_SCORES": "1",
    }
    command = [sys.executable, "-c", script]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


def test_with_torch_npu_only_cpu_kernels_are_added(tmp_path):
    torch_npu = """
import torch
from qwen3cp.ops.schemas import SCHEMAS
library = torch.library.Library("npu", "DEF")
for schema in SCHEMAS.values():
    library.define(schema)
library.impl("npu_swiglu", lambda input, dim=-1: input.new_empty(7), "Meta")
"""
    script = """
import torch
from qwen3cp import ops
assert ops.HAS_TORCH_NPU
assert ops.settings.debug and ops.settings.float32_scores
assert torch.ops.npu.npu_swiglu(torch.ones(2, 4)).shape == (2, 2)
assert torch.ops.npu.npu_swiglu(torch.ones(2, 4, device="meta")).shape == (7,)
"""
    result = run_with_torch_npu(tmp_path, torch_npu, script)
    assert result.returncode == 0, result.stderr


def test_torch_npu_that_cannot_be_imported(tmp_path):
    torch_npu = "raise OSError('libhccl.so: cannot open')"
    result = run_with_torch_npu(tmp_path, torch_npu, "import qwen3cp.ops")
    last_line = result.stderr.strip().splitlines()[-1]
    assert last_line.startswith("ImportError")
    assert "libhccl.so" in last_line and "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in last_line
