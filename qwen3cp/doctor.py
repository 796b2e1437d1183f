"""`qwen3cp doctor`: what this machine has, whether it fits together, and what to do.

Imports no torch: a broken torch or torch_npu is what it is there to find. They are imported in
processes of their own.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import InvalidRequirement, Requirement
from packaging.version import InvalidVersion, Version

from qwen3cp.version import __version__

__all__ = ["Check", "examine"]

CANN_HOMES = ("ascend-toolkit/latest", "cann", "nnae/latest", "latest")
"""Below /usr/local/Ascend, where CANN's installers put it."""
CANN_CHECKED = Version("8.5")
"""The CANN whose argument rules the CPU kernels check."""
LARGEST_ERROR = 0.05
"""Relative L2 of bfloat16 logits of a two-layer model, NPU against CPU: rounding gives 0.01."""
OPTIONAL = ("torch-npu", "lm-eval", "matplotlib")
"""Packages of extras that commands use; the others are tools of the tests."""
VARIABLES = (
    "ASCEND_HOME_PATH",
    "ASCEND_RT_VISIBLE_DEVICES",
    "HCCL_DETERMINISTIC",
    "HCCL_SOCKET_IFNAME",
    "OMP_NUM_THREADS",
    "PYTORCH_NPU_ALLOC_CONF",
    "QWEN3CP_DEBUG_OPS",
    "QWEN3CP_FLOAT32_SCORES",
    "TORCH_DEVICE_BACKEND_AUTOLOAD",
)


@dataclass(frozen=True, kw_only=True)
class Check:
    """One finding."""

    name: str
    found: str
    status: Literal["ok", "note", "problem"] = "ok"
    advice: str | None = None


@dataclass(frozen=True)
class _Probe:
    """What a process of its own found, or why it found nothing."""

    result: dict[str, Any] | None
    failure: str | None = None


def examine(
    *, root: Path = Path("/"), environ: Mapping[str, str] | None = None, timeout: float = 300
) -> Iterator[Check]:
    """Looks at this machine. Not collective.

    Args:
        root: of the file system in which devices and CANN are looked for.
        environ: of the processes that import torch; None is this process's.
        timeout: seconds for each of them.

    Yields:
        Findings, as they are made.
    """
    env = dict(os.environ if environ is None else environ)
    yield Check(name="qwen3cp", found=f"{__version__}, Python {platform.python_version()}")
    yield from _requirements("qwen3cp")
    has_torch_npu = importlib.util.find_spec("torch_npu") is not None
    if has_torch_npu:
        yield from _requirements("torch_npu")
    for name in VARIABLES:
        if name in env:
            yield Check(name=name, found=env[name])

    devices = sorted((root / "dev").glob("davinci[0-9]*"))
    yield from _cann(root, env, len(devices), has_torch_npu)
    yield from _torch(env, timeout, has_torch_npu)
    if has_torch_npu:
        working = yield from _torch_npu(env, timeout, len(devices))
        if not working:
            return
    elif devices:
        yield Check(
            name="torch_npu",
            found=f"not installed, but there are {len(devices)} NPUs",
            status="problem",
            advice="pip install 'qwen3cp[npu]'",
        )
    else:
        yield Check(name="torch_npu", found="not installed; the model runs on the CPU")
    yield from _links(env)
    yield from _operators(env, timeout)
    yield from _run(env, timeout)


def _requirements(package: str) -> Iterator[Check]:
    """Whether what is installed is what the package's own metadata ask for."""
    try:
        requirements = importlib.metadata.requires(package) or []
    except importlib.metadata.PackageNotFoundError:
        yield Check(
            name=f"packages of {package}",
            found="its versions are not known",
            status="note",
            advice=f"{package} is imported from a folder; install it with pip to have them checked",
        )
        return
    for text in requirements:
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue
        optional = "extra" in str(requirement.marker)
        if optional and requirement.name not in OPTIONAL:
            continue
        if requirement.marker and not optional and not requirement.marker.evaluate():
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            if not optional:
                yield Check(
                    name=requirement.name,
                    found="not installed",
                    status="problem",
                    advice=f"pip install '{requirement.name}{requirement.specifier}'",
                )
            continue
        fits = requirement.specifier.contains(version, prereleases=True)
        yield Check(
            name=requirement.name,
            found=version if fits else f"{version}, but {package} wants {requirement.specifier}",
            status="ok" if fits else "problem",
            advice=None
            if fits
            else f"pip install '{requirement.name}{requirement.specifier}' (torch and torch_npu "
            "have to be of one version)",
        )


def _cann(
    root: Path, env: Mapping[str, str], num_devices: int, has_torch_npu: bool
) -> Iterator[Check]:
    yield Check(name="NPU devices", found=f"{num_devices or 'none'} in /dev")
    driver = root / "usr/local/Ascend/driver/version.info"
    if driver.is_file():
        yield Check(name="driver", found=_field(driver, "Version") or "unknown version")
    elif num_devices:
        yield Check(
            name="driver",
            found="no /usr/local/Ascend/driver",
            status="problem",
            advice="in a container, mount the host's /usr/local/Ascend/driver and /dev/davinci*",
        )

    home = env.get("ASCEND_HOME_PATH") or env.get("ASCEND_TOOLKIT_HOME")
    sourced = home is not None
    if home is None:
        places = [root / "usr/local/Ascend" / name for name in CANN_HOMES]
        home = next((str(place) for place in places if place.is_dir()), None)
    if home is None or not Path(home).is_dir():
        needed = num_devices > 0 or has_torch_npu
        yield Check(
            name="CANN",
            found="not found" if home is None else f"ASCEND_HOME_PATH={home} is no folder",
            status="problem" if needed else "ok",
            advice="install the CANN toolkit and operator packages, or use an environment without "
            "torch_npu to run on the CPU"
            if needed
            else None,
        )
        return
    version = _cann_version(Path(home))
    yield Check(name="CANN", found=f"{version or 'unknown version'} in {home}")
    if not sourced:
        yield Check(
            name="CANN environment",
            found="ASCEND_HOME_PATH is not set",
            status="problem",
            advice=f"source {home}/set_env.sh (or the one in the folder above)",
        )
    if version is not None and version < CANN_CHECKED:
        yield Check(
            name="CANN version",
            found=f"{version} is older than {CANN_CHECKED}",
            status="problem",
            advice=f"the calls follow the rules of CANN {CANN_CHECKED}; older ones refused "
            "head dim 128 in the attention operator's TND layout: upgrade CANN",
        )


def _cann_version(home: Path) -> Version | None:
    """From the files that the installers leave, as torch_npu's collect_env reads them."""
    for pattern in ("*-linux/ascend_*_install.info", "ascend_*_install.info", "version.cfg"):
        for file in sorted(home.glob(pattern)):
            text = _field(file, "version") or _field(file, "toolkit_installed_version")
            number = re.search(r"\d+\.\d+(\.\d+)?", text or "")
            if number:
                try:
                    return Version(number.group())
                except InvalidVersion:
                    continue
    return None


def _field(file: Path, name: str) -> str | None:
    try:
        text = file.read_text(errors="replace")
    except OSError:
        return None
    found = re.search(rf"^{name}\s*=\s*\[?(.*?)\]?$", text, re.MULTILINE | re.IGNORECASE)
    return found.group(1).strip() if found else None


def _torch(env: dict[str, str], timeout: float, has_torch_npu: bool) -> Iterator[Check]:
    alone = _probe("torch", {**env, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}, timeout)
    if alone.result is None:
        yield Check(
            name="import torch",
            found=f"fails: {alone.failure}",
            status="problem",
            advice="reinstall torch",
        )
        return
    found = alone.result
    yield Check(
        name="import torch",
        found=f"{found['version']}, {found['cpu']}, {found['threads']} threads, "
        f"backends {', '.join(found['backends'])}",
    )
    if "gloo" not in found["backends"]:
        yield Check(
            name="gloo",
            found="not a backend of this torch",
            status="problem",
            advice="several ranks need it: install a torch with torch.distributed and gloo",
        )
    if has_torch_npu and env.get("TORCH_DEVICE_BACKEND_AUTOLOAD") != "0":
        loaded = _probe("torch", env, timeout)
        if loaded.result is None:
            yield Check(
                name="import torch with torch_npu",
                found=f"fails: {loaded.failure}",
                status="problem",
                advice="torch loads torch_npu by itself: TORCH_DEVICE_BACKEND_AUTOLOAD=0 keeps it "
                "from that, but torch_npu has to import for qwen3cp to run (see below)",
            )


def _torch_npu(
    env: dict[str, str], timeout: float, num_devices: int
) -> Generator[Check, None, bool]:
    """Returns whether it can be imported."""
    probe = _probe("torch_npu", {**env, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}, timeout)
    if probe.result is None:
        yield Check(
            name="import torch_npu",
            found=f"fails: {probe.failure}",
            status="problem",
            advice="source CANN's set_env.sh first; torch_npu and torch have to be of one version "
            "and fit the CANN. Without an NPU use an environment without torch_npu",
        )
        return False
    found = probe.result
    yield Check(name="import torch_npu", found=found["version"])
    if found["available"]:
        names = [f"{d['name']} ({d['bytes'] / 2**30:.0f} GiB)" for d in found["devices"]]
        yield Check(name="NPUs that torch sees", found=f"{len(names)}: {', '.join(names)}")
    elif num_devices:
        yield Check(
            name="NPUs that torch sees",
            found=f"none, but {num_devices} are in /dev",
            status="problem",
            advice="look at `npu-smi info`, the rights on /dev/davinci* (group HwHiAiUser) and "
            "ASCEND_RT_VISIBLE_DEVICES",
        )
    else:
        yield Check(name="NPUs that torch sees", found="none; the model runs on the CPU")
    yield Check(name="backends", found=", ".join(found["backends"]))
    if found["available"] and "hccl" not in found["backends"]:
        yield Check(
            name="hccl",
            found="not available",
            status="problem",
            advice="several ranks on NPUs need it: reinstall torch_npu and CANN",
        )
    return True


def _links(env: dict[str, str]) -> Iterator[Check]:
    """How the NPUs are connected, in npu-smi's own words."""
    tool = shutil.which("npu-smi", path=env.get("PATH"))
    if tool is None:
        return
    try:
        done = subprocess.run(
            [tool, "info", "-t", "topo"], capture_output=True, text=True, timeout=60, env=env
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        yield Check(name="links", found=f"npu-smi fails: {error}", status="note")
        return
    yield Check(name="links", found=(done.stdout or done.stderr).strip() or "npu-smi says nothing")


def _operators(env: dict[str, str], timeout: float) -> Iterator[Check]:
    probe = _probe("operators", env, timeout)
    if probe.result is None:
        yield Check(
            name="operators",
            found=f"fails: {probe.failure}",
            status="problem",
            advice="the modules of qwen3cp cannot be used until this import works",
        )
        return
    found = probe.result
    wrong = [*found["missing"], *found["differ"]]
    if not wrong:
        yield Check(name="operators", found=f"all {found['number']}, from {found['source']}")
    else:
        yield Check(
            name="operators",
            found=f"missing or with another schema: {', '.join(wrong)}",
            status="problem",
            advice="this torch_npu is not one that qwen3cp was written for: pip install "
            "'qwen3cp[npu]'",
        )


def _run(env: dict[str, str], timeout: float) -> Iterator[Check]:
    probe = _probe("run", env, timeout)
    if probe.result is None or not probe.result["finite"]:
        yield Check(
            name="a small model",
            found=f"fails: {probe.failure or 'its logits are not finite'}",
            status="problem",
            advice="QWEN3CP_LOG_LEVEL=DEBUG qwen3cp generate ... shows the traceback",
        )
        return
    yield Check(name="a small model", found="prefill and decode run on the CPU")
    for device, error in probe.result["devices"].items():
        good = error <= LARGEST_ERROR
        yield Check(
            name=f"the same on {device}",
            found=f"logits differ from the CPU's by {error:.3f} (relative L2)",
            status="ok" if good else "problem",
            advice=None
            if good
            else "run `pytest -m npu` from the repository: it compares operator by operator",
        )


def _probe(step: str, env: Mapping[str, str], timeout: float) -> _Probe:
    path = [*filter(None, [env.get("PYTHONPATH")]), str(Path(__file__).parents[1])]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "qwen3cp.doctor_probe", step],
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=timeout,
            env={**env, "PYTHONPATH": os.pathsep.join(path)},
        )
    except subprocess.TimeoutExpired:
        return _Probe(None, f"no answer in {timeout:g} s")
    lines = done.stdout.splitlines()
    if done.returncode == 0 and lines:
        return _Probe(json.loads(lines[-1]))  # libraries print before it
    if done.returncode < 0:
        return _Probe(None, f"the process was ended: {signal.strsignal(-done.returncode)}")
    last = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return _Probe(None, last[-1] if last else f"exit code {done.returncode}")
