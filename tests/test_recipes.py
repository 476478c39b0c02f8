"""Every recipe loads, wherever it lies; its first line is the command that runs it."""

import re
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
    assert len(HARDWARE) == 6, list(map(name, HARDWARE))


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
