"""Images per CPU-second of each stage, against the usual way and against the NAD authors' own code."""

import os

# As run_all.sh does, and before torch reads it; it speeds up every side.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
