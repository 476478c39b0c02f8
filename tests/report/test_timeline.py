"""Figures of spans: what is drawn of them, and that odd ones can be drawn."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from acoustic.report import timeline

pytestmark = pytest.mark.figures


@pytest.fixture
def drawn(monkeypatch):
    """The figure just before it is saved: drawn["figure"]."""
    kept = {}

    def save(figure, output_dir, name):
        kept.update(figure=figure, name=name)
        figure.canvas.draw()
        return name

    monkeypatch.setattr(timeline, "save", save)
    yield kept
    plt.close("all")


def example(seconds=4.0, start=0.0, rate=8000, **changed) -> dict:
    waveform = np.random.default_rng(0).standard_normal(round(seconds * rate)).astype(np.float32)
    found = {"name": "a.wav", "score": 0.5, "waveform": waveform, "rate": rate, "start": start}
    return {**found, "reference": [(1.0, 2.0, "pump")], "predicted": [(1.1, 2.5, "fan")], **changed}


def bars(axis) -> list[tuple[float, float, str]]:
    """(start, stop, kind) of the bars in a panel, by what they look like in black and white."""
    return [
        (bar.get_x(), round(bar.get_x() + bar.get_width(), 3), "predicted" if bar.get_hatch() else "true")
        for bar in axis.patches
    ]


def test_a_row_for_each_class_that_occurs(drawn):
    timeline.timelines("x", "test", [example(), example(name="b.wav")], ["fan", "gear", "pump"])
    sound, spans, _, others = drawn["figure"].axes
    assert drawn["name"] == "timeline_test"
    assert [label.get_text() for label in spans.get_yticklabels()] == ["fan", "pump"]
    assert bars(spans) == bars(others) == [(1.0, 2.0, "true"), (1.1, 2.5, "predicted")]
    assert "a.wav: segment F1 0.50" in sound.get_title(loc="left")
    assert sound.images and spans.get_xlim() == (0, 4)


def test_a_stretch_of_a_long_recording(drawn):
    """Spans are cut to it, those elsewhere are left out, and a point is wide enough to be seen."""
    reference = [(0.0, 11.0, "pump"), (12.0, 12.0, "pump"), (20.0, 30.0, "gear")]
    shown = example(start=10.0, reference=reference, predicted=[(13.0, 99.0, "pump")])
    timeline.timelines("x", "test", [shown], ["fan", "gear", "pump"])
    spans = drawn["figure"].axes[1]
    assert [label.get_text() for label in spans.get_yticklabels()] == ["pump"]
    assert bars(spans) == [(10.0, 11.0, "true"), (12.0, 12.008, "true"), (13.0, 14.0, "predicted")]


@pytest.mark.parametrize("seconds", [0.01, 200.0])
def test_nothing_sounds_and_any_length(drawn, seconds):
    timeline.timelines("x", "test", [example(seconds, reference=[], predicted=[])], ["fan"])
    assert bars(drawn["figure"].axes[1]) == []
    assert drawn["figure"].axes[0].images[0].get_array().shape[1] <= timeline.MAX_COLUMNS


def test_f1_by_class(drawn):
    """The best above, NaN last; the numbers stand at the bars."""
    by_class = {"event": np.array([0.2, np.nan, 0.9]), "segment": np.array([0.5, np.nan, 1.0])}
    timeline.scores_by_class("x", "test", ["fan", "gear", "pump"], by_class, np.array([5, 0, 7]))
    (axis,) = drawn["figure"].axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["pump (7)", "fan (5)", "gear (0)"]
    assert [text.get_text() for text in axis.texts] == ["0.90", "0.20", "none", "1.00", "0.50", "none"]


def test_many_classes_and_odd_names(drawn):
    names = [f"$class_{number}$ \udce4 {'x' * 50}" for number in range(60)]
    values = {"event": np.linspace(0, 1, 60), "segment": np.ones(60)}
    timeline.scores_by_class("x", "test", names, values, np.ones(60, int))
    (axis,) = drawn["figure"].axes
    assert len(axis.get_yticklabels()) == timeline.MAX_BARS and "20 classes more" in axis.get_title()
    spans = [(0.1, 0.2, name) for name in names]
    timeline.timelines("x", "test", [example(reference=spans, name=names[0])], names)
    assert len(drawn["figure"].axes[1].get_yticklabels()) == timeline.MAX_ROWS
