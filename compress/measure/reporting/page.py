"""The template of the report's page (jinja2)."""

__all__ = ["PAGE"]

_STYLE = """
:root { color-scheme: light dark;
  --bg: #ffffff; --fg: #1c2430; --muted: #5d6876; --line: #d9dee5; --card: #f5f7fa;
  --series-0: #2563c9; --series-1: #c2700f; --series-2: #1f8a5b; --series-3: #9a4bb8; --series-4: #c33d4b;
  --series-5: #66707c; }
@media (prefers-color-scheme: dark) { :root {
  --bg: #14181e; --fg: #e8ecf1; --muted: #9aa5b3; --line: #333b46; --card: #1d232b;
  --series-0: #6ea4ff; --series-1: #eaa24a; --series-2: #57c792; --series-3: #cf8be8; --series-4: #f27f88;
  --series-5: #a3adb9; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--fg);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 28px 64px; }
h1 { margin: 0; font-size: 26px; line-height: 1.2; }
h2 { margin: 44px 0 12px; font-size: 17px; }
.sub, .note, figcaption, .gain span { color: var(--muted); font-size: 13.5px; }
.sub { margin: 4px 0 0; }
code { font: 13px ui-monospace, "SF Mono", Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.gains { display: grid; grid-template-columns: repeat(auto-fit, minmax(210px, 1fr)); gap: 14px; margin: 28px 0 0; }
.gain { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px; }
.gain b { display: block; font-size: 38px; line-height: 1.1; letter-spacing: -0.02em; }
.gain em { display: block; margin: 4px 0 2px; font-style: normal; font-weight: 600; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th { color: var(--muted); font-weight: 500; text-align: right; padding: 6px 9px; vertical-align: bottom; }
td { text-align: right; padding: 7px 9px; white-space: nowrap; border-top: 1px solid var(--line); }
th.text, td.text { text-align: left; }
thead tr:first-child th.group { text-align: center; padding-bottom: 0; }
th:first-child, td:first-child { padding-left: 0; }
th:last-child, td:last-child { padding-right: 0; }
tr.more td { border-top: 0; padding-top: 0; color: var(--muted); }
tr.last td { font-weight: 600; background: var(--card); }
td.stage::before { content: ""; display: inline-block; width: 9px; height: 9px; margin: 0 8px 0 4px; border-radius: 50%;
  background: var(--color, transparent); }
figure { margin: 0; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif !important; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 3px 20px; margin: 0; font-size: 13.5px; }
dt { color: var(--muted); }
dd { margin: 0; overflow-wrap: anywhere; }
ul { margin: 0; padding-left: 18px; font-size: 13.5px; }
@media print { main { padding: 0; } h2 { break-after: avoid; } figure, .gain { break-inside: avoid; } }
"""

PAGE = (
    """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ report.recipe }}: {{ report.stages[0].name }} to {{ report.stages[-1].name }}</title>
<style>"""
    + _STYLE
    + """</style>
</head>
<body>
<main>
<h1>{{ report.recipe }}</h1>
<p class="sub">{{ report.stages[-1].name }} against {{ report.stages[0].name }} · seed {{ report.seed }} ·
<code>{{ report.command }}</code></p>
<div class="gains">
{% for gain in gains %}
<div class="gain"><b>{{ gain.figure }}</b><em>{{ gain.words }}</em><span>{{ gain.detail }}</span></div>
{% endfor %}
</div>

<h2>Stages</h2>
<div class="scroll">
<table>
<thead>
<tr><th class="text" rowspan="2">stage</th><th rowspan="2">{{ report.task_metric }}</th><th rowspan="2">params</th>
<th rowspan="2">MACs</th><th rowspan="2">on disk</th><th rowspan="2">peak memory</th>
<th class="text" rowspan="2">engine</th><th rowspan="2">threads</th>
{% for batch in report.batches %}
<th class="group" colspan="2">batch {{ batch }}, ms</th>
{% endfor %}
</tr>
<tr>
{% for batch in report.batches %}
<th>p50</th><th>p95</th>
{% endfor %}
</tr>
</thead>
<tbody>
{% for row in rows %}
<tr class="{{ 'more' if not row.stage else 'last' if row.stage == report.stages[-1].name else '' }}">
{% if row.stage %}
<td class="text stage" style="--color: var(--series-{{ colors[row.stage] }})">{{ row.stage }}</td>
{% else %}
<td></td>
{% endif %}
<td>{{ row.metric }}</td><td>{{ row.num_params }}</td><td>{{ row.macs }}</td><td>{{ row.bytes }}</td>
<td>{{ row.peak_memory }}</td><td class="text">{{ row.engine }}</td><td>{{ row.threads }}</td>
{% for p50, p95 in row.latency %}
<td>{{ p50 }}</td><td>{{ p95 }}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table>
</div>
{% if artifact_bytes %}
<p class="note">On disk: the files that the serving engines load; the whole artefact, with all its engines, has
{{ artifact_bytes }}.</p>
{% endif %}

{% if target %}
<h2>Wanted and reached</h2>
<div class="scroll">
<table>
<thead><tr><th class="text">pruned for</th><th>before</th><th>wanted, at most</th><th>reached</th>
<th class="text">engine</th></tr></thead>
<tbody><tr><td class="text">{{ target.name }}</td><td>{{ target.original }}</td><td>{{ target.wanted }}</td>
<td>{{ target.reached }}</td>
<td class="text">{{ target.engine }}</td></tr></tbody>
</table>
</div>
{% endif %}

{% if picture %}
<h2>{{ report.task_metric | capitalize }}, latency and size</h2>
<figure>{{ picture }}<figcaption>Up and left is better; a smaller area is a smaller file.</figcaption></figure>
{% endif %}

{% if training %}
<h2>Training</h2>
<figure>{{ training }}</figure>
{% endif %}

{% if widths %}
<h2>Widths of the layers</h2>
<figure>{{ widths }}<figcaption>Output channels before and after pruning.</figcaption></figure>
{% endif %}

{% if sensitivity %}
<h2>Sensitivity of the layers</h2>
<figure>{{ sensitivity }}<figcaption>The network of stage {{ report.sensitivity.stage }} on the validation split, with
the least important units of one layer at a time ({{ report.sensitivity.criterion }}) silent and nothing trained
after it{{ missing_points }}.</figcaption></figure>
{% endif %}

{% if bits %}
<h2>Bits of the layers</h2>
<figure>{{ bits }}<figcaption>The network of stage {{ report.bits.stage }} on the validation split, with the weights of
one layer at a time at few bits and nothing trained after it{% if report.bits.chosen %}; circles are the bits that meet
the target with the least loss in sum{% endif %}.</figcaption></figure>
{% endif %}

{% if mixed %}
<h2>Integers or floats, layer by layer</h2>
<figure>{{ mixed }}<figcaption>The network of stage {{ report.mixed.stage }}, quantised after training, with one layer
at a time in floats: what a call on {{ report.mixed.engine }} takes more, and what the validation loss falls by
{%- if report.mixed.reached %}. With the chosen layers in floats a call takes {{ mixed_ms.reached }} ms, where
{{ mixed_ms.wanted }} were asked for; {{ mixed_ms.integers }} with every layer in integers, {{ mixed_ms.floats }} with
none{% endif %}.</figcaption></figure>
{% endif %}

{% if report.notes %}
<h2>How it was measured</h2>
<ul>
{% for note in report.notes %}
<li>{{ note }}</li>
{% endfor %}
</ul>
{% endif %}

{% if report.machine %}
<h2>Machine</h2>
<dl>
{% for key, value in report.machine.items() %}
<dt>{{ key.replace("_gib", ", GiB").replace("_", " ") }}</dt><dd>{{ value }}</dd>
{% endfor %}
</dl>
{% endif %}
</main>
</body>
</html>
"""
)
