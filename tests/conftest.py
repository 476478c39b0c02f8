"""Shared fixtures: toy audio in every format, a toy wav2vec 2.0 and its checkpoints. Offline, on the CPU."""

import gc
import os

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
# Toy sizes, and as many pytest workers as cores: more threads than that wait for each other, up to ten times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # CUDA_VISIBLE_DEVICES=0 runs the same tests on a GPU

from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import soundfile  # noqa: E402
import torch  # noqa: E402
from blank_figures import render  # noqa: E402
from transformers import (  # noqa: E402
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2ForPreTraining,
)

RATE = 16_000


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    render(figures=item.get_closest_marker("figures") is not None)


def pytest_collection_finish():
    """What is imported stays: the garbage collector need not look through it in every test."""
    gc.collect()
    gc.freeze()


# libsndfile's (format, subtype) of each suffix.
FORMATS = {
    ".wav": ("WAV", "PCM_16"),
    ".flac": ("FLAC", "PCM_16"),
    ".ogg": ("OGG", "VORBIS"),
    ".opus": ("OGG", "OPUS"),
    ".mp3": ("MP3", "MPEG_LAYER_III"),
}

# wav2vec 2.0's seven conv layers and 20 ms frames, in about 35,000 weights; values for `config_overrides`.
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "conv_dim": [24] * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "num_codevectors_per_group": 16,
    "codevector_dim": 32,
    "proj_codevector_dim": 32,
    "num_negatives": 10,
    "layerdrop": 0.0,
}


def make_tone(seconds: float, rate: int = RATE, channels: int = 1, seed: int = 0) -> np.ndarray:
    """(frames, channels) float32: a tone that the seed chooses, another in each channel, and noise."""
    generator = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate)) / rate
    pitches = generator.uniform(150, 1500, channels)
    tones = 0.3 * np.sin(2 * np.pi * pitches * time[:, None])
    return (tones + 0.02 * generator.standard_normal(tones.shape)).astype(np.float32)


def write_audio(path, seconds: float = 1.5, rate: int = RATE, channels: int = 1, seed: int = 0) -> Path:
    """Write a tone in the format of the path's suffix, making its folders."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    container, subtype = FORMATS[path.suffix]
    soundfile.write(path, make_tone(seconds, rate, channels, seed), rate, format=container, subtype=subtype)
    return path


@pytest.fixture(scope="session")
def tone():
    """make_tone(seconds, rate, channels, seed) -> (frames, channels)."""
    return make_tone


@pytest.fixture(scope="session")
def audio_file():
    """write_audio(path, seconds, rate, channels, seed) -> path; wav, flac, ogg, opus or mp3 by the suffix."""
    return write_audio


@pytest.fixture
def audio_folder(tmp_path):
    """make(names, seconds=1.5, rate=16000, channels=1, root=...) -> folder.

    `names`: how many "clip_000.wav", ... or their paths below the folder ("dog/a.flac"). `seconds`: one length, or one
    for each file. Every file has its own seed, so its own sound.
    """

    def make(names=4, seconds=1.5, rate: int = RATE, channels: int = 1, root=None) -> Path:
        root = Path(root) if root else tmp_path / "audio"
        root.mkdir(parents=True, exist_ok=True)
        names = [f"clip_{index:03d}.wav" for index in range(names)] if isinstance(names, int) else list(names)
        lengths = seconds if isinstance(seconds, (list, tuple)) else [seconds] * len(names)
        for seed, (name, length) in enumerate(zip(names, lengths, strict=True)):
            write_audio(root / name, length, rate, channels, seed)
        return root

    return make


@pytest.fixture(scope="session")
def tiny_config() -> dict:
    """`config_overrides` of a toy wav2vec 2.0: `["--config_overrides", json.dumps(tiny_config)]`."""
    return dict(TINY)


def save_checkpoint(folder: Path, model_class=Wav2Vec2ForPreTraining, return_attention_mask=False, **config) -> str:
    torch.manual_seed(0)
    model = model_class(Wav2Vec2Config(**{**TINY, **config}))
    model.save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=return_attention_mask).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def group_norm_checkpoint(tmp_path_factory) -> str:
    """A pretrained checkpoint of the kind of facebook/wav2vec2-base: group norm in the convs, post-LN."""
    folder = tmp_path_factory.mktemp("group_norm")
    return save_checkpoint(folder, feat_extract_norm="group", do_stable_layer_norm=False, conv_bias=False)


@pytest.fixture(scope="session")
def layer_norm_checkpoint(tmp_path_factory) -> str:
    """A pretrained checkpoint of the kind of large-lv60 and xls-r: layer norm in the convs, pre-LN, attention mask."""
    folder = tmp_path_factory.mktemp("layer_norm")
    return save_checkpoint(
        folder, return_attention_mask=True, feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True
    )


@pytest.fixture(scope="session")
def ctc_checkpoint(tmp_path_factory) -> str:
    """A fine-tuned CTC model of plain transformers: an encoder without quantizer and pretraining head."""
    return save_checkpoint(tmp_path_factory.mktemp("ctc"), Wav2Vec2ForCTC, vocab_size=12)
