"""Where a run goes on from, and the care that no run is overwritten by mistake."""

import json
import shutil
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from acoustic.console import ShareError, UserError, is_main_process, say


def find_checkpoint(args) -> str | None:
    """The checkpoint to resume from: `true` means the newest in output_dir.

    Raises:
        UserError: there is none to resume from, or output_dir holds a run that would be overwritten.
    """
    wanted = args.resume_from_checkpoint
    newest = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
    if wanted is None or str(wanted).lower() == "false":
        if newest and not args.overwrite_output_dir:
            raise UserError(
                f"output_dir: {args.output_dir!r} already holds {Path(newest).name}; --resume_from_checkpoint true "
                "to continue it, --overwrite_output_dir true to write over it, or give another output_dir"
            )
        return None
    checkpoint = newest if str(wanted).lower() == "true" else wanted
    if checkpoint is None or not Path(checkpoint, "trainer_state.json").is_file():
        raise UserError(f"resume_from_checkpoint: no checkpoint in {checkpoint or args.output_dir!r}")
    say(f"resuming from {checkpoint}")
    return checkpoint


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


def make_room(args, checkpoint: str | None) -> None:
    """Just before training, when all else is known to be right: an old run's checkpoints must not be a new run's.

    Raises:
        UserError: the run to resume has made all of its updates.
    """
    if checkpoint is not None:
        done = json.loads(Path(checkpoint, "trainer_state.json").read_text())["global_step"]
        if done >= args.max_steps:
            raise UserError(f"max_steps: {checkpoint!r} has made its {done} updates; raise max_steps to go on")
    elif is_main_process():
        for folder in Path(args.output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
            shutil.rmtree(folder)
