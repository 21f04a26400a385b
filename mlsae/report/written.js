// What a user has written of latents.
"use strict";

const labels = new Map(); // latent → {label, notes}

// What the panel of a latent shows of it. (In the app it can be changed.)
let written = (id) => {
  const { label, notes } = labels.get(id) ?? {};
  return element("div", { class: "written" }, ...(label ? [element("p", {}, element("b", {}, label))] : []), ...(notes ? [element("p", { class: "notes" }, notes)] : []));
};
