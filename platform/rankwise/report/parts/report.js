(() => {
  const root = document.documentElement;
  root.classList.add("js");

  // Links into MLflow. The artifact view shows this page at blob:ORIGIN/ID; a saved page has a field for MLflow's address.
  const origin = location.protocol === "blob:" ? location.href.slice(5).split("/").slice(0, 3).join("/") : "";
  const address = document.getElementById("mlflow");
  if (address) {
    if (origin.startsWith("http")) address.value = origin;
    const point = () => {
      const base = address.value.trim().replace(/\/+$/, "");
      for (const link of document.querySelectorAll("a[data-route]")) {
        link.href = (base ? base + "/" : "") + "#/" + link.dataset.route;
        link.target = "_blank";
        link.rel = "noopener";
      }
    };
    address.addEventListener("input", point);
    point();
  }
  // A sandboxed frame may not open pages, so a click copies the address.
  document.addEventListener("click", (event) => {
    const place = event.target.closest('nav a[href^="#"]');
    if (place) {
      event.preventDefault();
      document.getElementById(place.getAttribute("href").slice(1)).scrollIntoView();
      return;
    }
    const link = event.target.closest("a[data-route]");
    if (!link || window.top === window) return;
    event.preventDefault();
    const field = document.createElement("textarea");
    field.value = link.href;
    document.body.append(field);
    field.select();
    const copied = document.execCommand("copy");
    field.remove();
    say(copied ? "MLflow's artifact view cannot open pages. The address is copied: paste it into a new tab."
               : "MLflow's artifact view cannot open pages: open this link in a new tab from its context menu.",
        event.clientX, event.clientY);
    setTimeout(() => { tip.style.display = "none"; }, 4500);
  });

  const tip = document.createElement("div");
  tip.id = "tip";
  tip.setAttribute("role", "status");
  document.body.append(tip);
  const say = (text, x, y) => {
    tip.textContent = text;
    tip.style.display = "block";
    const left = Math.min(x + 12, innerWidth - tip.offsetWidth - 8);
    tip.style.left = Math.max(4, left) + "px";
    tip.style.top = (y + 16 + tip.offsetHeight > innerHeight ? y - tip.offsetHeight - 8 : y + 16) + "px";
  };
  for (const title of document.querySelectorAll("figure svg title")) {
    const mark = title.parentNode, text = title.textContent;
    title.remove();
    mark.setAttribute("aria-label", text);
    mark.addEventListener("pointermove", (event) => say(text, event.clientX, event.clientY));
    mark.addEventListener("pointerleave", () => { tip.style.display = "none"; });
  }

  const table = document.getElementById("arms");
  if (!table) return;
  const body = table.tBodies[0], rows = [...body.rows], SIZE = 50;
  const filter = document.getElementById("filter"), shown = document.getElementById("shown");
  const before = document.getElementById("before"), after = document.getElementById("after");
  let order = rows, page = 0;
  const value = (row, at) => {
    const cell = row.cells[at], number = cell.dataset.v;
    return number === undefined ? cell.textContent.trim().toLowerCase() : number === "" ? null : Number(number);
  };
  const draw = () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    const found = order.filter((row) => words.every((word) => row.textContent.toLowerCase().includes(word)));
    const last = Math.max(0, Math.ceil(found.length / SIZE) - 1);
    page = Math.min(page, last);
    const visible = new Set(found.slice(page * SIZE, (page + 1) * SIZE));
    for (const row of rows) {
      row.style.display = visible.has(row) ? "" : "none";
      row.classList.toggle("script-hidden", !visible.has(row) && words.length === 0);
    }
    const from = found.length ? page * SIZE + 1 : 0;
    shown.textContent = `${from} to ${Math.min(found.length, (page + 1) * SIZE)} of ${found.length}`;
    before.disabled = page === 0;
    after.disabled = page >= last;
  };
  [...table.tHead.rows[0].cells].forEach((head, at) => {
    head.tabIndex = 0;
    head.setAttribute("aria-sort", "none");
    const sort = () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      for (const other of table.tHead.rows[0].cells) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      order = [...rows].sort((a, b) => {
        const left = value(a, at), right = value(b, at);
        if (left === null || right === null) return (left === null) - (right === null);
        return (left < right ? -1 : left > right ? 1 : 0) * (up ? 1 : -1);
      });
      body.append(...order);
      page = 0;
      draw();
    };
    head.addEventListener("click", sort);
    head.addEventListener("keydown", (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); sort(); } });
  });
  filter.addEventListener("input", () => { page = 0; draw(); });
  before.addEventListener("click", () => { page -= 1; draw(); });
  after.addEventListener("click", () => { page += 1; draw(); });
  draw();
})();
