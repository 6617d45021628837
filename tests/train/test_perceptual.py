"""LPIPS against torchmetrics' own, on the heads that ship with it."""

from pathlib import Path

import pytest
import torch
import torchmetrics.functional.image.lpips as theirs
from safetensors.torch import save_file

from emu3.train.perceptual import alexnet, load_lpips, vgg16

HEADS = Path(theirs.__file__).parent / "lpips_models"


@pytest.mark.parametrize(("kind", "ours"), [("alex", alexnet), ("vgg", vgg16)])
def test_distances_and_gradients_are_those_of_torchmetrics(kind, ours, tmp_path, monkeypatch):
    """A random backbone under the released heads; ours comes through a file."""
    torch.manual_seed(0)
    backbone = ours().features
    heads = torch.load(HEADS / f"{kind}.pth", weights_only=True, map_location="cpu")
    tensors = {f"features.{name}": value for name, value in backbone.state_dict().items()}
    save_file({**tensors, **heads}, tmp_path / "lpips.safetensors")
    monkeypatch.setattr(
        theirs,
        "_get_tv_model_features",
        lambda *_: torch.nn.Sequential(*backbone, torch.nn.MaxPool2d(2)),
    )
    oracle = theirs._LPIPS(pretrained=True, net=kind, pnet_rand=True)
    real = torch.rand(2, 3, 64, 64) * 2 - 1
    results = []
    for network in (load_lpips(tmp_path / "lpips.safetensors"), oracle):
        reconstructed = torch.full_like(real, 0.1).requires_grad_()
        distance = network(reconstructed, real).flatten()
        (derivative,) = torch.autograd.grad(distance.sum(), reconstructed)
        results.append((distance.detach(), derivative))
    torch.testing.assert_close(results[0], results[1])


def test_equal_images_are_at_no_distance_and_have_a_slope():
    image = torch.zeros(1, 3, 64, 64, requires_grad=True)
    distance = alexnet()(image, image.detach())
    distance.sum().backward()
    assert distance.item() == 0
    assert image.grad.isfinite().all()


def test_a_file_of_something_else_is_refused(tmp_path):
    save_file({"features.0.weight": torch.zeros(8, 3, 5, 5)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="neither VGG16 nor AlexNet"):
        load_lpips(tmp_path / "x.safetensors")


def test_a_missing_head_is_refused(tmp_path):
    tensors = {f"features.{n}": v for n, v in alexnet().features.state_dict().items()}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"it lacks heads.0 and 4 more"):
        load_lpips(tmp_path / "x.safetensors")
