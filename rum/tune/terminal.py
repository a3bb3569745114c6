"""Lines for people while a search runs: on stderr, since stdout is for what it found."""

import sys


def say(line: str) -> None:
    """Writes a line at once."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
