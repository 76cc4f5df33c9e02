/** Closes what a half-written last line has open, so that no stray stars flash by. */
export function closed(text: string): string {
  const start = text.lastIndexOf('\n') + 1
  const fences = text.match(/^ {0,3}```/gm)?.length ?? 0
  if (fences % 2) return text // inside code, everything is text
  let line = text.slice(start)
  const count = (mark: RegExp) => line.match(mark)?.length ?? 0
  if (count(/(?<!`)`(?!`)/g) % 2) return `${text}\``
  line = line.replace(/`[^`]*`/g, '')
  if (/\*{1,2}$/.test(line)) return text.replace(/\*{1,2}$/, count(/\*\*/g) % 2 === 0 && line.endsWith('**') ? '**' : '')
  return count(/\*\*/g) % 2 ? `${text}**` : text
}
