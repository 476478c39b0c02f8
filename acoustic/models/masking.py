"""Which frames are hidden from the model: spans of frames, drawn for a whole batch at once, on the model's device."""

from functools import lru_cache

import torch
import torch.nn.functional as F


def draw_span_mask(
    batch: int, frames: int, prob: float, length: int, min_spans: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masked frames as wav2vec 2.0 draws them (Baevski 2020, section 3.1; fairseq's `compute_mask_indices`).

    int(prob * frames / length + u) spans per row, u uniform in [0, 1), their starts without replacement, overlaps
    allowed: at prob .65 and length 10 about 49 % of the frames. Every row is then brought to the average number: one
    that has more by unmasking single frames, as fairseq does, one that has less by masking frames beside its spans.
    What is computed on masked frames only is then a rectangle whose size is known beforehand: nothing waits for the
    device. (fairseq cuts to the smallest row at hand, in large batches of short windows a quarter of the targets.)

    Returns:
        mask (batch, frames) bool and the masked frames' places (batch, masked) int64 in rising order, both on the
        generator's device.
    """
    mask = draw_spans(batch, frames, prob, length, min_spans, generator)
    count = count_masked(frames, prob, length, min_spans)
    # Masked frames rank above their neighbours, these above all others; each in random order.
    beside = F.max_pool1d(mask.float(), 5, stride=1, padding=2)
    rank = torch.rand(batch, frames, generator=generator, device=generator.device) + mask + beside
    places = rank.topk(count, dim=1).indices.sort(dim=1).values
    return torch.zeros_like(mask).scatter_(1, places, True), places


def draw_spans(
    batch: int, frames: int, prob: float, length: int, min_spans: int, generator: torch.Generator
) -> torch.Tensor:
    """Whole spans, so a different number of masked frames in each row: (batch, frames) bool."""
    device = generator.device
    length = min(length, frames)
    starts_available = frames - length + 1
    sure, chance = divmod(prob * frames / length, 1)
    most = min(max(int(sure) + 1, min_spans), starts_available)
    shuffled = torch.rand(batch, starts_available, generator=generator, device=device)
    starts = shuffled.topk(most, dim=1).indices
    if most > max(sure, min_spans):
        # The last span is drawn by chance; one that isn't starts behind the last frame.
        dropped = torch.rand(batch, generator=generator, device=device) >= chance
        starts[:, -1].masked_fill_(dropped, frames)
    hidden = (starts[:, :, None] + torch.arange(length, device=device)).flatten(1)
    return torch.zeros(batch, frames + length, dtype=torch.bool, device=device).scatter_(1, hidden, True)[:, :frames]


@lru_cache(maxsize=4096)
def count_masked(frames: int, prob: float, length: int, min_spans: int) -> int:
    """Masked frames in each row: what a row has on average, by simulation."""
    generator = torch.Generator().manual_seed(0)
    counts = draw_spans(2000, frames, prob, length, min_spans, generator).sum(1)
    return max(round(counts.double().mean().item()), 1)
