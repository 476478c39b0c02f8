"""Imports go one way: scripts -> everything; tasks, training -> models, data; models, data, report -> themselves."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Package -> what it may import from `acoustic` beside itself. `console` (errors, printing) is everyone's.
ALLOWED = {
    "console": set(),
    "data": set(),
    "models": set(),
    "report": set(),
    "tasks": {"models", "data"},
    "training": {"models", "data", "tasks"},
    "config": {"models", "data", "tasks"},
    "__init__": {"models"},  # so that `import acoustic` makes the architectures known to transformers
    "export": {"models", "data"},
    "embed": {"models", "data", "tasks", "export", "predict", "report"},
    "predict": {"config", "models", "data", "tasks"},
    # `python -m acoustic.data`, `python -m acoustic.models.vq_wav2vec`, `python -m acoustic.predict`: scripts
    "__main__": {"config", "data", "report", "export", "predict"},
}


def imported_parts(path: Path) -> set[str]:
    """`acoustic.X...` -> X, for every import in the file, those inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= (
                {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "acoustic" else {node.module}
            )
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("acoustic.")}


def sources() -> list[Path]:
    return sorted((ROOT / "acoustic").rglob("*.py"))


def part_of(path: Path) -> str:
    if path.name == "__main__.py":
        return "__main__"
    return path.relative_to(ROOT / "acoustic").with_suffix("").parts[0]


def test_every_part_of_the_package_has_a_rule():
    assert {part_of(path) for path in sources()} == set(ALLOWED)


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    beyond = imported_parts(path) - {part_of(path), "console"} - ALLOWED[part_of(path)]
    assert not beyond, f"{path.relative_to(ROOT)} imports acoustic.{', acoustic.'.join(sorted(beyond))}"


@pytest.mark.parametrize("script", ["run_pretrain.py", "run_finetune.py"])
def test_scripts_stay_thin(script):
    assert len((ROOT / script).read_text().splitlines()) < 120
