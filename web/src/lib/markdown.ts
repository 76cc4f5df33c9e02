// Markdown -> HTML -> DOMPurify, last. Formulas and colours of code are then put into the clean elements, from text.
import DOMPurify from 'dompurify'
import { Marked, type Token, type TokenizerAndRendererExtension, type Tokens } from 'marked'
import { closed } from './half'

export function escape(text: string): string {
  return text.replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`)
}

type Math = Tokens.Generic & { tex: string; display: boolean }

function math(name: string, level: 'block' | 'inline', opens: RegExp, whole: RegExp, display: boolean): TokenizerAndRendererExtension {
  return {
    name,
    level,
    start: (src) => src.match(opens)?.index,
    tokenizer(src) {
      const match = whole.exec(src)
      return match ? { type: name, raw: match[0], tex: match[1]!.trim(), display } : undefined
    },
    renderer: (token) => {
      const { tex, display } = token as Math
      return display
        ? `<div class="math" data-display="true">${escape(tex)}</div>`
        : `<span class="math">${escape(tex)}</span>`
    },
  }
}

const marked = new Marked({ gfm: true, breaks: true })
marked.use({
  extensions: [
    math('displayDollars', 'block', /\$\$/, /^\$\$([\s\S]+?)\$\$(?:\n|$)/, true),
    math('displayBrackets', 'block', /\\\[/, /^\\\[([\s\S]+?)\\\](?:\n|$)/, true),
    math('inlineDisplay', 'inline', /\$\$/, /^\$\$([^\n$]+?)\$\$/, true),
    // "$5 and $6" is money: no space inside the dollars, no digit behind them (pandoc's rule)
    math('inlineDollars', 'inline', /\$/, /^\$((?:[^\s$\\]|\\.)(?:(?:[^\n$\\]|\\.)*?(?:[^\s$\\]|\\.))?)\$(?!\d)/, false),
    math('inlineBrackets', 'inline', /\\\(/, /^\\\((.+?)\\\)/, false),
  ],
  renderer: {
    html: ({ text }) => escape(text), // what a model writes as HTML is shown, never obeyed
    image({ href, text }) {
      return `<span class="no-image">${escape(text || href)}</span>`
    },
    code({ text, lang }) {
      const name = (lang ?? '').trim().split(/\s+/)[0]!.toLowerCase().replace(/[^\w+#.-]/g, '')
      return `<pre data-lang="${name}"><code>${escape(text)}</code></pre>`
    },
    table({ header, rows }) {
      const cell = (tag: string, one: Tokens.TableCell) =>
        `<${tag}${tag === 'th' ? ' scope="col"' : ''}${one.align ? ` class="align-${one.align}"` : ''}>${this.parser.parseInline(one.tokens)}</${tag}>`
      const head = `<tr>${header.map((one) => cell('th', one)).join('')}</tr>`
      const body = rows.map((row) => `<tr>${row.map((one) => cell('td', one)).join('')}</tr>`).join('')
      return `<div class="table"><table><thead>${head}</thead><tbody>${body}</tbody></table></div>`
    },
    checkbox: ({ checked }) => (checked ? '☑ ' : '☐ '),
  },
})

const purify = DOMPurify(window)
purify.addHook('afterSanitizeAttributes', (node) => {
  if (node.tagName !== 'A') return
  node.setAttribute('target', '_blank')
  node.setAttribute('rel', 'noopener noreferrer')
})
const ALLOWED = {
  ALLOWED_TAGS: [
    'p', 'br', 'hr', 'h1', 'h2', 'h3', 'h4', 'h5', 'h6', 'strong', 'em', 'del', 'code', 'pre', 'blockquote', 'ul', 'ol', 'li', 'a',
    'table', 'thead', 'tbody', 'tr', 'th', 'td', 'span', 'div',
  ],
  ALLOWED_ATTR: ['href', 'class', 'start', 'scope', 'data-lang', 'data-display', 'title'],
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  ALLOW_ARIA_ATTR: false,
}

/** A text's top-level parts. While it streams, all but the last stay as they are, and so do their elements. */
export function blocks(text: string, streaming: boolean): { raw: string; token: Token }[] {
  return marked
    .lexer(streaming ? closed(text) : text)
    .filter((token) => token.type !== 'space' && token.type !== 'def')
    .map((token) => ({ raw: token.raw, token }))
}

export function html(token: Token): string {
  return purify.sanitize(marked.parser([token]), ALLOWED)
}

/** Formulas, then the colours of code, in elements that are clean. `settled` is false while the block is still being written. */
export async function enrich(root: HTMLElement, settled: boolean): Promise<void> {
  const formulas = [...root.querySelectorAll<HTMLElement>('.math:not([data-done])')]
  const codes = settled ? [...root.querySelectorAll<HTMLElement>('pre[data-lang]:not([data-done]) > code')] : []
  if (formulas.length) {
    const { renderMath } = await import('./math')
    formulas.forEach(renderMath)
  }
  for (const code of codes) {
    const pre = code.parentElement!
    pre.dataset.done = ''
    if (!pre.dataset.lang || (code.textContent?.length ?? 0) > 50_000) continue
    const { highlight } = await import('./highlight')
    const colours = highlight(code.textContent ?? '', pre.dataset.lang)
    if (colours !== null) code.innerHTML = purify.sanitize(colours, { ALLOWED_TAGS: ['span'], ALLOWED_ATTR: ['class'] })
  }
}
