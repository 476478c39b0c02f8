"""Every figure of task anomaly is drawn, also of few clips, many machines and odd names; and says what there is."""

from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest

from acoustic.report import anomaly

pytestmark = pytest.mark.figures


def check(path, shape_at_least=(300, 300)) -> np.ndarray:
    """A PNG of some size that shows more than white."""
    assert path.suffix == ".png" and path.parent.name == "figures"
    pixels = plt.imread(path)[..., :3]
    assert pixels.shape[0] >= shape_at_least[0] and pixels.shape[1] >= shape_at_least[1]
    assert 0.005 < (pixels.min(-1) < 0.95).mean() < 0.95
    assert not plt.get_fignums()  # closed, or a long sweep would run out of memory
    return pixels


def make_clips(normal, wrong, machine=None, label="leak") -> list:
    def clip(score, label):
        return SimpleNamespace(window=SimpleNamespace(score=score), label=label, machine=machine)

    return [clip(score, "normal") for score in normal] + [clip(score, label) for score in wrong]


@pytest.fixture
def draw():
    return np.random.default_rng(0).normal


def test_histograms_of_the_kinds_that_there_are(tmp_path, draw):
    groups = {"normal": draw(size=80), "anomalous": draw(4, size=30), "unlabeled": draw(size=3)}
    all_of_them = check(anomaly.score_histograms(str(tmp_path), "test", groups))
    one = check(anomaly.score_histograms(str(tmp_path), "test", {"anomalous": np.array([3.0])}))
    assert all_of_them.shape != one.shape or np.abs(all_of_them - one).mean() > 1e-3


def test_a_single_huge_score_leaves_the_rest_visible(tmp_path, draw):
    """What lies beyond is in the last bar: the other bars are as wide as without it."""
    groups = {"normal": draw(size=200), "anomalous": np.array([1e6])}
    huge = check(anomaly.score_histograms(str(tmp_path), "test", groups))
    blue = (np.abs(huge - np.array([0.47, 0.54, 0.6])).max(-1) < 0.06).any(0).mean()
    assert blue > 0.4


def test_clips_by_kind_and_by_fault(draw):
    clips = make_clips([0, 1], [2], "fan") + make_clips([0], [3], "pump", "hum") + make_clips([], [1], "gear", "lone")
    clips += [SimpleNamespace(window=SimpleNamespace(score=9.0), label=None, machine="fan")]
    assert {kind: len(scores) for kind, scores in anomaly.groups_of(clips, "normal").items()} == {
        "normal": 3,
        "anomalous": 3,
        "unlabeled": 1,
    }
    faults = anomaly.by_fault([clip for clip in clips if clip.label], "normal")
    assert {fault: len(found) for fault, found in faults.items()} == {"leak": 3, "hum": 2}


def test_roc_curves_of_many_machines(tmp_path, draw):
    def curve(shift):
        return anomaly.rates(make_clips(draw(size=20), draw(shift, size=20)), "normal")

    some = {"all clips": {"all": curve(2)}, "by fault": {"leak": curve(1), "hum $3": curve(3)}}
    check(anomaly.roc_curves(str(tmp_path), "test", some), (400, 700))
    many = {"by machine": {"all": curve(1), **{f"machine {n}": curve(n / 10) for n in range(20)}}}
    check(anomaly.roc_curves(str(tmp_path), "test", many), (400, 400))


def test_the_rates_are_those_of_the_scores():
    false_alarms, hits = anomaly.rates(make_clips([0.0, 2.0], [1.0, 3.0]), "normal")
    points = set(zip(false_alarms.tolist(), hits.tolist()))
    assert {(0.0, 0.5), (0.5, 0.5), (0.5, 1.0), (1.0, 1.0)} <= points


@pytest.mark.parametrize("layers", [1, 13])
def test_the_sweep_of_layers(tmp_path, layers):
    kinds = ("mahalanobis", "knn", "lof")
    found = [
        {"layer": layer, "detector": kind, "auc": 0.6 + 0.02 * layer - 0.05 * place}
        for layer in range(layers)
        for place, kind in enumerate(kinds)
    ]
    check(anomaly.sweep(str(tmp_path), "test", found, 0.7))


def example(count: int, wrong: int, name="clip.wav", **about) -> dict:
    noise = np.random.default_rng(count)
    scores = np.where(np.arange(count) == wrong, 9.0, 0.5)
    return {
        "name": name,
        "machine": None,
        "label": None,
        "spectrogram": noise.normal(size=(64, 50 * count)),
        "edges": (3 + 0.5 * np.arange(count + 1)).tolist(),
        "scores": scores.tolist(),
        "alarm": 2.0,
        **about,
    }


@pytest.mark.parametrize("count", [1, 4])
def test_the_most_anomalous_clips(tmp_path, count):
    examples = [example(8, n, "a $b_c$.wav", machine="fan", label="leak") for n in range(count)]
    check(anomaly.most_anomalous(str(tmp_path), "test", examples), (300, 350))


def test_where_a_clip_sounds_wrong_is_to_be_seen(tmp_path):
    first, last = (check(anomaly.most_anomalous(str(tmp_path), "test", [example(8, wrong)])) for wrong in (0, 7))
    assert first.shape == last.shape
    changed = np.abs(first - last).max(-1)[first.shape[0] // 2 :] > 0.1
    width = changed.shape[1]
    assert changed[:, : width // 3].any() and changed[:, -width // 3 :].any()
    assert not changed[:, int(0.45 * width) : int(0.6 * width)].any()


def test_a_segment_is_marked_where_it_is_above_the_alarm(tmp_path):
    def accent(examples):
        pixels = check(anomaly.most_anomalous(str(tmp_path), "test", examples))
        return (np.abs(pixels - np.array([0xD1, 0x60, 0x3D]) / 255).max(-1) < 0.08).sum()

    assert accent([example(8, 3)]) > 50 + accent([example(8, 3, alarm=9.0)])  # a spectrogram has such colours too
