// Ask the program, and say what it says of bad requests.
"use strict";

async function ask(path, body, { method = "POST", signal } = {}) {
  const options = body === undefined ? { signal } : { method, signal, body: JSON.stringify(body), headers: { "Content-Type": "application/json" } };
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("mlsae.app does not answer: is it still running?");
  }
  if (response.ok) return response;
  const { error } = await response.json().catch(() => ({ error: `mlsae.app answers with status ${response.status}` }));
  throw new Error(error);
}

// An error or a word is told beside what was asked; null clears it.
function say(id, error) {
  if (error?.name === "AbortError") return;
  const node = document.getElementById(id);
  node.classList.toggle("failed", error instanceof Error);
  node.textContent = error?.message ?? error ?? "";
}

// Call `then` once, some time after the last call.
function afterAWhile(then, milliseconds) {
  let waiting;
  return (...values) => {
    clearTimeout(waiting);
    waiting = setTimeout(then, milliseconds, ...values);
  };
}
