"""Transcripts -> characters -> a CTC head, word and character error rate."""

import json
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import datasets
import evaluate
import jiwer
import torch
import transformers

from acoustic.console import UserError
from acoustic.data.headers import Skip
from acoustic.data.rows import Rows
from acoustic.data.windows import Plan, whole
from acoustic.tasks.base import build_with_head, mask_length, masking_overrides, refuse_unmaskable
from acoustic.tasks.defaults import few_label_settings

PAD, UNKNOWN, WORD_DELIMITER = "[PAD]", "[UNK]", "|"

# Above this share of empty hypotheses nothing but blanks has been learned yet.
BLANK_PHASE = 0.9


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


class CTC:
    """The vocabulary of the training transcripts and what a model makes of them."""

    auto_class = transformers.AutoModelForCTC
    best_metric, greater_is_better = "wer", False
    shown_metrics = ("wer", "cer")
    label_kind = "text"

    def __init__(self, rows: Rows, data_args):
        """Build the vocabulary from the training rows' texts alone; no audio is opened.

        Raises:
            UserError: there is no text in the column.
        """
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
        return notes

    def subset(self, rows: Rows, labels_per_class: int | None, seed: int) -> Rows:
        return rows

    def build(self, model_args, random_weights: bool, labeled_seconds: float | None):
        settings = few_label_settings(labeled_seconds)
        overrides = {
            **masking_overrides(model_args, settings.mask_time_prob, settings.mask_channel_prob),
            "layerdrop": settings.layerdrop,
            "vocab_size": len(self.vocabulary),
            "pad_token_id": self.vocabulary[PAD],
            "bos_token_id": None,
            "eos_token_id": None,
            "ctc_loss_reduction": "sum",
            "ctc_zero_infinity": True,
        }
        model, feature_extractor, notes = build_with_head(self.auto_class, model_args, random_weights, overrides)
        self.output_lengths = model._get_feat_extract_output_lengths
        self.mask_length = mask_length(model.config)
        amount = "an unknown amount" if labeled_seconds is None else f"{labeled_seconds / 60:.1f} min"
        notes.append(
            f"few-label settings for {amount} of labels: mask_time_prob {model.config.mask_time_prob:g}, "
            f"mask_feature_prob {model.config.mask_feature_prob:g}, layerdrop {model.config.layerdrop:g}"
        )
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
                refuse_unmaskable(frames(header.seconds), self.mask_length)
            return inner(row, header, generator)

        return plan

    def encode(self, row: dict) -> list[int]:
        return self.tokenizer(normalize(row["text"])).input_ids

    def count_empty(self, logits: torch.Tensor) -> torch.Tensor:
        """Clips of the batch (batch, frames, vocabulary) for which only blanks are the likeliest."""
        return (logits.argmax(-1) == self.vocabulary[PAD]).all(-1).sum()

    def count_targets(self, labels: torch.Tensor) -> int:
        return int((labels >= 0).sum())

    def summed_loss(self, loss: torch.Tensor, count: int) -> torch.Tensor:
        """The head sums already: ctc_loss_reduction is "sum"."""
        return loss

    def predictions(self, logits: torch.Tensor, batch: dict) -> list[dict]:
        """Greedy decoding. References keep the characters that the vocabulary doesn't know: they count as errors."""
        tokens = logits.argmax(-1).cpu()
        if "attention_mask" in batch:
            # What the model makes of the padding behind a clip is not part of its hypothesis.
            lengths = self.output_lengths(batch["attention_mask"].sum(-1)).cpu()
            tokens[torch.arange(tokens.shape[1]) >= lengths[:, None]] = self.vocabulary[PAD]
        hypotheses = self.tokenizer.batch_decode(tokens.numpy())
        return [
            {"name": name, "prediction": hypothesis, "reference": normalize(text)}
            for name, hypothesis, text in zip(batch["names"], hypotheses, batch["texts"])
        ]

    def metrics(self, collected: list[dict]) -> dict[str, float]:
        self.last = collected
        if not collected:
            return {}
        predictions = [item["prediction"] for item in collected]
        blank = sum(not text for text in predictions) / len(predictions)
        rates = ErrorRates(keep_in_memory=True).compute(
            predictions=predictions, references=[item["reference"] for item in collected]
        )
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
        """The worst utterances first, each with its word error rate."""
        scored = [{**item, "wer": jiwer.wer(item["reference"], item["prediction"])} for item in collected]
        return sorted(scored, key=lambda item: -item["wer"])

    def figures(self, output_dir: str, split: str, collected: list[dict], figures) -> list:
        """Where the errors are: word error rate by length of the reference."""
        return [figures.error_by_length(output_dir, split, self.readable(collected))] if collected else []


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
