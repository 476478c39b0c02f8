"""Checkpoints that are whole or not there: written aside, flushed to the disk, renamed last.

A process can be killed at any moment, and a disk can fill. So a checkpoint is written to _incomplete-checkpoint-N;
when all of its files are on the disk, complete.json names each with its size and checksum; and the name checkpoint-N
comes last, by a rename, which happens or doesn't. What has that name is still checked before a run goes on from it:
disks and copies fail, too.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import zlib
from pathlib import Path

MANIFEST = "complete.json"
# The Trainer pushes nothing to the Hub whose name begins so.
INCOMPLETE, DAMAGED = "_incomplete-", "_damaged-"
CHUNK = 2**22


def folder_of(output_dir: str, update: int) -> Path:
    return Path(output_dir, f"checkpoint-{update}")


def update_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def recorded_update(checkpoint: Path) -> int:
    """What is written in it, whatever its name."""
    return json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]


def staging_of(checkpoint: Path) -> Path:
    return checkpoint.with_name(INCOMPLETE + checkpoint.name)


def checkpoints(output_dir: str) -> list[Path]:
    """All that have the name of one, the oldest first."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in folders if path.is_dir()), key=update_of)


def remove_leftovers(output_dir: str) -> None:
    """What a killed process was writing, or deleting."""
    for path in Path(output_dir).glob(f"{INCOMPLETE}checkpoint-*"):
        shutil.rmtree(path, ignore_errors=True)


def publish(checkpoint: Path) -> None:
    """Give a checkpoint that was written aside its name.

    Raises:
        OSError: the disk is full, say; then nothing has that name.
    """
    staging = staging_of(checkpoint)
    files = {}
    for path in sorted(path for path in staging.rglob("*") if path.is_file()):
        flush(path)
        files[path.relative_to(staging).as_posix()] = [path.stat().st_size, checksum(path)]
    (staging / MANIFEST).write_text(json.dumps({"files": files}, indent=1) + "\n")
    flush(staging / MANIFEST)
    for folder in {path.parent for path in staging.rglob("*")}:
        flush(folder)
    staging.rename(checkpoint)
    with contextlib.suppress(OSError):  # it has its name, whatever becomes of that in a power cut
        flush(checkpoint.parent)


def flush(path: Path) -> None:
    """To the disk: a rename may otherwise reach it before the content does."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some mounted file systems can't flush a folder
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def checksum(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            value = zlib.crc32(chunk, value)
    return value


def what_is_wrong(checkpoint: Path) -> str | None:
    """Why a run can't go on from a checkpoint, in words; None where it is whole."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError):
        return f"no {MANIFEST}, which is written last"
    for name, (size, expected) in files.items():
        path = checkpoint / name
        try:
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size:,} of {size:,} bytes"
            if checksum(path) != expected:
                return f"{name} is not what was written"
        except OSError as error:
            return f"{name}: {error.strerror}"
    return None


def newest_whole(output_dir: str) -> tuple[Path | None, dict[Path, str]]:
    """(the newest checkpoint that is whole, what is wrong with each newer one)."""
    wrong = {}
    for checkpoint in reversed(checkpoints(output_dir)):
        problem = what_is_wrong(checkpoint)
        if problem is None:
            return checkpoint, wrong
        wrong[checkpoint] = problem
    return None, wrong


def remove(checkpoint: Path) -> None:
    """Its name first, so that no half of it is ever taken for a checkpoint."""
    shutil.rmtree(staging_of(checkpoint), ignore_errors=True)
    checkpoint.rename(staging_of(checkpoint))
    shutil.rmtree(staging_of(checkpoint), ignore_errors=True)


def set_aside(checkpoint: Path) -> Path:
    """Rename one that isn't whole: its name will be needed, and there may be something to save in it."""
    aside = checkpoint.with_name(DAMAGED + checkpoint.name)
    shutil.rmtree(aside, ignore_errors=True)
    return checkpoint.rename(aside)


def keep_newest(output_dir: str, limit: int | None, best: str | None = None) -> None:
    """Delete the oldest beyond `limit`; neither the best nor the newest, which was just written whole."""
    if not limit or limit < 0:
        return
    newest_first = checkpoints(output_dir)[::-1]
    protected = newest_first[:1] + [path for path in newest_first[1:] if best and path == Path(best)]
    others = [path for path in newest_first if path not in protected]
    for checkpoint in others[max(limit - len(protected), 0) :]:
        remove(checkpoint)
