"""Answer rows with several registered adapters over one loaded base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rankwise.assets.progress import Progress
from rankwise.data.renderer import Message, Renderer, RenderError
from rankwise.exceptions import ConfigError, DatasetError, JobError
from rankwise.flavor.loading import LoadedAdapter, load_models
from rankwise.inference.answer import Answer
from rankwise.inference.generate import Prompt, generate, prompt_problem
from rankwise.inference.prompts import PromptReader
from rankwise.modeling.dequantized import keep_dequantized
from rankwise.modeling.generation import Decoding, row_seed
from rankwise.settings import Settings

BATCH_SIZE = 16


class Predictor:
    """Adapters over one base, kept in memory; a context manager.

    ```python
    with Predictor.load(["models:/diamonds-pricer@best"]) as predictor:
        answers = predictor.predict([{"prompt": "0.31 carat, Ideal, G, VS2: price?"}], max_new_tokens=12)
        print(answers[0].text)
    ```
    """

    def __init__(self, adapters: Mapping[str, LoadedAdapter]) -> None:
        """Take loaded adapters over one base, by the names they are asked for by."""
        bases = {id(adapter.base) for adapter in adapters.values()}
        if len(bases) != 1:
            raise ConfigError(f"a predictor needs adapters over one base in memory, got {len(bases)} bases")
        self.adapters = dict(adapters)
        self.base = next(iter(adapters.values())).base
        # Rows share a batch where their tokens mean the same; each adapter has its own tokenizer and template.
        self._renderers = {
            name: Renderer.create(adapter.tokenizer, base=self.base.path) for name, adapter in adapters.items()
        }
        self._digests = {name: renderer.digest() for name, renderer in self._renderers.items()}
        self._kept = ExitStack()
        self._kept.enter_context(keep_dequantized(self.base.model))

    @classmethod
    def load(
        cls,
        models: Sequence[str | Path],
        *,
        base_model: str | Path | None = None,
        allow_base_mismatch: bool = False,
        device: str | None = None,
        settings: Settings | None = None,
        tracking_uri: str | None = None,
    ) -> Self:
        """Load the base once and every adapter over it; arguments are those of `rankwise.flavor.load_models`.

        Raises:
            RankwiseError: As `load_models`.
        """
        names = list(dict.fromkeys(map(str, models)))
        loaded = load_models(
            names,
            base_model=base_model,
            allow_base_mismatch=allow_base_mismatch,
            device=device,
            settings=settings,
            tracking_uri=tracking_uri,
        )
        return cls(dict(zip(names, loaded, strict=True)))

    def close(self) -> None:
        """Give back the memory of the dequantized weights."""
        self._kept.close()

    def __enter__(self) -> Self:
        """Use it."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    def predict(
        self,
        rows: Sequence[Mapping[str, Any]],
        *,
        models: Sequence[str | None] | None = None,
        prompt: str | PromptReader | None = None,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
        seed: int = 0,
        places: Sequence[int] | None = None,
        batch_size: int = BATCH_SIZE,
        fail_fast: bool = False,
        progress: Progress | None = None,
    ) -> list[Answer]:
        """Answer rows; one that cannot be answered gets its error, and the others go on.

        Args:
            rows: Rows with `messages` or `prompt`, or with the columns of the template `prompt`.
            models: For each row, which of the loaded models answers; the first where it is None or left out.
            prompt: A template over columns.
            max_new_tokens: Most tokens of an answer.
            temperature: 0 takes the likeliest token.
            top_p: As `Decoding`.
            stop: As `Decoding`.
            seed: Of sampling: the row at place i draws from (seed, i), whatever shares its batch.
            places: Of these rows in the whole input; 0, 1, ... when left out.
            batch_size: Rows that are decoded together; they may be of different adapters.
            fail_fast: Stop at the first row that cannot be answered, before anything is generated.
            progress: Told of rows as they are done.

        Returns:
            One answer a row, in order.

        Raises:
            ConfigError: A setting is out of its range.
            JobError: A row cannot be answered, with `fail_fast`.
        """
        decoding = Decoding(
            max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, stop=tuple(stop)
        )  # fmt: skip
        reader = prompt if isinstance(prompt, PromptReader) else PromptReader.parse(prompt)
        default = next(iter(self.adapters))
        wanted = [default if model is None else model for model in models or [None] * len(rows)]
        answers: dict[int, Answer] = {}
        prompts: dict[int, Prompt] = {}
        where = range(len(rows)) if places is None else places
        for index, (row, model, place) in enumerate(zip(rows, wanted, where, strict=True)):
            found = self._prompt(row, model, reader, decoding, row_seed(seed, place))
            if isinstance(found, Prompt):
                prompts[index] = found
            elif fail_fast:
                raise JobError(f"row {place}: {found}")
            else:
                answers[index] = self._answer(model, error=found)
        for together in self._alike(prompts, wanted):
            made = generate(
                self.base,
                [prompts[index] for index in together],
                decoding,
                tokenizer=self._renderers[wanted[together[0]]].tokenizer,
                batch_size=batch_size,
                progress=progress,
            )
            for index, each in zip(together, made, strict=True):
                answers[index] = self._answer(
                    wanted[index],
                    text=each.text,
                    finish_reason=each.finish_reason,
                    prompt_tokens=each.prompt_tokens,
                    completion_tokens=len(each.token_ids),
                )
        return [answers[index] for index in range(len(rows))]

    def _prompt(
        self, row: Mapping[str, Any], model: str, reader: PromptReader, decoding: Decoding, seed: int
    ) -> Prompt | str:
        """The prompt of a row, or why there is none."""
        adapter = self.adapters.get(model)
        if adapter is None:
            return f"the model {model} is not loaded; loaded are {', '.join(self.adapters)}"
        try:
            chat: list[Message] = reader.chat(row, adapter.metadata.system)
            renderer = self._renderers[model]
            (text,) = renderer.texts([chat], add_generation_prompt=True)
        except RenderError as error:
            return f"{error}".split("; change ")[0]
        except DatasetError as error:
            return str(error)
        (tokens,) = renderer.tokens([text])
        problem = prompt_problem(self.base, len(tokens), decoding.max_new_tokens)
        if problem is not None:
            return f"the prompt cannot be answered: {problem}"
        return Prompt(token_ids=tuple(tokens), adapter=adapter.adapter_name, seed=seed)

    def _alike(self, prompts: Mapping[int, Prompt], wanted: Sequence[str]) -> list[list[int]]:
        """Places of rows that may share a batch: those whose tokenizers are the same."""
        groups: dict[str, list[int]] = {}
        for index in prompts:
            groups.setdefault(self._digests[wanted[index]], []).append(index)
        return list(groups.values())

    def _answer(self, model: str, **result: Any) -> Answer:
        adapter = self.adapters.get(model)
        if adapter is None:
            return Answer(model=model, **result)
        return Answer(
            model=adapter.origin.uri,
            version=adapter.origin.version,
            adapter_sha256=adapter.metadata.manifest,
            base_fingerprint=self.base.fingerprint.digest,
            **result,
        )
