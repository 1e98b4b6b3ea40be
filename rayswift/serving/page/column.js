// One conversation with one model: its choice, where that comes from, and the turns. Text of people and models is only
// ever put into text nodes.

import { chunks } from "./api.js";

export class Column {
  constructor(letter) {
    const root = document.getElementById("column").content.cloneNode(true).firstElementChild;
    this.root = root;
    this.select = root.querySelector("select");
    this.log = root.querySelector(".log");
    this.lineage = root.querySelector(".lineage");
    this.choices = [];
    root.setAttribute("aria-label", `Conversation ${letter}`);
    this.log.setAttribute("aria-label", `Messages of conversation ${letter}`);
    root.querySelector(".unseen").textContent = `Model of conversation ${letter}`;
    this.select.addEventListener("change", () => this.#showLineage());
    this.clear();
  }

  get choice() {
    return this.choices[this.select.selectedIndex];
  }

  /** Offers these models, keeping the one that is chosen; `fallback` is the index that is chosen otherwise. */
  offer(choices, fallback) {
    const before = this.choice;
    this.choices = choices;
    this.select.replaceChildren(...choices.map((choice) => element("option", "", nameOf(choice))));
    const kept = before ? choices.findIndex((choice) => nameOf(choice) === nameOf(before)) : -1;
    this.select.selectedIndex = kept >= 0 ? kept : Math.min(fallback, choices.length - 1);
    this.#showLineage();
  }

  clear() {
    this.turns = []; // what is sent: questions that got an answer, and the answers
    this.log.replaceChildren(element("p", "empty", "Nothing has been said yet."));
  }

  /** Begins where another conversation is now. */
  copy(other) {
    this.turns = [...other.turns];
    this.log.replaceChildren(...[...other.log.childNodes].map((node) => node.cloneNode(true)));
  }

  /** Asks, and shows the answer as it grows. Gives back the error, if there was one and no text came before it. */
  async ask(question, { system, ...settings }, signal) {
    const choice = this.choice;
    this.log.querySelector(".empty")?.remove();
    this.#add("user", "You", question);
    const answer = new Answer(this.#add("assistant", nameOf(choice)));
    const asked = [...this.turns, { role: "user", content: question }];
    this.log.setAttribute("aria-busy", "true"); // read out when it is whole, not word by word
    this.showEnd();
    let failure = null;
    try {
      const sent = system ? [{ role: "system", content: system }, ...asked] : asked;
      for await (const chunk of chunks(choice, sent, settings, signal)) {
        const atEnd = this.#atEnd;
        answer.take(chunk);
        if (atEnd) this.showEnd();
      }
    } catch (error) {
      if (error.name === "AbortError") answer.reason = "stopped";
      else failure = error;
    }
    const atEnd = this.#atEnd;
    answer.finish(failure);
    if (atEnd) this.showEnd();
    this.log.setAttribute("aria-busy", "false");
    if (answer.text.data) this.turns = [...asked, { role: "assistant", content: answer.text.data }];
    return answer.text.data ? null : failure;
  }

  #add(role, name, said = "") {
    const turn = element("article", role);
    turn.append(element("h2", "", name), element("div", "text", said));
    this.log.append(turn);
    return turn;
  }

  get #atEnd() {
    return this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < 48;
  }

  showEnd() {
    this.log.scrollTop = this.log.scrollHeight;
  }

  #showLineage() {
    const known = this.choice?.rayswift;
    const summary = this.lineage.querySelector("summary");
    this.lineage.classList.toggle("unknown", !known);
    if (!known) {
      this.lineage.open = false;
      summary.textContent = "No export: where it comes from is not known";
      this.lineage.querySelector("dl").replaceChildren();
      return;
    }
    summary.replaceChildren("Version ", element("code", "", known.version));
    if (known.verified) summary.append(" ", element("span", "badge", "verified"));
    const rows = lines(known).flatMap(([name, value]) => [element("dt", "", name), element("dd", "", value)]);
    this.lineage.querySelector("dl").replaceChildren(...rows);
  }
}

/** An answer as it grows, with what was counted of it. */
class Answer {
  constructor(turn) {
    this.turn = turn;
    this.text = document.createTextNode("");
    turn.querySelector(".text").append(this.text);
    this.figures = turn.appendChild(element("p", "figures", "…"));
    this.tokens = 0; // chunks, until the endpoint says how many tokens they were
    this.exact = false;
    this.reason = null;
    this.version = null;
  }

  take(chunk) {
    this.version = chunk.system_fingerprint ?? this.version;
    const choice = chunk.choices?.[0];
    if (choice?.delta?.content) {
      this.last = performance.now();
      this.first ??= this.last;
      this.tokens += 1;
      this.text.appendData(choice.delta.content);
    }
    this.reason = choice?.finish_reason ?? this.reason;
    if (chunk.usage) {
      this.tokens = chunk.usage.completion_tokens;
      this.exact = true;
    }
    this.figures.textContent = this.#figures();
  }

  finish(failure) {
    if (failure) this.turn.append(element("p", "failure", failure.message));
    this.figures.textContent = this.#figures();
    if (!this.figures.textContent) this.figures.remove();
  }

  #figures() {
    const seconds = (this.last - this.first) / 1000; // from the first token on, so without the prompt and the queue
    const speed = this.tokens > 1 && seconds > 0 ? (this.tokens - 1) / seconds : null;
    return [
      this.tokens ? `${this.exact ? "" : "~"}${this.tokens} ${this.tokens === 1 ? "token" : "tokens"}` : null,
      speed && `${speed.toPrecision(3)} tokens/s`.replace(/(\.\d+)?e\+\d+/, () => String(Math.round(speed))),
      this.reason && (REASONS[this.reason] ?? this.reason),
      this.version && `version ${this.version}`,
    ].filter(Boolean).join(" · ");
  }
}

const REASONS = { stop: "finished (stop)", length: "cut off (length)", stopped: "stopped by you" };

function nameOf(choice) {
  return choice.version ? `${choice.model} · ${choice.version}` : choice.model;
}

/** What is shown of a lineage, as [name, value]; what is not known is left out. */
function lines(known) {
  const step = known.checkpoint_step ?? null;
  const all = [
    ["Base", [known.base, short(known.base_sha256)]],
    ["Method", [known.method]],
    ["Run", [known.run, step === null ? null : `step ${step}`, known.run_finished === false ? "not finished" : null]],
    ["Job", [short(known.job_hash)]],
    ["Quantizer", [known.quantizer === "none" ? null : known.quantizer]],
    ["Perplexity", [known.perplexity_ratio && `× ${known.perplexity_ratio.toFixed(4)} of the unquantized`]],
    ["Type", [known.dtype]],
  ];
  return all
    .map(([name, values]) => [name, values.filter((value) => value !== null && value !== undefined).join(" · ")])
    .filter(([, value]) => value);
}

function short(sha256) {
  return sha256 ? sha256.slice(0, 12) : null;
}

function element(tag, className = "", text = "") {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.textContent = text;
  return made;
}
