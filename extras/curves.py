"""The curves of a training log, as SVG text."""

from html import escape

WIDTH, HEIGHT = 720, 300  # of a panel, in pixels
LEFT, TOP, BETWEEN = 60, 30, 60  # margins, and the room between two panels
FONT = 'font-family="sans-serif" font-size="12"'
PANELS = [
    {"loss": "gray", "dev_loss": "royalblue", "shuffled_loss": "chocolate"},
    {
        "wer": "green",
        "exact_match": "royalblue",
        "refusal_recall": "purple",
        "false_refusals": "chocolate",
    },
    {"bleu": "royalblue"},
]


def draw_curves(lines: list[dict], panels: list[dict[str, str]] = PANELS) -> str:
    """One SVG of a training log. lines: its dicts, each with a step. panels: {name of a curve: its
    colour} each, drawn one below the other over the steps, all curves of a panel in its scale from
    0 up. Curves without a point are left out, and panels without a curve."""
    steps = max(line["step"] for line in lines) or 1
    names = {name for line in lines for name in line}
    panels = [{name: panel[name] for name in panel if name in names} for panel in panels]
    panels = [panel for panel in panels if panel]

    parts = []
    for i, panel in enumerate(panels):
        parts += draw_panel(lines, panel, steps, TOP + i * (HEIGHT + BETWEEN))
    height = len(panels) * (HEIGHT + BETWEEN) + 20
    size = f'width="{LEFT + WIDTH + 20}" height="{height}"'
    body = "\n".join(parts)
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {FONT}>\n{body}\n</svg>\n'


def draw_panel(lines: list[dict], panel: dict[str, str], steps: int, top: int) -> list[str]:
    """The elements of one panel, whose frame begins `top` pixels from the picture's top."""
    highest = max(line[name] for line in lines for name in panel if name in line) or 1
    frame = f'x="{LEFT}" y="{top}" width="{WIDTH}" height="{HEIGHT}"'
    parts = [f'<rect {frame} fill="none" stroke="#ccc"/>']

    # Four equal parts of both scales are marked.
    for k in range(5):
        x = LEFT + WIDTH * k / 4
        y = top + HEIGHT * k / 4
        value = f"{highest * (1 - k / 4):.3g}"
        parts.append(draw_text(LEFT - 6, y + 4, value, 'text-anchor="end"'))
        parts.append(draw_text(x, top + HEIGHT + 16, steps * k // 4, 'text-anchor="middle"'))

    # Every curve has its name above the panel, in its colour.
    for k, (name, colour) in enumerate(panel.items()):
        points = []
        for line in lines:
            if name in line:
                x = LEFT + WIDTH * line["step"] / steps
                y = top + HEIGHT * (1 - line[name] / highest)
                points.append(f"{x:.1f},{y:.1f}")
        stroke = f'fill="none" stroke="{colour}" stroke-width="1.5"'
        parts.append(f'<polyline points="{" ".join(points)}" {stroke}/>')
        label = name.replace("_", " ")
        parts.append(draw_text(LEFT + 10 + 130 * k, top - 8, label, f'fill="{colour}"'))
    return parts


def draw_text(x: float, y: float, text: object, attributes: str) -> str:
    return f'<text x="{x}" y="{y}" {attributes}>{escape(str(text))}</text>'
