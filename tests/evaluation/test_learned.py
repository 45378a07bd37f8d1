"""Metrics with weights, on tiny random ones of the same calling convention; and the Fréchet distance against closed forms."""
import builtins
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.linalg import sqrtm
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizerFast

from tests.evaluation.scripts import I3d, save
from vino_jax.errors import UserError
from vino_jax.evaluation.frechet import Moments, distance, frechet_distance
from vino_jax.evaluation.learned import LEARNED

RNG = np.random.default_rng(0)


def pictures(*shape):
    return np.random.default_rng(3).integers(0, 256, (*shape, 3), np.uint8)


# --- Fréchet distance ---


def random_covariance(size, rank=None):
    x = RNG.normal(size=(rank or 2 * size, size))
    return x.T @ x / len(x)


def test_frechet_of_diagonal_gaussians_is_the_closed_form():
    mean_a, mean_b, var_a, var_b = (RNG.uniform(0.1, 3, 12) for _ in range(4))
    wanted = ((mean_a - mean_b) ** 2).sum() + ((np.sqrt(var_a) - np.sqrt(var_b)) ** 2).sum()
    assert frechet_distance(mean_a, np.diag(var_a), mean_b, np.diag(var_b)) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("rank", [None, 5])
def test_frechet_is_the_formula_with_a_matrix_root(rank):
    a, b, mean_a, mean_b = random_covariance(20), random_covariance(20, rank), RNG.normal(size=20), RNG.normal(size=20)
    root = sqrtm(a @ b)
    wanted = ((mean_a - mean_b) ** 2).sum() + np.trace(a + b - 2 * np.real(root))
    assert frechet_distance(mean_a, a, mean_b, b) == pytest.approx(wanted, rel=1e-6)
    assert frechet_distance(mean_b, b, mean_a, a) == pytest.approx(wanted, rel=1e-6)


def test_frechet_of_a_set_with_itself_is_zero_even_where_singular():
    for rank in (None, 3):
        a, mean = random_covariance(40, rank), RNG.normal(size=40)
        assert 0 <= frechet_distance(mean, a, mean, a) < 1e-6 * np.trace(a)
        assert frechet_distance(mean, a, mean + 2, a) == pytest.approx(160, rel=1e-6)


def test_moments_by_batches_are_those_of_all_at_once():
    x = RNG.normal(size=(101, 7)) * np.geomspace(1e-3, 1e3, 7) + 1e5  # a mean that drowns the variance in sums of raw squares
    moments = Moments()
    for batch in np.split(x, (1, 2, 40, 40, 77)):
        moments.add(batch)
    assert moments.count == 101
    np.testing.assert_allclose(moments.mean_D, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.covariance(), np.cov(x, rowvar=False), rtol=1e-5, atol=1e-12)


def test_moments_refuse_what_they_cannot_take():
    moments = Moments()
    moments.add(np.ones((1, 3)))
    with pytest.raises(ValueError, match="two samples or more, there are 1"):
        moments.covariance()
    with pytest.raises(ValueError, match="do not go with 3"):
        moments.add(np.ones((2, 4)))
    with pytest.raises(ValueError, match="not finite"):
        moments.add(np.array([[1, np.nan, 2]]))
    assert moments.count == 1


def test_too_few_samples_are_told():
    a, b = Moments(), Moments()
    a.add(RNG.normal(size=(8, 8)))
    b.add(RNG.normal(size=(9, 8)))
    value, notes = distance(a, b)
    assert value == frechet_distance(a.mean_D, a.covariance(), b.mean_D, b.covariance())
    assert notes == ["rank-deficient outputs: 8 samples for 8 features; too large, and compares only with sets of this size"]
    a.add(RNG.normal(size=(1, 8)))
    assert distance(a, b)[1] == []


# --- CLIP ---


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A CLIP of 2 layers a tower with random weights, and a tokenizer of letters, as transformers saves them."""
    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(c) for c in range(97, 123)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(c + "</w>" for c in letters)]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)
    torch.manual_seed(0)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    model = CLIPModel(CLIPConfig(text_config={**tower, **ends, "vocab_size": len(words), "max_position_embeddings": 16},
                                 vision_config={**tower, "image_size": 32, "patch_size": 8}, projection_dim=24))
    model.save_pretrained(folder)
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPProcessor(CLIPImageProcessor(**sizes), tokenizer).save_pretrained(folder)
    return folder


def clip_by_hand(folder, frames, caption):
    """Through transformers' CLIPProcessor and CLIPModel.forward, whose logits are the cosines times a scale."""
    model, processor = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)
    with torch.no_grad():
        out = model(**processor(text=[caption], images=list(frames), return_tensors="pt", truncation=True, max_length=16))
    return (100 * out.logits_per_image[:, 0] / model.logit_scale.exp()).detach().numpy()


def test_clip_is_transformers_cosine_times_100(clip_folder, tmp_path):
    frames = pictures(20, 40, 56)  # more than one batch
    turned = tmp_path / "turned"  # the same with every cosine's sign turned
    shutil.copytree(clip_folder, turned)
    model = CLIPModel.from_pretrained(clip_folder)
    model.text_projection.weight.data.neg_()
    model.save_pretrained(turned)
    wanted = clip_by_hand(clip_folder, frames, "a cat")
    assert (np.abs(wanted) > 1).any()
    for folder, values in ((clip_folder, wanted), (turned, -wanted)):
        score = LEARNED["clip"].open(folder)
        assert score(frames, "a cat") == pytest.approx(values.clip(0).mean(), abs=1e-4)
        assert score(frames[3], "a cat") == pytest.approx(values[3].clip(0), abs=1e-4)
        assert score.notes() == []


def test_clip_tells_of_captions_that_are_too_long(clip_folder):
    score, frames = LEARNED["clip"].open(clip_folder), pictures(1, 32, 32)
    value = score(frames, "a b c d e f g h i j k l m n o p q r s")
    assert value == pytest.approx(max(0, clip_by_hand(clip_folder, frames, "a b c d e f g h i j k l m n o p q r s")[0]), abs=1e-4)
    score(frames, "a b c d e f g h i j k l m n")  # 14 and two ends: just fits
    assert score.notes() == ["1 of 2 captions were cut at the model's 16 tokens"]


def test_half_a_clip_is_not_filled_with_random_values(clip_folder, tmp_path):
    half = tmp_path / "half"
    shutil.copytree(clip_folder, half)
    weights = {k: v for k, v in load_file(half / "model.safetensors").items() if not k.startswith("vision_model")}
    save_file(weights, half / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"half is no whole CLIP model: \d+ tensors are missing, such as vision_model\."):
        LEARNED["clip"].open(half)


def test_a_folder_that_is_no_clip(tmp_path):
    with pytest.raises(UserError, match="is no CLIP model that transformers reads"):
        LEARNED["clip"].open(tmp_path)


# --- TorchScript files, of the same signatures ---


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    return save(tmp_path_factory.mktemp("scripts"))


def test_lpips_is_the_squared_distance_of_its_features(scripts):
    score = LEARNED["lpips"].open(scripts / "lpips.pt")
    a, b = pictures(1, 20, 24)[0], pictures(2, 20, 24)[1]

    def features(p):  # channels first
        return np.concatenate([p.mean((0, 1)) / 255, p[0, :5, 0] / 510])

    wanted = ((features(a) - features(b)) ** 2).sum()
    assert score(a, b) == pytest.approx(wanted, rel=1e-5) and score(a, a) == 0
    assert score(np.stack([a, a]), np.stack([b, a])) == pytest.approx(wanted / 2, rel=1e-5)  # a clip: the mean over its frames
    with pytest.raises(ValueError):
        score(a, b[:10])


def test_features_of_pictures_and_clips(scripts):
    picture, clip = pictures(1, 32, 32), pictures(6, 24, 40)
    fid = LEARNED["fid"].open(scripts / "fid.pt")(picture)
    assert fid.shape == (1, 2048) and fid.dtype == np.float64
    np.testing.assert_allclose(fid[0], (picture[0] / 255).transpose(2, 0, 1).ravel()[:2048], rtol=1e-6)
    with torch.no_grad():
        wanted = I3d(400)(torch.from_numpy(clip).permute(3, 0, 1, 2)[None], True, True, True)
    np.testing.assert_allclose(LEARNED["fvd"].open(scripts / "fvd.pt")(clip), wanted.numpy(), rtol=1e-6)


def test_the_wrong_script_is_told(scripts, tmp_path):
    with pytest.raises(UserError, match=r"fid.pt failed; is it the right file\?"):
        LEARNED["lpips"].open(scripts / "fid.pt")(pictures(1, 8, 8)[0], pictures(1, 8, 8)[0])
    with pytest.raises(UserError, match=r"fid.pt failed; is it the right file\?"):
        LEARNED["fvd"].open(scripts / "fid.pt")(pictures(2, 8, 8))

    class Narrow(torch.nn.Module):
        def forward(self, img: torch.Tensor, return_features: bool = False) -> torch.Tensor:
            return img.flatten(1)[:, :1000].float()

    torch.jit.script(Narrow()).save(str(tmp_path / "narrow.pt"))
    with pytest.raises(UserError, match=r"narrow.pt gives features of shape \(1, 1000\), \(1, 2048\) are needed"):
        LEARNED["fid"].open(tmp_path / "narrow.pt")(pictures(1, 32, 32))


@pytest.mark.parametrize("name", ["lpips", "fid", "fvd"])
def test_a_file_that_is_no_torchscript(name, tmp_path):
    (tmp_path / "words.pt").write_text("no weights at all")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "plain.pt")
    for file in ("words.pt", "plain.pt"):
        with pytest.raises(UserError, match=f"{file} is no TorchScript file") as told:
            LEARNED[name].open(tmp_path / file)
        assert "\n" not in str(told.value)


# --- what is absent ---


@pytest.mark.parametrize("name", LEARNED)
def test_an_absent_path_is_told_with_what_it_should_hold(name, tmp_path):
    with pytest.raises(UserError, match="no weights were given: ") as told:
        LEARNED[name].open(None)
    assert LEARNED[name].weights in str(told.value)
    with pytest.raises(UserError, match="there is no (file|folder) .*nowhere; needed is ") as told:
        LEARNED[name].open(tmp_path / "nowhere")
    assert LEARNED[name].weights in str(told.value)


@pytest.mark.parametrize("name", LEARNED)
def test_without_pytorch_it_says_what_to_install(name, tmp_path, scripts, monkeypatch):
    real = builtins.__import__

    def without_torch(module, *arguments):
        if module.split(".")[0] == "torch":
            raise ModuleNotFoundError("No module named 'torch'")
        return real(module, *arguments)

    monkeypatch.setattr(builtins, "__import__", without_torch)
    with pytest.raises(UserError, match=r"PyTorch is not installed.*pip install 'torch>=2.6'"):
        LEARNED[name].open(tmp_path if LEARNED[name].folder else scripts / "fid.pt")


def test_a_device_that_is_not_there(scripts):
    with pytest.raises(UserError, match="cannot use the device 'abacus'"):
        LEARNED["fid"].open(scripts / "fid.pt", "abacus")
