"""The curve of a recipe as it ran before, to hold one's own run against.

    python -m acoustic.report OUTPUT_DIR recipes/demo/pretrain.yaml

keeps what a finished run logged beside its recipe; every later run of that recipe has it, faint, in its figure.
"""

from pathlib import Path

from acoustic.console import UserError
from acoustic.report.record import read_json, write_json

# What the curves show. More than so many points can't be told apart.
KEYS = ("loss", "contrastive_loss", "reconstruction_loss", "accuracy", "code_perplexity", "grad_norm", "hours_seen")
MAX_POINTS = 100


def path_of(recipe: str, objective: str) -> Path:
    return Path(recipe).parent / "results" / f"{Path(recipe).stem}_{objective}.json"


def load_reference(recipe: str | None, objective: str) -> list[dict]:
    """A history like a run's own; empty where the recipe has none."""
    if recipe is None:
        return []
    try:
        return read_json(path_of(recipe, objective)).get("history", [])
    except ValueError:  # it is only there to be looked at
        return []


def keep(output_dir: str, recipe: str) -> Path:
    """
    Raises:
        UserError: output_dir holds no finished pretraining.
    """
    run, state = read_json(Path(output_dir, "run.json")), read_json(Path(output_dir, "trainer_state.json"))
    if not run or not state or not read_json(Path(output_dir, "all_results.json")):
        raise UserError(f"{output_dir!r} holds no finished run of run_pretrain.py")
    entries = [entry for entry in state["log_history"] if "loss" in entry or "eval_loss" in entry]
    every = -(-len(entries) // MAX_POINTS)
    kept = [entry for index, entry in enumerate(entries) if index % every == 0 or "eval_loss" in entry]
    history = [
        {"step": entry["step"], **{key: round(entry[key], 4) for key in with_held_out(KEYS) if key in entry}}
        for entry in kept
    ]
    about = {name: run[name] for name in ("command", "commit", "seed", "processes", "hardware", "wall_seconds")}
    path = path_of(recipe, run["settings"].get("objective", "wav2vec2"))
    path.parent.mkdir(exist_ok=True)
    write_json(path, {**about, "history": history})
    return path


def with_held_out(keys: tuple[str, ...]) -> list[str]:
    return [*keys, *(f"eval_{key}" for key in keys)]
