"""recipes/voice_prompts/prepare.py on tiny packages made here: no network, no Debian."""

import gzip
import importlib.util
import io
import json
import lzma
import random
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import soundfile

SCRIPT = Path(__file__).parents[1] / "recipes" / "voice_prompts" / "prepare.py"


def load_script():
    spec = importlib.util.spec_from_file_location("voice_prompts_prepare", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


prepare = load_script()
VOICES = {"en": "en_US_f_Allison", "fr": "fr_CA_f_June", "es": "es_MX_f_Allison"}


# ---- tiny packages ----


def tar_bytes(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def ar_bytes(members):
    data = b"!<arch>\n"
    for name, body in members.items():
        data += (
            f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(body):<10}`\n".encode() + body + b"\n" * (len(body) % 2)
        )
    return data


def deb_bytes(files, version="1.0-1", compress=lzma.compress, suffix="xz"):
    control = tar_bytes({"./control": f"Package: x\nVersion: {version}\n".encode()})
    members = {"debian-binary": b"2.0\n", f"control.tar.{suffix}": compress(control)}
    return ar_bytes(members | {f"data.tar.{suffix}": compress(tar_bytes(files))})


def wav_bytes(seconds, amplitude=0.5, seed=0):
    rng = random.Random(seed)
    samples = [rng.uniform(-amplitude, amplitude) for _ in range(int(seconds * 8000))]
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, 8000, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


def write_packages(folder, prompts=24):
    """Six packages: `prompts` prompts of 1.0 to 1.4 s per language, a tone, a silence, the known oddities."""
    folder.mkdir()
    for language, voice in VOICES.items():
        names = [f"digits/n{i}" if i % 2 else f"n{i}" for i in range(prompts)]
        lines = [f"; {language}", ""] + [
            f"{name}: {language} words, {i // 10} {i % 10}!" for i, name in enumerate(names)
        ]
        lines += ["beep: [a tone]", "silence/1: (1 second of silence)", "gone: never recorded", "short: été"]
        recordings = {name: wav_bytes(1 + i % 5 / 10, seed=i) for i, name in enumerate(names)}
        recordings |= {"beep": wav_bytes(1.2), "silence/1": wav_bytes(1.0, 5e-5), "short": wav_bytes(0.3)}
        recordings |= {"untold": wav_bytes(0.4)}
        sounds = {f"./usr/share/asterisk/sounds/{voice}/{name}.wav": data for name, data in recordings.items()}
        package = f"asterisk-core-sounds-{language}"
        copyright_file = {f"./usr/share/doc/{package}-wav/copyright": b"CC-BY-SA-3.0\n"}
        text = {f"./usr/share/doc/{package}/core-sounds-{language}.txt.gz": gzip.compress("\n".join(lines).encode())}
        (folder / f"{package}_1.0-1_all.deb").write_bytes(deb_bytes(text))
        (folder / f"{package}-wav_1.0-1_all.deb").write_bytes(deb_bytes(sounds | copyright_file))
    return folder


@pytest.fixture(scope="module")
def packages_dir(tmp_path_factory):
    return write_packages(tmp_path_factory.mktemp("debs") / "packages")


@pytest.fixture
def small(monkeypatch):
    """Split sizes that the tiny packages can fill."""
    monkeypatch.setattr(prepare, "CTC_TEST_MINUTES", 0.1)
    monkeypatch.setattr(prepare, "CTC_VALIDATION_MINUTES", 0.06)
    monkeypatch.setattr(prepare, "LANGUAGE_CLIPS", {"train": 4, "validation": 2, "test": 6})


def run(output_dir, packages_dir, *options):
    packages = ["--packages_dir", str(packages_dir)] if packages_dir else []
    return prepare.main(["--output_dir", str(output_dir), "--train_minutes", "0.1", *packages, *options])


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def paths(folder, name):
    return {row["path"] for row in prepare.read_manifest(folder / name)}


# ---- packages ----


def test_read_ar_returns_members_of_odd_and_even_size():
    members = {"a": b"123", "b": b"", "c.tar.xz": b"1234"}
    assert prepare.read_ar(ar_bytes(members)) == members
    assert prepare.read_ar(ar_bytes({"a/": b"1"})) == {"a": b"1"}  # GNU ar ends names with a slash


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", ar_bytes({"a": b"1234"})[:-1], ar_bytes({"a": b""})[:-4]])
def test_read_ar_refuses_what_is_cut_short(data):
    with pytest.raises(ValueError):
        prepare.read_ar(data)


@pytest.mark.parametrize("compress, suffix", [(lzma.compress, "xz"), (gzip.compress, "gz")])
def test_read_deb(tmp_path, compress, suffix):
    deb = tmp_path / "x.deb"
    deb.write_bytes(deb_bytes({"./usr/a.txt": b"hello"}, "2.3-4", compress, suffix))
    assert prepare.read_deb(deb) == ("2.3-4", {"usr/a.txt": b"hello"})


@pytest.mark.skipif(not (shutil.which("dpkg-deb") and shutil.which("zstd")), reason="needs dpkg-deb and zstd")
def test_read_deb_compressed_with_zstd(tmp_path):
    def compress(data):
        return subprocess.run(["zstd", "-c"], input=data, check=True, capture_output=True).stdout

    deb = tmp_path / "x.deb"
    deb.write_bytes(deb_bytes({"./usr/a.txt": b"hello"}, "2.3-4", compress, "zst"))
    assert prepare.read_deb(deb) == ("2.3-4", {"usr/a.txt": b"hello"})


def test_read_deb_compressed_with_zstd_without_dpkg_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    deb = tmp_path / "x.deb"
    deb.write_bytes(deb_bytes({}, compress=bytes, suffix="zst"))
    with pytest.raises(prepare.PrepareError, match="x.deb.*zstd.*Debian's package"):
        prepare.read_deb(deb)


@pytest.mark.parametrize(
    "data",
    [
        deb_bytes({"a": b"x" * 5000})[:-40],
        ar_bytes({"control.tar.xz": b"not xz", "data.tar.xz": b"not xz"}),
        ar_bytes({"debian-binary": b"2.0\n"}),
        deb_bytes({}, version=""),
    ],
)
def test_read_deb_names_a_broken_package(tmp_path, data):
    deb = tmp_path / "broken.deb"
    deb.write_bytes(data)
    with pytest.raises(prepare.PrepareError, match="broken.deb: not a readable Debian package"):
        prepare.read_deb(deb)


def test_recordings_outside_the_voice_folder_are_ignored():
    sounds = "usr/share/asterisk/sounds"
    packages = {
        f"asterisk-core-sounds-{language}-wav": {
            "files": {
                f"{sounds}/{voice}/digits/1.wav": b"1",
                f"{sounds}/{voice}/../../../evil.wav": b"2",
                f"{sounds}/ru_RU/1.wav": b"3",
                f"usr/share/doc/{voice}/1.wav": b"4",
            }
        }
        for language, voice in VOICES.items()
    }
    assert prepare.find_recordings(packages) == {(language, "digits/1"): b"1" for language in sorted(VOICES)}


# ---- transcripts ----


def test_parse_transcripts():
    text = (
        "; title: not a transcript\n\nvm-leavemsg:  Press 5\npriv: who is: me \nempty:\n"
        "digits/0: cero\ndigits/0: diez\ntwice: same\ntwice: same\nno colon here\n"
    )
    texts, ambiguous = prepare.parse_transcripts(text)
    assert texts == {"vm-leavemsg": "Press 5", "priv": "who is: me", "empty": "", "twice": "same"}
    assert ambiguous == {"digits/0"}


@pytest.mark.parametrize(
    "text, spoken",
    [
        ("[sound of monkeys screaming]", None),
        ("<beep ascending>", None),
        ('IAX (note: does not say "2")', None),
        ("at [@]", None),
        ("press * to toggle pause", None),
        ("followed by #", None),
        ("...", None),
        ("", None),
        ("... for ...", "... for ..."),
        ("I'm sorry, that's 28.8!", "I'm sorry, that's 28.8!"),
    ],
)
def test_spoken_text_keeps_only_what_is_spoken(text, spoken):
    assert prepare.spoken_text(text) == spoken


def test_is_non_speech_means_the_whole_text_is_a_remark():
    remarks = ["[tones]", "(beep)", "<beep>"]
    speech = ["at [@]", "IAX (note)", "Sus saludos [temporales] estan", "beep"]
    assert [prepare.is_non_speech(text) for text in remarks + speech] == [True] * 3 + [False] * 4


@pytest.mark.parametrize(
    "one, other, same",
    [
        ("...to exit the menu.", "To exit  the menu", True),
        ("Call-Forward on Busy.", "call forward on busy", True),
        ("ÉCOUTE", "écoute", True),
        ("O'clock", "oclock", False),
        ("Press 1", "Press 2", False),
    ],
)
def test_normalise_text(one, other, same):
    assert (prepare.normalise_text(one) == prepare.normalise_text(other)) is same


# ---- splits ----


def toy_prompts(count=400):
    """Prompts whose texts repeat: every third English one says what another one says, in other letters."""
    rng = random.Random(1)
    prompts = []
    for i in range(count):
        for language in VOICES:
            word = f"{language} says {i - i % 3 if i % 3 == 1 else i}"
            text = None if i % 11 == 0 else word.upper() + "!" if i % 2 else word
            prompts.append(prepare.Prompt(language, f"p{i}", rng.uniform(0.3, 7), 0.5, text))
    return prompts


@pytest.mark.parametrize("seed", range(8))
def test_ctc_splits_share_no_prompt_and_no_words(seed):
    prompts = toy_prompts()
    splits = prepare.split_ctc(prompts, 5, seed)
    chosen = [prompt for split in splits.values() for prompt in split]
    assert len(set(chosen)) == len(chosen)
    assert all(prompt.language == "en" and prompt.text for prompt in chosen)
    sides = {}
    for split, members in splits.items():
        for prompt in members:
            assert sides.setdefault(prepare.normalise_text(prompt.text), split) == split
    assert len(sides) < len(chosen)  # words do repeat here: the check above has something to find
    for split, minutes in {"train": 5, "validation": 2, "test": 6}.items():
        seconds = sum(prompt.seconds for prompt in splits[split])
        assert minutes * 60 - 14 < seconds <= minutes * 60  # 14 s: two prompts of the same words


def test_fewer_train_minutes_draw_a_subset_and_leave_the_test_set_as_it_is():
    few, many = (prepare.split_ctc(toy_prompts(), minutes, 0) for minutes in (1, 6))
    assert set(few["train"]) < set(many["train"])
    assert few["test"] == many["test"] and few["validation"] == many["validation"]


def test_splits_depend_on_the_seed():
    ctc = [{p.name for p in prepare.split_ctc(toy_prompts(), 5, seed)["test"]} for seed in (0, 1)]
    language = [{p.name for p in prepare.split_language(toy_prompts(), seed)["test"]} for seed in (0, 1)]
    assert ctc[0] != ctc[1] and language[0] != language[1]


def test_prompts_longer_than_the_limit_are_no_labels():
    long = prepare.Prompt("en", "long", 31.0, 0.5, "a long story")
    others = toy_prompts()
    minutes = sum(p.seconds for p in others if p.language == "en" and p.text) / 60 - 8.2
    splits = prepare.split_ctc(others + [long], minutes, 0)
    assert long not in splits["train"] + splits["validation"] + splits["test"]


@pytest.mark.parametrize("seed", range(8))
def test_language_splits_share_no_name_and_no_words_and_are_balanced(seed):
    splits = prepare.split_language(toy_prompts(), seed)
    assert {split: len(members) for split, members in splits.items()} == {"train": 60, "validation": 30, "test": 180}
    names, words = {}, {}
    for split, members in splits.items():
        assert len({p.language for p in members}) == 3
        for language in VOICES:
            assert sum(p.language == language for p in members) * 3 == len(members)
        for prompt in members:
            assert 1 <= prompt.seconds <= 30
            assert names.setdefault(prompt.name, split) == split
            if prompt.text:
                assert words.setdefault(prepare.normalise_text(prompt.text), prompt.name) == prompt.name


def test_tones_and_noises_are_no_language():
    tones = {f"p{i}" for i in range(200)}
    transcripts = {"en": (dict.fromkeys(tones, "[a tone]"), set()), "fr": ({}, set()), "es": ({}, set())}
    manifests = prepare.build_manifests(toy_prompts(), transcripts, 5, 0)
    assert len(manifests["language_test.csv"]) == 180
    chosen = {prompt.name for split in prepare.LANGUAGE_CLIPS for prompt in manifests[f"language_{split}.csv"]}
    assert not chosen & tones
    assert tones & {prompt.name for prompt in manifests["unlabeled.csv"]}  # still audio to learn from


# ---- the whole script ----


def test_what_is_built(tmp_path, packages_dir, small, capsys):
    out = tmp_path / "data" / "prompts"
    assert run(out, packages_dir) == 0
    assert {path.name for path in out.iterdir()} == prepare.WRITTEN
    assert not list(out.parent.glob("*.partial"))

    held_out = paths(out, "ctc_test.csv") | paths(out, "language_test.csv")
    silent = {f"audio/{language}/silence/1.wav" for language in VOICES}
    audio = {str(path.relative_to(out)) for path in out.glob("audio/**/*.wav")}
    assert held_out and paths(out, "unlabeled.csv") == audio - held_out - silent
    assert {f"audio/{language}/untold.wav" for language in VOICES} <= paths(out, "unlabeled.csv")
    assert "audio/en/beep.wav" in paths(out, "unlabeled.csv")
    assert (out / "audio/fr/n2.wav").read_bytes() == wav_bytes(1.2, seed=2)
    rows = prepare.read_manifest(out / "ctc_train.csv")
    assert all(row["text"] == "été" or row["text"].startswith("en words, ") for row in rows)
    assert all(r["path"].split("/")[1] == r["language"] for r in prepare.read_manifest(out / "language_test.csv"))
    assert (out / "copyright").read_text() == "CC-BY-SA-3.0\n"
    assert json.loads((out / "settings.json").read_text())["packages"]["asterisk-core-sounds-fr"]["version"] == "1.0-1"

    printed = capsys.readouterr().out
    assert "asterisk-core-sounds-es-wav 1.0-1" in printed and "CC-BY-SA-3.0" in printed
    assert "en: 28 recordings, 0.5 min: 1 silent, 25 with a usable transcript, 2 with a remark" in printed
    assert "1 without a transcript\n    1 transcripts without a recording: gone" in printed
    assert "\nlanguage_test.csv             18" in printed
    assert "python run_pretrain.py recipes/voice_prompts/pretrain.yaml" in printed


def test_same_seed_same_files_other_seed_others(tmp_path, packages_dir, small):
    for folder, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        assert run(tmp_path / folder, packages_dir, "--seed", seed) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert paths(tmp_path / "a", "ctc_test.csv") != paths(tmp_path / "c", "ctc_test.csv")


def test_second_run_does_nothing_and_needs_no_packages(tmp_path, packages_dir, small, capsys):
    out = tmp_path / "prompts"
    assert run(out, packages_dir) == 0
    built = (out / "settings.json").stat().st_mtime_ns
    capsys.readouterr()
    assert run(out, tmp_path / "no_such_folder") == 0
    assert "nothing to do" in capsys.readouterr().out
    assert (out / "settings.json").stat().st_mtime_ns == built


@pytest.mark.parametrize("lost", ["audio/en/n2.wav", "settings.json", "ctc_test.csv"])
def test_an_incomplete_folder_is_built_again(tmp_path, packages_dir, small, lost):
    out = tmp_path / "prompts"
    assert run(out, packages_dir) == 0
    whole = contents(out)
    (out / lost).unlink()
    (tmp_path / "prompts.partial" / "audio").mkdir(parents=True)  # of a run that was killed
    assert run(out, packages_dir) == 0
    assert contents(out) == whole and not (tmp_path / "prompts.partial").exists()


def test_other_settings_replace_the_data(tmp_path, packages_dir, small):
    out = tmp_path / "prompts"
    assert run(out, packages_dir) == 0
    before = paths(out, "ctc_train.csv")
    assert run(out, packages_dir, "--train_minutes", "0.2") == 0
    assert before < paths(out, "ctc_train.csv")


def test_apt_get_downloads_into_a_temporary_folder(tmp_path, packages_dir, small, monkeypatch):
    fake = tmp_path / "bin" / "apt-get"
    fake.parent.mkdir()
    # Copies exactly the packages it is asked for into the working directory, like the real one.
    fake.write_text(
        f'#!/bin/sh\n[ "$1" = download ] && shift && for p; do cp {packages_dir}/"$p"_* . || exit 1; done\n'
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(fake.parent), prepend=":")
    assert run(tmp_path / "fetched", None) == 0
    assert run(tmp_path / "given", packages_dir) == 0
    assert contents(tmp_path / "fetched") == contents(tmp_path / "given")


def error_line(capsys):
    err = [line for line in capsys.readouterr().err.splitlines() if line and not line.startswith("recordings:")]
    assert len(err) == 1 and err[0].startswith("prepare.py: "), err
    return err[0]


@pytest.mark.parametrize("apt_get", [None, "#!/bin/sh\nexit 100\n"])
def test_without_a_download_one_line_says_what_to_put_where(tmp_path, small, monkeypatch, capsys, apt_get):
    if apt_get:
        (tmp_path / "apt-get").write_text(apt_get)
        (tmp_path / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run(tmp_path / "out", None) == 2
    line = error_line(capsys)
    assert "--packages_dir" in line and all(package in line for package in prepare.PACKAGES)
    assert ("failed" in line) is bool(apt_get)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_bad_packages_are_named_and_leave_earlier_data_alone(tmp_path, packages_dir, small, capsys):
    out = tmp_path / "out"
    assert run(out, packages_dir) == 0
    before = contents(out)
    copied = Path(shutil.copytree(packages_dir, tmp_path / "packages"))
    deb = copied / "asterisk-core-sounds-fr-wav_1.0-1_all.deb"

    def failing(expected):
        capsys.readouterr()
        assert run(out, copied, "--seed", "1") == 2
        assert expected in error_line(capsys)
        assert contents(out) == before and not (tmp_path / "out.partial").exists()

    text_deb = copied / "asterisk-core-sounds-es_1.0-1_all.deb"
    whole = text_deb.read_bytes()
    text_path = "./usr/share/doc/asterisk-core-sounds-es/core-sounds-es.txt.gz"
    for text in (b"not gzip", gzip.compress(b"a: \xff"), gzip.compress(b"a: b")[:-9]):
        text_deb.write_bytes(deb_bytes({text_path: text}))
        failing("asterisk-core-sounds-es: no readable usr/share/doc")
    text_deb.write_bytes(whole)
    whole = deb.read_bytes()
    deb.write_bytes(whole[: len(whole) // 2])
    failing("fr-wav_1.0-1_all.deb: not a readable Debian package (cut short)")
    deb.write_bytes(deb_bytes({"./usr/share/asterisk/sounds/fr_CA/a.wav": b"RIFF, but no audio"}))
    failing("asterisk-core-sounds-fr-wav: a.wav is not audio")
    deb.write_bytes(deb_bytes({}))
    failing("asterisk-core-sounds-fr-wav: no recordings in it")
    deb.unlink()
    failing("lacks asterisk-core-sounds-fr-wav_*.deb")
    deb.write_bytes(whole)
    shutil.copy(deb, copied / "asterisk-core-sounds-fr-wav_1.1-1_all.deb")
    failing("2 versions of asterisk-core-sounds-fr-wav")
    shutil.rmtree(copied)
    failing("packages: no such folder")


@pytest.mark.parametrize(
    "minutes, expected",
    [
        ("0", "more than 0"),
        ("nan", "more than 0"),
        ("0.01", "too short"),
        ("5", "only 0.3 minutes of labeled English"),
    ],
)
def test_train_minutes_that_cannot_be(tmp_path, packages_dir, small, capsys, minutes, expected):
    assert run(tmp_path / "out", packages_dir, "--train_minutes", minutes) == 2
    line = error_line(capsys)
    assert f"--train_minutes {minutes}: " in line and expected in line
    assert not (tmp_path / "out").exists()


def test_output_that_cannot_be_is_refused_and_kept(tmp_path, packages_dir, small, capsys):
    file, foreign = tmp_path / "file", tmp_path / "foreign"
    file.write_text("mine")
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("mine")
    for out, expected in ((file, "is a file"), (file / "below", "file"), (foreign, "holds thesis.tex")):
        assert run(out, packages_dir) == 2
        assert expected in error_line(capsys)
    assert file.read_text() == (foreign / "thesis.tex").read_text() == "mine"


@pytest.mark.parametrize(
    ("text", "spelled"),
    [
        ("press 1.", "press one."),
        ("3D", "three D"),
        ("for 2, press 8", "for two, press eight"),
        ("no digit: the same", "no digit: the same"),
        ("H.323", None),
        ("10", None),
    ],
)
def test_spell_digits(text, spelled):
    assert prepare.spell_digits(text) == spelled
