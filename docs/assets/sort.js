// Tables inside <div class="sortable"> sort by a column when its heading is clicked, or when Enter is pressed on it.
document$.subscribe(() => {
  for (const heading of document.querySelectorAll(".sortable th")) {
    const column = heading.cellIndex;
    const body = heading.closest("table").tBodies[0];
    heading.tabIndex = 0;
    heading.setAttribute("role", "button");
    heading.title = "Sort";
    const value = (row) => {
      const text = row.cells[column].textContent.trim();
      const number = parseFloat(text);
      return Number.isNaN(number) ? text : number;
    };
    const sort = () => {
      const up = heading.getAttribute("aria-sort") !== "ascending";
      for (const other of heading.parentNode.cells) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", up ? "ascending" : "descending");
      const rows = [...body.rows].sort((one, other) => {
        const [a, b] = [value(one), value(other)];
        const order = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
        return up ? order : -order;
      });
      body.append(...rows);
    };
    heading.onclick = sort;
    heading.onkeydown = (event) => event.key === "Enter" && sort();
  }
});
