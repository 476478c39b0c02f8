"""How many labels pretraining is worth: budgets, starts and draws alike for all, kept as they come, said in words."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

import run_finetune
from acoustic.console import UserError
from acoustic.tasks import attentive, ctc_probe
from acoustic.tasks.log_mel import LogMel
from acoustic.training import efficiency
from acoustic.training.efficiency import UNITS, Results, Start, name_starts, read_budgets, sentence
from acoustic.training.listening import MAX_FRAMES, fewer_frames
from acoustic.training.probing import Probing, Scores, Speech
from acoustic.training.worth import worth

KINDS = ("low", "high")
ACCURACY = Scores(("accuracy",), greater_is_better=True)
STARTS = [Start("random weights", "ours", random=True), Start("log-mel bands", None), Start("ours", "ours")]


@pytest.fixture
def data(audio_folder, tmp_path):
    """train, validation and test: a folder for each of two classes."""
    for split, count in (("train", 6), ("validation", 3), ("test", 3)):
        names = [f"{split}/{kind}/{number}.wav" for kind in KINDS for number in range(count)]
        audio_folder(names, seconds=0.5, root=tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def compare(data, layer_norm_checkpoint, tmp_path, monkeypatch):
    """compare(**options) -> what run_finetune.py returns; probes of a few updates."""
    monkeypatch.setattr(attentive, "UPDATES", 5)

    def run(**options):
        given = {"dataset_name": data, "model_name_or_path": layer_norm_checkpoint, "output_dir": tmp_path / "out"}
        given |= {"eval_split_name": "validation", "test_split_name": "test", "label_budgets": ["1", "3", "all"]}
        given |= {"max_steps": 2, "batch_seconds": 20, "use_cpu": "true", "disable_tqdm": "true", **options}
        argv = []
        for name, value in given.items():
            argv += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
        return run_finetune.main([*argv, "--report_to", "none", "--dataloader_num_workers", "0"])

    return run


def rows_of(way: str, start: str, scores: dict[str, list[float]]) -> list[dict]:
    return [
        {"way": way, "start": start, "budget": budget, "draw": draw, "learning_rate": 1e-3, "test": value}
        for budget, values in scores.items()
        for draw, value in enumerate(values)
    ]


LABELS, MINUTES = UNITS["label"], UNITS["text"]
# ours, the other's, what is said with "OTHER" for the other. Two draws but of "all".
GREATER = [
    # reached exactly at a budget, between two, hardly beyond, beyond the last, only with all, not even with all
    (
        {"1": [0.5, 0.6]},
        {"1": [0.4, 0.3], "5": [0.5, 0.6]},
        "with 1 label per class, pretraining is worth 5 with OTHER",
    ),
    (
        {"1": [0.5, 0.6], "4": [0.9, 0.9]},
        {"1": [0.4, 0.3], "4": [0.7, 0.8]},
        "with 1 label per class, pretraining is worth about 2 with OTHER",
    ),
    (
        {"5": [0.503, 0.503]},
        {"5": [0.501, 0.5], "20": [0.9, 0.9]},
        "with 5 labels per class, pretraining is worth hardly more than 5 with OTHER",
    ),
    (
        {"1": [0.5, 0.6], "5": [0.9, 0.8]},
        {"1": [0.6, 0.3], "5": [0.5, 0.6]},
        "beside OTHER, pretraining is better with 5 labels per class, the most that were tried, "
        "but with 1 label per class it is not better in every draw",
    ),
    (
        {"1": [0.7, 0.7], "5": [0.9, 0.9], "all": [0.9]},
        {"1": [0.4, 0.3], "5": [0.5, 0.6], "all": [0.7]},
        "with 1 label per class, pretraining is worth all of them with OTHER; with 5, more than all of them",
    ),
    (
        {"1": [0.7, 0.7]},
        {"1": [0.4, 0.3], "5": [0.5, 0.6], "all": [0.8]},
        "with 1 label per class, pretraining is worth more than 5, and less than all of them, with OTHER",
    ),
    (
        {"1": [0.7, 0.7], "all": [0.6]},
        {"1": [0.4, 0.3], "all": [0.69]},
        "with 1 label per class, pretraining is worth more than all of them with OTHER, "
        "but with all labels it is not better in every draw",
    ),
    # better with all alone; never sure; the same; worse; better, but not than fewer
    (
        {"1": [0.5, 0.6], "3": [0.5, 0.6], "all": [0.9]},
        {"1": [0.6, 0.3], "3": [0.6, 0.3], "all": [0.8]},
        "beside OTHER, pretraining is better with all labels, "
        "but with 1 and 3 labels per class it is not better in every draw",
    ),
    (
        {"1": [0.5, 0.6]},
        {"1": [0.5, 0.3]},
        "pretraining is not worth a label beside OTHER: with no budget is it better in every draw",
    ),
    (
        {"1": [0.5, 0.6], "all": [0.7]},
        {"1": [0.5, 0.6], "all": [0.7]},
        "beside OTHER, pretraining makes no difference: the scores are the same",
    ),
    (
        {"1": [0.5, 0.6], "5": [0.6, 0.6], "all": [0.7]},
        {"1": [0.6, 0.7], "5": [0.5, 0.7], "all": [0.8]},
        "pretraining is not worth a label beside OTHER: with no budget is it better in every draw, "
        "and with 1 label per class and all labels it is worse in every draw",
    ),
    (
        {"1": [0.5, 0.5], "5": [0.6, 0.6]},
        {"1": [0.7, 0.7], "5": [0.5, 0.5]},
        "beside OTHER, pretraining is better with 5 labels per class, but fewer do as well with OTHER",
    ),
]


@pytest.mark.parametrize("ours, other, said", GREATER)
@pytest.mark.parametrize("greater_is_better", [True, False])
def test_in_words(ours, other, said, greater_is_better):
    """The same is said of error rates: what is lower there is better."""
    if not greater_is_better:
        ours, other = ({key: [1 - v for v in values] for key, values in curve.items()} for curve in (ours, other))
    assert worth(ours, other, "OTHER", LABELS, greater_is_better) == said


def test_in_words_of_minutes():
    line = worth({"1": [0.9], "3": [0.5]}, {"1": [0.95], "3": [0.9], "10": [0.4]}, "a", MINUTES, False)
    assert line == "with 1 minute of labels, pretraining is worth 3 with a; with 3, about 7.9"
    line = worth({"0.5": [0.9], "3": [0.5]}, {"0.5": [0.8], "3": [0.9]}, "a", MINUTES, False)
    assert line == (
        "beside a, pretraining is better with 3 minutes of labels, the most that were tried, but with 0.5 minutes of "
        "labels it is not better in every draw"
    )


def test_error_rates_above_one():
    """Babble is no better than babble that is longer; nor worse than silence."""
    line = worth({"1": [7.3, 1.0]}, {"1": [7.4, 1.2]}, "a", MINUTES, False)
    assert line == "beside a, pretraining makes no difference: no error rate is below 1, that of an empty answer"
    line = worth({"1": [0.9, 0.9]}, {"1": [7.4, 1.2], "4": [0.85, 0.75]}, "a", MINUTES, False)
    assert line == "with 1 minute of labels, pretraining is worth about 2 with a"


def test_nothing_in_common_is_nothing_said():
    assert worth({"1": [0.5]}, {}, "a", LABELS) is None
    assert worth({"1": [0.5]}, {"5": [0.5]}, "a", LABELS) is None
    rows = rows_of("fine_tuned", "random weights", {"1": [0.5, 0.6]})
    assert sentence(rows, "fine_tuned", STARTS, "test", "accuracy", ACCURACY, LABELS) is None


def test_a_sentence_for_each_way():
    rows = rows_of("frozen", "ours", {"1": [0.5, 0.6]}) + rows_of("frozen", "random weights", {"1": [0.4, 0.5]})
    line = sentence(rows, "frozen", STARTS, "test", "accuracy", ACCURACY, LABELS)
    start = "test, accuracy, a probe on the frozen encoder: beside random weights, pretraining is better with 1 label"
    assert line == f"{start} per class, the most that were tried"
    single = sentence(rows[::2], "frozen", STARTS, "test", "accuracy", ACCURACY, LABELS)
    assert ", a single draw: " in single
    turned = sentence(rows, "frozen", STARTS[::-1], "test", "accuracy", ACCURACY, LABELS)
    assert turned.split(": ", 1)[1].startswith("random weights is not worth a label beside ours")


def test_starts_by_name():
    assert name_starts([], "mine/") == [
        Start("random weights", "mine/", random=True),
        Start("log-mel bands", None),
        Start("mine", "mine/"),
    ]
    assert [start.path for start in name_starts(["random", "base", "ours"], "ours")] == ["ours", "base", "ours"]
    with pytest.raises(UserError, match="one is named twice"):
        name_starts(["base", "base/"], "ours")


def test_budgets():
    assert read_budgets(["20", "all", "1", "5", "5"], LABELS, True) == [1, 5, 20, None]
    assert read_budgets(["10", "all", "0.5", "1", "1.0"], MINUTES, False) == [0.5, 1, 10, None]
    for text in ("0", "-1", "some", "1.5"):
        with pytest.raises(UserError, match="labels per class, or 'all'"):
            read_budgets([text], LABELS, True)
    for text in ("0", "nan", "inf", "some"):
        with pytest.raises(UserError, match="minutes of labels, or 'all'"):
            read_budgets([text], MINUTES, False)


def test_the_best_of_the_scores_in_either_direction():
    rates = Scores(("wer", "cer"), greater_is_better=False)
    found = [rates.columns("dev", {"wer": wer, "cer": cer}) for wer, cer in ((1.0, 0.8), (1.0, 0.7), (1.2, 0.1))]
    assert found[0] == {"dev": 1.0, "dev_cer": 0.8}
    assert max(found, key=lambda columns: rates.rank(columns, "dev")) is found[1]
    assert ACCURACY.rank({"test": 0.5}, "test") > ACCURACY.rank({"test": 0.4}, "test")


def test_frames_become_fewer_by_means_of_neighbours():
    layers = torch.arange(2 * 250 * 3, dtype=torch.float32).reshape(2, 250, 3)
    fewer = fewer_frames(layers)
    assert fewer.shape == (2, 84, 3) and fewer.shape[1] <= MAX_FRAMES
    torch.testing.assert_close(fewer[:, 0], layers[:, :3].mean(1))
    torch.testing.assert_close(fewer[:, -1], layers[:, 249])
    assert torch.equal(fewer_frames(layers[:, :100]), layers[:, :100])


def test_log_mel_hears_a_tone_in_its_band():
    time = torch.arange(8_000) / 16_000
    (low,), (high,) = (LogMel().layers([torch.sin(6.2832 * pitch * time).numpy()])[0] for pitch in (300, 3000))
    assert low.shape == (51, 64)
    assert low.mean(0).argmax() < high.mean(0).argmax()
    louder = LogMel().layers([(0.01 * torch.sin(6.2832 * 300 * time)).numpy()])[0][0]
    torch.testing.assert_close(louder, low, atol=1e-3, rtol=1e-3)


@pytest.mark.figures
def test_frozen_comparison(compare, tmp_path):
    """Every start, budget and draw once; clips of a budget alike for all starts; the figure; then nothing is left."""
    found = compare(adaptation=["frozen"], num_draws=2)
    keys = [(row["start"], row["budget"], row["draw"]) for row in found["rows"]]
    budgets = [("1", 0), ("1", 1), ("3", 0), ("3", 1), ("all", 0)]
    names = ("random weights", "log-mel bands", found["starts"][-1])
    assert sorted(keys) == sorted((name, *budget) for name in names for budget in budgets)
    assert all(0 <= row[split] <= 1 for row in found["rows"] for split in ("validation", "test"))
    assert found["splits"] == ["test"] and len(found["says"]) == 1
    assert Path(tmp_path, "out/figures/label_efficiency.png").stat().st_size > 10_000
    kept = json.loads(Path(tmp_path, "out/label_efficiency.json").read_text())
    assert kept["rows"] == found["rows"] and kept["says"] == found["says"]


def test_what_is_there_is_not_computed_again(compare, monkeypatch):
    first = compare(adaptation=["frozen"], num_draws=1, label_budgets=["1"])
    monkeypatch.setattr(efficiency, "probe_start", lambda *args, **kwargs: pytest.fail("computed again"))
    assert compare(adaptation=["frozen"], num_draws=1, label_budgets=["1"])["rows"] == first["rows"]


def test_other_settings_in_the_same_folder_are_refused(compare):
    compare(adaptation=["frozen"], num_draws=1, label_budgets=["1"])
    with pytest.raises(UserError, match="was made with another seed"):
        compare(adaptation=["frozen"], num_draws=1, label_budgets=["1"], seed=3)


def test_fine_tuned_comparison(compare, tmp_path):
    """Whole runs: the learning rate is swept on the first draw and kept for the second; nothing but scores is left."""
    options = {"adaptation": ["fine_tuned"], "num_draws": 2, "label_budgets": ["3"]}
    found = compare(initializations=["random", "log_mel"], **options)
    assert {row["start"] for row in found["rows"]} == {"random weights"}  # log-mel bands can't be fine-tuned
    first, second = found["rows"]
    assert first["learning_rate"] == second["learning_rate"]
    assert not Path(tmp_path, "out/run").exists()


def test_the_validation_clips_choose_the_learning_rate():
    """By the scores in their order and direction; the first one among equals."""
    tried = {0.1: (1.0, 0.9), 0.2: (1.0, 0.5), 0.3: (1.2, 0.1), 0.4: (1.0, 0.5)}
    task = SimpleNamespace(best_metric="wer", greater_is_better=False, label_kind="text")
    probing = Probing(task, None)
    probing.rates, probing.fit = tuple(tried), lambda train, rate, seed: rate
    probing.score = lambda probe, heard: dict(zip(("wer", "cer"), tried[probe]))
    assert probing.fit_best(None, None, 0) == (0.2, 0.2)


# ---- several classes at once


def test_several_classes_at_once(compare, data):
    """What is compared is their own metric."""
    for split, count in (("train", 6), ("validation", 3), ("test", 3)):
        clips = [f"{kind}/{n}.wav,{kind}{'|both' if n % 2 else ''}" for kind in KINDS for n in range(count)]
        Path(data, split, "metadata.csv").write_text("\n".join(["file_name,what", *clips]) + "\n")
    options = {"label_column_name": "what", "num_draws": 1, "label_budgets": ["2"]}
    found = compare(initializations=["random", "log_mel"], adaptation=["frozen", "fine_tuned"], **options)
    assert found["metrics"] == ["map"]
    assert [(row["way"], row["start"]) for row in found["rows"]] == [
        ("frozen", "random weights"),
        ("frozen", "log-mel bands"),
        ("fine_tuned", "random weights"),
    ]
    assert all(0 < row["test"] <= 1 for row in found["rows"])
    assert found["says"][0].startswith("test, mAP, a probe on the frozen encoder")


# ---- transcripts

TONES = {"e": 500, "o": 2400}


@pytest.fixture
def speech(tmp_path):
    """A minute for training: up to three tones in a second, and what they spell; one recording is not audio."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 60), ("validation", 10), ("test", 10)):
        folder, lines = tmp_path / "speech" / split, ["file_name,text"]
        folder.mkdir(parents=True)
        for number in range(count):
            text = "".join(generator.choice(list(TONES), generator.integers(1, 4)))
            waveform = 0.01 * generator.standard_normal(16_000)
            for place, char in enumerate(text):
                start = int(16_000 * (0.3 * place + generator.uniform(0.02, 0.12)))
                time = np.arange(2_400) / 16_000
                waveform[start : start + 2_400] += 0.3 * np.hanning(2_400) * np.sin(2 * np.pi * TONES[char] * time)
            soundfile.write(folder / f"{number:02d}.wav", waveform, 16_000)
            lines.append(f"{number:02d}.wav,{text}")
        (folder / "broken.wav").write_text("no audio")
        (folder / "metadata.csv").write_text("\n".join([*lines, "broken.wav,eo"]) + "\n")
    return tmp_path / "speech"


@pytest.mark.figures
def test_minutes_of_transcripts(compare, speech, tmp_path, monkeypatch):
    """Word and character error rates, of the log-mel bands and of what a random toy encoder makes of tones."""
    monkeypatch.setattr(ctc_probe, "UPDATES", 240)
    monkeypatch.setattr(ctc_probe, "BATCH_FRAMES", 300)
    monkeypatch.setattr(Speech, "rates", (1e-2,))
    options = {"task": "ctc", "dataset_name": speech, "label_budgets": ["0.05", "all"], "num_draws": 1}
    found = compare(initializations=["random", "log_mel"], adaptation=["frozen"], **options)
    assert found["metrics"] == ["wer", "cer"] and found["unit"] == "minutes of labels"
    keys = [(row["start"], row["budget"], row["draw"]) for row in found["rows"]]
    budgets = [("0.05", 0), ("all", 0)]
    assert keys == [(name, *key) for name in ("random weights", "log-mel bands") for key in budgets]
    most = next(row for row in found["rows"] if (row["start"], row["budget"]) == ("log-mel bands", "all"))
    assert most["test_cer"] < 0.5
    assert {"validation", "validation_cer", "test", "test_cer"} <= most.keys()
    assert [line.split(",")[1] for line in found["says"]] == [" WER", " CER"]
    assert Path(tmp_path, "out/figures/label_efficiency.png").stat().st_size > 10_000


def test_minutes_of_transcripts_fine_tuned(compare, speech):
    options = {"task": "ctc", "dataset_name": speech, "label_budgets": ["0.25"], "num_draws": 1}
    (row,) = compare(adaptation=["fine_tuned"], initializations=["random", "log_mel"], **options)["rows"]
    assert row["start"] == "random weights" and {"validation_cer", "test", "test_cer"} <= row.keys()
    with pytest.raises(UserError, match="3 minutes asked for, .* has 1.0 to use"):
        compare(**{**options, "label_budgets": ["3"]})


@pytest.mark.parametrize(
    "options, line",
    [
        ({"label_budgets": ["7"]}, "7 asked for, 'high' has 6 clips"),
        ({"label_budgets": ["few"]}, "labels per class, or 'all', not 'few'"),
        ({"random_weights": "true"}, "random_weights: label_budgets compares with random weights by itself"),
        ({"task": "segmentation"}, "label_budgets: task segmentation has neither classes"),
        ({"streaming": "true"}, "label_budgets: a stream can't be drawn from"),
        ({"task": "ctc", "decoding": "beam"}, "decoding: label_budgets compares greedy decoding"),
        ({"num_draws": 0}, "num_draws: at least 1"),
        ({"initializations": ["nowhere"], "adaptation": ["frozen"]}, "no model 'nowhere'"),
    ],
)
def test_bad_input(compare, options, line):
    with pytest.raises(UserError, match=line):
        compare(**options)


def test_options_of_a_comparison_alone(layer_norm_checkpoint, data, tmp_path):
    argv = ["--dataset_name", str(data), "--model_name_or_path", layer_norm_checkpoint, "--num_draws", "2"]
    with pytest.raises(UserError, match="num_draws: belongs to label_budgets"):
        run_finetune.main([*argv, "--output_dir", str(tmp_path)])


def test_results_survive_a_stop_between_two_rows(tmp_path):
    results = Results(tmp_path / "file.json", {"seed": 0}, {"a": "1"})
    results.add({"way": "frozen", "start": "a", "budget": "1", "draw": 0, "test": 0.5})
    again = Results(tmp_path / "file.json", {"seed": 0}, {"a": "1", "b": "2"})  # one start more
    assert again.find(way="frozen", start="a", budget="1", draw=0)["test"] == 0.5
    assert again.find(way="frozen", start="a", budget="1", draw=1) is None


@pytest.mark.parametrize(
    "settings, starts, line",
    [
        ({"seed": 1}, {"a": "1"}, "made with another seed"),
        ({"seed": 0, "adam_beta2": 0.9}, {"a": "1"}, "made with another adam_beta2"),
        ({}, {"a": "1"}, "made with another seed"),
        ({"seed": 0}, {"a": "trained on"}, "made with another start a"),
    ],
)
def test_results_of_another_comparison_are_refused(tmp_path, settings, starts, line):
    Results(tmp_path / "file.json", {"seed": 0}, {"a": "1"}).write()
    with pytest.raises(UserError, match=line):
        Results(tmp_path / "file.json", settings, starts)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"rows": []}', '{"settings": [], "starts": {}, "rows": []}'])
def test_a_file_that_holds_no_results(tmp_path, text):
    (tmp_path / "file.json").write_text(text)
    with pytest.raises(UserError, match="can't be read as results"):
        Results(tmp_path / "file.json", {}, {})


def test_a_start_is_known_by_its_weights(layer_norm_checkpoint, tmp_path):
    ours = shutil.copytree(layer_norm_checkpoint, tmp_path / "ours")
    assert Start("a", str(ours)).fingerprint == Start("a", layer_norm_checkpoint).fingerprint
    (ours / "model.safetensors").write_bytes(b"trained further")
    assert Start("a", str(ours)).fingerprint != Start("a", layer_norm_checkpoint).fingerprint
    assert Start("a", str(ours), True).fingerprint == Start("a", layer_norm_checkpoint, True).fingerprint
    assert Start("a", "user/model", revision="main").fingerprint == "user/model@main"
