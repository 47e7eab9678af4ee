"""The one page of the project: HTML and style, with Jinja's blanks (`fedkd.reporting.page`).

A Python string because a Flower app bundle carries no `.html` files (`flwr` allows .py, .md,
.toml, .yaml and .json), and a server deployed with `flwr run` writes reports too.
"""

from fedkd.reporting.script import DIGEST, SCRIPT

STYLE = """\
:root {
  --page: #f5f6f8; --card: #fff; --ink: #1f2328; --soft: #59636e; --line: #e2e5ea; --track: #edeff2;
  --student: #0072b2; --ensemble: #e69f00; --teacher: #8a929a; --oracle: #009e73;
  --ceiling: #cc79a7; --pseudo: #d55e00; --worst: #56b4e9; --good: #dcf3ea; --good-ink: #00563f;
  --warn: #fdf0d5; --warn-ink: #7a4d00; --shadow: 0 1px 2px rgb(20 30 40 / 7%);
  --edge: #aab1b9; --pale: #cfd4da; --deep: rgb(20 30 40 / 22%);
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171b; --card: #1e2227; --ink: #e6e9ec; --soft: #9aa4af; --line: #333a42;
    --track: #2b3138; --student: #3d9fd9; --good: #12382c; --good-ink: #8fdcc0; --warn: #40300c;
    --warn-ink: #f3cf8a; --shadow: none; --edge: #5b6570; --pale: #59636e;
    --deep: rgb(0 0 0 / 70%); --oracle: #2bbf95; --pseudo: #ee7d35;
  }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; }
body {
  margin: 0; background: var(--page); color: var(--ink); line-height: 1.5; font-size: 15px;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
main { max-width: 1180px; margin: 0 auto; padding: 28px 20px 60px; }
header { display: flex; flex-wrap: wrap; gap: 20px 40px; align-items: flex-end; }
header > div:first-child { flex: 1 1 420px; min-width: 0; }
h1 { font-size: 30px; line-height: 1.15; margin: 6px 0 8px; letter-spacing: -.02em;
  overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 44px 0 14px; letter-spacing: -.01em; }
h3 { font-size: 15px; margin: 0 0 10px; }
p { margin: 0; }
.soft, .caption, small { color: var(--soft); }
.sentence { max-width: 68ch; color: var(--soft); }
.badges { display: flex; flex-wrap: wrap; gap: 8px; font-size: 13px; align-items: center;
  color: var(--soft); }
.badge { border-radius: 99px; padding: 2px 11px; font-weight: 600; }
.complete { background: var(--good); color: var(--good-ink); }
.partial { background: var(--warn); color: var(--warn-ink); }
.big { text-align: right; }
.big b { display: block; font-size: clamp(36px, 5.2vw, 60px); line-height: 1;
  letter-spacing: -.04em; color: var(--student); font-weight: 700; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 14px;
  margin-top: 24px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  padding: 18px 20px; box-shadow: var(--shadow); min-width: 0; }
.tiles .card { padding: 13px 16px; }
.tiles b { display: block; font-size: 22px; letter-spacing: -.02em; }
.tiles span, .tiles small { display: block; font-size: 13px; color: var(--soft); }
nav { display: flex; flex-wrap: wrap; gap: 6px 18px; margin-top: 22px; font-size: 14px;
  padding-bottom: 10px; border-bottom: 1px solid var(--line); }
nav a { color: var(--soft); text-decoration: none; }
nav a:hover { color: var(--student); }
.grid { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 18px;
  align-items: stretch; }
.wide { grid-column: 1 / -1; }
.lone { grid-column: 1 / -1; display: grid; column-gap: 28px; align-items: center;
  grid-template-columns: repeat(2, minmax(0, 1fr)); }
.lone h3 { grid-column: 1 / -1; }
.lone .caption:nth-child(2) { grid-column: 1 / -1; margin: 0; }
.figure, .scroll { overflow-x: auto; }
.scroll, .figure { background:
  linear-gradient(90deg, var(--card) 40%, transparent) 0 0 / 36px 100% no-repeat local,
  linear-gradient(-90deg, var(--card) 40%, transparent) 100% 0 / 36px 100% no-repeat local,
  radial-gradient(farthest-side at 0 50%, var(--deep), transparent) 0 0 / 12px 100% no-repeat,
  radial-gradient(farthest-side at 100% 50%, var(--deep), transparent) 100% 0 / 12px 100% no-repeat;
}
.cut::before { content: "scroll sideways \\2192"; display: block; position: sticky; left: 0;
  width: max-content; font-size: 12px; color: var(--soft); padding-bottom: 4px; }
.figure text { fill: var(--ink); }
.figure .switch { cursor: pointer; }
.ring { fill: none; stroke: var(--ink); stroke-width: 1.5; pointer-events: none; }
.tip { position: absolute; z-index: 9; max-width: 320px; padding: 3px 9px; border-radius: 6px;
  background: var(--ink); color: var(--page); font-size: 13px; pointer-events: none; }
:focus-visible { outline: 2px solid var(--student); outline-offset: 2px; }
.tools { display: flex; gap: 10px; justify-content: flex-end; align-items: center;
  margin-bottom: 4px; }
button, input[type=search] { font: inherit; font-size: 12.5px; color: var(--soft);
  background: none; border: 1px solid var(--line); border-radius: 6px; padding: 1px 9px; }
button { cursor: pointer; }
button:hover { color: var(--student); }
input[type=search] { flex: 0 1 240px; margin-right: auto; padding: 4px 9px; color: var(--ink); }
button.sort { border: 0; padding: 0; font-weight: 600; text-align: inherit; }
th[aria-sort=ascending] .sort::after { content: " \\2191"; }
th[aria-sort=descending] .sort::after { content: " \\2193"; }
.choose { display: flex; flex-wrap: wrap; gap: 8px 16px; margin-bottom: 12px; font-size: 13px; }
select { font: inherit; max-width: 100%; color: var(--ink); background: var(--card);
  border: 1px solid var(--line); border-radius: 6px; padding: 3px 6px; }
td input { margin: 0 6px 0 0; vertical-align: middle; }
td a { color: var(--student); }
.figure svg { display: block; width: 100%; height: auto; max-width: calc(var(--inches) * 130px);
  min-width: calc(var(--inches) * 70px); }
.figure text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, sans-serif !important; }
.figure image { image-rendering: pixelated; }
.caption { font-size: 13.5px; margin-top: 10px; }
.caption:first-child { margin-top: 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums;
  font-size: 14px; }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: 12.5px; }
th, td { padding: 6px 12px 6px 0; border-bottom: 1px solid var(--line); vertical-align: middle; }
tr:last-child td { border-bottom: 0; }
th:last-child, td:last-child { padding-right: 0; }
td small { display: block; font-weight: 400; overflow-wrap: anywhere; }
td { overflow-wrap: break-word; }
td.first { min-width: 17ch; }
.n { text-align: right; }
td.n, td.name { white-space: nowrap; }
.strong, .strong td { font-weight: 700; }
td.soft, tr.soft td { color: var(--soft); }
tr.total td { font-weight: 600; border-top: 2px solid var(--line); }
.key { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 8px;
  background: var(--c, var(--teacher)); }
.bar { width: 34%; min-width: 90px; }
.bar i { display: block; height: 10px; border-radius: 5px; background: var(--track);
  overflow: hidden; }
.bar i::before { content: ""; display: block; height: 100%; width: var(--w); border-radius: 5px;
  background: var(--c, var(--teacher)); }
.student { --c: var(--student); } .ensemble { --c: var(--ensemble); }
.oracle { --c: var(--oracle); } .ceiling { --c: var(--ceiling); }
.pseudo { --c: var(--pseudo); } .worst { --c: var(--worst); }
tr.minor .key { visibility: hidden; }
details > summary { cursor: pointer; color: var(--soft); font-size: 14px; font-weight: 600; }
details[open] > summary { margin-bottom: 12px; }
pre { background: var(--track); border-radius: 8px; padding: 14px 16px; overflow-x: auto;
  font-size: 12.5px; line-height: 1.45; margin: 0; }
.note { background: var(--warn); color: var(--warn-ink); border-radius: 10px; padding: 10px 16px;
  margin-top: 18px; font-size: 14px; overflow-wrap: anywhere; }
footer { margin-top: 40px; font-size: 13px; color: var(--soft); overflow-wrap: anywhere; }
@media (prefers-color-scheme: dark) {
  .figure image { opacity: .9; }
}
@media (max-width: 820px) {
  .grid, .lone { grid-template-columns: minmax(0, 1fr); }
  .figure svg { min-width: calc(var(--inches) * 80px); }
  .big { text-align: left; }
  main { padding: 20px 14px 40px; }
  .card { padding: 14px; }
}
@media (max-width: 560px) {
  .narrow { display: none; }
  td.name { white-space: normal; }
  .tiles { grid-template-columns: 1fr 1fr; }
}
@media print {
  body { background: #fff; }
  nav, .tools, .cut::before { display: none; }
  .card { break-inside: avoid; box-shadow: none; }
}
"""

PAGE = (
    """\
{% macro cells(table, row) %}
{% for column, cell in table.cells_on("page", row) %}
<td class="{{ 'n' if column.number }} {{ column.look }} {{ cell.look }}
  {{- ' strong' if cell.strong }}
  {{- ' bar' if cell.bar is not none }}"
{%- if cell.exact %} data-exact="{{ cell.exact }}" data-unit="{{ cell.unit }}"{% endif %}>
{%- if loop.first and row.key %}<span class="key"></span>{% endif %}
{%- if cell.bar is not none %}<i style="--w: {{ cell.bar|bar }}"></i>
{%- elif cell.link %}<a href="{{ cell.link }}">{{ cell.text }}</a>{% else %}{{ cell.text }}
{%- endif %}
{%- if cell.note %}<small>{{ cell.note }}</small>{% endif %}</td>
{% endfor %}
{% endmacro %}

{% macro table(content, title) %}
<div class="scroll" role="region" tabindex="0" aria-label="{{ title }}"><table>
{% if content.headed %}
<thead><tr>{% for column in content.columns_on("page") %}
<th scope="col" class="{{ 'n' if column.number }} {{ column.look }}">
{{- column.title }}</th>{% endfor %}
</tr></thead>
{% endif %}
<tbody>
{% for row in content.rows %}
<tr class="{{ row.key }} {{ row.look }}"
{%- if row.series %} data-series="{{ row.series }}"{% endif %}>
{{ cells(content, row) }}
</tr>
{% endfor %}
</tbody></table></div>
{% endmacro %}

{% macro inside(card, title) %}
{% for figure in card.figures %}
{% set drawn, values, finding = figure|drawn %}
<div class="figure" role="figure" tabindex="0" aria-label="{{ title }}
{%- if finding %}. {{ finding }}{% endif %}"
{%- if card.first %} data-first="{{ card.first }}"{% endif %}
{%- if values %} data-values='{{ values }}'{% endif %}>{{ drawn }}</div>
{% endfor %}
{% if card.table %}{{ table(card.table, title) }}{% endif %}
{% if card.configs %}<div data-configs='{{ card.configs|json }}'></div>{% endif %}
{% if card.code %}<pre>{{ card.code }}</pre>{% endif %}
{% if card.caption %}<p class="caption">{{ card.caption }}</p>{% endif %}
{% for text in card.notes %}<p class="note">{{ text }}</p>{% endfor %}
{% endmacro %}

<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; img-src data:; """
    + f"script-src 'sha256-{DIGEST}'"
    + """\
">
<meta name="color-scheme" content="light dark">
<title>{{ page.title }} · fedkd</title>
<style>
"""
    + STYLE
    + """\
</style>
</head>
<body>
<main>
<header>
  <div>
    {% if page.state or page.remarks %}
    <div class="badges">
      {% if page.state %}
      <span class="badge {{ 'partial' if page.partial else 'complete' }}">{{ page.state }}</span>
      {% endif %}
      {% if page.warning %}<span class="badge partial">{{ page.warning }}</span>{% endif %}
      {% for text in page.remarks %}<span>{{ text }}</span>{% endfor %}
    </div>
    {% endif %}
    <h1>{{ page.title }}</h1>
    <p class="sentence">{{ page.sentence }}</p>
  </div>
  {% if page.headline %}
  <div class="big"><b>{{ page.headline[0] }}</b>
    <span class="soft">{{ page.headline[1] }}</span></div>
  {% endif %}
</header>

{% if page.tiles %}
<div class="tiles">
  {% for tile in page.tiles %}
  <div class="card"><span>{{ tile.label }}</span><b>{{ tile.value }}</b>
    <small>{{ tile.remark }}</small></div>
  {% endfor %}
</div>
{% endif %}
{% if sections|length > 1 %}
<nav aria-label="Sections">
  {% for section in sections %}<a href="#{{ section.key }}">{{ section.title }}</a>{% endfor %}
</nav>
{% endif %}
{% for text in page.notes %}<p class="note">{{ text }}</p>{% endfor %}

{% for section in sections %}
<h2 id="{{ section.key }}">{{ section.title }}</h2>
<div class="grid">
  {% for card in section.cards %}
  {% set title = card.title or card.fold or section.title %}
  <section class="card{{ ' wide' if card.wide }}{{ ' lone' if card.lone }}">
    {% if card.title %}<h3>{{ card.title }}</h3>{% endif %}
    {% if card.fold %}
    <details{{ ' open' if card.open }}><summary>{{ card.fold }}</summary>
    {{ inside(card, title) }}
    </details>
    {% else %}
    {{ inside(card, title) }}
    {% endif %}
  </section>
  {% endfor %}
</div>
{% endfor %}
<footer>{{ page.footer }}</footer>
</main>
<script>"""
    + SCRIPT
    + """</script>
</body>
</html>
"""
)
