"""What the scripts say. The user's mistakes end a run with one line: what, where and what to do; never a traceback."""

import contextlib
import difflib
import errno
import os
import sys
from functools import lru_cache


class UserError(ValueError):
    """Something that the user can mend. Its message is the whole of what is shown, on one line."""


class ShareError(UserError):
    """One that a single process meets, in its share of the audio; so that process says it, whichever it is."""


class NothingToDo(UserError):
    """The run is at its end, and was only to go on if it wasn't. Exit code 0."""


class RunError(RuntimeError):
    """What ended a run that was begun rightly, in one line: what, where and how to go on. Exit code 1."""

    told = False


class Interrupted(Exception):
    """A signal asked the run to stop, and it did: with a checkpoint, or saying why there is none.

    Args:
        number: of the signal; the exit code is 128 more, which schedulers and shells know.
    """

    told = False

    def __init__(self, number: int, text: str):
        super().__init__(text)
        self.number = number


LOST_PROCESS = (
    "another process of this run ended; its own message says why, and --resume_from_checkpoint true continues from "
    "the newest checkpoint"
)
# What gloo and NCCL say of it.
SIGNS_OF_A_LOST_PROCESS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "ncclRemoteError",
    "Remote process exited",
)


@contextlib.contextmanager
def one_line_errors():
    """Print a `UserError` as one line, once however many processes meet it, and leave with exit code 2 on all."""
    try:
        yield
        end_process_group()
    except NothingToDo as reason:
        end_process_group()
        say(str(reason))
    except UserError as error:
        if is_main_process() or isinstance(error, ShareError):
            # torch puts the traceback of a data worker in front of the message.
            message = str(error).rsplit(f"{type(error).__name__}: ", 1)[-1]
            print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
        sys.exit(2)
    except RunError as error:
        tell(error)
        sys.exit(1)
    except RuntimeError as error:
        if not any(sign in str(error) for sign in SIGNS_OF_A_LOST_PROCESS):
            raise
        print(f"error: {LOST_PROCESS}", file=sys.stderr, flush=True)
        sys.exit(1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f": {error.filename}" if error.filename else ""
        print(f"error: {error.strerror}{where}; make room, and start again", file=sys.stderr, flush=True)
        sys.exit(1)
    except Interrupted as stop:
        tell(stop)
        end_process_group()
        sys.exit(128 + stop.number)
    except KeyboardInterrupt:
        sys.exit(130)


def did_you_mean(word: str, known) -> str:
    """The end of a message, or nothing: what a mistyped word was probably meant to be."""
    near = difflib.get_close_matches(word, sorted(known), 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def did_you_mean_path(path: str) -> str:
    """The same for a path of this machine: of what lies beside it."""
    folder = os.path.dirname(path.rstrip("/"))
    with contextlib.suppress(OSError):
        return did_you_mean(path.rstrip("/"), [os.path.join(folder, entry) for entry in os.listdir(folder or ".")])
    return ""


@lru_cache
def say_asking_the_hub(name: str) -> None:
    """Before a name is asked of the Hub, which takes half a minute to fail where there is no network. Once."""
    if not os.path.exists(name):
        say(f"{name!r} is nothing on this machine: looking for it on the Hub")


def tell(error: RunError | Interrupted) -> None:
    """Once, whoever is first to."""
    if not error.told:
        error.told = True
        if isinstance(error, Interrupted):
            say(str(error))
        else:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)


def end_process_group() -> None:
    """Its threads, ended with the interpreter, can abort a process that has done all of its work."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """One line for a person to read, once however many processes run; a name that isn't UTF-8 is shown escaped."""
    if is_main_process():
        print(text.encode("utf-8", "backslashreplace").decode("utf-8"), flush=True)
