"""The model card: valid metadata, and no result that wasn't measured."""

import ast
import re
from pathlib import Path

import pytest
import yaml

from acoustic import report
from acoustic.report import provenance
from acoustic.report.card import caption, write_card


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
        *(report.PRETRAINED_USE.format(rate=16000, needs=needs, name=".") for needs in ("", report.NEEDS)),
        *(report.PIPELINE_USE.format(pipeline=p, needs=report.NEEDS, name=".") for p in report.PIPELINES.values()),
    ],
)
def test_the_usage_is_python(usage):
    ast.parse(usage)


def test_what_the_watch_said(card):
    assert "\n## Health\n\n- one line\n- another\n" in card(health=["one line", "another"])
    assert "## Health" not in card()


def test_no_folder_of_this_machine_is_named(card):
    facts = ["data: /home/jane/plant 7/x.wav", "from ~/models/base", "https://a.org/b/c and 1/2", "outputs/demo_cpc"]
    text = card(kind="pretrained on /home/jane/plant", facts=facts)
    assert "jane" not in text.replace("plant 7", "") and "# pretrained on plant\n" in text
    assert "- from base\n- https://a.org/b/c and 1/2\n- outputs/demo_cpc\n" in text


class Given:
    """What a run was given, as far as cards read it."""

    def __init__(self, **given):
        self.given, self.seed, self.world_size, self.task = given, 1, 1, given.get("task", "classification")
        self.output_dir, self.hub_model_id = "outputs/mine", given.get("hub_model_id")


def test_results_for_the_hub(tmp_path):
    data = type("Data", (), {"mix": [type("Source", (), {"name": str(tmp_path / "My Plant")})()]})
    index = provenance.model_index(Given(), data, {"test": {"accuracy": 0.123456}, "empty": {}})
    (entry,) = index["model-index"]
    assert entry["name"] == "mine"
    assert entry["results"] == [
        {
            "task": {"type": "audio-classification", "name": "classification"},
            "dataset": {"type": "my-plant", "name": "My Plant", "split": "test"},
            "metrics": [{"type": "accuracy", "name": "accuracy", "value": 0.1235}],
        }
    ]
    assert provenance.model_index(Given(), data, {}) == {}


def test_where_it_comes_from(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    sources = [type("Source", (), {"name": name})() for name in ("user/calls", str(tmp_path / "here"))]
    data = type("Data", (), {"mix": sources})
    found = provenance.metadata(Given(), data, "facebook/wav2vec2-base", ["cpc"], pipeline_tag="x")
    assert found == {
        "library_name": "transformers",
        "pipeline_tag": "x",
        "base_model": "facebook/wav2vec2-base",
        "datasets": ["user/calls"],
        "tags": ["audio", "cpc"],
    }
    assert "base_model" not in provenance.metadata(Given(), data, str(tmp_path / "here"), [])
    assert provenance.shown_name(str(tmp_path / "here")) == "here"


def test_how_it_was_made_shows_settings_and_no_secrets(monkeypatch):
    monkeypatch.setattr("sys.argv", ["run_pretrain.py", "--hub_token", "hf_secret", "--max_steps", "5"])
    text = "\n".join(provenance.how_it_was_made(Given(max_steps=5, hub_token="hf_secret", output_dir="x"), 3600.0))
    assert "| max_steps | 5 |" in text and "hf_secret" not in text and "| output_dir" not in text
    assert (
        "- `run_pretrain.py --hub_token '***' --max_steps 5`" in text and "torch 2" in text and "1.00 h on 1" in text
    )


@pytest.mark.parametrize("task", ["pretraining", "ctc", "classification", "several"])
def test_what_it_is_not_good_for(task):
    lines = provenance.limits(task, "plant (2.00 h)", ["fan", "pump"])
    assert len(lines) == 2 and "plant (2.00 h)" in lines[0]
    assert ("fan, pump" in lines[1]) == (task in ("classification", "several"))


def test_every_figure_of_a_card_has_a_caption():
    sources = [path.read_text() for path in Path(report.__file__).parent.glob("*.py")]
    names = {
        name for text in sources for name in re.findall(r'save\(figure, output_dir, f?"(\w+?)(?:{split})?"\)', text)
    }
    names |= {"embeddings", "by_class_"}
    assert len(names) > 12
    assert [name for name in sorted(names) if not caption(name)] == ["comparison", "data", "label_efficiency"]
    assert caption("something else") == ""


def test_of_the_checkpoint_before_only_the_name_is_shown(card, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "jane" / "encoder").mkdir(parents=True)
    for base in ("jane/encoder", str(tmp_path / "jane" / "encoder")):
        assert "- encoder from encoder\n" in card(facts=[f"encoder from {base}"], base=base)
    assert "- encoder from user/model\n" in card(facts=["encoder from user/model"], base="user/model")
