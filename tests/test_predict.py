"""`python -m acoustic.predict` for every task: as the evaluation and transformers' pipelines say, on any file."""

import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import transformers
from toy_encoder import HEADS as TOY_HEADS
from toy_encoder import ToyConfig

import run_finetune
from acoustic.console import RunError, UserError, one_line_errors
from acoustic.data.decode import read_window
from acoustic.data.sources import open_rows
from acoustic.data.spans import read_audacity
from acoustic.data.tally import Tally
from acoustic.predict import load_predictor
from acoustic.predict.__main__ import main
from acoustic.predict.output import write_line
from acoustic.predict.words import Heard, read_off
from acoustic.report.record import read_json
from acoustic.tasks.anomaly import AnomalyDetector, Settings, fit_detector
from acoustic.tasks.ctc import make_tokenizer
from acoustic.tasks.log_mel import LogMel

ROOT = Path(__file__).parents[1]
RATE = 16_000
CLASSES = {0: "fan", 1: "gear", 2: "pump"}
VOCABULARY = {token: index for index, token in enumerate(["[PAD]", "[UNK]", "|", "a", "b"])}


@pytest.fixture
def with_head(tmp_path):
    """with_head(checkpoint, auto class, **config) -> folder: a head of random weights on a random encoder."""

    def make(checkpoint: str, auto_class, **changes) -> str:
        torch.manual_seed(0)
        config = transformers.AutoConfig.from_pretrained(checkpoint, id2label=CLASSES)
        for name, value in changes.items():
            setattr(config, name, value)
        model = auto_class.from_config(config)
        with torch.no_grad():  # so that frames and clips differ
            for parameter in model.parameters():
                parameter.mul_(1.5)
        folder = str(tmp_path / "model")
        model.save_pretrained(folder)
        transformers.AutoFeatureExtractor.from_pretrained(checkpoint).save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def classifier(with_head, group_norm_checkpoint) -> str:
    return with_head(group_norm_checkpoint, transformers.AutoModelForAudioClassification)


@pytest.fixture
def toy(tmp_path):
    """toy(head, **config) -> folder; a frame depends on its own 10 ms alone, so windows can be told from the whole."""

    def make(head: str, **config) -> str:
        torch.manual_seed(0)
        model = TOY_HEADS[head](ToyConfig(num_hidden_layers=0, id2label=CLASSES, **config))
        torch.nn.init.ones_(model.base_model.front["scale"].weight)
        with torch.no_grad():
            next(reversed(list(model.modules()))).weight.mul_(100)
        folder = str(tmp_path / "toy")
        model.save_pretrained(folder)
        transformers.Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def predict(capsys):
    """predict(*argv) -> (answers on the standard output, what is said on the standard error)."""

    def run(*argv) -> tuple[list[dict], str]:
        capsys.readouterr()
        main([str(word) for word in argv])
        said = capsys.readouterr()
        return [json.loads(line) for line in said.out.splitlines()], said.err

    return run


def heard(path, rate: int = RATE) -> dict:
    """What transformers' pipelines take."""
    header = soundfile.info(path)
    return {"raw": read_window({"path": str(path)}, 0, header.frames, rate), "sampling_rate": rate}


# ---- classes


@pytest.mark.parametrize("kind", ["mono.wav", "stereo.flac"])
def test_a_class_is_what_the_pipeline_says(classifier, audio_file, predict, tmp_path, kind):
    path = audio_file(tmp_path / kind, 1.0, *((44_100, 2) if kind == "stereo.flac" else (RATE, 1)))
    (answer,), said = predict(classifier, path)
    expected = transformers.pipeline("audio-classification", classifier, device="cpu")(heard(path))
    assert answer["scores"] == {item["label"]: pytest.approx(item["score"], abs=1e-5) for item in expected}
    assert answer["prediction"] == expected[0]["label"] and answer["file"] == str(path)
    assert re.search(r"done: 1 recordings, 0.0 min; skipped: 0; \d+ audio seconds per second", said)


def test_several_classes_by_their_thresholds(with_head, layer_norm_checkpoint, audio_file, predict, tmp_path):
    settings = {"problem_type": "multi_label_classification", "thresholds": [0.0, 1.0, 0.0]}
    head = transformers.AutoModelForAudioClassification
    model, path = with_head(layer_norm_checkpoint, head, **settings), audio_file(tmp_path / "a.wav", 0.5)
    (answer,), _ = predict(model, path)
    assert answer["labels"] == ["fan", "pump"]
    expected = transformers.pipeline("audio-classification", model, device="cpu")(heard(path))
    assert answer["scores"] == {item["label"]: pytest.approx(item["score"], abs=1e-5) for item in expected}
    del settings["thresholds"]
    (answer,), _ = predict(with_head(layer_norm_checkpoint, head, **settings), path)
    assert answer["labels"] == [name for name, score in answer["scores"].items() if score >= 0.5]


@pytest.mark.parametrize("batch_seconds", [2, 8])
def test_a_long_recording_is_the_mean_of_its_parts(classifier, audio_file, predict, tmp_path, batch_seconds):
    waveform, parts = soundfile.read(audio_file(tmp_path / "long.wav", 5.0))[0], []
    for index, (start, stop) in enumerate([(0, 26_666), (26_666, 53_333), (53_333, 80_000)]):
        soundfile.write(tmp_path / f"part_{index}.wav", waveform[start:stop], RATE)
        parts.append(predict(classifier, tmp_path / f"part_{index}.wav")[0][0]["scores"])
    options = ("--max_duration_in_seconds", 2, "--batch_seconds", batch_seconds)
    (answer,), _ = predict(classifier, tmp_path / "long.wav", *options)
    mean = {name: pytest.approx(np.mean([part[name] for part in parts]), abs=1e-5) for name in CLASSES.values()}
    assert answer["scores"] == mean
    assert predict(classifier, tmp_path / "long.wav")[0][0]["scores"] != mean


def test_what_can_be_read_of_a_damaged_recording(classifier, audio_file, predict, tmp_path):
    """Of 5 s of FLAC the last 2 are gone."""
    whole, cut = audio_file(tmp_path / "whole.flac", 5.0), tmp_path / "cut.flac"
    cut.write_bytes(whole.read_bytes()[: int(0.62 * whole.stat().st_size)])
    soundfile.write(tmp_path / "start.wav", soundfile.read(whole)[0][: 3 * RATE], RATE)
    (answer,), said = predict(classifier, cut, "--max_duration_in_seconds", 1)
    (start,), _ = predict(classifier, tmp_path / "start.wav", "--max_duration_in_seconds", 1)
    assert answer["scores"] == pytest.approx(start["scores"], abs=1e-5)
    (unread,) = answer["unread"]
    assert (unread["start"], unread["end"]) == (3, 5) and "unread" not in start
    assert f"read in part: {cut}: {unread['reason']} (3 s)" in said and "1 of them read in part" in said


# ---- spans


@pytest.fixture
def tones(tmp_path):
    """A folder with splits: tones that come and go, and a jsonl of when; of 2 s, and in the test split of 5."""
    generator = np.random.default_rng(0)
    for split, count, seconds in (("train", 4, 2), ("test", 3, 5)):
        (tmp_path / "tones" / split).mkdir(parents=True)
        lines = []
        for number in range(count):
            start, time = generator.uniform(0.2, 0.8), np.arange(seconds * RATE) / RATE
            sounds = (time >= start) & (time < start + 0.7)
            wave = 0.02 * generator.standard_normal(len(time)) + sounds * 0.3 * np.sin(2 * np.pi * 800 * time)
            soundfile.write(tmp_path / "tones" / split / f"{number}.wav", wave, RATE)
            span = {"start": round(start, 3), "end": round(start + 0.7, 3), "label": "gear" if number % 2 else "fan"}
            lines.append(json.dumps({"file_name": f"{number}.wav", "spans": [span]}))
        (tmp_path / "tones" / split / "metadata.jsonl").write_text("\n".join(lines))
    return tmp_path / "tones"


def test_spans_are_those_of_the_evaluation(group_norm_checkpoint, tones, predict, tmp_path):
    """The window of 2 s is not given again: run.json says it."""
    options = {
        "task": "segmentation",
        "model_name_or_path": group_norm_checkpoint,
        "dataset_name": tones,
        "eval_split_name": "test",  # chooses thresholds
        "test_split_name": "test",
        "output_dir": tmp_path / "out",
        "max_duration_in_seconds": 2,
        "median_filter_seconds": 0.1,
        "batch_seconds": 8,
        "max_steps": 3,
        "learning_rate": 0.01,
        "dataloader_num_workers": 0,
        "report_to": "none",
        "use_cpu": "true",
        "disable_tqdm": "true",
    }
    run_finetune.main([str(word) for key, value in options.items() for word in (f"--{key}", value)])
    evaluated = {item["name"]: item for item in read_json(tmp_path / "out" / "predictions_test.json")["predictions"]}
    answers, _ = predict(tmp_path / "out", tones / "test", "--audacity", tmp_path / "labels")
    assert len(answers) == 3 and sum(len(answer["spans"]) for answer in answers) > 3
    for answer in answers:
        expected = evaluated[Path(answer["file"]).name]["prediction"]
        scores = [span.pop("score") for span in answer["spans"]]
        assert scores == pytest.approx([span.pop("probability") for span in expected], abs=1e-3)
        assert answer["spans"] == expected
        labels = read_audacity(str(tmp_path / "labels" / Path(answer["file"]).with_suffix(".txt").name))
        assert [(s.start, s.end, s.label) for s in labels] == [(s["start"], s["end"], s["label"]) for s in expected]


def test_windows_of_a_long_recording_are_stitched(toy, audio_file, predict, tmp_path):
    """A toy's frames don't see their neighbours."""
    decoding = {"thresholds": {"fan": 0.4, "gear": 0.5, "pump": 0.6}, "median_filter_seconds": 0.05}
    model = toy("frames", segmentation=decoding)
    path = audio_file(tmp_path / "a.wav", 7.77)
    (whole,), _ = predict(model, path)
    (cut,), _ = predict(model, path, "--max_duration_in_seconds", 1.3, "--batch_seconds", 4)
    assert whole["spans"] == cut["spans"] and len(whole["spans"]) > 10


# ---- words


def one_hot(tokens: str, odds: float = 0.9) -> torch.Tensor:
    """A frame for each character, "-" is the blank -> (frames, vocabulary) logits."""
    ids = [0 if token == "-" else VOCABULARY[token] for token in tokens]
    probabilities = torch.full((len(ids), len(VOCABULARY)), (1 - odds) / (len(VOCABULARY) - 1))
    probabilities[torch.arange(len(ids)), ids] = odds
    return probabilities.log() + 3


def test_words_have_times_and_confidence():
    found = Heard(0)
    found.add(0, torch.cat([one_hot("-aa-"), one_hot("b", 0.5), one_hot("-|-ab-")]))
    text, words = read_off(found, make_tokenizer(VOCABULARY), np.arange(12) * 0.1)
    assert text == "ab ab"
    assert words == [
        {"word": "ab", "start": 0.1, "end": 0.5, "confidence": pytest.approx(0.7)},
        {"word": "ab", "start": 0.8, "end": 1.0, "confidence": pytest.approx(0.9)},
    ]


def test_overlapping_windows_meet_in_the_middle():
    whole, cut = Heard(0), Heard(0)
    whole.add(0, one_hot("-a-b|-ab--|ba-a"))
    cut.add(0, one_hot("-a-b|-ab" + "||"))  # what it says at its end is not taken
    cut.add(6, one_hot("||" + "--|ba-"))
    cut.add(8, one_hot("bbb" + "ba-a"))  # the last one begins where the recording's end wants it
    cut.resize(15)
    assert cut.all()[0].tolist() == whole.all()[0].tolist() and len(cut) == 15


def test_where_a_window_is_missing_there_are_blanks():
    found = Heard(0)
    found.add(0, one_hot("ab"))
    found.add(4, one_hot("b|"))
    found.resize(8)
    tokens, probabilities = found.all()
    assert tokens.tolist() == [3, 4, 0, 0, 4, 2, 0, 0] and probabilities[2] == 1


def test_a_text_is_what_the_pipeline_says(with_head, layer_norm_checkpoint, audio_file, predict, tmp_path):
    head = transformers.AutoModelForCTC
    model = with_head(layer_norm_checkpoint, head, vocab_size=len(VOCABULARY), pad_token_id=0)
    with pytest.raises(UserError, match="no tokenizer beside the model"):
        load_predictor(model)
    make_tokenizer(VOCABULARY).save_pretrained(model)
    path = audio_file(tmp_path / "a.wav", 1.5)
    (answer,), _ = predict(model, path, "--audacity", tmp_path / "labels")
    loaded = [kind.from_pretrained(model) for kind in (transformers.AutoTokenizer, transformers.AutoFeatureExtractor)]
    pipe = transformers.pipeline(
        "automatic-speech-recognition", model, tokenizer=loaded[0], feature_extractor=loaded[1], device="cpu"
    )
    assert answer["text"] == pipe(heard(path))["text"] != ""
    assert " ".join(word["word"] for word in answer["words"]) == answer["text"]
    times = [time for word in answer["words"] for time in (word["start"], word["end"])]
    assert times == sorted(times) and times[0] >= 0 and times[-1] <= 1.5
    labels = read_audacity(str(tmp_path / "labels" / "a.txt"))
    assert [(s.start, s.end, s.label) for s in labels] == [(w["start"], w["end"], w["word"]) for w in answer["words"]]


def test_a_long_text_is_put_together(toy, audio_file, predict, tmp_path):
    model = toy("ctc", vocab_size=len(VOCABULARY), pad_token_id=0)
    make_tokenizer(VOCABULARY).save_pretrained(model)
    path = audio_file(tmp_path / "a.wav", 7.77)
    (whole,), _ = predict(model, path)
    (cut,), _ = predict(model, path, "--max_duration_in_seconds", 1.3)
    assert whole == cut and len(whole["words"]) > 5
    assert whole["words"][-1]["end"] > 5 and all(0 < word["confidence"] <= 1 for word in whole["words"])


# ---- anomalies


@pytest.fixture
def detector(tmp_path):
    """fit(machines=False) -> folder of a detector that knows noise, of one or of two machines."""

    def fit(machines: bool = False) -> str:
        folder, lines = tmp_path / "normal", []
        folder.mkdir()
        for index in range(24):
            noise = 0.1 * np.random.default_rng(index).standard_normal(RATE // 2)
            soundfile.write(folder / f"{index}.wav", noise, RATE)
            lines.append(json.dumps({"file_name": f"{index}.wav", "machine": "fan" if index % 2 else "pump"}))
        (folder / "metadata.jsonl").write_text("\n".join(lines))
        rows = open_rows(str(folder), machine_column="machine" if machines else None)
        settings = Settings("log_mel", [(0, "mahalanobis")], 0.1)
        fitted, _ = fit_detector(LogMel(), rows, settings, Tally(), max_seconds=1.0, by_machine=machines)
        fitted.save_pretrained(tmp_path / "detector")
        return str(tmp_path / "detector")

    return fit


def test_anomalies_are_scored_as_the_detector_does(detector, predict, tmp_path):
    noise = 0.1 * np.random.default_rng(99).standard_normal(5 * RATE)
    noise[3 * RATE : 3 * RATE + 4000] += 0.5 * np.sin(np.arange(4000) / 5)
    soundfile.write(tmp_path / "odd.wav", noise, RATE)
    soundfile.write(tmp_path / "quiet.wav", noise[: RATE // 2], RATE)
    folder = detector()
    options = ("--audacity", tmp_path / "labels", "--batch_seconds", 2)
    answers, _ = predict(folder, tmp_path / "odd.wav", tmp_path / "quiet.wav", *options)
    for answer in answers:
        verdict = AnomalyDetector.from_pretrained(folder).score(answer["file"])
        assert answer["score"] == pytest.approx(verdict.score, rel=1e-4)
        assert answer["percentile"] == pytest.approx(verdict.percentile, abs=0.01)
        assert answer["worst"]["start"] == pytest.approx(verdict.worst_segment.start, abs=1e-3)
    odd, quiet = answers
    assert odd["percentile"] == 100 > quiet["percentile"] and odd["worst"]["start"] == 3.0 and "machine" not in odd
    (span,) = read_audacity(str(tmp_path / "labels" / "odd.txt"))
    assert (span.start, span.end) == (3.0, 3.5)
    for words, reason in (
        (("--machine", "pump"), "machine: there are none, not 'pump'"),
        (("--max_duration_in_seconds", "3"), "windows are as long as those it knows"),
    ):
        with pytest.raises(UserError, match=reason):
            main([folder, str(tmp_path / "odd.wav"), *words])


def test_each_row_names_its_machine(detector, predict, tmp_path):
    """A manifest may list recordings of several machines, and some of one that the detector doesn't know."""
    folder = detector(machines=True)
    rows = [("0.wav", "pump"), ("1.wav", "fan"), ("2.wav", "gear"), ("3.wav", "")]
    lines = ["file_name,unit", *(f"{name},{machine}" for name, machine in rows)]
    (tmp_path / "normal" / "list.csv").write_text("\n".join(lines) + "\n")
    answers, said = predict(folder, tmp_path / "normal" / "list.csv", "--machine_column_name", "unit")
    assert [answer["machine"] for answer in answers] == ["pump", "fan"]
    expected = AnomalyDetector.from_pretrained(folder).score(tmp_path / "normal" / "1.wav", machine="fan").score
    assert answers[1]["score"] == pytest.approx(expected, abs=1e-3)
    assert "2.wav: machine: one of 'fan', 'pump', not 'gear'" in said and "3.wav: machine: which one is heard?" in said
    with pytest.raises(UserError, match="give one of the two"):
        predict(folder, tmp_path / "normal", "--machine_column_name", "unit", "--machine", "pump")


def test_of_several_machines_one_is_named(detector, predict, tmp_path):
    folder, path = detector(machines=True), tmp_path / "normal" / "0.wav"
    (answer,), _ = predict(folder, path, "--machine", "pump")
    assert answer["machine"] == "pump"
    expected = AnomalyDetector.from_pretrained(folder).score(path, machine="pump").score
    assert answer["score"] == pytest.approx(expected, rel=1e-4)
    with pytest.raises(UserError, match=r"machine: which one is heard\? This detector knows 'fan', 'pump'"):
        main([folder, str(path)])


# ---- files


def test_bad_files_are_named_and_counted(classifier, audio_file, predict, tmp_path):
    folder = tmp_path / "audio"
    good = [audio_file(folder / name, 0.5) for name in ("train/a.wav", "b.mp3")]
    audio_file(folder / "short.wav", 0.01)
    (folder / "broken.wav").write_bytes(b"RIFF but no more")
    (folder / "notes.txt").write_text("not audio")
    output = tmp_path / "answers.jsonl"
    answers, said = predict(classifier, folder, folder / "notes.txt", folder / "gone.wav", "--output", output)
    assert not answers
    assert {json.loads(line)["file"] for line in output.read_text().splitlines()} == set(map(str, good))
    assert f"skipped: {folder}/broken.wav: not readable as audio" in said
    assert f"skipped: {folder}/short.wav: 0.010 s are too short for a frame" in said
    assert f"skipped: {folder}/gone.wav: no such file" in said
    assert f"skipped: {folder}/notes.txt: " in said and "is neither audio nor a manifest" in said
    assert "done: 2 recordings, 0.0 min; skipped: 4 (1 x " in said


def test_where_nothing_can_be_read_the_exit_code_is_1(classifier, tmp_path, capsys):
    (tmp_path / "broken.wav").write_bytes(b"RIFF but no more")
    output = tmp_path / "answers.jsonl"
    with pytest.raises(SystemExit) as stop, one_line_errors():
        main([classifier, str(tmp_path / "broken.wav"), "--output", str(output)])
    assert stop.value.code == 1 and not output.exists()
    assert "error: nothing could be read: 1 x not readable as audio" in capsys.readouterr().err
    with pytest.raises(RunError, match="nothing could be read"):
        main([classifier, str(tmp_path / "gone")])


def test_splits_tars_and_names_that_are_not_utf8(classifier, audio_file, audio_folder, predict, tmp_path):
    folder = audio_folder(["train/a.wav", "test/b.wav"], seconds=0.3)
    assert len(predict(classifier, folder)[0]) == 2
    (answer,), _ = predict(classifier, folder, "--split", "test")
    assert answer["file"] == str(folder / "test" / "b.wav")
    odd = os.path.join(os.fsencode(tmp_path), b"caf\xe9.wav")
    os.rename(folder / "train" / "a.wav", odd)
    with tarfile.open(tmp_path / "some.tar", "w") as tar:
        tar.add(folder / "test" / "b.wav", "inside.wav")
    answers, _ = predict(classifier, os.fsdecode(odd), tmp_path / "some.tar", tmp_path / "audio" / "*" / "*.wav")
    first, inside, found = (answer["file"] for answer in answers)
    assert first == os.fsdecode(odd) and "inside" in inside and found == str(folder / "test" / "b.wav")


def test_a_reader_that_has_enough(classifier, audio_file, tmp_path, monkeypatch):
    """`| head -1`: no traceback."""
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        with pytest.raises(SystemExit) as stop:
            main([classifier, str(audio_file(tmp_path / "a.wav", 0.3))])
    assert stop.value.code == 128 + 13


def test_a_line_is_whole_or_not_there(tmp_path):
    class Full:
        """A disk with room for 20 bytes."""

        def __init__(self, file):
            self.file, self.tell, self.fileno, self.seekable = file, file.tell, file.fileno, file.seekable

        def write(self, content):
            if self.tell() >= 20:
                raise OSError(28, "No space left on device")
            return self.file.write(content[: 20 - self.tell()])

    with open(tmp_path / "a.jsonl", "wb", buffering=0) as file:
        write_line(Full(file), {"a": 1})
        with pytest.raises(OSError, match="No space"):
            write_line(Full(file), {"file": "a longer line"})
    assert (tmp_path / "a.jsonl").read_text() == '{"a": 1}\n'


def test_old_answers_stay_until_there_are_new_ones(classifier, audio_file, tmp_path):
    output = tmp_path / "out.jsonl"
    output.write_text('{"old": "answers, a long line of them"}\n')
    with pytest.raises(RunError):
        main([classifier, str(tmp_path / "missing.wav"), "--output", str(output), "--overwrite"])
    assert output.read_text().startswith('{"old"')
    main([classifier, str(audio_file(tmp_path / "a.wav", 0.3)), "--output", str(output), "--overwrite"])
    assert [json.loads(line)["file"] for line in output.read_text().splitlines()] == [str(tmp_path / "a.wav")]
    main([classifier, str(tmp_path / "a.wav"), "--output", "/dev/null", "--overwrite"])
    assert Path("/dev/null").exists()


# ---- what is refused


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--max_duration_in_seconds", "0"], "max_duration_in_seconds: at least 0.1 s"),
        (["--batch_seconds", "5"], r"batch_seconds \(5\) holds no window of 10 s"),
        (["--machine", "pump"], "machine: belongs to an anomaly detector"),
        (["--audacity", "labels"], "about whole recordings, without times"),
        (["--output", "there.jsonl"], "output: 'there.jsonl' is there already; --overwrite"),
        (["--output", "nowhere/a.jsonl"], "output: can't write to 'nowhere/a.jsonl': No such file"),
        (["--sampling_rate", "5"], "unrecognized arguments"),
    ],
)
def test_what_is_refused(classifier, audio_file, tmp_path, monkeypatch, words, reason):
    monkeypatch.chdir(tmp_path)
    Path("there.jsonl").write_text("work\n")
    with pytest.raises(UserError, match=reason):
        main([classifier, str(audio_file(tmp_path / "a.wav", 0.5)), *words])
    assert Path("there.jsonl").read_text() == "work\n"


def test_label_files_are_not_overwritten(toy, audio_file, predict, tmp_path):
    model, path = toy("frames"), audio_file(tmp_path / "a.wav", 0.5)
    path.with_suffix(".txt").write_text("0\t1\tmine\n")
    with pytest.raises(UserError, match="has 'a.txt' already; --overwrite"):
        main([model, str(path), "--audacity", str(tmp_path)])
    predict(model, path, "--audacity", tmp_path, "--overwrite")
    assert "mine" not in path.with_suffix(".txt").read_text()


def test_an_encoder_without_a_head(group_norm_checkpoint):
    with pytest.raises(UserError, match="is an encoder without a head: fine-tune it with run_finetune.py, or python"):
        load_predictor(group_norm_checkpoint)


def test_a_model_without_its_head_s_weights(classifier, group_norm_checkpoint):
    content = Path(group_norm_checkpoint, "model.safetensors").read_bytes()
    Path(classifier, "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="lacks weights, or has them in another size: classifier"):
        load_predictor(classifier)


def test_a_window_is_as_long_as_in_training(classifier):
    assert load_predictor(classifier).max_seconds == 10.0
    path = Path(classifier, "config.json")
    path.write_text(json.dumps({**read_json(path), "window_seconds": 3.5}))
    assert load_predictor(classifier).max_seconds == 3.5
    assert load_predictor(classifier, max_seconds=1.0).max_seconds == 1.0


# ---- hours

MEASURED = """
import resource, sys, time
import toy_encoder
from acoustic.predict.__main__ import main
main(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_four_hours_stay_under_two_gigabytes(toy, tmp_path):
    generator, model = np.random.default_rng(0), toy("frames")
    with soundfile.SoundFile(tmp_path / "night.wav", "w", RATE, 1) as file:
        for _ in range(4 * 60):
            file.write(0.1 * generator.standard_normal(60 * RATE))
    words = [model, tmp_path / "night.wav", "--output", tmp_path / "out.jsonl"]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    print(f"{int(done.stdout) / 1e6:.2f} GB; {done.stderr.splitlines()[-1]}")
    assert int(done.stdout) < 2e6  # kB
    (answer,) = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert answer["spans"][-1]["end"] > 4 * 3600 - 10
