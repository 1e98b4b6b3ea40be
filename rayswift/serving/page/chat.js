// The page: its key, its one or two conversations and the box that both are asked from.

import { choices, key } from "./api.js";
import { Column } from "./column.js";

const $ = (id) => document.getElementById(id);
const columns = [new Column("A"), new Column("B")];
const prompt = $("prompt");
let running = null; // the AbortController of the answers that are being given

const shown = () => columns.slice(0, $("compare").checked ? 2 : 1);

async function open() {
  try {
    const found = await choices();
    columns.forEach((column, index) => column.offer(found, index));
    show({ locked: false, notice: found.length ? "" : "There is no model here that this key may ask." });
    $("composer").hidden = !found.length;
    $("columns").hidden = !found.length;
    prompt.focus();
  } catch (error) {
    refused(error);
  }
}

/** What the page does about an error of the endpoint: asks for a key where that is what is missing. */
function refused(error) {
  if (error.status !== 401) {
    show({ notice: sentence(error.message) });
    return;
  }
  const given = key.get() !== "";
  key.forget();
  show({ locked: true, notice: given ? "This key is refused." : "" });
  $("key").focus();
}

function show({ locked, notice }) {
  $("notice").textContent = notice;
  $("notice").hidden = !notice;
  $("forget").hidden = !key.get();
  if (locked === undefined) return;
  $("locked").hidden = !locked;
  for (const part of [$("columns"), $("composer"), $("compare").parentElement, $("new")]) part.hidden = locked;
}

const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");

async function send() {
  const question = prompt.value.trim();
  if (running || !question || !valid()) return;
  prompt.value = "";
  running = new AbortController();
  busy(true);
  const settings = read();
  const failures = await Promise.all(shown().map((column) => column.ask(question, settings, running.signal)));
  running = null;
  busy(false);
  // Nobody answered: the question comes back, to be asked again.
  if (failures.every(Boolean) && !prompt.value) prompt.value = question;
  const locked = failures.find((failure) => failure?.status === 401);
  if (locked) refused(locked);
}

function busy(is) {
  $("send").hidden = is;
  $("stop").hidden = !is;
  $("compare").disabled = $("new").disabled = is;
  prompt.focus();
}

function valid() {
  const fields = [$("temperature"), $("max-tokens")];
  if (fields.every((field) => field.checkValidity())) return true;
  $("settings").open = true;
  fields.find((field) => !field.reportValidity());
  return false;
}

function read() {
  const number = (id) => ($(id).value === "" ? undefined : Number($(id).value));
  return { system: $("system").value.trim(), temperature: number("temperature"), max_tokens: number("max-tokens") };
}

function arrange() {
  const both = $("compare").checked;
  if (both) columns[1].copy(columns[0]); // so that both go on from the same conversation
  $("columns").replaceChildren(...shown().map((column) => column.root));
  $("columns").classList.toggle("both", both);
  for (const column of shown()) column.showEnd();
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
$("stop").addEventListener("click", () => running?.abort());
$("compare").addEventListener("change", arrange);
$("new").addEventListener("click", () => {
  columns.forEach((column) => column.clear());
  prompt.focus();
});
$("forget").addEventListener("click", () => {
  running?.abort();
  key.forget();
  columns.forEach((column) => column.clear());
  open();
});
$("locked").addEventListener("submit", (event) => {
  event.preventDefault();
  const given = $("key").value.trim();
  if (!/^[\x21-\x7e]+$/.test(given)) return show({ notice: "A key is printable ASCII without spaces." });
  key.set(given);
  $("key").value = "";
  open();
});

$("host").textContent = location.host;
arrange();
open();
