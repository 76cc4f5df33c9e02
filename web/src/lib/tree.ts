// The messages of a chat form a tree: an edit or another answer is a sibling of what it replaces.

export type Node = { id: string; parent: string | null }
export type Children<T> = Map<string | null, T[]>

export function childrenOf<T extends Node>(messages: T[]): Children<T> {
  const children: Children<T> = new Map()
  for (const message of messages) {
    const row = children.get(message.parent)
    if (row) row.push(message)
    else children.set(message.parent, [message])
  }
  return children
}

/** The line from the first message to a leaf. `chosen` names the child taken at a fork; else the newest one is. */
export function pathOf<T extends Node>(children: Children<T>, chosen: Map<string | null, string>): T[] {
  const path: T[] = []
  let at: string | null = null
  for (;;) {
    const row: T[] | undefined = children.get(at)
    if (!row?.length) return path
    const next: T = row.find((one) => one.id === chosen.get(at)) ?? row[row.length - 1]!
    path.push(next)
    at = next.id
  }
}

/** The choices that make the path run through a message. */
export function choose<T extends Node>(messages: T[], id: string, chosen: Map<string | null, string>): Map<string | null, string> {
  const byId = new Map(messages.map((one) => [one.id, one]))
  const next = new Map(chosen)
  for (let one = byId.get(id); one; one = one.parent === null ? undefined : byId.get(one.parent)) {
    next.set(one.parent, one.id)
  }
  return next
}
