"""A frozen probe that listens in time: learned weights over layers, attention over frames, then a linear map.

A mean over time hides much of what a representation knows; this is what a linear probe is to it, for sequences.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

LEARNING_RATES = (1e-3, 3e-3, 1e-2)
WEIGHT_DECAY, UPDATES, ATTENTION_WIDTH = 0.05, 150, 64


@dataclass
class Frames:
    """Hidden states of clips, padded in time.

    values: (clips, layers, frames, width) float32.
    real: (clips, frames) bool.
    """

    values: torch.Tensor
    real: torch.Tensor

    def __getitem__(self, chosen) -> "Frames":
        return Frames(self.values[chosen], self.real[chosen])

    def __len__(self) -> int:
        return len(self.values)


def pad_frames(clips: list[torch.Tensor]) -> Frames:
    """clips: (layers, frames, width) each, of any lengths."""
    longest = max(clip.shape[1] for clip in clips)
    lengths = torch.tensor([clip.shape[1] for clip in clips])
    values = torch.stack([F.pad(clip, (0, 0, 0, longest - clip.shape[1])) for clip in clips])
    return Frames(values, torch.arange(longest) < lengths[:, None])


class AttentiveProbe(nn.Module):
    """Layers weighed as in SUPERB (arXiv 2105.01051), then attentive statistics (Okabe 2018, arXiv 1803.10963).

    Args:
        mean, deviation: (layers, 1, width), of the frames that it is fitted on; they scale its input.
    """

    def __init__(self, mean: torch.Tensor, deviation: torch.Tensor, classes: int):
        super().__init__()
        layers, _, width = mean.shape
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)
        self.layer_weights = nn.Parameter(torch.zeros(layers))
        self.attention = nn.Sequential(nn.Linear(width, ATTENTION_WIDTH), nn.Tanh(), nn.Linear(ATTENTION_WIDTH, 1))
        self.classifier = nn.Linear(2 * width, classes)
        nn.init.zeros_(self.attention[2].weight)  # all frames alike at first: the mean and the deviation over time
        nn.init.zeros_(self.classifier.weight)

    def forward(self, frames: Frames) -> torch.Tensor:
        """-> logits (clips, classes)."""
        return self.classify(self.scale(frames))

    def scale(self, frames: Frames) -> Frames:
        """Once for all updates: it is most of the work."""
        return Frames((frames.values - self.mean) / self.deviation, frames.real)

    def classify(self, frames: Frames) -> torch.Tensor:
        """Scaled frames -> logits."""
        hidden = torch.einsum("clfw,l->cfw", frames.values, self.layer_weights.softmax(0))
        scores = self.attention(hidden).squeeze(-1).masked_fill(~frames.real, -torch.inf)
        weights = scores.softmax(-1)[..., None]
        mean = (weights * hidden).sum(1)
        variance = (weights * (hidden - mean[:, None]).square()).sum(1)
        return self.classifier(torch.cat([mean, (variance + 1e-5).sqrt()], -1))


def moments(frames: Frames) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation over the real frames of all clips, (layers, 1, width) each."""
    real = frames.real[:, None, :, None]
    count = frames.real.sum()
    mean = (frames.values * real).sum((0, 2), keepdim=True) / count
    variance = ((frames.values - mean).square() * real).sum((0, 2), keepdim=True) / count
    return mean[0], (variance[0] + 1e-5).sqrt()


def fit(frames: Frames, labels: torch.Tensor, classes: int, learning_rate: float, seed: int) -> AttentiveProbe:
    """All clips in every update; the learning rate falls to zero as a cosine does.

    Args:
        labels: (clips,) int64; or (clips, classes) of 0 and 1, where a clip can have several.
    """
    torch.manual_seed(seed)
    probe = AttentiveProbe(*moments(frames), classes)
    scaled = probe.scale(frames)
    optimizer = torch.optim.AdamW(probe.parameters(), learning_rate, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, UPDATES)
    for _ in range(UPDATES):
        optimizer.zero_grad()
        loss_of(probe.classify(scaled), labels).backward()
        optimizer.step()
        schedule.step()
    return probe.eval()


def loss_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    if labels.dim() == 2:
        return F.binary_cross_entropy_with_logits(logits, labels.float())
    return F.cross_entropy(logits, labels)


@torch.no_grad()
def accuracy(probe: AttentiveProbe, frames: Frames, labels: torch.Tensor) -> float:
    return float((probe(frames).argmax(-1) == labels).double().mean())
