// What a prediction, or a latent, rests on: latents along the layers, and lines between them.
"use strict";

let tracing = null;

function traceTarget() {
  const field = (id) => document.getElementById(id).value;
  const check = Number(field("check"));
  if (document.querySelector("[name=kind]:checked").value === "logit") return { check, target: field("target") || null, against: field("against") || null };
  const column = chosenToken === null ? null : latentsAt(reading, chosenToken).find(({ latent }) => latent === chosenLatent);
  const strongest = column ? reading.layers[column.h.indexOf(Math.max(...column.h))] : reading.layers.at(-1);
  return { check, latent: chosenLatent, at_token: chosenToken, at_layer: field("trace-layer") === "" ? strongest : Number(field("trace-layer")) };
}

// Lines between the dots of the plot of flows: [source, sink, weight], from a dot to one above.
function edgeTraces({ nodes, edges, flows, layers }) {
  const column = new Map(flows.map(([token, latent], x) => [`${token} ${latent}`, x]));
  const at = (i) => [column.get(`${nodes.token[i]} ${nodes.latent[i]}`), layers.indexOf(nodes.layer[i])];
  const name = (i) => `${nodes.latent[i]} (layer ${nodes.layer[i]}, token ${nodes.token[i]})`;
  const drawnEdges = edges
    .filter(({ source, sink, weight }) => weight && at(source)[0] !== undefined && at(sink)[0] !== undefined)
    .sort((a, b) => Math.abs(b.weight) - Math.abs(a.weight))
    .slice(0, 40);
  const largest = Math.abs(drawnEdges[0]?.weight ?? 1);
  return drawnEdges
    .map(({ source, sink, weight }) => ({
      type: "scatter",
      mode: "lines",
      x: [at(source)[0], at(sink)[0]],
      y: [at(source)[1], at(sink)[1]],
      line: { width: 0.6 + 3 * Math.sqrt(Math.abs(weight) / largest), color: weight > 0 ? "#4a90d9" : "#d9822b" },
      opacity: 0.45,
      showlegend: false,
      hovertemplate: `${name(source)} → ${name(sink)}: ${weight.toFixed(3)}<extra></extra>`,
    }));
}

async function showTrace(found) {
  const { target, plots: drawing, width, n_nodes, correlation } = found;
  document.getElementById("traced").hidden = false;
  document.getElementById("trace-title").textContent = `${target.name} = ${target.value.toFixed(3)}`;
  const node = document.getElementById("flows-plot");
  node.style.minWidth = `${width}px`;
  const [lines, ...dots] = drawing.flows.data;
  await draw(node, { ...drawing.flows, data: [lines, ...edgeTraces(found), ...dots] });
  node.removeAllListeners("plotly_click");
  node.on("plotly_click", ({ points: [point] }) => point.customdata && chooseLatent(point.customdata[0], true));
  for (const name of ["latents", "errors"]) await draw(document.getElementById(`${name}-plot`), drawing[name]);
  document.getElementById("checks").hidden = !drawing.checks;
  if (drawing.checks) await draw(document.getElementById("checks-plot"), drawing.checks);
  const r = correlation.latents.pearson;
  document.getElementById("trace-correlation").textContent = `Attributions are first-order: an ablation is the truth of one latent. The strongest of ${n_nodes.toLocaleString("en")} latents active at some token and layer, and the strongest errors${r === null ? "" : `; Pearson r of the latents ${r.toFixed(2)}`}.`;
}

document.getElementById("trace-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (reading?.text !== document.getElementById("text").value) await read();
  if (!reading) return;
  tracing?.abort();
  const mine = (tracing = new AbortController());
  say("trace-said", "tracing …");
  try {
    const found = await (await ask("trace", { text: reading.text, ...traceTarget() }, { signal: mine.signal })).json();
    await showTrace(found);
    say("trace-said", null);
  } catch (error) {
    if (mine === tracing) say("trace-said", error);
  }
});
