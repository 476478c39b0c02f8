"""A DataLoader over a stream whose place can be saved, and entered again at the very next batch."""

import gc
import multiprocessing
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator

import torch
from torch.utils.data import DataLoader

from acoustic.console import ShareError
from acoustic.data.batches import BatchStream

# A worker may be killed where memory is short for a moment; after so many times it is short for good.
MAX_RESTARTS, BATCHES_TO_FORGET = 5, 100

# Workers share the plan and the list of files. Python 3.14 would start them anew, and pickle both.
FORK = "fork" if "fork" in multiprocessing.get_all_start_methods() else None


class StreamLoader:
    """The stream's batches as they are, decoded by workers; "state" is taken out of them and kept.

    A worker is ahead of what was handed out by the batches that it has ready. Each batch brings the state after it, so
    what is saved is the place of the last batch that was handed out, whatever the workers did since.
    """

    def __init__(self, stream: BatchStream, num_workers: int = 0, pin_memory: bool = False):
        self.stream, self.num_workers = stream, num_workers
        self.pin_memory = pin_memory and torch.cuda.is_available()
        self.states: list[dict | None] = [None] * max(num_workers, 1)
        self.turn = 0

    def __iter__(self) -> Iterator[dict]:
        restarts = 0
        while True:
            try:
                for number, batch in enumerate(self.enter()):
                    restarts = 0 if number >= BATCHES_TO_FORGET else restarts
                    yield batch
                return
            except RuntimeError as error:
                if not (died := re.search(r"DataLoader worker.*(exited unexpectedly|killed by signal)", str(error))):
                    raise
                restarts += 1
                if restarts > MAX_RESTARTS:
                    raise ShareError(
                        f"dataloader_num_workers: data workers died {restarts} times ({died[0]}); where memory is "
                        "short, use fewer of them or a lower --batch_seconds, and continue with "
                        "--resume_from_checkpoint true --ignore_data_skip true"
                    ) from None
                # They had decoded ahead; what was handed out is known, so nothing is lost or heard twice.
                print(
                    f"warning: {died[0]}; the data workers start anew at the same place ({restarts} of {MAX_RESTARTS} "
                    "times)",
                    file=sys.stderr,
                    flush=True,
                )

    def enter(self) -> Iterator[dict]:
        """The batches after the last one that was handed out, from new workers."""
        self.stream.starts, self.stream.turn = list(self.states), self.turn
        loader = DataLoader(
            self.stream,
            batch_size=None,
            collate_fn=as_it_is,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            prefetch_factor=4 if self.num_workers else None,
            # Its own, or starting the workers would draw a number from the one that dropout uses.
            generator=torch.Generator(),
            multiprocessing_context=FORK if self.num_workers else None,
            worker_init_fn=freeze,
        )
        batches = without_interruption(lambda: iter(loader))
        while (batch := take(batches)) is not None:
            # The DataLoader takes from its workers in turn.
            self.states[self.turn] = batch.pop("state")
            self.turn = (self.turn + 1) % len(self.states)
            yield batch

    def state_dict(self) -> dict:
        """A JSON value; what `load_state_dict` needs to go on after the last batch that was handed out."""
        return {**self.identity(), "turn": self.turn, "workers": self.states}

    def identity(self) -> dict:
        """What must be the same for a saved place to mean the same place."""
        return {
            "processes": self.stream.world_size,
            "num_workers": self.num_workers,
            "batch_seconds": self.stream.batch_seconds,
            "seed": self.stream.seed,
            "window_lengths": list(getattr(self.stream.plan, "lengths", [])),
            # Not where it lies: on another machine that is elsewhere. Other audio is warned of, see batches.py.
            "data": [f"{rows.fingerprint()}, weight {w:g}" for rows, w in self.stream.sources],
        }

    def load_state_dict(self, state: dict) -> None:
        """Before iterating.

        Raises:
            ShareError: the place was saved with another division of the audio, or of other audio.
        """
        for name, value in self.identity().items():
            if state.get(name) != value:
                raise ShareError(
                    f"resume_from_checkpoint: the place in the audio was saved with {name} {shown(state.get(name))}, "
                    f"now it is {shown(value)}; run as before, or with --ignore_data_skip true to begin the audio anew"
                )
        self.turn, self.states = state["turn"], list(state["workers"])


def take(batches: Iterator[dict]) -> dict | None:
    """The next one. A worker that was killed while it handed a batch over shows as a broken connection."""
    try:
        return next(batches, None)
    except (EOFError, ConnectionError, FileNotFoundError) as error:
        if str(error).startswith("Caught "):  # the worker's own, which lives
            raise
        raise RuntimeError("DataLoader worker exited unexpectedly, as it handed a batch over") from error


def without_interruption(start: Callable):
    """torch's handler of a worker's death raises in whatever the process does then, in the middle of an update, say.

    Without it the death is met where the next batch is asked for, within 5 s.
    """
    if threading.current_thread() is not threading.main_thread():
        return start()
    handler = signal.getsignal(signal.SIGCHLD)
    started = start()
    if getattr(handler, "__module__", "").startswith("torch."):  # another DataLoader of this process left it
        handler = signal.SIG_DFL
    signal.signal(signal.SIGCHLD, handler)
    return started


def shown(value) -> str:
    return " + ".join(map(str, value)) if isinstance(value, list) else str(value)


def freeze(worker: int) -> None:
    """What came with the fork is shared memory until something writes to it, and a garbage collection would."""
    gc.freeze()


def as_it_is(batch: dict) -> dict:
    """In the place of torch's conversion, which makes lists of tuples and tensors of numbers."""
    return batch
