"""What a person reads while a run goes on: a line for what is logged, and a bar below it on a terminal."""

import sys
import time

from tqdm.auto import tqdm
from transformers import TrainerCallback

from acoustic.console import say

# Of what is logged, in this order: name -> how it is shown.
SHOWN = {
    "loss": "loss {:.3f}",
    "accuracy": "accuracy {:.0%}",
    "code_perplexity": "perplexity {:.0f}",
    "macro_f1": "macro F1 {:.2f}",
    "map": "mAP {:.3f}",
    "frame_map": "frame mAP {:.3f}",
    "segment_f1": "segment F1 {:.2f}",
    "event_f1": "event F1 {:.2f}",
    "wer": "WER {:.0%}",
    "cer": "CER {:.0%}",
    "probe_accuracy": "probe {:.0%}",
    "audio_seconds_per_second": "{:,.0f} audio s/s",
    "hours_seen": "{:.2f} h heard",
}
SPLITS = {"eval": "held out"}


class Terminal(TrainerCallback):
    """Instead of transformers' callbacks, which print dictionaries.

    watch: over the run's health, if there is one.
    """

    def __init__(self, watch=None):
        self.watch = watch
        self.bar: tqdm | None = None
        self.began, self.first, self.last_line = time.monotonic(), 0, float("-inf")

    def on_train_begin(self, args, state, control, **kwargs):
        self.began, self.first = time.monotonic(), state.global_step
        if state.is_world_process_zero and sys.stderr.isatty() and not args.disable_tqdm:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="updates", dynamic_ncols=True)

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or "train_runtime" in logs:
            return
        training = "loss" in logs
        if training and not (sys.stdout.isatty() or self.is_due(args, state)):
            return
        line = self.of_training(logs, state) if training else of_split(logs, state.global_step)
        if line is None:
            return
        if training:
            self.last_line = time.monotonic()
        if self.bar is not None:
            self.bar.clear()
        say(line)
        if self.bar is not None:
            self.bar.refresh()

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def is_due(self, args, state) -> bool:
        """Where nobody looks (a file, a batch system's log) few lines are enough."""
        return state.global_step >= state.max_steps or time.monotonic() - self.last_line >= args.line_seconds

    def of_training(self, logs: dict, state) -> str:
        done = state.global_step - self.first
        left = (time.monotonic() - self.began) / done * (state.max_steps - state.global_step) if done else 0.0
        start = f"update {state.global_step:,} of {state.max_steps:,}"
        return " | ".join([start, *values(logs), *([f"{duration(left)} left"] if left else []), *self.health()])

    def health(self) -> list[str]:
        """What the watch says is wrong now, in a word or two each."""
        if self.watch is None:
            return []
        return [", ".join(name.replace("_", " ") for name in self.watch.active) or "healthy"]


def of_split(logs: dict, update: int) -> str | None:
    """Of an evaluation, whose names begin with the split's; None where there is nothing to show."""
    split = next((name.removesuffix("_loss") for name in logs if name.endswith("_loss")), None)
    if split is None or not (shown := values({name.removeprefix(f"{split}_"): value for name, value in logs.items()})):
        return None
    return " | ".join([f"{SPLITS.get(split, split)} after update {update:,}", *shown])


def values(logs: dict) -> list[str]:
    return [form.format(logs[name]) for name, form in SHOWN.items() if isinstance(logs.get(name), (int, float))]


def duration(seconds: float) -> str:
    """ "40 s", "12 min", "3 h 20 min", "2 d 4 h"."""
    minutes = round(seconds / 60)
    if seconds < 60:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(minutes / 60)
    return f"{hours // 24} d {hours % 24} h"
