"""The one exception a user may cause: its message is one line saying what is wrong and what to do."""

from typing import Any


class UserError(Exception):
    """Bad argument, file or configuration. The command line prints the message and exits with 2; before it, `found`,
    what was found out all the same."""

    def __init__(self, message: str, found: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.found = found
