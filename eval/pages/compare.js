"use strict";
// Lays the pictures of two cells over each other (compare.html), with a menu for each axis. The
// pictures are those of the page, so nothing is loaded, and without scripts nothing is missing.

const section = document.querySelector(".compare");
const stage = section.querySelector(".stage");
const views = [...stage.querySelectorAll(".view")];
const sides = [...section.querySelectorAll("fieldset")].slice(0, 2);
const share = section.querySelector("[name=share]");
const zoom = section.querySelector("[name=zoom]");
const flip = section.querySelector("button");
const said = section.querySelector("[role=status]");
const NAMES = ["First", "Second"];

// Every cell of the page: its value on each axis, its numbers in words, and its picture.
const cells = [...document.querySelectorAll("figure[data-cell]")].map((figure) => ({
  values: JSON.parse(figure.dataset.cell),
  numbers: figure.dataset.numbers,
  picture: figure.querySelector("img"),
}));
const axes = Object.keys(cells[0].values)
  .map((axis) => [axis, [...new Set(cells.map((cell) => cell.values[axis]))]])
  .filter(([, values]) => values.length > 1);

function described(values) {
  return axes.map(([axis]) => `${axis} ${values[axis]}`).join(", ");
}

function addMenus(side, chosen) {
  for (const [axis, values] of axes) {
    const label = document.createElement("label");
    const menu = document.createElement("select");
    menu.dataset.axis = axis;
    for (const value of values) {
      menu.append(new Option(value, value, false, value === chosen.values[axis]));
    }
    menu.addEventListener("change", update);
    label.append(`${axis} `, menu);
    side.querySelector("p").before(label);
  }
}

function asked(side) {
  const menus = [...side.querySelectorAll("select")];
  return Object.fromEntries(menus.map((menu) => [menu.dataset.axis, menu.value]));
}

function show(side, view, name) {
  const values = asked(side);
  const cell = cells.find((cell) => axes.every(([axis]) => cell.values[axis] === values[axis]));
  const image = view.querySelector("img");
  side.querySelector("p").textContent = cell ? cell.numbers : "This cell has no picture here.";
  image.hidden = !cell;
  if (cell) {
    image.src = cell.picture.src;
    image.alt = `${name}: ${described(values)}`;
  }
  return `${name}: ${described(values)}`;
}

function update() {
  const shown = sides.map((side, i) => show(side, views[i], NAMES[i]));
  const view = section.querySelector("[name=view]:checked").value;
  const second = flip.getAttribute("aria-pressed") === "true";
  stage.dataset.view = view;
  stage.dataset.shown = second ? "second" : "first";
  stage.style.setProperty("--share", `${share.value}%`);
  for (const tool of section.querySelectorAll("[data-for]")) {
    tool.hidden = tool.dataset.for !== view;
  }
  said.textContent = view === "flip" ? shown[Number(second)] : shown.join("; ");
}

function magnify() {
  const [view] = views;
  const centre = ["Left", "Top"].map((edge, i) => {
    const size = i ? "Height" : "Width";
    return (view[`scroll${edge}`] + view[`client${size}`] / 2) / view[`scroll${size}`];
  });
  stage.style.setProperty("--zoom", zoom.value);
  stage.classList.toggle("zoomed", zoom.value > 1);
  section.querySelector("output").textContent = `${zoom.value}×`;
  view.scrollLeft = centre[0] * view.scrollWidth - view.clientWidth / 2;
  view.scrollTop = centre[1] * view.scrollHeight - view.clientHeight / 2;
}

function follow(from, to) {
  from.addEventListener("scroll", () => {
    if (to.scrollLeft !== from.scrollLeft) to.scrollLeft = from.scrollLeft;
    if (to.scrollTop !== from.scrollTop) to.scrollTop = from.scrollTop;
  });
}

function dragged(event) {
  // A finger moves a magnified picture instead.
  if (stage.dataset.view !== "swipe" || !event.buttons) return;
  if (event.pointerType !== "mouse" && zoom.value > 1) return;
  const box = stage.getBoundingClientRect();
  share.value = (100 * (event.clientX - box.left)) / box.width;
  update();
}

addMenus(sides[0], cells[0]);
addMenus(sides[1], cells[cells.length - 1]);
follow(views[0], views[1]);
follow(views[1], views[0]);
for (const input of section.querySelectorAll("[name=view], [name=share]")) {
  input.addEventListener("input", update);
}
zoom.addEventListener("input", magnify);
flip.addEventListener("click", () => {
  flip.setAttribute("aria-pressed", String(flip.getAttribute("aria-pressed") !== "true"));
  update();
});
for (const image of stage.querySelectorAll("img")) {
  image.addEventListener("load", () => {
    stage.style.setProperty("--ratio", image.naturalWidth / image.naturalHeight);
  });
}
stage.addEventListener("pointerdown", dragged);
stage.addEventListener("pointermove", dragged);
stage.addEventListener("dragstart", (event) => event.preventDefault());
update();
section.hidden = false;
