"""Whether what is learned is of use, while it is learned: a frozen probe on a few labels, logged beside the loss."""

import time

import numpy as np
from tqdm.auto import tqdm
from transformers import TrainerCallback

from acoustic.console import UserError, say
from acoustic.data.decode import read_window
from acoustic.data.headers import Skip, read_header
from acoustic.data.rows import IndexedRows
from acoustic.data.sources import open_rows
from acoustic.data.windows import crop
from acoustic.tasks.embeddings import Encoder, Moments
from acoustic.tasks.probe import probe_accuracies

# Of the time since the last probe; above it the run is told how to spend less.
AFFORDABLE = 0.02
MIN_PER_CLASS = 2


class LabeledClips:
    """Decoded once, and kept: a few minutes of audio.

    Args:
        waveforms: (samples,) float32 each, at the model's rate.
        labels: (clips,) names of their classes.
    """

    def __init__(self, waveforms: list[np.ndarray], labels: np.ndarray, rate: int):
        self.waveforms, self.labels = waveforms, labels
        self.seconds = sum(map(len, waveforms)) / rate

    @property
    def chance(self) -> float:
        """The accuracy of always naming the commonest class."""
        return np.unique(self.labels, return_counts=True)[1].max() / len(self.labels)

    def __str__(self) -> str:
        classes, counts = np.unique(self.labels, return_counts=True)
        return f"{len(self.labels)} clips of {len(classes)} classes ({counts.min()} to {counts.max()} each)"


def read_clips(rows, rate: int, min_seconds: float, max_seconds: float, per_class: int, quiet: bool) -> LabeledClips:
    """At most so many clips of each class, the same in every run; of each its middle `max_seconds`.

    Raises:
        UserError: there are no labels, a single class, or too few clips that can be read.
    """
    if not isinstance(rows, IndexedRows):
        raise UserError("probe_dataset_name: clips can't be drawn from a stream; give a folder or a manifest")
    names = ["" if label in (None, "") else str(label) for label in rows.columns("label")]
    order = np.random.default_rng(0).permutation(len(names))
    waveforms, labels, counts = [], [], dict.fromkeys(sorted(set(names) - {""}), 0)
    if len(counts) < 2:
        raise UserError(
            f"probe_dataset_name: {rows.description} has {len(counts)} classes; a probe needs two: folder-per-class, "
            "or a column, see probe_label_column_name"
        )
    plan, last = crop(min_seconds, max_seconds, random=False), None
    for index in tqdm(order, "reading the probe's clips", leave=False, disable=quiet or None):
        row, name = rows[int(index)], names[index]
        if not name or counts[name] == per_class:
            continue
        try:
            (window,) = plan(row, read_header(row["audio"]), None)
            waveforms.append(read_window(row["audio"], window.start, window.stop, rate))
        except Skip as reason:
            last = f"{row['name']}: {reason}"
            continue
        labels.append(name)
        counts[name] += 1
    few = [name for name, count in counts.items() if count < MIN_PER_CLASS]
    if few:
        why = f" (the last one skipped: {last})" if last else ""
        raise UserError(f"probe_dataset_name: class {few[0]!r} has fewer than {MIN_PER_CLASS} usable clips{why}")
    return LabeledClips(waveforms, np.array(labels), rate)


class ProbeCallback(TrainerCallback):
    """At the first update, every so many and at the last one: embed the clips with the encoder as it is, and probe.

    Nothing of the run changes by it: no dropout, no random number, the same losses to the last bit. Processes share
    the clips. Logged: probe_accuracy, of the layer that is best then; probe_layer, which that is, 0 for the first
    one's input; probe_seconds.
    """

    def __init__(self, trainer, clips: LabeledClips, every: int, batch_seconds: float):
        self.trainer, self.clips, self.every, self.batch_seconds = trainer, clips, every, batch_seconds
        self.since, self.told = None, False
        # Of the last time.
        self.results: dict[str, float] = {}
        self.embeddings = np.zeros((0, 0))  # (clips, 2 * width) of the best layer

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.look(args, control)
        self.since = time.perf_counter(), state.global_step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            trained, updates = time.perf_counter() - self.since[0], state.global_step - self.since[1]
            self.advise(self.look(args, control), trained / updates)
            self.since = time.perf_counter(), state.global_step

    def look(self, args, control) -> float:
        """Probe and log; returns the seconds that it took, which the run's speed leaves out."""
        started = time.perf_counter()
        values = self.embed(args)
        accuracies = probe_accuracies(values, self.clips.labels)
        seconds = time.perf_counter() - started
        best = int(accuracies.argmax())
        self.results = {"probe_accuracy": float(accuracies[best]), "probe_layer": float(best)}
        self.embeddings = values[:, best]
        due = control.should_log
        self.trainer.log({**self.results, "probe_seconds": seconds})
        control.should_log = due  # transformers takes any log for the one that is due
        self.trainer.last_log += seconds
        return seconds

    def embed(self, args) -> np.ndarray:
        """(clips, layers, 2 * width) float32 from this process's share and the others'."""
        model = self.trainer.model.base_model
        training = model.training
        encoder = Encoder(model.eval(), self.trainer.processing_class)
        mine = self.clips.waveforms[args.process_index :: args.world_size]
        pooled = []
        with self.trainer.accelerator.autocast():
            for batch in batches(mine, self.batch_seconds * encoder.rate):
                for frames in encoder.layers(batch):
                    moments = Moments()
                    moments.add(frames)
                    pooled.append(moments.pooled())
        model.train(training)
        shares = self.trainer.gather([(args.process_index, pooled)])
        values = [None] * len(self.clips.waveforms)
        for process, share in shares:
            values[process :: args.world_size] = share
        return np.stack(values)

    def advise(self, seconds: float, update: float) -> None:
        """Once, where the probe takes more of the time than it should."""
        share = seconds / (seconds + self.every * update)
        if share > AFFORDABLE and not self.told:
            self.told = True
            enough = int(np.ceil(seconds * (1 - AFFORDABLE) / AFFORDABLE / update))
            say(
                f"warning: the probe takes {share:.0%} of the time; with --probe_steps {enough} it is {AFFORDABLE:.0%}"
            )


def batches(waveforms: list[np.ndarray], samples: float) -> list[list[np.ndarray]]:
    """In their order, of at most so many samples with the padding, at least one waveform each."""
    groups: list[list[np.ndarray]] = []
    for waveform in waveforms:
        longest = max([len(waveform), *map(len, groups[-1])]) if groups else 0
        if not groups or longest * (len(groups[-1]) + 1) > samples:
            groups.append([])
        groups[-1].append(waveform)
    return groups


def open_probe(data_args):
    """The rows that the options name; None where they name none."""
    if data_args.probe_dataset_name is None:
        return None
    columns = {"audio_column": data_args.audio_column_name, "label_column": data_args.probe_label_column_name}
    return open_rows(data_args.probe_dataset_name, data_args.probe_split_name, indexed=True, **columns)


def add_probe(trainer, rows, data_args, rate: int, batch_seconds: float) -> None:
    """Read the clips, say what they are, and have the trainer probe.

    Raises:
        UserError: the clips can't be used, or no process has all of the model.
    """
    if trainer.is_fsdp_enabled:
        raise UserError("probe_dataset_name: under FSDP no process has all of the model; leave the probe out")
    args = trainer.args
    limits = data_args.min_duration_in_seconds, data_args.max_duration_in_seconds
    clips = read_clips(rows, rate, *limits, data_args.probe_labels_per_class, args.disable_tqdm)
    every = int(data_args.probe_steps or args.eval_steps)
    say(f"probe: {clips}, {clips.seconds / 60:.1f} min; every {every} updates, chance {clips.chance:.0%}")
    trainer.probe = ProbeCallback(trainer, clips, every, batch_seconds)
    trainer.add_callback(trainer.probe)
