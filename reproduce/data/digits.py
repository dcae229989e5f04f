"""The embedded data set: scikit-learn's 1,797 handwritten digits, 8x8 grey, enlarged to 32x32x3.

It needs no file and no network. It is a stand-in to show that everything runs, not a benchmark.
"""

import torch
import torch.nn.functional as F
from sklearn import datasets

from reproduce.data import Dataset
from reproduce.rng import generator

TEST_SHARE = 0.2


def load_digits() -> Dataset:
    """1,438 training and 359 test images; the split is fixed."""
    bunch = datasets.load_digits()
    grey = torch.from_numpy(bunch.images).float()[:, None] / 16
    large = F.interpolate(grey, size=32, mode="bilinear", align_corners=False)
    images = (large * 255).round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
    labels = torch.from_numpy(bunch.target).long()
    order = torch.randperm(len(images), generator=generator(0, "digits-split"))
    cut = int(TEST_SHARE * len(order))
    test, train = order[:cut], order[cut:]
    return Dataset("digits", images[train], labels[train], images[test], labels[test], tuple("0123456789"))
