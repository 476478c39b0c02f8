"""One Trainer for pretraining and fine-tuning: our stream instead of its loaders, and one division of the loss.

The loss of an update is the sum over its targets (masked frames, tokens, clips) divided once by their number over all
micro-batches and processes. Dividing per micro-batch would weigh the frames of a short batch more than those of a long
one.
"""

import time
from collections import defaultdict

import torch
from accelerate.utils import gather_object
from tqdm.auto import tqdm
from transformers import Trainer

from acoustic.console import UserError, say
from acoustic.data.batches import BatchStream
from acoustic.data.loader import StreamLoader
from acoustic.data.tally import Tally, refuse_too_many
from acoustic.training.resume import load_stream_state, save_stream_state
from acoustic.training.schedule import tri_stage

# Of fewer rows a few bad ones are a large share by chance; what the headers say of small data sets is judged before.
MIN_ROWS_JUDGED = 100


class AcousticTrainer(Trainer):
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
        self.sums: dict[str, torch.Tensor] = defaultdict(float)
        self.tallies: dict[str, Tally] = defaultdict(Tally)
        self.stream_epoch = self.epochs = 0.0
        self.stream_state: dict | None = None
        self.audio_seconds = self.wait_seconds = self.hours_seen = 0.0
        self.last_log = time.perf_counter()

    # ---- data

    def get_train_dataloader(self) -> StreamLoader:
        loader = StreamLoader(self.train_dataset, self.args.dataloader_num_workers, self.args.dataloader_pin_memory)
        if self.stream_state is not None:
            loader.load_state_dict(self.stream_state["place"])
            self.tallies["train"].load_state_dict(self.stream_state["tally"])
            self.audio_seconds = self.stream_state["audio_seconds"]
        self.train_loader = loader
        return loader

    def get_eval_dataloader(self, eval_dataset: BatchStream | None = None) -> StreamLoader:
        stream = eval_dataset if eval_dataset is not None else self.eval_dataset
        return StreamLoader(stream, min(self.args.dataloader_num_workers, 1), self.args.dataloader_pin_memory)

    def train(self, resume_from_checkpoint: str | None = None, **kwargs):
        """The stream goes on at its saved place, in seconds; the Trainer's own way would read all of it again."""
        if resume_from_checkpoint is not None and not self.args.ignore_data_skip:
            self.stream_state = load_stream_state(resume_from_checkpoint, self.args.process_index)
        self.args.ignore_data_skip = True
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _save_rng_state(self, output_dir: str) -> None:
        """What each process saves of its own in a checkpoint: its random states, and its place in the audio."""
        super()._save_rng_state(output_dir)
        state = {
            "place": self.train_loader.state_dict(),
            "tally": self.tallies["train"].state_dict(),
            "audio_seconds": self.audio_seconds,  # heard since the last log
        }
        save_stream_state(output_dir, self.args.process_index, state)

    def take_report(self, batch: dict, split: str = "train") -> float | None:
        """Remove what a batch says about itself. Returns its seconds of audio, None for a batch that only reports."""
        epoch = batch.pop("epoch")
        self.tallies[split].add(batch.pop("skipped"), batch.pop("rows"))
        if split == "train":
            self.stream_epoch = epoch
        return batch.pop("audio_seconds", None)

    def get_batch_samples(self, epoch_iterator, num_batches: int, device) -> tuple[list, torch.Tensor]:
        """The micro-batches of one update with their targets drawn, and the number of targets over all processes."""
        batches, started = [], time.perf_counter()
        while len(batches) < num_batches:
            batch = next(epoch_iterator)
            if seconds := self.take_report(batch):
                self.audio_seconds += seconds
                batches.append(batch)
        self.wait_seconds += time.perf_counter() - started
        for index, batch in enumerate(batches):
            self.step.add_targets(batch, (self.args.seed, self.state.global_step, self.args.process_index, index))
        count = sum(self.step.count_targets(batch) for batch in batches)
        # Known without asking the device: one process has nothing to wait for.
        if self.args.world_size > 1:
            count = self.accelerator.reduce(torch.tensor(float(count), device=device), "sum")
        return batches, count

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
        for name, value in sums.items():
            self.sums[name] += value
        # DDP averages gradients over the processes, while their sum is wanted.
        loss = loss_sum * (self.args.world_size / num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

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
        self.state.epoch = self.epochs  # of the audio; the Trainer's own is the share of max_steps that is done
        super().log(logs, start_time)

    def check_stream(self) -> None:
        """Epochs and skipped rows over all processes; too many of them end the run, on all processes at once."""
        tally = self.tallies["train"]
        counts = torch.tensor([tally.faults, tally.rows, self.stream_epoch], device=self.args.device)
        faults, rows, epochs = self.accelerator.reduce(counts, "sum").tolist()
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
        audio = float(self.accelerator.reduce(torch.tensor(self.audio_seconds, device=self.args.device), "sum"))
        # From the log, which a checkpoint keeps: a resumed run counts on.
        before = next(
            (entry["hours_seen"] for entry in reversed(self.state.log_history) if "hours_seen" in entry), 0.0
        )
        self.hours_seen = before + audio / 3600
        wait_fraction = min(self.wait_seconds / elapsed, 1.0)
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
        for index, batch in enumerate(tqdm(loader, metric_key_prefix, leave=False, disable=self.args.disable_tqdm)):
            if not self.take_report(batch, metric_key_prefix):
                continue
            # The same masks at every evaluation, so that two of them compare.
            self.step.add_targets(batch, (self.args.seed, 0, self.args.process_index, index))
            inputs = self._prepare_inputs(batch)
            with torch.no_grad(), self.accelerator.autocast():
                outputs = self.step.forward(model, inputs)
            for name, value in self.step.sums(outputs, inputs)[1].items():
                sums[name] += value
            collected += self.step.collect(outputs, inputs)
        model.train(training)
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

    def without_targets(self, split: str) -> dict[str, float]:
        """Means over nothing would read as a perfect loss of 0."""
        if self.args.load_best_model_at_end and split == "eval":
            raise UserError(
                "eval_split_name: none of the held-out clips can be used, so no checkpoint can be chosen by them"
            )
        say(f"nothing to evaluate: none of the recordings of {split!r} can be used")
        return {}

    def gather(self, collected: list) -> list:
        return gather_object(collected) if self.args.world_size > 1 else collected
