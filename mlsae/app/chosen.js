// The chosen latent: its panel, and who is told of it.
"use strict";

const nLatents = Number(document.querySelector(".app").dataset.latents);
const analyzed = typeof latentTable !== "undefined";
let chosenLatent = null;

// Its panel if the analysis knows it; else one with what is known without.
async function chooseLatent(id, scroll = false) {
  if (!Number.isInteger(id) || id < 0 || id >= nLatents) return;
  const table = analyzed ? await latentTable : null;
  if (table?.latent.includes(id)) {
    openLatent(id, scroll);
    return;
  }
  const why = analyzed ? "It was never active in the analysis." : "Nothing is known of it yet: the run has not been analyzed.";
  document.getElementById("latent").replaceChildren(element("header", {}, element("h3", {}, `Latent ${id}`)), written(id), element("p", { class: "missing" }, why));
  document.dispatchEvent(new CustomEvent("latent", { detail: id }));
}

document.addEventListener("latent", ({ detail }) => {
  chosenLatent = detail;
});
