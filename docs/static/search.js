// The search page. searchindex.js has the pages: [address, title, weight, sections], a section being [anchor, title, prose, code];
// and the words of the glossary: [names in both languages, meaning, address of the section that explains it].
'use strict';
const STOP = new Set(`a an and are as at be but by can do does for from has have how i in is it its many much my of on or so than that the them this to
    was what when where which why will with you your 왜 무엇 무엇이 무엇을 어떻게 얼마나 몇 이 그 저 것 수 및`.split(/\s+/));
const WHOLE = 1, BEGINNING = .4, INSIDE = .15;   // what a hit counts for: a word, its beginning, its middle

const escaped = text => text.replace(/[.*+?^${}()|[\]\\]/g, '\\$&');

// Words of a query, without those that every text has, unless there is nothing else. What the glossary has is one word: bits per byte.
function words(query) {
    if (INDEX.words.some(([names]) => names.some(name => name.toLowerCase() === query.toLowerCase()))) return [query.toLowerCase()];
    const all = query.toLowerCase().match(/[\p{L}\p{N}_]+/gu) ?? [];
    const kept = all.filter(word => !STOP.has(word));
    return [...new Set(kept.length ? kept : all)];
}

// A word with what means the same, and how each is looked for; and what the glossary says. 조정 is no word of it, but a part of one.
// Particles follow a Korean noun: it begins a word, and that is whole enough.
function term(word) {
    const same = INDEX.words.filter(([names]) => names.some(name => name.toLowerCase() === word));
    const near = same.length ? [] : INDEX.words.filter(([names]) => names.some(name => name.toLowerCase().includes(word)));
    const names = [...new Set([word, ...same.flatMap(([names]) => names.map(name => name.toLowerCase()))])];
    const patterns = names.map((name, place) => {
        const stem = name.replace(/(?<=[a-z]{4})(?:ing|ed|es|s|e)$/, '');
        const end = /[가-힣]$/.test(name) ? '' : '(?:e|s|es|ed|ing)?(?![\\p{L}\\p{N}_])';
        return {name, share: place ? .5 : 1, pattern: new RegExp(escaped(stem), 'gu'),
                whole: new RegExp(`(?<![\\p{L}\\p{N}_])${escaped(stem)}${end}`, 'gu'),
                begins: new RegExp(`(?<![\\p{L}\\p{N}])${escaped(stem)}`, 'gu')};
    });
    return {patterns, explained: new Map([...near.map(([, , at]) => [at, 2]), ...same.map(([, , at]) => [at, 6])]),
            meanings: new Map([...near, ...same].map(([names, meaning, at]) => [at, `${names.join(', ')}: ${meaning}`]))};
}

function count(text, {whole, begins, pattern}) {
    const all = text.match(pattern)?.length ?? 0;
    if (!all) return 0;
    const full = text.match(whole)?.length ?? 0, first = Math.max(text.match(begins)?.length ?? 0, full);
    return full * WHOLE + (first - full) * BEGINNING + (all - first) * INSIDE;
}

// How much each section is about each term, then about all of them: rare terms count for more, and repeating one for less and less.
function search(query) {
    const terms = words(query).map(term), phrase = query.toLowerCase().replace(/[?!.]+$/, '').trim();
    const sections = INDEX.pages.flatMap(([address, page, weight, list]) => list.map(([anchor, title, prose, code], place) => {
        const texts = [title, prose, code].map(text => text.toLowerCase());
        const at = place ? `${address}#${anchor}` : address;
        const counts = terms.map(({patterns, explained}) => (explained.get(at) ?? 0) + Math.max(...patterns.map(name =>
            name.share * (count(texts[0], name) * (place ? 4 : 6) + count(texts[1], name) + count(texts[2], name) * .3))));
        const together = title.toLowerCase() === phrase || terms.length > 1 && texts.some(text => text.includes(phrase));
        return {address, page, weight, at, anchor, title, prose, code, counts, together, length: texts[1].length + texts[2].length / 3};
    }));
    const mean = sections.reduce((sum, section) => sum + section.length, 0) / sections.length;
    const rarity = terms.map((_, i) => Math.log(1 + sections.length / (1 + sections.filter(s => s.counts[i]).length)));
    for (const s of sections) {
        const size = .8 + .2 * s.length / mean, found = s.counts.filter(Boolean).length;
        s.score = s.counts.reduce((sum, n, i) => sum + rarity[i] * n / (n + 2 * size), 0)
            * s.weight * (found / terms.length) ** 2 * (s.together ? 2 : 1);
    }
    const pages = Map.groupBy(sections.filter(s => s.score > 0).sort((a, b) => b.score - a.score), s => s.address);
    const score = list => list.slice(0, 3).reduce((sum, s, i) => sum + s.score * [1, .3, .1][i], 0);
    return {terms: terms.flatMap(({patterns}) => patterns), meanings: new Map(terms.flatMap(({meanings}) => [...meanings])), pages: [...pages.values()].sort((a, b) => score(b) - score(a)).slice(0, 20)};
}

// Some words of a section where most of the query is near, the hits marked. A section without a hit is there for what it explains.
function snippet({at, title, prose, code}, terms, meanings) {
    const hits = new RegExp(terms.map(({name}) => escaped(name.replace(/(?<=[a-z]{4})(?:ing|ed|es|s|e)$/, ''))).join('|'), 'giu');
    const named = prose && title.search(hits) >= 0;   // what it is called is enough, if there is a word about it
    const text = named ? prose : [prose, code].find(text => text.search(hits) >= 0) ?? meanings.get(at) ?? prose;
    const all = [...text.matchAll(hits)];
    const near = all.map(({index}) => new Set(all.filter(hit => hit.index >= index && hit.index < index + 150).map(hit => hit[0].toLowerCase())).size);
    const start = Math.max(0, text.lastIndexOf(' ', (all[near.indexOf(Math.max(...near))]?.index ?? 0) - 60) + 1);
    const end = text.length > start + 240 ? text.lastIndexOf(' ', start + 240) : text.length;
    const paragraph = document.createElement('p'), part = text.slice(start, end);
    let last = 0;
    for (const hit of part.matchAll(hits)) {
        const mark = document.createElement('mark');
        mark.textContent = hit[0];
        paragraph.append(part.slice(last, hit.index), mark);
        last = hit.index + hit[0].length;
    }
    paragraph.append(part.slice(last) + (end < text.length ? ' …' : ''));
    if (start) paragraph.prepend('… ');
    paragraph.className = 'context';
    return paragraph;
}

function link({address, page, anchor, title}, text) {
    const element = document.createElement('a');
    element.href = address + (anchor ? '#' + encodeURIComponent(anchor) : '');
    element.textContent = text ?? (title && title !== page ? `${page} › ${title}` : page);
    return element;
}

function show(query) {
    const out = document.getElementById('search-results'), {terms, meanings, pages} = search(query);
    const summary = document.createElement('p'), list = document.createElement('ul');
    summary.className = 'search-summary';
    summary.setAttribute('role', 'status');
    summary.textContent = document.getElementById('search-found').textContent.replace('%s', pages.length);
    list.className = 'search';
    for (const [best, ...more] of pages) {
        const item = list.appendChild(document.createElement('li'));
        item.append(link(best), snippet(best, terms, meanings));
        const others = more.filter(s => s.title && s.title !== best.title && s.score > best.score / 3).slice(0, 3);
        if (others.length) item.appendChild(document.createElement('p')).append(...others.flatMap((s, i) => [i ? ' · ' : '', link(s, s.title)]));
    }
    const nothing = document.getElementById('search-nothing');
    nothing.firstElementChild.textContent = nothing.firstElementChild.textContent.replace('%s', query);
    out.replaceChildren(summary, pages.length ? list : nothing);
    localStorage.setItem('sphinx_highlight_terms', terms.map(({name}) => name).join(' '));
}

const query = new URLSearchParams(location.search).get('q')?.trim();
for (const field of document.querySelectorAll('input[name=q]')) field.value = query ?? '';
if (query && words(query).length) show(query);
