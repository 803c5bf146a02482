"""The site while one writes: served from this machine, made again when a notebook is saved, shown anew by the browser."""

import sys, threading, time, traceback
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
        pass

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
        self.answer(
            page.replace(b'</body>', RELOAD.encode() + b'</body>'), 'text/html; charset=utf-8'
        )

    def answer(self, body, kind):
        self.send_response(200)
        for k, v in (
            ('Content-Type', kind),
            ('Content-Length', str(len(body))),
            ('Cache-Control', 'no-store'),
        ):
            self.send_header(k, v)
        self.end_headers()
        self.wfile.write(body)


def state() -> dict:
    "When each file that the site is made of was last written."
    files = [
        *(ROOT / 'nbs').rglob('*.ipynb'),
        *HERE.rglob('*.css'),
        *HERE.rglob('*.svg'),
        *(ROOT / 'runs').glob('*/*/result.json'),
    ]
    return {
        p: p.stat().st_mtime_ns for p in files if '.ipynb_checkpoints' not in p.parts and p.exists()
    }


def forget():
    "The package and nbdev's memory of it: they may have changed since. torch stays, which is what makes the next build quick."
    from nbdev import doclinks

    for name in [m for m in sys.modules if m.split('.')[0] == 'fewshotmeta']:
        del sys.modules[name]
    for f in (doclinks._build_lookup_table, doclinks._get_exps):
        f.cache_clear()


def once():
    "One build in this process; a notebook that does not go through is reported, and the last good site stays."
    try:
        build(n_workers=0)
    except BaseException as e:
        if isinstance(e, KeyboardInterrupt):
            raise
        traceback.print_exc(limit=0)
    Handler.made = str(time.time())


def serve(port: int, every=0.3):
    "Build, show, watch, until Ctrl-C."
    import torch

    def program():
        return {p: p.stat().st_mtime_ns for p in HERE.glob('*.py')}

    seen, begun = state(), program()
    once()
    server = ThreadingHTTPServer(('127.0.0.1', port), partial(Handler, directory=str(DOCS)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(
        f'http://localhost:{server.server_port}/ shows the site and follows the notebooks; Ctrl-C ends it',
        flush=True,
    )
    try:
        while True:
            time.sleep(every)
            if program() != begun:
                sys.exit('the program that makes the site has changed: start it again')
            if (now := state()) != seen:
                seen = now
                forget()
                once()
    except KeyboardInterrupt:
        sys.exit(0)
