// One latent: its metrics, its profile over the layers, its examples.
"use strict";

function latentDetail(data, { panel, shares, percent, fixed, chips, link, move }) {
  const kinds = { top: "strongest", q4: "strongest quarter", q3: "third quarter", q2: "second quarter", q1: "weakest quarter" };
  const chunks = new Map(); // index → promise of its examples
  let current = null;

  function examplesOf(row) {
    const index = Math.floor(row / data.chunk);
    if (!chunks.has(index)) chunks.set(index, unpack(`examples-${index}`).then(JSON.parse));
    return chunks.get(index).then((chunk) => {
      if (!chunk) return null; // left out of the page
      const place = row % data.chunk;
      const rows = [];
      for (let i = place ? chunk.ends[place - 1] : 0; i < chunk.ends[place]; i++)
        rows.push(Object.fromEntries(["layer", "kind", "activation", "position", "document", "tokens", "activations"].map((name) => [name, chunk[name][i]])));
      return rows;
    });
  }

  function stats(row) {
    const lines = [
      ["active at", `${data.tokens_active[row].toLocaleString("en")} tokens (${percent(data.frequency[row])})`],
      ["mean layer", fixed(2)(data.mean_layer[row])],
      ["standard deviation", `${fixed(2)(data.std_layer[row])} layers`],
      ["… within a token", data.var_within_token[row] === null ? "–" : `${fixed(2)(Math.sqrt(data.var_within_token[row]))} layers`],
      ["entropy ÷ ln L", fixed(3)(data.entropy[row])],
      ["layers above threshold", String(data.n_layers[row])],
      ["largest activation", fixed(2)(data.max_activation[row])],
      ["encoder · decoder, cosine", fixed(2)(data.encoder_cosine[row])],
    ];
    if (data.others) {
      const mutual = data.match_mutual[row];
      const how = mutual === null ? "" : data.others === 1 ? (mutual ? " (mutual)" : " (not mutual)") : ` (mutual in ${percent(mutual)})`;
      lines.push(["match in other SAEs", fixed(2)(data.match_decoder[row]) + how]);
      lines.push(["… of its encoder", fixed(2)(data.match_encoder[row])]);
    }
    if (data.continued) lines.push(["goes on at the next layer", data.continues[row] === null ? "–" : percent(data.continues[row])]);
    const list = element("dl", { class: "stats" });
    const add = (name, ...value) => list.append(element("div", {}, element("dt", {}, name), element("dd", {}, ...value)));
    for (const [name, value] of lines) add(name, value);
    add("nearest latent", link(data.nearest[row]), ` (cosine ${fixed(2)(data.nearest_cosine[row])})`);
    if (data.continued && data.follower[row] >= 0)
      add("where it ends, there begins", link(data.follower[row]), ` (${percent(data.follower_share[row])}; by chance ${percent(data.follower_chance[row])})`);
    if (data.tokens_in[row]?.length) add("nearest input tokens", ...chips(data.tokens_in[row]));
    if (data.tokens_out[row]?.length) add("nearest output tokens", ...chips(data.tokens_out[row]));
    return list;
  }

  function profile(row) {
    const [mean, summed] = [shares(row), shares(row, "profile_totals")];
    const step = Math.ceil(data.layers.length / 20); // label every step-th layer, as far as labels fit
    const box = element("div", { class: step > 1 ? "profile many" : "profile", role: "img", "aria-label": data.layers.map((layer, i) => `layer ${layer}: ${percent(mean[i])}`).join(", ") });
    data.layers.forEach((layer, i) => {
      const column = element("div", { class: "column", title: `layer ${layer}: ${percent(mean[i])}; by summed activation ${percent(summed[i])}` }, element("i"), element("b"));
      column.children[0].style.height = `${100 * mean[i]}%`;
      column.children[1].style.bottom = `${100 * summed[i]}%`;
      box.append(element("div", {}, data.layers.length <= 13 ? element("div", { class: "share" }, percent(mean[i]).replace(" ", "\u202f")) : "", column, element("div", {}, i % step ? "\u00a0" : String(layer))));
    });
    return element("figure", {}, box, element("figcaption", {}, "Share of each layer. Bars: mean over tokens; lines: summed activation."));
  }

  // A dot for each layer, its area by how often the latent is active there; between two, a line as wide as it goes on.
  function lifeline(row) {
    const L = data.layers.length;
    const alive = data.alive.slice(row * L, (row + 1) * L).map((share) => share / 1000);
    const on = data.continued.slice(row * (L - 1), (row + 1) * (L - 1)).map((share) => share / 1000);
    const [width, height] = [100 / L, 34];
    const radius = Math.max(2, Math.min(12, panel.clientWidth / L / 2)); // pixels: neighbors at most touch
    const svg = (name, attributes, title) => {
      const node = document.createElementNS("http://www.w3.org/2000/svg", name);
      for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
      if (title) node.append(Object.assign(document.createElementNS("http://www.w3.org/2000/svg", "title"), { textContent: title }));
      return node;
    };
    const at = (i) => `${((i + 0.5) * width).toFixed(2)}%`;
    const label = data.layers.map((layer, i) => `layer ${layer}: ${percent(alive[i])}${i < L - 1 ? `, goes on ${percent(on[i])}` : ""}`).join("; ");
    const box = svg("svg", { class: "lifeline", height, role: "img", "aria-label": label });
    on.forEach((share, i) => box.append(svg("line", { x1: at(i), x2: at(i + 1), y1: height / 2, y2: height / 2, "stroke-width": (2 * radius * share).toFixed(2) }, `${percent(share)} of its tokens: at layer ${data.layers[i]} and at ${data.layers[i + 1]}`)));
    alive.forEach((share, i) => box.append(svg("circle", { cx: at(i), cy: height / 2, r: (share ? Math.max(1, radius * Math.sqrt(share)) : 0).toFixed(2) }, `active at layer ${data.layers[i]} in ${percent(share)} of its tokens`)));
    return element("figure", {}, box, element("figcaption", {}, "Its life along the layers. Dots: the share of its tokens at which it is active there (area). Lines: at which it is active at both layers."));
  }

  function example({ layer, kind, activation, position, document, tokens, activations }) {
    const largest = Math.max(...activations);
    const text = element("div", { class: "text" });
    tokens.forEach((token, i) => {
      const h = activations[i];
      const on = h > 0;
      const span = element("span", { class: i === position ? "on peak" : on ? "on" : "", title: on ? `${h.toFixed(2)}` : null });
      if (on) {
        span.style.background = `rgba(var(--mark), ${(0.12 + 0.6 * (h / largest)).toFixed(2)})`;
        span.style.borderBottomWidth = `${1 + Math.round((3 * h) / largest)}px`;
      }
      // Show line ends and tabs as signs, so that a window stays within a line or two.
      for (const part of token.split(/(\r?\n|\t)/)) {
        if (/^(\r?\n|\t)$/.test(part)) span.append(element("span", { class: "sign" }, visible(part)));
        else if (part) span.append(part);
      }
      text.append(span);
    });
    const about = `layer ${data.layers[layer]} · ${kinds[kind] ?? kind} · activation ${activation.toFixed(2)} · document ${document}`;
    return element("div", { class: "example" }, element("p", {}, about), text);
  }

  function gallery(row, rows) {
    const box = element("div", { class: "examples" });
    if (!rows?.length) {
      const why = rows ? "No example of this latent was kept." : "To keep the page small, it leaves out the examples of this latent; analysis_examples.parquet holds them.";
      box.append(element("p", { class: "missing" }, why));
      return box;
    }
    const layers = [...new Set(rows.map(({ layer }) => layer))].sort((a, b) => a - b);
    const select = element("select", { "aria-label": "Layer of the examples" }, element("option", { value: "" }, `all ${rows.length} examples`));
    for (const layer of layers) select.append(element("option", { value: layer }, `layer ${data.layers[layer]}`));
    const shown = element("div");
    const fill = () => shown.replaceChildren(...rows.filter(({ layer }) => select.value === "" || layer === Number(select.value)).map(example));
    select.addEventListener("change", fill);
    fill();
    box.append(
      element("div", { class: "filter" }, element("h4", {}, "Examples"), select),
      element("p", {}, element("small", {}, "The example was chosen for the framed token. The stronger a token’s color and the thicker its line, the more active the latent is there; hover over a token to read its activation.")),
      shown,
    );
    return box;
  }

  return async function show(row) {
    const shown = (current = { row });
    document.dispatchEvent(new CustomEvent("latent", { detail: data.latent[row] }));
    const button = (label, by, name) => element("button", { type: "button", title: name, "aria-label": name, onclick: () => move(by) }, label);
    const head = element("header", {}, element("h3", {}, `Latent ${data.latent[row]}`), button("‹", -1, "previous latent in the list"), button("›", 1, "next latent in the list"));
    const body = [head, written(data.latent[row]), stats(row), profile(row), ...(data.continued ? [lifeline(row)] : [])];
    panel.replaceChildren(...body);
    const rows = await examplesOf(row);
    if (current === shown) panel.append(gallery(row, rows));
  };
}
