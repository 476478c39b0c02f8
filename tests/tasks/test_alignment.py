"""Forced alignment: the best of all paths by brute force; seconds from the frames; words, unknown characters."""

import itertools
import json

import numpy as np
import pytest
import torch

from acoustic.tasks.alignment import Piece, align_text, align_tokens, write_alignments
from acoustic.tasks.events import FrameGrid

VOCABULARY = {"[PAD]": 0, "[UNK]": 1, "|": 2, "a": 3, "b": 4}
# 20 ms from frame to frame, and a frame sees as much: frame i is what lies between i * 20 and (i + 1) * 20 ms.
GRID = FrameGrid(rate=1000, hop=20, offset=10.0)


def collapse(path) -> list[int]:
    return [token for token, _ in itertools.groupby(path) if token]


def runs_of(path) -> list[tuple[int, int]]:
    """The frames of each token, by counting."""
    found = []
    for frame, token in enumerate(path):
        if token and (frame == 0 or path[frame - 1] != token):
            found.append([frame, frame + 1])
        elif token:
            found[-1][1] += 1
    return [tuple(run) for run in found]


@pytest.mark.parametrize("tokens", [[1], [1, 2], [1, 1], [2, 1, 2], [1, 1, 2], [2, 2, 2]])
@pytest.mark.parametrize("seed", range(3))
def test_the_best_of_all_paths(tokens, seed):
    frames = 6
    log_probs = torch.randn(frames, 3, generator=torch.Generator().manual_seed(seed)).mul(2).log_softmax(-1)
    paths = [path for path in itertools.product(range(3), repeat=frames) if collapse(path) == tokens]
    best = max(paths, key=lambda path: sum(log_probs[frame, token].item() for frame, token in enumerate(path)))
    found = align_tokens(log_probs, tokens, blank=0)
    assert [(run.start, run.stop) for run in found] == runs_of(best)
    for run, token in zip(found, tokens):
        assert run.probability == pytest.approx(log_probs[run.start : run.stop, token].exp().mean().item(), rel=1e-4)


def test_too_few_frames_and_nothing_to_align():
    log_probs = torch.zeros(2, 3).log_softmax(-1)
    assert align_tokens(log_probs, [1, 1], blank=0) is None  # a blank has to be between them
    assert len(align_tokens(log_probs, [1, 2], blank=0)) == 2
    assert align_tokens(log_probs, [], blank=0) == []
    assert align_text(log_probs, "aaa", VOCABULARY, GRID, 0.04) is None


def emit(path: list[int], sure: float = 0.9) -> torch.Tensor:
    """(frames, vocabulary): a frame says its token with probability `sure`, the others share the rest."""
    others = (1 - sure) / (len(VOCABULARY) - 1)
    probabilities = torch.full((len(path), len(VOCABULARY)), others)
    probabilities[torch.arange(len(path)), torch.tensor(path)] = sure
    return probabilities.log()


def test_characters_and_words_in_seconds():
    log_probs = emit([0, 3, 3, 0, 4, 0, 2, 0, 0, 3, 0, 0])
    alignment = align_text(log_probs, "ab a", VOCABULARY, GRID, 0.24)
    tokens = [("a", 0.02, 0.06), ("b", 0.08, 0.1), ("a", 0.18, 0.2)]
    assert [(t.text, pytest.approx(t.start), pytest.approx(t.end)) for t in alignment.tokens] == tokens
    words = [("ab", 0.02, 0.1), ("a", 0.18, 0.2)]
    assert [(w.text, pytest.approx(w.start), pytest.approx(w.end)) for w in alignment.words] == words
    assert all(piece.confidence == pytest.approx(0.9) for piece in alignment.tokens + alignment.words)


def test_the_confidence_of_a_word_is_the_mean_of_its_characters():
    log_probs = emit([3, 3, 4, 0])
    log_probs[2] = emit([4], sure=0.3)[0]
    alignment = align_text(log_probs, "ab", VOCABULARY, GRID, 0.08)
    assert [token.confidence for token in alignment.tokens] == pytest.approx([0.9, 0.3])
    assert alignment.words[0].confidence == pytest.approx((0.9 + 0.3) / 2)


def test_what_is_not_said_has_no_confidence():
    """A wrong word, and a character that the vocabulary doesn't have, are placed somewhere; one sees that."""
    wrong = align_text(emit([3, 0, 3, 0]), "ab", VOCABULARY, GRID, 0.08)
    assert [token.confidence > 0.5 for token in wrong.tokens] == [True, False]
    unknown = align_text(emit([3, 0, 3, 0]), "aé", VOCABULARY, GRID, 0.08)
    assert [(token.text, token.confidence > 0.5) for token in unknown.tokens] == [("a", True), ("é", False)]


def test_no_time_lies_behind_the_end():
    """Frames of a padded batch can reach over a recording's last sample by a part of one."""
    alignment = align_text(emit([0, 3]), "a", VOCABULARY, GRID, 0.035)
    assert alignment.words[0].end == pytest.approx(0.035)


def test_lines_of_json_and_back(tmp_path):
    alignment = align_text(emit([3, 2, 4]), "a b", VOCABULARY, GRID, 0.06)
    write_alignments(tmp_path / "x.jsonl", [{"name": "é.wav", "text": "a b", **alignment.to_dict()}])
    (line,) = (tmp_path / "x.jsonl").read_text(encoding="utf-8").splitlines()
    found = json.loads(line)
    assert found["name"] == "é.wav"
    assert found["words"][0] == {"word": "a", "start": 0.0, "end": 0.02, "confidence": 0.9}
    back = [Piece.of(token, "token") for token in found["tokens"]]
    assert [piece.text for piece in back] == ["a", "b"]
    assert np.allclose([piece.end for piece in back], [piece.end for piece in alignment.tokens])
