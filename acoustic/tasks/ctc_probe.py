"""A frozen probe for speech: learned weights over layers, two small convolutions over time, characters by CTC.

After SUPERB's speech recognition (Yang 2021, arXiv 2105.01051), which has two LSTMs of 1024 behind the weighted
layers: too many weights for minutes of labels, and too slow without a GPU. Every start gets the same, log-mel bands
too: the half second around each frame, without which bands could not become characters at all.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

LEARNING_RATES = (3e-3, 1e-2)
WEIGHT_DECAY, UPDATES, MAX_NORM, DROPOUT = 0.01, 500, 5.0, 0.1
# 11 frames of 20 ms, twice: each character hears 0.42 s.
WIDTH, KERNEL = 64, 11
# In an update, of clips at random: half a minute.
BATCH_FRAMES = 1500


@dataclass
class Utterances:
    """
    names, texts: of the clips; texts are normalised.
    frames: (layers, frames, width) float16 each.
    labels: the characters' ids of each.
    """

    names: list[str]
    texts: list[str]
    frames: list[torch.Tensor]
    labels: list[list[int]]

    def __len__(self) -> int:
        return len(self.names)

    def part(self, chosen: list[int]) -> "Utterances":
        columns = (self.names, self.texts, self.frames, self.labels)
        return Utterances(*([column[index] for index in chosen] for column in columns))


class CTCProbe(nn.Module):
    """
    Args:
        mean, deviation: (layers, 1, width), of the frames that it is fitted on; they scale its input.
        vocabulary: how many characters, with the blank, which is number 0.
    """

    def __init__(self, mean: torch.Tensor, deviation: torch.Tensor, vocabulary: int):
        super().__init__()
        layers, _, width = mean.shape
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)
        self.layer_weights = nn.Parameter(torch.zeros(layers))
        self.projection = nn.Linear(width, WIDTH)
        self.convs = nn.ModuleList([nn.Conv1d(WIDTH, WIDTH, KERNEL, padding=KERNEL // 2) for _ in range(2)])
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH) for _ in self.convs])
        self.dropout = nn.Dropout(DROPOUT)
        self.head = nn.Linear(WIDTH, vocabulary)

    def forward(self, clips: list[torch.Tensor]) -> list[torch.Tensor]:
        """(layers, frames, width) each -> logits (frames, vocabulary) each.

        The clips lie behind each other with as many zeros between them as a convolution reaches; nothing is padded.
        """
        shares = self.layer_weights.softmax(0)[:, None, None]
        hidden = [self.projection((shares * (clip.float() - self.mean) / self.deviation).sum(0)) for clip in clips]
        counts = [size for frames in hidden for size in (len(frames), KERNEL // 2)]
        joined = torch.cat([F.pad(frames, (0, 0, 0, KERNEL // 2)) for frames in hidden])
        real = torch.cat([torch.full((size,), place % 2 == 0) for place, size in enumerate(counts)])[:, None]
        for conv, norm in zip(self.convs, self.norms):
            joined = self.dropout(F.gelu(norm(conv(joined.T).T))) * real
        return list(self.head(joined).split(counts)[::2])


def moments(clips: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation over the frames of all clips, (layers, 1, width) each."""
    frames = torch.cat(clips, 1).float()
    return frames.mean(1, keepdim=True), (frames.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()


def draw_batches(utterances: Utterances, seed: int) -> Iterator[list[int]]:
    """Numbers of clips, without end: every clip once before any comes again."""
    generator, batch, size = np.random.default_rng(seed), [], 0
    while True:
        for index in generator.permutation(len(utterances)).tolist():
            batch.append(index)
            size += utterances.frames[index].shape[1]
            if size >= BATCH_FRAMES:
                yield batch
                batch, size = [], 0


def fit(utterances: Utterances, vocabulary: int, learning_rate: float, seed: int) -> CTCProbe:
    """The learning rate falls to zero as a cosine does."""
    torch.manual_seed(seed)
    probe = CTCProbe(*moments(utterances.frames), vocabulary)
    optimizer = torch.optim.AdamW(probe.parameters(), learning_rate, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, UPDATES)
    for _, batch in zip(range(UPDATES), draw_batches(utterances, seed)):
        logits = probe([utterances.frames[index] for index in batch])
        labels = [torch.tensor(utterances.labels[index]) for index in batch]
        counts, lengths = (torch.tensor([len(clip) for clip in clips]) for clips in (logits, labels))
        log_probs = nn.utils.rnn.pad_sequence(logits).log_softmax(-1)
        loss = F.ctc_loss(log_probs, torch.cat(labels), counts, lengths, reduction="sum", zero_infinity=True)
        optimizer.zero_grad()
        (loss / lengths.sum()).backward()
        nn.utils.clip_grad_norm_(probe.parameters(), MAX_NORM)
        optimizer.step()
        schedule.step()
    return probe.eval()


@torch.no_grad()
def hypotheses(probe: CTCProbe, utterances: Utterances, decode: Callable[[torch.Tensor], str]) -> list[dict]:
    """{"name", "prediction", "reference"} of each clip; `decode`: logits (frames, vocabulary) -> text."""
    return [
        {"name": name, "prediction": decode(probe([frames])[0]), "reference": text}
        for name, text, frames in zip(utterances.names, utterances.texts, utterances.frames)
    ]
