"""The sampler with a tiny random model: shapes, seeds by row, branches, noise, posterior."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import models
from tests.tolerances import BATCH_ROW_ABS, SAMPLE_BF16_RMS, SAMPLE_MESH_ABS
from vino_jax.batch import ROLE_PAD, BucketSpec, PackedTask
from vino_jax.errors import UserError
from vino_jax.models.vino import Vino
from vino_jax.nn.runtime import Runtime
from vino_jax.sampling import pipeline
from vino_jax.sampling.pipeline import Sampler
from vino_jax.settings import VinoConfig, build
from vino_jax.sharding.mesh import SAMPLING_PRESET, make_mesh
from vino_jax.sharding.resolve import shardings
from vino_jax.sharding.rules import preset

PICTURE = BucketSpec("picture", 1, 1, 32, 48, 16)
EDIT = BucketSpec("edit", 1, 1, 32, 32, 16, images=2, image_height=32, image_width=48)


def packed(bucket: BucketSpec, seed: int, *, image_guidance: float = 1.0, guidance: float = 4.0, shift: float = 5.0) -> PackedTask:
    """A random task of a bucket's shapes; with image guidance the third branch lacks the first image."""
    rng = np.random.default_rng(seed)
    branches = [bucket.fake(seed).replace(target=None, images=None, video=None)]
    branches.append(bucket.fake(seed + 1000).replace(target=None, images=None, video=None))
    if image_guidance > 1.0:
        role = branches[1].role.copy()
        role[:, :2 + 6] = ROLE_PAD  # 2x3 latent tokens and two boundary tokens
        branches.append(branches[1].replace(role=role))
    references = tuple(rng.integers(0, 256, (1, bucket.image_height, bucket.image_width, 3), np.uint8) for _ in range(bucket.images))
    return PackedTask(f"task{seed}", "ti2i" if references else "t2i", bucket.frames, bucket.height, bucket.width, tuple(branches),
                      references, shift, guidance, image_guidance, seed)


@pytest.fixture(scope="module")
def vino():
    return Vino(build(VinoConfig, models.tiny()), Runtime())


@pytest.fixture(scope="module")
def params(vino):
    """Random by numpy (much faster than the modules' own), no leaf at zero, so that everything has an effect."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        scale = float(path[-1].key == "scale")
        return (scale + rng.standard_normal(leaf.shape) / np.sqrt(np.prod(leaf.shape[-2:-1] or (100,)))).astype(np.float32)

    return jax.device_put(jax.tree.map_with_path(draw, vino.abstract))


@pytest.fixture(scope="module")
def sampler(vino, params):
    return Sampler(vino, params)


def test_a_task_gives_latents_and_pixels_of_its_size(sampler):
    result = sampler.generate(packed(EDIT, 1, image_guidance=2.0), steps=2)
    assert result.index == "task1"
    assert result.latents.shape == (1, 1, 4, 4, 4) and result.latents.dtype == np.float32 and np.isfinite(result.latents).all()
    assert result.pixels.shape == (1, 32, 32, 3) and result.pixels.dtype == np.uint8 and result.pixels.std() > 0


def test_a_result_does_not_depend_on_its_neighbours(sampler):
    """Different seeds, guidance and shift in one pass, two shapes mixed, a last pass that is not full."""
    tasks = [packed(PICTURE, 1), packed(EDIT, 2, image_guidance=2.0, guidance=3.0), packed(PICTURE, 3, guidance=7.0, shift=7.0),
             packed(EDIT, 4, image_guidance=1.5, shift=7.0), packed(PICTURE, 5)]
    together = sampler.generate_many(tasks, steps=2, batch=2)
    for task, result in zip(tasks, together, strict=True):
        alone = sampler.generate(task, steps=2)
        assert result.index == alone.index == task.index
        assert np.abs(result.latents - alone.latents).max() < BATCH_ROW_ABS * max(1.0, np.abs(alone.latents).max())
        assert np.abs(result.pixels.astype(int) - alone.pixels).max() <= 1
    assert np.abs(together[0].latents - together[4].latents).max() > 0.1


def test_every_branch_and_scale_has_an_effect(sampler):
    task = packed(EDIT, 6, image_guidance=2.0)
    base = sampler.generate(task, steps=2).latents
    changes = [{"guidance": 5.0}, {"image_guidance": 3.0}, {"shift": 7.0}, {"seed": 7}]
    changes += [{"branches": tuple(packed(EDIT, 50).branches[0] if i == g else b for i, b in enumerate(task.branches))} for g in range(3)]
    changes += [{"references": tuple(r[..., ::-1].copy() if i == k else r for i, r in enumerate(task.references))} for k in range(2)]
    for change in changes:
        moved = np.abs(sampler.generate(dataclasses.replace(task, **change), steps=2).latents - base).max()
        assert moved > 1e-4, list(change)


def test_noise_is_of_the_seed_or_given(sampler):
    task = packed(PICTURE, 8)
    noise = np.asarray(jax.random.normal(jax.random.key(8), (1, 1, 4, 6, 4)))
    assert np.array_equal(sampler.generate(task, steps=1).latents, sampler.generate(task, steps=1, noise=noise).latents)
    with pytest.raises(UserError, match=r"task task8.*\(1, 1, 4, 6, 3\).*needs \(1, 1, 4, 6, 4\)"):
        sampler.generate(task, steps=1, noise=noise[..., :3])


def test_the_posteriors_mode_has_no_noise(sampler):
    one, other = (dataclasses.replace(packed(EDIT, 9), seed=seed) for seed in (9, 10))
    noise = np.asarray(jax.random.normal(jax.random.key(0), (1, 1, 4, 4, 4)))
    mode = [sampler.generate(task, steps=1, posterior="mode", noise=noise).latents for task in (one, other)]
    sample = [sampler.generate(task, steps=1, posterior="sample", noise=noise).latents for task in (one, other)]
    assert np.array_equal(*mode) and np.abs(sample[0] - sample[1]).max() > 1e-5
    for bad, match in (({"posterior": "median"}, "posterior 'median' is unknown"), ({"steps": 0}, "at least 1 step"),
                       ({"step_cache": 0}, "step_cache 0 must be")):
        with pytest.raises(UserError, match=match):
            sampler.generate(one, **{"steps": 1, **bad})


def test_bfloat16_runs_close_to_float32(vino, params, sampler):
    task = packed(EDIT, 12, image_guidance=2.0)
    halved = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    half, full = Sampler(Vino(vino.config, Runtime(dtype="bfloat16")), halved).generate(task, steps=2), sampler.generate(task, steps=2)
    assert half.latents.dtype == np.float32
    assert np.sqrt(np.mean((half.latents - full.latents) ** 2)) < SAMPLE_BF16_RMS * np.sqrt(np.mean(full.latents ** 2))


MESHES = [{"seq": 2}, {"seq": 4}, {"seq": 8}, {"tensor": 2}, {"fsdp": 8}, {"fsdp": 2, "seq": 2, "tensor": 2}]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_a_mesh_gives_the_same_result(sizes, vino, params, sampler):
    """Three branches, two of them in one pass, so that rows have to be filled up; the weights lie over the mesh."""
    task = packed(EDIT, 11, image_guidance=2.0)
    mesh, rules = make_mesh(sizes, jax.devices()[:np.prod(list(sizes.values()))]), preset(SAMPLING_PRESET)
    placed = jax.device_put(params, shardings(vino.abstract, vino.axes, mesh, rules))
    spread = Sampler(vino, placed, mesh=mesh, rules=rules).generate(task, steps=2)
    alone = sampler.generate(task, steps=2)
    assert np.abs(spread.latents - alone.latents).max() < SAMPLE_MESH_ABS * max(1.0, np.abs(alone.latents).max())
    assert np.abs(spread.pixels.astype(int) - alone.pixels).max() <= 1
    assert (spread.pixels != alone.pixels).mean() < 0.01  # where a value lies at the edge of a grey level


def test_step_caching_is_the_same_in_stretches_and_on_a_mesh(vino, params, sampler, monkeypatch):
    """It is off the result without by more than rounding, and by less than the change that it tells."""
    task, told = packed(EDIT, 15), []
    full, cached = (sampler.generate(task, steps=12, step_cache=every) for every in (1, 2))
    assert 1e-4 < np.linalg.norm(cached.latents - full.latents) / np.linalg.norm(full.latents) < cached.change and full.change == 0
    monkeypatch.setattr(sampler, "_tell", told.append)
    stretches = sampler.generate(task, steps=12, step_cache=2)
    assert [now.step for now in told] == [0, 4, 8]  # the blocks run at the start of each stretch, and once more
    mesh, rules = make_mesh({"fsdp": 2, "seq": 2}, jax.devices()[:4]), preset(SAMPLING_PRESET)
    placed = jax.device_put(params, shardings(vino.abstract, vino.axes, mesh, rules))
    spread = Sampler(vino, placed, mesh=mesh, rules=rules).generate(task, steps=12, step_cache=2)
    for other in (stretches, spread):
        assert np.abs(other.latents - cached.latents).max() < SAMPLE_MESH_ABS * max(1.0, np.abs(cached.latents).max())
        assert 0 < other.change <= cached.change * 1.001


def test_branches_give_the_same_in_passes_of_their_own(sampler, monkeypatch):
    """As the third is, without the padding that one pass needs; also where tasks run side by side."""
    tasks = [packed(EDIT, seed, image_guidance=2.0) for seed in (13, 14)]
    shorter = [dataclasses.replace(task, branches=(*task.branches[:2], without_first(task.branches[2]))) for task in tasks]
    results = {}
    for passes in (((0, 1, 2),), ((0, 1), (2,)), ((0, 2), (1,)), ((2,), (1,), (0,))):
        monkeypatch.setattr(pipeline, "choose", lambda *_, passes=passes, **__: passes)
        results[passes] = sampler.generate_many(shorter, steps=2, batch=2)
    first, *others = results.values()
    padded = sampler.generate_many(tasks, steps=2, batch=2)
    for other in [*others, padded]:
        for one, two in zip(first, other, strict=True):
            assert np.abs(one.latents - two.latents).max() < BATCH_ROW_ABS * max(1.0, np.abs(one.latents).max())


def without_first(branch):
    """A branch whose first reference, which is padding, is not there at all."""
    assert (branch.role[:, :8] == ROLE_PAD).all()
    return branch.replace(role=branch.role[:, 8:], source=branch.source[:, 8:], position=branch.position[:, 8:])


def test_equal_prompts_are_conditioned_once(vino, params, monkeypatch):
    counted = Sampler(vino, params)
    calls, condition = [], counted._condition
    monkeypatch.setattr(counted, "_condition", lambda *args: calls.append(1) or condition(*args))
    one = packed(PICTURE, 21)
    two = dataclasses.replace(packed(PICTURE, 22), branches=(packed(PICTURE, 22).branches[0], one.branches[1]))
    together = counted.generate_many([one, two], steps=1, batch=2)
    assert len(calls) == 3
    counted.generate_many([two], steps=1)
    assert len(calls) == 3
    counted.params = jax.tree.map(lambda x: 2 * x, params)  # other parameters: nothing that was computed holds
    changed = counted.generate_many([two], steps=1)
    assert len(calls) == 5 and np.abs(changed[0].latents - together[1].latents).max() > 1e-3


def test_progress_is_told_and_changes_nothing(vino, params, sampler):
    told, task = [], packed(PICTURE, 23)
    result = Sampler(vino, params, tell=told.append).generate(task, steps=25)
    assert [one.step for one in told] == list(range(0, 25, 2)) and {(one.tasks, one.steps) for one in told} == {(("task23",), 25)}
    assert np.array_equal(result.latents, sampler.generate(task, steps=25).latents)
