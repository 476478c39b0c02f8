"""Where answers go: lines of JSON, each whole or not there at all, and label files."""

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from tqdm.auto import tqdm

from acoustic.console import UserError
from acoustic.data.spans import Span, label_file_stem, write_audacity


@contextlib.contextmanager
def lines(output: str | None, overwrite: bool) -> Iterator[Callable[[dict], None]]:
    """write(answer), at once: into the file, or to the standard output.

    Raises:
        UserError: the file can't be written, or is there already.
    """
    if output is None:
        yield write_to_stdout
        return
    path = Path(output)
    was_there = path.exists()
    try:
        # Unbuffered, so a line is one call to the system: a process that is killed leaves whole lines. What is to be
        # replaced stays until there is something to replace it by.
        file = open(path, "ab" if overwrite else "xb", buffering=0)
    except FileExistsError:
        raise UserError(f"output: {output!r} is there already; --overwrite replaces it") from None
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"output: can't write to {output!r}: {error.strerror}") from None
    written = 0

    def write(answer: dict) -> None:
        nonlocal written
        if not written and was_there and path.is_file():
            file.truncate(0)
            file.seek(0)
        write_line(file, answer)
        written += 1

    with file:
        yield write
    if not written and not was_there:
        path.unlink(missing_ok=True)


def write_to_stdout(answer: dict) -> None:
    try:
        with tqdm.external_write_mode(file=sys.stdout):  # the bar is on the same terminal
            sys.stdout.buffer.write(to_line(answer))
            sys.stdout.flush()
    except BrokenPipeError:  # `head` has enough
        # The interpreter's own last flush would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None


def write_line(file, answer: dict) -> None:
    """All of it, or nothing where the disk is full."""
    line, start = to_line(answer), file.tell() if file.seekable() else None
    try:
        written = 0
        while written < len(line):
            written += file.write(line[written:])
    except OSError:
        if start is not None:
            os.ftruncate(file.fileno(), start)
        raise


def to_line(answer: dict) -> bytes:
    """A file's name that is not UTF-8 becomes an escape of JSON's, which gives it back when it is read."""
    return (json.dumps(answer, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


class LabelFiles:
    """NAME.txt of each recording in one folder, which Audacity imports as a label track.

    Raises:
        UserError: the folder can't be written, or has label files already, which may be someone's work.
    """

    def __init__(self, folder: str, overwrite: bool):
        self.folder, self.taken = Path(folder), set()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"audacity: can't write to {folder!r}: {error.strerror}") from None
        if not overwrite and (there := sorted(self.folder.glob("*.txt"))):
            raise UserError(f"audacity: {folder!r} has {there[0].name!r} already; --overwrite replaces what is there")

    def write(self, name: str, spans: list[Span]) -> None:
        write_audacity(self.folder / f"{label_file_stem(name, self.taken)}.txt", spans)
