"""Whether the model hub can be reached."""

import socket
from functools import lru_cache
from urllib.parse import urlsplit


@lru_cache(maxsize=1)
def hub_answers() -> bool:
    """Asked before the hub's library is: without a network that tries again and again, for a minute."""
    from huggingface_hub import constants
    host = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((host.hostname, host.port or 443), timeout=5).close()
    except OSError:
        return False
    return True
