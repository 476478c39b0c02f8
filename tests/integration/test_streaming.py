"""Fine-tuning from a stream: labels and vocabulary from a first pass over their column, audio decoded to train."""

import json
import tarfile
from pathlib import Path

import datasets
import pytest

import run_finetune
import run_pretrain


@pytest.fixture(scope="module")
def parquet_folder(tmp_path_factory):
    """Two parquet files with embedded audio, a ClassLabel and a text: ten clips of two kinds."""
    from tests.conftest import write_audio

    root = tmp_path_factory.mktemp("stream")
    features = datasets.Features(
        {
            "audio": datasets.Audio(),
            "kind": datasets.ClassLabel(names=["cat", "dog"]),
            "text": datasets.Value("string"),
        }
    )
    (root / "clips").mkdir()
    for part in range(2):
        files = [str(write_audio(root / "clips" / f"{part}{n}.wav", 1.0, 16_000, 1, n)) for n in range(5)]
        audio = [{"path": None, "bytes": Path(file).read_bytes()} for file in files]
        content = {
            "audio": audio,
            "kind": [n % 2 for n in range(5)],
            "text": [("Cat.", "Dog!")[n % 2] for n in range(5)],
        }
        table = datasets.Dataset.from_dict(content, features=features)
        (root / "data").mkdir(exist_ok=True)
        table.to_parquet(root / "data" / f"train-{part:05d}-of-00002.parquet")
    return str(root / "data")


@pytest.mark.parametrize("options", [("classification", "--label_column_name", "kind"), ("ctc",)], ids=lambda o: o[0])
def test_fine_tuning_from_a_stream(parquet_folder, group_norm_checkpoint, tmp_path, options):
    task, *columns = options
    overrides = json.dumps({"mask_time_prob": 0.0, "mask_feature_prob": 0.0})
    results = run_finetune.main(
        ["--task", task, *columns, "--dataset_name", parquet_folder, "--streaming", "true", "--max_steps", "2"]
        + ["--model_name_or_path", group_norm_checkpoint, "--output_dir", str(tmp_path), "--use_cpu", "true"]
        + ["--config_overrides", overrides, "--test_split_name", "train", "--disable_tqdm", "true"]
        + ["--dataloader_num_workers", "2"]
    )
    config = json.loads((tmp_path / "config.json").read_text())
    if task == "classification":
        assert config["id2label"] == {"0": "cat", "1": "dog"}
        assert 0 <= results["train_accuracy"] <= 1
    else:
        vocabulary = json.loads((tmp_path / "vocab.json").read_text())
        assert set(vocabulary) - {"[PAD]", "[UNK]", "|"} == set("catdog")
        assert results["train_wer"] >= 0
    predictions = json.loads((tmp_path / "predictions_train.json").read_text())["predictions"]
    assert len(predictions) == 10
    assert json.loads((tmp_path / "data_report.json").read_text())["skipped"] == 0


def test_pretraining_from_a_stream(parquet_folder, tiny_config, tmp_path):
    run_pretrain.main(
        ["--dataset_name", parquet_folder, "--streaming", "true", "--max_steps", "2", "--output_dir", str(tmp_path)]
        + ["--config_overrides", json.dumps(tiny_config), "--max_duration_in_seconds", "2", "--use_cpu", "true"]
        + ["--disable_tqdm", "true", "--validation_split_percentage", "30"]
    )
    logged = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert any("eval_contrastive_loss" in entry for entry in logged)


def test_pretraining_from_tars_with_a_broken_one(parquet_folder, tiny_config, tmp_path):
    """Read in place: nothing is unpacked, and what is broken is in the report."""
    clips = sorted(Path(parquet_folder).parent.glob("clips/*.wav"))
    (tmp_path / "tars").mkdir()
    for number in range(2):
        with tarfile.open(tmp_path / "tars" / f"{number}.tar", "w") as tar:
            for clip in clips[5 * number : 5 * number + 5]:
                tar.add(clip, clip.name)
    (tmp_path / "tars" / "2.tar").write_text("no tar " * 999)
    run_pretrain.main(
        ["--dataset_name", str(tmp_path / "tars"), "--max_steps", "3", "--output_dir", str(tmp_path / "out")]
        + ["--config_overrides", json.dumps(tiny_config), "--max_duration_in_seconds", "2", "--use_cpu", "true"]
        + ["--disable_tqdm", "true", "--validation_split_percentage", "0", "--dataloader_num_workers", "2"]
    )
    report = json.loads((tmp_path / "out" / "data_report.json").read_text())
    ((name, reason),) = report["splits"]["train"]["skipped_recordings"].items()
    assert "2.tar" in name and reason == "broken tar member"
    assert report["hours_seen"] > 0
