"""How programs of tests are compiled: they are small and run a few times, so most of their time is compilation."""
# Little optimisation in LLVM, and XLA's older code for fusions: the newer one sets up a context of MLIR for each fusion, which is half of the
# CPU time that a training step takes to compile.
QUICKLY = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"


def xla_flags(devices: int) -> str:
    """XLA_FLAGS of a process with so many virtual CPU devices."""
    return f"--xla_force_host_platform_device_count={devices} {QUICKLY}"
