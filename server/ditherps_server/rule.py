"""What a job's aggregation rule needs, and what it cannot be combined with: said before anything starts."""

from __future__ import annotations

import math

from ditherps.codecs import Codec, Role
from ditherps.config import AggregationConfig, JobConfig
from ditherps.errors import OptionError
from ditherps_server.rounds import Rules, assign_roles

LEAST_ROBUST = 3
"""Contributions among which a single hostile one can be told from the others."""


def trimmed(aggregation: AggregationConfig, count: int) -> tuple[int, int]:
    """Ranks `first` .. `last` - 1 of `count` sorted values whose mean is the median or the trimmed mean."""
    cut = (count - 1) // 2 if aggregation.name == "median" else math.ceil(aggregation.trim * count - 1e-9)
    return cut, count - cut


def least_contributions(aggregation: AggregationConfig) -> int:
    """The fewest contributions with which the rule makes sense."""
    match aggregation.name:
        case "krum":
            return max(2 * aggregation.attackers + 3, aggregation.chosen + aggregation.attackers + 2)
        case "trimmed_mean":
            # Rounding up may cut all of a few, even where it leaves something of more and of fewer.
            counts = range(LEAST_ROBUST, 2 + math.ceil(2 / (1 - 2 * aggregation.trim) + LEAST_ROBUST))
            too_few = [n for n in counts if 2 * trimmed(aggregation, n)[0] >= n]
            return max(too_few, default=LEAST_ROBUST - 1) + 1
        case "median":
            return LEAST_ROBUST
        case _:
            return 1


def check_rule(job: JobConfig, codec: Codec, rules: Rules) -> None:
    """Raises `OptionError` when the job's rule, codec, workers and quorum do not make a safe whole."""
    aggregation, nested = job.aggregation, Role.NESTED in codec.roles
    limits = [name for name in ("max_norm", "max_norm_ratio") if getattr(job, name)]
    running = getattr(codec.options, "side", "sources") == "running"
    for guard in (["aggregation.name"] if aggregation.robust else []) + limits:
        if running and nested:
            value = aggregation.name if guard == "aggregation.name" else getattr(job, guard)
            raise OptionError(
                guard, value,
                f"with {codec.name} only side = 'sources': a running mean takes in each contribution before it is "
                "judged",
            )  # fmt: skip
    if not aggregation.robust:
        return
    # The fewest that can make a round: of as few as open one a share is invited, and a quorum of each role delivers.
    invited = rules.invited(rules.fewest_present)
    roles = list(assign_roles(tuple(range(invited)), rules.source_fraction).values())
    sources, others = (rules.needed(roles.count(role)) for role in (Role.SOURCE, Role.NESTED))
    least = least_contributions(aggregation)
    among = f"workers = {job.workers}, quorum = {job.quorum:g}"
    among += f", min_workers = {job.min_workers}" if job.min_workers else ""
    among += f", sample_fraction = {job.sample_fraction:g}" if job.sample_fraction < 1 else ""
    if sources + others < least:
        raise OptionError(
            "aggregation.name", aggregation.name,
            f"with at least {least} contributions to a round; {among} can leave {sources + others}",
        )  # fmt: skip
    if others and sources < least:
        raise OptionError(
            "aggregation.name", aggregation.name,
            f"with at least {least} sources, which make the side information of {codec.name}; {among}, "
            f"side_fraction = {rules.source_fraction:g} can leave {sources}",
        )  # fmt: skip
