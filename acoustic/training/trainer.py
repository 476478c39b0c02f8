"""One Trainer for pretraining and fine-tuning: our stream instead of its loaders, and one division of the loss.

The loss of an update is the sum over its targets (masked frames, tokens, clips) divided once by their number over all
micro-batches and processes. Dividing per micro-batch would weigh the frames of a short batch more than those of a long
one.
"""

import contextlib
import time
from collections import defaultdict
from pathlib import Path

import torch
from accelerate.utils.memory import clear_device_cache
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerState

from acoustic.console import ShareError, UserError, say
from acoustic.data.batches import BatchStream
from acoustic.data.loader import StreamLoader
from acoustic.data.tally import Tally, refuse_too_many
from acoustic.training.exchange import Exchange
from acoustic.training.faults import NonFiniteUpdates, OutOfMemory, is_out_of_memory
from acoustic.training.guard import Guard
from acoustic.training.resume import load_stream_state, refuse_another_kind, save_stream_state
from acoustic.training.saving import SavingTrainer
from acoustic.training.schedule import tri_stage
from acoustic.training.terminal import Terminal

# Of fewer rows a few bad ones are a large share by chance; what the headers say of small data sets is judged before.
MIN_ROWS_JUDGED = 100

# Windows that are kept for the figures, held-out ones where there are some.
EXAMPLES = 8

IN_BACKWARD = (
    "out of memory where other processes wait for what this one computes; lower --batch_seconds, and continue with "
    "--resume_from_checkpoint true --ignore_data_skip true"
)


class AcousticTrainer(SavingTrainer):
    """
    Args:
        step: what is computed on a batch: a `PretrainingStep` or a `FinetuningStep`.
        train_dataset: an endless `BatchStream`.
        eval_dataset: a finite `BatchStream`, or None.
        max_skipped_fraction: the share of unusable recordings at which the run ends.
    """

    def __init__(self, *args, step, max_skipped_fraction: float = 1.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.step, self.max_skipped_fraction = step, max_skipped_fraction
        # Dropout and Gumbel noise of its own for each process; the Trainer has just seeded all of them alike.
        torch.manual_seed(self.args.seed + self.args.process_index)
        # We scale the loss ourselves: no division by the accumulation steps is due.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self.exchange = Exchange(self.args.world_size, self.args.ddp_timeout)
        self.nonfinite = NonFiniteUpdates(self.args.device, self.args.max_nonfinite_updates)
        self.memory = OutOfMemory(getattr(self.train_dataset, "batch_seconds", 0.0))
        self.health = self.step.make_watch(self.audio_per_update())
        self.guard = Guard(self.args, self.exchange, self.memory, self.nonfinite, self.health)
        self.add_callback(self.guard)
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.add_callback(Terminal(self.health))
        self.in_backward, self.done_in_update = False, 0
        self.sums: dict[str, torch.Tensor] = defaultdict(float)
        self.tallies: dict[str, Tally] = defaultdict(Tally)
        self.example: torch.Tensor | None = None  # some audio, for the figures
        self.probe = None  # a ProbeCallback, where one was asked for
        self.stream_epoch = self.epochs = 0.0
        self.stream_state: dict | None = None
        self.audio_seconds = self.wait_seconds = self.hours_seen = 0.0
        self.last_log = time.perf_counter()

    def create_accelerator_and_postprocess(self) -> None:
        """accelerate would have FSDP round all weights to the half type, and the audio that goes in, and the loss."""
        super().create_accelerator_and_postprocess()
        if self.is_fsdp_enabled:
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(cast_forward_inputs=False)

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True):
        """accelerate puts autocast around the model's forward, but under FSDP it leaves that out."""
        return self.accelerator.autocast() if self.is_fsdp_enabled else contextlib.nullcontext()

    # ---- data

    def get_train_dataloader(self) -> StreamLoader:
        loader = StreamLoader(self.train_dataset, self.args.dataloader_num_workers, self.args.dataloader_pin_memory)
        if self.stream_state is not None:
            loader.load_state_dict(self.stream_state["place"])
            self.tallies["train"].load_state_dict(self.stream_state["tally"])
            self.audio_seconds, self.epochs = self.stream_state["audio_seconds"], self.stream_state["epochs"]
            self.args.eval_on_start = self.stream_state["owes_evaluation"]
            self.sums.update(self.stream_state["sums"])
            self.nonfinite.load_state_dict(self.stream_state["nonfinite"])
        self.train_loader = loader
        return loader

    def get_eval_dataloader(self, eval_dataset: BatchStream | None = None) -> StreamLoader:
        stream = eval_dataset if eval_dataset is not None else self.eval_dataset
        return StreamLoader(stream, min(self.args.dataloader_num_workers, 1), self.args.dataloader_pin_memory)

    def audio_per_update(self) -> float:
        """Seconds, at most."""
        return self.memory.batch_seconds * self.args.gradient_accumulation_steps * self.args.world_size

    def train(self, resume_from_checkpoint: str | None = None, **kwargs) -> None:
        """The stream goes on at its saved place, in seconds; the Trainer's own way would read all of it again.

        Raises:
            Interrupted: a signal asked the run to stop.
        """
        if resume_from_checkpoint is not None and not self.args.ignore_data_skip:
            self.stream_state = load_stream_state(resume_from_checkpoint, self.args.process_index)
        self.args.ignore_data_skip = True
        if resume_from_checkpoint is not None:
            refuse_another_kind(resume_from_checkpoint, self.is_fsdp_enabled, self.model.config.model_type)
            if self.load_finished(resume_from_checkpoint):
                return
        with self.guard.signals:
            super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
            if self.pusher is not None:
                self.pusher.be_quiet()
                if self.guard.stopped_by is not None:
                    self.pusher.stop()
            self.guard.raise_if_interrupted(self.state.global_step, self.args.max_steps, self.saved)

    def load_finished(self, checkpoint: str) -> bool:
        """Whether all updates were made, by a run that was killed before it told what came out; then load them."""
        state = TrainerState.load_from_json(str(Path(checkpoint, "trainer_state.json")))
        if state.global_step < self.args.max_steps:
            return False
        say(f"all {state.global_step} updates are made: what is left is to evaluate and report")
        self.state = state
        self.find_the_best()
        self._load_from_checkpoint(checkpoint)
        self.model.to(self.args.device)
        if self.args.load_best_model_at_end and state.best_model_checkpoint:
            self._load_best_model()
        self.get_train_dataloader()
        for entry in state.log_history if self.health else []:
            self.health.see(entry)
        return True

    # ---- checkpoints (see saving.py)

    def _save_rng_state(self, output_dir: str) -> None:
        """What each process saves of its own: random states, its place in the audio, its sums since the last log."""
        super()._save_rng_state(output_dir)
        state = {
            "place": self.train_loader.state_dict(),
            "tally": self.tallies["train"].state_dict(),
            "audio_seconds": self.audio_seconds,
            "epochs": self.epochs,
            "owes_evaluation": self.guard.owes_evaluation,
            "sums": {name: torch.as_tensor(value).tolist() for name, value in self.sums.items()},
            "nonfinite": self.nonfinite.state_dict(),
        }
        save_stream_state(output_dir, self.args.process_index, state)

    def take_report(self, batch: dict, split: str = "train") -> float | None:
        """Remove what a batch says about itself. Returns its seconds of audio, None for a batch that only reports."""
        epoch = batch.pop("epoch")
        self.tallies[split].add(batch.pop("skipped"), batch.pop("rows"))
        if split == "train":
            self.stream_epoch = epoch
        return batch.pop("audio_seconds", None)

    def get_batch_samples(self, epoch_iterator, num_batches: int, device) -> tuple[list, float]:
        """The micro-batches of one update with their targets drawn, and the number of targets over all processes."""
        batches, started = [], time.perf_counter()
        while len(batches) < num_batches:
            batch = next(epoch_iterator)
            if seconds := self.take_report(batch):
                self.audio_seconds += seconds
                batches.append(batch)
        self.wait_seconds += time.perf_counter() - started
        self.done_in_update = 0
        if self.example is None:
            self.example = batches[0]["input_values"][:EXAMPLES].clone()
        for index, batch in enumerate(batches):
            self.step.add_targets(batch, (self.args.seed, self.state.global_step, self.args.process_index, index))
        count = sum(self.step.count_targets(batch) for batch in batches)
        return batches, self.exchange.totals(count)[0]

    def _prepare_input(self, data):
        """From pinned memory without waiting; the Trainer's own waits for each tensor."""
        if isinstance(data, torch.Tensor):
            return data.to(self.args.device, non_blocking=True)
        return super()._prepare_input(data)

    # ---- the step

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Sum of the loss over this micro-batch's targets / number of targets in the update."""
        self.step.before_forward(self.model, self.state.global_step)
        outputs = self.step.forward(model, inputs)
        loss_sum, sums = self.step.sums(outputs, inputs)
        finite = torch.isfinite(sums["loss"])
        for name, value in sums.items():
            self.sums[name] += torch.where(finite, value, 0)
        # DDP averages gradients over the processes, while their sum is wanted.
        loss = loss_sum * (self.args.world_size / num_items_in_batch)
        self.in_backward = True
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """A batch that does not fit in memory is left out; what the Trainer adds up itself stays finite."""
        self.in_backward = False
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            loss = None  # and with the error its frames go, which hold the tensors
        if loss is None:
            loss = self.leave_out(model, inputs)
        self.done_in_update += 1
        return torch.nan_to_num(loss, nan=0.0, posinf=0.0, neginf=0.0)

    def leave_out(self, model, inputs: dict) -> torch.Tensor:
        """Drop what this process has of the update so far; others that wait for its gradients get zeros.

        Raises:
            ShareError: it is too late for that.
        """
        rows, samples = inputs["input_values"].shape
        seconds = samples / self.train_dataset.rate
        self.memory.note(self.state.global_step + 1, rows, seconds, self.done_in_update)
        model.zero_grad()
        if getattr(self.accelerator, "scaler", None) is not None:  # which wants some gradients to look at
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        clear_device_cache()
        if self.args.world_size > 1 and (self.is_fsdp_enabled or self.accelerator.sync_gradients):
            if self.in_backward or self.is_fsdp_enabled:
                raise ShareError(IN_BACKWARD)
            inputs = self._prepare_inputs(self.step.smallest(inputs))
            loss, _ = self.step.sums(self.step.forward(model, inputs), inputs)
            self.accelerator.backward(loss * 0)
        return torch.zeros((), device=self.args.device)

    def _get_grad_norm(self, model, grad_norm=None):
        """Just before the optimizer's step: an update that is not finite must not be made."""
        norm = super()._get_grad_norm(model, grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm  # FSDP leaves each process with its part
        scaled = getattr(self.accelerator, "scaler", None) is not None
        self.nonfinite.leave_out(norm, self.optimizer, model.parameters(), scaled, sharded=self.is_fsdp_enabled)
        return norm

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        if self.lr_scheduler is None and getattr(self.args, "tri_stage", False):
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer, tri_stage(num_training_steps)
            )
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    # ---- what is logged

    def log(self, logs: dict, start_time: float | None = None) -> None:
        if "loss" in logs and self.sums:
            logs.update(self.step.means(self.reduce_sums(self.sums)))
            logs.update(self.speed())
            logs.update(self.step.log_values(self.state.global_step))
            self.sums.clear()
            self.check_stream()
            if left_out := self.nonfinite.total():
                logs["nonfinite_updates"] = left_out
        self.state.epoch = self.epochs  # of the audio; the Trainer's own is the share of max_steps that is done
        super().log(logs, start_time)
        self.guard.judge(self.state.log_history[-1], self.control)

    def check_stream(self) -> None:
        """Epochs and skipped rows over all processes; too many of them end the run, on all processes at once."""
        tally = self.tallies["train"]
        faults, rows, epochs = self.exchange.totals(tally.faults, tally.rows, self.stream_epoch)
        self.epochs = epochs / self.args.world_size
        if rows >= MIN_ROWS_JUDGED:
            description = self.train_dataset.description
            refuse_too_many(int(faults), int(rows), tally.fault_reasons, self.max_skipped_fraction, description)

    def reduce_sums(self, sums: dict) -> dict[str, float]:
        """Totals over all processes. Reading them is the one place that waits for the device, so only logging does."""
        names = self.step.sum_names
        device = self.args.device
        values = torch.stack([torch.as_tensor(sums.get(name, 0.0), device=device).float() for name in names])
        totals = self.accelerator.reduce(values, "sum")
        return dict(zip(names, totals.tolist()))

    def speed(self) -> dict[str, float]:
        """Audio per second of wall time over all processes, hours seen, share of time spent waiting for data."""
        elapsed = time.perf_counter() - self.last_log
        audio, waited = self.exchange.totals(self.audio_seconds, self.wait_seconds)
        # From the log, which a checkpoint keeps: a resumed run counts on.
        before = next(
            (entry["hours_seen"] for entry in reversed(self.state.log_history) if "hours_seen" in entry), 0.0
        )
        self.hours_seen = before + audio / 3600
        wait_fraction = min(waited / self.args.world_size / elapsed, 1.0)
        self.audio_seconds = self.wait_seconds = 0.0
        self.last_log = time.perf_counter()
        return {
            "audio_seconds_per_second": audio / elapsed,
            "hours_seen": self.hours_seen,
            "data_wait_fraction": wait_fraction,
        }

    # ---- evaluation

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Every process scores its own share; only sums and predictions are exchanged: unequal shares do no harm."""
        started = time.perf_counter()
        training, model = self.model.training, self.model.eval()
        sums: dict[str, torch.Tensor] = defaultdict(float)
        collected: list = []
        loader = self.get_eval_dataloader(eval_dataset)
        for index, batch in enumerate(
            tqdm(loader, metric_key_prefix, leave=False, disable=self.args.disable_tqdm or None)
        ):
            if not self.take_report(batch, metric_key_prefix):
                continue
            # The same masks at every evaluation, so that two of them compare.
            self.step.add_targets(batch, (self.args.seed, 0, self.args.process_index, index))
            some = batch["input_values"][:EXAMPLES]
            if index == 0 or some.numel() > self.example.numel():
                self.example = some.clone()
            inputs = self._prepare_inputs(batch)
            with torch.no_grad(), self.accelerator.autocast():
                outputs = self.step.forward(model, inputs)
            if self.is_in_train and self.guard.signals.received and self.args.metric_for_best_model is None:
                break
            for name, value in self.step.sums(outputs, inputs)[1].items():
                sums[name] += value
            collected += self.step.collect(outputs, inputs)
        model.train(training)
        if self.is_in_train and self.args.metric_for_best_model is None and self.guard.is_asked_to_stop():
            self.guard.stop_for_signal(self.control)  # the run that goes on begins with this evaluation
            self.guard.owes_evaluation, self.control.should_evaluate = True, False
            return {}
        totals = self.reduce_sums(sums)
        if not totals["targets"]:
            return self.without_targets(metric_key_prefix)
        metrics = {**self.step.means(totals), **self.step.metrics(self.gather(collected))}
        metrics["runtime"] = time.perf_counter() - started
        self.last_log += metrics["runtime"]
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def last_evaluation(self) -> dict[str, float]:
        """Of the weights as they are now: what was logged, where the last update was followed by an evaluation."""
        at_the_end = [entry for entry in self.state.log_history if entry["step"] == self.state.global_step]
        found = next((entry for entry in reversed(at_the_end) if "eval_runtime" in entry), None)
        if found is None or self.example is None:  # nothing was heard yet, for the figures
            return self.evaluate()
        return {name: value for name, value in found.items() if name.startswith("eval_")}

    def without_targets(self, split: str) -> dict[str, float]:
        """Means over nothing would read as a perfect loss of 0."""
        if self.args.load_best_model_at_end and split == "eval":
            raise UserError(
                "eval_split_name: none of the held-out clips can be used, so no checkpoint can be chosen by them"
            )
        self.control.should_evaluate = False
        say(f"nothing to evaluate: none of the recordings of {split!r} can be used")
        return {}
