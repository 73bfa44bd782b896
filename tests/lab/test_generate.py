"""A trained run continues a text: whole characters, any prompt, constant memory, clear refusals."""

import io
import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import gecko_lab
from gecko_lab import generation
from gecko_lab.components import state as states
from gecko_lab.data.tokenizers import load_tokenizer
from gecko_lab.generate import main
from gecko_lab.generation import TextStream, generate, read

Trained = tuple[Path, dict[str, float]]


def pieces_of(name: str, tokens: list[int]) -> list[str]:
    stream = TextStream(load_tokenizer(name))
    return [*(stream.push(token) for token in tokens), stream.end()]


def test_bytes_become_whole_characters() -> None:
    text = "a\u00e9\u58c1\U0001f98e."
    parts = pieces_of("bytes", list(text.encode()))
    assert [p for p in parts if p] == list(text)
    rng = np.random.default_rng(0)
    for _ in range(200):  # mostly broken UTF-8: what was shown is what decoding at once would show
        tokens = rng.choice([*range(65, 70), *"\u58c1\U0001f98e".encode(), 0xFF, 256], size=12).tolist()
        assert "".join(pieces_of("bytes", tokens)) == load_tokenizer("bytes").decode(tokens)


def test_byte_level_bpe_becomes_whole_characters(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    model.save(str(tmp_path / "t.json"))
    text = "a \u00e9\u58c1 \U0001f98e."
    tokens = load_tokenizer(f"hf:{tmp_path / 't.json'}").encode(text).tolist()
    assert len(tokens) == len(text.encode())
    assert [p for p in pieces_of(f"hf:{tmp_path / 't.json'}", tokens) if p] == list(text)


def test_a_word_after_the_prompt_keeps_its_space(tmp_path: Path) -> None:
    """Tokenizers that write a space before each word drop it at the beginning of a text: a stream is none."""
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"\u2581a": 0, "\u2581b": 1, "?": 2}, unk_token="?"))
    model.pre_tokenizer, model.decoder = tokenizers.pre_tokenizers.Metaspace(), tokenizers.decoders.Metaspace()
    model.save(str(tmp_path / "t.json"))
    tokenizer = load_tokenizer(f"hf:{tmp_path / 't.json'}")
    tokens = tokenizer.encode("a b a").tolist()
    assert tokens == [0, 1, 0]
    stream = TextStream(tokenizer, tokens[:1])
    assert [stream.push(1), stream.push(0)] == [" b", " a"]
    assert TextStream(tokenizer).push(1) == "b"


def test_the_command_prints_what_the_model_says(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained[0]
    arguments = [str(run), "--prompt", "The \u58c1", "--length", "40", "--temperature", "0"]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    prompt = torch.tensor([[256, *"The \u58c1".encode()]])
    model = gecko_lab.load(run)
    tokens = [int(t) for t in generate(model, prompt, 40, bos_id=256, temperature=0, vocab_size=257)]
    tokens = tokens[: tokens.index(256)] if 256 in tokens else tokens
    assert out == load_tokenizer("bytes").decode([*"The \u58c1".encode(), *tokens]) + "\n"
    assert "best.ckpt" in err
    assert "a second" in err


def test_a_seed_repeats_and_another_differs(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for seed in ("1", "1", "2"):
        assert main([str(trained[0]), "--length", "60", "--seed", seed, "--top-k", "20"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_the_end_of_the_document_ends_the_text(trained: Trained, capsys: pytest.CaptureFixture[str],
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    plan = iter([65, 66, 256, 67])
    monkeypatch.setattr(generation.Chooser, "choose", lambda *a: [next(plan)])
    assert main([str(trained[0]), "--prompt", ">", "--length", "4"]) == 0
    out, err = capsys.readouterr()
    assert out == ">AB\n"
    assert "ended the document" in err


def test_a_prompt_is_read_in_pieces_with_a_state_of_constant_size(trained: Trained) -> None:
    model = gecko_lab.load(trained[0])
    prompt = torch.randint(0, 257, (1, 321), generator=torch.Generator().manual_seed(0))
    whole, _ = read(model, prompt, bos_id=256)
    counts: list[int] = []
    pieces, _ = read(model, prompt, bos_id=256, piece=50, progress=counts.append)
    torch.testing.assert_close(pieces, whole, atol=1e-4, rtol=1e-4)
    assert sum(counts) == 321
    assert max(counts) == 50
    chunk = model.config.chunk_size
    sizes = {states.nbytes(read(model, prompt[:, : n * chunk], bos_id=256, piece=50)[1]) for n in (4, 9, 20)}
    assert len(sizes) == 1


def test_ids_beyond_the_tokenizer_are_never_chosen(trained: Trained) -> None:
    model = gecko_lab.load(trained[0])
    tokens = generate(model, torch.tensor([[256]]), 50, vocab_size=7, seed=1)
    assert max(int(t) for t in tokens) < 7


def test_a_prompt_file_and_standard_input(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p.txt").write_text("The gecko " * 500)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"The gecko " * 500)))
    texts = []
    for file in (str(tmp_path / "p.txt"), "-"):
        assert main([str(trained[0]), "--prompt-file", file, "--length", "5"]) == 0
        captured = capsys.readouterr()
        assert "read 5,001 tokens" in captured.err
        texts.append(captured.out)
    assert texts[0] == texts[1]
    assert len(texts[0]) < 300  # the end of a long prompt is shown, not all of it


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--length", "-1"], "--length"),
        (["--temperature", "-0.5"], "--temperature"),
        (["--temperature", "nan"], "--temperature"),
        (["--top-k", "-3"], "--top-k"),
        (["--seed", "-3"], "--seed"),
        (["--top-p", "1.5"], "--top-p 1.5: must be above 0 and at most 1"),
        (["--min-p", "-0.1"], "--min-p"),
        (["--repetition-penalty", "0"], "--repetition-penalty"),
        (["--stop", ""], "stop string"),
        (["--batch-size", "0"], "--batch-size"),
        (["--prompt", ""], "leave the option out"),
        (["--session", "nowhere"], "no such file"),
        (["--session", "latin"], "not a session"),
        (["--save-session", "latin"], "not overwritten"),
        (["--save-session", "nowhere/s"], "does not exist"),
        (["--prompt", "a", "--prompt", "b", "--interactive"], "--interactive: takes one prompt, 2 were given"),
        (["--prompt", "a", "--prompt", "b", "--save-session", "s"], "takes one prompt"),
        (["--interactive", "--prompt-file", "-"], "standard input"),
        (["--interactive", "--jsonl"], "--jsonl"),
        (["--device", "abacus"], "abacus"),
        (["--checkpoint", "nowhere.ckpt"], "nowhere.ckpt"),
        (["--prompt-file", "nowhere.txt"], "nowhere.txt"),
        (["--prompt-file", "binary"], "binary"),
        (["--prompt-file", "latin"], "not UTF-8"),
        (["--prompt-file", "empty"], "empty"),
    ],
    ids=lambda v: "-".join(v).strip("-") if isinstance(v, list) else "",
)
def test_mistakes(arguments: list[str], words: str, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                  capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    Path("binary").write_bytes(b"\0\1\2")
    Path("latin").write_bytes("caf\u00e9".encode("latin-1"))
    Path("empty").write_bytes(b"")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert main([str(trained[0]), *arguments]) == 2
    out, err = capsys.readouterr()
    assert words in err
    assert out == ""


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, str]:
    assert main(list(arguments)) == 0
    return capsys.readouterr()


def test_prompts_side_by_side_are_each_as_alone(trained: Trained, capsys: pytest.CaptureFixture[str],
                                                tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("A longer prompt from a file.")
    options = [str(trained[0]), "--length", "8", "--jsonl"]
    prompts = ["--prompt", "The", "--prompt", "gecko ", "--prompt-file", str(tmp_path / "p.txt")]
    lines = [json.loads(line) for line in run(capsys, *options, "--seed", "3", *prompts)[0].splitlines()]
    assert sorted(line["index"] for line in lines) == [0, 1, 2]
    for line in lines:
        alone = run(capsys, *options, "--seed", str(3 + line["index"]), "--prompt", line["prompt"])[0]
        assert json.loads(alone) == {**line, "index": 0}
    out, err = run(capsys, str(trained[0]), "--length", "8", *prompts)
    assert out.count("--- ") == 3
    assert "3 prompts" in err


def test_questions_from_a_saved_session(trained: Trained, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("The gecko climbs. " * 9)
    session, options = str(tmp_path / "book.session"), [str(trained[0]), "--length", "8", "--temperature", "0"]
    out, err = run(capsys, *options, "--prompt-file", str(tmp_path / "book.txt"), "--save-session", session)
    assert f"saved: {session}, 163 tokens read" in err
    assert run(capsys, *options, "--session", session)[0] == out[-9:]
    whole = run(capsys, *options, "--prompt", "The gecko climbs. " * 9 + "Who?")[0]
    assert "Who?" + whole.rpartition("Who?")[2] == run(capsys, *options, "--session", session, "--prompt", "Who?")[0]
    two = run(capsys, *options, "--session", session, "--prompt", "Who?", "--prompt", "Where?", "--jsonl")[0]
    assert "Who?" + next(json.loads(x) for x in two.splitlines() if "Who" in x)["text"] + "\n" == whole[-13:]


def test_a_conversation(trained: Trained, capsys: pytest.CaptureFixture[str], tmp_path: Path,
                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text("The gecko climbs. " * 5)
    lines = ["/help", "/read book.txt", "/set length 6", "/set temperature 0", "who?", "/list", "/fork other", "where?",
             "/switch main", "/rewind", "who?", "/save main.session", "/load main.session third", "", "/list",
             "/template Q: {}\\nA:", "//x", "/set", "/fourk x", "/set top-p 7", "/rewind 99", "/fork main", "/read",
             "/read nowhere.txt", "/switch nobody", "/template x", "/load main.session", "/set length x", "/quit", "x"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    out, err = run(capsys, str(trained[0]), "--interactive")
    asked = [part.partition("]> ")[2] for part in out.replace("\n", "|").split("[") if "]> " in part]
    assert len(asked) == len(lines) - 1  # /quit is the end
    assert asked[4] == asked[10] != ""  # the same question after /rewind
    assert Path("main.session").exists()
    for words in ("/fork NAME", "book.txt: 90 tokens read", "(6 tokens", "* third:", "unknown command /fourk. Did you",
                  "top_p=7.0: must be", "/rewind 99", "'main' exists already", "/read FILE: what is missing?",
                  "nowhere.txt: No such file", "no session 'nobody'", "must hold {}", "needs a name", "'x'",
                  "temperature 0.0"):  # fmt: skip
        assert words in err, words


def test_ctrl_c_ends_the_answer_and_not_the_session(trained: Trained, capsys: pytest.CaptureFixture[str],
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    from gecko_lab.generation import Session

    generate, read = Session.generate, Session.read
    before = signal.getsignal(signal.SIGINT)  # ignored where the tests run in the background

    def interrupted(self: Session, *options: object) -> Iterator[str]:
        for i, piece in enumerate(generate(self, *options)):  # type: ignore[arg-type]
            if i == 3:
                signal.raise_signal(signal.SIGINT)
            yield piece

    def broken(self: Session, what: object, progress: Callable[[int], None] = lambda count: None) -> None:
        if len(what) > 50:  # type: ignore[arg-type]
            signal.raise_signal(signal.SIGINT)
        read(self, what, progress)  # type: ignore[arg-type]

    monkeypatch.setattr(Session, "generate", interrupted)
    monkeypatch.setattr(Session, "read", broken)
    monkeypatch.setattr(sys, "stdin", io.StringIO("ab\n" + "x" * 60 + "\n/list\n"))
    _, err = run(capsys, str(trained[0]), "--interactive", "--length", "30", "--temperature", "0")
    assert "stopped)" in err
    assert "(not read)" in err
    count = int(err.partition("* main: ")[2].partition(" tokens")[0])
    assert 3 + 3 < count < 20  # BOS, the line, and what was made before the signal; not the long line
    assert signal.getsignal(signal.SIGINT) is before
