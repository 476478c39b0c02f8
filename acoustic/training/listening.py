"""Frozen layers of labeled clips, kept in memory for as many probes as are wanted of them."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from acoustic.console import UserError
from acoustic.data.rows import IndexedRows
from acoustic.data.tally import Tally
from acoustic.data.windows import crop
from acoustic.tasks.attentive import Frames, pad_frames
from acoustic.tasks.embeddings import BATCH_SECONDS, listen

# A clip's frames are averaged down to at most so many, so that all layers of all clips fit into memory.
MAX_FRAMES = 100


@dataclass
class Heard:
    """
    names: of the clips.
    labels: (clips,) int64, or where a clip can have several classes (clips, classes) of 0 and 1.
    frames: of all layers, in float16.
    """

    names: list[str]
    labels: torch.Tensor
    frames: Frames

    def __len__(self) -> int:
        return len(self.names)

    def part(self, chosen: list[int]) -> "Heard":
        return Heard([self.names[index] for index in chosen], self.labels[chosen], self.frames[chosen])

    @property
    def pair(self) -> tuple[Frames, torch.Tensor]:
        """(frames in float32, labels)."""
        return Frames(self.frames.values.float(), self.frames.real), self.labels


def hear(encoder, rows: IndexedRows, task, data_args, title: str, quiet: bool) -> Heard:
    """The middle of each clip whose label the task can use, and which can be read.

    Args:
        encoder: an `embeddings.Encoder` or a `log_mel.LogMel`.

    Raises:
        UserError: there is none.
    """
    min_seconds, max_seconds = data_args.min_duration_in_seconds, data_args.max_duration_in_seconds
    usable = task.plan(data_args, lambda seconds: int(seconds / encoder.frame_seconds), train=False)
    middle = crop(min_seconds, max_seconds, random=False)

    def plan(row, header, generator):
        usable(row, header, generator)  # or raises
        return middle(row, header, generator)

    by_name = {row["name"]: row for row in (rows[index] for index in range(len(rows)))}
    names, labels, clips = [], [], []
    heard = listen(encoder, rows, plan, Tally(), batch_seconds=max(BATCH_SECONDS, max_seconds))
    for window, layers in tqdm(heard, title, total=len(rows), leave=False, disable=quiet or None):
        clips.append(fewer_frames(layers).half())
        names.append(window["name"])
        labels.append(torch.as_tensor(task.encode(by_name[window["name"]])))
    if not clips:
        raise UserError(f"dataset_name: none of the clips of {rows.description} can be used")
    return Heard(names, torch.stack(labels), pad_frames(clips))


def fewer_frames(layers: torch.Tensor) -> torch.Tensor:
    """(layers, frames, width) -> the same with at most MAX_FRAMES frames, means of equal numbers of neighbours."""
    size = -(-layers.shape[1] // MAX_FRAMES)
    return F.avg_pool1d(layers.transpose(1, 2), size, ceil_mode=True, count_include_pad=False).transpose(1, 2)
