"""Writes the dashboards of `panels.py` as Grafana's JSON: `python deploy/grafana/generate.py` (--check: only compare).

Grafana's own typed builders make the JSON, so what they do not know cannot be written.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from grafana_foundation_sdk.builders import common as common_builders
from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.builders import prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DashboardLinkType,
    DataSourceRef,
    FieldColorModeId,
)

sys.path.insert(0, str(Path(__file__).parent))
from panels import BOARDS, Board, Panel

FOLDER = Path(__file__).parent / "dashboards"
DATASOURCE = DataSourceRef(type_val="prometheus", uid="ditherps-prometheus")
"""As provisioning/datasources/prometheus.yaml has it."""
HEIGHT = 8
STAT_HEIGHT = 4


def dashboard(board: Board) -> str:
    """A board as JSON, always the same for the same board."""
    built = (
        builders.Dashboard(board.title)
        .uid(board.uid)
        .description(board.description)
        .tags(["ditherps"])
        .refresh("5s")
        .time("now-15m", "now")
        .timezone("browser")
        .readonly()
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .link(builders.DashboardLink("ditherps").type(DashboardLinkType.DASHBOARDS).tags(["ditherps"]).keep_time(True))
    )
    for title, panels in board.rows:
        built = built.with_row(builders.Row(title))
        for panel in panels:
            built = built.with_panel(_stat(panel) if panel.kind == "stat" else _line(panel))
    values = json.loads(json.dumps(built.build(), cls=JSONEncoder))
    for number, panel in enumerate(values["panels"], 1):
        panel["id"] = number
    return json.dumps({"id": None, **values}, indent=2, sort_keys=True) + "\n"


def _targets(panel: Panel) -> list[prometheus.Dataquery]:
    return [
        prometheus.Dataquery().expr(query.expr).legend_format(query.legend).range().ref_id(chr(ord("A") + place))
        for place, query in enumerate(panel.queries)
    ]


def _line(panel: Panel) -> timeseries.Panel:
    built = (
        timeseries.Panel()
        .title(panel.title)
        .description(panel.description)
        .unit(panel.unit)
        .datasource(DATASOURCE)
        .span(panel.width)
        .height(HEIGHT)
        .line_width(1)
        .fill_opacity(40 if panel.stacked else 8)
        .show_points(common.VisibilityMode.NEVER)
        .legend(
            common_builders.VizLegendOptions()
            .display_mode(common.LegendDisplayMode.LIST)
            .placement(common.LegendPlacement.BOTTOM)
            .show_legend(True)
        )
        .tooltip(
            common_builders.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI).sort(common.SortOrder.DESCENDING)
        )
        .targets([*_targets(panel)])
    )
    if panel.stacked:
        built = built.stacking(common_builders.StackingConfig().mode(common.StackingMode.NORMAL))
    if panel.logarithmic:
        scale = common_builders.ScaleDistributionConfig().type(common.ScaleDistribution.LOG).log(10)
        return built.scale_distribution(scale)
    return built.min(0)


def _stat(panel: Panel) -> stat.Panel:
    built = (
        stat.Panel()
        .title(panel.title)
        .description(panel.description)
        .unit(panel.unit)
        .datasource(DATASOURCE)
        .span(panel.width)
        .height(STAT_HEIGHT)
        .graph_mode(common.BigValueGraphMode.AREA)
        .color_mode(common.BigValueColorMode.VALUE)
        .color_scheme(builders.FieldColor().mode(FieldColorModeId.FIXED).fixed_color("blue"))
        .reduce_options(common_builders.ReduceDataOptions().calcs(["lastNotNull"]))
        .targets([*_targets(panel)])
    )
    return built if panel.decimals is None else built.decimals(panel.decimals)


def main() -> int:
    """Write, or with --check compare, all dashboards."""
    stale = 0
    FOLDER.mkdir(exist_ok=True)
    for board in BOARDS:
        path, text = FOLDER / f"{board.uid.removeprefix('ditherps-')}.json", dashboard(board)
        if "--check" in sys.argv[1:]:
            if not path.exists() or path.read_text() != text:
                print(f"{path} is not what {__file__} writes")
                stale += 1
        else:
            path.write_text(text)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
