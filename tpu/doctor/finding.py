"""A row of the table that `keras-effnet doctor` prints."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Args:
        what: String, its name.
        found: String: its version, number or state.
        verdict: `"ok"`, `"warning"`, `"problem"` (training does not start, or not on what is there) or `"none"` (it is
            not here and need not be).
        advice: String, what to do. Defaults to `""`.
    """

    what: str
    found: str
    verdict: str
    advice: str = ""
