"""Every kind of rows: shards are disjoint and complete, and a position continues at its very row."""

import itertools
import json
import pickle

import datasets
import pandas as pd
import pytest

from acoustic.data.columns import Options
from acoustic.data.rows import IndexedRows, PackedList, ShardedRows, StreamedRows
from acoustic.data.sources import from_dataset, from_files

NAMES = [f"{number:02d}.wav" for number in range(23)]


def indexed() -> IndexedRows:
    return from_files([f"clips/{name}" for name in NAMES], "clips", "a list")


def of_a_table() -> IndexedRows:
    return from_dataset(datasets.Dataset.from_dict({"path": NAMES}), "a table", options())


class Numbers:
    """Rows `start`, ... of one of seven files of unequal sizes; some positions are no row's."""

    ends = [0, 1, 5, 5, 9, 16, 17, 23]

    def __call__(self, file: str, start: int | None):
        first, last = self.ends[int(file)], self.ends[int(file) + 1]
        for number in range(first, last):
            if start is None or 10 * number >= start:
                yield (
                    10 * number,
                    {"audio": {"path": NAMES[number], "bytes": None}, "name": NAMES[number], "text": "t"},
                )

    def column(self, file: str, name: str):
        return (row[name] for _, row in self(file, None))


def sharded() -> ShardedRows:
    return ShardedRows([str(number) for number in range(7)], Numbers(), "seven shards")


def options() -> Options:
    return Options(None, "path", {"text": None, "label": None}, True, False)


def streamed(folder) -> StreamedRows:
    for number, (start, stop) in enumerate(itertools.pairwise([0, 5, 6, 14, 23])):
        pd.DataFrame({"path": NAMES[start:stop]}).to_parquet(folder / f"{number}.parquet", row_group_size=3)
    files = sorted(map(str, folder.glob("*.parquet")))
    dataset = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True, cache_dir=str(folder))
    return from_dataset(dataset, "a stream", options())


KINDS = {"indexed": indexed, "table": of_a_table, "sharded": sharded, "streamed": streamed}


@pytest.fixture(params=KINDS)
def rows(request, tmp_path):
    make = KINDS[request.param]
    return make(tmp_path) if make is streamed else make()


def names(found) -> list[str]:
    return [row["name"] for _, row in found]


@pytest.mark.parametrize("num_shards", [1, 2, 3])
@pytest.mark.parametrize("seed", [None, 7])
def test_shards_are_disjoint_and_complete(rows, num_shards, seed):
    orders = []
    for epoch in (0, 1):
        shards = [names(rows.iterate(shard, num_shards, seed, epoch)) for shard in range(num_shards)]
        assert sorted(itertools.chain(*shards)) == NAMES
        assert shards == [names(rows.iterate(shard, num_shards, seed, epoch)) for shard in range(num_shards)]
        orders.append(shards)
    assert (orders[0] == orders[1]) == (seed is None)


def test_without_a_seed_the_order_is_their_own(rows):
    assert names(rows.iterate(0, 1, None, 3)) == NAMES


@pytest.mark.parametrize(("num_shards", "seed"), [(1, None), (1, 7), (2, 7), (3, None), (3, 8)])
@pytest.mark.parametrize("part", [False, True])
def test_a_position_continues_at_its_row(rows, num_shards, seed, part):
    """From every position of every shard, in the first epoch and a later one; and of a part of the rows."""
    if part:
        rows = rows.select(lambda row: int(row["name"][:2]) % 3 != 1)
    for shard, epoch in itertools.product(range(num_shards), (0, 2)):
        found = list(rows.iterate(shard, num_shards, seed, epoch))
        # What was yielded must stay what it was, whatever the rows did afterwards.
        positions = pickle.loads(pickle.dumps([position for position, _ in found]))
        step = 3 if isinstance(rows, StreamedRows) else 1  # entering a `datasets` stream takes 10 ms
        for index in range(shard % step, len(found), step):
            again = list(rows.iterate(shard, num_shards, seed, epoch, start=positions[index]))
            assert names(again) == names(found[index:])
            middle = len(again) // 2  # and once more, from a position that came after a start
            once_more = rows.iterate(shard, num_shards, seed, epoch, start=again[middle][0])
            assert names(once_more) == names(found[index + middle :])
            assert again[0][0] == positions[index]
            assert isinstance(rows, StreamedRows) or [position for position, _ in again] == positions[index:]


def test_a_part_is_divided_like_the_whole(rows):
    part = rows.select(lambda row: row["name"] < "12").select(lambda row: row["name"] >= "03")
    for num_shards in (1, 2):
        shards = [names(part.iterate(shard, num_shards, 7, 1)) for shard in range(num_shards)]
        assert sorted(itertools.chain(*shards)) == NAMES[3:12]
    assert sorted(names(rows.iterate(0, 1, None, 0))) == NAMES  # as it was


def test_positions_are_small_json_values(rows):
    for position, _ in rows.iterate(0, 2, 7, 0):
        text = json.dumps(position)
        assert len(text) < 1_000 and json.loads(text) == position


def test_the_fingerprint_changes_with_the_rows():
    assert indexed().fingerprint() != indexed().take(range(22)).fingerprint()
    assert indexed().fingerprint() == indexed().fingerprint()
    more = ShardedRows([*sharded().files, "6"], Numbers(), "seven shards")
    assert more.fingerprint() != sharded().fingerprint()


def test_columns_are_of_the_kept_rows_only():
    assert list(sharded().columns("text")) == ["t"] * 23
    assert list(sharded().select(lambda row: row["name"] < "05").columns("name")) == NAMES[:5]
    assert list(indexed().take([3, 1]).columns("name")) == [NAMES[3], NAMES[1]]


# ---- the packed list


VALUES = ["b", None, {"path": "x", "text": None}, "\udcff.wav", "ünï", 3, 1.5, [1, "two"], "", "a" * 1_000]


def test_a_packed_list_is_the_list():
    packed = PackedList(iter(VALUES))
    assert list(packed) == VALUES and len(packed) == len(VALUES)
    assert [packed[index] for index in (4, 0, 9)] == ["ünï", "b", "a" * 1_000]
    assert "\udcff.wav" in packed and packed.index(3) == 5
    assert list(PackedList([])) == []


@pytest.mark.parametrize("index", [-1, len(VALUES), 10**9])
def test_what_is_not_in_a_packed_list(index):
    with pytest.raises(IndexError):
        PackedList(VALUES)[index]


def test_a_packed_list_is_one_piece():
    """A hundred thousand objects would be copied into every forked worker, one by one."""
    names = [f"folder {number % 100}/recording number {number}.wav" for number in range(20_000)]
    packed = PackedList(names)
    content = pickle.dumps(packed)
    assert len(content) < sum(map(len, names)) + 12 * len(names)
    again = pickle.loads(content)
    assert (again[0], again[19_999], len(again)) == (names[0], names[-1], 20_000)
