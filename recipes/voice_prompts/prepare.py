"""Telephone prompts in English, French and Spanish, from Debian packages to manifests, without root.

    python recipes/voice_prompts/prepare.py --output_dir data/voice_prompts

Source: Debian's asterisk-core-sounds-{en,fr,es} (transcripts) and asterisk-core-sounds-{en,fr,es}-wav (8 kHz
recordings), CC-BY-SA-3.0. English and Spanish are spoken by Allison Smith, French by June Wallack.
"""

import argparse
import csv
import gzip
import hashlib
import io
import json
import lzma
import random
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import soundfile
from tqdm import tqdm

LANGUAGES = ("en", "fr", "es")
PACKAGES = tuple(f"asterisk-core-sounds-{language}{suffix}" for language in LANGUAGES for suffix in ("", "-wav"))
CTC_VALIDATION_MINUTES = 2.0
CTC_TEST_MINUTES = 6.0
LANGUAGE_CLIPS = {"train": 20, "validation": 10, "test": 60}  # per language
LANGUAGE_SHORTEST_SECONDS = 1.0
# A few prompts are longer; demo-instruct lasts 71 to 86 s, which alone would be a fifth of the CTC test set.
LABELED_LONGEST_SECONDS = 30.0
SILENCE_PEAK = 1e-3  # of full scale: silence/*.wav peak at 1e-4 (dither), the quietest speech at more than 0.02
MANIFESTS = ("unlabeled.csv",) + tuple(
    f"{task}_{split}.csv" for task in ("ctc", "language") for split in ("train", "validation", "test")
)
UNPACK_ERRORS = (OSError, EOFError, lzma.LZMAError, zlib.error)
WRITTEN = {"audio", "README.txt", "copyright", "settings.json", *MANIFESTS}
NEXT_COMMANDS = (
    "python run_pretrain.py recipes/voice_prompts/pretrain.yaml",
    "python run_finetune.py recipes/voice_prompts/ctc.yaml",
    "python run_finetune.py recipes/voice_prompts/classification.yaml",
)
README = """Telephone voice prompts in English, French and Spanish, built by recipes/voice_prompts/prepare.py.

Source: the Debian packages named in settings.json (Asterisk core sounds), recordings copied as they are: 8 kHz, mono.
Voices: Allison Smith (en, es), June Wallack (fr).
Licence: Creative Commons Attribution-ShareAlike 3.0 (CC-BY-SA-3.0); credits and full text are in the file
"copyright" beside this one. Whatever you share of these recordings, share it under the same licence, with the credits.

Manifests (CSV with a header; paths are relative to the manifest):
  unlabeled.csv                          path,language  all languages, no recording of a test set, no silence
  ctc_{train,validation,test}.csv        path,text      English; the same words are never in two of them
  language_{train,validation,test}.csv   path,language  the same prompt is never in two of them
"""


class PrepareError(Exception):
    """What went wrong and what to do, in one line for the user (exit code 2)."""


@dataclass(frozen=True)
class Prompt:
    """One recording: `seconds` of audio, `peak` in 0..1, `text` as written or None where no transcript can be used."""

    language: str
    name: str
    seconds: float
    peak: float
    text: str | None

    @property
    def path(self):
        return f"audio/{self.language}/{self.name}.wav"


# ---- packages: .deb files to bytes ----


def read_ar(data):
    """Members of an `ar` archive as {name: bytes}; ValueError where it is not one or is cut short.

    Format (ar(5)): 8 bytes of magic, then per member a 60-byte header (name 16, date 12, uid 6, gid 6, mode 8,
    size 10, "`\\n") and its bytes, padded to an even length.
    """
    if data[:8] != b"!<arch>\n":
        raise ValueError("not an ar archive")
    members, start = {}, 8
    while start < len(data):
        header = data[start : start + 60]
        if len(header) < 60 or header[58:] != b"`\n":
            raise ValueError("broken member header")
        size = int(header[48:58])
        body = data[start + 60 : start + 60 + size]
        if len(body) < size:
            raise ValueError("cut short")
        members[header[:16].decode().rstrip(" /")] = body
        start += 60 + size + size % 2
    return members


def open_tar(deb, members, part):
    """The tar archive `part` ("control" or "data") of a .deb whose ar members are `members`."""
    name = next((name for name in members if name.startswith(f"{part}.tar")), None)
    if name is None:
        raise ValueError(f"no {part}.tar in it")
    data = members[name]
    if name.endswith(".zst"):  # Ubuntu's packages; Python reads zstd only from 3.14 on
        if not shutil.which("dpkg-deb"):
            raise ValueError("compressed with zstd, which needs dpkg-deb: take Debian's package instead")
        option = "--ctrl-tarfile" if part == "control" else "--fsys-tarfile"
        data = subprocess.run(["dpkg-deb", option, str(deb)], check=True, capture_output=True).stdout
    return tarfile.open(fileobj=io.BytesIO(data), mode="r:*")


def read_deb(deb):
    """Version and regular files {path: bytes} of a Debian package.

    Everything stays in memory (25 MB at most), so no path inside the archive can reach the disk unchecked.
    """
    try:
        members = read_ar(deb.read_bytes())
        with open_tar(deb, members, "control") as tar:
            control = {Path(member.name).name: tar.extractfile(member).read() for member in tar if member.isfile()}
        version = re.search(r"^Version: *(\S+)", control["control"].decode(), re.MULTILINE)[1]
        with open_tar(deb, members, "data") as tar:
            files = {m.name.removeprefix("./"): tar.extractfile(m).read() for m in tar if m.isfile()}
    # KeyError: no control file; TypeError: no version in it
    except (KeyError, TypeError, ValueError, tarfile.TarError, subprocess.SubprocessError, *UNPACK_ERRORS) as error:
        raise PrepareError(f"{deb}: not a readable Debian package ({error}); get it again") from error
    return version, files


def download_packages(folder):
    """Downloads the six packages into `folder` with `apt-get download`: no root, checked by apt's signatures."""
    advice = (
        f"put the six .deb files into a folder and pass it as --packages_dir; a Debian machine gets them, "
        f"without root, by: apt-get download {' '.join(PACKAGES)}"
    )
    if not shutil.which("apt-get"):
        raise PrepareError(f"no apt-get here: {advice}")
    print(f"Downloading {len(PACKAGES)} Debian packages (about 60 MB) with apt-get download ...", flush=True)
    try:
        subprocess.run(["apt-get", "download", *PACKAGES], cwd=folder, check=True, capture_output=True, timeout=900)
    except (OSError, subprocess.SubprocessError) as error:
        raise PrepareError(f"apt-get download failed (has apt-get update been run here?): {advice}") from error


def find_packages(folder):
    """Path of each of the six packages in `folder`, as {package: path}."""
    if not folder.is_dir():
        raise PrepareError(f"--packages_dir {folder}: no such folder")
    found = {package: sorted(folder.glob(f"{package}_*.deb")) for package in PACKAGES}
    missing = [f"{package}_*.deb" for package in PACKAGES if not found[package]]
    if missing:
        raise PrepareError(f"{folder} lacks {', '.join(missing)}")
    for package, debs in found.items():
        if len(debs) > 1:
            raise PrepareError(f"{folder} holds {len(debs)} versions of {package}; leave one")
    return {package: debs[0] for package, debs in found.items()}


def read_packages(packages_dir):
    """All packages as {package: {"version", "sha256", "files"}}, downloaded first where `packages_dir` is None."""
    with tempfile.TemporaryDirectory() as folder:
        if packages_dir is None:
            download_packages(folder)
        packages = {}
        for package, deb in find_packages(Path(packages_dir or folder)).items():
            version, files = read_deb(deb)
            sha256 = hashlib.sha256(deb.read_bytes()).hexdigest()
            packages[package] = {"version": version, "sha256": sha256, "files": files}
    return packages


# ---- transcripts and recordings ----


def parse_transcripts(text):
    """Transcripts {name: text} from core-sounds-XX.txt, and the names with more than one.

    Lines are `name: text`, or comments from `;` on. The Spanish file says `digits/0` for 0 and for 10: which of the
    two a recording holds cannot be known from it, so a name with two different texts has none.
    """
    texts = defaultdict(set)
    for line in text.splitlines():
        name, colon, spoken = line.partition(":")
        if colon and not line.startswith(";"):
            texts[name.strip()].add(spoken.strip())
    ambiguous = {name for name, versions in texts.items() if len(versions) > 1}
    return {name: versions.pop() for name, versions in texts.items() if name not in ambiguous}, ambiguous


def is_non_speech(text):
    """Whether the whole transcript is a remark: `[sound of monkeys screaming]`, `(beep)`, `<beep ascending>`."""
    return re.fullmatch(r"\[.*\]|\(.*\)|<.*>", text) is not None


def spoken_text(text):
    """The transcript as written, or None where it is not what is spoken.

    Brackets hold remarks (`IAX (note: does not say "2")`, `at [@]`); `*` and `#` stand for "star" and "pound".
    """
    return text if re.search(r"\w", text) and not re.search(r"[\[\]()<>{}*#]", text) else None


DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def spell_digits(text):
    """English digits as the words that are spoken, `press 1` -> `press one`; None where it is uncertain (`H.323`)."""
    spelled = re.sub(r"(?<!\d)\d(?!\d)", lambda digit: f" {DIGITS[int(digit[0])]} ", text)
    return None if re.search(r"\d", spelled) else re.sub(r" +(?=[ .,;:!?]|$)|^ +", "", spelled)


def normalise_text(text):
    """Lower-case words without punctuation: two prompts with the same ones say the same."""
    return " ".join(re.findall(r"[^\W_]+(?:'[^\W_]+)*", text.casefold()))


def read_transcripts(packages):
    """Per language the output of `parse_transcripts`."""
    transcripts = {}
    for language in LANGUAGES:
        package = f"asterisk-core-sounds-{language}"
        path = f"usr/share/doc/{package}/core-sounds-{language}.txt.gz"
        try:
            text = gzip.decompress(packages[package]["files"][path]).decode("utf-8")
        except (KeyError, UnicodeDecodeError, *UNPACK_ERRORS) as error:
            raise PrepareError(f"{package}: no readable {path} in it ({error})") from error
        transcripts[language] = parse_transcripts(text)
    return transcripts


def find_recordings(packages):
    """All wav files as {(language, name): bytes}; `name` is the path below the voice's folder, without .wav."""
    recordings = {}
    for language in LANGUAGES:
        package = f"asterisk-core-sounds-{language}-wav"
        pattern = re.compile(rf"usr/share/asterisk/sounds/{language}_[^/]+/(.+)\.wav")
        for path, data in packages[package]["files"].items():
            match = pattern.fullmatch(path)
            if match and ".." not in match[1].split("/"):
                recordings[language, match[1]] = data
        if not any(key[0] == language for key in recordings):
            raise PrepareError(f"{package}: no recordings in it")
    return dict(sorted(recordings.items()))


def write_recordings(recordings, transcripts, folder):
    """Writes every recording below `folder`, unchanged, and returns them as `Prompt`s."""
    prompts = []
    # A bar in a `with` is closed before an error is printed, so the error has a line of its own.
    with tqdm(recordings.items(), desc="recordings", unit="file") as bar:
        for (language, name), data in bar:
            try:
                samples, rate = soundfile.read(io.BytesIO(data), always_2d=True)
            except soundfile.LibsndfileError as error:
                raise PrepareError(
                    f"asterisk-core-sounds-{language}-wav: {name}.wav is not audio ({error})"
                ) from error
            text = spoken_text(transcripts[language][0].get(name, ""))
            text = spell_digits(text) if text and language == "en" else text
            peak = float(abs(samples).max()) if len(samples) else 0.0
            prompt = Prompt(language, name, len(samples) / rate, peak, text)
            path = folder / prompt.path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            prompts.append(prompt)
    return prompts


def print_counts(prompts, transcripts):
    """One line per language: what there is, and what has no transcript, no recording or no use as a label."""
    for language in LANGUAGES:
        texts, ambiguous = transcripts[language]
        names = {prompt.name: prompt for prompt in prompts if prompt.language == language}
        remarks = sum(bool(texts.get(name)) and names[name].text is None for name in names)
        counts = {
            "silent": sum(prompt.peak < SILENCE_PEAK for prompt in names.values()),
            "with a usable transcript": sum(prompt.text is not None for prompt in names.values()),
            "with a remark or symbols instead": remarks,
            "without a transcript": sum(not texts.get(name) and name not in ambiguous for name in names),
            "with an ambiguous one": len(ambiguous & names.keys()),
        }
        minutes = sum(prompt.seconds for prompt in names.values()) / 60
        listed = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
        print(f"{language}: {len(names)} recordings, {minutes:.1f} min: {listed}")
        orphans = sorted(texts.keys() - names.keys())
        if orphans:
            print(f"    {len(orphans)} transcripts without a recording: {', '.join(orphans)}")


# ---- splits ----


def take_prefix(groups, minutes):
    """Longest prefix of `groups` (lists of prompts) that lasts at most `minutes`, removed from `groups`.

    A prefix, not the best fit: a smaller --train_minutes then draws a subset of a larger one's clips.
    """
    taken, seconds = [], 0.0
    while groups and seconds + sum(prompt.seconds for prompt in groups[0]) <= minutes * 60:
        taken += groups.pop(0)
        seconds = sum(prompt.seconds for prompt in taken)
    return taken


def split_ctc(prompts, train_minutes, seed):
    """English prompts with a transcript as {split: prompts}; prompts of the same words go to the same side.

    Test and validation are drawn first, so they are the same for every --train_minutes.
    """
    groups = defaultdict(list)
    for prompt in prompts:
        if prompt.language == "en" and prompt.text and prompt.seconds <= LABELED_LONGEST_SECONDS:
            groups[normalise_text(prompt.text)].append(prompt)
    order = [groups[key] for key in sorted(groups)]
    random.Random(f"ctc {seed}").shuffle(order)
    splits = {"test": take_prefix(order, CTC_TEST_MINUTES), "validation": take_prefix(order, CTC_VALIDATION_MINUTES)}
    left = sum(prompt.seconds for group in order for prompt in group) / 60
    if train_minutes > left:
        raise PrepareError(f"--train_minutes {train_minutes:g}: only {left:.1f} minutes of labeled English are left")
    splits["train"] = take_prefix(order, train_minutes)
    if not splits["train"]:
        raise PrepareError(f"--train_minutes {train_minutes:g}: too short for a single prompt")
    return splits


def split_language(prompts, seed):
    """Prompts of all languages as {split: prompts}, the same names in every language.

    Classes so differ in language alone, not in what is said. Tones and noises are language-free and are left out,
    and of prompts that say the same in some language only one is drawn, so no words are on two sides.
    """
    by_name = defaultdict(dict)
    for prompt in prompts:
        long_enough = LANGUAGE_SHORTEST_SECONDS <= prompt.seconds <= LABELED_LONGEST_SECONDS
        if long_enough and prompt.peak >= SILENCE_PEAK:
            by_name[prompt.name][prompt.language] = prompt
    names = sorted(name for name, versions in by_name.items() if len(versions) == len(LANGUAGES))
    random.Random(f"language {seed}").shuffle(names)
    chosen, seen = [], set()
    for name in names:
        said = {(p.language, normalise_text(p.text)) for p in by_name[name].values() if p.text}
        if not said & seen:
            chosen.append(name)
            seen |= said
    wanted = sum(LANGUAGE_CLIPS.values())
    if len(chosen) < wanted:
        raise PrepareError(f"the packages hold {len(chosen)} prompts for the language task, {wanted} are needed")
    splits = {}
    for split in ("test", "validation", "train"):
        names, chosen = chosen[: LANGUAGE_CLIPS[split]], chosen[LANGUAGE_CLIPS[split] :]
        splits[split] = [by_name[name][language] for name in names for language in LANGUAGES]
    return splits


def build_manifests(prompts, transcripts, train_minutes, seed):
    """Every manifest as {file name: prompts sorted by path}."""
    non_speech = {name for texts, _ in transcripts.values() for name, text in texts.items() if is_non_speech(text)}
    ctc = split_ctc(prompts, train_minutes, seed)
    language = split_language([prompt for prompt in prompts if prompt.name not in non_speech], seed)
    held_out = set(ctc["test"]) | set(language["test"])
    manifests = {"unlabeled.csv": [p for p in prompts if p not in held_out and p.peak >= SILENCE_PEAK]}
    manifests |= {f"ctc_{split}.csv": chosen for split, chosen in ctc.items()}
    manifests |= {f"language_{split}.csv": chosen for split, chosen in language.items()}
    return {name: sorted(manifests[name], key=lambda prompt: prompt.path) for name in MANIFESTS}


# ---- output ----


def write_manifest(path, prompts):
    """CSV with a header: path,text for the CTC task, else path,language."""
    column = "text" if path.name.startswith("ctc_") else "language"
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["path", column])
        writer.writerows([prompt.path, getattr(prompt, column)] for prompt in prompts)


def read_manifest(path):
    """Rows of a manifest as dictionaries."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def print_table(folder):
    """What each manifest holds, counted from the files as written, and what to run next."""
    print(f"\n{'manifest':<26}{'clips':>6}{'minutes':>9}  languages")
    for name in MANIFESTS:
        paths = [row["path"] for row in read_manifest(folder / name)]
        minutes = sum(soundfile.info(folder / path).duration for path in paths) / 60
        languages = Counter(path.split("/")[1] for path in paths)
        print(f"{name:<26}{len(paths):>6}{minutes:>9.1f}  " + ", ".join(f"{n} {k}" for k, n in languages.items()))
    print(f"\nIn {folder}. Licence of the recordings: CC-BY-SA-3.0, see README.txt and copyright there.\nNext:")
    print("\n".join(f"  {command}" for command in NEXT_COMMANDS))


def all_settings(train_minutes, seed):
    """Everything that decides what the output is, beside the packages."""
    return {
        "train_minutes": train_minutes,
        "seed": seed,
        "ctc_validation_minutes": CTC_VALIDATION_MINUTES,
        "ctc_test_minutes": CTC_TEST_MINUTES,
        "language_clips": LANGUAGE_CLIPS,
        "language_shortest_seconds": LANGUAGE_SHORTEST_SECONDS,
        "labeled_longest_seconds": LABELED_LONGEST_SECONDS,
    }


def is_complete(folder, settings):
    """Whether `folder` was built with these settings and nothing in it is missing."""
    try:
        if json.loads((folder / "settings.json").read_text())["settings"] != settings:
            return False
        rows = [row for name in MANIFESTS for row in read_manifest(folder / name)]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(rows) and all((folder / row["path"]).is_file() for row in rows)


def check_output(folder):
    """Refuses a folder with files of somebody else: it is replaced as a whole."""
    if folder.exists() and not folder.is_dir():
        raise PrepareError(f"--output_dir {folder}: is a file")
    foreign = sorted({path.name for path in folder.iterdir()} - WRITTEN) if folder.is_dir() else []
    if foreign:
        raise PrepareError(f"--output_dir {folder}: holds {foreign[0]}, which is not of this script; choose another")


def build(folder, settings, packages_dir):
    """Builds the whole data set in `folder`, which is new and empty."""
    packages = read_packages(packages_dir)
    for package in PACKAGES:
        print(f"{package} {packages[package]['version']}")
    print("Licence of the recordings: CC-BY-SA-3.0")
    transcripts = read_transcripts(packages)
    prompts = write_recordings(find_recordings(packages), transcripts, folder)
    print_counts(prompts, transcripts)
    manifests = build_manifests(prompts, transcripts, settings["train_minutes"], settings["seed"])
    for name, chosen in manifests.items():
        write_manifest(folder / name, chosen)
    silent = sum(prompt.peak < SILENCE_PEAK for prompt in prompts)
    print(f"Left out of unlabeled.csv: {silent} recordings of pure silence, and the recordings of both test sets")
    copyright_path = "usr/share/doc/asterisk-core-sounds-en-wav/copyright"
    try:
        (folder / "copyright").write_bytes(packages["asterisk-core-sounds-en-wav"]["files"][copyright_path])
    except KeyError as error:
        raise PrepareError("asterisk-core-sounds-en-wav: no copyright file in it; get it again") from error
    (folder / "README.txt").write_text(README, encoding="utf-8")
    origin = {package: {key: packages[package][key] for key in ("version", "sha256")} for package in PACKAGES}
    (folder / "settings.json").write_text(json.dumps({"settings": settings, "packages": origin}, indent=2) + "\n")


def prepare(output_dir, train_minutes, seed, packages_dir):
    """Builds the data set beside `output_dir` and renames it at the end: what is there is always whole."""
    settings = all_settings(train_minutes, seed)
    check_output(output_dir)
    if is_complete(output_dir, settings):
        print(f"{output_dir} is already there with these settings: nothing to do")
        return
    partial = output_dir.with_name(output_dir.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was stopped
    partial.mkdir(parents=True)
    try:
        build(partial, settings, packages_dir)
        if output_dir.exists():
            shutil.rmtree(output_dir)
        partial.rename(output_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to build; replaced if built before")
    parser.add_argument("--train_minutes", type=float, default=10.0, help="minutes of transcribed English to train on")
    parser.add_argument("--seed", type=int, default=0, help="draws the splits")
    parser.add_argument("--packages_dir", type=Path, help="folder with the six .deb files; default: apt-get download")
    return parser.parse_args(argv)


def main(argv=None):
    """Returns the exit code: 0, or 2 after one line that says what is wrong."""
    args = parse_args(argv)
    output_dir = args.output_dir.resolve()
    try:
        if not args.train_minutes > 0:
            raise PrepareError(f"--train_minutes {args.train_minutes:g}: must be more than 0")
        prepare(output_dir, args.train_minutes, args.seed, args.packages_dir)
        print_table(output_dir)
    except (PrepareError, OSError) as error:
        print(f"prepare.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
