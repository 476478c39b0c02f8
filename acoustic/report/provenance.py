"""What a card says of where a model comes from: the data, the command, the machine; and the Hub's metadata of it."""

import re
from pathlib import Path

from acoustic.report.record import command_line, commit, hardware, versions

# transformers' names of tasks, as the Hub's metadata has them.
TASK_TYPES = {
    "classification": "audio-classification",
    "segmentation": "audio-classification",
    "ctc": "automatic-speech-recognition",
}
# Options that name places of this machine, or what the card says elsewhere.
UNSHOWN = ("output_dir", "hub_model_id", "dataset_name", "model_name_or_path", "logging_dir", "resume_from_checkpoint")


def is_hub_id(name: str | None) -> bool:
    """`name` or `user/name`, and no file or folder here."""
    return bool(name) and not Path(name).exists() and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None


def shown_name(name: str) -> str:
    """Of a data set or a model: a Hub id as it is, of a path the last part."""
    return name if is_hub_id(name) or "://" in name else Path(name).name or name


def metadata(args, data_args, base: str | None, tags: list[str], **more) -> dict:
    """The Hub's YAML block, but for the results."""
    datasets = [source.name for source in data_args.mix if is_hub_id(source.name)]
    return {
        "library_name": "transformers",
        **more,
        **({"base_model": base} if is_hub_id(base) else {}),
        **({"datasets": datasets} if datasets else {}),
        "tags": ["audio", *tags],
    }


def model_index(args, data_args, tested: dict[str, dict[str, float]]) -> dict:
    """The Hub's `model-index`: split -> metric -> value; nothing where nothing was tested."""
    source = data_args.mix[0].name
    slug = re.sub(r"[^\w/-]+", "-", shown_name(source)).lower()
    results = [
        {
            "task": {"type": TASK_TYPES[args.task], "name": args.task},
            "dataset": {"type": slug, "name": shown_name(source), "split": split},
            "metrics": [
                {"type": name, "name": name, "value": round(float(value), 4)} for name, value in scores.items()
            ],
        }
        for split, scores in tested.items()
        if scores
    ]
    name = args.hub_model_id or Path(args.output_dir).name
    return {"model-index": [{"name": name, "results": results}]} if results else {}


def how_it_was_made(args, wall_seconds: float) -> list[str]:
    """Lines: the command, every setting that was given, what it ran on."""
    given = {name: value for name, value in args.given.items() if name not in UNSHOWN and "token" not in name}
    machine = hardware()
    devices = ", ".join(machine["gpus"]) or f"{machine['processor']}, {machine['threads']} thread(s)"
    libraries = ", ".join(f"{name} {number}" for name, number in versions().items())
    lines = [f"- `{command_line()}`", f"- commit {commit() or 'unknown'}, seed {args.seed}"]
    lines += [f"- {wall_seconds / 3600:.2f} h on {args.world_size} process(es): {devices}", f"- {libraries}"]
    if given:
        settings = [f"| {name} | {cell(value)} |" for name, value in sorted(given.items())]
        lines += ["", "Settings that were given, by the recipe or the command; all others are the defaults:", ""]
        lines += ["| setting | value |", "|---|---|", *settings]
    return lines


def cell(value) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def limits(task: str, heard: str, classes: list[str] | None = None) -> list[str]:
    """What it is not good for, as far as that follows from what it is."""
    lines = [
        f"- All that it has heard is {heard}. Other microphones, rooms, machines or speakers were not tested, "
        "unless a test split above has them."
    ]
    if task == "pretraining":
        return [*lines, "- It answers no question by itself: it is made to be fine-tuned, or to give embeddings."]
    if task == "anomaly":
        return [
            *lines,
            "- It only knows what is normal: whatever is new, another load or room too, sounds wrong to it.",
        ]
    if task == "ctc":
        return [*lines, "- It can write only the characters of its vocabulary, which come from its training texts."]
    known = f": {', '.join(classes[:20])}{', ...' if len(classes) > 20 else ''}" if classes else ""
    if task == "several":
        return [*lines, f"- What is none of its classes{known} goes unnoticed."]
    return [*lines, f"- It knows no sound but its classes{known}, and answers with one of them whatever it hears."]
