"""Span masks: their share, their spans, and the same distribution as transformers' own."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers.models.wav2vec2.modeling_wav2vec2 import _compute_mask_indices

from acoustic.models.masking import count_masked, draw_span_mask, draw_spans


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(batch, frames, prob=0.65, length=10, seed=0, min_spans=2) -> torch.Tensor:
    return draw_span_mask(batch, frames, prob, length, min_spans, seeded(seed))[0]


def whole_spans(count: int, frames: int) -> np.ndarray:
    """Many rows before they are brought to the same count."""
    return draw_spans(count, frames, 0.65, 10, 2, seeded()).numpy()


def run_lengths(row: np.ndarray) -> np.ndarray:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], row.astype(int), [0]])))
    return edges[1::2] - edges[::2]


@pytest.mark.parametrize("frames", [13, 49, 120, 780])
def test_every_row_has_the_same_number_of_masked_frames(frames):
    for seed in range(5):
        counts = draw(16, frames, seed=seed).sum(1)
        assert counts.unique().numel() == 1
        assert 0 < counts[0] <= frames


def test_the_papers_values_mask_about_48_percent():
    # 1 - (1 - .065)^10 = .489 for long inputs; spans keep within the window, which adds a little.
    for frames in (100, 780, 3000):
        assert draw(4, frames).float().mean().item() == pytest.approx(0.49, abs=0.015)


def test_masked_frames_come_in_spans():
    rows = whole_spans(200, 100)
    assert min(run_lengths(row).min() for row in rows) >= 10


@pytest.mark.parametrize("frames", [49, 200, 780])
def test_the_common_count_is_the_average_of_transformers(frames):
    np.random.seed(0)
    rows = np.concatenate([_compute_mask_indices((1, frames), 0.65, 10, min_masks=2) for _ in range(1000)])
    assert count_masked(frames, 0.65, 10, 2) == pytest.approx(rows.sum(1).mean(), rel=0.01, abs=0.6)


@pytest.mark.parametrize("batch", [1, 6, 32])
def test_rows_are_brought_to_the_count_by_few_frames(batch):
    added = removed = masked = apart = 0
    for seed in range(200):
        spans = draw_spans(batch, 400, 0.65, 10, 2, seeded(seed))
        mask = draw(batch, 400, seed=seed)
        beside = F.max_pool1d(spans.float(), 5, stride=1, padding=2).bool()
        apart += (mask & ~beside).sum()
        added, removed, masked = added + (mask & ~spans).sum(), removed + (spans & ~mask).sum(), masked + mask.sum()
    assert apart / masked < 1e-3  # what is added lengthens a span
    assert added / masked < 0.035
    assert removed / masked < 0.035


def test_places_are_the_masked_frames():
    mask, places = draw_span_mask(5, 120, 0.65, 10, 2, seeded())
    assert torch.equal(mask.nonzero()[:, 1].view(5, -1), places)


def test_the_count_is_known_before_anything_is_drawn():
    assert draw(7, 333, seed=3).sum(1).tolist() == [count_masked(333, 0.65, 10, 2)] * 7


def test_min_spans():
    """At 200 frames prob .02 asks for no span at all; two are drawn, or three where three are the minimum."""
    for spans in (2, 3):
        counts = draw_spans(50, 200, 0.02, 10, spans, seeded()).sum(1)
        assert max(counts) == 10 * spans  # apart
        assert min(counts) >= 10 + spans - 1  # overlapping, but never at the same start


@pytest.mark.parametrize("frames", range(1, 13))
def test_short_inputs(frames):
    for seed in range(20):
        mask = draw(3, frames, seed=seed)
        assert mask.shape == (3, frames)
        assert mask.sum(1).unique().numel() == 1
        assert mask.any()


def test_the_generator_decides():
    assert torch.equal(draw(4, 200, seed=7), draw(4, 200, seed=7))
    assert not torch.equal(draw(4, 200, seed=7), draw(4, 200, seed=8))


@pytest.mark.parametrize("frames", [50, 200])
def test_distribution_equals_that_of_transformers(frames):
    """Before rows are cut to the same count: how many frames are masked, and how often each place is."""
    draws = 4000
    np.random.seed(0)
    theirs = np.concatenate([_compute_mask_indices((1, frames), 0.65, 10, min_masks=2) for _ in range(draws)])
    ours = whole_spans(draws, frames)
    # 4000 draws: the standard error of a place's share is .008, so .04 is five of them (of a difference of two).
    assert np.abs(ours.mean(0) - theirs.mean(0)).max() < 0.05
    deciles = [np.percentile(rows.sum(1) / frames, range(10, 100, 10)) for rows in (ours, theirs)]
    np.testing.assert_allclose(deciles[0], deciles[1], atol=0.02)
    lengths = [np.concatenate([run_lengths(row) for row in rows]).mean() for rows in (ours, theirs)]
    assert lengths[0] == pytest.approx(lengths[1], rel=0.03)
