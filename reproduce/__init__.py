"""The bench and the driver."""

import os

# Huge pages for large tensors: copying a data set becomes several times faster. Read by torch when it first allocates.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
