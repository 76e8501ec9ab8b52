"""Draws figures as bars in an SVG: one panel for each figure, one bar for each subject."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from xml.sax.saxutils import escape

from benchmarks.report import MIB, Figures

PANEL_WIDTH = 460
LABEL_WIDTH = 245
BAR_WIDTH = 150
BAR_HEIGHT = 16
HEADING_HEIGHT = 30
COLUMNS = 2
OURS, THEIRS = "#2f6f4f", "#9aa5b1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    figure: str
    heading: str
    scale: float = 1
    digits: int = 2


PANELS = [
    Panel(figure="full seconds", heading="full backup of base, s (less is better)"),
    Panel(figure="gen1 seconds", heading="gen1 over it, s (less is better)"),
    Panel(figure="gen1 added", heading="gen1 adds, MiB (less is better)", scale=MIB, digits=0),
    Panel(figure="restore seconds", heading="restore, s (less is better)"),
    Panel(
        figure="cold rate",
        heading="read through the mount, MB/s (more is better)",
        scale=1e6,
        digits=0,
    ),
    Panel(figure="random cold 4", heading="4 KiB reads, 4 jobs, IOPS (more is better)", digits=0),
]


def draw(figures: Figures, titles: Mapping[str, str]) -> str:
    """The text of an SVG file."""
    panels = [panel for panel in PANELS if any(panel.figure in figures[key] for key in figures)]
    height = HEADING_HEIGHT + (BAR_HEIGHT + 4) * len(figures) + 12
    rows = -(-len(panels) // COLUMNS)
    size = f'width="{PANEL_WIDTH * COLUMNS}" height="{height * rows}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for number, panel in enumerate(panels):
        row, column = divmod(number, COLUMNS)
        parts.append(f'<g transform="translate({column * PANEL_WIDTH + 8} {row * height})">')
        parts += draw_panel(panel, figures, titles)
        parts.append("</g>")
    return "\n".join([*parts, "</svg>"]) + "\n"


def draw_panel(panel: Panel, figures: Figures, titles: Mapping[str, str]) -> list[str]:
    medians = {
        subject: statistics.median(values[panel.figure]) / panel.scale
        for subject, values in figures.items()
        if values.get(panel.figure)
    }
    largest = max(medians.values()) or 1
    parts = [f'<text y="20" font-weight="bold">{escape(panel.heading)}</text>']
    for place, (subject, median) in enumerate(medians.items()):
        top = HEADING_HEIGHT + place * (BAR_HEIGHT + 4)
        title = titles[subject].replace("*", "").replace("`", "")
        color = OURS if title.startswith("backupfs") else THEIRS
        width = BAR_WIDTH * median / largest
        base = top + BAR_HEIGHT - 4
        parts += [
            f'<text x="{LABEL_WIDTH - 6}" y="{base}" text-anchor="end">{escape(title)}</text>',
            f'<rect x="{LABEL_WIDTH}" y="{top}" width="{width:.1f}" height="{BAR_HEIGHT}" fill="{color}"/>',
            f'<text x="{LABEL_WIDTH + width + 4:.1f}" y="{base}">{median:,.{panel.digits}f}</text>',
        ]
    return parts
