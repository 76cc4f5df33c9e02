// What the page knows, and what can be done. The components only show it.
import { tick } from 'svelte'
import { api, Refused, setKey } from './api'
import { keep, stored, t } from './i18n.svelte'
import { childrenOf, choose, pathOf } from './tree'
import type { Chat, ChatRow, Context, Me, Message, Model, Params, Side } from './types'

export type View = { name: 'chat'; id: string | null } | { name: 'data' }
export type Fault = { code: string; message: string; retryAfter: number | null }

/** An answer while it is being written. */
export type Live = {
  parent: string
  model: string
  message: Message
  queue: { position: number; expected_s: number | null } | null
  fault: Fault | null
  done: boolean
}

/** Two models on one question and one seed. While it is blind, nobody here knows which is which. */
export type Duel = {
  id: string | null
  parent: string
  blind: boolean
  seed: number
  sides: Record<Side, Live>
  running: boolean
  revealed: { left: string; right: string; winner: Side | 'tie' | null } | null
}

const SETTINGS = 'criadero.settings'
type Settings = { params: Params; probabilities: boolean; enterSends: boolean; rival: string | null; blind: boolean }
const DEFAULTS: Settings = { params: {}, probabilities: false, enterSends: true, rival: null, blind: true }

export function faultOf(error: unknown): Fault {
  if (error instanceof Refused) return { code: error.code, message: error.message, retryAfter: error.retryAfter }
  return { code: 'page', message: error instanceof Error ? error.message : String(error), retryAfter: null }
}

export function faultText(fault: Fault): string {
  const own = `error.${fault.code}`
  const words = t(own)
  const text = words === own ? fault.message || t('error.other', { code: fault.code }) : words
  return fault.retryAfter ? `${text} ${t('error.retry', { n: fault.retryAfter })}` : text
}

function blank(parent: string, model: string): Message {
  return {
    id: `live-${model}-${Math.random()}`, parent, role: 'assistant', content: '', created: Date.now() / 1000, model, params: null, seed: null,
    finish_reason: null, usage: null, criadero: null, receipt_id: null, tokens: null, feedback: null,
  }
}

export function randomSeed(): number {
  return crypto.getRandomValues(new Uint32Array(1))[0]! >>> 1 // fits a signed 32-bit number
}

function load(): Settings {
  try {
    return { ...DEFAULTS, ...JSON.parse(stored(SETTINGS) ?? '{}') }
  } catch {
    return { ...DEFAULTS }
  }
}

class Page {
  me = $state<Me | null>(null)
  needsKey = $state(false)
  fault = $state<Fault | null>(null) // of the page as a whole
  models = $state<Model[]>([])
  chats = $state<ChatRow[]>([])
  next = $state<string | null>(null)
  query = $state('')
  view = $state<View>({ name: 'chat', id: null })

  chat = $state<Chat | null>(null)
  chosen = $state<Map<string | null, string>>(new Map())
  live = $state<Live | null>(null)
  duel = $state<Duel | null>(null)
  context = $state<Context | null>(null)
  said = $state('') // for screen readers
  comparing = $state(false)

  // of the next chat, until there is one
  model = $state('')
  system = $state('')
  settings = $state<Settings>(load())

  #stop: AbortController | null = null
  #asked = 0
  #usual = '' // the server's default model

  children = $derived(childrenOf(this.chat?.messages ?? []))
  path = $derived(pathOf(this.children, this.chosen))
  busy = $derived(this.live !== null && this.live.fault === null ? true : (this.duel?.running ?? false))
  current = $derived(this.models.find((one) => one.id === this.model) ?? null)
  dropped = $derived(new Set(this.context?.dropped ?? []))

  /** What was picked beside one default says nothing of a server that was started for another. */
  get #modelKey(): string {
    return `criadero.model.${this.#usual}`
  }

  /** What a first question waits for when it is quicker than the page. */
  starting: Promise<void> = Promise.resolve()

  start(): Promise<void> {
    this.starting = this.#start()
    return this.starting
  }

  async #start(): Promise<void> {
    this.fault = null
    try {
      this.me = await api.me()
      this.needsKey = false
      const [found] = await Promise.all([api.models(), this.refresh()])
      this.models = found.models
      this.#usual = found.default
      if (!this.models.some((one) => one.id === this.model)) {
        const kept = stored(this.#modelKey)
        this.model = this.models.find((one) => one.id === kept)?.id ?? this.#usual
      }
      await this.go()
    } catch (error) {
      if (error instanceof Refused && error.status === 401) {
        setKey(null)
        this.needsKey = true
      } else this.fault = faultOf(error)
    }
  }

  async unlock(key: string): Promise<boolean> {
    setKey(key)
    await this.start()
    return !this.needsKey
  }

  /** Follows the address: `#c/ID`, `#data`, or a new chat. An address never sends anything. */
  async go(): Promise<void> {
    const [name, id] = location.hash.replace(/^#\/?/, '').split('/')
    if (name === 'data') {
      this.view = { name: 'data' }
      return
    }
    const chat = name === 'c' && id ? decodeURIComponent(id) : null
    this.view = { name: 'chat', id: chat }
    if (chat === (this.chat?.id ?? null)) return
    this.stop()
    this.live = this.duel = this.context = null
    this.chosen = new Map()
    this.chat = null
    if (!chat) return
    try {
      const found = await api.chat(chat)
      if (this.view.name === 'chat' && this.view.id === chat) this.show(found)
    } catch (error) {
      this.fault = faultOf(error)
      if (error instanceof Refused && error.status === 404) this.open(null)
    }
  }

  open(id: string | null): void {
    const hash = id ? `#c/${encodeURIComponent(id)}` : '#'
    if (location.hash === hash || (!id && !location.hash)) void this.go()
    else location.hash = hash
  }

  show(chat: Chat): void {
    this.chat = chat
    if (chat.model && this.models.some((one) => one.id === chat.model)) this.model = chat.model
    this.system = chat.system ?? ''
    if (chat.params && Object.keys(chat.params).length) this.settings.params = { ...chat.params }
    void this.measure()
  }

  async refresh(): Promise<void> {
    const query = this.query
    const found = await api.chats(query, null)
    if (query !== this.query) return
    this.chats = found.chats
    this.next = found.next
    const row = found.chats.find((one) => one.id === this.chat?.id)
    if (row && this.chat) this.chat.title = row.title // the server names a chat by its first question
  }

  async more(): Promise<void> {
    if (!this.next) return
    const found = await api.chats(this.query, this.next)
    const known = new Set(this.chats.map((one) => one.id))
    this.chats = [...this.chats, ...found.chats.filter((one) => !known.has(one.id))]
    this.next = found.next
  }

  async rename(id: string, title: string): Promise<void> {
    await this.attempt(async () => {
      await api.change(id, { title })
      const row = this.chats.find((one) => one.id === id)
      if (row) row.title = title
      if (this.chat?.id === id) this.chat.title = title
    })
  }

  async remove(id: string): Promise<void> {
    await this.attempt(async () => {
      await api.remove(id)
      this.chats = this.chats.filter((one) => one.id !== id)
      if (this.chat?.id === id) this.open(null)
    })
  }

  async pickModel(id: string): Promise<void> {
    this.model = id
    keep(this.#modelKey, id)
    if (this.chat) await this.save({ model: id })
    void this.measure()
  }

  remember(): void {
    keep(SETTINGS, JSON.stringify(this.settings))
  }

  async save(values: Partial<Pick<Chat, 'model' | 'system' | 'params'>>): Promise<void> {
    const chat = this.chat
    if (!chat) return
    await this.attempt(async () => {
      await api.change(chat.id, values)
      Object.assign(chat, values)
    })
  }

  async attempt(action: () => Promise<void>): Promise<boolean> {
    try {
      await action()
      return true
    } catch (error) {
      this.fault = faultOf(error)
      return false
    }
  }

  params(): Params {
    return Object.fromEntries(Object.entries(this.settings.params).filter(([name, value]) => name !== 'seed' && value !== undefined && value !== null)) as Params
  }

  /** A question, and then its answer. `parent` says what it follows: an edited question follows what the old one did. */
  async send(content: string, parent: string | null): Promise<boolean> {
    if (this.busy || !content.trim()) return false
    this.live = null
    const sent = await this.attempt(async () => {
      if (!this.chat) {
        const chat = await api.create({ model: this.model, ...(this.system ? { system: this.system } : {}), params: this.params() })
        this.chat = { ...chat, messages: chat.messages ?? [] }
        this.view = { name: 'chat', id: chat.id }
        history.replaceState(null, '', `#c/${encodeURIComponent(chat.id)}`)
      }
      const question = await api.ask(this.chat.id, parent, content)
      this.add(question)
    })
    if (!sent) return false
    const question = this.path[this.path.length - 1]!
    void (this.comparing && this.rivals().length === 2 ? this.fight(question.id) : this.answer(question.id))
    void this.refresh().catch(() => undefined)
    return true
  }

  add(message: Message): void {
    if (!this.chat) return
    const at = this.chat.messages.findIndex((one) => one.id === message.id)
    if (at >= 0) this.chat.messages[at] = message
    else this.chat.messages.push(message)
    this.chosen = choose(this.chat.messages, message.id, this.chosen)
  }

  turnTo(id: string): void {
    if (!this.chat || this.busy) return
    this.live = this.duel = null
    this.chosen = choose(this.chat.messages, id, this.chosen)
    void this.measure()
  }

  async answer(parent: string): Promise<void> {
    if (!this.chat || this.busy) return
    this.duel = null
    const live: Live = { parent, model: this.model, message: blank(parent, this.model), queue: null, fault: null, done: false }
    this.live = live
    const stop = (this.#stop = new AbortController())
    await this.#follow(this.chat.id, this.live, this.settings.params.seed, stop)
    this.#stop = null
    const done = this.live
    if (!done || this.chat === null || done.parent !== parent) return
    if (done.fault) {
      this.said = faultText(done.fault)
      return
    }
    this.live = null
    this.add(done.message)
    this.said = `${t('said.answered')}: ${done.message.content.slice(0, 500)}`
    if (done.message.finish_reason === 'cancelled') await this.#reload()
    void this.measure()
  }

  /** The server kept what it had written when it was stopped: a word more or less than came here. */
  async #reload(): Promise<void> {
    const id = this.chat?.id
    if (!id) return
    await new Promise((done) => setTimeout(done, 250))
    try {
      const whole = await api.chat(id)
      if (this.chat?.id === id && !this.busy) this.chat = whole
    } catch {
      // what is on the screen stays
    }
  }

  /** Reads one answer into `live`. Stopping keeps what was there. */
  async #follow(chat: string, live: Live, seed: number | undefined, stop: AbortController): Promise<void> {
    const body = { parent: live.parent, model: live.model, params: this.params(), probabilities: this.settings.probabilities, ...(seed === undefined ? {} : { seed }) }
    try {
      for await (const event of api.answer(chat, body, stop.signal)) this.#take(live, event)
    } catch (error) {
      this.#ended(live, error, stop)
    }
  }

  #take(live: Live, event: import('./types').Event): void {
    if (event.event === 'start') {
      live.queue = null
      live.message.id = event.message_id
      live.message.seed = event.seed
    } else if (event.event === 'queue') live.queue = { position: event.position, expected_s: event.expected_s }
    else if (event.event === 'delta') {
      live.queue = null
      live.message.content += event.text
      if (event.tokens?.length) live.message.tokens = [...(live.message.tokens ?? []), ...event.tokens]
    } else if (event.event === 'done') {
      live.message = { ...event.message, model: event.message.model ?? live.model }
      live.done = true
    } else live.fault = { code: event.code, message: event.message, retryAfter: null }
  }

  #ended(live: Live, error: unknown, stop: AbortController): void {
    if (!stop.signal.aborted) live.fault = faultOf(error)
    else if (live.message.content) {
      live.message.finish_reason = 'cancelled'
      live.done = true
    } else live.fault = { code: 'stopped', message: '', retryAfter: null }
    live.queue = null
  }

  stop(): void {
    this.#stop?.abort()
    this.#stop = null
  }

  rivals(): string[] {
    const other = this.settings.rival
    return other && this.models.some((one) => one.id === other) && other !== this.model ? [this.model, other] : []
  }

  /** Two models answer the same question from the same seed. */
  async fight(parent: string): Promise<void> {
    const chat = this.chat
    const [a, b] = this.rivals() as [string, string]
    if (!chat || this.busy || !b) return
    this.live = null
    const seed = this.settings.params.seed ?? randomSeed()
    const blind = this.settings.blind
    const side = (model: string): Live => ({ parent, model, message: blank(parent, model), queue: null, fault: null, done: false })
    this.duel = {
      id: null, parent, blind, seed, running: true, revealed: blind ? null : { left: a, right: b, winner: null },
      sides: { left: side(blind ? '' : a), right: side(blind ? '' : b) },
    }
    const duel = this.duel
    const stop = (this.#stop = new AbortController())
    if (blind) {
      try {
        duel.id = (await api.compare({ chat_id: chat.id, parent, models: [a, b], params: this.params(), seed })).id
        for await (const event of api.compareStream(duel.id, stop.signal)) if (event.side) this.#take(duel.sides[event.side], event)
      } catch (error) {
        for (const one of Object.values(duel.sides)) if (!one.done && !one.fault) this.#ended(one, error, stop)
      }
    } else {
      await Promise.all(Object.values(duel.sides).map((one) => this.#follow(chat.id, one, seed, stop)))
    }
    this.#stop = null
    duel.running = false
    this.said = t('said.answered')
    if (!blind) for (const one of [duel.sides.right, duel.sides.left]) if (!one.fault) this.add(one.message)
  }

  async vote(winner: Side | 'tie'): Promise<void> {
    const duel = this.duel
    const chat = this.chat
    if (!duel || !chat || duel.running) return
    if (!duel.blind) {
      if (winner !== 'tie') this.turnTo(duel.sides[winner].message.id)
      return
    }
    if (!duel.id || duel.revealed) return
    await this.attempt(async () => {
      const found = await api.vote(duel.id!, winner)
      duel.revealed = { left: found.left, right: found.right, winner }
      const whole = await api.chat(chat.id)
      if (this.chat?.id !== chat.id) return
      this.chat = whole
      const best = winner === 'right' ? found.right_message : found.left_message
      if (best && whole.messages.some((one) => one.id === best)) this.chosen = choose(whole.messages, best, this.chosen)
      await tick()
    })
  }

  closeDuel(): void {
    this.duel = null
    void this.measure()
  }

  async rate(message: Message, rating: 1 | -1 | null, better: string | null): Promise<boolean> {
    return this.attempt(async () => {
      message.feedback = (await api.feedback(message.id, rating, better)).feedback
    })
  }

  async setConsent(value: boolean): Promise<boolean> {
    return this.attempt(async () => {
      this.me = { ...this.me!, ...(await api.setConsent(value)) }
    })
  }

  /** How much of the context the next question finds used, and which turns the model no longer sees. */
  async measure(): Promise<void> {
    const leaf = this.path[this.path.length - 1]
    const asked = ++this.#asked
    if (!this.chat || !leaf || !this.model) {
      this.context = null
      return
    }
    try {
      const found = await api.context(this.chat.id, leaf.id, this.model, this.settings.params.max_tokens)
      if (asked === this.#asked) this.context = found
    } catch {
      if (asked === this.#asked) this.context = null // the meter is then not shown: it never guesses
    }
  }
}

export const page = new Page()
