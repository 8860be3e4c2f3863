// A modest Markdown: paragraphs, headings, lists, quotes, tables, fenced code, emphasis, links.
// Everything else, HTML and images among them, is shown as the text that it is.

import { copyButton, el } from "./dom.js";

/** Shows a text that grows: only blocks that changed are built again. */
export class MarkdownView {
  constructor() {
    this.node = el("div", { class: "prose" });
    this.shown = [];
  }

  update(text) {
    const blocks = splitBlocks(text);
    let same = 0;
    while (same < blocks.length && blocks[same] === this.shown[same]) same += 1;
    while (this.node.children.length > same) this.node.lastChild.remove();
    this.node.append(...blocks.slice(same).map(renderBlock));
    this.shown = blocks;
  }
}

const FENCE = /^\s*(`{3,}|~{3,})\s*([^\s`]*)/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;

/** Blocks as raw text: a fence with what it holds, or lines without a blank one between them. */
function splitBlocks(text) {
  const blocks = [];
  let lines = [];
  let fence = null;
  const flush = () => {
    if (lines.length) blocks.push(lines.join("\n"));
    lines = [];
  };
  for (const line of text.split("\n")) {
    if (fence) {
      lines.push(line);
      if (line.trim().startsWith(fence) && !line.trim().replaceAll(fence[0], "")) {
        fence = null;
        flush();
      }
      continue;
    }
    const opening = line.match(FENCE);
    if (opening) {
      flush();
      fence = opening[1];
      lines.push(line);
    } else if (/^#{1,6}\s/.test(line) || /^\s*([-*_])(\s*\1){2,}\s*$/.test(line)) {
      flush();
      blocks.push(line);
    } else if (line.trim() === "") {
      // Items of a list may stand apart.
      if (lines.length && ITEM.test(lines[0])) lines.push("");
      else flush();
    } else {
      const listEnds = lines.at(-1) === "" && !ITEM.test(line) && !/^\s/.test(line);
      if (listEnds || (ITEM.test(line) && lines.length && !ITEM.test(lines[0]))) flush();
      lines.push(line);
    }
  }
  flush();
  return blocks.map((block) => block.replace(/\n+$/, ""));
}

function renderBlock(block) {
  const lines = block.split("\n");
  const heading = block.match(/^(#{1,6})\s(.*)$/);
  if (FENCE.test(lines[0])) return renderCode(lines);
  if (heading) {
    const level = Math.min(heading[1].length + 2, 6); // The page itself has h1 and h2.
    return el(`h${level}`, {}, ...inline(heading[2].trim()));
  }
  if (/^\s*([-*_])(\s*\1){2,}\s*$/.test(block)) return el("hr");
  if (/^\s*>/.test(lines[0])) {
    const inner = lines.map((line) => line.replace(/^\s*> ?/, "")).join("\n");
    return el("blockquote", {}, ...splitBlocks(inner).map(renderQuoted));
  }
  if (ITEM.test(lines[0])) return renderList(lines);
  if (lines.length > 1 && lines[0].includes("|") && isTableRule(lines[1])) {
    return renderTable(lines);
  }
  return el("p", {}, ...inline(block));
}

// Quotes in quotes stay text, so that no answer makes this recurse.
function renderQuoted(block) {
  return /^\s*>/.test(block) ? el("p", {}, block) : renderBlock(block);
}

function renderCode(lines) {
  const [, fence, language] = lines[0].match(FENCE);
  const closed = lines.length > 1 && lines.at(-1).trim().startsWith(fence);
  const code = lines.slice(1, closed ? -1 : undefined).join("\n");
  const head = el("div", { class: "code-head" }, el("span", {}, language || "text"));
  head.append(copyButton(() => code));
  return el("div", { class: "code" }, head, el("pre", { tabIndex: 0 }, el("code", {}, code)));
}

/** Lists nest by their indent; what is no item goes on with the item above. */
function renderList(lines) {
  const stack = []; // {indent, list}, the innermost last
  let item = null;
  for (const line of lines) {
    const match = line.match(ITEM);
    if (!match) {
      if (item && line.trim()) item.append(" ", ...inline(line.trim()));
      continue;
    }
    const [, space, marker, text] = match;
    const indent = space.replaceAll("\t", "    ").length;
    while (stack.length > 1 && indent < stack.at(-1).indent) stack.pop();
    if (!stack.length || (indent > stack.at(-1).indent + 1 && stack.length < 8)) {
      const ordered = /\d/.test(marker);
      const list = el(ordered ? "ol" : "ul", ordered ? { start: parseInt(marker, 10) } : {});
      (item ?? { append() {} }).append(list);
      stack.push({ indent, list });
    }
    item = el("li", {}, ...inline(text));
    stack.at(-1).list.append(item);
  }
  return stack[0].list;
}

function tableCells(line) {
  const cells = line.trim().replace(/^\||\|$/g, "").split("|");
  return cells.map((cell) => cell.trim());
}

function isTableRule(line) {
  return tableCells(line).every((cell) => /^:?-+:?$/.test(cell));
}

function renderTable([header, , ...rows]) {
  const cells = (line, tag) => tableCells(line).map((cell) => el(tag, {}, ...inline(cell)));
  const head = el("thead", {}, el("tr", {}, ...cells(header, "th")));
  const body = el("tbody", {}, ...rows.map((row) => el("tr", {}, ...cells(row, "td"))));
  return el("div", { class: "table", tabIndex: 0 }, el("table", {}, head, body));
}

// Code first: nothing inside it is emphasis. Each alternative is linear in the text's length.
const SPAN =
  /(`{1,3})([^`]+)\1|\*\*([^*\n]+)\*\*|\*([^*\s][^*\n]*)\*|~~([^~\n]+)~~|(!?\[([^\][\n]+)\]\(([^()\s]+)\))|(https?:\/\/[^\s<>"'`)\]]+)/g;

/** Nodes for a text with emphasis, code and links to http(s) addresses. */
function inline(text) {
  const nodes = [];
  let end = 0;
  for (const match of text.matchAll(SPAN)) {
    const [whole, , code, strong, emphasis, struck, reference, label, target, address] = match;
    let node = null;
    if (code !== undefined) node = el("code", {}, code);
    else if (strong !== undefined) node = el("strong", {}, ...inlineCode(strong));
    else if (emphasis !== undefined) node = el("em", {}, ...inlineCode(emphasis));
    else if (struck !== undefined) node = el("s", {}, struck);
    else if (reference?.startsWith("!")) node = whole; // An image would be a request to elsewhere.
    else if (reference) node = link(target, label);
    else node = link(withoutStops(address));
    if (!node) continue; // Not a link that may be followed: it stays text.
    nodes.push(...broken(text.slice(end, match.index)), node);
    end = match.index + whole.length;
    if (address) end -= address.length - node.textContent.length;
  }
  nodes.push(...broken(text.slice(end)));
  return nodes;
}

function inlineCode(text) {
  return text.split(/`([^`]+)`/).map((part, i) => (i % 2 ? el("code", {}, part) : part));
}

function withoutStops(address) {
  let end = address.length;
  while (".,;:!?".includes(address[end - 1])) end -= 1;
  return address.slice(0, end);
}

function link(address, label = address) {
  if (!/^https?:\/\//i.test(address) || !URL.canParse(address)) return null;
  return el("a", { href: address, target: "_blank", rel: "noopener noreferrer" }, label);
}

/** Models mean their line ends. */
function broken(text) {
  return text.split("\n").flatMap((line, i) => (i ? [el("br"), line] : [line]));
}
