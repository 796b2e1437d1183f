"""Writes docs/npu-rules.md from the rules in qwen3cp.ops: python docs/npu_rules.py [FILE]"""

import sys
from pathlib import Path

from qwen3cp.ops import RULES, SCHEMAS

HEAD = (
    "# The rules of the NPU operators\n\n"
    "Made by [a script](npu_rules.py) from `qwen3cp/ops/rules.py`. Every error that a check raises "
    "ends with its source. A call that breaks a rule, and one at its limit that does not, are in "
    "[a table of the tests](../tests/ops/rule_cases.py); both are made on CPU tensors and on meta "
    'tensors. Rules marked "data" need the data of a tensor: only the CPU kernels check them.\n\n'
    "CANN is release 8.5; ops-transformer has its public kernel sources, op-plugin those of "
    "torch_npu. An API page is torch_npu's documentation of an operator, aclnn pages are CANN's. "
    "bfloat16 stands for what this package runs in; float16, which many operators take, is refused "
    "everywhere.\n"
)


def page() -> str:
    parts = [HEAD]
    for op in (name for name in SCHEMAS if "." not in name):
        parts += [f"\n## {op}\n\n", "| accepted | data | source |\n|---|---|---|\n"]
        for rule in RULES.values():
            if rule.op == op:
                mark = "data" if rule.needs_data else ""
                parts.append(f"| {rule.text} | {mark} | {rule.source} |\n")
    return "".join(parts)


if __name__ == "__main__":
    target = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_name("npu-rules.md")
    Path(target).write_text(page())
