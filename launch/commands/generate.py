"""powernap generate: continue prompts with a trained run."""

import argparse
import json
import sys
from pathlib import Path

from powernap.launch.commands.arguments import RUN, passes, path, real, run_folder, seed, whole


def add(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "generate",
        help="continue a prompt with a trained run",
        description="Continue prompts with a run's newest checkpoint, token by token: a full window sleeps when the next "
        "token arrives, and its keys and values are dropped, so memory and time per token do not grow. Several prompts "
        "make a batch.",
        epilog="examples: powernap generate mine --prompt 'the cat' --temperature 0.8 --top-p 0.9; powernap generate "
        "mine --prompt-file book.txt --max-tokens 0 --save-state book.pt; powernap generate mine --state book.pt "
        "--prompt 'In short,'",
    )
    parser.add_argument("run_name", metavar="RUN", help=f"{RUN}; or an exported model")
    # These options may be mixed: their prompts are numbered in the order given.
    parser.add_argument(
        "--prompt", dest="prompts", action="append", type=_text, metavar="TEXT", default=[], help="text, or words "
        "as `powernap data inspect` shows them"
    )  # fmt: skip
    parser.add_argument(
        "--tokens", dest="prompts", action="append", type=_tokens, metavar="1,2,3", help="a prompt as tokens"
    )
    parser.add_argument(
        "--prompt-file", dest="prompts", action="append", type=path, metavar="FILE", help="a prompt as file; - is stdin"
    )
    parser.add_argument(
        "--max-tokens", type=whole(0), default=100, metavar="N", help="maximum new tokens (default: %(default)s)"
    )
    parser.add_argument(
        "--temperature", type=real(0), default=0.0, metavar="T", help="0: always the likeliest token (default: 0)"
    )
    parser.add_argument(
        "--top-p",
        type=real(0, 1, above=True),
        default=1.0,
        metavar="P",
        help="only the likeliest tokens that sum to P (default: 1)",
    )
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="stop at this text; may be repeated"
    )
    parser.add_argument(
        "--seed", type=seed, metavar="S", help="prompt i samples with seed S + i (default: 0, or as the state left off)"
    )
    parser.add_argument("--passes", type=passes, metavar="N", help="N of every sleep (default: the largest trained)")
    parser.add_argument("--save-state", type=path, metavar="FILE", help="save the streams there at the end")
    parser.add_argument("--state", type=path, metavar="FILE", help="continue streams saved before")
    parser.add_argument("--json", action="store_true", help="print a line of JSON per prompt")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, _: list[str]) -> int:
    folder = run_folder(options.run_name, ("config.yaml", "config.json"))
    from powernap.launch import torchrun
    from powernap.train.run.folder import RunFolder

    if (folder / "config.yaml").is_file():
        torchrun.set_threads(RunFolder(folder).recipe())
    from powernap.train.generation.generate import GenerateError, load_run
    from powernap.train.outputs import check_file

    if not options.prompts and not options.state:
        raise GenerateError("no prompt: write --prompt TEXT, --tokens 1,2,3 or --prompt-file FILE")
    if options.save_state:
        check_file(options.save_state, "--save-state")
    prompts = [_read(prompt) if isinstance(prompt, Path) else prompt for prompt in options.prompts]
    model = load_run(folder, options.passes)
    if options.state:
        stream = model.load_stream(options.state)
        if options.seed is not None:
            stream.seed(options.seed)
    else:
        stream = model.stream(len(prompts), options.seed or 0)
    outputs = stream.generate(
        prompts or None,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        stop=options.stop,
    )
    streams = len(stream.unread)
    texts = [""] * streams
    tokens: list[list[int]] = [[] for _ in range(streams)]
    for output in outputs:
        texts[output.row] += output.text
        tokens[output.row].append(output.token)
        if streams == 1 and not options.json:
            print(output.text, end="" if output.finish_reason is None else "\n", flush=True)
        elif output.finish_reason and not options.json:
            print(f"[{output.row + 1}] {texts[output.row]}", flush=True)
        elif output.finish_reason:
            answer = {"text": texts[output.row], "tokens": tokens[output.row], "finish": output.finish_reason}
            print(json.dumps({"prompt": output.row + 1, **answer}), flush=True)
        if output.finish_reason == "end" and not options.json:
            row = f"[{output.row + 1}] " if streams > 1 else ""
            count = f"{len(tokens[output.row])} of {options.max_tokens} tokens"
            print(f"powernap: {row}the document ended after {count}", file=sys.stderr)
    if options.save_state:
        stream.save(options.save_state)
    return 0


def _text(text: str) -> str:
    """Check that a prompt on the command line is UTF-8, as tokenizers need it."""

    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("not UTF-8") from None
    return text


def _tokens(text: str) -> list[int]:
    parts = text.replace(",", " ").split()
    if not parts or not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"'{text}': write tokens such as 1,2,3")
    return [int(part) for part in parts]


def _read(path: Path) -> str:
    from powernap.train.generation.generate import GenerateError

    try:
        data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
        return data.decode()
    except OSError as error:
        raise GenerateError(f"--prompt-file {path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise GenerateError(f"--prompt-file {path}: not UTF-8 text (byte {error.start})") from None
