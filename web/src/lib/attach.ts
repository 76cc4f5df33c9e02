// Attachments become part of the question, where the model and the reader both see them.

export type Attachment = { name: string; text: string }

function fenceFor(text: string): string {
  const longest = Math.max(2, ...(text.match(/`+/g) ?? []).map((run) => run.length))
  return '`'.repeat(longest + 1)
}

/** The question as it is sent: each file in a fence that says its name, then the words. */
export function join(words: string, files: Attachment[]): string {
  const parts = files.map(({ name, text }) => {
    const fence = fenceFor(text)
    return `${fence}file: ${name}\n${text.replace(/\n$/, '')}\n${fence}`
  })
  return [...parts, words].filter(Boolean).join('\n\n')
}

/** The reverse of `join`, for showing a question. */
export function split(content: string): { words: string; files: Attachment[] } {
  const files: Attachment[] = []
  let rest = content
  for (;;) {
    const match = /^(`{3,})file: ([^\n]*)\n/.exec(rest)
    if (!match) break
    const close = rest.indexOf(`\n${match[1]}`, match[0].length - 1)
    if (close < 0) break
    files.push({ name: match[2]!, text: rest.slice(match[0].length, Math.max(close, match[0].length)) })
    rest = rest.slice(close + 1 + match[1]!.length).replace(/^\n+/, '')
  }
  return { words: rest, files }
}
