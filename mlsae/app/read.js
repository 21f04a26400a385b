// A prompt, token by token.
"use strict";

let reading = null; // what the program has read: see token.js; with the text itself
let chosenToken = null;

const strip = document.getElementById("strip");
const colored = document.getElementById("colored");
const coloredLayer = document.getElementById("colored-layer");

// h of a latent at each token: its largest over the layers, or that at one.
function activationsOf(latent) {
  const { tokens, entries } = reading;
  const h = new Array(tokens.length).fill(0);
  entries.latent.forEach((id, i) => {
    if (id !== latent || (coloredLayer.value !== "" && entries.layer[i] !== Number(coloredLayer.value))) return;
    h[entries.token[i]] = Math.max(h[entries.token[i]], entries.value[i]);
  });
  return h;
}

function color() {
  if (!reading || chosenLatent === null) return;
  colored.value = chosenLatent;
  const h = activationsOf(chosenLatent);
  const largest = Math.max(...h);
  strip.querySelectorAll("button").forEach((button, i) => {
    button.style.background = h[i] ? `rgba(var(--mark), ${(0.12 + 0.6 * (h[i] / largest)).toFixed(2)})` : "";
    button.title = h[i] ? `token ${i}: activation ${h[i].toFixed(2)}` : `token ${i}`;
  });
  const label = labels.get(chosenLatent)?.label;
  const count = h.filter((value) => value > 0).length;
  document.getElementById("colored-about").textContent = (label ? `“${label}”, ` : "") + (count ? `active at ${count} of ${h.length} tokens, at most ${largest.toFixed(2)}` : "not active in this text");
}

function drawStrip() {
  const parts = [];
  reading.tokens.forEach((token, i) => {
    const [, before, indent] = token.match(/^([^]*\n)?([^]*)$/); // what follows a line end stands on the next line
    const text = before ? visible(before) + (indent.trim() ? visible(indent) : "") : token.trim() ? token : visible(token);
    parts.push(element("button", { type: "button", onclick: () => showToken(i) }, text));
    if (before) parts.push(element("br"), indent.trim() ? "" : indent);
  });
  strip.replaceChildren(...parts);
}

async function showToken(token, choose = false) {
  chosenToken = token;
  strip.querySelectorAll("button").forEach((button, i) => button.setAttribute("aria-pressed", i === token));
  document.getElementById("token-title").textContent = `Token ${token}: “${visible(reading.tokens[token])}”`;
  showNext();
  const columns = latentsAt(reading, token);
  const known = columns.some(({ latent }) => latent === chosenLatent);
  if ((choose || !known) && columns.length) {
    const strongest = columns.reduce((a, b) => (Math.max(...b.h) > Math.max(...a.h) ? b : a));
    await chooseLatent(strongest.latent);
  }
  color();
  await drawToken(columns);
}

async function drawToken(columns) {
  const single = columns.filter(({ h }) => h.filter((value) => value > 0).length === 1).length;
  document.getElementById("token-caption").textContent = columns.length
    ? `${columns.length} latents are active at some layer, ${single} of them at one layer only: the columns, in the same order on both sides. Click one to choose its latent.`
    : "No latent is active: the MLSAE is not for this token, which is special or left out.";
  const noted = columns.map((column) => ({ ...column, note: activationNotes(column) }));
  const title = "latents, by mean layer at this token";
  const choose = (latent) => chooseLatent(latent, true);
  await drawColumns(document.getElementById("here-plot"), reading.layers, noted, title, choose);
  drawHistograms();
  if (!analyzed) return;
  const table = await latentTable;
  const L = table.layers.length;
  const rowOf = new Map(table.latent.map((id, row) => [id, row]));
  const over = columns.map(({ latent }) => {
    const row = rowOf.get(latent);
    const share = row === undefined ? new Array(L).fill(null) : table.profile.slice(row * L, (row + 1) * L).map((value) => value / 1000);
    return { latent, share, note: share.map(() => "") };
  });
  await drawColumns(document.getElementById("over-plot"), table.layers, over, title, choose);
}

// One histogram per layer, each standing on the line of its layer, the first layer at the top.
async function drawHistograms() {
  if (!reading || chosenToken === null) return;
  const { layers, entries } = reading;
  const here = [...entries.token.keys()].filter((i) => entries.token[i] === chosenToken);
  const bins = 30;
  const largest = Math.max(1e-6, ...here.map((i) => entries.value[i]));
  const counts = layers.map(() => new Array(bins).fill(0));
  for (const i of here) counts[entries.layer[i]][Math.min(bins - 1, Math.floor((bins * entries.value[i]) / largest))]++;
  const most = Math.max(1, ...counts.flat());
  const x = counts[0].map((_, bin) => ((bin + 0.5) * largest) / bins);
  const own = here.filter((i) => entries.latent[i] === chosenLatent);
  const { layout } = (await plots)["heatmap"];
  await draw(document.getElementById("histogram-plot"), {
    data: [
      ...counts.map((count, layer) => ({
        type: "bar",
        x,
        y: count.map((value) => (0.86 * value) / most),
        base: layers.length - 1 - layer,
        width: (0.92 * largest) / bins,
        marker: { color: "#4a90d9" },
        customdata: count,
        hovertemplate: `layer ${layers[layer]}, activation %{x:.2f}: %{customdata} latents<extra></extra>`,
      })),
      {
        type: "scatter",
        mode: "markers",
        x: own.map((i) => entries.value[i]),
        y: own.map((i) => layers.length - 1 - entries.layer[i] + 0.43),
        marker: { symbol: "line-ns", size: 16, line: { width: 2.5, color: "#d9822b" } },
        hovertemplate: `latent ${chosenLatent}: activation %{x:.2f}<extra></extra>`,
      },
    ],
    layout: {
      ...layout,
      barmode: "overlay",
      showlegend: false,
      xaxis: { title: { text: "activation" }, rangemode: "tozero", showgrid: false, zeroline: false },
      yaxis: { title: { text: "layer" }, tickvals: layers.map((_, i) => layers.length - 1 - i), ticktext: layers.map(String), range: [-0.08, layers.length] },
    },
  });
}

let readingNow = null; // the request that runs

async function read() {
  const text = document.getElementById("text").value;
  readingNow?.abort();
  const mine = (readingNow = new AbortController());
  say("read-said", null);
  const late = setTimeout(() => say("read-said", "Reading; the model is busy, maybe with another tab’s request …"), 1000);
  document.getElementById("prompt-form").setAttribute("aria-busy", "true");
  try {
    const answer = await (await ask("prompt", { text }, { signal: mine.signal })).json();
    clearTimeout(late);
    say("read-said", null);
    const first = !reading && !location.hash;
    reading = { ...answer, text };
    sessionStorage.setItem("prompt", text);
    document.getElementById("reading").hidden = false;
    const layer = coloredLayer.value;
    coloredLayer.replaceChildren(element("option", { value: "" }, "its strongest layer"), ...reading.layers.map((number, i) => element("option", { value: i }, `layer ${number}`)));
    if (Number(layer) < reading.layers.length) coloredLayer.value = layer;
    drawStrip();
    let last = reading.tokens.length - 1; // the last token with an active latent
    while (last > 0 && !reading.entries.token.includes(last)) last--;
    await showToken(last, first);
  } catch (error) {
    if (mine === readingNow) say("read-said", error);
  } finally {
    clearTimeout(late);
    if (mine === readingNow) document.getElementById("prompt-form").removeAttribute("aria-busy");
  }
}

document.getElementById("prompt-form").addEventListener("submit", (event) => {
  event.preventDefault();
  read();
});
document.getElementById("text").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
  event.preventDefault();
  read();
});
colored.addEventListener("change", () => chooseLatent(Number(colored.value)));
coloredLayer.addEventListener("change", color);
document.addEventListener("latent", () => {
  color();
  drawHistograms();
});
document.addEventListener("labels", color);
