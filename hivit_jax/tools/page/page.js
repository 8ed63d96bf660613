// The page of `tools.serve`: sends pictures and masks, shows what comes back.

const $ = (id) => document.getElementById(id);
const HIDDEN = 'rgb(128 128 128 / 0.94)';

let about; // the model
let picture; // the chosen file, a Blob
let mask = []; // of each unit, row by row: true = hidden
let brush = null; // while painting: what units become
let waiting = 0; // requests

// --- asking the server ---

async function ask(path, fields = null) {
  waiting += 1;
  $('busy').hidden = false;
  try {
    let body;
    if (fields) {
      body = new FormData();
      for (const [key, value] of Object.entries(fields)) body.append(key, value);
    }
    const answer = await fetch(path, { method: fields ? 'POST' : 'GET', body }).catch(() => {
      throw new Error('the server does not answer; is it still running?');
    });
    const content = await answer.json();
    if (!answer.ok) throw new Error(content.error);
    return content;
  } finally {
    waiting -= 1;
    $('busy').hidden = waiting === 0;
  }
}

function complain(error) {
  $('error').textContent = error?.message ?? '';
  $('error').hidden = !error;
}

// While one mask is computed, only the newest of those that follow waits.
let next = null;
let computing = false;

async function reconstruct(fields) {
  next = fields;
  if (computing) return;
  computing = true;
  while (next) {
    const [now, file] = [next, picture];
    next = null;
    try {
      const found = await ask('/reconstruct', { picture: file, ...now });
      if (file !== picture) continue;
      complain(null);
      if (!('mask' in now)) setMask([...found.mask].map((unit) => unit === '1'));
      $('reconstruction').src = found.reconstruction;
      $('pasted').src = found.pasted;
    } catch (error) {
      complain(error);
    }
  }
  computing = false;
}

// --- pictures ---

async function show(file, example = null) {
  complain(null);
  if (file.size > about.max_bytes) {
    complain(new Error(`the picture has more than ${about.max_bytes / 2 ** 20} MB`));
    return;
  }
  let found;
  let copy;
  try {
    copy = new Blob([await file.arrayBuffer()]); // the file may change on disk
    found = await ask('/look', { picture: copy });
  } catch (error) {
    complain(error);
    return;
  }
  picture = copy;
  [...$('examples').children].forEach((button, i) => {
    button.setAttribute('aria-pressed', String(i === example));
  });
  $('seen').src = found.seen;
  $('pictures').classList.toggle('large', found.width > $('seen').width);
  showFound(found.found);
  showLevels(found.levels, found.width / found.height);
  if (about.units) {
    if (mask.length) paintAll(mask);
    else atRandom();
  }
}

function showFound(found) {
  $('found-picture').hidden = !found?.picture;
  $('found-list').hidden = !found;
  if (!found) return;
  if (found.picture) $('found').src = found.picture;
  $('found-text').textContent = 'What it finds';
  $('found-title').textContent = found.title;
  $('rows').replaceChildren(...found.rows.map(tableRow));
  if (!found.rows.length) $('found-title').textContent = `${found.title}: none`;
}

function tableRow({ label, share, colour }) {
  const row = document.createElement('tr');
  const name = row.insertCell();
  if (colour.length) {
    const square = document.createElement('span');
    square.className = 'colour';
    square.style.background = `rgb(${colour.join(' ')})`;
    name.append(square);
  }
  name.append(label);
  const meter = document.createElement('meter');
  meter.value = share;
  row.insertCell().append(meter);
  row.insertCell().append(`${(100 * share).toFixed(1)} %`);
  return row;
}

function showLevels(levels, shape) {
  $('levels').replaceChildren(
    ...levels.map(({ text, picture: source }) => {
      const figure = document.createElement('figure');
      const frame = document.createElement('div');
      const image = new Image();
      const caption = document.createElement('figcaption');
      frame.className = 'picture';
      image.src = source;
      image.alt = text;
      image.style.aspectRatio = shape;
      caption.textContent = text;
      frame.append(image);
      figure.append(frame, caption);
      return figure;
    }),
  );
  $('levels').classList.toggle('four', levels.length > 3);
  $('maps').hidden = levels.length === 0;
}

// --- masks ---

function atRandom() {
  $('ratio-text').textContent = `${Math.round(100 * $('ratio').value)} %`;
  if (picture) reconstruct({ ratio: $('ratio').value, seed: $('seed').value || 0 });
}

function paintAll(units) {
  setMask(units);
  const hidden = units.filter(Boolean).length;
  if (hidden && hidden < units.length) {
    reconstruct({ mask: units.map(Number).join('') });
    return;
  }
  complain(null);
  next = null;
  $('reconstruction').removeAttribute('src');
  if (hidden) $('pasted').removeAttribute('src');
  else $('pasted').src = $('seen').src;
}

function setMask(units) {
  mask = units;
  const { rows, columns } = about.units;
  const canvas = $('mask');
  const box = canvas.getBoundingClientRect();
  const scale = window.devicePixelRatio;
  canvas.width = Math.round(box.width * scale);
  canvas.height = Math.round(box.height * scale);
  const pen = canvas.getContext('2d');
  const [width, height] = [canvas.width / columns, canvas.height / rows];
  pen.fillStyle = HIDDEN;
  pen.strokeStyle = 'rgb(255 255 255 / 0.35)';
  units.forEach((hidden, i) => {
    const [x, y] = [(i % columns) * width, Math.floor(i / columns) * height];
    if (hidden) pen.fillRect(x, y, width, height);
    pen.strokeRect(x, y, width, height);
  });
  const count = units.filter(Boolean).length;
  $('count').textContent = `${count} of ${units.length} units hidden (${Math.round(
    (100 * count) / units.length,
  )} %)`;
}

function unitAt(event) {
  const { rows, columns } = about.units;
  const box = $('mask').getBoundingClientRect();
  const column = Math.floor(((event.clientX - box.left) / box.width) * columns);
  const row = Math.floor(((event.clientY - box.top) / box.height) * rows);
  const inside = row >= 0 && row < rows && column >= 0 && column < columns;
  return inside ? row * columns + column : -1;
}

function paint(event) {
  const unit = unitAt(event);
  if (unit < 0 || mask[unit] === brush) return;
  paintAll(mask.map((hidden, i) => (i === unit ? brush : hidden)));
}

function startMasks({ ratio, moments }) {
  for (const element of document.querySelectorAll('.reconstructs')) element.hidden = false;
  $('mask').hidden = false;
  $('moments').hidden = !moments;
  $('seen-text').textContent = 'Paint here: hide units, or show them';
  $('ratio').value = ratio;
  $('mask').addEventListener('pointerdown', (event) => {
    const unit = unitAt(event);
    if (unit < 0 || !mask.length) return;
    brush = !mask[unit];
    $('mask').setPointerCapture(event.pointerId);
    paint(event);
  });
  $('mask').addEventListener('pointermove', (event) => {
    if (brush !== null) for (const one of event.getCoalescedEvents()) paint(one);
  });
  for (const end of ['pointerup', 'pointercancel']) {
    $('mask').addEventListener(end, () => { brush = null; });
  }
  $('ratio').addEventListener('input', atRandom);
  $('seed').addEventListener('input', atRandom);
  $('another').addEventListener('click', () => {
    $('seed').value = 1 + Number($('seed').value);
    atRandom();
  });
  $('invert').addEventListener('click', () => paintAll(mask.map((hidden) => !hidden)));
  $('clear').addEventListener('click', () => paintAll(mask.map(() => false)));
  new ResizeObserver(() => { if (mask.length) setMask(mask); }).observe($('mask'));
}

// --- choosing ---

async function start() {
  about = await ask('/about');
  $('name').textContent = about.name;
  $('source').textContent = about.source;
  document.title = `hivit_jax: ${about.name}`;
  if (about.units) startMasks(about.units);
  for (let i = 0; i < about.examples; i += 1) {
    const button = document.createElement('button');
    const image = new Image();
    image.src = `/examples/${i}`;
    image.alt = `example ${i + 1}`;
    button.append(image);
    button.addEventListener('click', () => showExample(i));
    $('examples').append(button);
  }
  $('file').addEventListener('change', () => {
    if ($('file').files.length) show($('file').files[0]);
    $('file').value = '';
  });
  document.addEventListener('dragover', (event) => {
    event.preventDefault();
    document.body.classList.add('dropping');
  });
  document.addEventListener('dragleave', () => document.body.classList.remove('dropping'));
  document.addEventListener('drop', (event) => {
    event.preventDefault();
    document.body.classList.remove('dropping');
    if (event.dataTransfer.files.length) show(event.dataTransfer.files[0]);
  });
  document.addEventListener('paste', (event) => {
    if (event.clipboardData.files.length) show(event.clipboardData.files[0]);
  });
  await showExample(0);
}

async function showExample(i) {
  const file = await fetch(`/examples/${i}`).then((answer) => answer.blob());
  await show(file, i);
}

start().catch(complain);
