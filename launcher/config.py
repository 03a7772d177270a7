"""Where a run happens: kept apart from what is trained, so that a run moves between machines unchanged."""

from __future__ import annotations

from configs.schema import Config, key


class LaunchConfig(Config):
    """How many processes, and what is done when one of them dies."""

    ranks: int = key(1, "record", "processes that train, one a device", gt=0)
    max_restarts: int | None = key(None, "free", "restarts of a run; empty: as long as it makes progress", ge=0)
    hang_s: float = key(10.0, "free", "longest step, unless five usual steps take longer; then it hangs", gt=0)
    start_s: float = key(600.0, "free", "longest time until the first step, and of a save or an evaluation", gt=0)
    grace_s: float = key(25.0, "free", "time to save in after SIGTERM before what is left is killed", gt=0)
