"""When does what sound."""

from collections.abc import Iterator

import transformers

from acoustic.data.headers import Header
from acoustic.data.spans import Span
from acoustic.data.windows import Plan
from acoustic.predict.predictor import Head
from acoustic.tasks.events import Decoding, decode
from acoustic.tasks.stitching import Stitcher, slide_on_grid


class Segmenter(Head):
    """Windows overlap and are put together as in evaluation; `config.segmentation` has thresholds and filters.

    {"spans": [{"start", "end", "label", "score"}]} in seconds, by start; the score is the mean probability of a span's
    frames. A frame and a class take four bytes until the recording's end.
    """

    auto_class, has_times = transformers.AutoModelForAudioFrameClassification, True

    def plan(self) -> Plan:
        return slide_on_grid(0.0, self.max_seconds, self.grid, self.lengths)

    def answer(self, header: Header, heard: Iterator) -> dict:
        stitcher, total = Stitcher(), 0
        for window, logits in heard:
            place = window.row["place"]
            # Half the precision is enough for a probability, and what the evaluation has.
            stitcher.add("", place["first"], logits[: place["frames"]].sigmoid().half().numpy())
            total = place["total"]
        decoding = Decoding(**getattr(self.model.config, "segmentation", None) or {})
        events = decode(stitcher.take("", total), self.grid, header.seconds, self.classes, decoding)
        return {
            "spans": [
                {
                    "start": round(event.start, 3),
                    "end": round(event.end, 3),
                    "label": event.label,
                    "score": round(event.probability, 4),
                }
                for event in events
            ]
        }

    def spans(self, answer: dict) -> list[Span]:
        return [Span(span["start"], span["end"], span["label"]) for span in answer["spans"]]
