// The picture of a single token: its latents, each a column over the layers.
"use strict";

(async () => {
  const { tokens, layers, entries } = JSON.parse(await unpack("prompt"));
  const plot = document.getElementById("token-plot");
  const caption = document.getElementById("token-caption");

  // The latents of a token, in the order of their mean layer there: [{latent, h: [of each layer]}].
  function latentsAt(token) {
    const found = new Map();
    entries.token.forEach((at, i) => {
      if (at !== token) return;
      const latent = entries.latent[i];
      if (!found.has(latent)) found.set(latent, new Array(layers.length).fill(0));
      found.get(latent)[entries.layer[i]] += entries.value[i];
    });
    return [...found]
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
      `${single} of them at one only.`;
    const any = (await figures)["heatmap"]; // for the same look
    const [trace] = any.data;
    await draw(plot, {
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
      layout: { ...any.layout, xaxis: { ...any.layout.xaxis, title: { text: "latents active at the token, in the order of their mean layer there" } } },
    });
    plot.removeAllListeners("plotly_click");
    plot.on("plotly_click", ({ points: [point] }) => openLatent(point.customdata[0]));
  }

  document.getElementById("prompt").append(
    ...tokens.map((token, i) => element("button", { type: "button", class: "chip", title: `token ${i}`, onclick: () => show(i) }, visible(token))),
  );
  let busiest = tokens.length - 1; // the last token that has latents
  while (busiest > 0 && !entries.token.includes(busiest)) busiest--;
  show(busiest);
})();
