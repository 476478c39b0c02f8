"""Which frames are hidden from the model: spans of frames, drawn for a whole batch at once, on the model's device."""

from functools import lru_cache

import torch
import torch.nn.functional as F


def draw_span_mask(
    batch: int, frames: int, prob: float, length: int, min_spans: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masked frames as wav2vec 2.0 draws them (Baevski 2020, section 3.1; fairseq's `compute_mask_indices`).

    int(prob * frames / length + u) spans per row, u uniform in [0, 1), their starts without replacement, overlaps
    allowed: at prob .65 and length 10 about 48 % of the frames. Every row is then brought to `count_masked` frames by
    unmasking single frames (in the few rows that have less, by masking frames beside a span), so that whatever is
    computed on masked frames only is a rectangle whose size is known beforehand: nothing waits for the device.

    Returns:
        mask (batch, frames) bool and the masked frames' places (batch, masked) int64 in rising order, both on the
        generator's device.
    """
    mask = draw_spans(batch, frames, prob, length, min_spans, generator)
    count = count_masked(batch, frames, prob, length, min_spans)
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
def count_masked(batch: int, frames: int, prob: float, length: int, min_spans: int) -> int:
    """Masked frames in each row of such a batch: what the row with the fewest has on average, by simulation.

    A batch of less than four rows counts as one of four, or too many rows would have less.
    """
    counts = simulate_counts(frames, prob, length, min_spans)
    # The mean of the smallest of `batch` numbers from this distribution: the sum over n of P(one is above n)^batch.
    above = (counts[None] > torch.arange(frames)[:, None]).double().mean(1)
    return max(int((above ** max(batch, 4)).sum() + 0.5), 1)


@lru_cache(maxsize=4096)
def simulate_counts(frames: int, prob: float, length: int, min_spans: int) -> torch.Tensor:
    return draw_spans(500, frames, prob, length, min_spans, torch.Generator().manual_seed(0)).sum(1)
