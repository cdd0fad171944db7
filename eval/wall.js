/* The gallery: search, sorting, blind votes, and the lightbox. Words from outside enter the page as textContent alone. */
(() => {
  "use strict";
  const byId = (id) => document.getElementById(id);
  const wall = byId("wall"), box = byId("rows"), light = byId("lightbox");
  if (!wall || !byId("wall-data")) return;
  const data = JSON.parse(byId("wall-data").textContent);
  const rows = [...box.children];
  const number = (row) => Number(row.dataset.p);
  const prompt = (row) => row.querySelector(".prompt").textContent;
  const words = rows.map((row) => (prompt(row) + " " + row.id.slice(2)).toLowerCase());
  const tags = rows.map((row) => JSON.parse(row.dataset.tags));
  const cells = (row) => [...row.querySelectorAll(".cell")];
  const contestant = (cell) => Number(cell.dataset.m);
  const add = (parent, name, kind, text) => {
    const made = document.createElement(name);
    made.className = kind;
    made.textContent = text;
    parent.append(made);
    return made;
  };
  /* Numbers in [0, 1) that follow from a seed: the mixing function of MurmurHash3 of seed, row and place. */
  const mixed = (seed, row, place) => {
    let h = (seed ^ Math.imul(row + 1, 0x9e3779b1) ^ Math.imul(place + 1, 0x85ebca77)) >>> 0;
    h = Math.imul(h ^ (h >>> 16), 0x85ebca6b);
    h = Math.imul(h ^ (h >>> 13), 0xc2b2ae35);
    return ((h ^ (h >>> 16)) >>> 0) / 2 ** 32;
  };
  const shuffled = (items, seed, row) => {
    const out = [...items];
    for (let i = out.length - 1; i > 0; i--) {
      const j = Math.floor(mixed(seed, row, i) * (i + 1));
      [out[i], out[j]] = [out[j], out[i]];
    }
    return out;
  };
  const tell = (text) => { byId("told").textContent = text; };
  const seen = (row) => cells(row).filter((cell) => !cell.hidden);  // blind, two of a row may be all
  const counted = (n, what) => `${n} ${what}${n === 1 ? "" : "s"}`;
  const shown = () => [...box.children].filter((row) => !row.hidden);

  /* Search, filter, sort. Rows without a value come last, equal ones in the order of the set. */
  const value = (id, otherwise) => (byId(id) ? byId(id).value : otherwise);
  const reward = () => Number(value("by", 0));
  const mean = (m, p) => (data.means.length ? data.means[reward()][m][p] : null);
  const chosen = () => Number(value("of", data.rivals.length ? data.rivals[0] : data.baseline));
  const worth = {
    set: () => 0,
    gain: (p) => (mean(chosen(), p) === null || mean(data.baseline, p) === null ? null : mean(chosen(), p) - mean(data.baseline, p)),
    loss: (p) => (worth.gain(p) === null ? null : -worth.gain(p)),
    disagreement: (p) => data.disagreement[p],
    worst: (p) => (mean(chosen(), p) === null ? null : -mean(chosen(), p)),
    random: (p) => chance[p],
  };
  let chance = [];
  const arrange = () => {
    const find = byId("find").value.trim().toLowerCase(), tag = value("tag", "");
    const found = rows.filter((row, p) => {
      row.hidden = (find && !words[p].includes(find)) || (tag && !tags[p].includes(tag));
      return !row.hidden;
    });
    const of = worth[byId("sort").value];
    const at = new Map(rows.map((row, p) => [row, of(p) === null ? -Infinity : of(p)]));
    box.append(...[...rows].sort((a, b) => (at.get(a) === at.get(b) ? number(a) - number(b) : at.get(b) - at.get(a))));
    byId("count").textContent = found.length === rows.length ? counted(rows.length, "prompt") : `${found.length} of ${counted(rows.length, "prompt")}`;
  };
  const frame = () => {
    if (!data.means.length) return;
    byId("judged").textContent = data.rewards[reward()];
    for (const row of rows) {
      const each = cells(row), known = each.map((cell) => mean(contestant(cell), number(row)));
      const best = Math.max(...known.filter((v) => v !== null));
      const level = known.every((v) => v === null || v === best);
      each.forEach((cell, i) => cell.classList.toggle("won", !level && known[i] === best));
    }
  };

  /* Blind votes: letters for names, columns shuffled in every row. What was seen is noted with each vote. */
  const votes = new Map();
  const alts = new Map();
  let seed = 0;  // of what is shown, and in which order
  const sitting = [...crypto.getRandomValues(new Uint8Array(8))].map((b) => b.toString(16).padStart(2, "0")).join("");
  const blind = () => wall.classList.contains("blind"), revealed = () => wall.classList.contains("revealed");
  const hiding = () => blind() && !revealed();
  const letter = (i) => String.fromCharCode(65 + i);
  const name = (cell) => (hiding() ? letter(cells(cell.closest(".row")).indexOf(cell)) : data.names[contestant(cell)]);
  const press = (button, on) => button.setAttribute("aria-pressed", String(on));
  const mark = (row) => {
    const vote = votes.get(number(row));
    for (const cell of cells(row)) {
      const button = cell.querySelector(".vote");
      button.textContent = `${name(cell)} is best`;
      button.disabled = revealed();
      press(button, Boolean(vote) && vote.best === contestant(cell));
    }
    const tie = row.querySelector(".tie");
    tie.disabled = revealed();
    press(tie, Boolean(vote) && vote.best === null);
  };
  const label = (row) => {
    for (const cell of cells(row)) {
      cell.querySelector(".who").textContent = name(cell);
      cell.querySelectorAll("img").forEach((img, i) => {
        if (!alts.has(img)) alts.set(img, img.alt);
        img.alt = hiding() ? `${prompt(row)} (${name(cell)}, picture ${i + 1})` : alts.get(img);
      });
    }
    if (row.querySelector(".tie")) mark(row);
  };
  const order = (row, places) => {
    const by = new Map(cells(row).map((cell) => [contestant(cell), cell]));
    row.append(...places.map((m) => by.get(m)));
  };
  const vote = (row, best) => {
    if (!hiding()) return;
    const there = seen(row).filter((cell) => cell.querySelector("img")).map(contestant);
    if (there.length < 2 || (best !== null && !there.includes(best))) return tell("There are no two pictures to compare here.");
    const before = votes.get(number(row));
    if (before && before.best === best) votes.delete(number(row));
    else votes.set(number(row), { shown: there, best, seed });
    mark(row);
    tell(`${counted(votes.size, "vote")}, kept in this page until it is closed: export them.`);
  };
  const ballots = () => {
    for (const row of rows) {
      if (row.querySelector(".tie")) continue;
      const tie = add(row.querySelector(".what"), "button", "tie", "No difference");
      tie.type = "button";
      tie.addEventListener("click", () => vote(row, null));
      for (const cell of cells(row)) {
        const button = add(cell, "button", "vote", "");
        button.type = "button";
        button.addEventListener("click", () => vote(row, contestant(cell)));
      }
    }
  };
  /* The first two that have pictures; the noise floor, the baseline with other seeds, is nobody to vote on. */
  const sides = (row, places) => {
    const who = places.filter((m) => m === data.baseline || data.rivals.includes(m));
    return who.filter((m) => pictures(cellOf(row, m)).length).slice(0, 2);
  };
  const scored = ["gain", "loss", "worst", "disagreement"];
  const goBlind = (on) => {
    wall.classList.toggle("blind", on);
    wall.classList.remove("revealed");
    if (on) ballots();
    for (const option of byId("sort").options) option.disabled = on && scored.includes(option.value);
    if (on && scored.includes(byId("sort").value)) byId("sort").value = "set";
    const two = on && value("sides", "all") === "two";
    wall.classList.toggle("two", two);
    if (on) [seed] = crypto.getRandomValues(new Uint32Array(1));
    for (const row of rows) {
      const all = data.names.map((_, m) => m);
      const places = on ? shuffled(all, seed, number(row)) : all;
      const pair = two ? sides(row, places) : places;
      order(row, [...pair, ...places.filter((m) => !pair.includes(m))]);
      for (const cell of cells(row)) cell.hidden = !pair.includes(contestant(cell));
      label(row);
    }
    if (byId("chosen")) byId("chosen").hidden = on;  // it names them
    for (const id of ["reveal", "export"]) byId(id).hidden = !on;
    if (byId("of")) byId("of").closest("label").hidden = on;
    press(byId("blind"), on);
    press(byId("reveal"), false);
    arrange();
    tell(on ? "Names and scores are hidden and the columns shuffled. Vote for the best of each row." : "");
  };
  const reveal = () => {
    if (!blind()) return;
    if (revealed()) return goBlind(true);  // shuffled anew, for the places are known now
    wall.classList.add("revealed");
    press(byId("reveal"), true);
    rows.forEach(label);
    const best = data.names.map((n, m) => `${n} ${[...votes.values()].filter((v) => v.best === m).length}`);
    tell(`Votes: ${best.join(", ")}, no difference ${[...votes.values()].filter((v) => v.best === null).length}.`);
  };
  const save = () => {
    const named = (m) => (m === null ? null : data.names[m]);
    const file = {
      format: "diffalign votes", version: 1, evaluation: data.evaluation, sitting,
      votes: [...votes].sort(([a], [b]) => a - b).map(([p, v]) => ({ id: rows[p].id.slice(2), shown: v.shown.map(named), best: named(v.best), seed: v.seed })),
    };
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([JSON.stringify(file, null, 1) + "\n"], { type: "application/json" }));
    link.download = "votes.json";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    tell(`${counted(votes.size, "vote")} exported.`);
  };

  /* The lightbox. `at` is the cell and the number of the picture; the reference is another contestant's of the same number. */
  const above = byId("above"), below = byId("below"), layer = byId("layer");
  const plane = byId("plane"), stage = byId("stage"), slider = byId("slider");
  const at = { row: null, m: 0, k: 0, other: null, mode: "one", map: -1, words: -1, scale: 0, x: 0, y: 0, size: "" };
  const mapNames = Object.keys(data.maps);
  const cellOf = (row, m) => row.querySelector(`.cell[data-m="${m}"]`);
  const pictures = (cell) => [...cell.querySelectorAll(".shot")];
  const shot = (row, m, k) => (m === null ? null : cellOf(row, m).querySelector(`.shot[data-k="${k}"]`));
  const place = (m) => `${m}.${number(at.row)}.${at.k}`;
  const put = (img, m) => {
    const button = shot(at.row, m, at.k);
    const small = button ? button.querySelector("img") : null;
    img.onerror = null;
    if (!small) return img.removeAttribute("src");
    if (!data.originals) { img.src = small.src; return; }
    img.onerror = () => { img.onerror = null; img.src = small.src; };
    const file = `${data.files[number(at.row)]}_${String(at.k).padStart(2, "0")}.png`;
    img.src = `${encodeURIComponent(data.names[m])}/images/${file}`;
  };
  const reference = () => {
    const here = seen(at.row).map(contestant).filter((m) => m !== at.m && shot(at.row, m, at.k));
    if (here.includes(at.other)) return at.other;
    return !hiding() && here.includes(data.baseline) ? data.baseline : here.length ? here[0] : null;
  };
  const draw = () => {
    const other = reference(), cell = cellOf(at.row, at.m), called = name(cell);
    const opposite = other === null ? "" : name(cellOf(at.row, other));
    if (other === null && at.mode !== "one") at.mode = "one";
    put(above, at.m);
    put(below, other);
    above.alt = shot(at.row, at.m, at.k).querySelector("img").alt;
    const ready = at.mode === "difference" && !hiding() && other === data.baseline ? data.differences[place(at.m)] : undefined;
    const heat = at.map >= 0 ? data.maps[mapNames[at.map]][place(at.m)] : undefined;
    layer.hidden = !(ready || heat);
    layer.classList.toggle("map", !ready);
    if (ready || heat) layer.src = ready || heat;
    else layer.removeAttribute("src");
    above.hidden = at.mode === "other";
    below.hidden = at.mode === "one" || other === null;
    plane.classList.toggle("subtract", at.mode === "difference" && !ready);
    plane.style.setProperty("--gain", String(255 / data.brightest));
    slider.hidden = at.mode !== "wipe";
    above.style.clipPath = at.mode === "wipe" ? `inset(0 0 0 ${slider.value}%)` : "none";
    const title = {
      one: called, other: `${opposite} (reference)`, wipe: `${opposite} (reference, left) and ${called} (right)`,
      difference: `Difference of ${called} and ${opposite}, brightest from ${data.brightest} of 255${ready ? "" : ", by the browser"}`,
    }[at.mode];
    byId("light-title").textContent = `${title}, picture ${at.k + 1}${at.map < 0 ? "" : heat ? `, with the map of ${mapNames[at.map]}` : `, which has no map of ${mapNames[at.map]}`}`;
    byId("light-prompt").textContent = prompt(at.row);
    const own = at.mode === "other" ? other : at.m;
    const values = shot(at.row, own, at.k).querySelector(".values").textContent.split("\n");
    byId("light-scores").textContent = hiding() ? "" : data.rewards.map((r, i) => `${r} ${values[i]}`).join("   ");
    for (const mode of ["wipe", "difference"]) press(light.querySelector(`[data-do="${mode}"]`), at.mode === mode);
    press(light.querySelector('[data-do="flicker"]'), at.mode === "other");
    press(light.querySelector('[data-do="map"]'), at.map >= 0);
    press(light.querySelector('[data-do="words"]'), at.words >= 0);
    light.querySelector('[data-do="map"]').hidden = !mapNames.length || hiding();
    light.querySelector('[data-do="words"]').hidden = !data.echoes.length || hiding();
    spell();
  };
  const spell = () => {
    const echo = byId("echo"), legend = byId("legend"), layer = data.echoes[at.words];
    echo.hidden = legend.hidden = !layer || hiding();
    echo.replaceChildren();
    legend.replaceChildren();
    if (echo.hidden) return;
    const found = layer.of[place(at.m)];
    add(legend, "b", "", layer.title);
    if (!found) return void add(legend, "span", "", "not known of this picture");
    data.texts[found[0]].forEach((token, i) => add(echo, "span", `tone${found[1][i]}`, token));
    for (let tone = 0; tone < 7; tone++) {
      const low = layer.edges[tone - 1], high = layer.edges[tone];
      const text = tone === 0 ? `below ${high}` : tone === 6 ? `${low} and more` : `${low} to ${high}`;
      const entry = add(legend, "span", "", "");
      add(entry, "i", `tone${tone}`, "");
      entry.append(text.replaceAll("-", "\u2212"));
    }
  };
  const view = () => {
    plane.style.width = `${above.naturalWidth * at.scale}px`;
    plane.style.height = `${above.naturalHeight * at.scale}px`;
    plane.style.transform = `translate(${at.x}px, ${at.y}px)`;
    plane.classList.toggle("pixelated", at.scale > 1);
    byId("zoomed").textContent = at.scale ? `${Math.round(100 * at.scale)} %` : "";
  };
  const fit = () => {
    const w = above.naturalWidth, h = above.naturalHeight, room = stage.getBoundingClientRect();
    if (!w || !h) return;
    at.scale = Math.min(room.width / w, room.height / h);
    [at.x, at.y] = [(room.width - w * at.scale) / 2, (room.height - h * at.scale) / 2];
    at.size = `${w} ${h}`;
    view();
  };
  const zoom = (factor, x, y) => {
    const room = stage.getBoundingClientRect();
    const [cx, cy] = x === undefined ? [room.width / 2, room.height / 2] : [x - room.left, y - room.top];
    const scale = Math.min(256, Math.max(0.05, at.scale * factor)), by = scale / at.scale;
    [at.x, at.y, at.scale] = [cx - (cx - at.x) * by, cy - (cy - at.y) * by, scale];
    view();
  };
  const open = (button) => {
    Object.assign(at, { row: button.closest(".row"), m: contestant(button.closest(".cell")), k: Number(button.dataset.k), mode: "one", size: "" });
    if (!light.open) light.showModal();
    draw();
  };
  const across = (by) => {
    const there = seen(at.row).map(contestant).filter((m) => shot(at.row, m, at.k));
    at.m = there[(there.indexOf(at.m) + by + there.length) % there.length];
  };
  const along = (by) => {
    const side = seen(at.row).map(contestant).indexOf(at.m);
    // of two in each row, the one on the same side
    const cell = (row) => (wall.classList.contains("two") ? seen(row)[side] : cellOf(row, at.m));
    const all = shown().filter((row) => row === at.row || (cell(row) && pictures(cell(row)).length));
    const row = all[all.indexOf(at.row) + by];
    if (!row) return;
    [at.m, at.row] = [contestant(cell(row)), row];
    if (!shot(row, at.m, at.k)) at.k = Number(pictures(cellOf(row, at.m))[0].dataset.k);
  };
  const through = (by) => {
    const there = pictures(cellOf(at.row, at.m)).map((button) => Number(button.dataset.k));
    at.k = there[(there.indexOf(at.k) + by + there.length) % there.length];
  };
  const mode = (wanted) => { at.mode = at.mode === wanted ? "one" : wanted; };
  const turn = (now, of) => (now + 2) % (of + 1) - 1;  // none, first, ..., last, none
  const act = {
    close: () => light.close(),
    left: () => across(-1), right: () => across(1), up: () => along(-1), down: () => along(1),
    next: () => through(1), previous: () => through(-1),
    flicker: () => mode("other"), wipe: () => mode("wipe"), difference: () => { at.map = -1; mode("difference"); },
    map: () => { if (!hiding()) { at.map = turn(at.map, mapNames.length); at.mode = "one"; } },
    words: () => { at.words = turn(at.words, data.echoes.length); },
    reference: () => { at.other = at.m; },
    closer: () => zoom(1.5), farther: () => zoom(1 / 1.5), fit, real: () => zoom(1 / at.scale),
  };
  const perform = (what) => {
    act[what]();
    if (light.open) draw();
  };
  const lightKeys = {
    ArrowLeft: "left", ArrowRight: "right", ArrowUp: "up", ArrowDown: "down", "[": "previous", "]": "next", f: "flicker", w: "wipe",
    d: "difference", m: "map", e: "words", x: "reference", "+": "closer", "=": "closer", "-": "farther", 0: "fit", 9: "real", Escape: "close",
  };
  above.addEventListener("load", () => { if (at.size === `${above.naturalWidth} ${above.naturalHeight}`) view(); else fit(); });
  slider.addEventListener("input", () => { above.style.clipPath = `inset(0 0 0 ${slider.value}%)`; });
  light.addEventListener("click", (event) => {
    const button = event.target.closest("[data-do]");
    if (button) perform(button.dataset.do);
  });
  light.addEventListener("close", () => {
    const button = shot(at.row, at.m, at.k);
    if (button) button.focus();
  });
  const lightKey = (event) => {
    if (!(event.key in lightKeys) || (event.target === slider && event.key.startsWith("Arrow"))) return;
    event.preventDefault();
    perform(lightKeys[event.key]);
  };
  stage.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoom(Math.exp(-event.deltaY / 400), event.clientX, event.clientY);
  }, { passive: false });
  stage.addEventListener("pointerdown", (event) => {
    event.preventDefault();
    stage.setPointerCapture(event.pointerId);
  });
  stage.addEventListener("pointermove", (event) => {
    if (!stage.hasPointerCapture(event.pointerId)) return;
    at.x += event.movementX;
    at.y += event.movementY;
    view();
  });
  window.addEventListener("resize", () => { if (light.open) fit(); });

  /* Keys and controls of the page. */
  const walk = (button, key) => {
    const row = button.closest(".row"), visible = (b) => b.offsetParent !== null;
    if (key === "ArrowLeft" || key === "ArrowRight") {
      const all = [...row.querySelectorAll(".shot")].filter(visible);
      return all[all.indexOf(button) + (key === "ArrowRight" ? 1 : -1)];
    }
    const all = shown(), next = all[all.indexOf(row) + (key === "ArrowDown" ? 1 : -1)];
    const same = next && shot(next, contestant(button.closest(".cell")), button.dataset.k);
    return same && visible(same) ? same : next && [...next.querySelectorAll(".shot")].find(visible);
  };
  const typing = (target) => target.closest("input, select, textarea, [contenteditable]");
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (light.open) return lightKey(event);  // wherever the focus is: it is lost when a button hides
    if (typing(event.target)) return;
    const button = event.target.closest(".shot"), row = event.target.closest(".row");
    if (button && event.key.startsWith("Arrow")) {
      const next = walk(button, event.key);
      if (next) next.focus();
    } else if (event.key === "/") byId("find").focus();
    else if (event.key === "b" && byId("blind")) goBlind(!blind());
    else if (event.key === "r" && blind()) reveal();
    else if (hiding() && row && /^[0-9]$/.test(event.key)) {
      const cell = seen(row)[Number(event.key) - 1];
      if (event.key === "0") vote(row, null);
      else if (cell) vote(row, contestant(cell));
    } else return;
    event.preventDefault();
  });
  box.addEventListener("click", (event) => {
    const button = event.target.closest(".shot"), copy = event.target.closest(".copy-prompt");
    if (button) open(button);
    if (!copy) return;
    const text = prompt(copy.closest(".row"));
    const select = () => {
      getSelection().selectAllChildren(copy.closest(".row").querySelector(".prompt"));
      tell("The prompt is selected; copy it with the keyboard.");
    };
    if (navigator.clipboard) navigator.clipboard.writeText(text).then(() => tell("Prompt copied."), select);
    else select();
  });
  const on = (id, kind, call) => { if (byId(id)) byId(id).addEventListener(kind, call); };
  on("controls", "submit", (event) => event.preventDefault());
  on("find", "input", arrange);
  for (const id of ["tag", "of"]) on(id, "change", arrange);
  on("sort", "change", () => { chance = rows.map(() => Math.random()); arrange(); });
  on("by", "change", () => { frame(); arrange(); });
  on("shown", "change", () => { wall.dataset.k = byId("shown").value; });
  on("blind", "click", () => goBlind(!blind()));
  on("sides", "change", () => { if (blind()) goBlind(true); });
  on("reveal", "click", reveal);
  on("export", "click", save);

  const jump = () => {
    const row = location.hash.startsWith("#p=") ? byId(location.hash.slice(1)) : null;
    if (!row) return;
    if (row.hidden) {
      byId("find").value = "";
      if (byId("tag")) byId("tag").value = "";
      arrange();
    }
    row.scrollIntoView({ block: "start" });
  };
  for (const row of rows) {
    const copy = add(row.querySelector(".what"), "button", "copy-prompt", "Copy");
    copy.type = "button";
    copy.setAttribute("aria-label", "Copy the prompt");
  }
  for (const id of ["controls", "keys"]) byId(id).hidden = false;
  byId("controls").reset();
  arrange();
  addEventListener("hashchange", jump);
  jump();
})();
