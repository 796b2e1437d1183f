"""The wheel holds real files of the linked folders, and the version stands in one place."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import qwen3cp

ROOT = Path(__file__).parents[1]
PLANNER = ROOT / "qwen3cp" / "planner"


def test_wheel_holds_the_linked_folders(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("weights", "eval", "qwen3cp"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignore)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
        + ["--wheel-dir", str(tmp_path), str(source)],
        check=True,
        cwd=tmp_path,
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"qwen3cp-{qwen3cp.__version__}-py3-none-any")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (top_level,) = (n for n in names if n.endswith("top_level.txt"))
        assert archive.read(top_level).decode().split() == ["qwen3cp"]
    expected = {f"qwen3cp/{p.relative_to(ROOT / 'qwen3cp')}" for p in ROOT.glob("qwen3cp/*.py")}
    expected |= {f"qwen3cp/ops/{p.name}" for p in ROOT.glob("qwen3cp/ops/*.py")}
    data = [p for pattern in ("*.py", "*.json", "*.html") for p in PLANNER.glob(pattern)]
    expected |= {f"qwen3cp/planner/{p.name}" for p in data}
    assert {"qwen3cp/planner/models.json", "qwen3cp/planner/hardware.json"} <= expected
    for folder in ("weights", "eval"):
        expected |= {f"qwen3cp/{folder}/{p.name}" for p in (ROOT / folder).glob("*.py")}
    assert expected | {"qwen3cp/py.typed"} <= names


def test_linked_folders_are_links():
    for folder in ("weights", "eval"):
        link = ROOT / "qwen3cp" / folder
        assert link.is_symlink() and link.resolve() == ROOT / folder


def test_public_names():
    for name in qwen3cp.__all__:
        assert hasattr(qwen3cp, name), name
    assert sorted(qwen3cp.__all__, key=str.lower) == sorted(set(qwen3cp.__all__), key=str.lower)


def test_the_command_line_imports_no_torch():
    """Help and `doctor` have to work where torch or torch_npu does not import."""
    script = "import sys, qwen3cp.cli; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_every_public_name_is_there():
    import qwen3cp

    for name in qwen3cp.__all__:
        assert getattr(qwen3cp, name) is not None
    assert set(qwen3cp.__all__) <= set(dir(qwen3cp))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = qwen3cp.no_such_name


def test_operators_are_there_whoever_is_imported_first():
    for modules in ("torch, qwen3cp", "torch, qwen3cp.cli", "qwen3cp.int8", "qwen3cp.parallel"):
        script = f"import {modules}, torch; torch.ops.npu.npu_swiglu"
        subprocess.run([sys.executable, "-c", script], check=True)
