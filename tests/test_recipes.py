"""Every recipe loads, wherever it lies; its first line is the command that runs it."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from acoustic.config import parse_finetuning, parse_pretraining
from acoustic.models import OBJECTIVES, build_for_pretraining
from acoustic.training import setup

ROOT = Path(__file__).parents[1]
RECIPES = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if path.parent.name != "accelerate")
HARDWARE = sorted((ROOT / "recipes" / "accelerate").rglob("*.yaml"))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_all_of_them_are_found():
    assert len(RECIPES) == 19, list(map(name, RECIPES))
    assert len(HARDWARE) == 6, list(map(name, HARDWARE))


def is_pretraining(path: Path) -> bool:
    return path.name == "pretrain.yaml" or path.parent.name == "objectives"


def cases():
    """(recipe, objective): once for each of its sections, or once."""
    for path in RECIPES:
        for objective in yaml.safe_load(path.read_text()).get("objectives", [None]):
            yield pytest.param(path, objective, id=f"{name(path)} {objective or ''}".strip())


@pytest.mark.parametrize("path, objective", cases())
def test_recipe_loads(path, objective, monkeypatch):
    monkeypatch.chdir(ROOT)
    chosen = ["--objective", objective] if objective else []
    model_args, data_args, args = (parse_pretraining if is_pretraining(path) else parse_finetuning)(
        [str(path), *chosen, "--use_cpu", "true"]
    )
    given = yaml.safe_load(path.read_text())
    given |= given.pop("objectives", {}).get(objective, {})
    parsed = {**vars(model_args), **vars(data_args), **vars(args)}
    assert all(parsed[key] == value for key, value in given.items() if not key.endswith("strategy"))
    assert not is_pretraining(path) or args.left_out == []


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_has_recipes(objective):
    """The paper's settings, a laptop's, and the demo's."""
    folder = ROOT / "recipes"
    assert yaml.safe_load((folder / f"objectives/{objective}.yaml").read_text())["objective"] == objective
    for other in ("objectives/small.yaml", "demo/pretrain.yaml"):
        assert objective in yaml.safe_load((folder / other).read_text())["objectives"]


@pytest.mark.parametrize("path, objective", cases())
def test_the_architecture_can_be_built(path, objective):
    """Overrides of names and values that the config takes."""
    if not is_pretraining(path) or (objective or path.stem) == "code_bert":
        return  # of a code_bert: with its quantizer
    chosen = ["--objective", objective] if objective else []
    model_args, data_args, args = parse_pretraining([str(path), *chosen, "--use_cpu", "true"])
    with torch.device("meta"):
        model, extractor, _ = build_for_pretraining(
            args.objective, None, None, model_args.config_overrides, args.objective_settings
        )
    setup.check_windows(model, data_args, extractor.sampling_rate)


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_first_line_is_the_command(path):
    script = "run_pretrain.py" if is_pretraining(path) else "run_finetune.py"
    assert re.fullmatch(rf"# python {script} {name(path)}( --objective \w+)?", path.read_text().splitlines()[0])


@pytest.mark.parametrize("path", HARDWARE, ids=name)
def test_hardware_file_is_read_by_accelerate(path, monkeypatch):
    """By its own loader, and by what turns a file into options and environment: there an unknown key is an error."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

    monkeypatch.setattr("accelerate.utils.launch.is_port_in_use", lambda port: False)
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    config = load_config_from_file(str(path))
    assert config.num_processes >= 1 and config.num_processes % config.num_machines == 0
    command = path.read_text().splitlines()[0].removeprefix("# accelerate launch ").split()
    assert command[:2] == ["--config_file", name(path)] and command[2] == "run_pretrain.py"
    assert (ROOT / command[3]).is_file()
    monkeypatch.chdir(ROOT)
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    assert args.num_processes == config.num_processes and args.mixed_precision == config.mixed_precision
    if config.distributed_type == "NO":
        environment = prepare_simple_launcher_cmd_env(args)[1]
    else:
        environment = prepare_multi_gpu_env(args)
        assert int(args.nproc_per_node) == config.num_processes / config.num_machines
    assert environment["ACCELERATE_MIXED_PRECISION"] == config.mixed_precision
    assert environment.get("ACCELERATE_USE_FSDP") == ("true" if path.name == "fsdp.yaml" else None)
    for key, value in config.fsdp_config.items():
        assert environment[key.upper()].lower() == str(value).lower()


def test_slurm_sets_what_the_fsdp_file_sets():
    """Without accelerate's launcher the same goes through the environment."""
    script = (ROOT / "recipes/accelerate/slurm.sh").read_text()
    given = dict(re.findall(r"(FSDP_\w+)=(\w+)", script))
    file = yaml.safe_load((ROOT / "recipes/accelerate/fsdp.yaml").read_text())["fsdp_config"]
    assert given == {
        key.upper(): str(value).lower() if value is True else str(value)
        for key, value in file.items()
        if value is not False
    }


@pytest.mark.parametrize("folder", ["demo", "voice_prompts"])
def test_what_a_readme_quotes_is_what_the_run_said(folder):
    """And its tables show the means of the rows beside it."""
    text = (ROOT / "recipes" / folder / "README.md").read_text(encoding="utf-8")
    quotes = {
        " ".join(block.replace("\n> ", " ").split()) for block in re.findall(r"(?m)^> ((?:.+\n)(?:> .+\n)*)", text)
    }
    found = [json.loads(path.read_text()) for path in (ROOT / "recipes" / folder / "results").glob("*efficiency.json")]
    said = {line for content in found for line in content["says"]}
    assert quotes and quotes <= said
    column = {"demo": "test", "voice_prompts": "language_test"}[folder]
    for content in found:
        if column not in content["settings"]["splits"]:
            continue
        rows = [row for row in content["rows"] if row["start"] == "random weights" and row["way"] == "frozen"]
        scores = {}
        for row in rows:
            scores.setdefault(row["budget"], []).append(row[column])
        means = [sum(values) / len(values) for values in scores.values()]
        line = next(line for line in text.splitlines() if line.startswith("| random weights, frozen |"))
        shown = [float(cell.split()[0]) for cell in line.strip("| ").split(" | ")[1:]]
        scale = 1 if folder == "demo" else 100
        assert shown == pytest.approx([scale * mean for mean in means], abs=0.0006 if folder == "demo" else 0.6)
