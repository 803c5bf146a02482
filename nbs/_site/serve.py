"""The site while one writes: served from here, made again when a notebook is saved, shown anew."""

import contextlib
import io
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
import urllib.parse
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from build import DOCS, HERE, ROOT, build

# asks every half second whether there is something newer; only pages served from here carry it
RELOAD = b'''{let seen; setInterval(async () => { try {
  const now = await (await fetch("/__made")).text();
  if (seen && now !== seen) location.reload();
  seen = now; } catch {} }, 500)}'''
SCRIPT = b'<script src="/__reload.js"></script>'
ENDING = {signal.SIGINT, signal.SIGTERM}  # a user's wish that all ends
HOSTS = {'localhost', '127.0.0.1', '[::1]'}  # what a browser on this machine may call it


class Handler(SimpleHTTPRequestHandler):
    """Files of _docs; pages with a few lines that reload them.

    It answers whoever asks for it by its own name: a page elsewhere whose name was led to this
    machine bears another one.
    """

    made = '0'
    hosts = HOSTS

    def log_message(self, *args):
        "Stay silent."

    def parse_request(self):
        "Read a request, and refuse one that names another host."
        if not super().parse_request():
            return False
        named = self.headers.get_all('Host', [])
        port = self.server.server_port
        known = {f'{host}:{port}' for host in self.hosts} | (self.hosts if port == 80 else set())
        if len(named) == 1 and named[0].strip().lower() in known:
            return True
        self.send_error(400, 'Not the name of this server')
        return False

    def file(self) -> Path | None:
        "Find the file that is asked for: in the folder, and not by a link that leaves it."
        asked = urllib.parse.urlsplit(self.path).path
        name = urllib.parse.unquote(asked, errors='strict')
        if name.endswith('/'):
            name += 'index.html'
        parts = name.split('/')
        if '\0' in name or '\\' in name or '..' in parts:
            raise ValueError(name)
        folder = Path(self.directory).resolve()
        found = folder.joinpath(*filter(None, parts)).resolve()
        return found if found.is_file() and found.is_relative_to(folder) else None

    def send_head(self):
        "Answer GET and HEAD. A path that is none is a bad request, and folders are not listed."
        if self.path == '/__made':
            return self.answer(Handler.made.encode(), 'text/plain')
        if self.path == '/__reload.js':
            return self.answer(RELOAD, 'text/javascript')
        try:
            found = self.file()
            body = found.read_bytes() if found else None
        except ValueError:
            return self.send_error(400)
        except OSError:  # a name too long, a file that may not be read
            body = None
        if body is None:
            return self.send_error(404)
        kind = self.guess_type(str(found))
        if kind == 'text/html':
            body, kind = body.replace(b'</body>', SCRIPT + b'</body>'), f'{kind}; charset=utf-8'
        return self.answer(body, kind)

    def answer(self, body: bytes, kind: str):
        "Give a body that no browser keeps."
        self.send_response(200)
        self.send_header('Content-Type', kind)
        self.send_header('Content-Length', str(len(body)))
        self.send_header('Cache-Control', 'no-store')
        self.send_header('X-Content-Type-Options', 'nosniff')
        self.end_headers()
        return io.BytesIO(body)

    def copyfile(self, source, outputfile):
        "Send a body to whoever is still there."
        try:
            super().copyfile(source, outputfile)
        except ConnectionError:
            self.close_connection = True


def server_of(folder: Path, host: str, port: int) -> ThreadingHTTPServer:
    "Open a server of a folder that answers to a host's name, beside those of this machine."
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    name = f'[{host}]' if ':' in host else host.lower()
    kind = type('Answering', (Handler,), dict(hosts=HOSTS | {name}))
    Server = type('Server', (ThreadingHTTPServer,), dict(address_family=family))
    return Server(address[:2], partial(kind, directory=str(folder)))


def saved(files) -> dict:
    "Say when each file was last written."
    there = (p for p in files if '.ipynb_checkpoints' not in p.parts and p.exists())
    return {path: path.stat().st_mtime_ns for path in there}


def state() -> dict:
    "Say when each file that the site is made of was last written."
    results = (ROOT / 'runs').glob('*/*/result.json')
    notebooks = (ROOT / 'nbs').rglob('*.ipynb')
    return saved([*notebooks, *HERE.glob('static/*.*'), *results])


def attempt():
    "Build; where a notebook does not go through, say so and keep the last site."
    try:
        build(n_workers=0)
    except BaseException:
        traceback.print_exc(limit=0)


class Builder:
    """Builds in a process of its own, which reads the package anew, and ends all that it starts.

    The build and Sphinx's own processes are a group. It is ended as a whole: Sphinx's, alone, would
    wait for ever for somebody who reads what they write.
    """

    process = None

    def run(self):
        "Build once."
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
        self.process = multiprocessing.get_context('fork').Process(target=self.inside)
        self.process.start()
        with contextlib.suppress(OSError):  # it may have done this itself, or be through
            os.setpgid(self.process.pid, self.process.pid)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
        self.process.join()
        Handler.made = str(time.time())

    def inside(self):
        "What the process does."
        os.setpgid(0, 0)
        for asked in ENDING:
            signal.signal(asked, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
        attempt()

    def end(self, *_):
        "End the build, if there is one, and this process."
        if self.process and self.process.is_alive():
            with contextlib.suppress(OSError):  # it has ended since
                os.killpg(self.process.pid, signal.SIGKILL)
        sys.stdout.flush()
        os._exit(0)


def serve(port: int, host: str = '127.0.0.1', every: float = 0.3):
    "Build, show, watch, until Ctrl-C or SIGTERM, which ends what builds at that moment, too."
    import nbdev.doclinks  # noqa: F401  what takes long to load is loaded once for all builds
    import sphinx.application  # noqa: F401
    import torch  # noqa: F401

    builder = Builder()
    for asked in ENDING:
        signal.signal(asked, builder.end)
    seen, program = state(), saved(HERE.glob('*.py'))
    builder.run()
    server = server_of(DOCS, host, port)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    name = {'127.0.0.1': 'localhost', '::1': '[::1]'}.get(host, host)
    address = f'http://{name}:{server.server_port}/'
    print(f'{address} shows the site and follows the notebooks; Ctrl-C ends it', flush=True)
    while True:
        time.sleep(every)
        if saved(HERE.glob('*.py')) != program:
            sys.exit('the program that makes the site has changed: start it again')
        if (now := state()) != seen:
            seen = now
            builder.run()
