// Action grids that can be turned: directions on the unit sphere, translations in the ball, rotations in the box.
// Reads {"points": [base64 of int16[N, 6]], "grids": [{"label", "edges": [theta, phi, r, roll, pitch, yaw], "points"}]}.
(() => {
  const data = JSON.parse(document.getElementById("grid-data").textContent);
  const root = document.getElementById("grids");
  const view = { azimuth: -58 * Math.PI / 180, elevation: 22 * Math.PI / 180 };
  const SHELLS = ["#8a5fbf", "#5468b0", "#2a788e", "#22a884", "#7ad151", "#c9c22b"];
  const panels = [];

  const points = data.points.map((text) => {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0)), values = new Int16Array(bytes.buffer), rows = [];
    for (let i = 0; i < values.length; i += 6) rows.push(Array.from(values.subarray(i, i + 6), (v) => v / 32767));
    return rows;
  });
  const direction = (t, p) => [Math.sin(t) * Math.cos(p), Math.sin(t) * Math.sin(p), Math.cos(t)];
  const span = (low, high, n, f) => Array.from({ length: n + 1 }, (_, i) => f(low + (high - low) * i / n));
  const quantile = (values, q) => values.slice().sort((a, b) => a - b)[Math.floor(q * (values.length - 1))];
  const scaled = (p, s) => p.map((v) => v * s);

  // A scene has lines and points within [-1, 1] of each axis: {lines: [[p, ...]], points: [[p, colour]], tips: [[p, text]]}.
  function sphere(grid) {
    const [theta, phi] = grid.edges, dots = [];
    const lines = theta.slice(1, -1).map((t) => span(-Math.PI, Math.PI, 72, (p) => direction(t, p)));
    lines.push(...phi.slice(0, -1).map((p) => span(0, Math.PI, 36, (t) => direction(t, p))));
    for (const [x, y, z] of points[grid.points]) {
      const r = Math.hypot(x, y, z);
      if (r > 0) dots.push([[x / r, y / r, z / r], "var(--bar)"]);
    }
    return { lines, points: dots, tips: axes(), hides: true,
      words: `direction of the translation: ${theta.length - 1} × ${phi.length - 1} cells of θ, φ` };
  }
  function ball(grid) {
    const [theta, phi, r] = grid.edges, rows = points[grid.points], sizes = rows.map((p) => Math.hypot(p[0], p[1], p[2]));
    const reach = Math.max(quantile(sizes, 0.99), r[1]), shells = r.slice(1, -1).filter((e) => e <= reach);
    const outer = shells.length ? shells[shells.length - 1] : reach, lines = [], dots = [];
    for (const s of shells) {
      lines.push(span(-Math.PI, Math.PI, 72, (p) => scaled(direction(Math.PI / 2, p), s / outer)));
      lines.push(span(-Math.PI, Math.PI, 72, (t) => scaled(direction(Math.abs(t), t < 0 ? Math.PI : 0), s / outer)));
    }
    for (const p of phi.slice(0, -1)) lines.push([[0, 0, 0], direction(Math.PI / 2, p)]);
    for (const t of theta) for (const p of [0, Math.PI]) lines.push([[0, 0, 0], direction(t, p)]);
    rows.forEach((p, i) => {
      if (sizes[i] > outer) return;
      const shell = r.slice(1, -1).filter((e) => e <= sizes[i]).length;
      dots.push([scaled(p.slice(0, 3), 1 / outer), SHELLS[shell % SHELLS.length]]);
    });
    return { lines, points: dots, tips: axes(),
      words: `translation up to ${outer.toFixed(2)}: ${r.length - 1} bins of r (colour), cells cut at z = 0 and y = 0` };
  }
  function box(grid) {
    const edges = grid.edges.slice(3), rows = points[grid.points].map((p) => p.slice(3));
    const reach = [0, 1, 2].map((i) => Math.max(quantile(rows.map((p) => Math.abs(p[i])), 0.995), 1e-3));
    const ruled = edges.map((e, i) => [-1, ...e.map((v) => v / reach[i]).filter((v) => Math.abs(v) < 1), 1]);
    const dots = rows.filter((p) => p.every((v, i) => Math.abs(v) <= reach[i]))
      .map((p) => [p.map((v, i) => v / reach[i]), "var(--bar)"]);
    const walls = (depth) => [0, 1, 2].flatMap((wall) => [0, 1, 2].filter((i) => i !== wall).flatMap((across) =>
      ruled[across].map((edge) => [-1, 1].map((end) => {
        const p = [end, end, end];
        p[wall] = depth[wall] > 0 ? -1 : 1;
        p[across] = edge;
        return p;
      }))));
    // Each name is beside an edge that no wall hides.
    const names = ["roll", "pitch", "yaw"].map((name, i) => `${name} ±${reach[i].toFixed(2)}`);
    const labels = ([x, y, z]) => {
      const [a, b, c] = [x, y, z].map((v) => v > 0 ? 1.2 : -1.2);
      return [[[0, b, -c], names[0]], [[a, 0, -c], names[1]], [[a * y > b * x ? a : -a, a * y > b * x ? -b : b, 0], names[2]]];
    };
    return { walls, labels, lines: [], points: dots, tips: [], zoom: 0.56,
      words: `rotation: ${edges.map((e) => e.length - 1).join(" × ")} cells of roll, pitch, yaw` };
  }
  const axes = () => [[[1.2, 0, 0], "x"], [[0, 1.2, 0], "y"], [[0, 0, 1.2], "z"]];

  function draw(panel) {
    const { canvas, scene } = panel, style = getComputedStyle(canvas), size = canvas.clientWidth;
    const colour = (name) => name.startsWith("var") ? style.getPropertyValue(name.slice(4, -1)) : name;
    const ratio = window.devicePixelRatio || 1, c = canvas.getContext("2d");
    canvas.width = canvas.height = size * ratio;
    const [sa, ca, se, ce] = [Math.sin(view.azimuth), Math.cos(view.azimuth), Math.sin(view.elevation), Math.cos(view.elevation)];
    const zoom = size / 2 * (scene.zoom || 0.8);
    const place = ([x, y, z]) => [size / 2 + zoom * (ca * y - sa * x), size / 2 - zoom * (ce * z - se * (ca * x + sa * y)),
      ce * (ca * x + sa * y) + se * z];
    c.scale(ratio, ratio);
    c.lineWidth = 0.6;
    const lines = scene.walls ? scene.walls([ce * ca, ce * sa, se]) : scene.lines;
    for (const side of [-1, 1]) {  // what is behind comes first
      c.strokeStyle = colour(side < 0 && scene.hides ? "var(--line)" : "var(--soft)");
      c.globalAlpha = scene.hides ? 1 : 0.7;
      c.beginPath();
      for (const line of lines) {
        let before = null;
        for (const p of line) {
          const at = place(p);
          if (before && (scene.hides ? (at[2] + before[2]) * side > 0 : side > 0)) {
            c.moveTo(before[0], before[1]);
            c.lineTo(at[0], at[1]);
          }
          before = at;
        }
      }
      c.stroke();
      for (const [p, name] of scene.points) {
        const at = place(p);
        if (at[2] * side < 0) continue;
        c.globalAlpha = side < 0 && scene.hides ? 0.15 : 0.65;
        c.fillStyle = colour(name);
        c.fillRect(at[0] - 1, at[1] - 1, 2, 2);
      }
    }
    c.globalAlpha = 1;
    c.fillStyle = c.strokeStyle = colour("var(--text)");
    c.font = "12px system-ui, sans-serif";
    c.textAlign = "center";
    for (const [p, text] of scene.labels ? scene.labels([ce * ca, ce * sa, se]) : []) {
      const at = place(p), half = c.measureText(text).width / 2 + 2;
      c.fillText(text, Math.min(size - half, Math.max(half, at[0])), at[1] + 4);
    }
    for (const [p, text] of scene.tips) {
      const from = place(scaled(p, 1 / 1.2)), to = place(p);
      c.beginPath();
      c.moveTo(from[0], from[1]);
      c.lineTo(to[0], to[1]);
      c.stroke();
      c.fillText(text, to[0], to[1] - 3);
    }
  }
  const all = () => panels.forEach(draw);

  function turn(canvas) {
    let last = null;
    const move = (x, y) => {
      view.azimuth -= x * 0.01;
      view.elevation = Math.min(Math.PI / 2, Math.max(-Math.PI / 2, view.elevation + y * 0.01));
      requestAnimationFrame(all);
    };
    canvas.addEventListener("pointerdown", (e) => { last = [e.clientX, e.clientY]; canvas.setPointerCapture(e.pointerId); });
    canvas.addEventListener("pointermove", (e) => {
      if (!last) return;
      move(e.clientX - last[0], e.clientY - last[1]);
      last = [e.clientX, e.clientY];
    });
    for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => { last = null; });
    canvas.addEventListener("keydown", (e) => {
      const by = { ArrowLeft: [-12, 0], ArrowRight: [12, 0], ArrowUp: [0, -12], ArrowDown: [0, 12] }[e.key];
      if (!by) return;
      e.preventDefault();
      move(...by);
    });
  }

  for (let row = 0; row < Math.min(2, data.grids.length); row++) {
    const choice = document.createElement("select"), line = document.createElement("div"), mine = [];
    choice.setAttribute("aria-label", "action grid");
    data.grids.forEach((grid, i) => choice.add(new Option(grid.label, i)));
    choice.value = row ? data.grids.length - 1 : 0;
    line.className = "turn";
    for (const make of [sphere, ball, box]) {
      const figure = document.createElement("figure"), canvas = document.createElement("canvas");
      const caption = document.createElement("figcaption");
      canvas.tabIndex = 0;
      caption.className = "note";
      figure.append(canvas, caption);
      line.append(figure);
      mine.push({ canvas, caption, make });
      turn(canvas);
    }
    const show = () => mine.forEach((panel) => {
      panel.scene = panel.make(data.grids[choice.value]);
      panel.caption.textContent = panel.scene.words;
      panel.canvas.setAttribute("aria-label", panel.scene.words);
      if (!panels.includes(panel)) panels.push(panel);
      draw(panel);
    });
    root.append(choice, line);
    choice.addEventListener("change", show);
    show();
  }
  window.addEventListener("resize", all);
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", all);
})();
