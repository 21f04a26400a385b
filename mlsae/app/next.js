// What may follow the chosen token: for the model, with reconstructions, and with the changes.
"use strict";

let nextNow = null; // the request that runs

async function showNext() {
  if (!reading || chosenToken === null) return;
  nextNow?.abort();
  const mine = (nextNow = new AbortController());
  const box = document.getElementById("next");
  box.setAttribute("aria-busy", "true");
  try {
    const asked = { text: reading.text, position: chosenToken, edits: readEdits() };
    const { rows } = await (await ask("next", asked, { signal: mine.signal })).json();
    if (mine === nextNow) box.replaceChildren(nextTable(rows));
  } catch (error) {
    if (mine === nextNow && error.name !== "AbortError") box.replaceChildren(element("p", { class: "said failed" }, error.message));
  } finally {
    if (mine === nextNow) box.removeAttribute("aria-busy");
  }
}

function nextTable(rows) {
  const names = { model: "model", changed: "steered" };
  const percent = (p) => (p >= 0.0995 ? `${(100 * p).toFixed(0)}\u202f%` : `${(100 * p).toFixed(1)}\u202f%`);
  const chips = (tokens) =>
    tokens.slice(0, 5).map(({ text, p, logit }) => {
      const chip = element("span", { class: "next-token", title: `p ${p.toPrecision(3)}, logit ${logit.toFixed(2)}` }, element("code", {}, visible(text)), ` ${percent(p)}`);
      chip.style.setProperty("--p", p);
      return chip;
    });
  const head = element("tr", {}, ...["", "KL", "likeliest next tokens"].map((text) => element("th", { scope: "col" }, text)));
  const body = rows.map(({ name, kl, tokens }) =>
    element("tr", { class: names[name] ?? null }, element("th", { scope: "row" }, names[name] ?? `x̂ at layer ${name}`), element("td", {}, name === "model" ? "" : kl.toFixed(3)), element("td", {}, ...chips(tokens))),
  );
  return element("table", { class: "next-tokens" }, element("thead", {}, head), element("tbody", {}, ...body));
}
