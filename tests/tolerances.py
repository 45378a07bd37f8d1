"""Every tolerance of the tests, in one place. Never loosened to pass."""

PARITY_ABS = 2e-4  # outputs against PyTorch in float32, max abs error
GRADIENT_REL = 1e-3  # gradients against PyTorch, max abs error / max abs value
GOLDEN_MMDIT_ABS = 2e-4  # golden/mmdit.npz
GOLDEN_IMAGE_REL = 1e-3  # pipeline goldens, image tasks: latents
GOLDEN_VIDEO_REL = 3e-2  # pipeline goldens where a clip is decoded and resized
GOLDEN_PIXEL_GREY = 1  # pixels of a picture, largest difference in grey levels
BATCH_ROW_ABS = 2e-5  # a row in a padded batch against the row alone
KERNEL_ABS = 1e-5  # attention kernels, and attention on several devices, against products on one: outputs and gradients
MESH_LOSS_ABS = 1e-5  # loss curve on 8 devices against 1, over 20 steps
TILING_GREY = 1.0  # tiled against untiled VAE, grey levels
SAMPLE_BF16_RMS = 0.05  # sampling in bfloat16 against float32, root mean square over that of the latents
SAMPLE_MESH_ABS = 1e-4  # sampling in float32 on several devices against one: latents
LATENTS_ABS = 2e-6  # moments encoded in batches of another size: 1 or 2 rows a device differ from 4 or 8 by 4.8e-7, values are up to 1.4
MODEL_FLOPS_REL = 0.02  # model FLOPs by formula against XLA's count of a forward pass, which has elementwise work too (0.7 % of it)
PRODUCT_FLOPS_REL = 1e-3  # the same against all matrix products of a traced step: 5e-4 are products of no weight, such as the guidance's
BF16_MOMENTS_LOSS_REL = 1e-3  # loss curve of moments in bfloat16 against float32, six steps
ADAPTER_LOSS_REL = 1e-5  # loss with adapters against the same in changed kernels
INT8_LOSS_REL = 2e-3  # loss with products in int8 against float32
INT8_GRADIENT_REL = 0.05  # norm of the difference of a kernel's gradient, over its norm
FREQUENCY_SIGMAS = 4.0  # frequencies of sampled tokens against their probabilities, in standard deviations
VAE_MESH_ABS = 1e-4  # VAE with its tiles spread over a mesh against one device: pixels in [-1, 1] and moments
