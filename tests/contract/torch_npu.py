"""The real torch_npu on a machine without CANN: its wheel, and stubs of the libraries it wants.

Kept in a folder of its own, since `import torch` loads an installed torch_npu. The folder appears
whole or not at all, and is used again: {cache}/qwen3cp/torch_npu-2.13.0-.../{site,stubs}, where
cache is XDG_CACHE_HOME or ~/.cache. pip's own settings choose where the wheel comes from.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]

# What torch_npu links to beside torch and the system's libraries.
STUB = "ascendcl"  # defines all symbols
EMPTY_STUBS = ("hccl", "acl_op_compiler", "ge_runner", "graph", "acl_tdt_channel", "atb")


class Unavailable(Exception):
    """Something that the contract tests need cannot be had; the message names it."""


def pinned_version() -> str:
    (version,) = re.findall(
        r"^torch_npu==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE
    )
    return version


def prepare() -> Path:
    """The folder with site/ and stubs/, made at the first call on a machine.

    Raises:
        Unavailable: gcc or nm is missing, pip finds no wheel for this Python, or torch is of a
            version that torch_npu is not made for.
    """
    version = pinned_version()
    torch_version = torch.__version__.split("+")[0]
    if torch_version.split(".")[:2] != version.split(".")[:2]:
        raise Unavailable(f"torch_npu {version} is made for torch {version}, not {torch_version}")
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    platform = f"{sysconfig.get_config_var('SOABI')}-torch-{torch.__version__}"
    folder = Path(cache) / "qwen3cp" / f"torch_npu-{version}-{platform}"
    if folder.is_dir():
        return folder
    for tool in ("gcc", "nm"):
        if shutil.which(tool) is None:
            raise Unavailable(f"{tool} is not installed")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as making:
        made = Path(making) / "made"
        _unpack_wheel(version, Path(making) / "wheel", made / "site")
        _make_stubs(made / "site", made / "stubs")
        try:
            made.rename(folder)
        except OSError:  # another process was first
            if not folder.is_dir():
                raise
    return folder


def environment(folder: Path, *paths: Path) -> dict[str, str]:
    """Of a process that finds this torch_npu when it imports it, after torch."""
    libraries = [folder / "stubs", folder / "site" / "torch_npu" / "lib"]
    return os.environ | {
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        "LD_LIBRARY_PATH": os.pathsep.join(map(str, libraries)),
        "PYTHONPATH": os.pathsep.join(map(str, [*paths, folder / "site"])),
        "OMP_NUM_THREADS": "1",
    }


def _unpack_wheel(version: str, download: Path, site: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--only-binary", ":all:", "-d", str(download)]
    done = subprocess.run([*command, f"torch_npu=={version}"], capture_output=True, text=True)
    wheels = list(download.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        last = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
        raise Unavailable(f"pip cannot download torch_npu {version}: {last}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extractall(site)


def _make_stubs(site: Path, stubs: Path) -> None:
    """Functions that return 0, one for each symbol that nobody defines."""
    of_wheel = [path for path in site.rglob("*.so*") if path.is_file()]
    of_torch = (Path(torch.__file__).parent / "lib").glob("*.so*")
    wanted = _symbols(of_wheel, "--undefined-only", "U")
    defined = _symbols([*of_wheel, *of_torch], "--defined-only")
    missing = sorted(name for name in wanted - defined if not name.startswith(("Py", "_Py")))
    stubs.mkdir()
    source = stubs / "stub.c"
    source.write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in missing))
    _compile(source, stubs / f"lib{STUB}.so")
    source.write_text("\n")
    for name in EMPTY_STUBS:
        _compile(source, stubs / f"lib{name}.so")
    source.unlink()


def _symbols(libraries: list[Path], which: str, kind: str = "") -> set[str]:
    """Names without a version; those with one ("memcpy@GLIBC_2.2.5") are the system's."""
    names = set()
    for library in libraries:
        listed = subprocess.run(["nm", "-D", which, library], capture_output=True, text=True)
        for line in listed.stdout.splitlines():
            *_, letter, name = line.split()
            if "@" not in name and kind in letter:
                names.add(name)
    return names


def _compile(source: Path, library: Path) -> None:
    command = ["gcc", "-shared", "-fPIC", "-w", "-o", str(library), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Unavailable(f"gcc cannot compile {library.name}: {done.stderr.strip()[:500]}")
