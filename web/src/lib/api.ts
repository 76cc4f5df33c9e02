import { readEvents } from './sse'
import type { Chat, ChatRow, Context, Event, Me, Message, Model, Params, Side, Tally, Trace } from './types'

/** What the server said no with. `code` is stable; `message` is for people. */
export class Refused extends Error {
  constructor(
    readonly status: number,
    readonly code: string,
    message: string,
    readonly retryAfter: number | null = null,
  ) {
    super(message)
  }
}

const KEY = 'criadero.key'
let key: string | null = null
try {
  key = sessionStorage.getItem(KEY)
} catch {
  // storage may be forbidden: the key is then asked for again
}

export function setKey(value: string | null): void {
  key = value
  try {
    if (value === null) sessionStorage.removeItem(KEY)
    else sessionStorage.setItem(KEY, value)
  } catch {
    // as above
  }
}

async function send(method: string, path: string, body?: unknown, signal?: AbortSignal): Promise<Response> {
  const headers: Record<string, string> = {}
  if (key) headers.Authorization = `Bearer ${key}`
  if (body !== undefined) headers['Content-Type'] = 'application/json'
  let response: Response
  try {
    response = await fetch(path, {
      method, headers, signal: signal ?? null, credentials: 'same-origin', cache: 'no-store',
      body: body === undefined ? null : JSON.stringify(body),
    })
  } catch (error) {
    if (signal?.aborted) throw error
    throw new Refused(0, 'unreachable', '')
  }
  if (response.ok) return response
  const wait = Number(response.headers.get('Retry-After'))
  let code = `http_${response.status}`
  let message = response.statusText
  try {
    const { error } = await response.json()
    code = error?.code ?? error?.type ?? code
    message = error?.message ?? message
  } catch {
    // not ours: the status says it
  }
  throw new Refused(response.status, code, message, Number.isFinite(wait) && wait > 0 ? wait : null)
}

async function json<T>(method: string, path: string, body?: unknown, signal?: AbortSignal): Promise<T> {
  const response = await send(method, path, body, signal)
  const text = await response.text()
  return (text ? JSON.parse(text) : undefined) as T
}

async function* stream(path: string, body: unknown, signal: AbortSignal): AsyncGenerator<Event> {
  const response = await send('POST', path, body, signal)
  let ended = false
  for await (const { event, data } of readEvents(response.body!)) {
    if (data === '[DONE]') break
    const value = { ...JSON.parse(data), event } as Event
    if (event === 'done' || event === 'error') ended = true
    yield value
  }
  if (!ended) throw new Refused(0, 'cut_off', '')
}

const id = encodeURIComponent

export const api = {
  me: () => json<Me>('GET', 'api/me'),
  setConsent: (feedback_consent: boolean) => json<Me>('PUT', 'api/me', { feedback_consent }),
  models: () => json<{ models: Model[]; default: string }>('GET', 'api/models'),
  chats: (query: string, before: string | null, signal?: AbortSignal) => {
    const search = new URLSearchParams({ limit: '50' })
    if (query) search.set('query', query)
    if (before) search.set('before', before)
    return json<{ chats: ChatRow[]; next: string | null }>('GET', `api/chats?${search}`, undefined, signal)
  },
  create: (values: { model?: string; system?: string; params?: Params; title?: string }) => json<Chat>('POST', 'api/chats', values),
  chat: (chat: string) => json<Chat>('GET', `api/chats/${id(chat)}`),
  change: (chat: string, values: Partial<Pick<Chat, 'title' | 'model' | 'system' | 'params'>>) =>
    json<Chat>('PATCH', `api/chats/${id(chat)}`, values),
  remove: (chat: string) => json<void>('DELETE', `api/chats/${id(chat)}`),
  ask: (chat: string, parent: string | null, content: string) =>
    json<Message>('POST', `api/chats/${id(chat)}/messages`, { parent, content }),
  answer: (
    chat: string,
    body: { parent: string; model: string; params: Params; seed?: number; probabilities: boolean },
    signal: AbortSignal,
  ) => stream(`api/chats/${id(chat)}/answer`, body, signal),
  context: (chat: string, leaf: string, model: string, maxTokens: number | undefined, signal?: AbortSignal) => {
    const search = new URLSearchParams({ leaf, model })
    if (maxTokens) search.set('max_tokens', String(maxTokens))
    return json<Context>('GET', `api/chats/${id(chat)}/context?${search}`, undefined, signal)
  },
  feedback: (message: string, rating: 1 | -1 | null, better: string | null) =>
    json<Message>('PUT', `api/messages/${id(message)}/feedback`, { rating, better }),
  compare: (body: { chat_id: string; parent: string; models: [string, string]; params: Params; seed: number }) =>
    json<{ id: string }>('POST', 'api/comparisons', body),
  compareStream: (comparison: string, signal: AbortSignal) => stream(`api/comparisons/${id(comparison)}/stream`, {}, signal),
  vote: (comparison: string, winner: Side | 'tie') =>
    json<{ left: string; right: string; left_message?: string; right_message?: string }>(
      'POST', `api/comparisons/${id(comparison)}/vote`, { winner },
    ),
  tally: () => json<Tally[]>('GET', 'api/comparisons/tally'),
  trace: (model: string, message: string) => json<Trace>('POST', 'v1/trace', { model, message_id: message }),
  exportAll: async () => (await send('GET', 'api/export')).blob(),
  deleteEverything: () => json<Record<string, number | boolean>>('POST', 'api/delete-everything', { confirm: 'delete everything' }),
}
