"""The report: one page that needs nothing else, and the same as JSON."""

import dataclasses
import html
import json
from pathlib import Path
from typing import Any

from bothways.compare.core import Experiment, Measurement, Result, Table
from bothways.compare.stats import FAILS, HOLDS, OPEN

STYLE = """
:root { color-scheme: light dark; --page: #fcfcfa; --ink: #1d2126; --soft: #5b6470; --line: #dcdfe3; --card: #ffffff;
  --yes: #1c7a4b; --no: #b3402a; --open: #8a6a00; --code: #f1f2f4; }
@media (prefers-color-scheme: dark) { :root { --page: #14171b; --ink: #e6e8eb; --soft: #9aa4b0; --line: #31373f;
  --card: #1b1f25; --yes: #55c48d; --no: #f0846c; --open: #e0bd55; --code: #242a31; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem 1rem 4rem; max-width: 62rem; background: var(--page); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: .4rem 0 .3rem; }
h2 { font-size: 1.25rem; margin: 0 0 .6rem; line-height: 1.3; }
p { margin: .5rem 0; }
a { color: inherit; text-decoration-color: var(--soft); text-underline-offset: .15em; }
.soft, figcaption { color: var(--soft); font-size: .9rem; }
.claims { list-style: none; padding: 0; margin: 1rem 0; }
.claims li, section { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; }
.claims li { padding: .7rem .9rem; margin: .5rem 0; }
section { padding: 1.1rem 1.1rem .6rem; margin: 1.4rem 0; scroll-margin-top: .5rem; }
.claims a { font-weight: 600; text-decoration: none; }
.claims p { margin: .15rem 0 0; }
.badge { display: inline-block; padding: 0 .55rem; border: 1px solid currentColor; border-radius: 1rem; font-size: .85rem;
  font-weight: 600; white-space: nowrap; margin-right: .3rem; }
.yes { color: var(--yes); } .no { color: var(--no); } .open { color: var(--open); }
blockquote { margin: .6rem 0; padding-left: .8rem; border-left: 3px solid var(--line); font-style: italic; }
figure { margin: 1.1rem 0; } figure svg { width: 100%; max-width: 40rem; height: auto; display: block; }
.wide { overflow-x: auto; margin: 0 0 1rem; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .28rem .8rem .28rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; } td { white-space: nowrap; } td:first-child { white-space: normal; min-width: 8.5rem; }
code, pre { font: .86rem ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
pre { background: var(--code); padding: .6rem .8rem; border-radius: .4rem; overflow-x: auto; }
details { margin: .8rem 0; } summary { cursor: pointer; color: var(--soft); }
"""
INTERVALS = (
    "Every interval is a 95 % one for another draw of seeds and of test items together (a bootstrap over items and Student's t "
    "over seeds, added in squares); for other seeds alone where a figure has no items, as symmetry, or how varied texts are."
)
LOOK = {HOLDS: "yes", FAILS: "no", OPEN: "open"}


def _badge(verdict: str) -> str:
    return f'<span class="badge {LOOK[verdict]}">{html.escape(verdict)}</span>'


def _effect(result: Result) -> str:
    return f"<b>{html.escape(result.effect)}.</b> " if result.effect else ""


def _table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(c)}</th>" for c in table.columns)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in row) + "</tr>" for row in table.rows)
    title = f'<p class="soft">{html.escape(table.title)}</p>' if table.title else ""
    return f'{title}<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _figures(figures: list[Measurement]) -> str:
    def number(x: float | None) -> str:
        return "" if x is None else f"{x:.3f}"

    rows = [[f.name, str(f.value), str(f.value.n), number(f.expected), number(f.baseline), f.rule] for f in figures]
    columns = ("figure", "value [95 % interval]", "n", "theory", "baseline", "how it is scored")
    return (
        f"<details><summary>All {len(figures)} figures of this section, with how each is scored</summary>"
        + _table(Table("", columns, rows))
        + "</details>"
    )


def _section(experiment: Experiment, result: Result, command: str, power: str) -> str:
    e = experiment
    before = f'<p class="soft"><b>Before it ran:</b> {html.escape(power)}.</p>' if power else ""
    pictures = "".join(
        f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>" for svg, caption in result.pictures
    )
    return f"""<section id="{e.name}">
<h2>{html.escape(e.title)}</h2>
<p>{_badge(result.verdict)} {_effect(result)}{html.escape(result.finding)}</p>
<p class="soft"><b>How sure:</b> {html.escape(result.sure)}</p>
{before}<p><b>The essay's claim.</b></p><blockquote>{html.escape(e.claim)}</blockquote>
<p><b>The experiment.</b> {html.escape(e.method)}</p>
{pictures}{"".join(map(_table, result.tables))}{_figures(result.figures)}
<p class="soft"><b>At real size, by others:</b> {html.escape(e.known)}</p>
<p><b>Do it again:</b></p><pre>{html.escape(command)}</pre>
</section>"""


def write(home: Path, found: list[tuple[Experiment, Result]], about: dict[str, Any]) -> tuple[Path, Path]:
    """`report.html` and `report.json` in a directory.

    Args:
      about: size, arms (name -> what it is), seeds, tunings, options, scale, made (what measured).
    """
    commands = [f"bothways compare {e.name}{about['options']}" for e, _ in found]
    claims = "".join(
        f'<li>{_badge(r.verdict)} <a href="#{e.name}">{html.escape(e.title)}</a><p>{_effect(r)}{html.escape(r.finding)}</p></li>'
        for e, r in found
    )
    count = {v: sum(r.verdict == v for _, r in found) for v in (HOLDS, FAILS, OPEN)}
    models = "; ".join(f"{arm}: {what}" for arm, what in about["arms"].items())
    sections = "".join(
        _section(e, r, c, e.detects(about["seeds"], about["tunings"])) for (e, r), c in zip(found, commands, strict=True)
    )
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>GPT against BERT, under control</title><style>{STYLE}</style></head><body>
<h1>GPT against BERT, under control</h1>
<p>An essay of June 2020 made claims about the two families of language models. Here each is measured on models that
differ in nothing but which way they read and what they are asked: same text in the same order, same tokenizer, same
size, same optimizer, same number of tokens.</p>
<p><b>Of {len(found)} claims {count[HOLDS]} hold here, {count[FAILS]} do not, and {count[OPEN]} {"is" if count[OPEN] == 1 else "are"} not decided.</b>
“Here” is a toy: {html.escape(about["scale"])} What it says of models a thousand times larger is a question, not an answer;
beside each claim stands what others found there.</p>
<ul class="claims">{claims}</ul>
<p class="soft">A claim counts as held, or not, only where a 95 % interval leaves out the other answer; no correction is
made for there being several claims. {html.escape(INTERVALS)} The models: {html.escape(models)}.</p>
{sections}
<p class="soft">Made by <code>bothways compare{html.escape(about["options"])}</code>. The same figures, for machines:
<code>report.json</code>. Measured with {html.escape("; ".join(about["made"]))}.</p>
</body></html>
"""
    (home / "report.html").write_text(page)
    values = [
        dataclasses.asdict(e, dict_factory=lambda pairs: {k: v for k, v in pairs if k not in ("run", "pilots")})
        | {k: v for k, v in dataclasses.asdict(r).items() if k != "pictures"}
        | {"command": c}
        for (e, r), c in zip(found, commands, strict=True)
    ]
    (home / "report.json").write_text(json.dumps({**about, "intervals": INTERVALS, "experiments": values}, indent=1))
    return home / "report.html", home / "report.json"
