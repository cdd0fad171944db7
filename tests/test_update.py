"""Several optimizer steps on one rollout."""

from __future__ import annotations

import torch

from diffalign.update import partition


def test_partition_takes_every_image_once_whatever_the_processes() -> None:
    whole = list(partition(10, 0, 10, 3, seed=1, epoch=2))
    assert sorted(torch.cat([rows for rows, _ in whole]).tolist()) == list(range(10))
    assert [count for _, count in whole] == [len(rows) for rows, _ in whole] == [4, 3, 3]
    shares = [list(partition(length, first, 10, 3, seed=1, epoch=2)) for first, length in ((0, 7), (7, 3), (10, 0))]
    for k, (rows, count) in enumerate(whole):
        together = [
            first + row for first, share in zip((0, 7, 10), shares, strict=True) for row in share[k][0].tolist()
        ]
        assert sorted(together) == sorted(rows.tolist()) and all(share[k][1] == count for share in shares)
    assert not torch.equal(whole[0][0], next(partition(10, 0, 10, 3, seed=1, epoch=3))[0]), "epochs differ"


def test_one_update_keeps_the_order() -> None:
    ((rows, count),) = partition(5, 5, 10, 1, seed=0, epoch=0)
    assert rows.tolist() == [0, 1, 2, 3, 4] and count == 10
