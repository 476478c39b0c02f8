"""When a run saves beside its schedule, and when it stops before its last update: on all processes at the same one."""

import signal
import time

from transformers import TrainerCallback

from acoustic.console import Interrupted, say
from acoustic.training.checkpoint import update_of
from acoustic.training.exchange import Exchange, leave_together
from acoustic.training.stopping import StopSignals

# After a checkpoint that could not be written; the run goes on meanwhile.
RETRY_SECONDS = 60.0


class Guard(TrainerCallback):
    """
    Args:
        memory, nonfinite: count what was left out (see faults.py).
        watch: judges what is logged (`health.HealthWatch`), or None.
    """

    def __init__(self, args, exchange: Exchange, memory, nonfinite, watch=None):
        self.args, self.exchange, self.watch = args, exchange, watch
        self.memory, self.nonfinite = memory, nonfinite
        self.signals = StopSignals()
        self.reason: str | None = None  # why the run stopped before its last update
        self.stopped_by: int | None = None
        self.owes_evaluation = False
        self.retry, self.last_save = False, time.monotonic()

    def on_train_begin(self, args, state, control, **kwargs):
        self.last_save = time.monotonic()
        for entry in state.log_history if self.watch else []:
            self.watch.see(entry)

    def on_step_end(self, args, state, control, **kwargs):
        """The first process's clock decides about saving, anyone's troubles about stopping."""
        asked, due, full = self.exchange.totals(
            self.signals.received is not None, self.is_save_due(), self.memory.take_new()
        )
        self.memory.count(state.global_step, int(full))
        if due:
            control.should_save = True
        if asked:
            self.stop_for_signal(control)
            if control.should_evaluate and args.metric_for_best_model is None:
                # It can take minutes, which who asked may not give; the run that goes on begins with it.
                control.should_evaluate, self.owes_evaluation = False, True
        elif self.memory.too_often:
            self.stop(control, self.memory.advice())
        if (reason := self.nonfinite.look(state.global_step, state.global_step >= state.max_steps)) is not None:
            self.stop(control, reason)

    def stop_for_signal(self, control) -> None:
        self.stopped_by = self.signals.received or signal.SIGTERM
        self.stop(control, f"stopped by {signal.Signals(self.stopped_by).name}")

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

    def is_asked_to_stop(self) -> bool:
        """By a signal to any process; all of them must ask."""
        return self.exchange.totals(self.signals.received is not None)[0] > 0

    def judge(self, entry: dict, control) -> None:
        """What the watch has to say of a logged entry, once. Speed is each process's own, so the first one decides."""
        collapsed = ""
        for verdict in self.watch.see(entry) if self.watch else []:
            say(f"health: {verdict.line}")
            collapsed = collapsed or (verdict.line if verdict.collapse else "")
        stops = self.watch is not None and self.args.on_collapse == "stop"
        if stops and self.exchange.totals(bool(collapsed) and self.args.process_index == 0)[0]:
            self.stop(control, collapsed or "the watch of the first process saw a collapse")

    def raise_if_interrupted(self, update: int, max_steps: int, checkpoint) -> None:
        """After training, on all processes; also where the signal came after the last update.

        Raises:
            Interrupted: a signal stopped the run.
        """
        if self.stopped_by is None and not self.is_asked_to_stop():
            return
        number = self.stopped_by or self.signals.received or signal.SIGTERM
        if checkpoint is not None and update_of(checkpoint) == update:
            where = f"{checkpoint} is saved"
        else:
            where = (
                f"NO checkpoint of it could be saved, the newest is {checkpoint or 'that of an earlier run, if any'}"
            )
        rest = "goes on" if update < max_steps else "evaluates and reports, which is all that is left"
        line = (
            f"stopped by {signal.Signals(number).name} at update {update}: {where}; the same command with "
            f"--resume_from_checkpoint true {rest}"
        )
        leave_together(self.exchange, Interrupted(number, line))
