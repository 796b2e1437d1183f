"""What a device and its links can do on paper, and the shares of that which are reached."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from qwen3cp.errors import InputError

__all__ = [
    "HARDWARE",
    "Efficiencies",
    "Hardware",
    "Link",
    "LinkKind",
    "load_efficiencies",
    "load_hardware",
    "read_json",
]

LinkKind = Literal["package", "node", "network"]
"""Between the dies of one package, between packages of one node, between nodes."""
LINK_KINDS: tuple[LinkKind, ...] = ("package", "node", "network")


@dataclass(frozen=True, kw_only=True)
class Link:
    """One way, for each device, on paper."""

    bytes_per_second: float
    per_peer: bool = False
    """A full mesh: so much from each of the group's other devices at the same time."""
    latency_seconds: float = 0.0
    """Of one collective, beside its launch."""

    def rate(self, num_devices: int) -> float:
        """Bytes a second that one of num_devices receives from the others, on paper."""
        return self.bytes_per_second * (num_devices - 1 if self.per_peer else 1)


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One kind of device, of which a rank has one (a die of an A3 is one), and its links."""

    name: str
    title: str
    hbm_bytes: int
    usable_share_of_hbm: float
    """What parameters, cache and activations may take; the rest is for the runtime, the
    communication buffers and fragmentation."""
    hbm_bytes_per_second: float
    peak_flops: Mapping[str, float]
    """FLOPs a second by dtype. 16-bit matrix products; "int8" is for extrapolations alone."""
    devices_per_package: int
    devices_per_node: int
    links: Mapping[LinkKind, Link]
    sources: Mapping[str, str] = field(default_factory=dict)

    @property
    def usable_bytes(self) -> int:
        """The limit that a rank's memory is held to."""
        return int(self.hbm_bytes * self.usable_share_of_hbm)

    def peak(self, dtype: str) -> float:
        """Raises InputError for a dtype that it does not run."""
        if dtype not in self.peak_flops:
            raise InputError(
                f"{self.name} has no peak for {dtype}: choose one of {', '.join(self.peak_flops)}"
            )
        return self.peak_flops[dtype]

    def link_of(self, ranks: Seq[int]) -> LinkKind:
        """The slowest kind of link that a group of ranks needs: rank r is on device r, and
        packages and nodes are filled in that order."""
        if len({rank // self.devices_per_package for rank in ranks}) == 1:
            return "package"
        if len({rank // self.devices_per_node for rank in ranks}) == 1:
            return "node"
        return "network"

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _efficiency(default: float, low: float, high: float, unit: str, source: str) -> Any:
    metadata = {"low": low, "high": high, "unit": unit, "source": source}
    return field(default=default, metadata=metadata)


MSMODELING = "static costs in Ascend msmodeling"


@dataclass(frozen=True, kw_only=True)
class Efficiencies:
    """The named parameters of the cost model: one set for all hardware, models and topologies.

    Shares are of the figures of `Hardware`. None of the defaults was fitted to a measured time to
    first token. `bounds`, `unit` and `source` say what each may be, and where its default is from.

    Raises:
        InputError: a value outside its bounds.
    """

    attention: float = _efficiency(
        0.34,
        0.05,
        1.0,
        "share of peak FLOPs",
        "114 to 122 TFLOPS of npu_fused_infer_attention_score, TND, causal, in one profile with "
        "4 query heads and 1 KV head",
    )
    matmul: float = _efficiency(
        0.5, 0.05, 1.0, "share of peak FLOPs", "below the 0.7 of Ascend msmodeling, see the page"
    )
    memory: float = _efficiency(
        0.6, 0.05, 1.0, "share of HBM bandwidth", "assumed, as usual for unfused operators"
    )
    link_package: float = _efficiency(
        0.7, 0.05, 1.0, "share of the link", "the compute efficiency of Ascend msmodeling, assumed"
    )
    link_node: float = _efficiency(0.7, 0.05, 1.0, "share of the link", "as link_package")
    link_network: float = _efficiency(0.7, 0.05, 1.0, "share of the link", "as link_package")
    overlap: float = _efficiency(
        1.0,
        0.0,
        1.0,
        "share of the KV gather's time beside the query projection that is hidden",
        "the two run on different engines; not seen on an NPU yet",
    )
    expert_imbalance: float = _efficiency(
        1.0,
        1.0,
        128.0,
        "rows of the busiest rank's experts over the mean, with moe='ep'",
        "even routing; `qwen3cp generate --stats` measures it",
    )
    launch_matmul_us: float = _efficiency(5.0, 0.0, 1000.0, "us an operator", MSMODELING)
    launch_vector_us: float = _efficiency(2.0, 0.0, 1000.0, "us an operator", MSMODELING)
    launch_collective_us: float = _efficiency(10.0, 0.0, 10000.0, "us a collective", MSMODELING)
    host_sync_us: float = _efficiency(
        100.0,
        0.0,
        100000.0,
        "us for each time the host waits for the device or for other hosts",
        "assumed, as in qwen3cp.exchange",
    )

    def __post_init__(self) -> None:
        for name in self.names():
            value, (low, high) = getattr(self, name), self.bounds(name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise InputError(f"the efficiency {name} must be a number, got {value!r}")
            if not low <= value <= high or not math.isfinite(value):
                raise InputError(
                    f"the efficiency {name}={value} is outside {low:g} to {high:g} "
                    f"({self.unit(name)})"
                )

    @classmethod
    def names(cls) -> list[str]:
        return [f.name for f in dataclasses.fields(cls)]

    @classmethod
    def bounds(cls, name: str) -> tuple[float, float]:
        metadata = cls.__dataclass_fields__[name].metadata
        return metadata["low"], metadata["high"]

    @classmethod
    def unit(cls, name: str) -> str:
        return cls.__dataclass_fields__[name].metadata["unit"]

    @classmethod
    def source(cls, name: str) -> str:
        return cls.__dataclass_fields__[name].metadata["source"]

    def link(self, kind: LinkKind) -> float:
        return getattr(self, f"link_{kind}")

    def to_dict(self) -> dict[str, float]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], what: str = "efficiencies") -> Efficiencies:
        """Those that are not named keep their defaults. Raises InputError for unknown names."""
        unknown = sorted(set(values) - set(cls.names()))
        if unknown:
            raise InputError(
                f"{what}: {', '.join(unknown)} is no efficiency; there are {', '.join(cls.names())}"
            )
        return cls(**values)


def load_efficiencies(path: str | Path | None) -> Efficiencies:
    """The defaults, or those of a JSON file such as {"attention": 0.4} or what `--calibrate`
    wrote. Raises InputError."""
    if path is None:
        return Efficiencies()
    values = read_json(path)
    if isinstance(values.get("efficiencies"), dict):
        values = values["efficiencies"]
    return Efficiencies.from_dict(values, str(path))


def load_hardware(name_or_path: str) -> Hardware:
    """One of `HARDWARE`, or a JSON file with the same fields; with "base", one of `HARDWARE`,
    those that are left out are the base's.

    Raises:
        InputError: there is neither, or a field is missing, unknown or of the wrong type.
    """
    if name_or_path in HARDWARE:
        return HARDWARE[name_or_path]
    if not name_or_path.endswith(".json"):
        raise InputError(
            f"hardware {name_or_path!r} is not known: choose one of {', '.join(HARDWARE)}, or "
            "give a JSON file with numbers of your own"
        )
    return _hardware(Path(name_or_path).stem, read_json(name_or_path), HARDWARE, name_or_path)


def read_json(path: str | Path) -> dict[str, Any]:
    """A JSON object. Raises InputError."""
    try:
        values = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise InputError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} must hold a JSON object, not a {type(values).__name__}")
    return values


def _hardware(
    name: str, values: Mapping[str, Any], known: Mapping[str, Hardware], what: str
) -> Hardware:
    values = dict(values)
    base = values.pop("base", None)
    if base is not None:
        if base not in known:
            raise InputError(f"{what}: base {base!r} is not one of {', '.join(known)}")
        below = known[base].to_dict()
        sources = below["sources"] | dict(values.get("sources", {}))
        values = below | values | {"sources": sources}
    values["name"] = name
    known_fields = {f.name for f in dataclasses.fields(Hardware)}
    unknown = sorted(set(values) - known_fields)
    missing = sorted(known_fields - set(values) - {"sources"})
    if unknown or missing:
        raise InputError(
            f"{what}: "
            + ("unknown " + ", ".join(unknown) if unknown else "missing " + ", ".join(missing))
            + '; {"base": "a3", ...} takes what is left out from another'
        )
    try:
        links = {kind: Link(**link) for kind, link in values["links"].items()}
        positive = [
            values["hbm_bytes"],
            values["usable_share_of_hbm"],
            values["hbm_bytes_per_second"],
            values["devices_per_package"],
            values["devices_per_node"],
            *values["peak_flops"].values(),
            *(link.bytes_per_second for link in links.values()),
        ]
        wrong = not all(value > 0 for value in positive)
        wrong |= not all(link.latency_seconds >= 0 for link in links.values())
        wrong |= values["usable_share_of_hbm"] > 1
        wrong |= values["devices_per_node"] % values["devices_per_package"] != 0
    except (AttributeError, TypeError) as error:
        raise InputError(f"{what}: {error}") from error
    if wrong:
        raise InputError(
            f"{what}: all figures must be positive, usable_share_of_hbm at most 1, and "
            "devices_per_node a multiple of devices_per_package"
        )
    needed = {"network"}
    needed |= {"package"} if values["devices_per_package"] > 1 else set()
    needed |= {"node"} if values["devices_per_node"] > values["devices_per_package"] else set()
    if not needed <= set(links) <= set(LINK_KINDS):
        raise InputError(f"{what}: links must be {', '.join(sorted(needed))}, got {sorted(links)}")
    fields: dict[str, Any] = values | {"links": links}
    return Hardware(**fields)


@functools.cache
def _built_in() -> dict[str, Hardware]:
    text = resources.files("qwen3cp.planner").joinpath("hardware.json").read_text()
    known: dict[str, Hardware] = {}
    for name, values in json.loads(text).items():
        known[name] = _hardware(name, values, known, name)
    return known


HARDWARE: Mapping[str, Hardware] = _built_in()
"""a2, a3 and a3-supernode, from hardware.json beside this file."""
