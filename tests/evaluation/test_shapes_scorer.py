"""The scorer against the data: right on true renders, right on soft and noisy ones, at chance on shuffled ones."""
from collections import defaultdict

import numpy as np
import pytest
from scipy import ndimage

from data_pipelines import shapes, shapes_scene
from vino_jax.batch import TASKS
from vino_jax.evaluation import shapes as scorer

PICTURES = ("t2i", "ti2i", "ti2i_baseimg")


def draw(task, count, seed=11):
    return [shapes.sample(seed, i, task, 1 if task in PICTURES else 5, 64, 64) for i in range(count)]


def source_of(sample):
    if "edit" not in sample.expected:
        return None
    return sample.images[-1][None] if sample.video is None else sample.video


def degrade(pixels, rng):
    """About what a small VAE does: a slight blur and noise."""
    soft = ndimage.gaussian_filter(pixels.astype(np.float32), (0, .8, .8, 0)) + rng.normal(0, 8, pixels.shape)
    return np.clip(np.round(soft), 0, 255).astype(np.uint8)


def means(samples, outputs):
    found = defaultdict(list)
    for sample, output in zip(samples, outputs):
        for name, value in scorer.score(output, sample.expected).items():
            found[name].append(value)
    return {name: (float(np.mean(values)), len(values)) for name, values in found.items()}


@pytest.mark.parametrize("task", TASKS)
def test_truth_scores_right_and_so_does_what_a_vae_leaves_of_it(task):
    samples, rng = draw(task, 150 if task in PICTURES else 60), np.random.default_rng(0)
    clean = means(samples, [s.target for s in samples])
    soft = means(samples, [degrade(s.target, rng) for s in samples])
    assert clean and set(clean) == set(scorer.chance(samples[0].expected)) | {n for s in samples for n in scorer.chance(s.expected)}
    for name, (rate, count) in clean.items():
        assert rate > .97, (task, name, rate, count)
    for name, (rate, count) in soft.items():
        assert rate > .90, (task, name, rate, count)


def shuffled(samples):
    return [s.target for s in samples[1:] + samples[:1]]


def near(rate, count, chance):
    """Within four standard errors."""
    return abs(rate - chance) < 4 * np.sqrt(chance * (1 - chance) / count)


def test_pictures_of_other_prompts_score_at_chance():
    """Each attribute among the prompts that ask for it, so that other kinds of pictures do not pull it down."""
    samples = draw("t2i", 900)
    for name in ("colour", "shape", "count", "relation"):
        asked = [s for s in samples if name in s.expected and (name != "colour" or "count" not in s.expected)]
        rate, count = means(asked, shuffled(asked))[name]
        assert near(rate, count, scorer.CHANCE[name]), (name, rate, count)


def test_clips_of_other_prompts_score_at_chance_in_motion():
    samples = draw("t2v", 150)
    rate, count = means(samples, shuffled(samples))["motion"]
    assert near(rate, count, scorer.CHANCE["motion"]), rate


@pytest.mark.parametrize("task", ["ti2i", "tv2v"])
def test_an_edit_that_copies_its_source_is_not_followed_and_one_of_another_prompt_is_no_better_than_chance(task):
    samples = draw(task, 140)
    copied, _ = means(samples, [source_of(s) for s in samples])["followed"]
    assert copied < .03
    other, count = means(samples, shuffled(samples))["followed"]
    guess = np.mean([scorer.chance(s.expected)["followed"] for s in samples])
    assert other < guess + 3 * np.sqrt(guess / count)


def test_preserved_is_the_psnr_outside_the_changed_region():
    rng = np.random.default_rng(1)
    for sample in draw("ti2i", 40):
        source = source_of(sample)
        assert scorer.score(sample.target, sample.expected, source)["preserved"] > 40
        assert scorer.preserved(source, sample.expected, source) == 60
        noisy = np.clip(sample.target.astype(float) + rng.choice([-10, 10], sample.target.shape), 0, 255).astype(np.uint8)
        assert scorer.preserved(noisy, sample.expected, source) == pytest.approx(20 * np.log10(255 / 10), abs=1.5)
        assert "preserved" not in scorer.score(sample.target, sample.expected)


def test_blank_and_noise_outputs_get_nothing():
    rng = np.random.default_rng(2)
    for sample in draw("t2i", 20) + draw("t2v", 10):
        assert not any(scorer.score(np.full_like(sample.target, 128), sample.expected).values())
        noise = rng.integers(0, 256, sample.target.shape, np.uint8)
        assert "relation" not in sample.expected or scorer.score(noise, sample.expected)["pair"] == 0
    removed = next(s for s in draw("ti2i", 60) if s.expected["edit"]["kind"] == "remove")
    assert scorer.score(np.full_like(removed.target, 128), removed.expected)["followed"] == 0


def test_the_scorer_and_the_data_speak_of_the_same_world():
    assert scorer.COLOURS == shapes_scene.COLOURS and scorer.BACKGROUNDS == shapes_scene.BACKGROUNDS
    assert scorer.SHAPES == shapes_scene.SHAPES
    colours = np.asarray(list(shapes_scene.COLOURS.values()), float)
    apart = np.linalg.norm(colours[:, None] - colours[None], axis=-1) + 1e3 * np.eye(len(colours))
    assert apart.min() > 75


def test_another_size_is_refused():
    sample = draw("t2i", 1)[0]
    with pytest.raises(ValueError, match="expected"):
        scorer.score(sample.target[:, :32], sample.expected)
