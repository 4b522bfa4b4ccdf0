"""Answer rows with several registered adapters over one loaded base.

- One row's answer.
- What a row asks: its `messages`, its `prompt`, or a template over its columns.
- What may be said to a predictor about how rows are answered.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice, repeat
from pathlib import Path
from threading import Condition, Lock
from types import TracebackType
from typing import Any, Self, TypedDict, Unpack

from rankwise.data.rows import RowTemplate, check_column, parse_messages
from rankwise.data.template import Message, Renderer, RenderError
from rankwise.exceptions import ConfigError, DatasetError, JobError
from rankwise.flavor.load import LoadedAdapter, load_models
from rankwise.modeling.decoding.generation import Decoding, row_seed
from rankwise.modeling.decoding.scheduler import Prompt, generate_each, prompt_problem
from rankwise.modeling.lora.lean import keep_dequantized
from rankwise.reporter import SILENT, Reporter
from rankwise.settings import Settings


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What became of one row: a text, or the error that it met.

    Attributes:
        model: `models:/NAME/VERSION`, or what else was asked for.
        version: Of the registered model; None for a directory or a LoggedModel.
        adapter_sha256: Digest (`sha256:...`) of the manifest that covers all of the adapter's files.
        base_fingerprint: Of the base that it ran over.
        text: The answer; None where there is an error.
        finish_reason: `stop` or `length`.
        prompt_tokens: Tokens of the rendered prompt.
        completion_tokens: Tokens of the answer, the end token included.
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


PROMPT, MESSAGES = "prompt", "messages"


@dataclass(frozen=True, kw_only=True)
class PromptReader:
    """Makes the conversation of a row.

    Attributes:
        template: Over columns; None to read the columns `messages` or `prompt`.
    """

    template: RowTemplate | None = None

    @classmethod
    def parse(cls, template: str | None) -> PromptReader:
        """Make a reader of `--prompt`.

        Raises:
            DatasetError: It is not a template.
        """
        return cls(template=None if template is None else RowTemplate.parse(template, "--prompt"))

    def chat(self, columns: Mapping[str, Any], system: str | None) -> list[Message]:
        """The conversation of one row.

        Args:
            columns: The row.
            system: The system prompt that the adapter was trained with, put before a bare text.

        Raises:
            DatasetError: It is no row, or has no prompt, or one that is not a text or a chat.
        """
        if not isinstance(columns, Mapping):
            raise DatasetError(f"a row must be a mapping of columns, got {type(columns).__name__}")
        if self.template is not None:
            for column in self.template.columns:
                check_column(column, columns, "--prompt")
            return _asked(self.template.render(columns, "of the input"), system)
        if columns.get(MESSAGES) is not None:
            messages, _ = parse_messages(columns[MESSAGES], MESSAGES)
            if not messages:
                raise DatasetError(f"{MESSAGES}: the chat is empty")
            return list(messages)
        if PROMPT not in columns:
            there = ", ".join(columns) or "none"
            raise DatasetError(
                f"there is neither a column {PROMPT!r} nor {MESSAGES!r}, and no --prompt; columns: {there}"
            )
        prompt = columns[PROMPT]
        if not isinstance(prompt, str):
            raise DatasetError(f"{PROMPT} must be a text, got {type(prompt).__name__} {prompt!r:.80}")
        return _asked(prompt, system)


def _asked(text: str, system: str | None) -> list[Message]:
    if not text:
        raise DatasetError("the prompt is empty")
    turn = Message(role="user", content=text)
    return [turn] if system is None else [Message(role="system", content=system), turn]


class Options(TypedDict, total=False):
    """How rows are answered; defaults are those of `Predictor.predict`.

    Attributes:
        prompt: A template over columns, such as `"carat {carat}, {cut}"`; by default a row has `messages` or `prompt`.
        max_new_tokens: Most tokens of an answer.
        temperature: 0 takes the likeliest token.
        top_k: As `Decoding`.
        top_p: As `Decoding`.
        stop: As `Decoding`.
        seed: Of sampling: the row at place i draws from (seed, i), whatever shares its batch.
        batch_size: Rows that are decoded together; they may be of different adapters.
        fail_fast: Stop at the first row that cannot be answered, before anything is generated.
    """

    prompt: str | PromptReader | None
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    stop: Sequence[str]
    seed: int
    batch_size: int
    fail_fast: bool


def decoding_of(options: Options) -> Decoding:
    """The part of the options that decides on tokens.

    Raises:
        TypeError: There is no such option.
        ConfigError: A value is out of its range.
    """
    if unknown := sorted(set(options) - set(Options.__annotations__)):
        raise TypeError(f"no such options: {', '.join(unknown)}; there are {', '.join(Options.__annotations__)}")
    stop = options.get("stop", ())
    return Decoding(
        max_new_tokens=options.get("max_new_tokens", 64),
        temperature=options.get("temperature", 0.0),
        top_k=options.get("top_k", 0),
        top_p=options.get("top_p", 1.0),
        # A text is one, not its letters.
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
            print(answer.text)  # in the order of the lines, while later ones are in work
    ```

    Aliases are resolved when it is loaded: an alias that moves later changes nothing here. Several threads may predict
    at a time; their passes through the model take turns. `close` waits for calls in progress, gives back what the
    dequantized weights take, and later calls raise `ValueError`.
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
        self._idle = Condition()
        self._calls = 0
        self._closed = False
        # Tokenizers are not made for several threads at a time.
        self._rendering = Lock()
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
        """Wait for calls in progress, and give back the memory of the dequantized weights; again has no effect."""
        with self._idle:
            self._closed = True
            self._idle.wait_for(lambda: self._calls == 0)
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
        places: Sequence[int] | None = None,
        progress: Reporter | None = None,
        **options: Unpack[Options],
    ) -> list[Answer]:
        """Answer rows; one that cannot be answered gets its error, and the others go on.

        Args:
            rows: Rows with `messages` or `prompt`, or with the columns of the template `prompt`.
            models: For each row, which of the loaded models answers; the first where it is None or left out.
            places: Of these rows in the whole input, for the seeds; 0, 1, ... when left out.
            progress: Told of rows as they are done.
            options: How rows are answered.

        Returns:
            One answer a row, in order.

        Raises:
            ConfigError: An option is out of its range.
            JobError: A row cannot be answered, with `fail_fast`.
            ValueError: The predictor is closed.
        """
        names = [None] * len(rows) if models is None else models
        where = range(len(rows)) if places is None else places
        answers: dict[int, Answer] = {}
        with self._in_use(), (progress or SILENT).task("generate", len(rows), "rows") as advance:
            for index, answer in self._answers(rows, names, where, options):
                answers[index] = answer
                advance(1)
        return [answers[index] for index in range(len(rows))]

    def stream(
        self,
        rows: Iterable[Mapping[str, Any]],
        *,
        models: Iterable[str | None] | None = None,
        window: int = WINDOW,
        **options: Unpack[Options],
    ) -> Iterator[Answer]:
        """Answer rows one after another, of an input that may be long, endless or not there yet.

        Args:
            rows: As `predict`; read in windows.
            models: As `predict`, in step with the rows.
            window: Rows that are read and worked on together: fewer come sooner, more take less time in all.
            options: How rows are answered.

        Yields:
            One answer a row, in order, each as soon as those before it are there.

        Raises:
            ConfigError: An option is out of its range, or `window` is below 1.
            JobError: A row cannot be answered, with `fail_fast`.
            ValueError: The predictor is closed, or there are more or fewer models than rows.
        """
        if window < 1:
            raise ConfigError(f"window must be 1 or more, got {window}")
        each = zip(rows, repeat(None)) if models is None else zip(rows, models, strict=True)
        first = 0
        while some := list(islice(each, window)):
            places = range(first, first + len(some))
            made = self._answers([row for row, _ in some], [model for _, model in some], places, options)
            early: dict[int, Answer] = {}
            for wanted in range(len(some)):
                while wanted not in early:
                    # Not across the yield: whoever reads the stream may close the predictor in between.
                    with self._in_use():
                        index, answer = next(made)
                    early[index] = answer
                yield early.pop(wanted)
            first += len(some)

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
        """The answer of each row with its index, as they come."""
        decoding = decoding_of(options)
        prompt = options.get("prompt")
        reader = prompt if isinstance(prompt, PromptReader) else PromptReader.parse(prompt)
        default = next(iter(self.adapters))
        wanted = [default if model is None else model for model in models]
        prompts: dict[int, Prompt] = {}
        failed: dict[int, str] = {}
        for index, (row, model, place) in enumerate(zip(rows, wanted, places, strict=True)):
            with self._rendering:
                found = self._prompt(row, model, reader, decoding, row_seed(options.get("seed", 0), place))
            if isinstance(found, Prompt):
                prompts[index] = found
            elif options.get("fail_fast", False):
                raise JobError(f"row {place}: {found}")
            else:
                failed[index] = found
        for index, error in failed.items():
            yield index, self._answer(wanted[index], error=error)
        for together in self._alike(prompts, wanted):
            made = generate_each(
                self.base,
                [prompts[index] for index in together],
                decoding,
                tokenizer=self._renderers[wanted[together[0]]].tokenizer,
                batch_size=options.get("batch_size", BATCH_SIZE),
            )
            for at, each in made:
                index = together[at]
                yield (
                    index,
                    self._answer(
                        wanted[index],
                        text=each.text,
                        finish_reason=each.finish_reason,
                        prompt_tokens=each.prompt_tokens,
                        completion_tokens=len(each.token_ids),
                    ),
                )

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
            text.encode()
        except UnicodeEncodeError as error:
            return f"the prompt has half of a character: {error}"
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
