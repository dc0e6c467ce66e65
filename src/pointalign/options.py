"""Options of everything that answers, declared once for the command and the pipelines."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from numbers import Integral, Real
from typing import Any, Literal

from pointalign.errors import ConfigError


@dataclass(frozen=True)
class ModelChoice:
    """Which model answers, and on what."""

    model: str | None = None
    """Folder, training run or Hub id of the model, or one that is bundled; $POINTALIGN_MODEL, else household-135m, when not
    given."""
    device: str | None = None
    """Where to compute: cuda, cuda:1, cpu, ...; the accelerator if there is one when not given."""
    dtype: str | None = None
    """Numbers of the language model: float32, bfloat16 or float16; bfloat16 where it is native when not given."""


@dataclass(frozen=True)
class Decoding:
    """How answers are written; the same input gives the same answer unless a temperature lets chance in.

    Raises:
        ConfigError: when a setting is out of range.
    """

    max_new_tokens: int = 150
    """Longest answer in tokens; one that is done ends earlier."""
    temperature: float = 0.0
    """0 takes the most probable token every time; the higher, the more is left to chance (0.2 is little, 1 much)."""
    top_p: float = 1.0
    """With a temperature: choose among the most probable tokens that together reach this probability."""
    seed: int = 0
    """Of the chance that a temperature lets in."""

    def __post_init__(self) -> None:
        for name, kind in (("max_new_tokens", Integral), ("temperature", Real), ("top_p", Real), ("seed", Integral)):
            value = getattr(self, name)
            if not isinstance(value, kind) or isinstance(value, bool):
                raise ConfigError(f"{name} is a {'whole ' if kind is Integral else ''}number; got {value!r}")
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens {self.max_new_tokens} leaves no room for an answer; give 1 or more")
        if not 0 <= self.temperature <= 100:
            raise ConfigError(f"temperature {self.temperature} is out of range; give 0 (no chance) to 100")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p {self.top_p} is out of range; give more than 0 and at most 1")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed {self.seed} is out of range; give 0 or more")

    @property
    def samples(self) -> bool:
        """Whether chance has a part."""
        return self.temperature > 0

    def options(self) -> dict[str, Any]:
        """Arguments of transformers' `generate`."""
        options: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "do_sample": self.samples}
        if self.samples:
            # Without a word of ours transformers keeps the 50 most probable tokens only.
            options |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return options


FROM_ENVIRONMENT = ModelChoice()
GREEDY = Decoding()


@dataclass(frozen=True)
class Reading:
    """How a 3D file becomes a cloud."""

    up: Literal["y", "z"] | None = None
    """The axis that points up in the files; what their format fixes, else y, when not given."""
    format: str | None = None
    """The files' format; their endings or first bytes tell it when not given."""
    columns: tuple[str, ...] | None = None
    """Names of a cloud's columns, where the file has none or wrong ones: x y z nx ny nz; - leaves one out."""
    color_max: float | None = None
    """The colour value that means full, where the values do not tell."""
    unit: float | None = None
    """The unit of the files' coordinates in metres (0.001: millimetres), for models that were told of sizes; what the format
    fixes, else unknown, when not given."""

    def options(self, num_points: int) -> dict[str, Any]:
        """Arguments of `load_point_cloud`.

        Args:
            num_points: points that the model reads of a cloud.
        """
        return {"n_points": num_points, **asdict(self)}


AS_THE_FILE_SAYS = Reading()


@dataclass(frozen=True)
class ManyFiles:
    """How many files are answered and where the lines go.

    Raises:
        ConfigError: when a setting is out of range.
    """

    out: str | None = None
    """File of JSON lines; one that was stopped is gone on with. With - lines go to standard output, as without it, where
    people see them as text on a terminal."""
    retry_errors: bool = False
    """Try again what an earlier run wrote an error for into the same file."""
    batch_size: int = 16
    """Objects that the model answers at a time."""
    workers: int | None = None
    """Processes that read files meanwhile; 0 for none, chosen by the number of files and cores when not given. With Ray, for
    each of its workers; 1 when not given."""
    engine: Literal["local", "ray"] = "local"
    """`local` answers in this process; `ray` on a Ray cluster, the one that $RAY_ADDRESS names or one of this machine, with a
    model in each worker."""
    ray_workers: int | None = None
    """Workers on Ray; one for each accelerator, else for each two cores, when not given."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"batch_size {self.batch_size} leaves no object; give 1 or more")
        if self.workers is not None and self.workers < 0:
            raise ConfigError(f"workers {self.workers} is less than none; give 0 or more")
        if self.ray_workers is not None and (self.ray_workers < 1 or self.engine != "ray"):
            raise ConfigError(f"ray_workers {self.ray_workers} goes with engine ray; give 1 or more, and --engine ray")
        if self.retry_errors and self.out in (None, "-"):
            raise ConfigError("retry_errors needs the file that an earlier run wrote; name it with --out")


@dataclass(frozen=True)
class Page:
    """Where the web page is, and what one visitor may ask of the machine.

    Raises:
        ConfigError: when a setting is out of range.
    """

    host: str = "127.0.0.1"
    """Address to listen at: 127.0.0.1 for this machine alone, 0.0.0.0 for everyone who can reach it."""
    port: int | None = None
    """Port to listen at; the first free one from 7860 on when not given."""
    max_upload_mb: int = 64
    """Largest file that may be dropped, in mebibytes."""
    reading_seconds: float = 30
    """Longest time that reading a file may take."""
    answer_seconds: float = 120
    """Longest time that one model may write at an answer."""
    waiting: int = 32
    """Visitors that may wait for an answer; more are told to try later."""

    def __post_init__(self) -> None:
        if self.port is not None and not 1 <= self.port <= 65535:
            raise ConfigError(f"port {self.port} is out of range; give 1 to 65535")
        for name in ("max_upload_mb", "reading_seconds", "answer_seconds", "waiting"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} {getattr(self, name)} leaves nothing; give more than 0")
