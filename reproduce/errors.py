"""The one exception a user may cause: its message is one line saying what is wrong and what to do."""


class UserError(Exception):
    """Bad argument, file or configuration. The command line prints the message and exits with 2."""
