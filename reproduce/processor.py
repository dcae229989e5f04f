"""What kind of CPU this is, and that a GPU computes the same again."""

import os
import platform
from functools import cache
from pathlib import Path

import torch


def repeatable(device: torch.device) -> None:
    """On a GPU from now on: of an operation's kernels the one that gives the same bits every time, where there is one,
    and float32 in convolutions too, which would otherwise round their inputs to 10 bits (TF32). A CPU does both
    anyway."""
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")     # read when cuBLAS starts
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False     # a search for faults, which costs time
        torch.backends.cudnn.allow_tf32 = False


@cache
def cpu_name() -> str:
    """The processor's name as it gives it itself; "unknown" where it does not."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
