// Where a page that is one file has its data: packed, in elements of its own. (The app's page fetches them.)
"use strict";

// The text of a name; null if the page does not hold it.
async function unpack(name) {
  const packed = document.getElementById(`packed-${name}`);
  if (!packed) return null;
  const bytes = Uint8Array.from(atob(packed.textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}

const loadPlotly = async () => document.head.append(element("script", {}, await unpack("plotly")));

if (!("DecompressionStream" in window)) {
  const text = "This browser is too old to unpack the page. Chrome 80, Firefox 113, Safari 16.4 and later can.";
  document.body.prepend(Object.assign(document.createElement("p"), { className: "missing", textContent: text }));
}
