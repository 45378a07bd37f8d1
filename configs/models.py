"""Architectures by name, as plain tables for VinoConfig."""
import dataclasses

from vino_jax.settings import VinoConfig


def vino_13b() -> dict:
    """The published sizes: the defaults of vino_jax/settings.py."""
    return dataclasses.asdict(VinoConfig())


def shapes() -> dict:
    """The small model of the embedded demo: the same code at a size that two CPU cores train in minutes."""
    return {
        "mmdit": {
            "in_channels": 16, "out_channels": 16, "heads": 4, "head_dim": 32, "double_blocks": 2, "single_blocks": 4, "refiner_blocks": 1,
            "text_width": 128, "pooled_width": 32, "rope_axes": (8, 12, 12),
        },
        "vae": {"latent_channels": 16, "block_widths": (16, 24, 32, 40), "layers_per_block": 1, "norm_groups": 2, "scaling_factor": 1.0},
        "vlm": {
            "text": {"vocab": 832, "width": 128, "layers": 4, "heads": 4, "kv_heads": 2, "head_dim": 32, "mlp": 256, "mrope_section": (6, 5, 5)},
            "vision": {"layers": 3, "width": 64, "heads": 2, "mlp": 128, "out_width": 128, "positions": 64, "deepstack": (0, 1, 2)},
        },
        "queries": 8,
        "connector_ratio": 4,
    }


def tiny() -> dict:
    """Smaller still, for tests: every code path, no capacity."""
    return {
        "mmdit": {
            "in_channels": 4, "out_channels": 4, "heads": 4, "head_dim": 16, "double_blocks": 1, "single_blocks": 2, "refiner_blocks": 1,
            "text_width": 32, "pooled_width": 16, "rope_axes": (4, 6, 6),
        },
        "vae": {"latent_channels": 4, "block_widths": (8, 8, 8, 8), "layers_per_block": 1, "norm_groups": 4},
        "vlm": {
            "text": {"vocab": 1536, "width": 32, "layers": 3, "heads": 2, "kv_heads": 1, "head_dim": 16, "mlp": 48, "mrope_section": (4, 2, 2)},
            "vision": {"layers": 2, "width": 32, "heads": 2, "mlp": 32, "out_width": 32, "positions": 16, "deepstack": (0, 1)},
        },
        "queries": 4,
        "connector_ratio": 2,
    }
