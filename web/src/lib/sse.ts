// Server-sent events over fetch: EventSource can neither POST nor send a key.

/** Splits pieces of text, cut anywhere, into events; `push` gives those that have become whole. */
export function makeParser(): (piece: string) => { event: string; data: string }[] {
  let rest = ''
  return (piece) => {
    rest += piece
    // a lone CR at the end may be the first half of a CRLF: it waits for the next piece
    const held = rest.endsWith('\r') ? '\r' : ''
    const text = (held ? rest.slice(0, -1) : rest).replace(/\r\n?/g, '\n')
    const blocks = text.split('\n\n')
    rest = (blocks.pop() ?? '') + held
    return blocks.flatMap(parseBlock)
  }
}

function parseBlock(block: string): { event: string; data: string }[] {
  let event = 'message'
  const data: string[] = []
  for (const line of block.split('\n')) {
    if (line.startsWith(':')) continue // a ping
    const colon = line.indexOf(':')
    const field = colon < 0 ? line : line.slice(0, colon)
    const value = colon < 0 ? '' : line.slice(colon + 1).replace(/^ /, '')
    if (field === 'event') event = value
    else if (field === 'data') data.push(value)
  }
  return data.length ? [{ event, data: data.join('\n') }] : []
}

/** The events of a response, in order. Ends quietly when the stream does. */
export async function* readEvents(body: ReadableStream<Uint8Array>): AsyncGenerator<{ event: string; data: string }> {
  const reader = body.getReader()
  const decoder = new TextDecoder()
  const push = makeParser()
  try {
    for (;;) {
      const { done, value } = await reader.read()
      yield* push(done ? decoder.decode() + '\n\n' : decoder.decode(value, { stream: true }))
      if (done) return
    }
  } finally {
    void reader.cancel().catch(() => undefined) // the one who reads left: the server frees the slot
  }
}
