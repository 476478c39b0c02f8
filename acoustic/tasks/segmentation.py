"""When does what sound: spans -> a label for each frame, as many at a time as sound; event and segment F1."""

import difflib
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers

from acoustic.console import UserError, say
from acoustic.data.decode import read_window
from acoustic.data.headers import Header, Skip, read_header
from acoustic.data.rows import IndexedRows, Rows
from acoustic.data.spans import (
    Span,
    check_spans,
    label_file_stem,
    parse_spans,
    read_spans,
    refuse_outside,
    write_audacity,
)
from acoustic.data.windows import Plan, Window, cover, whole
from acoustic.tasks.base import (
    build_with_head,
    load_encoder_config,
    mask_length,
    masking_overrides,
    name_some,
    refuse_unusable,
)
from acoustic.tasks.events import (
    COLLAR_SECONDS,
    COLLAR_SHARE,
    SEGMENT_SECONDS,
    Decoding,
    FrameGrid,
    Recording,
    choose_thresholds,
    decode,
    f1,
    frame_targets,
    micro_macro,
    score,
    segment_counts,
)
from acoustic.tasks.stitching import Stitcher, count_frames, slide_on_grid
from acoustic.tasks.task import Task

# A class that sounds a tenth of the time is not nine times as important; rarer ones would make the gradients noisy.
MAX_POSITIVE_WEIGHT = 5.0
# Shorter than nearly all spans and gaps of the training labels, and no longer than a listener would call a flicker.
MEDIAN_PERCENTILE, MAX_MEDIAN_SECONDS = 5, 1.0
# Embedded audio is kept of so many recordings for the figure, which shows three.
KEPT_AUDIO, SHOWN, SHOWN_SECONDS = 24, 3, 60.0


class Segmentation(Task):
    """The spans of a data set and what a model makes of them."""

    auto_class = transformers.AutoModelForAudioFrameClassification
    # Independent of thresholds, which are chosen at the end.
    best_metric, greater_is_better = "frame_map", True
    shown_metrics = ("event_f1", "segment_f1", "frame_map")
    label_kind = "spans"
    # Without labels: transformers' head has a softmax over the classes, which would let one sound at a time.
    model_inputs = ("input_values", "attention_mask")

    def __init__(self, rows: Rows, data_args):
        """Collect classes, their amount and the lengths of spans from the training rows' labels and audio headers.

        Raises:
            UserError: no spans, or one that can't be right.
        """
        check_spans(rows)
        self.counts, self.class_seconds, lengths = Counter(), Counter(), []
        self.labeled = self.unlabeled = 0
        for spans in labels_of(rows):
            self.labeled, self.unlabeled = self.labeled + (spans is not None), self.unlabeled + (spans is None)
            self.counts.update(span.label for span in spans or ())
            for label, times in merged(spans or ()).items():
                self.class_seconds[label] += float((times[:, 1] - times[:, 0]).sum())
                lengths += [*(times[:, 1] - times[:, 0]), *(times[1:, 0] - times[:-1, 1])]
        if not self.counts:
            raise UserError(
                f"spans_column_name: {rows.description} has no spans at all"
                + (f", in {self.labeled} recordings with labels; nothing sounds in any" if self.labeled else "")
            )
        self.classes = sorted(self.counts)
        self.ids = {name: index for index, name in enumerate(self.classes)}
        width = data_args.median_filter_seconds
        self.derived_width = width is None
        if width is None:
            width = min(float(np.percentile(lengths, MEDIAN_PERCENTILE)), MAX_MEDIAN_SECONDS)
        self.decoding = Decoding(
            median_filter_seconds=round(width, 3),
            min_gap_seconds=data_args.min_gap_seconds,
            min_span_seconds=data_args.min_span_seconds,
        )
        self.per_class, self.kept_audio = False, set()
        self.last: list[Recording] = []

    def notes(self) -> list[str]:
        listed = ", ".join(
            f"{name} {self.counts[name]} ({self.class_seconds[name]:.0f} s)" for name in self.classes[:20]
        )
        more = ", ..." if len(self.classes) > 20 else ""
        notes = [f"{len(self.classes)} classes, spans of each in {self.labeled} recordings: {listed}{more}"]
        if self.unlabeled:
            notes.append(f"{self.unlabeled} recordings have neither spans nor a label file: skipped")
        if lone := [name for name in self.classes if self.counts[name] == 1]:
            notes.append(f"warning: a single span of {name_some(lone)}: nothing shows what varies within the class")
        if self.derived_width and self.decoding.median_filter_seconds:
            width = self.decoding.median_filter_seconds
            most = ", and it is at most that wide" if width == MAX_MEDIAN_SECONDS else ""
            notes.append(f"median filter of {width:g} s: 95 % of the training spans and gaps are longer{most}")
        return notes

    def unseen(self, splits: dict[str, Rows | None]) -> list[str]:
        """What is to be said of labels in other splits that training never saw: no model can predict them, so they are
        left out of the scores, while the rest of their recordings counts.

        Raises:
            UserError: a split without labels, or with one that can't be right.
        """
        said = []
        for split, rows in splits.items():
            if rows is None:
                continue
            check_spans(rows)
            spans = [span for found in labels_of(rows) for span in found or ()]
            unknown = [span for span in spans if span.label not in self.ids]
            if not unknown:
                continue
            names = sorted({span.label for span in unknown})
            near = [(name, difflib.get_close_matches(name, self.classes, 1)) for name in names]
            hint = next((f"; is {name!r} meant to be {match[0]!r}?" for name, match in near if match), "")
            said.append(
                f"warning: {split}: {len(unknown)} spans of {name_some(names)}, which training never saw (first: "
                f"{unknown[0].where}), are left out of the scores{hint}"
            )
        return said

    def build(self, model_args, random_weights: bool, labeled_seconds: float | None, weighted_layer_sum: bool = False):
        encoder = load_encoder_config(model_args.model_name_or_path, model_args.model_revision)
        overrides = {
            **masking_overrides(encoder, time=0.1, channel=0.0),
            "num_labels": len(self.classes),
            "id2label": dict(enumerate(self.classes)),
            "label2id": self.ids,
            "problem_type": "multi_label_classification",
        }
        model, feature_extractor, notes = build_with_head(
            self.auto_class, model_args, random_weights, overrides, weighted_layer_sum
        )
        self.config, self.mask_length = model.config, mask_length(model.config)
        self.lengths = model._get_feat_extract_output_lengths
        self.grid = FrameGrid.of(self.lengths, model.config.inputs_to_logits_ratio, feature_extractor.sampling_rate)
        self.weights = torch.tensor([self.positive_weight(name, labeled_seconds) for name in self.classes])
        self.keep_decoding()
        return model, feature_extractor, [*notes, *self.weight_notes()]

    def positive_weight(self, name: str, labeled_seconds: float | None) -> float:
        """Of the frames in which a class sounds, so that a rare class isn't learned as silence."""
        share = self.class_seconds[name] / labeled_seconds if labeled_seconds else 0.5
        return min(max((1 - share) / max(share, 1e-6), 1.0), MAX_POSITIVE_WEIGHT)

    def weight_notes(self) -> list[str]:
        weighted = [f"{name} {w:.1f}" for name, w in zip(self.classes, self.weights.tolist()) if w > 1]
        if not weighted:
            return []
        more = ", ..." if len(weighted) > 20 else ""
        rule = f"silent over sounding time, at most {MAX_POSITIVE_WEIGHT:g}"
        return [f"frames in which a class sounds weigh more in the loss ({rule}): {', '.join(weighted[:20])}{more}"]

    def keep_decoding(self) -> None:
        """Into the model's config, which is saved with it."""
        self.config.segmentation = self.decoding.to_dict()

    def plan(self, data_args, frames, train: bool) -> Plan:
        """In training windows over all of a recording, cut in other places each time; else windows that overlap.

        Skipped by name: recordings without a label source, or with a label that can't be right.
        """
        shortest, longest = data_args.min_duration_in_seconds, data_args.max_duration_in_seconds
        sliding = slide_on_grid(shortest, longest, self.grid, self.lengths)
        # No window is so short that it would be mostly padding, but where a recording is.
        covering, alone = cover(longest / 2, longest), whole(shortest, longest)

        def plan(row: dict, header: Header, generator: np.random.Generator | None) -> Iterator[Window]:
            spans = self.known_spans(row, header)
            if not train:
                return self.with_spans(sliding(row, header, generator), spans, row["audio"])
            windows = (covering if header.seconds >= longest / 2 else alone)(row, header, generator)
            if (fewest := frames(min(header.seconds, longest / 2))) < 1:
                raise Skip(f"{header.seconds:.3f} s are too short for a frame")
            refuse_unusable(fewest, self.mask_length)
            return self.with_spans(windows, spans)

        plan.lengths = covering.lengths if train else ()
        return plan

    def known_spans(self, row: dict, header: Header) -> list[Span]:
        """Of the classes that training saw, up to the recording's end."""
        try:
            spans = read_spans(row)
            refuse_outside(spans or [], header.seconds, row["name"])
        except UserError as error:  # of a stream; others were checked when they were opened
            raise Skip(str(error)) from None
        if spans is None:
            raise Skip("neither spans nor a label file")
        return [replace(span, end=min(span.end, header.seconds)) for span in spans if span.label in self.ids]

    def with_spans(self, windows, spans: list[Span], audio: dict | None = None) -> Iterator[Window]:
        """Each window with the spans that reach into it, in the recording's seconds.

        audio: kept for the figure; the content of a file only once.
        """
        for window in windows:
            start, stop = window.start / window.rate, window.stop / window.rate
            inside = [[s.start, s.end, s.label] for s in spans if s.start <= stop and s.end >= start]
            frames = count_frames(window.stop - window.start, window.rate, self.grid, self.lengths)
            place = {"start": start, "frames": frames, **window.row.get("place", {})}
            kept = audio if audio and (audio.get("bytes") is None or start == 0) else None
            place |= {"stop": stop, "spans": inside, "audio": kept}
            yield replace(window, row={**window.row, "place": place})

    def encode(self, row: dict) -> np.ndarray:
        """(frames, classes) int8 of a window."""
        place = row["place"]
        spans, seconds = (Span(*span) for span in place["spans"]), place["stop"] - place["start"]
        return frame_targets(spans, self.ids, place["frames"], self.grid, place["start"], seconds)

    def count_targets(self, labels: torch.Tensor) -> int:
        """A target is a frame and a class; padding is -100."""
        return int((labels >= 0).sum())

    def summed_loss(self, outputs, labels: torch.Tensor, count: int) -> torch.Tensor:
        """Binary cross-entropy over real frames and classes, in float32; labels (batch, frames, classes)."""
        losses = F.binary_cross_entropy_with_logits(
            outputs.logits.float(),
            labels.clamp(min=0).float(),
            pos_weight=self.weights.to(labels.device),
            reduction="none",
        )
        return losses.masked_fill(labels < 0, 0.0).sum()

    def predictions(self, logits: torch.Tensor, batch: dict) -> list[dict]:
        """Of each window its real frames; half the precision is enough for a probability."""
        counts = (batch["labels"][:, :, 0] >= 0).sum(1).tolist()
        probabilities = logits.float().sigmoid().half().cpu().numpy()
        return [
            {"name": name, **place, "audio": self.keep_audio(name, place["audio"]), "probabilities": values[:count]}
            for name, place, values, count in zip(batch["names"], batch["places"], probabilities, counts)
        ]

    def keep_audio(self, name: str, audio: dict | None) -> dict | None:
        """A path always, content of a few recordings."""
        if audio is None or audio.get("bytes") is None:
            return audio
        if len(self.kept_audio) < KEPT_AUDIO:
            self.kept_audio.add(name)
        return audio if name in self.kept_audio else None

    def metrics(self, collected: list[dict]) -> dict[str, float]:
        """Of whole recordings, with the thresholds as they stand."""
        self.last, self.kept_audio = self.stitch(collected), set()
        for recording in self.last:
            recording.predicted = decode(
                recording.probabilities, self.grid, recording.seconds, self.classes, self.decoding
            )
        return self.summary(self.last) if self.last else {}

    def stitch(self, collected: list[dict]) -> list[Recording]:
        """Windows of any batches and processes -> recordings, by name."""
        stitcher, about, spans = Stitcher(), {}, defaultdict(set)
        for item in collected:
            name = item["name"]
            stitcher.add(name, item["first"], item["probabilities"])
            spans[name].update(Span(*span) for span in item["spans"])
            about[name] = {**item, "audio": item["audio"] or about.get(name, {}).get("audio")}
        return [
            Recording(
                name,
                item["seconds"],
                stitcher.take(name, item["total"]),
                sorted(spans[name]),
                audio=item["audio"],
            )
            for name, item in sorted(about.items())
        ]

    def summary(self, recordings: list[Recording]) -> dict[str, float]:
        scores = score(recordings, self.classes, self.grid)
        precision = scores["average_precision"]
        metrics = {"frame_map": float(np.nanmean(precision)) if not np.isnan(precision).all() else 0.0}
        for kind in ("event", "segment"):
            metrics[f"{kind}_f1"], metrics[f"{kind}_macro_f1"] = micro_macro(scores[kind])
        if self.per_class:
            for kind, values in (("event_f1", f1(scores["event"])), ("segment_f1", f1(scores["segment"]))):
                named = zip(self.classes, values.tolist())
                metrics |= {f"{kind}_of_{name}": value for name, value in named if not math.isnan(value)}
        return metrics

    def settle(self, evaluate: Callable[[], dict] | None) -> list[str]:
        """After training: thresholds from the held-out part, into the model's config. Returns what it says.

        evaluate: scores the held-out part; None where there is none.
        """
        self.per_class = True
        note = "thresholds: 0.5 for all classes, as there is no held-out part to choose them by (eval_split_name)"
        if evaluate is not None and evaluate():
            chosen = choose_thresholds(self.last, self.classes, self.grid, self.decoding)
            self.decoding = replace(self.decoding, thresholds=chosen)
            self.keep_decoding()
            listed = ", ".join(f"{name} {value:g}" for name, value in list(chosen.items())[:20])
            more = ", ..." if len(chosen) > 20 else ""
            note = f"thresholds, chosen on the held-out part (mean of event F1 and frame F1): {listed}{more}"
        say(note)
        return [note]

    def segment_f1(self, recording: Recording) -> float:
        sides = recording.reference, recording.predicted
        return micro_macro(segment_counts(*sides, self.classes, recording.seconds))[0]

    def readable(self, collected: list[Recording]) -> list[dict]:
        """The recordings with the lowest segment F1 first; times in seconds."""
        listed = [
            {
                "name": recording.name,
                "seconds": round(recording.seconds, 3),
                "segment_f1": round(self.segment_f1(recording), 4),
                "prediction": [
                    {
                        "start": round(event.start, 3),
                        "end": round(event.end, 3),
                        "label": event.label,
                        "probability": round(event.probability, 3),
                    }
                    for event in recording.predicted
                ],
                "reference": [{"start": s.start, "end": s.end, "label": s.label} for s in recording.reference],
            }
            for recording in collected
        ]
        return sorted(listed, key=lambda item: (item["segment_f1"], item["name"]))

    def sections(self, split: str, collected: list[dict]) -> dict[str, list[str]]:
        return {
            "What the numbers mean": [
                f"- event_f1: a span counts where its label is right and it begins within {COLLAR_SECONDS:g} s of a "
                f"true one's start and ends within {COLLAR_SECONDS:g} s, or {COLLAR_SHARE:.0%} of the true length "
                "where that is longer, of its end",
                f"- segment_f1: of each {SEGMENT_SECONDS:g} s and class, whether it sounds in there",
                "- frame_map: mean average precision over frames, which needs no threshold",
            ]
        }

    def figures(self, output_dir: str, split: str, collected: list[Recording], figures) -> list:
        """Timelines of the worst, the middle and the best recording, F1 by class; beside them a label file of each."""
        if not collected:
            return []
        write_label_files(Path(output_dir, f"labels_{split}"), collected)
        scores = score(collected, self.classes, self.grid)
        by_class = {kind: f1(scores[kind]) for kind in ("event", "segment")}
        drawn = [figures.timeline.scores_by_class(output_dir, split, self.classes, by_class, scores["event"][:, 1])]
        shown = [example for recording in self.choose_shown(collected) if (example := self.example(recording))]
        if shown:
            drawn.insert(0, figures.timeline.timelines(output_dir, split, shown, self.classes))
        return drawn

    def choose_shown(self, collected: list[Recording]) -> list[Recording]:
        """The worst, the middle and the best of those whose audio is at hand and in which something sounds."""
        usable = [recording for recording in collected if recording.audio and recording.reference]
        ranked = sorted(usable or [r for r in collected if r.audio], key=self.segment_f1)
        places = np.linspace(0, len(ranked) - 1, min(SHOWN, len(ranked))).round().astype(int)
        return [ranked[place] for place in places]

    def example(self, recording: Recording) -> dict | None:
        """What the figure shows: of a long recording the stretch in which most spans begin or end."""
        try:
            header = read_header(recording.audio)
            starts = np.arange(0.0, max(header.seconds - SHOWN_SECONDS, 0.0) + 1e-6, SHOWN_SECONDS / 2)
            times = np.array([time for span in recording.reference for time in (span.start, span.end)])
            counts = [((times >= start) & (times <= start + SHOWN_SECONDS)).sum() for start in starts]
            start = float(starts[int(np.argmax(counts))])
            stop = min(start + SHOWN_SECONDS, header.seconds)
            first, last = int(start * header.rate), int(stop * header.rate)
            waveform = read_window(recording.audio, first, last, self.grid.rate)
        except Skip:
            return None
        return {
            "name": recording.name,
            "score": self.segment_f1(recording),
            "waveform": waveform,
            "rate": self.grid.rate,
            "start": start,
            "reference": [(span.start, span.end, span.label) for span in recording.reference],
            "predicted": [(event.start, event.end, event.label) for event in recording.predicted],
        }


def labels_of(rows: Rows) -> Iterator[list[Span] | None]:
    """The spans of every recording; no audio is opened."""
    if isinstance(rows, IndexedRows):
        return (read_spans(rows[index]) for index in range(len(rows)))
    return (parse_spans(value, f"{rows.description} row {n}") for n, value in enumerate(rows.columns("spans")))


def merged(spans) -> dict[str, np.ndarray]:
    """(spans, 2) seconds of each class, those that overlap as one."""
    times = defaultdict(list)
    for span in sorted(spans):
        if times[span.label] and span.start <= times[span.label][-1][1]:
            times[span.label][-1][1] = max(times[span.label][-1][1], span.end)
        else:
            times[span.label].append([span.start, span.end])
    return {label: np.array(found, float) for label, found in times.items()}


def write_label_files(folder: Path, recordings: list[Recording]) -> None:
    """NAME.txt of each recording, for Audacity; a name with folders in it becomes one file, inside of the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    taken = set()
    for recording in recordings:
        name = label_file_stem(recording.name, taken)
        write_audacity(folder / f"{name}.txt", [event.span() for event in recording.predicted])
