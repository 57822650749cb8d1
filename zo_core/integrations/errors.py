"""The error of a run of the command line. All of ``integrations`` can import this file, as it imports nothing itself."""


class RunError(RuntimeError):
    """A run that cannot start or go on; the message says what to do."""


def first_line(error: BaseException) -> str:
    """First line of an error's message, without a full stop."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".:; ")
