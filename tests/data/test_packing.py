"""Rows and branches: shapes of the bucket, the time line, dropped references, sizes of what is generated."""
import dataclasses
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from PIL import Image

from data_pipelines import shapes
from data_pipelines.packing import (
    SamplingOptions,
    collate,
    output_size,
    pack_example,
    pack_row,
    pack_sample,
    pack_task,
    reference_sequence,
    token_grid,
)
from data_pipelines.prompts import Prompter
from data_pipelines.samples import Sample
from data_pipelines.tasks import NEGATIVE_IMAGE, NEGATIVE_VIDEO, Task
from tests.data.folders import SMALL_VLM
from tests.data.test_pixels import write_clip
from vino_jax.batch import ROLE_LATENT, ROLE_MARKER, TASKS, BucketSpec
from vino_jax.errors import UserError

BUCKET = BucketSpec("all", batch=2, frames=5, height=64, width=64, images=2, image_height=64, image_width=64, video_frames=5,
                    video_height=64, video_width=64, prompt_tokens=192, patches=4 * 4 * 4 + 2 * 16)


@pytest.fixture(scope="module")
def prompter():
    return Prompter(SMALL_VLM)


def grey(value, *size):
    return np.full((*size, 3), value, np.uint8)


def example(images=2, video=True, **changes):
    return dataclasses.replace(Sample("made", "tiv2v", grey(1, 5, 64, 64), {"instruction": "turn it blue"},
                                      tuple(grey(50 + i, 64, 64) for i in range(images)), grey(9, 5, 64, 64) if video else None), **changes)


def test_the_time_line_is_the_buckets():
    """Roles, positions and pool places agree with the random batch that the model is tested with."""
    fake = BUCKET.fake()
    grids = [token_grid(1, 64, 64)] * 2 + [token_grid(5, 64, 64)]
    role, source, position, start = reference_sequence(grids, [0, 16, 32], [3, 9, 15], [8, 14, 40])
    np.testing.assert_array_equal(role, fake.role[0])
    np.testing.assert_array_equal(position, fake.position[0])
    assert start == fake.target_start[0] == 3 + 3 + 4
    latent = role == ROLE_LATENT
    np.testing.assert_array_equal(source[latent], fake.source[0][latent])
    np.testing.assert_array_equal(source[latent], np.arange(BUCKET.pool_tokens))
    assert source[role == ROLE_MARKER].tolist() == [3, 8, 9, 14, 15, 40]
    assert position[role == ROLE_MARKER].tolist() == [[t, 0, 0] for t in (0, 2, 3, 5, 6, 9)]


@pytest.mark.parametrize("task", TASKS)
def test_every_task_of_shapes_packs_to_its_bucket(prompter, task):
    frames = 1 if task.endswith("2i") or task == "ti2i_baseimg" else 5
    sample = shapes.sample(3, 1, task, frames, 64, 64)
    images, videos = len(sample.images), int(sample.video is not None)
    image_side, video_side = 64 * bool(images), 64 * videos
    bucket = BucketSpec(task, batch=2, frames=frames, height=64, width=64, prompt_tokens=224, patches=16 * images + 64 * videos,
                        images=images, image_height=image_side, image_width=image_side, video_frames=frames * videos,
                        video_height=video_side, video_width=video_side)
    rows = [pack_sample(sample, text, bucket, prompter, index=i) for i, text in enumerate(sample.texts.values())]
    batch = collate((rows * 2)[:2])
    assert jax.tree.map(lambda x: (x.shape, x.dtype), batch) == jax.tree.map(lambda x: (x.shape, x.dtype), bucket.spec())
    assert (batch.shift == (5.0 if frames == 1 else 7.0)).all() and TASKS[batch.task[0]] == task
    assert (batch.role != 0).all()  # the bucket is just large enough
    assert len(rows) == 1 or rows[0]["prompt_mask"].sum() != rows[1]["prompt_mask"].sum()
    np.testing.assert_array_equal(batch.target[0], sample.target)
    for i, image in enumerate(sample.images):
        np.testing.assert_array_equal(batch.images[0, i], image)


def test_boundary_tokens_point_at_vision_markers(prompter):
    row = pack_sample(example(), "turn it blue", BUCKET, prompter)
    tokens = prompter.tokenizer.convert_ids_to_tokens(row["tokens"])
    assert [tokens[i] for i in row["source"][row["role"] == ROLE_MARKER]] == ["<|vision_start|>", "<|vision_end|>"] * 3
    used = row["visual_index"][row["visual_index"] >= 0]
    assert used.tolist() == list(range((row["patch_segment"] > 0).sum() // 4))


def test_dropped_images_are_absent(prompter):
    row = pack_sample(example(), "", BUCKET, prompter, drop_images=True)
    assert not row["images"].any() and (row["video"] == 9).all()
    assert (row["role"] == ROLE_LATENT).sum() == 32 and (row["role"] == ROLE_MARKER).sum() == 2
    assert row["source"][row["role"] == ROLE_LATENT].tolist() == list(range(32, 64))  # the video's place in the pool stays
    assert row["target_start"] == 4
    text = prompter.tokenizer.decode(row["tokens"][row["prompt_mask"]])
    assert "Image" not in text and "Video 1: " in text
    kept = pack_sample(example(base_image=True), "", BUCKET, prompter, drop_images=True)
    assert (kept["images"][0] == 51).all() and not kept["images"][1].any()  # the base image is the last one
    assert kept["target_start"] == 3 + 4 and "Image 1: " in prompter.tokenizer.decode(kept["tokens"])


def test_fewer_references_than_slots(prompter):
    row = pack_sample(example(images=1, video=False, task="ti2v"), "go", BUCKET, prompter)
    assert (row["images"][0] == 50).all() and not row["images"][1].any() and not row["video"].any()
    assert (row["role"] != 0).sum() == 16 + 2 and row["target_start"] == 3
    batch = collate([row, pack_sample(example(), "go", BUCKET, prompter)])
    assert jax.tree.map(lambda x: x.shape, batch) == jax.tree.map(lambda x: x.shape, BUCKET.spec())


def test_reference_images_are_letterboxed_onto_the_canvas(prompter):
    row = pack_sample(dataclasses.replace(example(), images=(grey(0, 32, 64),)), "go", BUCKET, prompter)
    assert (row["images"][0, 16:48] == 0).all() and (row["images"][0, :16] == 255).all()


@pytest.mark.parametrize("changes, bucket, message", [
    ({"images": (grey(0, 64, 64),) * 3}, {}, "3 reference images, there are 2 slots"),
    ({"target": grey(0, 1, 64, 64)}, {}, r"target is \(1, 64, 64, 3\)"),
    ({"video": grey(0, 9, 64, 64)}, {}, "reference video"),
    ({}, {"prompt_tokens": 40}, r"needs \d+ prompt tokens, there is room for 40"),
    ({}, {"patches": 64}, "needs 96 VLM patches, there is room for 64")])
def test_what_does_not_fit_is_named(prompter, changes, bucket, message):
    with pytest.raises(UserError, match=f"sample 'made' does not fit bucket 'all': .*{message}"):
        pack_sample(dataclasses.replace(example(), **changes), "go", dataclasses.replace(BUCKET, **bucket), prompter)


def test_rows_pack_alike_in_threads(prompter):
    with ThreadPoolExecutor(4) as pool:
        rows = list(pool.map(lambda i: pack_sample(example(), "turn it blue " * (i % 3), BUCKET, prompter), range(12)))
    for i, row in enumerate(rows):
        np.testing.assert_array_equal(row["tokens"], rows[i % 3]["tokens"])


def saved(tmp_path, *sizes):
    paths = []
    for i, size in enumerate(sizes):
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(grey(40 * i, *size)).save(paths[-1])
    return tuple(paths)


def test_branches_have_sizes_of_their_own_and_share_the_pool(prompter, tmp_path):
    task = Task("one", "tiv2v", "turn it blue", saved(tmp_path, (64, 64), (32, 64)), write_clip(tmp_path / "clip.mp4", 7))
    packed = pack_task(task, prompter, SamplingOptions(48, 80, 9, image_guidance=3.0, seed=5))
    assert (packed.frames, packed.height, packed.width) == (5, 48, 80)  # the clip's: 7 frames give 5
    assert [r.shape for r in packed.references] == [(1, 64, 64, 3), (1, 48, 96, 3), (5, 48, 80, 3)]
    assert (packed.guidance, packed.image_guidance, packed.shift, packed.seed) == (7.0, 3.0, 7.0, 5)
    positive, negative, no_image = packed.branches
    counts = [(b.tokens.shape[1], b.patches.shape[1], b.role.shape[1]) for b in packed.branches]
    assert all(size and size % 64 == 0 for branch in counts for size in branch)
    assert counts[0][1:] == counts[1][1:] and counts[2][1] < counts[1][1] and counts[2][2] < counts[1][2]  # the third lacks two pictures
    pool = sum(int(np.prod(token_grid(*r.shape[:3]))) for r in packed.references)
    assert positive.source[positive.role == ROLE_LATENT].tolist() == list(range(pool))
    assert no_image.source[no_image.role == ROLE_LATENT].tolist() == list(range(pool - 30, pool))
    assert no_image.position[no_image.role == ROLE_MARKER].tolist() == [[0, 0, 0], [3, 0, 0]]
    assert (positive.target_start[0], negative.target_start[0], no_image.target_start[0]) == (10, 10, 4)
    texts = [prompter.tokenizer.decode(b.tokens[0][b.prompt_mask[0]]) for b in packed.branches]
    assert "turn it blue" in texts[0] and NEGATIVE_VIDEO in texts[1] and NEGATIVE_VIDEO in texts[2]
    assert "Image 2: " in texts[1] and "Image" not in texts[2] and "Video 1: " in texts[2]


def test_a_base_image_stays_without_images(prompter, tmp_path):
    task = Task("one", "ti2i_baseimg", "put it on", saved(tmp_path, (64, 64), (64, 96)), base_image=True)
    packed = pack_task(task, prompter, SamplingOptions(64, 64, 85, image_guidance=2.0))
    assert (packed.frames, packed.height, packed.width) == packed.references[-1].shape[:3]
    last = int(np.prod(token_grid(*packed.references[-1].shape[:3])))
    no_image = packed.branches[2]
    assert no_image.source[no_image.role == ROLE_LATENT].tolist() == list(range(16, 16 + last))
    alone = dataclasses.replace(task, images=task.images[1:])
    with pytest.raises(UserError, match="task one: image guidance 2 has no image to leave out"):
        pack_task(alone, prompter, SamplingOptions(64, 64, 85, image_guidance=2.0))
    assert len(pack_task(alone, prompter, SamplingOptions(64, 64, 85)).branches) == 2


def test_text_alone_and_options(prompter):
    options = SamplingOptions(64, 96, 85, negative_prompt="ugly", guidance=2.0, shift=3.0)
    packed = pack_task(Task("a", "t2i", "a red circle"), prompter, options)
    assert (packed.frames, packed.height, packed.width) == (1, 64, 96)
    assert (packed.guidance, packed.shift, packed.prompt) == (2.0, 3.0, "a red circle")
    assert packed.branches[0].patches.shape == (1, 0, 1536) and packed.branches[0].role.shape == (1, 0) and packed.references == ()
    assert "ugly" in prompter.tokenizer.decode(packed.branches[1].tokens[0])
    default = pack_task(Task("a", "t2i", "a red circle"), prompter, SamplingOptions(64, 96))
    assert NEGATIVE_IMAGE in prompter.tokenizer.decode(default.branches[1].tokens[0])
    for options, message in ((SamplingOptions(60, 96), "multiples of 16"), (SamplingOptions(64, 96, 90), "4k.1"),
                             (SamplingOptions(64, 96, 93), "89")):
        with pytest.raises(UserError, match=f"task a: .*{message}"):
            pack_task(Task("a", "t2v", "x"), prompter, options)


@pytest.mark.parametrize("task, expected", [
    ("t2i", (1, 64, 96)), ("t2v", (9, 64, 96)), ("ti2v", (9, 64, 96)), ("i2v", (9, 32, 48)), ("ti2i", (1, 32, 48)),
    ("ti2i_baseimg", (1, 32, 48)), ("tv2v", (5, 80, 16)), ("tiv2v", (5, 80, 16))])
def test_output_size(task, expected):
    assert output_size(task, [grey(0, 16, 16), grey(0, 32, 48)], grey(0, 5, 80, 16), SamplingOptions(64, 96, 9)) == expected


def test_an_example_poses_its_task(prompter):
    sample = shapes.sample(0, 0, "tiv2v", 5, 64, 64)
    packed = pack_example(sample, "go", prompter, SamplingOptions(image_guidance=2.0))
    assert packed.index == sample.id and (packed.frames, packed.height, packed.width) == (5, 64, 64)
    assert [r.shape[0] for r in packed.references] == [1] * len(sample.images) + [5] and len(packed.branches) == 3


def test_a_row_refuses_wrong_references(prompter):
    with pytest.raises(ValueError):
        pack_row(prompter.encode("x"), [(1, 4, 4)], [0], (64, 0, 18), task="ti2i", shift=5.0)
