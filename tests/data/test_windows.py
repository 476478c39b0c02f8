"""Windows cover a recording exactly, or take the part of it that the task can use."""

import numpy as np
import pytest

from acoustic.data.headers import Header, Skip
from acoustic.data.windows import cover, crop, whole

ROW = {"name": "a"}


def test_cover_uses_every_sample_once():
    """Random lengths, rates and limits: no gap, no overlap, none too long, none below the minimum."""
    generator = np.random.default_rng(0)
    for _ in range(2_000):
        rate = int(generator.choice([8_000, 11_025, 16_000, 22_050, 44_100, 48_000, 44_101]))
        minimum = generator.uniform(0.1, 3)
        maximum = minimum * generator.uniform(2, 20)
        header = Header(frames=int(generator.uniform(minimum, 200) * rate) + 1, rate=rate, channels=1)
        windows = cover(minimum, maximum)(ROW, header, generator)
        edges = [windows[0].start, *(window.stop for window in windows)]
        assert (edges[0], edges[-1]) == (0, header.frames)
        assert all(window.start == edge for window, edge in zip(windows, edges))
        lengths = [window.stop - window.start for window in windows]
        assert max(lengths) - min(lengths) <= 1
        assert max(window.seconds for window in windows) <= maximum + 1e-9
        assert min(window.seconds for window in windows) >= min(minimum, header.seconds) - 1 / rate


@pytest.mark.parametrize(
    ("seconds", "lengths"), [(15, [15]), (15.1, [7.55, 7.55]), (16, [8, 8]), (30, [15, 15]), (1, [1])]
)
def test_cover_leaves_no_short_rest(seconds, lengths):
    windows = cover(1, 15)(ROW, Header(int(seconds * 16_000), 16_000, 1), np.random.default_rng(0))
    assert [window.seconds for window in windows] == pytest.approx(lengths)


def test_crop_is_in_the_middle_or_anywhere():
    header = Header(frames=50 * 16_000, rate=16_000, channels=1)
    (middle,) = crop(1, 10, random=False)(ROW, header, np.random.default_rng(0))
    assert (middle.start, middle.stop) == (20 * 16_000, 30 * 16_000)
    generator = np.random.default_rng(0)
    starts = [crop(1, 10, random=True)(ROW, header, generator)[0] for _ in range(200)]
    assert all(window.seconds == 10 and window.start >= 0 and window.stop <= header.frames for window in starts)
    assert min(w.start for w in starts) < 2 * 16_000 and max(w.stop for w in starts) > 48 * 16_000
    (short,) = crop(1, 10, random=True)(ROW, Header(4 * 16_000, 16_000, 1), generator)
    assert (short.start, short.stop) == (0, 4 * 16_000)


def test_whole_takes_all_or_nothing():
    (window,) = whole(1, 10)(ROW, Header(160_000, 16_000, 1), None)
    assert (window.start, window.stop) == (0, 160_000)
    with pytest.raises(Skip, match=r"^10\.1 s is longer than max_duration_in_seconds=10$"):
        whole(1, 10)(ROW, Header(161_000, 16_000, 1), None)


@pytest.mark.parametrize("plan", [cover(1, 15), crop(1, 15, random=True), whole(1, 15)])
def test_short_recordings_are_skipped(plan):
    assert len(plan(ROW, Header(16_000, 16_000, 1), np.random.default_rng(0))) == 1
    with pytest.raises(Skip, match=r"^0\.99 s is shorter than min_duration_in_seconds=1$"):
        plan(ROW, Header(15_900, 16_000, 1), np.random.default_rng(0))
