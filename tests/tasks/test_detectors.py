"""Distances equal to naive ones and to scikit-learn's; percentiles are uniform on normal sounds that come later."""

import numpy as np
import pytest
from scipy.stats import kstest
from sklearn.covariance import LedoitWolf
from sklearn.neighbors import LocalOutlierFactor

from acoustic.tasks.detectors import KINDS, Detector, Distances, count_fits, divide, standard, standardise

ALL = [(layer, kind) for layer in (0, 3) for kind in KINDS]


def draw(count: int, seed: int, features: int = 6, layers: int = 1) -> np.ndarray:
    """(count, layers, features) of correlated features with different means and scales."""
    generator = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(features, features))
    values = generator.normal(size=(count, layers, features)) @ mixing * np.logspace(-2, 2, features) + 5
    return values.astype(np.float32)


def one_by_one(count: int) -> list[str]:
    return [f"{number:04d}" for number in range(count)]


def scaled(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mean, deviation = train.astype(np.float64).mean(0), train.astype(np.float64).std(0)
    return (train - mean) / deviation, (test - mean) / deviation


@pytest.mark.parametrize("count", [200, 5])
def test_mahalanobis_is_that_of_the_shrunk_covariance(count):
    """Also with fewer embeddings than features."""
    train, test = draw(count, 0)[:, 0], draw(9, 1)[:, 0]
    near, far = scaled(train, test)
    model = LedoitWolf().fit(near)
    found = Distances.fit(train[:, None], [(0, "mahalanobis")])(test[:, None])[:, 0]
    np.testing.assert_allclose(found, np.sqrt(model.mahalanobis(far)), rtol=2e-4)
    by_hand = [np.sqrt(row @ np.linalg.inv(model.covariance_) @ row) for row in far]
    np.testing.assert_allclose(found, by_hand, rtol=2e-4)


def test_what_lies_outside_of_the_normal_span_counts_most():
    train = np.random.default_rng(0).normal(size=(200, 1, 20)).astype(np.float32)
    train[..., 10:] = train[..., :10]  # 10 directions in which normal sounds don't vary
    mean, deviation = standard(train[:, 0])
    inside, outside = np.ones(20), np.repeat([1, -1], 10)
    test = (mean + deviation * np.stack([inside, outside]))[:, None].astype(np.float32)
    distances = Distances.fit(train, [(0, "mahalanobis")])(test)[:, 0]
    assert distances[1] > 2 * distances[0]


def test_mean_distance_to_the_five_nearest():
    train, test = draw(40, 0)[:, 0], draw(9, 1)[:, 0]
    near, far = scaled(train, test)
    by_hand = [np.sort(np.linalg.norm(near - row, axis=1))[:5].mean() for row in far]
    found = Distances.fit(train[:, None], [(0, "knn")])(test[:, None])[:, 0]
    np.testing.assert_allclose(found, by_hand, rtol=1e-4)


def naive_lof(train: np.ndarray, row: np.ndarray, k: int) -> float:
    """Breunig et al. 2000, definitions 3 to 7, of a new point."""
    apart = np.linalg.norm(train[:, None] - train, axis=-1)
    np.fill_diagonal(apart, np.inf)
    nearest = np.argsort(apart, axis=1)[:, :k]
    reach = np.sort(apart, axis=1)[:, k - 1]

    def density(distances, neighbours):
        return 1 / np.mean(np.maximum(distances[neighbours], reach[neighbours]))

    densities = np.array([density(apart[index], nearest[index]) for index in range(len(train))])
    distances = np.linalg.norm(train - row, axis=1)
    mine = np.argsort(distances)[:k]
    return densities[mine].mean() / density(distances, mine)


def test_local_outlier_factor():
    train, test = draw(60, 0)[:, 0], draw(9, 1)[:, 0]
    near, far = scaled(train, test)
    found = Distances.fit(train[:, None], [(0, "lof")])(test[:, None])[:, 0]
    np.testing.assert_allclose(found, [naive_lof(near, row, 20) for row in far], rtol=1e-4)
    library = LocalOutlierFactor(n_neighbors=20, novelty=True).fit(near)
    np.testing.assert_allclose(found, -library.score_samples(far), rtol=1e-4)


def test_few_embeddings_have_fewer_neighbours():
    train, test = draw(4, 0), draw(3, 1)
    assert np.isfinite(Distances.fit(train, [(0, kind) for kind in KINDS])(test)).all()


def test_a_feature_that_is_constant_or_nearly_so_is_not_blown_up():
    train = np.random.default_rng(0).normal(size=(50, 1, 5)).astype(np.float32)
    train[..., 1] = 7.0
    train[..., 2] = 7.0 + 1e-6 * train[..., 2]
    mean, deviation = standard(train[:, 0])
    test = train[:3, 0] + [0, 1e-3, 1e-3, 0, 0]
    assert np.abs(standardise(test, mean, deviation)).max() < 10
    assert deviation[1] > 0


@pytest.mark.parametrize("members", [[(0, kind)] for kind in KINDS] + [[(0, kind) for kind in KINDS]], ids=str)
def test_percentiles_are_uniform_on_normal_sounds_that_come_later(members):
    train, later = draw(300, 0), draw(600, 1)
    detector = Detector.fit(train, one_by_one(300), members)
    percentiles = detector.percentiles(detector.scores(detector.member_scores(later)))
    assert kstest(percentiles / 100, "uniform").pvalue > 0.01
    assert 0.02 < (percentiles > 95).mean() < 0.09


def test_also_of_embeddings_of_more_features_than_there_are():
    """Where a detector's own training sounds all look normal to it, and later ones look wrong."""
    train, later = draw(60, 0, features=80), draw(600, 1, features=80)
    detector = Detector.fit(train, one_by_one(60), [(0, "mahalanobis")])
    scores, own = (detector.scores(detector.member_scores(values)) for values in (later, train))
    assert 0.01 < (detector.percentiles(scores) > 95).mean() < 0.12
    assert (scores > np.percentile(own, 95)).mean() > 0.5


def test_a_percentile_is_the_share_of_normal_sounds_below():
    detector = Detector.fit(draw(60, 0), one_by_one(60), [(0, "knn")])
    scores = detector.scores(detector.member_scores(draw(20, 1)))
    by_hand = [100 * np.mean(detector.normal < score) for score in scores]
    np.testing.assert_allclose(detector.percentiles(scores), by_hand)
    assert detector.percentiles(np.array([-1e9, 1e9])).tolist() == [0, 100]


def test_what_is_of_one_recording_is_held_out_together():
    """Ten windows of each recording are all but copies: only other recordings say how far a new one is."""

    def recordings(count, seed):
        noise = np.random.default_rng(seed + 7).normal(size=(count * 10, 1, 6)) * np.logspace(-4, 0, 6)
        return (np.repeat(draw(count, seed), 10, axis=0) + noise).astype(np.float32)

    train, later = recordings(30, 0), recordings(30, 1)
    names = np.repeat(one_by_one(30), 10).tolist()
    medians = []
    for groups in (names, one_by_one(300)):
        detector = Detector.fit(train, groups, [(0, "knn")])
        medians.append(np.median(detector.percentiles(detector.scores(detector.member_scores(later)))))
    assert 25 < medians[0] < 75
    assert medians[1] > 95


@pytest.mark.parametrize("groups", [one_by_one(30), ["a"] * 30, ["a", "b"] * 15, ["a", "b", "c", "d", "e", "f"] * 5])
def test_everything_is_held_out_once(groups):
    folds = divide(groups)
    assert np.sort(np.concatenate([held_out for _, held_out in folds])).tolist() == list(range(30))
    assert all(not set(fitting) & set(held_out) and len(fitting) for fitting, held_out in folds)
    assert count_fits(groups) == len(folds) + 1
    if len(set(groups)) > 4:
        assert all(not {groups[i] for i in fitting} & {groups[i] for i in held_out} for fitting, held_out in folds)


def test_no_layer_and_no_kind_weighs_more_than_another():
    """The mean doesn't change where a layer is a thousand times as loud."""
    train, test = draw(60, 0, layers=2), draw(9, 1, layers=2)
    found = []
    for factor in (1, 1024):
        loud = np.array([1, factor], np.float32)[:, None]
        detector = Detector.fit(train * loud, one_by_one(60), ALL)
        found.append(detector.scores(detector.member_scores(test * loud)))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-3, atol=1e-3)


def test_scores_are_on_the_scale_of_normal_sounds():
    detector = Detector.fit(draw(400, 0, layers=2), one_by_one(400), ALL)
    members = detector.member_scores(draw(2000, 1, layers=2))
    for scores in (*members.T, detector.scores(members)):
        assert abs(np.median(scores)) < 0.25
        assert 0.8 < (np.percentile(scores, 75) - np.percentile(scores, 25)) / 1.349 < 1.25


def test_copies_among_the_normal_sounds_do_no_harm():
    train = np.concatenate([draw(40, 0), draw(40, 0)[:12]])
    detector = Detector.fit(train, one_by_one(52), [(0, kind) for kind in KINDS])
    scores = detector.scores(detector.member_scores(np.concatenate([draw(5, 1), draw(5, 1) + 100])))
    assert np.isfinite(scores).all()
    assert scores[5:].min() > scores[:5].max()


def test_the_same_bits_from_its_tensors():
    detector = Detector.fit(draw(60, 0, layers=2), one_by_one(60), ALL)
    again = Detector.from_tensors(ALL, {name: value.copy() for name, value in detector.tensors().items()})
    test = draw(30, 1, layers=2)
    assert (detector.member_scores(test) == again.member_scores(test)).all()
    members = detector.member_scores(test)
    assert (detector.scores(members) == again.scores(members)).all()
    assert (detector.percentiles(detector.scores(members)) == again.percentiles(again.scores(members))).all()


def test_what_stands_beside_changes_nothing():
    """Another kind of distance is measured as well, and is no part of the score, nor of what is saved."""
    train, test = draw(60, 0, layers=2), draw(30, 1, layers=2)
    alone = Detector.fit(train, one_by_one(60), ALL[:1] + ALL[3:4])
    watched = Detector.fit(train, one_by_one(60), ALL[:1] + ALL[3:4], beside=ALL)
    assert watched.members[:2] == alone.members == [(0, "mahalanobis"), (3, "mahalanobis")]
    assert sorted(watched.members) == sorted(ALL)
    members = watched.member_scores(test)
    assert (watched.scores(members) == alone.scores(alone.member_scores(test))).all()
    again = Detector.from_tensors(alone.members, watched.only_averaged().tensors())
    assert (again.scores(again.member_scores(test)) == watched.scores(members)).all()
    assert set(again.tensors()) == set(alone.tensors())
