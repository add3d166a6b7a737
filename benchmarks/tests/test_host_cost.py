"""What an update makes the host dispatch: counted, so that it cannot creep up unseen."""

from __future__ import annotations

from pathlib import Path

from benchmarks import host_cost


def test_an_update_dispatches_little_more_than_the_bare_calls(tmp_path: Path) -> None:
    rows = host_cost.measure(tmp_path, ["full", "full, checkpointing", "recipe"], rounds=0)
    times = {(r["layout"], r["part"]): r["times_operators"] for r in rows if "times_operators" in r}
    assert (
        max(times[layout, part] for layout in ("full", "full, checkpointing") for part in ("TA", "generator")) <= 1.05
    )
    assert (
        max(times["recipe", part] for part in ("TA", "generator")) <= 1.2
    )  # two small products a layer more, one large one less
