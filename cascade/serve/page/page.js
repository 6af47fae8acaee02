// What the page does by itself, without asking the server.
(() => {
  const spoken = document.createElement("div");
  spoken.className = "hidden";
  spoken.setAttribute("aria-live", "polite");

  // Pieces of the page are replaced as they change, which readers of screens do not tell: this is.
  let told = "";
  const speak = () => {
    const last = [...document.querySelectorAll(".note")].filter((e) => e.offsetParent).pop();
    const text = last ? last.textContent : "";
    if (text !== told) spoken.textContent = told = text;
  };

  const copy = async (button) => {
    const text = button.parentElement.querySelector("pre").textContent;
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      const range = document.createRange();
      range.selectNodeContents(button.parentElement.querySelector("pre"));
      getSelection().removeAllRanges();
      getSelection().addRange(range);
      document.execCommand("copy");
    }
    spoken.textContent = "Copied.";
    button.firstChild.textContent = "Copied";
    setTimeout(() => (button.firstChild.textContent = "Copy"), 1500);
  };

  const open = (button) => {
    const dialog = document.createElement("dialog");
    const picture = button.querySelector("img").cloneNode();
    const close = document.createElement("button");
    dialog.className = "large";
    dialog.setAttribute("aria-label", picture.alt);
    close.className = "tool";
    close.textContent = "Close";
    close.onclick = () => dialog.close();
    dialog.onclose = () => { dialog.remove(); button.focus(); };
    dialog.append(close, picture);
    document.body.append(dialog);
    dialog.showModal();
  };

  // Pictures that were chosen, and what was painted over them. They leave the browser on a click.
  const LARGEST = 32 << 20;
  const chosen = {};
  const files = () => {
    const [first, second] = [chosen.first, chosen.second];
    return [first?.url ?? "", second?.url ?? "", first?.mask?.() ?? ""];
  };

  // What takes long is asked for here: the server answers with a page for each state of it.
  const asked = {};
  const note = (text, role) => {
    const line = document.createElement("p");
    line.className = "note";
    line.setAttribute("role", role);
    line.textContent = text;
    return line.outerHTML;
  };
  const follow = async (part, values, own) => {
    const show = (html) => {
      if (asked[part] === own) document.querySelector(`.answer[data-part="${part}"]`).innerHTML = html;
    };
    try {
      const answer = await fetch(`jobs/${part}`, {
        method: "POST", signal: own.signal, headers: { "content-type": "application/json" },
        body: JSON.stringify({ data: values }),
      });
      if (!answer.ok) return show(note(await answer.text(), "alert"));
      const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      for (let left = "", one; !(one = await reader.read()).done; ) {
        const lines = (left + one.value).split("\n");
        left = lines.pop();
        if (lines.length) show(JSON.parse(lines.pop()));
      }
    } catch (error) {
      if (own.signal.aborted) show(note("Cancelled.", "status"));
      else show(note("The server does not answer any more: start it again, and load the page.", "alert"));
    } finally {
      if (asked[part] === own) delete asked[part];
    }
  };
  window.cascade = {
    ask: (part, values) => {
      asked[part]?.abort();
      asked[part] = new AbortController();
      follow(part, part === "edit" ? [...files(), ...values] : values, asked[part]);
      return [];
    },
    stop: (part) => {
      asked[part]?.abort();
      return [];
    },
  };

  const pick = (input) => {
    const picker = input.closest(".picker"), told = picker.querySelector(".told");
    const canvas = picker.querySelector("canvas"), tools = picker.querySelector(".tools");
    const file = input.files[0];
    delete chosen[picker.dataset.name];
    canvas.hidden = tools.hidden = true;
    if (!file) return;
    if (file.size > LARGEST) {
      told.textContent = `${file.name} is larger than ${LARGEST >> 20} MB: choose a smaller one`;
      return;
    }
    const reader = new FileReader();
    reader.onload = () => {
      const url = reader.result.replace(/^data:[^;,]*/, "data:");
      const state = (chosen[picker.dataset.name] = { url });
      told.textContent = `${file.name} is chosen.`;
      const image = new Image();
      image.onload = () => {
        if (chosen[picker.dataset.name] !== state) return;
        paintable(picker, canvas, image, state);
        canvas.hidden = false;
        tools.hidden = picker.dataset.name !== "first";
      };
      image.onerror = () => (told.textContent = `${file.name} is chosen; this browser cannot show it.`);
      image.src = reader.result;
    };
    reader.readAsDataURL(file);
  };

  // A canvas that shows a picture, and what is painted over it, in a lower resolution if it is large.
  const paintable = (picker, canvas, image, state) => {
    const scale = Math.min(1, 1024 / Math.max(image.naturalWidth, image.naturalHeight));
    canvas.width = Math.max(1, Math.round(image.naturalWidth * scale));
    canvas.height = Math.max(1, Math.round(image.naturalHeight * scale));
    const over = new OffscreenCanvas(canvas.width, canvas.height), brush = over.getContext("2d");
    const at = { x: canvas.width / 2, y: canvas.height / 2 };
    let down = false, used = false, near = false;
    const radius = () => (picker.querySelector(".brush").value / 200) * Math.max(canvas.width, canvas.height);
    const show = () => {
      const view = canvas.getContext("2d");
      view.clearRect(0, 0, canvas.width, canvas.height);
      view.drawImage(image, 0, 0, canvas.width, canvas.height);
      view.globalAlpha = 0.6;
      view.drawImage(over, 0, 0);
      view.globalAlpha = 1;
      if (near && picker.dataset.name === "first") {
        view.beginPath();
        view.arc(at.x, at.y, radius(), 0, 2 * Math.PI);
        view.lineWidth = canvas.width / 150;
        view.strokeStyle = down ? "#b91c1c" : "#1d4ed8";
        view.stroke();
      }
    };
    const stroke = (x, y) => {
      if (down) {
        used = true;
        brush.strokeStyle = "white";
        brush.lineCap = "round";
        brush.lineWidth = 2 * radius();
        brush.beginPath();
        brush.moveTo(at.x, at.y);
        brush.lineTo(x, y);
        brush.stroke();
      }
      [at.x, at.y] = [x, y];
      show();
    };
    const place = (event) => {
      const box = canvas.getBoundingClientRect();
      return [((event.clientX - box.left) / box.width) * canvas.width,
        ((event.clientY - box.top) / box.height) * canvas.height];
    };
    canvas.onpointerdown = (event) => {
      canvas.setPointerCapture(event.pointerId);
      [at.x, at.y] = place(event);
      near = down = true;
      stroke(at.x, at.y);
    };
    canvas.onpointermove = (event) => { near = true; stroke(...place(event)); };
    canvas.onpointerup = canvas.onpointercancel = () => { down = false; show(); };
    canvas.onblur = canvas.onpointerleave = () => { near = down = false; show(); };
    canvas.onfocus = () => { near = true; show(); };
    canvas.onkeydown = (event) => {
      const step = Math.max(2, radius() / 2);
      const [dx, dy] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key] ?? [];
      if (dx !== undefined) {
        const [x, y] = [at.x + dx * step, at.y + dy * step];
        stroke(Math.min(Math.max(x, 0), canvas.width), Math.min(Math.max(y, 0), canvas.height));
      } else if (event.key === " ") {
        down = !down;
        stroke(at.x, at.y);
      } else return;
      event.preventDefault();
    };
    state.wipe = () => { brush.clearRect(0, 0, over.width, over.height); used = false; show(); };
    state.mask = () => {
      if (!used) return "";
      const whole = document.createElement("canvas");
      [whole.width, whole.height] = [image.naturalWidth, image.naturalHeight];
      const view = whole.getContext("2d");
      view.fillRect(0, 0, whole.width, whole.height);
      view.drawImage(over, 0, 0, whole.width, whole.height);
      return whole.toDataURL("image/png");
    };
    show();
  };

  // What is compared: all pictures are here, so that swipe, menus and zoom move at once.
  const draw = (viewer) => {
    const value = (name) => viewer.querySelector(`.${name}`).value;
    const picture = (side) => {
      const at = (row) => viewer.querySelector(`.store img[data-side="${side}"][data-row="${row}"][data-now]`);
      return at(value("row")) ?? at(0);
    };
    const mode = value("mode"), chosen = [picture(value("one")), picture(value("two"))];
    viewer.dataset.mode = mode;
    ["first", "second"].forEach((name, i) => {
      const image = viewer.querySelector(`.${name} img`);
      if (image.src !== chosen[i].src) image.src = chosen[i].src;
      image.alt = chosen[i].alt;
    });
    const swipe = mode === "flip" ? (value("swipe") < 50 ? 100 : 0) : value("swipe");
    viewer.style.setProperty("--swipe", `${mode === "both" ? 0 : swipe}%`);
    viewer.style.setProperty("--zoom", value("zoom"));
    viewer.style.setProperty("--x", `${viewer.at?.[0] ?? 50}%`);
    viewer.style.setProperty("--y", `${viewer.at?.[1] ?? 50}%`);
    const of = (name) => viewer.querySelector(`.${name}`).selectedOptions[0]?.text ?? "";
    const [one, two] = [of("one"), of("two")];
    viewer.querySelector(".names").textContent =
      mode === "flip" ? (swipe ? one : two) : `${one} on the left, ${two} on the right`;
  };
  // Another cell of a sweep. Pictures that were asked for before may arrive later: they follow it.
  const cells = {};
  window.cascade.left = (side) => delete cells[side];
  window.cascade.moved = (side, values) => {
    cells[side] = values;
    const viewer = document.querySelector("#viewer .viewer");
    const own = [...(viewer?.querySelectorAll(`.store img[data-side="${side}"]`) ?? [])];
    const cell = values.filter((value) => value !== null && value !== "").join("|");
    const found = own.find((image) => image.dataset.cell === cell);
    if (!found) return;
    own.forEach((image) => image.toggleAttribute("data-now", image === found));
    viewer.querySelectorAll(`option[value="${side}"]`).forEach((option) => {
      if (option.closest(".one, .two")) option.text = `${option.text[0]}: ${found.dataset.title}`;
    });
    draw(viewer);
  };
  const move = (viewer, dx, dy) => {
    const at = (viewer.at ??= [50, 50]);
    [dx, dy].forEach((d, i) => (at[i] = Math.min(100, Math.max(0, at[i] + d))));
    draw(viewer);
  };
  const prepare = (viewer) => {
    viewer.classList.add("ready");
    const two = viewer.querySelector(".two"), views = viewer.querySelector(".views");
    if (!two.options.length) return;
    two.selectedIndex = Math.min(1, two.options.length - 1);
    views.onkeydown = (event) => {
      const zoom = viewer.querySelector(".zoom");
      const step = { ArrowLeft: [-5, 0], ArrowRight: [5, 0], ArrowUp: [0, -5], ArrowDown: [0, 5] }[event.key];
      if (step) move(viewer, ...step);
      else if (event.key === "+") zoom.stepUp();
      else if (event.key === "-") zoom.stepDown();
      else return;
      draw(viewer);
      event.preventDefault();
    };
    let held = null;
    views.onpointerdown = (event) => { held = [event.clientX, event.clientY]; views.setPointerCapture(event.pointerId); };
    views.onpointerup = views.onpointercancel = () => (held = null);
    views.onpointermove = (event) => {
      if (!held) return;
      const box = views.getBoundingClientRect();
      move(viewer, (100 * (held[0] - event.clientX)) / box.width, (100 * (held[1] - event.clientY)) / box.height);
      held = [event.clientX, event.clientY];
    };
    draw(viewer);
    Object.entries(cells).forEach(([side, values]) => window.cascade.moved(side, values));
  };
  for (const kind of ["input", "change"])
    document.addEventListener(kind, (event) => {
      const viewer = event.target.closest?.(".viewer");
      if (viewer) draw(viewer);
    });

  document.addEventListener("change", (event) => {
    if (event.target.matches("input.pick")) pick(event.target);
  });

  // A slider over pictures that are all here already.
  document.addEventListener("input", (event) => {
    if (!event.target.matches(".along")) return;
    const frames = event.target.closest(".path").querySelectorAll(".frame");
    frames.forEach((frame, i) => (frame.hidden = i !== +event.target.value));
  });

  document.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button?.matches(".copy")) copy(button);
    if (button?.matches(".sheet .open")) open(button);
    if (button?.matches(".save")) {
      const link = document.createElement("a");
      link.download = button.dataset.file;
      link.href = button.closest("figure").querySelector("img").src;
      link.click();
    }
    if (button?.matches(".wipe")) chosen[button.closest(".picker").dataset.name]?.wipe?.();
  });

  const begin = () => {
    document.documentElement.lang = "en";
    document.body.append(spoken);
    let later;
    const changed = () => {
      clearTimeout(later);
      later = setTimeout(speak, 150); // it asks for the layout, which is not to delay pictures
      document.querySelectorAll(".viewer:not(.ready)").forEach(prepare);
    };
    new MutationObserver(changed).observe(document.body, { childList: true, subtree: true });
  };
  if (document.body) begin();
  else addEventListener("DOMContentLoaded", begin);
})();
