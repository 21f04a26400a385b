// The heatmap of a single token of the prompt: one column per active latent, one row per layer.
"use strict";

(async () => {
  const { tokens, layers, entries } = JSON.parse(await unpack("prompt"));
  const node = document.getElementById("token-plot");
  const caption = document.getElementById("token-caption");

  // The latents active at a token, sorted by mean layer: [{latent, h: [per layer], share, mean}].
  function latentsAt(token) {
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

  async function show(token) {
    const chips = document.querySelectorAll("#prompt button");
    chips.forEach((chip, i) => chip.setAttribute("aria-pressed", i === token));
    const columns = latentsAt(token);
    const single = columns.filter(({ h }) => h.filter((value) => value > 0).length === 1).length;
    caption.textContent =
      `“${visible(tokens[token])}”: ${columns.length} latents are active at some layer, ` +
      `${single} of them at one layer only.`;
    const { data: [trace], layout } = (await plots)["heatmap"]; // for the same look
    await draw(node, {
      data: [
        {
          ...trace,
          z: layers.map((_, layer) => columns.map(({ share }) => share[layer])),
          x0: 1,
          dx: 1,
          text: undefined,
          customdata: layers.map((_, layer) => columns.map(({ latent, h }) => [latent, h[layer].toFixed(2)])),
          hovertemplate: "layer %{y}, latent %{customdata[0]}<br>activation %{customdata[1]}, share %{z:.2f}<extra></extra>",
        },
      ],
      layout: { ...layout, xaxis: { ...layout.xaxis, title: { text: "latents active at the token, sorted by mean layer there" } } },
    });
    node.removeAllListeners("plotly_click");
    node.on("plotly_click", ({ points: [point] }) => openLatent(point.customdata[0]));
  }

  document.getElementById("prompt").append(
    ...tokens.map((token, i) => element("button", { type: "button", class: "chip", title: `token ${i}`, onclick: () => show(i) }, visible(token))),
  );
  let last = tokens.length - 1; // the last token with an active latent
  while (last > 0 && !entries.token.includes(last)) last--;
  show(last);
})();
