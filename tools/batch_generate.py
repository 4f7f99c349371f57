"""Answer a file of requests with a file of rows: `jchameleon batch` from a checkout.

    .venv-test/bin/python tools/batch_generate.py -i requests.jsonl -o results.jsonl \\
        --adapter json=configs/demo/adapters/json

Options, formats and exit codes are those of `jchameleon batch` (docs/batch.md).
"""

import sys

from jchameleon.cli import main

if __name__ == "__main__":
    sys.exit(main(["batch", *sys.argv[1:]]))
