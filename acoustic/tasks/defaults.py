"""fairseq's few-label settings for fine-tuning, by hours of labels; shares of the updates instead of their numbers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class FewLabelSettings:
    """One row of fairseq's wav2vec 2.0 base fine-tuning configs (examples/wav2vec/config/finetuning)."""

    max_hours: float
    frozen_share: float  # of the updates in which the encoder is frozen: 10k of 13k, 10k of 20k, none of 80k
    mask_time_prob: float
    mask_channel_prob: float
    layerdrop: float


FEW_LABELS = (
    FewLabelSettings(max_hours=3.0, frozen_share=10 / 13, mask_time_prob=0.65, mask_channel_prob=0.25, layerdrop=0.1),
    FewLabelSettings(max_hours=30.0, frozen_share=0.5, mask_time_prob=0.65, mask_channel_prob=0.5, layerdrop=0.05),
    FewLabelSettings(
        max_hours=float("inf"), frozen_share=0.0, mask_time_prob=0.65, mask_channel_prob=0.5, layerdrop=0.1
    ),
)


def few_label_settings(labeled_seconds: float | None) -> FewLabelSettings:
    """The published row for 10 min and 1 h up to 3 h of labels, 10 h up to 30 h, 100 h beyond or if unknown."""
    hours = float("inf") if labeled_seconds is None else labeled_seconds / 3600
    return next(row for row in FEW_LABELS if hours <= row.max_hours)
