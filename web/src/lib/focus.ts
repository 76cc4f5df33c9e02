/** When what had the focus is gone, the keyboard goes on in the message field. A finger would only get its keyboard in the way. */
export function toComposer(): void {
  if (!matchMedia('(pointer: coarse)').matches) document.querySelector<HTMLElement>('.composer textarea')?.focus()
}
