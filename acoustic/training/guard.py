"""When a run saves beside its schedule, and when it stops before its last update: on all processes at the same one."""

import signal
import time

from transformers import TrainerCallback

from acoustic.console import Interrupted, say
from acoustic.training.exchange import Exchange
from acoustic.training.stopping import StopSignals

# After a checkpoint that could not be written; the run goes on meanwhile.
RETRY_SECONDS = 60.0


class Guard(TrainerCallback):
    """
    Args:
        memory: counts batches that did not fit (`faults.OutOfMemory`).
        watch: judges what is logged (`health.HealthWatch`), or None.
    """

    def __init__(self, args, exchange: Exchange, memory, watch=None):
        self.args, self.exchange, self.memory, self.watch = args, exchange, memory, watch
        self.signals = StopSignals()
        self.reason: str | None = None  # why the run stopped before its last update
        self.stopped_by: int | None = None
        self.retry, self.last_save = False, time.monotonic()

    def on_train_begin(self, args, state, control, **kwargs):
        self.last_save = time.monotonic()
        for entry in state.log_history if self.watch else []:
            self.watch.see(entry)

    def on_step_end(self, args, state, control, **kwargs):
        """The first process's clock decides about saving, anyone's troubles about stopping."""
        asked, due, full = self.exchange.totals(
            self.signals.received is not None, self.is_save_due(), self.memory.too_often
        )
        if due:
            control.should_save = True
        if asked:
            self.stopped_by = self.signals.received or signal.SIGTERM
            self.stop(control, f"stopped by {signal.Signals(self.stopped_by).name}")
        elif full:
            self.stop(control, self.memory.advice())

    def stop(self, control, reason: str) -> None:
        if self.reason is None:
            self.reason = reason
        control.should_save = control.should_training_stop = True

    def is_save_due(self) -> bool:
        if self.args.process_index != 0:
            return False
        minutes = RETRY_SECONDS / 60 if self.retry else self.args.save_minutes
        return minutes is not None and time.monotonic() - self.last_save >= 60 * minutes

    def saved(self, problem: str | None) -> None:
        self.last_save, self.retry = time.monotonic(), problem is not None

    def judge(self, entry: dict, control) -> None:
        """What the watch has to say of a logged entry, once; it is the same on all processes."""
        for verdict in self.watch.see(entry) if self.watch else []:
            say(f"health: {verdict.line}")
            if verdict.collapse and self.args.on_collapse == "stop":
                self.stop(control, verdict.line)

    def raise_if_interrupted(self, update: int, checkpoint) -> None:
        """
        Raises:
            Interrupted: a signal stopped the run.
        """
        if self.stopped_by is not None:
            where = f"{checkpoint} is saved" if checkpoint else "NO checkpoint could be saved"
            raise Interrupted(
                self.stopped_by,
                f"{self.reason} at update {update}: {where}; the same command with --resume_from_checkpoint true "
                "goes on",
            )
