// Labels and notes of latents, which the program keeps in the run's folder.
"use strict";

function takeLabels(all) {
  labels.clear();
  for (const [id, label] of Object.entries(all)) labels.set(Number(id), label);
  const count = labels.size;
  document.getElementById("label-count").textContent = count ? `${count.toLocaleString("en")} label${count === 1 ? "" : "s"}.` : "No labels yet.";
  document.dispatchEvent(new Event("labels"));
}

async function fetchLabels() {
  takeLabels(await (await ask("labels")).json());
}

// The fields of a latent in its panel. They are saved a while after the last key, or when left.
written = (id) => {
  const field = (name, tag, attributes) => {
    const input = element(tag, { name, "aria-label": `${name} of latent ${id}`, spellcheck: "false", ...attributes });
    input.value = labels.get(id)?.[name] ?? "";
    return input;
  };
  const label = field("label", "input", { placeholder: "label", maxlength: 200 });
  const notes = field("notes", "textarea", { placeholder: "notes", maxlength: 4000, rows: 2 });
  const state = element("small", { role: "status", class: "saved" });
  let saved = JSON.stringify([label.value, notes.value]);
  let waiting;
  async function save() {
    clearTimeout(waiting);
    const now = JSON.stringify([label.value, notes.value]);
    if (now === saved) return;
    saved = now;
    state.textContent = "saving …";
    try {
      takeLabels(await (await ask(`labels/${id}`, { label: label.value, notes: notes.value }, { method: "PUT" })).json());
      state.textContent = "saved";
    } catch (error) {
      saved = null; // to be tried again
      state.textContent = `not saved: ${error.message}`;
    }
  }
  for (const input of [label, notes]) {
    input.addEventListener("input", () => {
      state.textContent = "";
      clearTimeout(waiting);
      waiting = setTimeout(save, 700);
    });
    input.addEventListener("change", save);
  }
  // What another tab has written is shown, unless something is being written here.
  document.addEventListener("labels", () => {
    if (!label.isConnected || JSON.stringify([label.value, notes.value]) !== saved) return;
    label.value = labels.get(id)?.label ?? "";
    notes.value = labels.get(id)?.notes ?? "";
    saved = JSON.stringify([label.value, notes.value]);
  });
  return element("div", { class: "written" }, label, notes, state);
};

document.addEventListener("visibilitychange", () => {
  if (!document.hidden) fetchLabels().catch(() => {});
});
