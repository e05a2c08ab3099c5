// Values under the pointer: a dashed line, the step, and each curve's number in place of its last one.
for (const chart of document.querySelectorAll('.chart')) {
  const { steps, x, values } = JSON.parse(chart.dataset.hover);
  const svg = chart.querySelector('svg'), cursor = chart.querySelector('.cursor');
  const at = chart.querySelector('.at'), numbers = chart.querySelectorAll('.value');
  const place = (position) => { cursor.setAttribute('x1', position); cursor.setAttribute('x2', position); };
  svg.addEventListener('pointermove', (event) => {
    const box = svg.getBoundingClientRect();
    const pointer = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    let nearest = 0;
    x.forEach((position, i) => {
      if (Math.abs(position - pointer) < Math.abs(x[nearest] - pointer)) nearest = i;
    });
    place(x[nearest]);
    at.textContent = 'step ' + steps[nearest].toLocaleString('en');
    numbers.forEach((number, i) => { number.textContent = values[i][nearest]; });
  });
  svg.addEventListener('pointerleave', () => {
    place(-9);
    at.textContent = '';
    numbers.forEach((number) => { number.textContent = number.dataset.last; });
  });
}
