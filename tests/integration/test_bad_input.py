"""The user's mistakes: one line that says what, where and what to do, exit code 2; single bad files end no run."""

import json
import os
import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import soundfile
from transformers import HubertConfig, HubertModel, Wav2Vec2FeatureExtractor

import run_finetune
import run_pretrain
from acoustic.config import parse_finetuning
from acoustic.console import UserError, one_line_errors
from acoustic.training import setup
from acoustic.training.resume import refuse_another_kind


@pytest.fixture
def fails(capsys, tmp_path, monkeypatch):
    """fails(script, argv, *words): it ends with one line on stderr that holds the words, and with exit code 2."""
    monkeypatch.chdir(tmp_path)

    def check(script, argv: list[str], *words: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left, one_line_errors():
            script.main([*argv, "--report_to", "none", "--disable_tqdm", "true"])
        assert left.value.code == 2
        captured = capsys.readouterr()
        lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and captured.err.rstrip().endswith(lines[0])
        assert "Traceback" not in captured.err + captured.out
        for word in words:
            assert word in lines[0], lines[0]
        return lines[0]

    return check


@pytest.fixture
def pretrain(fails, tmp_path, tiny_config):
    def check(dataset, *words, options: tuple = (), overrides: dict | None = None):
        argv = ["--dataset_name", str(dataset), "--output_dir", str(tmp_path / "out"), *options]
        config = {**tiny_config, **(overrides or {})}
        return fails(run_pretrain, [*argv, "--config_overrides", json.dumps(config)], *words)

    return check


@pytest.fixture
def finetune(fails, tmp_path, group_norm_checkpoint):
    def check(dataset, *words, options: tuple = (), model: str = group_norm_checkpoint):
        argv = ["--dataset_name", str(dataset), "--output_dir", str(tmp_path / "out"), *options]
        return fails(run_finetune, [*argv, "--model_name_or_path", str(model), "--max_steps", "1"], *words)

    return check


# ---- audio


def test_missing_folder(pretrain, finetune, tmp_path):
    missing = tmp_path / "nowhere"
    pretrain(missing, "dataset_name: there is no folder or file", str(missing))
    finetune(missing, "dataset_name: there is no folder or file", str(missing))


def test_a_name_that_is_neither_here_nor_on_the_hub(pretrain):
    pretrain("nowhere", "dataset_name: 'nowhere' is no local folder or file")


@pytest.mark.parametrize("name", ["recordngs", "{}/recordngs"])
def test_a_name_that_is_nearly_there(pretrain, finetune, audio_folder, tmp_path, name):
    name = name.format(tmp_path)
    right = name.replace("recordngs", "recordings")
    audio_folder(["a/1.wav", "b/2.wav", "a/3.wav"], root=right)
    pretrain(name, f"; did you mean {right!r}?")
    finetune(right, f"; did you mean {right!r}?", model=name)


def test_a_tracker_that_is_not_there(monkeypatch):
    """Said before any audio is read."""
    monkeypatch.setattr(setup, "get_available_reporting_integrations", lambda: ["trackio"])
    for given, said in (("tensorbord", "no 'tensorbord'; did you mean 'tensorboard'?"), ("x", "trackio, tensorboard")):
        with pytest.raises(UserError, match=re.escape(said)):
            setup.check_trackers(SimpleNamespace(report_to=[given]))
    with pytest.raises(UserError, match="'wandb' needs a package that is not installed: pip install wandb"):
        setup.check_trackers(SimpleNamespace(report_to=["trackio, wandb"]))
    given = SimpleNamespace(report_to=["trackio"])
    setup.check_trackers(given)
    assert given.report_to == ["trackio"]


def test_empty_folder(pretrain, finetune, tmp_path):
    (tmp_path / "empty").mkdir()
    for run in (pretrain, finetune):
        run(tmp_path / "empty", "dataset_name: no audio in", str(tmp_path / "empty"), "found nothing", ".wav .flac")


def test_folder_without_audio(pretrain, tmp_path):
    (tmp_path / "texts" / "more").mkdir(parents=True)
    for name in ("a.txt", "more/b.txt", "c.doc", "README"):
        (tmp_path / "texts" / name).write_text("words")
    pretrain(tmp_path / "texts", "no audio in", "2 .txt", "1 .doc", "1 (no suffix)", ".wav .flac")


def test_a_file_that_is_not_audio(pretrain, tmp_path):
    (tmp_path / "notes.txt").write_text("words")
    (tmp_path / "notes.wav").write_text("words " * 100)
    pretrain(tmp_path / "notes.txt", "is neither audio nor a manifest", "notes.txt", ".csv .tsv .jsonl .parquet")
    pretrain(tmp_path / "notes.wav", "can be used: 1 x not readable as audio", "notes.wav")


def test_a_zero_byte_file(pretrain, tmp_path):
    (tmp_path / "zero.wav").touch()
    pretrain(tmp_path / "zero.wav", "can be used: 1 x empty file", "zero.wav")


def test_all_clips_too_short(pretrain, finetune, audio_folder):
    folder = audio_folder(["a/1.wav", "b/2.wav", "b/3.wav"], seconds=0.3)
    pretrain(folder, "can be used", "shorter than min_duration_in_seconds=1", str(folder))
    finetune(folder, "shorter than min_duration_in_seconds=0.5", options=("--min_duration_in_seconds", "0.5"))


def test_every_manifest_path_is_wrong(pretrain, tmp_path):
    (tmp_path / "list.csv").write_text("path\na.wav\nb.wav\n")
    pretrain(tmp_path / "list.csv", "can be used: ", " x no such file", "list.csv")


@pytest.mark.parametrize("workers", ["0", "1"])
def test_headers_are_good_but_nothing_decodes(pretrain, tmp_path, workers):
    (tmp_path / "audio").mkdir()
    for name in "abc":
        soundfile.write(tmp_path / "audio" / f"{name}.wav", np.full(20_000, np.nan, np.float32), 16_000, "FLOAT")
    options = ("--max_steps", "1", "--dataloader_num_workers", workers, "--validation_split_percentage", "0")
    line = pretrain(tmp_path / "audio", "can be used: 3 x NaN or infinite samples", options=options)
    assert "DataLoader" not in line


# ---- columns and splits


def test_missing_split(pretrain, finetune, audio_folder):
    folder = audio_folder(["train/a/1.wav", "train/b/2.wav"], seconds=1.2)
    words = ("dataset_name", "has no split 'dev'", "it has: train/")
    pretrain(folder, *words, options=("--eval_split_name", "dev"))
    finetune(folder, *words, options=("--train_split_name", "dev"))
    finetune(folder, *words, options=("--eval_split_name", "dev"))


def test_a_missing_test_split_is_found_before_training(finetune, audio_folder, tmp_path):
    folder = audio_folder(["train/a/1.wav", "train/b/2.wav"], seconds=1.2)
    finetune(folder, "has no split 'test'", options=("--test_split_name", "test", "--dataloader_num_workers", "0"))
    assert not (tmp_path / "out" / "checkpoint-1").exists()


def test_missing_columns(finetune, audio_folder):
    folder = audio_folder(["1.wav", "2.wav"], seconds=0.5)
    pd.DataFrame({"path": ["1.wav", "2.wav"], "words": ["a", "b"], "kind": ["x", "y"]}).to_csv(folder / "list.csv")
    finetune(
        folder / "list.csv",
        "label_column_name: ",
        "has no column 'species'",
        "path, words, kind",
        options=("--label_column_name", "species"),
    )
    finetune(
        folder / "list.csv",
        "text_column_name: ",
        "has no column 'text'",
        "path, words, kind",
        options=("--task", "ctc"),
    )
    finetune(folder, "text_column_name: ", "plain folder", "metadata.csv", options=("--task", "ctc"))


def test_labels_that_teach_nothing(finetune, audio_folder):
    single = audio_folder(["train/dog/1.wav", "train/dog/2.wav"], seconds=0.5)
    finetune(single, "a single class, 'dog'", str(single))
    finetune(single / "train" / "dog", "has no labels", "one folder per class")
    (single / "list.csv").write_text("path,text\ntrain/dog/1.wav,\ntrain/dog/2.wav,?!\n")
    finetune(single / "list.csv", "text_column_name", "has no text", options=("--task", "ctc"))


def test_more_labels_per_class_than_there_are(finetune, audio_folder):
    folder = audio_folder(["a/1.wav", "a/2.wav", "b/3.wav"], seconds=0.5)
    finetune(folder, "labels_per_class: 2 asked for, 'b' has 1", options=("--labels_per_class", "2"))


# ---- models


def test_missing_model(pretrain, finetune, audio_folder, tmp_path):
    folder = audio_folder(["a/1.wav", "b/2.wav"], seconds=1.2)
    missing = str(tmp_path / "nomodel")
    words = ("model_name_or_path: no model", missing, "config.json")
    pretrain(folder, *words, options=("--model_name_or_path", missing, "--max_steps", "1"))
    finetune(folder, *words, model=missing)


def test_a_model_of_another_family(pretrain, audio_folder, tmp_path, tiny_config):
    folder = audio_folder(2, seconds=1.2)
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "conv_dim")
    keys += ("num_conv_pos_embeddings", "num_conv_pos_embedding_groups")
    HubertModel(HubertConfig(**{key: tiny_config[key] for key in keys})).save_pretrained(tmp_path / "hubert")
    Wav2Vec2FeatureExtractor().save_pretrained(tmp_path / "hubert")
    options = ("--model_name_or_path", str(tmp_path / "hubert"), "--max_steps", "1")
    words = ("model_name_or_path", "is a hubert checkpoint", "objective wav2vec2 can't continue")
    pretrain(folder, *words, options=options)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"hiden_size": 32}, ("has no 'hiden_size'", "did you mean 'hidden_size'")),
        ({"hidden_size": 30, "num_attention_heads": 4}, ("hidden_size", "num_attention_heads")),
        ({"hidden_size": 32, "num_conv_pos_embedding_groups": 5}, ("num_conv_pos_embedding_groups",)),
        ({"conv_dim": [8, 8]}, ("conv_dim", "conv_kernel", "conv_stride")),
        ({"hidden_size": "wide"}, ("hidden_size",)),
        ({"num_codevector_groups": 3}, ("codevector_dim", "num_codevector_groups")),
    ],
)
def test_impossible_config_overrides(pretrain, audio_folder, overrides, words):
    options = ("--max_steps", "1")
    pretrain(audio_folder(2, seconds=1.2), "config_overrides: ", *words, overrides=overrides, options=options)


# ---- where a run goes on


def test_output_dir_that_holds_a_run(pretrain, audio_folder, tmp_path):
    (tmp_path / "out" / "checkpoint-7").mkdir(parents=True)
    words = ("output_dir", "already holds checkpoint-7", "--resume_from_checkpoint true", "--overwrite_output_dir")
    pretrain(audio_folder(2, seconds=1.2), *words)
    assert (tmp_path / "out" / "checkpoint-7").is_dir()


def test_output_dir_that_can_not_be_made(pretrain, audio_folder, tmp_path):
    (tmp_path / "out").write_text("a file")
    pretrain(audio_folder(2, seconds=1.2), "output_dir", str(tmp_path / "out"))


def test_nothing_to_resume_from(pretrain, audio_folder, tmp_path):
    folder = audio_folder(2, seconds=1.2)
    pretrain(folder, "resume_from_checkpoint: no whole checkpoint in", options=("--resume_from_checkpoint", "true"))
    other = str(tmp_path / "gone")
    message = "is not a whole checkpoint: no complete.json"
    pretrain(folder, message, "resume_from_checkpoint", other, options=("--resume_from_checkpoint", other))


def test_resuming_under_fsdp_what_was_not(tmp_path):
    (tmp_path / "pytorch_model_fsdp.bin").touch()
    refuse_another_kind(str(tmp_path), sharded=True, model_type="wav2vec2")
    with pytest.raises(UserError, match="saved under FSDP, and this run is under DDP or one process; run as before"):
        refuse_another_kind(str(tmp_path), sharded=False, model_type="wav2vec2")
    (tmp_path / "pytorch_model_fsdp.bin").unlink()
    refuse_another_kind(str(tmp_path), sharded=False, model_type="wav2vec2")
    with pytest.raises(UserError, match="saved under DDP or one process, and this run is under FSDP"):
        refuse_another_kind(str(tmp_path), sharded=True, model_type="wav2vec2")


def test_fine_tuning_under_fsdp(monkeypatch, audio_folder, group_norm_checkpoint, tmp_path):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    words = ["--dataset_name", str(audio_folder(2)), "--model_name_or_path", group_norm_checkpoint]
    with pytest.raises(UserError, match="fsdp is for pretraining; fine-tune under recipes/accelerate/multi_gpu.yaml"):
        parse_finetuning([*words, "--output_dir", str(tmp_path / "out"), "--use_cpu", "true"])


def test_a_stream_without_max_steps(pretrain, audio_folder, tmp_path):
    folder = audio_folder(2, seconds=1.2)
    paths = sorted(map(str, folder.glob("*.wav")))
    pd.DataFrame({"audio": paths}).to_parquet(tmp_path / "list.parquet")
    pretrain(tmp_path / "list.parquet", "max_steps: a stream's length is not known", options=("--streaming", "true"))


# ---- bad files beside good audio


@pytest.mark.parametrize("held_out", ["0", "40"])
def test_single_bad_files_end_no_run(audio_folder, audio_file, tmp_path, tiny_config, held_out):
    folder = audio_folder(8, seconds=1.2)
    (folder / "text.wav").write_text("words " * 100)
    (folder / "zero.flac").touch()
    (folder / "header only.wav").write_bytes((folder / "clip_000.wav").read_bytes()[:44])
    audio_file(folder / "short.wav", seconds=0.2)
    cut = audio_file(folder / "cut.flac", seconds=1.2)
    cut.write_bytes(cut.read_bytes()[:3_000])
    soundfile.write(folder / "nan.wav", np.full(20_000, np.nan, np.float32), 16_000, "FLOAT")
    argv = ["--dataset_name", str(folder), "--output_dir", str(tmp_path / "out"), "--max_steps", "4"]
    argv += ["--config_overrides", json.dumps(tiny_config), "--dataloader_num_workers", "0", "--report_to", "none"]
    argv += ["--validation_split_percentage", held_out, "--batch_seconds", "16", "--disable_tqdm", "true"]
    argv += ["--max_skipped_fraction", "0.5"]
    with one_line_errors():
        results = run_pretrain.main(argv)
    assert np.isfinite(results["train_loss"]) and ("eval_contrastive_loss" in results) == (held_out != "0")
    report = json.loads((tmp_path / "out" / "data_report.json").read_text())
    assert report["skipped"] == 6
    assert set(report["splits"]) <= ({"train"} if held_out == "0" else {"train", "eval"})
    skipped = {}
    for part in report["splits"].values():
        assert part["skipped"] == len(part["skipped_recordings"]) and not skipped.keys() & part["skipped_recordings"]
        skipped |= part["skipped_recordings"]
    assert {name: reason.split(":")[0].split(" (")[0] for name, reason in skipped.items()} == {
        "text.wav": "not readable as audio",
        "zero.flac": "empty file",
        "header only.wav": "no samples in the file",
        "short.wav": "0.20 s is shorter than min_duration_in_seconds=1",
        "cut.flac": "decoding failed",
        "nan.wav": "NaN or infinite samples",
    }


def write_faults(folder, good: bytes, flac: bytes) -> dict[str, str]:
    """One of each fault that a folder can hold. Returns the beginning of each one's reason."""
    samples = np.random.default_rng(0).uniform(-0.3, 0.3, 20_000).astype(np.float32)
    soundfile.write(folder / "nan.wav", np.full_like(samples, np.nan), 16_000, "FLOAT")
    soundfile.write(folder / "silent.wav", np.zeros_like(samples), 16_000)
    soundfile.write(folder / "500 channels.wav", np.zeros((100, 500), np.float32), 16_000)
    soundfile.write(folder / "short.wav", samples[:3_000], 16_000)
    (folder / "text.wav").write_text("words " * 300)
    (folder / "empty.flac").touch()
    (folder / "header only.wav").write_bytes(good[:44])
    (folder / "cut.flac").write_bytes(flac[: len(flac) // 2])
    (folder / "unreadable.flac").write_bytes(flac[:4] + bytes(len(flac)))
    (folder / "0 Hz.wav").write_bytes(good[:24] + bytes(4) + good[28:])
    frames = int.from_bytes(flac[18:26], "big") >> 36 << 36 | 100 * 3600 * 16_000
    (folder / "100 hours.flac").write_bytes(flac[:18] + frames.to_bytes(8, "big") + flac[26:1_000])
    (folder / "gone.wav").symlink_to(folder / "nowhere.wav")
    os.mkfifo(folder / "pipe.wav")
    with open(os.fsencode(folder) + b"/not utf8 \xff.wav", "wb"):
        pass
    return {
        "nan.wav": "NaN or infinite samples",
        "silent.wav": "silent",
        "500 channels.wav": "absurd header: 500 channels",
        "short.wav": "0.19 s is shorter than min_duration_in_seconds=1",
        "text.wav": "not readable as audio: Format not recognised",
        "empty.flac": "empty file",
        "header only.wav": "no samples in the file",
        "cut.flac": "decoding failed: ",
        "unreadable.flac": "not readable as audio: ",
        "0 Hz.wav": "not readable as audio: ",
        "100 hours.flac": "absurd header: 100 h in 1000 bytes",
        "gone.wav": "no such file",
        "pipe.wav": "not a regular file",
        os.fsdecode(b"not utf8 \xff.wav"): "empty file",
    }


@pytest.mark.parametrize("workers", ["0", "2"])
def test_one_of_each_fault_beside_good_audio(tmp_path, audio_folder, audio_file, tiny_config, capsys, workers):
    """The run trains, ends as it should and lists every fault by its name: 13 of 214 recordings, and a short one."""
    folder = audio_folder(200, seconds=[1.0 + 0.001 * number for number in range(200)])
    flac = audio_file(tmp_path / "a.flac", 1.2)
    reasons = write_faults(folder, (folder / "clip_000.wav").read_bytes(), flac.read_bytes())
    argv = ["--dataset_name", str(folder), "--output_dir", str(tmp_path / "out"), "--max_steps", "16"]
    argv += [
        "--config_overrides",
        json.dumps(tiny_config),
        "--dataloader_num_workers",
        workers,
        "--batch_seconds",
        "16",
    ]
    argv += ["--validation_split_percentage", "5", "--logging_steps", "4", "--report_to", "none"]
    argv += ["--disable_tqdm", "true", "--use_cpu", "true"]
    with one_line_errors():
        results = run_pretrain.main(argv)
    assert np.isfinite(results["train_loss"]) and np.isfinite(results["eval_contrastive_loss"])
    report = json.loads((tmp_path / "out" / "data_report.json").read_text(encoding="utf-8"))
    listed = {name: why for part in report["splits"].values() for name, why in part["skipped_recordings"].items()}
    assert listed.keys() == reasons.keys() and report["skipped"] == len(reasons)
    assert all(listed[name].startswith(reason) for name, reason in reasons.items()), listed
    assert sum(sum(part["skipped_by_reason"].values()) for part in report["splits"].values()) == len(reasons)
    assert report["hours_seen"] > 200 / 3600  # more than an epoch: all of the good audio was met
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert f"skipped: {len(reasons)} recordings" in capsys.readouterr().out
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"- skipped: {len(reasons)} recordings: " in card and "1 x " in card
