"""Runs and exported models in EleutherAI's lm-evaluation-harness, as its model `powernap`: they sleep on long prompts.

python -m powernap.lm_eval run --model powernap --model_args run=mine --tasks hellaswag
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from powernap.model.decoder import Decoder
from powernap.train.generation.generate import GenerateError, load_run

MAX_TOKENS = 256  # of an answer, where a task says nothing


@register_model("powernap")
class PowernapLM(TemplateLM):
    """A trained model.

    Args:
        run: a run, by its folder or its name below runs/, or the folder of an exported model.
        passes: N of every sleep; None: the largest trained.
        batch_size: texts at once; "auto" is 8.
    """

    def __init__(self, run: str, passes: int | None = None, batch_size: int | str = 8, **_: Any):
        super().__init__()
        self.name = str(run)
        folder = Path(self.name) if Path(self.name).exists() else Path("runs") / self.name
        self.model = load_run(folder, None if passes is None else int(passes))
        self.batch_size = int(batch_size) if str(batch_size).isdigit() else 8

    @property
    def tokenizer_name(self) -> str:
        return self.name

    @property
    def eot_token_id(self) -> int:
        end = self.model.vocabulary.end
        if end is None:
            raise GenerateError(
                f"{self.name}: its vocabulary has no end token, which stands before a text without a context"
            )
        return end

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self.model.encode(string)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """For (texts, context, continuation): the log-probability of the continuation, and whether it is the likeliest."""
        answers: dict[int, tuple[float, bool]] = {}
        lengths = [len(context) + len(continuation) for _, context, continuation in requests]
        for numbers in self._batches(lengths, "scoring", disable_tqdm):
            contexts, continuations = zip(*(requests[number][1:] for number in numbers), strict=True)
            for number, answer in zip(numbers, self._score(contexts, continuations), strict=True):
                answers[number] = answer
                self.cache_hook.add_partial("loglikelihood", requests[number][0], answer)
        return [answers[number] for number in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of whole texts, however long, after the end token."""
        texts = [request.args[0] for request in requests]
        scored = [((text, ""), [self.eot_token_id], self.tok_encode(text)) for text in texts]
        return [total for total, _ in self._loglikelihood_tokens(scored, disable_tqdm)]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        texts: dict[int, str] = {}
        arguments = [request.args for request in requests]
        for _, numbers in _groups([repr(options) for _, options in arguments]).items():
            lengths = [len(arguments[number][0]) for number in numbers]
            for places in self._batches(lengths, "generating", disable_tqdm):
                chosen = [numbers[place] for place in places]
                prompts, options = [arguments[number][0] for number in chosen], arguments[chosen[0]][1]
                for number, text in zip(chosen, self._generate(prompts, options), strict=True):
                    texts[number] = text
                    self.cache_hook.add_partial("generate_until", arguments[number], text)
        return [texts[number] for number in range(len(requests))]

    @torch.no_grad()
    def _score(self, contexts: Sequence[list[int]], continuations: Sequence[list[int]]) -> Iterator[tuple[float, bool]]:
        decoder = Decoder(self.model.stage, self.model.passes, len(contexts))
        first = decoder.feed(contexts).clone()  # the next call overwrites it
        later = decoder.feed_with_logits([continuation[:-1] for continuation in continuations])
        for row, continuation in enumerate(continuations):
            logits = torch.cat([first[row : row + 1], later[row]])[: len(continuation)].float()
            targets = torch.tensor(continuation, device=logits.device)
            chosen = logits.log_softmax(-1).gather(1, targets[:, None])
            yield float(chosen.double().sum()), bool((logits.argmax(-1) == targets).all())

    def _generate(self, prompts: list[str], options: dict[str, Any]) -> list[str]:
        """options: the task's generation_kwargs."""
        until = options.get("until") or []
        texts = [""] * len(prompts)
        outputs = self.model.generate(
            prompts,
            max_tokens=int(options.get("max_gen_toks", MAX_TOKENS)),
            temperature=float(options.get("temperature", 0.0)) if options.get("do_sample") else 0.0,
            top_p=float(options.get("top_p", 1.0)),
            stop=[until] if isinstance(until, str) else list(until),
        )
        for output in outputs:
            texts[output.row] += output.text
        return texts

    def _batches(self, lengths: list[int], what: str, quiet: bool) -> Iterator[list[int]]:
        """Numbers of texts of about one length, the longest first: memory runs out at once or never."""
        order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
        starts = range(0, len(order), self.batch_size)
        for start in tqdm(starts, desc=what, disable=quiet):
            yield order[start : start + self.batch_size]


def _groups(keys: Sequence[str]) -> dict[str, list[int]]:
    """Key -> the numbers of those with that key."""
    groups: dict[str, list[int]] = {}
    for number, key in enumerate(keys):
        groups.setdefault(key, []).append(number)
    return groups
