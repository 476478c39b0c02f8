"""The model card: valid metadata, and no result that wasn't measured."""

import ast

import pytest
import yaml

from acoustic import report
from acoustic.report.card import write_card


@pytest.fixture
def card(tmp_path):
    def write(**changed) -> str:
        figure = tmp_path / "figures" / "pretraining.png"
        settings = {
            "kind": "wav2vec2 pretrained on sounds",
            "metadata": {"library_name": "transformers", "tags": ["audio"]},
            "facts": ["data: 3 recordings", "training: 2 updates"],
            "results": {"eval_accuracy": 0.12345, "hours_seen": 2.0},
            "figures": [figure],
            "usage": "print(1)\n",
            **changed,
        }
        write_card(str(tmp_path), **settings)
        return (tmp_path / "README.md").read_text(encoding="utf-8")

    return write


def test_the_metadata_is_the_hubs_yaml(card):
    _, metadata, body = card().split("---\n", 2)
    assert yaml.safe_load(metadata) == {"library_name": "transformers", "tags": ["audio"]}
    assert body.strip().startswith("# wav2vec2 pretrained on sounds")


def test_facts_results_and_figures(card):
    text = card()
    assert "- data: 3 recordings\n- training: 2 updates\n" in text
    assert "| eval_accuracy | 0.1235 |\n| hours_seen | 2 |\n" in text
    assert "![pretraining](figures/pretraining.png)" in text
    assert "```python\nprint(1)\n```" in text


def test_without_results_there_is_no_table(card):
    assert "## Results" not in card(results={})
    assert "## Figures" not in card(figures=[])


def test_only_measured_results_are_listed():
    """What was asked for but not measured is left out, not shown as 0 or None."""
    measured = {"eval_accuracy": 0.5, "eval_loss": None, "note": "text"}
    assert report.numbers(measured, ("eval_accuracy", "eval_loss", "eval_code_perplexity", "note")) == {
        "eval_accuracy": 0.5
    }


def test_the_last_logged_values_of_training():
    history = [{"loss": 3.0, "step": 1}, {"loss": 2.0, "step": 2, "epoch": 0.5}, {"eval_loss": 1.0, "step": 2}]
    assert report.last_training(history) == {"train_loss": 2.0}
    assert report.last_training([]) == {}


@pytest.mark.parametrize(
    "usage",
    [
        report.PRETRAINED_USE.format(rate=16000),
        *(report.PIPELINE_USE.format(pipeline=p) for p in report.PIPELINES.values()),
    ],
)
def test_the_usage_is_python(usage):
    ast.parse(usage)


def test_what_the_watch_said(card):
    assert "\n## Health\n\n- one line\n- another\n" in card(health=["one line", "another"])
    assert "## Health" not in card()
