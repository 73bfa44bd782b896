"""``python -m gecko_lab.generate RUN --prompt TEXT``: a trained model continues a text, printed as it is made."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

from rich.console import Console

from .artifacts import add_device_argument, add_model_arguments, device_named, open_artifact
from .cli import guarded
from .errors import LabError
from .generation import PIECE, Sampling, Session, StopText, answers
from .generation.sampling import RULES
from .generation.session_file import check_target
from .generation.terminal import clean, reading
from .kernels import backend

TEXT = """Continue a prompt with a trained model. The text goes to standard output as it is made, all else to standard
error. A prompt may have any length: it is read in pieces, and memory does not grow with what was read.

Several prompts are continued side by side, each as it would be alone. --save-session keeps the state after a long
document in a small file, from which --session asks any number of questions. --interactive is a conversation with it."""
INTERRUPTED = 130
CPU_PIECE = 1024  # tokens read between two looks at the progress bar and at Ctrl-C


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    p = argparse.ArgumentParser(
        prog="python -m gecko_lab.generate",
        description=TEXT,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(p)
    text = p.add_argument_group("what is read")
    text.add_argument(
        "--prompt", action="append", metavar="TEXT", help="text to continue; may be repeated (default: a new document)"
    )
    text.add_argument(
        "--prompt-file", action="append", type=Path, metavar="FILE", help="UTF-8 file; may be repeated; - is stdin"
    )
    text.add_argument("--session", type=Path, metavar="FILE", help="start from a saved session, not a new document")
    text.add_argument("--save-session", type=Path, metavar="FILE", help="save the state once the prompt is read")
    text.add_argument("--interactive", action="store_true", help="then read lines and answer them; /help says more")
    choice = p.add_argument_group("how a token is chosen")
    choice.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0: the likeliest (default: 0.8)")
    choice.add_argument("--top-k", type=int, default=0, metavar="K", help="of the K likeliest; 0: of all (default)")
    choice.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="of the fewest that have probability P (default: 1, all)"
    )
    choice.add_argument(
        "--min-p", type=float, default=0.0, metavar="P", help="of those P times as likely as the likeliest (default: 0)"
    )
    choice.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="R", help="above 1: tokens seen before are rarer"
    )
    choice.add_argument(
        "--seed", type=int, default=0, metavar="S", help="the same seed, the same text; prompt i has S + i (default: 0)"
    )
    end = p.add_argument_group("when it ends")
    end.add_argument("--length", type=int, default=256, metavar="N", help="tokens to make at most (default: 256)")
    end.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; \\n is a line end"
    )
    p.add_argument("--batch-size", type=int, default=16, metavar="B", help="prompts side by side (default: 16)")
    p.add_argument("--jsonl", action="store_true", help="print a line of JSON for each prompt instead of the text")
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
    sampling, stop = _sampling(options), [text.replace("\\n", "\n").replace("\\t", "\t") for text in options.stop]
    StopText(stop)
    prompts = _prompts(options)
    if options.save_session is not None:
        check_target(options.save_session)
    device = device_named(options.device)
    artifact = open_artifact(options.model, options.checkpoint)
    tokenizer = artifact.tokenizer()
    backend.set_mode(artifact.training.kernels if artifact.training else "auto")
    err = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    for note in artifact.notes:
        err.print(f"note: {note}")
    err.print(f"model: {artifact.name}, on {device}")
    model = artifact.model.to(device)
    piece = PIECE if device.type == "cuda" else CPU_PIECE
    if options.session is None:
        session = Session(model, tokenizer, piece=piece)
    else:
        session = Session.load(options.session, model, tokenizer, piece=piece)
        err.print(f"session: {options.session}, {session.length:,} tokens read")
    if len(prompts) > 1:
        return _several(session, prompts, sampling, stop, options, err)
    text = prompts[0] if prompts else ""
    began, before = time.perf_counter(), session.length
    tokens = session.encode(text)
    with reading(err, len(tokens)) as progress:
        if len(tokens):
            session.read(tokens, progress)
        elif not session.length:
            session.read([tokenizer.bos_id])
    session.mark()  # waits for the device
    read = time.perf_counter() - began
    if options.save_session is not None:
        session.save(options.save_session)
        size = options.save_session.stat().st_size
        err.print(f"saved: {options.save_session}, {session.length:,} tokens read, {size / 1e6:,.1f} MB")
    if options.interactive:
        from .generation.interactive import Conversation

        err.print(f"read {session.length - before:,} tokens in {read:.2f} s; /help lists the commands")
        return Conversation(session, sampling, options.length, stop, err).run()
    read_tokens, made_before = session.length - before, session.length
    if not options.jsonl:
        sys.stdout.write(clean(text if len(text) <= 2000 else f"...{text[-200:]}"))
    began, answer = time.perf_counter(), ""
    for part in session.generate(options.length, sampling, stop):
        answer += part
        if not options.jsonl:
            sys.stdout.write(clean(part))
            sys.stdout.flush()
    seconds = max(time.perf_counter() - began, 1e-9)
    made, finish = session.length - made_before, session.finish or "length"
    if options.jsonl:
        sys.stdout.write(_line(0, text, answer, made, finish, sampling.seed))
    else:
        sys.stdout.write("\n")
    sys.stdout.flush()
    end = {"document": " (the model ended the document)", "stop": " (a stop string)"}.get(finish, "")
    err.print(f"read {read_tokens:,} tokens in {read:.2f} s, made {made:,}{end} at {made / seconds:,.0f} a second")
    return 0


def _several(session: Session, prompts: list[str], sampling: Sampling, stop: list[str], options: argparse.Namespace,
             err: Console) -> int:
    assert session.tokenizer is not None
    total = sum(len(session.encode(prompt)) + 1 for prompt in prompts)
    began, made = time.perf_counter(), 0
    start = session.mark() if session.length else None
    with reading(err, total) as progress:
        for answer in answers(
            session.model, session.tokenizer, prompts, options.length, sampling=sampling, stop=stop, start=start,
            rows=options.batch_size, progress=progress,
        ):  # fmt: skip
            made += len(answer.tokens)
            index, prompt = answer.prompt, prompts[answer.prompt]
            if options.jsonl:
                seed = sampling.seed + index
                sys.stdout.write(_line(index, prompt, answer.text, len(answer.tokens), answer.finish, seed))
            else:
                shown = prompt if len(prompt) <= 2000 else f"...{prompt[-200:]}"
                sys.stdout.write(f"--- {index + 1} of {len(prompts)}\n{clean(shown + answer.text)}\n")
            sys.stdout.flush()
    seconds = max(time.perf_counter() - began, 1e-9)
    err.print(f"{len(prompts):,} prompts, made {made:,} tokens, {made / seconds:,.0f} a second with the reading")
    return 0


def _line(index: int, prompt: str, text: str, tokens: int, finish: str, seed: int) -> str:
    prompt = prompt if len(prompt) <= 2000 else f"...{prompt[-200:]}"
    facts = {"index": index, "prompt": prompt, "text": text, "tokens": tokens, "finish": finish, "seed": seed}
    return json.dumps(facts) + "\n"


def _sampling(options: argparse.Namespace) -> Sampling:
    for name, lowest in (("length", 0), ("batch_size", 1)):
        if getattr(options, name) < lowest:
            raise LabError(f"--{name.replace('_', '-')} {getattr(options, name)}: must be a number from {lowest} on")
    for name, (allowed, text) in RULES.items():
        if not allowed(getattr(options, name)):
            raise LabError(f"--{name.replace('_', '-')} {getattr(options, name)}: must be {text}")
    return Sampling(**{name: getattr(options, name) for name in RULES})


def _prompts(options: argparse.Namespace) -> list[str]:
    """The prompts in the order of the options, --prompt first."""
    texts = list(options.prompt or [])
    if "" in texts:
        raise LabError("--prompt '': empty, there is nothing to continue; leave the option out to begin a document")
    if options.interactive and options.prompt_file and "-" in map(str, options.prompt_file):
        raise LabError("--interactive: reads lines from standard input; give the prompt as a file of its own")
    texts += [read_text(file) for file in options.prompt_file or []]
    if len(texts) > 1:
        for name in ("interactive", "save_session"):
            if getattr(options, name):
                raise LabError(f"--{name.replace('_', '-')}: takes one prompt, {len(texts)} were given")
    if options.interactive and options.jsonl:
        raise LabError("--interactive: prints text as it is made; drop --jsonl")
    return texts


def read_text(file: Path) -> str:
    """The text of a UTF-8 file, of standard input for ``-``. LabError: missing, empty, binary or another encoding."""
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


if __name__ == "__main__":
    sys.exit(main())
