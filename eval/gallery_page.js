/* The tables and charts: sort, copy, and choose one of several. Without JavaScript all of them are shown. */
(() => {
  "use strict";
  const table = document.getElementById("score-table");
  const first = [...table.tBodies[0].rows];
  for (const button of table.querySelectorAll("button.by")) {
    button.addEventListener("click", () => {
      const head = button.closest("th"), before = head.getAttribute("aria-sort");
      const now = before === "none" ? "descending" : before === "descending" ? "ascending" : "none";
      for (const th of table.tHead.rows[0].cells) if (th.hasAttribute("aria-sort")) th.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", now);
      const sign = now === "ascending" ? 1 : -1;
      const value = (row) => row.cells[Number(button.dataset.column)].dataset.value;
      const rows = now === "none" ? first : [...first].sort((a, b) => {
        if (value(a) === "" || value(b) === "") return (value(a) === "") - (value(b) === "");
        return sign * (Number(value(a)) - Number(value(b))) || first.indexOf(a) - first.indexOf(b);
      });
      table.tBodies[0].append(...rows);
    });
  }

  for (const button of document.querySelectorAll("button.copy")) {
    const text = document.getElementById(button.dataset.of);
    button.hidden = false;
    button.addEventListener("click", () => {
      const told = (word) => { button.textContent = word; };
      const mark = () => { getSelection().selectAllChildren(text); told("Marked: press Ctrl+C"); };
      if (navigator.clipboard) navigator.clipboard.writeText(text.textContent).then(() => told("Copied"), mark);
      else mark();
    });
  }

  for (const group of document.querySelectorAll(".one-of")) {
    const figures = [...group.children];
    if (figures.length < 2) continue;
    const label = document.createElement("label"), select = document.createElement("select");
    for (const figure of figures) select.add(new Option(figure.dataset.name));
    const show = () => figures.forEach((figure, k) => { figure.hidden = k !== select.selectedIndex; });
    select.addEventListener("change", show);
    label.append(group.dataset.label + " ", select);
    group.prepend(label);
    show();
  }

  /* A link to what is folded away opens it. */
  const open = () => {
    const id = location.hash.slice(1);
    for (let at = id && document.getElementById(id); at; at = at.parentElement) if (at.tagName === "DETAILS") at.open = true;
  };
  addEventListener("hashchange", open);
  open();
})();
