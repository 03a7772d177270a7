"""The parts of the report's page: style, sections, tables and pictures. All text that comes from a run is escaped."""

from __future__ import annotations

import base64
import html
import re
import time
from collections.abc import Sequence
from typing import Any

from pretrain import plots

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

STYLE = """
:root { --page:#fff; --card:#f6f7f9; --ink:#1f2430; --quiet:#6b7385; --rule:#e3e6ec; --bad:#c92a37; --good:#148a4a;
  --accent:#2563eb; color-scheme: light dark }
@media (prefers-color-scheme: dark) { :root { --page:#14161a; --card:#1d2026; --ink:#e8eaf0; --quiet:#98a1b3;
  --rule:#31363f; --bad:#ff7b84; --good:#54d68c; --accent:#7aa7ff } }
@media print { :root { --page:#fff; --card:#f6f7f9; --ink:#1f2430; --quiet:#555c6b; --rule:#d5d9e0; --bad:#c92a37;
  --good:#148a4a } figure,.facts,.sample,tr { break-inside:avoid } h2 { break-after:avoid }
  .scroll { overflow:visible } .pair { grid-template-columns:1fr 1fr !important } }
* { box-sizing: border-box }
body { margin:0; background:var(--page); color:var(--ink); font:16px/1.5 system-ui,-apple-system,'Segoe UI',Roboto,
  sans-serif; -webkit-text-size-adjust:100% }
main { max-width:1100px; margin:0 auto; padding:32px 20px 64px }
h1 { font-size:1.8rem; line-height:1.2; margin:0 0 4px; overflow-wrap:anywhere }
h2 { font-size:1.15rem; margin:44px 0 10px; padding-top:14px; border-top:1px solid var(--rule) }
h3 { font-size:.95rem; margin:0 0 4px; font-weight:600 }
.sub, figcaption, .note { color:var(--quiet); font-size:.875rem; margin:0 0 8px }
.facts { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(190px,44%),1fr)); gap:10px; margin:22px 0 }
.fact { background:var(--card); border-radius:10px; padding:12px 14px }
.fact b { display:block; font-size:1.3rem; font-weight:650; line-height:1.25; font-variant-numeric:tabular-nums }
.fact span { color:var(--quiet); font-size:.8rem }
figure { margin:0 0 18px } figure img { width:100%; height:auto; display:block }
figure .dark, figure .phone { display:none }
@media (max-width: 620px) { figure .light.phone { display:block } figure .light.desk { display:none } }
@media screen and (prefers-color-scheme: dark) { figure .light { display:none } figure .dark { display:block }
  figure .dark.phone { display:none } }
@media screen and (prefers-color-scheme: dark) and (max-width: 620px) { figure .dark.phone { display:block }
  figure .dark.desk, figure .light.phone { display:none } }
.pair { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(430px,100%),1fr)); gap:22px 34px }
.scroll { overflow-x:auto }
table { border-collapse:collapse; width:100%; font-size:.875rem; font-variant-numeric:tabular-nums }
th { text-align:left; color:var(--quiet); font-weight:500; white-space:nowrap }
td,th { padding:6px 12px 6px 0; border-bottom:1px solid var(--rule); vertical-align:top }
td.n,th.n { text-align:right; white-space:nowrap } td.t { color:var(--quiet); white-space:nowrap }
td.m { overflow-wrap:anywhere } .best { font-weight:700; color:var(--good) }
.kind { white-space:nowrap; font-weight:600 } .bad { color:var(--bad) } .good { color:var(--good) }
.sample { background:var(--card); border-radius:10px; padding:14px 16px; margin:0 0 14px }
.sample p { margin:0; white-space:pre-wrap; overflow-wrap:anywhere; font-family:ui-serif,Georgia,serif }
.sample .prompt { font-weight:700 }
pre { background:var(--card); border-radius:10px; padding:14px 16px; overflow-x:auto; font-size:.8rem }
summary { cursor:pointer; color:var(--accent) } footer { margin-top:48px; color:var(--quiet); font-size:.8rem }
@media (max-width: 620px) { .attempt { display:none } td,th { padding-right:9px } .kind { white-space:normal } }
"""


def page(title: str, parts: Sequence[str]) -> str:
    """The whole page. title: escaped. parts: of its body; those that are empty are left out."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        f"style-src 'unsafe-inline'\"><title>{title}</title><style>{STYLE}</style></head>\n<body><main>"
        + "\n".join(part for part in parts if part)
        + f"<footer>Written by Leviathan, {time.strftime('%Y-%m-%d %H:%M')}.</footer></main></body></html>\n"
    )


def section(title: str, content: str) -> str:
    """A part of the page under a heading."""
    return f"<section><h2>{escaped(title)}</h2>{content}</section>"


def table(words: list[str], numbers: list[str], rows: list[str]) -> str:
    """Columns of words, then columns of numbers. rows: of HTML."""
    head = "".join(f"<th>{escaped(w)}</th>" for w in words) + "".join(f"<th class=n>{escaped(n)}</th>" for n in numbers)
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"


def picture(svg: str, caption: str, narrow: str | None = None) -> str:
    """A figure with an image for light and one for dark pages, perhaps others for phones; `STYLE` shows one of them."""
    desk = "" if narrow is None else " desk"
    images = [(svg, "light" + desk), (plots.dark(svg), "dark" + desk)]
    images += [] if narrow is None else [(narrow, "light phone"), (plots.dark(narrow), "dark phone")]
    shown = "".join(f'<img class="{kind}" alt="{escaped(caption)}" src="{_data_uri(image)}">' for image, kind in images)
    return f"<figure>{shown}" + (f"<figcaption>{escaped(caption)}</figcaption></figure>" if caption else "</figure>")


def _data_uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def number(value: Any) -> str:
    """A number for people; a dash for None."""
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}" if value < 1000 else f"{value:,.0f}"


def escaped(value: Any) -> str:
    """Text from a run, harmless in a page: markup escaped, control characters and direction overrides shown as �."""
    return html.escape(CONTROL.sub("\ufffd", str(value)))
