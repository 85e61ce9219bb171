"""Text of the user's on a terminal that may lack its characters."""

import io
import sys


def escape_what_cannot_be_printed() -> None:
    """Let print write a character that standard output's encoding lacks as an escape, \\u4e26, instead of raising.

    A sample, a file's name or a run's may hold any: a terminal of another encoding must not end a run that is done.
    Standard error escapes by itself.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # not what a test or a notebook put in its place
        sys.stdout.reconfigure(errors="backslashreplace")
