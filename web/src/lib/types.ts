// What the page's API sends and takes (criadero/serve/page_api.py).

export type Params = {
  temperature?: number
  top_p?: number
  top_k?: number
  min_p?: number
  repetition_penalty?: number
  presence_penalty?: number
  frequency_penalty?: number
  max_tokens?: number
  stop?: string[]
  seed?: number
}

/** What the passport of a model says; null where there is none. */
export type Made = { kind: string; base: string | null; tokens: number | null; sources: number; licence: string | null }

export type Model = {
  id: string
  kind: 'model' | 'adapter'
  base: string | null
  loaded: boolean
  context: number | null
  memory_bytes: number | null
  has_template: boolean
  tokens_per_s: number | null
  made_of: Made | null
}

export type Token = { text: string; logprob: number; top: [string, number][] }
export type Feedback = { rating: 1 | -1 | null; better: string | null }

export type Block = {
  context?: { limit: number; used: number; dropped_messages?: number; policy?: string }
  cached_tokens?: number
  queue_ms?: number
  ignored?: string[]
  guard?: { stopped: { copied_tokens: number; document: string; source: string; licence: string; asks: string }[] } | null
  receipt?: Record<string, unknown>
}

export type Message = {
  id: string
  parent: string | null
  role: 'user' | 'assistant' | 'system'
  content: string
  created: number | string
  model: string | null
  params: Params | null
  seed: number | null
  finish_reason: string | null
  usage: { prompt_tokens?: number; completion_tokens?: number } | null
  criadero: Block | null
  receipt_id: string | null
  tokens: Token[] | null
  feedback: Feedback | null
}

export type ChatRow = { id: string; title: string | null; model: string | null; updated: number | string }

export type Chat = {
  id: string
  title: string | null
  model: string | null
  system: string | null
  params: Params | null
  messages: Message[]
}

export type Me = { owner: string; key_required: boolean; version: string; feedback_consent: boolean }
export type Context = { limit: number; used: number; dropped: string[]; policy: string }
export type Side = 'left' | 'right'

export type Event =
  | { event: 'start'; message_id: string; seed: number; side?: Side }
  | { event: 'queue'; position: number; expected_s: number | null; side?: Side }
  | { event: 'delta'; text: string; tokens?: Token[] | null; side?: Side }
  | { event: 'done'; message: Message; side?: Side }
  | { event: 'error'; code: string; message: string; side?: Side }

export type Tally = {
  a: string
  b: string
  a_wins: number
  b_wins: number
  ties: number
  share: number | null // of the votes that were no ties
  low: number
  high: number
}

export type Place = { name: string; source: string; licence: string; url?: string; date?: string; attribution?: string }
export type Found = { document: Place; before: string; text: string; after: string }
export type Span = { from_char: number; to_char: number; text: string; count: number; found: Found[] }
export type Trace = { text: string; tokens: number; min_tokens: number; spans: Span[]; covered: Record<string, number> }
