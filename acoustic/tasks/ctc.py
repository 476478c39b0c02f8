"""Transcripts -> characters -> a CTC head, word and character error rate."""

import json
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import datasets
import evaluate
import jiwer
import numpy as np
import torch
import transformers

from acoustic.console import UserError
from acoustic.data.headers import Skip, read_header
from acoustic.data.rows import IndexedRows, Rows
from acoustic.data.windows import Plan, whole
from acoustic.tasks.alignment import Piece, Timed, align_text, write_alignments
from acoustic.tasks.base import (
    build_with_head,
    load_encoder_config,
    mask_length,
    masking_overrides,
    refuse_unusable,
)
from acoustic.tasks.decoding import BeamSearch, DecodingOptions, read_spellings
from acoustic.tasks.defaults import few_label_settings
from acoustic.tasks.events import FrameGrid
from acoustic.tasks.segmentation import write_label_files
from acoustic.tasks.task import Task

PAD, UNKNOWN, WORD_DELIMITER = "[PAD]", "[UNK]", "|"

# Above this share of empty hypotheses nothing but blanks has been learned yet.
BLANK_PHASE = 0.9
# Shown in the model card; all of them are in predictions_{split}.json.
WORST = 20
# A budget of labels that the recordings miss by less is met: whole recordings don't add up to it.
BUDGET_TOLERANCE = 0.05


class ErrorRates(evaluate.Metric):
    """Word and character error rate (jiwer), in the package: `evaluate.load` would download a script to run."""

    def _info(self):
        return evaluate.MetricInfo(
            description="(substitutions + deletions + insertions) / reference words, or characters.",
            citation="",
            inputs_description="predictions, references: texts",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions, references):
        return {"wer": jiwer.wer(references, predictions), "cer": jiwer.cer(references, predictions)}


def normalize(text: str | None) -> str:
    """Unicode NFKC, lower case, curly apostrophes straightened; letters, marks, digits and apostrophes stay, the rest
    becomes a space. What is spoken for a digit or a symbol can't be known here: write it out in the transcripts.
    """
    text = unicodedata.normalize("NFKC", text or "").lower().replace("\u2019", "'").replace("\u2018", "'")
    kept = (char if char == "'" or unicodedata.category(char)[0] in "LMN" else " " for char in text)
    words = ("".join(kept)).split()
    return " ".join(word for word in (word.strip("'") for word in words) if word)


class CTC(Task):
    """The vocabulary of the training transcripts and what a model makes of them.

    Evaluations while training decode greedily; `settle` turns on what the test splits get: the decoding that was asked
    for, and the times of the reference's words.
    """

    auto_class = transformers.AutoModelForCTC
    best_metric, greater_is_better = "wer", False
    shown_metrics = ("wer", "cer")
    label_kind = "text"
    model_inputs = ("input_values", "attention_mask", "labels")

    def __init__(self, rows: Rows, data_args):
        """Build the vocabulary from the training rows' texts alone; no audio is opened.

        Raises:
            UserError: there is no text in the column, or the language model can't be used.
        """
        self.data_args = data_args
        texts = [normalize(text) for text in rows.columns("text")]
        self.empty = sum(not text for text in texts)
        self.characters = Counter("".join(texts))
        if not self.characters:
            raise UserError(
                f"text_column_name: {rows.description} has no text in its column {data_args.text_column_name!r}"
            )
        self.num_texts, self.num_words = len(texts) - self.empty, sum(len(text.split()) for text in texts)
        alphabet = sorted(char for char in self.characters if char != " ")
        self.vocabulary = {token: index for index, token in enumerate([PAD, UNKNOWN, WORD_DELIMITER, *alphabet])}
        self.tokenizer = make_tokenizer(self.vocabulary)
        self.decoding, self.spellings, self.unspelled = DecodingOptions.of(data_args), None, []
        if self.decoding.language_model:
            self.spellings, self.unspelled = read_spellings(self.decoding.language_model, self.vocabulary, normalize)
        if self.decoding.decoding == "beam":
            self.shown_metrics = (*self.shown_metrics, *(f"greedy_{name}" for name in self.shown_metrics))
        self.search, self.aligned, self.grid = None, False, None
        self.last: list[dict] = []

    def notes(self) -> list[str]:
        alphabet = "".join(list(self.vocabulary)[3:])
        notes = [
            f"{self.num_texts} transcripts, {self.num_words} words; vocabulary of {len(self.vocabulary)}: {alphabet} "
            "(lower case, punctuation removed)"
        ]
        if any(char.isdigit() for char in alphabet):
            notes.append("warning: there are digits in the transcripts; write them out as they are spoken")
        if self.empty:
            notes.append(f"{self.empty} transcripts are empty after normalisation: skipped")
        if self.decoding.decoding == "beam":
            notes.append(f"test splits: {self.decoding}")
        if self.spellings:
            left = f"; {len(self.unspelled)} have other characters than the transcripts" if self.unspelled else ""
            notes.append(f"language model: {len(self.spellings)} words, and no other can come out{left}")
        return notes

    def subset(self, rows: Rows, labels_per_class: float | None, seed: int) -> Rows:
        """So many *minutes* of usable recordings (a transcript has no class), drawn by the seed; a smaller budget's
        recordings are among a larger one's. Headers are read, no audio.
        """
        minutes = labels_per_class
        if minutes is None:
            return rows
        if not isinstance(rows, IndexedRows):
            raise UserError("label_budgets: a stream can't be drawn from; leave out streaming")
        plan = whole(self.data_args.min_duration_in_seconds, self.data_args.max_duration_in_seconds)
        order = np.random.default_rng(seed).permutation(len(rows))
        seconds = np.array([usable_seconds(rows[int(index)], plan) for index in order])
        order, seconds = order[seconds > 0], seconds[seconds > 0]
        total, wanted = np.cumsum(seconds), 60 * minutes
        if not len(total) or total[-1] < wanted * (1 - BUDGET_TOLERANCE):
            has = float(total[-1]) / 60 if len(total) else 0.0
            raise UserError(f"label_budgets: {minutes:g} minutes asked for, {rows.description} has {has:.1f} to use")
        count = int(np.abs(total - wanted).argmin()) + 1
        return rows.take(sorted(order[:count].tolist()))

    def build(self, model_args, random_weights: bool, labeled_seconds: float | None, weighted_layer_sum: bool = False):
        settings = few_label_settings(labeled_seconds)
        encoder = load_encoder_config(model_args.model_name_or_path, model_args.model_revision)
        overrides = {
            **masking_overrides(encoder, settings.mask_time_prob, settings.mask_channel_prob),
            "vocab_size": len(self.vocabulary),
            "pad_token_id": self.vocabulary[PAD],
            "bos_token_id": None,
            "eos_token_id": None,
            "ctc_loss_reduction": "sum",
            "ctc_zero_infinity": True,
        }
        if hasattr(encoder, "layerdrop"):
            overrides["layerdrop"] = settings.layerdrop
        model, feature_extractor, notes = build_with_head(
            self.auto_class, model_args, random_weights, overrides, weighted_layer_sum
        )
        self.output_lengths = model._get_feat_extract_output_lengths
        self.grid = FrameGrid.of(
            self.output_lengths, model.config.inputs_to_logits_ratio, feature_extractor.sampling_rate
        )
        self.mask_length = mask_length(model.config)
        amount = "an unknown amount" if labeled_seconds is None else f"{labeled_seconds / 60:.1f} min"
        names = [name for name in ("mask_time_prob", "mask_feature_prob", "layerdrop") if hasattr(model.config, name)]
        chosen = ", ".join(f"{name} {getattr(model.config, name):g}" for name in names)
        notes.append(f"few-label settings for {amount} of labels: {chosen}")
        return model, feature_extractor, notes

    def processing_class(self, feature_extractor):
        return transformers.Wav2Vec2Processor(feature_extractor=feature_extractor, tokenizer=self.tokenizer)

    def plan(self, data_args, frames: Callable[[float], int], train: bool) -> Plan:
        """Whole clips. Skipped by name: no transcript, or in training one with more characters than frames allow."""
        inner = whole(data_args.min_duration_in_seconds, data_args.max_duration_in_seconds)

        def plan(row, header, generator):
            text = normalize(row["text"])
            if not text:
                raise Skip("empty transcript")
            if train:
                refuse_too_long(text, frames(header.seconds))
                refuse_unusable(frames(header.seconds), self.mask_length)
            place = {"seconds": header.seconds, "path": row["audio"].get("path")}
            return [replace(window, row={**row, "place": place}) for window in inner(row, header, generator)]

        return plan

    def encode(self, row: dict) -> list[int]:
        return self.tokenizer(normalize(row["text"])).input_ids

    def count_empty(self, logits: torch.Tensor) -> torch.Tensor:
        """Clips of the batch (batch, frames, vocabulary) for which only blanks are the likeliest."""
        return (logits.argmax(-1) == self.vocabulary[PAD]).all(-1).sum()

    def count_targets(self, labels: torch.Tensor) -> int:
        return int((labels >= 0).sum())

    def summed_loss(self, outputs, labels: torch.Tensor, count: int) -> torch.Tensor:
        """The head sums already: ctc_loss_reduction is "sum"."""
        return outputs.loss

    def settle(self, evaluate: Callable[[], dict] | None) -> list[str]:
        """From now on: the decoding that was asked for, and times. Nothing is chosen, so nothing is evaluated."""
        self.aligned = True
        if self.decoding.decoding == "beam":
            self.search = BeamSearch(
                self.vocabulary, self.decoding, self.spellings, blank=PAD, delimiter=WORD_DELIMITER, silent=(UNKNOWN,)
            )
        return []

    def predictions(self, logits: torch.Tensor, batch: dict) -> list[dict]:
        """References keep the characters that the vocabulary doesn't know: they count as errors."""
        places = batch.get("places") or [None] * len(logits)
        found = []
        for clip, name, text, place, frames in zip(
            logits, batch["names"], batch["texts"], places, self.real_frames(logits, batch, places)
        ):
            clip = clip[:frames].float()  # what the model makes of the padding behind is no part of its hypothesis
            item = {"name": name, "prediction": self.greedy(clip), "reference": normalize(text)}
            if place is not None:
                item["path"] = place["path"]
            if self.search or self.aligned:
                item |= self.settled(clip.log_softmax(-1).cpu(), item, place)
            found.append(item)
        return found

    def real_frames(self, logits: torch.Tensor, batch: dict, places: list[dict | None]) -> list[int]:
        """Of each clip, without those of its padding."""
        if "attention_mask" in batch:
            return self.output_lengths(batch["attention_mask"].sum(-1)).tolist()
        samples = [place and round(place["seconds"] * self.grid.rate) for place in places]
        return [logits.shape[1] if count is None else int(self.output_lengths(count)) for count in samples]

    def greedy(self, logits: torch.Tensor) -> str:
        """(frames, vocabulary) -> the text of the likeliest token of each frame."""
        return self.tokenizer.decode(logits.argmax(-1).tolist())

    def settled(self, log_probs: torch.Tensor, item: dict, place: dict | None) -> dict:
        """What else a test split gets: {"prediction", "greedy"} of a beam search, {"alignment"} of the reference."""
        found = {}
        if self.search:
            found = {"prediction": self.search(log_probs), "greedy": item["prediction"]}
        if place is not None:
            aligned = align_text(log_probs, item["reference"], self.vocabulary, self.grid, place["seconds"])
            found["alignment"] = aligned and aligned.to_dict()
        return found

    def metrics(self, collected: list[dict]) -> dict[str, float]:
        self.last = collected
        if not collected:
            return {}
        predictions = [item["prediction"] for item in collected]
        blank = sum(not text for text in predictions) / len(predictions)
        rates = error_rates(predictions, collected)
        if all("greedy" in item for item in collected):  # so that one sees what the search is worth
            greedy = error_rates([item["greedy"] for item in collected], collected)
            rates |= {f"greedy_{name}": value for name, value in greedy.items()}
        return {**rates, "empty_fraction": blank}

    def remarks(self, metrics: dict[str, float], updates: int) -> list[str]:
        """A word error rate that stays at 1 looks like a bug and is CTC's first phase."""
        empty = metrics.get("empty_fraction", 0.0)
        if empty <= BLANK_PHASE:
            return []
        return [
            f"after {updates} updates {empty:.0%} of the hypotheses are empty: CTC emits only blanks at first, that "
            "is usual. If it lasts, train longer (max_steps), raise learning_rate, lower freeze_encoder_steps, or see "
            "whether the transcripts belong to their audio"
        ]

    def readable(self, collected: list[dict]) -> list[dict]:
        """The worst utterances first, each with its word error rate and where its audio is."""
        scored = [
            {
                **{name: value for name, value in item.items() if name != "alignment"},
                "wer": jiwer.wer(item["reference"], item["prediction"]),
                "cer": jiwer.cer(item["reference"], item["prediction"]),
            }
            for item in collected
        ]
        return sorted(scored, key=lambda item: (-item["wer"], -item["cer"], item["name"]))

    def sections(self, split: str, collected: list[dict]) -> dict[str, list[str]]:
        """For the model card: the worst utterances, with audio, reference and hypothesis."""
        wrong = [item for item in self.readable(collected) if item["wer"] > 0]
        if not wrong:
            return {}
        lines, empty = [], sum(not item["prediction"] for item in wrong)
        if empty:
            lines += [f"{empty} of {len(collected)} answers are empty.", ""]
        lines += ["| WER | CER | audio | reference | hypothesis |", "|---|---|---|---|---|"]
        for item in wrong[:WORST]:
            cells = (item["name"], item["reference"], item["prediction"])
            shown = " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells)
            lines.append(f"| {item['wer']:.2f} | {item['cer']:.2f} | {shown} |")
        if len(wrong) > WORST:
            lines += ["", f"{len(wrong)} have errors; predictions_{split}.json has them all."]
        return {f"Worst utterances of {split}": lines}

    def figures(self, output_dir: str, split: str, collected: list[dict], figures) -> list:
        """Where the errors are: word error rate by length of the reference. Beside it the times of the words said."""
        if not collected:
            return []
        self.write_times(Path(output_dir), split, collected)
        return [figures.error_by_length(output_dir, split, self.readable(collected))]

    def write_times(self, output_dir: Path, split: str, collected: list[dict]) -> None:
        """alignments_{split}.jsonl, and words_{split}/*.txt, which Audacity imports as label tracks."""
        timed = sorted((item for item in collected if item.get("alignment")), key=lambda item: item["name"])
        if not timed:
            return
        write_alignments(
            output_dir / f"alignments_{split}.jsonl",
            ({"name": item["name"], "text": item["reference"], **item["alignment"]} for item in timed),
        )
        recordings = [
            Timed(item["name"], [Piece.of(word, "word") for word in item["alignment"]["words"]]) for item in timed
        ]
        write_label_files(output_dir / f"words_{split}", recordings)


def error_rates(predictions: list[str], collected: list[dict]) -> dict[str, float]:
    references = [item["reference"] for item in collected]
    return ErrorRates(keep_in_memory=True).compute(predictions=predictions, references=references)


def usable_seconds(row: dict, plan: Plan) -> float:
    """The length of a recording, 0 where it would be skipped."""
    try:
        header = read_header(row["audio"])
        plan(row, header, None)
    except Skip:
        return 0.0
    return header.seconds if normalize(row["text"]) else 0.0


def refuse_too_long(text: str, frames: int) -> None:
    """CTC needs a frame per character and a blank between two equal ones; else the loss is infinite."""
    needed = len(text) + sum(first == second for first, second in zip(text, text[1:]))
    if needed > frames:
        raise Skip(f"the transcript needs {needed} frames, the audio has {frames}")


def make_tokenizer(vocabulary: dict[str, int]) -> transformers.Wav2Vec2CTCTokenizer:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocab.json"
        path.write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
        return transformers.Wav2Vec2CTCTokenizer(
            str(path),
            pad_token=PAD,
            unk_token=UNKNOWN,
            word_delimiter_token=WORD_DELIMITER,
            bos_token=None,
            eos_token=None,
        )
