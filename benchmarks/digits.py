"""scikit-learn's handwritten digits as images of 64 x 64 pixels in memory, with a split that never changes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import TensorDataset

IMG_SIZE = 64  # pixels
CLASSES = 10
FOLD = 5  # of each class, in scikit-learn's order, every 5th image is for validation: 1442 for training, 355 kept out
MEAN, STD = 4.8943, 5.8847  # of the enlarged training images; scikit-learn's pixels go from 0 to 16


def validation_mask(targets: Tensor) -> Tensor:
    """targets [n] -> bool [n]: which images are kept out."""
    within_class = F.one_hot(targets, CLASSES).cumsum(0).gather(1, targets.unsqueeze(1)).squeeze(1)  # [n], from 1
    return within_class % FOLD == 0


def digits(img_size: int = IMG_SIZE) -> tuple[TensorDataset, TensorDataset]:
    """Training and validation data: images float32 [n, 3, img_size, img_size] of about zero mean and unit variance, all
    channels alike, enlarged from 8 x 8 pixels with bicubic interpolation; targets int64 [n]."""
    loaded = load_digits()
    pixels = torch.from_numpy(loaded.images).float().unsqueeze(1)  # [1797, 1, 8, 8]
    targets = torch.from_numpy(loaded.target).long()  # [1797]
    images = F.interpolate(pixels, size=(img_size, img_size), mode="bicubic", align_corners=False)
    images = ((images - MEAN) / STD).repeat(1, 3, 1, 1)  # [1797, 3, img_size, img_size]
    kept_out = validation_mask(targets)  # [1797]
    return TensorDataset(images[~kept_out], targets[~kept_out]), TensorDataset(images[kept_out], targets[kept_out])
