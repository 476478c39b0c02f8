"""CTC -> text by prefix beam search, with or without an n-gram over words, in flashlight's decoder under torchaudio.

What installs beside numpy 2 and torch 2.11: `flashlight-text` 0.0.7, whose wheels (CPython 3.10 to 3.12; there is none
for 3.13) carry KenLM, and which `torchaudio.models.decoder` wraps. pyctcdecode 0.5 wants numpy 1.

A text's score is that of Hannun 2014 (arXiv 1408.2873, section 2.2):

    ln p(text | audio) + lm_weight * ln p(text) + length_bonus * words

where p(text | audio) is summed over all alignments. It is a probability of whole texts, so it favours neither short
nor long ones; an n-gram favours short ones, and the bonus makes up for that.
"""

import contextlib
import importlib.util
import math
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from acoustic.console import UserError

# pyctcdecode's defaults, in natural logarithms; without an n-gram there is nothing to make up for.
BEAM_WIDTH, LM_WEIGHT, LENGTH_BONUS = 100, 0.5, 1.5
# The logarithm of a probability that is none; -inf would become NaN where two of them are added.
NEVER = -1e4


@dataclass(frozen=True)
class DecodingOptions:
    """As the command line has them; None is the default."""

    decoding: str = "greedy"
    beam_width: int | None = None
    language_model: str | None = None
    lm_weight: float | None = None
    length_bonus: float | None = None

    @classmethod
    def of(cls, args) -> "DecodingOptions":
        """From an object's attributes; what it lacks is the default.

        Raises:
            UserError: a value that can't be, or one that would do nothing.
        """
        options = cls(**{name: getattr(args, name, field.default) for name, field in cls.__dataclass_fields__.items()})
        options.check()
        return options

    def check(self) -> None:
        if self.decoding != "beam":
            for name in ("beam_width", "language_model", "lm_weight", "length_bonus"):
                if getattr(self, name) is not None:
                    raise UserError(f"{name}: belongs to --decoding beam")
            return
        if self.beam_width is not None and self.beam_width < 1:
            raise UserError("beam_width: at least 1")
        if self.lm_weight is not None and self.language_model is None:
            raise UserError("lm_weight: of which language model? Name one with language_model")
        if self.lm_weight is not None and not self.lm_weight >= 0:
            raise UserError("lm_weight: not below 0")
        if importlib.util.find_spec("flashlight") is None:
            raise UserError(
                "decoding: beam search needs flashlight-text: pip install flashlight-text==0.0.7 (there are wheels "
                "for Python 3.10 to 3.12)"
            )

    def __str__(self) -> str:
        if self.decoding == "greedy":
            return "greedy decoding"
        weights = f"lm_weight {self.weight:g}, " if self.language_model else ""
        model = f" with {self.language_model}" if self.language_model else ""
        return f"beam search of width {self.width}{model}: {weights}length_bonus {self.bonus:g} a word"

    @property
    def width(self) -> int:
        return BEAM_WIDTH if self.beam_width is None else self.beam_width

    @property
    def weight(self) -> float:
        return LM_WEIGHT if self.lm_weight is None else self.lm_weight

    @property
    def bonus(self) -> float:
        if self.length_bonus is None:
            return LENGTH_BONUS if self.language_model else 0.0
        return self.length_bonus


class BeamSearch:
    """The text with the highest score; see above. With an n-gram its words alone come out.

    Args:
        vocabulary: token -> column of the log-probabilities.
        silent: tokens that never come out (unknown characters).
        spellings: word of the n-gram -> text that it stands for; see `read_spellings`. None without an n-gram.
    """

    def __init__(
        self,
        vocabulary: dict[str, int],
        options: DecodingOptions,
        spellings: dict[str, str] | None = None,
        *,
        blank: str = "[PAD]",
        delimiter: str = "|",
        silent: tuple[str, ...] = ("[UNK]",),
    ):
        from torchaudio.models.decoder import ctc_decoder  # needs flashlight-text

        self.options, self.spellings = options, spellings
        self.tokens = [token for token in sorted(vocabulary, key=vocabulary.get) if token not in silent]
        self.columns = [vocabulary[token] for token in self.tokens]
        self.delimiter = delimiter
        settings = {"nbest": options.width, "beam_size": options.width, "log_add": True}
        settings |= {"blank_token": blank, "sil_token": delimiter, "tokens": self.tokens}
        if spellings is None:
            self.decode = ctc_decoder(lexicon=None, **settings)
            return
        with tempfile.TemporaryDirectory() as folder, quiet_stderr():
            lexicon = Path(folder, "lexicon.txt")
            lexicon.write_text("".join(self.lexicon_lines()), encoding="utf-8")
            # KenLM gives decimal logarithms.
            settings |= {"lm_weight": options.weight * math.log(10), "word_score": options.bonus}
            try:
                self.decode = ctc_decoder(lexicon=str(lexicon), lm=options.language_model, **settings)
            except RuntimeError as error:
                lines = [line for line in str(error).splitlines() if line.strip()]
                raise UserError(f"language_model: {options.language_model}: {lines[-1]}") from None

    def lexicon_lines(self) -> Iterator[str]:
        """A word ends with a delimiter."""
        for word, text in self.spellings.items():
            yield f"{word} {' '.join(self.delimiter if char == ' ' else char for char in text)} {self.delimiter}\n"

    def __call__(self, log_probs: torch.Tensor) -> str:
        """log_probs: (frames, vocabulary) of the real frames."""
        return max(self.scores(log_probs).items(), key=lambda item: (item[1], item[0]))[0]

    def scores(self, log_probs: torch.Tensor) -> dict[str, float]:
        """text -> score, of the texts that are left in the beam."""
        emissions = log_probs.detach().float().cpu()[:, self.columns].clamp(min=NEVER)
        if self.spellings is not None:
            # The end of a recording ends a word too.
            end = torch.full((1, len(self.tokens)), NEVER)
            end[0, self.tokens.index(self.delimiter)] = 0.0
            emissions = torch.cat([emissions, end])
        scores: dict[str, float] = {}
        for found in self.decode(emissions.contiguous()[None])[0]:
            text = self.text_of(found.tokens.tolist())
            # Labellings that differ in delimiters at the ends, or in two for one, are one text.
            scores[text] = float(np.logaddexp(scores.get(text, -math.inf), found.score))
        if self.spellings is None:  # with an n-gram the search has counted the words
            return {text: score + self.options.bonus * len(text.split()) for text, score in scores.items()}
        return scores

    def text_of(self, ids: list[int]) -> str:
        characters = (self.tokens[index] for index in ids)
        return " ".join("".join(" " if char == self.delimiter else char for char in characters).split())


def read_spellings(path: str, vocabulary: dict[str, int], normalize) -> tuple[dict[str, str], list[str]]:
    """Words of an n-gram file (ARPA) with their spelling in the vocabulary, and those that can't be spelled in it.

    Args:
        normalize: text -> text as transcripts have it; "CO-OPERATE" is spelled "co operate".

    Raises:
        UserError: no such file, no n-grams in it, or not a word that can be spelled.
    """
    spellings, others = {}, []
    for word in read_words(path):
        text = normalize(word)
        if text and set(text) - {" "} <= vocabulary.keys():
            spellings[word] = text
        else:
            others.append(word)
    if not spellings:
        raise UserError(
            f"language_model: {path}: none of its {len(others)} words can be spelled with the transcripts' characters"
        )
    return spellings, others


def read_words(path: str) -> Iterator[str]:
    """The words of an ARPA file, without <s>, </s> and <unk>; nothing of it is kept in memory.

    The format: https://cmusphinx.github.io/wiki/arpaformat/
    """
    if not Path(path).is_file():
        raise UserError(f"language_model: there is no file {path!r}; an n-gram in the ARPA format is needed")
    inside, found = False, 0
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                line = line.strip()
                if line.startswith("\\"):
                    if inside:
                        break
                    inside = line == "\\1-grams:"
                    continue
                if not inside or not line:
                    continue
                fields = line.split()
                if len(fields) not in (2, 3):
                    raise UserError(f"language_model: {path} line {number} is not 'log10 word [backoff]': {line[:60]}")
                found += 1
                if fields[1].lower() not in ("<s>", "</s>", "<unk>"):
                    yield fields[1]
    except UnicodeDecodeError:
        raise UserError(f"language_model: {path} is not text; an n-gram in the ARPA format is needed") from None
    if not found:
        raise UserError(f"language_model: {path} has no section \\1-grams: with words; the ARPA format is needed")


@contextlib.contextmanager
def quiet_stderr():
    """KenLM draws its own progress there, whoever is looking."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
