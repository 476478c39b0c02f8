"""Windows cover a recording exactly, or take the part of it that the task can use."""

import itertools
import math
import time

import numpy as np
import pytest

from acoustic.data.headers import Header, Skip
from acoustic.data.windows import Window, cover, crop, divide_evenly, frames_of, slide, whole, window_lengths

ROW = {"name": "a"}


RATES = [8_000, 11_025, 16_000, 22_050, 44_100, 48_000, 44_101]


def header_of(seconds: float, rate: int = 16_000) -> Header:
    return Header(frames=round(seconds * rate), rate=rate, channels=1)


def largest_step(lengths: tuple[float, ...]) -> float:
    return max((longer - shorter for shorter, longer in itertools.pairwise(lengths)), default=0.0)


def test_cover_lays_windows_of_few_lengths_side_by_side():
    """Random lengths, rates and limits: inside, no overlap, only lengths of the set, little left out."""
    generator = np.random.default_rng(0)
    for _ in range(1_000):
        rate = int(generator.choice(RATES))
        minimum = generator.uniform(0.1, 3)
        maximum = minimum * generator.uniform(2, 20)
        lengths = window_lengths(minimum, maximum)
        header = Header(frames=math.ceil(generator.uniform(minimum, 200) * rate) + 1, rate=rate, channels=1)
        windows = list(cover(minimum, maximum)(ROW, header, generator if generator.random() < 0.8 else None))
        assert windows and windows[0].start >= 0 and windows[-1].stop <= header.frames
        assert all(first.stop <= second.start for first, second in itertools.pairwise(windows))
        assert all(window.seconds in lengths and window.rate == rate for window in windows)
        for window in windows:
            assert window.seconds * rate - 1e-5 <= window.stop - window.start < window.seconds * rate + 1
        # Each of the windows is rounded up to a whole frame.
        left = header.frames - sum(window.stop - window.start for window in windows)
        if header.seconds > maximum:
            assert left / rate < largest_step(lengths) + minimum
        assert left / rate <= max(largest_step(lengths), minimum) + len(windows) / rate


@pytest.mark.parametrize("limits", [(1, 15.6), (0.5, 15.6), (1, 2), (0.1, 20)])
def test_little_audio_is_left_out(limits):
    """Lengths spread over all scales: less than 7 %, and less the longer the recordings are."""
    generator = np.random.default_rng(1)
    plan, (minimum, maximum) = cover(*limits), limits
    for longest, most in ((3 * maximum, 0.07), (300 * maximum, 0.005)):
        total = heard = 0.0
        for seconds in np.exp(generator.uniform(np.log(minimum), np.log(longest), 1_500)):
            header = Header(math.ceil(seconds * 16_000), 16_000, 1)
            total += header.seconds
            heard += sum(window.seconds for window in plan(ROW, header, generator))
        assert (1 - most) * total < heard <= total


def test_a_recording_of_exactly_one_length_is_used_whole():
    for seconds in window_lengths(1, 15):
        for generator in (None, np.random.default_rng(0)):
            (window,) = cover(1, 15)(ROW, Header(frames_of(seconds, 16_000), 16_000, 1), generator)
            assert (window.start, window.stop) == (0, frames_of(seconds, 16_000))


def test_the_cuts_are_elsewhere_in_every_epoch():
    plan, header = cover(1, 15.6), Header(7_200 * 16_000, 16_000, 1)
    plans = [tuple(w.start for w in plan(ROW, header, np.random.default_rng(seed))) for seed in range(20)]
    assert len(set(plans)) == 20
    cuts = {starts[1] for starts in plans}
    assert len(cuts) >= 10 and max(cuts) - min(cuts) > 5 * 16_000
    assert plans[3] == tuple(w.start for w in plan(ROW, header, np.random.default_rng(3)))
    fixed = [tuple(w.start for w in plan(ROW, header, None)) for _ in range(2)]
    assert fixed[0] == fixed[1] and fixed[0][0] == 0


def test_the_lengths_are_few_and_near():
    """At most six an octave: a recording cut down to the next one below loses at most 11 % (and 20 ms of rounding)."""
    for minimum, maximum in [(1, 15.6), (0.1, 20), (1, 2), (3.7, 31.3), (1, 1000)]:
        lengths = window_lengths(minimum, maximum)
        assert lengths == tuple(sorted(set(lengths))) and (lengths[0], lengths[-1]) == (minimum, maximum)
        assert len(lengths) <= 2 + 6 * math.log2(maximum / minimum)
        assert all(shorter >= longer * 2 ** (-1 / 6) - 0.02 - 1e-9 for shorter, longer in itertools.pairwise(lengths))


def test_a_window_is_cropped_inside_of_itself():
    generator = np.random.default_rng(0)
    for _ in range(500):
        rate = int(generator.choice(RATES))
        seconds = generator.uniform(0.2, 20)
        start = int(generator.integers(10**6))
        window = Window(ROW, start, start + frames_of(seconds, rate), rate, seconds)
        shorter = generator.uniform(0.1, seconds)
        for drawn in (generator, None):
            part = window.crop(shorter, drawn)
            assert window.start <= part.start and part.stop <= window.stop
            assert part.stop - part.start == frames_of(shorter, rate) and part.seconds == shorter
            assert part.row is ROW and part.rate == rate
        assert part.start == window.start  # without a generator
        assert window.crop(seconds, generator) is window
    starts = {window.crop(0.1, generator).start for _ in range(100)}
    assert len(starts) > 20


def test_a_header_that_claims_a_year_plans_lazily():
    started = time.perf_counter()
    windows = cover(1, 15.6)(ROW, Header(10**12, 16_000, 1), np.random.default_rng(0))
    first = list(itertools.islice(windows, 5))
    assert time.perf_counter() - started < 0.5
    assert [window.seconds for window in first[1:]] == [15.6] * 4


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
    (window,) = plan(ROW, Header(16_000, 16_000, 1), np.random.default_rng(0))
    assert (window.start, window.stop, window.seconds) == (0, 16_000, 1)
    with pytest.raises(Skip, match=r"^0\.99 s is shorter than min_duration_in_seconds=1$") as skipped:
        plan(ROW, Header(15_900, 16_000, 1), np.random.default_rng(0))
    assert not skipped.value.fault  # the settings leave it out


@pytest.mark.parametrize(
    "seconds, expected", [(0.9, [0.9]), (2.0, [2.0]), (2.1, [1.05, 1.05]), (5.0, [1.666, 1.667, 1.667])]
)
def test_equal_pieces(seconds, expected):
    windows = list(divide_evenly(0.1, 2.0)(ROW, header_of(seconds), None))
    assert [window.seconds for window in windows] == pytest.approx(expected, abs=1e-3)
    assert windows[0].start == 0 and windows[-1].stop == header_of(seconds).frames
    assert all(before.stop == after.start for before, after in zip(windows, windows[1:]))
    assert all(window.alone == (len(expected) == 1) for window in windows)


@pytest.mark.parametrize("seconds, starts", [(0.9, [0]), (2.0, [0]), (2.5, [0, 0.5]), (5.0, [0, 1.5, 3.0])])
def test_sliding_windows(seconds, starts):
    windows = list(slide(0.1, 2.0, 0.5)(ROW, header_of(seconds), None))
    assert [window.start / window.rate for window in windows] == pytest.approx(starts, abs=1e-3)
    assert windows[-1].stop == header_of(seconds).frames
    assert {window.stop - window.start for window in windows} == {
        min(header_of(2.0).frames, header_of(seconds).frames)
    }
