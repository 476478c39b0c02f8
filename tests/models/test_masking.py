"""Span masks: their share, their spans, and the same distribution as transformers' own."""

import numpy as np
import pytest
import torch
from transformers.models.wav2vec2.modeling_wav2vec2 import _compute_mask_indices

from acoustic.models.masking import draw_span_mask


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(batch, frames, prob=0.65, length=10, seed=0, **kwargs) -> torch.Tensor:
    return draw_span_mask(batch, frames, prob, length, seeded(seed), **kwargs)


def single_rows(count: int, frames: int, **kwargs) -> np.ndarray:
    """Many masks of one row each: nothing is cut to another row's count, so spans stay whole."""
    generator = seeded()
    rows = [draw_span_mask(1, frames, 0.65, 10, generator, **kwargs) for _ in range(count)]
    return torch.cat(rows).numpy()


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
    # 1 - (1 - .065)^10 = .489 for long inputs; cutting 4 rows to the smallest count takes a little off.
    shares = [draw(4, 3000, seed=seed).float().mean().item() for seed in range(20)]
    assert np.mean(shares) == pytest.approx(0.48, abs=0.01)


def test_masked_frames_come_in_spans():
    rows = single_rows(200, 100)
    assert min(run_lengths(row).min() for row in rows) >= 10


def test_rows_are_cut_by_single_frames_only():
    """All spans of a row stay recognisable: unmasking takes the difference to the smallest row, nothing more."""
    mask = draw(32, 200)
    alone = single_rows(200, 200).sum(1)
    assert alone.min() - 20 <= mask.sum(1)[0] <= alone.mean()


def test_min_spans():
    """At 60 frames prob .02 asks for no span at all; two are drawn, or three where three are the minimum."""
    for spans in (2, 3):
        counts = [draw(1, 200, prob=0.02, seed=seed, min_spans=spans).sum().item() for seed in range(50)]
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
    ours = single_rows(draws, frames)
    # 4000 draws: the standard error of a place's share is .008, so .04 is five of them (of a difference of two).
    assert np.abs(ours.mean(0) - theirs.mean(0)).max() < 0.05
    deciles = [np.percentile(rows.sum(1) / frames, range(10, 100, 10)) for rows in (ours, theirs)]
    np.testing.assert_allclose(deciles[0], deciles[1], atol=0.02)
    lengths = [np.concatenate([run_lengths(row) for row in rows]).mean() for rows in (ours, theirs)]
    assert lengths[0] == pytest.approx(lengths[1], rel=0.03)
