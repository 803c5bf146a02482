"""`python nbs/_site` writes the site to _docs/; `--serve` also shows it and follows edits."""

import argparse
import sys
from build import build
from serve import serve


def main():
    parser = argparse.ArgumentParser(prog='python nbs/_site', description=__doc__)
    parser.add_argument('--serve', action='store_true', help='show the site and keep it up to date')
    parser.add_argument('--port', type=int, default=8000, help='where it is shown: 8000')
    parser.add_argument('--host', default='127.0.0.1', help="this machine's name in the browser")
    args = parser.parse_args()
    return serve(args.port, args.host) if args.serve else build()


if __name__ == '__main__':
    sys.exit(main())
