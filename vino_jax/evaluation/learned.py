"""Metrics that need weights: CLIP, LPIPS, FID, FVD. One entry of LEARNED each.

The weights come from a local path that the user gives; nothing is fetched. PyTorch runs them and is imported here alone, and only when one of
these metrics is opened: it is no dependency of the library (`pip install -e '.[metrics]'`). LPIPS, FID and FVD are read from the TorchScript
files that their fields compare by, which bring network, scaling and weights in one file: no network is written again here.
"""
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vino_jax.errors import UserError

_BATCH = 16  # frames in one pass of CLIP


@dataclass(frozen=True)
class Learned:
    """A metric with weights; needs, media and better as Metric's.

    features 0: what `open` gives takes an output and what `needs` names, and gives a number. Else: it takes one picture (1, H, W, 3) or
    clip (F, H, W, 3), uint8, and gives so many features (1, D) float64; the number is the Fréchet distance of two sets of them.
    folder: the path is one. weights: what it holds and where that comes from, for messages. opener: called with the path and the device, and
    with `features` where there are some.
    """

    needs: str
    media: str
    better: str
    features: int
    folder: bool
    weights: str
    opener: Callable[..., Callable[..., Any]]

    def open(self, path: Path | None, device: str = "cpu") -> Callable[..., Any]:
        """The score, with its weights loaded. path: of `weights`; device: as PyTorch calls it. Raises UserError where the path is not
        given or not there, PyTorch is not installed, or what lies there cannot be loaded."""
        if path is None:
            raise UserError(f"no weights were given: {self.weights}")
        if not (path.is_dir() if self.folder else path.is_file()):
            raise UserError(f"there is no {'folder' if self.folder else 'file'} {path}; needed is {self.weights}")
        torch = _torch()
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:  # the latter of a build without CUDA
            raise UserError(f"PyTorch cannot use the device {device!r}: {str(error).splitlines()[0]}") from None
        return self.opener(path, device, *([self.features] if self.features else []))


def _torch():
    try:
        import torch
    except ImportError:
        raise UserError("PyTorch is not installed, which CLIP, LPIPS, FID and FVD run in: pip install 'torch>=2.6'") from None
    return torch


# --- text and picture ---


class _Clip:
    """CLIPScore as torchmetrics reports it: 100 x cosine of picture and caption, not below 0; of a clip, the mean over its frames."""

    def __init__(self, folder: Path, device: str):
        from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

        try:
            model, loading = CLIPModel.from_pretrained(folder, local_files_only=True, output_loading_info=True)
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self._processor = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # whatever transformers makes of a damaged folder
            raise UserError(f"{folder} is no CLIP model that transformers reads: {error}") from None
        if lost := sorted(loading["missing_keys"]):  # which transformers fills with random values
            raise UserError(f"{folder} is no whole CLIP model: {len(lost)} tensors are missing, such as {lost[0]}")
        self._model, self._device = model.to(device).eval(), device
        self._longest, self._cut, self._seen = model.config.text_config.max_position_embeddings, 0, 0

    def __call__(self, output: np.ndarray, caption: str) -> float:
        torch = _torch()
        frames = output if output.ndim == 4 else output[None]
        self._seen += 1
        self._cut += len(self._tokenizer(caption, verbose=False)["input_ids"]) > self._longest
        with torch.inference_mode():
            words = self._tokenizer([caption], truncation=True, max_length=self._longest, return_tensors="pt").to(self._device)
            text = torch.nn.functional.normalize(self._model.get_text_features(**words), dim=-1)[0]
            cosines = []
            for start in range(0, len(frames), _BATCH):
                seen = self._processor(list(frames[start:start + _BATCH]), input_data_format="channels_last", return_tensors="pt")
                features = self._model.get_image_features(seen["pixel_values"].to(self._device))
                cosines.append(torch.nn.functional.normalize(features, dim=-1) @ text)
            return float((100 * torch.cat(cosines)).clamp_min(0).double().mean())

    def notes(self) -> list[str]:
        """What is to be said of the scores given so far."""
        return [f"{self._cut} of {self._seen} captions were cut at the model's {self._longest} tokens"] if self._cut else []


# --- TorchScript ---


def _load_script(path: Path, device: str):
    try:
        return _torch().jit.load(str(path), map_location=device).eval()
    except (RuntimeError, ValueError, OSError) as error:
        told = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{path} is no TorchScript file (a .pkl or a plain checkpoint of the same network is none): {told[0]}") from None


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """An error within the script as one line that names the file."""
    try:
        with _torch().inference_mode():
            yield
    except (RuntimeError, _torch().jit.Error) as error:  # its last line says what, those before where in the script
        raise UserError(f"{path} failed; is it the right file? {str(error).strip().splitlines()[-1]}") from None


def _open_lpips(path: Path, device: str) -> Callable[[np.ndarray, np.ndarray], float]:
    torch, script = _torch(), _load_script(path, device)

    def score(output: np.ndarray, reference: np.ndarray) -> float:
        if output.shape != reference.shape:
            raise ValueError(f"two pictures or clips of one shape are needed, got {output.shape} and {reference.shape}")
        distances = []
        for pair in zip(output.reshape(-1, *output.shape[-3:]), reference.reshape(-1, *reference.shape[-3:])):
            with _told(path):
                seen = torch.from_numpy(np.stack(pair)).to(device).permute(0, 3, 1, 2).float()  # in 0..255
                features = script(seen, resize_images=False, return_lpips=True)
                distances.append(float((features[0] - features[1]).square().sum().double()))
        return float(np.mean(distances))

    return score


def _feature_opener(arrange: Sequence[int], add_batch: bool, **arguments: bool):
    """An opener of a script that makes features of uint8 pixels whose dims are ordered by `arrange`."""
    def open_features(path: Path, device: str, width: int) -> Callable[[np.ndarray], np.ndarray]:
        torch, script = _torch(), _load_script(path, device)

        def features(pixels_FHWC: np.ndarray) -> np.ndarray:
            with _told(path):
                seen = torch.from_numpy(np.array(pixels_FHWC)).to(device).permute(*arrange).contiguous()
                found = script(seen[None] if add_batch else seen, **arguments).double().cpu().numpy()
            if found.shape != (1, width):
                raise UserError(f"{path} gives features of shape {found.shape}, (1, {width}) are needed; is it the right file?")
            return found

        return features

    return open_features


LEARNED: dict[str, Learned] = {
    "clip": Learned("caption", "any", "higher", features=0, folder=True, opener=_Clip,
                    weights="a folder as transformers' CLIPModel and CLIPProcessor save it, such as openai/clip-vit-large-patch14"),
    "lpips": Learned("reference", "any", "lower", features=0, folder=False, opener=_open_lpips,
                     weights="vgg16.pt of NVlabs/stylegan2-ada-pytorch, a TorchScript file"),
    "fid": Learned("reference", "picture", "lower", features=2048, folder=False,
                   opener=_feature_opener((0, 3, 1, 2), False, return_features=True),
                   weights="inception-2015-12-05.pt of NVlabs/stylegan2-ada-pytorch, a TorchScript file"),
    "fvd": Learned("reference", "clip", "lower", features=400, folder=False,
                   opener=_feature_opener((3, 0, 1, 2), True, rescale=True, resize=True, return_features=True),
                   weights="i3d_torchscript.pt of universome/stylegan-v, a TorchScript file"),
}
