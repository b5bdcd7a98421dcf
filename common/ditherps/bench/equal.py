"""`ditherps bench codecs --nmse E`: how many bits each codec needs for one and the same error.

Every family has a knob, the option that trades bits for error; it is turned until the error is reached. Where the knob
has notches (levels, bits) the first one that is at least as good counts. A family that cannot reach the error is listed
at the nearest that it reaches.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, get_args

import torch
from rich.table import Table
from rich.text import Text

from ditherps.bench.codecs import label, side_information
from ditherps.bench.limits import shannon_bits
from ditherps.bench.quality import Quality, quality
from ditherps.bench.sources import Source, source
from ditherps.codecs import Codec, codec_names, parse
from ditherps.errors import OptionError

TOLERANCE: Final = 0.002
"""Relative difference of the error reached with a continuous knob."""


class Knob(NamedTuple):
    """What trades bits for error.

    Attributes:
        option: its name.
        low: its smallest value and
        high: its largest, between which to look.
        finer: whether a larger value makes the error smaller (levels, bits), or larger (a step).
        notch: distance of its values; 0: any value.
        given: options that belong to it, unless the person gave them.
        form: of the value in a codec's text.
    """

    option: str
    low: float
    high: float
    finer: bool
    notch: float
    given: tuple[str, ...] = ()
    form: str = "{:.7g}"

    def text(self, value: float) -> str:
        """The option as `ditherps.codecs.parse` reads it."""
        return f"{self.option}={self.form.format(value)}"


_RESOLUTION: Final = Knob("resolution", 2.0**-8, 16.0, finer=False, notch=0, given=("step=rms",))
_LEVELS: Final = Knob("levels", 1, 32767, finer=True, notch=1)

KNOBS: Final[dict[str, tuple[Knob, ...]]] = {
    "dqsg": (_RESOLUTION, _LEVELS),
    "qsgd": (_RESOLUTION, _LEVELS),
    "eden": (Knob("bits", 2.0**-6, 4.0, finer=True, notch=0),),
    "rotated": (Knob("inner", 0.5, 255, finer=True, notch=0.5, form="(dqsg:levels={:g})"),),
    "maxnorm": (Knob("bits", 1, 15, finer=True, notch=1),),
    "maxnorm-multiscale": (Knob("low", 1, 11, finer=True, notch=1, given=("high=12",)),),
    "topk": (Knob("fraction", 2.0**-14, 1.0, finer=True, notch=0, given=("values=bf16",)),),
    "randk": (Knob("fraction", 2.0**-14, 1.0, finer=True, notch=0, given=("values=bf16",)),),
    "globalrandk": (Knob("fraction", 2.0**-14, 1.0, finer=True, notch=0),),
}
"""By codec: the first counts whose `given` the person's options do not contradict. Without one, a codec is measured as
it is."""

_WAYS: Final = {"qsgd": ("step=max", "step=l2", "step=rms"), "terngrad": ("", "clip=0")}
"""Codecs that are listed in several ways: QSGD with each norm, TernGrad biased by its clipping and without."""

_BESIDE: Final = ("dqsg:coder=rans,reconstruct=matched",)
"""Listed beside the ways and coders of all codecs."""


def run(
    nmse: float,
    specs: Sequence[str] | None = None,
    *,
    sources: Sequence[str],
    coordinates: int = 1 << 20,
    rounds: int = 4,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """One record for each source and codec: the setting that reaches the error, and its bits.

    Args:
        nmse: the error to reach, above 0.
        specs: codecs with their fixed options, as `ditherps.codecs.parse` reads them; default: `default_specs`.
        sources: as `ditherps.bench.sources.source` reads them.
        coordinates: length of vectors that are no files.
        rounds: of independent dither, over which bits and errors are averaged.
        seed: of the vectors.

    Raises:
        OptionError: a codec, a source or a number is not allowed.
        UserError: a file cannot be read.
    """
    if not nmse > 0 or coordinates < 2 or rounds < 2:
        raise OptionError("nmse, coordinates, rounds", (nmse, coordinates, rounds), "above 0, at least 2, at least 2")
    chosen = list(default_specs() if specs is None else specs)
    for spec in chosen:
        parse(spec)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [
            _record(spec, from_, side_information(from_, seed), nmse, rounds)
            for from_ in (source(name, coordinates, seed) for name in sources)
            for spec in chosen
        ]
    finally:
        torch.set_num_threads(before)


def default_specs() -> list[str]:
    """Every codec that loses something and needs no side information, once for each of its coders; no bare wrappers."""
    specs = list(_BESIDE)
    for name in codec_names():
        used = parse(name)
        if used.needs_side_information or name == "none" or (hasattr(used, "inner") and name not in KNOBS):
            continue
        coder = type(used.options).model_fields.get("coder")
        coders = [f"coder={kind}" for kind in get_args(coder.annotation)] if coder else [""]
        given = [",".join(filter(None, pair)) for pair in itertools.product(_WAYS.get(name, ("",)), coders)]
        specs += [f"{name}:{options}" if options else name for options in given]
    return specs


def _record(spec: str, from_: Source, side: torch.Tensor, nmse: float, rounds: int) -> dict[str, Any]:
    used, reached = _search(spec, from_, side, nmse, rounds)
    energy = float(from_.x.double().square().mean())
    limit = None
    if from_.known and not used.needs_side_information:
        limit = shannon_bits(from_.name, reached.nmse, unbiased=used.unbiased, energy=energy)
    return {
        "codec": used.name,
        "options": used.options.model_dump(),
        "spec": label(used),
        "source": from_.name,
        "coordinates": from_.x.numel(),
        "asked_nmse": nmse,
        "reached": reached.nmse <= nmse * (1 + 2 * TOLERANCE),
        **reached._asdict(),
        "unbiased": used.unbiased,
        "shannon_bits": limit,
    }


def _search(spec: str, from_: Source, side: torch.Tensor, nmse: float, rounds: int) -> tuple[Codec, Quality]:
    """The setting of a codec that reaches an error with the fewest bits, or comes nearest."""
    name, _, options = spec.partition(":")
    said = [part for part in options.split(",") if part]
    named = {part.partition("=")[0] for part in said}
    knob = next(
        (k for k in KNOBS.get(name, ()) if all(g in said or g.partition("=")[0] not in named for g in k.given)), None
    )
    if knob is None or knob.option in named:
        used = parse(spec)
        return used, quality(used, from_.x, side, rounds)
    fixed = [*said, *(g for g in knob.given if g not in said)]
    tried: dict[float, tuple[Codec, Quality]] = {}

    def at(value: float) -> float:
        """The error with the knob at a value."""
        if value not in tried:
            used = parse(f"{name}:{','.join([*fixed, knob.text(value)])}")
            tried[value] = used, quality(used, from_.x, side, rounds)
        return tried[value][1].nmse

    coarse, fine = (knob.low, knob.high) if knob.finer else (knob.high, knob.low)
    if at(coarse) > nmse:
        if at(fine) > nmse:
            return tried[fine]
        fine = _narrowed(at, knob, coarse, fine, nmse)
        return tried[fine]
    return tried[coarse]


def _narrowed(at: Callable[[float], float], knob: Knob, coarse: float, fine: float, nmse: float) -> float:
    """The coarsest value that is good enough, by bisection between one that is not (`coarse`) and one that is."""
    while at(fine) < nmse * (1 - TOLERANCE) and not math.isclose(coarse, fine, rel_tol=1e-4):
        middle = math.sqrt(coarse * fine)
        if knob.notch:
            middle = knob.low + round((middle - knob.low) / knob.notch) * knob.notch
            if middle in (coarse, fine):
                middle = (coarse + fine) / 2
                middle = knob.low + math.floor((middle - knob.low) / knob.notch) * knob.notch
            if middle in (coarse, fine):
                break
        if at(middle) <= nmse:
            fine = middle
        else:
            coarse = middle
    return fine


def table(records: Sequence[dict[str, Any]]) -> Table:
    """The records for people, fewest bits first; biased codecs behind the others, and last who misses the error."""
    result = Table(title=f"bits a coordinate at NMSE {records[0]['asked_nmse']:g}", padding=(0, 1, 0, 0))
    result.add_column("source", no_wrap=True)
    result.add_column("codec", overflow="fold")
    for column in ("bits", "NMSE", "bias z", "limit"):
        result.add_column(column, justify="right", no_wrap=True)
    places = {name: place for place, name in enumerate(dict.fromkeys(r["source"] for r in records))}
    ordered = sorted(
        records, key=lambda r: (places[r["source"]], not r["reached"], not r["unbiased"], r["bits_per_coordinate"])
    )
    for place, record in enumerate(ordered):
        limit = record["shannon_bits"]
        cells = (
            record["source"],
            record["spec"] + ("" if record["unbiased"] else " (biased)"),
            f"{record['bits_per_coordinate']:.3f}",
            f"{record['nmse']:.4g}" + ("" if record["reached"] else " !"),
            f"{record['bias_z']:+.1f}",
            "-" if limit is None else f"{limit:.3f}",
        )
        last = place + 1 == len(ordered) or ordered[place + 1]["source"] != record["source"]
        result.add_row(*map(Text, cells), end_section=last)
    result.caption = "!: the codec does not reach the error; the nearest that it reaches"
    return result
