// A fold opens for a link into it, and for the printer.
'use strict';
function openFold() {
    let fold = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    for (; fold; fold = fold.parentElement) if (fold.tagName === 'DETAILS') fold.open = true;
}
addEventListener('hashchange', openFold);
addEventListener('beforeprint', () => { for (const fold of document.querySelectorAll('details')) fold.open = true; });

// A table that does not fit has its long words broken, where the screen is wide; and if that is not enough, its rows are stacked.
// On a phone a cell of many short lines does not fit either, where a table has three columns or more.
const TALL = 110;   // pixels, five lines
function stackTables() {
    for (const table of document.querySelectorAll('article table')) {
        const tall = () => innerWidth <= 576 && table.rows[0]?.cells.length > 2 && [...table.rows].some(row => row.offsetHeight > TALL);
        const fits = () => table.scrollWidth <= table.parentElement.clientWidth + 1 && !tall();
        table.classList.remove('tight', 'stacked');
        if (!table.parentElement.clientWidth || fits()) continue;
        if (innerWidth > 768) table.classList.add('tight');
        if (!fits()) table.classList.add('stacked');
    }
}
// What is drawn with letters, and tables of a terminal, keep their lines: the letters are as small as that takes.
function fitDrawings() {
    for (const box of document.querySelectorAll('article pre')) {
        if (!box.clientWidth || !box.closest('.highlight-text') && !/[┌┏╭]/.test(box.textContent)) continue;
        box.style.cssText = 'white-space: pre; overflow-x: hidden;';
        const {fontSize, paddingLeft, paddingRight} = getComputedStyle(box), padding = parseFloat(paddingLeft) + parseFloat(paddingRight);
        const share = (box.clientWidth - padding) / (box.scrollWidth - padding);
        if (share < 1) box.style.fontSize = `${Math.floor(parseFloat(fontSize) * share * 99) / 100}px`;
    }
}
function fit() { stackTables(); fitDrawings(); }
addEventListener('resize', fit);
addEventListener('toggle', fit, true);   // what is in a fold has a width once the fold is open

// Escape puts the meaning of a word away.
addEventListener('keydown', event => { if (event.key === 'Escape' && document.activeElement.tagName === 'DFN') document.activeElement.blur(); });
openFold();
fit();
