"""What a person sees of a run: one live view on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any, Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ditherps.config import JobConfig
from ditherps.downlink import LAG_LIMIT

PLAIN_LINES = 20
"""About how many lines a whole run prints where there is no terminal."""


class View(Protocol):
    """Shows a run; `with` begins and ends it."""

    def __enter__(self) -> View: ...
    def __exit__(self, *exc: object) -> None: ...

    def note(self, message: str) -> None:
        """One line that stays."""

    def show(self, record: Mapping[str, Any]) -> None:
        """A round has closed: its record in `rounds.jsonl`."""


def view(job: JobConfig) -> View:
    """A live view if standard error is a terminal, else plain lines; both on standard error."""
    console = Console(stderr=True)
    return LiveView(job, console) if console.is_terminal else PlainView(job)


class Progress:
    """What a run has reached, from its records."""

    def __init__(self, job: JobConfig) -> None:
        self.job = job
        self.first: Mapping[str, Any] = {}
        self.last: Mapping[str, Any] = {}
        self.accuracy: float | None = None
        self.tiles = self.failed_tiles = 0
        self.float32_bytes = self.up = self.down = 0
        """Of the rounds that were added: what float32 takes in one direction, and what was sent."""
        self.started = time.monotonic()

    def add(self, record: Mapping[str, Any]) -> None:
        """One more round."""
        self.first = self.first or record
        self.last = record
        if record["test_accuracy"] is not None:
            self.accuracy = record["test_accuracy"]
        self.tiles += record["nested_tiles"]
        self.failed_tiles += record["nested_failed_tiles"]
        self.float32_bytes += 4 * record["coordinates"] * len(record["workers"])
        self.up += record["uplink_bytes"]
        self.down += record["downlink_bytes"]

    @property
    def rounds(self) -> int:
        """Rounds that have closed."""
        return int(self.last["version"]) if self.last else 0

    @property
    def seconds_left(self) -> float | None:
        """At the pace since the first round closed: that one includes what workers load before they begin."""
        if self.rounds < 2:
            return None
        seconds = self.last["elapsed_seconds"] - self.first["elapsed_seconds"]
        return float(seconds) / (self.rounds - 1) * (self.job.rounds - self.rounds)

    @property
    def below_float32(self) -> tuple[str, str, str]:
        """How many times less than float32 went up, down, and in both directions; question marks while unknown."""
        float32 = self.float32_bytes
        shares = ((float32, self.up), (float32, self.down), (2 * float32, self.up + self.down))
        up, down, both = (f"{plain / sent:.1f}" if plain and sent else "?" for plain, sent in shares)
        return up, down, both

    @property
    def failed_share(self) -> float | None:
        """Share of nested tiles that failed; None without nested senders."""
        return self.failed_tiles / self.tiles if self.tiles else None

    @property
    def warnings(self) -> dict[str, str]:
        """What a person should change, by kind."""
        lag = (self.last.get("step_lag_rounds") or 0.0) if self.last else 0.0
        return {
            **({"nested": failure_warning(self)} if self.failing else {}),
            **({"lag": lag_warning(lag)} if lag > LAG_LIMIT else {}),
        }

    @property
    def failing(self) -> bool:
        """Whether more nested tiles fail than the job tolerates."""
        return (self.failed_share or 0.0) > self.job.nested_failure_limit


class SilentView:
    """Says only what has to be said."""

    def __enter__(self) -> SilentView:
        return self

    def __exit__(self, *exc: object) -> None:
        return

    def note(self, message: str) -> None:
        """One line."""
        print(message, file=sys.stderr, flush=True)

    def show(self, record: Mapping[str, Any]) -> None:
        """Nothing."""


class PlainView:
    """Lines on standard error."""

    def __init__(self, job: JobConfig) -> None:
        self._progress = Progress(job)
        self._every = max(1, job.rounds // PLAIN_LINES)
        self._warned: set[str] = set()

    def __enter__(self) -> PlainView:
        return self

    def __exit__(self, *exc: object) -> None:
        return

    def note(self, message: str) -> None:
        """One line."""
        print(message, file=sys.stderr, flush=True)

    def show(self, record: Mapping[str, Any]) -> None:
        """A line every so many rounds."""
        progress = self._progress
        progress.add(record)
        if progress.rounds % self._every and progress.rounds != progress.job.rounds:
            return
        accuracy = f" accuracy {progress.accuracy:.4f}" if progress.accuracy is not None else ""
        loss = f" loss {record['train_loss']:.4f}" if record["train_loss"] is not None else ""
        up, down = bits(record["uplink_total_bytes"]), bits(record["downlink_total_bytes"])
        below_up, below_down, below = progress.below_float32
        self.note(
            f"round {progress.rounds}/{progress.job.rounds}{loss}{accuracy} up {up} (1/{below_up}) "
            f"down {down} (1/{below_down}) both 1/{below} of float32, left {clock(progress.seconds_left)}"
        )
        for kind, warning in progress.warnings.items():
            if kind not in self._warned:
                self._warned.add(kind)
                self.note(warning)


class LiveView:
    """One panel that changes in place."""

    def __init__(self, job: JobConfig, console: Console) -> None:
        self._progress = Progress(job)
        self._console = console
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=8)

    def __enter__(self) -> LiveView:
        self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._live.stop()

    def note(self, message: str) -> None:
        """A line above the panel."""
        self._console.print(Text(message, style="dim"))

    def show(self, record: Mapping[str, Any]) -> None:
        """The panel shows this round from now on."""
        self._progress.add(record)

    def _render(self) -> RenderableType:
        progress, job, record = self._progress, self._progress.job, self._progress.last
        table = Table.grid(padding=(0, 3))
        for _ in range(4):
            table.add_column(justify="left")
        if record:
            up, down, rounds = record["uplink_total_bytes"], record["downlink_total_bytes"], progress.rounds
            contributions = len(record["workers"])
            below_up, below_down, below = progress.below_float32
            table.add_row("[b]loss[/b]", _number(record["train_loss"]), "[b]accuracy[/b]", _number(progress.accuracy))
            table.add_row("[b]up[/b]", f"{bits(up)}  ({bits(up / rounds)} a round)", "[b]workers[/b]",
                          f"{contributions} of {contributions + len(record['absent'])} in the last round")  # fmt: skip
            table.add_row("[b]down[/b]", f"{bits(down)}  ({bits(down / rounds)} a round)", "[b]below float32[/b]",
                          f"{below_up} up, {below_down} down, {below} both")  # fmt: skip
            share = progress.failed_share
            nested = "no nested senders" if share is None else f"{100 * share:.2f} % of tiles failed"
            table.add_row("[b]nested[/b]", f"[red]{nested}[/red]" if progress.failing else nested, "[b]left[/b]",
                          clock(progress.seconds_left))  # fmt: skip
        else:
            table.add_row(
                f"waiting for {job.min_workers or job.workers} workers, {time.monotonic() - progress.started:.0f} s"
            )
        bar = ProgressBar(total=job.rounds, completed=progress.rounds)
        title = f"[b]ditherps[/b]  {job.task}  ·  {_codecs(job)}  ·  round {progress.rounds}/{job.rounds}"
        parts: list[RenderableType] = [table, bar]
        parts += [Text(warning, style="yellow") for warning in progress.warnings.values()]
        return Panel(Group(*parts), title=title, title_align="left", border_style="cyan")


def failure_warning(progress: Progress) -> str:
    """What to do when nested decoding fails too often."""
    return (
        f"warning: {100 * (progress.failed_share or 0):.1f} % of nested tiles failed to decode (limit "
        f"{100 * progress.job.nested_failure_limit:g} %): workers' updates differ too much for this ratio; "
        "raise ratio, or use --codec dqsg"
    )


def lag_warning(lag: float) -> str:
    """What to do when w does not keep up with x."""
    return (
        f"warning: the workers' model is {lag:.1f} rounds behind the server's, which momentum may not bear: "
        "use a finer --downlink-codec, or a lower learning rate"
    )


def bits(byte_count: float) -> str:
    """A number of bytes as bits, with a prefix."""
    value = 8.0 * byte_count
    for prefix in ("", "k", "M", "G"):
        if value < 1000:
            return f"{value:.3g} {prefix}bit"
        value /= 1000
    return f"{value:.3g} Tbit"


def clock(seconds: float | None) -> str:
    """Minutes and seconds; a question mark while unknown."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.4f}"


def _codecs(job: JobConfig) -> str:
    """UP, or UP/DOWN where the job says what goes down."""
    return f"{job.uplink}/{job.downlink.codec}" if job.downlink.codec else job.uplink
