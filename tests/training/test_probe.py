"""The probe while pretraining: what it measures, that it changes nothing, and that processes share its work."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import accelerate
import numpy as np
import pytest
from transformers import AutoFeatureExtractor, AutoModelForPreTraining

import run_pretrain
from acoustic.console import UserError
from acoustic.data.sources import open_rows
from acoustic.tasks.embeddings import Moments, load_encoder
from acoustic.tasks.probe import probe_accuracies
from acoustic.training.probe import LabeledClips, ProbeCallback, batches, read_clips

RATE = 16_000
NAMES = [f"{kind}/{number}.wav" for kind in ("cat", "dog") for number in range(4)]


@pytest.fixture
def clips(audio_folder):
    """make(per_class=3): the clips of a folder with two classes."""
    folder = audio_folder(NAMES, seconds=0.6)

    def make(per_class: int = 3) -> LabeledClips:
        return read_clips(open_rows(str(folder)), RATE, 0.1, 0.5, per_class, quiet=True)

    return make


def test_the_layer_that_tells_classes_apart_does_best():
    generator = np.random.default_rng(0)
    labels = np.repeat(["a", "b", "c"], 12)
    values = generator.standard_normal((36, 3, 40)).astype(np.float32)
    values[:, 1, :3] += 4 * (labels[:, None] == np.array(["a", "b", "c"]))
    accuracies = probe_accuracies(values, labels)
    assert accuracies[1] > 0.9 and accuracies[[0, 2]].max() < 0.6


def test_clips_are_judged_that_were_not_fitted():
    """With more features than clips any labels can be fitted; on others it is chance."""
    generator = np.random.default_rng(1)
    labels = generator.permutation(np.repeat(["a", "b"], 30))
    assert abs(probe_accuracies(generator.standard_normal((60, 1, 300)), labels)[0] - 0.5) < 0.2


def test_so_many_clips_of_each_class_the_same_every_time(clips):
    found = clips(3)
    assert sorted(found.labels) == ["cat"] * 3 + ["dog"] * 3
    assert [len(waveform) for waveform in found.waveforms] == [RATE // 2] * 6
    assert found.seconds == pytest.approx(3.0) and found.chance == 0.5
    for one, other in zip(found.waveforms, clips(3).waveforms):
        np.testing.assert_array_equal(one, other)
    assert len(clips(100).labels) == 8


@pytest.mark.parametrize(
    "names, seconds, line",
    [
        (["a.wav", "b.wav"], 0.6, "has 0 classes; a probe needs two"),
        (["cat/a.wav", "cat/b.wav"], 0.6, "has 1 classes; a probe needs two"),
        (["cat/a.wav", "cat/b.wav", "dog/a.wav"], 0.6, "class 'dog' has fewer than 2 usable clips"),
        (["cat/a.wav", "cat/b.wav", "dog/a.wav", "dog/b.wav"], 0.05, r"\(the last one skipped: .*shorter"),
    ],
)
def test_bad_input(audio_folder, names, seconds, line):
    rows = open_rows(str(audio_folder(names, seconds=seconds)))
    with pytest.raises(UserError, match=line):
        read_clips(rows, RATE, 0.1, 0.5, 3, quiet=True)


def test_a_stream_is_refused(audio_folder):
    rows = open_rows(str(audio_folder(NAMES))).iterate
    with pytest.raises(UserError, match="can't be drawn from a stream"):
        read_clips(rows, RATE, 0.1, 0.5, 3, quiet=True)


def test_batches_keep_the_order_and_the_limit():
    waveforms = [np.zeros(length) for length in (5, 5, 5, 9, 2, 30, 1)]
    made = batches(waveforms, 12)
    assert [len(waveform) for batch in made for waveform in batch] == [5, 5, 5, 9, 2, 30, 1]
    assert [len(batch) for batch in made] == [2, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_processes_share_the_clips(world_size, clips, layer_norm_checkpoint, audio_folder):
    """Whoever computed a clip, it comes out at its place, as the checkpoint's encoder hears it alone."""
    found, told = clips(4), []
    model = AutoModelForPreTraining.from_pretrained(layer_norm_checkpoint).train()
    extractor = AutoFeatureExtractor.from_pretrained(layer_norm_checkpoint)
    trainer = SimpleNamespace(model=model, processing_class=extractor, accelerator=accelerate.Accelerator(cpu=True))
    trainer.gather = lambda mine: told.extend(mine) or told
    callback = ProbeCallback(trainer, found, every=1, batch_seconds=1.0)
    for process in range(world_size):
        args = SimpleNamespace(process_index=process, world_size=world_size)
        if process < world_size - 1:
            with pytest.raises(ValueError):  # the shares of the others are missing
                callback.embed(args)
        else:
            values = callback.embed(args)
    assert model.training and model.base_model.training
    encoder = load_encoder(layer_norm_checkpoint)
    for waveform, value in zip(found.waveforms, values, strict=True):
        moments = Moments()
        moments.add(encoder.layers([waveform])[0])
        np.testing.assert_allclose(value, moments.pooled(), atol=1e-5)


def losses(output: Path) -> list:
    history = json.loads(Path(output, "trainer_state.json").read_text())["log_history"]
    return [(entry["step"], entry["loss"], entry["grad_norm"]) for entry in history if "loss" in entry]


def probes(output: Path) -> list:
    history = json.loads(Path(output, "trainer_state.json").read_text())["log_history"]
    return [(entry["step"], entry["probe_accuracy"]) for entry in history if "probe_accuracy" in entry]


@pytest.mark.figures
def test_a_run_with_a_probe(pretrain_args, audio_folder, tmp_path):
    """The same losses as without, to the last bit; resumed, it goes on; told in results, card and figure."""
    labeled = audio_folder(NAMES, seconds=0.6, root=tmp_path / "labeled")
    given = {"max_steps": 6, "logging_steps": 1, "save_steps": 4, "eval_strategy": "no"}
    probe = {"probe_dataset_name": str(labeled), "probe_steps": 4}
    run_pretrain.main(pretrain_args(output_dir=str(tmp_path / "without"), **given))
    results = run_pretrain.main(pretrain_args(output_dir=str(tmp_path / "with"), **given, **probe))
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    looked = probes(tmp_path / "with")
    assert [step for step, _ in looked] == [0, 4, 6]
    assert results["probe_accuracy"] == looked[-1][1]
    assert Path(tmp_path, "with/figures/probe.png").stat().st_size > 5_000
    card = Path(tmp_path, "with/README.md").read_text()
    assert "probe while pretraining: 8 clips of 2 classes (4 to 4 each)" in card and "| probe_accuracy |" in card
    Path(tmp_path, "with/all_results.json").unlink()
    shutil.rmtree(tmp_path / "with/checkpoint-6", ignore_errors=True)
    run_pretrain.main(
        pretrain_args(output_dir=str(tmp_path / "with"), resume_from_checkpoint="true", **given, **probe)
    )
    assert probes(tmp_path / "with") == looked and losses(tmp_path / "with") == losses(tmp_path / "without")
