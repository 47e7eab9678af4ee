"""The report's page: HTML and style, with Jinja's blanks. `STYLE` is shared by other pages.

A Python string because a Flower app bundle carries no `.html` files (`flwr` allows .py, .md,
.toml, .yaml and .json), and a server deployed with `flwr run` writes reports too.
"""

STYLE = """\
:root {
  --page: #f5f6f8; --card: #fff; --ink: #1f2328; --soft: #59636e; --line: #e2e5ea; --track: #edeff2;
  --student: #0072b2; --ensemble: #e69f00; --teacher: #8a929a; --oracle: #009e73;
  --ceiling: #cc79a7; --pseudo: #d55e00; --worst: #56b4e9; --good: #dcf3ea; --good-ink: #00563f;
  --warn: #fdf0d5; --warn-ink: #7a4d00; --shadow: 0 1px 2px rgb(20 30 40 / 7%);
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171b; --card: #1e2227; --ink: #e6e9ec; --soft: #9aa4af; --line: #333a42;
    --track: #2b3138; --student: #3d9fd9; --good: #12382c; --good-ink: #8fdcc0; --warn: #40300c;
    --warn-ink: #f3cf8a; --shadow: none;
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
.partial, .degraded { background: var(--warn); color: var(--warn-ink); }
.big { text-align: right; }
.big b { display: block; font-size: 64px; line-height: 1; letter-spacing: -.04em;
  color: var(--student); font-weight: 700; }
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
.figure { background: #fff; border-radius: 8px; overflow-x: auto; }
.figure svg { display: block; width: 100%; height: auto; max-height: 1300px; }
.who td:first-child { white-space: nowrap; }
.figure text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, sans-serif !important; }
.figure image { image-rendering: pixelated; }
.caption { font-size: 13.5px; margin-top: 10px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums;
  font-size: 14px; }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: 12.5px; }
th, td { padding: 6px 12px 6px 0; border-bottom: 1px solid var(--line); vertical-align: middle; }
tr:last-child td { border-bottom: 0; }
th:last-child, td:last-child { padding-right: 0; }
.n { text-align: right; white-space: nowrap; }
.reason { overflow-wrap: anywhere; min-width: 16ch; }
tfoot td { font-weight: 600; border-top: 2px solid var(--line); }
.key { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 8px;
  background: var(--c, var(--teacher)); }
.bar { width: 34%; min-width: 90px; }
.bar i { display: block; height: 10px; border-radius: 5px; background: var(--track);
  overflow: hidden; }
.bar i::before { content: ""; display: block; height: 100%; width: var(--w); border-radius: 5px;
  background: var(--c, var(--teacher)); }
.slim { width: 18%; min-width: 60px; }
.student { --c: var(--student); } .ensemble { --c: var(--ensemble); }
.oracle { --c: var(--oracle); } .ceiling { --c: var(--ceiling); }
.pseudo { --c: var(--pseudo); } .worst { --c: var(--worst); }
tr.student td { font-weight: 700; font-size: 15.5px; }
tr.student .from, tr.student small { font-weight: 400; font-size: 14px; }
tr.minor .key { visibility: hidden; }
details { margin-top: 16px; }
details:first-child { margin-top: 0; }
details > summary { cursor: pointer; color: var(--soft); font-size: 14px; font-weight: 600; }
details[open] > summary { margin-bottom: 12px; }
pre { background: var(--track); border-radius: 8px; padding: 14px 16px; overflow-x: auto;
  font-size: 12.5px; line-height: 1.45; margin: 0; }
.note { background: var(--warn); color: var(--warn-ink); border-radius: 10px; padding: 10px 16px;
  margin-top: 18px; font-size: 14px; overflow-wrap: anywhere; }
footer { margin-top: 40px; font-size: 13px; color: var(--soft); overflow-wrap: anywhere; }
@media (max-width: 820px) {
  .grid, .lone { grid-template-columns: minmax(0, 1fr); }
  .wide .figure svg { min-width: 760px; }
  .big { text-align: left; }
  main { padding: 20px 14px 40px; }
  .card { padding: 14px; }
}
@media (max-width: 560px) {
  .from { display: none; }
  .who td:first-child { white-space: normal; }
  .big b { font-size: 52px; }
  .tiles { grid-template-columns: 1fr 1fr; }
}
@media print {
  body { background: #fff; }
  nav { display: none; }
  .card { break-inside: avoid; box-shadow: none; }
}
"""

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
<title>{{ experiment.name }} · seed {{ experiment.seed }} · fedkd</title>
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
    <div class="badges">
      <span class="badge {{ state.kind }}">{{ state.text }}</span>
      {% if state.degraded %}
      <span class="badge degraded">no quorum in round {{ state.degraded|join(", ") }}</span>
      {% endif %}
      <span>seed {{ experiment.seed }}</span><span>{{ date }}</span>
    </div>
    <h1>{{ experiment.name }}</h1>
    <p class="sentence">{{ sentence }}</p>
  </div>
  {% if headline[0].value is not none %}
  <div class="big"><b>{{ headline[0].value|percent }}</b>
    <span class="soft">student, test accuracy</span></div>
  {% endif %}
</header>

{% if tiles %}
<div class="tiles">
  {% for label, value, remark in tiles %}
  <div class="card"><span>{{ label }}</span><b>{{ value }}</b><small>{{ remark }}</small></div>
  {% endfor %}
</div>
{% endif %}

<nav aria-label="Sections">
  <a href="#results">Results</a>
  {% for key, title, cards in sections %}<a href="#{{ key }}">{{ title }}</a>{% endfor %}
  {% if privacy %}<a href="#privacy">Privacy</a>{% endif %}
  <a href="#left-out">Left out</a>
  <a href="#config">Config</a>
</nav>

{% if data_problem %}
<p class="note">The images could not be loaded, so pictures that need them are missing:
  {{ data_problem }}</p>
{% endif %}

<h2 id="results">Results</h2>
<div class="card scroll">
  <table class="who">
    <thead><tr><th>who</th><th class="from">learnt from</th><th class="n">accuracy</th>
      <th></th></tr></thead>
    <tbody>
    {% for row in headline %}
    <tr class="{{ row.kind }}">
      <td><span class="key"></span>{{ row.name }}
        {%- if row.model %} <small>· {{ row.model }}</small>{% endif %}</td>
      <td class="from soft">{{ row.from }}</td>
      <td class="n">{{ row.value|percent }}</td>
      <td class="bar"><i style="--w: {{ row.value|bar }}"></i></td>
    </tr>
    {% endfor %}
    </tbody>
  </table>
  <details {% if teachers|length <= many %}open{% endif %}>
    <summary>The {{ teachers|length }} teachers</summary>
    <table>
      <thead><tr><th>client</th><th>model</th><th class="n">images</th>
        <th class="n">classes</th><th class="n">teacher, test</th><th class="from"></th>
        <th class="n">say</th><th class="from"></th>
        <th class="n">student, held-out</th><th class="from"></th></tr></thead>
      <tbody>
      {% for row in teachers %}
      <tr>
        <td>{{ row.client }}</td><td>{{ row.model }}</td>
        <td class="n">{{ row.images|known }}</td>
        <td class="n">{{ row.classes|known }}</td>
        <td class="n">{{ row.accuracy|percent }}</td>
        <td class="bar slim from"><i style="--w: {{ row.accuracy|bar }}"></i></td>
        <td class="n">{{ row.weight|percent }}</td>
        <td class="bar slim from"><i style="--w: {{ row.weight|bar }}"></i></td>
        <td class="n">{{ row.holdout|percent }}</td>
        <td class="bar slim student from"><i style="--w: {{ row.holdout|bar }}"></i></td>
      </tr>
      {% endfor %}
      </tbody>
    </table>
    <p class="caption">A teacher is judged on the public test images; the student also, by each
      client for itself, on private images that the client held out from training. Say: the
      teacher's part in the fused labels of the last round.</p>
  </details>
</div>

{% for key, title, cards in sections %}
<h2 id="{{ key }}">{{ title }}</h2>
<div class="grid">
  {% for card in cards %}
  <section class="card{{ ' wide' if card.wide }}{{ ' lone' if card.lone }}">
    <h3>{{ card.title }}</h3>
    {% if card.picture %}
    <div class="figure" role="img" aria-label="{{ card.title }}">{{ card.picture }}</div>
    {% endif %}
    <p class="caption">{{ card.caption }}</p>
  </section>
  {% endfor %}
  {% if key == "costs" and traffic.phases %}
  <section class="card">
    <h3>Bytes in total</h3>
    <table>
      <thead><tr><th>phase</th><th class="n">to clients</th><th class="n">from clients</th></tr>
      </thead>
      <tbody>
      {% for phase, size in traffic.phases.items() %}
      <tr><td>{{ phase }}{% if phase == "evaluate" %} <small>· measurement</small>{% endif %}</td>
        <td class="n">{{ size.down|bytes }}</td><td class="n">{{ size.up|bytes }}</td></tr>
      {% endfor %}
      </tbody>
      <tfoot><tr><td>total</td><td class="n">{{ traffic.total.down|bytes }}</td>
        <td class="n">{{ traffic.total.up|bytes }}</td></tr></tfoot>
    </table>
    <p class="caption">For scale:
      {% if traffic.transfer %}the {{ "{:,}".format(traffic.images) }} images of the transfer set
      are {{ traffic.transfer|bytes }} (uint8), sent to a client once if it does not have them.
      {% endif %}
      {% if traffic.weights %}The student's weights are {{ traffic.weights|bytes }}; averaging
      weights would move twice that per client and round.{% endif %}</p>
  </section>
  <section class="card wide">
    <details {% if traffic.clients|length <= many %}open{% endif %}>
      <summary>Bytes per client ({{ traffic.clients|length }} clients)</summary>
      <div class="scroll">
      <table>
        <thead><tr><th>client</th>
          {% for phase in traffic.columns %}
          <th class="n">{{ phase }} ↓ to</th><th class="n">{{ phase }} ↑ from</th>
          {% endfor %}
          <th class="n">all ↓</th><th class="n">all ↑</th></tr></thead>
        <tbody>
        {% for client, sizes in traffic.clients.items() %}
        <tr><td>{{ client }}</td>
          {% for phase in traffic.columns %}
          <td class="n">{{ sizes.get(phase ~ " down", 0)|bytes }}</td>
          <td class="n">{{ sizes.get(phase ~ " up", 0)|bytes }}</td>
          {% endfor %}
          <td class="n">{{ sizes.down|bytes }}</td><td class="n">{{ sizes.up|bytes }}</td></tr>
        {% endfor %}
        </tbody>
      </table>
      </div>
    </details>
  </section>
  {% endif %}
</div>
{% endfor %}

{% if privacy %}
<h2 id="privacy">Privacy</h2>
<div class="card scroll">
  <table>
    <tr><th>protected</th><td>{{ privacy.protects }}</td></tr>
    <tr><th>against</th><td>{{ privacy.against }}</td></tr>
    <tr><th>assumed</th><td>{{ privacy.assumes }}</td></tr>
    <tr><th>promised</th><td>epsilon {{ "%.4g"|format(privacy.budget) }} per client for the whole
      run{% if privacy.delta %}, delta {{ "%.0e"|format(privacy.delta) }}{% endif %}</td></tr>
    <tr><th>how</th><td>{{ privacy.mechanism }}: {{ privacy.how }}</td></tr>
  </table>
  <table>
    <thead><tr><th>clients</th><th class="n">epsilon spent</th><th class="n">of the budget</th>
      <th>rounds without training: budget spent</th></tr></thead>
    <tbody>
    {% for row in privacy.rows %}
    <tr><td>{{ row.clients }}</td><td class="n">{{ row.epsilon }}</td>
      <td class="n">{{ row.share|percent }}</td><td>{{ row.frozen or "none" }}</td></tr>
    {% endfor %}
    </tbody>
  </table>
  <p class="caption">How many images of which class a client has stays with the client, and out of
    this page. Not protected: that a client takes part, and what else it sends about itself.
    Accuracy on the public test set costs nothing.</p>
</div>
{% endif %}

<h2 id="left-out">Left out</h2>
<div class="card scroll">
  {% if refused %}
  <table>
    <thead><tr><th class="n">round</th><th>phase</th><th class="n">client</th><th>reason</th></tr>
    </thead>
    <tbody>
    {% for record in refused %}
    <tr><td class="n">{{ record.round }}</td><td>{{ record.phase }}</td>
      <td class="n">{{ record.client|known }}</td>
      <td class="reason">{{ record.reason }}</td></tr>
    {% endfor %}
    </tbody>
  </table>
  {% if refused_more %}<p class="caption">… and {{ refused_more }} more in metrics.jsonl.</p>
  {% endif %}
  {% else %}
  <p class="soft">{{ "Nothing: every answer that was asked for came and was accepted." if asked
    else "Nothing: no client has been asked yet." }}</p>
  {% endif %}
  {% for text in warnings %}<p class="note">{{ text }}</p>{% endfor %}
</div>

<h2 id="config">Config and versions</h2>
<div class="card">
  <details><summary>Resolved config</summary><pre>{{ config }}</pre></details>
  <details><summary>Versions</summary>
    <table>{% for name, version in versions.items() %}
      <tr><td>{{ name }}</td><td>{{ version }}</td></tr>
    {% endfor %}</table>
  </details>
</div>
<footer>{{ identity }}{% if hash %} · student {{ hash }}{% endif %}</footer>
</main>
</body>
</html>
"""
)
