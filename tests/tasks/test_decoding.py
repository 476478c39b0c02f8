"""Prefix beam search against all labellings by brute force, with an n-gram and without; what can't be asked for."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from acoustic.console import UserError
from acoustic.tasks.ctc import normalize
from acoustic.tasks.decoding import BeamSearch, DecodingOptions, read_spellings, read_words

pytest.importorskip("flashlight.lib.text.decoder", reason="flashlight-text has no wheel for this Python")

VOCABULARY = {"[PAD]": 0, "[UNK]": 1, "|": 2, "a": 3, "b": 4}
UNIGRAMS = {"<s>": (-99, -0.3), "</s>": (-0.9, 0.0), "AB": (-0.6, -0.2), "b": (-0.5, -0.3), "aba": (-1.5, -0.1)}
BIGRAMS = {("<s>", "AB"): -0.3, ("AB", "b"): -0.2, ("b", "b"): -0.9, ("b", "</s>"): -0.4}


@pytest.fixture
def arpa(tmp_path):
    lines = ["\\data\\", f"ngram 1={len(UNIGRAMS)}", f"ngram 2={len(BIGRAMS)}", "", "\\1-grams:"]
    lines += [f"{score}\t{word}\t{backoff}" for word, (score, backoff) in UNIGRAMS.items()]
    lines += ["", "\\2-grams:", *(f"{score}\t{' '.join(words)}" for words, score in BIGRAMS.items()), "", "\\end\\"]
    path = tmp_path / "words.arpa"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def options(**given) -> DecodingOptions:
    return DecodingOptions(**{"decoding": "beam", "beam_width": 500, **given})


def draw(seed: int, frames: int = 5) -> torch.Tensor:
    """Log-probabilities without the unknown character, which a model never learns to say."""
    logits = torch.randn(frames, len(VOCABULARY), generator=torch.Generator().manual_seed(seed)) * 1.5
    logits[:, VOCABULARY["[UNK]"]] = -50
    return logits.log_softmax(-1)


def all_texts(log_probs: torch.Tensor) -> dict[str, float]:
    """ln p of every text, summed over all paths of single frames."""
    found: dict[str, list[float]] = {}
    characters = {0: "", 2: " ", 3: "a", 4: "b"}
    for path in itertools.product(characters, repeat=len(log_probs)):
        labels = [token for token, _ in itertools.groupby(path)]
        text = " ".join("".join(characters[token] for token in labels).split())
        found.setdefault(text, []).append(sum(log_probs[frame, token].item() for frame, token in enumerate(path)))
    return {text: float(np.logaddexp.reduce(scores)) for text, scores in found.items()}


def grammar(text: str) -> float:
    """ln p of a text by the bigrams and, where there is none, the unigrams with backoff."""
    spelled, total, before = {"ab": "AB", "b": "b", "aba": "aba"}, 0.0, "<s>"
    for word in [*(spelled[word] for word in text.split()), "</s>"]:
        total += BIGRAMS.get((before, word), UNIGRAMS[before][1] + UNIGRAMS[word][0])
        before = word
    return total * math.log(10)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bonus", [0.0, 1.0])
def test_the_most_probable_of_all_texts(seed, bonus):
    log_probs = draw(seed)
    expected = {text: score + bonus * len(text.split()) for text, score in all_texts(log_probs).items()}
    search = BeamSearch(VOCABULARY, options(length_bonus=bonus))
    found = search.scores(log_probs)
    best = max(expected, key=expected.get)
    assert search(log_probs) == best
    for text in sorted(expected, key=expected.get)[-5:]:
        assert found[text] == pytest.approx(expected[text], abs=1e-3)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("weight, bonus", [(0.7, 0.4), (2.0, 2.0), (0.0, 0.0)])
def test_the_best_text_of_an_n_gram(arpa, seed, weight, bonus):
    log_probs = draw(seed)
    spellings, others = read_spellings(arpa, VOCABULARY, normalize)
    assert (spellings, others) == ({"AB": "ab", "b": "b", "aba": "aba"}, [])
    expected = {
        text: score + weight * grammar(text) + bonus * len(text.split())
        for text, score in all_texts(log_probs).items()
        if set(text.split()) <= {"ab", "b", "aba"}
    }
    given = options(language_model=arpa, lm_weight=weight, length_bonus=bonus)
    search = BeamSearch(VOCABULARY, given, spellings)
    assert search(log_probs) == max(expected, key=expected.get)
    found = search.scores(log_probs)
    for text in sorted(expected, key=expected.get)[-4:]:
        assert found[text] == pytest.approx(expected[text], abs=1e-3)


def test_the_beam_sums_over_alignments_where_greedy_takes_one():
    """The blank is the likeliest in both frames; "a" is, as there are three ways to say it."""
    log_probs = torch.tensor([[0.6, 1e-9, 1e-9, 0.4, 1e-9]] * 2).log()
    assert all_texts(log_probs)["a"] == pytest.approx(math.log(0.64), abs=1e-3)
    assert set(log_probs.argmax(-1).tolist()) == {VOCABULARY["[PAD]"]}  # greedily: nothing
    assert BeamSearch(VOCABULARY, options())(log_probs) == "a"


def test_a_narrow_beam_forgets():
    """So the width does something: the first frame's second best is what the best text begins with."""
    log_probs = torch.tensor([[0.1, 1e-9, 1e-9, 0.5, 0.4], [0.9, 1e-9, 1e-9, 0.05, 0.05]]).log()
    wide, narrow = (BeamSearch(VOCABULARY, options(beam_width=width)).scores(log_probs) for width in (100, 1))
    assert {"a", "b"} <= wide.keys()
    assert "b" not in narrow


def test_what_the_model_never_says_never_comes_out():
    log_probs = torch.log(torch.tensor([[0.01, 0.97, 0.005, 0.01, 0.005]] * 3))
    assert "[UNK]" not in " ".join(BeamSearch(VOCABULARY, options()).scores(log_probs))


def test_probabilities_of_zero_are_no_trouble():
    log_probs = torch.full((3, 5), -torch.inf)
    log_probs[:, 3] = 0.0
    scores = BeamSearch(VOCABULARY, options()).scores(log_probs)
    assert max(scores, key=scores.get) == "a"
    assert not any(math.isnan(score) for score in scores.values())


def test_words_that_can_not_be_spelled_are_named(tmp_path):
    path = tmp_path / "x.arpa"
    path.write_text("\\data\\\nngram 1=4\n\n\\1-grams:\n-1\t<unk>\n-1\tAB-ba\n-1\tzoo\n-1\tb\n\n\\end\\\n")
    assert list(read_words(str(path))) == ["AB-ba", "zoo", "b"]
    assert read_spellings(str(path), VOCABULARY, normalize) == ({"AB-ba": "ab ba", "b": "b"}, ["zoo"])


@pytest.mark.parametrize(
    "content, line",
    [
        (None, "there is no file"),
        (b"hello\n", r"has no section \\1-grams: with words"),
        (b"\xff\xfe\x00", "is not text"),
        (b"\\data\\\n\\1-grams:\n-1\ta\n-1 b c d e\n", "line 4 is not 'log10 word"),
        (b"\\data\\\n\\1-grams:\n-1\tzoo\n", "none of its 1 words can be spelled"),
    ],
)
def test_a_file_that_is_no_n_gram(tmp_path, content, line):
    path = tmp_path / "x.arpa"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=line) as error:
        read_spellings(str(path), VOCABULARY, normalize)
    assert "\n" not in str(error.value)


def test_what_kenlm_says_of_a_broken_file_is_one_line(tmp_path, capfd):
    path = tmp_path / "x.arpa"
    path.write_text("\\data\\\nngram 1=7\n\n\\1-grams:\n-1\ta\n\n\\end\\\n")
    spellings, _ = read_spellings(str(path), VOCABULARY, normalize)
    with pytest.raises(UserError, match="language_model: .*x.arpa: ") as error:
        BeamSearch(VOCABULARY, options(language_model=str(path)), spellings)
    assert "\n" not in str(error.value)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "given, line",
    [
        ({"beam_width": 3}, "beam_width: belongs to --decoding beam"),
        ({"language_model": "x.arpa"}, "language_model: belongs to --decoding beam"),
        ({"decoding": "beam", "beam_width": 0}, "beam_width: at least 1"),
        ({"decoding": "beam", "lm_weight": 1.0}, "lm_weight: of which language model"),
        ({"decoding": "beam", "language_model": "x", "lm_weight": -1.0}, "lm_weight: not below 0"),
    ],
)
def test_options_that_can_not_be(given, line):
    with pytest.raises(UserError, match=line):
        DecodingOptions.of(SimpleNamespace(**given))


def test_without_the_library(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install flashlight-text"):
        DecodingOptions.of(SimpleNamespace(decoding="beam"))
