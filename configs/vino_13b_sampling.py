"""The published model, sampled on a TPU slice: what launch.aot_compile --sampling compiles.

    python -m launch.aot_compile --sampling --config configs/vino_13b_sampling.py --topology v5e:4x4 [--bucket tiv2v] [--vae_tiling full]

A bucket is what one task asks for, at the published sizes; the mesh is the one that launch.sample takes by itself. A picture of
640x640 is 400 tokens of the VLM's prompt (1,600 patches), a clip of 480x848 four times 390 (6,240).
"""
from configs import common, models
from configs.data import bucket
from vino_jax.aot.chips import topology_devices
from vino_jax.sharding.mesh import SAMPLING_PRESET, sampling_mesh

_PICTURE, _CLIP = {"frames": 1, "height": 640, "width": 640}, {"frames": 85, "height": 480, "width": 848}
_SEEN = {"images": 1, "image_height": 640, "image_width": 640}


def get_config(topology: str = "v5e:4x4"):
    """Tasks of one row on that slice."""
    model, chips = models.vino_13b(), len(topology_devices(topology))
    return common.config(
        model=model,
        runtime={"dtype": "bfloat16"},
        mesh={"preset": SAMPLING_PRESET, **sampling_mesh(chips, model["mmdit"]["heads"])},
        buckets={
            "t2i": bucket(1, **_PICTURE, prompt_tokens=256),
            "ti2i": bucket(1, **_PICTURE, prompt_tokens=704, patches=1600) | _SEEN,
            "t2v": bucket(1, **_CLIP, prompt_tokens=256),
            "tiv2v": bucket(1, **_CLIP, prompt_tokens=2304, patches=7872, video_frames=85) | _SEEN,
        },
    )
