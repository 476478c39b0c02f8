"""Spans to frames and back against naive loops; F1 on cases worked out by hand."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from acoustic.data.spans import Span
from acoustic.tasks.events import (
    Decoding,
    Event,
    FrameGrid,
    Recording,
    choose_thresholds,
    count_matches,
    decode,
    event_counts,
    f1,
    frame_targets,
    micro_macro,
    runs,
    score,
    segment_counts,
)

# Frames of 20 ms that see 25 ms, of wav2vec 2.0 at 16 kHz; and one of 100 ms that begins at 0.
GRID, PLAIN = FrameGrid(16_000, 320, 200), FrameGrid(1000, 100, 50)
IDS = {"a": 0, "b": 1}


def spans_of(*times, label="a") -> list[Span]:
    return [Span(start, end, label) for start, end in times]


# ---- frames


def test_a_grid_from_what_an_encoder_says_of_lengths():
    def wav2vec2(samples):
        for kernel, stride in zip((10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2)):
            samples = (samples - kernel) // stride + 1
        return samples

    assert FrameGrid.of(wav2vec2, 320, 16_000) == GRID
    assert FrameGrid.of(lambda samples: samples // 100, 100, 1000) == PLAIN
    assert GRID.place(200 / 16_000) == 0 and GRID.place((200 + 3 * 320) / 16_000) == 3


def test_targets_are_those_of_a_loop():
    generator, frames, start = np.random.default_rng(0), 100, 3.0
    seconds = (frames * 320 + 80) / 16_000
    for _ in range(20):
        starts = generator.uniform(2.5, 5.2, 6)
        spans = [
            Span(s, s + d, "ab"[int(c)]) for s, d, c in zip(starts, generator.exponential(0.2, 6), starts * 10 % 2)
        ]
        expected = np.zeros((frames, 2), int)
        for span in spans:
            centres = [start + (200 + 320 * frame) / 16_000 for frame in range(frames)]
            inside = [frame for frame, centre in enumerate(centres) if span.start <= centre < span.end]
            middle = (span.start + span.end) / 2
            hit_somewhere = any(
                span.start <= start + (200 + 320 * frame) / 16_000 < span.end for frame in range(-400, 400)
            )
            if not hit_somewhere and start <= middle <= start + seconds:
                inside = [int(np.argmin([abs(centre - middle) for centre in centres]))]
            expected[inside, IDS[span.label]] = 1
        np.testing.assert_array_equal(frame_targets(spans, IDS, frames, GRID, start, seconds), expected)


def test_a_point_and_a_short_span_have_a_frame_each():
    targets = frame_targets(
        [Span(0.0, 0.0, "a"), Span(0.26, 0.28, "b"), Span(1.0, 1.0, "a")], IDS, 10, PLAIN, 0.0, 1.0
    )
    assert np.flatnonzero(targets[:, 0]).tolist() == [0, 9]
    assert np.flatnonzero(targets[:, 1]).tolist() == [2]


def test_what_is_outside_of_a_window_marks_nothing_in_it():
    spans = [Span(0.0, 2.0, "a"), Span(3.0, 9.0, "a"), Span(2.98, 2.99, "b")]
    assert frame_targets(spans, IDS, 10, PLAIN, 2.0, 1.0)[:, 0].sum() == 0
    assert frame_targets(spans, IDS, 10, PLAIN, 2.0, 1.0)[:, 1].tolist() == [0] * 9 + [1]


def test_targets_decoded_are_the_spans():
    """To half a frame; and to the ends of the recording."""
    spans = [Span(0.0, 0.5, "a"), Span(0.3, 1.2, "b"), Span(0.8, 2.0, "a")]
    events = decode(frame_targets(spans, IDS, 20, PLAIN, 0.0, 2.0).astype(np.float32), PLAIN, 2.0, "ab", Decoding())
    assert [event.label for event in events] == ["a", "b", "a"]
    np.testing.assert_allclose([(event.start, event.end) for event in events], [(0.0, 0.5), (0.3, 1.2), (0.8, 2.0)])
    assert [event.probability for event in events] == [1.0] * 3


# ---- probabilities -> spans


def probabilities(text: str) -> np.ndarray:
    """One class: "9" is .9, "." is 0."""
    return np.array([[int(char) / 10 if char != "." else 0.0] for char in text], np.float32)


def decoded(text: str, **options) -> list[tuple[float, float]]:
    events = decode(probabilities(text), PLAIN, len(text) / 10, ["a"], Decoding(**options))
    return [(round(event.start, 3), round(event.end, 3)) for event in events]


def test_runs():
    assert runs(np.array([True, False, True, True])).tolist() == [[0, 1], [2, 4]]
    assert runs(np.zeros(3, bool)).shape == (0, 2)


def test_thresholds_of_each_class():
    both = np.concatenate([probabilities("..44.."), probabilities("..44..")], 1)
    events = decode(both, PLAIN, 0.6, ["a", "b"], Decoding({"a": 0.3}))
    assert [(event.label, event.probability) for event in events] == [("a", pytest.approx(0.4))]
    assert decoded("..44..", thresholds={"a": 0.4}) == [(0.2, 0.4)]  # at the threshold, too


def test_the_median_filter_takes_flickers_and_closes_holes():
    assert decoded("9..99.999...") == [(0.0, 0.1), (0.3, 0.5), (0.6, 0.9)]
    assert decoded("9..99.999...", median_filter_seconds=0.3)[-1] == (0.3, 0.9)
    assert decoded("..9...999...", median_filter_seconds=0.3) == [(0.6, 0.9)]
    assert decoded("..9.........", median_filter_seconds=0.04) == [(0.2, 0.3)]  # narrower than a frame: none


def test_gaps_are_closed_before_short_spans_go():
    text = "99.9....9..."
    assert decoded(text) == [(0.0, 0.2), (0.3, 0.4), (0.8, 0.9)]
    assert decoded(text, min_span_seconds=0.2) == [(0.0, 0.2)]
    assert decoded(text, min_gap_seconds=0.2) == [(0.0, 0.4), (0.8, 0.9)]
    assert decoded(text, min_gap_seconds=0.1) == decoded(text)  # a gap of just so much stays
    assert decoded(text, min_gap_seconds=0.2, min_span_seconds=0.3) == [(0.0, 0.4)]


def test_nothing_sounds():
    assert decoded("......") == [] and decoded("......", min_gap_seconds=1, min_span_seconds=1) == []


# ---- metrics


def matches(reference, predicted) -> int:
    return count_matches(np.array(reference, float).reshape(-1, 2), np.array(predicted, float).reshape(-1, 2))


@pytest.mark.parametrize(
    ("predicted", "found"),
    [
        ((5.2, 6.0), 1),  # the start at the collar of 0.2 s
        ((4.8, 6.0), 1),
        ((5.21, 6.0), 0),
        ((5.0, 6.2), 1),  # the end: 20 % of 1 s are 0.2 s
        ((5.0, 6.21), 0),
        ((5.0, 5.8), 1),
    ],
)
def test_collars_of_a_short_event(predicted, found):
    assert matches([(5.0, 6.0)], [predicted]) == found


def test_the_end_of_a_long_event_may_be_off_by_a_fifth_of_it_its_start_may_not():
    assert matches([(10, 20)], [(10.1, 22)]) == 1
    assert matches([(10, 20)], [(10.1, 22.1)]) == 0
    assert matches([(10, 20)], [(10.3, 20)]) == 0


def test_each_event_has_one_partner_and_as_many_as_can_have_one():
    """The first event would take the second's only partner if it came first."""
    assert matches([(0.2, 1.2), (0.0, 1.0)], [(0.1, 1.1), (0.3, 1.3)]) == 2
    assert matches([(0.0, 1.0)], [(0.0, 1.0), (0.1, 1.1)]) == 1
    assert matches([(0.0, 1.0), (0.1, 1.1)], [(0.05, 1.0)]) == 1
    assert matches([], [(0, 1)]) == matches([(0, 1)], []) == matches([], []) == 0


def test_matching_against_all_pairings():
    from itertools import permutations

    generator = np.random.default_rng(0)
    for _ in range(30):
        reference, predicted = (np.sort(generator.uniform(0, 1.2, (4, 1)), 0) + [0.0, 1.0] for _ in range(2))
        fits = (np.abs(reference[:, None, 0] - predicted[:, 0]) <= 0.2) & (
            np.abs(reference[:, None, 1] - predicted[:, 1]) <= 0.2
        )
        assert count_matches(reference, predicted) == max(
            fits[range(4), order].sum() for order in permutations(range(4))
        )


def test_event_f1_by_hand():
    """a: 2 of 3 found by 3 predictions, b: none of 1, c: predicted once, d: nowhere."""
    reference = spans_of((0, 1), (2, 3), (4, 5)) + spans_of((0, 1), label="b")
    predicted = spans_of((0.1, 1), (2, 3.1), (4.5, 5)) + spans_of((6, 7), label="c")
    counts = event_counts(reference, predicted, "abcd")
    assert counts.tolist() == [[2, 3, 3], [0, 1, 0], [0, 0, 1], [0, 0, 0]]
    np.testing.assert_allclose(f1(counts), [2 / 3, 0, 0, np.nan])
    micro, macro = micro_macro(counts)
    assert micro == pytest.approx(2 * 2 / (4 + 4))
    assert macro == pytest.approx(2 / 9)  # without d


def test_segment_f1_by_hand():
    """Segments of 1 s. a: true in 0, 1, 2 and 5, predicted in 1, 2, 3; b: a point in 4, predicted there."""
    reference = spans_of((0.9, 2.5), (5.0, 5.4)) + spans_of((4.0, 4.0), label="b")
    predicted = spans_of((1.5, 3.1)) + spans_of((4.2, 4.3), label="b")
    counts = segment_counts(reference, predicted, "ab", 5.4)
    assert counts.tolist() == [[2, 4, 3], [1, 1, 1]]
    assert micro_macro(counts) == (pytest.approx(2 * 3 / 9), pytest.approx((4 / 7 + 1) / 2))


def test_a_span_that_ends_with_a_segment_is_not_in_the_next():
    assert segment_counts(spans_of((1.0, 2.0)), [], "a", 4.0).tolist() == [[0, 1, 0]]


@pytest.mark.parametrize(
    ("reference", "predicted", "expected"),
    [([], [], 1.0), ([(0, 1)], [], 0.0), ([], [(0, 1)], 0.0), ([(0, 1)], [(2, 3)], 0.0), ([(0, 1)], [(0, 1)], 1.0)],
)
def test_edges(reference, predicted, expected):
    """Where nothing is there to be found and nothing is said, all is right."""
    sides = spans_of(*reference), spans_of(*predicted)
    assert micro_macro(event_counts(*sides, "a")) == (expected, expected)
    assert micro_macro(segment_counts(*sides, "a", 4.0)) == (expected, expected)


def test_scores_of_recordings_together():
    generator = np.random.default_rng(0)
    recordings = [
        Recording(
            str(n), 2.0, generator.random((20, 2)).astype(np.float32), spans_of((0.5, 1.0)), [Event(0.5, 1, "a", 1)]
        )
        for n in range(2)
    ]
    scores = score(recordings, "ab", PLAIN)
    assert scores["event"].tolist() == [[2, 2, 2], [0, 0, 0]]
    true = np.tile([False] * 5 + [True] * 5 + [False] * 10, 2)
    values = np.concatenate([recording.probabilities[:, 0] for recording in recordings])
    assert scores["average_precision"][0] == average_precision_score(true, values)
    assert np.isnan(scores["average_precision"][1])


def test_thresholds_are_those_that_find_the_events():
    """a sounds at .3 over a floor of .2, b never: it keeps 0.5. With a tie the nearest to 0.5 is taken."""
    text = "2222233333222223333322222"
    frames = np.concatenate([probabilities(text), probabilities("9" * 25)], 1)
    reference = spans_of((0.5, 1.0), (1.5, 2.0))
    chosen = choose_thresholds([Recording("r", 2.5, frames, reference)], ["a", "b"], PLAIN, Decoding())
    assert chosen == {"a": 0.3, "b": 0.5}
    clear = np.where(frames[:, :1] > 0.25, 0.9, 0.1).astype(np.float32)
    assert choose_thresholds([Recording("r", 2.5, clear, reference)], ["a"], PLAIN, Decoding()) == {"a": 0.5}


def test_a_decoding_is_plain_json():
    decoding = Decoding({"a": 0.3}, 0.2, 0.1, 0.0)
    assert Decoding(**decoding.to_dict()) == decoding
