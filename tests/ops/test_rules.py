"""Every rule refuses the call that breaks it, on CPU, meta and fake tensors, and no other."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen3cp import ops
from qwen3cp.ops import RULES, check_call, rules

from .helpers import npu
from .rule_cases import CASES, on, packed, t

CHECKED = [name for name, rule in RULES.items() if not rule.needs_data]


def operator(name):
    return getattr(npu, name)


def test_every_rule_has_a_case_and_every_case_a_rule():
    assert sorted(CASES) == sorted(CHECKED)
    assert all(CASES[name].op == RULES[name].op for name in CHECKED)


def test_every_operator_has_rules():
    named = {rule.op for rule in RULES.values()}
    assert named == {name for name in ops.SCHEMAS if "." not in name}


@pytest.mark.parametrize("name", RULES)
def test_rules_say_where_they_are_from(name):
    rule = RULES[name]
    assert re.search(r"API page|CANN aclnn|ops-transformer|op-plugin|torch_npu", rule.source)
    assert rule.text and not rule.text.endswith(".")
    assert rule.error in (TypeError, ValueError, IndexError)


def refusal(function, call):
    args, kwargs = call
    with pytest.raises((TypeError, ValueError, NotImplementedError, IndexError)) as raised:
        function(*args, **kwargs)
    return raised.value


@pytest.mark.parametrize("device", ["cpu", "meta", "fake"])
@pytest.mark.parametrize("name", CASES)
def test_broken(name, device):
    case, rule = CASES[name], RULES[name]
    call = on(device, case.broken)
    for function in (operator(case.op), lambda *a, **k: check_call(case.op, a, k)):
        error = refusal(function, call)
        assert type(error) is rule.error
        assert str(error).startswith(f"{rule.op}: ")
        assert str(error).endswith(f"[{rule.source}]")


@pytest.mark.parametrize("name", CASES)
def test_the_rule_that_refuses_is_the_one_that_is_meant(name, monkeypatch):
    """Sources are shared between rules, so the message alone does not tell."""
    case, broken = CASES[name], []
    real = rules.Rule.broken

    def spy(rule, message):
        broken.append(rule)
        return real(rule, message)

    monkeypatch.setattr(rules.Rule, "broken", spy)
    refusal(lambda *a, **k: check_call(case.op, a, k), case.broken)
    assert broken == [RULES[name]]


@pytest.mark.parametrize("device", ["cpu", "meta", "fake"])
@pytest.mark.parametrize("name", CASES)
def test_accepted_at_the_limit(name, device):
    case = CASES[name]
    args, kwargs = on(device, case.accepted)
    check_call(case.op, args, kwargs, npu_dtypes=True)
    if case.runs or device != "cpu":
        operator(case.op)(*args, **kwargs)


def test_float32_is_refused_where_only_the_cpu_kernels_take_it():
    attention = packed(query=t(3, 4, 64, dtype=torch.float32), **float_caches())
    quant = (t(2, 8, dtype=torch.float32),), {}
    for name, (args, kwargs) in (
        ("npu_fused_infer_attention_score", attention),
        ("npu_dynamic_quant", quant),
    ):
        check_call(name, args, kwargs)
        names = [argument.name for argument in operator(name).default._schema.arguments]
        by_name = {**dict(zip(names, args, strict=False)), **kwargs}
        for call in ((args, kwargs), ((), by_name)):
            with pytest.raises(TypeError, match="float32 is for comparisons"):
                check_call(name, *call, npu_dtypes=True)
    check_call(
        "npu_rms_norm", (t(2, 8, dtype=torch.float32), t(8, dtype=torch.float32)), npu_dtypes=True
    )


def float_caches():
    return {name: t(6, 128, 128, dtype=torch.float32) for name in ("key", "value")}


def test_a_call_may_name_the_operator_as_a_dispatch_mode_does():
    call = (t(2, 8),)
    check_call(npu.npu_swiglu.default, call)
    check_call("npu::npu_swiglu", call)
    with pytest.raises(NotImplementedError, match="list of ints"):
        check_call(npu.npu_grouped_matmul.List, ([t(2, 8)], [t(1, 8, 4)]), {"group_list": [2]})
    with pytest.raises(KeyError):
        check_call("npu_conv2d", call)


DATA = {
    "ATTENTION_TEMPLATE_DATA": (packed(), "atten_mask", 0),
    "SCATTER_RANGE": (CASES["SCATTER_UPDATES"].accepted, 1, 4),
    "SCATTER_UNIQUE": (((t(4, 3), t(2, 1, dtype=torch.int64), t(2, 3)), {}), 1, 0),
    "GROUPED_ROWS": (CASES["GROUPED_LIST"].accepted, "group_list", 4),
    "UNPERMUTE_INDEX": (CASES["UNPERMUTE_SHAPES"].accepted, 1, -1),
}


def test_every_rule_that_needs_data_has_a_case():
    assert sorted(DATA) == sorted(set(RULES) - set(CHECKED))


@pytest.mark.parametrize("name", DATA)
def test_what_only_data_can_break(name):
    """The kernel refuses what a meta tensor cannot show."""
    rule = RULES[name]
    call, where, value = DATA[name]
    args, kwargs = on("cpu", call)
    arguments: Any = kwargs if isinstance(where, str) else args
    arguments[where].fill_(value)
    error = refusal(operator(rule.op), (args, kwargs))
    assert type(error) is rule.error and str(error).endswith(f"[{rule.source}]")
    operator(rule.op)(*call[0], **call[1])
    check_call(rule.op, *call)


def test_every_rule_is_used():
    folder = Path(rules.__file__).parent
    sources = "".join(file.read_text() for file in folder.glob("*.py"))
    assert [name for name in RULES if f"rules.{name}" not in sources] == []
