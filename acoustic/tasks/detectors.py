"""How far from normal: distances to embeddings of normal sounds, brought to one scale, averaged, and calibrated.

Nothing here has ever met an anomaly, so nothing can say which layer or which distance is the best one to find some.
Layers are averaged instead, each on the scale of what it gives for normal sounds that it was not fitted on.
"""

from collections.abc import Callable

import numpy as np
from sklearn.covariance import ledoit_wolf
from sklearn.model_selection import GroupKFold
from sklearn.neighbors import LocalOutlierFactor, NearestNeighbors

FOLDS, MIN_GROUPS = 10, 5
NEIGHBOURS = 5  # of the mean distance
DENSITY_NEIGHBOURS = 20  # of the local density: scikit-learn's default; Breunig et al. 2000 advise 10 or more
# An embedding's value that hardly varies among normal sounds isn't divided by less than this share of the others'.
LEAST_SCALE = 1e-3
LEAST_DISTANCE, LEAST_SPREAD = 1e-9, 1e-6


class Mahalanobis:
    """Distance from the mean under the normal embeddings' covariance, with the shrinkage of Ledoit and Wolf (2004).

    The shrinkage makes the covariance invertible however few embeddings there are for their size; no direction is cut
    off, as principal components would, and what lies outside of all normal sounds' span counts most.

    Args:
        whitening: (features, features) float32; its product with its transpose is the covariance's inverse.
    """

    names = ("whitening",)

    def __init__(self, whitening: np.ndarray):
        self.whitening = whitening

    @classmethod
    def fit(cls, reference: np.ndarray) -> "Mahalanobis":
        covariance, _ = ledoit_wolf(reference.astype(np.float64), assume_centered=True)
        # A factor of the inverse, and not the inverse: rounding it to float32 keeps distances to five digits.
        return cls(np.linalg.inv(np.linalg.cholesky(covariance)).T.astype(np.float32))

    def distances(self, values: np.ndarray) -> np.ndarray:
        """(embeddings, features), standardised -> (embeddings,)."""
        return np.linalg.norm(values.astype(np.float64) @ self.whitening, axis=1)


class MeanNeighbourDistance:
    """Mean Euclidean distance to the five nearest normal embeddings."""

    names = ("reference",)

    def __init__(self, reference: np.ndarray):
        self.reference = reference
        count = min(NEIGHBOURS, len(reference))
        self.neighbours = NearestNeighbors(n_neighbors=count, algorithm="brute").fit(reference)

    @classmethod
    def fit(cls, reference: np.ndarray) -> "MeanNeighbourDistance":
        return cls(reference)

    def distances(self, values: np.ndarray) -> np.ndarray:
        return self.neighbours.kneighbors(values)[0].astype(np.float64).mean(1)


class LocalDensity:
    """The local outlier factor (Breunig et al. 2000): how much sparser it is here than around the neighbours."""

    names = ("reference",)

    def __init__(self, reference: np.ndarray):
        self.reference = reference
        count = min(DENSITY_NEIGHBOURS, len(reference) - 1)
        self.factor = LocalOutlierFactor(n_neighbors=count, novelty=True, algorithm="brute").fit(reference)

    @classmethod
    def fit(cls, reference: np.ndarray) -> "LocalDensity":
        return cls(reference)

    def distances(self, values: np.ndarray) -> np.ndarray:
        return -self.factor.score_samples(values).astype(np.float64)


KINDS = {"mahalanobis": Mahalanobis, "knn": MeanNeighbourDistance, "lof": LocalDensity}


class Distances:
    """One distance or several, of one layer's embedding or several's, from what is normal.

    Args:
        members: (layer, kind) of each distance.
        scaling: layer -> (mean, deviation), (features,) float32 each: what standardises its embeddings.
        fitted: (layer, kind) -> an object of `KINDS`.
    """

    def __init__(self, members: list[tuple[int, str]], scaling: dict, fitted: dict):
        self.members, self.scaling, self.fitted = [tuple(member) for member in members], scaling, fitted
        self.layers = layers_of(self.members)

    @classmethod
    def fit(cls, values: np.ndarray, members: list[tuple[int, str]]) -> "Distances":
        """values: (embeddings, layers, features) of normal sounds, the layers those of the members, ascending."""
        scaling, fitted = {}, {}
        for place, layer in enumerate(layers_of(members)):
            scaling[layer] = standard(values[:, place])
            reference = standardise(values[:, place], *scaling[layer])
            for kind in (kind for other, kind in members if other == layer):
                fitted[layer, kind] = KINDS[kind].fit(reference)
        return cls(members, scaling, fitted)

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """(embeddings, layers, features) -> (embeddings, members) float64."""
        columns = {}
        for place, layer in enumerate(self.layers):
            standardised = standardise(values[:, place], *self.scaling[layer])
            for kind in (kind for other, kind in self.members if other == layer):
                columns[layer, kind] = self.fitted[layer, kind].distances(standardised)
        return np.stack([columns[member] for member in self.members], 1)

    def tensors(self) -> dict[str, np.ndarray]:
        """All numbers that `from_tensors` needs, by name."""
        found = {}
        for layer, (mean, deviation) in self.scaling.items():
            found |= {f"{layer}.mean": mean, f"{layer}.deviation": deviation}
        for (layer, _), distance in self.fitted.items():
            found |= {f"{layer}.{name}": getattr(distance, name) for name in distance.names}
        return found

    @classmethod
    def from_tensors(cls, members: list[tuple[int, str]], tensors: dict[str, np.ndarray]) -> "Distances":
        """Neighbours and densities are looked up anew among the same embeddings, so they are the same."""
        layers = layers_of(members)
        scaling = {layer: (tensors[f"{layer}.mean"], tensors[f"{layer}.deviation"]) for layer in layers}
        fitted = {
            (layer, kind): KINDS[kind](*(tensors[f"{layer}.{name}"] for name in KINDS[kind].names))
            for layer, kind in members
        }
        return cls(members, scaling, fitted)


class Detector:
    """Scores: 0 is an average normal sound, 1 a normal sound's standard deviation more; percentiles of normal.

    Each member's distance is put on the scale of normal sounds: its logarithm, less the median over them, divided by
    the deviation over them. A score is the mean over the members, on its own scale of normal sounds. All of these, and
    the scores that a percentile refers to, are cross-validated: of sounds that were not fitted on, as all sounds are
    that come later. (Each fold is fitted on a little less, so they are a little too high, and percentiles too low.)

    Args:
        distances: fitted on all normal sounds; the first members are averaged, others only stand beside them.
        scales: (members + 1, 2): median and deviation over normal sounds, of each member and of the mean.
        normal: cross-validated scores, ascending.
        averaged: how many of the members.
    """

    def __init__(self, distances: Distances, scales: np.ndarray, normal: np.ndarray, averaged: int):
        self.distances, self.scales, self.normal, self.averaged = distances, scales, normal, averaged

    @classmethod
    def fit(
        cls,
        values: np.ndarray,
        groups: list,
        members: list[tuple[int, str]],
        beside: list[tuple[int, str]] = (),
        step: Callable[[], object] = lambda: None,
    ) -> "Detector":
        """
        Args:
            values: (embeddings, layers, features) of normal sounds, in the order of time within a recording; the
                layers are those of the members, ascending.
            groups: for each the recording that it is from; what is of one recording is held out together.
            members: (layer, kind) of the distances to average.
            beside: of others in the same layers, that have a score of their own.
            step: called after each of `count_fits(groups)` fits.
        """
        fitted = [*members, *(member for member in beside if member not in members)]
        logs = np.zeros((len(values), len(fitted)))
        for fitting, held_out in divide(groups):
            logs[held_out] = to_log(Distances.fit(values[fitting], fitted)(values[held_out]))
            step()
        scales = scale_of(logs)
        means = to_scale(logs, scales)[:, : len(members)].mean(1, keepdims=True)
        scales = np.concatenate([scales, scale_of(means)])
        normal = np.sort(to_scale(means, scales[-1:])[:, 0])
        detector = cls(Distances.fit(values, fitted), scales, normal, len(members))
        step()
        return detector

    @property
    def members(self) -> list[tuple[int, str]]:
        """Those that are averaged, and then those beside them."""
        return self.distances.members

    def member_scores(self, values: np.ndarray) -> np.ndarray:
        """(embeddings, layers, features) -> (embeddings, members): each distance's own score."""
        return to_scale(to_log(self.distances(values)), self.scales[:-1])

    def scores(self, member_scores: np.ndarray) -> np.ndarray:
        """(embeddings, members) -> (embeddings,)."""
        return to_scale(member_scores[:, : self.averaged].mean(1, keepdims=True), self.scales[-1:])[:, 0]

    def percentiles(self, scores: np.ndarray) -> np.ndarray:
        """The share of normal sounds whose score is lower, in percent: of normal sounds all values are as likely."""
        return 100 * np.searchsorted(self.normal, scores) / len(self.normal)

    def only_averaged(self) -> "Detector":
        """Without those beside."""
        kept = self.members[: self.averaged]
        distances = Distances(kept, self.distances.scaling, {member: self.distances.fitted[member] for member in kept})
        return Detector(distances, self.scales[[*range(self.averaged), -1]], self.normal, self.averaged)

    def tensors(self) -> dict[str, np.ndarray]:
        return {**self.distances.tensors(), "scales": self.scales, "normal": self.normal}

    @classmethod
    def from_tensors(cls, members: list[tuple[int, str]], tensors: dict[str, np.ndarray]) -> "Detector":
        """What `only_averaged().tensors()` gave."""
        return cls(Distances.from_tensors(members, tensors), tensors["scales"], tensors["normal"], len(members))


def layers_of(members: list[tuple[int, str]]) -> list[int]:
    return sorted({layer for layer, _ in members})


def standard(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(embeddings, features) -> mean and deviation, (features,) float32 each; no deviation is next to nothing."""
    mean, deviation = values.mean(0, dtype=np.float64), values.std(0, dtype=np.float64)
    deviation = np.maximum(deviation, LEAST_SCALE * np.median(deviation))
    return mean.astype(np.float32), np.where(deviation > 0, deviation, 1).astype(np.float32)


def standardise(values: np.ndarray, mean: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    return (values.astype(np.float32) - mean) / deviation


def to_log(distances: np.ndarray) -> np.ndarray:
    """A copy of a normal sound is at distance 0."""
    return np.log(np.maximum(distances, LEAST_DISTANCE))


def scale_of(logs: np.ndarray) -> np.ndarray:
    """(embeddings, members) -> (members, 2): median, and the deviation of a normal distribution with these quartiles.

    So a few anomalies among the normal sounds, or copies at distance 0, don't matter.
    """
    low, middle, high = np.percentile(logs, (25, 50, 75), axis=0)
    return np.stack([middle, np.maximum((high - low) / 1.349, LEAST_SPREAD)], 1)


def to_scale(logs: np.ndarray, scales: np.ndarray) -> np.ndarray:
    return (logs - scales[:, 0]) / scales[:, 1]


def divide(groups: list) -> list[tuple[np.ndarray, np.ndarray]]:
    """(fitting, held out) of each fold: by recording; of a few recordings by stretches of time, in their order."""
    indices, names = np.arange(len(groups)), np.unique(groups)
    if len(names) >= MIN_GROUPS:
        folds = GroupKFold(min(FOLDS, len(names))).split(indices, groups=groups)
        return list(folds)
    parts = np.array_split(indices, min(FOLDS, len(groups)))
    return [(np.setdiff1d(indices, part), part) for part in parts]


def count_fits(groups: list) -> int:
    return len(divide(groups)) + 1
