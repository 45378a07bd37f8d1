"""Generation from Python: load a model checkpoint onto the devices, give it tasks, get arrays.

    from launch.generator import Generator
    generator = Generator.load("runs/demo/model")
    result = generator.generate({"task": "t2i", "caption": "a red circle left of a blue square"}, steps=12, seed=3)
    result.pixels  # uint8 (F, H, W, 3)

A task is an entry of a task file (data_pipelines/tasks.py), its paths from `root` on. launch.sample is this on the command line.
"""
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from data_pipelines.packing import SamplingOptions, check_options, pack_task
from data_pipelines.prompts import Prompter
from data_pipelines.tasks import Task, parse_task
from vino_jax.batch import PackedTask
from vino_jax.checkpoint import model as checkpoint
from vino_jax.models.vae_tiling import Tiling
from vino_jax.models.vino import Vino
from vino_jax.nn.runtime import Runtime
from vino_jax.sampling.pipeline import Progress, Result, Sampler
from vino_jax.settings import SamplingConfig, build
from vino_jax.sharding.mesh import SAMPLING_PRESET, make_mesh, parse_mesh, sampling_mesh
from vino_jax.sharding.resolve import shardings
from vino_jax.sharding.rules import preset

# As the published VAE does by default, and as it does after enable_tiling().
TILINGS = {"frames": Tiling(side=None), "full": Tiling()}
PICTURE_TASKS = ("t2i", "ti2i", "ti2i_baseimg")
T = TypeVar("T")


@dataclass(frozen=True)
class Asked:
    """What is asked of all tasks; None: what the checkpoint says, else the published model's value."""

    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    seed: int = 0
    guidance: float | None = None
    image_guidance: float | None = None
    negative_prompt: str | None = None

    def options(self, defaults: SamplingConfig, picture: bool) -> SamplingOptions:
        """For a picture or a clip: these values before the checkpoint's own before the published ones."""

        def first(*values):
            return next((value for value in values if value is not None), None)

        height, width = defaults.size(picture)
        return SamplingOptions(
            height=first(self.height, height), width=first(self.width, width), num_frames=first(self.num_frames, defaults.num_frames),
            seed=self.seed, guidance=first(self.guidance, defaults.guidance(picture)), shift=defaults.shift(picture),
            image_guidance=first(self.image_guidance, defaults.image_guidance), negative_prompt=self.negative_prompt)

    def check(self, defaults: SamplingConfig) -> None:
        """Raises UserError for values that no task could be generated with."""
        for picture in (True, False):
            check_options(self.options(defaults, picture))


@dataclass
class Generator:
    """A model on its devices, the prompter of its tokenizer, and what its checkpoint says of sampling."""

    sampler: Sampler
    prompter: Prompter
    defaults: SamplingConfig = field(default_factory=SamplingConfig)

    @classmethod
    def load(cls, directory: str | Path, *, dtype: str | None = None, mesh: Mapping[str, int] | str | None = None, vae_tiling: str = "frames",
             tell: Callable[[Progress], None] | None = None) -> "Generator":
        """The model checkpoint at `directory`, or that of the finished training run there.

        dtype: of weights and computation, "float32" or "bfloat16" (by default bfloat16, on a CPU float32). mesh: sizes of its axes, as a
        table or as "data=1,seq=8" (by default all devices share each sample, see sampling_mesh; on a CPU one device). vae_tiling: of
        TILINGS. Raises UserError where there is no checkpoint, or the mesh does not fit the devices.
        """
        directory = model_directory(Path(directory))
        info = checkpoint.read_info(directory)
        dtype, lies = placement(dtype, mesh, sampling_mesh(jax.device_count(), info.config.mmdit.heads))
        vino, rules = Vino(info.config, Runtime(dtype=dtype), TILINGS[vae_tiling]), preset(SAMPLING_PRESET) if lies else None
        params = checkpoint.restore(directory, placed(vino.abstract, vino.axes, dtype, lies, rules))
        return cls(Sampler(vino, params, mesh=lies, rules=rules, tell=tell), Prompter(checkpoint.processor_folder(directory)),
                   build(SamplingConfig, info.sampling, "sampling."))

    def pack(self, task: Task, asked: Asked) -> PackedTask:
        """Read, letterbox and tokenize. Raises UserError, naming the task."""
        picture = task.task in PICTURE_TASKS or (asked.num_frames or self.defaults.num_frames) == 1
        return pack_task(task, self.prompter, asked.options(self.defaults, picture))

    def generate(self, task: Mapping[str, Any], *, root: str | Path = ".", steps: int | None = None, posterior: str = "sample",
                 noise: np.ndarray | None = None, step_cache: int = 1, **asked: Any) -> Result:
        """One task of a task file (its index may be absent); asked: fields of Asked.

        Result: pixels uint8 (F, H, W, 3), latents (1, f, h, w, C) float32. noise: (1, f, h, w, C) to start from. step_cache: see
        Sampler.generate.
        Raises UserError, naming the task, for what cannot be read or does not fit.
        """
        packed = self.pack(parse_task({"index": "0", **task}, Path(root), "task"), Asked(**asked))
        return self.sampler.generate(packed, steps=steps or self.defaults.steps, posterior=posterior, noise=noise, step_cache=step_cache)

    def generate_many(self, tasks: Sequence[Mapping[str, Any]], *, root: str | Path = ".", steps: int | None = None, posterior: str = "sample",
                      batch: int = 8, step_cache: int = 1, **asked: Any) -> list[Result]:
        """The same for many tasks, in their order; those of equal shapes run side by side, up to `batch`."""
        packed = [self.pack(parse_task({"index": str(i), **task}, Path(root), f"task {i}"), Asked(**asked)) for i, task in enumerate(tasks)]
        return self.sampler.generate_many(packed, steps=steps or self.defaults.steps, posterior=posterior, batch=batch, step_cache=step_cache)


def model_directory(path: Path) -> Path:
    """The model checkpoint at `path`, or that at the end of the training run there."""
    return path / "model" if not (path / "model.json").exists() and (path / "model" / "model.json").exists() else path


def placement(dtype: str | None, mesh: Mapping[str, int] | str | None, spread: Mapping[str, int]) -> tuple[str, jax.sharding.Mesh | None]:
    """The dtype of weights and computation, and the mesh that they lie on, None for one device; spread: its sizes where `mesh` asks for
    none and there are several accelerators."""
    on_cpu = jax.default_backend() == "cpu"
    sizes = parse_mesh(mesh) if isinstance(mesh, str) else mesh
    if not sizes and not on_cpu and jax.device_count() > 1:
        sizes = spread
    return dtype or ("float32" if on_cpu else "bfloat16"), make_mesh(sizes) if sizes else None


def placed(abstract: Any, axes: Any, dtype: str, mesh: jax.sharding.Mesh | None, rules: dict | None) -> Any:
    """ShapeDtypeStructs of parameters in `dtype`, on the mesh where there is one."""
    structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), abstract)
    if mesh is None:
        return structs
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), structs, shardings(structs, axes, mesh, rules))


def in_groups(items: Iterable[T], shape: Callable[[T], Hashable], size: int) -> Iterator[list[T]]:
    """Items of equal shapes together, `size` of them or, at the end, what is left. An item waits until its group is full, so of every shape
    few are in memory."""
    waiting: dict[Hashable, list[T]] = {}
    for item in items:
        group = waiting.setdefault(shape(item), [])
        group.append(item)
        if len(group) == size:
            yield waiting.pop(shape(item))
    yield from waiting.values()
