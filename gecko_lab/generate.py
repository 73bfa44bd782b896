"""``python -m gecko_lab.generate RUN --prompt TEXT``: a trained model continues a text, printed as it is made."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeRemainingColumn

from .artifacts import add_device_argument, add_model_arguments, device_named, open_artifact
from .cli import guarded
from .errors import LabError
from .generation import TextStream, generate

TEXT = """Continue a prompt with a trained model. The text goes to standard output as it is made, all else to standard
error. A prompt may have any length: it is read in pieces, and memory does not grow with what was read."""
INTERRUPTED = 130
CONTROL = {code: "\ufffd" for code in [*range(32), *range(127, 160)] if chr(code) not in "\n\t"}


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    p = argparse.ArgumentParser(prog="python -m gecko_lab.generate", description=TEXT, allow_abbrev=False)
    add_model_arguments(p)
    prompt = p.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="text to continue (default: the start of a document)")
    prompt.add_argument("--prompt-file", type=Path, metavar="FILE", help="UTF-8 file to continue; - is standard input")
    p.add_argument("--length", type=int, default=256, metavar="N", help="tokens to make at most (default: 256)")
    p.add_argument(
        "--temperature", type=float, default=0.8, metavar="T", help="0: always the likeliest token (default: 0.8)"
    )
    p.add_argument("--top-k", type=int, default=0, metavar="K", help="choose among the K likeliest; 0: all (default)")
    p.add_argument("--seed", type=int, default=0, metavar="S", help="the same seed gives the same text (default: 0)")
    add_device_argument(p)
    return p


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 0, or 2 with a message about what to mend, or 130 when it was interrupted."""
    options = parser().parse_args(arguments)
    try:
        return guarded(lambda: _main(options))
    except KeyboardInterrupt:
        print(flush=True)
        return INTERRUPTED
    except BrokenPipeError:  # the reader has seen enough, as in "... | head"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _main(options: argparse.Namespace) -> int:
    for name, lowest in (("length", 0), ("temperature", 0), ("top_k", 0), ("seed", 0)):
        value = getattr(options, name)
        if not lowest <= value < float("inf"):
            raise LabError(f"--{name.replace('_', '-')} {value}: must be a number from {lowest} on")
    text = _prompt(options)
    device = device_named(options.device)
    artifact = open_artifact(options.model, options.checkpoint)
    tokenizer = artifact.tokenizer()
    err = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    for note in artifact.notes:
        err.print(f"note: {note}")
    err.print(f"model: {artifact.name}, on {device}")

    encoded = torch.from_numpy(tokenizer.encode(text).astype("int64"))
    prompt = torch.cat([torch.tensor([tokenizer.bos_id]), encoded])[None]
    model = artifact.model.to(device)
    stream, made, ended = TextStream(tokenizer), 0, False
    began = time.perf_counter()
    with _reading(err, prompt.shape[1]) as progress:
        tokens = generate(
            model,
            prompt,
            options.length,
            bos_id=tokenizer.bos_id,
            temperature=options.temperature,
            top_k=options.top_k,
            generator=torch.Generator(device).manual_seed(options.seed),
            vocab_size=tokenizer.vocab_size,
            progress=progress,
        )
        token = next(tokens, None)
    read = time.perf_counter() - began
    sys.stdout.write(text if len(text) <= 2000 else f"...{text[-200:]}")
    terminal = sys.stdout.isatty()  # a young model's escape characters must not run it
    began = time.perf_counter()
    while token is not None:
        made += 1
        ended = int(token) == tokenizer.bos_id
        if ended:
            break
        piece = stream.push(int(token))
        sys.stdout.write(piece.translate(CONTROL) if terminal else piece)
        sys.stdout.flush()
        token = next(tokens, None)
    sys.stdout.write(stream.end() + "\n")
    sys.stdout.flush()
    seconds = max(time.perf_counter() - began, 1e-9)
    end = " (the model ended the document)" if ended else ""
    err.print(f"read {prompt.shape[1]:,} tokens in {read:.2f} s, made {made:,}{end} at {made / seconds:,.0f} a second")
    return 0


def _prompt(options: argparse.Namespace) -> str:
    if options.prompt_file is None:
        return options.prompt or ""
    file = options.prompt_file
    try:
        data = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
        text = data.decode("utf-8")
    except OSError as error:
        raise LabError(f"--prompt-file {file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise LabError(f"--prompt-file {file}: not UTF-8 text (byte {error.start})") from None
    if "\0" in text:
        raise LabError(f"--prompt-file {file}: a binary file (it holds zero bytes), not text")
    if not text:
        raise LabError(f"--prompt-file {file}: empty; leave the option out to begin a document")
    return text


@contextlib.contextmanager
def _reading(console: Console, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar for a long prompt; short ones have none."""
    bar = Progress(
        TextColumn("reading the prompt"),
        *Progress.get_default_columns()[1:3],
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=total < 100_000 or not console.is_terminal,
    )
    task = bar.add_task("reading", total=total)
    with bar:
        yield lambda count: bar.advance(task, count)


if __name__ == "__main__":
    sys.exit(main())
