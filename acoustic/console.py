"""What the scripts say. The user's mistakes end a run with one line: what, where and what to do; never a traceback."""

import contextlib
import os
import sys


class UserError(ValueError):
    """Something that the user can mend. Its message is the whole of what is shown, on one line."""


@contextlib.contextmanager
def one_line_errors():
    """Print a `UserError` as one line on rank 0 and leave with exit code 2 on every rank."""
    try:
        yield
    except UserError as error:
        if is_main_process():
            # torch puts the traceback of a data worker in front of the message.
            message = str(error).rsplit(f"{UserError.__name__}: ", 1)[-1]
            print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """One line for a person to read, once however many processes run; a name that isn't UTF-8 is shown escaped."""
    if is_main_process():
        print(text.encode("utf-8", "backslashreplace").decode("utf-8"), flush=True)
