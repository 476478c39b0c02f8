"""The attentive probe: padding is not heard, its sums are those of a naive loop, and it finds what a mean hides."""

import numpy as np
import torch

from acoustic.tasks.attentive import AttentiveProbe, accuracy, fit, moments, pad_frames


def draw(count: int, lengths=(8, 12), layers: int = 3, width: int = 6, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(*lengths, (count,), generator=generator)
    return [torch.randn(layers, int(number), width, generator=generator) for number in numbers]


def test_logits_by_a_naive_loop_and_without_padding():
    clips = draw(4)
    frames = pad_frames(clips)
    torch.manual_seed(0)
    probe = AttentiveProbe(*moments(frames), classes=5)
    for parameter in probe.parameters():
        torch.nn.init.normal_(parameter)
    logits = probe(frames).detach()
    shares = torch.softmax(probe.layer_weights, 0)
    every = torch.cat(clips, 1)
    for clip, found in zip(clips, logits):
        hidden = torch.zeros(clip.shape[1:])
        for layer in range(3):
            scaled = (clip[layer] - every[layer].mean(0)) / (every[layer].var(0, unbiased=False) + 1e-5).sqrt()
            hidden += shares[layer] * scaled
        first, _, second = probe.attention
        scores = torch.stack([second.weight[0] @ torch.tanh(first(frame)) + second.bias[0] for frame in hidden])
        weights = torch.exp(scores) / torch.exp(scores).sum()
        mean = sum(weight * frame for weight, frame in zip(weights, hidden))
        deviation = (sum(w * (frame - mean) ** 2 for w, frame in zip(weights, hidden)) + 1e-5).sqrt()
        expected = probe.classifier(torch.cat([mean, deviation])).detach()
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_it_finds_the_layer_and_the_moment():
    """One class has a short event in one layer, too short to show in the mean over time."""

    def make(count: int, seed: int):
        clips, labels = draw(count, lengths=(60, 61), seed=seed), torch.arange(count) % 2
        for number, (clip, label) in enumerate(zip(clips, labels)):
            clip[1, 5 + number % 50, :3] += 4.0 * (2 * label - 1) * torch.tensor([1.0, -1.0, 1.0])
        return pad_frames(clips), labels

    train, test = make(60, 1), make(200, 2)
    probe = fit(*train, classes=2, learning_rate=1e-2, seed=0)
    assert accuracy(probe, *train) == 1.0
    assert accuracy(probe, *test) > 0.8
    assert int(probe.layer_weights.argmax()) == 1


def test_several_classes_at_once():
    """Each class by itself: one shows in a channel's mean, the other in another's."""
    clips = draw(60, lengths=(20, 30), seed=4)
    labels = torch.randint(2, (60, 2), generator=torch.Generator().manual_seed(0)).float()
    for clip, (first, second) in zip(clips, labels):
        clip[:, :, 0] += 2 * first
        clip[:, :, 1] += 2 * second
    frames = pad_frames(clips)
    probe = fit(frames, labels, classes=2, learning_rate=1e-2, seed=0)
    assert torch.equal((probe(frames) > 0).float(), labels)


def test_the_same_seed_gives_the_same_probe():
    train = pad_frames(draw(10)), torch.arange(10) % 2
    one, other = (fit(*train, 2, 1e-2, seed=4)(train[0]).detach().numpy() for _ in range(2))
    np.testing.assert_array_equal(one, other)
