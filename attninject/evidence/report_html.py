"""The page: one file, no script, nothing fetched; light and dark as the reader's system is, and fit for a phone.

Joined texts, each through `escape`: a template of jinja2 would be shorter by nothing, since most of this is style.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from .report_charts import Chart, charts
from .report_figures import Figures
from .report_tables import Table, apart, tables

_LIGHT = ("#0072b2", "#d55e00", "#00805c", "#b0508a", "#a86f00", "#2f7fb8", "#8a5a44", "#6f52b5")
_DARK = ("#5cb3ea", "#ff9150", "#3fd0a4", "#f09ac9", "#f0b440", "#86c8f2", "#cfa08a", "#b39df0")


def _colours(values: Sequence[str]) -> str:
    return " ".join(f"--c{number}: {value};" for number, value in enumerate(values))


STYLE = f"""
:root {{ color-scheme: light dark; --ink: #1c1e21; --soft: #5b6068; --line: #d9dce1; --page: #ffffff;
  --box: #f4f5f7; --strong: #0b5cad; {_colours(_LIGHT)} }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e6e8eb; --soft: #a3a9b3; --line: #3a3f47; --page: #16181c; --box: #1f2227;
    --strong: #7ab8f5; {_colours(_DARK)} }}
}}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; max-width: 64rem; padding: 1.5rem 1rem 4rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }}
h1 {{ font-size: 1.4rem; margin: 0 0 1rem; }}
h2 {{ font-size: 1.15rem; margin: 2.5rem 0 .5rem; }}
h3 {{ font-size: 1rem; margin: 0 0 .5rem; }}
.sentence {{ border-left: 4px solid var(--strong); background: var(--box); padding: .9rem 1rem; margin: 0 0 1rem;
  font-size: 1.1rem; overflow-wrap: anywhere; }}
.note, .apart {{ color: var(--soft); max-width: 46rem; margin: .25rem 0 .75rem; overflow-wrap: anywhere; }}
.charts {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); gap: 1.5rem;
  margin-top: 1.5rem; }}
figure {{ margin: 0; min-width: 0; }}
figure svg {{ width: 100%; height: auto; display: block; }}
.legend {{ list-style: none; display: flex; flex-wrap: wrap; gap: .15rem 1rem; padding: 0; margin: .5rem 0 0;
  font-size: .85rem; }}
.legend svg {{ display: inline; width: 1.8rem; height: .7rem; margin-right: .4rem; vertical-align: baseline; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: right; padding: .35rem .7rem; border-bottom: 1px solid var(--line); white-space: nowrap;
  vertical-align: top; }}
th {{ color: var(--soft); font-weight: 600; }}
th:first-child, td:first-child {{ text-align: left; padding-left: 0; }}
table.words td, table.words th {{ text-align: left; white-space: normal; overflow-wrap: anywhere; }}
table.words td:first-child {{ min-width: 7rem; }}
text {{ font: 11px system-ui, sans-serif; fill: var(--soft); }}
text.name {{ font-size: 12px; fill: var(--ink); paint-order: stroke; stroke: var(--page); stroke-width: 4px; }}
.grid {{ stroke: var(--line); }}
.zero {{ stroke: var(--soft); stroke-dasharray: 3 3; }}
polyline {{ fill: none; stroke: currentColor; stroke-width: 2; }}
.interval {{ stroke: currentColor; stroke-width: 2; }}
circle {{ fill: currentColor; }}
.dashed polyline, .dashed .interval {{ stroke-dasharray: 6 4; }}
.dotted polyline, .dotted .interval {{ stroke-dasharray: 1.5 4; stroke-linecap: round; }}
.dashed circle, .dotted circle {{ fill: var(--page); stroke: currentColor; stroke-width: 2; }}
.plain {{ color: var(--ink); }}
{" ".join(f".c{n} {{ color: var(--c{n}); }}" for n in range(len(_LIGHT)))}
@media (max-width: 30rem) {{ th:first-child, td:first-child {{ position: sticky; left: 0;
  background: var(--page); max-width: 9rem; white-space: normal; padding-right: .5rem; }} }}
"""


def page(found: Sequence[Figures]) -> str:
    """The whole report."""
    reason = apart([of.study for of in found])
    parts = [f'<p class="apart">{escape(reason)}</p>'] if reason else []
    for number, of in enumerate(found, 1):
        parts.append(_study(of, f"Study {number}" if reason else ""))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Does attention help?</title><style>{STYLE}</style></head>\n"
        f"<body><h1>Does attention help?</h1>\n{''.join(parts)}</body></html>\n"
    )


def _study(of: Figures, title: str) -> str:
    heading = f"<h2>{title}</h2>" if title else ""
    drawn = "".join(_figure(chart) for chart in charts(of))
    left = of.study.left_out()
    out = _list(f"{len(left)} runs are left out", left) if left else ""
    notes = _list("Notes", of.study.notes) if of.study.notes else ""
    return (
        f'{heading}<p class="sentence">{escape(of.sentence)}</p>\n{out}<div class="charts">{drawn}</div>\n'
        f"{''.join(_table(table) for table in tables(of))}{notes}"
    )


def _figure(chart: Chart) -> str:
    keys = "".join(f"<li>{_key(style)}{escape(name)}</li>" for name, style in chart.legend)
    legend = f'<ul class="legend">{keys}</ul>' if keys else ""
    return f"<figure><h3>{escape(chart.title)}</h3>{chart.svg}{legend}</figure>\n"


def _key(style: str) -> str:
    """The sign of an arm in a legend."""
    line = '<polyline points="0,6 30,6"/><circle cx="15" cy="6" r="4"/>'
    return f'<svg viewBox="0 0 30 12" aria-hidden="true"><g class="{style}">{line}</g></svg>'


def _table(table: Table) -> str:
    kind = "words" if len(table.header) == 2 else "numbers"
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.header)
    body = "".join(f"<tr>{''.join(f'<td>{escape(c)}</td>' for c in row)}</tr>\n" for row in table.rows)
    note = f'<p class="note">{_worded(table.note)}</p>' if table.note else ""
    return (
        f'<h2>{escape(table.title)}</h2>{note}<div class="scroll"><table class="{kind}"><thead><tr>{head}</tr>'
        f"</thead><tbody>{body}</tbody></table></div>\n"
    )


def _list(title: str, lines: Sequence[str]) -> str:
    items = "".join(f"<li>{_worded(line)}</li>" for line in lines)
    return f'<h2>{escape(title)}</h2><ul class="note">{items}</ul>\n'


def _worded(text: str) -> str:
    """A text, what stands in backticks set as code."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", escape(text))
