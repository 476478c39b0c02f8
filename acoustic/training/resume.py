"""Where a run goes on from, and the care that no run is overwritten by mistake."""

import contextlib
import fcntl
import json
import os
import socket
import time
from pathlib import Path

from acoustic.console import NothingToDo, ShareError, UserError, say
from acoustic.training import checkpoint as files
from acoustic.training import pushing
from acoustic.training.exchange import found_by_first

# A run that was told to stop may still be saving when the one that continues it starts.
MAX_SECONDS_TO_WAIT, SECONDS_BETWEEN_LOOKS = 600, 1
# File systems of several machines show each other's changes after a while.
SECONDS_TO_BE_SEEN = 60
# Of the lock; it is the system's, and goes with the process.
LOCK = "_lock"
# What task anomaly leaves. A model beside it would never be heard.
DETECTOR = "anomaly_detector.json"
HELD: dict[str, int] = {}


def find_checkpoint(args) -> str | None:
    """The checkpoint to resume from, checked to be whole; the first process looks, for all.

    `true` means the newest in output_dir; so does `auto`, but where there is none yet it means to start anew. `hub`
    means the one that hub_model_id holds.

    Raises:
        UserError: there is none to resume from, or output_dir holds a run that would be overwritten.
    """
    mark = found_by_first(args.world_size, args.process_index, lambda: claim(args.output_dir))
    refuse_separate_folders(args, mark)
    return found_by_first(args.world_size, args.process_index, lambda: find(args))


def find(args) -> str | None:
    if Path(args.output_dir, DETECTOR).exists():
        raise UserError(f"output_dir: {args.output_dir!r} holds an anomaly detector; give a folder of its own")
    wanted = str(args.resume_from_checkpoint or "false")
    if wanted.lower() == "false":
        if (there := files.checkpoints(args.output_dir)) and not args.overwrite_output_dir:
            raise UserError(
                f"output_dir: {args.output_dir!r} already holds {there[-1].name}; --resume_from_checkpoint true "
                "to continue it, --overwrite_output_dir true to write over it, or give another output_dir"
            )
        return None
    if wanted.lower() in ("true", "auto"):
        chosen = choose_newest(args.output_dir, must_be=wanted.lower() == "true")
    elif wanted.lower() == "hub":
        chosen = pushing.fetch(args.hub_model_id, args.output_dir)
    else:
        chosen = Path(wanted)
        if problem := files.what_is_wrong(chosen):
            raise UserError(f"resume_from_checkpoint: {wanted!r} is not a whole checkpoint: {problem}")
    if chosen is not None:
        refuse_to_fork(args, chosen)
        say(f"resuming from {chosen}")
    return str(chosen) if chosen else None


def choose_newest(output_dir: str, must_be: bool) -> Path | None:
    newest, wrong = files.newest_whole(output_dir)
    for checkpoint, problem in wrong.items():
        say(f"warning: {checkpoint.name} is passed over, it is not whole: {problem}")
    if newest is None and must_be:
        raise UserError(
            f"resume_from_checkpoint: no whole checkpoint in {output_dir!r}; with 'auto' in place of 'true' a run "
            "starts anew where there is none"
        )
    if newest is None:
        say(f"no checkpoint in {output_dir} yet: a new run")
    return newest


def refuse_to_fork(args, chosen: Path) -> None:
    """Checkpoints after the chosen one would be taken for this run's own the next time."""
    if chosen.parent.resolve() != Path(args.output_dir).resolve() or args.overwrite_output_dir:
        return
    later = [path for path in files.checkpoints(args.output_dir) if files.update_of(path) > files.update_of(chosen)]
    if whole := [path for path in later if files.what_is_wrong(path) is None]:
        raise UserError(
            f"output_dir: {args.output_dir!r} holds {whole[-1].name}, which is later than {chosen.name}; give another "
            "output_dir, or --overwrite_output_dir true to drop what came after"
        )


def refuse_separate_folders(args, mark: str | None) -> None:
    """A checkpoint has a part of each process.

    Raises:
        ShareError: this process, on another machine, has an output_dir of its own.
    """
    path = Path(args.output_dir, LOCK)
    for _ in range(SECONDS_TO_BE_SEEN if mark else 0):
        with contextlib.suppress(OSError):
            if args.process_index == 0 or path.read_text() == mark:
                return
        time.sleep(1)
    if mark:
        raise ShareError(
            f"output_dir: process {args.process_index + 1} (on {socket.gethostname()}) doesn't see in "
            f"{args.output_dir!r} what the first one wrote there; it must be one folder that all machines share"
        )


def claim(output_dir: str) -> str | None:
    """Keep the folder for this process, as long as it lives. Returns what it wrote into it.

    Raises:
        UserError: another process goes on working in it.
    """
    mark = f"{socket.gethostname()} {os.getpid()}"
    if output_dir in HELD:
        return mark
    try:
        lock = os.open(Path(output_dir, LOCK), os.O_RDWR | os.O_CREAT, 0o644)
    except OSError:  # what can't be written at all is said where it is written
        return None
    for second in range(0, MAX_SECONDS_TO_WAIT, SECONDS_BETWEEN_LOOKS):
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            if second == 0:
                say(f"another run is working in {output_dir}: waiting for it to end")
            time.sleep(SECONDS_BETWEEN_LOOKS)
            continue
        except OSError:  # a file system without locks
            pass
        HELD[output_dir] = lock
        # Through this descriptor: the system gives up the lock where any other of the file is closed.
        os.ftruncate(lock, 0)
        os.pwrite(lock, mark.encode(), 0)
        return mark
    os.close(lock)
    raise UserError(f"output_dir: another run has been working in {output_dir!r} for ten minutes; give another one")


def make_room(args, checkpoint: str | None) -> None:
    """Just before training, when all else is known to be right: an old run's checkpoints must not be a new run's.

    Raises:
        UserError: the run to resume is at its end (with `auto`, `NothingToDo`).
    """
    found_by_first(args.world_size, args.process_index, lambda: clear_up(args, checkpoint))


def clear_up(args, checkpoint: str | None) -> None:
    files.remove_leftovers(args.output_dir)
    begun = -1
    if checkpoint is not None:
        done = files.recorded_update(Path(checkpoint))
        if is_finished(args, checkpoint, done):
            if str(args.resume_from_checkpoint).lower() == "auto":
                raise NothingToDo(f"nothing left to do: {args.output_dir} has made its {done} updates and its report")
            raise UserError(f"max_steps: {checkpoint!r} has made its {done} updates; raise max_steps to go on")
        if Path(checkpoint).parent.resolve() == Path(args.output_dir).resolve():
            begun = files.update_of(Path(checkpoint))
    for old in files.checkpoints(args.output_dir):
        if files.update_of(old) > begun:
            if args.overwrite_output_dir:
                files.remove(old)
            else:  # not whole, or this run would have been refused
                say(f"{old.name} is kept as {files.set_aside(old).name}")


def is_finished(args, checkpoint: str, updates: int) -> bool:
    """All updates made, and the results of this run written; a run that was killed between the two goes on."""
    if updates < args.max_steps:
        return False
    results = Path(args.output_dir, "all_results.json")
    with contextlib.suppress(OSError):
        return results.stat().st_mtime >= Path(checkpoint, files.MANIFEST).stat().st_mtime
    return False


def refuse_another_kind(checkpoint: str, sharded: bool, model_type: str) -> None:
    """
    Raises:
        UserError: it is of another objective; or it was saved by a run under FSDP and this one is not, or the other
            way round.
    """
    config = Path(checkpoint, "config.json")
    saved = json.loads(config.read_text())["model_type"] if config.is_file() else model_type
    if saved != model_type:
        raise UserError(
            f"resume_from_checkpoint: {checkpoint!r} is of a {saved} model, and this run trains {model_type}; give it "
            "an output_dir of its own"
        )
    was_sharded = any(Path(checkpoint).glob("*_fsdp*"))
    if was_sharded != sharded:
        saved, now = ("FSDP", "DDP or one process")[:: 1 if was_sharded else -1]
        raise UserError(
            f"resume_from_checkpoint: {checkpoint!r} was saved under {saved}, and this run is under {now}; run as "
            f"before, or begin anew from its weights with --model_name_or_path {checkpoint}"
        )


def stream_file(checkpoint: str, process: int) -> Path:
    return Path(checkpoint, f"stream_{process}.json")


def save_stream_state(checkpoint: str, process: int, state: dict) -> None:
    """A process's place in the audio: a few hundred bytes for each of its workers."""
    stream_file(checkpoint, process).write_text(json.dumps(state) + "\n")


def load_stream_state(checkpoint: str, process: int) -> dict:
    """
    Raises:
        ShareError: the checkpoint holds no place in the audio for this process.
    """
    path = stream_file(checkpoint, process)
    if not path.is_file():
        saved = len(list(Path(checkpoint).glob("stream_*.json")))
        raise ShareError(
            f"resume_from_checkpoint: {checkpoint!r} holds the place in the audio of {saved} processes, and this is "
            f"number {process + 1}; run as many, or with --ignore_data_skip true to begin the audio anew"
        )
    return json.loads(path.read_text())
