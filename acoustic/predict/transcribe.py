"""What is said, and when."""

from collections.abc import Iterator

import transformers

from acoustic.console import UserError
from acoustic.data.headers import Header
from acoustic.data.spans import Span
from acoustic.data.windows import Plan
from acoustic.models.build import NO_CODE
from acoustic.predict.predictor import Head
from acoustic.predict.words import Heard, read_off
from acoustic.tasks.stitching import slide_on_grid


class Transcriber(Head):
    """Greedy CTC: {"text", "words": [{"word", "start", "end", "confidence"}]}; see `read_off`.

    A recording longer than a window is heard in windows that overlap by a quarter (7.5 of 30 s). Of the frames of an
    overlap the first half is taken from the window before, the second from the one behind, and all of them are decoded
    as one: a word in the middle of an overlap is heard whole by both. A character that the two hear on different sides
    of the middle can still be lost or doubled.
    """

    auto_class, has_times = transformers.AutoModelForCTC, True

    def __init__(self, name: str, *args):
        super().__init__(name, *args)
        self.tokenizer = load_tokenizer(name)

    def plan(self) -> Plan:
        return slide_on_grid(0.0, self.max_seconds, self.grid, self.lengths)

    def answer(self, header: Header, heard: Iterator) -> dict:
        whole = Heard(self.tokenizer.pad_token_id)
        for window, logits in heard:
            place = window.row["place"]
            whole.add(place["first"], logits[: place["frames"]])
        whole.resize(place["total"])
        text, words = read_off(whole, self.tokenizer, self.grid.edges(len(whole), header.seconds))
        return {"text": text, "words": words}

    def spans(self, answer: dict) -> list[Span]:
        return [Span(word["start"], word["end"], word["word"]) for word in answer["words"]]


def load_tokenizer(name: str):
    """The one beside the model. Raises `UserError`."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **NO_CODE)
    except Exception as error:  # whatever transformers and its readers raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{name}: no tokenizer beside the model says what its characters are: {reason}") from None
    if getattr(tokenizer, "word_delimiter_token", None) is None:
        raise UserError(f"{name}: its {type(tokenizer).__name__} is not one of CTC, with a token between words")
    return tokenizer
