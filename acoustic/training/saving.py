"""The half of our Trainer that writes checkpoints: beside the run, whole or not at all, and never the end of it."""

import contextlib
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import gather_object, save_fsdp_model, save_fsdp_optimizer
from safetensors import SafetensorError
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import HubStrategy

from acoustic.console import say
from acoustic.training import checkpoint as files
from acoustic.training import guard
from acoustic.training.pushing import Pusher

# After the last update no more come, so a checkpoint that can't be written is waited for: half an hour.
LAST_TRIES = 30


class SavingTrainer(Trainer):
    """Instead of the Trainer's own writing in place, which a full disk ends and a kill leaves half.

    Needs `guard` (a `guard.Guard`).
    """

    pusher: Pusher | None = None  # of the process that writes, where a run pushes to the Hub
    saved: Path | None = None  # the newest checkpoint of this process's life
    best: tuple = (None, None, None)  # what the last checkpoint that was written knew of the best one

    def _save_checkpoint(self, model, trial) -> None:
        """Called by the Trainer, on all processes, when `control.should_save`."""
        checkpoint = files.folder_of(self.args.output_dir, self.state.global_step)
        if self.saved == checkpoint:
            return
        for number in range(1, LAST_TRIES + 1):
            problem = self.save_whole(checkpoint)
            self.guard.saved(problem)
            if problem is None:
                self.saved = checkpoint
                return
            at_the_end = self.state.global_step >= self.state.max_steps and number < LAST_TRIES
            waits = at_the_end and not self.guard.is_asked_to_stop()
            say(
                f"warning: {checkpoint.name} could not be saved ({problem}); earlier checkpoints are untouched, "
                f"{'the run waits' if waits else 'the run goes on'}, and the next try is in {guard.RETRY_SECONDS:g} s"
            )
            if not waits:
                return
            time.sleep(guard.RETRY_SECONDS)

    def save_whole(self, checkpoint: Path) -> str | None:
        """Write a checkpoint, on all processes. Returns what went wrong, on any of them; then there is none."""
        staging, writes = files.staging_of(checkpoint), self.args.should_save
        self.store_flos()
        self.note_the_best(checkpoint)
        problem = (
            self.attempt(lambda: writes and make_anew(staging))
            or self.attempt(lambda: self.write_files(str(staging)))
            or self.attempt(lambda: writes and files.publish(checkpoint))
        )
        if problem is not None:
            # The best must be one that exists; this evaluation's model is lost.
            self.state.best_metric, self.state.best_global_step, self.state.best_model_checkpoint = self.best
            if writes:
                shutil.rmtree(staging, ignore_errors=True)  # its room is needed
            return problem
        self.best = (self.state.best_metric, self.state.best_global_step, self.state.best_model_checkpoint)
        if writes:
            with contextlib.suppress(OSError):
                files.keep_newest(self.args.output_dir, self.args.save_total_limit, self.state.best_model_checkpoint)
        if self.pusher is not None and self.args.hub_strategy != HubStrategy.END:
            self.pusher.push_checkpoint(checkpoint)
        return None

    def _determine_best_metric(self, metrics: dict[str, float], trial) -> bool:
        """Of equals, which a small held-out part has many of, the one with the lower loss."""
        best, best_step = self.state.best_metric, self.state.best_global_step
        if super()._determine_best_metric(metrics, trial):
            return True
        name = f"eval_{(self.args.metric_for_best_model or '').removeprefix('eval_')}"
        of_best = [entry for entry in self.state.log_history if entry["step"] == best_step and "eval_loss" in entry]
        if best is None or metrics.get(name) != best or not of_best or metrics["eval_loss"] >= of_best[0]["eval_loss"]:
            return False
        self.state.best_global_step = self.state.global_step
        return True

    def _init_training_state(self, *args, **kwargs):
        """Called by the Trainer, which has the state of a run that goes on from its checkpoint."""
        counts = super()._init_training_state(*args, **kwargs)
        self.find_the_best()
        return counts

    def find_the_best(self) -> None:
        """Of a run that goes on: by its number, as the folder may have moved; on another machine it isn't there."""
        if self.state.best_global_step:
            best = files.folder_of(self.args.output_dir, self.state.best_global_step)
            if best.is_dir():
                self.state.best_model_checkpoint = str(best)
            else:
                say(f"note: the best so far, {best.name}, is not here; kept is the best of what comes now")
                self.state.best_metric = self.state.best_global_step = self.state.best_model_checkpoint = None
        self.best = (self.state.best_metric, self.state.best_global_step, self.state.best_model_checkpoint)

    def note_the_best(self, checkpoint: Path) -> None:
        """In the state that is saved, where the best model so far lies: in this checkpoint or in an earlier one."""
        if self.state.best_global_step:
            best = files.folder_of(self.args.output_dir, self.state.best_global_step)
            if best == checkpoint or best.is_dir():
                self.state.best_model_checkpoint = str(best)

    def init_hf_repo(self, *args, **kwargs) -> None:
        """Called by the Trainer; the repository was opened before any audio was."""
        if self.args.should_save:
            whole = self.args.hub_strategy == HubStrategy.CHECKPOINT
            self.pusher = Pusher(self.args.hub_model_id, self.args.output_dir, whole)

    def _finish_current_push(self) -> None:
        """Called by the Trainer at the end of the updates; ours goes on until `setup.end`."""

    def _finalize_training(self, *args, **kwargs):
        """The Trainer's own deletes all but the best checkpoint here, also of a run that is to be continued."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit

    def write_files(self, folder: str) -> None:
        writes = [partial(self.save_model, _internal_call=True)]
        if not self.args.save_only_model:
            writes += [self._save_optimizer_and_scheduler, self._save_scaler, self._save_rng_state]
        all_of(*(partial(write, folder) for write in writes))
        if self.args.should_save:
            # TrainingArguments pickled: nothing here reads it, and a pickle is nothing to share.
            Path(folder, "training_args.bin").unlink(missing_ok=True)
            for part in (*self.callback_handler.callbacks, self.control):
                if isinstance(part, ExportableState):
                    self.state.stateful_callbacks[type(part).__name__] = part.state()
            # A checkpoint may go to the Hub, and a path names this machine; `find_the_best` does without.
            best, self.state.best_model_checkpoint = self.state.best_model_checkpoint, None
            self.state.save_to_json(str(Path(folder, "trainer_state.json")))
            self.state.best_model_checkpoint = best

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            return super()._save_optimizer_and_scheduler(output_dir)
        plugin, scheduler = self.accelerator.state.fsdp_plugin, Path(output_dir, SCHEDULER_NAME)
        all_of(
            lambda: save_fsdp_model(plugin, self.accelerator, self.model, output_dir),
            lambda: save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir),
            lambda: self.args.should_save and torch.save(self.lr_scheduler.state_dict(), scheduler),
        )

    def attempt(self, action: Callable[[], None]) -> str | None:
        """Do something on every process; what a disk had against it on any of them."""
        problem = None
        try:
            action()
        except (OSError, SafetensorError, RuntimeError) as error:
            problem = what_a_disk_said(error)
            if problem is None:
                raise
        return next(filter(None, self.gather([problem])), None)

    def gather(self, collected: list) -> list:
        """The lists of all processes, joined."""
        return gather_object(collected) if self.args.world_size > 1 else collected


def all_of(*writes: Callable[[], None]) -> None:
    """Do each, then raise the first that a disk was against: under FSDP all processes gather what one then writes."""
    errors = []
    for write in writes:
        try:
            write()
        except (OSError, SafetensorError, RuntimeError) as error:
            if what_a_disk_said(error) is None:
                raise
            errors.append(error)
    if errors:
        raise errors[0]


def what_a_disk_said(error: Exception) -> str | None:
    if isinstance(error, (OSError, SafetensorError)):
        return getattr(error, "strerror", None) or str(error)
    if "PytorchStreamWriter" in str(error) or "inline_container" in str(error):
        return "a file could not be written; is the disk full?"
    return None


def make_anew(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
