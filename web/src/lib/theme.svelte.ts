import { keep, stored } from './i18n.svelte'

export type Theme = 'system' | 'light' | 'dark'
const THEME = 'criadero.theme'
const system = matchMedia('(prefers-color-scheme: dark)')
const kept = stored(THEME)

let choice = $state<Theme>(kept === 'light' || kept === 'dark' ? kept : 'system')

function apply(): void {
  document.documentElement.dataset.theme = choice === 'system' ? (system.matches ? 'dark' : 'light') : choice
}
apply()
system.addEventListener('change', apply)

export const theme = {
  get now(): Theme {
    return choice
  },
  next(): void {
    choice = choice === 'system' ? (system.matches ? 'light' : 'dark') : choice === 'light' ? 'dark' : 'light'
    keep(THEME, choice)
    apply()
  },
}
