"""A linear probe on frozen embeddings: how well a few labels are told apart, by cross-validation, layer by layer."""

import warnings

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import RidgeClassifierCV
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

PENALTIES = tuple(np.logspace(-1, 5, 13))
FOLDS = 5


def probe_accuracies(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(clips, layers, features) and (clips,) -> (layers,): a ridge classifier's accuracy on clips that it hasn't seen.

    The mean over FOLDS folds, always the same ones; the penalty is chosen within each. Ridge, because its
    leave-one-out errors have a closed form: all of this takes a moment.
    """
    folds = StratifiedKFold(min(FOLDS, np.unique(labels, return_counts=True)[1].min()), shuffle=True, random_state=0)
    classifier = make_pipeline(StandardScaler(), RidgeClassifierCV(PENALTIES))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        layers = values.swapaxes(0, 1)
        return np.array([cross_val_score(classifier, layer, labels, cv=folds).mean() for layer in layers])
