// The heatmap of one token of a text: one column per latent that is active there, one row per layer.
"use strict";

// A text read token by token is {tokens, layers, entries: {token, layer, latent, value}}, sparse; layers in entries are places in `layers`.

// The latents active at a token, sorted by mean layer: [{latent, h: [per layer], share, mean}].
function latentsAt({ layers, entries }, token) {
  const activations = new Map(); // latent → its activation per layer
  entries.token.forEach((entryToken, i) => {
    if (entryToken !== token) return;
    const latent = entries.latent[i];
    if (!activations.has(latent)) activations.set(latent, new Array(layers.length).fill(0));
    activations.get(latent)[entries.layer[i]] += entries.value[i];
  });
  return [...activations]
    .map(([latent, h]) => {
      const total = h.reduce((sum, value) => sum + value, 0);
      const share = h.map((value) => value / total);
      return { latent, h, share, mean: share.reduce((sum, value, layer) => sum + value * layer, 0) };
    })
    .sort((a, b) => a.mean - b.mean || a.latent - b.latent);
}

// Draw columns [{latent, share: [per layer], note: [per layer]}]; `choose` is called with the latent of a column that is clicked.
async function drawColumns(node, layers, columns, title, choose) {
  const { data: [trace], layout } = (await plots)["heatmap"]; // for the same look
  const byLayer = (cell) => layers.map((_, layer) => columns.map((column) => cell(column, layer)));
  await draw(node, {
    data: [
      {
        ...trace,
        y: layers.map(String),
        z: byLayer(({ share }, layer) => share[layer]),
        x0: 1,
        dx: 1,
        text: undefined,
        customdata: byLayer(({ latent, note }, layer) => [latent, note[layer]]),
        hovertemplate: "layer %{y}, latent %{customdata[0]}<br>%{customdata[1]}share %{z:.2f}<extra></extra>",
      },
    ],
    layout: { ...layout, xaxis: { ...layout.xaxis, title: { text: title } } },
  });
  node.removeAllListeners("plotly_click");
  node.on("plotly_click", ({ points: [point] }) => choose(point.customdata[0]));
}

const activationNotes = ({ h }) => h.map((value) => `activation ${value.toFixed(2)}, `);
