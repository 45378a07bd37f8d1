"""The vocabulary of logical axes and of mesh axes. Models name the first, meshes have the second, rules.py maps one to the other."""

MESH_AXES = ("data", "fsdp", "seq", "tensor")

# Dims of parameters.
PARAM_AXES = (
    "layers",  # stacked blocks
    "embed",  # model width, as input or output of a product
    "heads",  # attention heads x head width, fused
    "kv_heads",  # key-value heads x head width, fused
    "mlp",  # hidden width of an MLP
    "modulation",  # output of a modulation: several model widths side by side
    "vlm_width",  # the VLM's own widths: they are no multiples of what tiles and many devices ask for
    "vlm_mlp",
    "vocab",  # rows of a token embedding
    "queries",  # learnable query tokens
    "conv_in",  # input channels of a convolution
    "conv_out",  # output channels of a convolution
)

# Dims of activations.
ACTIVATION_AXES = (
    "batch",  # samples
    "tokens",  # of a sequence: visual tokens, the VLM's, or both
    "width",  # model width of activations
    "act_heads",  # attention heads of activations
    "act_mlp",  # hidden width of activations
    "pixels",  # height of pixels and latents
    "tiles",  # windows of frames and tiles of pictures, which the VAE takes one by one; over what "batch" leaves of their mesh axes
)
