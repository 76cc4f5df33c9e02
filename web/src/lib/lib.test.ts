import { describe, expect, test } from 'vitest'
import en from '../i18n/en.json'
import es from '../i18n/es.json'
import { join, split } from './attach'
import { closed } from './half'
import { makeParser, readEvents } from './sse'
import { childrenOf, choose, pathOf } from './tree'

describe('server-sent events', () => {
  const text = ': ping\r\n\r\nevent: delta\r\ndata: {"text": "añ"}\r\n\r\ndata: one\ndata: two\n\nevent: done\rdata: {}\r\r'
  const events = [
    { event: 'delta', data: '{"text": "añ"}' },
    { event: 'message', data: 'one\ntwo' },
    { event: 'done', data: '{}' },
  ]

  test('cut anywhere, the events are the same', () => {
    for (let at = 0; at <= text.length; at++) {
      const push = makeParser()
      const found = [...push(text.slice(0, at)), ...push(text.slice(at)), ...push('\n')]
      expect(found, `cut at ${at}`).toEqual(events)
    }
  })

  test('bytes are cut anywhere too, and a stream may end without an empty line', async () => {
    const bytes = new TextEncoder().encode('data: ñandú\n\ndata: last')
    for (let at = 0; at <= bytes.length; at++) {
      const body = new ReadableStream<Uint8Array>({
        start(controller) {
          controller.enqueue(bytes.slice(0, at))
          controller.enqueue(bytes.slice(at))
          controller.close()
        },
      })
      const found: string[] = []
      for await (const { data } of readEvents(body)) found.push(data)
      expect(found).toEqual(['ñandú', 'last'])
    }
  })
})

describe('the tree of messages', () => {
  const messages = [
    { id: 'a', parent: null },
    { id: 'b', parent: 'a' },
    { id: 'c', parent: 'b' },
    { id: 'b2', parent: 'a' },
    { id: 'c2', parent: 'b2' },
    { id: 'c3', parent: 'b2' },
    { id: 'z', parent: null },
  ]
  const line = (chosen: Map<string | null, string>) => pathOf(childrenOf(messages), chosen).map((one) => one.id)

  test('the newest branch is shown until another is chosen', () => {
    expect(line(new Map())).toEqual(['z'])
    expect(line(choose(messages, 'a', new Map()))).toEqual(['a', 'b2', 'c3'])
    expect(line(choose(messages, 'c', new Map()))).toEqual(['a', 'b', 'c'])
  })

  test('a choice deeper down is remembered', () => {
    const deep = choose(messages, 'c2', new Map())
    expect(line(choose(messages, 'c', deep))).toEqual(['a', 'b', 'c'])
    expect(line(choose(messages, 'b2', choose(messages, 'c', deep)))).toEqual(['a', 'b2', 'c2'])
  })
})

describe('attachments', () => {
  test.each([
    ['words', [{ name: 'a.txt', text: 'one\ntwo' }]],
    ['', [{ name: 'b.md', text: '```py\nx\n```\n\nand ```` too' }]],
    ['what?\n\n```\ncode\n```', [{ name: 'a', text: 'x' }, { name: 'b', text: '' }]],
    ['no files', []],
  ])('%j comes back as it was', (words, files) => {
    expect(split(join(words, files))).toEqual({ words, files })
  })

  test('a fence that never closes is text', () => {
    expect(split('```file: a\nx')).toEqual({ words: '```file: a\nx', files: [] })
  })
})

test.each([
  ['a **bold', 'a **bold**'],
  ['a **bold** b', 'a **bold** b'],
  ['a `code', 'a `code`'],
  ['a `x ** y` b', 'a `x ** y` b'],
  ['```\na **b', '```\na **b'],
  ['a *', 'a '],
])('half-written %j is shown as %j', (text, shown) => {
  expect(closed(text)).toBe(shown)
})

test('both languages say the same things, with the same values', () => {
  expect(Object.keys(es)).toEqual(Object.keys(en))
  const values = (text: string) => [...text.matchAll(/\{(\w+)\}/g)].map((match) => match[1]).sort()
  for (const key of Object.keys(en) as (keyof typeof en)[]) expect(values(es[key]), key).toEqual(values(en[key]))
})
