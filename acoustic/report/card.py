"""README.md of an output folder: the model card. Only what this run measured."""

import re
from pathlib import Path

import yaml

# The folders of an absolute path: they name a machine, and often its user.
FOLDERS = re.compile(r"(?<![\w:/.~])~?/(?:[^\s/'\"`,;:()|]+/)+(?=[^\s/])")


# What a figure shows, by the beginning of its name.
CAPTIONS = {
    "pretraining": "The run. Dotted lines are chance, shaded bands those of healthy runs; a wide grey line is the "
    "recipe's own run, a dashed black one says where the watch spoke.",
    "heard": "What goes into the model: spectrograms of some windows, with what is hidden from it in training.",
    "code_usage": "How evenly the codebook is used.",
    "probe": "Accuracy of a frozen linear probe on a few labeled clips, while the model was pretrained.",
    "embeddings": "The probe's clips in the trained model's embedding, by t-SNE: near is alike, far says little.",
    "steps_ahead": "How well the future is told from other audio, by the number of steps ahead.",
    "reconstruction": "What was hidden from the model, and what it made of it.",
    "finetuning": "The fine-tuning.",
    "confusion_": "True classes in rows, predicted ones in columns; shaded by the row's share.",
    "by_class_": "Each class by itself.",
    "f1_by_class_": "Each class by itself.",
    "errors_": "Where the errors are: a dot for each utterance, by its length.",
    "timeline_": "The worst, the middle and the best recording: what sounded when, and what was predicted.",
    "scores_": "Scores of normal and of anomalous clips.",
    "roc_": "Hits over false alarms.",
    "sweep_": "Each layer and each distance by itself.",
    "most_anomalous_": "The most anomalous clips, and where in them.",
}


def caption(name: str) -> str:
    found = next((text for start, text in CAPTIONS.items() if name.startswith(start)), "")
    return f"*{found}*" if found else ""


def write_card(
    output_dir: str,
    *,
    kind: str,
    metadata: dict,
    facts: list[str],
    results: dict,
    figures: list[Path],
    usage: str,
    health: list[str] = (),
    sections: dict[str, list[str]] | None = None,
    limits: list[str] = (),
    made: list[str] = (),
    base: str | None = None,
):
    """A Hub model card.

    Args:
        kind: what the model is, in a few words: its title.
        metadata: the Hub's YAML block.
        facts: one line each: data, model, training.
        results: metric name -> number; shown as one table.
        figures: PNG files below output_dir.
        usage: Python that loads the model.
        health: one line each: what the watch over the training had to say; without any there is no such section.
        sections: title -> lines of Markdown, of the task's own.
        limits, made: lines of Markdown: what it is not good for, and how it was made.
        base: the checkpoint that it comes from; of a folder only the name is shown.
    """
    if base and Path(base).exists():
        facts = [fact.replace(base, Path(base).name) for fact in facts]
    lines = ["---", yaml.safe_dump(metadata, sort_keys=False).strip(), "---", "", f"# {kind}", ""]
    lines += [f"- {fact}" for fact in facts]
    if results:
        lines += ["", "## Results", "", "| metric | value |", "|---|---|"]
        lines += [f"| {name} | {value:.4g} |" for name, value in results.items()]
    if health:
        lines += ["", "## Health", "", *(f"- {line}" for line in health)]
    for title, content in (sections or {}).items():
        lines += ["", f"## {title}", "", *content]
    if figures:
        lines += ["", "## Figures", ""]
        for path in figures:
            lines += [f"![{path.stem}]({path.relative_to(output_dir).as_posix()})", "", caption(path.stem), ""]
    lines += ["", "## Use", "", "```python", usage.strip(), "```"]
    if limits:
        lines += ["", "## What it is not good for", "", *limits]
    if made:
        lines += ["", "## How it was made", "", *made]
    text = FOLDERS.sub("", "\n".join(lines))
    Path(output_dir, "README.md").write_text(text + "\n", encoding="utf-8")
