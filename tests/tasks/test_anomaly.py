"""Task anomaly end to end on tones with clicks in some; areas against naive ones; saving; when; every refusal."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from sklearn.metrics import roc_auc_score

import run_finetune
from acoustic.config import parse_finetuning
from acoustic.console import UserError
from acoustic.report.record import read_json
from acoustic.tasks.anomaly import AnomalyDetector, Part, choose_members, divide_frames, without_overlap
from acoustic.tasks.anomaly_run import Clip, measure, run_anomaly
from acoustic.training.resume import find_checkpoint

RATE = 16_000
CLIP = 0.5  # seconds
PITCHES = {"fan": 300, "pump": 900}


def tone(pitch: float, seconds: float, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    time = np.arange(int(seconds * RATE)) / RATE
    pitch *= 1 + 0.01 * generator.standard_normal()
    wave = 0.1 * np.sin(2 * np.pi * pitch * time + generator.uniform(0, 2 * np.pi))
    return (wave + 0.007 * generator.standard_normal(len(wave))).astype(np.float32)


def with_clicks(wave: np.ndarray, seed: int) -> np.ndarray:
    """Bursts of 30 ms, about ten a second."""
    generator, wave = np.random.default_rng(seed), wave.copy()
    for place in generator.integers(0, len(wave) - 480, max(len(wave) // 1600, 1)):
        wave[place : place + 480] += 0.8 * generator.standard_normal(480) * np.exp(-np.arange(480) / 160)
    return wave.astype(np.float32)


@pytest.fixture(scope="module")
def write(tmp_path_factory):
    """write({name: (waveform, machine, label)}) of one split -> nothing; names begin with the split."""

    def make(clips: dict[str, tuple], columns=("machine", "label"), root=None):
        root = root or tmp_path_factory.mktemp("clips")
        rows = {}
        for name, (wave, *values) in clips.items():
            split, _, file = name.partition("/")
            (root / split).mkdir(exist_ok=True)
            soundfile.write(root / name, wave, RATE)
            row = {"file_name": file} | dict(zip(("machine", "label"), values))
            rows.setdefault(split, []).append({key: row[key] for key in ("file_name", *columns)})
        for split, lines in rows.items():
            (root / split / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
        return root

    return make


def clips_of(train: int, normal: int, wrong: int, machines=PITCHES) -> dict[str, tuple]:
    """Clips of both machines: tones, and in the test split some with clicks."""
    clips, seed = {}, 0
    for machine, pitch in ((name, PITCHES[name]) for name in machines):
        for kind, split, count in (("normal", "train", train), ("normal", "test", normal), ("clicks", "test", wrong)):
            for number in range(count):
                seed += 1
                wave = tone(pitch, CLIP, seed)
                wave = with_clicks(wave, seed) if kind == "clicks" else wave
                clips[f"{split}/{machine}_{kind}_{number:02d}.wav"] = (wave, machine, kind)
    return clips


@pytest.fixture(scope="module")
def clips(write):
    folder = write(clips_of(train=24, normal=6, wrong=4))
    (folder / "test" / "broken.wav").write_bytes(b"no audio")
    with open(folder / "test" / "metadata.jsonl", "a") as file:
        file.write('{"file_name": "broken.wav", "machine": "fan", "label": "normal"}\n')
    return folder


def arguments(folder, where, checkpoint, **changed) -> list[str]:
    options = {
        "task": "anomaly",
        "model_name_or_path": checkpoint,
        "dataset_name": folder,
        "test_split_name": "test",
        "label_column_name": "label",
        "machine_column_name": "machine",
        "output_dir": where,
        "max_duration_in_seconds": 2,
        "batch_seconds": 8,
        "dataloader_num_workers": 0,
        "use_cpu": True,
        "disable_tqdm": True,
        **changed,
    }
    return [word for key, value in options.items() if value is not None for word in (f"--{key}", str(value))]


@pytest.fixture(scope="module")
def finished(clips, group_norm_checkpoint, tmp_path_factory):
    """(output_dir, results) of one run, each machine with its own detectors."""
    output_dir = tmp_path_factory.mktemp("anomaly")
    return output_dir, run_finetune.main(arguments(clips, output_dir, group_norm_checkpoint))


@pytest.fixture
def run(clips, group_norm_checkpoint, tmp_path):
    """run(folder=clips, **options) -> what was found, before it is reported."""

    def make(folder=clips, **changed):
        return run_anomaly(*parse_finetuning(arguments(folder, tmp_path / "out", group_norm_checkpoint, **changed)))

    return make


def test_clicks_are_found(finished):
    _, results = finished
    assert results["test_auc"] > 0.95
    assert results["test_auc_harmonic_mean"] > 0.95
    assert set(results["test_by_machine"]) == {"fan", "pump"}
    assert results["test_by_fault"]["clicks"]["auc"] == results["test_auc"]
    assert results["test_false_alarm_rate"] < 0.35 < results["test_recall"]
    assert len(results["test_sweep"]) == 3 * 3  # the input and two layers, three distances each


def test_what_a_run_leaves_behind(finished):
    output_dir, results = finished
    assert read_json(output_dir / "all_results.json") == results
    predictions = read_json(output_dir / "predictions_test.json")["predictions"]
    assert len(predictions) == 20
    assert [item["score"] for item in predictions] == sorted((item["score"] for item in predictions), reverse=True)
    assert predictions[0].keys() == {"name", "machine", "label", "score", "percentile", "worst"}
    wrong = [item["label"] != "normal" for item in predictions]
    assert results["test_auc"] == pytest.approx(roc_auc_score(wrong, [item["score"] for item in predictions]))
    skipped = read_json(output_dir / "data_report.json")["splits"]["test"]["skipped_recordings"]
    assert skipped == {"broken.wav": "not readable as audio: Format not recognised"}
    card = (output_dir / "README.md").read_text()
    assert "test_pauc of clicks" in card and 'machine="fan"' in card and "guessing" in card
    figures = {path.name for path in (output_dir / "figures").iterdir()}
    assert figures == {"scores_test.png", "roc_test.png", "sweep_test.png", "most_anomalous_test.png"}
    assert "wall_seconds" in read_json(output_dir / "run.json")


def test_nothing_is_pickled(finished):
    output_dir, _ = finished
    files = [path for path in output_dir.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors", ".png", ".md"}
    for path in files:
        start = path.read_bytes()[:8]
        assert start[:2] not in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK")


def test_loaded_it_gives_the_same_bits(finished, clips, tmp_path):
    first = AnomalyDetector.from_pretrained(finished[0])
    first.save_pretrained(tmp_path)
    second = AnomalyDetector.from_pretrained(tmp_path)
    path = clips / "test" / "pump_clicks_00.wav"
    assert first.score(path, machine="pump") == second.score(path, machine="pump")
    assert first.settings == second.settings and first.machines == second.machines == ["fan", "pump"]


def test_three_lines_give_what_the_run_gave(finished, clips):
    """From a path, and from the waveform; in the run it was in a batch with others."""
    output_dir, _ = finished
    detector = AnomalyDetector.from_pretrained(output_dir)
    for item in read_json(output_dir / "predictions_test.json")["predictions"][::5]:
        path = clips / "test" / item["name"]
        verdict = detector.score(path, machine=item["machine"])
        assert verdict.score == pytest.approx(item["score"], abs=1e-2)
        assert verdict.percentile == pytest.approx(item["percentile"], abs=8)
        heard = detector.score(*soundfile.read(path, dtype="float32"), machine=item["machine"])
        assert heard.score == pytest.approx(verdict.score, abs=1e-2)
        assert [part.start for part in heard.segments] == [part.start for part in verdict.segments]


def test_another_rate_and_two_channels_of_a_waveform(finished):
    detector = AnomalyDetector.from_pretrained(finished[0])
    wave = np.repeat(tone(300, CLIP, 777), 2)
    low = detector.score(tone(300, CLIP, 777), RATE, machine="fan")
    high = detector.score(np.stack([wave, wave], 1), 2 * RATE, machine="fan")
    assert len(high.windows) == len(low.windows) == 1
    assert high.windows[0].stop == CLIP


@pytest.fixture(scope="module")
def long_recording(tmp_path_factory):
    """Ten seconds of the fan, clicks at 6.2 s."""
    wave = np.concatenate([tone(300, CLIP, seed) for seed in range(500, 520)])
    wave[int(6.1 * RATE) : int(6.4 * RATE)] = with_clicks(wave[int(6.1 * RATE) : int(6.4 * RATE)], 1)
    path = tmp_path_factory.mktemp("long") / "long.flac"
    soundfile.write(path, wave, RATE)
    return path


def test_when_it_sounds_wrong_in_a_long_recording(finished, long_recording):
    """In windows of the length that was fitted on, however long the recording is."""
    verdict = AnomalyDetector.from_pretrained(finished[0]).score(long_recording, machine="fan")
    assert [part.start for part in verdict.windows] == pytest.approx(np.arange(0, 10, CLIP))
    assert [part.start for part in verdict.segments] == pytest.approx(np.arange(0, 10, 0.5))
    assert verdict.worst_window.start == 6.0
    assert verdict.worst_segment[:2] == (6.0, 6.5)
    assert verdict.score == verdict.worst_window.score > 1.5 * sorted(part.score for part in verdict.windows)[-2]
    assert verdict.percentile == 100


def test_a_short_and_a_broken_recording(finished, tmp_path):
    detector = AnomalyDetector.from_pretrained(finished[0])
    with pytest.raises(UserError, match="0.05 s is shorter than min_duration_in_seconds=0.1"):
        detector.score(tone(300, 0.05, 0), RATE, machine="fan")
    (tmp_path / "broken.wav").write_bytes(b"no audio")
    with pytest.raises(UserError, match="broken.wav: not readable as audio"):
        detector.score(tmp_path / "broken.wav", machine="fan")
    with pytest.raises(UserError, match="rate: of a waveform"):
        detector.score(tone(300, 0.5, 0), machine="fan")
    with pytest.raises(UserError, match="machine: one of 'fan', 'pump', not 'gear'"):
        detector.score(tone(300, 0.5, 0), RATE, machine="gear")
    with pytest.raises(UserError, match="no anomaly_detector.json"):
        AnomalyDetector.from_pretrained(tmp_path)


def test_a_long_normal_recording_is_cut_and_fitted_on(write, run, tmp_path):
    """Thirty windows of two recordings are enough, and the test recordings are cut likewise."""
    train = {
        f"train/{n}.wav": (np.concatenate([tone(300, CLIP, 40 * n + s) for s in range(30)]), "fan", "normal")
        for n in range(2)
    }
    test = {
        "test/fine.wav": (np.concatenate([tone(300, CLIP, 900 + s) for s in range(9)]), "fan", "normal"),
        "test/clicks.wav": (
            np.concatenate([with_clicks(tone(300, CLIP, 950), 3), tone(300, 4, 951)]),
            "fan",
            "clicks",
        ),
    }
    split = run(write(train | test), machine_column_name=None, max_duration_in_seconds=CLIP).splits["test"]
    assert split.results["auc"] == 1
    settings = read_json(tmp_path / "out" / "anomaly_detector.json")
    assert settings["window_seconds"] == CLIP and settings["machines"] == [None]
    assert (split.clips[0].name, split.clips[0].segment.start) == ("clicks.wav", 0)
    assert split.seconds == 9
    assert AnomalyDetector.from_pretrained(tmp_path / "out").score(tone(300, 1, 1), RATE).windows[-1].stop == 1


def test_each_machine_by_itself_where_machines_differ(write, run):
    """What sounds like the fan is wrong of the pump; one detector for both can't know."""
    clips = clips_of(train=24, normal=8, wrong=0)
    swapped = {
        f"test/swapped_{name}_{number}.wav": (tone(PITCHES[other], CLIP, 800 + number), name, "swapped")
        for name, other in (("fan", "pump"), ("pump", "fan"))
        for number in range(5)
    }
    folder = write(clips | swapped)
    by_machine = run(folder, embedding_layer=0).splits["test"].results
    pooled = run(folder, embedding_layer=0, machine_column_name=None).splits["test"].results
    assert by_machine["auc_harmonic_mean"] == 1
    assert pooled["auc"] < 0.8
    assert pooled["by_machine"] == {} and "auc_harmonic_mean" not in pooled


def test_a_machine_without_normal_clips_is_skipped_by_name(write, run):
    clips = clips_of(train=12, normal=3, wrong=2, machines=["fan"])
    clips |= {
        f"test/gear_{n}.wav": (tone(500, CLIP, n), machine, "normal") for n, machine in enumerate(["gear", None])
    }
    found = run(write(clips), embedding_layer=0, max_skipped_fraction=0)  # which is no fault of theirs
    assert found.splits["test"].tally.listed == {
        "gear_0.wav": "no normal clips of machine 'gear' to compare with",
        "gear_1.wav": "no normal clips of machine None to compare with",
    }


def test_anomalous_clips_in_the_training_split_are_left_out(write, run):
    clips = clips_of(train=12, normal=4, wrong=3, machines=["fan"])
    clips |= {f"train/wrong_{n}.wav": (with_clicks(tone(300, CLIP, n), n), "fan", "clicks") for n in range(3)}
    clips["train/unknown.wav"] = (tone(300, CLIP, 99), "fan", None)
    found = run(write(clips), embedding_layer=0)
    said = " ".join(found.notes)
    assert "left out of the fit: 4 clips that are not labeled normal (without a label 1, clicks 3)" in said
    assert "fitted on 12 normal windows" in said
    assert found.splits["test"].results["auc"] > 0.9


def test_a_training_split_without_labels_is_all_normal(write, run):
    clips = clips_of(train=12, normal=4, wrong=3, machines=["fan"])
    folder = write({name: clip for name, clip in clips.items() if name.startswith("train")}, columns=("machine",))
    write({name: clip for name, clip in clips.items() if name.startswith("test")}, root=folder)
    found = run(folder, embedding_layer=0)
    assert found.splits["test"].results["auc"] > 0.9
    assert found.notes[0].endswith("which has no labels")
    with pytest.raises(UserError, match="label_column_name: .* has no column 'lable'"):
        run(folder, label_column_name="lable")
    with pytest.raises(UserError, match="label_column_name: .* has no column 'label'"):
        run(folder, test_split_name=None)


@pytest.mark.parametrize(
    ("kept", "words"), [(("normal",), "normal"), (("clicks",), "anomalous"), ((None,), "no clip is")]
)
def test_one_kind_of_clips_alone_has_scores_but_no_area(write, group_norm_checkpoint, tmp_path, capsys, kept, words):
    clips = clips_of(train=12, normal=3, wrong=3, machines=["fan"])
    if kept == (None,):
        clips = {name: (*clip[:2], clip[2] if "train" in name else None) for name, clip in clips.items()}
    clips = {name: clip for name, clip in clips.items() if name.startswith("train") or clip[2] in kept}
    results = run_finetune.main(arguments(write(clips), tmp_path, group_norm_checkpoint, embedding_layer=0))
    assert "test_auc" not in results
    assert f"{words}" in capsys.readouterr().out
    assert len(read_json(tmp_path / "predictions_test.json")["predictions"]) == (6 if kept == (None,) else 3)
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"scores_test.png", "most_anomalous_test.png"}


def test_log_mel_bands_need_no_model(run, tmp_path):
    found = run(features="log_mel", model_name_or_path=None)
    assert found.splits["test"].results["auc"] > 0.9
    assert not (tmp_path / "out" / "model.safetensors").exists()
    detector = AnomalyDetector.from_pretrained(tmp_path / "out")
    assert detector.score(with_clicks(tone(300, CLIP, 1), 1), RATE, machine="fan").percentile == 100


def test_random_weights_are_the_control(run, finished, tmp_path):
    results = run(random_weights=True, embedding_layer=1).splits["test"].results
    found = {item["detector"]: item["auc"] for item in results["sweep"]}
    assert found.keys() == {"mahalanobis", "knn", "lof"} and found["mahalanobis"] == results["auc"]
    assert read_json(tmp_path / "out" / "anomaly_detector.json")["members"] == [[1, "mahalanobis"]]
    trained, random = ((folder / "model.safetensors").read_bytes() for folder in (finished[0], tmp_path / "out"))
    assert trained != random
    AnomalyDetector.from_pretrained(tmp_path / "out").score(tone(300, CLIP, 1), RATE, machine="fan")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"normal_label": "fine"}, "no clip of .* is labeled 'fine' .it has: normal 48"),
        ({"embedding_layer": 3}, "embedding_layer: 'auto', or a layer from 0 .* to 2, not '3'"),
        ({"embedding_layer": "last"}, "embedding_layer: .* not 'last'"),
        ({"min_duration_in_seconds": 0.6}, "has 0 normal clips that can be used.*0.50 s is shorter"),
        (
            {"machine_column_name": "mahcine"},
            "machine_column_name: .* has no column 'mahcine'; it has: file_name, mac",
        ),
        ({"features": "log_mel", "random_weights": True}, "random_weights: log-mel bands have no weights"),
        ({"learning_rate": 0.1}, "learning_rate: task anomaly trains nothing"),
        ({"batch_seconds": "auto"}, "batch_seconds: 'auto' is for pretraining"),
        ({"task": "classification"}, "machine_column_name: only task anomaly has it"),
        ({"test_split_name": "tset"}, "has no split 'tset'"),
    ],
)
def test_bad_input_is_one_line(run, changed, words):
    with pytest.raises(UserError, match=words) as error:
        run(**changed)
    assert "\n" not in str(error.value)


def test_too_few_normal_clips_of_a_machine(write, run):
    clips = clips_of(train=12, normal=1, wrong=1)
    clips = {
        name: clip
        for name, clip in clips.items()
        if not name.startswith(("train/pump_normal_0", "train/pump_normal_10"))
    }
    with pytest.raises(UserError, match="has 1 normal clips of machine 'pump' that can be used; .* takes 10 at least"):
        run(write(clips))


def test_too_few_that_can_be_read(write, run):
    """Which the headers don't say."""
    folder = write(clips_of(train=11, normal=1, wrong=1, machines=["fan"]))
    for path in sorted((folder / "train").glob("*.wav"))[:2]:
        soundfile.write(path, np.full(int(CLIP * RATE), np.nan, np.float32), RATE, subtype="FLOAT")
    with pytest.raises(UserError, match="has 9 normal clips of machine 'fan' .* the last skipped: NaN or infinite"):
        run(folder)


def test_too_many_broken_files_end_the_run(write, run):
    folder = write(clips_of(train=12, normal=2, wrong=2, machines=["fan"]))
    for number in range(2):
        (folder / "train" / f"fan_normal_{number:02d}.wav").write_bytes(b"no audio")
    with pytest.raises(UserError, match="max_skipped_fraction: 2 of 12 rows"):
        run(folder)


def test_no_model_is_trained_beside_a_detector(tmp_path):
    (tmp_path / "anomaly_detector.json").write_text("{}")
    args = SimpleNamespace(output_dir=str(tmp_path), resume_from_checkpoint=None, world_size=1, process_index=0)
    with pytest.raises(UserError, match="output_dir: .* holds an anomaly detector; give a folder of its own"):
        find_checkpoint(args)


def test_the_folder_of_another_model_is_not_written_into(run, group_norm_checkpoint, tmp_path):
    with pytest.raises(UserError, match="output_dir: .* holds another run's model"):
        run(output_dir=group_norm_checkpoint)
    (tmp_path / "out" / "checkpoint-5").mkdir(parents=True)
    with pytest.raises(UserError, match="output_dir: .* holds another run's model"):
        run()


def naive_areas(wrong: np.ndarray, scores: np.ndarray) -> tuple[float, float]:
    """By counting pairs; and up to 0.1 false alarms by adding up hits, standardised as McClish (1989) has it."""
    pairs = scores[wrong][:, None] - scores[~wrong]
    auc = ((pairs > 0) + 0.5 * (pairs == 0)).mean()
    points = sorted((np.mean(scores[~wrong] >= at), np.mean(scores[wrong] >= at)) for at in (*scores, np.inf))
    middles = (np.arange(10_000) + 0.5) / 100_000
    area = np.interp(middles, *np.array(points).T).mean() * 0.1
    guessing = 0.1**2 / 2
    return auc, (1 + (area - guessing) / (0.1 - guessing)) / 2


def clip(name: str, score: float, label, machine=None, members=(0.0, 0.0)) -> Clip:
    part = Part(0, 1, score, 100 * score)
    return Clip(name, machine, label, part, np.array(members), part)


MEMBERS = [(0, "knn"), (1, "lof")]


def test_areas_against_counting():
    generator = np.random.default_rng(0)
    wrong = generator.random(80) < 0.4
    scores = np.round(generator.normal(size=80) + wrong, 1)  # with ties
    clips = [
        clip(str(n), s, "leak" if w else "normal", members=(s, -s)) for n, (s, w) in enumerate(zip(scores, wrong))
    ]
    results, _ = measure(clips, "normal", MEMBERS)
    auc, pauc = naive_areas(wrong, scores)
    assert results["auc"] == pytest.approx(auc)
    assert results["pauc"] == pytest.approx(pauc, abs=1e-3)
    assert results["by_machine"] == {}
    assert [item["auc"] for item in results["sweep"]] == pytest.approx([auc, 1 - auc])


def test_machines_and_faults_on_a_case_by_hand():
    """The fan has an AUC of 1/2 and leaks; the pump of 1 and hums, the gear has no normal clips."""
    clips = [clip(f"f{n}", s, "normal", "fan") for n, s in enumerate((0.1, 0.3))]
    clips += [clip("leaks", 0.2, "leak", "fan")]
    clips += [clip(f"p{n}", s, "normal", "pump") for n, s in enumerate((0.1, 0.2))]
    clips += [clip("hums", 0.96, "hum", "pump"), clip("unknown", 0.5, None, "pump")]
    clips += [clip("lone", 0.05, "hum", "gear")]
    results, notes = measure(clips, "normal", MEMBERS)
    assert {name: found["auc"] for name, found in results["by_machine"].items()} == {"fan": 0.5, "pump": 1.0}
    assert results["auc_harmonic_mean"] == pytest.approx(2 / 3)
    assert results["by_fault"]["leak"] == {"auc": 0.5, "pauc": pytest.approx(0.4737, abs=1e-4)} | {
        "normal_clips": 2,
        "anomalous_clips": 1,
    }
    assert results["by_fault"]["hum"]["normal_clips"] == 2
    assert results["recall"] == pytest.approx(1 / 3) and results["false_alarm_rate"] == 0
    assert notes[0] == "1 of 8 clips have no label"
    assert notes[2] == "normal or anomalous clips alone, so no AUC, of machine 'gear'"


def test_which_distances_are_averaged():
    assert choose_members("knn", "auto", 3) == [(0, "knn"), (1, "knn"), (2, "knn")]
    assert choose_members("auto", "2", 3) == [(2, "mahalanobis"), (2, "knn"), (2, "lof")]
    assert len(choose_members("auto", "auto", 3)) == 9


def test_segments_cover_all_frames():
    torch = pytest.importorskip("torch")
    frames = torch.arange(2 * 25 * 3.0).reshape(2, 25, 3)
    for parts, count in ((8.0, 8), (0.2, 1), (100.0, 12)):
        segments = divide_frames(frames, parts)
        assert len(segments) == count and min(segment.shape[1] for segment in segments) >= 2
        assert torch.equal(torch.cat(segments, 1), frames)


def test_the_overlap_of_the_last_window_is_told_once():
    parts = [Part(0, 1, 0, 0), Part(1, 2, 0, 0), Part(1.4, 2.4, 0, 0), Part(1.7, 2.7, 0, 0)]
    assert [part.start for part in without_overlap(parts)] == [0, 1, 1.7]


def test_the_recipe_says_what_it_needs():
    _, data_args, args = parse_finetuning(["recipes/demo/anomaly.yaml", "--use_cpu", "true"])
    assert args.task == "anomaly" and data_args.machine_column_name == "machine"
