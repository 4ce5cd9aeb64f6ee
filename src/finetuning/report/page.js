"use strict";
// Makes the charts, copy buttons and search fields below an element respond.
function activate(root) {
  for (const svg of root.querySelectorAll("svg[data-chart]")) {
    const data = JSON.parse(svg.dataset.chart), cursor = svg.querySelector(".cursor");
    const tip = svg.parentElement.appendChild(Object.assign(document.createElement("div"), { className: "tip" }));
    const [left, right] = data.at, span = data.x[1] - data.x[0];
    const show = (value) => Math.abs(value) >= 1e4 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(4)));
    const hide = () => { tip.style.display = "none"; cursor.style.visibility = "hidden"; };
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect(), scale = box.width / 400;
      const target = data.x[0] + ((event.clientX - box.left) / scale - left) / (right - left) * span;
      const nearest = (points) => points.reduce((best, point) => Math.abs(point[0] - target) < Math.abs(best[0] - target) ? point : best);
      const step = nearest(data.curves.map((curve) => nearest(curve.points)))[0];
      const x = left + (step - data.x[0]) / span * (right - left);
      cursor.setAttribute("x1", x); cursor.setAttribute("x2", x); cursor.style.visibility = "visible";
      tip.replaceChildren(Object.assign(document.createElement("div"), { textContent: "step " + step.toLocaleString("en") }));
      for (const curve of data.curves) {
        const point = nearest(curve.points), line = document.createElement("div"), dot = document.createElement("span");
        dot.textContent = "● "; dot.className = "c" + curve.color % 6;
        line.append(dot, (data.curves.length > 1 ? curve.name + " " : "") + show(point[1]) + (point[0] === step ? "" : " (step " + point[0] + ")"));
        tip.append(line);
      }
      tip.style.display = "block";
      const at = svg.offsetLeft + x * scale, beside = at + 12 + tip.offsetWidth > svg.parentElement.clientWidth ? at - tip.offsetWidth - 12 : at + 12;
      tip.style.left = Math.max(beside, 2) + "px"; tip.style.top = svg.offsetTop + 8 + "px";
    });
    svg.addEventListener("pointerleave", hide);
  }
  for (const button of root.querySelectorAll("[data-copy]")) {
    button.addEventListener("click", () => {
      const source = document.getElementById(button.dataset.copy), range = document.createRange();
      range.selectNodeContents(source); getSelection().removeAllRanges(); getSelection().addRange(range);
      navigator.clipboard?.writeText(source.textContent).then(() => { button.textContent = "Copied"; });
    });
  }
  for (const field of root.querySelectorAll("[data-filter]")) {
    const target = document.getElementById(field.dataset.filter), lines = target.textContent.split("\n");
    field.addEventListener("input", () => {
      const query = field.value.toLowerCase();
      target.textContent = lines.filter((line) => line.toLowerCase().includes(query)).join("\n");
    });
  }
}
activate(document);
