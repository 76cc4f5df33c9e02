import { readFileSync } from 'node:fs'
import { svelte } from '@sveltejs/vite-plugin-svelte'
import { defineConfig, type Plugin } from 'vite'

// What is inside the built files, and must be named beside them.
const INSIDE = ['svelte', 'marked', 'dompurify', 'katex', 'highlight.js', '@fontsource-variable/atkinson-hyperlegible-next']

/** KaTeX's fonts in one format only: every browser that runs this page reads woff2. */
const woff2Only: Plugin = {
  name: 'woff2-only',
  enforce: 'pre',
  transform(code, id) {
    if (!id.includes('katex') || !id.endsWith('.css')) return
    return code.replace(/,\s*url\([^)]*\.(?:woff|ttf)\)\s*format\(["'](?:woff|truetype)["']\)/g, '')
  },
}

const licences: Plugin = {
  name: 'licences',
  generateBundle() {
    const parts = INSIDE.map((name) => {
      const folder = new URL(`./node_modules/${name}/`, import.meta.url)
      const { version, license } = JSON.parse(readFileSync(new URL('package.json', folder), 'utf8'))
      const file = name === 'svelte' ? 'LICENSE.md' : 'LICENSE'
      return `${name} ${version} (${license})\n\n${readFileSync(new URL(file, folder), 'utf8').trim()}\n`
    })
    this.emitFile({ type: 'asset', fileName: 'licences.txt', source: parts.join(`\n${'-'.repeat(80)}\n\n`) })
  },
}

export default defineConfig({
  base: './',
  plugins: [woff2Only, svelte(), licences],
  build: {
    outDir: '../criadero/serve/static',
    emptyOutDir: true,
    assetsInlineLimit: 0, // a data: address would need a looser content security policy
    modulePreload: { polyfill: false },
    target: 'es2023',
    sourcemap: false,
    reportCompressedSize: false,
  },
  // `python tests/page_server.py` or `criadero serve --port 8437` behind the development server
  server: { proxy: { '/api': 'http://127.0.0.1:8437', '/v1': 'http://127.0.0.1:8437' } },
})
