"""What CTC says greedily -> text, and when each word is said."""

from collections.abc import Iterator
from itertools import groupby

import numpy as np
import torch


class Heard:
    """The likeliest token of each frame of a recording, put together from windows that overlap, in their order.

    Half of an overlap is taken from the window before and half from the one behind, so each frame has been heard with
    something on both of its sides. (A mean of two windows would blur CTC's spikes, which can be a frame apart.) Where
    a window is missing there are blanks. A frame takes eight bytes.

    Args:
        blank: CTC's.
    """

    def __init__(self, blank: int):
        self.blank, self.frames = blank, 0
        self.pieces: list[tuple[np.ndarray, np.ndarray]] = []

    def __len__(self) -> int:
        return self.frames

    def add(self, first: int, logits: torch.Tensor) -> None:
        """logits: (frames, vocabulary) of a window whose first frame is number `first` of the recording."""
        likeliest = logits.softmax(-1).max(-1)
        cut = (first + self.frames) // 2 if first < self.frames else first
        self.resize(cut)
        tokens, probabilities = likeliest.indices[cut - first :], likeliest.values[cut - first :]
        self.append(tokens.numpy().astype(np.int32), probabilities.numpy().astype(np.float32))

    def resize(self, frames: int) -> None:
        """To so many frames: those behind are left out, or blanks put there."""
        if frames > self.frames:
            missing = frames - self.frames
            self.append(np.full(missing, self.blank, np.int32), np.ones(missing, np.float32))
        while self.frames > frames:
            piece = self.pieces.pop()
            self.frames -= len(piece[0])
            kept = max(frames - self.frames, 0)
            self.append(*(values[:kept] for values in piece))

    def append(self, tokens: np.ndarray, probabilities: np.ndarray) -> None:
        if len(tokens):
            self.pieces.append((tokens.copy(), probabilities.copy()))
            self.frames += len(tokens)

    def all(self) -> tuple[np.ndarray, np.ndarray]:
        """(tokens int32, probabilities float32), (frames,) each."""
        pieces = self.pieces or [(np.zeros(0, np.int32), np.zeros(0, np.float32))]
        return tuple(np.concatenate(values) for values in zip(*pieces))


def read_off(heard: Heard, tokenizer, edges: np.ndarray) -> tuple[str, list[dict]]:
    """
    Args:
        edges: (frames + 1,) seconds, where frames begin and end.

    Returns:
        the text, and {"word", "start", "end", "confidence"} of each word in it: in seconds from the first frame of its
        first character to the last one of its last; and the mean of its characters' probabilities, each the mean
        over its frames. CTC says a character in few frames, so a word ends a little before its sound does.
    """
    tokens, probabilities = heard.all()
    words = []
    for word in words_of(tokens, probabilities, tokenizer):
        text = "".join(character for character, *_ in word)
        words.append(
            {
                "word": text.lower() if getattr(tokenizer, "do_lower_case", False) else text,
                "start": round(float(edges[word[0][1]]), 3),
                "end": round(float(edges[word[-1][2]]), 3),
                "confidence": round(float(np.mean([probability for *_, probability in word])), 4),
            }
        )
    return tokenizer.decode(tokens.tolist()) if len(tokens) else "", words


def words_of(tokens: np.ndarray, probabilities: np.ndarray, tokenizer) -> Iterator[list[tuple]]:
    """Of each word (character, first frame, the one behind its last, mean probability)."""
    word, start = [], 0
    for token, frames in groupby(tokens.tolist()):
        stop = start + len(list(frames))
        text = tokenizer.convert_ids_to_tokens(token)
        if text == tokenizer.word_delimiter_token:
            if word:
                yield word
            word = []
        elif token != tokenizer.pad_token_id:
            word.append((text, start, stop, float(probabilities[start:stop].mean())))
        start = stop
    if word:
        yield word
