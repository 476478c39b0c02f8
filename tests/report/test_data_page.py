"""The page is drawn for odd data sets too: one file, silence, nothing decoded, many kinds, strange names."""

import warnings

import matplotlib.pyplot as plt
import numpy as np
import pytest

from acoustic.report import data_page
from acoustic.report.data_page import draw_page, largest, shorten

pytestmark = pytest.mark.figures

SOUND = {"level": -20.0, "clipped": 0.0, "silent": 0.1, "bandwidth": 3000.0, "rate": 16_000}
SPECTRUM = {"hz": [0.0, 4000.0, 8000.0], "db": [0.0, -20.0, -60.0]}


def numbers(**changed) -> dict:
    one = {"recordings": 10, "hours": 0.5}
    return {
        "settings": {"min_duration_in_seconds": 1.0, "max_duration_in_seconds": 15.6},
        "lengths": {"edges": [0.5, 1.0, 2.0, 20.0], "recordings": [1, 5, 4], "hours": [0.1, 0.2, 0.2]},
        "rates": {16_000: one},
        "channels": {1: one},
        "formats": {"wav": one},
        "recordings": 10,
        "looked_at": 10,
        "skipped": 0,
        "skipped_by_reason": {},
        "findings": [],
        "sample": {"sounds": [SOUND, {**SOUND, "level": -40.0}], "spectra": {16_000: SPECTRUM}},
        **changed,
    }


def examples(count: int, rate: int = 16_000, seconds: float = 1.0, name: str = "a.wav") -> list[dict]:
    waveform = np.random.default_rng(0).standard_normal(round(rate * seconds)).astype(np.float32)
    return [{"name": name, "seconds": seconds, "rate": rate, "waveform": waveform}] * count


MANY = {n: {"recordings": 1 + n, "hours": 0.1} for n in range(8000, 8012)}
ODD = {
    "one file": (
        numbers(lengths={"edges": [1.0, 1.26], "recordings": [1], "hours": [0.001]}, recordings=1),
        examples(1, 8000, 0.01),
    ),
    "stream": (numbers(recordings=None), examples(2)),
    "silence": (
        numbers(sample={"sounds": [{**SOUND, "level": -100.0, "silent": 1.0, "bandwidth": None}], "spectra": {}}),
        [{**examples(1)[0], "waveform": np.zeros(16_000)}],
    ),
    "nothing decoded": (numbers(sample={"sounds": [], "spectra": {}}), []),
    "many kinds": (
        numbers(
            rates=MANY,
            channels={n: MANY[8000 + n] for n in range(12)},
            formats={f"f{n}": MANY[8000 + n] for n in range(12)},
            sample={"sounds": [{**SOUND, "rate": r} for r in MANY], "spectra": dict.fromkeys(MANY, SPECTRUM)},
            skipped_by_reason={f"reason {n} " * 9: MANY[8000 + n] for n in range(12)},
            findings=["a finding that takes more than one line of the panel, as many of them do " * 2] * 20,
        ),
        examples(6, 96_000),
    ),
    "names": (
        numbers(skipped_by_reason={"$x_1$ \\n": {"recordings": 1}}, findings=["$a_ $ \\udce9"]),
        examples(6, name="caf\\xe9 $x_1$ " + "日本" * 40),
    ),
}


@pytest.mark.parametrize("case", ODD)
def test_it_is_drawn(case, tmp_path, monkeypatch):
    content, some = ODD[case]
    monkeypatch.setitem(data_page.STYLE, "figure.dpi", 40)  # faster
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = draw_page(str(tmp_path), content, some, "data $x_1$", "1 h   ·   10 recordings")
    assert path == tmp_path / "figures" / "data.png"
    height, width, _ = plt.imread(path).shape
    assert 0.9 * 40 * 13.5 < width < 1.1 * 40 * 13.5 and height < 1.1 * 40 * 10.2  # nothing sticks out


def test_the_texts_stay_inside(tmp_path, monkeypatch):
    """No text of a panel is cut off by the page, and the length panel holds the numbers that it was given."""
    kept = {}
    monkeypatch.setattr(data_page, "save", lambda figure, *_: kept.update(figure=figure))
    draw_page(str(tmp_path), *ODD["many kinds"], "title", "headline")
    figure = kept["figure"]
    figure.canvas.draw()
    for axis in figure.axes:
        for text in axis.texts:
            box = text.get_window_extent()
            assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 * 1.01 and box.y0 >= 0, text.get_text()
    assert [bar.get_height() for bar in figure.axes[0].patches] == ODD["many kinds"][0]["lengths"]["hours"]
    plt.close(figure)


def test_long_lists_and_texts_are_shortened():
    assert shorten("abcdefghijklmno", 9) == "abc...mno" and shorten("abc", 9) == "abc"
    assert largest({"a": 5, "b": 4, "c": 3, "d": 2}, 3) == {"a": 5, "b": 4, "2 others": 5}
