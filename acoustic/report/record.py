"""What a run leaves behind for people and programs: run.json, data_report.json, all_results.json."""

import json
import platform
import re
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch

LIBRARIES = ("torch", "torchaudio", "transformers", "datasets", "accelerate", "soundfile")


def write_json(path: Path, content: dict) -> None:
    """All of it or, where the process is killed, nothing."""
    aside = path.with_name(f"_{path.name}.part")
    aside.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
    aside.replace(path)


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_run(output_dir: str, args, notes: list[str], wall_seconds: float, health: list[str] = ()) -> None:
    """run.json: the command, every setting that was given (by recipe or command line), and what it ran on."""
    settings = {key: value for key, value in args.given.items() if "token" not in key}
    content = {
        "command": command_line(),
        "commit": commit(),
        "seed": args.seed,
        "processes": args.world_size,
        "settings": dict(sorted(settings.items())),
        "notes": notes,
        "health": list(health),
        "wall_seconds": round(wall_seconds, 1),
        "hardware": hardware(),
        "versions": versions(),
    }
    write_json(Path(output_dir, "run.json"), content)


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}


def command_line() -> str:
    """The command as typed, a token's value left out."""
    words, hide = [], False
    for word in [Path(sys.argv[0]).name, *sys.argv[1:]]:
        words.append("***" if hide else re.sub(r"(?i)(token=).*", r"\1***", word))
        hide = word.lstrip("-").replace("-", "_").endswith("token")
    return shlex.join(words)


def commit() -> str | None:
    here = Path(__file__).parent
    try:
        result = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True)
    except OSError:  # no git on this machine
        return None
    return result.stdout.strip() or None


def hardware() -> dict:
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"processor": processor(), "threads": torch.get_num_threads(), "gpus": gpus}


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.is_file() else []
    return names[0] if names else platform.processor() or platform.machine()


def write_data_report(output_dir: str, source: str, hours_seen: float, splits: dict[str, dict]) -> None:
    """data_report.json: what was used, and of each split the recordings that were not, with their reasons.

    `splits`: {"skipped": count, "skipped_by_reason", "skipped_recordings"} for each.
    """
    skipped = sum(report["skipped"] for report in splits.values())
    content = {"source": source, "hours_seen": round(hours_seen, 4), "skipped": skipped, "splits": splits}
    write_json(Path(output_dir, "data_report.json"), content)
