"""A checkpoint is whole or has no name; whatever is cut, changed or missing in it is noticed."""

import json

import pytest

from acoustic.training import checkpoint as files


def write(output_dir, update: int):
    checkpoint = files.folder_of(str(output_dir), update)
    staging = files.staging_of(checkpoint)
    (staging / "shards").mkdir(parents=True)
    (staging / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    (staging / "shards" / "0.bin").write_bytes(b"abc")
    files.publish(checkpoint)
    return checkpoint


def test_published_it_is_whole_and_nothing_else_is_left(tmp_path):
    checkpoint = write(tmp_path, 7)
    assert files.what_is_wrong(checkpoint) is None
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-7"]
    named = json.loads((checkpoint / files.MANIFEST).read_text())["files"]
    assert {name: size for name, (size, _) in named.items()} == {"model.safetensors": 10240, "shards/0.bin": 3}


def cut(path):
    path.write_bytes(path.read_bytes()[:100])


def flip(path):
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "name", "said"),
    [
        (cut, "model.safetensors", "model.safetensors has 100 of 10,240 bytes"),
        (flip, "model.safetensors", "model.safetensors is not what was written"),
        (lambda path: path.unlink(), "shards/0.bin", "shards/0.bin: No such file"),
        (lambda path: path.unlink(), files.MANIFEST, "no complete.json"),
        (cut, files.MANIFEST, "no complete.json"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, harm, name, said):
    write(tmp_path, 3)
    newer = write(tmp_path, 12)
    harm(newer / name)
    assert files.what_is_wrong(newer).startswith(said)
    newest, wrong = files.newest_whole(str(tmp_path))
    assert newest.name == "checkpoint-3"
    assert list(wrong) == [newer]


def test_what_was_being_written_has_no_name(tmp_path):
    checkpoint = files.folder_of(str(tmp_path), 5)
    files.staging_of(checkpoint).mkdir()
    (files.staging_of(checkpoint) / "model.safetensors").write_bytes(b"half")
    assert files.checkpoints(str(tmp_path)) == []
    files.remove_leftovers(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_nothing_has_the_name_where_publishing_fails(tmp_path, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "flush", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, 5)
    assert files.checkpoints(str(tmp_path)) == []


def test_a_deletion_that_is_cut_short_leaves_no_checkpoint(tmp_path, monkeypatch):
    checkpoint = write(tmp_path, 5)
    monkeypatch.setattr(files.shutil, "rmtree", lambda path, **options: None)  # killed before anything was deleted
    files.remove(checkpoint)
    assert files.checkpoints(str(tmp_path)) == []


@pytest.mark.parametrize(
    ("limit", "best", "kept"),
    [
        (2, None, [20, 100]),
        (1, None, [100]),
        (None, None, [1, 3, 20, 100]),
        (0, None, [1, 3, 20, 100]),
        (2, 3, [3, 100]),
        (3, 3, [3, 20, 100]),
        (1, 3, [3, 100]),
        (2, 100, [20, 100]),
        (1, 100, [100]),
    ],
)
def test_the_newest_and_the_best_are_kept(tmp_path, limit, best, kept):
    """By number: a copy to another disk may change the times."""
    for update in (100, 20, 3, 1):
        write(tmp_path, update)
    files.keep_newest(str(tmp_path), limit, str(files.folder_of(str(tmp_path), best)) if best else None)
    assert [files.update_of(path) for path in files.checkpoints(str(tmp_path))] == kept
