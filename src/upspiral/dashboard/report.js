"use strict";
// Everything is put on the page as text, never as markup: the words are a model's.
const root = document.documentElement;
const tip = document.getElementById("tip");

function place(event) {
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const left = Math.min(event.clientX + 14, innerWidth - box.width - 8);
  const below = event.clientY + 18;
  tip.style.left = `${Math.max(left, 8)}px`;
  tip.style.top = `${below + box.height > innerHeight ? event.clientY - box.height - 12 : below}px`;
}

function fill(title, rows) {
  const head = document.createElement("b");
  head.textContent = title;
  const table = document.createElement("table");
  for (const [name, value, colour] of rows) {
    const row = table.insertRow();
    const cell = row.insertCell();
    if (colour !== undefined) {
      const key = document.createElement("i");
      key.className = `s${Number(colour)} key`;
      cell.append(key);
    }
    cell.append(name);
    row.insertCell().textContent = value;
  }
  tip.replaceChildren(head, table);
}

for (const chart of document.querySelectorAll("svg.chart")) {
  const points = JSON.parse(chart.dataset.hover);
  const cursor = chart.querySelector(".cursor");
  chart.addEventListener("pointermove", (event) => {
    const box = chart.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * chart.viewBox.baseVal.width;
    const near = points.reduce((a, b) => (Math.abs(b.x - x) < Math.abs(a.x - x) ? b : a));
    cursor.setAttribute("x1", near.x);
    cursor.setAttribute("x2", near.x);
    fill(near.title, near.rows);
    place(event);
  });
  chart.addEventListener("pointerleave", () => {
    cursor.setAttribute("x1", -9);
    cursor.setAttribute("x2", -9);
    tip.hidden = true;
  });
}

document.addEventListener("pointerover", (event) => {
  const token = event.target.closest?.(".tokens b[data-t]");
  if (!token) {
    if (!event.target.closest?.("svg.chart")) tip.hidden = true;
    return;
  }
  const [id, logprob, version] = token.dataset.t.split("|");
  const rows = [
    ["probability", Math.exp(Number(logprob)).toPrecision(3)],
    ["log-probability", logprob],
    ["token id", id],
    ["policy version", version],
  ];
  const advantage = token.parentElement.dataset.advantage;
  if (advantage !== undefined) rows.push(["advantage", advantage]);
  fill(JSON.stringify(token.textContent.replaceAll("↵\n", "\n")), rows);
  place(event);
});

document.getElementById("theme").addEventListener("click", () => {
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});
document.getElementById("tokens")?.addEventListener("click", () => {
  root.dataset.tokens = root.dataset.tokens === "on" ? "off" : "on";
});
