"""`qwen3cp doctor` on machines that are made up: folders of CANN, packages that break."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qwen3cp import doctor

FAST = {"OMP_NUM_THREADS": "1"}


def checks(root: Path, environ: dict[str, str] | None = None, **kwargs):
    env = {**os.environ, **FAST, **(environ or {})}
    found = list(doctor.examine(root=root, environ=env, **kwargs))
    return {check.name: check for check in found}


@pytest.fixture
def no_probes(monkeypatch):
    """Findings of files alone."""
    monkeypatch.setattr(doctor, "_probe", lambda step, *_: doctor._Probe(None, f"no {step}"))
    monkeypatch.delenv("ASCEND_HOME_PATH", raising=False)
    monkeypatch.delenv("ASCEND_TOOLKIT_HOME", raising=False)


def machine(root: Path, *, devices: int = 0, cann: str | None = None, driver: bool = True) -> Path:
    (root / "dev").mkdir(parents=True)
    for name in [f"davinci{i}" for i in range(devices)] + ["davinci_manager", "null"]:
        (root / "dev" / name).touch()
    ascend = root / "usr/local/Ascend"
    if driver:
        (ascend / "driver").mkdir(parents=True)
        (ascend / "driver/version.info").write_text("Version=25.3.rc1\nascendhal_version=7.35\n")
    if cann is not None:
        home = ascend / "ascend-toolkit/latest/aarch64-linux"
        home.mkdir(parents=True)
        info = f"package_name=Ascend-cann-toolkit\nversion={cann}\ninnerversion=V100R001\n"
        (home / "ascend_toolkit_install.info").write_text(info)
    return root


def fake_torch_npu(folder: Path, code: str, requires: str = "torch==2.13.0.*") -> dict[str, str]:
    """A torch_npu in a folder, which torch loads by itself: the environment that has it."""
    (folder / "torch_npu").mkdir(parents=True)
    (folder / "torch_npu/__init__.py").write_text(code)
    info = folder / "torch_npu-2.13.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: torch_npu\nVersion: 2.13.0\nRequires-Dist: {requires}\n"
    )
    (info / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    return {"PYTHONPATH": str(folder)}


def run_doctor(environ: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    path = [environ.get("PYTHONPATH", ""), str(Path(__file__).parents[1])]
    return subprocess.run(
        [sys.executable, "-m", "qwen3cp.cli", "doctor", *arguments],
        env={**os.environ, **FAST, **environ, "PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
    )


def test_this_machine():
    """No NPU: all is well, and a small model runs."""
    done = run_doctor({}, "--json")
    found = {check["name"]: check for check in json.loads(done.stdout)}
    assert not [c for c in found.values() if c["status"] == "problem"], done.stdout
    assert done.returncode == 0
    assert found["operators"]["found"].endswith("from qwen3cp")
    assert found["a small model"]["found"] == "prefill and decode run on the CPU"
    assert "gloo" in found["import torch"]["found"]
    plain = run_doctor({"OMP_NUM_THREADS": "1"})
    assert "ok       import torch: " in plain.stdout


def test_no_npu_and_no_cann_is_no_problem(tmp_path, no_probes):
    found = checks(machine(tmp_path, driver=False))
    assert found["NPU devices"].found == "none in /dev"
    assert found["CANN"].status == "ok"
    assert "driver" not in found


def test_npus_without_software(tmp_path, no_probes):
    found = checks(machine(tmp_path, devices=8, driver=False))
    assert found["NPU devices"].found == "8 in /dev"
    assert {found[n].status for n in ("driver", "CANN")} == {"problem"}
    assert "mount" in str(found["driver"].advice)


@pytest.mark.parametrize(
    ("version", "old"),
    [("8.5.0", False), ("8.5.0.alpha003", False), ("9.0.RC1", False), ("8.3.RC1", True)],
)
def test_cann_is_found_and_its_version_compared(tmp_path, no_probes, version, old):
    found = checks(machine(tmp_path, devices=2, cann=version))
    assert found["driver"].found == "25.3.rc1"
    assert found["CANN"].found.startswith(version[:3])
    assert ("CANN version" in found) == old
    assert "set_env.sh" in str(found["CANN environment"].advice)
    home = tmp_path / "usr/local/Ascend/ascend-toolkit/latest"
    assert "CANN environment" not in checks(tmp_path, {"ASCEND_HOME_PATH": str(home)})
    gone = checks(tmp_path, {"ASCEND_HOME_PATH": str(tmp_path / "gone")})
    assert gone["CANN"].status == "problem"
    assert "is no folder" in gone["CANN"].found


@pytest.mark.parametrize(
    ("code", "failure"),
    [
        ("raise ImportError('libascendcl.so: cannot open shared object file')", "libascendcl.so"),
        ("import os\nos.abort()", "Aborted"),
    ],
)
def test_a_torch_npu_that_breaks_the_import_of_torch(tmp_path, code, failure):
    done = run_doctor(fake_torch_npu(tmp_path, code), "--json")
    assert done.returncode == 1, done.stderr
    assert done.stderr == ""
    found = {check["name"]: check for check in json.loads(done.stdout)}
    assert found["import torch"]["status"] == "ok"
    loaded = found["import torch with torch_npu"]
    assert loaded["status"] == "problem"
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in loaded["advice"]
    assert failure in found["import torch_npu"]["found"]
    assert "operators" not in found  # nothing more can be learnt
    assert found["CANN"]["status"] == "problem"


def test_a_torch_npu_for_another_torch_and_one_that_hangs(tmp_path):
    environ = fake_torch_npu(tmp_path, "import time\ntime.sleep(60)", "torch==2.9.0.*")
    script = (
        "import json, pathlib\nfrom dataclasses import asdict\nfrom qwen3cp.doctor import examine\n"
        "found = examine(root=pathlib.Path('/nowhere'), timeout=8)\n"
        "print(json.dumps([asdict(check) for check in found]))"
    )
    environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    environ["PYTHONPATH"] += os.pathsep + str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **FAST, **environ},
        capture_output=True,
        text=True,
        check=True,
    )
    found = {(c["name"], c["status"]): c for c in json.loads(done.stdout)}
    assert "torch_npu wants ==2.9.0.*" in found["torch", "problem"]["found"]
    assert found["import torch_npu", "problem"]["found"] == "fails: no answer in 8 s"


def test_operators_that_differ(tmp_path, monkeypatch):
    """What another torch_npu would have: one operator gone, one with another schema."""
    answers = {
        "operators": {
            "source": "torch_npu",
            "number": 12,
            "missing": ["npu_rotary_mul"],
            "differ": {"npu_swiglu": "npu::npu_swiglu(Tensor x) -> Tensor"},
        },
        "run": {"finite": True, "devices": {"npu:0": 0.4}},
        "torch": {"version": "2.13.0", "cpu": "AVX2", "threads": 1, "backends": ["gloo"]},
    }
    monkeypatch.setattr(doctor, "_probe", lambda step, *_: doctor._Probe(answers[step]))
    found = checks(machine(tmp_path))
    assert found["operators"].status == "problem"
    assert "npu_rotary_mul, npu_swiglu" in found["operators"].found
    assert found["the same on npu:0"].status == "problem"
    assert "pytest -m npu" in str(found["the same on npu:0"].advice)


def test_links_are_shown_in_npu_smis_words(tmp_path, no_probes):
    tool = tmp_path / "bin/npu-smi"
    tool.parent.mkdir()
    tool.write_text('#!/bin/sh\necho "NPU0 NPU1 HCCS $@"\n')
    tool.chmod(0o755)
    found = checks(tmp_path, {"PATH": f"{tool.parent}:/bin:/usr/bin"})
    assert found["links"].found == "NPU0 NPU1 HCCS info -t topo"
