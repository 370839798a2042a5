"""Our model as a model of lm-evaluation-harness. Importing this needs the extra `eval`."""

from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

from titan_moe.analysis.evaluate.scores import Batches, Scored, log_likelihoods, windows
from titan_moe.generate.load import Loaded
from titan_moe.generate.loop import Options
from titan_moe.generate.sampling import Sampling
from titan_moe.generate.shared import complete_on_ranks


class LanguageModel(TemplateLM):
    """To the harness every rank is the only one: all ranks get all requests, share the work, and have all results.

    A text starts with the token that starts a document, as in training. Longer texts are cut from the left.
    """

    def __init__(self, loaded: Loaded, batches: Batches) -> None:
        super().__init__()
        self.loaded, self.batches, self.max_length = loaded, batches, batches.length
        self.cut = 0
        """Texts that were longer than the model's sequences."""
        self._device = loaded.mesh.device

    @property
    def eot_token_id(self) -> int:
        return self.loaded.tokenizer.eos

    @property
    def prefix_token_id(self) -> int:
        return self.loaded.tokenizer.bos

    @property
    def tokenizer_name(self) -> str:
        return self.loaded.tokenizer.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        ids = self.loaded.tokenizer.encode(string)
        return ids if add_special_tokens is False else [self.prefix_token_id, *ids]

    def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        rows = [Scored(context, continuation) for _, context, continuation in requests]
        self.cut += sum(len(row.context) + len(row.continuation) > self.max_length + 1 for row in rows)
        return log_likelihoods(self.loaded.model, rows, self.batches)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:  # noqa: ARG002
        totals = []
        for request in requests:
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            rows = [*windows(ids, self.prefix_token_id, self.max_length)]
            scores = log_likelihoods(self.loaded.model, rows, self.batches)
            totals.append(sum(value for value, _ in scores))
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:  # noqa: ARG002
        texts = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(number)
        for numbers in groups.values():
            settings = normalize_gen_kwargs(requests[numbers[0]].args[1], default_max_gen_toks=256)
            new = min(settings["max_gen_toks"], self.max_length // 2)  # the rest is for the prompt
            stop = tuple(text for text in handle_stop_sequences(settings["until"], eos=None) if text)
            temperature = float(settings.get("temperature") or 0.0)
            sampling = Sampling(temperature=temperature, top_p=float(settings.get("top_p") or 1.0))
            options = Options(max_tokens=new, stop=stop, sampling=sampling)
            prompts = [self.tok_encode(requests[number].args[0]) for number in numbers]
            self.cut += sum(len(ids) > self.max_length - new for ids in prompts)
            rows = [ids[-(self.max_length - new) :] for ids in prompts]
            made = complete_on_ranks(self.loaded, rows, options, self.batches.size, self.batches.progress)
            for number, text in zip(numbers, made, strict=True):
                texts[number] = text
        return texts
