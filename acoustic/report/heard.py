"""What a run hears, and what is hidden from the model: spectrograms and sound, as a figure and for a live view."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from transformers import TrainerCallback

from acoustic.console import say
from acoustic.report.figures import ACCENT, STYLE, save
from acoustic.report.timeline import spectrum

# Windows that are shown, and the longest part of each, in seconds.
MAX_WINDOWS, MAX_SECONDS = 3, 12.0


class Example:
    """One window as it goes into the model.

    Args:
        waveform: (samples,) float, of any scale.
        rate: Hz.
        hidden: (frames,) bool, those that the model has to guess; None where the objective hides nothing.
    """

    def __init__(self, waveform: np.ndarray, rate: int, hidden: np.ndarray | None):
        samples = min(len(waveform), int(MAX_SECONDS * rate))
        if hidden is not None:
            hidden = hidden[: max(round(len(hidden) * samples / len(waveform)), 1)]
        self.waveform, self.rate, self.hidden = waveform[:samples], rate, hidden

    @property
    def seconds(self) -> float:
        return len(self.waveform) / self.rate

    @property
    def spans(self) -> list[tuple[float, float]]:
        """What is hidden, (start, end) in seconds."""
        if self.hidden is None:
            return []
        edges = np.flatnonzero(np.diff(np.concatenate([[0], self.hidden.astype(np.int8), [0]])))
        frame = self.seconds / len(self.hidden)
        return [(start * frame, end * frame) for start, end in edges.reshape(-1, 2)]

    @property
    def sound(self) -> np.ndarray:
        """To be listened to: (samples,) float32, its largest sample at 0.7."""
        centred = self.waveform - self.waveform.mean()
        return (0.7 * centred / max(np.abs(centred).max(), 1e-9)).astype(np.float32)

    @property
    def sound_without_hidden(self) -> np.ndarray:
        """The same, silent where frames are hidden."""
        sound = self.sound.copy()
        for start, end in self.spans:
            sound[int(start * self.rate) : int(end * self.rate)] = 0
        return sound


def examples_of(model, audio: torch.Tensor, rate: int, seed: int) -> list[Example]:
    """Of the first windows of a batch, (batch, samples); what is hidden is drawn as in training."""
    audio = audio[:MAX_WINDOWS]
    if not hasattr(model, "draw_mask"):
        return [Example(waveform, rate, None) for waveform in audio.float().cpu().numpy()]
    hidden = model.draw_mask(*audio.shape, seed).cpu().numpy()
    return [Example(waveform, rate, mask) for waveform, mask in zip(audio.float().cpu().numpy(), hidden)]


def draw_heard(output_dir: str, examples: list[Example]) -> Path:
    """A spectrogram of each window; above it, and lighter in it, what is hidden from the model."""
    with plt.rc_context({**STYLE, "axes.grid": False}):
        figure, axes = plt.subplots(
            len(examples), 1, figsize=(8, 1.7 * len(examples) + 0.5), layout="constrained", squeeze=False
        )
        for axis, example in zip(axes[:, 0], examples):
            spectrum(axis, example.waveform, example.rate)
            for start, end in example.spans:
                axis.axvspan(start, end, color="white", alpha=0.6, linewidth=0)
                axis.plot(
                    (start, end),
                    (1.04, 1.04),
                    color=ACCENT,
                    linewidth=3,
                    solid_capstyle="butt",
                    transform=axis.get_xaxis_transform(),
                    clip_on=False,
                )
            axis.set_xlim(0, example.seconds)
        shown = "hidden from the model: marked above, lighter" if examples[0].hidden is not None else "nothing hidden"
        axes[0, 0].set_title(f"windows as the model gets them; {shown}", pad=10)
        axes[-1, 0].set_xlabel("seconds")
        return save(figure, output_dir, "heard")


class ShowHeard(TrainerCallback):
    """At the first update of a run: the windows, and what is left of them, into the live view that was asked for."""

    def __init__(self, trainer):
        self.trainer, self.shown = trainer, False

    def on_step_end(self, args, state, control, **kwargs):
        trainer = self.trainer
        if self.shown or not state.is_world_process_zero or trainer.example is None:
            return
        self.shown = True
        views = [view for view in map(view_of, trainer.callback_handler.callbacks) if view is not None]
        if not views or trainer.is_fsdp_enabled:  # under FSDP no process has all of a model
            return
        audio = trainer.example.to(args.device)
        examples = examples_of(trainer.model, audio, trainer.train_dataset.rate, args.seed)
        picture = draw_heard(args.output_dir, examples)
        for show in views:
            try:
                show(picture, examples, state.global_step)
            except Exception as error:  # of whatever the tracker's client raises: a picture is not worth a run
                say(f"warning: the live view takes no audio or pictures ({type(error).__name__}: {error})")


def view_of(callback):
    """show(picture, examples, update) for one of transformers' callbacks of a tracker; None for any other."""
    kind = type(callback).__name__
    if kind == "TensorBoardCallback":
        return lambda *shown: show_in_tensorboard(callback.tb_writer, *shown)
    if kind in ("TrackioCallback", "WandbCallback"):
        return lambda *shown: show_in_client(getattr(callback, f"_{kind.removesuffix('Callback').lower()}"), *shown)
    return None


def sounds(examples: list[Example]) -> dict[str, tuple[np.ndarray, int]]:
    """Name -> (samples, rate)."""
    found = {}
    for number, example in enumerate(examples, 1):
        found[f"heard/{number}"] = example.sound, example.rate
        if example.hidden is not None:
            found[f"heard/{number}_without_what_is_hidden"] = example.sound_without_hidden, example.rate
    return found


def show_in_tensorboard(writer, picture: Path, examples: list[Example], update: int) -> None:
    writer.add_image("heard", plt.imread(picture)[..., :3], update, dataformats="HWC")
    for name, (sound, rate) in sounds(examples).items():
        writer.add_audio(name, torch.from_numpy(sound)[None], update, sample_rate=rate)


def show_in_client(client, picture: Path, examples: list[Example], update: int) -> None:
    """trackio has taken over the names of wandb."""
    media = {"heard": client.Image(str(picture))}
    for name, (sound, rate) in sounds(examples).items():
        media[name] = client.Audio((32_767 * sound).astype(np.int16), sample_rate=rate)
    client.log({**media, "train/global_step": update})
