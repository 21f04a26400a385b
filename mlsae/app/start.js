// The page begins: the list of runs, the labels, and a first prompt once the model is there.
"use strict";

document.getElementById("runs")?.addEventListener("change", ({ target }) => (location.href = `/runs/${target.value}/`));

(async () => {
  const state = document.getElementById("state");
  const failed = (error) => {
    state.classList.add("failed");
    state.textContent = error.message;
  };
  document.getElementById("text").value = sessionStorage.getItem("prompt") ?? document.getElementById("text").value;
  if (analyzed) latentTable.catch(failed);
  try {
    await fetchLabels();
    await ask("status");
    state.textContent = "";
    await read();
    document.documentElement.dataset.app = "ready";
  } catch (error) {
    failed(error);
  }
})();
