"""Which frames are hidden from the model: spans of frames, drawn for a whole batch at once."""

import torch


def draw_span_mask(
    batch: int, frames: int, prob: float, length: int, generator: torch.Generator, min_spans: int = 2
) -> torch.Tensor:
    """Masked frames as wav2vec 2.0 draws them (Baevski 2020, section 3.1; fairseq's `compute_mask_indices`).

    int(prob * frames / length + u) spans per row, u uniform in [0, 1), their starts without replacement, overlaps
    allowed: at prob .65 and length 10 about 48 % of the frames. Every row is then cut to the same number of masked
    frames by unmasking single frames, so that whatever is computed on masked frames only is a rectangle.

    Returns:
        (batch, frames) bool on the CPU, every row with the same number of True.
    """
    length = min(length, frames)
    starts_available = frames - length + 1
    spans = int(prob * frames / length + torch.rand(1, generator=generator).item())
    spans = min(max(spans, min_spans), starts_available)
    starts = torch.rand(batch, starts_available, generator=generator).topk(spans, dim=1).indices
    hidden = (starts[:, :, None] + torch.arange(length)).flatten(1)
    mask = torch.zeros(batch, frames, dtype=torch.bool).scatter_(1, hidden, True)

    # The masked frames with the largest random numbers stay masked; unmasked ones rank below all of them.
    rank = torch.rand(batch, frames, generator=generator).masked_fill(~mask, -1.0)
    kept = rank.topk(int(mask.sum(1).min()), dim=1).indices
    return torch.zeros_like(mask).scatter_(1, kept, True)
