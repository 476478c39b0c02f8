"""README.md of an output folder: the model card. Only what this run measured."""

from pathlib import Path

import yaml


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
    """
    lines = ["---", yaml.safe_dump(metadata, sort_keys=False).strip(), "---", "", f"# {kind}", ""]
    lines += [f"- {fact}" for fact in facts]
    if results:
        lines += ["", "## Results", "", "| metric | value |", "|---|---|"]
        lines += [f"| {name} | {value:.4g} |" for name, value in results.items()]
    if health:
        lines += ["", "## Health", "", *(f"- {line}" for line in health)]
    lines += ["", "## Use", "", "```python", usage.strip(), "```"]
    if figures:
        lines += ["", "## Figures", ""]
        lines += [f"![{path.stem}]({path.relative_to(output_dir).as_posix()})" for path in figures]
    Path(output_dir, "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
