"""The one error that is meant for the person at the keyboard."""

import re
from collections.abc import Sequence
from difflib import get_close_matches


class SegFitError(Exception):
    """What is wrong, where, and what to do about it: printed without a traceback.

    `problems` is one message, or all that were found; each names the file, key or value at fault.
    """

    def __init__(self, problems: str | Sequence[str], exit_code: int = 2) -> None:
        self.exit_code = exit_code
        problems = [problems] if isinstance(problems, str) else problems
        self.problems = [printable(problem) for problem in problems]
        super().__init__("\n".join(self.problems))


def raise_all(problems: Sequence[str]) -> None:
    """Raise a SegFitError with all problems, if there are any."""
    if problems:
        raise SegFitError(problems)


def printable(text: str) -> str:
    """Return text that can be encoded: Python has lone surrogates for bytes of file names that are no UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()


def quoted(text: object) -> str:
    """Return text in quotes such that Hydra's override grammar gives back the same text.

    Source: https://hydra.cc/docs/1.3/advanced/override_grammar/basic/
    """
    # A backslash escapes only in front of a quote, or of another such backslash.
    escaped = re.sub(r"(\\*)('|$)", lambda at: 2 * at[1] + "\\'" * bool(at[2]), f"{text}")
    return f"'{escaped}'"


def nearest(word: str, known: Sequence[str]) -> str:
    """Return " Did you mean 'x'?" for the closest of `known`, or "" when none is close."""
    close = get_close_matches(word, known, n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""
