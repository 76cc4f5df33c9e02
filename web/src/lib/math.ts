// Loaded with the first formula.
import katex from 'katex'
import 'katex/dist/katex.css'

/** KaTeX builds elements and sets their styles through the DOM: nothing inline that the security policy would have to allow. */
export function renderMath(element: HTMLElement): void {
  const tex = element.textContent ?? ''
  element.dataset.done = ''
  try {
    katex.render(tex, element, {
      displayMode: element.dataset.display === 'true',
      throwOnError: true,
      trust: false, // no links, no images, no classes from a formula
      strict: 'ignore',
      maxExpand: 500,
      maxSize: 20,
    })
  } catch {
    element.textContent = tex // not a formula after all: its text
    element.classList.add('math-raw')
  }
}
