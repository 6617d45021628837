"""A histogram of scores as SVG."""

from collections.abc import Sequence

import numpy as np

_BINS, _WIDTH, _HEIGHT, _MARGIN = 60, 720, 120, 18
_COLORS = {"kept": "#1f77b4", "dropped": "#d1495b", "other": "#c9ced6"}
_TAIL = 0.99


def histogram(values: Sequence[float], sides: Sequence[str], limits: Sequence[float]) -> str:
    """Bars of the scores, stacked by their side, and a line at each limit.

    The last bar has all values above the 99th percentile, where no limit is higher.
    """
    scores, side = np.array(values, float), np.array(sides)
    low = min(float(scores.min()), *limits, np.inf)
    high = max(float(np.quantile(scores, _TAIL)), *limits, -np.inf)
    high = high if high > low else low + 1
    edges = np.linspace(low, high, _BINS + 1)
    counts = {
        name: np.histogram(np.clip(scores[side == name], low, high), edges)[0] for name in _COLORS
    }
    tallest = max(1, int(sum(counts.values()).max()))
    step = _WIDTH / _BINS
    bars = []
    for bin_ in range(_BINS):
        top = float(_HEIGHT)
        for name, color in _COLORS.items():
            height = counts[name][bin_] / tallest * (_HEIGHT - 4)
            if height:
                top -= height
                bars.append(
                    f'<rect x="{bin_ * step:.1f}" y="{top:.1f}" width="{step - 1:.1f}" '
                    f'height="{height:.1f}" fill="{color}"/>'
                )
    lines = [
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{_HEIGHT}" stroke="#1a1f26" '
        'stroke-width="1.5" stroke-dasharray="5 3"/>'
        for x in ((limit - low) / (high - low) * _WIDTH for limit in limits)
    ]
    ends = f"{low:.4g}", f"{high:.4g}" + (" and more" if scores.max() > high else "")
    words = (
        f'<text x="0" y="{_HEIGHT + 14}">{ends[0]}</text>'
        f'<text x="{_WIDTH}" y="{_HEIGHT + 14}" text-anchor="end">{ends[1]}</text>'
        f'<text x="{_WIDTH / 2}" y="{_HEIGHT + 14}" text-anchor="middle">'
        f"tallest bar {tallest:,}</text>"
    )
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT + _MARGIN}" width="{_WIDTH}" role="img" '
        f'style="max-width: 100%; font-size: 12px">{"".join(bars + lines)}{words}</svg>'
    )
