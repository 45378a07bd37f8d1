"""How programs of tests are compiled: they are small and run a few times, so most of their time is compilation."""
# XLA's older code for fusions: the newer sets up MLIR for each, which is half of the CPU time that a training step takes to compile.
# libtpu ends a process that has this flag.
OLDER_FUSIONS = "--xla_cpu_use_fusion_emitters=false"


def xla_flags(devices: int) -> str:
    """XLA_FLAGS of a process with so many virtual CPU devices."""
    return f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0 {OLDER_FUSIONS}"
