"""Classes from labels alone, label budgets, what is skipped by name, scores, and a toy set learned by heart."""

import json
import shutil

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score

import run_finetune
from acoustic.config import parse_finetuning
from acoustic.console import UserError
from acoustic.data.headers import Header, Skip
from acoustic.data.sources import open_rows
from acoustic.predict import load_predictor
from acoustic.report.record import read_json
from acoustic.tasks.classification import Classification, ClassificationScores

LIMITS = type("Limits", (), {"min_duration_in_seconds": 0.1, "max_duration_in_seconds": 2.0})


@pytest.fixture
def task(rows_of):
    return Classification(rows_of("label", ["fan", "pump", "pump", "gear", "gear"]), None)


def test_classes_are_sorted_and_counted(task):
    assert task.classes == ["fan", "gear", "pump"]
    assert task.encode({"label": "pump"}) == 2
    assert task.notes()[0] == "3 classes: fan 1, gear 2, pump 2"


def test_a_class_with_one_clip_is_warned_of(task, rows_of):
    assert any(note.startswith("warning: a single clip of 'fan'") for note in task.notes())
    assert len(Classification(rows_of("label", ["a", "a", "b", "b"]), None).notes()) == 1


def test_numbers_are_labels_too(rows_of):
    assert Classification(rows_of("label", [3, 11, 3]), None).classes == ["11", "3"]


@pytest.mark.parametrize(
    ("labels", "words"), [([None, ""], "has no labels"), (["a", "a", None], "a single class, 'a'")]
)
def test_nothing_to_learn(rows_of, labels, words):
    with pytest.raises(UserError, match=words):
        Classification(rows_of("label", labels), None)


@pytest.mark.parametrize("train", [True, False])
def test_clips_without_a_known_class_are_skipped_with_their_reason(task, train):
    task.mask_length = 10
    plan = task.plan(LIMITS, lambda seconds: int(50 * seconds), train)
    header = Header(frames=16000, rate=16000, channels=1)
    assert len(list(plan({"label": "fan"}, header, np.random.default_rng(0)))) == 1
    with pytest.raises(Skip, match="shorter than one frame of the model"):
        plan({"label": "fan"}, Header(frames=300, rate=16000, channels=1), None)
    with pytest.raises(Skip, match="class 'valve' is not among the training classes"):
        plan({"label": "valve"}, header, None)
    with pytest.raises(Skip, match="no label"):
        plan({"label": None}, header, None)


@pytest.fixture
def folder(audio_folder):
    return audio_folder([f"{name}/{index}.wav" for name in ("a", "b") for index in range(6)], seconds=0.2)


def test_a_label_budget_is_drawn_by_the_seed(folder):
    rows = open_rows(str(folder), "train")

    def names(seed):
        task = Classification(rows, None)
        chosen = task.subset(rows, 2, seed)
        assert task.counts == {"a": 2, "b": 2}
        return [chosen[index]["name"] for index in range(len(chosen))]

    assert names(0) == names(0)
    assert len({tuple(names(seed)) for seed in range(5)}) > 1
    assert [name[0] for name in names(0)] == ["a", "a", "b", "b"]


def test_a_label_budget_that_is_not_there(folder):
    rows = open_rows(str(folder), "train")
    with pytest.raises(UserError, match="labels_per_class: 7 asked for, 'a' has 6 clips"):
        Classification(rows, None).subset(rows, 7, 0)


def test_scores_on_a_case_by_hand():
    scores = ClassificationScores(keep_in_memory=True).compute(predictions=[0, 0, 1, 2], references=[0, 1, 1, 2])
    assert scores["accuracy"] == 0.75
    assert scores["macro_f1"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)


def test_a_class_that_occurs_nowhere_does_not_count():
    references, predictions = [0, 0, 2, 2], [0, 2, 2, 2]
    scores = ClassificationScores(keep_in_memory=True).compute(predictions=predictions, references=references)
    assert scores["macro_f1"] == pytest.approx(f1_score(references, predictions, labels=[0, 2], average="macro"))


def test_mistakes_are_shown_first_the_surest_on_top(task):
    logits = torch.tensor([[9.0, 0, 0], [0, 9.0, 0], [0, 3.0, 0]])
    batch = {"names": ["right", "sure", "unsure"], "labels": torch.tensor([0, 2, 2])}
    shown = task.readable(task.predictions(logits, batch))
    assert [item["name"] for item in shown] == ["sure", "unsure", "right"]
    assert (shown[0]["prediction"], shown[0]["reference"]) == ("gear", "pump")


def test_a_long_clip_is_the_mean_of_its_parts(task):
    header = Header(frames=80_000, rate=16_000, channels=1)  # 5 s, in parts of at most 2
    task.mask_length = 0
    parts = list(
        task.plan(LIMITS, lambda seconds: int(50 * seconds), False)({"label": "pump", "name": "x"}, header, None)
    )
    assert [(part.start, part.stop) for part in parts] == [(0, 26_666), (26_666, 53_333), (53_333, 80_000)]
    assert len(list(task.plan(LIMITS, lambda seconds: int(50 * seconds), True)({"label": "pump"}, header, None))) == 1
    logits = torch.tensor([[4.0, 0, 0], [0, 3.0, 0], [0, 3.0, 0], [0, 0, 1.0], [0, 1.0, 0]])
    batches = [
        (["x", "x"], slice(0, 2)),
        (["x", "y", "y"], slice(2, 5)),
    ]  # of one clip in two batches; twins of a name
    windows = []
    for names, part in batches:
        batch = {"names": names, "labels": torch.ones(len(names), dtype=int), "alone": [name == "y" for name in names]}
        windows += task.predictions(logits[part], batch)
    assert task.metrics(windows)["accuracy"] == pytest.approx(2 / 3)
    assert [item["name"] for item in task.last] == ["x", "y", "y"]
    np.testing.assert_allclose(task.last[0]["scores"], logits[:3].softmax(-1).mean(0), rtol=1e-6)
    assert task.readable(task.last)[1] == {
        "name": "x",
        "prediction": "gear",
        "reference": "gear",
        "score": pytest.approx(0.6, abs=0.1),
    }


def test_uneven_classes_are_said(rows_of):
    notes = Classification(rows_of("label", ["a"] * 12 + ["b"] * 2), None).notes()
    assert any("12 clips of 'a' and 2 of 'b'" in note for note in notes)
    assert not any(
        "accuracy hides" in note for note in Classification(rows_of("label", ["a", "a", "b"]), None).notes()
    )


def test_the_padding_does_not_change_a_prediction(layer_norm_checkpoint, rows_of, audio_folder):
    """A short clip beside a long one, and alone: the same logits where the model takes an attention mask."""
    task = Classification(rows_of("label", ["a", "b"]), None)
    model_args, _, _ = parse_finetuning(
        ["--model_name_or_path", layer_norm_checkpoint, "--dataset_name", "x", "--output_dir", "x"]
    )
    model, feature_extractor, _ = task.build(model_args, False, None)
    clips = [torch.randn(9000).numpy(), torch.randn(16000).numpy()]
    with torch.no_grad():
        together, alone = (
            model.eval()(**feature_extractor(given, sampling_rate=16000, padding=True, return_tensors="pt")).logits[0]
            for given in (clips, clips[:1])
        )
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-4)


def test_three_tones_are_learned_by_heart(sound, labeled_folder, finetune_args, tmp_path, capsys):
    """And clips of a class that training never saw are named, not scored."""
    pitches = {"low": 200, "middle": 800, "high": 3000}
    clips = {
        f"{split}/{name}/{index}.wav": sound([pitch * (1 + 0.01 * index)], 0.5, index)
        for name, pitch in pitches.items()
        for split, count in (("train", 5), ("test", 3))
        for index in range(count)
    }
    clips["test/unknown/0.wav"] = sound([1500], 0.5, 0)
    argv = finetune_args(
        "classification",
        labeled_folder(clips),
        eval_split_name="test",
        test_split_name="test",
        random_weights=True,
        learning_rate=3e-3,
        max_steps=60,
        eval_steps=30,
        config_overrides={"mask_time_prob": 0.0},
    )
    results = run_finetune.main(argv)
    assert results["test_accuracy"] == 1.0
    assert results["test_macro_f1"] == 1.0
    assert {"confusion_test.png", "by_class_test.png"} <= {path.name for path in (tmp_path / "out/figures").iterdir()}
    assert len(read_json(tmp_path / "out" / "predictions_test.json")["predictions"]) == 9
    skipped = read_json(tmp_path / "out" / "data_report.json")["splits"]["test"]["skipped_recordings"]
    assert skipped["unknown/0.wav"] == "class 'unknown' is not among the training classes"
    assert "low 5, middle 5" in capsys.readouterr().out


def test_a_held_out_split_of_unknown_classes_only_is_one_line(sound, labeled_folder, finetune_args):
    clips = {f"train/{name}/0.wav": sound([500], 0.3, 0) for name in "ab"} | {"test/c/0.wav": sound([500], 0.3, 0)}
    with pytest.raises(UserError, match="none of the held-out clips can be used"):
        run_finetune.main(finetune_args("classification", labeled_folder(clips), eval_split_name="test"))


def test_nothing_is_left_of_the_task_before(group_norm_checkpoint, audio_folder, finetune_args, tmp_path):
    """One class for a clip, from a model that was trained for several, with thresholds and filters."""
    before = shutil.copytree(group_norm_checkpoint, tmp_path / "before")
    config = read_json(before / "config.json")
    config |= {"problem_type": "multi_label_classification", "thresholds": [0.1, 0.2], "segmentation": {"a": 1}}
    (before / "config.json").write_text(json.dumps(config))
    folder = audio_folder([f"{kind}/{number}.wav" for kind in ("high", "low") for number in range(3)], seconds=0.5)
    run_finetune.main(finetune_args("classification", folder, model_name_or_path=before))
    config = read_json(tmp_path / "out" / "config.json")
    assert not {"thresholds", "segmentation"} & set(config) and config.get("problem_type") is None
    answer = load_predictor(str(tmp_path / "out")).answer
    assert "prediction" in answer(None, iter([(None, torch.tensor([1.0, 0.0]))]))
