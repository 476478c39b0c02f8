"""Several classes at once: every form of a label, the loss and the thresholds by naive loops, and a run on tones."""

import csv
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from datasets import ClassLabel, Features, Sequence, Value
from sklearn.metrics import f1_score
from transformers import pipeline
from transformers.modeling_outputs import SequenceClassifierOutput

import run_finetune
from acoustic.console import UserError
from acoustic.data.columns import DatasetRow
from acoustic.data.sources import open_rows
from acoustic.report.record import read_json
from acoustic.tasks import Classification, MultiLabel, make_task
from acoustic.tasks.multilabel import (
    DEFAULT_THRESHOLD,
    MultiLabelScores,
    average_precisions,
    best_threshold,
    choose_thresholds,
    has_several,
    labels_of,
)

LABELS = [["fan", "pump"], ["pump"], [], ["fan"], ["gear", "fan"]]
PITCHES = {"low": 300, "middle": 900, "high": 2700}
RATE = 16_000


@pytest.fixture
def task(rows_of):
    return MultiLabel(rows_of("label", LABELS), None)


# ---- labels


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("fan|pump", ["fan", "pump"]),
        (" fan | pump ", ["fan", "pump"]),
        ("fan", ["fan"]),
        ("", []),
        ([], []),
        (["fan", "fan"], ["fan"]),
        ([3, 1], ["3", "1"]),
        (None, None),
    ],
)
def test_what_a_label_names(value, expected):
    assert labels_of(value) == expected


@pytest.mark.parametrize(
    ("labels", "several"), [(["a", "b|c"], True), (["a", ["b"]], True), (["a", "b", None, ""], False), ([3, 4], False)]
)
def test_several_at_once_are_seen_in_the_labels(rows_of, labels, several):
    rows = rows_of("label", labels)
    assert has_several(rows) == several
    assert type(make_task("classification", rows, None)) is (MultiLabel if several else Classification)


@pytest.fixture
def table(tmp_path, sound):
    """write(name, columns) -> a data set of three clips with those columns, as csv or jsonl."""

    def write(name: str, columns: list[dict]):
        for index in range(len(columns)):
            soundfile.write(tmp_path / f"{index}.wav", sound([500], 0.3, index), RATE)
        lines = [{"file_name": f"{index}.wav", **values} for index, values in enumerate(columns)]
        path = tmp_path / name
        if path.suffix == ".jsonl":
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        else:
            with open(path, "w", newline="") as file:
                writer = csv.DictWriter(file, list(lines[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
                writer.writeheader()
                writer.writerows(lines)
        return str(path)

    return write


WANTED = [["fan", "pump"], ["pump"], []]
COLUMNS = [{"fan": fan, "pump": pump} for fan, pump in ((1, 1), (0, 1), (0, 0))]


@pytest.mark.parametrize(
    ("name", "columns", "label_column"),
    [
        ("train.jsonl", [{"on": labels} for labels in WANTED], "on"),
        ("train.csv", [{"on": "|".join(labels)} for labels in WANTED], "on"),
        ("train.tsv", COLUMNS, ("fan", "pump")),
        ("train.jsonl", COLUMNS, ("fan", "pump")),
        ("train.jsonl", [{"fan": bool(c["fan"]), "pump": bool(c["pump"])} for c in COLUMNS], ("fan", "pump")),
    ],
)
def test_a_list_a_text_or_several_columns(table, name, columns, label_column):
    rows = open_rows(table(name, columns), "train", label_column=label_column)
    assert [labels_of(label) for label in rows.columns("label")] == WANTED
    task = make_task("classification", rows, None)
    assert task.classes == ["fan", "pump"]
    assert [task.encode({"label": label}) for label in rows.columns("label")] == [[1, 1], [0, 1], [0, 0]]


def test_class_numbers_of_a_data_set_become_names():
    features = Features({"audio": Value("string"), "on": Sequence(ClassLabel(names=["fan", "pump"]))})
    row = DatasetRow("audio", {"label": "on"}, features, "a set", None, is_ours=True)
    assert row({"audio": "x.wav", "on": [1, 0]}, 0)["label"] == ["pump", "fan"]


def test_a_column_that_says_something_else(table):
    path = table("train.csv", [{"fan": 1, "pump": "loud"}])
    with pytest.raises(UserError, match="label_column_name: column 'pump' has 'loud'; .* must be 0 or 1"):
        list(open_rows(path, "train", label_column=("fan", "pump")).columns("label"))
    with pytest.raises(UserError, match="label_column_name: .* has no column 'valve'"):
        open_rows(path, "train", label_column=("fan", "valve"))


def test_a_cell_without_an_answer_is_no_label(table, task):
    path = table("train.csv", [{"fan": 1, "pump": ""}, {"fan": 0, "pump": 1}])
    labels = list(open_rows(path, "train", label_column=("fan", "pump")).columns("label"))
    assert labels == [None, ["pump"]]
    assert task.refuse(None) == "no label"
    assert task.refuse([]) is None


def test_no_class_at_all(rows_of):
    with pytest.raises(UserError, match="no class is there in any clip"):
        MultiLabel(rows_of("label", [[], []]), None)


def test_notes(task, rows_of):
    assert task.notes()[0] == "several classes at once: 3 in 5 clips, 1 with none: fan 3, gear 1, pump 2"
    assert "gear 4.0" in task.notes()[1]
    rare = MultiLabel(rows_of("label", [["a", "b"]] * 40 + [["a"]] * 60 + [["c"]] * 2), None)
    torch.testing.assert_close(rare.positive_weights(), torch.tensor([0.1, 62 / 40, 10.0]))


def test_classes_that_training_never_saw_are_left_out_and_said(task, rows_of):
    assert task.unseen({"test": rows_of("label", [["fan", "valve"], None]), "other": None}) == [
        "warning: test: 'valve', which training never saw, are left out of the scores"
    ]
    assert task.encode({"label": ["fan", "valve"]}) == [1, 0, 0]


# ---- budgets


@pytest.fixture
def many(audio_folder, tmp_path):
    folder = audio_folder([f"{index}.wav" for index in range(30)], seconds=0.2)
    generator = np.random.default_rng(0)
    lines = [
        {"file_name": f"{index}.wav", "on": [name for name in "abc" if generator.random() < 0.4]}
        for index in range(30)
    ]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return open_rows(str(folder), "train", label_column="on")


def test_a_budget_has_enough_of_each_class_and_is_part_of_a_larger_one(many):
    def draw(budget, seed):
        task = MultiLabel(many, None)
        chosen = task.subset(many, budget, seed)
        labels = [chosen[index]["label"] for index in range(len(chosen))]
        counts = {name: sum(name in label for label in labels) for name in "abc"}
        assert counts == dict(task.counts) and min(counts.values()) >= budget and task.num_clips == len(labels)
        return {chosen[index]["name"] for index in range(len(chosen))}

    for seed in range(4):
        assert draw(1, seed) < draw(3, seed) < draw(6, seed)
    assert draw(3, 0) == draw(3, 0)
    assert len({frozenset(draw(2, seed)) for seed in range(5)}) > 1
    assert len(draw(1, 0)) <= 3
    with pytest.raises(UserError, match="labels_per_class: 29 asked for, 'a' has"):
        MultiLabel(many, None).subset(many, 29, 0)


# ---- loss and scores


def test_the_loss_is_that_of_a_naive_loop(task):
    logits, labels = torch.randn(4, 3), torch.randint(0, 2, (4, 3)).float()
    task.weights = task.positive_weights()
    expected = 0.0
    for clip in range(4):
        for index in range(3):
            p = 1 / (1 + math.exp(-logits[clip, index].item()))
            weight = task.weights[index].item()
            expected -= (weight * math.log(p) if labels[clip, index] else math.log(1 - p)) / 3
    loss = task.summed_loss(SequenceClassifierOutput(logits=logits), labels, task.count_targets(labels))
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_average_precision_on_a_case_by_hand():
    scores = np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]])
    precision = average_precisions(scores, np.array([[1, 0], [0, 0], [1, 0]]))
    assert precision[0] == pytest.approx((1 + 2 / 3) / 2) and math.isnan(precision[1])


def test_the_threshold_is_the_best_of_all():
    generator = np.random.default_rng(0)
    for _ in range(20):
        scores, truth = generator.random(30).round(2), generator.integers(0, 2, 30)
        chosen = f1_score(truth, scores >= best_threshold(scores, truth))
        best = max(f1_score(truth, scores >= t) for t in np.linspace(-0.005, 1.005, 203) if (scores >= t).any())
        assert chosen == pytest.approx(best)
    assert best_threshold(np.array([0.1, 0.9]), np.array([0, 1])) == 0.5
    assert choose_thresholds(np.array([[0.3], [0.2]]), np.zeros((2, 1), int)) == [DEFAULT_THRESHOLD]


def test_a_class_that_occurs_nowhere_does_not_count():
    given = {"predictions": [[0.9, 0.2], [0.1, 0.9]], "references": [[1, 0], [0, 0]], "thresholds": [0.5, 0.95]}
    assert MultiLabelScores(keep_in_memory=True).compute(**given) == {"map": 1.0, "micro_f1": 1.0, "macro_f1": 1.0}


# ---- a run


@pytest.fixture
def chords(sound, tmp_path):
    """Clips of one, two, three or no tone at once; a label is the list of those that sound."""
    generator = np.random.default_rng(1)
    for split, count in (("train", 40), ("validation", 12), ("test", 12)):
        lines = []
        for index in range(count):
            names = [name for name in PITCHES if generator.random() < 0.5]
            seconds = 1.2 if split == "test" and index % 2 else 0.5  # longer than a window
            wave = sum(
                (sound([PITCHES[name] * generator.uniform(0.97, 1.03)], seconds, index) for name in names),
                np.zeros(int(seconds * RATE), np.float32),
            )
            path = tmp_path / "chords" / split / f"{index}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, wave / 2 + 0.003 * generator.standard_normal(len(wave)), RATE)
            lines.append({"file_name": path.name, "on": names})
        path.with_name("metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "chords"


def test_a_threshold_chosen_on_a_few_clips_is_doubted(rows_of, capsys):
    task = make_task("classification", rows_of("label", ["often|seldom", "often"]), None)
    task.config = SimpleNamespace()
    truth = [[1, 1]] * 2 + [[1, 0]] * 3 + [[0, 0]] * 3

    def evaluate() -> dict:
        task.last = [{"scores": np.array(row) * 0.6 + 0.2, "reference": row} for row in truth]
        return {"eval_map": 1.0}

    chosen, doubt = task.settle(evaluate)
    assert chosen.endswith("(F1 of each class): often 0.5, seldom 0.5")
    assert doubt == "heard in fewer than 5 held-out clips, so its threshold is luck: seldom (2)"
    assert doubt in capsys.readouterr().out and task.config.thresholds == [0.5, 0.5]


def test_chords_are_taken_apart(chords, finetune_args, layer_norm_checkpoint, tmp_path, capsys):
    argv = finetune_args(
        "classification",
        chords,
        model_name_or_path=layer_norm_checkpoint,
        label_column_name="on",
        eval_split_name="validation",
        test_split_name="test",
        random_weights=True,
        learning_rate=3e-3,
        max_steps=80,
        eval_steps=80,
        max_duration_in_seconds=0.6,
        config_overrides={"mask_time_prob": 0.0},
    )
    results = run_finetune.main(argv)
    assert results["test_map"] > 0.95 and results["test_micro_f1"] > 0.85
    out = tmp_path / "out"
    printed = capsys.readouterr().out
    assert "several classes at once: 3 in 40 clips" in printed and "thresholds, chosen on the held-out part" in printed
    config = read_json(out / "config.json")
    assert config["problem_type"] == "multi_label_classification" and len(config["thresholds"]) == 3
    shown = read_json(out / "predictions_test.json")["predictions"]
    assert len(shown) == 12 and set(shown[0]) == {"name", "prediction", "reference", "scores"}
    wrong = [set(item["prediction"]) != set(item["reference"]) for item in shown]
    assert wrong == sorted(wrong, reverse=True)
    assert (out / "figures" / "by_class_test.png").is_file()
    # As transformers' pipeline has it: a probability for each class by itself.
    clip = next(item for item in shown if item["name"].endswith("/0.wav") or item["name"] == "0.wav")
    waveform, rate = soundfile.read(chords / "test" / "0.wav", dtype="float32")
    answers = pipeline("audio-classification", str(out), device="cpu")({"raw": waveform, "sampling_rate": rate})
    for answer in answers:
        assert answer["score"] == pytest.approx(clip["scores"][answer["label"]], abs=2e-3)
