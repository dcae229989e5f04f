"""VGG-19 with BatchNorm (Simonyan & Zisserman, ICLR 2015), as BackdoorBench uses it: torchvision's, on small images.

On 32x32 images the five poolings leave one pixel, which torchvision's adaptive pooling repeats 7 x 7 times for three
linear layers of 4,096, 4,096 and num_classes. Names and initialisation are torchvision's. Departure: the normalisation
that BackdoorBench's data loader does is part of the network (`Normalised`).
"""

from torch import Tensor

from reproduce.models.normalised import Normalised


class VGG19BN(Normalised):
    """(N, 3, H, W) in [0, 1] -> (N, num_classes). With 10 classes it has 139,622,218 parameters."""

    taps = ("features.12", "features.25", "features.38", "features.51")     # before the second to the fifth pooling
    penultimate = "classifier.3"

    def __init__(self, num_classes: int) -> None:
        from torchvision.models import vgg19_bn  # three seconds to import, and rarely needed
        super().__init__()
        network = vgg19_bn(num_classes=num_classes)
        self.features, self.avgpool, self.classifier = network.features, network.avgpool, network.classifier

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(self.normalise(x))).flatten(1))
