"""Official PyTorch networks for parity tests: importable without a GPU build, with weights that exercise every term."""

import importlib.util
import os
import warnings
from pathlib import Path

# transformers would look for newer files on the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from skimage import data

_spec = importlib.util.spec_from_file_location("torch_vision", Path(__file__).with_name("torch_vision.py"))
_torch_vision = importlib.util.module_from_spec(_spec)  # kept: see there
_spec.loader.exec_module(_torch_vision)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def randomised(network: torch.nn.Module, seed: int = 0, scale: float = 0.2) -> torch.nn.Module:
    """Draws every parameter, also those that initialisation leaves at 0 or 1, around where it is."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            centre = 1.0 if parameter.ndim == 1 and bool((parameter == 1).all()) else 0.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + centre)
    return network.eval()


def channels_first(images) -> torch.Tensor:
    """Images (B, h, w, 3) of NumPy as (B, 3, h, w)."""
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def relative_error(ours, theirs: torch.Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    ours, theirs = np.asarray(ours, np.float64), theirs.detach().double().numpy()
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def photographs(height: int, width: int) -> np.ndarray:
    """Three windows (3, height, width, 3) uint8 of a photograph of a face."""
    photograph = data.astronaut()
    return np.stack(
        [photograph[top : top + height, left : left + width] for top, left in ((10, 120), (60, 150), (200, 40))]
    )
