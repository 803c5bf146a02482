"""The site while one writes: served from here, made again when a notebook is saved, shown anew."""

import sys
import threading
import time
import traceback
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from build import DOCS, HERE, ROOT, build

# asks every half second whether there is something newer; only pages served from here carry it
RELOAD = '''<script>{let seen; setInterval(async () => { try {
  const now = await (await fetch("/__made")).text();
  if (seen && now !== seen) location.reload();
  seen = now; } catch {} }, 500)}</script>'''


class Handler(SimpleHTTPRequestHandler):
    "Files of _docs; pages with a few lines that reload them."

    made = '0'

    def log_message(self, *args):
        "Stay silent."

    def do_GET(self):
        if self.path == '/__made':
            return self.answer(Handler.made.encode(), 'text/plain')
        path = self.translate_path(self.path)
        path += 'index.html' if path.endswith('/') else ''
        if not path.endswith('.html'):
            return super().do_GET()
        try:
            with open(path, 'rb') as f:
                page = f.read()
        except OSError:
            return self.send_error(404)
        page = page.replace(b'</body>', RELOAD.encode() + b'</body>')
        self.answer(page, 'text/html; charset=utf-8')

    def answer(self, body: bytes, kind: str):
        "Send a body that no browser keeps."
        self.send_response(200)
        self.send_header('Content-Type', kind)
        self.send_header('Content-Length', str(len(body)))
        self.send_header('Cache-Control', 'no-store')
        self.end_headers()
        self.wfile.write(body)


def saved(files) -> dict:
    "Say when each file was last written."
    there = (p for p in files if '.ipynb_checkpoints' not in p.parts and p.exists())
    return {path: path.stat().st_mtime_ns for path in there}


def state() -> dict:
    "Say when each file that the site is made of was last written."
    results = (ROOT / 'runs').glob('*/*/result.json')
    notebooks = (ROOT / 'nbs').rglob('*.ipynb')
    return saved([*notebooks, *HERE.rglob('*.css'), *HERE.rglob('*.svg'), *results])


def forget():
    """Forget the package and nbdev's memory of it: they may have changed since.

    torch stays, which is what makes the next build quick.
    """
    from nbdev import doclinks

    for name in list(sys.modules):
        if name.split('.')[0] == 'fewshotmeta':
            del sys.modules[name]
    for remembered in (doclinks._build_lookup_table, doclinks._get_exps):
        remembered.cache_clear()


def once():
    "Build in this process; where a notebook does not go through, say so and keep the last site."
    try:
        build(n_workers=0)
    except KeyboardInterrupt:
        raise
    except BaseException:
        traceback.print_exc(limit=0)
    Handler.made = str(time.time())


def serve(port: int, every: float = 0.3):
    "Build, show, watch, until Ctrl-C."
    import torch  # noqa: F401  once for all builds

    seen, program = state(), saved(HERE.glob('*.py'))
    once()
    server = ThreadingHTTPServer(('127.0.0.1', port), partial(Handler, directory=str(DOCS)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f'http://localhost:{server.server_port}/'
    print(f'{address} shows the site and follows the notebooks; Ctrl-C ends it', flush=True)
    try:
        while True:
            time.sleep(every)
            if saved(HERE.glob('*.py')) != program:
                sys.exit('the program that makes the site has changed: start it again')
            if (now := state()) != seen:
                seen = now
                forget()
                once()
    except KeyboardInterrupt:
        sys.exit(0)
