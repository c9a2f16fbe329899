"""Ranks that are not the world's: groups and meshes; and ranks whose workers run out of memory."""

import json

import pytest

from tests.faults.nursery import members, wait_until


def test_groups_and_meshes_share_the_data_out(nursery, pictures, tmp_path):
    job = nursery.start(
        "launch",
        tmp_path / "log",
        work="in_groups",
        world=4,
        meet=str(tmp_path / "meet"),
        shards=str(pictures),
        out=str(tmp_path / "out"),
    )
    assert nursery.wait(job) == 0, (tmp_path / "log").read_text()[-3000:]
    found = [json.loads((tmp_path / f"out.{rank}").read_text()) for rank in range(4)]
    every = [f"{number:09}" for number in range(103)]

    def together(name, ranks):
        return sorted(key for rank in ranks for batch in found[rank][name][2] for key in batch if key)

    # two groups of two: each shares the whole data set
    assert [rank["group"][:2] for rank in found] == [[0, 2], [1, 2], [0, 2], [1, 2]]
    assert together("group", (0, 1)) == together("group", (2, 3)) == every
    # of ranks 0 to 3 as [[0, 1], [2, 3]], those of one row differ only in tp
    assert [rank["mesh"][:2] for rank in found] == [[0, 2], [0, 2], [1, 2], [1, 2]]
    assert found[0]["mesh"] == found[1]["mesh"]
    assert found[2]["mesh"] == found[3]["mesh"]
    assert together("mesh", (0, 2)) == every
    assert len({json.dumps(rank[name][3]) for rank in found for name in ("group", "mesh")}) == 1
    for rank in found:
        assert "mesh of 2 dimensions ('dp', 'tp'); give the one that shares the data" in rank["whole"]
        assert "this process is not in it" in rank["other"]


@pytest.mark.parametrize(
    ("kind", "said"), [("killed", "killed by signal: Killed"), ("limited", "MemoryError")]
)
def test_a_worker_without_memory_ends_its_job(nursery, pictures, tmp_path, kind, said):
    job = nursery.start(
        "launch", tmp_path / "log", work="out_of_memory", world=2, shards=str(pictures), kind=kind
    )
    assert nursery.wait(job) == 1
    assert said in (tmp_path / "log").read_text()
    wait_until(lambda: not members(job))
