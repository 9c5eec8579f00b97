"""Pictures, as SVG text."""


def draw_curves(lines, panels):
    """One SVG of a training log. lines: its dicts, each with a step; panels: {curve name: colour} each, drawn one below
    the other over the steps, every curve in its panel's scale from 0 up; those without a point are left out."""
    width, height, left, steps = 720, 300, 60, max(line["step"] for line in lines) or 1
    panels = [{name: colour for name, colour in panel.items() if any(name in line for line in lines)} for panel in panels]
    panels = [panel for panel in panels if panel]
    parts = []
    for p, curves in enumerate(panels):
        top = 30 + p * (height + 60)
        highest = max([line[name] for name in curves for line in lines if name in line]) or 1
        parts.append(f'<rect x="{left}" y="{top}" width="{width}" height="{height}" fill="none" stroke="#ccc"/>')
        for k in range(5):
            x, y = left + width * k / 4, top + height * k / 4
            parts.append(f'<text x="{left - 6}" y="{y + 4}" text-anchor="end">{highest * (1 - k / 4):.3g}</text>')
            parts.append(f'<text x="{x}" y="{top + height + 16}" text-anchor="middle">{steps * k // 4}</text>')
        for k, (name, colour) in enumerate(curves.items()):
            at = [(line["step"] / steps, 1 - line[name] / highest) for line in lines if name in line]
            points = " ".join(f"{left + width * x:.1f},{top + height * y:.1f}" for x, y in at)
            label = name.replace("_", " ")
            parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
            parts.append(f'<text x="{left + 10 + 130 * k}" y="{top - 8}" fill="{colour}">{label}</text>')
    size = f'width="{left + width + 20}" height="{len(panels) * (height + 60) + 20}"'
    body = "\n".join(parts)
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">\n{body}\n</svg>\n'
