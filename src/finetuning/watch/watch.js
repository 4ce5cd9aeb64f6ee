"use strict";
// Keeps the parts of the page up to date, and sends what the user asks of a run.
const address = document.body.dataset.address, connection = document.querySelector(".connection");
const chosen = new Set();

// The token comes after the # of the address, which browsers never send, and is forgotten with the tab.
if (location.hash.length > 1) {
  sessionStorage.setItem("token", location.hash.slice(1));
  history.replaceState(null, "", location.pathname + location.search);
}
const token = sessionStorage.getItem("token");
document.body.classList.toggle("may-control", Boolean(token));

function update(name, html) {
  const part = document.querySelector(`[data-live="${name}"]`);
  if (!part) return;
  const open = [...part.querySelectorAll("details")].map((item) => item.open);
  const log = part.querySelector(".log"), position = log && log.scrollHeight - log.scrollTop - log.clientHeight > 20 ? log.scrollTop : null;
  // The server has escaped every value.
  part.innerHTML = html;
  part.querySelectorAll("details").forEach((item, index) => { item.open = open[index] ?? false; });
  activate(part);
  settle(position);
}

function settle(position) {
  const log = document.querySelector(".log"), chat = document.getElementById("chat");
  if (log) log.scrollTop = position ?? log.scrollHeight;
  if (chat) chat.hidden = document.querySelector("[data-running]")?.dataset.running !== "no";
  for (const box of document.querySelectorAll("[data-compare]")) box.checked = chosen.has(box.dataset.compare);
  const only = document.body.dataset.follow === "yes" ? document.querySelectorAll("[data-run]") : [];
  if (only.length === 1) location.replace("/run/" + only[0].dataset.run);
  filter();
}

function filter() {
  const query = document.getElementById("filter")?.value.toLowerCase() ?? "";
  for (const row of document.querySelectorAll("[data-run]")) row.hidden = !row.dataset.text.toLowerCase().includes(query);
  const button = document.getElementById("compare");
  if (button) button.disabled = chosen.size < 2 || chosen.size > 6;
}

function connect() {
  const source = new EventSource(document.body.dataset.events);
  source.addEventListener("open", () => { connection.className = "connection on"; connection.textContent = "live"; });
  source.addEventListener("error", () => { connection.className = "connection off"; connection.textContent = "no connection, trying again"; });
  source.addEventListener("message", (event) => {
    const page = JSON.parse(event.data);
    document.title = page.title;
    for (const [name, html] of Object.entries(page.sections)) update(name, html);
  });
}

function post(path, body, signal) {
  const headers = { Authorization: "Bearer " + token, "Content-Type": "application/json" };
  return fetch(address + path, { method: "POST", headers, body: JSON.stringify(body), signal });
}

document.addEventListener("click", async (event) => {
  const button = event.target.closest?.("[data-stop]");
  if (!button) return;
  if (button.dataset.sure !== "yes") {
    button.dataset.sure = "yes"; button.textContent = "Really stop?";
    return;
  }
  button.disabled = true;
  try {
    button.textContent = (await (await post("/stop", {})).json()).message;
  } catch { button.textContent = "The server did not answer"; }
});
document.addEventListener("change", (event) => {
  const id = event.target.dataset?.compare;
  if (id) { chosen[event.target.checked ? "add" : "delete"](id); filter(); }
});
document.getElementById("filter")?.addEventListener("input", filter);
document.getElementById("compare")?.addEventListener("click", () => {
  location.href = "/compare?" + [...chosen].map((id) => "run=" + id).join("&");
});

const chat = document.getElementById("chat");
if (chat) {
  const talk = chat.querySelector(".talk"), form = chat.querySelector("form"), cancel = chat.querySelector("[data-cancel]");
  let answer = null, isNew = true;
  const say = (kind, text) => {
    const line = Object.assign(document.createElement("div"), { className: "said " + kind, textContent: text });
    talk.append(line); talk.scrollTop = talk.scrollHeight;
    return line;
  };
  const ask = async (question, adapter) => {
    say("question", question);
    const line = say("answer", "…");
    answer = new AbortController(); cancel.disabled = false;
    let text = "";
    try {
      const response = await post("/chat", { question, adapter, new: isNew }, answer.signal);
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
      for (let rest = ""; ;) {
        const { done, value } = await reader.read();
        if (done) break;
        const lines = (rest + value).split("\n");
        rest = lines.pop();
        for (const item of lines.map((entry) => JSON.parse(entry))) {
          if (item.text) { text += item.text; line.textContent = text; isNew = false; }
          if (item.note) line.append(Object.assign(document.createElement("small"), { textContent: item.note }));
          if (item.error) { line.className = "said problem"; line.textContent = item.error; }
        }
        talk.scrollTop = talk.scrollHeight;
      }
    } catch (error) {
      if (error.name === "AbortError") line.append(Object.assign(document.createElement("small"), { textContent: "interrupted" }));
      else { line.className = "said problem"; line.textContent = "The server did not answer."; }
    }
    answer = null; cancel.disabled = true;
  };
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const question = form.question.value.trim();
    if (!question || answer) return;
    form.question.value = "";
    ask(question, form.adapter.checked);
  });
  form.question.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); form.requestSubmit(); }
  });
  cancel.addEventListener("click", () => answer?.abort());
  chat.querySelector("[data-new]").addEventListener("click", () => { answer?.abort(); talk.replaceChildren(); isNew = true; });
}

settle(null);
connect();
