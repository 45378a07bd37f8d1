"""Classifier-free guidance over the branches of one sample (arXiv 2207.12598; two conditions as in arXiv 2211.09800, eq. 3).

The branches come in one order everywhere: positive, negative, and with image guidance the negative without images.
"""
import jax

from vino_jax.flow.path import per_row


def guide(velocity: jax.Array, text_scale: jax.Array, image_scale: jax.Array) -> jax.Array:
    """One velocity of those of all branches.

    velocity: (G, B, ...) float32, G = 2 or 3 branches; scales: () or (B,).
    G = 2: v = v_neg + s_T (v_pos - v_neg); image_scale is not used.
    G = 3: v = v_noimg + s_I (v_neg - v_noimg) + s_T (v_pos - v_neg).
    Returns (B, ...) float32. Raises ValueError for another number of branches.
    """
    branches = velocity.shape[0]
    text = per_row(text_scale, velocity.ndim - 1)
    if branches == 2:
        positive, negative = velocity
        return negative + text * (positive - negative)
    if branches == 3:
        positive, negative, without_images = velocity
        return without_images + per_row(image_scale, velocity.ndim - 1) * (negative - without_images) + text * (positive - negative)
    raise ValueError(f"guidance takes 2 or 3 branches, not {branches}")
