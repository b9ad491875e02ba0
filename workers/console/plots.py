"""Small plots as SVG, drawn on the server. Their classes are in the style sheet: the CSP permits no inline style."""

from collections.abc import Sequence

from markupsafe import Markup, escape

WIDTH, HEIGHT, GAP = 300, 60, 1


def bars(values: Sequence[float], label: str) -> Markup:
    """A bar per value; `label` describes the plot for a screen reader."""
    greatest = max([*values, 0.0]) or 1.0
    step = WIDTH / max(len(values), 1)
    parts = [
        f'<rect x="{n * step:.1f}" y="{HEIGHT - height:.1f}" width="{step - GAP:.1f}" height="{height:.1f}"/>'
        for n, height in enumerate(max(value, 0) / greatest * HEIGHT for value in values)
    ]
    return _svg("plot", WIDTH, HEIGHT, label, "".join(parts))


def strip(cells: Sequence[tuple[str, str]], label: str, size: int = 10) -> Markup:
    """A square per cell: its class, and the text that is shown on hover."""
    parts = [
        f'<rect class="{escape(kind)}" x="{n * (size + 2)}" y="0" width="{size}" height="{2 * size}">'
        f"<title>{escape(title)}</title></rect>"
        for n, (kind, title) in enumerate(cells)
    ]
    return _svg("days", len(cells) * (size + 2), 2 * size, label, "".join(parts))


def _svg(kind: str, width: int, height: int, label: str, inner: str) -> Markup:
    """`inner` is escaped already."""
    text = escape(label)
    return Markup(  # noqa: S704 - the label and the titles are escaped
        f'<svg class="{kind}" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{text}">{inner}</svg>'
    )
