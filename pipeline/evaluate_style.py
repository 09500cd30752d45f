"""The style of the evaluation's page: light and dark, from a wide screen down to a phone."""

STYLE = """
:root { color-scheme: light dark; --back: #f7f8fa; --card: #fff; --ink: #1b2430; --soft: #5d6875; --line: #dde2e8;
  --s0: #2563c9; --s1: #b85009; --s2: #0c7d55; --bad: #c62f45; --heat: 37 99 201; --warn: #fff4d6;
  --warnink: #6b4e00; }
@media (prefers-color-scheme: dark) { :root { --back: #12161c; --card: #1b2129; --ink: #e6eaf0; --soft: #9aa6b4;
  --line: #303944; --s0: #6ea8ff; --s1: #ffa566; --s2: #57d19f; --bad: #ff7a8a; --heat: 110 168 255; --warn: #3a3010;
  --warnink: #ffe19a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 15px/1.5 system-ui, sans-serif;
  font-variant-numeric: tabular-nums; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 26px; margin: 0 0 2px; } h2 { font-size: 18px; margin: 36px 0 4px; } h3 { font-size: 14px; margin: 0; }
p { margin: 4px 0 12px; max-width: 78ch; } .soft, p.soft { color: var(--soft); } small { color: var(--soft); }
.hash { overflow-wrap: anywhere; font-size: 12px; }
.warn { background: var(--warn); color: var(--warnink); border-radius: 8px; padding: 8px 14px; margin: 14px 0; }
.warn ul { margin: 0; padding-left: 18px; }
.cards, .plots { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); }
.plots { grid-template-columns: repeat(auto-fill, minmax(200px, 1fr)); } .plots.wide {
  grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)); }
.two { display: grid; gap: 0 40px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 430px), 1fr)); }
.two > div { min-width: 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 14px; }
.card b { display: block; font-size: 25px; font-weight: 650; line-height: 1.25; } .cards span { color: var(--soft); }
.card svg:not(.key) { width: 100%; height: auto; display: block; margin-top: 4px; }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 6px 10px; }
table { border-collapse: collapse; width: 100%; } th, td { padding: 4px 8px; text-align: right; white-space: nowrap; }
th { font-weight: 600; color: var(--soft); font-size: 13px; vertical-align: bottom; }
td:first-child, th:first-child, .left { text-align: left; } tbody tr + tr td, tbody tr + tr th {
  border-top: 1px solid var(--line); } tbody th { color: var(--ink); font-size: 14px; }
.has { text-align: center; color: var(--s0); padding: 4px 3px; } .has.no { color: var(--soft); }
th.turn { padding: 4px 3px; text-align: center; } th.turn span { writing-mode: vertical-rl; rotate: 180deg; }
.barcell { min-width: 130px; width: 22%; } .barplot { width: 100%; height: 14px; display: block; }
.bar { fill: var(--s0); opacity: .75; } .whisker { stroke: var(--ink); stroke-width: 1.4; fill: none;
  vector-effect: non-scaling-stroke; }
.heat td { text-align: center; min-width: 46px; border: 2px solid var(--card); border-radius: 6px; }
.heat td.has { min-width: 0; }
.heat th { text-align: center; } .heat th:first-child { text-align: left; }
.heat td.cannot { outline: 2px dashed var(--ink); outline-offset: -4px; }
.fit table { width: auto; } .fit { width: fit-content; max-width: 100%; }
.good { color: var(--s2); } .bad { color: var(--bad); }
svg text { font: 12px system-ui, sans-serif; fill: var(--soft); } .grid { stroke: var(--line); fill: none; }
.ideal, .floor { stroke: var(--soft); stroke-dasharray: 4 4; fill: none; } .floor { stroke: var(--bad); }
.miss { stroke: var(--bad); stroke-width: 2; opacity: .6; } .line { fill: none; stroke-width: 2; }
.line.s0, .interval.s0 { stroke: var(--s0); } .line.s1, .interval.s1 { stroke: var(--s1); }
.line.s2, .interval.s2 { stroke: var(--s2); } .interval { opacity: .45; stroke-width: 2; }
.dot { stroke: var(--card); stroke-width: 1; } .dot.s0 { fill: var(--s0); } .dot.s1 { fill: var(--s1); }
.dot.s2 { fill: var(--s2); } .legend { display: flex; flex-wrap: wrap; gap: 4px 20px; margin: 6px 0 10px;
  align-items: center; color: var(--soft); }
.key { width: 24px; height: 12px; vertical-align: -1px; } details { margin-top: 10px; }
details h3 { margin: 14px 0 4px; }
summary { cursor: pointer; color: var(--soft); }
.rule { display: inline-block; width: 24px; vertical-align: 3px;
  border-top: 2px dashed var(--bad); }
@media (max-width: 520px) { main { padding: 18px 12px 40px; } .card { padding: 9px 10px; }
  .plots:not(.wide) { grid-template-columns: 1fr 1fr; } }
@media print { body { background: none; font-size: 12px; -webkit-print-color-adjust: exact; print-color-adjust: exact; }
  main { max-width: none; padding: 0; } .card, tr, .legend { break-inside: avoid; } h2, h3, p { break-after: avoid; }
  .scroll { overflow: visible; padding: 2px; } th, td { padding: 2px 4px; white-space: normal; }
  th, tbody th { font-size: 11px; } .barcell { min-width: 60px; } .heat td { min-width: 30px; }
  .two { display: block; } .plots { grid-template-columns: repeat(4, 1fr); }
  .plots.wide { grid-template-columns: 1fr 1fr; } }
"""
