// Where the app's page has its data: it asks the program for them.
"use strict";

// The text of a name; null if the run has no such data.
async function unpack(name) {
  const response = await fetch(`data/${name}`);
  if (response.ok) return response.text();
  if (response.status === 404) return null;
  throw new Error((await response.json()).error);
}

const loadPlotly = () => new Promise((resolve, reject) => document.head.append(element("script", { src: "/plotly.js", onload: resolve, onerror: () => reject(new Error("plotly.js cannot be loaded")) })));
