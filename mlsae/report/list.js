// A list of any length that draws only the rows in view and can be moved through by keyboard.
"use strict";

class VirtualList {
  // `box` scrolls over `body`. drawRow(item) returns the row's cells; choose(item) is called when the
  // user chooses an item.
  constructor(box, body, rowHeight, drawRow, choose) {
    Object.assign(this, { box, body, rowHeight, drawRow, choose, items: [], chosen: null });
    let waiting = false;
    box.addEventListener("scroll", () => {
      if (waiting) return;
      waiting = true;
      requestAnimationFrame(() => {
        waiting = false;
        this.draw();
      });
    });
    box.addEventListener("keydown", (event) => this.key(event));
    body.addEventListener("click", ({ target }) => {
      const row = target.closest("[data-index]");
      if (row) this.select(Number(row.dataset.index));
    });
    new ResizeObserver(() => this.draw()).observe(box);
  }

  show(items) {
    this.items = items;
    this.body.style.height = `${items.length * this.rowHeight}px`;
    this.box.setAttribute("aria-rowcount", items.length + 1);
    this.draw();
  }

  draw() {
    const first = Math.max(0, Math.floor(this.box.scrollTop / this.rowHeight) - 4);
    const last = Math.min(this.items.length, first + Math.ceil(this.box.clientHeight / this.rowHeight) + 8);
    const rows = [];
    for (let i = first; i < last; i++) {
      const chosen = this.items[i] === this.chosen;
      const row = element("div", { role: "row", id: `row-${i}`, "data-index": i, "aria-rowindex": i + 2, "aria-selected": chosen });
      row.style.top = `${i * this.rowHeight}px`;
      row.append(...this.drawRow(this.items[i]));
      rows.push(row);
    }
    this.body.replaceChildren(...rows);
    const at = this.items.indexOf(this.chosen);
    if (at >= first && at < last) this.box.setAttribute("aria-activedescendant", `row-${at}`);
    else this.box.removeAttribute("aria-activedescendant");
  }

  // Choose the item at an index, scroll it into view and call `choose`.
  select(index) {
    if (!this.items.length) return;
    index = Math.max(0, Math.min(this.items.length - 1, index));
    this.mark(this.items[index]);
    this.choose(this.chosen);
  }

  // Highlight an item and scroll it into view.
  mark(item) {
    this.chosen = item;
    const index = this.items.indexOf(item);
    if (index >= 0) {
      const top = index * this.rowHeight;
      const room = this.box.clientHeight - this.body.offsetTop - this.rowHeight;
      if (top < this.box.scrollTop) this.box.scrollTop = top;
      else if (top > this.box.scrollTop + room) this.box.scrollTop = top - room;
    }
    this.draw();
  }

  key(event) {
    if (event.target !== this.box) return; // the key is for a heading's button
    const at = this.items.indexOf(this.chosen);
    const page = Math.max(1, Math.floor(this.box.clientHeight / this.rowHeight) - 2);
    const to = { ArrowDown: at + 1, ArrowUp: at - 1, PageDown: at + page, PageUp: at - page, Home: 0, End: this.items.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    this.select(to);
  }
}
