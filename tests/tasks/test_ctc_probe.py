"""The frozen probe for speech: a clip is heard the same alone and beside others, and it learns to spell tones."""

import numpy as np
import pytest
import torch

from acoustic.tasks import ctc_probe
from acoustic.tasks.ctc_probe import KERNEL, CTCProbe, Utterances, draw_batches, fit, hypotheses, moments


def draw(lengths, layers: int = 3, width: int = 6, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(layers, length, width, generator=generator).half() for length in lengths]


def make_probe(clips: list[torch.Tensor]) -> CTCProbe:
    torch.manual_seed(0)
    probe = CTCProbe(*moments(clips), vocabulary=4).eval()
    torch.nn.init.normal_(probe.layer_weights)
    return probe


def test_a_clip_alone_and_beside_others():
    clips = draw((5, 40, 1, 17))
    probe = make_probe(clips)
    for clip, beside in zip(clips, probe(clips), strict=True):
        (alone,) = probe([clip])
        assert beside.shape == (clip.shape[1], 4)
        torch.testing.assert_close(beside, alone, atol=1e-5, rtol=1e-5)


def test_logits_by_a_naive_loop():
    (clip,) = draw((9,))
    probe = make_probe([clip])
    shares, values = torch.softmax(probe.layer_weights, 0), clip.float()
    hidden = torch.zeros(9, 6)
    for layer in range(3):
        mean, variance = values[layer].mean(0), values[layer].var(0, unbiased=False)
        hidden += shares[layer] * (values[layer] - mean) / (variance + 1e-5).sqrt()
    hidden = probe.projection(hidden)
    for conv, norm in zip(probe.convs, probe.norms):
        frames = []
        for centre in range(9):
            total = conv.bias.clone()
            for place in range(KERNEL):
                if 0 <= (frame := centre + place - KERNEL // 2) < 9:
                    total += conv.weight[:, :, place] @ hidden[frame]
            frames.append(torch.nn.functional.gelu(norm(total)))
        hidden = torch.stack(frames)
    torch.testing.assert_close(probe([clip])[0], probe.head(hidden), atol=1e-4, rtol=1e-4)


def test_every_clip_once_before_any_comes_again(monkeypatch):
    monkeypatch.setattr(ctc_probe, "BATCH_FRAMES", 20)
    utterances = Utterances([""] * 7, [""] * 7, draw((10,) * 7), [[]] * 7)
    drawn = [index for _, batch in zip(range(7), draw_batches(utterances, 0)) for index in batch]
    assert len(drawn) == 14 and sorted(drawn[:7]) == sorted(drawn[7:]) == list(range(7))


@pytest.fixture
def spelled():
    """make(number, seed): noise in which one of two channels rises for some frames, in the order of the text."""

    def make(number: int, seed: int) -> Utterances:
        generator, texts, clips = np.random.default_rng(seed), [], []
        for _ in range(number):
            text = "".join(generator.choice(list("ab"), generator.integers(1, 4)))
            clip = 0.5 * torch.from_numpy(generator.standard_normal((2, 12 * len(text) + 8, 5)))
            for place, char in enumerate(text):
                start = 12 * place + int(generator.integers(1, 8))
                clip[1, start : start + 5, "ab".index(char)] += 3
            texts.append(text)
            clips.append(clip.half())
        labels = [["_ab".index(char) for char in text] for text in texts]
        return Utterances([str(number) for number in range(len(texts))], texts, clips, labels)

    return make


def spell(logits: torch.Tensor) -> str:
    best = logits.argmax(-1).tolist()
    return "".join("_ab"[token] for token, before in zip(best, [0, *best]) if token not in (0, before))


def test_it_learns_to_spell(spelled, monkeypatch):
    monkeypatch.setattr(ctc_probe, "UPDATES", 300)
    monkeypatch.setattr(ctc_probe, "BATCH_FRAMES", 250)
    train, test = spelled(24, 0), spelled(20, 1)
    probe = fit(train, 3, 1e-2, seed=0)
    found = hypotheses(probe, test, spell)
    assert [item["reference"] for item in found] == test.texts
    assert np.mean([item["prediction"] == item["reference"] for item in found]) > 0.7
    assert probe.layer_weights[1] > probe.layer_weights[0]  # the other one knows nothing
