"""Options for XLA: of a train step by chip and width, of a program that runs once."""

from jax.sharding import Mesh

from bothways.chips import CHIPS, Chip
from bothways.recipes import Recipe

WIDE = 4096
"""D from which on the matrix products want more VMEM than XLA gives them. Narrower models have activations that fit into
VMEM whole, and are slower if products may have it."""
WIDE_VMEM_KIB = 65_536
VMEM_KIB = (32_768, WIDE_VMEM_KIB)
"""What plan --search tries beside the compiler's 16 MiB."""


def compiler_options(mesh: Mesh, d_model: int, vmem_kib: int = 0) -> dict[str, str] | None:
    """For jax.jit, on a TPU; None elsewhere.

    Args:
      vmem_kib: what one operation may use of VMEM, the memory beside the matrix units. 0: by chip and width.
    """
    device = mesh.devices.flat[0]
    if device.platform != "tpu":
        return None
    roomy = any(device.device_kind in chip.kinds and chip.wide_vmem for chip in CHIPS.values())
    # XLA would cut a gather and the product after it into a ring of thin products ("collective matmul"), to overlap them.
    # In all plans that was slower: shards of a hundred rows leave most of the matrix unit idle.
    options = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
    vmem_kib = vmem_kib or (WIDE_VMEM_KIB if roomy and d_model >= WIDE else 0)
    return options | ({"xla_tpu_scoped_vmem_limit_kib": str(vmem_kib)} if vmem_kib else {})


def once_options(mesh: Mesh) -> dict[str, int] | None:
    """For jax.jit of a program that a CPU runs once, such as the one that makes a state: compiled in half the time, it draws GPT-2's
    weights as fast. None elsewhere."""
    return {"xla_backend_optimization_level": 1} if mesh.devices.flat[0].platform == "cpu" else None


def other_vmem(chip: Chip, recipe: Recipe) -> tuple[int, ...]:
    """Settings of mesh.vmem_kib that may be faster than the recipe's on such a chip."""
    usual = WIDE_VMEM_KIB if recipe.model.d_model >= WIDE else 0
    taken = chip.dimensions == 1 or not chip.wide_vmem or recipe.mesh.vmem_kib
    return () if taken else tuple(kib for kib in VMEM_KIB if kib != usual)
