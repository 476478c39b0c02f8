"""README.md of an output folder: the model card. Only what this run measured."""

import re
from pathlib import Path

import yaml

# The folders of an absolute path: they name a machine, and often its user.
FOLDERS = re.compile(r"(?<![\w:/.~])~?/(?:[^\s/'\"`,;:()|]+/)+(?=[^\s/])")


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
    """
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
        lines += [f"![{path.stem}]({path.relative_to(output_dir).as_posix()})" for path in figures]
    lines += ["", "## Use", "", "```python", usage.strip(), "```"]
    if limits:
        lines += ["", "## What it is not good for", "", *limits]
    if made:
        lines += ["", "## How it was made", "", *made]
    text = FOLDERS.sub("", "\n".join(lines))
    Path(output_dir, "README.md").write_text(text + "\n", encoding="utf-8")
