// Changes of latents, and the text that follows with and without them.
"use strict";

const editsBox = document.getElementById("edits");
const sliders = { sigma: [-12, 12, 0.1], max: [-3, 3, 0.05], mean: [-6, 6, 0.1], raw: [-50, 50, 0.5], scale: [-2, 4, 0.05] };
const changed = afterAWhile(() => showNext(), 250);

function addEdit(latent, layers) {
  const number = (name, attributes) => element("input", { name, type: "number", "aria-label": name, ...attributes });
  const select = (name, values) => element("select", { name, "aria-label": name }, ...values.map(([value, text]) => element("option", { value }, text)));
  const units = select("units", [["max", "× largest"], ["mean", "× mean"], ["sigma", "σ"], ["raw", "raw"]].slice(analyzed ? 0 : 2));
  const op = select("op", [["add", "add"], ["scale", "scale"], ["clamp", "clamp"], ["ablate", "ablate"]]);
  const value = number("value", { step: "any", value: analyzed ? 1 : 4 });
  const slider = element("input", { type: "range", "aria-label": "value, by a slider" });
  const named = (text, ...inputs) => element("label", {}, element("span", {}, text), ...inputs);
  const valueField = element("div", { class: "value" }, element("span", {}, "value"), slider, value);
  const row = element("fieldset", { class: "edit" },
    named("latent", number("latent", { min: 0, max: nLatents - 1, value: latent })),
    named("layers", element("input", { name: "layers", "aria-label": "layers", value: layers, placeholder: "all", autocomplete: "off" })),
    named("change", op),
    valueField,
    named("units", units),
    named("positions", element("input", { name: "positions", "aria-label": "positions", value: "all", list: "positions", autocomplete: "off" })),
    element("button", { type: "button", title: "Remove this change", "aria-label": "Remove this change", onclick: () => { row.remove(); changed(); } }, "×"),
  );
  function range() {
    const [least, most, step] = sliders[op.value === "scale" ? "scale" : units.value];
    Object.assign(slider, { min: least, max: most, step });
    slider.value = value.value;
    units.disabled = op.value === "scale" || op.value === "ablate";
    slider.disabled = value.disabled = op.value === "ablate";
  }
  slider.addEventListener("input", () => (value.value = slider.value));
  value.addEventListener("input", () => (slider.value = value.value));
  op.addEventListener("change", range);
  units.addEventListener("change", range);
  row.addEventListener("input", changed);
  range();
  editsBox.append(row);
  changed();
}

// The changes as the program takes them.
function readEdits() {
  return [...editsBox.children].map((row) => {
    const value = (name) => row.querySelector(`[name=${name}]`).value.trim();
    const op = value("op");
    const number = value("value") === "" ? null : Number(value("value"));
    const layers = value("layers");
    return {
      latent: value("latent") === "" ? null : Number(value("latent")),
      layers: layers === "" || layers === "all" ? null : layers.split(/[\s,]+/).filter(Boolean).map((layer) => (/^\d+$/.test(layer) ? Number(layer) : layer)),
      op,
      value: op === "ablate" ? null : number,
      units: op === "scale" ? "sigma" : value("units"),
      positions: value("positions") || "all",
    };
  });
}

// By default, the chosen latent at the layer where it is most active at the chosen token.
document.getElementById("add-edit").addEventListener("click", () => {
  const column = reading && chosenToken !== null ? latentsAt(reading, chosenToken).find(({ latent }) => latent === chosenLatent) : null;
  addEdit(chosenLatent ?? 0, column ? String(reading.layers[column.h.indexOf(Math.max(...column.h))]) : "");
});

let generating = null;
let baselineOf = null; // what the baseline that is shown was asked with

const side = (name) => ({ box: document.getElementById(name), state: document.getElementById(`${name}-state`) });

function showSide(name, prompt, text, state) {
  const { box, state: node } = side(name);
  box.replaceChildren(element("span", { class: "before" }, prompt), text);
  node.textContent = state;
}

async function generate() {
  const text = document.getElementById("text").value;
  const number = (id) => Number(document.getElementById(id).value);
  const sampling = { max_new_tokens: number("new-tokens"), temperature: number("temperature"), seed: number("seed") };
  const key = JSON.stringify([text, sampling]);
  if (reading?.text !== text) read();
  const edits = readEdits();
  const sides = [...(key === baselineOf ? [] : ["baseline"]), ...(edits.length ? ["steered"] : [])];
  say("steer-said", edits.length ? null : "Add a change to see what it does; the baseline is the model as it is.");
  if (!sides.length) return;
  generating?.abort();
  const mine = (generating = new AbortController());
  for (const name of sides) showSide(name, text, "", "…");
  if (!edits.length) showSide("steered", "", "", "");
  document.getElementById("stop").disabled = false;
  const current = Object.fromEntries(sides.map((name) => [name, ["", 0]]));
  try {
    const response = await ask("generate", { text, edits, sides, ...sampling }, { signal: mine.signal });
    for await (const event of lines(response.body)) {
      if (event.error) throw new Error(event.error);
      if (event.waiting) say("steer-said", "Waiting for another request to end, of this tab or another …");
      if (!event.side) continue;
      say("steer-said", null);
      const [, tokens] = (current[event.side] = [event.text, event.tokens ?? current[event.side][1]]);
      showSide(event.side, text, event.text, `${tokens} tokens${event.done ? "" : " …"}`);
      if (event.side === "baseline" && event.done) baselineOf = key;
    }
  } catch (error) {
    if (mine !== generating) return;
    say("steer-said", error);
    for (const name of sides)
      if (side(name).state.textContent.endsWith("…")) side(name).state.textContent = current[name][1] ? `${current[name][1]} tokens, stopped` : "stopped";
  } finally {
    if (mine === generating) document.getElementById("stop").disabled = true;
  }
}

// The objects of a stream of lines of JSON.
async function* lines(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const whole = (rest + value).split("\n");
    rest = whole.pop();
    for (const line of whole) yield JSON.parse(line);
  }
}

document.getElementById("generate").addEventListener("click", generate);
document.getElementById("stop").addEventListener("click", () => generating?.abort());
editsBox.after(element("datalist", { id: "positions" }, ...["all", "prompt", "generated", "last", "-1", "1:"].map((value) => element("option", { value }))));
