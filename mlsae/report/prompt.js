// The heatmap of a single token of the prompt that was analyzed.
"use strict";

(async () => {
  const reading = JSON.parse(await unpack("prompt"));
  const { tokens, layers, entries } = reading;
  const node = document.getElementById("token-plot");
  const caption = document.getElementById("token-caption");

  async function show(token) {
    const chips = document.querySelectorAll("#prompt button");
    chips.forEach((chip, i) => chip.setAttribute("aria-pressed", i === token));
    const columns = latentsAt(reading, token);
    const single = columns.filter(({ h }) => h.filter((value) => value > 0).length === 1).length;
    caption.textContent =
      `“${visible(tokens[token])}”: ${columns.length} latents are active at some layer, ` +
      `${single} of them at one layer only.`;
    const noted = columns.map((column) => ({ ...column, note: activationNotes(column) }));
    await drawColumns(node, layers, noted, "latents active at the token, sorted by mean layer there", openLatent);
  }

  document.getElementById("prompt").append(
    ...tokens.map((token, i) => element("button", { type: "button", class: "chip", title: `token ${i}`, onclick: () => show(i) }, visible(token))),
  );
  let last = tokens.length - 1; // the last token with an active latent
  while (last > 0 && !entries.token.includes(last)) last--;
  show(last);
})();
