// Asks /v1/chat/completions for a stream with the canvas, and draws each of them.
import { eventParser } from "./events.js";

const element = (id) => document.getElementById(id);
let request = null; // of the answer that is under way

/** Draw the canvas: a box for each position, in which the new tokens stand out. */
function draw(canvas, before) {
  const boxes = canvas.tokens.map((token, index) => {
    const box = document.createElement("span");
    box.className = "token";
    if (token === null) {
      box.classList.add("mask");
      const [start, end] = canvas.block;
      if (start <= index && index < end) box.classList.add("active");
    } else if (before?.tokens[index] === null) {
      box.classList.add("new");
    }
    box.textContent = token === null ? "\u25a2" : token.trim() || "\u00b7";
    return box;
  });
  element("canvas").replaceChildren(...boxes);
  const left = canvas.tokens.filter((token) => token === null).length;
  element("status").textContent = `forward ${canvas.forward}, ${left} masks left`;
}

async function ask() {
  request?.abort();
  const own = (request = new AbortController());
  const body = {
    messages: [{ role: "user", content: element("prompt").value }],
    stream: true,
    stream_options: { include_usage: true, include_canvas: true },
  };
  for (const name of ["threshold", "max_tokens"]) {
    if (element(name).value !== "") body[name] = Number(element(name).value);
  }
  const headers = { "Content-Type": "application/json" };
  if (element("key").value) headers.Authorization = `Bearer ${element("key").value}`;
  element("answer").textContent = "";
  element("canvas").replaceChildren();
  element("status").textContent = "waiting for a row";
  let canvas = null;
  const parse = eventParser((data) => {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Error(chunk.error.message);
    for (const choice of chunk.choices) {
      element("answer").textContent += choice.delta.content ?? "";
      if (choice.canvas) {
        draw(choice.canvas, canvas);
        canvas = choice.canvas;
      }
    }
    if (chunk.usage) {
      const { completion_tokens: tokens, forwards } = chunk.usage;
      element("status").textContent = `${tokens} tokens in ${forwards} forwards`;
    }
  });
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST", headers, body: JSON.stringify(body), signal: own.signal,
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let part; !(part = await reader.read()).done; ) parse(part.value);
  } catch (error) {
    if (request === own) element("status").textContent = error.message;
    own.abort();
  }
}

element("form").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
element("stop").addEventListener("click", () => request?.abort());
