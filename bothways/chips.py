"""Chips: what each can do at most, and the slices that they come in. The one table of such numbers."""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

import jax

from bothways.errors import InputError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of TPU. Rates are per chip and second, in bytes where nothing else is said.

    Sources: docs.cloud.google.com/tpu/docs/ v4, v5e, v5p, v6e, tpu7x, "System architecture" (peak bfloat16 compute,
    HBM bandwidth, bidirectional ICI bandwidth and data-centre network per chip or per pod). A link's one-way rate is
    the chip's bidirectional ICI bandwidth over 2 times its links; v4's links are in arXiv 2304.01433, table 4, and the
    network of a v4 host is taken to be v5p's. `memory` is what libtpu 0.0.42 says is available to a program: less than
    the chip carries. `clock` is peak / (2 * multiply-accumulate units) and turns the compiler's cycles into seconds; 0
    where the number of units is not published.
    """

    kinds: tuple[str, ...]
    """As jax.Device.device_kind names its devices."""
    flops: float
    memory: float
    bandwidth: float
    link: float
    """One link of the interconnect, one way."""
    network: float
    """Data-centre network, between slices."""
    dimensions: int
    """Of the torus: 2 or 3."""
    host: int
    """Chips that a host of a multi-host slice has."""
    clock: float
    devices: int = 1
    """JAX devices of one chip."""
    accelerator: str = ""
    """Prefix of Cloud TPU's accelerator types, such as v5litepod in v5litepod-256."""
    counts_cores: bool = False
    """The number in an accelerator type counts tensor cores, two a chip, rather than chips."""
    wide_vmem: bool = True
    """XLA may be given 64 MiB of VMEM for one operation; v4 has 16."""
    gke: str = ""
    """GKE's label cloud.google.com/gke-tpu-accelerator."""


CHIPS: dict[str, Chip] = {
    "v4": Chip(
        ("TPU v4",), 275e12, 30.75 * GIB, 1200e9, 50e9, 6.25e9, 3, 4, 1.05e9, 1, "v4", True, False, "tpu-v4-podslice"
    ),
    "v5e": Chip(
        ("TPU v5 lite", "TPU v5e"),
        197e12,
        15.75 * GIB,
        819e9,
        50e9,
        3.125e9,
        2,
        4,
        1.5e9,
        accelerator="v5litepod",
        gke="tpu-v5-lite-podslice",
    ),
    "v5p": Chip(
        ("TPU v5", "TPU v5p"),
        459e12,
        95.74 * GIB,
        2765e9,
        100e9,
        6.25e9,
        3,
        4,
        1.75e9,
        1,
        "v5p",
        True,
        gke="tpu-v5p-slice",
    ),
    "v6e": Chip(
        ("TPU v6 lite", "TPU v6e"),
        918e12,
        31.25 * GIB,
        1638e9,
        100e9,
        12.5e9,
        2,
        4,
        1.75e9,
        accelerator="v6e",
        gke="tpu-v6e-slice",
    ),
    "7x": Chip(("TPU7x",), 2307e12, 189.5 * GIB, 7380e9, 100e9, 12.5e9, 3, 4, 0.0, 2, "tpu7x", True, gke="tpu7x"),
}

TPU_NAMES = {*CHIPS, *(chip.accelerator for chip in CHIPS.values())}
"""Ours, and Cloud TPU's."""

# Dense bfloat16 FLOP/s of one device, as jax.Device.device_kind names it. GPUs: NVIDIA's data sheets for A100, H100 and
# H200 SXM, without sparsity.
PEAK_FLOPS = {kind: chip.flops / chip.devices for chip in CHIPS.values() for kind in chip.kinds} | {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}

# What tests plan for: this machine's CPU, with as many devices as JAX was configured to make. Its numbers are made up.
CPU = Chip(("cpu",), 1e12, 4 * GIB, 1e11, 1e10, 1e9, 1, 8, 0.0)


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips that are wired together, and how many such slices.

    >>> Topology.parse("v5e:16x16").chips, Topology.parse("v5p-256").shape
    (256, (4, 4, 8))
    """

    chip_name: str
    shape: tuple[int, ...]
    slices: int = 1

    @classmethod
    def parse(cls, text: str, slices: int = 1) -> "Topology":
        """From `v5e:16x16`, or from an accelerator type such as `v5e-256`, `v5litepod-256`, `v4-32` (16 chips).

        Raises:
          InputError: no such chip, or a shape that it does not come in.
        """
        if slices < 1:
            raise InputError(f"--slices is {slices}; there is at least 1")
        text = text.lower().removeprefix("tpu-")
        found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", text)
        if found:
            name, shape = _chip_name(found[1], text), tuple(int(n) for n in found[2].split("x"))
            problem = _shape_problem(name, shape)
        elif found := re.fullmatch(r"(\w+)-(\d+)", text):
            name = _chip_name(found[1], text)
            chips = int(found[2]) // 2 if CHIPS.get(name, CPU).counts_cores else int(found[2])
            shape = usual_shape(name, chips)
            problem = f"there is no slice of {chips} chips" if shape is None else ""
        else:
            raise InputError(
                f"topology {text!r} is not understood; give a chip and a shape, such as v5e:16x16 or v5p:4x4x8, or an "
                "accelerator type, such as v5e-256"
            )
        if problem:
            two = name == "cpu" or CHIPS[name].dimensions == 2
            shapes = "2x2, 2x4, 4x4 ... 16x16" if two else "2x2x1, 2x2x2, 2x2x4, 2x4x4, 4x4x4, 4x4x8 ..."
            raise InputError(f"topology {text!r}: {problem}; {name} comes as {shapes}")
        assert shape is not None
        return cls(name, shape, slices)

    @property
    def chip(self) -> Chip:
        return CPU if self.chip_name == "cpu" else CHIPS[self.chip_name]

    @property
    def chips(self) -> int:
        """In all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def devices_count(self) -> int:
        return self.chips * self.chip.devices

    @property
    def name(self) -> str:
        return f"{self.chip_name}:{'x'.join(str(n) for n in self.shape)}"

    @property
    def accelerator_type(self) -> str:
        """Cloud TPU's name of one slice, such as v5litepod-256 or v4-32."""
        count = math.prod(self.shape) * (2 if self.chip.counts_cores else 1)
        return f"{self.chip.accelerator}-{count}"

    @property
    def hosts(self) -> int:
        """In one slice."""
        return -(-math.prod(self.shape) // self.chip.host)

    def wraps(self, axis: int) -> bool:
        """Whether the chips along an axis form a ring.

        v5e and v6e close an axis of 16; the others close all axes when each is a multiple of 4 (same pages).
        """
        if self.chip.dimensions == 2:
            return self.shape[axis] == 16
        return self.chip.dimensions == 3 and all(n % 4 == 0 for n in self.shape)

    def devices(self) -> list:
        """Devices to compile for. They cannot run anything.

        Raises:
          InputError: libtpu is not installed, or has no such slice.
        """
        if self.chip_name == "cpu":
            if self.chips > len(jax.devices("cpu")):
                raise InputError(f"topology cpu:{self.chips} wants XLA_FLAGS=--xla_force_host_platform_device_count")
            return jax.devices("cpu")[: self.chips]
        if importlib.util.find_spec("libtpu") is None:
            raise InputError("plan compiles with libtpu, which is not installed: pip install 'bothways[plan]'")
        from jax.experimental import topologies

        # libtpu looks for the TPU of this host, and complains where there is none.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", self.accelerator_type)
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        # One process at a time may hold a TPU; any number may plan, since none touches one.
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        options: dict[str, Any] = {"chip_config_name": "megacore"} if self.chip_name == "v4" else {}
        if self.slices > 1:
            options["num_slices"] = self.slices
        name = self.name.replace("7x:", "tpu7x:")
        try:
            with quiet_stderr():
                return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)
        except (RuntimeError, ValueError) as e:
            raise InputError(f"libtpu has no topology {name}: {str(e).splitlines()[0]}") from e


def _chip_name(given: str, text: str) -> str:
    if given == "cpu":
        return given
    other = {chip.accelerator: name for name, chip in CHIPS.items()}
    name = other.get(given, given)
    if name not in CHIPS:
        raise InputError(f"topology {text!r}: no chip {given!r}; there are {', '.join(CHIPS)}")
    return name


def _shape_problem(name: str, shape: tuple[int, ...]) -> str:
    if name == "cpu":
        return "" if len(shape) == 1 else "a CPU has one dimension"
    chip = CHIPS[name]
    if len(shape) != chip.dimensions:
        return f"the shape has {len(shape)} dimensions instead of {chip.dimensions}"
    if any(n < 1 for n in shape) or shape[0] % 2 or shape[1] % 2:
        return "a host has 2x2 chips, and the first two sides must be even"
    if chip.dimensions == 2 and max(shape) > 16:
        return "a side is at most 16"
    return ""


def usual_shape(name: str, chips: int) -> tuple[int, ...] | None:
    """The shape nearest to a cube (or a square) of powers of two; the larger sides last."""
    if name == "cpu":
        return (chips,) if chips else None
    if chips < 4 or chips & (chips - 1) or (CHIPS[name].dimensions == 2 and chips > 256):
        return None
    power = chips.bit_length() - 1
    if CHIPS[name].dimensions == 2:
        return 2 ** (power // 2), 2 ** (power - power // 2)
    if chips == 4:
        return 2, 2, 1
    return tuple(2 ** ((power + i) // 3) for i in range(3))


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """libtpu writes to file descriptor 2 whatever one asks for; what Python says meanwhile is lost too."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
