"""The report as a page: what it looks like, and its frame. No scripts, nothing to load."""

STYLE = """
:root {
  color-scheme: light dark;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  --paper: #fbfaf8; --card: #ffffff; --ink: #1d2126; --faint: #646c76; --grid: #e4e4e0; --good: #0b6b4f;
  --mark: #e6f3ee; --teacher: #8a8f98; --bad: #a5283f; --over: #d6455d; --under: #5b8def;
  --shade: #1d212626; --series-1: #2f6bd0; --series-2: #d9722b; --series-3: #14866d; --series-4: #8e4ec6; --series-5: #c2375b;
  --series-6: #8a7500; --salient: #f6b04a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171b; --card: #1b1f25; --ink: #e9ebee; --faint: #9ba4af; --grid: #31373f; --good: #7fd8b8;
    --mark: #17342b; --teacher: #7d8590; --bad: #f28b9c; --over: #f0708a; --under: #86b0ff;
    --shade: #e9ebee30; --series-1: #6ea3f5; --series-2: #f09a5c; --series-3: #4cc2a3; --series-4: #bd8cf0; --series-5: #f07896;
    --series-6: #d2bb4a; --salient: #8a4f00;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 var(--sans); overflow-wrap: break-word; }
main { max-width: 1180px; margin: 0 auto; padding: 56px 24px 72px; }
header { margin-bottom: 36px; }
h1 { font-size: 34px; line-height: 1.15; letter-spacing: -0.02em; margin: 0 0 8px; }
header p { font-size: 18px; color: var(--faint); margin: 0; }
header b { color: var(--ink); }
a { color: var(--series-1); }
section { background: var(--card); border: 1px solid var(--grid); border-radius: 14px; padding: 26px 30px 24px;
  margin-bottom: 22px; }
h2 { font-size: 20px; letter-spacing: -0.01em; margin: 0 0 6px; }
section > p { max-width: 76ch; color: var(--faint); margin: 0 0 18px; font-size: 15px; }
section > p b { color: var(--ink); font-weight: 600; }
h3 { font-size: 15.5px; margin: 30px 0 4px; }
h3 + p { max-width: 76ch; color: var(--faint); margin: 0 0 14px; font-size: 14px; }
h4 { font-size: 13.5px; font-weight: 600; color: var(--faint); margin: 16px 0 6px; }
p.note { font-size: 13px; max-width: 110ch; margin: 12px 0 0; }
p.missing { border-left: 3px solid var(--series-2); padding-left: 12px; margin: 12px 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 10px 9px; border-bottom: 1px solid var(--grid); vertical-align: top; }
th:first-child { text-align: left; padding-left: 0; }
td { white-space: nowrap; }
thead th { font-size: 14px; font-weight: 600; vertical-align: bottom; }
tbody th { font-weight: 600; min-width: 9em; max-width: 18em; overflow-wrap: anywhere; }
tbody tr:last-child th, tbody tr:last-child td { border-bottom: 0; }
small { display: block; font-size: 12px; font-weight: 400; color: var(--faint); }
td.best { font-weight: 700; color: var(--good); background: var(--mark); }
tr.group th { color: var(--faint); font-size: 13px; font-weight: 600; padding-top: 20px; padding-left: 0; text-align: left; }
tr.scaled th { font-weight: 400; padding-left: 20px; }
td.better, b.better { color: var(--good); font-weight: 600; }
td.worse, b.worse { color: var(--bad); font-weight: 600; }
table.differences { margin-bottom: 22px; }
tr.teacher th, tr.teacher td { color: var(--faint); }
i { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 9px; }
figure { margin: 0; }
figure svg { max-width: 100%; height: auto; display: block; }
.row { display: grid; grid-template-columns: repeat(var(--columns), minmax(0, 1fr)); gap: 18px; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 4px 22px; margin: 0 0 10px; padding: 0;
  font-size: 14px; }
.legend li { min-width: 0; overflow-wrap: anywhere; }
.small { font-size: 13px; margin-bottom: 14px; }
.small th, .small td { padding: 7px 10px; }
details { font-size: 13px; border-top: 1px solid var(--grid); padding: 9px 0; }
summary { cursor: pointer; font-weight: 600; }
dl { display: grid; grid-template-columns: fit-content(45%) minmax(0, 1fr); gap: 2px 18px; margin: 10px 0 4px; }
dt { color: var(--faint); }
dd { margin: 0; white-space: normal; overflow-wrap: anywhere; }
dl.texts { gap: 8px 18px; font-size: 15px; margin: 10px 0 14px; }
dl.texts dt { max-width: 16em; overflow-wrap: anywhere; }
dl.texts dd { white-space: pre-wrap; }
dl.texts dd small { display: inline; opacity: 0.7; }
p.shaded { white-space: pre-wrap; max-width: 76ch; line-height: 1.75; color: var(--ink); margin: 4px 0 10px; }
.shaded span, .shaded mark { background: color-mix(in srgb, var(--salient) var(--share, 0%), transparent); color: inherit;
  border-radius: 3px; }
.shaded mark { text-decoration: underline 2px; text-underline-offset: 4px; }
p.listed { font-size: 14px; }
td.words { white-space: normal; min-width: 8em; overflow-wrap: anywhere; }
p.note code { overflow-wrap: anywhere; }
table.candidates { width: auto; }
.candidates td { white-space: normal; text-align: left; }
.candidates th:first-child + th { text-align: left; }
.candidates span { display: inline-block; margin-right: 14px; color: var(--faint); white-space: nowrap; }
bdi { font: 0.95em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; white-space: pre; color: var(--ink);
  background: var(--mark); border-radius: 4px; padding: 1px 5px; }
code { font: 0.92em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
@media print { section { break-inside: avoid; border: 0; padding: 0; } details { display: block; } }
@media (max-width: 900px) { .row { grid-template-columns: repeat(auto-fill, minmax(200px, 1fr)); } }
@media (max-width: 640px) {
  main { padding: 28px 14px 40px; }
  section { padding: 18px 16px; }
  h1 { font-size: 27px; }
  th, td { padding: 8px 7px; font-size: 14px; }
  /* The names of rows stay in sight while a table is scrolled. */
  th:first-child:not([colspan]) { position: sticky; left: 0; z-index: 1; min-width: 7em; max-width: 36vw; white-space: normal;
    overflow-wrap: anywhere; background: var(--card); }
  /* A shade at the edge behind which there is more; what lies over it moves with the table. */
  .scroll { background: linear-gradient(to left, var(--card) 40%, transparent) right / 36px 100% no-repeat local,
    linear-gradient(to left, var(--shade), transparent) right / 16px 100% no-repeat scroll; }
  /* Shrunk to a phone's width, the words in a wide picture could not be read: it is scrolled as tables are. */
  .scroll > figure svg { max-width: none; width: 720px !important; }
  .row { grid-template-columns: repeat(auto-fill, minmax(min(200px, 100%), 1fr)); }
  dl { grid-template-columns: minmax(0, 1fr); }
  dd { margin-bottom: 6px; }
  dl.texts { gap: 0; }
  dl.texts dd { margin-bottom: 10px; }
}
"""

FRAME = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Students compared</title>
<style>{style}</style>
</head>
<body>
<main>
<header>
<h1>Students compared</h1>
<p>{lead}</p>
</header>
{sections}
<section>
<h2>Where this comes from</h2>
<p>What the store holds, and how each run was made.</p>
{provenance}
</section>
</main>
</body>
</html>
"""
