"""When is each character and each word of a known text said: CTC forced alignment, by torchaudio's `forced_align`.

(`forced_align` is part of torchaudio 2.11, which requirements.txt pins, without a deprecation.)
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
import torchaudio.functional as F

from acoustic.data.spans import Span
from acoustic.tasks.events import FrameGrid


@dataclass(frozen=True)
class Piece:
    """A character or a word.

    start, end: seconds. CTC says a character in few frames, often in one, and blanks follow: `end` is where those few
        frames end, not where the sound does.
    confidence: of a character the mean over its frames of the probability that the model gives to it; of a word the
        mean of its characters'.
    """

    text: str
    start: float
    end: float
    confidence: float

    def span(self) -> Span:
        return Span(self.start, self.end, self.text)

    @classmethod
    def of(cls, given: dict, kind: str) -> "Piece":
        """From what `to_dict` gave."""
        return cls(given[kind], given["start"], given["end"], given["confidence"])

    def to_dict(self, kind: str) -> dict:
        """kind: "word" or "token", the name that the text gets."""
        return {
            kind: self.text,
            "start": round(self.start, 3),
            "end": round(self.end, 3),
            "confidence": round(self.confidence, 4),
        }


@dataclass(frozen=True)
class Alignment:
    tokens: list[Piece]
    words: list[Piece]

    def to_dict(self) -> dict:
        return {
            "words": [word.to_dict("word") for word in self.words],
            "tokens": [token.to_dict("token") for token in self.tokens],
        }


@dataclass(frozen=True)
class Timed:
    """A recording and what was said when, for label files."""

    name: str
    predicted: list[Piece]


@dataclass(frozen=True)
class Run:
    """The frames [start, stop) of one token, and their mean probability."""

    start: int
    stop: int
    probability: float


def align_tokens(log_probs: torch.Tensor, tokens: list[int], blank: int) -> list[Run] | None:
    """Frames of each token on the most probable path of the labelling (Viterbi).

    Args:
        log_probs: (frames, vocabulary) float32.
        tokens: without blanks.

    Returns:
        One run for each token, in order; None where the frames are too few: one a token, one more between equals.
    """
    if len(tokens) + sum(first == second for first, second in zip(tokens, tokens[1:])) > len(log_probs):
        return None
    if not tokens:
        return []
    path, scores = F.forced_align(log_probs[None].cpu(), torch.tensor([tokens], dtype=torch.int32), blank=blank)
    probabilities, found, start = scores[0].exp(), [], 0
    for token, frames in groupby(path[0].tolist()):
        stop = start + len(list(frames))
        if token != blank:
            found.append(Run(start, stop, float(probabilities[start:stop].mean())))
        start = stop
    return found


def align_text(
    log_probs: torch.Tensor,
    text: str,
    vocabulary: dict[str, int],
    grid: FrameGrid,
    seconds: float,
    *,
    blank: str = "[PAD]",
    unknown: str = "[UNK]",
    delimiter: str = "|",
) -> Alignment | None:
    """Times of a text's characters and words; spaces have a token of their own, and no place in the result.

    Args:
        log_probs: (frames, vocabulary) float32, of the real frames of a recording of so many seconds.
        text: words with single spaces; a character that is not in the vocabulary stands for `unknown`.

    Returns:
        None where the text is longer than the frames allow.
    """
    ids = [vocabulary[delimiter] if char == " " else vocabulary.get(char, vocabulary[unknown]) for char in text]
    runs = align_tokens(log_probs, ids, vocabulary[blank])
    if runs is None:
        return None
    edges = grid.edges(len(log_probs), seconds)
    tokens, words = [], []
    for is_space, group in groupby(zip(text, runs), key=lambda pair: pair[0] == " "):
        if is_space:
            continue
        pairs = list(group)
        tokens += [Piece(char, float(edges[r.start]), float(edges[r.stop]), r.probability) for char, r in pairs]
        confidence = sum(run.probability for _, run in pairs) / len(pairs)
        word = "".join(char for char, _ in pairs)
        words.append(Piece(word, float(edges[pairs[0][1].start]), float(edges[pairs[-1][1].stop]), confidence))
    return Alignment(tokens, words)


def write_alignments(path: Path, items: Iterable[dict]) -> None:
    """A line of JSON for each recording: {"name", "text", "words": [{word, start, end, confidence}], "tokens"}."""
    lines = (json.dumps(item, ensure_ascii=False) + "\n" for item in items)
    path.write_text("".join(lines), encoding="utf-8")
