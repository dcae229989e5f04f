"""What a device could do at best: the images a second it would train on, did it nothing but multiply at its fastest.

The peak is measured and not looked up, in the same precision and process: the faster of one large matrix product and
one wide convolution. What a training step has to multiply is counted by PyTorch's own counter. Traffic to memory is not
counted, so a small network, whose layers do little with each number that they fetch, cannot come near its limit.
"""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

REPEATS = 5


def clock(device: torch.device) -> Callable[[], float]:
    """Seconds: of this process's own CPU time on a CPU, so that other jobs on the machine disturb it little; of the
    wall elsewhere, once all that was asked of the device is done."""
    if device.type == "cpu":
        return time.process_time

    def seconds() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return seconds


def training_flops(model: nn.Module, images: Tensor) -> float:
    """Floating-point operations (two a multiply-add) of one image's way forwards and backwards; images: float
    (N, 3, H, W), on the model's device."""
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(model(images), torch.zeros(len(images), dtype=torch.int64, device=images.device)).backward()
    model.zero_grad()
    return counter.get_total_flops() / len(images)


@torch.no_grad()
def peak(device: torch.device, precision: str, size: int | None = None) -> float:
    """The most floating-point operations a second that a product or a convolution reaches. size: of the product's
    square matrices; 1024 on a CPU, 8192 elsewhere unless given."""
    size = size or (1024 if device.type == "cpu" else 8192)
    channels, side = 64, 32
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    left, right = (torch.rand(size, size, device=device).to(kind) for _ in range(2))
    count = max(1, size // 32)
    maps = torch.rand(count, channels, side, side, device=device).to(kind, memory_format=torch.channels_last)
    kernel = torch.rand(channels, channels, 3, 3, device=device).to(kind, memory_format=torch.channels_last)
    works = ((lambda: left @ right, 2 * size ** 3),
             (lambda: F.conv2d(maps, kernel, padding=1), 2 * count * 9 * channels ** 2 * side ** 2))
    return max(operations / _least_seconds(work, clock(device)) for work, operations in works)


def _least_seconds(work: Callable[[], Tensor], seconds: Callable[[], float]) -> float:
    """Of several tries, after one that only warms up."""
    work()
    tries = []
    for _ in range(REPEATS):
        start = seconds()
        work()
        tries.append(seconds() - start)
    return max(min(tries), 1e-9)
