"""Options that commands share, and those of `prefixserve generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

from typer import Option

from clients._calls import Parameters

Url = Annotated[
    str, Option("--url", "--base-url", envvar="PREFIXSERVE_URL", help="Address of the server.")
]
Json = Annotated[bool, Option("--json", help="Print JSON, for programs.")]

RedisUrl = Annotated[
    str | None,
    Option(
        envvar="PREFIXSERVE_REDIS_URL",
        help="Redis or Valkey with the store; without it, the one in the data directory.",
    ),
]
DataDir = Annotated[
    Path, Option(envvar="PREFIXSERVE_DATA_DIR", help="Data directory of the server.")
]

Base = Annotated[bool, Option("--base", help="Use the bare base model: give TEXT alone.")]
Stream = Annotated[bool, Option("--stream", help="Print tokens as they come.")]
MaxNewTokens = Annotated[int | None, Option(help="Most tokens to generate.")]
DoSample = Annotated[
    bool | None, Option("--sample/--greedy", help="Draw tokens, or take the likeliest ones.")
]
Temperature = Annotated[float | None, Option(help="Over 1 is more random, under 1 less.")]
TopK = Annotated[int | None, Option(help="Draw from this many likeliest tokens.")]
TopP = Annotated[float | None, Option(help="Draw from the likeliest tokens of this mass.")]
MinP = Annotated[float | None, Option(help="Drop tokens this much less likely than the first.")]
TypicalP = Annotated[float | None, Option(help="Draw from the most typical tokens of this mass.")]
RepetitionPenalty = Annotated[float | None, Option(help="Over 1 avoids tokens seen before.")]
FrequencyPenalty = Annotated[float | None, Option(help="Over 0 avoids tokens generated often.")]
Seed = Annotated[int | None, Option(help="Makes drawn tokens repeatable.")]
Stop = Annotated[list[str] | None, Option(help="End at this text; may be given several times.")]
NumBeams = Annotated[int | None, Option(help="Follow so many hypotheses (beam search).")]
LengthPenalty = Annotated[float | None, Option(help="With beams: over 0 prefers longer texts.")]
NoRepeatNgramSize = Annotated[int | None, Option(help="No sequence of so many tokens comes twice.")]
MinNewTokens = Annotated[int | None, Option(help="Fewest tokens to generate.")]
IgnoreEos = Annotated[bool | None, Option("--ignore-eos", help="Go on past the text's end.")]


def parameters(**given: Any) -> Parameters:
    """Those that were given; the server's defaults hold for those that are None."""
    return cast(Parameters, {name: value for name, value in given.items() if value is not None})
