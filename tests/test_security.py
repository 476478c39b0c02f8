"""Nothing that comes from elsewhere runs, reads what it shouldn't, or writes where it shouldn't."""

import ast
import io
import json
import pickle
import shutil
import tarfile
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pytest
import soundfile
import torch
import transformers

from acoustic.console import UserError
from acoustic.data.columns import OF_THIS_MACHINE
from acoustic.data.decode import read_window
from acoustic.data.headers import Skip, read_header
from acoustic.data.remote import names_this_machine
from acoustic.data.sources import open_rows
from acoustic.models.build import load_config, load_feature_extractor, load_weights
from acoustic.predict.output import LabelFiles

ROOT = Path(__file__).parents[1]
RATE = 16_000
SOURCES = [*ROOT.glob("*.py"), *(ROOT / "acoustic").rglob("*.py"), *(ROOT / "recipes").rglob("*.py")]
OUTSIDE = ["../outside.wav", "../../outside.wav", "/tmp/outside.wav", "a/../../outside.wav"]


# ---- what the sources say


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_is_unpickled_and_no_code_is_fetched(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            is_error = names == {"pickle", "UnpicklingError"}
            assert is_error or not {"pickle", "cloudpickle", "dill", "joblib", "shelve"} & names
        if isinstance(node, ast.Call):
            words = {word.arg: getattr(word.value, "value", None) for word in node.keywords}
            assert not words.get("trust_remote_code") and not words.get("allow_pickle")
            if ast.unparse(node.func) == "torch.load":
                assert words.get("weights_only") is True
            assert ast.unparse(node.func) not in ("eval", "exec", "os.system", "yaml.load") or "Loader" in ast.unparse(
                node
            )


# ---- models


class Bomb:
    """What unpickling it would leave."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickled_checkpoint_does_nothing(layer_norm_checkpoint, tmp_path):
    model = shutil.copytree(layer_norm_checkpoint, tmp_path / "model")
    (model / "model.safetensors").unlink()
    torch.save({"weight": Bomb(tmp_path / "bang")}, model / "pytorch_model.bin")
    with pytest.raises(UserError, match="holds more than numbers in its pytorch_model.bin, which could be code"):
        load_weights(transformers.AutoModel, str(model), None, load_config(str(model)))
    assert not (tmp_path / "bang").exists()
    pickle.loads(pickle.dumps(Bomb(tmp_path / "bang")))
    assert (tmp_path / "bang").exists()  # the test would have noticed


@pytest.mark.parametrize("load", [load_config, load_feature_extractor])
def test_code_beside_a_model_is_not_run(load, tmp_path):
    """Nor is anyone asked whether it should be."""
    code = (
        f"from pathlib import Path\nPath({str(tmp_path / 'bang')!r}).touch()\nclass Config: pass\nclass Ears: pass\n"
    )
    (tmp_path / "code.py").write_text(code)
    own = {"AutoConfig": "code.Config", "AutoFeatureExtractor": "code.Ears"}
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_text(json.dumps({"model_type": "unheard_of", "auto_map": own}))
    with pytest.raises(UserError):
        load(str(tmp_path))
    assert not (tmp_path / "bang").exists()


# ---- names of files


def wav(seconds: float = 0.5) -> bytes:
    content = io.BytesIO()
    noise = 0.1 * np.random.default_rng(0).standard_normal(int(seconds * RATE))
    soundfile.write(content, noise, RATE, format="WAV")
    return content.getvalue()


def everything(folder: Path) -> set[Path]:
    return {path for path in folder.parent.rglob("*") if "outside" in path.name}


@pytest.mark.parametrize("name", OUTSIDE)
def test_members_of_a_tar_are_heard_in_their_place(name, tmp_path):
    folder = tmp_path / "in" / "side"
    folder.mkdir(parents=True)
    with tarfile.open(folder / "a.tar", "w") as tar:
        member = tarfile.TarInfo(name)
        member.size = len(wav())
        tar.addfile(member, io.BytesIO(wav()))
        link = tarfile.TarInfo("link.wav")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
    rows = [row for _, row in open_rows(str(folder)).iterate(0, 1, None, 0)]
    assert [row["name"] for row in rows] == [name]
    assert len(read_window(rows[0]["audio"], 0, 4000, RATE)) == 4000
    assert not everything(folder)
    labels = LabelFiles(str(folder / "labels"), overwrite=False)
    labels.write(name, [])
    labels.write(name, [])
    assert len(list((folder / "labels").iterdir())) == 2
    assert all(path.parent == folder / "labels" for path in everything(folder))


def test_which_names_are_this_machine_s():
    assert names_this_machine("/etc/hostname") and names_this_machine("recordings/a.wav")
    assert names_this_machine("file:///etc/hostname") and names_this_machine("simplecache::FILE:///etc/hostname")
    assert not names_this_machine("https://example.org/file.wav") and not names_this_machine("hf://datasets/a/b/c.wav")
    assert not names_this_machine(str(Path(datasets.config.HF_DATASETS_CACHE, "downloads", "abc")))
    assert names_this_machine(str(Path(datasets.config.HF_DATASETS_CACHE, "..", "..", "..", "secret.wav")))


def test_a_manifest_from_elsewhere_reads_nothing_here(tmp_path):
    """The same lines in a file of one's own do."""
    (tmp_path / "mine.wav").write_bytes(wav())
    lines = "file_name\n" + "\n".join([str(tmp_path / "mine.wav"), f"file://{tmp_path}/mine.wav"]) + "\n"
    (tmp_path / "list.csv").write_text(lines)
    ours = open_rows(str(tmp_path / "list.csv"))
    assert read_header(ours[0]["audio"]).seconds == 0.5
    fsspec.filesystem("memory").pipe("/elsewhere/list.csv", lines.encode())
    theirs = open_rows("memory://elsewhere/list.csv")
    audio = [theirs[index]["audio"] for index in range(len(theirs))]
    # A path without a scheme is taken to be beside the list, so it is theirs too.
    assert audio[0]["path"].startswith("memory://") and audio[1] == OF_THIS_MACHINE
    with pytest.raises(Skip, match="names a file of this machine"):
        read_header(audio[1])


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_from_elsewhere_reads_nothing_here(streaming, tmp_path):
    """Of a table with embedded audio, a row that names a file instead."""
    (tmp_path / "mine.wav").write_bytes(wav())
    audio = [{"path": str(tmp_path / "mine.wav"), "bytes": None}, {"path": "theirs.wav", "bytes": wav()}]
    table = datasets.Dataset.from_dict({"audio": audio}).cast_column("audio", datasets.Audio(decode=False))
    table.to_parquet(tmp_path / "a.parquet")
    ours = [row["audio"] for _, row in open_rows(str(tmp_path / "a.parquet")).iterate(0, 1, None, 0)]
    assert read_header(ours[0]).seconds == read_header(ours[1]).seconds == 0.5
    fsspec.filesystem("memory").pipe("/elsewhere/a.parquet", (tmp_path / "a.parquet").read_bytes())
    rows = open_rows("memory://elsewhere/a.parquet", streaming=streaming)
    theirs = [row["audio"] for _, row in rows.iterate(0, 1, None, 0)]
    assert theirs[0] == OF_THIS_MACHINE and read_header(theirs[1]).seconds == 0.5
