"""Pictures, as SVG text."""

import math
from html import escape

import numpy as np

from prepare.errors import visible


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


def draw_histograms(columns, rows, note=""):
    """One SVG of small histograms, a line of them for each row, all of a column over one scale. columns: titles, with
    units; rows: {label: an array of numbers for each column}. An array without numbers leaves its place empty; numbers
    beyond the scale, the outermost half percent, count in its last bars. note: a line to stand below."""
    left, width, height, across, down, bars = 215, 180, 70, 50, 46, 36
    scales, parts = [], []

    def write(x, y, text, more=""):
        parts.append(f'<text x="{x:.1f}" y="{y:.1f}" {more}>{escape(visible(text))}</text>')

    for c, title in enumerate(columns):
        values = np.concatenate([np.asarray(arrays[c], float) for arrays in rows.values()])
        low, high = np.percentile(values, (0.5, 99.5)) if len(values) else (0, 1)
        low = min(low, 0)
        step = 10 ** math.floor(math.log10((high - low) / 4 or 1))
        step *= next(k for k in (1, 2, 2.5, 5, 10) if k * step * 4.5 >= high - low)
        low = step * math.floor(low / step)
        scales.append((low, max(step * math.ceil(high / step), low + step), step))
        write(left + c * (width + across), 20, title, 'font-weight="bold"')
    for r, (label, arrays) in enumerate(rows.items()):
        top = 50 + r * (height + down)
        for k, line in enumerate(label.split("\n")):
            write(10, top + 14 + 15 * k, line if len(line) <= 24 else line[:23] + "…")
        for c, (values, (low, high, step)) in enumerate(zip(arrays, scales)):
            x0 = left + c * (width + across)
            if not len(values):
                continue
            for k in range(round((high - low) / step) + 1):
                x = x0 + width * k * step / (high - low)
                parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{top + height + 3}" stroke="#ddd"/>')
                write(x, top + height + 15, f"{low + k * step:g}", 'text-anchor="middle" font-size="10"')
            counts, _ = np.histogram(np.clip(values, low, high), bars, (low, high))
            for k, share in enumerate(counts / counts.max()):
                parts.append(f'<rect x="{x0 + width * k / bars:.1f}" y="{top + height * (1 - share):.1f}" '
                             f'width="{width / bars - 0.5:.1f}" height="{height * share:.1f}" fill="#4a7fb5"/>')
            parts.append(f'<line x1="{x0}" x2="{x0 + width}" y1="{top + height}" y2="{top + height}" stroke="#888"/>')
            write(x0 - 4, top + 9, f"{100 * counts.max() / len(values):.0f} %", 'text-anchor="end" font-size="10"')
            median = float(np.median(values))
            x = x0 + width * (np.clip(median, low, high) - low) / (high - low)
            parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top - 3}" y2="{top + height}" stroke="#d9730d"/>')
            write(x, top - 5, f"{median:.4g}", 'text-anchor="middle" font-size="10" style="fill:#b35900"')
    bottom = 50 + len(rows) * (height + down)
    write(10, bottom, f"Height: share of rows, that of the highest bar at its left. Orange: the median. {note}",
          'font-size="11"')
    size = f'width="{left + len(columns) * (width + across)}" height="{bottom + 15}"'
    body = "\n".join(parts)
    return (f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12" fill="#333">\n'
            f'<rect width="100%" height="100%" fill="#fff"/>\n{body}\n</svg>\n')
