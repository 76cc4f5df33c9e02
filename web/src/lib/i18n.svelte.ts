// Words come from plain JSON catalogues; numbers and dates from Intl.
import en from '../i18n/en.json'
import es from '../i18n/es.json'

export type Key = keyof typeof en
export type Lang = 'en' | 'es'
const catalogues: Record<Lang, Record<string, string>> = { en, es }
const LANG = 'criadero.lang'

function first(): Lang {
  const kept = stored(LANG)
  if (kept === 'en' || kept === 'es') return kept
  return navigator.language.toLowerCase().startsWith('es') ? 'es' : 'en'
}

export function stored(key: string): string | null {
  try {
    return localStorage.getItem(key)
  } catch {
    return null // storage may be forbidden: then nothing is remembered
  }
}

export function keep(key: string, value: string | null): void {
  try {
    if (value === null) localStorage.removeItem(key)
    else localStorage.setItem(key, value)
  } catch {
    // as above
  }
}

let lang = $state<Lang>(first())
export const language = {
  get now(): Lang {
    return lang
  },
  set now(value: Lang) {
    lang = value
    keep(LANG, value)
  },
}

/** The words for a key, with `{name}` filled in. With `n`, the form that the language has for this number: `key.one`, `key.other`. */
export function t(key: Key | (string & {}), values: Record<string, string | number> = {}): string {
  const words = catalogues[lang]
  let form = words[key]
  if (typeof values.n === 'number') {
    form = words[`${key}.${new Intl.PluralRules(lang).select(values.n)}`] ?? words[`${key}.other`] ?? form
  }
  return (form ?? key).replace(/\{(\w+)\}/g, (whole, name: string) => {
    const value = values[name]
    return value === undefined ? whole : typeof value === 'number' ? number(value) : value
  })
}

export function number(value: number, digits = 0): string {
  return new Intl.NumberFormat(lang, { maximumFractionDigits: digits, minimumFractionDigits: 0 }).format(value)
}

export function percent(value: number, digits = 0): string {
  return new Intl.NumberFormat(lang, { style: 'percent', maximumFractionDigits: digits }).format(value)
}

export function bytes(value: number): string {
  const units = ['byte', 'kilobyte', 'megabyte', 'gigabyte']
  let i = 0
  while (value >= 1000 && i < units.length - 1) {
    value /= 1000
    i++
  }
  return new Intl.NumberFormat(lang, { style: 'unit', unit: units[i]!, maximumFractionDigits: value < 10 && i ? 1 : 0 }).format(value)
}

/** Unix seconds or an ISO string. */
export function dateOf(value: number | string): Date {
  return new Date(typeof value === 'number' ? value * 1000 : value)
}

export function timeText(value: number | string): string {
  return new Intl.DateTimeFormat(lang, { dateStyle: 'medium', timeStyle: 'short' }).format(dateOf(value))
}
