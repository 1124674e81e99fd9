"""Shares of work without a process group; with one: tests/evaluation/test_statistics.py."""

import pytest
import torch

from ldm_scale.core.shares import add_up, ranges, shared


@pytest.mark.parametrize("count, size", [(0, 3), (1, 3), (6, 3), (7, 3)])
def test_ranges_cover_everything_once(count: int, size: int):
    found = ranges(count, size)
    assert [i for part in found for i in part] == list(range(count))
    assert all(len(part) == size for part in found[:-1])


@pytest.mark.parametrize("parts", [0, 1, 5, 6, 7])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_every_part_counts_once_and_all_ranks_get_as_many(monkeypatch: pytest.MonkeyPatch, parts: int, world: int):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    found = []
    for rank in range(world):
        monkeypatch.setenv("RANK", str(rank))
        found.append(list(shared(range(parts))))
    assert len({len(rank) for rank in found}) == 1
    assert sorted(part for rank in found for part, counts in rank if counts) == list(range(parts))


def test_a_sum_over_one_rank_is_the_tensor():
    tensor = torch.tensor([1.0, 2.0])
    add_up(tensor)
    assert tensor.tolist() == [1.0, 2.0]
