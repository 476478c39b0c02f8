"""Every figure is drawn, also from short and patchy histories."""

from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest

from acoustic.report import figures

pytestmark = pytest.mark.figures

HISTORY = [
    entry
    for step in range(1, 40)
    for entry in (
        {
            "step": step,
            "loss": 4 / step,
            "contrastive_loss": 4 / step,
            "accuracy": step / 50,
            "code_perplexity": 5.0 * step,
            "grad_norm": 1.0,
            "learning_rate": 1e-4 * step,
            "audio_seconds_per_second": 90.0,
            "hours_seen": step / 10,
            "encoder_frozen": float(step < 20),
        },
        {"step": step, "eval_contrastive_loss": 3.9, "eval_accuracy": 0.1, "eval_loss": 4.0, "eval_wer": 1 / step},
    )
]


def check(path, shape_at_least=(300, 300)):
    """A PNG of some size that shows more than white."""
    assert path.suffix == ".png" and path.parent.name == "figures"
    pixels = plt.imread(path)[..., :3]
    assert pixels.shape[0] >= shape_at_least[0] and pixels.shape[1] >= shape_at_least[1]
    ink = (pixels.min(-1) < 0.95).mean()
    assert 0.005 < ink < 0.9
    assert not plt.get_fignums()  # closed, or a long sweep would run out of memory
    return pixels


FACTS = SimpleNamespace(
    num_negatives=100, num_codes=640, num_groups=2, fewest_codes=6.4, chance_loss=4.6, chance_accuracy=0.01
)
FAMILIES = list(figures.ABOUT)
# What the objectives log beside wav2vec 2.0.
OTHERS = {
    **{f"accuracy_{step}": 0.5 / step for step in range(1, 13)},
    "reconstruction_loss": 0.5,
    "mean_predictor_loss": 0.8,
    "unigram_loss": 5.0,
}


def pretraining(folder, history, family="contrastive", facts=FACTS, reference=()):
    return figures.pretraining_curves(str(folder), figures.Curves(history, facts, reference), family)


def test_the_recipe_s_own_run_lies_below(tmp_path):
    alone, beside = pretraining(tmp_path / "a", HISTORY), pretraining(tmp_path / "b", HISTORY, reference=HISTORY)
    assert np.abs(check(alone, (500, 900)) - check(beside, (500, 900))).mean() > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_the_curves_of_every_family(tmp_path, family):
    history = [{**entry, **(OTHERS if "loss" in entry else {})} for entry in HISTORY]
    drawn = check(pretraining(tmp_path, history, family), (500, 900))
    empty = check(pretraining(tmp_path, [], family), (500, 900))
    assert drawn.shape != empty.shape or np.abs(drawn - empty).mean() > 1e-3


def test_accuracy_by_step_ahead(tmp_path):
    history = [{"step": 1, **OTHERS}, {"step": 1, **{f"eval_{name}": 0.9 * value for name, value in OTHERS.items()}}]
    check(figures.steps_ahead(str(tmp_path), history, 0.09))
    check(figures.steps_ahead(str(tmp_path), history[:1], 0.09))
    no_codes = SimpleNamespace(**{**vars(FACTS), "num_codes": 0})
    check(pretraining(tmp_path, history, "predictive", no_codes), (500, 900))


def test_reconstruction_shows_what_was_hidden(tmp_path):
    noise = np.random.default_rng(0)
    target = noise.normal(size=(120, 80))
    example = {"target": target, "prediction": target * 0.5, "hop_seconds": 0.01}
    drawn = {}
    for name, chosen in (("none", np.zeros(120, bool)), ("some", np.arange(120) % 10 < 3)):
        example |= {"input": np.where(chosen[:, None], 0, target), "chosen": chosen}
        drawn[name] = check(figures.reconstruction(str(tmp_path / name), example))
    assert drawn["none"].shape != drawn["some"].shape or np.abs(drawn["none"] - drawn["some"]).mean() > 1e-3


def test_code_usage(tmp_path):
    counts = np.random.default_rng(0).poisson(3, (2, 64)) * (np.arange(64) < 40)
    check(figures.code_usage(str(tmp_path), counts))
    check(figures.code_usage(str(tmp_path), np.zeros((1, 8), int)))


def test_pretraining_curves(tmp_path):
    drawn = check(pretraining(tmp_path, HISTORY), (500, 900))
    empty = check(pretraining(tmp_path, []), (500, 900))
    assert drawn.shape != empty.shape or np.abs(drawn - empty).mean() > 1e-3


@pytest.mark.parametrize("history", [HISTORY[:1], HISTORY[1:2], HISTORY[::2], []])
def test_short_and_patchy_histories(tmp_path, history):
    check(pretraining(tmp_path, history), (500, 900))
    check(figures.finetuning_curves(str(tmp_path), history, "wer"))


def test_finetuning_curves(tmp_path):
    two = check(figures.finetuning_curves(str(tmp_path), HISTORY, "wer"))
    one = check(figures.finetuning_curves(str(tmp_path), HISTORY, "accuracy_of_nothing"))
    assert two.shape[1] > 1.5 * one.shape[1]


def test_confusion_shades_by_the_rows_share(tmp_path):
    right = check(figures.confusion(str(tmp_path), "test", np.diag([90, 2]), ["often", "rare"]))
    wrong = check(figures.confusion(str(tmp_path), "test", np.array([[0, 90], [2, 0]]), ["often", "rare"]))
    assert np.abs(right[:300, :300] - wrong[:300, :300]).mean() > 0.01


def test_confusion_with_a_class_that_has_no_clip(tmp_path):
    check(figures.confusion(str(tmp_path), "test", np.array([[3, 0, 1], [0, 0, 0], [0, 0, 2]]), ["a", "b", "c"]))


@pytest.mark.parametrize("words", [[1], [1, 2, 2, 9], [40] * 3])
def test_error_by_length(tmp_path, words):
    scored = [{"reference": "word " * count, "wer": 0.3 * index} for index, count in enumerate(words)]
    check(figures.error_by_length(str(tmp_path), "test", scored))


def test_compare_starts(tmp_path):
    rows = [
        {"start": start, "budget": budget, "draw": draw, "test": 0.5 + 0.1 * draw, "shifted": 0.4}
        for start in ("random", "pretrained")
        for budget in (5, 10)
        for draw in range(3)
    ]
    rows += [{"start": "pretrained, fine-tuned", "budget": 5, "draw": 0, "test": 0.9, "shifted": 0.6}]
    starts = ("random", "pretrained", "pretrained, fine-tuned")
    check(figures.compare_starts(str(tmp_path), rows, starts, ("test", "shifted"), chance=0.2))
