"""Codes of a data set: what is written equals what the model says of each window, and nothing is lost or half done."""

import json
import os
import signal
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import soundfile
import torch
from transformers import Wav2Vec2FeatureExtractor

from acoustic import export
from acoustic.console import UserError
from acoustic.data.decode import read_window
from acoustic.data.headers import Header, Skip, read_header
from acoustic.export import HeardFrames, frames_in_a_row, load_tokenizer, without_repeats
from acoustic.models.code_bert import CodeBertConfig, CodeBertForPreTraining
from acoustic.models.vq_wav2vec import VQWav2VecConfig, VQWav2VecForPreTraining, VQWav2VecModel
from acoustic.models.vq_wav2vec.__main__ import main

RATE, HOP = 16_000, 160
SMALL = {
    "conv_dim": [12, 16, 20],
    "conv_kernel": [20, 8, 4],
    "conv_stride": [10, 4, 4],
    "hidden_size": 16,
    "context_kernel": [2, 3],
    "num_codevectors_per_group": 7,
}


def save(folder: Path, model) -> str:
    model.save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=False, return_attention_mask=True).save_pretrained(folder)
    return str(folder)


def make_model(model_class=VQWav2VecForPreTraining, **changed):
    torch.manual_seed(0)
    return model_class(VQWav2VecConfig(**{**SMALL, **changed}))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return save(tmp_path_factory.mktemp("vq"), make_model())


def run(model, audio, output, *options) -> list[dict]:
    main(["export", str(model), str(audio), "--output", str(output), "--use_cpu", "true", *options])
    return pyarrow.parquet.read_table(output).to_pylist()


def about(path) -> dict:
    return {key.decode(): value.decode() for key, value in pyarrow.parquet.read_schema(path).metadata.items()}


def of_whole(model_path: str, file) -> np.ndarray:
    """(groups, frames) of a file read in one piece, by the model itself."""
    audio = {"path": str(file), "bytes": None}
    waveform = read_window(audio, 0, read_header(audio).frames, RATE)
    model = VQWav2VecModel.from_pretrained(model_path).eval()
    return model.quantize(torch.from_numpy(waveform)[None])[0].T.numpy()


# ---- the windows


def test_frames_of_the_grid_are_those_of_the_model():
    config = VQWav2VecConfig(**SMALL)
    model, grid = VQWav2VecModel(config), HeardFrames(RATE, config.inputs_to_logits_ratio, config.receptive_field)
    assert grid.hop == HOP
    for samples in [*range(config.receptive_field, 1000), 16_000, 480_001]:
        assert grid.frames_in(samples) == model._get_feat_extract_output_lengths(samples)
    assert grid.frames_in(config.receptive_field - 1) == grid.frames_in(0) == 0


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 44_100, 96_000])
@pytest.mark.parametrize("frames", [5_000, 9_999, 123_457])
def test_windows_hold_each_frame_once(rate, frames):
    grid = HeardFrames(RATE, HOP, 465)
    row = {"name": "a", "audio": {}}
    windows = list(frames_in_a_row(grid, 1.0)(row, Header(frames, rate, 1), None))
    places = [window.row["place"] for window in windows]
    total = grid.frames_in(-(-frames * RATE // rate))
    assert [place["first"] for place in places] == list(np.cumsum([0, *(p["frames"] for p in places)])[:-1])
    assert sum(place["frames"] for place in places) == total
    assert len({place["frames"] for place in places[:-1]}) <= 1
    for window, place in zip(windows, places):
        assert 0 <= window.start < window.stop <= frames and window.stop - window.start < rate + 2
        assert 0 <= place["first"] * HOP / RATE - window.start / rate < 1 / rate  # begins where the frame does
        assert grid.frames_in(-(-(window.stop - window.start) * RATE // rate)) == place["frames"]


def test_too_short_for_a_frame():
    with pytest.raises(Skip, match="0.029 s is shorter than a frame"):
        frames_in_a_row(HeardFrames(RATE, HOP, 465), 1.0)({}, Header(464, RATE, 1), None)


# ---- what is written


@pytest.mark.parametrize("kind", ["gumbel", "kmeans"])
def test_codes_in_batches_are_those_of_each_window_alone(tmp_path, audio_folder, kind):
    model = save(tmp_path / "model", make_model(quantizer_type=kind))
    names = ["a.wav", "c.ogg", "d.wav", "b/one.wav", "b/two.flac"]
    folder = audio_folder(names, seconds=[0.4, 1.3, 1.0, 1.0, 1.0])
    rows = run(model, folder, tmp_path / "codes.parquet", "--batch_seconds", "100")
    assert [row["name"] for row in rows] == names
    for row in rows:
        assert row["codes"] == of_whole(model, folder / row["name"]).tolist()
        assert row["text"] == " ".join(f"{a}-{b}" for a, b in zip(*row["codes"]))
    together = [row["codes"] for row in rows]
    rows = run(model, folder, tmp_path / "one.parquet", "--max_duration_in_seconds", "2", "--batch_seconds", "2")
    assert [row["codes"] for row in rows] == together


def test_what_of_one_length_goes_through_the_model_together(checkpoint, tone):
    tokenizer = load_tokenizer(checkpoint)
    quantize, batches = tokenizer.quantize, []
    tokenizer.quantize = lambda inputs: batches.append(tuple(inputs.shape)) or quantize(inputs)
    waveforms = [tone(seconds, seed=seed)[:, 0] for seed, seconds in enumerate([0.5, 0.2, 0.5, 0.5])]
    codes = tokenizer.codes(waveforms)
    assert batches == [(3, 8000), (1, 3200)]
    for waveform, each in zip(waveforms, codes):
        assert each.tolist() == quantize(torch.from_numpy(waveform)[None])[0].T.tolist()


@pytest.mark.parametrize("workers", [0, 1])
def test_windows_of_a_long_file_make_up_the_whole(tmp_path, audio_folder, workers):
    """Exactly, where no norm looks at all of a window."""
    model = save(tmp_path / "model", make_model(feat_extract_norm="channel"))
    folder = audio_folder(["a.wav", "long.wav", "z.wav"], seconds=[0.5, 5.23, 1.2])
    options = ["--max_duration_in_seconds", "2", "--dataloader_num_workers", str(workers)]
    rows = run(model, folder, tmp_path / "codes.parquet", *options)
    assert [row["name"] for row in rows] == ["a.wav", "long.wav", "long.wav", "long.wav", "z.wav"]
    mine = [row for row in rows if row["name"] == "long.wav"]
    assert mine[0]["start"] == 0 and mine[0]["end"] == mine[1]["start"] and mine[1]["end"] == mine[2]["start"]
    assert all(len(row["codes"][0]) == round((row["end"] - row["start"]) * 100) for row in mine)
    assert np.concatenate([row["codes"] for row in mine], 1).tolist() == of_whole(model, folder / "long.wav").tolist()


def test_other_rates_and_channels(tmp_path, checkpoint, audio_file):
    for rate in (8_000, 44_100):
        audio_file(tmp_path / "audio" / f"{rate}.wav", 3.0, rate, channels=2)
    rows = run(checkpoint, tmp_path / "audio", tmp_path / "codes.parquet", "--max_duration_in_seconds", "2")
    assert [(row["name"], len(row["codes"][0])) for row in rows] == [
        *[("44100.wav", 150), ("44100.wav", 149), ("8000.wav", 150), ("8000.wav", 149)]
    ]


def test_what_the_metadata_says(tmp_path, checkpoint, audio_folder):
    run(checkpoint, audio_folder(1), tmp_path / "codes.parquet")
    found = about(tmp_path / "codes.parquet")
    expected = {"groups": "2", "entries": "7", "sampling_rate": "16000", "inputs_to_logits_ratio": "160"}
    expected |= {"format": "acoustic.codes 1", "model": checkpoint, "frame_rate": "100", "collapsed": "false"}
    assert expected.items() <= found.items() and found["audio"] == str(tmp_path / "audio")


def test_datasets_reads_it(tmp_path, checkpoint, audio_folder):
    rows = run(checkpoint, audio_folder(3), tmp_path / "codes.parquet")
    files = str(tmp_path / "codes.parquet")
    read = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert read.column_names == ["name", "start", "end", "codes", "text"] and list(read) == rows
    assert read.with_format("numpy")[0]["codes"].shape == (2, 149)


def test_collapse_leaves_repeats_out(tmp_path, checkpoint, audio_folder):
    folder = audio_folder(2)
    whole, short = (run(checkpoint, folder, tmp_path / f"{c}.parquet", "--collapse", c) for c in ("false", "true"))
    for row, less in zip(whole, short, strict=True):
        words = row["text"].split()
        kept = [word for word, before in zip(words, [None, *words]) if word != before]
        assert less["text"].split() == kept and len(kept) < len(words)
        assert (less["start"], less["end"]) == (row["start"], row["end"])
        assert ["-".join(map(str, frame)) for frame in zip(*less["codes"])] == kept
    assert about(tmp_path / "true.parquet")["collapsed"] == "true"
    assert without_repeats(np.array([[1, 1, 1, 2], [3, 3, 4, 4]])).tolist() == [[1, 1, 2], [3, 4, 4]]


def test_many_entries_and_one_group(tmp_path, audio_folder):
    changed = {"num_codevector_groups": 1, "num_codevectors_per_group": 40_000}
    model = save(tmp_path / "model", make_model(**changed))
    rows = run(model, audio_folder(1, seconds=0.3), tmp_path / "codes.parquet")
    assert rows[0]["text"] == " ".join(map(str, rows[0]["codes"][0]))
    kind = pyarrow.parquet.read_schema(tmp_path / "codes.parquet").field("codes").type
    assert kind.value_type.value_type == "int32" and max(rows[0]["codes"][0]) > 2**15


def test_an_encoder_and_a_code_bert_give_the_same(tmp_path, checkpoint, audio_folder):
    folder = audio_folder(2)
    encoder = VQWav2VecModel.from_pretrained(checkpoint)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    bert = CodeBertForPreTraining(CodeBertConfig(quantizer=encoder.config.to_diff_dict(), **sizes))
    for name in ("encoder", "quantizer"):
        getattr(bert.code_bert.reader, name).load_state_dict(getattr(encoder, name).state_dict())
    others = [save(tmp_path / "encoder", encoder), save(tmp_path / "bert", bert)]
    expected = run(checkpoint, folder, tmp_path / "codes.parquet")
    assert all(run(other, folder, tmp_path / "codes.parquet", "--overwrite") == expected for other in others)


def test_row_groups_are_written_as_they_fill(tmp_path, checkpoint, audio_folder, monkeypatch):
    monkeypatch.setattr(export, "ROW_GROUP", 37)  # of 19 frames each
    run(checkpoint, audio_folder(5, seconds=0.2), tmp_path / "codes.parquet")
    assert pyarrow.parquet.read_metadata(tmp_path / "codes.parquet").num_row_groups == 3


# ---- what can't be used


def test_bad_files_are_named_and_skipped(tmp_path, checkpoint, audio_folder, capsys):
    folder = audio_folder(3)
    (folder / "broken.wav").write_text("no audio")
    soundfile.write(folder / "short.wav", np.zeros(100, np.float32), RATE)
    rows = run(checkpoint, folder, tmp_path / "codes.parquet")
    out, err = capsys.readouterr()
    assert [row["name"] for row in rows] == ["clip_000.wav", "clip_001.wav", "clip_002.wav"]
    assert "skipped: broken.wav: not readable as audio: " in err
    assert "skipped: short.wav: 0.006 s is shorter than a frame" in err
    used = [len({code for row in rows for code in row["codes"][group]}) for group in range(2)]
    assert "3 files, 0.00 h, 447 frames; " in out and "; skipped: 2; " in out
    assert f"codes in use: {used[0]}, {used[1]} of 7 in each group" in out


def test_a_name_that_is_not_utf8(tmp_path, checkpoint, audio_folder):
    folder = audio_folder(1)
    os.rename(folder / "clip_000.wav", os.fsencode(folder) + b"/caf\xe9.wav")
    assert run(checkpoint, folder, tmp_path / "codes.parquet")[0]["name"] == "caf\\udce9.wav"


def test_a_stream_without_usable_audio(tmp_path, checkpoint):
    import tarfile

    (tmp_path / "a.wav").write_text("no audio")
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        tar.add(tmp_path / "a.wav", "a.wav")
    with pytest.raises(UserError, match="nothing in .* can be used: 1 x not readable as audio"):
        run(checkpoint, tmp_path / "shard.tar", tmp_path / "codes.parquet")
    assert not list(tmp_path.glob("*.parquet")) and not list(tmp_path.glob(".*"))


def test_errors_are_one_line(tmp_path, checkpoint, group_norm_checkpoint, audio_folder):
    audio, out = audio_folder(1), tmp_path / "codes.parquet"
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "there.parquet").write_text("mine")
    cases = [
        (["nowhere", audio, out], "model_name_or_path: no model 'nowhere'"),
        ([group_norm_checkpoint, "nowhere/", out], "is a wav2vec2 checkpoint, which has no codes to export"),
        ([checkpoint, tmp_path / "nowhere", out], "dataset_name: there is no folder or file"),
        ([checkpoint, tmp_path / "empty", out], "dataset_name: no audio in"),
        ([checkpoint, audio, tmp_path / "codes.csv"], "codes.csv' must end in .parquet"),
        ([checkpoint, audio, tmp_path / "no" / "codes.parquet"], "output: there is no folder"),
        ([checkpoint, audio, tmp_path / "file" / "codes.parquet"], "output: there is no folder"),
        ([checkpoint, audio, tmp_path / "there.parquet"], "is there already; --overwrite true replaces it"),
        ([checkpoint, audio, "/proc/codes.parquet"], "output: can't write to '/proc/codes.parquet'"),
        ([checkpoint, json.dumps(["a", "b"]), out], "one data set at a time"),
        ([checkpoint, audio, out, "--max_duration_in_seconds", "0.5"], "max_duration_in_seconds: at least 1 s"),
        ([checkpoint, audio, out, "--batch_seconds", "10"], r"batch_seconds \(10\) holds no window"),
        ([checkpoint, audio, out, "--bogus", "1"], "unrecognized arguments: --bogus"),
    ]
    for (model, data, output, *options), message in cases:
        with pytest.raises(UserError, match=message):
            run(model, data, output, *options)
    assert (tmp_path / "there.parquet").read_text() == "mine" and not out.exists()


def test_a_checkpoint_without_a_quantizer(tmp_path, checkpoint, audio_folder):
    model = VQWav2VecModel.from_pretrained(checkpoint)
    weights = {name: value for name, value in model.state_dict().items() if not name.startswith("quantizer.")}
    model.save_pretrained(tmp_path / "model", state_dict=weights)
    Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="lacks weights of the quantizer: quantizer.codevectors"):
        run(tmp_path / "model", audio_folder(1), tmp_path / "codes.parquet")


# ---- what ends early


@pytest.mark.parametrize("workers", ["0", "1"])
def test_ctrl_c_leaves_what_was_there(tmp_path, checkpoint, audio_folder, monkeypatch, workers):
    folder, output = audio_folder(4), tmp_path / "out" / "codes.parquet"
    output.parent.mkdir()
    output.write_text("the old one")
    monkeypatch.setattr(export, "ROW_GROUP", 1)
    add, calls = export.Export.add, []

    def interrupt(self, *args):
        calls.append(args)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        add(self, *args)

    monkeypatch.setattr(export.Export, "add", interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            run(checkpoint, folder, output, "--overwrite", "true", "--dataloader_num_workers", workers)
    finally:
        signal.signal(signal.SIGINT, before)
    assert output.read_text() == "the old one" and os.listdir(output.parent) == ["codes.parquet"]
