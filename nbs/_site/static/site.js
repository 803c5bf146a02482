/* A button on each block of code that puts it on the clipboard, by mouse, finger or keyboard; and
 * long names in tables that may break. */

'use strict';

const CODE = 'article div[class*="highlight-"] > .highlight';
const SHOWN_FOR = 2000;  // milliseconds

// where a page may not write to the clipboard: a browser's older way, from a text that is selected
function copiedBySelection(text) {
  const area = document.createElement('textarea');
  const before = document.activeElement;
  area.value = text;
  area.setAttribute('readonly', '');
  area.className = 'aside';
  document.body.append(area);
  area.select();
  const done = document.execCommand('copy');
  area.remove();
  before?.focus();
  return done;
}

async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copiedBySelection(text);
  }
}

// what a screen reader reads out when it changes
function announcer() {
  const status = document.createElement('p');
  status.setAttribute('role', 'status');
  status.className = 'aside';
  document.body.append(status);
  return status;
}

function buttonFor(block, status) {
  const button = document.createElement('button');
  const label = button.appendChild(document.createElement('span'));
  button.type = 'button';
  button.className = 'copy';
  label.textContent = 'Copy';
  button.setAttribute('aria-label', 'Copy this code');
  button.addEventListener('click', async () => {
    const done = await copied(block.querySelector('pre').textContent.replace(/\n$/, ''));
    label.textContent = done ? 'Copied' : 'Not copied';
    status.textContent = label.textContent;
    setTimeout(() => { label.textContent = 'Copy'; status.textContent = ''; }, SHOWN_FOR);
  });
  return button;
}

// a run's name is as wide as a table: let it break after its underlines and slashes. What is copied
// from the page, and what the search knows, stays whole.
function breakable(cell) {
  const names = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT);
  const long = [];
  while (names.nextNode())
    if (/[^\s]{25}/.test(names.currentNode.data)) long.push(names.currentNode);
  for (const name of long) {
    const parts = name.data.split(/(?<=[_\/])/);
    name.replaceWith(...parts.flatMap(part => [part, document.createElement('wbr')]));
  }
}

function main() {
  for (const cell of document.querySelectorAll('article td')) breakable(cell);
  const status = announcer();
  for (const block of document.querySelectorAll(CODE)) {
    const printed = block.closest('.cell_output') && block.parentElement.matches('.output');
    if (!printed) block.prepend(buttonFor(block, status));
  }
}

document.addEventListener('DOMContentLoaded', main);
