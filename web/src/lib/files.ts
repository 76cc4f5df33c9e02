// Text files that are attached to a question.
import type { Attachment } from './attach'
import { t } from './i18n.svelte'

export const MOST_BYTES = 200_000

/** The text of a file, or an error in words: too large, or not text. */
export async function readText(file: File): Promise<Attachment | string> {
  if (file.size > MOST_BYTES) return t('attach.large', { name: file.name, kb: Math.round(MOST_BYTES / 1000) })
  try {
    const text = new TextDecoder('utf-8', { fatal: true }).decode(await file.arrayBuffer())
    if (text.includes('\0')) return t('attach.binary', { name: file.name })
    return { name: file.name.replace(/[\n`]/g, ' '), text }
  } catch {
    return t('attach.binary', { name: file.name })
  }
}
