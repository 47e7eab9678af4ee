"""The page of a comparison or an ablation: HTML with Jinja's blanks."""

from fedkd.reporting.template import STYLE

PAGE = (
    """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="color-scheme" content="light dark">
<title>{{ name }} · fedkd</title>
<style>
"""
    + STYLE
    + """\
td small { display: block; color: var(--soft); font-weight: 400; overflow-wrap: anywhere; }
tr.ours td:first-child { font-weight: 700; --c: var(--student); }
td.top { font-weight: 700; }
.what td:first-child { min-width: 17ch; }
.failed { color: var(--warn-ink); }
</style>
</head>
<body>
<main>
<header>
  <div>
    <div class="badges"><span class="badge {{ state.kind }}">{{ state.text }}</span>
      <span>{{ seeds }}</span><span>{{ date }}</span></div>
    <h1>{{ name }}</h1>
    <p class="sentence">{{ sentence }}</p>
  </div>
  {% if best %}
  <div class="big"><b>{{ best.value }}</b>
    <span class="soft">{{ best.name }}, last round</span></div>
  {% endif %}
</header>

<nav aria-label="Sections">
  {% for section in sections %}<a href="#{{ section.key }}">{{ section.title }}</a>{% endfor %}
  <a href="#config">Config</a>
</nav>
{% for text in failures %}<p class="note">{{ text }}</p>{% endfor %}

{% for section in sections %}
<h2 id="{{ section.key }}">{{ section.title }}</h2>
{% for card in section.cards %}
<section class="card scroll"{% if not loop.first %} style="margin-top: 18px"{% endif %}>
  {% if card.title %}<h3>{{ card.title }}</h3>{% endif %}
  {% if card.picture %}
  <div class="figure" role="img" aria-label="{{ card.title or section.title }}">
    {{- card.picture -}}
  </div>
  {% endif %}
  {% if card.rows %}
  <table class="what">
    <thead><tr>{% for title, is_number in card.header %}
      <th{% if is_number %} class="n"{% endif %}>{{ title }}</th>{% endfor %}</tr></thead>
    <tbody>
    {% for row in card.rows %}
    <tr{% if row.ours %} class="ours"{% endif %}>
      {% for cell in row.words %}
      <td>{% if loop.first and row.key %}<span class="key"></span>{% endif %}{{ cell }}
        {%- if loop.first and row.about %}<small>{{ row.about }}</small>{% endif %}</td>
      {% endfor %}
      {% for cell in row.numbers %}
      <td class="n{{ ' top' if cell.top }}{{ ' soft' if not cell.top }}">{{ cell.text }}</td>
      {% endfor %}
    </tr>
    {% endfor %}
    </tbody>
  </table>
  {% endif %}
  <p class="caption">{{ card.caption }}</p>
</section>
{% endfor %}
{% endfor %}

<h2 id="config">Config and versions</h2>
<div class="card">
  <details><summary>Resolved config</summary><pre>{{ config }}</pre></details>
  <details><summary>Versions</summary>
    <table>{% for package, version in versions.items() %}
      <tr><td>{{ package }}</td><td>{{ version }}</td></tr>
    {% endfor %}</table>
  </details>
</div>
<footer>{{ identity }}</footer>
</main>
</body>
</html>
"""
)
