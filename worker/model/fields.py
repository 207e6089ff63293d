"""Checked reading of config.json: every error is a CheckpointError that names the key.

Not pydantic, because a checkpoint's config has some forty keys that are not ours to know and two
spellings of those that are.
"""

from collections.abc import Mapping

from ..errors import CheckpointError


class Fields:
    """One JSON object; a reader's default stands in for a missing key."""

    def __init__(self, values: Mapping[str, object], place: str = "") -> None:
        self.values = values
        self.place = place

    def section(self, name: str) -> "Fields":
        """The object under `name`."""
        value = self.values.get(name)
        if not isinstance(value, dict):
            raise self.error(name, "must be an object")
        return Fields(value, f"{self.place}{name}.")

    def integer(self, name: str, default: int | None = None, minimum: int = 1) -> int:
        """An integer of at least `minimum`."""
        value = self.values.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise self.error(name, f"must be an integer of at least {minimum}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A number above 0."""
        value = self.values.get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise self.error(name, "must be a number above 0")
        return float(value)

    def optional_number(self, name: str) -> float | None:
        """A number above 0, or None where it is null or missing."""
        return None if self.values.get(name) is None else self.number(name)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.values.get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, "must be true or false")
        return value

    def error(self, name: str, rule: str) -> CheckpointError:
        """An error that names the key, the rule and the offending value."""
        value = self.values.get(name)
        return CheckpointError(f"config.json: {self.place}{name} {rule}, not {value!r}")
