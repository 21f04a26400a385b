// The browser of latents: a list to sort and search, and the chosen latent's profile and examples.
"use strict";

let openLatent = () => {}; // open a latent by its id; set when the data are unpacked
let openPlace = () => {}; // open a latent by its place in the list sorted by a key
const latentTable = unpack("latents").then(JSON.parse);

(async () => {
  const data = await latentTable;
  for (const [id, label] of Object.entries(data.labels)) labels.set(Number(id), label);
  const L = data.layers.length;
  const rowOf = new Map(data.latent.map((id, row) => [id, row]));
  const allRows = Uint32Array.from(data.latent.keys());
  const state = { sort: "frequency", descending: true, query: "" };

  // The text searched: the tokens at which a latent is most active, those nearest to it in the embeddings, and what a user wrote.
  const searchText = data.latent.map((_, row) => [data.peaks[row], data.tokens_in[row], data.tokens_out[row]].flat().join("\u0000").toLowerCase());

  const percent = (share) => (share === null ? "–" : share >= 0.1 ? `${(100 * share).toFixed(0)} %` : `${Number((100 * share).toPrecision(2))} %`);
  const fixed = (digits) => (value) => (value === null ? "–" : value.toFixed(digits));
  const chips = (tokens) => tokens.map((token) => element("span", { class: "chip" }, visible(token)));
  const named = (row) => (labels.get(data.latent[row])?.label ? [element("b", { class: "label" }, labels.get(data.latent[row]).label)] : []);
  const shares = (row, name = "profile") => data[name].slice(row * L, (row + 1) * L).map((value) => value / 1000);

  const columns = [
    { key: "latent", label: "latent", cell: (row) => data.latent[row] },
    { key: null, label: "layers", cell: bars },
    { key: "mean_layer", label: "mean", title: "mean layer", cell: (row) => fixed(2)(data.mean_layer[row]) },
    { key: "entropy", label: "entropy", title: "entropy over layers ÷ ln L", cell: (row) => fixed(2)(data.entropy[row]) },
    { key: "frequency", label: "frequency", title: "share of tokens at which the latent is active", cell: (row) => percent(data.frequency[row]) },
    { key: "max_activation", label: "max", title: "largest activation", cell: (row) => fixed(1)(data.max_activation[row]) },
    ...(data.others ? [{ key: "match_decoder", label: "match", title: "best cosine in other SAEs, mean", cell: (row) => fixed(2)(data.match_decoder[row]) }] : []),
    { key: null, label: "most active at", cell: (row) => element("span", { class: "peaks" }, ...named(row), ...chips(data.peaks[row])) },
  ];

  function bars(row) {
    const box = element("span", { class: L > 20 ? "bars many" : "bars", role: "img", "aria-label": "share of each layer" });
    for (const share of shares(row)) {
      const bar = element("i");
      bar.style.height = `${100 * share}%`;
      box.append(bar);
    }
    return box;
  }

  if (data.others) document.getElementById("list").classList.add("matched");
  const list = new VirtualList(
    document.getElementById("list"),
    document.getElementById("rows"),
    32,
    (row) => columns.map(({ cell }) => element("div", { role: "gridcell" }, cell(row))),
    (row) => {
      history.replaceState(null, "", `#latent-${data.latent[row]}`);
      detail(row);
    },
  );

  function matches() {
    const query = state.query.toLowerCase().replaceAll("·", " ").replaceAll("⏎", "\n").replaceAll("⇥", "\t");
    if (!query) return allRows.slice();
    const id = Number(query.match(/^\s*#?(\d+)\s*$/)?.[1] ?? NaN);
    const written = (row) => Object.values(labels.get(data.latent[row]) ?? {}).join("\u0000").toLowerCase();
    return allRows.filter((row) => data.latent[row] === id || searchText[row].includes(query) || written(row).includes(query));
  }

  function refresh() {
    const rows = matches();
    const values = data[state.sort];
    const sign = state.descending ? -1 : 1;
    // Latents without a value come last in both directions.
    rows.sort((a, b) => (values[a] === null) - (values[b] === null) || sign * (values[a] - values[b]) || a - b);
    document.getElementById("columns").replaceChildren(...columns.map(heading));
    const all = data.latent.length;
    document.getElementById("match-count").textContent = `${rows.length.toLocaleString("en")} of ${all.toLocaleString("en")}`;
    list.box.scrollTop = 0;
    list.show(rows);
  }

  function heading({ key, label, title }) {
    if (!key) return element("div", { role: "columnheader" }, label);
    const on = state.sort === key;
    const arrow = on ? (state.descending ? " ▼" : " ▲") : "";
    const sort = () => {
      Object.assign(state, { sort: key, descending: on ? !state.descending : ["frequency", "max_activation", "match_decoder"].includes(key) });
      refresh();
      document.querySelector(`#columns [data-key="${key}"]`).focus();
    };
    const button = element("button", { type: "button", "data-key": key, title: `sort by ${title ?? label}`, onclick: sort }, label + arrow);
    return element("div", { role: "columnheader", "aria-sort": on ? (state.descending ? "descending" : "ascending") : null }, button);
  }

  const search = document.getElementById("search");
  let typing;
  search.addEventListener("input", () => {
    clearTimeout(typing);
    typing = setTimeout(() => {
      state.query = search.value;
      refresh();
    }, 80);
  });
  search.addEventListener("keydown", (event) => {
    if (event.key === "ArrowDown" || event.key === "Enter") {
      event.preventDefault();
      list.box.focus();
      list.select(0);
    }
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "/" || event.target.matches("input, select, textarea")) return;
    event.preventDefault();
    search.focus();
  });

  // The chosen latent.
  const panel = document.getElementById("latent");
  const detail = latentDetail(data, { panel, shares, percent, fixed, chips, link, move: (by) => list.select(list.items.indexOf(list.chosen) + by) });

  function link(id) {
    if (!rowOf.has(id)) return element("span", {}, `${id} (never active)`);
    return element("button", { type: "button", class: "linklike", onclick: () => openLatent(id) }, String(id));
  }

  // Where the panel is not on the screen, scroll to it.
  function reveal() {
    const { top, bottom } = panel.getBoundingClientRect();
    if (top > innerHeight / 2 || bottom < innerHeight / 4) (panel.closest("section") ?? panel).scrollIntoView();
  }

  openLatent = (id, scroll = true) => {
    if (!rowOf.has(id)) return;
    const row = rowOf.get(id);
    if (!list.items.includes(row)) {
      search.value = state.query = "";
      refresh();
    }
    list.select(list.items.indexOf(row));
    if (scroll) reveal();
  };
  openPlace = (place, key) => {
    Object.assign(state, { sort: key, descending: false, query: "" });
    search.value = "";
    refresh();
    list.select(place);
    reveal();
  };
  for (const [name, key] of [["heatmap", "mean_layer"], ["heatmap-totals", "mean_layer_totals"]]) {
    const node = document.querySelector(`[data-plot="${name}"]`);
    if (node) onceDrawn(node, () => node.on("plotly_click", ({ points: [point] }) => openPlace(Math.round(point.x) - 1, key)));
  }

  document.addEventListener("labels", () => list.draw());
  const fromHash = () => Number(location.hash.match(/^#latent-(\d+)$/)?.[1] ?? NaN);
  addEventListener("hashchange", () => openLatent(fromHash()));
  refresh();
  if (rowOf.has(fromHash())) openLatent(fromHash());
  else if (data.latent.length) {
    list.mark(list.items[0]);
    detail(list.items[0]);
  }
  document.documentElement.dataset.browser = "ready";
})();
