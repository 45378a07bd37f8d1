"""Tiny TorchScript modules that are called as the files of LPIPS, FID and FVD are."""
from pathlib import Path

import torch


class Vgg(torch.nn.Module):
    """As vgg16.pt is called: pixels in 0..255, features whose squared distance is LPIPS."""

    def forward(self, img: torch.Tensor, resize_images: bool = True, return_lpips: bool = False) -> torch.Tensor:
        if resize_images or not return_lpips:
            raise RuntimeError("not what LPIPS is")
        return torch.cat([img.mean(dim=[2, 3]) / 255, img.flatten(1)[:, :5] / 510], dim=1)


class Inception(torch.nn.Module):
    """As inception-2015-12-05.pt is called."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, img: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        if img.dtype != torch.uint8 or not return_features:
            raise RuntimeError("uint8 and features are wanted")
        return torch.nn.functional.interpolate(img.float(), size=[32, 32]).flatten(1)[:, :self.width] / 255


class I3d(torch.nn.Module):
    """As i3d_torchscript.pt is called: (batch, 3, frames, height, width)."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, x: torch.Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False) -> torch.Tensor:
        if x.dim() != 5 or x.shape[1] != 3 or not (rescale and resize and return_features):
            raise RuntimeError("a batch of clips, rescaled and resized, is wanted")
        return torch.nn.functional.interpolate(x.float() / 127.5 - 1, size=[2, 10, 20]).flatten(1)[:, :self.width]


class NotANumber(torch.nn.Module):
    """LPIPS gone wrong."""

    def forward(self, img: torch.Tensor, resize_images: bool = True, return_lpips: bool = False) -> torch.Tensor:
        return img.flatten(1) * float("nan")


def save(folder: Path, fid: int = 2048, fvd: int = 400) -> Path:
    """lpips.pt, fid.pt and fvd.pt with so many features, nan.pt."""
    for name, module in (("lpips", Vgg()), ("fid", Inception(fid)), ("fvd", I3d(fvd)), ("nan", NotANumber())):
        torch.jit.script(module).save(str(folder / f"{name}.pt"))
    return folder
