// Replays two recorded answers: every step's text appears at the time at which it arrived.
"use strict";

const recorded = JSON.parse(document.getElementById("recorded").textContent);
const [all, prompt, speed, play, time, clock, verdict] =
  ["all", "prompt", "speed", "play", "time", "clock", "verdict"]
    .map((part) => document.getElementById(`replay-${part}`));

let sides = []; // what is drawn of the chosen prompt: base, then MTP
let end = 0; // seconds from the request to the last token of the slower side
let now = 0;
let frame = null; // of the animation, null while it stands still
let last = 0; // when that frame was drawn, in milliseconds

function makeSide(name, answer) {
  const steps = answer.steps.map((step) => {
    const span = document.createElement("span");
    span.textContent = step.text; // as text: it may look like anything
    span.classList.toggle("draft", step.accepted > 0);
    span.classList.toggle("apart", step.apart);
    return { ...step, span };
  });
  document.getElementById(`replay-${name}-text`).replaceChildren(...steps.map((s) => s.span));
  const counters = document.getElementById(`replay-${name}-counters`);
  return { steps, draftsPerStep: answer.k, counters };
}

// Tokens after the first chunk over the time since it, as the decode speed is measured.
function tokensPerSecond(arrived, at) {
  const decoded = arrived.slice(1).reduce((sum, step) => sum + step.tokens, 0);
  return decoded ? decoded / (at - arrived[0].at) : null;
}

function drawSide({ steps, draftsPerStep, counters }) {
  const arrived = steps.filter((step) => step.at <= now);
  steps.forEach((step, number) => {
    const later = number >= arrived.length;
    const fresh = number === arrived.length - 1 && arrived.length < steps.length;
    step.span.classList.toggle("later", later);
    step.span.classList.toggle("fresh", fresh);
  });
  const tokens = arrived.reduce((sum, step) => sum + step.tokens, 0);
  const rate = tokensPerSecond(arrived, Math.min(now, steps.at(-1).at));
  const shown = [`${tokens} tokens`, `${rate === null ? "–" : rate.toFixed(1)} tok/s`];
  if (draftsPerStep) {
    const accepted = arrived.reduce((sum, step) => sum + step.accepted, 0);
    const drafted = draftsPerStep * Math.max(0, arrived.length - 1);
    shown.push(`${accepted} of ${drafted} drafts accepted`);
  }
  counters.textContent = shown.join(" · ");
}

function draw() {
  sides.forEach(drawSide);
  time.value = String(end ? (1000 * now) / end : 1000);
  clock.textContent = `${now.toFixed(2)} of ${end.toFixed(2)} s`;
  time.setAttribute("aria-valuetext", clock.textContent);
}

function pause() {
  if (frame !== null) cancelAnimationFrame(frame);
  frame = null;
  play.textContent = "Play";
}

function advance(timestamp) {
  now = Math.min(end, now + (Number(speed.value) * (timestamp - last)) / 1000);
  last = timestamp;
  draw();
  if (now < end) frame = requestAnimationFrame(advance);
  else pause();
}

function start() {
  if (now >= end) now = 0;
  play.textContent = "Pause";
  frame = requestAnimationFrame((timestamp) => {
    last = timestamp;
    advance(timestamp);
  });
}

function choose() {
  pause();
  const pair = recorded[Number(prompt.value)];
  sides = ["base", "mtp"].map((name) => makeSide(name, pair[name]));
  end = Math.max(...sides.map(({ steps }) => steps.at(-1).at));
  now = end; // a page that is only read, or printed, shows the whole answers
  verdict.textContent =
    pair.divergence === null
      ? "Both answers are the same, token by token."
      : `The answers are the same up to position ${pair.divergence}, and differ there.`;
  verdict.className = pair.divergence === null ? "same" : "differs";
  draw();
}

play.addEventListener("click", () => (frame === null ? start() : pause()));
prompt.addEventListener("change", choose);
time.addEventListener("input", () => {
  pause();
  now = (end * Number(time.value)) / 1000;
  draw();
});
all.hidden = false;
choose();
