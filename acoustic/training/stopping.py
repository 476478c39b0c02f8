"""The signals that ask a run to stop."""

import contextlib
import ctypes
import os
import signal
import time

# Ctrl-C reaches a process twice where a launcher passes it on; a person who presses again means it.
SECONDS_TO_PASS_ON = 3.0


# Of Linux's prctl.h.
PR_SET_PDEATHSIG = 1


def stop_with_launcher() -> None:
    """`accelerate launch` of one process does not pass SIGTERM on: it ends, and the run would go on unseen."""
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "WORLD_SIZE" not in os.environ:
        with contextlib.suppress(OSError, AttributeError):  # not Linux
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class StopSignals:
    """While entered, SIGTERM (schedulers, spot machines) and SIGINT (Ctrl-C) are noted instead of ending the process.

    A second Ctrl-C, seconds later, ends it at once. What was there before is put back at the end.
    """

    def __init__(self):
        self.received: int | None = None
        self.since = 0.0
        self.previous: dict = {}

    def __enter__(self) -> "StopSignals":
        self.received = None
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self.previous[number] = signal.signal(number, self.note)
            except ValueError:  # not the main thread: whoever runs it there handles signals
                break
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}

    def note(self, number: int, frame) -> None:
        again = self.received is not None and time.monotonic() - self.since > SECONDS_TO_PASS_ON
        if number == signal.SIGINT and again:
            raise KeyboardInterrupt
        if self.received is None:
            self.received, self.since = number, time.monotonic()
