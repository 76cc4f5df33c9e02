// What a model is made of, in one line and in the reader's words.
import { t } from './i18n.svelte'
import type { Made } from './types'

export function madeOf(made: Made | null): string {
  if (!made) return t('made.unknown')
  const parts = [t(made.base ? `made.${made.kind}.from` : `made.${made.kind}`, { base: made.base ?? '' })]
  if (made.tokens !== null) parts.push(made.sources ? t('made.read.of', { tokens: made.tokens, n: made.sources }) : t('made.read', { tokens: made.tokens }))
  parts.push(made.licence ?? t('made.nolicence'))
  return parts.join(', ')
}
