"""Style and script of the report page. Nothing in it is fetched from anywhere."""

CSS = """
:root { color-scheme: light dark; --page: #f7f7f5; --card: #ffffff; --ink: #1d1f23; --soft: #62676f;
  --rule: #e3e3df; --c1: #2f6fde; --c2: #d9622b; --c3: #22927a; --c4: #9a55c4; --c5: #b8860b; --c6: #cf4a7f;
  --right: #17915f; --heat: #2f6fde; --on-strong: #ffffff; }
@media (prefers-color-scheme: dark) { :root { --page: #14161a; --card: #1c1f25; --ink: #e7e8ea;
  --soft: #9aa0aa;
  --rule: #30343c; --c1: #6ea4ff; --c2: #f0935f; --c3: #4fc3a6; --c4: #c08be6; --c5: #d9b04a; --c6: #ee83ad;
  --right: #42c58d; --heat: #6ea4ff; --on-strong: #e7e8ea; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.5;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
  font-variant-numeric: tabular-nums; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 28px; line-height: 1.2; letter-spacing: -0.015em; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 18px; letter-spacing: -0.005em; margin: 44px 0 4px; }
p { margin: 0 0 14px; color: var(--soft); max-width: 75ch; }
a { color: inherit; }
.card, .chart { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px;
  margin-top: 24px; }
.tile { padding: 12px 16px 14px; font-size: 14px; line-height: 1.35; }
.tile span { display: block; color: var(--soft); font-size: 13px; margin-top: 2px; }
.tile b { display: block; font-size: 26px; font-weight: 620; letter-spacing: -0.02em; line-height: 1.3; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); gap: 12px;
  margin: 12px 0; }
.chart { margin: 0; padding: 12px 14px 8px; display: flex; flex-direction: column; }
.chart figcaption { display: flex; gap: 10px; font-size: 14px; }
.chart .at { color: var(--soft); font-size: 13px; margin-left: auto; }
.chart svg { display: block; width: 100%; height: auto; margin-top: auto; padding-top: 6px; touch-action: pan-y; }
.chart text { fill: var(--soft); font-size: 10.5px; }
.grid { stroke: var(--rule); stroke-width: 1; }
.cursor { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 3 3; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.faint { stroke-width: 1; opacity: 0.32; }
.legend { display: flex; flex-wrap: wrap; gap: 0 14px; font-size: 13px; color: var(--soft); }
.legend b { color: var(--ink); font-weight: 600; }
.legend i { display: inline-block; width: 9px; height: 9px; border-radius: 3px; margin-right: 5px; }
path.c1 { stroke: var(--c1); } path.c2 { stroke: var(--c2); } path.c3 { stroke: var(--c3); }
path.c4 { stroke: var(--c4); } path.c5 { stroke: var(--c5); } path.c6 { stroke: var(--c6); }
circle.c1 { fill: var(--c1); } circle.c2 { fill: var(--c2); } circle.c3 { fill: var(--c3); }
circle.c4 { fill: var(--c4); } circle.c5 { fill: var(--c5); } circle.c6 { fill: var(--c6); }
i.c1 { background: var(--c1); } i.c2 { background: var(--c2); } i.c3 { background: var(--c3); }
i.c4 { background: var(--c4); } i.c5 { background: var(--c5); } i.c6 { background: var(--c6); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; }
.list { width: 100%; }
.list th { text-align: left; font-weight: 500; color: var(--soft); font-size: 13px; }
.list th, .list td { padding: 6px 16px; border-top: 1px solid var(--rule); vertical-align: top; }
.list tr:first-child > * { border-top: 0; }
.list .n { text-align: right; }
.list code { font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  overflow-wrap: anywhere; }
img { image-rendering: auto; display: block; }
img.small { image-rendering: pixelated; }
.matrix { display: grid; grid-template-columns: minmax(0, auto) minmax(240px, 1fr); gap: 28px;
  padding: 18px 20px;
  align-items: start; }
.matrix th { font-weight: 500; font-size: 12px; color: var(--soft); padding: 0 0 4px; }
.matrix td { padding: 0; width: 34px; min-width: 30px; height: 30px; text-align: center; font-size: 11px;
  border: 1px solid var(--card); border-radius: 5px;
  background: color-mix(in oklab, var(--heat) calc(var(--v) * 1%), var(--page)); }
.matrix td.strong { color: var(--on-strong); }
.matrix td.top { color: var(--card); }
.matrix td.own { outline: 2px solid var(--ink); outline-offset: -2px; font-weight: 700; }
.matrix td.head { background: none; border: 0; padding-right: 6px; width: auto; }
.matrix .head img { width: 30px; height: 30px; border-radius: 4px; object-fit: cover; }
.matrix ol { margin: 0; padding-left: 26px; font-size: 13.5px; }
.matrix li { padding: 2px 0; overflow-wrap: anywhere; }
.matrix li::marker { color: var(--soft); }
.map { padding: 18px 20px 4px; }
.heatmap { width: min(100%, 560px); }
.row { display: grid; grid-template-columns: minmax(150px, 270px) 1fr; gap: 20px; padding: 14px 20px;
  border-top: 1px solid var(--rule); align-items: center; }
.row:first-child { border-top: 0; }
.row .caption { overflow-wrap: anywhere; }
.row .caption small { display: block; color: var(--soft); }
.shots { display: flex; flex-wrap: wrap; gap: 10px; }
.shots figure { margin: 0; width: 96px; font-size: 12px; color: var(--soft); text-align: center; }
.shots img { width: 96px; height: 96px; object-fit: cover; border-radius: 7px; margin-bottom: 3px; }
.shots .own { color: var(--right); font-weight: 650; }
.shots .own img { outline: 3px solid var(--right); outline-offset: -1px; }
.shots .gap { width: auto; align-self: center; padding-bottom: 18px; font-size: 18px; }
details { padding: 0; }
summary { cursor: pointer; padding: 12px 16px; font-weight: 500; }
details[open] summary { border-bottom: 1px solid var(--rule); }
footer { margin-top: 44px; color: var(--soft); font-size: 13px; }
@media (max-width: 760px) { .matrix, .row { grid-template-columns: 1fr; } main { padding: 24px 14px 40px; } }
@media print { body { background: none; } .chart, .card { break-inside: avoid; } }
"""

SCRIPT = """
// Values under the pointer: a dashed line, the step, and each curve's number in place of its last one.
for (const chart of document.querySelectorAll('.chart')) {
  const { steps, x, values } = JSON.parse(chart.dataset.hover);
  const svg = chart.querySelector('svg'), cursor = chart.querySelector('.cursor');
  const at = chart.querySelector('.at'), numbers = chart.querySelectorAll('.value');
  const place = (position) => { cursor.setAttribute('x1', position); cursor.setAttribute('x2', position); };
  svg.addEventListener('pointermove', (event) => {
    const box = svg.getBoundingClientRect();
    const pointer = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    let nearest = 0;
    x.forEach((position, i) => {
      if (Math.abs(position - pointer) < Math.abs(x[nearest] - pointer)) nearest = i;
    });
    place(x[nearest]);
    at.textContent = 'step ' + steps[nearest].toLocaleString('en');
    numbers.forEach((number, i) => { number.textContent = values[i][nearest]; });
  });
  svg.addEventListener('pointerleave', () => {
    place(-9);
    at.textContent = '';
    numbers.forEach((number) => { number.textContent = number.dataset.last; });
  });
}
"""
