"""The page of a study: HTML with Jinja's blanks."""

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
<title>{{ study.name }} · fedkd</title>
<style>
"""
    + STYLE
    + """\
tr.baseline td { color: var(--soft); }
td small { display: block; color: var(--soft); font-weight: 400; }
.lead { font-weight: 700; }
.methods td:first-child { min-width: 18ch; }
</style>
</head>
<body>
<main>
<header>
  <div>
    <div class="badges">
      <span class="badge {{ state.kind }}">{{ state.text }}</span>
      <span>{{ seeds }}</span><span>{{ date }}</span>
    </div>
    <h1>{{ study.name }}</h1>
    <p class="sentence">{{ sentence }}</p>
  </div>
  {% if best %}
  <div class="big"><b>{{ best.value|spread }}</b>
    <span class="soft">{{ best.name }}, last epoch</span></div>
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
  <a href="#results">Results</a><a href="#curves">Learning curves</a>
  {% if details %}<a href="#terms">Losses</a>{% endif %}<a href="#config">Config</a>
</nav>

<h2 id="results">Results</h2>
<div class="card scroll">
  <table class="methods">
    <thead><tr><th>method</th><th class="n">last epoch</th><th class="n">over student</th>
      <th class="n">share of the gap</th><th class="n">best epoch</th><th class="n">seeds</th>
      <th class="n">images/s</th><th class="n">training</th></tr></thead>
    <tbody>
    {% for row in teachers %}
    <tr>
      <td><span class="key" style="--c: var(--ensemble)"></span>{{ row.name }}
        <small>{{ row.about }}</small></td>
      <td class="n">{{ row.last|spread }}</td><td></td><td></td>
      <td class="n soft">{{ row.best|spread }}</td><td></td>
      <td class="n soft">{{ row.images_per_second|rate }}</td>
      <td class="n soft">{{ row.seconds|duration }}</td>
    </tr>
    {% endfor %}
    {% for row in methods %}
    <tr{% if row.baseline %} class="baseline"{% endif %}>
      <td><span class="key" style="--c: {{ 'var(--teacher)' if row.baseline else
        'var(--student)' }}"></span><span class="lead">{{ row.name }}</span>
        <small>{{ row.about }}</small></td>
      <td class="n lead">{{ row.last|spread }}</td>
      <td class="n">{{ row.gain }}</td><td class="n">{{ row.share }}</td>
      <td class="n soft">{{ row.best|spread }}</td>
      <td class="n soft">{{ row.seeds }}</td>
      <td class="n soft">{{ row.images_per_second|rate }}</td>
      <td class="n soft">{{ row.seconds|duration }}</td>
    </tr>
    {% endfor %}
    </tbody>
  </table>
  <p class="caption">Test accuracy, mean ± sample standard deviation over seeds. <b>Last epoch</b>
    involves no choice. <b>Best epoch</b> is each run's best test accuracy, so it is chosen on the
    test set: published tables do the same, and it flatters. The gain has its 95 % confidence
    interval (paired by seed, Student's t). The share of the gap is the gain over
    the student alone, divided by the teacher's lead over it. Images per second and training time
    are one network's, without evaluation; a method with assistants trains them besides.</p>
</div>
<div class="grid">
  <section class="card wide" style="margin-top: 18px">
    <h3>Methods between student and teacher</h3>
    {% if overview %}
    <div class="figure" role="img" aria-label="Accuracy of each method">{{ overview }}</div>
    {% else %}<p class="caption">No student has finished yet.</p>{% endif %}
  </section>
</div>

<h2 id="curves">Learning curves</h2>
<div class="card">
  {% if curves %}
  <div class="figure" role="img" aria-label="Accuracy per epoch">{{ curves }}</div>
  <p class="caption">Test accuracy per epoch: the method in blue (mean, and from lowest to highest
    seed), the student alone in grey, the best teacher as a line.</p>
  {% else %}<p class="caption">No epoch has finished yet.</p>{% endif %}
</div>

{% if details %}
<h2 id="terms">Losses</h2>
<div class="grid">
  {% for card in details %}
  <section class="card">
    <h3>{{ card.name }} <small>seed {{ card.seed }}</small></h3>
    <details{% if details|length <= 4 %} open{% endif %}><summary>{{ card.about }}</summary>
      <div class="figure" role="img" aria-label="Loss terms">{{ card.terms }}</div>
      {% if card.pulls %}
      <div class="figure" role="img" aria-label="Gradients">{{ card.pulls }}</div>
      {% endif %}
    </details>
  </section>
  {% endfor %}
</div>
<p class="caption">Each term before its weight. The pull is the length of the weighted term's
  gradient on the student, in the first batch of every epoch, as a share of all: a term with a
  sliver does not steer, whatever its loss says.</p>
{% endif %}

<h2 id="config">Config and versions</h2>
<div class="card">
  <details><summary>Resolved config</summary><pre>{{ config }}</pre></details>
  <details><summary>Versions</summary>
    <table>{% for name, version in versions.items() %}
      <tr><td>{{ name }}</td><td>{{ version }}</td></tr>
    {% endfor %}</table>
  </details>
</div>
<footer>{{ identity }}</footer>
</main>
</body>
</html>
"""
)
