"""A model's routing profile: how often and how recently each expert was used, kept across runs.

Learned while the model runs, saved at exit, and loaded at the next start, when it determines which experts to read first and
which few to pin. Counts decay, because profiles depend on the topic (in field traces, the top sets of coding and general text
overlap by a fifth to a third) and last week's topic must not outweigh today's.

Saved as `cache_dir()/profiles/<identity>.profile`, so a profile is never used with other weights. Losing one only costs a cold
start: an unreadable or mismatched file causes a warning and an empty profile. If two processes run one model, the last one to
exit writes the file.

File, little-endian: 8 bytes magic "LRPROF01"; u32 length of the JSON header {"identity", "shapes", "clock", "half_life"}; header;
per layer of `shapes` f32 counts, then per layer i64 last uses; xxh3_64 of everything before.
"""

from __future__ import annotations

import json
import logging
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import xxhash

from localrun.atomic import replacing
from localrun.errors import FormatError
from localrun.kernel_cache import cached_jit
from localrun.paths import cache_dir

log = logging.getLogger(__name__)

I32 = npt.NDArray[np.int32]
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

Key = tuple[int, int]
"""(layer, expert)."""

HALF_LIFE_TOKENS: Final = 20_000
"""Half-life of a use in tokens: a long working session or two."""

MAGIC: Final = b"LRPROF01"
MAX_HEADER_BYTES: Final = 1 << 20
_RESCALE_AT: Final = 2.0**200  # of the growing weight; float64 holds 2**1023


@cached_jit(nogil=True)
def _count(counts: F64, last: I64, experts: I32, starts: I32, weight: float, clock: int) -> None:
    """Compiled because it runs once per layer and token: 0.8 us a call, against 12 in numpy."""
    for i in range(experts.size):
        counts[experts[i]] += weight * (starts[i + 1] - starts[i])
        last[experts[i]] = clock


class RoutingProfile:
    """Counts and last uses per (layer, expert).

    Written by the decoding thread; readers in other threads may see a partially counted call. Instead of decaying every count
    at every token, new uses get ever larger weights (`2 ** (clock / half_life)`); only ratios matter.

    Attributes:
        identity: `ModelSource.identity` of the model.
        clock: tokens seen so far, in all runs.

    Args:
        shapes: experts by block number.
        half_life: in tokens.
    """

    def __init__(self, identity: str, shapes: Mapping[int, int], *, half_life: float = HALF_LIFE_TOKENS) -> None:
        self.identity = identity
        self.clock = 0
        self._half_life = half_life
        self._shapes = dict(sorted(shapes.items()))
        self._counts: dict[int, F64] = {layer: np.zeros(n) for layer, n in self._shapes.items()}
        self._last: dict[int, I64] = {layer: np.full(n, -1, np.int64) for layer, n in self._shapes.items()}
        self._first_layer = min(self._shapes, default=0)
        self._weight = 1.0

    def record(self, layer: int, experts: I32, starts: I32, n_tokens: int) -> None:
        """Counts one layer call; the arguments are `Routing`'s.

        Args:
            experts: (n,) distinct experts of the call; must be experts of that layer.
            starts: (n + 1,) expert i has `starts[i + 1] - starts[i]` (token, expert) pairs.
            n_tokens: tokens of the call; the clock advances with the first layer's calls.
        """
        if layer == self._first_layer:
            self._advance(n_tokens)
        _count(self._counts[layer], self._last[layer], experts, starts, self._weight, self.clock)

    def _advance(self, n_tokens: int) -> None:
        self.clock += n_tokens
        self._weight *= 2.0 ** (n_tokens / self._half_life)
        if self._weight > _RESCALE_AT:
            for counts in self._counts.values():
                counts /= self._weight
            self._weight = 1.0

    def seed(self, counts: Mapping[str, object], n_tokens: object) -> None:
        """Seeds an empty profile with external counts, such as a calibration's; warns if they don't fit.

        Args:
            counts: (n_experts,) pairs by block number; keys are strings, as in JSON.
            n_tokens: tokens they were counted over.
        """
        try:
            if type(n_tokens) is not int or n_tokens <= 0:
                raise ValueError(f"{n_tokens!r} tokens")
            arrays = {layer: np.array(counts[str(layer)], np.float64) for layer in self._shapes}
            for layer, n in self._shapes.items():
                if arrays[layer].shape != (n,) or not ((arrays[layer] >= 0) & (arrays[layer] < 2.0**53)).all():
                    raise ValueError(f"layer {layer}: not {n} numbers of uses")
        except (KeyError, TypeError, ValueError) as error:
            log.warning("ignoring the routing counts in the model's manifest: %s", error)
            return
        for layer, array in arrays.items():
            self._counts[layer][:] = array * self._weight
            self._last[layer][array > 0] = 0
        self.clock = n_tokens

    @property
    def is_empty(self) -> bool:
        """Nothing was recorded or loaded yet."""
        return self.clock == 0

    def counts(self, layer: int) -> F64:
        """(n_experts,) decayed pairs per expert of a layer; a copy."""
        return self._counts[layer] / self._weight

    def share(self, keys: list[Key]) -> float:
        """Part of all decayed uses that went to these experts; 0.0 for an empty profile."""
        total = sum(float(counts.sum()) for counts in self._counts.values())
        return sum(float(self._counts[layer][expert]) for layer, expert in keys) / total if total else 0.0

    def ranking(self) -> list[Key]:
        """All experts that were ever used, likeliest first; of equals the more recent one."""
        layers = np.concatenate([np.full(n, layer) for layer, n in self._shapes.items()] or [np.empty(0, np.int64)])
        experts = np.concatenate([np.arange(n) for n in self._shapes.values()] or [np.empty(0, np.int64)])
        counts = np.concatenate([*self._counts.values(), np.empty(0)])
        last = np.concatenate([*self._last.values(), np.empty(0, np.int64)])
        order = np.lexsort((-last, -counts))
        order = order[counts[order] > 0]
        return list(zip(layers[order].tolist(), experts[order].tolist(), strict=True))

    def hottest(self, n: int) -> list[Key]:
        """The n likeliest experts, fewer if fewer were used."""
        return self.ranking()[:n]

    # -- file ----------------------------------------------------------------------------------------------------------

    def save(self, path: Path | None = None) -> None:
        """Writes the profile (atomically), by default where `load` looks. A failure is a warning."""
        target = path or profile_path(self.identity)
        body = self._encode()
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with replacing(target) as file:
                file.write(body + xxhash.xxh3_64_digest(body))
        except OSError as error:
            log.warning("could not save the routing profile: %s", error)

    def _encode(self) -> bytes:
        header = json.dumps(
            {
                "identity": self.identity,
                "shapes": {str(layer): n for layer, n in self._shapes.items()},
                "clock": self.clock,
                "half_life": self._half_life,
            }
        ).encode()
        counts = [self.counts(layer).astype("<f4").tobytes() for layer in self._shapes]
        last = [self._last[layer].astype("<i8").tobytes() for layer in self._shapes]
        return b"".join((MAGIC, struct.pack("<I", len(header)), header, *counts, *last))

    @classmethod
    def load(
        cls,
        identity: str,
        shapes: Mapping[int, int],
        *,
        path: Path | None = None,
        half_life: float = HALF_LIFE_TOKENS,
    ) -> RoutingProfile:
        """The model's saved profile; an empty one if there is none, or (with a warning) if it does not fit."""
        profile = cls(identity, shapes, half_life=half_life)
        source = path or profile_path(identity)
        try:
            profile._decode(source.read_bytes())
        except FileNotFoundError:
            pass
        except OSError as error:
            log.warning("%s: can't read the routing profile: %s", source, error.strerror)
        except FormatError as error:
            log.warning("%s: ignoring the routing profile: %s", source, error)
        return profile

    def _decode(self, data: bytes) -> None:
        """Takes over a file's contents; changes nothing if it raises FormatError."""
        header, body = _parse(data)
        shapes = {str(layer): n for layer, n in self._shapes.items()}
        if header.get("identity") != self.identity or header.get("shapes") != shapes:
            raise FormatError("it belongs to another model")
        clock = header.get("clock")
        n_experts = sum(self._shapes.values())
        if not isinstance(clock, int) or clock < 0 or len(body) != n_experts * (4 + 8):
            raise FormatError("it is damaged")
        counts, last = np.frombuffer(body, "<f4", n_experts), np.frombuffer(body, "<i8", n_experts, 4 * n_experts)
        if not (np.isfinite(counts).all() and (counts >= 0).all() and (last <= clock).all()):
            raise FormatError("it holds impossible values")
        at = 0
        for layer, n in self._shapes.items():
            self._counts[layer][:], self._last[layer][:] = counts[at : at + n], last[at : at + n]
            at += n
        self.clock = clock


def profile_path(identity: str) -> Path:
    """Where the profile of the model with that identity is kept."""
    return cache_dir() / "profiles" / f"{identity}.profile"


def _parse(data: bytes) -> tuple[dict[str, Any], bytes]:
    body, digest = data[:-8], data[-8:]
    if body[:8] != MAGIC or len(body) < 12:
        raise FormatError("it is not a profile of this version")
    if xxhash.xxh3_64_digest(body) != digest:
        raise FormatError("its checksum is wrong")
    n_bytes = int.from_bytes(body[8:12], "little")
    try:
        header = json.loads(body[12 : 12 + min(n_bytes, MAX_HEADER_BYTES)])
    except ValueError as error:
        raise FormatError("its header is damaged") from error
    if not isinstance(header, dict):
        raise FormatError("its header is damaged")
    return header, body[12 + n_bytes :]
