"""Every command of every README parses, every file that one names exists."""

import re
import shlex
from pathlib import Path

import pytest

from acoustic.config import parse_finetuning, parse_pretraining
from acoustic.data.__main__ import parse as parse_look
from acoustic.embed import parse as parse_embed
from acoustic.models.vq_wav2vec.__main__ import parse as parse_export
from acoustic.predict.__main__ import parse as parse_predict
from benchmarks import pretrain_step

ROOT = Path(__file__).parents[1]
READMES = [ROOT / "README.md", ROOT / "benchmarks/README.md", *sorted((ROOT / "recipes").rglob("README.md"))]
MODULES = {
    "acoustic.data": parse_look,
    "acoustic.models.vq_wav2vec": parse_export,
    "acoustic.predict": parse_predict,
    "acoustic.embed": parse_embed,
}
PARSERS = {"run_pretrain.py": parse_pretraining, "run_finetune.py": parse_finetuning}


def commands() -> list:
    """The lines of all shell blocks, continuation lines joined, comments left out."""
    found = []
    for readme in READMES:
        for block in re.findall(r"```bash\n(.*?)```", readme.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words:
                    found.append(pytest.param(words, id=f"{readme.relative_to(ROOT)}: {' '.join(words)[:60]}"))
    return found


def test_there_are_commands():
    assert len(commands()) >= 10


@pytest.mark.parametrize("words", commands())
def test_command_parses(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = words[words.index("accelerate") :] if words[0] == "timeout" else words
    script = next((word for word in words if word in PARSERS), None)
    if script and "--help" not in words:
        PARSERS[script]([*words[words.index(script) + 1 :], "--use_cpu", "true"])
        if words[0] == "accelerate":
            check_launcher(words[2 : words.index(script)])
    elif words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:]) <= set(targets)
    elif words[:2] == ["python", "-m"]:
        MODULES[words[2]](words[3:])
    elif words[1:2] == ["benchmarks/pretrain_step.py"]:
        pretrain_step.parse(words[2:])
    elif words[0] in ("python", "bash"):
        assert (ROOT / words[1]).is_file()
    else:
        assert words[0] in ("source", "git", "cd", "sudo"), f"no check for {words}"


def test_yaml_in_a_readme_is_a_recipe(tmp_path):
    """Its keys are options; what it names need not be there."""
    blocks = [b for readme in READMES for b in re.findall(r"```yaml\n(.*?)```", readme.read_text(), re.DOTALL)]
    assert blocks
    for block in blocks:
        (tmp_path / "recipe.yaml").write_text(block)
        argv = [str(tmp_path / "recipe.yaml"), "--output_dir", str(tmp_path), "--use_cpu", "true"]
        _, data_args, _ = parse_pretraining(argv)
        assert data_args.mix


def check_launcher(options: list[str]) -> None:
    from accelerate.commands.launch import launch_command_parser

    args = launch_command_parser().parse_args([*options, "script.py"])
    assert args.config_file is None or Path(args.config_file).is_file()


@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_images_lead_somewhere(readme):
    targets = re.findall(r"\]\(([^)#]+)\)", readme.read_text())
    missing = [target for target in targets if "://" not in target and not (readme.parent / target).exists()]
    assert not missing
