"""The style sheet of the HTML report, light and dark.

Owns: colours, sizes, print rules. Must never know what stands on the page.
"""

STYLE = """
:root { color-scheme: light dark;
  --page: #fbfbfa; --card: #ffffff; --ink: #1b1c1e; --soft: #5c6066; --rule: #dfe1e4;
  --warn: #fff1d6; --warn-ink: #6b4300;
  --c0: #2466c8; --c1: #b9500f; --c2: #157a5d; --c3: #7d46b8; --c4: #a8326b; --c5: #7c8087; }
@media (prefers-color-scheme: dark) { :root {
  --page: #16171a; --card: #1e2024; --ink: #ecedef; --soft: #a4a9b1; --rule: #34383e;
  --warn: #4a3510; --warn-ink: #ffdf9e;
  --c0: #77a9f7; --c1: #f09a5e; --c2: #51c3a0; --c3: #bd95ee; --c4: #ef86b6; --c5: #9a9fa7; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 24px 20px 60px; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 0 0 4px; }
p { margin: 0 0 10px; max-width: 75ch; }
.soft, figcaption, .note { color: var(--soft); }
.warning { background: var(--warn); color: var(--warn-ink); border-radius: 8px;
  padding: 12px 16px; margin: 16px 0; font-weight: 600; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: 14px; margin: 20px 0; }
.tile, .card { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 14px 16px; }
.tile .figure { font-size: 30px; line-height: 1.2; font-variant-numeric: tabular-nums; }
.tile .interval { font-size: 14px; }
.tile p { font-size: 13px; margin: 6px 0 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); gap: 16px;
  grid-auto-flow: dense; }
@media (min-width: 980px) { .wide { grid-column: 1 / -1; } }
.cards > *, .tiles > * { min-width: 0; }
figure { margin: 0; }
svg { width: 100%; height: auto; display: block; font: 12px system-ui, sans-serif; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { text-align: right; padding: 5px 10px; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; }
th:first-child, td:first-child, .words th, .words td { text-align: left; }
.words td { white-space: normal; overflow-wrap: anywhere; }
details { margin-top: 16px; } summary { cursor: pointer; font-weight: 600; }
dt { font-weight: 600; } dd { margin: 0 0 8px; color: var(--soft); max-width: 80ch; }
.s0 { --own: var(--c0); } .s1 { --own: var(--c1); } .s2 { --own: var(--c2); } .s3 { --own: var(--c3); }
.s4 { --own: var(--c4); } .s5 { --own: var(--c5); }
.line { fill: none; stroke: var(--own); stroke-width: 2; }
.dashed { stroke-dasharray: 5 5; } .muted { --own: var(--soft); }
.band { fill: var(--own); fill-opacity: .18; } .whisker { stroke: var(--own); stroke-width: 2; stroke-opacity: .55; }
.dot { fill: var(--own); stroke: var(--card); stroke-width: 1.5; } .box { fill: var(--own); }
.cell { fill: var(--c0); stroke: var(--card); stroke-width: 2; }
.grid { stroke: var(--rule); } .axis { stroke: var(--soft); }
.tick, .label { fill: var(--soft); } .value, .row { fill: var(--ink); } .value { font-variant-numeric: tabular-nums; }
.strong { fill: var(--card); font-weight: 600; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: 13px; color: var(--soft); }
.key { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 6px;
  background: var(--own); }
@media print { .card, .tile { break-inside: avoid; } }
"""
