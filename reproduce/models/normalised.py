"""Networks that take images in [0, 1] and normalise them themselves, because those who train them normalise."""

from torch import Tensor, nn, tensor

Normalisation = tuple[tuple[float, float, float], tuple[float, float, float]]   # mean, standard deviation per channel

IDENTITY: Normalisation = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

# By data set, as BackdoorBench trains on it: get_dataset_normalization in utils/aggregate_block/
# dataset_and_transform_generate.py of SCLBD/BackdoorBench@f02e353; v1 has the same. Others: identity.
NORMALISATIONS: dict[str, Normalisation] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "gtsrb": IDENTITY,
    "tiny-imagenet": ((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
}


class Normalised(nn.Module):
    """Mean and deviation, (1, 3, 1, 1), follow the model to its device and into its copies. They are no weights: the
    state dict lacks them, so checkpoints made without them load strictly."""

    mean: Tensor
    deviation: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name, values in zip(("mean", "deviation"), IDENTITY, strict=True):
            self.register_buffer(name, tensor(values).view(1, 3, 1, 1), persistent=False)

    def set_normalisation(self, normalisation: Normalisation) -> None:
        for buffer, values in zip((self.mean, self.deviation), normalisation, strict=True):
            buffer.copy_(tensor(values).view(1, 3, 1, 1))

    def normalise_as(self, other: "Normalised") -> None:
        self.mean.copy_(other.mean)
        self.deviation.copy_(other.deviation)

    def normalise(self, images: Tensor) -> Tensor:
        """What the first layer sees of images in [0, 1], both (N, 3, H, W)."""
        return (images - self.mean) / self.deviation
