"""Every recipe loads, wherever it lies; its first line is the command that runs it."""

from pathlib import Path

import pytest
import yaml

from acoustic.config import parse_finetuning, parse_pretraining

ROOT = Path(__file__).parents[1]
RECIPES = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if path.parent.name != "accelerate")
HARDWARE = sorted((ROOT / "recipes" / "accelerate").rglob("*.yaml"))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_all_of_them_are_found():
    assert len(RECIPES) == 5, list(map(name, RECIPES))
    assert len(HARDWARE) == 4, list(map(name, HARDWARE))


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_recipe_loads(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    is_pretraining = path.name == "pretrain.yaml"
    model_args, data_args, args = (parse_pretraining if is_pretraining else parse_finetuning)(
        [str(path), "--use_cpu", "true"]
    )
    given = yaml.safe_load(path.read_text())
    parsed = {**vars(model_args), **vars(data_args), **vars(args)}
    assert all(parsed[key] == value for key, value in given.items() if not key.endswith("strategy"))


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_first_line_is_the_command(path):
    script = "run_pretrain.py" if path.name == "pretrain.yaml" else "run_finetune.py"
    assert path.read_text().splitlines()[0] == f"# python {script} {name(path)}"


@pytest.mark.parametrize("path", HARDWARE, ids=name)
def test_hardware_file_is_read_by_accelerate(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes >= 1
    assert (
        path.read_text().splitlines()[0].startswith(f"# accelerate launch --config_file {name(path)} run_pretrain.py")
    )
