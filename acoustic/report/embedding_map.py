"""Embeddings as points on a plane, where neighbours stay neighbours: t-SNE (van der Maaten 2008). Distances between
far groups, and the size of groups, mean nothing in it."""

from collections import Counter
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler

from acoustic.report.figures import ACCENT, FAINT, INK, STYLE

# More points can't be told apart, and take minutes; of more classes the commonest are named.
MAX_POINTS, MAX_CLASSES = 2000, 10
COLORS = (INK, ACCENT, "#7fa3c7", "#3a7d44", "#8e5572", "#c9a227", "#1b998b", "#6c757d", "#b0413e", "#5b5ea6")
MARKERS = "osD^vP*X<>"  # so that classes are told apart in black and white
PCA_DIMENSIONS = 50


def draw_map(path: Path, values: np.ndarray, labels: list[str | None], title: str) -> Path:
    """
    Args:
        values: (recordings, width), at least three.
        labels: of each, None where there is none.
    """
    chosen = np.arange(len(values))
    if len(values) > MAX_POINTS:
        chosen = np.sort(np.random.default_rng(0).choice(len(values), MAX_POINTS, replace=False))
    values, labels = scaled(values[chosen]), [labels[index] for index in chosen]
    points, classes = on_a_plane(values), [name for name, _ in Counter(filter(None, labels)).most_common(MAX_CLASSES)]
    with plt.rc_context({**STYLE, "axes.grid": False, "axes.spines.left": False, "axes.spines.bottom": False}):
        figure, axis = plt.subplots(figsize=(6.5, 5), layout="constrained")
        rest = np.array([label not in classes for label in labels])
        if rest.any():
            style = {"s": 14, "color": FAINT, "marker": ".", "linewidths": 0}
            axis.scatter(*points[rest].T, label="others" if classes else None, **style)
        for name, color, marker in zip(classes, COLORS, MARKERS):
            mine = np.array([label == name for label in labels])
            axis.scatter(*points[mine].T, s=18, color=color, marker=marker, linewidths=0, alpha=0.8, label=name)
        axis.set_xticks([])
        axis.set_yticks([])
        share = alike(values, labels)
        axis.set_title(title + ("" if share is None else f"\nthe nearest other one is of the same class: {share:.0%}"))
        if classes:
            figure.legend(loc="outside right center")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, bbox_inches="tight", facecolor="white")
        plt.close(figure)
    return path


def scaled(values: np.ndarray) -> np.ndarray:
    """What all recordings share says nothing."""
    values = StandardScaler().fit_transform(values)
    most = min(PCA_DIMENSIONS, *values.shape)
    return PCA(most, random_state=0).fit_transform(values) if values.shape[1] > most else values


def on_a_plane(values: np.ndarray) -> np.ndarray:
    perplexity = min(30.0, (len(values) - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(values)


def alike(values: np.ndarray, labels: list[str | None]) -> float | None:
    """How many have a nearest neighbour of their own class, in all dimensions; None without two classes."""
    if len(set(labels) - {None}) < 2:
        return None
    _, nearest = NearestNeighbors(n_neighbors=2).fit(values).kneighbors(values)
    same = [labels[index] == label for label, (_, index) in zip(labels, nearest) if label is not None]
    return float(np.mean(same))
