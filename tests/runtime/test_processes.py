"""Work shared out over processes."""

from __future__ import annotations

import pytest

from hf_locstitch.runtime.processes import divide, own_share


def test_divide() -> None:
    assert divide([1, 1, 1, 1], 2) == [0, 0, 1, 1]
    assert divide([5, 0, 0], 3) == [1, 2, 2] or divide([5, 0, 0], 3)[0] in (0, 1)
    assert divide([], 2) == [] and divide([0, 0], 2) in ([0, 0], [0, 1])
    owners = divide([3] * 90, 4)
    assert owners == sorted(owners) and {owners.count(rank) for rank in range(4)} <= {22, 23}


def test_what_a_machine_has_is_shared_by_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = []
    for count in (None, "3", "32"):
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
        if count is not None:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", count)
        shares.append(own_share(16))
    assert shares == [16, 5, 1]
