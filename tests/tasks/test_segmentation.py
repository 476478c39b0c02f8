"""Labels of frames, windows stitched to recordings, the loss, what is skipped and said; and tones that are found."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
import transformers
from toy_encoder import HOP, ToyConfig, ToyModel
from transformers import AutoConfig, AutoModelForAudioFrameClassification

import run_finetune
from acoustic.config import parse_finetuning
from acoustic.console import UserError
from acoustic.data.batches import BatchStream
from acoustic.data.collate import PadToLongest
from acoustic.data.headers import Header, Skip
from acoustic.data.sources import open_rows
from acoustic.data.spans import Span, read_audacity
from acoustic.report.record import read_json
from acoustic.tasks.events import Decoding, Event, FrameGrid, Recording, frame_targets
from acoustic.tasks.segmentation import Segmentation, write_label_files
from acoustic.tasks.stitching import Stitcher, slide_on_grid

RATE = 16_000
PITCHES = {"low": 300, "middle": 1000, "high": 3000}
OPTIONS = {"median_filter_seconds": None, "min_span_seconds": 0.0, "min_gap_seconds": 0.0}
LIMITS = SimpleNamespace(min_duration_in_seconds=0.1, max_duration_in_seconds=2.0, **OPTIONS)


def rows_with(*values, description="some rows"):
    """Rows of a stream with a column of spans, no audio behind them."""
    return SimpleNamespace(columns=lambda wanted: iter(values if wanted == "spans" else []), description=description)


def span(start, end, label="a") -> dict:
    return {"start": start, "end": end, "label": label}


@pytest.fixture
def toy_checkpoint(tmp_path):
    """make(num_hidden_layers, return_attention_mask) -> folder; without layers a frame depends on itself alone."""

    def make(num_hidden_layers=2, return_attention_mask=True) -> str:
        folder = str(tmp_path / f"toy_{num_hidden_layers}")
        torch.manual_seed(0)
        model = ToyModel(ToyConfig(num_hidden_layers=num_hidden_layers))
        torch.nn.init.ones_(model.front["scale"].weight)
        model.save_pretrained(folder)
        extractor = transformers.Wav2Vec2FeatureExtractor(
            do_normalize=False, return_attention_mask=return_attention_mask
        )
        extractor.save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def built():
    """build(checkpoint, rows, labeled_seconds, weighted, **options) -> (task, model, feature extractor)."""

    def build(checkpoint: str, rows=None, labeled_seconds=None, weighted=False, **options):
        task = Segmentation(rows or rows_with([span(0, 1, "a"), span(1, 2, "b")]), LIMITS)
        words = [word for key, value in options.items() for word in (f"--{key}", value)]
        given = ["--model_name_or_path", checkpoint, "--dataset_name", "x", "--output_dir", "x", *words]
        torch.manual_seed(1)
        model, extractor, task.said = task.build(parse_finetuning(given)[0], False, labeled_seconds, weighted)
        return task, model.eval(), extractor

    return build


@pytest.fixture
def tones(tmp_path):
    """write(split, recordings, seconds, rate=16000) -> folder: tones that come and go, and a jsonl of when."""

    def write(split: str, recordings: int, seconds: float, rate: int = RATE, root="tones"):
        folder, generator, lines = tmp_path / root / split, np.random.default_rng(len(split)), []
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(recordings):
            time = np.arange(round(seconds * rate)) / rate
            waveform, spans = 0.02 * generator.standard_normal(len(time)), []
            for label, pitch in PITCHES.items():
                start = generator.uniform(0, 1.5)
                while start < seconds - 0.6:
                    end = min(start + generator.uniform(0.5, 2), seconds)
                    waveform += np.where((time >= start) & (time < end), 0.2 * np.sin(2 * np.pi * pitch * time), 0)
                    spans.append(span(round(start, 3), round(end, 3), label))
                    start = end + generator.uniform(0.5, 3)
            soundfile.write(folder / f"{number}.wav", waveform.astype(np.float32), rate)
            lines.append(json.dumps({"file_name": f"{number}.wav", "spans": spans}))
        (folder / "metadata.jsonl").write_text("\n".join(lines))
        return tmp_path / root

    return write


def plan_of(task, train: bool, longest=2.0):
    limits = SimpleNamespace(**{**vars(LIMITS), "max_duration_in_seconds": longest})
    return task.plan(limits, lambda seconds: int(task.lengths(int(seconds * RATE))), train)


def evaluated(task, model, extractor, rows, longest: float, batch_seconds=8.0, sharding=(0, 1)) -> list[dict]:
    """What an evaluation collects, in one share of the recordings."""
    rank, world_size = sharding
    stream = BatchStream(
        [(rows, 1.0)],
        plan_of(task, False, longest),
        PadToLongest(extractor, task.encode),
        rate=extractor.sampling_rate,
        batch_seconds=batch_seconds,
        train=False,
        rank=rank,
        world_size=world_size,
    )
    collected = []
    for batch in stream:
        if "labels" in batch:
            with torch.no_grad():
                outputs = model(**{name: batch[name] for name in task.model_inputs if name in batch})
            assert outputs.logits.shape == batch["labels"].shape
            collected += task.predictions(outputs.logits, batch)
    return collected


# ---- labels


def test_classes_counts_and_the_median_filter():
    """Spans of 1 s and gaps of .5 s; the two that overlap are one."""
    rows = rows_with([span(0, 1), span(1.5, 2.5), span(3, 3.5), span(3.2, 4)], [span(0, 1, "b")], [], None)
    task = Segmentation(rows, LIMITS)
    assert task.notes() == [
        "2 classes, spans of each in 3 recordings: a 4 (3 s), b 1 (1 s)",
        "1 recordings have neither spans nor a label file: skipped",
        "warning: a single span of 'b': nothing shows what varies within the class",
        "median filter of 0.5 s: 95 % of the training spans and gaps are longer",
    ]
    given = SimpleNamespace(**{**OPTIONS, "median_filter_seconds": 0.0, "min_gap_seconds": 0.3})
    assert Segmentation(rows, given).decoding == Decoding(min_gap_seconds=0.3)
    assert Segmentation(rows_with([span(0, 60)]), LIMITS).decoding.median_filter_seconds == 1.0
    assert Segmentation(rows_with([span(1, 1)]), LIMITS).decoding.median_filter_seconds == 0.0  # points


@pytest.mark.parametrize(
    ("values", "words"), [([None, None], "has no spans at all$"), ([[], None], "in 1 recordings with labels; nothing")]
)
def test_no_spans_at_all(values, words):
    with pytest.raises(UserError, match=words):
        Segmentation(rows_with(*values), LIMITS)


def test_a_stream_with_a_label_that_cannot_be_right():
    with pytest.raises(UserError, match="some rows row 1, span 1: 'a' ends at 0 s, before"):
        Segmentation(rows_with([span(0, 1)], [span(1, 0)]), LIMITS)


def test_labels_that_training_never_saw(tones, tmp_path):
    task = Segmentation(rows_with([span(0, 1, "middle"), span(0, 1, "high")]), LIMITS)
    folder = tones("test", 1, 1.0)
    spans = [span(0, 0.1, "hihg"), span(0, 0.2, "high"), span(0.2, 0.3, "valve"), span(0.5, 0.6, "valve")]
    (folder / "test/metadata.jsonl").write_text(json.dumps({"file_name": "0.wav", "spans": spans}))
    rows = open_rows(str(folder), "test", spans_column="spans")
    where = f"{folder}/test/metadata.jsonl line 1, span 1"
    assert task.unseen({"held out": None, "test": rows}) == [
        f"warning: test: 3 spans of 'hihg', 'valve', which training never saw (first: {where}), are left out of the "
        "scores; is 'hihg' meant to be 'high'?"
    ]
    assert task.unseen({"test": rows_with([span(0, 1, "high")])}) == []
    spans[0]["end"] = 9
    (folder / "test/metadata.jsonl").write_text(json.dumps({"file_name": "0.wav", "spans": spans}))
    with pytest.raises(UserError, match="'hihg' from 0 to 9 s goes beyond '0.wav', which has 1.00 s"):
        task.unseen({"test": open_rows(str(folder), "test", spans_column="spans")})


@pytest.mark.parametrize("train", [True, False])
def test_recordings_are_skipped_with_their_reason(built, toy_checkpoint, train):
    task, _, _ = built(toy_checkpoint())
    plan, header = plan_of(task, train), Header(frames=3 * RATE, rate=RATE, channels=1)

    def windows(spans, header=header):
        row = {"name": "x.wav", "audio": {"path": None, "bytes": b""}, "spans": spans, "spans_at": "x.jsonl line 7"}
        return list(plan(row, header, None))

    with pytest.raises(Skip, match="neither spans nor a label file"):
        windows(None)
    with pytest.raises(Skip, match="x.jsonl line 7, span 1: 'a' ends at 1 s, before it starts at 2 s"):
        windows([span(2, 1)])
    with pytest.raises(Skip, match="'a' from 2 to 3.2 s goes beyond 'x.wav', which has 3.00 s"):
        windows([span(2, 3.2)])
    with pytest.raises(Skip, match="shorter than min_duration_in_seconds"):
        windows([], Header(frames=100, rate=RATE, channels=1))
    assert windows([]) and not any(window.row["place"]["spans"] for window in windows([]))
    unknown = windows([span(0, 1, "valve"), span(0, 3.04, "b")])
    assert unknown[0].row["place"]["spans"] == [[0.0, 3.0, "b"]]


@pytest.mark.parametrize("rate", [16_000, 44_100, 11_025])
@pytest.mark.parametrize("train", [True, False])
def test_every_window_has_the_labels_of_its_frames(built, toy_checkpoint, tones, rate, train):
    """At any sample rate a window has as many labels as the model has frames, each at its own time."""
    task, model, extractor = built(toy_checkpoint(0), rows_with([span(0, 1, name) for name in PITCHES]))
    rows = open_rows(str(tones("test", 2, 5.3, rate)), "test", spans_column="spans")
    plan, generator = plan_of(task, train), np.random.default_rng(0) if train else None
    heard = 0
    for index in range(len(rows)):
        row = rows[index]
        spans = [Span(**given) for given in row["spans"]]
        for window in plan(row, Header(frames=round(5.3 * rate), rate=rate, channels=1), generator):
            labels = task.encode(window.row)
            samples = int(np.ceil((window.stop - window.start) * RATE / rate))
            assert len(labels) == samples // HOP
            start, seconds = window.start / rate, (window.stop - window.start) / rate
            np.testing.assert_array_equal(
                labels, frame_targets(spans, task.ids, len(labels), task.grid, start, seconds)
            )
            assert window.seconds <= 2.0 + task.grid.seconds and (not train or window.seconds >= 1.0)
            heard += window.seconds
    assert heard > 7.5  # of 10.6, without the remains at the ends
    assert len(evaluated(task, model, extractor, rows, 2.0)) == 2 * 4


# ---- stitching


def test_the_mean_over_windows_is_that_of_a_loop():
    generator, stitcher = np.random.default_rng(0), Stitcher()
    windows = [(start, generator.random((length, 3))) for start, length in ((0, 10), (6, 11), (15, 10), (21, 4))]
    sums, weights = np.zeros((25, 3)), np.zeros(25)
    for start, values in windows:
        for frame, value in enumerate(values):
            weight = min(frame + 1, len(values) - frame)
            sums[start + frame] += weight * value
            weights[start + frame] += weight
    for number in (2, 0, 3, 1):
        stitcher.add("rec", *windows[number])
        stitcher.add("other", *windows[number])
    np.testing.assert_allclose(stitcher.take("rec", 25), sums / weights[:, None], rtol=1e-5)
    assert list(stitcher.parts) == ["other"]


def test_where_no_window_was_there_is_nothing():
    stitcher = Stitcher()
    stitcher.add("rec", 4, np.ones((3, 1)))
    assert stitcher.take("rec", 9)[:, 0].tolist() == [0, 0, 0, 0, 1, 1, 1, 0, 0]
    stitcher.add("rec", 0, np.ones((3, 1)))
    assert stitcher.take("rec", 2).shape == (2, 1)


@pytest.mark.parametrize("frames", [1, 32_000, 32_001, 47_999, 160_000, 163_333])
def test_windows_lie_on_the_frames_of_the_recording(frames):
    grid, lengths = FrameGrid(RATE, 320, 200), lambda samples: (samples - 400) // 320 + 1
    plan, header = slide_on_grid(0.0, 2.0, grid, lengths), Header(frames=frames, rate=RATE, channels=1)
    if frames == 1:
        with pytest.raises(Skip, match="0.000 s are too short for a frame"):
            plan({"name": "x"}, header, None)
        return
    covered, last = np.zeros(lengths(frames), int), 0
    for window in plan({"name": "x"}, header, None):
        place = window.row["place"]
        assert window.start == 320 * place["first"] and place["start"] == window.start / RATE
        assert place["total"] == lengths(frames) and place["seconds"] == header.seconds
        assert place["frames"] == lengths(window.stop - window.start)
        covered[place["first"] : place["first"] + place["frames"]] += 1
        last = window.stop
    assert last == frames and covered.min() >= 1 and covered.max() <= 3


def whole(model, extractor, path) -> np.ndarray:
    """Probabilities of a file in one piece."""
    inputs = extractor(soundfile.read(path, dtype="float32")[0], sampling_rate=RATE, return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits[0].sigmoid().numpy()


def test_windows_that_are_the_recordings_give_the_model_on_the_recordings(built, toy_checkpoint, tones):
    folder = tones("test", 3, 3.1)
    task, model, extractor = built(toy_checkpoint(2), rows_with([span(0, 1, name) for name in PITCHES]))
    rows = open_rows(str(folder), "test", spans_column="spans")
    for recording in task.stitch(evaluated(task, model, extractor, rows, 4.0)):
        expected = whole(model, extractor, folder / "test" / recording.name)
        np.testing.assert_allclose(recording.probabilities, expected, atol=1e-3)  # half precision


def test_frames_that_overlap_are_the_same_moment(built, toy_checkpoint, tones):
    """Of an encoder whose frames see nothing of each other: windows make no difference at all."""
    folder = tones("test", 2, 7.77)
    task, model, extractor = built(toy_checkpoint(0), rows_with([span(0, 1, name) for name in PITCHES]))
    model.classifier.weight.data *= 10
    rows = open_rows(str(folder), "test", spans_column="spans")
    for recording in task.stitch(evaluated(task, model, extractor, rows, 2.0)):
        expected = whole(model, extractor, folder / "test" / recording.name)
        assert expected.std(0).min() > 0.01
        np.testing.assert_allclose(recording.probabilities, expected, atol=1e-3)


def test_windows_of_a_recording_come_from_several_processes(built, toy_checkpoint, tones):
    folder = tones("test", 2, 7.0)
    task, model, extractor = built(toy_checkpoint(2), rows_with([span(0, 1, name) for name in PITCHES]))
    rows = open_rows(str(folder), "test", spans_column="spans")
    alone = task.stitch(evaluated(task, model, extractor, rows, 2.0))
    shares = [evaluated(task, model, extractor, rows, 2.0, sharding=(rank, 2)) for rank in (1, 0)]
    assert all({item["name"] for item in share} == {"0.wav", "1.wav"} for share in shares)
    together = task.stitch(sum(shares, []))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_allclose(one.probabilities, other.probabilities, atol=2e-3)
        assert one.reference == other.reference
    given = [Span(**value) for value in rows[0]["spans"]]
    assert alone[0].reference == sorted(given)


# ---- the loss


def test_the_loss_is_that_of_a_loop(built, toy_checkpoint):
    """b sounds in a tenth of the time: its frames weigh 5, not 9; a in all of it: 1."""
    rows = rows_with([span(0, 100, "a"), span(0, 10, "b")])
    task, _, _ = built(toy_checkpoint(), rows, 100.0)
    assert task.said[-1].endswith("at most 5): b 5.0")
    logits, labels = torch.randn(2, 4, 2), torch.randint(0, 2, (2, 4, 2)).to(torch.int8)
    labels[1, 3:] = -100
    count = task.count_targets(labels)
    assert count == 14
    total = 0.0
    for clip in range(2):
        for frame in range(4 - clip):
            for index, weight in enumerate((1.0, 5.0)):
                p = 1 / (1 + np.exp(-logits[clip, frame, index].item()))
                total -= weight * np.log(p) if labels[clip, frame, index] else np.log(1 - p)
    loss = task.summed_loss(SimpleNamespace(logits=logits), labels, count)
    assert loss.item() / count == pytest.approx(total / 14, rel=1e-5)
    logits[1, 3:] = 1e9  # padding has no part in it
    assert task.summed_loss(SimpleNamespace(logits=logits), labels, count).item() == pytest.approx(loss.item())


@pytest.mark.parametrize(("seconds", "weight"), [(90, 1.0), (50, 1.0), (25, 3.0), (1, 5.0)])
def test_rare_classes_weigh_more_up_to_a_bound(built, toy_checkpoint, seconds, weight):
    task, _, _ = built(toy_checkpoint(), rows_with([span(0, seconds)]), 100.0)
    assert task.weights.tolist() == [pytest.approx(weight)]
    assert built(toy_checkpoint(), rows_with([span(0, seconds)]), None)[0].weights.tolist() == [1.0]


@pytest.mark.parametrize("encoder", ["toy", "wav2vec2"])
def test_two_windows_in_a_batch_are_each_as_alone(built, toy_checkpoint, layer_norm_checkpoint, tones, encoder):
    """Loss and predictions, where the model takes an attention mask."""
    for root, seconds in (("long", 2.0), ("short", 1.3)):
        folder = tones("test", 1, seconds, root=root)
    folder = folder.parent
    task, model, extractor = built(
        toy_checkpoint() if encoder == "toy" else layer_norm_checkpoint,
        rows_with([span(0, 1, name) for name in PITCHES]),
    )
    collate, plan = PadToLongest(extractor, task.encode), plan_of(task, False)
    windows, waveforms = [], []
    for root in ("long", "short"):
        row = open_rows(str(folder / root), "test", spans_column="spans")[0] | {"name": root, "text": None}
        waveforms.append(soundfile.read(folder / root / "test/0.wav", dtype="float32")[0])
        windows += plan(row, Header(frames=len(waveforms[-1]), rate=RATE, channels=1), None)

    def results(numbers) -> tuple[list[float], list]:
        batch = collate([windows[n] for n in numbers], [waveforms[n] for n in numbers])
        with torch.no_grad():
            outputs = model(**{name: batch[name] for name in task.model_inputs if name in batch})
        loss = task.summed_loss(outputs, batch["labels"], task.count_targets(batch["labels"]))
        return loss.item(), [item["probabilities"] for item in task.predictions(outputs.logits, batch)]

    (loss, together), *alone = results([0, 1]), results([0]), results([1])
    assert loss == pytest.approx(sum(value for value, _ in alone), rel=1e-3)
    for values, (_, (expected,)) in zip(together, alone):
        np.testing.assert_allclose(values, expected, atol=2e-3)
    assert together[0].shape[0] > together[1].shape[0]


# ---- the model and its settings


@pytest.mark.parametrize("weighted", [False, True])
def test_the_config_says_all_that_a_prediction_needs(built, group_norm_checkpoint, tmp_path, weighted):
    task, model, _ = built(group_norm_checkpoint, weighted=weighted)
    assert hasattr(model, "layer_weights") == weighted
    task.metrics([])
    recordings = [Recording("r", 0.5, np.full((24, 2), 0.3, np.float32), [Span(0, 0.5, "a")])]

    def evaluate() -> dict:
        task.last = recordings
        return {"eval_frame_map": 0.5}

    assert task.settle(evaluate) == [
        "thresholds, chosen on the held-out part (mean of event F1 and frame F1): a 0.3, b 0.5"
    ]
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.problem_type, config.id2label) == ("multi_label_classification", {0: "a", 1: "b"})
    assert Decoding(**config.segmentation) == task.decoding == Decoding({"a": 0.3, "b": 0.5}, 1.0)
    AutoModelForAudioFrameClassification.from_pretrained(tmp_path)


def test_without_a_held_out_part_the_thresholds_are_a_half(built, toy_checkpoint, capsys):
    task, model, _ = built(toy_checkpoint())
    assert task.settle(None)[0].startswith("thresholds: 0.5 for all classes")
    assert task.settle(lambda: {})[0].startswith("thresholds: 0.5 for all classes")
    assert model.config.segmentation["thresholds"] == {}
    assert "eval_split_name" in capsys.readouterr().out


def test_scores_are_of_recordings_and_of_classes_once_it_is_settled(built, toy_checkpoint):
    task, _, _ = built(toy_checkpoint())
    place = {"first": 0, "total": 200, "seconds": 2.0, "audio": None, "spans": [[0.5, 1.5, "a"]]}
    frames = np.zeros((200, 2), np.float16)
    frames[50:150, 0] = 0.9
    items = [{"name": name, **place, "probabilities": frames} for name in ("one", "two")]
    items[1] = {**items[1], "probabilities": frames[:, ::-1]}
    metrics = task.metrics(items)
    # In one all is right; in two b is heard in the place of a.
    assert metrics["event_f1"] == metrics["segment_f1"] == 0.5
    assert metrics["event_macro_f1"] == pytest.approx((2 / 3 + 0) / 2)
    assert metrics["frame_map"] == pytest.approx(task_map(frames))
    task.settle(None)
    assert task.metrics(items)["event_f1_of_a"] == pytest.approx(2 / 3)
    assert [item["name"] for item in task.readable(task.last)] == ["two", "one"]
    assert task.readable(task.last)[1]["prediction"] == [{**span(0.5, 1.5), "probability": 0.9}]
    assert task.metrics([]) == {} and task.last == []


def task_map(frames) -> float:
    from sklearn.metrics import average_precision_score

    true = np.tile(frames[:, 0] > 0, 2)
    return average_precision_score(true, np.concatenate([frames[:, 0], frames[:, 1]]))


def test_label_files_stay_in_their_folder(tmp_path):
    names = ["../../a.wav", "day/a.wav", "day_a.flac", "DAY_A.wav", "/etc/passwd", "...", "ü b.wav", "x" * 300]
    events = [Event(0.1, 0.5, "pump", 0.9), Event(0.1, 0.2, "fan", 0.8)]
    recordings = [Recording(name, 1.0, np.zeros((1, 1)), [], events) for name in names]
    write_label_files(tmp_path / "in", recordings)
    written = sorted(path.name for path in (tmp_path / "in").iterdir())
    expected = [
        "DAY_A_3.txt",
        "a.txt",
        "day_a.txt",
        "day_a_2.txt",
        "etc_passwd.txt",
        "recording.txt",
        "x" * 120 + ".txt",
    ]
    assert written == sorted([*expected, "ü_b.txt"])
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    assert read_audacity(str(tmp_path / "in/a.txt")) == [Span(0.1, 0.2, "fan"), Span(0.1, 0.5, "pump")]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"task": "ctc", "min_gap_seconds": 1}, "min_gap_seconds: task ctc has no spans; --task segmentation has"),
        ({"task": "classification", "spans_column_name": "x"}, "spans_column_name: task classification has no spans"),
        ({"task": "segmentation", "median_filter_seconds": -1}, "median_filter_seconds: not below 0"),
        ({"task": "segmentation", "labels_per_class": 3}, "labels_per_class: "),
    ],
)
def test_options_of_spans(finetune_args, options, words):
    with pytest.raises(UserError, match=words):
        parse_finetuning(finetune_args(options.pop("task"), "x", **options))


# ---- all of it


def test_tones_are_found(tones, toy_checkpoint, finetune_args, tmp_path, capsys):
    """In recordings longer than a window, with thresholds of the validation split; and what is beside the weights."""
    for split, count, seconds in (("train", 6, 8.0), ("validation", 3, 8.0), ("test", 3, 11.0)):
        folder = tones(split, count, seconds)
    lines = (folder / "test/metadata.jsonl").read_text().split("\n")
    item = json.loads(lines[0])
    item["spans"].append(span(0, 1, "valve"))
    (folder / "test/metadata.jsonl").write_text("\n".join([json.dumps(item), *lines[1:]]))
    results = run_finetune.main(
        finetune_args(
            "segmentation",
            folder,
            model_name_or_path=toy_checkpoint(),
            eval_split_name="validation",
            test_split_name="test",
            random_weights=True,
            max_duration_in_seconds=4,
            batch_seconds=16,
            learning_rate=1e-2,
            max_steps=45,
            eval_steps=45,
        )
    )
    assert results["test_segment_f1"] > 0.85 and results["test_event_f1"] > 0.5 and results["test_frame_map"] > 0.9
    assert results["test_segment_f1_of_high"] > 0.7
    out = tmp_path / "out"
    decoding = Decoding(**read_json(out / "config.json")["segmentation"])
    assert set(decoding.thresholds) == set(PITCHES) and decoding.median_filter_seconds > 0.3
    predictions = read_json(out / "predictions_test.json")["predictions"]
    assert sorted(found["name"] for found in predictions) == ["0.wav", "1.wav", "2.wav"]
    for found in predictions:
        written = read_audacity(str(out / "labels_test" / found["name"].replace(".wav", ".txt")))
        assert [(s.start, s.end, s.label) for s in written] == [
            (pytest.approx(e["start"], abs=1e-3), pytest.approx(e["end"], abs=1e-3), e["label"])
            for e in sorted(found["prediction"], key=lambda e: (e["start"], e["end"], e["label"]))
        ]
    figures = {path.name for path in (out / "figures").iterdir()}
    assert {"timeline_test.png", "f1_by_class_test.png"} <= figures
    said = capsys.readouterr().out
    assert "warning: test: 1 spans of 'valve', which training never saw" in said
    assert "thresholds, chosen on the held-out part" in said


def test_embedded_audio_in_a_stream(tones, finetune_args, tmp_path):
    """Parquet shards with the audio in them, on wav2vec 2.0 without an attention mask, with learned layer weights."""
    import datasets

    source = tones("train", 3, 3.0)
    rows = [json.loads(line) for line in (source / "train/metadata.jsonl").read_text().split("\n")]
    for row in rows:
        row["audio"] = {"path": row["file_name"], "bytes": (source / "train" / row.pop("file_name")).read_bytes()}
    for split in ("train", "test"):
        (tmp_path / "shards" / split).mkdir(parents=True)
        table = datasets.Dataset.from_list(rows).cast_column("audio", datasets.Audio(decode=False))
        table.to_parquet(tmp_path / "shards" / split / "0.parquet")
    results = run_finetune.main(
        finetune_args(
            "segmentation",
            tmp_path / "shards",
            streaming=True,
            test_split_name="test",
            weighted_layer_sum=True,
            freeze_encoder_steps=1,
        )
    )
    assert 0 <= results["test_frame_map"] <= 1
    assert len(read_json(tmp_path / "out/predictions_test.json")["predictions"]) == 3
    assert (tmp_path / "out/figures/timeline_test.png").is_file()
    assert any("thresholds: 0.5" in note for note in read_json(tmp_path / "out/run.json")["notes"])
