"""What can go wrong in the demonstration, told in one line each."""


class DemoError(Exception):
    """The demonstration cannot go on; the message says what to do about it."""
