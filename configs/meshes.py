"""How the 13 B model lies on TPU slices: chips and memory decide mesh, sharding, recomputation and rows. `launch.aot_compile` says what fits."""
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Placement:
    """mesh: sizes of its axes, and the preset. remat: policies (nn/stack.py) by bucket. rows: of every bucket, a data shard (data x fsdp of them);
    on a mesh without "seq" that is rows a chip."""

    mesh: dict[str, Any]
    rows: dict[str, int]
    remat: dict[str, str]

    @property
    def data_shards(self) -> int:
        return self.mesh["data"] * self.mesh["fsdp"]


def _mesh(preset: str, data: int, fsdp: int, seq: int = 1) -> dict[str, Any]:
    return {"preset": preset, "data": data, "fsdp": fsdp, "seq": seq, "tensor": 1}


def _remat(pictures: str, clips: str) -> dict[str, str]:
    return {"picture": pictures, "edit": pictures, "edit_two": pictures, "clip": clips, "clip_edit": clips, "video_edit": clips}


# fsdp is 8 everywhere: shards of the width of 3,072 stay multiples of 128. Between slices lies "data", and nothing is stored over it. Where a
# chip has little memory, 8 of them share a sample.
_CLIPS = {"clip": 1, "clip_edit": 1, "video_edit": 1}
_WHOLE, _SHARED = {"picture": 1, "edit": 1, "edit_two": 1, **_CLIPS}, {"picture": 8, "edit": 4, "edit_two": 4, **_CLIPS}
PLACEMENTS = {
    "v5e:16x16": Placement(_mesh("fsdp_seq", 4, 8, 8), _SHARED, _remat(pictures="save_branches", clips="save_branches")),
    "v5p:4x4x4": Placement(_mesh("fsdp_all", 8, 8), _WHOLE, _remat(pictures="save_products", clips="budget:50")),
    "2xv5p:4x4x4": Placement(_mesh("fsdp", 16, 8), _WHOLE, _remat(pictures="save_products", clips="budget:35")),  # two slices
    "v5p:8x8x8": Placement(_mesh("fsdp", 64, 8), _WHOLE, _remat(pictures="save_products", clips="budget:35")),
    "v6e:8x8": Placement(_mesh("fsdp_seq", 1, 8, 8), _SHARED, _remat(pictures="save_products", clips="save_products")),
    "v6e:16x16": Placement(_mesh("fsdp_seq", 4, 8, 8), _SHARED, _remat(pictures="save_products", clips="save_products")),
}
