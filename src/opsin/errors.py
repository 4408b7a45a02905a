"""Every error that a user can cause, in plain words.

The command line prints the sentence alone and exits with code 2; Python raises it. A sentence names the file, name or
option, says what is wrong, and says what to do.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class OpsinError(Exception):
    """Something that the user can put right. `str(error)` is one sentence for them."""

    exit_code = 2


class UnknownName(OpsinError):
    """A name that is not in the catalogue, with the nearest names that are."""

    def __init__(self, what: str, name: str, known: Iterable[str]):
        near = get_close_matches(name, list(known), n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else "`opsin list` shows what there is."
        super().__init__(f"there is no {what} called '{name}'; {hint}")
        self.near = near


class BadInput(OpsinError):
    """A file, folder, option or array that cannot be used as it is."""


class MissingExtra(OpsinError):
    """An optional package that the call needs is not installed."""

    def __init__(self, package: str, extra: str):
        super().__init__(f"this needs the package '{package}'; install it with: pip install 'opsin[{extra}]'")


class MissingData(OpsinError):
    """A named data set that is not on this machine."""


class TrainingFailed(OpsinError):
    """Training stopped for a reason that the user can act on (a loss that is not a number, a full disk)."""
