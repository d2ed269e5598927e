"""Passwords stay out of whatever is written down or shown."""

import re

_CREDENTIALS = re.compile(r"""(?<=://)[^/\s"]+(?=@)""")  # a password may hold an apostrophe


def masked(text: str) -> str:
    """The text with `user:password` of every URI in it replaced by `***`."""
    return _CREDENTIALS.sub("***", text)
