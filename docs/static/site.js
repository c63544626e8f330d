// A fold opens for a link into it, and for the printer.
'use strict';
function openFold() {
    let fold = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    for (; fold; fold = fold.parentElement) if (fold.tagName === 'DETAILS') fold.open = true;
}
addEventListener('hashchange', openFold);
addEventListener('beforeprint', () => { for (const fold of document.querySelectorAll('details')) fold.open = true; });

// A table that does not fit has its long words broken, where the screen is wide; and if that is not enough, its rows are stacked.
function stackTables() {
    for (const table of document.querySelectorAll('article table')) {
        const fits = () => table.scrollWidth <= table.parentElement.clientWidth + 1;
        table.classList.remove('tight', 'stacked');
        if (!table.parentElement.clientWidth || fits()) continue;
        if (innerWidth > 768) table.classList.add('tight');
        if (!fits()) table.classList.add('stacked');
    }
}
addEventListener('resize', stackTables);
addEventListener('toggle', stackTables, true);   // a table in a fold has a width once the fold is open

// Escape puts the meaning of a word away.
addEventListener('keydown', event => { if (event.key === 'Escape' && document.activeElement.tagName === 'DFN') document.activeElement.blur(); });
openFold();
stackTables();
