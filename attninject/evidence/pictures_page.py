"""All pictures of a model in one HTML file that needs no network: light and dark, on a phone too; without jinja2, see
`report_html`.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable
from dataclasses import dataclass, field
from html import escape

from .pictures_paint import palette

_STYLE = """
:root{color-scheme:light dark;--page:#fff;--ink:#1c2026;--soft:#5c6470;--line:#dde1e7;--card:#f6f7f9}
@media(prefers-color-scheme:dark){:root{--page:#14171b;--ink:#e6e9ee;--soft:#9aa3b0;--line:#2c323a;--card:#1d2127}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1.2rem 1rem 3rem;max-width:72rem;background:var(--page);color:var(--ink);
font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.5rem;margin:0 0 .3rem;overflow-wrap:anywhere}
h2{font-size:1.25rem;margin:2.2rem 0 .6rem;overflow-wrap:anywhere}
h3{font-size:1rem;margin:1.6rem 0 .5rem;overflow-wrap:anywhere}
h3 span,p.soft,figcaption{color:var(--soft);font-weight:normal}
p{margin:.3rem 0}
.row{display:grid;gap:.8rem;grid-template-columns:repeat(auto-fill,minmax(min(100%,10.5rem),1fr))}
figure{margin:0;padding:.5rem;background:var(--card);border:1px solid var(--line);border-radius:.4rem}
figure.wide{grid-column:span 2}
img{display:block;width:100%;height:auto;border-radius:.2rem}
figure.map img{image-rendering:pixelated}
figcaption{font-size:.82rem;line-height:1.35;margin-top:.4rem}
figcaption b{color:var(--ink);font-weight:600;font-variant-numeric:tabular-nums}
.key{display:flex;gap:.6rem;align-items:center;font-size:.85rem;color:var(--soft);margin:.6rem 0}
.key i{display:block;border:1px solid var(--line);height:.8rem;width:min(14rem,40vw);border-radius:.2rem;
background:linear-gradient(to right,COLOURS)}
nav{font-size:.9rem}nav a{color:inherit;margin-right:.8rem}
@media(max-width:30rem){.row{grid-template-columns:repeat(2,1fr);gap:.5rem}figure{padding:.3rem}
figcaption{font-size:.75rem}}
"""


@dataclass(frozen=True)
class Figure:
    """A PNG with its caption; `form`: `map` keeps its squares sharp, `wide` takes two places."""

    png: bytes
    text: str
    values: str = ""
    form: str = ""


@dataclass
class Section:
    """The pictures of one block, or of the whole network: a title, what it is, and what is missing."""

    title: str
    about: str = ""
    figures: list[Figure] = field(default_factory=list)
    note: str = ""


@dataclass
class Chapter:
    """One image."""

    title: str
    about: str
    sections: list[Section]


def page(title: str, about: Iterable[str], chapters: list[Chapter]) -> str:
    """The whole file."""
    colours = ",".join(f"#{bytes(palette()[i]).hex()}" for i in range(0, 256, 15))
    style = _STYLE.replace("COLOURS", colours).strip()
    links = "".join(f'<a href="#i{i}">{escape(c.title)}</a>' for i, c in enumerate(chapters))
    lines = "".join(f'<p class="soft">{escape(line)}</p>' for line in about)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title>\n<style>{style}</style></head><body>\n<h1>{escape(title)}</h1>{lines}"
        '<div class="key">least<i></i>largest value of a map</div>'
        + (f"<nav>{links}</nav>" if len(chapters) > 1 else "")
        + "".join(_chapter(f"i{i}", c) for i, c in enumerate(chapters))
        + "\n</body></html>\n"
    )


def _chapter(anchor: str, chapter: Chapter) -> str:
    head = f'\n<h2 id="{anchor}">{escape(chapter.title)}</h2><p class="soft">{escape(chapter.about)}</p>'
    return head + "".join(map(_section, chapter.sections))


def _section(section: Section) -> str:
    note = f'<p class="soft">{escape(section.note)}</p>' if section.note else ""
    figures = "\n".join(map(_figure, section.figures))
    title = (
        f"\n<h3>{escape(section.title)} <span>{escape(section.about)}</span></h3>" if section.title else ""
    )
    return f'{title}{note}<div class="row">{figures}</div>'


def _figure(figure: Figure) -> str:
    data = base64.b64encode(figure.png).decode("ascii")
    values = f"<br><b>{escape(figure.values)}</b>" if figure.values else ""
    return (
        f'<figure class="{figure.form}"><img alt="{escape(figure.text)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(figure.text)}{values}</figcaption></figure>"
    )
