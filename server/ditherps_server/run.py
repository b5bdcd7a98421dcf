"""One server process from start to end: the loop, the view, the plots."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from ditherps.config import JobConfig, ServerConfig
from ditherps.errors import Reason, RunFailedError
from ditherps.logs import logs_json
from ditherps.memory import keep_freed_memory, keep_what_is_here
from ditherps.summary import print_summary
from ditherps.tasks import Task
from ditherps.view import SilentView, view
from ditherps_server.app import serve


def run_server(job: JobConfig, config: ServerConfig, task: Task) -> dict[str, Any]:
    """Serve a job to its end and return its result; see `app.serve` for what it raises."""
    import uvloop

    keep_freed_memory()
    shown = SilentView() if logs_json() else view(job)
    try:
        with shown:
            result = uvloop.run(serve(job, config, task, shown.show, keep_what_is_here))
    except RunFailedError:
        _plot(config.run_dir)
        raise
    if result.reason != Reason.SUSPENDED:  # it goes on, and whoever suspended it does not wait for plots
        _plot(config.run_dir)
    print_summary(asdict(result))
    return asdict(result)


def _plot(run_dir: Path) -> None:
    # Matplotlib takes a second to load: only now, when nobody waits for a round.
    from ditherps.plots import plot_run

    plot_run(run_dir)
