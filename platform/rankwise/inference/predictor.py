"""Predictor: rows answered by several registered adapters over one loaded base."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice, repeat
from pathlib import Path
from threading import Condition, Lock
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypedDict, Unpack

from rankwise.data.prompting import RowPrompts
from rankwise.data.template import Renderer, RenderError
from rankwise.exceptions import ConfigError, DatasetError, JobError
from rankwise.flavor.inputs import rows_of_table
from rankwise.flavor.load import LoadedAdapter, load_models
from rankwise.modeling.decoding.generation import Decoding, row_seed
from rankwise.modeling.decoding.scheduler import Prompt, generate_each, prompt_problem
from rankwise.modeling.lora.lean import keep_dequantized
from rankwise.reporter import SILENT, Reporter
from rankwise.settings import Settings

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The answer to one row, or the error that prevented it.

    Attributes:
        model: `models:/NAME/VERSION`, or the URI as given.
        version: Of the registered model; None for a directory or a LoggedModel.
        adapter_sha256: Digest (`sha256:...`) of the manifest that covers all files of the adapter.
        base_fingerprint: Of the base that generated it.
        text: The answer; None if there is an error.
        finish_reason: `stop` or `length`.
        prompt_tokens: Tokens of the rendered prompt.
        completion_tokens: Tokens of the answer, including the end token.
        error: Why there is no answer.
    """

    model: str | None = None
    version: str | None = None
    adapter_sha256: str | None = None
    base_fingerprint: str | None = None
    text: str | None = None
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    error: str | None = None


class Options(TypedDict, total=False):
    """Options of `Predictor.predict` and `Predictor.stream`.

    `prompt` is a template over columns, such as `"carat {carat}, {cut}"`; by default a row has the columns of the
    template that the adapter was trained with, or `messages`, or `prompt` (see `rankwise.data.prompting`).
    The sampling options are those of `Decoding`; row i draws from (seed, i), whichever rows share its batch. With
    `fail_fast` the first row with an error raises, before anything is generated.
    """

    prompt: str | None
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    stop: Sequence[str]
    seed: int
    batch_size: int
    fail_fast: bool


def decoding_of(options: Options) -> Decoding:
    """The decoding options, with their defaults.

    Raises:
        TypeError: An option is unknown.
        ConfigError: A value is out of range.
    """
    if unknown := sorted(set(options) - set(Options.__annotations__)):
        raise TypeError(f"unknown options: {', '.join(unknown)}; known options: {', '.join(Options.__annotations__)}")
    stop = options.get("stop", ())
    return Decoding(
        max_new_tokens=options.get("max_new_tokens", 64),
        temperature=options.get("temperature", 0.0),
        top_k=options.get("top_k", 0),
        top_p=options.get("top_p", 1.0),
        # A string is one stop text, not a sequence of letters.
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
    )


BATCH_SIZE = 16
WINDOW = 256


class Predictor:
    """Adapters over one base, kept in memory; a context manager.

    ```python
    from rankwise.inference import Predictor

    with Predictor.load(["models:/diamonds-pricer@best", "models:/diamonds-pricer/1"]) as predictor:
        rows = [{"prompt": "carat 0.31, Ideal, G, VS2"}, {"prompt": "carat 1.2, Fair, D, SI1"}]
        for answer in predictor.predict(rows, max_new_tokens=12):  # by the first model
            print(answer.text or answer.error)
        predictor.predict(rows, models=["models:/diamonds-pricer@best", "models:/diamonds-pricer/1"])  # one each
        for answer in predictor.stream(({"prompt": line} for line in open("prompts.txt")), max_new_tokens=12):
            print(answer.text)  # in the order of the lines, while later ones are in progress
    ```

    Aliases are resolved at load time. Several threads may call it; their forward passes take turns. `close` waits for
    calls in progress and frees the dequantized weights; later calls raise `ValueError`.
    """

    def __init__(self, adapters: Mapping[str, LoadedAdapter]) -> None:
        """Use loaded adapters over one base, by name."""
        bases = {id(adapter.base) for adapter in adapters.values()}
        if len(bases) != 1:
            raise ConfigError(f"a Predictor needs adapters over one loaded base, got {len(bases)} bases")
        self.adapters = dict(adapters)
        self.base = next(iter(adapters.values())).base
        # Each adapter has its own tokenizer and template; only rows with equal tokenizers share a batch.
        self._renderers = {
            name: Renderer.create(
                adapter.tokenizer,
                base=self.base.path,
                chat_template_kwargs=adapter.metadata.reading.chat_template_kwargs,
                required=False,
            )
            for name, adapter in adapters.items()
        }
        self._digests = {name: renderer.digest() for name, renderer in self._renderers.items()}
        self._idle = Condition()
        self._calls = 0
        self._closed = False
        # Tokenizers are not thread-safe.
        self._rendering = Lock()
        self._cleanup = ExitStack()
        self._cleanup.enter_context(keep_dequantized(self.base.model))

    @classmethod
    def load(
        cls,
        models: Sequence[str | Path],
        *,
        base_model: str | Path | None = None,
        allow_base_mismatch: bool = False,
        device: str | None = None,
        attn_implementation: str | None = None,
        settings: Settings | None = None,
        tracking_uri: str | None = None,
    ) -> Self:
        """Load the base once and every adapter over it; the arguments are those of `rankwise.flavor.load_models`.

        Raises:
            RankwiseError: As `load_models`.
        """
        names = list(dict.fromkeys(map(str, models)))
        loaded = load_models(
            names,
            base_model=base_model,
            allow_base_mismatch=allow_base_mismatch,
            device=device,
            attn_implementation=attn_implementation,
            settings=settings,
            tracking_uri=tracking_uri,
        )
        return cls(dict(zip(names, loaded, strict=True)))

    def close(self) -> None:
        """Wait for calls in progress, then free the dequantized weights; further calls have no effect."""
        with self._idle:
            self._closed = True
            self._idle.wait_for(lambda: self._calls == 0)
            self._cleanup.close()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    def predict(
        self,
        rows: Sequence[Mapping[str, Any]] | DataFrame,
        *,
        models: Sequence[str | None] | None = None,
        places: Sequence[int] | None = None,
        progress: Reporter | None = None,
        **options: Unpack[Options],
    ) -> list[Answer]:
        """Answer rows, in order; a row that fails gets an error, and the others are still answered.

        Args:
            rows: Rows with the columns of the template, or with `messages` or `prompt`; or a table of them.
            models: For each row, the name of a loaded model; None for the first one.
            places: Index of each row in the whole input, for its seed; 0, 1, ... by default.
            progress: Gets a task that counts rows.
            options: See `Options`.

        Raises:
            ConfigError: An option is out of range.
            DatasetError: The template is not valid.
            JobError: A row cannot be answered, with `fail_fast`.
            ValueError: The predictor is closed.
        """
        listed: Sequence[Mapping[str, Any]] = rows_of_table(rows)
        names = [None] * len(listed) if models is None else models
        seed_places = range(len(listed)) if places is None else places
        answers: dict[int, Answer] = {}
        with self._in_use(), (progress or SILENT).task("generate", len(listed), "rows") as advance:
            for index, answer in self._answers(listed, names, seed_places, options):
                answers[index] = answer
                advance(1)
        return [answers[index] for index in range(len(listed))]

    def stream(
        self,
        rows: Iterable[Mapping[str, Any]],
        *,
        models: Iterable[str | None] | None = None,
        window: int = WINDOW,
        **options: Unpack[Options],
    ) -> Iterator[Answer]:
        """Answer rows of a long or endless input in order, each as soon as the rows before it are answered.

        Args:
            rows: As in `predict`; read one window at a time.
            models: As in `predict`, one for each row.
            window: Rows read and decoded together. A small window lowers latency, a large one raises throughput.
            options: See `Options`.

        Raises:
            ConfigError: An option is out of range, or `window` is below 1.
            JobError: A row cannot be answered, with `fail_fast`.
            ValueError: The predictor is closed, or the numbers of models and rows differ.
        """
        if window < 1:
            raise ConfigError(f"window must be 1 or more, got {window}")
        pairs = zip(rows, repeat(None)) if models is None else zip(rows, models, strict=True)
        first = 0
        while chunk := list(islice(pairs, window)):
            places = range(first, first + len(chunk))
            answers = self._answers([row for row, _ in chunk], [model for _, model in chunk], places, options)
            early: dict[int, Answer] = {}
            for position in range(len(chunk)):
                while position not in early:
                    # Not held across the yield, where the caller may close the predictor.
                    with self._in_use():
                        index, answer = next(answers)
                    early[index] = answer
                yield early.pop(position)
            first += len(chunk)

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        with self._idle:
            if self._closed:
                raise ValueError("this predictor is closed; load another one")
            self._calls += 1
        try:
            yield
        finally:
            with self._idle:
                self._calls -= 1
                self._idle.notify_all()

    def _answers(
        self,
        rows: Sequence[Mapping[str, Any]],
        models: Sequence[str | None],
        places: Sequence[int],
        options: Options,
    ) -> Iterator[tuple[int, Answer]]:
        """The index and answer of each row, as they are ready."""
        decoding = decoding_of(options)
        readers = {
            name: RowPrompts(
                reading=adapter.metadata.reading, system=adapter.metadata.system, template=options.get("prompt")
            ).check()
            for name, adapter in self.adapters.items()
        }
        default = next(iter(self.adapters))
        names = [default if model is None else model for model in models]
        prompts: dict[int, Prompt] = {}
        failed: dict[int, str] = {}
        for index, (row, model, place) in enumerate(zip(rows, names, places, strict=True)):
            with self._rendering:
                result = self._prompt(row, model, readers, decoding, row_seed(options.get("seed", 0), place))
            if isinstance(result, Prompt):
                prompts[index] = result
            elif options.get("fail_fast", False):
                raise JobError(f"row {place}: {result}")
            else:
                failed[index] = result
        for index, error in failed.items():
            yield index, self._answer(names[index], error=error)
        for group in self._group_by_tokenizer(prompts, names):
            completions = generate_each(
                self.base,
                [prompts[index] for index in group],
                decoding,
                tokenizer=self._renderers[names[group[0]]].tokenizer,
                batch_size=options.get("batch_size", BATCH_SIZE),
            )
            for position, completion in completions:
                index = group[position]
                yield (
                    index,
                    self._answer(
                        names[index],
                        text=completion.text,
                        finish_reason=completion.finish_reason,
                        prompt_tokens=completion.prompt_tokens,
                        completion_tokens=len(completion.token_ids),
                    ),
                )

    def _prompt(
        self, row: Mapping[str, Any], model: str, readers: Mapping[str, RowPrompts], decoding: Decoding, seed: int
    ) -> Prompt | str:
        """The prompt of a row, or the reason why there is none."""
        adapter = self.adapters.get(model)
        if adapter is None:
            return f"model {model} is not loaded; loaded models: {', '.join(self.adapters)}"
        try:
            chat = readers[model].chat(row)
            renderer = self._renderers[model]
            (text,) = renderer.prompts([chat])
            text.encode()
        except UnicodeEncodeError as error:
            return f"the prompt has an unpaired surrogate: {error}"
        except RenderError as error:
            return f"{error}".split("; change ")[0]
        except DatasetError as error:
            return str(error)
        (tokens,) = renderer.tokens([text])
        problem = prompt_problem(self.base, len(tokens), decoding.max_new_tokens)
        if problem is not None:
            return f"the prompt cannot be answered: {problem}"
        return Prompt(token_ids=tuple(tokens), adapter=adapter.adapter_name, seed=seed)

    def _group_by_tokenizer(self, prompts: Mapping[int, Prompt], names: Sequence[str]) -> list[list[int]]:
        """Indices grouped by tokenizer: rows of one group may share a batch."""
        groups: dict[str, list[int]] = {}
        for index in prompts:
            groups.setdefault(self._digests[names[index]], []).append(index)
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
