"""What kind of CPU this is."""

import platform
from functools import cache
from pathlib import Path


@cache
def cpu_name() -> str:
    """The processor's name as it gives it itself; "unknown" where it does not."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
