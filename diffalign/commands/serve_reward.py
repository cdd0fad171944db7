"""Serve one reward over HTTP, for the `remote` reward of a run elsewhere."""

from __future__ import annotations

import argparse
import sys

from diffalign import reward_entries
from diffalign.commands import _common
from diffalign.types import UserError

TOKEN = "DIFFALIGN_REWARD_TOKEN"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--reward",
        required=True,
        metavar="NAME[:OPTION=VALUE,...]",
        help="one reward, such as pickscore:model=tiny-clip, or in YAML, such as '{name: pickscore, model: tiny-clip}'",
    )
    parser.add_argument("--port", type=int, default=8600, metavar="N", help="default 8600; 0 takes a free one")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help=f"default 127.0.0.1: this machine only; for others, ask for a token by setting {TOKEN}",
    )
    parser.add_argument("--device", help="such as cpu or cuda:1; by default the GPU when there is one")
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="images scored at once (default 16)")
    parser.add_argument("--megabytes", type=int, default=256, metavar="N", help="largest request (default 256)")


def run(args: argparse.Namespace) -> None:
    for name in ("batch", "megabytes"):
        if getattr(args, name) < 1:
            raise UserError(f"serve-reward: --{name} must be at least 1, got {getattr(args, name)}")
    wanted = reward_entries.parse_fixed([args.reward])
    if len(wanted) != 1:
        raise UserError(f"a server has one reward, got {', '.join(r.key for r in wanted)}; start one server for each")
    _common.quiet()
    from diffalign import rewards
    from diffalign.devices import choose
    from diffalign.reward_server import RewardServer
    from diffalign.rewards._server import own, secret

    token = secret(TOKEN)
    scorers = rewards.build(wanted, choose(args.device))
    (scorer,) = scorers.values()
    with RewardServer(scorer, args.host, args.port, args.batch, args.megabytes << 20, token) as server:
        host, port = server.socket.getsockname()[:2]
        if not own(host):
            guard = "with the token, which travels unencrypted" if token else f"; set {TOKEN} to ask for a token"
            print(f"warning: whoever reaches {host} can use this server {guard}", file=sys.stderr)
        shown = f"[{host}]" if ":" in host else host
        print(f"'{scorer.reward.key}' is served at http://{shown}:{port} (Ctrl-C stops it)", flush=True)
        server.serve_forever()
