"""Our model as a model of lm-evaluation-harness. Importing this needs the extra `eval`."""

from typing import Any

import torch
import torch.distributed as dist
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

from titan_moe.analysis.evaluate.scores import Scored, log_likelihoods, windows
from titan_moe.generate.load import Loaded
from titan_moe.generate.loop import Options, complete
from titan_moe.generate.sampling import Sampling


class LanguageModel(TemplateLM):
    """Every rank has the whole model and scores its part of the documents, which the harness hands out and gathers.

    A text starts with the token that starts a document, as in training. Longer texts are cut from the left.
    """

    def __init__(self, loaded: Loaded, batch_size: int) -> None:
        super().__init__()
        self.loaded, self.batch_size = loaded, batch_size
        self.max_length = loaded.config.training.seq_len
        self.cut = 0
        """Texts that were longer than the model's sequences."""
        self._device = loaded.model.embedding.device
        self._rank = dist.get_rank() if dist.is_initialized() else 0
        self._world_size = dist.get_world_size() if dist.is_initialized() else 1

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
        return log_likelihoods(self.loaded.model, rows, self.max_length, self.batch_size)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:  # noqa: ARG002
        totals = []
        for request in requests:
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            rows = [*windows(ids, self.prefix_token_id, self.max_length)]
            scores = log_likelihoods(self.loaded.model, rows, self.max_length, self.batch_size)
            totals.append(sum(value for value, _ in scores))
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:  # noqa: ARG002
        texts = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(number)
        for numbers in groups.values():
            settings = normalize_gen_kwargs(requests[numbers[0]].args[1], default_max_gen_toks=256)
            new = min(settings["max_gen_toks"], self.max_length - 1)
            stop = tuple(text for text in handle_stop_sequences(settings["until"], eos=None) if text)
            temperature = float(settings.get("temperature") or 0.0)
            sampling = Sampling(temperature=temperature, top_p=float(settings.get("top_p") or 1.0))
            options = Options(max_tokens=new, stop=stop, sampling=sampling)
            prompts = {n: self.tok_encode(requests[n].args[0]) for n in numbers}
            self.cut += sum(len(ids) > self.max_length - new for ids in prompts.values())
            numbers.sort(key=lambda n: -len(prompts[n]))
            for start in range(0, len(numbers), self.batch_size):
                part = numbers[start : start + self.batch_size]
                rows = [prompts[n][-(self.max_length - new) :] for n in part]
                made = complete(self.loaded.model, self.loaded.tokenizer, rows, options)
                for n, text in zip(part, made, strict=True):
                    texts[n] = text
        return texts

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor)
        return torch.stack(parts).flatten()

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        everyone: list[Any] | None = [None] * self.world_size if self.rank == dst else None
        dist.gather_object(obj, everyone, dst=dst)
        return everyone

    def barrier(self) -> None:
        dist.barrier()
