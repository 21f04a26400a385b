// On every page: draw the plots that come into view, follow light and dark mode.
"use strict";

function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

// Show spaces, line ends and tabs as visible signs; everything else as it is.
function visible(token) {
  if (token === "") return "∅";
  return token.replace(/ /g, "·").replace(/\r?\n/g, "⏎").replace(/\t/g, "⇥");
}

const plots = (async () => {
  const [data] = await Promise.all([unpack("plots"), loadPlotly()]);
  return JSON.parse(data);
})();

function themed(layout) {
  const style = getComputedStyle(document.documentElement);
  const [ink, line, panel] = ["--ink", "--line", "--panel"].map((name) => style.getPropertyValue(name).trim());
  const result = { ...layout, font: { color: ink, size: 12 }, hoverlabel: { bgcolor: panel, bordercolor: line, font: { color: ink } } };
  for (const name of ["xaxis", "yaxis", "yaxis2"])
    if (layout[name]) result[name] = { gridcolor: line, zerolinecolor: line, linecolor: line, automargin: true, ...layout[name] };
  return result;
}

const drawn = new Map(); // node → its plot

function withErrorBars(trace) {
  const color = getComputedStyle(document.documentElement).getPropertyValue("--ink").trim();
  for (const name of ["error_x", "error_y"]) if (trace[name]) trace = { ...trace, [name]: { ...trace[name], color } };
  return trace;
}

async function draw(node, plot) {
  await plots;
  drawn.set(node, plot);
  await Plotly.react(node, plot.data.map(withErrorBars), themed(plot.layout), { responsive: true, displaylogo: false, displayModeBar: false });
  node.dataset.drawn = "true";
  node.dispatchEvent(new Event("drawn"));
}

function onceDrawn(node, then) {
  if (node.dataset.drawn) then();
  else node.addEventListener("drawn", then, { once: true });
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const [node, plot] of drawn) draw(node, plot);
});

// A plot is drawn when it comes near the screen, so that a page of many plots opens at once.
const observer = new IntersectionObserver(
  (entries) => {
    for (const { target, isIntersecting } of entries)
      if (isIntersecting) {
        observer.unobserve(target);
        plots.then((all) => draw(target, all[target.dataset.plot]));
      }
  },
  { rootMargin: "400px" },
);
for (const node of document.querySelectorAll("[data-plot]")) observer.observe(node);

// A group of buttons of which one is pressed: it shows its part of the page and hides the others.
for (const group of document.querySelectorAll(".choice"))
  group.addEventListener("click", ({ target }) => {
    if (!target.dataset.choice) return;
    for (const button of group.children) button.setAttribute("aria-pressed", button === target);
    for (const part of document.querySelectorAll(`[data-in="${group.dataset.of}"]`))
      part.hidden = part.dataset.choice !== target.dataset.choice;
  });
