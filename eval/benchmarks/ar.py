"""Time per token of the autoregressive prior, with and without its key-value cache.

    python -m cascade.eval.benchmarks.ar [--width 512 --layers 8]

The time of a token is the minimum over all rounds; those of the first and last tokens are medians
over several tokens. Both reduce the influence of other processes. Without the cache, each token
requires a forward pass over all previous tokens.
"""

import argparse

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from cascade.conditioning import Cond
from cascade.eval.benchmarks.clock import wall
from cascade.nets.ar import TokenTransformer

FEW = 16  # tokens of a median


@torch.inference_mode()
def cached(net: TokenTransformer, cond: Cond, tokens: Tensor) -> Tensor:
    """Seconds for the prefix, and for each token after it."""
    now = wall(cond.tokens.device)
    times = [now()]
    _, cache = net.prefill(cond)
    times.append(now())
    for token in tokens.unbind(1)[:-1]:
        net.step(token, cache)
        times.append(now())
    return torch.tensor(times, dtype=torch.float64).diff()


@torch.inference_mode()
def uncached(net: TokenTransformer, cond: Cond, tokens: Tensor) -> float:
    """Seconds for the last token, by a forward pass over the whole sequence."""
    now = wall(cond.tokens.device)
    start = now()
    net(tokens, cond)
    return now() - start


def main() -> None:
    parser = argparse.ArgumentParser(description="Milliseconds per token of the AR prior.")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--components", type=int, default=319)
    parser.add_argument("--buckets", type=int, default=1024)
    parser.add_argument("--context", type=int, default=256, help="tokens of the text (256)")
    parser.add_argument("--batch", type=int, default=2, help="sequences; 2 for a guided sample (2)")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with device:
        net = TokenTransformer(
            args.components, args.buckets, args.width, args.layers, args.heads, args.context
        ).eval()
        prefix = torch.randn(args.batch, args.context + 1, args.width)
        cond = Cond(None, prefix, torch.ones(prefix.shape[:2], dtype=torch.bool), after_text=1)
        tokens = torch.randint(args.buckets, (args.batch, 1 + args.components))
    seconds = torch.stack([cached(net, cond, tokens) for _ in range(args.rounds)]).amin(0)
    without = min(uncached(net, cond, tokens) for _ in range(args.rounds))
    few = min(FEW, args.components // 2)
    first, last = seconds[1 : 1 + few].median(), seconds[-few:].median()
    count = sum(p.numel() for p in net.parameters())
    title = (
        f"{count / 1e6:.0f} M parameters, batch {args.batch}, {tokens.shape[1]} tokens, {device}"
    )
    table = Table("", "ms", "of the first", title=title)
    table.add_row("prefix", f"{1e3 * seconds[0]:.2f}", "")
    table.add_row("first token", f"{1e3 * first:.2f}", "1.00")
    table.add_row("last token", f"{1e3 * last:.2f}", f"{last / first:.2f}")
    table.add_row("last token without cache", f"{1e3 * without:.2f}", f"{without / first:.1f}")
    table.add_row("all", f"{1e3 * seconds.sum():.0f}", "")
    Console().print(table)


if __name__ == "__main__":
    main()
