"""Device meshes with the axes ("data", "fsdp", "seq", "tensor")."""
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from vino_jax.errors import UserError
from vino_jax.settings import nearest
from vino_jax.sharding.axes import MESH_AXES

SAMPLING_PRESET = "fsdp_seq"  # weights lie over "seq" too, over which a sampling_mesh has most of its devices


def parse_mesh(text: str) -> dict[str, int]:
    """ "data=2,seq=4" -> {"data": 2, "seq": 4}. Raises UserError for anything else."""
    sizes = {}
    for part in filter(None, text.split(",")):
        name, _, size = part.partition("=")
        if name not in MESH_AXES:
            raise UserError(f"unknown mesh axis {name!r} in {text!r}{nearest(name, MESH_AXES)}")
        if not size.lstrip("-").isdigit():
            raise UserError(f"mesh axis {name!r} in {text!r} needs a whole number, as in {name}=2")
        sizes[name] = int(size)
    return sizes


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh of all four axes; absent ones have size 1, one may be -1 (what is left of the devices).

    Raises UserError when the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    for name in sizes:
        if name not in MESH_AXES:
            raise UserError(f"unknown mesh axis {name!r}{nearest(name, MESH_AXES)}")
    shape = [sizes.get(name, 1) for name in MESH_AXES]
    known = math.prod(s for s in shape if s != -1)
    if shape.count(-1) == 1 and known > 0 and len(devices) % known == 0:
        shape[shape.index(-1)] = len(devices) // known
    if min(shape) < 1 or math.prod(shape) != len(devices):
        wanted = ",".join(f"{n}={sizes.get(n, 1)}" for n in MESH_AXES)
        raise UserError(f"mesh {wanted} does not fit {len(devices)} devices: its sizes must multiply to that number (one may be -1)")
    return Mesh(_arranged(shape, devices), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def sampling_mesh(devices: int, heads: int) -> dict[str, int]:
    """Sizes of a mesh on which few samples use every device: tokens lie over as many as divide the heads of attention and the devices,
    weights and rows over the rest."""
    seq = math.gcd(devices, heads)
    return {"fsdp": devices // seq, "seq": seq}


def _arranged(shape: Sequence[int], devices: Sequence[jax.Device]) -> np.ndarray:
    """Devices so that neighbours on the mesh are neighbours in the torus; several slices lie along "data", all else inside of one."""
    tpu = devices[0].platform == "tpu"  # GPUs have slices too: their hosts, which may lie on any axis
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if tpu else 1  # one slice alone has no number
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    data, *inner = shape
    if data % slices:
        raise UserError(f"mesh axis 'data' of size {data} does not divide over {slices} slices: only it may lie between them")
    return mesh_utils.create_hybrid_device_mesh((data // slices, *inner), (slices, 1, 1, 1), devices, allow_split_physical_axes=True)
