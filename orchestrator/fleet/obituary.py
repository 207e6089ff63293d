"""From what Ray says of an actor's death to one line that a person can read. Pure."""

import re

from .plan import Observation, Phase

_MODULE = re.compile(r"^([a-z_]+\.)+(?=[A-Z])")
"""Of an exception's class, as the last line of a traceback gives it."""
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def obituary(message: str) -> Observation:
    """What is left of a dead actor: whether it ever lived, and why it died, in one line."""
    lines = [line.strip() for line in _COLOURS.sub("", message).splitlines() if line.strip()]
    reason = _MODULE.sub("", lines[-1]) if lines else "it died"
    if "creation task" in message:
        return Observation(Phase.FAILED, reason=reason)
    return Observation(Phase.ABSENT, reason=reason)
