"""A row of the table that `keras-effnet doctor` prints."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Args:
        what: String, the name of what was checked.
        found: String, its version, number or state.
        verdict: `"ok"`, `"warning"`, `"problem"` (training does not start, or does not use the devices) or `"none"`
            (not installed or not present, and not needed).
        advice: String, what to do. Defaults to `""`.
    """

    what: str
    found: str
    verdict: str
    advice: str = ""
